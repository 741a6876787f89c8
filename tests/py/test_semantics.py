"""Checks each row of the README's table of semantics. A row without a check, or a check without a row, fails."""

import ctypes
import errno
import fcntl
import json
import mmap
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest

from conftest import PROJECT, Mount, cli, settled, until
from maps import mapped

LIBC = ctypes.CDLL(None, use_errno=True)
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


def rows() -> dict[str, str]:
    text = (PROJECT / "README.md").read_text()
    section = text.split("\n## Semantics\n", 1)[1].split("\n## ", 1)[0]
    found = re.findall(r"^\| (?!operation|---)(.+?) \| (.+?) \|$", section, re.M)
    assert len(found) == len(dict(found)) > 10
    return dict(found)


CHECKS = {}


def check(row):
    def register(function):
        CHECKS[row] = function
        return function

    return register


def frame(value, rows=1000):
    return pd.DataFrame({"a": np.full(rows, value, dtype="int64"), "s": ["text"] * rows})


def save(path, value):
    frame(value).to_feather(path, compression="uncompressed")


def value(path):
    read = pd.read_feather(path)
    assert read["a"].nunique() == 1
    return int(read["a"].iloc[0])


def refused(number, function, *arguments):
    with pytest.raises(OSError) as info:
        function(*arguments)
    assert info.value.errno == number, errno.errorcode.get(info.value.errno)


def rename(old, new, flags):
    if LIBC.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@check("read while a dataset is replaced")
def _(m):
    save(m / "x.arrow", 1)
    with open(m / "x.arrow", "rb") as reader:
        head = reader.read(100)
        save(m / "x.arrow", 2)
        rest = reader.read()
    assert value(m / "x.arrow") == 2
    (m / "old.arrow").write_bytes(head + rest)
    assert value(m / "old.arrow") == 1
    client = m.store.client
    for name, length in [("small", 100), ("large", 500_000)]:
        m.store.put(name, np.full(length, 1.0))
        with open(m / f"{name}.npy", "rb", buffering=0) as reader:
            reader.read(128)
            former = client.get_name(name)
            m.store.put(name, np.full(length, 2.0))
            client.delete(former)
            try:
                rest = reader.readall()
            except OSError as error:
                assert name == "large" and error.errno == errno.ESTALE
            else:
                assert (np.frombuffer(rest) == 1.0).all() and len(rest) == 8 * length
        assert (np.load(m / f"{name}.npy") == 2.0).all()


@check("read while the server is killed or upgraded")
def _(m):
    for name, size in [("small", 100), ("large", 100_000)]:
        m.store.put(name, np.arange(float(size)))
    first = {name: open(m / f"{name}.npy", "rb") for name in ["small", "large"]}
    maps = {name: mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) for name, file in first.items()}
    m.upgrade()
    for name, file in first.items():
        with open(m / f"{name}.npy", "rb") as again:
            expected = again.read()
        save(m / f"{name}.npy", 1)
        os.unlink(m / f"{name}.npy")
        m.kill_server()
        assert file.read() == expected and maps[name][:] == expected
        file.close()
        maps[name].close()


@check("read of a deleted dataset (by another client)")
def _(m):
    array = np.full(500_000, 7.0)
    m.store.put("gone", array)
    with open(m / "gone.npy", "rb") as reader:
        reader.read(4096)
        client = m.store.client
        client.delete(client.get_name("gone"))
        client.drop_name("gone")
        m.store.put("other", np.full(500_000, -1.0))
        if m.status()["fs"]["serve"] == "lazy":
            refused(errno.ESTALE, reader.read)
        else:
            assert (np.frombuffer(reader.read()[-8 * 400_000 :]) == 7.0).all()


@check("open for writing with truncation")
def _(m):
    save(m / "x.arrow", 1)
    with open(m / "x.arrow", "rb") as reader:
        before = os.fstat(reader.fileno())
        with open(m / "x.arrow", "wb") as writer:
            writer.write(b"ARROW1")
            assert os.fstat(reader.fileno()).st_size == before.st_size
            assert child_reads(m / "x.arrow") == 1
            writer.seek(0)
            writer.truncate()


