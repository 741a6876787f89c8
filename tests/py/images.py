"""Compare image files with the tables they show.

usage: images.py make DIRECTORY    write pandas frames as pandas-NAME.expected (Arrow streams)
       images.py check DIRECTORY   compare

For each NAME.expected (Arrow stream), the directory may have NAME.arrow and NAME.parquet. Every reader must see equal
values. Prints one line per difference, then "checked A arrow, P parquet; ..." and by whom; exits with 1 if
there was a difference, or if pyarrow does not read its own files of more than a few of the tables.
"""

import math
import pathlib
import sys

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

try:
    import polars as pl
except ImportError:
    pl = None
try:
    import duckdb
except ImportError:
    duckdb = None

problems = []


def frames():
    """pandas frames whose index, names and dtypes are to come back."""
    import numpy as np
    import pandas as pd

    rows = 1000
    numbers = np.random.default_rng(5)
    words = pd.Series(["a", "longer", None, "", "é"] * (rows // 5))
    yield "mixed", pd.DataFrame(
        {
            "f": numbers.normal(size=rows),
            "i": numbers.integers(-9, 9, rows),
            "small": numbers.integers(0, 200, rows).astype("uint8"),
            "b": numbers.integers(0, 2, rows).astype(bool),
            "s": words,
            "full": ["x", "yy"] * (rows // 2),
            "category": words.astype("category"),
            "nullable": pd.array([1, None] * (rows // 2), dtype="Int16"),
            "t": pd.date_range("2020-01-01", periods=rows, freq="s", unit="ns"),
            "zone": pd.date_range("2020-01-01", periods=rows, freq="s", tz="Europe/Paris", unit="us"),
            "delta": pd.to_timedelta(np.arange(rows), unit="s"),
            "nan": np.where(np.arange(rows) % 3 == 0, np.nan, 1.0),
        },
        index=pd.Index(numbers.permutation(rows), name="id"),
    )
    yield "shuffled", pd.DataFrame({"x": numbers.normal(size=rows)}, index=numbers.permutation(rows))
    yield "multi", pd.DataFrame(
        {"x": [1.0, 2.0, 3.0, 4.0]}, index=pd.MultiIndex.from_product([["a", "b"], [1, 2]], names=["l", None])
    )
    yield "range", pd.DataFrame({"x": [1, 2, 3]}, index=pd.RangeIndex(5, 11, 2))
    yield "empty", pd.DataFrame({"x": pd.Series([], dtype="float64"), "s": pd.Series([], dtype="str")})
    yield "period", pd.DataFrame({"p": pd.period_range("2020-01", periods=5, freq="M")})


def make(directory):
    for name, frame in frames():
        table = pa.Table.from_pandas(frame)
        with pa.ipc.new_stream(f"{directory}/pandas-{name}.expected", table.schema) as writer:
            writer.write_table(table, max_chunksize=300)


def check_frames(directory):
    import pandas as pd

    for name, frame in frames():
        for read, extension in ((pd.read_feather, "arrow"), (pd.read_parquet, "parquet")):
            path = pathlib.Path(directory, f"pandas-{name}.{extension}")
            try:
                pd.testing.assert_frame_equal(read(path), frame, check_freq=False)
            except Exception as error:
                problems.append(f"{path.name} pandas: {type(error).__name__}: {str(error)[:300]}")


def types_in(dtype):
    yield dtype
    if pa.types.is_dictionary(dtype):
        yield from types_in(dtype.value_type)
    for i in range(getattr(dtype, "num_fields", 0) or 0):
        yield from types_in(dtype.field(i).type)


def polars_reads(schema):
    """polars 2.1 panics on some Arrow types."""
    for field in schema:
        for t in types_in(field.type):
            name = str(t)
            if (
                "list_view" in name
                or "run_end" in name
                or "union" in name
                or "interval" in name
                or "decimal256" in name
                or pa.types.is_map(t)
            ):
                return False
            if pa.types.is_fixed_size_list(t) and t.list_size == 0:
                return False
            if pa.types.is_struct(t) and t.num_fields == 0:
                return False
            if pa.types.is_dictionary(t) and not (
                pa.types.is_string(t.value_type) or pa.types.is_large_string(t.value_type)
            ):
                return False
    return True


def duckdb_reads(schema):
    for field in schema:
        for t in types_in(field.type):
            # Parquet has no durations: DuckDB, which ignores ARROW:schema, reads integers. It has no half floats.
            if pa.types.is_null(t) or pa.types.is_decimal256(t) or pa.types.is_duration(t) or pa.types.is_float16(t):
                return False
    return True


def plain(value):
    """Python values with NaN made comparable."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def equal(a, b):
    if a.num_rows != b.num_rows or a.column_names != b.column_names:
        return False
    for x, y in zip(a.columns, b.columns):
        if x.type == y.type and x.equals(y):
            continue
        if [plain(v) for v in x.to_pylist()] != [plain(v) for v in y.to_pylist()]:
            return False
    return True


def through_polars(expected):
    """The table as polars has it; None where polars fails on the table itself."""
    if not (pl and expected.num_columns and polars_reads(expected.schema)):
        return None
    try:
        return from_polars(pl.from_arrow(expected))
    except BaseException:
        return None


def reads_own_parquet(expected):
    """False for the tables that pyarrow cannot read back from its own file (some nulls around fixed-size lists)."""
    buffer = pa.BufferOutputStream()
    try:
        pq.write_table(expected, buffer)
        return equal(pq.ParquetFile(buffer.getvalue()).read(), expected)
    except (pa.ArrowException, pa.ArrowIndexError):
        return False


def check(what, read, expected):
    try:
        same = equal(read(), expected)
    except BaseException as error:  # polars' panics are no Exception
        problems.append(f"{what}: {type(error).__name__}: {str(error)[:300]} | {expected.schema.to_string()[:300]!r}")
        return
    if not same:
        problems.append(f"{what}: values differ | {expected.schema.to_string(show_schema_metadata=False)[:300]!r}")


def from_polars(frame):
    return frame.to_arrow(compat_level=pl.CompatLevel.newest())


def main(directory):
    counts = {"arrow": 0, "parquet": 0}
    unread, by_polars, by_duckdb = 0, 0, 0
    for source in sorted(pathlib.Path(directory).glob("*.expected")):
        expected = pa.ipc.open_stream(pa.memory_map(str(source))).read_all()
        polars = through_polars(expected)
        arrow = source.with_suffix(".arrow")
        if arrow.exists():
            counts["arrow"] += 1

            def strict(path=arrow):
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
                table.validate(full=True)
                if not table.schema.equals(expected.schema, check_metadata=True):
                    raise ValueError(f"schema: {table.schema}")
                return table

            check(f"{arrow.name} pyarrow", strict, expected)
            check(f"{arrow.name} feather", lambda p=arrow: pyarrow.feather.read_table(p, memory_map=False), expected)
            if polars:
                by_polars += 1
                check(f"{arrow.name} polars", lambda p=arrow: from_polars(pl.read_ipc(p)), polars)
        parquet = source.with_suffix(".parquet")
        if parquet.exists():
            counts["parquet"] += 1
            before = len(problems)
            check(f"{parquet.name} pyarrow", lambda p=parquet: pq.ParquetFile(p).read(), expected)
            own = len(problems) == before or reads_own_parquet(expected)
            if not own:
                unread += 1
                del problems[before:]
            metadata = pq.ParquetFile(parquet).metadata
            for key in (b"ARROW:schema", *(expected.schema.metadata or {})):
                if key not in (metadata.metadata or {}):
                    problems.append(f"{parquet.name}: no {key!r}")
            if polars:
                check(f"{parquet.name} polars", lambda p=parquet: from_polars(pl.read_parquet(p)), polars)
            if own and duckdb and duckdb_reads(expected.schema) and expected.num_columns:
                by_duckdb += 1
                check(
                    f"{parquet.name} duckdb",
                    lambda p=parquet: duckdb.sql(f"from read_parquet('{p}')").to_arrow_table()
                    if hasattr(duckdb.sql("select 1"), "to_arrow_table")
                    else duckdb.sql(f"from read_parquet('{p}')").arrow(),
                    pq.ParquetFile(parquet).read(),
                )
    if list(pathlib.Path(directory).glob("pandas-*.expected")):
        check_frames(directory)
    # Few of the tables are such that pyarrow does not read its own file of them.
    if unread * 20 > counts["parquet"]:
        problems.append(f"{unread} of {counts['parquet']} Parquet files were not compared: pyarrow does not read its own")
    for problem in problems:
        print(problem)
    print(f"checked {counts['arrow']} arrow, {counts['parquet']} parquet; {unread} not by pyarrow, {by_polars} also by polars, {by_duckdb} by DuckDB")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit({"make": make, "check": main}[sys.argv[1]](sys.argv[2]))
