//! Checks and completes the metadata of a new object before it is sent.
//!
//! vineyardd aborts, or stores metadata that nobody can read again, when it is given certain shapes; so every content
//! goes through [`complete`] first. Rules: `src/server/util/meta_tree.cc` and `src/common/util/protocols.cc` of v6d
//! 0.24.

use serde_json::{Map, Value, json};

use super::id::{InstanceId, ObjectId};
use super::meta::MAX_DEPTH;
use crate::error::{Error, Kind, Result};

/// The type name of blobs.
pub const BLOB_TYPE: &str = "vineyard::Blob";

fn refuse(what: impl Into<String>) -> Error {
    Error::new(Kind::Invalid, format!("metadata of a new object {}", what.into()))
}

/// The members (keys whose value is a JSON object) of `content`, with their ids.
pub(crate) fn members(content: &Map<String, Value>) -> impl Iterator<Item = (&String, Option<ObjectId>)> {
    content.iter().filter_map(|(key, value)| {
        let member = value.as_object()?;
        Some((key, member.get("id").and_then(Value::as_str).and_then(|id| id.parse().ok())))
    })
}

/// Checks the content of a new object on `instance` and fills in what may be left out: `instance_id`, `transient`,
/// `global`, and `instance_id` of member blobs.
///
/// # Errors
/// `Invalid` for everything that vineyardd would refuse, store unreadably, or die of.
pub fn complete(content: Value, instance: InstanceId) -> Result<Map<String, Value>> {
    let Value::Object(mut content) = content else {
        return Err(refuse("is no JSON object"));
    };
    content.entry("global").or_insert(json!(false));
    complete_in_place(&mut content, instance)?;
    Ok(content)
}

/// As [`complete`], without `global`: an object that does not say so is not.
///
/// # Errors
/// As [`complete`].
pub fn complete_in_place(content: &mut Map<String, Value>, instance: InstanceId) -> Result<()> {
    match content.get("typename").and_then(Value::as_str) {
        Some(BLOB_TYPE) => return Err(refuse("says that it is a blob")),
        Some("") => return Err(refuse("has an empty \"typename\"")),
        // A link to a member is stored as "ID.TYPE@INSTANCE", the type cut at its first `<`.
        Some(name) if name.split('<').next().is_some_and(|base| base.contains(['.', '@'])) => {
            return Err(refuse(format!("has a type {name:?} with a '.' or '@': no object could have it as a member")));
        }
        Some(_) => {}
        None => return Err(refuse("has no \"typename\"")),
    }
    if content.get("signature").is_some_and(|s| !s.is_u64()) {
        return Err(refuse("has a \"signature\" that is no integer"));
    }
    content.entry("instance_id").or_insert_with(|| json!(instance.0));
    content.entry("transient").or_insert(json!(true));
    if content.get("instance_id").and_then(Value::as_u64) != Some(instance.0) {
        return Err(refuse(format!("belongs to another instance than {instance}")));
    }
    for (key, value) in content {
        check_key(key)?;
        if let Value::Object(member) = value {
            complete_member(key, member, instance)?;
        } else if depth(value) > MAX_DEPTH {
            return Err(refuse(format!("nests too deep at {key:?}")));
        }
    }
    Ok(())
}

/// Checks a key: on the server it is a part of a JSON pointer.
///
/// # Errors
/// `Invalid`.
pub fn check_key(key: &str) -> Result<()> {
    match key.contains(['/', '~']) {
        true => Err(refuse(format!("has a key {key:?} with a '/' or '~'"))),
        false => Ok(()),
    }
}

fn complete_member(key: &str, member: &mut Map<String, Value>, instance: InstanceId) -> Result<()> {
    let id = member.get("id").and_then(Value::as_str).and_then(|text| text.parse::<ObjectId>().ok());
    let Some(id) = id.filter(|&id| id != ObjectId::INVALID) else {
        return Err(refuse(format!("has an object at {key:?} without a valid \"id\"; an object value is a member")));
    };
    if id.is_blob() {
        if member.get("typename").and_then(Value::as_str) != Some(BLOB_TYPE) {
            return Err(refuse(format!("has a blob at {key:?} without the typename {BLOB_TYPE:?}")));
        }
        member.entry("instance_id").or_insert_with(|| json!(instance.0));
    }
    Ok(())
}

/// Checks what a copy of an object's metadata is to say anew: plain values only.
///
/// # Errors
/// `Invalid`.
pub fn check_extra(extra: &Map<String, Value>) -> Result<()> {
    for (key, value) in extra {
        if value.is_object() || value.is_array() || key.contains(['/', '~']) {
            return Err(refuse(format!("has a key {key:?} that a copy can't have")));
        }
        if matches!(key.as_str(), "id" | "signature" | "instance_id" | "typename") {
            return Err(refuse(format!("has another {key:?} than the original")));
        }
    }
    Ok(())
}

fn depth(value: &Value) -> usize {
    // Breadth first, so that a deep value cannot exhaust the stack here.
    let mut level: Vec<&Value> = vec![value];
    let mut depth = 0;
    while !level.is_empty() && depth <= MAX_DEPTH {
        depth += 1;
        level = level
            .into_iter()
            .flat_map(|v| match v {
                Value::Array(list) => list.iter().collect(),
                Value::Object(map) => map.values().collect(),
                _ => Vec::new(),
            })
            .collect();
    }
    depth
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const HERE: InstanceId = InstanceId(7);

    #[test]
    fn fills_in_what_is_absent() {
        let content = complete(
            json!({"typename": "vineyard::Tensor<a.b>", "buffer_": {"id": "o8000000000000000", "typename": BLOB_TYPE},
                "member_": {"id": "o0000000000000001"}}),
            HERE,
        )
        .unwrap();
        assert_eq!(content["instance_id"], 7);
        assert_eq!(content["transient"], true);
        assert_eq!(content["global"], false);
        assert_eq!(content["buffer_"]["instance_id"], 7);
        assert_eq!(members(&content).count(), 2);
    }

    #[test]
    fn refuses_what_would_hurt_the_server() {
        let mut deep = json!(1);
        for _ in 0..=MAX_DEPTH {
            deep = json!([deep]);
        }
        for content in [
            json!("x"),
            json!({}),
            json!({"typename": 3}),
            json!({"typename": "vineyard::Blob"}),
            json!({"typename": "a.b<c>"}),
            json!({"typename": "a@b"}),
            json!({"typename": "t", "signature": "s1"}),
            json!({"typename": "t", "signature": -1}),
            json!({"typename": "t", "instance_id": 8}),
            json!({"typename": "t", "a/b": 1}),
            json!({"typename": "t", "a~b": 1}),
            json!({"typename": "t", "m": {}}),
            json!({"typename": "t", "m": {"id": 5}}),
            json!({"typename": "t", "m": {"id": "offffffffffffffff", "typename": "vineyard::Blob"}}),
            json!({"typename": "t", "m": {"id": "o8000000000000000"}}),
            json!({"typename": "t", "x": deep}),
        ] {
            let error = complete(content.clone(), HERE).unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid, "{content}");
        }
        for extra in [json!({"a": {}}), json!({"a": [1]}), json!({"a/b": 1}), json!({"signature": "x"})] {
            assert!(check_extra(extra.as_object().unwrap()).is_err(), "{extra}");
        }
        assert!(check_extra(json!({"a": 1, "b": null}).as_object().unwrap()).is_ok());
    }
}
