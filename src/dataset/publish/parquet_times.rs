//! Units of Parquet's times of 96 bits (Impala's, Hive's, Spark's), which name none.
//!
//! Such a time is a Julian day and the nanoseconds of the day. Readers take nanoseconds since 1970, as pyarrow does, which
//! reach from 1677 to 2262 only; microseconds reach all years that these writers have. Which of both a column needs is told
//! by its values alone: `src/main/thrift/parquet.thrift` gave the bounds in statistics of such columns no order for long,
//! and writers put anything there.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arrow_schema::TimeUnit;
use parquet::basic::Type as Physical;
use parquet::column::reader::{get_column_reader, get_typed_column_reader};
use parquet::data_type::{Int96, Int96Type};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};
use parquet::file::serialized_reader::SerializedPageReader;

use super::parquet_file::{At, broken, spread, threads};
use crate::cgroup;
use crate::error::{Context, Error, Result};

/// Rows that are looked at in one step.
const STEP: u64 = 1 << 13;
/// Bytes that a value takes with its levels while it is looked at.
const VALUE: u64 = 16;
/// 1970-01-01 as a Julian day.
const EPOCH: i128 = 2_440_588;
/// Nanoseconds of a day.
const DAY: i128 = 86_400_000_000_000;

/// What the times of a file's columns become.
#[derive(Debug, Default)]
pub(super) struct Times {
    /// The unit for each leaf of the schema; `None` for one of another type.
    pub(super) units: Vec<Option<TimeUnit>>,
    /// What no unit could keep.
    pub(super) warnings: Vec<String>,
}

/// What was seen of a column's values.
#[derive(Default)]
struct Seen {
    /// One that nanoseconds do not reach.
    far: AtomicBool,
    /// One that microseconds do not tell.
    fine: AtomicBool,
}

impl Seen {
    /// True if no other value changes anything.
    fn all(&self) -> bool {
        self.far.load(Ordering::Relaxed) && self.fine.load(Ordering::Relaxed)
    }

    /// Looks at a value.
    ///
    /// # Errors
    /// `Malformed` if not even microseconds reach it.
    fn look(&self, time: &Int96) -> Result<()> {
        let &[low, high, day] = time.data() else { return Ok(()) };
        let of_day = (u64::from(high) << 32 | u64::from(low)) as i64;
        let nanos = (i128::from(day as i32) - EPOCH) * DAY + i128::from(of_day);
        if i64::try_from(nanos).is_err() {
            self.far.store(true, Ordering::Relaxed);
            i64::try_from(nanos / 1000).map_err(|_| Error::malformed("a time that microseconds do not reach"))?;
        }
        if nanos % 1000 != 0 {
            self.fine.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Looks at all values of the columns of 96 bits. `page` is the most memory that one of their pages takes, `budget` the most
/// bytes that the columns may have.
///
/// # Errors
/// `Malformed` if columns are broken, too large, or have a time that no unit reaches.
pub(super) fn look(file: &File, metadata: &ParquetMetaData, page: u64, budget: u64) -> Result<Times> {
    let leaves = metadata.file_metadata().schema_descr().columns();
    let is_time: Vec<bool> = leaves.iter().map(|leaf| leaf.physical_type() == Physical::INT96).collect();
    let seen: Vec<Seen> = leaves.iter().map(|_| Seen::default()).collect();
    let chunks = metadata.row_groups().iter().flat_map(|group| group.columns().iter().zip(&is_time).zip(&seen));
    let chunks: Vec<_> = chunks.filter_map(|((chunk, is_time), seen)| is_time.then_some((chunk, seen))).collect();
    let spent = AtomicU64::new(0);
    spread(&chunks, |(chunk, seen)| {
        let pages = page.saturating_mul(threads(chunks.len()) as u64);
        let name = || format!("column {:?}", chunk.column_path().string());
        look_at(file, chunk, seen, pages, &|size| {
            let total = spent.fetch_add(size, Ordering::Relaxed).saturating_add(size);
            (total <= budget).then_some(()).ok_or_else(|| Error::malformed("times of more bytes than the store holds"))
        })
        .context(name)
    })?;
    let mut times = Times::default();
    for ((leaf, is_time), seen) in leaves.iter().zip(is_time).zip(&seen) {
        let far = seen.far.load(Ordering::Relaxed);
        let unit = if far { TimeUnit::Microsecond } else { TimeUnit::Nanosecond };
        times.units.push(is_time.then_some(unit));
        if seen.all() {
            times.warnings.push(format!(
                "column {:?} has microseconds: nanoseconds, which some of its times have, do not reach all of them (only \
                 the years 1677 to 2262)",
                leaf.path().string()
            ));
        }
    }
    Ok(times)
}

/// Looks at the values of a chunk. `spend` gets the sizes of what they become, and says when it is too much.
fn look_at(
    file: &File,
    chunk: &ColumnChunkMetaData,
    seen: &Seen,
    pages: u64,
    spend: &dyn Fn(u64) -> Result<()>,
) -> Result<()> {
    let values = u64::try_from(chunk.num_values()).unwrap_or(0);
    let at = Arc::new(At::of(file)?);
    let reader = SerializedPageReader::new(at, chunk, values as usize, None).map_err(broken)?;
    let reader = get_column_reader(chunk.column_descr_ptr(), Box::new(reader));
    let mut reader = get_typed_column_reader::<Int96Type>(reader);
    let (mut values, mut definitions, mut repetitions) = (Vec::new(), Vec::new(), Vec::new());
    while !seen.all() {
        cgroup::room_for(pages.saturating_add(STEP * VALUE)).context(|| "memory for decoding".into())?;
        values.clear();
        definitions.clear();
        repetitions.clear();
        let read = reader.read_records(STEP as usize, Some(&mut definitions), Some(&mut repetitions), &mut values);
        let (_, _, levels) = read.map_err(broken)?;
        if levels == 0 {
            break;
        }
        // A null or the end of a list may be a bit.
        spend((values.len() as u64 * 8).max(levels as u64 / 8))?;
        values.iter().try_for_each(|time| seen.look(time))?;
    }
    Ok(())
}
