"""Options of `mount` that take effect, and those that are refused."""

import os
import pathlib
import re
import signal
import subprocess
import urllib.request

import conftest
import pytest
from conftest import cli, status, until


def private(point, *options, check=True, **environment):
    """A mount with a store of its own."""
    inherited = {key: value for key, value in os.environ.items() if key != "VINEYARD_IPC_SOCKET"}
    options = ["--vineyardd", conftest.vineyardd_binary(), *options]
    return cli("mount", point, *options, env={**inherited, **environment}, check=check)


@pytest.fixture
def point(folder):
    point = folder / "mnt"
    point.mkdir()
    yield point
    cli("unmount", point, "--force", check=False)


def listed(point):
    """Options of a mount, as the kernel lists them."""
    lines = [line.split() for line in open("/proc/self/mountinfo")]
    return [line[5].split(",") + line[-1].split(",") for line in lines if line[4] == str(point)][-1]


@pytest.mark.skipif(os.geteuid() != 0, reason="fusermount3 applies what it knows")
def test_options_of_mount_take_effect(make_mount):
    mount = make_mount("-o", "noexec,noatime,nodiratime,lazytime")
    assert {"noexec", "noatime", "nodiratime", "nosuid", "nodev"} <= set(listed(mount.path))
    script = mount / "run.sh"
    script.write_text("#!/bin/sh\nexit 0\n")
    os.chmod(script, 0o755)
    with pytest.raises(PermissionError):
        subprocess.run([script], check=True)
    plain = make_mount()
    subprocess.run([plain / "run.sh"], check=True)
    assert "noexec" not in listed(plain.path)


def test_options_that_do_nothing_are_said(point):
    said = private(point, "--size", "64M", "-o", "lazytime,noauto").stderr
    assert "-o lazytime does nothing here" in said and "noauto" not in said


def test_a_store_larger_than_the_machine_and_levels_that_are_none_are_refused(point):
    for size in ["500%", "100000G"]:
        refused = private(point, "--size", size, check=False)
        assert refused.returncode == 1 and "MiB of memory and" in refused.stderr, refused
    refused = private(point, "--log-level", "zzz", check=False)
    assert refused.returncode == 2 and "info, debug, trace" in refused.stderr, refused
    assert not os.listdir(point)


def test_the_log_of_a_private_vineyardd_is_where_status_says(folder, point):
    temporary = folder / "tmp"
    temporary.mkdir()
    before = set(pathlib.Path("/tmp").glob("vineyard.*.log.*"))
    private(point, "--size", "64M", "--log-file", folder / "mount.log", TMPDIR=str(temporary), GLOG_log_dir="")
    pid = store(point)
    log = pathlib.Path(re.search(r"its log: (.*)", gone(point, pid)).group(1))
    assert "vineyard" in log.read_text()
    # Process numbers come again: a file that was there before is another process's.
    fresh = set(pathlib.Path("/tmp").glob(f"vineyard.*.log.*.{pid}")) - before
    assert not fresh and not list(temporary.glob("vineyard.*")), "no logs of glog"


def store(point):
    """Process number of the private vineyardd."""
    return status(point, "ok")["store"]["pid"]


def gone(point, pid):
    """What `status` says once the private vineyardd has ended."""
    os.kill(pid, signal.SIGKILL)
    return until(lambda: "store gone" in (text := cli("status", point).stdout) and text)


def test_a_free_port_for_counters_is_told(make_mount):
    mount = make_mount("--metrics", "127.0.0.1:0")
    address = mount.status()["metrics"]
    assert not address.endswith(":0")
    assert f"http://{address}/metrics" in cli("status", mount.path).stdout
    page = lambda: urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read()
    # Of a store that takes longer to answer than a page may take, it says nothing.
    until(lambda: b"vineyard_fs_store_up 1\n" in page(), page)
