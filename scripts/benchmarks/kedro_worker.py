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


def flowers() -> pd.DataFrame:
    """150 rows of four lengths around one centre for each of three kinds, as the iris data has them."""
    rng = np.random.default_rng(7)
    centres = {"setosa": (5.0, 3.4, 1.5, 0.2), "versicolor": (5.9, 2.8, 4.3, 1.3), "virginica": (6.6, 3.0, 5.6, 2.0)}
    names = ["sepal_length", "sepal_width", "petal_length", "petal_width"]
    parts = [pd.DataFrame(centre + rng.normal(0, 0.3, (50, 4)), columns=names).assign(species=kind) for kind, centre in centres.items()]
    return pd.concat(parts, ignore_index=True)


def run_iris(make, value):
    """As `run`: Kedro's iris pipeline, whose nodes split the data, look for the nearest neighbour, and count what is right."""
    taken = {}

    def node(name, sources, targets, work):
        gc.collect()
        start = time.perf_counter()
        data = [make(source, frame).load() for source, frame in sources]
        loading = time.perf_counter() - start
        out = work(*data)
        gc.collect()
        start = time.perf_counter()
        for (target, frame), part in zip(targets, out):
            make(target, frame).save(part)
        taken[name] = (loading, time.perf_counter() - start)

    train = value.sample(frac=0.8, random_state=3)
    test = value.drop(train.index)
    features, kind = list(value.columns[:4]), "species"

    def nearest(train, test, kinds):
        distances = ((test.to_numpy()[:, None] - train.to_numpy()[None]) ** 2).sum(2)
        return [pd.Series(kinds.to_numpy()[distances.argmin(1)], index=test.index, name=kind)]

    series = [("y_train", False), ("y_test", False)]
    split = lambda: (train[features].reset_index(drop=True), test[features].reset_index(drop=True), train[kind], test[kind])
    node("split", [], [("X_train", True), ("X_test", True), *series], split)
    node("predict", [("X_train", True), ("X_test", True), series[0]], [("y_pred", False)], nearest)
    node("report", [("y_pred", False), series[1]], [("accuracy", False)], lambda guess, truth: [float((guess.to_numpy() == truth.to_numpy()).mean())])
    assert make("accuracy", False).load() > 0.8
    return taken


def main():
    kind, folder, scale, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    make = maker(kind, folder)
    if scale == 0:
        value, make_csv = flowers(), make
        if kind == "csv":
            # What is no frame stays a pickle, as in the pipeline's own catalog.
            make = lambda name, frame: make_csv(name, frame) if frame else maker("pickle", folder)(name, frame)
        results = [run_iris(make, value) for _ in range(rounds)]
        print(json.dumps({"rounds": results, "bytes": int(value.memory_usage(deep=True).sum()), "pandas": pd.__version__}))
        return
    value = houses(scale)
    results = [run(make, value) for _ in range(rounds)]
    loaded = make("total", True).load()
    if kind != "csv" and kind != "official":
        expected = make("filled", True).load()
        assert loaded.drop(columns="total").equals(expected) and len(loaded) > 1000 * scale
    print(json.dumps({"rounds": results, "bytes": int(value.memory_usage(deep=True).sum()), "pandas": pd.__version__}))


main()
