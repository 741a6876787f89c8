//! A journal of objects that no name reaches yet, or no longer: should this process be killed, the next one finds out
//! what became of them and removes what is left over. vineyardd never reclaims them by itself.
//!
//! The file holds lines `+ ID ID ...`. What is noted here is only a suspect: whoever reads it asks the store whether a
//! name leads to it before anything is removed. So notes may stay longer than needed and may be cut short by a kill; what
//! matters is that a note is written before an object can be forgotten.
//!
//! Blobs get their ids from vineyardd, so a process that is killed before it reads the reply knows none to note. What it
//! asks for is noted ahead, as `? NUMBER MS LAST SIZE SIZE ...`: the time, the last id that was known then, and the sizes;
//! `! NUMBER` follows when the answer is noted. An id tells when and in which order it was made, so
//! [`Store::unanswered`](super::Store::unanswered) finds such blobs. The same holds for a process that lives on after an
//! answer did not come in time.
//!
//! Notes matter most where memory ends, so a file that has [`LEAST_LEN`] bytes keeps them: what is no note is zeros.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;
use std::time::{SystemTime, UNIX_EPOCH};

use super::id::ObjectId;
use crate::error::{Context, Result};
use crate::sync::{Condvar, Mutex, MutexGuard};

/// Bytes that a file keeps, if it has them, so that notes need no new memory.
pub const LEAST_LEN: u64 = 64 << 10;
/// Most bytes before work waits until all work under way has ended, so that the journal can begin anew.
const MAX_LEN: u64 = 16 << 20;
/// Most bytes that are read of a journal that others may have written to.
const MAX_READ: u64 = 64 << 20;

/// Blobs that were asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Not asked for before this time, in milliseconds since 1970 of the clock that blob ids are made from.
    pub since: u64,
    /// Not made after this time: when this process began, which came after the one that asked had ended. `u64::MAX` in
    /// the process that asks, and where the clock was set back in between.
    pub until: u64,
    /// An id that was made before; `INVALID` if none is known.
    pub after: ObjectId,
    /// Their sizes in bytes, none 0, in the order in which they are made.
    pub sizes: Vec<u64>,
    /// Which vineyardd was asked, by the number that this process has for it; `None` if another process has asked.
    pub generation: Option<u64>,
}

/// The number of a [`Wish`] in its journal.
#[derive(Debug)]
#[must_use]
pub struct Asked(u64);

/// The journal of a client.
#[derive(Debug)]
pub struct Journal {
    file: File,
    state: Mutex<State>,
    idle: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes of text.
    len: u64,
    /// Bytes of the file that hold text or zeros for sure, at least `len`.
    file_len: u64,
    /// Pieces of work under way.
    units: usize,
    /// What outlives the work it came from: what a former process left, and deletions that wait for readers.
    kept: BTreeSet<ObjectId>,
    /// What is asked for, or was and never answered.
    wishes: BTreeMap<u64, Wish>,
    /// The first number of this process's own wishes.
    own: u64,
    /// This process's own wishes whose answers are lost.
    failed: BTreeSet<u64>,
    /// The last id that was noted.
    last: Option<ObjectId>,
    /// What this process made since nothing was under way and every wish was answered.
    made: BTreeSet<ObjectId>,
}

