//! Record batches as a vineyard `Table`.

use arrow_schema::{Schema, SchemaRef};
use serde_json::Value;

use super::column::Column;
use super::native;
use super::plan::{Draft, Field, field};
use crate::dataset::native::TRUE_SCHEMA;
use crate::error::{Error, Kind, Result};

/// What was read of a tabular file.
#[derive(Debug)]
pub(super) struct Batches {
    /// Its schema.
    pub(super) schema: SchemaRef,
    /// Rows and columns of each record batch.
    pub(super) batches: Vec<(u64, Vec<Column>)>,
    /// True if the columns' bytes lie in the file as they are.
    pub(super) exact: bool,
}

/// Rows that a batch has at least, after merging, if the file has so many: readers still find several to work on at once.
/// pandas writes 65,536 at a time, Hugging Face 1000; each would be an object for each column, with up to three blobs.
const MIN_ROWS: u64 = 1 << 18;

impl Batches {
    /// Merges batches if they are small, to have fewer objects.
    pub(super) fn merge_small(&mut self, staged: &[u8]) -> Result<()> {
        let rows: u64 = self.batches.iter().map(|(rows, _)| rows).sum();
        let count = self.batches.len() as u64;
        if count > 4 && rows / count < MIN_ROWS / 2 {
            self.batches = super::join::merge_batches(std::mem::take(&mut self.batches), MIN_ROWS, staged)?;
        }
        Ok(())
    }
}

/// Adds a `vineyard::Table` without its root: the keys and values of the root are returned.
///
/// Layout: `python/vineyard/data/arrow.py` of v6d 0.24.
pub(super) fn table(draft: &mut Draft, batches: &Batches) -> Result<Vec<(String, Field)>> {
    let stored = native::stored_schema(&batches.schema);
    let schema = schema_proxy(draft, &stored)?;
    let mut partitions = Vec::new();
    for (rows, columns) in &batches.batches {
        partitions.push(record_batch(draft, &schema, *rows, columns)?);
    }
    // A table without a partition can't be read by the official client.
    if partitions.is_empty() {
        let columns: Vec<Column> = batches.schema.fields().iter().map(|f| Column::empty(f.data_type())).collect();
        partitions.push(record_batch(draft, &schema, 0, &columns)?);
    }
    let rows = batches.batches.iter().map(|(rows, _)| rows).sum::<u64>();
    root(&batches.schema, schema, rows, partitions)
}

/// The root of a table over its partitions.
pub(super) fn root(
    true_schema: &Schema,
    schema: Field,
    rows: u64,
    partitions: Vec<Field>,
) -> Result<Vec<(String, Field)>> {
    let mut fields = vec![
        field("num_rows_", rows),
        field("num_columns_", true_schema.fields().len()),
        field("batch_num_", partitions.len()),
        field("partitions_-size", partitions.len()),
        field("nbytes", 0),
        ("schema_".into(), schema),
    ];
    for (i, partition) in partitions.into_iter().enumerate() {
        fields.push((format!("partitions_-{i}"), partition));
    }
    let own = |field: &arrow_schema::FieldRef| !native::is_vineyards(field.data_type());
    if native::stored_schema(true_schema) != *true_schema || true_schema.fields().iter().any(own) {
        fields.push(field(TRUE_SCHEMA, schema_text(true_schema)?));
    }
    Ok(fields)
}

/// Adds a `vineyard::RecordBatch`.
pub(super) fn record_batch(draft: &mut Draft, schema: &Field, rows: u64, columns: &[Column]) -> Result<Field> {
    let size = columns.iter().map(Column::size).sum::<u64>();
    let arrays = columns.iter().map(|column| native::array(draft, column)).collect::<Result<Vec<Field>>>()?;
    Ok(record_batch_of(draft, schema, rows, size, arrays))
}

/// Adds a `vineyard::RecordBatch` over arrays that are there.
pub(super) fn record_batch_of(draft: &mut Draft, schema: &Field, rows: u64, size: u64, arrays: Vec<Field>) -> Field {
    let mut fields = vec![
        field("row_num_", rows),
        field("column_num_", arrays.len()),
        field("nbytes", size),
        field("__columns_-size", arrays.len()),
        ("schema_".into(), schema.clone()),
    ];
    fields.extend(arrays.into_iter().enumerate().map(|(i, array)| (format!("__columns_-{i}"), array)));
    draft.object("vineyard::RecordBatch", fields)
}

/// Adds a `vineyard::SchemaProxy`.
pub(super) fn schema_proxy(draft: &mut Draft, schema: &Schema) -> Result<Field> {
    let text = schema_text(schema)?;
    Ok(draft.object("vineyard::SchemaProxy", vec![field("schema_binary_", text), field("nbytes", 0)]))
}

/// A schema as vineyard keeps it: an encapsulated Arrow schema message as JSON text of a list of bytes.
pub(super) fn schema_text(schema: &Schema) -> Result<Value> {
    use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteOptions};
    let options = IpcWriteOptions::default();
    let encoded = IpcDataGenerator::default().schema_to_bytes_with_dictionary_tracker(
        schema,
        &mut DictionaryTracker::new(false),
        &options,
    );
    let message = encoded.ipc_message;
    let padded = message.len().next_multiple_of(8);
    let length = i32::try_from(padded).map_err(|_| Error::new(Kind::TooLarge, "a schema of over 2 GiB"))?;
    let mut bytes = vec![0xff; 4];
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&message);
    bytes.resize(8 + padded, 0);
    let mut text = String::with_capacity(bytes.len() * 4 + 16);
    text.push_str("{\"bytes\":[");
    for (i, byte) in bytes.iter().enumerate() {
        use std::fmt::Write;
        let _ = write!(text, "{}{byte}", if i == 0 { "" } else { "," });
    }
    text.push_str("]}");
    Ok(Value::String(text))
}
