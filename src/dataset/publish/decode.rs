//! Arrow IPC data that needs decoding first: dictionaries that grow (deltas) or are replaced between batches.
//!
//! The Arrow crates read the batches and join the dictionaries; the result is read like a file again.

use std::io::Cursor;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow_array::builder::Int32Builder;
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, DictionaryArray, RecordBatch, RecordBatchOptions, RecordBatchReader};
use arrow_buffer::Buffer;
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{DataType, Schema, SchemaRef};

use super::arrow_stream;
use super::column::Column;
use super::ipc::arrow;
use super::plan::Part;
use super::table::Batches;
use crate::cgroup;
use crate::dataset::materialize::distinct_values;
use crate::error::{Context, Error, Kind, Result};

/// Most values of dictionaries of which each is kept once; joining more takes too much memory.
const MAX_VALUES: usize = 1 << 24;

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

/// Bytes that the elements of a batch take, without what else lies in the buffers that they share.
fn bytes_of(batch: &RecordBatch) -> u64 {
    let of = |column: &ArrayRef| column.to_data().get_slice_memory_size().unwrap_or(column.get_array_memory_size());
    batch.columns().iter().map(|column| of(column) as u64).sum()
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
        size = size.saturating_add(bytes_of(&batch));
        if size > budget {
            return Err(Error::malformed("batches that decode to more than the store holds"));
        }
        all.push(batch);
    }
    let rows = all.iter().map(RecordBatch::num_rows).sum::<usize>();
    let mut fields = Vec::with_capacity(schema.fields().len());
    let mut joined = Vec::with_capacity(schema.fields().len());
    for (i, field) in schema.fields().iter().enumerate() {
        let parts: Vec<ArrayRef> = all.iter().map(|batch| batch.column(i).clone()).collect();
        let column = match field.data_type() {
            _ if parts.is_empty() => arrow_array::new_empty_array(field.data_type()),
            DataType::Dictionary(..) => join_dictionaries(&parts)?,
            _ => arrow::compute::concat(&parts.iter().map(|part| part.as_ref()).collect::<Vec<_>>()).map_err(arrow)?,
        };
        fields.push(field.as_ref().clone().with_data_type(column.data_type().clone()));
        joined.push(column);
    }
    drop(all);
    let schema = Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone()));
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    let joined = RecordBatch::try_new_with_options(schema.clone(), joined, &options).map_err(arrow)?;
    Ok(Batches { schema, batches: vec![(rows as u64, columns(&joined)?)], exact: false })
}

/// Dictionary arrays as one with every value once: pandas takes no category twice. The keys become wider ones if those of
/// the arrays do not reach all values.
pub(super) fn join_dictionaries(arrays: &[ArrayRef]) -> Result<ArrayRef> {
    let dictionaries: Vec<_> = arrays.iter().filter_map(|array| array.as_any_dictionary_opt()).collect();
    // Those in a row that are equal count once.
    let mut distinct: Vec<ArrayRef> = Vec::new();
    let mut which = Vec::with_capacity(arrays.len());
    for values in dictionaries.iter().map(|dictionary| dictionary.values()) {
        let is_known = |last: &ArrayRef| last.to_data().ptr_eq(&values.to_data()) || last.as_ref() == values.as_ref();
        if !distinct.last().is_some_and(is_known) {
            distinct.push(values.clone());
        }
        which.push(distinct.len() - 1);
    }
    let total: usize = distinct.iter().map(|values| values.len()).sum();
    if total > MAX_VALUES {
        return arrow::compute::concat(&arrays.iter().map(|a| a.as_ref()).collect::<Vec<_>>()).map_err(arrow);
    }
    let (values, lists) = match distinct.as_slice() {
        [one] => (one.clone(), vec![(0..one.len() as u64).collect()]),
        several => distinct_values(several)?,
    };
    let mut keys = Int32Builder::with_capacity(arrays.iter().map(|array| array.len()).sum());
    for (dictionary, which) in dictionaries.iter().zip(which) {
        let list = lists.get(which).ok_or_else(|| Error::new(Kind::Internal, "a dictionary without its values"))?;
        let own = if list.is_empty() { vec![0; dictionary.len()] } else { dictionary.normalized_keys() };
        for (i, key) in own.into_iter().enumerate() {
            let key = list.get(key).filter(|_| dictionary.is_valid(i));
            keys.append_option(key.map(|key| *key as i32));
        }
    }
    let joined: ArrayRef = Arc::new(DictionaryArray::try_new(keys.finish(), values).map_err(arrow)?);
    let wanted = arrays.first().map_or(joined.data_type(), |array| array.data_type());
    Ok(arrow::compute::cast(&joined, wanted).unwrap_or(joined))
}

/// The columns of a batch in memory.
pub(super) fn columns(batch: &RecordBatch) -> Result<Vec<Column>> {
    let mut bytes = Vec::with_capacity(bytes_of(batch) as usize);
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
