"""Kills whoever takes part in a save, at random moments of it: the writer, the server, the keeper with its server, or
vineyardd. What was acknowledged is there or something newer is, whole; and nothing is left over in the store, but blobs
whose ids died with the server that asked for them: nobody can tell those from another client's, and a warning counts them.

VINEYARD_FS_KILLS kills of each (20); the table of what survived is printed.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest

from conftest import cli, settled

KILLS = int(os.environ.get("VINEYARD_FS_KILLS", "20"))
ROWS = 100_000

# Saves one version after the other, and tells each when `close` has returned.
WRITER = """
import sys, numpy as np, pandas as pd
path, rows, version = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
while True:
    version += 1
    pd.DataFrame({c: np.full(rows, version + i) for i, c in enumerate("abc")}).to_feather(path, compression="uncompressed")
    print(version, flush=True)
"""


class Writer:
    def __init__(self, path, version):
        command = [sys.executable, "-c", WRITER, str(path), str(ROWS), str(version)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.acknowledged = version
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self):
        for line in self.process.stdout:
            self.acknowledged = int(line)

    def wait_for(self, version, patience=90):
        deadline = time.monotonic() + patience
        while self.acknowledged < version:
            assert self.process.poll() is None, f"the writer failed: {self.process.stderr.read()[-800:]}"
            assert time.monotonic() < deadline, "the writer hangs"
            time.sleep(0.002)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.thread.join(10)


def version_of(path, patience=90) -> int:
    """The version that the file shows: one whole one."""
    deadline = time.monotonic() + patience
    while True:
        try:
            frame = pd.read_feather(path)
            break
        except OSError:
            assert time.monotonic() < deadline, "the file does not come back"
            time.sleep(0.05)
    version = int(frame["a"].iloc[0])
    assert len(frame) == ROWS
    for i, column in enumerate("abc"):
        assert (frame[column] == version + i).all()
    return version


def contents(store):
    """Bytes and objects of the store, all clients' together.

    Without their buffers: the client asks for those with a request of its own, and fails for a blob that went between
    the two, which is what this is called to wait for.
    """
    return store.usage(), len(store.client.list_metadatas("*", limit=1_000_000, nobuffer=True))


def kill_all(status):
    os.kill(status["keeper"]["pid"], signal.SIGKILL)
    # It ends with its keeper.
    with contextlib.suppress(ProcessLookupError):
        os.kill(status["server"]["pid"], signal.SIGKILL)


@pytest.mark.parametrize("victim", ["writer", "server", "keeper and server", "vineyardd"])
def test_crash_matrix(store, make_mount, victim):
    mount = make_mount()
    path = mount / "x.arrow"
    random.seed(victim)
    pd.DataFrame({c: np.full(ROWS, i) for i, c in enumerate("abc")}).to_feather(path, compression="uncompressed")
    expected = contents(store)
    # What was told of a vineyardd that has ended is gone with it.
    former = 0

    def clean():
        usage, objects = contents(store)
        return usage - (mount.told_left_over() - former), objects

    version, survived = 0, {"acknowledged": 0, "newer": 0, "lost with vineyardd": 0}
    for round in range(KILLS):
        writer = Writer(path, version)
        writer.wait_for(version + 2)
        time.sleep(random.uniform(0, 0.05))
        status = mount.status()
        if victim == "writer":
            writer.kill()
        elif victim == "server":
            mount.kill_server()
            # The writer sees nothing of it.
            writer.wait_for(writer.acknowledged + 2)
            writer.kill()
        elif victim == "keeper and server":
            kill_all(status)
            time.sleep(0.1)
            writer.kill()
            mount.expected_restarts = None
            mount.unmount()
            cli("mount", mount.path, "--socket", store.socket, "--log-file", mount.log)
            mount.expected_restarts = 0
        else:
            store.process.kill()
            store.process.wait()
            time.sleep(0.2)
            writer.kill()
            former = mount.told_left_over()
            store.start()
            deadline = time.monotonic() + 90
            while os.path.exists(path) and store.client.list_names("*") == {}:
                # Nobody knows any more that the file was a dataset: its writer's last bytes may still be there.
                try:
                    path.unlink()
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            if not path.exists():
                survived["lost with vineyardd"] += 1
                version = 0
                pd.DataFrame({c: np.full(ROWS, i) for i, c in enumerate("abc")}).to_feather(path, compression="uncompressed")
                settled(clean, expected)
                continue
        acknowledged = writer.acknowledged
        version = version_of(path)
        assert version >= acknowledged or victim == "vineyardd", f"version {version} of {acknowledged} acknowledged"
        survived["newer" if version > acknowledged else "acknowledged"] += 1
        settled(clean, expected)
    print(f"{victim}: {KILLS} kills: {survived}")
