"""Random saves, reads, renames and removes on three mounts, with kills and restarts, against a model.

`VINEYARD_FS_MODEL_SECONDS` says how long; without it the test is left out. `VINEYARD_FS_MODEL_SEED` repeats a run.

The model knows for each name which versions it may have. What was acknowledged is the only one; after an error it may be
the old or the new one. The data of an instance that was killed is gone, unless it was pinned elsewhere.
"""

import errno
import json
import os
import random
import signal
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from cluster import Cluster
from conftest import cli

NAMES = [f"n{number}" for number in range(12)]
#: What a program may see of what it cannot have.
LOST = {errno.EHOSTUNREACH, errno.ESTALE, errno.EIO, errno.ENOENT, errno.ENODEV, errno.ENOSPC}
ABSENT = None


class Model:
    def __init__(self, cluster, seed):
        self.random = random.Random(seed)
        self.cluster, self.mounts = cluster, [cluster.mount(number, "--deadline", "10s") for number in range(3)]
        #: Possible versions of each name, and where each version's data is: instance ids.
        self.versions = {name: {ABSENT} for name in NAMES}
        self.homes = {}
        self.last = 0
        self.counts = {}
        self.history = []
        #: What could not be saved stays readable on the mount that it was written on.
        self.unsaved = {}
        self.dead_ids = set()
        self.killed = set()

    def frame(self, version):
        rows = 1 + version * 7919 % 40_000
        return pd.DataFrame({c: np.full(rows, version) for c in "abc"})

    def lost(self, version) -> bool:
        """All instances that had the data are gone, or may be."""
        return version is not ABSENT and not (self.homes.get(version, set()) - self.dead_ids)

    def count(self, what):
        self.counts[what] = self.counts.get(what, 0) + 1

    def run(self, action, mount, *names):
        entry = [action.__name__, self.mounts.index(mount), *names]
        try:
            try:
                entry.append(action(mount, *names))
                self.count(action.__name__)
            except (OSError, pa.ArrowException) as error:
                # What is read is whole: pyarrow's complaint about what a file holds is never the answer to a loss.
                number = getattr(error, "errno", None)
                assert isinstance(error, OSError) and number in LOST, f"{entry}: {error!r}"
                self.count(f"{action.__name__}: {errno.errorcode[number]}")
                entry.append(repr(error)[:60])
        except AssertionError as error:
            before = "\n".join(map(str, self.history[-80:]))
            logs = "\n".join(line for mount in self.mounts for line in mount.log.read_text().splitlines()[-30:])
            raise AssertionError(f"{entry}: {error}\nbefore it:\n{before}\nlogs:\n{logs}") from error
        self.history.append(entry)

    def save(self, mount, name):
        self.last += 1
        version, former = self.last, self.versions[name]
        self.homes[version] = {self.instance(mount).id}
        self.versions[name] = former | {version}
        self.unsaved[mount, name] = version
        self.frame(version).to_feather(mount / f"{name}.arrow", compression="uncompressed")
        del self.unsaved[mount, name]
        self.versions[name] = {version}
        return version

    def read(self, mount, name):
        possible = self.versions[name]
        try:
            found = pd.read_feather(mount / f"{name}.arrow")
        except FileNotFoundError:
            assert ABSENT in possible or any(map(self.lost, possible)), f"{name}: {possible} is not found"
            return
        except OSError:
            # Nothing that lives may be unreadable; what was just removed elsewhere may be known here for a second.
            assert ABSENT in possible or any(map(self.lost, possible)), f"{name}: {possible} of {self.homes} cannot be read, {self.dead_ids}"
            raise
        values = set(found.to_numpy().ravel().tolist())
        assert len(values) == 1, f"{name} is a mixture of {values}"
        [version] = values
        if version == self.unsaved.get((mount, name)):
            return version
        assert version in possible, f"{name} is {version}, not one of {possible}"
        assert len(found) == len(self.frame(version)), f"{name} {version} is not whole"
        if len(possible) > 1:
            self.versions[name] = {version}
        return version

    def remove(self, mount, name):
        self.versions[name] = self.versions[name] | {ABSENT}
        (mount / f"{name}.arrow").unlink()
        self.versions[name] = {ABSENT}

    def rename(self, mount, name):
        other = self.random.choice([other for other in NAMES if other != name])
        before, over = self.versions[name], self.versions[other]
        self.versions[name], self.versions[other] = before | {ABSENT}, over | before
        os.rename(mount / f"{name}.arrow", mount / f"{other}.arrow")
        self.versions[name], self.versions[other] = {ABSENT}, before - {ABSENT}
        if (mount, name) in self.unsaved:
            # Renaming publishes it. What others saved under the old name meanwhile was never what this mount showed.
            self.versions[other] = self.versions[other] | {self.unsaved.pop((mount, name))}
            self.versions[name] = before | {ABSENT}
        return other

    def pin(self, mount, name):
        possible = self.versions[name]
        instance = self.instance(mount)
        result = cli("pin", name, "--socket", instance.socket, check=False)
        if result.returncode == 0 and len(possible) == 1:
            [version] = possible
            if version is not ABSENT:
                self.homes[version] = self.homes[version] | {instance.id}

    def instance(self, mount):
        return self.cluster[self.mounts.index(mount)]

    def kill_server(self, mount):
        pid = mount.status()["server"]["pid"]
        # It may be one that is dead already and not yet replaced.
        if pid not in self.killed:
            self.killed.add(pid)
            mount.kill_server()

    def restart_instance(self, mount):
        instance = self.instance(mount)
        instance.kill()
        self.dead_ids.add(instance.id)
        instance.start()

    def step(self):
        mount, name = self.random.choice(self.mounts), self.random.choice(NAMES)
        actions = [self.save] * 30 + [self.read] * 40 + [self.remove] * 6 + [self.rename] * 10 + [self.pin] * 3
        action = self.random.choice(actions)
        self.run(action, mount, name)

    def upset(self):
        mount = self.random.choice(self.mounts)
        action = self.random.choice([self.kill_server, self.kill_server, self.restart_instance])
        self.run(action, mount)


