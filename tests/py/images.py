"""Compare image files with the tables they show.

usage: images.py DIRECTORY

For each N.expected (Arrow stream), the directory may have N.arrow and N.parquet. Every reader must see equal values.
Prints one line per difference, then "checked A arrow, P parquet"; exits with 1 if there was a difference.
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
            if pa.types.is_float16(t) or pa.types.is_null(t) or pa.types.is_decimal256(t):
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
    for source in sorted(pathlib.Path(directory).glob("*.expected")):
        expected = pa.ipc.open_stream(pa.memory_map(str(source))).read_all()
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
            if pl and polars_reads(expected.schema) and expected.num_columns:
                check(f"{arrow.name} polars", lambda p=arrow: from_polars(pl.read_ipc(p)), from_polars(pl.from_arrow(expected)))
        parquet = source.with_suffix(".parquet")
        if parquet.exists():
            counts["parquet"] += 1
            check(f"{parquet.name} pyarrow", lambda p=parquet: pq.ParquetFile(p).read(), expected)
            metadata = pq.ParquetFile(parquet).metadata
            for key in (b"ARROW:schema", *(expected.schema.metadata or {})):
                if key not in (metadata.metadata or {}):
                    problems.append(f"{parquet.name}: no {key!r}")
            if pl and polars_reads(expected.schema) and expected.num_columns:
                check(f"{parquet.name} polars", lambda p=parquet: from_polars(pl.read_parquet(p)), from_polars(pl.from_arrow(expected)))
            if duckdb and duckdb_reads(expected.schema) and expected.num_columns:
                check(
                    f"{parquet.name} duckdb",
                    lambda p=parquet: duckdb.sql(f"from read_parquet('{p}')").to_arrow_table()
                    if hasattr(duckdb.sql("select 1"), "to_arrow_table")
                    else duckdb.sql(f"from read_parquet('{p}')").arrow(),
                    pq.ParquetFile(parquet).read(),
                )
    for problem in problems:
        print(problem)
    print(f"checked {counts['arrow']} arrow, {counts['parquet']} parquet")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
