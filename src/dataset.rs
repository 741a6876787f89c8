//! What a vineyard object means: a table with a schema, a tensor, or bytes.
//!
//! [`decode`] turns metadata into a [`Dataset`] whose buffers are [`Span`]s: places in blobs, not bytes. It touches no
//! column data, with one exception: a pickled column is looked into far enough to find its raw values.

mod arrow;
pub mod attributes;
mod check;
mod column;
mod derive;
mod dtype;
mod frame;
mod global;
mod json;
mod materialize;
pub mod native;
mod pandas;
mod pickle;
pub mod publish;
pub mod recipe;
pub mod span;
pub mod table;
mod tensor;
#[cfg(test)]
mod testing;

pub use attributes::FileAttributes;
pub use check::check;
pub use column::NOTE;
pub use materialize::{literal, materialize};
pub use span::{Derive, Span};
pub use table::{ArrayLayout, Batch, Table};

use self::recipe::{Recipe, recipe_of};
use crate::error::{Context, Result};
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
    /// An object that was written as a file and whose value cannot be told, and why: it has that file and nothing else.
    Written(String),
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
    if let Some(table) = native::written_table(meta, source)? {
        return Ok(Dataset::Table(table));
    }
    Ok(match meta.base_type() {
        native::FILE => native::decode_file(meta)?,
        "vineyard::DataFrame" => Dataset::Table(frame::data_frame(meta, source)?.into_table()?),
        "vineyard::Series" => Dataset::Table(frame::series(meta, source)?.into_table()?),
        "vineyard::Index" => Dataset::Table(frame::index(meta, source)?.into_table()?),
        "vineyard::GlobalDataFrame" => Dataset::Table(frame::global_frame(meta, source)?),
        "vineyard::Tensor" => tensor::tensor(meta, source)?,
        "vineyard::GlobalTensor" => tensor::global_tensor(meta, source)?,
        "vineyard::CSRMatrix" => tensor::csr_matrix(meta, source)?,
        "vineyard::Table" | "vineyard::RecordBatch" => Dataset::Table(arrow::table(meta, source)?),
        "vineyard::NumericArray"
        | "vineyard::BooleanArray"
        | "vineyard::BaseBinaryArray"
        | "vineyard::StringArray"
        | "vineyard::LargeStringArray"
        | "vineyard::FixedSizeBinaryArray"
        | "vineyard::ListArray"
        | "vineyard::LargeListArray"
        | "vineyard::BaseListArray"
        | "vineyard::NullArray" => Dataset::Table(arrow::array_table(meta, source)?),
        "vineyard::PickleBuffer" => Dataset::Pickle(arrow::pickle_span(meta)?),
        "vineyard::Scalar" => Dataset::Json(json::scalar(meta)?),
        "vineyard::Sequence" => Dataset::Json(json::sequence(meta, source)?),
        "vineyard::Blob" => {
            let key = meta.as_blob().ok_or_else(|| meta.error("has no blob id"))?;
            Dataset::Blob(tensor::whole_blob(key, source)?)
        }
        _ => return Err(meta.error("is of a type without a file form")),
    })
}

/// As [`decode`], with the file that the object was written as. Where its value cannot be told, that file is left.
///
/// # Errors
/// As [`decode`], and `Malformed` if the recipe of the file is broken.
pub fn decode_with_file(meta: &Meta, source: &dyn BlobSource) -> Result<(Dataset, Option<Recipe>)> {
    match (decode(meta, source), recipe_of(meta)) {
        (Err(error), Ok(Some(recipe))) if error.is_of_content() => {
            Ok((Dataset::Written(error.to_string()), Some(recipe)))
        }
        (Ok(dataset), recipe) => Ok((dataset, recipe?)),
        (Err(error), _) => Err(error),
    }
}

impl Dataset {
    /// Checks that every buffer lies inside its blobs. Touches no data.
    ///
    /// # Errors
    /// `Malformed` if one does not, `Stale` if a blob is gone.
    pub fn validate(&self, source: &dyn BlobSource) -> Result<()> {
        match self {
            Dataset::Table(table) => table.validate(source),
            Dataset::Tensor(tensor) => {
                tensor.data.validate(source)?;
                tensor.table.iter().try_for_each(|table| table.validate(source))
            }
            Dataset::Pickle(span) | Dataset::Blob(span) | Dataset::File(span) => span.validate(source),
            Dataset::Json(_) | Dataset::Written(_) => Ok(()),
        }
    }

    /// Checks what must hold of the data before a reader may trust its offsets: see [`check`]. Reads offsets and
    /// strings.
    ///
    /// # Errors
    /// `Malformed` with the column.
    pub fn check(&self, source: &dyn BlobSource) -> Result<()> {
        let Some(table) = self.table() else { return Ok(()) };
        for batch in &table.batches {
            for (column, field) in batch.columns.iter().zip(table.schema.fields()) {
                check(column, source).context(|| format!("column {:?}", field.name()))?;
            }
        }
        Ok(())
    }

    /// The rows and columns, if it has a table form.
    pub fn table(&self) -> Option<&Table> {
        match self {
            Dataset::Table(table) => Some(table),
            Dataset::Tensor(tensor) => tensor.table.as_ref(),
            _ => None,
        }
    }

    /// Number of rows: of a table, or the first dimension of a tensor.
    pub fn rows(&self) -> Option<u64> {
        match self {
            Dataset::Table(table) => Some(table.rows()),
            Dataset::Tensor(tensor) => tensor.shape.first().copied(),
            _ => None,
        }
    }

    /// What it is, in one lower-case word for people.
    pub fn kind(&self) -> &'static str {
        match self {
            Dataset::Table(_) => "table",
            Dataset::Tensor(_) => "tensor",
            Dataset::Pickle(_) => "pickle",
            Dataset::Json(_) => "json",
            Dataset::Blob(_) => "blob",
            Dataset::File(_) | Dataset::Written(_) => "file",
        }
    }
}
