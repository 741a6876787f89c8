//! Carrying out a plan: all of it, or nothing.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value, json};

use super::Staged;
use super::check::{self, Offset};
use super::plan::{Draft, Field, Outcome, Part, Plan, PlannedBlob, PlannedObject};
use crate::dataset::native::ARRAY;
use crate::error::{Context, Error, Kind, Result};
use crate::vineyard::store::{NewBlob, NewObject};
use crate::vineyard::{ObjectId, Store};

/// The type of vineyard's lists, which may lie in one another.
const LIST: &str = "vineyard::LargeListArray";
/// Schemas from this size on, as text, are looked at again.
const LONG: usize = 1 << 20;

/// Bytes that one thread copies before it looks for more work.
const PIECE: u64 = 8 << 20;
/// Below this many bytes a second thread costs more than it brings.
const ONE_THREAD: u64 = 4 << 20;
/// Most threads.
const MAX_THREADS: usize = 4;

/// What was published.
#[derive(Clone, Debug)]
pub struct Published {
    /// The new object, persisted.
    pub id: ObjectId,
    /// Its blobs.
    pub blobs: Vec<ObjectId>,
    /// What it is; [`Outcome::File`] may be the plan's fallback.
    pub outcome: Outcome,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Creates, fills and persists what is planned. If that fails, nothing stays in the store.
///
/// # Errors
/// `Full` if the store has no room, `Malformed` if compressed data turns out to be broken or what was made cannot be read
/// again (see [`Plan::fallback`]), and what the store answers.
pub fn execute(store: &dyn Store, plan: &Plan, staged: &Staged<'_>) -> Result<Published> {
    let made = Made {
        store,
        blobs: Mutex::default(),
        objects: Mutex::default(),
        keep: AtomicBool::new(false),
        alone: !store.shares_metadata()?,
    };
    let root = match (&plan.decode, plan.objects.last()) {
        (Some(decode), Some(root)) => {
            let blobs = made.blobs(&plan.blobs, staged)?;
            let add = |draft: &Draft| {
                let blobs = made.blobs(&draft.blobs, staged)?;
                made.objects(&draft.objects, &blobs)
            };
            let objects = decode.run(root, &add)?;
            made.objects(&objects, &blobs)?.pop()
        }
        _ if made.alone => Some(made.tree(plan, staged)?),
        _ => {
            let blobs = made.blobs(&plan.blobs, staged)?;
            made.objects(&plan.objects, &blobs)?.pop()
        }
    };
    let root = root.ok_or_else(|| Error::new(Kind::Internal, "a plan without objects"))?;
    if needs_proof(plan) {
        super::proof::prove(store, root, lock(&made.blobs).iter().copied().collect())?;
    }
    if !made.alone {
        store.persist(root).context(|| "persisting the object".into())?;
    }
    made.keep.store(true, Ordering::Relaxed);
    let blobs = lock(&made.blobs).drain(..).map(|(id, _)| id).collect();
    Ok(Published { id: root, blobs, outcome: plan.outcome, warnings: plan.warnings.clone() })
}

/// Whether it is not certain that what is made can be read again. Files as they are, tensors, and columns of vineyard's own
/// flat types can; asking for the metadata of a wide table would take as long as a good part of its save.
fn needs_proof(plan: &Plan) -> bool {
    let nests = |object: &PlannedObject| matches!(object.typename.as_str(), ARRAY | LIST);
    let text = |(_, field): &(String, Field)| matches!(field, Field::Json(Value::String(text)) if text.len() > LONG);
    plan.decode.is_some() || plan.objects.iter().any(|object| nests(object) || object.fields.iter().any(text))
}

/// As [`execute`]; where the content turns out broken only while it is decoded, or what was made of it cannot be read
/// again, in the plan's next form, at last as a plain file. [`Published::outcome`] says which.
///
/// # Errors
/// As [`execute`].
pub fn realize(store: &dyn Store, plan: &Plan, staged: &Staged<'_>) -> Result<Published> {
    let mut published = execute(store, plan, staged);
    let mut fallback = &plan.fallback;
    let mut warnings = Vec::new();
    while let (Err(error), Some(next)) = (&published, fallback) {
        if !error.is_of_content() {
            break;
        }
        warnings.push(format!("stored in another form: {error}"));
        published = execute(store, next, staged);
        fallback = &next.fallback;
    }
    let mut published = published?;
    published.warnings.extend(warnings);
    Ok(published)
}

/// [`execute`], then points a name at the object, then deletes the object `replaced`.
///
/// The name depends on the outcome: a plain file goes under its full file name, anything else under the dataset's.
///
/// # Errors
/// As [`execute`]; the name and the old object are untouched then. What goes wrong with the old object after that is a
/// warning.
pub fn publish(
    store: &dyn Store,
    name: &dyn Fn(Outcome) -> String,
    plan: &Plan,
    staged: &Staged<'_>,
    replaced: Option<ObjectId>,
) -> Result<Published> {
    let mut published = realize(store, plan, staged)?;
    let name = name(published.outcome);
    if let Err(error) = store.put_name(&name, published.id) {
        if let Err(left) = store.delete(&[published.id]) {
            tracing::warn!(object = %published.id, "an object without a name could not be deleted: {left}");
        }
        return Err(error).context(|| format!("naming {name:?}"));
    }
    if let Some(old) = replaced.filter(|&old| old != published.id)
        && let Err(error) = store.delete(&[old])
    {
        published.warnings.push(format!("the former object {old} could not be deleted: {error}"));
    }
    Ok(published)
}

/// What exists in the store so far; taken back on drop.
struct Made<'a> {
    store: &'a dyn Store,
    /// With their sizes.
    blobs: Mutex<Vec<(ObjectId, u64)>>,
    objects: Mutex<Vec<ObjectId>>,
    keep: AtomicBool,
    /// Nobody else hears of what becomes permanent. Persisting then only marks objects, one by one, which takes vineyardd
    /// as long as making them: they are made with the mark.
    alone: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Made<'_> {
    /// Creates, fills and seals blobs.
    fn blobs(&self, planned: &[PlannedBlob], staged: &Staged<'_>) -> Result<Vec<ObjectId>> {
        let blobs = self.create(planned)?;
        fill(planned, &blobs, staged)?;
        let ids: Vec<ObjectId> = blobs.iter().map(|blob| blob.id).collect();
        self.store.seal_blobs(&ids).context(|| "sealing blobs".into())?;
        Ok(ids)
    }

