//! This project's own object types, and its keys on vineyard's.
//!
//! - [`ARRAY`]: an Arrow array of any type; its type is the schema's. `length_`, `null_count_`, the buffers
//!   `__buffers_-i` in the order of Arrow IPC, `__children_-i`, `dictionary_`.
//! - [`FILE`]: a file as it is: `size_` and `buffer_`.
//! - [`TRUE_SCHEMA`] on a table: the schema as it was written, in vineyard's text form, where vineyard's own array types
//!   differ (64-bit offsets of strings and lists).

use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema, SchemaRef, UnionMode};
use serde_json::Value;

use super::frame::Cells;
use super::materialize::unify_dictionaries;
use super::publish::{schema_message, type_width};
use super::recipe::narrow;
use super::{ArrayLayout, Batch, Dataset, Span, Table, arrow, pickle, tensor};
use crate::error::{Context, Error, Result};
use crate::vineyard::{BlobSource, Meta, ObjectId};

/// Type of a generic Arrow array.
pub const ARRAY: &str = "vineyard_fs::ArrowArray";
/// Type of a file that is stored as it is.
pub const FILE: &str = "vineyard_fs::File";
/// Key of a table's schema as it was written.
pub const TRUE_SCHEMA: &str = "vineyard_fs_schema_";

/// Key prefix, on a frame, of the validity bitmap of a column by its place in the schema: NaN stands for null in pandas.
pub const VALIDITY: &str = "vineyard_fs_validity_";
/// Key prefix of the number of nulls in that bitmap.
pub const NULLS: &str = "vineyard_fs_nulls_";

/// Most levels of nested arrays.
const MAX_DEPTH: usize = 64;

/// Reads a [`FILE`].
///
/// # Errors
/// `Malformed` if it has no size or no bytes.
pub fn decode_file(meta: &Meta) -> Result<Dataset> {
    Ok(Dataset::File(Span::blob(meta.blob("buffer_")?, meta.unsigned("size_")?)))
}

/// The schema of a table as it was written, if vineyard's differs from it.
///
/// # Errors
/// `Malformed` if it is there and is none.
pub fn true_schema(meta: &Meta) -> Result<Option<SchemaRef>> {
    if meta.get(TRUE_SCHEMA).is_none() {
        return Ok(None);
    }
    let value = meta.json_text(TRUE_SCHEMA)?;
    let bytes: Option<Vec<u8>> = value
        .get("bytes")
        .and_then(|b| b.as_array())
        .and_then(|list| list.iter().map(|v| v.as_u64().and_then(|n| u8::try_from(n).ok())).collect());
    let bytes = bytes.ok_or_else(|| meta.error("has a schema that is no list of bytes"))?;
    let schema = schema_message(&bytes).map_err(|e| meta.error("has a broken schema").with_source(e))?;
    Ok(Some(Arc::new(schema)))
}

/// The table of a `vineyard::Table` or `vineyard::DataFrame` that was written as a file, exactly as its schema was; `None`
/// for objects without [`TRUE_SCHEMA`].
///
/// # Errors
/// `Malformed` if schema and columns do not fit together.
pub fn written_table(meta: &Meta, source: &dyn BlobSource) -> Result<Option<Table>> {
    let Some(schema) = true_schema(meta)? else { return Ok(None) };
    let batches = match meta.base_type() {
        "vineyard::DataFrame" => vec![frame_batch(meta, &schema, source)?],
        "vineyard::Table" => {
            let parts = meta.list("partitions_")?;
            let mut parts: Vec<Batch> = parts.iter().map(|part| batch(part, &schema, source)).collect::<Result<_>>()?;
            let several = parts.len() > 1;
            for (i, field) in schema.fields().iter().enumerate().filter(|_| several) {
                let mut columns: Vec<_> = parts.iter_mut().filter_map(|part| part.columns.get_mut(i)).collect();
                unify_dictionaries(&mut columns, source)
                    .context(|| format!("object {}: column {:?}", meta.id(), field.name()))?;
            }
            parts
        }
        _ => return Err(meta.error(format!("has a {TRUE_SCHEMA:?} and is no table"))),
    };
    Ok(Some(Table { schema, batches }))
}

fn batch(meta: &Meta, schema: &Schema, source: &dyn BlobSource) -> Result<Batch> {
    let rows = meta.unsigned("row_num_")?;
    let members = meta.list("__columns_")?;
    if members.len() != schema.fields().len() {
        return Err(meta.error(format!("has {} columns and a schema of {}", members.len(), schema.fields().len())));
    }
    let columns = members.iter().zip(schema.fields()).map(|(member, field)| {
        let layout = if member.typename() == ARRAY {
            decode_array(member, field.data_type(), source)?
        } else {
            retype(arrow::array(member, Some(field.data_type()), source)?.layout, field.data_type())?
        };
        if layout.len != rows {
            return Err(member.error(format!("has {} elements in a batch of {rows} rows", layout.len)));
        }
        Ok(layout)
    });
    let columns = columns.zip(schema.fields()).map(|(c, f)| c.context(|| format!("column {:?}", f.name())));
    Ok(Batch { rows, columns: columns.collect::<Result<_>>()? })
}

