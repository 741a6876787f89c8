//! Publishing: when a written file becomes a dataset, and what `close` and `fsync` answer.
//!
//! A file under a view's name is published when it is complete; an empty or unfinished one replaces nothing. Any other
//! file is published whenever it changed. The old object is deleted after the name points to the new one.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::inode::{Inode, Node, ViewNode};
use super::naming::is_clear;
use super::resolve::{Target, Vacancy};
use super::staging::Staged;
use super::{Caller, FileSystem, Handle};
use crate::dataset::attributes::ATTRIBUTES_KEY;
use crate::dataset::publish::{self, Completeness, Limits, Staged as StagedBytes};
use crate::dataset::recipe::Written;
use crate::dataset::{FileAttributes, attributes::to_nanos};
use crate::error::{Context, Error, Kind, Result};
use crate::image::View;
use crate::vineyard::ObjectId;
use crate::vineyard::store::{NameQuery, NamedObject};

/// How often a publish starts over at least because another process went on writing.
const ATTEMPTS: usize = 3;
/// For how long it does so, where each attempt is short.
const PATIENCE: Duration = Duration::from_secs(1);

/// What becomes of a file that begins like its format and does not end like it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfinished {
    /// Its writer says that this is it: it is stored as a plain file.
    Publish,
    /// Its writer may have died, or goes on: it replaces nothing.
    Keep,
    /// As [`Unfinished::Keep`]. There was nothing before it, so that even an empty file is more.
    KeepUnlessEmpty,
}

impl FileSystem {
    /// One descriptor of a writer was closed: publishes what changed.
    ///
    /// # Errors
    /// Why it could not be published; the bytes stay readable and can be published again by `fsync`.
    pub fn flush(&self, ino: u64, fh: u64, caller: Caller) -> Result<()> {
        let Some(staged) = self.written_by(ino, fh)? else { return Ok(()) };
        // Who closes a file means what is in it; of a process that ends, nobody knows whether it was done. A child that
        // has inherited a descriptor closes it to run a program, and means nothing by it.
        let means_nothing = is_exiting(caller.pid) || self.opener_goes_on(fh, caller.pid);
        let unfinished = if means_nothing { Unfinished::Keep } else { Unfinished::Publish };
        let published = self.publish_changed(&staged, unfinished);
        staged.state().closed_by = Some(caller.pid);
        published
    }

    /// Publishes what changed.
    ///
    /// # Errors
    /// As [`FileSystem::flush`].
    pub fn fsync(&self, ino: u64, fh: u64) -> Result<()> {
        match self.written_by(ino, fh)? {
            Some(staged) => self.publish_changed(&staged, Unfinished::Publish),
            None => Ok(()),
        }
    }

    /// The file that a handle may write, or that one of a former server may have written.
    fn written_by(&self, ino: u64, fh: u64) -> Result<Option<Arc<Staged>>> {
        let only_reads = matches!(self.handles().get(&fh), Some(Handle::Staged { writer: false, .. }));
        match &self.inode(ino)?.node {
            Node::Staged(staged) if !only_reads => Ok(Some(staged.clone())),
            _ => Ok(None),
        }
    }

    /// Whether a descriptor of this handle was closed by another process than the one that opened the file, which has
    /// not closed its own.
    fn opener_goes_on(&self, fh: u64, closer: u32) -> bool {
        let opener = match self.handles().get_mut(&fh) {
            Some(Handle::Staged { pid, closed, .. }) if *pid == closer => {
                *closed = true;
                return false;
            }
            // Processes of other namespaces have no number here.
            Some(Handle::Staged { pid, closed: false, .. }) if *pid != 0 && closer != 0 => *pid,
            _ => return false,
        };
        // It has ended, and closed the file by that, if there is none.
        let Some(process) = running(opener) else { return false };
        if running(closer) != Some(process) {
            return true;
        }
        if let Some(Handle::Staged { closed, .. }) = self.handles().get_mut(&fh) {
            *closed = true;
        }
        false
    }

