"""Writes files, and compares what vineyard's official client gets after they were published.

    official.py write DIR
    official.py check DIR SOCKET
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather


def frames():
    n = 1000
    base = pd.DataFrame(
        {
            "i": np.arange(n, dtype="int32"),
            "f": np.where(np.arange(n) % 7 == 1, np.nan, np.arange(n) / 3),
            "b": np.arange(n) % 3 == 0,
            "u": np.arange(n, dtype="uint8"),
        }
    )
    yield "plain", base
    yield "indexed", base.set_index(pd.Index(np.arange(n)[::-1] * 2, name="key"))
    yield "unnamed_index", base.set_index(pd.Index(np.arange(n)[::-1] * 2))
    yield "range", base.set_index(pd.RangeIndex(5, 5 + 3 * n, 3, name="r"))
    shuffled = np.random.default_rng(0).permutation(n)
    yield "shuffled", base.set_index(pd.Index(shuffled, name="key"))
    yield "dates", base.set_index(pd.date_range("2020-01-01", periods=n, freq="s", unit="us").rename("when"))
    for unit in ["ms", "us", "ns"]:
        times = pd.Series(pd.date_range("2020-01-01", periods=n, freq="s", unit=unit))
        berlin = times.dt.tz_localize("Europe/Berlin", ambiguous=False, nonexistent="shift_forward")
        yield f"times_{unit}", base.assign(t=times, z=berlin, u=times.dt.tz_localize("UTC"))
        yield f"nat_{unit}", base.assign(t=times.where(times.index % 3 > 0), z=berlin.where(times.index % 4 > 0))
    yield "single", base[:1]
    yield "empty", base[:0]
    text = pd.Series([None if i % 4 == 2 else f"wört {i}" for i in range(n)], dtype=object)
    yield "objects", base.assign(s=text)


def tables():
    ints = pa.array([1, None, 3] * 50, pa.int64())
    text = pa.array(["a", None, "grün"] * 50, pa.string())
    flags = pa.array([True, None, False] * 50)
    lists = pa.array([[1, 2], None, []] * 50, pa.list_(pa.int64()))
    table = pa.table({"i": ints, "s": text, "b": flags, "l": lists})
    yield "table", table
    yield "batches", pa.concat_tables([table, table.slice(7, 40), table])
    yield "no_rows", table.slice(0, 0)
    yield "strings", pa.Table.from_pandas(pd.DataFrame({"s": pd.Series(["x", None, "z"], dtype="str"), "i": [1, 2, 3]}))


def arrays():
    yield "matrix", np.arange(12.0).reshape(3, 4)
    yield "fortran", np.asfortranarray(np.arange(24, dtype="<i2").reshape(2, 3, 4))
    yield "vector", np.arange(5) % 2 == 0
    yield "times", np.array(["2020-01-01", "NaT"], dtype="<M8[ns]")
    yield "scalar", np.array(1.5)
    yield "nothing", np.zeros((0, 3), "f4")


PICKLED = {"a": [1, 2, {"b": None}], "c": np.arange(3)}


def write(folder):
    for name, frame in frames():
        frame.to_feather(folder / f"{name}.feather", compression="uncompressed")
        frame.to_feather(folder / f"{name}_lz4.feather", compression="lz4")
        frame.to_feather(folder / f"{name}_chunks.feather", compression="zstd", chunksize=64)
        frame.to_parquet(folder / f"{name}_pq.parquet")
    for name, table in tables():
        feather.write_feather(table, str(folder / f"{name}.arrow"), compression="uncompressed")
        with pa.ipc.new_stream(str(folder / f"{name}_stream.arrow"), table.schema) as writer:
            writer.write_table(table)
    for name, array in arrays():
        np.save(folder / f"{name}.npy", array)
    write_others(folder)
    pd.to_pickle(PICKLED, folder / "pickled.pkl", compression=None)


def write_others(folder):
    """Files that the official client can't show; the Rust side compares them with what it reads back."""
    import polars as pl

    n = 3000
    text = ["long enough to leave the view" if i % 3 else None if i % 2 else f"kürz{i}" for i in range(n)]
    frame = pl.DataFrame({"s": text, "i": range(n), "l": [[i, None] for i in range(n)]}).with_columns(
        c=pl.col("s").cast(pl.Categorical), d=pl.lit("2020-01-01").str.to_datetime(), e=pl.lit(True)
    )
    frame.write_ipc(folder / "other_polars.arrow")
    frame.write_ipc(folder / "other_polars_zstd.arrow", compression="zstd")
    frame.write_parquet(folder / "other_polars_pq.parquet")
    typed = pd.DataFrame(
        {
            "cat": pd.Categorical(["a", None, "b"] * 1000),
            "tz": pd.date_range("2020", periods=n, tz="Europe/Berlin"),
            "delta": pd.to_timedelta(np.arange(n), unit="s"),
            "nullable": pd.array([1, None, 3] * 1000, dtype="Int64"),
            "text": pd.Series(["x", None, "z"] * 1000, dtype="str"),
            "period": pd.period_range("2020-01", periods=n, freq="M"),
            "lists": [[1.5, 2.5]] * n,
        },
        index=pd.MultiIndex.from_arrays([np.arange(n), ["k"] * n], names=["x", None]),
    )
    typed.to_feather(folder / "other_typed.feather", compression="uncompressed")
    typed.to_feather(folder / "other_typed_lz4.feather")
    typed.to_parquet(folder / "other_typed_pq.parquet")


def large(table):
    types = [
        pa.large_string() if f.type == pa.string() else pa.large_list(f.type.value_type) if pa.types.is_list(f.type) else f.type
        for f in table.schema
    ]
    return table.cast(pa.schema([f.with_type(t) for f, t in zip(table.schema, types)]))


def same_frame(name, actual, frame):
    pd.testing.assert_frame_equal(actual, frame, check_freq=False)


def check(folder, socket):
    import vineyard

    client = vineyard.connect(socket)
    failed = 0

    def compare(name, compare):
        nonlocal failed
        try:
            compare(client.get(client.get_name(name)))
            print("ok    ", name)
        except Exception as error:  # every case is reported
            failed += 1
            print("FAILED", name, type(error).__name__, str(error)[:300])

    for name, frame in frames():
        for suffix in ["", "_lz4", "_chunks", "_pq"]:
            compare(name + suffix, lambda actual: same_frame(name + suffix, actual, frame))
    for name, table in tables():
        def same_table(actual):
            expected = large(table)
            assert actual.schema.equals(expected.schema), f"{actual.schema} {expected.schema}"
            assert actual.combine_chunks().equals(expected.combine_chunks()), f"{actual} {expected}"
        compare(name, same_table)
        compare(name + "_stream", same_table)
    for name, array in arrays():
        def same_array(actual):
            assert actual.dtype == array.dtype and actual.shape == array.shape, f"{actual.dtype} {actual.shape}"
            np.testing.assert_array_equal(np.asarray(actual), array)
        compare(name, same_array)
    def same_value(actual):
        assert actual.keys() == PICKLED.keys() and actual["a"] == PICKLED["a"] and (actual["c"] == PICKLED["c"]).all()
    compare("pickled", same_value)
    sys.exit(failed > 0)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        check(Path(sys.argv[2]), sys.argv[3])
