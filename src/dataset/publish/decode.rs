//! Arrow IPC data that needs decoding first: dictionaries that grow (deltas) or are replaced between batches.
//!
//! The Arrow crates read the batches and join the dictionaries; the result is read like a file again.

use std::io::Cursor;
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
use crate::error::Result;

/// Decodes a file.
pub(super) fn file(staged: &[u8], budget: u64) -> Result<Batches> {
    let reader = FileReader::try_new(Cursor::new(staged), None).map_err(arrow)?;
    unify(reader.schema(), reader, budget)
}

/// Decodes a stream.
pub(super) fn stream(staged: &[u8], budget: u64) -> Result<Batches> {
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
            return Err(crate::error::Error::malformed("batches that decode to more than the store holds"));
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
