//! Blobs of other instances of the cluster, brought here over TCP when they are read.
//!
//! vineyardd hands out whole blobs only (`get_remote_buffers`, `src/server/async/socket_server.cc` of v6d 0.24), but as
//! a stream: bytes are readable here as they arrive, a transfer pauses and is given up when nobody reads on, and what
//! came once is kept in memory of this process, up to a limit, for all readers. An id is never used twice, so what came
//! whole while the blob existed is the blob's for ever; of what came in part the owner is asked, after it was copied,
//! whether the blob still exists ([`Remote::verify`]).
//!
//! Metadata does not come this way: the local vineyardd has that of the whole cluster.

mod cache;
mod fetch;
mod inflate;
mod peer;
mod transfer;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use cache::Cache;
use fetch::{Counters, Fetcher, Job};
use peer::Peer;
use transfer::{Slab, Transfer, Trust};

pub use peer::Cluster;
pub use transfer::{Arrived, MemoryMaker};

use super::id::{BlobKey, InstanceId, ObjectId};
use super::memory::Blob;
use crate::error::{Error, Kind, Result};

/// Blobs up to this size are asked for together.
const SMALL: u64 = 256 << 10;
/// Most bytes of blobs that are asked for together, and most blobs.
const GROUP: (u64, usize) = (4 << 20, 512);

/// Whether data of other instances is brought here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RemotePolicy {
    /// What is read is brought.
    #[default]
    Lazy,
    /// The same, and the filesystem makes copies in the local vineyardd of what was opened.
    Full,
    /// Reading is refused with `Remote`; sizes are still told.
    Never,
}

/// What came from other instances since the client was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RemoteStatus {
    /// Whether data is brought.
    pub policy: RemotePolicy,
    /// Requests for blobs and sizes.
    pub requests: u64,
    /// Bytes of blobs that came over the network.
    pub bytes: u64,
    /// Blobs that came whole.
    pub blobs: u64,
    /// Transfers that failed.
    pub failures: u64,
    /// Bytes of blobs that are here, or on their way.
    pub cached_bytes: u64,
    /// Number of these blobs.
    pub cached_blobs: usize,
    /// Most bytes that are kept.
    pub limit: u64,
    /// Blobs that were dropped for room.
    pub evictions: u64,
}

/// How remote data is treated.
#[derive(Clone)]
pub struct RemoteOptions {
    /// Whether it is brought.
    pub policy: RemotePolicy,
    /// Most bytes of it that are kept.
    pub cache_size: u64,
    /// Connections to one instance that bring blobs at the same time.
    pub connections: usize,
    /// Where memory for large blobs comes from, if not from memfds.
    pub memory: Option<MemoryMaker>,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        RemoteOptions { policy: RemotePolicy::Lazy, cache_size: 1 << 30, connections: 4, memory: None }
    }
}

/// See the [module](self). All keys given to it are of other instances; `cluster` asks which those are.
pub struct Remote {
    options: RemoteOptions,
    deadline: Duration,
    cache: Mutex<Cache>,
    peers: Mutex<HashMap<InstanceId, Arc<Peer>>>,
    fetcher: Arc<Fetcher>,
}

fn gone(key: BlobKey) -> Error {
    Error::stale(format!("blob {key} is gone from its instance"))
}

