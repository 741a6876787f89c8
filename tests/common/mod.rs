//! Helpers of the integration tests.
#![allow(dead_code)]

pub mod vineyardd;
