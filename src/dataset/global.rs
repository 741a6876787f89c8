//! Objects that are spread over instances: in which order their parts make one dataset.
//!
//! A part says where it belongs if its maker told (`partition_index_` of tensors, `partition_index_row_` and
//! `partition_index_column_` of frames, `python/vineyard/data/` of v6d 0.24). Parts that do not say so are in the order
//! of the list, which is what the official client takes.

use crate::error::Result;
use crate::vineyard::Meta;

/// Where a part belongs: a number for each dimension. `None` if that is not known.
fn index(part: &Meta) -> Option<Vec<u64>> {
    if part.get("partition_index_row_").is_some() {
        let number = |key: &str| part.unsigned(key).ok();
        return Some(vec![number("partition_index_row_")?, number("partition_index_column_")?]);
    }
    let list = part.json_text("partition_index_").ok()?;
    let index: Vec<u64> = list.as_array()?.iter().map(|n| n.as_u64()).collect::<Option<_>>()?;
    Some(index).filter(|index| !index.is_empty())
}

/// How many parts a global object has along each dimension, as far as it says so.
fn counts(meta: &Meta) -> Option<Vec<u64>> {
    match meta.get("partition_shape_column_") {
        Some(_) => {
            Some(vec![meta.unsigned("partition_shape_row_").ok()?, meta.unsigned("partition_shape_column_").ok()?])
        }
        None => meta.shape("partition_shape_").ok(),
    }
}

/// The parts of a global object, in the order of its rows.
///
/// # Errors
/// `Malformed` if it is cut along another dimension too.
pub fn parts(meta: &Meta) -> Result<Vec<Meta>> {
    let mut parts = meta.list("partitions_")?;
    let refuse = |what: &str| meta.error(format!("is cut along {what}: only what is cut along its rows is shown"));
    match parts.iter().map(index).collect::<Option<Vec<_>>>() {
        Some(indices) => {
            let rest = |index: &Vec<u64>| index.get(1..).map(<[u64]>::to_vec);
            if indices.iter().any(|index| rest(index) != indices.first().and_then(rest)) {
                return Err(refuse("several dimensions"));
            }
            let mut rows: Vec<u64> = indices.iter().filter_map(|index| index.first().copied()).collect();
            rows.sort_unstable();
            rows.dedup();
            // Several at one place are in the order of the list.
            if rows.len() == parts.len() {
                parts.sort_by_cached_key(index);
            }
        }
        // Some give the shape of a part instead.
        None => {
            let counts = counts(meta).unwrap_or_default();
            let product = counts.iter().try_fold(1u64, |product, count| product.checked_mul(*count));
            if product == Some(parts.len() as u64) && counts.iter().skip(1).any(|count| *count > 1) && !has_shape(meta)
            {
                return Err(refuse("several dimensions, and its parts do not say where they belong"));
            }
        }
    }
    if meta.unsigned("partition_shape_column_").is_ok_and(|columns| columns > 1) {
        return Err(refuse("its columns"));
    }
    Ok(parts)
}

/// Whether it is told how large the whole is, so that parts in a wrong place are noticed.
fn has_shape(meta: &Meta) -> bool {
    meta.get("shape_").is_some()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::error::Kind;

    fn global(keys: Value, parts: &[Value]) -> Meta {
        let mut tree = json!({"id": "o0000000000000001", "typename": "t", "partitions_-size": parts.len()});
        tree.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        for (i, part) in parts.iter().enumerate() {
            let mut part = part.clone();
            part["id"] = format!("o{:016x}", i + 10).into();
            part["typename"] = "part".into();
            tree[format!("partitions_-{i}")] = part;
        }
        Meta::new(tree).unwrap()
    }

    fn order(meta: &Meta) -> Vec<u64> {
        parts(meta).unwrap().iter().map(|part| part.id().0 - 10).collect()
    }

    fn tensor(index: &str) -> Value {
        json!({"partition_index_": index})
    }

    fn frame(row: i64, column: i64) -> Value {
        json!({"partition_index_row_": row, "partition_index_column_": column})
    }

    #[test]
    fn parts_go_where_they_say_they_belong() {
        let parts = ["[2]", "[0]", "[1]"].map(tensor);
        assert_eq!(order(&global(json!({"shape_": "[3]"}), &parts)), [1, 2, 0]);
        let parts = ["[10, 0]", "[9, 0]"].map(tensor);
        assert_eq!(order(&global(json!({}), &parts)), [1, 0]);
        let parts = [frame(1, 0), frame(0, 0)];
        assert_eq!(order(&global(json!({"partition_shape_row_": 2, "partition_shape_column_": 1}), &parts)), [1, 0]);
    }

    #[test]
    fn parts_that_do_not_say_so_stay_in_order() {
        for parts in [["[]", "[]"].map(tensor), ["[1]", "[]"].map(tensor), ["[0]", "[0]"].map(tensor)] {
            assert_eq!(order(&global(json!({}), &parts)), [0, 1]);
        }
        assert_eq!(order(&global(json!({}), &[frame(-1, -1), frame(-1, -1)])), [0, 1]);
        // The shape of a part, beside that of the whole.
        let keys = json!({"shape_": "[2, 2]", "partition_shape_": "[1, 2]"});
        assert_eq!(order(&global(keys, &["[]", "[]"].map(tensor))), [0, 1]);
    }

    #[test]
    fn what_is_cut_along_other_dimensions_is_refused() {
        let blocks = ["[0, 0]", "[0, 1]", "[1, 0]", "[1, 1]"].map(tensor);
        let unknown = ["[]", "[]", "[]", "[]"].map(tensor);
        let columns = [frame(0, 0), frame(0, 1)];
        let same = [frame(-1, -1), frame(-1, -1)];
        for meta in [
            global(json!({"shape_": "[4, 4]", "partition_shape_": "[2, 2]"}), &blocks),
            global(json!({"partition_shape_": "[2, 2]"}), &unknown),
            global(json!({}), &columns),
            global(json!({"partition_shape_row_": 1, "partition_shape_column_": 2}), &same),
        ] {
            let error = parts(&meta).unwrap_err();
            assert!(error.kind() == Kind::Malformed && error.to_string().contains("is cut along"), "{error}");
        }
    }
}
