"""What benchmarks share: a store with a mount, files on tmpfs, rounds, and the report."""

import contextlib
import gc
import json
import mmap
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import pandas as pd

PROJECT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "tests" / "py"))

from conftest import Mount, Store  # noqa: E402 (the tests' own way to start both)

CHUNK = 1 << 20
# `madvise(2)`, since Linux 5.14; Python has no name for it.
MADV_POPULATE_WRITE = 23


def parse_size(text: str) -> int:
    units = {"K": 10, "M": 20, "G": 30}
    number = text.rstrip("iB")
    shift = units.get(number[-1:].upper(), 0)
    return int(float(number[:-1] if shift else number) * (1 << shift))


def tmpfs_folder() -> pathlib.Path:
    for candidate in ("/dev/shm", "/tmp", "/run"):
        kind = subprocess.run(["stat", "-f", "-c", "%T", candidate], capture_output=True, text=True).stdout.strip()
        if kind == "tmpfs" and os.access(candidate, os.W_OK):
            return pathlib.Path(tempfile.mkdtemp(prefix="vineyard-fs-bench-", dir=candidate))
    raise SystemExit("bench: no tmpfs to compare with: mount one on /dev/shm")


@contextlib.contextmanager
def world(store_size: int):
    """A store of its own, a folder on tmpfs, and a function that mounts."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="vfs-"))
    tmpfs = tmpfs_folder()
    mounts = []
    store = None

    def mount(*options) -> Mount:
        mounts.append(Mount(folder / f"mnt{len(mounts)}", store, *options))
        return mounts[-1]

    try:
        store = Store(folder, str(store_size))
        yield store, tmpfs, mount
    finally:
        for mounted in mounts:
            mounted.unmount()
        if store:
            store.stop()
        shutil.rmtree(tmpfs, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def floats(size: int, columns: int, seed=0) -> pd.DataFrame:
    """A frame of so many bytes of random float64."""
    rows = max(1, size // 8 // columns)
    rng = np.random.default_rng(seed)
    return pd.DataFrame({f"c{i}": rng.random(rows) for i in range(columns)})


def remove(store: Store, name: str):
    store.client.delete(store.client.get_name(name))
    store.client.drop_name(name)


def warm_memory(size: int):
    """Takes and frees so much memory, in huge pages. A virtual machine may hand free memory back to its host, and gets it
    again page by page: that would be most of what whoever needs new pages first is measured by. Small pages alone would
    warm what the kernel gives to who asks for small ones."""
    if size:
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            memory.madvise(MADV_POPULATE_WRITE)


def seconds(action, memory=0) -> float:
    gc.collect()
    warm_memory(memory)
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def read_file(path):
    """Everything, by reads of 1 MiB into one buffer, as `cat` does."""
    buffer = bytearray(CHUNK)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        offset = 0
        while count := os.preadv(descriptor, [buffer], offset):
            offset += count
        return offset
    finally:
        os.close(descriptor)


def scan_map(path):
    """The sum of every 8 bytes of a mapping."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        values = np.frombuffer(mapped, np.uint64, len(mapped) // 8)
        total = int(values.sum())
        del values
    return total


