//! Arrow IPC files (Feather version 2), read by the footer only: some writers (polars) put no valid stream inside.

use std::ops::Range;

use arrow_ipc::{Block, Footer};

use super::ipc::{self, Layout, Reader};
use super::table::Batches;
use crate::error::{Error, Result};

/// First and last bytes of a file.
pub(super) const MAGIC: &[u8; 6] = b"ARROW1";

/// Reads the columns of a file.
///
/// # Errors
/// `Malformed` if the file breaks a rule of the format.
pub(super) fn read(staged: &[u8], budget: u64) -> Result<Batches> {
    let (footer, end) = footer(staged)?;
    let layout = Layout::new(footer.schema().ok_or_else(|| Error::malformed("a footer without schema"))?)?;
    let mut reader = Reader::new(staged, &layout, budget);
    let mut plain = true;
    let mut messages = Vec::new();
    for block in footer.dictionaries().iter().flatten() {
        let (message, body) = message(staged, block, end)?;
        plain &= reader.dictionary(message, body.clone())?;
        messages.push((message, body));
    }
    if !plain {
        for block in footer.recordBatches().iter().flatten() {
            messages.push(message(staged, block, end)?);
        }
        return super::decode::file(staged, &messages, budget);
    }
    let mut batches = Vec::new();
    for block in footer.recordBatches().iter().flatten() {
        let (message, body) = message(staged, block, end)?;
        batches.push(reader.batch(message, body)?);
    }
    let compressed = reader.compressed;
    Ok(Batches { schema: layout.schema.clone(), batches, exact: !compressed })
}

/// True if the file ends as one does, whatever its footer says.
pub(super) fn has_end(staged: &[u8]) -> bool {
    footer_bytes(staged).is_ok()
}

/// The footer's flatbuffer, and where it starts.
fn footer_bytes(staged: &[u8]) -> Result<(&[u8], usize)> {
    let broken = || Error::malformed("no Arrow footer at the end");
    // At the start: the magic and two bytes of padding; at the end: the footer, its length and the magic.
    let rest =
        staged.strip_prefix(MAGIC.as_slice()).and_then(|_| staged.strip_suffix(MAGIC.as_slice())).ok_or_else(broken)?;
    let (rest, length) = rest.split_last_chunk::<4>().ok_or_else(broken)?;
    let length = usize::try_from(i32::from_le_bytes(*length)).map_err(|_| broken())?;
    let start = rest.len().checked_sub(length).filter(|&start| start >= 8).ok_or_else(broken)?;
    Ok((&rest[start..], start))
}

/// The footer, and where it starts.
///
/// # Errors
/// `Malformed` if the file does not end as one does.
fn footer(staged: &[u8]) -> Result<(Footer<'_>, u64)> {
    let (bytes, start) = footer_bytes(staged)?;
    let options = flatbuffers::VerifierOptions { max_tables: tables(bytes.len()), ..Default::default() };
    let footer = arrow_ipc::root_as_footer_with_opts(&options, bytes).map_err(ipc::arrow)?;
    Ok((footer, start as u64))
}

/// Most tables that a flatbuffer of so many bytes can hold: each takes more than eight bytes.
fn tables(length: usize) -> usize {
    (length / 8).clamp(1 << 10, 1 << 24)
}

fn message<'a>(staged: &'a [u8], block: &Block, end: u64) -> Result<(arrow_ipc::Message<'a>, Range<u64>)> {
    let broken = || Error::malformed("a block outside the file");
    let start = u64::try_from(block.offset()).map_err(|_| broken())?;
    let head = u64::try_from(block.metaDataLength()).map_err(|_| broken())?;
    let length = u64::try_from(block.bodyLength()).map_err(|_| broken())?;
    let body = start.checked_add(head).ok_or_else(broken)?;
    let body = body..body.checked_add(length).filter(|&e| e <= end).ok_or_else(broken)?;
    let message = message_at(ipc::message_bytes(staged, start..body.start)?)?;
    Ok((message, body))
}

/// A verified message.
pub(super) fn message_at(bytes: &[u8]) -> Result<arrow_ipc::Message<'_>> {
    let options = flatbuffers::VerifierOptions { max_tables: tables(bytes.len()), ..Default::default() };
    arrow_ipc::root_as_message_with_opts(&options, bytes).map_err(ipc::arrow)
}
