//! A store inside this process, for tests of the upper floors.
//!
//! It keeps the rules of vineyardd that matter to callers: members exist before their parents, only persisted objects
//! get names, names outlive their objects, deletion follows members that nobody else uses, memory of freed blobs is
//! reused at once (lowest address first) without being cleared, and blob sizes are absent from metadata. In two
//! points it is stricter, to catch mistakes: a member blob must exist and be sealed.

mod state;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use serde_json::{Map, Value, json};

pub use self::state::Late;
use self::state::{Place, State};
use super::content;
use super::id::{BlobKey, InstanceId, ObjectId};
use super::journal::{Journal, Wish};
use super::memory::{Blob, Segment, WritableFile};
use super::meta::Meta;
use super::store::{
    BlobSource, Created, Instance, InstanceInfo, NameQuery, NamedObject, NewBlob, Store, StoreStatus, check_name,
};
use crate::error::{Error, Kind, Result};
use crate::sync::{Mutex, MutexGuard};

/// Blobs start at multiples of this many bytes, as in vineyardd.
const ALIGN: u64 = 64;

/// The operations of a store, for [`FakeStore::fail_next`] and [`FakeStore::calls`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Op {
    Size,
    Read,
    Prepare,
    Verify,
    Blob,
    Instance,
    Names,
    Metas,
    BlobSizes,
    Status,
    Cluster,
    CreateBlobs,
    SealBlobs,
    DropBlobs,
    CreateObjects,
    Persist,
    PutName,
    DropName,
    Delete,
    ShallowCopy,
}

/// See the [module](self).
pub struct FakeStore {
    id: InstanceId,
    limit: u64,
    shared: bool,
    file: Arc<WritableFile>,
    segment: Arc<Segment>,
    state: Mutex<State>,
    journal: Option<Journal>,
}

impl FakeStore {
    /// An empty store of `limit` bytes, instance 0.
    ///
    /// # Panics
    /// If the memory file cannot be made: there is no test without it.
    #[allow(clippy::expect_used)]
    pub fn new(limit: u64) -> Self {
        Self::with_instance(limit, InstanceId(0))
    }

    /// As [`FakeStore::new`], with an instance number.
    ///
    /// # Panics
    /// As [`FakeStore::new`].
    #[allow(clippy::expect_used)]
    pub fn with_instance(limit: u64, id: InstanceId) -> Self {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let file = memfd_create(c"vineyard-fake", MFdFlags::MFD_CLOEXEC).expect("memory file of the fake store");
        // Twice the limit, so that fragmentation alone rarely makes it full.
        let len = (limit.max(4096) * 2).next_multiple_of(4096);
        nix::unistd::ftruncate(&file, len as i64).expect("size of the fake store's memory");
        let segment = Segment::map(&file, len as usize).expect("mapping of the fake store's memory");
        let state = State { next: 1, clock_ms: 1_700_000_000_000, generation: 1, ..State::default() };
        let shared = true;
        let file = Arc::new(WritableFile::new(file));
        FakeStore { id, limit, shared, file, segment, state: Mutex::new(state), journal: None }
    }

    /// The same store with a journal.
    pub fn journaled(self, journal: Journal) -> Self {
        FakeStore { journal: Some(journal), ..self }
    }

    /// The same store with metadata of its own: no other instance can be there.
    pub fn alone(self) -> Self {
        FakeStore { shared: false, ..self }
    }

    /// The next `calls` calls of `op` fail with `kind` and do nothing.
    pub fn fail_next(&self, op: Op, calls: usize, kind: Kind) {
        self.lock().failures.insert(op, (calls, kind));
    }

    /// Does something right before the next call of `op`, which waits for it.
    pub fn before_next(&self, op: Op, act: impl FnOnce() + Send + 'static) {
        self.lock().before.insert(op, Box::new(act));
    }

    /// Does something right after the next question for names was answered, before the caller has the answer.
    pub fn after_names(&self, act: impl FnOnce() + Send + 'static) {
        self.lock().after_names = Some(Box::new(act));
    }

    /// From now on the caller lives for so many steps, as if it were killed then: every call that changes something is
    /// one, and those after the last change nothing. `None` lets it live.
    pub fn die_after(&self, steps: Option<usize>) {
        self.lock().steps = steps;
    }

    /// Takes a step. False if the caller is dead.
    pub fn step(&self) -> bool {
        self.lock().step()
    }

    /// The answer to the next name that is put does not come in time.
    pub fn delay_name(&self, late: Late) {
        self.lock().late = Some(late);
    }

