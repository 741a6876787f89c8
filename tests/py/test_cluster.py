"""Datasets that live on another instance."""

import errno
import mmap
import os
import signal
import time

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pytest
import vineyard
from cluster import eventually, numbers
from conftest import freeze, settled


def remote(mount) -> dict:
    return mount.status()["fs"]["remote"]


def test_what_another_client_wrote_is_read_everywhere(cluster):
    frame = numbers(20_000, 5)
    frame["n"] = np.arange(len(frame), dtype="int32")
    table = pa.table({"s": pa.array([f"text {i}" if i % 7 else None for i in range(5000)], pa.large_string()),
                      "x": pa.array(range(5000), pa.int64())})
    cluster[0].put("frame", frame)
    cluster[0].put("table", table)
    cluster[0].put("array", np.arange(12.0).reshape(3, 4))
    there = cluster.mount(1)
    assert sorted(os.listdir(there.path)) == ["array.npy", "frame.arrow", "table.arrow"]
    assert os.getxattr(there / "frame.arrow", "user.vineyard.instance") == b"0"
    moved = remote(there)["bytes"]
    assert moved == 0, "names, sizes and attributes need no data"
    pd.testing.assert_frame_equal(pd.read_feather(there / "frame.arrow"), frame)
    assert pl.read_ipc(there / "frame.arrow")["n"].to_list() == list(range(20_000))
    assert pa.feather.read_table(there / "table.arrow").equals(table)
    assert pl.scan_ipc(there / "table.arrow").collect().to_arrow()["s"].to_pylist() == table["s"].to_pylist()
    pd.testing.assert_frame_equal(pd.read_parquet(there / "frame.parquet"), frame)
    assert np.array_equal(np.load(there / "array.npy"), np.arange(12.0).reshape(3, 4))
    status = remote(there)
    assert 0 < status["bytes"] < 3_000_000, "once, whoever reads"
    assert status["failures"] == 0 and cluster[1].usage() == 0


def test_what_a_mount_wrote_is_read_byte_for_byte(cluster):
    here, there = cluster.mount(0), cluster.mount(1)
    frame = numbers(50_000, 3)
    frame["s"] = [f"row {i}" for i in range(len(frame))]
    frame.to_feather(here / "f.feather")
    frame.to_parquet(here / "p.parquet")
    (here / "model.pkl").write_bytes(os.urandom(300_000))
    for name in ["f.feather", "p.parquet", "model.pkl"]:
        assert (there / name).read_bytes() == (here / name).read_bytes(), name
    pd.testing.assert_frame_equal(pd.read_feather(there / "f.feather"), frame)
    (there / "f.feather").unlink()
    time.sleep(1.1)
    assert not (here / "f.feather").exists()


def test_two_columns_move_two_columns(cluster):
    frame = numbers(500_000, 100)
    cluster[0].put("wide", frame)
    whole = frame.size * 8
    there = cluster.mount(1)
    found = pa.feather.read_table(there / "wide.arrow", columns=["c20", "c70"], memory_map=False)
    assert np.array_equal(found["c70"].to_numpy(), frame["c70"].to_numpy())
    moved = remote(there)["bytes"]
    assert moved <= whole * 0.06, f"{moved / whole:.1%} of the bytes moved"
    pd.testing.assert_frame_equal(pd.read_feather(there / "wide.arrow"), frame)
    assert remote(there)["bytes"] < whole * 1.15


def test_a_large_blob_comes_as_a_stream(cluster):
    values = np.arange(20_000_000, dtype="float64")
    cluster[0].put("large", values)
    there = cluster.mount(1)
    with open(there / "large.npy", "rb", buffering=0) as file:
        assert len(file.read(100)) == 100
    assert remote(there)["bytes"] < values.nbytes / 4
    assert np.array_equal(np.load(there / "large.npy"), values)
    assert np.array_equal(np.load(there / "large.npy", mmap_mode="r"), values)
    assert remote(there)["bytes"] < values.nbytes * 1.3


