//! A filesystem over a store in this process, called as the kernel calls it.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use serde_json::json;

use super::super::*;
use crate::sync::Mutex;
use crate::vineyard::fake::FakeStore;

/// Memory files of this process; "passthrough" hands out made-up ids.
#[derive(Default)]
pub struct LocalHost {
    pub passthrough: bool,
    pub next: AtomicU64,
    pub files: Mutex<HashMap<u64, Arc<File>>>,
    pub tags: Mutex<HashMap<u64, (Area, String)>>,
    pub notes: Mutex<HashMap<String, String>>,
    /// Whoever holds it lets everybody wait who needs a memory file.
    pub gate: Mutex<()>,
    /// Counts the steps of a server that is about to be killed.
    pub store: Option<Arc<FakeStore>>,
    /// What the kernel knows: how inodes are served that are open, and their handles.
    pub open: Mutex<HashMap<u64, (Serve, HashSet<u64>)>>,
    /// Numbers of inodes that were looked up.
    pub known: Mutex<HashSet<u64>>,
    /// How often each was, and how many are about to use it: the kernel does not forget it before.
    pub references: Mutex<HashMap<u64, (u64, u64)>>,
    /// Files that it was told to look up again: number of the directory and name.
    pub told: Mutex<Vec<(u64, OsString)>>,
}

