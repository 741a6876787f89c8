//! The filesystem without a mount, over a store in this process.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use serde_json::json;

use super::*;
use crate::vineyard::fake::{FakeStore, Op};

mod model;

/// Memory files of this process; "passthrough" hands out made-up ids.
#[derive(Default)]
struct LocalHost {
    passthrough: bool,
    next: AtomicU64,
    files: Mutex<HashMap<u64, Arc<File>>>,
    tags: Mutex<HashMap<u64, (Area, String)>>,
    notes: Mutex<HashMap<String, String>>,
}

impl Host for LocalHost {
    fn serving(&self) -> Serving {
        if self.passthrough { Serving::Passthrough } else { Serving::Requests("a test".into()) }
    }
    fn create_file(&self, area: Area, size: u64) -> Result<HostFile> {
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        let file = nix::sys::memfd::memfd_create("test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
        let file = Arc::new(File::from(file));
        file.set_len(size)?;
        self.files.lock().unwrap().insert(key, file.clone());
        self.tags.lock().unwrap().insert(key, (area, String::new()));
        Ok(HostFile { key, file, backing: self.passthrough.then_some(key as u32) })
    }
    fn tag_file(&self, key: u64, tag: &str) {
        self.tags.lock().unwrap().get_mut(&key).unwrap().1 = tag.to_owned();
    }
    fn tagged_files(&self) -> Result<Vec<host::TaggedFile>> {
        let tags = self.tags.lock().unwrap().clone();
        let files = self.files.lock().unwrap();
        let tagged = tags.into_iter().filter(|(_, (_, tag))| !tag.is_empty()).map(|(key, (area, tag))| {
            let backing = self.passthrough.then_some(key as u32);
            host::TaggedFile { tag, area, file: HostFile { key, file: files[&key].clone(), backing } }
        });
        Ok(tagged.collect())
    }
    fn note(&self, key: &str, text: Option<&str>) {
        let mut notes = self.notes.lock().unwrap();
        match text {
            Some(text) => drop(notes.insert(key.to_owned(), text.to_owned())),
            None => drop(notes.remove(key)),
        }
    }
    fn notes(&self) -> Result<Vec<(String, String)>> {
        Ok(self.notes.lock().unwrap().clone().into_iter().collect())
    }
    fn release_file(&self, key: u64) {
        self.tags.lock().unwrap().remove(&key);
        assert!(self.files.lock().unwrap().remove(&key).is_some(), "file {key} is released once");
    }
    fn invalidate_entry(&self, _parent: u64, _name: &OsStr) {}
    fn invalidate_inode(&self, _ino: u64) {}
}

struct Bed {
    fs: FileSystem,
    store: Arc<FakeStore>,
    host: Arc<LocalHost>,
}

const ME: Caller = Caller { uid: 7, gid: 8, pid: 100, resent: false };
const OTHER: Caller = Caller { uid: 7, gid: 8, pid: 200, resent: false };

fn bed_with(passthrough: bool, options: Options) -> Bed {
    let store = Arc::new(FakeStore::new(64 << 20));
    let host = Arc::new(LocalHost { passthrough, next: AtomicU64::new(1), ..LocalHost::default() });
    let fs = FileSystem::new(store.clone(), host.clone(), options);
    Bed { fs, store, host }
}

fn bed() -> Bed {
    bed_with(true, Options::default())
}

impl Bed {
    fn walk(&self, path: &str) -> Result<(u64, OsString)> {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let mut ino = ROOT;
        for part in directory.split('/').filter(|part| !part.is_empty()) {
            ino = self.fs.lookup(ino, OsStr::new(part), ME)?.attr.ino;
        }
        Ok((ino, name.into()))
    }
    fn lookup(&self, path: &str, caller: Caller) -> Result<Entry> {
        let (parent, name) = self.walk(path)?;
        self.fs.lookup(parent, &name, caller)
    }
    /// As the kernel opens: lookup, open, and once more after `Stale`.
    fn open(&self, path: &str, flags: i32, caller: Caller) -> Result<(u64, Opened)> {
        let entry = self.lookup(path, caller)?;
        match self.fs.open(entry.attr.ino, flags, caller) {
            Err(error) if error.kind() == Kind::Stale => {
                let entry = self.lookup(path, caller)?;
                Ok((entry.attr.ino, self.fs.open(entry.attr.ino, flags, caller)?))
            }
            other => Ok((entry.attr.ino, other?)),
        }
    }
    fn create(&self, path: &str, caller: Caller) -> Result<(u64, Opened)> {
        match self.open(path, libc::O_WRONLY | libc::O_TRUNC, caller) {
            Err(error) if error.kind() == Kind::NotFound => {
                let (parent, name) = self.walk(path)?;
                let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC;
                let (entry, opened) = self.fs.create(parent, &name, 0o644, 0o022, flags, caller)?;
                Ok((entry.attr.ino, opened))
            }
            other => other,
        }
    }
    /// Writes as whoever has the handle: through the memory file if the kernel would.
    fn write(&self, (ino, opened): (u64, Opened), offset: u64, data: &[u8]) {
        match opened.serve {
            Serve::Passthrough(id) => {
                use std::os::unix::fs::FileExt;
                let file = self.host.files.lock().unwrap()[&u64::from(id)].clone();
                file.write_all_at(data, offset).unwrap();
            }
            _ => assert_eq!(self.fs.write(ino, opened.fh, offset, data).unwrap() as usize, data.len()),
        }
    }
    fn close(&self, (ino, opened): (u64, Opened), caller: Caller) -> Result<()> {
        let result = if opened.no_flush { Ok(()) } else { self.fs.flush(ino, opened.fh, caller) };
        self.fs.release(ino, opened.fh);
        result
    }
    fn save(&self, path: &str, data: &[u8]) -> Result<()> {
        let handle = self.create(path, ME)?;
        self.write(handle, 0, data);
        self.close(handle, ME)
    }
    fn read_handle(&self, (ino, opened): (u64, Opened)) -> Result<Vec<u8>> {
        match opened.serve {
            Serve::Passthrough(id) => {
                use std::os::unix::fs::FileExt;
                let file = self.host.files.lock().unwrap()[&u64::from(id)].clone();
                let mut out = vec![0; file.metadata().unwrap().len() as usize];
                file.read_exact_at(&mut out, 0).unwrap();
                Ok(out)
            }
            _ => {
                let mut out = Vec::new();
                loop {
                    let part = self.fs.read(ino, opened.fh, out.len() as u64, 1000)?;
                    if part.is_empty() {
                        return Ok(out);
                    }
                    out.extend(part);
                }
            }
        }
    }
    fn load(&self, path: &str) -> Result<Vec<u8>> {
        let handle = self.open(path, libc::O_RDONLY, OTHER)?;
        let bytes = self.read_handle(handle)?;
        let (attr, _) = self.fs.getattr(handle.0, None)?;
        assert_eq!(attr.size, bytes.len() as u64, "size of {path}");
        self.close(handle, OTHER)?;
        Ok(bytes)
    }
    fn list(&self, path: &str) -> Vec<String> {
        let ino = if path.is_empty() { ROOT } else { self.lookup(path, ME).unwrap().attr.ino };
        let (fh, _) = self.fs.opendir(ino).unwrap();
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let before = names.len();
            // Three entries a call, as a small buffer of the kernel's would.
            let mut room = 3;
            self.fs
                .readdir(ino, fh, offset, true, &mut |entry| {
                    if room == 0 {
                        return true;
                    }
                    room -= 1;
                    offset = entry.next;
                    names.push(entry.name.into_string().unwrap());
                    false
                })
                .unwrap();
            if names.len() == before {
                break;
            }
        }
        self.fs.releasedir(ino, fh);
        assert_eq!(names[..2], [".", ".."]);
        let mut names = names.split_off(2);
        names.sort();
        names
    }
    fn put_tensor(&self, name: &str, values: &[f64]) -> ObjectId {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let blob = self.store.put_blob(&bytes).unwrap();
        let content = json!({"typename": "vineyard::Tensor<double>", "value_type_": "float64",
            "value_type_meta_": "<f8", "shape_": format!("[{}]", values.len()), "partition_index_": "[]",
            "order_": "\"C\"", "buffer_": {"id": blob.id.to_string(), "typename": "vineyard::Blob",
            "instance_id": blob.instance.0}});
        self.store.put_object(name, content).unwrap()
    }
}

