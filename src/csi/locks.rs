//! Places that one call at a time works on: targets, and directories of mounts.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Instant;

/// Which places are being worked on.
#[derive(Debug, Default)]
pub struct Locks {
    held: Mutex<HashSet<PathBuf>>,
    freed: Condvar,
}

/// A place that is this call's until the value is dropped.
#[derive(Debug)]
#[must_use]
pub struct Held<'a> {
    locks: &'a Locks,
    place: PathBuf,
}

impl Locks {
    fn held(&self) -> MutexGuard<'_, HashSet<PathBuf>> {
        self.held.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes a place, waiting for others until `until`. `None` if it is not free by then.
    pub fn take(&self, place: &Path, until: Instant) -> Option<Held<'_>> {
        let mut held = self.held();
        while !held.insert(place.to_owned()) {
            let left = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            held = self.freed.wait_timeout(held, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        Some(Held { locks: self, place: place.to_owned() })
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.locks.held().remove(&self.place);
        self.locks.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_place_is_one_callers_and_others_wait_only_for_that() {
        let locks = Locks::default();
        let (a, b) = (Path::new("/a"), Path::new("/b"));
        let held = locks.take(a, Instant::now()).unwrap();
        assert!(locks.take(a, Instant::now()).is_none());
        let begun = Instant::now();
        assert!(locks.take(a, begun + Duration::from_millis(30)).is_none());
        assert!(begun.elapsed() >= Duration::from_millis(30));
        assert!(locks.take(b, Instant::now()).is_some(), "another place is free");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| locks.take(a, Instant::now() + Duration::from_secs(60)).is_some());
            std::thread::sleep(Duration::from_millis(20));
            drop(held);
            assert!(waiting.join().unwrap());
        });
        assert!(locks.take(a, Instant::now()).is_some());
    }
}
