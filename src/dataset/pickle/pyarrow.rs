//! Arrow arrays that pyarrow pickled: types, buffers and children, as `_restore_array` would get them.
//! Shape: `python/pyarrow/array.pxi` (`_reduce_array_data`) and `types.pxi` of Apache Arrow.

use std::sync::Arc;

use arrow_schema::{DataType, Field, FieldRef, Fields, TimeUnit};

use super::MAX_DEPTH;
use super::machine::{Loaded, Ref, Stop, Value, unknown};
use crate::dataset::Span;
use crate::dataset::column::Column;
use crate::dataset::table::ArrayLayout;
use crate::error::Error;

/// An array, or a chunked array of one chunk.
pub fn column(loaded: &Loaded, at: Ref) -> Result<Column, Stop> {
    let Some(call) = loaded.called(at) else { return unknown("a pickled value that is no array") };
    match (call.name, call.args) {
        ("chunked_array", [chunks, data_type]) => match loaded.items(*chunks) {
            Some(&[chunk]) => column(loaded, chunk),
            Some([]) => {
                let data_type = type_of(loaded, *data_type, 0)?;
                let empty = arrow_data::ArrayData::new_empty(&data_type);
                Ok(Column::new(crate::dataset::materialize::literal(&empty)?))
            }
            _ => unknown("a pickled chunked array of several chunks"),
        },
        ("_restore_array", [data]) => Ok(Column::new(restore(loaded, *data, 0)?)),
        (name, _) => unknown(format!("a pickled pyarrow {name:.60}")),
    }
}

/// `(type, length, null count, offset, buffers, children, dictionary)`.
fn restore(loaded: &Loaded, at: Ref, depth: usize) -> Result<ArrayLayout, Stop> {
    if depth > MAX_DEPTH {
        return unknown("Arrow arrays nested too deep");
    }
    let Some(&[data_type, len, nulls, offset, buffers, children, dictionary]) = loaded.items(at) else {
        return unknown("an Arrow array in an unknown form");
    };
    let data_type = type_of(loaded, data_type, depth)?;
    let natural = |at: Ref| loaded.int(at).and_then(|n| u64::try_from(n).ok());
    let (Some(len), Some(offset)) = (natural(len), natural(offset)) else {
        return unknown("an Arrow array of a negative length");
    };
    let whole = offset.checked_add(len).filter(|n| *n <= i64::MAX as u64);
    let Some(whole) = whole else { return unknown("an Arrow array of more than 2^63 elements") };
    // Zero or a count of the window; -1 where nobody counted.
    let nulls = natural(nulls).filter(|n| *n <= len);
    let Some(buffers) = loaded.items(buffers) else { return unknown("an Arrow array without buffers") };
    let mut spans = buffers.iter().map(|at| buffer(loaded, *at)).collect::<Result<Vec<_>, Stop>>()?;
    let children = match loaded.items(children) {
        Some(children) => {
            children.iter().map(|child| restore(loaded, *child, depth + 1)).collect::<Result<Vec<_>, Stop>>()?
        }
        None => return unknown("an Arrow array without children"),
    };
    let dictionary = match loaded.value(dictionary) {
        Some(Value::None) | None => None,
        Some(_) => Some(Arc::new(restore(loaded, dictionary, depth + 1)?)),
    };
    if matches!(data_type, DataType::Null) {
        return Ok(ArrayLayout::null(len));
    }
    if matches!(nulls, Some(0))
        && let Some(validity) = spans.first_mut()
    {
        *validity = Span::EMPTY;
    }
    let null_count = match spans.first() {
        Some(validity) if validity.is_empty() => Some(0),
        _ => nulls,
    };
    let mut layout = ArrayLayout { data_type, len: whole, null_count, buffers: spans, children, dictionary };
    trim(&mut layout)?;
    let mut layout = layout.slice(offset, len)?;
    layout.null_count = null_count;
    Ok(layout)
}

