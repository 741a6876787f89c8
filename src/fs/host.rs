//! What the filesystem needs of the process that holds the mount: memory files that outlive a server, and invalidation.

use std::fs::File;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};

/// What a memory file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Area {
    /// Assembled images: the size is known, pages are as large as they fit.
    Image,
    /// Files being written: the size is not known.
    Staging,
}

/// A memory file that the host keeps until it is released.
#[derive(Debug)]
pub struct HostFile {
    /// Number under which the host keeps it.
    pub key: u64,
    /// The file, open for reading and writing, without a path.
    pub file: Arc<File>,
    /// Id under which the kernel serves it by passthrough, if it does.
    pub backing: Option<u32>,
}

/// A memory file that a former server of the same mount left behind, with its note on it.
#[derive(Debug)]
pub struct TaggedFile {
    /// The note.
    pub tag: String,
    /// What the file is for.
    pub area: Area,
    /// The file.
    pub file: HostFile,
}

/// Whether files can be served without this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serving {
    /// The kernel reads memory files by itself.
    Passthrough,
    /// Every read is a request; the reason why.
    Requests(String),
}

/// The side of the mount that outlives a server.
pub trait Host: Send + Sync {
    /// How files are served.
    fn serving(&self) -> Serving;

    /// Makes a memory file; `size` is its final size for [`Area::Image`], 0 for [`Area::Staging`]. With passthrough it
    /// is registered with the kernel.
    ///
    /// # Errors
    /// `Full` if the area has no room.
    fn create_file(&self, area: Area, size: u64) -> Result<HostFile>;

    /// Notes what a memory file is (at most 16 KiB), for the server after this one; files without a note are
    /// dropped when that one starts. A host that has no next server does nothing.
    fn tag_file(&self, _key: u64, _tag: &str) {}

    /// The files with notes that a former server left behind: to be taken over or released.
    ///
    /// # Errors
    /// If the host does not answer.
    fn tagged_files(&self) -> Result<Vec<TaggedFile>> {
        Ok(Vec::new())
    }

    /// Keeps a small text for the server after this one; `None` removes it. A host that has no next server does nothing.
    fn note(&self, _key: &str, _text: Option<&str>) {}

    /// All such texts that a former server left, by their keys.
    ///
    /// # Errors
    /// If the host does not answer.
    fn notes(&self) -> Result<Vec<(String, String)>> {
        Ok(Vec::new())
    }

    /// Whether anybody but this process and the host has a memory file open or mapped: the kernel, for those whose files it
    /// serves by passthrough.
    ///
    /// # Errors
    /// If that is not known.
    fn is_used(&self, _key: u64) -> Result<bool> {
        Err(Error::new(Kind::Unsupported, "the host does not tell who uses its files"))
    }

    /// Drops a memory file. Memory is freed when the last mapping of it is gone.
    fn release_file(&self, key: u64);

    /// Tells the kernel that a name may lead elsewhere now. Returns at once; may be called from a handler.
    fn invalidate_entry(&self, parent: u64, name: &std::ffi::OsStr);

    /// Tells the kernel to drop what it has cached of an inode (data, attributes, listing). Returns at once.
    fn invalidate_inode(&self, ino: u64);
}

/// A memory file of the host's. Dropping it gives it back.
pub struct MemoryFile {
    file: HostFile,
    area: Area,
    host: Arc<dyn Host>,
}

impl MemoryFile {
    /// Makes a memory file; `size` is its final size, 0 if that is not known.
    ///
    /// # Errors
    /// `Full` if the area has no room.
    pub fn create(host: &Arc<dyn Host>, area: Area, size: u64) -> Result<Self> {
        Ok(MemoryFile { file: host.create_file(area, size)?, area, host: host.clone() })
    }

    /// A memory file that the host has kept for a former server.
    pub fn adopt(host: &Arc<dyn Host>, area: Area, file: HostFile) -> Self {
        MemoryFile { file, area, host: host.clone() }
    }

    /// What it is for.
    pub fn area(&self) -> Area {
        self.area
    }

    /// Leaves a note for the next server.
    pub fn tag(&self, text: &str) {
        self.host.tag_file(self.file.key, text);
    }
}

impl std::ops::Deref for MemoryFile {
    type Target = HostFile;
    fn deref(&self) -> &HostFile {
        &self.file
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        self.host.release_file(self.file.key);
    }
}

impl std::fmt::Debug for MemoryFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemoryFile({:?} {})", self.area, self.file.key)
    }
}