    /// Publishes if something changed since the last time.
    pub(super) fn publish_changed(&self, staged: &Arc<Staged>, unfinished: Unfinished) -> Result<()> {
        let target = staged.state().target.clone();
        self.finish_unfinished(&[&target.folder, target.dataset()])?;
        let _publishing = staged.publishing.lock().unwrap_or_else(|e| e.into_inner());
        if staged.state().detached {
            return Ok(());
        }
        if !staged.is_dirty()? {
            return if staged.state().attributes_changed { self.publish_attributes_locked(staged) } else { Ok(()) };
        }
        let repointing = staged.repointing();
        let result = self.publish_now(staged, unfinished);
        drop(repointing);
        staged.state().failed = result.as_ref().err().map(|error| error.to_string());
        if let Err(error) = &result {
            let path = staged.state().target.path();
            self.warn(format!("{path:?} could not be published: {error}"));
        }
        result
    }

    fn publish_now(&self, staged: &Arc<Staged>, unfinished: Unfinished) -> Result<()> {
        let start = Instant::now();
        let mut attempts = 0;
        while attempts < ATTEMPTS || start.elapsed() < PATIENCE {
            attempts += 1;
            self.fill_holes(&staged.file().file)?;
            let before = staged.stamp()?;
            let bytes = MappedFile::map(&staged.file().file, before.size)?;
            let target = staged.state().target.clone();
            let format = target.view.as_ref().map_or(Written::Plain, |(_, view)| format_of(*view));
            let Some(format) = verdict(bytes.as_slice(), format, unfinished) else { return Ok(()) };
            let attributes = {
                let mut state = staged.state();
                state.attributes_changed = false;
                FileAttributes {
                    mtime: state.attributes.mtime.or(Some(before.mtime)),
                    ctime: Some(before.ctime.max(state.attributes.ctime.unwrap_or(before.ctime))),
                    ..state.attributes.clone()
                }
            };
            let input = StagedBytes { bytes: bytes.as_slice(), file: &staged.file().file };
            // Somebody may write while it is copied: what is in the store may be a mixture then.
            let unchanged = || Ok(staged.stamp()? == before);
            let Some((name, object)) = self.publish_bytes(&target, format, &attributes, &input, &unchanged)? else {
                continue;
            };
            let mut state = staged.state();
            state.written_view = match &target.view {
                Some((dataset, view)) if *dataset == name => Some(*view),
                None => Some(View::Raw),
                Some(_) => None,
            };
            state.published = Some((name, object));
            state.replaces = None;
            drop(state);
            return staged.mark_clean(before);
        }
        Err(Error::new(Kind::Busy, "another process keeps writing to the file while it is published"))
    }

    /// Gives the holes of a file their pages: reading one through a mapping takes a page, and where there is none to be
    /// had, SIGBUS ends this process.
    fn fill_holes(&self, file: &File) -> Result<()> {
        use std::os::unix::fs::MetadataExt;
        let meta = file.metadata().context(|| "stat of a staging file".into())?;
        let missing = meta.size().saturating_sub(meta.blocks().saturating_mul(512));
        if missing == 0 {
            return Ok(());
        }
        let most = self.recent_status()?.memory_limit;
        if meta.size() > most {
            let what = format!("a file of {} bytes does not fit the store, which has {most}", meta.size());
            return Err(Error::new(Kind::Full, what));
        }
        crate::cgroup::room_for(missing)?;
        let size = i64::try_from(meta.size()).map_err(|_| Error::new(Kind::TooLarge, "a file beyond 2^63 bytes"))?;
        let filled = nix::fcntl::fallocate(file, nix::fcntl::FallocateFlags::empty(), 0, size);
        filled.map_err(|errno| super::staging::full(errno.into()))
    }

    /// Makes a dataset of a file's bytes at a path and points its name at it. Which name that is, the bytes decide: what
    /// is not the format of its extension is stored under the full file name. `None`, and nothing is left behind, if
    /// `settled` denies after the copy that the bytes may be published.
    pub(super) fn publish_bytes(
        &self,
        target: &Target,
        format: Written,
        attributes: &FileAttributes,
        input: &StagedBytes<'_>,
        settled: &dyn Fn() -> Result<bool>,
    ) -> Result<Option<(String, ObjectId)>> {
        let _unit = self.unit();
        let plan = publish::plan(input, format, attributes, Limits::of(self.recent_status()?))?;
        let published = self.realize(&plan, input)?;
        for warning in &published.warnings {
            self.warn(format!("{:?}: {warning}", target.path()));
        }
        let native = published.outcome != publish::Outcome::File;
        self.objects.saved(published.id, published.outcome);
        let named = match settled() {
            Ok(true) => self.point_path(target, native, published.id),
            Ok(false) => {
                self.delete_object(published.id);
                return Ok(None);
            }
            Err(error) => Err(error),
        };
        match named {
            Ok(name) => Ok(Some((name, published.id))),
            Err(error) => {
                self.drop_new(published.id, &error);
                Err(error)
            }
        }
    }

