//! Copies of a dataset on other instances than its own.
//!
//! A dataset is one object, on one instance, and its name points to that. A copy is another object with the same
//! signature, as vineyard's own migration makes it. All copies of an object are found by names that listings do not
//! show, `.vineyard-fs/copies/OBJECT/INSTANCE/COPY`: any mount of the cluster sees them with one question, reads the copy
//! that is nearest, goes on with another one when the instance of an object dies, and removes all with the object.
//! The name of a copy is its own, so that of several that are made at the same time none is lost sight of; all but the
//! oldest on an instance go again.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::FileSystem;
use super::ahead::{AHEAD, is_ahead};
use super::direct::Named;
use super::naming::is_clear;
use super::objects::Loaded;
use crate::dataset::recipe::recipe_of;
use crate::error::{Context, Error, Kind, Result};
use crate::image::{Image, View};
use crate::vineyard::copy::{Progress, copy_object, copy_size};
use crate::vineyard::store::NameQuery;
use crate::vineyard::{InstanceId, Meta, ObjectId, Store};

/// What names begin with that are not shown.
pub const HIDDEN: &str = ".vineyard-fs/";
/// What names of copies begin with.
pub const COPIES: &str = ".vineyard-fs/copies/";
/// Key of a copy's metadata with the id of the object that it was made of.
pub const COPY_OF: &str = "vineyard_fs_copy_of_";
/// How often it is looked again which copies there are, while others come and go.
const LOOKS: usize = 100;

/// A copy that a name tells of. Whether it exists is another question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// The object that it is a copy of.
    pub source: ObjectId,
    /// Where it is.
    pub instance: InstanceId,
    /// The copy.
    pub object: ObjectId,
}

impl Copy {
    /// The name under which it is found.
    pub fn name(&self) -> String {
        format!("{COPIES}{}/{}/{}", self.source, self.instance, self.object)
    }

    /// Reads such a name.
    pub fn parse(name: &str, object: ObjectId) -> Option<Copy> {
        let (source, rest) = name.strip_prefix(COPIES)?.split_once('/')?;
        let (instance, copy) = rest.split_once('/')?;
        let instance = InstanceId(instance.strip_prefix('i')?.parse().ok()?);
        // Whoever gives such a name another object has made no copy.
        if copy.parse::<ObjectId>().ok()? != object {
            return None;
        }
        Some(Copy { source: source.parse().ok()?, instance, object })
    }
}

/// What came of a wish for an object on this instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Brought {
    /// It was here already, as this object.
    Here(ObjectId),
    /// It was copied to this object.
    Copied(ObjectId),
}

impl Brought {
    /// The object on this instance.
    pub fn object(self) -> ObjectId {
        match self {
            Brought::Here(object) | Brought::Copied(object) => object,
        }
    }
}

/// Copies of these objects, as their names tell, each list with the objects of `sources` in order.
///
/// # Errors
/// What the store answers.
pub fn copies_of(store: &dyn Store, sources: &[ObjectId]) -> Result<Vec<Vec<Copy>>> {
    let query = |source: &ObjectId| NameQuery::Prefix { prefix: format!("{COPIES}{source}/"), limit: None };
    let answers = store.names(&sources.iter().map(query).collect::<Vec<_>>())?;
    let parsed =
        |names: Vec<(String, ObjectId)>| names.iter().filter_map(|(name, id)| Copy::parse(name, *id)).collect();
    Ok(answers.into_iter().map(parsed).collect())
}

/// True if a copy has the bytes of its original: the same values, and the same file if the original was written as one.
pub(super) fn is_faithful(original: &Meta, copy: &Meta) -> bool {
    let file = |meta: &Meta| recipe_of(meta).ok().map(|recipe| recipe.map(|recipe| (recipe.view, recipe.size)));
    original.signature() == copy.signature() && file(original) == file(copy)
}

/// True for errors of an object, or its instance, that another copy may not have.
pub(super) fn is_lost(error: &Error) -> bool {
    matches!(error.kind(), Kind::Unreachable | Kind::Stale | Kind::NotFound)
}

impl FileSystem {
    /// Copies of an object.
    ///
    /// # Errors
    /// What the store answers.
    pub fn copies(&self, source: ObjectId) -> Result<Vec<Copy>> {
        if !self.is_shared()? {
            return Ok(Vec::new());
        }
        Ok(copies_of(&*self.store, &[source])?.into_iter().flatten().collect())
    }

