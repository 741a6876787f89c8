//! Saves of one name at the same time, on several instances.
//!
//! The name map has no compare-and-swap: of two writers that both see the old object, each replaces the name and deletes
//! that one, and what the first put is left over. So in a cluster a save announces itself by a name that listings do
//! not show, `.vineyard-fs/saves/HASH/OBJECT`, before it looks at what it replaces, and looks at the others when it is
//! through:
//!
//! * The name leads to another object by now: our own goes.
//! * Nobody else is announced: who comes later sees our object as the one to be replaced.
//! * Somebody else is: we mark our save as done and look again. Either the other one has put its object by then, and
//!   ours goes; or it will find our mark when it is through, and removes our object if that is not the value.
//!
//! Marks go with the last save that is announced.

use super::FileSystem;
use super::copies::HIDDEN;
use super::name::stable_hash;
use crate::error::{Context, Result};
use crate::vineyard::ObjectId;
use crate::vineyard::store::NameQuery;

/// What ends the name of a save that is through.
const DONE: &str = ".done";

/// A save that others can see.
#[derive(Debug)]
pub(super) struct Saving {
    /// What the names of all saves of this name begin with.
    prefix: String,
    object: ObjectId,
}

/// Another save of the same name.
struct Other {
    name: String,
    object: ObjectId,
    done: bool,
}

/// What names of saves begin with.
pub(super) fn prefix() -> String {
    format!("{HIDDEN}saves/")
}

/// True for the name of a save that is through, which keeps nothing alive.
pub(super) fn is_mark(name: &str) -> bool {
    name.ends_with(DONE) && name.starts_with(&prefix())
}

impl Saving {
    fn new(name: &str, object: ObjectId) -> Saving {
        Saving { prefix: format!("{}{:016x}/", prefix(), stable_hash(&[name.as_bytes()])), object }
    }

    pub(super) fn open(&self) -> String {
        format!("{}{}", self.prefix, self.object)
    }

    fn done(&self) -> String {
        self.open() + DONE
    }
}

impl FileSystem {
    /// Before it is looked at what a name leads to, in order to replace it. Nothing where nobody else can be.
    ///
    /// # Errors
    /// What the store answers.
    pub(super) fn announce(&self, name: &str, object: ObjectId) -> Result<Option<Saving>> {
        if !self.is_shared()? {
            return Ok(None);
        }
        let saving = Saving::new(name, object);
        self.store.put_name(&saving.open(), object).context(|| format!("announcing a new value of {name:?}"))?;
        Ok(Some(saving))
    }

    /// The save did not happen.
    pub(super) fn withdraw(&self, saving: Option<Saving>) {
        if let Some(saving) = saving
            && let Err(error) = self.store.drop_name(&saving.open())
        {
            self.warn(format!("{:?} is left over, `vineyard-fs gc` removes it: {error}", saving.open()));
            self.suspect_for_long(saving.object);
        }
    }

    /// After the name was put.
    pub(super) fn settle_save(&self, name: &str, saving: Option<Saving>) {
        let Some(saving) = saving else { return };
        if let Err(error) = self.settle_now(name, &saving) {
            self.warn(format!("saves of {name:?} may have left something over, `vineyard-fs gc` removes it: {error}"));
        }
    }

    fn settle_now(&self, name: &str, saving: &Saving) -> Result<()> {
        let mut settled = self.is_settled(name, saving)?;
        if !settled && let Err(error) = self.store.put_name(&saving.done(), saving.object) {
            // Whoever replaced our object may have removed it just now: then there is nothing to mark.
            settled = self.object_of(name)? != Some(saving.object);
            if !settled {
                return Err(error);
            }
        }
        self.store.drop_name(&saving.open())?;
        if !settled && self.is_settled(name, saving)? {
            self.store.drop_name(&saving.done())?;
        }
        self.sweep(name, saving)
    }

    /// Removes the marks of saves that nobody has to see any more: who is announced while our own name still is leaves a
    /// mark for us, also after we have looked. While anybody else is announced, it is left to them.
    fn sweep(&self, name: &str, saving: &Saving) -> Result<()> {
        let (value, others) = self.value_and_saves(name, saving)?;
        if others.iter().all(|other| other.done) {
            for other in others {
                if value != Some(other.object) {
                    self.remove_superseded(other.object)?;
                }
                self.store.drop_name(&other.name)?;
            }
        }
        Ok(())
    }

    /// The same after a save that was announced under this name and did not happen.
    pub(super) fn sweep_after(&self, announced: &str) -> Result<()> {
        let prefix = announced.rsplit_once('/').map_or(announced, |(prefix, _)| prefix);
        let others = self.names_below(&format!("{prefix}/"))?;
        if others.iter().all(|(name, _)| is_mark(name)) {
            for (name, object) in others {
                self.remove_superseded(object)?;
                self.store.drop_name(&name)?;
            }
        }
        Ok(())
    }

