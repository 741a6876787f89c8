//! Computations that turn the bytes vineyard keeps into the bytes Arrow wants.
//!
//! Each one knows its length from metadata, reads its input in pieces of at most [`CHUNK`] bytes, and gives the same
//! bytes for any way of cutting a range into reads.

mod bits;

use std::ops::Range;

pub use self::bits::{Test, bit_slice, bits};
use super::span::{Derive, Span};
use crate::error::{Error, Result};
use crate::vineyard::{BlobKey, BlobSource};

/// Most bytes of input that one step of a computation holds.
const CHUNK: u64 = 256 << 10;

/// What happens to each element; its width stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Map {
    /// The bytes of a number in the other order.
    Swap,
    /// Negative integers become 0.
    ClearNegative,
    /// The entry of this list that an unsigned integer counts, or 0 past its end.
    Look(std::sync::Arc<[u64]>),
    /// A 64-bit integer times this; the least integer ("not a time") stays.
    Scale(i64),
}

#[derive(Debug)]
struct Mapped {
    input: Span,
    width: u64,
    map: Map,
}

/// Each element of `width` bytes changed by `map`.
pub fn map(input: Span, width: u64, map: Map) -> Span {
    if input.is_empty() || width == 0 { input } else { Span::derived(Mapped { input, width, map }) }
}

impl Mapped {
    fn apply(&self, elements: &mut [u8]) {
        for element in elements.chunks_exact_mut(self.width as usize) {
            match &self.map {
                Map::Swap => element.reverse(),
                Map::ClearNegative if element.last().is_some_and(|b| b & 0x80 != 0) => element.fill(0),
                Map::ClearNegative => {}
                Map::Look(list) => {
                    let mut number = [0; 8];
                    let width = element.len().min(8);
                    number[..width].copy_from_slice(&element[..width]);
                    let at = usize::try_from(u64::from_le_bytes(number)).unwrap_or(usize::MAX);
                    let found = list.get(at).copied().unwrap_or(0).to_le_bytes();
                    element[..width].copy_from_slice(&found[..width]);
                }
                Map::Scale(by) => {
                    if let Ok(bytes) = <[u8; 8]>::try_from(&*element) {
                        let value = i64::from_le_bytes(bytes);
                        let scaled = if value == i64::MIN { value } else { value.wrapping_mul(*by) };
                        element.copy_from_slice(&scaled.to_le_bytes());
                    }
                }
            }
        }
    }
}

impl Derive for Mapped {
    fn len(&self) -> u64 {
        self.input.len()
    }

    fn read(&self, source: &dyn BlobSource, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = offset + out.len() as u64;
        let (whole_start, whole_end) = (offset.next_multiple_of(self.width), end - end % self.width);
        if whole_start >= whole_end {
            return self.piece(source, offset, out);
        }
        // Whole elements are changed in place; the cut ones at both ends go through a small buffer.
        let (head, rest) = out.split_at_mut((whole_start - offset) as usize);
        let (body, tail) = rest.split_at_mut((whole_end - whole_start) as usize);
        self.piece(source, offset, head)?;
        self.input.read(source, whole_start, body)?;
        self.apply(body);
        self.piece(source, whole_end, tail)
    }

    fn blobs(&self, range: Range<u64>) -> Vec<BlobKey> {
        let end = range.end.next_multiple_of(self.width).min(self.input.len());
        self.input.blobs(range.start - range.start % self.width..end)
    }

    fn inputs(&self) -> Vec<Span> {
        vec![self.input.clone()]
    }
}

impl Mapped {
    /// A range inside at most two elements.
    fn piece(&self, source: &dyn BlobSource, offset: u64, out: &mut [u8]) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let first = offset - offset % self.width;
        let last = (offset + out.len() as u64).next_multiple_of(self.width).min(self.input.len());
        let mut buffer = vec![0; (last - first) as usize];
        self.input.read(source, first, &mut buffer)?;
        self.apply(&mut buffer);
        let at = (offset - first) as usize;
        out.copy_from_slice(&buffer[at..at + out.len()]);
        Ok(())
    }
}

/// Every element of `width` bytes that lies `stride` bytes after the one before, the first at 0: a column of a matrix.
#[derive(Debug)]
struct Gathered {
    input: Span,
    stride: u64,
    width: u64,
    count: u64,
}

/// A column of a row-major matrix whose rows are `stride` bytes long; `input` begins at the column's first element.
///
/// # Errors
/// `Malformed` if `input` has no room for `count` elements.
pub fn gather(input: &Span, stride: u64, width: u64, count: u64) -> Result<Span> {
    if count == 0 || width == 0 {
        return Ok(Span::EMPTY);
    }
    let needed = (count - 1)
        .checked_mul(stride)
        .and_then(|n| n.checked_add(width))
        .ok_or_else(|| Error::malformed("a matrix of more than 2^64 bytes"))?;
    let input = input.slice(0, needed)?;
    if stride == width || count == 1 {
        return Ok(input);
    }
    Ok(Span::derived(Gathered { input, stride, width, count }))
}

