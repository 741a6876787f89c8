//! Copies that nobody asked for: with `--migrate full` an object of another instance is copied here once it has been
//! opened. Its original stays, so the copy makes way for whatever needs its room.

use std::collections::{HashSet, VecDeque};

use serde_json::Value;

use super::FileSystem;
use super::copies::{Brought, COPIES, Copy, gone, is_faithful};
use super::gc::Life;
use crate::dataset::recipe::content_with;
use crate::error::{Error, Kind, Result};
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::vineyard::{Meta, ObjectId};

/// Key of a copy's metadata: true if nobody asked for it.
pub const AHEAD: &str = "vineyard_fs_copy_ahead_";
/// Copies that are looked at with one call.
const BATCH: usize = 256;

/// Objects that are to be copied here when there is time, in order, and those and the one that is being copied as a set.
#[derive(Default)]
pub(super) struct Wishes {
    state: Mutex<(VecDeque<ObjectId>, HashSet<ObjectId>)>,
    more: Condvar,
}

impl Wishes {
    fn state(&self) -> MutexGuard<'_, (VecDeque<ObjectId>, HashSet<ObjectId>)> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// True for a copy that nobody asked for.
pub(super) fn is_ahead(meta: &Meta) -> bool {
    meta.get(AHEAD) == Some(&Value::Bool(true))
}

impl FileSystem {
    /// A copy that nobody had asked for, and somebody does now: another object with the same blobs takes its place.
    pub(super) fn keep_copy(&self, copy: Copy, meta: &Meta) -> Result<Brought> {
        let content = content_with(meta, |key| (key == AHEAD).then_some(false.into()));
        let mut content =
            content.ok_or_else(|| Error::malformed(format!("object {} has a member without id", meta.id())))?;
        // It has the same bytes.
        content["signature"] = meta.signature().into();
        let Some(created) = self.store.create_objects(vec![content])?.pop() else { return Err(gone(copy.object)) };
        let kept = Copy { object: created.id, ..copy.clone() };
        let named = self.store.persist(kept.object).and_then(|()| self.store.put_name(&kept.name(), kept.object));
        if let Err(error) = named {
            self.drop_new(kept.object, &error);
            return Err(error);
        }
        self.drop_copy(&copy)?;
        Ok(Brought::Here(kept.object))
    }

    /// Removes copies of other instances' objects that nobody asked for, the oldest first, until `wanted` bytes are free: the
    /// originals are there, and are read where they are. Returns how many bytes became free.
    pub(super) fn give_up_copies(&self, wanted: u64) -> Result<u64> {
        if !self.is_shared()? {
            return Ok(0);
        }
        let here = self.store.instance()?.id;
        let names = self.names_below(COPIES)?;
        let mut copies: Vec<Copy> = names.iter().filter_map(|(name, object)| Copy::parse(name, *object)).collect();
        copies.retain(|copy| copy.instance == here);
        copies.sort_by_key(|copy| copy.object);
        let mut freed = 0;
        for batch in copies.chunks(BATCH) {
            let of = |id: fn(&Copy) -> ObjectId| batch.iter().map(id).collect::<Vec<_>>();
            let metas = self.store.metas(&of(|copy| copy.object), true)?;
            let sources = self.store.metas(&of(|copy| copy.source), false)?;
            let lives = self.lives(&of(|copy| copy.source))?;
            for copy in batch {
                if freed >= wanted.max(1) {
                    return Ok(freed);
                }
                let is_needless = match (metas.get(&copy.object), sources.get(&copy.source), lives.get(&copy.source)) {
                    (Some(Ok(meta)), Some(Ok(original)), Some(Life::Lives(there))) => {
                        is_ahead(meta) && meta.instance() == here && *there != here && is_faithful(original, meta)
                    }
                    _ => false,
                };
                if is_needless {
                    let before = self.store.status()?.memory_usage;
                    self.drop_copy(copy)?;
                    freed += before.saturating_sub(self.store.status()?.memory_usage);
                    tracing::info!(object = %copy.source, copy = %copy.object, "the copy made way for what is saved");
                }
            }
        }
        Ok(freed)
    }

    /// Remembers that an object of another instance is to be copied here.
    pub(super) fn wish_copy(&self, object: ObjectId) {
        if !self.options.copy_remote || self.options.read_only {
            return;
        }
        let mut state = self.wishes.state();
        if state.1.insert(object) {
            state.0.push_back(object);
            self.wishes.more.notify_one();
        }
    }

    /// Copies objects here for as long as the process lives. For a thread of its own.
    pub fn copy_wishes(&self) {
        loop {
            let object = {
                let mut state = self.wishes.state();
                loop {
                    match state.0.pop_front() {
                        Some(object) => break object,
                        None => state = self.wishes.more.wait(state).unwrap_or_else(|e| e.into_inner()),
                    }
                }
            };
            let brought = self.bring(object, true, &mut |_| Ok(()));
            // Who opens it while it has no copy here wishes for one again.
            self.wishes.state().1.remove(&object);
            match brought {
                Ok(Brought::Copied(copy)) => tracing::info!(%object, %copy, "copied to this instance"),
                Ok(Brought::Here(_)) => {}
                Err(error) if matches!(error.kind(), Kind::Unsupported | Kind::Stale) => {
                    tracing::info!(%object, "not copied here: {error}");
                }
                Err(error) => self.warn(format!("object {object} was not copied to this instance: {error}")),
            }
        }
    }
}
