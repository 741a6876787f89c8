"""The commands that work on a store: ls, info, get, put, rm, mv."""

import json
import os
import pty
import signal
import subprocess
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from conftest import BINARY, cli, freeze


def frame(rows=1000, seed=7):
    random = np.random.default_rng(seed)
    return pd.DataFrame({"a": random.normal(size=rows), "b": random.integers(0, 9, rows)})


@pytest.fixture
def tool(store):
    """Runs a command on the store."""

    def run(command, *arguments, **kwargs):
        return cli(command, *arguments, "--socket", store.socket, **kwargs)

    return run


def names(store):
    return set(store.client.list_names("*").keys())


def fails(run, *arguments):
    """The one line that an error says."""
    result = run(*arguments, check=False)
    assert result.returncode == 1, result
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vineyard-fs: "), result.stderr
    return lines[0]


def test_ls_shows_what_the_mount_shows(store, mount, tool):
    store.put("X_train", frame(1000))
    store.put("deep/er/y", np.arange(12.0).reshape(3, 4))
    store.put("number", 41)
    store.put("model", {"not": ["a", "table"]})
    (mount / "report.csv").write_bytes(b"a,b\n1,2\n")
    (mount / "t.parquet").write_bytes(b"not parquet at all")
    gone = store.put("gone", np.arange(3.0))
    store.client.delete(gone)

    below = [path.relative_to(mount.path) for path in mount.path.rglob("*") if path.is_file()]
    listed = json.loads(tool("ls", "--json").stdout)
    by_name = {entry["name"]: entry for entry in listed}
    assert sorted(entry["file"] for entry in listed if entry["state"] != "dangling") == sorted(map(str, below))
    for entry in listed:
        if entry["state"] == "ok":
            assert entry["bytes"] == (mount / entry["file"]).stat().st_size, entry
    x = by_name["X_train"]
    assert (x["file"], x["type"], x["rows"]) == ("X_train.arrow", "vineyard::DataFrame", 1000)
    assert x["id"] == repr(store.client.get_name("X_train")).strip('"')
    assert x["instance"] == store.client.instance_id
    assert abs(pd.Timestamp(x["created"]).timestamp() - time.time()) < 120
    assert by_name["gone"]["state"] == "dangling"
    assert by_name["report.csv"]["bytes"] == 8

    lines = tool("ls").stdout.splitlines()
    assert "deep/er/y.npy" in lines and "X_train.arrow" in lines
    assert [line for line in lines if line.startswith("gone")][0].startswith("gone  (dangling: ")
    assert tool("ls", "deep/").stdout == "deep/er/y.npy\n"
    assert tool("ls", "X_train.arrow").stdout == "X_train.arrow\n"
    long = tool("ls", "-l", "X_").stdout.splitlines()
    assert long[0].split() == ["TYPE", "ROWS", "BYTES", "INSTANCE", "TIME", "FILE"]
    assert long[1].split()[:2] == ["DataFrame", "1000"] and long[1].endswith("X_train.arrow")
    assert 'there is "X_train"' in fails(tool, "ls", "X_tran")


def test_ls_of_a_broken_object_says_why_and_does_not_hide_the_rest(store, tool):
    store.put("fine", frame(3))
    broken = vineyard_meta("vineyard::Tensor<double>", shape_="[-4]", value_type_="float64", partition_index_="[]")
    made = store.client.create_metadata(broken)
    store.client.persist(made.id)
    store.client.put_name(made.id, "bad")
    by_name = {entry["name"]: entry for entry in json.loads(tool("ls", "--json").stdout)}
    assert by_name["bad"]["state"] == "broken" and "shape_" in by_name["bad"]["reason"]
    assert by_name["fine"]["state"] == "ok"
    assert "(broken: " in tool("ls", "bad").stdout
    info = json.loads(tool("info", "bad", "--json").stdout)
    assert info["state"] == "broken" and info["tree"]["type"] == "vineyard::Tensor<double>"
    assert "shape_" in fails(tool, "get", "bad", "-o", "-")
    tool("rm", "bad")
    assert "bad" not in names(store)


def vineyard_meta(typename, **values):
    from vineyard._C import ObjectMeta

    meta = ObjectMeta()
    meta["typename"] = typename
    for key, value in values.items():
        meta[key] = value
    return meta


