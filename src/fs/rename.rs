//! Names: mkdir, rmdir, unlink, rename.

use std::ffi::OsStr;
use std::sync::Arc;

use super::inode::ViewNode;
use super::publish::Unfinished;
use super::resolve::{ATTEMPTS, Found, Target, Vacancy, check_new};
use super::staging::{Staged, State};
use super::trees::Turn;
use super::{Caller, Entry, FileSystem, name};
use crate::error::{Error, Kind, Result};
use crate::image::View;
use crate::vineyard::ObjectId;
use crate::vineyard::store::NamedObject;

impl FileSystem {
    /// What is about to be changed, and the turn to do so. Moves that have to do with it and could not be finished are
    /// finished.
    fn target(&self, parent: u64, name: &OsStr) -> Result<(Turn<'_>, Target)> {
        let target = self.place(parent, name)?;
        self.finish_unfinished(&[&target.folder, target.dataset()])?;
        // Its directory may have moved by that.
        let (turn, directory) = self.enter_directory(parent)?;
        Ok((turn, Target::new(&directory, name::component(name)?)))
    }

    fn place(&self, parent: u64, name: &OsStr) -> Result<Target> {
        Ok(Target::new(&self.directory_name(parent)?, name::component(name)?))
    }

    /// Makes a directory; it exists for as long as the mount, or while a name lies under it.
    ///
    /// # Errors
    /// `Exists`; `ReadOnly`.
    pub fn mkdir(&self, parent: u64, name: &OsStr, mode: u32, umask: u32, caller: Caller) -> Result<Entry> {
        self.writable()?;
        let (_turn, target) = self.target(parent, name)?;
        check_new(&target)?;
        match self.resolve(&target, caller.pid)? {
            Some(Found::Directory { name }) if caller.resent => return self.enter(&target, Found::Directory { name }),
            // A dataset whose own name is the directory's, without extension, is not in the way: its file is its view.
            Some(Found::View(view))
                if view.name == target.folder && view.view != View::Raw && target.view.is_none() => {}
            Some(_) => return Err(Error::new(Kind::Exists, "the name exists")),
            None => {}
        }
        let mode = (mode & !umask & 0o7777) as u16;
        self.folders.make(&target.directory, target.folder.clone(), mode, caller);
        self.folders.touch(&target.directory);
        self.enter(&target, Found::Directory { name: target.folder.clone() })
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// `NotEmpty`, `NotFound`, `NotDirectory`.
    pub fn rmdir(&self, parent: u64, name: &OsStr, caller: Caller) -> Result<()> {
        self.writable()?;
        let (_turn, target) = self.target(parent, name)?;
        match self.resolve(&target, caller.pid)? {
            Some(Found::Directory { name }) => {
                if !self.is_empty_directory(&name)? {
                    return Err(Error::new(Kind::NotEmpty, "the directory is not empty"));
                }
                let number = self.inodes.renumber_directory(&name);
                self.folders.keep_number(&name, Some(number));
                self.folders.remove(&name);
                self.folders.touch(&target.directory);
                self.note_change();
                Ok(())
            }
            Some(_) => Err(Error::new(Kind::NotDirectory, "not a directory")),
            None if caller.resent => Ok(()),
            None => Err(Error::not_found("no such directory")),
        }
    }

    /// Removes a file. The dataset goes with all its views; open files stay readable.
    ///
    /// # Errors
    /// `NotFound`, `IsDirectory`, what the store answers.
    pub fn unlink(&self, parent: u64, name: &OsStr, caller: Caller) -> Result<()> {
        self.writable()?;
        let (_turn, target) = self.target(parent, name)?;
        self.finish_changes(Some(&[&target.plain, target.dataset()]))?;
        let remove = || {
            let found = self.resolve(&target, 0)?;
            self.ending_displaced(&target.path(), || match found {
                Some(Found::Directory { .. }) => Err(Error::new(Kind::IsDirectory, "is a directory")),
                Some(Found::Staged(staged)) => self.unlink_staged(&staged),
                Some(Found::View(view)) => self.remove_dataset(&view),
                None if caller.resent => Ok(()),
                None => Err(Error::not_found("no such file")),
            })
        };
        let mut removed = remove();
        for _ in 1..ATTEMPTS {
            match &removed {
                Err(error) if error.kind() == Kind::Stale => removed = remove(),
                _ => break,
            }
        }
        removed?;
        self.folders.touch(&target.directory);
        Ok(())
    }

    /// `Stale`, and nothing is done, if a copy for a writer took its place meanwhile, or another mount's version.
    fn unlink_staged(&self, staged: &Arc<Staged>) -> Result<()> {
        // A publish that is under way ends first; none starts afterwards.
        let _publishing = staged.publishing.lock().unwrap_or_else(|e| e.into_inner());
        if staged.state().displaced {
            return Err(Error::stale("another file is at that path by now"));
        }
        let _repointing = staged.repointing();
        let (published, replaces, directory) = {
            let state = staged.state();
            (state.published.clone(), state.replaces.clone(), state.target.directory.clone())
        };
        if let Some(version) = published.or(replaces) {
            self.keep_directory(&directory);
            let was_there = self.remove_version(&version.0, version.1)?;
            // One that is being written is at this path whatever its name leads to.
            if !was_there && staged.settled_version().is_some() {
                return Err(Error::stale("another mount replaced, renamed or removed it"));
            }
        }
        self.staging.detach(staged);
        staged.state().detached = true;
        self.note_change();
        super::adopt::note_staged(staged);
        Ok(())
    }

    fn remove_dataset(&self, view: &ViewNode) -> Result<()> {
        self.keep_directory(&view.directory);
        let was_there = self.remove_name(&view.name)?;
        // A copy that was made meanwhile for a writer of it is removed like a file that is open.
        if let Some((copy, _)) = self.copy_of(view) {
            self.staging.detach(&copy);
            self.end_replaced(&copy);
        } else if !was_there {
            return Err(Error::not_found("somebody else removed or renamed it"));
        }
        Ok(())
    }

    /// The file at the path of a view that was made for a writer of that very version, which is returned too, unless it has
    /// become another version.
    fn copy_of(&self, view: &ViewNode) -> Option<(Arc<Staged>, NamedObject)> {
        let copy = self.staging.at(&name::join(&view.directory, &view.component))?;
        let version = (view.name.clone(), view.object);
        let is_copy = {
            let state = copy.state();
            [&state.published, &state.replaces].into_iter().any(|its| its.as_ref() == Some(&version))
        };
        is_copy.then_some((copy, version))
    }

    /// Removes a name, and what it points to now unless another name does too. False if there is no such name.
    pub(super) fn remove_name(&self, name: &str) -> Result<bool> {
        let _naming = self.naming();
        // Somebody may have replaced it since it was looked up: the name goes with its present object.
        let object = self.object_of(name)?;
        let _unit = self.unit();
        self.suspect(object.as_slice());
        self.store.drop_name(name)?;
        if let Some(object) = object {
            self.end_listed(name, object);
            self.delete_unnamed(object);
        }
        Ok(object.is_some())
    }

    /// As [`FileSystem::remove_name`], unless the name leads to another object by now. Also for the old name of an object
    /// that has got a new one: that may lead to another object by now, whose save left ours to this name.
    /// Returns whether it led there.
    pub(super) fn remove_version(&self, name: &str, object: ObjectId) -> Result<bool> {
        let _naming = self.naming();
        self.remove_version_locked(name, object)
    }

    /// As [`FileSystem::remove_version`], with the lock on names held.
    pub(super) fn remove_version_locked(&self, name: &str, object: ObjectId) -> Result<bool> {
        let leads_there = self.object_of(name)? == Some(object);
        if leads_there {
            let _unit = self.unit();
            self.suspect(&[object]);
            self.store.drop_name(name)?;
            self.end_listed(name, object);
            self.delete_unnamed(object);
        }
        Ok(leads_there)
    }

    /// A directory from which the last name goes stays until `rmdir`, as on any filesystem.
    fn keep_directory(&self, directory: &str) {
        if directory != self.options.prefix {
            self.folders.stay(directory);
        }
    }

    /// Renames a file or a directory.
    ///
    /// # Errors
    /// `Exists` with `RENAME_NOREPLACE`; `NotEmpty`, `IsDirectory`, `NotDirectory` as POSIX says; why the content
    /// could not be published under the new name.
    pub fn rename(
        &self,
        parent: u64,
        name: &OsStr,
        new_parent: u64,
        new_name: &OsStr,
        flags: u32,
        caller: Caller,
    ) -> Result<()> {
        self.writable()?;
        if let Some(done) = self.resume_move(caller) {
            return done;
        }
        let places = || -> Result<_> { Ok((self.place(parent, name)?, self.place(new_parent, new_name)?)) };
        let (from, to) = places()?;
        if self.finish_same(&from, &to, flags & libc::RENAME_EXCHANGE != 0)? {
            return Ok(());
        }
        // Most often it is a file.
        let mut moves = false;
        let mut attempts = 0;
        loop {
            let (from, to) = places()?;
            let trees = [from.folder.as_str(), to.folder.as_str()];
            let _turn = self.trees.enter(&[&from.directory, &to.directory], if moves { &trees } else { &[] });
            let (from_now, to_now) = places()?;
            if (from_now.path(), to_now.path()) != (from.path(), to.path()) {
                continue;
            }
            match self.rename_in_turn(from_now, to_now, flags, caller, moves) {
                Ok(true) => return Ok(()),
                Ok(false) => moves = true,
                // What is at the path may be another file by now.
                Err(error) if error.kind() == Kind::Stale && attempts < ATTEMPTS => attempts += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// False, and nothing is done, if that moves directories, and it is not the turn for that.
    fn rename_in_turn(&self, from: Target, to: Target, flags: u32, caller: Caller, moves: bool) -> Result<bool> {
        check_new(&to)?;
        // Names below a directory move with it.
        self.finish_changes(None)?;
        let source = self.resolve(&from, 0)?;
        let there = self.resolve(&to, 0)?;
        let Some(source) = source else {
            let done = caller.resent && there.is_some();
            return if done { Ok(true) } else { Err(Error::not_found("no such file")) };
        };
        if !moves && matches!(source, Found::Directory { .. }) {
            return Ok(false);
        }
        if flags & libc::RENAME_EXCHANGE != 0 {
            let there = there.ok_or_else(|| Error::not_found("nothing to exchange with"))?;
            return self.exchange(&from, source, &to, there, caller).map(|()| true);
        }
        if flags & !libc::RENAME_NOREPLACE != 0 {
            return Err(Error::new(Kind::Invalid, "unknown rename flags"));
        }
        if from.path() == to.path() {
            return Ok(true);
        }
        // A former server may have given a file its new name, and not taken the old one.
        let same = there.as_ref().and_then(Found::object).is_some_and(|object| source.object() == Some(object));
        if flags & libc::RENAME_NOREPLACE != 0 && there.is_some() && !(caller.resent && same) {
            return Err(Error::new(Kind::Exists, "the new name exists"));
        }
        let new_directory = to.directory.clone();
        let replaced = match &there {
            Some(Found::View(view)) => Some(view.name.clone()),
            Some(Found::Staged(other)) => Some(other.state().target.dataset().to_owned()),
            _ => None,
        };
        let mut to = match replaced {
            Some(name) => to.of_name(&name),
            None => to,
        };
        // Another mount may give it to something else before this one does.
        let vacancy = Vacancy::demanded(flags & libc::RENAME_NOREPLACE != 0 && there.is_none());
        to.vacancy = vacancy.clone();
        match (source, there) {
            (Found::Directory { name }, there) => self.rename_directory(&name, &to, there, caller)?,
            (_, Some(Found::Directory { .. })) => {
                return Err(Error::new(Kind::IsDirectory, "the new name is a directory"));
            }
            (Found::Staged(staged), there) => {
                self.ending_displaced(&to.path(), || self.rename_staged(&staged, to.clone(), there))?;
            }
            (Found::View(view), there) => {
                self.ending_displaced(&to.path(), || self.rename_view(&view, &to, there))?;
            }
        }
        self.move_displaced(&from.path(), &to);
        // Nothing was published: whoever does so later replaces what is there then.
        vacancy.end();
        self.folders.touch(&from.directory);
        self.folders.touch(&new_directory);
        self.note_change();
        Ok(true)
    }

    fn rename_directory(&self, from: &str, to: &Target, there: Option<Found>, caller: Caller) -> Result<()> {
        match there {
            Some(Found::Directory { name }) if name == from => return Ok(()),
            Some(Found::Directory { name }) if !self.is_empty_directory(&name)? => {
                return Err(Error::new(Kind::NotEmpty, "the new name is a directory that is not empty"));
            }
            Some(Found::Directory { .. }) | None => {}
            Some(_) => return Err(Error::new(Kind::NotDirectory, "the new name is a file")),
        }
        if to.folder.starts_with(&format!("{from}/")) {
            return Err(Error::new(Kind::Invalid, "a directory cannot move into itself"));
        }
        self.move_directory(from, &to.folder, caller)
    }

    /// Moves a staged file, and the name of what it published, to another path of the same format.
    ///
    /// # Errors
    /// `Stale`, and nothing is done, if a copy for a writer took its place meanwhile, or another mount renamed, replaced or
    /// removed what it published.
    pub(super) fn move_staged(&self, staged: &Arc<Staged>, target: Target) -> Result<()> {
        let _publishing = staged.publishing.lock().unwrap_or_else(|e| e.into_inner());
        if staged.state().displaced {
            return Err(Error::stale("another file is at that path by now"));
        }
        let _repointing = staged.repointing();
        if let Some(version) = staged.published() {
            let (name, object) = &version;
            let native = staged.state().target.view.as_ref().is_some_and(|(dataset, _)| dataset == name);
            let _naming = self.naming();
            let new_name = self.point_path_from(&version, &target, native)?;
            if new_name != *name {
                self.remove_version_locked(name, *object)?;
            }
            staged.state().published = Some((new_name, *object));
        }
        self.staging.move_to(staged, target);
        Ok(())
    }

    fn rename_staged(&self, staged: &Arc<Staged>, to: Target, there: Option<Found>) -> Result<()> {
        let from = staged.state().target.clone();
        let same_format = from.view.as_ref().map(|(_, view)| *view) == to.view.as_ref().map(|(_, view)| *view);
        let is_idle = || staged.state().is_closed();
        if same_format && staged.published().is_some() && is_idle() {
            // A file that was closed before it was moved is published, and the errors are this call's. Not after its
            // former version has moved: that would have replaced what is there.
            self.publish_changed(staged, Unfinished::Publish)?;
        }
        let replaces = staged.state().replaces.clone();
        let is_free = there.is_none();
        let (other, version) = match there {
            Some(Found::Staged(other)) if !Arc::ptr_eq(&other, staged) => {
                let version = other.published().or_else(|| other.state().replaces.clone());
                (Some(other), version)
            }
            Some(Found::View(view)) => (None, Some((view.name, view.object))),
            _ => (None, None),
        };
        self.keep_directory(&from.directory);
        let mut former = None;
        let moved = if same_format {
            let published = staged.published().is_some();
            self.move_staged(staged, to).and_then(|()| {
                let unpublished = !published && is_idle();
                if unpublished { self.publish_changed(staged, Unfinished::Publish) } else { Ok(()) }
            })
        } else {
            // Another extension: the bytes are looked at anew and published under the new name.
            {
                // Who publishes it under the old one right now is done first.
                let _publishing = staged.publishing.lock().unwrap_or_else(|e| e.into_inner());
                self.staging.move_to(staged, to);
                let mut state = staged.state();
                former = state.published.take().map(|published| (published, state.clean.take()));
            }
            let publishes = former.is_some() || is_idle();
            if publishes { self.publish_changed(staged, Unfinished::Publish) } else { Ok(()) }
        };
        if let Err(error) = moved {
            if error.kind() == Kind::Stale && staged.state().displaced {
                return Err(error);
            }
            // Nothing moved: both files are where they were, and as they were.
            self.staging.move_to(staged, from);
            if let Some((published, clean)) = former {
                let mut state = staged.state();
                (state.published, state.clean, state.failed) = (Some(published), clean, None);
            }
            if let Some(other) = other {
                let target = other.state().target.clone();
                self.staging.move_to(&other, target);
            }
            return Err(error);
        }
        if let Some(other) = other {
            self.end_replaced(&other);
        }
        {
            // What it has not published yet replaces what was there.
            let mut state = staged.state();
            let unpublished = state.published.is_none();
            state.replaces = version.filter(|_| unpublished);
        }
        super::adopt::note_staged(staged);
        // The version under the old path goes with the path, if it was not replaced under the new one: both may be views
        // of one dataset. The file has its new name, whether the store takes the old one from it now or later.
        if let Some(behind) = replaces {
            self.leave_behind(behind);
        }
        // Unless it has taken that version's place under its own name.
        let name = staged.published().map(|(name, _)| name);
        let left = former.is_none_or(|(behind, _)| Some(&behind.0) == name.as_ref() || self.leave_behind(behind));
        if left || !is_free || !staged.state().is_closed() { Ok(()) } else { self.take_back_copy(staged) }
    }

    /// What a replaced file published was replaced with the name; what it did not publish ends here.
    fn end_replaced(&self, other: &Arc<Staged>) {
        other.state().detached = true;
        super::adopt::note_staged(other);
    }

    pub(super) fn rename_view(&self, view: &ViewNode, to: &Target, there: Option<Found>) -> Result<()> {
        self.keep_directory(&view.directory);
        let plain_to_plain = view.view == View::Raw && to.view.is_none();
        let same_view = view.view != View::Raw && to.view.as_ref().is_some_and(|(_, v)| *v == view.view);
        if !(plain_to_plain || same_view) {
            // Bytes move as they are; what they become is decided by the new name.
            let attributes = view.summary.attributes.as_deref().cloned().unwrap_or_default();
            let staged = self.prepare_staged(to.clone(), attributes, None)?;
            self.copy_view(view, &staged)?;
            let is_free = there.is_none();
            let other = match there {
                Some(Found::Staged(other)) => Some(other),
                _ => None,
            };
            // What another writes to the file that is replaced ends here, and goes on if it is not.
            let publishing = other.as_ref().map(|other| other.publishing.lock().unwrap_or_else(|e| e.into_inner()));
            self.staging.show(&staged, None);
            let published = self.publish_changed(&staged, Unfinished::Publish);
            drop(publishing);
            if let Err(error) = published {
                self.staging.detach(&staged);
                if let Some(other) = other {
                    let target = other.state().target.clone();
                    self.staging.move_to(&other, target);
                }
                return Err(error);
            }
            if let Some(other) = other {
                self.end_replaced(&other);
            }
            let replaced_itself = staged.published().is_some_and(|(name, _)| name == view.name);
            // Not what somebody else may have saved there meanwhile.
            let left = replaced_itself || self.leave_behind((view.name.clone(), view.object));
            return if left || !is_free { Ok(()) } else { self.take_back_copy(&staged) };
        }
        let other = match &there {
            Some(Found::Staged(other)) => Some(other),
            _ => None,
        };
        // It publishes nothing meanwhile, and what it has goes on if the name is not put.
        let publishing = other.map(|other| other.publishing.lock().unwrap_or_else(|e| e.into_inner()));
        let _naming = self.naming();
        let name = self.point_path_from(&(view.name.clone(), view.object), to, same_view)?;
        if let Some(other) = other {
            self.staging.detach(other);
            self.end_replaced(other);
        }
        drop(publishing);
        self.move_inode(view, to, &name);
        self.move_copy(view, to, &name);
        if name != view.name {
            self.remove_version_locked(&view.name, view.object)?;
        }
        Ok(())
    }

    /// Somebody else renamed or removed a file of which a copy was published under another name: that goes again.
    fn take_back_copy(&self, copy: &Arc<Staged>) -> Result<()> {
        if let Some((name, object)) = copy.published() {
            self.remove_version(&name, object)?;
        }
        self.staging.detach(copy);
        self.end_replaced(copy);
        Err(Error::stale("it was renamed, replaced or removed meanwhile"))
    }

    /// A copy that was made meanwhile for a writer of what is at the old path, where the kernel looks it up, goes with it.
    /// Both names lead to the version at this moment.
    fn move_copy(&self, view: &ViewNode, to: &Target, name: &str) {
        let Some((copy, version)) = self.copy_of(view) else { return };
        {
            let mut state = copy.state();
            let State { published, replaces, .. } = &mut *state;
            let Some(its) = [published, replaces].into_iter().flatten().find(|its| **its == version) else { return };
            its.0 = name.to_owned();
        }
        self.staging.move_to(&copy, to.clone());
    }

    /// The kernel lets the new path lead to the inode of the old one, and may open that for writing: it must know by
    /// then what it is called.
    fn move_inode(&self, view: &ViewNode, to: &Target, name: &str) {
        let path = super::name::join(&view.directory, &view.component);
        let ino = self.inodes.view_number(&path, view.object, view.view);
        if self.inodes.get(ino).is_some() {
            self.inodes.keep_number(&to.path(), view.object, view.view, ino);
            let moved = to.view_node(name.to_owned(), view.object, view.view, view.summary.clone());
            self.show_view(ino, moved);
        }
    }

    /// `RENAME_EXCHANGE`: two published files of one format, or two directories, change places.
    fn exchange(&self, from: &Target, source: Found, to: &Target, there: Found, caller: Caller) -> Result<()> {
        let settled = |found: Found| -> Result<Found> {
            let Found::Staged(staged) = &found else { return Ok(found) };
            self.publish_changed(staged, Unfinished::Publish)?;
            staged.await_closes();
            if !staged.state().writers.is_empty() || staged.published().is_none() {
                return Err(Error::new(Kind::Busy, "a file that is being written is not exchanged"));
            }
            self.staging.detach(staged);
            let target = staged.state().target.clone();
            self.resolve(&target, 0)?.ok_or_else(|| Error::not_found("removed meanwhile"))
        };
        match (settled(source)?, settled(there)?) {
            (Found::View(a), Found::View(b)) if a.view == b.view => {
                self.exchange_names((&a.name, a.object), (&b.name, b.object), caller)
            }
            (Found::Directory { name: a }, Found::Directory { name: b }) => {
                for staged in self.staging.tree(&a).into_iter().chain(self.staging.tree(&b)) {
                    self.publish_changed(&staged, Unfinished::Publish)?;
                    staged.await_closes();
                    if !staged.state().writers.is_empty() || staged.published().is_none() {
                        return Err(Error::new(Kind::Busy, "a file below is being written"));
                    }
                    self.staging.detach(&staged);
                }
                self.exchange_directories(&a, &b, caller)
            }
            _ => Err(Error::new(
                Kind::Invalid,
                format!("{:?} and {:?} are of different kinds and cannot be exchanged", from.path(), to.path()),
            )),
        }
    }

    /// Symbolic links are not kept.
    ///
    /// # Errors
    /// Always `NotPermitted`.
    pub fn symlink(&self, _parent: u64, _name: &OsStr, _target: &OsStr, _caller: Caller) -> Result<Entry> {
        Err(Error::new(Kind::NotPermitted, "symbolic links are not kept"))
    }

    /// There are no symbolic links.
    ///
    /// # Errors
    /// Always `Invalid`.
    pub fn readlink(&self, _ino: u64) -> Result<Vec<u8>> {
        Err(Error::new(Kind::Invalid, "not a symbolic link"))
    }
}
