//! Memory of the store ahead of need.

use super::Client;
use crate::error::Result;
use crate::vineyard::ObjectId;
use crate::vineyard::store::Store;

/// Size of the blobs by which is found out where vineyardd will put others.
const PROBE: u64 = 64 << 20;

impl Client {
    /// See [`Store::prepare_memory`].
    ///
    /// Blobs are made and dropped at once: vineyardd's allocator will hand out the same memory again. Nothing is held
    /// meanwhile, and whoever gets that memory in the end, it is as it was.
    pub(super) fn prepare_places(&self, bytes: u64, go_on: &dyn Fn() -> bool) -> Result<()> {
        let status = self.status()?;
        // Nobody is to meet a full store because of it: as much stays free for others meanwhile.
        let asked = bytes.checked_next_multiple_of(PROBE).and_then(|asked| asked.checked_mul(2));
        if asked.is_none_or(|asked| status.memory_usage.saturating_add(asked) > status.memory_limit) {
            return Ok(());
        }
        let sizes = vec![PROBE; bytes.div_ceil(PROBE) as usize];
        let unit = self.journal.as_ref().map(|journal| journal.enter());
        let blobs = self.create_blobs(&sizes)?;
        let ids: Vec<ObjectId> = blobs.iter().map(|blob| blob.id).collect();
        if let Err(error) = self.drop_blobs(&ids) {
            if let Some(journal) = &self.journal {
                journal.keep(ids);
            }
            return Err(error);
        }
        drop(unit);
        let mut left = bytes;
        for blob in blobs {
            if let Some(file) = &blob.file {
                file.prepare(blob.offset..blob.offset.saturating_add(blob.size.min(left)), go_on);
            }
            left = left.saturating_sub(blob.size);
        }
        Ok(())
    }
}
