//! Tables that came from pandas as a vineyard `DataFrame`, where it holds every column exactly.
//!
//! Layout: `python/vineyard/data/dataframe.py` and `python/vineyard/data/index.py` of v6d 0.24. What decides are the
//! `pandas` key of the schema (<https://pandas.pydata.org/docs/development/developer.html>) and the values: numbers without
//! nulls (NaN under a null of a float column is as good), booleans without nulls, strings of `object` columns, times with or
//! without a named zone.

use arrow_schema::{DataType, Schema, TimeUnit};
use serde_json::Value;

use super::check;
use super::column::{Column, width};
use super::datetimes::{NOT_A_TIME, Times};
use super::join::{buffer_bytes, join_batches};
use super::native;
use super::plan::{Draft, Field, Part, field};
use super::table::{Batches, schema_text};
use crate::dataset::native::{NULLS, TRUE_SCHEMA, VALIDITY};
use crate::error::Result;

/// The `pandas` key, as far as a frame can say it.
struct Pandas {
    /// Column labels as JSON text, by place in the schema; `None` for the index.
    labels: Vec<Option<Value>>,
    /// Place of the index column.
    index: Option<usize>,
    /// Name of the index, whether it is a column or a range.
    index_name: Value,
    /// First value and step of an index that is a range; `None` for row numbers from 0 without a name, which vineyard
    /// says by having no index.
    range: Option<(i64, i64)>,
    /// pandas' type of each column of the schema.
    types: Vec<(String, String)>,
}

/// Reads the `pandas` key; `None` if there is none, or if it says something that vineyard's frame has no place for.
fn pandas(schema: &Schema, rows: u64) -> Option<Pandas> {
    let value: Value = serde_json::from_str(schema.metadata().get("pandas")?).ok()?;
    // `DataFrame.attrs` and a name of the columns' own index are lost in a vineyard frame.
    if value.get("attributes").is_some_and(|a| a.as_object().is_some_and(|a| !a.is_empty())) {
        return None;
    }
    let [columns_index] = value.get("column_indexes")?.as_array()?.as_slice() else { return None };
    if !columns_index.get("name").unwrap_or(&Value::Null).is_null() {
        return None;
    }
    let integer_labels = match columns_index.get("pandas_type")?.as_str()? {
        "unicode" => false,
        "int64" => true,
        _ => return None,
    };
    let columns = value.get("columns")?.as_array()?;
    let [index] = value.get("index_columns")?.as_array()?.as_slice() else { return None };
    let mut range = None;
    let mut range_name = Value::Null;
    let index_name = match index {
        Value::String(name) => Some(name.as_str()),
        described => {
            let number = |key: &str| described.get(key).and_then(Value::as_i64);
            let (start, stop, step) = (number("start")?, number("stop")?, number("step")?);
            range_name = described.get("name").cloned().unwrap_or(Value::Null);
            if described.get("kind").and_then(Value::as_str) != Some("range") || range_len(start, stop, step)? != rows {
                return None;
            }
            range = Some((start, step)).filter(|r| *r != (0, 1) || !range_name.is_null());
            None
        }
    };
    let mut read = Pandas { labels: Vec::new(), index: None, index_name: range_name, range, types: Vec::new() };
    for (i, field) in schema.fields().iter().enumerate() {
        let mut described =
            columns.iter().filter(|c| c.get("field_name").and_then(Value::as_str) == Some(field.name()));
        let (column, None) = (described.next()?, described.next()) else { return None };
        let text = |key: &str| column.get(key).and_then(Value::as_str).map(str::to_owned);
        read.types.push((text("pandas_type")?, text("numpy_type")?));
        if index_name == Some(field.name()) {
            read.index = Some(i);
            read.index_name = column.get("name").cloned().unwrap_or(Value::Null);
            read.labels.push(None);
            continue;
        }
        // A column whose name is not its field's name was renamed on the way.
        let name = column.get("name")?.as_str().filter(|name| name == field.name())?;
        read.labels.push(Some(if integer_labels { Value::from(name.parse::<i64>().ok()?) } else { name.into() }));
    }
    if index_name.is_some() && read.index.is_none() || columns.len() != schema.fields().len() {
        return None;
    }
    // An empty frame loses its index in the official client.
    read.labels.iter().any(Option::is_some).then_some(read)
}

/// Number of values of a range as Python has it.
fn range_len(start: i64, stop: i64, step: i64) -> Option<u64> {
    let (start, stop, step) = (i128::from(start), i128::from(stop), i128::from(step));
    let distance = if step > 0 { stop - start } else { start - stop };
    if step == 0 {
        return None;
    }
    let count = (distance.max(0) + step.abs() - 1) / step.abs();
    u64::try_from(count).ok()
}

/// How a column becomes a tensor.
struct Cells {
    /// Parameter of `vineyard::Tensor`.
    parameter: String,
    value_type: String,
    descr: String,
    /// True for strings, whose buffer is an array object.
    strings: bool,
    /// Times, which are no tensor but a pickle.
    times: Option<Times>,
}

