//! Values of Thrift's compact protocol, as far as the lengths that a Parquet file claims are looked at before the parquet
//! crate believes them.
//!
//! Format: `doc/specs/thrift-compact-protocol.md` of Apache Thrift.

use crate::error::{Error, Result};

/// Most levels of structs and lists in each other; Parquet's own have about eight.
const MAX_DEPTH: usize = 32;

/// Kinds of values.
pub(super) const I32: u8 = 5;
pub(super) const LIST: u8 = 9;
pub(super) const STRUCT: u8 = 12;

/// Values one after the other.
pub(super) struct Compact<'a> {
    bytes: &'a [u8],
    at: usize,
}

fn broken() -> Error {
    Error::malformed("Parquet metadata that ends early or is none")
}

impl<'a> Compact<'a> {
    /// Reads from the start of `bytes`.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Compact { bytes, at: 0 }
    }

    /// Number of bytes that were read.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    fn byte(&mut self) -> Result<u8> {
        let byte = *self.bytes.get(self.at).ok_or_else(broken)?;
        self.at += 1;
        Ok(byte)
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(broken())
    }

    /// A signed integer of 16 to 64 bits.
    pub(super) fn integer(&mut self) -> Result<i64> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    fn advance(&mut self, count: u64) -> Result<()> {
        let left = (self.bytes.len() - self.at) as u64;
        self.at += usize::try_from(count).ok().filter(|_| count <= left).ok_or_else(broken)?;
        Ok(())
    }

    /// The fields of a struct: `visit` gets number and kind of each and reads its value, or returns false to have it
    /// skipped.
    pub(super) fn fields(&mut self, mut visit: impl FnMut(&mut Self, i64, u8) -> Result<bool>) -> Result<()> {
        let mut number = 0;
        loop {
            let head = self.byte()?;
            if head == 0 {
                return Ok(());
            }
            number = if head >> 4 == 0 { self.integer()? } else { number + i64::from(head >> 4) };
            if !visit(self, number, head & 15)? {
                self.skip(head & 15, false, 0)?;
            }
        }
    }

    /// Kind and number of a list's elements. Each takes a byte at least.
    pub(super) fn list(&mut self) -> Result<(u8, u64)> {
        let head = self.byte()?;
        let count = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
        if count > (self.bytes.len() - self.at) as u64 {
            return Err(broken());
        }
        Ok((head & 15, count))
    }

    /// Skips a value; `element`: of a list, where booleans take a byte.
    fn skip(&mut self, kind: u8, element: bool, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(Error::malformed("Parquet metadata that nests too deep"));
        }
        match kind {
            1 | 2 if !element => Ok(()),
            1..=3 => self.advance(1),
            4..=6 => self.varint().map(drop),
            7 => self.advance(8),
            8 => {
                let length = self.varint()?;
                self.advance(length)
            }
            9 | 10 => {
                let (kind, count) = self.list()?;
                (0..count).try_for_each(|_| self.skip(kind, true, depth + 1))
            }
            11 => {
                let count = self.varint()?;
                let kinds = if count == 0 { 0 } else { self.byte()? };
                (0..count).try_for_each(|_| {
                    self.skip(kinds >> 4, true, depth + 1)?;
                    self.skip(kinds & 15, true, depth + 1)
                })
            }
            12 => loop {
                let head = self.byte()?;
                if head == 0 {
                    return Ok(());
                }
                if head >> 4 == 0 {
                    self.varint()?;
                }
                self.skip(head & 15, false, depth + 1)?;
            },
            13 => self.advance(16),
            _ => Err(broken()),
        }
    }
}
