//! Taking over what a former server left with the host: assembled images, and files that were being written.
//!
//! Each memory file carries a note of what it is. A server that starts reads the notes, so that open files, maps and
//! half-written files go on as if nothing had happened.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::cache::Assembled;
use super::host::MemoryFile;
use super::inode::{Mode, Node};
use super::opens::{self, Open, OpenFile};
use super::staging::{Staged, StagedNote};
use super::{FileSystem, Handle, name};
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
    /// What is open, over one connection to the kernel.
    Opens { connection: String },
}

/// Says what an assembled image is.
pub(super) fn note_image(file: &MemoryFile, object: ObjectId, view: View, size: u64) {
    let Some(view) = View::ALL.iter().position(|v| *v == view) else { return };
    note(file, &Note::Image { object: object.0, view, size });
}

/// Says what a staged file is now: after it was made, moved, published, opened or closed.
pub(super) fn note_staged(staged: &Staged) {
    let _noting = staged.noting.lock().unwrap_or_else(|e| e.into_inner());
    match staged.only_image() {
        Some((object, view, size)) => note_image(staged.file(), object, view, size),
        None => note(staged.file(), &Note::Staged(staged.note())),
    }
}

/// Says that a move of names is written down in a file.
pub(super) fn note_move(file: &MemoryFile) {
    note(file, &Note::Move);
}

