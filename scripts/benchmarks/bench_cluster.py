"""Reading what lives on another instance: against a bare client of vineyardd's TCP side, and the official migration."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import statistics
import struct
import tempfile
import threading
import time

import numpy as np
import pyarrow as pa

from common import floats, read_file, seconds

from cluster import Cluster  # noqa: E402 (the tests' own way to start one; `common` has set the path)

CONNECTIONS = (1, 2, 4)


@contextlib.contextmanager
def world(size: int, linked=False):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="vfs-"))
    cluster = None
    try:
        cluster = Cluster(folder, 2, str(size), linked)
        yield cluster
    finally:
        if cluster:
            cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def run(report, arguments):
    with world(arguments.size * 5 // 2 + (256 << 20)) as cluster:
        name, value = "X", floats(arguments.size, 10)
        cluster[0].put(name, value)
        if report.wanted("throughput"):
            throughput(report, arguments, cluster, name)
        if report.wanted("migrate"):
            migrate(report, arguments, cluster, name)
        if report.wanted("first byte"):
            first_byte(report, arguments, cluster, name)
        if report.wanted("columns"):
            columns(report, arguments, cluster)
    if report.wanted("link"):
        link(report, arguments)


class Bare:
    """A client that takes blobs over TCP and throws the bytes away: what vineyardd's TCP side delivers."""

    def __init__(self, port: int, host="127.0.0.1"):
        self.address = (host, port)
        self.buffer = bytearray(1 << 20)

    def connect(self):
        connection = socket.create_connection(self.address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        register = {"type": "register_request", "version": "0.24.2", "store_type": 1, "session_id": 0}
        self.call(connection, register | {"username": "", "password": ""})
        return connection

    def call(self, connection, request: dict) -> dict:
        text = json.dumps(request).encode()
        connection.sendall(struct.pack("<Q", len(text)) + text)
        (size,) = struct.unpack("<Q", self.exactly(connection, 8))
        reply = json.loads(self.exactly(connection, size))
        if reply.get("code"):
            raise SystemExit(f"bench: vineyardd answers {reply}")
        return reply

    @staticmethod
    def exactly(connection, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = connection.recv(size - len(parts))
            if not part:
                raise SystemExit("bench: vineyardd closed the connection")
            parts += part
        return bytes(parts)

    def take(self, connection, blobs: list[int]) -> int:
        request = {"type": "get_remote_buffers_request", "num": len(blobs), "unsafe": False, "compress": False}
        request |= {str(place): blob for place, blob in enumerate(blobs)} | {"use_rdma": False}
        reply = self.call(connection, request)
        left = total = sum(payload["data_size"] for payload in reply["payloads"])
        view = memoryview(bytearray(1 << 20))
        while left:
            left -= connection.recv_into(view, min(left, len(view)))
        return total

    def all(self, blobs: list[int], connections: int) -> tuple[float, int]:
        """Seconds and bytes of taking all, one blob a request."""
        todo, total = list(blobs), []
        opened = [self.connect() for _ in range(connections)]

        def work(connection):
            with contextlib.suppress(IndexError):
                while True:
                    total.append(self.take(connection, [todo.pop(0)]))

        threads = [threading.Thread(target=work, args=(connection,)) for connection in opened]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = time.perf_counter() - start
        for connection in opened:
            connection.close()
        return taken, sum(total)


def blobs_of(meta) -> list[int]:
    import vineyard

    found = []

    def walk(tree: dict):
        for member in tree.values():
            if isinstance(member, dict) and member.get("typename") == "vineyard::Blob":
                found.append(int(vineyard.ObjectID(member["id"])))
            elif isinstance(member, dict):
                walk(member)

    walk(json.loads(str(meta)) if not isinstance(meta, dict) else meta)
    return [blob for blob in dict.fromkeys(found) if blob != 1 << 63]


def tree_of(instance, name: str) -> dict:
    """The metadata, as vineyardd's socket tells it."""
    bare = Bare(instance.port, instance.link.there if instance.link else "127.0.0.1")
    connection = bare.connect()
    identity = int(instance.client.get_name(name))
    reply = bare.call(connection, {"type": "get_data_request", "id": [identity], "sync_remote": False, "wait": False})
    connection.close()
    return next(iter(reply["content"].values()))


def bare_rates(bare: Bare, blobs: list[int], rounds: int) -> dict[int, list[float]]:
    rates = {connections: [] for connections in CONNECTIONS}
    for _ in range(rounds):
        for connections in CONNECTIONS:
            taken, total = bare.all(blobs, connections)
            rates[connections].append(total / taken)
    return rates


def throughput(report, arguments, cluster, name):
    """Rounds of a bare client and a first read through a mount that has nothing yet; then a second read."""
    blobs, bare = blobs_of(tree_of(cluster[0], name)), Bare(cluster[0].port)
    rates, cold, ratios, second, local = {n: [] for n in CONNECTIONS}, [], [], [], []
    here = cluster.mount(0)
    read_file(here / f"{name}.arrow")
    cache = ["--cache-size", str(arguments.size * 3 // 2 + (64 << 20))]
    for _ in range(arguments.rounds):
        for connections, rate in bare_rates(bare, blobs, 1).items():
            rates[connections] += rate
        there = cluster.mount(1, *cache)
        path = there / f"{name}.arrow"
        size = os.stat(path).st_size
        cold.append(size / seconds(lambda: read_file(path), 3 * size))
        ratios.append(cold[-1] / max(rates[connections][-1] for connections in CONNECTIONS))
        second.append(size / seconds(lambda: read_file(path)))
        second.append(size / seconds(lambda: read_file(path)))
        local.append(size / seconds(lambda: read_file(here / f"{name}.arrow")))
        there.unmount()
    here.unmount()
    for connections, list in rates.items():
        report.figure(f"bare client, {connections} connections", statistics.median(list) / 1e9, "GB/s", None, rates=list)
    report.figure("first read of a remote dataset", statistics.median(cold) / 1e9, "GB/s", None, rates=cold)
    report.figure("first read, against the bare client", statistics.median(ratios), "× bare", 0.9, better="more", ratios=ratios)
    again = statistics.median(second[1::2]) / statistics.median(local)
    report.figure("later read, against a local dataset", again, "× local", 0.9, better="more", rates=second, local=local)


def migrate(report, arguments, cluster, name):
    """The official client's migration of the same dataset, and ours into the local vineyardd."""
    from conftest import cli

    size = arguments.size
    rates, first, ours = [], [], []
    for _ in range(max(1, arguments.rounds // 2)):
        start = time.perf_counter()
        copy = cluster[1].client.migrate(cluster[0].client.get_name(name))
        rates.append(size / (time.perf_counter() - start))
        cluster[1].client.delete(copy)
        there = cluster.mount(1)
        first.append(size / seconds(lambda: read_file(there / f"{name}.arrow"), 3 * size))
        there.unmount()
        start = time.perf_counter()
        cli("pin", name, "--socket", cluster[1].socket)
        ours.append(size / (time.perf_counter() - start))
        cli("pin", "--drop", name, "--socket", cluster[1].socket)
    official = statistics.median(rates)
    report.figure("official migrate", official / 1e9, "GB/s", None, rates=rates)
    report.figure("first read, against official migrate", statistics.median(first) / official, "× official", 3, better="more", rates=first)
    report.figure("vineyard-fs pin, against official migrate", statistics.median(ours) / official, "× official", 3, better="more", rates=ours)


def first_byte(report, arguments, cluster, name):
    cluster[0].put("one", np.zeros(arguments.size // 8))
    for dataset, file in [("a frame of ten columns", f"{name}.arrow"), ("an array of one blob", "one.npy")]:
        times = []
        for _ in range(max(5, arguments.rounds)):
            there = cluster.mount(1)
            start = time.perf_counter()
            with open(there / file, "rb", buffering=0) as opened:
                assert len(opened.read(1)) == 1
            times.append((time.perf_counter() - start) * 1e3)
            there.unmount()
        report.figure(f"open and first byte, {dataset}", statistics.median(times), "ms", 20, times=times)
    cluster[0].client.delete(cluster[0].client.get_name("one"))
    cluster[0].client.drop_name("one")


def columns(report, arguments, cluster):
    """Bytes on the loopback device while two of a hundred columns are read; those of etcd are among them."""

    def received() -> int:
        return int(pathlib.Path("/sys/class/net/lo/statistics/rx_bytes").read_text())

    value = floats(arguments.size // 2, 100)
    cluster[0].put("wide", value)
    shares = []
    for number in range(max(3, arguments.rounds // 2)):
        there = cluster.mount(1)
        # The index is a column too.
        size = os.stat(there / "wide.arrow").st_size
        before = received()
        with pa.OSFile(str(there / "wide.arrow")) as file:
            table = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=[17, 63])).read_all()
        assert np.array_equal(table["c63"].to_numpy(), value["c63"].to_numpy())
        shares.append((received() - before) / size * 100)
        there.unmount()
    report.figure("two of 100 columns, on the wire", statistics.median(shares), "% of all", 4, shares=shares)


def link(report, arguments):
    """A link of 1 Gbit/s between network namespaces."""
    rate, size = 1000, min(arguments.size, 256 << 20)
    try:
        with world(size * 2 + (256 << 20), linked=True) as cluster:
            cluster.link.shape(rate)
            cluster[0].put("L", floats(size, 10))
            shares = []
            for _ in range(max(1, arguments.rounds // 2)):
                there = cluster.mount(1)
                whole = os.stat(there / "L.arrow").st_size
                taken = seconds(lambda: read_file(there / "L.arrow"))
                shares.append(whole * 8 / taken / (rate * 1e6))
                there.unmount()
        report.figure(f"first read over a link of {rate} Mbit/s", statistics.median(shares), "× line rate", 0.9, better="more", shares=shares)
    except Exception as error:
        detail = getattr(error, "stderr", None) or error
        report.note(f"no shaped link: network namespaces and tbf need root and a kernel that has them ({detail})")
