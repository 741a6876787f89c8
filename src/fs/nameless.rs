//! Deleting objects that have lost a name, unless another one leads to them.
//!
//! Other clients give an object several names, and only the whole name map tells: what an object's metadata says of its
//! name (`__name`) is the last one that was put, and goes with whichever is dropped (`put_name` and `drop_name`,
//! `src/server/server/vineyard_server.cc` of v6d 0.24). A long map is not asked for each object, but now and then for all
//! that wait; the journal knows those, so that a server which is killed leaves them to the next one.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::copies::Copy;
use super::{FileSystem, saves};
use crate::error::Result;
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::vineyard::ObjectId;
use crate::vineyard::store::{NameQuery, NamedObject};

/// Names that are asked for at once; about 0.1 ms of vineyardd's time.
const FEW_NAMES: u64 = 256;
/// How many questions later it is looked again whether there are few names.
const MANY_NAMES_FOR: u32 = 64;
/// Least time between two questions for all names.
const PAUSE: Duration = Duration::from_millis(20);
/// How long it is waited after one that failed.
const AGAIN: Duration = Duration::from_secs(1);
/// Part of the time that such questions may take: vineyardd answers nobody else meanwhile.
const SHARE: u32 = 5;

/// Objects that are looked for with one question.
const BATCH: usize = 256;
/// Objects that are deleted with one request.
const DELETED: usize = 16;
/// For how long others may be kept from changing names.
const HELD: Duration = Duration::from_millis(50);

/// Objects that wait until it is known whether a name leads to them.
#[derive(Default)]
pub(super) struct Nameless {
    waiting: Mutex<Waiting>,
    came: Condvar,
    settled: Condvar,
}

#[derive(Default)]
struct Waiting {
    objects: Vec<ObjectId>,
    /// Those that are being looked for.
    asked: Vec<ObjectId>,
    /// A thread looks after them.
    attended: bool,
    /// Somebody deletes them, and what comes to wait by that.
    settling: bool,
}

impl Nameless {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits for the turn to delete objects. Who deletes one must not ask for it.
    fn turn(&self) -> Turn<'_> {
        let mut waiting = self.waiting();
        while waiting.settling {
            waiting = self.settled.wait(waiting).unwrap_or_else(|e| e.into_inner());
        }
        waiting.settling = true;
        Turn { nameless: self, ended: false }
    }

    /// Whether an object waits.
    pub(super) fn contains(&self, object: ObjectId) -> bool {
        let waiting = self.waiting();
        waiting.objects.contains(&object) || waiting.asked.contains(&object)
    }
}

/// The turn to delete objects. One thread has it at a time.
struct Turn<'a> {
    nameless: &'a Nameless,
    ended: bool,
}

impl Turn<'_> {
    /// Some that wait. If there are none, the turn ends in the same moment: what comes later is looked after by others.
    fn take(&mut self) -> Option<Vec<ObjectId>> {
        let mut waiting = self.nameless.waiting();
        if waiting.objects.is_empty() {
            self.end(waiting);
            return None;
        }
        let some = waiting.objects.len().min(BATCH);
        waiting.asked = waiting.objects.drain(..some).collect();
        Some(waiting.asked.clone())
    }

    /// What was taken is settled, but for these.
    fn settle(&self, left: &[ObjectId]) {
        let mut waiting = self.nameless.waiting();
        waiting.asked.clear();
        waiting.objects.extend(left);
    }

    fn end(&mut self, mut waiting: MutexGuard<'_, Waiting>) {
        waiting.settling = false;
        self.ended = true;
        drop(waiting);
        self.nameless.settled.notify_all();
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if !self.ended {
            let mut waiting = self.nameless.waiting();
            let asked = std::mem::take(&mut waiting.asked);
            waiting.objects.extend(asked);
            self.end(waiting);
        }
    }
}

impl FileSystem {
    /// Deletes an object unless a name points to it.
    pub(super) fn delete_unnamed(&self, object: ObjectId) {
        self.delete_without(object, &[]);
    }

