//! Creating, opening and changing files; publishing is in `publish`.

use std::ffi::OsStr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::SystemTime;

use super::attributes::apply;
use super::host::{Area, MemoryFile};
use super::inode::{Inode, Node, ViewNode};
use super::open::wants_write;
use super::opens::Open;
use super::publish::Unfinished;
use super::resolve::{ATTEMPTS, Found, Target, check_new};
use super::staging::{Staged, State, Writer};
use super::{Caller, Entry, FileSystem, Handle, Opened, Serve, SetAttr, name};
use crate::dataset::FileAttributes;
use crate::dataset::attributes::to_nanos;
use crate::error::{Error, Kind, Result};
use crate::image;
use crate::sync::MutexGuard;
use crate::vineyard::ObjectId;

/// How long a reader waits for the rest of a close, in milliseconds.
const CLOSE_TAKES_MS: u32 = 20;
/// How long who was refused once waits for those who write what the kernel opens for it, in milliseconds.
const TURN_TAKES_MS: u32 = if cfg!(test) { 3_000 } else { 200 };

impl FileSystem {
    /// Creates a file and opens it.
    ///
    /// # Errors
    /// `Exists` with `O_EXCL`; `ReadOnly`; `Os(EILSEQ)` for names that are not UTF-8; `Full`.
    pub fn create(
        &self,
        parent: u64,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        caller: Caller,
    ) -> Result<(Entry, Opened)> {
        self.writable()?;
        self.follow_store()?;
        let (_turn, directory) = self.enter_directory(parent)?;
        let target = Target::new(&directory, name::component(name)?);
        check_new(&target)?;
        let mode = (mode & !umask & 0o7777) as u16;
        self.retries.end(caller);
        // Whatever else comes to the path meanwhile: any file may be the answer, and the kernel may not ask again.
        let mut created = self.create_at(&target, mode, flags, caller);
        for _ in 1..ATTEMPTS {
            match &created {
                Err(error) if error.kind() == Kind::Stale => created = self.create_at(&target, mode, flags, caller),
                _ => break,
            }
        }
        created
    }

    fn create_at(&self, target: &Target, mode: u16, flags: i32, caller: Caller) -> Result<(Entry, Opened)> {
        let absent = self.retries.is_absent(&target.path(), caller) && flags & libc::O_EXCL == 0;
        let found = if absent { self.resolve_here(target, caller.pid)? } else { self.resolve(target, caller.pid)? };
        let (staged, flags) = match found {
            Some(Found::Directory { .. }) => return Err(Error::new(Kind::IsDirectory, "is a directory")),
            // Somebody was faster, or the kernel asks a second time.
            Some(Found::Staged(staged)) if flags & libc::O_EXCL == 0 || caller.resent => (staged, flags),
            Some(_) if flags & libc::O_EXCL != 0 => return Err(Error::new(Kind::Exists, "the file exists")),
            Some(Found::View(view)) => {
                let own = self.stage_view(target, &view, flags, caller)?;
                let staged = own.or_else(|| self.staging.at(&target.path()));
                (staged.ok_or_else(|| Error::stale("replaced while it was created"))?, flags & !libc::O_TRUNC)
            }
            _ => {
                let attributes = FileAttributes {
                    mode: Some(mode),
                    uid: Some(caller.uid),
                    gid: Some(self.folders.inherited_group(&target.directory).unwrap_or(caller.gid)),
                    ..Default::default()
                };
                let staged = self.stage(target.clone(), attributes, None, None)?;
                self.folders.touch(&target.directory);
                (staged, flags & !libc::O_TRUNC)
            }
        };
        let inode = self.inodes.look_up(staged.ino(), || Node::Staged(staged.clone()));
        match self.open_staged(&inode, &staged, flags, caller) {
            Ok(opened) => Ok((self.entry(&inode)?, opened)),
            Err(error) => {
                // The kernel does not hear of it.
                self.forget(inode.ino, 1);
                Err(error)
            }
        }
    }

    /// A new, empty staged file at a path; as [`Staging::show`](super::staging::Staging::show) has it.
    fn stage(
        &self,
        target: Target,
        attributes: FileAttributes,
        replaces: Option<(String, ObjectId)>,
        writer: Option<u32>,
    ) -> Result<Arc<Staged>> {
        let staged = self.prepare_staged(target, attributes, replaces)?;
        self.staging.show(&staged, writer);
        Ok(staged)
    }