/// Cuts buffers to what the elements need, after checking that there is as much, and children likewise.
fn trim(layout: &mut ArrayLayout) -> Result<(), Stop> {
    let len = layout.len;
    let missing = || Stop::Unknown(format!("an Arrow array of {} with wrong buffers or children", layout.data_type));
    let cut = |i: usize, n: Option<u64>| -> Result<Span, Stop> {
        let (Some(span), Some(n)) = (layout.buffers.get(i), n) else { return Err(missing()) };
        Ok(span.slice(0, n)?)
    };
    let data = |i: usize| layout.buffers.get(i).cloned().ok_or_else(missing);
    let wide = |width: u64, extra: u64| len.checked_add(extra).and_then(|n| n.checked_mul(width));
    // Nothing is stored for the single offset of an array without elements.
    let offsets = |width: u64| if len == 0 { Ok(Span::Zeros(width)) } else { cut(1, wide(width, 1)) };
    let validity = match layout.buffers.first() {
        Some(span) if span.is_empty() => Span::EMPTY,
        _ => cut(0, Some(len.div_ceil(8)))?,
    };
    let (buffers, children) = match &layout.data_type {
        DataType::Boolean => (vec![validity, cut(1, Some(len.div_ceil(8)))?], 0),
        DataType::Utf8 | DataType::Binary => (vec![validity, offsets(4)?, data(2)?], 0),
        DataType::LargeUtf8 | DataType::LargeBinary => (vec![validity, offsets(8)?, data(2)?], 0),
        DataType::List(_) | DataType::Map(..) => (vec![validity, offsets(4)?], 1),
        DataType::LargeList(_) => (vec![validity, offsets(8)?], 1),
        DataType::FixedSizeList(..) => (vec![validity], 1),
        DataType::Struct(fields) => (vec![validity], fields.len()),
        DataType::Utf8View | DataType::BinaryView => {
            let mut buffers = vec![validity, cut(1, wide(16, 0))?];
            buffers.extend(layout.buffers.iter().skip(2).cloned());
            (buffers, 0)
        }
        other => match crate::dataset::table::fixed_width(other) {
            Some(width) => (vec![validity, cut(1, wide(width, 0))?], 0),
            None => return Err(missing()),
        },
    };
    let is_dictionary = matches!(layout.data_type, DataType::Dictionary(..));
    if layout.children.len() != children || layout.dictionary.is_some() != is_dictionary {
        return Err(missing());
    }
    let child_len = match &layout.data_type {
        DataType::Struct(_) => Some(len),
        DataType::FixedSizeList(_, n) => {
            Some(u64::try_from(*n).ok().and_then(|n| n.checked_mul(len)).ok_or_else(missing)?)
        }
        _ => None,
    };
    let (buffers, wanted) = (buffers, child_len);
    if let Some(wanted) = wanted {
        let cut: Result<Vec<_>, Error> = layout.children.iter().map(|child| child.slice(0, wanted)).collect();
        layout.children = cut?;
    }
    layout.buffers = buffers;
    Ok(())
}

/// `None` or `py_buffer(bytes)`.
fn buffer(loaded: &Loaded, at: Ref) -> Result<Span, Stop> {
    if let Some(Value::None) = loaded.value(at) {
        return Ok(Span::EMPTY);
    }
    let bytes = loaded.called(at).filter(|call| call.name == "py_buffer").and_then(|call| call.args.first().copied());
    match bytes.and_then(|bytes| loaded.bytes(bytes)) {
        Some(span) => Ok(span),
        None => unknown("an Arrow buffer in an unknown form"),
    }
}

fn unit(loaded: &Loaded, at: Option<&Ref>) -> Result<TimeUnit, Stop> {
    match at.and_then(|at| loaded.text(*at)) {
        Some("s") => Ok(TimeUnit::Second),
        Some("ms") => Ok(TimeUnit::Millisecond),
        Some("us") => Ok(TimeUnit::Microsecond),
        Some("ns") => Ok(TimeUnit::Nanosecond),
        _ => unknown("an unknown time unit"),
    }
}

