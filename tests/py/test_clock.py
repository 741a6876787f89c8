"""The clock is set, forwards and backwards, while clients work and servers are killed: answers as before, nothing lost and
nothing left over.

clock.c, loaded into each process, moves the clock for keeper and server, and for vineyardd in one variant.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import struct
import subprocess
import time

import conftest
import load
import numpy as np
import pandas as pd
import pytest

HOUR, DAY, YEAR = 3600, 86_400, 365 * 86_400


class Clock:
    """Moves the time of day of all processes that were started within `env`."""

    def __init__(self, folder):
        self.preload, self.file = folder / "clock.so", folder / "shift"
        source = pathlib.Path(__file__).with_name("clock.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", self.preload, source], check=True, timeout=60)
        self.file.write_bytes(bytes(4096))
        self.env = {"LD_PRELOAD": str(self.preload), "CLOCK_SHIFT": str(self.file)}
        self.seconds = 0

    def set(self, seconds):
        """To this many seconds from the machine's clock."""
        self.seconds = seconds
        with open(self.file, "r+b") as file:
            file.write(struct.pack("q", int(seconds * 1e9)))

    def shifts(self, pid):
        with open(f"/proc/{pid}/maps") as maps:
            return str(self.preload) in maps.read()


@pytest.fixture
def clock(folder):
    if not shutil.which("cc"):
        pytest.skip("no cc, which builds the library that moves the clock")
    return Clock(folder)


def freeze(server, store):
    """Stops a server between two of its requests: what it has asked for is carried out."""
    conftest.freeze(server)
    for _ in range(5):
        store.usage()
        time.sleep(0.02)


@pytest.mark.parametrize("whose", ["the mount's clock", "everybody's clock"])
def test_a_clock_that_is_set_changes_nothing(folder, clock, monkeypatch, whose):
    everybody = whose == "everybody's clock"
    for name, value in clock.env.items():
        if everybody:
            monkeypatch.setenv(name, value)
    store = conftest.Store(folder)
    try:
        for name, value in clock.env.items():
            monkeypatch.setenv(name, value)
        mount = conftest.Mount(folder / "mnt", store)
        # Clients have the machine's own clock.
        for name in clock.env:
            monkeypatch.delenv(name)
        clients = []
        try:
            jumps(store, mount, clock, clients, everybody)
        finally:
            for client in clients:
                client.kill()
            mount.unmount()
    finally:
        store.stop()


def jumps(store, mount, clock, clients, everybody):
    status = mount.status()
    assert clock.shifts(status["keeper"]["pid"]) and clock.shifts(status["server"]["pid"])
    assert clock.shifts(store.process.pid) == everybody
    official = pd.DataFrame({"a": np.arange(5_000), "b": np.arange(5_000) * 0.5})
    store.put("official", official)
    load.prepare(mount.path)
    kept = [*load.SHARED, "official.arrow"]
    times = {name: os.stat(mount / name).st_mtime_ns for name in kept}
    # A blob that somebody else is about to fill.
    usage = store.usage()
    foreign = store.client.create_blob(1_000)
    foreign_usage = store.usage() - usage
    stop = store.folder / "stop"
    load.start(clients, ["read", "write", "write", "half", "names", "mapped"], mount.path, stop)
    random.seed(11)
    kills = 0
    # Back to before anything in the store was made, to before 1970 for the mount alone, and a second at a time.
    earliest = -40 * YEAR if everybody else -time.time() - DAY
    for to in [DAY, 0, -DAY, -DAY - 1, 10 * YEAR, -10 * YEAR, 0.4, 0, earliest, HOUR, 0]:
        killed = mount.status()["server"]["pid"]
        before = random.random() < 0.5
        # What is asked for before the clock is set and carried out afterwards is looked for at another time than it was made.
        freeze(killed, store)
        if before:
            clock.set(to)
            os.kill(killed, signal.SIGCONT)
            time.sleep(random.uniform(0, 0.3))
        os.kill(killed, signal.SIGKILL)
        if not before:
            clock.set(to)
        kills += 1
        started = mount.next_server(killed)["fs"]["started"]
        if before:
            assert abs(started - max(time.time() + to, 0)) < 120, "the server sees the other time"
        assert {name: os.stat(mount / name).st_mtime_ns for name in kept} == times
        pd.testing.assert_frame_equal(pd.read_feather(mount / "official.arrow"), official)
        env = {**os.environ, **clock.env}
        found = conftest.cli("gc", "--socket", store.socket, "--json", env=env).stdout
        assert json.loads(found) == [], "there is nothing to clean up"
        time.sleep(random.uniform(0.3, 0.8))
    outcomes = load.end(clients, stop)
    print(f"{kills} jumps with a kill each; operations {[(o['kind'], o['done']) for o in outcomes]}")
    assert [outcome["wrong"] for outcome in outcomes if outcome["wrong"]] == []
    assert all(outcome["done"] > kills for outcome in outcomes), outcomes
    mount.expected_restarts = kills
    for seed in (1, 2):
        (mount / f"written{seed}.arrow").unlink()
    (mount / "half3.bin").unlink()
    assert sorted(os.listdir(mount.path)) == sorted(kept)
    if everybody:
        # Where clocks of one machine differ, times tell nothing about blobs that a killed server never learned of.
        conftest.settled(lambda: store.usage() - mount.told_left_over(), usage + foreign_usage)
    foreign.copy(0, b"hello")
    sealed = foreign.seal(store.client)
    assert bytes(store.client.get_blob(sealed.id))[:5] == b"hello", "what belongs to somebody else is there"
