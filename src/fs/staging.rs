//! Files that are being written: memory files of the host's, until they are published and after.
//!
//! A staged file is the inode that its writers work on. Readers of the same path go on with the published version while
//! a writer has it open. Once published, and closed by its writers, the memory file *is* the image of what was written:
//! it is never changed again, and a later writer gets a file of its own.
//!
//! With passthrough the kernel writes the memory file by itself: what was written shows only in its size and times.

use std::collections::HashMap;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, UNIX_EPOCH};

mod displaced;
mod note;
mod redirects;
mod room;

pub(super) use self::note::{StagedNote, Writer, Writers};
use self::redirects::Redirect;
pub use self::room::StagingStatus;
use super::buffer::Buffer;
use super::host::MemoryFile;
use super::inode::STAGED;
use super::name::is_inside;
use super::resolve::Target;
use super::{Attr, FileKind, Options};
use crate::cgroup;
use crate::dataset::FileAttributes;
use crate::dataset::attributes::{from_nanos, to_nanos};
use crate::error::{Context, Error, Kind, Result};
use crate::sync::{Mutex, MutexGuard};
use crate::vineyard::ObjectId;
use crate::vineyard::store::NamedObject;

/// How long a thread that was sent elsewhere may take to look the name up again and come there: on a machine that is busy
/// far beyond its means, seconds pass between two steps. Only for threads that died meanwhile is it ever waited for.
pub(super) const REDIRECT: Duration = Duration::from_secs(30);
/// The coarsest clock tick that file times may have: a change within it may not show.
const CLOCK_TICK: Duration = Duration::from_millis(20);

/// Size and times of a memory file at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Stamp {
    pub size: u64,
    pub mtime: i64,
    pub ctime: i64,
}

/// What changes about a staged file.
#[derive(Debug)]
pub(super) struct State {
    /// Where it will be published.
    pub target: Target,
    /// Kept with the object.
    pub attributes: FileAttributes,
    /// Attributes changed since they were stored.
    pub attributes_changed: bool,
    /// Open handles for writing, and the threads that opened them.
    pub writers: Writers,
    /// Threads that were led here to write, and have not come yet, with the time.
    pub expected: Vec<(u32, Instant)>,
    /// When a thread was led here that had come already: another writer may follow.
    pub lingers: Option<Instant>,
    /// A former server did not say whether anybody has it open for writing.
    pub writers_unknown: bool,
    /// A former server did not say whether anybody has it open for reading.
    pub readers_unknown: bool,
    /// Open handles.
    pub opens: u64,
    /// Somebody opened it: the kernel followed the way it was sent.
    pub was_opened: bool,
    /// The backing id by which its open handles are served, if they are; one inode is served in one way at a time.
    pub passthrough: Option<u32>,
    /// The process that was sent to look for it, and has not come yet: nobody else meets it.
    pub reserved_for: Option<u32>,
    /// Its last writer is being closed: it is not decided yet what becomes of it.
    pub settling: bool,
    /// It is being published or moved: its name may not lead to what is in `published`.
    pub repointing: bool,
    /// The process that closed a descriptor of it last.
    pub closed_by: Option<u32>,
    /// Someone had it open for reading and writing: a shared mapping may still change it, unseen.
    pub shared_writable: bool,
    /// Someone opened it for reading, or may do so because it serves as the image of what it was published as: its bytes
    /// must not change any more once it is published.
    pub had_readers: bool,
    /// The inode number that `stat` tells, that of the version before; its own if `None`.
    pub shown: Option<u64>,
    /// The published version that this file replaces.
    pub replaces: Option<(String, ObjectId)>,
    /// The file as it was when it was last published, and a hash of its bytes if it may change unseen by its times.
    pub clean: Option<(Stamp, Option<u64>)>,
    /// Name and object it was published as.
    pub published: Option<(String, ObjectId)>,
    /// The view of `published` that is these very bytes, if it is known.
    pub written_view: Option<crate::image::View>,
    /// What it serves as the image of, if it does: object and view.
    pub image: Option<(ObjectId, crate::image::View)>,
    /// Why publishing failed last.
    pub failed: Option<String>,
    /// Removed or replaced: nothing may be published any more.
    pub detached: bool,
    /// The store has it all: the path leads to the published view from now on, and nobody may open this file again.
    pub retired: bool,
    /// It was at another path before.
    pub moved: bool,
    /// Its path leads to something else. Who has it open goes on with it, and may still publish it.
    pub displaced: bool,
}

