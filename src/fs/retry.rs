//! What a thread was answered, where its next request depends on it.
//!
//! Opens that were refused with `ESTALE`: the kernel then looks the name up once more and opens what it finds; a second
//! refusal reaches the program (`do_filp_open` and `do_sys_truncate` of Linux). So the lookup in between, which alone
//! does not say what it is for, must find what that thread can open: what was refused is remembered until then.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::inode::{Inodes, Node};
use super::name::is_inside;
use super::open::wants_write;
use super::resolve::{Found, Target};
use super::{Caller, FileSystem, name};
use crate::error::{Kind, Result};
use crate::sync::{Mutex, MutexGuard};

/// What a thread was refused.
struct Refused {
    flags: i32,
    /// Where; `None` if that is not certain.
    path: Option<String>,
    /// Until when the thread comes back if it does.
    until: Instant,
    /// It was told that nothing is there since: perhaps it does not come back, and its next open is another one.
    absent: bool,
}

impl Refused {
    fn lasts(&self) -> bool {
        Instant::now() < self.until
    }

    fn is_of(&self, path: &str) -> bool {
        self.lasts() && self.path.as_deref().is_none_or(|at| at == path)
    }
}

/// How many files are made for a writer whose path changes under it.
const COPIES: usize = 4;
/// How long a thread may take to look a name up once more.
const REFUSED: Duration = Duration::from_secs(5);
/// The same for one that was told that nothing is there. That may be the end of its open; or it creates the file; or the
/// kernel looks once more, or gives it what another thread has created meanwhile, without a question to us.
const REFUSED_AND_ABSENT: Duration = Duration::from_millis(if cfg!(test) { 5_000 } else { 100 });
/// How long it is believed that there is nothing at a path: a CREATE follows its LOOKUP at once.
const ABSENT: Duration = Duration::from_millis(10);
/// Threads of which that is noted, at most.
const MOST_ABSENT: usize = 64;

/// Threads, as the kernel numbers them, and what they were answered.
#[derive(Default)]
pub struct Retries {
    /// Those that will look a name up once more.
    refused: Mutex<HashMap<u32, Refused>>,
    /// Those that were told that there is no such file, which the kernel may now create.
    absent: Mutex<HashMap<u32, (String, Instant)>>,
    /// Until when the kernel may use a number by the path at which a former server gave it out. A file takes its number
    /// along when it is renamed here; if it was renamed back elsewhere, that is the number by which this server has it at
    /// the first path.
    doubtful_until: Option<Instant>,
    /// What threads have looked up last, until then.
    found: Mutex<HashMap<u32, u64>>,
}

/// Processes that the mount's pid namespace does not see, such as those of other pods, all have the number 0 (Linux,
/// `fuse_req_init_context`): which of them comes back is not known.
fn is_known(caller: Caller) -> bool {
    caller.pid != 0
}

impl Retries {
    /// `former_entries` is how long the kernel still uses what a former server told of names.
    pub(super) fn new(former_entries: Option<Duration>) -> Self {
        Retries { doubtful_until: former_entries.map(|lasts| Instant::now() + lasts), ..Retries::default() }
    }

    /// Whether a thread may have a number from a former server.
    fn is_doubtful(&self, caller: Caller) -> bool {
        is_known(caller) && self.doubtful_until.is_some_and(|until| Instant::now() < until)
    }

    fn found(&self) -> MutexGuard<'_, HashMap<u32, u64>> {
        self.found.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Notes that a thread was told the number of a path.
    pub(super) fn note_found(&self, ino: u64, caller: Caller) {
        if self.is_doubtful(caller) {
            self.found().insert(caller.pid, ino);
        }
    }

    /// Whether a thread that opens a number has it by the path that this server knows: it has just looked it up. One that
    /// asked a former server the same is believed, as it may not look up again.
    pub(super) fn comes_by_known_path(&self, ino: u64, caller: Caller) -> bool {
        !self.is_doubtful(caller) || caller.resent || self.found().remove(&caller.pid) == Some(ino)
    }

    fn refused(&self) -> MutexGuard<'_, HashMap<u32, Refused>> {
        self.refused.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A thread came for the second time, or will not come.
    pub(super) fn end(&self, caller: Caller) {
        let mut refused = self.refused();
        if !refused.is_empty() {
            refused.remove(&caller.pid);
        }
    }

    /// Whether a file may be made for a thread at its next lookup: it was refused to write.
    pub(super) fn may_copy(&self, caller: Caller) -> bool {
        self.refused().get(&caller.pid).is_some_and(|former| former.lasts() && wants_write(former.flags))
    }

    /// A directory has another name: who was refused something below it may come there, or not.
    pub(super) fn directory_moved(&self, from: &str) {
        for former in self.refused().values_mut() {
            former.path.take_if(|path| is_inside(path, from));
        }
    }

    /// Whether a thread was refused something, and comes for the second time. Where that is not certain, a reader is
    /// taken to come for the first time: at worst it is led to the published version once more.
    pub(super) fn is_second(&self, flags: i32, caller: Caller) -> bool {
        let is_certain = |former: &Refused| former.lasts() && (wants_write(flags) || !former.absent);
        self.refused().get(&caller.pid).is_some_and(is_certain)
    }

