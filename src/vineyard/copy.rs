//! Copies of objects of other instances in the memory of this one.
//!
//! vineyardd can make such copies itself (`migrate_object`, `src/server/server/vineyard_server.cc` of v6d 0.24), and by
//! default compresses every byte on the way. Here blobs travel as they are, over several connections, and are written to
//! where they stay. Like vineyardd's, a copy has new ids and the signatures of the original.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::content::BLOB_TYPE;
use super::id::{BlobKey, InstanceId, ObjectId};
use super::meta::Meta;
use super::store::{NewBlob, Store};
use crate::error::{Context, Error, Kind, Result};

/// Bytes that are written at a time.
const PIECE: u64 = 4 << 20;
/// Bytes that are on their way beyond the blob that is written.
const AHEAD: u64 = 256 << 20;

/// Told how many more bytes are here; an error ends the copying.
pub type Progress<'a> = &'a mut dyn FnMut(u64) -> Result<()>;

/// What has been made; taken back on drop.
struct Made<'a> {
    store: &'a dyn Store,
    blobs: Vec<ObjectId>,
    objects: Vec<ObjectId>,
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        self.store.take_back(&self.objects, &self.blobs);
    }
}

/// Bytes of the blobs of an object, which a copy needs in the store.
///
/// # Errors
/// `Unreachable` if its instance cannot be asked; `Stale` if a blob is gone.
pub fn copy_size(store: &dyn Store, meta: &Meta) -> Result<u64> {
    let blobs = meta.blobs();
    store.prepare(&blobs)?;
    blobs.iter().map(|key| store.size(*key)).sum()
}

/// Refuses what has no copy of its own.
///
/// # Errors
/// `Unsupported` for an object whose members live on several instances.
pub fn whole(meta: &Meta) -> Result<()> {
    if meta.instance() == InstanceId::UNSPECIFIED || meta.get("global") == Some(&Value::Bool(true)) {
        let what = format!("{} is spread over instances: its parts stay where they are", meta.id());
        return Err(Error::new(Kind::Unsupported, what));
    }
    Ok(())
}

/// Makes a permanent copy on the instance of `store`, with some plain values of the root added. All or nothing.
///
/// # Errors
/// `Unsupported` for an object whose members live on several instances; `Full`; `Stale` if the object goes meanwhile;
/// `Unreachable`; `Remote` if data of other instances may not be brought; what `progress` says.
pub fn copy_object(store: &dyn Store, meta: &Meta, extra: Map<String, Value>, progress: Progress) -> Result<ObjectId> {
    whole(meta)?;
    let here = store.instance()?.id;
    let keys = meta.blobs();
    store.prepare(&keys)?;
    let sizes = keys.iter().map(|key| store.size(*key)).collect::<Result<Vec<u64>>>()?;
    let blobs =
        store.create_blobs(&sizes).context(|| format!("room for a copy of {} bytes", sizes.iter().sum::<u64>()))?;
    let stored = blobs.iter().map(|blob| blob.id).filter(|id| id.is_stored_blob()).collect();
    let mut made = Made { store, blobs: stored, objects: Vec::new() };
    fill(store, &keys, &blobs, progress)?;
    store.seal_blobs(&made.blobs)?;
    let places: HashMap<BlobKey, ObjectId> = keys.into_iter().zip(blobs.iter().map(|blob| blob.id)).collect();
    let tree = meta.to_json();
    let root = objects(&mut made, here, &tree, &places, extra)?;
    store.persist(root)?;
    made.blobs.clear();
    made.objects.clear();
    Ok(root)
}

