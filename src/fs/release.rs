//! What ends: writing, with what a close leaves to be done and mappings that outlive it, and inodes that the kernel forgets.
//!
//! A shared mapping of a file that the kernel writes by itself (passthrough) holds the memory file and not the open file:
//! the last descriptor is closed, and stores still come, of which no request tells. A file that was opened for reading and
//! writing before anything else goes through the page cache, where RELEASE waits for the mapping (see `open_staged`); for
//! one that joined a writer the mode was settled. Such a file keeps its last writer until nobody uses the memory file any
//! more, and is published again then.

use std::sync::Arc;

use super::adopt::note_staged;
use super::cache::Assembled;
use super::inode::{Inode, Node};
use super::publish::Unfinished;
use super::staging::Staged;
use super::{FileSystem, Handle};
use crate::image;
use crate::sync::{Mutex, MutexGuard};
use crate::vineyard::store::NameQuery;

/// Writers whose mappings may go on.
#[derive(Default)]
pub(super) struct Mappings {
    all: Mutex<Vec<Mapping>>,
    /// Held while they are ended: whoever ends the mount waits for those that another thread is about to publish.
    ending: Mutex<()>,
}

struct Mapping {
    inode: Arc<Inode>,
    staged: Arc<Staged>,
    fh: u64,
    handle: Option<Handle>,
}

impl Mappings {
    fn add(&self, mapping: Mapping) {
        self.all.lock().unwrap_or_else(|e| e.into_inner()).push(mapping);
    }

    fn take(&self) -> Vec<Mapping> {
        std::mem::take(&mut *self.all.lock().unwrap_or_else(|e| e.into_inner()))
    }

