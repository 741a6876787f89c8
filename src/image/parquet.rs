//! Tables as Parquet files, as far as possible with the columns' own bytes.
//!
//! Uncompressed `PLAIN` pages of a fixed-width column are the column's bytes, Parquet's booleans are packed as Arrow's
//! are, and `DELTA_LENGTH_BYTE_ARRAY` keeps the bytes of strings contiguous: a column without nulls needs only page
//! headers, a few bytes of definition levels and for strings their lengths. Everything else (nulls, nested types, 8 and
//! 16 bit integers, decimals of other widths, times in seconds, runs) is encoded once and is literal bytes of the image.
//!
//! Format: <https://parquet.apache.org/docs/file-format/>.

mod chunk;
mod delta;
mod dictionary;
mod encode;
mod group;
mod page;
mod runs;
mod types;

use std::sync::Arc;

use arrow_schema::{DataType, Schema};
use parquet::errors::ParquetError;
use parquet::file::metadata::{
    FileMetaData, KeyValue, ParquetMetaDataBuilder, ParquetMetaDataWriter, RowGroupMetaData,
};
use parquet::file::properties::WriterProperties;
use parquet::schema::types::SchemaDescPtr;

use super::arrow::Counts;
use super::extent::{Builder, Image};
use crate::dataset::{ArrayLayout, Table};
use crate::error::{Error, Kind, Result};
use chunk::{Chunk, Plan};
use group::Group;

const MAGIC: &[u8] = b"PAR1";
/// Version of the format in the footer: 2 for files with the logical types of format 2.
const VERSION: i32 = 2;

/// Most row groups of a file: their numbers have 16 bits (`ordinal` of `RowGroup`, `parquet.thrift`).
const MAX_GROUPS: u64 = i16::MAX as u64;

/// Most values of a file that take no bytes in the table, so that encoding them ends. Those of runs, which are written out,
/// count as [`RUN_WEIGHT`].
const MAX_WEIGHTLESS: u64 = 1 << 30;
/// See [`MAX_WEIGHTLESS`].
const RUN_WEIGHT: u64 = 8;

/// Checks that Parquet has all types of a table, and room for its rows.
///
/// # Errors
/// `Unsupported`, naming the column.
pub fn supports(table: &Table) -> Result<()> {
    let rows = table.batches.iter().fold(0u64, |sum, batch| sum.saturating_add(batch.rows));
    // A group is full to more than half: a batch that is not cut did not fit beside the rows before it.
    if rows / group::ROWS > MAX_GROUPS / 2 {
        return Err(Error::new(Kind::Unsupported, format!("{rows} rows are too many for a Parquet file")));
    }
    let columns = table.batches.iter().flat_map(|batch| &batch.columns);
    let weightless = columns.fold(0u64, |sum, column| sum.saturating_add(weightless(column)));
    if weightless > MAX_WEIGHTLESS {
        return Err(Error::new(Kind::Unsupported, "more nulls and rows of runs than are written out as Parquet"));
    }
    types::convert(&table.schema).map(drop)
}

fn weightless(array: &ArrayLayout) -> u64 {
    let own = match array.data_type {
        DataType::Null => array.len,
        DataType::RunEndEncoded(..) => array.len.saturating_mul(RUN_WEIGHT),
        _ => 0,
    };
    array.children.iter().fold(own, |sum, child| sum.saturating_add(weightless(child)))
}

/// The Parquet file of a table.
///
/// Reads the data of columns that must be encoded, and the offsets of string columns; no data if there are none of
/// either, and then [`Counts::Skip`] does.
///
/// # Errors
/// As [`supports`]; `Malformed` if data breaks Arrow's rules; what the source says of its blobs; `Unsupported` with
/// [`Counts::Skip`] if data is needed.
pub fn image(table: &Table, counts: Counts<'_>) -> Result<Image> {
    let layout = Layout::of(table)?;
    let groups = group::groups(table);
    let chunks = chunk::chunks(table, &layout, &groups, counts)?;

    let mut file = Builder::new();
    file.bytes(MAGIC);
    let mut metadata = Vec::with_capacity(groups.len());
    for (group, chunks) in groups.iter().zip(chunks) {
        metadata.push(row_group(&mut file, &layout, group, chunks)?);
    }
    footer(&mut file, &layout, table, metadata)?;
    Ok(file.finish())
}

/// Size of the Parquet file of a table; `None` if it depends on the data.
///
/// # Errors
/// As [`supports`].
pub fn size(table: &Table) -> Result<Option<u64>> {
    let layout = Layout::of(table)?;
    if layout.plans.iter().any(Plan::needs_data) {
        return Ok(None);
    }
    Ok(Some(image(table, Counts::Skip)?.size()))
}

