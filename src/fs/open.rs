//! Opening and reading published views.

use std::ops::Range;
use std::sync::Arc;

use super::buffer::Buffer;
use super::copies::{is_faithful, is_lost};
use super::inode::{Inode, Mode, Node, Use, ViewNode};
use super::objects::Loaded;
use super::opens::{Open, Shown};
use super::resolve::Target;
use super::{Caller, FileSystem, Handle, Opened, Serve, ServePolicy, Serving};
use crate::error::{Error, Kind, Result};
use crate::image::{Image, View};
use crate::vineyard::{Arrived, ObjectId};

/// Files below this size are not worth a memory file: one request and a page serve them.
const SMALL: u64 = 64 << 10;
/// A table of more columns is likely to be read in part.
const WIDE_COLUMNS: usize = 32;
/// A wide table below this size is assembled all the same: that takes less than a few requests.
const WIDE_SIZE: u64 = 32 << 20;

/// How far a read may be from the end of the last to continue it.
const RUN_GAP: u64 = 4 << 20;
/// How much of remote data is brought ahead of a sequential reader.
const AHEAD: u64 = 128 << 20;
/// How often that is done, in bytes read.
const AHEAD_STEP: u64 = 8 << 20;

/// Remote files from this size on are read directly at first: for smaller ones it gains nothing.
const DIRECT_SIZE: u64 = 32 << 20;

/// True for what is probably read once, whole, and by large reads before it is assembled: a table or an array of another
/// instance that nobody has read yet. The kernel then copies what arrives straight to the reader: caching it too costs
/// more than bringing it. Who reads in small pieces pays with a request for each; who maps the file is not affected.
fn read_once(view: View, loaded: &Loaded, image: &Image, bytes_read: u64) -> bool {
    let columns = loaded.dataset.table().map_or(0, |table| table.schema.fields().len());
    let large_reads = matches!(view, View::Arrow | View::Feather | View::Npy);
    large_reads
        && loaded.is_remote()
        && columns <= WIDE_COLUMNS
        && image.size() >= DIRECT_SIZE
        && bytes_read < image.size() / 16
}

pub(super) fn wants_write(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0
}

/// Bytes of a file.
#[derive(Debug)]
pub enum FileBytes {
    /// A copy.
    Copied(Buffer),
    /// The memory in which they came from another instance.
    Arrived(Arrived),
}

impl std::ops::Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            FileBytes::Copied(bytes) => bytes,
            FileBytes::Arrived(arrived) => arrived.as_ref(),
        }
    }
}

impl FileSystem {
    /// Opens a file.
    ///
    /// # Errors
    /// `Stale` if the name leads to another object by now: the kernel looks the name up again and opens what it finds.
    /// `ReadOnly` for a write to a read-only mount, `IsDirectory`, and why the object cannot be shown.
    pub fn open(&self, ino: u64, flags: i32, caller: Caller) -> Result<Opened> {
        self.follow_store()?;
        let second = self.retries.is_second(flags, caller);
        let opened = self.open_found(ino, flags, caller);
        self.note_try(ino, flags, caller, second, &opened);
        opened
    }

    fn open_found(&self, ino: u64, flags: i32, caller: Caller) -> Result<Opened> {
        let is_known = self.inodes.get(ino).is_some() && self.retries.comes_by_known_path(ino, caller);
        let inode = self.inode(ino)?;
        if wants_write(flags) {
            self.writable()?;
        }
        match &inode.node {
            Node::Directory { .. } => Err(Error::new(Kind::IsDirectory, "is a directory")),
            // The path by which a former server gave the number out may be another than that at which the object is now.
            Node::View(_) if !is_known => Err(Error::stale("a former server's inode: its path is looked up again")),
            // A file of its own may be made for the writer: not where the directory is about to move from.
            _ if wants_write(flags) => {
                let (_turn, inode) = self.enter_directory_of(ino)?;
                match &inode.node {
                    Node::Staged(staged) => self.open_staged(&inode, staged, flags, caller),
                    Node::View(view) => Err(self.open_view_for_writing(view, flags, caller)),
                    Node::Directory { .. } => Err(Error::stale("the path leads elsewhere now")),
                }
            }
            Node::Staged(staged) => self.open_staged(&inode, staged, flags, caller),
            Node::View(view) => {
                self.take_back(ino, caller);
                // What is being opened is not deleted meanwhile, nor while the open file reads its blobs.
                *self.lazy_opens().entry(view.object).or_default() += 1;
                let opened = self.open_view(&inode, view, caller);
                if !matches!(opened, Ok((_, true))) {
                    self.end_lazy_open(view.object);
                }
                opened.map(|(opened, _)| opened)
            }
        }
    }

