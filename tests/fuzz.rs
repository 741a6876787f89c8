//! Feeds broken input to every parser that faces a user's file or a server's reply: changed copies of the files in
//! `tests/corpus` and of the recorded objects in `tests/fixtures`.
//!
//! Each target runs `VINEYARD_FS_FUZZ_SECONDS` (2) with the seed `VINEYARD_FS_FUZZ_SEED` (the day). Nothing may panic, hang,
//! or take memory without bound, and what a failed publish made must be gone. An input that breaks this is written to
//! `target/fuzz`; put there into the corpus, it is tried first by every later run.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "fuzz/memory.rs"]
mod memory;
#[path = "fuzz/mutate.rs"]
mod mutate;

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use mutate::{Random, mutate};
use serde_json::Value;
use vineyard_fs::Kind;
use vineyard_fs::dataset::publish::{Limits, Outcome, Staged, plan, publish};
use vineyard_fs::dataset::recipe::Written;
use vineyard_fs::dataset::{self, Dataset, FileAttributes};
use vineyard_fs::image::{self, Counts};
use vineyard_fs::vineyard::fake::FakeStore;
use vineyard_fs::vineyard::store::NameQuery;
use vineyard_fs::vineyard::{Blob, BlobKey, BlobSource, Client, ClientOptions, InstanceId, Meta, ObjectId, Store};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// Longest time for one input.
const PATIENCE: Duration = Duration::from_secs(20);

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

/// Runs one target: every input as it is, then changed ones until the time is up.
fn fuzz(name: &str, corpus: &[Vec<u8>], text: bool, run: impl Fn(&[u8])) {
    assert!(!corpus.is_empty(), "no corpus for {name}");
    let number = |key: &str, default: u64| std::env::var(key).ok().map_or(default, |text| text.parse().unwrap());
    let seconds = number("VINEYARD_FS_FUZZ_SECONDS", 2);
    let day = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() / 86_400;
    let seed = number("VINEYARD_FS_FUZZ_SEED", day);
    let mut random = Random::new(seed);
    let said: Mutex<String> = Mutex::default();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz");
    std::fs::create_dir_all(&folder).unwrap();
    // What ends the whole process shows here what it was.
    let current = folder.join(format!("{name}-under-way"));
    let under_way = std::fs::File::create(&current).unwrap();
    let attempt = |input: &[u8]| {
        under_way.set_len(input.len() as u64).unwrap();
        under_way.write_all_at(input, 0).unwrap();
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| run(input)));
        let slow = start.elapsed() > PATIENCE;
        if result.is_err() || slow {
            let path = folder.join(format!("{name}-{:016x}", Random::new(input.len() as u64 ^ seed).next()));
            std::fs::write(&path, input).unwrap();
            let what = if slow { "takes too long" } else { "panics" };
            *said.lock().unwrap() = format!("{name} {what} (seed {seed}): {}", path.display());
            return false;
        }
        true
    };
    let mut executions = 0u64;
    let start = Instant::now();
    let mut good = corpus.iter().all(|input| attempt(input));
    while good && start.elapsed() < Duration::from_secs(seconds) {
        let mut input = random.pick(corpus).clone();
        mutate(&mut random, &mut input, corpus, text);
        good = attempt(&input);
        executions += 1;
    }
    std::fs::remove_file(&current).unwrap();
    println!(
        "fuzz {name}: {executions} executions in {:?}, {} files in the corpus, at most {} MiB held by all targets",
        start.elapsed(),
        corpus.len(),
        memory::peak() >> 20
    );
    assert!(good, "{}", said.lock().unwrap());
}

/// Publishes a file, and reads what became of it through every view.
fn publish_file(bytes: &[u8], view: Written) {
    let store = FakeStore::new(96 << 20);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    let staged = Staged { bytes, file: &file };
    let limits = Limits { inflated: 64 << 20 };
    let plan = match plan(&staged, view, &FileAttributes::default(), limits) {
        Ok(plan) => plan,
        Err(error) => return assert_eq!(error.kind(), Kind::Invalid, "{error}"),
    };
    let published = match publish(&store, &|_| "x".into(), &plan, &staged, None) {
        Ok(published) => published,
        Err(error) => {
            assert_eq!(error.kind(), Kind::Full, "{error}");
            assert_eq!((store.blob_count(), store.object_count()), (0, 0), "something is left over");
            return;
        }
    };
    let meta = store.metas(&[published.id], false).unwrap().remove(&published.id).unwrap().unwrap();
    let dataset = dataset::decode(&meta, &store).unwrap();
    if let Dataset::File(span) = &dataset {
        assert!(span.to_vec(&store).unwrap() == bytes, "the file reads back differently");
    }
    if published.outcome != Outcome::File {
        let recipe = dataset::recipe::recipe_of(&meta).unwrap().unwrap();
        let back: Vec<u8> = recipe.spans.iter().flat_map(|span| span.to_vec(&store).unwrap()).collect();
        assert!(back == bytes, "the view that was written reads back differently");
    }
    dataset.check(&store).unwrap();
    read_views(&dataset, &store, true);
    store.delete(&[published.id]).unwrap();
    assert_eq!((store.blob_count(), store.object_count()), (0, 0), "something is left over");
}

