//! Columns as vineyard's array objects, and as this project's where vineyard has none.
//!
//! Layouts of vineyard's own types: `modules/basic/ds/arrow.vineyard-mod` and `python/vineyard/data/arrow.py` of v6d 0.24.
//! Offsets of strings and lists are 64-bit there. [`ARRAY`] objects keep every buffer as Arrow lays it out:
//! `__buffers_-i` in the order of Arrow IPC, `__children_-i`, and `dictionary_`.

use std::sync::Arc;

use arrow_schema::{DataType, Field as ArrowField, Schema, TimeUnit};

use super::column::Column;
use super::plan::{Draft, Field, Part, field};
use crate::dataset::native::ARRAY;
use crate::error::{Error, Kind, Result};

/// The object of one column.
pub(super) fn array(draft: &mut Draft, column: &Column) -> Result<Field> {
    use DataType::*;
    let mut fields = vec![
        field("length_", column.len),
        field("null_count_", column.null_count),
        field("offset_", 0),
        field("nbytes", column.size()),
    ];
    // A list is vineyard's, whatever its values are.
    if matches!(column.data_type, List(_) | LargeList(_))
        || (column.data_type != Null && is_vineyards(&column.data_type))
    {
        fields.push(("null_bitmap_".into(), validity(draft, column)));
    }
    let mut blob = |draft: &mut Draft, key: &str, parts| fields.push((key.into(), draft.blob(parts)));
    Ok(match &column.data_type {
        Null => draft.object("vineyard::NullArray", vec![field("length_", column.len), field("nbytes", 0)]),
        Boolean => {
            blob(draft, "buffer_", column.buffer(1));
            draft.object("vineyard::BooleanArray", fields)
        }
        Utf8 | LargeUtf8 | Binary | LargeBinary => {
            blob(draft, "buffer_offsets_", widened(column)?);
            blob(draft, "buffer_data_", column.buffer(2));
            let text = matches!(column.data_type, Utf8 | LargeUtf8);
            let class = if text { "LargeStringArray" } else { "LargeBinaryArray" };
            draft.object(format!("vineyard::BaseBinaryArray<arrow::{class}>"), fields)
        }
        FixedSizeBinary(n) if *n > 0 => {
            blob(draft, "buffer_", column.buffer(1));
            fields.push(field("byte_width_", *n));
            draft.object("vineyard::FixedSizeBinaryArray", fields)
        }
        List(_) | LargeList(_) => {
            blob(draft, "buffer_offsets_", widened(column)?);
            let child = column.children.first().ok_or_else(no_child)?;
            let values = array(draft, child)?;
            fields.push(("values_".into(), values));
            draft.object("vineyard::LargeListArray", fields)
        }
        other => match numeric(other) {
            Some(name) => {
                blob(draft, "buffer_", column.buffer(1));
                draft.object(format!("vineyard::NumericArray<{name}>"), fields)
            }
            None => return generic(draft, column),
        },
    })
}

/// The validity bitmap of a type that has one.
fn validity(draft: &mut Draft, column: &Column) -> Field {
    match draft.blob(column.buffer(0)) {
        Field::Empty => draft.all_valid(column.len, column.size()),
        bitmap => bitmap,
    }
}

fn no_child() -> Error {
    Error::new(Kind::Internal, "a nested column without its child")
}

/// The object that keeps the buffers of any type.
fn generic(draft: &mut Draft, column: &Column) -> Result<Field> {
    let mut fields = vec![
        field("length_", column.len),
        field("null_count_", column.null_count),
        field("nbytes", column.size()),
        field("type_", column.data_type.to_string()),
        field("__buffers_-size", column.buffers.len()),
    ];
    let has_validity = !matches!(column.data_type, DataType::Null | DataType::Union(..) | DataType::RunEndEncoded(..));
    for (i, parts) in column.buffers.iter().enumerate() {
        let blob = if i == 0 && has_validity { validity(draft, column) } else { draft.blob(parts.clone()) };
        fields.push((format!("__buffers_-{i}"), blob));
    }
    fields.push(field("__children_-size", column.children.len()));
    for (i, child) in column.children.iter().enumerate() {
        let child = generic(draft, child)?;
        fields.push((format!("__children_-{i}"), child));
    }
    if let Some(values) = &column.dictionary {
        let values = draft.shared(values, generic)?;
        fields.push(("dictionary_".into(), values));
    }
    Ok(draft.object(ARRAY, fields))
}