fn fill(store: &dyn Store, keys: &[BlobKey], blobs: &[NewBlob], progress: Progress) -> Result<()> {
    let mut asked = 0;
    let mut ahead = 0u64;
    for (at, (&key, blob)) in keys.iter().zip(blobs).enumerate() {
        if blob.size == 0 {
            continue;
        }
        // The next blobs are on their way while this one is written.
        asked = asked.max(at + 1);
        while let Some((next, size)) = keys.get(asked).zip(blobs.get(asked).map(|blob| blob.size))
            && ahead < AHEAD
        {
            store.want(&[(*next, 0..size)], true)?;
            ahead += size;
            asked += 1;
        }
        let mut position = 0;
        store.want(&[(key, 0..blob.size)], false)?;
        while position < blob.size {
            let end = position.saturating_add(PIECE).min(blob.size);
            match store.arrived(key, position..end)? {
                Some(bytes) => blob.write(position, bytes.as_ref())?,
                None => {
                    let mut bytes = vec![0; (end - position) as usize];
                    store.read(key, position, &mut bytes)?;
                    blob.write(position, &bytes)?;
                }
            }
            progress(end - position)?;
            position = end;
        }
        store.verify(&[key])?;
        ahead = ahead.saturating_sub(blob.size);
    }
    Ok(())
}

/// An object that is to be copied, and after how many others.
struct Planned<'t> {
    id: ObjectId,
    tree: &'t Map<String, Value>,
    level: usize,
}

fn id_of(tree: &Map<String, Value>) -> Result<ObjectId> {
    tree.get("id").and_then(Value::as_str).unwrap_or_default().parse()
}

/// Lists an object after its members, each once, and tells its level.
fn plan<'t>(tree: &'t Map<String, Value>, out: &mut Vec<Planned<'t>>) -> Result<usize> {
    let id = id_of(tree)?;
    if let Some(known) = out.iter().find(|planned| planned.id == id) {
        return Ok(known.level);
    }
    let mut level = 0;
    for member in tree.values().filter_map(Value::as_object) {
        if member.get("typename").and_then(Value::as_str) != Some(BLOB_TYPE) {
            level = level.max(plan(member, out)? + 1);
        }
    }
    out.push(Planned { id, tree, level });
    Ok(level)
}

/// Creates the objects of a tree, members first, one request for each level.
fn objects(
    made: &mut Made,
    here: InstanceId,
    tree: &Value,
    blobs: &HashMap<BlobKey, ObjectId>,
    extra: Map<String, Value>,
) -> Result<ObjectId> {
    let root = tree.as_object().ok_or_else(|| Error::malformed("metadata is no JSON object"))?;
    let mut planned = Vec::new();
    let last = plan(root, &mut planned)?;
    let mut copies: HashMap<ObjectId, ObjectId> = HashMap::new();
    for level in 0..=last {
        let now: Vec<&Planned> = planned.iter().filter(|planned| planned.level == level).collect();
        let mut contents = Vec::with_capacity(now.len());
        for planned in &now {
            let mut content = content(planned.tree, here, blobs, &copies)?;
            if level == last {
                content.extend(extra.clone());
            }
            contents.push(Value::Object(content));
        }
        let created = made.store.create_objects(contents)?;
        made.objects.extend(created.iter().map(|created| created.id));
        copies.extend(now.iter().map(|planned| planned.id).zip(created.iter().map(|created| created.id)));
    }
    let made = id_of(root).ok().and_then(|id| copies.get(&id).copied());
    made.ok_or_else(|| Error::new(Kind::Internal, "the copy has no root"))
}

