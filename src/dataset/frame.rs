//! pandas' frames, series and indexes. Layout: `python/vineyard/data/{dataframe,series,index}.py` and
//! `modules/basic/ds/dataframe.vineyard-mod` of v6d 0.24.

use std::sync::Arc;

use arrow_schema::{DataType, Field, Metadata, Schema, SchemaRef};
use serde_json::{Value, json};

use super::column::{Column, NOTE};
use super::span::Span;
use super::table::{ArrayLayout, Batch, Table};
use super::{arrow, derive, pandas, pickle, tensor};
use crate::error::{Context, Error, Kind, Result};
use crate::vineyard::{BlobSource, Meta};

/// What a member that should be a column turned out to be.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // one for each column, for as long as a frame is decoded
pub enum Cells {
    /// A column.
    Column(Column),
    /// Tuples: one column for each level of a MultiIndex.
    Levels(Vec<Column>),
    /// One value where a column should be: the writer stored only the first cell.
    First {
        /// Its type.
        data_type: DataType,
        /// Its bytes.
        value: Span,
    },
    /// The first cell was missing or has no Arrow form, and the writer stored only that.
    FirstNull,
    /// A pickle that was not understood, and why.
    Opaque(Span, String),
    /// An object without a column form, and why.
    Unknown(String),
}

impl Cells {
    /// The number of rows, if known.
    fn rows(&self) -> Option<u64> {
        match self {
            Cells::Column(column) => Some(column.layout.len),
            Cells::Levels(levels) => levels.first().map(|level| level.layout.len),
            _ => None,
        }
    }

    /// A column of `rows` rows, with a note where it is not what was put.
    ///
    /// # Errors
    /// `Malformed` if the rows are not as many.
    pub fn into_column(self, rows: u64) -> Result<Column> {
        const LOST: &str = "the writer stored only the first cell of this column; the other values are lost";
        let column = match self {
            Cells::Column(column) => column,
            Cells::Levels(levels) => {
                let fields = levels.iter().enumerate().map(|(i, level)| level.field(&i.to_string())).collect();
                let mut layout = ArrayLayout::flat(DataType::Struct(fields), rows, Some(0), vec![Span::EMPTY]);
                layout.children = levels.into_iter().map(|level| level.layout).collect();
                Column::new(layout)
            }
            Cells::First { data_type, value } => {
                let column = Column::first_cell(data_type, value, rows)?;
                if rows > 1 { column.with_note(LOST) } else { column }
            }
            Cells::FirstNull => Column::new(ArrayLayout::null(rows)).with_note(LOST),
            Cells::Opaque(pickle, why) => Column::opaque(pickle, rows, &why)?,
            Cells::Unknown(why) => {
                // No value is left: a null in every row.
                let bitmap = Span::Zeros(rows.div_ceil(8));
                let offsets = derive::repeat(vec![0; 8], rows.saturating_add(1))?;
                let buffers = vec![bitmap, offsets, Span::EMPTY];
                Column::new(ArrayLayout::flat(DataType::LargeBinary, rows, Some(rows), buffers)).with_note(why)
            }
        };
        if column.layout.len != rows {
            return Err(Error::malformed(format!("{} values in {rows} rows", column.layout.len)));
        }
        Ok(column)
    }
}

/// A pandas frame: labelled columns and an index.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Number of rows.
    pub rows: u64,
    /// Columns with their labels, which may be any JSON value.
    pub columns: Vec<(Value, Column)>,
    /// Levels of the index with their names; none for the row numbers.
    pub index: Vec<(Value, Column)>,
}

impl Frame {
    /// A frame of one column.
    pub fn single(label: Value, column: Column) -> Frame {
        Frame { rows: column.layout.len, columns: vec![(label, column)], index: Vec::new() }
    }

