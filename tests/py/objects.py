"""Puts values with the official vineyard client, and keeps what the store then holds as fixtures.

    python tests/py/objects.py SOCKET OUT_DIR        # writes one JSON file for each value
    python tests/py/objects.py --check DIR           # DIR/NAME.arrow read with pandas equals the value

A fixture has the object's metadata, its blobs, and the table that the object means (an Arrow IPC stream).
"""

import base64
import datetime
import io
import json
import os
import pickle
import socket
import struct
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather


def values():
    """Name -> (value, expected table or None where the Rust test looks at the value itself, frame or None)."""
    out = {}

    def add(name, value, table=None, frame=None):
        out[name] = (value, table, frame)

    def frame(name, df, types=None, back=None, index=True):
        """A frame, the Arrow types it must have where pyarrow's own differ, and what pandas must read back."""
        source = df if back is None else back
        flat = source.copy()
        if isinstance(flat.columns, pd.MultiIndex):
            flat.columns = [str(tuple(map(str, c))) for c in flat.columns]
        else:
            flat.columns = [str(c) if c is not None else "None" for c in flat.columns]
        columns = {}
        arrays = [(c, flat.iloc[:, i]) for i, c in enumerate(flat.columns)]
        for level in range(flat.index.nlevels if index else 0):
            level_values = flat.index.get_level_values(level)
            label = level_values.name if level_values.name not in (None, *flat.columns) else f"__index_level_{level}__"
            arrays.append((label, level_values.to_series()))
        fields, data = [], []
        for label, series in arrays:
            wanted = (types or {}).get(label)
            if series.dtype == object and wanted is None and all(isinstance(v, str) or v is None for v in series):
                wanted = pa.large_string()
            array = pa.array(series, type=wanted, from_pandas=series.dtype.kind not in "fc")
            if isinstance(array, pa.ChunkedArray):
                array = array.combine_chunks()
            if isinstance(array, pa.ExtensionArray):
                array = array.storage
            fields.append(pa.field(label, array.type))
            data.append(array)
        add(name, df, pa.Table.from_arrays(data, schema=pa.schema(fields)), source)

    ls = pa.large_string()
    frame("frame_plain", pd.DataFrame({"a": np.arange(4), "b": [0.5, np.nan, -1.0, 2.0], "c": [True, False, True, True]}))
    frame("frame_shuffled", pd.DataFrame({"a": np.arange(6.0)}, index=[5, 3, 1, 0, 2, 4]))
    frame("frame_dtypes", pd.DataFrame({d: np.array([0, 1, 2], dtype=d) for d in
          ["i1", "i2", "i4", "u1", "u2", "u4", "u8", "f2", "f4"]}))
    frame("frame_object_strings", pd.DataFrame({"s": pd.Series(["a", None, "hé", ""], dtype=object)}))
    frame("frame_datetimes", pd.DataFrame({
        "ns": pd.to_datetime(["2020-01-01", None, "1960-05-06"]).as_unit("ns"),
        "us": pd.to_datetime(["2020-01-01", None, "1960-05-06"]).as_unit("us"),
        "utc": pd.to_datetime(["2020-01-01", None, "2021-01-01"]).tz_localize("UTC"),
        "berlin": pd.to_datetime(["2020-01-01", None, "2021-07-01"]).tz_localize("Europe/Berlin"),
        "offset": pd.to_datetime(["2020-01-01", None, "2021-07-01"]).tz_localize("+02:00"),
        "delta": pd.to_timedelta([1, None, 3], unit="s")}))
    frame("frame_period", pd.DataFrame({"p": pd.period_range("2020", periods=3, freq="M")}))
    frame("frame_object_kinds", pd.DataFrame({
        "ints": np.array([1, None, 3], dtype=object), "floats": np.array([1.5, None, 3.0], dtype=object),
        "bools": np.array([True, None, False], dtype=object), "bytes": np.array([b"a\xff", None, b""], dtype=object),
        "dates": np.array([datetime.date(2020, 2, 29), None, datetime.date(1969, 12, 31)], dtype=object)}),
        {"ints": pa.int64(), "floats": pa.float64(), "bools": pa.bool_(), "bytes": pa.large_binary()})
    lists = pd.DataFrame({"x": [1, 2, 3]})
    lists["l"] = pd.Series([[1, 2], [], [3]], dtype=object)
    frame("frame_lists", lists, {"l": pa.large_list(pa.int64())})
    cells = pd.DataFrame({"x": [1, 2]})
    cells["v"] = pd.Series([np.array([1.0, 2.0]), np.array([3.0])], dtype=object)
    frame("frame_array_cells", cells, {"v": pa.large_list(pa.float64())})
    frame("frame_int_labels", pd.DataFrame([[1, 2.5], [3, 4.5]]))
    frame("frame_float_labels", pd.DataFrame([[1, 2]], columns=[1.5, 2.0]))
    frame("frame_mixed_labels", pd.DataFrame([[1, 2]], columns=["a", 1]))
    frame("frame_duplicates", pd.DataFrame([[1, 2.5], [3, 4.5]], columns=["a", "a"]))
    frame("frame_multi_columns", pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)])))
    frame("frame_multi_index", pd.DataFrame({"v": [1, 2, 3]},
          index=pd.MultiIndex.from_tuples([("a", 1), ("b", 2), ("c", 3)])), {"__index_level_0__": ls})
    frame("frame_string_index", pd.DataFrame({"v": [1, 2]}, index=pd.Index(["x", "y"], name="k")), {"k": ls})
    frame("frame_name_clash", pd.DataFrame({"k": [1, 2]}, index=pd.Index([7, 8], name="k")))
    frame("frame_datetime_index", pd.DataFrame({"v": [1, 2]}, index=pd.to_datetime(["2020", "2021"])))
    frame("frame_zero_rows", pd.DataFrame({"a": np.array([], dtype="i8"), "b": np.array([], dtype="f8")}))
    frame("frame_no_columns", pd.DataFrame(index=[3, 4, 5]))
    frame("frame_empty", pd.DataFrame())
    frame("frame_sparse", pd.DataFrame({"s": pd.arrays.SparseArray([0, 0, 7, 0, 8])}),
          back=pd.DataFrame({"s": [0, 0, 7, 0, 8]}))
    frame("frame_complex", pd.DataFrame({"x": [1.0, 2.0]}))
    add("frame_lost_str", pd.DataFrame({"a": [1, 2], "s": ["x", "y"]}))
    add("frame_lost_category", pd.DataFrame({"a": [1, 2], "s": pd.Categorical(["x", "y"])}))
    add("frame_lost_int64", pd.DataFrame({"a": [1, 2], "s": pd.array([5, None], dtype="Int64")}))
    add("frame_mixed_objects", pd.DataFrame({"a": [1, 2], "s": np.array(["x", 1], dtype=object)}))

    def series(name, s, types=None, back=None):
        value = s if back is None else back
        frame(name, value.to_frame(0 if value.name is None else value.name), types)
        out[name] = (s, *out[name][1:])

    series("series_float", pd.Series([1.0, np.nan], name="n"))
    series("series_unnamed", pd.Series([1, 2]))
    series("series_str", pd.Series(["a", None, "c"], name="s"), {"s": ls})
    series("series_datetime", pd.Series(pd.to_datetime(["2020", None]), name="t"))
    series("series_tz", pd.Series(pd.to_datetime(["2020", "2021"]).tz_localize("Europe/Berlin"), name="t"))
    series("series_bool", pd.Series([True, False, True] * 5, name="b"))

    t = lambda **columns: pa.table(columns)
    add("index_named", pd.Index([4, 5], name="n"), t(n=pa.array([4, 5])))
    add("index_multi", pd.MultiIndex.from_tuples([(0, "a"), (1, "b")]),
        pa.Table.from_arrays([pa.array([0, 1]), pa.array(["a", "b"], ls)], names=["0", "1"]))
    add("tensor_1d", np.arange(5), pa.table({"0": pa.array(range(5))}))
    add("tensor_2d", np.arange(6, dtype="f4").reshape(3, 2),
        pa.table({"0": pa.array([0, 2, 4], pa.float32()), "1": pa.array([1, 3, 5], pa.float32())}))
    add("tensor_2d_bool", np.array([[True, False], [False, False], [True, True]]),
        pa.table({"0": [True, False, True], "1": [False, False, True]}))
    add("tensor_fortran", np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        pa.table({str(i): pa.array([i, i + 3.0]) for i in range(3)}))
    add("tensor_big_endian", np.array([1, 2, 300], dtype=">i4"), pa.table({"0": pa.array([1, 2, 300], pa.int32())}))
    add("tensor_complex", np.array([1 + 2j, 3 - 4j]),
        pa.table({"0": pa.array([[1.0, 2.0], [3.0, -4.0]], pa.list_(pa.field("item", pa.float64()), 2))}))
    add("tensor_days", np.array(["2020-01-01", "NaT"], dtype="M8[D]"),
        pa.table({"0": pa.array([datetime.datetime(2020, 1, 1), None], pa.timestamp("s"))}))
    add("tensor_strings", np.array(["a", "bcd"]), pa.table({"0": pa.array(["a", "bcd"], ls)}))
    add("tensor_bytes", np.array([b"ab", b"c"]), pa.table({"0": pa.array([b"ab", b"c\0"], pa.binary(2))}))
    add("tensor_0d", np.array(2.5))
    add("tensor_3d", np.arange(8).reshape(2, 2, 2))
    add("tensor_mixed", np.array(["a", 1, None], dtype=object))

    one = lambda a: pa.table({"value": a})
    wide = {pa.string(): ls, pa.binary(): pa.large_binary()}

    def array(name, a, expected=None):
        add(name, a, one(expected if expected is not None else a.cast(wide.get(a.type, a.type))))

    array("array_int64", pa.array([1, None, 3]))
    array("array_float", pa.array([1, None, 3], pa.float32()))
    array("array_half", pa.array(np.array([1, 2, 3], "f2")))
    array("array_bool_slice", pa.array([True, None, False, True, True, None, False, True, True, False, True]).slice(3, 7))
    array("array_int_slice", pa.array([1, None, 3, None, 5, 6, 7, 8, None, 10, 11, 12]).slice(2, 9))
    array("array_string", pa.array(["a", None, "ccc"]))
    array("array_string_slice", pa.array(["a", None, "ccc", "dd", None, "e"]).slice(2, 3))
    array("array_string_empty", pa.array([], pa.string()))
    array("array_large_binary", pa.array([b"a", None, b"\xff"], pa.large_binary()))
    array("array_timestamp_tz", pa.array([1, None, 3], pa.timestamp("us", tz="UTC")))
    array("array_date32", pa.array([1, None, 3], pa.date32()))
    array("array_date64", pa.array([0, None, 86400000], pa.date64()))
    array("array_time32", pa.array([1, None, 3], pa.time32("s")))
    array("array_time64", pa.array([1, None, 3], pa.time64("ns")))
    array("array_duration", pa.array([1, None, 3], pa.duration("ms")))
    array("array_list", pa.array([[1, 2], None, [3]]), pa.array([[1, 2], None, [3]], pa.large_list(pa.int64())))
    array("array_list_slice", pa.array([[1, 2], None, [3], [4, 5, 6]]).slice(1, 3),
          pa.array([None, [3], [4, 5, 6]], pa.large_list(pa.int64())))
    array("array_list_string", pa.array([["a"], None, ["b", "c"]]),
          pa.array([["a"], None, ["b", "c"]], pa.large_list(pa.large_string())))
    array("array_null", pa.nulls(3))
    add("array_struct_pickled", pa.array([{"a": 1}, None]))

    table = pa.table({"a": pa.array([1, None, 3]), "s": pa.array(["x", None, "z"]), "f": pa.array([1, 2, 3], pa.float32())},
                     metadata={"k": "v"})
    widen = lambda tb: tb.cast(pa.schema([f.with_type(wide.get(f.type, f.type)) for f in tb.schema], tb.schema.metadata))
    add("table_plain", table, widen(table))
    chunks = pa.concat_tables([table, table.slice(1)])
    add("table_chunks", chunks, widen(chunks))
    kinds = pa.table({
        "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": 3, "b": None}]),
        "bin": pa.array([b"a", None, b"c"]),
        "fixed": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2)),
        "dict": pa.array(["a", "b", "a"]).dictionary_encode(),
        "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64()))})
    wide_kinds = kinds.set_column(4, "map", pa.array([[{"key": "k", "value": 1}], None, []], pa.large_list(
        pa.field("entries", pa.struct([pa.field("key", pa.string(), False), pa.field("value", pa.int64())]), False))))
    add("table_pickled_kinds", kinds, wide_kinds)
    words = lambda *w: pa.table({"d": pa.array(w).dictionary_encode(), "i": list(range(len(w)))})
    add("table_dictionaries", pa.concat_tables([words("a", "b", None), words("b", "c")]),
        pa.concat_tables([words("a", "b", None), words("b", "c")]).unify_dictionaries())
    add("table_no_rows", table.slice(0, 0), widen(table.slice(0, 0)))
    pandas_table = pa.Table.from_pandas(pd.DataFrame({"a": [1, 2], "s": ["x", None]}, index=[4, 7]))
    add("table_from_pandas", pandas_table, pandas_table, pandas_table.to_pandas())
    batch = pa.record_batch({"a": pa.array([1, 2, 3, 4]), "s": pa.array(["w", "x", None, "z"])}).slice(1, 2)
    add("batch_sliced", batch, widen(pa.Table.from_batches([batch])))

    add("scalar_int", 7)
    add("scalar_str", "hé")
    add("scalar_nan", float("nan"))
    add("sequence", [1, "a", 2.5, [None, {"k": [True]}], np.arange(3)])
    add("pickle_dict", {"a": 1})
    add("bytes", b"raw bytes")
    add("bytes_empty", b"")
    return out


