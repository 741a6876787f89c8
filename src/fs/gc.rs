//! What names and objects have outlived, and removing it.
//!
//! A name is dangling if its object provably does not exist: no instance has metadata of it, or the instance that had
//! its data is in the cluster no more (a vineyardd that starts again is a new instance). An instance that does not
//! answer proves nothing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::copies::{COPY_OF, Copy, HIDDEN};
use super::{FileSystem, saves};
use crate::error::Result;
use crate::vineyard::store::{InstanceInfo, NameQuery, NamedObject};
use crate::vineyard::{InstanceId, Meta, ObjectId};

/// How long after an object was made its save may take.
const SAVING: Duration = Duration::from_secs(600);
/// A save that looks unfinished is looked at again after this time: ids tell the time by the clock of the machine that made
/// them, which may be set wrong, or have been set since. Longer than a save is announced unless its writer hangs.
const SECOND_LOOK: Duration = if cfg!(test) { Duration::from_secs(3) } else { Duration::from_secs(10) };
/// Most objects that are looked through for copies that nothing leads to.
const MOST_OBJECTS: u64 = 50_000;
/// Objects that are asked for with one call.
const BATCH: usize = 512;

/// What is known of an object's existence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// There is metadata, of an instance that is in the cluster.
    Lives(InstanceId),
    /// No instance has metadata of it.
    Gone,
    /// Its data was on this instance, which is gone.
    InstanceGone(InstanceId),
}

impl Life {
    /// True if nobody will ever read it again.
    pub fn is_over(self) -> bool {
        !matches!(self, Life::Lives(_))
    }
}

impl std::fmt::Display for Life {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Life::Lives(instance) => write!(f, "its data is on instance {instance}"),
            Life::Gone => f.write_str("it was deleted"),
            Life::InstanceGone(instance) => write!(f, "it was on instance {instance}, which is gone"),
        }
    }
}

/// Something to be cleaned up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// A name of an object that does not exist; the name is removed.
    Dangling {
        /// The name.
        name: String,
        /// The object.
        object: ObjectId,
        /// Why it does not exist.
        life: Life,
    },
    /// The same, but a copy of the object lives on: the name is to point to that.
    Orphaned {
        /// The name.
        name: String,
        /// The object.
        object: ObjectId,
        /// The copy.
        copy: Copy,
    },
    /// A copy of an object that no name points to any more; it is removed.
    Needless(Copy),
    /// A save that was announced long ago by somebody who has not finished it; its object is removed, unless the name
    /// was put.
    Unfinished {
        /// What announces it.
        name: String,
        /// The object.
        object: ObjectId,
        /// It is a dataset.
        used: bool,
    },
    /// A copy that does not exist any more, or is a dataset now; what it was found by is removed.
    Lost(Copy),
    /// A copy that somebody made who was killed before it could be found; it is removed.
    Unknown(Copy),
}

impl FileSystem {
    /// Whether objects exist.
    ///
    /// # Errors
    /// What the store answers.
    pub fn lives(&self, ids: &[ObjectId]) -> Result<HashMap<ObjectId, Life>> {
        let here = self.store.instance()?.id;
        let mut lives = HashMap::with_capacity(ids.len());
        for (number, batch) in ids.chunks(BATCH).enumerate() {
            let metas = self.store.metas(batch, number == 0)?;
            // Asked after the metadata: an instance is listed before it has objects.
            let cluster = self.store.cluster()?;
            for &id in batch {
                let instance = match metas.get(&id) {
                    None => {
                        lives.insert(id, Life::Gone);
                        continue;
                    }
                    Some(Ok(meta)) => meta.instance(),
                    // There is something, whatever it is.
                    Some(Err(_)) => InstanceId::UNSPECIFIED,
                };
                lives.insert(id, life(instance, here, &cluster));
            }
        }
        Ok(lives)
    }

