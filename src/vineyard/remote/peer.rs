//! Another vineyardd, over TCP.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::channel;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::fetch::Job;
use serde_json::{Map, Value};

use crate::error::{Context, Error, Kind, Result};
use crate::vineyard::connection::{Answer, Connection};
use crate::vineyard::request::{Empty, MigrateReply, Request, ShallowCopyReply, SizesReply, checked_id};
use crate::vineyard::store::InstanceInfo;
use crate::vineyard::wire::{Broken, bad_reply};
use crate::vineyard::{InstanceId, ObjectId};

/// Asks the local vineyardd for the instances of the cluster.
pub type Cluster<'a> = &'a dyn Fn() -> Result<BTreeMap<InstanceId, InstanceInfo>>;

/// How long an address is believed.
const ADDRESS_AGE: Duration = Duration::from_secs(5);
/// After a failure everybody is refused for so long, or for as long as the failure took, instead of waiting for the
/// same again.
const DOWN: Duration = Duration::from_secs(1);
/// How long an instance may take to copy an object for itself: it compresses, at 0.1 to 0.2 GB/s.
const MIGRATION: Duration = Duration::from_secs(3600);
/// Connections that are kept for the next request.
const IDLE: usize = 8;
/// And for how long: what stands between may forget a silent connection without a word.
const IDLE_AGE: Duration = Duration::from_secs(60);
/// A connection that was used before has this part of the patience for its first reply: if it is dead there is time for a
/// fresh one.
const USED_PART: u32 = 3;
/// Seconds of silence after which the kernel asks whether the other side is there, and between two such questions.
const KEEPALIVE: libc::c_int = 15;
/// Most blobs in one question for sizes.
const SIZES_PER_REQUEST: usize = 1024;

/// What is known of the vineyardd, and its connections.
#[derive(Default)]
struct State {
    endpoint: Option<(String, Instant)>,
    /// With the time since which nobody uses them.
    idle: Vec<(Connection, Instant)>,
    /// Until when everybody is refused, and why.
    down: Option<(Instant, Kind, String)>,
    queue: VecDeque<Job>,
    workers: usize,
}

/// See the [module](self).
pub struct Peer {
    /// Its number.
    pub instance: InstanceId,
    patience: Duration,
    state: Mutex<State>,
}

