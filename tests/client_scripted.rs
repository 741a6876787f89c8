//! The client against a server that breaks the protocol's rules, or breaks off.
#![allow(clippy::unwrap_used)]

use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use vineyard_fs::vineyard::store::NameQuery;
use vineyard_fs::vineyard::{BlobKey, BlobSource, Client, ClientOptions, InstanceId, ObjectId, Store};
use vineyard_fs::{Error, Kind};

const BLOB: u64 = 1 << 63 | 5;
const KEY: BlobKey = BlobKey { instance: InstanceId(2), id: ObjectId(BLOB) };

/// What the server does with a request.
enum Act {
    /// Answers, and sends as many descriptors of its memory file.
    Say(Value, usize),
    /// Answers with these bytes as a frame's content.
    Raw(Vec<u8>),
    /// Closes the connection.
    Close,
    /// Says nothing.
    Hang,
}

type Script = dyn Fn(&Value) -> Act + Send + Sync;

struct Scripted {
    client: Client,
    requests: Arc<Mutex<Vec<Value>>>,
    connections: Arc<AtomicUsize>,
    streams: Arc<Mutex<Vec<UnixStream>>>,
}

impl Scripted {
    /// Ends all connections, as the end of a process does. The next ones lead to a server that says the same of itself.
    fn restart(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            stream.shutdown(std::net::Shutdown::Both).unwrap();
        }
    }

    fn count(&self, kind: &str) -> usize {
        self.requests.lock().unwrap().iter().filter(|r| r["type"] == kind).count()
    }
}

fn serve(mut stream: UnixStream, memory: &OwnedFd, script: &Script, requests: &Mutex<Vec<Value>>) -> Option<()> {
    loop {
        let mut header = [0; 8];
        stream.read_exact(&mut header).ok()?;
        let mut body = vec![0; u64::from_le_bytes(header) as usize];
        stream.read_exact(&mut body).ok()?;
        let request: Value = serde_json::from_slice(&body).unwrap();
        let act = match request["type"].as_str().unwrap() {
            "register_request" => Act::Say(
                json!({"type": "register_reply", "instance_id": 2, "ipc_socket": "/s", "rpc_endpoint": "h:1",
                    "store_match": true, "version": "0.24.2"}),
                0,
            ),
            _ => script(&request),
        };
        requests.lock().unwrap().push(request);
        let (body, fds) = match act {
            Act::Say(reply, fds) => (reply.to_string().into_bytes(), fds),
            Act::Raw(bytes) => (bytes, 0),
            Act::Close => return stream.shutdown(std::net::Shutdown::Both).ok(),
            Act::Hang => {
                std::thread::sleep(Duration::from_secs(60));
                return None;
            }
        };
        stream.write_all(&[&(body.len() as u64).to_le_bytes(), body.as_slice()].concat()).ok()?;
        for _ in 0..fds {
            let fd = [memory.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&fd)];
            sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&[0x14])], &rights, MsgFlags::empty(), None).ok()?;
        }
    }
}

/// A client of a server with 8192 bytes of memory, all `7`, that follows `script` after each registration.
fn scripted(script: impl Fn(&Value) -> Act + Send + Sync + 'static) -> Scripted {
    scripted_within(Duration::from_secs(20), script)
}

/// The same with a deadline, for a server that keeps the client waiting for it.
fn scripted_within(deadline: Duration, script: impl Fn(&Value) -> Act + Send + Sync + 'static) -> Scripted {
    let memory = memfd_create(c"scripted", MFdFlags::MFD_CLOEXEC).unwrap();
    std::fs::File::from(memory.try_clone().unwrap()).write_all(&[7; 8192]).unwrap();
    let memory = Arc::new(memory);
    let script: Arc<Script> = Arc::new(script);
    let requests: Arc<Mutex<Vec<Value>>> = Arc::default();
    let connections: Arc<AtomicUsize> = Arc::default();
    let streams: Arc<Mutex<Vec<UnixStream>>> = Arc::default();
    let (seen, count, open) = (requests.clone(), connections.clone(), streams.clone());
    let connector = Box::new(move |_: Instant| -> vineyard_fs::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let (memory, script, seen) = (memory.clone(), script.clone(), seen.clone());
        count.fetch_add(1, Ordering::Relaxed);
        open.lock().unwrap().push(theirs.try_clone()?);
        std::thread::spawn(move || serve(theirs, &memory, &*script, &seen));
        Ok(ours)
    });
    let options = ClientOptions::connector(connector).deadline(deadline);
    Scripted { client: Client::connect(options).unwrap(), requests, connections, streams }
}

