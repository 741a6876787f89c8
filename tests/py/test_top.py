"""`vineyard-fs top` against a mount that works."""

import os
import pty
import re
import select
import signal
import subprocess
import threading
import time

import conftest
import pytest


@pytest.fixture
def busy(make_mount):
    """A mount on which somebody reads all the time, through requests."""
    mount = make_mount("--serve", "lazy")
    (mount / "a.bin").write_bytes(b"x" * 300_000)
    (mount / "b.txt").write_text("x")
    stop = threading.Event()

    def work():
        while not stop.is_set():
            (mount / "a.bin").read_bytes()
            with pytest.raises(FileNotFoundError):
                os.stat(mount / "absent")
            time.sleep(0.005)

    worker = threading.Thread(target=work)
    worker.start()
    yield mount
    stop.set()
    worker.join()


def test_lines_for_scripts(busy):
    # A server that is too busy for a moment is not "ok", and does little in the next one.
    for _ in range(10):
        lines = conftest.cli("top", busy.path, "--interval", "0.5", "--count", "3").stdout.splitlines()
        assert len(lines) == 3, lines
        rates = dict(re.findall(r"; (\w+) ([0-9.]+)/s", lines[-1]))
        well = all(line.startswith(f"{busy.path}: ok, requests ") for line in lines)
        if well and float(rates.get("open", 0)) > 5 and float(rates.get("lookup", 0)) > 5:
            break
    assert well and float(rates["open"]) > 5 and float(rates["lookup"]) > 5, lines
    assert "restarts 0" in lines[-1] and re.search(r"; open \S+/s p50 [0-9.]+ µs p99 [0-9.]+ µs", lines[-1])
    everything = conftest.cli("top", "--once", "--interval", "0.1").stdout
    assert f"{busy.path}: ok" in everything
    refused = conftest.cli("top", "/", check=False)
    assert refused.returncode == 1 and "not a mount of vineyard-fs" in refused.stderr
    # Counters of a new server begin at 0.
    killed = busy.kill_server()
    deadline = time.monotonic() + 60
    while busy.status("ok")["server"]["pid"] == killed:
        assert time.monotonic() < deadline, "no server comes back"
        time.sleep(0.05)
    lines = conftest.cli("top", busy.path, "--interval", "1", "--count", "2").stdout.splitlines()
    assert "restarts 1" in lines[-1], lines


def test_a_pipe_that_closes_and_a_signal_end_it(busy):
    command = f"'{conftest.BINARY}' top --interval 0.1 '{busy.path}' | head -n 2; echo ${{PIPESTATUS[0]}}"
    out = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert out.stdout.splitlines()[2] == "0" and out.stderr == "", out
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen([conftest.BINARY, "top", busy.path, "--interval", "0.1"], stdout=subprocess.PIPE)
        assert process.stdout.readline()
        process.send_signal(number)
        assert process.wait(60) == 0


def test_a_terminal_gets_a_screen_and_gets_it_back(busy):
    ours, theirs = pty.openpty()
    command = [conftest.BINARY, "top", busy.path, "--interval", "0.2"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    seen = b""
    try:
        deadline = time.monotonic() + 60
        while seen.count(b"\x1b[H") < 3:
            assert time.monotonic() < deadline, seen
            if select.select([ours], [], [], 0.5)[0]:
                seen += os.read(ours, 65536)
        os.write(ours, b"q")
        assert process.wait(60) == 0
        while select.select([ours], [], [], 0.2)[0]:
            seen += os.read(ours, 65536)
    finally:
        process.kill()
        os.close(theirs)
        os.close(ours)
    assert seen.startswith(b"\x1b[?1049h") and seen.endswith(b"\x1b[?25h\x1b[?1049l"), seen
    assert b"operation" in seen and b"lookup" in seen and b"images" in seen