def test_parts_on_two_instances_are_one_table(cluster):
    parts = [numbers(10_000, 2, seed) for seed in range(4)]
    ids = []
    for number, part in enumerate(parts):
        client = cluster[number % 2].client
        ids.append(client.put(part))
        client.persist(ids[-1])
    meta = vineyard.ObjectMeta()
    meta["typename"] = "vineyard::GlobalDataFrame"
    meta["partition_shape_row_"] = 4
    meta["partition_shape_column_"] = 1
    meta.set_global(True)
    meta["partitions_-size"] = 4
    for number, id in enumerate(ids):
        meta.add_member(f"partitions_-{number}", id)
    # Members of the other instance must be known here.
    client = cluster[0].client
    for id in ids:
        client.get_meta(id, True)
    made = client.create_metadata(meta)
    client.persist(made.id)
    client.put_name(made.id, "global")
    whole = pd.concat(parts, ignore_index=True)
    for mount in [cluster.mount(0), cluster.mount(1)]:
        found = pd.read_feather(mount / "global.arrow")
        assert np.array_equal(found[["c0", "c1"]].to_numpy(), whole.to_numpy())
        assert 0 < remote(mount)["bytes"] < whole.size * 8


def test_never_means_never(cluster):
    cluster[0].put("frame", numbers(1000, 2))
    cluster[1].put("mine", numbers(1000, 2))
    there = cluster.mount(1, "--migrate", "never")
    assert os.stat(there / "frame.arrow").st_size > 16_000
    with pytest.raises(OSError) as error:
        (there / "frame.arrow").read_bytes()
    assert error.value.errno == errno.EREMOTEIO
    assert len(pd.read_feather(there / "mine.arrow")) == 1000
    assert remote(there)["bytes"] == 0


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_dead_owner_is_an_error_in_time_and_nothing_else(cluster, how):
    frame, mine = numbers(300_000, 4), numbers(1000, 2, 7)
    cluster[0].put("theirs", frame)
    cluster[0].put("text", pa.table({"s": ["a", "b"]}))
    cluster[1].put("mine", mine)
    there = cluster.mount(1, "--deadline", "5s")
    with open(there / "theirs.arrow", "rb") as file:
        file.read(1000)
    if how == "killed":
        cluster[0].kill()
    else:
        freeze(cluster[0].process.pid)
    started = time.monotonic()
    with pytest.raises(OSError) as error:
        (there / "theirs.arrow").read_bytes()
    # A read that arrived while the kernel read ahead may be refused as EIO.
    assert error.value.errno in (errno.EHOSTUNREACH, errno.EIO)
    assert time.monotonic() - started < 40
    pd.testing.assert_frame_equal(pd.read_feather(there / "mine.arrow"), mine)
    assert "mine.arrow" in os.listdir(there.path)
    with pytest.raises(OSError) as error:
        (there / "text.arrow").read_bytes()
    assert error.value.errno == errno.EHOSTUNREACH
    log = there.log.read_text()
    assert "instance i0" in log and str(cluster[0].port) in log
    if how == "frozen":
        cluster[0].process.send_signal(signal.SIGCONT)
        pd.testing.assert_frame_equal(eventually(lambda: pd.read_feather(there / "theirs.arrow")), frame)
        text = eventually(lambda: pa.feather.read_table(there / "text.arrow"))
        assert text["s"].to_pylist() == ["a", "b"]


def test_a_deleted_object_is_stale_and_a_copy_stays(cluster):
    frame = numbers(500_000, 2)
    object_id = cluster[0].put("frame", frame)
    there = cluster.mount(1)
    with open(there / "frame.arrow", "rb") as partly, open(there / "frame.arrow", "rb") as wholly:
        assert len(wholly.read()) > frame.size * 8
        cluster[0].client.delete(object_id)
        partly.seek(1 << 20)
        assert len(partly.read()) > 0, "what came whole is kept"
    cluster[0].put("other", frame)
    with open(there / "other.arrow", "rb", buffering=0) as file:
        file.read(10)
        cluster[0].client.delete(cluster[0].client.get_name("other"))
        time.sleep(0.5)
        with pytest.raises(OSError) as error:
            file.seek(7 << 20)
            file.read(1 << 20)
        assert error.value.errno in (errno.ESTALE, errno.EIO)