    /// Whether the store shares its metadata with others, so that there may be copies. Asked once for each vineyardd.
    pub(super) fn is_shared(&self) -> Result<bool> {
        self.store.shares_metadata()
    }

    /// The image of a view, of the object itself or of its nearest copy that can be read; not of `except`. A copy that is
    /// found to have other bytes than the object is none.
    ///
    /// # Errors
    /// As [`Loaded::image`].
    pub(super) fn nearest(
        &self,
        object: ObjectId,
        view: View,
        except: Option<ObjectId>,
    ) -> Result<(Arc<Loaded>, Arc<Image>)> {
        let attempt = |id: ObjectId| {
            let loaded = self.objects.load(&*self.store, id)?;
            let image = loaded.image(view, &*self.store)?;
            Ok((loaded, image))
        };
        let here = match self.objects.load(&*self.store, object) {
            Ok(loaded) => !loaded.is_remote(),
            Err(error) if is_lost(&error) => false,
            Err(error) => return Err(error),
        };
        if (here && except != Some(object)) || !self.is_shared()? {
            return attempt(object);
        }
        let mut copies = self.copies(object)?;
        let this = self.store.instance()?.id;
        copies.sort_by_key(|copy| copy.instance != this);
        let near = copies.iter().take_while(|copy| copy.instance == this).count();
        let mut order: Vec<ObjectId> = copies.iter().map(|copy| copy.object).collect();
        order.insert(near, object);
        let known = self.objects.known_summary(object);
        let original = if copies.is_empty() { None } else { self.meta_of(object)? };
        let is_other = |loaded: &Loaded, image: &Image| {
            let size = known.as_ref().and_then(|known| known.view(view)).flatten();
            loaded.meta.id() != object
                && (original.as_ref().is_some_and(|original| !is_faithful(original, &loaded.meta))
                    || known.as_ref().is_some_and(|k| k.signature.is_some() && k.signature != loaded.meta.signature())
                    || size.is_some_and(|size| size != image.size()))
        };
        let mut failure = None;
        for id in order.into_iter().filter(|id| Some(*id) != except) {
            match attempt(id) {
                Err(error) if is_lost(&error) => drop(failure.get_or_insert(error)),
                Ok((loaded, image)) if is_other(&loaded, &image) => {
                    tracing::warn!(%object, copy = %id, "a copy has other bytes than its original, and is not read");
                }
                other => return other,
            }
        }
        Err(failure.unwrap_or_else(|| Error::stale(format!("object {object} has no other copy"))))
    }

    /// Removes all copies of an object that is gone, or is to be read no more.
    pub(super) fn drop_copies(&self, source: ObjectId) {
        let copies = match self.copies(source) {
            Ok(copies) => copies,
            Err(error) => return self.warn(format!("copies of object {source} may be left over: {error}")),
        };
        for copy in copies {
            if let Err(error) = self.drop_copy(&copy) {
                self.warn(format!(
                    "the copy of object {source} on instance {} may be left over: {error}",
                    copy.instance
                ));
            }
        }
    }

    /// Removes one copy, first what it is found by.
    ///
    /// # Errors
    /// What the store answers.
    pub fn drop_copy(&self, copy: &Copy) -> Result<()> {
        self.store.drop_name(&copy.name())?;
        self.delete_unnamed(copy.object);
        Ok(())
    }

    fn meta_of(&self, object: ObjectId) -> Result<Option<Meta>> {
        self.store.metas(&[object], true)?.remove(&object).transpose()
    }

    /// An object and its copies, as far as they and their instances exist: first those that are here, then the object,
    /// then the others.
    ///
    /// # Errors
    /// `Stale` if there is none; what the store answers.
    pub fn living(&self, object: ObjectId) -> Result<Vec<Meta>> {
        let here = self.store.instance()?.id;
        let mut ids = vec![object];
        ids.extend(self.copies(object)?.iter().map(|copy| copy.object));
        let mut metas = self.store.metas(&ids, true)?;
        let lives = self.lives(&ids)?;
        let is_alive = |id: &ObjectId| lives.get(id).is_some_and(|life| !life.is_over());
        let original = metas.get(&object).and_then(|meta| meta.as_ref().ok()).cloned();
        let mut failure = None;
        let mut living = Vec::new();
        for id in ids.into_iter().filter(is_alive) {
            match metas.remove(&id) {
                Some(Ok(meta)) if original.as_ref().is_none_or(|original| is_faithful(original, &meta)) => {
                    living.push(meta);
                }
                Some(Err(error)) if id == object => failure = Some(error),
                _ => {}
            }
        }
        living.sort_by_key(|meta| (meta.instance() != here, meta.id() != object));
        if living.is_empty() {
            return Err(failure.unwrap_or_else(|| {
                let what = format!("object {object} is gone, and it has no copy: `vineyard-fs gc` removes its name");
                Error::stale(what)
            }));
        }
        Ok(living)
    }