/// A staged file.
#[derive(Debug)]
pub struct Staged {
    ino: u64,
    made: Instant,
    file: Arc<MemoryFile>,
    state: Mutex<State>,
    /// Held while publishing or copying: the same file is published by one thread at a time, and not cut meanwhile.
    pub(super) publishing: Mutex<()>,
    /// Held while a note of it is made and sent: the last one made is the last one sent.
    pub(super) noting: Mutex<()>,
}

impl Staged {
    /// Inode number.
    pub fn ino(&self) -> u64 {
        self.ino
    }

    /// True if nobody has it open and the store has all of it, so that the kernel may forget it.
    pub(super) fn is_settled(&self) -> bool {
        let idle = {
            let state = self.state();
            let came = state.was_opened || self.made.elapsed() > REDIRECT;
            state.opens == 0 && state.published.is_some() && came && !state.has_writers()
        };
        idle && !self.is_dirty().unwrap_or(true)
    }

    /// Waits a moment for closes that are on their way: the last step of a close comes after the program went on.
    pub(super) fn await_closes(&self) {
        drop(self.wait_until(200, |state| state.writers.is_empty() && !state.settling));
    }

    /// Waits until something is so, for so many milliseconds at most; returns the state as it is then.
    pub(super) fn wait_until(&self, most_ms: u32, is_so: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        for _ in 0..most_ms {
            let state = self.state();
            if is_so(&state) {
                return state;
            }
            drop(state);
            std::thread::sleep(Duration::from_millis(1));
        }
        self.state()
    }

