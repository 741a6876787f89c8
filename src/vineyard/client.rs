//! The real [`Store`]: vineyardd behind its Unix socket.

mod create;
mod delete;
mod metadata;
mod names;
mod tree;
mod unanswered;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::blobs::Memories;
use super::connection::{Answer, Connection};
use super::content;
use super::id::{BlobKey, InstanceId, ObjectId};
use super::journal::{Journal, Wish};
use super::memory::Blob;
use super::meta::Meta;
use super::pool::{Backoff, Connector, Pool, socket_connector};
use super::remote::{Arrived, Remote, RemoteOptions, RemoteStatus};
use super::request::{
    ClusterMetaReply, CreateDatasReply, Empty, GetDataReply, Request, ShallowCopyReply, StatusReply, checked_id,
};
use super::store::{
    BlobSource, Created, Instance, InstanceInfo, NameQuery, NamedObject, NewBlob, NewObject, Store, StoreStatus,
    check_name,
};
use super::wire::{Broken, Refusal, bad_reply};
use crate::error::{Context, Error, Kind, Result};

/// Most ids in one request that returns little or nothing about each.
const IDS_PER_REQUEST: usize = 4096;
/// Most objects in one `create_datas`.
const CONTENTS_PER_REQUEST: usize = 1024;

/// How a [`Client`] finds and treats its vineyardd.
pub struct ClientOptions {
    /// Makes connected sockets; another process may do it, where this one may not open the socket.
    pub connector: Connector,
    /// How long each reply may take, connecting included.
    pub deadline: Duration,
    /// Places of blobs to remember (about 100 bytes each).
    pub places: usize,
    /// How data of other instances is treated.
    pub remote: RemoteOptions,
    /// Where objects are noted that no name reaches yet.
    pub journal: Option<Journal>,
}

impl ClientOptions {
    /// Connects to the socket at `path`; a deadline of 10 s.
    pub fn socket(path: impl Into<PathBuf>) -> Self {
        Self::connector(socket_connector(path.into()))
    }

    /// Connects through `connector`; a deadline of 10 s.
    pub fn connector(connector: Connector) -> Self {
        let deadline = Duration::from_secs(10);
        ClientOptions { connector, deadline, places: 1 << 17, remote: RemoteOptions::default(), journal: None }
    }

    /// With another deadline.
    pub fn deadline(self, deadline: Duration) -> Self {
        ClientOptions { deadline, ..self }
    }

    /// With another treatment of remote data.
    pub fn remote(self, remote: RemoteOptions) -> Self {
        ClientOptions { remote, ..self }
    }

    /// With a journal, or without.
    pub fn journal(self, journal: Option<Journal>) -> Self {
        ClientOptions { journal, ..self }
    }
}

/// Whether a request may be sent again although the first may have been executed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    /// It changes nothing, or the second time changes nothing more.
    Safe,
    /// It makes something: only if the first surely did not reach the server.
    UnlessSent,
}

/// A client of one vineyardd. All methods may be called from many threads; each takes a connection of its own.
pub struct Client {
    pool: Pool,
    memories: Arc<Memories>,
    deadline: Duration,
    remote: Remote,
    journal: Option<Journal>,
    /// Whether the vineyardd of a generation shares its metadata.
    shared: Mutex<Option<(u64, bool)>>,
    /// For the ids of new objects.
    numbers: Mutex<tree::Numbers>,
}

impl Client {
    /// A client that connects at its first request.
    ///
    /// # Errors
    /// The errno of making one page of memory.
    pub fn new(options: ClientOptions) -> Result<Self> {
        let memories = Arc::new(Memories::new(options.places)?);
        let pool = Pool::new(options.connector, options.deadline, memories.clone());
        let remote = Remote::new(options.remote, options.deadline);
        Ok(Client {
            pool,
            memories,
            deadline: options.deadline,
            remote,
            journal: options.journal,
            shared: Mutex::default(),
            numbers: Mutex::default(),
        })
    }

    /// A client that is connected.
    ///
    /// # Errors
    /// `Unavailable` or `Timeout` if no vineyardd answers within the deadline.
    pub fn connect(options: ClientOptions) -> Result<Self> {
        let client = Self::new(options)?;
        client.instance()?;
        Ok(client)
    }