    /// How many bytes would come here if an object was copied; `None` if it is here already, or nobody tells.
    pub fn bytes_to_copy(&self, object: ObjectId) -> Option<u64> {
        let here = self.store.instance().ok()?.id;
        let living = self.living(object).ok()?;
        if living.first().is_some_and(|meta| meta.instance() == here) {
            return None;
        }
        living.iter().find_map(|meta| copy_size(&*self.store, meta).ok())
    }

    /// Copies one of these objects here: the first that is to be had. Copies that nobody asked for make way for one that
    /// somebody did.
    fn copy_one(
        &self,
        living: &[Meta],
        object: ObjectId,
        ahead: bool,
        progress: Progress,
    ) -> Result<(ObjectId, ObjectId)> {
        let mut failure = None;
        for meta in living {
            let of = (COPY_OF.to_owned(), Value::from(object.to_string()));
            let extra = Map::from_iter([of, (AHEAD.to_owned(), ahead.into())]);
            let mut made = copy_object(&*self.store, meta, extra.clone(), &mut *progress);
            let is_full = made.as_ref().is_err_and(|error| error.kind() == Kind::Full);
            if is_full && !ahead && self.give_up_copies(copy_size(&*self.store, meta)?)? > 0 {
                made = copy_object(&*self.store, meta, extra, &mut *progress);
            }
            match made {
                Ok(copy) => return Ok((meta.id(), copy)),
                Err(error) if is_lost(&error) => drop(failure.get_or_insert(error)),
                Err(error) => return Err(error),
            }
        }
        Err(failure.unwrap_or_else(|| gone(object)))
    }

    /// Sees to it that an object has a copy here that is as permanent as itself.
    ///
    /// # Errors
    /// As [`copy_object`]; `Stale` if the object is gone, and has no copy elsewhere.
    pub fn copy_here(&self, object: ObjectId, progress: Progress) -> Result<Brought> {
        self.bring(object, false, progress)
    }

    /// As [`FileSystem::copy_here`]; `ahead` if nobody asked for it.
    pub(super) fn bring(&self, object: ObjectId, ahead: bool, progress: Progress) -> Result<Brought> {
        let _unit = self.unit();
        let here = self.store.instance()?.id;
        let living = self.living(object)?;
        if let Some(meta) = living.first().filter(|meta| meta.instance() == here) {
            // A copy that became the dataset is none any more.
            return match !ahead && meta.id() != object && is_ahead(meta) {
                true => self.keep_copy(Copy { source: object, instance: here, object: meta.id() }, meta),
                false => Ok(Brought::Here(meta.id())),
            };
        }
        let (from, copy) = self.copy_one(&living, object, ahead, progress)?;
        match self.register(Copy { source: object, instance: here, object: copy }, from) {
            Ok(brought) => Ok(brought),
            Err(error) => {
                self.store.delete(&[copy])?;
                Err(error)
            }
        }
    }

    /// Makes a copy known that was made of `from`, the object or a copy of it. If others were made here meanwhile, the
    /// oldest stays.
    fn register(&self, copy: Copy, from: ObjectId) -> Result<Brought> {
        self.store.put_name(&copy.name(), copy.object).context(|| "making a copy known".into())?;
        // Who removes the object looks for copies afterwards; so one of us sees the other.
        let is_wanted = match from == copy.source {
            true => self.meta_of(from)?.is_some(),
            // Of an object that died with its instance the name tells.
            false => self.names_below("")?.iter().any(|(_, object)| *object == copy.source),
        };
        if !is_wanted {
            self.store.drop_name(&copy.name())?;
            return Err(gone(copy.source));
        }
        for _ in 0..LOOKS {
            let here = self.copies(copy.source)?.into_iter().filter(|other| other.instance == copy.instance);
            let mut here: Vec<Copy> = here.collect();
            here.sort_by_key(|other| other.object);
            let mut alive = self.store.metas(&here.iter().map(|other| other.object).collect::<Vec<_>>(), true)?;
            here.retain(|other| alive.remove(&other.object).is_some());
            // All that were listed may have gone meanwhile, in favour of one that was not.
            let Some(oldest) = here.first().map(|other| other.object) else { continue };
            for other in here.iter().skip(1) {
                self.drop_copy(other)?;
            }
            return Ok(if oldest == copy.object { Brought::Copied(oldest) } else { Brought::Here(oldest) });
        }
        Err(gone(copy.object))
    }