fn table_file(values: &[i64]) -> Vec<u8> {
    let texts: Vec<String> = values.iter().map(|v| format!("row {v}")).collect();
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("a", Arc::new(Int64Array::from(values.to_vec()))),
        ("s", Arc::new(StringArray::from_iter_values(&texts))),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer = arrow_ipc::writer::FileWriter::try_new(Vec::new(), &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

fn column(file: &[u8]) -> Vec<i64> {
    let reader = arrow_ipc::reader::FileReader::try_new(std::io::Cursor::new(file), None).unwrap();
    reader
        .flat_map(|batch| {
            let batch = batch.unwrap();
            batch.column(0).as_any().downcast_ref::<Int64Array>().unwrap().values().to_vec()
        })
        .collect()
}

#[test]
fn datasets_of_other_clients_are_files() {
    for passthrough in [true, false] {
        let bed = bed_with(passthrough, Options::default());
        let values: Vec<f64> = (0..20_000).map(f64::from).collect();
        bed.put_tensor("x", &values);
        bed.put_tensor("deep/er/y", &[1.5]);
        assert_eq!(bed.list(""), ["deep", "x.npy"]);
        assert_eq!(bed.list("deep"), ["er"]);
        assert_eq!(bed.list("deep/er"), ["y.npy"]);
        let bytes = bed.load("x.npy").unwrap();
        assert_eq!(&bytes[..6], b"\x93NUMPY");
        assert_eq!(bytes[bytes.len() - 8..], 19_999f64.to_le_bytes());
        let rows = bed.load("x.arrow").unwrap();
        assert!(rows.starts_with(b"ARROW1") && rows.ends_with(b"ARROW1"));
        assert_eq!(bed.load("nothing.arrow").unwrap_err().kind(), Kind::NotFound);
        assert_eq!(bed.load("x.pkl").unwrap_err().kind(), Kind::NotFound);
    }
}

#[test]
fn what_was_written_reads_back_byte_for_byte_and_through_other_views() {
    for passthrough in [true, false] {
        let bed = bed_with(passthrough, Options::default());
        let file = table_file(&[3, 1, 2]);
        bed.save("t.arrow", &file).unwrap();
        assert_eq!(bed.load("t.arrow").unwrap(), file);
        assert_eq!(column(&bed.load("t.feather").unwrap()), [3, 1, 2]);
        assert_eq!(bed.list(""), ["t.arrow"]);
        // Another mount of the same store has only the store to make it from.
        let host = Arc::new(LocalHost { passthrough, next: AtomicU64::new(1), ..LocalHost::default() });
        let fs = FileSystem::new(bed.store.clone(), host.clone(), Options::default());
        let second = Bed { fs, store: bed.store.clone(), host };
        assert_eq!(second.load("t.arrow").unwrap(), file);
        assert_eq!(second.list(""), ["t.arrow"]);
    }
}

#[test]
fn plain_files_and_foreign_bytes_are_kept_as_they_are() {
    let bed = bed();
    bed.save("report.csv", b"a,b\n1,2\n").unwrap();
    bed.save("x.arrow", b"no arrow file at all").unwrap();
    bed.save("empty", b"").unwrap();
    assert_eq!(bed.load("report.csv").unwrap(), b"a,b\n1,2\n");
    assert_eq!(bed.load("x.arrow").unwrap(), b"no arrow file at all");
    assert_eq!(bed.load("empty").unwrap(), b"");
    assert_eq!(bed.list(""), ["empty", "report.csv", "x.arrow"]);
    // The same path with real content is a dataset again, and nothing of the former value is left.
    bed.save("x.arrow", &table_file(&[5])).unwrap();
    assert_eq!(column(&bed.load("x.arrow").unwrap()), [5]);
    assert_eq!(bed.list(""), ["empty", "report.csv", "x.arrow"]);
}

#[test]
fn readers_keep_their_version_and_the_old_object_goes() {
    for passthrough in [true, false] {
        let bed = bed_with(passthrough, Options::default());
        bed.save("t.arrow", &table_file(&[1])).unwrap();
        let objects = bed.store.object_count();
        let blobs = bed.store.blob_count();
        let reader = bed.open("t.arrow", libc::O_RDONLY, OTHER).unwrap();
        let writer = bed.create("t.arrow", ME).unwrap();
        assert_ne!(reader.0, writer.0, "a writer gets an inode of its own");
        bed.write(writer, 0, &table_file(&[2])[..100]);
        // Half written: others still read the published version.
        assert_eq!(column(&bed.load("t.arrow").unwrap()), [1]);
        bed.write(writer, 0, &table_file(&[2]));
        bed.close(writer, ME).unwrap();
        assert_eq!(column(&bed.read_handle(reader).unwrap()), [1]);
        assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
        bed.close(reader, OTHER).unwrap();
        assert_eq!((bed.store.object_count(), bed.store.blob_count()), (objects, blobs));
    }
}

#[test]
fn a_path_replaces_what_it_showed_and_nothing_else() {
    let bed = bed();
    bed.save("x.arrow", &table_file(&[1])).unwrap();
    let pickle = b"\x80\x05K\x07.";
    bed.save("x.pkl", pickle).unwrap();
    assert_eq!(bed.list(""), ["x.arrow", "x.pkl"]);
    assert_eq!(bed.load("x.pkl").unwrap(), pickle);
    assert_eq!(column(&bed.load("x.arrow").unwrap()), [1]);
    bed.save("x.pkl", b"\x80\x05K\x08.").unwrap();
    assert_eq!(bed.load("x.pkl").unwrap(), b"\x80\x05K\x08.");
    bed.fs.unlink(ROOT, OsStr::new("x.arrow"), ME).unwrap();
    assert_eq!(bed.list(""), ["x.pkl"]);
    // Another format of a table is the same dataset.
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    bed.save("t.feather", &table_file(&[2])).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
    assert_eq!(bed.list(""), ["t.feather", "x.pkl"]);
}

#[test]
fn truncating_and_writing_nothing_leaves_the_old_version() {
    let bed = bed();
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    let writer = bed.create("t.arrow", ME).unwrap();
    bed.close(writer, ME).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [1]);
    // A plain file is empty then, as on any filesystem.
    bed.save("f.txt", b"text").unwrap();
    let writer = bed.create("f.txt", ME).unwrap();
    bed.close(writer, ME).unwrap();
    assert_eq!(bed.load("f.txt").unwrap(), b"");
}

#[test]
fn an_unfinished_file_is_kept_as_it_is_if_its_writer_says_so() {
    let bed = bed();
    let file = table_file(&[1]);
    bed.save("t.arrow", &file).unwrap();
    let writer = bed.create("t.arrow", ME).unwrap();
    bed.write(writer, 0, &file[..file.len() / 2]);
    bed.fs.flush(writer.0, writer.1.fh, ME).unwrap();
    assert_eq!(bed.load("t.arrow").unwrap(), file[..file.len() / 2]);
    // The writer goes on.
    bed.write(writer, 0, &table_file(&[9]));
    bed.close(writer, ME).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [9]);
    // A writer that dies closes without a word: the version before stays.
    let writer = bed.create("t.arrow", ME).unwrap();
    bed.write(writer, 0, &file[..file.len() / 2]);
    bed.fs.release(writer.0, writer.1.fh);
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [9]);
}

