//! The filesystem: names, inodes, handles, directories. No kernel types: everything here runs without a mount.
//!
//! Contract with the kernel adapter ([`crate::fuse`]):
//! * every successful [`FileSystem::lookup`], `create`, `mkdir`, `symlink` and each attribute-carrying directory entry
//!   raises the lookup count of its inode by one, until `forget` takes it back;
//! * requests may arrive twice when a server is replaced ([`Caller::resent`]); handlers then succeed if the work is
//!   done already;
//! * a handle number means something to the next server too: it carries its inode.

pub mod host;

use std::ffi::{OsStr, OsString};
use std::time::{Duration, SystemTime};

pub use host::{Area, Host, HostFile, Serving};

use crate::error::{Error, Kind, Result};

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
    /// READ and WRITE requests, nothing cached.
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
pub struct FileSystem {
    host: Box<dyn Host>,
}

macro_rules! later {
    () => {
        Err(Error::new(Kind::Unsupported, "not supported"))
    };
}

#[allow(unused_variables, missing_docs, clippy::too_many_arguments)]
impl FileSystem {
    pub fn lookup(&self, parent: u64, name: &OsStr, caller: Caller) -> Result<Entry> {
        later!()
    }
    pub fn forget(&self, ino: u64, count: u64) {}
    pub fn getattr(&self, ino: u64, fh: Option<u64>) -> Result<(Attr, Duration)> {
        later!()
    }
    pub fn setattr(&self, ino: u64, fh: Option<u64>, change: SetAttr, caller: Caller) -> Result<(Attr, Duration)> {
        later!()
    }
    pub fn open(&self, ino: u64, flags: i32, caller: Caller) -> Result<Opened> {
        later!()
    }
    pub fn create(
        &self,
        parent: u64,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        caller: Caller,
    ) -> Result<(Entry, Opened)> {
        later!()
    }
    /// Exactly `size` bytes, or fewer at the end of the file, or an error: a short answer would be silent corruption.
    pub fn read(&self, ino: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>> {
        later!()
    }
    pub fn write(&self, ino: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32> {
        later!()
    }
    pub fn flush(&self, ino: u64, fh: u64, caller: Caller) -> Result<()> {
        later!()
    }
    pub fn fsync(&self, ino: u64, fh: u64, caller: Caller) -> Result<()> {
        later!()
    }
    pub fn release(&self, ino: u64, fh: u64) {}
    /// The handle, and whether the kernel may keep the listing that it has.
    pub fn opendir(&self, ino: u64) -> Result<(u64, bool)> {
        later!()
    }
    /// Gives entries after `offset` to `add` until that returns true (full).
    pub fn readdir(
        &self,
        ino: u64,
        fh: u64,
        offset: u64,
        with_attributes: bool,
        add: &mut dyn FnMut(DirEntry) -> bool,
    ) -> Result<()> {
        later!()
    }
    pub fn releasedir(&self, ino: u64, fh: u64) {}
    pub fn mkdir(&self, parent: u64, name: &OsStr, mode: u32, umask: u32, caller: Caller) -> Result<Entry> {
        later!()
    }
    pub fn rmdir(&self, parent: u64, name: &OsStr, caller: Caller) -> Result<()> {
        later!()
    }
    pub fn unlink(&self, parent: u64, name: &OsStr, caller: Caller) -> Result<()> {
        later!()
    }
    pub fn rename(
        &self,
        parent: u64,
        name: &OsStr,
        new_parent: u64,
        new_name: &OsStr,
        flags: u32,
        caller: Caller,
    ) -> Result<()> {
        later!()
    }
    pub fn symlink(&self, parent: u64, name: &OsStr, target: &OsStr, caller: Caller) -> Result<Entry> {
        later!()
    }
    pub fn readlink(&self, ino: u64) -> Result<Vec<u8>> {
        later!()
    }
    pub fn statfs(&self) -> Result<StatFs> {
        later!()
    }
    pub fn getxattr(&self, ino: u64, name: &OsStr) -> Result<Vec<u8>> {
        later!()
    }
    /// Names, each with a terminating NUL.
    pub fn listxattr(&self, ino: u64) -> Result<Vec<u8>> {
        later!()
    }
    pub fn setxattr(&self, ino: u64, name: &OsStr, value: &[u8], flags: i32, caller: Caller) -> Result<()> {
        later!()
    }
    pub fn removexattr(&self, ino: u64, name: &OsStr, caller: Caller) -> Result<()> {
        later!()
    }
    pub fn fallocate(&self, ino: u64, fh: u64, offset: u64, len: u64, mode: i32) -> Result<()> {
        later!()
    }
    pub fn lseek(&self, ino: u64, fh: u64, offset: i64, whence: i32) -> Result<u64> {
        later!()
    }
    /// What `status` prints: a JSON object of counters and modes.
    pub fn status(&self) -> serde_json::Value {
        serde_json::json!({"passthrough": matches!(self.host.serving(), Serving::Passthrough)})
    }
}
