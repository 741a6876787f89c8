"""Reading what the official client has put."""

import os
import pathlib
import shutil
import statistics
import subprocess
import time

import numpy as np
import pyarrow as pa

from common import floats, read_file, remove, scan_map, seconds, world

# How files are served, the options for it, and the goals: warm read, warm mapping, first open and read.
SERVED = [("passthrough", [], (1.5, 1.5, 0.8)), ("requests", ["--serve", "lazy"], (0.9, 0.9, 0.35))]


def run(report, arguments):
    for how, options, goals in SERVED:
        if report.wanted(f"large {how}"):
            large(report, arguments, how, options, goals)
        if report.wanted(f"columns {how}"):
            two_columns(report, arguments, how, options)
    if report.wanted("small"):
        small(report, arguments)
    if report.wanted("names"):
        names(report, arguments)


def served_by(mount, how):
    status = mount.status()
    if how == "passthrough" and not status["passthrough"]:
        raise SystemExit(f"bench: no passthrough here: {status['passthrough_reason']}")


def large(report, arguments, how, options, goals):
    with world(4 * arguments.size + (256 << 20)) as (store, tmpfs, make_mount):
        mount = make_mount(*options)
        served_by(mount, how)
        value = floats(arguments.size, 10)
        store.put("X", value)
        path, base = mount / "X.arrow", tmpfs / "X.arrow"
        shutil.copyfile(path, base)
        size = base.stat().st_size
        # Held open, so that both stay as warm as they are.
        with open(path, "rb"), open(base, "rb"):
            read_file(path), read_file(path), read_file(base)
            common = dict(size=size)
            report.compare(f"warm read, {how}", arguments.rounds, lambda: read_file(path), lambda: read_file(base), goals[0], **common)
            scan_map(path), scan_map(base)
            report.compare(f"warm mmap sum, {how}", arguments.rounds, lambda: scan_map(path), lambda: scan_map(base), goals[1], **common)

        def fresh(number):
            remove(store, "X" if number == 0 else f"F{number - 1}")
            store.put(f"F{number}", value)

        turn = iter(range(arguments.rounds))
        report.compare(f"first open + read, {how}", arguments.rounds, lambda: read_file(mount / f"F{next(turn)}.arrow"), lambda: read_file(base), goals[2], before=fresh, **common)


def two_columns(report, arguments, how, options):
    """Two of a hundred columns cost those two, and the headers."""
    with world(3 * arguments.size + (256 << 20)) as (store, _, make_mount):
        mount = make_mount(*options)
        value = floats(arguments.size, 100)
        fetched, taken = [], []

        def sums(path):
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_file(file).read_all()
                return [np.asarray(table[name].chunk(0)).sum() for name in ("c17", "c63")]

        for number in range(arguments.rounds):
            store.put(f"W{number}", value)
            path = mount / f"W{number}.arrow"
            before = mount.status()["operations"].get("read", {}).get("bytes", 0)
            held = mount.status()["files"]["images"]["bytes"]
            taken.append(seconds(lambda: sums(path)))
            status = mount.status()
            fetched.append(status["operations"].get("read", {}).get("bytes", 0) - before + status["files"]["images"]["bytes"] - held)
            remove(store, f"W{number}")
        # What reading everything that way costs.
        store.put("all", value)
        everything = seconds(lambda: read_file(mount / "all.arrow"))
        column = len(value) * 8
        share = statistics.median(taken) / (everything * 2 / 100)
        report.figure(f"two of 100 columns: bytes fetched, {how}", statistics.median(fetched) / (2 * column), "× two columns", 1.5, fetched=fetched, column=column)
        report.figure(f"two of 100 columns: time, {how}", share, "× 2% of all", None, seconds=taken, everything=everything)


def put_small(store, prefix, count, columns, rows=10):
    value = floats(8 * columns * rows, columns)
    for number in range(count):
        store.put(f"{prefix}{number:06}", value)


def listing(folder, *options):
    start = time.perf_counter()
    subprocess.run(["ls", *options, folder], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def small(report, arguments):
    """Many small datasets: stat, listings, and the memory of the server."""
    with world(2 << 30) as (store, _, make_mount):
        thousand = min(1000, arguments.count)
        put_small(store, "ten/", thousand, 10)
        first, again = [], []
        for _ in range(arguments.rounds):
            mount = make_mount()
            first.append(listing(mount / "ten", "-l"))
            again.append(statistics.median(listing(mount / "ten", "-l") for _ in range(3)))
            mount.unmount()
        goals = (1.0, 0.1)
        report.figure(f"ls -l of {thousand} ten-column datasets, first", statistics.median(first), "s", goals[0], seconds=first)
        report.figure(f"ls -l of {thousand} ten-column datasets, again", statistics.median(again), "s", goals[1], seconds=again)

        mount = make_mount()
        os.listdir(mount.path)
        stats = []
        for number in range(100):
            put_small(store, f"stat{number}-", 1, 10)
            start = time.perf_counter()
            os.stat(mount / f"stat{number}-000000.arrow")
            stats.append((time.perf_counter() - start) * 1e6)
        report.figure("stat of a dataset never seen, median", statistics.median(stats), "µs", 5000, times=stats)
        report.figure("stat of a dataset never seen, worst of 100", max(stats), "µs", None)
        mount.unmount()

        report.note(f"putting {arguments.count} datasets")
        put_small(store, "many/", arguments.count, 3)
        mount = make_mount()
        pid = mount.status()["server"]["pid"]
        first = listing(mount / "many", "-l")
        report.figure(f"ls -l of {arguments.count} three-column datasets, first", first, "s", None)
        files = sorted(os.listdir(mount / "many"))
        for file in files:
            os.stat(mount / "many" / file)
        opened = [open(mount / "many" / file, "rb") for file in files[:100]]
        for file in opened:
            file.read()
        memory = anonymous(pid)
        report.figure(f"server's own memory, {len(files)} listed and {len(opened)} open", memory / (1 << 20), "MiB", 64)
        for file in opened:
            file.close()


def anonymous(pid: int) -> int:
    """Private memory of a process: neither shared segments nor memory files."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise SystemExit("bench: /proc does not tell RssAnon")


def names(report, arguments):
    """A listing of very many names; each object has several, since objects take their time to put."""
    with world(1 << 30) as (store, _, make_mount):
        ids = [store.client.put(number, persist=True) for number in range(min(1000, arguments.names))]
        for number in range(arguments.names):
            store.client.put_name(ids[number % len(ids)], f"all/{number:07}")
        first, again = [], []
        for _ in range(arguments.rounds):
            mount = make_mount()
            start = time.perf_counter()
            found = os.listdir(mount / "all")
            first.append(time.perf_counter() - start)
            assert len(found) == arguments.names, len(found)
            again.append(seconds(lambda: os.listdir(mount / "all")))
            mount.unmount()
        report.figure(f"names of {arguments.names}, first", statistics.median(first), "s", 2.0, seconds=first)
        report.figure(f"names of {arguments.names}, again", statistics.median(again), "s", None, seconds=again)
