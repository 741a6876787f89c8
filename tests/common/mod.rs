//! Helpers of the integration tests.
#![allow(dead_code)]

pub mod point;
pub mod vineyardd;