def test_files_of_another_instance_are_changed_and_removed(cluster):
    here, there = cluster.mount(0), cluster.mount(1)
    payload = os.urandom(3 << 20)
    frame = numbers(1000, 2)
    for name in ["a.bin", "b.bin", "c.bin"]:
        (here / name).write_bytes(payload)
    frame.to_feather(here / "t.feather")
    time.sleep(1.1)
    os.chmod(there / "a.bin", 0o600)
    os.utime(there / "t.feather", (1, 1))
    os.rename(there / "t.feather", there / "u.feather")
    with open(there / "b.bin", "ab") as file:
        file.write(b"tail")
    (there / "c.bin").write_bytes(b"new")
    time.sleep(1.1)
    for mount in [here, there]:
        assert sorted(os.listdir(mount.path)) == ["a.bin", "b.bin", "c.bin", "u.feather"]
        assert (mount / "a.bin").read_bytes() == payload
        assert os.stat(mount / "a.bin").st_mode & 0o777 == 0o600
        assert (mount / "b.bin").read_bytes() == payload + b"tail"
        assert (mount / "c.bin").read_bytes() == b"new"
        pd.testing.assert_frame_equal(pd.read_feather(mount / "u.feather"), frame)
    for name in os.listdir(there.path):
        (there / name).unlink()
    time.sleep(1.1)
    for mount in [here, there]:
        assert os.listdir(mount.path) == []
    settled(lambda: [instance.usage() for instance in cluster.instances], [0, 0])


def test_a_large_table_is_read_in_every_way_while_it_comes(cluster):
    here, frame = cluster.mount(0), numbers(1 << 20, 6)
    for name in ("whole", "pieces", "mapped", "killed"):
        cluster[0].put(name, frame)
    there = cluster.mount(1)
    expected = (here / "whole.arrow").read_bytes()
    assert len(expected) > 48 << 20
    with open(there / "whole.arrow", "rb") as first, open(there / "whole.arrow", "rb", buffering=0) as second:
        assert first.read() == expected
        # The first one keeps the file in its mode.
        assert second.read() == expected and second.read(1) == b""
    assert (there / "whole.arrow").read_bytes() == expected
    moved = remote(there)["bytes"]
    # What the kernel read ahead may come again if the reader pauses.
    assert len(expected) - (1 << 20) < moved < len(expected) * 1.15, "once, whoever reads"

    random = np.random.default_rng(3)
    with open(there / "pieces.arrow", "rb", buffering=0) as file:
        for size in (1, 100, 8192, 70_000, 1 << 20, 5 << 20):
            for offset in [0, 1, len(expected) - size, *random.integers(0, len(expected), 5).tolist()]:
                assert os.pread(file.fileno(), size, offset) == expected[offset:offset + size], (offset, size)
        assert os.pread(file.fileno(), 10, len(expected)) == b""
        assert os.pread(file.fileno(), 10, len(expected) - 3) == expected[-3:]

    with open(there / "mapped.arrow", "rb") as file:
        file.seek(40 << 20)
        assert file.read(5000) == expected[40 << 20:][:5000]
        for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
            with mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ) as mapped:
                assert mapped[:] == expected
        assert file.read(5000) == expected[40 << 20:][5000:10_000]
    pd.testing.assert_frame_equal(pd.read_feather(there / "mapped.arrow"), frame)

    with open(there / "killed.arrow", "rb", buffering=0) as file:
        parts = [file.read(1 << 20)]
        there.kill_server()
        while part := file.read(1 << 20):
            parts.append(part)
    assert b"".join(parts) == expected
