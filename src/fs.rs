//! The filesystem: names, inodes, handles, directories. No kernel types: everything here runs without a mount.
//!
//! Contract with the kernel adapter ([`crate::fuse`]):
//! * every successful [`FileSystem::lookup`], `create`, `mkdir`, `symlink` and each attribute-carrying directory entry
//!   raises the lookup count of its inode by one, until `forget` takes it back;
//! * requests may arrive twice when a server is replaced ([`Caller::resent`]); handlers then succeed if the work is
//!   done already;
//! * a handle number means something to the next server too: it carries its inode.

mod adopt;
mod ahead;
mod attributes;
mod buffer;
pub mod cache;
pub mod copies;
mod deferred;
mod deletion;
pub mod direct;
mod directory;
mod folders;
mod formers;
pub mod gc;
pub mod host;
pub mod inode;
mod moves;
pub mod name;
mod nameless;
pub mod naming;
pub mod objects;
mod open;
mod opens;
mod options;
mod publish;
mod reclaim;
mod release;
mod rename;
mod resolve;
mod retry;
mod room;
mod saves;
mod spare;
pub mod staging;
mod summaries;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod trees;
mod write;

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

pub use host::{Area, Host, HostFile, Serving};
pub use open::FileBytes;
pub use opens::CONNECTION;
pub use options::{Options, ServePolicy};

use crate::error::{Error, Kind, Result};
use crate::sync::{Mutex, MutexGuard};
use crate::vineyard::store::{NameQuery, StoreStatus};
use crate::vineyard::{ObjectId, Store};
use directory::Listing;
use inode::{Inode, Inodes};

/// Inode number of the root directory.
pub const ROOT: u64 = 1;

/// Who asks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Caller {
    /// User of the calling process.
    pub uid: u32,
    /// Group of the calling process.
    pub gid: u32,
    /// Process id as the mount sees it.
    pub pid: u32,
    /// The kernel sent this request before, to a server that did not answer it.
    pub resent: bool,
    /// The request's number, the same when it is sent again.
    pub request: u64,
}

/// Type of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
}

/// Attributes of an inode.
#[derive(Clone, Debug)]
pub struct Attr {
    /// Inode number.
    pub ino: u64,
    /// Type.
    pub kind: FileKind,
    /// Size in bytes.
    pub size: u64,
    /// Permission bits, `0o7777`.
    pub perm: u16,
    /// Number of links: 1 for files; 2 for directories.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last access.
    pub atime: SystemTime,
    /// Last change of the content.
    pub mtime: SystemTime,
    /// Last change of anything.
    pub ctime: SystemTime,
}

impl Attr {
    /// Blocks of 512 bytes; always covers the size, because `tar -S` archives zeros otherwise.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(512)
    }
}

/// Answer to a lookup.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Attributes, inode number included.
    pub attr: Attr,
    /// How long the kernel may believe that the name leads to this inode.
    pub entry_ttl: Duration,
    /// How long the kernel may believe the attributes.
    pub attr_ttl: Duration,
}

/// How an open file is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serve {
    /// READ and WRITE requests; the kernel caches pages and may keep them from open to open.
    Cached,
    /// READ and WRITE requests, nothing cached but what is mapped. Where the kernel cannot map such files: as `Cached`.
    Direct,
    /// The kernel reads and writes the backing file that is registered under this id.
    Passthrough(u32),
}

/// Answer to an open.
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    /// Handle number.
    pub fh: u64,
    /// How it is served.
    pub serve: Serve,
    /// No FLUSH wanted at close: set on every read-only open.
    pub no_flush: bool,
}

/// One name of a directory.
#[derive(Clone, Debug)]
pub struct DirEntry {
    /// Offset to continue after this entry; never 0.
    pub next: u64,
    /// The name.
    pub name: OsString,
    /// Inode number as `d_ino` shows it.
    pub ino: u64,
    /// Type.
    pub kind: FileKind,
    /// Attributes, if asked for and known; counts as a lookup then.
    pub entry: Option<Entry>,
}

/// Changes that `setattr` may carry.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    /// New permission bits.
    pub mode: Option<u32>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// New size.
    pub size: Option<u64>,
    /// New access time.
    pub atime: Option<SystemTime>,
    /// New modification time.
    pub mtime: Option<SystemTime>,
}

/// Answer to `statfs`, in bytes and files.
#[derive(Clone, Copy, Debug, Default)]
pub struct StatFs {
    /// Limit of the store.
    pub total_bytes: u64,
    /// Bytes free in the store.
    pub free_bytes: u64,
    /// Number of names.
    pub files: u64,
}

