//! Changes in directories and moves of directories keep out of each other's way.
//!
//! The kernel locks the directories in which a name changes, and not those that move with it: files are created and removed
//! below a directory while that is renamed. So who changes a name says in which directory, and who moves a directory waits
//! for those below it, and lets those that come wait until it has its new name. So does whoever looks for a name in a directory
//! that moves, and does not find it.
//!
//! Whoever waits here has no lock. All that is taken in one turn is said at once, and who comes later waits for who came
//! before, so nobody waits for itself. Nor does anybody wait for long: a move takes as many requests to the store as there
//! are names below, and what comes to the old name after all is looked for when it is done.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::FileSystem;
use super::inode::{Inode, Node};
use super::name::is_inside;
use crate::error::Result;
use crate::sync::{Condvar, Mutex, MutexGuard};

/// How long others are waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// See the [module](self).
#[derive(Default)]
pub(super) struct Trees {
    state: Mutex<State>,
    ended: Condvar,
}

/// Directories by full name, with the numbers of turns.
#[derive(Default)]
struct State {
    last: u64,
    /// Who wants no directory to move.
    resting: usize,
    /// Moves that have ended.
    moved: u64,
    /// In which names change.
    changing: Vec<(u64, String)>,
    /// Which move, with all below.
    moving: Vec<(u64, String)>,
}

/// Directories stay where they are, or nothing changes in them, until it is dropped.
pub(super) struct Turn<'a> {
    trees: &'a Trees,
    number: u64,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.trees.state();
        state.moved += u64::from(state.moving.iter().any(|(number, _)| *number == self.number));
        state.changing.retain(|(number, _)| *number != self.number);
        state.moving.retain(|(number, _)| *number != self.number);
        drop(state);
        self.trees.ended.notify_all();
    }
}

/// No directory moves until it is dropped.
pub(super) struct Rest<'a>(&'a Trees);

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        self.0.state().resting -= 1;
        self.0.ended.notify_all();
    }
}

impl Trees {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The turn to change names in directories, and to move whole ones. What they are called is to be asked again then.
    pub(super) fn enter(&self, changes: &[&str], moves: &[&str]) -> Turn<'_> {
        let start = Instant::now();
        let blocked = |state: &State| {
            let overlap = |a: &str, b: &str| is_inside(a, b) || is_inside(b, a);
            state.moving.iter().any(|(_, top)| {
                changes.iter().any(|name| is_inside(name, top)) || moves.iter().any(|name| overlap(name, top))
            })
        };
        let mut state = self.wait_while(self.state(), start, blocked);
        state.last += 1;
        let number = state.last;
        state.changing.extend(changes.iter().map(|name| (number, (*name).to_owned())));
        state.moving.extend(moves.iter().map(|name| (number, (*name).to_owned())));
        // Who comes from now on waits for this turn.
        let disturbed = |state: &State| {
            let others = state.changing.iter().filter(|(other, _)| *other != number);
            let rests = state.resting > 0 && !moves.is_empty();
            rests || others.into_iter().any(|(_, name)| moves.iter().any(|top| is_inside(name, top)))
        };
        drop(self.wait_while(state, start, disturbed));
        Turn { trees: self, number }
    }

    /// Whether a directory moves, or is about to, or any has moved since so many had.
    fn has_moved(&self, directory: &str, since: u64) -> bool {
        let state = self.state();
        state.moved != since || state.moving.iter().any(|(_, top)| is_inside(directory, top))
    }

    /// No directory moves until what is returned is dropped. For who asks which directory a number is of, or a file.
    pub(super) fn rest(&self) -> Rest<'_> {
        let mut state = self.wait_while(self.state(), Instant::now(), |state| !state.moving.is_empty());
        state.resting += 1;
        Rest(self)
    }

    fn wait_while<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        start: Instant,
        is_so: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        while is_so(&state) {
            let left = PATIENCE.saturating_sub(start.elapsed());
            if left.is_zero() {
                tracing::warn!("names are changed below a directory while it moves: that takes very long");
                break;
            }
            state = self.ended.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        state
    }
}

