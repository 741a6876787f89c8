"""Files of several writers, renames that fail, and room in the staging area."""

import errno
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import Store, settled, until

APPENDS = """
import os, sys
for i in range(150):
    fd = os.open(sys.argv[1], os.O_APPEND | eval(sys.argv[3]))
    os.write(fd, f"{sys.argv[2]} {i}\\n".encode())
    os.close(fd)
"""


@pytest.mark.parametrize("flags", ["os.O_WRONLY", "os.O_WRONLY | os.O_CREAT", "os.O_RDWR"])
def test_many_processes_append_to_one_file(make_mount, serving, flags):
    """Each opens it anew for every line: none gets an error, and no line is lost."""
    mount = make_mount(*serving)
    path = mount / "log.txt"
    path.write_text("first\n")
    assert path.read_text() == "first\n"
    writers = [subprocess.Popen([sys.executable, "-c", APPENDS, path, str(k), flags]) for k in range(4)]
    assert [writer.wait(timeout=240) for writer in writers] == [0] * 4
    lines = path.read_text().splitlines()
    assert sorted(lines) == sorted(["first"] + [f"{k} {i}" for k in range(4) for i in range(150)])
    for k in range(4):
        assert [line for line in lines if line.startswith(f"{k} ")] == [f"{k} {i}" for i in range(150)], "in order"
    second = make_mount(name="second")
    assert (second / "log.txt").read_text().splitlines() == lines


def change_appended(path):
    with path.open("a") as file:
        file.write("b")


def change_in_place(path):
    with path.open("r+") as file:
        file.write("b")


def change_touched(path):
    subprocess.run(["touch", path], check=True)


@pytest.mark.parametrize("change", [change_appended, change_in_place, change_touched])
def test_programs_find_the_file_that_stat_showed_after_a_change(make_mount, serving, tmp_path, change):
    """`cp` and `mv` look at a file, open it, and refuse it if it is another one by then."""
    mount = make_mount(*serving)
    path = mount / "f.txt"
    path.write_text("a")
    for round in range(3):
        change(path)
        expected = path.read_bytes() if round == 2 else None
        copy = tmp_path / f"copy{round}"
        subprocess.run(["cp", path, copy], check=True)
        assert copy.read_bytes() == (path.read_bytes() if expected is None else expected)
    change(path)
    expected = path.read_bytes()
    change(path)
    subprocess.run(["mv", path, tmp_path / "moved"], check=True)
    assert not path.exists()
    assert (tmp_path / "moved").read_bytes() == {"change_appended": expected + b"b"}.get(change.__name__, expected)


def test_a_directory_made_again_works_while_the_removed_one_is_held(mount):
    (mount / "d").mkdir()
    for _ in range(3):
        held = os.open(mount / "d", os.O_RDONLY | os.O_DIRECTORY)
        (mount / "d").rmdir()
        (mount / "d").mkdir()
        (mount / "d/f.txt").write_text("f")
        (mount / "d/sub").mkdir()
        assert sorted(os.listdir(mount / "d")) == ["f.txt", "sub"]
        assert (mount / "d/f.txt").read_text() == "f"
        os.close(held)
        assert (mount / "d/f.txt").read_text() == "f"
        shutil.rmtree(mount / "d")
        (mount / "d").mkdir()


def test_a_removed_directory_that_another_client_makes_again_works_while_it_is_held(make_mount):
    mount, other = make_mount(), make_mount(name="other")
    (mount / "d").mkdir()
    held = os.open(mount / "d", os.O_RDONLY | os.O_DIRECTORY)
    (mount / "d").rmdir()
    (other / "d").mkdir()
    (other / "d/x.txt").write_text("x")
    until(lambda: os.path.exists(mount / "d/x.txt"))
    (mount / "d/y.txt").write_text("y")
    assert sorted(os.listdir(mount / "d")) == ["x.txt", "y.txt"]
    os.close(held)


@pytest.mark.parametrize("end", ["unlink", "replace", "rename"])
@pytest.mark.parametrize("first_closes", ["before", "after"])
def test_two_writers_of_one_path_end_with_it(mount, end, first_closes):
    """Each truncated the file and works on its own; what becomes of the path becomes of both."""
    path = mount / "x.txt"
    path.write_text("old")
    first = subprocess.Popen(["sh", "-c", 'exec >"$0"; echo first; read go', path], stdin=subprocess.PIPE)
    until(lambda: os.path.getsize(path) == 6 or open(path).read() in ("old", "first\n"))
    until(lambda: os.readlink(f"/proc/{first.pid}/fd/1").startswith(str(path)))
    with path.open("w") as second:
        second.write("second")
    if first_closes == "before":
        first.communicate(b"go\n")
    if end == "unlink":
        path.unlink()
    elif end == "replace":
        (mount / "new.txt").write_text("new")
        (mount / "new.txt").rename(path)
    else:
        path.rename(mount / "y.txt")
    if first_closes == "after":
        first.communicate(b"go\n")
    second_look = [os.path.exists(path) and path.read_text() for _ in range(2)][1]
    assert second_look == {"unlink": False, "replace": "new", "rename": False}[end]
    if end == "rename":
        assert (mount / "y.txt").read_text() in ("second", "first\n")


