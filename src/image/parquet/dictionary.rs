//! Dictionaries of strings as they are: all values, used or not, in their order. Readers that restore dictionaries
//! (pandas' categories among them) take them from the dictionary page, so it is not made of the rows.

use std::collections::HashSet;

use arrow::compute::cast;
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef};
use arrow_schema::DataType;

use super::chunk::{Chunk, Pages};
use super::{delta, page};
use crate::dataset::{ArrayLayout, Span};
use crate::error::{Error, Kind, Result};

/// Most bytes of a dictionary that is repeated in every row group; larger ones are made of the rows.
const MAX_BYTES: u64 = 16 << 20;

/// True if a dictionary can be written as it is.
pub fn fits(values: &ArrayLayout) -> bool {
    use DataType::*;
    let bytes = values.buffers.iter().fold(0u64, |sum, span| sum.saturating_add(span.len()));
    let known = values.null_count == Some(0) || values.buffers.first().is_none_or(Span::is_empty);
    let strings = matches!(values.data_type, Utf8 | LargeUtf8 | Utf8View | Binary | LargeBinary | BinaryView);
    strings && known && bytes <= MAX_BYTES && (1..=i32::MAX as u64).contains(&values.len)
}

/// The chunk of dictionary arrays that share their dictionary; `None` if it has a value twice, which pyarrow (26)
/// counts once and then takes every later key for another value.
///
/// # Errors
/// `Malformed` if they are no such arrays, or have nulls where the column may not.
pub fn chunk(mut pages: Pages, arrays: &[ArrayRef]) -> Result<Option<Chunk>> {
    for (i, array) in arrays.iter().enumerate() {
        let dictionary = array
            .as_any_dictionary_opt()
            .ok_or_else(|| Error::new(Kind::Internal, format!("{} is no dictionary", array.data_type())))?;
        let count = dictionary.values().len();
        if count == 0 {
            return Err(Error::malformed("a dictionary without values"));
        }
        if i == 0 {
            let Some(plain) = plain(dictionary.values())? else { return Ok(None) };
            pages.dictionary(count as u64, &plain)?;
        }
        let keys = dictionary.normalized_keys();
        let mut body = Vec::with_capacity(keys.len() * 2);
        let nulls = array.nulls().filter(|nulls| nulls.null_count() > 0);
        match (nulls, pages.optional()) {
            (None, false) => {}
            (None, true) => body.extend(page::levels(keys.len() as u64)),
            (Some(nulls), true) => body.extend(page::bitmap_levels(nulls)),
            (Some(_), false) => return Err(Error::malformed("nulls in a column that may not have them")),
        }
        let width = u64::BITS - (count as u64 - 1).max(1).leading_zeros();
        body.push(width as u8);
        let valid = keys.len() - nulls.map_or(0, |nulls| nulls.null_count());
        let groups = valid.div_ceil(8);
        delta::varint(&mut body, (groups as u64) << 1 | 1);
        let end = body.len() + groups * width as usize;
        let present = keys.iter().enumerate().filter(|(row, _)| nulls.is_none_or(|nulls| nulls.is_valid(*row)));
        delta::pack(present.map(|(_, key)| *key as u64), width, &mut body);
        body.resize(end, 0);
        pages.keys(keys.len() as u64, (keys.len() - valid) as u64, &body)?;
    }
    pages.finish().map(Some)
}

/// Values in `PLAIN` encoding: each behind its length; `None` if one is there twice.
fn plain(values: &ArrayRef) -> Result<Option<Vec<u8>>> {
    let malformed = |error| Error::malformed("the values of a dictionary").with_source(error);
    // Strings of every kind become binary by a change of type; nothing is copied but the small kinds' offsets.
    let values = match values.data_type() {
        DataType::Utf8View => cast(values, &DataType::LargeUtf8).map_err(malformed)?,
        _ => values.clone(),
    };
    let values = cast(&values, &DataType::LargeBinary).map_err(malformed)?;
    let mut out = Vec::new();
    let mut seen = HashSet::with_capacity(values.len());
    for value in values.as_binary::<i64>().iter() {
        let value = value.ok_or_else(|| Error::malformed("a null in a dictionary without nulls"))?;
        if !seen.insert(value) {
            return Ok(None);
        }
        let length = u32::try_from(value.len()).map_err(|_| Error::new(Kind::TooLarge, "a value beyond 4 GiB"))?;
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(value);
    }
    Ok(Some(out))
}
