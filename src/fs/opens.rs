//! Which files are open, and how: what the next server must know of opens that it did not answer itself.
//!
//! The kernel serves an inode in one way as long as anybody has it open, and asks about it by its number whatever became
//! of the name; and the blobs of an object stay as long as somebody reads them. So each open of a view, and each of a
//! written file for reading (its writers are in its own note), is a line of a memory file that the host keeps. A line
//! is written before the open is answered, and costs no question to the host. Lines end with a NUL byte behind the last;
//! when nothing is open any more, it is the first byte.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::host::{Area, Host, MemoryFile};
use super::inode::ViewNode;
use super::objects::Summary;
use super::{Caller, FileSystem};
use crate::dataset::FileAttributes;
use crate::dataset::attributes::{from_nanos, to_nanos};
use crate::error::{Error, Kind, Result};
use crate::image::View;
use crate::sync::{Mutex, MutexGuard};
use crate::vineyard::{InstanceId, ObjectId};

/// Key of the host's text that is another one after the connection to the kernel was made anew, when nothing is open.
pub const CONNECTION: &str = "connection";
/// Bytes of a file of lines at least: some hundred opens and closes, before those that are open are written anew.
const LEAST: u64 = 64 << 10;
/// How long after a file of lines could not be made it is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// Most bytes of extended attributes in a line: as text they take four times as many. Longer ones are with the object.
const XATTRS_NOTED: usize = 1 << 10;
/// A FORGET that was on its way when the former server ended may be of an earlier life of its inode.
const LATE_FORGETS: Duration = if cfg!(test) { Duration::ZERO } else { Duration::from_secs(10) };

/// An open handle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Open {
    /// Its number.
    pub handle: u64,
    /// Number of the request that opened it.
    pub request: u64,
    /// The object whose blobs it reads, by requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reads: Option<u64>,
    /// Key of the memory file that the kernel reads by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<u64>,
}

/// What the inode of a view shows, as far as it can be told without the store: the object may be gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shown {
    directory: String,
    component: String,
    name: String,
    object: u64,
    view: usize,
    size: u64,
    created: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    attributes: Option<Box<FileAttributes>>,
    /// Its extended attributes are too long for a line.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    long_xattrs: bool,
}

impl Shown {
    /// What is told of a view of so many bytes; nothing of a format that has no number.
    pub(super) fn of(node: &ViewNode, size: u64) -> Option<Shown> {
        let mut attributes = node.summary.attributes.as_deref().cloned().map(Box::new);
        let long = |attributes: &&mut Box<FileAttributes>| attributes.xattrs_size() > XATTRS_NOTED;
        let long_xattrs = attributes.as_mut().filter(long).map(|attributes| attributes.xattrs.clear()).is_some();
        Some(Shown {
            directory: node.directory.clone(),
            component: node.component.clone(),
            name: node.name.clone(),
            object: node.object.0,
            view: View::ALL.iter().position(|view| *view == node.view)?,
            size,
            created: to_nanos(node.summary.created),
            attributes,
            long_xattrs,
        })
    }

    /// The node, and whether its extended attributes are to be had from the object alone.
    pub(super) fn node(&self) -> Option<(ViewNode, bool)> {
        let (object, view) = (ObjectId(self.object), *View::ALL.get(self.view)?);
        let summary = Summary {
            id: object,
            instance: InstanceId::UNSPECIFIED,
            signature: None,
            typename: "".into(),
            created: from_nanos(self.created),
            rows: None,
            listed: view,
            sizes: Box::new([(view, Some(self.size))]),
            broken: None,
            attributes: self.attributes.as_deref().cloned().map(Arc::new),
        };
        let node = ViewNode {
            directory: self.directory.clone(),
            component: self.component.clone(),
            name: self.name.clone(),
            object,
            view,
            summary: Arc::new(summary),
        };
        Some((node, self.long_xattrs))
    }
}

/// An inode that is open.
#[derive(Clone, Debug, Default)]
pub(super) struct OpenFile {
    /// What it shows; nothing if it is a written file.
    pub shown: Option<Shown>,
    /// Its open handles, the first one first.
    pub handles: Vec<Open>,
}

/// What a line says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    /// An inode has one more handle. The first says what it shows.
    Opened {
        ino: u64,
        open: Open,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        shown: Option<Shown>,
    },
    /// It shows something else.
    Shows { ino: u64, shown: Shown },
    /// Its handles that read blobs by requests read those of this object.
    Reads { ino: u64, object: u64 },
    /// It has one less.
    Closed { ino: u64, handle: u64 },
}

/// A file of lines.
struct Log {
    file: MemoryFile,
    /// Where the next line begins.
    end: u64,
    size: u64,
}

