//! Helpers of the integration tests.
#![allow(dead_code)]

pub mod argo;
pub mod csi;
pub mod pod;
pub mod point;
pub mod vineyardd;
