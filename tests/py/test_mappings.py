"""Shared mappings that go on after the last descriptor of their file is closed."""

import os
import time

import numpy as np
import pandas as pd
import pytest
from conftest import cli, settled, until
from maps import mapped


def first_value(store):
    """In the store; None if the dataset was replaced between the official client's two requests, for metadata and for blobs."""
    try:
        return store.connect().get(name="x")["a"][0]
    except RuntimeError as error:
        if "local blob found but it is nullptr" in str(error.__cause__.__cause__ if error.__cause__ else error):
            return None
        raise


FIRST = {"a writer": os.O_WRONLY, "a reader": os.O_RDONLY, "its like": os.O_RDWR}
every_first = pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)


@every_first
def test_what_is_stored_after_the_last_close_is_kept(make_mount, serving, first):
    mount = make_mount(*serving)
    path = mount / "f.bin"
    path.write_bytes(bytes(8192))
    with mapped(path, first) as memory:
        memory[5000:5004] = b"late"
        memory.end()
        expected = bytes(5000) + b"late" + bytes(3188)
        # Whoever writes it sees it at once; others do when the mapping is gone.
        second = make_mount(name="second")
        until(lambda: (second / "f.bin").read_bytes() == path.read_bytes() == expected)


@every_first
def test_a_table_that_is_changed_through_a_mapping(store, make_mount, serving, first):
    """The store has the values that were there at the close, then those that were there when the mapping ended."""
    mount = make_mount(*serving)
    frame = pd.DataFrame({"a": np.arange(2000.0)})
    path = mount / "x.arrow"
    frame.to_feather(path, compression="uncompressed")
    at = path.read_bytes().index(frame["a"].to_numpy().tobytes())
    with mapped(path, first) as memory:
        for number in range(3):
            memory[at : at + 8] = np.float64(100 + number).tobytes()
            # Nobody reads it half changed: neither here nor from the store.
            seen = pd.read_feather(path)["a"]
            assert seen[0] in [0, *range(100, 101 + number)] and seen[1:].equals(frame["a"][1:])
        memory.end()
        until(lambda: first_value(store) == 102)
    assert pd.read_feather(path)["a"].to_list() == [102.0, *range(1, 2000)]
    assert pd.read_parquet(mount / "x.parquet")["a"].to_list() == [102.0, *range(1, 2000)]
    path.unlink()
    settled(store.usage, 0)


def test_a_mapping_outlives_servers(make_mount):
    mount = make_mount()
    path = mount / "f.bin"
    path.write_bytes(bytes(8192))
    with mapped(path, os.O_WRONLY) as memory:
        memory[1:5] = b"once"
        mount.next_server(mount.kill_server())
        memory[5000:5004] = b"late"
        assert path.read_bytes()[5000:5004] in (bytes(4), b"late")
        mount.next_server(mount.kill_server())
        memory.end()
        second, expected = make_mount(name="second"), b"\0once" + bytes(4995) + b"late" + bytes(3188)
        until(lambda: (second / "f.bin").read_bytes() == path.read_bytes() == expected)


def test_a_mapping_and_the_end_of_the_mount(make_mount):
    mount = make_mount()
    (mount / "f.bin").write_bytes(bytes(8192))
    with mapped(mount / "f.bin", os.O_WRONLY) as memory:
        memory[5000:5004] = b"late"
        assert "is in use" in cli("unmount", mount.path, check=False).stderr
        memory[0:4] = b"last"
        memory.end()
        # At once: before the mount has looked whether it has ended.
        cli("unmount", mount.path)
    content = (make_mount(name="second") / "f.bin").read_bytes()
    assert content == b"last" + bytes(4996) + b"late" + bytes(3188)


@pytest.mark.parametrize("end", ["unlink", "replace", "rename over"])
def test_what_a_mapping_stores_in_a_file_that_went_does_not_come_back(store, make_mount, end):
    mount = make_mount()
    path = mount / "f.bin"
    path.write_bytes(bytes(8192))
    with mapped(path, os.O_WRONLY) as memory:
        memory[0:4] = b"late"
        match end:
            case "unlink":
                path.unlink()
            case "replace":
                (mount / "other").write_bytes(b"other")
                os.replace(mount / "other", path)
            case "rename over":
                (mount / "other.txt").write_bytes(b"other")
                os.rename(mount / "other.txt", path)
        memory[4:8] = b"late"
        memory.end()
    for _ in range(20):
        assert (path.read_bytes() if path.exists() else None) == (None if end == "unlink" else b"other")
        time.sleep(0.05)
    second = make_mount(name="second")
    assert os.listdir(second.path) == ([] if end == "unlink" else ["f.bin"])
    if end == "unlink":
        settled(store.usage, 0)
