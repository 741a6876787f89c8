//! Metadata of an object, as a checked view of vineyard's JSON.
//!
//! Nothing in metadata is believed: each accessor checks presence, type and range, and says which key of which object
//! breaks the rule. Layouts: `python/vineyard/data/` and `modules/basic/ds/` of v6d 0.24.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::id::{BlobKey, InstanceId, ObjectId};
use crate::error::{Error, Result};

/// Deepest tree of members that is read. Real objects have five levels; a hostile one must not exhaust the stack.
pub const MAX_DEPTH: usize = 64;
/// Most elements that a list member (`__values_-size` and the like) may announce.
pub const MAX_MEMBERS: u64 = 1 << 22;

/// Metadata of one object and, nested, of its members. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Meta {
    tree: Arc<Map<String, Value>>,
    id: ObjectId,
    instance: InstanceId,
}

impl Meta {
    /// Takes an object's metadata as `get_data` returns it.
    ///
    /// # Errors
    /// `Malformed` if it is no JSON object, has no valid `id`, no `typename` (a name that outlived its object), or
    /// nests deeper than [`MAX_DEPTH`].
    pub fn new(value: Value) -> Result<Self> {
        check_depth(&value, 0)?;
        match value {
            Value::Object(tree) => Meta::from_map(Arc::new(tree)),
            other => Err(Error::malformed(format!("metadata is {}, not a JSON object", kind_of(&other)))),
        }
    }

    fn from_map(tree: Arc<Map<String, Value>>) -> Result<Self> {
        let id = match tree.get("id") {
            Some(Value::String(text)) => text.parse()?,
            _ => return Err(Error::malformed("metadata without an \"id\"")),
        };
        if !matches!(tree.get("typename"), Some(Value::String(_))) {
            return Err(Error::malformed(format!("object {id} has no typename: the object behind it was deleted")));
        }
        let instance = tree.get("instance_id").and_then(Value::as_u64).map_or(InstanceId::UNSPECIFIED, InstanceId);
        Ok(Meta { tree, id, instance })
    }

    /// The object's id.
    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// The instance that holds the object's blobs.
    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    /// The type, such as `vineyard::Tensor<double>`.
    pub fn typename(&self) -> &str {
        self.tree.get("typename").and_then(Value::as_str).unwrap_or_default()
    }

    /// The type without its parameters: `vineyard::Tensor` of `vineyard::Tensor<double>`.
    pub fn base_type(&self) -> &str {
        self.typename().split('<').next().unwrap_or_default()
    }

    /// The type's parameters: `double` of `vineyard::Tensor<double>`, empty if there are none.
    pub fn type_parameter(&self) -> &str {
        self.typename().split_once('<').and_then(|(_, rest)| rest.strip_suffix('>')).unwrap_or_default()
    }

    /// Signature, equal for all copies of one object.
    pub fn signature(&self) -> Option<u64> {
        self.tree.get("signature").and_then(Value::as_u64)
    }

    /// Creation time in milliseconds since the epoch.
    pub fn timestamp_ms(&self) -> Option<u64> {
        self.tree.get("__timestamp").and_then(Value::as_u64)
    }

