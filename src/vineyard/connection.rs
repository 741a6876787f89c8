//! One registered connection to vineyardd.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use super::blobs::{Memories, MemoryFile};
use super::id::{BlobKey, InstanceId, ObjectId};
use super::memory::Blob;
use super::pipe::Pipe;
use super::request::{GetBuffersReply, Payload, RegisterReply, Request};
use super::wire::{Broken, Channel, Refusal, bad_reply, parse, push_frame};
use crate::error::{Context, Error, Kind, Result};
use crate::socket;

/// The inner result is the server's answer (the connection goes on), the outer error the connection's end.
pub type Answer<T> = std::result::Result<Result<T>, Broken>;

/// Most blobs in one `get_buffers`.
const BLOBS_PER_REQUEST: usize = 4096;
/// A connection keeps its buffer for the next reply if it is not larger than this.
const KEPT_BUFFER: usize = 1 << 20;
/// How long bytes wait for others that are stored with them.
const GATHER: Duration = Duration::from_millis(5);

/// So many bytes that follow a reply must come within the connection's patience, or those that are waited for if they are
/// fewer: who sends one now and then holds readers no longer than one who sends none.
const LEAST: u64 = 64 << 10;

/// What tells one vineyardd process from the next behind the same socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its process id, 0 if it can't be seen.
    pub pid: i32,
    /// Its number; with local metadata it is always 0.
    pub instance: InstanceId,
    /// Its TCP endpoint.
    pub rpc_endpoint: String,
    /// Its socket, as it says.
    pub socket: String,
    /// Its version.
    pub version: String,
}

/// See the [module](self).
pub struct Connection {
    channel: Channel,
    /// The vineyardd at the other end.
    pub identity: Identity,
    /// Which vineyardd of this client's life that is; the pool sets it.
    pub generation: u64,
    /// Memory files by the server's numbers. The server sends each descriptor once per connection.
    files: HashMap<i64, Arc<MemoryFile>>,
    buffer: Vec<u8>,
    last_reply_len: usize,
    patience: Duration,
    deadline: Instant,
    /// How long was waited for these [`LEAST`] bytes.
    waited: Duration,
    /// How many of them came.
    came: u64,
    hung_up: bool,
}

/// Connects to a vineyardd's socket.
///
/// # Errors
/// The errno of `connect`; `Timeout` if the backlog of a frozen server stays full until `deadline`.
pub fn connect_path(path: &Path, deadline: Instant) -> Result<std::os::unix::net::UnixStream> {
    let connected = socket::connect_within(path, deadline).and_then(|stream| {
        stream.set_nonblocking(true)?;
        Ok(stream)
    });
    match connected {
        Err(error) if socket::is_full(&error) => {
            Err(Error::new(Kind::Timeout, format!("vineyardd accepts nobody at {}", path.display())))
        }
        other => other.context(|| format!("connecting to vineyardd at {}", path.display())),
    }
}

impl Connection {
    /// Registers on the connected socket of this instance. Later replies must each come within `patience`.
    pub fn register(
        stream: impl Into<OwnedFd>,
        deadline: Instant,
        patience: Duration,
    ) -> std::result::Result<Self, Broken> {
        Self::register_on(Channel::new(stream), deadline, patience)
    }

    /// The same with another instance.
    pub fn register_peer(
        stream: impl Into<OwnedFd>,
        deadline: Instant,
        patience: Duration,
    ) -> std::result::Result<Self, Broken> {
        Self::register_on(Channel::of_peer(stream), deadline, patience)
    }

