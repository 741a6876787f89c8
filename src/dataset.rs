//! What a vineyard object means: a table with a schema, a tensor, or bytes.
//!
//! [`decode`] turns metadata into a [`Dataset`] whose buffers are [`Span`]s: places in blobs, not bytes. It touches no
//! column data, with one exception: a pickled column is looked into far enough to find its raw values.

pub mod span;
pub mod table;

pub use span::{Derive, Span};
pub use table::{ArrayLayout, Batch, Table};

use crate::error::Result;
use crate::vineyard::{BlobSource, Meta};

/// What an object is, as far as files can show it.
#[derive(Clone, Debug)]
pub enum Dataset {
    /// Rows and columns: DataFrame, Series, Index, Table, RecordBatch, Arrow arrays, GlobalDataFrame.
    Table(Table),
    /// A dense numeric array of any rank.
    Tensor(Tensor),
    /// A pickled Python value: protocol bytes.
    Pickle(Span),
    /// A value with a JSON form: scalars and sequences of them.
    Json(serde_json::Value),
    /// Bytes as they are: a bare blob.
    Blob(Span),
    /// A file that was written through a mount and is stored as it is, under its full file name.
    File(Span),
}

/// A dense array in row-major order.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// numpy's name of the element type with byte order: `<f8`, `|b1`, `<M8[ns]`.
    pub descr: String,
    /// Bytes of one element.
    pub item_size: u64,
    /// Lengths, outermost first; empty for a single value.
    pub shape: Vec<u64>,
    /// The reader is to convert to column-major order (`order_` is `"F"`); the buffer is row-major all the same.
    pub fortran: bool,
    /// The elements.
    pub data: Span,
    /// The same as a table, for one and two dimensions of a type that Arrow has.
    pub table: Option<Table>,
}

/// Reads what an object means from its metadata.
///
/// Sizes of fixed-width buffers follow from shapes and are believed here; [`Dataset::validate`] compares them with the
/// blobs before bytes are served. `source` is asked only for sizes of variable-length buffers and for pickles.
///
/// # Errors
/// `Malformed` with the object and the reason.
pub fn decode(meta: &Meta, source: &dyn BlobSource) -> Result<Dataset> {
    let _ = source;
    Err(meta.error("is of a type without a file form"))
}
