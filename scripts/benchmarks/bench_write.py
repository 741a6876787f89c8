"""Saving through the mount."""

import shutil
import statistics
import subprocess
import time

import pandas as pd
import pyarrow as pa

from common import floats, read_file, remove, seconds, world


def run(report, arguments):
    if report.wanted("large"):
        large(report, arguments)
    if report.wanted("parquet"):
        parquet(report, arguments)
    if report.wanted("lz4"):
        compressed(report, arguments)
    for columns, goal in [(3, 200), (10, 100)]:
        if report.wanted(f"saves {columns}"):
            saves(report, arguments, columns, goal)


def new_file(path, table):
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def large(report, arguments):
    with world(4 * arguments.size + (256 << 20)) as (store, tmpfs, make_mount):
        mount = make_mount()
        frame = floats(arguments.size, 10)
        table = pa.Table.from_pandas(frame, preserve_index=False)
        source = tmpfs / "source.arrow"
        new_file(source, table)
        size = source.stat().st_size
        writers = {
            "cp": lambda path: subprocess.run(["cp", source, path], check=True),
            "pyarrow new_file": lambda path: new_file(path, table),
            "pandas to_feather, uncompressed": lambda path: frame.to_feather(path, compression="uncompressed"),
        }
        ours, theirs = mount / "W.arrow", tmpfs / "W.arrow"
        for name, write in writers.items():
            def fresh(_):
                for path in (ours, theirs):
                    path.unlink(missing_ok=True)

            report.compare(f"write + close: {name}", arguments.rounds, lambda: write(ours), lambda: write(theirs), 1.0, before=fresh, size=size)
            misses = mount.status()["fs"]["cache"]["misses"]
            report.compare(f"read after it: {name}", arguments.rounds, lambda: read_file(ours), lambda: read_file(theirs), 1.0, size=size)
            assembled = mount.status()["fs"]["cache"]["misses"] - misses
            report.figure(f"images assembled for it: {name}", assembled, "images", 0)
        # The same name again: a replacement holds both values until it is published.
        write = writers["pandas to_feather, uncompressed"]
        report.compare("replace: pandas to_feather, uncompressed", arguments.rounds, lambda: write(ours), lambda: write(theirs), None, size=size)
        if not store.connect().get(name="W").equals(frame):
            raise SystemExit("bench: the official client does not get the frame that was written")


def parquet(report, arguments):
    """The Parquet view of what the official client has put; tmpfs reads the same bytes."""
    with world(3 * arguments.size + (256 << 20)) as (store, tmpfs, make_mount):
        mount = make_mount()
        value = floats(arguments.size, 10)
        store.put("P", value)
        base = tmpfs / "P.parquet"
        shutil.copyfile(mount / "P.parquet", base)
        if not pd.read_parquet(base).equals(value):
            raise SystemExit("bench: the Parquet view is not the frame that was put")
        size = base.stat().st_size

        def copy(path):
            subprocess.run(["cp", path, "/dev/null"], check=True)

        def fresh(number):
            remove(store, "P" if number == 0 else f"P{number - 1}")
            store.put(f"P{number}", value)

        turn = iter(range(arguments.rounds))
        report.compare("Parquet view by cp, never opened before", arguments.rounds, lambda: copy(mount / f"P{next(turn)}.parquet"), lambda: copy(base), 0.8, before=fresh, size=size)
        name = f"P{arguments.rounds - 1}.parquet"
        report.compare("Parquet view by cp, again", arguments.rounds, lambda: copy(mount / name), lambda: copy(base), 0.8, size=size)
        current = [mount]

        def remount(_):
            current[0].unmount()
            current[0] = make_mount()

        # No memory is ready for it there: it is given by the kernel, and cleared, first.
        report.compare("Parquet view, first file of a new mount", arguments.rounds, lambda: read_file(current[0] / name), lambda: read_file(base), None, before=remount, size=size)


def compressed(report, arguments):
    """Saving an lz4 file decompresses it: against doing that in memory alone."""
    with world(5 * arguments.size + (256 << 20)) as (store, tmpfs, make_mount):
        mount = make_mount()
        # Few different values: random ones do not compress.
        frame = (floats(arguments.size, 10) * 100).round()
        source = tmpfs / "source.feather"
        frame.to_feather(source, compression="lz4")
        data = pa.py_buffer(source.read_bytes())
        target = mount / "Z.feather"

        def in_memory():
            pa.ipc.open_file(pa.BufferReader(data)).read_all()

        fresh = lambda _: target.unlink(missing_ok=True)
        taken, base = [], []
        for number in range(arguments.rounds):
            fresh(number)
            base.append(seconds(in_memory, 3 * arguments.size))
            taken.append(seconds(lambda: subprocess.run(["cp", source, target], check=True), 3 * arguments.size))
        ratios = [t / b for t, b in zip(taken, base)]
        report.figure("lz4 Feather by cp, × decompressing in memory", statistics.median(ratios), "× memory", 1.2, ratios=ratios, seconds=taken, baseline_seconds=base)


def saves(report, arguments, columns, goal):
    """Many small saves, and what they leave behind."""
    with world(2 << 30) as (store, _, make_mount):
        mount = make_mount()
        frame = floats(8 * columns * 10, columns)
        frame.to_feather(mount / "warm.arrow")
        (mount / "warm.arrow").unlink()
        before = store.usage()
        paths = [mount / f"s{number:06}.arrow" for number in range(arguments.count)]
        start = time.perf_counter()
        for path in paths:
            frame.to_feather(path)
        taken = time.perf_counter() - start
        used = store.usage() - before
        report.figure(f"saves of a 10-row frame with {columns} columns", len(paths) / taken, "per second", goal, better="more", memory=used)
        start = time.perf_counter()
        for path in paths:
            path.unlink()
        report.figure(f"removals of them", len(paths) / (time.perf_counter() - start), "per second", None, better="more")
        report.figure(f"memory of vineyardd left behind, {columns} columns", store.usage() - before, "bytes", 0)