/// The columns of a frame in the order of the schema: the index is the field that no column label names.
fn frame_batch(meta: &Meta, schema: &Schema, source: &dyn BlobSource) -> Result<Batch> {
    let count = meta.list_len("__values_")?;
    let index = meta.optional_member("index_")?;
    let fields = schema.fields();
    // An index that was a range is no column of the file.
    if count != fields.len() && count + usize::from(index.is_some()) != fields.len() {
        return Err(meta.error(format!("has {count} columns and a schema of {}", fields.len())));
    }
    let mut columns = Vec::with_capacity(fields.len());
    let mut next = 0;
    let mut rows = None;
    for (i, field) in fields.iter().enumerate() {
        let label = if next < count { Some(meta.json_text(&format!("__values_-key-{next}"))?) } else { None };
        let named = label.is_some_and(|label| match label {
            Value::String(text) => text == *field.name(),
            other => other.as_i64().is_some_and(|label| field.name().parse() == Ok(label)),
        });
        let member = if named {
            next += 1;
            meta.member(&format!("__values_-value-{}", next - 1))?
        } else {
            index.as_ref().ok_or_else(|| meta.error("has another column than its schema"))?.member("value_")?
        };
        let layout = frame_column(meta, &member, i, field, source).context(|| format!("column {:?}", field.name()))?;
        if *rows.get_or_insert(layout.len) != layout.len {
            return Err(meta.error(format!("has columns of {rows:?} and {} rows", layout.len)));
        }
        columns.push(layout);
    }
    if next != count {
        return Err(meta.error("has a column that its schema has not"));
    }
    Ok(Batch { rows: rows.unwrap_or(0), columns })
}

fn frame_column(meta: &Meta, member: &Meta, i: usize, field: &Field, source: &dyn BlobSource) -> Result<ArrayLayout> {
    let cells = match member.base_type() {
        "vineyard::PickleBuffer" => pickle::cells(arrow::pickle_span(member)?, None, source)?,
        _ => tensor::cells(member, source)?,
    };
    let Cells::Column(column) = cells else {
        return Err(member.error("is no column"));
    };
    let mut layout = retype(column.layout, field.data_type())?;
    // A string tensor has its own bitmap; for the others it lies beside them.
    if !matches!(field.data_type(), DataType::Utf8 | DataType::LargeUtf8) {
        let key = format!("{VALIDITY}-{i}");
        let (bitmap, nulls) = match meta.get(&key) {
            None => (Span::EMPTY, 0),
            Some(_) => (Span::blob(meta.blob(&key)?, layout.len.div_ceil(8)), meta.unsigned(&format!("{NULLS}-{i}"))?),
        };
        if nulls > layout.len {
            return Err(meta.error(format!("has {nulls} nulls in {} rows", layout.len)));
        }
        let first = layout.buffers.first_mut().ok_or_else(|| member.error("has no buffers"))?;
        *first = bitmap;
        layout.null_count = Some(nulls);
    }
    Ok(layout)
}

/// Reads an [`ARRAY`] of a type.
///
/// # Errors
/// `Malformed` if the object does not fit the type.
pub fn decode_array(meta: &Meta, data_type: &DataType, source: &dyn BlobSource) -> Result<ArrayLayout> {
    array(meta, data_type, source, 0)
}