    /// Does what was not done in time.
    pub fn catch_up(&self) {
        let mut state = self.lock();
        let names = std::mem::take(&mut state.put_later);
        state.names.extend(names);
    }

    /// How often `op` was called, failures included.
    pub fn calls(&self, op: Op) -> u64 {
        self.lock().calls.get(&op).copied().unwrap_or(0)
    }

    /// Forgets everything, as a vineyardd with local metadata does at restart, and counts up the generation.
    pub fn restart(&self) {
        let mut state = self.lock();
        *state =
            State { generation: state.generation + 1, next: state.next, clock_ms: state.clock_ms, ..State::default() };
    }

    /// Number of blobs with bytes, sealed or not; 0 when nothing leaked.
    pub fn blob_count(&self) -> usize {
        self.lock().blobs.len()
    }

    /// Number of objects, named or not.
    pub fn object_count(&self) -> usize {
        self.lock().objects.len()
    }

    /// Makes a sealed blob with these bytes.
    ///
    /// # Errors
    /// As [`Store::create_blobs`].
    pub fn put_blob(&self, bytes: &[u8]) -> Result<BlobKey> {
        let blob =
            self.create_blobs(&[bytes.len() as u64])?.pop().ok_or_else(|| Error::new(Kind::Internal, "no blob"))?;
        self.write_blob(&blob, bytes)?;
        self.seal_blobs(&[blob.id])?;
        Ok(BlobKey { instance: self.id, id: blob.id })
    }

    /// Writes `bytes` at the start of a new blob.
    ///
    /// # Errors
    /// `Invalid` if they do not fit.
    pub fn write_blob(&self, blob: &NewBlob, bytes: &[u8]) -> Result<()> {
        if bytes.len() as u64 > blob.size {
            return Err(Error::new(Kind::Invalid, "more bytes than the blob has"));
        }
        if let Some(file) = &blob.file {
            file.write(blob.offset, bytes)?;
        }
        Ok(())
    }

    /// Creates one object, persists it and gives it a name.
    ///
    /// # Errors
    /// As the calls of [`Store`] that it makes.
    pub fn put_object(&self, name: &str, content: Value) -> Result<ObjectId> {
        let created = self.create_objects(vec![content])?;
        let id = created.first().map(|c| c.id).ok_or_else(|| Error::new(Kind::Internal, "no object"))?;
        self.persist(id)?;
        self.put_name(name, id)?;
        Ok(id)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the call and fails it if it was asked to.
    fn enter(&self, op: Op) -> Result<MutexGuard<'_, State>> {
        let before = self.lock().before.remove(&op);
        if let Some(act) = before {
            act();
        }
        let mut state = self.lock();
        *state.calls.entry(op).or_default() += 1;
        let changes = !matches!(
            op,
            Op::Size
                | Op::Read
                | Op::Prepare
                | Op::Verify
                | Op::Blob
                | Op::Instance
                | Op::Names
                | Op::Metas
                | Op::BlobSizes
                | Op::Status
                | Op::Cluster
        );
        if changes && !state.step() {
            return Err(Error::new(Kind::Timeout, "the caller is dead"));
        }
        if let Some((left, kind)) = state.failures.get_mut(&op).filter(|(left, _)| *left > 0) {
            *left -= 1;
            return Err(Error::new(*kind, format!("injected failure of {op:?}")));
        }
        Ok(state)
    }

    fn find(&self, state: &State, key: BlobKey) -> Result<Place> {
        if key.id == ObjectId::EMPTY_BLOB {
            return Ok(Place { offset: 0, size: 0, sealed: true });
        }
        if key.instance != self.id {
            return Err(Error::new(Kind::Remote, format!("blob {key} lives on another instance")));
        }
        let place = state.blobs.get(&key.id).filter(|p| p.sealed).copied();
        place.ok_or_else(|| Error::stale(format!("blob {key} is gone")))
    }

    fn mapped(&self, state: &State, key: BlobKey) -> Result<Blob> {
        let place = self.find(state, key)?;
        Blob::new(key, self.segment.clone(), place.offset, place.size)
    }
}

impl BlobSource for FakeStore {
    fn size(&self, key: BlobKey) -> Result<u64> {
        let state = self.enter(Op::Size)?;
        Ok(self.find(&state, key)?.size)
    }

    fn read(&self, key: BlobKey, offset: u64, out: &mut [u8]) -> Result<()> {
        let state = self.enter(Op::Read)?;
        self.mapped(&state, key)?.read(offset, out)
    }

    fn prepare(&self, keys: &[BlobKey]) -> Result<()> {
        let state = self.enter(Op::Prepare)?;
        match keys.iter().find(|key| key.instance != self.id && key.id != ObjectId::EMPTY_BLOB) {
            Some(&key) => self.find(&state, key).map(|_| ()),
            None => Ok(()),
        }
    }

