"""Moving datasets between instances, copies of them, and cleaning up what is left of either."""

import errno
import hashlib
import json
import os
import time

import numpy as np
import pandas as pd
import pytest
from cluster import Cluster, numbers
from conftest import cli, settled, until


def told(instance, *arguments):
    return json.loads(cli(*arguments, "--json", "--socket", instance.socket).stdout)


def where(instance, name):
    return instance.client.get_meta(instance.client.get_name(name), True).instance_id


def unnoticed(instance) -> list[str]:
    """Names that no listing shows."""
    return [name for name in instance.client.list_names("*", limit=1 << 30) if name.startswith(".vineyard-fs")]


def sha(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_info_does_not_invent_the_size_of_what_lives_elsewhere(cluster):
    owner, other = cluster[0], cluster[1]
    owner.client.put(numbers(1000, 2), name="x", persist=True)
    assert told(owner, "info", "x")["blobs"]["bytes"] >= 16_000
    assert until(lambda: told(other, "ls"))
    assert told(other, "info", "x")["blobs"] == {**told(owner, "info", "x")["blobs"], "bytes": None}
    text = cli("info", "x", "--socket", other.socket).stdout
    assert "known where it lives" in text and "0 B" not in text, text


def test_a_dataset_moves_and_stays_the_same(cluster):
    frame = numbers(300_000, 4)
    frame["s"] = [f"row {i}" for i in range(len(frame))]
    here, there = cluster.mount(0), cluster.mount(1)
    frame.to_feather(here / "saved.arrow", compression="uncompressed")
    frame.to_parquet(here / "packed.parquet")
    (here / "plain.bin").write_bytes(os.urandom(100_000))
    cluster[0].put("put", numbers(1000, 3))
    os.utime(here / "saved.arrow", (1_000_000, 1_000_000))
    names = ["saved.arrow", "packed.parquet", "plain.bin", "put.arrow"]
    before = {name: sha(here / name) for name in names}
    result = cli("migrate", *names, "--socket", cluster[1].socket)
    assert result.stdout.count("is now on instance i1") == 4
    assert [where(cluster[1], name) for name in ["saved", "packed", "plain.bin", "put"]] == [1, 1, 1, 1]
    assert cluster[0].usage() == 0, "nothing stays behind"
    pd.testing.assert_frame_equal(cluster[1].client.get(name="put"), numbers(1000, 3))
    time.sleep(1.1)
    for mount in [here, there]:
        assert {name: sha(mount / name) for name in names} == before
        assert os.stat(mount / "saved.arrow").st_mtime == 1_000_000
        assert sorted(os.listdir(mount.path)) == sorted(names)
    assert there.status()["fs"]["remote"]["bytes"] == 0
    assert "already" in cli("migrate", "put", "--socket", cluster[1].socket).stdout
    # Back, asked for at the other instance.
    cli("migrate", "put", "--to", "0", "--socket", cluster[1].socket)
    assert where(cluster[0], "put") == 0
    # And as where only TCP leads to the instance.
    os.rename(cluster[1].socket, cluster[1].socket + ".away")
    cli("migrate", "put", "--to", "i1", "--socket", cluster[0].socket)
    os.rename(cluster[1].socket + ".away", cluster[1].socket)
    assert where(cluster[0], "put") == 1 and cluster[0].usage() == 0
    assert sha(here / "put.arrow") == before["put.arrow"]
    assert unnoticed(cluster[0]) == []
    wrong = cli("migrate", "put", "--to", "9", "--socket", cluster[0].socket, check=False)
    assert wrong.returncode == 1 and "there is i0, i1" in wrong.stderr


@pytest.mark.parametrize("how", ["unlink", "replace", "chmod", "rename over"])
def test_copies_go_with_the_dataset(three, how):
    frame = numbers(100_000, 2)
    here, there = three.mount(0), three.mount(1)
    frame.to_feather(here / "x.arrow")
    numbers(10, 2).to_feather(here / "y.arrow")
    for instance in three.instances[1:]:
        assert "has a copy" in cli("pin", "x", "--socket", instance.socket).stdout
        assert "already" in cli("pin", "x.arrow", "--socket", instance.socket).stdout
    copies = told(three[0], "info", "x")["copies"]
    assert [copy["instance"] for copy in copies] == [1, 2]
    assert all(instance.usage() > frame.size * 8 for instance in three.instances)
    pd.testing.assert_frame_equal(pd.read_feather(there / "x.arrow"), frame)
    assert there.status()["fs"]["remote"]["bytes"] == 0, "read from the copy"
    assert sorted(os.listdir(there.path)) == ["x.arrow", "y.arrow"], "names of copies are not shown"
    if how == "unlink":
        (there / "x.arrow").unlink()
    elif how == "replace":
        numbers(10, 3).to_feather(there / "x.arrow")
    elif how == "chmod":
        os.chmod(there / "x.arrow", 0o600)
    else:
        os.rename(there / "y.arrow", there / "x.arrow")
    left = three.instances[1:] if how == "chmod" else three.instances
    until(lambda: all(instance.usage() < 10_000 for instance in left))
    assert unnoticed(three[0]) == []
    if how == "chmod":
        pd.testing.assert_frame_equal(pd.read_feather(there / "x.arrow"), frame)


def test_full_makes_a_copy_that_outlives_the_owner(cluster):
    frame = numbers(2_000_000, 4)
    cluster[0].put("x", frame)
    there = cluster.mount(1, "--migrate", "full", "--deadline", "5s")
    pd.testing.assert_frame_equal(pd.read_feather(there / "x.arrow"), frame)
    until(lambda: told(cluster[1], "info", "x").get("copies"))
    # Twice as much if reader and copy did not share. Of each column (16 MB) up to 2 MiB may come again: what the kernel
    # read ahead while the column before it was read, if the reader paused then.
    assert there.status()["fs"]["remote"]["bytes"] < frame.size * 8 * 1.4, "shared with the reader"
    [hidden] = unnoticed(cluster[1])
    pd.testing.assert_frame_equal(cluster[1].client.get(name=hidden), frame)
    assert where(cluster[1], hidden) == 1
    with open(there / "x.arrow", "rb", buffering=0) as opened:
        first = opened.read(1000)
        cluster[0].kill()
        fresh = cluster.mount(1, "--deadline", "5s")
        for mount in [there, fresh]:
            started = time.monotonic()
            pd.testing.assert_frame_equal(pd.read_feather(mount / "x.arrow"), frame)
            assert time.monotonic() - started < 60
        opened.seek(0)
        assert opened.read(1000) == first
    # The others notice after a minute that the instance is gone; the name then leads to nothing for them.
    found = until(lambda: told(cluster[1], "gc", "--dry-run"), seconds=240)
    assert [(entry["kind"], entry["name"]) for entry in found] == [("orphaned", "x")]
    pd.testing.assert_frame_equal(pd.read_feather(fresh / "x.arrow"), frame)
    assert told(cluster[1], "gc") == found and told(cluster[1], "gc") == []
    pd.testing.assert_frame_equal(cluster[1].client.get(name="x"), frame)
    pd.testing.assert_frame_equal(pd.read_feather(fresh / "x.arrow"), frame)
    (fresh / "x.arrow").unlink()
    settled(cluster[1].usage, 0)
    assert unnoticed(cluster[1]) == []


def test_copies_that_nobody_asked_for_make_way(tmp_path):
    """With `--migrate full` a store fills with copies: a save takes their room, and not that of those that are pinned."""
    frame = numbers(2_000_000, 4)
    cluster = Cluster(tmp_path, memory="256Mi")
    try:
        for name in ["pinned", "opened", "read"]:
            cluster[0].put(name, frame)
        there = cluster.mount(1, "--migrate", "full")

        def copies(name):
            return told(cluster[1], "info", name).get("copies")

        for name in ["opened", "pinned", "read"]:
            pd.testing.assert_frame_equal(pd.read_feather(there / f"{name}.arrow"), frame)
            until(lambda: copies(name))
        # Somebody asks for what is here already.
        assert "is on instance i1 already" in cli("pin", "pinned", "--socket", cluster[1].socket).stdout
        assert [len(copies(name)) for name in ["opened", "pinned", "read"]] == [1, 1, 1]
        reader = open(there / "read.arrow", "rb", buffering=0)
        first = reader.read(1000)
        # 240 MB of 268 are taken.
        frame.to_feather(there / "saved.arrow", compression="uncompressed")
        assert [bool(copies(name)) for name in ["opened", "pinned", "read"]] == [False, True, True], "the oldest goes"
        (numbers(2_000_000, 4) + 1).to_feather(there / "more.arrow", compression="uncompressed")
        assert [bool(copies(name)) for name in ["opened", "pinned", "read"]] == [False, True, False]
        reader.seek(0)
        data = b"".join(iter(lambda: reader.read(1 << 20), b""))
        reader.close()
        assert data[:1000] == first and data == (there / "read.arrow").read_bytes(), "whoever read it goes on"
        for name in ["opened", "pinned", "read", "saved"]:
            pd.testing.assert_frame_equal(pd.read_feather(there / f"{name}.arrow"), frame)
        with pytest.raises(OSError) as caught:
            frame.to_feather(there / "most.arrow", compression="uncompressed")
        assert caught.value.errno == errno.ENOSPC and copies("pinned")
        (there / "most.arrow").unlink()
        (there / "more.arrow").unlink()
        # One that is asked for takes the room of one that came of itself again.
        another = cluster.mount(1, "--migrate", "full")
        pd.testing.assert_frame_equal(pd.read_feather(another / "opened.arrow"), frame)
        until(lambda: copies("opened"), another.log.read_text)
        cli("pin", "read", "--socket", cluster[1].socket)
        assert [bool(copies(name)) for name in ["opened", "pinned", "read"]] == [False, True, True]
        # A copy that becomes the dataset is none any more, whoever had asked for it.
        cli("pin", "--drop", "read", "--socket", cluster[1].socket)
        pd.testing.assert_frame_equal(pd.read_feather(cluster.mount(1, "--migrate", "full") / "opened.arrow"), frame)
        until(lambda: copies("opened"))
        cli("migrate", "opened", "--socket", cluster[1].socket)
        assert "already" in cli("pin", "opened", "--socket", cluster[1].socket).stdout
        assert not copies("opened") and told(cluster[1], "gc", "--dry-run") == []
        # What is pinned lives on without its original.
        cluster[0].kill()
        pd.testing.assert_frame_equal(pd.read_feather(cluster.mount(1, "--deadline", "5s") / "pinned.arrow"), frame)
    finally:
        cluster.stop()


def test_a_reader_goes_on_with_a_copy_elsewhere(three):
    values = np.arange(8_000_000, dtype="float64")
    three[0].put("x", values)
    cli("pin", "x", "--socket", three[2].socket)
    reader = three.mount(1, "--deadline", "5s", "--serve", "lazy")
    with open(reader / "x.npy", "rb", buffering=0) as opened:
        opened.read(100)
        three[0].kill()
        opened.seek(0)
        data = b"".join(iter(lambda: opened.read(1 << 20), b""))
    assert np.array_equal(np.frombuffer(data[128:]), values)
    assert "goes on with a copy" in reader.log.read_text()


def test_gc_removes_what_is_dead_and_nothing_else(cluster):
    frame = numbers(50_000, 2)
    for name in ["alive", "deleted", "forgotten"]:
        cluster[0].put(name, frame)
    cli("pin", "alive", "forgotten", "--socket", cluster[1].socket)
    client = cluster[0].client
    client.delete(client.get_name("deleted"))
    client.delete(client.get_name("forgotten"))
    client.drop_name("forgotten")
    listed = cli("ls", "-l", "--socket", cluster[1].socket).stdout
    assert "dangling" in next(line for line in listed.splitlines() if "deleted" in line)
    states = {entry["name"]: entry["state"] for entry in told(cluster[1], "ls")}
    assert states == {"alive": "ok", "deleted": "dangling"}
    used = cluster[1].usage()
    found = told(cluster[1], "gc", "--dry-run")
    assert sorted(entry["kind"] for entry in found) == ["dangling", "needless"]
    assert cluster[1].usage() == used and "deleted" in client.list_names("*", limit=100)
    assert "removed the name \"deleted\"" in cli("gc", "--socket", cluster[1].socket).stdout
    assert client.list_names("[a-z]*", limit=100).keys() == {"alive"}
    assert cluster[1].usage() < used * 0.6, "the copy of what was forgotten went"
    assert "nothing to clean up" in cli("gc", "--socket", cluster[0].socket).stdout
    assert told(cluster[0], "info", "alive")["copies"]
    assert "removed the copy" in cli("pin", "--drop", "alive", "--socket", cluster[1].socket).stdout
    assert cluster[1].usage() == 0


def test_an_instance_that_ended_leaves_names_that_gc_finds(cluster):
    cluster[0].put("theirs", numbers(1000, 2))
    cluster[1].put("mine", numbers(1000, 2))
    cluster[0].kill()
    # An instance that does not answer proves nothing.
    assert told(cluster[1], "gc", "--dry-run") == []
    listed = until(lambda: [e for e in told(cluster[1], "ls") if e["state"] == "dangling"], seconds=240)
    assert [entry["name"] for entry in listed] == ["theirs"]
    assert [entry["name"] for entry in told(cluster[1], "gc")] == ["theirs"]
    # A vineyardd at the same place is another instance.
    cluster[0].start()
    cluster[0].put("theirs", numbers(10, 1))
    there = cluster.mount(1)
    assert sorted(os.listdir(there.path)) == ["mine.arrow", "theirs.arrow"]
    assert len(pd.read_feather(there / "theirs.arrow")) == 10


def test_files_that_died_with_their_instance_are_not_listed_as_fine(cluster):
    there = cluster.mount(0)
    for name in ["lost.txt", "kept.txt"]:
        (there / name).write_bytes(b"what a file holds" * 1000)
    cli("pin", "kept.txt", "--socket", cluster[1].socket)
    cluster[1].put("mine", numbers(1000, 2))
    expected = {"lost.txt": "dangling", "kept.txt": "ok", "mine": "ok"}
    assert {entry["name"]: entry["state"] for entry in told(cluster[1], "ls")} == dict.fromkeys(expected, "ok")
    cluster[0].kill()
    until(lambda: {entry["name"]: entry["state"] for entry in told(cluster[1], "ls")} == expected, seconds=240)
    assert (cluster.mount(1) / "kept.txt").read_bytes() == b"what a file holds" * 1000


def test_a_server_that_is_killed_in_a_save_leaves_nothing(store, make_mount):
    import random
    import signal
    import threading

    mount = make_mount()
    frame = numbers(2_000_000, 4)
    chance = random.Random(1)
    for turn in range(8):

        def save():
            try:
                frame.to_feather(mount / f"x{turn}.arrow", compression="uncompressed")
            except OSError:
                pass

        saver = threading.Thread(target=save)
        before, pid = store.usage(), mount.status()["server"]["pid"]
        saver.start()
        # In the middle of publishing: the store has blobs of it.
        until(lambda: store.usage() > before or not saver.is_alive())
        time.sleep(chance.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        mount.expected_restarts += 1
        saver.join(120)
        assert not saver.is_alive()
        if (mount / f"x{turn}.arrow").exists():
            pd.testing.assert_frame_equal(pd.read_feather(mount / f"x{turn}.arrow"), frame)
            (mount / f"x{turn}.arrow").unlink()
        settled(lambda: store.usage() - mount.told_left_over(), 0)
