//! `vineyard::Tensor` and its kin. Layout: `python/vineyard/data/tensor.py` and `modules/basic/ds/tensor.vineyard-mod`
//! of v6d 0.24.

use arrow_schema::DataType;
use serde_json::{Value, json};

use super::column::Column;
use super::derive;
use super::dtype::Dtype;
use super::frame::{Cells, Frame};
use super::pickle;
use super::span::Span;
use super::table::ArrayLayout;
use super::{Dataset, Tensor, arrow};
use crate::error::Result;
use crate::vineyard::{BlobKey, BlobSource, Meta, ObjectId};

/// Most columns that a matrix may have to be shown as a table too.
const MAX_TABLE_COLUMNS: u64 = 10_000;

/// A whole blob of which so many bytes are needed.
///
/// # Errors
/// `Malformed` if bytes are needed of the blob that has none.
pub fn blob_span(meta: &Meta, key: BlobKey, len: u64) -> Result<Span> {
    if len > 0 && key.id == ObjectId::EMPTY_BLOB {
        return Err(meta.error(format!("needs {len} bytes of the empty blob")));
    }
    Ok(Span::blob(key, len))
}

/// All bytes of a blob, whatever their number.
///
/// # Errors
/// What the source says of the blob.
pub fn whole_blob(key: BlobKey, source: &dyn BlobSource) -> Result<Span> {
    if key.id == ObjectId::EMPTY_BLOB { Ok(Span::EMPTY) } else { Ok(Span::blob(key, source.size(key)?)) }
}

/// What a tensor's elements are.
enum Elements {
    /// Raw values of one width.
    Fixed(Dtype),
    /// An Arrow string array under `buffer_`.
    Strings,
    /// A pickle of the whole array.
    Pickled,
}

fn elements(meta: &Meta) -> Result<Elements> {
    let text = |key: &str| meta.get(key).and_then(Value::as_str);
    let parameter = meta.type_parameter();
    match text("value_type_meta_") {
        Some("str") => return Ok(Elements::Strings),
        Some("|O" | "O" | "object") => return Ok(Elements::Pickled),
        Some(descr) => {
            if let Some(dtype) = Dtype::parse(descr) {
                return Ok(Elements::Fixed(dtype));
            }
        }
        None => {}
    }
    for name in [text("value_type_"), Some(parameter)].into_iter().flatten() {
        match name {
            "string" | "std::string" => return Ok(Elements::Strings),
            "object" => return Ok(Elements::Pickled),
            name => {
                if let Some(dtype) = Dtype::parse_name(name) {
                    return Ok(Elements::Fixed(dtype));
                }
            }
        }
    }
    Err(meta.error(format!("has elements of a type without a file form ({:.60})", parameter)))
}

/// Product of lengths; `Meta::shape` has refused those that overflow.
fn product(shape: &[u64]) -> u64 {
    shape.iter().product()
}

fn fixed_data(meta: &Meta, dtype: &Dtype, shape: &[u64]) -> Result<Span> {
    let bytes = product(shape).checked_mul(dtype.size).ok_or_else(|| meta.error("has more than 2^64 bytes"))?;
    blob_span(meta, meta.blob("buffer_")?, bytes)
}

/// The member that is an Arrow array of strings, checked against the shape.
fn strings(meta: &Meta, shape: &[u64], source: &dyn BlobSource) -> Result<Column> {
    let array = arrow::array(&meta.member("buffer_")?, None, source)?;
    if array.layout.len != product(shape) {
        return Err(meta.error(format!("has {} strings in the shape {shape:?}", array.layout.len)));
    }
    Ok(array)
}

/// A tensor as one column: rows are the first dimension, further ones are lists of a fixed length.
///
/// # Errors
/// `Malformed` if shape, type and members do not fit together.
pub fn cells(meta: &Meta, source: &dyn BlobSource) -> Result<Cells> {
    let shape = meta.shape("shape_")?;
    let rows = shape.first().copied().unwrap_or(1);
    let flat = match elements(meta)? {
        Elements::Fixed(dtype) => dtype.column(fixed_data(meta, &dtype, &shape)?, product(&shape))?,
        Elements::Strings => strings(meta, &shape, source)?,
        Elements::Pickled => {
            let data = whole_blob(meta.blob("buffer_")?, source)?;
            return pickle::cells(data, Some(rows), source);
        }
    };
    Ok(Cells::Column(nest(flat, &shape)?))
}

/// Lays rows of `shape[1..]` over flat elements.
fn nest(flat: Column, shape: &[u64]) -> Result<Column> {
    if shape.len() < 2 {
        return Ok(flat);
    }
    let Column { mut layout, metadata, .. } = flat;
    for (depth, &n) in shape.iter().enumerate().skip(1).rev() {
        layout = layout.into_fixed_lists(n, product(&shape[..depth]))?;
    }
    let mut column = Column::new(layout);
    column.metadata = metadata;
    Ok(column)
}

