//! Where a process is sent that found the wrong file at a path: the kernel looks a name up once more after ESTALE.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::{REDIRECT, Staged, Staging, State};
use crate::error::Result;
use crate::fs::Caller;
use crate::fs::name::{is_inside, moved};
use crate::fs::resolve::Target;
use crate::sync::MutexGuard;
use crate::vineyard::ObjectId;

/// A process on its way to the published version of a path.
pub struct Redirect {
    since: Instant,
    /// The version that its lookup found, which is kept for it until it opens it.
    held: Option<ObjectId>,
}

impl State {
    /// Whether somebody writes, or was led here to write and is on the way.
    pub(in crate::fs) fn has_writers(&self) -> bool {
        let expected = self.expected.iter().map(|(_, since)| since).chain(&self.lingers);
        !self.writers.is_empty() || expected.into_iter().any(|since| since.elapsed() < REDIRECT)
    }

    /// True if its path leads to the published version: the file, made then, is retired, or its writer never came.
    pub(in crate::fs) fn is_abandoned(&self, made: Instant) -> bool {
        let has_version = self.published.is_some() || self.replaces.is_some();
        self.retired || (!self.was_opened && has_version && made.elapsed() > REDIRECT)
    }

    /// Whether all who wrote have closed it: the last step of a close comes after the program went on.
    pub(in crate::fs) fn is_closed(&self) -> bool {
        self.writers.iter().all(|pid| self.closed_by == Some(*pid))
    }

    /// Whether somebody who opens the file for writing must get another one. Bytes that readers may have mapped never
    /// change; and who truncates does not touch another's work. Processes that have no number here are all others.
    pub(in crate::fs) fn refuses_writer(&self, flags: i32, caller: Caller) -> bool {
        if flags & libc::O_TRUNC == 0 {
            return self.is_final() || self.displaced;
        }
        let is_other = |pid: &u32| *pid != caller.pid || *pid == 0;
        let others = self.writers.iter().chain(self.expected.iter().map(|(pid, _)| pid)).any(is_other);
        let settled = self.published.is_some() && (self.had_readers || self.writers.is_empty());
        settled || others
    }

    /// Whether its bytes are what others may have open, or may open as the published version.
    pub(in crate::fs) fn is_final(&self) -> bool {
        self.had_readers && self.published.is_some() && !self.has_writers()
    }

    /// A process that does not truncate will open the file for writing: it does not become final before that. False if
    /// it is final, or its path leads elsewhere.
    pub(in crate::fs) fn expect_writer(&mut self, caller: Caller) -> bool {
        if self.detached || self.retired || self.displaced || self.is_final() {
            return false;
        }
        self.expected.retain(|(_, since)| since.elapsed() < REDIRECT);
        self.expected.push((caller.pid, Instant::now()));
        true
    }

    /// Whether a thread was led here to write, and has not come yet.
    pub(in crate::fs) fn expects(&self, caller: Caller) -> bool {
        self.expected.iter().any(|(pid, since)| *pid == caller.pid && since.elapsed() < REDIRECT)
    }

    /// A thread that was expected has come. The kernel may have looked the name up more than once for one open: it is not
    /// expected again, but where writers come one after the other it is well to wait for the next, until a reader comes.
    pub(in crate::fs) fn has_come(&mut self, caller: Caller) {
        let Some(at) = self.expected.iter().position(|(pid, _)| *pid == caller.pid) else { return };
        self.expected.swap_remove(at);
        // Those without a number here are several.
        if caller.pid != 0 {
            let more = self.expected.extract_if(.., |(pid, _)| *pid == caller.pid);
            self.lingers = more.map(|(_, since)| since).chain(self.lingers).max();
        }
    }

    /// A reader has come: it waits for those who write, and not for those who may come next.
    pub(in crate::fs) fn reader_has_come(&mut self) {
        self.lingers = None;
    }

    /// Whether a reader gets the version that is published instead: while somebody else writes.
    pub(in crate::fs) fn refuses_reader(&self, dirty: bool, caller: Caller) -> bool {
        let has_version = self.published.is_some() || self.replaces.is_some();
        let unsettled = self.has_writers() || (dirty && (self.settling || !self.was_opened));
        unsettled && has_version && !self.writers.contains(&caller.pid)
    }
}

impl Staged {
    /// As [`State::refuses_writer`].
    pub(in crate::fs) fn refuses_writer(&self, flags: i32, caller: Caller) -> bool {
        self.state().refuses_writer(flags, caller)
    }

    /// As [`State::expect_writer`].
    pub(in crate::fs) fn expect_writer(&self, caller: Caller) -> bool {
        let mut state = self.state();
        !state.is_abandoned(self.made) && state.expect_writer(caller)
    }

    /// As [`State::refuses_reader`].
    ///
    /// # Errors
    /// If the file cannot be looked at.
    pub(in crate::fs) fn refuses_reader(&self, caller: Caller) -> Result<bool> {
        let dirty = self.is_dirty()?;
        Ok(self.state().refuses_reader(dirty, caller))
    }
}

impl Staging {
    pub(super) fn reserved(&self) -> MutexGuard<'_, Vec<(String, u32, Arc<Staged>)>> {
        self.reserved.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The file that was made last for a process that writes a path.
    pub(in crate::fs) fn reserved_for(&self, path: &str, pid: u32) -> Option<Arc<Staged>> {
        let reserved = self.reserved();
        reserved.iter().rev().find(|(at, who, _)| *who == pid && at == path).map(|(.., staged)| staged.clone())
    }

