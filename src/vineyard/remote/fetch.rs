//! Threads that bring blobs here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::inflate::{Inflate, MAX_CHUNK};
use super::peer::{Peer, sizes};
use super::transfer::Transfer;
use crate::error::{Error, Kind, Result};
use crate::vineyard::ObjectId;
use crate::vineyard::connection::{Answer, Connection};
use crate::vineyard::pipe::Pipe;
use crate::vineyard::request::{RemoteBuffersReply, Request};
use crate::vineyard::wire::{Broken, bad_reply};

/// Bytes that are taken from a socket in one go: they should still be in the processor's cache when they are stored.
const BUFFER: usize = 256 << 10;
/// Smaller blobs are not worth a pipe.
const PIPED: u64 = 1 << 20;
/// Bytes that are waited for together while so many are wanted: more than are taken in one go, so that they will come.
const LOW_WATER: (usize, u64) = (256 << 10, 3 << 20);

/// Blobs that are asked for with one request: a large one, or several small ones.
pub type Job = Vec<Arc<Transfer>>;

/// Counts since the client was made.
#[derive(Default)]
pub struct Counters {
    /// Requests to other instances.
    pub requests: AtomicU64,
    /// Bytes of blobs that came.
    pub bytes: AtomicU64,
    /// Blobs that came whole.
    pub blobs: AtomicU64,
    /// Transfers that failed.
    pub failures: AtomicU64,
}

/// What the threads share.
pub struct Fetcher {
    /// Connections to one instance that bring blobs at the same time.
    pub connections: usize,
    /// Counts.
    pub counters: Counters,
}

/// A job that a thread works on. What it has not finished in the end, a panic included, fails: somebody waits for it.
struct Running<'a> {
    job: &'a Job,
    /// What [`Transfer::start`] said of each.
    runs: Vec<u64>,
}

impl<'a> Running<'a> {
    fn start(job: &'a Job) -> Self {
        Running { job, runs: job.iter().map(|transfer| transfer.start()).collect() }
    }

    fn fail(&self, error: &Error) {
        self.job.iter().zip(&self.runs).for_each(|(transfer, run)| transfer.fail(*run, error));
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.fail(&Error::new(Kind::Internal, "a transfer was given up"));
    }
}

/// Queues a job of transfers that have the phase "queued".
pub fn enqueue(fetcher: &Arc<Fetcher>, peer: &Arc<Peer>, job: Job) {
    if !peer.push(job, fetcher.connections) {
        return;
    }
    let (worker_fetcher, worker_peer) = (fetcher.clone(), peer.clone());
    let work = move || {
        while let Some(job) = worker_peer.pop() {
            run(&worker_fetcher, &worker_peer, &Running::start(&job));
        }
    };
    if let Err(error) = std::thread::Builder::new().name("remote".into()).spawn(work) {
        let error = Error::from(error);
        peer.no_worker().iter().flatten().for_each(|transfer| transfer.refuse(&error));
    }
}

fn run(fetcher: &Fetcher, peer: &Peer, job: &Running) {
    let mut parked = false;
    let done = peer.twice(|connection| {
        let before = fetcher.counters.bytes.load(Ordering::Relaxed);
        fetch(fetcher, peer, connection, job, &mut parked).map_err(|broken| {
            // What came of a transfer that was cut off is there; a peer that closes at once would do so again.
            let came = fetcher.counters.bytes.load(Ordering::Relaxed) != before;
            (broken, came && !parked)
        })
    });
    match done {
        Ok(()) => {}
        // The rest is not read: the connection ends here.
        Err(_) if parked => {}
        Err(error) => give_up(fetcher, job, &error),
    }
}

fn give_up(fetcher: &Fetcher, job: &Running, error: &Error) {
    fetcher.counters.failures.fetch_add(1, Ordering::Relaxed);
    job.fail(error);
}

/// One request, its bytes, and the question whether the blobs existed to the end.
fn fetch(
    fetcher: &Fetcher,
    peer: &Peer,
    connection: &mut Connection,
    running: &Running,
    parked: &mut bool,
) -> Answer<()> {
    let job = running.job;
    let count = |requests| fetcher.counters.requests.fetch_add(requests, Ordering::Relaxed);
    let ids: BTreeMap<usize, u64> = job.iter().map(|transfer| transfer.key().id.0).enumerate().collect();
    let request =
        Request::GetRemoteBuffers { num: ids.len(), ids, unsealed_too: false, compress: false, use_rdma: false };
    count(1);
    let hurried = || peer.is_busy();
    let came = connection.calls(&[request], "get_buffers_reply", |connection, reply: RemoteBuffersReply| {
        receive(fetcher, connection, job, &reply, &hurried, parked)
    })?;
    let refused = match came.map(|mut answers| answers.pop()) {
        Ok(Some(Ok(()))) => None,
        Ok(Some(Err(refusal))) => Some(Error::from(refusal)),
        Ok(None) => Some(Error::new(Kind::Internal, "no answer to a request")),
        Err(error) => Some(error),
    };
    if let Some(error) = refused {
        return Ok(Err(match error.kind() {
            Kind::NotFound => Error::stale("the blobs are gone from their instance").with_source(error),
            _ => error,
        }));
    }
    let ids: Vec<ObjectId> = job.iter().map(|transfer| transfer.key().id).collect();
    count(1);
    let there = match sizes(connection, &ids)? {
        Ok(there) => there,
        Err(error) => return Ok(Err(error)),
    };
    for (transfer, run) in job.iter().zip(&running.runs) {
        if there.get(&transfer.key().id) == Some(&transfer.len()) && transfer.has_all() {
            fetcher.counters.blobs.fetch_add(1, Ordering::Relaxed);
            transfer.complete();
            tracing::debug!(blob = %transfer.key(), size = transfer.len(), "a blob came");
        } else {
            transfer.fail(*run, &Error::stale(format!("blob {} is gone from its instance", transfer.key())));
        }
    }
    Ok(Ok(()))
}

