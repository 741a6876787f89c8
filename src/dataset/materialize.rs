//! Arrow arrays in this process' memory, for whoever must compute with values.

use std::sync::Arc;

use arrow_array::{Array, ArrayRef, make_array};
use arrow_buffer::Buffer;
use arrow_data::{ArrayData, ArrayDataBuilder};
use arrow_schema::{ArrowError, DataType};

use super::derive;
use super::span::Span;
use super::table::ArrayLayout;
use crate::error::{Error, Kind, Result};
use crate::vineyard::BlobSource;

/// Copies an array into memory and checks it in full: lengths, offsets, UTF-8, dictionary keys.
///
/// The caller bounds what it asks for: all bytes of the array are held at once.
///
/// # Errors
/// `Malformed` if the array breaks a rule of its type; what the source says of its blobs.
pub fn materialize(layout: &ArrayLayout, source: &dyn BlobSource) -> Result<ArrayRef> {
    let data = data(layout, source)?;
    data.validate_full().map_err(|e| broken(layout, e))?;
    Ok(make_array(data))
}

fn broken(layout: &ArrayLayout, error: ArrowError) -> Error {
    Error::malformed(format!("an array of {} breaks the rules of its type", layout.data_type)).with_source(error)
}

/// Memory for a span, aligned as Arrow's own.
fn buffer(span: &Span, source: &dyn BlobSource) -> Result<Buffer> {
    span.validate(source)?;
    let len = usize::try_from(span.len())
        .ok()
        .filter(|n| *n <= isize::MAX as usize / 2)
        .ok_or_else(|| Error::new(Kind::TooLarge, "an array that does not fit memory"))?;
    let mut bytes = arrow_buffer::MutableBuffer::try_from_len_zeroed(len)
        .map_err(|error| Error::new(Kind::TooLarge, format!("an array that does not fit memory: {error}")))?;
    span.read(source, 0, bytes.as_slice_mut())?;
    Ok(bytes.into())
}

fn data(layout: &ArrayLayout, source: &dyn BlobSource) -> Result<ArrayData> {
    let len = usize::try_from(layout.len).map_err(|_| Error::new(Kind::TooLarge, "an array of more than 2^64 rows"))?;
    let mut builder = ArrayDataBuilder::new(layout.data_type.clone()).len(len);
    let mut spans = layout.buffers.iter();
    if !matches!(layout.data_type, DataType::Null | DataType::Union(..) | DataType::RunEndEncoded(..))
        && let Some(validity) = spans.next()
        && !validity.is_empty()
    {
        builder = builder.null_bit_buffer(Some(buffer(validity, source)?));
    }
    for span in spans {
        builder = builder.add_buffer(buffer(span, source)?);
    }
    for child in &layout.children {
        builder = builder.add_child_data(data(child, source)?);
    }
    if let Some(values) = &layout.dictionary {
        builder = builder.add_child_data(data(values, source)?);
    }
    builder.build().map_err(|e| broken(layout, e))
}

/// An array of this process as a layout of literal bytes, which are copied.
///
/// # Errors
/// `Unsupported` for a window into a type that has none.
pub fn literal(data: &ArrayData) -> Result<ArrayLayout> {
    let has_validity = !matches!(data.data_type(), DataType::Null | DataType::Union(..) | DataType::RunEndEncoded(..));
    let (offset, len) = (data.offset() as u64, data.len() as u64);
    let mut layout = ArrayLayout::flat(data.data_type().clone(), offset + len, Some(0), Vec::new());
    if has_validity {
        layout.buffers.push(Span::EMPTY);
    }
    layout.buffers.extend(data.buffers().iter().map(|buffer| Span::literal(buffer.as_slice())));
    let children = data.child_data().iter().map(literal).collect::<Result<Vec<_>>>()?;
    match data.data_type() {
        DataType::Dictionary(..) => layout.dictionary = children.into_iter().next().map(Arc::new),
        _ => layout.children = children,
    }
    let mut layout = layout.slice(offset, len)?;
    layout.null_count = Some(if *data.data_type() == DataType::Null { len } else { data.null_count() as u64 });
    if let (true, Some(nulls)) = (has_validity && data.null_count() > 0, data.nulls()) {
        let bits = Span::literal(nulls.validity());
        layout.buffers[0] = derive::bit_slice(&bits, nulls.offset() as u64, len)?;
    }
    Ok(layout)
}

/// Most bytes of dictionary values that are held to make one dictionary of several.
const MAX_DICTIONARY: u64 = 64 << 20;

