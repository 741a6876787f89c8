"""A real vineyardd and a real mount for each test that asks for one."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

PROJECT = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("VINEYARD_FS", PROJECT / "target/release/vineyard-fs"))


def until(condition, what=lambda: "it does not happen", seconds=90):
    """Waits until a condition holds; its value then. `what` tells what is wrong if it never does."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)
    return found


def settled(measure, expected, seconds=90):
    """Waits until a count is as expected: what is needless goes a while after the last who needs it."""
    until(lambda: measure() == expected, lambda: f"{measure()}, and {expected} expected", seconds)


def freeze(pid: int):
    """Stops a process; returns once all of its threads stand still, which others notice one after the other."""
    os.kill(pid, signal.SIGSTOP)

    def states():
        for thread in pathlib.Path(f"/proc/{pid}/task").iterdir():
            try:
                yield (thread / "stat").read_text().rsplit(") ", 1)[1][0]
            except (FileNotFoundError, ProcessLookupError):
                pass

    until(lambda: set(states()) == {"T"}, lambda: f"threads of {pid} are in the states {set(states())}")


def vineyardd_binary() -> str:
    if found := os.environ.get("VINEYARDD") or shutil.which("vineyardd"):
        return found
    import vineyard

    base = pathlib.Path(vineyard.__file__).parent
    for path in [base / "bdist" / "vineyardd", base / "vineyardd", base.parent / "vineyard" / "bdist" / "vineyardd"]:
        if path.exists():
            return str(path)
    raise RuntimeError("no vineyardd: pip install vineyard-bdist")


