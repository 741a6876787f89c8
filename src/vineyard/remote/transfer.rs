//! One blob of another instance, on its way here or here.

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Kind, Result};
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::vineyard::{Blob, BlobKey, Segment};

/// Blobs up to this size come whole: less would save nothing.
pub const WHOLE: u64 = 256 << 10;
/// Bytes beyond what a reader asked for, while it is not known to read on.
const AHEAD: u64 = 128 << 10;
/// Who asks for more than this is taken to read on, and then all is brought. The kernel reads ahead past what a program
/// wants (up to 1 MiB in mounts of this program, twice), often into the next column, which is not to move whole for that.
const READAHEAD: u64 = 2 << 20;
/// How far a transfer of all bytes is ahead of those who read them.
const LEAD: u64 = 8 << 20;
/// How long a transfer that has brought what was asked waits for someone to ask for more.
const LINGER: Duration = Duration::from_millis(200);
/// Places of blobs in a slab.
const ALIGNMENT: u64 = 64;

/// Size of large pages where there are such.
const HUGE_PAGE: u64 = 2 << 20;
/// Slabs from this size on come from a [`MemoryMaker`]: its pages are large.
const LARGE: u64 = HUGE_PAGE;

/// Makes a memory file of so many zeros that no other process has, with huge pages where there are such.
pub type MemoryMaker = Arc<dyn Fn(u64) -> Result<OwnedFd> + Send + Sync>;

/// Memory for blobs that are fetched together.
pub struct Slab {
    file: Arc<OwnedFd>,
    segment: Arc<Segment>,
}

/// Bytes of a blob that have arrived: in memory of this process alone, where they never change.
#[derive(Clone, Debug)]
pub struct Arrived {
    blob: Blob,
    start: u64,
    len: usize,
}

impl AsRef<[u8]> for Arrived {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `Transfer::arrived` checked that the range is inside the blob and has arrived. The memory file is
        // known to this process only, and its one writer never goes back behind what has arrived.
        unsafe { std::slice::from_raw_parts(self.blob.as_ptr().add(self.start as usize), self.len) }
    }
}

impl Slab {
    /// Memory for blobs of these sizes (none is 0), and where each begins. Pages are allocated when bytes arrive.
    ///
    /// # Errors
    /// `TooLarge` past what a file can have; the errno of making or mapping a memory file.
    pub fn new(sizes: impl Iterator<Item = u64>, maker: Option<&MemoryMaker>) -> Result<(Slab, Vec<u64>)> {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let too_large = || Error::new(Kind::TooLarge, "blobs past 2^63 bytes");
        let mut total = 0u64;
        let mut places = Vec::new();
        for size in sizes {
            places.push(total);
            let end = total.checked_add(size).and_then(|end| end.checked_next_multiple_of(ALIGNMENT));
            total = end.ok_or_else(too_large)?;
        }
        if let Some(maker) = maker.filter(|_| total >= LARGE) {
            let len = usize::try_from(total).map_err(|_| too_large())?;
            match maker(total).and_then(|file| Ok((Segment::map(&file, len)?, file))) {
                Ok((segment, file)) => return Ok((Slab { file: Arc::new(file), segment }, places)),
                Err(error) => tracing::debug!("remote data goes into small pages: {error}"),
            }
        }
        let file = memfd_create(c"remote-blobs", MFdFlags::MFD_CLOEXEC).context(|| "making a memory file".into())?;
        let len = i64::try_from(total).map_err(|_| too_large())?;
        nix::unistd::ftruncate(&file, len).context(|| format!("a memory file of {len} bytes"))?;
        let segment = Segment::map(&file, usize::try_from(total).map_err(|_| too_large())?)?;
        Ok((Slab { file: Arc::new(file), segment }, places))
    }
}

/// How far a transfer is.
#[derive(Debug)]
enum Phase {
    /// Nobody works on it: what was asked for is here, or nothing was asked for.
    Parked,
    /// It waits for a connection.
    Queued,
    /// Bytes arrive.
    Running,
    /// All bytes are here, and the blob existed after the last.
    Complete,
    /// It ended before.
    Failed(Kind, String),
}

struct State {
    /// The memory; closed when nothing is to be written any more.
    file: Option<Arc<OwnedFd>>,
    /// Bytes from the start that are here. Never shrinks; they never change.
    done: u64,
    /// Where the first reader began.
    first: Option<u64>,
    /// Where the transfer may pause.
    target: u64,
    /// Bytes of which it is known that the blob existed after they had arrived.
    verified: u64,
    /// End of what was handed out.
    handed: u64,
    /// Least end that somebody waits for; `u64::MAX` for none.
    awaited: u64,
    phase: Phase,
    /// How often somebody has begun to work on it.
    runs: u64,
}