    /// Moves a dataset to this instance: its name points to a copy here, and the former object goes, with its copies
    /// elsewhere.
    ///
    /// # Errors
    /// As [`FileSystem::copy_here`]; `Stale` if the name gets another value meanwhile. Nothing has changed then.
    pub fn move_here(&self, named: &Named, progress: Progress) -> Result<Brought> {
        let _unit = self.unit();
        let here = self.store.instance()?.id;
        let living = self.living(named.object)?;
        let known = living.first().filter(|meta| meta.instance() == here).map(Meta::id);
        let copy = match known {
            Some(object) if object == named.object => return Ok(Brought::Here(object)),
            Some(copy) => copy,
            None => self.copy_one(&living, named.object, false, progress)?.1,
        };
        if let Err(error) = self.promote(&named.name, named.object, copy) {
            if known.is_none() {
                self.discard(copy, &error);
            }
            return Err(error);
        }
        Ok(Brought::Copied(copy))
    }

    /// Removes a copy that was to become a dataset and did not because of an error, unless it has become one under whatever
    /// name, or still may.
    pub fn discard(&self, copy: ObjectId, error: &Error) {
        match is_clear(error) {
            true => self.delete_unnamed(copy),
            false => self.leave_open([copy]),
        }
    }

    /// Lets a name point to a copy of its object, which then goes.
    ///
    /// # Errors
    /// `Stale` if the name points elsewhere by now; what the store answers. The copy is to be [discarded](Self::discard)
    /// then.
    pub fn promote(&self, name: &str, object: ObjectId, copy: ObjectId) -> Result<()> {
        let replaced = || Error::stale(format!("{name:?} has got another value meanwhile"));
        {
            let _naming = self.naming();
            // Somebody else may save the dataset, or move it elsewhere, at the same time.
            let saving = self.announce_move(name, copy)?;
            let put = self.object_of(name).and_then(|there| match there == Some(object) {
                true => self.put_name(name, copy),
                false => Err(replaced()),
            });
            if let Err(error) = put {
                if !is_clear(&error) {
                    self.leave_open([object]);
                }
                self.withdraw(saving);
                return Err(error);
            }
            // It is the dataset now, and no copy any more.
            let forgotten = self.copies(object).and_then(|copies| {
                let own = copies.iter().filter(|other| other.object == copy);
                own.map(Copy::name).try_for_each(|name| self.store.drop_name(&name))
            });
            if let Err(error) = forgotten {
                self.warn(format!("{name:?} is still listed as a copy, `vineyard-fs gc` ends that: {error}"));
            }
            self.settle_move(name, saving, object);
        }
        self.delete_unnamed(object);
        match self.object_of(name) {
            Ok(there) if there != Some(copy) => Err(replaced()),
            _ => Ok(()),
        }
    }
}

