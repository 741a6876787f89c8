//! Publishing: when a written file becomes a dataset, and what `close` and `fsync` answer.
//!
//! A file under a view's name is published when it is complete; an empty or unfinished one replaces nothing. Any other
//! file is published whenever it changed. The old object is deleted after the name points to the new one.

use std::fs::File;
use std::sync::Arc;

use super::inode::{Inode, Node, ViewNode};
use super::resolve::Target;
use super::staging::Staged;
use super::{Caller, FileSystem, Handle};
use crate::dataset::attributes::ATTRIBUTES_KEY;
use crate::dataset::publish::{self, Completeness, Limits, Staged as StagedBytes};
use crate::dataset::recipe::Written;
use crate::dataset::{FileAttributes, attributes::to_nanos};
use crate::error::{Context, Error, Kind, Result};
use crate::image::View;
use crate::vineyard::ObjectId;
use crate::vineyard::store::NameQuery;

/// How often a publish starts over because another process went on writing.
const ATTEMPTS: usize = 3;

/// What the bytes of a staged file call for.
pub(super) enum Verdict {
    /// Publish in this format; `Plain` stores the bytes as they are.
    Publish(Written),
    /// Nothing to publish (yet), and nothing wrong.
    Wait,
}

impl FileSystem {
    /// One descriptor of a writer was closed: publishes what changed.
    ///
    /// # Errors
    /// Why it could not be published; the bytes stay readable and can be published again by `fsync`.
    pub fn flush(&self, ino: u64, fh: u64, _caller: Caller) -> Result<()> {
        let handle = self.handles().get(&fh).cloned();
        match (handle, &self.inode(ino)?.node) {
            (Some(Handle::Staged { writer: false, .. }), _) => Ok(()),
            (_, Node::Staged(staged)) => self.publish_changed(staged),
            _ => Ok(()),
        }
    }

    /// As [`FileSystem::flush`].
    ///
    /// # Errors
    /// As [`FileSystem::flush`].
    pub fn fsync(&self, ino: u64, fh: u64, caller: Caller) -> Result<()> {
        self.flush(ino, fh, caller)
    }

    /// Publishes if something changed since the last time.
    pub(super) fn publish_changed(&self, staged: &Arc<Staged>) -> Result<()> {
        let _publishing = staged.publishing.lock().unwrap_or_else(|e| e.into_inner());
        if staged.state().detached {
            return Ok(());
        }
        if !staged.is_dirty()? {
            return if staged.state().attributes_changed { self.publish_attributes_locked(staged) } else { Ok(()) };
        }
        let result = self.publish_now(staged);
        staged.state().failed = result.as_ref().err().map(|error| error.to_string());
        if let Err(error) = &result {
            let path = staged.state().target.path();
            self.warn(format!("{path:?} could not be published: {error}"));
        }
        result
    }

    /// As [`FileSystem::publish_changed`], but an unfinished file is no error: nobody is there to hear it.
    pub(super) fn publish_settled(&self, staged: &Arc<Staged>) -> Result<()> {
        match self.publish_changed(staged) {
            Err(error) if error.kind() == Kind::Invalid => {
                tracing::info!(path = ?staged.state().target.path(), "closed unfinished: {error}");
                Ok(())
            }
            other => other,
        }
    }

