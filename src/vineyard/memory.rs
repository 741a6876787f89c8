//! Memory segments of the store, mapped read-only into this process, and blobs inside them.
//!
//! Anyone with the store's socket can write to its memory, and vineyardd reuses the memory of a deleted blob at once.
//! So bytes are *copied out* of a mapping, and a reader that needs to know whose bytes they were asks the store after
//! the copy whether the blob still exists ([`super::BlobSource::verify`]).

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::id::BlobKey;
use super::streaming;
use crate::cgroup;
use crate::error::{Context, Error, Kind, Result};

/// Writes below this size go through the descriptor.
const MAPPED_WRITE: usize = 256 << 10;
/// Bytes whose pages are mapped at a time: still in the processor's cache when they are filled after being cleared.
const POPULATED: usize = 1 << 20;
/// Unit of knowing which pages of a segment are mapped.
const POPULATION: usize = 64 << 10;
/// Writes of less stay in the processor's cache, for who reads the blob next.
const STREAMED: usize = 4 << 20;

/// Which pages of a mapping have been mapped, a bit for each [`POPULATION`] bytes: asking the kernel about pages that are
/// mapped takes a sixth of the time of copying them. They may have been unmapped since, which costs a fault.
#[derive(Debug)]
struct Populated(Box<[AtomicU64]>);

