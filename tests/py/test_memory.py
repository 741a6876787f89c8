"""Keeper and server in a control group whose memory ends: answers or errors, the mount lives on, and nothing is left over.

A server does not use the last of its group's memory, which the kernel would kill it for.
"""

import errno
import hashlib
import os
import pathlib
import subprocess
import sys
import time

import conftest
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MIB = 1 << 20
ROOM = 96 * MIB


class Group:
    """A control group with a limit of memory: of version 2, or of the memory controller of version 1."""

    def __init__(self):
        lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
        own = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in lines}
        self.first_version = "memory" in own
        base = pathlib.Path("/sys/fs/cgroup/memory" if self.first_version else "/sys/fs/cgroup")
        self.limit_file = "memory.limit_in_bytes" if self.first_version else "memory.max"
        self.usage_file = "memory.usage_in_bytes" if self.first_version else "memory.current"
        at = base / own["memory" if self.first_version else ""].lstrip("/")
        # Version 2 limits only groups below one without processes of its own.
        for parent in [at, *at.parents]:
            self.path = parent / f"vineyard-fs-test-{os.getpid()}"
            self.path.mkdir()
            if (self.path / self.limit_file).exists():
                return
            self.path.rmdir()
            if parent == base:
                raise OSError(errno.ENOTSUP, f"no group below {base} may limit memory")

    def enter(self):
        """For a child, before it runs its program."""
        with open(self.path / "cgroup.procs", "w") as file:
            file.write("0")

    def usage(self):
        return int((self.path / self.usage_file).read_text())

    def limit(self, size):
        (self.path / self.limit_file).write_text(str(size))

    def kills(self):
        name = "memory.oom_control" if self.first_version else "memory.events"
        fields = dict(line.split() for line in (self.path / name).read_text().splitlines())
        return int(fields["oom_kill"])

    def remove(self):
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


@pytest.fixture
def group():
    try:
        group = Group()
    except OSError as error:
        pytest.skip(f"no control group with a limit of memory can be made: {error}")
    yield group
    group.remove()


@pytest.fixture
def limited(folder, store, group):
    """Makes a mount in the group."""
    mounts = []

    def make(*options):
        mount = conftest.Mount.__new__(conftest.Mount)
        mount.path, mount.store, mount.log = folder / "mnt", store, folder / "mnt.log"
        mount.path.mkdir()
        mounts.append(mount)
        command = ["mount", mount.path, "--socket", store.socket, "--log-file", mount.log, *options]
        conftest.cli(*command, preexec_fn=group.enter)
        return mount

    yield make
    conftest.unmount_all(mounts)


def in_time(code, *arguments, patience=120):
    """Runs Python outside the group; returns the errno that it ended with, 0 if with none."""
    prelude = "import os, sys\ntry:\n" + "".join(f"    {line}\n" for line in code.strip().splitlines())
    script = prelude + "except OSError as error:\n    print('ERRNO', error.errno)\n"
    result = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=patience)
    assert result.returncode == 0, result.stderr[-2000:]
    return int(result.stdout.split()[1]) if result.stdout.startswith("ERRNO") else 0


READ = """
data = open(sys.argv[1], "rb").read()
import hashlib
assert hashlib.sha256(data).hexdigest() == sys.argv[2]
"""
WRITE = """
piece = os.urandom(1 << 20)
file = os.open(sys.argv[1], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
for _ in range(256):
    os.write(file, piece)
os.close(file)
"""
COPY = """
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as file:
    file.write(source.read())
"""


