"""Programs that change files in place, lock them, and replace them by renaming: version control, databases, archives,
editors. What they leave in the mount is what a second mount of the same store shows."""

import ctypes
import errno
import os
import shutil
import sqlite3
import subprocess
import sys

import duckdb
import numpy as np
import pandas as pd
import pytest



def needs(tool: str):
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed: apt-get install {tool}")


def run(*command, folder, check=True, **kwargs):
    environment = {**os.environ, "LC_ALL": "C", "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1", "TERM": "dumb"}
    result = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=120, **kwargs)
    assert not check or result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def frame(rows=5000):
    rng = np.random.default_rng(rows)
    return pd.DataFrame({"a": rng.random(rows), "b": rng.integers(0, 9, rows)})


def same_tree(left, right):
    subprocess.run(["diff", "-r", left, right], check=True, timeout=60)


def test_a_long_listing_asks_once_for_what_is_not_kept(make_mount):
    """`ls -l` believes the first file that there are no access lists, and gets the rest with the listing, again and again."""
    mount = make_mount()
    for i in range(200):
        mount.store.put(f"d{i}", pd.Series(np.arange(i + 1)))
    lines = [run("ls", "-l", mount.path, folder=mount.store.folder)]

    def asked():
        operations = mount.status()["operations"]
        return sum(operations[name]["count"] for name in ("lookup", "getattr", "getxattr") if name in operations)

    def cost():
        before = asked()
        lines.extend(run("ls", "-l", mount.path, folder=mount.store.folder) for _ in range(3))
        return asked() - before

    # Whoever pauses for a second in the middle of a listing asks for each file again.
    least = min(cost() for _ in range(5))
    assert len(set(lines)) == 1 and lines[0].count(".arrow\n") == 200
    assert least < 30
    size = (mount / "d7.arrow").stat().st_size
    assert any(line.split()[4] == str(size) for line in lines[0].splitlines() if line.endswith(" d7.arrow"))


@needs("git")
def test_git(make_mount, serving):
    mount = make_mount(*serving)
    git = lambda *arguments: run("git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments, folder=mount.path / "project")
    (mount / "project" / "src").mkdir(parents=True)
    (mount / "project" / "readme.txt").write_text("one\n")
    frame().to_feather(mount / "project" / "src" / "x.arrow")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    (mount / "project" / "readme.txt").write_text("two\n")
    git("commit", "--quiet", "-a", "-m", "second")
    git("checkout", "--quiet", "-b", "side", "HEAD~1")
    assert (mount / "project" / "readme.txt").read_text() == "one\n"
    git("checkout", "--quiet", "-")
    assert (mount / "project" / "readme.txt").read_text() == "two\n"
    git("gc", "--quiet")
    git("fsck", "--strict")
    assert git("status", "--porcelain") == ""
    assert git("log", "--format=%s").split() == ["second", "first"]
    run("git", "-c", "safe.directory=*", "clone", "--quiet", mount.path / "project", "clone", folder=mount.store.folder)
    same_tree(mount / "project" / "src", mount.store.folder / "clone" / "src")
    # A second mount has every file; folders that are empty (git needs `refs`) live in the mount that made them.
    second = make_mount(name="second")
    for path in (p for p in (mount / "project").rglob("*") if p.is_file()):
        assert (second / "project" / path.relative_to(mount / "project")).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("journal", ["delete", "truncate", "persist", "memory"])
def test_sqlite(make_mount, serving, journal):
    mount = make_mount(*serving)
    with sqlite3.connect(mount / "data.sqlite") as database:
        assert database.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
        database.execute("create table t (id integer primary key, text text)")
        database.executemany("insert into t (text) values (?)", [(f"row {i}" * 20,) for i in range(2000)])
    with sqlite3.connect(mount / "data.sqlite") as database:
        database.execute("update t set text = 'changed' where id % 3 = 0")
        database.commit()
        database.execute("delete from t where id > 1000")
        database.rollback()
    for path in (mount / "data.sqlite", make_mount(name="second") / "data.sqlite"):
        with sqlite3.connect(path) as database:
            assert database.execute("pragma integrity_check").fetchone() == ("ok",)
            assert database.execute("select count(*), sum(text = 'changed') from t").fetchone() == (2000, 666)
    # Another process's lock holds.
    script = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], timeout=0); c.execute('begin immediate')"
    with sqlite3.connect(mount / "data.sqlite") as database:
        database.execute("begin immediate")
        locked = subprocess.run([sys.executable, "-c", script, mount / "data.sqlite"], capture_output=True, text=True)
        assert "database is locked" in locked.stderr
        database.rollback()


