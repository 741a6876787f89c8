"""Files that are open while the server is killed or upgraded: they stay on their version, and can be opened again."""

import hashlib
import os
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
from conftest import settled

DROP_CACHES = "/proc/sys/vm/drop_caches"

READER = """
import hashlib, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
os.pread(fd, 10, 0)
print("open", flush=True)
sys.stdin.readline()
size = os.fstat(fd).st_size
read = b"".join(os.pread(fd, 1 << 20, at) for at in range(0, size, 1 << 20))
print(hashlib.sha256(read).hexdigest(), hashlib.sha256(mapped).hexdigest(), flush=True)
"""


class Reader:
    """A process that has a file open and mapped, and has read nothing of it but the beginning."""

    def __init__(self, path):
        command = [sys.executable, "-c", READER, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "open\n"

    def ends_with(self, expected: str, what):
        """It reads and maps these bytes."""
        out, _ = self.process.communicate("go\n", timeout=60)
        assert (self.process.returncode, out.split()) == (0, [expected, expected]), what


def frame(megabytes: float, columns: int, value: float = 1.0) -> pd.DataFrame:
    rows = int(megabytes * (1 << 20)) // 8 // columns
    return pd.DataFrame({f"c{i}": np.full(rows, value + i) for i in range(columns)})


def digest(path) -> str:
    """Of the bytes that another process reads."""
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def next_server(mount, how: str):
    server = mount.status()["server"]["pid"]
    mount.upgrade() if how == "upgraded" else mount.kill_server()
    mount.next_server(server)


def save_elsewhere(path):
    """Another process replaces a file."""
    script = "import sys, pandas as pd; pd.DataFrame({'a': [1]}).to_feather(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)


def replace_by_rename(path):
    save_elsewhere(path.parent / "new.arrow")
    os.rename(path.parent / "new.arrow", path)


CHANGES = {
    "left": lambda path: None,
    "replaced": save_elsewhere,
    "replaced by a rename": replace_by_rename,
    "removed": os.unlink,
    "renamed": lambda path: os.rename(path, path.parent / "y.arrow"),
    "made private": lambda path: os.chmod(path, 0o600),
    "marked": lambda path: os.setxattr(path, "user.k", b"v"),
    "moved with its folder": lambda path: os.rename(path.parent, path.parent.parent / f"{path.parent.name}-moved"),
}


@pytest.mark.parametrize("size", [0.01, 3], ids=["small", "large"])
def test_an_open_file_stays_what_it_was(store, make_mount, serving, size):
    mount = make_mount(*serving)
    before = store.usage()
    readers = []
    for when in ["before", "after"]:
        for what, change in CHANGES.items():
            folder = f"{when} {what}"
            store.put(f"{folder}/x", frame(size, 10, len(readers)))
            path = mount / folder / "x.arrow"
            expected = digest(path)
            readers.append((Reader(path), expected, folder))
            if when == "before":
                change(path)
    next_server(mount, "killed")
    for what, change in CHANGES.items():
        change(mount / f"after {what}" / "x.arrow")
    next_server(mount, "upgraded")
    for reader, expected, what in readers:
        reader.ends_with(expected, what)
    # What was kept for them goes.
    for folder in os.listdir(mount.path):
        for name in os.listdir(mount / folder):
            os.unlink(mount / folder / name)
    settled(store.usage, before)


@pytest.mark.parametrize("how", ["killed", "upgraded"])
def test_what_is_read_by_requests_opens_while_it_is_open(store, make_mount, how):
    mount = make_mount("--cache-size", "48Mi")
    store.put("A", frame(40, 10))
    store.put("B", frame(30, 10, 2))
    store.put("W", frame(36, 40, 3))
    first = os.open(mount / "A.arrow", os.O_RDONLY)
    # One finds no room in the cache, the other is wide.
    paths = [mount / "B.arrow", mount / "W.arrow"]
    files = [os.open(path, os.O_RDONLY) for path in paths]
    for file in files:
        os.pread(file, 4096, 0)
    expected = [digest(path) for path in paths]
    os.close(first)
    for _ in range(2):
        next_server(mount, how)
        for path, file, digest_before in zip(paths, files, expected):
            read = b"".join(os.pread(file, 1 << 20, at) for at in range(0, os.fstat(file).st_size, 1 << 20))
            assert hashlib.sha256(read).hexdigest() == digest_before
            assert digest(path) == digest_before
    for file in files:
        os.close(file)
    assert [digest(path) for path in paths] == expected


def test_what_was_saved_here_opens_while_it_is_open(make_mount):
    """Saved, and given up by the staging area or forgotten by the kernel: the next server has the very file."""
    mount = make_mount("--staging-size", "64Mi")
    bytes_of = {name: random.Random(name).randbytes(10 << 20) for name in "abcd"}
    for name, data in bytes_of.items():
        (mount / f"{name}.bin").write_bytes(data)
    time.sleep(0.5)
    for turn in range(2):
        files = {name: os.open(mount / f"{name}.bin", os.O_RDONLY) for name in bytes_of}
        next_server(mount, "killed")
        for name, data in bytes_of.items():
            assert digest(mount / f"{name}.bin") == hashlib.sha256(data).hexdigest()
            assert os.pread(files[name], 1 << 20, 5 << 20) == data[5 << 20 : 6 << 20]
            os.close(files[name])
        # Only root may, and not everywhere; the kernel forgets by itself, too.
        if os.access(DROP_CACHES, os.W_OK):
            with open(DROP_CACHES, "w") as drop:
                drop.write("2")
        time.sleep(0.5)


def test_each_upgrade_leaves_the_staging_area_as_it_was(make_mount):
    mount = make_mount("--staging-size", "128Mi")
    data = random.Random(1).randbytes(8 << 20)
    for turn in range(6):
        for number in range(12):
            (mount / f"{number}.bin").write_bytes(data)
        next_server(mount, "upgraded")
    for number in range(12):
        assert (mount / f"{number}.bin").read_bytes() == data


def test_shortened_names_stay_open(store, make_mount):
    mount = make_mount("--serve", "lazy")
    store.put("n" * 300, frame(8, 10))
    name = next(name for name in os.listdir(mount.path) if "%~" in name)
    expected = digest(mount / name)
    reader = Reader(mount / name)
    next_server(mount, "killed")
    reader.ends_with(expected, name)


def test_readers_of_more_than_the_cache_holds_notice_no_kills(store, make_mount):
    mount = make_mount("--cache-size", "40Mi")
    rows = 1_500_000
    for number in range(6):
        store.put(f"n{number}", np.full(rows, float(number)))
    stop, done, wrong = threading.Event(), [0], []

    def read(seed: int):
        choose = random.Random(seed)
        while not stop.is_set():
            number = choose.randrange(6)
            try:
                with open(mount / f"n{number}.npy", "rb", buffering=0) as file:
                    os.pread(file.fileno(), 4096, 0)
                    time.sleep(choose.random() * 0.2)
                    at = 128 + 8 * choose.randrange(rows - 200_000)
                    assert (np.frombuffer(os.pread(file.fileno(), 1 << 20, at)) == number).all()
                done[0] += 1
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        time.sleep(1)
        next_server(mount, "killed")
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == [] and done[0] > 0
