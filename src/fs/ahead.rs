//! Memory of the store for files that are still being written.
//!
//! New memory costs more than the copy into it, and the writer of a large file leaves a processor idle. So a thread
//! watches the sizes of files that are open for writing (with passthrough nothing else tells of a write) and has the
//! store's memory made ready for what they will need at their close. It takes nothing of the store and holds nothing: a
//! file that is never published leaves only memory behind that the store uses for the next one.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::cache::MemoryFile;
use crate::vineyard::Store;

/// Files below this size are copied in a moment.
const LARGE: u64 = 16 << 20;
/// How far the memory that is ready is ahead of the file's size.
const LEAD: u64 = 64 << 20;
/// How often a file that grows is looked at.
const OFTEN: Duration = Duration::from_millis(3);
/// How often one that does not is, at last.
const SELDOM: Duration = Duration::from_millis(100);
/// Memory that this process holds meanwhile: where the memory of its control group ends and the kernel kills it, there is
/// room for the next one to start, although what was made ready stays.
const BALLAST: usize = 48 << 20;
/// How long the thread stays when nobody writes.
const LINGER: Duration = Duration::from_millis(500);

/// Watches files that are open for writing.
pub(super) struct Ahead {
    store: Arc<dyn Store>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Files that are being published.
    publishing: AtomicUsize,
}

#[derive(Default)]
struct State {
    files: Vec<Watched>,
    running: bool,
}

struct Watched {
    ino: u64,
    file: Weak<MemoryFile>,
    /// For so many bytes memory is ready.
    ready: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While it lives, no memory is made ready.
pub(super) struct Pause<'a>(&'a Shared);

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.0.publishing.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Ahead {
    pub(super) fn new(store: Arc<dyn Store>) -> Self {
        Ahead { store, shared: Arc::default() }
    }

    /// A file is open for writing from now on.
    pub(super) fn watch(&self, ino: u64, file: &Arc<MemoryFile>) {
        if !self.store.can_prepare() {
            return;
        }
        let mut state = lock(&self.shared.state);
        if !state.files.iter().any(|watched| watched.ino == ino) {
            state.files.push(Watched { ino, file: Arc::downgrade(file), ready: 0 });
        }
        if !state.running {
            let (store, shared) = (self.store.clone(), self.shared.clone());
            let thread = std::thread::Builder::new().name("ahead".into());
            state.running = thread.spawn(move || run(&*store, &shared)).is_ok();
        }
    }

    /// Nobody has it open for writing any more.
    pub(super) fn unwatch(&self, ino: u64) {
        lock(&self.shared.state).files.retain(|watched| watched.ino != ino);
    }

    /// The processors are needed for copying.
    pub(super) fn pause(&self) -> Pause<'_> {
        self.shared.publishing.fetch_add(1, Ordering::Relaxed);
        Pause(&self.shared)
    }
}

/// The thread: ends when no file has been watched for a while.
fn run(store: &dyn Store, shared: &Shared) {
    let mut idle = Instant::now();
    let mut pause = OFTEN;
    let mut ballast = Vec::new();
    let go_on = || shared.publishing.load(Ordering::Relaxed) == 0;
    loop {
        std::thread::sleep(pause);
        pause = (pause * 2).min(SELDOM);
        let wanted = {
            let mut state = lock(&shared.state);
            if !state.files.is_empty() {
                idle = Instant::now();
            } else if idle.elapsed() > LINGER {
                state.running = false;
                return;
            }
            if go_on() { wanted(&mut state.files) } else { 0 }
        };
        if wanted == 0 {
            if pause == SELDOM {
                ballast = Vec::new();
            }
            continue;
        }
        // Ones: zeros would take no memory.
        ballast.resize(BALLAST, 1u8);
        std::hint::black_box(&ballast);
        pause = OFTEN;
        if let Err(error) = store.prepare_memory(wanted, &go_on) {
            tracing::debug!("no memory ahead of need: {error}");
            pause = SELDOM;
        }
    }
}

/// How many bytes of memory all large files together will need; 0 if none has grown much since it was asked last.
fn wanted(files: &mut Vec<Watched>) -> u64 {
    let mut all = 0u64;
    let mut grown = false;
    files.retain_mut(|watched| {
        let Some(file) = watched.file.upgrade() else { return false };
        let size = file.file.metadata().map_or(0, |meta| meta.len());
        grown |= watched.has_grown(size);
        all = all.saturating_add(watched.ready);
        true
    });
    if grown { all } else { 0 }
}

impl Watched {
    /// Whether more memory is needed for a file that has this size now.
    fn has_grown(&mut self, size: u64) -> bool {
        let grown = size >= LARGE && size.saturating_add(LEAD / 2) > self.ready;
        if grown {
            self.ready = size.saturating_add(LEAD);
        }
        grown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_asked_for_once_per_step_and_not_for_small_files() {
        let mut watched = Watched { ino: 1, file: Weak::new(), ready: 0 };
        assert!(!watched.has_grown(LARGE - 1));
        assert_eq!(watched.ready, 0);
        assert!(watched.has_grown(LARGE));
        assert_eq!(watched.ready, 80 << 20);
        assert!(!watched.has_grown(48 << 20));
        assert!(watched.has_grown((48 << 20) + 1));
        assert_eq!(watched.ready, (112 << 20) + 1);
        assert!(!watched.has_grown(0));
        assert!(watched.has_grown(u64::MAX - 1));
    }

    #[test]
    fn files_that_are_gone_are_forgotten() {
        let mut files = vec![Watched { ino: 1, file: Weak::new(), ready: 1 << 30 }];
        assert_eq!((wanted(&mut files), files.len()), (0, 0));
    }
}
