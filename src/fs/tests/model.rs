//! Random operations on the filesystem and on a small model of one: both must agree, also across servers.

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::bed::*;
use super::*;

const FOLDERS: &[&str] = &["", "d", "d/e", "f"];
const FILES: &[&str] = &["a.bin", "b.txt", "t.arrow", "x.npy", "y.npy"];

#[derive(Clone, Debug)]
enum Step {
    Save(String, Vec<u8>),
    SaveTable(String, i64),
    /// Opened for writing without truncation; the bytes go to the offset.
    Patch(String, u64, Vec<u8>),
    Cut(String, u64),
    Load(String),
    Unlink(String),
    Rename(String, String),
    Mkdir(String),
    Rmdir(String),
    RenameFolder(String, String),
    Chmod(String, u32),
    /// Opened, and read after each step from then on.
    Hold(String),
    /// The file that is open for longest is closed.
    Close,
    /// The kernel forgets what is not open.
    Forget,
    /// The server is killed and another one takes over.
    NextServer,
    /// Another mount of the same store looks at everything.
    OtherMount,
}

/// What a plain filesystem would hold.
#[derive(Clone, Default, Debug)]
struct Model {
    files: BTreeMap<String, Vec<u8>>,
    folders: BTreeSet<String>,
    modes: BTreeMap<String, u32>,
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

impl Model {
    fn has_folder(&self, path: &str) -> bool {
        path.is_empty() || self.folders.contains(path)
    }

    fn below(&self, folder: &str) -> Vec<String> {
        let all = self.files.keys().chain(&self.folders);
        let inside = all.filter(|path| parent(path) == folder);
        let mut names: Vec<String> = inside.map(|path| path.rsplit('/').next().unwrap_or(path).to_owned()).collect();
        names.sort();
        names
    }

    /// What the operation answers, and its effect.
    fn step(&mut self, step: &Step) -> std::result::Result<(), Kind> {
        match step {
            Step::Save(path, data) => {
                if !self.has_folder(parent(path)) {
                    return Err(Kind::NotFound);
                }
                self.files.insert(path.clone(), data.clone());
            }
            Step::SaveTable(path, value) => return self.step(&Step::Save(path.clone(), table_file(&[*value]))),
            Step::Patch(path, offset, data) => {
                let bytes = self.files.get_mut(path).ok_or(Kind::NotFound)?;
                let end = *offset as usize + data.len();
                bytes.resize(bytes.len().max(end), 0);
                bytes[*offset as usize..end].copy_from_slice(data);
            }
            Step::Cut(path, size) => self.files.get_mut(path).ok_or(Kind::NotFound)?.resize(*size as usize, 0),
            Step::Load(path) | Step::Hold(path) => drop(self.files.get(path).ok_or(Kind::NotFound)?),
            Step::Unlink(path) => {
                self.files.remove(path).ok_or(Kind::NotFound)?;
                self.modes.remove(path);
            }
            Step::Rename(from, to) => {
                if !self.has_folder(parent(to)) {
                    return Err(Kind::NotFound);
                }
                let bytes = self.files.remove(from).ok_or(Kind::NotFound)?;
                self.files.insert(to.clone(), bytes);
                let mode = self.modes.remove(from);
                self.modes.remove(to);
                self.modes.extend(mode.map(|mode| (to.clone(), mode)));
            }
            Step::Mkdir(path) => {
                if !self.has_folder(parent(path)) {
                    return Err(Kind::NotFound);
                }
                if !self.folders.insert(path.clone()) {
                    return Err(Kind::Exists);
                }
            }
            Step::Rmdir(path) => {
                if !self.folders.contains(path) {
                    return Err(Kind::NotFound);
                }
                if !self.below(path).is_empty() {
                    return Err(Kind::NotEmpty);
                }
                self.folders.remove(path);
            }
            Step::RenameFolder(from, to) => {
                if !self.folders.contains(from) || !self.has_folder(parent(to)) {
                    return Err(Kind::NotFound);
                }
                if from == to {
                    return Ok(());
                }
                if self.folders.contains(to) && !self.below(to).is_empty() {
                    return Err(Kind::NotEmpty);
                }
                let moved = |path: &String| match path.strip_prefix(&format!("{from}/")) {
                    Some(rest) => format!("{to}/{rest}"),
                    None if path == from => to.clone(),
                    None => path.clone(),
                };
                self.files = self.files.iter().map(|(path, bytes)| (moved(path), bytes.clone())).collect();
                self.modes = self.modes.iter().map(|(path, mode)| (moved(path), *mode)).collect();
                self.folders = self.folders.iter().map(moved).collect();
            }
            Step::Chmod(path, mode) => {
                self.files.get(path).ok_or(Kind::NotFound)?;
                self.modes.insert(path.clone(), *mode);
            }
            Step::Close | Step::Forget | Step::NextServer | Step::OtherMount => {}
        }
        Ok(())
    }
}

/// A file that is held open: it stays as it was.
pub struct Held {
    handle: (u64, Opened),
    /// What the kernel reads by itself, as long as the file is open.
    file: Option<Arc<std::fs::File>>,
    bytes: Vec<u8>,
}

impl Held {
    pub fn open(bed: &Bed, path: &str) -> Result<Held> {
        let handle = bed.open(path, libc::O_RDONLY, OTHER)?;
        let file = match handle.1.serve {
            Serve::Passthrough(id) => Some(bed.host.backing(id)),
            _ => None,
        };
        Ok(Held { handle, file, bytes: bed.read_handle(handle)? })
    }