    /// As [`FileSystem::delete_unnamed`]; that these names do not lead to it any more is known. The lock on names is held,
    /// or nobody gives the object a name.
    pub(super) fn delete_without(&self, object: ObjectId, names: &[&str]) {
        match self.all_names_if_few() {
            Ok(Some(all)) => {
                let keeps = |name: &String| !saves::is_mark(name) && !names.contains(&name.as_str());
                if !all.iter().any(|(name, id)| *id == object && keeps(name)) {
                    self.delete_object(object);
                }
                return;
            }
            Ok(None) => {}
            Err(error) => tracing::info!(%object, "whether an object has a name is asked later: {error}"),
        }
        self.suspect_for_long(object);
        let mut waiting = self.nameless.waiting();
        waiting.objects.push(object);
        if waiting.attended {
            self.nameless.came.notify_one();
        } else if !waiting.settling {
            // Or it is a copy of one that is deleted right now, and has its turn after that.
            waiting.settling = true;
            drop(waiting);
            let mut turn = Turn { nameless: &self.nameless, ended: false };
            if let Err(error) = self.settle_all(&mut turn, false) {
                self.warn(format!("object {object} may be left over: {error}"));
            }
        }
    }

    /// Deletes those that wait and have no name. Returns how many waited.
    ///
    /// # Errors
    /// What the store answers; they go on waiting then.
    pub fn delete_nameless(&self) -> Result<usize> {
        let mut turn = self.nameless.turn();
        // Nobody moves an object from one name to another while it is looked for.
        self.settle_all(&mut turn, true)
    }

    /// Deletes all that wait and have no name. `lock` keeps names as they are, where that is not certain anyway.
    fn settle_all(&self, turn: &mut Turn<'_>, lock: bool) -> Result<usize> {
        let mut settled = 0;
        while let Some(objects) = turn.take() {
            let naming = lock.then(|| self.naming());
            let (left, _) = self.delete_of(&objects)?;
            drop(naming);
            turn.settle(&left);
            settled += objects.len() - left.len();
        }
        Ok(settled)
    }

    /// Deletes those of these objects that no name leads to. Returns those for which there was no time, and how long it
    /// took to ask for the names.
    fn delete_of(&self, objects: &[ObjectId]) -> Result<(Vec<ObjectId>, Duration)> {
        let start = Instant::now();
        let all = NameQuery::Prefix { prefix: String::new(), limit: None };
        let (mut named, mut copied) = (HashSet::new(), HashSet::new());
        for (name, id) in self.store.names(&[all])?.into_iter().flatten().filter(|(name, _)| !saves::is_mark(name)) {
            copied.extend(Copy::parse(&name, id).map(|copy| copy.source));
            named.insert(id);
        }
        let question = start.elapsed();
        let (stay, go): (Vec<ObjectId>, Vec<ObjectId>) = objects.iter().partition(|object| named.contains(object));
        self.forget_suspects(&stay);
        let mut parts = go.chunks(DELETED);
        while start.elapsed() < question + HELD
            && let Some(part) = parts.next()
        {
            let (copied, alone): (Vec<ObjectId>, Vec<ObjectId>) = part.iter().partition(|id| copied.contains(id));
            self.delete_suspects(&alone);
            copied.into_iter().for_each(|object| self.delete_suspect(object));
        }
        Ok((parts.flatten().copied().collect(), question))
    }

    /// Looks after objects that wait, for ever. For a thread of its own.
    pub fn attend_nameless(&self) {
        self.nameless.waiting().attended = true;
        loop {
            let mut waiting = self.nameless.waiting();
            while waiting.objects.is_empty() {
                waiting = self.nameless.came.wait(waiting).unwrap_or_else(|e| e.into_inner());
            }
            drop(waiting);
            let pause = match self.settle_some() {
                Ok(question) => PAUSE.max(question * SHARE),
                Err(error) => {
                    tracing::info!("objects without a name are deleted later: {error}");
                    AGAIN
                }
            };
            std::thread::sleep(pause);
        }
    }

    /// Deletes some of those that wait and have no name. Returns how long it took to ask for the names.
    fn settle_some(&self) -> Result<Duration> {
        let mut turn = self.nameless.turn();
        let Some(objects) = turn.take() else { return Ok(Duration::ZERO) };
        let _naming = self.naming();
        let (left, question) = self.delete_of(&objects)?;
        turn.settle(&left);
        Ok(question)
    }

