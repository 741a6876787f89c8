"""What `status` says when it is not well with the store, and to whom."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile

import conftest
import pytest
from conftest import cli, freeze, status, until


def said(state, path, *command):
    """What a command says of a mount once it finds it in a state: busy servers may say too little at first."""

    def ask():
        text = cli(*command).stdout
        return f"{path}: {state}" in text and text

    return until(ask)


def keys(report, *path):
    for part in path:
        report = report[part]
    return set(report)


def test_there_is_room_for_names_beside_those_that_are_there(mount):
    """As `df -i` shows it."""
    (mount / "a.txt").write_text("a")
    found = os.statvfs(mount.path)
    assert found.f_files - found.f_ffree in range(1, 10) and found.f_ffree > 1_000_000


def test_a_store_that_is_away_is_said_and_own_counters_stay(store, make_mount):
    mount = make_mount("--deadline", "3s")
    before = mount.status("ok")
    assert before["fs"]["store_error"] is None
    freeze(store.process.pid)
    away = mount.status("store away")
    assert away["fs"]["store_error"]
    assert keys(away) == keys(before) and keys(away, "fs") == keys(before, "fs")
    assert away["fs"]["cache"]["limit"] == before["fs"]["cache"]["limit"]
    text = said("store away", mount.path, "status", mount.path)
    assert text.startswith(f"{mount.path}: store away\n") and "wait for vineyardd" in text
    store.process.send_signal(signal.SIGCONT)
    mount.status("ok")


def test_a_private_store_that_ended_is_gone(folder):
    point = folder / "mnt"
    point.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "VINEYARD_IPC_SOCKET"}
    options = ["--size", "64M", "--deadline", "3s", "--log-file", folder / "log"]
    cli("mount", point, "--vineyardd", conftest.vineyardd_binary(), *options, env=environment)
    try:
        (point / "x.txt").write_text("x")
        os.kill(status(point, "ok")["store"]["pid"], signal.SIGKILL)
        gone = status(point, "store gone")
        assert gone["fs"]["cache"]["limit"] > 0 and gone["store"]["private"] is True
        text = said("store gone", point, "status", point)
        assert f"`vineyard-fs unmount {point}`, and mount again" in text and "away" not in text, text
        said("store gone", point, "top", point, "--once", "--interval", "0.1")
    finally:
        cli("unmount", point, "--force")


def test_another_users_mount_is_not_called_dead(store, make_mount):
    if os.geteuid() != 0:
        pytest.skip("only root can ask as somebody else")
    mount = make_mount()
    # Where nobody may run the program and look for its own folder.
    copy = pathlib.Path(tempfile.mkdtemp(prefix="vfs-other-"))
    try:
        os.chmod(copy, 0o755)
        program = shutil.copy(conftest.BINARY, copy)
        environment = {"PATH": os.environ["PATH"]}
        ask = lambda *arguments: subprocess.run(
            [program, *arguments], user=65534, group=65534, extra_groups=[], cwd="/", env=environment,
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
        mine = [part for part in ask("status").split("\n/") if str(mount.path)[1:] + ":" in part]
        assert len(mine) == 1 and "another user's" in mine[0] and "as root" in mine[0], mine
        assert "dead" not in mine[0] and "unmount" not in mine[0]
        found = [entry for entry in json.loads(ask("status", "--json")) if entry["mountpoint"] == str(mount.path)]
        assert [(entry["state"], entry["user"]) for entry in found] == [("another user's", "root")]
        assert f"{mount.path}: another user's" in ask("top", "--once", "--interval", "0.1")
    finally:
        shutil.rmtree(copy)


@pytest.mark.parametrize("arguments", ["status --json", "status M", "completions bash", "upgrade M", "--help"])
def test_nobody_who_listens_is_no_error_and_a_full_disk_is_one_line(mount, arguments):
    command = [conftest.BINARY, *arguments.replace("M", str(mount.path)).split()]
    mount.expected_restarts = 2 if arguments.startswith("upgrade") else 0
    ours, theirs = os.pipe()
    os.close(ours)
    closed = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(theirs)
    assert (closed.returncode, closed.stderr) == (0, "")
    if arguments != "--help":
        with open("/dev/full", "w") as full:
            failed = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "No space left" in failed.stderr, failed
