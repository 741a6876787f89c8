//! What the upper floors ask of a store.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::id::{BlobKey, InstanceId, ObjectId};
use super::memory::Blob;
use super::meta::Meta;
use super::remote::{Arrived, RemoteStatus};
use crate::error::{Context, Error, Kind, Result};

/// The vineyardd behind a [`Store`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Its number in the cluster.
    pub id: InstanceId,
    /// Its Unix socket.
    pub socket: PathBuf,
    /// `host:port` of its TCP side, empty if it has none.
    pub rpc_endpoint: String,
    /// Its version, such as `0.24.2`.
    pub version: String,
    /// Counts the vineyardd processes that this client has met behind the socket: it grows when vineyardd restarts,
    /// and everything that was learned from the former one is void.
    pub generation: u64,
}

/// An instance as the cluster's metadata lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceInfo {
    /// Host name that the instance gave.
    pub hostname: String,
    /// `host:port` for other instances.
    pub rpc_endpoint: String,
    /// Its Unix socket on its own host.
    pub ipc_socket: String,
    /// Its metadata is in etcd, and so that of a cluster.
    pub shared: bool,
}

/// Use of the store's memory, in bytes, and of its connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStatus {
    /// The limit (`--size` of vineyardd).
    pub memory_limit: u64,
    /// Sum of the sizes of all live blobs.
    pub memory_usage: u64,
    /// Clients on the Unix socket.
    pub ipc_connections: u64,
    /// Clients over TCP.
    pub rpc_connections: u64,
}

/// A question to the name map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NameQuery {
    /// The name itself.
    Exact(String),
    /// At most `limit` names that begin with the prefix, in byte order. An empty prefix means all names.
    Prefix {
        /// What the names begin with.
        prefix: String,
        /// Most names to return; `None` for no limit.
        limit: Option<u64>,
    },
}

/// A name and the object that it points to.
pub type NamedObject = (String, ObjectId);

/// What `create_data` returns for one object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Created {
    /// Id of the new object.
    pub id: ObjectId,
    /// Its signature.
    pub signature: u64,
}

/// An object of a tree that is made as a whole.
#[derive(Clone, Debug)]
pub struct NewObject {
    /// As for [`Store::create_objects`], without the members that are made with it.
    pub content: Map<String, Value>,
    /// These: the key, and the place of the object in the tree, which is before this one's.
    pub members: Vec<(String, usize)>,
}

/// A fresh, unsealed blob that the caller fills.
///
/// Dropped unsealed it must be given back with [`Store::drop_blobs`]: vineyardd never reclaims it by itself.
#[derive(Debug)]
pub struct NewBlob {
    /// Id of the blob; [`ObjectId::EMPTY_BLOB`] for size 0, which needs no seal.
    pub id: ObjectId,
    /// Size in bytes.
    pub size: u64,
    /// The memory file that holds it; `None` for size 0.
    pub file: Option<std::sync::Arc<super::memory::WritableFile>>,
    /// Offset of the blob in `file`.
    pub offset: u64,
}

impl NewBlob {
    /// Fills a part of the blob, which is not sealed yet.
    ///
    /// # Errors
    /// `Malformed` past its end; `Full` or the errno if there is no memory.
    pub fn write(&self, position: u64, bytes: &[u8]) -> Result<()> {
        if position.checked_add(bytes.len() as u64).is_none_or(|end| end > self.size) {
            return Err(Error::malformed(format!("bytes past blob {} of {}", self.id, self.size)));
        }
        match &self.file {
            Some(file) => {
                let at = self.offset.saturating_add(position);
                file.write(at, bytes).context(|| format!("writing blob {}", self.id))
            }
            None if bytes.is_empty() => Ok(()),
            None => Err(Error::malformed("a blob without memory")),
        }
    }
}

/// The bytes of blobs, wherever they live. Reading gives no promise that a blob still exists: call
/// [`BlobSource::verify`] after the copy.
pub trait BlobSource: Send + Sync {
    /// Size in bytes, without touching the data.
    ///
    /// # Errors
    /// `Stale` if there is no such blob any more, `Unreachable` if its instance must be asked and does not answer.
    fn size(&self, key: BlobKey) -> Result<u64>;

    /// Copies `out.len()` bytes from `offset`.
    ///
    /// # Errors
    /// `Stale` if there is no such blob any more, `Malformed` if the range is not inside it.
    fn read(&self, key: BlobKey, offset: u64, out: &mut [u8]) -> Result<()>;

    /// Finds the places of many blobs with one request, ahead of [`BlobSource::read`] and [`BlobSource::size`]; of
    /// blobs of other instances only the sizes, with one request to each. Blobs that do not exist are skipped.
    /// Nothing where that takes no request.
    fn prepare(&self, keys: &[BlobKey]) -> Result<()> {
        let _ = keys;
        Ok(())
    }