fn payload(change: Value) -> Value {
    let mut payload = json!({"object_id": BLOB, "store_fd": 9, "map_size": 8192, "data_offset": 64, "data_size": 100,
        "pointer": 0, "is_sealed": true, "is_owner": true, "is_gpu": false});
    for (key, value) in change.as_object().unwrap() {
        payload[key] = value.clone();
    }
    payload
}

fn buffers(payloads: Vec<Value>, fds: Value) -> Value {
    json!({"type": "get_buffers_reply", "num": payloads.len(), "payloads": payloads, "fds": fds, "compress": false})
}

#[test]
fn a_blob_is_read_where_the_reply_puts_it() {
    let server = scripted(|_| Act::Say(buffers(vec![payload(json!({}))], json!([9])), 1));
    let mut out = [0; 100];
    server.client.read(KEY, 0, &mut out).unwrap();
    assert_eq!(out, [7; 100]);
    assert_eq!(server.client.size(KEY).unwrap(), 100);
    assert_eq!(server.count("get_buffers_request"), 1, "the place is remembered");
}

#[test]
fn places_outside_the_memory_are_refused() {
    let cases: [(Value, Value, usize); 12] = [
        (json!({"data_offset": 8100}), json!([9]), 1),
        (json!({"data_size": u64::MAX}), json!([9]), 1),
        (json!({"data_offset": u64::MAX - 10}), json!([9]), 1),
        (json!({"data_offset": -1}), json!([9]), 0),
        (json!({"data_size": 1.5}), json!([9]), 0),
        (json!({"map_size": 8193}), json!([9]), 1),
        (json!({"map_size": 0}), json!([9]), 1),
        (json!({"map_size": u64::MAX}), json!([9]), 1),
        (json!({"store_fd": 10}), json!([9]), 0),
        (json!({}), json!([]), 0),
        (json!({"object_id": BLOB + 1}), json!([9]), 1),
        (json!({}), json!("no list"), 0),
    ];
    for (change, fds, sent) in cases {
        let label = format!("{change} {fds}");
        let server = scripted(move |_| Act::Say(buffers(vec![payload(change.clone())], fds.clone()), sent));
        assert_eq!(server.client.size(KEY).unwrap_err().kind(), Kind::Malformed, "{label}");
    }
    // A descriptor that is announced and never sent.
    let server =
        scripted_within(Duration::from_secs(2), |_| Act::Say(buffers(vec![payload(json!({}))], json!([9])), 0));
    assert_eq!(server.client.size(KEY).unwrap_err().kind(), Kind::Timeout);
}

#[test]
fn a_bad_reply_costs_its_connection_alone() {
    let server = scripted_within(Duration::from_secs(3), |request| match request["type"].as_str().unwrap() {
        "get_buffers_request" => Act::Raw(b"{\"type\":".to_vec()),
        "instance_status_request" => Act::Hang,
        _ => Act::Say(json!({"type": "list_name_reply", "names": {"b": 2, "a": 1, "x": 3}, "size": 3}), 0),
    });
    let all = [NameQuery::Prefix { prefix: String::new(), limit: Some(2) }];
    let expected = [vec![("a".to_string(), ObjectId(1)), ("b".to_string(), ObjectId(2))]];
    for _ in 0..3 {
        assert_eq!(server.client.size(KEY).unwrap_err().kind(), Kind::Malformed);
        assert_eq!(server.client.names(&all).unwrap(), expected);
    }
    let start = Instant::now();
    assert_eq!(server.client.status().unwrap_err().kind(), Kind::Timeout);
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(server.client.names(&all).unwrap(), expected);
    assert_eq!(server.client.instance().unwrap().generation, 1);
}

