//! Taking over what a former server left with the host: assembled images, and files that were being written.
//!
//! Each memory file carries a note of what it is. A server that starts reads the notes, so that open files, maps and
//! half-written files go on as if nothing had happened.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::cache::Assembled;
use super::host::MemoryFile;
use super::inode::Node;
use super::staging::{Staged, StagedNote};
use super::{FileSystem, Handle};
use crate::image::View;
use crate::vineyard::ObjectId;

/// What a memory file is.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
enum Note {
    /// The assembled image of a view.
    Image { object: u64, view: usize, size: u64 },
    /// A staged file.
    Staged(StagedNote),
    /// A move of names that is under way.
    Move,
}

/// Says what an assembled image is.
pub(super) fn note_image(file: &MemoryFile, object: ObjectId, view: View, size: u64) {
    let Some(view) = View::ALL.iter().position(|v| *v == view) else { return };
    note(file, &Note::Image { object: object.0, view, size });
}

/// Says what a staged file is now: after it was made, moved, published, opened or closed.
pub(super) fn note_staged(staged: &Staged) {
    let _noting = staged.noting.lock().unwrap_or_else(|e| e.into_inner());
    note(staged.file(), &Note::Staged(staged.note()));
}

/// Says that a move of names is written down in a file.
pub(super) fn note_move(file: &MemoryFile) {
    note(file, &Note::Move);
}

fn note(file: &MemoryFile, note: &Note) {
    if let Ok(text) = serde_json::to_string(note) {
        file.tag(&text);
    }
}

impl FileSystem {
    /// Takes over the memory files of a former server. Called once, before the first request.
    pub fn adopt(&self) {
        match self.folders.adopt() {
            Ok(numbers) => self.inodes.adopt_directories(numbers),
            Err(error) => self.warn(format!("the directories of a former server are not known: {error}")),
        }
        let files = match self.host.tagged_files() {
            Ok(files) => files,
            Err(error) => return self.warn(format!("what a former server left could not be taken over: {error}")),
        };
        let mut moves = Vec::new();
        for tagged in files {
            // Dropping the file gives it back: a note that nobody understands is of no use.
            let file = MemoryFile::adopt(&self.host, tagged.area, tagged.file);
            match serde_json::from_str(&tagged.tag) {
                Ok(Note::Image { object, view, size }) => {
                    if let Some(view) = View::ALL.get(view) {
                        self.cache.insert(ObjectId(object), *view, Arc::new(Assembled::adopt(Arc::new(file), size)));
                    }
                }
                Ok(Note::Staged(note)) => {
                    let (staged, xattrs_of) = self.staging.adopt(Arc::new(file), note);
                    self.adopt_staged(&staged, xattrs_of);
                }
                Ok(Note::Move) => moves.push(file),
                Err(error) => tracing::warn!("a memory file with an unknown note is dropped: {error}"),
            }
        }
        self.finish_moves(moves);
    }

    /// Goes on with the handles by which a file of a former server is open for writing.
    fn adopt_staged(&self, staged: &Arc<Staged>, xattrs_of: Option<ObjectId>) {
        if let Some(object) = xattrs_of {
            match self.objects.summary(&*self.store, object) {
                Ok(summary) => {
                    let stored = summary.and_then(|summary| summary.attributes.as_deref().cloned());
                    staged.state().attributes.xattrs = stored.unwrap_or_default().xattrs;
                }
                Err(error) => self.warn(format!("extended attributes of object {object} are not known: {error}")),
            }
        }
        note_staged(staged);
        let writers = staged.state().writers.clone();
        if writers.is_empty() {
            return;
        }
        for writer in writers.handles() {
            let handle = Handle::Staged { writer: true, pid: writer.pid, closed: false };
            self.handles().insert(writer.handle, handle);
            self.next_handle.fetch_max(writer.handle + 1, Ordering::Relaxed);
        }
        // The kernel knows it, as it is open.
        let inode = self.inodes.look_up(staged.ino(), || Node::Staged(staged.clone()));
        inode.state().opens += writers.handles().len() as u64;
    }
}
