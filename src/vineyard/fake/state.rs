//! What a [`FakeStore`](super::FakeStore) holds: blobs in one memory file, objects as trees, names.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value, json};

use super::{ALIGN, Op};
use crate::error::Kind;
use crate::vineyard::content::{self, BLOB_TYPE};
use crate::vineyard::id::{InstanceId, ObjectId};

#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) offset: u64,
    pub(super) size: u64,
    pub(super) sealed: bool,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) generation: u64,
    pub(super) next: u64,
    pub(super) clock_ms: u64,
    pub(super) blobs: HashMap<ObjectId, Place>,
    /// Offset to end of the memory in use.
    pub(super) used: BTreeMap<u64, u64>,
    /// Own keys of each object; members as `{"id", "typename"}`.
    pub(super) objects: HashMap<ObjectId, Map<String, Value>>,
    pub(super) names: BTreeMap<String, ObjectId>,
    pub(super) failures: HashMap<Op, (usize, Kind)>,
    /// Names that are put without an answer, once [`Late`] is set; those that are put later.
    pub(super) late: Option<Late>,
    pub(super) put_later: Vec<(String, ObjectId)>,
    pub(super) calls: HashMap<Op, u64>,
    /// What is done before the next call of an operation.
    pub(super) before: HashMap<Op, Box<dyn FnOnce() + Send>>,
    /// What is done after the next question for names was answered.
    pub(super) after_names: Option<Box<dyn FnOnce() + Send>>,
    /// Steps until the caller is dead; none if it lives.
    pub(super) steps: Option<usize>,
}

/// When a name is put whose answer does not come in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Late {
    /// At once.
    Answer,
    /// When [`FakeStore::catch_up`](super::FakeStore::catch_up) is called.
    Everything,
}

impl State {
    pub(super) fn step(&mut self) -> bool {
        match &mut self.steps {
            Some(0) => return false,
            Some(left) => *left -= 1,
            None => {}
        }
        true
    }

    pub(super) fn allocate(&mut self, size: u64, end: u64) -> Option<u64> {
        let mut start = 0u64;
        for (&offset, &stop) in &self.used {
            if offset >= start + size {
                break;
            }
            start = stop.next_multiple_of(ALIGN);
        }
        if start + size > end {
            return None;
        }
        self.used.insert(start, start + size);
        Some(start)
    }

    pub(super) fn free(&mut self, id: ObjectId) {
        if let Some(place) = self.blobs.remove(&id) {
            self.used.remove(&place.offset);
        }
    }

    pub(super) fn usage(&self) -> u64 {
        self.blobs.values().map(|p| p.size).sum()
    }

    pub(super) fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(super) fn members_of(&self, id: ObjectId) -> Vec<ObjectId> {
        self.objects.get(&id).map(|c| content::members(c).filter_map(|(_, id)| id).collect()).unwrap_or_default()
    }

    pub(super) fn has_parent(&self, id: ObjectId) -> bool {
        self.objects.values().any(|c| content::members(c).any(|(_, member)| member == Some(id)))
    }

    pub(super) fn delete(&mut self, id: ObjectId) {
        if self.has_parent(id) {
            return;
        }
        let members = self.members_of(id);
        self.objects.remove(&id);
        self.free(id);
        members.into_iter().for_each(|member| self.delete(member));
    }

    pub(super) fn delete_with_owners(&mut self, id: ObjectId) {
        let owns = |content: &Map<String, Value>| content::members(content).any(|(_, member)| member == Some(id));
        while let Some(owner) = self.objects.iter().find(|(_, c)| owns(c)).map(|(owner, _)| *owner) {
            self.delete_with_owners(owner);
        }
        self.delete(id);
    }

    pub(super) fn expand(&self, id: ObjectId, instance: InstanceId) -> Option<Value> {
        if id.is_blob() {
            let size = match self.blobs.get(&id) {
                Some(place) if place.sealed => place.size,
                _ if id == ObjectId::EMPTY_BLOB => 0,
                _ => return None,
            };
            return Some(json!({"id": id.to_string(), "instance_id": instance.0, "length": size, "nbytes": size,
                "transient": true, "typename": BLOB_TYPE}));
        }
        let mut tree = self.objects.get(&id)?.clone();
        for value in tree.values_mut() {
            let Some(member) = value.as_object().and_then(|m| m.get("id")).and_then(Value::as_str) else { continue };
            let member: ObjectId = member.parse().ok()?;
            *value = if member.is_blob() {
                json!({"id": member.to_string(), "instance_id": instance.0, "length": 0, "nbytes": 0,
                    "transient": true, "typename": BLOB_TYPE})
            } else {
                self.expand(member, instance)?
            };
        }
        Some(Value::Object(tree))
    }
}