    /// Runs `operation` on a connection, again on a new one if vineyardd went away and the request allows it.
    fn run<T>(&self, repeat: Repeat, mut operation: impl FnMut(&mut Connection) -> Answer<T>) -> Result<T> {
        let deadline = Instant::now() + self.deadline;
        let mut backoff = Backoff::default();
        loop {
            let mut connection = self.pool.checkout(deadline)?;
            match operation(&mut connection) {
                Ok(answer) => {
                    self.pool.checkin(connection);
                    return answer;
                }
                Err(Broken { error, sent }) => {
                    drop(connection);
                    let again = error.kind() == Kind::Unavailable && (repeat == Repeat::Safe || !sent);
                    if !again || !backoff.pause(deadline) {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// One request, whose reply is of type `kind`.
    fn call<T: DeserializeOwned>(&self, repeat: Repeat, request: &Request, kind: &str) -> Result<T> {
        self.run(repeat, |connection| connection.call(request, kind))
    }

    /// Requests that tell nothing, back to back; `ignore` says which refusals are none.
    fn tell(&self, requests: &[Request], kind: &str, ignore: impl Fn(&Refusal) -> bool) -> Result<()> {
        if requests.is_empty() {
            return Ok(());
        }
        let answers = self.run(Repeat::Safe, |connection| connection.calls(requests, kind, |_, _: Empty| Ok(())))?;
        match answers.into_iter().filter_map(|answer| answer.err()).find(|refusal| !ignore(refusal)) {
            Some(refusal) => Err(refusal.into()),
            None => Ok(()),
        }
    }

    /// The number of the vineyardd that answers.
    fn here(&self) -> Result<InstanceId> {
        match self.memories.instance() {
            Some(instance) => Ok(instance),
            None => Ok(self.instance()?.id),
        }
    }

    /// True if the blob is another instance's. This is where blobs of this instance and of others part ways.
    fn is_remote(&self, key: BlobKey) -> Result<bool> {
        Ok(key.id.is_stored_blob() && key.instance != self.here()?)
    }

    /// Blobs of this instance, and of others.
    fn part(&self, keys: &[BlobKey]) -> Result<(Vec<BlobKey>, Vec<BlobKey>)> {
        let here = self.here()?;
        Ok(keys.iter().partition(|key| key.instance == here || !key.id.is_stored_blob()))
    }

    /// Asks for the places of blobs of this instance, whether known or not. Absent ones don't exist.
    fn fetch(&self, keys: &[BlobKey], keep: bool) -> Result<HashMap<BlobKey, Blob>> {
        let mut ids: Vec<ObjectId> = keys.iter().filter(|key| key.id.is_stored_blob()).map(|key| key.id).collect();
        ids.sort_unstable();
        ids.dedup();
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        self.run(Repeat::Safe, |connection| {
            let here = connection.identity.instance;
            // Another vineyardd answers since the keys were told apart.
            if let Some(key) = keys.iter().find(|key| key.instance != here && key.id.is_stored_blob()) {
                return Ok(Err(gone(*key)));
            }
            let blobs = match connection.get_buffers(&self.memories, &ids)? {
                Ok(blobs) => blobs,
                Err(error) => return Ok(Err(error)),
            };
            if let Some(blob) = blobs.iter().find(|blob| ids.binary_search(&blob.key().id).is_err()) {
                return Err(bad_reply(format!("has the blob {}, which was not asked for", blob.key())));
            }
            if keep {
                self.memories.insert(connection.generation, blobs.iter());
            }
            Ok(Ok(blobs.into_iter().map(|blob| (blob.key(), blob)).collect()))
        })
    }

    /// A blob of this instance, from memory or from the server.
    fn find(&self, key: BlobKey) -> Result<Blob> {
        if key.id == ObjectId::EMPTY_BLOB {
            return self.memories.empty_blob(key);
        }
        if let Some(blob) = self.memories.get(key) {
            return Ok(blob);
        }
        self.fetch(&[key], true)?.remove(&key).ok_or_else(|| gone(key))
    }

    fn note(&self, ids: impl IntoIterator<Item = ObjectId>) {
        if let Some(journal) = &self.journal {
            journal.note(ids);
        }
    }
}

fn gone(key: BlobKey) -> Error {
    Error::stale(format!("blob {key} is gone from the store"))
}

impl BlobSource for Client {
    fn size(&self, key: BlobKey) -> Result<u64> {
        if self.is_remote(key)? {
            return self.remote.size(key, &|| self.cluster());
        }
        Ok(self.find(key)?.len())
    }

    fn read(&self, key: BlobKey, offset: u64, out: &mut [u8]) -> Result<()> {
        if self.is_remote(key)? {
            return self.remote.read(key, offset, out, &|| self.cluster());
        }
        self.find(key)?.read(offset, out)
    }

    fn prepare(&self, keys: &[BlobKey]) -> Result<()> {
        let (local, remote) = self.part(keys)?;
        let unknown: Vec<BlobKey> =
            local.into_iter().filter(|&k| k.id.is_stored_blob() && self.memories.get(k).is_none()).collect();
        self.fetch(&unknown, true)?;
        self.remote.prepare(&remote, &|| self.cluster())
    }

    fn verify(&self, keys: &[BlobKey]) -> Result<()> {
        if let Some(&key) = keys.iter().find(|key| key.id != ObjectId::EMPTY_BLOB && !key.id.is_stored_blob()) {
            return Err(gone(key));
        }
        let (local, remote) = self.part(keys)?;
        // What was read came from the places known before the question.
        let known: HashMap<BlobKey, Blob> =
            local.iter().filter_map(|&key| Some((key, self.memories.get(key)?))).collect();
        let found = self.fetch(&local, false)?;
        let mut verdict = Ok(());
        for &key in local.iter().filter(|key| key.id.is_stored_blob()) {
            match (found.get(&key), known.get(&key)) {
                (Some(now), Some(then)) if !now.same_place(then) => {
                    self.memories.forget(key);
                    verdict = Err(Error::stale(format!("blob {key} was moved by the store")));
                }
                (Some(_), _) => {}
                (None, _) => {
                    self.memories.forget(key);
                    verdict = Err(gone(key));
                }
            }
        }
        verdict.and_then(|()| self.remote.verify(&remote, &|| self.cluster()))
    }

    fn want(&self, parts: &[(BlobKey, Range<u64>)], ahead: bool) -> Result<()> {
        let here = self.here()?;
        let remote: Vec<_> = parts.iter().filter(|(key, _)| key.instance != here).cloned().collect();
        self.remote.want(&remote, ahead, &|| self.cluster())
    }

    fn arrived(&self, key: BlobKey, part: Range<u64>) -> Result<Option<Arrived>> {
        if self.is_remote(key)? { self.remote.arrived(key, part, &|| self.cluster()) } else { Ok(None) }
    }

    fn blob(&self, key: BlobKey) -> Result<Option<Blob>> {
        if self.is_remote(key)? {
            return self.remote.blob(key);
        }
        self.find(key).map(Some)
    }
}

impl Store for Client {
    fn instance(&self) -> Result<Instance> {
        self.run(Repeat::Safe, |connection| Ok(Ok(Pool::instance_of(connection))))
    }

    fn names(&self, queries: &[NameQuery]) -> Result<Vec<Vec<NamedObject>>> {
        self.ask_names(queries)
    }

    fn metas(&self, ids: &[ObjectId], sync: bool) -> Result<HashMap<ObjectId, Result<Meta>>> {
        let mut metas = HashMap::with_capacity(ids.len());
        self.get_data(ids, sync, |id, value| {
            // What etcd keeps of a deleted object that had a name; an instance that starts later reads it as metadata.
            let is_remnant = |tree: &Map<String, Value>| tree.keys().all(|key| matches!(key.as_str(), "id" | "__name"));
            if value.as_ref().is_ok_and(|value| value.as_object().is_some_and(is_remnant)) {
                return;
            }
            let meta = value.and_then(Meta::new).and_then(|meta| {
                let own = meta.id();
                if own == id { Ok(meta) } else { Err(meta.error(format!("is what the store has for {id}"))) }
            });
            metas.insert(id, meta.context(|| format!("object {id}")));
        })?;
        Ok(metas)
    }

    fn objects(&self, limit: u64) -> Result<Vec<Meta>> {
        let request = Request::ListData { pattern: "*", regex: false, limit };
        let reply: GetDataReply = self.call(Repeat::Safe, &request, "get_data_reply")?;
        // What is no object is nobody's copy either.
        let trees = reply.content.map(|content| content.0).unwrap_or_default().into_iter();
        Ok(trees.filter_map(|(_, tree)| Meta::new(tree).ok()).collect())
    }

    fn blob_sizes(&self, ids: &[ObjectId]) -> Result<HashMap<ObjectId, u64>> {
        let mut sizes = HashMap::with_capacity(ids.len());
        let stored: Vec<ObjectId> = ids.iter().copied().filter(|id| id.is_stored_blob()).collect();
        self.get_data(&stored, false, |id, value| {
            let length = value.ok().and_then(|value| value.get("length").and_then(Value::as_u64));
            if let Some(length) = length {
                sizes.insert(id, length);
            }
        })?;
        if ids.contains(&ObjectId::EMPTY_BLOB) {
            sizes.insert(ObjectId::EMPTY_BLOB, 0);
        }
        Ok(sizes)
    }

    fn status(&self) -> Result<StoreStatus> {
        let reply: StatusReply = self.call(Repeat::Safe, &Request::InstanceStatus {}, "instance_status_reply")?;
        Ok(StoreStatus {
            memory_limit: reply.meta.memory_limit,
            memory_usage: reply.meta.memory_usage,
            ipc_connections: reply.meta.ipc_connections,
            rpc_connections: reply.meta.rpc_connections,
        })
    }

    fn migrate_to(&self, instance: InstanceId, id: ObjectId) -> Result<ObjectId> {
        let copy = self.remote.migrate(instance, id, &|| self.cluster())?;
        self.heard_of(copy, id, instance)
    }

    fn reach(&self, instance: InstanceId) -> Result<()> {
        match self.instance()?.id == instance {
            true => Ok(()),
            false => self.remote.reach(instance, &|| self.cluster()),
        }
    }

    fn remote_status(&self) -> Option<RemoteStatus> {
        Some(self.remote.status())
    }

    fn cluster(&self) -> Result<BTreeMap<InstanceId, InstanceInfo>> {
        let reply: ClusterMetaReply = self.call(Repeat::Safe, &Request::ClusterMeta {}, "cluster_meta")?;
        let mut cluster = BTreeMap::new();
        for (key, entry) in reply.meta {
            let Some(number) = key.strip_prefix('i').and_then(|digits| digits.parse().ok()) else {
                return Err(Error::malformed(format!("vineyardd lists an instance {key:?}")));
            };
            let super::request::ClusterEntry { hostname, rpc_endpoint, ipc_socket, member_id } = entry;
            let shared = member_id.is_some();
            cluster.insert(InstanceId(number), InstanceInfo { hostname, rpc_endpoint, ipc_socket, shared });
        }
        Ok(cluster)
    }

    fn create_blobs(&self, sizes: &[u64]) -> Result<Vec<NewBlob>> {
        self.make_blobs(sizes)
    }

    fn seal_blobs(&self, ids: &[ObjectId]) -> Result<()> {
        let seal = |id: &ObjectId| match id {
            id if id.is_stored_blob() => Ok(Request::Seal { object_id: id.0 }),
            id => Err(Error::new(Kind::Invalid, format!("{id} is no blob that can be sealed"))),
        };
        let requests = ids.iter().filter(|&&id| id != ObjectId::EMPTY_BLOB).map(seal).collect::<Result<Vec<_>>>()?;
        self.tell(&requests, "seal_reply", |_| false)
    }

    fn drop_blobs(&self, ids: &[ObjectId]) -> Result<()> {
        let requests: Vec<Request> =
            ids.iter().filter(|id| id.is_stored_blob()).map(|id| Request::DropBuffer { id: id.0 }).collect();
        self.tell(&requests, "drop_buffer_reply", Refusal::is_absence)
    }

    fn create_objects(&self, contents: Vec<Value>) -> Result<Vec<Created>> {
        if contents.is_empty() {
            return Ok(Vec::new());
        }
        self.run(Repeat::UnlessSent, |connection| {
            let here = connection.identity.instance;
            let complete = contents.iter().map(|content| content::complete(content.clone(), here));
            let complete = match complete.collect::<Result<Vec<_>>>() {
                Ok(complete) => complete,
                Err(error) => return Ok(Err(error)),
            };
            let chunks = complete.chunks(CONTENTS_PER_REQUEST);
            let requests: Vec<Request> =
                chunks.clone().map(|chunk| Request::CreateDatas { num: chunk.len(), contents: chunk }).collect();
            let answers = connection.calls(&requests, "create_datas_reply", |_, reply: CreateDatasReply| Ok(reply))?;
            let collect = |answers: Vec<std::result::Result<CreateDatasReply, Refusal>>| {
                let mut created = Vec::with_capacity(complete.len());
                for (chunk, answer) in chunks.zip(answers) {
                    let CreateDatasReply { ids, signatures } = answer?;
                    if ids.len() != chunk.len() || signatures.len() != chunk.len() {
                        return Err(Error::malformed("vineyardd made another number of objects than it was asked for"));
                    }
                    self.note(ids.iter().map(|id| ObjectId(*id)));
                    for (id, signature) in ids.into_iter().zip(signatures) {
                        created.push(Created { id: checked_id(id)?, signature });
                    }
                }
                Ok(created)
            };
            Ok(answers.and_then(collect))
        })
    }

    fn create_tree(
        &self,
        blobs: &[ObjectId],
        objects: Vec<NewObject>,
        fill: &mut dyn FnMut() -> Result<()>,
    ) -> Result<ObjectId> {
        self.make_tree(blobs, objects, fill)
    }

    fn persist(&self, id: ObjectId) -> Result<()> {
        self.call::<Empty>(Repeat::Safe, &Request::Persist { id: id.0 }, "persist_reply")
            .map(|_| ())
            .context(|| format!("persisting {id}"))
    }

    fn put_name(&self, name: &str, id: ObjectId) -> Result<()> {
        check_name(name)?;
        self.call::<Empty>(Repeat::Safe, &Request::PutName { object_id: id.0, name }, "put_name_reply")
            .map(|_| ())
            .context(|| format!("giving {id} the name {name:?}"))
    }

    fn drop_name(&self, name: &str) -> Result<()> {
        self.call::<Empty>(Repeat::Safe, &Request::DropName { name }, "drop_name_reply").map(|_| ())
    }

    fn delete(&self, ids: &[ObjectId]) -> Result<()> {
        self.delete_data(ids, false)
    }

    fn delete_with_owners(&self, ids: &[ObjectId]) -> Result<()> {
        self.delete_data(ids, true)
    }

    fn journal(&self) -> Option<&Journal> {
        self.journal.as_ref()
    }

    fn shares_metadata(&self) -> Result<bool> {
        let generation = self.instance()?.generation;
        let mut known = self.shared.lock().unwrap_or_else(|e| e.into_inner());
        match *known {
            Some((then, shared)) if then == generation => Ok(shared),
            _ => {
                let shared = self.cluster()?.values().any(|info| info.shared);
                *known = Some((generation, shared));
                Ok(shared)
            }
        }
    }

    fn unanswered(&self, wish: &Wish) -> Result<Vec<ObjectId>> {
        self.find_unanswered(wish)
    }

    fn unsealed(&self, ids: &[ObjectId]) -> Result<Vec<(ObjectId, u64)>> {
        self.run(Repeat::Safe, |connection| connection.unsealed(&self.memories, ids))
    }

    fn shallow_copy(&self, id: ObjectId, extra: Map<String, Value>) -> Result<ObjectId> {
        content::check_extra(&extra)?;
        let owner = self.metas(&[id], false)?.remove(&id).transpose()?.map(|meta| meta.instance());
        if let Some(owner) = owner.filter(|owner| *owner != InstanceId::UNSPECIFIED)
            && owner != self.here()?
        {
            let copy = self.remote.shallow_copy(owner, id, &extra, &|| self.cluster())?;
            return self.heard_of(copy, id, owner);
        }
        let request = Request::ShallowCopy { id: id.0, extra: &extra };
        let reply: ShallowCopyReply = self.call(Repeat::UnlessSent, &request, "shallow_copy_reply")?;
        self.note([ObjectId(reply.target_id)]);
        checked_id(reply.target_id)
    }
}