    /// All names, if they are so few that asking for them takes less time than asking for the metadata of an object.
    fn all_names_if_few(&self) -> Result<Option<Vec<NamedObject>>> {
        let skip = |left: u32| left.checked_sub(1);
        if self.many_names.fetch_update(Ordering::Relaxed, Ordering::Relaxed, skip).is_ok() {
            return Ok(None);
        }
        let all = NameQuery::Prefix { prefix: String::new(), limit: Some(FEW_NAMES) };
        let names: Vec<NamedObject> = self.store.names(&[all])?.into_iter().flatten().collect();
        if names.len() as u64 >= FEW_NAMES {
            self.many_names.store(MANY_NAMES_FOR, Ordering::Relaxed);
            return Ok(None);
        }
        Ok(Some(names))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::vineyard::Store;
    use crate::vineyard::fake::FakeStore;

    fn object(store: &FakeStore, names: &[&str]) -> ObjectId {
        let content = json!({"typename": "vineyard::Scalar<int64_t>", "value_": "41", "type_": "int"});
        let made = store.create_objects(vec![content]).unwrap()[0].id;
        store.persist(made).unwrap();
        names.iter().for_each(|name| store.put_name(name, made).unwrap());
        made
    }

    /// A store in which so many names lead to one object more.
    fn store(names: usize) -> (Arc<FakeStore>, Arc<FileSystem>) {
        let store = Arc::new(FakeStore::new(1 << 20));
        let other = object(&store, &[]);
        (0..names).for_each(|number| store.put_name(&format!("filler{number}"), other).unwrap());
        (store.clone(), Arc::new(FileSystem::unmounted(store as Arc<dyn Store>)))
    }

    #[test]
    fn an_object_stays_as_long_as_any_name_leads_to_it() {
        for names in [0, 1000] {
            let (store, fs) = store(names);
            for order in [["run1", "latest"], ["latest", "run1"]] {
                let kept = object(&store, &order);
                fs.remove_name("run1").unwrap();
                assert_eq!((fs.object_of("latest").unwrap(), store.object_count()), (Some(kept), 2), "{order:?}");
                // The same where the name gets another value.
                store.put_name("run1", kept).unwrap();
                let second = object(&store, &[]);
                fs.point_name("run1", second, &["run1"]).unwrap();
                assert_eq!(store.object_count(), 3, "{order:?}");
                fs.remove_name("run1").unwrap();
                fs.remove_name("latest").unwrap();
                assert_eq!(store.object_count(), 1, "{order:?}");
            }
        }
    }

    #[test]
    fn what_has_copies_goes_with_them() {
        for names in [0, 1000] {
            let (store, fs) = store(names);
            let source = object(&store, &["x"]);
            for instance in 1..=3 {
                let copy = object(&store, &[]);
                let copy = Copy { source, instance: crate::vineyard::InstanceId(instance), object: copy };
                store.put_name(&copy.name(), copy.object).unwrap();
            }
            fs.remove_name("x").unwrap();
            assert_eq!((store.object_count(), fs.copies(source).unwrap().len()), (1, 0), "{names} names");
        }
    }

    #[test]
    fn others_may_change_names_while_many_objects_go() {
        let (store, fs) = store(1000);
        let count = 3 * BATCH + 7;
        let objects: Vec<ObjectId> = (0..count).map(|_| object(&store, &[])).collect();
        store.put_name("kept", objects[BATCH]).unwrap();
        fs.nameless.waiting().objects.extend(&objects);
        assert_eq!(fs.delete_nameless().unwrap(), count);
        assert_eq!((store.object_count(), fs.object_of("kept").unwrap()), (2, Some(objects[BATCH])));
        let waiting = fs.nameless.waiting();
        assert!(waiting.objects.is_empty() && waiting.asked.is_empty() && !waiting.settling);
    }

    #[test]
    fn what_cannot_be_asked_for_waits_on() {
        let (store, fs) = store(1000);
        let object = object(&store, &[]);
        fs.nameless.waiting().objects.push(object);
        store.fail_next(crate::vineyard::fake::Op::Names, 1, crate::Kind::Unavailable);
        fs.delete_nameless().unwrap_err();
        assert!(fs.nameless.contains(object) && store.object_count() == 2);
        assert_eq!((fs.delete_nameless().unwrap(), store.object_count()), (1, 1));
    }

    #[test]
    fn many_are_asked_for_at_once_by_a_thread() {
        let (store, fs) = store(1000);
        let attending = fs.clone();
        std::thread::spawn(move || attending.attend_nameless());
        while !fs.nameless.waiting().attended {
            std::thread::yield_now();
        }
        let objects: Vec<ObjectId> = (0..20).map(|number| object(&store, &[&format!("x{number}")])).collect();
        store.put_name("y", objects[3]).unwrap();
        (0..20).for_each(|number| assert!(fs.remove_name(&format!("x{number}")).unwrap()));
        let deadline = Instant::now() + Duration::from_secs(60);
        while store.object_count() > 2 {
            assert!(Instant::now() < deadline, "{} objects are left", store.object_count());
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(fs.object_of("y").unwrap(), Some(objects[3]));
        assert!(objects.iter().all(|id| !fs.nameless.contains(*id)) || store.object_count() == 2);
    }
}
