//! Filling new blobs: the store's memory, mapped for writing.
//!
//! The store's memory file begins without a page, and allocating 4 KiB pages costs more than the copy that fills them.
//! So memory that has none yet gets huge pages where they fit: `MADV_COLLAPSE` makes one out of what is there, whatever
//! the machine's settings for huge pages are (`madvise(2)`, since Linux 6.1). It changes no byte, so it may be done to
//! memory that is or becomes another client's.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::error::{Context, Error, Kind, Result};

/// Writes below this size go through the descriptor.
const MAPPED_WRITE: usize = 256 << 10;
/// As [`MAPPED_WRITE`], where the pages are mapped already.
const READY_WRITE: usize = 32 << 10;
/// Bytes whose pages are mapped at a time: still in the processor's cache when they are filled after being cleared.
const POPULATED: usize = 1 << 20;
const PAGE: usize = 4096;
/// Bytes of a huge page.
const HUGE: usize = 2 << 20;
/// Where more pages of a huge page's bytes are there already, making it one costs more than it brings.
const FEW_PAGES: usize = 64;
/// After so many failures in a row no more huge pages are made: memory is short, or the kernel makes none.
const MOST_FAILURES: u32 = 8;
/// Huge pages that are made with one call: each call waits once for work of every processor.
const RUN: usize = 4;
/// Such runs that may be in the making at the same time.
const MAKING: usize = 16;

/// A memory file of the store, for filling the blobs that this client has made in it.
#[derive(Debug)]
pub struct WritableFile {
    file: OwnedFd,
    mapping: OnceLock<Option<WritableMapping>>,
}

impl WritableFile {
    /// Takes a descriptor that came from the store; it can write.
    pub fn new(file: OwnedFd) -> Self {
        WritableFile { file, mapping: OnceLock::new() }
    }

    /// Writes bytes at an offset of the file, inside a blob that lies at `blob`. The caller has made it and has not
    /// sealed it.
    ///
    /// Large pieces are copied through a mapping that is kept: `write` calls of several threads would wait for each
    /// other on the inode's lock. The pages are mapped by one call first, which is far cheaper than a fault for each,
    /// and says if there is no memory for them, where a store would raise SIGBUS.
    ///
    /// # Errors
    /// `Full` or the errno if there is no memory for it; `Malformed` past the end of files.
    pub fn write(&self, offset: u64, bytes: &[u8], blob: Range<u64>) -> Result<()> {
        if bytes.len() < READY_WRITE {
            return self.pwrite(offset, bytes);
        }
        let mapping = self.mapping();
        let ready = mapping.is_some_and(|mapping| mapping.make_ready(offset, bytes.len(), &blob, false));
        if !ready && bytes.len() < MAPPED_WRITE {
            return self.pwrite(offset, bytes);
        }
        for (number, part) in bytes.chunks(POPULATED).enumerate() {
            let at = offset.saturating_add((number * POPULATED) as u64);
            if !mapping.is_some_and(|mapping| mapping.write(at, part)) {
                self.pwrite(at, part)?;
            }
        }
        Ok(())
    }

    /// Gives memory to a range of the file ahead of need, as long as `go_on` holds. Changes no byte. Best effort.
    pub fn prepare(&self, range: Range<u64>, go_on: &dyn Fn() -> bool) {
        let Some(mapping) = self.mapping() else { return };
        let mut at = range.start.next_multiple_of(HUGE as u64);
        while at < range.end && go_on() && mapping.make_ready(at, 1, &range, true) {
            at += HUGE as u64;
        }
    }

    fn mapping(&self) -> Option<&WritableMapping> {
        self.mapping.get_or_init(|| WritableMapping::of(&self.file).ok()).as_ref()
    }

    fn pwrite(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        let mut at = offset;
        while !rest.is_empty() {
            let offset = i64::try_from(at).map_err(|_| Error::malformed("a blob past the end of files"))?;
            match nix::sys::uio::pwrite(&self.file, rest, offset) {
                Ok(0) => return Err(Error::new(Kind::Full, "the store's memory takes no more bytes")),
                Ok(n) => {
                    rest = &rest[n..];
                    at += n as u64;
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno).context(|| format!("writing {} bytes of a blob", bytes.len())),
            }
        }
        Ok(())
    }
}

/// Whether the bytes of a huge page lie in a range of the file.
fn lies_in(number: u64, range: &Range<u64>) -> bool {
    let start = number * HUGE as u64;
    start >= range.start && start + HUGE as u64 <= range.end
}

/// All of a memory file, mapped for writing.
#[derive(Debug)]
struct WritableMapping {
    base: NonNull<u8>,
    len: usize,
    /// For each huge page's bytes: 1 once all their pages are mapped.
    ready: Vec<AtomicU8>,
    /// Held while pages are made ready, by number: whoever needs the same ones waits.
    making: [Mutex<()>; MAKING],
    failures: AtomicU32,
}