    /// A new, empty staged file; as [`Staging::prepare`](super::staging::Staging::prepare) has it.
    pub(super) fn prepare_staged(
        &self,
        target: Target,
        attributes: FileAttributes,
        replaces: Option<(String, ObjectId)>,
    ) -> Result<Arc<Staged>> {
        self.make_room_to_write();
        let file = MemoryFile::create(&self.host, Area::Staging, 0)?;
        Ok(self.staging.prepare(file, target, attributes, replaces))
    }

    /// Images that were written here stay until room is needed for what is written next.
    pub(super) fn make_room_to_write(&self) {
        self.cache.shrink_staged(self.options.staging_size / 2);
        for retired in self.staging.retire_old(self.options.staging_size / 4) {
            super::adopt::note_staged(&retired);
            let target = retired.state().target.clone();
            // The kernel would know the inode, and so keep its memory file here, until memory ends.
            self.host.invalidate_entry(self.directory_number(&target.directory), OsStr::new(&target.component));
        }
    }

    /// Makes the staged file on which a writer of a published view works: empty if it truncates, else a copy. Returns it
    /// if it is this writer's alone; otherwise it is found at the path, if no other came there.
    pub(super) fn stage_view(
        &self,
        target: &Target,
        view: &ViewNode,
        flags: i32,
        caller: Caller,
    ) -> Result<Option<Arc<Staged>>> {
        let there = self.staging.at(&target.path());
        let truncates = flags & libc::O_TRUNC != 0;
        // A writer that does not truncate joins those who have the file open, or are about to open it.
        if !truncates && there.as_ref().is_some_and(|there| there.state().has_writers() && !there.state().detached) {
            return Ok(None);
        }
        let attributes = view.summary.attributes.as_deref().cloned().unwrap_or(FileAttributes {
            uid: Some(caller.uid),
            gid: Some(caller.gid),
            ..Default::default()
        });
        let attributes = FileAttributes { mtime: None, atime: None, ctime: None, ..attributes };
        let version = (view.name.clone(), view.object);
        let target = target.clone().of_name(&view.name);
        let staged = self.prepare_staged(target.clone(), attributes, Some(version.clone()))?;
        staged.state().shown = Some(self.inodes.view_number(&target.path(), view.object, view.view));
        if truncates {
            self.staging.show(&staged, Some(caller.pid));
            return Ok(Some(staged));
        }
        self.copy_view(view, &staged)?;
        // The same bytes are published already: nothing to do unless they change.
        staged.state().published = Some(version);
        staged.mark_clean(staged.stamp()?)?;
        self.staging.show_instead(&staged, there.as_ref());
        Ok(None)
    }

    /// Copies the bytes of a view into a staged file.
    pub(super) fn copy_view(&self, view: &ViewNode, staged: &Staged) -> Result<()> {
        let file = &staged.file().file;
        if let Some(assembled) = self.cache.get(view.object, view.view) {
            return copy_file(&assembled.file().file, file, assembled.size());
        }
        let (_, bytes) = self.nearest(view.object, view.view, None)?;
        image::assemble(&bytes, &*self.store, file, 2)?;
        self.store.verify(&bytes.blobs(0..bytes.size()))
    }

