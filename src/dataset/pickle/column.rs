//! Recognises arrays of numpy and pandas in a pickle that was read.
//!
//! Shapes: `numpy/_core/src/multiarray/methods.c` (`array_reduce_ex`) of numpy, `pandas/_libs/arrays.pyx` and
//! `pandas/core/arrays/` of pandas 1.5 to 3.1.

use std::sync::Arc;

use arrow_schema::{DataType, Field, Fields, TimeUnit};
use serde_json::json;

use super::machine::{Called, Loaded, Ref, Stop, Value, unknown};
use super::{MAX_DEPTH, objects, pyarrow};
use crate::dataset::Span;
use crate::dataset::column::{Column, PandasType};
use crate::dataset::derive::{self, Map, Test};
use crate::dataset::dtype::Dtype;
use crate::dataset::frame::Cells;
use crate::dataset::table::ArrayLayout;
use crate::vineyard::BlobSource;

/// Elements of a numpy array.
pub enum Elements {
    /// Raw values.
    Raw(Dtype, Span),
    /// Python objects.
    Objects(Vec<Ref>),
}

/// A one-dimensional numpy array.
pub struct NdArray {
    /// Number of elements.
    pub len: u64,
    /// Its elements.
    pub elements: Elements,
}

impl NdArray {
    /// Raw values of a dtype, or nothing.
    fn raw(self) -> Result<(Dtype, Span, u64), Stop> {
        match self.elements {
            Elements::Raw(dtype, span) => Ok((dtype, span, self.len)),
            Elements::Objects(_) => unknown("an array of objects where numbers are expected"),
        }
    }
}

/// What the pickle of a column is: a column, or a single cell of one.
pub fn cells(loaded: &Loaded, at: Ref, source: &dyn BlobSource) -> Result<Cells, Stop> {
    if let Some(call) = loaded.called(at)
        && call.name == "scalar"
        && call.module.starts_with("numpy.")
        && let [dtype, data] = *call.args
        && let (Some(Ok(dtype)), Some(value)) = (dtype_of(loaded, dtype, source)?, loaded.bytes(data))
    {
        let layout = dtype.column(value, 1)?.layout;
        return Ok(match layout.buffers.into_iter().nth(1) {
            Some(value) => Cells::First { data_type: layout.data_type, value },
            None => Cells::FirstNull,
        });
    }
    let first = |data_type, bytes: Vec<u8>| Ok(Cells::First { data_type, value: Span::literal(bytes) });
    match loaded.value(at) {
        _ if objects::is_missing(loaded, at) => return Ok(Cells::FirstNull),
        Some(Value::Int(n)) => return first(DataType::Int64, n.to_le_bytes().to_vec()),
        Some(Value::Float(f)) => return first(DataType::Float64, f.to_le_bytes().to_vec()),
        Some(Value::Bool(b)) => return first(DataType::Boolean, vec![u8::from(*b)]),
        Some(Value::Str { .. }) => {
            return first(DataType::LargeUtf8, loaded.text(at).unwrap_or_default().as_bytes().to_vec());
        }
        _ => {}
    }
    if let Some(array) = nd_array(loaded, at, source)?
        && let Elements::Objects(items) = &array.elements
        && let Some(levels) = objects::levels(loaded, items, source)?
    {
        return Ok(Cells::Levels(levels));
    }
    column(loaded, at, 0, source).map(Cells::Column)
}

