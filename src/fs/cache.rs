//! The image cache: assembled images in memory files that the kernel reads by itself.
//!
//! An assembled image is immutable and immune to what happens to its object afterwards. The cache keeps what was used
//! last, up to a limit; images that are open are never dropped.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::host::{Area, Host, MemoryFile};
use super::spare::Spare;
use crate::error::{Error, Kind, Result};
use crate::image::{self, Image, View};
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::vineyard::{BlobSource, ObjectId};

/// Most images: each costs two descriptors.
const MOST_IMAGES: usize = 4096;

/// An image in a memory file.
#[derive(Debug)]
pub struct Assembled {
    file: Arc<MemoryFile>,
    size: u64,
}

impl Assembled {
    /// Takes a memory file that holds exactly an image's bytes and that nobody writes to any more.
    pub fn adopt(file: Arc<MemoryFile>, size: u64) -> Self {
        Assembled { file, size }
    }

    /// The memory file.
    pub fn file(&self) -> &MemoryFile {
        &self.file
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

type Key = (ObjectId, View);

enum Slot {
    Building,
    Ready { image: Arc<Assembled>, used: u64 },
}

#[derive(Default)]
struct State {
    slots: HashMap<Key, Slot>,
    bytes: u64,
    clock: u64,
    hits: u64,
    misses: u64,
    evictions: u64,
    /// What names led to when they were opened last.
    opened: HashMap<String, ObjectId>,
}

/// Counters of the cache.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct CacheStatus {
    /// Bytes that are kept ready for the next image.
    pub spare: u64,
    /// Limit in bytes.
    pub limit: u64,
    /// Bytes of all images in the cache.
    pub bytes: u64,
    /// Number of images.
    pub images: usize,
    /// Opens that found their image.
    pub hits: u64,
    /// Opens that had to assemble.
    pub misses: u64,
    /// Images that were dropped for room.
    pub evictions: u64,
}

/// An image that is being made. Others wait for it: should that fail, or panic, its slot is free again.
struct Building<'a> {
    cache: &'a ImageCache,
    key: Key,
    size: u64,
    done: bool,
}

impl Building<'_> {
    fn ready(mut self, image: &Arc<Assembled>) {
        let mut state = self.cache.state();
        let used = state.clock;
        state.slots.insert(self.key, Slot::Ready { image: image.clone(), used });
        // What is made under this key from here on is somebody else's.
        self.done = true;
    }
}

impl Drop for Building<'_> {
    fn drop(&mut self) {
        if !self.done {
            let mut state = self.cache.state();
            state.slots.remove(&self.key);
            state.bytes -= self.size;
        }
        self.cache.changed.notify_all();
    }
}

/// Assembled images, by object and view.
pub struct ImageCache {
    limit: u64,
    host: Arc<dyn Host>,
    state: Mutex<State>,
    changed: Condvar,
    spare: Spare,
}

