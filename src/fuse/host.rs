//! The server's side of the control socket, and the queue of invalidations.

use std::ffi::{OsStr, OsString};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use super::journal::Journal;
use super::protocol::{self, Hello, KeptFile, Reply, Request};
use crate::error::{Context, Error, Kind, Result};
use crate::fs::host::TaggedFile;
use crate::fs::{Area, Host, HostFile, Serving};

/// Something that the kernel must forget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invalidation {
    /// Where a name leads.
    Entry(u64, OsString),
    /// What an inode holds.
    Inode(u64),
}

/// Questions to the keeper, one at a time.
#[derive(Debug)]
pub struct KeeperLink {
    /// The socket and the number of the last question: an answer that came too late is known by its number.
    socket: Mutex<(OwnedFd, u64)>,
}

impl KeeperLink {
    /// Over a control socket, whose receive time-out bounds each question.
    pub fn new(socket: OwnedFd) -> Self {
        KeeperLink { socket: Mutex::new((socket, 0)) }
    }

    fn ask(&self, request: &Request) -> Result<protocol::Received<Reply>> {
        let mut guard = self.socket.lock().unwrap_or_else(|e| e.into_inner());
        let (socket, last) = &mut *guard;
        *last += 1;
        protocol::send(socket.as_fd(), &(*last, request), None, true)?;
        loop {
            match protocol::receive::<(u64, Reply)>(socket.as_fd())? {
                Some(((number, _), _)) if number != *last => continue,
                Some(((_, Reply::Error { errno, message }), _)) => {
                    let kind = if errno == libc::ENOSPC { Kind::Full } else { Kind::Os(errno) };
                    return Err(Error::new(kind, message));
                }
                Some(((_, reply), fd)) => return Ok((reply, fd)),
                None => return Err(Error::new(Kind::Unavailable, "the keeper has gone")),
            }
        }
    }

