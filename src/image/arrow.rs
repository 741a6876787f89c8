//! Tables as Arrow IPC files whose body buffers are the columns' own bytes.
//!
//! Layout (<https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format>): magic, schema message, one
//! dictionary batch for each dictionary, record batches, end of stream, footer. The schema message starts at offset 8,
//! as in files of other writers; every later message starts at a multiple of 64, and so does every body buffer, which
//! makes the buffers of a mapped file as well aligned as the blobs they come from. Large buffers start at pages.

mod batch;
mod check;
mod keys;

use std::sync::Arc;

use arrow_ipc::convert::IpcSchemaEncoder;
use arrow_ipc::writer::DictionaryTracker;
use arrow_ipc::{
    Block, DictionaryBatchBuilder, FooterBuilder, MessageBuilder, MessageHeader, MetadataVersion, RecordBatch,
    RecordBatchBuilder,
};
use arrow_schema::{DataType, Schema};
use flatbuffers::{FlatBufferBuilder, WIPOffset};

use super::extent::{Builder, Image};
use crate::dataset::{ArrayLayout, Span, Table};
use crate::error::{Context, Error, Kind, Result};
use crate::vineyard::BlobSource;
use batch::Body;
pub(super) use batch::{buffers, null_count, width};
pub(super) use check::{batch as check_batch, schema as check_schema};

/// Alignment of messages and body buffers in the file.
const ALIGNMENT: u64 = 64;
const MAGIC: &[u8] = b"ARROW1";
const CONTINUATION: [u8; 4] = [0xff; 4];

/// Where the null counts come from that metadata does not tell.
#[derive(Clone, Copy)]
pub enum Counts<'a> {
    /// Nowhere: 0 is written. The size and the layout are those of the true image, for `stat`.
    Skip,
    /// They are counted in the validity bitmaps.
    From(&'a dyn BlobSource),
}

/// The Arrow IPC file of a table.
///
/// The same table gives the same bytes each time, whichever process asks.
///
/// # Errors
/// `Malformed` if an array's buffers or children do not fit its type and length, `Unsupported` for a type that
/// Arrow IPC cannot express (a dictionary directly inside a dictionary), `TooLarge` past what the format can count.
pub fn image(table: &Table, counts: Counts<'_>) -> Result<Image> {
    check::schema(&table.schema)?;
    let mut file = Builder::new();
    file.bytes(MAGIC);
    file.align(8);
    schema_message(&mut file, &table.schema)?;

    let mut dictionaries = Dictionaries::default();
    for batch in &table.batches {
        check::batch(&table.schema, batch)?;
        dictionaries.collect(batch.columns.iter())?;
    }
    let mut dictionary_blocks = Vec::with_capacity(dictionaries.found.len());
    for (id, values) in dictionaries.found.iter().enumerate() {
        // A slot is empty if no batch has arrays: then nothing refers to it.
        if let Some(values) = values {
            let body = Body::of(std::slice::from_ref(&**values), counts).context(|| format!("dictionary {id}"))?;
            dictionary_blocks.push(batch_message(&mut file, &body, values.len, Some(id as i64))?);
        }
    }
    let mut record_blocks = Vec::with_capacity(table.batches.len());
    for batch in &table.batches {
        let body = Body::of(&batch.columns, counts)?;
        record_blocks.push(batch_message(&mut file, &body, batch.rows, None)?);
    }
    file.bytes(&CONTINUATION);
    file.bytes(&[0; 4]);
    footer(&mut file, &table.schema, &dictionary_blocks, &record_blocks)?;
    Ok(file.finish())
}

/// The dictionaries of a table, by id. Ids are given depth first, a dictionary's own after those inside its values, as
/// [`IpcSchemaEncoder`] does.
#[derive(Default)]
struct Dictionaries {
    found: Vec<Option<Arc<ArrayLayout>>>,
}

impl Dictionaries {
    /// Takes the dictionaries of one batch and compares them with those of the batches before.
    fn collect<'a>(&mut self, columns: impl Iterator<Item = &'a ArrayLayout>) -> Result<()> {
        let mut next = 0;
        for column in columns {
            self.visit(column, &mut next)?;
        }
        Ok(())
    }

    fn visit(&mut self, array: &ArrayLayout, next: &mut usize) -> Result<()> {
        for child in &array.children {
            self.visit(child, next)?;
        }
        if let Some(values) = &array.dictionary {
            self.visit(values, next)?;
            let id = *next;
            *next += 1;
            if self.found.len() <= id {
                self.found.resize(id + 1, None);
            }
            match &self.found[id] {
                None => self.found[id] = Some(values.clone()),
                Some(first) if Arc::ptr_eq(first, values) || first.is_same(values) => {}
                Some(_) => {
                    return Err(Error::new(
                        Kind::Unsupported,
                        "batches have different dictionaries, which one Arrow file cannot hold",
                    ));
                }
            }
        }
        Ok(())
    }
}

fn encode_schema<'b>(buffer: &mut FlatBufferBuilder<'b>, schema: &Schema) -> WIPOffset<arrow_ipc::Schema<'b>> {
    let mut tracker = DictionaryTracker::new(false);
    IpcSchemaEncoder::new().with_dictionary_tracker(&mut tracker).schema_to_fb_offset(buffer, schema)
}

