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
//!
//! Who moves a dataset to another instance announces that too, as what it is: it brings nothing new, so it gives way to
//! whoever saves at the same time. A save that finds the moved object in the place of its own puts its own again, and a
//! move that finds a save that is through puts that back.

use super::FileSystem;
use super::copies::HIDDEN;
use super::name::stable_hash;
use crate::error::{Context, Result};
use crate::vineyard::ObjectId;
use crate::vineyard::store::{NameQuery, NamedObject};

/// What ends the name of a save that is through.
const DONE: &str = ".done";
/// What ends the name of a move, before that.
const MOVE: &str = ".move";

/// A save that others can see.
#[derive(Debug)]
pub(super) struct Saving {
    /// What the names of all saves of this name begin with.
    prefix: String,
    object: ObjectId,
    /// It is a move.
    moves: bool,
}

/// Another save of the same name.
struct Other {
    name: String,
    object: ObjectId,
    done: bool,
    moves: bool,
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
    fn new(name: &str, object: ObjectId, moves: bool) -> Saving {
        Saving { prefix: format!("{}{:016x}/", prefix(), stable_hash(&[name.as_bytes()])), object, moves }
    }

    pub(super) fn open(&self) -> String {
        format!("{}{}{}", self.prefix, self.object, if self.moves { MOVE } else { "" })
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
        self.announce_as(name, object, false)
    }

    /// The same for an object that is a copy of what the name leads to.
    ///
    /// # Errors
    /// What the store answers.
    pub(super) fn announce_move(&self, name: &str, copy: ObjectId) -> Result<Option<Saving>> {
        self.announce_as(name, copy, true)
    }

    fn announce_as(&self, name: &str, object: ObjectId, moves: bool) -> Result<Option<Saving>> {
        if !self.is_shared()? {
            return Ok(None);
        }
        let saving = Saving::new(name, object, moves);
        self.store.put_name(&saving.open(), object).context(|| format!("announcing a new value of {name:?}"))?;
        Ok(Some(saving))
    }

    /// The save did not happen. Marks that were left for it to see go, too.
    pub(super) fn withdraw(&self, saving: Option<Saving>) {
        let Some(saving) = saving else { return };
        if let Err(error) = self.store.drop_name(&saving.open()) {
            self.warn(format!("{:?} is left over, `vineyard-fs gc` removes it: {error}", saving.open()));
            self.suspect_for_long(saving.object);
        } else if let Err(error) = self.sweep_after(&saving.open()) {
            self.warn(format!("marks of saves may be left over, `vineyard-fs gc` removes them: {error}"));
        }
    }

    /// After the name was put.
    pub(super) fn settle_save(&self, name: &str, saving: Option<Saving>) {
        let Some(saving) = saving else { return };
        if let Err(error) = self.settle_now(name, &saving) {
            self.warn(format!("saves of {name:?} may have left something over, `vineyard-fs gc` removes it: {error}"));
        }
    }

    /// After the name was put that led to `moved` before.
    pub(super) fn settle_move(&self, name: &str, saving: Option<Saving>, moved: ObjectId) {
        if let Some(saving) = &saving
            && let Err(error) = self.give_way(name, saving, moved)
        {
            self.warn(format!("{name:?} was moved while it was saved, and may have its former value: {error}"));
        }
        self.settle_save(name, saving);
    }

    /// Puts back what was saved between the look at the name and the move.
    fn give_way(&self, name: &str, saving: &Saving, moved: ObjectId) -> Result<()> {
        let (value, others) = self.value_and_saves(name, saving)?;
        let saved = others.iter().filter(|other| other.done && !other.moves && other.object != moved);
        let saved: Vec<ObjectId> = saved.map(|other| other.object).collect();
        if value != Some(saving.object) || saved.is_empty() {
            return Ok(());
        }
        // What was replaced long ago, of which only the mark is left, is deleted.
        let alive = self.store.metas(&saved, true)?;
        match saved.iter().filter(|object| alive.contains_key(object)).max() {
            Some(object) => self.store.put_name(name, *object),
            None => Ok(()),
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
        if value != Some(saving.object) {
            // Whoever replaced it while it was announced took it for one that has a name.
            self.remove_superseded(saving.object)?;
        }
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
        let other = |(name, object): NamedObject| {
            let (open, done) = name.strip_suffix(DONE).map_or((name.as_str(), false), |open| (open, true));
            Other { moves: open.ends_with(MOVE), done, object, name }
        };
        Ok((value, saves.map(other).collect()))
    }

    /// Removes what others have left to us. False if somebody else must still see our save.
    fn is_settled(&self, name: &str, saving: &Saving) -> Result<bool> {
        let (mut value, mut others) = self.value_and_saves(name, saving)?;
        others.retain(|other| other.object != saving.object);
        if !saving.moves && others.iter().any(|other| other.moves && Some(other.object) == value) {
            self.store.put_name(name, saving.object)?;
            value = Some(saving.object);
        }
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
    fn a_move_gives_way_to_a_save() {
        // What comes between the look at the name and the move: the whole save, or the beginning of one that ends before
        // or after the move.
        for (whole, move_ends_first) in [(true, false), (false, false), (false, true)] {
            let store = Arc::new(FakeStore::new(1 << 20));
            let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
            let (source, copy, saved) = (object(&store), object(&store), object(&store));
            store.put_name("x", source).unwrap();
            let moving = fs.announce_move("x", copy).unwrap();
            let mut saving = None;
            if whole {
                fs.point_name("x", saved, &["x"]).unwrap();
            } else {
                saving = fs.announce("x", saved).unwrap();
                store.put_name("x", saved).unwrap();
                store.delete(&[source]).unwrap();
            }
            store.put_name("x", copy).unwrap();
            if move_ends_first {
                fs.settle_move("x", moving, source);
                fs.settle_save("x", saving);
            } else {
                fs.settle_save("x", saving);
                fs.settle_move("x", moving, source);
            }
            assert_eq!(fs.object_of("x").unwrap(), Some(saved), "{whole} {move_ends_first}");
            assert_eq!(store.object_count(), 1, "{whole} {move_ends_first}");
            assert_nothing_hidden(&store);
        }
    }

    #[test]
    fn what_is_replaced_while_it_is_still_announced_goes() {
        let store = Arc::new(FakeStore::new(1 << 20));
        let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
        let (first, second) = (object(&store), object(&store));
        let saving = fs.announce("x", first).unwrap().unwrap();
        store.put_name("x", first).unwrap();
        assert!(fs.is_settled("x", &saving).unwrap());
        fs.point_name("x", second, &["x"]).unwrap();
        store.drop_name(&saving.open()).unwrap();
        fs.sweep("x", &saving).unwrap();
        assert_eq!((fs.object_of("x").unwrap(), store.object_count()), (Some(second), 1));
        assert_nothing_hidden(&store);
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