/// The table that `pandas.DataFrame(array)` makes: columns 0, 1, 2 and so on.
fn matrix(dtype: &Dtype, shape: &[u64], data: &Span) -> Result<Option<Frame>> {
    let (rows, columns) = match *shape {
        [rows] => (rows, 1),
        [rows, columns] if columns <= MAX_TABLE_COLUMNS => (rows, columns),
        _ => return Ok(None),
    };
    let stride = columns * dtype.size;
    let columns = (0..columns).map(|i| {
        let skip = i * dtype.size;
        let from = if rows == 0 { Span::EMPTY } else { data.slice(skip, data.len() - skip)? };
        let values = derive::gather(&from, stride, dtype.size, rows)?;
        Ok((json!(i), dtype.column(values, rows)?))
    });
    Ok(Some(Frame { rows, columns: columns.collect::<Result<_>>()?, index: Vec::new() }))
}

/// A tensor of its own.
///
/// # Errors
/// `Malformed` if shape, type and members do not fit together.
pub fn tensor(meta: &Meta, source: &dyn BlobSource) -> Result<Dataset> {
    let shape = meta.shape("shape_")?;
    let dtype = match elements(meta)? {
        Elements::Fixed(dtype) => dtype,
        Elements::Strings => {
            let column = nest(strings(meta, &shape, source)?, &shape)?;
            return Ok(Dataset::Table(Frame::single(json!(0), column).into_table()?));
        }
        Elements::Pickled => {
            let data = whole_blob(meta.blob("buffer_")?, source)?;
            return Ok(match pickle::cells(data.clone(), shape.first().copied(), source)? {
                Cells::Column(column) if shape.len() == 1 => {
                    Dataset::Table(Frame::single(json!(0), column).into_table()?)
                }
                _ => Dataset::Pickle(data),
            });
        }
    };
    let data = fixed_data(meta, &dtype, &shape)?;
    // JSON text in a JSON string: "\"F\"".
    let fortran = meta.get("order_").and_then(Value::as_str).is_some_and(|order| order.trim_matches('"') == "F");
    let table = matrix(&dtype, &shape, &data)?.map(Frame::into_table).transpose()?;
    Ok(Dataset::Tensor(Tensor { descr: dtype.descr(), item_size: dtype.size, shape, fortran, data, table }))
}

/// `vineyard::GlobalTensor` whose parts are cut along the first dimension: one tensor.
///
/// # Errors
/// `Malformed` if the parts are cut otherwise or do not fit together.
pub fn global_tensor(meta: &Meta, source: &dyn BlobSource) -> Result<Dataset> {
    let mut whole: Option<Tensor> = None;
    let mut data = Vec::new();
    for part in super::global::parts(meta)? {
        let Dataset::Tensor(part) = tensor(&part, source)? else {
            return Err(meta.error("has a part that is no numeric tensor"));
        };
        data.push(part.data.clone());
        match &mut whole {
            None => whole = Some(part),
            Some(all) if all.descr == part.descr && all.shape.get(1..) == part.shape.get(1..) => {
                match (all.shape.first_mut(), part.shape.first()) {
                    (Some(sum), Some(n)) => {
                        *sum = sum.checked_add(*n).ok_or_else(|| meta.error("has more than 2^64 rows"))?;
                    }
                    _ => return Err(meta.error("has parts without dimensions")),
                }
            }
            Some(all) => {
                return Err(meta.error(format!("has parts of shapes {:?} and {:?}", all.shape, part.shape)));
            }
        }
    }
    let mut whole = whole.ok_or_else(|| meta.error("has no parts"))?;
    if meta.get("shape_").is_some() && meta.shape("shape_")? != whole.shape {
        return Err(meta.error("has parts that are not cut along the first dimension"));
    }
    whole.data = derive::join(data)?;
    let dtype = Dtype::parse(&whole.descr).ok_or_else(|| meta.error("has parts of an unknown type"))?;
    whole.table = matrix(&dtype, &whole.shape, &whole.data)?.map(Frame::into_table).transpose()?;
    Ok(Dataset::Tensor(whole))
}

/// `vineyard::CSRMatrix`: a table of one row, with the matrix's three arrays as lists.
/// Layout: `python/vineyard/data/tensor.py` of v6d 0.24.
///
/// # Errors
/// `Malformed` if a member is no one-dimensional numeric tensor.
pub fn csr_matrix(meta: &Meta, source: &dyn BlobSource) -> Result<Dataset> {
    let mut columns = Vec::new();
    for name in ["data", "indices", "indptr"] {
        let member = meta.member(name)?;
        let Cells::Column(column) = cells(&member, source)? else {
            return Err(member.error("is no array of numbers"));
        };
        let values = column.layout;
        let list = ArrayLayout {
            data_type: DataType::LargeList(super::column::item(&values.data_type)),
            len: 1,
            null_count: Some(0),
            buffers: vec![Span::EMPTY, super::column::offsets([0, values.len])],
            children: vec![values],
            dictionary: None,
        };
        columns.push((json!(name), Column::new(list).with_note("part of a sparse matrix in CSR form")));
    }
    let shape = meta.shape("shape_")?;
    let shape = Dtype::parse("<i8").map(|d| {
        let bytes: Vec<u8> = shape.iter().flat_map(|n| n.to_le_bytes()).collect();
        d.column(Span::literal(bytes), shape.len() as u64)
    });
    if let Some(shape) = shape.transpose()? {
        let n = shape.layout.len;
        columns.push((json!("shape"), Column::new(shape.layout.into_fixed_lists(n, 1)?)));
    }
    Ok(Dataset::Table(Frame { rows: 1, columns, index: Vec::new() }.into_table()?))
}