    pub(super) fn open_staged(
        &self,
        inode: &Arc<Inode>,
        staged: &Arc<Staged>,
        flags: i32,
        caller: Caller,
    ) -> Result<Opened> {
        let write = wants_write(flags);
        if write && caller.resent {
            self.take_back_open(inode, staged, caller);
        }
        self.take_back(inode.ino, caller);
        let mut dirty = staged.is_dirty()?;
        let (again, led) = {
            let state = staged.state();
            let again = self.was_refused(&state.target.path(), caller);
            (again, again && state.expects(caller))
        };
        // Who was refused once gets what was there when its second lookup asked, as if it had been open already when it
        // was replaced or removed: a second refusal would reach the program.
        if !dirty && self.leave_if_replaced(staged)? && !(again && (led || !write)) {
            return Err(Error::stale("somebody published another version"));
        }
        let fh = self.new_handle();
        let mut is_news = write;
        let mut state = staged.state();
        if (state.detached && !led) || state.retired {
            // Removed, or all in the store, while the kernel was on its way here.
            return Err(Error::stale("the path leads elsewhere now"));
        }
        if write {
            let truncates = flags & libc::O_TRUNC != 0;
            if state.refuses_writer(flags, caller) && !(led && !truncates && !state.is_final()) {
                let target = state.target.clone();
                drop(state);
                if !(again && truncates) {
                    self.replace_staged(staged, target, flags, caller)?;
                    return Err(Error::stale("written anew"));
                }
                let Some(own) = self.await_turn(staged, caller) else {
                    return Err(Error::stale("others write it or read it, and there is no time to look it up again"));
                };
                state = own;
            }
            if truncates && state.is_final() {
                return Err(Error::stale("it is being read by now"));
            }
            state.has_come(caller);
            state.writers.add(Writer { handle: fh, pid: caller.pid, request: caller.request });
            if truncates {
                // With its writer it does not become final meanwhile.
                drop(state);
                let cut = staged.truncate(0);
                state = staged.state();
                if !matches!(cut, Ok(true)) {
                    state.writers.remove(fh);
                    self.step_back(staged, state);
                    return Err(cut.err().unwrap_or_else(|| Error::stale("it is being read by now")));
                }
            }
            state.shared_writable |= flags & libc::O_ACCMODE == libc::O_RDWR;
        } else {
            // A close reaches us in two steps, the second a moment after the program went on: a reader that comes in
            // between waits for it, so as to read the very file that was written. Who comes for the second time waits
            // for all who write.
            drop(state);
            state = staged.wait_until(if again { TURN_TAKES_MS } else { CLOSE_TAKES_MS }, |state| {
                let own = state.writers.contains(&caller.pid);
                let closes_own = own && state.closed_by == Some(caller.pid);
                let is_closed = state.writers.is_empty() && !(again && state.settling);
                is_closed || ((own || (dirty && !again)) && !closes_own)
            });
            if again {
                drop(state);
                dirty = staged.is_dirty()?;
                state = staged.state();
            }
            state.reader_has_come();
            if state.refuses_reader(dirty, caller) {
                // While it is being written, others read the version that is published.
                self.staging.redirect_reader(&state.target.path(), caller.pid);
                return Err(Error::stale("being written: the published version is read"));
            }
            if state.retired {
                return Err(Error::stale("the path leads elsewhere now"));
            }
            is_news = !std::mem::replace(&mut state.had_readers, true);
        }
        // A shared writable mapping of a passthrough file may change it after the last close, unseen. Through the page
        // cache its stores come as WRITE requests, and RELEASE waits for the mapping: slower, and nothing is lost.
        let wants_mapping = flags & libc::O_ACCMODE == libc::O_RDWR;
        if state.opens == 0 {
            state.passthrough = staged.file().backing.filter(|_| !wants_mapping);
        }
        let serve = state.passthrough.map_or(Serve::Cached, Serve::Passthrough);
        state.opens += 1;
        state.was_opened = true;
        drop(state);
        if write {
            // Others meet it from now on, with its writer.
            self.staging.claim(staged);
        }
        inode.state().opens += 1;
        self.handles().insert(fh, Handle::Staged { writer: write, pid: caller.pid, closed: false });
        if !write {
            let file = matches!(serve, Serve::Passthrough(_)).then_some(staged.file().key);
            self.opens.opened(inode.ino, Open { handle: fh, request: caller.request, reads: None, file }, || None);
        }
        if is_news {
            // A server that comes while it is being written goes on with this writer.
            super::adopt::note_staged(staged);
        }
        Ok(Opened { fh, serve, no_flush: !write })
    }

