//! Summaries of objects, as long as anything needs them.
//!
//! Other clients replace datasets without a word to this mount, so summaries of objects that no name leads to any more
//! would add up. Which they are is not known without asking vineyardd; but what an open file, a listing or an inode
//! refers to is held by it, and what was not looked at for a while is made again at little cost.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::objects::Summary;
use crate::vineyard::ObjectId;

/// Below this number nothing is dropped. A summary takes about 0.5 KiB.
const FEW: usize = 8192;
/// How long one that nothing refers to is kept after it was last looked at.
const KEPT: Duration = Duration::from_secs(300);

struct Entry {
    summary: Arc<Summary>,
    used: Instant,
}

/// Summaries by object.
pub(super) struct Summaries {
    by_id: HashMap<ObjectId, Entry>,
    /// The number at which to look for those that nobody needs: twice what was left the last time.
    limit: usize,
}

impl Default for Summaries {
    fn default() -> Self {
        Summaries { by_id: HashMap::new(), limit: FEW }
    }
}

impl Summaries {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// The summary of an object, which counts as a use.
    pub(super) fn get(&mut self, id: ObjectId) -> Option<&Arc<Summary>> {
        let entry = self.by_id.get_mut(&id)?;
        entry.used = Instant::now();
        Some(&entry.summary)
    }

    /// To change a summary in place; those who hold the former one keep it.
    pub(super) fn get_mut(&mut self, id: ObjectId) -> Option<&mut Summary> {
        Some(Arc::make_mut(&mut self.by_id.get_mut(&id)?.summary))
    }

    pub(super) fn remove(&mut self, id: ObjectId) {
        self.by_id.remove(&id);
    }

    /// Adds summaries by the objects that they stand for. None of them is dropped within the next minutes, so that whoever asked for them finds them.
    pub(super) fn extend(&mut self, summaries: impl IntoIterator<Item = (ObjectId, Summary)>) {
        let used = Instant::now();
        let entries = summaries.into_iter().map(|(id, summary)| (id, Entry { summary: Arc::new(summary), used }));
        self.by_id.extend(entries);
        if self.by_id.len() > self.limit {
            self.sweep(used);
        }
    }

    fn sweep(&mut self, now: Instant) {
        self.by_id.retain(|_, entry| {
            Arc::strong_count(&entry.summary) > 1 || now.saturating_duration_since(entry.used) < KEPT
        });
        self.by_id.shrink_to(2 * self.by_id.len());
        self.limit = (2 * self.by_id.len()).max(FEW);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Kind};

    fn numbered(ids: std::ops::Range<u64>) -> impl Iterator<Item = (ObjectId, Summary)> {
        let error = Error::new(Kind::Malformed, "a test's");
        ids.map(move |id| (ObjectId(id), Summary::broken(ObjectId(id), None, &error)))
    }

    #[test]
    fn what_nobody_needs_goes_and_the_rest_stays() {
        let mut summaries = Summaries::default();
        let few = FEW as u64;
        summaries.extend(numbered(0..few));
        let held = summaries.get(ObjectId(7)).cloned();
        let long_ago = Instant::now().checked_sub(2 * KEPT).expect("the machine has been on for that long");
        summaries.by_id.values_mut().for_each(|entry| entry.used = long_ago);
        assert!(summaries.get(ObjectId(9)).is_some(), "nothing is dropped by age alone");

        summaries.extend(numbered(few..few + 1));
        assert_eq!(summaries.len(), 3, "one is held, one was looked at, one is new");
        for id in [7, 9, few] {
            assert_eq!(summaries.get(ObjectId(id)).map(|s| s.id), Some(ObjectId(id)));
        }
        assert!(summaries.get(ObjectId(8)).is_none());
        drop(held);
    }

    #[test]
    fn what_is_in_use_may_be_more_than_a_few() {
        let mut summaries = Summaries::default();
        for start in (0..100_000).step_by(256) {
            summaries.extend(numbered(start..start + 256));
        }
        assert_eq!(summaries.len(), 100_096);
    }
}