/// The metadata of a copy.
fn content(
    tree: &Map<String, Value>,
    here: InstanceId,
    blobs: &HashMap<BlobKey, ObjectId>,
    copies: &HashMap<ObjectId, ObjectId>,
) -> Result<Map<String, Value>> {
    let missing = || Error::malformed("a member without an object");
    let mut content = Map::new();
    for (key, value) in tree {
        let value = match value {
            // The last is a name of the original; a copy has its own.
            _ if matches!(key.as_str(), "id" | "instance_id" | "transient" | "__name") => continue,
            Value::Object(member) => {
                let id = id_of(member)?;
                if member.get("typename").and_then(Value::as_str) == Some(BLOB_TYPE) {
                    let instance = member.get("instance_id").and_then(Value::as_u64);
                    let instance = instance.map_or(InstanceId::UNSPECIFIED, InstanceId);
                    let copy = match id {
                        ObjectId::EMPTY_BLOB => id,
                        id => *blobs.get(&BlobKey { instance, id }).ok_or_else(missing)?,
                    };
                    json!({"id": copy.to_string(), "typename": BLOB_TYPE, "instance_id": here.0})
                } else {
                    json!({"id": copies.get(&id).ok_or_else(missing)?.to_string()})
                }
            }
            plain => plain.clone(),
        };
        content.insert(key.clone(), value);
    }
    Ok(content)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::vineyard::BlobSource;
    use crate::vineyard::fake::{FakeStore, Op};

    fn bed() -> (FakeStore, Meta) {
        let store = FakeStore::new(64 << 20);
        let bytes: Vec<u8> = (0..9u32 << 20).map(|i| (i >> 7) as u8).collect();
        let blob = |key: BlobKey| json!({"id": key.id.to_string(), "typename": BLOB_TYPE});
        let (large, small) = (store.put_blob(&bytes).unwrap(), store.put_blob(b"small").unwrap());
        let empty = json!({"id": ObjectId::EMPTY_BLOB.to_string(), "typename": BLOB_TYPE});
        let leaf = json!({"typename": "leaf", "a_": blob(large), "b_": blob(small), "c_": empty});
        let leaf = store.put_object("leaf", leaf).unwrap();
        let member = json!({"id": leaf.to_string()});
        let root = json!({"typename": "root", "x_": member, "y_": member, "z_": blob(small), "n": 7, "__name": "root"});
        let root = store.put_object("root", root).unwrap();
        let meta = store.metas(&[root], true).unwrap().remove(&root).unwrap().unwrap();
        (store, meta)
    }

    #[test]
    fn a_copy_has_the_values_the_sharing_and_the_signature() {
        let (store, meta) = bed();
        let (objects, blobs) = (store.object_count(), store.blob_count());
        let mut told = 0;
        let extra = Map::from_iter([("of".to_owned(), json!("x"))]);
        let copy = copy_object(&store, &meta, extra, &mut |n| {
            told += n;
            Ok(())
        });
        let copy = copy.unwrap();
        assert_eq!(told, copy_size(&store, &meta).unwrap());
        assert_eq!((store.object_count(), store.blob_count()), (objects + 2, blobs + 2), "shared parts stay shared");
        let copy = store.metas(&[copy], true).unwrap().remove(&copy).unwrap().unwrap();
        assert_eq!(copy.signature(), meta.signature());
        assert_eq!((copy.get("n"), copy.get("of")), (Some(&json!(7)), Some(&json!("x"))));
        for key in ["x_", "y_"] {
            for part in ["a_", "b_", "c_"] {
                let (from, to) = (meta.member(key).unwrap().blob(part).unwrap(), copy.member(key).unwrap().blob(part));
                let to = to.unwrap();
                assert!(from != to || from.id == ObjectId::EMPTY_BLOB);
                let mut bytes =
                    [vec![0; store.size(from).unwrap() as usize], vec![1; store.size(to).unwrap() as usize]];
                store.read(from, 0, &mut bytes[0]).unwrap();
                store.read(to, 0, &mut bytes[1]).unwrap();
                assert!(bytes[0] == bytes[1], "{key} {part}");
            }
        }
    }

    #[test]
    fn nothing_is_left_of_a_copy_that_fails() {
        let (store, meta) = bed();
        let before = (store.object_count(), store.blob_count());
        for op in [Op::CreateBlobs, Op::SealBlobs, Op::CreateObjects, Op::Persist, Op::Verify] {
            store.fail_next(op, 1, Kind::Unavailable);
            let failed = copy_object(&store, &meta, Map::new(), &mut |_| Ok(()));
            assert_eq!(failed.unwrap_err().kind(), Kind::Unavailable, "{op:?}");
            assert_eq!((store.object_count(), store.blob_count()), before, "after {op:?}");
        }
        let stopped = copy_object(&store, &meta, Map::new(), &mut |_| Err(Error::new(Kind::Os(libc::EINTR), "stop")));
        assert_eq!(stopped.unwrap_err().kind(), Kind::Os(libc::EINTR));
        assert_eq!((store.object_count(), store.blob_count()), before);
    }
}