def test_a_column_of_an_extension_type_that_cannot_be_shown_hides_no_other(store, mount):
    table = pa.table({"id": pa.array([b"0" * 16, b"1" * 16], pa.uuid()), "value": [1, 2]})
    store.put("ids", table)
    found = pa.feather.read_table(mount / "ids.arrow")
    assert found["value"].to_pylist() == [1, 2] and found["id"].type == pa.large_binary()
    assert b"vineyard_fs:note" in found.schema.field("id").metadata


def test_names_that_begin_with_a_slash_are_files_of_the_root(store, mount):
    values = {"/x": 1.0, "//": 2.0, "/": 3.0, "/a/b": 4.0, "a//b": 5.0}
    for name, value in values.items():
        store.put(name, np.full(3, value))
    hashed = next(name for name in os.listdir(mount.path) if "%~" in name)
    files = {"%2Fx.npy": 1.0, "%2F%2F.npy": 2.0, hashed: 3.0, "%2Fa%2Fb.npy": 4.0, "a": None}
    assert sorted(os.listdir(mount.path)) == sorted(files)
    found = {path.relative_to(mount.path).as_posix(): np.load(path)[0] for path in mount.path.rglob("*.npy")}
    assert found == {name: value for name, value in files.items() if value} | {"a/%2F/b.npy": 5.0}
    listed = json.loads(cli("ls", "--json", "--socket", store.socket).stdout)
    assert {each["file"]: values[each["name"]] for each in listed} == found
    (mount / "%2Fx.npy").unlink()
    (mount / "%2Fa%2Fb.npy").rename(mount / "%2Fx.npy")
    assert np.load(mount / "%2Fx.npy")[0] == 4.0 and (store.client.get(name="/x") == 4.0).all()


def test_info_tells_types_sizes_schema_and_views(store, mount, tool):
    store.put("X", frame(500))
    info = json.loads(tool("info", "X.arrow", "--json").stdout)
    assert (info["name"], info["file"], info["type"], info["kind"]) == ("X", "X.arrow", "vineyard::DataFrame", "table")
    assert info["rows"] == 500
    assert [(f["name"], f["type"]) for f in info["schema"]["fields"]][:2] == [("a", "Float64"), ("b", "Int64")]
    assert "pandas" in info["schema"]["metadata"]
    assert info["instance"]["id"] == store.client.instance_id and info["instance"]["here"] is True
    assert info["instance"]["host"] == os.uname().nodename
    views = {view["file"]: view for view in info["views"]}
    assert {"X.arrow", "X.feather", "X.parquet"} <= views.keys() and views["X.arrow"]["listed"]
    for file, view in views.items():
        if view["bytes"] is not None:
            assert view["bytes"] == len((mount / file).read_bytes()), file
    assert info["blobs"]["bytes"] >= 500 * 16
    sizes = []

    def walk(node):
        if node["type"] == "vineyard::Blob":
            sizes.append(node["bytes"])
        for member in node.get("members", {}).values():
            walk(member)

    walk(info["tree"])
    assert sum(sizes) == info["blobs"]["bytes"] and sizes.count(4000) >= 2, sizes
    assert info["tree"]["id"] == info["id"]
    text = tool("info", "X").stdout
    for part in ["DataFrame", "a: Float64", "X.parquet", "(this one)", info["id"]]:
        assert part in text, text

    pa.feather.write_feather(frame(20), mount / "W.feather", compression="lz4")
    os.setxattr(mount / "W.feather", "user.note", b"kept")
    info = json.loads(tool("info", "W", "--json").stdout)
    assert info["recipe"]["written_as"] == "feather"
    assert info["recipe"]["bytes"] == (mount / "W.feather").stat().st_size
    assert info["attributes"]["xattrs"] == {"user.note": "kept"}


@pytest.mark.parametrize("how", ["file", "stdout", "folder"])
def test_get_writes_the_bytes_that_the_mount_reads(store, mount, tool, folder, how):
    store.put("X", frame(200_000))
    store.put("ns/t", np.arange(6, dtype="<i4").reshape(2, 3))
    (mount / "raw.bin").write_bytes(os.urandom(3_000_000))
    for name, file in [("X", "X.arrow"), ("X.parquet", "X.parquet"), ("ns/t", "ns/t.npy"), ("raw.bin", "raw.bin")]:
        expected = (mount / file).read_bytes()
        out = folder / os.path.basename(file)
        if how == "file":
            tool("get", name, "-o", out)
            assert out.read_bytes() == expected
            assert out.stat().st_mode & 0o777 == 0o644
            out.unlink()
        elif how == "folder":
            tool("get", name, cwd=folder)
            assert out.read_bytes() == expected
            assert "--force" in fails(tool, "get", name, "-o", folder)
        else:
            got = subprocess.run(
                [BINARY, "get", name, "-o", "-", "--socket", store.socket], stdout=subprocess.PIPE, check=True
            )
            assert got.stdout == expected
    assert not list(folder.glob(".vineyard-fs-*"))