/// The tensor type of a column, by its Arrow type and numpy's.
fn cells(data_type: &DataType, numpy_type: &str, pandas_type: &str, index: bool) -> Option<Cells> {
    use DataType::*;
    let descr = match data_type {
        Boolean if !index => "|b1",
        Int8 => "|i1",
        Int16 => "<i2",
        Int32 => "<i4",
        Int64 => "<i8",
        UInt8 => "|u1",
        UInt16 => "<u2",
        UInt32 => "<u4",
        UInt64 => "<u8",
        Float16 => "<f2",
        Float32 => "<f4",
        Float64 => "<f8",
        Timestamp(unit, None) if index => match unit {
            TimeUnit::Second => "<M8[s]",
            TimeUnit::Millisecond => "<M8[ms]",
            TimeUnit::Microsecond => "<M8[us]",
            TimeUnit::Nanosecond => "<M8[ns]",
        },
        Timestamp(..) if !index => {
            let times = Times::of(data_type).filter(|times| times.numpy_type() == numpy_type)?;
            let nothing = String::new;
            return Some(Cells {
                parameter: nothing(),
                value_type: nothing(),
                descr: nothing(),
                strings: false,
                times: Some(times),
            });
        }
        Utf8 | LargeUtf8 if numpy_type == "object" && pandas_type == "unicode" => {
            let text = |t: &str| t.to_owned();
            let parameter = text("std::string");
            return Some(Cells {
                parameter,
                value_type: text("string"),
                descr: text("str"),
                strings: true,
                times: None,
            });
        }
        _ => return None,
    };
    let (parameter, value_type) = super::npy::element(descr)?;
    (numpy_type == value_type).then(|| Cells {
        parameter,
        value_type,
        descr: descr.into(),
        strings: false,
        times: None,
    })
}

/// True if every null of a column of times has `NaT` below it, as pandas writes them, and nothing else has.
fn nat_under_nulls(column: &Column, staged: &[u8]) -> Result<bool> {
    let bitmap = buffer_bytes(&column.buffer(0), staged)?;
    let values = buffer_bytes(&column.buffer(1), staged)?;
    let is_nat = |value: &[u8]| value == NOT_A_TIME.to_le_bytes();
    let is_null = |i: usize| !bitmap.is_empty() && !check::bit(&bitmap, i);
    Ok(values.chunks_exact(8).enumerate().all(|(i, value)| is_null(i) == is_nat(value)))
}

/// True if every null of a float column has a NaN below it, as pandas writes them.
fn nan_under_nulls(column: &Column, staged: &[u8]) -> Result<bool> {
    let bitmap = buffer_bytes(&column.buffer(0), staged)?;
    let Some(width) = width(&column.data_type) else { return Ok(false) };
    let values = buffer_bytes(&column.buffer(1), staged)?;
    let is_nan = |bytes: &[u8]| match *bytes {
        [a, b, c, d, e, f, g, h] => f64::from_le_bytes([a, b, c, d, e, f, g, h]).is_nan(),
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]).is_nan(),
        [_, high] if high & 0x7c == 0x7c => bytes[0] != 0 || high & 3 != 0,
        _ => false,
    };
    Ok(values.chunks_exact(width as usize).enumerate().all(|(i, value)| check::bit(&bitmap, i) || is_nan(value)))
}

/// Most rows of a frame: what is computed for one (an index that was a range, bytes of booleans) stays within a few GiB.
const MAX_ROWS: u64 = 1 << 28;

/// The frame and the tensor types of its columns, if the schema alone does not rule it out.
fn candidate(schema: &Schema, rows: u64) -> Option<(Pandas, Vec<Cells>)> {
    let pandas = pandas(schema, rows).filter(|_| rows <= MAX_ROWS)?;
    let mut kinds = Vec::with_capacity(schema.fields().len());
    for (i, (field, (pandas_type, numpy_type))) in schema.fields().iter().zip(&pandas.types).enumerate() {
        let is_index = pandas.labels.get(i).is_some_and(Option::is_none);
        kinds.push(cells(field.data_type(), numpy_type, pandas_type, is_index)?);
    }
    Some((pandas, kinds))
}

/// True if the table may be a frame, by its schema.
pub(super) fn may_be(schema: &Schema, rows: u64) -> bool {
    candidate(schema, rows).is_some()
}

