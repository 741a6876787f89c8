//! Bitmaps: made of elements, and moved by less than a byte.

use std::ops::Range;

use super::CHUNK;
use crate::dataset::span::{Derive, Span};
use crate::error::{Error, Result};
use crate::vineyard::{BlobKey, BlobSource};

/// Which bit an element becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// 1 if any byte is not zero: numpy booleans.
    NonZero,
    /// 1 if all bytes are zero: masks that say "missing".
    Zero,
    /// 1 unless it is the least integer, numpy's "not a time".
    NotNat,
    /// 1 unless the sign bit is set: codes of a category, where -1 is missing.
    NonNegative,
}

impl Test {
    fn holds(self, element: &[u8]) -> bool {
        match self {
            Test::NonZero => element.iter().any(|&b| b != 0),
            Test::Zero => element.iter().all(|&b| b == 0),
            Test::NonNegative => element.last().is_none_or(|b| b & 0x80 == 0),
            Test::NotNat => match element.split_last() {
                Some((&0x80, low)) => low.iter().any(|&b| b != 0),
                _ => true,
            },
        }
    }
}

/// One bit for each little-endian element of `width` bytes, least significant bit first.
#[derive(Debug)]
struct Bits {
    input: Span,
    width: u64,
    test: Test,
}

/// A bitmap of one bit for each element of `input`, which has elements of `width` bytes.
pub fn bits(input: Span, width: u64, test: Test) -> Span {
    if input.is_empty() { Span::EMPTY } else { Span::derived(Bits { input, width: width.max(1), test }) }
}

impl Derive for Bits {
    fn len(&self) -> u64 {
        (self.input.len() / self.width).div_ceil(8)
    }

    fn read(&self, source: &dyn BlobSource, offset: u64, out: &mut [u8]) -> Result<()> {
        let elements = self.input.len() / self.width;
        let step = (CHUNK / (8 * self.width)).max(1);
        let mut buffer = Vec::new();
        for (i, part) in out.chunks_mut(step as usize).enumerate() {
            let first = (offset + i as u64 * step) * 8;
            let last = (first + 8 * part.len() as u64).min(elements);
            buffer.resize(((last - first) * self.width) as usize, 0);
            self.input.read(source, first * self.width, &mut buffer)?;
            for (byte, group) in part.iter_mut().zip(buffer.chunks(8 * self.width as usize)) {
                *byte = match (self.test, self.width) {
                    (Test::NonZero, 1) => group.iter().enumerate().fold(0, |b, (i, &v)| b | (u8::from(v != 0) << i)),
                    (Test::NotNat, 8) => group.chunks_exact(8).enumerate().fold(0, |b, (i, v)| {
                        let nat = v == [0, 0, 0, 0, 0, 0, 0, 0x80];
                        b | (u8::from(!nat) << i)
                    }),
                    (test, width) => group
                        .chunks_exact(width as usize)
                        .enumerate()
                        .fold(0, |b, (i, v)| b | (u8::from(test.holds(v)) << i)),
                };
            }
        }
        Ok(())
    }

    fn blobs(&self, range: Range<u64>) -> Vec<BlobKey> {
        let end = (range.end * 8 * self.width).min(self.input.len());
        self.input.blobs(range.start * 8 * self.width..end)
    }

    fn inputs(&self) -> Vec<Span> {
        vec![self.input.clone()]
    }
}

/// Bits `shift..shift + 8 * len` of a bitmap, moved to begin at a byte.
#[derive(Debug)]
struct Shifted {
    input: Span,
    shift: u32,
    len: u64,
}

/// `count` bits from bit `first` of a bitmap.
///
/// # Errors
/// `Malformed` if the bitmap is shorter.
pub fn bit_slice(bitmap: &Span, first: u64, count: u64) -> Result<Span> {
    let end = first.checked_add(count).ok_or_else(|| Error::malformed("a bitmap's window overflows"))?;
    let input = bitmap.slice(first / 8, end.div_ceil(8).saturating_sub(first / 8))?;
    Ok(match (first % 8) as u32 {
        _ if count == 0 => Span::EMPTY,
        0 => input,
        shift => Span::derived(Shifted { input, shift, len: count.div_ceil(8) }),
    })
}

impl Derive for Shifted {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, source: &dyn BlobSource, offset: u64, out: &mut [u8]) -> Result<()> {
        let mut buffer = Vec::new();
        for (i, part) in out.chunks_mut(CHUNK as usize).enumerate() {
            let first = offset + i as u64 * CHUNK;
            // One byte more than is made, but for the last bits where the input has none left.
            let last = (first + part.len() as u64 + 1).min(self.input.len());
            buffer.clear();
            buffer.resize((last - first) as usize, 0);
            self.input.read(source, first, &mut buffer)?;
            buffer.resize(part.len() + 1, 0);
            for (byte, pair) in part.iter_mut().zip(buffer.windows(2)) {
                *byte = (pair[0] >> self.shift) | (pair[1] << (8 - self.shift));
            }
        }
        Ok(())
    }

    fn blobs(&self, range: Range<u64>) -> Vec<BlobKey> {
        self.input.blobs(range.start..(range.end + 1).min(self.input.len()))
    }

    fn inputs(&self) -> Vec<Span> {
        vec![self.input.clone()]
    }
}
