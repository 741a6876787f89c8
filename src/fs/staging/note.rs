//! What the next server is told of a staged file, so that it knows who has it open and which version it replaces.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Place, Staged, Staging, Stamp};
use crate::dataset::FileAttributes;
use crate::fs::host::MemoryFile;
use crate::fs::name::join;
use crate::fs::opens::Open;
use crate::fs::resolve::Target;
use crate::image::View;
use crate::vineyard::ObjectId;

/// Most bytes of extended attributes that go into a note; as text they take four times as many.
const XATTRS_NOTED: usize = 1 << 10;

/// An open handle by which a file may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::fs) struct Writer {
    /// Its number.
    pub handle: u64,
    /// Which thread opened it.
    pub pid: u32,
    /// Number of the request that opened it.
    pub request: u64,
}

/// The open handles by which a file may be written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(in crate::fs) struct Writers(Vec<Writer>);

impl Writers {
    /// Whether nobody may write.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a thread has opened one that is still open.
    pub fn contains(&self, pid: &u32) -> bool {
        self.iter().any(|other| other == pid)
    }

    /// The threads that opened them.
    pub fn iter(&self) -> impl Iterator<Item = &u32> {
        self.0.iter().map(|writer| &writer.pid)
    }

    /// The handles.
    pub fn handles(&self) -> &[Writer] {
        &self.0
    }

    /// A file was opened for writing.
    pub fn add(&mut self, writer: Writer) {
        self.0.push(writer);
    }

    /// A handle is closed.
    pub fn remove(&mut self, handle: u64) {
        self.0.retain(|writer| writer.handle != handle);
    }
}

/// What is noted of a staged file.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::fs) struct StagedNote {
    ino: u64,
    directory: String,
    component: String,
    attributes: Box<FileAttributes>,
    /// Its extended attributes are too long for a note: they are with the published object.
    #[serde(default, skip_serializing_if = "is_false")]
    long_xattrs: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    attributes_changed: bool,
    published: Option<(String, u64)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replaces: Option<(String, u64)>,
    clean: Option<Stamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hash: Option<u64>,
    place: Place,
    /// Missing in the notes of servers that did not say who has the file open.
    #[serde(default)]
    opens: Option<Opens>,
}

/// How a file is open.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Opens {
    writers: Writers,
    was_opened: bool,
    had_readers: bool,
    shared_writable: bool,
    /// The kernel writes it by itself.
    passthrough: bool,
    /// The process that was sent to look for it, and has not come yet.
    reserved_for: Option<u32>,
    /// Its readers are noted, too, elsewhere; those of earlier servers were not.
    #[serde(default)]
    readers_noted: bool,
}

impl StagedNote {
    /// The path at which it was for everybody.
    pub fn path(&self) -> Option<String> {
        let is_reserved = self.opens.as_ref().is_some_and(|opens| opens.reserved_for.is_some());
        let is_there = matches!(self.place, Place::Path) && !is_reserved;
        is_there.then(|| join(&self.directory, &self.component))
    }

    /// The version that it was, or replaces.
    pub fn version(&self) -> Option<(&str, ObjectId)> {
        let version = self.published.as_ref().or(self.replaces.as_ref());
        version.map(|(name, object)| (name.as_str(), ObjectId(*object)))
    }

