//! Against a peer that is made up: honest, broken, slow, or not there.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::Instant;

use serde_json::{Value, json};

use super::super::store::InstanceInfo;
use super::*;

const THERE: InstanceId = InstanceId(4);
/// With peers that keep one waiting.
const PATIENCE: Duration = Duration::from_secs(3);
/// With all others: a busy machine is no fault of theirs.
const LONG: Duration = Duration::from_secs(30);

/// What a peer does wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    /// Closes the connection in the middle of the bytes.
    Short,
    /// Stands still in the middle of the bytes.
    Stalls,
    /// Sends a byte now and then.
    Trickles,
    /// Announces a byte more than there is.
    Longer,
    /// Announces another blob.
    Other,
    /// Forgets the blob while it sends it.
    Deletes,
    /// Is another instance.
    Stranger,
    /// Answers nothing.
    Silent,
    /// Compresses, whatever it is asked.
    Zstd,
    /// Says that it compresses, and does not.
    FalseZstd,
}

struct Shared {
    blobs: Mutex<BTreeMap<u64, Arc<Vec<u8>>>>,
    fault: Mutex<Fault>,
    connections: AtomicUsize,
    downloads: AtomicUsize,
    /// So many connections, the first ones, have been forgotten by what stands between: nothing passes them any more.
    forgotten: AtomicUsize,
    /// The next transfer is cut off in the middle.
    cut: AtomicBool,
    stop: AtomicBool,
}

struct FakePeer {
    port: u16,
    shared: Arc<Shared>,
}

fn id(number: u64) -> u64 {
    1 << 63 | number
}

fn key(number: u64) -> BlobKey {
    BlobKey { instance: THERE, id: ObjectId(id(number)) }
}

fn bytes(number: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(31 + number) >> 3) as u8).collect()
}

impl FakePeer {
    fn start(sizes: &[usize]) -> Self {
        let numbered = (1..).zip(sizes);
        let blobs = numbered.map(|(number, len)| (id(number), Arc::new(bytes(number, *len)))).collect();
        let shared = Arc::new(Shared {
            blobs: Mutex::new(blobs),
            fault: Mutex::new(Fault::None),
            connections: AtomicUsize::new(0),
            downloads: AtomicUsize::new(0),
            forgotten: AtomicUsize::new(0),
            cut: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if accepting.stop.load(Ordering::Relaxed) {
                    return;
                }
                let number = accepting.connections.fetch_add(1, Ordering::Relaxed);
                let shared = accepting.clone();
                std::thread::spawn(move || serve(stream.unwrap(), &shared, number));
            }
        });
        FakePeer { port, shared }
    }

    fn set(&self, fault: Fault) {
        *self.shared.fault.lock().unwrap() = fault;
    }

    fn cluster(&self) -> Result<BTreeMap<InstanceId, InstanceInfo>> {
        cluster_at(self.port)
    }

    fn downloads(&self) -> usize {
        self.shared.downloads.load(Ordering::Relaxed)
    }
}

impl Drop for FakePeer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

fn cluster_at(port: u16) -> Result<BTreeMap<InstanceId, InstanceInfo>> {
    let rpc_endpoint = format!("127.0.0.1:{port}");
    let info = InstanceInfo { hostname: "elsewhere".into(), rpc_endpoint, ipc_socket: String::new(), shared: true };
    Ok(BTreeMap::from([(THERE, info)]))
}

fn send(stream: &mut TcpStream, reply: &Value) -> std::io::Result<()> {
    let text = reply.to_string();
    stream.write_all(&(text.len() as u64).to_le_bytes())?;
    stream.write_all(text.as_bytes())
}