impl Remote {
    /// Nothing is here yet. `deadline` is for connecting, for each reply, and for each pause in a stream.
    pub fn new(options: RemoteOptions, deadline: Duration) -> Self {
        let connections = options.connections.max(1);
        Remote {
            deadline,
            cache: Mutex::new(Cache::new(options.cache_size)),
            peers: Mutex::default(),
            fetcher: Arc::new(Fetcher { connections, counters: Counters::default() }),
            options,
        }
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn peer(&self, instance: InstanceId) -> Arc<Peer> {
        let mut peers = self.peers.lock().unwrap_or_else(|e| e.into_inner());
        peers.entry(instance).or_insert_with(|| Arc::new(Peer::new(instance, self.deadline))).clone()
    }

    /// As [`Peer::locate`]. Instances that the cluster does not know any more are forgotten with their connections: one
    /// that starts again has a new number, so nobody would ever close those.
    fn locate(&self, peer: &Peer, cluster: Cluster) -> Result<()> {
        peer.locate(&|| {
            let found = cluster()?;
            let mut peers = self.peers.lock().unwrap_or_else(|e| e.into_inner());
            let former: Vec<_> = peers.extract_if(|instance, _| !found.contains_key(instance)).collect();
            drop(peers);
            // Their connections are closed without the lock.
            drop(former);
            Ok(found)
        })
    }

    /// Counters.
    pub fn status(&self) -> RemoteStatus {
        let counters = &self.fetcher.counters;
        let (cached_bytes, limit, cached_blobs, evictions) = self.cache().figures();
        RemoteStatus {
            policy: self.options.policy,
            requests: counters.requests.load(Ordering::Relaxed),
            bytes: counters.bytes.load(Ordering::Relaxed),
            blobs: counters.blobs.load(Ordering::Relaxed),
            failures: counters.failures.load(Ordering::Relaxed),
            cached_bytes,
            cached_blobs,
            limit,
            evictions,
        }
    }

    fn permitted(&self, key: BlobKey) -> Result<()> {
        match self.options.policy {
            RemotePolicy::Lazy | RemotePolicy::Full => Ok(()),
            RemotePolicy::Never => {
                let what = format!("blob {key} lives on another instance, and this mount brings nothing here");
                Err(Error::new(Kind::Remote, format!("{what} (--migrate never)")))
            }
        }
    }

    /// Asks for sizes that are not known, each instance once. Blobs that don't exist are skipped.
    ///
    /// # Errors
    /// `Unreachable`.
    pub fn prepare(&self, keys: &[BlobKey], cluster: Cluster) -> Result<()> {
        let mut unknown: BTreeMap<InstanceId, Vec<ObjectId>> = BTreeMap::new();
        {
            let cache = self.cache();
            for key in keys.iter().filter(|key| key.id.is_stored_blob() && cache.size(**key).is_none()) {
                unknown.entry(key.instance).or_default().push(key.id);
            }
        }
        for (instance, mut ids) in unknown {
            ids.sort_unstable();
            ids.dedup();
            let sizes = self.ask(instance, &ids, cluster)?;
            let mut cache = self.cache();
            sizes.into_iter().for_each(|(id, size)| cache.learn_size(BlobKey { instance, id }, size));
        }
        Ok(())
    }

    fn ask(&self, instance: InstanceId, ids: &[ObjectId], cluster: Cluster) -> Result<HashMap<ObjectId, u64>> {
        let peer = self.peer(instance);
        self.locate(&peer, cluster)?;
        self.fetcher.counters.requests.fetch_add(1, Ordering::Relaxed);
        peer.sizes(ids)
    }

    /// Size in bytes.
    ///
    /// # Errors
    /// `Unreachable`; `Stale` if there is no such blob.
    pub fn size(&self, key: BlobKey, cluster: Cluster) -> Result<u64> {
        if let Some(size) = self.cache().size(key) {
            return Ok(size);
        }
        self.prepare(&[key], cluster)?;
        self.cache().size(key).ok_or_else(|| gone(key))
    }

    /// Begins to bring parts of blobs, without waiting for them. `ahead` marks what nobody waits for: it is left out
    /// when it does not fit.
    ///
    /// # Errors
    /// `Remote` if policy forbids it, `Unreachable`, the errno of making memory.
    pub fn want(&self, parts: &[(BlobKey, Range<u64>)], ahead: bool, cluster: Cluster) -> Result<()> {
        let Some((first, _)) = parts.iter().find(|(key, _)| key.id.is_stored_blob()) else { return Ok(()) };
        self.permitted(*first)?;
        let parts: Vec<_> = parts.iter().filter(|(key, part)| key.id.is_stored_blob() && !part.is_empty()).collect();
        let keys: Vec<BlobKey> = parts.iter().map(|(key, _)| *key).collect();
        self.prepare(&keys, cluster)?;
        let mut jobs: Vec<(InstanceId, Job)> = Vec::new();
        let mut groups: BTreeMap<InstanceId, Vec<(BlobKey, u64)>> = BTreeMap::new();
        let mut failure = Ok(());
        {
            let mut cache = self.cache();
            for (key, part) in parts {
                // A failure is for those who waited; who comes later tries again.
                if let Some(failed) = cache.peek(*key).filter(|transfer| transfer.has_failed()).cloned() {
                    cache.forget(&failed);
                }
                if let Some(transfer) = cache.get(*key) {
                    if transfer.demand(part.clone()) {
                        jobs.push((key.instance, vec![transfer]));
                    }
                    continue;
                }
                let Some(size) = cache.size(*key).filter(|size| *size > 0) else { continue };
                if ahead && !cache.has_room(size) {
                    continue;
                }
                let group = groups.entry(key.instance).or_default();
                if size <= SMALL {
                    // Twice in one call is once here.
                    if !group.iter().any(|(other, _)| other == key) {
                        group.push((*key, size));
                    }
                    let bytes: u64 = group.iter().map(|(_, size)| size).sum();
                    if bytes >= GROUP.0 || group.len() >= GROUP.1 {
                        let group = std::mem::take(group);
                        failure = failure.and(self.begin(&mut cache, &group, 0..u64::MAX, &mut jobs));
                    }
                } else {
                    failure = failure.and(self.begin(&mut cache, &[(*key, size)], part.clone(), &mut jobs));
                }
            }
            for group in groups.values().filter(|group| !group.is_empty()) {
                failure = failure.and(self.begin(&mut cache, group, 0..u64::MAX, &mut jobs));
            }
        }
        for (instance, job) in jobs {
            let peer = self.peer(instance);
            match self.locate(&peer, cluster) {
                Ok(()) => fetch::enqueue(&self.fetcher, &peer, job),
                Err(error) => {
                    job.iter().for_each(|transfer| transfer.refuse(&error));
                    failure = failure.and(Err(error));
                }
            }
        }
        failure
    }

    /// Makes transfers that share memory and a request, and asks for a part of each.
    fn begin(
        &self,
        cache: &mut Cache,
        group: &[(BlobKey, u64)],
        part: Range<u64>,
        jobs: &mut Vec<(InstanceId, Job)>,
    ) -> Result<()> {
        let Some((first, _)) = group.first() else { return Ok(()) };
        let (slab, places) = Slab::new(group.iter().map(|(_, size)| *size), self.options.memory.as_ref())?;
        let mut job = Job::with_capacity(group.len());
        for (&(key, size), place) in group.iter().zip(places) {
            let transfer = Arc::new(Transfer::new(key, size, &slab, place));
            if transfer.demand(part.clone()) {
                job.push(transfer.clone());
            }
            cache.insert(transfer);
        }
        if !job.is_empty() {
            jobs.push((first.instance, job));
        }
        Ok(())
    }

    /// Copies bytes, after they have come.
    ///
    /// # Errors
    /// `Remote` if policy forbids it; `Unreachable`; `Stale` if there is no such blob; `Malformed` if the range is
    /// not inside it.
    pub fn read(&self, key: BlobKey, offset: u64, out: &mut [u8], cluster: Cluster) -> Result<()> {
        let part = offset..offset.saturating_add(out.len() as u64);
        match self.come(key, &part, cluster)? {
            Some(transfer) => transfer.blob()?.read(offset, out),
            None => Ok(()),
        }
    }

    /// The bytes themselves, after they have come; `None` for none.
    ///
    /// # Errors
    /// As [`Remote::read`].
    pub fn arrived(&self, key: BlobKey, part: Range<u64>, cluster: Cluster) -> Result<Option<Arrived>> {
        self.come(key, &part, cluster)?.map(|transfer| transfer.arrived(part)).transpose()
    }

    /// Waits for a part of a blob; `None` for an empty one.
    fn come(&self, key: BlobKey, part: &Range<u64>, cluster: Cluster) -> Result<Option<Arc<Transfer>>> {
        let size = self.size(key, cluster)?;
        if part.end > size {
            return Err(Error::malformed(format!(
                "bytes {} to {} of blob {key} of {size} bytes",
                part.start, part.end
            )));
        }
        if part.is_empty() {
            return Ok(None);
        }
        loop {
            self.want(&[(key, part.clone())], false, cluster)?;
            let transfer = self.cache().get(key);
            let Some(transfer) = transfer else {
                // Dropped again at once: everything else is on its way. The next attempt finds room, unless there is
                // nothing to bring: the blob has gone meanwhile.
                if self.cache().size(key).is_none_or(|size| size == 0) {
                    return Err(Error::stale(format!("blob {key} is gone from its instance")));
                }
                continue;
            };
            match transfer.wait(part.end, fetch::patience(self.deadline)) {
                Ok(true) => return Ok(Some(transfer)),
                Ok(false) => {}
                Err(error) => {
                    self.cache().forget(&transfer);
                    return Err(error);
                }
            }
        }
    }

    /// The whole blob, if it is here.
    pub fn blob(&self, key: BlobKey) -> Result<Option<Blob>> {
        match self.cache().get(key) {
            Some(transfer) if transfer.is_complete() => transfer.blob().map(Some),
            _ => Ok(None),
        }
    }

    /// A permanent copy, on its instance, of an object's metadata with some values replaced.
    ///
    /// # Errors
    /// `Unreachable`; what that instance answers.
    pub fn shallow_copy(
        &self,
        instance: InstanceId,
        id: ObjectId,
        extra: &serde_json::Map<String, serde_json::Value>,
        cluster: Cluster,
    ) -> Result<ObjectId> {
        let peer = self.peer(instance);
        self.locate(&peer, cluster)?;
        self.fetcher.counters.requests.fetch_add(2, Ordering::Relaxed);
        peer.shallow_copy(id, extra)
    }

    /// Lets an instance copy an object of another one for itself.
    ///
    /// # Errors
    /// `Unreachable`; what that instance answers.
    pub fn migrate(&self, instance: InstanceId, id: ObjectId, cluster: Cluster) -> Result<ObjectId> {
        let peer = self.peer(instance);
        self.locate(&peer, cluster)?;
        self.fetcher.counters.requests.fetch_add(1, Ordering::Relaxed);
        peer.migrate(id)
    }

    /// Whether an instance answers: a connection is made that is not kept for anything else.
    ///
    /// # Errors
    /// `Unreachable`; `Stale` if another one is at its address.
    pub fn reach(&self, instance: InstanceId, cluster: Cluster) -> Result<()> {
        let peer = self.peer(instance);
        self.locate(&peer, cluster)?;
        let (connection, _) = peer.checkout(true)?;
        peer.checkin(connection);
        Ok(())
    }

    /// Lets an instance delete objects of its own.
    ///
    /// # Errors
    /// `Unreachable`; what that instance answers.
    pub fn delete(&self, instance: InstanceId, ids: &[ObjectId], cluster: Cluster) -> Result<()> {
        let peer = self.peer(instance);
        self.locate(&peer, cluster)?;
        self.fetcher.counters.requests.fetch_add(1, Ordering::Relaxed);
        peer.delete(ids)
    }

    /// Makes sure that what was read of these blobs was theirs. Asks nobody about blobs that came whole, nor about
    /// those of which nothing was read.
    ///
    /// # Errors
    /// `Stale` if one does not exist any more; `Unreachable` if its instance can't be asked.
    pub fn verify(&self, keys: &[BlobKey], cluster: Cluster) -> Result<()> {
        // A blob, and up to which byte of which transfer the answer vouches.
        type Question = (ObjectId, Option<(Arc<Transfer>, u64)>);
        let mut questions: BTreeMap<InstanceId, Vec<Question>> = BTreeMap::new();
        for &key in keys.iter().filter(|key| key.id.is_stored_blob()) {
            let (transfer, doubtful) = {
                let cache = self.cache();
                (cache.peek(key).cloned(), cache.is_doubtful(key))
            };
            if let Some(transfer) = transfer {
                match transfer.trust(fetch::patience(self.deadline)) {
                    Ok(Trust::Sure) => {}
                    Ok(Trust::Ask(end)) => {
                        let question = (key.id, Some((transfer, end)));
                        questions.entry(key.instance).or_default().push(question);
                        continue;
                    }
                    Err(error) => {
                        self.cache().forget(&transfer);
                        return Err(error);
                    }
                }
            }
            if doubtful {
                questions.entry(key.instance).or_default().push((key.id, None));
            }
        }
        for (instance, questions) in questions {
            let ids: Vec<ObjectId> = questions.iter().map(|(id, _)| *id).collect();
            let there = self.ask(instance, &ids, cluster)?;
            for (id, asked) in questions {
                let key = BlobKey { instance, id };
                if !there.contains_key(&id) {
                    self.cache().drop_blob(key);
                    return Err(gone(key));
                }
                if let Some((transfer, end)) = asked {
                    transfer.verified(end);
                }
                self.cache().settle(key);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