    /// Its inode number.
    pub fn ino(&self) -> u64 {
        self.ino
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_false(value: &bool) -> bool {
    !value
}

impl Staged {
    /// What is noted of it now.
    pub(in crate::fs) fn note(&self) -> StagedNote {
        let state = self.state();
        let number = |of: &Option<(String, ObjectId)>| of.as_ref().map(|(name, object)| (name.clone(), object.0));
        let mut attributes = Box::new(state.attributes.clone());
        let long_xattrs = attributes.xattrs_size() > XATTRS_NOTED;
        if long_xattrs {
            attributes.xattrs.clear();
        }
        StagedNote {
            ino: self.ino,
            directory: state.target.directory.clone(),
            component: state.target.component.clone(),
            attributes,
            long_xattrs,
            attributes_changed: state.attributes_changed,
            published: number(&state.published),
            replaces: number(&state.replaces),
            clean: state.clean.map(|(stamp, _)| stamp),
            hash: state.clean.and_then(|(_, hash)| hash),
            place: match () {
                () if state.detached || state.retired => Place::Gone,
                () if state.displaced => Place::Displaced,
                () => Place::Path,
            },
            opens: Some(Opens {
                writers: state.writers.clone(),
                was_opened: state.was_opened,
                had_readers: state.had_readers,
                shared_writable: state.shared_writable,
                passthrough: state.passthrough.is_some(),
                reserved_for: state.reserved_for,
                readers_noted: !state.readers_unknown,
            }),
        }
    }

    /// Of a file that is nothing but an image any more: the object, the view and the size.
    pub(in crate::fs) fn only_image(&self) -> Option<(ObjectId, View, u64)> {
        let state = self.state();
        let idle = state.retired && state.opens == 0 && state.writers.is_empty() && !state.readers_unknown;
        let (object, view) = state.image.filter(|_| idle)?;
        drop(state);
        Some((object, view, self.stamp().ok()?.size))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(|e| e.into_inner());
        // Nobody leads to it any more but the cache, or who has a view of it open.
        if let (Some((object, view)), Ok(meta)) = (state.image, self.file.file.metadata())
            && Arc::strong_count(&self.file) > 1
        {
            crate::fs::adopt::note_image(&self.file, object, view, meta.len());
        }
    }
}

impl Staging {
    /// Puts the staged file of a former server back to its place, under its number; `readers` have it open, and `serves`
    /// is the view that open files read from it. Nothing if nobody needs it but as an image. Also returns of which object
    /// its extended attributes are, if they were too long for the note.
    pub(in crate::fs) fn adopt(
        &self,
        file: Arc<MemoryFile>,
        note: StagedNote,
        readers: &[Open],
        serves: Option<(ObjectId, View)>,
    ) -> Option<(Arc<Staged>, Option<ObjectId>)> {
        let mut target = Target::new(&note.directory, &note.component);
        if let Some((name, _)) = note.published.as_ref().or(note.replaces.as_ref()) {
            target = target.of_name(name);
        }
        let path = target.path();
        let object = |of: Option<(String, u64)>| of.map(|(name, object)| (name, ObjectId(object)));
        let (published, replaces) = (object(note.published), object(note.replaces));
        let xattrs_of = published.as_ref().or(replaces.as_ref()).filter(|_| note.long_xattrs).map(|(_, id)| *id);
        let backing = file.backing;
        let staged = self.make(note.ino, file, target, *note.attributes, replaces, |state| {
            state.published = published;
            state.image = serves;
            state.attributes_changed = note.attributes_changed;
            state.clean = note.clean.map(|stamp| (stamp, note.hash));
            (state.detached, state.displaced) = (note.place == Place::Gone, note.place == Place::Displaced);
            // Who has it open is not known: it is treated as read and written by all.
            state.writers_unknown = note.opens.is_none();
            let opens = note.opens.unwrap_or(Opens { was_opened: true, had_readers: true, ..Opens::default() });
            state.readers_unknown = !opens.readers_noted;
            state.opens = (opens.writers.handles().len() + readers.len()) as u64;
            state.writers = opens.writers;
            state.was_opened = opens.was_opened || !readers.is_empty();
            state.had_readers = opens.had_readers || !readers.is_empty();
            state.shared_writable = opens.shared_writable;
            // One inode is served in one way at a time.
            let by_kernel = match readers.first() {
                Some(reader) => reader.file.is_some(),
                None => opens.passthrough,
            };
            state.passthrough = backing.filter(|_| by_kernel);
            state.reserved_for = opens.reserved_for;
        });
        let (reserved_for, is_of_use) = {
            let state = staged.state();
            (state.reserved_for, state.opens > 0 || state.writers_unknown || state.readers_unknown)
        };
        if note.place == Place::Displaced {
            self.remember_displaced(&staged);
        }
        match (note.place, reserved_for) {
            (Place::Path, Some(pid)) => self.reserved().push((path, pid, staged.clone())),
            (Place::Path, None) => self.place(path, &staged),
            // The kernel may have forgotten it long ago.
            (Place::Gone, _) if !is_of_use => return None,
            _ => drop(self.gone.lock().unwrap_or_else(|e| e.into_inner()).insert(staged.ino, staged.clone())),
        }
        Some((staged, xattrs_of))
    }
}
