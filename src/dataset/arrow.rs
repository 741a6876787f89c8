//! Arrow arrays, record batches and tables as vineyard stores them.
//! Layout: `python/vineyard/data/arrow.py` and `modules/basic/ds/arrow.vineyard-mod` of v6d 0.24.

use std::sync::Arc;

use arrow_schema::{DataType, Field, Fields, Schema, SchemaRef, TimeUnit};
use serde::Deserialize;
use serde_json::Value;

use super::column::{Column, EXTENSION, NOTE, item};
use super::derive;
use super::dtype::Dtype;
use super::frame::Cells;
use super::materialize::unify_dictionaries;
use super::native;
use super::pickle;
use super::span::Span;
use super::table::{ArrayLayout, Batch, Table, fixed_width};
use super::tensor::{self, blob_span, whole_blob};
use crate::error::{Context, Error, Kind, Result};
use crate::vineyard::{BlobSource, Meta};

/// Largest schema message that is read from a blob.
const MAX_SCHEMA: u64 = 64 << 20;

/// The window of an array: `offset_` and `length_`.
struct Window {
    offset: u64,
    len: u64,
    /// Elements of the whole: the sum of both.
    whole: u64,
    null_count: Option<u64>,
}

fn window(meta: &Meta) -> Result<Window> {
    let len = meta.unsigned("length_")?;
    let offset = if meta.get("offset_").is_some() { meta.unsigned("offset_")? } else { 0 };
    let whole = offset
        .checked_add(len)
        .filter(|n| *n <= i64::MAX as u64)
        .ok_or_else(|| meta.error(format!("has a window at {offset} of {len} elements")))?;
    // Writers say -1 where they did not count; a count past the length is no count.
    let null_count = meta.get("null_count_").and_then(Value::as_u64).filter(|n| *n <= len);
    Ok(Window { offset, len, whole, null_count })
}

/// The validity bitmap of a window, absent where nothing is null, and the number of nulls.
fn validity(meta: &Meta, window: &Window) -> Result<(Span, Option<u64>)> {
    if window.null_count == Some(0) || window.len == 0 || meta.get("null_bitmap_").is_none() {
        return Ok((Span::EMPTY, Some(0)));
    }
    let key = meta.blob("null_bitmap_")?;
    if !key.id.is_stored_blob() {
        return Ok((Span::EMPTY, Some(0)));
    }
    let bitmap = Span::blob(key, window.whole.div_ceil(8));
    Ok((derive::bit_slice(&bitmap, window.offset, window.len)?, window.null_count))
}

/// Buffer `key` from element `offset` on, `len` elements of `width` bytes.
fn values(meta: &Meta, key: &str, width: u64, offset: u64, len: u64) -> Result<Span> {
    let too_big = || meta.error("has more than 2^64 bytes");
    let whole = offset.checked_add(len).and_then(|n| n.checked_mul(width)).ok_or_else(too_big)?;
    if len == 0 || width == 0 {
        return Ok(Span::EMPTY);
    }
    blob_span(meta, meta.blob(key)?, whole)?.slice(offset * width, len * width)
}

/// Offsets of a window into strings or lists: one more than elements.
fn window_offsets(meta: &Meta, window: &Window, width: u64) -> Result<Span> {
    if window.len == 0 {
        // Arrow wants one offset even then, and writers may have stored none.
        return Ok(Span::Zeros(width));
    }
    values(meta, "buffer_offsets_", width, window.offset, window.len + 1)
}

