"""What `status` says when it is not well with the store, and to whom."""

import json
import os
import signal
import subprocess
import time

import conftest
from conftest import cli


def status(path):
    return json.loads(cli("status", path, "--json").stdout)


def until(path, state):
    """The status once the mount is in a state."""
    patience = time.monotonic() + 20
    while (found := status(path))["state"] != state:
        assert time.monotonic() < patience, found
        time.sleep(0.1)
    return found


def keys(report, *path):
    for part in path:
        report = report[part]
    return set(report)


def test_a_store_that_is_away_is_said_and_own_counters_stay(store, make_mount):
    mount = make_mount("--deadline", "1s")
    before = status(mount.path)
    assert before["state"] == "ok" and before["fs"]["store_error"] is None
    store.process.send_signal(signal.SIGSTOP)
    away = until(mount.path, "store away")
    assert away["fs"]["store_error"]
    assert keys(away) == keys(before) and keys(away, "fs") == keys(before, "fs")
    assert away["fs"]["cache"]["limit"] == before["fs"]["cache"]["limit"]
    text = cli("status", mount.path).stdout
    assert text.startswith(f"{mount.path}: store away\n") and "wait for vineyardd" in text
    store.process.send_signal(signal.SIGCONT)
    until(mount.path, "ok")


def test_a_private_store_that_ended_is_gone(folder):
    point = folder / "mnt"
    point.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "VINEYARD_IPC_SOCKET"}
    options = ["--size", "64M", "--deadline", "1s", "--log-file", folder / "log"]
    cli("mount", point, "--vineyardd", conftest.vineyardd_binary(), *options, env=environment)
    try:
        (point / "x.txt").write_text("x")
        os.kill(status(point)["store"]["pid"], signal.SIGKILL)
        gone = until(point, "store gone")
        assert gone["fs"]["cache"]["limit"] > 0 and gone["store"]["private"] is True
        text = cli("status", point).stdout
        assert f"`vineyard-fs unmount {point}`, and mount again" in text and "away" not in text, text
        assert f"{point}: store gone" in cli("top", point, "--once", "--interval", "0.1").stdout
    finally:
        cli("unmount", point, "--force")
