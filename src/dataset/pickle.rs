//! Pickles: what can be known without running them.
//!
//! The official client pickles columns that vineyard has no type for (datetimes, nullable integers, mixed objects).
//! [`machine`] reads a pickle into plain values and never calls anything; [`column`] recognises the shapes that numpy,
//! pandas and pyarrow give their arrays. Raw values stay places in the pickle's blob; what has to be laid out anew
//! (strings, offsets) becomes literal bytes, bounded by the machine's limits.

mod column;
mod machine;
mod objects;
mod pyarrow;

use serde_json::Value as Json;

use super::frame::Cells;
use super::span::Span;
use crate::error::Result;
use crate::vineyard::BlobSource;
use machine::{Loaded, Ref, Stop, Value};

/// Deepest nesting of arrays in arrays, types in types.
const MAX_DEPTH: usize = 16;
/// Largest pickle inside a sequence that is shown as JSON.
const MAX_JSON: u64 = 64 << 10;

/// What a pickle of a column holds. `rows` is the number of values that it should have, if that is known.
///
/// # Errors
/// What the source says of the blob; a pickle that is not understood is [`Cells::Opaque`].
pub fn cells(pickle: Span, rows: Option<u64>, source: &dyn BlobSource) -> Result<Cells> {
    pickle.validate(source)?;
    let loaded = match machine::load(&pickle, source) {
        Ok(loaded) => loaded,
        Err(Stop::Source(error)) => return Err(error),
        Err(Stop::Unknown(why)) => return Ok(Cells::Opaque(pickle, why)),
    };
    let cells = match column::cells(&loaded, loaded.root, source) {
        Ok(cells) => cells,
        Err(Stop::Source(error)) => return Err(error),
        Err(Stop::Unknown(why)) => return Ok(Cells::Opaque(pickle, why)),
    };
    let found = match &cells {
        Cells::Column(column) => Some(column.layout.len),
        Cells::Levels(levels) => levels.first().map(|level| level.layout.len),
        _ => None,
    };
    match (found, rows) {
        (Some(found), Some(rows)) if found != rows => {
            Ok(Cells::Opaque(pickle, format!("a pickled array of {found} values where {rows} are expected")))
        }
        _ => Ok(cells),
    }
}

/// The JSON form of a small pickled value, if it has one.
pub fn json(pickle: &Span, source: &dyn BlobSource) -> Option<Json> {
    if pickle.len() > MAX_JSON || pickle.validate(source).is_err() {
        return None;
    }
    let loaded = machine::load(pickle, source).ok()?;
    // A small pickle can refer to one value many times at each level; the budget bounds what that unfolds to.
    json_value(&loaded, loaded.root, 0, &mut 10_000)
}

fn json_value(loaded: &Loaded, at: Ref, depth: usize, budget: &mut usize) -> Option<Json> {
    *budget = budget.checked_sub(1)?;
    if depth > MAX_DEPTH {
        return None;
    }
    let mut list = |items: &[Ref]| {
        items.iter().map(|item| json_value(loaded, *item, depth + 1, budget)).collect::<Option<Vec<_>>>()
    };
    Some(match loaded.value(at)? {
        Value::None => Json::Null,
        Value::Bool(b) => Json::Bool(*b),
        Value::Int(n) => Json::from(*n),
        Value::Float(f) => Json::Number(serde_json::Number::from_f64(*f)?),
        Value::Str { .. } => Json::from(loaded.text(at)?),
        Value::Tuple(items) | Value::List(items) => Json::Array(list(items)?),
        Value::Dict(pairs) => {
            let mut map = serde_json::Map::new();
            for (key, value) in pairs {
                map.insert(loaded.text(*key)?.to_string(), json_value(loaded, *value, depth + 1, budget)?);
            }
            Json::Object(map)
        }
        _ => return None,
    })
}