/// An array of any known kind.
pub fn column(loaded: &Loaded, at: Ref, depth: usize, source: &dyn BlobSource) -> Result<Column, Stop> {
    if depth > MAX_DEPTH {
        return unknown("arrays nested too deep");
    }
    if let Some(array) = nd_array(loaded, at, source)? {
        return match array.elements {
            Elements::Raw(dtype, span) => Ok(dtype.column(span, array.len)?),
            Elements::Objects(items) => objects::column(loaded, &items, depth + 1, source),
        };
    }
    let Some(call) = loaded.called(at) else { return unknown("a pickled value that is no array") };
    if call.module.starts_with("pyarrow") {
        return pyarrow::column(loaded, at);
    }
    if !call.module.starts_with("pandas") {
        return unknown(format!("a pickled {:.60}.{:.60}", call.module, call.name));
    }
    match call.name {
        "__pyx_unpickle_NDArrayBacked" => backed(loaded, call, depth, source),
        "__pyx_unpickle_IntervalMixin" => {
            let state = call.state.and_then(|state| loaded.items(state)).and_then(|items| items.first().copied());
            interval(loaded, state, depth, source)
        }
        "IntervalArray" => interval(loaded, call.state, depth, source),
        "IntegerArray" | "FloatingArray" | "BooleanArray" => masked(loaded, call, source),
        "ArrowStringArray" | "ArrowExtensionArray" | "ArrowStringArrayNumpySemantics" => {
            let array = call.state.and_then(|s| loaded.entry(s, "_pa_array").or(loaded.entry(s, "_data")));
            let Some(array) = array else { return unknown("an Arrow array without values") };
            let column = pyarrow::column(loaded, array)?;
            Ok(match call.name {
                "ArrowExtensionArray" => column,
                // The second argument of the dtype is the missing value: NaN means pandas 3's `str`.
                _ => {
                    let dtype = call.state.and_then(|s| loaded.entry(s, "_dtype")).and_then(|d| loaded.called(d));
                    let nan = |at: &Ref| matches!(loaded.value(*at), Some(Value::Float(f)) if f.is_nan());
                    let is_str = dtype.and_then(|d| d.args.get(1)).is_some_and(nan);
                    column.with_numpy_type(if is_str { "str" } else { "string" })
                }
            })
        }
        "_new_Index" | "_new_DatetimeIndex" => {
            let [class, state] = *call.args else { return unknown("an index without values") };
            let class = loaded.global(class).map_or("", |(_, name)| name);
            if class == "RangeIndex" {
                return range(loaded, state);
            }
            match loaded.entry(state, "data") {
                Some(data) => column(loaded, data, depth + 1, source),
                None => unknown(format!("a pickled {class:.60}")),
            }
        }
        other => unknown(format!("a pickled pandas {other:.60}")),
    }
}

/// numpy's array, if it is one of one dimension; an error if it is one that cannot be shown.
pub fn nd_array(loaded: &Loaded, at: Ref, source: &dyn BlobSource) -> Result<Option<NdArray>, Stop> {
    let Some(call) = loaded.called(at).filter(|call| call.module.starts_with("numpy")) else { return Ok(None) };
    let (shape, dtype, data) = match (call.name, call.args, call.state) {
        ("_frombuffer", &[data, dtype, shape, _], None) => (shape, dtype, data),
        ("_reconstruct", _, Some(state)) => match loaded.items(state) {
            // Format version, shape, dtype, column-major, data.
            Some(&[_, shape, dtype, _, data]) => (shape, dtype, data),
            _ => return unknown("an array in an unknown form"),
        },
        _ => return Ok(None),
    };
    let lengths = loaded.items(shape).and_then(|items| {
        items.iter().map(|n| loaded.int(*n).and_then(|n| u64::try_from(n).ok())).collect::<Option<Vec<u64>>>()
    });
    let len = match lengths.as_deref() {
        Some([len]) => *len,
        _ => return unknown("an array of several dimensions"),
    };
    let elements = match (dtype_of(loaded, dtype, source)?, loaded.value(data)) {
        (Some(Ok(dtype)), Some(Value::Bytes { .. })) => {
            let span = loaded.bytes(data).filter(|span| Some(span.len()) == len.checked_mul(dtype.size));
            let Some(span) = span else { return unknown("an array whose bytes do not fit its shape") };
            Elements::Raw(dtype, span)
        }
        (Some(Err(ObjectType)), Some(Value::List(items))) if items.len() as u64 == len => {
            Elements::Objects(items.clone())
        }
        _ => return unknown("an array of an unknown type"),
    };
    Ok(Some(NdArray { len, elements }))
}

/// numpy's type of Python objects.
pub struct ObjectType;