    fn register_on(channel: Channel, deadline: Instant, patience: Duration) -> std::result::Result<Self, Broken> {
        let mut connection = Connection {
            identity: Identity {
                pid: channel.peer_pid(),
                instance: InstanceId::UNSPECIFIED,
                rpc_endpoint: String::new(),
                socket: String::new(),
                version: String::new(),
            },
            channel,
            generation: 0,
            files: HashMap::new(),
            buffer: Vec::new(),
            last_reply_len: 0,
            patience,
            deadline,
            waited: Duration::ZERO,
            came: 0,
            hung_up: false,
        };
        // 1 is the ordinary store; a server that is not told uses an uninitialised value.
        let request = Request::Register { version: "0.24.2", store_type: 1, session_id: 0, username: "", password: "" };
        let refused = |error| Broken { error, sent: true };
        let reply: RegisterReply = connection.call(&request, "register_reply")?.map_err(refused)?;
        if !reply.store_match || reply.instance_id == u64::MAX {
            return Err(bad_reply("to the registration says that it is no ordinary store"));
        }
        connection.identity.instance = InstanceId(reply.instance_id);
        connection.identity.rpc_endpoint = reply.rpc_endpoint;
        connection.identity.socket = reply.ipc_socket;
        connection.identity.version = reply.version;
        Ok(connection)
    }

    /// Sets the time until which the next reply must be here.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    /// True if the server is there and the connection is in step.
    pub fn is_quiet(&self) -> bool {
        self.channel.is_quiet()
    }

    /// True if it was closed for replies because one stayed away.
    pub fn is_hung_up(&self) -> bool {
        self.hung_up
    }

    /// Reads bytes that follow a reply, as many as are there and at most `out`. [`LEAST`] bytes must come within the
    /// connection's patience.
    pub fn receive_some(&mut self, out: &mut [u8]) -> std::result::Result<usize, Broken> {
        self.in_time(|channel, deadline| channel.receive_some(out, deadline))
    }

    /// Writes at most `most` bytes that follow a reply to a file, and as many together as come soon; [`LEAST`] bytes must
    /// come within the connection's patience. 0 if that cannot be done here.
    pub fn receive_to_file(
        &mut self,
        pipe: &Pipe,
        file: &OwnedFd,
        offset: u64,
        most: usize,
    ) -> std::result::Result<usize, Broken> {
        let came = self.in_time(|channel, deadline| channel.gather(pipe, most, GATHER, deadline))?;
        pipe.drain(file, offset, came).map_err(|error| Broken { error, sent: true })?;
        Ok(came)
    }

    /// Receives bytes. Time in which nobody waits for them does not count.
    fn in_time(
        &mut self,
        receive: impl FnOnce(&Channel, Instant) -> std::result::Result<usize, Broken>,
    ) -> std::result::Result<usize, Broken> {
        let begun = Instant::now();
        let came = receive(&self.channel, begun + self.patience.saturating_sub(self.waited))?;
        self.waited += begun.elapsed();
        self.credit(came as u64);
        Ok(came)
    }

    /// What came was worth so many bytes (more), as it was compressed.
    pub fn credit(&mut self, bytes: u64) {
        self.came = self.came.saturating_add(bytes);
        if self.came >= LEAST {
            (self.waited, self.came) = (Duration::ZERO, 0);
        }
    }

    /// As [`Channel::set_low_water`].
    pub fn set_low_water(&self, bytes: usize) {
        self.channel.set_low_water(bytes);
    }

    /// Length in bytes of the reply that came last.
    pub fn last_reply_len(&self) -> usize {
        self.last_reply_len
    }