    /// The frame as pandas writes it into Arrow files: index levels after the columns, and the `pandas` key.
    ///
    /// # Errors
    /// `Malformed` if columns differ in length.
    pub fn into_table(self) -> Result<Table> {
        let names = pandas::Names::of(&self);
        let metadata = pandas::metadata(&self, &names);
        let all = self.columns.into_iter().chain(self.index).map(|(_, column)| column);
        let (mut fields, mut columns) = (Vec::new(), Vec::new());
        for (column, name) in all.zip(names.columns.iter().chain(&names.index)) {
            if column.layout.len != self.rows {
                let have = column.layout.len;
                return Err(Error::malformed(format!("column {name:?} has {have} of {} rows", self.rows)));
            }
            fields.push(column.field(name));
            columns.push(column.layout);
        }
        let metadata = Metadata::from([("pandas", metadata.to_string())]);
        let schema = Arc::new(Schema::new_with_metadata(fields, metadata));
        Ok(Table { schema, batches: vec![Batch { rows: self.rows, columns }] })
    }
}

/// A member of a frame, series or index: any type that holds values.
fn values(meta: &Meta, rows: Option<u64>, source: &dyn BlobSource) -> Result<Cells> {
    match meta.base_type() {
        "vineyard::Tensor" => match tensor::cells(meta, source) {
            Err(error) if error.kind() == Kind::Unsupported => Ok(Cells::Unknown(error.to_string())),
            other => other,
        },
        "vineyard::PickleBuffer" => pickle::cells(arrow::pickle_span(meta)?, rows, source),
        "vineyard::Index" => values(&meta.member("value_")?, rows, source),
        "vineyard::Scalar" => Ok(scalar(meta.get("value_").unwrap_or(&Value::Null))),
        "vineyard::SparseArray" => sparse(meta, source),
        _ => match arrow::array(meta, None, source) {
            Ok(column) => Ok(Cells::Column(column)),
            Err(error) if error.kind() == Kind::Unsupported => Ok(Cells::Unknown(error.to_string())),
            Err(error) => Err(error),
        },
    }
}

/// The first cell of a column that the writer took for a scalar.
fn scalar(value: &Value) -> Cells {
    let first = |data_type, bytes: Vec<u8>| Cells::First { data_type, value: Span::literal(bytes) };
    match value {
        Value::String(text) => first(DataType::LargeUtf8, text.clone().into_bytes()),
        Value::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(n), _) => first(DataType::Int64, n.to_le_bytes().to_vec()),
            (None, Some(f)) => first(DataType::Float64, f.to_le_bytes().to_vec()),
            _ => Cells::FirstNull,
        },
        Value::Bool(b) => first(DataType::LargeUtf8, b.to_string().into_bytes()),
        _ => Cells::FirstNull,
    }
}

/// `vineyard::SparseArray<Sparse[int64, 0]>`: positions and values, shown dense.
fn sparse(meta: &Meta, source: &dyn BlobSource) -> Result<Cells> {
    let unknown = || Ok(Cells::Unknown(format!("a sparse column of type {:.60}", meta.type_parameter())));
    let (Ok("IntIndex"), Ok(rows)) = (meta.string("sp_index_name"), meta.unsigned("sp_index_size")) else {
        return unknown();
    };
    let (Cells::Column(index), Cells::Column(values)) =
        (tensor::cells(&meta.member("sp_index")?, source)?, tensor::cells(&meta.member("sp_values")?, source)?)
    else {
        return unknown();
    };
    let data_type = values.layout.data_type.clone();
    let parameter = meta.type_parameter();
    let fill = parameter.strip_prefix("Sparse[").and_then(|rest| rest.strip_suffix(']')?.split_once(", "));
    let Some(fill) = fill.and_then(|(_, fill)| number_bytes(fill, &data_type)) else { return unknown() };
    match (index.layout.data_type == DataType::Int32, index.layout.buffers.get(1), values.layout.buffers.get(1)) {
        (true, Some(positions), Some(data)) => {
            let dense = derive::scatter(positions.clone(), data.clone(), fill, rows)?;
            let layout = ArrayLayout::flat(data_type, rows, Some(0), vec![Span::EMPTY, dense]);
            Ok(Cells::Column(Column::new(layout).with_note("was a sparse column")))
        }
        _ => unknown(),
    }
}

