//! What a Parquet file claims of its sizes, checked before the parquet crate (60.1) allocates or recurses by it.
//!
//! Format: `src/main/thrift/parquet.thrift` of Apache Parquet.

use parquet::basic::Compression;
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};

use super::thrift::{Compact, I32, LIST, STRUCT};
use crate::error::{Error, Result};

/// Most levels of groups in each other: reading the schema takes stack for each.
const MAX_LEVELS: usize = 112;
/// Pages may be larger than the footer says by this: some writers do not count everything.
const SLACK: u64 = 1 << 20;

/// Checks that the schema in the footer does not nest too deep, and has the children that it counts.
///
/// # Errors
/// `Malformed`.
pub(super) fn check_schema(staged: &[u8]) -> Result<()> {
    let broken = || Error::malformed("no Parquet footer at the end");
    let (rest, length) = staged.strip_suffix(b"PAR1").and_then(|s| s.split_last_chunk::<4>()).ok_or_else(broken)?;
    let start = rest.len().checked_sub(u32::from_le_bytes(*length) as usize).ok_or_else(broken)?;
    let mut found = false;
    Compact::new(&rest[start..]).fields(|footer, number, kind| {
        if number != 2 || kind != LIST || found {
            return Ok(false);
        }
        found = true;
        let (kind, count) = footer.list()?;
        if kind != STRUCT {
            return Err(Error::malformed("a Parquet schema of no elements"));
        }
        // Children that are still to come, of each group on the way to the element.
        let mut open: Vec<u64> = Vec::new();
        for i in 0..count {
            let mut children = 0;
            footer.fields(|element, number, kind| {
                if number != 5 || kind != I32 {
                    return Ok(false);
                }
                children = element.integer()?;
                Ok(true)
            })?;
            if let Some(last) = open.last_mut() {
                *last -= 1;
            }
            match u64::try_from(children) {
                Ok(children) if children < count - i => open.push(children),
                _ => return Err(Error::malformed(format!("a Parquet schema of {children} children"))),
            }
            if open.len() > MAX_LEVELS {
                return Err(Error::malformed(format!("a Parquet schema of more than {MAX_LEVELS} levels")));
            }
            while open.last() == Some(&0) {
                open.pop();
            }
        }
        Ok(true)
    })
}

/// The most memory that reading one page takes: its bytes as they are in the file, and decompressed.
///
/// # Errors
/// `Malformed` for pages outside the file, or that claim more bytes or values than their column.
pub(super) fn largest_page(staged: &[u8], metadata: &ParquetMetaData) -> Result<u64> {
    let columns = metadata.row_groups().iter().flat_map(|group| group.columns());
    columns.map(|column| pages(staged, column)).try_fold(0, |most, page| Ok(page?.max(most)))
}

fn pages(staged: &[u8], column: &ColumnChunkMetaData) -> Result<u64> {
    let outside = || Error::malformed("pages outside the Parquet file");
    let size = |size: i64| usize::try_from(size).map_err(|_| outside());
    let start = size(column.dictionary_page_offset().unwrap_or(column.data_page_offset()))?;
    let end = start.checked_add(size(column.compressed_size())?).ok_or_else(outside)?;
    let mut rest = staged.get(start..end).ok_or_else(outside)?;
    let (most_bytes, most_values) = (size(column.uncompressed_size())? as u64, size(column.num_values())? as u64);
    let (mut total, mut values, mut largest) = (0u64, 0u64, 0);
    while !rest.is_empty() {
        let (head, page) = match page(rest) {
            // Nobody reads on once all values are there.
            Err(_) if values >= most_values => break,
            other => other?,
        };
        rest = rest.get(head..).and_then(|rest| rest.get(page.compressed as usize..)).ok_or_else(outside)?;
        total = total.saturating_add(page.uncompressed);
        values = values.saturating_add(page.values);
        let ratio = page.compressed.saturating_mul(most_ratio(column.compression())).saturating_add(SLACK);
        if total > most_bytes.saturating_add(SLACK) || page.uncompressed > ratio || values > most_values {
            return Err(Error::malformed("a Parquet page that claims more than its column has"));
        }
        largest = largest.max(page.compressed.saturating_add(page.uncompressed));
    }
    Ok(largest)
}

/// Most bytes that a compressed one can stand for.
fn most_ratio(compression: Compression) -> u64 {
    match compression {
        Compression::UNCOMPRESSED => 1,
        Compression::SNAPPY => 64,
        Compression::LZ4 | Compression::LZ4_RAW => 256,
        Compression::GZIP(_) => 1100,
        _ => u64::MAX,
    }
}

/// What the header of a page says.
#[derive(Default)]
struct Page {
    uncompressed: u64,
    compressed: u64,
    /// Values of a data page, nulls and empty lists among them.
    values: u64,
}

/// Reads the header of a page; returns its length, too.
fn page(bytes: &[u8]) -> Result<(usize, Page)> {
    let mut page = Page::default();
    let mut reader = Compact::new(bytes);
    let number_of = |reader: &mut Compact<'_>| {
        u64::try_from(reader.integer()?).map_err(|_| Error::malformed("a Parquet page of a negative size"))
    };
    reader.fields(|reader, number, kind| {
        match (number, kind) {
            (2, I32) => page.uncompressed = number_of(reader)?,
            (3, I32) => page.compressed = number_of(reader)?,
            // Headers of data pages, of either version.
            (5 | 8, STRUCT) => reader.fields(|reader, number, kind| {
                if number != 1 || kind != I32 {
                    return Ok(false);
                }
                page.values = number_of(reader)?;
                Ok(true)
            })?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok((reader.position(), page))
}
