//! What a mount can be told.

use std::time::Duration;

use crate::image::View;

/// How files are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServePolicy {
    /// By what is known of the file; see `choose_assembled` in `fs/open.rs`.
    #[default]
    Auto,
    /// Always straight from the blobs.
    Lazy,
    /// Always assembled, if it fits the cache.
    Assembled,
}

/// Options of a filesystem.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Options {
    /// Names below this one are the mount's files; empty for all. Without slashes at its ends.
    pub prefix: String,
    /// Refuse every change with EROFS.
    pub read_only: bool,
    /// A number that no server of the mount had before, 0 for the first: handles and inode numbers of theirs are never
    /// used again.
    pub epoch: u64,
    /// Owner of files that carry none of their own.
    pub uid: u32,
    /// Group of files that carry none of their own.
    pub gid: u32,
    /// Permission bits of such files.
    pub file_mode: u16,
    /// Permission bits of directories.
    pub dir_mode: u16,
    /// How files are served.
    pub serve: ServePolicy,
    /// Which view listings show of a table that was not saved as a file, where the table has it.
    pub tables: View,
    /// Make copies in the local vineyardd of what was opened and lives on another instance.
    pub copy_remote: bool,
    /// Most bytes of assembled images.
    pub cache_size: u64,
    /// Most bytes of files being written.
    pub staging_size: u64,
    /// How long the kernel may believe that a name leads to the same object.
    pub entry_ttl: Duration,
    /// How long a listing of more than [`Options::listing_wait_names`] unknown objects may take before it shows the
    /// rest by bare name.
    pub listing_budget: Duration,
    /// Up to so many unknown objects a listing waits for all of them.
    pub listing_wait_names: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            prefix: String::new(),
            read_only: false,
            epoch: 0,
            uid: 0,
            gid: 0,
            file_mode: 0o644,
            dir_mode: 0o755,
            serve: ServePolicy::Auto,
            tables: View::Arrow,
            copy_remote: false,
            cache_size: 1 << 30,
            staging_size: 1 << 30,
            entry_ttl: Duration::from_secs(1),
            listing_budget: Duration::from_millis(1500),
            listing_wait_names: 4096,
        }
    }
}