/// A type as pyarrow's functions would make it.
fn type_of(loaded: &Loaded, at: Ref, depth: usize) -> Result<DataType, Stop> {
    if depth > MAX_DEPTH {
        return unknown("Arrow types nested too deep");
    }
    let Some(call) = loaded.called(at).filter(|call| call.module == "pyarrow.lib") else {
        return unknown("an unknown Arrow type");
    };
    let argument = |i: usize| call.args.get(i).copied().unwrap_or(Ref::MAX);
    let nested = |i: usize| -> Result<FieldRef, Stop> { field(loaded, argument(i), "item", depth + 1) };
    let int = |i: usize| loaded.int(argument(i)).and_then(|n| i32::try_from(n).ok()).filter(|n| *n >= 0);
    Ok(match call.name {
        "type_for_alias" => return alias(loaded.text(argument(0)).unwrap_or_default()),
        "timestamp" => {
            let zone = loaded.text(argument(1)).map(Into::into);
            DataType::Timestamp(unit(loaded, call.args.first())?, zone)
        }
        "duration" => DataType::Duration(unit(loaded, call.args.first())?),
        "time32" => DataType::Time32(unit(loaded, call.args.first())?),
        "time64" => DataType::Time64(unit(loaded, call.args.first())?),
        "decimal128" | "decimal256" => {
            let precision = loaded.int(argument(0)).and_then(|n| u8::try_from(n).ok());
            let scale = loaded.int(argument(1)).and_then(|n| i8::try_from(n).ok());
            let (Some(precision), Some(scale)) = (precision, scale) else { return unknown("an unknown decimal") };
            if call.name == "decimal128" {
                DataType::Decimal128(precision, scale)
            } else {
                DataType::Decimal256(precision, scale)
            }
        }
        "binary" => match int(0) {
            Some(width) => DataType::FixedSizeBinary(width),
            None => DataType::Binary,
        },
        "list_" => match int(1) {
            Some(n) => DataType::FixedSizeList(nested(0)?, n),
            None => DataType::List(nested(0)?),
        },
        "large_list" => DataType::LargeList(nested(0)?),
        "struct" => {
            let Some(fields) = loaded.items(argument(0)) else { return unknown("a struct without fields") };
            if fields.len() > 10_000 {
                return unknown("a struct of many fields");
            }
            let fields = fields.iter().map(|at| field(loaded, *at, "item", depth + 1));
            DataType::Struct(fields.collect::<Result<Fields, Stop>>()?)
        }
        "map_" => {
            let key = field(loaded, argument(0), "key", depth + 1)?;
            let key = key.as_ref().clone().with_name("key").with_nullable(false);
            let value = field(loaded, argument(1), "value", depth + 1)?.as_ref().clone().with_name("value");
            let sorted = matches!(loaded.value(argument(2)), Some(Value::Bool(true)));
            let entries = DataType::Struct(Fields::from(vec![key, value]));
            DataType::Map(Arc::new(Field::new("entries", entries, false)), sorted)
        }
        "dictionary" => {
            let (key, value) = (type_of(loaded, argument(0), depth + 1)?, type_of(loaded, argument(1), depth + 1)?);
            if !key.is_integer() {
                return unknown("a dictionary with keys that are no integers");
            }
            DataType::Dictionary(Box::new(key), Box::new(value))
        }
        name => return unknown(format!("the Arrow type {name:.60}")),
    })
}

/// `field(name, type, nullable, metadata)`, or a bare type.
fn field(loaded: &Loaded, at: Ref, name: &str, depth: usize) -> Result<FieldRef, Stop> {
    match loaded.called(at) {
        Some(call) if call.name == "field" => {
            let (Some(own), Some(data_type)) = (call.args.first(), call.args.get(1)) else {
                return unknown("a field without a type");
            };
            let nullable = !matches!(call.args.get(2).and_then(|n| loaded.value(*n)), Some(Value::Bool(false)));
            let name = loaded.text(*own).unwrap_or(name);
            Ok(Arc::new(Field::new(name, type_of(loaded, *data_type, depth)?, nullable)))
        }
        _ => Ok(Arc::new(Field::new(name, type_of(loaded, at, depth)?, true))),
    }
}

/// Types without parameters, under the names that `str(type)` gives.
fn alias(name: &str) -> Result<DataType, Stop> {
    Ok(match name {
        "null" => DataType::Null,
        "bool" | "boolean" => DataType::Boolean,
        "int8" => DataType::Int8,
        "int16" => DataType::Int16,
        "int32" => DataType::Int32,
        "int64" => DataType::Int64,
        "uint8" => DataType::UInt8,
        "uint16" => DataType::UInt16,
        "uint32" => DataType::UInt32,
        "uint64" => DataType::UInt64,
        "halffloat" | "float16" => DataType::Float16,
        "float" | "float32" => DataType::Float32,
        "double" | "float64" => DataType::Float64,
        "string" | "utf8" => DataType::Utf8,
        "large_string" | "large_utf8" => DataType::LargeUtf8,
        "string_view" => DataType::Utf8View,
        "binary" => DataType::Binary,
        "large_binary" => DataType::LargeBinary,
        "binary_view" => DataType::BinaryView,
        "date32" | "date32[day]" => DataType::Date32,
        "date64" | "date64[ms]" => DataType::Date64,
        "time32[s]" => DataType::Time32(TimeUnit::Second),
        "time32[ms]" => DataType::Time32(TimeUnit::Millisecond),
        "time64[us]" => DataType::Time64(TimeUnit::Microsecond),
        "time64[ns]" => DataType::Time64(TimeUnit::Nanosecond),
        "timestamp[s]" => DataType::Timestamp(TimeUnit::Second, None),
        "timestamp[ms]" => DataType::Timestamp(TimeUnit::Millisecond, None),
        "timestamp[us]" => DataType::Timestamp(TimeUnit::Microsecond, None),
        "timestamp[ns]" => DataType::Timestamp(TimeUnit::Nanosecond, None),
        "duration[s]" => DataType::Duration(TimeUnit::Second),
        "duration[ms]" => DataType::Duration(TimeUnit::Millisecond),
        "duration[us]" => DataType::Duration(TimeUnit::Microsecond),
        "duration[ns]" => DataType::Duration(TimeUnit::Nanosecond),
        other => return unknown(format!("the Arrow type {other:.60}")),
    })
}