#[test]
fn a_failed_publish_keeps_both_versions_and_can_be_repeated() {
    for op in [Op::CreateBlobs, Op::SealBlobs, Op::CreateObjects, Op::Persist, Op::PutName] {
        let bed = bed();
        bed.save("t.arrow", &table_file(&[1])).unwrap();
        let (objects, blobs) = (bed.store.object_count(), bed.store.blob_count());
        let writer = bed.create("t.arrow", ME).unwrap();
        bed.write(writer, 0, &table_file(&[2]));
        bed.store.fail_next(op, 1, Kind::Full);
        assert_eq!(bed.fs.flush(writer.0, writer.1.fh, ME).unwrap_err().kind(), Kind::Full, "{op:?}");
        assert_eq!((bed.store.object_count(), bed.store.blob_count()), (objects, blobs), "left over after {op:?}");
        assert_eq!(column(&bed.load("t.arrow").unwrap()), [1], "others still read the old value");
        assert_eq!(bed.fs.status()["staging"]["failed"].as_array().unwrap().len(), 1);
        bed.fs.fsync(writer.0, writer.1.fh, ME).unwrap();
        bed.close(writer, ME).unwrap();
        assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
    }
}

#[test]
fn the_same_handle_is_published_again_when_it_changed() {
    let bed = bed();
    let writer = bed.create("log.txt", ME).unwrap();
    bed.fs.flush(writer.0, writer.1.fh, ME).unwrap();
    bed.write(writer, 0, b"one\n");
    bed.fs.flush(writer.0, writer.1.fh, ME).unwrap();
    assert_eq!(bed.load("log.txt").unwrap(), b"one\n");
    let puts = bed.store.calls(Op::PutName);
    std::thread::sleep(Duration::from_millis(30));
    bed.fs.flush(writer.0, writer.1.fh, ME).unwrap();
    assert_eq!(bed.store.calls(Op::PutName), puts, "nothing changed, nothing is published");
    bed.write(writer, 4, b"two\n");
    bed.close(writer, ME).unwrap();
    assert_eq!(bed.load("log.txt").unwrap(), b"one\ntwo\n");
}