impl State {
    fn has_unanswered(&self) -> bool {
        !self.failed.is_empty() || self.wishes.range(..self.own).next().is_some()
    }
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
        let (kept, mut wishes) = parse(&text);
        // A line that was cut is written over.
        let end = text.iter().rposition(|&b| b == b'\n').map_or(0, |end| end as u64 + 1);
        let now = now_ms();
        wishes.values_mut().for_each(|wish| wish.until = if now < wish.since { u64::MAX } else { now });
        let own = wishes.keys().next_back().map_or(0, |last| last + 1);
        let state = State { len: end, file_len: len, kept, wishes, own, ..State::default() };
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
        let mut last = None;
        let text = line(ids.into_iter().inspect(|id| last = Some(*id)));
        if !text.is_empty() {
            let mut state = self.state();
            self.append(&mut state, &text);
            state.last = last;
        }
    }

    /// Notes that blobs of these sizes are about to be asked for. What is never [answered](Self::answered) is kept.
    ///
    /// # Errors
    /// If there is no room for the note.
    pub fn ask(&self, sizes: &[u64]) -> Result<Asked> {
        let mut state = self.state();
        let number = state.wishes.keys().next_back().map_or(state.own, |last| (last + 1).max(state.own));
        let sizes = sizes.iter().copied().filter(|&size| size > 0).collect();
        let wish = Wish {
            since: now_ms(),
            until: u64::MAX,
            after: state.last.unwrap_or(ObjectId::INVALID),
            sizes,
            generation: None,
        };
        self.try_append(&mut state, &wish_line(number, &wish)).context(|| "noting what is to be stored".into())?;
        state.wishes.insert(number, wish);
        Ok(Asked(number))
    }

    /// Notes the blobs that were made of those that were asked for.
    pub fn answered(&self, asked: Asked, made: impl IntoIterator<Item = ObjectId>) {
        let made: Vec<ObjectId> = made.into_iter().collect();
        let mut text = line(made.iter().copied());
        text.push_str(&format!("! {}\n", asked.0));
        let mut state = self.state();
        state.wishes.remove(&asked.0);
        state.last = made.last().copied().or(state.last);
        self.append(&mut state, &text);
        state.made.extend(made);
    }

    /// Notes the blobs of whose making this process learned before the answer was lost; the others are
    /// [unanswered](Self::unanswered) from now on. They were asked for at `sent`, in milliseconds since 1970, of the
    /// vineyardd of this generation.
    pub fn failed(&self, asked: Asked, made: &[ObjectId], sent: u64, generation: u64) {
        let mut state = self.state();
        let mut text = line(made.iter().copied());
        if let Some(mut wish) = state.wishes.remove(&asked.0) {
            wish.sizes.drain(..made.len().min(wish.sizes.len()));
            wish.after = made.last().copied().unwrap_or(wish.after);
            wish.since = wish.since.max(sent);
            wish.generation = Some(generation);
            // The later line counts.
            text.push_str(&format!("! {}\n", asked.0));
            if !wish.sizes.is_empty() {
                text.push_str(&wish_line(asked.0, &wish));
                state.wishes.insert(asked.0, wish);
                state.failed.insert(asked.0);
            }
        }
        state.last = made.last().copied().or(state.last);
        self.append(&mut state, &text);
        state.made.extend(made);
    }

    /// The wishes that still wait for their answers.
    pub fn under_way(&self) -> Vec<u64> {
        let state = self.state();
        state.wishes.range(state.own..).map(|(number, _)| *number).filter(|n| !state.failed.contains(n)).collect()
    }

    /// Whether one of these wishes still waits for its answer.
    pub fn any_under_way(&self, wishes: &[u64]) -> bool {
        let state = self.state();
        wishes.iter().any(|number| state.wishes.contains_key(number) && !state.failed.contains(number))
    }

    /// Whether this process made a blob, and no former one; known as long as wishes are [unanswered](Self::unanswered).
    pub fn is_own(&self, id: ObjectId) -> bool {
        self.state().made.contains(&id)
    }

    /// What was asked for and never answered: of a former process, or of this one. By number.
    pub fn unanswered(&self) -> BTreeMap<u64, Wish> {
        let state = self.state();
        let lost = |number: u64| number < state.own || state.failed.contains(&number);
        state.wishes.iter().filter(|(number, _)| lost(**number)).map(|(number, wish)| (*number, wish.clone())).collect()
    }

    /// Nothing is left of what these wishes asked for.
    pub fn settle_unanswered(&self, wishes: impl IntoIterator<Item = u64>) {
        let mut state = self.state();
        for number in wishes {
            state.wishes.remove(&number);
            state.failed.remove(&number);
        }
        if state.units == 0 {
            self.tidy(&mut state);
        }
    }

    fn append(&self, state: &mut State, text: &str) {
        if let Err(error) = self.try_append(state, text) {
            tracing::warn!("no note in the journal: {error}");
        }
    }

    fn try_append(&self, state: &mut State, text: &str) -> std::io::Result<()> {
        self.file.write_all_at(text.as_bytes(), state.len)?;
        state.len += text.len() as u64;
        state.file_len = state.file_len.max(state.len);
        Ok(())
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
            self.tidy(&mut state);
        }
    }

    /// Nothing is under way.
    fn tidy(&self, state: &mut State) {
        if !state.has_unanswered() {
            state.made.clear();
        }
        if state.len > 0 {
            self.renew(state);
        }
    }

    /// Writes anew what is kept. A kill between the two steps leaves too many notes and none too few.
    fn renew(&self, state: &mut State) {
        let mut text = line(state.kept.iter().copied());
        text.extend(state.wishes.iter().map(|(number, wish)| wish_line(*number, wish)));
        let len = text.len() as u64;
        let mut bytes = text.into_bytes();
        let keeps = state.file_len >= LEAST_LEN;
        if keeps {
            bytes.resize(bytes.len().max(state.len.min(LEAST_LEN) as usize), 0);
        }
        let file_len = if keeps { len.max(LEAST_LEN) } else { len };
        let shortened = self.file.write_all_at(&bytes, 0).and_then(|()| match file_len == state.file_len {
            true => Ok(()),
            false => self.file.set_len(file_len),
        });
        match shortened {
            Ok(()) => (state.len, state.file_len) = (len, file_len),
            Err(error) => tracing::warn!("the journal cannot be shortened: {error}"),
        }
    }
}