    /// Finds what is to be cleaned up in the whole store.
    ///
    /// # Errors
    /// What the store answers.
    pub fn find_garbage(&self) -> Result<Vec<Finding>> {
        let all = NameQuery::Prefix { prefix: String::new(), limit: None };
        let names = self.store.names(&[all])?.pop().unwrap_or_default();
        let mut ids: Vec<ObjectId> = names.iter().map(|(_, id)| *id).collect();
        ids.sort_unstable();
        ids.dedup();
        let lives = self.lives(&ids)?;
        let over = |id: &ObjectId| lives.get(id).is_some_and(|life| life.is_over());
        let (hidden, datasets): (Vec<_>, Vec<_>) = names.into_iter().partition(|(name, _)| name.starts_with(HIDDEN));
        let named: HashSet<ObjectId> = datasets.iter().map(|(_, id)| *id).collect();
        let mut copies: HashMap<ObjectId, Vec<Copy>> = HashMap::new();
        let mut findings = Vec::new();
        for copy in hidden.iter().filter_map(|(name, id)| Copy::parse(name, *id)) {
            // A copy that has a name of its own is a dataset by now.
            match (over(&copy.object) || named.contains(&copy.object), named.contains(&copy.source)) {
                (true, _) => findings.push(Finding::Lost(copy)),
                (false, false) => findings.push(Finding::Needless(copy)),
                (false, true) => copies.entry(copy.source).or_default().push(copy),
            }
        }
        let saves = hidden.into_iter().filter(|(name, _)| name.starts_with(&saves::prefix()));
        let saves = saves.filter(|(_, object)| is_old(*object)).collect();
        // vineyardd may have too many objects to list them.
        let unknown = self.unknown_copies(&ids).unwrap_or_else(|error| {
            self.warn(format!("copies that nothing leads to were not looked for: {error}"));
            Vec::new()
        });
        let (saves, unknown) = self.still_unfinished(saves, unknown)?;
        for (name, object) in saves {
            findings.push(Finding::Unfinished { name, object, used: named.contains(&object) });
        }
        findings.extend(unknown.into_iter().map(Finding::Unknown));
        for (name, object) in datasets {
            let Some(life) = lives.get(&object).copied().filter(|life| life.is_over()) else { continue };
            findings.push(match copies.get(&object).and_then(|copies| copies.first()) {
                Some(copy) => Finding::Orphaned { name, object, copy: copy.clone() },
                None => Finding::Dangling { name, object, life },
            });
        }
        Ok(findings)
    }

    /// Copies of living objects that were made long ago and that no name and no other object leads to. What was named
    /// once is none of them: an object without a name may be one that an open file still reads, but the original of a copy
    /// that became a dataset is gone.
    fn unknown_copies(&self, named: &[ObjectId]) -> Result<Vec<Copy>> {
        if !self.is_shared()? {
            return Ok(Vec::new());
        }
        let objects = self.store.objects(MOST_OBJECTS)?;
        if objects.len() as u64 >= MOST_OBJECTS {
            self.warn(format!("copies that nothing leads to were looked for among {MOST_OBJECTS} objects of more"));
        }
        let there: HashSet<ObjectId> = objects.iter().map(Meta::id).collect();
        let members: HashSet<ObjectId> = objects.iter().flat_map(members).collect();
        let copy = |meta: &Meta| {
            let source = meta.get(COPY_OF)?.as_str()?.parse().ok()?;
            Some(Copy { source, instance: meta.instance(), object: meta.id() })
        };
        let is_unknown = |copy: &Copy| {
            let is_reached = named.binary_search(&copy.object).is_ok() || members.contains(&copy.object);
            is_old(copy.object) && there.contains(&copy.source) && !is_reached
        };
        Ok(objects.iter().filter_map(copy).filter(is_unknown).collect())
    }

    /// Those of announced saves that are announced a while later, too, and those copies that have no name then.
    fn still_unfinished(&self, saves: Vec<NamedObject>, copies: Vec<Copy>) -> Result<(Vec<NamedObject>, Vec<Copy>)> {
        if saves.is_empty() && copies.is_empty() {
            return Ok((saves, copies));
        }
        std::thread::sleep(SECOND_LOOK);
        let all = NameQuery::Prefix { prefix: String::new(), limit: None };
        let now = self.store.names(&[all])?.pop().unwrap_or_default();
        let is_named = |copy: &Copy| now.iter().any(|(_, object)| *object == copy.object);
        Ok((
            saves.into_iter().filter(|save| now.contains(save)).collect(),
            copies.into_iter().filter(|copy| !is_named(copy)).collect(),
        ))
    }

    /// How many announced saves are so young that nobody can tell whether they are under way.
    ///
    /// # Errors
    /// What the store answers.
    pub fn young_saves(&self) -> Result<usize> {
        let saves = self.names_below(&saves::prefix())?;
        Ok(saves.iter().filter(|(name, object)| !saves::is_mark(name) && !is_old(*object)).count())
    }