    /// Creates blobs.
    fn create(&self, planned: &[PlannedBlob]) -> Result<Vec<NewBlob>> {
        if planned.is_empty() {
            return Ok(Vec::new());
        }
        let sizes: Vec<u64> = planned.iter().map(PlannedBlob::size).collect();
        let blobs =
            self.store.create_blobs(&sizes).context(|| format!("room for {} bytes", sizes.iter().sum::<u64>()))?;
        lock(&self.blobs).extend(blobs.iter().map(|b| (b.id, b.size)).filter(|(id, _)| id.is_stored_blob()));
        if blobs.len() != planned.len() {
            return Err(Error::malformed(format!("the store made {} blobs of {}", blobs.len(), planned.len())));
        }
        Ok(blobs)
    }

    /// Creates and fills all blobs of a plan, and creates all its objects with one request. Returns the root.
    fn tree(&self, plan: &Plan, staged: &Staged<'_>) -> Result<ObjectId> {
        let blobs = self.create(&plan.blobs)?;
        let ids: Vec<ObjectId> = blobs.iter().map(|blob| blob.id).collect();
        let objects =
            plan.objects.iter().map(|object| new_object(object, &ids, false)).collect::<Option<Vec<NewObject>>>();
        let objects = objects.ok_or_else(|| Error::new(Kind::Internal, "a plan with fewer blobs than it uses"))?;
        let root = self.store.create_tree(&ids, objects, &mut || fill(&plan.blobs, &blobs, staged))?;
        lock(&self.objects).push(root);
        Ok(root)
    }

