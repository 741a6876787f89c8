//! What a mount was asked to be. Written once by the command line, read by keeper and server.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::fs::{Options, ServePolicy};
use crate::image::View;
use crate::vineyard::RemotePolicy;

/// The choices of one mount.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MountConfig {
    /// Absolute path of the mount point.
    pub mountpoint: PathBuf,
    /// The store's Unix socket.
    pub socket: PathBuf,
    /// The private vineyardd that serves `socket`, if the mount brings its own.
    pub launch: Option<Launch>,
    /// Only names below this one, as the root of the mount.
    pub prefix: Option<String>,
    /// Refuse all writing.
    pub read_only: bool,
    /// Devices of mounts that killed keepers left there: this one takes their place.
    #[serde(default)]
    pub dead: Vec<(u32, u32)>,
    /// Names of options of mount(8) that the kernel applies: see [`super::mount::FLAGS`].
    #[serde(default)]
    pub flags: Vec<String>,
    /// Let other users in, as far as mode bits allow.
    pub allow_other: bool,
    /// Most bytes of assembled images, and most of data of other instances.
    pub cache_size: u64,
    /// Most bytes of files being written.
    pub staging_size: u64,
    /// How files are served.
    pub serve: ServePolicy,
    /// Whether data of other instances is brought here.
    #[serde(default)]
    pub migrate: RemotePolicy,
    /// Owner of all files.
    pub uid: u32,
    /// Group of all files.
    pub gid: u32,
    /// Permission bits of directories.
    pub dir_mode: u32,
    /// Permission bits of files.
    pub file_mode: u32,
    /// Which view listings show of a table that was not saved as a file.
    #[serde(default)]
    pub tables: View,
    /// Socket of a process that keeps the mount alive from one keeper to the next.
    #[serde(default)]
    pub holder: Option<PathBuf>,
    /// Longest time for one request to the store, in milliseconds.
    pub deadline_ms: u64,
    /// Where Prometheus finds counters, if anywhere.
    #[serde(default)]
    pub metrics: Option<std::net::SocketAddr>,
    /// Folder of sockets and process ids of this mount.
    pub runtime: PathBuf,
    /// Where logs go; `None` for the standard error of the command.
    pub log_file: Option<PathBuf>,
    /// How log lines look.
    pub log_format: crate::telemetry::Format,
    /// What is logged: a level or a filter such as `info,vineyard_fs::fs=debug`.
    pub log_level: String,
}

impl MountConfig {
    /// The part that the filesystem needs.
    pub fn filesystem(&self) -> Options {
        Options {
            prefix: self.prefix.clone().unwrap_or_default().trim_matches('/').to_owned(),
            read_only: self.read_only,
            uid: self.uid,
            gid: self.gid,
            // Nine bits each, as the command line checks.
            file_mode: (self.file_mode & 0o777) as u16,
            dir_mode: (self.dir_mode & 0o777) as u16,
            serve: self.serve,
            tables: self.tables,
            copy_remote: self.migrate == RemotePolicy::Full,
            cache_size: self.cache_size,
            staging_size: self.staging_size,
            ..Options::default()
        }
    }
}

/// A vineyardd that lives and ends with the mount.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<std::ffi::OsString>,
    /// File that its output goes to.
    pub log: PathBuf,
}
