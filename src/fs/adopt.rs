//! Taking over what a former server left with the host: assembled images, and files that were being written.
//!
//! Each memory file carries a note of what it is. A server that starts reads the notes, so that open files, maps and
//! half-written files go on as if nothing had happened.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::FileSystem;
use super::cache::Assembled;
use super::host::MemoryFile;
use super::resolve::Target;
use super::staging::{Place, Staged, Stamp};
use crate::dataset::FileAttributes;
use crate::image::View;
use crate::vineyard::ObjectId;

/// What a memory file is.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
enum Note {
    /// The assembled image of a view.
    Image { object: u64, view: usize, size: u64 },
    /// A staged file.
    Staged {
        ino: u64,
        directory: String,
        component: String,
        attributes: Box<FileAttributes>,
        published: Option<(String, u64)>,
        clean: Option<Stamp>,
        place: Place,
    },
    /// A move of names that is under way.
    Move,
}

/// Says what an assembled image is.
pub(super) fn note_image(file: &MemoryFile, object: ObjectId, view: View, size: u64) {
    let Some(view) = View::ALL.iter().position(|v| *v == view) else { return };
    note(file, &Note::Image { object: object.0, view, size });
}

/// Says what a staged file is now: after it was made, moved or published.
pub(super) fn note_staged(staged: &Staged) {
    let state = staged.state();
    let note_of = Note::Staged {
        ino: staged.ino(),
        directory: state.target.directory.clone(),
        component: state.target.component.clone(),
        // Extended attributes may be long; they are with the published object.
        attributes: Box::new(FileAttributes { xattrs: Default::default(), ..state.attributes.clone() }),
        published: state.published.as_ref().map(|(name, object)| (name.clone(), object.0)),
        clean: state.clean.as_ref().map(|(stamp, _)| *stamp),
        place: match () {
            () if state.detached || state.retired => Place::Gone,
            () if state.displaced => Place::Displaced,
            () => Place::Path,
        },
    };
    drop(state);
    note(staged.file(), &note_of);
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
                Ok(Note::Staged { ino, directory, component, attributes, published, clean, place }) => {
                    let target = Target::new(&directory, &component);
                    let published = published.map(|(name, object)| (name, ObjectId(object)));
                    self.staging.adopt(ino, Arc::new(file), target, *attributes, published, clean, place);
                }
                Ok(Note::Move) => moves.push(file),
                Err(error) => tracing::warn!("a memory file with an unknown note is dropped: {error}"),
            }
        }
        self.finish_moves(moves);
    }
}