/// The filesystem of one mount. All methods may be called from several threads at once.
///
/// Its operations are in the files of `fs/`: `resolve` (lookup), `directory` (listings), `open` (open, read, release),
/// `attributes` (stat, xattrs), `staging` and `publish` (writing), `rename` (rename, unlink, directories).
pub struct FileSystem {
    store: Arc<dyn Store>,
    host: Arc<dyn Host>,
    options: Options,
    objects: objects::Objects,
    inodes: Inodes,
    cache: cache::ImageCache,
    handles: Mutex<HashMap<u64, Handle>>,
    opens: opens::Opens,
    next_handle: AtomicU64,
    listings: Mutex<HashMap<String, Arc<Listing>>>,
    staging: staging::Staging,
    retries: retry::Retries,
    folders: folders::Folders,
    moves: moves::Moves,
    trees: trees::Trees,
    changing: formers::Unfinished,
    /// Objects that open handles read from the blobs, with the number of handles.
    lazy_opens: Mutex<HashMap<ObjectId, u64>>,
    /// Objects that nothing names any more, to be deleted when their last such handle is closed.
    doomed: Mutex<HashSet<ObjectId>>,
    /// Held while names are changed: what a name pointed to is read and replaced as one step.
    naming: naming::Naming,
    /// Questions until it is looked again whether the store has few names.
    many_names: AtomicU32,
    nameless: nameless::Nameless,
    store_status: Mutex<Option<(Instant, StoreStatus)>>,
    wishes: ahead::Wishes,
    mappings: release::Mappings,
    generation: AtomicU64,
    started: SystemTime,
    warnings: Mutex<Vec<String>>,
}

/// An open file or directory.
#[derive(Clone)]
enum Handle {
    /// A view of a published object.
    View {
        /// The object whose blobs it reads, which was counted for that. What its inode shows may be a copy of it by now.
        lazy: Option<ObjectId>,
    },
    /// A file that is being written, or was.
    Staged {
        /// Opened for writing.
        writer: bool,
        /// By which thread.
        pid: u32,
        /// Its process has closed one of its descriptors.
        closed: bool,
    },
    /// A directory, with the listing that it had when it was opened.
    Directory(Arc<Listing>),
}

/// Handles and numbers of staged files that one server may give out: 2^40, 12 days of a million a second.
const EPOCH_SHIFT: u32 = 40;
/// Servers of a mount before ranges are used again.
const EPOCHS: u64 = (1 << 20) - 1;
/// Most warnings that `status` keeps.
const WARNINGS_KEPT: usize = 20;

impl FileSystem {
    /// A filesystem over a store.
    pub fn new(store: Arc<dyn Store>, host: Arc<dyn Host>, options: Options) -> Self {
        // Handles of a former server must not meet ours: each has a range of its own, whatever the clock does.
        let start = (options.epoch % EPOCHS + 1) << EPOCH_SHIFT;
        FileSystem {
            objects: objects::Objects::new(options.tables),
            inodes: Inodes::new(options.prefix.clone(), start),
            cache: cache::ImageCache::new(options.cache_size, host.clone()),
            handles: Mutex::default(),
            opens: opens::Opens::new(host.clone(), start),
            next_handle: AtomicU64::new(start),
            listings: Mutex::default(),
            staging: staging::Staging::new(start),
            retries: retry::Retries::new((options.epoch > 0).then_some(options.entry_ttl)),
            folders: folders::Folders::new(host.clone()),
            moves: moves::Moves::default(),
            trees: trees::Trees::default(),
            changing: formers::Unfinished::default(),
            lazy_opens: Mutex::default(),
            doomed: Mutex::default(),
            naming: naming::Naming::default(),
            many_names: AtomicU32::default(),
            nameless: nameless::Nameless::default(),
            store_status: Mutex::default(),
            wishes: ahead::Wishes::default(),
            mappings: release::Mappings::default(),
            generation: AtomicU64::new(u64::MAX),
            started: SystemTime::now(),
            warnings: Mutex::default(),
            store,
            host,
            options,
        }
    }

    /// Changes of names also keep out who else holds this [lock](naming::lock_of).
    #[must_use]
    pub fn locked_by(mut self, folder: Option<naming::Folder>) -> Self {
        self.naming = naming::Naming::new(folder);
        self
    }

    fn handles(&self) -> MutexGuard<'_, HashMap<u64, Handle>> {
        self.handles.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn lazy_opens(&self) -> MutexGuard<'_, HashMap<ObjectId, u64>> {
        self.lazy_opens.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn add_handle(&self, handle: Handle) -> u64 {
        let fh = self.new_handle();
        self.handles().insert(fh, handle);
        fh
    }

