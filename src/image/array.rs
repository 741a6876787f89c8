//! Arrays in this process's memory, for columns that a format stores differently.

use arrow_array::{ArrayRef, make_array};
use arrow_buffer::{Buffer, MutableBuffer};
use arrow_data::ArrayData;
use arrow_schema::ArrowError;

use super::arrow::{Counts, buffers, has_validity, null_count};
use crate::dataset::{ArrayLayout, Span};
use crate::error::{Error, Kind, Result};
use crate::vineyard::BlobSource;

/// Copies an array out of shared memory and checks it: offsets, UTF-8, run ends, dictionary keys.
///
/// # Errors
/// `Malformed` if the bytes are not an array of the type; what the source says of its blobs.
pub fn load(array: &ArrayLayout, source: &dyn BlobSource) -> Result<ArrayRef> {
    let data = data(array, source)?;
    data.validate_data().map_err(|error| malformed(array, error))?;
    Ok(make_array(data))
}

fn malformed(array: &ArrayLayout, error: ArrowError) -> Error {
    Error::malformed(format!("an array of type {}", array.data_type)).with_source(error)
}

fn data(array: &ArrayLayout, source: &dyn BlobSource) -> Result<ArrayData> {
    let mut spans = buffers(array)?.into_iter();
    let bitmap = if has_validity(&array.data_type) { spans.next() } else { None };
    let nulls = null_count(array, Counts::From(source))?;
    let mut builder = ArrayData::builder(array.data_type.clone()).len(to_usize(array.len)?);
    if let Some(bitmap) = bitmap.filter(|bitmap| !bitmap.is_empty() && nulls > 0) {
        builder = builder.null_bit_buffer(Some(buffer(&bitmap, source)?));
    }
    for span in spans {
        builder = builder.add_buffer(buffer(&span, source)?);
    }
    for child in &array.children {
        builder = builder.add_child_data(data(child, source)?);
    }
    if let Some(values) = &array.dictionary {
        builder = builder.add_child_data(data(values, source)?);
    }
    // Checks lengths and the layout of the whole tree; `load` checks the values once, at the top.
    let data = {
        // SAFETY: nothing reads the data before `validate` (here) and `validate_data` (in `load`) have accepted it.
        unsafe { builder.build_unchecked() }
    };
    data.validate().map_err(|error| malformed(array, error))?;
    Ok(data)
}

fn to_usize(value: u64) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::new(Kind::TooLarge, format!("{value} values in memory")))
}

/// Copies a span into memory that is aligned for every Arrow type.
fn buffer(span: &Span, source: &dyn BlobSource) -> Result<Buffer> {
    span.validate(source)?;
    let mut bytes = MutableBuffer::from_len_zeroed(to_usize(span.len())?);
    span.read(source, 0, bytes.as_slice_mut())?;
    Ok(bytes.into())
}