/// Offsets as 64-bit ones; those of joined columns are so already.
fn widened(column: &Column) -> Result<Vec<Part>> {
    let parts = column.buffer(1);
    if !matches!(column.data_type, DataType::Utf8 | DataType::Binary | DataType::List(_))
        || parts.iter().map(Part::len).sum::<u64>() == (column.len + 1) * 8
    {
        return Ok(parts);
    }
    parts
        .into_iter()
        .map(|part| match part {
            Part::Staged(at) => Ok(Part::Shifted { at, width: 4, shift: 0 }),
            Part::Zeros(n) => Ok(Part::Zeros(n * 2)),
            Part::Owned(buffer) => {
                let values = buffer.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                Ok(Part::owned(values.flat_map(|v| i64::from(v).to_le_bytes()).collect()))
            }
            Part::Ones(_) | Part::Inflated(_) | Part::Shifted { .. } | Part::Unpacked { .. } | Part::Transposed(_) => {
                Err(Error::new(Kind::Internal, "offsets that were not looked at"))
            }
        })
        .collect()
}

/// The parameter of `vineyard::NumericArray`: Arrow C++'s name of the type.
fn numeric(data_type: &DataType) -> Option<String> {
    use DataType::*;
    let unit = |unit: &TimeUnit| match unit {
        TimeUnit::Second => "s",
        TimeUnit::Millisecond => "ms",
        TimeUnit::Microsecond => "us",
        TimeUnit::Nanosecond => "ns",
    };
    Some(match data_type {
        Int8 => "int8".into(),
        Int16 => "int16".into(),
        Int32 => "int32".into(),
        Int64 => "int64".into(),
        UInt8 => "uint8".into(),
        UInt16 => "uint16".into(),
        UInt32 => "uint32".into(),
        UInt64 => "uint64".into(),
        Float16 => "halffloat".into(),
        Float32 => "float".into(),
        Float64 => "double".into(),
        Date32 => "date32[day]".into(),
        Date64 => "date64[ms]".into(),
        Time32(u) => format!("time32[{}]", unit(u)),
        Time64(u) => format!("time64[{}]", unit(u)),
        Duration(u) => format!("duration[{}]", unit(u)),
        Timestamp(u, None) => format!("timestamp[{}]", unit(u)),
        Timestamp(u, Some(zone)) => format!("timestamp[{}, tz={zone}]", unit(u)),
        _ => return None,
    })
}

/// True if vineyard has an array type for it, and no [`ARRAY`] is needed.
pub(super) fn is_vineyards(data_type: &DataType) -> bool {
    use DataType::*;
    match data_type {
        Null | Boolean | Utf8 | LargeUtf8 | Binary | LargeBinary => true,
        FixedSizeBinary(n) => *n > 0,
        List(child) | LargeList(child) => is_vineyards(child.data_type()),
        other => numeric(other).is_some(),
    }
}

/// The schema that vineyard's array types have: large strings, binaries and lists.
pub(super) fn stored_schema(schema: &Schema) -> Schema {
    let fields: Vec<ArrowField> =
        schema.fields().iter().map(|f| f.as_ref().clone().with_data_type(stored_type(f.data_type()))).collect();
    Schema::new_with_metadata(fields, schema.metadata().clone())
}

fn stored_type(data_type: &DataType) -> DataType {
    match data_type {
        DataType::Utf8 => DataType::LargeUtf8,
        DataType::Binary => DataType::LargeBinary,
        DataType::List(child) | DataType::LargeList(child) => {
            let inner = stored_type(child.data_type());
            DataType::LargeList(Arc::new(child.as_ref().clone().with_data_type(inner)))
        }
        other => other.clone(),
    }
}