    /// For a truncating writer that the kernel led here for the second time, to what somebody else writes: waits until
    /// all others have closed the file, and returns its state. `None` if that takes long, or its bytes must not change.
    fn await_turn<'a>(&self, staged: &'a Arc<Staged>, caller: Caller) -> Option<MutexGuard<'a, State>> {
        {
            let mut state = staged.state();
            let settled = state.published.is_some() && (state.had_readers || state.writers.is_empty());
            // Until it has come the file does not become an image.
            if settled || state.writers.contains(&caller.pid) || !state.expect_writer(caller) {
                return None;
            }
        }
        let must_stay =
            |state: &State| state.detached || state.retired || (state.published.is_some() && state.had_readers);
        let mut state = staged.wait_until(TURN_TAKES_MS, |state| state.writers.is_empty() || must_stay(state));
        if state.writers.is_empty() && !must_stay(&state) {
            return Some(state);
        }
        state.has_come(caller);
        self.step_back(staged, state);
        None
    }

    /// After somebody who was about to write does not: if nobody else does, the file is as its last writer left it.
    fn step_back(&self, staged: &Arc<Staged>, state: MutexGuard<'_, State>) {
        let last = state.writers.is_empty() && !state.detached;
        drop(state);
        if last {
            self.settle(staged);
        }
    }

    /// A former server opened the file for the same request, which it did not answer: nobody has that handle.
    fn take_back_open(&self, inode: &Arc<Inode>, staged: &Arc<Staged>, caller: Caller) {
        let mut state = staged.state();
        let lost = state.writers.handles().iter().find(|writer| writer.request == caller.request).copied();
        let Some(Writer { handle, .. }) = lost else { return };
        state.writers.remove(handle);
        state.opens = state.opens.saturating_sub(1);
        drop(state);
        self.handles().remove(&handle);
        let mut state = inode.state();
        state.opens = state.opens.saturating_sub(1);
    }

    /// Replaces a staged file that must not change, for one who opens it with these flags: by an empty one if that
    /// truncates, else by a copy.
    pub(super) fn replace_staged(&self, old: &Staged, target: Target, flags: i32, caller: Caller) -> Result<()> {
        let there = self.staging.at(&target.path());
        let is_there = there.as_ref().is_some_and(|there| there.ino() == old.ino());
        if flags & libc::O_TRUNC == 0 && (!is_there || old.state().displaced) {
            // Somebody else has made that copy already, or the path leads to a later version, of which one is made then.
            return Ok(());
        }
        // While it is copied it gets no other version, and is not cut.
        let copying = || old.publishing.lock().unwrap_or_else(|e| e.into_inner());
        let _publishing = (flags & libc::O_TRUNC == 0).then(copying);
        let (published, base, attributes) = {
            let state = old.state();
            (state.published.clone(), state.replaces.clone(), state.attributes.clone())
        };
        let attributes = FileAttributes { mtime: None, atime: None, ctime: None, ..attributes };
        let base = published.clone().or(base);
        let staged = self.prepare_staged(target, attributes, base)?;
        let shown = old.state().shown.unwrap_or(old.ino());
        staged.state().shown = Some(shown);
        if flags & libc::O_TRUNC != 0 {
            self.staging.show(&staged, Some(caller.pid));
            return Ok(());
        }
        copy_file(&old.file().file, &staged.file().file, old.stamp()?.size)?;
        staged.state().published = published;
        staged.mark_clean(staged.stamp()?)?;
        self.staging.show_instead(&staged, there.as_ref());
        Ok(())
    }

    /// Writes to a file that the kernel does not write by itself.
    ///
    /// # Errors
    /// `Full` if the staging area has no room.
    pub fn write(&self, ino: u64, _fh: u64, offset: u64, data: &[u8]) -> Result<u32> {
        match &self.inode(ino)?.node {
            Node::Staged(staged) => staged.write(offset, data),
            _ => Err(Error::new(Kind::Invalid, "not open for writing")),
        }
    }

    /// `by_path` unless a handle of a writer is given.
    pub(super) fn setattr_staged(
        &self,
        staged: &Arc<Staged>,
        change: SetAttr,
        by_path: bool,
        caller: Caller,
    ) -> Result<()> {
        if let Some(size) = change.size {
            if by_path && staged.state().is_closed() {
                // What is left of a close takes an unfinished file for one that nobody has asked to keep.
                staged.await_closes();
            }
            let (target, idle) = {
                let state = staged.state();
                (state.target.clone(), state.writers.is_empty() || (by_path && state.is_closed()))
            };
            let before = staged.stamp()?.size;
            let was_clean = before < size && idle && !staged.is_dirty()?;
            if before != size && !staged.truncate(size)? {
                // Bytes that readers may have mapped never change: the kernel looks up the copy and cuts that.
                self.replace_staged(staged, target, libc::O_WRONLY, caller)?;
                return Err(Error::stale("looked up again to be cut"));
            }
            staged.state().has_come(caller);
            if idle {
                // No close will follow that could publish it.
                let published = self.publish_changed(staged, Unfinished::Publish);
                if published.is_err() && was_clean && staged.truncate(before)? {
                    // It is not longer than before, then.
                    staged.mark_clean(staged.stamp()?)?;
                    staged.state().failed = None;
                }
                published?;
            }
        }
        let has_attributes = change.mode.is_some()
            || change.uid.is_some()
            || change.gid.is_some()
            || change.mtime.is_some()
            || change.atime.is_some();
        if has_attributes {
            let mut attributes = staged.attributes();
            apply(&mut attributes, change);
            self.set_staged_attributes(staged, attributes)?;
        }
        Ok(())
    }

    /// Changes what is kept with a staged file; stored at once if it is published and nobody writes, else when it is
    /// published next.
    pub(super) fn set_staged_attributes(&self, staged: &Arc<Staged>, attributes: FileAttributes) -> Result<()> {
        let mut state = staged.state();
        state.attributes = attributes;
        state.attributes_changed = true;
        // The last step of a close may still be on its way. A removed file has nothing left to store.
        let settled = state.is_closed() && state.published.is_some() && !state.detached;
        drop(state);
        if settled {
            return self.publish_attributes(staged);
        }
        super::adopt::note_staged(staged);
        Ok(())
    }

    /// `truncate(2)` of a published view: a copy is made, which the kernel then looks up and cuts.
    pub(super) fn truncate_view(
        &self,
        view: &ViewNode,
        inode: &Arc<Inode>,
        change: SetAttr,
        caller: Caller,
    ) -> Result<()> {
        let Some(size) = change.size else { return Ok(()) };
        if size == self.attributes(inode)?.0.size {
            return Ok(());
        }
        let target = Target::new(&view.directory, &view.component);
        self.stage_view(&target, view, 0, caller)?;
        Err(Error::stale("looked up again to be cut"))
    }

    /// Allocates or punches.
    ///
    /// # Errors
    /// `Unsupported` for what tmpfs does not do; `Full`.
    pub fn fallocate(&self, ino: u64, _fh: u64, offset: u64, len: u64, mode: i32) -> Result<()> {
        let inode = self.inode(ino)?;
        let Node::Staged(staged) = &inode.node else {
            return Err(Error::new(Kind::Invalid, "not open for writing"));
        };
        let range = i64::try_from(offset).ok().zip(i64::try_from(len).ok());
        let (offset, len) = range.ok_or_else(|| Error::new(Kind::TooLarge, "beyond the largest file"))?;
        staged.state().clean = None;
        // SAFETY: a plain system call on a descriptor that `staged` keeps open.
        let result = unsafe { libc::fallocate(staged.file().file.as_raw_fd(), mode, offset, len) };
        if result == 0 { Ok(()) } else { Err(super::staging::full(std::io::Error::last_os_error())) }
    }

    /// `SEEK_DATA` and `SEEK_HOLE`: files here have no holes but the one at the end.
    ///
    /// # Errors
    /// `Os(ENXIO)` past the end; `Invalid` for other values.
    pub fn lseek(&self, ino: u64, _fh: u64, offset: i64, whence: i32) -> Result<u64> {
        let size = self.attributes(&self.inode(ino)?)?.0.size;
        let offset = u64::try_from(offset).map_err(|_| Error::new(Kind::Os(libc::ENXIO), "before the file"))?;
        if offset >= size {
            return Err(Error::new(Kind::Os(libc::ENXIO), "past the end"));
        }
        match whence {
            libc::SEEK_DATA => Ok(offset),
            libc::SEEK_HOLE => Ok(size),
            _ => Err(Error::new(Kind::Invalid, "not a seek that is asked of a filesystem")),
        }
    }

    /// A time for attributes.
    pub(super) fn now() -> i64 {
        to_nanos(SystemTime::now())
    }
}

/// Copies a memory file.
fn copy_file(from: &std::fs::File, to: &std::fs::File, size: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let mut chunk = vec![0; (4 << 20).min(size.max(1)) as usize];
    let mut at = 0;
    while at < size {
        let n = chunk.len().min((size - at) as usize);
        crate::cgroup::room_for(n as u64)?;
        from.read_exact_at(&mut chunk[..n], at)?;
        to.write_all_at(&chunk[..n], at).map_err(super::staging::full)?;
        at += n as u64;
    }
    Ok(())
}
