"""Saves that are cut short: whatever dies, a name leads to one whole version, and nothing is left over in the store."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import load
import numpy as np
import pandas as pd
import pytest
from conftest import cli, settled, until

ROWS = 200_000
KILLS = int(os.environ.get("VINEYARD_FS_KILLS", "20"))

WRITER = """
import sys, numpy as np, pandas as pd
path, rows = sys.argv[1], int(sys.argv[2])
frames = [pd.DataFrame({"a": np.full(rows, v), "b": np.full(rows, v * 0.5)}) for v in (1, 2)]
print("ready", flush=True)
i = 0
while True:
    frames[i % 2].to_feather(path, compression="uncompressed")
    i += 1
"""


def version(path) -> int:
    """The version that the file shows; fails unless it is one whole version."""
    frame = pd.read_feather(path)
    value = int(frame["a"].iloc[0])
    assert len(frame) == ROWS and (frame["a"] == value).all() and (frame["b"] == value * 0.5).all()
    return value


def start_writer(path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(ROWS)], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"ready\n"
    return writer


def one_version(store, path):
    pd.DataFrame({"a": np.full(ROWS, 1), "b": np.full(ROWS, 0.5)}).to_feather(path, compression="uncompressed")
    return store.usage()


def test_a_killed_writer_leaves_a_whole_version_and_nothing_else(store, mount):
    path = mount / "x.arrow"
    expected = one_version(store, path)
    random.seed(7)
    for _ in range(KILLS):
        writer = start_writer(path)
        time.sleep(random.uniform(0, 0.1))
        writer.kill()
        writer.wait()
        assert version(path) in (1, 2)
        # No blob of an unfinished save is left.
        settled(store.usage, expected)


def test_a_killed_server_comes_back_and_what_was_published_is_whole(store, mount):
    path = mount / "x.arrow"
    one_version(store, path)
    keep = mount / "keep.arrow"
    pd.DataFrame({"a": [1, 2, 3]}).to_feather(keep)
    random.seed(8)
    for _ in range(KILLS // 2):
        with open(keep, "rb") as reader:
            mount.kill_server()
            deadline = time.monotonic() + 60
            while True:
                try:
                    assert version(path) in (1, 2)
                    assert pd.read_feather(keep)["a"].tolist() == [1, 2, 3]
                    break
                except OSError as error:
                    assert time.monotonic() < deadline, f"the mount does not come back: {error}"
                    time.sleep(0.05)
            assert len(reader.read()) == os.fstat(reader.fileno()).st_size
        time.sleep(0.6)
    pd.DataFrame({"a": [4]}).to_feather(keep)
    assert pd.read_feather(keep)["a"].tolist() == [4]


# Saves one file after the other, and tells each that was saved.
SAVER = """
import sys
folder, i = sys.argv[1], 0
while True:
    i += 1
    try:
        with open(f"{folder}/{i}.txt", "w") as file:
            file.write(str(i))
    except OSError:
        continue
    print(f"{i}.txt", flush=True)
"""


def test_nothing_is_saved_beneath_a_mount_that_takes_the_place_of_a_dead_one(store, make_mount, tmp_path):
    """Saves go on while the keeper is killed and the mount made anew: none goes into the bare directory."""
    mount = make_mount()
    mount.expected_restarts = None
    saved = tmp_path / "saved"
    with saved.open("w") as told:
        saver = subprocess.Popen([sys.executable, "-c", SAVER, str(mount.path)], stdout=told)
    try:
        for _ in range(10):
            before = saved.stat().st_size
            until(lambda: saved.stat().st_size > before, lambda: "nothing is saved")
            state = mount.status()
            for process in ("keeper", "server"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(state[process]["pid"], signal.SIGKILL)
            until(lambda: not os.path.exists(f"/proc/{state['keeper']['pid']}"), lambda: "the keeper lives")
            cli("mount", mount.path, "--socket", store.socket, "--log-file", mount.log)
        until(lambda: saved.stat().st_size > before, lambda: "nothing is saved")
    finally:
        saver.kill()
        saver.wait()
    names = saved.read_text().split()
    assert len(names) > 10 and set(names) <= set(os.listdir(mount.path))
    assert all((mount / name).read_text() == name.removesuffix(".txt") for name in names[-100:])
    mount.unmount()
    assert os.listdir(mount.path) == []


def test_a_killed_store_costs_its_data_and_not_the_mount(store, mount):
    pd.DataFrame({"a": [1]}).to_feather(mount / "x.arrow")
    store.process.kill()
    store.process.wait()
    store.start()
    until(lambda: not os.listdir(mount.path))
    pd.DataFrame({"a": [2]}).to_feather(mount / "y.arrow")
    assert pd.read_feather(mount / "y.arrow")["a"].tolist() == [2]


def test_nobody_notices_killed_servers(store, make_mount, serving):
    """Readers, writers, half-written files, names and memory maps go on while the server is killed again and again."""
    mount = make_mount(*serving)
    load.prepare(mount.path)
    stop = store.folder / "stop"
    kinds = ["read", "read", "write", "write", "half", "names", "mapped"]
    clients = []
    load.start(clients, kinds, mount.path, stop)
    random.seed(9)
    kills = []
    server = mount.status()["server"]["pid"]
    while len(kills) < KILLS:
        time.sleep(random.uniform(0.55, 0.9))
        kills.append(time.monotonic())
        os.kill(server, signal.SIGKILL)
        server = mount.next_server(server)["server"]["pid"]
    time.sleep(1)
    outcomes = load.end(clients, stop)
    # How much longer than usual the longest operation took that a kill fell into.
    pauses = []
    for at in kills:
        longest = 0.0
        for outcome in outcomes:
            usual = sorted(took for _, took in outcome["slow"])[len(outcome["slow"]) // 2]
            hit = [took - usual for start, took in outcome["slow"] if start <= at + 0.05 and start + took >= at]
            longest = max([longest, *hit])
        pauses.append(longest * 1000)
    pauses.sort()
    counts = {kind: sum(o["done"] for o in outcomes if o["kind"] == kind) for kind in dict.fromkeys(kinds)}
    print(f"{len(kills)} kills: pause median {pauses[len(pauses) // 2]:.0f} ms, worst {pauses[-1]:.0f} ms; operations {counts}")
    assert [outcome["wrong"] for outcome in outcomes if outcome["wrong"]] == []
    assert all(count > KILLS for count in counts.values()), counts
    mount.expected_restarts = KILLS


APPENDER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
for line in sys.stdin:
    if line == "sync\\n":
        os.fsync(fd)
    elif line == "close\\n":
        os.close(fd)
    else:
        os.write(fd, line.encode())
    print("done", flush=True)
"""


