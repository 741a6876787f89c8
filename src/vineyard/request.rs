//! Requests and replies of vineyardd's protocol, as far as this program uses them.
//!
//! Only inputs that vineyardd is known to survive can be expressed here: no `wait`, no `evict`, `load` or `unpin` (never
//! answered), no `delete_session` (ends the server), no labels, and ids are numbers. Source:
//! `src/common/util/protocols.cc` of v6d 0.24.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::id::ObjectId;
use super::tree::Member;
use crate::error::{Error, Result};

/// A request, with the `type` that it is sent as.
#[derive(Serialize, Debug)]
#[serde(tag = "type")]
#[allow(missing_docs)]
pub enum Request<'a> {
    #[serde(rename = "register_request")]
    Register { version: &'a str, store_type: u8, session_id: i64, username: &'a str, password: &'a str },
    #[serde(rename = "create_buffer_request")]
    CreateBuffer { size: u64 },
    #[serde(rename = "seal_request")]
    Seal { object_id: u64 },
    #[serde(rename = "drop_buffer_request")]
    DropBuffer { id: u64 },
    #[serde(rename = "get_buffers_request")]
    GetBuffers {
        ids: Vec<u64>,
        #[serde(rename = "unsafe")]
        unsealed_too: bool,
    },
    /// Over TCP: the bytes follow the reply. Blobs are numbered from `"0"`; the server knows no list form here.
    #[serde(rename = "get_remote_buffers_request")]
    GetRemoteBuffers {
        #[serde(flatten)]
        ids: BTreeMap<usize, u64>,
        num: usize,
        #[serde(rename = "unsafe")]
        unsealed_too: bool,
        compress: bool,
        use_rdma: bool,
    },
    #[serde(rename = "create_data_request")]
    CreateData { content: Member<'a> },
    #[serde(rename = "create_datas_request")]
    CreateDatas { num: usize, contents: &'a [Map<String, Value>] },
    #[serde(rename = "get_data_request")]
    GetData { id: Vec<u64>, sync_remote: bool, wait: bool },
    #[serde(rename = "persist_request")]
    Persist { id: u64 },
    #[serde(rename = "shallow_copy_request")]
    ShallowCopy { id: u64, extra: &'a Map<String, Value> },
    #[serde(rename = "put_name_request")]
    PutName { object_id: u64, name: &'a str },
    #[serde(rename = "list_name_request")]
    ListName { pattern: String, regex: bool, limit: u64 },
    #[serde(rename = "list_data_request")]
    ListData { pattern: &'a str, regex: bool, limit: u64 },
    #[serde(rename = "drop_name_request")]
    DropName { name: &'a str },
    #[serde(rename = "del_data_request")]
    DelData { id: Vec<u64>, force: bool, deep: bool, memory_trim: bool, fastpath: bool },
    #[serde(rename = "migrate_object_request")]
    MigrateObject { object_id: u64 },
    #[serde(rename = "cluster_meta")]
    ClusterMeta {},
    #[serde(rename = "instance_status_request")]
    InstanceStatus {},
}

/// A reply without content.
#[derive(Deserialize, Debug)]
pub struct Empty {}

/// `register_reply`.
#[derive(Deserialize, Debug)]
#[allow(missing_docs)]
pub struct RegisterReply {
    pub instance_id: u64,
    pub ipc_socket: String,
    #[serde(default)]
    pub rpc_endpoint: String,
    #[serde(default)]
    pub version: String,
    #[serde(default = "yes")]
    pub store_match: bool,
}

fn yes() -> bool {
    true
}

/// Where a blob is: the server's number for the memory file, and the range in it.
#[derive(Deserialize, Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Payload {
    pub object_id: u64,
    pub store_fd: i64,
    pub map_size: u64,
    pub data_offset: u64,
    pub data_size: u64,
    #[serde(default)]
    pub is_sealed: bool,
}

/// `create_buffer_reply`; a descriptor follows if `fd` is not negative.
#[derive(Deserialize, Debug)]
#[allow(missing_docs)]
pub struct CreateBufferReply {
    pub id: u64,
    pub created: Payload,
    pub fd: i64,
}

/// `get_buffers_reply`; a descriptor follows for each of `fds`.
#[derive(Deserialize, Debug)]
#[allow(missing_docs)]
pub struct GetBuffersReply {
    pub payloads: Vec<Payload>,
    pub fds: Vec<i64>,
}

/// What `get_remote_buffers` is answered with; the bytes of the blobs follow, in the order of the payloads.
#[derive(Deserialize, Debug)]
pub struct RemoteBuffersReply {
    /// The blobs that exist.
    pub payloads: Vec<RemotePayload>,
    /// The bytes come as zstd.
    #[serde(default)]
    pub compress: bool,
}

/// A blob that follows.
#[derive(Deserialize, Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct RemotePayload {
    pub object_id: u64,
    pub data_size: u64,
}

/// `create_datas_reply`.
#[derive(Deserialize, Debug)]
#[allow(missing_docs)]
pub struct CreateDatasReply {
    pub ids: Vec<u64>,
    pub signatures: Vec<u64>,
}

/// `create_data_reply`.
#[derive(Deserialize, Debug)]
#[allow(missing_docs)]
pub struct CreateDataReply {
    pub id: u64,
    pub signature: u64,
}

/// `get_data_reply`: metadata by id, `None` if nothing was found.
#[derive(Deserialize, Debug)]
pub struct GetDataReply {
    /// Metadata trees.
    pub content: Option<Entries<Value>>,
}

/// `get_data_reply`, of which only the sizes of blobs are wanted.
#[derive(Deserialize, Debug)]
pub struct SizesReply {
    /// The blobs.
    pub content: Option<Entries<BlobSize>>,
}

/// The metadata of a blob.
#[derive(Deserialize, Debug)]
pub struct BlobSize {
    /// Its size in bytes.
    pub length: Option<u64>,
}

/// `shallow_copy_reply`.
#[derive(Deserialize, Debug)]
pub struct ShallowCopyReply {
    /// The copy.
    pub target_id: u64,
}

/// `migrate_object_reply`.
#[derive(Deserialize, Debug)]
pub struct MigrateReply {
    /// The copy.
    pub object_id: u64,
}

/// `list_name_reply`.
#[derive(Deserialize, Debug)]
pub struct ListNameReply {
    /// Names with object ids.
    pub names: Entries<u64>,
}

/// `cluster_meta`.
#[derive(Deserialize, Debug)]
pub struct ClusterMetaReply {
    /// By instance, `i0` and so on.
    pub meta: BTreeMap<String, ClusterEntry>,
}

/// One instance of `cluster_meta`.
#[derive(Deserialize, Debug)]
#[serde(default)]
#[derive(Default)]
#[allow(missing_docs)]
pub struct ClusterEntry {
    pub hostname: String,
    pub rpc_endpoint: String,
    pub ipc_socket: String,
    /// Number of a member of the etcd cluster; absent without etcd.
    pub member_id: Option<Value>,
}

/// `instance_status_reply`.
#[derive(Deserialize, Debug)]
pub struct StatusReply {
    /// The figures.
    pub meta: StatusEntry,
}

/// The figures of `instance_status_reply`.
#[derive(Deserialize, Debug)]
#[allow(missing_docs)]
pub struct StatusEntry {
    pub memory_limit: u64,
    pub memory_usage: u64,
    pub ipc_connections: u64,
    pub rpc_connections: u64,
}

/// A JSON object as a list of entries, in the order of the text.
#[derive(Debug)]
pub struct Entries<T>(pub Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Entries<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Collect<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Collect<T> {
            type Value = Entries<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entries<T>, A::Error> {
                let mut list = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    list.push(entry);
                }
                Ok(Entries(list))
            }
        }
        deserializer.deserialize_map(Collect(std::marker::PhantomData))
    }
}

/// The pattern for `list_name` that matches names which begin with `prefix`, or equal it if `exact`.
///
/// vineyardd calls `fnmatch` without flags: `*` crosses `/`, a backslash quotes. It passes C strings, so pattern and
/// names end, for the match, at their first NUL; the pattern then matches more than was asked, and the caller must
/// look at the names again.
pub fn name_pattern(prefix: &str, exact: bool) -> String {
    let (text, cut) = match prefix.split_once('\0') {
        Some((head, _)) => (head, true),
        None => (prefix, false),
    };
    let mut pattern = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        if matches!(c, '*' | '?' | '[' | '\\') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    if !exact && !cut {
        pattern.push('*');
    }
    pattern
}

/// Checks an id that a server or caller names as an object or blob of its own; [`ObjectId::INVALID`] names none (as a
/// blob it would stand for the store's whole memory).
pub fn checked_id(id: u64) -> Result<ObjectId> {
    match ObjectId(id) {
        ObjectId::INVALID => Err(Error::malformed("the invalid id where an object is due")),
        id => Ok(id),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_servers_form() {
        let json = |r: &Request| serde_json::to_string(r).unwrap();
        assert_eq!(json(&Request::ClusterMeta {}), r#"{"type":"cluster_meta"}"#);
        assert_eq!(
            json(&Request::GetBuffers { ids: vec![1 << 63 | 1], unsealed_too: false }),
            r#"{"type":"get_buffers_request","ids":[9223372036854775809],"unsafe":false}"#
        );
        let ids = BTreeMap::from([(0, 1 << 63 | 5), (1, 1 << 63 | 3)]);
        assert_eq!(
            json(&Request::GetRemoteBuffers { ids, num: 2, unsealed_too: false, compress: false, use_rdma: false }),
            concat!(
                r#"{"type":"get_remote_buffers_request","0":9223372036854775813,"1":9223372036854775811,"num":2,"#,
                r#""unsafe":false,"compress":false,"use_rdma":false}"#
            )
        );
    }

    #[test]
    fn patterns_quote_metacharacters_and_end_at_nul() {
        assert_eq!(name_pattern("a*?[b]\\", true), r"a\*\?\[b]\\");
        assert_eq!(name_pattern("", false), "*");
        assert_eq!(name_pattern("é/", false), "é/*");
        assert_eq!(name_pattern("a\0b", false), "a");
    }
}