#[test]
fn rename_moves_names_and_publishes_by_the_new_extension() {
    let bed = bed();
    let rename = |from: &str, to: &str, flags: u32| {
        let (parent, name) = bed.walk(from).unwrap();
        let (new_parent, new_name) = bed.walk(to).unwrap();
        bed.fs.rename(parent, &name, new_parent, &new_name, flags, ME)
    };
    let file = table_file(&[1, 2]);
    bed.save(".t.arrow.AbCdEf", &file).unwrap();
    rename(".t.arrow.AbCdEf", "t.arrow", 0).unwrap();
    assert_eq!(bed.load("t.arrow").unwrap(), file);
    assert_eq!(column(&bed.load("t.feather").unwrap()), [1, 2], "it became a table");
    assert_eq!(bed.list(""), ["t.arrow"]);
    bed.save("tmp_u.arrow", &table_file(&[3])).unwrap();
    assert_eq!(rename("tmp_u.arrow", "t.arrow", libc::RENAME_NOREPLACE).unwrap_err().kind(), Kind::Exists);
    rename("tmp_u.arrow", "t.arrow", 0).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [3]);
    bed.save("v.tmp", &table_file(&[4])).unwrap();
    rename("v.tmp", "t.arrow", 0).unwrap();
    assert_eq!(bed.list(""), ["t.arrow"]);
    bed.save("v.tmp", &table_file(&[3])).unwrap();
    rename("v.tmp", "t.arrow", 0).unwrap();
    rename("t.arrow", "t.arrow.bak", 0).unwrap();
    assert_eq!(bed.load("t.arrow.bak").unwrap(), table_file(&[3]));
    assert_eq!(bed.list(""), ["t.arrow.bak"]);
    bed.save("a.txt", b"a").unwrap();
    bed.save("b.txt", b"b").unwrap();
    rename("a.txt", "b.txt", libc::RENAME_EXCHANGE).unwrap();
    assert_eq!((bed.load("a.txt").unwrap(), bed.load("b.txt").unwrap()), (b"b".to_vec(), b"a".to_vec()));
}

