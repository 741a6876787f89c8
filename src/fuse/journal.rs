//! What a server is working on, in memory that its keeper holds: it outlives the server.
//!
//! Each request has an entry while it waits or is worked on. The next server sees which requests were in work when the
//! last one ended; the kernel sends those again, and one that was in work at the end of [`STRIKES`] servers in a row is
//! answered EIO instead of taking the next one down. The keeper sees whether a server makes progress at all.
//!
//! All fields are atomic integers, and nothing of another process is believed beyond their values.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::time::Duration;

use memmap2::MmapRaw;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::time::{ClockId, clock_gettime};

use crate::error::{Context, Error, Kind, Result};

/// How many servers a request may take down.
pub const STRIKES: u64 = 3;
/// Bit of a request's id: the kernel sent it before.
pub const RESENT: u64 = 1 << 63;

/// Requests that have an entry at the same time; more go without.
const ENTRIES: usize = 4096;
/// Requests whose strikes are counted.
const SUSPECTS: usize = 64;
/// How many entries are tried before a request goes without.
const TRIES: usize = 16;
const WORDS: usize = HEADER + 2 * SUSPECTS + 2 * ENTRIES;
const BYTES: usize = WORDS * 8;

/// Words of the header.
const HEARTBEAT: usize = 0;
const ANSWERED: usize = 1;
const HEADER: usize = 8;

/// The journal, mapped.
pub struct Journal {
    map: MmapRaw,
    next: AtomicU64,
    suspects: HashMap<u64, u64>,
}

/// The entry of one request, until it is dropped.
pub struct Entry {
    journal: Arc<Journal>,
    at: Option<usize>,
}

/// Milliseconds of a clock that never jumps.
fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1)
}

impl Journal {
    /// A new, empty one, for a keeper.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn create() -> Result<OwnedFd> {
        let fd = memfd_create("journal", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&fd, BYTES as i64)?;
        // Nobody can shorten it under the keeper's mapping.
        let seals = nix::fcntl::SealFlag::F_SEAL_SHRINK | nix::fcntl::SealFlag::F_SEAL_GROW;
        nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_ADD_SEALS(seals))?;
        Ok(fd)
    }

    /// Maps one that exists.
    ///
    /// # Errors
    /// `Invalid` if it has another size, as one of another version of this program may.
    pub fn open(fd: OwnedFd) -> Result<Self> {
        let file = File::from(fd);
        if file.metadata()?.len() != BYTES as u64 {
            return Err(Error::new(Kind::Invalid, "the journal of requests has another size"));
        }
        let map = memmap2::MmapOptions::new().len(BYTES).map_raw(&file).context(|| "mapping the journal".into())?;
        Ok(Journal { map, next: AtomicU64::new(0), suspects: HashMap::new() })
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        debug_assert!(index < WORDS);
        // SAFETY: the mapping has WORDS words, is aligned to pages, is never shortened (it is sealed) and lives as long
        // as `self`; other processes touch it through atomic operations only.
        unsafe { &*self.map.as_ptr().cast::<AtomicU64>().add(index.min(WORDS - 1)) }
    }

    fn id(&self, entry: usize) -> &AtomicU64 {
        self.word(HEADER + 2 * SUSPECTS + 2 * entry)
    }

    /// 0 while the request waits; then the time when work began.
    fn since(&self, entry: usize) -> &AtomicU64 {
        self.word(HEADER + 2 * SUSPECTS + 2 * entry + 1)
    }

    /// For a server at its start: counts the strikes of what the last one was working on, and empties the entries.
    /// Returns the ids of all requests that the last one had read and not answered, as far as they are known.
    pub fn begin(&mut self) -> Vec<u64> {
        let former: HashMap<u64, u64> = (0..SUSPECTS)
            .map(|i| (self.word(HEADER + 2 * i).load(Acquire), self.word(HEADER + 2 * i + 1).load(Acquire)))
            .filter(|(id, _)| *id != 0)
            .collect();
        let mut unanswered = Vec::new();
        for entry in 0..ENTRIES {
            let (id, since) = (self.id(entry).load(Acquire), self.since(entry).load(Acquire));
            if id == 0 {
                continue;
            }
            unanswered.push(id);
            if since != 0 && self.suspects.len() < SUSPECTS {
                let strikes = former.get(&id).copied().unwrap_or(0).saturating_add(1);
                self.suspects.insert(id, strikes);
            }
        }
        // In this order a server that dies right here costs nobody a strike, and forgives nobody.
        let mut rest = self.suspects.iter();
        for i in 0..SUSPECTS {
            let (id, strikes) = rest.next().map_or((0, 0), |(id, strikes)| (*id, *strikes));
            self.word(HEADER + 2 * i + 1).store(strikes, Release);
            self.word(HEADER + 2 * i).store(id, Release);
        }
        for entry in 0..ENTRIES {
            self.id(entry).store(0, Release);
            self.since(entry).store(0, Release);
        }
        unanswered
    }

    /// Whether a request must not be worked on any more.
    pub fn is_refused(&self, unique: u64) -> bool {
        !self.suspects.is_empty()
            && unique & RESENT != 0
            && self.suspects.get(&(unique & !RESENT)).is_some_and(|strikes| *strikes >= STRIKES)
    }

    /// Notes that a request has come.
    pub fn enter(self: &Arc<Self>, unique: u64) -> Entry {
        let id = unique & !RESENT;
        let first = self.next.fetch_add(1, Relaxed) as usize;
        let free = (0..TRIES)
            .map(|i| (first + i) % ENTRIES)
            .find(|entry| self.id(*entry).compare_exchange(0, id, AcqRel, Relaxed).is_ok());
        Entry { journal: self.clone(), at: free }
    }

    /// A sign of life, from time to time.
    pub fn beat(&self) {
        self.word(HEARTBEAT).store(now(), Release);
    }

    /// For the keeper: how a server is doing.
    pub fn pulse(&self) -> Pulse {
        let now = now();
        let since = (0..ENTRIES).map(|entry| self.since(entry).load(Relaxed)).filter(|since| *since != 0).min();
        let age = |since: u64| Duration::from_millis(now.saturating_sub(since));
        Pulse {
            silent: age(self.word(HEARTBEAT).load(Acquire)),
            answered: self.word(ANSWERED).load(Relaxed),
            oldest: since.map(age),
        }
    }
}