/// The Arrow type that vineyard's name of a numeric array means (`int64`, `timestamp[us, tz=UTC]`, `date32[day]`).
fn numeric_type(name: &str) -> Option<DataType> {
    let (base, argument) = match name.split_once('[') {
        Some((base, rest)) => (base, rest.strip_suffix(']')?),
        None => (name, ""),
    };
    let (unit, zone) = match argument.split_once(", tz=") {
        Some((unit, zone)) => (unit, Some(zone)),
        None => (argument, None),
    };
    let time = || match unit {
        "s" => Some(TimeUnit::Second),
        "ms" => Some(TimeUnit::Millisecond),
        "us" => Some(TimeUnit::Microsecond),
        "ns" => Some(TimeUnit::Nanosecond),
        _ => None,
    };
    Some(match base {
        "timestamp" => DataType::Timestamp(time()?, zone.map(Arc::from)),
        "duration" => DataType::Duration(time()?),
        "date32" => DataType::Date32,
        "date64" => DataType::Date64,
        "time32" => match time()? {
            unit @ (TimeUnit::Second | TimeUnit::Millisecond) => DataType::Time32(unit),
            _ => return None,
        },
        "time64" => match time()? {
            unit @ (TimeUnit::Microsecond | TimeUnit::Nanosecond) => DataType::Time64(unit),
            _ => return None,
        },
        _ => {
            let dtype = Dtype::parse_name(name).filter(|d| "iuf".contains(d.kind))?;
            return Some(dtype.column(Span::EMPTY, 0).ok()?.layout.data_type);
        }
    })
}

/// True if both say the same of the same bytes, so that the schema's word is taken: time zones, decimals.
fn schema_knows_better(stored: &DataType, schema: &DataType) -> bool {
    let same_width = fixed_width(stored).is_some() && fixed_width(stored) == fixed_width(schema);
    let number = |t: &DataType| t.is_integer() || t.is_floating();
    same_width && !number(schema) && !matches!(schema, DataType::Dictionary(..))
}

fn flat(data_type: DataType, window: &Window, nulls: Option<u64>, buffers: Vec<Span>) -> Column {
    Column::new(ArrayLayout::flat(data_type, window.len, nulls, buffers))
}

/// An array of any of vineyard's Arrow types. `expected` is its type in the schema of the table it belongs to.
///
/// # Errors
/// `Malformed` if the members do not fit together, `Unsupported` for other types.
pub fn array(meta: &Meta, expected: Option<&DataType>, source: &dyn BlobSource) -> Result<Column> {
    let parameter = meta.type_parameter();
    match meta.base_type() {
        "vineyard::NumericArray" => {
            let window = window(meta)?;
            let data_type = match (numeric_type(parameter), expected) {
                (Some(stored), Some(schema)) if schema_knows_better(&stored, schema) => schema.clone(),
                (Some(stored), _) => stored,
                (None, Some(schema)) if fixed_width(schema).is_some() => schema.clone(),
                (None, _) => return Err(unsupported(meta)),
            };
            let width = fixed_width(&data_type).ok_or_else(|| unsupported(meta))?;
            let (bitmap, nulls) = validity(meta, &window)?;
            let data = values(meta, "buffer_", width, window.offset, window.len)?;
            Ok(flat(data_type, &window, nulls, vec![bitmap, data]))
        }
        "vineyard::BooleanArray" => {
            let window = window(meta)?;
            let (bitmap, nulls) = validity(meta, &window)?;
            let data = if window.len == 0 {
                Span::EMPTY
            } else {
                let all = blob_span(meta, meta.blob("buffer_")?, window.whole.div_ceil(8))?;
                derive::bit_slice(&all, window.offset, window.len)?
            };
            Ok(flat(DataType::Boolean, &window, nulls, vec![bitmap, data]))
        }
        "vineyard::FixedSizeBinaryArray" => {
            let window = window(meta)?;
            let width = i32::try_from(meta.unsigned("byte_width_")?)
                .map_err(|_| meta.error("has elements of more than 2 GiB"))?;
            let stored = DataType::FixedSizeBinary(width);
            let data_type = expected.filter(|schema| schema_knows_better(&stored, schema)).unwrap_or(&stored).clone();
            let (bitmap, nulls) = validity(meta, &window)?;
            let data = values(meta, "buffer_", width as u64, window.offset, window.len)?;
            Ok(flat(data_type, &window, nulls, vec![bitmap, data]))
        }
        "vineyard::BaseBinaryArray" | "vineyard::LargeStringArray" | "vineyard::StringArray" => {
            let window = window(meta)?;
            let (data_type, width) = match (parameter, meta.base_type()) {
                ("arrow::StringArray", _) | ("", "vineyard::StringArray") => (DataType::Utf8, 4),
                ("arrow::BinaryArray", _) => (DataType::Binary, 4),
                ("arrow::LargeBinaryArray", _) => (DataType::LargeBinary, 8),
                ("arrow::LargeStringArray", _) | ("", "vineyard::LargeStringArray") => (DataType::LargeUtf8, 8),
                _ => return Err(unsupported(meta)),
            };
            let (bitmap, nulls) = validity(meta, &window)?;
            let offsets = window_offsets(meta, &window, width)?;
            let data = if window.len == 0 { Span::EMPTY } else { whole_blob(meta.blob("buffer_data_")?, source)? };
            Ok(flat(data_type, &window, nulls, vec![bitmap, offsets, data]))
        }
        "vineyard::LargeListArray" | "vineyard::ListArray" | "vineyard::BaseListArray" => list(meta, expected, source),
        // The values of a list may be of a type that vineyard has no array for.
        native::ARRAY => match expected {
            Some(data_type) => native::decode_array(meta, data_type, source).map(Column::new),
            None => Err(unsupported(meta)),
        },
        "vineyard::NullArray" => Ok(Column::new(ArrayLayout::null(window(meta)?.len))),
        "vineyard::PickleBuffer" => match pickle::cells(pickle_span(meta)?, None, source)? {
            Cells::Column(column) => Ok(column),
            _ => Err(unsupported(meta)),
        },
        "vineyard::Tensor" => match tensor::cells(meta, source)? {
            Cells::Column(column) => Ok(column),
            _ => Err(unsupported(meta)),
        },
        _ => Err(unsupported(meta)),
    }
}

