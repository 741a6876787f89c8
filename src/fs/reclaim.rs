//! What a server that was killed left over in the store: found by its journal, removed if no name leads to it.

use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use super::{FileSystem, saves};
use crate::error::Result;
use crate::vineyard::ObjectId;
use crate::vineyard::journal::{Journal, Unit};
use crate::vineyard::store::{NameQuery, NamedObject};

/// A blob that comes into question must stay unsealed for so long to be told of as one that may be lost.
const SECOND_LOOK: Duration = if cfg!(test) { Duration::from_millis(100) } else { Duration::from_secs(5) };

impl FileSystem {
    /// Begins work whose objects no name reaches before it ends.
    pub(super) fn unit(&self) -> Option<Unit<'_>> {
        self.store.journal().map(|journal| journal.enter())
    }

    /// Notes that an object is about to lose its last name.
    pub(super) fn suspect(&self, objects: &[ObjectId]) {
        if let Some(journal) = self.store.journal() {
            journal.note(objects.iter().copied());
        }
    }

    /// Notes that an object without a name waits for its readers.
    pub(super) fn suspect_for_long(&self, object: ObjectId) {
        if let Some(journal) = self.store.journal() {
            journal.keep([object]);
        }
    }

    /// These objects are gone.
    pub(super) fn forget_suspects(&self, objects: &[ObjectId]) {
        if let Some(journal) = self.store.journal() {
            journal.settle(objects);
        }
    }

    /// Removes what was made or meant to be removed and no name leads to, and former names: by a former server, or by this
    /// one when the store did not answer. Returns how many objects and blobs were looked at.
    ///
    /// # Errors
    /// What the store answers; what was not settled is looked at again by the next call.
    pub fn reclaim(&self) -> Result<usize> {
        let moved = self.finish_all_moves();
        let finished = self.finish_changes(None).and(moved);
        let Some(journal) = self.store.journal() else { return finished.map(|()| 0) };
        let looked_at = self.reclaim_known(journal)?;
        // This takes longer, and is seldom needed.
        let looked_at = looked_at + self.reclaim_unanswered(journal)?;
        finished.map(|()| looked_at)
    }

    /// Whether there is something that only [`FileSystem::reclaim`] will remove, as soon as the store answers.
    pub fn has_unanswered(&self) -> bool {
        self.has_unfinished_moves() || self.store.journal().is_some_and(|journal| !journal.unanswered().is_empty())
    }

    /// Removes what a former server noted, and what this one could not remove.
    fn reclaim_known(&self, journal: &Journal) -> Result<usize> {
        let suspects = journal.kept();
        // Deletions that wait for readers are no remains.
        let waiting = self.doomed.lock().unwrap_or_else(|e| e.into_inner()).clone();
        let moved = self.moved_objects();
        let is_remains = |id: &ObjectId| !waiting.contains(id) && !moved.contains(id) && !self.nameless.contains(*id);
        let mut suspects: Vec<ObjectId> = suspects.into_iter().filter(is_remains).collect();
        if suspects.is_empty() {
            return Ok(0);
        }
        let names = self.store.names(&[NameQuery::Prefix { prefix: String::new(), limit: None }])?;
        // A save of our own that was announced and has not happened gives its object no name.
        let is_own = |name: &str, id: &ObjectId| name.starts_with(&saves::prefix()) && suspects.contains(id);
        let (saves, names): (Vec<NamedObject>, Vec<NamedObject>) =
            names.into_iter().flatten().partition(|(name, id)| is_own(name, id));
        let named: HashSet<ObjectId> = names.into_iter().map(|(_, id)| id).collect();
        for (name, id) in saves {
            // That a save is through is for others to see, as long as its object is there.
            if !named.contains(&id) || !saves::is_mark(&name) {
                self.store.drop_name(&name)?;
                self.sweep_after(&name)?;
            }
        }
        suspects.retain(|id| named.contains(id) || !self.waits_for_readers(*id));
        let (blobs, objects): (Vec<ObjectId>, Vec<ObjectId>) = suspects.iter().partition(|id| id.is_blob());
        // Owners were made last. The store keeps what is a member of something that stays.
        let unnamed: Vec<ObjectId> = objects.iter().rev().copied().filter(|id| !named.contains(id)).collect();
        for object in &unnamed {
            self.cache.forget(*object);
            self.objects.forget(*object);
        }
        self.store.delete(&unnamed)?;
        self.store.delete(&blobs)?;
        let left: Vec<ObjectId> = self.store.blob_sizes(&blobs)?.into_keys().collect();
        if !left.is_empty() {
            // Members of datasets, or of objects whose ids the former server never learned.
            let all: Vec<ObjectId> = named.into_iter().collect();
            let mut reached = HashSet::new();
            for meta in self.store.metas(&all, false)?.values().flatten() {
                reached.extend(meta.blobs().into_iter().map(|blob| blob.id));
            }
            let lost: Vec<ObjectId> = left.into_iter().filter(|id| !reached.contains(id)).collect();
            self.store.delete_with_owners(&lost)?;
        }
        tracing::info!(objects = unnamed.len(), blobs = blobs.len(), "looked through what a former server left");
        journal.settle(&suspects);
        Ok(suspects.len())
    }

    /// Leaves the deletion of an object to its last reader, if it has any: they may have opened it under a former server.
    fn waits_for_readers(&self, object: ObjectId) -> bool {
        let opens = self.lazy_opens();
        let is_read = opens.contains_key(&object);
        if is_read {
            self.doomed.lock().unwrap_or_else(|e| e.into_inner()).insert(object);
        }
        is_read
    }

    /// Tells of blobs whose ids no server may have learned, because it was killed or the answer did not come in time.
    /// Returns how many. Their sizes and times are no proof: another client may be filling one, and were it dropped, the
    /// store would give its memory to a third, whose data the second one's then overwrites. vineyardd does not tell who
    /// made a blob, so they stay.
    fn reclaim_unanswered(&self, journal: &Journal) -> Result<usize> {
        let wishes = journal.unanswered();
        if wishes.is_empty() {
            return Ok(0);
        }
        let found = wishes.values().map(|wish| self.store.unanswered(wish)).collect::<Result<Vec<_>>>()?;
        let found: BTreeSet<ObjectId> = found.into_iter().flatten().collect();
        let mut lost = Vec::new();
        if !found.is_empty() {
            // Whose answers come now may be among them, and are known to be this server's own after that.
            let under_way = journal.under_way();
            std::thread::sleep(SECOND_LOOK);
            while journal.any_under_way(&under_way) {
                std::thread::sleep(Duration::from_millis(100));
            }
            lost = self.store.unsealed(&Vec::from_iter(found))?;
            lost.retain(|(id, _)| !journal.is_own(*id));
        }
        if !lost.is_empty() {
            let bytes: u64 = lost.iter().map(|(_, size)| size).sum();
            self.warn(format!(
                "{bytes} bytes in {} unsealed blobs may be left over in the store by a server that was killed or waited in \
                 vain; as another client may be filling them, they stay until vineyardd is restarted",
                lost.len()
            ));
        }
        journal.settle_unanswered(wishes.into_keys());
        Ok(lost.len())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::error::Kind;
    use crate::vineyard::Store;
    use crate::vineyard::fake::{FakeStore, Op};

    fn bed() -> (Arc<FakeStore>, FileSystem) {
        let journal = Journal::open(tempfile::tempfile().unwrap()).unwrap();
        let store = Arc::new(FakeStore::new(1 << 20).journaled(journal));
        (store.clone(), FileSystem::unmounted(store as Arc<dyn Store>))
    }

    fn object(store: &FakeStore) -> ObjectId {
        let content = json!({"typename": "vineyard::Scalar<int64_t>", "value_": "41", "type_": "int"});
        let made = store.create_objects(vec![content]).unwrap()[0].id;
        store.persist(made).unwrap();
        made
    }

    fn names(store: &FakeStore) -> Vec<String> {
        let all = [NameQuery::Prefix { prefix: String::new(), limit: None }];
        store.names(&all).unwrap().remove(0).into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn what_a_killed_server_had_announced_goes_with_its_object() {
        let (store, fs) = bed();
        let [unfinished, finished, others] = [(); 3].map(|()| object(&store));
        drop((fs.announce("x", unfinished).unwrap(), fs.announce("y", finished).unwrap()));
        store.put_name("y", finished).unwrap();
        let theirs = fs.announce("z", others).unwrap();
        // What the journal tells the next server.
        store.journal().unwrap().keep([unfinished, finished]);
        assert_eq!(fs.reclaim().unwrap(), 2);
        assert_eq!(names(&store).len(), 2, "{:?}", names(&store));
        assert_eq!((fs.object_of("y").unwrap(), store.object_count()), (Some(finished), 2));
        fs.withdraw(theirs);
        assert_eq!(names(&store), ["y"]);
    }

    #[test]
    fn blobs_that_are_like_lost_ones_stay() {
        let (store, fs) = bed();
        let journal = store.journal().unwrap();
        // Somebody else fills a blob of the size that was asked for, in the time in which it was.
        let theirs = store.create_blobs(&[700]).unwrap().remove(0).id;
        let asked = journal.ask(&[700]).unwrap();
        journal.failed(asked, &[], 0, 0);
        assert_eq!(fs.reclaim().unwrap(), 1);
        assert_eq!((store.blob_count(), journal.unanswered().len()), (1, 0));
        let warnings = fs.take_warnings();
        assert!(matches!(&warnings[..], [one] if one.starts_with("700 bytes in 1 unsealed blobs")), "{warnings:?}");
        store.seal_blobs(&[theirs]).unwrap();
    }

    #[test]
    fn what_could_not_be_withdrawn_is_withdrawn_later() {
        let (store, fs) = bed();
        let made = object(&store);
        store.put_name("old", made).unwrap();
        store.fail_next(Op::DropName, 1, Kind::Unavailable);
        fs.withdraw(fs.announce("new", made).unwrap());
        assert_eq!(names(&store).len(), 2);
        assert_eq!(fs.reclaim().unwrap(), 1);
        assert_eq!((names(&store), store.object_count()), (vec!["old".to_owned()], 1));
    }

    #[test]
    fn the_mark_of_a_save_that_is_through_keeps_no_object_alive() {
        let (store, fs) = bed();
        // Somebody died who had announced a value of the same name.
        let dead = fs.announce("x", object(&store)).unwrap();
        for _ in 0..3 {
            fs.point_name("x", object(&store), &["x"]).unwrap();
            fs.remove_name("x").unwrap();
        }
        assert_eq!(store.object_count(), 1, "that of the dead one");
        let unfinished = dead.map(|saving| store.names(&[NameQuery::Exact(saving.open())]).unwrap().remove(0)[0].1);
        store.journal().unwrap().keep(unfinished);
        fs.reclaim().unwrap();
        assert_eq!((store.object_count(), names(&store)), (0, vec![]), "the marks go with the last that is announced");
    }
}