impl Populated {
    fn new(len: usize) -> Self {
        Populated((0..len.div_ceil(POPULATION).div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn bit(&self, unit: usize) -> (Option<&AtomicU64>, u64) {
        (self.0.get(unit / 64), 1 << (unit % 64))
    }

    fn has(&self, unit: usize) -> bool {
        matches!(self.bit(unit), (Some(word), bit) if word.load(Ordering::Relaxed) & bit != 0)
    }

    /// Maps the pages of a range, and no others, unless that was done before (`advice`: `MADV_POPULATE_READ` or
    /// `MADV_POPULATE_WRITE` of `madvise(2)`, since Linux 5.14). False if the kernel refused.
    ///
    /// # Safety
    /// The range lies in the mapping at `base`.
    unsafe fn populate(&self, base: NonNull<u8>, range: Range<usize>, advice: i32) -> bool {
        const PAGE: usize = 4096;
        let (mut unit, last) = (range.start / POPULATION, range.end.div_ceil(POPULATION));
        while unit < last {
            let first = unit;
            while unit < last && !self.has(unit) {
                unit += 1;
            }
            let start = (first * POPULATION).max(range.start) & !(PAGE - 1);
            let end = (unit * POPULATION).min(range.end);
            if end > start {
                // SAFETY: inside the mapping by the caller's promise; populating pages changes no data.
                if unsafe { libc::madvise(base.as_ptr().add(start).cast(), end - start, advice) } != 0 {
                    return false;
                }
                for unit in range.start.div_ceil(POPULATION).max(first)..(range.end / POPULATION).min(unit) {
                    if let (Some(word), bit) = self.bit(unit) {
                        word.fetch_or(bit, Ordering::Relaxed);
                    }
                }
            }
            while unit < last && self.has(unit) {
                unit += 1;
            }
        }
        true
    }
}

/// A read-only shared mapping of one memory file of the store. Unmapped when the last blob of it is dropped.
#[derive(Debug)]
pub struct Segment {
    base: NonNull<u8>,
    len: usize,
    populated: Populated,
}

// SAFETY: a `Segment` is an address range that stays mapped until drop; it is only read, through raw copies.
unsafe impl Send for Segment {}
// SAFETY: as above; concurrent copies out of the range need no synchronisation among themselves.
unsafe impl Sync for Segment {}

impl Segment {
    /// Maps the first `len` bytes of `file` for reading.
    ///
    /// # Errors
    /// `Malformed` if the file is shorter than `len` (touching it would raise SIGBUS); the errno of `mmap`.
    pub fn map(file: impl AsFd, len: usize) -> Result<Arc<Self>> {
        let size = nix::sys::stat::fstat(&file).context(|| "stat of a memory segment".into())?.st_size;
        if len == 0 || (size as u64) < len as u64 {
            return Err(Error::malformed(format!("a segment of {len} bytes in a memory file of {size}")));
        }
        let length = std::num::NonZeroUsize::new(len).ok_or_else(|| Error::malformed("empty segment"))?;
        use nix::sys::mman::{MapFlags, ProtFlags, mmap};
        // SAFETY: a fresh mapping at an address that the kernel chooses; the file is at least `len` bytes long.
        let base = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &file, 0) }
            .context(|| format!("mapping {len} bytes of the store's memory"))?;
        Ok(Arc::new(Segment { base: base.cast(), len, populated: Populated::new(len) }))
    }

    /// Length of the mapping in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: empty segments are refused.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: base and len are what mmap returned, and nobody else unmaps them.
        let _ = unsafe { nix::sys::mman::munmap(self.base.cast(), self.len) };
    }
}

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

    /// Writes bytes at an offset of the file. The caller has made the blob there and has not sealed it.
    ///
    /// Large pieces are copied through a mapping that is kept: `write` calls of several threads would wait for each
    /// other on the inode's lock. The pages are mapped by one call first, which is far cheaper than a fault for each,
    /// and says if there is no memory for them, where a store would raise SIGBUS. It is not made again for pages that
    /// were mapped before: vineyardd gives such pages back only if a client asks it to trim its memory
    /// (`src/server/memory/memory.cc` of v6d), and a fault then brings new ones.
    ///
    /// # Errors
    /// `Full` or the errno if there is no memory for it, also if this process may not use so much more; `Malformed` past
    /// the end of files.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        if bytes.len() < MAPPED_WRITE {
            return self.pwrite(offset, bytes);
        }
        let mapping = self.mapping.get_or_init(|| WritableMapping::of(&self.file).ok());
        let streamed = bytes.len() >= STREAMED;
        let is_tight = cgroup::room_for(bytes.len() as u64).is_err();
        let (mut rest, mut at) = (bytes, offset);
        while !rest.is_empty() {
            // Whole units of what is known to be mapped.
            let len = (POPULATED - at as usize % POPULATED).min(rest.len());
            let (part, others) = rest.split_at(len);
            if is_tight {
                // Pages that are there already need no room.
                let absent = mapping.as_ref().and_then(|mapping| mapping.absent(at, part.len()));
                cgroup::room_for(absent.unwrap_or(part.len() as u64)).context(|| "filling a blob".into())?;
            }
            if !mapping.as_ref().is_some_and(|mapping| mapping.write(at, part, streamed)) {
                self.pwrite(at, part)?;
            }
            (rest, at) = (others, at.saturating_add(len as u64));
        }
        Ok(())
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

/// All of a memory file, mapped for writing.
#[derive(Debug)]
struct WritableMapping {
    base: NonNull<u8>,
    len: usize,
    populated: Populated,
}

// SAFETY: an address range that stays mapped until drop; it is only written, through raw copies into ranges that the
// caller owns.
unsafe impl Send for WritableMapping {}
// SAFETY: as above.
unsafe impl Sync for WritableMapping {}

