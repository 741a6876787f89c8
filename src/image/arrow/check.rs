//! What the flatbuffers encoder takes for granted about schemas and batches.

use arrow_schema::{DataType, Field, Schema};

use crate::dataset::{ArrayLayout, Batch};
use crate::error::{Context, Error, Kind, Result};
use crate::vineyard::meta::MAX_DEPTH;

/// Most text (names, metadata) that a schema may hold, in bytes; a flatbuffer ends at 2 GiB.
const MAX_SCHEMA_TEXT: usize = 256 << 20;
/// Most fields of a schema, nested ones included.
const MAX_FIELDS: usize = 1 << 21;

/// Checks that a schema can be written as Arrow IPC.
///
/// # Errors
/// `Unsupported` or `Malformed`, naming the column; `TooLarge`.
pub fn schema(schema: &Schema) -> Result<()> {
    let mut totals = Totals::default();
    totals.text(schema.metadata().iter().map(|(key, value)| key.len() + value.len()).sum())?;
    schema.fields().iter().try_for_each(|field| totals.field(field, 0).context(|| format!("column {:?}", field.name())))
}

#[derive(Default)]
struct Totals {
    text: usize,
    fields: usize,
}

impl Totals {
    fn text(&mut self, bytes: usize) -> Result<()> {
        self.text = self.text.saturating_add(bytes);
        if self.text > MAX_SCHEMA_TEXT {
            return Err(Error::new(Kind::TooLarge, "the schema's names and metadata are too long for an Arrow file"));
        }
        Ok(())
    }

    fn field(&mut self, field: &Field, depth: usize) -> Result<()> {
        self.fields += 1;
        if self.fields > MAX_FIELDS {
            return Err(Error::new(Kind::TooLarge, format!("the schema has more than {MAX_FIELDS} fields")));
        }
        self.text(field.name().len())?;
        self.text(field.metadata().iter().map(|(key, value)| key.len() + value.len()).sum())?;
        self.data_type(field.data_type(), depth)
    }

    fn data_type(&mut self, data_type: &DataType, depth: usize) -> Result<()> {
        if depth >= MAX_DEPTH {
            return Err(Error::malformed(format!("types nest deeper than {MAX_DEPTH}")));
        }
        match data_type {
            DataType::Dictionary(key, value) => {
                if !key.is_dictionary_key_type() {
                    return Err(Error::malformed(format!("a dictionary with keys of type {key}")));
                }
                if matches!(**value, DataType::Dictionary(..)) {
                    return Err(Error::new(Kind::Unsupported, "Arrow IPC has no dictionaries of dictionaries"));
                }
                self.data_type(value, depth + 1)
            }
            DataType::RunEndEncoded(ends, values) => {
                if !ends.data_type().is_run_ends_type() {
                    return Err(Error::malformed(format!("run ends of type {}", ends.data_type())));
                }
                self.field(ends, depth + 1)?;
                self.field(values, depth + 1)
            }
            DataType::Map(entries, _) => {
                match entries.data_type() {
                    DataType::Struct(fields) if fields.len() == 2 => {}
                    other => return Err(Error::malformed(format!("a map with entries of type {other}"))),
                }
                self.field(entries, depth + 1)
            }
            DataType::List(child)
            | DataType::LargeList(child)
            | DataType::ListView(child)
            | DataType::LargeListView(child) => self.field(child, depth + 1),
            DataType::FixedSizeList(child, size) => {
                if *size < 0 {
                    return Err(Error::malformed(format!("lists of {size} elements")));
                }
                self.field(child, depth + 1)
            }
            DataType::FixedSizeBinary(width) if *width < 0 => Err(Error::malformed(format!("values of {width} bytes"))),
            DataType::Struct(fields) => fields.iter().try_for_each(|field| self.field(field, depth + 1)),
            DataType::Union(fields, _) => fields.iter().try_for_each(|(_, field)| self.field(field, depth + 1)),
            _ => Ok(()),
        }
    }
}

/// Checks that a batch has the columns of the schema.
///
/// # Errors
/// `Malformed`, naming the column.
pub fn batch(schema: &Schema, batch: &Batch) -> Result<()> {
    if batch.columns.len() != schema.fields().len() {
        return Err(Error::malformed(format!(
            "a batch of {} columns under a schema of {}",
            batch.columns.len(),
            schema.fields().len()
        )));
    }
    for (field, column) in schema.fields().iter().zip(&batch.columns) {
        let fits = if column.len != batch.rows {
            Err(Error::malformed(format!("{} values in a batch of {} rows", column.len, batch.rows)))
        } else {
            typed(column, field.data_type())
        };
        fits.context(|| format!("column {:?}", field.name()))?;
    }
    Ok(())
}

/// Checks that an array has the type, and its children theirs.
fn typed(array: &ArrayLayout, data_type: &DataType) -> Result<()> {
    if !array.data_type.equals_datatype(data_type) {
        return Err(Error::malformed(format!(
            "an array of type {} where the schema says {data_type}",
            array.data_type
        )));
    }
    let children: Vec<&Field> = match data_type {
        DataType::List(child)
        | DataType::LargeList(child)
        | DataType::ListView(child)
        | DataType::LargeListView(child)
        | DataType::FixedSizeList(child, _)
        | DataType::Map(child, _) => vec![child],
        DataType::Struct(fields) => fields.iter().map(|field| &**field).collect(),
        DataType::Union(fields, _) => fields.iter().map(|(_, field)| &**field).collect(),
        DataType::RunEndEncoded(ends, values) => vec![ends, values],
        _ => Vec::new(),
    };
    if array.children.len() != children.len() {
        return Err(Error::malformed(format!("{} children of a {data_type}", array.children.len())));
    }
    for (child, field) in array.children.iter().zip(children) {
        typed(child, field.data_type())?;
    }
    match (data_type, &array.dictionary) {
        (DataType::Dictionary(_, values), Some(dictionary)) => typed(dictionary, values),
        (DataType::Dictionary(..), None) => Err(Error::malformed("a dictionary array without a dictionary")),
        (_, Some(_)) => Err(Error::malformed(format!("a dictionary under a {data_type}"))),
        (_, None) => Ok(()),
    }
}
