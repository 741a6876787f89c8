//! Tables whose columns are places in shared memory.

use std::sync::Arc;

use arrow_schema::{DataType, SchemaRef, UnionMode};

use super::derive;
use super::span::Span;
use crate::error::{Error, Kind, Result};
use crate::vineyard::BlobSource;

/// A schema and record batches.
#[derive(Clone, Debug)]
pub struct Table {
    /// Fields and metadata; the key `pandas` is there if the object came from pandas.
    pub schema: SchemaRef,
    /// The rows, in order. May be empty: the schema stands alone.
    pub batches: Vec<Batch>,
}

/// Rows of a table.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Number of rows; a batch without columns has them too.
    pub rows: u64,
    /// One array for each field of the schema, each of `rows` elements.
    pub columns: Vec<ArrayLayout>,
}

/// One array in the layout of the Arrow columnar format, without an offset: the buffers start at the first element.
#[derive(Clone, Debug)]
pub struct ArrayLayout {
    /// Its type.
    pub data_type: DataType,
    /// Number of elements.
    pub len: u64,
    /// Number of nulls; `None` if it must be counted in the validity bitmap before the bytes of a file are served.
    pub null_count: Option<u64>,
    /// The buffers that the type has in Arrow IPC, in its order. An empty span for an absent validity bitmap. For view
    /// types the variadic data buffers follow the views. String and list offsets need not start at 0.
    pub buffers: Vec<Span>,
    /// Child arrays of nested types.
    pub children: Vec<ArrayLayout>,
    /// Values of a dictionary type, shared by all batches.
    pub dictionary: Option<std::sync::Arc<ArrayLayout>>,
}

impl Table {
    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.batches.iter().map(|b| b.rows).sum()
    }

    /// Checks that every buffer lies inside its blobs. Touches no data.
    ///
    /// # Errors
    /// `Malformed` if one does not, `Stale` if a blob is gone.
    pub fn validate(&self, source: &dyn BlobSource) -> Result<()> {
        self.batches.iter().flat_map(|b| &b.columns).try_for_each(|column| column.validate(source))
    }
}

/// Bytes of one element of a type whose values have one width; `None` for booleans and all other types.
pub fn fixed_width(data_type: &DataType) -> Option<u64> {
    match data_type {
        DataType::FixedSizeBinary(n) => u64::try_from(*n).ok(),
        DataType::Dictionary(key, _) => fixed_width(key),
        other => other.primitive_width().map(|n| n as u64),
    }
}

impl ArrayLayout {
    /// An array of a type without children.
    pub fn flat(data_type: DataType, len: u64, null_count: Option<u64>, buffers: Vec<Span>) -> Self {
        ArrayLayout { data_type, len, null_count, buffers, children: Vec::new(), dictionary: None }
    }

    /// An array of nulls without buffers.
    pub fn null(len: u64) -> Self {
        ArrayLayout::flat(DataType::Null, len, Some(len), Vec::new())
    }

