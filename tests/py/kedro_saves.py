"""Saves and loads through Kedro's own datasets, as a project does. Runs with an environment that has Kedro.

    kedro_saves.py save FOLDER    saves every example, and loads it again
    kedro_saves.py load FOLDER    loads what another call saved

Prints one line for each dataset and exits with 1 if a value came back different.
"""

import sys
import traceback

import ibis
import numpy as np
import pandas as pd
import polars as pl
from kedro.io import AbstractVersionedDataset, Version
from kedro_datasets.ibis import FileDataset
from kedro_datasets.json import JSONDataset
from kedro_datasets.pandas import CSVDataset, FeatherDataset, HDFDataset, ParquetDataset
from kedro_datasets.pandas import JSONDataset as PandasJSON
from kedro_datasets.partitions import IncrementalDataset, PartitionedDataset
from kedro_datasets.pickle import PickleDataset
from kedro_datasets.polars import EagerPolarsDataset, LazyPolarsDataset
from kedro_datasets.text import TextDataset

VERSION = "2026-01-01T00.00.00.000Z"


def rich():
    rows = 500
    return pd.DataFrame(
        {
            "f": np.arange(rows) / 3,
            "nan": np.where(np.arange(rows) % 4 == 0, np.nan, 1.5),
            "i": np.arange(rows, dtype="i2"),
            "b": np.arange(rows) % 2 == 0,
            "s": pd.Series([None if i % 7 == 0 else f"zeile {i}" for i in range(rows)], dtype="str"),
            "c": pd.Categorical(["x", "y", None, "x"] * (rows // 4)),
            "n": pd.array([1, None] * (rows // 2), dtype="Int64"),
            "t": pd.date_range("2020-01-01", periods=rows, freq="h", tz="Europe/Berlin", unit="us"),
            "d": pd.to_timedelta(np.arange(rows), unit="s"),
        },
        index=pd.Index(np.arange(rows)[::-1], name="id"),
    )


def plain():
    return pd.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "s": ["x", "y", "z"]})


def frames_equal(found, expected):
    pd.testing.assert_frame_equal(found, expected, check_freq=False)


def polars_equal(found, expected):
    found = found.collect() if isinstance(found, pl.LazyFrame) else found
    expected = expected.collect() if isinstance(expected, pl.LazyFrame) else expected
    from polars.testing import assert_frame_equal

    assert_frame_equal(found, expected)


def same(found, expected):
    assert found == expected, (found, expected)


def ibis_equal(found, expected):
    frames_equal(found.order_by("a").to_pandas(), expected.order_by("a").to_pandas())


def partitions_equal(found, expected):
    assert sorted(found) == sorted(expected)
    for name, load in found.items():
        frames_equal(load() if callable(load) else load, expected[name])


def examples(folder):
    """Name, dataset, value, and how to compare."""
    version = Version(VERSION, VERSION)
    at = lambda name: f"{folder}/{name}"
    yield "feather", FeatherDataset(filepath=at("feather.arrow")), rich(), frames_equal
    yield "feather uncompressed", FeatherDataset(filepath=at("plain.arrow"), save_args={"compression": "uncompressed"}), rich(), frames_equal
    yield "feather versioned", FeatherDataset(filepath=at("versioned.arrow"), version=version), rich(), frames_equal
    yield "parquet", ParquetDataset(filepath=at("parquet.parquet")), rich(), frames_equal
    yield "parquet versioned", ParquetDataset(filepath=at("versioned.parquet"), version=version), rich(), frames_equal
    yield "csv", CSVDataset(filepath=at("csv.csv")), plain(), frames_equal
    yield "json", PandasJSON(filepath=at("frame.json")), plain(), frames_equal
    yield "hdf5", HDFDataset(filepath=at("frame.h5"), key="data"), rich()[["f", "nan", "i", "b"]], frames_equal
    for backend in ("pickle", "cloudpickle"):
        yield f"{backend} of a frame", PickleDataset(filepath=at(f"{backend}.pkl"), backend=backend), rich(), frames_equal
    value = {"model": list(range(100)), "name": "x", "nested": {"a": (1, 2)}}
    yield "pickle of a value", PickleDataset(filepath=at("value.pkl")), value, same
    yield "pickle versioned", PickleDataset(filepath=at("versioned.pkl"), version=version), value, same
    yield "json of a value", JSONDataset(filepath=at("value.json")), {"a": [1, 2.5, None], "b": "ü"}, same
    yield "text", TextDataset(filepath=at("notes.txt")), "Größe\n" * 100, same
    frame = pl.from_pandas(rich().drop(columns=["c"]).reset_index())
    yield "polars ipc", EagerPolarsDataset(filepath=at("polars.arrow"), file_format="ipc"), frame, polars_equal
    yield "polars parquet", EagerPolarsDataset(filepath=at("polars.parquet"), file_format="parquet"), frame, polars_equal
    yield "lazy polars", LazyPolarsDataset(filepath=at("lazy.parquet"), file_format="parquet"), frame.lazy(), polars_equal
    table = ibis.memtable(plain())
    yield "ibis parquet", FileDataset(filepath=at("ibis.parquet"), file_format="parquet", connection={"backend": "duckdb"}), table, ibis_equal
    yield "ibis csv", FileDataset(filepath=at("ibis.csv"), file_format="csv", connection={"backend": "duckdb"}), table, ibis_equal
    parts = {f"part-{i}": rich().iloc[i * 100 : (i + 1) * 100] for i in range(4)}
    yield (
        "partitioned feather",
        PartitionedDataset(path=at("parts"), dataset=FeatherDataset, filename_suffix=".arrow"),
        parts,
        partitions_equal,
    )
    yield (
        "partitioned parquet, lazy, overwrite",
        PartitionedDataset(path=at("lazy-parts"), dataset=ParquetDataset, filename_suffix=".parquet", overwrite=True),
        {name: (lambda part=part: part) for name, part in parts.items()},
        lambda found, _: partitions_equal(found, parts),
    )
    yield (
        "incremental csv",
        IncrementalDataset(path=at("increments"), dataset=CSVDataset, filename_suffix=".csv"),
        {"2026-01": plain(), "2026-02": plain()},
        partitions_equal,
    )


def main(what, folder):
    failed = 0
    for name, dataset, value, compare in examples(folder):
        try:
            if what == "save":
                for _ in range(1 if isinstance(dataset, AbstractVersionedDataset) and dataset._version else 2):
                    dataset.save(value)
                    compare(dataset.load(), value)
            else:
                compare(dataset.load(), value)
            print("equal ", name)
        except Exception:  # every dataset is reported
            failed += 1
            print("FAILED", name, traceback.format_exc(limit=-3)[-1200:])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