#[test]
fn a_rename_that_cannot_publish_moves_nothing() {
    let bed = bed();
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    bed.save("new.tmp", &table_file(&[2])).unwrap();
    bed.store.fail_next(Op::CreateBlobs, 1, Kind::Full);
    let (from, to) = (OsStr::new("new.tmp"), OsStr::new("t.arrow"));
    assert_eq!(bed.fs.rename(ROOT, from, ROOT, to, 0, ME).unwrap_err().kind(), Kind::Full);
    assert_eq!(bed.list(""), ["new.tmp", "t.arrow"]);
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [1]);
    assert_eq!(bed.load("new.tmp").unwrap(), table_file(&[2]));
    bed.fs.rename(ROOT, from, ROOT, to, 0, ME).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
    assert_eq!(bed.list(""), ["t.arrow"]);
}

#[test]
fn directories_come_and_go() {
    let bed = bed();
    let mkdir = |path: &str| {
        let (parent, name) = bed.walk(path).unwrap();
        bed.fs.mkdir(parent, &name, 0o755, 0, ME)
    };
    let rmdir = |path: &str| {
        let (parent, name) = bed.walk(path).unwrap();
        bed.fs.rmdir(parent, &name, ME)
    };
    mkdir("a").unwrap();
    assert_eq!(mkdir("a").unwrap_err().kind(), Kind::Exists);
    mkdir("a/X.arrow").unwrap();
    bed.save("a/X.arrow/v1", b"1").unwrap();
    assert_eq!(bed.list("a"), ["X.arrow"]);
    assert_eq!(rmdir("a").unwrap_err().kind(), Kind::NotEmpty);
    let (parent, name) = bed.walk("a/X.arrow/v1").unwrap();
    bed.fs.unlink(parent, &name, ME).unwrap();
    assert_eq!(bed.list("a/X.arrow"), Vec::<String>::new(), "the directory stays when its last file goes");
    rmdir("a/X.arrow").unwrap();
    rmdir("a").unwrap();
    assert_eq!(bed.list(""), Vec::<String>::new());
    // Moving a directory moves every name below it.
    mkdir("d").unwrap();
    bed.save("d/t.arrow", &table_file(&[4])).unwrap();
    bed.fs.rename(ROOT, OsStr::new("d"), ROOT, OsStr::new("e"), 0, ME).unwrap();
    assert_eq!(column(&bed.load("e/t.arrow").unwrap()), [4]);
    assert_eq!(bed.list(""), ["e"]);
}