    pub(super) fn file(&self) -> &Arc<MemoryFile> {
        &self.file
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn stamp(&self) -> Result<Stamp> {
        let meta = self.file.file.metadata().context(|| "stat of a staging file".into())?;
        let nanos = |seconds: i64, nanos: i64| seconds.saturating_mul(1_000_000_000).saturating_add(nanos);
        Ok(Stamp {
            size: meta.size(),
            mtime: nanos(meta.mtime(), meta.mtime_nsec()),
            ctime: nanos(meta.ctime(), meta.ctime_nsec()),
        })
    }

    /// Whether its bytes may differ from what was published last.
    pub(super) fn is_dirty(&self) -> Result<bool> {
        let stamp = self.stamp()?;
        let clean = self.state().clean;
        let Some((published, hash)) = clean else { return Ok(true) };
        if stamp != published {
            return Ok(true);
        }
        match hash {
            Some(hash) => Ok(self.hash()? != hash),
            None => Ok(false),
        }
    }

    /// Remembers that what is published is what the file held when `stamp` was taken.
    pub(super) fn mark_clean(&self, stamp: Stamp) -> Result<()> {
        let shared = self.state().shared_writable;
        let changed = UNIX_EPOCH + Duration::from_nanos(u64::try_from(stamp.mtime.max(0)).unwrap_or(0));
        // Where times are kept in coarse ticks, a write in the same tick would leave them as they are.
        let unseen = !FINE_TIMES.get().copied().unwrap_or(false) && changed.elapsed().is_ok_and(|age| age < CLOCK_TICK);
        let hash = if shared || unseen { Some(self.hash()?) } else { None };
        self.state().clean = Some((stamp, hash));
        super::adopt::note_staged(self);
        Ok(())
    }

    /// A hash of all bytes.
    pub(super) fn hash(&self) -> Result<u64> {
        use std::hash::Hasher;
        let mut hasher = twox_hash::XxHash64::with_seed(0);
        let mut chunk = vec![0; 1 << 20];
        let mut at = 0;
        loop {
            let n = self.file.file.read_at(&mut chunk, at)?;
            if n == 0 {
                return Ok(hasher.finish());
            }
            hasher.write(&chunk[..n]);
            at += n as u64;
        }
    }

    /// Name and object it was published as, if it was.
    pub fn published(&self) -> Option<(String, ObjectId)> {
        self.state().published.clone()
    }

    /// Attributes that are kept with the object.
    pub fn attributes(&self) -> FileAttributes {
        self.state().attributes.clone()
    }

    /// Name and object that it was published as, if nobody writes it and the store has all of it.
    pub(super) fn settled_version(&self) -> Option<NamedObject> {
        let (published, clean) = {
            let state = self.state();
            (state.published.clone(), state.clean.filter(|_| state.writers.is_empty()))
        };
        let (stamp, ..) = clean?;
        published.filter(|_| self.stamp().is_ok_and(|now| now == stamp))
    }

    pub(super) fn attr(&self, options: &Options) -> Result<Attr> {
        let stamp = self.stamp()?;
        let state = self.state();
        let changed = from_nanos(stamp.mtime);
        // A time that was set by hand holds until the next write.
        let mtime = match (state.attributes.mtime, &state.clean) {
            (Some(mtime), _) if to_nanos(changed) <= mtime || state.attributes_changed => from_nanos(mtime),
            (Some(mtime), Some((clean, ..))) if *clean == stamp => from_nanos(mtime),
            _ => changed,
        };
        Ok(Attr {
            ino: self.ino,
            kind: FileKind::File,
            size: stamp.size,
            perm: state.attributes.mode.unwrap_or(options.file_mode),
            nlink: u32::from(!state.detached),
            uid: state.attributes.uid.unwrap_or(options.uid),
            gid: state.attributes.gid.unwrap_or(options.gid),
            atime: state.attributes.atime.map_or(mtime, from_nanos),
            mtime,
            ctime: from_nanos(state.attributes.ctime.map_or(stamp.ctime, |ctime| ctime.max(stamp.ctime))),
        })
    }

    pub(super) fn read(&self, offset: u64, size: u32) -> Result<Buffer> {
        let mut out = Buffer::new(size as usize);
        let mut filled = 0;
        while filled < out.len() {
            match self.file.file.read_at(&mut out[filled..], offset + filled as u64)? {
                0 => break,
                n => filled += n,
            }
        }
        out.truncate(filled);
        Ok(out)
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<u32> {
        cgroup::room_for(data.len() as u64)?;
        self.state().clean = None;
        self.file.file.write_all_at(data, offset).map_err(full)?;
        Ok(data.len() as u32)
    }

    /// Waits for a publish under way: it has the file mapped, and what reads a mapping past the end of its file dies.
    /// False, and nothing is done, if the bytes must not change any more.
    pub(super) fn truncate(&self, size: u64) -> Result<bool> {
        let _publishing = self.publishing.lock().unwrap_or_else(|e| e.into_inner());
        {
            let mut state = self.state();
            if state.is_final() {
                return Ok(false);
            }
            state.clean = None;
        }
        self.file.file.set_len(size).map_err(full)?;
        Ok(true)
    }
}

/// Whether two writes with a look at the file in between always show in its times: multigrain timestamps, Linux 6.13.
static FINE_TIMES: std::sync::OnceLock<bool> = std::sync::OnceLock::new();

/// Finds out about the file's times, on a file that is still empty.
fn try_times(file: &std::fs::File) -> std::io::Result<bool> {
    let mut seen = Vec::new();
    for _ in 0..8 {
        file.write_all_at(&[0], 0)?;
        let meta = file.metadata()?;
        seen.push((meta.mtime(), meta.mtime_nsec()));
    }
    file.set_len(0)?;
    seen.dedup();
    Ok(seen.len() == 8)
}

/// Says what a full staging area means.
pub(super) fn full(error: std::io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOSPC) => Error::new(
            Kind::Full,
            "the staging area is full; raise --staging-size or close and remove files that failed to publish",
        ),
        _ => error.into(),
    }
}

