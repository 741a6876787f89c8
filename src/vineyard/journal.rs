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
//! [`Store::unanswered`](super::Store::unanswered) finds blobs that may be those. The same holds for a process that lives
//! on after an answer did not come in time.
//!
//! Work may overlap for ever, so the file does not wait for an idle moment to become shorter: past [`MAX_LEN`] it is
//! written anew with what still counts.
//!
//! Notes matter most where memory ends, so a file that has [`LEAST_LEN`] bytes keeps them: what is no note is zeros.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;
use std::time::{SystemTime, UNIX_EPOCH};

use super::id::ObjectId;
use crate::error::{Context, Result};
use crate::sync::{Mutex, MutexGuard};

/// Bytes that a file keeps, if it has them, so that notes need no new memory.
pub const LEAST_LEN: u64 = 64 << 10;
/// Bytes from which on the journal is written anew while work is under way.
const MAX_LEN: u64 = 16 << 20;
/// Most bytes that are read of a journal that others may have written to.
const MAX_READ: u64 = 64 << 20;
/// A kill leaves a write within one page whole or undone. Of a longer one it may leave a part.
const PAGE: u64 = 4096;

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
    /// [`MAX_LEN`], or less in tests.
    max_len: u64,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes of text.
    len: u64,
    /// Bytes of the file that hold text or zeros for sure, at least `len`.
    file_len: u64,
    /// The text is written anew when it is longer.
    full: u64,
    /// Pieces of work that were begun.
    entered: u64,
    /// The numbers of those under way.
    active: BTreeSet<u64>,
    /// What was noted, with the number of the piece of work that was begun last at that time. Whichever piece noted it, its
    /// number is not higher: when all up to that number have ended, the note counts no more.
    noted: VecDeque<(u64, Vec<ObjectId>)>,
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

    /// Remembers what was noted, so that it can be noted again.
    fn remember(&mut self, ids: Vec<ObjectId>) {
        if !ids.is_empty() {
            self.noted.push_back((self.entered, ids));
        }
    }

    /// All that counts, as text.
    fn text(&self) -> String {
        let noted = self.noted.iter().flat_map(|(_, ids)| ids);
        let ids: BTreeSet<ObjectId> = self.kept.iter().chain(noted).copied().collect();
        let mut text = line(ids);
        text.extend(self.wishes.iter().map(|(number, wish)| wish_line(*number, wish)));
        text
    }
}

/// A piece of work under way: what is noted meanwhile is forgotten when all work has ended.
#[derive(Debug)]
pub struct Unit<'a>(&'a Journal, u64);

/// A step on the way to a shorter text.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// Writes the new text at this place.
    Text(u64),
    /// Writes zeros here.
    Zeros(Range<u64>),
    /// Gives the file this length.
    Cut(u64),
}

/// The steps that put a text of `new` bytes in the place of one of `old` bytes, in a file of `file_len` bytes, and the
/// length of the file after them. A kill before, after or within any of them leaves what the new text says, and perhaps
/// some of what the old one said: no half of an id meets another half, as only zeros and ends of lines are written over
/// the rest of a text.
fn shortening(old: u64, file_len: u64, new: u64) -> (Vec<Step>, u64) {
    let end = if file_len >= LEAST_LEN { new.max(LEAST_LEN) } else { new };
    let mut steps = Vec::new();
    let mut used = old;
    if new > PAGE {
        // It stands behind the old one until it stands in front. The end of the line before it stays.
        steps.extend([Step::Text(old), Step::Zeros(0..old.saturating_sub(1))]);
        used = old + new;
    }
    steps.push(Step::Text(0));
    if new < used.min(end) {
        steps.push(Step::Zeros(new..used.min(end)));
    }
    if end != file_len.max(used) {
        steps.push(Step::Cut(end));
    }
    (steps, end)
}

impl Journal {
    /// A journal in a file. What a former process noted there is kept until it is [settled](Self::settle).
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn open(file: File) -> Result<Self> {
        Self::open_with(file, MAX_LEN)
    }

    fn open_with(file: File, max_len: u64) -> Result<Self> {
        let len = file.metadata().context(|| "looking at the journal".into())?.len();
        let mut text = vec![0; len.min(MAX_READ) as usize];
        file.read_exact_at(&mut text, 0).context(|| "reading the journal".into())?;
        let (kept, mut wishes) = parse(&text);
        // A line that was cut is written over.
        let end = text.iter().rposition(|&b| b == b'\n').map_or(0, |end| end as u64 + 1);
        let now = now_ms();
        wishes.values_mut().for_each(|wish| wish.until = if now < wish.since { u64::MAX } else { now });
        let own = wishes.keys().next_back().map_or(0, |last| last + 1);
        let state = State { len: end, file_len: len, full: max_len, kept, wishes, own, ..State::default() };
        Ok(Journal { file, state: Mutex::new(state), max_len })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a piece of work.
    pub fn enter(&self) -> Unit<'_> {
        let mut state = self.state();
        state.entered += 1;
        let number = state.entered;
        state.active.insert(number);
        Unit(self, number)
    }