    /// Asks the store whether every one of these blobs still exists, at the place it was read from.
    ///
    /// # Errors
    /// `Stale` if one does not: bytes that were copied before may be another blob's.
    fn verify(&self, keys: &[BlobKey]) -> Result<()>;

    /// Begins to bring parts of blobs that live on other instances, without waiting for them: many are then on their
    /// way at the same time. An empty part asks only whether the blob may be brought. `ahead` marks what nobody waits
    /// for yet. Does nothing about local blobs.
    ///
    /// # Errors
    /// `Remote` if data of other instances may not be brought, `Unreachable` if its instance is not known.
    fn want(&self, parts: &[(BlobKey, Range<u64>)], ahead: bool) -> Result<()> {
        let _ = (parts, ahead);
        Ok(())
    }

    /// Bytes of a blob that need no copy, after they have come here from another instance. They may be passed on after
    /// [`BlobSource::verify`], like copies. `None` if there are no such.
    ///
    /// # Errors
    /// As [`BlobSource::read`].
    fn arrived(&self, key: BlobKey, part: Range<u64>) -> Result<Option<Arrived>> {
        let _ = (key, part);
        Ok(None)
    }

    /// The mapped blob, for code that copies large parts by itself; `None` if the blob is not in local memory.
    fn blob(&self, key: BlobKey) -> Result<Option<Blob>> {
        let _ = key;
        Ok(None)
    }
}

/// A vineyard store. Every call has a deadline and ends with `Timeout` or `Unavailable` past it.
///
/// Names, metadata and existence are asked anew with each call; nothing here caches them.
pub trait Store: BlobSource {
    /// The vineyardd that answers now.
    fn instance(&self) -> Result<Instance>;

    /// Answers all queries in one round trip, in order.
    fn names(&self, queries: &[NameQuery]) -> Result<Vec<Vec<NamedObject>>>;

    /// Metadata of objects, whole trees, in one or few round trips. Objects that do not exist are absent; one whose
    /// metadata is unusable maps to the error. `sync` first catches up with other instances.
    fn metas(&self, ids: &[ObjectId], sync: bool) -> Result<HashMap<ObjectId, Result<Meta>>>;

    /// Metadata of objects of the whole cluster, members of others included; at most so many. vineyardd answers nobody else
    /// meanwhile.
    ///
    /// # Errors
    /// What the store answers.
    fn objects(&self, limit: u64) -> Result<Vec<Meta>>;

    /// Sizes of blobs of this instance, without taking references. Unknown ones are absent.
    fn blob_sizes(&self, ids: &[ObjectId]) -> Result<HashMap<ObjectId, u64>>;

    /// Lets another instance make a permanent copy of an object for itself, by its own means. May take long.
    ///
    /// # Errors
    /// `Unreachable`; `Timeout`; what that instance answers.
    fn migrate_to(&self, instance: InstanceId, id: ObjectId) -> Result<ObjectId> {
        Err(Error::new(Kind::Unsupported, format!("this store has no instance {instance} to copy {id} to")))
    }

    /// Whether another instance answers anybody.
    ///
    /// # Errors
    /// `Unreachable`; `Stale` if another one is at its address.
    fn reach(&self, instance: InstanceId) -> Result<()> {
        let _ = instance;
        Ok(())
    }

    /// Use of memory and connections.
    fn status(&self) -> Result<StoreStatus>;

    /// The instances of the cluster.
    fn cluster(&self) -> Result<BTreeMap<InstanceId, InstanceInfo>>;

    /// Whether metadata is shared with other instances, through etcd.
    ///
    /// # Errors
    /// What the store answers.
    fn shares_metadata(&self) -> Result<bool> {
        Ok(self.cluster()?.values().any(|info| info.shared))
    }

    /// What came from other instances; `None` for a store that knows no others.
    fn remote_status(&self) -> Option<RemoteStatus> {
        None
    }

    /// Creates unsealed blobs, all or none, in the order of `sizes`.
    ///
    /// # Errors
    /// `Full` if the store has no room.
    fn create_blobs(&self, sizes: &[u64]) -> Result<Vec<NewBlob>>;

    /// Seals blobs (pipelined). Empty blobs are skipped.
    fn seal_blobs(&self, ids: &[ObjectId]) -> Result<()>;

    /// Frees blobs that belong to no object, sealed or not. Unknown ones are ignored.
    fn drop_blobs(&self, ids: &[ObjectId]) -> Result<()>;