    fn end(&self) -> MutexGuard<'_, ()> {
        self.ending.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl FileSystem {
    /// Takes lookups back.
    pub fn forget(&self, ino: u64, count: u64) {
        let node = self.inodes.get(ino).map(|inode| inode.node.clone());
        self.inodes.forget(ino, count);
        self.end_former_opens(ino);
        if self.inodes.get(ino).is_none() {
            self.staging.forget(ino);
        }
        if let Some(Node::Directory { name }) = &node
            && self.inodes.get(ino).is_none()
        {
            self.release_number(name, ino);
        }
        // A published file that the kernel forgot is found through the store from now on.
        if let Some(Node::Staged(staged)) = node
            && self.inodes.get(ino).is_none()
            && staged.is_settled()
            && self.staging.retire(&staged)
        {
            note_staged(&staged);
        }
    }

    /// Forgets the inode numbers that nobody needs without a directory, which the kernel has forgotten.
    fn release_number(&self, name: &str, number: u64) {
        let exists = |name: &str| {
            let names = NameQuery::Prefix { prefix: format!("{name}/"), limit: Some(1) };
            // Not known is as good as there: a number that is kept for nothing does no harm.
            self.folders.exists(name) || !self.store.names(&[names]).is_ok_and(|found| found.concat().is_empty())
        };
        for gone in self.inodes.release_directories(name, number, exists) {
            self.folders.keep_number(&gone, None);
        }
    }

    /// True if this was the last descriptor for writing, and somebody goes on writing through a mapping: the writer stays
    /// until that ends.
    fn is_still_mapped(&self, inode: &Arc<Inode>, staged: &Arc<Staged>, fh: u64, handle: Option<&Handle>) -> bool {
        let Some(Handle::Staged { writer: true, .. }) = handle else { return false };
        {
            let state = staged.state();
            let is_last = matches!(state.writers.handles(), [last] if last.handle == fh);
            if !is_last || state.detached || !state.shared_writable || state.passthrough.is_none() {
                return false;
            }
        }
        // Where that is not known, it is served from the store from now on (see `settle`).
        let Ok(used) = self.host.is_used(staged.file().key) else { return false };
        if used {
            tracing::debug!(path = %staged.state().target.path(), "closed, and still written through a mapping");
            let mapping = Mapping { inode: inode.clone(), staged: staged.clone(), fh, handle: handle.cloned() };
            self.mappings.add(mapping);
        } else {
            staged.state().shared_writable = false;
        }
        used
    }

    /// Whoever wrote a file before this server came may have closed it already, with a mapping that goes on.
    pub(super) fn adopt_mappings(&self, inode: &Arc<Inode>, staged: &Arc<Staged>) {
        let state = staged.state();
        if state.shared_writable && state.passthrough.is_some() {
            for writer in state.writers.handles() {
                let (inode, staged) = (inode.clone(), staged.clone());
                self.mappings.add(Mapping { inode, staged, fh: writer.handle, handle: None });
            }
        }
    }

    /// Publishes what was stored through mappings that have ended.
    pub fn end_mappings(&self) {
        let _ending = self.mappings.end();
        for mapping in self.mappings.take() {
            if !mapping.staged.state().writers.handles().iter().any(|writer| writer.handle == mapping.fh) {
                // It was closed meanwhile, or the file removed.
                continue;
            }
            match self.host.is_used(mapping.staged.file().key) {
                Ok(false) => self.end_mapping(mapping),
                _ => self.mappings.add(mapping),
            }
        }
    }

    /// Publishes what was stored through mappings so far: there will be no mount to publish the rest.
    pub fn leave_mappings(&self) {
        let _ending = self.mappings.end();
        self.mappings.take().into_iter().for_each(|mapping| self.end_mapping(mapping));
    }

    fn end_mapping(&self, mapping: Mapping) {
        let Mapping { inode, staged, fh, handle } = mapping;
        let handle = handle.or_else(|| self.handles().remove(&fh));
        {
            let mut state = staged.state();
            state.shared_writable = false;
            // The times of the file do not tell of each store, and a hash may be of what was stored after it was published.
            state.clean = None;
        }
        self.release_staged(&inode, &staged, fh, handle);
    }

    /// The last close of a handle on a staged file: what is still dirty is published, without anyone to tell.
    pub(super) fn release_staged(&self, inode: &Arc<Inode>, staged: &Arc<Staged>, fh: u64, handle: Option<Handle>) {
        if self.is_still_mapped(inode, staged, fh, handle.as_ref()) {
            return;
        }
        let mut state = staged.state();
        let (counted, writer) = match handle {
            Some(Handle::Staged { writer, .. }) => (1, writer),
            // Opened before the server was replaced, for reading: writers are known, unless that server was of a version
            // that did not note them.
            _ => (0, state.writers_unknown),
        };
        state.opens = state.opens.saturating_sub(counted);
        state.writers.remove(fh);
        let last_writer = writer && state.writers.is_empty();
        let detached = state.detached;
        state.settling = last_writer && !detached;
        drop(state);
        {
            let mut state = inode.state();
            state.opens = state.opens.saturating_sub(counted);
        }
        if last_writer && !detached {
            self.settle(staged);
            staged.state().settling = false;
        }
        if writer && !detached {
            note_staged(staged);
        }
        let state = inode.state();
        if state.opens == 0 && state.lookups == 0 {
            drop(state);
            self.forget(inode.ino, 0);
        }
    }

    /// After the last writer: publishes what is left, and lets the memory file serve as the image.
    pub(super) fn settle(&self, staged: &Arc<Staged>) {
        let unfinished = {
            let state = staged.state();
            let is_new = state.published.is_none() && state.replaces.is_none();
            if is_new { Unfinished::KeepUnlessEmpty } else { Unfinished::Keep }
        };
        if let Err(error) = self.publish_changed(staged, unfinished) {
            let path = staged.state().target.path();
            self.warn(format!("{path:?} was closed and could not be published: {error}; its bytes stay readable"));
            return;
        }
        // It is not cut until it is settled whether it serves as an image.
        let _publishing = staged.publishing.lock().unwrap_or_else(|e| e.into_inner());
        let Ok(stamp) = staged.stamp() else { return };
        let (published, view) = {
            let mut state = staged.state();
            if state.has_writers() {
                // Somebody opened it again meanwhile, or is about to, and will end here too.
                return;
            }
            let unfinished = state.clean.is_none_or(|(clean, ..)| clean != stamp);
            let has_version = state.published.is_some() || state.replaces.is_some();
            // Nothing was written, or it is unfinished: the version before stays. Or a mapping may outlive every
            // handle: what is served from now on is made from the store.
            state.retired = has_version && (unfinished || state.shared_writable);
            // Whoever opens the published version gets this memory file: a later writer works on a copy.
            state.had_readers |= !state.retired && state.published.is_some();
            let view = state.target.view.as_ref().map_or(image::View::Raw, |(_, view)| *view);
            (state.published.clone().filter(|_| !state.retired), (state.written_view, view))
        };
        let Some((_, object)) = published else {
            if staged.state().retired {
                self.staging.detach(staged);
            }
            return;
        };
        if self.staging.add_settled(stamp.size, self.options.staging_size / 4) {
            self.make_room_to_write();
        }
        let view = match view {
            (Some(written), _) => Some(written),
            (None, view) => self.objects.summary(&*self.store, object).ok().flatten().and_then(|summary| {
                let view = if summary.view(image::View::Raw).is_some() { image::View::Raw } else { view };
                (summary.view(view) == Some(Some(stamp.size))).then_some(view)
            }),
        };
        if let Some(view) = view {
            staged.state().image = Some((object, view));
            self.cache.insert(object, view, Arc::new(Assembled::adopt(staged.file().clone(), stamp.size)));
        }
    }
}
