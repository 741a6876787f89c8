//! Checks on data that readers of an Arrow file trust blindly: offsets, UTF-8, dictionary keys.

use arrow_schema::DataType;

use super::derive;
use super::span::Span;
use super::table::{ArrayLayout, fixed_width};
use crate::error::{Error, Result};
use crate::vineyard::BlobSource;

/// Bytes that are looked at in one step.
const CHUNK: u64 = 1 << 20;

/// Verifies that offsets ascend and stay inside the data, that strings are UTF-8 cut between characters, and that
/// dictionary keys point into the dictionary. Reads offsets, keys and strings, nothing else.
///
/// # Errors
/// `Malformed` with the first element that breaks a rule; what the source says of its blobs.
pub fn check(layout: &ArrayLayout, source: &dyn BlobSource) -> Result<()> {
    let buffer = |i: usize| {
        let missing = || Error::malformed(format!("an array of {} without buffer {i}", layout.data_type));
        layout.buffers.get(i).ok_or_else(missing)
    };
    let child_len = || layout.children.first().map_or(0, |child| child.len);
    match &layout.data_type {
        DataType::Utf8 => strings(buffer(1)?, 4, layout.len, buffer(2)?, source)?,
        DataType::LargeUtf8 => strings(buffer(1)?, 8, layout.len, buffer(2)?, source)?,
        DataType::Binary => {
            offsets(buffer(1)?, 4, layout.len, buffer(2)?.len(), source)?;
        }
        DataType::LargeBinary => {
            offsets(buffer(1)?, 8, layout.len, buffer(2)?.len(), source)?;
        }
        DataType::List(_) | DataType::Map(..) => {
            offsets(buffer(1)?, 4, layout.len, child_len(), source)?;
        }
        DataType::LargeList(_) => {
            offsets(buffer(1)?, 8, layout.len, child_len(), source)?;
        }
        DataType::Dictionary(key, _) => {
            let values = layout.dictionary.as_ref().map_or(0, |values| values.len);
            keys(key, buffer(1)?, buffer(0)?, layout.len, values, source)?;
        }
        _ => {}
    }
    layout.children.iter().try_for_each(|child| check(child, source))?;
    layout.dictionary.iter().try_for_each(|values| check(values, source))
}

/// Offsets `first..=last` of a buffer, widened.
fn read_offsets(span: &Span, width: u64, first: u64, count: u64, source: &dyn BlobSource) -> Result<Vec<u64>> {
    let mut bytes = vec![0; (count * width) as usize];
    span.read(source, first * width, &mut bytes)?;
    // A negative offset becomes one past any buffer.
    Ok(match width {
        4 => {
            let narrow = |b: &[u8]| i32::from_le_bytes(b.try_into().unwrap_or_default());
            bytes.chunks_exact(4).map(|b| u64::try_from(narrow(b)).unwrap_or(u64::MAX)).collect()
        }
        _ => bytes.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap_or_default())).collect(),
    })
}

/// Walks all `len + 1` offsets in pieces; `visit` gets each piece after it was checked. Pieces overlap by one offset.
fn walk(
    span: &Span,
    width: u64,
    len: u64,
    limit: u64,
    source: &dyn BlobSource,
    mut visit: impl FnMut(&[u64]) -> Result<()>,
) -> Result<()> {
    // Offsets that are computed from nothing are right by construction, and may be more than anyone can read.
    let computed = matches!(span, Span::Zeros(_) | Span::Derived { .. }) && span.blobs(0..span.len()).is_empty();
    if len == 0 || computed {
        return Ok(());
    }
    let step = CHUNK / width;
    let mut at = 0;
    while at < len {
        let count = step.min(len - at);
        let piece = read_offsets(span, width, at, count + 1, source)?;
        if !piece.is_sorted() {
            let bad = piece.windows(2).position(|w| w[0] > w[1]).unwrap_or(0);
            return Err(Error::malformed(format!("offset {} is smaller than the one before", at + bad as u64 + 1)));
        }
        if let Some(last) = piece.last().filter(|last| **last > limit) {
            return Err(Error::malformed(format!("an offset up to {last} into {limit} elements or bytes")));
        }
        visit(&piece)?;
        at += count;
    }
    Ok(())
}

fn offsets(span: &Span, width: u64, len: u64, limit: u64, source: &dyn BlobSource) -> Result<()> {
    walk(span, width, len, limit, source, |_| Ok(()))
}

