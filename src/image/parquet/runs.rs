//! Run-end encoded columns, which Parquet stores as the values that they stand for.
//!
//! A few bytes may stand for any number of rows, so that writing them out is bounded: see [`MAX_PIECE`] and [`MAX_GROWTH`],
//! and for the number of rows [`super::supports`].

use arrow_array::cast::AsArray;
use arrow_array::types::RunEndIndexType;
use arrow_array::{Array, ArrayRef, RunArray, downcast_run_array};
use arrow_buffer::ArrowNativeType;
use arrow_schema::{DataType, Field, FieldRef};

use crate::error::{Error, Kind, Result};

/// Most bytes that the values of one row group may take when they are written out: they are all in memory then.
const MAX_PIECE: u64 = 256 << 20;
/// How often the bytes of a column's values may be written out, if they are more than a dictionary holds.
const MAX_GROWTH: u64 = 64;
/// The `parquet` crate gives up a dictionary of more bytes than this (`DEFAULT_DICTIONARY_PAGE_SIZE_LIMIT`).
const DICTIONARY: u64 = 1 << 20;

/// The field whose values stand for those of a field with runs; `None` for other types, and where the values of runs are
/// nested. A run may be of nulls whatever its field says.
pub fn written_out(field: &Field) -> Option<FieldRef> {
    match field.data_type() {
        DataType::RunEndEncoded(_, values) if !values.data_type().is_nested() => {
            Some(field.clone().with_data_type(values.data_type().clone()).with_nullable(true).into())
        }
        _ => None,
    }
}

/// True for arrays with runs.
pub fn has_runs(data_type: &DataType) -> bool {
    matches!(data_type, DataType::RunEndEncoded(..))
}

/// Checks that a column's values do not take much more room than they have when they are written out.
///
/// # Errors
/// `TooLarge`.
pub fn check(array: &ArrayRef) -> Result<()> {
    let (stored, written) = sizes(array)?;
    if stored > DICTIONARY / 2 && written / MAX_GROWTH > stored {
        return Err(Error::new(Kind::TooLarge, format!("runs of {stored} bytes that stand for {written}")));
    }
    Ok(())
}

/// Checks that the values of the rows of one group fit memory when they are written out.
///
/// # Errors
/// `TooLarge`.
pub fn check_piece(array: &ArrayRef) -> Result<()> {
    let (_, written) = sizes(array)?;
    if written > MAX_PIECE {
        return Err(Error::new(Kind::TooLarge, format!("{} rows of runs that stand for {written} bytes", array.len())));
    }
    Ok(())
}

/// Bytes of the values of an array's runs, and of the values of its rows.
fn sizes(array: &ArrayRef) -> Result<(u64, u64)> {
    downcast_run_array!(
        array => Ok(sizes_of(array)),
        _ => Err(Error::new(Kind::Internal, "an array without runs")),
    )
}

fn sizes_of<K: RunEndIndexType>(runs: &RunArray<K>) -> (u64, u64) {
    if runs.is_empty() {
        return (0, 0);
    }
    let size = size_of(runs.values());
    let (first, last) = (runs.get_start_physical_index(), runs.get_end_physical_index());
    let mut start = runs.offset();
    let (mut stored, mut written) = (0u64, 0u64);
    for index in first..=last {
        let end = runs.run_ends().values()[index].as_usize().min(runs.offset() + runs.len());
        stored = stored.saturating_add(size(index));
        written = written.saturating_add(size(index).saturating_mul((end - start) as u64));
        start = end;
    }
    (stored, written)
}

/// Bytes of the value at an index.
fn size_of(values: &ArrayRef) -> Box<dyn Fn(usize) -> u64 + '_> {
    let between = |offsets: [usize; 2]| (offsets[1] - offsets[0]) as u64;
    match values.data_type() {
        DataType::Utf8 | DataType::Binary => {
            let data = values.to_data();
            Box::new(move |index| between([0, 1].map(|i| data.buffer::<i32>(0)[index + i].as_usize())))
        }
        DataType::LargeUtf8 | DataType::LargeBinary => {
            let data = values.to_data();
            Box::new(move |index| between([0, 1].map(|i| data.buffer::<i64>(0)[index + i].as_usize())))
        }
        DataType::Utf8View => Box::new(|index| u64::from(values.as_string_view().views()[index] as u32)),
        DataType::BinaryView => Box::new(|index| u64::from(values.as_binary_view().views()[index] as u32)),
        DataType::FixedSizeBinary(width) => Box::new(move |_| *width as u64),
        DataType::Dictionary(key, _) => Box::new(move |_| key.primitive_width().unwrap_or(0) as u64),
        other => Box::new(move |_| other.primitive_width().unwrap_or(1) as u64),
    }
}