def known(mount) -> dict:
    """What the store has, by name."""
    return {each["name"]: each for each in json.loads(cli("ls", "--json", "--socket", mount.store.socket).stdout)}


def child_reads(path):
    """What another process reads."""
    code = f"import pandas as pd; print(pd.read_feather({str(path)!r})['a'].iloc[0])"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@check("save, rename or removal by the path of one view")
def _(m):
    def size(view):
        return (m / view).stat().st_size if (m / view).exists() else None

    def follow(expected):
        """The kernel is told of the listed one a moment after it has the answer to a removal."""
        until(lambda: all(expected(view) for view in views))
        views.remove(listed)
        assert all(expected(view) for view in views)
        views.append(listed)

    arrow = frame(1).astype({"s": object})
    for listed, put in [("x.arrow", lambda: save(m / "x.arrow", 1)), ("x.arrow", lambda: m.store.put("x", arrow))]:
        views = ["x.arrow", "x.feather", "x.parquet"]
        put()
        before = {view: size(view) for view in views}
        frame(1, rows=5000).to_parquet(m / "x.parquet")
        follow(lambda view: size(view) not in (None, before[view]))
        assert all(len(pd.read_feather(m / view)) == 5000 for view in views if view != "x.parquet")
        os.rename(m / "x.parquet", m / "y.parquet")
        follow(lambda view: size(view) is None)
        put()
        assert all(size(view) for view in views)
        os.unlink(m / "x.feather")
        follow(lambda view: size(view) is None)
    m.store.put("t", np.arange(10.0))
    before = size("t.npy")
    m.store.replace("t", np.arange(10_000.0))
    assert len(np.load(m / "t.npy")) == 10_000
    until(lambda: size("t.npy") != before)


@check("truncate a view and close without writing")
def _(m):
    save(m / "x.arrow", 1)
    open(m / "x.arrow", "wb").close()
    assert value(m / "x.arrow") == 1


@check("create a file under a view's name and close without writing")
def _(m):
    for name in ("x.arrow", "y.pkl"):
        open(m / name, "wb").close()
    # What was closed last is published a moment later, since nobody waits for it.
    listed = until(lambda: {"x.arrow", "y.pkl"} <= set(now := known(m)) and now)
    assert listed["x.arrow"]["bytes"] == listed["y.pkl"]["bytes"] == 0
    assert (m / "x.arrow").read_bytes() == b""
    save(m / "x.arrow", 1)
    assert value(m / "x.arrow") == 1 and "x.arrow" not in known(m)


@check("truncate a plain file and close without writing")
def _(m):
    (m / "f.txt").write_text("text")
    open(m / "f.txt", "w").close()
    assert (m / "f.txt").read_bytes() == b""


