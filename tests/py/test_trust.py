"""What a mount promises to those who do not trust each other, and under load."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import conftest
import numpy as np
import pandas as pd
import pytest
from conftest import freeze, settled, until

CANARY = 0xC0FFEE_15_BAD_F00D


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_no_reader_sees_bytes_of_another_dataset(store, make_mount, serving):
    """All of the store is filled with a canary and freed; what is written then never shows a byte of it, however it is
    made larger, cut, padded or left unfinished."""
    mount = make_mount(*serving)
    word = np.uint64(CANARY).tobytes()
    filled = []
    while True:
        try:
            filled.append(store.client.put(np.full(4 << 20, CANARY, dtype=np.uint64)))
        except Exception:
            break
    assert len(filled) > 10
    for each in filled:
        store.client.delete(each)
    rng = np.random.default_rng(3)
    # Odd lengths, so that buffers need padding; nulls and strings, whose buffers are derived.
    for rows in (1, 3, 1_001, 70_001):
        frame = pd.DataFrame({
            "a": rng.integers(0, 100, rows, dtype=np.int8),
            "b": np.where(rng.random(rows) < 0.3, np.nan, rng.random(rows)),
            "c": [None if i % 7 == 0 else "x" * (i % 5) for i in range(rows)],
        })
        frame.to_feather(mount / f"t{rows}.arrow", compression="uncompressed")
        frame.to_parquet(mount / f"p{rows}.parquet")
        np.save(mount / f"n{rows}.npy", rng.random(rows).astype(np.float32))
        store.put(f"official{rows}", frame.dropna())
    for name in ("grown.bin", "holes.bin", "allocated.bin", "cut.bin"):
        with open(mount / name, "wb") as file:
            file.write(b"begin")
            if name == "grown.bin":
                file.truncate(300_001)
            elif name == "holes.bin":
                file.seek(500_003)
                file.write(b"end")
            elif name == "allocated.bin":
                os.posix_fallocate(file.fileno(), 0, 400_007)
            else:
                file.write(b"y" * 200_000)
                file.flush()
                file.truncate(100_001)
                file.truncate(200_001)
    seen = 0
    for name in os.listdir(mount.path):
        stem = name.rsplit(".", 1)[0]
        views = {name} | ({f"{stem}.arrow", f"{stem}.feather", f"{stem}.parquet"} if name[0] in "tpo" else set())
        for view in views:
            data = (mount / view).read_bytes()
            with open(mount / view, "rb") as file:
                past = os.pread(file.fileno(), 1 << 20, max(len(data) - 10, 0))
            for part in (data, past):
                assert word not in part and word[::-1] not in part, view
            seen += len(data)
    assert seen > 3_000_000


def test_ten_thousand_open_files_and_none_is_left(store, mount):
    """Open files cost the keeper and the server nothing that stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 10_000
    if hard != resource.RLIM_INFINITY and hard < wanted + 500:
        pytest.skip(f"the hard limit of open files is {hard}")
    for i in range(20):
        (mount / f"small{i}.txt").write_text(f"{i}")
        pd.DataFrame({"a": np.arange(20_000 + i)}).to_feather(mount / f"x{i}.arrow", compression="uncompressed")
    # Closes reach the server a moment later.
    handles = lambda: mount.status()["fs"]["open_handles"]
    settled(handles, 0)
    status = mount.status()
    pids = [status["keeper"]["pid"], status["server"]["pid"]]
    before = [open_descriptors(pid) for pid in pids]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted + 500), hard))
    try:
        names = [f"small{i}.txt" for i in range(20)] + [f"x{i}.arrow" for i in range(20)]
        files = [os.open(mount / names[i % 40], os.O_RDONLY) for i in range(wanted)]
        assert handles() >= wanted
        assert os.pread(files[3], 10, 0) == b"3" and os.pread(files[-1], 6, 0) == b"ARROW1"
        for descriptor in files:
            os.close(descriptor)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    settled(handles, 0)
    after = lambda: [open_descriptors(pid) for pid in pids]
    few = lambda keeper, server: keeper <= before[0] + 25 and server <= before[1] + 45
    until(lambda: few(*after()), lambda: (before, after()))