/// What a keeper sees of a server's work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pulse {
    /// Time since the last sign of life.
    pub silent: Duration,
    /// Requests answered, by all servers.
    pub answered: u64,
    /// For how long the oldest request has been worked on.
    pub oldest: Option<Duration>,
}

impl Entry {
    /// Work on the request begins.
    pub fn begin(&self) {
        if let Some(at) = self.at {
            self.journal.since(at).store(now(), Release);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.journal.word(ANSWERED).fetch_add(1, Relaxed);
        if let Some(at) = self.at {
            self.journal.since(at).store(0, Release);
            self.journal.id(at).store(0, Release);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The journal as the next server finds it.
    fn next(fd: &OwnedFd) -> (Arc<Journal>, Vec<u64>) {
        let mut journal = Journal::open(fd.try_clone().unwrap()).unwrap();
        let mut unanswered = journal.begin();
        unanswered.sort_unstable();
        (Arc::new(journal), unanswered)
    }

    #[test]
    fn a_request_that_takes_three_servers_down_is_refused() {
        let fd = Journal::create().unwrap();
        let bad = 7 | RESENT;
        for server in 0..STRIKES {
            let (journal, unanswered) = next(&fd);
            assert_eq!(unanswered, if server == 0 { vec![] } else { vec![7, 8] });
            assert!(!journal.is_refused(bad), "server {server}");
            let (entry, waiting, done) = (journal.enter(bad), journal.enter(8), journal.enter(9));
            entry.begin();
            done.begin();
            drop(done);
            // This one dies now.
            std::mem::forget((entry, waiting));
        }
        let (journal, _) = next(&fd);
        assert!(journal.is_refused(bad));
        assert!(!journal.is_refused(7), "a new request with the same number");
        assert!(!journal.is_refused(8 | RESENT), "it only waited");
        drop(journal);
        let (journal, unanswered) = next(&fd);
        assert!(!journal.is_refused(bad) && unanswered.is_empty(), "a server that worked on nothing forgives");
    }

    #[test]
    fn the_keeper_sees_work_and_silence() {
        let fd = Journal::create().unwrap();
        let keeper = Journal::open(fd.try_clone().unwrap()).unwrap();
        let (journal, _) = next(&fd);
        journal.beat();
        let entry = journal.enter(3);
        assert_eq!(keeper.pulse().oldest, None);
        entry.begin();
        std::thread::sleep(Duration::from_millis(20));
        let pulse = keeper.pulse();
        assert!(pulse.oldest.unwrap() >= Duration::from_millis(15) && pulse.silent >= Duration::from_millis(15));
        drop(entry);
        assert_eq!((keeper.pulse().oldest, keeper.pulse().answered), (None, 1));
    }

    #[test]
    fn more_requests_than_entries_go_without() {
        let fd = Journal::create().unwrap();
        let (journal, _) = next(&fd);
        let entries: Vec<Entry> = (1..=ENTRIES as u64 + 10).map(|id| journal.enter(id)).collect();
        assert_eq!(entries.iter().filter(|entry| entry.at.is_none()).count(), 10);
        drop(entries);
        assert!(journal.enter(1).at.is_some());
        let other = memfd_create("short", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(Journal::open(other).is_err());
    }
}