@check("half a file of a view's format at close")
def _(m):
    save(m / "x.arrow", 1)
    whole = (m / "x.arrow").read_bytes()
    half = whole[: len(whole) // 2]
    (m / "x.arrow").write_bytes(half)
    assert (m / "x.arrow").read_bytes() == half
    save(m / "x.arrow", 2)
    code = f"import os, sys; os.write(os.open({str(m / 'x.arrow')!r}, os.O_WRONLY | os.O_TRUNC), bytes.fromhex({half.hex()!r})); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    until(lambda: child_reads(m / "x.arrow") == 2)


@check("half a file of a view's format, closed by a child that inherited it")
def _(m):
    save(m / "x.arrow", 1)
    save(m / "y.arrow", 2)
    whole = (m / "y.arrow").read_bytes()
    half = len(whole) // 2
    # Every child closes what it does not need before it runs its program.
    with open(m / "x.arrow", "wb", buffering=0) as file:
        file.write(whole[:half])
        assert child_reads(m / "x.arrow") == 1
        child = os.fork()
        if not child:
            file.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert child_reads(m / "x.arrow") == 1
        file.write(whole[half:])
    assert child_reads(m / "x.arrow") == 2 and (m / "x.arrow").read_bytes() == whole
    # Another thread is no other process.
    done = threading.Event()
    opened = []
    opener = threading.Thread(target=lambda: (opened.append(os.open(m / "x.arrow", os.O_WRONLY | os.O_TRUNC)), done.wait()))
    opener.start()
    while not opened:
        time.sleep(0.01)
    os.write(opened[0], whole[:half])
    os.close(opened[0])
    done.set()
    opener.join()
    assert subprocess.run(["cat", m / "x.arrow"], capture_output=True, check=True).stdout == whole[:half]


@check("foreign bytes under a view's extension")
def _(m):
    (m / "x.parquet").write_bytes(b"no such format")
    assert (m / "x.parquet").read_bytes() == b"no such format"
    assert any("x.parquet" in warning for warning in m.status()["fs"]["warnings"])
    said = [line for line in cli("status", m.path).stdout.splitlines() if line.startswith("  warning ")]
    assert any("x.parquet" in line for line in said)


@check("writes in any order, append, holes")
def _(m):
    with open(m / "f.bin", "wb") as file:
        file.seek(10_000)
        file.write(b"end")
        file.seek(0)
        file.write(b"begin")
    with open(m / "f.bin", "ab") as file:
        file.write(b"more")
    assert (m / "f.bin").read_bytes() == b"begin" + bytes(9995) + b"endmore"
    os.truncate(m / "f.bin", 5)
    assert (m / "f.bin").read_bytes() == b"begin"
    os.truncate(m / "f.bin", 8)
    assert (m / "f.bin").read_bytes() == b"begin\0\0\0"
    # Of what nobody has read since it was written, and of what somebody has. The reader runs before the file is open: a
    # process that is started later inherits it for a moment, and closes it.
    code = "import sys\nfor line in sys.stdin: print(open(line.strip()).read(), flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        def others_see():
            print(m / "g.txt", file=reader.stdin, flush=True)
            return reader.stdout.readline().strip()

        (m / "g.txt").write_text("published")
        for old, new in (("published", "PUBLished"), ("PUBLished", "PUBLISHED")):
            with open(m / "g.txt", "r+b", buffering=0) as file:
                file.write(new.encode())
                assert others_see() == old
            assert others_see() == new
        reader.stdin.close()


@check("fallocate")
def _(m):
    with open(m / "f.bin", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 100_000)
        assert os.fstat(file.fileno()).st_size == 100_000
    assert (m / "f.bin").read_bytes() == bytes(100_000)


@check("shared writable mmap")
def _(m):
    for first in [os.O_RDONLY, os.O_WRONLY]:
        (m / "f.bin").write_bytes(bytes(8192))
        with mapped(m / "f.bin", first) as memory:
            memory[5000:5004] = b"late"
        # What was stored through the mapping comes when it is gone.
        until(lambda: (m / "f.bin").read_bytes() == bytes(5000) + b"late" + bytes(3188))


@check("rename over a file")
def _(m):
    save(m / "x.arrow", 1)
    save(m / ".x.arrow.tmp", 2)
    os.replace(m / ".x.arrow.tmp", m / "x.arrow")
    assert value(m / "x.arrow") == 2
    assert os.listdir(m.path) == ["x.arrow"]
    assert (pd.read_parquet(m / "x.parquet")["a"] == 2).all()


@check("rename with NOREPLACE and EXCHANGE")
def _(m):
    (m / "a").write_text("a")
    (m / "b").write_text("b")
    refused(errno.EEXIST, rename, m / "a", m / "b", RENAME_NOREPLACE)
    rename(m / "a", m / "b", RENAME_EXCHANGE)
    assert ((m / "a").read_text(), (m / "b").read_text()) == ("b", "a")
    (m / "d/in").parent.mkdir()
    (m / "e").mkdir()
    (m / "d/in").write_text("d")
    rename(m / "d", m / "e", RENAME_EXCHANGE)
    assert (m / "e/in").read_text() == "d" and os.listdir(m / "d") == []


# The files that this process has got, of those that others try to get at the same moment.
TAKE = """
import os, sys, time
mount, own, how, start, count = sys.argv[1:4] + [float(sys.argv[4]), int(sys.argv[5])]
for number in range(count):
    # Each file at a moment of its own, so that nobody is ahead of the others.
    time.sleep(max(0, start + number / 50 - time.time()))
    path = f"{mount}/job{number}.{how}"
    try:
        os.unlink(path) if how == "unlink" else os.rename(path, f"{mount}/{own}-{number}.{how}")
        print(number)
    except FileNotFoundError:
        pass
"""


@check("one file is renamed or removed by several processes at the same time")
def _(m):
    second = Mount(m.path.parent / "second", m.store)
    try:
        count = 60
        for how in ["arrow", "bin", "unlink"]:
            for number in range(count):
                (m / f"job{number}.{how}").write_text(f"the job {number}")
            start = time.time() + 1.5
            takers = [
                subprocess.Popen([sys.executable, "-c", TAKE, str(mount.path), f"by{at}", how, str(start), str(count)], stdout=subprocess.PIPE, text=True)
                for at, mount in enumerate([m, second, m, second])
            ]
            taken = [[int(line) for line in taker.communicate(timeout=90)[0].split()] for taker in takers]
            assert all(taker.returncode == 0 for taker in takers)
            assert sorted(sum(taken, [])) == list(range(count)), taken
            there = [f"by{at}-{number}.{how}" for at, numbers in enumerate(taken) for number in numbers]
            assert sorted(os.listdir(m.path)) == sorted(os.listdir(second.path)) == sorted(there if how != "unlink" else [])
            for name in os.listdir(m.path):
                assert (second / name).read_text() == f"the job {name.split('-')[1].split('.')[0]}"
                os.unlink(m / name)
        settled(m.store.usage, 0)
    finally:
        second.unmount()


@check("rename of a directory")
def _(m):
    os.makedirs(m / "d/deep")
    save(m / "d/deep/x.arrow", 3)
    os.rename(m / "d", m / "e")
    assert value(m / "e/deep/x.arrow") == 3
    assert not os.path.exists(m / "d")


@check("unlink")
def _(m):
    save(m / "x.arrow", 1)
    with open(m / "x.arrow", "rb") as reader:
        os.unlink(m / "x.arrow")
        data = reader.read()
    assert data.endswith(b"ARROW1") and os.listdir(m.path) == []
    time.sleep(1.1)
    assert not os.path.exists(m / "x.parquet")
    settled(m.store.usage, 0)


@check("mkdir and rmdir")
def _(m):
    os.makedirs(m / "X.arrow/2026")
    refused(errno.EEXIST, os.mkdir, m / "X.arrow")
    refused(errno.ENOTEMPTY, os.rmdir, m / "X.arrow")
    os.rmdir(m / "X.arrow/2026")
    os.rmdir(m / "X.arrow")
    assert os.listdir(m.path) == []


@check("chmod, chown, utimens")
def _(m):
    save(m / "x.arrow", 1)
    os.chmod(m / "x.arrow", 0o600)
    os.chown(m / "x.arrow", 12, 34)
    os.utime(m / "x.arrow", ns=(5_000_000_001, 7_000_000_003))
    again(m)
    status = os.stat(m / "x.arrow")
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o600, 12, 34)
    assert status.st_mtime_ns == 7_000_000_003
    assert value(m / "x.arrow") == 1