    /// Notes what exists now, or is about to lose its name. Without room for a note, work goes on without one.
    pub fn note(&self, ids: impl IntoIterator<Item = ObjectId>) {
        let ids: Vec<ObjectId> = ids.into_iter().collect();
        let text = line(ids.iter().copied());
        if !text.is_empty() {
            let mut state = self.state();
            state.last = ids.last().copied();
            state.remember(ids);
            self.append(&mut state, &text);
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
        self.limit(&mut state);
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
        state.made.extend(&made);
        state.remember(made);
        self.append(&mut state, &text);
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
            if wish.sizes.is_empty() {
                text.push_str(&format!("! {}\n", asked.0));
            } else {
                // The later line counts. Were the wish closed first, a kill in between would lose it.
                text.push_str(&wish_line(asked.0, &wish));
                state.wishes.insert(asked.0, wish);
                state.failed.insert(asked.0);
            }
        }
        state.last = made.last().copied().or(state.last);
        state.made.extend(made);
        state.remember(made.to_vec());
        self.append(&mut state, &text);
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
        if state.active.is_empty() {
            self.tidy(&mut state);
        }
    }

    fn append(&self, state: &mut State, text: &str) {
        if let Err(error) = self.try_append(state, text) {
            tracing::warn!("no note in the journal: {error}");
        }
        self.limit(state);
    }

    fn try_append(&self, state: &mut State, text: &str) -> std::io::Result<()> {
        if let Err(error) = self.file.write_all_at(text.as_bytes(), state.len) {
            self.look_again(state);
            return Err(error);
        }
        state.len += text.len() as u64;
        state.file_len = state.file_len.max(state.len);
        Ok(())
    }

    /// Notes what outlives the work under way.
    pub fn keep(&self, ids: impl IntoIterator<Item = ObjectId>) {
        let ids: Vec<ObjectId> = ids.into_iter().collect();
        let mut state = self.state();
        state.kept.extend(&ids);
        self.append(&mut state, &line(ids));
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
        if state.active.is_empty() {
            self.tidy(&mut state);
        }
    }

    /// Nothing is under way.
    fn tidy(&self, state: &mut State) {
        state.noted.clear();
        if !state.has_unanswered() {
            state.made.clear();
        }
        if state.len > 0 {
            self.renew(state);
        }
    }

    /// Writes the text anew if it has become too long.
    fn limit(&self, state: &mut State) {
        if state.len <= state.full {
            return;
        }
        // What was made before all that is under way was begun was also made before any of it asked.
        if !state.has_unanswered() {
            let noted: BTreeSet<ObjectId> = state.noted.iter().flat_map(|(_, ids)| ids).copied().collect();
            state.made.retain(|id| noted.contains(id));
        }
        self.renew(state);
        // As often as it doubles, so that it costs little also where all of it counts, or it could not become shorter.
        state.full = self.max_len.max(2 * state.len);
    }

    /// Writes anew what counts.
    fn renew(&self, state: &mut State) {
        let text = state.text();
        let len = text.len() as u64;
        // Longer than before if notes found no room. And what is not read after a kill is no note.
        if len > PAGE && (len > state.len || state.len + len > MAX_READ) {
            return;
        }
        let (steps, file_len) = shortening(state.len, state.file_len, len);
        let old = state.len;
        for step in steps {
            if let Err(error) = self.take(&step, text.as_bytes()) {
                tracing::warn!("the journal cannot be shortened: {error}");
                self.look_again(state);
                return;
            }
            if step == Step::Text(old) && old > 0 {
                // Should a later step fail, it stays there.
                state.len = old + len;
                state.file_len = state.file_len.max(state.len);
            }
        }
        (state.len, state.file_len) = (len, file_len);
    }

    /// A write that failed may have left a part of it, which goes with the next [`Step::Cut`].
    fn look_again(&self, state: &mut State) {
        if let Ok(meta) = self.file.metadata() {
            state.file_len = meta.len();
        }
    }

    /// Takes one step.
    fn take(&self, step: &Step, text: &[u8]) -> std::io::Result<()> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        match step {
            Step::Text(at) => self.file.write_all_at(text, *at),
            Step::Zeros(place) => {
                let mut at = place.start;
                while at < place.end {
                    let part = ZEROS.get(..(place.end - at) as usize).unwrap_or(&ZEROS);
                    self.file.write_all_at(part, at)?;
                    at += part.len() as u64;
                }
                Ok(())
            }
            Step::Cut(len) => self.file.set_len(*len),
        }
    }
}

impl Drop for Unit<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.active.remove(&self.1);
        match state.active.first().copied() {
            None => self.0.tidy(&mut state),
            Some(least) => {
                while state.noted.front().is_some_and(|(number, _)| *number < least) {
                    state.noted.pop_front();
                }
            }
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
mod tests;

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
