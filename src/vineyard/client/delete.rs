//! Deleting objects, where they live.

use std::collections::HashSet;

use super::{Client, IDS_PER_REQUEST};
use crate::error::Result;
use crate::vineyard::id::ObjectId;
use crate::vineyard::request::Request;
use crate::vineyard::wire::Refusal;

impl Client {
    /// Deletes objects with their members; with `force` also what they are members of.
    pub(super) fn delete_data(&self, ids: &[ObjectId], force: bool) -> Result<()> {
        let mut seen = HashSet::new();
        let wanted =
            |&id: &ObjectId| (id != ObjectId::INVALID && id != ObjectId::EMPTY_BLOB && seen.insert(id)).then_some(id.0);
        let ids: Vec<u64> = ids.iter().filter_map(wanted).collect();
        let ids = self.delete_elsewhere(ids)?;
        let requests: Vec<Request> = ids
            .chunks(IDS_PER_REQUEST)
            .map(|chunk| Request::DelData {
                id: chunk.to_vec(),
                force,
                deep: true,
                memory_trim: false,
                fastpath: false,
            })
            .collect();
        self.tell(&requests, "del_data_reply", Refusal::is_absence)
    }
}
