"""What goes wrong in a cluster: each ends with an error in time or with the right bytes, and is over when its cause is."""

import errno
import os
import signal
import threading
import time

import numpy as np
import pandas as pd
import pytest
from cluster import Cluster, Link, eventually, numbers, outcome
from conftest import cli, freeze, settled

# What a program may see of data that cannot be had.
LOST = {errno.EHOSTUNREACH, errno.ESTALE, errno.EIO, errno.ENOENT}
DEADLINE = ["--deadline", "5s"]


def has_links() -> bool:
    try:
        Link().remove()
        return True
    except Exception:
        return False


needs_links = pytest.mark.skipif(not has_links(), reason="needs root, network namespaces and virtual Ethernet")


@pytest.fixture
def linked(folder):
    cluster = Cluster(folder, 2, linked=True)
    yield cluster
    cluster.stop()


@needs_links
def test_dropped_packets(linked):
    frame, mine = numbers(400_000, 4), numbers(100, 2)
    linked[0].put("theirs", frame)
    linked[0].put("other", frame)
    linked[1].put("mine", mine)
    there = linked.mount(1, *DEADLINE)
    os.stat(there / "theirs.arrow")
    linked.link.drop_packets()
    started = time.monotonic()
    assert outcome(lambda: (there / "theirs.arrow").read_bytes()) in LOST
    assert outcome(lambda: (there / "other.arrow").read_bytes()) in LOST
    assert time.monotonic() - started < 40
    pd.testing.assert_frame_equal(pd.read_feather(there / "mine.arrow"), mine)
    log = there.log.read_text()
    assert "instance i0" in log and linked.link.there in log
    linked.link.deliver_packets()
    assert len(eventually(lambda: (there / "theirs.arrow").read_bytes())) > frame.size * 8
    pd.testing.assert_frame_equal(pd.read_feather(there / "other.arrow"), frame)


@needs_links
@pytest.mark.parametrize("how", ["killed", "frozen", "filtered"])
def test_the_owner_is_lost_while_bytes_travel(linked, how):
    linked.link.shape(200)
    linked[0].put("x", np.arange(10_000_000, dtype="float64"))
    there = linked.mount(1, *DEADLINE)
    with open(there / "x.npy", "rb", buffering=0) as opened:
        got = opened.read(1 << 20)
        assert len(got) == 1 << 20
        if how == "killed":
            linked[0].kill()
        elif how == "frozen":
            freeze(linked[0].process.pid)
        else:
            linked.link.drop_packets()

        def rest():
            data = bytearray(got)
            while part := opened.read(1 << 20):
                data += part
            return data

        result = outcome(rest)
        assert result in LOST, f"{len(result)} bytes" if not isinstance(result, int) else errno.errorcode[result]
        if how == "frozen":
            linked[0].process.send_signal(signal.SIGCONT)
        elif how == "filtered":
            linked.link.deliver_packets()
        if how != "killed":
            whole = eventually(lambda: (there / "x.npy").read_bytes())
            assert np.array_equal(np.frombuffer(whole[128:]), np.arange(10_000_000, dtype="float64"))
    assert "instance i0" in there.log.read_text()
    assert cli("status", there.path, timeout=30).returncode == 0


def test_an_instance_starts_again_under_a_new_number(cluster):
    frame = numbers(100_000, 2)
    cluster[0].put("x", frame)
    there = cluster.mount(1, *DEADLINE)
    with open(there / "x.arrow", "rb") as file:
        file.read(1000)
    former = cluster[0].id
    cluster[0].kill()
    cluster[0].start()
    assert cluster[0].id != former
    there_again = cluster.mount(1, *DEADLINE)
    assert outcome(lambda: (there_again / "x.arrow").read_bytes()) in LOST
    second = numbers(100_000, 2, 2)
    cluster[0].put("x", second)
    pd.testing.assert_frame_equal(pd.read_feather(there_again / "x.arrow"), second)
    pd.testing.assert_frame_equal(pd.read_feather(there / "x.arrow"), second)


def test_the_own_instance_starts_again(cluster):
    frame = numbers(100_000, 2)
    cluster[0].put("theirs", frame)
    cluster[1].put("mine", frame)
    there = cluster.mount(1, *DEADLINE)
    pd.testing.assert_frame_equal(pd.read_feather(there / "mine.arrow"), frame)
    cluster[1].kill()
    assert outcome(lambda: (there / "theirs.arrow").read_bytes()) in LOST
    cluster[1].start()
    assert len(eventually(lambda: (there / "theirs.arrow").read_bytes())) > frame.size * 8
    frame.to_feather(there / "new.arrow")
    pd.testing.assert_frame_equal(cluster[0].client.get(name="theirs"), frame)
    pd.testing.assert_frame_equal(pd.read_feather(cluster.mount(0) / "new.arrow"), frame)