    /// Creates objects, members first, one request for each level. Returns their ids in the given order.
    fn objects(&self, objects: &[PlannedObject], blobs: &[ObjectId]) -> Result<Vec<ObjectId>> {
        let broken = || Error::new(Kind::Internal, "a plan whose objects do not follow their members");
        let mut levels: Vec<Vec<usize>> = Vec::new();
        let mut level_of = Vec::with_capacity(objects.len());
        for (i, object) in objects.iter().enumerate() {
            let mut level = 0;
            for (_, field) in &object.fields {
                if let Field::Object(member) = field {
                    level = level.max(1 + *level_of.get(*member).ok_or_else(broken)?);
                }
            }
            level_of.push(level);
            if levels.len() <= level {
                levels.resize_with(level + 1, Vec::new);
            }
            levels[level].push(i);
        }
        let mut ids: HashMap<usize, ObjectId> = HashMap::with_capacity(objects.len());
        for level in levels {
            let content = |&i: &usize| content(&objects[i], &ids, blobs, !self.alone);
            let contents = level.iter().map(content).collect::<Option<Vec<Value>>>();
            let created =
                self.store.create_objects(contents.ok_or_else(broken)?).context(|| "creating objects".into())?;
            lock(&self.objects).extend(created.iter().map(|c| c.id));
            if created.len() != level.len() {
                return Err(Error::malformed(format!("the store made {} objects of {}", created.len(), level.len())));
            }
            ids.extend(level.into_iter().zip(created.iter().map(|c| c.id)));
        }
        (0..objects.len()).map(|i| ids.get(&i).copied().ok_or_else(broken)).collect()
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        if self.keep.load(Ordering::Relaxed) {
            return;
        }
        let mut objects = std::mem::take(&mut *lock(&self.objects));
        let blobs: Vec<ObjectId> = lock(&self.blobs).drain(..).map(|(id, _)| id).collect();
        // Parents were made last: deleting them first frees their members.
        objects.reverse();
        self.store.take_back(&objects, &blobs);
    }
}

/// The metadata of an object. `transient`: not permanent yet.
fn content(
    object: &PlannedObject,
    ids: &HashMap<usize, ObjectId>,
    blobs: &[ObjectId],
    transient: bool,
) -> Option<Value> {
    let NewObject { mut content, members } = new_object(object, blobs, transient)?;
    for (key, index) in members {
        content.insert(key, json!({"id": ids.get(&index)?.to_string()}));
    }
    Some(Value::Object(content))
}

/// As [`content`], with the places of the members that the plan makes.
fn new_object(object: &PlannedObject, blobs: &[ObjectId], transient: bool) -> Option<NewObject> {
    let mut content = Map::new();
    content.insert("transient".into(), Value::Bool(transient));
    content.insert("typename".into(), Value::String(object.typename.clone()));
    let blob = |id: ObjectId| json!({"id": id.to_string(), "typename": "vineyard::Blob"});
    let mut members = Vec::new();
    for (key, field) in &object.fields {
        let value = match field {
            Field::Json(value) => value.clone(),
            Field::Empty => blob(ObjectId::EMPTY_BLOB),
            Field::Blob(index) => blob(*blobs.get(*index)?),
            Field::Object(index) => {
                members.push((key.clone(), *index));
                continue;
            }
            Field::Existing(id) => json!({"id": id.to_string()}),
        };
        content.insert(key.clone(), value);
    }
    Some(NewObject { content, members })
}

/// A part of a blob to be written: bytes `from..to` of it, at `position` of the blob.
struct Job<'a> {
    blob: usize,
    position: u64,
    part: &'a Part,
    from: u64,
    to: u64,
}