impl ImageCache {
    /// A cache of at most `limit` bytes.
    pub fn new(limit: u64, host: Arc<dyn Host>) -> Self {
        ImageCache { limit, host, state: Mutex::default(), changed: Condvar::new(), spare: Spare::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Limit in bytes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Counters.
    pub fn status(&self) -> CacheStatus {
        let state = self.state();
        CacheStatus {
            spare: self.spare.bytes(),
            limit: self.limit,
            bytes: state.bytes,
            images: state.slots.len(),
            hits: state.hits,
            misses: state.misses,
            evictions: state.evictions,
        }
    }

    /// The image if it is there.
    pub fn get(&self, object: ObjectId, view: View) -> Option<Arc<Assembled>> {
        let mut state = self.state();
        state.clock += 1;
        let now = state.clock;
        match state.slots.get_mut(&(object, view)) {
            Some(Slot::Ready { image, used }) => {
                *used = now;
                Some(image.clone())
            }
            _ => None,
        }
    }

    /// The assembled image, made if it is not there; however many ask, one makes it.
    ///
    /// # Errors
    /// `Full` if it does not fit the limit beside what is open, `Stale` if the object was deleted meanwhile.
    pub fn assemble(
        &self,
        object: ObjectId,
        view: View,
        image: &Image,
        source: &dyn BlobSource,
    ) -> Result<Arc<Assembled>> {
        let key = (object, view);
        let mut state = self.state();
        loop {
            state.clock += 1;
            let now = state.clock;
            match state.slots.get_mut(&key) {
                Some(Slot::Ready { image, used }) => {
                    *used = now;
                    let image = image.clone();
                    state.hits += 1;
                    return Ok(image);
                }
                Some(Slot::Building) => state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner()),
                None => break,
            }
        }
        state.misses += 1;
        self.make_room(&mut state, image.size())?;
        state.slots.insert(key, Slot::Building);
        state.bytes += image.size();
        drop(state);

        let building = Building { cache: self, key, size: image.size(), done: false };
        let assembled = Arc::new(self.build(image, source)?);
        super::adopt::note_image(&assembled.file, object, view, assembled.size);
        building.ready(&assembled);
        Ok(assembled)
    }

    fn build(&self, image: &Image, source: &dyn BlobSource) -> Result<Assembled> {
        let blobs = image.blobs(0..image.size());
        source.prepare(&blobs)?;
        source.want(&image.parts(0..image.size()), false)?;
        let file = Arc::new(self.spare.file(&self.host, image.size())?);
        let assembled = Assembled { file, size: image.size() };
        let threads = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(1, 4));
        image::assemble(image, source, &assembled.file.file, threads)?;
        // Only now is it sure that what was copied was this object's.
        source.verify(&blobs)?;
        Ok(assembled)
    }

    /// Puts an image that exists already into the cache: a file that was just written.
    pub fn insert(&self, object: ObjectId, view: View, assembled: Arc<Assembled>) {
        let mut state = self.state();
        let size = assembled.size();
        if self.make_room(&mut state, size).is_ok() && !state.slots.contains_key(&(object, view)) {
            state.clock += 1;
            let used = state.clock;
            state.bytes += size;
            state.slots.insert((object, view), Slot::Ready { image: assembled, used });
        }
    }

    /// Hands the images of an object on to an equal one.
    pub fn rename(&self, from: ObjectId, to: ObjectId) {
        let mut state = self.state();
        let views: Vec<View> = state.slots.keys().filter(|(id, _)| *id == from).map(|(_, view)| *view).collect();
        for view in views {
            if matches!(state.slots.get(&(from, view)), Some(Slot::Ready { .. }))
                && let Some(slot) = state.slots.remove(&(from, view))
            {
                if let Slot::Ready { image, .. } = &slot
                    && image.file.area() == Area::Image
                {
                    super::adopt::note_image(&image.file, to, view, image.size());
                }
                state.slots.insert((to, view), slot);
            }
        }
    }

    /// Drops the images of an object; open handles keep theirs.
    pub fn forget(&self, object: ObjectId) {
        let mut state = self.state();
        let keys: Vec<Key> = state.slots.keys().copied().filter(|(id, _)| *id == object).collect();
        for key in keys {
            remove(&mut state, &key);
        }
    }

    /// A name was opened that leads to `object`. The images of what it led to before go: other clients replace and delete
    /// objects without a word. Should another name lead there, they are made anew. Returns what it led to before.
    pub fn opened(&self, name: &str, object: ObjectId) -> Option<ObjectId> {
        let former = {
            let mut state = self.state();
            if state.opened.len() > 2 * MOST_IMAGES {
                state.opened.clear();
            }
            state.opened.insert(name.to_owned(), object)
        };
        let former = former.filter(|former| *former != object)?;
        self.forget(former);
        Some(former)
    }

    /// Keeps a memory file ready for the next image while images are being assembled. For a thread that has nothing else
    /// to do, several times a second. `tidy` may drop images that are of no use, should there be no room.
    pub fn keep_spare(&self, tidy: impl FnOnce()) {
        let room = || self.limit.saturating_sub(self.state().bytes);
        self.spare.look_after(&self.host, |wanted| {
            room() >= wanted || {
                tidy();
                room() >= wanted
            }
        });
    }

    /// Drops the images of all other objects; open handles keep theirs.
    pub fn keep_only(&self, objects: &HashSet<ObjectId>) {
        let mut state = self.state();
        let others = |(key, slot): (&Key, &Slot)| match slot {
            Slot::Ready { .. } if !objects.contains(&key.0) => Some(*key),
            _ => None,
        };
        let others: Vec<Key> = state.slots.iter().filter_map(others).collect();
        others.iter().for_each(|key| remove(&mut state, key));
    }

