//! Room in the staging area: which files stay after they were published, and what all of them take.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Staged, Staging};

/// Most files that stay here after they were published.
const MOST_FILES: usize = 4096;

/// Use of the staging area.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct StagingStatus {
    /// Files that are being written or whose bytes are still held here.
    pub files: usize,
    /// Bytes of those.
    pub bytes: u64,
    /// Files whose publishing failed, and why.
    pub failed: Vec<(String, String)>,
}

impl Staging {
    /// Counts bytes that the store has all of now and that stay here: true if it is time to [retire](Self::retire_old).
    pub(in crate::fs) fn add_settled(&self, bytes: u64, limit: u64) -> bool {
        self.settled.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > limit / 4
    }

    /// Lets go of files that the store has all of, the oldest first, when there are too many (each costs two descriptors)
    /// or more than `limit` bytes of them. Their paths lead to the published views from then on. The kernel, which
    /// knows them still, is for the caller to tell.
    pub(in crate::fs) fn retire_old(&self, limit: u64) -> Vec<Arc<Staged>> {
        let all: Vec<Arc<Staged>> = {
            let by_path = self.by_path();
            if by_path.len() < MOST_FILES && self.settled.load(Ordering::Relaxed) <= limit / 4 {
                return Vec::new();
            }
            by_path.values().cloned().collect()
        };
        self.settled.store(0, Ordering::Relaxed);
        let too_many = if all.len() < MOST_FILES { 0 } else { MOST_FILES / 2 };
        let mut settled: Vec<Arc<Staged>> = all.into_iter().filter(|staged| staged.is_settled()).collect();
        settled.sort_unstable_by_key(|staged| std::cmp::Reverse(staged.made));
        let (most, mut bytes) = (settled.len().saturating_sub(too_many), 0);
        let is_old = |(at, staged): &(usize, Arc<Staged>)| {
            bytes += staged.stamp().map_or(0, |stamp| stamp.size);
            *at >= most || bytes > limit
        };
        let mut old: Vec<Arc<Staged>> = settled.into_iter().enumerate().filter(is_old).map(|(_, old)| old).collect();
        old.retain(|staged| self.retire(staged));
        old
    }

    /// Lets the path of a file that the store has all of lead to the published view. Not if somebody came meanwhile; who
    /// comes now is sent to look the path up again.
    pub(in crate::fs) fn retire(&self, staged: &Arc<Staged>) -> bool {
        {
            let mut state = staged.state();
            if state.opens > 0 || state.has_writers() || state.repointing {
                return false;
            }
            state.retired = true;
        }
        self.detach(staged);
        true
    }

    /// Use of the staging area.
    pub fn status(&self) -> StagingStatus {
        let mut status = StagingStatus::default();
        for staged in self.by_path().values() {
            status.files += 1;
            status.bytes += staged.stamp().map_or(0, |stamp| stamp.size);
            let state = staged.state();
            status.failed.extend(state.failed.clone().map(|why| (state.target.path(), why)));
        }
        status.failed.sort_unstable();
        status
    }
}
