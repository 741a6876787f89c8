//! Room in a full store. Copies that nobody asked for, and bytes of files whose columns are stored decoded, which can be
//! made anew, if not byte for byte, are given up before a save fails.

use super::FileSystem;
use super::objects::view_of;
use crate::dataset;
use crate::dataset::publish::{self, Plan, Published, Staged};
use crate::dataset::recipe::{without_kept, written_as};
use crate::error::{Kind, Result};
use crate::image::{self, View};
use crate::vineyard::{Meta, ObjectId};

/// Objects whose metadata is looked at with one call.
const BATCH: usize = 256;

impl FileSystem {
    /// Stores what is planned. If the store is full, copies that nobody asked for go first, then kept files: those of other
    /// datasets, then this one's. At last a file whose columns do not fit is stored as it is.
    ///
    /// # Errors
    /// As [`publish::realize`].
    pub(super) fn realize(&self, plan: &Plan, input: &Staged<'_>) -> Result<Published> {
        let mut result = publish::realize(&*self.store, plan, input);
        let is_full = |result: &Result<Published>| result.as_ref().is_err_and(|error| error.kind() == Kind::Full);
        if is_full(&result) && self.delete_nameless()? > 0 {
            result = publish::realize(&*self.store, plan, input);
        }
        if is_full(&result) && self.give_up_copies(plan.size())? > 0 {
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
        // Copies stay as they are: the names that they are found by promise the bytes of their originals.
        let names = self.names_below("")?;
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::dataset::recipe::{KEPT, RECIPE};
    use crate::fs::copies::Copy;
    use crate::vineyard::fake::FakeStore;
    use crate::vineyard::{InstanceId, Store};

    #[test]
    fn a_copy_keeps_the_bytes_that_its_original_has() {
        let store = Arc::new(FakeStore::new(1 << 20));
        let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
        let kept = |name: &str| {
            let blob = |bytes: &[u8]| json!({"id": store.put_blob(bytes).unwrap().id.to_string(), "typename": "vineyard::Blob"});
            let recipe = json!({"view": "parquet", "size": 500}).to_string();
            let content = json!({"typename": "vineyard::Tensor<double>", "value_type_": "float64",
                "value_type_meta_": "<f8", "shape_": "[2]", "partition_index_": "[]", "order_": "\"C\"",
                "buffer_": blob(&[0; 16]), KEPT: blob(&[1; 500]), RECIPE: recipe});
            store.put_object(name, content).unwrap()
        };
        let copy = Copy { source: ObjectId(77), instance: InstanceId(0), object: ObjectId::INVALID }.name();
        let announced = ".vineyard-fs/saves/0000000000000000/o0000000000000009";
        let (copied, saved, own) = (kept(&copy), kept(announced), kept("x"));
        assert_eq!(fs.give_up_kept(u64::MAX).unwrap(), 500);
        assert_eq!((fs.object_of(&copy).unwrap(), fs.object_of(announced).unwrap()), (Some(copied), Some(saved)));
        assert_ne!(fs.object_of("x").unwrap(), Some(own));
        assert_eq!((store.object_count(), store.blob_count()), (3, 5));
    }
}