/// Bytes that an array takes in memory.
fn held(layout: &dataset::table::ArrayLayout) -> u64 {
    let buffers = layout.buffers.iter().map(|span| span.len());
    buffers.chain(layout.children.iter().chain(layout.dictionary.as_deref()).map(held)).fold(0, u64::saturating_add)
}

/// Builds and reads every view; `sound` data must not fail.
fn read_views(dataset: &Dataset, source: &dyn BlobSource, sound: bool) {
    if let Some(table) = dataset.table() {
        // As for images below.
        let columns = table.batches.iter().flat_map(|batch| &batch.columns);
        for column in columns.filter(|column| held(column) <= 1 << 26) {
            let made = dataset::materialize(column, source);
            assert!(!sound || made.is_ok(), "{}", made.unwrap_err());
        }
    }
    for view in image::views_of(dataset) {
        let read = image::build(dataset, view, Counts::From(source)).and_then(|image| {
            // Metadata can say that there are any number of nulls or zeros: reading them all tells nothing more.
            if image.size() > 1 << 26 {
                return Ok(());
            }
            let mut at = 0;
            let mut out = vec![0; 64 << 10];
            while at < image.size() {
                let n = (image.size() - at).min(out.len() as u64) as usize;
                image.read(source, at, &mut out[..n])?;
                at += n as u64;
            }
            Ok(())
        });
        if let Err(error) = read {
            assert!(!sound || error.kind() == Kind::Unsupported, "{view:?}: {error}");
        }
    }
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    files(&folder().join("corpus").join(name)).into_iter().map(|(_, bytes)| bytes).collect()
}

#[test]
fn arrow_file() {
    fuzz("arrow_file", &corpus("arrow_file"), false, |input| publish_file(input, Written::Arrow));
}

#[test]
fn arrow_stream() {
    fuzz("arrow_stream", &corpus("arrow_stream"), false, |input| publish_file(input, Written::Feather));
}

#[test]
fn parquet() {
    // The parquet crate may panic; the panic is caught, and must not fill the output.
    std::panic::set_hook(Box::new(|_| ()));
    fuzz("parquet", &corpus("parquet"), false, |input| publish_file(input, Written::Parquet));
}

#[test]
fn npy() {
    fuzz("npy", &corpus("npy"), false, |input| publish_file(input, Written::Npy));
}

/// Blobs of a recorded object.
struct Blobs(HashMap<BlobKey, Vec<u8>>);

impl BlobSource for Blobs {
    fn size(&self, key: BlobKey) -> vineyard_fs::Result<u64> {
        self.0.get(&key).map(|b| b.len() as u64).ok_or_else(|| vineyard_fs::Error::stale("no such blob"))
    }

    fn read(&self, key: BlobKey, offset: u64, out: &mut [u8]) -> vineyard_fs::Result<()> {
        let blob = self.0.get(&key).ok_or_else(|| vineyard_fs::Error::stale("no such blob"))?;
        let part = usize::try_from(offset).ok().and_then(|start| blob.get(start..start.checked_add(out.len())?));
        out.copy_from_slice(part.ok_or_else(|| vineyard_fs::Error::malformed("outside the blob"))?);
        Ok(())
    }

    fn prepare(&self, _: &[BlobKey]) -> vineyard_fs::Result<()> {
        Ok(())
    }

    fn verify(&self, _: &[BlobKey]) -> vineyard_fs::Result<()> {
        Ok(())
    }

    fn blob(&self, _: BlobKey) -> vineyard_fs::Result<Option<Blob>> {
        Ok(None)
    }
}

fn recorded(json: &Value) -> Option<(Value, Blobs)> {
    let meta = json.get("meta")?.clone();
    let instance = InstanceId(meta.get("instance_id").and_then(Value::as_u64).unwrap_or(0));
    let mut blobs = HashMap::new();
    for (id, bytes) in json.get("blobs")?.as_object()? {
        let bytes = BASE64_STANDARD.decode(bytes.as_str()?).ok()?;
        blobs.insert(BlobKey { instance, id: id.parse().ok()? }, bytes);
    }
    Some((meta, Blobs(blobs)))
}