fn serve(mut stream: TcpStream, shared: &Shared, number: usize) -> Option<()> {
    loop {
        let mut header = [0; 8];
        stream.read_exact(&mut header).ok()?;
        let mut frame = vec![0; u64::from_le_bytes(header) as usize];
        stream.read_exact(&mut frame).ok()?;
        let request: Value = serde_json::from_slice(&frame).unwrap();
        let fault = *shared.fault.lock().unwrap();
        if fault == Fault::Silent || number < shared.forgotten.load(Ordering::Relaxed) {
            std::thread::sleep(LONG);
            return None;
        }
        let blobs = shared.blobs.lock().unwrap().clone();
        match request["type"].as_str()? {
            "register_request" => {
                let instance = if fault == Fault::Stranger { 9 } else { THERE.0 };
                let reply = json!({"type": "register_reply", "instance_id": instance, "ipc_socket": "/x",
                    "rpc_endpoint": "x:1", "store_match": true, "version": "0.24.2"});
                send(&mut stream, &reply).ok()?;
            }
            "get_data_request" => {
                let mut content = serde_json::Map::new();
                for id in request["id"].as_array()?.iter().filter_map(Value::as_u64) {
                    if let Some(blob) = blobs.get(&id) {
                        let text = ObjectId(id).to_string();
                        content.insert(text.clone(), json!({"id": text, "length": blob.len()}));
                    }
                }
                send(&mut stream, &json!({"type": "get_data_reply", "content": content})).ok()?;
            }
            "get_remote_buffers_request" => {
                shared.downloads.fetch_add(1, Ordering::Relaxed);
                assert_eq!((&request["compress"], &request["use_rdma"]), (&json!(false), &json!(false)));
                let asked = (0..request["num"].as_u64()?).map(|i| request[i.to_string()].as_u64().unwrap());
                let found: Vec<(u64, &Arc<Vec<u8>>)> = asked.filter_map(|id| Some((id, blobs.get(&id)?))).collect();
                let payload = |(id, blob): &(u64, &Arc<Vec<u8>>)| {
                    let extra = usize::from(fault == Fault::Longer);
                    let id = if fault == Fault::Other { id + 1000 } else { *id };
                    json!({"object_id": id, "data_size": blob.len() + extra, "store_fd": -1, "data_offset": 0})
                };
                let payloads: Vec<Value> = found.iter().map(payload).collect();
                let compress = matches!(fault, Fault::Zstd | Fault::FalseZstd);
                let reply = json!({"type": "get_buffers_reply", "payloads": payloads, "num": payloads.len(), "fds": [],
                    "compress": compress});
                send(&mut stream, &reply).ok()?;
                let mut encoder = zstd::stream::raw::Encoder::new(1).unwrap();
                for (id, blob) in found {
                    if shared.cut.swap(false, Ordering::Relaxed) {
                        stream.write_all(&blob[..blob.len() / 2]).ok()?;
                        return None;
                    }
                    match fault {
                        Fault::Short | Fault::Stalls => {
                            stream.write_all(&blob[..blob.len() / 2]).ok()?;
                            if fault == Fault::Stalls {
                                std::thread::sleep(LONG);
                            }
                            return None;
                        }
                        Fault::Trickles => {
                            for byte in blob.iter() {
                                stream.write_all(&[*byte]).ok()?;
                                std::thread::sleep(PATIENCE / 100);
                            }
                        }
                        Fault::Zstd => {
                            for part in blob.chunks(100_000) {
                                let chunk = compressed(&mut encoder, part);
                                stream.write_all(&(chunk.len() as u64).to_le_bytes()).ok()?;
                                stream.write_all(&chunk).ok()?;
                            }
                        }
                        _ => stream.write_all(blob).ok()?,
                    }
                    if fault == Fault::Deletes {
                        shared.blobs.lock().unwrap().remove(&id);
                    }
                }
            }
            other => panic!("{other} is not for other instances"),
        }
    }
}

fn compressed(encoder: &mut zstd::stream::raw::Encoder, part: &[u8]) -> Vec<u8> {
    use zstd::stream::raw::{InBuffer, Operation, OutBuffer};
    let mut space = vec![0; part.len() * 2 + 1000];
    let mut out = OutBuffer::around(&mut space);
    let mut input = InBuffer::around(part);
    while input.pos() < part.len() {
        encoder.run(&mut input, &mut out).unwrap();
    }
    while encoder.flush(&mut out).unwrap() > 0 {}
    out.as_slice().to_vec()
}

fn remote() -> Remote {
    remote_with(RemoteOptions::default())
}

fn remote_with(options: RemoteOptions) -> Remote {
    Remote::new(options, LONG)
}

fn impatient() -> Remote {
    Remote::new(RemoteOptions::default(), PATIENCE)
}

