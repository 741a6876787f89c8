"""Everything that flows through real pipelines: namespaces, mixed frames, polars, numpy, a model, chunks."""

import functools
import logging
from typing import Optional

import numpy as np
import pandas as pd
import polars as pl
from kedro.pipeline import node, pipeline
from sklearn.linear_model import LogisticRegression


def mixed_frame(data: pd.DataFrame) -> pd.DataFrame:
    frame = data.copy()
    frame["when"] = pd.date_range("2024-01-01", periods=len(frame), freq="h", tz="Europe/Berlin")
    frame["bucket"] = pd.Categorical(np.where(frame["petal_width"] > 1, "wide", "narrow"))
    frame["count"] = pd.array([None if number % 7 == 0 else number for number in range(len(frame))], dtype="Int64")
    frame["note"] = [None if number % 5 == 0 else "flower %d" % number for number in range(len(frame))]
    return frame.set_index(pd.Index(range(1000, 1000 + len(frame)), name="key")).sample(frac=1, random_state=0)


def twice_named(data: pd.DataFrame) -> pd.DataFrame:
    """A frame that Feather refuses: two columns of one name."""
    return pd.concat([data[["petal_width"]], data[["petal_width"]]], axis=1)


def to_polars(data: pd.DataFrame) -> pl.DataFrame:
    return pl.DataFrame({name: data[name].to_list() for name in ("petal_width", "petal_length", "species")})


def lazily(data: pl.DataFrame) -> pl.LazyFrame:
    return data.lazy().filter(pl.col("petal_width") > 1)


def features(data: pd.DataFrame) -> np.ndarray:
    return data[["petal_width", "petal_length"]].to_numpy()


def scale(values: np.ndarray, factor: float) -> np.ndarray:
    return values * factor


def unannotated(data):
    return {"rows": len(data), "species": sorted(data["species"].unique())}


def fit(values: np.ndarray, data: Optional[pd.DataFrame]) -> LogisticRegression:
    return LogisticRegression(max_iter=500).fit(values, data["species"])


def score(model: LogisticRegression, values: np.ndarray, data: pd.DataFrame) -> float:
    return float(model.score(values, data["species"]))


def chunks(data: pd.DataFrame):
    for start in range(0, len(data), 50):
        yield data.iloc[start : start + 50]


def count_chunk(chunk: pd.DataFrame) -> int:
    return len(chunk)


def totals(wide: pl.DataFrame, narrow: pd.DataFrame, lazy: pl.LazyFrame, twice: pd.DataFrame) -> int:
    return wide.height + len(narrow) + lazy.collect().height + twice.shape[1]


def report(result: float, total: int, summary: dict, last_chunk: int) -> None:
    logging.getLogger(__name__).info("score %.3f total %d rows %d last %d", result, total, summary["rows"], last_chunk)


def create_pipeline():
    model = pipeline(
        [
            node(features, "data", "features", name="features"),
            node(functools.partial(scale, factor=2.0), "features", "scaled", name="scale"),
            node(fit, ["scaled", "data"], "model", name="fit"),
            node(score, ["model", "scaled", "data"], "score", name="score"),
        ]
    )
    inner = pipeline(model, namespace="inner", inputs={"data"}, outputs={"score"})
    outer = pipeline(inner, namespace="outer", inputs={"data": "mixed"}, outputs={"score": "final score"})
    rest = pipeline(
        [
            node(mixed_frame, "example_iris_data", "mixed", name="mixed_frame"),
            node(twice_named, "mixed", "twice", name="twice_named"),
            node(to_polars, "mixed", "wide", name="to_polars"),
            node(lazily, "wide", "lazy", name="lazily"),
            node(unannotated, "mixed", "summary", name="unannotated"),
            node(chunks, "mixed", "chunk", name="chunks", tags="chunked"),
            node(count_chunk, "chunk", "last_chunk", name="count_chunk", tags="chunked"),
            node(totals, ["wide", "mixed", "lazy", "twice"], "total", name="totals"),
            node(report, ["final score", "total", "summary", "last_chunk"], None, name="report"),
        ]
    )
    return outer + rest
