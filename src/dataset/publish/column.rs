//! One array in the layout of the Arrow columnar format, as parts of a staged file.

use std::sync::Arc;

use arrow_schema::{DataType, IntervalUnit, UnionMode};

use super::plan::Part;
use crate::error::{Error, Result};

/// An array whose buffers are parts. Each buffer may have several parts, one for each of the record batches that were
/// joined.
#[derive(Clone, Debug)]
pub(super) struct Column {
    /// Its type.
    pub(super) data_type: DataType,
    /// Number of elements.
    pub(super) len: u64,
    /// Number of nulls, counted.
    pub(super) null_count: u64,
    /// The type's buffers in the order of Arrow IPC, cut to what the elements need; a validity bitmap without parts
    /// says that nothing is null.
    pub(super) buffers: Vec<Vec<Part>>,
    /// Arrays of nested types.
    pub(super) children: Vec<Column>,
    /// Values of a dictionary type.
    pub(super) dictionary: Option<Arc<Column>>,
}

impl Column {
    /// Buffer `i`, which the type is known to have.
    pub(super) fn buffer(&self, i: usize) -> Vec<Part> {
        self.buffers.get(i).cloned().unwrap_or_default()
    }

    /// An array of no elements.
    pub(super) fn empty(data_type: &DataType) -> Column {
        use DataType::*;
        let offset = |width| vec![Part::Zeros(width)];
        let buffers = match data_type {
            Null | RunEndEncoded(..) => vec![],
            Utf8 | Binary => vec![vec![], offset(4), vec![]],
            LargeUtf8 | LargeBinary => vec![vec![], offset(8), vec![]],
            List(_) | Map(..) => vec![vec![], offset(4)],
            LargeList(_) => vec![vec![], offset(8)],
            ListView(_) | LargeListView(_) => vec![vec![]; 3],
            FixedSizeList(..) | Struct(_) | Union(_, UnionMode::Sparse) => vec![vec![]],
            _ => vec![vec![]; 2],
        };
        let children = match data_type {
            List(f) | LargeList(f) | ListView(f) | LargeListView(f) | FixedSizeList(f, _) | Map(f, _) => {
                vec![Column::empty(f.data_type())]
            }
            Struct(fields) => fields.iter().map(|f| Column::empty(f.data_type())).collect(),
            Union(fields, _) => fields.iter().map(|(_, f)| Column::empty(f.data_type())).collect(),
            RunEndEncoded(ends, values) => vec![Column::empty(ends.data_type()), Column::empty(values.data_type())],
            _ => vec![],
        };
        let dictionary = match data_type {
            Dictionary(_, values) => Some(Arc::new(Column::empty(values))),
            _ => None,
        };
        Column { data_type: data_type.clone(), len: 0, null_count: 0, buffers, children, dictionary }
    }

    /// Sum of the buffers' sizes.
    pub(super) fn size(&self) -> u64 {
        self.buffers.iter().flatten().map(Part::len).sum::<u64>() + self.children.iter().map(Column::size).sum::<u64>()
    }
}

/// Bytes of one element of types with one buffer of values of fixed width; `None` for other types and booleans.
pub(in crate::dataset) fn width(data_type: &DataType) -> Option<u64> {
    use DataType::*;
    Some(match data_type {
        Int8 | UInt8 => 1,
        Int16 | UInt16 | Float16 => 2,
        Int32 | UInt32 | Float32 | Date32 | Time32(_) | Decimal32(..) | Interval(IntervalUnit::YearMonth) => 4,
        Int64 | UInt64 | Float64 | Date64 | Time64(_) | Timestamp(..) | Duration(_) | Decimal64(..) => 8,
        Interval(IntervalUnit::DayTime) => 8,
        Interval(IntervalUnit::MonthDayNano) | Decimal128(..) => 16,
        Decimal256(..) => 32,
        FixedSizeBinary(n) => u64::try_from(*n).ok()?,
        _ => return None,
    })
}

/// `count * size`, or an error: lengths in files may be any number.
pub(super) fn bytes(count: u64, size: u64) -> Result<u64> {
    count
        .checked_mul(size)
        .filter(|&n| n <= i64::MAX as u64)
        .ok_or_else(|| Error::malformed(format!("{count} elements of {size} bytes")))
}