/// `numpy.dtype('i8')` with its state; `None` if it is something else.
fn dtype_of(loaded: &Loaded, at: Ref, source: &dyn BlobSource) -> Result<Option<Result<Dtype, ObjectType>>, Stop> {
    let Some(call) = loaded.called(at).filter(|call| call.module == "numpy" && call.name == "dtype") else {
        return Ok(None);
    };
    let Some(code) = call.args.first().and_then(|code| loaded.text(*code)) else { return Ok(None) };
    if code.starts_with('O') {
        return Ok(Some(Err(ObjectType)));
    }
    let state = call.state.and_then(|state| loaded.items(state)).unwrap_or_default();
    let order = state.get(1).and_then(|order| loaded.text(*order)).unwrap_or("<");
    // Position 3 and 4: names and fields of a structured type.
    let structured = [2, 3, 4].iter().filter_map(|i| state.get(*i)).any(|part| !loaded.is_none(*part));
    if structured || !matches!(order, "<" | ">" | "|" | "=") {
        return Ok(None);
    }
    let mut descr = format!("{order}{code}");
    // Position 8: (metadata, (unit, count, denominator, event)).
    if let Some(times) = state.get(8).and_then(|m| loaded.items(*m)).and_then(|pair| loaded.items(*pair.get(1)?)) {
        let unit = times.first().and_then(|unit| loaded.bytes(*unit)).filter(|unit| unit.len() <= 8);
        let count = times.get(1).and_then(|n| loaded.int(*n)).unwrap_or(1);
        let Some(unit) = unit else { return Ok(None) };
        let unit = String::from_utf8_lossy(&unit.to_vec(source)?).into_owned();
        let count = if count == 1 { String::new() } else { count.to_string() };
        descr.push_str(&format!("[{count}{unit}]"));
    }
    Ok(Dtype::parse(&descr).map(Ok))
}

impl Loaded {
    fn is_none(&self, at: Ref) -> bool {
        matches!(self.value(at), Some(Value::None))
    }
}

/// pandas arrays that wrap one numpy array: state is (dtype, array, attributes) in some order.
fn backed(loaded: &Loaded, call: Called, depth: usize, source: &dyn BlobSource) -> Result<Column, Stop> {
    let class = call.args.first().and_then(|class| loaded.global(*class)).map_or("", |(_, name)| name);
    let state = call.state.and_then(|state| loaded.items(state)).unwrap_or_default();
    let (mut array, mut dtype) = (None, None);
    for part in state.iter().take(2) {
        match nd_array(loaded, *part, source)? {
            Some(found) => array = Some((found, *part)),
            None => dtype = Some(*part),
        }
    }
    let (Some((array, array_at)), Some(dtype)) = (array, dtype) else { return unknown("an array without values") };
    match class {
        "DatetimeArray" | "TimedeltaArray" => {
            let (element, span, len) = array.raw()?;
            let mut column = element.column(span, len)?;
            if let (DataType::Timestamp(unit, _), Some(_)) = (&column.layout.data_type, loaded.called(dtype))
                && dtype_of(loaded, dtype, source)?.is_none()
            {
                let zone = zone_of_dtype(loaded, dtype)?;
                column.layout.data_type = DataType::Timestamp(*unit, Some(zone.into()));
                column.pandas = PandasType::of(&column.layout.data_type);
            }
            Ok(column)
        }
        "PeriodArray" => {
            let (element, span, len) = array.raw()?;
            if element != (Dtype { big_endian: false, kind: 'i', size: 8, unit: String::new() }) {
                return unknown("periods that are no integers");
            }
            let name = loaded.called(dtype).and_then(|d| d.args.first()).and_then(|name| loaded.text(*name));
            let Some(freq) = name.and_then(|name| name.strip_prefix("period[")?.strip_suffix(']')) else {
                return unknown("periods of an unknown frequency");
            };
            let validity = derive::bits(span.clone(), 8, Test::NotNat);
            let nulls = if len == 0 { Some(0) } else { None };
            let layout = ArrayLayout::flat(DataType::Int64, len, nulls, vec![validity, span]);
            let mut column = Column::new(layout).with_extension("pandas.period", json!({"freq": freq}).to_string());
            column.pandas = PandasType::new("object", format!("period[{freq}]"));
            Ok(column)
        }
        "StringArray" | "StringArrayNumpySemantics" => {
            let arguments = loaded.called(dtype).map_or(&[][..], |call| call.args);
            let nan = |at: &Ref| matches!(loaded.value(*at), Some(Value::Float(f)) if f.is_nan());
            let name = if arguments.get(1).is_some_and(nan) { "str" } else { "string" };
            let column = column(loaded, array_at, depth + 1, source)?;
            Ok(column.with_numpy_type(name))
        }
        "Categorical" => categorical(loaded, array, dtype, depth, source),
        "NumpyExtensionArray" | "PandasArray" => column(loaded, array_at, depth + 1, source),
        other => unknown(format!("a pickled pandas {other:.60}")),
    }
}