impl FileSystem {
    /// Asks something about the names in the directory of an inode. While it moves some of them are there only: if the
    /// answer may be due to that, as `doubtful` says, it is asked again when the directory stays where it is.
    pub(super) fn ask_of_directory<T>(
        &self,
        ino: u64,
        ask: impl Fn(&str) -> Result<T>,
        doubtful: impl Fn(&Result<T>) -> bool,
    ) -> Result<T> {
        let before = self.trees.state().moved;
        let directory = self.directory_name(ino)?;
        let answer = ask(&directory);
        if !doubtful(&answer) || !self.trees.has_moved(&directory, before) {
            return answer;
        }
        let (_turn, directory) = self.enter_directory(ino)?;
        ask(&directory)
    }

    /// The turn to change what is at the path of a file's inode, and that inode: the directory does not move meanwhile.
    ///
    /// # Errors
    /// As [`FileSystem::inode`].
    pub(super) fn enter_directory_of(&self, ino: u64) -> Result<(Option<Turn<'_>>, Arc<Inode>)> {
        let directory_of = |inode: &Inode| match &inode.node {
            Node::Directory { .. } => None,
            Node::View(view) => Some(view.directory.clone()),
            Node::Staged(staged) => Some(staged.state().target.directory.clone()),
        };
        loop {
            let inode = self.inode(ino)?;
            let Some(directory) = directory_of(&inode) else { return Ok((None, inode)) };
            let turn = self.trees.enter(&[&directory], &[]);
            let inode = self.inode(ino)?;
            if directory_of(&inode).as_deref() == Some(&*directory) {
                return Ok((Some(turn), inode));
            }
        }
    }

    /// The turn to change names in the directory of an inode, and what that is called.
    ///
    /// # Errors
    /// As [`FileSystem::directory_name`].
    pub(super) fn enter_directory(&self, ino: u64) -> Result<(Turn<'_>, String)> {
        loop {
            let name = self.directory_name(ino)?;
            let turn = self.trees.enter(&[&name], &[]);
            if self.directory_name(ino)? == name {
                return Ok((turn, name));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;

    #[test]
    fn nothing_changes_in_a_directory_that_moves() {
        let trees = Trees::default();
        // Positive: so many change something in `a`, or in `a/b`; negative: it moves.
        let (above, below) = (AtomicI64::new(0), AtomicI64::new(0));
        let change = |names: &[&str], count: &AtomicI64| {
            let _turn = trees.enter(names, &[]);
            assert!(count.fetch_add(1, Ordering::SeqCst) >= 0);
            std::thread::yield_now();
            count.fetch_sub(1, Ordering::SeqCst);
        };
        let rename = |changes: &[&str], moves: &[&str], counts: &[&AtomicI64]| {
            let _turn = trees.enter(changes, moves);
            counts.iter().for_each(|count| assert_eq!(count.swap(-1000, Ordering::SeqCst), 0));
            std::thread::yield_now();
            counts.iter().for_each(|count| assert_eq!(count.swap(0, Ordering::SeqCst), -1000));
        };
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..300).for_each(|_| change(&["a"], &above)));
                scope.spawn(|| (0..300).for_each(|_| change(&["a/b", "c"], &below)));
                scope.spawn(|| (0..300).for_each(|_| rename(&["", ""], &["a", "d"], &[&above, &below])));
                scope.spawn(|| (0..300).for_each(|_| rename(&["a", "a"], &["a/b", "a/c"], &[&below])));
            }
        });
        let state = trees.state();
        assert!(state.changing.is_empty() && state.moving.is_empty());
    }

    #[test]
    fn unrelated_directories_wait_for_nobody() {
        let trees = Trees::default();
        let _moves = trees.enter(&[""], &["a", "b"]);
        let start = Instant::now();
        drop(trees.enter(&["", "ab", "c/a"], &["d", "aa"]));
        assert!(start.elapsed() < PATIENCE);
    }
}