/// What is known of a table's file before its rows are looked at.
struct Layout {
    /// The Parquet types.
    descriptor: SchemaDescPtr,
    /// The Arrow schema with the types that values are stored in.
    stored: Arc<Schema>,
    /// How each column is written.
    plans: Vec<Plan>,
}

impl Layout {
    fn of(table: &Table) -> Result<Layout> {
        supports(table)?;
        let (stored, descriptor) = types::convert(&nullable_where_null(table))?;
        for batch in &table.batches {
            super::arrow::check_batch(&table.schema, batch)?;
        }
        let plans = Plan::of_table(table, &stored, &descriptor);
        Ok(Layout { descriptor, stored, plans })
    }
}

/// The schema, with what has nulls as nullable: files may say otherwise, and most programs do not mind.
fn nullable_where_null(table: &Table) -> Schema {
    let has_nulls = |i: usize| {
        let columns = table.batches.iter().filter_map(|batch| batch.columns.get(i));
        columns.into_iter().any(|column| column.null_count.is_some_and(|count| count > 0))
    };
    let fields =
        table.schema.fields().iter().enumerate().map(|(i, field)| match field.is_nullable() || !has_nulls(i) {
            true => field.clone(),
            false => Arc::new(field.as_ref().clone().with_nullable(true)),
        });
    Schema::new_with_metadata(fields.collect::<Vec<_>>(), table.schema.metadata().clone())
}

/// Appends one row group and returns its entry in the footer.
fn row_group(file: &mut Builder, layout: &Layout, group: &Group, chunks: Vec<Chunk>) -> Result<RowGroupMetaData> {
    let start = signed(file.position())?;
    let mut columns = Vec::with_capacity(chunks.len());
    let mut bytes = 0i64;
    for chunk in chunks {
        let base = signed(file.position())?;
        bytes = bytes.saturating_add(chunk.metadata.uncompressed_size());
        let data_page = chunk.metadata.data_page_offset();
        let dictionary_page = chunk.metadata.dictionary_page_offset();
        let metadata = chunk
            .metadata
            .into_builder()
            .set_data_page_offset(base + data_page)
            .set_dictionary_page_offset(dictionary_page.map(|offset| base + offset))
            .build()
            .map_err(internal)?;
        columns.push(metadata);
        for span in chunk.spans {
            file.span(span);
        }
    }
    RowGroupMetaData::builder(layout.descriptor.clone())
        .set_num_rows(signed(group.rows)?)
        .set_total_byte_size(bytes)
        .set_file_offset(start)
        .set_column_metadata(columns)
        .build()
        .map_err(internal)
}

fn footer(file: &mut Builder, layout: &Layout, table: &Table, groups: Vec<RowGroupMetaData>) -> Result<()> {
    let metadata = FileMetaData::new(
        VERSION,
        signed(table.rows())?,
        Some(concat!("vineyard-fs version ", env!("CARGO_PKG_VERSION")).into()),
        Some(key_values(&table.schema, &layout.stored)),
        layout.descriptor.clone(),
        None,
    );
    let metadata = ParquetMetaDataBuilder::new(metadata).set_row_groups(groups).build();
    let mut bytes = Vec::new();
    ParquetMetaDataWriter::new(&mut bytes, &metadata).finish().map_err(internal)?;
    file.bytes(&bytes);
    Ok(())
}

/// The schema's metadata (`pandas` among it), each under its key as other writers do, and the Arrow types under
/// `ARROW:schema`: those that the values are stored in, because some readers take values for what it says.
fn key_values(schema: &Schema, stored: &Schema) -> Vec<KeyValue> {
    let mut properties = WriterProperties::builder().build();
    // pyarrow (26) takes the metadata from here if this is here, other readers from their keys.
    let whole = Schema::new_with_metadata(stored.fields().clone(), schema.metadata().clone());
    parquet::arrow::add_encoded_arrow_schema_to_metadata(&whole, &mut properties);
    let mut pairs = properties.key_value_metadata().cloned().unwrap_or_default();
    for (key, value) in schema.metadata() {
        if key != parquet::arrow::ARROW_SCHEMA_META_KEY {
            pairs.push(KeyValue::new(key.clone(), value.clone()));
        }
    }
    pairs
}

/// Parquet counts in `i64`.
fn signed(value: u64) -> Result<i64> {
    i64::try_from(value).map_err(|_| Error::new(Kind::TooLarge, format!("{value} is beyond what Parquet can count")))
}

fn internal(error: ParquetError) -> Error {
    Error::new(Kind::Internal, "laying out Parquet").with_source(error)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
