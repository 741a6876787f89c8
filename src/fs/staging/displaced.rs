//! Files whose path leads to something else by now. Who has one open goes on with it and publishes it at the path it had,
//! unless the path is removed or gets another value by a rename: that ends them, as it ends what is there.

use std::sync::{Arc, Weak};

use super::{Staged, Staging, State};
use crate::dataset::FileAttributes;
use crate::error::Result;
use crate::fs::FileSystem;
use crate::fs::adopt::note_staged;
use crate::fs::name::is_inside;
use crate::fs::resolve::Target;
use crate::vineyard::ObjectId;
use crate::vineyard::store::NamedObject;

impl Staging {
    /// Its path leads to something else from now on.
    pub(super) fn displace(&self, staged: &Arc<Staged>) {
        staged.state().displaced = true;
        self.remember_displaced(staged);
        note_staged(staged);
    }

    /// Takes a file from its path if the path leads to its published version: it is retired, or its writer never came.
    pub(in crate::fs) fn leave_if_abandoned(&self, staged: &Arc<Staged>) -> bool {
        self.leave_path(staged, |state| state.is_abandoned(staged.made))
    }

    /// Takes a file from its path, if `ends` says so of its state. The next server is told.
    fn leave_path(&self, staged: &Arc<Staged>, ends: impl FnOnce(&State) -> bool) -> bool {
        {
            let mut by_path = self.by_path();
            let mut state = staged.state();
            if !ends(&state) {
                return false;
            }
            let path = state.target.path();
            if by_path.get(&path).is_some_and(|there| Arc::ptr_eq(there, staged)) {
                by_path.remove(&path);
            }
            state.displaced = true;
        }
        self.remember_displaced(staged);
        note_staged(staged);
        true
    }

    /// Files that are this version, or are written in its place.
    pub(in crate::fs) fn of_version(&self, version: &NamedObject) -> Vec<Arc<Staged>> {
        let mut all: Vec<Arc<Staged>> = self.by_path().values().cloned().collect();
        all.extend(self.reserved().iter().map(|(.., staged)| staged.clone()));
        all.extend(self.displaced.lock().unwrap_or_else(|e| e.into_inner()).iter().filter_map(Weak::upgrade));
        all.retain(|staged| {
            let state = staged.state();
            [&state.published, &state.replaces].into_iter().any(|its| its.as_ref() == Some(version))
        });
        all.sort_unstable_by_key(|staged| staged.ino());
        all.dedup_by_key(|staged| staged.ino());
        all
    }

    /// Remembers a file that was displaced.
    pub(super) fn remember_displaced(&self, staged: &Arc<Staged>) {
        let mut displaced = self.displaced.lock().unwrap_or_else(|e| e.into_inner());
        displaced.retain(|other| other.strong_count() > 0 && !std::ptr::eq(other.as_ptr(), Arc::as_ptr(staged)));
        displaced.push(Arc::downgrade(staged));
    }

    /// Those that may still publish something at a path.
    fn displaced_from(&self, path: &str) -> Vec<Arc<Staged>> {
        self.displaced_where(|target| target.path() == path)
    }

    /// Those that may still publish something in a directory or below it.
    pub(in crate::fs) fn displaced_inside(&self, directory: &str) -> Vec<Arc<Staged>> {
        self.displaced_where(|target| is_inside(&target.directory, directory))
    }

    fn displaced_where(&self, is_there: impl Fn(&Target) -> bool) -> Vec<Arc<Staged>> {
        let displaced: Vec<Arc<Staged>> = {
            let displaced = self.displaced.lock().unwrap_or_else(|e| e.into_inner());
            displaced.iter().filter_map(Weak::upgrade).collect()
        };
        let publishes = |staged: &Arc<Staged>| {
            let state = staged.state();
            state.displaced && !state.detached && !state.retired && is_there(&state.target)
        };
        displaced.into_iter().filter(publishes).collect()
    }
}