    fn new_handle(&self) -> u64 {
        self.next_handle.fetch_add(1, Ordering::Relaxed)
    }

    /// Drops what was learned from a vineyardd that is gone.
    fn follow_store(&self) -> Result<()> {
        let generation = self.store.instance()?.generation;
        let before = self.generation.swap(generation, Ordering::Relaxed);
        if before != generation && before != u64::MAX {
            self.objects.clear();
            self.cache.clear();
            self.listings.lock().unwrap_or_else(|e| e.into_inner()).clear();
        }
        Ok(())
    }

    fn inode(&self, ino: u64) -> Result<Arc<Inode>> {
        match self.inodes.get(ino) {
            Some(inode) => Ok(inode),
            None => {
                let _rest = self.trees.rest();
                self.recover(ino)?.ok_or_else(|| Error::stale(format!("inode {ino} is not known (any more)")))
            }
        }
    }

    /// Keeps memory ready for the next large file that is opened, while such files are being opened. For a thread that has
    /// nothing else to do, now and then.
    pub fn keep_spare(&self) {
        self.objects.tidy();
        self.cache.keep_spare(|| {
            // Other clients remove objects without a word: images that no name leads to make room.
            let all = NameQuery::Prefix { prefix: String::new(), limit: None };
            match self.store.names(&[all]) {
                Ok(names) => self.cache.keep_only(&names.into_iter().flatten().map(|(_, object)| object).collect()),
                Err(error) => tracing::debug!("images that are of no use are not known: {error}"),
            }
        });
    }

    fn writable(&self) -> Result<()> {
        if self.options.read_only {
            return Err(Error::new(Kind::ReadOnly, "the mount is read-only"));
        }
        Ok(())
    }

    /// Keeps a warning for `status` and logs it.
    fn warn(&self, message: String) {
        tracing::warn!("{}", crate::error::one_line(&message));
        let mut warnings = self.warnings.lock().unwrap_or_else(|e| e.into_inner());
        if warnings.len() == WARNINGS_KEPT {
            warnings.remove(0);
        }
        warnings.push(message);
    }

    /// Size and use of the store, at most a second old.
    fn recent_status(&self) -> Result<StoreStatus> {
        let mut cached = self.store_status.lock().unwrap_or_else(|e| e.into_inner());
        match *cached {
            Some((at, status)) if at.elapsed() < Duration::from_secs(1) => Ok(status),
            _ => {
                let status = self.store.status()?;
                *cached = Some((Instant::now(), status));
                Ok(status)
            }
        }
    }

    /// Answer to `statfs`.
    pub fn statfs(&self) -> Result<StatFs> {
        let status = self.recent_status()?;
        Ok(StatFs {
            total_bytes: status.memory_limit,
            free_bytes: status.memory_limit.saturating_sub(status.memory_usage),
            files: self.inodes.len() as u64,
        })
    }

    /// What `status` says of the store, which is asked; with `error` in it if that does not answer.
    pub fn store_status(&self) -> serde_json::Value {
        match (self.store.instance(), self.recent_status()) {
            (Ok(instance), Ok(status)) => serde_json::json!({
                "socket": instance.socket, "instance": instance.id.0, "version": instance.version,
                "rpc_endpoint": instance.rpc_endpoint, "restarts_seen": instance.generation.saturating_sub(1),
                "memory_limit": status.memory_limit, "memory_usage": status.memory_usage,
            }),
            (Err(error), _) | (_, Err(error)) => serde_json::json!({"error": error.to_string()}),
        }
    }

    /// What `status` prints of this process: a JSON object of counters and modes. The store is not asked.
    pub fn status(&self) -> serde_json::Value {
        let (passthrough, reason) = match self.host.serving() {
            Serving::Passthrough => (true, None),
            Serving::Requests(reason) => (false, Some(reason)),
        };
        let (summaries, loaded) = self.objects.counts();
        serde_json::json!({
            "passthrough": passthrough, "passthrough_reason": reason, "read_only": self.options.read_only,
            "serve": self.options.serve, "prefix": self.options.prefix,
            "remote": self.store.remote_status(), "cache": self.cache.status(), "staging": self.staging.status(),
            "objects": {"summaries": summaries, "loaded": loaded}, "inodes": self.inodes.len(),
            "open_handles": self.handles().len(),
            "started": self.started.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            "warnings": *self.warnings.lock().unwrap_or_else(|e| e.into_inner()),
        })
    }
}
