//! Parquet files: columns are decoded while their blobs are made, so that memory holds a piece of a column at a time.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Float64Type};
use arrow_array::{Array, ArrayRef, ArrowPrimitiveType, Int64Array, PrimitiveArray, RecordBatch};
use arrow_data::ArrayData;
use arrow_schema::{DataType, Field as ArrowField, Fields, Schema, SchemaRef};
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::errors::ParquetError;
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaData};
use parquet::file::reader::{ChunkReader, Length};

use super::column::Column;
use super::datetimes::NOT_A_TIME;
use super::ipc::arrow;
use super::join::buffer_bytes;
use super::parquet_times::Times;
use super::plan::{Draft, Field, Part, PlannedObject};
use super::table::Batches;
use super::{Staged, decode, native, parquet_claims, parquet_times, parquet_types, table};
use crate::cgroup;
use crate::error::{Context, Error, Kind, Result};
use crate::vineyard::ObjectId;

/// Encoded bytes of a column that are decoded at a time, about.
const PIECE: u64 = 64 << 20;
/// Most rows of a piece; readers that work in parallel want no longer batches.
const MAX_ROWS: u64 = 1 << 20;
/// Most bytes of a frame that is decoded as a whole: a vineyard `DataFrame` has each column in one piece, whose size is
/// not known before.
const MAX_COLLECTED: i64 = 256 << 20;
/// Most threads: each may hold a page.
const MAX_THREADS: usize = 4;

/// Bytes of a view.
const VIEW: i64 = 16;

/// A Parquet file whose footer was read.
#[derive(Debug)]
pub(super) struct Decode {
    metadata: ArrowReaderMetadata,
    schema: SchemaRef,
    file: File,
    /// Rows of the pieces: of which row group, and how many.
    partitions: Vec<(usize, u64)>,
    /// Most memory that a page takes.
    page: u64,
    /// Most bytes that all columns may take.
    budget: u64,
    /// What the columns cannot say of the file.
    warnings: Vec<String>,
}

/// The file as the parquet crate reads it: by position, from any thread.
pub(super) struct At {
    file: File,
    len: u64,
}

impl At {
    /// The whole file.
    pub(super) fn of(file: &File) -> Result<At> {
        Ok(At { file: file.try_clone()?, len: file.metadata()?.len() })
    }
}

pub(super) struct From {
    file: File,
    position: u64,
}

impl Read for From {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.read_at(out, self.position)?;
        self.position += n as u64;
        Ok(n)
    }
}

impl Length for At {
    fn len(&self) -> u64 {
        self.len
    }
}

impl ChunkReader for At {
    type T = std::io::BufReader<From>;

