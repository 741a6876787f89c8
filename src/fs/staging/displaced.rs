//! Files whose path leads to something else by now. Who has one open goes on with it and publishes it at the path it had,
//! unless the path is removed or gets another value by a rename: that ends them, as it ends what is there.

use std::sync::{Arc, Weak};

use super::{Staged, Staging};
use crate::fs::FileSystem;
use crate::fs::adopt::note_staged;
use crate::fs::resolve::Target;

impl Staging {
    /// Its path leads to something else from now on.
    pub(super) fn displace(&self, staged: &Arc<Staged>) {
        staged.state().displaced = true;
        self.remember_displaced(staged);
        note_staged(staged);
    }

    /// Remembers a file that was displaced.
    pub(super) fn remember_displaced(&self, staged: &Arc<Staged>) {
        let mut displaced = self.displaced.lock().unwrap_or_else(|e| e.into_inner());
        displaced.retain(|other| other.strong_count() > 0 && !std::ptr::eq(other.as_ptr(), Arc::as_ptr(staged)));
        displaced.push(Arc::downgrade(staged));
    }

    /// Those that may still publish something at a path.
    fn displaced_from(&self, path: &str) -> Vec<Arc<Staged>> {
        let displaced: Vec<Arc<Staged>> = {
            let displaced = self.displaced.lock().unwrap_or_else(|e| e.into_inner());
            displaced.iter().filter_map(Weak::upgrade).collect()
        };
        let publishes = |staged: &Arc<Staged>| {
            let state = staged.state();
            state.displaced && !state.detached && !state.retired && state.target.path() == path
        };
        displaced.into_iter().filter(publishes).collect()
    }
}

impl FileSystem {
    /// What is done to a path ends its displaced files; they go on if that fails.
    pub(in crate::fs) fn ending_displaced<T, E>(
        &self,
        path: &str,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let ended = self.staging.displaced_from(path);
        for staged in &ended {
            // A publish that is under way ends first; none starts afterwards.
            let _publishing = staged.publishing.lock().unwrap_or_else(|e| e.into_inner());
            staged.state().detached = true;
        }
        let result = work();
        for staged in ended {
            staged.state().detached = result.is_ok();
            note_staged(&staged);
        }
        result
    }

    /// A path was renamed: its displaced files are published under the new one, as those of any renamed file.
    pub(in crate::fs) fn move_displaced(&self, from: &str, to: &Target) {
        for staged in self.staging.displaced_from(from) {
            staged.state().target = to.clone();
            note_staged(&staged);
        }
    }
}
