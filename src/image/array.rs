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
    data.validate_full().map_err(|error| malformed(array, error))?;
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
    // SAFETY: nothing reads the values before `validate_full` has accepted the whole tree, in `load`.
    Ok(unsafe { builder.build_unchecked() })
}

fn to_usize(value: u64) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::new(Kind::TooLarge, format!("{value} values in memory")))
}

/// Copies a span into memory that is aligned for every Arrow type.
fn buffer(span: &Span, source: &dyn BlobSource) -> Result<Buffer> {
    span.validate(source)?;
    let mut bytes = MutableBuffer::try_from_len_zeroed(to_usize(span.len())?)
        .map_err(|error| Error::new(Kind::TooLarge, format!("an array that does not fit memory: {error}")))?;
    span.read(source, 0, bytes.as_slice_mut())?;
    Ok(bytes.into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use arrow_schema::{DataType, Field};

    use super::super::testing::{Memory, Random, array, layout};
    use super::*;

    #[test]
    fn arrays_are_copied_as_they_are() {
        let memory = Memory::default();
        let item = Arc::new(Field::new("item", DataType::Utf8, true));
        for data_type in [DataType::Utf8View, DataType::List(item.clone()), DataType::ListView(item)] {
            let expected = array(&mut Random(3), &data_type, true, 100);
            for counted in [true, false] {
                assert_eq!(&load(&layout(&expected.to_data(), &memory, counted), &memory).unwrap(), &expected);
            }
        }
    }

    #[test]
    fn values_that_break_their_type_are_refused() {
        let memory = Memory::default();
        let strings = layout(&array(&mut Random(3), &DataType::Utf8, false, 100).to_data(), &memory, true);
        assert!(load(&strings, &memory).is_ok());
        let mut bad = strings.clone();
        bad.buffers[2] = memory.add(&vec![0xff; strings.buffers[2].len() as usize]);
        assert_eq!(load(&bad, &memory).unwrap_err().kind(), Kind::Malformed);
        // Below another array too.
        let item = Arc::new(Field::new("item", DataType::Utf8, true));
        let lists = ArrayLayout {
            data_type: DataType::FixedSizeList(item, 4),
            len: 25,
            null_count: Some(0),
            buffers: vec![Span::EMPTY],
            children: vec![bad],
            dictionary: None,
        };
        assert_eq!(load(&lists, &memory).unwrap_err().kind(), Kind::Malformed);
        let mut keys = layout(
            &array(&mut Random(3), &DataType::Dictionary(DataType::Int8.into(), DataType::Utf8.into()), false, 9)
                .to_data(),
            &memory,
            true,
        );
        keys.buffers[1] = memory.add(&[99; 9]);
        assert_eq!(load(&keys, &memory).unwrap_err().kind(), Kind::Malformed);
        let mut short = strings;
        short.buffers[1] = Span::Blob {
            key: match &short.buffers[1] {
                Span::Blob { key, .. } => *key,
                _ => unreachable!(),
            },
            offset: 8,
            len: 404,
        };
        assert_eq!(load(&short, &memory).unwrap_err().kind(), Kind::Malformed);
    }
}