def test_what_a_new_file_replaced_does_not_come_back(mount):
    for name in ("k.bin", "k.txt"):
        (mount / name).write_text("old")
        file = open(mount / "new.bin", "w")
        file.write("new")
        os.rename(mount / "new.bin", mount / name)
        (mount / name).unlink()
        assert not (mount / name).exists()
        file.close()
        assert not (mount / name).exists()


def test_a_second_writer_joins_the_first_also_after_fsync_and_a_reader(mount):
    path = mount / "log.txt"
    with open(path, "ab", buffering=0) as first:
        first.write(b"A")
        assert subprocess.run(["cat", path], capture_output=True, check=True).stdout == b"A"
        os.fsync(first)
        assert subprocess.run(["cat", path], capture_output=True, check=True).stdout == b"A"
        for _ in range(2):
            subprocess.run(["sh", "-c", f"printf B >> {path}"], check=True)
            first.write(b"A")
    assert path.read_bytes() == b"ABABA"


READS = """
import os, sys
for line in sys.stdin:
    path = line.rstrip()
    print(len(open(path).read()), os.stat(path).st_size, flush=True)
"""


def test_who_closed_a_file_sees_it_by_its_path_also_after_others_read_the_version_before(make_mount, serving):
    mount = make_mount(*serving)
    path = mount / "f.txt"
    path.write_bytes(b"before")
    # Begun before: a child that inherits the descriptor, and closes it, publishes the file.
    reader = subprocess.Popen([sys.executable, "-c", READS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        for number in range(5):
            before, size = path.stat().st_size, 10 * (number + 2)
            with open(path, "wb") as file:
                file.write(b"after that" * (number + 2))
                file.flush()
                print(path, file=reader.stdin, flush=True)
                assert reader.stdout.readline().split()[0] == str(before), "others read what is published"
            assert path.stat().st_size == size
            assert path.read_bytes() == b"after that" * (number + 2)
            print(path, file=reader.stdin, flush=True)
            assert reader.stdout.readline().split() == [str(size)] * 2
    finally:
        reader.stdin.close()
        assert reader.wait(30) == 0


@pytest.fixture
def small(folder, make_mount):
    """A store of 96 MiB, and a mount of it."""
    (folder / "small").mkdir()
    store = Store(folder / "small", "96Mi")
    mount = make_mount(over=store)
    yield store, mount
    mount.unmount()
    store.stop()


def fill(store):
    """Leaves 8 MiB of a store."""
    status = store.client.status
    return store.client.put(np.zeros((status.memory_limit - status.memory_usage - (8 << 20)) // 8))


def table(value, rows):
    return pd.DataFrame({"a": np.full(rows, value)})


@pytest.mark.parametrize("name", ["f.bin", "x.arrow"])
def test_a_file_that_cannot_be_made_longer_is_as_long_as_before(small, name):
    store, mount = small
    path = mount / name
    if name == "x.arrow":
        table(1.0, 1000).to_feather(path)
    else:
        path.write_bytes(b"what it holds" * 1000)
    held = path.read_bytes()
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            os.truncate(path, 200 << 20)
        assert caught.value.errno == errno.ENOSPC
        assert path.stat().st_size == len(held) and path.read_bytes() == held
    os.truncate(path, 10)
    assert path.read_bytes() == held[:10]
    path.unlink()
    settled(store.usage, 0)


def test_a_rename_to_another_view_keeps_what_could_not_be_published_before(small):
    store, mount = small
    table(1, 10).to_feather(mount / "r.arrow", compression="uncompressed")
    rest = fill(store)
    with pytest.raises(OSError, match="No space"):
        table(2, 3_000_000).to_feather(mount / "r.arrow", compression="uncompressed")
    store.client.delete(rest)
    os.rename(mount / "r.arrow", mount / "r.feather")
    assert pd.read_feather(mount / "r.feather")["a"].tolist() == [2] * 3_000_000
    assert (store.client.get(name="r")["a"] == 2).all()
    assert os.listdir(mount.path) == ["r.feather"]


def test_a_rename_that_cannot_publish_leaves_both_files_alone(small):
    store, mount = small
    (mount / "b.txt").write_text("precious")
    assert subprocess.run(["cat", mount / "b.txt"], capture_output=True, check=True).stdout == b"precious"
    (mount / "a.txt").write_text("v1")
    with open(mount / "a.txt", "ab", buffering=0) as file:
        for _ in range(120):
            file.write(b"x" * (1 << 20))
        with pytest.raises(OSError, match="No space"):
            os.fsync(file)
        with pytest.raises(OSError, match="No space"):
            file.close()
    with pytest.raises(OSError, match="No space"):
        os.rename(mount / "a.txt", mount / "b.txt")
    assert (mount / "b.txt").read_text() == "precious"
    assert (mount / "a.txt").stat().st_size == 2 + (120 << 20)
    with open(mount / "a.txt", "r+b") as file:
        file.truncate(5)
    os.rename(mount / "a.txt", mount / "b.txt")
    assert (mount / "b.txt").read_text() == "v1xxx" and os.listdir(mount.path) == ["b.txt"]


def test_what_was_published_does_not_use_up_the_staging_area(make_mount):
    """Neither its bytes nor its descriptors, although the kernel still knows the files."""
    mount = make_mount("--staging-size", "64Mi")
    piece = bytes(range(256)) * 4096
    for number in range(30):
        with open(mount / f"f{number}.bin", "wb") as file:
            for _ in range(8):
                file.write(piece)
    for number in range(30):
        assert (mount / f"f{number}.bin").read_bytes() == piece * 8
    for number in range(5500):
        (mount / f"small{number}.txt").write_text(str(number))
    until(lambda: mount.status()["files"]["staging"]["count"] <= 4200)
    assert all((mount / f"small{number}.txt").read_text() == str(number) for number in range(0, 5500, 50))


def test_a_sparse_file_that_has_no_room_is_an_error_and_not_the_end(make_mount):
    mount = make_mount("--staging-size", "64Mi")
    for size, number in [(150 << 20, errno.ENOSPC), (1 << 40, errno.ENOSPC)]:
        descriptor = os.open(mount / "sparse.bin", os.O_WRONLY | os.O_CREAT)
        os.ftruncate(descriptor, size)
        with pytest.raises(OSError) as caught:
            os.close(descriptor)
        assert caught.value.errno == number
        (mount / "sparse.bin").unlink()
    with open(mount / "sparse.bin", "wb") as file:
        file.truncate(20 << 20)
        file.seek(10 << 20)
        file.write(b"middle")
    assert (mount / "sparse.bin").read_bytes() == bytes(10 << 20) + b"middle" + bytes((10 << 20) - 6)
    assert mount.status()["server"]["restarts"] == 0


def test_a_partitioned_table_has_the_values_that_were_saved(mount, make_mount, tmp_path):
    """Hive's names of directories hold escapes of their own, which read like the mount's."""
    values = ["a/b", "%41", "50%", "50%25", "100%", "..", "plain"]
    frame = pd.DataFrame({"k": values, "v": range(len(values))})
    for folder in (tmp_path / "table", mount / "table"):
        frame.to_parquet(folder, partition_cols=["k"])
    assert sorted(os.listdir(mount / "table")) == sorted(os.listdir(tmp_path / "table"))
    for folder in (mount / "table", make_mount(name="second") / "table"):
        back = pd.read_parquet(folder)
        assert dict(zip(back["k"].astype(str), back["v"])) == dict(zip(values, range(len(values))))


ODD = ["50%25", "50%", "a%2Fb", "a%252Fb", "x%00y", "%2E", "%2e", "%252E", "%2Fx", "%252Fx", "q%~0123456789abcdef", "%41"]


def test_files_and_directories_are_called_what_programs_call_them(store, mount, make_mount, tmp_path):
    """Also where they read like names that no file can have."""
    source = tmp_path / "source"
    for name in ODD:
        (source / "folders" / name).mkdir(parents=True)
        (source / "folders" / name / f"{name}.csv").write_text(name)
        (source / name).write_text(name)
    subprocess.run(["cp", "-r", source, mount / "copy"], check=True)
    for name in ODD:
        (mount / name).write_text(name)
        (mount / f"d{name}").mkdir()
        assert name in os.listdir(mount.path) and f"d{name}" in os.listdir(mount.path)
    assert sorted(os.listdir(mount.path)) == sorted([*ODD, *(f"d{name}" for name in ODD), "copy"])
    for name in ODD:
        (mount / f"d{name}").rmdir()
    for each in (mount, make_mount(name="second")):
        subprocess.run(["diff", "-r", source, each / "copy"], check=True)
        assert sorted(os.listdir(each.path)) == sorted([*ODD, "copy"])
        assert [(each / name).read_text() for name in ODD] == ODD
        with subprocess.Popen(["tar", "-C", each / "copy", "-c", "."], stdout=subprocess.PIPE) as tar:
            text = subprocess.check_output(["tar", "-t"], stdin=tar.stdout, text=True)
        assert len(text.splitlines()) == 2 + 3 * len(ODD)
    shutil.rmtree(mount / "copy")
    for name in ODD:
        (mount / name).unlink()
    assert os.listdir(mount.path) == [] and store.client.list_names("*", limit=100) == {}