impl Derive for Gathered {
    fn len(&self) -> u64 {
        self.count * self.width
    }

    fn read(&self, source: &dyn BlobSource, offset: u64, out: &mut [u8]) -> Result<()> {
        let (stride, width) = (self.stride, self.width);
        let rows_at_once = (CHUNK / stride).max(1);
        let mut buffer = Vec::new();
        let (mut at, end) = (offset, offset + out.len() as u64);
        while at < end {
            let row = at / width;
            // The rows that are touched and fit a chunk; a row wider than a chunk is read for its element only.
            let rows = ((end - 1) / width - row + 1).min(rows_at_once);
            buffer.resize(((rows - 1) * stride + width) as usize, 0);
            self.input.read(source, row * stride, &mut buffer)?;
            for r in 0..rows {
                let skip = at % width;
                let n = (width - skip).min(end - at);
                let from = (r * stride + skip) as usize;
                let to = (at - offset) as usize;
                out[to..to + n as usize].copy_from_slice(&buffer[from..from + n as usize]);
                at += n;
            }
        }
        Ok(())
    }

    fn blobs(&self, range: Range<u64>) -> Vec<BlobKey> {
        let last = range.end.div_ceil(self.width).saturating_sub(1);
        self.input.blobs(range.start / self.width * self.stride..last * self.stride + self.width)
    }

    fn inputs(&self) -> Vec<Span> {
        vec![self.input.clone()]
    }
}

/// Spans one after the other.
#[derive(Debug)]
struct Joined {
    /// Each with its first byte in the whole.
    parts: Vec<(u64, Span)>,
    len: u64,
}

/// Spans one after the other, as one.
///
/// # Errors
/// `Malformed` if the sum of lengths overflows.
pub fn join(spans: impl IntoIterator<Item = Span>) -> Result<Span> {
    let mut parts = Vec::new();
    let mut len = 0u64;
    for span in spans.into_iter().filter(|s| !s.is_empty()) {
        let n = span.len();
        parts.push((len, span));
        len = len.checked_add(n).ok_or_else(|| Error::malformed("parts of more than 2^64 bytes"))?;
    }
    Ok(match parts.len() {
        0 => Span::EMPTY,
        1 => parts.swap_remove(0).1,
        _ => Span::derived(Joined { parts, len }),
    })
}

impl Joined {
    fn covering(&self, range: Range<u64>) -> impl Iterator<Item = (&Span, Range<u64>, u64)> {
        let first = self.parts.partition_point(|(start, span)| start + span.len() <= range.start);
        self.parts[first..].iter().take_while(move |(start, _)| *start < range.end).map(move |(start, span)| {
            let from = range.start.max(*start);
            let to = range.end.min(start + span.len());
            (span, from - start..to - start, from)
        })
    }
}

impl Derive for Joined {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, source: &dyn BlobSource, offset: u64, out: &mut [u8]) -> Result<()> {
        for (span, part, at) in self.covering(offset..offset + out.len() as u64) {
            let to = (at - offset) as usize;
            span.read(source, part.start, &mut out[to..to + (part.end - part.start) as usize])?;
        }
        Ok(())
    }

    fn blobs(&self, range: Range<u64>) -> Vec<BlobKey> {
        self.covering(range).flat_map(|(span, part, _)| span.blobs(part)).collect()
    }

    fn inputs(&self) -> Vec<Span> {
        self.parts.iter().map(|(_, span)| span.clone()).collect()
    }
}

/// The same bytes again and again.
#[derive(Debug)]
struct Repeated {
    pattern: Vec<u8>,
    len: u64,
}

/// `times` copies of `pattern`.
///
/// # Errors
/// `Malformed` if that overflows.
pub fn repeat(pattern: Vec<u8>, times: u64) -> Result<Span> {
    let len =
        times.checked_mul(pattern.len() as u64).ok_or_else(|| Error::malformed("a column of more than 2^64 bytes"))?;
    if pattern.iter().all(|&b| b == 0) {
        return Ok(Span::Zeros(len));
    }
    Ok(Span::derived(Repeated { pattern, len }))
}

