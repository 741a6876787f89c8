//! The lock under which names are changed.
//!
//! vineyardd's name map has no compare-and-swap. Whatever looks at what a name leads to and then puts or drops it does
//! both under this lock: a lock of this process, and one on the folder of vineyardd's socket (`flock(2)`), which all
//! mounts and commands of the same vineyardd take. Between instances only saves see each other (see `saves`).

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::FileSystem;
use crate::error::{Context, Error, Kind, Result};
use crate::socket::place;
use crate::sync::{Mutex, MutexGuard};
use crate::vineyard::ObjectId;

/// How long others are waited for. They hold the lock for some questions to vineyardd; one that was stopped meanwhile must
/// not stop everybody.
const PATIENCE: Duration = Duration::from_secs(5);
/// For how long nobody is waited for after that was in vain.
const IN_VAIN: Duration = Duration::from_secs(60);
/// How often it is tried meanwhile.
const RETRY: Duration = Duration::from_micros(500);
/// Who has held the lock for so long, again and again without a break,
const BUSY: Duration = Duration::from_millis(50);
/// takes a break of this length: others see it within [`RETRY`], while the kernel would give the lock to whoever asks first
/// after it is free.
const BREAK: Duration = Duration::from_millis(2);

/// See the [module](self).
#[derive(Default)]
pub(super) struct Naming {
    within: Arc<Mutex<Pace>>,
    folder: Option<Folder>,
    changes: AtomicU64,
}

/// How this process has used the lock of all processes.
#[derive(Default)]
struct Pace {
    /// When it was released last.
    released: Option<Instant>,
    /// For how long it has been held since the last break.
    held: Duration,
    /// When somebody else was waited for in vain.
    in_vain: Option<Instant>,
}

/// The folder on which those who use a store lock each other out.
#[derive(Debug)]
pub struct Folder {
    file: File,
    path: PathBuf,
}

/// Nobody else changes names until it is dropped.
pub(super) struct Guard<'a> {
    naming: &'a Naming,
    folder: Option<(&'a Folder, Instant)>,
    pace: MutexGuard<'a, Pace>,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.naming.changes.fetch_add(1, Ordering::Relaxed);
        if let Some((folder, since)) = self.folder {
            let _unlocked = folder.flock(libc::LOCK_UN);
            self.pace.held += since.elapsed();
            self.pace.released = Some(Instant::now());
        }
    }
}

impl Folder {
    fn flock(&self, operation: libc::c_int) -> nix::Result<()> {
        // SAFETY: the descriptor is open as long as the file lives.
        Errno::result(unsafe { libc::flock(self.file.as_raw_fd(), operation) }).map(drop)
    }

    /// False if somebody else keeps it for too long.
    fn lock(&self, pace: &mut Pace) -> bool {
        pace.rest();
        let start = Instant::now();
        let patience = match pace.in_vain {
            Some(when) if when.elapsed() < IN_VAIN => Duration::ZERO,
            _ => PATIENCE,
        };
        loop {
            match self.flock(libc::LOCK_EX | libc::LOCK_NB) {
                Ok(()) => {
                    pace.in_vain = None;
                    return true;
                }
                Err(Errno::EWOULDBLOCK | Errno::EINTR) if start.elapsed() < patience => std::thread::sleep(RETRY),
                Err(errno) => {
                    if patience > Duration::ZERO {
                        pace.in_vain = Some(Instant::now());
                        let folder = self.path.display();
                        tracing::warn!(
                            "names are changed without the lock on {folder}, which somebody else keeps ({}; `fuser -v \
                             {folder}` tells who): saves and renames of other mounts at the same moment may be lost",
                            errno.desc()
                        );
                    }
                    return false;
                }
            }
        }
    }
}

impl Pace {
    /// Takes a break if it is due.
    fn rest(&mut self) {
        let free = self.released.map_or(BREAK, |released| released.elapsed());
        if free < BREAK && self.held < BUSY {
            return;
        }
        if free < BREAK {
            std::thread::sleep(BREAK - free);
        }
        self.held = Duration::ZERO;
    }
}

/// The folder on which those who use the store at a socket lock each other out; `None` without the right to open it.
pub fn lock_of(socket: &Path) -> Option<Folder> {
    let path = place(socket).parent().unwrap_or(Path::new("/")).to_owned();
    match File::open(&path) {
        Ok(file) => Some(Folder { file, path }),
        Err(error) => {
            tracing::info!("other mounts of this store are not locked out: {}: {error}", path.display());
            None
        }
    }
}

impl Naming {
    pub(super) fn new(folder: Option<Folder>) -> Self {
        Naming { folder, ..Naming::default() }
    }

    /// The lock of another mount of the same vineyardd.
    #[cfg(all(test, feature = "shuttle"))]
    pub(super) fn shared_with(other: &Naming) -> Self {
        Naming { within: other.within.clone(), ..Naming::default() }
    }

    fn lock(&self) -> Guard<'_> {
        let mut pace = self.within.lock().unwrap_or_else(|e| e.into_inner());
        let folder = self.folder.as_ref().filter(|folder| folder.lock(&mut pace));
        Guard { naming: self, folder: folder.map(|folder| (folder, Instant::now())), pace }
    }
}

