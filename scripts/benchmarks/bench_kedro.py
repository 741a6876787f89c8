"""What Kedro's datasets take on the mount, and on what else pipelines use."""

import json
import os
import pathlib
import statistics
import subprocess

from common import PROJECT, world

# Which environment, what its datasets write to, and how that is called.
KINDS = [("mount", "the mount"), ("tmpfs", "Feather on tmpfs"), ("pickle", "pickle on tmpfs"), ("csv", "CSV on tmpfs"), ("official", "VineyardDataSet")]


def environments():
    folder = pathlib.Path(os.environ.get("VINEYARD_FS_KEDRO_VENVS", PROJECT / ".venv-kedro"))
    found = {name: folder / name / "bin" / "python" for name in ("kedro1", "kedro018")}
    return {name: python for name, python in found.items() if python.exists()}


def run(report, arguments):
    pythons = environments()
    if not pythons:
        raise SystemExit("bench: no Kedro environments: make them with scripts/setup --kedro")
    for name, python in pythons.items():
        for scale in (1, 10, 100):
            if report.wanted(f"{name} {scale}"):
                houses(report, arguments, name, python, scale)


def houses(report, arguments, environment, python, scale):
    totals = {}
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
            report.figure(f"{environment}, house prices × {scale}: saves and loads, {called}", totals[kind], "s", None, seconds=sums, nodes=result["rounds"], bytes=result["bytes"])
    others = [total for kind, total in totals.items() if kind != "mount"]
    if "mount" in totals and others:
        goal = 1.0 if scale >= 10 else None
        report.figure(f"{environment}, house prices × {scale}: the mount", totals["mount"] / min(others), "× the fastest other", goal)