/// A number's text as the little-endian bytes of a type.
fn number_bytes(text: &str, data_type: &DataType) -> Option<Vec<u8>> {
    Some(match data_type {
        DataType::Int8 => text.parse::<i8>().ok()?.to_le_bytes().to_vec(),
        DataType::Int16 => text.parse::<i16>().ok()?.to_le_bytes().to_vec(),
        DataType::Int32 => text.parse::<i32>().ok()?.to_le_bytes().to_vec(),
        DataType::Int64 => text.parse::<i64>().ok()?.to_le_bytes().to_vec(),
        DataType::UInt8 => text.parse::<u8>().ok()?.to_le_bytes().to_vec(),
        DataType::UInt16 => text.parse::<u16>().ok()?.to_le_bytes().to_vec(),
        DataType::UInt32 => text.parse::<u32>().ok()?.to_le_bytes().to_vec(),
        DataType::UInt64 => text.parse::<u64>().ok()?.to_le_bytes().to_vec(),
        DataType::Float32 => text.parse::<f32>().ok()?.to_le_bytes().to_vec(),
        DataType::Float64 => text.parse::<f64>().ok()?.to_le_bytes().to_vec(),
        _ => return None,
    })
}

/// A name that is stored as JSON text: any JSON value. Null where it is absent.
fn name(meta: &Meta) -> Result<Value> {
    match meta.get("name") {
        None | Some(Value::Null) => Ok(Value::Null),
        // C++ writers store plain text.
        Some(Value::String(text)) => Ok(serde_json::from_str(text).unwrap_or_else(|_| json!(text))),
        Some(_) => Err(meta.error("has a \"name\" that is no text")),
    }
}

/// Restores what `value_type_` of an index says beyond the bytes: pandas' `category` and `str`.
fn index_dtype(meta: &Meta, column: Column) -> Column {
    match meta.get("value_type_").and_then(Value::as_str) {
        Some("str") if column.layout.data_type == DataType::LargeUtf8 => column.with_numpy_type("str"),
        _ => column,
    }
}

/// An index's name and values, or those of whatever stands in its place.
fn index_cells(meta: &Meta, rows: Option<u64>, source: &dyn BlobSource) -> Result<(Value, Cells)> {
    match meta.base_type() {
        "vineyard::Index" => Ok((name(meta)?, values(&meta.member("value_")?, rows, source)?)),
        _ => Ok((Value::Null, values(meta, rows, source)?)),
    }
}

/// The levels of an index of `rows` rows.
fn index_levels(meta: &Meta, (label, cells): (Value, Cells), rows: u64) -> Result<Vec<(Value, Column)>> {
    match cells {
        Cells::Levels(levels) => {
            let names = label.as_array().filter(|names| names.len() == levels.len()).cloned();
            let names = names.unwrap_or_else(|| vec![Value::Null; levels.len()]);
            Ok(names.into_iter().zip(levels).collect())
        }
        cells => Ok(vec![(label, index_dtype(meta, cells.into_column(rows)?))]),
    }
}