/// Waits until a transfer that nobody reads from has been given up.
fn wait_parked(remote: &Remote, number: u64) {
    let start = Instant::now();
    while remote.cache().peek(key(number)).unwrap().is_active() {
        assert!(start.elapsed() < LONG, "it still comes");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn read(remote: &Remote, peer: &FakePeer, number: u64, offset: u64, len: usize) -> Result<Vec<u8>> {
    let cluster = || peer.cluster();
    let mut out = vec![0; len];
    remote.read(key(number), offset, &mut out, &cluster)?;
    remote.verify(&[key(number)], &cluster)?;
    Ok(out)
}

#[test]
fn blobs_come_once_however_many_read() {
    let peer = FakePeer::start(&[5 << 20, 3000, 100]);
    let remote = remote();
    let whole = bytes(1, 5 << 20);
    std::thread::scope(|scope| {
        for reader in 0..8u64 {
            let (remote, peer, whole) = (&remote, &peer, &whole);
            scope.spawn(move || {
                for piece in 0..40 {
                    let offset = (piece * 7 + reader * 5) % 40 * (128 << 10);
                    let found = read(remote, peer, 1, offset, 128 << 10).unwrap();
                    assert!(found == whole[offset as usize..][..128 << 10]);
                }
            });
        }
    });
    // Once, unless the machine is so slow that readers pause for longer than a transfer waits for them; never for each.
    let before = peer.downloads();
    assert!((1..8).contains(&before), "{before} downloads");
    let cluster = || peer.cluster();
    remote.want(&[(key(2), 0..10), (key(3), 0..10)], false, &cluster).unwrap();
    assert_eq!(read(&remote, &peer, 3, 50, 50).unwrap(), &bytes(3, 100)[50..]);
    assert_eq!(read(&remote, &peer, 2, 0, 3000).unwrap(), bytes(2, 3000));
    assert_eq!(peer.downloads(), before + 1, "small ones come together");
    let came = remote.status().bytes;
    assert!(came == (5 << 20) + 3100 || before > 1 && came > 5 << 20, "{came} bytes");
    assert!(remote.blob(key(1)).unwrap().is_some());
    assert_eq!(read(&remote, &peer, 1, 5 << 20, 1).unwrap_err().kind(), Kind::Malformed);
    assert_eq!(read(&remote, &peer, 77, 0, 1).unwrap_err().kind(), Kind::Stale);
}

#[test]
fn what_nobody_reads_does_not_come() {
    let len = 64 << 20;
    let peer = FakePeer::start(&[len]);
    let remote = remote();
    assert_eq!(read(&remote, &peer, 1, 0, 4096).unwrap(), &bytes(1, len)[..4096]);
    assert!(remote.status().bytes < 1 << 20, "{:?}", remote.status());
    assert!(remote.blob(key(1)).unwrap().is_none());
    wait_parked(&remote, 1);
    // It begins anew and keeps what is here.
    let tail = read(&remote, &peer, 1, len as u64 - 5000, 5000).unwrap();
    assert!(tail == bytes(1, len)[len - 5000..]);
    assert_eq!(peer.downloads(), 2);
}

#[test]
fn compressed_replies_are_decoded() {
    let peer = FakePeer::start(&[3 << 20, 10, 250_000]);
    peer.set(Fault::Zstd);
    let remote = remote();
    let cluster = || peer.cluster();
    remote.want(&[(key(1), 0..1), (key(2), 0..1), (key(3), 0..1)], false, &cluster).unwrap();
    for (number, len) in [(1, 3 << 20), (2, 10), (3, 250_000)] {
        assert!(read(&remote, &peer, number, 0, len).unwrap() == bytes(number, len));
    }
}

#[test]
fn faults_are_errors_in_time_and_pass() {
    std::thread::scope(|scope| {
        for (fault, kind) in [
            (Fault::Short, Kind::Unreachable),
            (Fault::Stalls, Kind::Unreachable),
            (Fault::Trickles, Kind::Unreachable),
            (Fault::Longer, Kind::Malformed),
            (Fault::Other, Kind::Malformed),
            (Fault::Deletes, Kind::Stale),
            (Fault::Stranger, Kind::Stale),
            (Fault::Silent, Kind::Unreachable),
            (Fault::FalseZstd, Kind::Malformed),
        ] {
            scope.spawn(move || fails_and_passes(fault, kind));
        }
    });
}

#[test]
fn connections_that_were_forgotten_in_silence_cost_no_read() {
    let peer = FakePeer::start(&[1000; 8]);
    let remote = impatient();
    let reader = |number| assert_eq!(read(&remote, &peer, number, 0, 1000).unwrap(), bytes(number, 1000));
    std::thread::scope(|scope| (1..=4).for_each(|number| drop(scope.spawn(move || reader(number)))));
    let before = peer.shared.connections.load(Ordering::Relaxed);
    peer.shared.forgotten.store(before, Ordering::Relaxed);
    let start = Instant::now();
    reader(5);
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    // The others are not believed either.
    let start = Instant::now();
    (6..=8).for_each(reader);
    assert!(start.elapsed() < PATIENCE / 3, "{:?}", start.elapsed());
    assert_eq!(remote.status().failures, 0);
    assert!(peer.shared.connections.load(Ordering::Relaxed) > before);
}

#[test]
fn a_transfer_that_is_cut_off_in_the_middle_goes_on_over_a_fresh_connection() {
    let len = 8 << 20;
    let peer = FakePeer::start(&[len, 1000]);
    let remote = remote();
    remote.size(key(1), &|| peer.cluster()).unwrap();
    peer.shared.cut.store(true, Ordering::Relaxed);
    assert!(read(&remote, &peer, 1, 0, len).unwrap() == bytes(1, len));
    assert_eq!(read(&remote, &peer, 2, 0, 1000).unwrap(), bytes(2, 1000), "nobody is refused for that");
    assert_eq!((peer.downloads(), remote.status().failures), (3, 0));
}

#[test]
fn connections_to_instances_that_ended_are_closed() {
    let peer = FakePeer::start(&[1000]);
    let remote = remote();
    assert_eq!(read(&remote, &peer, 1, 0, 1000).unwrap(), bytes(1, 1000));
    assert_eq!(remote.peers.lock().unwrap().len(), 1);
    let next = BlobKey { instance: InstanceId(5), ..key(1) };
    let renumbered = || {
        let mut cluster = peer.cluster()?;
        Ok(cluster.remove(&THERE).map(|info| (next.instance, info)).into_iter().collect())
    };
    // It says that it is another one than the cluster says; that does not matter here.
    assert_eq!(remote.size(next, &renumbered).unwrap_err().kind(), Kind::Stale);
    assert_eq!(remote.peers.lock().unwrap().keys().copied().collect::<Vec<_>>(), [next.instance]);
}

fn fails_and_passes(fault: Fault, kind: Kind) {
    let len = 2 << 20;
    let peer = FakePeer::start(&[len]);
    let waits = matches!(fault, Fault::Stalls | Fault::Trickles | Fault::Silent);
    let remote = if waits { impatient() } else { remote() };
    if fault != Fault::Stranger {
        remote.size(key(1), &|| peer.cluster()).unwrap();
    }
    peer.set(fault);
    let start = Instant::now();
    let error = read(&remote, &peer, 1, 0, len).unwrap_err();
    assert_eq!(error.kind(), kind, "{fault:?}: {error}");
    assert!(start.elapsed() < LONG, "{fault:?}: {:?}", start.elapsed());
    if fault != Fault::Deletes {
        assert!(error.to_string().contains("i4"), "{fault:?}: {error}");
    }
    peer.set(Fault::None);
    peer.shared.blobs.lock().unwrap().insert(id(1), Arc::new(bytes(1, len)));
    // The same is not tried again at once.
    let start = Instant::now();
    let again = loop {
        match read(&remote, &peer, 1, 0, len) {
            Err(_) if start.elapsed() < LONG => std::thread::sleep(Duration::from_millis(100)),
            other => break other,
        }
    };
    assert!(again.unwrap() == bytes(1, len), "{fault:?}");
}

#[test]
fn a_dead_or_filtered_peer_is_unreachable_and_not_asked_by_all() {
    let dead = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    // A backlog that is full drops what knocks, as a filter does.
    let full = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = full.local_addr().unwrap().port();
    // SAFETY: listening again only changes the backlog of this socket.
    assert_eq!(unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&full), 0) }, 0);
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let knock = || TcpStream::connect_timeout(&address, Duration::from_millis(100));
    let mut held = Vec::new();
    while let Ok(stream) = knock() {
        held.push(stream);
        assert!(held.len() < 100);
    }
    for port in [dead, port] {
        let remote = impatient();
        let start = Instant::now();
        for _ in 0..20 {
            let error = remote.size(key(1), &|| cluster_at(port)).unwrap_err();
            assert_eq!(error.kind(), Kind::Unreachable);
            assert!(error.to_string().contains(&port.to_string()), "{error}");
        }
        assert!(start.elapsed() < PATIENCE * 10, "one waited for all");
    }
    let nobody = remote().size(key(1), &|| Ok(BTreeMap::new())).unwrap_err();
    assert_eq!(nobody.kind(), Kind::Unreachable);
}

