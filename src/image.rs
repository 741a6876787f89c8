//! The bytes of a file: an ordered list of extents over shared memory.
//!
//! An image's size and layout follow from metadata; making one touches no column data.

mod array;
pub mod arrow;
pub mod assemble;
pub mod extent;
pub mod npy;
pub mod parquet;
pub mod view;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod readers;
#[cfg(test)]
pub(crate) mod testing;

pub use arrow::Counts;
pub use assemble::assemble;
pub use extent::{Builder, Extent, Image};
pub use view::{View, build, listed_view, size, views_of};