    /// A new object did not get its name because of an error: it goes, if that is sure.
    pub(super) fn drop_new(&self, object: ObjectId, error: &Error) {
        match is_clear(error) {
            true => self.delete_object(object),
            false => self.leave_open([object]),
        }
    }

    /// Lets a path lead to a new object, and removes what it led to before. Returns the name that was used.
    ///
    /// A path replaces what it showed and nothing else: where the dataset of its stem has no view of this format, as a
    /// table beside which a `.pkl` is saved, the object gets the whole file name as its own. `Exists` if it may not replace
    /// anything, and would.
    pub(super) fn point_path(&self, target: &Target, native: bool, object: ObjectId) -> Result<String> {
        let _unit = self.unit();
        let _naming = self.naming();
        self.point_path_locked(target, native, object)
    }

    /// As [`FileSystem::point_path`], for what `from` leads to. The lock on names is held until the caller has dropped that,
    /// so that one of those who rename a file at the same time does, whichever mount of this vineyardd they use.
    ///
    /// # Errors
    /// `Stale`, and nothing is done, if it leads elsewhere by now.
    pub(super) fn point_path_from(&self, from: &NamedObject, target: &Target, native: bool) -> Result<String> {
        self.check_leads(from)?;
        let _unit = self.unit();
        self.point_path_locked(target, native, from.1)
    }

    fn check_leads(&self, (name, object): &NamedObject) -> Result<()> {
        match self.object_of(name)? == Some(*object) {
            true => Ok(()),
            false => Err(Error::stale(format!("{name:?} was renamed, replaced or removed meanwhile"))),
        }
    }

    fn point_path_locked(&self, target: &Target, native: bool, object: ObjectId) -> Result<String> {
        self.finish_changes_locked(Some(&[&target.plain, target.dataset()]))?;
        let mut replaced = vec![target.plain.as_str()];
        let mut name = target.plain.clone();
        let mut there = None;
        if let Some((dataset, view)) = &target.view {
            let old = self.pointees(&[&target.plain, dataset])?;
            // A dataset with the whole file name as its own is another one than that of the stem.
            let has_own = old.iter().any(|(name, _)| *name == target.plain);
            let other_kind = has_own && old.iter().any(|(name, _)| name == dataset);
            let other_kind = other_kind
                || match old.iter().find(|(name, _)| name == dataset).map(|(_, object)| *object) {
                    Some(there) if self.objects.is_saved_as(there, *view) => false,
                    Some(there) => {
                        let summary = self.objects.summary(&*self.store, there)?;
                        summary.is_some_and(|summary| summary.broken.is_none() && summary.view(*view).is_none())
                    }
                    None => false,
                };
            if !other_kind {
                replaced.push(dataset);
                if native {
                    name = dataset.clone();
                }
            }
            there = Some(old);
        }
        self.point_locked(&name, object, &replaced, there, &target.vacancy)?;
        Ok(name)
    }

    /// Points `name` at a new object and removes what the other names of the same path held: the file has one value.
    #[cfg(test)]
    pub(super) fn point_name(&self, name: &str, object: ObjectId, path_names: &[&str]) -> Result<()> {
        let _unit = self.unit();
        let _naming = self.naming();
        self.finish_changes_locked(Some(path_names))?;
        self.point_locked(name, object, path_names, None, &Vacancy::default())
    }

    /// Gives the object that `from` leads to another name, and removes what the other names of the same path held.
    ///
    /// # Errors
    /// `Exists` if it may not replace anything, and would; as [`FileSystem::point_path_from`].
    pub(super) fn change_name_of(
        &self,
        from: &NamedObject,
        name: &str,
        path_names: &[&str],
        vacancy: &Vacancy,
    ) -> Result<()> {
        let _unit = self.unit();
        let _naming = self.naming();
        self.check_leads(from)?;
        self.finish_changes_locked(Some(path_names))?;
        self.point_locked(name, from.1, path_names, None, vacancy)?;
        self.remove_version_locked(&from.0, from.1).map(drop)
    }