    /// Removes what another save of its name has replaced, unless it was renamed in the meantime. All names are looked at:
    /// which one an object had last is unknown, since marks are names too. That happens only after saves at the same time.
    fn remove_superseded(&self, object: ObjectId) -> Result<()> {
        if self.names_below("")?.iter().any(|(_, named)| *named == object) {
            return Ok(());
        }
        self.objects.forget(object);
        self.store.delete(&[object])
    }

    /// What a name leads to, and all saves of it that are known.
    fn value_and_saves(&self, name: &str, saving: &Saving) -> Result<(Option<ObjectId>, Vec<Other>)> {
        let queries =
            [NameQuery::Exact(name.to_owned()), NameQuery::Prefix { prefix: saving.prefix.clone(), limit: None }];
        let mut answers = self.store.names(&queries)?.into_iter();
        let value = answers.next().unwrap_or_default().pop().map(|(_, object)| object);
        let saves = answers.next().unwrap_or_default().into_iter();
        Ok((value, saves.map(|(name, object)| Other { done: name.ends_with(DONE), name, object }).collect()))
    }

    /// Removes what others have left to us. False if somebody else must still see our save.
    fn is_settled(&self, name: &str, saving: &Saving) -> Result<bool> {
        let (value, mut others) = self.value_and_saves(name, saving)?;
        others.retain(|other| other.object != saving.object);
        if value != Some(saving.object) {
            // Whoever replaced it may have seen it, and removed it too.
            self.remove_superseded(saving.object)?;
            return Ok(true);
        }
        for other in others.iter().filter(|other| other.done) {
            self.remove_superseded(other.object)?;
            self.store.drop_name(&other.name)?;
        }
        Ok(others.iter().all(|other| other.done))
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

    fn object(store: &FakeStore) -> ObjectId {
        let content = json!({"typename": "vineyard::Scalar<int64_t>", "value_": "41", "type_": "int"});
        let made = store.create_objects(vec![content]).unwrap()[0].id;
        store.persist(made).unwrap();
        made
    }

    fn assert_nothing_hidden(store: &FakeStore) {
        let names = store.names(&[NameQuery::Prefix { prefix: HIDDEN.into(), limit: None }]).unwrap().remove(0);
        assert!(names.is_empty(), "{names:?}");
    }

    /// Two saves of `x` at the same time, the first of which ends before the second has put its value.
    fn interleaved(store: &FakeStore, fs: &FileSystem) -> (ObjectId, ObjectId, Option<Saving>) {
        let (a, b) = (object(store), object(store));
        let first = fs.announce("x", a).unwrap();
        let second = fs.announce("x", b).unwrap();
        // Both have seen that there is no old value.
        store.put_name("x", a).unwrap();
        fs.settle_save("x", first);
        (a, b, second)
    }

    #[test]
    fn saves_at_the_same_time_leave_one_value_and_nothing_else() {
        let store = Arc::new(FakeStore::new(1 << 20));
        let writer = || FileSystem::unmounted(store.clone() as Arc<dyn Store>);
        let writers: Vec<FileSystem> = (0..4).map(|_| writer()).collect();
        for _ in 0..50 {
            std::thread::scope(|scope| {
                for fs in &writers {
                    let store = &store;
                    scope.spawn(move || (0..4).for_each(|_| fs.point_name("x", object(store), &["x"]).unwrap()));
                }
            });
            let names = store.names(&[NameQuery::Prefix { prefix: String::new(), limit: None }]).unwrap().remove(0);
            assert_eq!(names.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["x"]);
            assert_eq!(store.object_count(), 1);
            assert!(store.metas(&[names[0].1], true).unwrap().contains_key(&names[0].1), "the value lives");
        }
    }

    #[test]
    fn the_first_of_two_interleaved_saves_goes() {
        let store = Arc::new(FakeStore::new(1 << 20));
        let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
        let (_, b, second) = interleaved(&store, &fs);
        assert_eq!(store.object_count(), 2, "the second may still fail");
        store.put_name("x", b).unwrap();
        fs.settle_save("x", second);
        assert_eq!((fs.object_of("x").unwrap(), store.object_count()), (Some(b), 1));
        assert_nothing_hidden(&store);
    }

    #[test]
    fn what_was_renamed_before_the_other_save_ended_stays() {
        let store = Arc::new(FakeStore::new(1 << 20));
        let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
        let (a, b, second) = interleaved(&store, &fs);
        // The mark of the first save waits for the second one.
        store.put_name("y", a).unwrap();
        store.drop_name("x").unwrap();
        store.put_name("x", b).unwrap();
        fs.settle_save("x", second);
        assert_eq!((fs.object_of("x").unwrap(), fs.object_of("y").unwrap()), (Some(b), Some(a)));
        assert_eq!(store.object_count(), 2);
        // The same if the first one looks only after the rename.
        let (c, d) = (object(&store), object(&store));
        let third = fs.announce("z", c).unwrap();
        store.put_name("z", c).unwrap();
        store.put_name("w", c).unwrap();
        store.put_name("z", d).unwrap();
        fs.settle_save("z", third);
        assert_eq!((fs.object_of("z").unwrap(), fs.object_of("w").unwrap()), (Some(d), Some(c)));
        assert_eq!(store.object_count(), 4);
        assert_nothing_hidden(&store);
    }
}