/// `vineyard::DataFrame`.
///
/// # Errors
/// `Malformed` if the members do not fit together.
pub fn data_frame(meta: &Meta, source: &dyn BlobSource) -> Result<Frame> {
    let mut labels = Vec::new();
    let mut members = Vec::new();
    let mut index = meta.optional_member("index_")?;
    for i in 0..meta.list_len("__values_")? {
        let label = meta.json_text(&format!("__values_-key-{i}"))?;
        let value = meta.member(&format!("__values_-value-{i}"))?;
        // C++ frames keep the index among the columns, under this key.
        if label == json!("index_") && index.is_none() {
            index = Some(value);
        } else {
            labels.push(label);
            members.push(value);
        }
    }
    let mut cells = Vec::new();
    for (label, member) in labels.iter().zip(&members) {
        // The rows are not known yet: a pickle of some other length is found out below.
        cells.push(values(member, None, source).context(|| format!("column {label}"))?);
    }
    let index = match index {
        Some(index) => Some((index_cells(&index, None, source)?, index)),
        None => None,
    };
    let rows = index.as_ref().and_then(|((_, cells), _)| cells.rows()).or_else(|| cells.iter().find_map(Cells::rows));
    // A frame of nothing but lost columns still shows their first cells.
    let rows = rows.unwrap_or(u64::from(!cells.is_empty()));
    let mut columns = Vec::new();
    for ((label, cells), member) in labels.into_iter().zip(cells).zip(&members) {
        let cells = match cells {
            Cells::Column(column) if column.layout.len != rows && member.base_type() == "vineyard::PickleBuffer" => {
                let why = format!("a pickled array of {} values in a frame of {rows} rows", column.layout.len);
                Cells::Opaque(arrow::pickle_span(member)?, why)
            }
            cells => cells,
        };
        let column = cells.into_column(rows).context(|| format!("object {}: column {label}", meta.id()))?;
        columns.push((label, column));
    }
    let index = match index {
        Some((cells, index)) => index_levels(&index, cells, rows).context(|| format!("object {}: index", meta.id()))?,
        None => Vec::new(),
    };
    Ok(Frame { rows, columns, index })
}

/// `vineyard::Series`: a frame of one column. A series without a name becomes column 0, as `to_frame` has it.
///
/// # Errors
/// `Malformed` if the members do not fit together.
pub fn series(meta: &Meta, source: &dyn BlobSource) -> Result<Frame> {
    let cells = values(&meta.member("value_")?, None, source)?;
    let index = match meta.optional_member("index_")? {
        Some(index) => Some((index_cells(&index, cells.rows(), source)?, index)),
        None => None,
    };
    let from_index = index.as_ref().and_then(|((_, cells), _)| cells.rows());
    let rows = cells.rows().or(from_index).unwrap_or(1);
    let index = match index {
        Some((cells, index)) => index_levels(&index, cells, rows)?,
        None => Vec::new(),
    };
    let label = match name(meta)? {
        Value::Null => json!(0),
        label => label,
    };
    Ok(Frame { rows, columns: vec![(label, cells.into_column(rows)?)], index })
}

/// `vineyard::Index` of its own: its levels as columns.
///
/// # Errors
/// `Malformed` if the members do not fit together.
pub fn index(meta: &Meta, source: &dyn BlobSource) -> Result<Frame> {
    let cells = index_cells(meta, None, source)?;
    let rows = cells.1.rows().unwrap_or(1);
    let mut columns = index_levels(meta, cells, rows)?;
    for (i, (label, _)) in columns.iter_mut().enumerate() {
        if label.is_null() {
            *label = json!(i);
        }
    }
    let rows = columns.first().map_or(0, |(_, level)| level.layout.len);
    Ok(Frame { rows, columns, index: Vec::new() })
}

/// True if fields are equal but for notes: a part of one row has all cells of a column of which others have the first.
fn same_fields(a: &Schema, b: &Schema) -> bool {
    let plain = |field: &Field| {
        let metadata = field.metadata().iter().filter(|(key, _)| *key != NOTE);
        field.clone().with_metadata(metadata.map(|(key, value)| (key.clone(), value.clone())).collect::<Metadata>())
    };
    a.fields().len() == b.fields().len() && a.fields().iter().zip(b.fields()).all(|(a, b)| plain(a) == plain(b))
}

