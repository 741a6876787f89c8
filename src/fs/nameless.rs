//! Deleting objects that have lost a name, unless another one leads to them.
//!
//! Other clients give an object several names, and only the whole name map tells: what an object's metadata says of its
//! name (`__name`) is the last one that was put, and goes with whichever is dropped (`put_name` and `drop_name`,
//! `src/server/server/vineyard_server.cc` of v6d 0.24). A long map is not asked for each object, but now and then for all
//! that wait; the journal knows those, so that a server which is killed leaves them to the next one.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

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
/// Part of the time that such questions may take: vineyardd answers nobody else meanwhile.
const SHARE: u32 = 5;

/// Objects that wait until it is known whether a name leads to them.
#[derive(Default)]
pub(super) struct Nameless {
    /// Held while it is asked for the names.
    settling: Mutex<()>,
    waiting: Mutex<Waiting>,
    came: Condvar,
}

#[derive(Default)]
struct Waiting {
    objects: Vec<ObjectId>,
    /// Those that are being looked for.
    asked: Vec<ObjectId>,
    /// A thread looks after them.
    attended: bool,
}

impl Nameless {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether an object waits.
    pub(super) fn contains(&self, object: ObjectId) -> bool {
        let waiting = self.waiting();
        waiting.objects.contains(&object) || waiting.asked.contains(&object)
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
        let attended = {
            let mut waiting = self.nameless.waiting();
            waiting.objects.push(object);
            waiting.attended
        };
        match attended {
            true => self.nameless.came.notify_one(),
            false => {
                if let Err(error) = self.delete_all_nameless() {
                    self.warn(format!("object {object} may be left over: {error}"));
                }
            }
        }
    }

    /// Deletes those that wait and have no name. Returns how many waited.
    ///
    /// # Errors
    /// What the store answers; they go on waiting then.
    pub fn delete_nameless(&self) -> Result<usize> {
        // Nobody moves an object from one name to another while it is looked for.
        let _naming = self.naming();
        self.delete_all_nameless()
    }

    /// As [`FileSystem::delete_nameless`], with the lock on names held or without anybody else.
    fn delete_all_nameless(&self) -> Result<usize> {
        let _settling = self.nameless.settling.lock().unwrap_or_else(|e| e.into_inner());
        let objects = {
            let mut waiting = self.nameless.waiting();
            waiting.asked = std::mem::take(&mut waiting.objects);
            waiting.asked.clone()
        };
        let settled = if objects.is_empty() { Ok(()) } else { self.delete_of(&objects) };
        let mut waiting = self.nameless.waiting();
        let asked = std::mem::take(&mut waiting.asked);
        if settled.is_err() {
            waiting.objects.extend(asked);
        }
        settled.map(|()| objects.len())
    }

    /// Deletes those of these objects that no name leads to.
    fn delete_of(&self, objects: &[ObjectId]) -> Result<()> {
        let all = NameQuery::Prefix { prefix: String::new(), limit: None };
        let names = self.store.names(&[all])?.into_iter().flatten().filter(|(name, _)| !saves::is_mark(name));
        let named: HashSet<ObjectId> = names.map(|(_, id)| id).collect();
        let (stay, go): (Vec<ObjectId>, Vec<ObjectId>) = objects.iter().partition(|object| named.contains(object));
        self.forget_suspects(&stay);
        go.iter().for_each(|object| self.delete_suspect(*object));
        Ok(())
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
            let start = Instant::now();
            if let Err(error) = self.delete_nameless() {
                tracing::info!("objects without a name are deleted later: {error}");
            }
            std::thread::sleep(PAUSE.max(start.elapsed() * SHARE));
        }
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
    fn many_are_asked_for_at_once_by_a_thread() {
        let (store, fs) = store(1000);
        let attending = fs.clone();
        std::thread::spawn(move || attending.attend_nameless());
        while !fs.nameless.waiting().attended {
            std::thread::yield_now();
        }
        let objects: Vec<ObjectId> = (0..20).map(|number| object(&store, &[&format!("x{number}")])).collect();
        store.put_name("y", objects[3]).unwrap();
        (0..20).for_each(|number| fs.remove_name(&format!("x{number}")).unwrap());
        let deadline = Instant::now() + Duration::from_secs(60);
        while store.object_count() > 2 {
            assert!(Instant::now() < deadline, "{} objects are left", store.object_count());
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(fs.object_of("y").unwrap(), Some(objects[3]));
        assert!(objects.iter().all(|id| !fs.nameless.contains(*id)) || store.object_count() == 2);
    }
}