/// Codes and categories: a dictionary array. Code -1 is missing.
fn categorical(
    loaded: &Loaded,
    codes: NdArray,
    dtype: Ref,
    depth: usize,
    source: &dyn BlobSource,
) -> Result<Column, Stop> {
    let (element, span, len) = codes.raw()?;
    let state = loaded.called(dtype).and_then(|d| d.state);
    let categories = state.and_then(|state| loaded.entry(state, "categories"));
    let ordered = state
        .and_then(|state| loaded.entry(state, "ordered"))
        .is_some_and(|at| matches!(loaded.value(at), Some(Value::Bool(true))));
    let Some(categories) = categories else { return unknown("a category without categories") };
    let values = column(loaded, categories, depth + 1, source)?;
    let codes = element.column(span.clone(), len)?.layout;
    if !codes.data_type.is_signed_integer() || element.big_endian {
        return unknown("a category whose codes are no integers");
    }
    let metadata = json!({"num_categories": values.layout.len, "ordered": ordered});
    let numpy_type = PandasType::of(&codes.data_type).numpy_type;
    let data_type = DataType::Dictionary(Box::new(codes.data_type), Box::new(values.layout.data_type.clone()));
    let validity = derive::bits(span.clone(), element.size, Test::NonNegative);
    let keys = derive::map(span, element.size, Map::ClearNegative);
    let nulls = if len == 0 { Some(0) } else { None };
    let mut layout = ArrayLayout::flat(data_type, len, nulls, vec![validity, keys]);
    layout.dictionary = Some(Arc::new(values.layout));
    let mut column = Column::new(layout);
    column.pandas = PandasType { pandas_type: "categorical".into(), numpy_type, metadata };
    Ok(column)
}

/// pandas' nullable arrays: values and a mask that is true where a value is missing.
fn masked(loaded: &Loaded, call: Called, source: &dyn BlobSource) -> Result<Column, Stop> {
    let part = |key: &str| -> Result<(Dtype, Span, u64), Stop> {
        let at = call.state.and_then(|state| loaded.entry(state, key));
        match at.map(|at| nd_array(loaded, at, source)).transpose()?.flatten() {
            Some(array) => array.raw(),
            None => unknown("a nullable array without values or mask"),
        }
    };
    let (dtype, values, len) = part("_data")?;
    let (mask_type, mask, mask_len) = part("_mask")?;
    if mask_type.kind != 'b' || mask_len != len {
        return unknown("a nullable array with a mask of another length");
    }
    let name = match dtype.kind {
        'b' => "boolean".to_string(),
        'i' => format!("Int{}", dtype.size * 8),
        'u' => format!("UInt{}", dtype.size * 8),
        'f' => format!("Float{}", dtype.size * 8),
        _ => return unknown("a nullable array of an unknown type"),
    };
    let mut column = dtype.column(values, len)?.with_numpy_type(name);
    if let Some(validity) = column.layout.buffers.first_mut() {
        *validity = derive::bits(mask, 1, Test::Zero);
    }
    column.layout.null_count = if len == 0 { Some(0) } else { None };
    Ok(column)
}

/// Left and right ends: pandas' Arrow extension type over a struct.
fn interval(loaded: &Loaded, state: Option<Ref>, depth: usize, source: &dyn BlobSource) -> Result<Column, Stop> {
    let entry = |key: &str| state.and_then(|state| loaded.entry(state, key));
    let (Some(left), Some(right), Some(dtype)) = (entry("_left"), entry("_right"), entry("_dtype")) else {
        return unknown("intervals without ends");
    };
    let (left, right) = (column(loaded, left, depth + 1, source)?, column(loaded, right, depth + 1, source)?);
    let closed = loaded.called(dtype).and_then(|d| d.state).and_then(|s| loaded.text(loaded.entry(s, "closed")?));
    let Some(closed) = closed.filter(|c| matches!(*c, "left" | "right" | "both" | "neither")) else {
        return unknown("intervals of an unknown type");
    };
    let (l, r) = (&left.layout, &right.layout);
    // A missing interval has no ends; pandas keeps it as NaN in both, which stays.
    if l.data_type != r.data_type || l.len != r.len || !l.data_type.is_numeric() {
        return unknown("intervals whose ends are no numbers of one type");
    }
    let subtype = left.pandas.numpy_type.clone();
    let fields: Fields = ["left", "right"].iter().map(|n| Field::new(*n, l.data_type.clone(), true)).collect();
    let mut layout = ArrayLayout::flat(DataType::Struct(fields), l.len, Some(0), vec![Span::EMPTY]);
    layout.children = vec![left.layout, right.layout];
    let metadata = json!({"subtype": subtype, "closed": closed}).to_string();
    let mut column = Column::new(layout).with_extension("pandas.interval", metadata);
    column.pandas = PandasType::new("object", format!("interval[{subtype}, {closed}]"));
    Ok(column)
}

