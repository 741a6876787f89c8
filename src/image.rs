//! The bytes of a file: an ordered list of extents over shared memory.
//!
//! An image's size and layout follow from metadata; making one touches no column data.

pub mod extent;

pub use extent::{Builder, Extent, Image};