    fn publish_now(&self, staged: &Arc<Staged>) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let before = staged.stamp()?;
            let bytes = MappedFile::map(&staged.file().file, before.size)?;
            let target = staged.state().target.clone();
            let format = target.view.as_ref().map_or(Written::Plain, |(_, view)| format_of(*view));
            let format = match verdict(bytes.as_slice(), format)? {
                Verdict::Publish(format) => format,
                Verdict::Wait => return Ok(()),
            };
            let attributes = {
                let mut state = staged.state();
                state.attributes_changed = false;
                FileAttributes { mtime: state.attributes.mtime.or(Some(Self::now())), ..state.attributes.clone() }
            };
            let input = StagedBytes { bytes: bytes.as_slice(), file: &staged.file().file };
            // Somebody may write while it is copied: what is in the store may be a mixture then.
            let unchanged = || Ok(staged.stamp()? == before);
            let Some((name, object)) = self.publish_bytes(&target, format, &attributes, &input, &unchanged)? else {
                continue;
            };
            let mut state = staged.state();
            state.published = Some((name, object));
            state.replaces = None;
            drop(state);
            return self.mark_clean(staged);
        }
        Err(Error::new(Kind::Busy, "another process keeps writing to the file while it is published"))
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
        let plan = publish::plan(input, format, attributes, Limits::of(&*self.store)?)?;
        let published = publish::realize(&*self.store, &plan, input)?;
        for warning in &published.warnings {
            self.warn(format!("{:?}: {warning}", target.path()));
        }
        let native = published.outcome != publish::Outcome::File;
        let name = if native { target.dataset().to_owned() } else { target.plain.clone() };
        let named = match settled() {
            Ok(true) => self.point_name(&name, published.id, &[target.dataset(), &target.plain]),
            Ok(false) => {
                self.delete_object(published.id);
                return Ok(None);
            }
            Err(error) => Err(error),
        };
        if let Err(error) = named {
            self.delete_object(published.id);
            return Err(error);
        }
        Ok(Some((name, published.id)))
    }

    /// Points `name` at a new object and removes what the other names of the same path held: the file has one value.
    pub(super) fn point_name(&self, name: &str, object: ObjectId, path_names: &[&str]) -> Result<()> {
        let _naming = self.naming.lock().unwrap_or_else(|e| e.into_inner());
        let mut names: Vec<&str> = path_names.to_vec();
        names.push(name);
        names.sort_unstable();
        names.dedup();
        let queries: Vec<NameQuery> = names.iter().map(|n| NameQuery::Exact((*n).to_owned())).collect();
        let old: Vec<(String, ObjectId)> = self.store.names(&queries)?.into_iter().flatten().collect();
        self.store.put_name(name, object).context(|| format!("naming {name:?}"))?;
        // From here on the new value is in place; what is left to do must not make the save fail.
        for (former, id) in old {
            if former != name
                && let Err(error) = self.store.drop_name(&former)
            {
                self.warn(format!("the name {former:?} could not be removed: {error}"));
                continue;
            }
            if id != object {
                self.delete_unnamed(id);
            }
        }
        Ok(())
    }

    /// Deletes an object unless another name points to it.
    pub(super) fn delete_unnamed(&self, object: ObjectId) {
        // Several names of one object are rare and are made by other clients: only then is its `__name` another one.
        match self.other_names_of(object) {
            Ok(false) => self.delete_object(object),
            Ok(true) => {}
            Err(error) => self.warn(format!("object {object} may be left over: {error}")),
        }
    }

    fn other_names_of(&self, object: ObjectId) -> Result<bool> {
        let metas = self.store.metas(&[object], false)?;
        let Some(Ok(meta)) = metas.get(&object) else { return Ok(false) };
        let last = meta.get("__name").and_then(|name| name.as_str()).unwrap_or_default();
        // Names in metadata are escaped like JSON pointers.
        let last = last.replace("~1", "/").replace("~0", "~");
        Ok(self.object_of(&last)? == Some(object))
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
        let copy = self.with_attributes(&name, object, &attributes)?;
        staged.state().published = Some((name, copy));
        // The times of the memory file did not move, so it is as clean as it was.
        Ok(())
    }

    /// Stores attributes of a published view; its inode stays.
    pub(super) fn store_attributes(
        &self,
        inode: &Arc<Inode>,
        view: &ViewNode,
        mut attributes: FileAttributes,
    ) -> Result<()> {
        // The copy is a new object with a new creation time; the file's time of change is the old one.
        attributes.mtime = attributes.mtime.or(Some(to_nanos(view.summary.created)));
        let copy = self.with_attributes(&view.name, view.object, &attributes)?;
        let summary = self.objects.summary(&*self.store, copy)?;
        let summary = summary.ok_or_else(|| Error::stale(format!("{:?} was removed", view.name)))?;
        self.cache.rename(view.object, copy);
        let path = super::name::join(&view.directory, &view.component);
        self.inodes.keep_number(&path, copy, view.view, inode.ino);
        self.inodes.replace(inode.ino, Node::View(ViewNode { object: copy, summary, ..view.clone() }));
        Ok(())
    }

    /// Replaces an object by a copy of its metadata with these attributes; the data is shared.
    fn with_attributes(&self, name: &str, object: ObjectId, attributes: &FileAttributes) -> Result<ObjectId> {
        let mut extra = serde_json::Map::new();
        extra.insert(ATTRIBUTES_KEY.to_owned(), attributes.to_text().into());
        let copy = self.store.shallow_copy(object, extra)?;
        let named = self.store.persist(copy).and_then(|()| {
            let _naming = self.naming.lock().unwrap_or_else(|e| e.into_inner());
            if self.object_of(name)? != Some(object) {
                return Err(Error::stale(format!("{name:?} has another value now")));
            }
            self.store.put_name(name, copy)
        });
        if let Err(error) = named {
            self.store.delete(&[copy])?;
            return Err(error);
        }
        self.objects.forget(object);
        self.store.delete(&[object])?;
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

/// Decides what a flush means: see the orders of requests that writers produce (empty flushes before the first byte,
/// half-written files of children that exit).
pub(super) fn verdict(bytes: &[u8], format: Written) -> Result<Verdict> {
    if format == Written::Plain {
        return Ok(Verdict::Publish(Written::Plain));
    }
    match publish::completeness(bytes, format) {
        Completeness::Complete => Ok(Verdict::Publish(format)),
        Completeness::Foreign => Ok(Verdict::Publish(format)),
        Completeness::Empty => Ok(Verdict::Wait),
        Completeness::Incomplete => Err(Error::new(
            Kind::Invalid,
            "the file begins like its format and does not end like it: it is unfinished and was not published",
        )),
    }
}

/// A read-only mapping of a memory file that only this process can shorten.
pub(super) struct MappedFile(Option<memmap2::Mmap>);

impl MappedFile {
    pub(super) fn map(file: &File, size: u64) -> Result<Self> {
        if size == 0 {
            return Ok(MappedFile(None));
        }
        // SAFETY: the file is a memory file of the host. Writers may change its bytes while it is mapped (the stamp is
        // compared afterwards); only `setattr` of this process shortens it, and that makes the stamp differ too.
        let map = unsafe { memmap2::MmapOptions::new().len(size as usize).map(file) };
        Ok(MappedFile(Some(map.context(|| "mapping a staging file".into())?)))
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}