@pytest.mark.parametrize("what", ["assembling", "staging", "storing", "decoding"])
def test_no_memory_is_answers_or_errors(store, folder, group, limited, make_mount, what):
    if what == "staging":
        # Room for files being written ends long before memory, which holds what they add to the store, too.
        group.limit(480 * MIB)
        mount = limited("--serve", "lazy", "--staging-size", "64Mi")
        assert mount.status()["fs"]["cache"]["limit"] == 120 * MIB, "a part of the group's limit, not of the machine's memory"
    else:
        mount = limited("--cache-size", "1Gi")
    small = pd.DataFrame({"a": np.arange(1000)})
    small.to_feather(mount / "small.arrow")
    status = mount.status()
    if what == "assembling" and not status["passthrough"]:
        pytest.skip(f"nothing is assembled without passthrough: {status['passthrough_reason']}")
    keeper, usage, names = status["keeper"]["pid"], store.usage(), sorted(os.listdir(mount.path))
    large = mount / "large.arrow"
    if what == "assembling":
        # Its memory is the group's of whoever puts it.
        store.put("large", pd.DataFrame({f"c{i}": np.random.default_rng(i).random(4 * MIB) for i in range(8)}))
        names.append("large.arrow")
        usage = store.usage()
        other = make_mount("--serve", "lazy", name="other")
        sum = hashlib.sha256((other / "large.arrow").read_bytes()).hexdigest()
        attempt = lambda: in_time(READ, large, sum)
    elif what == "staging":
        attempt = lambda: in_time(WRITE, mount / "large.bin")
    elif what == "storing":
        source = folder / "source.arrow"
        frame = pd.DataFrame({f"c{i}": np.random.default_rng(i).random(4 * MIB) for i in range(8)})
        frame.to_feather(source, compression="uncompressed")
        attempt = lambda: in_time(COPY, source, large)
    else:
        # A small file of a large table.
        source = folder / "source.parquet"
        zeros = pa.chunked_array([pa.array(np.zeros(1 << 20, dtype=np.int64))] * 48)
        pq.write_table(pa.table({"a": zeros}), source, compression="zstd")
        assert source.stat().st_size < 4 * MIB
        attempt = lambda: in_time(COPY, source, mount / "large.parquet")
    before = group.usage()
    if what != "staging":
        group.limit(before + ROOM)
    outcomes = [attempt() for _ in range(2)]
    kills = group.kills()
    print(f"{what}: outcomes {[errno.errorcode.get(o, o) for o in outcomes]}, {kills} kills by the kernel")
    # A file that there is no memory to assemble is read from the store instead.
    expected = {"assembling": 0, "staging": errno.ENOSPC}.get(what, errno.ENOMEM)
    assert (outcomes, kills) == ([expected] * 2, 0), (outcomes, kills)
    # It lives on within the same limit.
    assert mount.status("ok")["keeper"]["pid"] == keeper
    pd.testing.assert_frame_equal(pd.read_feather(mount / "small.arrow"), small)
    for name in set(os.listdir(mount.path)) - set(names):
        (mount / name).unlink()
    conftest.until(lambda: mount.status()["fs"]["staging"]["bytes"] < MIB, mount.status)
    (mount / "after.txt").write_text("after")
    assert (mount / "after.txt").read_text() == "after"
    (mount / "after.txt").unlink()
    conftest.settled(store.usage, usage)
    group.limit(before + 4096 * MIB)
    if what == "assembling":
        assert attempt() == 0, "with more memory it is there again"
        large.unlink()
    assert mount.status()["server"]["restarts"] == 0


# A file in memory, of so many bytes.
HOG = """
import os, sys
with open(sys.argv[1], "wb", buffering=0) as file:
    for _ in range(int(sys.argv[2]) >> 16):
        file.write(bytes(1 << 16))
"""


def test_others_may_use_up_the_memory(store, folder, group, limited):
    """While hardly anything is left of the group's memory all that is there can be read, and no server ends because of
    what it is asked to store; afterwards all is as before."""
    mount = limited("--serve", "lazy")
    small = pd.DataFrame({"a": np.arange(1000)})
    small.to_feather(mount / "small.arrow")
    keeper, usage = mount.status()["keeper"]["pid"], store.usage()
    hog = pathlib.Path("/dev/shm") / f"vineyard-fs-test-{os.getpid()}"
    group.limit(group.usage() + ROOM)
    try:
        command = [sys.executable, "-c", HOG, hog, str(ROOM - 24 * MIB)]
        subprocess.run(command, preexec_fn=group.enter, timeout=120, check=True)
        assert in_time(WRITE, mount / "large.bin") == errno.ENOMEM
        pd.testing.assert_frame_equal(pd.read_feather(mount / "small.arrow"), small)
        assert sorted(os.listdir(mount.path)) == ["large.bin", "small.arrow"]
        assert (mount / "large.bin").stat().st_size == 256 * MIB, "nothing is lost"
    finally:
        hog.unlink()
    file = os.open(mount / "large.bin", os.O_RDWR)
    group.limit(group.usage() + 512 * MIB)
    os.fsync(file)
    os.close(file)
    assert store.usage() >= usage + 256 * MIB
    (mount / "large.bin").unlink()
    conftest.settled(store.usage, usage)
    status = mount.status()
    assert (status["keeper"]["pid"], status["server"]["restarts"], group.kills()) == (keeper, 0, 0)