fn schema_message(file: &mut Builder, schema: &Schema) -> Result<()> {
    let mut buffer = FlatBufferBuilder::new();
    let header = encode_schema(&mut buffer, schema).as_union_value();
    finish_message(&mut buffer, MessageHeader::Schema, header, 0);
    message(file, buffer.finished_data(), ALIGNMENT).map(drop)
}

fn finish_message(
    buffer: &mut FlatBufferBuilder<'_>,
    kind: MessageHeader,
    header: WIPOffset<flatbuffers::UnionWIPOffset>,
    body_len: i64,
) {
    let mut message = MessageBuilder::new(buffer);
    message.add_version(MetadataVersion::V5);
    message.add_header_type(kind);
    message.add_bodyLength(body_len);
    message.add_header(header);
    let root = message.finish();
    buffer.finish(root, None);
}

/// Appends a message's prefix and metadata, padded so that the body starts at a multiple of `alignment` in the file.
/// Returns the length of all that.
fn message(file: &mut Builder, metadata: &[u8], alignment: u64) -> Result<u64> {
    let start = file.position();
    let body = (start + 8 + metadata.len() as u64).next_multiple_of(alignment);
    let length = i32::try_from(body - start - 8)
        .map_err(|_| Error::new(Kind::TooLarge, format!("{} bytes of Arrow message metadata", metadata.len())))?;
    file.bytes(&CONTINUATION);
    file.bytes(&length.to_le_bytes());
    file.bytes(metadata);
    file.align(alignment);
    Ok(body - start)
}

/// Appends a record batch, or with an id a dictionary batch, and returns its entry in the footer.
fn batch_message(file: &mut Builder, body: &Body, rows: u64, dictionary: Option<i64>) -> Result<Block> {
    let start = file.position();
    // The footer counts in i64: neither may the body wrap, nor the whole file.
    if start.checked_add(body.len).is_none_or(|end| end > i64::MAX as u64 - (1 << 40)) || rows > i64::MAX as u64 {
        return Err(Error::new(Kind::TooLarge, format!("an Arrow file of {} bytes and more", body.len)));
    }
    let mut buffer = FlatBufferBuilder::with_capacity(256 + 16 * (body.nodes.len() + body.buffers.len()));
    let batch = record_batch(&mut buffer, body, rows as i64);
    match dictionary {
        None => finish_message(&mut buffer, MessageHeader::RecordBatch, batch.as_union_value(), body.len as i64),
        Some(id) => {
            let mut dictionary = DictionaryBatchBuilder::new(&mut buffer);
            dictionary.add_id(id);
            dictionary.add_data(batch);
            let header = dictionary.finish().as_union_value();
            finish_message(&mut buffer, MessageHeader::DictionaryBatch, header, body.len as i64);
        }
    }
    let metadata_len = message(file, buffer.finished_data(), body.alignment)?;
    let base = file.position();
    for (span, place) in body.spans.iter().zip(&body.buffers) {
        // Buffers come in order, each behind the end of the one before.
        file.span(Span::Zeros((base + place.offset() as u64).saturating_sub(file.position())));
        file.span(span.clone());
    }
    file.span(Span::Zeros((base + body.len).saturating_sub(file.position())));
    Ok(Block::new(start as i64, metadata_len as i32, body.len as i64))
}

fn record_batch<'b>(buffer: &mut FlatBufferBuilder<'b>, body: &Body, rows: i64) -> WIPOffset<RecordBatch<'b>> {
    let buffers = buffer.create_vector(&body.buffers);
    let nodes = buffer.create_vector(&body.nodes);
    let variadic = (!body.variadic.is_empty()).then(|| buffer.create_vector(&body.variadic));
    let mut batch = RecordBatchBuilder::new(buffer);
    batch.add_length(rows);
    batch.add_nodes(nodes);
    batch.add_buffers(buffers);
    if let Some(variadic) = variadic {
        batch.add_variadicBufferCounts(variadic);
    }
    batch.finish()
}

fn footer(file: &mut Builder, schema: &Schema, dictionaries: &[Block], batches: &[Block]) -> Result<()> {
    let mut buffer = FlatBufferBuilder::new();
    let dictionaries = buffer.create_vector(dictionaries);
    let batches = buffer.create_vector(batches);
    let schema = encode_schema(&mut buffer, schema);
    let mut footer = FooterBuilder::new(&mut buffer);
    footer.add_version(MetadataVersion::V5);
    footer.add_schema(schema);
    footer.add_dictionaries(dictionaries);
    footer.add_recordBatches(batches);
    let root = footer.finish();
    buffer.finish(root, None);
    let bytes = buffer.finished_data();
    let length = i32::try_from(bytes.len())
        .map_err(|_| Error::new(Kind::TooLarge, format!("an Arrow footer of {} bytes", bytes.len())))?;
    file.bytes(bytes);
    file.bytes(&length.to_le_bytes());
    file.bytes(MAGIC);
    Ok(())
}

/// True for types whose arrays have a validity bitmap.
pub(super) fn has_validity(data_type: &DataType) -> bool {
    !matches!(data_type, DataType::Null | DataType::Union(..) | DataType::RunEndEncoded(..))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