    fn verify(&self, keys: &[BlobKey]) -> Result<()> {
        let state = self.enter(Op::Verify)?;
        keys.iter().try_for_each(|&key| self.find(&state, key).map(|_| ()))
    }

    fn blob(&self, key: BlobKey) -> Result<Option<Blob>> {
        let state = self.enter(Op::Blob)?;
        self.mapped(&state, key).map(Some)
    }
}

impl Store for FakeStore {
    fn instance(&self) -> Result<Instance> {
        let state = self.enter(Op::Instance)?;
        Ok(Instance {
            id: self.id,
            socket: PathBuf::from("/fake.sock"),
            rpc_endpoint: String::new(),
            version: "0.24.2".into(),
            generation: state.generation,
        })
    }

    fn names(&self, queries: &[NameQuery]) -> Result<Vec<Vec<NamedObject>>> {
        let mut state = self.enter(Op::Names)?;
        let after = state.after_names.take();
        let answer = |query: &NameQuery| match query {
            NameQuery::Exact(name) => state.names.get(name).map(|&id| vec![(name.clone(), id)]).unwrap_or_default(),
            NameQuery::Prefix { prefix, limit } => state
                .names
                .range::<str, _>((Bound::Included(prefix.as_str()), Bound::Unbounded))
                .take_while(|(name, _)| name.starts_with(prefix))
                .take(limit.map_or(usize::MAX, |n| n as usize))
                .map(|(name, &id)| (name.clone(), id))
                .collect(),
        };
        let answers = queries.iter().map(answer).collect();
        drop(state);
        if let Some(act) = after {
            act();
        }
        Ok(answers)
    }

    fn metas(&self, ids: &[ObjectId], _sync: bool) -> Result<HashMap<ObjectId, Result<Meta>>> {
        let state = self.enter(Op::Metas)?;
        Ok(ids.iter().filter_map(|&id| Some((id, Meta::new(state.expand(id, self.id)?)))).collect())
    }

    fn objects(&self, limit: u64) -> Result<Vec<Meta>> {
        let state = self.enter(Op::Metas)?;
        let ids = state.objects.keys().copied().take(limit as usize);
        Ok(ids.filter_map(|id| Meta::new(state.expand(id, self.id)?).ok()).collect())
    }

    fn blob_sizes(&self, ids: &[ObjectId]) -> Result<HashMap<ObjectId, u64>> {
        let state = self.enter(Op::BlobSizes)?;
        let size = |id: ObjectId| self.find(&state, BlobKey { instance: self.id, id }).ok().map(|p| (id, p.size));
        Ok(ids.iter().filter_map(|&id| size(id)).collect())
    }

    fn status(&self) -> Result<StoreStatus> {
        let state = self.enter(Op::Status)?;
        let memory_usage = state.usage();
        Ok(StoreStatus { memory_limit: self.limit, memory_usage, ipc_connections: 1, rpc_connections: 0 })
    }

    fn cluster(&self) -> Result<BTreeMap<InstanceId, InstanceInfo>> {
        drop(self.enter(Op::Cluster)?);
        let info = InstanceInfo {
            hostname: "fake".into(),
            rpc_endpoint: String::new(),
            ipc_socket: "/fake.sock".into(),
            shared: self.shared,
        };
        Ok(BTreeMap::from([(self.id, info)]))
    }

    fn create_blobs(&self, sizes: &[u64]) -> Result<Vec<NewBlob>> {
        let mut state = self.enter(Op::CreateBlobs)?;
        let wanted = sizes.iter().try_fold(state.usage(), |sum, &size| sum.checked_add(size));
        if wanted.is_none_or(|wanted| wanted > self.limit) {
            return Err(Error::new(Kind::Full, format!("the store of {} bytes has no room", self.limit)));
        }
        let end = self.segment.len() as u64;
        let mut made: Vec<NewBlob> = Vec::new();
        for &size in sizes {
            if size == 0 {
                made.push(NewBlob { id: ObjectId::EMPTY_BLOB, size, file: None, offset: 0 });
                continue;
            }
            let Some(offset) = state.allocate(size, end) else {
                made.iter().for_each(|blob| state.free(blob.id));
                return Err(Error::new(Kind::Full, "the store's memory is too fragmented"));
            };
            let id = ObjectId(1 << 63 | state.fresh());
            state.blobs.insert(id, Place { offset, size, sealed: false });
            made.push(NewBlob { id, size, file: Some(self.file.clone()), offset });
        }
        Ok(made)
    }

