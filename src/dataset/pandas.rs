//! The `pandas` key of a schema: what pandas needs to restore index, names and dtypes.
//! Format: <https://pandas.pydata.org/docs/development/developer.html> and `python/pyarrow/pandas_compat.py` of
//! Apache Arrow.

use std::collections::HashSet;

use arrow_schema::Metadata;
use serde_json::{Value, json};

use super::frame::Frame;

/// Names of a frame's fields.
pub struct Names {
    /// One for each column.
    pub columns: Vec<String>,
    /// One for each level of the index, different from all others.
    pub index: Vec<String>,
}

impl Names {
    /// The names that pandas gives: labels as text, and `__index_level_0__` for levels without a free name.
    pub fn of(frame: &Frame) -> Names {
        let columns: Vec<String> = frame.columns.iter().map(|(label, _)| text(label)).collect();
        let mut taken: HashSet<String> = columns.iter().cloned().collect();
        let mut index = Vec::new();
        for (level, (name, _)) in frame.index.iter().enumerate() {
            let own = (!name.is_null()).then(|| text(name)).filter(|name| !taken.contains(name));
            let mut chosen = own.unwrap_or_else(|| format!("__index_level_{level}__"));
            // Even that can be a column's name.
            while taken.contains(&chosen) {
                chosen.push('_');
            }
            taken.insert(chosen.clone());
            index.push(chosen);
        }
        Names { columns, index }
    }
}

/// A label as pandas writes it into a field name.
fn text(label: &Value) -> String {
    match label {
        Value::String(text) => text.clone(),
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(|item| quoted(&text(item))).collect();
            match items.as_slice() {
                [one] => format!("({one},)"),
                items => format!("({})", items.join(", ")),
            }
        }
        other => other.to_string(),
    }
}

/// A string as Python's `repr` has it: readers evaluate the tuple's text as Python literals.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if (c as u32) < 0x20 || c as u32 == 0x7f => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// The type of an axis' labels.
fn axis<'a>(labels: impl Iterator<Item = &'a Value> + Clone) -> Value {
    let all = |test: fn(&Value) -> bool| labels.clone().next().is_some() && labels.clone().all(test);
    let (pandas_type, numpy_type, metadata) = if all(|v| v.is_i64() || v.is_u64()) {
        ("int64", "int64", Value::Null)
    } else if all(Value::is_number) {
        ("float64", "float64", Value::Null)
    } else if all(Value::is_boolean) {
        ("bool", "bool", Value::Null)
    } else if all(Value::is_string) {
        ("unicode", "str", json!({"encoding": "UTF-8"}))
    } else if labels.clone().next().is_none() {
        ("empty", "object", Value::Null)
    } else {
        ("mixed", "object", Value::Null)
    };
    json!({"name": null, "field_name": null, "pandas_type": pandas_type, "numpy_type": numpy_type,
        "metadata": metadata})
}

/// The number of levels if every label is a tuple of as many parts, at least two.
fn levels(frame: &Frame) -> Option<usize> {
    let mut lengths = frame.columns.iter().map(|(label, _)| label.as_array().map_or(0, Vec::len));
    let first = lengths.next().filter(|n| *n > 1)?;
    lengths.all(|n| n == first).then_some(first)
}

/// The value of the `pandas` key.
pub fn metadata(frame: &Frame, names: &Names) -> Value {
    let levels = levels(frame);
    let column_indexes: Vec<Value> = match levels {
        Some(n) => (0..n).map(|i| axis(frame.columns.iter().filter_map(move |(label, _)| label.get(i)))).collect(),
        None => vec![axis(frame.columns.iter().map(|(label, _)| label))],
    };
    // Labels of one type are restored from the text by that type; mixed ones are kept as they are.
    let mixed = column_indexes.first().is_some_and(|axis| axis["pandas_type"] == "mixed") && levels.is_none();
    let entry = |name: Value, field: &str, column: &super::column::Column| {
        let pandas = &column.pandas;
        json!({"name": name, "field_name": field, "pandas_type": pandas.pandas_type,
            "numpy_type": pandas.numpy_type, "metadata": pandas.metadata})
    };
    let mut columns: Vec<Value> = Vec::new();
    for ((label, column), field) in frame.columns.iter().zip(&names.columns) {
        let name = if mixed && !label.is_array() { label.clone() } else { json!(field) };
        columns.push(entry(name, field, column));
    }
    for ((name, column), field) in frame.index.iter().zip(&names.index) {
        let name = if name.is_array() { json!(text(name)) } else { name.clone() };
        columns.push(entry(name, field, column));
    }
    let index_columns = match frame.index.as_slice() {
        [] => json!([range(frame.rows)]),
        _ => json!(names.index),
    };
    json!({"index_columns": index_columns, "column_indexes": column_indexes, "columns": columns, "attributes": {},
        "creator": {"library": "vineyard-fs", "version": env!("CARGO_PKG_VERSION")}, "pandas_version": "3.1.1"})
}

fn range(rows: u64) -> Value {
    json!({"kind": "range", "name": null, "start": 0, "stop": rows, "step": 1})
}

/// Schema metadata whose range index, if that is the index, covers `rows` rows.
pub fn with_rows(metadata: &Metadata, rows: u64) -> Metadata {
    let mut metadata = metadata.clone();
    if let Some(text) = metadata.get("pandas")
        && let Ok(mut pandas) = serde_json::from_str::<Value>(text)
        && let Some(first) = pandas.get_mut("index_columns").and_then(|list| list.get_mut(0))
        && first.get("kind").is_some_and(|kind| kind == "range")
    {
        *first = range(rows);
        metadata.insert("pandas", pandas.to_string());
    }
    metadata
}
