"""Random Arrow tables of every type, and their values in a form that compares exactly.

The same seed makes the same table. Arrays come with offsets that do not begin at 0, with values under nulls, with list
views out of order, and with dictionaries whose values repeat or are not used.
"""

import decimal
import random

import numpy as np
import pyarrow as pa


class Money(pa.ExtensionType):
    """An extension type that no reader but this one knows."""

    def __init__(self, storage=pa.struct([("amount", pa.int64()), ("currency", pa.string())])):
        super().__init__(storage, "test.money")

    def __arrow_ext_serialize__(self):
        return b"v1"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage, serialized):
        return cls(storage)


pa.register_extension_type(Money())

LEAVES = [
    pa.null(),
    pa.bool_(),
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    *(pa.float16(), pa.float32(), pa.float64()),
    *(pa.decimal32(9, 2), pa.decimal64(18, 0), pa.decimal128(38, 10), pa.decimal256(76, 20)),
    *(pa.decimal32(1, 1), pa.decimal64(10, 10), pa.decimal128(5, -3), pa.decimal256(40, 3)),
    *(pa.date32(), pa.date64(), pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")),
    *(pa.timestamp(unit) for unit in ("s", "ms", "us", "ns")),
    *(pa.timestamp("s", "UTC"), pa.timestamp("us", "Europe/Berlin"), pa.timestamp("ns", "+05:30")),
    *(pa.duration(unit) for unit in ("s", "ms", "us", "ns")),
    pa.month_day_nano_interval(),
    *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()),
    *(pa.binary(3), pa.binary(16), pa.binary(1)),
    *(pa.uuid(), pa.json_(), pa.bool8(), pa.opaque(pa.binary(), "thing", "someone")),
    *(Money(), pa.fixed_shape_tensor(pa.float32(), [2, 2])),
]
NESTED = ["list", "large_list", "list_view", "large_list_view", "fixed", "struct", "map", "dictionary", "run_end", "sparse", "dense"]
KEYS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32()]


def field(rng: random.Random, name: str, depth: int) -> pa.Field:
    metadata = {"note": rng.choice(["", "ünï", "x" * 50])} if rng.random() < 0.1 else None
    dtype = random_type(rng, depth)
    return pa.field(name, dtype, nullable=pa.types.is_null(dtype) or rng.random() < 0.8, metadata=metadata)


def random_type(rng: random.Random, depth: int, kind: str | None = None) -> pa.DataType:
    if kind is None and (depth == 0 or rng.random() < 0.6):
        return rng.choice(LEAVES)
    kind = kind or rng.choice(NESTED)
    child = lambda: field(rng, rng.choice(["item", "element", "x", ""]), depth - 1)
    match kind:
        case "list":
            return pa.list_(child())
        case "large_list":
            return pa.large_list(child())
        case "list_view":
            return pa.list_view(child())
        case "large_list_view":
            return pa.large_list_view(child())
        case "fixed":
            return pa.list_(child(), rng.choice([0, 1, 2, 3]))
        case "struct":
            return pa.struct([field(rng, f"f{i}", depth - 1) for i in range(rng.choice([0, 1, 1, 2, 3]))])
        case "map":
            key = pa.field("key", rng.choice([pa.string(), pa.int32(), pa.binary(3), pa.date32()]), nullable=False)
            return pa.map_(key, field(rng, "value", depth - 1), keys_sorted=rng.random() < 0.3)
        case "dictionary":
            plain = [t for t in LEAVES if not pa.types.is_null(t) and not isinstance(t, pa.BaseExtensionType)]
            values = rng.choice(plain)
            if rng.random() < 0.3:
                values = rng.choice([pa.list_(values), pa.list_(values, 2), pa.struct([("a", values), ("b", pa.list_(pa.string()))])])
            return pa.dictionary(rng.choice(KEYS), values, ordered=rng.random() < 0.2)
        case "run_end":
            plain = [t for t in LEAVES if not isinstance(t, pa.BaseExtensionType)]
            return pa.run_end_encoded(rng.choice([pa.int16(), pa.int32(), pa.int64()]), rng.choice(plain))
        case "sparse" | "dense":
            fields = [pa.field(f"u{i}", random_type(rng, depth - 1)) for i in range(rng.choice([1, 2, 3]))]
            codes = rng.sample(range(100), len(fields))
            return pa.union(fields, mode=kind, type_codes=codes)