// SAFETY: an address range that stays mapped until drop; it is only written, through raw copies into ranges that the
// caller owns.
unsafe impl Send for WritableMapping {}
// SAFETY: as above.
unsafe impl Sync for WritableMapping {}

impl WritableMapping {
    fn of(file: &OwnedFd) -> Result<WritableMapping> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
        let size = nix::sys::stat::fstat(file).context(|| "stat of a memory segment".into())?.st_size;
        let len = usize::try_from(size).unwrap_or_default();
        let what = || format!("mapping {len} bytes of the store's memory");
        let length = std::num::NonZeroUsize::new(len).ok_or_else(|| Error::malformed("empty segment"))?;
        // Only where offsets and addresses agree modulo its size can a huge page be mapped as one.
        let room = len.checked_add(HUGE).and_then(std::num::NonZeroUsize::new);
        let room = room.ok_or_else(|| Error::malformed("a segment of all memory"))?;
        // SAFETY: a fresh range at an address that the kernel chooses, without access.
        let reserved = unsafe { mmap_anonymous(None, room, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) };
        let reserved = reserved.context(what)?;
        let skipped = reserved.as_ptr().cast::<u8>().align_offset(HUGE).min(HUGE);
        // SAFETY: `skipped` is at most `HUGE`, so that `len` bytes of the reserved range lie behind it.
        let start = unsafe { reserved.as_ptr().cast::<u8>().add(skipped) };
        let address = std::num::NonZeroUsize::new(start as usize);
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: it replaces a part of the range that was reserved above, which nobody else knows; the file is `len`
        // bytes long.
        let mapped = unsafe { mmap(address, length, protection, MapFlags::MAP_SHARED | MapFlags::MAP_FIXED, file, 0) };
        let base = match mapped {
            Ok(base) => base,
            Err(errno) => {
                // SAFETY: the range was reserved above.
                let _ = unsafe { munmap(reserved, room.get()) };
                return Err(errno).context(what);
            }
        };
        let end = skipped + len.next_multiple_of(PAGE);
        // SAFETY: both ends of the reserved range are whole pages outside the new mapping.
        unsafe {
            if skipped > 0 {
                let _ = munmap(reserved, skipped);
            }
            if let Some(tail) = (len + HUGE).next_multiple_of(PAGE).checked_sub(end).filter(|&tail| tail > 0) {
                let _ = munmap(reserved.byte_add(end), tail);
            }
        }
        let ready = (0..len / HUGE).map(|_| AtomicU8::new(0)).collect();
        Ok(WritableMapping { base: base.cast(), len, ready, making: Default::default(), failures: AtomicU32::new(0) })
    }

    /// Maps the pages of a range, huge ones if they are new. False if some huge page's bytes of it do not lie in `inside`
    /// or cannot be mapped: no memory is given to what is not asked for. `ahead` of need it ends where memory does.
    fn make_ready(&self, offset: u64, len: usize, inside: &Range<u64>, ahead: bool) -> bool {
        let end = offset.saturating_add(len as u64).div_ceil(HUGE as u64);
        (offset / HUGE as u64..end)
            .all(|number| lies_in(number, inside) && self.make_page(number as usize, inside, ahead))
    }

    fn make_page(&self, number: usize, inside: &Range<u64>, ahead: bool) -> bool {
        let is_new = |number: usize| self.ready.get(number).is_some_and(|ready| ready.load(Ordering::Acquire) == 0);
        if !is_new(number) {
            return number < self.ready.len();
        }
        let _making = self.making[number / RUN % MAKING].lock().unwrap_or_else(PoisonError::into_inner);
        let run = number..(number / RUN + 1) * RUN;
        let run =
            run.take_while(|&next| is_new(next) && lies_in(next as u64, inside) && self.may_collapse(next)).count();
        let made = match run {
            0 if !is_new(number) => return true,
            0 => 0,
            run if self.collapse(number, run) => run,
            // No memory for a huge page is an error; none for a small one may cost this process its life.
            _ if ahead => return false,
            _ => 0,
        };
        let made = if made == 0 { usize::from(self.populate(number * HUGE, HUGE)) } else { made };
        for ready in self.ready.iter().skip(number).take(made) {
            ready.store(1, Ordering::Release);
        }
        made > 0
    }

    /// Whether few pages are there, but not none: of nothing at all no huge page is made.
    fn may_collapse(&self, number: usize) -> bool {
        if self.failures.load(Ordering::Relaxed) >= MOST_FAILURES {
            return false;
        }
        let mut present = [0u8; HUGE / PAGE];
        // SAFETY: the number is one of a whole huge page inside the mapping; the answer is a byte for each of its pages.
        let known =
            unsafe { libc::mincore(self.base.as_ptr().add(number * HUGE).cast(), HUGE, present.as_mut_ptr()) == 0 };
        let count = present.iter().filter(|page| **page & 1 == 1).count();
        known && count <= FEW_PAGES && (count > 0 || self.populate(number * HUGE, PAGE))
    }

    /// Makes so many huge pages.
    fn collapse(&self, number: usize, run: usize) -> bool {
        // SAFETY: the range lies in the mapping; making huge pages of it changes no data.
        let done = unsafe {
            libc::madvise(self.base.as_ptr().add(number * HUGE).cast(), run * HUGE, libc::MADV_COLLAPSE) == 0
        };
        if done {
            self.failures.store(0, Ordering::Relaxed);
            return true;
        }
        let error = std::io::Error::last_os_error();
        let failures = match error.raw_os_error() {
            Some(libc::EINVAL) => self.failures.fetch_max(MOST_FAILURES, Ordering::Relaxed) + MOST_FAILURES,
            _ => self.failures.fetch_add(1, Ordering::Relaxed) + 1,
        };
        if failures >= MOST_FAILURES {
            tracing::info!("new memory of the store gets no huge pages any more: {error}");
        }
        false
    }

    /// Maps the pages of a range of the mapping.
    fn populate(&self, start: usize, len: usize) -> bool {
        // SAFETY: the pages lie in the mapping; populating them changes no data (`madvise(2)`, since Linux 5.14).
        unsafe { libc::madvise(self.base.as_ptr().add(start).cast(), len, libc::MADV_POPULATE_WRITE) == 0 }
    }

    /// False if the range cannot be written this way.
    fn write(&self, offset: u64, bytes: &[u8]) -> bool {
        let Some(end) = usize::try_from(offset).ok().and_then(|at| at.checked_add(bytes.len())) else { return false };
        if end > self.len {
            return false;
        }
        let start = offset as usize;
        let page = start & !(PAGE - 1);
        // Also where it is ready: vineyardd may have taken pages back since.
        if !self.populate(page, end - page) {
            return false;
        }
        // SAFETY: the range lies in the mapping and its pages are there; `bytes` is other memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr().add(start), bytes.len()) };
        true
    }
}