impl Log {
    fn append(&mut self, mut text: Vec<u8>) -> Result<()> {
        if self.end + text.len() as u64 >= self.size {
            return Err(Error::new(Kind::Full, "the file of open files is full"));
        }
        text.push(0);
        self.file.file.write_all_at(&text, self.end)?;
        self.end += text.len() as u64 - 1;
        Ok(())
    }

    /// Nothing is open.
    fn clear(&mut self) -> Result<()> {
        self.end = 0;
        Ok(self.file.file.write_all_at(&[0], 0)?)
    }
}

#[derive(Default)]
struct State {
    files: HashMap<u64, OpenFile>,
    log: Option<Log>,
    /// When no file of lines could be made.
    failed: Option<Instant>,
    /// Which connection to the kernel this is.
    connection: String,
}

impl State {
    /// Takes a line over; false if it says nothing new.
    fn take(&mut self, line: Line) -> bool {
        match line {
            Line::Opened { ino, open, shown } => {
                let file = self.files.entry(ino).or_default();
                file.shown = file.shown.take().or(shown);
                file.handles.push(open);
                true
            }
            Line::Shows { ino, shown } => match self.files.get_mut(&ino) {
                Some(file) => file.shown.replace(shown).is_some(),
                None => false,
            },
            Line::Reads { ino, object } => {
                let handles = self.files.get_mut(&ino).into_iter().flat_map(|file| &mut file.handles);
                let others = handles.filter_map(|open| open.reads.as_mut()).filter(|reads| **reads != object);
                others.map(|reads| *reads = object).count() > 0
            }
            Line::Closed { ino, handle } => {
                let Some(file) = self.files.get_mut(&ino) else { return false };
                let before = file.handles.len();
                file.handles.retain(|open| open.handle != handle);
                let closed = file.handles.len() < before;
                if file.handles.is_empty() {
                    self.files.remove(&ino);
                }
                closed
            }
        }
    }

    /// All that is open, in lines.
    fn lines(&self) -> Vec<u8> {
        let mut text = Vec::new();
        for (ino, file) in &self.files {
            let mut shown = file.shown.clone();
            for open in &file.handles {
                text.extend(text_of(&Line::Opened { ino: *ino, open: open.clone(), shown: shown.take() }));
            }
        }
        text
    }
}

fn text_of(line: &Line) -> Vec<u8> {
    let mut text = serde_json::to_vec(line).unwrap_or_default();
    text.push(b'\n');
    text
}

/// All open files but those that are open for writing.
pub(super) struct Opens {
    host: Arc<dyn Host>,
    state: Mutex<State>,
    /// Handles from this one on are this server's.
    own: u64,
    begun: Instant,
}

