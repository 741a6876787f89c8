//! Headers and levels of data pages of version 1.
//!
//! Structures: `parquet.thrift` of <https://github.com/apache/parquet-format>, in thrift's compact protocol.

use arrow_buffer::NullBuffer;
use parquet::basic::Encoding;

use super::delta::{varint, zigzag};
use crate::error::{Error, Kind, Result};

/// Most bytes of values in a page; a page's size is an `i32`, and readers hold whole pages.
pub const MAX_BYTES: u64 = 64 << 20;

// Ids of `parquet.thrift`.
const DATA_PAGE: i64 = 0;
const DICTIONARY_PAGE: i64 = 2;
const RLE: i64 = 3;

// Field headers of the compact protocol: how many ids further, and the type.
const NEXT_I32: u8 = 0x15;
const STRUCT_AFTER_2: u8 = 0x2c;
const STRUCT_AFTER_4: u8 = 0x4c;
const STOP: u8 = 0;

fn id(encoding: Encoding) -> i64 {
    match encoding {
        Encoding::DELTA_LENGTH_BYTE_ARRAY => 6,
        Encoding::RLE_DICTIONARY => 8,
        _ => 0,
    }
}

fn fits(value: u64) -> Result<i64> {
    match i32::try_from(value) {
        Ok(value) => Ok(i64::from(value)),
        Err(_) => Err(Error::new(Kind::TooLarge, format!("a page with {value} values or bytes"))),
    }
}

fn page_header(kind: i64, body: i64, inner: u8, fields: &[i64]) -> Vec<u8> {
    let mut out = Vec::with_capacity(32);
    for value in [kind, body, body] {
        out.push(NEXT_I32);
        zigzag(&mut out, value);
    }
    out.push(inner);
    for value in fields {
        out.push(NEXT_I32);
        zigzag(&mut out, *value);
    }
    out.extend_from_slice(&[STOP, STOP]);
    out
}

/// Header of an uncompressed data page of so many values, whose body has `body` bytes.
///
/// # Errors
/// `TooLarge` if the body is beyond what the header can tell.
pub fn header(values: u64, body: u64, encoding: Encoding) -> Result<Vec<u8>> {
    let fields = [fits(values)?, id(encoding), RLE, RLE];
    Ok(page_header(DATA_PAGE, fits(body)?, STRUCT_AFTER_2, &fields))
}

/// Header of a dictionary page of so many plain values.
///
/// # Errors
/// `TooLarge` if the body is beyond what the header can tell.
pub fn dictionary_header(values: u64, body: u64) -> Result<Vec<u8>> {
    let fields = [fits(values)?, id(Encoding::PLAIN)];
    Ok(page_header(DICTIONARY_PAGE, fits(body)?, STRUCT_AFTER_4, &fields))
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

/// Definition levels of an optional column: Parquet packs bits as Arrow's bitmaps do.
pub fn bitmap_levels(nulls: &NullBuffer) -> Vec<u8> {
    let bytes = nulls.len().div_ceil(8);
    let mut run = Vec::with_capacity(bytes + 8);
    varint(&mut run, (bytes as u64) << 1 | 1);
    let bitmap = nulls.inner().sliced();
    run.extend_from_slice(bitmap.get(..bytes).unwrap_or(&bitmap));
    if let (Some(last), rest @ 1..) = (run.last_mut(), nulls.len() % 8) {
        *last &= (1 << rest) - 1;
    }
    let mut out = (run.len() as u32).to_le_bytes().to_vec();
    out.append(&mut run);
    out
}