#[test]
fn unlinked_files_stay_readable_and_leave_nothing() {
    for passthrough in [true, false] {
        let bed = bed_with(passthrough, Options::default());
        bed.put_tensor("x", &vec![2.5; 100_000]);
        let reader = bed.open("x.npy", libc::O_RDONLY, OTHER).unwrap();
        bed.fs.unlink(ROOT, OsStr::new("x.npy"), ME).unwrap();
        assert_eq!(bed.load("x.npy").unwrap_err().kind(), Kind::NotFound);
        // Someone else takes the memory if it is free.
        bed.put_tensor("y", &vec![-1.0; 100_000]);
        let bytes = bed.read_handle(reader).unwrap();
        assert_eq!(bytes[bytes.len() - 8..], 2.5f64.to_le_bytes());
        bed.close(reader, OTHER).unwrap();
        bed.fs.unlink(ROOT, OsStr::new("y.npy"), ME).unwrap();
        assert_eq!((bed.store.object_count(), bed.store.blob_count()), (0, 0));
    }
}

#[test]
fn recycled_memory_is_never_served() {
    let bed = bed_with(false, Options::default());
    let id = bed.put_tensor("x", &vec![1.0; 100_000]);
    let reader = bed.open("x.npy", libc::O_RDONLY, OTHER).unwrap();
    bed.fs.read(reader.0, reader.1.fh, 0, 4096).unwrap();
    // Another client deletes it; the store gives its memory to the next.
    bed.store.delete(&[id]).unwrap();
    bed.put_tensor("z", &vec![9.0; 100_000]);
    assert_eq!(bed.fs.read(reader.0, reader.1.fh, 4096, 4096).unwrap_err().kind(), Kind::Stale);
}

#[test]
fn an_open_gets_the_newest_object() {
    let bed = bed();
    bed.put_tensor("x", &[1.0]);
    let stale = bed.lookup("x.npy", ME).unwrap();
    bed.put_tensor("x", &[2.0]);
    assert_eq!(bed.fs.open(stale.attr.ino, libc::O_RDONLY, ME).unwrap_err().kind(), Kind::Stale);
    let bytes = bed.load("x.npy").unwrap();
    assert_eq!(bytes[bytes.len() - 8..], 2.0f64.to_le_bytes());
}

#[test]
fn attributes_are_kept_with_the_dataset() {
    let bed = bed();
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    let entry = bed.lookup("t.arrow", ME).unwrap();
    assert_eq!((entry.attr.perm, entry.attr.uid, entry.attr.gid), (0o644, 7, 8));
    let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_234_567_891);
    let change = SetAttr { mode: Some(0o600), mtime: Some(time), ..Default::default() };
    bed.fs.setattr(entry.attr.ino, None, change, ME).unwrap();
    bed.fs.setxattr(entry.attr.ino, OsStr::new("user.note"), b"hi", 0, ME).unwrap();
    let second = FileSystem::new(bed.store.clone(), bed.host.clone(), Options::default());
    let entry = second.lookup(ROOT, OsStr::new("t.arrow"), ME).unwrap();
    assert_eq!((entry.attr.perm, entry.attr.mtime), (0o600, time));
    assert_eq!(second.getxattr(entry.attr.ino, OsStr::new("user.note")).unwrap(), b"hi");
    assert_eq!(second.getxattr(entry.attr.ino, OsStr::new("user.vineyard.name")).unwrap(), b"t");
    assert_eq!(second.getxattr(entry.attr.ino, OsStr::new("user.vineyard.rows")).unwrap(), b"1");
    let handle = second.open(entry.attr.ino, libc::O_RDONLY, ME).unwrap();
    second.release(entry.attr.ino, handle.fh);
    // Only one object is there: the changes left no copies behind.
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [1]);
}