/// The schema with the notes of another that has the same fields, where it has none itself.
fn with_notes(schema: &SchemaRef, other: &Schema) -> SchemaRef {
    if schema.fields() == other.fields() {
        return schema.clone();
    }
    let fields = schema.fields().iter().zip(other.fields()).map(|(field, other)| {
        let mut metadata = other.metadata().clone();
        metadata.extend(field.metadata().iter().map(|(key, value)| (key.clone(), value.clone())));
        field.as_ref().clone().with_metadata(metadata)
    });
    Arc::new(Schema::new_with_metadata(fields.collect::<Vec<_>>(), schema.metadata().clone()))
}

/// `vineyard::GlobalDataFrame`: its parts in order, as the batches of one table.
///
/// # Errors
/// `Malformed` if the parts' schemas differ; as [`super::global::parts`].
pub fn global_frame(meta: &Meta, source: &dyn BlobSource) -> Result<Table> {
    let mut whole: Option<Table> = None;
    for (number, part) in super::global::parts(meta)?.iter().enumerate() {
        let part = super::decode(part, source).context(|| format!("object {}: part {number}", meta.id()))?;
        let super::Dataset::Table(part) = part else {
            return Err(meta.error(format!("has a part {number} that is no table")));
        };
        match &mut whole {
            None => whole = Some(part),
            Some(all) if same_fields(&all.schema, &part.schema) => {
                all.schema = with_notes(&all.schema, &part.schema);
                all.batches.extend(part.batches);
            }
            Some(all) => {
                let (a, b) = (all.schema.fields(), part.schema.fields());
                return Err(meta.error(format!("has parts of schemas {a:?} and {b:?}")));
            }
        }
    }
    let mut whole = whole.ok_or_else(|| meta.error("has no parts"))?;
    if whole.batches.len() > 1 {
        for (i, field) in whole.schema.fields().iter().enumerate() {
            let mut columns: Vec<_> = whole.batches.iter_mut().filter_map(|b| b.columns.get_mut(i)).collect();
            super::materialize::unify_dictionaries(&mut columns, source)
                .context(|| format!("object {}: column {:?}", meta.id(), field.name()))?;
        }
    }
    let metadata = pandas::with_rows(whole.schema.metadata(), whole.rows());
    let schema = Schema::new_with_metadata(whole.schema.fields().clone(), metadata);
    Ok(Table { schema: Arc::new(schema), batches: whole.batches })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::dataset::testing::Nothing;

    /// Under pandas 3 the official client stores the first cell of a column of strings, which is all of it in a part of one
    /// row.
    #[test]
    fn parts_may_have_lost_cells_or_not() {
        let part = |rows: u64| {
            let blob = json!({"id": "o8000000000000100", "typename": "vineyard::Blob", "instance_id": 1});
            let tensor = json!({"id": "o0000000000000002", "typename": "vineyard::Tensor<int64>", "instance_id": 1,
                "value_type_": "int64", "shape_": format!("[{rows}]"), "buffer_": blob});
            let scalar = json!({"id": "o0000000000000003", "typename": "vineyard::Scalar<std::string>",
                "instance_id": 1, "value_": "a"});
            json!({"id": "o0000000000000004", "typename": "vineyard::DataFrame", "instance_id": 1,
                "columns_": "[\"x\", \"s\"]", "__values_-size": 2, "__values_-key-0": "\"x\"",
                "__values_-value-0": tensor, "__values_-key-1": "\"s\"", "__values_-value-1": scalar})
        };
        for rows in [[2, 1], [1, 2]] {
            let whole = json!({"id": "o0000000000000010", "typename": "vineyard::GlobalDataFrame", "global": true,
                "instance_id": u64::MAX, "partitions_-size": 2, "partitions_-0": part(rows[0]),
                "partitions_-1": part(rows[1])});
            let table = global_frame(&Meta::new(whole).unwrap(), &Nothing).unwrap();
            assert_eq!(table.batches.iter().map(|batch| batch.rows).collect::<Vec<_>>(), rows);
            assert!(table.schema.field(1).metadata().get(NOTE).unwrap().contains("only the first cell"));
            assert!(table.schema.field(0).metadata().is_empty());
        }
    }
}