impl Peer {
    /// Nothing is known of it yet. Connecting, and each reply, may take `patience`.
    pub fn new(instance: InstanceId, patience: Duration) -> Self {
        Peer { instance, patience, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Finds out where it is, unless that was done a moment ago.
    ///
    /// # Errors
    /// `Unreachable` if the cluster does not know it (any more).
    pub fn locate(&self, cluster: Cluster) -> Result<()> {
        if self.state().endpoint.as_ref().is_some_and(|(_, since)| since.elapsed() < ADDRESS_AGE) {
            return Ok(());
        }
        let found = cluster();
        let mut state = self.state();
        let listed = match found {
            Ok(mut cluster) => cluster.remove(&self.instance),
            // What was known may still be right.
            Err(_) if state.endpoint.is_some() => return Ok(()),
            Err(error) => return Err(error).context(|| format!("looking for instance {}", self.instance)),
        };
        let Some(info) = listed else {
            state.endpoint = None;
            state.idle.clear();
            let what =
                format!("instance {} is not in the cluster: it ended, or runs under a new number", self.instance);
            return Err(Error::new(Kind::Unreachable, what));
        };
        if state.endpoint.as_ref().is_none_or(|(known, _)| *known != info.rpc_endpoint) {
            state.idle.clear();
            state.down = None;
        }
        state.endpoint = Some((info.rpc_endpoint, Instant::now()));
        Ok(())
    }

    /// A connection; `true` with it if it was used before, and so may turn out dead.
    ///
    /// # Errors
    /// `Unreachable`; `Stale` if another vineyardd is at its address.
    pub fn checkout(&self, fresh: bool) -> Result<(Connection, bool)> {
        self.checkout_until(fresh, Instant::now() + self.patience)
    }

    /// As [`Peer::checkout`]; the first reply must come until `deadline`.
    fn checkout_until(&self, fresh: bool, deadline: Instant) -> Result<(Connection, bool)> {
        let endpoint = {
            let mut state = self.state();
            state.idle.retain(|(_, since)| since.elapsed() < IDLE_AGE);
            while let Some((mut connection, _)) = if fresh { None } else { state.idle.pop() } {
                if connection.is_quiet() {
                    connection.set_deadline(deadline.min(Instant::now() + self.patience / USED_PART));
                    return Ok((connection, true));
                }
            }
            if let Some((_, kind, message)) = state.down.as_ref().filter(|(until, ..)| Instant::now() < *until) {
                return Err(Error::new(*kind, message.clone()));
            }
            match &state.endpoint {
                Some((endpoint, _)) => endpoint.clone(),
                None => return Err(Error::new(Kind::Unreachable, format!("no address of instance {}", self.instance))),
            }
        };
        let start = Instant::now();
        match self.connect(&endpoint, deadline) {
            Ok(mut connection) => {
                connection.set_deadline(deadline);
                if self.state().down.take().is_some() {
                    tracing::info!(instance = %self.instance, endpoint, "the instance is back");
                }
                Ok((connection, false))
            }
            Err(error) => Err(self.failed(&endpoint, error, start.elapsed())),
        }
    }

    /// Makes an error of the connection say which instance, and keeps others from waiting for the same.
    fn failed(&self, endpoint: &str, error: Error, took: Duration) -> Error {
        let kind = match error.kind() {
            Kind::Stale | Kind::Malformed | Kind::Full => error.kind(),
            _ => Kind::Unreachable,
        };
        let error = Error::new(kind, format!("instance {} at {endpoint}", self.instance)).with_source(error);
        if kind != Kind::Full {
            tracing::warn!(instance = %self.instance, endpoint, "a remote instance fails: {error}");
            let mut state = self.state();
            state.down = Some((Instant::now() + took.max(DOWN), kind, error.to_string()));
            // It may have come back elsewhere.
            if let Some((_, since)) = &mut state.endpoint {
                *since = since.checked_sub(ADDRESS_AGE).unwrap_or(*since);
            }
        }
        error
    }

    /// The same for an error of a request on a connection.
    pub fn broken(&self, error: Error) -> Error {
        let endpoint = self.state().endpoint.as_ref().map_or_else(String::new, |(endpoint, _)| endpoint.clone());
        match error.kind() {
            Kind::Unreachable => error,
            _ => self.failed(&endpoint, error, Duration::ZERO),
        }
    }

    /// A connection that was used before fails: whatever cut it off may have cut off all others, too.
    fn distrust(&self) {
        // Closed without the lock.
        drop(std::mem::take(&mut self.state().idle));
    }

    /// Takes back a connection whose last reply was read whole.
    pub fn checkin(&self, connection: Connection) {
        let mut state = self.state();
        if state.idle.len() < IDLE {
            state.idle.push((connection, Instant::now()));
        }
    }

    fn connect(&self, endpoint: &str, deadline: Instant) -> Result<Connection> {
        let mut failure = Error::new(Kind::Unreachable, "it has no address");
        for address in resolve(endpoint, deadline)? {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let attempt = TcpStream::connect_timeout(&address, left).and_then(|stream| {
                stream.set_nodelay(true)?;
                stream.set_nonblocking(true)?;
                watch(&stream, self.patience);
                Ok(stream)
            });
            match attempt {
                Ok(stream) => {
                    let connection = Connection::register_peer(OwnedFd::from(stream), deadline, self.patience)?;
                    let found = connection.identity.instance;
                    if found != self.instance {
                        let what = format!("{address} is instance {found} now: what {} held is gone", self.instance);
                        return Err(Error::stale(what));
                    }
                    return Ok(connection);
                }
                Err(error) => failure = Error::new(Kind::Unreachable, format!("connecting to {address}: {error}")),
            }
        }
        Err(failure)
    }

    /// Runs a request that may be sent twice: again on a fresh connection if the first one breaks, once, and until one
    /// deadline for both. That is where a connection is dead that was used before, and where one breaks in the middle of
    /// what it brings: `operation` says with its error whether something came.
    pub fn twice<T>(
        &self,
        mut operation: impl FnMut(&mut Connection) -> std::result::Result<Result<T>, (Broken, bool)>,
    ) -> Result<T> {
        let mut deadline = Instant::now() + self.patience;
        let mut fresh = false;
        loop {
            let (mut connection, used) = self.checkout_until(fresh, deadline)?;
            match operation(&mut connection) {
                Ok(answer) => {
                    self.checkin(connection);
                    return answer;
                }
                Err((broken, worth)) => {
                    let kind = broken.error.kind();
                    // Whoever asked wants no more.
                    if kind == Kind::Busy {
                        return Err(broken.error);
                    }
                    if used {
                        self.distrust();
                    }
                    // Of one that stood still in the middle there is no time left for another.
                    let is_cut = match kind {
                        Kind::Unavailable => used || worth,
                        Kind::Timeout => used && !worth,
                        _ => false,
                    };
                    if fresh || !is_cut {
                        return Err(self.broken(broken.error));
                    }
                    if worth {
                        deadline = Instant::now() + self.patience;
                    }
                    tracing::debug!(instance = %self.instance, "a connection is cut off: {}", broken.error);
                    fresh = true;
                }
            }
        }
    }

    fn ask<T>(&self, mut operation: impl FnMut(&mut Connection) -> Answer<T>) -> Result<T> {
        self.twice(|connection| operation(connection).map_err(|broken| (broken, false)))
    }

    /// Sizes of its blobs; those that don't exist are absent. The bytes are not touched.
    pub fn sizes(&self, ids: &[ObjectId]) -> Result<HashMap<ObjectId, u64>> {
        self.ask(|connection| sizes(connection, ids))
    }

    /// A permanent copy of an object's metadata there, with some values replaced. Made where the members live: their
    /// owner frees what, as far as it knows, no other object uses.
    pub fn shallow_copy(&self, id: ObjectId, extra: &Map<String, Value>) -> Result<ObjectId> {
        // A connection that may turn out dead would leave it open whether the copy was made.
        let (mut connection, _) = self.checkout(true)?;
        let request = Request::ShallowCopy { id: id.0, extra };
        let made = connection.call::<ShallowCopyReply>(&request, "shallow_copy_reply");
        let copy = checked_id(made.map_err(|broken| self.broken(broken.error))??.target_id)?;
        let persisted = connection.call::<Empty>(&Request::Persist { id: copy.0 }, "persist_reply");
        persisted.map_err(|broken| self.broken(broken.error))??;
        self.checkin(connection);
        Ok(copy)
    }

    /// Lets it make a permanent copy of an object of another instance.
    pub fn migrate(&self, id: ObjectId) -> Result<ObjectId> {
        let (mut connection, _) = self.checkout(true)?;
        connection.set_deadline(Instant::now() + MIGRATION);
        let reply =
            connection.call::<MigrateReply>(&Request::MigrateObject { object_id: id.0 }, "migrate_object_reply");
        let copy = checked_id(reply.map_err(|broken| self.broken(broken.error))??.object_id)?;
        self.checkin(connection);
        Ok(copy)
    }

    /// Deletes objects of this instance with their members and blobs.
    pub fn delete(&self, ids: &[ObjectId]) -> Result<()> {
        let id = ids.iter().map(|id| id.0).collect();
        let request = Request::DelData { id, force: false, deep: true, memory_trim: false, fastpath: false };
        match self.ask(|connection| connection.call::<Empty>(&request, "del_data_reply")) {
            Err(error) if error.kind() != Kind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Queues a job, and says whether a thread more is to be started for it.
    pub fn push(&self, job: Job, most_workers: usize) -> bool {
        let mut state = self.state();
        state.queue.push_back(job);
        let start = state.workers < most_workers;
        if start {
            state.workers += 1;
        }
        start
    }

    /// The next job of a worker; without one the worker is to end.
    pub fn pop(&self) -> Option<Job> {
        let mut state = self.state();
        let job = state.queue.pop_front();
        if job.is_none() {
            state.workers = state.workers.saturating_sub(1);
        }
        job
    }

    /// A worker that was to be started could not be. The jobs nobody will do, if it would have been the only one.
    pub fn no_worker(&self) -> Vec<Job> {
        let mut state = self.state();
        state.workers = state.workers.saturating_sub(1);
        if state.workers == 0 { state.queue.drain(..).collect() } else { Vec::new() }
    }

    /// True if a job waits for a worker.
    pub fn is_busy(&self) -> bool {
        !self.state().queue.is_empty()
    }
}

/// Sizes of blobs by `get_data`, which answers for blobs of the asked instance.
pub fn sizes(connection: &mut Connection, ids: &[ObjectId]) -> Answer<HashMap<ObjectId, u64>> {
    let requests: Vec<Request> = ids
        .chunks(SIZES_PER_REQUEST)
        .map(|ids| Request::GetData { id: ids.iter().map(|id| id.0).collect(), sync_remote: false, wait: false })
        .collect();
    let mut sizes = HashMap::with_capacity(ids.len());
    let answers = connection.calls(&requests, "get_data_reply", |_, reply: SizesReply| {
        for (text, value) in reply.content.map(|content| content.0).unwrap_or_default() {
            match (text.parse(), value.length) {
                (Ok(id), Some(length)) => drop(sizes.insert(id, length)),
                _ => return Err(bad_reply(format!("gives no size of blob {text:?}"))),
            }
        }
        Ok(())
    })?;
    let refused = answers.and_then(|answers| match answers.into_iter().find_map(Result::err) {
        Some(refusal) => Err(refusal.into()),
        None => Ok(()),
    });
    Ok(refused.map(|()| sizes))
}

/// Lets the kernel find out that the other side is gone although it never said so. Best effort.
fn watch(stream: &TcpStream, patience: Duration) {
    let millis = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
    let options = [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, KEEPALIVE),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, KEEPALIVE),
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, millis),
    ];
    for (level, name, value) in options {
        let (socket, size) = (stream.as_raw_fd(), size_of_val(&value) as libc::socklen_t);
        // SAFETY: the option is an int, which lives until after the call.
        unsafe { libc::setsockopt(socket, level, name, (&raw const value).cast(), size) };
    }
}

/// Addresses of `host:port`, at least one. A host that is this one is sought on the loopback too: its name need not be
/// known here.
fn resolve(endpoint: &str, deadline: Instant) -> Result<Vec<SocketAddr>> {
    let unusable = || Error::new(Kind::Unreachable, format!("{endpoint:?} is no address: has it no TCP side?"));
    let (host, port) = endpoint.rsplit_once(':').ok_or_else(unusable)?;
    let port: u16 = port.parse().ok().filter(|port| *port != 0).ok_or_else(unusable)?;
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let here = this_host().is_some_and(|name| name == host);
    // The resolver knows no deadline: it waits in a thread of its own.
    let (send, answer) = channel();
    let name = host.clone();
    let resolver = move || drop(send.send((name.as_str(), port).to_socket_addrs().map(Vec::from_iter)));
    std::thread::Builder::new().name("resolver".into()).spawn(resolver).context(|| "no thread for names".into())?;
    let found = answer.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    let (mut addresses, failure) = match found {
        Ok(Ok(addresses)) => (addresses, None),
        Ok(Err(error)) => (Vec::new(), Some(error.to_string())),
        Err(_) => (Vec::new(), Some("no answer in time".to_owned())),
    };
    let loopback = SocketAddr::from(([127, 0, 0, 1], port));
    if here && !addresses.contains(&loopback) {
        addresses.push(loopback);
    }
    match failure.filter(|_| addresses.is_empty()) {
        Some(failure) => Err(Error::new(Kind::Unreachable, format!("resolving host {host:?}: {failure}"))),
        None => Ok(addresses),
    }
}

/// The name of this machine, which a vineyardd on it gives as its host.
fn this_host() -> Option<String> {
    let mut name = [0u8; 256];
    // SAFETY: the kernel writes at most so many bytes into the array, which lives until after the call.
    let failed = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) } != 0;
    let text = std::ffi::CStr::from_bytes_until_nul(&name).ok().filter(|_| !failed)?;
    text.to_str().ok().map(str::to_owned)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn endpoints_become_addresses() {
        assert_eq!(resolve("127.0.0.1:9600", soon()).unwrap(), [SocketAddr::from(([127, 0, 0, 1], 9600))]);
        assert_eq!(resolve("[::1]:9600", soon()).unwrap(), ["[::1]:9600".parse().unwrap()]);
        let here = this_host().unwrap();
        assert!(resolve(&format!("{here}:9600"), soon()).unwrap().contains(&SocketAddr::from(([127, 0, 0, 1], 9600))));
        for wrong in ["", "0.0.0.0:0", "host", "host:", "host:x", "host:70000", "no.such.host.invalid:9600"] {
            assert_eq!(resolve(wrong, soon()).unwrap_err().kind(), Kind::Unreachable, "{wrong}");
        }
    }

    #[test]
    fn an_instance_that_nobody_knows_is_unreachable() {
        let peer = Peer::new(InstanceId(7), Duration::from_secs(1));
        let error = peer.locate(&|| Ok(BTreeMap::new())).unwrap_err();
        assert_eq!(error.kind(), Kind::Unreachable);
        assert!(error.to_string().contains("i7"), "{error}");
        assert_eq!(peer.checkout(false).err().unwrap().kind(), Kind::Unreachable);
    }
}
