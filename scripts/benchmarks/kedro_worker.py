"""Saves and loads what the nodes of a pipeline hand on, with Kedro's own datasets. Runs with a project's interpreter.

The pipeline is that of vineyard's house-prices benchmark: outliers → target, and outliers → drop → fill → total, over
a frame of 81 mixed columns with nulls. Prints one line of JSON: seconds by node for each round.
"""

import gc
import json
import pathlib
import sys
import time

import numpy as np
import pandas as pd

ROWS = 1460


def houses(scale: int) -> pd.DataFrame:
    """38 numeric columns and 43 of few strings, some null, as the public data has them."""
    rng = np.random.default_rng(7)
    rows = ROWS * scale
    columns = {"Id": np.arange(rows)}
    for number in range(37):
        values = rng.integers(0, 10_000, rows)
        columns[f"n{number}"] = np.where(rng.random(rows) < 0.1, np.nan, values) if number % 12 == 0 else values
    for number in range(43):
        words = np.array([f"{word}{number}" for word in ("Ex", "Gd", "TA", "Fa", "Po")], dtype=object)
        values = words[rng.integers(0, 5, rows)]
        if number % 3 == 0:
            values = np.where(rng.random(rows) < 0.2, None, values)
        columns[f"s{number}"] = values
    return pd.DataFrame(columns)


def pandas_datasets():
    try:
        from kedro_datasets import pandas as datasets
        from kedro_datasets import pickle
    except ImportError:
        from kedro.extras.datasets import pandas as datasets
        from kedro.extras.datasets import pickle
    one = lambda module, name: getattr(module, name, None) or getattr(module, name.replace("Dataset", "DataSet"))
    return one(datasets, "FeatherDataset"), one(datasets, "CSVDataset"), one(pickle, "PickleDataset")


def maker(kind: str, folder: str):
    """A function that makes the dataset of a name anew, as each process of a pipeline does."""
    if kind == "official":
        from vineyard.contrib.kedro.io.dataset import VineyardDataSet

        return lambda name, _: VineyardDataSet(ds_name=name, vineyard_ipc_socket=folder)
    feather, csv, pickle = pandas_datasets()
    path = lambda name, extension: str(pathlib.Path(folder) / f"{name}.{extension}")
    pickled = lambda name: pickle(filepath=path(name, "pkl"), save_args={"protocol": 5})
    if kind == "csv":
        return lambda name, _: csv(filepath=path(name, "csv"), save_args={"index": False})
    if kind == "pickle":
        return lambda name, _: pickled(name)
    # What `vineyard-fs kedro catalog create` writes.
    return lambda name, frame: feather(filepath=path(name, "arrow"), save_args={"compression": "uncompressed"}) if frame else pickled(name)


def run(make, value):
    """One run; every node loads its input and saves its output with datasets of its own."""
    taken = {}

    def node(name, source, work):
        loading = 0.0
        if source:
            gc.collect()
            start = time.perf_counter()
            data = make(source, True).load()
            loading = time.perf_counter() - start
        else:
            data = value
        out = work(data)
        gc.collect()
        start = time.perf_counter()
        make(name, isinstance(out, pd.DataFrame)).save(out)
        taken[name] = (loading, time.perf_counter() - start)

    node("outliers", None, lambda frame: frame[frame["n1"] < 9_990].reset_index(drop=True))
    node("target", "outliers", lambda frame: frame["n2"])
    node("dropped", "outliers", lambda frame: frame.drop(columns=["Id", "n2"]))
    node("filled", "dropped", lambda frame: frame.fillna({name: "None" for name in frame if name.startswith("s")}))
    node("total", "filled", lambda frame: frame.assign(total=frame["n3"] + frame["n4"]))
    return taken


def main():
    kind, folder, scale, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    make, value = maker(kind, folder), houses(scale)
    results = [run(make, value) for _ in range(rounds)]
    loaded = make("total", True).load()
    if kind != "csv" and kind != "official":
        expected = make("filled", True).load()
        assert loaded.drop(columns="total").equals(expected) and len(loaded) > 1000 * scale
    print(json.dumps({"rounds": results, "bytes": int(value.memory_usage(deep=True).sum()), "pandas": pd.__version__}))


main()