#[test]
fn the_cache_has_a_limit_and_never_is_never() {
    let peer = FakePeer::start(&[1 << 20; 8]);
    let small = remote_with(RemoteOptions { cache_size: 3 << 20, ..RemoteOptions::default() });
    for number in 1..=8 {
        assert!(read(&small, &peer, number, 0, 1 << 20).unwrap() == bytes(number, 1 << 20));
    }
    let status = small.status();
    assert!(status.cached_bytes <= 3 << 20 && status.evictions == 5, "{status:?}");
    let never = remote_with(RemoteOptions { policy: RemotePolicy::Never, ..RemoteOptions::default() });
    assert_eq!(never.size(key(1), &|| peer.cluster()).unwrap(), 1 << 20);
    assert_eq!(read(&never, &peer, 1, 0, 1).unwrap_err().kind(), Kind::Remote);
    assert_eq!(never.want(&[(key(1), 0..0)], false, &|| peer.cluster()).unwrap_err().kind(), Kind::Remote);
    assert_eq!(peer.downloads(), 8);
}

#[test]
fn what_was_read_of_a_deleted_blob_is_stale() {
    let len = 32 << 20;
    let peer = FakePeer::start(&[len, 1000]);
    let remote = remote();
    let cluster = || peer.cluster();
    remote.read(key(1), 0, &mut [0; 100], &cluster).unwrap();
    assert!(read(&remote, &peer, 2, 0, 1000).is_ok());
    peer.shared.blobs.lock().unwrap().clear();
    assert_eq!(remote.verify(&[key(1)], &cluster).unwrap_err().kind(), Kind::Stale);
    assert_eq!(remote.verify(&[key(2)], &cluster).map_err(|e| e.kind()), Ok(()), "it came whole while it existed");
    assert_eq!(read(&remote, &peer, 1, 0, 1).unwrap_err().kind(), Kind::Stale);
}