fn list(meta: &Meta, expected: Option<&DataType>, source: &dyn BlobSource) -> Result<Column> {
    let window = window(meta)?;
    let field = match expected {
        Some(DataType::List(field) | DataType::LargeList(field) | DataType::Map(field, _)) => Some(field),
        _ => None,
    };
    let child = array(&meta.member("values_")?, field.map(|f| f.data_type()), source)?.layout;
    let field = match field {
        Some(field) => Arc::new(retyped(field, &child)),
        None => item(&child.data_type),
    };
    let narrow = meta.base_type() == "vineyard::ListArray" || meta.type_parameter() == "arrow::ListArray";
    let (data_type, width) = if narrow { (DataType::List(field), 4) } else { (DataType::LargeList(field), 8) };
    let (bitmap, nulls) = validity(meta, &window)?;
    let mut layout =
        ArrayLayout::flat(data_type, window.len, nulls, vec![bitmap, window_offsets(meta, &window, width)?]);
    layout.children = vec![child];
    Ok(Column::new(layout))
}

/// A field with the type that its column really has.
fn retyped(field: &Field, layout: &ArrayLayout) -> Field {
    let nullable = field.is_nullable() || layout.null_count != Some(0);
    field.clone().with_data_type(layout.data_type.clone()).with_nullable(nullable)
}

fn unsupported(meta: &Meta) -> Error {
    let what = format!("object {} of type {:.80} has no column form", meta.id(), meta.typename());
    Error::new(Kind::Unsupported, what)
}

/// The bytes of a `PickleBuffer`: the first `size_` of its blob.
pub fn pickle_span(meta: &Meta) -> Result<Span> {
    blob_span(meta, meta.blob("buffer_")?, meta.unsigned("size_")?)
}

/// An array of its own, as a table of one column.
pub fn array_table(meta: &Meta, source: &dyn BlobSource) -> Result<Table> {
    let column = array(meta, None, source)?;
    let schema = Arc::new(Schema::new(vec![column.field("value")]));
    let rows = column.layout.len;
    Ok(Table { schema, batches: vec![Batch { rows, columns: vec![column.layout] }] })
}

/// `vineyard::SchemaProxy`: an Arrow IPC schema message, as JSON text of decimal bytes or in a blob.
pub fn schema(meta: &Meta, source: &dyn BlobSource) -> Result<SchemaRef> {
    #[derive(Deserialize)]
    struct Bytes {
        bytes: Vec<u8>,
    }
    let bytes = if meta.get("schema_binary_").is_some() {
        let text = meta.string("schema_binary_")?;
        let parsed: Bytes = serde_json::from_str(text)
            .map_err(|e| meta.error("has a \"schema_binary_\" that is no list of bytes").with_source(e))?;
        parsed.bytes
    } else {
        let span = whole_blob(meta.blob("buffer_")?, source)?;
        if span.len() > MAX_SCHEMA {
            return Err(meta.error(format!("has a schema of {} bytes", span.len())));
        }
        span.to_vec(source)?
    };
    let schema = arrow_ipc::convert::try_schema_from_ipc_buffer(&bytes)
        .map_err(|e| meta.error("has a schema that is no Arrow schema message").with_source(e))?;
    Ok(Arc::new(schema))
}