impl Derive for Repeated {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, _: &dyn BlobSource, offset: u64, out: &mut [u8]) -> Result<()> {
        let start = (offset % self.pattern.len() as u64) as usize;
        for (to, from) in out.iter_mut().zip(self.pattern.iter().cycle().skip(start)) {
            *to = *from;
        }
        Ok(())
    }

    fn blobs(&self, _: Range<u64>) -> Vec<BlobKey> {
        Vec::new()
    }

    fn inputs(&self) -> Vec<Span> {
        Vec::new()
    }
}

/// A sparse column made dense: `fill` everywhere but at the positions of `index`.
#[derive(Debug)]
struct Scattered {
    /// Ascending 32-bit positions.
    index: Span,
    /// One value of `fill.len()` bytes for each position.
    values: Span,
    fill: Vec<u8>,
    count: u64,
}

/// `count` elements that are `fill`, except at the ascending 32-bit positions of `index`, where they are `values`.
/// Positions that do not ascend or are out of range are left out, some way that is the same for every read.
///
/// # Errors
/// `Malformed` if the lengths do not fit together.
pub fn scatter(index: Span, values: Span, fill: Vec<u8>, count: u64) -> Result<Span> {
    let width = fill.len() as u64;
    if width == 0 || !index.len().is_multiple_of(4) || (index.len() / 4).checked_mul(width) != Some(values.len()) {
        return Err(Error::malformed("a sparse array whose positions and values differ in number"));
    }
    let len = count.checked_mul(width).ok_or_else(|| Error::malformed("a sparse array of more than 2^64 bytes"))?;
    if len == 0 {
        return Ok(Span::EMPTY);
    }
    Ok(Span::derived(Scattered { index, values, fill, count }))
}

impl Scattered {
    fn position(&self, source: &dyn BlobSource, at: u64) -> Result<u64> {
        let mut bytes = [0; 4];
        self.index.read(source, at * 4, &mut bytes)?;
        // A negative position is as far away as none.
        Ok(u64::try_from(i32::from_le_bytes(bytes)).unwrap_or(u64::MAX))
    }

    /// Reads whole elements.
    fn elements(&self, source: &dyn BlobSource, first: u64, out: &mut [u8]) -> Result<()> {
        let width = self.fill.len();
        out.chunks_exact_mut(width).for_each(|element| element.copy_from_slice(&self.fill));
        let count = (out.len() / width) as u64;
        let (mut low, mut high) = (0, self.index.len() / 4);
        let all = high;
        while low < high {
            let middle = low + (high - low) / 2;
            if self.position(source, middle)? < first { low = middle + 1 } else { high = middle }
        }
        let block = 4096.min(count.max(1));
        let (mut positions, mut values) = (Vec::new(), Vec::new());
        'blocks: while low < all {
            let n = block.min(all - low);
            positions.resize(n as usize * 4, 0);
            values.resize(n as usize * width, 0);
            self.index.read(source, low * 4, &mut positions)?;
            self.values.read(source, low * width as u64, &mut values)?;
            for (position, value) in positions.chunks_exact(4).zip(values.chunks_exact(width)) {
                let position = i32::from_le_bytes([position[0], position[1], position[2], position[3]]);
                match u64::try_from(position).ok().and_then(|p| p.checked_sub(first)) {
                    Some(p) if p < count => out[p as usize * width..][..width].copy_from_slice(value),
                    _ => break 'blocks,
                }
            }
            low += n;
        }
        Ok(())
    }
}

impl Derive for Scattered {
    fn len(&self) -> u64 {
        self.count * self.fill.len() as u64
    }

    fn read(&self, source: &dyn BlobSource, offset: u64, out: &mut [u8]) -> Result<()> {
        let width = self.fill.len() as u64;
        let first = offset / width;
        let last = (offset + out.len() as u64).div_ceil(width);
        let mut buffer = vec![0; ((last - first) * width) as usize];
        self.elements(source, first, &mut buffer)?;
        let at = (offset - first * width) as usize;
        out.copy_from_slice(&buffer[at..at + out.len()]);
        Ok(())
    }

    fn blobs(&self, _: Range<u64>) -> Vec<BlobKey> {
        let mut keys = self.index.blobs(0..self.index.len());
        keys.extend(self.values.blobs(0..self.values.len()));
        keys
    }