/// Strings: the bytes between the first and last offset are UTF-8, and no offset lies inside a character.
fn strings(span: &Span, width: u64, len: u64, data: &Span, source: &dyn BlobSource) -> Result<()> {
    let mut bytes = Vec::new();
    walk(span, width, len, data.len(), source, |offsets| {
        let (Some(&start), Some(&end)) = (offsets.first(), offsets.last()) else { return Ok(()) };
        let mut next = offsets.iter().copied().peekable();
        let (mut at, mut carried) = (start, 0usize);
        while at < end {
            // Behind the bytes of a character that the last piece cut.
            let n = CHUNK.min(end - at) as usize;
            bytes.resize(carried + n, 0);
            data.read(source, at, &mut bytes[carried..])?;
            let first = at - carried as u64;
            at += n as u64;
            while let Some(offset) = next.next_if(|offset| *offset < at) {
                let inside = |byte: u8| byte & 0xC0 == 0x80;
                if bytes.get((offset - first) as usize).is_some_and(|byte| inside(*byte)) {
                    return Err(Error::malformed(format!("a string begins inside a character, at byte {offset}")));
                }
            }
            match std::str::from_utf8(&bytes) {
                Ok(_) => carried = 0,
                Err(error) if error.error_len().is_none() && at < end => {
                    let valid = error.valid_up_to();
                    bytes.copy_within(valid.., 0);
                    carried = bytes.len() - valid;
                    bytes.truncate(carried);
                }
                Err(error) => {
                    let place = first + error.valid_up_to() as u64;
                    return Err(Error::malformed(format!("strings that are not UTF-8, at byte {place}")));
                }
            }
        }
        Ok(())
    })
}

/// Keys of valid elements point into the dictionary.
fn keys(key: &DataType, span: &Span, validity: &Span, len: u64, values: u64, source: &dyn BlobSource) -> Result<()> {
    let width = fixed_width(key).filter(|w| matches!(w, 1 | 2 | 4 | 8)).unwrap_or(1);
    let signed = key.is_signed_integer();
    let (mut keys, mut bits) = (Vec::new(), Vec::new());
    let step = CHUNK;
    let mut at = 0;
    while at < len {
        let count = step.min(len - at);
        keys.resize((count * width) as usize, 0);
        span.read(source, at * width, &mut keys)?;
        bits.clear();
        if !validity.is_empty() {
            bits.resize(count.div_ceil(8) as usize, 0);
            // Pieces begin at whole bytes, as their length is a multiple of 8.
            derive::bit_slice(validity, at, count)?.read(source, 0, &mut bits)?;
        }
        for (i, element) in keys.chunks_exact(width as usize).enumerate() {
            let mut wide = [0; 8];
            wide[..element.len()].copy_from_slice(element);
            let negative = signed && element.last().is_some_and(|b| b & 0x80 != 0);
            if (negative || u64::from_le_bytes(wide) >= values)
                && bits.get(i / 8).is_none_or(|byte| byte >> (i % 8) & 1 == 1)
            {
                let row = at + i as u64;
                return Err(Error::malformed(format!("row {row} has a key outside a dictionary of {values}")));
            }
        }
        at += count;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::dataset::column;
    use crate::dataset::testing::Nothing;

    fn strings(offsets: &[u64], data: &[u8]) -> Result<()> {
        let buffers = vec![Span::EMPTY, column::offsets(offsets.iter().copied()), Span::literal(data)];
        check(&ArrayLayout::flat(DataType::LargeUtf8, offsets.len() as u64 - 1, Some(0), buffers), &Nothing)
    }

    #[test]
    fn strings_are_cut_between_characters() {
        assert!(strings(&[0, 1, 3, 3, 6], "hé€".as_bytes()).is_ok());
        for (offsets, data) in [
            (&[0u64, 2, 3][..], "hé€".as_bytes()),
            (&[0, 2], "hé".as_bytes()),
            (&[0, 3, 1], b"abc"),
            (&[0, 4], b"abc"),
            (&[0, u64::MAX], b"abc"),
            (&[0, 3], b"a\xffb"),
        ] {
            assert!(strings(offsets, data).is_err(), "{offsets:?} {data:?}");
        }
    }

    /// Characters that lie across the pieces in which data is read.
    #[test]
    fn long_strings() {
        let text = "€".repeat(CHUNK as usize);
        let len = text.len() as u64;
        assert!(strings(&[0, 3 * 1000, len], text.as_bytes()).is_ok());
        assert!(strings(&[0, CHUNK, len], text.as_bytes()).is_err());
        assert!(strings(&[0, len - 1], &text.as_bytes()[..text.len() - 1]).is_err());
    }
}