/// Where a staged file is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Place {
    /// At its path.
    Path,
    /// By its number only; it may still be published.
    Displaced,
    /// By its number only, and it is nothing but bytes.
    Gone,
}

/// A staged file as a listing shows it.
#[derive(Debug)]
pub(super) struct StagedEntry {
    /// Its file name.
    pub component: String,
    /// Names of the published datasets that it stands for.
    pub datasets: [String; 2],
    pub file: Arc<Staged>,
}

/// All staged files, by path.
pub struct Staging {
    by_path: Mutex<HashMap<String, Arc<Staged>>>,
    /// Files that were displaced from their paths, as long as somebody has them open.
    displaced: Mutex<Vec<Weak<Staged>>>,
    /// Files of former servers that were removed or replaced while they were open, by inode number.
    gone: Mutex<HashMap<u64, Arc<Staged>>>,
    redirects: Mutex<HashMap<(String, u32), Redirect>>,
    /// Files for writers that were sent to look again, by path and process. Nobody else meets one before it is opened,
    /// so however many write one path at the same time, each finds its own.
    reserved: Mutex<Vec<(String, u32, Arc<Staged>)>>,
    /// Bytes of files that were settled since old ones were looked for.
    settled: AtomicU64,
    next: AtomicU64,
}

impl Staging {
    /// Nothing staged; inode numbers start above `start`, which is below 2^61.
    pub fn new(start: u64) -> Self {
        Staging {
            by_path: Mutex::default(),
            displaced: Mutex::default(),
            gone: Mutex::default(),
            redirects: Mutex::default(),
            reserved: Mutex::default(),
            settled: AtomicU64::new(0),
            next: AtomicU64::new(start),
        }
    }

    fn by_path(&self) -> MutexGuard<'_, HashMap<String, Arc<Staged>>> {
        self.by_path.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The staged file at a path.
    pub fn at(&self, path: &str) -> Option<Arc<Staged>> {
        self.by_path().get(path).cloned()
    }

    /// A new staged file of an empty memory file, that nobody meets and the next server does not hear of before it is
    /// [shown](Self::show): until then its bytes may be put together.
    pub(super) fn prepare(
        &self,
        file: MemoryFile,
        target: Target,
        attributes: FileAttributes,
        replaces: Option<(String, ObjectId)>,
    ) -> Arc<Staged> {
        FINE_TIMES.get_or_init(|| try_times(&file.file).unwrap_or(false));
        let ino = STAGED | (self.next.fetch_add(1, Ordering::Relaxed) & (STAGED - 1));
        self.make(ino, Arc::new(file), target, attributes, replaces, |_| {})
    }

    /// Puts a new staged file at its path, where a former one goes on without it; with `writer` not before that process
    /// opens it for writing.
    pub(super) fn show(&self, staged: &Arc<Staged>, writer: Option<u32>) {
        let path = {
            let mut state = staged.state();
            state.reserved_for = writer;
            state.target.path()
        };
        super::adopt::note_staged(staged);
        match writer {
            Some(pid) => {
                let mut reserved = self.reserved();
                // What a former server made for the same request waits for nobody any more.
                reserved.retain(|(at, who, _)| *who != pid || pid == 0 || *at != path);
                reserved.push((path, pid, staged.clone()));
            }
            None => self.place(path, staged),
        }
    }

    /// Puts a staged file at a path. The former one is the path's no more, for the next server, too.
    fn place(&self, path: String, staged: &Arc<Staged>) {
        let former = self.by_path().insert(path, staged.clone());
        if let Some(former) = former.filter(|former| !Arc::ptr_eq(former, staged)) {
            self.displace(&former);
        }
    }