/// Takes the bytes that follow a reply.
fn receive(
    fetcher: &Fetcher,
    connection: &mut Connection,
    job: &Job,
    reply: &RemoteBuffersReply,
    hurried: &dyn Fn() -> bool,
    parked: &mut bool,
) -> std::result::Result<(), Broken> {
    let ends = |error| Broken { error, sent: true };
    let mut inflate = if reply.compress { Some(Inflate::new().map_err(ends)?) } else { None };
    let piped = !reply.compress && job.iter().any(|transfer| transfer.len() >= PIPED);
    let mut pipe = if piped { Pipe::new().ok() } else { None };
    let mut buffer = vec![0; BUFFER];
    let mut low_water = 1;
    let mut expected = job.iter();
    for payload in &reply.payloads {
        // In the order of the request; what does not exist is left out.
        let Some(transfer) = expected.find(|transfer| transfer.key().id.0 == payload.object_id) else {
            return Err(bad_reply(format!("has the blob {}, which was not asked for", ObjectId(payload.object_id))));
        };
        if payload.data_size != transfer.len() {
            let key = transfer.key();
            return Err(bad_reply(format!("gives blob {key} {} bytes, not {}", payload.data_size, transfer.len())));
        }
        let mut position = 0;
        if let Some(inflate) = &mut inflate {
            while position < transfer.len() {
                let chunk = chunk(connection, &mut buffer)?;
                let before = position;
                fetcher.counters.bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                let keep = |bytes: &[u8]| -> Result<()> {
                    if bytes.len() as u64 > transfer.len() - position {
                        return Err(Error::malformed(format!("more bytes than blob {} has", transfer.key())));
                    }
                    transfer.store(position, bytes)?;
                    position += bytes.len() as u64;
                    Ok(())
                };
                inflate.chunk(chunk, keep).map_err(ends)?;
                connection.credit(position - before);
            }
            continue;
        }
        while position < transfer.len() {
            let Some(wanted) = transfer.wanted(position, hurried) else {
                *parked = true;
                tracing::debug!(blob = %transfer.key(), position, size = transfer.len(), "a transfer is parked");
                return Err(ends(Error::new(Kind::Busy, "enough")));
            };
            let due = if wanted >= LOW_WATER.1 { LOW_WATER.0 } else { 1 };
            if due != low_water {
                connection.set_low_water(due);
                low_water = due;
            }
            let straight = pipe.as_ref().and_then(|pipe| {
                transfer.receive(position, wanted, |file, offset, most| {
                    connection.receive_to_file(pipe, file, offset, most)
                })
            });
            match straight.transpose()? {
                None => {}
                Some(0) => pipe = None,
                Some(n) => {
                    fetcher.counters.bytes.fetch_add(n, Ordering::Relaxed);
                    position += n;
                    continue;
                }
            }
            let most = usize::try_from(wanted).unwrap_or(BUFFER).min(buffer.len());
            let part = buffer.get_mut(..most).unwrap_or_default();
            let n = connection.receive_some(part)?;
            fetcher.counters.bytes.fetch_add(n as u64, Ordering::Relaxed);
            transfer.store(position, part.get(..n).unwrap_or_default()).map_err(ends)?;
            position += n as u64;
        }
    }
    // Replies are shorter.
    if low_water != 1 {
        connection.set_low_water(1);
    }
    Ok(())
}

/// One compressed chunk.
fn chunk<'b>(connection: &mut Connection, buffer: &'b mut Vec<u8>) -> std::result::Result<&'b [u8], Broken> {
    let mut header = [0; 8];
    exactly(connection, &mut header)?;
    let len = u64::from_le_bytes(header);
    if len == 0 || len > MAX_CHUNK {
        return Err(bad_reply(format!("announces a chunk of {len} bytes")));
    }
    if buffer.len() < len as usize {
        buffer.resize(len as usize, 0);
    }
    let part = buffer.get_mut(..len as usize).unwrap_or_default();
    exactly(connection, part)?;
    Ok(part)
}

fn exactly(connection: &mut Connection, out: &mut [u8]) -> std::result::Result<(), Broken> {
    let mut done = 0;
    while let Some(rest) = out.get_mut(done..).filter(|rest| !rest.is_empty()) {
        done += connection.receive_some(rest)?;
    }
    Ok(())
}

/// How long a transfer may stand still before its readers give up: longer than the deadline of its connection, which
/// knows the reason.
pub fn patience(deadline: Duration) -> Duration {
    deadline * 2 + Duration::from_secs(1)
}