    fn seal_blobs(&self, ids: &[ObjectId]) -> Result<()> {
        let mut state = self.enter(Op::SealBlobs)?;
        for id in ids.iter().filter(|&&id| id != ObjectId::EMPTY_BLOB) {
            match state.blobs.get_mut(id) {
                Some(place) => place.sealed = true,
                None => return Err(Error::not_found(format!("no blob {id} to seal"))),
            }
        }
        Ok(())
    }

    fn drop_blobs(&self, ids: &[ObjectId]) -> Result<()> {
        let mut state = self.enter(Op::DropBlobs)?;
        ids.iter().for_each(|&id| state.free(id));
        Ok(())
    }

    fn create_objects(&self, contents: Vec<Value>) -> Result<Vec<Created>> {
        let mut state = self.enter(Op::CreateObjects)?;
        let mut ready = Vec::with_capacity(contents.len());
        for value in contents {
            let tree = content::complete(value, self.id)?;
            for (key, id) in content::members(&tree) {
                let exists = id.is_some_and(|id| match id {
                    ObjectId::EMPTY_BLOB => true,
                    id if id.is_blob() => state.blobs.get(&id).is_some_and(|place| place.sealed),
                    id => state.objects.contains_key(&id),
                });
                if !exists {
                    return Err(Error::not_found(format!("the member {key:?} of a new object does not exist")));
                }
            }
            ready.push(tree);
        }
        let mut created = Vec::with_capacity(ready.len());
        for mut tree in ready {
            let id = ObjectId(state.fresh());
            let signature = tree.get("signature").and_then(Value::as_u64).unwrap_or_else(|| state.fresh());
            state.clock_ms += 1;
            tree.insert("id".into(), json!(id.to_string()));
            tree.insert("signature".into(), json!(signature));
            tree.insert("__timestamp".into(), json!(state.clock_ms));
            state.objects.insert(id, tree);
            created.push(Created { id, signature });
        }
        Ok(created)
    }

    fn persist(&self, id: ObjectId) -> Result<()> {
        let mut state = self.enter(Op::Persist)?;
        if id.is_blob() {
            return Err(Error::new(Kind::Invalid, format!("blob {id} cannot be persisted")));
        }
        let mut todo = vec![id];
        let mut seen = HashSet::new();
        while let Some(id) = todo.pop() {
            if id.is_blob() || !seen.insert(id) {
                continue;
            }
            todo.extend(state.members_of(id));
            match state.objects.get_mut(&id) {
                Some(tree) => tree.insert("transient".into(), json!(false)),
                None => return Err(Error::not_found(format!("no object {id} to persist"))),
            };
        }
        Ok(())
    }

    fn put_name(&self, name: &str, id: ObjectId) -> Result<()> {
        check_name(name)?;
        let mut state = self.enter(Op::PutName)?;
        let Some(tree) = state.objects.get_mut(&id) else {
            return Err(Error::not_found(format!("no object {id} to name {name:?}")));
        };
        if tree.get("transient") != Some(&json!(false)) {
            return Err(Error::new(Kind::Invalid, format!("object {id} is not persisted and cannot be named")));
        }
        match state.late {
            Some(Late::Everything) => state.put_later.push((name.into(), id)),
            _ => drop(state.names.insert(name.into(), id)),
        }
        match state.late.take() {
            Some(_) => Err(Error::new(Kind::Timeout, "no answer in time")),
            None => Ok(()),
        }
    }

    fn drop_name(&self, name: &str) -> Result<()> {
        self.enter(Op::DropName)?.names.remove(name);
        Ok(())
    }

    fn delete(&self, ids: &[ObjectId]) -> Result<()> {
        let mut state = self.enter(Op::Delete)?;
        ids.iter().for_each(|&id| state.delete(id));
        Ok(())
    }

    fn delete_with_owners(&self, ids: &[ObjectId]) -> Result<()> {
        let mut state = self.enter(Op::Delete)?;
        ids.iter().for_each(|&id| state.delete_with_owners(id));
        Ok(())
    }

    fn journal(&self) -> Option<&Journal> {
        self.journal.as_ref()
    }

    fn unanswered(&self, wish: &Wish) -> Result<Vec<ObjectId>> {
        let state = self.lock();
        let is_like = |place: &Place| !place.sealed && wish.sizes.contains(&place.size);
        Ok(state.blobs.iter().filter(|(_, place)| is_like(place)).map(|(id, _)| *id).collect())
    }