    /// True if both are the same places in memory. Touches no data.
    pub fn is_same(&self, other: &ArrayLayout) -> bool {
        let dictionaries = match (&self.dictionary, &other.dictionary) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a.is_same(b),
            _ => false,
        };
        dictionaries
            && self.data_type == other.data_type
            && self.len == other.len
            && self.buffers.len() == other.buffers.len()
            && self.children.len() == other.children.len()
            && self.buffers.iter().zip(&other.buffers).all(|(a, b)| a.is_same(b))
            && self.children.iter().zip(&other.children).all(|(a, b)| a.is_same(b))
    }

    /// Sum of the lengths of all buffers, children and dictionaries.
    pub fn size(&self) -> u64 {
        let own = self.buffers.iter().map(Span::len);
        let below = self.children.iter().chain(self.dictionary.as_deref()).map(ArrayLayout::size);
        own.chain(below).fold(0, u64::saturating_add)
    }

    /// Checks that every buffer lies inside its blobs. Touches no data.
    ///
    /// # Errors
    /// `Malformed` if one does not, `Stale` if a blob is gone.
    pub fn validate(&self, source: &dyn BlobSource) -> Result<()> {
        self.buffers.iter().try_for_each(|span| span.validate(source))?;
        self.children.iter().try_for_each(|child| child.validate(source))?;
        self.dictionary.iter().try_for_each(|values| values.validate(source))
    }

    /// Elements `offset..offset + len`.
    ///
    /// # Errors
    /// `Malformed` if they are not inside, or a buffer is too short; `Unsupported` for run-end encoded arrays.
    pub fn slice(&self, offset: u64, len: u64) -> Result<ArrayLayout> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Error::malformed(format!("elements {offset} and {len} more of an array of {}", self.len)));
        }
        if offset == 0 && len == self.len {
            return Ok(self.clone());
        }
        let buffer = |i: usize| {
            let missing = || Error::malformed(format!("an array of {} without buffer {i}", self.data_type));
            self.buffers.get(i).ok_or_else(missing)
        };
        let wide = |i: usize, width: u64, extra: u64| {
            let too_big = || Error::malformed("an array of more than 2^64 bytes");
            let start = offset.checked_mul(width).ok_or_else(too_big)?;
            let bytes = len.checked_add(extra).and_then(|n| n.checked_mul(width)).ok_or_else(too_big)?;
            buffer(i)?.slice(start, bytes)
        };
        let mut sliced = self.clone();
        sliced.len = len;
        let has_validity =
            !matches!(self.data_type, DataType::Null | DataType::Union(..) | DataType::RunEndEncoded(..));
        if has_validity && !buffer(0)?.is_empty() {
            sliced.buffers[0] = derive::bit_slice(buffer(0)?, offset, len)?;
            sliced.null_count = if self.null_count == Some(0) { Some(0) } else { None };
        }
        let slice_children = |offset: u64, len: u64| -> Result<Vec<ArrayLayout>> {
            self.children.iter().map(|child| child.slice(offset, len)).collect()
        };
        match &self.data_type {
            DataType::Null => sliced.null_count = Some(len),
            DataType::Boolean => sliced.buffers[1] = derive::bit_slice(buffer(1)?, offset, len)?,
            DataType::Utf8 | DataType::Binary | DataType::List(_) | DataType::Map(..) => {
                sliced.buffers[1] = wide(1, 4, 1)?;
            }
            DataType::LargeUtf8 | DataType::LargeBinary | DataType::LargeList(_) => {
                sliced.buffers[1] = wide(1, 8, 1)?;
            }
            DataType::Utf8View | DataType::BinaryView => sliced.buffers[1] = wide(1, 16, 0)?,
            DataType::ListView(_) => {
                (sliced.buffers[1], sliced.buffers[2]) = (wide(1, 4, 0)?, wide(2, 4, 0)?);
            }
            DataType::LargeListView(_) => {
                (sliced.buffers[1], sliced.buffers[2]) = (wide(1, 8, 0)?, wide(2, 8, 0)?);
            }
            DataType::FixedSizeList(_, n) => {
                let n = u64::try_from(*n).map_err(|_| Error::malformed("a list of a negative length"))?;
                let times = |a: u64| a.checked_mul(n).ok_or_else(|| Error::malformed("a list's length overflows"));
                sliced.children = slice_children(times(offset)?, times(len)?)?;
            }
            DataType::Struct(_) => sliced.children = slice_children(offset, len)?,
            DataType::Union(_, mode) => {
                sliced.buffers[0] = wide(0, 1, 0)?;
                match mode {
                    UnionMode::Dense => sliced.buffers[1] = wide(1, 4, 0)?,
                    UnionMode::Sparse => sliced.children = slice_children(offset, len)?,
                }
            }
            other => match fixed_width(other) {
                Some(width) => sliced.buffers[1] = wide(1, width, 0)?,
                None => {
                    return Err(Error::new(Kind::Unsupported, format!("a window into an array of type {other}")));
                }
            },
        }
        Ok(sliced)
    }

    /// A list of `n` elements of this array for each of `len` rows.
    ///
    /// # Errors
    /// `Malformed` if the array does not have `n * len` elements or `n` is past Arrow's limit.
    pub fn into_fixed_lists(self, n: u64, len: u64) -> Result<ArrayLayout> {
        let size = i32::try_from(n).map_err(|_| Error::malformed(format!("lists of {n} elements")))?;
        if n.checked_mul(len) != Some(self.len) {
            return Err(Error::malformed(format!("{len} lists of {n} in an array of {}", self.len)));
        }
        let item = Arc::new(arrow_schema::Field::new("item", self.data_type.clone(), true));
        Ok(ArrayLayout {
            data_type: DataType::FixedSizeList(item, size),
            len,
            null_count: Some(0),
            buffers: vec![Span::EMPTY],
            children: vec![self],
            dictionary: None,
        })
    }
}