    /// A writer has come for its file: it is at its path from now on.
    pub(in crate::fs) fn claim(&self, staged: &Arc<Staged>) {
        let mut reserved = self.reserved();
        let before = reserved.len();
        reserved.retain(|(.., other)| !Arc::ptr_eq(other, staged));
        if reserved.len() < before {
            drop(reserved);
            let path = {
                let mut state = staged.state();
                state.reserved_for = None;
                state.target.path()
            };
            self.place(path, staged);
        }
    }

    /// Files whose writers have not come yet, anywhere below a directory.
    pub(in crate::fs) fn reserved_below(&self, directory: &str) -> Vec<Arc<Staged>> {
        let inside = |staged: &Arc<Staged>| is_inside(&staged.state().target.directory, directory);
        self.reserved().iter().map(|(.., staged)| staged.clone()).filter(inside).collect()
    }

    /// Moves a file whose writer has not come yet to another path, where that finds it. False if it does not wait for one.
    pub(in crate::fs) fn move_reserved(&self, staged: &Arc<Staged>, target: &Target) -> bool {
        let mut reserved = self.reserved();
        let Some(entry) = reserved.iter_mut().find(|(.., other)| Arc::ptr_eq(other, staged)) else { return false };
        entry.0 = target.path();
        {
            let mut state = staged.state();
            (state.target, state.moved) = (target.clone(), true);
        }
        drop(reserved);
        crate::fs::adopt::note_staged(staged);
        true
    }

    fn redirects(&self) -> MutexGuard<'_, HashMap<(String, u32), Redirect>> {
        self.redirects.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Sends a process that opens a path for reading to the published version at its next lookup.
    pub(in crate::fs) fn redirect_reader(&self, path: &str, pid: u32) {
        let redirect = |held| Redirect { since: Instant::now(), held };
        let mut redirects = self.redirects();
        let held = redirects.get(&(path.to_owned(), pid)).and_then(|former| former.held);
        redirects.insert((path.to_owned(), pid), redirect(held));
    }

    /// Whether any process was sent to a published version.
    pub(in crate::fs) fn has_redirects(&self) -> bool {
        !self.redirects().is_empty()
    }

    /// Whether a process was sent to the published version. The kernel may look the name up several times before it
    /// opens what it found.
    pub(in crate::fs) fn is_redirected(&self, path: &str, pid: u32) -> bool {
        let redirects = self.redirects();
        !redirects.is_empty() && redirects.get(&(path.to_owned(), pid)).is_some_and(|r| r.since.elapsed() < REDIRECT)
    }

    /// Notes which version a redirected process has found; returns the one that was noted before.
    pub(in crate::fs) fn hold(&self, path: &str, pid: u32, object: ObjectId) -> Option<ObjectId> {
        let mut redirects = self.redirects();
        let redirect = Redirect { since: Instant::now(), held: Some(object) };
        redirects.insert((path.to_owned(), pid), redirect).and_then(|former| former.held)
    }

    /// Whether a version is kept for a process.
    pub(in crate::fs) fn holds(&self, path: &str, pid: u32, object: ObjectId) -> bool {
        let redirects = self.redirects();
        !redirects.is_empty() && redirects.get(&(path.to_owned(), pid)).is_some_and(|r| r.held == Some(object))
    }

    /// The process has opened the published version: returns the one that was kept for it.
    pub(in crate::fs) fn end_redirect(&self, path: &str, pid: u32) -> Option<ObjectId> {
        let mut redirects = self.redirects();
        if redirects.is_empty() { None } else { redirects.remove(&(path.to_owned(), pid)).and_then(|r| r.held) }
    }

    /// Ends the redirects of processes that never came; returns what was kept for them.
    pub(in crate::fs) fn end_old_redirects(&self) -> Vec<ObjectId> {
        self.reserved().retain(|(.., staged)| staged.made.elapsed() < REDIRECT);
        let mut redirects = self.redirects();
        let mut held = Vec::new();
        redirects.retain(|_, redirect| {
            let keep = redirect.since.elapsed() < REDIRECT;
            held.extend(redirect.held.filter(|_| !keep));
            keep
        });
        held
    }

    /// Directories have other names: old and new name of each.
    pub(in crate::fs) fn move_redirects(&self, trees: &[(String, String)]) {
        let mut redirects = self.redirects();
        let moving = |path: &str| trees.iter().find(|(from, _)| is_inside(path, from));
        let below: Vec<_> = redirects.extract_if(|(path, _), _| moving(path).is_some()).collect();
        redirects.extend(below.into_iter().filter_map(|((path, pid), redirect)| {
            let (from, to) = moving(&path)?;
            Some(((moved(&path, from, to), pid), redirect))
        }));
    }

    /// As if all redirects were old.
    #[cfg(all(test, feature = "shuttle"))]
    pub(in crate::fs) fn expire_redirects(&self) {
        let long_ago = Instant::now().checked_sub(2 * REDIRECT).unwrap_or_else(Instant::now);
        self.redirects().values_mut().for_each(|redirect| redirect.since = long_ago);
    }
}
