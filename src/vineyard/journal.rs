//! A journal of objects that no name reaches yet, or no longer: should this process be killed, the next one finds out
//! what became of them and removes what is left over. vineyardd never reclaims them by itself.
//!
//! The file holds lines `+ ID ID ...`. What is noted here is only a suspect: whoever reads it asks the store whether a
//! name leads to it before anything is removed. So notes may stay longer than needed and may be cut short by a kill; what
//! matters is that a note is written before an object can be forgotten.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::id::ObjectId;
use crate::error::{Context, Result};

/// Most bytes before work waits until all work under way has ended, so that the journal can begin anew.
const MAX_LEN: u64 = 16 << 20;
/// Most bytes that are read of a journal that others may have written to.
const MAX_READ: u64 = 64 << 20;

/// The journal of a client.
#[derive(Debug)]
pub struct Journal {
    file: File,
    state: Mutex<State>,
    idle: Condvar,
}

#[derive(Debug, Default)]
struct State {
    len: u64,
    /// Pieces of work under way.
    units: usize,
    /// What outlives the work it came from: what a former process left, and deletions that wait for readers.
    kept: BTreeSet<ObjectId>,
}

/// A piece of work under way: what is noted meanwhile is forgotten when all work has ended.
#[derive(Debug)]
pub struct Unit<'a>(&'a Journal);

impl Journal {
    /// A journal in a file. What a former process noted there is kept until it is [settled](Self::settle).
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn open(file: File) -> Result<Self> {
        let len = file.metadata().context(|| "looking at the journal".into())?.len();
        let mut text = vec![0; len.min(MAX_READ) as usize];
        file.read_exact_at(&mut text, 0).context(|| "reading the journal".into())?;
        let state = State { len, units: 0, kept: parse(&text) };
        Ok(Journal { file, state: Mutex::new(state), idle: Condvar::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a piece of work.
    pub fn enter(&self) -> Unit<'_> {
        let mut state = self.state();
        while state.units > 0 && state.len > MAX_LEN {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.units += 1;
        Unit(self)
    }

    /// Notes what exists now, or is about to lose its name. Without room for a note, work goes on without one.
    pub fn note(&self, ids: impl IntoIterator<Item = ObjectId>) {
        let text = line(ids);
        if !text.is_empty() {
            let mut state = self.state();
            self.append(&mut state, &text);
        }
    }

    fn append(&self, state: &mut State, text: &str) {
        match self.file.write_all_at(text.as_bytes(), state.len) {
            Ok(()) => state.len += text.len() as u64,
            Err(error) => tracing::warn!("no note in the journal: {error}"),
        }
    }

    /// Notes what outlives the work under way.
    pub fn keep(&self, ids: impl IntoIterator<Item = ObjectId>) {
        let ids: Vec<ObjectId> = ids.into_iter().collect();
        let mut state = self.state();
        self.append(&mut state, &line(ids.iter().copied()));
        state.kept.extend(ids);
    }

    /// What is kept.
    pub fn kept(&self) -> Vec<ObjectId> {
        self.state().kept.iter().copied().collect()
    }

    /// These exist no more, or have names.
    pub fn settle(&self, ids: &[ObjectId]) {
        let mut state = self.state();
        for id in ids {
            state.kept.remove(id);
        }
        if state.units == 0 {
            self.renew(&mut state);
        }
    }

    /// Writes anew what is kept. A kill between the two steps leaves too many notes and none too few.
    fn renew(&self, state: &mut State) {
        let text = line(state.kept.iter().copied());
        if let Err(error) = self.file.write_all_at(text.as_bytes(), 0) {
            return tracing::warn!("the journal cannot be shortened: {error}");
        }
        match self.file.set_len(text.len() as u64) {
            Ok(()) => state.len = text.len() as u64,
            Err(error) => tracing::warn!("the journal cannot be shortened: {error}"),
        }
    }
}

impl Drop for Unit<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.units = state.units.saturating_sub(1);
        if state.units == 0 {
            if state.len > 0 {
                self.0.renew(&mut state);
            }
            self.0.idle.notify_all();
        }
    }
}

fn line(ids: impl IntoIterator<Item = ObjectId>) -> String {
    let mut text = String::new();
    for id in ids.into_iter().filter(|id| !matches!(*id, ObjectId::EMPTY_BLOB | ObjectId::INVALID)) {
        text.push_str(if text.is_empty() { "+ " } else { " " });
        text.push_str(&id.to_string());
    }
    if !text.is_empty() {
        text.push('\n');
    }
    text
}

/// The ids of all lines that are one. A line that a kill cut short, and what a shorter text was written over, is none.
fn parse(text: &[u8]) -> BTreeSet<ObjectId> {
    let mut ids = BTreeSet::new();
    let whole = text.iter().rposition(|&b| b == b'\n').map_or(0, |end| end + 1);
    for line in text.get(..whole).unwrap_or_default().split(|&b| b == b'\n') {
        let Some(list) = std::str::from_utf8(line).ok().and_then(|line| line.strip_prefix("+ ")) else { continue };
        ids.extend(list.split(' ').filter_map(|id| id.parse::<ObjectId>().ok()));
    }
    ids.remove(&ObjectId::EMPTY_BLOB);
    ids.remove(&ObjectId::INVALID);
    ids
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ids(range: std::ops::Range<u64>) -> Vec<ObjectId> {
        range.map(ObjectId).collect()
    }

    #[test]
    fn what_work_under_way_made_is_found_after_a_kill() {
        let file = tempfile::tempfile().unwrap();
        let journal = Journal::open(file.try_clone().unwrap()).unwrap();
        let unit = journal.enter();
        journal.note(ids(1..4));
        journal.note([ObjectId::EMPTY_BLOB]);
        let other = journal.enter();
        journal.note(ids(4..5));
        drop(other);
        // As another process finds it.
        assert_eq!(Journal::open(file.try_clone().unwrap()).unwrap().kept(), ids(1..5));
        drop(unit);
        assert_eq!(file.metadata().unwrap().len(), 0);
    }

    #[test]
    fn what_outlives_its_work_stays_until_it_is_settled() {
        let file = tempfile::tempfile().unwrap();
        let journal = Journal::open(file.try_clone().unwrap()).unwrap();
        let unit = journal.enter();
        journal.note(ids(1..50));
        journal.keep(ids(7..9));
        drop(unit);
        let next = Journal::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(next.kept(), ids(7..9));
        next.settle(&ids(7..8));
        assert_eq!(Journal::open(file).unwrap().kept(), ids(8..9));
    }

    #[test]
    fn a_line_that_was_cut_is_none() {
        let one = ObjectId(0x1234);
        let text = line([one, ObjectId(u64::MAX)]);
        assert_eq!(text, "+ o0000000000001234\n");
        assert_eq!(parse(text.as_bytes()), [one].into());
        for end in 0..text.len() {
            assert!(parse(&text.as_bytes()[..end]).is_empty(), "{end}");
        }
        // The rest of a longer line after a shorter text.
        assert_eq!(parse(b"+ o0000000000001234\n34 o0000000000005678\n"), [one].into());
        assert!(parse(b"\xff\xfe\n+ \n+ o\n").is_empty());
    }
}
