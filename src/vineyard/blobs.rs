//! What this process knows of the store's memory: mapped memory files, and the places of blobs in them.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::id::{BlobKey, InstanceId, ObjectId};
use super::memory::{Blob, Segment, WritableFile};
use crate::error::{Context, Result};

/// Memory files that are kept mapped without any known blob in them. The store's pool is one file, to which its
/// allocator adds some; each blob on a disk file adds one.
const IDLE_FILES: usize = 64;

/// One memory file of the store.
#[derive(Debug)]
pub struct MemoryFile {
    /// Its read-only mapping.
    pub segment: Arc<Segment>,
    /// For filling new blobs.
    pub file: Arc<WritableFile>,
}

/// Mapped files and places of blobs of the vineyardd that answers now.
pub struct Memories {
    state: Mutex<State>,
    empty: Arc<Segment>,
    capacity: usize,
}

#[derive(Default)]
struct State {
    generation: u64,
    instance: Option<InstanceId>,
    /// By device and inode: descriptors of one file differ between connections. An inode number can't come back while
    /// its file is held here.
    files: HashMap<(u64, u64), Arc<MemoryFile>>,
    /// Places in two ages: when `young` has grown to half the capacity it becomes `old`, and what was old and not used
    /// since is forgotten.
    young: HashMap<ObjectId, Blob>,
    old: HashMap<ObjectId, Blob>,
}

impl Memories {
    /// Nothing known yet; at most about `capacity` places are kept.
    ///
    /// # Errors
    /// The errno of making one page of memory.
    pub fn new(capacity: usize) -> Result<Self> {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let page = memfd_create(c"empty-blob", MFdFlags::MFD_CLOEXEC).context(|| "making a memory file".into())?;
        nix::unistd::ftruncate(&page, 4096).context(|| "sizing a memory file".into())?;
        Ok(Memories { state: Mutex::default(), empty: Segment::map(&page, 4096)?, capacity: capacity.max(2) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all of the former vineyardd.
    pub fn reset(&self, generation: u64, instance: InstanceId) {
        let former =
            std::mem::replace(&mut *self.lock(), State { generation, instance: Some(instance), ..State::default() });
        // Unmapping may take long; not under the lock.
        drop(former);
    }

    /// The vineyardd whose memory this is, if one was met.
    pub fn instance(&self) -> Option<InstanceId> {
        self.lock().instance
    }

    /// The blob of no bytes.
    pub fn empty_blob(&self, key: BlobKey) -> Result<Blob> {
        Blob::new(key, self.empty.clone(), 0, 0)
    }

    /// Maps a received descriptor, or finds the mapping that another connection made of the same file.
    pub fn open(&self, generation: u64, fd: OwnedFd, map_size: u64) -> Result<Arc<MemoryFile>> {
        let stat = nix::sys::stat::fstat(&fd).context(|| "stat of the store's memory".into())?;
        let inode = (stat.st_dev, stat.st_ino);
        let map_size = usize::try_from(map_size).unwrap_or(usize::MAX);
        if let Some(known) = self.lock().files.get(&inode).filter(|known| known.segment.len() >= map_size) {
            return Ok(known.clone());
        }
        let segment = Segment::map(&fd, map_size)?;
        let fresh = Arc::new(MemoryFile { segment, file: Arc::new(WritableFile::new(fd)) });
        let mut state = self.lock();
        if state.generation != generation {
            return Ok(fresh);
        }
        if let Some(known) = state.files.get(&inode).filter(|known| known.segment.len() >= map_size) {
            return Ok(known.clone());
        }
        if state.files.len() >= IDLE_FILES {
            state.files.retain(|_, file| Arc::strong_count(file) > 1 || Arc::strong_count(&file.segment) > 1);
        }
        state.files.insert(inode, fresh.clone());
        Ok(fresh)
    }

    /// The place of a blob, if it is known.
    pub fn get(&self, key: BlobKey) -> Option<Blob> {
        let mut state = self.lock();
        if state.instance != Some(key.instance) {
            return None;
        }
        if let Some(blob) = state.young.get(&key.id) {
            return Some(blob.clone());
        }
        let blob = state.old.remove(&key.id)?;
        state.young.insert(key.id, blob.clone());
        Some(blob)
    }

    /// Keeps places that a connection of `generation` has got.
    pub fn insert<'a>(&self, generation: u64, blobs: impl Iterator<Item = &'a Blob>) {
        let mut state = self.lock();
        if state.generation != generation {
            return;
        }
        for blob in blobs {
            if state.young.len() >= self.capacity / 2 {
                state.old = std::mem::take(&mut state.young);
            }
            state.young.insert(blob.key().id, blob.clone());
        }
    }

    /// Forgets the place of a blob that is gone or was moved.
    pub fn forget(&self, key: BlobKey) {
        let mut state = self.lock();
        if state.instance == Some(key.instance) {
            state.young.remove(&key.id);
            state.old.remove(&key.id);
        }
    }

    /// Number of places that are kept.
    pub fn len(&self) -> usize {
        let state = self.lock();
        state.young.len() + state.old.len()
    }

    /// True if no place is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    const HERE: InstanceId = InstanceId(3);

    fn file(len: i64) -> OwnedFd {
        let fd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&fd, len).unwrap();
        fd
    }

    fn key(id: u64) -> BlobKey {
        BlobKey { instance: HERE, id: ObjectId(1 << 63 | id) }
    }

    #[test]
    fn one_file_is_mapped_once() {
        let memories = Memories::new(8).unwrap();
        memories.reset(1, HERE);
        let fd = file(8192);
        let first = memories.open(1, fd.try_clone().unwrap(), 4096).unwrap();
        let again = memories.open(1, fd.try_clone().unwrap(), 4096).unwrap();
        assert!(Arc::ptr_eq(&first.segment, &again.segment));
        let longer = memories.open(1, fd.try_clone().unwrap(), 8192).unwrap();
        assert_eq!(longer.segment.len(), 8192);
        assert_eq!(memories.open(1, fd, 8193).unwrap_err().kind(), crate::Kind::Malformed);
        assert!(!Arc::ptr_eq(&first.segment, &memories.open(1, file(8192), 4096).unwrap().segment));
    }

    #[test]
    fn places_are_bounded_and_die_with_their_generation() {
        let memories = Memories::new(8).unwrap();
        memories.reset(1, HERE);
        let segment = Segment::map(file(4096), 4096).unwrap();
        let blobs: Vec<Blob> = (0..100).map(|i| Blob::new(key(i), segment.clone(), i * 8, 8).unwrap()).collect();
        memories.insert(1, blobs.iter());
        assert!(memories.len() <= 8 && memories.get(key(99)).is_some() && memories.get(key(0)).is_none());
        assert!(memories.get(BlobKey { instance: InstanceId(4), ..key(99) }).is_none());
        memories.forget(key(99));
        assert!(memories.get(key(99)).is_none());
        memories.reset(2, HERE);
        memories.insert(1, blobs.iter());
        assert!(memories.is_empty(), "places of a former vineyardd are not kept");
    }
}
