//! Arrow IPC data that needs decoding first: dictionaries that grow (deltas) or are replaced between batches.
//!
//! The Arrow crates read the batches and join the dictionaries; the result is read like a file again.

use std::io::Cursor;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow_array::{RecordBatch, RecordBatchReader};
use arrow_buffer::Buffer;
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::SchemaRef;

use super::arrow_stream;
use super::column::Column;
use super::ipc::arrow;
use super::plan::Part;
use super::table::Batches;
use crate::cgroup;
use crate::error::{Context, Error, Result};

/// The messages of a file or a stream, with where their bodies lie.
pub(super) type Messages<'a> = Vec<(arrow_ipc::Message<'a>, Range<u64>)>;

/// Checks what the Arrow crates believe: that buffers lie in their bodies, and how long they say that they will be when
/// they are decompressed.
fn check(staged: &[u8], messages: &Messages<'_>, budget: u64) -> Result<()> {
    let outside = || Error::malformed("a buffer outside its body");
    let (mut inflated, mut held) = (0u64, 0u64);
    for (message, body) in messages {
        held = held.saturating_add(body.end.saturating_sub(body.start));
        let dictionary = message.header_as_dictionary_batch().and_then(|batch| batch.data());
        let Some(batch) = message.header_as_record_batch().or(dictionary) else { continue };
        for buffer in batch.buffers().iter().flatten() {
            let (offset, length) = (u64::try_from(buffer.offset()), u64::try_from(buffer.length()));
            let (offset, length) = (offset.map_err(|_| outside())?, length.map_err(|_| outside())?);
            let start = body.start.checked_add(offset).ok_or_else(outside)?;
            let end = start.checked_add(length).filter(|end| *end <= body.end).ok_or_else(outside)?;
            if batch.compression().is_some() && length > 0 {
                // The length comes first; -1 says that the bytes are as they are (Arrow's Message.fbs, BodyCompression).
                let bytes = staged.get(start as usize..end as usize).and_then(<[u8]>::first_chunk::<8>);
                let says = i64::from_le_bytes(*bytes.ok_or_else(outside)?);
                let says = if says == -1 { length } else { u64::try_from(says).map_err(|_| outside())? };
                inflated = inflated.saturating_add(says);
            }
        }
    }
    if inflated > budget {
        return Err(Error::malformed("batches that decode to more than the store holds"));
    }
    // As they are, and joined.
    cgroup::room_for(inflated.max(held).saturating_mul(2)).context(|| "memory for decoding".into())
}

/// Runs a piece of the Arrow and Parquet crates, which may panic where a file lies.
pub(super) fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(Error::malformed("a file that lies")))
}

/// Decodes a file.
pub(super) fn file(staged: &[u8], messages: &Messages<'_>, budget: u64) -> Result<Batches> {
    check(staged, messages, budget)?;
    guarded(|| decode_file(staged, budget))
}

fn decode_file(staged: &[u8], budget: u64) -> Result<Batches> {
    let reader = FileReader::try_new(Cursor::new(staged), None).map_err(arrow)?;
    unify(reader.schema(), reader, budget)
}

/// Decodes a stream.
pub(super) fn stream(staged: &[u8], messages: &Messages<'_>, budget: u64) -> Result<Batches> {
    check(staged, messages, budget)?;
    guarded(|| decode_stream(staged, budget))
}

fn decode_stream(staged: &[u8], budget: u64) -> Result<Batches> {
    let reader = StreamReader::try_new(Cursor::new(staged), None).map_err(arrow)?;
    unify(RecordBatchReader::schema(&reader), reader, budget)
}

fn unify(
    schema: SchemaRef,
    batches: impl Iterator<Item = std::result::Result<RecordBatch, arrow_schema::ArrowError>>,
    budget: u64,
) -> Result<Batches> {
    let mut all = Vec::new();
    let mut size = 0u64;
    for batch in batches {
        let batch = batch.map_err(arrow)?;
        size = size.saturating_add(batch.get_array_memory_size() as u64);
        if size > budget {
            return Err(Error::malformed("batches that decode to more than the store holds"));
        }
        all.push(batch);
    }
    let joined = arrow::compute::concat_batches(&schema, &all).map_err(arrow)?;
    drop(all);
    Ok(Batches { schema, batches: vec![(joined.num_rows() as u64, columns(&joined)?)], exact: false })
}

/// The columns of a batch in memory.
pub(super) fn columns(batch: &RecordBatch) -> Result<Vec<Column>> {
    let mut bytes = Vec::with_capacity(batch.get_array_memory_size());
    let mut writer = arrow_ipc::writer::StreamWriter::try_new(&mut bytes, &batch.schema()).map_err(arrow)?;
    writer.write(batch).map_err(arrow)?;
    writer.finish().map_err(arrow)?;
    drop(writer);
    let mut read = arrow_stream::read(&bytes, 0)?;
    let mut columns = read.batches.pop().map(|(_, columns)| columns).unwrap_or_default();
    let bytes = Buffer::from_vec(bytes);
    columns.iter_mut().for_each(|column| own(column, &bytes));
    Ok(columns)
}

/// Makes ranges of `bytes` slices of it.
fn own(column: &mut Column, bytes: &Buffer) {
    for part in column.buffers.iter_mut().flatten() {
        if let Part::Staged(at) = part {
            *part = Part::Owned(bytes.slice_with_length(at.start as usize, (at.end - at.start) as usize));
        }
    }
    column.children.iter_mut().for_each(|child| own(child, bytes));
    if let Some(values) = &mut column.dictionary {
        own(Arc::make_mut(values), bytes);
    }
}