    /// The first question.
    ///
    /// # Errors
    /// If the keeper does not answer as it should.
    pub fn hello(&self) -> Result<Hello> {
        match self.ask(&Request::Hello)? {
            (Reply::Hello(hello), _) => Ok(*hello),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// A question whose answer is "done".
    ///
    /// # Errors
    /// What the keeper says.
    pub fn tell(&self, request: &Request) -> Result<()> {
        match self.ask(request)? {
            (Reply::Done, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// A socket to the store, connected by the keeper, which may reach sockets that the server may not.
    ///
    /// # Errors
    /// `Unavailable` if nothing listens there.
    pub fn connect(&self) -> Result<UnixStream> {
        match self.descriptor(&Request::Connect)? {
            Some(fd) => Ok(UnixStream::from(fd)),
            None => Err(unexpected(&Reply::Descriptor)),
        }
    }

    /// The journal of requests.
    ///
    /// # Errors
    /// If the keeper does not answer as it should.
    pub fn journal(&self) -> Result<Journal> {
        match self.descriptor(&Request::Journal)? {
            Some(fd) => Journal::open(fd),
            None => Err(unexpected(&Reply::Descriptor)),
        }
    }

    /// The socket at which counters are asked for, if there is one.
    ///
    /// # Errors
    /// If the keeper does not answer as it should.
    pub fn metrics(&self) -> Result<Option<TcpListener>> {
        Ok(self.descriptor(&Request::Metrics)?.map(TcpListener::from))
    }

    fn descriptor(&self, request: &Request) -> Result<Option<OwnedFd>> {
        match self.ask(request)? {
            (Reply::Descriptor, fd) => Ok(fd),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// The journal of objects that no name reaches yet.
    ///
    /// # Errors
    /// If the keeper does not answer as it should.
    pub fn leftovers(&self) -> Result<Option<std::fs::File>> {
        Ok(self.descriptor(&Request::Leftovers)?.map(std::fs::File::from))
    }

    /// A memory file of `size` zeros for this server alone.
    ///
    /// # Errors
    /// If the keeper cannot make it.
    pub fn memory(&self, size: u64) -> Result<OwnedFd> {
        match self.ask(&Request::Memory { size })? {
            (Reply::Descriptor, Some(fd)) => Ok(fd),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// All kept files, as a server finds them at its start.
    ///
    /// # Errors
    /// If the keeper does not answer as it should.
    pub fn files(&self) -> Result<Vec<KeptFile>> {
        let mut all: Vec<KeptFile> = Vec::new();
        loop {
            let after = all.last().map_or(0, |file| file.key);
            match self.ask(&Request::Files { after })? {
                (Reply::Files { files }, _) if files.is_empty() => return Ok(all),
                (Reply::Files { files }, _) => all.extend(files),
                (other, _) => return Err(unexpected(&other)),
            }
        }
    }

    /// A file that is kept already.
    ///
    /// # Errors
    /// If the keeper does not know it.
    pub fn file(&self, key: u64) -> Result<HostFile> {
        self.host_file(&Request::File { key })
    }

    fn host_file(&self, request: &Request) -> Result<HostFile> {
        match self.ask(request)? {
            (Reply::File(kept), Some(fd)) => {
                Ok(HostFile { key: kept.key, file: Arc::new(fd.into()), backing: kept.backing })
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Keeps a text for the next server; `None` removes it.
    ///
    /// # Errors
    /// `TooLarge` above what one message holds.
    pub fn put_state(&self, key: &str, value: Option<&str>) -> Result<()> {
        self.tell(&Request::PutState { key: key.into(), value: value.map(str::to_owned) })
    }

    /// Whether anybody but keeper and server has a kept file open or mapped.
    ///
    /// # Errors
    /// If the keeper cannot tell.
    pub fn is_used(&self, key: u64) -> Result<bool> {
        match self.ask(&Request::IsUsed { key })? {
            (Reply::Used { used }, _) => Ok(used),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// All texts that this or an earlier server kept, with their names.
    ///
    /// # Errors
    /// If the keeper does not answer as it should.
    pub fn states(&self) -> Result<Vec<(String, String)>> {
        let mut all: Vec<(String, String)> = Vec::new();
        loop {
            let after = all.last().map(|(name, _)| name.clone()).unwrap_or_default();
            match self.ask(&Request::States { after })? {
                (Reply::States { entries }, _) if entries.is_empty() => return Ok(all),
                (Reply::States { entries }, _) => all.extend(entries),
                (other, _) => return Err(unexpected(&other)),
            }
        }
    }
}

fn unexpected(reply: &Reply) -> Error {
    Error::new(Kind::Internal, format!("the keeper answered {reply:?}"))
}

/// [`Host`] by a keeper process.
pub struct KeeperHost {
    link: Arc<KeeperLink>,
    serving: Serving,
    tells_use: bool,
    queue: Sender<Invalidation>,
}

impl KeeperHost {
    /// The host, and the queue for [`forward`].
    pub fn new(link: Arc<KeeperLink>, hello: &Hello) -> (Self, Receiver<Invalidation>) {
        let (queue, receiver) = channel();
        let serving = hello.no_passthrough.clone().map_or(Serving::Passthrough, Serving::Requests);
        (KeeperHost { link, serving, tells_use: hello.tells_use, queue }, receiver)
    }
}

impl Host for KeeperHost {
    fn serving(&self) -> Serving {
        self.serving.clone()
    }

    fn create_file(&self, area: Area, size: u64) -> Result<HostFile> {
        self.link
            .host_file(&Request::CreateFile { area, size })
            .context(|| format!("no memory file of {size} bytes for {area:?}"))
    }

    fn tag_file(&self, key: u64, tag: &str) {
        if let Err(error) = self.link.tell(&Request::TagFile { key, tag: tag.to_owned() }) {
            tracing::warn!("memory file {key} gets no note: {error}");
        }
    }

    fn tagged_files(&self) -> Result<Vec<TaggedFile>> {
        let files = self.link.files()?.into_iter();
        let tagged = files.filter_map(|file| Some((file.tag.clone()?, file)));
        tagged.map(|(tag, kept)| Ok(TaggedFile { tag, area: kept.area, file: self.link.file(kept.key)? })).collect()
    }

    fn note(&self, key: &str, text: Option<&str>) {
        if let Err(error) = self.link.put_state(key, text) {
            tracing::warn!("the next server will not know of {key:?}: {error}");
        }
    }

    fn notes(&self) -> Result<Vec<(String, String)>> {
        self.link.states()
    }

    fn is_used(&self, key: u64) -> Result<bool> {
        match self.tells_use {
            true => self.link.is_used(key),
            false => Err(Error::new(Kind::Unsupported, "a keeper of an older version does not tell who uses files")),
        }
    }

    fn release_file(&self, key: u64) {
        if let Err(error) = self.link.tell(&Request::ReleaseFile { key }) {
            tracing::warn!("memory file {key} is not released: {error}");
        }
    }

    fn invalidate_entry(&self, parent: u64, name: &OsStr) {
        // A closed queue means that the session has ended, and the kernel has forgotten all.
        self.queue.send(Invalidation::Entry(parent, name.to_owned())).ok();
    }

    fn invalidate_inode(&self, ino: u64) {
        self.queue.send(Invalidation::Inode(ino)).ok();
    }
}

/// Hands invalidations to the kernel until the host is dropped.
///
/// From inside a handler they can deadlock: the kernel waits for a page or a directory that the very request under work
/// has locked. So this runs on a thread that holds no request and no lock.
pub fn forward(queue: &Receiver<Invalidation>, notifier: &fuser::Notifier) {
    while let Ok(next) = queue.recv() {
        let result = match &next {
            Invalidation::Entry(parent, name) => notifier.inval_entry(fuser::INodeNo(*parent), name),
            Invalidation::Inode(ino) => notifier.inval_inode(fuser::INodeNo(*ino), 0, 0),
        };
        if let Err(error) = result {
            tracing::debug!("the kernel did not take {next:?}: {error}");
        }
    }
}