class Report:
    """Figures with their goals: a table, a JSON file and a chart."""

    def __init__(self, name: str, options: dict):
        self.name, self.options, self.figures = name, options, []
        self.started = time.time()
        # Draws the chart of a benchmark that has one of its own.
        self.draw = None

    def wanted(self, part: str) -> bool:
        return self.options["only"] in part

    def note(self, text: str):
        print(f"bench: {text}", file=sys.stderr, flush=True)

    def compare(self, what: str, rounds: int, ours, theirs, goal: float | None, before=None, after=None, size=0, **more):
        """Times both in turn; the figure is the median of theirs / ours: how many times as fast as tmpfs."""
        mine, base = [], []
        for number in range(rounds):
            if before:
                before(number)
            # Each goes first in every other round.
            for action, times in [(ours, mine), (theirs, base)][:: 1 if number % 2 == 0 else -1]:
                times.append(seconds(action, 3 * size))
            if after:
                after(number)
        ratios = [b / m for m, b in zip(mine, base)]
        ratio = statistics.median(ratios)
        figure = {"what": what, "unit": "times tmpfs", "value": ratio, "goal": goal, "better": "more", "rounds": rounds}
        figure |= {"ratios": ratios, "seconds": mine, "baseline_seconds": base, **more}
        if size:
            figure["gb_per_s"] = size / statistics.median(mine) / 1e9
        self.add(figure)
        return ratio

    def figure(self, what: str, value: float, unit: str, goal: float | None, better="less", **more):
        self.add({"what": what, "unit": unit, "value": value, "goal": goal, "better": better, **more})

    def add(self, figure: dict):
        goal = figure["goal"]
        met = None if goal is None else (figure["value"] >= goal if figure["better"] == "more" else figure["value"] <= goal)
        figure["met"] = met
        self.figures.append(figure)
        self.note(self.line(figure))

    @staticmethod
    def line(figure: dict) -> str:
        sign = "≥" if figure["better"] == "more" else "≤"
        goal = "" if figure["goal"] is None else f"goal {sign} {figure['goal']:g}: {'met' if figure['met'] else 'MISSED'}"
        detail = f"({statistics.median(figure['seconds']):.3f} s against {statistics.median(figure['baseline_seconds']):.3f} s)" if "baseline_seconds" in figure else ""
        return f"{figure['what']:<58} {figure['value']:>10.3g} {figure['unit']:<12} {goal:<22} {detail}".rstrip()

    def finish(self):
        folder = PROJECT / "target" / "bench"
        folder.mkdir(parents=True, exist_ok=True)
        machine = {"cpus": os.cpu_count(), "kernel": platform.release(), "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "load": os.getloadavg()}
        options = {key: value for key, value in self.options.items()}
        result = {"name": self.name, "started": self.started, "seconds": time.time() - self.started, "options": options, "machine": machine, "figures": self.figures}
        (folder / f"{self.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (self.draw or self.chart)(folder / f"{self.name}.png")
        print("\n".join(self.line(figure) for figure in self.figures))
        missed = sum(figure["met"] is False for figure in self.figures)
        print(f"{len(self.figures)} figures, {missed} goals missed; see target/bench/{self.name}.json and .png")

    def chart(self, path: pathlib.Path):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plot

        tmpfs = any(figure["unit"] == "times tmpfs" for figure in self.figures)
        ratios = [figure for figure in self.figures if figure["unit"] == "times tmpfs" or not tmpfs and figure["unit"].startswith("×")]
        if not ratios:
            return
        height = 1.2 + 0.42 * len(ratios)
        drawn, axes = plot.subplots(figsize=(10, height))
        places = range(len(ratios))
        colours = ["#2a7f62" if f["met"] is not False else "#c8553d" for f in ratios]
        axes.barh(places, [f["value"] for f in ratios], color=colours)
        for place, figure in zip(places, ratios):
            spread = figure.get("ratios") or [figure["value"]]
            low, high = min(spread), max(spread)
            axes.plot([low, high], [place, place], color="black", linewidth=1)
            if figure["goal"] is not None:
                axes.plot([figure["goal"]] * 2, [place - 0.4, place + 0.4], color="#333333", linewidth=2)
            label = f" {figure['value']:.2f}" + ("" if tmpfs else f" {figure['unit']}")
            axes.text(max(high, figure["value"], figure["goal"] or 0), place, label, va="center")
        axes.axvline(1, color="grey", linestyle=":")
        axes.set_yticks(places, [f["what"] for f in ratios])
        axes.invert_yaxis()
        what = "times the speed of the same bytes on tmpfs" if tmpfs else "times the speed that is named"
        axes.set_xlabel(f"{what} (bar: median, line: range, mark: goal)")
        axes.set_title(f"vineyard-fs: {self.name}, {self.options['size'] / (1 << 30):g} GiB")
        drawn.tight_layout()
        drawn.savefig(path, dpi=110)
        plot.close(drawn)