    /// Sends `count` requests back to back and hands each reply, in order, to `each`, which also receives the
    /// descriptors of that reply.
    ///
    /// # Errors
    /// Also if a reply stays away for longer than the connection's patience. The connection is closed for replies then, and
    /// those that were written before are still handed on: vineyardd carries nothing out whose reply is not among them,
    /// but the one request that it may be at.
    pub fn exchange(
        &mut self,
        frames: &[u8],
        count: usize,
        mut each: impl FnMut(&mut Connection, usize, &[u8]) -> std::result::Result<(), Broken>,
    ) -> std::result::Result<(), Broken> {
        let mut sent = 0;
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut failure = None;
        for index in 0..count {
            if let Some(rest) = frames.get(sent..).filter(|rest| !rest.is_empty() && failure.is_none()) {
                let n = self.channel.send_until_reply(rest, self.deadline);
                sent += n.map_err(|b| Broken { sent: b.sent || sent > 0, ..b })?;
            }
            if let Err(late) = self.channel.receive(&mut buffer, self.deadline) {
                if failure.is_some() || late.error.kind() != Kind::Timeout || !self.channel.hang_up() {
                    return Err(failure.unwrap_or(late));
                }
                self.hung_up = true;
                if self.channel.receive(&mut buffer, self.deadline).is_err() {
                    return Err(late);
                }
                failure = Some(late);
            }
            self.last_reply_len = buffer.len();
            (self.waited, self.came) = (Duration::ZERO, 0);
            each(self, index, &buffer)?;
            self.deadline = Instant::now() + self.patience;
        }
        if buffer.capacity() <= KEPT_BUFFER {
            self.buffer = buffer;
        }
        Ok(())
    }

    /// One request and its reply of type `kind`.
    pub fn call<T: DeserializeOwned>(&mut self, request: &Request, kind: &str) -> Answer<T> {
        let answers = self.calls(std::slice::from_ref(request), kind, |_, reply| Ok(reply))?;
        Ok(answers.and_then(|mut list| {
            let one = list.pop().ok_or_else(|| Error::new(Kind::Internal, "no answer to a request"))?;
            one.map_err(Error::from)
        }))
    }

    /// Requests of one type back to back. `take` turns a reply into what is returned, and receives its descriptors.
    ///
    /// The outer answer is an error if a request can't be sent at all (nothing is sent then).
    pub fn calls<T: DeserializeOwned, U>(
        &mut self,
        requests: &[Request],
        kind: &str,
        mut take: impl FnMut(&mut Connection, T) -> std::result::Result<U, Broken>,
    ) -> Answer<Vec<std::result::Result<U, Refusal>>> {
        let mut frames = Vec::new();
        for request in requests {
            if let Err(error) = push_frame(&mut frames, request) {
                return Ok(Err(error));
            }
        }
        let mut answers = Vec::with_capacity(requests.len());
        self.exchange(&frames, requests.len(), |connection, _, frame| {
            // After a malformed reply it is unknown how many descriptors follow.
            let parsed = parse::<T>(frame, kind).map_err(|error| Broken { error, sent: true })?;
            answers.push(match parsed {
                Ok(reply) => Ok(take(connection, reply)?),
                Err(refusal) => Err(refusal),
            });
            Ok(())
        })?;
        Ok(Ok(answers))
    }

    /// Receives the descriptors that a reply announced, and maps their files.
    pub fn accept_files(
        &mut self,
        memories: &Memories,
        fds: &[i64],
        payloads: &[Payload],
    ) -> std::result::Result<(), Broken> {
        for &number in fds {
            let sizes = payloads.iter().filter(|p| p.store_fd == number).map(|p| p.map_size);
            let Some(map_size) = sizes.max() else {
                return Err(bad_reply("announces a memory file that holds none of its blobs"));
            };
            let fd = self.channel.receive_fd(self.deadline)?;
            let opened = memories.open(self.generation, fd, map_size);
            self.files.insert(number, opened.map_err(|error| Broken { error, sent: true })?);
        }
        Ok(())
    }

    /// The memory file and range that a payload names, checked.
    pub fn locate(&self, payload: &Payload) -> std::result::Result<(Arc<MemoryFile>, Blob), Broken> {
        let key = BlobKey { instance: self.identity.instance, id: ObjectId(payload.object_id) };
        let Some(file) = self.files.get(&payload.store_fd) else {
            return Err(bad_reply(format!("puts blob {key} into a memory file that was never sent")));
        };
        // Were the number of a closed file used anew, this connection would not be told.
        if payload.map_size > file.segment.len() as u64 {
            return Err(bad_reply(format!("gives the memory file of blob {key} another size than before")));
        }
        let blob = Blob::new(key, file.segment.clone(), payload.data_offset, payload.data_size)
            .map_err(|error| Broken { error, sent: true })?;
        Ok((file.clone(), blob))
    }

