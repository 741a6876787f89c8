"""The official client replaces a dataset while others read it: vineyardd uses the old memory again at once, and no
reader may see it. A read gives one whole version, or an error that says that the version is gone."""

import errno
import json
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import until

ROUNDS = int(os.environ.get("VINEYARD_FS_RECYCLE_ROUNDS", "300"))
READERS = 4
# Between two versions the name is gone; a version that was deleted in the middle of a read is stale.
ALLOWED = {errno.ENOENT, errno.ESTALE, errno.EIO}

READER = r"""
import collections, errno, io, json, os, sys, time
import numpy as np, pyarrow as pa

path, how, stop = sys.argv[1:]
counts, versions, wrong = collections.Counter(), set(), []

def table():
    if how == "map":
        with pa.memory_map(path) as file:
            return pa.ipc.open_file(file).read_all()
    if how == "whole":
        with open(path, "rb") as file:
            return pa.ipc.open_file(pa.BufferReader(file.read())).read_all()
    with pa.OSFile(path) as file:
        return pa.ipc.open_file(file).read_all()

print("ready", flush=True)
while not os.path.exists(stop):
    try:
        found = table()
        # Twice, with time in between: a mapping must not change under its reader either.
        for _ in range(2):
            for name in ("a", "b"):
                values = found[name].combine_chunks().to_numpy()
                low, high = values.min(), values.max()
                if low != high or low != found["a"][0].as_py():
                    wrong.append([name, float(low), float(high)])
            time.sleep(0.001)
        versions.add(found["a"][0].as_py())
        counts["whole"] += 1
    except FileNotFoundError:
        counts["ENOENT"] += 1
    except OSError as error:
        # pyarrow tells errno values of reads in the text alone.
        known = [n for n in (errno.ENOENT, errno.ESTALE, errno.EIO) if error.errno == n or f"errno {n}]" in str(error)]
        if known:
            counts[errno.errorcode[known[0]]] += 1
        else:
            wrong.append(["error", type(error).__name__, str(error)])
    except Exception as error:
        wrong.append(["error", type(error).__name__, str(error)])
print(json.dumps({"counts": counts, "versions": len(versions), "wrong": wrong[:20]}))
"""


def version(number: int, rows: int) -> pd.DataFrame:
    return pd.DataFrame({"a": np.full(rows, float(number)), "b": np.full(rows, float(number))})


# Small ones are answered by requests in both modes, large ones are assembled where that is possible.
@pytest.mark.parametrize("rows", [2_000, 50_000])
@pytest.mark.parametrize("how", ["map", "read", "whole"])
def test_readers_see_whole_versions(store, make_mount, serving, rows, how):
    if how == "map" and serving:
        # Without a memory file a deleted version cannot be mapped safely: reads of pages that are gone end in SIGBUS
        # instead of wrong bytes. Python cannot survive that; `test_mappings_never_show_other_bytes` looks at it.
        pytest.skip("readers of vanished pages end by SIGBUS")
    mount = make_mount(*serving)
    before = mount.status()["server"]["pid"]
    store.put("X", version(0, rows))
    stop = store.folder / "stop"
    command = [sys.executable, "-c", READER, str(mount / "X.arrow"), how, str(stop)]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(READERS)]
    for reader in readers:
        assert reader.stdout.readline() == b"ready\n"
    try:
        for number in range(1, ROUNDS + 1):
            # Time to read this version, to be in the middle of it, or to look for the next one.
            time.sleep(0.003 * (number % 5))
            store.replace("X", version(number, rows))
            # Somebody else takes the memory that was freed, with other bytes.
            other = store.client.put(np.full(rows, -1.0))
            store.client.delete(other)
    finally:
        stop.touch()
    outcomes = []
    for reader in readers:
        out, err = reader.communicate(timeout=60)
        assert reader.returncode == 0, err.decode()[-2000:]
        outcomes.append(json.loads(out))
    print(json.dumps(outcomes))
    assert [wrong for outcome in outcomes for wrong in outcome["wrong"]] == []
    assert sum(outcome["counts"].get("whole", 0) for outcome in outcomes) > READERS, outcomes
    assert sum(outcome["versions"] for outcome in outcomes) > READERS, "readers saw several versions"
    # The daemon is the same and shows the last version.
    server = mount.status()["server"]
    assert (server["pid"], server["restarts"]) == (before, 0)
    last = pd.read_feather(mount / "X.arrow")
    pd.testing.assert_frame_equal(last, version(ROUNDS, rows))


MAPPER = r"""
import mmap, os, sys
import numpy as np

descriptor = os.open(sys.argv[1], os.O_RDONLY)
mapped = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
sys.stdout.write("mapped\n"); sys.stdout.flush()
sys.stdin.readline()
data = bytes(mapped)
os.write(1, (b"-1.0" if np.float64(-1.0).tobytes() * 4 in data else b"clean") + b"\n")
"""


def test_mappings_never_show_other_bytes(store, make_mount, serving):
    """A mapping that was made before the value was deleted: its pages are the old ones, or SIGBUS; never others."""
    mount = make_mount(*serving)
    rows = 500_000
    for _ in range(10):
        store.put("X", version(1, rows))
        reader = subprocess.Popen([sys.executable, "-c", MAPPER, str(mount / "X.arrow")], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert reader.stdout.readline() == b"mapped\n"
        store.client.delete(store.client.get_name("X"))
        store.client.drop_name("X")
        others = [store.client.put(np.full(rows, -1.0)) for _ in range(3)]
        reader.stdin.write(b"go\n")
        out, _ = reader.communicate(timeout=60)
        if serving:
            assert out == b"clean\n" or reader.returncode == -7, (out, reader.returncode)
        else:
            assert (out, reader.returncode) == (b"clean\n", 0)
        for other in others:
            store.client.delete(other)


def test_an_open_file_stays_on_its_version(store, make_mount, serving):
    """An open descriptor gives the bytes of what was opened, or ESTALE or EIO once they are gone."""
    mount = make_mount(*serving)
    store.put("X", version(1, 100_000))
    expected = (mount / "X.arrow").read_bytes()
    descriptor = os.open(mount / "X.arrow", os.O_RDONLY)
    try:
        head = os.pread(descriptor, 100_000, 0)
        store.replace("X", version(2, 100_000))
        until(lambda: pd.read_feather(mount / "X.arrow")["a"][0] == 2.0)
        assert head == expected[:100_000]
        for offset in range(0, len(expected), 64 << 10):
            try:
                part = os.pread(descriptor, 64 << 10, offset)
            except OSError as error:
                assert error.errno in ALLOWED and serving, error
                continue
            assert part == expected[offset : offset + (64 << 10)]
    finally:
        os.close(descriptor)
    assert pd.read_feather(mount / "X.arrow")["a"].eq(2.0).all()


def test_images_of_what_others_replaced_go(store, make_mount):
    mount = make_mount()
    for turn in range(20):
        store.put("changing", np.full(200_000, turn))
        raw = (mount / "changing.npy").read_bytes()
        assert raw.endswith(np.full(10, turn).tobytes())
        store.client.delete(store.client.get_name("changing"))
        store.client.drop_name("changing")
    kept = mount.status()["files"]["images"]["bytes"]
    assert kept <= 3 * len(raw), f"{kept} bytes of images of a file of {len(raw)}"
