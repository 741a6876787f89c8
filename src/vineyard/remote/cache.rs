//! Blobs of other instances that are here, or on their way.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::transfer::Transfer;
use crate::vineyard::BlobKey;

/// Most blobs: each slab is a mapping, of which a process may have about 65,000.
const MOST: usize = 30_000;
/// Sizes that are remembered beside those of the blobs themselves.
const SIZES: usize = 1 << 17;

/// The cache. What was used longest ago goes first; readers keep what they hold.
pub struct Cache {
    limit: u64,
    entries: HashMap<BlobKey, (Arc<Transfer>, u64)>,
    by_use: BTreeMap<u64, BlobKey>,
    bytes: u64,
    clock: u64,
    evictions: u64,
    /// Sizes of blobs, which never change.
    sizes: HashMap<BlobKey, u64>,
    /// Blobs that were dropped while it was unknown whether what was read of them was theirs.
    doubtful: HashSet<BlobKey>,
}

impl Cache {
    /// An empty cache for `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Cache {
            limit,
            entries: HashMap::new(),
            by_use: BTreeMap::new(),
            bytes: 0,
            clock: 0,
            evictions: 0,
            sizes: HashMap::new(),
            doubtful: HashSet::new(),
        }
    }

    /// Bytes, limit, number of blobs, and how many were dropped for room.
    pub fn figures(&self) -> (u64, u64, usize, u64) {
        (self.bytes, self.limit, self.entries.len(), self.evictions)
    }

    /// The transfer of a blob, which counts as a use.
    pub fn get(&mut self, key: BlobKey) -> Option<Arc<Transfer>> {
        self.clock += 1;
        let (transfer, used) = self.entries.get_mut(&key)?;
        self.by_use.remove(used);
        *used = self.clock;
        self.by_use.insert(self.clock, key);
        Some(transfer.clone())
    }

    /// The transfer of a blob, without that.
    pub fn peek(&self, key: BlobKey) -> Option<&Arc<Transfer>> {
        self.entries.get(&key).map(|(transfer, _)| transfer)
    }

    /// The size of a blob, if it is known.
    pub fn size(&self, key: BlobKey) -> Option<u64> {
        self.peek(key).map(|transfer| transfer.len()).or_else(|| self.sizes.get(&key).copied())
    }

    /// Remembers a size.
    pub fn learn_size(&mut self, key: BlobKey, size: u64) {
        if self.sizes.len() >= SIZES {
            self.sizes.clear();
        }
        self.sizes.insert(key, size);
    }

    /// True if so many bytes fit beside what is on its way.
    pub fn has_room(&self, size: u64) -> bool {
        let active = self.entries.values().filter(|(transfer, _)| transfer.is_active()).map(|(t, _)| t.len());
        active.sum::<u64>().saturating_add(size) <= self.limit
    }

    /// Puts a transfer in, and drops others as far as there is no room for it.
    pub fn insert(&mut self, transfer: Arc<Transfer>) {
        let key = transfer.key();
        self.remove(key);
        while self.bytes.saturating_add(transfer.len()) > self.limit || self.entries.len() >= MOST {
            let idle = self.by_use.values().find(|key| self.peek(**key).is_some_and(|t| !t.is_active()));
            let Some(&oldest) = idle else { break };
            self.evictions += 1;
            self.remove(oldest);
        }
        self.clock += 1;
        self.bytes = self.bytes.saturating_add(transfer.len());
        self.by_use.insert(self.clock, key);
        self.entries.insert(key, (transfer, self.clock));
    }

    fn remove(&mut self, key: BlobKey) {
        if let Some((transfer, used)) = self.entries.remove(&key) {
            self.by_use.remove(&used);
            self.bytes = self.bytes.saturating_sub(transfer.len());
            if transfer.is_doubtful() {
                self.doubtful.insert(key);
            }
            self.learn_size(key, transfer.len());
        }
    }

    /// Drops a transfer that failed, if it is still the one of its blob.
    pub fn forget(&mut self, failed: &Arc<Transfer>) {
        if self.peek(failed.key()).is_some_and(|known| Arc::ptr_eq(known, failed)) {
            self.remove(failed.key());
        }
    }

    /// True if bytes of the blob were handed out that nobody has vouched for, and the transfer is gone.
    pub fn is_doubtful(&self, key: BlobKey) -> bool {
        self.doubtful.contains(&key)
    }

    /// The blob exists, or nobody will read what was read of it.
    pub fn settle(&mut self, key: BlobKey) {
        self.doubtful.remove(&key);
    }

    /// Drops all of a blob that does not exist any more.
    pub fn drop_blob(&mut self, key: BlobKey) {
        self.remove(key);
        self.sizes.remove(&key);
        self.doubtful.remove(&key);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::transfer::Slab;
    use super::*;
    use crate::vineyard::{InstanceId, ObjectId};

    fn key(id: u64) -> BlobKey {
        BlobKey { instance: InstanceId(1), id: ObjectId(1 << 63 | id) }
    }

    fn transfer(id: u64, len: u64) -> Arc<Transfer> {
        let (slab, places) = Slab::new(std::iter::once(len), None).unwrap();
        Arc::new(Transfer::new(key(id), len, &slab, places[0]))
    }

    fn complete(id: u64, len: u64) -> Arc<Transfer> {
        let transfer = transfer(id, len);
        assert!(transfer.demand(0..len));
        transfer.start();
        transfer.store(0, &vec![id as u8; len as usize]).unwrap();
        transfer.complete();
        transfer
    }

    #[test]
    fn what_was_used_longest_ago_goes_first() {
        let mut cache = Cache::new(100);
        (1..=3).for_each(|id| cache.insert(complete(id, 30)));
        assert!(cache.get(key(1)).is_some());
        cache.insert(complete(4, 30));
        assert!(cache.peek(key(2)).is_none() && cache.peek(key(1)).is_some());
        assert_eq!(cache.figures(), (90, 100, 3, 1));
        assert_eq!(cache.size(key(2)), Some(30), "sizes outlive the bytes");
        assert!(!cache.is_doubtful(key(2)));
    }

    #[test]
    fn what_is_on_its_way_stays_and_doubt_is_remembered() {
        let kib = |n: u64| n << 10;
        let mut cache = Cache::new(kib(1000));
        let active = transfer(1, kib(900));
        assert!(active.demand(0..kib(100)));
        let run = active.start();
        active.store(0, &vec![1; 50 << 10]).unwrap();
        assert!(active.wait(kib(51), std::time::Duration::ZERO).is_err());
        assert!(!active.is_doubtful(), "nothing was handed out");
        assert!(active.wait(kib(40), std::time::Duration::ZERO).unwrap());
        cache.insert(active.clone());
        assert!(cache.has_room(kib(100)) && !cache.has_room(kib(101)));
        cache.insert(complete(2, kib(600)));
        assert!(cache.peek(key(1)).is_some() && cache.peek(key(2)).is_some());
        active.fail(run, &crate::Error::stale("gone"));
        cache.forget(&active);
        assert!(cache.peek(key(1)).is_none() && cache.is_doubtful(key(1)));
        cache.settle(key(1));
        assert!(!cache.is_doubtful(key(1)));
    }
}