def text(rng: random.Random) -> str:
    return rng.choice(["", "a", "zwölf Zeichen", "雪" * rng.randint(1, 9), "x" * rng.randint(10, 40), "\0 nul"])


def leaf(rng: random.Random, dtype: pa.DataType):
    """One value, as Python has it; an integer for times."""
    types = pa.types
    if types.is_boolean(dtype):
        return rng.random() < 0.5
    if types.is_integer(dtype):
        bits, signed = dtype.bit_width, types.is_signed_integer(dtype)
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        return rng.choice([0, 1, low, high, rng.randint(low, high)])
    if types.is_floating(dtype):
        return rng.choice([0.0, -0.0, float("nan"), float("inf"), -1.5, float(rng.randint(-1000, 1000)) / 8])
    if types.is_decimal(dtype):
        digits = 10**dtype.precision - 1
        with decimal.localcontext(prec=100):
            return decimal.Decimal(rng.choice([0, 1, digits, -digits, rng.randint(-digits, digits)])).scaleb(-dtype.scale)
    if types.is_interval(dtype):
        return pa.MonthDayNano([rng.randint(-99, 99), rng.randint(-9999, 9999), rng.randint(-(10**15), 10**15)])
    if types.is_date64(dtype):
        return rng.randint(-9999, 20000) * 86_400_000
    if types.is_time(dtype):
        return rng.randrange(86_400 * {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[dtype.unit])
    if types.is_temporal(dtype):
        return rng.choice([0, -1, rng.randint(-(2**31), 2**31 - 1)])
    if types.is_fixed_size_binary(dtype):
        return rng.randbytes(dtype.byte_width)
    return text(rng) if "string" in str(dtype) else text(rng).encode()


def array(rng: random.Random, dtype: pa.DataType, n: int, nullable: bool = True) -> pa.Array:
    """`n` values, with an offset now and then."""
    before, after = (rng.randint(0, 9), rng.randint(0, 3)) if rng.random() < 0.3 else (0, 0)
    made = whole(rng, dtype, n + before + after, nullable)
    assert len(made) == n + before + after, dtype
    return made.slice(before, n) if before + after else made


def whole(rng: random.Random, dtype: pa.DataType, n: int, nullable: bool) -> pa.Array:
    types = pa.types
    share = rng.choice([0, 0, 0.2, 0.2, 0.9, 1]) if nullable else 0
    nulls = [rng.random() < share for _ in range(n)]
    mask = pa.array(nulls, pa.bool_()) if any(nulls) else None
    if isinstance(dtype, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(dtype, whole(rng, dtype.storage_type, n, nullable))
    if types.is_null(dtype):
        return pa.nulls(n)
    if types.is_union(dtype):
        codes = [rng.choice(dtype.type_codes) for _ in range(n)]
        names = [dtype.field(i).name for i in range(dtype.num_fields)]
        tags = pa.array(codes, pa.int8())
        if dtype.mode == "sparse":
            children = [array(rng, dtype.field(i).type, n) for i in range(dtype.num_fields)]
            return pa.UnionArray.from_sparse(tags, children, names, dtype.type_codes)
        used, offsets = dict.fromkeys(dtype.type_codes, 0), []
        for code in codes:
            offsets.append(used[code])
            used[code] += 1
        children = [array(rng, dtype.field(i).type, used[code]) for i, code in enumerate(dtype.type_codes)]
        return pa.UnionArray.from_dense(tags, pa.array(offsets, pa.int32()), children, names, dtype.type_codes)
    if types.is_dictionary(dtype):
        values = array(rng, dtype.value_type, rng.randint(1, 7), nullable and rng.random() < 0.3)
        keys = [None if null else rng.randrange(len(values)) for null in nulls]
        return pa.DictionaryArray.from_arrays(pa.array(keys, dtype.index_type), values, ordered=dtype.ordered)
    if types.is_run_end_encoded(dtype):
        ends = sorted({rng.randint(1, n) for _ in range(n // 3)} | {n}) if n else []
        values = array(rng, dtype.value_type, len(ends), nullable)
        return pa.RunEndEncodedArray.from_arrays(pa.array(ends, dtype.run_end_type), values, dtype)
    if types.is_struct(dtype):
        fields = list(dtype)
        children = [array(rng, f.type, n, f.nullable) for f in fields]
        if not fields:
            return pa.array([None if null else {} for null in nulls], dtype)
        return pa.StructArray.from_arrays(children, fields=fields, mask=mask)
    if types.is_fixed_size_list(dtype):
        child = dtype.value_field
        if dtype.list_size == 0:
            valid = None if mask is None else pa.array([not null for null in nulls]).buffers()[1]
            return pa.Array.from_buffers(dtype, n, [valid], children=[array(rng, child.type, 0)])
        values = array(rng, child.type, n * dtype.list_size, child.nullable)
        return pa.FixedSizeListArray.from_arrays(values, type=dtype, mask=mask)
    if types.is_map(dtype) or types.is_nested(dtype):
        sizes = [0 if null else rng.choice([0, 1, 2, 5]) for null in nulls]
        ends = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        if types.is_map(dtype):
            keys = array(rng, dtype.key_type, int(ends[-1]), False)
            items = array(rng, dtype.item_type, int(ends[-1]), dtype.item_field.nullable)
            offsets = pa.array(ends, pa.int32(), mask=np.array([*nulls, False]))
            return pa.MapArray.from_arrays(offsets, keys, items, type=dtype)
        child = dtype.value_field
        view = types.is_list_view(dtype) or types.is_large_list_view(dtype)
        wide = types.is_large_list(dtype) or types.is_large_list_view(dtype)
        kind = pa.int64() if wide else pa.int32()
        values = array(rng, child.type, int(ends[-1]), child.nullable)
        if view:
            order = list(range(n))
            rng.shuffle(order)
            starts, at = [0] * n, 0
            for i in order:
                starts[i], at = at, at + sizes[i]
            make = pa.LargeListViewArray if wide else pa.ListViewArray
            return make.from_arrays(pa.array(starts, kind), pa.array(sizes, kind), values, type=dtype, mask=mask)
        make = pa.LargeListArray if wide else pa.ListArray
        return make.from_arrays(pa.array(ends, kind), values, type=dtype, mask=mask)
    values = [None if null else leaf(rng, dtype) for null in nulls]
    if types.is_interval(dtype) or not types.is_temporal(dtype):
        return pa.array(values, dtype)
    return pa.array(values, pa.int32() if dtype.bit_width == 32 else pa.int64()).view(dtype)


def table(seed: int, first: pa.DataType | None = None) -> pa.Table:
    """A table of random columns; the first has this type."""
    rng = random.Random(seed)
    rows = 4000 if rng.random() < 0.04 else rng.choice([0, 1, 2, 7, 8, 9, 33, 64, 100, 257])
    fields = [field(rng, rng.choice([f"c{i}", f"Spalte {i}", f"{i}"]), rng.choice([0, 1, 2, 3])) for i in range(rng.choice([1, 2, 4, 7]))]
    if first is not None:
        fields.insert(0, pa.field("first", first))
    cuts = sorted(rng.randint(0, rows) for _ in range(rng.choice([0, 0, 1, 3])))
    bounds = list(zip([0, *cuts], [*cuts, rows]))
    columns = []
    for f in fields:
        if pa.types.is_dictionary(f.type) and rng.random() < 0.5:
            one = array(rng, f.type, rows, f.nullable)
            chunks = [one.slice(start, end - start) for start, end in bounds]
        else:
            chunks = [array(rng, f.type, end - start, f.nullable) for start, end in bounds]
        columns.append(pa.chunked_array(chunks, f.type))
    metadata = {"origin": "random", "ключ": "значение"} if rng.random() < 0.5 else None
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata=metadata))


SCALE = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


def plain(array: pa.Array | pa.ChunkedArray) -> list:
    """The values alone, whatever their layout and unit: floats as their bits, times in nanoseconds."""
    types, dtype = pa.types, array.type
    if isinstance(array, pa.ChunkedArray):
        return [value for chunk in array.chunks for value in plain(chunk)]
    if not len(array):
        return []  # pyarrow 26 crashes where it looks at the buffers of some arrays without values
    if isinstance(dtype, pa.BaseExtensionType):
        return plain(array.storage)
    if types.is_null(dtype):
        return [None] * len(array)
    if types.is_dictionary(dtype):
        values = plain(array.dictionary)
        return [None if key is None else values[key] for key in array.indices.to_pylist()]
    if types.is_run_end_encoded(dtype):
        values, out, at = plain(array.values), [], array.offset
        for end, value in zip(array.run_ends.to_pylist(), values):
            take = max(0, min(end, array.offset + len(array)) - at)
            out += [value] * take
            at += take
        return out
    if types.is_union(dtype):
        child = {code: plain(array.field(i)) for i, code in enumerate(dtype.type_codes)}
        # pyarrow's own `type_codes` and `offsets` forget the offset of a slice.
        part = slice(array.offset, array.offset + len(array))
        codes = np.frombuffer(array.buffers()[1], "i1")[part].tolist()
        places = range(len(array)) if dtype.mode == "sparse" else np.frombuffer(array.buffers()[2], "<i4")[part].tolist()
        return [(code, child[code][place]) for code, place in zip(codes, places)]
    valid = array.is_valid().to_pylist()
    if types.is_struct(dtype):
        children = [plain(array.field(i)) for i in range(dtype.num_fields)]
        return [tuple(child[i] for child in children) if ok else None for i, ok in enumerate(valid)]
    if types.is_map(dtype) or types.is_fixed_size_list(dtype) or types.is_nested(dtype):
        return [tuple(plain(array[i].values)) if ok else None for i, ok in enumerate(valid)]
    if types.is_floating(dtype):
        return array.view({16: pa.int16(), 32: pa.int32(), 64: pa.int64()}[dtype.bit_width]).to_pylist()
    if types.is_temporal(dtype) and not types.is_interval(dtype):
        numbers = array.view(pa.int32() if dtype.bit_width == 32 else pa.int64()).to_pylist()
        if types.is_date(dtype):
            scale = 86_400 * 10**9 if types.is_date32(dtype) else 10**6
        else:
            # Parquet has no durations: they are integers there, which keep their unit.
            scale = 1 if types.is_duration(dtype) else SCALE[dtype.unit]
        return [None if number is None else number * scale for number in numbers]
    return array.to_pylist()


def difference(found: pa.Table, expected: pa.Table) -> str | None:
    """Where two tables differ in their values; `None` if nowhere."""
    if found.column_names != expected.column_names or found.num_rows != expected.num_rows:
        return f"{found.num_rows} rows of {found.column_names}, expected {expected.num_rows} of {expected.column_names}"
    for name, x, y in zip(found.column_names, found.columns, expected.columns):
        for row, (a, b) in enumerate(zip(plain(x), plain(y), strict=True)):
            if a != b:
                return f"column {name!r} ({y.type}), row {row}: {a!r}, expected {b!r}"
    return None


def same_schema(found: pa.Schema, expected: pa.Schema) -> bool:
    return found.equals(expected, check_metadata=True)


def every_type() -> list[pa.DataType]:
    """Each leaf type, and each nested one with a child that is the same in every run."""
    nested = pa.dictionary(pa.int8(), pa.struct([("n", pa.int64()), ("t", pa.list_(pa.string()))]))
    return LEAVES + [random_type(random.Random(i), 2, kind) for i, kind in enumerate(NESTED * 2)] + [nested]
