//! What is known of objects: a small summary of each that was listed, and whole objects while they are in use.
//!
//! An object never changes, so nothing here goes out of date; it only becomes useless when the object is deleted, and
//! everything is dropped when vineyardd restarts ([`Objects::clear`]).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::copies::{Copy, copies_of, is_faithful};
use super::deferred::{self, Deferred};
use super::summaries::Summaries;
use crate::dataset::publish::Outcome;
use crate::dataset::recipe::{Recipe, Written, written_as};
use crate::dataset::{self, Dataset, FileAttributes};
use crate::error::{Error, Kind, Result};
use crate::image::{self, Counts, Image, View};
use crate::sync::{Mutex, MutexGuard, OnceLock};
use crate::vineyard::{Blob, BlobKey, BlobSource, InstanceId, Meta, ObjectId, Store};

/// Whole objects that are kept although nobody has them open. A ten-column frame takes about 20 kB.
const LOADED_KEPT: usize = 256;
/// Objects whose metadata is fetched with one call, so that a listing can stop in between.
const BATCH: usize = 256;
/// Saved objects whose kind is remembered (about 24 bytes each).
const SAVED_KEPT: usize = 1 << 16;

/// For how long an image is kept that was made to know its size.
const SIZED_KEPT: Duration = Duration::from_secs(10);

/// What a listing needs of an object, and no more: there may be 100,000 of them.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The object.
    pub id: ObjectId,
    /// Where its data lives.
    pub instance: InstanceId,
    /// Equal for all copies.
    pub signature: Option<u64>,
    /// Its type, such as `vineyard::DataFrame`.
    pub typename: Arc<str>,
    /// Creation time.
    pub created: SystemTime,
    /// Number of rows of tables.
    pub rows: Option<u64>,
    /// The view that a listing shows.
    pub listed: View,
    /// Sizes of the views that exist; `None` where the size is known only after encoding.
    pub sizes: Box<[(View, Option<u64>)]>,
    /// Why no view exists, if the object cannot be shown.
    pub broken: Option<Arc<str>>,
    /// Owner, mode and times of a file that was written through a mount.
    pub attributes: Option<Arc<FileAttributes>>,
}

impl Summary {
    /// Whether a view exists, and its size if that is known.
    pub fn view(&self, view: View) -> Option<Option<u64>> {
        self.sizes.iter().find(|(v, _)| *v == view).map(|(_, size)| *size)
    }

    /// Number of the instance where the data lives, for people; those of its parts are several.
    pub fn instance_text(&self) -> String {
        match self.instance {
            InstanceId::UNSPECIFIED => "several".into(),
            InstanceId(number) => number.to_string(),
        }
    }

    pub(super) fn broken(id: ObjectId, meta: Option<&Meta>, error: &Error) -> Summary {
        Summary {
            id,
            instance: meta.map_or(InstanceId::UNSPECIFIED, Meta::instance),
            signature: meta.and_then(Meta::signature),
            typename: meta.map_or("", Meta::typename).into(),
            created: created(meta),
            rows: None,
            listed: View::Raw,
            sizes: Box::new([(View::Raw, Some(0))]),
            broken: Some(error.to_string().into()),
            attributes: None,
        }
    }
}

fn created(meta: Option<&Meta>) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(meta.and_then(Meta::timestamp_ms).unwrap_or(0).min(1 << 53))
}

/// A whole object: metadata, meaning, and the images that were made of it.
#[derive(Debug)]
pub struct Loaded {
    /// The metadata.
    pub meta: Meta,
    /// The meaning.
    pub dataset: Dataset,
    /// The file that it was written as.
    pub recipe: Option<Recipe>,
    images: Mutex<HashMap<View, Arc<OnceLock<Arc<Image>>>>>,
    checked: OnceLock<()>,
    /// What is to be done before data of other instances is served; `None` if all data is here.
    remote: Option<Deferred>,
}

