//! What a mount was asked to be. Written once by the command line, read by keeper and server.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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
    /// Let other users in, as far as mode bits allow.
    pub allow_other: bool,
    /// Most bytes of assembled images.
    pub cache_size: u64,
    /// Most bytes of files being written.
    pub staging_size: u64,
    /// How files are served.
    pub serve: ServePolicy,
    /// Owner of all files.
    pub uid: u32,
    /// Group of all files.
    pub gid: u32,
    /// Permission bits of directories.
    pub dir_mode: u32,
    /// Permission bits of files.
    pub file_mode: u32,
    /// Longest time for one request to the store, in milliseconds.
    pub deadline_ms: u64,
    /// Folder of sockets and process ids of this mount.
    pub runtime: PathBuf,
    /// Where logs go; `None` for the standard error of the command.
    pub log_file: Option<PathBuf>,
    /// How log lines look.
    pub log_format: crate::telemetry::Format,
    /// What is logged: a level or a filter such as `info,vineyard_fs::fs=debug`.
    pub log_level: String,
}

/// How the bytes of files reach readers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ServePolicy {
    /// By size, width and place of the dataset.
    #[default]
    Auto,
    /// Always from the store's memory, read by read.
    Lazy,
    /// Always as a memory file that is made at the first open.
    Assembled,
}

/// A vineyardd that lives and ends with the mount.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<std::ffi::OsString>,
    /// Environment variables that it gets beside those of the command.
    pub env: Vec<(std::ffi::OsString, std::ffi::OsString)>,
    /// File that its output goes to.
    pub log: PathBuf,
}
