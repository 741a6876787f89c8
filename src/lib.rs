//! Every vineyard dataset is a file.
//!
//! `vineyard-fs mount /mnt/vineyard` shows the datasets of a [vineyard](https://github.com/v6d-io/v6d) store as Arrow,
//! Parquet, npy, pickle and plain files, served from the store's shared memory.
//!
//! Data flows upward through the floors, and no floor knows the one above it:
//!
//! | floor | what it knows |
//! |---|---|
//! | [`cli`], [`csi`], [`kedro`] | what people call |
//! | [`fuse`] | the kernel's protocol: sessions, descriptors, passthrough |
//! | [`fs`] | names, inodes, handles, directories, staging, publishing |
//! | [`image`] | the bytes of a file, as extents over shared memory |
//! | [`dataset`] | what a vineyard object means, and how a table becomes objects |
//! | [`vineyard`] | the client: frames, descriptors, ids, metadata, memory |
//!
//! Beside them stand [`error`], [`telemetry`], [`sync`], [`socket`], and [`cgroup`]: how much memory there is.
#![warn(missing_docs)]

pub mod cgroup;
pub mod cli;
pub mod csi;
pub mod dataset;
pub mod error;
pub mod fs;
pub mod fuse;
pub mod image;
pub mod kedro;
pub mod socket;
pub mod sync;
pub mod telemetry;
pub mod vineyard;

pub use error::{Context, Error, Kind, Result};