impl Loaded {
    /// The image of a view, ready to be served: null counts are counted, every extent lies inside its blob, offsets and
    /// text are valid. Made once, however many ask at the same time.
    ///
    /// Of data on other instances only what the image is made of is brought here; offsets and text are checked when
    /// they are, by [`Loaded::admit`].
    ///
    /// # Errors
    /// `Malformed` with the object and the reason; `Stale` if a blob is gone; `Unreachable` and `Remote` if data of
    /// another instance can't be had.
    pub fn image(&self, view: View, source: &dyn BlobSource) -> Result<Arc<Image>> {
        let cell = self.images.lock().unwrap_or_else(|e| e.into_inner()).entry(view).or_default().clone();
        if let Some(image) = cell.get() {
            return Ok(image.clone());
        }
        let blobs = self.meta.blobs();
        let allowed: Vec<_> = blobs.iter().map(|key| (*key, 0..0)).collect();
        source.want(&allowed, false)?;
        source.prepare(&blobs)?;
        if self.checked.get().is_none() {
            self.dataset.validate(source).map_err(|e| self.wrap(e))?;
            if self.remote.is_none() {
                self.dataset.check(source).map_err(|e| self.wrap(e))?;
            }
            let _ = self.checked.set(());
        }
        let written = self.recipe.as_ref().filter(|recipe| view_of(recipe.view) == view);
        let image = match written {
            Some(recipe) => Ok(written_image(recipe)),
            None => {
                if self.remote.is_some() {
                    match view {
                        // Its strings are encoded, by offsets that must be right.
                        View::Parquet => self.admit(&blobs, source)?,
                        _ => source.want(&deferred::counted(&self.dataset), false)?,
                    }
                }
                image::build(&self.dataset, view, Counts::From(source))
            }
        };
        let image = image.map_err(|e| self.wrap(e))?;
        image.validate(source).map_err(|e| self.wrap(e))?;
        // Data was looked at (null counts, offsets, encoded columns): it must still have been this object's.
        source.verify(&blobs)?;
        Ok(cell.get_or_init(|| Arc::new(image)).clone())
    }

    /// Drops the image of a view that nobody uses: what was encoded for it lies in memory of this process.
    fn drop_image(&self, view: View) {
        let mut images = self.images.lock().unwrap_or_else(|e| e.into_inner());
        if images.get(&view).and_then(|cell| cell.get()).is_some_and(|image| Arc::strong_count(image) == 1) {
            images.remove(&view);
        }
    }

    /// True if some of the data lives on other instances.
    pub fn is_remote(&self) -> bool {
        self.remote.is_some()
    }

    /// Before bytes of these blobs are served: checks the columns that they belong to, as far as that was not done.
    ///
    /// # Errors
    /// As [`Loaded::image`].
    pub fn admit(&self, blobs: &[BlobKey], source: &dyn BlobSource) -> Result<()> {
        match &self.remote {
            Some(deferred) => deferred.check(blobs, &self.dataset, source).map_err(|e| self.wrap(e)),
            None => Ok(()),
        }
    }

    fn wrap(&self, error: Error) -> Error {
        Error::new(error.kind(), format!("object {} ({})", self.meta.id(), self.meta.typename())).with_source(error)
    }
}

#[derive(Default)]
struct Known {
    summaries: Summaries,
    loaded: HashMap<ObjectId, (Arc<Loaded>, u64)>,
    /// What this mount has saved, of objects that were not looked at again yet.
    saved: HashMap<ObjectId, Outcome>,
    clock: u64,
}

/// The table of objects.
#[derive(Default)]
pub struct Objects {
    known: Mutex<Known>,
    /// The listed view of tables that were not saved as files.
    tables: View,
    /// Whose image was made last to know its size, and when.
    sized: Mutex<Option<(Arc<Loaded>, View, Instant)>>,
}