impl WritableMapping {
    fn of(file: &OwnedFd) -> Result<WritableMapping> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap};
        let size = nix::sys::stat::fstat(file).context(|| "stat of a memory segment".into())?.st_size;
        let len = usize::try_from(size).unwrap_or_default();
        let length = std::num::NonZeroUsize::new(len).ok_or_else(|| Error::malformed("empty segment"))?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address that the kernel chooses; the file is `len` bytes long.
        let base = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file, 0) }
            .context(|| format!("mapping {len} bytes of the store's memory"))?;
        Ok(WritableMapping { base: base.cast(), len, populated: Populated::new(len) })
    }

    /// Bytes of a range whose pages nobody has used yet; `None` if that is not known. Whoever uses a page first has it
    /// counted as its own.
    fn absent(&self, offset: u64, len: usize) -> Option<u64> {
        const PAGE: usize = 4096;
        let end = usize::try_from(offset).ok()?.checked_add(len).filter(|&end| end <= self.len)?;
        let start = offset as usize & !(PAGE - 1);
        let mut present = vec![0u8; (end - start).div_ceil(PAGE)];
        // SAFETY: the pages lie in the mapping, and `present` has a byte for each (`mincore(2)`).
        let asked = unsafe { libc::mincore(self.base.as_ptr().add(start).cast(), end - start, present.as_mut_ptr()) };
        (asked == 0).then(|| present.iter().filter(|&&page| page & 1 == 0).count() as u64 * PAGE as u64)
    }

    /// False if the range cannot be written this way.
    fn write(&self, offset: u64, bytes: &[u8], streamed: bool) -> bool {
        let Some(end) = usize::try_from(offset).ok().and_then(|at| at.checked_add(bytes.len())) else { return false };
        if end > self.len {
            return false;
        }
        let start = offset as usize;
        // SAFETY: the range lies in the mapping.
        if !unsafe { self.populated.populate(self.base, start..end, libc::MADV_POPULATE_WRITE) } {
            return false;
        }
        // SAFETY: the range lies in the mapping.
        let to = unsafe { self.base.as_ptr().add(start) };
        // SAFETY: the range lies in the mapping and its pages are there; `bytes` is other memory.
        unsafe {
            match streamed {
                true => streaming::copy(bytes.as_ptr(), to, bytes.len()),
                false => std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()),
            }
        }
        true
    }
}

impl Drop for WritableMapping {
    fn drop(&mut self) {
        // SAFETY: base and len are what mmap returned, and nobody else unmaps them.
        let _ = unsafe { nix::sys::mman::munmap(self.base.cast(), self.len) };
    }
}

/// Bytes of one blob inside a [`Segment`]. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Blob {
    key: BlobKey,
    segment: Arc<Segment>,
    offset: usize,
    len: usize,
}

impl Blob {
    /// The blob at `offset..offset + len` of `segment`.
    ///
    /// # Errors
    /// `Malformed` if that range is not inside the segment.
    pub fn new(key: BlobKey, segment: Arc<Segment>, offset: u64, len: u64) -> Result<Self> {
        match offset.checked_add(len) {
            Some(end) if end <= segment.len as u64 => {
                Ok(Blob { key, segment, offset: offset as usize, len: len as usize })
            }
            _ => Err(Error::malformed(format!(
                "blob {key} at {offset} of {len} bytes is outside its segment of {} bytes",
                segment.len
            ))),
        }
    }

