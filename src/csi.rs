//! Kubernetes: a driver for the [Container Storage Interface](https://github.com/container-storage-interface/spec) that
//! puts the mount into pods.
//!
//! Two processes on each node, in pods of their own, share a folder below the kubelet's:
//!
//! - The **mounter** ([`mounter`]) keeps one mount for each vineyardd and group of pods, below `mounts/`. Its pod is
//!   replaced only when somebody wants it.
//! - The **node plugin** ([`node`], [`identity`]) answers the kubelet: it bind-mounts those mounts, or a directory of
//!   them, into pods. It knows nothing that is not in the list of mounts and in one small file for each target
//!   ([`record`]), so it may end at any time. It also holds a copy of every mount's connection ([`holder`]), so that
//!   the mounter may end too, as long as not both do at once.
//!
//! Nobody here looks into a mount without a deadline: see [`steps`].

pub mod attributes;
pub mod failure;
pub mod holder;
pub mod identity;
pub mod link;
pub mod locks;
pub mod metrics;
pub mod mounter;
pub mod node;
pub mod plugin;
pub mod record;
pub mod socket;
pub mod state;
pub mod steps;
pub mod target;

/// Name of the driver, as volumes and the `CSIDriver` object give it.
pub const DRIVER: &str = "fs.vineyard.v6d.io";

/// Messages and services, made from `csi.proto` of the specification, version 1.12 (Apache-2.0, the Kubernetes
/// Authors).
pub mod proto {
    #![allow(missing_docs, clippy::all, clippy::unwrap_used, rustdoc::all)]
    tonic::include_proto!("csi.v1");
}
