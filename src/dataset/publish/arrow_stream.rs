//! Arrow IPC streams in a file, as Hugging Face writes them under `.arrow`.

use arrow_ipc::MessageHeader;

use super::arrow_file::message_at;
use super::ipc::{self, Layout, Reader};
use super::table::Batches;
use crate::error::{Error, Result};

/// Most bytes of a schema message that looks like one.
const MAX_SCHEMA: u32 = 256 << 20;

/// What the start of a file says about a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    /// The schema message is there.
    Stream,
    /// It may become one.
    Short,
    /// It is none.
    Other,
}

/// Looks at the first message.
pub(super) fn head(staged: &[u8]) -> Head {
    let marker = [0xffu8; 4];
    if staged.len() < 8 {
        return if marker.starts_with(&staged[..staged.len().min(4)]) { Head::Short } else { Head::Other };
    }
    let Some(rest) = staged.strip_prefix(&marker) else { return Head::Other };
    let length = rest.first_chunk::<4>().map_or(0, |l| u32::from_le_bytes(*l));
    if length == 0 || length > MAX_SCHEMA {
        return Head::Other;
    }
    match rest.get(4..4 + length as usize) {
        None => Head::Short,
        Some(bytes) => match message_at(bytes) {
            Ok(message) if message.header_type() == MessageHeader::Schema => Head::Stream,
            _ => Head::Other,
        },
    }
}

/// True if the file ends where a message ends.
pub(super) fn complete(staged: &[u8]) -> bool {
    let mut position = 0;
    while position < staged.len() {
        match next(staged, position) {
            Ok(Some((_, body))) => position = body.end as usize,
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
    true
}

/// The message at `position` with the range of its body, or `None` for the end of the stream.
fn next(staged: &[u8], position: usize) -> Result<Option<(arrow_ipc::Message<'_>, std::ops::Range<u64>)>> {
    let broken = || Error::malformed("a stream that ends inside a message");
    let bytes = staged.get(position..).unwrap_or_default();
    let (prefix, bytes) = match bytes.strip_prefix(&[0xff; 4]) {
        Some(rest) => (8, rest),
        None => (4, bytes),
    };
    let length = i32::from_le_bytes(*bytes.first_chunk::<4>().ok_or_else(broken)?);
    if length == 0 {
        return Ok(None);
    }
    let length = usize::try_from(length).map_err(|_| broken())?;
    let message = message_at(bytes.get(4..).and_then(|b| b.get(..length)).ok_or_else(broken)?)?;
    let start = (position + prefix + length) as u64;
    let body = u64::try_from(message.bodyLength()).ok().and_then(|n| start.checked_add(n)).ok_or_else(broken)?;
    if body > staged.len() as u64 {
        return Err(broken());
    }
    Ok(Some((message, start..body)))
}

/// All messages of a stream.
fn all(staged: &[u8]) -> Result<super::decode::Messages<'_>> {
    let (mut messages, mut position) = (Vec::new(), 0);
    while position < staged.len()
        && let Some((message, body)) = next(staged, position)?
    {
        position = body.end as usize;
        messages.push((message, body));
    }
    Ok(messages)
}

/// Reads the columns of a stream.
///
/// # Errors
/// `Malformed` if the stream breaks a rule of the format or ends inside a message.
pub(super) fn read(staged: &[u8], budget: u64) -> Result<Batches> {
    let (first, body) = next(staged, 0)?.ok_or_else(|| Error::malformed("an empty stream"))?;
    let schema = first.header_as_schema().ok_or_else(|| Error::malformed("a stream without schema"))?;
    let layout = Layout::new(schema)?;
    let mut reader = Reader::new(staged, &layout, budget);
    let mut batches = Vec::new();
    let mut position = body.end as usize;
    while position < staged.len() {
        let Some((message, body)) = next(staged, position)? else { break };
        position = body.end as usize;
        match message.header_type() {
            MessageHeader::DictionaryBatch => {
                if !reader.dictionary(message, body)? {
                    return super::decode::stream(staged, &all(staged)?, budget);
                }
            }
            MessageHeader::RecordBatch => batches.push(reader.batch(message, body)?),
            other => return Err(Error::malformed(format!("a message of type {other:?} in a stream"))),
        }
    }
    let compressed = reader.compressed;
    Ok(Batches { schema: layout.schema.clone(), batches, exact: !compressed })
}

/// Checks that a buffer is one schema message and reads it; for `schema_binary_` texts.
pub(in crate::dataset) fn schema(bytes: &[u8]) -> Result<arrow_schema::Schema> {
    let message = message_at(ipc::message_bytes(bytes, 0..bytes.len() as u64)?)?;
    let schema = message.header_as_schema().ok_or_else(|| Error::malformed("no schema message"))?;
    arrow_ipc::convert::try_fb_to_schema(schema).map_err(ipc::arrow)
}