fn array(meta: &Meta, data_type: &DataType, source: &dyn BlobSource, depth: usize) -> Result<ArrayLayout> {
    use DataType::*;
    if depth > MAX_DEPTH {
        return Err(meta.error("nests too deep"));
    }
    if meta.typename() != ARRAY {
        return Err(meta.error(format!("is not a {ARRAY}")));
    }
    let len = meta.unsigned("length_")?;
    let nulls = meta.unsigned("null_count_")?;
    let count = meta.list_len("__buffers_")?;
    let product = |count: u64, width: u64| {
        count.checked_mul(width).filter(|&n| n <= i64::MAX as u64).ok_or_else(|| meta.error("has too many elements"))
    };
    let key = |i: usize| meta.blob(&format!("__buffers_-{i}"));
    let fixed = |i: usize, bytes: u64| key(i).map(|key| Span::blob(key, bytes));
    let whole = |i: usize| {
        let key = key(i)?;
        let size = if key.id == ObjectId::EMPTY_BLOB { 0 } else { source.size(key)? };
        Ok::<Span, Error>(Span::blob(key, size))
    };
    let offsets = |i: usize, width: u64| fixed(i, product(len.saturating_add(1), width)?);
    let mut buffers = Vec::with_capacity(count);
    if !matches!(data_type, Null | RunEndEncoded(..) | Union(..)) {
        buffers.push(if nulls == 0 { Span::EMPTY } else { fixed(0, len.div_ceil(8))? });
    }
    match data_type {
        Null | RunEndEncoded(..) | FixedSizeList(..) | Struct(_) => {}
        Boolean => buffers.push(fixed(1, len.div_ceil(8))?),
        Utf8 | Binary => buffers.extend([offsets(1, 4)?, whole(2)?]),
        LargeUtf8 | LargeBinary => buffers.extend([offsets(1, 8)?, whole(2)?]),
        Utf8View | BinaryView => {
            buffers.push(fixed(1, product(len, 16)?)?);
            for i in 2..count {
                buffers.push(whole(i)?);
            }
        }
        List(_) | Map(..) => buffers.push(offsets(1, 4)?),
        LargeList(_) => buffers.push(offsets(1, 8)?),
        ListView(_) => buffers.extend([fixed(1, product(len, 4)?)?, fixed(2, product(len, 4)?)?]),
        LargeListView(_) => buffers.extend([fixed(1, product(len, 8)?)?, fixed(2, product(len, 8)?)?]),
        Union(_, UnionMode::Sparse) => buffers.push(fixed(0, len)?),
        Union(_, UnionMode::Dense) => buffers.extend([fixed(0, len)?, fixed(1, product(len, 4)?)?]),
        Dictionary(keys, _) => {
            let width = type_width(keys).ok_or_else(|| meta.error("has keys that are no integers"))?;
            buffers.push(fixed(1, product(len, width)?)?);
        }
        other => {
            let width = type_width(other).ok_or_else(|| meta.error(format!("is of unknown type {other}")))?;
            buffers.push(fixed(1, product(len, width)?)?);
        }
    }
    if buffers.len() != count {
        return Err(meta.error(format!("has {count} buffers where {data_type} has {}", buffers.len())));
    }
    let types: Vec<&DataType> = child_types(data_type);
    let members = meta.list("__children_")?;
    if members.len() != types.len() {
        return Err(meta.error(format!("has {} children where {data_type} has {}", members.len(), types.len())));
    }
    let children =
        members.iter().zip(types).map(|(m, t)| array(m, t, source, depth + 1)).collect::<Result<Vec<ArrayLayout>>>()?;
    check_children(meta, data_type, len, &children)?;
    let dictionary = match data_type {
        Dictionary(_, values) => Some(Arc::new(array(&meta.member("dictionary_")?, values, source, depth + 1)?)),
        _ => None,
    };
    Ok(ArrayLayout { data_type: data_type.clone(), len, null_count: Some(nulls), buffers, children, dictionary })
}

fn child_types(data_type: &DataType) -> Vec<&DataType> {
    use DataType::*;
    match data_type {
        List(f) | LargeList(f) | ListView(f) | LargeListView(f) | FixedSizeList(f, _) | Map(f, _) => {
            vec![f.data_type()]
        }
        Struct(fields) => fields.iter().map(|f| f.data_type()).collect(),
        Union(fields, _) => fields.iter().map(|(_, f)| f.data_type()).collect(),
        RunEndEncoded(ends, values) => vec![ends.data_type(), values.data_type()],
        _ => Vec::new(),
    }
}

/// Lengths of children that follow from the parent's.
fn check_children(meta: &Meta, data_type: &DataType, len: u64, children: &[ArrayLayout]) -> Result<()> {
    let fits = match data_type {
        DataType::Struct(_) | DataType::Union(_, UnionMode::Sparse) => children.iter().all(|c| c.len == len),
        DataType::FixedSizeList(_, n) => {
            let need = u64::try_from(*n).ok().and_then(|n| len.checked_mul(n));
            children.iter().all(|c| Some(c.len) == need)
        }
        DataType::RunEndEncoded(..) => children.first().map(|c| c.len) == children.last().map(|c| c.len),
        _ => true,
    };
    if fits { Ok(()) } else { Err(meta.error("has children of the wrong length")) }
}

/// An array that was decoded as vineyard's type, as the type that was written: 32-bit offsets where vineyard keeps 64
/// bits, and another name for equal bytes.
///
/// # Errors
/// `Malformed` if the layouts do not agree.
pub fn retype(layout: ArrayLayout, data_type: &DataType) -> Result<ArrayLayout> {
    use DataType::*;
    if layout.data_type == *data_type {
        return Ok(layout);
    }
    let differs =
        |l: &ArrayLayout| Error::malformed(format!("an array of {} where {data_type} is needed", l.data_type));
    let mut layout = layout;
    match (&layout.data_type, data_type) {
        (LargeUtf8, Utf8) | (LargeBinary, Binary) | (LargeList(_), List(_)) => {
            let offsets = layout.buffers.get_mut(1).ok_or_else(|| Error::malformed("no offsets"))?;
            *offsets = narrow(std::mem::replace(offsets, Span::EMPTY))?;
        }
        (LargeList(_), LargeList(_)) => {}
        (from, to) if type_width(from).is_some() && type_width(from) == type_width(to) => {}
        _ => return Err(differs(&layout)),
    }
    if let List(child) | LargeList(child) = data_type {
        let children = std::mem::take(&mut layout.children);
        layout.children = children.into_iter().map(|c| retype(c, child.data_type())).collect::<Result<_>>()?;
    }
    layout.data_type = data_type.clone();
    Ok(layout)
}
