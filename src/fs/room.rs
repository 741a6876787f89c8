//! Room in a full store: bytes of files whose columns are stored decoded can be made anew, if not byte for byte, so
//! they are given up before a save fails.

use super::FileSystem;
use super::objects::view_of;
use crate::dataset;
use crate::dataset::publish::{self, Plan, Published, Staged};
use crate::dataset::recipe::{without_kept, written_as};
use crate::error::{Kind, Result};
use crate::image::{self, View};
use crate::vineyard::store::NameQuery;
use crate::vineyard::{Meta, ObjectId};

/// Objects whose metadata is looked at with one call.
const BATCH: usize = 256;

impl FileSystem {
    /// Stores what is planned. If the store is full, kept files go first: those of other datasets, then this one's. At last
    /// a file whose columns do not fit is stored as it is.
    ///
    /// # Errors
    /// As [`publish::realize`].
    pub(super) fn realize(&self, plan: &Plan, input: &Staged<'_>) -> Result<Published> {
        let mut result = publish::realize(&*self.store, plan, input);
        let is_full = |result: &Result<Published>| result.as_ref().is_err_and(|error| error.kind() == Kind::Full);
        if is_full(&result) && self.delete_nameless()? > 0 {
            result = publish::realize(&*self.store, plan, input);
        }
        if is_full(&result) && self.give_up_kept(plan.size())? > 0 {
            result = publish::realize(&*self.store, plan, input);
        }
        if is_full(&result)
            && let Some(smaller) = plan.without_kept()
        {
            result = publish::realize(&*self.store, &smaller, input);
            if let Ok(published) = &mut result {
                let lost = "the store is short of room: the file reads back as an equal table, not byte for byte";
                published.warnings.push(lost.into());
            }
            if is_full(&result)
                && let Some(plain) = plan.fallback.as_ref().filter(|plain| plain.size() < smaller.size())
            {
                result = publish::realize(&*self.store, plain, input);
                if let Ok(published) = &mut result {
                    published.warnings.push("stored as it is: the store has no room for its columns".into());
                }
            }
        }
        result
    }

    /// Gives up kept files until `wanted` bytes are free; returns how many bytes became free.
    fn give_up_kept(&self, wanted: u64) -> Result<u64> {
        let names = self.store.names(&[NameQuery::Prefix { prefix: String::new(), limit: None }])?;
        let names: Vec<(String, ObjectId)> = names.into_iter().flatten().collect();
        let mut freed = 0;
        for batch in names.chunks(BATCH) {
            let ids: Vec<ObjectId> = batch.iter().map(|(_, id)| *id).collect();
            let metas = self.store.metas(&ids, false)?;
            for (name, id) in batch {
                if freed >= wanted.max(1) {
                    return Ok(freed);
                }
                let Some(Ok(meta)) = metas.get(id) else { continue };
                match self.give_up(name, meta) {
                    Ok(bytes) => freed += bytes,
                    Err(error) => tracing::info!("{name:?} keeps the bytes of its file: {error}"),
                }
            }
        }
        Ok(freed)
    }

    /// Replaces an object by one without its file's bytes. Returns how many bytes that frees.
    fn give_up(&self, name: &str, meta: &Meta) -> Result<u64> {
        if meta.instance() != self.store.instance()?.id {
            return Ok(0);
        }
        let Some(content) = without_kept(meta) else { return Ok(0) };
        // Only what can be made anew may go.
        let view = written_as(meta).map_or(View::Raw, view_of);
        dataset::decode(meta, &*self.store).and_then(|dataset| image::size(&dataset, view))?;
        let before = self.store.status()?.memory_usage;
        let _unit = self.unit();
        let Some(created) = self.store.create_objects(vec![content])?.pop() else { return Ok(0) };
        let named = self.store.persist(created.id).and_then(|()| {
            let _naming = self.naming();
            if self.object_of(name)? != Some(meta.id()) {
                return Ok(false);
            }
            self.suspect(&[meta.id()]);
            self.put_name(name, created.id).map(|()| true)
        });
        match named {
            Ok(true) => self.delete_unnamed(meta.id()),
            Ok(false) => self.delete_object(created.id),
            Err(error) => {
                self.leave_open([meta.id()]);
                self.drop_new(created.id, &error);
                return Err(error);
            }
        }
        self.warn(format!("the store is short of room: {name:?} reads back as an equal table, not byte for byte"));
        Ok(before.saturating_sub(self.store.status()?.memory_usage))
    }
}
