"""What the official client puts, every program reads from the mount, equal."""

import json
import pathlib
import pickle
import subprocess
import tempfile
import shutil

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

import images
import values
from conftest import Mount, Store, unmount_all

NOTE = b"vineyard_fs:note"
CASES = {case.name: case for case in values.cases()}


@pytest.fixture(scope="module")
def filled():
    """One store with every value, mounted in both ways to serve."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="vfs-"))
    store = Store(folder)
    mounts = {}
    try:
        for case in CASES.values():
            store.put(case.name, case.value)
        mounts["passthrough"] = Mount(folder / "passthrough", store)
        mounts["requests"] = Mount(folder / "requests", store, "--serve", "lazy")
        yield mounts
    finally:
        try:
            unmount_all(mounts.values())
        finally:
            store.stop()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["passthrough", "requests"])
def served(request, filled):
    return filled[request.param]


def named(extension):
    return pytest.mark.parametrize("case", [case for case in CASES.values() if case.extension == extension], ids=lambda c: c.name)


def test_there_are_enough_kinds():
    assert {"X_train", "X_test", "y_train", "y_test"} <= set(CASES)
    assert len(CASES) >= 64


def test_the_listing_shows_each_value_once(served):
    listed = sorted(entry.name for entry in served.path.iterdir())
    assert listed == sorted(case.file for case in CASES.values())


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_copies_equal_second_reads(served, case, tmp_path):
    """`cp`, then `cmp` with a second read; the size is the one that `stat` tells."""
    source, copy = served / case.file, tmp_path / "copy"
    size = source.stat().st_size
    subprocess.run(["cp", source, copy], check=True)
    assert copy.stat().st_size == size
    subprocess.run(["cmp", source, copy], check=True)
    status = source.stat()
    assert status.st_blocks * 512 >= status.st_size


def arrow_tables(path):
    """The table by mapping and by reading."""
    with pa.memory_map(str(path)) as mapped, pa.OSFile(str(path)) as file:
        tables = [pa.ipc.open_file(mapped).read_all(), pa.ipc.open_file(file).read_all()]
    for table in tables:
        table.validate(full=True)
    assert tables[0].schema.equals(tables[1].schema, check_metadata=True)
    assert images.equal(tables[0], tables[1])
    return tables[0]


def compare_frames(found: pd.DataFrame, expected: pd.DataFrame):
    # The store does not know of which type the labels of no columns are.
    label_type = "equiv" if len(expected.columns) else False
    expected = values.through_arrow(expected)
    pd.testing.assert_frame_equal(found, expected, check_exact=True, check_freq=False, check_column_type=label_type)


@named("arrow")
def test_tables_by_pyarrow_and_pandas(served, case):
    path = served / case.file
    table = arrow_tables(path)
    noted = {field.name for field in table.schema if NOTE in (field.metadata or {})}
    assert noted == set(case.lost), "columns that are not what was put carry a note, and no others"
    feather = [pyarrow.feather.read_table(path, memory_map=flag) for flag in (True, False)]
    assert all(images.equal(table, other) for other in feather)
    if isinstance(case.expected, pd.DataFrame):
        kept = case.expected.drop(columns=list(case.lost))
        compare_frames(pd.read_feather(path).drop(columns=list(case.lost)), kept)
        if len(kept.columns):
            some = [str(label) for label in kept.columns[:2]] if kept.columns.nlevels == 1 else None
            if some:
                found = pd.read_feather(path, columns=some)
                assert [str(label) for label in found.columns] == some
    else:
        expected = case.expected if isinstance(case.expected, pa.Table) else pa.Table.from_batches([case.expected])
        assert [(f.name, f.type) for f in table.schema] == [(f.name, f.type) for f in expected.schema]
        assert images.equal(table, expected)
        for key, value in (case.metadata or {}).items():
            assert table.schema.metadata[key] == value


@named("arrow")
def test_tables_by_polars(served, case):
    path = served / case.file
    table = arrow_tables(path)
    if not images.polars_reads(table.schema) or not table.num_columns:
        pytest.skip("polars has no such type")
    # polars names a column without a name, but only if it does not come from a file.
    expected = images.from_polars(pl.from_arrow(table)).rename_columns(table.column_names)
    assert images.equal(images.from_polars(pl.read_ipc(path)), expected)
    assert images.equal(images.from_polars(pl.scan_ipc(path).collect()), expected)
    with open(path, "rb") as file:
        assert images.equal(images.from_polars(pl.read_ipc(file)), expected)


def by_duckdb(query: str, **tables) -> pa.Table:
    connection = duckdb.connect()
    for name, table in tables.items():
        connection.register(name, table)
    return connection.sql(query).to_arrow_table()


@named("arrow")
def test_tables_by_duckdb(served, case):
    """DuckDB reads Arrow files through pyarrow, and the Parquet view by itself."""
    path = served / case.file
    table = arrow_tables(path)
    if not images.duckdb_reads(table.schema) or not table.num_columns:
        pytest.skip("DuckDB has no such type")
    expected = by_duckdb("from t", t=table)
    dataset = pyarrow.dataset.dataset(path, format="ipc")
    assert images.equal(by_duckdb("from t", t=dataset), expected)
    parquet = path.with_suffix(".parquet")
    found = by_duckdb(f"from read_parquet('{parquet}')")
    if "" not in table.column_names:  # DuckDB makes up a name for it, another one each time
        assert found.column_names == expected.column_names
    assert found.num_rows == expected.num_rows
    assert images.equal(by_duckdb("from t", t=pq.ParquetFile(parquet).read()), expected)


@named("arrow")
def test_every_table_that_the_official_client_stores_has_a_parquet_view(served, case):
    path = served / case.file
    metadata = pq.ParquetFile(path.with_suffix(".parquet")).metadata
    table = arrow_tables(path)
    assert (metadata.num_rows, pq.ParquetFile(path.with_suffix(".parquet")).schema_arrow.names) == (table.num_rows, table.column_names)


def test_types_that_parquet_does_not_have(mount):
    numbers = pa.array([1, 1, 2])
    columns = {
        "interval": pa.array([pa.MonthDayNano([1, 2, 3])] * 3, pa.month_day_nano_interval()),
        "runs": pa.RunEndEncodedArray.from_arrays(pa.array([1, 3], pa.int32()), pa.array([7, 8])),
        "union": pa.UnionArray.from_sparse(pa.array([0, 0, 1], pa.int8()), [numbers, pa.array(["a", "b", "c"])]),
    }
    for name, column in columns.items():
        table = pa.table({"n": numbers, name: column})
        with pa.ipc.new_file(str(mount / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
        assert arrow_tables(mount / f"{name}.arrow").equals(table)
        assert not (mount / f"{name}.parquet").exists(), name
    assert sorted(path.name for path in mount.path.iterdir()) == sorted(f"{name}.arrow" for name in columns)


@named("npy")
def test_tensors(served, case):
    path = served / case.file
    for mode in (None, "r"):
        if mode and not case.expected.size:
            continue  # numpy cannot map an array without elements
        found = np.load(path, mmap_mode=mode)
        assert found.dtype == case.expected.dtype
        assert found.shape == case.expected.shape
        np.testing.assert_array_equal(found, case.expected)
    arrow = path.with_suffix(".arrow")
    if case.expected.ndim in (1, 2) and case.expected.dtype.kind not in "c":
        frame = pd.read_feather(arrow)
        assert frame.shape == (case.expected.shape[0], case.expected.size // max(1, case.expected.shape[0]) if case.expected.shape[0] else case.expected.shape[-1])
        for column in range(frame.shape[1]):
            expected = case.expected if case.expected.ndim == 1 else case.expected[:, column]
            np.testing.assert_array_equal(frame.iloc[:, column].to_numpy(), expected)


@named("json")
def test_plain_values(served, case):
    assert json.loads((served / case.file).read_text()) == case.expected


@named("pkl")
def test_pickles(served, case):
    with open(served / case.file, "rb") as file:
        found = pickle.load(file)
    if isinstance(found, dict):
        assert found.keys() == case.expected.keys()
        for key, value in case.expected.items():
            np.testing.assert_array_equal(found[key], value) if isinstance(value, np.ndarray) else None
            assert isinstance(value, np.ndarray) or found[key] == value
    else:
        assert found == case.expected
        assert type(found) is type(case.expected)
