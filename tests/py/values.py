"""Values of many kinds, as the official client stores them, and what a reader of their files must find.

The expectation is computed from the value alone. Where the official client itself stores less than it was given, the
case says so: `lost` names the columns of which it keeps only the first cell.
"""

import dataclasses
import datetime
import decimal
import io
import typing

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa


@dataclasses.dataclass
class Case:
    """One value, the file that shows it, and what is in that file."""

    name: str
    value: typing.Any
    extension: str
    expected: typing.Any = None
    lost: tuple = ()
    metadata: typing.Any = None

    def __post_init__(self):
        if self.expected is None:
            self.expected = self.value

    @property
    def file(self) -> str:
        return f"{self.name}.{self.extension}"


def through_arrow(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame as pandas has it after a local Arrow file: what a file can tell of dtypes, and no more."""
    sink = io.BytesIO()
    table = pa.Table.from_pandas(frame, preserve_index=True)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    sink.seek(0)
    return pd.read_feather(sink)


def objects(*values) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def iris(rng) -> list[Case]:
    """A frame like the iris data set, split as scikit-learn's `train_test_split` does it: with a shuffled index."""
    n = 150
    columns = ["sepal_length", "sepal_width", "petal_length", "petal_width"]
    data = pd.DataFrame(rng.normal(4, 2, (n, 4)).round(1), columns=columns)
    species = pd.Series(objects(*np.repeat(["setosa", "versicolor", "virginica"], 50)), name="species")
    order = rng.permutation(n)
    train, test = order[:120], order[120:]
    cases = [Case("X_train", data.iloc[train], "arrow"), Case("X_test", data.iloc[test], "arrow")]
    for name, part in [("y_train", train), ("y_test", test)]:
        series = species.iloc[part]
        cases.append(Case(name, series, "arrow", series.to_frame()))
    return cases


def frames(rng) -> list[Case]:
    n = 50
    stamps = pd.date_range("2024-02-28 23:59:59.123456", periods=n, freq="7h")
    strings = objects(*[f"zeile {i} äöü 雪 🌍" for i in range(n)])
    gaps = objects(*[None if i % 7 == 3 else f"s{i}" for i in range(n)])
    numbers = np.arange(n)
    lost = pd.DataFrame({"kept": numbers * 1.5})
    cases = [
        Case("f_ints", pd.DataFrame({d: rng.integers(0, 100, n).astype(d) for d in "i1 i2 i4 i8 u1 u2 u4 u8".split()}), "arrow"),
        Case("f_int_limits", pd.DataFrame({d: [np.iinfo(d).min, 0, np.iinfo(d).max] for d in ["int64", "uint64", "int8"]}, dtype=object).astype({"int64": "i8", "uint64": "u8", "int8": "i1"}), "arrow"),
        Case("f_floats", pd.DataFrame({"f4": rng.random(n).astype("f4"), "f8": np.where(numbers % 5 == 0, np.nan, rng.random(n)), "inf": np.where(numbers % 2, np.inf, -np.inf)}), "arrow"),
        Case("f_float16", pd.DataFrame({"h": rng.random(n).astype("f2")}), "arrow"),
        Case("f_bool", pd.DataFrame({"a": numbers % 3 == 0, "b": np.ones(n, bool)}), "arrow"),
        Case("f_strings", pd.DataFrame({"s": pd.Series(strings, dtype=object), "gaps": pd.Series(gaps, dtype=object), "n": numbers}), "arrow"),
        Case("f_datetimes", pd.DataFrame({u: stamps.as_unit(u).where(numbers % 9 != 4) for u in ["ns", "us", "ms", "s"]}), "arrow"),
        Case("f_zoned", pd.DataFrame({"utc": stamps.tz_localize("UTC"), "rome": stamps.tz_localize("UTC").tz_convert("Europe/Rome"), "n": numbers}), "arrow"),
        Case("f_timedelta", pd.DataFrame({"d": pd.to_timedelta(numbers, unit="min"), "n": numbers}), "arrow"),
        Case("f_zero_rows", pd.DataFrame({"a": np.array([], "f8"), "b": np.array([], "i4")}), "arrow"),
        Case("f_no_columns", pd.DataFrame(index=[5, 7, 9]), "arrow"),
        Case("f_empty", pd.DataFrame(), "arrow"),
        Case("f_named_index", pd.DataFrame({"a": numbers * 0.5}, index=pd.Index(numbers[::-1].copy(), name="id")), "arrow"),
        Case("f_datetime_index", pd.DataFrame({"a": numbers * 0.5}, index=stamps), "arrow"),
        Case("f_timedelta_index", pd.DataFrame({"a": numbers * 0.5}, index=pd.to_timedelta(numbers, unit="h")), "arrow"),
        Case("f_float_index", pd.DataFrame({"a": numbers}, index=numbers / 4), "arrow"),
        Case("f_string_index", pd.DataFrame({"a": numbers}, index=[f"k{i}" for i in range(n)]), "arrow"),
        Case("f_object_index", pd.DataFrame({"a": numbers}, index=pd.Index([f"k{i}" for i in range(n)], dtype=object)), "arrow"),
        # The official client stores the tuples of the index, and not the names of its levels.
        Case(
            "f_multiindex",
            pd.DataFrame({"a": numbers}, index=pd.MultiIndex.from_product([range(10), list("abcde")], names=["i", "s"])),
            "arrow",
            expected=pd.DataFrame({"a": numbers}, index=pd.MultiIndex.from_product([range(10), list("abcde")])),
        ),
        Case("f_multicolumns", pd.DataFrame(rng.random((5, 4)), columns=pd.MultiIndex.from_product([["a", "b"], ["x", "y"]])), "arrow"),
        Case("f_int_labels", pd.DataFrame(rng.random((5, 3))), "arrow"),
        Case("f_odd_labels", pd.DataFrame({"": [1.0, 2], "a b": [3.0, 4], "Größe": [5.0, 6], "__index_level_0__": [7.0, 8]}), "arrow"),
        Case("f_hundred", pd.DataFrame(rng.random((n, 100)), columns=[f"c{i}" for i in range(100)]), "arrow"),
        Case("f_large", pd.DataFrame({"a": rng.random(300_000), "b": rng.integers(0, 9, 300_000), "s": pd.Series(objects(*map(str, range(300_000))), dtype=object)}), "arrow"),
        # Only the first cell of these columns is in the store: the others are readable, and these carry a note.
        Case("f_lost_str", lost.assign(s=pd.Series([f"s{i}" for i in numbers], dtype="str")), "arrow", lost=("s",)),
        Case("f_lost_category", lost.assign(c=pd.Categorical(list("ab") * (n // 2))), "arrow", lost=("c",)),
        Case("f_lost_nullable", lost.assign(i=pd.array(numbers, dtype="Int64"), b=pd.array(numbers > 3, dtype="boolean")), "arrow", lost=("i", "b")),
        Case("f_lost_pyarrow", lost.assign(p=pd.array(numbers, dtype="int64[pyarrow]")), "arrow", lost=("p",)),
    ]
    return cases


def series(rng) -> list[Case]:
    stamps = pd.date_range("2024-01-01", periods=30, freq="D")
    return [
        Case("s_float", s := pd.Series(rng.random(30), name="v"), "arrow", s.to_frame()),
        Case("s_unnamed", s := pd.Series(rng.integers(0, 9, 30)), "arrow", s.to_frame()),
        Case("s_str", s := pd.Series([f"x{i}" for i in range(30)], name="t"), "arrow", s.to_frame().astype(object)),
        Case("s_datetime", s := pd.Series(stamps, name="t"), "arrow", s.to_frame()),
        Case("s_empty", s := pd.Series([], dtype="f8", name="e"), "arrow", s.to_frame()),
    ]


def tensors(rng) -> list[Case]:
    cases = []
    for dtype in "i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16 ?".split():
        name = np.dtype(dtype).name
        cases.append(Case(f"t_{name}", rng.integers(0, 2 if dtype == "?" else 100, 17).astype(dtype), "npy"))
    cases += [
        Case("t_matrix", rng.random((7, 3)), "npy"),
        Case("t_cube", rng.integers(0, 99, (3, 4, 5)).astype("i2"), "npy"),
        Case("t_five", rng.random((2, 1, 3, 1, 2)).astype("f4"), "npy"),
        Case("t_fortran", np.asfortranarray(rng.random((6, 4))), "npy"),
        Case("t_point", np.array(2.5), "npy"),
        Case("t_empty", np.zeros((0, 4)), "npy"),
        Case("t_datetime", np.arange(20).astype("M8[us]"), "npy"),
        Case("t_timedelta", np.arange(20).astype("m8[ns]"), "npy"),
        Case("t_large", rng.random((500, 400)), "npy"),
    ]
    words = objects("a", "", "雪", None, "end")
    cases.append(Case("t_words", words, "arrow", pd.DataFrame({0: pd.Series(words, dtype=object)})))
    return cases


def arrow_values(rng) -> list[Case]:
    """Arrow values. The client widens the offsets of strings and lists to 64 bits; nothing else may change."""

    def array(name, value, expected=None):
        return Case(name, value, "arrow", pa.table([value if expected is None else expected], names=["value"]))

    ints = pa.array([1, None, 3, 4, None, 6], pa.int64())
    stamps = [datetime.datetime(2024, 2, 29, 1, 2, 3, 456789), None]
    table = pa.table({"i": ints, "f": pa.array(rng.random(6)), "s": pa.array(["a", None, "", "d", "雪", "f"], pa.large_string())})
    return [
        array("a_int", ints),
        array("a_int_sliced", pa.array(range(100), pa.int32())[13:77]),
        array("a_bool", pa.array([True, None, False] * 9)),
        array("a_bool_sliced", pa.array([True, None, False] * 9)[5:20]),
        array("a_string", s := pa.array(["x", None, "", "雪"]), s.cast(pa.large_string())),
        array("a_string_sliced", s[1:], s[1:].cast(pa.large_string())),
        array("a_large_binary", pa.array([b"\0\xff", None, b""], pa.large_binary())),
        array("a_list", v := pa.array([[1, 2], None, [], [3]]), v.cast(pa.large_list(pa.int64()))),
        array("a_null", pa.nulls(5)),
        array("a_float", pa.array([1.5, None], pa.float32())),
        array("a_halffloat", pa.array([np.float16(1.5), None], pa.float16())),
        array("a_date", pa.array([datetime.date(2024, 2, 29), None], pa.date32())),
        array("a_timestamp", pa.array(stamps, pa.timestamp("us", tz="UTC"))),
        array("a_time", pa.array([datetime.time(1, 2, 3), None], pa.time64("us"))),
        array("a_duration", pa.array([datetime.timedelta(seconds=5), None], pa.duration("ms"))),
        Case("p_table", table, "arrow"),
        Case("p_chunks", pa.concat_tables([table, table.slice(2, 3), table]), "arrow"),
        Case("p_batch", table.to_batches()[0], "arrow", table),
        Case("p_temporal", pa.table({"t": pa.array(stamps, pa.timestamp("us")), "d": pa.array([1, 2], pa.date32())}), "arrow"),
        Case("p_metadata", table.replace_schema_metadata({"k": "v"}), "arrow", metadata={b"k": b"v"}),
        Case("p_no_rows", table.slice(0, 0), "arrow"),
        Case("p_polars", pl.from_arrow(table), "arrow", table),
    ]


def others() -> list[Case]:
    """Values without a table form."""
    return [
        Case("v_int", -7, "json"),
        Case("v_float", 2.5, "json"),
        Case("v_text", 'Größe "quoted"\n雪', "json"),
        Case("v_true", True, "json"),
        Case("v_list", [1, 2.5, "three"], "json"),
        Case("v_nested", (1, ("two", [3, 4])), "json", [1, ["two", [3, 4]]]),
        Case("v_empty", [], "json"),
        Case("k_dict", {"a": 1, "b": [1, 2, {"c": None}]}, "pkl"),
        Case("k_none", None, "pkl"),
        Case("k_bytes", bytearray(range(256)) * 300, "pkl"),
        Case("k_set", {1, 2, 3}, "pkl"),
        Case("k_decimal", decimal.Decimal("3.14"), "pkl"),
        Case("k_when", datetime.datetime(2024, 2, 29, 12), "pkl"),
        Case("k_frames", {"a": np.arange(5), "b": "x"}, "pkl"),
    ]


def cases() -> list[Case]:
    rng = np.random.default_rng(7)
    return [*iris(rng), *frames(rng), *series(rng), *tensors(rng), *arrow_values(rng), *others()]
