//! Columns that Parquet stores differently, encoded by the `parquet` crate.

use std::sync::Arc;

use arrow::compute::{CastOptions, cast_with_options};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::{DataType, Field, FieldRef, Schema};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnDescPtr;

use super::chunk::Chunk;
use super::group::{Piece, ROWS};
use super::{internal, runs, signed};
use crate::dataset::{ArrayLayout, Span};
use crate::error::{Error, Kind, Result};
use crate::image::array;
use crate::sync::Mutex;
use crate::vineyard::BlobSource;

/// One column of one batch, loaded when its first row group is encoded and dropped after its last.
#[derive(Debug, Default)]
pub struct Slot {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    array: Option<ArrayRef>,
    /// Pieces that were not taken yet.
    left: usize,
}

impl Slot {
    /// A column that will be taken in so many pieces.
    pub fn new(pieces: usize) -> Slot {
        Slot { state: Mutex::new(State { array: None, left: pieces }) }
    }

    /// Rows of the column in the type that they are stored in. Each piece is taken once.
    ///
    /// # Errors
    /// `Malformed` if data breaks Arrow's rules; `TooLarge` for runs that stand for too much; what the source says of its
    /// blobs.
    pub fn take(
        &self,
        layout: &ArrayLayout,
        stored: &DataType,
        piece: &Piece,
        source: &dyn BlobSource,
    ) -> Result<ArrayRef> {
        // A thread that panicked leaves an array or none; both are right.
        let mut state = self.state.lock().unwrap_or_else(|error| error.into_inner());
        let array = match state.array.take() {
            Some(array) => array,
            None => load(layout, stored, source)?,
        };
        state.left = state.left.saturating_sub(1);
        if state.left > 0 {
            state.array = Some(array.clone());
        }
        drop(state);
        let rows = match piece.start == 0 && piece.rows == layout.len {
            true => array,
            false => array.slice(piece.start as usize, piece.rows as usize),
        };
        if !runs::has_runs(rows.data_type()) {
            return Ok(rows);
        }
        runs::check_piece(&rows)?;
        store(rows, stored)
    }
}

fn load(layout: &ArrayLayout, stored: &DataType, source: &dyn BlobSource) -> Result<ArrayRef> {
    let array = array::load(layout, source)?;
    if runs::has_runs(array.data_type()) {
        // They are written out piece by piece.
        return runs::check(&array).map(|()| array);
    }
    store(array, stored)
}

/// An array in the type that it is stored in.
fn store(array: ArrayRef, stored: &DataType) -> Result<ArrayRef> {
    if array.data_type() == stored {
        return Ok(array);
    }
    let options = CastOptions { safe: false, ..CastOptions::default() };
    // The array is sound, so it has a value that Parquet's type does not reach.
    cast_with_options(&array, stored, &options).map_err(|error| {
        Error::new(Kind::Unsupported, format!("storing {} as {stored}", array.data_type())).with_source(error)
    })
}

/// Encodes one column of one row group: a chunk for each leaf, in order. `repeats` tells that few values are most rows.
///
/// # Errors
/// `Malformed` if data breaks Arrow's rules; what the source says of its blobs.
pub fn column(
    field: &FieldRef,
    leaves: &[ColumnDescPtr],
    repeats: bool,
    arrays: impl Iterator<Item = Result<ArrayRef>>,
) -> Result<Vec<Chunk>> {
    let schema = Arc::new(Schema::new(vec![Field::clone(field)]));
    let properties = WriterProperties::builder()
        .set_compression(Compression::UNCOMPRESSED)
        .set_dictionary_enabled(repeats || has_dictionary(field.data_type()))
        .set_coerce_types(true)
        .set_data_page_row_count_limit(ROWS as usize)
        .set_max_row_group_row_count(None)
        .set_offset_index_disabled(true)
        .set_statistics_enabled(EnabledStatistics::None)
        .build();
    let options = ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(true);
    let mut writer = ArrowWriter::try_new_with_options(Vec::new(), schema.clone(), options).map_err(internal)?;
    for array in arrays {
        let batch = RecordBatch::try_new(schema.clone(), vec![array?])
            .map_err(|error| Error::malformed("values that break their type").with_source(error))?;
        writer.write(&batch).map_err(encoding)?;
    }
    writer.flush().map_err(encoding)?;
    let columns = match writer.flushed_row_groups() {
        [group] => group.columns().to_vec(),
        groups => return Err(Error::new(Kind::Internal, format!("{} row groups instead of one", groups.len()))),
    };
    let file = writer.into_inner().map_err(internal)?;
    if columns.len() != leaves.len() {
        return Err(Error::new(Kind::Internal, format!("{} encoded columns, not {}", columns.len(), leaves.len())));
    }
    let chunks = columns.into_iter().zip(leaves).map(|(column, leaf)| {
        let (start, len) = column.byte_range();
        let bytes = start.checked_add(len).and_then(|end| file.get(start as usize..end as usize));
        let bytes = bytes.ok_or_else(|| Error::new(Kind::Internal, "an encoded column outside its file"))?;
        let start = signed(start)?;
        let mut metadata = parquet::file::metadata::ColumnChunkMetaData::builder(leaf.clone())
            .set_encodings_mask(*column.encodings_mask())
            .set_num_values(column.num_values())
            .set_total_compressed_size(column.compressed_size())
            .set_total_uncompressed_size(column.uncompressed_size())
            .set_data_page_offset(column.data_page_offset() - start)
            .set_dictionary_page_offset(column.dictionary_page_offset().map(|offset| offset - start));
        if let Some(statistics) = column.statistics() {
            metadata = metadata.set_statistics(statistics.clone());
        }
        Ok(Chunk { spans: vec![Span::literal(bytes)], metadata: metadata.build().map_err(internal)? })
    });
    chunks.collect()
}

/// The crate's errors about values are about the data: layouts were checked before.
fn encoding(error: ParquetError) -> Error {
    Error::malformed("encoding as Parquet").with_source(error)
}

/// Dictionaries stay dictionaries; other values are plain, which every reader takes fastest.
fn has_dictionary(data_type: &DataType) -> bool {
    match data_type {
        DataType::Dictionary(..) => true,
        DataType::List(child)
        | DataType::LargeList(child)
        | DataType::ListView(child)
        | DataType::LargeListView(child)
        | DataType::FixedSizeList(child, _)
        | DataType::Map(child, _) => has_dictionary(child.data_type()),
        DataType::Struct(fields) => fields.iter().any(|field| has_dictionary(field.data_type())),
        _ => false,
    }
}
