//! Copies an image into a memory file, with several threads.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::extent::Image;
use crate::dataset::Span;
use crate::error::{Context, Error, Kind, Result};
use crate::vineyard::BlobSource;

/// Bytes that a thread takes at a time. A multiple of the huge page size, so that no two threads fault one page.
const SLICE: u64 = 8 << 20;

/// Writes all bytes of an image to `target`, an empty memory file that nobody else has open, with up to `threads`
/// threads.
///
/// Whether the bytes were the image's is for the caller to ask afterwards ([`BlobSource::verify`] of
/// [`Image::blobs`]). After an error the file is empty again.
///
/// # Errors
/// `Full` if the file system has no room; what the source says of its blobs.
pub fn assemble(image: &Image, source: &dyn BlobSource, target: &File, threads: usize) -> Result<()> {
    let done = fill(image, source, target, threads);
    if done.is_err() {
        // Gives the memory back; the error that matters is the first one.
        let _ = target.set_len(0);
    }
    done
}

fn fill(image: &Image, source: &dyn BlobSource, target: &File, threads: usize) -> Result<()> {
    // The size comes first: only pages inside it may be huge.
    target.set_len(image.size()).map_err(no_room).context(|| "sizing a memory file".into())?;
    if image.size() == 0 {
        return Ok(());
    }
    source.prepare(&image.blobs(0..image.size()))?;
    let size = i64::try_from(image.size()).map_err(|_| Error::new(Kind::TooLarge, "an image beyond 2^63 bytes"))?;
    // Storing to a page that cannot be allocated raises SIGBUS: all pages are allocated now, where it is an error.
    loop {
        match fallocate(target, FallocateFlags::empty(), 0, size) {
            Ok(()) => break,
            Err(Errno::EINTR) => {}
            Err(errno) => {
                return Err(no_room(errno.into())).context(|| format!("allocating {size} bytes of memory file"));
            }
        }
    }
    let mapping = Mapping::of(target, image.size())?;
    let next = AtomicU64::new(0);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let work = || {
        loop {
            let start = next.fetch_add(SLICE, Ordering::Relaxed);
            if start >= image.size() {
                return;
            }
            let len = SLICE.min(image.size() - start);
            populate(image, source, start, len);
            // SAFETY: `start` is taken once, so the parts of two threads do not overlap.
            let part = unsafe { mapping.part(start as usize, len as usize) };
            if let Err(error) = image.read(source, start, part) {
                next.store(image.size(), Ordering::Relaxed);
                if let Ok(mut failure) = failure.lock() {
                    failure.get_or_insert(error);
                }
                return;
            }
        }
    };
    let threads = threads.min(image.size().div_ceil(SLICE) as usize).max(1);
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // One thread that cannot be started leaves its share to the others.
            let _ = std::thread::Builder::new().name("assemble".into()).spawn_scoped(scope, work);
        }
        work();
    });
    match failure.into_inner() {
        Ok(None) => Ok(()),
        Ok(Some(error)) => Err(error),
        Err(_) => Err(Error::new(Kind::Internal, "a thread that assembled an image panicked")),
    }
}

/// `Full` for a lack of room, whether of the file system (`ENOSPC`), of a quota or of the control group (`ENOMEM`).
fn no_room(error: std::io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::ENOMEM | libc::EDQUOT) => Error::new(Kind::Full, error.to_string()),
        _ => error.into(),
    }
}

/// Maps the source pages of a part of the file, which is cheaper than faulting them in while copying.
fn populate(image: &Image, source: &dyn BlobSource, start: u64, len: u64) {
    for (extent, part) in image.covering(start..start + len) {
        if let Span::Blob { key, offset, .. } = &extent.span
            && let Ok(Some(blob)) = source.blob(*key)
        {
            blob.populate(offset.saturating_add(part.start), part.end - part.start);
        }
    }
}

/// The target, mapped for writing.
struct Mapping {
    base: NonNull<u8>,
    len: NonZeroUsize,
}

// SAFETY: an address range that stays mapped until drop; `part` hands out disjoint pieces.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn of(target: &File, size: u64) -> Result<Mapping> {
        let len = usize::try_from(size)
            .ok()
            .and_then(NonZeroUsize::new)
            .ok_or_else(|| Error::new(Kind::TooLarge, format!("an image of {size} bytes cannot be mapped")))?;
        // SAFETY: a fresh mapping at an address that the kernel chooses; the file has `size` bytes, all allocated.
        let base =
            unsafe { mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, target, 0) }
                .context(|| format!("mapping a memory file of {size} bytes"))?;
        Ok(Mapping { base: base.cast(), len })
    }

    /// Bytes `start..start + len`, for writing.
    ///
    /// # Safety
    /// The range lies in the mapping, and no other part that overlaps it is alive.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, start: usize, len: usize) -> &mut [u8] {
        debug_assert!(start + len <= self.len.get());
        // SAFETY: in the mapping by the caller's promise, whose pages are allocated; any byte is a valid `u8`.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(start), len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and len are what mmap returned; no part outlives the borrow of `self`.
        let _ = unsafe { munmap(self.base.cast(), self.len.get()) };
    }
}
