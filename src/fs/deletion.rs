//! Deleting objects, none of which goes before the last open handle that reads its blobs is closed.
//!
//! Whether a name still leads to one is found out before (see `nameless`).

use super::FileSystem;
use crate::vineyard::ObjectId;

impl FileSystem {
    /// Ends a lazy open; the object goes if nothing names it any more and this was the last.
    pub(super) fn end_lazy_open(&self, object: ObjectId) {
        let mut opens = self.lazy_opens();
        let Some(count) = opens.get_mut(&object) else { return };
        *count -= 1;
        if *count > 0 {
            return;
        }
        opens.remove(&object);
        drop(opens);
        let is_doomed = self.doomed.lock().unwrap_or_else(|e| e.into_inner()).remove(&object);
        if is_doomed && self.delete_now(object) {
            self.forget_suspects(&[object]);
        }
    }

    /// As [`FileSystem::delete_object`], for one that is noted as one that is to go.
    pub(super) fn delete_suspect(&self, object: ObjectId) {
        if self.delete_or_note(object) {
            self.forget_suspects(&[object]);
        }
    }

    /// As [`FileSystem::delete_suspect`], with one request for several that have no copies.
    pub(super) fn delete_suspects(&self, objects: &[ObjectId]) {
        let opens = self.lazy_opens();
        let (read, free): (Vec<ObjectId>, Vec<ObjectId>) = objects.iter().partition(|id| opens.contains_key(id));
        self.doomed.lock().unwrap_or_else(|e| e.into_inner()).extend(read);
        drop(opens);
        for object in &free {
            self.cache.forget(*object);
            self.objects.forget(*object);
        }
        match self.store.delete(&free) {
            Ok(()) => self.forget_suspects(&free),
            // Which one it is shows one by one.
            Err(_) => free.into_iter().for_each(|object| self.delete_suspect(object)),
        }
    }

    /// Deletes an object that nothing names any more, as soon as no open handle reads its blobs.
    pub(super) fn delete_object(&self, object: ObjectId) {
        let _noted_if_not = self.delete_or_note(object);
    }

    /// False if the object is still there, and is noted as one that is to go.
    fn delete_or_note(&self, object: ObjectId) -> bool {
        // The last reader looks for what it is to delete after it has given up its place: no other order misses nothing.
        let opens = self.lazy_opens();
        if opens.contains_key(&object) {
            self.doomed.lock().unwrap_or_else(|e| e.into_inner()).insert(object);
            self.suspect_for_long(object);
            false
        } else {
            drop(opens);
            self.delete_now(object)
        }
    }

    /// False if the object is still there, and is noted as one that is to go.
    fn delete_now(&self, object: ObjectId) -> bool {
        self.cache.forget(object);
        self.objects.forget(object);
        let deleted = self.store.delete(&[object]);
        if let Err(error) = &deleted {
            self.warn(format!("object {object} was replaced or removed and is deleted later: {error}"));
            self.suspect_for_long(object);
        }
        self.drop_copies(object);
        deleted.is_ok()
    }
}