fn read_object(meta: Value, blobs: &Blobs) {
    let Ok(meta) = Meta::new(meta) else { return };
    let _ = dataset::recipe::recipe_of(&meta);
    let Ok(dataset) = dataset::decode(&meta, blobs) else { return };
    let _ = dataset.validate(blobs);
    if dataset.check(blobs).is_ok() {
        read_views(&dataset, blobs, false);
    }
}

/// Metadata as a server may send it, over blobs as they are.
#[test]
fn metadata() {
    let objects: Vec<(Vec<u8>, Blobs)> = files(&folder().join("fixtures/objects"))
        .iter()
        .map(|(_, bytes)| {
            let (meta, blobs) = recorded(&serde_json::from_slice(bytes).unwrap()).unwrap();
            (meta.to_string().into_bytes(), blobs)
        })
        .collect();
    // All blobs in one place: an id that was changed leads to another object's.
    let all: Vec<Vec<u8>> = objects.iter().map(|(text, _)| text.clone()).collect();
    let blobs = Blobs(objects.into_iter().flat_map(|(_, blobs)| blobs.0).collect());
    fuzz("metadata", &all, true, |input| {
        if let Ok(meta) = serde_json::from_slice(input) {
            read_object(meta, &blobs);
        }
    });
}

/// Pickles of pandas objects and whatever else blobs hold, under metadata as it is.
#[test]
fn blobs() {
    let objects: Vec<Value> = files(&folder().join("fixtures/objects"))
        .iter()
        .map(|(_, bytes)| serde_json::from_slice(bytes).unwrap())
        .collect();
    let mut inputs = Vec::new();
    let mut homes = HashMap::new();
    for object in &objects {
        let (meta, blobs) = recorded(object).unwrap();
        for (key, bytes) in blobs.0 {
            homes.insert(inputs.len(), (meta.clone(), key));
            // The first four bytes say whose blob it is.
            let number = (inputs.len() as u32).to_le_bytes();
            inputs.push([number.as_slice(), &bytes].concat());
        }
    }
    let sources: Vec<Blobs> = (0..inputs.len())
        .map(|i| {
            let meta = &homes[&i].0;
            let object = objects.iter().find(|object| object["meta"] == *meta).unwrap();
            recorded(object).unwrap().1
        })
        .collect();
    fuzz("blobs", &inputs, false, |input| {
        let Some((number, bytes)) = input.split_at_checked(4) else { return };
        let number = u32::from_le_bytes(number.try_into().unwrap()) as usize % inputs.len();
        let (meta, key) = &homes[&number];
        let mut blobs = Blobs(sources[number].0.clone());
        blobs.0.insert(*key, bytes.to_vec());
        read_object(meta.clone(), &blobs);
    });
}

/// Replies of a server, to a client that asks for everything that it can.
#[test]
fn wire() {
    let corpus = corpus("wire");
    fuzz("wire", &corpus, true, |input| {
        let input = input.to_vec();
        let first = Mutex::new(Some(input));
        let held: Arc<Mutex<Option<UnixStream>>> = Arc::default();
        let open = held.clone();
        let connector = Box::new(move |_: Instant| -> vineyard_fs::Result<UnixStream> {
            let Some(input) = first.lock().unwrap().take() else {
                return Err(vineyard_fs::Error::new(Kind::Invalid, "one connection is enough"));
            };
            let (ours, theirs) = UnixStream::pair()?;
            // One frame for each line; then the end.
            let mut replies = Vec::new();
            for line in input.split(|&byte| byte == b'\n') {
                let (length, body) = match line.strip_prefix(b"!") {
                    Some(body) => (u64::MAX, body),
                    None => (line.len() as u64, line),
                };
                replies.extend_from_slice(&length.to_le_bytes());
                replies.extend_from_slice(body);
            }
            replies.truncate(100 << 10);
            let mut server = &theirs;
            server.write_all(&replies)?;
            theirs.shutdown(std::net::Shutdown::Write)?;
            // What the client sends has room in the socket.
            open.lock().unwrap().replace(theirs);
            Ok(ours)
        });
        let options = ClientOptions::connector(connector).deadline(Duration::from_millis(30));
        let client = Client::new(options).unwrap();
        let (blob, object) = (ObjectId(1 << 63 | 5), ObjectId(7));
        let key = BlobKey { instance: InstanceId(2), id: blob };
        let _ = client.instance();
        let _ = client.names(&[NameQuery::Exact("a".into()), NameQuery::Prefix { prefix: "".into(), limit: Some(5) }]);
        let _ = client.metas(&[object], false);
        let _ = client.blob_sizes(&[blob]);
        let _ = client.prepare(&[key]);
        let _ = client.verify(&[key]);
        let _ = client.status();
        let _ = client.cluster();
        let _ = client.create_blobs(&[10, 0, 20]);
        let _ = client.create_objects(vec![serde_json::json!({"typename": "x"})]);
    });
}