def test_few_descriptors_are_answers_or_errors(store, folder):
    """With RLIMIT_NOFILE 256 for keeper and server nothing hangs, what fails says so, and it recovers."""
    script = 'ulimit -n 256; exec "$@"'
    point, log = folder / "mnt", folder / "mnt.log"
    point.mkdir()
    command = [str(conftest.BINARY), "mount", str(point), "--socket", store.socket, "--log-file", str(log)]
    mount = conftest.Mount.__new__(conftest.Mount)
    mount.path, mount.store, mount.log = point, store, log
    try:
        subprocess.run(["bash", "-c", script, "bash", *command], check=True, timeout=60)
        failures, good = 0, []
        for i in range(400):
            try:
                (point / f"f{i}.bin").write_bytes(b"x" * 100_000)
                good.append(i)
            except OSError as error:
                assert error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EIO, errno.ENOSPC), error
                failures += 1
        assert len(good) > 50
        for i in good:
            assert (point / f"f{i}.bin").read_bytes() == b"x" * 100_000
        for i in good:
            (point / f"f{i}.bin").unlink()
        (point / "again.txt").write_text("again")
        assert (point / "again.txt").read_text() == "again"
        mount.status("ok")
        print(f"{len(good)} of 400 files were written, {failures} refused")
    finally:
        mount.unmount()


WORKER = r"""
import hashlib, os, random, sys
folder, seed = sys.argv[1], int(sys.argv[2])
random.seed(seed)
for round in range(6):
    data = random.randbytes(random.randrange(1, 200_000))
    path = f"{folder}/c{seed}.bin"
    with open(path, "wb") as file:
        file.write(data)
    with open(path, "rb") as file:
        assert file.read() == data, "own bytes"
    assert len(open(f"{folder}/shared.arrow", "rb").read()) == int(sys.argv[3])
    os.listdir(folder)
    os.rename(path, path + ".old")
    os.unlink(path + ".old")
"""


def test_64_clients_at_once(store, mount):
    pd.DataFrame({"a": np.arange(300_000)}).to_feather(mount / "shared.arrow", compression="uncompressed")
    size = os.path.getsize(mount / "shared.arrow")
    usage = store.usage()
    command = [sys.executable, "-c", WORKER, str(mount.path)]
    workers = [
        subprocess.Popen([*command, str(seed), str(size)], stderr=subprocess.PIPE, text=True) for seed in range(64)
    ]
    for worker in workers:
        _, err = worker.communicate(timeout=300)
        assert worker.returncode == 0, err[-1500:]
    assert os.listdir(mount.path) == ["shared.arrow"]
    settled(store.usage, usage)
    assert mount.status()["server"]["restarts"] == 0


def test_a_stopped_store_costs_errors_and_leaves_nothing(store, make_mount):
    """While vineyardd stands still, everything is answered within the deadline; afterwards all is as before."""
    mount = make_mount("--deadline", "3s")
    (mount / "a.txt").write_text("a")
    pid = mount.status()["server"]["pid"]
    threads, descriptors = len(os.listdir(f"/proc/{pid}/task")), open_descriptors(pid)
    freeze(store.process.pid)
    outcomes = []

    def attempt(i):
        start = time.monotonic()
        try:
            (mount / f"new{i}.txt").write_text("x")
        except OSError as error:
            outcomes.append(error.errno)
        else:
            outcomes.append(0)
        outcomes.append(time.monotonic() - start)

    workers = [threading.Thread(target=attempt, args=(i,)) for i in range(8)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
            assert not worker.is_alive(), "a client hangs"
    finally:
        os.kill(store.process.pid, signal.SIGCONT)
    assert all(kind in (errno.EIO, errno.ETIMEDOUT) for kind in outcomes if isinstance(kind, int)), outcomes
    deadline = time.monotonic() + 90
    while True:
        try:
            (mount / "b.txt").write_text("b")
            break
        except OSError:
            assert time.monotonic() < deadline
    assert (mount / "a.txt").read_text() == "a" and (mount / "b.txt").read_text() == "b"
    now = mount.status()["server"]
    assert now["pid"] == pid, "the server lived through it"
    assert open_descriptors(pid) <= descriptors + 12 and len(os.listdir(f"/proc/{pid}/task")) <= threads + 12