    fn unsealed(&self, ids: &[ObjectId]) -> Result<Vec<(ObjectId, u64)>> {
        let state = self.lock();
        let places = ids.iter().filter_map(|id| Some((*id, *state.blobs.get(id)?)));
        Ok(places.filter(|(_, place)| !place.sealed).map(|(id, place)| (id, place.size)).collect())
    }

    fn shallow_copy(&self, id: ObjectId, extra: Map<String, Value>) -> Result<ObjectId> {
        let mut state = self.enter(Op::ShallowCopy)?;
        content::check_extra(&extra)?;
        let Some(mut tree) = state.objects.get(&id).cloned() else {
            return Err(Error::not_found(format!("no object {id} to copy")));
        };
        let copy = ObjectId(state.fresh());
        tree.extend(extra);
        tree.insert("id".into(), json!(copy.to_string()));
        state.objects.insert(copy, tree);
        Ok(copy)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn blob_member(key: BlobKey) -> Value {
        json!({"id": key.id.to_string(), "typename": content::BLOB_TYPE})
    }

    #[test]
    fn an_object_lives_and_dies_with_its_blobs() {
        let store = FakeStore::new(1 << 20);
        let key = store.put_blob(b"hello").unwrap();
        let leaf = store.create_objects(vec![json!({"typename": "t", "buffer_": blob_member(key)})]).unwrap()[0].id;
        let root =
            store.put_object("a/b", json!({"typename": "p", "x": {"id": leaf.to_string()}, "nbytes": 5})).unwrap();
        let query = [NameQuery::Prefix { prefix: "a".into(), limit: None }, NameQuery::Exact("a".into())];
        assert_eq!(store.names(&query).unwrap(), [vec![("a/b".to_string(), root)], vec![]]);
        let metas = store.metas(&[root, ObjectId(99)], false).unwrap();
        assert_eq!(metas.len(), 1);
        let meta = metas[&root].as_ref().unwrap();
        assert_eq!(meta.member("x").unwrap().blob("buffer_").unwrap(), key);
        let mut bytes = [0; 3];
        store.read(key, 1, &mut bytes).unwrap();
        assert_eq!(&bytes, b"ell");
        assert_eq!(store.read(key, 3, &mut bytes).unwrap_err().kind(), Kind::Malformed);

        store.delete(&[leaf]).unwrap();
        assert_eq!(store.object_count(), 2, "a member is not deleted under its parent");
        store.delete(&[root]).unwrap();
        assert_eq!((store.object_count(), store.blob_count()), (0, 0));
        assert_eq!(store.names(&query[..1]).unwrap()[0].len(), 1, "the name outlives the object");
        assert_eq!(store.verify(&[key]).unwrap_err().kind(), Kind::Stale);
    }

    #[test]
    fn freed_memory_is_recycled_under_readers() {
        let store = FakeStore::new(1 << 20);
        let key = store.put_blob(b"old bytes").unwrap();
        let blob = store.blob(key).unwrap().unwrap();
        store.drop_blobs(&[key.id]).unwrap();
        let other = store.put_blob(b"new bytes").unwrap();
        assert!(store.blob(other).unwrap().unwrap().same_place(&blob) && other != key);
        let mut bytes = [0; 3];
        blob.read(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"new");
    }

    #[test]
    fn full_means_nothing_was_made() {
        let store = FakeStore::new(1000);
        assert_eq!(store.create_blobs(&[600, 0, 600]).unwrap_err().kind(), Kind::Full);
        assert_eq!(store.create_blobs(&[u64::MAX, 2]).unwrap_err().kind(), Kind::Full);
        assert_eq!(store.blob_count(), 0);
        let made = store.create_blobs(&[600, 0]).unwrap();
        assert_eq!(made[1].id, ObjectId::EMPTY_BLOB);
        assert_eq!(store.status().unwrap().memory_usage, 600);
        let unsealed = BlobKey { instance: InstanceId(0), id: made[0].id };
        assert!(store.create_objects(vec![json!({"typename": "t", "b": blob_member(unsealed)})]).is_err());
    }

    #[test]
    fn failures_are_injected_and_counted() {
        let store = FakeStore::new(1000);
        store.fail_next(Op::Names, 1, Kind::Timeout);
        assert_eq!(store.names(&[]).unwrap_err().kind(), Kind::Timeout);
        assert!(store.names(&[]).is_ok());
        assert_eq!(store.calls(Op::Names), 2);
        let generation = store.instance().unwrap().generation;
        store.restart();
        assert_eq!(store.instance().unwrap().generation, generation + 1);
        let id = store.create_objects(vec![json!({"typename": "t"})]).unwrap()[0].id;
        assert_eq!(store.put_name("n", id).unwrap_err().kind(), Kind::Invalid);
    }
}
