//! One decoded column: where its bytes are, and what pandas calls its type.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_schema::{DataType, Field, TimeUnit};
use serde_json::{Value, json};

use super::derive;
use super::span::Span;
use super::table::ArrayLayout;
use crate::error::Result;

/// Key of the field metadata that says why a column is not what was put.
pub const NOTE: &str = "vineyard_fs:note";
/// What the keys begin with by which a field is marked as of an extension type (Arrow's columnar format).
pub const EXTENSION: &str = "ARROW:extension:";

/// What the `pandas` key of a schema says of one column.
#[derive(Clone, Debug, PartialEq)]
pub struct PandasType {
    /// The kind of values: `int64`, `unicode`, `datetimetz`.
    pub pandas_type: String,
    /// The dtype to restore: `int64`, `Int64`, `str`, `datetime64[us]`.
    pub numpy_type: String,
    /// Null, or an object such as `{"timezone": "UTC"}`.
    pub metadata: Value,
}

/// A column before it has a name.
#[derive(Clone, Debug)]
pub struct Column {
    /// Its bytes.
    pub layout: ArrayLayout,
    /// Its pandas type.
    pub pandas: PandasType,
    /// Field metadata: extension types and notes.
    pub metadata: HashMap<String, String>,
}

impl Column {
    /// A column whose pandas type follows from its Arrow type.
    pub fn new(layout: ArrayLayout) -> Self {
        let pandas = PandasType::of(&layout.data_type);
        Column { layout, pandas, metadata: HashMap::new() }
    }

    /// The same with another dtype to restore.
    pub fn with_numpy_type(mut self, numpy_type: impl Into<String>) -> Self {
        self.pandas.numpy_type = numpy_type.into();
        self
    }

    /// The same with a note for people.
    pub fn with_note(mut self, note: impl Into<String>) -> Self {
        self.metadata.insert(NOTE.into(), note.into());
        self
    }

    /// The same, marked as an Arrow extension type.
    pub fn with_extension(mut self, name: &str, metadata: String) -> Self {
        self.metadata.insert("ARROW:extension:name".into(), name.into());
        self.metadata.insert("ARROW:extension:metadata".into(), metadata);
        self
    }

    /// The column's field under a name.
    pub fn field(&self, name: &str) -> Field {
        let ordered = self.pandas.metadata.get("ordered").and_then(Value::as_bool).unwrap_or(false);
        Field::new(name, self.layout.data_type.clone(), true)
            .with_dict_is_ordered(ordered)
            .with_metadata(self.metadata.clone())
    }

    /// A column of `rows` rows of which only the first has a value, a string or bytes.
    ///
    /// # Errors
    /// `Malformed` if `rows` is past what a column can have.
    pub fn first_cell(data_type: DataType, value: Span, rows: u64) -> Result<Column> {
        let width = super::table::fixed_width(&data_type);
        let len = value.len();
        let mut buffers = vec![first_bit(rows)?];
        match width {
            Some(_) if rows == 0 => buffers.push(Span::EMPTY),
            Some(width) => buffers.push(derive::join([value, derive::repeat(vec![0; width as usize], rows - 1)?])?),
            None if data_type == DataType::Boolean => {
                buffers.push(derive::join([value, Span::Zeros(rows.div_ceil(8))])?.slice(0, rows.div_ceil(8))?);
            }
            None => {
                let offsets = [Span::Zeros(8), derive::repeat(len.to_le_bytes().to_vec(), rows)?];
                buffers.push(derive::join(offsets)?);
                buffers.push(if rows == 0 { Span::EMPTY } else { value });
            }
        }
        let nulls = rows.saturating_sub(1);
        Ok(Column::new(ArrayLayout::flat(data_type, rows, Some(nulls), buffers)))
    }

    /// A column of the type `binary` that carries a pickle nobody could look into: in row 0, all other rows null.
    ///
    /// # Errors
    /// As [`Column::first_cell`].
    pub fn opaque(pickle: Span, rows: u64, why: &str) -> Result<Column> {
        let column = Column::first_cell(DataType::LargeBinary, pickle, rows)?;
        Ok(column.with_note(format!("{why}; row 0 holds the pickle of the whole column")))
    }
}

/// A bitmap whose first bit of `rows` alone is set; absent for one row or none.
fn first_bit(rows: u64) -> Result<Span> {
    if rows < 2 {
        return Ok(Span::EMPTY);
    }
    derive::join([Span::literal([1]), Span::Zeros(rows.div_ceil(8) - 1)])
}

/// pandas' short name of a time unit.
pub fn unit_name(unit: &TimeUnit) -> &'static str {
    match unit {
        TimeUnit::Second => "s",
        TimeUnit::Millisecond => "ms",
        TimeUnit::Microsecond => "us",
        TimeUnit::Nanosecond => "ns",
    }
}

impl PandasType {
    /// A type of these names without metadata.
    pub fn new(pandas_type: impl Into<String>, numpy_type: impl Into<String>) -> Self {
        PandasType { pandas_type: pandas_type.into(), numpy_type: numpy_type.into(), metadata: Value::Null }
    }

    /// The type that pandas gives to an Arrow type without nulls.
    /// Names: `python/pyarrow/pandas_compat.py` of Apache Arrow.
    pub fn of(data_type: &DataType) -> Self {
        let plain = |name: &str| PandasType::new(name, name);
        match data_type {
            DataType::Null => PandasType::new("empty", "object"),
            DataType::Boolean => plain("bool"),
            DataType::Int8 => plain("int8"),
            DataType::Int16 => plain("int16"),
            DataType::Int32 => plain("int32"),
            DataType::Int64 => plain("int64"),
            DataType::UInt8 => plain("uint8"),
            DataType::UInt16 => plain("uint16"),
            DataType::UInt32 => plain("uint32"),
            DataType::UInt64 => plain("uint64"),
            DataType::Float16 => plain("float16"),
            DataType::Float32 => plain("float32"),
            DataType::Float64 => plain("float64"),
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => PandasType::new("unicode", "object"),
            DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => {
                PandasType::new("bytes", "object")
            }
            DataType::Date32 | DataType::Date64 => PandasType::new("date", "object"),
            DataType::Time32(_) | DataType::Time64(_) => PandasType::new("time", "object"),
            DataType::Timestamp(unit, None) => PandasType::new("datetime", format!("datetime64[{}]", unit_name(unit))),
            DataType::Timestamp(unit, Some(zone)) => PandasType {
                pandas_type: "datetimetz".into(),
                numpy_type: format!("datetime64[{}]", unit_name(unit)),
                metadata: json!({"timezone": &**zone}),
            },
            DataType::Duration(unit) => {
                let name = format!("timedelta64[{}]", unit_name(unit));
                PandasType::new(name.clone(), name)
            }
            DataType::Dictionary(key, _) => PandasType::new("categorical", PandasType::of(key).numpy_type),
            DataType::FixedSizeList(item, _) | DataType::List(item) | DataType::LargeList(item) => {
                PandasType::new(format!("list[{}]", PandasType::of(item.data_type()).pandas_type), "object")
            }
            _ => PandasType::new("object", "object"),
        }
    }
}

/// A literal of little-endian 64-bit offsets.
pub fn offsets(values: impl IntoIterator<Item = u64>) -> Span {
    let bytes: Vec<u8> = values.into_iter().flat_map(u64::to_le_bytes).collect();
    Span::literal(bytes)
}

/// Field of list items, under the name that Arrow's format recommends.
pub fn item(data_type: &DataType) -> Arc<Field> {
    Arc::new(Field::new("item", data_type.clone(), true))
}
