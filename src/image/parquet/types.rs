//! The types that values are stored in, and their Parquet forms.

use std::sync::Arc;

use arrow_schema::{DataType, Field, FieldRef, Schema, TimeUnit};
use parquet::arrow::ArrowSchemaConverter;
use parquet::schema::types::SchemaDescPtr;

use super::runs;
use crate::error::{Context, Error, Kind, Result};

/// The schema with the types that values are stored in, and its Parquet form.
///
/// # Errors
/// `Unsupported`, naming the column, for types that Parquet lacks.
pub fn convert(schema: &Schema) -> Result<(Arc<Schema>, SchemaDescPtr)> {
    super::super::arrow::check_schema(schema)?;
    let mut fields = Vec::with_capacity(schema.fields().len());
    for field in schema.fields() {
        let context = || format!("column {:?}", field.name());
        let flat = runs::written_out(field);
        let stored = stored_field(flat.as_ref().unwrap_or(field)).context(context)?;
        // Column by column, so that an error names the column.
        descriptor(&Schema::new(vec![stored.clone()])).context(context)?;
        fields.push(stored);
    }
    let stored = Schema::new(fields);
    let descriptor = descriptor(&stored)?;
    Ok((Arc::new(stored), descriptor))
}

fn descriptor(stored: &Schema) -> Result<SchemaDescPtr> {
    let descriptor = ArrowSchemaConverter::new()
        .with_coerce_types(true)
        .convert(stored)
        .map_err(|error| Error::new(Kind::Unsupported, "Parquet has no type for it").with_source(error))?;
    Ok(Arc::new(descriptor))
}

fn stored_field(field: &FieldRef) -> Result<FieldRef> {
    let data_type = stored(field.data_type())?;
    let nullable = field.is_nullable() || data_type == DataType::Null;
    let mut field = Field::clone(field).with_data_type(data_type);
    field.set_nullable(nullable);
    Ok(Arc::new(field))
}

/// True for values that readers get back whole through a dictionary. The `parquet` crate (60.1) refuses dictionaries of
/// fixed-length byte arrays and panics on those of booleans; pyarrow (26) does not see through a dictionary in
/// `ARROW:schema` to what Parquet's own types cannot tell, such as durations and time zones.
fn keeps_dictionary(values: &DataType) -> bool {
    use DataType::*;
    values.is_integer()
        || matches!(values, Utf8 | LargeUtf8 | Utf8View | Binary | LargeBinary | BinaryView | Float32 | Float64)
}

/// Parquet's times have no seconds: they are stored in milliseconds.
fn stored(data_type: &DataType) -> Result<DataType> {
    Ok(match data_type {
        DataType::Timestamp(TimeUnit::Second, zone) => DataType::Timestamp(TimeUnit::Millisecond, zone.clone()),
        DataType::Time32(TimeUnit::Second) => DataType::Time32(TimeUnit::Millisecond),
        DataType::Union(..) | DataType::RunEndEncoded(..) | DataType::Interval(_) => {
            return Err(Error::new(Kind::Unsupported, format!("Parquet has no type for {data_type}")));
        }
        DataType::Decimal32(precision, scale) => decimal(data_type, *precision, *scale, 9)?,
        DataType::Decimal64(precision, scale) => decimal(data_type, *precision, *scale, 18)?,
        DataType::Decimal128(precision, scale) => decimal(data_type, *precision, *scale, 38)?,
        DataType::Decimal256(precision, scale) => decimal(data_type, *precision, *scale, 76)?,
        DataType::FixedSizeBinary(0) => {
            return Err(Error::new(Kind::Unsupported, "Parquet has no values of no bytes"));
        }
        DataType::FixedSizeList(_, 0) => {
            return Err(Error::new(Kind::Unsupported, "Parquet cannot tell fixed lists of no elements apart"));
        }
        DataType::List(child) => DataType::List(stored_field(child)?),
        DataType::LargeList(child) => DataType::LargeList(stored_field(child)?),
        DataType::ListView(child) => DataType::ListView(stored_field(child)?),
        DataType::LargeListView(child) => DataType::LargeListView(stored_field(child)?),
        DataType::FixedSizeList(child, size) => DataType::FixedSizeList(stored_field(child)?, *size),
        DataType::Map(child, sorted) => DataType::Map(stored_field(child)?, *sorted),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(stored_field).collect::<Result<_>>()?),
        DataType::Dictionary(key, value) => match stored(value)? {
            value if keeps_dictionary(&value) => DataType::Dictionary(key.clone(), Box::new(value)),
            value => value,
        },
        other => other.clone(),
    })
}

/// Parquet's decimals have no digits left of their precision or right of it.
fn decimal(data_type: &DataType, precision: u8, scale: i8, most: u8) -> Result<DataType> {
    match u8::try_from(scale) {
        Ok(scale) if (1..=most).contains(&precision) && scale <= precision => Ok(data_type.clone()),
        _ => Err(Error::new(Kind::Unsupported, format!("Parquet has no type for {data_type}"))),
    }
}