/// `RangeIndex`: computed, and short, as it stands for the categories of a column.
fn range(loaded: &Loaded, state: Ref) -> Result<Column, Stop> {
    let part = |key: &str| loaded.entry(state, key).and_then(|at| loaded.int(at));
    let (Some(start), Some(stop), Some(step)) = (part("start"), part("stop"), part("step")) else {
        return unknown("a range without ends");
    };
    let step = i128::from(step);
    let count = if step == 0 { 0 } else { ((i128::from(stop) - i128::from(start)) + step - step.signum()) / step };
    if count > 1 << 20 {
        return unknown("a long range");
    }
    let bytes: Vec<u8> =
        (0..count.max(0)).flat_map(|i| ((i128::from(start) + i * step) as i64).to_le_bytes()).collect();
    let layout =
        ArrayLayout::flat(DataType::Int64, count.max(0) as u64, Some(0), vec![Span::EMPTY, Span::literal(bytes)]);
    Ok(Column::new(layout))
}

/// The zone of a `DatetimeTZDtype`.
fn zone_of_dtype(loaded: &Loaded, at: Ref) -> Result<String, Stop> {
    let call = loaded.called(at).filter(|call| call.name == "DatetimeTZDtype");
    let zone = call.and_then(|call| {
        let in_state = call.state.and_then(|state| loaded.entry(state, "tz"));
        in_state.or_else(|| call.args.get(1).copied())
    });
    match zone.and_then(|zone| time_zone(loaded, zone)) {
        Some(zone) => Ok(zone),
        None => unknown("times in an unknown time zone"),
    }
}

/// The name of a time zone of `datetime`, `zoneinfo` or `pytz`.
pub fn time_zone(loaded: &Loaded, at: Ref) -> Option<String> {
    if let Some(text) = loaded.text(at) {
        return Some(text.to_string());
    }
    if let Some((module, name)) = loaded.global(at) {
        return (module == "datetime" && name == "UTC").then(|| "UTC".into());
    }
    let Value::Call { callable, args, .. } = loaded.value(at)? else { return None };
    let arguments = loaded.items(*args)?;
    match loaded.global(*callable) {
        Some(("datetime", "timezone")) => {
            let delta = loaded.called(*arguments.first()?)?;
            let [days, seconds, _] = *delta.args else { return None };
            let total = loaded.int(days)?.checked_mul(86_400)?.checked_add(loaded.int(seconds)?)?;
            offset_zone(total)
        }
        Some(("pytz", "_UTC")) => Some("UTC".into()),
        Some(("pytz", "_p")) => loaded.text(*arguments.first()?).map(str::to_string),
        Some(("pytz", "FixedOffset" | "_FixedOffset")) => {
            offset_zone(loaded.int(*arguments.first()?)?.checked_mul(60)?)
        }
        Some(_) => None,
        // `getattr(zoneinfo.ZoneInfo, '_unpickle')(key, from_cache)`
        None => {
            let getattr = loaded.called(*callable).filter(|call| call.name == "getattr")?;
            let (module, name) = loaded.global(*getattr.args.first()?)?;
            (module == "zoneinfo" && name == "ZoneInfo").then(|| loaded.text(*arguments.first()?))?.map(str::to_string)
        }
    }
}

/// `UTC` or `+05:30`.
fn offset_zone(seconds: i64) -> Option<String> {
    let minutes = seconds / 60;
    if seconds % 60 != 0 || minutes.abs() >= 24 * 60 {
        return None;
    }
    let sign = if minutes < 0 { '-' } else { '+' };
    let (hours, minutes) = (minutes.abs() / 60, minutes.abs() % 60);
    Some(if seconds == 0 { "UTC".into() } else { format!("{sign}{hours:02}:{minutes:02}") })
}

/// The Arrow unit of pandas' resolution numbers (`NPY_DATETIMEUNIT`).
pub fn resolution(number: i64) -> Option<TimeUnit> {
    Some(match number {
        7 => TimeUnit::Second,
        8 => TimeUnit::Millisecond,
        9 => TimeUnit::Microsecond,
        10 => TimeUnit::Nanosecond,
        _ => return None,
    })
}