    /// The blob's key.
    pub fn key(&self) -> BlobKey {
        self.key
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// True if the blob has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// True if both are the same bytes of the same mapping: the store did not move the blob in between.
    pub fn same_place(&self, other: &Blob) -> bool {
        Arc::ptr_eq(&self.segment, &other.segment) && self.offset == other.offset && self.len == other.len
    }

    /// Address of the first byte; valid for [`Blob::len`] bytes while `self` lives. The bytes may change at any time.
    pub fn as_ptr(&self) -> *const u8 {
        // SAFETY: offset is inside the mapping, checked in `new`.
        unsafe { self.segment.base.as_ptr().add(self.offset) }
    }

    /// Copies `out.len()` bytes from `offset` of the blob.
    ///
    /// # Errors
    /// `Malformed` if that range is not inside the blob.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let from = self.inside(offset, out.len())?;
        // SAFETY: the range was checked; `out` is private memory, so the ranges do not overlap. A concurrent writer in
        // another process can make the copied bytes any bytes, which a `u8` may be.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// [`Blob::read`] for many bytes that this thread does not read again.
    ///
    /// # Errors
    /// As [`Blob::read`].
    pub fn stream(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let from = self.inside(offset, out.len())?;
        // SAFETY: as in `read`.
        unsafe { streaming::copy(from, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Address of `len` bytes from `offset` of the blob.
    fn inside(&self, offset: u64, len: usize) -> Result<*const u8> {
        if offset.checked_add(len as u64).is_none_or(|end| end > self.len as u64) {
            let (key, size) = (self.key, self.len);
            return Err(Error::malformed(format!(
                "bytes {offset} and {len} more are outside blob {key} of {size} bytes"
            )));
        }
        // SAFETY: offset is inside the blob, and that inside the mapping.
        Ok(unsafe { self.as_ptr().add(offset as usize) })
    }

    /// Maps the pages of a range ahead of a copy: one call instead of a fault every few pages, and none if it was done
    /// before. What shares a unit of [`POPULATION`] with the range is mapped too, as far as it is of this blob. Best effort.
    pub fn populate(&self, offset: u64, len: u64) {
        let start = self.offset + offset.min(self.len as u64) as usize;
        let end = self.offset + offset.saturating_add(len).min(self.len as u64) as usize;
        if end > start {
            let start = (start / POPULATION * POPULATION).max(self.offset);
            let end = end.next_multiple_of(POPULATION).min(self.offset + self.len);
            // SAFETY: the range lies in the mapping, as the blob does; what cannot be mapped is faulted in later.
            unsafe { self.segment.populated.populate(self.segment.base, start..end, libc::MADV_POPULATE_READ) };
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::id::{InstanceId, ObjectId};
    use super::*;

    /// Which pages of a segment this process has mapped (bit 63 of `/proc/self/pagemap`, proc_pid_pagemap(5)).
    fn mapped(segment: &Segment) -> Vec<bool> {
        use std::os::unix::fs::FileExt;
        let mut entries = vec![0; segment.len / 4096 * 8];
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        pagemap.read_exact_at(&mut entries, segment.base.as_ptr() as u64 / 4096 * 8).unwrap();
        entries.chunks_exact(8).map(|entry| entry[7] & 0x80 != 0).collect()
    }

    #[test]
    fn a_blob_is_mapped_once_and_nothing_beside_it() {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let (size, start, len) = (40 * POPULATION, 3 * POPULATION + 5000, 30 * POPULATION);
        let file = memfd_create(c"segment", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, size as i64).unwrap();
        let segment = Segment::map(&file, size).unwrap();
        let key = BlobKey { instance: InstanceId(1), id: ObjectId(1 << 63 | 7) };
        let blob = Blob::new(key, segment.clone(), start as u64, len as u64).unwrap();
        let bits = || segment.populated.0.iter().map(|word| word.load(Ordering::Relaxed).count_ones()).sum::<u32>();
        let pages =
            |from: usize, to: usize| (0..size / 4096).map(move |n| (from / 4096..to.div_ceil(4096)).contains(&n));
        // A part takes what lies in the same units, of this blob only.
        blob.populate(0, 10);
        assert!(mapped(&segment).into_iter().eq(pages(start, 4 * POPULATION)));
        assert_eq!(bits(), 0, "the unit is not the blob's alone");
        blob.populate((10 * POPULATION) as u64, 10);
        assert_eq!(bits(), 1);
        blob.populate(0, u64::MAX);
        assert!(mapped(&segment).into_iter().eq(pages(start, start + len)));
        assert_eq!(bits(), 29);
        // What is known to be mapped is not asked for again, the ends are.
        let whole = segment.len;
        // SAFETY: the mapping is the segment's; its pages stay in the file.
        unsafe { libc::madvise(segment.base.as_ptr().cast(), whole, libc::MADV_DONTNEED) };
        blob.populate(0, u64::MAX);
        // A fault maps pages near it that exist.
        let found = mapped(&segment);
        let part = |from: usize, to: usize| &found[from / 4096..to / 4096];
        assert!(part(start + 4096, 4 * POPULATION).iter().all(|&mapped| mapped));
        assert!(part(5 * POPULATION, 32 * POPULATION).iter().all(|&mapped| !mapped));
    }
}