def test_get_picks_the_view_by_option_or_by_the_output(store, tool, folder):
    data = frame(100)
    store.put("X", data)
    tool("get", "X", "-o", folder / "x.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "x.parquet"), data)
    tool("get", "X", "--view", "feather", "-o", folder / "anything")
    pd.testing.assert_frame_equal(pd.read_feather(folder / "anything"), data)
    (folder / "anything").write_text("mine")
    assert "--force" in fails(tool, "get", "X", "-o", folder / "anything")
    assert (folder / "anything").read_text() == "mine"
    tool("get", "X", "-o", folder / "anything", "--force")
    assert pa.ipc.open_file(folder / "anything").read_all().num_rows == 100
    before = sorted(path.name for path in folder.iterdir())
    assert ".pkl" in fails(tool, "get", "X.pkl", "-o", folder / "new")
    assert ".npy" in fails(tool, "get", "X", "-o", folder / "new.npy")
    assert "no dataset" in fails(tool, "get", "Z", "-o", folder / "new")
    assert "cannot write" in fails(tool, "get", "X", "-o", folder / "absent" / "new")
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_file_that_get_makes_is_what_its_extension_says(store, tool, folder):
    data = frame(100)
    store.put("T", data)
    tool("get", "T.parquet", "-o", folder / "x.arrow")
    assert pa.ipc.open_file(folder / "x.arrow").read_all().num_rows == 100
    tool("get", "T.feather", "-o", folder / "x.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "x.parquet"), data)
    assert "no .npy view" in fails(tool, "get", "T.parquet", "-o", folder / "x.npy")
    assert not (folder / "x.npy").exists()
    for name in ["x.csv", "x3.parquet.gz"]:
        said = tool("get", "T.parquet", "-o", folder / name).stderr
        assert f"{name} gets the .parquet view" in said and said.count("\n") == 1, said
    assert tool("get", "T.parquet", "-o", folder / "x").stderr == ""
    assert tool("get", "T", "--view", "parquet", "-o", folder / "y.arrow").stderr == ""
    assert (folder / "y.arrow").read_bytes()[:4] == b"PAR1"


def test_names_that_listings_hide_are_refused(store, tool, folder):
    (folder / "f").write_bytes(b"x")
    for name in [".vineyard-fs/x", ".vineyard-fs", ".vineyard-fs/"]:
        assert "kept for copies" in fails(tool, "put", folder / "f", name), name
    store.put("x", np.arange(3.0))
    assert "kept for copies" in fails(tool, "mv", "x", ".vineyard-fs/x")
    assert names(store) == {"x"}


def test_put_is_what_the_official_client_gets(store, mount, tool, folder):
    data = frame(5000)
    table = pa.table({"n": pa.array([1, None, 3]), "s": ["x", "y", None]})
    array = np.random.default_rng(1).normal(size=(30, 4))
    pa.feather.write_feather(data, folder / "X.feather", compression="uncompressed")
    with pa.ipc.new_file(folder / "t.arrow", table.schema) as writer:
        writer.write_table(table)
    np.save(folder / "m.npy", array)
    pd.to_pickle({"k": [1, 2]}, folder / "p.pkl")
    (folder / "r.csv").write_bytes(b"a\n1\n")
    os.chmod(folder / "r.csv", 0o600)

    line = tool("put", folder / "X.feather").stdout
    assert line.startswith("X.feather: DataFrame, 5,000 rows, ") and line.count("\n") == 1
    tool("put", folder / "t.arrow", "ns/renamed")
    tool("put", folder / "m.npy", "ns/")
    tool("put", folder / "p.pkl")
    assert tool("put", folder / "r.csv").stdout.startswith("r.csv: plain file, 4 B in ")
    assert names(store) == {"X", "ns/renamed", "ns/m", "p", "r.csv"}

    pd.testing.assert_frame_equal(store.client.get(name="X"), data)
    # vineyard has large strings only.
    assert pa.table(store.client.get(name="ns/renamed")).cast(table.schema).equals(table)
    np.testing.assert_array_equal(store.client.get(name="ns/m"), array)
    for file, shown in [("X.feather", "X.feather"), ("t.arrow", "ns/renamed.arrow"), ("m.npy", "ns/m.npy"),
                        ("p.pkl", "p.pkl"), ("r.csv", "r.csv")]:
        assert (mount / shown).read_bytes() == (folder / file).read_bytes(), shown
    assert (mount / "r.csv").stat().st_mode & 0o777 == 0o600
    assert pd.read_pickle(mount / "p.pkl") == {"k": [1, 2]}


def test_put_reads_the_standard_input(store, tool):
    result = subprocess.run([BINARY, "put", "-", "piped.txt", "--socket", store.socket], input=b"from a pipe", check=True)
    assert result.returncode == 0
    assert tool("get", "piped.txt", "-o", "-").stdout == "from a pipe"


def test_put_treats_a_taken_name_as_told(store, mount, tool, folder):
    for number in [1, 2, 3]:
        pa.feather.write_feather(pd.DataFrame({"v": [number]}), folder / f"{number}.feather")
    tool("put", folder / "1.feather", "X")
    first = store.client.get_name("X")
    assert "exists already" in fails(tool, "put", folder / "2.feather", "X", "--on-conflict", "fail")
    skipped = tool("put", folder / "2.feather", "X", "--on-conflict", "skip")
    assert "skipped" in skipped.stdout
    assert store.client.get_name("X") == first
    usage = store.usage()
    tool("put", folder / "3.feather", "X")
    assert pd.read_feather(mount / "X.feather")["v"].tolist() == [3]
    assert store.client.get_name("X") != first and not store.client.exists(first)
    assert abs(store.usage() - usage) < 4096, "the replaced value is freed"


def test_put_of_wrong_bytes_loses_nothing(store, mount, tool, folder):
    whole = folder / "w.arrow"
    with pa.ipc.new_file(whole, pa.schema([("a", pa.int64())])) as writer:
        writer.write_table(pa.table({"a": range(1000)}))
    tool("put", whole)
    usage = store.usage()
    (folder / "cut.arrow").write_bytes(whole.read_bytes()[:-100])
    assert "plain file" in tool("put", folder / "cut.arrow", "w").stdout
    assert (mount / "w.arrow").read_bytes() == (folder / "cut.arrow").read_bytes()
    tool("put", whole)
    (folder / "none.arrow").write_bytes(b"")
    assert "empty" in fails(tool, "put", folder / "none.arrow", "w")
    assert "is a directory" in fails(tool, "put", folder, "w")
    assert "No such file" in fails(tool, "put", folder / "absent", "w")
    huge = folder / "huge.bin"
    with open(huge, "wb") as file:
        file.truncate(64 << 30)
    assert "larger than the whole store" in fails(tool, "put", huge)
    assert store.usage() == usage and (mount / "w.arrow").read_bytes() == whole.read_bytes()
    (folder / "text.arrow").write_bytes(b"no arrow at all")
    result = tool("put", folder / "text.arrow", "other.arrow")
    assert "warning" in result.stderr and result.stdout.startswith("other.arrow: plain file")
    assert (mount / "other.arrow").read_bytes() == b"no arrow at all"


def test_rm_frees_the_memory_and_names_what_is_like_a_wrong_name(store, tool):
    empty = store.usage()
    for name in ["X_train", "X_test", "run/1/a", "run/1/b", "run/2/a"]:
        store.put(name, frame(1000))
    gone = store.put("gone", np.arange(9.0))
    store.client.delete(gone)
    line = fails(tool, "rm", "X_trian", )
    assert "no dataset" in line and '"X_train"' in line
    assert fails(tool, "rm", "absent", "X_test.parquet").count("absent") == 1
    assert "X_test" not in names(store), "the rest is removed all the same"
    assert "is a directory" in fails(tool, "rm", "run/1")
    tool("rm", "--prefix", "run/1/")
    assert names(store) == {"X_train", "run/2/a", "gone"}
    fails(tool, "rm", "--prefix", "run/1/")
    fails(tool, "rm", "--prefix", "")
    tool("rm", "X_train.arrow", "run/2/a", "gone")
    assert names(store) == set()
    assert store.usage() == empty


def test_mv_gives_another_name_and_replaces_only_if_told(store, mount, tool):
    data = frame(50)
    store.put("old", data)
    store.put("other", frame(9, seed=1))
    id = store.client.get_name("old")
    tool("mv", "old", "new")
    assert names(store) == {"new", "other"} and store.client.get_name("new") == id
    tool("mv", "new.arrow", "deep/er/")
    assert names(store) == {"deep/er/new", "other"}
    tool("mv", "deep/er/new", "named.arrow")
    assert names(store) == {"named", "other"}
    pd.testing.assert_frame_equal(pd.read_feather(mount / "named.arrow"), data)
    assert "exists already" in fails(tool, "mv", "named", "other", "--on-conflict", "fail")
    assert "skipped" in tool("mv", "named", "other", "--on-conflict", "skip").stdout
    assert names(store) == {"named", "other"}
    replaced = store.client.get_name("other")
    tool("mv", "named", "other")
    assert names(store) == {"other"} and not store.client.exists(replaced)
    pd.testing.assert_frame_equal(store.client.get(name="other"), data)
    assert ".npy" in fails(tool, "mv", "other", "other.npy")
    (mount / "notes").write_bytes(b"text")
    # Within a tick of the clock a mount looks at a file again after its close.
    time.sleep(0.2)
    tool("mv", "notes", "notes.txt")
    assert (mount / "notes.txt").read_bytes() == b"text" and not (mount / "notes").exists()


def test_a_plain_file_that_gets_a_views_extension_becomes_a_dataset(store, mount, tool):
    with pa.ipc.new_file(mount / "t.tmp", pa.schema([("a", pa.int64())])) as writer:
        writer.write_table(pa.table({"a": [4, 5]}))
    bytes = (mount / "t.tmp").read_bytes()
    mount.unmount()
    tool("mv", "t.tmp", "t.arrow")
    assert names(store) == {"t"}
    entry = json.loads(tool("ls", "--json").stdout)[0]
    assert (entry["rows"], entry["type"]) == (2, "vineyard::Table")
    got = subprocess.run([BINARY, "get", "t", "-o", "-", "--socket", store.socket], stdout=subprocess.PIPE, check=True)
    assert got.stdout == bytes


def test_the_store_is_found(store, mount, folder):
    store.put("x", np.arange(3.0))
    clean = {key: value for key, value in os.environ.items() if key != "VINEYARD_IPC_SOCKET"}
    # That of a variable before that of a mount; a path on a mount is a dataset too.
    assert cli("ls", env={**clean, "VINEYARD_IPC_SOCKET": store.socket}).stdout == "x.npy\n"
    line = fails(cli, "ls", "--socket", folder / "absent.sock")
    assert "no vineyardd answers" in line and "--socket" in line
    # Other mounts of this machine are not there for the command.
    others = [line.split(" ")[4] for line in open("/proc/self/mountinfo") if "fuse.vineyard-fs" in line]
    others.remove(str(mount.path))
    if others and os.geteuid() != 0:
        pytest.skip("there are other mounts, which only root can hide from a command")
    alone = ["unshare", "--mount", "sh", "-c", 'program=$1; shift; for other in "$@"; do umount -l "$other"; done; exec "$program" ls']
    command = [*alone, "sh", BINARY, *others] if others else [BINARY, "ls"]
    assert subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60, check=True).stdout == "x.npy\n"
    name = json.loads(cli("info", mount / "x.npy", "--json", "--socket", store.socket).stdout)["name"]
    assert name == "x"
    freeze(store.process.pid)
    started = time.monotonic()
    assert "no vineyardd answers" in fails(cli, "ls", "--socket", store.socket)
    assert time.monotonic() - started < 40


def test_a_terminal_sees_a_progress_bar_and_a_pipe_does_not(store, tool, folder):
    store.put("big", np.zeros(30_000_000))
    assert tool("get", "big", "-o", folder / "a.npy").stderr == ""
    ours, theirs = pty.openpty()
    command = [BINARY, "get", "big", "-o", folder / "b.npy", "--socket", store.socket]
    process = subprocess.Popen(command, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:
        pass
    assert process.wait() == 0
    assert b"big [" in shown and (b"MiB/s" in shown or b"GiB/s" in shown), shown
    assert (folder / "a.npy").read_bytes() == (folder / "b.npy").read_bytes()


def test_an_interrupted_get_leaves_nothing(store, folder):
    store.put("big", np.zeros(90_000_000))
    command = [BINARY, "get", "big", "-o", folder / "big.npy", "--socket", store.socket]
    for _ in range(10):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not list(folder.glob(".vineyard-fs-*")) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        if process.returncode != 0:
            break
        # It was faster.
        (folder / "big.npy").unlink()
    assert process.returncode == 1 and "interrupted" in said
    assert not list(folder.glob(".vineyard-fs-*")) and not (folder / "big.npy").exists()