    /// Notes that a thread was told that nothing is at a path.
    pub(super) fn note_absent(&self, path: String, caller: Caller) {
        if let Some(former) = self.refused().get_mut(&caller.pid) {
            former.absent = true;
            former.until = former.until.min(Instant::now() + REFUSED_AND_ABSENT);
            former.path.get_or_insert_with(|| path.clone());
        }
        if !is_known(caller) {
            return;
        }
        let mut absent = self.absent.lock().unwrap_or_else(|e| e.into_inner());
        if absent.len() >= MOST_ABSENT {
            absent.clear();
        }
        absent.insert(caller.pid, (path, Instant::now()));
    }

    /// Whether the store was just asked by a thread what is at a path, and had nothing. The names need not be asked for
    /// again: what another client saves in between is replaced like what it saves before this file is closed.
    pub(super) fn is_absent(&self, path: &str, caller: Caller) -> bool {
        let mut absent = self.absent.lock().unwrap_or_else(|e| e.into_inner());
        absent.remove(&caller.pid).is_some_and(|(at, since)| at == path && since.elapsed() < ABSENT)
    }
}

impl FileSystem {
    /// Notes how an open, or what else the kernel tries twice, ended. `second` is what [`Retries::is_second`] said when
    /// it began.
    pub(super) fn note_try<T>(&self, ino: u64, flags: i32, caller: Caller, second: bool, ended: &Result<T>) {
        self.retries.end(caller);
        if !second && is_known(caller) && ended.as_ref().is_err_and(|error| error.kind() == Kind::Stale) {
            let path = self.path_of(ino).filter(|_| !self.has_moved(ino) && !self.retries.is_doubtful(caller));
            let mut refused = self.retries.refused();
            refused.retain(|_, former| former.lasts());
            refused.insert(caller.pid, Refused { flags, path, until: Instant::now() + REFUSED, absent: false });
            return;
        }
        // Whatever this thread asks for next, it shall be what is there then.
        if self.staging.has_redirects()
            && let Some(path) = self.path_of(ino)
        {
            self.end_redirect(&path, caller);
        }
    }

    fn path_of(&self, ino: u64) -> Option<String> {
        self.inodes.get(ino).and_then(|inode| match &inode.node {
            Node::View(view) => Some(name::join(&view.directory, &view.component)),
            Node::Staged(staged) => Some(staged.state().target.path()),
            Node::Directory { .. } => None,
        })
    }

    /// Whether an inode may have been looked up at another path than it has now: it was moved since it was found there.
    fn has_moved(&self, ino: u64) -> bool {
        self.inodes.get(ino).is_some_and(|inode| match &inode.node {
            Node::View(view) => {
                let path = name::join(&view.directory, &view.component);
                Inodes::computed(&path, view.object, view.view) != ino
            }
            Node::Staged(staged) => staged.state().moved,
            Node::Directory { .. } => false,
        })
    }

    /// A thread is not on its way to the published version any more; what was kept for it may go.
    fn end_redirect(&self, path: &str, caller: Caller) {
        if let Some(object) = self.staging.end_redirect(path, caller.pid) {
            self.end_lazy_open(object);
        }
    }

    /// Whether this thread was refused what is at a path before, and comes for the second time.
    pub(super) fn was_refused(&self, path: &str, caller: Caller) -> bool {
        self.repeats(path, caller).is_some()
    }

    /// Flags of the open that a lookup repeats.
    fn repeats(&self, path: &str, caller: Caller) -> Option<i32> {
        let refused = self.retries.refused();
        refused.get(&caller.pid).filter(|former| former.is_of(path)).map(|former| former.flags)
    }

    /// What a lookup finds. If it is one that follows a refusal: what will not be refused again.
    pub(super) fn resolve_for(&self, target: &Target, caller: Caller) -> Result<Option<Found>> {
        let path = target.path();
        let mut found = self.resolve(target, caller.pid)?;
        let Some(flags) = self.repeats(&path, caller) else { return Ok(found) };
        if wants_write(flags) {
            // Its own file, and not the version that it may have been sent to as a reader.
            self.end_redirect(&path, caller);
            // Again if somebody else's file came to the path while this one's was being copied.
            for _ in 0..COPIES {
                let copied = match &found {
                    Some(Found::View(view)) => self.stage_view(target, view, flags, caller).map(drop),
                    Some(Found::Staged(staged)) if staged.refuses_writer(flags, caller) => {
                        self.replace_staged(staged, target.clone(), flags, caller)
                    }
                    // Until it is opened nobody else takes it for finished. It may have left the path meanwhile.
                    Some(Found::Staged(staged)) if flags & libc::O_TRUNC == 0 && !staged.expect_writer(caller) => {
                        Ok(())
                    }
                    _ => break,
                };
                // What was replaced while it was copied is found as it is now.
                copied.or_else(|error| if error.kind() == Kind::Stale { Ok(()) } else { Err(error) })?;
                found = self.resolve(target, caller.pid)?;
            }
            return Ok(found);
        }
        match &found {
            Some(Found::Staged(staged)) if staged.refuses_reader(caller)? => {
                self.staging.redirect_reader(&path, caller.pid)
            }
            Some(Found::View(_)) => {
                // It is kept until it is opened.
                self.staging.redirect_reader(&path, caller.pid);
                return Ok(found);
            }
            _ => return Ok(found),
        }
        self.resolve(target, caller.pid)
    }
}