    /// `Exists` if one of these leads to another object than this, which exists.
    fn check_vacant(&self, there: &[NamedObject], object: ObjectId) -> Result<()> {
        for (name, other) in there.iter().filter(|(_, other)| *other != object) {
            if self.objects.summary(&*self.store, *other)?.is_some() {
                return Err(Error::new(Kind::Exists, format!("{name:?} exists already")));
            }
        }
        Ok(())
    }

    /// What names lead to, of those that lead anywhere.
    pub(super) fn pointees(&self, names: &[&str]) -> Result<Vec<NamedObject>> {
        let queries: Vec<NameQuery> = names.iter().map(|name| NameQuery::Exact((*name).to_owned())).collect();
        Ok(self.store.names(&queries)?.into_iter().flatten().collect())
    }

    /// As [`FileSystem::point_path`], with the lock on names held, for these names of a path. `there` is what at least these
    /// led to a moment ago.
    fn point_locked(
        &self,
        name: &str,
        object: ObjectId,
        path_names: &[&str],
        there: Option<Vec<NamedObject>>,
        vacancy: &Vacancy,
    ) -> Result<()> {
        let mut names: Vec<&str> = path_names.to_vec();
        names.push(name);
        names.sort_unstable();
        names.dedup();
        let saving = self.announce(name, object)?;
        let old = match there {
            // Saves on other nodes are seen once this one is announced, and not before.
            Some(there) if saving.is_none() => {
                Ok(there.into_iter().filter(|(name, _)| names.contains(&name.as_str())).collect())
            }
            _ => self.pointees(&names),
        };
        let put = old.and_then(|old| {
            if vacancy.is_demanded() {
                self.check_vacant(&old, object)?;
            }
            self.suspect(&old.iter().map(|(_, id)| *id).collect::<Vec<_>>());
            let change = self.begin_change(name, object, &old);
            match self.put_name(name, object) {
                Ok(()) => Ok((old, change)),
                Err(error) => {
                    if !is_clear(&error) {
                        self.leave_open(old.iter().map(|(_, id)| *id));
                    }
                    self.give_up_change(change, &error);
                    Err(error)
                }
            }
        });
        let (old, change) = match put {
            Ok(put) => put,
            Err(error) => {
                self.withdraw(saving);
                return Err(error);
            }
        };
        vacancy.end();
        self.settle_save(name, saving);
        // From here on the new value is in place; what is left to do must not make the save fail.
        self.end_change(change);
        if let Some((_, former)) = old.into_iter().find(|(same, id)| same == name && *id != object) {
            self.end_listed(name, former);
            self.delete_without(former, &[name]);
        }
        Ok(())
    }

    /// Stores changed attributes of a published file that nobody writes to.
    pub(super) fn publish_attributes(&self, staged: &Arc<Staged>) -> Result<()> {
        let _publishing = staged.publishing.lock().unwrap_or_else(|e| e.into_inner());
        self.publish_attributes_locked(staged)
    }

    fn publish_attributes_locked(&self, staged: &Arc<Staged>) -> Result<()> {
        let Some((name, object)) = staged.published() else { return Ok(()) };
        let attributes = {
            let mut state = staged.state();
            state.attributes_changed = false;
            state.attributes.clone()
        };
        let copy = self.with_attributes(&name, object, &attributes).inspect_err(|_| {
            // They are stored by the next close or fsync.
            staged.state().attributes_changed = true;
        })?;
        // It may be at no path, and was not found then. The times of the memory file did not move, so it is as clean as it
        // was.
        let mut state = staged.state();
        (state.published, state.image) = (Some((name, copy)), state.image.map(|(_, view)| (copy, view)));
        drop(state);
        super::adopt::note_staged(staged);
        Ok(())
    }

    /// Stores attributes of a published view; its inode stays.
    pub(super) fn store_attributes(
        &self,
        inode: &Arc<Inode>,
        view: &ViewNode,
        mut attributes: FileAttributes,
    ) -> Result<()> {
        self.finish_unfinished(&[&view.name])?;
        // The copy is a new object with a new creation time; the file's time of change is the old one.
        attributes.mtime = attributes.mtime.or(Some(to_nanos(view.summary.created)));
        let copy = self.with_attributes(&view.name, view.object, &attributes)?;
        let summary = self.objects.summary(&*self.store, copy)?;
        let summary = summary.ok_or_else(|| Error::stale(format!("{:?} was removed", view.name)))?;
        let path = super::name::join(&view.directory, &view.component);
        self.inodes.keep_number(&path, copy, view.view, inode.ino);
        self.show_view(inode.ino, ViewNode { object: copy, summary, ..view.clone() });
        if view.view != view.summary.listed {
            self.end_listed_of(&view.name, &view.summary);
        }
        Ok(())
    }

