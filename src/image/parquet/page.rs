//! Headers and levels of data pages of version 1.
//!
//! Structures: `parquet.thrift` of <https://github.com/apache/parquet-format>, in thrift's compact protocol.

use parquet::basic::Encoding;

use super::delta::{varint, zigzag};
use crate::error::{Error, Kind, Result};

/// Most bytes of values in a page; a page's size is an `i32`, and readers hold whole pages.
pub const MAX_BYTES: u64 = 64 << 20;

/// Header of an uncompressed data page of so many values, whose body has `body` bytes.
///
/// # Errors
/// `TooLarge` if the body is beyond what the header can tell.
pub fn header(values: u64, body: u64, encoding: Encoding) -> Result<Vec<u8>> {
    let fits = |value: u64| i32::try_from(value).map_err(|_| Error::new(Kind::TooLarge, format!("a page of {value}")));
    let (values, body) = (i64::from(fits(values)?), i64::from(fits(body)?));
    // Ids in parquet.thrift: the page type DATA_PAGE is 0.
    let encoding = match encoding {
        Encoding::DELTA_LENGTH_BYTE_ARRAY => 6,
        _ => 0,
    };
    const RLE: i64 = 3;
    const NEXT_I32: u8 = 0x15;
    const STRUCT_AFTER_TWO: u8 = 0x2c;
    const STOP: u8 = 0;
    let mut out = Vec::with_capacity(32);
    for value in [0, body, body] {
        out.push(NEXT_I32);
        zigzag(&mut out, value);
    }
    out.push(STRUCT_AFTER_TWO);
    for value in [values, encoding, RLE, RLE] {
        out.push(NEXT_I32);
        zigzag(&mut out, value);
    }
    out.extend_from_slice(&[STOP, STOP]);
    Ok(out)
}

/// Definition levels of so many values of an optional column, none of them null: one run of level 1 behind its length.
pub fn levels(values: u64) -> Vec<u8> {
    let mut run = Vec::with_capacity(8);
    varint(&mut run, values << 1);
    run.push(1);
    let mut out = (run.len() as u32).to_le_bytes().to_vec();
    out.append(&mut run);
    out
}
