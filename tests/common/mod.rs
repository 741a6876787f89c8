//! Helpers of the integration tests.
#![allow(dead_code)]

pub mod argo;
pub mod csi;
pub mod point;
pub mod vineyardd;
