//! Column chunks: how each column is written, and by how many threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use arrow_schema::{DataType, Field, Schema};
use parquet::basic::{Encoding, Type};
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::statistics::Statistics;
use parquet::schema::types::{ColumnDescPtr, SchemaDescriptor};

use super::encode::{self, Slot};
use super::group::{Group, Piece};
use super::{Layout, delta, dictionary, internal, page, runs, signed};
use crate::dataset::{ArrayLayout, Span, Table};
use crate::error::{Context, Error, Kind, Result};
use crate::image::arrow::{Counts, buffers, has_validity, width};
use crate::vineyard::BlobSource;

/// Most threads that encode one table.
const MAX_THREADS: usize = 4;

/// One leaf column of one row group.
pub struct Chunk {
    /// Its pages.
    pub spans: Vec<Span>,
    /// Its entry in the footer, with offsets from the start of the chunk.
    pub metadata: ColumnChunkMetaData,
}

/// How a column is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// Pages are slices of the values, of so many bytes each.
    Fixed(u64),
    /// Pages are slices of packed bits.
    Bits,
    /// Pages are encoded lengths and slices of the bytes; offsets have so many bytes each.
    Bytes(u64),
    /// Keys are encoded, under the dictionary as it is.
    Dictionary,
    /// Pages are made by the `parquet` crate.
    Encoded,
}

/// How one column is written, and where it is in the Parquet schema.
#[derive(Clone, Debug)]
pub struct Plan {
    how: How,
    leaves: Range<usize>,
}

impl Plan {
    /// The plans of a table's columns. They depend on metadata alone, so that a file's layout does.
    pub fn of_table(table: &Table, stored: &Schema, descriptor: &SchemaDescriptor) -> Vec<Plan> {
        let mut leaf = 0;
        let columns = table.schema.fields().iter().zip(stored.fields()).enumerate();
        columns
            .map(|(i, (field, stored))| {
                let start = leaf;
                while leaf < descriptor.num_columns() && descriptor.get_column_root_idx(leaf) == i {
                    leaf += 1;
                }
                let unchanged = field.data_type() == stored.data_type();
                let arrays = || table.batches.iter().filter_map(|batch| batch.columns.get(i));
                let how = if !unchanged || leaf != start + 1 {
                    How::Encoded
                } else if matches!(field.data_type(), DataType::Dictionary(..)) {
                    if one_dictionary(arrays()) { How::Dictionary } else { How::Encoded }
                } else if arrays().any(may_have_nulls) {
                    How::Encoded
                } else {
                    let column = descriptor.column(start);
                    how(field, column.physical_type(), column.type_length())
                };
                Plan { how, leaves: start..leaf }
            })
            .collect()
    }

    /// True if the pages depend on the data and not on metadata alone.
    pub fn needs_data(&self) -> bool {
        matches!(self.how, How::Bytes(_) | How::Dictionary | How::Encoded)
    }
}

/// True unless metadata says that there are no nulls.
fn may_have_nulls(array: &ArrayLayout) -> bool {
    let bitmap = has_validity(&array.data_type) && array.buffers.first().is_some_and(|bitmap| !bitmap.is_empty());
    array.data_type == DataType::Null || (array.null_count != Some(0) && (bitmap || array.null_count.is_some()))
}

/// True if arrays have one dictionary, which can be written as it is.
fn one_dictionary<'a>(mut arrays: impl Iterator<Item = &'a ArrayLayout>) -> bool {
    let Some(first) = arrays.next().and_then(|array| array.dictionary.as_ref()) else { return false };
    let is_first = |other: &Arc<ArrayLayout>| Arc::ptr_eq(first, other) || first.is_same(other);
    dictionary::fits(first) && arrays.all(|array| array.dictionary.as_ref().is_some_and(is_first))
}