#[test]
fn large_blobs_are_received_to_where_they_stay() {
    let made = Arc::new(AtomicUsize::new(0));
    let count = made.clone();
    let memory: MemoryMaker = Arc::new(move |size| {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        count.fetch_add(1, Ordering::Relaxed);
        let file = memfd_create(c"large", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&file, size as i64)?;
        Ok(file)
    });
    let len = 40 << 20;
    let peer = FakePeer::start(&[len, 5 << 20, 1000]);
    let remote = remote_with(RemoteOptions { memory: Some(memory), ..RemoteOptions::default() });
    let cluster = || peer.cluster();
    // Made once: readers that keep the processor busy for long would be what the transfer waits for.
    let whole = bytes(1, len);
    assert!(read(&remote, &peer, 1, 0, 100).unwrap() == whole[..100]);
    // It pauses, and begins anew: what is here stays as it is.
    let early = remote.arrived(key(1), 50..5000, &cluster).unwrap().unwrap();
    wait_parked(&remote, 1);
    std::thread::scope(|scope| {
        for reader in 0..4 {
            let (remote, peer, whole) = (&remote, &peer, &whole);
            scope.spawn(move || {
                for piece in (0..40).map(|piece| ((piece * 7 + reader * 11) % 40) << 20) {
                    let found = read(remote, peer, 1, piece as u64, 1 << 20).unwrap();
                    assert!(found == whole[piece..][..1 << 20]);
                }
            });
        }
    });
    assert!(early.as_ref() == &whole[50..5000]);
    let whole = remote.arrived(key(2), 0..5 << 20, &cluster).unwrap().unwrap();
    assert!(whole.as_ref() == bytes(2, 5 << 20));
    assert_eq!(read(&remote, &peer, 3, 0, 1000).unwrap(), bytes(3, 1000));
    assert!(remote.arrived(key(3), 7..7, &cluster).unwrap().is_none());
    assert_eq!(remote.arrived(key(3), 0..1001, &cluster).unwrap_err().kind(), Kind::Malformed);
    assert_eq!(made.load(Ordering::Relaxed), 2, "small blobs need none");
    // The same connections go on.
    peer.set(Fault::Zstd);
    peer.shared.blobs.lock().unwrap().insert(id(4), Arc::new(bytes(4, 6 << 20)));
    assert!(read(&remote, &peer, 4, 0, 6 << 20).unwrap() == bytes(4, 6 << 20));
    // Without memory, small pages do.
    let none: MemoryMaker = Arc::new(|_| Err(Error::new(Kind::Full, "none")));
    let remote = remote_with(RemoteOptions { memory: Some(none), ..RemoteOptions::default() });
    assert!(read(&remote, &peer, 2, 0, 5 << 20).unwrap() == bytes(2, 5 << 20));
}