/// The columns of one `vineyard::RecordBatch` under a schema.
fn batch(meta: &Meta, schema: &Schema, source: &dyn BlobSource) -> Result<(u64, Vec<Column>)> {
    let rows = meta.unsigned("row_num_")?;
    let members = meta.list("__columns_")?;
    if members.len() != schema.fields().len() {
        let fields = schema.fields().len();
        return Err(meta.error(format!("has {} columns and a schema of {fields}", members.len())));
    }
    let columns = members.iter().zip(schema.fields()).map(|(member, field)| {
        let column = match member.base_type() {
            "vineyard::PickleBuffer" => {
                let data = pickle_span(member)?;
                pickle::cells(data, Some(rows), source)?.into_column(rows)?
            }
            _ => match array(member, Some(field.data_type()), source) {
                Err(error) if error.kind() == Kind::Unsupported => {
                    Cells::Unknown(error.to_string()).into_column(rows)?
                }
                other => other?,
            },
        };
        if column.layout.len != rows {
            return Err(member.error(format!("has {} elements in a batch of {rows} rows", column.layout.len)));
        }
        Ok(column)
    });
    let columns = columns
        .zip(schema.fields())
        .map(|(column, field)| column.context(|| format!("column {:?}", field.name())))
        .collect::<Result<_>>()?;
    Ok((rows, columns))
}

/// `vineyard::Table` and `vineyard::RecordBatch`.
///
/// # Errors
/// `Malformed` if schema, batches and columns do not fit together.
pub fn table(meta: &Meta, source: &dyn BlobSource) -> Result<Table> {
    let declared = schema(&meta.member("schema_")?, source)?;
    let parts = match meta.base_type() {
        "vineyard::RecordBatch" => vec![meta.clone()],
        _ => meta.list("partitions_")?,
    };
    let parts = parts.iter().map(|part| batch(part, &declared, source)).collect::<Result<Vec<_>>>()?;
    assemble(meta, &declared, parts, source)
}

/// Batches whose columns have the types they really have, which the schema then says too.
fn assemble(
    meta: &Meta,
    declared: &Schema,
    mut parts: Vec<(u64, Vec<Column>)>,
    source: &dyn BlobSource,
) -> Result<Table> {
    let mut fields: Vec<Field> = declared.fields().iter().map(|f| f.as_ref().clone()).collect();
    for (number, (_, columns)) in parts.iter().enumerate() {
        for (field, column) in fields.iter_mut().zip(columns) {
            if number > 0 && *field.data_type() != column.layout.data_type {
                let (a, b) = (field.data_type().clone(), &column.layout.data_type);
                return Err(meta.error(format!("has batches of types {a} and {b} in column {:?}", field.name())));
            }
            let mut metadata = field.metadata().clone();
            if column.metadata.contains_key(NOTE) {
                // What stands there instead is not what the extension type is stored as.
                metadata.retain(|key, _| !key.starts_with(EXTENSION));
            }
            metadata.extend(column.metadata.clone());
            *field = retyped(field, &column.layout).with_metadata(metadata);
        }
    }
    if parts.len() > 1 {
        for (i, field) in fields.iter().enumerate() {
            let mut columns: Vec<_> =
                parts.iter_mut().filter_map(|(_, c)| c.get_mut(i)).map(|c| &mut c.layout).collect();
            unify_dictionaries(&mut columns, source)
                .context(|| format!("object {}: column {:?}", meta.id(), field.name()))?;
        }
    }
    let schema = Schema::new_with_metadata(Fields::from(fields), declared.metadata().clone());
    let batches = parts
        .into_iter()
        .map(|(rows, columns)| Batch { rows, columns: columns.into_iter().map(|c| c.layout).collect() })
        .collect();
    Ok(Table { schema: Arc::new(schema), batches })
}