    /// Replaces an object by a copy of its metadata with these attributes; the data is shared. Files that are written here
    /// on top of that version, and are no other yet, are of the new one then.
    fn with_attributes(&self, name: &str, object: ObjectId, attributes: &FileAttributes) -> Result<ObjectId> {
        let _unit = self.unit();
        self.suspect(&[object]);
        let mut extra = serde_json::Map::new();
        extra.insert(ATTRIBUTES_KEY.to_owned(), attributes.to_text().into());
        let another = || Error::stale(format!("{name:?} has another value now"));
        let copy = self.store.shallow_copy(object, extra).map_err(|error| match error.kind() {
            Kind::NotFound => another().with_source(error),
            _ => error,
        })?;
        let named = self.store.persist(copy).and_then(|()| {
            let _naming = self.naming();
            if self.object_of(name)? != Some(object) {
                return Err(another());
            }
            self.put_name(name, copy)?;
            Ok(self.repoint(&(name.to_owned(), object), copy, attributes))
        });
        match named {
            Ok(files) => files.iter().for_each(|staged| super::adopt::note_staged(staged)),
            Err(error) => {
                if !is_clear(&error) {
                    self.leave_open([object]);
                }
                self.drop_new(copy, &error);
                return Err(error);
            }
        }
        // The same bytes: whoever opens the copy gets the image that is there.
        self.cache.rename(object, copy);
        // Another name may lead to it, and readers may have its blobs open: those of the copy are the same, and stay as
        // long as one of both does. The new value is in place, whatever becomes of the old one.
        self.delete_without(object, &[name]);
        Ok(copy)
    }
}

pub(super) fn format_of(view: View) -> Written {
    match view {
        View::Arrow => Written::Arrow,
        View::Feather => Written::Feather,
        View::Parquet => Written::Parquet,
        View::Npy => Written::Npy,
        View::Pickle => Written::Pickle,
        // JSON is text that its writer formatted: it is kept as it is.
        View::Json | View::Raw => Written::Plain,
    }
}

/// The format in which bytes are to be published, `None` if not (yet). Writers flush before their first byte, their
/// children flush half-written files when they exit, and preallocated files hold zeros at first: none of that may
/// replace a dataset.
pub(super) fn verdict(bytes: &[u8], format: Written, unfinished: Unfinished) -> Option<Written> {
    if format == Written::Plain {
        return Some(format);
    }
    match publish::completeness(bytes, format) {
        Completeness::Complete | Completeness::Foreign => Some(format),
        Completeness::Empty if unfinished == Unfinished::KeepUnlessEmpty => Some(Written::Plain),
        Completeness::Empty => None,
        Completeness::Incomplete if unfinished == Unfinished::Publish => Some(Written::Plain),
        Completeness::Incomplete => None,
    }
}

/// What `/proc/PID/status` (`proc(5)`) says of a thread; nothing if it is none.
///
/// Most other files of `/proc/PID` must not be read here: they wait for a lock that a thread in `execve` holds while it
/// closes files and waits for our answer.
fn status_of(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default()
}

/// Whether a thread that closes a file is on its way out: it has no memory any more then, and its status says nothing of
/// its size.
fn is_exiting(pid: u32) -> bool {
    let status = status_of(pid);
    !status.is_empty() && !status.lines().any(|line| line.starts_with("VmSize:"))
}

/// The process of a thread that is not on its way out.
fn running(pid: u32) -> Option<u32> {
    let status = status_of(pid);
    status.lines().find(|line| line.starts_with("VmSize:"))?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}

/// A read-only mapping of a memory file that only this process can shorten.
pub(super) struct MappedFile(Option<memmap2::Mmap>);

impl MappedFile {
    pub(super) fn map(file: &File, size: u64) -> Result<Self> {
        if size == 0 {
            return Ok(MappedFile(None));
        }
        // SAFETY: the file is a memory file of the host. Writers may change its bytes while it is mapped (the stamp is
        // compared afterwards); only `Staged::truncate` of this process shortens it, which waits for who has it mapped.
        let map = unsafe { memmap2::MmapOptions::new().len(size as usize).map(file) };
        Ok(MappedFile(Some(map.context(|| "mapping a staging file".into())?)))
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}