impl FileSystem {
    /// Takes the lock on names.
    pub(super) fn naming(&self) -> Guard<'_> {
        self.naming.lock()
    }

    /// How often this mount may have changed what is at a path.
    pub(super) fn changes(&self) -> u64 {
        self.naming.changes.load(Ordering::Relaxed)
    }

    /// Something that has no name yet came to a path, or went.
    pub(super) fn note_change(&self) {
        self.naming.changes.fetch_add(1, Ordering::Relaxed);
    }

    /// Lets a name lead to an object. An answer that did not come says nothing: then it is asked what the name leads to.
    ///
    /// # Errors
    /// As [`Store::put_name`](crate::vineyard::Store::put_name). Unless it [is clear](is_clear), the name may still come to
    /// lead to the object; nothing may be deleted then, and [`FileSystem::leave_open`] is to be told.
    pub(super) fn put_name(&self, name: &str, object: ObjectId) -> Result<()> {
        match self.store.put_name(name, object).context(|| format!("naming {name:?}")) {
            Err(error) if !is_clear(&error) => match self.object_of(name) {
                Ok(Some(there)) if there == object => Ok(()),
                _ => Err(error),
            },
            other => other,
        }
    }

    /// It is not known whether a name leads to one of these objects or will: the names decide, when the store answers.
    pub(super) fn leave_open(&self, objects: impl IntoIterator<Item = ObjectId>) {
        objects.into_iter().for_each(|object| self.suspect_for_long(object));
    }
}

/// Whether an error says that what was asked for did not happen, and will not.
pub(super) fn is_clear(error: &Error) -> bool {
    !matches!(
        error.kind(),
        Kind::Timeout | Kind::Unavailable | Kind::Unreachable | Kind::Malformed | Kind::Internal | Kind::Os(_)
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use serde_json::json;

    use super::*;
    use crate::vineyard::Store;
    use crate::vineyard::fake::{FakeStore, Late, Op};

    /// A value of `x`, another object, and the filesystem.
    fn replacing() -> (Arc<FakeStore>, FileSystem, ObjectId, ObjectId) {
        let store = Arc::new(FakeStore::new(1 << 20).alone());
        let object = || {
            let content = json!({"typename": "vineyard::Scalar<int64_t>", "value_": "41", "type_": "int"});
            let made = store.create_objects(vec![content]).unwrap()[0].id;
            store.persist(made).unwrap();
            made
        };
        let (old, new) = (object(), object());
        store.put_name("x", old).unwrap();
        let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>);
        (store, fs, old, new)
    }

    fn save(fs: &FileSystem, new: ObjectId) -> Result<()> {
        fs.point_name("x", new, &["x"]).inspect_err(|error| fs.drop_new(new, error))
    }

    #[test]
    fn a_name_whose_answer_was_late_is_put() {
        let (store, fs, _, new) = replacing();
        store.delay_name(Late::Answer);
        save(&fs, new).unwrap();
        assert_eq!((fs.object_of("x").unwrap(), store.object_count()), (Some(new), 1));
    }

    #[test]
    fn a_name_that_may_be_put_yet_costs_neither_version() {
        let (store, fs, old, new) = replacing();
        store.delay_name(Late::Everything);
        assert_eq!(save(&fs, new).unwrap_err().kind(), Kind::Timeout);
        assert_eq!((fs.object_of("x").unwrap(), store.object_count()), (Some(old), 2));
        store.catch_up();
        assert_eq!((fs.object_of("x").unwrap(), store.object_count()), (Some(new), 2));
        // A refusal is clear.
        let (store, fs, old, new) = replacing();
        store.fail_next(Op::PutName, 1, Kind::Invalid);
        assert_eq!(save(&fs, new).unwrap_err().kind(), Kind::Invalid);
        assert_eq!((fs.object_of("x").unwrap(), store.object_count()), (Some(old), 1));
    }

    #[test]
    fn one_at_a_time_also_among_mounts() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("vineyard.sock");
        let locks: Vec<Naming> = (0..4).map(|_| Naming::new(lock_of(&socket))).collect();
        assert!(locks.iter().all(|lock| lock.folder.is_some()));
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for lock in locks.iter().chain(&locks) {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _guard = lock.lock();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(lock_of(Path::new("/nowhere/at/all")).is_none());
    }

    #[test]
    fn who_is_busy_lets_others_in() {
        let folder = tempfile::tempdir().unwrap();
        let [busy, other] = [(); 2].map(|()| Naming::new(lock_of(&folder.path().join("vineyard.sock"))));
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        let _guard = busy.lock();
                        std::thread::sleep(Duration::from_millis(10));
                    }
                });
            }
            for _ in 0..20 {
                assert!(other.lock().folder.is_some());
            }
            done.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn who_keeps_the_lock_is_waited_for_once() {
        let folder = tempfile::tempdir().unwrap();
        let [keeper, other] = [(); 2].map(|()| Naming::new(lock_of(&folder.path().join("vineyard.sock"))));
        let kept = keeper.lock();
        let start = Instant::now();
        assert!(other.lock().folder.is_none() && start.elapsed() >= PATIENCE);
        let start = Instant::now();
        (0..20).for_each(|_| assert!(other.lock().folder.is_none()));
        assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
        drop(kept);
        assert!(other.lock().folder.is_some());
    }
}
