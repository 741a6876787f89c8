//! What tests of this floor share.

use crate::error::{Error, Result};
use crate::vineyard::{BlobKey, BlobSource};

/// A store without a blob: spans of literals need none.
pub struct Nothing;

impl BlobSource for Nothing {
    fn size(&self, key: BlobKey) -> Result<u64> {
        Err(Error::stale(key.to_string()))
    }
    fn read(&self, key: BlobKey, _: u64, _: &mut [u8]) -> Result<()> {
        Err(Error::stale(key.to_string()))
    }
    fn verify(&self, _: &[BlobKey]) -> Result<()> {
        Ok(())
    }
}