class Store:
    """A vineyardd of its own, and the official client's connection to it."""

    def __init__(self, folder: pathlib.Path, size: str = "1Gi"):
        self.folder = folder
        self.socket = str(folder / "vineyard.sock")
        self.size = size
        self.process = None
        self.start()

    def start(self):
        log = open(self.folder / "vineyardd.log", "ab")
        command = [vineyardd_binary(), "--socket", self.socket, "--size", self.size, "--meta", "local", "--rpc=false"]
        # As `mount` launches a private one.
        environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}
        self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, env=environment)
        self.client = None
        for _ in range(1200):
            if self.process.poll() is not None:
                raise RuntimeError(f"vineyardd ended: {(self.folder / 'vineyardd.log').read_text()[-2000:]}")
            try:
                # The client complains aloud about a socket that is not there yet.
                if os.path.exists(self.socket):
                    self.client = self.connect()
                    return
            except Exception:
                pass
            time.sleep(0.05)
        raise RuntimeError("vineyardd does not answer")

    def connect(self):
        import vineyard

        return vineyard.connect(self.socket)

    def put(self, name: str, value):
        return self.client.put(value, name=name, persist=True)

    def replace(self, name: str, value):
        """As the official Kedro plugin saves: delete the old value, put the new one."""
        old = self.client.get_name(name)
        self.client.delete(old)
        self.client.drop_name(name)
        return self.put(name, value)

    def usage(self) -> int:
        return self.client.status.memory_usage

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def cli(*arguments, check=True, timeout=120, **kwargs):
    result = subprocess.run(
        [str(BINARY), *map(str, arguments)], capture_output=True, text=True, timeout=timeout, **kwargs
    )
    if check and result.returncode != 0:
        raise AssertionError(f"vineyard-fs {arguments} -> {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def told_left_over(text: str) -> int:
    """Bytes in blobs that a log, or what `gc` says, tells of as perhaps left over: the ids of what a process asked for just
    before it was killed die with it, and nobody can tell those blobs from another client's."""
    return sum(int(n) for n in re.findall(r"(\d+) bytes in \d+ unsealed blobs", text))


def status(path, state=None) -> dict:
    """What is said of a mount, once all of it is said and it is in the state, if one is given: keepers and servers that are
    too busy leave out what they do not know soon."""
    deadline = time.monotonic() + 60
    while True:
        found = json.loads(cli("status", path, "--json").stdout)
        whole = found["state"] == "dead" or ("fs" in found and "error" not in found["fs"])
        if whole and state in (None, found["state"]):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


class Mount:
    """A mount over a store; a path below it by `/`."""

    #: How many of its servers a test takes down; `None` for any number. Others are seen by nobody who reads and writes,
    #: and so the end of a test asks.
    expected_restarts: int | None = 0

    def __init__(self, folder: pathlib.Path, store: Store, *options: str):
        self.path = folder
        self.store = store
        self.log = folder.parent / f"{folder.name}.log"
        folder.mkdir(exist_ok=True)
        cli("mount", folder, "--socket", store.socket, "--log-file", self.log, *options)

    def __truediv__(self, name: str) -> pathlib.Path:
        return self.path / name

    def status(self, state=None) -> dict:
        """As the function `status`."""
        return status(self.path, state)

    def told_left_over(self) -> int:
        """As the function `told_left_over`, of the mount's log."""
        return told_left_over(self.log.read_text())

    def kill_server(self) -> int:
        """Kills the server; the keeper starts another. Returns the process number."""
        pid = self.status()["server"]["pid"]
        os.kill(pid, signal.SIGKILL)
        self.expected_restarts += 1
        return pid

    def next_server(self, former: int) -> dict:
        """The status once a server works that is not the one with this process number."""
        return until(lambda: (now := self.status())["server"]["pid"] != former and now, lambda: "no server comes back")

    def upgrade(self):
        """Replaces the server by a new one, as `vineyard-fs upgrade` does."""
        cli("upgrade", self.path)
        self.expected_restarts += 1

    def faults(self) -> list[str]:
        """What is wrong with the mount: servers that ended by themselves, and panics."""
        found = []
        mounted = any(line.split(" ")[4] == str(self.path) for line in open("/proc/self/mountinfo"))
        if mounted and self.expected_restarts is not None:
            # One that was killed a moment ago may not be replaced yet.
            patience = time.monotonic() + 60
            while (server := self.status().get("server", {})).get("restarts", 0) < self.expected_restarts:
                if time.monotonic() > patience:
                    break
                time.sleep(0.05)
            if server.get("restarts") != self.expected_restarts:
                found.append(f"{self.path}: {self.expected_restarts} restarts are expected: {server}")
        if self.log.exists():
            lines = self.log.read_text(errors="replace").splitlines()
            found += [line for line in lines if "panicked" in line or "ended with a panic" in line]
        return found

    def unmount(self):
        """Unmounts; fails if a server was taken down by anything but the test."""
        try:
            faults = self.faults()
        except Exception as error:
            faults = [f"{self.path} has no status: {error}"]
        cli("unmount", self.path, "--force", check=False)
        assert not faults, "\n".join(faults)


def unmount_all(mounts):
    """Unmounts each; fails if a server of one was taken down by anything but the test."""
    faults = []
    for mount in mounts:
        try:
            mount.unmount()
        except AssertionError as error:
            faults.append(str(error))
    assert not faults, "\n".join(faults)


@pytest.fixture
def folder():
    # Sockets need short paths.
    path = pathlib.Path(tempfile.mkdtemp(prefix="vfs-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def store(folder):
    store = Store(folder)
    yield store
    store.stop()


def instances(folder, count):
    from cluster import Cluster

    cluster = Cluster(folder, count)
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(folder):
    """Two instances on one etcd."""
    yield from instances(folder, 2)


@pytest.fixture
def three(folder):
    """Three instances on one etcd."""
    yield from instances(folder, 3)


@pytest.fixture(params=["passthrough", "requests"])
def serving(request):
    """Both ways to serve files: by the kernel from memory files, and by requests."""
    return {"passthrough": [], "requests": ["--serve", "lazy"]}[request.param]


@pytest.fixture
def mount(folder, store):
    mount = Mount(folder / "mnt", store)
    yield mount
    mount.unmount()


@pytest.fixture
def make_mount(folder, store):
    """Makes mounts with options; all are unmounted at the end."""
    mounts = []

    def make(*options, name=None, over=store):
        mount = Mount(folder / (name or f"mnt{len(mounts)}"), over, *options)
        mounts.append(mount)
        return mount

    yield make
    unmount_all(mounts)


def pytest_sessionstart(session):
    if not BINARY.exists():
        sys.exit(f"{BINARY} is missing: run scripts/setup")