def test_duckdb_database(make_mount, serving):
    mount = make_mount(*serving)
    numbers = frame()  # noqa: F841 (DuckDB finds it by name)
    with duckdb.connect(str(mount / "data.duckdb")) as database:
        database.execute("create table t as from numbers")
        database.execute("checkpoint")
        database.execute("insert into t select a + 1, b from t")
    with duckdb.connect(str(mount / "data.duckdb")) as database:
        database.execute("update t set b = -1 where b = 3")
    second = make_mount(name="second")
    with duckdb.connect(str(second / "data.duckdb"), read_only=True) as database:
        expected = 2 * int((frame()["b"] == 3).sum())
        assert database.execute("select count(*), count(*) filter (b = -1) from t").fetchone() == (10_000, expected)


def test_dd_changes_the_middle_of_a_dataset(make_mount, serving):
    mount = make_mount(*serving)
    path = mount / "x.arrow"
    numbers = pd.DataFrame({"a": np.ones(10_000)})
    numbers.to_feather(path, compression="uncompressed")
    before = path.read_bytes()
    with open(path, "rb") as reader:
        at = before.index(np.ones(10_000).tobytes()) + 8 * 5000
        value = np.float64(2.5).tobytes()
        command = ["dd", f"of={path}", "bs=1", f"seek={at}", "conv=notrunc", "status=none"]
        subprocess.run(command, input=value, check=True, timeout=60)
        assert reader.read() == before, "a reader that was there before sees other bytes"
    after = before[:at] + value + before[at + 8 :]
    assert path.read_bytes() == after
    assert pd.read_feather(path)["a"].sum() == 10_001.5
    assert (make_mount(name="second") / "x.arrow").read_bytes() == after


@needs("tar")
def test_tar_in_both_directions(make_mount, serving, tmp_path):
    mount = make_mount(*serving)
    source = tmp_path / "tree"
    (source / "deep" / "er").mkdir(parents=True)
    frame().to_feather(source / "deep" / "x.arrow")
    frame().to_parquet(source / "deep" / "er" / "y.parquet")
    np.save(source / "z.npy", np.arange(1000))
    (source / "no bytes").touch()
    run("tar", "-C", tmp_path, "-czf", mount / "all.tgz", "tree", folder=tmp_path)
    run("tar", "-xzf", mount / "all.tgz", folder=mount.path)
    same_tree(source, mount / "tree")
    # Over what is there: tar removes each file first.
    run("tar", "-xzf", mount / "all.tgz", folder=mount.path)
    run("tar", "-C", mount.path, "-cSf", tmp_path / "back.tar", "tree", folder=tmp_path)
    (tmp_path / "back").mkdir()
    run("tar", "-C", tmp_path / "back", "-xf", tmp_path / "back.tar", folder=tmp_path)
    same_tree(source, tmp_path / "back" / "tree")
    second = make_mount(name="second")
    assert sorted(p.name for p in (second / "tree").rglob("*") if p.is_file()) == ["no bytes", "x.arrow", "y.parquet", "z.npy"]
    for path in (p for p in source.rglob("*") if p.is_file()):
        assert (second / "tree" / path.relative_to(source)).read_bytes() == path.read_bytes()


