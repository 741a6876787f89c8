"""What Kedro's datasets take on the mount, and on what else pipelines use."""

import json
import os
import pathlib
import statistics
import subprocess

from common import PROJECT, world

# Which environment, what its datasets write to, and how that is called.
KINDS = [("mount", "the mount"), ("tmpfs", "Feather on tmpfs"), ("pickle", "pickle on tmpfs"), ("csv", "CSV on tmpfs"), ("official", "VineyardDataSet")]

SCALES = (1, 10, 100)


def environments():
    folder = pathlib.Path(os.environ.get("VINEYARD_FS_KEDRO_VENVS", PROJECT / ".venv-kedro"))
    found = {name: folder / name / "bin" / "python" for name in ("kedro1", "kedro018")}
    return {name: python for name, python in found.items() if python.exists()}


def run(report, arguments):
    pythons = environments()
    if not pythons:
        raise SystemExit("bench: no Kedro environments: make them with scripts/setup --kedro")
    report.draw = lambda path: chart(report.figures, path)
    for name, python in pythons.items():
        if report.wanted(f"{name} iris"):
            pipeline(report, arguments, name, python, 0)
        for scale in SCALES:
            if report.wanted(f"{name} {scale}"):
                pipeline(report, arguments, name, python, scale)


def pipeline(report, arguments, environment, python, scale):
    """The house-prices pipeline at a scale, or with 0 that of iris."""
    totals = {}
    what = f"{environment}, house prices × {scale}" if scale else f"{environment}, iris"
    with world(3 << 30) as (store, tmpfs, make_mount):
        mount = make_mount()
        for kind, called in KINDS:
            folder = {"mount": mount.path, "official": store.socket}.get(kind, tmpfs / kind)
            if kind not in ("mount", "official"):
                folder.mkdir()
            if kind == "official" and environment != "kedro018":
                continue
            command = [python, PROJECT / "scripts" / "benchmarks" / "kedro_worker.py", kind, folder, scale, arguments.rounds]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900, env={**os.environ, "DO_NOT_TRACK": "1"})
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
                report.note(f"left out: {called} with {environment}: {reason}")
                continue
            result = json.loads(done.stdout.strip().splitlines()[-1])
            sums = [sum(sum(pair) for pair in round_.values()) for round_ in result["rounds"]]
            totals[kind] = statistics.median(sums)
            report.figure(f"{what}: saves and loads, {called}", totals[kind], "s", None, seconds=sums, nodes=result["rounds"], bytes=result["bytes"])
    others = [total for kind, total in totals.items() if kind != "mount"]
    if "mount" in totals and others:
        goal = 1.0 if scale >= 10 else None
        report.figure(f"{what}: the mount", totals["mount"] / min(others), "× the fastest other", goal)


def chart(figures, path):
    """Seconds of all saves and loads, a panel for each environment and a group of bars for each scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plot

    groups = ["iris", *(f"house prices × {scale}" for scale in SCALES)]
    names = [name for name in environments() if any(f["what"].startswith(name) for f in figures)]
    drawn, panels = plot.subplots(1, len(names), figsize=(5.2 * len(names), 3.6), sharey=True, squeeze=False)
    for name, axes in zip(names, panels[0]):
        for number, (_, called) in enumerate(KINDS):
            found = {f["what"]: f["value"] for f in figures}
            values = [found.get(f"{name}, {what}: saves and loads, {called}") for what in groups]
            places = [group + 0.16 * (number - 2) for group, value in enumerate(values) if value]
            bars = axes.bar(places, [value for value in values if value], width=0.15, label=called)
            axes.bar_label(bars, fmt="%.2g", fontsize=6)
        axes.set_yscale("log")
        axes.set_xticks(range(len(groups)), [what.replace("house prices", "prices") for what in groups])
        axes.set_title({"kedro1": "Kedro 1", "kedro018": "Kedro 0.18"}[name])
    panels[0][0].set_ylabel("seconds of all saves and loads")
    panels[0][-1].legend(fontsize=7)
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