impl State {
    /// The version that this file is, or replaces, is another object now, with other attributes and the same bytes.
    fn repoint(&mut self, version: &NamedObject, copy: ObjectId, attributes: &FileAttributes) {
        self.image = self.image.map(|(object, view)| (if object == version.1 { copy } else { object }, view));
        for its in [&mut self.published, &mut self.replaces] {
            its.iter_mut().filter(|its| *its == version).for_each(|its| its.1 = copy);
        }
        if !self.attributes_changed {
            let FileAttributes { mtime, atime, .. } = self.attributes;
            self.attributes = FileAttributes { mtime, atime, ..attributes.clone() };
        }
    }
}

/// While it lives, the name of a file may lead to another version than the file knows.
pub(in crate::fs) struct Repointing<'a>(&'a Staged);

impl Drop for Repointing<'_> {
    fn drop(&mut self) {
        self.0.state().repointing = false;
    }
}

impl Staged {
    /// Called with the lock on `publishing`, before what its name leads to changes.
    pub(in crate::fs) fn repointing(&self) -> Repointing<'_> {
        self.state().repointing = true;
        Repointing(self)
    }
}

impl FileSystem {
    /// Takes a file from its path if somebody else published another version there, or removed it. False if it is what the
    /// path leads to.
    ///
    /// # Errors
    /// What the store answers.
    pub(in crate::fs) fn leave_if_replaced(&self, staged: &Arc<Staged>) -> Result<bool> {
        let Some(version) = staged.settled_version() else { return Ok(false) };
        let found = self.object_of(&version.0)?;
        Ok(found != Some(version.1) && self.leave_version(staged, &version))
    }

    /// As [`FileSystem::leave_if_replaced`], for one that is known to have been this version, before these names, which are
    /// sorted, were asked for.
    pub(in crate::fs) fn leave_if_not_among(
        &self,
        names: &[NamedObject],
        staged: &Arc<Staged>,
        version: Option<&NamedObject>,
    ) -> bool {
        let is_known = |version: &NamedObject| {
            let at = names.binary_search_by(|(name, _)| name.cmp(&version.0));
            at.is_ok_and(|at| names.get(at) == Some(version))
        };
        version.is_some_and(|version| !is_known(version) && self.leave_version(staged, version))
    }

    /// Takes a file from its path whose name leads elsewhere than to this version. Not if it was written and published
    /// again meanwhile, which takes no longer than the answer of a store on a busy machine: whoever joined it would go on
    /// with a file that nobody else finds, and what others write to the next one would end what they write.
    fn leave_version(&self, staged: &Arc<Staged>, version: &NamedObject) -> bool {
        // Whoever gives the version another object says so before it lets go of names.
        let _naming = self.naming();
        let left = self.staging.leave_path(staged, |state| {
            let is_same = state.published.as_ref() == Some(version) && state.writers.is_empty();
            let is_clean = || staged.stamp().is_ok_and(|now| state.clean.is_some_and(|(stamp, ..)| stamp == now));
            is_same && !state.repointing && is_clean()
        });
        if left {
            tracing::debug!(ino = staged.ino(), published = %version.1, "another version was published");
        }
        left
    }

    /// A version is another object now, with other attributes and the same bytes: so are the files that are this version,
    /// or are written in its place. Called with the lock on names. Returns them, for their notes.
    pub(in crate::fs) fn repoint(
        &self,
        version: &NamedObject,
        copy: ObjectId,
        attributes: &FileAttributes,
    ) -> Vec<Arc<Staged>> {
        let files = self.staging.of_version(version);
        files.iter().for_each(|staged| staged.state().repoint(version, copy, attributes));
        files
    }

    /// What is done to a path ends its displaced files; they go on if that fails.
    pub(in crate::fs) fn ending_displaced<T, E>(
        &self,
        path: &str,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
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
        self.staging.displaced_from(from).iter().for_each(|staged| self.move_displaced_file(staged, &|_| to.clone()));
    }

    /// Called without a lock on names. A publish that is under way ends first.
    pub(in crate::fs) fn move_displaced_file(&self, staged: &Arc<Staged>, moved: &dyn Fn(&Target) -> Target) {
        {
            let _publishing = staged.publishing.lock().unwrap_or_else(|e| e.into_inner());
            let mut state = staged.state();
            (state.target, state.moved) = (moved(&state.target), true);
        }
        note_staged(staged);
    }
}