impl Drop for WritableMapping {
    fn drop(&mut self) {
        // SAFETY: base and len are what mmap returned, and nobody else unmaps them.
        let _ = unsafe { nix::sys::mman::munmap(self.base.cast(), self.len) };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    const WHOLE: u64 = HUGE as u64;

    fn memory(len: u64) -> (File, WritableFile) {
        let fd = memfd_create(c"store", MFdFlags::MFD_CLOEXEC).unwrap();
        let file = File::from(fd.try_clone().unwrap());
        file.set_len(len).unwrap();
        (file, WritableFile::new(fd))
    }

    #[test]
    fn what_is_written_is_there_and_nothing_else_changes() {
        let (file, writable) = memory(4 * WHOLE + 5000);
        let before: Vec<u8> = (0..4 * WHOLE + 5000).map(|i| (i % 251) as u8).collect();
        // Some pages are others' already.
        file.write_all_at(&before[..100_000], 0).unwrap();
        let blob = 70_000..4 * WHOLE + 4000;
        let bytes: Vec<u8> = (0..blob.end - blob.start).map(|i| (i % 241) as u8).collect();
        for (at, len) in [(0usize, 10usize), (10, 40_000), (40_010, 3 << 20), ((3 << 20) + 40_010, usize::MAX)] {
            let part = &bytes[at..at.saturating_add(len).min(bytes.len())];
            writable.write(blob.start + at as u64, part, blob.clone()).unwrap();
        }
        let mut now = vec![0; before.len()];
        file.read_exact_at(&mut now, 0).unwrap();
        assert_eq!(now[..70_000], before[..70_000]);
        assert!(now[70_000..blob.end as usize] == bytes[..]);
        assert!(now[blob.end as usize..].iter().all(|&b| b == 0));
    }

    #[test]
    fn memory_is_given_ahead_only_inside_the_range_and_keeps_its_bytes() {
        let (file, writable) = memory(8 * WHOLE);
        file.write_all_at(b"another's", WHOLE + 77).unwrap();
        writable.prepare(WHOLE - 4096..3 * WHOLE + 4096, &|| true);
        // Two huge pages' bytes lie inside it whole.
        assert_eq!(file.metadata().unwrap().blocks() * 512, 2 * WHOLE);
        let mut there = [0; 9];
        file.read_exact_at(&mut there, WHOLE + 77).unwrap();
        assert_eq!(&there, b"another's");
        writable.prepare(0..8 * WHOLE, &|| false);
        assert_eq!(file.metadata().unwrap().blocks() * 512, 2 * WHOLE);
        // Past the end of the file.
        writable.prepare(0..100 * WHOLE, &|| true);
        assert_eq!(file.metadata().unwrap().blocks() * 512, 8 * WHOLE);
    }

    #[test]
    fn a_small_write_takes_no_huge_page() {
        let (file, writable) = memory(4 * WHOLE);
        writable.write(8192, &[1; 300 << 10], 8192..8192 + (300 << 10)).unwrap();
        assert_eq!(file.metadata().unwrap().blocks() * 512, 300 << 10);
    }
}