    /// Also says whether the open file reads the blobs of the object.
    fn open_view(&self, inode: &Arc<Inode>, view: &ViewNode, caller: Caller) -> Result<(Opened, bool)> {
        let path = super::name::join(&view.directory, &view.component);
        if !self.staging.holds(&path, caller.pid, view.object) && self.object_of(&view.name)? != Some(view.object) {
            return Err(Error::stale(format!("{:?} has another value now", view.name)));
        }
        if let Some(reason) = &view.summary.broken {
            tracing::warn!(name = ?view.name, object = %view.object, "cannot be opened: {reason}");
            return Err(Error::malformed(reason.to_string()));
        }
        let (mode, bytes_read) = self.join_or_choose_mode(inode, view)?;
        if let Some(former) = self.cache.opened(&view.name, view.object) {
            // What is known of it would be kept for ever.
            self.objects.forget(former);
        }
        let serve = match &mode {
            Mode::Assembled(file) => file.file().backing.map_or(Serve::Cached, Serve::Passthrough),
            Mode::Lazy { loaded, image } if read_once(view.view, loaded, image, bytes_read) => Serve::Direct,
            Mode::Lazy { .. } | Mode::Copied(_) => Serve::Cached,
        };
        let (file, reads) = match &mode {
            Mode::Assembled(file) => (Some(file.file().key), None),
            // The next server has no copy.
            Mode::Lazy { .. } | Mode::Copied(_) => (None, Some(view.object)),
        };
        let fh = self.add_handle(Handle::View { lazy: reads });
        let open = Open { handle: fh, request: caller.request, reads: reads.map(|object| object.0), file };
        self.opens.opened(inode.ino, open, || Shown::of(view, mode.size()));
        Ok((Opened { fh, serve, no_flush: true }, reads.is_some()))
    }

    /// Counts an open, and says how it is served and how much of the inode was read. The first open chooses that, and
    /// whoever comes meanwhile waits for it: one inode has one mode.
    fn join_or_choose_mode(&self, inode: &Arc<Inode>, view: &ViewNode) -> Result<(Mode, u64)> {
        let join = |state: &mut Use| {
            state.opens += u64::from(state.mode.is_some());
            (state.mode.clone(), state.bytes_read)
        };
        if let (Some(mode), bytes_read) = self.inodes.change(inode, join) {
            return Ok((mode, bytes_read));
        }
        let _opening = inode.opening.lock().unwrap_or_else(|e| e.into_inner());
        let bytes_read = match self.inodes.change(inode, join) {
            (Some(mode), bytes_read) => return Ok((mode, bytes_read)),
            (None, bytes_read) => bytes_read,
        };
        // This takes its time: nothing else that others may wait for is held.
        let chosen = match self.read_by_requests(inode) {
            true => self.lazy_mode(inode.ino, view)?,
            false => self.choose_mode(view, bytes_read)?,
        };
        Ok(self.inodes.change(inode, |state| {
            state.opens += 1;
            (state.mode.get_or_insert(chosen).clone(), state.bytes_read)
        }))
    }

    /// Whether the inode is open already, and read by requests, because a former server had it so.
    fn read_by_requests(&self, inode: &Arc<Inode>) -> bool {
        self.inodes.change(inode, |state| state.by_requests && state.opens > 0)
    }