    fn inputs(&self) -> Vec<Span> {
        vec![self.index.clone(), self.values.clone()]
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::dataset::testing::Nothing;
    use proptest::prelude::*;

    /// The whole, after checking that a part of it reads the same.
    fn read(span: &Span, cut: (prop::sample::Index, prop::sample::Index)) -> Vec<u8> {
        let whole = span.to_vec(&Nothing).unwrap();
        let (a, b) = (cut.0.index(whole.len() + 1), cut.1.index(whole.len() + 1));
        let mut part = vec![0x55; a.abs_diff(b)];
        span.read(&Nothing, a.min(b) as u64, &mut part).unwrap();
        assert_eq!(part, whole[a.min(b)..a.max(b)]);
        whole
    }

    fn bit(bytes: &[u8], i: usize) -> bool {
        bytes[i / 8] >> (i % 8) & 1 == 1
    }

    proptest! {
        #[test]
        fn bitmaps_move(bytes in prop::collection::vec(any::<u8>(), 1..70), at: prop::sample::Index,
            n: prop::sample::Index, cut: (prop::sample::Index, prop::sample::Index))
        {
            let first = at.index(bytes.len() * 8);
            let count = n.index(bytes.len() * 8 - first + 1);
            let moved = read(&bit_slice(&Span::literal(bytes.clone()), first as u64, count as u64).unwrap(), cut);
            prop_assert_eq!(moved.len(), count.div_ceil(8));
            for i in 0..count {
                prop_assert_eq!(bit(&moved, i), bit(&bytes, first + i));
            }
        }

        #[test]
        fn elements_become_bits(values in prop::collection::vec(prop_oneof![Just(i64::MIN), Just(0), any::<i64>()], 1..90),
            cut: (prop::sample::Index, prop::sample::Index))
        {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            type Rule = (Test, fn(i64) -> bool);
            let tests: [Rule; 4] = [(Test::NotNat, |v| v != i64::MIN), (Test::NonZero, |v| v != 0),
                (Test::Zero, |v| v == 0), (Test::NonNegative, |v| v >= 0)];
            for (test, expected) in tests {
                let packed = read(&bits(Span::literal(bytes.clone()), 8, test), cut);
                for (i, value) in values.iter().enumerate() {
                    prop_assert_eq!(bit(&packed, i), expected(*value));
                }
            }
        }

        #[test]
        fn columns_of_a_matrix(rows in 1usize..40, columns in 1usize..9, width in 1usize..9, which: prop::sample::Index,
            cut: (prop::sample::Index, prop::sample::Index))
        {
            let matrix: Vec<u8> = (0..rows * columns * width).map(|i| ((i * 37) >> 3) as u8).collect();
            let (stride, skip) = (columns * width, which.index(columns) * width);
            let column = gather(&Span::literal(&matrix[skip..]), stride as u64, width as u64, rows as u64).unwrap();
            let expected: Vec<u8> = matrix.chunks(stride).flat_map(|row| row[skip..skip + width].to_vec()).collect();
            prop_assert_eq!(read(&column, cut), expected);
        }

        #[test]
        fn elements_change(values in prop::collection::vec(any::<i32>(), 1..60), add: u32,
            cut: (prop::sample::Index, prop::sample::Index))
        {
            let span = Span::literal(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
            let top = i64::from(add % 1000);
            let list = (0..=top as u64).map(|n| n * 2).collect();
            type Rule = (Map, Box<dyn Fn(i32) -> i32>);
            let cases: [Rule; 3] = [
                (Map::Swap, Box::new(i32::swap_bytes)),
                (Map::ClearNegative, Box::new(|v| v.max(0))),
                (Map::Look(list), Box::new(move |v| if (0..=top).contains(&i64::from(v)) { v * 2 } else { 0 })),
            ];
            for (change, expected) in cases {
                let expected: Vec<u8> = values.iter().flat_map(|v| expected(*v).to_le_bytes()).collect();
                prop_assert_eq!(read(&map(span.clone(), 4, change), cut), expected);
            }
        }

        #[test]
        fn sparse_becomes_dense(positions in prop::collection::btree_set(0i32..200, 0..30),
            cut: (prop::sample::Index, prop::sample::Index))
        {
            let index = Span::literal(positions.iter().flat_map(|p| p.to_le_bytes()).collect::<Vec<u8>>());
            let values = Span::literal(positions.iter().flat_map(|p| (*p as u16 + 7).to_le_bytes()).collect::<Vec<u8>>());
            let dense = read(&scatter(index, values, vec![1, 0], 200).unwrap(), cut);
            for (i, element) in dense.chunks(2).enumerate() {
                let expected = if positions.contains(&(i as i32)) { i as u16 + 7 } else { 1 };
                prop_assert_eq!(u16::from_le_bytes([element[0], element[1]]), expected);
            }
        }

        #[test]
        fn parts_join_and_repeat(parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 0..9), times in 0u64..9,
            cut: (prop::sample::Index, prop::sample::Index))
        {
            let spans = parts.iter().map(|p| Span::literal(p.as_slice()));
            prop_assert_eq!(read(&join(spans).unwrap(), cut), parts.concat());
            let pattern = vec![3, 1, 2];
            prop_assert_eq!(read(&repeat(pattern.clone(), times).unwrap(), cut), pattern.repeat(times as usize));
        }
    }
}
