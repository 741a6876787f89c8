//! This project's own object types, and its keys on vineyard's.
//!
//! - [`ARRAY`]: an Arrow array of any type; its type is the schema's. `length_`, `null_count_`, the buffers
//!   `__buffers_-i` in the order of Arrow IPC, `__children_-i`, `dictionary_`.
//! - [`FILE`]: a file as it is: `size_` and `buffer_`.
//! - [`TRUE_SCHEMA`] on a table: the schema as it was written, in vineyard's text form, where vineyard's own array types
//!   differ (64-bit offsets of strings and lists).

use std::sync::Arc;

use arrow_schema::{DataType, Field, SchemaRef, UnionMode};

use super::publish::{schema_message, type_width};
use super::recipe::narrow;
use super::{ArrayLayout, Dataset, Span};
use crate::error::Result;
use crate::vineyard::{BlobSource, Meta, ObjectId};

/// Type of a generic Arrow array.
pub const ARRAY: &str = "vineyard_fs::ArrowArray";
/// Type of a file that is stored as it is.
pub const FILE: &str = "vineyard_fs::File";
/// Key of a table's schema as it was written.
pub const TRUE_SCHEMA: &str = "vineyard_fs_schema_";

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

/// Reads an [`ARRAY`] whose type is that of `field`.
///
/// # Errors
/// `Malformed` if the object does not fit the type.
pub fn decode_array(meta: &Meta, field: &Field, source: &dyn BlobSource) -> Result<ArrayLayout> {
    array(meta, field.data_type(), source, 0)
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
        Ok::<Span, crate::error::Error>(Span::blob(key, size))
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
    let differs = |l: &ArrayLayout| {
        crate::error::Error::malformed(format!("an array of {} where {data_type} is needed", l.data_type))
    };
    let mut layout = layout;
    match (&layout.data_type, data_type) {
        (LargeUtf8, Utf8) | (LargeBinary, Binary) | (LargeList(_), List(_)) => {
            let offsets = layout.buffers.get_mut(1).ok_or_else(|| crate::error::Error::malformed("no offsets"))?;
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
