//! The kernel's side: sessions, descriptors, passthrough. The only floor with `fuser` types.
//!
//! Two processes serve a mount. The *keeper* ([`keeper`]) opens `/dev/fuse`, mounts, answers INIT and holds every
//! descriptor that must last; the *server* ([`session`]) has no privileges and answers requests. A server may die: the
//! mount stays, requests wait, and the next server takes over where the last one was.

mod adapter;
pub mod area;
mod beneath;
pub mod config;
mod direntplus;
pub mod handover;
pub mod handshake;
pub mod host;
pub mod journal;
pub mod keeper;
pub mod leftovers;
pub mod metrics;
pub mod mount;
pub mod mountinfo;
pub mod privileges;
pub mod protocol;
mod reply;
pub mod runtime;
pub mod sandbox;
pub mod session;
pub mod stats;
pub mod status;
pub mod workers;
