//! Dictionary keys with 0 in the place of nulls.
//!
//! pandas leaves -1 there, and polars (2.1) refuses files with keys outside the dictionary even where they are null.

use std::ops::Range;

use crate::dataset::{Derive, Span};
use crate::error::Result;
use crate::vineyard::{BlobKey, BlobSource};

/// Bytes of keys that are computed in one go; a multiple of eight keys of every width.
const CHUNK: u64 = 64 << 10;

/// Keys of `width` bytes each, 1, 2, 4 or 8, and the validity bitmap of as many bits.
#[derive(Debug)]
pub struct Keys {
    /// The keys as they are.
    pub keys: Span,
    /// Which of them are not null.
    pub bitmap: Span,
    /// Bytes of a key.
    pub width: u64,
}

impl Keys {
    /// The keys that a range of bytes touches, as bits of the bitmap: whole bytes of it.
    fn bits(&self, range: &Range<u64>) -> Range<u64> {
        range.start / self.width / 8..range.end.div_ceil(self.width).div_ceil(8)
    }

    fn part(&self, source: &dyn BlobSource, offset: u64, out: &mut [u8]) -> Result<()> {
        self.keys.read(source, offset, out)?;
        let range = offset..offset + out.len() as u64;
        let bits = self.bits(&range);
        let mut bitmap = vec![0; (bits.end - bits.start) as usize];
        self.bitmap.read(source, bits.start, &mut bitmap)?;
        if bitmap.iter().all(|byte| *byte == 0xff) {
            return Ok(());
        }
        let first = range.start / self.width;
        for key in first..range.end.div_ceil(self.width) {
            let bit = key - bits.start * 8;
            let valid = bitmap.get((bit / 8) as usize).is_some_and(|byte| byte >> (bit % 8) & 1 == 1);
            if !valid {
                // The first and the last key may be cut by the range.
                let from = (key * self.width).max(range.start) - range.start;
                let to = ((key + 1) * self.width).min(range.end) - range.start;
                out[from as usize..to as usize].fill(0);
            }
        }
        Ok(())
    }
}

impl Derive for Keys {
    fn len(&self) -> u64 {
        self.keys.len()
    }

    fn read(&self, source: &dyn BlobSource, offset: u64, out: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < out.len() {
            // Up to the next multiple of the chunk, so that later chunks start at whole bytes of the bitmap.
            let at = offset + done as u64;
            let len = (CHUNK - at % CHUNK).min((out.len() - done) as u64) as usize;
            self.part(source, at, &mut out[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    fn blobs(&self, range: Range<u64>) -> Vec<BlobKey> {
        let bits = self.bits(&range);
        let mut blobs = self.keys.blobs(range);
        blobs.extend(self.bitmap.blobs(bits));
        blobs
    }

    fn inputs(&self) -> Vec<Span> {
        vec![self.keys.clone(), self.bitmap.clone()]
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::super::testing::{Memory, Random};
    use super::*;

    #[test]
    fn nulls_have_key_0_in_every_range() {
        let mut random = Random(8);
        for width in [1usize, 2, 4, 8] {
            let rows = 70_001;
            let memory = Memory::default();
            let raw: Vec<u8> = (0..rows * width).map(|_| random.next() as u8 | 1).collect();
            let bitmap: Vec<u8> = (0..rows.div_ceil(8)).map(|_| random.next() as u8).collect();
            let keys = Keys { keys: memory.add(&raw), bitmap: memory.add(&bitmap), width: width as u64 };
            let expected: Vec<u8> = (0..raw.len())
                .map(|i| if bitmap[i / width / 8] >> (i / width % 8) & 1 == 1 { raw[i] } else { 0 })
                .collect();
            let span = Span::derived(keys);
            assert_eq!(span.to_vec(&memory).unwrap(), expected);
            for _ in 0..50 {
                let start = random.below(raw.len());
                let end = start + random.below(raw.len() - start + 1);
                let mut part = vec![0x55; end - start];
                span.read(&memory, start as u64, &mut part).unwrap();
                assert_eq!(part, expected[start..end]);
            }
        }
    }
}