/// Says that it is written down in a file what is open.
pub(super) fn note_opens(file: &MemoryFile, connection: &str) {
    note(file, &Note::Opens { connection: connection.to_owned() });
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
        let (mut images, mut staged, mut moves, mut logs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for tagged in files {
            // Dropping the file gives it back: a note that nobody understands is of no use.
            let file = MemoryFile::adopt(&self.host, tagged.area, tagged.file);
            match serde_json::from_str(&tagged.tag) {
                Ok(Note::Image { object, view, size }) => {
                    if let Some(view) = View::ALL.get(view) {
                        images.push((ObjectId(object), *view, Arc::new(Assembled::adopt(Arc::new(file), size))));
                    }
                }
                Ok(Note::Staged(note)) => staged.push((Arc::new(file), note)),
                Ok(Note::Move) => moves.push(file),
                Ok(Note::Opens { connection }) => logs.push((file, connection)),
                Err(error) => tracing::warn!("a memory file with an unknown note is dropped: {error}"),
            }
        }
        let open = self.opens.adopt(logs, self.connection());
        let mut by_key: HashMap<u64, Arc<Assembled>> =
            images.iter().map(|(.., image)| (image.file().key, image.clone())).collect();
        // A view may be served from the very file that was written.
        for (file, _) in &staged {
            let size = file.file.metadata().map_or(0, |meta| meta.len());
            by_key.insert(file.key, Arc::new(Assembled::adopt(file.clone(), size)));
        }
        let mut served = HashMap::new();
        for (ino, file) in &open {
            served.extend(self.adopt_view(*ino, file, &by_key));
        }
        drop(by_key);
        // Those that are open are not dropped for others.
        images.sort_by_key(|(.., image)| Reverse(Arc::strong_count(image)));
        for (object, view, image) in images {
            self.cache.insert(object, view, image);
        }
        self.put_in_order(&mut staged);
        for (file, note) in staged {
            let readers = open.get(&note.ino()).map_or(&[][..], |file| &file.handles);
            let serves = served.get(&file.key).cloned();
            if let Some((staged, xattrs_of)) = self.staging.adopt(file, note, readers, serves) {
                self.adopt_staged(&staged, xattrs_of, readers);
            }
        }
        let notes = self.host.notes().unwrap_or_default();
        self.adopt_changes(&notes);
        self.finish_moves(moves, &notes);
    }

    /// The server may have been killed before it noted of a file that another one had taken its place. Of two at one path
    /// the last one stays: that to whose version the name leads, or the later one, as what takes a place is made later.
    fn put_in_order(&self, staged: &mut [(Arc<MemoryFile>, StagedNote)]) {
        staged.sort_unstable_by_key(|(_, note)| note.ino());
        let mut at: HashMap<String, usize> = HashMap::new();
        staged.iter().filter_map(|(_, note)| note.path()).for_each(|path| *at.entry(path).or_default() += 1);
        let is_contested = |note: &StagedNote| note.path().is_some_and(|path| at.get(&path) > Some(&1));
        let contested = staged.iter().map(|(_, note)| note).filter(|note| is_contested(note));
        let names: Vec<&str> = contested.filter_map(|note| Some(note.version()?.0)).collect();
        if names.is_empty() {
            return;
        }
        let there = self.pointees(&names).unwrap_or_else(|error| {
            self.warn(format!("which of two files of a former server is at a path is guessed: {error}"));
            Vec::new()
        });
        staged.sort_by_key(|(_, note)| {
            let version = note.version().filter(|_| is_contested(note));
            version.is_some_and(|(name, object)| there.iter().any(|(n, now)| n == name && *now == object))
        });
    }

    /// Which connection to the kernel this is: it changes when nothing that was open is open any more.
    fn connection(&self) -> String {
        let notes = self.host.notes().unwrap_or_default();
        notes.into_iter().find(|(key, _)| key == opens::CONNECTION).map(|(_, text)| text).unwrap_or_default()
    }

    /// Goes on with the handles by which a view is open. Returns which memory file the kernel reads for it, and as what.
    fn adopt_view(
        &self,
        ino: u64,
        file: &OpenFile,
        by_key: &HashMap<u64, Arc<Assembled>>,
    ) -> Option<(u64, (ObjectId, View))> {
        let (mut node, long_xattrs) = file.shown.as_ref()?.node()?;
        if long_xattrs {
            match self.objects.summary(&*self.store, node.object) {
                Ok(Some(summary)) => node.summary = summary,
                Ok(None) => {}
                Err(error) => self.warn(format!("extended attributes of {:?} are not known: {error}", node.name)),
            }
        }
        let served = file.handles.iter().find_map(|open| by_key.get(&open.file?));
        let shows = (node.object, node.view);
        self.inodes.keep_number(&name::join(&node.directory, &node.component), node.object, node.view, ino);
        // The kernel knows it, as it is open.
        let inode = self.inodes.look_up(ino, || Node::View(node));
        {
            let mut state = inode.state();
            state.opens = file.handles.len() as u64;
            state.mode = served.map(|image| Mode::Assembled(image.clone()));
            state.by_requests = file.handles.iter().all(|open| open.file.is_none());
        }
        for open in &file.handles {
            let lazy = open.reads.map(ObjectId);
            if let Some(object) = lazy {
                *self.lazy_opens().entry(object).or_default() += 1;
            }
            self.adopt_handle(open.handle, Handle::View { lazy });
        }
        served.map(|image| (image.file().key, shows))
    }

    fn adopt_handle(&self, number: u64, handle: Handle) {
        self.handles().insert(number, handle);
        self.next_handle.fetch_max(number + 1, Ordering::Relaxed);
    }

    /// Goes on with the handles by which a file that was written here is open.
    fn adopt_staged(&self, staged: &Arc<Staged>, xattrs_of: Option<ObjectId>, readers: &[Open]) {
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
        for writer in writers.handles() {
            self.adopt_handle(writer.handle, Handle::Staged { writer: true, pid: writer.pid, closed: false });
        }
        for reader in readers {
            self.adopt_handle(reader.handle, Handle::Staged { writer: false, pid: 0, closed: false });
        }
        let opens = writers.handles().len() + readers.len();
        if opens > 0 {
            // The kernel knows it, as it is open.
            let inode = self.inodes.look_up(staged.ino(), || Node::Staged(staged.clone()));
            inode.state().opens += opens as u64;
            self.adopt_mappings(&inode, staged);
        }
    }
}
