//! Removing what a former client of this mount has made and nobody uses.

use std::collections::HashSet;

use serde_json::Value;

use super::Client;
use crate::error::Result;
use crate::vineyard::journal;
use crate::vineyard::store::NameQuery;
use crate::vineyard::{ObjectId, Store};

impl Client {
    /// Removes what is on a list of a client that is no more, as far as nothing leads to it: objects that were never
    /// made permanent or have no name, and then blobs that are no object's. Returns how many were on the list.
    ///
    /// # Errors
    /// What the store answers.
    pub fn reclaim(&self, list: &str) -> Result<usize> {
        let (blobs, objects): (Vec<ObjectId>, Vec<ObjectId>) =
            journal::parse(list).into_iter().partition(|i| i.is_blob());
        let metas = self.metas(&objects, false)?;
        let all = NameQuery::Prefix { prefix: String::new(), limit: None };
        let named: HashSet<ObjectId> = self.names(&[all])?.into_iter().flatten().map(|(_, id)| id).collect();
        let mut kept = HashSet::new();
        for meta in objects.iter().filter(|id| named.contains(id)).filter_map(|id| metas.get(id)?.as_ref().ok()) {
            members(&meta.to_json(), &mut kept);
        }
        let is_over =
            |id: &&ObjectId| matches!(metas.get(id), Some(Ok(_))) && !named.contains(id) && !kept.contains(id);
        let over: Vec<ObjectId> = objects.iter().filter(is_over).copied().collect();
        let loose: Vec<ObjectId> = blobs.iter().filter(|id| !kept.contains(id)).copied().collect();
        tracing::info!(objects = over.len(), blobs = loose.len(), "what a former server has left unfinished goes");
        // Without force vineyardd deletes nothing that is a member of an object, whoever made that.
        self.delete(&over)?;
        self.delete(&loose)?;
        Ok(objects.len() + blobs.len())
    }
}

/// Ids of all members of an object, at any depth.
fn members(tree: &Value, out: &mut HashSet<ObjectId>) {
    for member in tree.as_object().into_iter().flat_map(|tree| tree.values()).filter(|value| value.is_object()) {
        out.extend(member.get("id").and_then(Value::as_str).and_then(|id| id.parse::<ObjectId>().ok()));
        members(member, out);
    }
}