@pytest.mark.skipif("VINEYARD_FS_MODEL_SECONDS" not in os.environ, reason="VINEYARD_FS_MODEL_SECONDS is not set: scripts/test --full sets it to ten minutes")
def test_random_operations_on_three_mounts(folder):
    seconds = float(os.environ["VINEYARD_FS_MODEL_SECONDS"])
    seed = int(os.environ.get("VINEYARD_FS_MODEL_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed}")
    cluster = Cluster(folder, 3)
    try:
        model = Model(cluster, seed)
        end, upset = time.monotonic() + seconds, time.monotonic() + 5
        while time.monotonic() < end:
            model.step()
            if time.monotonic() > upset:
                model.upset()
                upset = time.monotonic() + model.random.uniform(3, 9)
        # All is quiet: what was acknowledged and lives is there on each mount, and the same.
        time.sleep(1.1)
        for name in NAMES:
            for mount in model.mounts:
                model.run(model.read, mount, name)
        for instance in cluster.instances:
            cli("gc", "--socket", instance.socket, check=False)
        for name in NAMES:
            for mount in model.mounts:
                model.run(model.read, mount, name)
        print(json.dumps(model.counts, indent=1))
        # Nothing is left over once everything is removed, but what killed servers may have asked for, which a warning
        # counts; it went with a vineyardd that was started again.
        def left_over():
            usages = [instance.usage() for instance in cluster.instances]
            return [(bytes, told) for bytes, mount in zip(usages, model.mounts) if bytes > (told := mount.told_left_over())]

        for name in NAMES:
            (model.mounts[0] / f"{name}.arrow").unlink(missing_ok=True)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and left_over():
            for instance in cluster.instances:
                cli("gc", "--socket", instance.socket, check=False)
            time.sleep(1)
        assert left_over() == [], f"left over, and told of: {left_over()}"
        print(f"left over: {[instance.usage() for instance in cluster.instances]} bytes")
    finally:
        cluster.stop()