@needs("rsync")
@pytest.mark.parametrize("options", [["-a"], ["-a", "--inplace", "--no-whole-file"], ["-aAX"], ["-a", "--append-verify"]])
def test_rsync_follows_changes(make_mount, tmp_path, options):
    mount = make_mount()
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    for rows in (1000, 3000):
        frame(rows).to_feather(source / "a.arrow", compression="uncompressed")
        frame(rows).to_parquet(source / "sub" / "b.parquet")
        (source / "log.txt").write_text("line\n" * rows)
        run("rsync", *(options if rows == 1000 or "--append-verify" not in options else ["-a"]), f"{source}/", f"{mount.path}/", folder=tmp_path)
        same_tree(source, mount.path)
    assert run("rsync", "-ai", f"{source}/", f"{mount.path}/", folder=tmp_path).count(">f") == 0
    pd.testing.assert_frame_equal(pd.read_feather(mount / "a.arrow"), frame(3000))


@needs("vim")
@pytest.mark.parametrize("settings", ["", "set backupcopy=no", "set backupcopy=yes backup"])
def test_vim(make_mount, settings):
    """With a swap file beside the file. The file is written in place, or moves aside for a new one under its name; vim
    checks that the file which it opened for writing is the one that it has read."""
    mount = make_mount()
    path = mount / "notes.txt"
    path.write_text("one\ntwo\n")
    script = ["set swapfile", settings or "set ruler", "%s/two/2/", "w", "$put ='three'", "wq"]
    arguments = [argument for part in script for argument in ("-c", part)]
    run("vim", "-es", "-u", "NONE", "-i", "NONE", "-N", "-X", *arguments, path, folder=mount.path, stdin=subprocess.DEVNULL)
    assert path.read_text() == "one\n2\nthree\n"
    # A small build of vim makes no backups.
    assert set(os.listdir(mount.path)) - {"notes.txt~"} == {"notes.txt"}
    assert (make_mount(name="second") / "notes.txt").read_text() == "one\n2\nthree\n"


def test_a_save_by_rename_away_and_anew(mount):
    """As editors with backups do: the old file moves aside, and a new one is written under its name."""
    path, aside = mount / "x.arrow", mount / "x.arrow~"
    frame(100).to_feather(path)
    os.rename(path, aside)
    frame(200).to_feather(path)
    assert len(pd.read_feather(path)) == 200
    assert len(pd.read_feather(aside)) == 100
    os.unlink(aside)
    assert os.listdir(mount.path) == ["x.arrow"]


@pytest.mark.parametrize("reflink", ["auto", "never"])
def test_cp_within_the_mount(make_mount, serving, reflink):
    mount = make_mount(*serving)
    frame(50_000).to_feather(mount / "a.arrow", compression="uncompressed")
    run("cp", f"--reflink={reflink}", "a.arrow", "b.arrow", folder=mount.path)
    run("cmp", "a.arrow", "b.arrow", folder=mount.path)
    pd.testing.assert_frame_equal(pd.read_feather(mount / "b.arrow"), frame(50_000))
    # Nothing is shared with the copy.
    frame(10).to_feather(mount / "a.arrow")
    pd.testing.assert_frame_equal(pd.read_feather(mount / "b.arrow"), frame(50_000))
    assert "copy_file_range" not in mount.log.read_text()


def test_copy_file_range(make_mount, serving):
    mount = make_mount(*serving)
    data = os.urandom(300_000)
    (mount / "from.bin").write_bytes(data)
    source, target = os.open(mount / "from.bin", os.O_RDONLY), os.open(mount / "to.bin", os.O_RDWR | os.O_CREAT)
    copied = 0
    while copied < 200_000:
        copied += os.copy_file_range(source, target, 200_000 - copied, 50_000 + copied, copied)
    os.close(source)
    os.close(target)
    assert (mount / "to.bin").read_bytes() == data[50_000:250_000]
    assert "copy_file_range" not in mount.log.read_text()
    libc = ctypes.CDLL(None, use_errno=True)
    with open(mount / "from.bin", "rb") as source, open(mount / "clone.bin", "wb") as target:
        ficlone = 0x40049409
        assert libc.ioctl(target.fileno(), ctypes.c_ulong(ficlone), source.fileno()) == -1
        assert ctypes.get_errno() in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL)