/// Writes all blobs, with several threads if that is worth it.
fn fill(planned: &[PlannedBlob], blobs: &[NewBlob], staged: &Staged<'_>) -> Result<()> {
    let mut jobs = Vec::new();
    for (i, blob) in planned.iter().enumerate() {
        let mut position = 0;
        for part in &blob.parts {
            let whole = part.len();
            let step = match part {
                // A frame is decompressed from its beginning.
                Part::Inflated(_) => whole,
                Part::Transposed(transposed) => PIECE.next_multiple_of(transposed.item()),
                _ => PIECE,
            };
            let mut from = 0;
            while from < whole {
                let to = (from + step).min(whole);
                jobs.push(Job { blob: i, position: position + from, part, from, to });
                from = to;
            }
            position += whole;
        }
    }
    // The longest that cannot be cut go first.
    jobs.sort_by_key(|job| std::cmp::Reverse(if job.to - job.from > PIECE { job.to - job.from } else { 0 }));
    let size: u64 = planned.iter().map(PlannedBlob::size).sum();
    // Asking for the number of cores reads files: not for a small save.
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = if size < ONE_THREAD { 1 } else { cores().min(MAX_THREADS).min(jobs.len()) };
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let error = Mutex::new(None);
    let work = || {
        while !failed.load(Ordering::Relaxed) {
            let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            let done = blobs
                .get(job.blob)
                .ok_or_else(|| Error::new(Kind::Internal, "fewer blobs than planned"))
                .and_then(|blob| write(job, blob, staged.bytes));
            if let Err(e) = done {
                failed.store(true, Ordering::Relaxed);
                error.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(e);
            }
        }
    };
    if threads <= 1 {
        work();
    } else {
        std::thread::scope(|scope| {
            // A thread that can't start leaves its work to the others.
            for _ in 1..threads {
                let _ = std::thread::Builder::new().name("publish".into()).spawn_scoped(scope, work);
            }
            work();
        });
    }
    match error.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn write(job: &Job<'_>, blob: &NewBlob, staged: &[u8]) -> Result<()> {
    let outside = || Error::malformed("a part outside the file");
    let put = |offset: u64, bytes: &[u8]| {
        let end = job.position.checked_add(offset).and_then(|at| at.checked_add(bytes.len() as u64));
        if end.is_none_or(|end| end > blob.size) {
            return Err(Error::new(Kind::Internal, format!("bytes past blob {} of {}", blob.id, blob.size)));
        }
        blob.write(job.position + offset, bytes)
    };
    let cut = |at: &std::ops::Range<u64>| staged.get(at.start as usize..at.end as usize).ok_or_else(outside);
    match job.part {
        Part::Staged(at) => put(0, cut(&(at.start + job.from..at.start + job.to))?),
        Part::Owned(buffer) => put(0, buffer.get(job.from as usize..job.to as usize).ok_or_else(outside)?),
        Part::Inflated(inflated) => inflated.stream(staged, put),
        Part::Zeros(_) | Part::Ones(_) => pieces(
            job,
            1,
            |_, out| {
                out.fill(if matches!(job.part, Part::Ones(_)) { 0xff } else { 0 });
                Ok(())
            },
            put,
        ),
        Part::Shifted { at, width, shift } => pieces(
            job,
            8,
            |offset, out| {
                let start = at.start + offset / 8 * width;
                let from = cut(&(start..start + out.len() as u64 / 8 * width))?;
                let values = out.chunks_exact_mut(8).zip(from.chunks_exact(*width as usize));
                for (to, from) in values {
                    let value = if *width == 4 { i32::from_bytes(from).into() } else { i64::from_bytes(from) };
                    to.copy_from_slice(&value.wrapping_add(*shift).to_le_bytes());
                }
                Ok(())
            },
            put,
        ),
        Part::Unpacked { at, bits } => {
            let bitmap = cut(&(*at..*at + bits.div_ceil(8)))?;
            pieces(
                job,
                1,
                |offset, out| {
                    for (i, to) in out.iter_mut().enumerate() {
                        *to = u8::from(check::bit(bitmap, offset as usize + i));
                    }
                    Ok(())
                },
                put,
            )
        }
        Part::Transposed(transposed) => {
            pieces(job, transposed.item(), |offset, out| transposed.read(staged, offset, out), put)
        }
    }
}

/// Computes a job's bytes in pieces of whole units of `unit` bytes, and passes each on with its offset in the job.
fn pieces(
    job: &Job<'_>,
    unit: u64,
    make: impl Fn(u64, &mut [u8]) -> Result<()>,
    put: impl Fn(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let step = (256u64 << 10).next_multiple_of(unit);
    let mut buffer = vec![0; step.min(job.to - job.from) as usize];
    let mut from = job.from;
    while from < job.to {
        let n = step.min(job.to - from) as usize;
        make(from, &mut buffer[..n])?;
        put(from - job.from, &buffer[..n])?;
        from += n as u64;
    }
    Ok(())
}