    /// Cleans one finding up. False if it is none any more.
    ///
    /// # Errors
    /// What the store answers.
    pub fn clean(&self, finding: &Finding) -> Result<bool> {
        match finding {
            Finding::Dangling { name, object, .. } => {
                let _naming = self.naming();
                let still = self.object_of(name)? == Some(*object);
                if still {
                    self.store.drop_name(name)?;
                }
                Ok(still)
            }
            Finding::Orphaned { name, object, copy } => {
                let still = self.object_of(name)? == Some(*object);
                if still {
                    self.promote(name, *object, copy.object)?;
                }
                Ok(still)
            }
            Finding::Unfinished { name, object, used } => {
                let still = self.object_of(name)? == Some(*object);
                if still {
                    self.store.drop_name(name)?;
                    if !used {
                        self.delete_unnamed(*object);
                    }
                }
                Ok(still)
            }
            Finding::Unknown(copy) => {
                let _naming = self.naming();
                let all = NameQuery::Prefix { prefix: String::new(), limit: None };
                let still = !self.store.names(&[all])?.into_iter().flatten().any(|(_, object)| object == copy.object);
                if still {
                    self.store.delete(&[copy.object])?;
                }
                Ok(still)
            }
            Finding::Needless(copy) | Finding::Lost(copy) => {
                let still = self.object_of(&copy.name())? == Some(copy.object);
                match finding {
                    _ if !still => {}
                    Finding::Lost(_) => self.store.drop_name(&copy.name())?,
                    _ => self.drop_copy(copy)?,
                }
                Ok(still)
            }
        }
    }
}

/// All objects below an object.
fn members(meta: &Meta) -> Vec<ObjectId> {
    let trees = meta.iter().filter_map(|(key, value)| value.as_object().and_then(|_| meta.member(key).ok()));
    trees.flat_map(|member| [vec![member.id()], members(&member)].concat()).collect()
}

/// True for objects that were made so long ago that nobody is still about to name them.
fn is_old(object: ObjectId) -> bool {
    // The upper bits of an id are the time of its making (`GenerateObjectID`, `src/common/util/uuid.h` of v6d 0.24).
    let made = UNIX_EPOCH + Duration::from_millis((object.0 & !(1 << 63)) >> 22);
    SystemTime::now().duration_since(made).is_ok_and(|age| age > SAVING)
}