/// How a column without nulls is written: as it is if its values have the same bytes in both formats.
fn how(field: &Field, physical: Type, length: i32) -> How {
    let arrow = width(field.data_type());
    match field.data_type() {
        DataType::Boolean => How::Bits,
        DataType::Utf8 | DataType::Binary => How::Bytes(4),
        DataType::LargeUtf8 | DataType::LargeBinary => How::Bytes(8),
        // Big-endian in Parquet, unless they are small.
        DataType::Decimal128(..) | DataType::Decimal256(..) => How::Encoded,
        _ => {
            let parquet = match physical {
                Type::INT32 | Type::FLOAT => Some(4),
                Type::INT64 | Type::DOUBLE => Some(8),
                Type::FIXED_LEN_BYTE_ARRAY => u64::try_from(length).ok(),
                _ => None,
            };
            match (arrow, parquet) {
                (Some(arrow), Some(parquet)) if arrow == parquet => How::Fixed(arrow),
                _ => How::Encoded,
            }
        }
    }
}

/// The chunks of a file: for each row group, for each leaf.
///
/// # Errors
/// See [`super::image`].
pub fn chunks(table: &Table, layout: &Layout, groups: &[Group], counts: Counts<'_>) -> Result<Vec<Vec<Chunk>>> {
    let writer = Writer::new(table, layout, groups, counts);
    let columns = layout.plans.len();
    // A job is one column of one row group; the jobs of a column follow each other, so that it is in memory once.
    let jobs = columns * groups.len();
    let results: Vec<OnceLock<Vec<Chunk>>> = (0..jobs).map(|_| OnceLock::new()).collect();
    let next = AtomicUsize::new(0);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let work = || {
        loop {
            let job = next.fetch_add(1, Ordering::Relaxed);
            let Some(result) = results.get(job) else { return };
            let (column, group) = (job / groups.len(), job % groups.len());
            match writer.column(column, group) {
                Ok(chunks) => drop(result.set(chunks)),
                Err(error) => {
                    next.store(jobs, Ordering::Relaxed);
                    if let Ok(mut failure) = failure.lock() {
                        failure.get_or_insert(error);
                    }
                }
            }
        }
    };
    let threads = match layout.plans.iter().any(Plan::needs_data) {
        true => std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS).min(jobs),
        false => 1,
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // One thread that cannot be started leaves its share to the others.
            let _ = std::thread::Builder::new().name("parquet".into()).spawn_scoped(scope, work);
        }
        work();
    });
    if let Ok(Some(error)) = failure.into_inner() {
        return Err(error);
    }
    let mut by_group: Vec<Vec<Chunk>> = groups.iter().map(|_| Vec::with_capacity(columns)).collect();
    for (job, result) in results.into_iter().enumerate() {
        let chunks = result.into_inner().ok_or_else(|| Error::new(Kind::Internal, "a column was not written"))?;
        by_group[job % groups.len()].extend(chunks);
    }
    Ok(by_group)
}

struct Writer<'a> {
    table: &'a Table,
    layout: &'a Layout,
    groups: &'a [Group],
    counts: Counts<'a>,
    /// For each encoded column, its slot in each batch.
    slots: Vec<Vec<Slot>>,
}

impl<'a> Writer<'a> {
    fn new(table: &'a Table, layout: &'a Layout, groups: &'a [Group], counts: Counts<'a>) -> Self {
        let mut pieces = vec![0; table.batches.len()];
        groups.iter().flat_map(|group| &group.pieces).for_each(|piece| pieces[piece.batch] += 1);
        let slots = layout.plans.iter().map(|plan| match plan.how {
            How::Encoded | How::Dictionary => pieces.iter().map(|count| Slot::new(*count)).collect(),
            _ => Vec::new(),
        });
        Writer { table, layout, groups, counts, slots: slots.collect() }
    }