    /// How to go on with an inode whose reads a former server has answered: what it answered them from stays as long as
    /// the handles that it gave out.
    fn lazy_mode(&self, ino: u64, view: &ViewNode) -> Result<Mode> {
        let object = self.opens.reads(ino).unwrap_or(view.object);
        let (loaded, image) = self.nearest(object, view.view, None)?;
        Ok(Mode::Lazy { loaded, image })
    }

    fn choose_mode(&self, view: &ViewNode, bytes_read: u64) -> Result<Mode> {
        // What was assembled, or written through this mount, needs no look at the object.
        if self.host.serving() == Serving::Passthrough
            && self.options.serve != ServePolicy::Lazy
            && let Some(assembled) = self.cache.get(view.object, view.view)
        {
            return Ok(Mode::Assembled(assembled));
        }
        let (loaded, image) = self.nearest(view.object, view.view, None).inspect_err(|error| {
            tracing::warn!(name = ?view.name, object = %view.object, "cannot be opened: {error}");
        })?;
        if loaded.is_remote() {
            self.wish_copy(view.object);
        }
        self.objects.learn_size(view.object, view.view, image.size());
        if image.size() <= SMALL && !loaded.is_remote() {
            // A copy outlives the object: whoever maps the file may fault a page in at any time.
            let mut bytes = vec![0; image.size() as usize];
            image.read(&*self.store, 0, &mut bytes)?;
            self.store.verify(&image.blobs(0..image.size()))?;
            return Ok(Mode::Copied(bytes.into()));
        }
        if self.assembled_pays(&loaded, &image, bytes_read) {
            loaded.admit(&image.blobs(0..image.size()), &*self.store)?;
            match self.cache.assemble(view.object, view.view, &image, &*self.store) {
                Ok(assembled) => return Ok(Mode::Assembled(assembled)),
                // No room for it: it can still be read from the blobs.
                Err(error) if matches!(error.kind(), Kind::Full | Kind::Os(_)) => {
                    tracing::info!(name = ?view.name, "served without a memory file: {error}");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Mode::Lazy { loaded, image })
    }

    /// The policy: whether a file is assembled at its first open or served from the blobs.
    ///
    /// Assembling costs about 0.2 s per GiB once, and every read after it costs half of what a tmpfs file costs. A
    /// small file, or one of which a reader probably wants a part, is better served from the blobs; if most of it was
    /// read that way, its next first open assembles it.
    fn assembled_pays(&self, loaded: &Loaded, image: &Image, bytes_read: u64) -> bool {
        let size = image.size();
        // What was brought here is as good as local.
        let is_here = |key| matches!(self.store.blob(key), Ok(Some(_)));
        let local = || !loaded.is_remote() || image.blobs(0..size).into_iter().all(is_here);
        if self.host.serving() != Serving::Passthrough || size == 0 || size > self.options.cache_size {
            return false;
        }
        match self.options.serve {
            ServePolicy::Lazy => false,
            ServePolicy::Assembled => true,
            ServePolicy::Auto => {
                let columns = loaded.dataset.table().map_or(0, |table| table.schema.fields().len());
                let wide = columns > WIDE_COLUMNS && size > WIDE_SIZE;
                let mostly_read = bytes_read >= size / 2;
                size > SMALL && (!wide || mostly_read) && local()
            }
        }
    }

    /// Reads bytes `offset..offset + size`, cut at the end of the file. Never less: a short answer inside the file
    /// would be silent corruption.
    ///
    /// # Errors
    /// `Stale` if the object was deleted by someone else: its memory may hold other bytes by now.
    pub fn read(&self, ino: u64, _fh: u64, offset: u64, size: u32) -> Result<FileBytes> {
        let inode = self.inode(ino)?;
        let view = match &inode.node {
            Node::Directory { .. } => return Err(Error::new(Kind::IsDirectory, "is a directory")),
            Node::Staged(staged) => return staged.read(offset, size).map(FileBytes::Copied),
            Node::View(view) => view,
        };
        let mode = inode.state().mode.clone();
        let mode = match mode {
            Some(mode) => mode,
            // Opened before the server was replaced: reads come as requests, so it was lazy.
            None => {
                let mode = self.lazy_mode(ino, view)?;
                inode.state().mode.get_or_insert(mode).clone()
            }
        };
        let end = offset.saturating_add(u64::from(size)).min(mode.size());
        if offset >= end {
            return Ok(FileBytes::Copied(Buffer::new(0)));
        }
        let out = match &mode {
            Mode::Lazy { image, loaded } => match self.read_lazily(&inode, loaded, image, offset..end) {
                Err(error) if is_lost(&error) => {
                    let (loaded, image) = self.other_copy(&inode, view, loaded, image).ok_or(error)?;
                    self.read_lazily(&inode, &loaded, &image, offset..end)?
                }
                other => other?,
            },
            Mode::Copied(bytes) => {
                let mut out = Buffer::new((end - offset) as usize);
                out.copy_from_slice(&bytes[offset as usize..end as usize]);
                FileBytes::Copied(out)
            }
            Mode::Assembled(assembled) => {
                use std::os::unix::fs::FileExt;
                let mut out = Buffer::new((end - offset) as usize);
                assembled.file().file.read_exact_at(&mut out, offset)?;
                FileBytes::Copied(out)
            }
        };
        Ok(out)
    }

    fn read_lazily(&self, inode: &Inode, loaded: &Loaded, image: &Image, range: Range<u64>) -> Result<FileBytes> {
        let blobs = image.blobs(range.clone());
        self.store.prepare(&blobs)?;
        if loaded.is_remote() {
            tracing::trace!(object = %loaded.meta.id(), ?range, "read of remote data");
            loaded.admit(&blobs, &*self.store)?;
            self.store.want(&image.parts(range.clone()), false)?;
            self.bring_ahead(inode, image, range.clone())?;
        }
        let arrived = match image.single(range.clone()).filter(|_| loaded.is_remote()) {
            Some((key, part)) => self.store.arrived(key, part)?,
            None => None,
        };
        let out = match arrived {
            Some(arrived) => FileBytes::Arrived(arrived),
            None => {
                let mut out = Buffer::new((range.end - range.start) as usize);
                image.read(&*self.store, range.start, &mut out)?;
                FileBytes::Copied(out)
            }
        };
        // The copy is whole; now it must still be this object's memory.
        self.store.verify(&blobs)?;
        inode.state().bytes_read += range.end - range.start;
        Ok(out)
    }

    /// For a file whose data was lost while it was open: the same bytes elsewhere, from where it is read from now on. They
    /// are in another copy, or the dataset has moved and its name leads to where they are.
    fn other_copy(
        &self,
        inode: &Inode,
        view: &ViewNode,
        loaded: &Loaded,
        image: &Image,
    ) -> Option<(Arc<Loaded>, Arc<Image>)> {
        let equal = |object: ObjectId| {
            let found = self.nearest(object, view.view, Some(loaded.meta.id())).ok()?;
            Some(found).filter(|(other, bytes)| is_faithful(&loaded.meta, &other.meta) && bytes.size() == image.size())
        };
        let found = match equal(view.object) {
            Some(found) => found,
            None => {
                let moved = self.hold_moved(view)?;
                let found = equal(moved);
                if found.is_some() {
                    self.read_from(inode.ino, moved);
                }
                self.end_lazy_open(moved);
                found?
            }
        };
        tracing::info!(name = ?view.name, object = %view.object, copy = %found.0.meta.id(), "goes on with a copy");
        let mut state = inode.state();
        if matches!(state.mode, Some(Mode::Lazy { .. })) {
            state.mode = Some(Mode::Lazy { loaded: found.0.clone(), image: found.1.clone() });
        }
        Some(found)
    }

    /// The object that the name of a view leads to instead, counted as one that is open: it is not deleted meanwhile.
    fn hold_moved(&self, view: &ViewNode) -> Option<ObjectId> {
        let _naming = self.naming();
        let now = self.object_of(&view.name).ok()?.filter(|now| *now != view.object)?;
        *self.lazy_opens().entry(now).or_default() += 1;
        Some(now)
    }

    /// The open handles of an inode, all that read by requests, read the blobs of another object from now on: it is that
    /// one which stays as long as they do.
    fn read_from(&self, ino: u64, object: ObjectId) {
        for handle in self.opens.read_from(ino, object) {
            *self.lazy_opens().entry(object).or_default() += 1;
            let former = match self.handles().get_mut(&handle) {
                Some(Handle::View { lazy }) => lazy.replace(object),
                // Closed by now.
                _ => Some(object),
            };
            if let Some(former) = former {
                self.end_lazy_open(former);
            }
        }
    }

    /// Begins to bring what a sequential reader of remote data will ask for soon. Whoever reads a column or two is not
    /// taken for one: the next column would move for nothing.
    fn bring_ahead(&self, inode: &Inode, image: &Image, read: Range<u64>) -> Result<()> {
        let run = {
            let mut state = inode.state();
            let run = match state.run.clone() {
                // The kernel reads ahead with several requests, in any order.
                Some(run) if read.start.abs_diff(run.end) <= RUN_GAP => run.start..run.end.max(read.end),
                _ => read.clone(),
            };
            let former = state.run.replace(run.clone()).map_or(0, |former| former.end);
            if former / AHEAD_STEP == run.end / AHEAD_STEP {
                return Ok(());
            }
            run
        };
        let large = image.parts(run.clone()).into_iter().filter(|(_, part)| part.end - part.start >= AHEAD_STEP / 8);
        let from_start = run.start < RUN_GAP;
        // Whoever wants columns looks at the end of the file first.
        let copies = run.start == 0 && run.end >= RUN_GAP;
        if !copies && large.count() < if from_start { 2 } else { 3 } {
            return Ok(());
        }
        let next = image.parts(run.end..run.end.saturating_add(AHEAD).min(image.size()));
        let next: Vec<_> = next.into_iter().map(|(key, _)| (key, 0..u64::MAX)).collect();
        // Nobody waits for it: whoever does will get the reason.
        self.store.want(&next, true).ok();
        Ok(())
    }

    /// Closes a file. Comes once for each successful open, and also when the kernel refused what was granted.
    pub fn release(&self, ino: u64, fh: u64) {
        let handle = self.handles().remove(&fh);
        self.opens.closed(ino, fh);
        if let Some(inode) = self.inodes.get(ino) {
            self.end_open(&inode, fh, handle.clone());
        }
        if let Some(Handle::View { lazy: Some(object) }) = handle {
            self.end_lazy_open(object);
        }
    }

    fn end_open(&self, inode: &Arc<Inode>, fh: u64, handle: Option<Handle>) {
        match &inode.node {
            Node::Staged(staged) => self.release_staged(inode, staged, fh, handle),
            Node::View(_) => {
                // Opens of a former server that did not say so were not counted.
                let counted = u64::from(handle.is_some());
                let forgotten = self.inodes.change(inode, |state| {
                    state.opens = state.opens.saturating_sub(counted);
                    if state.opens == 0 {
                        (state.mode, state.by_requests) = (None, false);
                    }
                    state.opens == 0 && state.lookups == 0
                });
                if forgotten {
                    self.inodes.forget(inode.ino, 0);
                }
            }
            Node::Directory { .. } => {}
        }
    }

    /// Lets an inode show another view; counts and handles stay.
    pub(super) fn show_view(&self, ino: u64, view: ViewNode) {
        self.opens.shows(ino, &view);
        self.inodes.replace(ino, Node::View(view));
    }

    /// A write open of a published view: makes or finds the file that will replace it, and answers `Stale`, so that
    /// the kernel looks the name up again and opens that file. Readers keep the inode that they have.
    fn open_view_for_writing(&self, view: &ViewNode, flags: i32, caller: Caller) -> Error {
        let target = Target::new(&view.directory, &view.component);
        match self.stage_view(&target, view, flags, caller) {
            Ok(_) => Error::stale(format!("{:?} is being replaced", view.name)),
            Err(error) => error,
        }
    }
}