fn life(instance: InstanceId, here: InstanceId, cluster: &BTreeMap<InstanceId, InstanceInfo>) -> Life {
    let known = instance == InstanceId::UNSPECIFIED || instance == here || cluster.contains_key(&instance);
    // A list without ourselves is not one of the cluster.
    if known || !cluster.contains_key(&here) { Life::Lives(instance) } else { Life::InstanceGone(instance) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::vineyard::Store;
    use crate::vineyard::fake::{FakeStore, Op};

    #[test]
    fn only_what_is_provably_dead_is_found() {
        let store = Arc::new(FakeStore::new(1 << 20));
        let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
        let scalar = || json!({"typename": "vineyard::Scalar<int64_t>", "value_": "41", "type_": "int"});
        let alive = store.put_object("alive", scalar()).unwrap();
        let dead = store.put_object("dead", scalar()).unwrap();
        let copied = store.put_object("copied", scalar()).unwrap();
        let copy = store.put_object("temporary", scalar()).unwrap();
        store.drop_name("temporary").unwrap();
        let copy = Copy { source: copied, instance: InstanceId(0), object: copy };
        store.put_name(&copy.name(), copy.object).unwrap();
        let unnamed = store.put_object("temporary", scalar()).unwrap();
        store.drop_name("temporary").unwrap();
        let needless = Copy { source: ObjectId(77), instance: InstanceId(0), object: unnamed };
        store.put_name(&needless.name(), unnamed).unwrap();
        let promoted = Copy { source: ObjectId(78), instance: InstanceId(0), object: alive };
        store.put_name(&promoted.name(), alive).unwrap();
        let lost = Copy { source: alive, instance: InstanceId(3), object: dead };
        store.put_name(&lost.name(), dead).unwrap();
        let unfinished = store.put_object(".vineyard-fs/saves/1/x", scalar()).unwrap();
        assert!(is_old(unfinished), "ids of the fake tell no time");
        store.delete(&[dead, copied]).unwrap();
        let found = fs.find_garbage().unwrap();
        assert_eq!(found.len(), 6, "{found:?}");
        assert!(found.contains(&Finding::Dangling { name: "dead".into(), object: dead, life: Life::Gone }));
        assert!(found.contains(&Finding::Orphaned { name: "copied".into(), object: copied, copy: copy.clone() }));
        assert!(found.contains(&Finding::Needless(needless)) && found.contains(&Finding::Lost(lost)));
        assert!(found.contains(&Finding::Lost(promoted)), "what is a dataset is not removed");
        store.put_name("dead", alive).unwrap();
        let cleaned: Vec<bool> = found.iter().map(|finding| fs.clean(finding).unwrap()).collect();
        assert_eq!(cleaned.iter().filter(|done| !**done).count(), 1, "a name with a new value stays");
        assert_eq!(fs.object_of("copied").unwrap(), Some(copy.object));
        assert_eq!(fs.object_of("dead").unwrap(), Some(alive));
        assert!(fs.find_garbage().unwrap().is_empty());
        assert_eq!(store.object_count(), 2);
    }

    #[test]
    fn a_copy_that_nothing_leads_to_is_found_as_long_as_its_original_lives() {
        let store = Arc::new(FakeStore::new(1 << 20));
        let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
        let scalar = || json!({"typename": "vineyard::Scalar<int64_t>", "value_": "41", "type_": "int"});
        let original = store.put_object("x", scalar()).unwrap();
        let copy_of = |source: ObjectId| {
            let mut content = scalar();
            content[COPY_OF] = source.to_string().into();
            let object = store.create_objects(vec![content]).unwrap()[0].id;
            store.persist(object).unwrap();
            Copy { source, instance: InstanceId(0), object }
        };
        let [left, known, member, replaced] = [original, original, original, ObjectId(77)].map(copy_of);
        store.put_name(&known.name(), known.object).unwrap();
        let parent = json!({"typename": "t", "x_": {"id": member.object.to_string()}});
        store.put_object("parent", parent).unwrap();
        let found = fs.find_garbage().unwrap();
        assert_eq!(found, [Finding::Unknown(left.clone())]);
        // Somebody names it in the last moment.
        store.put_name(&left.name(), left.object).unwrap();
        assert!(!fs.clean(&found[0]).unwrap());
        store.drop_name(&left.name()).unwrap();
        assert!(fs.clean(&found[0]).unwrap());
        let left: Vec<ObjectId> = store.objects(9).unwrap().iter().map(Meta::id).collect();
        assert!([original, known.object, member.object, replaced.object].iter().all(|id| left.contains(id)));
        assert_eq!((left.len(), fs.find_garbage().unwrap()), (5, vec![]));
    }

    #[test]
    fn a_save_that_only_looks_old_is_left_to_its_writer() {
        let store = Arc::new(FakeStore::new(1 << 20));
        let scalar = json!({"typename": "vineyard::Scalar<int64_t>", "value_": "41", "type_": "int"});
        let made = store.put_object(".vineyard-fs/saves/1/x", scalar).unwrap();
        let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
        std::thread::scope(|scope| {
            let looked = store.calls(Op::Names);
            let looking = scope.spawn(|| fs.find_garbage().unwrap());
            while store.calls(Op::Names) == looked {
                std::thread::yield_now();
            }
            store.put_name("x", made).unwrap();
            store.drop_name(".vineyard-fs/saves/1/x").unwrap();
            assert_eq!(looking.join().unwrap(), []);
        });
        let late = Finding::Unfinished { name: ".vineyard-fs/saves/1/x".into(), object: made, used: false };
        assert!(!fs.clean(&late).unwrap() && store.object_count() == 1);
    }

    #[test]
    fn an_instance_is_gone_only_if_a_list_with_ourselves_lacks_it() {
        let info = || InstanceInfo {
            hostname: String::new(),
            rpc_endpoint: String::new(),
            ipc_socket: String::new(),
            shared: true,
        };
        let (here, there) = (InstanceId(1), InstanceId(2));
        let both = BTreeMap::from([(here, info()), (there, info())]);
        assert_eq!(life(there, here, &both), Life::Lives(there));
        assert_eq!(life(there, here, &BTreeMap::from([(here, info())])), Life::InstanceGone(there));
        assert_eq!(life(there, here, &BTreeMap::new()), Life::Lives(there));
        assert!(!life(InstanceId::UNSPECIFIED, here, &both).is_over());
    }
}