class Raw:
    """vineyardd's own protocol: frames of JSON with a length in front."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.ask({"type": "register_request", "version": "0.24.2", "store_type": 1, "session_id": 0,
                  "username": "", "password": ""})

    def ask(self, request):
        body = json.dumps(request).encode()
        self.socket.sendall(struct.pack("<Q", len(body)) + body)
        (size,) = struct.unpack("<Q", self.socket.recv(8, socket.MSG_WAITALL))
        return json.loads(self.socket.recv(size, socket.MSG_WAITALL))

    def metadata(self, oid):
        request = {"type": "get_data_request", "id": [oid], "sync_remote": False, "wait": False}
        return next(iter(self.ask(request)["content"].values()))


def pickled():
    """Arrays that frames of other writers hold as pickles: name -> (array, expected Arrow array)."""
    ls = pa.large_string()
    return {
        "pickled_int64": (pd.array([1, None, 3], dtype="Int64"), pa.array([1, None, 3])),
        "pickled_uint8": (pd.array([1, None, 3], dtype="UInt8"), pa.array([1, None, 3], pa.uint8())),
        "pickled_float32": (pd.array([1.5, None, 3], dtype="Float32"), pa.array([1.5, None, 3], pa.float32())),
        "pickled_boolean": (pd.array([True, None, False], dtype="boolean"), pa.array([True, None, False])),
        "pickled_str": (pd.array(["a", None, "ccc"], dtype="str"), pa.array(["a", None, "ccc"], ls)),
        "pickled_string": (pd.array(["a", None, "ccc"], dtype="string[python]"), pa.array(["a", None, "ccc"], ls)),
        "pickled_category": (pd.Categorical(["b", None, "a"], ordered=True),
                             pa.DictionaryArray.from_arrays(pa.array([1, None, 0], pa.int8()), pa.array(["a", "b"], ls))),
        "pickled_category_int": (pd.Categorical([7, 5, 7]),
                                 pa.DictionaryArray.from_arrays(pa.array([1, 0, 1], pa.int8()), pa.array([5, 7]))),
        "pickled_interval": (pd.interval_range(0, 3).array,
                             pa.array([{"left": i, "right": i + 1} for i in range(3)])),
        "pickled_arrow": (pd.array([1, None, 3], dtype="int64[pyarrow]"), pa.array([1, None, 3])),
        "pickled_numpy": (np.array([1.5, 2.5, 3.5]), pa.array([1.5, 2.5, 3.5])),
        "pickled_timestamps": (np.array([pd.Timestamp("2020", tz="UTC"), None, pd.NaT], dtype=object),
                               pa.array([pd.Timestamp("2020"), None, None], pa.timestamp("us", tz="UTC"))),
    }


def write_pickled(out):
    """Frames of one such column, put together by hand: the official client itself would lose them."""
    for name, (array, expected) in pickled().items():
        data = pickle.dumps(array, 5)
        blob, instance = "o8000000000000040", {"instance_id": 0}
        column = {"typename": "vineyard::PickleBuffer", "id": "o0000000000000002", "size_": len(data), **instance,
                  "buffer_": {"typename": "vineyard::Blob", "id": blob, "length": 0, **instance}}
        meta = {"typename": "vineyard::DataFrame", "id": "o0000000000000001", "columns_": '["c"]',
                "__values_-size": 1, "__values_-key-0": '"c"', "__values_-value-0": column, **instance}
        table = pa.table({"c": expected})
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        fixture = {"meta": meta, "blobs": {blob: base64.b64encode(data).decode()},
                   "table": base64.b64encode(sink.getvalue()).decode()}
        with open(os.path.join(out, name + ".json"), "w") as f:
            json.dump(fixture, f, sort_keys=True)
            f.write("\n")


def blobs_of(meta):
    if isinstance(meta, dict):
        if meta.get("typename") == "vineyard::Blob":
            yield meta["id"]
        for value in meta.values():
            yield from blobs_of(value)


def write(path, out):
    import vineyard

    client, raw = vineyard.connect(path), Raw(path)
    os.makedirs(out, exist_ok=True)
    for name, (value, table, _) in values().items():
        oid = client.put(value)
        meta = raw.metadata(int(oid))
        blobs = {}
        for blob in set(blobs_of(meta)):
            if blob != "o8000000000000000":
                blobs[blob] = base64.b64encode(bytes(client.get_blob(vineyard.ObjectID(blob)))).decode()
        for noise in ("JOB_NAME", "POD_NAME", "POD_NAMESPACE"):
            meta.pop(noise, None)
        fixture = {"meta": meta, "blobs": dict(sorted(blobs.items()))}
        if table is not None:
            sink = io.BytesIO()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            fixture["table"] = base64.b64encode(sink.getvalue()).decode()
        with open(os.path.join(out, name + ".json"), "w") as f:
            json.dump(fixture, f, sort_keys=True)
            f.write("\n")


def check(directory):
    failures = 0
    for name, (_, _, frame) in values().items():
        if frame is None:
            continue
        try:
            got = pd.read_feather(os.path.join(directory, name + ".arrow"))
            want = frame
            if name.startswith(("frame", "series")):
                # Only pandas' own limit is allowed for: it reads strings of `object` columns as `str`.
                same = {c: g.dtype for c, g in got.items() if g.dtype == "str"} if got.columns.is_unique else {}
                want = want.astype({c: "str" for c in same if want[c].dtype == object})
            if name == "frame_object_kinds":  # pandas makes its own types of objects that Arrow has a type for
                continue
            pd.testing.assert_frame_equal(got, want, check_index_type=False, check_column_type=False, check_freq=False)
        except Exception as error:  # noqa: BLE001 - every failure is reported
            failures += 1
            print(f"{name}: {str(error)[:700]}")
    for name, (array, _) in pickled().items():
        got = pd.read_feather(os.path.join(directory, name + ".arrow"))
        want = pd.DataFrame({"c": array})
        if name == "pickled_string":  # the kind of storage is not kept in Arrow files
            want["c"] = want["c"].astype(got["c"].dtype) if got["c"].dtype == "string" else want["c"]
        try:
            kind = name not in ("pickled_arrow", "pickled_timestamps")
            pd.testing.assert_frame_equal(got, want, check_dtype=kind)
        except Exception as error:  # noqa: BLE001
            failures += 1
            print(f"{name}: {str(error)[:700]}")
    print(f"{failures} failures")
    return failures


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        sys.exit(check(sys.argv[2]) != 0)
    write(sys.argv[1], sys.argv[2])
    write_pickled(sys.argv[2])
