"""What programs save through the mount: read back byte for byte, here, by a second mount and after mounting again; and
by the official client as the equal value."""

import errno
import hashlib
import os
import pickle
import random
import shutil
import subprocess
import threading
import time

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import images
from conftest import Store

ROWS = 30_000


def frame() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    return pd.DataFrame(
        {
            "f": rng.random(ROWS),
            "i": rng.integers(-5, 5, ROWS),
            "b": rng.random(ROWS) > 0.5,
            "u1": rng.integers(0, 255, ROWS).astype("u1"),
        }
    )


def table() -> pa.Table:
    strings = pa.array([None if i % 11 == 0 else f"zeile {i} 雪" for i in range(ROWS)])
    nested = pa.array([[i, None] if i % 3 else None for i in range(ROWS)], pa.list_(pa.int32()))
    stamps = pa.array(range(ROWS), pa.timestamp("us", tz="UTC"))
    numbers = pa.Table.from_pandas(frame(), preserve_index=False).replace_schema_metadata({"origin": "test"})
    colours = pa.array(["red", "green", None] * (ROWS // 3)).dictionary_encode()
    columns = {"s": strings, "l": nested, "t": stamps, "c": colours}
    for name, column in columns.items():
        numbers = numbers.append_column(name, column)
    return numbers


def arrow_file(path, value=None, chunk=None, stream=False, **options):
    value = table() if value is None else value
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), value.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(value, max_chunksize=chunk)


def by_duckdb(path):
    numbers = frame()  # noqa: F841 (DuckDB finds it by name)
    duckdb.connect().execute(f"copy (from numbers) to '{path}' (format parquet)")


def by_memory_map(path):
    """pyarrow into a file of a fixed size that it maps: the data arrives by page write-back."""
    value = table()
    sizes = pa.MockOutputStream()
    with pa.ipc.new_file(sizes, value.schema) as writer:
        writer.write_table(value)
    with pa.create_memory_map(str(path), sizes.size()) as file:
        with pa.ipc.new_file(file, value.schema) as writer:
            writer.write_table(value)


def by_open_memmap(path):
    array = np.lib.format.open_memmap(path, mode="w+", dtype="f8", shape=(500, 40))
    array[:] = np.arange(20_000).reshape(500, 40)
    array.flush()
    del array


def dump(path, value):
    with open(path, "wb") as file:
        pickle.dump(value, file, protocol=5)


# File name, and a function that saves it.
SAVES = {
    "pandas_feather": ("a.arrow", lambda p: frame().to_feather(p)),
    "pandas_feather_plain": ("a.feather", lambda p: frame().to_feather(p, compression="uncompressed")),
    "pandas_parquet": ("a.parquet", lambda p: frame().to_parquet(p)),
    "pandas_csv": ("a.csv", lambda p: frame().to_csv(p)),
    "pandas_pickle": ("a.pkl", lambda p: frame().to_pickle(p)),
    "pyarrow_file": ("a.arrow", arrow_file),
    "pyarrow_chunks": ("a.arrow", lambda p: arrow_file(p, chunk=7_001)),
    "pyarrow_zstd": ("a.arrow", lambda p: arrow_file(p, compression="zstd")),
    "pyarrow_lz4": ("a.feather", lambda p: arrow_file(p, compression="lz4")),
    "pyarrow_stream": ("a.arrow", lambda p: arrow_file(p, stream=True)),
    "pyarrow_mapped": ("a.arrow", by_memory_map),
    "pyarrow_no_rows": ("a.arrow", lambda p: arrow_file(p, table().slice(0, 0))),
    "pyarrow_parquet": ("a.parquet", lambda p: pq.write_table(table(), p, compression="zstd", row_group_size=9_000)),
    "pyarrow_csv": ("a.csv", lambda p: pyarrow.csv.write_csv(table().select(["f", "i", "s"]), str(p))),
    "polars_ipc": ("a.arrow", lambda p: pl.from_arrow(table()).write_ipc(p)),
    "polars_sink": ("a.arrow", lambda p: pl.from_arrow(table()).lazy().sink_ipc(p)),
    "polars_parquet": ("a.parquet", lambda p: pl.from_arrow(table()).write_parquet(p)),
    "duckdb_parquet": ("a.parquet", by_duckdb),
    "numpy": ("a.npy", lambda p: np.save(p, np.random.default_rng(1).random((300, 70)))),
    "numpy_fortran": ("a.npy", lambda p: np.save(p, np.asfortranarray(np.random.default_rng(1).random((300, 70))))),
    "numpy_mapped": ("a.npy", by_open_memmap),
    "numpy_zip": ("a.npz", lambda p: np.savez(p, a=np.arange(9), b=np.ones(4))),
    "pickle": ("a.pkl", lambda p: dump(p, {"model": np.arange(100_000), "name": "x"})),
    "text": ("notes.txt", lambda p: p.write_text("Größe\n" * 5000)),
    "no_bytes": ("nothing.bin", lambda p: p.write_bytes(b"")),
    "not_arrow": ("a.arrow", lambda p: p.write_bytes(b"no table at all" * 100)),
    "cut_arrow": ("a.arrow", lambda p: (arrow_file(p), os.truncate(p, p.stat().st_size - 100))),
    "cut_parquet": ("a.parquet", lambda p: p.write_bytes(b"PAR1" + bytes(range(256)) * 20)),
    "in_folder": ("2024/08/a.arrow", lambda p: (p.parent.mkdir(parents=True), arrow_file(p))),
}


def digest(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("save", SAVES)
def test_what_is_written_is_what_is_read(make_mount, serving, save, tmp_path):
    """The same program saves the same file on a local disk: its bytes are in the mount, and stay there."""
    mount = make_mount(*serving)
    file, write = SAVES[save]
    written, local = mount / file, tmp_path / file
    write(written)
    write(local)
    expected = digest(local)
    if save in ("pandas_pickle",):
        expected = digest(written)  # pandas' own bytes differ from one save to the next
    assert written.stat().st_size == local.stat().st_size
    assert digest(written) == expected
    second = make_mount(*serving, name="second")
    assert digest(second / file) == expected
    assert sorted(os.listdir(second.path)) == sorted(os.listdir(mount.path)) == [file.split("/")[0]]
    second.unmount()
    mount.unmount()
    again = make_mount(*serving, name="again")
    assert digest(again / file) == expected
    subprocess.run(["cmp", again / file, local], check=save != "pandas_pickle")


@pytest.mark.parametrize("save", [s for s, (file, _) in SAVES.items() if file.endswith((".arrow", ".feather", ".parquet")) and not s.startswith(("cut", "not"))])
def test_every_view_shows_the_equal_table(mount, save):
    file, write = SAVES[save]
    write(mount / file)
    stem = (mount / file).with_suffix("")
    stream = save == "pyarrow_stream"
    written = stem.with_suffix((mount / file).suffix)
    expected = pq.ParquetFile(written).read() if written.suffix == ".parquet" else pa.ipc.open_stream(str(written)).read_all() if stream else pa.ipc.open_file(str(written)).read_all()
    for suffix in (".arrow", ".feather", ".parquet"):
        path = stem.with_suffix(suffix)
        if suffix == ".parquet":
            found = pq.ParquetFile(path).read()
        elif stream and path == written:
            continue
        else:
            found = pa.ipc.open_file(str(path)).read_all()
            found.validate(full=True)
        assert images.equal(found, expected), suffix


def test_the_official_client_gets_what_was_saved(mount, store):
    get = lambda name: store.connect().get(name=name)
    frame().to_feather(mount / "frame.arrow")
    pd.testing.assert_frame_equal(get("frame"), frame())
    frame().to_parquet(mount / "parquet.parquet")
    pd.testing.assert_frame_equal(get("parquet"), frame())
    texts = pd.DataFrame({"s": np.array(["a", "雪", ""], dtype=object), "n": [1, 2, 3]})
    texts.to_feather(mount / "texts.arrow")
    found = get("texts")
    found = found if isinstance(found, pd.DataFrame) else found.to_pandas()
    assert found.astype(object).values.tolist() == texts.astype(object).values.tolist()
    array = np.random.default_rng(1).random((30, 7))
    np.save(mount / "array.npy", array)
    np.testing.assert_array_equal(get("array"), array)
    value = {"a": [1, 2, 3], "b": "text"}
    dump(mount / "value.pkl", value)
    assert get("value") == value
    numbers = pa.table({"a": pa.array([1, None, 3]), "s": pa.array(["x", None, "z"], pa.large_string())})
    arrow_file(mount / "table.arrow", numbers)
    found = get("table")
    found = pa.Table.from_pandas(found) if isinstance(found, pd.DataFrame) else found
    assert images.equal(found, numbers)


def test_close_is_the_last_word(mount, store):
    """When `close` returns, the object is the one that stays: nothing is published again behind the writer's back, so
    that the official client may map it, or replace it, at once."""
    ids, replaced = [], []
    for number in range(20):
        frame().head(100).to_feather(mount / f"X{number}.arrow")
        ids.append(store.client.get_name(f"X{number}"))
        frame().head(100).to_feather(mount / f"Y{number}.arrow")
        store.replace(f"Y{number}", pd.DataFrame({"new": [1.0]}))
        replaced.append(store.client.get_name(f"Y{number}"))
    time.sleep(0.5)
    assert [store.client.get_name(f"X{number}") for number in range(20)] == ids
    assert [store.client.get_name(f"Y{number}") for number in range(20)] == replaced
    for number in range(20):
        assert list(pd.read_feather(mount / f"Y{number}.arrow").columns) == ["new"]


def test_replacing_a_value_replaces_every_view(mount, store):
    """Whoever wrote it: the mount, then the official client, then the mount under another view."""
    frame().to_feather(mount / "X.arrow")
    store.replace("X", frame() * 2)
    pd.testing.assert_frame_equal(pd.read_feather(mount / "X.arrow"), frame() * 2)
    (frame() * 3).to_parquet(mount / "X.parquet")
    pd.testing.assert_frame_equal(pd.read_feather(mount / "X.arrow"), pd.read_parquet(mount / "X.parquet"))
    assert os.listdir(mount.path) == ["X.parquet"]


def test_a_reader_keeps_its_version(mount):
    """On a local disk a mapping of a file that is written anew ends by SIGBUS."""
    frame().to_feather(mount / "X.arrow", compression="uncompressed")
    mapped = pa.ipc.open_file(pa.memory_map(str(mount / "X.arrow"))).read_all()
    (mapped.to_pandas() * 2).to_feather(mount / "X.arrow", compression="uncompressed")
    pd.testing.assert_frame_equal(mapped.to_pandas(), frame())
    pd.testing.assert_frame_equal(pd.read_feather(mount / "X.arrow"), frame() * 2)


def test_memory_comes_back(mount, store):
    """Saves that replace each other, and their removal, leave nothing in the store."""
    before = store.usage()
    for _ in range(5):
        frame().to_feather(mount / "X.arrow")
        arrow_file(mount / "Y.arrow")
        (mount / "Z.bin").write_bytes(os.urandom(100_000))
    assert store.usage() > before
    for name in os.listdir(mount.path):
        (mount / name).unlink()
    assert os.listdir(mount.path) == []
    assert store.usage() == before
    assert store.client.list_names("*") == {}


def run(script: str, mount, **variables):
    result = subprocess.run(["bash", "-euc", script], cwd=mount.path, capture_output=True, text=True, timeout=60, env={**os.environ, **variables})
    assert result.returncode == 0, f"{script}\n{result.stdout}\n{result.stderr}"
    return result.stdout


# A script that runs in an empty folder, and prints what it has done.
SCRIPTS = {
    "cp": "cp $SOURCE a.arrow; cp a.arrow b.arrow; cp -p a.arrow c.arrow; cmp a.arrow b.arrow; cmp b.arrow c.arrow; cat a.arrow | cksum",
    "mv": "cp $SOURCE t; mv t a.arrow; mv a.arrow b.arrow; cp $SOURCE c.arrow; mv -f b.arrow c.arrow; ls; cksum <c.arrow",
    "dd": "dd if=$SOURCE of=a.arrow bs=7000 status=none; dd if=$SOURCE of=b.bin bs=1M conv=fsync status=none; cmp a.arrow b.bin; echo XY | dd of=b.bin bs=1 seek=100 conv=notrunc status=none; cksum <b.bin",
    "cat": "cat $SOURCE >a.arrow; (head -c 1000 $SOURCE; tail -c +1001 $SOURCE) >b.arrow; cmp a.arrow b.arrow; cksum <b.arrow",
    "echo": "echo one >a.txt; echo two >>a.txt; echo three >>a.txt; cat a.txt; echo new >a.txt; cat a.txt; : >a.txt; wc -c <a.txt",
    "sed": "printf 'one\\ntwo\\n' >a.txt; sed -i s/two/2/ a.txt; cat a.txt; sed -i.bak s/one/1/ a.txt; cat a.txt a.txt.bak; ls",
    "tar": "mkdir d; cp $SOURCE d/a.arrow; echo x >d/e.txt; tar --sort=name -cf all.tar d; tar --sort=name -cSf sparse.tar d; tar tf all.tar; rm -r d; tar xf all.tar; cmp d/a.arrow $SOURCE; rm -r d; tar xf sparse.tar; cmp d/a.arrow $SOURCE; cat d/e.txt; rm *.tar; ls . d",
    "gzip": "cp $SOURCE a.bin; gzip -k -n a.bin; gunzip <a.bin.gz | cmp - a.bin; cksum <a.bin",
    "truncate": "printf 123456789 >a; truncate -s 4 a; cat a; truncate -s 8 a; od -An -c a; fallocate -l 5000 b; wc -c <b; rm a b; ls",
    "split": "split -b 50000 $SOURCE part.; cat part.* | cmp - $SOURCE; ls",
    "sort": "printf 'b\\na\\n' >a; sort -o a a; cat a",
    "folders": "mkdir -p a/b/c; echo 1 >a/b/c/x; mv a/b a/d; cat a/d/c/x; ls -R a; rm -r a; ls",
    "mktemp": "t=$(mktemp tmp.XXXXXX); echo data >$t; mv $t final.txt; cat final.txt; ls",
    "install": "install -m 600 $SOURCE a.arrow; stat -c %a a.arrow; cmp a.arrow $SOURCE",
    "touch": "touch a; touch -d @1700000000 a; stat -c '%Y %s' a; echo 1 >a; touch -d @1600000000 a; stat -c '%Y %s' a",
    "find": "mkdir d; echo 1 >d/x; echo 22 >d/y; find . -type f -size +0 | sort; find . -name x -delete; ls d",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_shell_tools(make_mount, serving, name, tmp_path):
    """Each script says the same in the mount and in a folder of a local disk, and leaves the same files."""
    mount = make_mount(*serving)
    source = tmp_path / "source.arrow"
    arrow_file(source)
    local = tmp_path / "local"
    local.mkdir()

    class Local:
        path = local

    said = run(SCRIPTS[name], Local, SOURCE=str(source), LC_ALL="C")
    assert run(SCRIPTS[name], mount, SOURCE=str(source), LC_ALL="C") == said
    second = make_mount(name="second")
    for view in (mount, second):
        for path in sorted(local.rglob("*")):
            if path.is_file():
                assert digest(view.path / path.relative_to(local)) == digest(path), path


def test_rsync(make_mount, tmp_path):
    if not shutil.which("rsync"):
        pytest.skip("rsync is not installed: apt-get install rsync")
    mount = make_mount()
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    arrow_file(source / "a.arrow")
    frame().to_parquet(source / "sub" / "b.parquet")
    (source / "notes.txt").write_text("x")
    back = tmp_path / "back"
    for options in (["-a"], ["-a", "--inplace", "--ignore-times"]):
        subprocess.run(["rsync", *options, f"{source}/", f"{mount.path}/"], check=True)
        shutil.rmtree(back, ignore_errors=True)
        subprocess.run(["rsync", "-a", f"{mount.path}/", f"{back}/"], check=True)
        subprocess.run(["diff", "-r", source, back], check=True)
    # Nothing changed, so nothing is sent again.
    listed = subprocess.run(["rsync", "-ai", f"{source}/", f"{mount.path}/"], check=True, capture_output=True, text=True).stdout
    assert [line for line in listed.splitlines() if line.startswith(">f")] == []


def test_kept_files_give_way_before_a_save_fails(folder, make_mount):
    """Beside the columns of a Parquet file its bytes are kept. In a full store they go, and no table does."""
    (folder / "small").mkdir()
    small = Store(folder / "small", "80Mi")
    try:
        mount = make_mount(over=small)
        random = np.random.default_rng(3)
        # Random values: a file is as large as its columns, 12 MB each.
        frames = {name: pd.DataFrame({"v": random.random(1_500_000), "n": i}) for i, name in enumerate("ab")}
        for name, frame in frames.items():
            frame.to_parquet(mount / f"{name}.parquet")
        written = {name: (mount / f"{name}.parquet").read_bytes() for name in frames}
        before = small.usage()
        # Columns smaller than what goes: free memory is in pieces.
        large = pa.table({name: random.random(500_000) for name in "uvwxyz"})
        assert before + large.nbytes > 80 << 20, "the store would hold it without giving anything up"
        with pa.OSFile(str(mount / "large.arrow"), "wb") as file:
            with pa.ipc.new_file(file, large.schema) as writer:
                writer.write_table(large)
        with pa.memory_map(str(mount / "large.arrow")) as file:
            assert pa.ipc.open_file(file).read_all().equals(large)
        other = make_mount(over=small)
        changed = 0
        for name, frame in frames.items():
            for at in (mount, other):
                pd.testing.assert_frame_equal(pd.read_parquet(at / f"{name}.parquet"), frame)
            changed += (other / f"{name}.parquet").read_bytes() != written[name]
        assert changed >= 1, "nothing was given up"
        assert small.usage() <= 80 << 20
        other.unmount()
        mount.unmount()
    finally:
        small.stop()


def test_a_file_that_is_cut_while_it_is_published(store, mount):
    """The server reads what it publishes through a mapping: cutting the file below it must not end it."""
    table = pa.table({"a": np.arange(4_000_000)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    path = mount / "x.arrow"
    path.write_bytes(data)
    end, other = time.monotonic() + 6, []

    def save():
        while time.monotonic() < end:
            attempt(lambda: path.write_bytes(data))

    def cut():
        rng = random.Random(5)
        while time.monotonic() < end:
            attempt(lambda: os.truncate(path, rng.randrange(len(data))))
            time.sleep(rng.random() / 50)

    def attempt(step):
        try:
            step()
        except OSError as error:
            # Of several that change one name at the same time one may be told to try again.
            if error.errno not in (errno.ESTALE, errno.EBUSY):
                other.append(error)

    threads = [threading.Thread(target=work) for work in (save, save, cut)]
    [thread.start() for thread in threads]
    [thread.join(120) for thread in threads]
    assert not other and not any(thread.is_alive() for thread in threads)
    path.write_bytes(data)
    assert path.read_bytes() == data
    assert mount.status()["server"]["restarts"] == 0