impl Drop for Unit<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.units = state.units.saturating_sub(1);
        if state.units == 0 {
            self.0.tidy(&mut state);
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

/// Milliseconds since 1970.
pub(super) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

fn wish_line(number: u64, wish: &Wish) -> String {
    let mut text = format!("? {number} {} {}", wish.since, wish.after);
    for size in &wish.sizes {
        text.push_str(&format!(" {size}"));
    }
    text.push('\n');
    text
}

fn parse_wish(text: &str) -> Option<(u64, Wish)> {
    let mut words = text.split(' ');
    let number = words.next()?.parse().ok()?;
    let since = words.next()?.parse().ok()?;
    let after = words.next()?.parse().ok()?;
    let sizes = words.map(|word| word.parse().ok()).collect::<Option<Vec<u64>>>()?;
    Some((number, Wish { since, until: u64::MAX, after, sizes, generation: None }))
}

/// The ids and wishes of all lines that are one. A line that a kill cut short, and what a shorter text was written over,
/// is none.
fn parse(text: &[u8]) -> (BTreeSet<ObjectId>, BTreeMap<u64, Wish>) {
    let (mut ids, mut wishes) = (BTreeSet::new(), BTreeMap::new());
    let whole = text.iter().rposition(|&b| b == b'\n').map_or(0, |end| end + 1);
    for line in text.get(..whole).unwrap_or_default().split(|&b| b == b'\n') {
        match std::str::from_utf8(line).ok().and_then(|line| line.split_at_checked(2)) {
            Some(("+ ", list)) => ids.extend(list.split(' ').filter_map(|id| id.parse::<ObjectId>().ok())),
            Some(("? ", wish)) => wishes.extend(parse_wish(wish)),
            Some(("! ", number)) => drop(number.parse().ok().and_then(|number: u64| wishes.remove(&number))),
            _ => {}
        }
    }
    ids.remove(&ObjectId::EMPTY_BLOB);
    ids.remove(&ObjectId::INVALID);
    (ids, wishes)
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
        assert_eq!(parse(text.as_bytes()).0, [one].into());
        for end in 0..text.len() {
            assert!(parse(&text.as_bytes()[..end]).0.is_empty(), "{end}");
        }
        // The rest of a longer line after a shorter text.
        assert_eq!(parse(b"+ o0000000000001234\n34 o0000000000005678\n").0, [one].into());
        assert_eq!(parse(b"\xff\xfe\n+ \n+ o\n? \n? 1 2\n! \n\xc3\xa4\xc3\n"), Default::default());
    }

    #[test]
    fn wishes_outlive_a_clock_that_is_set_back() {
        let file = tempfile::tempfile().unwrap();
        let later = now_ms() + 86_400_000;
        file.write_all_at(format!("? 0 {later} o8000000000000007 5\n").as_bytes(), 0).unwrap();
        let journal = Journal::open(file).unwrap();
        let wish = journal.unanswered().remove(&0).unwrap();
        assert_eq!((wish.since, wish.until), (later, u64::MAX));
        // Times tell no more which blobs are this process's own.
        let asked = journal.ask(&[5]).unwrap();
        journal.answered(asked, ids(8..9));
        assert!(journal.is_own(ObjectId(8)) && !journal.is_own(ObjectId(9)));
        journal.settle_unanswered([0]);
        assert!(!journal.is_own(ObjectId(8)));
        let asked = journal.ask(&[5]).unwrap();
        journal.answered(asked, ids(9..10));
        drop(journal.enter());
        assert!(!journal.is_own(ObjectId(9)), "nothing is kept once nothing is open");
    }

    #[test]
    fn an_answer_that_is_lost_leaves_the_rest_of_the_wish_open_here_and_after_a_kill() {
        let file = tempfile::tempfile().unwrap();
        let journal = Journal::open(file.try_clone().unwrap()).unwrap();
        let unit = journal.enter();
        let (lost, other) = (journal.ask(&[10, 20, 30]).unwrap(), journal.ask(&[20]).unwrap());
        assert_eq!(journal.under_way(), [0, 1]);
        let sent = now_ms() + 7;
        journal.failed(lost, &ids(8..9), sent, 3);
        assert_eq!(journal.under_way(), [1]);
        assert!(journal.any_under_way(&[0, 1]) && !journal.any_under_way(&[0]));
        let open = Wish { since: sent, until: u64::MAX, after: ObjectId(8), sizes: vec![20, 30], generation: Some(3) };
        assert_eq!(journal.unanswered(), [(0, open.clone())].into());
        let next = Journal::open(file.try_clone().unwrap()).unwrap();
        let known: Vec<Wish> = next.unanswered().into_values().collect();
        assert_eq!(known.iter().map(|wish| wish.sizes.clone()).collect::<Vec<_>>(), [vec![20, 30], vec![20]]);
        assert_eq!((known[0].after, next.kept()), (ObjectId(8), ids(8..9)));
        // What came before is known to be this process's own, too.
        journal.answered(other, ids(9..10));
        drop(unit);
        assert!(journal.is_own(ObjectId(8)) && journal.is_own(ObjectId(9)));
        let wholly = journal.ask(&[40]).unwrap();
        journal.failed(wholly, &ids(11..12), sent, 3);
        assert_eq!(journal.unanswered().len(), 1, "all of it was made");
        journal.settle_unanswered([0]);
        assert!(journal.unanswered().is_empty() && !journal.is_own(ObjectId(8)));
        assert_eq!(file.metadata().unwrap().len(), 0);
    }

    #[test]
    fn a_file_with_room_keeps_it_and_needs_no_more() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LEAST_LEN).unwrap();
        let journal = Journal::open(file.try_clone().unwrap()).unwrap();
        let text = || {
            let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            String::from_utf8(bytes).unwrap()
        };
        let unit = journal.enter();
        journal.keep(ids(1..3));
        journal.note(ids(3..900));
        drop(unit);
        assert_eq!(text().trim_end_matches('\0'), "+ o0000000000000001 o0000000000000002\n");
        assert_eq!(file.metadata().unwrap().len(), LEAST_LEN);
        let next = Journal::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(next.kept(), ids(1..3));
        let unit = next.enter();
        next.note(ids(3..9000));
        assert!(file.metadata().unwrap().len() > LEAST_LEN);
        drop(unit);
        assert_eq!(file.metadata().unwrap().len(), LEAST_LEN);
        next.settle(&ids(1..3));
        assert_eq!(text().trim_end_matches('\0'), "");
        // A line that a kill has cut is written over.
        file.write_all_at(b"+ o0000000000000001\n? 7 12", 0).unwrap();
        let next = Journal::open(file.try_clone().unwrap()).unwrap();
        next.note(ids(2..3));
        assert_eq!(Journal::open(file.try_clone().unwrap()).unwrap().kept(), ids(1..3));
    }

    #[test]
    fn what_was_asked_for_and_not_answered_is_found_after_a_kill() {
        let file = tempfile::tempfile().unwrap();
        let journal = Journal::open(file.try_clone().unwrap()).unwrap();
        let unit = journal.enter();
        journal.note(ids(5..7));
        let first = journal.ask(&[10, 0, 20]).unwrap();
        let second = journal.ask(&[30]).unwrap();
        let reopen = || Journal::open(file.try_clone().unwrap()).unwrap();
        let found: Vec<Wish> = reopen().unanswered().into_values().collect();
        assert_eq!(found.iter().map(|wish| wish.sizes.clone()).collect::<Vec<_>>(), [vec![10, 20], vec![30]]);
        assert!(found.iter().all(|wish| wish.after == ObjectId(6) && wish.since > 1_700_000_000_000));
        assert!(journal.unanswered().is_empty(), "it may still see the answers");
        journal.answered(first, ids(7..8));
        let sizes = |journal: &Journal| journal.unanswered().into_values().map(|wish| wish.sizes).collect::<Vec<_>>();
        assert_eq!(sizes(&reopen()), [[30]]);
        assert!(found.iter().all(|wish| wish.since <= wish.until && wish.until <= now_ms()));
        // It outlives the work under way.
        drop(unit);
        let next = reopen();
        let third = next.ask(&[40]).unwrap();
        assert_eq!(sizes(&next), [[30]]);
        next.settle_unanswered(next.unanswered().into_keys());
        assert_eq!(reopen().unanswered().len(), 1);
        next.answered(third, []);
        next.settle(&[]);
        assert_eq!(file.metadata().unwrap().len(), 0);
        drop(second);
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod schedules {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;
    use crate::sync::{schedules::check, thread};

    #[test]
    fn a_kill_at_any_moment_finds_what_was_noted() {
        check(|| {
            let file = tempfile::tempfile().unwrap();
            let journal = Arc::new(Journal::open(file.try_clone().unwrap()).unwrap());
            let workers: Vec<_> = (0..3u64)
                .map(|worker| {
                    let (journal, file) = (journal.clone(), file.try_clone().unwrap());
                    thread::spawn(move || {
                        // As the next process reads the file, should this one end here.
                        let next = || Journal::open(file.try_clone().unwrap()).unwrap();
                        for round in 0..2 {
                            let unit = journal.enter();
                            let id = ObjectId(100 * worker + round + 1);
                            let asked = journal.ask(&[1000 + id.0]).unwrap();
                            assert!(next().unanswered().values().any(|wish| wish.sizes == [1000 + id.0]));
                            journal.answered(asked, [id]);
                            assert!(next().kept().contains(&id));
                            if round == 1 {
                                journal.keep([id]);
                            }
                            drop(unit);
                            assert!(round == 0 || next().kept().contains(&id));
                        }
                    })
                })
                .collect();
            workers.into_iter().for_each(|worker| worker.join().unwrap());
            let next = Journal::open(file.try_clone().unwrap()).unwrap();
            assert_eq!(next.kept(), [ObjectId(2), ObjectId(102), ObjectId(202)]);
            assert!(next.unanswered().is_empty());
            journal.settle(&next.kept());
            assert_eq!(file.metadata().unwrap().len(), 0);
        });
    }
}