/// What there is to verify about the bytes of a transfer.
pub enum Trust {
    /// All bytes that are here are the blob's.
    Sure,
    /// Bytes up to this one are the blob's if it exists now.
    Ask(u64),
}

/// See the [module](self).
pub struct Transfer {
    key: BlobKey,
    len: u64,
    place: u64,
    segment: Arc<Segment>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Transfer {
    /// A blob of `len` bytes of which nothing is here, at `place` of a slab.
    pub fn new(key: BlobKey, len: u64, slab: &Slab, place: u64) -> Self {
        let file = Some(slab.file.clone());
        let state = State {
            file,
            done: 0,
            first: None,
            target: 0,
            verified: 0,
            handed: 0,
            awaited: u64::MAX,
            phase: Phase::Parked,
            runs: 0,
        };
        let segment = slab.segment.clone();
        Transfer { key, len, place, segment, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Which blob.
    pub fn key(&self) -> BlobKey {
        self.key
    }

    /// Its size in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The blob's memory; only what has arrived may be read from it.
    pub fn blob(&self) -> Result<Blob> {
        Blob::new(self.key, self.segment.clone(), self.place, self.len)
    }

    /// Bytes that have arrived.
    ///
    /// # Errors
    /// `Internal` if they have not; `Malformed` if they are not inside the blob.
    pub fn arrived(&self, part: Range<u64>) -> Result<Arrived> {
        if part.start > part.end || part.end > self.state().done {
            let what = format!("bytes {} to {} of blob {} are not here", part.start, part.end, self.key);
            return Err(Error::new(Kind::Internal, what));
        }
        Ok(Arrived { blob: self.blob()?, start: part.start, len: (part.end - part.start) as usize })
    }

    /// For the worker that holds the bytes up to `position`: lets `receive` write at most `most` more to a place of the
    /// memory file. `None` if they must go through [`Transfer::store`]. Only what fills the rest of a huge page is taken
    /// at once: pages that one write fills are not cleared before.
    ///
    /// # Errors
    /// What `receive` says.
    pub fn receive<E>(
        &self,
        position: u64,
        most: u64,
        receive: impl FnOnce(&OwnedFd, u64, usize) -> Result<usize, E>,
    ) -> Option<Result<u64, E>> {
        let file = {
            let state = self.state();
            state.file.clone().filter(|_| state.done == position && most <= self.len.saturating_sub(position))?
        };
        let offset = self.place + position;
        let most = most.min(HUGE_PAGE - offset % HUGE_PAGE);
        Some(receive(&file, offset, usize::try_from(most).ok()?).map(|n| {
            let n = (n as u64).min(most);
            self.advance(position + n);
            n
        }))
    }

    fn advance(&self, done: u64) {
        let mut state = self.state();
        state.done = state.done.max(done);
        if state.done >= state.awaited {
            state.awaited = u64::MAX;
            drop(state);
            self.changed.notify_all();
        }
    }

    /// True if all bytes are here for good.
    pub fn is_complete(&self) -> bool {
        matches!(self.state().phase, Phase::Complete)
    }

    /// True if it ended before all bytes were here.
    pub fn has_failed(&self) -> bool {
        matches!(self.state().phase, Phase::Failed(..))
    }

    /// True if the last byte is here.
    pub fn has_all(&self) -> bool {
        self.state().done == self.len
    }

    /// True while somebody works on it or will.
    pub fn is_active(&self) -> bool {
        matches!(self.state().phase, Phase::Queued | Phase::Running)
    }

    /// Asks for a part. True if the caller must now queue it.
    pub fn demand(&self, part: Range<u64>) -> bool {
        let mut state = self.state();
        let end = part.end.min(self.len);
        let first = *state.first.get_or_insert(part.start);
        let reads_on = end > first.saturating_add(READAHEAD);
        let target = if self.len <= WHOLE || reads_on { self.len } else { end.saturating_add(AHEAD).min(self.len) };
        state.target = state.target.max(target);
        match state.phase {
            Phase::Parked if state.done < end => {
                state.phase = Phase::Queued;
                true
            }
            Phase::Running => {
                drop(state);
                self.changed.notify_all();
                false
            }
            _ => false,
        }
    }

    /// Waits for the bytes up to `end`, which are then the caller's to read. False if nobody works on it: ask for them
    /// anew.
    ///
    /// # Errors
    /// Why the transfer failed; `Timeout` if it does not move for `patience`.
    pub fn wait(&self, end: u64, patience: Duration) -> Result<bool> {
        let mut state = self.state();
        let mut seen = state.done;
        let mut deadline = Instant::now() + patience;
        loop {
            let here = state.done >= end;
            let late = if state.target == self.len { LEAD } else { 0 };
            let due = end.saturating_add(late).min(self.len);
            let ready = match &state.phase {
                Phase::Complete => true,
                Phase::Failed(kind, message) => return Err(Error::new(*kind, message.clone())),
                Phase::Parked if !here => return Ok(false),
                Phase::Parked => true,
                // Those in front end in good time, each by itself.
                Phase::Queued => {
                    deadline = Instant::now() + patience;
                    here
                }
                // Small blobs are worth the moment until they are verified; of large ones that come whole, bytes are
                // handed out a little late, so that one question is for many reads.
                Phase::Running => here && self.len > WHOLE && (state.verified >= end || state.done >= due),
            };
            if ready {
                state.handed = state.handed.max(end);
                return Ok(true);
            }
            if state.done != seen {
                seen = state.done;
                deadline = Instant::now() + patience;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(Kind::Timeout, format!("blob {} does not arrive", self.key)));
            }
            if state.done < due {
                state.awaited = state.awaited.min(due);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// A worker begins with it; the number of its run.
    pub fn start(&self) -> u64 {
        let mut state = self.state();
        state.phase = Phase::Running;
        state.runs += 1;
        state.runs
    }

    /// For the worker that holds the bytes up to `position`: how many more to take, at least one; `None` if nobody
    /// wants more. Waits a while for somebody who does, but not if `hurried`.
    pub fn wanted(&self, position: u64, hurried: impl Fn() -> bool) -> Option<u64> {
        let mut state = self.state();
        let deadline = Instant::now() + LINGER;
        while state.target <= position {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || hurried() {
                state.phase = Phase::Parked;
                drop(state);
                self.changed.notify_all();
                return None;
            }
            state = self.changed.wait_timeout(state, left.min(LINGER / 10)).unwrap_or_else(|e| e.into_inner()).0;
        }
        Some(state.target - position)
    }

    /// Keeps bytes that arrived for `position`; those that are here already stay as they are.
    ///
    /// # Errors
    /// `Full` if there is no memory.
    pub fn store(&self, position: u64, bytes: &[u8]) -> Result<()> {
        let (done, file) = {
            let state = self.state();
            (state.done, state.file.clone())
        };
        let end = position.saturating_add(bytes.len() as u64);
        let known = usize::try_from(done.saturating_sub(position)).unwrap_or(usize::MAX);
        let (Some(fresh), Some(file)) = (bytes.get(known..), file) else { return Ok(()) };
        if end > self.len || position > done {
            return Err(Error::new(
                Kind::Internal,
                format!("bytes {position} to {end} of blob {} at {done}", self.key),
            ));
        }
        write_all(&file, fresh, self.place + done.max(position))?;
        self.advance(end);
        Ok(())
    }

    /// All is here, and the owner has just said that the blob exists.
    pub fn complete(&self) {
        let mut state = self.state();
        state.phase = Phase::Complete;
        state.file = None;
        drop(state);
        self.changed.notify_all();
    }

    /// For the worker that began it as `run`: ends the transfer, unless it has ended. One that was parked meanwhile may be
    /// another worker's by now.
    pub fn fail(&self, run: u64, error: &Error) {
        self.end(|state| matches!(state.phase, Phase::Running) && state.runs == run, error);
    }

    /// Ends a transfer that nobody will begin.
    pub fn refuse(&self, error: &Error) {
        self.end(|state| matches!(state.phase, Phase::Queued), error);
    }

    fn end(&self, is_mine: impl FnOnce(&State) -> bool, error: &Error) {
        let mut state = self.state();
        if is_mine(&state) {
            state.phase = Phase::Failed(error.kind(), error.to_string());
            drop(state);
            self.changed.notify_all();
        }
    }

    /// What is to be asked before bytes that were copied may be believed. Waits for a transfer that is about to say so
    /// by itself.
    ///
    /// # Errors
    /// As [`Transfer::wait`].
    pub fn trust(&self, patience: Duration) -> Result<Trust> {
        let done = {
            let state = self.state();
            if matches!(state.phase, Phase::Complete) || state.verified >= state.handed {
                return Ok(Trust::Sure);
            }
            state.done
        };
        if done < self.len {
            return Ok(Trust::Ask(done));
        }
        let mut state = self.state();
        let deadline = Instant::now() + patience;
        loop {
            match &state.phase {
                Phase::Complete => return Ok(Trust::Sure),
                Phase::Failed(kind, message) => return Err(Error::new(*kind, message.clone())),
                Phase::Parked | Phase::Queued => return Ok(Trust::Ask(done)),
                Phase::Running => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Trust::Ask(done));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// The blob existed after the bytes up to `end` had arrived.
    pub fn verified(&self, end: u64) {
        let mut state = self.state();
        state.verified = state.verified.max(end);
        drop(state);
        self.changed.notify_all();
    }

    /// True if bytes were handed out of which it is not known whether they are the blob's.
    pub fn is_doubtful(&self) -> bool {
        let state = self.state();
        !matches!(state.phase, Phase::Complete) && state.verified < state.handed
    }
}

fn write_all(file: &OwnedFd, bytes: &[u8], offset: u64) -> Result<()> {
    use std::os::fd::AsFd;
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
        let at = i64::try_from(offset + done as u64).map_err(|_| Error::new(Kind::TooLarge, "past 2^63 bytes"))?;
        match nix::sys::uio::pwrite(file.as_fd(), rest, at) {
            Ok(n) => done += n,
            Err(nix::errno::Errno::EINTR) => {}
            Err(nix::errno::Errno::ENOSPC | nix::errno::Errno::ENOMEM) => {
                return Err(Error::new(Kind::Full, format!("no memory for remote data (file {})", file.as_raw_fd())));
            }
            Err(errno) => return Err(errno).context(|| "writing a memory file".into()),
        }
    }
    Ok(())
}

#[cfg(all(test, feature = "shuttle"))]
mod schedules {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sync::{schedules::check, thread};
    use crate::vineyard::{InstanceId, ObjectId};

    const PATIENCE: Duration = Duration::from_secs(3600);

    fn byte(at: u64) -> u8 {
        ((at * 7) >> 3) as u8
    }

    /// Brings bytes as the threads of [`super::super::fetch`] do, until `pieces` came or nobody wants more.
    fn bring(transfer: &Transfer, pieces: u64) {
        let run = transfer.start();
        bring_some(transfer, run, pieces);
        // As for a worker that panics; here it has said what became of it.
        transfer.fail(run, &Error::new(Kind::Internal, "given up"));
    }

    fn bring_some(transfer: &Transfer, run: u64, pieces: u64) {
        let mut position = 0;
        for _ in 0..pieces {
            // What is asked for later queues it anew.
            let Some(wanted) = transfer.wanted(position, || true) else { return };
            let end = (position + wanted).min(position + transfer.len() / 3 + 1);
            transfer.store(position, &(position..end).map(byte).collect::<Vec<u8>>()).unwrap();
            position = end;
        }
        match transfer.has_all() {
            true => transfer.complete(),
            false => transfer.fail(run, &Error::new(Kind::Unreachable, "broke off")),
        }
    }

    fn readers_and_a_worker(len: u64, pieces: u64) {
        let key = BlobKey { instance: InstanceId(3), id: ObjectId(1 << 63 | 5) };
        let (slab, places) = Slab::new([len].into_iter(), None).unwrap();
        let transfer = Arc::new(Transfer::new(key, len, &slab, places[0]));
        let readers: Vec<_> = [0..len / 2, len / 3..len, len - 1..len]
            .into_iter()
            .map(|part| {
                let transfer = transfer.clone();
                thread::spawn(move || {
                    loop {
                        if transfer.demand(part.clone()) {
                            let worker = transfer.clone();
                            thread::spawn(move || bring(&worker, pieces));
                        }
                        match transfer.wait(part.end, PATIENCE) {
                            Ok(true) => break,
                            Ok(false) => {}
                            Err(error) => return assert_eq!(error.kind(), Kind::Unreachable),
                        }
                    }
                    let arrived = transfer.arrived(part.clone()).unwrap();
                    assert!(arrived.as_ref().iter().zip(part).all(|(found, at)| *found == byte(at)));
                })
            })
            .collect();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        assert!(!transfer.is_active() || transfer.has_all());
    }

    #[test]
    fn readers_get_their_bytes_or_the_error_and_none_waits_for_nobody() {
        check(|| readers_and_a_worker(900, 100));
        check(|| readers_and_a_worker(900, 1));
    }

    #[test]
    fn large_blobs_pause_and_go_on() {
        check(|| readers_and_a_worker(WHOLE + AHEAD + 5000, 100));
    }
}