#[test]
fn one_hostile_object_does_not_hide_the_others() {
    let server = scripted(|request| {
        let mut content: Vec<String> = Vec::new();
        for id in request["id"].as_array().unwrap() {
            let id = ObjectId(id.as_u64().unwrap());
            let extra = match id.0 {
                13 => format!(r#","deep":{}1{}"#, "[".repeat(5000), "]".repeat(5000)),
                14 => String::from(r#","typename":7"#),
                _ => String::from(r#","typename":"t""#),
            };
            let own = if id.0 == 15 { ObjectId(16) } else { id };
            content.push(format!(r#""{id}":{{"id":"{own}"{extra}}}"#));
        }
        Act::Raw(format!(r#"{{"type":"get_data_reply","content":{{{}}}}}"#, content.join(",")).into_bytes())
    });
    let ids: Vec<ObjectId> = (1..=200).map(ObjectId).collect();
    let metas = server.client.metas(&ids, false).unwrap();
    assert_eq!(metas.len(), 200);
    let bad: Vec<u64> = ids.iter().filter(|id| metas[id].is_err()).map(|id| id.0).collect();
    assert_eq!(bad, [13, 14, 15]);
    for id in bad {
        assert_eq!(metas[&ObjectId(id)].as_ref().unwrap_err().kind(), Kind::Malformed);
    }
}

#[test]
fn creations_are_never_sent_twice() {
    let server = scripted_within(Duration::from_secs(3), |_| Act::Close);
    assert_eq!(server.client.create_blobs(&[10]).unwrap_err().kind(), Kind::Unavailable);
    assert_eq!(server.count("create_buffer_request"), 1);
    assert!(server.client.create_objects(vec![json!({"typename": "t"})]).is_err());
    assert_eq!(server.count("create_datas_request"), 1);
    assert!(server.client.status().is_err());
    assert!(server.count("instance_status_request") > 1, "a question is asked again");
    assert!(server.connections.load(Ordering::Relaxed) > 3);
}

#[test]
fn new_blobs_of_a_wrong_size_are_given_back() {
    let nothing = ObjectId::EMPTY_BLOB.0;
    let empty = payload(json!({"object_id": nothing, "store_fd": -1, "map_size": 0, "data_size": 0}));
    let server = scripted(move |request| match request["type"].as_str().unwrap() {
        "create_buffer_request" if request["size"] == 0 => {
            Act::Say(json!({"type": "create_buffer_reply", "id": nothing, "fd": -1, "created": empty}), 0)
        }
        "create_buffer_request" => Act::Say(
            json!({"type": "create_buffer_reply", "id": BLOB, "fd": 9, "created": payload(json!({"data_size": 99}))}),
            1,
        ),
        _ => Act::Say(json!({"type": "drop_buffer_reply"}), 0),
    });
    assert_eq!(server.client.create_blobs(&[100]).unwrap_err().kind(), Kind::Malformed);
    assert_eq!(server.count("drop_buffer_request"), 1);
}

#[test]
fn nothing_harmful_is_sent() {
    let server = scripted(|_| Act::Say(json!({"code": 1, "message": "no"}), 0));
    let client = &server.client;
    let invalid = BlobKey { id: ObjectId::INVALID, ..KEY };
    let object = BlobKey { id: ObjectId(5), ..KEY };
    let kinds: Vec<Kind> = [
        client.size(invalid).map(drop),
        client.size(object).map(drop),
        client.verify(&[invalid]),
        client.seal_blobs(&[ObjectId::INVALID]),
        client.create_objects(vec![json!({"typename": "t", "signature": "x"})]).map(drop),
        client.create_objects(vec![json!([])]).map(drop),
        client.shallow_copy(ObjectId(5), json!({"a": {}}).as_object().unwrap().clone()).map(drop),
    ]
    .into_iter()
    .map(|result: Result<(), Error>| result.unwrap_err().kind())
    .collect();
    use Kind::{Invalid, Stale};
    assert_eq!(kinds, [Stale, Stale, Stale, Invalid, Invalid, Invalid, Invalid]);
    client.drop_blobs(&[ObjectId::INVALID, ObjectId::EMPTY_BLOB]).unwrap();
    client.delete(&[ObjectId::INVALID, ObjectId::EMPTY_BLOB]).unwrap();
    assert!(client.metas(&[ObjectId::INVALID], true).unwrap().is_empty());
    assert!(client.create_blobs(&[]).unwrap().is_empty() && client.names(&[]).unwrap().is_empty());
    let sent: Vec<Value> = server.requests.lock().unwrap().clone();
    assert!(sent.iter().all(|r| r["type"] == "register_request"), "{sent:?}");
}

#[test]
fn a_restart_is_noticed_even_if_the_new_server_looks_the_same() {
    let server = scripted_within(Duration::from_secs(3), |request| match request["type"].as_str().unwrap() {
        "instance_status_request" => Act::Close,
        _ => Act::Say(buffers(vec![payload(json!({}))], json!([9])), 1),
    });
    let first = server.client.blob(KEY).unwrap().unwrap();
    server.client.status().unwrap_err();
    assert_eq!(server.client.instance().unwrap().generation, 1, "the end of one connection is no restart");
    server.client.verify(&[KEY]).unwrap();
    server.restart();
    assert_eq!(server.client.instance().unwrap().generation, 2);
    let again = server.client.blob(KEY).unwrap().unwrap();
    assert!(!again.same_place(&first), "what was mapped from the former server is not used for the new one");
    let mut byte = [0];
    first.read(0, &mut byte).unwrap();
    assert_eq!(byte, [7], "but stays readable for whoever holds it");
}
