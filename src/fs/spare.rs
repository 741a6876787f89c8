//! A memory file whose pages are there already.
//!
//! Giving a new file its pages, which the kernel clears first, takes longer than copying an image into them. While images
//! are being assembled, a file as large as the largest of them is therefore made ready in the background for the next
//! one. It is part of the image cache's limit, is the first to go when room is needed, and goes when nothing was assembled
//! for [`KEPT`]. It holds zeros and nothing else, ever.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::host::{Area, Host, MemoryFile};
use crate::cgroup;
use crate::error::{Error, Kind, Result};
use crate::image;
use crate::sync::{Mutex, MutexGuard};

/// For how long a spare file is kept ready after the last image was assembled.
const KEPT: Duration = Duration::from_secs(120);
/// After an image was assembled it is being read: the processor and the memory's bandwidth belong to its reader first.
const PAUSE: Duration = Duration::from_millis(500);
/// Smaller images are made in no time anyway.
const LEAST: u64 = 16 << 20;
/// A spare file takes at most this part of the memory that is available, as the kernel counts it.
const SHARE: u64 = 4;

#[derive(Default)]
struct State {
    ready: Option<(MemoryFile, u64)>,
    /// Size of the largest image since there was nothing to do.
    wanted: u64,
    /// When the last image was assembled.
    last: Option<Instant>,
}

/// The spare file of an image cache.
#[derive(Default)]
pub(super) struct Spare(Mutex<State>);

impl Spare {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A file for an image of `size` bytes: the spare one if it is there and the image is not much smaller, else a new one.
    ///
    /// # Errors
    /// As [`MemoryFile::create`].
    pub(super) fn file(&self, host: &Arc<dyn Host>, size: u64) -> Result<MemoryFile> {
        if size >= LEAST {
            let mut state = self.state();
            state.wanted = state.wanted.max(size);
            state.last = Some(Instant::now());
            if let Some((file, _)) = state.ready.take_if(|(_, ready)| is_like(size, *ready)) {
                drop(state);
                // What is too much is given back at once.
                file.file.set_len(size)?;
                return Ok(file);
            }
        }
        MemoryFile::create(host, Area::Image, size)
    }

    /// Bytes that are kept ready.
    pub(super) fn bytes(&self) -> u64 {
        self.state().ready.as_ref().map_or(0, |(_, size)| *size)
    }

    /// Gives the spare file back if an image of `size` bytes has no room beside it and does not take it.
    pub(super) fn make_room(&self, size: u64, room: u64) {
        let beside = |ready: &u64| !is_like(size, *ready) && size.saturating_add(*ready) > room;
        let ready = self.state().ready.take_if(|(_, ready)| beside(ready));
        drop(ready);
    }

    /// Makes a file ready if one is likely to be needed and `has_room` for so many bytes, or gives one back that is not.
    /// Called now and then from a thread that has nothing else to do.
    pub(super) fn look_after(&self, host: &Arc<dyn Host>, has_room: impl FnOnce(u64) -> bool) {
        let wanted = {
            let mut state = self.state();
            match state.last.map(|last| last.elapsed()) {
                Some(idle) if idle >= KEPT => {
                    let ready = std::mem::take(&mut *state).ready;
                    drop(state);
                    return drop(ready);
                }
                Some(idle) if idle >= PAUSE && state.ready.is_none() => state.wanted,
                _ => return,
            }
        };
        let made = match wanted <= cgroup::available_memory().unwrap_or(0) / SHARE
            && cgroup::room_for(wanted).is_ok()
            && has_room(wanted)
        {
            true => make(host, wanted),
            false => Err(Error::new(Kind::Full, "there is no room for it")),
        };
        match made {
            Ok(file) => self.state().ready = Some((file, wanted)),
            Err(error) => {
                tracing::debug!("no spare memory file of {wanted} bytes: {error}");
                // Not again before the next image.
                self.state().last = None;
            }
        }
    }
}

/// Whether an image takes a spare file of this size.
fn is_like(size: u64, ready: u64) -> bool {
    size >= LEAST && size >= ready / 2
}

fn make(host: &Arc<dyn Host>, size: u64) -> Result<MemoryFile> {
    let file = MemoryFile::create(host, Area::Image, size)?;
    image::assemble::give_pages(&file.file, size)?;
    Ok(file)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::super::direct::Unmounted;
    use super::*;

    #[test]
    fn a_file_is_ready_for_the_second_image_and_goes_when_nobody_comes() {
        let host: Arc<dyn Host> = Arc::new(Unmounted::default());
        let spare = Spare::default();
        let size = LEAST + 5000;
        spare.look_after(&host, |_| true);
        assert_eq!(spare.bytes(), 0, "nothing was assembled yet");
        drop(spare.file(&host, size).unwrap());
        assert!(spare.state().last.is_some());
        // However late the next line runs, it is right after it.
        spare.state().last = Some(Instant::now() + KEPT);
        spare.look_after(&host, |_| true);
        assert_eq!(spare.bytes(), 0, "not right after it");
        let long_ago = |ago| spare.state().last = Instant::now().checked_sub(ago);
        long_ago(PAUSE);
        spare.look_after(&host, |wanted| wanted < size);
        assert_eq!((spare.bytes(), spare.state().last), (0, None), "there is no room");
        long_ago(PAUSE);
        spare.look_after(&host, |wanted| wanted == size);
        assert_eq!(spare.bytes(), size);
        assert_eq!(
            spare.file(&host, LEAST / 2).unwrap().file.metadata().unwrap().blocks(),
            0,
            "a small one is a new one"
        );
        spare.make_room(100, size + 100);
        spare.make_room(LEAST, LEAST);
        assert_eq!(spare.bytes(), size, "there is room, or it is taken");
        let file = spare.file(&host, LEAST).unwrap();
        let meta = file.file.metadata().unwrap();
        assert_eq!((spare.bytes(), meta.len()), (0, LEAST));
        assert!(meta.blocks() * 512 >= LEAST, "its pages are there");
        long_ago(PAUSE);
        spare.look_after(&host, |wanted| wanted == size);
        assert_eq!(spare.bytes(), size);
        spare.make_room(100, size);
        assert_eq!(spare.bytes(), 0, "images come first");
        long_ago(PAUSE);
        spare.look_after(&host, |wanted| wanted == size);
        long_ago(KEPT);
        spare.look_after(&host, |wanted| wanted == size);
        assert_eq!(spare.bytes(), 0);
    }
}