@check("user extended attributes")
def _(m):
    save(m / "x.arrow", 1)
    os.setxattr(m / "x.arrow", "user.note", b"hello")
    again(m)
    assert os.getxattr(m / "x.arrow", "user.note") == b"hello"
    os.removexattr(m / "x.arrow", "user.note")
    refused(errno.ENODATA, os.getxattr, m / "x.arrow", "user.note")
    for other in ("system.posix_acl_access", "security.selinux", "trusted.x"):
        refused(errno.EOPNOTSUPP, os.getxattr, m / "x.arrow", other)
    refused(errno.EOPNOTSUPP, os.setxattr, m / "x.arrow", "trusted.x", b"x")
    for i in range(2):
        value = b"x" * 40_000
        if i == 0:
            os.setxattr(m / "x.arrow", "user.big0", value)
        else:
            refused(errno.ENOSPC, os.setxattr, m / "x.arrow", "user.big1", value)


def again(m):
    """Unmounts and mounts again: only what the store keeps is there afterwards."""
    m.unmount()
    Mount.__init__(m, m.path, m.store)


@check("computed attributes")
def _(m):
    m.store.put("t", frame(1).astype({"s": object})["a"].to_frame())
    assert os.listxattr(m / "t.arrow") == []
    for key in ["id", "type", "name", "rows", "instance", "signature"]:
        assert os.getxattr(m / "t.arrow", f"user.vineyard.{key}")
    assert os.getxattr(m / "t.arrow", "user.vineyard.rows") == b"1000"
    assert os.getxattr(m / "t.arrow", "user.vineyard.type") == b"vineyard::DataFrame"
    assert os.getxattr(m / "t.arrow", "user.vineyard.id").decode() == repr(m.store.client.get_name("t")).strip('"')
    refused(errno.EPERM, os.setxattr, m / "t.arrow", "user.vineyard.rows", b"1")


