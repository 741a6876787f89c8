"""The demo's steps inside a mount: each says what it does, does it, and checks it."""

import json
import pathlib
import subprocess
import sys
import time

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import vineyard

folder = pathlib.Path(sys.argv[1])
status = json.loads(subprocess.run(["vineyard-fs", "status", folder, "--json"], check=True, capture_output=True).stdout)
names = set()


def step(text: str):
    print(f"\n# {text}", flush=True)


def check(what: str, equal: bool):
    print(f"  {what}: {'equal' if equal else 'NOT EQUAL'}", flush=True)
    if not equal:
        sys.exit(f"demo: {what} is not equal")


def say(command: str, value=""):
    print(f"  {command}", flush=True)
    if str(value):
        print("    " + str(value).replace("\n", "\n    "), flush=True)


def new(name: str) -> pathlib.Path:
    """A file for a dataset that is removed at the end, and is none of somebody else's."""
    path = folder / name
    if path.exists():
        sys.exit(f"demo: {path} exists already")
    names.add(path)
    return path


def main():
    rng = np.random.default_rng(0)
    columns = ["sepal_length", "sepal_width", "petal_length", "petal_width"]
    flowers = pd.DataFrame(rng.normal(4, 1, (150, 4)).round(1), columns=columns)
    train = flowers.sample(frac=0.8, random_state=1)

    client = vineyard.connect(status["store"]["socket"])
    if client.list_names("demo_*"):
        sys.exit("demo: the store has datasets named demo_ already")

    step("pandas saves a frame as a file; vineyard has the dataset")
    path = new("demo_X_train.arrow")
    train.to_feather(path)
    say(f"X_train.to_feather('{path}')")
    got = client.get(name="demo_X_train")
    say("client.get(name='demo_X_train')", got.head(3))
    check("what vineyard's official client gets", got.equals(train))

    step("pandas loads it, with its shuffled index")
    loaded = pd.read_feather(path)
    say(f"pd.read_feather('{path}')")
    check("the frame that was loaded", loaded.equals(train))

    step("the official client puts a frame; it is a file at once")
    prices = pd.DataFrame({"price": rng.random(1_000_000), "count": rng.integers(0, 100, 1_000_000)})
    path = new("demo_prices.arrow")
    client.put(prices, name="demo_prices", persist=True)
    say("client.put(prices, name='demo_prices', persist=True)")
    say(f"ls -l {folder}", subprocess.run(["ls", "-l", folder], check=True, capture_output=True, text=True).stdout.rstrip())
    check("what pandas reads", pd.read_feather(path).equals(prices))

    step("polars reads the same file, and DuckDB its Parquet view")
    start = time.perf_counter()
    total = pl.scan_ipc(path).select(pl.col("count").sum()).collect().item()
    say(f"pl.scan_ipc('{path}').select(pl.col('count').sum())", f"{total} in {(time.perf_counter() - start) * 1000:.0f} ms")
    check("polars' sum", total == prices["count"].sum())
    query = f"select count(*), sum(count) from '{path.with_suffix('.parquet')}' where price < 0.5"
    start = time.perf_counter()
    rows, summed = duckdb.sql(query).fetchall()[0]
    say(f'duckdb.sql("{query}")', f"({rows}, {summed}) in {(time.perf_counter() - start) * 1000:.0f} ms")
    cheap = prices[prices["price"] < 0.5]
    check("DuckDB's answer", (rows, summed) == (len(cheap), cheap["count"].sum()))

    step("pyarrow maps it: the columns are vineyard's shared memory or its page cache, nothing is decoded")
    start = time.perf_counter()
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    say(f"pa.ipc.open_file(pa.memory_map('{path}')).read_all()", f"{table.nbytes / 1e6:.0f} MB in {(time.perf_counter() - start) * 1000:.1f} ms")
    check("the mapped column", np.array_equal(table["price"].to_numpy(), prices["price"].to_numpy()))

    step("a reader keeps its version while the dataset is replaced")
    (prices * 2).to_feather(path)
    say(f"(prices * 2).to_feather('{path}')")
    check("the mapping from before", np.array_equal(table["price"].to_numpy(), prices["price"].to_numpy()))
    check("a new reader", pd.read_feather(path).equals(prices * 2))
    check("the official client", client.get(name="demo_prices").equals(prices * 2))

    step("any other file is kept as it is")
    notes = new("demo_notes.txt")
    notes.write_text("one\n")
    with open(notes, "a") as file:
        file.write("two\n")
    say(f"cat {notes}", notes.read_text().rstrip())
    check("the text", notes.read_text() == "one\ntwo\n")

    step("rm removes the dataset from vineyard")
    for path in sorted(names):
        path.unlink()
        say(f"rm {path}")
    check("the list of vineyard's names and an empty one", client.list_names("demo_*") == {})


try:
    main()
finally:
    for path in names:
        path.unlink(missing_ok=True)