impl Objects {
    /// An empty table. Listings show tables that were not saved as files as this view, where they have it.
    pub fn new(tables: View) -> Self {
        Objects { tables, ..Objects::default() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Forgets everything: another vineyardd answers now.
    pub fn clear(&self) {
        *self.known() = Known::default();
    }

    /// Drops what is known of a deleted object.
    pub fn forget(&self, id: ObjectId) {
        let mut known = self.known();
        known.summaries.remove(id);
        known.loaded.remove(&id);
        known.saved.remove(&id);
    }

    /// Notes what a new object is.
    pub fn saved(&self, id: ObjectId, outcome: Outcome) {
        let mut known = self.known();
        if known.saved.len() >= SAVED_KEPT {
            known.saved.clear();
        }
        known.saved.insert(id, outcome);
    }

    /// Whether an object is surely one that has this view, because this mount has saved it. Tells without a question to
    /// the store what a summary would.
    pub fn is_saved_as(&self, id: ObjectId, view: View) -> bool {
        matches!(
            (self.known().saved.get(&id), view),
            (Some(Outcome::Frame | Outcome::Table), View::Arrow | View::Feather)
                | (Some(Outcome::Tensor), View::Npy)
                | (Some(Outcome::Pickle), View::Pickle)
        )
    }

    /// Number of summaries and of whole objects.
    pub fn counts(&self) -> (usize, usize) {
        let known = self.known();
        (known.summaries.len(), known.loaded.len())
    }

    /// The summary of an object, if it was made before.
    pub fn known_summary(&self, id: ObjectId) -> Option<Arc<Summary>> {
        self.known().summaries.get(id).cloned()
    }

    /// The summaries of these objects that are known.
    pub fn known_summaries(&self, ids: &[ObjectId]) -> HashMap<ObjectId, Arc<Summary>> {
        let mut known = self.known();
        ids.iter().filter_map(|id| Some((*id, known.summaries.get(*id)?.clone()))).collect()
    }

    /// The summary of one object; `None` if the object does not exist.
    pub fn summary(&self, store: &dyn Store, id: ObjectId) -> Result<Option<Arc<Summary>>> {
        loop {
            if let Some(summary) = self.known_summary(id) {
                return Ok(Some(summary));
            }
            match self.learn(store, &[id])? {
                (_, Some(error)) => return Err(error),
                (missing, None) if missing.contains(&id) => return Ok(None),
                // It may be forgotten again by now, as one that was replaced.
                (_, None) => {}
            }
        }
    }

    /// Makes summaries of all of these objects that have none, in batches, until `deadline`. Returns those that do not
    /// exist.
    pub fn summarize(&self, store: &dyn Store, ids: &[ObjectId], deadline: Option<Instant>) -> Result<Vec<ObjectId>> {
        let unknown: Vec<ObjectId> = {
            let mut known = self.known();
            let mut unknown: Vec<_> = ids.iter().copied().filter(|id| known.summaries.get(*id).is_none()).collect();
            unknown.sort_unstable();
            unknown.dedup();
            unknown
        };
        let mut missing = Vec::new();
        for batch in unknown.chunks(BATCH) {
            if deadline.is_some_and(|d| Instant::now() >= d) {
                break;
            }
            missing.extend(self.learn(store, batch)?.0);
        }
        Ok(missing)
    }

    /// Makes summaries. Returns the objects that do not exist, and the last reason for which one that does has no
    /// summary now and may have one later: it lives on an instance that cannot be asked. Such an object keeps no other
    /// from being listed.
    fn learn(&self, store: &dyn Store, ids: &[ObjectId]) -> Result<(Vec<ObjectId>, Option<Error>)> {
        // A name whose object was put by another instance may be ahead of this instance's metadata: ask again, synced.
        let mut metas = store.metas(ids, false)?;
        let absent: Vec<ObjectId> = ids.iter().copied().filter(|id| !metas.contains_key(id)).collect();
        if !absent.is_empty() {
            metas.extend(store.metas(&absent, true)?);
        }
        // First with sizes unknown, so that one request asks for all that matter; then those again, with sizes.
        let recorder = Recorder { inner: store, wanted: Mutex::default() };
        let mut summaries = HashMap::with_capacity(metas.len());
        let mut again = Vec::new();
        let mut wanted = Vec::new();
        for (&id, meta) in &metas {
            let meta = match meta {
                Ok(meta) => meta,
                Err(error) => {
                    tracing::warn!(object = %id, "cannot be shown: {error}");
                    summaries.insert(id, Summary::broken(id, None, error));
                    continue;
                }
            };
            let summary = summarize(meta, &recorder, self.tables);
            let sizes = recorder.take();
            if sizes.is_empty() {
                summaries.insert(id, summary?);
            } else {
                wanted.extend_from_slice(&sizes);
                again.push((meta, sizes));
            }
        }
        let mut absent = None;
        if !wanted.is_empty() {
            // What can't be had for all may be had for some.
            let all = store.prepare(&wanted);
            for (meta, sizes) in again {
                let sizes = if all.is_ok() { Ok(()) } else { store.prepare(&sizes) };
                match sizes.and_then(|()| summarize(meta, store, self.tables)) {
                    Ok(summary) => drop(summaries.insert(meta.id(), summary)),
                    // The local vineyardd.
                    Err(error) if matches!(error.kind(), Kind::Unavailable | Kind::Timeout) => return Err(error),
                    Err(error) => absent = Some(away(meta, error)),
                }
            }
        }
        // The instance of an object may be gone, and a copy go on.
        let lost: Vec<ObjectId> = ids.iter().copied().filter(|id| !summaries.contains_key(id)).collect();
        summaries.extend(summaries_of_copies(store, &lost, self.tables)?);
        let missing = ids.iter().copied().filter(|id| !metas.contains_key(id) && !summaries.contains_key(id)).collect();
        for summary in summaries.values() {
            if let Some(reason) = &summary.broken {
                tracing::warn!(object = %summary.id, "cannot be shown: {reason}");
            }
        }
        self.known().summaries.extend(summaries);
        Ok((missing, absent))
    }

    /// Which of these objects have a copy on an instance that answers.
    ///
    /// # Errors
    /// What the store answers.
    pub fn copied(&self, store: &dyn Store, ids: &[ObjectId]) -> Result<HashSet<ObjectId>> {
        Ok(summaries_of_copies(store, ids, self.tables)?.into_iter().map(|(id, _)| id).collect())
    }

    /// The whole object.
    ///
    /// # Errors
    /// `Stale` if it does not exist any more, `Malformed` if it cannot be shown.
    pub fn load(&self, store: &dyn Store, id: ObjectId) -> Result<Arc<Loaded>> {
        {
            let mut known = self.known();
            known.clock += 1;
            let now = known.clock;
            if let Some((loaded, used)) = known.loaded.get_mut(&id) {
                *used = now;
                return Ok(loaded.clone());
            }
        }
        let mut metas = store.metas(&[id], false)?;
        if metas.is_empty() {
            metas = store.metas(&[id], true)?;
        }
        let meta = metas.remove(&id).ok_or_else(|| Error::stale(format!("object {id} was deleted")))??;
        let (dataset, recipe) = dataset::decode_with_file(&meta, store)?;
        if let Dataset::Written(why) = &dataset {
            tracing::warn!(object = %id, "is shown only as the file that was written: {why}");
        }
        let here = store.instance()?.id;
        let elsewhere = meta.blobs().iter().any(|key| key.instance != here);
        let remote = elsewhere.then(|| Deferred::of(&dataset));
        let (images, checked) = (Mutex::default(), OnceLock::new());
        let loaded = Arc::new(Loaded { meta, dataset, recipe, images, checked, remote });
        let mut known = self.known();
        let now = known.clock;
        let loaded = known.loaded.entry(id).or_insert((loaded, now)).0.clone();
        if known.loaded.len() > LOADED_KEPT {
            let oldest = known
                .loaded
                .iter()
                .filter(|(_, (object, _))| Arc::strong_count(object) == 1)
                .min_by_key(|(_, (_, used))| *used)
                .map(|(id, _)| *id);
            if let Some(oldest) = oldest {
                known.loaded.remove(&oldest);
            }
        }
        Ok(loaded)
    }

    /// Size in bytes of a view whose image has to be made to know it. The image is kept until the next one is made, or for
    /// a while: whoever asks for a size often opens the file then.
    ///
    /// # Errors
    /// As [`Objects::load`] and [`Loaded::image`].
    pub fn size(&self, store: &dyn Store, id: ObjectId, view: View) -> Result<u64> {
        let loaded = self.load(store, id)?;
        let size = loaded.image(view, store)?.size();
        let mut sized = self.sized.lock().unwrap_or_else(|e| e.into_inner());
        let former = sized.replace((loaded, view, Instant::now()));
        drop(sized);
        if let Some((former, view_of_former, _)) = former.filter(|(f, v, _)| (f.meta.id(), *v) != (id, view)) {
            former.drop_image(view_of_former);
        }
        self.learn_size(id, view, size);
        Ok(size)
    }

    /// Number of images that are kept.
    #[cfg(test)]
    pub(super) fn images(&self) -> usize {
        let images = |loaded: &Loaded| loaded.images.lock().unwrap_or_else(|e| e.into_inner()).len();
        self.known().loaded.values().map(|(loaded, _)| images(loaded)).sum()
    }

    /// Drops the image that was made to know its size if that was a while ago. For a thread, now and then.
    pub fn tidy(&self) {
        let mut sized = self.sized.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((loaded, view, _)) = sized.take_if(|(_, _, made)| made.elapsed() > SIZED_KEPT) {
            drop(sized);
            loaded.drop_image(view);
        }
    }

    /// Remembers the size of a view that had to be encoded to be known.
    pub fn learn_size(&self, id: ObjectId, view: View, size: u64) {
        let mut known = self.known();
        if known.summaries.get(id).is_some_and(|summary| summary.view(view) == Some(None))
            && let Some(summary) = known.summaries.get_mut(id)
        {
            summary.sizes.iter_mut().filter(|(v, _)| *v == view).for_each(|(_, s)| *s = Some(size));
        }
    }
}

/// Summaries of objects that are not to be had, by copies of them that are.
fn summaries_of_copies(store: &dyn Store, lost: &[ObjectId], tables: View) -> Result<Vec<(ObjectId, Summary)>> {
    if lost.is_empty() {
        return Ok(Vec::new());
    }
    let copies: Vec<Copy> = copies_of(store, lost)?.into_iter().flatten().collect();
    let ids: Vec<ObjectId> = copies.iter().flat_map(|copy| [copy.source, copy.object]).collect();
    let metas = if ids.is_empty() { HashMap::new() } else { store.metas(&ids, true)? };
    let mut found = Vec::new();
    for copy in copies {
        let Some(Ok(meta)) = metas.get(&copy.object) else { continue };
        if matches!(metas.get(&copy.source), Some(Ok(original)) if !is_faithful(original, meta)) {
            continue;
        }
        if let Ok(summary) = store.prepare(&meta.blobs()).and_then(|()| summarize(meta, store, tables)) {
            found.push((copy.source, Summary { id: copy.source, ..summary }));
        }
    }
    Ok(found)
}

/// True if the data is on an instance that does not answer, or may not be asked: another time it may be had.
fn is_elsewhere(error: &Error) -> bool {
    matches!(error.kind(), Kind::Unreachable | Kind::Remote)
}

/// The sizes of all views, as far as metadata tells them.
fn sizes(dataset: &Dataset) -> Result<Vec<(View, Option<u64>)>> {
    let mut sizes: Vec<(View, Option<u64>)> = Vec::new();
    for view in image::views_of(dataset) {
        // Feather is the same file under another name: not worth laying out again.
        let same = sizes.iter().find(|(v, _)| *v == View::Arrow && view == View::Feather).map(|(_, size)| *size);
        let size = same.map_or_else(|| image::size(dataset, view), Ok)?;
        sizes.push((view, size));
    }
    Ok(sizes)
}

/// Why an object has no summary now. Another instance that answers at the address of its own, or something that is none,
/// does not answer for it either.
fn away(meta: &Meta, error: Error) -> Error {
    match is_elsewhere(&error) {
        true => error,
        false => Error::new(Kind::Unreachable, format!("object {} is not to be had", meta.id())).with_source(error),
    }
}

/// # Errors
/// Only what says nothing about the object itself.
fn summarize(meta: &Meta, source: &dyn BlobSource, tables: View) -> Result<Summary> {
    let described = dataset::decode_with_file(meta, source).and_then(|(dataset, recipe)| {
        let mut sizes = match sizes(&dataset) {
            Err(_) if recipe.is_some() => Vec::new(),
            sizes => sizes?,
        };
        let mut listed = image::listed_view(&dataset);
        if listed == View::Arrow && sizes.iter().any(|(view, _)| *view == tables) {
            listed = tables;
        }
        if let Some(recipe) = recipe {
            let written = view_of(recipe.view);
            sizes.retain(|(view, _)| *view != written);
            sizes.push((written, Some(recipe.size)));
            listed = written;
        } else if let Some(written) = written_as(meta).map(view_of)
            && sizes.iter().any(|(view, _)| *view == written)
        {
            listed = written;
        }
        Ok((dataset, sizes, listed))
    });
    Ok(match described {
        Ok((dataset, sizes, listed)) => Summary {
            id: meta.id(),
            instance: meta.instance(),
            signature: meta.signature(),
            typename: meta.typename().into(),
            created: created(Some(meta)),
            rows: dataset.rows(),
            listed,
            sizes: sizes.into(),
            broken: None,
            attributes: FileAttributes::of(meta).map(Arc::new),
        },
        Err(error) if is_elsewhere(&error) => return Err(error),
        Err(error) => Summary::broken(meta.id(), Some(meta), &error),
    })
}

/// The view of a format that files are written in.
pub fn view_of(written: Written) -> View {
    match written {
        Written::Arrow => View::Arrow,
        Written::Feather => View::Feather,
        Written::Parquet => View::Parquet,
        Written::Npy => View::Npy,
        Written::Pickle => View::Pickle,
        Written::Plain => View::Raw,
    }
}

/// The bytes of the file that an object was written as.
fn written_image(recipe: &Recipe) -> Image {
    let mut file = image::Builder::new();
    for span in &recipe.spans {
        file.span(span.clone());
    }
    file.finish()
}

/// A source that answers every size with 0 and remembers that it was asked.
struct Recorder<'a> {
    inner: &'a dyn Store,
    wanted: Mutex<Vec<BlobKey>>,
}

impl Recorder<'_> {
    fn take(&self) -> Vec<BlobKey> {
        std::mem::take(&mut self.wanted.lock().unwrap_or_else(|e| e.into_inner()))
    }

    fn want(&self, key: BlobKey) {
        self.wanted.lock().unwrap_or_else(|e| e.into_inner()).push(key);
    }
}

impl BlobSource for Recorder<'_> {
    fn size(&self, key: BlobKey) -> Result<u64> {
        self.want(key);
        Ok(0)
    }
    fn read(&self, key: BlobKey, _offset: u64, _out: &mut [u8]) -> Result<()> {
        self.want(key);
        Err(Error::new(Kind::Internal, "not while sizes are unknown"))
    }
    fn prepare(&self, _keys: &[BlobKey]) -> Result<()> {
        Ok(())
    }
    fn verify(&self, keys: &[BlobKey]) -> Result<()> {
        self.inner.verify(keys)
    }
    fn blob(&self, key: BlobKey) -> Result<Option<Blob>> {
        self.want(key);
        Err(Error::new(Kind::Internal, "not while sizes are unknown"))
    }
}