def try_lock(path, kind, queue):
    with open(path, "r+b") as file:
        try:
            (fcntl.flock if kind == "flock" else fcntl.lockf)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            queue.put("got it")
        except BlockingIOError:
            queue.put("refused")


@check("flock and POSIX locks")
def _(m):
    (m / "f").write_text("x")
    context = multiprocessing.get_context("spawn")
    for kind in ["flock", "posix"]:
        with open(m / "f", "r+b") as file:
            (fcntl.flock if kind == "flock" else fcntl.lockf)(file, fcntl.LOCK_EX)
            queue = context.Queue()
            process = context.Process(target=try_lock, args=(str(m / "f"), kind, queue))
            process.start()
            assert queue.get(timeout=90) == "refused"
            process.join()


@check("symbolic links")
def _(m):
    refused(errno.EPERM, os.symlink, "target", m / "link")


@check("hard links")
def _(m):
    (m / "f").write_text("x")
    refused(errno.EPERM, os.link, m / "f", m / "g")


@check("create with O_EXCL")
def _(m):
    second = Mount(m.path.parent / "second", m.store)
    try:
        first = os.open(m / "x", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        refused(errno.EEXIST, os.open, m / "x", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.close(os.open(second / "x", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.write(first, b"published")
        os.close(first)
        refused(errno.EEXIST, os.open, second / "x", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        assert (second / "x").read_bytes() == b"published"
    finally:
        second.unmount()


@check("two writers of one name")
def _(m):
    save(m / "a.arrow", 1)
    save(m / "b.arrow", 2)
    one, two = (m / "a.arrow").read_bytes(), (m / "b.arrow").read_bytes()
    first = os.open(m / "x.arrow", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(first, one[:100])
    process = subprocess.run(["cp", m / "b.arrow", m / "x.arrow"])
    assert process.returncode == 0
    assert value(m / "x.arrow") == 2
    os.write(first, one[100:])
    os.close(first)
    assert (m / "x.arrow").read_bytes() == one and two != one


@check("read-only mount")
def _(m):
    m.store.put("t", np.arange(3.0))
    m.unmount()
    Mount.__init__(m, m.path, m.store, "--read-only")
    assert np.load(m / "t.npy").tolist() == [0, 1, 2]
    refused(errno.EROFS, open, m / "new", "wb")
    refused(errno.EROFS, open, m / "t.npy", "r+b")
    refused(errno.EROFS, os.unlink, m / "t.npy")
    refused(errno.EROFS, os.mkdir, m / "d")
    refused(errno.EROFS, os.rename, m / "t.npy", m / "u.npy")
    refused(errno.EROFS, os.chmod, m / "t.npy", 0)


def test_every_row_has_a_check():
    assert set(rows()) == set(CHECKS)


@pytest.mark.parametrize("row", list(CHECKS))
def test_semantics(row, make_mount, serving):
    CHECKS[row](make_mount(*serving))