    fn get_read(&self, start: u64) -> std::result::Result<Self::T, ParquetError> {
        Ok(std::io::BufReader::new(From { file: self.file.try_clone()?, position: start }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> std::result::Result<Bytes, ParquetError> {
        if start.checked_add(length as u64).is_none_or(|end| end > self.len) {
            return Err(ParquetError::EOF(format!("{length} bytes at {start} of {}", self.len)));
        }
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, start)?;
        Ok(bytes.into())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn broken(error: ParquetError) -> Error {
    Error::malformed("not a valid Parquet file").with_source(error)
}

impl Decode {
    /// Reads the footer.
    ///
    /// # Errors
    /// `Malformed` if it is broken, or has columns that have no Arrow type here.
    pub(super) fn open(staged: &Staged<'_>, budget: u64) -> Result<Decode> {
        let size = staged.bytes.len() as u64;
        let file = staged.file.try_clone()?;
        let at = At { file: file.try_clone()?, len: size };
        parquet_claims::check_schema(staged.bytes)?;
        decode::guarded(|| {
            let options = || ArrowReaderOptions::new().with_page_index_policy(PageIndexPolicy::Skip);
            let mut metadata = ArrowReaderMetadata::load(&at, options()).map_err(broken)?;
            let page = parquet_claims::largest_page(staged.bytes, metadata.metadata())?;
            let partitions = partitions(metadata.metadata(), size)?;
            let said = parquet_types::said_schema(&metadata);
            let times = match said {
                Some(_) => Times::default(),
                None => parquet_times::look(&file, metadata.metadata(), page, budget)?,
            };
            let read = parquet_types::stored(&metadata, said.as_ref(), times.units);
            let schema = Arc::new(Schema::new_with_metadata(read, metadata.schema().metadata().clone()));
            if said.is_none()
                && let Some(plain) = parquet_types::without_intervals(metadata.parquet_schema())?
            {
                let options = options().with_parquet_schema(Arc::new(plain));
                metadata = ArrowReaderMetadata::load(&at, options).map_err(broken)?;
            }
            let viewed: Vec<ArrowField> = schema
                .fields()
                .iter()
                .map(|f| f.as_ref().clone().with_data_type(parquet_types::viewed(f.data_type())))
                .collect();
            let viewed = Arc::new(Schema::new_with_metadata(viewed, schema.metadata().clone()));
            let metadata = ArrowReaderMetadata::try_new(metadata.metadata().clone(), options().with_schema(viewed))
                .map_err(broken)?;
            Ok(Decode { metadata, schema, file, partitions, page, budget, warnings: times.warnings })
        })
    }

    /// What the columns cannot say of the file.
    pub(super) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Number of arrays that a batch of it has, nested ones included.
    pub(super) fn arrays(&self) -> usize {
        self.schema.flattened_fields().len()
    }

    /// Number of rows.
    pub(super) fn rows(&self) -> u64 {
        self.partitions.iter().map(|(_, rows)| rows).sum()
    }

    /// Bytes of all columns, about: of those of fixed width as they will be, of others encoded.
    pub(super) fn size(&self) -> u64 {
        let sizes = (0..self.schema.fields().len())
            .flat_map(|column| self.partitions.iter().map(move |(group, rows)| self.piece_size(column, *group, *rows)));
        sizes.fold(0, u64::saturating_add)
    }

    /// Decodes all columns with several threads, and passes each piece on with the numbers of its partition and column.
    fn each(&self, keep: &(dyn Fn(usize, usize, Column) -> Result<()> + Sync)) -> Result<()> {
        let spent = AtomicU64::new(0);
        spread(&self.units(), |unit| {
            let keep = |partition: usize, column: Column| {
                let size = column.size();
                if spent.fetch_add(size, Ordering::Relaxed).saturating_add(size) > self.budget {
                    return Err(Error::malformed("columns that decode to more than the store holds"));
                }
                keep(partition, unit.column, column)
            };
            let name = || format!("column {:?}", self.schema.field(unit.column).name());
            self.unit(unit, &keep).context(name)
        })
    }

    /// All columns in memory, for a file of a pandas frame that is small enough; `None` for others.
    pub(super) fn collect(&self) -> Result<Option<Batches>> {
        let size: i64 = self.metadata.metadata().row_groups().iter().map(|g| g.total_byte_size().max(0)).sum();
        if size > MAX_COLLECTED || !super::frame::may_be(&self.schema, self.rows()) {
            return Ok(None);
        }
        let columns = self.schema.fields().len();
        let made: Mutex<Vec<Vec<Option<Column>>>> = Mutex::new(vec![vec![None; columns]; self.partitions.len()]);
        let total = AtomicU64::new(0);
        let too_much = || Error::new(Kind::TooLarge, "a frame that is too large to hold");
        let keep = |partition: usize, number: usize, column: Column| {
            if total.fetch_add(column.size(), Ordering::Relaxed) > 4 * MAX_COLLECTED as u64 {
                return Err(too_much());
            }
            let mut made = lock(&made);
            let slot = made.get_mut(partition).and_then(|p| p.get_mut(number));
            *slot.ok_or_else(too_much)? = Some(column);
            Ok(())
        };
        match self.each(&keep) {
            Err(error) if error.kind() == Kind::TooLarge => return Ok(None),
            other => other?,
        }
        let made = std::mem::take(&mut *lock(&made));
        let batches = self.partitions.iter().zip(made).map(|((_, rows), columns)| {
            let columns: Option<Vec<Column>> = columns.into_iter().collect();
            columns.map(|columns| (*rows, columns)).ok_or_else(|| Error::malformed("columns of different lengths"))
        });
        Ok(Some(Batches { schema: self.schema.clone(), batches: batches.collect::<Result<_>>()?, exact: false }))
    }

    /// Decodes all columns, and passes each piece to `add`, which makes its blobs and objects and returns the ids of
    /// those. Returns the objects of the table, the last of which is `root` with its partitions.
    pub(super) fn run(
        &self,
        root: &PlannedObject,
        add: &(dyn Fn(&Draft) -> Result<Vec<ObjectId>> + Sync),
    ) -> Result<Vec<PlannedObject>> {
        let columns = self.schema.fields().len();
        let made: Mutex<Vec<Vec<Option<Field>>>> = Mutex::new(vec![vec![None; columns]; self.partitions.len()]);
        // The objects of dictionaries by their columns: all partitions of a column share one.
        let dictionaries: Mutex<HashMap<usize, Field>> = Mutex::default();
        let store = |number: usize, column: &Column| {
            let mut draft = Draft::default();
            let known = lock(&dictionaries).get(&number).cloned();
            if let (Some(values), Some(known)) = (&column.dictionary, known) {
                draft.share(values, known);
            }
            native::array(&mut draft, column)?;
            let made = add(&draft)?;
            if let Some(Field::Object(index)) = column.dictionary.as_ref().and_then(|values| draft.field_of(values))
                && let Some(id) = made.get(*index)
            {
                lock(&dictionaries).insert(number, Field::Existing(*id));
            }
            Ok(made.last().copied().map(Field::Existing))
        };
        // Types that the columns turned out to have, where they are others than the file names.
        let types: Mutex<HashMap<usize, DataType>> = Mutex::default();
        self.each(&|partition, number, column| {
            let field = store(number, &column)?;
            if column.data_type != *self.schema.field(number).data_type() {
                lock(&types).insert(number, column.data_type.clone());
            }
            if let Some(slot) = lock(&made).get_mut(partition).and_then(|p| p.get_mut(number)) {
                *slot = field;
            }
            Ok(())
        })?;
        let mut partitions = Vec::with_capacity(self.partitions.len());
        for ((_, rows), columns) in self.partitions.iter().zip(std::mem::take(&mut *lock(&made))) {
            let columns: Option<Vec<Field>> = columns.into_iter().collect();
            partitions.push((*rows, columns.ok_or_else(|| Error::malformed("columns of different lengths"))?));
        }
        if partitions.is_empty() {
            // A table has at least one partition: see `table`.
            let empty = |(i, field): (usize, &Arc<ArrowField>)| store(i, &Column::empty(field.data_type()));
            let columns = self.schema.fields().iter().enumerate().map(empty);
            partitions.push((0, columns.collect::<Result<Option<_>>>()?.unwrap_or_default()));
        }
        let types = std::mem::take(&mut *lock(&types));
        let fields = self.schema.fields().iter().enumerate().map(|(i, field)| match types.get(&i) {
            Some(data_type) => Arc::new(field.as_ref().clone().with_data_type(data_type.clone())),
            None => field.clone(),
        });
        let schema = Schema::new_with_metadata(fields.collect::<Fields>(), self.schema.metadata().clone());
        self.finish(root, &schema, partitions)
    }

    /// The objects above the columns, members first.
    fn finish(
        &self,
        root: &PlannedObject,
        true_schema: &Schema,
        partitions: Vec<(u64, Vec<Field>)>,
    ) -> Result<Vec<PlannedObject>> {
        let mut draft = Draft::default();
        let schema = table::schema_proxy(&mut draft, &native::stored_schema(true_schema))?;
        let partitions = partitions
            .into_iter()
            .map(|(rows, columns)| table::record_batch_of(&mut draft, &schema, rows, 0, columns))
            .collect();
        let mut fields = table::root(true_schema, schema, self.rows(), partitions)?;
        fields.extend(root.fields.iter().cloned());
        draft.object(root.typename.clone(), fields);
        Ok(draft.objects)
    }

    /// What one thread does at a time: a column of a row group, or a whole column that has one dictionary.
    fn units(&self) -> Vec<Unit> {
        let mut units = Vec::new();
        for (column, field) in self.schema.fields().iter().enumerate() {
            if matches!(field.data_type(), DataType::Dictionary(..)) {
                units.push(Unit { column, partitions: 0..self.partitions.len() });
                continue;
            }
            let mut start = 0;
            for chunk in self.partitions.chunk_by(|a, b| a.0 == b.0) {
                units.push(Unit { column, partitions: start..start + chunk.len() });
                start += chunk.len();
            }
        }
        units
    }

    fn unit(&self, unit: &Unit, keep: &dyn Fn(usize, Column) -> Result<()>) -> Result<()> {
        let field = self.schema.field(unit.column);
        let mut arrays = Vec::new();
        let mut next = unit.partitions.start;
        for chunk in self.partitions[unit.partitions.clone()].chunk_by(|a, b| a.0 == b.0) {
            let mut batches = self.reader(unit.column, chunk)?;
            for (group, rows) in chunk {
                // As an array, as it grows, and as the bytes of a message. Other threads hold a page, too.
                let size = self.piece_size(unit.column, *group, *rows).saturating_mul(3);
                let pages = self.page.saturating_mul(threads(MAX_THREADS) as u64);
                cgroup::room_for(size.saturating_add(pages)).context(|| "memory for decoding".into())?;
                let array = batches.next().ok_or_else(|| Error::malformed("a row group ends early"))?;
                let array = array.map_err(arrow)?.columns().first().cloned();
                let array = array.filter(|a| a.len() as u64 == *rows);
                let array = array.ok_or_else(|| Error::malformed("a row group with another number of rows"))?;
                let array = parquet_types::expand(array, field.data_type(), self.budget)?;
                if matches!(field.data_type(), DataType::Dictionary(..)) {
                    arrays.push(array);
                } else {
                    keep(next, column(array, field)?)?;
                }
                next += 1;
            }
        }
        if arrays.is_empty() {
            return Ok(());
        }
        // One dictionary for all batches, as everywhere else.
        let joined = decode::join_dictionaries(&arrays)?;
        drop(arrays);
        let whole = column(joined, field)?;
        let mut start = 0;
        for (i, (_, rows)) in self.partitions.iter().enumerate() {
            keep(i, slice_keys(&whole, start, *rows)?)?;
            start += rows;
        }
        Ok(())
    }

    /// About how many bytes so many rows of a column of a row group take when they are decoded.
    fn piece_size(&self, column: usize, group: usize, rows: u64) -> u64 {
        let field = self.schema.field(column);
        if let Some(width) = field.data_type().primitive_width() {
            return rows.saturating_mul(width as u64);
        }
        let Some(group) = self.metadata.metadata().row_groups().get(group) else { return 0 };
        let leaves = self.metadata.parquet_schema();
        let of_column = (0..group.num_columns()).filter(|&leaf| leaves.get_column_root_idx(leaf) == column);
        // A view of each value, or its levels, which may be many for a few bytes.
        let size = |leaf| {
            let column = group.column(leaf);
            column.uncompressed_size().saturating_add(column.num_values().saturating_mul(VIEW))
        };
        let whole = u64::try_from(of_column.map(size).fold(0, i64::saturating_add)).unwrap_or(0);
        let all = u64::try_from(group.num_rows()).unwrap_or(0).max(1);
        (u128::from(whole) * u128::from(rows.min(all)) / u128::from(all)) as u64
    }

    /// A column of a row group, in the pieces of `chunk`.
    fn reader(&self, column: usize, chunk: &[(usize, u64)]) -> Result<ParquetRecordBatchReader> {
        let (group, rows) = chunk.first().copied().unwrap_or((0, 1));
        ParquetRecordBatchReaderBuilder::new_with_metadata(At::of(&self.file)?, self.metadata.clone())
            .with_row_groups(vec![group])
            .with_projection(ProjectionMask::roots(self.metadata.parquet_schema(), [column]))
            .with_batch_size(rows as usize)
            .build()
            .map_err(broken)
    }
}

/// The rows of each row group in pieces, in a file of `size` bytes.
fn partitions(metadata: &ParquetMetaData, size: u64) -> Result<Vec<(usize, u64)>> {
    let mut partitions = Vec::new();
    let mut total = 0u64;
    for (i, group) in metadata.row_groups().iter().enumerate() {
        let rows = u64::try_from(group.num_rows()).map_err(|_| Error::malformed("a negative number of rows"))?;
        let widest = group.columns().iter().map(|c| c.uncompressed_size().max(0) as u64).max().unwrap_or(0);
        let step = (PIECE.saturating_mul(rows) / widest.max(1)).clamp(1 << 13, MAX_ROWS);
        total = total.saturating_add(rows);
        // Each piece becomes an object for each column; a file that announces more than it can hold stops here.
        if rows / step > size {
            return Err(Error::malformed(format!("{rows} rows in a file of {size} bytes")));
        }
        partitions.extend((0..rows).step_by(step as usize).map(|start| (i, step.min(rows - start))));
    }
    let said = metadata.file_metadata().num_rows();
    if u64::try_from(said) != Ok(total) {
        return Err(Error::malformed(format!("{total} rows in row groups, {said} in the footer")));
    }
    Ok(partitions)
}

/// How many threads work at `units` things.
pub(super) fn threads(units: usize) -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_THREADS).min(units)
}

/// Works at all units with several threads; the first error ends it.
pub(super) fn spread<T: Sync>(units: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let error = Mutex::new(None);
    let work = || {
        while !failed.load(Ordering::Relaxed) {
            let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            if let Err(e) = decode::guarded(|| work(unit)) {
                failed.store(true, Ordering::Relaxed);
                lock(&error).get_or_insert(e);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads(units.len()) {
            let _ = std::thread::Builder::new().name("decode".into()).spawn_scoped(scope, work);
        }
        work();
    });
    match lock(&error).take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// A column of consecutive partitions.
struct Unit {
    column: usize,
    partitions: std::ops::Range<usize>,
}

fn column(array: ArrayRef, field: &ArrowField) -> Result<Column> {
    let array = nan_under_nulls(array);
    let field = field.clone().with_nullable(true).with_data_type(array.data_type().clone());
    let batch = RecordBatch::try_new(Arc::new(Schema::new(vec![field])), vec![array]).map_err(arrow)?;
    decode::columns(&batch)?.pop().ok_or_else(|| Error::new(Kind::Internal, "a batch without its column"))
}

/// Floats with NaN, and times with NaT, in the places of nulls, as pandas has them; the parquet crate leaves zeros there.
fn nan_under_nulls(array: ArrayRef) -> ArrayRef {
    fn fill<T: ArrowPrimitiveType>(array: &PrimitiveArray<T>, nan: T::Native) -> ArrayRef {
        let values = (0..array.len()).map(|i| if array.is_null(i) { nan } else { array.value(i) });
        let values = arrow_buffer::ScalarBuffer::from_iter(values);
        Arc::new(PrimitiveArray::<T>::new(values, array.nulls().cloned()))
    }
    if array.null_count() == 0 {
        return array;
    }
    if let Some(floats) = array.as_primitive_opt::<Float64Type>() {
        return fill(floats, f64::NAN);
    }
    if let Some(floats) = array.as_primitive_opt::<Float32Type>() {
        return fill(floats, f32::NAN);
    }
    if matches!(array.data_type(), DataType::Timestamp(..)) {
        let times = |data: ArrayData| data.into_builder().data_type(DataType::Int64).build();
        let filled = times(array.to_data()).map(|data| fill(&Int64Array::from(data), NOT_A_TIME).to_data());
        let filled = filled.and_then(|data| data.into_builder().data_type(array.data_type().clone()).build());
        return filled.map_or(array, arrow_array::make_array);
    }
    array
}

/// Elements `start..start + rows` of a dictionary column.
fn slice_keys(whole: &Column, start: u64, rows: u64) -> Result<Column> {
    let keys: u64 = whole.buffer(1).iter().map(Part::len).sum();
    let width = keys.checked_div(whole.len).unwrap_or(0);
    let mut buffers = vec![Vec::new(), Vec::new()];
    let mut nulls = 0;
    if whole.null_count > 0 {
        let bitmap = buffer_bytes(&whole.buffer(0), &[])?;
        let mut bits = arrow_buffer::BooleanBufferBuilder::new(rows as usize);
        bits.append_packed_range(start as usize..(start + rows) as usize, &bitmap);
        let bits = bits.finish();
        nulls = (bits.len() - bits.count_set_bits()) as u64;
        if nulls > 0 {
            buffers[0] = vec![Part::Owned(bits.into_inner())];
        }
    }
    for part in whole.buffer(1) {
        buffers[1].push(part.slice(start * width..(start + rows) * width)?);
    }
    Ok(Column { len: rows, null_count: nulls, buffers, ..whole.clone() })
}