    /// Drops everything that is not being made.
    pub fn clear(&self) {
        let mut state = self.state();
        let keys: Vec<Key> = state.slots.keys().copied().collect();
        for key in keys {
            remove(&mut state, &key);
        }
    }

    /// Drops images that were written into the staging area until at most `limit` bytes of it are in the cache.
    pub fn shrink_staged(&self, limit: u64) {
        let mut state = self.state();
        let mut staged: Vec<(u64, Key, u64)> = state
            .slots
            .iter()
            .filter_map(|(key, slot)| match slot {
                Slot::Ready { image, used } if image.file.area() == Area::Staging => Some((*used, *key, image.size())),
                _ => None,
            })
            .collect();
        staged.sort_unstable();
        let mut bytes: u64 = staged.iter().map(|(_, _, size)| size).sum();
        for (_, key, size) in staged {
            if bytes <= limit {
                break;
            }
            remove(&mut state, &key);
            state.evictions += 1;
            bytes -= size;
        }
    }

    /// Drops what was used longest ago and is not open until `size` more bytes fit.
    fn make_room(&self, state: &mut State, size: u64) -> Result<()> {
        self.spare.make_room(size, self.limit.saturating_sub(state.bytes));
        while state.bytes + size > self.limit || state.slots.len() >= MOST_IMAGES {
            let oldest = state
                .slots
                .iter()
                .filter_map(|(key, slot)| match slot {
                    Slot::Ready { image, used } if Arc::strong_count(image) == 1 => Some((*used, *key)),
                    _ => None,
                })
                .min();
            let Some((_, key)) = oldest else {
                if state.bytes + size <= self.limit {
                    // All of them are open: the limit of descriptors decides then.
                    return Ok(());
                }
                return Err(Error::new(
                    Kind::Full,
                    format!("an image of {size} bytes does not fit the image cache (--cache-size {})", self.limit),
                ));
            };
            remove(state, &key);
            state.evictions += 1;
        }
        Ok(())
    }
}

fn remove(state: &mut State, key: &Key) {
    if let Some(Slot::Ready { image, .. }) = state.slots.get(key) {
        let size = image.size();
        state.slots.remove(key);
        state.bytes -= size;
    }
}

#[cfg(all(test, feature = "shuttle"))]
#[allow(clippy::unwrap_used)]
mod schedules {
    use super::super::direct::Unmounted;
    use super::*;
    use crate::image::testing::Memory;
    use crate::sync::{schedules::check, thread};

    #[test]
    fn one_makes_what_many_want_and_the_bytes_add_up() {
        check(|| {
            let memory = Memory::default();
            let images: Vec<Arc<Image>> = (1..4)
                .map(|n| {
                    let mut file = image::extent::Builder::new();
                    file.span(memory.add(&vec![n; 1000 * usize::from(n)]));
                    Arc::new(file.finish())
                })
                .collect();
            // Two of the three fit.
            let cache = Arc::new(ImageCache::new(5500, Arc::new(Unmounted::default())));
            let memory = Arc::new(memory);
            let threads: Vec<_> = (0..4usize)
                .map(|thread| {
                    let (cache, images, memory) = (cache.clone(), images.clone(), memory.clone());
                    thread::spawn(move || {
                        for round in 0..2 {
                            let which = (thread + round) % 3;
                            let object = ObjectId(which as u64 + 1);
                            match cache.assemble(object, View::Arrow, &images[which], &*memory) {
                                Ok(made) => assert_eq!(made.size(), images[which].size()),
                                Err(error) => assert_eq!(error.kind(), Kind::Full),
                            }
                            if thread == 3 {
                                cache.forget(object);
                            }
                        }
                    })
                })
                .collect();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            let state = cache.state();
            assert_eq!(state.hits + state.misses, 8);
            let sizes = state.slots.values().map(|slot| match slot {
                Slot::Ready { image, .. } => image.size(),
                Slot::Building => panic!("nobody makes it any more"),
            });
            assert_eq!(sizes.sum::<u64>(), state.bytes);
            assert!(state.bytes <= 5500);
        });
    }
}