    /// The places of blobs; those that don't exist, or are not sealed, are absent.
    pub fn get_buffers(&mut self, memories: &Memories, ids: &[ObjectId]) -> Answer<Vec<Blob>> {
        let mut found = Vec::with_capacity(ids.len());
        let chunks: Vec<&[ObjectId]> = ids.chunks(BLOBS_PER_REQUEST).collect();
        let unsealed = match self.get_chunks(memories, &chunks, &mut found)? {
            Ok(unsealed) => unsealed,
            Err(error) => return Ok(Err(error)),
        };
        // One unsealed blob makes the server refuse all of a request, so these are asked one by one.
        let singles: Vec<&[ObjectId]> = unsealed.into_iter().flat_map(|chunk| chunk.chunks(1)).collect();
        Ok(self.get_chunks(memories, &singles, &mut found)?.map(|_| found))
    }

    /// Unsealed blobs among these ids, with their sizes.
    pub fn unsealed(&mut self, memories: &Memories, ids: &[ObjectId]) -> Answer<Vec<(ObjectId, u64)>> {
        let chunks = ids.chunks(BLOBS_PER_REQUEST);
        let requests: Vec<Request> = chunks
            .map(|chunk| Request::GetBuffers { ids: chunk.iter().map(|id| id.0).collect(), unsealed_too: true })
            .collect();
        let mut found = Vec::new();
        let answers = self.calls(&requests, "get_buffers_reply", |connection, reply: GetBuffersReply| {
            connection.accept_files(memories, &reply.fds, &reply.payloads)?;
            let unsealed = reply.payloads.iter().filter(|payload| !payload.is_sealed);
            found.extend(unsealed.map(|payload| (ObjectId(payload.object_id), payload.data_size)));
            Ok(())
        })?;
        let refusals = |answers: Vec<std::result::Result<(), Refusal>>| match answers
            .into_iter()
            .filter_map(|answer| answer.err())
            .find(|refusal| !refusal.is_absence())
        {
            Some(refusal) => Err(refusal.into()),
            None => Ok(found),
        };
        Ok(answers.and_then(refusals))
    }

    /// One request per chunk. Returns the chunks that were refused for an unsealed blob.
    fn get_chunks<'a>(
        &mut self,
        memories: &Memories,
        chunks: &[&'a [ObjectId]],
        found: &mut Vec<Blob>,
    ) -> Answer<Vec<&'a [ObjectId]>> {
        let ids = |chunk: &[ObjectId]| chunk.iter().filter(|id| id.is_stored_blob()).map(|id| id.0).collect();
        let requests: Vec<Request> =
            chunks.iter().map(|chunk| Request::GetBuffers { ids: ids(chunk), unsealed_too: false }).collect();
        let answers = self.calls(&requests, "get_buffers_reply", |connection, reply: GetBuffersReply| {
            connection.accept_files(memories, &reply.fds, &reply.payloads)?;
            for payload in &reply.payloads {
                found.push(connection.locate(payload)?.1);
            }
            Ok(())
        })?;
        Ok(answers.and_then(|answers| {
            let mut unsealed = Vec::new();
            for (&chunk, answer) in chunks.iter().zip(answers) {
                match answer {
                    Ok(()) => {}
                    Err(refusal) if refusal.code == Refusal::OBJECT_NOT_SEALED => unsealed.push(chunk),
                    Err(refusal) if refusal.is_absence() => {}
                    Err(refusal) => return Err(refusal.into()),
                }
            }
            Ok(unsealed)
        }))
    }
}
