"""Tables of every Arrow type through a real mount: written as Arrow and as Parquet, by pyarrow and by polars, read back
byte for byte through the view that was written, and equal through every other one; by the mount that wrote them, by
another one over the same store, and after mounting again.

VINEYARD_FS_TYPES_ROUNDS tables are made, VINEYARD_FS_TYPES_SEED is the seed of the first. A file's name begins with the
seed of its table.
"""

import hashlib
import os
import random

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

import random_tables as tables
from table_files import Made, files, read_arrow

ROUNDS = int(os.environ.get("VINEYARD_FS_TYPES_ROUNDS", "40"))
SEED = int(os.environ.get("VINEYARD_FS_TYPES_SEED", "0"))
# So many tables share a store and its mounts.
BATCH = 20


def save(path, data: bytes, rng: random.Random):
    with open(path, "wb", buffering=0) as file:
        step = rng.choice([len(data) or 1, 4096, 1000])
        for at in range(0, len(data), step):
            file.write(data[at : at + step])


def digest(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parquet_difference(path, made: Made, expected: pa.Table) -> str | None:
    """Compares the columns that pyarrow can bring through Parquet at all."""
    file = pq.ParquetFile(path)
    # Columns of runs pyarrow does not write, and reads what is written for them.
    runs = [i for i, dtype in enumerate(expected.schema.types) if pa.types.is_run_end_encoded(dtype)]
    readable = [i for i in sorted({*made.parquet, *runs}) if expected.column_names.count(expected.column_names[i]) == 1]
    if len(readable) < expected.num_columns:
        names = file.schema_arrow.names
        if names != expected.column_names or file.metadata.num_rows != expected.num_rows:
            return f"{file.metadata.num_rows} rows of {names}"
    if not readable:
        return None
    # A nested column is asked for by its leaves: a name with a dot in it would be taken for a path.
    return tables.difference(file.read(columns=[expected.column_names[i] for i in readable]), expected.select(readable))


def lacks_parquet(dtype: pa.DataType) -> bool:
    """Whether Parquet has no such type: then the table has no Parquet view."""
    if pa.types.is_run_end_encoded(dtype) and not pa.types.is_nested(dtype.value_type):
        return lacks_parquet(dtype.value_type)
    name = str(dtype)
    if any(word in name for word in ("union", "run_end", "interval", "decimal128(5, -3)", "[0]")):
        return True
    children = [dtype.field(i).type for i in range(dtype.num_fields)]
    return pa.types.is_struct(dtype) and not children or any(map(lacks_parquet, children))


def view_problem(path, view: str, made: Made, expected: pa.Table) -> str | None:
    if view == "parquet":
        lacking = any(map(lacks_parquet, expected.schema.types))
        if path.exists() == lacking:
            return "there is no such view" if not lacking else "there is a view that cannot be"
        if lacking:
            return None
        if where := parquet_difference(path, made, expected):
            return where
    else:
        found = read_arrow(path.read_bytes())
        zones = lambda table: [getattr(dtype, "tz", None) for dtype in table.schema.types]
        if zones(found) != zones(expected):
            return f"zones {zones(found)}, expected {zones(expected)}"
        if not made.file.endswith("parquet") and not tables.same_schema(found.schema, expected.schema):
            return f"schema {found.schema}, expected {expected.schema}"
        if where := tables.difference(found, expected):
            return where
    return None


def check_views(mount, made: Made, folder) -> list[str]:
    stem, _, suffix = made.file.rpartition(".")
    expected = made.expected(folder)
    problems = []
    for view in ("arrow", "feather", "parquet"):
        path = mount / f"{stem}.{view}"
        try:
            problem = view_problem(path, view, made, expected) if view != suffix else None
            if made.polars and not problem:
                read = pl.read_parquet if suffix == "parquet" else pl.read_ipc
                frame = read(folder / made.file)
                found = pl.read_parquet(path) if view == "parquet" else pl.read_ipc(path)
                if not found.equals(frame):
                    problem = f"polars reads other values: {found}, expected {frame}"
        except BaseException as error:  # polars' panics are no Exception
            if isinstance(error, (KeyboardInterrupt, pytest.fail.Exception)):
                raise
            problem = f"{type(error).__name__}: {error}"
        if problem:
            problems.append(f"{made.file} as {view}: {problem}")
    return problems


@pytest.mark.parametrize("first", range(SEED, SEED + ROUNDS, BATCH))
def test_every_type(make_mount, store, tmp_path, first):
    made = files(tmp_path, first, min(first + BATCH, SEED + ROUNDS))
    assert made
    problems: list[str] = []

    def check(mount, when, views=True):
        for one in made:
            try:
                found = digest(mount / one.file)
            except OSError as error:
                problems.append(f"{when}: {one.file}: {error}")
                continue
            if found != one.digest:
                problems.append(f"{when}: {one.file}: other bytes")
            if views:
                problems.extend(f"{when}: {problem}" for problem in check_views(mount, one, tmp_path))

    mount = make_mount(*([] if first // BATCH % 2 == 0 else ["--serve", "lazy"]), name="first")
    for one in made:
        save(mount / one.file, (tmp_path / one.file).read_bytes(), random.Random(one.seed))
    problems += [f"warning: {line}" for line in mount.status()["fs"]["warnings"]]
    check(mount, "at once")
    second = make_mount(name="second")
    check(second, "on a second mount")
    second.unmount()
    mount.unmount()
    again = make_mount(name="again")
    check(again, "after mounting again", views=False)
    for one in made:
        (again / one.file).unlink(missing_ok=True)
    if left := os.listdir(again.path):
        problems.append(f"{left} are left in the mount")
    if usage := store.usage():
        problems.append(f"{usage} bytes are left in the store")
    print(f"{len(made)} files of {len({one.seed for one in made})} tables")
    assert not problems, f"{len(problems)} problems\n" + "\n".join(problem[:600] for problem in problems[:60])


@pytest.mark.parametrize("first", ["arrow", "parquet"])
def test_identifiers_and_json_are_known_as_such_through_every_view(mount, first):
    table = pa.table({
        "id": pa.array([bytes(range(16)), None, b"\xff" * 16], pa.uuid()),
        "doc": pa.array(['{"a": 1}', None, "[]"], pa.json_()),
        "of": pa.ListArray.from_arrays([0, 1, 1, 3], pa.array([bytes(16), b"1" * 16, bytes(range(16))], pa.uuid())),
    })
    if first == "parquet":
        pq.write_table(table, mount / "ids.parquet")
    else:
        pa.feather.write_feather(table, mount / "ids.arrow", compression="uncompressed")
    for found in (pa.feather.read_table(mount / "ids.arrow"), pq.read_table(mount / "ids.parquet")):
        assert found.schema.types == table.schema.types and found.equals(table)
    select = f"select id::text, of[1]::text, typeof(id), typeof(doc), typeof(of) from '{mount / 'ids.parquet'}'"
    rows = duckdb.sql(select).fetchall()
    assert {row[2:] for row in rows} == {("UUID", "JSON", "UUID[]")}
    assert [row[0] for row in rows] == ["00010203-0405-0607-0809-0a0b0c0d0e0f", None, "ffffffff-ffff-ffff-ffff-ffffffffffff"]


def test_runs_are_values_to_those_who_read_parquet(mount):
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([3, 5, 100_000], pa.int32()), pa.array(["a", None, "ö"]))
    pa.feather.write_feather(pa.table({"runs": runs}), mount / "r.arrow", compression="uncompressed")
    values = ["a"] * 3 + [None] * 2 + ["ö"] * 99_995
    assert pq.read_table(mount / "r.parquet")["runs"].to_pylist() == values
    assert pl.read_parquet(mount / "r.parquet")["runs"].to_list() == values
    counted = duckdb.sql(f"select runs, count(*) from '{mount / 'r.parquet'}' group by runs").fetchall()
    assert dict(counted) == {"a": 3, None: 2, "ö": 99_995}
    assert (mount / "r.parquet").stat().st_size < 2000
    # What a few bytes stand for has no end: such a file is kept, and has no Parquet view.
    bomb = pa.table({"runs": pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 1], pa.int32()), pa.array(["x"]))})
    with pa.OSFile(str(mount / "bomb.arrow"), "wb") as file, pa.ipc.new_file(file, bomb.schema) as writer:
        writer.write_table(bomb)
    assert pa.ipc.open_file(mount / "bomb.arrow").get_batch(0).num_rows == 2**31 - 1
    assert not (mount / "bomb.parquet").exists()
