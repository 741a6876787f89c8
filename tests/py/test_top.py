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


def lines_of(mount, *arguments):
    """What it says of the mount. It is well, but on a busy machine its server may not say so in time."""
    for _ in range(5):
        lines = conftest.cli("top", *arguments).stdout.splitlines()
        lines = [line for line in lines if line.startswith(f"{mount.path}: ")]
        if all(line.startswith(f"{mount.path}: ok, requests ") for line in lines):
            break
    return lines


def test_lines_for_scripts(busy):
    lines = lines_of(busy, busy.path, "--interval", "0.5", "--count", "3")
    assert len(lines) == 3 and all(line.startswith(f"{busy.path}: ok, requests ") for line in lines), lines
    rates = lambda line: {name: float(rate) for name, rate in re.findall(r"; (\w+) ([0-9.]+)/s", line)}
    best = max(lines, key=lambda line: rates(line).get("open", 0))
    assert rates(best)["open"] > 5 and rates(best)["lookup"] > 5, lines
    assert "restarts 0" in best and re.search(r"; open \S+/s p50 [0-9.]+ µs p99 [0-9.]+ µs", best)
    everything = lines_of(busy, "--once", "--interval", "0.1")
    assert len(everything) == 1 and everything[0].startswith(f"{busy.path}: ok"), everything
    refused = conftest.cli("top", "/", check=False)
    assert refused.returncode == 1 and "not a mount of vineyard-fs" in refused.stderr
    # Counters of a new server begin at 0.
    busy.next_server(busy.kill_server())
    lines = lines_of(busy, busy.path, "--interval", "1", "--count", "2")
    assert len(lines) == 2 and "restarts 1" in lines[-1], lines


def test_a_pipe_that_closes_and_a_signal_end_it(busy):
    command = f"'{conftest.BINARY}' top --interval 0.1 '{busy.path}' | head -n 2; echo ${{PIPESTATUS[0]}}"
    out = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
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