    /// The raw JSON value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.tree.get(key)
    }

    /// All keys and values.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.tree.iter()
    }

    /// The whole tree as JSON.
    pub fn to_json(&self) -> Value {
        Value::Object((*self.tree).clone())
    }

    fn required(&self, key: &str) -> Result<&Value> {
        self.tree.get(key).ok_or_else(|| self.error(format!("has no \"{key}\"")))
    }

    /// A `Malformed` error that names this object.
    pub fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::malformed(format!("object {} ({:.80}) {what}", self.id, self.typename()))
    }

    /// A string.
    pub fn string(&self, key: &str) -> Result<&str> {
        self.required(key)?.as_str().ok_or_else(|| self.error(format!("has a \"{key}\" that is no string")))
    }

    /// A non-negative integer.
    pub fn unsigned(&self, key: &str) -> Result<u64> {
        self.required(key)?
            .as_u64()
            .ok_or_else(|| self.error(format!("has a \"{key}\" that is no non-negative integer")))
    }

    /// An integer, possibly negative.
    pub fn signed(&self, key: &str) -> Result<i64> {
        self.required(key)?.as_i64().ok_or_else(|| self.error(format!("has a \"{key}\" that is no integer")))
    }

    /// JSON that is stored as text in a string (`"shape_": "[2, 5]"`).
    pub fn json_text(&self, key: &str) -> Result<Value> {
        serde_json::from_str(self.string(key)?)
            .map_err(|e| self.error(format!("has a \"{key}\" that is no JSON text")).with_source(e))
    }

    /// The shape of a tensor: non-negative lengths whose product fits `u64`.
    pub fn shape(&self, key: &str) -> Result<Vec<u64>> {
        let value = self.json_text(key)?;
        let lengths = value
            .as_array()
            .and_then(|list| list.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>())
            .ok_or_else(|| self.error(format!("has a \"{key}\" that is no list of lengths")))?;
        if lengths.len() > 64 {
            return Err(self.error(format!("has {} dimensions", lengths.len())));
        }
        lengths
            .iter()
            .try_fold(1u64, |product, &n| product.checked_mul(n))
            .ok_or_else(|| self.error(format!("has a \"{key}\" whose product overflows")))?;
        Ok(lengths)
    }

    /// A member object.
    pub fn member(&self, key: &str) -> Result<Meta> {
        match self.required(key)? {
            Value::Object(tree) => Meta::from_map(Arc::new(tree.clone())),
            other => Err(self.error(format!("has a \"{key}\" that is {}, not an object", kind_of(other)))),
        }
    }

    /// A member object, or `None` if the key is absent.
    pub fn optional_member(&self, key: &str) -> Result<Option<Meta>> {
        if self.tree.contains_key(key) { self.member(key).map(Some) } else { Ok(None) }
    }

    /// A member that is a blob, with the instance that holds it; `EMPTY_BLOB` is a blob too.
    pub fn blob(&self, key: &str) -> Result<BlobKey> {
        let member = self.member(key)?;
        member.as_blob().ok_or_else(|| self.error(format!("has a \"{key}\" that is no blob but {}", member.typename())))
    }

    /// This object as a blob, if it is one.
    pub fn as_blob(&self) -> Option<BlobKey> {
        let is_blob = self.id.is_blob() && self.id != ObjectId::INVALID && self.typename() == "vineyard::Blob";
        is_blob.then_some(BlobKey { instance: self.instance, id: self.id })
    }

    /// The length of a list member, from `PREFIX-size`.
    pub fn list_len(&self, prefix: &str) -> Result<usize> {
        let n = self.unsigned(&format!("{prefix}-size"))?;
        // Each element takes at least one key, so a list can't be longer than the map that holds it.
        if n > MAX_MEMBERS || n > self.tree.len() as u64 {
            return Err(self.error(format!("announces {n} elements of \"{prefix}\" and has {} keys", self.tree.len())));
        }
        Ok(n as usize)
    }

    /// The members `PREFIX-0` to `PREFIX-(n-1)`, where n is `PREFIX-size`.
    pub fn list(&self, prefix: &str) -> Result<Vec<Meta>> {
        (0..self.list_len(prefix)?).map(|i| self.member(&format!("{prefix}-{i}"))).collect()
    }

    /// Every blob of the tree that has bytes, in the tree's order, each once.
    pub fn blobs(&self) -> Vec<BlobKey> {
        fn walk(tree: &Map<String, Value>, seen: &mut std::collections::HashSet<BlobKey>, out: &mut Vec<BlobKey>) {
            for value in tree.values() {
                let Value::Object(member) = value else { continue };
                if member.get("typename").and_then(Value::as_str) == Some("vineyard::Blob") {
                    let id = member.get("id").and_then(Value::as_str).and_then(|t| t.parse::<ObjectId>().ok());
                    if let Some(id) = id.filter(|id| id.is_stored_blob()) {
                        let instance = member.get("instance_id").and_then(Value::as_u64);
                        let key = BlobKey { instance: instance.map_or(InstanceId::UNSPECIFIED, InstanceId), id };
                        if seen.insert(key) {
                            out.push(key);
                        }
                    }
                } else {
                    walk(member, seen, out);
                }
            }
        }
        let mut out = Vec::new();
        if let Some(blob) = self.as_blob().filter(|b| b.id.is_stored_blob()) {
            out.push(blob);
        }
        walk(&self.tree, &mut Default::default(), &mut out);
        out
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn check_depth(value: &Value, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(Error::malformed(format!("metadata nests deeper than {MAX_DEPTH} levels")));
    }
    match value {
        Value::Object(map) => map.values().try_for_each(|v| check_depth(v, depth + 1)),
        Value::Array(list) => list.iter().try_for_each(|v| check_depth(v, depth + 1)),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tensor() -> Value {
        json!({"id": "o68808e07ac400006", "typename": "vineyard::Tensor<double>", "instance_id": 3, "shape_": "[2, 5]",
            "__timestamp": 1795333562033u64, "signature": 7530174740569260037u64,
            "buffer_": {"id": "oe8808e07ac000004", "typename": "vineyard::Blob", "instance_id": 3, "length": 0}})
    }

    #[test]
    fn reads_what_is_there() {
        let meta = Meta::new(tensor()).unwrap();
        assert_eq!((meta.base_type(), meta.type_parameter()), ("vineyard::Tensor", "double"));
        assert_eq!(meta.shape("shape_").unwrap(), [2, 5]);
        let key = BlobKey { instance: InstanceId(3), id: ObjectId(0xe880_8e07_ac00_0004) };
        assert_eq!(meta.blob("buffer_").unwrap(), key);
        assert_eq!(meta.blobs(), [key]);
    }

    #[test]
    fn refuses_what_is_not() {
        assert!(Meta::new(json!([])).is_err());
        assert!(Meta::new(json!({"id": "o68808e07ac400006", "__name": "dead"})).is_err());
        let with = |key: &str, value: Value| {
            let mut v = tensor();
            v[key] = value;
            Meta::new(v).unwrap()
        };
        assert!(with("shape_", json!("[-2, 5]")).shape("shape_").is_err());
        assert!(with("shape_", json!("[4294967296, 4294967296]")).shape("shape_").is_err());
        assert!(with("shape_", json!("[")).shape("shape_").is_err());
        assert!(with("__values_-size", json!(4_000_000)).list("__values_").is_err());
        assert!(
            with("buffer_", json!({"id": "offffffffffffffff", "typename": "vineyard::Blob"})).blob("buffer_").is_err()
        );
        let mut deep = json!(1);
        for _ in 0..=MAX_DEPTH {
            deep = json!([deep]);
        }
        assert!(Meta::new(json!({"id": "o68808e07ac400006", "typename": "t", "x": deep})).is_err());
    }
}
