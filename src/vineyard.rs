//! The client: talks to vineyardd over its Unix socket and maps its memory.
//!
//! [`Store`] is what the upper floors need of a store. [`client::Client`] is the real one; tests of the upper floors
//! may use [`fake::FakeStore`], which keeps everything in this process.

pub mod blobs;
pub mod client;
pub mod connection;
pub mod content;
pub mod copy;
#[doc(hidden)]
pub mod fake;
pub mod id;
pub mod journal;
pub mod launch;
pub mod memory;
pub mod meta;
pub mod pipe;
pub mod pool;
pub mod remote;
pub mod request;
pub mod store;
pub mod streaming;
pub mod tree;
pub mod wire;

pub use client::{Client, ClientOptions};
pub use id::{BlobKey, InstanceId, ObjectId};
pub use memory::{Blob, Segment};
pub use meta::Meta;
pub use remote::{Arrived, MemoryMaker, RemoteOptions, RemotePolicy, RemoteStatus};
pub use store::{BlobSource, Store};
