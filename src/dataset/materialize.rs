//! Arrow arrays in this process' memory, for whoever must compute with values.

use arrow_array::{ArrayRef, make_array};
use arrow_buffer::Buffer;
use arrow_data::{ArrayData, ArrayDataBuilder};
use arrow_schema::DataType;

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

fn broken(layout: &ArrayLayout, error: arrow_schema::ArrowError) -> Error {
    Error::malformed(format!("an array of {} breaks the rules of its type", layout.data_type)).with_source(error)
}

/// Memory for a span, aligned as Arrow's own.
fn buffer(span: &super::Span, source: &dyn BlobSource) -> Result<Buffer> {
    span.validate(source)?;
    let len = usize::try_from(span.len())
        .ok()
        .filter(|n| *n <= isize::MAX as usize / 2)
        .ok_or_else(|| Error::new(Kind::TooLarge, "an array that does not fit memory"))?;
    let mut bytes = arrow_buffer::MutableBuffer::from_len_zeroed(len);
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