#[test]
fn a_read_only_mount_changes_nothing() {
    let bed = bed_with(true, Options { read_only: true, ..Default::default() });
    bed.put_tensor("x", &[1.0]);
    let error = |result: Result<()>| assert_eq!(result.unwrap_err().kind(), Kind::ReadOnly);
    let ino = bed.lookup("x.npy", ME).unwrap().attr.ino;
    error(bed.fs.open(ino, libc::O_WRONLY, ME).map(drop));
    error(bed.fs.create(ROOT, OsStr::new("y"), 0o644, 0, libc::O_WRONLY, ME).map(drop));
    error(bed.fs.unlink(ROOT, OsStr::new("x.npy"), ME));
    error(bed.fs.mkdir(ROOT, OsStr::new("d"), 0o755, 0, ME).map(drop));
    error(bed.fs.rename(ROOT, OsStr::new("x.npy"), ROOT, OsStr::new("y.npy"), 0, ME));
    error(bed.fs.setattr(ino, None, SetAttr { mode: Some(0), ..Default::default() }, ME).map(drop));
    error(bed.fs.setxattr(ino, OsStr::new("user.a"), b"", 0, ME));
}

#[test]
fn a_prefix_is_a_root_of_its_own() {
    let bed = bed_with(true, Options { prefix: "runs/one".into(), ..Default::default() });
    bed.put_tensor("runs/one/x", &[1.0]);
    bed.put_tensor("runs/two/y", &[1.0]);
    bed.put_tensor("z", &[1.0]);
    assert_eq!(bed.list(""), ["x.npy"]);
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    let names = bed.store.names(&[crate::vineyard::store::NameQuery::Exact("runs/one/t".into())]).unwrap();
    assert_eq!(names[0].len(), 1);
    assert_eq!(bed.load("z.npy").unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn odd_names_are_all_listed_and_open() {
    let bed = bed();
    let long = "n".repeat(400);
    let names = ["", ".", "..", "a//b", "nul\0here", "new\nline", "100%", "%00", "ünï", "*?[x]", &long, "x", "x.npy"];
    for (i, name) in names.iter().enumerate() {
        bed.put_tensor(name, &[i as f64]);
    }
    let mut found = 0;
    let mut pending = vec![String::new()];
    while let Some(directory) = pending.pop() {
        for name in bed.list(&directory) {
            let path = if directory.is_empty() { name } else { format!("{directory}/{name}") };
            let entry = bed.lookup(&path, ME).unwrap_or_else(|e| panic!("{path:?}: {e}"));
            match entry.attr.kind {
                FileKind::Directory => pending.push(path),
                _ => {
                    let bytes = bed.load(&path).unwrap();
                    // "x" gives way to the plain "x.npy": it is listed by another of its views.
                    assert!(bytes.starts_with(b"\x93NUMPY") || path == "x.arrow", "{path:?}");
                    found += 1;
                }
            }
        }
    }
    assert_eq!(found, names.len());
}

#[test]
fn broken_objects_are_listed_and_the_rest_works() {
    let bed = bed();
    bed.put_tensor("good", &[1.0]);
    for (name, shape) in [("negative", "[-4]"), ("huge", "[9007199254740992, 4096]"), ("text", "nonsense")] {
        let blob = bed.store.put_blob(&[0; 8]).unwrap();
        let buffer = json!({"id": blob.id.to_string(), "typename": "vineyard::Blob", "instance_id": 0});
        let content = json!({"typename": "vineyard::Tensor<double>", "value_type_": "float64",
            "value_type_meta_": "<f8", "shape_": shape, "order_": "\"C\"", "buffer_": buffer});
        bed.store.put_object(name, content).unwrap();
    }
    // A shape that promises more than the blob holds shows only when it is opened.
    let blob = bed.store.put_blob(&[0; 8]).unwrap();
    let buffer = json!({"id": blob.id.to_string(), "typename": "vineyard::Blob", "instance_id": 0});
    let content = json!({"typename": "vineyard::Tensor<double>", "value_type_": "float64", "value_type_meta_": "<f8",
        "shape_": "[1000]", "order_": "\"C\"", "buffer_": buffer});
    bed.store.put_object("short", content).unwrap();
    bed.store.put_object("alien", json!({"typename": "graphscope::Thing"})).unwrap();
    assert_eq!(bed.list(""), ["alien", "good.npy", "huge", "negative", "short.npy", "text"]);
    for path in ["alien", "huge", "negative", "text", "short.npy"] {
        assert_eq!(bed.load(path).unwrap_err().errno(), libc::EIO, "{path}");
    }
    bed.load("good.npy").unwrap();
}

#[test]
fn the_cache_keeps_to_its_limit() {
    let bed = bed_with(true, Options { cache_size: 3 << 20, ..Default::default() });
    for i in 0..8 {
        bed.put_tensor(&format!("x{i}"), &vec![f64::from(i); 131_072]);
    }
    for i in 0..8 {
        let bytes = bed.load(&format!("x{i}.npy")).unwrap();
        assert_eq!(bytes[bytes.len() - 8..], f64::from(i).to_le_bytes());
        assert!(bed.fs.status()["cache"]["bytes"].as_u64().unwrap() <= 3 << 20);
    }
    assert_eq!(bed.host.files.lock().unwrap().len(), 2);
}

#[test]
fn a_new_server_knows_the_inodes_of_the_former_one() {
    let bed = bed();
    bed.put_tensor("d/x", &[1.0]);
    let directory = bed.lookup("d", ME).unwrap().attr.ino;
    let file = bed.lookup("d/x.npy", ME).unwrap().attr.ino;
    let next = FileSystem::new(bed.store.clone(), bed.host.clone(), Options::default());
    assert_eq!(next.getattr(file, None).unwrap().0.ino, file);
    assert_eq!(next.lookup(directory, OsStr::new("x.npy"), ME).unwrap().attr.ino, file);
    let bytes = next.read(file, 12345, 0, 4096).unwrap();
    assert_eq!(bytes[bytes.len() - 8..], 1.0f64.to_le_bytes());
    assert_eq!(next.getattr(99, None).unwrap_err().kind(), Kind::Stale);
}

#[test]
fn a_new_server_goes_on_with_images_and_half_written_files() {
    let bed = bed();
    bed.put_tensor("x", &vec![1.0; 100_000]);
    bed.save("done.arrow", &table_file(&[1])).unwrap();
    let reader = bed.open("x.npy", libc::O_RDONLY, OTHER).unwrap();
    let file = table_file(&[5, 6]);
    let writer = bed.create("t.arrow", ME).unwrap();
    bed.write(writer, 0, &file[..200]);
    // The former server is killed: it drops nothing.
    let Bed { fs, store, host } = bed;
    std::mem::forget(fs);
    let fs = FileSystem::new(store.clone(), host.clone(), Options::default());
    fs.adopt();
    let bed = Bed { fs, store, host };
    // An image that is open has to be served under the same id: the kernel refuses another.
    let again = bed.open("x.npy", libc::O_RDONLY, OTHER).unwrap();
    assert_eq!((again.0, again.1.serve), (reader.0, reader.1.serve));
    bed.write(writer, 0, &file);
    bed.close(writer, ME).unwrap();
    assert_eq!(bed.load("t.arrow").unwrap(), file);
    assert_eq!(column(&bed.load("done.arrow").unwrap()), [1]);
    // What was published is not dirty to the new server: a value of another client is seen.
    bed.put_tensor("done", &[2.0]);
    assert_eq!(bed.list(""), ["done.npy", "t.arrow", "x.npy"]);
}

#[test]
fn two_writers_of_one_name_end_with_one_whole_value() {
    let bed = bed();
    let first = bed.create("t.arrow", ME).unwrap();
    bed.write(first, 0, &table_file(&[1, 1, 1])[..64]);
    let second = bed.create("t.arrow", OTHER).unwrap();
    bed.write(second, 0, &table_file(&[2, 2]));
    bed.write(first, 0, &table_file(&[1, 1, 1]));
    bed.close(second, OTHER).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [2, 2]);
    bed.close(first, ME).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [1, 1, 1]);
    bed.fs.unlink(ROOT, OsStr::new("t.arrow"), ME).unwrap();
    assert_eq!((bed.store.object_count(), bed.store.blob_count()), (0, 0));
}