    fn source(&self) -> Result<&'a dyn BlobSource> {
        match self.counts {
            Counts::From(source) => Ok(source),
            Counts::Skip => Err(Error::new(Kind::Unsupported, "the Parquet view depends on the data")),
        }
    }

    /// The chunks of one column in one group.
    fn column(&self, column: usize, group: usize) -> Result<Vec<Chunk>> {
        let field = &self.layout.stored.fields()[column];
        // The `parquet` crate panics on some combinations of types; one view must not take the others with it.
        let chunks = || self.chunks(column, &self.groups[group]);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(chunks))
            .unwrap_or_else(|_| Err(Error::new(Kind::Internal, "encoding it as Parquet panicked")))
            .context(|| format!("column {:?}", field.name()))
    }

    fn chunks(&self, column: usize, group: &Group) -> Result<Vec<Chunk>> {
        let plan = &self.layout.plans[column];
        let descriptor = |leaf: usize| self.layout.descriptor.column(leaf);
        let field = &self.layout.stored.fields()[column];
        let take = |piece: &Piece| {
            let array = &self.table.batches[piece.batch].columns[column];
            self.slots[column][piece.batch].take(array, field.data_type(), piece, self.source()?)
        };
        let leaves = || plan.leaves.clone().map(descriptor).collect::<Vec<ColumnDescPtr>>();
        match plan.how {
            How::Encoded => {
                let repeats = runs::has_runs(self.table.schema.field(column).data_type());
                return encode::column(field, &leaves(), repeats, group.pieces.iter().map(take));
            }
            How::Dictionary => {
                let arrays = group.pieces.iter().map(take).collect::<Result<Vec<_>>>()?;
                return match dictionary::chunk(Pages::new(descriptor(plan.leaves.start)), &arrays)? {
                    Some(chunk) => Ok(vec![chunk]),
                    None => encode::column(field, &leaves(), false, arrays.into_iter().map(Ok)),
                };
            }
            _ => {}
        }
        let mut pages = Pages::new(descriptor(plan.leaves.start));
        for piece in &group.pieces {
            let spans = buffers(&self.table.batches[piece.batch].columns[column])?;
            match (&plan.how, spans.as_slice()) {
                (How::Fixed(width), [_, values]) => fixed(&mut pages, values, *width, piece)?,
                (How::Bits, [_, values]) => bits(&mut pages, values, piece)?,
                (How::Bytes(width), [_, offsets, data]) => {
                    bytes(&mut pages, offsets, data, *width, piece, self.source()?)?;
                }
                _ => return Err(Error::new(Kind::Internal, "a column without its buffers")),
            }
        }
        Ok(vec![pages.finish()?])
    }
}

/// The pages of a chunk so far.
pub struct Pages {
    column: ColumnDescPtr,
    spans: Vec<Span>,
    bytes: u64,
    values: u64,
    nulls: u64,
    encoding: Encoding,
    /// Bytes of the dictionary page, which comes first if there is one.
    dictionary: Option<u64>,
}

impl Pages {
    /// No pages yet.
    pub fn new(column: ColumnDescPtr) -> Self {
        let encoding = Encoding::PLAIN;
        Pages { column, spans: Vec::new(), bytes: 0, values: 0, nulls: 0, encoding, dictionary: None }
    }

    /// True if values may be null: pages have definition levels.
    pub fn optional(&self) -> bool {
        self.column.max_def_level() > 0
    }

    /// Appends a page without nulls: encoded bytes, then a slice of data.
    pub fn push(&mut self, values: u64, encoding: Encoding, encoded: &[u8], data: Span) -> Result<()> {
        let levels = if self.optional() { page::levels(values) } else { Vec::new() };
        let body = (levels.len() + encoded.len()) as u64 + data.len();
        self.encoding = encoding;
        self.values += values;
        self.append(page::header(values, body, encoding)?, &[&levels, encoded], data);
        Ok(())
    }

    /// Puts the dictionary page in front: so many values in plain encoding.
    pub fn dictionary(&mut self, values: u64, plain: &[u8]) -> Result<()> {
        self.append(page::dictionary_header(values, plain.len() as u64)?, &[plain], Span::EMPTY);
        self.dictionary = Some(self.bytes);
        Ok(())
    }

    /// Appends a page of keys, levels included.
    pub fn keys(&mut self, values: u64, nulls: u64, body: &[u8]) -> Result<()> {
        self.encoding = Encoding::RLE_DICTIONARY;
        self.values += values;
        self.nulls += nulls;
        self.append(page::header(values, body.len() as u64, self.encoding)?, &[body], Span::EMPTY);
        Ok(())
    }

    fn append(&mut self, mut head: Vec<u8>, parts: &[&[u8]], data: Span) {
        parts.iter().for_each(|part| head.extend_from_slice(part));
        self.bytes += head.len() as u64 + data.len();
        self.spans.push(Span::literal(head));
        self.spans.push(data);
    }