/// The root's keys of a `vineyard::DataFrame`, or `None` if the table is no frame, or none that vineyard holds exactly.
pub(super) fn frame(draft: &mut Draft, batches: &Batches, staged: &[u8]) -> Result<Option<Vec<(String, Field)>>> {
    let rows = batches.batches.iter().map(|(rows, _)| rows).sum();
    let schema = &batches.schema;
    let Some((pandas, kinds)) = candidate(schema, rows) else { return Ok(None) };
    let joined;
    let empty: Vec<Column>;
    let columns = if batches.batches.is_empty() {
        empty = schema.fields().iter().map(|f| Column::empty(f.data_type())).collect();
        &empty
    } else {
        match join_batches(&batches.batches, staged)? {
            Some(columns) => {
                joined = columns;
                &joined
            }
            None => return Ok(None),
        }
    };
    for (i, (column, kind)) in columns.iter().zip(&kinds).enumerate() {
        if kind.times.is_some() {
            if !nat_under_nulls(column, staged)? {
                return Ok(None);
            }
            continue;
        }
        if column.null_count == 0 || (kind.strings && pandas.labels.get(i).is_some_and(Option::is_some)) {
            continue;
        }
        if !column.data_type.is_floating() || !nan_under_nulls(column, staged)? {
            return Ok(None);
        }
    }
    build(draft, schema, rows, &pandas, columns, &kinds, staged).map(Some)
}

fn build(
    draft: &mut Draft,
    schema: &Schema,
    rows: u64,
    pandas: &Pandas,
    columns: &[Column],
    kinds: &[Cells],
    staged: &[u8],
) -> Result<Vec<(String, Field)>> {
    let mut root = vec![
        field("partition_index_row_", -1),
        field("partition_index_column_", -1),
        field("row_batch_index_", 0),
        field("nbytes", 0),
        field(TRUE_SCHEMA, schema_text(schema)?),
    ];
    let mut labels = Vec::new();
    for (i, (column, kind)) in columns.iter().zip(kinds).enumerate() {
        let tensor = tensor(draft, column, kind, rows, staged)?;
        if column.null_count > 0 && !kind.strings {
            let bitmap = draft.blob(column.buffer(0));
            root.push((format!("{VALIDITY}-{i}"), bitmap));
            root.push(field(format!("{NULLS}-{i}"), column.null_count));
        }
        match pandas.labels.get(i).and_then(Option::as_ref) {
            Some(label) => {
                let number = labels.len();
                root.push(field(format!("__values_-key-{number}"), label.to_string()));
                root.push((format!("__values_-value-{number}"), tensor));
                labels.push(label.clone());
            }
            None => add_index(draft, &mut root, &pandas.index_name, kind, tensor),
        }
    }
    if let Some((start, step)) = pandas.range {
        let (parameter, value_type) = ("int64".to_owned(), "int64".to_owned());
        let kind = Cells { parameter, value_type, descr: "<i8".into(), strings: false, times: None };
        let values = (0..rows as i64).flat_map(|i| (start + i * step).to_le_bytes()).collect();
        let column =
            Column { len: rows, buffers: vec![vec![], vec![Part::owned(values)]], ..Column::empty(&DataType::Int64) };
        let tensor = tensor(draft, &column, &kind, rows, staged)?;
        add_index(draft, &mut root, &pandas.index_name, &kind, tensor);
    }
    root.push(field("__values_-size", labels.len()));
    root.push(field("columns_", Value::Array(labels).to_string()));
    Ok(root)
}

fn add_index(draft: &mut Draft, root: &mut Vec<(String, Field)>, name: &Value, kind: &Cells, tensor: Field) {
    let value_type = if kind.strings { "object" } else { kind.value_type.as_str() };
    let index = vec![
        field("name", name.to_string()),
        field("value_type_", value_type),
        ("value_".into(), tensor),
        field("nbytes", 0),
    ];
    let index = draft.object("vineyard::Index", index);
    root.push(("index_".into(), index));
}

fn tensor(draft: &mut Draft, column: &Column, kind: &Cells, rows: u64, staged: &[u8]) -> Result<Field> {
    if let Some(times) = &kind.times {
        let parts = times.pickle(rows, column.buffer(1));
        let size: u64 = parts.iter().map(Part::len).sum();
        let buffer = draft.blob(parts);
        let fields = vec![field("size_", size), field("nbytes", size), ("buffer_".into(), buffer)];
        return Ok(draft.object("vineyard::PickleBuffer", fields));
    }
    let (buffer, nbytes) = if kind.strings {
        (native::array(draft, column)?, rows * 8)
    } else if column.data_type == DataType::Boolean {
        let parts = column.buffer(1);
        let part = match parts.as_slice() {
            [Part::Staged(at)] => Part::Unpacked { at: at.start, bits: rows },
            parts => {
                let bitmap = buffer_bytes(parts, staged)?;
                let bytes = (0..rows as usize).map(|i| u8::from(!bitmap.is_empty() && check::bit(&bitmap, i)));
                Part::owned(bytes.collect())
            }
        };
        (draft.blob(vec![part]), rows)
    } else {
        (draft.blob(column.buffer(1)), column.buffer(1).iter().map(Part::len).sum())
    };
    let fields = vec![
        field("value_type_", kind.value_type.as_str()),
        field("value_type_meta_", kind.descr.as_str()),
        field("shape_", format!("[{rows}]")),
        field("partition_index_", "[]"),
        field("order_", "\"C\""),
        field("nbytes", nbytes),
        ("buffer_".into(), buffer),
    ];
    Ok(draft.object(format!("vineyard::Tensor<{}>", kind.parameter), fields))
}