    /// Creates objects whose members exist already. `content` follows vineyard's rules: `typename` and plain values;
    /// a member object is `{"id": "o…"}`, a member blob has `id` and `typename` `vineyard::Blob`. `instance_id`,
    /// `transient` and `global` are filled in where they are absent.
    fn create_objects(&self, contents: Vec<Value>) -> Result<Vec<Created>>;

    /// Seals blobs and creates objects over them, members before the objects that hold them; the last is the root, whose
    /// id is returned. Each is as permanent as its content says. `fill` is called once, before that: it fills the blobs.
    ///
    /// Not for a store that [shares its metadata](Self::shares_metadata).
    ///
    /// # Errors
    /// Those of `fill`, and what the store answers. Of the objects nothing stays then; the blobs may.
    fn create_tree(
        &self,
        blobs: &[ObjectId],
        objects: Vec<NewObject>,
        fill: &mut dyn FnMut() -> Result<()>,
    ) -> Result<ObjectId> {
        fill()?;
        self.seal_blobs(blobs)?;
        let mut made: Vec<ObjectId> = Vec::with_capacity(objects.len());
        for NewObject { mut content, members } in objects {
            for (key, member) in members {
                let id = made.get(member).ok_or_else(|| Error::new(Kind::Internal, "a tree without a member of it"))?;
                content.insert(key, serde_json::json!({"id": id.to_string()}));
            }
            match self.create_objects(vec![Value::Object(content)]) {
                Ok(created) => made.extend(created.iter().map(|created| created.id)),
                Err(error) => {
                    made.reverse();
                    self.delete(&made)?;
                    return Err(error);
                }
            }
        }
        made.pop().ok_or_else(|| Error::new(Kind::Internal, "a tree without objects"))
    }

    /// Makes an object and its members permanent and visible to the cluster.
    fn persist(&self, id: ObjectId) -> Result<()>;

    /// Points a name at a persisted object; replaces what it pointed at.
    fn put_name(&self, name: &str, id: ObjectId) -> Result<()>;

    /// Removes a name. Not an error if it is absent.
    fn drop_name(&self, name: &str) -> Result<()>;

    /// Deletes objects with their members and blobs, as far as no other object uses them. Unknown ids are ignored.
    fn delete(&self, ids: &[ObjectId]) -> Result<()>;

    /// Deletes what [`Store::delete`] deletes, and every object that has one of these as a member, in turn.
    fn delete_with_owners(&self, ids: &[ObjectId]) -> Result<()>;

    /// Removes what an unfinished piece of work has made, owners first. What cannot be removed now is noted, and removed
    /// later.
    fn take_back(&self, objects: &[ObjectId], blobs: &[ObjectId]) {
        let deleted = if objects.is_empty() { Ok(()) } else { self.delete(objects) };
        let dropped = if blobs.is_empty() { Ok(()) } else { self.drop_blobs(blobs) };
        if let Err(error) = deleted.and(dropped) {
            let (made, stored) = (objects.len(), blobs.len());
            tracing::warn!(objects = made, blobs = stored, "unfinished work is removed later: {error}");
            if let Some(journal) = self.journal() {
                journal.keep(blobs.iter().chain(objects).copied());
            }
        }
    }

    /// The journal of what no name reaches yet; `None` for a client that keeps none.
    fn journal(&self) -> Option<&super::journal::Journal> {
        None
    }

    /// The blobs that may have been made for a [`Wish`](super::journal::Wish) whose answer was lost with the process that
    /// asked: unsealed, of those sizes, and of that time. That is no proof: another client may be filling them.
    ///
    /// # Errors
    /// What the store answers.
    fn unanswered(&self, wish: &super::journal::Wish) -> Result<Vec<ObjectId>> {
        let _ = wish;
        Ok(Vec::new())
    }

    /// Those of these blobs that are not sealed yet, with their sizes.
    ///
    /// # Errors
    /// What the store answers.
    fn unsealed(&self, ids: &[ObjectId]) -> Result<Vec<(ObjectId, u64)>> {
        let _ = ids;
        Ok(Vec::new())
    }

    /// A copy of the metadata under a new id with some plain values replaced; members are shared, the signature stays.
    /// Of an object on another instance the copy is made there, and is permanent.
    fn shallow_copy(&self, id: ObjectId, extra: Map<String, Value>) -> Result<ObjectId>;
}

/// The empty name must not be given: vineyardd keeps names as the children of one node, and then puts the object in the
/// place of all of them (`put_name`, `src/server/server/vineyard_server.cc` of v6d 0.24).
pub(super) fn check_name(name: &str) -> Result<()> {
    match name.is_empty() {
        true => Err(Error::new(Kind::Invalid, "no dataset can have the empty name: give it another one")),
        false => Ok(()),
    }
}