class Appender:
    """A process that has a file open for appending."""

    def __init__(self, path):
        command = [sys.executable, "-c", APPENDER, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def do(self, *lines):
        for line in lines:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            assert self.process.stdout.readline() == "done\n"


def seen(path) -> bytes:
    """The bytes that another process reads."""
    return subprocess.run(["cat", path], capture_output=True, check=True).stdout


def test_the_next_server_knows_who_writes_what(store, make_mount, serving):
    mount = make_mount(*serving)
    for name in ["x.arrow", "y.arrow"]:
        one_version(store, mount / name)
    old = seen(mount / "x.arrow")
    pd.DataFrame({"a": np.full(ROWS, 2), "b": np.full(ROWS, 1.0)}).to_feather(
        mount.path.parent / "new", compression="uncompressed"
    )
    new = (mount.path.parent / "new").read_bytes()
    (mount / "log.txt").write_text("0\n")
    os.setxattr(mount / "log.txt", "user.k", b"v")
    writer = os.open(mount / "x.arrow", os.O_WRONLY | os.O_TRUNC)
    os.write(writer, new[: len(new) // 2])
    half = "import sys\nf = open(sys.argv[1], 'wb', 0)\nf.write(b'ARROW1' * 99)\nprint(flush=True)\nsys.stdin.read()"
    dies = subprocess.Popen(
        [sys.executable, "-c", half, mount / "y.arrow"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert dies.stdout.readline() == b"\n"
    assert seen(mount / "x.arrow") == old and seen(mount / "y.arrow") == old
    cut = os.open(mount / "cut.bin", os.O_RDWR | os.O_CREAT)
    os.write(cut, b"longer")
    os.fsync(cut)
    first = Appender(mount / "log.txt")
    first.do("A", "sync")
    mount.next_server(mount.kill_server())
    assert os.getxattr(mount / "log.txt", "user.k") == b"v"
    os.ftruncate(cut, 4)
    os.close(cut)
    assert seen(mount / "cut.bin") == b"long"
    assert seen(mount / "x.arrow") == old and seen(mount / "y.arrow") == old
    dies.kill()
    dies.wait()
    second = Appender(mount / "log.txt")
    second.do("B", "close")
    first.do("A", "close")
    assert seen(mount / "log.txt") == b"0\nA\nB\nA\n"
    time.sleep(0.2)
    assert seen(mount / "y.arrow") == old
    os.unlink(mount / "y.arrow")
    os.write(writer, new[len(new) // 2 :])
    os.close(writer)
    assert seen(mount / "x.arrow") == new
    assert sorted(os.listdir(mount.path)) == ["cut.bin", "log.txt", "x.arrow"]


def test_a_path_that_another_mount_took_away_is_gone_for_the_next_server_too(store, make_mount):
    """Within the second for which the kernel keeps a name, and where the object has the number of its former path again."""
    one, other = make_mount(), make_mount(name="other")
    pd.DataFrame({"a": [1.0]}).to_feather(one / "a.arrow")
    assert pd.read_feather(other / "a.arrow")["a"][0] == 1
    os.rename(other / "a.arrow", other / "b.arrow")
    assert pd.read_feather(other / "b.arrow")["a"][0] == 1
    os.rename(one / "b.arrow", one / "a.arrow")
    other.next_server(other.kill_server())
    with pytest.raises(FileNotFoundError):
        pd.read_feather(other / "b.arrow")
    assert pd.read_feather(other / "a.arrow")["a"][0] == 1