pub(super) fn gone(object: ObjectId) -> Error {
    Error::stale(format!("object {object} is gone"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::vineyard::fake::FakeStore;

    #[test]
    fn names_of_copies_are_read_back() {
        let copy = Copy { source: ObjectId(0x1234), instance: InstanceId(17), object: ObjectId(5) };
        assert_eq!(copy.name(), ".vineyard-fs/copies/o0000000000001234/i17/o0000000000000005");
        assert_eq!(Copy::parse(&copy.name(), ObjectId(6)), None);
        assert_eq!(Copy::parse(&copy.name(), ObjectId(5)), Some(copy));
        for wrong in
            ["x", ".vineyard-fs/copies/o1/i1/o0000000000000005", ".vineyard-fs/copies/o0000000000001234/i17", COPIES]
        {
            assert_eq!(Copy::parse(wrong, ObjectId(5)), None, "{wrong}");
        }
    }

    /// A store in which `x` has a copy of that signature, and has been lost itself.
    fn lost(signature: u64) -> (FileSystem, ObjectId) {
        let store = Arc::new(FakeStore::new(1 << 20));
        let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
        let scalar = |signature: u64| json!({"typename": "vineyard::Scalar<int64_t>", "value_": "41", "type_": "int", "signature": signature});
        let object = store.put_object("x", scalar(7)).unwrap();
        assert_eq!(fs.require("x").unwrap().summary.unwrap().signature, Some(7));
        let copy = store.put_object("temporary", scalar(signature)).unwrap();
        store.put_name(&Copy { source: object, instance: InstanceId(0), object: copy }.name(), copy).unwrap();
        store.delete(&[object]).unwrap();
        (fs, object)
    }

    #[test]
    fn only_a_copy_with_the_bytes_of_its_original_stands_for_it() {
        let (fs, object) = lost(7);
        assert_ne!(fs.nearest(object, View::Json, None).unwrap().0.meta.id(), object);
        let (fs, object) = lost(8);
        assert_eq!(fs.nearest(object, View::Json, None).unwrap_err().kind(), Kind::Stale);
    }

    #[test]
    fn a_copy_without_the_file_that_its_original_was_written_as_is_another_file() {
        let meta = |recipe: Option<&str>, signature: u64| {
            let mut tree = json!({"id": "o0000000000000001", "typename": "t", "signature": signature});
            if let Some(recipe) = recipe {
                tree[crate::dataset::recipe::RECIPE] = recipe.into();
            }
            Meta::new(tree).unwrap()
        };
        let recipe = |size: u64| format!("{{\"view\": \"parquet\", \"size\": {size}, \"extents\": [[-2, {size}]]}}");
        let written = meta(Some(&recipe(9)), 1);
        assert!(is_faithful(&written, &written) && is_faithful(&meta(None, 1), &meta(None, 1)));
        for other in [meta(None, 1), meta(Some("{\"view\": \"parquet\"}"), 1), meta(Some(&recipe(8)), 1)] {
            assert!(!is_faithful(&written, &other));
        }
        assert!(!is_faithful(&written, &meta(Some(&recipe(9)), 2)));
    }

    fn copies_of_x(store: &FakeStore, count: usize) -> (ObjectId, Vec<ObjectId>) {
        let scalar = json!({"typename": "vineyard::Scalar<int64_t>", "value_": "41", "type_": "int", "signature": 7});
        let object = store.put_object("x", scalar.clone()).unwrap();
        let made = store.create_objects(vec![scalar; count]).unwrap();
        made.iter().for_each(|made| store.persist(made.id).unwrap());
        (object, made.iter().map(|made| made.id).collect())
    }

    #[test]
    fn of_copies_that_are_made_at_the_same_time_one_stays() {
        for _ in 0..50 {
            let store = Arc::new(FakeStore::new(1 << 20));
            let (source, copies) = copies_of_x(&store, 3);
            let pin = &|object: &ObjectId| {
                let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
                fs.register(Copy { source, instance: InstanceId(0), object: *object }, source).unwrap()
            };
            let brought: Vec<Brought> = std::thread::scope(|scope| {
                let pins: Vec<_> = copies.iter().map(|object| scope.spawn(move || pin(object))).collect();
                pins.into_iter().map(|pin| pin.join().unwrap()).collect()
            });
            assert!(brought.iter().any(|brought| brought.object() == copies[0]), "the oldest stays: {brought:?}");
            let known = copies_of(&*store, &[source]).unwrap().remove(0);
            assert_eq!(known.iter().map(|copy| copy.object).collect::<Vec<_>>(), copies[..1]);
            assert_eq!(store.object_count(), 2);
        }
    }

    #[test]
    fn of_two_who_move_a_dataset_one_does() {
        for _ in 0..50 {
            let store = Arc::new(FakeStore::new(1 << 20));
            let (source, copies) = copies_of_x(&store, 3);
            let go = &|copy: ObjectId| {
                let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
                let moved = fs.promote("x", source, copy);
                if let Err(error) = &moved {
                    fs.discard(copy, error);
                }
                moved.is_ok()
            };
            let moved: Vec<bool> = std::thread::scope(|scope| {
                let all: Vec<_> = copies.iter().map(|copy| scope.spawn(move || go(*copy))).collect();
                all.into_iter().map(|one| one.join().unwrap()).collect()
            });
            assert!(moved.contains(&true));
            let all = NameQuery::Prefix { prefix: String::new(), limit: None };
            let names = store.names(&[all]).unwrap().remove(0);
            assert!(
                matches!(names.as_slice(), [(name, object)] if name == "x" && copies.contains(object)),
                "{names:?}"
            );
            assert_eq!(store.object_count(), 1);
        }
    }
}
