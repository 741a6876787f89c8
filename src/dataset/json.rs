//! Values with a JSON form: scalars, and sequences of them.
//! Layout: `python/vineyard/data/default.py` and `modules/basic/ds/{scalar,sequence}.vineyard-mod` of v6d 0.24.

use serde_json::{Value, json};

use crate::error::Result;
use crate::vineyard::{BlobSource, Meta};

/// `vineyard::Scalar`. What the writer could not store (NaN, large integers) is said.
///
/// # Errors
/// `Malformed` if there is no value.
pub fn scalar(meta: &Meta) -> Result<Value> {
    let Some(value) = meta.get("value_") else { return Err(meta.error("has no \"value_\"")) };
    let python_type = meta.get("type_").and_then(Value::as_str).unwrap_or_default();
    Ok(match (value, python_type) {
        // The official client turns integers from 2^63 on into true.
        (Value::Bool(_), "int") => {
            json!({"typename": meta.typename(), "note": "the writer lost this integer: it is past 64 bits"})
        }
        (Value::Null, "float") => {
            json!({"typename": meta.typename(), "note": "NaN or an infinity, which the writer stored as null"})
        }
        (value, _) => value.clone(),
    })
}

/// A member of a sequence: its value, or a note on what it is.
fn element(meta: &Meta, source: &dyn BlobSource) -> Result<Value> {
    match meta.base_type() {
        "vineyard::Scalar" => scalar(meta),
        "vineyard::Sequence" => sequence(meta, source),
        "vineyard::PickleBuffer" => {
            let pickle = super::arrow::pickle_span(meta)?;
            Ok(super::pickle::json(&pickle, source).unwrap_or_else(|| note(meta)))
        }
        _ => Ok(note(meta)),
    }
}

fn note(meta: &Meta) -> Value {
    let mut note = json!({"typename": meta.typename(), "id": meta.id().to_string()});
    for key in ["shape_", "length_", "num_rows_", "row_num_", "columns_", "size_"] {
        if let Some(value) = meta.get(key) {
            note[key.trim_end_matches('_')] = value.clone();
        }
    }
    note
}

/// `vineyard::Sequence`, as a list.
///
/// # Errors
/// `Malformed` if a member is missing.
pub fn sequence(meta: &Meta, source: &dyn BlobSource) -> Result<Value> {
    let elements = meta.list("__elements_")?;
    elements.iter().map(|member| element(member, source)).collect::<Result<Vec<_>>>().map(Value::Array)
}