    pub fn check(&self, bed: &Bed) {
        use std::os::unix::fs::FileExt;
        let size = self.bytes.len();
        let bytes = match &self.file {
            Some(file) => {
                let mut bytes = vec![0; size];
                file.read_exact_at(&mut bytes, 0).unwrap();
                bytes
            }
            None => bed.read_handle(self.handle).unwrap(),
        };
        assert!(bytes == self.bytes, "bytes of a file that is open");
        assert_eq!(bed.fs.getattr(self.handle.0, Some(self.handle.1.fh)).unwrap().0.size, size as u64);
    }

    pub fn close(self, bed: &Bed) {
        bed.close(self.handle, OTHER).unwrap();
    }
}

/// The real one.
fn step(bed: &Bed, held: &mut Vec<Held>, step: &Step) -> Result<()> {
    match step {
        Step::Save(path, data) => bed.save(path, data),
        Step::SaveTable(path, value) => bed.save(path, &table_file(&[*value])),
        Step::Patch(path, offset, data) => {
            let handle = bed.open(path, libc::O_WRONLY, ME)?;
            bed.write(handle, *offset, data);
            bed.close(handle, ME)
        }
        Step::Cut(path, size) => {
            let change = SetAttr { size: Some(*size), ..SetAttr::default() };
            let cut = || bed.fs.setattr(bed.lookup(path, ME)?.attr.ino, None, change, ME).map(drop);
            // As the kernel does: looked up again once.
            asking_twice(cut)
        }
        Step::Load(path) => bed.load(path).map(drop),
        Step::Unlink(path) => {
            let (folder, name) = bed.walk(path)?;
            bed.fs.unlink(folder, &name, ME)
        }
        Step::Rename(from, to) | Step::RenameFolder(from, to) => {
            let ((folder, name), (new_folder, new_name)) = (bed.walk(from)?, bed.walk(to)?);
            bed.fs.rename(folder, &name, new_folder, &new_name, 0, ME)
        }
        Step::Mkdir(path) => {
            let (folder, name) = bed.walk(path)?;
            bed.fs.mkdir(folder, &name, 0o755, 0o022, ME).map(drop)
        }
        Step::Rmdir(path) => {
            let (folder, name) = bed.walk(path)?;
            bed.fs.rmdir(folder, &name, ME)
        }
        Step::Chmod(path, mode) => {
            let change = SetAttr { mode: Some(*mode), ..SetAttr::default() };
            bed.fs.setattr(bed.lookup(path, ME)?.attr.ino, None, change, ME).map(drop)
        }
        Step::Hold(path) => Held::open(bed, path).map(|open| held.push(open)),
        Step::Close => {
            if !held.is_empty() {
                held.remove(0).close(bed);
            }
            Ok(())
        }
        Step::Forget => {
            bed.forget();
            Ok(())
        }
        Step::NextServer | Step::OtherMount => Ok(()),
    }
}

pub fn next_server(bed: Bed, epoch: u64) -> Bed {
    next_server_with(bed, Options { epoch, ..Options::default() })
}

pub fn next_server_with(bed: Bed, options: Options) -> Bed {
    let Bed { fs, store, host, .. } = bed;
    let waiting = fs.doomed.lock().unwrap().clone();
    // Killed: it drops nothing.
    std::mem::forget(fs);
    let fs = FileSystem::new(store.clone(), host.clone(), options);
    fs.adopt();
    // The journal of a real store tells what was to be deleted.
    fs.doomed.lock().unwrap().extend(waiting);
    Bed::of(fs, store, host)
}

/// Another mount: nothing but the store in common.
fn other_mount(bed: &Bed) -> Bed {
    let host = Arc::new(LocalHost { passthrough: true, next: AtomicU64::new(1), ..LocalHost::default() });
    Bed::of(FileSystem::new(bed.store.clone(), host.clone(), Options::default()), bed.store.clone(), host)
}

/// Everything that can be seen; `all` also what only this mount knows.
fn compare(bed: &Bed, model: &Model, all: bool) {
    for folder in FOLDERS.iter().filter(|folder| all && model.has_folder(folder)) {
        assert_eq!(bed.list(folder), model.below(folder), "names in {folder:?}");
    }
    for (path, bytes) in &model.files {
        assert!(&bed.load(path).unwrap() == bytes, "bytes of {path}");
        if let Some(mode) = model.modes.get(path) {
            assert_eq!(u32::from(bed.lookup(path, ME).unwrap().attr.perm), *mode, "mode of {path}");
        }
    }
}

fn path() -> impl Strategy<Value = String> {
    (select(FOLDERS), select(FILES)).prop_map(|(folder, file)| name::join(folder, file))
}

fn plain() -> impl Strategy<Value = String> {
    (select(FOLDERS), select(&FILES[..2])).prop_map(|(folder, file)| name::join(folder, file))
}

fn folder() -> impl Strategy<Value = String> {
    select(&FOLDERS[1..]).prop_map(str::to_owned)
}

/// Never empty: an empty file under a view's name means nothing yet, and replaces nothing.
fn data() -> impl Strategy<Value = Vec<u8>> {
    (any::<u8>(), select(&[1usize, 10, 3000, 100_000][..])).prop_map(|(byte, length)| vec![byte; length])
}

/// The kernel refuses to move a folder into itself, and onto what it lies in.
fn apart((from, to): &(String, String)) -> bool {
    !to.starts_with(&format!("{from}/")) && !from.starts_with(&format!("{to}/"))
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (path(), data()).prop_map(|(path, data)| Step::Save(path, data)),
        3 => (path(), any::<i64>()).prop_map(|(path, value)| Step::SaveTable(path, value)),
        2 => (plain(), 0..5000u64, data()).prop_map(|(path, offset, data)| Step::Patch(path, offset, data)),
        2 => (plain(), 0..5000u64).prop_map(|(path, size)| Step::Cut(path, size)),
        3 => path().prop_map(Step::Load),
        3 => path().prop_map(Step::Unlink),
        4 => (path(), path()).prop_map(|(from, to)| Step::Rename(from, to)),
        3 => folder().prop_map(Step::Mkdir),
        2 => folder().prop_map(Step::Rmdir),
        2 => (folder(), folder()).prop_filter("apart", apart).prop_map(|(from, to)| Step::RenameFolder(from, to)),
        2 => (path(), select(&[0o600u32, 0o644, 0o755][..])).prop_map(|(path, mode)| Step::Chmod(path, mode)),
        4 => path().prop_map(Step::Hold),
        2 => Just(Step::Close),
        1 => Just(Step::Forget),
        3 => Just(Step::NextServer),
        1 => Just(Step::OtherMount),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 300, ..ProptestConfig::default() })]

    #[test]
    fn the_filesystem_does_what_a_plain_one_does(steps in vec(any_step(), 1..40), passthrough in any::<bool>()) {
        let mut bed = bed_with(passthrough, Options::default());
        let mut model = Model::default();
        let mut held = Vec::new();
        // What another client has put: one file that is worth a memory file, and one that is not.
        for (name, length) in [("x", 20_000), ("y", 100)] {
            bed.put_tensor(name, &(0..length).map(f64::from).collect::<Vec<_>>());
            let path = format!("{name}.npy");
            model.files.insert(path.clone(), other_mount(&bed).load(&path).unwrap());
        }
        for (number, each) in steps.iter().enumerate() {
            let expected = model.step(each).err();
            let got = step(&bed, &mut held, each).err().map(|error| error.kind());
            prop_assert_eq!(got, expected, "{} {:?}", number, each);
            match each {
                Step::NextServer => bed = next_server(bed, number as u64 + 1),
                Step::OtherMount => compare(&other_mount(&bed), &model, false),
                _ => {}
            }
            compare(&bed, &model, true);
            held.iter().for_each(|open| open.check(&bed));
        }
        held.into_iter().for_each(|open| open.close(&bed));
        for path in model.files.keys() {
            let (folder, name) = bed.walk(path).unwrap();
            bed.fs.unlink(folder, &name, ME).unwrap();
        }
        prop_assert_eq!((bed.store.object_count(), bed.store.blob_count()), (0, 0), "nothing is left over");
    }
}