/// Makes columns of several batches share one dictionary, as Arrow files want it: the first one if all are equal, else
/// one with every value once, and keys that are looked up when they are read. No data is touched where all are the same
/// places, which is so in every table that was saved as a file.
///
/// # Errors
/// `Unsupported` if the keys have no room for that many values, or dictionaries that differ are large or hold others.
pub fn unify_dictionaries(columns: &mut [&mut ArrayLayout], source: &dyn BlobSource) -> Result<()> {
    let refuse = |why: &str| Error::new(Kind::Unsupported, format!("dictionaries of several batches: {why}"));
    let DataType::Dictionary(key, value) = columns.first().map_or(DataType::Null, |c| c.data_type.clone()) else {
        return Ok(());
    };
    // Dictionaries in a row that are the same places count once. Without values nothing can be a key: any other will do.
    let mut distinct: Vec<Arc<ArrayLayout>> = Vec::new();
    let mut which = Vec::with_capacity(columns.len());
    for column in columns.iter() {
        let dictionary = column.dictionary.as_ref().ok_or_else(|| refuse("one is missing"))?;
        let known = distinct.last().is_some_and(|last| Arc::ptr_eq(last, dictionary) || last.is_same(dictionary));
        if dictionary.len > 0 && !known {
            distinct.push(dictionary.clone());
        }
        which.push((dictionary.len > 0).then(|| distinct.len() - 1));
    }
    let Some(first) = distinct.first().or(columns.first().and_then(|c| c.dictionary.as_ref())).cloned() else {
        return Ok(());
    };
    let share = |columns: &mut [&mut ArrayLayout], whole: &Arc<ArrayLayout>| {
        columns.iter_mut().for_each(|column| column.dictionary = Some(whole.clone()));
    };
    if distinct.len() <= 1 {
        share(columns, &first);
        return Ok(());
    }
    let size = distinct.iter().fold(0u64, |sum, dictionary| sum.saturating_add(dictionary.size()));
    if size > MAX_DICTIONARY || holds_dictionary(&value) {
        return Err(refuse("they differ and are large, or hold others"));
    }
    let values = distinct.iter().map(|dictionary| materialize(dictionary, source)).collect::<Result<Vec<_>>>()?;
    if values.windows(2).all(|pair| *pair[0] == *pair[1]) {
        share(columns, &first);
        return Ok(());
    }
    let (whole, lists) = distinct_values(&values)?;
    let width = super::table::fixed_width(&key).unwrap_or(1);
    let room = 1u64 << (8 * width.min(7) - u64::from(key.is_signed_integer()));
    if whole.len() as u64 > room {
        return Err(refuse("the keys are too narrow for all values"));
    }
    let whole = Arc::new(literal(&whole.to_data())?);
    for (column, which) in columns.iter_mut().zip(which) {
        let list = which.and_then(|which| lists.get(which));
        if let (Some(keys), Some(list)) = (column.buffers.get_mut(1), list) {
            *keys = derive::map(keys.clone(), width, derive::Map::Look(list.clone()));
        }
    }
    share(columns, &whole);
    Ok(())
}

/// The values of several arrays, each once, in the order in which they come, and for each array where its values are.
///
/// # Errors
/// `Unsupported` for types that the Arrow crates cannot compare.
pub fn distinct_values(arrays: &[ArrayRef]) -> Result<(ArrayRef, Vec<Arc<[u64]>>)> {
    let refuse = |e| Error::new(Kind::Unsupported, "dictionaries that do not fit together").with_source(e);
    let data_type = arrays.first().map_or(DataType::Null, |array| array.data_type().clone());
    let converter = arrow::row::RowConverter::new(vec![arrow::row::SortField::new(data_type)]).map_err(refuse)?;
    let mut known = std::collections::HashMap::new();
    let mut kept = Vec::new();
    let mut lists = Vec::new();
    for (number, array) in arrays.iter().enumerate() {
        let rows = converter.convert_columns(std::slice::from_ref(array)).map_err(refuse)?;
        let mut place = |(index, row): (usize, arrow::row::Row<'_>)| {
            *known.entry(row.owned()).or_insert_with(|| {
                kept.push((number, index));
                kept.len() as u64 - 1
            })
        };
        lists.push(rows.iter().enumerate().map(&mut place).collect::<Arc<[u64]>>());
    }
    let all: Vec<&dyn Array> = arrays.iter().map(|array| array.as_ref()).collect();
    Ok((arrow::compute::interleave(&all, &kept).map_err(refuse)?, lists))
}

/// True if arrays of the type have a dictionary somewhere.
fn holds_dictionary(data_type: &DataType) -> bool {
    use DataType::*;
    match data_type {
        Dictionary(..) => true,
        List(f) | LargeList(f) | ListView(f) | LargeListView(f) | FixedSizeList(f, _) | Map(f, _) => {
            holds_dictionary(f.data_type())
        }
        Struct(fields) => fields.iter().any(|f| holds_dictionary(f.data_type())),
        Union(fields, _) => fields.iter().any(|(_, f)| holds_dictionary(f.data_type())),
        RunEndEncoded(_, values) => holds_dictionary(values.data_type()),
        _ => false,
    }
}