impl Opens {
    /// None. The handles of this server have numbers above `start`.
    pub(super) fn new(host: Arc<dyn Host>, start: u64) -> Self {
        Opens { host, state: Mutex::default(), own: start, begun: Instant::now() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes over what a former server had written down, each file with the connection that it is about.
    pub(super) fn adopt(&self, logs: Vec<(MemoryFile, String)>, connection: String) -> HashMap<u64, OpenFile> {
        let mut state = self.state();
        state.connection = connection;
        // Where there are two, the server was killed right after it had written all to the second.
        let newest = logs.into_iter().max_by_key(|(file, _)| file.key);
        if let Some((file, _)) = newest.filter(|(_, of)| *of == state.connection) {
            match read(&file) {
                Ok((lines, end)) => {
                    for line in lines {
                        state.take(line);
                    }
                    let size = file.file.metadata().map_or(0, |meta| meta.len());
                    state.log = Some(Log { file, end, size });
                }
                Err(error) => tracing::warn!("what was open under the former server is not known: {error}"),
            }
        }
        state.files.clone()
    }

    /// A handle of an inode is open. What the inode shows is asked for if it is the first.
    pub(super) fn opened(&self, ino: u64, open: Open, shown: impl FnOnce() -> Option<Shown>) {
        let mut state = self.state();
        let shown = if state.files.contains_key(&ino) { None } else { shown() };
        self.say(&mut state, Line::Opened { ino, open, shown });
    }

    /// An inode shows something else, if it is open.
    pub(super) fn shows(&self, ino: u64, node: &ViewNode) {
        let mut state = self.state();
        let size = state.files.get(&ino).and_then(|file| file.shown.as_ref()).map(|shown| shown.size);
        if let Some(shown) = size.and_then(|size| Shown::of(node, size)) {
            self.say(&mut state, Line::Shows { ino, shown });
        }
    }

    /// The handles of an inode that read blobs by requests read those of this object. Returns which read others before.
    pub(super) fn read_from(&self, ino: u64, object: ObjectId) -> Vec<u64> {
        let mut state = self.state();
        let handles = state.files.get(&ino).into_iter().flat_map(|file| &file.handles);
        let others = handles.filter(|open| open.reads.is_some_and(|reads| reads != object.0));
        let others = others.map(|open| open.handle).collect();
        self.say(&mut state, Line::Reads { ino, object: object.0 });
        others
    }

    /// A handle is closed.
    pub(super) fn closed(&self, ino: u64, handle: u64) {
        self.say(&mut self.state(), Line::Closed { ino, handle });
    }

    /// The object whose blobs the handles of an inode read by requests.
    pub(super) fn reads(&self, ino: u64) -> Option<ObjectId> {
        self.state().files.get(&ino)?.handles.iter().find_map(|open| open.reads).map(ObjectId)
    }

    /// The handle that a request has opened.
    fn of_request(&self, ino: u64, request: u64) -> Option<u64> {
        let state = self.state();
        let opened = state.files.get(&ino)?.handles.iter().find(|open| open.request == request)?;
        Some(opened.handle)
    }

    /// The handles of an inode that former servers have opened.
    fn former(&self, ino: u64) -> Vec<u64> {
        let state = self.state();
        let handles = state.files.get(&ino).into_iter().flat_map(|file| &file.handles);
        handles.map(|open| open.handle).filter(|handle| *handle < self.own).collect()
    }

    fn say(&self, state: &mut State, line: Line) {
        let text = text_of(&line);
        if !state.take(line) {
            return;
        }
        let nothing = state.files.is_empty();
        let written = match &mut state.log {
            Some(log) if nothing => log.clear(),
            Some(log) => log.append(text),
            None if nothing => Ok(()),
            None => Err(Error::not_found("no file of lines")),
        };
        if written.is_err() && state.failed.is_none_or(|failed| failed.elapsed() > AGAIN) {
            match self.written_anew(state) {
                Ok(log) => (state.log, state.failed) = (Some(log), None),
                Err(error) => {
                    // What is said next may still find room.
                    state.failed = Some(Instant::now());
                    tracing::info!("the next server will not know of all open files: {error}");
                }
            }
        }
    }

    /// A new file of lines about what is open now.
    fn written_anew(&self, state: &State) -> Result<Log> {
        let text = state.lines();
        let size = LEAST.max(4 * text.len() as u64);
        let make = |area, final_size| -> Result<MemoryFile> {
            let file = MemoryFile::create(&self.host, area, final_size)?;
            // There must be room for the lines to come, whatever else needs it.
            let length = i64::try_from(size).map_err(|_| Error::new(Kind::TooLarge, "open files"))?;
            nix::fcntl::fallocate(&*file.file, nix::fcntl::FallocateFlags::empty(), 0, length)?;
            Ok(file)
        };
        let file = make(Area::Image, size).or_else(|_| make(Area::Staging, 0))?;
        let mut log = Log { file, end: 0, size };
        log.append(text)?;
        super::adopt::note_opens(&log.file, &state.connection);
        Ok(log)
    }
}

/// The lines of a file, and where they end. The last one may be a part: nobody got the answer that it is about.
fn read(file: &MemoryFile) -> Result<(Vec<Line>, u64)> {
    let mut text = vec![0; file.file.metadata()?.len() as usize];
    file.file.read_exact_at(&mut text, 0)?;
    let (mut lines, mut end) = (Vec::new(), 0);
    let all = text.split(|byte| *byte == 0).next().unwrap_or_default();
    for line in all.split_inclusive(|byte| *byte == b'\n') {
        let Ok(known) = serde_json::from_slice(line) else { break };
        lines.push(known);
        end += line.len() as u64;
    }
    Ok((lines, end))
}

impl FileSystem {
    /// A former server opened a file for the same request, which it did not answer: nobody has that handle.
    pub(super) fn take_back(&self, ino: u64, caller: Caller) {
        if caller.resent
            && let Some(handle) = self.opens.of_request(ino, caller.request)
        {
            self.release(ino, handle);
        }
    }

    /// The kernel has forgotten an inode, so that nobody has it open: handles of former servers that nobody has given back
    /// were never handed out.
    pub(super) fn end_former_opens(&self, ino: u64) {
        let is_known = self.inodes.get(ino).is_some_and(|inode| inode.state().lookups > 0);
        if !is_known && self.opens.begun.elapsed() >= LATE_FORGETS {
            self.opens.former(ino).into_iter().for_each(|handle| self.release(ino, handle));
        }
    }
}