impl LocalHost {
    /// The kernel serves an inode in one way, from one file, as long as anybody has it open: what it would answer with EIO
    /// ends the test.
    pub fn opened(&self, ino: u64, opened: Opened) {
        let mut open = self.open.lock().unwrap();
        let (serve, handles) = open.entry(ino).or_insert_with(|| (opened.serve, HashSet::new()));
        let by_kernel = |serve| matches!(serve, Serve::Passthrough(_));
        let mixes = if by_kernel(*serve) { *serve == opened.serve } else { !by_kernel(opened.serve) };
        assert!(mixes, "inode {ino:#x} is open as {serve:?}, and not to be opened as {:?}", opened.serve);
        assert!(handles.insert(opened.fh), "a handle is given out twice");
    }
    fn closed(&self, ino: u64, fh: u64) {
        let mut open = self.open.lock().unwrap();
        if let Some((_, handles)) = open.get_mut(&ino) {
            handles.remove(&fh);
            if handles.is_empty() {
                open.remove(&ino);
            }
        }
    }
    /// Number of assembled images.
    pub fn images(&self) -> usize {
        self.tags.lock().unwrap().values().filter(|(_, tag)| tag.contains(r#""is":"image""#)).count()
    }
    /// The memory file of a backing id.
    pub fn backing(&self, id: u32) -> Arc<File> {
        self.files.lock().unwrap()[&u64::from(id)].clone()
    }
    fn step(&self) -> bool {
        self.store.as_ref().is_none_or(|store| store.step())
    }
}

impl Host for LocalHost {
    fn serving(&self) -> Serving {
        if self.passthrough { Serving::Passthrough } else { Serving::Requests("a test".into()) }
    }
    fn create_file(&self, area: Area, size: u64) -> Result<HostFile> {
        if !self.step() {
            return Err(Error::new(Kind::Timeout, "the caller is dead"));
        }
        drop(self.gate.lock().unwrap());
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        let file = nix::sys::memfd::memfd_create("test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
        let file = Arc::new(File::from(file));
        file.set_len(size)?;
        self.files.lock().unwrap().insert(key, file.clone());
        self.tags.lock().unwrap().insert(key, (area, String::new()));
        Ok(HostFile { key, file, backing: self.passthrough.then_some(key as u32) })
    }
    fn tag_file(&self, key: u64, tag: &str) {
        if self.step() {
            self.tags.lock().unwrap().get_mut(&key).unwrap().1 = tag.to_owned();
        }
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
            _ if !self.step() => {}
            Some(text) => drop(notes.insert(key.to_owned(), text.to_owned())),
            None => drop(notes.remove(key)),
        }
    }
    fn notes(&self) -> Result<Vec<(String, String)>> {
        Ok(self.notes.lock().unwrap().clone().into_iter().collect())
    }
    fn release_file(&self, key: u64) {
        if !self.step() {
            return;
        }
        self.tags.lock().unwrap().remove(&key);
        assert!(self.files.lock().unwrap().remove(&key).is_some(), "file {key} is released once");
    }
    fn invalidate_entry(&self, parent: u64, name: &OsStr) {
        self.told.lock().unwrap().push((parent, name.to_owned()));
    }
    fn invalidate_inode(&self, _ino: u64) {}
}

pub struct Bed {
    pub fs: FileSystem,
    pub store: Arc<FakeStore>,
    pub host: Arc<LocalHost>,
    /// The kernel's lock on the root: held for whatever changes names there, and while one that is not known is looked up.
    pub directory: Mutex<()>,
    /// Those on other directories, and whether each was removed through this kernel.
    pub directories: Mutex<HashMap<u64, Arc<Mutex<bool>>>>,
    /// Which directory it knows under a name in another.
    pub dentries: Mutex<HashMap<(u64, String), u64>>,
    /// The kernel's lock on an inode that is written.
    pub written: Mutex<()>,
}

pub const ME: Caller = Caller { uid: 7, gid: 8, pid: 100, resent: false, request: 0 };
pub const OTHER: Caller = Caller { uid: 7, gid: 8, pid: 200, resent: false, request: 0 };

pub fn bed_with(passthrough: bool, options: Options) -> Bed {
    bed_over(FakeStore::new(64 << 20), passthrough, options)
}

pub fn bed_over(store: FakeStore, passthrough: bool, options: Options) -> Bed {
    let store = Arc::new(store);
    let host = Arc::new(LocalHost {
        passthrough,
        next: AtomicU64::new(1),
        store: Some(store.clone()),
        ..LocalHost::default()
    });
    let fs = FileSystem::new(store.clone(), host.clone(), options);
    Bed::of(fs, store, host)
}

pub fn bed() -> Bed {
    bed_with(true, Options::default())
}

/// As the kernel asks: once more after `Stale` (`retry_estale`).
pub fn asking_twice<T>(ask: impl Fn() -> Result<T>) -> Result<T> {
    ask().or_else(|error| if error.kind() == Kind::Stale { ask() } else { Err(error) })
}

impl Bed {
    pub fn of(fs: FileSystem, store: Arc<FakeStore>, host: Arc<LocalHost>) -> Bed {
        Bed {
            fs,
            store,
            host,
            directory: Mutex::default(),
            directories: Mutex::default(),
            dentries: Mutex::default(),
            written: Mutex::default(),
        }
    }
    /// Does something in a directory that the kernel locks for it; `NotFound` if it was removed.
    pub fn in_directory<T>(&self, ino: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if ino == ROOT {
            let _root = self.directory.lock().unwrap();
            return work();
        }
        let lock = self.directories.lock().unwrap().entry(ino).or_default().clone();
        let removed = lock.lock().unwrap();
        if *removed { Err(Error::not_found("the directory was removed")) } else { work() }
    }
    pub fn walk(&self, path: &str) -> Result<(u64, OsString)> {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let mut ino = ROOT;
        for part in directory.split('/').filter(|part| !part.is_empty()) {
            ino = self.step_into(ino, part)?;
            self.host.known.lock().unwrap().insert(ino);
        }
        Ok((ino, name.into()))
    }
    /// A directory that the kernel knows is looked up again without a lock (`fuse_dentry_revalidate`), and with one if it
    /// is another.
    fn step_into(&self, parent: u64, part: &str) -> Result<u64> {
        let lookup = || self.fs.lookup(parent, OsStr::new(part), ME).map(|entry| entry.attr.ino);
        let key = (parent, part.to_owned());
        let known = self.dentries.lock().unwrap().get(&key).copied();
        if let Some(known) = known
            && lookup().ok() == Some(known)
        {
            return Ok(known);
        }
        self.in_directory(parent, || {
            let ino = lookup()?;
            self.dentries.lock().unwrap().insert(key.clone(), ino);
            Ok(ino)
        })
    }
    /// Without the lock on the directory, as the kernel looks up again what it knows (`fuse_dentry_revalidate`).
    pub fn lookup(&self, path: &str, caller: Caller) -> Result<Entry> {
        let (parent, name) = self.walk(path)?;
        let entry = self.fs.lookup(parent, &name, caller)?;
        self.host.known.lock().unwrap().insert(entry.attr.ino);
        self.refer(entry.attr.ino, 1, 0);
        Ok(entry)
    }
    fn refer(&self, ino: u64, lookups: u64, pins: i64) {
        let mut references = self.host.references.lock().unwrap();
        let (count, pinned) = references.entry(ino).or_default();
        *count += lookups;
        *pinned = pinned.checked_add_signed(pins).unwrap();
    }
    /// The kernel forgets all that is not open.
    pub fn forget(&self) {
        let known = std::mem::take(&mut *self.host.known.lock().unwrap());
        for ino in known {
            let is_open = self.host.open.lock().unwrap().contains_key(&ino);
            if is_open {
                self.host.known.lock().unwrap().insert(ino);
            } else {
                self.fs.forget(ino, u64::MAX);
            }
        }
    }
    /// As the kernel opens: lookup, open, and once more after `Stale`.
    pub fn open(&self, path: &str, flags: i32, caller: Caller) -> Result<(u64, Opened)> {
        let open = || -> Result<(u64, Opened)> {
            let entry = {
                let (parent, name) = self.walk(path)?;
                self.fs.lookup(parent, &name, caller)?
            };
            let ino = entry.attr.ino;
            self.host.known.lock().unwrap().insert(ino);
            self.refer(ino, 1, 1);
            let opened = self.open_inode(ino, flags, caller);
            self.refer(ino, 0, -1);
            Ok((ino, opened?))
        };
        asking_twice(open)
    }
    pub fn open_inode(&self, ino: u64, flags: i32, caller: Caller) -> Result<Opened> {
        let opened = self.fs.open(ino, flags, caller)?;
        self.host.opened(ino, opened);
        Ok(opened)
    }
    pub fn create(&self, path: &str, caller: Caller) -> Result<(u64, Opened)> {
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC;
        let mut asked_twice = false;
        loop {
            let (parent, name) = self.walk(path)?;
            let found = self.in_directory(parent, || match self.fs.lookup(parent, &name, caller) {
                Ok(entry) => Ok((entry.attr.ino, None)),
                Err(error) if error.kind() == Kind::NotFound => {
                    let (entry, opened) = self.fs.create(parent, &name, 0o644, 0o022, flags, caller)?;
                    self.host.known.lock().unwrap().insert(entry.attr.ino);
                    self.host.opened(entry.attr.ino, opened);
                    Ok((entry.attr.ino, Some(opened)))
                }
                Err(error) => Err(error),
            });
            let ino = match found? {
                (ino, Some(opened)) => return Ok((ino, opened)),
                (ino, None) => ino,
            };
            match self.open_inode(ino, libc::O_WRONLY | libc::O_TRUNC, caller) {
                Err(error) if error.kind() == Kind::Stale && !asked_twice => asked_twice = true,
                opened => return Ok((ino, opened?)),
            }
        }
    }
    /// Writes as whoever has the handle: through the memory file if the kernel would.
    pub fn write(&self, (ino, opened): (u64, Opened), offset: u64, data: &[u8]) {
        match opened.serve {
            Serve::Passthrough(id) => {
                use std::os::unix::fs::FileExt;
                let file = self.host.backing(id);
                file.write_all_at(data, offset).unwrap();
            }
            _ => assert_eq!(self.fs.write(ino, opened.fh, offset, data).unwrap() as usize, data.len()),
        }
    }
    /// As the kernel writes what is opened with `O_APPEND`.
    pub fn append(&self, handle: (u64, Opened), data: &[u8]) {
        let _written = self.written.lock().unwrap();
        let (attr, _) = self.fs.getattr(handle.0, None).unwrap();
        self.write(handle, attr.size, data);
    }
    /// As a program that opens a file for each line.
    pub fn append_line(&self, path: &str, line: &str, caller: Caller) -> Result<()> {
        let handle = self.open(path, libc::O_WRONLY | libc::O_APPEND, caller)?;
        self.append(handle, line.as_bytes());
        self.close(handle, caller)
    }
    pub fn close(&self, (ino, opened): (u64, Opened), caller: Caller) -> Result<()> {
        let result = if opened.no_flush { Ok(()) } else { self.fs.flush(ino, opened.fh, caller) };
        self.host.closed(ino, opened.fh);
        self.fs.release(ino, opened.fh);
        result
    }
    pub fn save(&self, path: &str, data: &[u8]) -> Result<()> {
        self.save_as(path, data, ME)
    }
    pub fn save_as(&self, path: &str, data: &[u8], caller: Caller) -> Result<()> {
        let handle = self.create(path, caller)?;
        self.write(handle, 0, data);
        self.close(handle, caller)
    }
    pub fn read_handle(&self, (ino, opened): (u64, Opened)) -> Result<Vec<u8>> {
        match opened.serve {
            Serve::Passthrough(id) => {
                use std::os::unix::fs::FileExt;
                let file = self.host.backing(id);
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
                    out.extend_from_slice(&part);
                }
            }
        }
    }
    pub fn load(&self, path: &str) -> Result<Vec<u8>> {
        self.load_as(path, OTHER)
    }
    pub fn load_as(&self, path: &str, caller: Caller) -> Result<Vec<u8>> {
        let handle = self.open(path, libc::O_RDONLY, caller)?;
        let bytes = self.read_handle(handle)?;
        let (attr, _) = self.fs.getattr(handle.0, None)?;
        assert_eq!(attr.size, bytes.len() as u64, "size of {path}");
        self.close(handle, caller)?;
        Ok(bytes)
    }
    pub fn list(&self, path: &str) -> Vec<String> {
        let ino = if path.is_empty() { ROOT } else { self.lookup(path, ME).unwrap().attr.ino };
        let fh = self.fs.opendir(ino).unwrap();
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
    pub fn put_tensor(&self, name: &str, values: &[f64]) -> ObjectId {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let blob = self.store.put_blob(&bytes).unwrap();
        let content = json!({"typename": "vineyard::Tensor<double>", "value_type_": "float64",
            "value_type_meta_": "<f8", "shape_": format!("[{}]", values.len()), "partition_index_": "[]",
            "order_": "\"C\"", "buffer_": {"id": blob.id.to_string(), "typename": "vineyard::Blob",
            "instance_id": blob.instance.0}});
        self.store.put_object(name, content).unwrap()
    }
}

pub fn table_file(values: &[i64]) -> Vec<u8> {
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

pub fn column(file: &[u8]) -> Vec<i64> {
    let reader = arrow_ipc::reader::FileReader::try_new(std::io::Cursor::new(file), None).unwrap();
    reader
        .flat_map(|batch| {
            let batch = batch.unwrap();
            batch.column(0).as_any().downcast_ref::<Int64Array>().unwrap().values().to_vec()
        })
        .collect()
}