@pytest.mark.parametrize("how", ["frozen", "restarted"])
def test_etcd_is_away_for_a_while(cluster, how):
    frame = numbers(100_000, 2)
    cluster[0].put("theirs", frame)
    cluster[1].put("mine", frame)
    there = cluster.mount(1, *DEADLINE)
    pd.testing.assert_frame_equal(pd.read_feather(there / "mine.arrow"), frame)
    with open(there / "mine.arrow", "rb", buffering=0) as opened:
        before = opened.read(1 << 20)
        if how == "frozen":
            freeze(cluster.etcd.process.pid)
        else:
            cluster.etcd.stop()
        opened.seek(0)
        assert outcome(lambda: opened.read(1 << 20)) == before, "an open file needs no etcd"
        for action in [
            lambda: (there / "theirs.arrow").read_bytes(),
            lambda: (there / "mine.arrow").read_bytes(),
            lambda: os.listdir(there.path),
            lambda: frame.to_feather(there / "new.arrow"),
        ]:
            outcome(action, 90)
        assert cli("status", there.path, timeout=30).returncode == 0
        if how == "frozen":
            cluster.etcd.process.send_signal(signal.SIGCONT)
        else:
            cluster.etcd.start()

    def save():
        frame.to_feather(there / "later.arrow")
        return pd.read_feather(there / "later.arrow")

    pd.testing.assert_frame_equal(eventually(save), frame)
    assert len(eventually(lambda: (there / "mine.arrow").read_bytes())) > frame.size * 8
    assert len(eventually(lambda: (there / "theirs.arrow").read_bytes())) > frame.size * 8


def test_etcd_loses_its_data(cluster):
    import shutil

    frame = numbers(10_000, 2)
    cluster[1].put("mine", frame)
    there = cluster.mount(1, *DEADLINE)
    pd.testing.assert_frame_equal(pd.read_feather(there / "mine.arrow"), frame)
    cluster.etcd.stop()
    shutil.rmtree(cluster.folder / "etcd")
    cluster.etcd.start()
    # What vineyardd makes of it is its own affair; nothing hangs, and nothing is made up.
    result = outcome(lambda: (there / "mine.arrow").read_bytes(), 90)
    assert result in LOST or len(result) > frame.size * 8
    outcome(lambda: os.listdir(there.path), 90)
    outcome(lambda: frame.to_feather(there / "new.arrow"), 90)
    assert cli("status", there.path, timeout=30).returncode == 0
    # After all have started anew, so does the mount.
    for instance in cluster.instances:
        instance.kill()
    for instance in cluster.instances:
        instance.start()

    def save():
        frame.to_feather(there / "later.arrow")
        return pd.read_feather(there / "later.arrow")

    pd.testing.assert_frame_equal(eventually(save), frame)


def test_a_changed_name_is_seen_at_once(cluster):
    here, there = cluster.mount(0), cluster.mount(1)
    for version in range(20):
        writer, reader = [(here, there), (there, here)][version % 2]
        frame = pd.DataFrame({"v": np.full(1000, version)})
        frame.to_feather(writer / "x.arrow")
        assert pd.read_feather(reader / "x.arrow")["v"].unique().tolist() == [version]
    os.rename(here / "x.arrow", here / "y.arrow")
    assert pd.read_feather(there / "y.arrow")["v"].unique().tolist() == [19]
    with pytest.raises(FileNotFoundError):
        (there / "x.arrow").read_bytes()


def test_saves_of_one_name_at_once_leave_one_whole_dataset(cluster):
    mounts = [cluster.mount(0), cluster.mount(1), cluster.mount(0)]
    rows = 20_000

    def save(mount, number):
        for turn in range(10):
            value = number * 100 + turn
            pd.DataFrame({c: np.full(rows, value) for c in "ab"}).to_feather(mount / "x.arrow")

    threads = [threading.Thread(target=save, args=(mount, number)) for number, mount in enumerate(mounts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(1.1)
    found = [pd.read_feather(mount / "x.arrow") for mount in mounts]
    values = {value for frame in found for column in "ab" for value in frame[column].unique()}
    assert len(values) == 1 and all(len(frame) == rows for frame in found)
    names = cluster[0].client.list_names("*", limit=1000)
    assert list(names) == ["x"], "nothing is announced any more"
    used = sum(instance.usage() for instance in cluster.instances)
    assert rows * 8 * 2 <= used < rows * 8 * 3, f"{used} bytes for one dataset of {rows * 16}"
    (mounts[0] / "x.arrow").unlink()
    settled(lambda: [instance.usage() for instance in cluster.instances], [0, 0])
