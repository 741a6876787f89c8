//! Tables whose columns are places in shared memory.

use arrow_schema::{DataType, SchemaRef};

use super::span::Span;

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
}
