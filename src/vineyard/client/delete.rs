//! Deleting objects, where they live, and hearing of those that were made elsewhere.

use std::collections::{BTreeMap, HashSet};

use super::{Client, IDS_PER_REQUEST};
use crate::error::{Error, Result};
use crate::vineyard::id::{InstanceId, ObjectId};
use crate::vineyard::request::Request;
use crate::vineyard::store::Store;
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

    /// Makes sure that the local vineyardd knows an object that another one has just made, before it is told to name
    /// the one and delete the other.
    pub(super) fn heard_of(&self, copy: ObjectId, of: ObjectId, owner: InstanceId) -> Result<ObjectId> {
        match self.metas(&[copy], true)?.remove(&copy) {
            Some(meta) => meta.map(|_| copy),
            None => Err(Error::stale(format!("{copy}, the copy of {of} on instance {owner}, is not known here"))),
        }
    }

    /// Lets other instances delete what is theirs; returns the rest. Deleted through another instance, an object whose
    /// members had two owners in turn leaves them behind.
    fn delete_elsewhere(&self, mut ids: Vec<u64>) -> Result<Vec<u64>> {
        let here = self.here()?;
        // Ten bits of an object's id are of its instance's number (`GenerateObjectID`, `src/common/util/uuid.h`).
        let foreign = |id: &u64| !ObjectId(*id).is_blob() && (id >> 12 & 0x3ff) != (here.0 & 0x3ff);
        let suspects: Vec<ObjectId> = ids.iter().filter(|id| foreign(id)).map(|id| ObjectId(*id)).collect();
        if suspects.is_empty() {
            return Ok(ids);
        }
        let mut owned: BTreeMap<InstanceId, Vec<ObjectId>> = BTreeMap::new();
        for (id, meta) in self.metas(&suspects, false)? {
            let owner = meta.map(|meta| meta.instance()).unwrap_or(InstanceId::UNSPECIFIED);
            if owner != InstanceId::UNSPECIFIED && owner != here {
                owned.entry(owner).or_default().push(id);
            }
        }
        for (owner, theirs) in owned {
            match self.remote.delete(owner, &theirs, &|| self.cluster()) {
                Ok(()) => ids.retain(|id| !theirs.contains(&ObjectId(*id))),
                // Told to the cluster's metadata then; the owner hears of it when it can.
                Err(error) => tracing::warn!(%owner, objects = theirs.len(), "not deleted by their owner: {error}"),
            }
        }
        // So that nobody here finds them any more.
        self.get_data(&suspects, true, |_, _| ())?;
        Ok(ids)
    }
}
