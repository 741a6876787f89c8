//! The bytes of a file: an ordered list of extents over shared memory.
//!
//! An image's size and layout follow from metadata; making one touches no column data.

pub mod arrow;
pub mod extent;

pub use arrow::Counts;
pub use extent::{Builder, Extent, Image};