    /// Shows a copy of what was at its path, unless that is not so any more, or somebody writes to that by now.
    pub(super) fn show_instead(&self, staged: &Arc<Staged>, instead_of: Option<&Arc<Staged>>) {
        let path = staged.state().target.path();
        {
            let mut by_path = self.by_path();
            match (by_path.get(&path), instead_of) {
                (None, None) => {}
                (Some(now), Some(then)) if Arc::ptr_eq(now, then) => {
                    let mut state = then.state();
                    if state.has_writers() || state.detached {
                        return;
                    }
                    state.displaced = true;
                    drop(state);
                    self.remember_displaced(then);
                }
                _ => return,
            }
            by_path.insert(path, staged.clone());
        }
        instead_of.into_iter().chain([staged]).for_each(|staged| super::adopt::note_staged(staged));
    }

    fn make(
        &self,
        ino: u64,
        file: Arc<MemoryFile>,
        target: Target,
        attributes: FileAttributes,
        replaces: Option<(String, ObjectId)>,
        change: impl FnOnce(&mut State),
    ) -> Arc<Staged> {
        let mut state = State {
            target,
            attributes,
            attributes_changed: false,
            writers: Writers::default(),
            expected: Vec::new(),
            lingers: None,
            writers_unknown: false,
            readers_unknown: false,
            image: None,
            reserved_for: None,
            opens: 0,
            was_opened: false,
            settling: false,
            repointing: false,
            closed_by: None,
            passthrough: None,
            shared_writable: false,
            had_readers: false,
            shown: None,
            replaces,
            clean: None,
            published: None,
            written_view: None,
            failed: None,
            detached: false,
            retired: false,
            moved: false,
            displaced: false,
        };
        change(&mut state);
        Arc::new(Staged {
            made: Instant::now(),
            ino,
            file,
            state: Mutex::new(state),
            publishing: Mutex::default(),
            noting: Mutex::default(),
        })
    }

    /// Lets go of a file of a former server that only its number led to.
    pub(super) fn forget(&self, ino: u64) {
        self.gone.lock().unwrap_or_else(|e| e.into_inner()).remove(&ino);
    }

    /// The staged file of an inode number.
    pub(super) fn by_ino(&self, ino: u64) -> Option<Arc<Staged>> {
        if let Some(staged) = self.gone.lock().unwrap_or_else(|e| e.into_inner()).get(&ino) {
            return Some(staged.clone());
        }
        if let Some(staged) = self.by_path().values().find(|staged| staged.ino == ino) {
            return Some(staged.clone());
        }
        self.reserved().iter().find(|(.., staged)| staged.ino == ino).map(|(.., staged)| staged.clone())
    }

    /// Takes a staged file from its path, if it is still the one there.
    pub(super) fn detach(&self, staged: &Arc<Staged>) {
        let path = staged.state().target.path();
        let mut by_path = self.by_path();
        if by_path.get(&path).is_some_and(|there| Arc::ptr_eq(there, staged)) {
            by_path.remove(&path);
        }
    }

    /// Moves a staged file to another path.
    pub(super) fn move_to(&self, staged: &Arc<Staged>, target: Target) {
        self.detach(staged);
        let path = target.path();
        {
            let mut state = staged.state();
            (state.target, state.moved, state.displaced) = (target, true, false);
        }
        self.place(path, staged);
        super::adopt::note_staged(staged);
    }

    /// Staged files directly in a directory, in the order of their names.
    pub(super) fn entries_in(&self, directory: &str) -> Vec<StagedEntry> {
        let entry = |file: &Arc<Staged>| {
            let target = &file.state().target;
            (target.directory == directory).then(|| StagedEntry {
                component: target.component.clone(),
                datasets: [target.plain.clone(), target.dataset().to_owned()],
                file: file.clone(),
            })
        };
        let mut found: Vec<StagedEntry> = self.by_path().values().filter_map(entry).collect();
        found.sort_by(|a, b| a.component.cmp(&b.component));
        found
    }

    /// Staged files anywhere below a directory.
    pub(super) fn tree(&self, directory: &str) -> Vec<Arc<Staged>> {
        self.by_path().values().filter(|s| is_inside(&s.state().target.directory, directory)).cloned().collect()
    }

    /// Full names of the directories that staged files are in.
    pub(super) fn directories(&self) -> Vec<String> {
        self.by_path().values().map(|staged| staged.state().target.directory.clone()).collect()
    }
}
