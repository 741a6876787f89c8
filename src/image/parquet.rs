//! Tables as Parquet files.

use arrow_array::{RecordBatch, RecordBatchOptions};
use arrow_schema::{DataType, FieldRef};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::{EnabledStatistics, WriterProperties};

use super::array;
use super::arrow::Counts;
use super::extent::{Builder, Image};
use crate::dataset::{Span, Table};
use crate::error::{Context, Error, Kind, Result};

/// Checks that Parquet has all types of a table.
///
/// # Errors
/// `Unsupported`, naming the column.
pub fn supports(table: &Table) -> Result<()> {
    fn type_of(data_type: &DataType) -> Result<()> {
        match data_type {
            DataType::Union(..) | DataType::RunEndEncoded(..) | DataType::Interval(_) => {
                Err(Error::new(Kind::Unsupported, format!("Parquet has no type for {data_type}")))
            }
            DataType::List(child)
            | DataType::LargeList(child)
            | DataType::ListView(child)
            | DataType::LargeListView(child)
            | DataType::FixedSizeList(child, _)
            | DataType::Map(child, _) => field(child),
            DataType::Struct(fields) if fields.is_empty() => {
                Err(Error::new(Kind::Unsupported, "Parquet has no structs without fields"))
            }
            DataType::Struct(fields) => fields.iter().try_for_each(field),
            DataType::Dictionary(_, values) => type_of(values),
            _ => Ok(()),
        }
    }
    fn field(field: &FieldRef) -> Result<()> {
        type_of(field.data_type())
    }
    table
        .schema
        .fields()
        .iter()
        .try_for_each(|column| field(column).context(|| format!("column {:.200?}", column.name())))
}

/// Rows of a row group: many enough for long runs, few enough for readers to share the groups among threads.
const GROUP_ROWS: usize = 1 << 20;

/// The Parquet file of a table.
///
/// # Errors
/// As [`supports`]; `Malformed` if data breaks Arrow's rules; what the source says of its blobs.
pub fn image(table: &Table, counts: Counts<'_>) -> Result<Image> {
    supports(table)?;
    let Counts::From(source) = counts else {
        return Err(Error::new(Kind::Unsupported, "encoding Parquet needs the data"));
    };
    let properties = WriterProperties::builder()
        .set_compression(Compression::UNCOMPRESSED)
        .set_dictionary_enabled(false)
        .set_max_row_group_row_count(Some(GROUP_ROWS))
        .set_statistics_enabled(EnabledStatistics::None)
        .build();
    let mut writer = ArrowWriter::try_new(Vec::new(), table.schema.clone(), Some(properties)).map_err(encoding)?;
    for batch in &table.batches {
        let columns = batch.columns.iter().map(|column| array::load(column, source)).collect::<Result<Vec<_>>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(batch.rows as usize));
        let batch = RecordBatch::try_new_with_options(table.schema.clone(), columns, &options)
            .map_err(|error| Error::malformed("a record batch").with_source(error))?;
        writer.write(&batch).map_err(encoding)?;
    }
    let mut file = Builder::new();
    file.span(Span::literal(writer.into_inner().map_err(encoding)?));
    Ok(file.finish())
}

fn encoding(error: parquet::errors::ParquetError) -> Error {
    Error::new(Kind::Internal, "encoding Parquet").with_source(error)
}

/// Size of the Parquet file of a table if metadata tells it.
///
/// # Errors
/// As [`supports`].
pub fn size(table: &Table) -> Result<Option<u64>> {
    supports(table)?;
    Ok(None)
}