    /// The chunk.
    pub fn finish(self) -> Result<Chunk> {
        let bytes = signed(self.bytes)?;
        let nulls = Some(self.nulls);
        let statistics = match self.column.physical_type() {
            Type::BOOLEAN => Statistics::boolean(None, None, None, nulls, false),
            Type::INT32 => Statistics::int32(None, None, None, nulls, false),
            Type::INT64 => Statistics::int64(None, None, None, nulls, false),
            Type::FLOAT => Statistics::float(None, None, None, nulls, false),
            Type::DOUBLE => Statistics::double(None, None, None, nulls, false),
            Type::BYTE_ARRAY => Statistics::byte_array(None, None, None, nulls, false),
            _ => Statistics::fixed_len_byte_array(None, None, None, nulls, false),
        };
        let mut encodings = vec![self.encoding, Encoding::RLE];
        if self.dictionary.is_some() {
            encodings.push(Encoding::PLAIN);
        }
        let metadata = ColumnChunkMetaData::builder(self.column)
            .set_encodings(encodings)
            .set_num_values(signed(self.values)?)
            .set_total_compressed_size(bytes)
            .set_total_uncompressed_size(bytes)
            .set_dictionary_page_offset(self.dictionary.map(|_| 0))
            .set_data_page_offset(signed(self.dictionary.unwrap_or(0))?)
            .set_statistics(statistics)
            .build()
            .map_err(internal)?;
        Ok(Chunk { spans: self.spans, metadata })
    }
}

fn fixed(pages: &mut Pages, values: &Span, width: u64, piece: &Piece) -> Result<()> {
    let most = (page::MAX_BYTES / width.max(1)).max(1);
    let mut start = piece.start;
    let end = piece.start + piece.rows;
    while start < end {
        let rows = most.min(end - start);
        // Inside the buffer, which was checked to hold the whole batch.
        pages.push(rows, Encoding::PLAIN, &[], values.slice(start * width, rows * width)?)?;
        start += rows;
    }
    Ok(())
}

fn bits(pages: &mut Pages, values: &Span, piece: &Piece) -> Result<()> {
    pages.push(piece.rows, Encoding::PLAIN, &[], values.slice(piece.start / 8, piece.rows.div_ceil(8))?)
}

fn bytes(
    pages: &mut Pages,
    offsets: &Span,
    data: &Span,
    width: u64,
    piece: &Piece,
    source: &dyn BlobSource,
) -> Result<()> {
    let offsets = offsets.slice(piece.start * width, (piece.rows + 1) * width)?;
    offsets.validate(source)?;
    let raw = offsets.to_vec(source)?;
    let offsets: Vec<u64> = if width == 4 {
        raw.as_chunks().0.iter().map(|bytes| i64::from(i32::from_le_bytes(*bytes)) as u64).collect()
    } else {
        raw.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect()
    };
    // Negative offsets are beyond every buffer when they are taken as unsigned.
    if !offsets.is_sorted() || offsets.last().is_some_and(|last| *last > data.len()) {
        return Err(Error::malformed("string offsets that go backwards or past their data"));
    }
    let mut from = 0;
    let rows = offsets.len() - 1;
    while from < rows {
        let limit = offsets[from].saturating_add(page::MAX_BYTES);
        // At least one value, however long.
        let to =
            (from + 1 + offsets[from + 1..].partition_point(|offset| *offset <= limit).saturating_sub(1)).min(rows);
        let lengths: Option<Vec<i32>> =
            offsets[from..=to].windows(2).map(|pair| i32::try_from(pair[1] - pair[0]).ok()).collect();
        let lengths = lengths.ok_or_else(|| Error::new(Kind::TooLarge, "a value of more than 2 GiB"))?;
        let mut encoded = Vec::with_capacity(lengths.len());
        delta::encode(&lengths, &mut encoded);
        let data = data.slice(offsets[from], offsets[to] - offsets[from])?;
        pages.push((to - from) as u64, Encoding::DELTA_LENGTH_BYTE_ARRAY, &encoded, data)?;
        from = to;
    }
    Ok(())
}
