//! What keeper and server say to each other: one JSON message per packet of a `SOCK_SEQPACKET` socket pair, with at
//! most one descriptor. The server asks, the keeper answers in order.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::config::MountConfig;
use crate::error::{Context, Error, Kind, Result};
use crate::fs::Area;

/// Version of these messages. An upgrade brings a server together with a keeper of another version of this program.
pub const VERSION: u32 = 1;
/// Longest message in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Most bytes of notes in one answer to [`Request::Files`], and most bytes of texts in one to [`Request::States`],
/// unless a single one is longer. Escapes make a message several times as long at worst.
pub const BYTES_PER_MESSAGE: usize = 8 << 10;
/// Longest tag of a file in bytes.
pub const MAX_TAG: usize = 16 << 10;
/// Longest key and value of a kept text together, in bytes.
pub const MAX_STATE: usize = 8 << 10;

/// What a server asks its keeper.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Request {
    /// The first message of each server: what is served, and how.
    Hello,
    /// Requests are being answered from now on.
    Ready,
    /// The server cannot start; the keeper must not try again if this was the first one.
    Failed {
        /// Why, in one line.
        message: String,
    },
    /// The kept files with a key above `after`, in order of their keys.
    Files {
        /// Last key that is known already; 0 to begin.
        after: u64,
    },
    /// The descriptor of a kept file.
    File {
        /// Its key.
        key: u64,
    },
    /// A memory file of so many bytes that the keeper does not keep.
    Memory {
        /// Its size.
        size: u64,
    },
    /// A new memory file.
    CreateFile {
        /// What it is for.
        area: Area,
        /// Its size in bytes; 0 if it will grow.
        size: u64,
    },
    /// Notes what a kept file is, for the next server. Files without a note are dropped when that one starts.
    TagFile {
        /// Its key.
        key: u64,
        /// What it is; at most [`MAX_TAG`] bytes.
        tag: String,
    },
    /// Drops a kept file and its registration with the kernel. Not an error if it is unknown.
    ReleaseFile {
        /// Its key.
        key: u64,
    },
    /// Whether anybody but keeper and server has a kept file open or mapped.
    IsUsed {
        /// Its key.
        key: u64,
    },
    /// A connected socket to the store.
    Connect,
    /// The journal of objects that no name reaches yet.
    Leftovers,
    /// The journal of requests.
    Journal,
    /// The socket at which counters are asked for, if there is one.
    Metrics,
    /// Keeps a text for the next server; `None` removes it.
    PutState {
        /// Its name.
        key: String,
        /// The text.
        value: Option<String>,
    },
    /// All such texts with a name after this one, in the order of their names.
    States {
        /// Last name that is known already; empty to begin.
        after: String,
    },
}

/// What a keeper answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Hello`].
    Hello(Box<Hello>),
    /// To [`Request::Files`]; empty at the end.
    Files {
        /// As many as fit one message.
        files: Vec<KeptFile>,
    },
    /// To [`Request::CreateFile`] and [`Request::File`]; the descriptor comes along.
    File(KeptFile),
    /// To [`Request::Memory`], [`Request::Connect`], [`Request::Leftovers`], [`Request::Journal`] and [`Request::Metrics`]; the descriptor comes along, if there is one.
    Descriptor,
    /// To [`Request::States`]; empty at the end.
    States {
        /// Names and texts.
        entries: Vec<(String, String)>,
    },
    /// To [`Request::IsUsed`].
    Used {
        /// True if somebody has.
        used: bool,
    },
    /// Nothing more to say.
    Done,
    /// It did not work.
    Error {
        /// The errno.
        errno: i32,
        /// What happened.
        message: String,
    },
}

/// A memory file in the keeper's care.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptFile {
    /// Number of the file, never used twice in a mount.
    pub key: u64,
    /// What it is for.
    pub area: Area,
    /// Its size in bytes when it was made.
    pub size: u64,
    /// Id under which the kernel knows it.
    pub backing: Option<u32>,
    /// What a server said it is.
    pub tag: Option<String>,
}

/// What a server needs to know at its start, whether it is the first one or not.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// What was asked for on the command line.
    pub config: MountConfig,
    /// What keeper and server say to each other.
    #[serde(default)]
    pub version: u32,
    /// Minor version of the protocol that the kernel speaks.
    pub minor: u32,
    /// Flags that were agreed on in INIT.
    pub flags: u64,
    /// Why the kernel does not read memory files by itself; `None` if it does.
    pub no_passthrough: Option<String>,
    /// How many servers this mount had before.
    pub restarts: u64,
    /// A number that no server of this mount had before, also under another keeper.
    #[serde(default)]
    pub epoch: u64,
    /// Process id of the keeper.
    pub keeper_pid: u32,
    /// Whether the keeper answers [`Request::IsUsed`].
    #[serde(default)]
    pub tells_use: bool,
}

/// Sends one message.
///
/// # Errors
/// `TooLarge` above [`MAX_MESSAGE`]; else what the system says. With `wait` false a full socket is an error.
pub fn send<T: Serialize>(socket: BorrowedFd<'_>, message: &T, fd: Option<BorrowedFd<'_>>, wait: bool) -> Result<()> {
    let bytes = serde_json::to_vec(message).map_err(|e| Error::new(Kind::Internal, e.to_string()))?;
    if bytes.len() > MAX_MESSAGE {
        return Err(Error::new(Kind::TooLarge, format!("a control message of {} bytes", bytes.len())));
    }
    let raw: Vec<RawFd> = fd.iter().map(|f| f.as_raw_fd()).collect();
    let control = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &control[..0] } else { &control[..] };
    let mut flags = MsgFlags::MSG_NOSIGNAL;
    flags.set(MsgFlags::MSG_DONTWAIT, !wait);
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, flags, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno).context(|| "cannot send a control message".into()),
        }
    }
}

/// A message and the descriptor that came with it.
pub type Received<T> = (T, Option<OwnedFd>);

/// Receives one message; `None` when the other side is gone.
///
/// # Errors
/// `Malformed` for what is not such a message, `Timeout` if the socket's receive time-out passes.
pub fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> Result<Option<Received<T>>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut control = nix::cmsg_space!([RawFd; 4]);
    let (length, flags, fds) = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC) {
            Ok(message) => {
                let mut fds = Vec::new();
                for part in message.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(raw) = part {
                        // SAFETY: the kernel has just opened these descriptors for this process; nobody else owns them.
                        fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                break (message.bytes, message.flags, fds);
            }
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => return Err(Error::new(Kind::Timeout, "no answer on the control socket")),
            Err(Errno::ECONNRESET) => return Ok(None),
            Err(errno) => return Err(errno).context(|| "cannot read the control socket".into()),
        }
    };
    if length == 0 {
        return Ok(None);
    }
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) || fds.len() > 1 {
        return Err(Error::malformed("a control message is longer than allowed"));
    }
    let message = bytes.get(..length).unwrap_or_default();
    let message = serde_json::from_slice(message).map_err(|e| Error::malformed(format!("control message: {e}")))?;
    Ok(Some((message, fds.into_iter().next())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn messages_and_descriptors_arrive_as_sent() {
        let (a, b) = pair();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"inside").unwrap();
        file.rewind().unwrap();
        let kept = KeptFile { key: 7, area: Area::Image, size: 6, backing: Some(3), tag: None };
        send(a.as_fd(), &Reply::File(kept.clone()), Some(file.as_fd()), true).unwrap();
        send(a.as_fd(), &Reply::Done, None, true).unwrap();
        let (message, fd) = receive::<Reply>(b.as_fd()).unwrap().unwrap();
        assert!(matches!(message, Reply::File(got) if got == kept));
        let mut text = String::new();
        std::fs::File::from(fd.unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "inside");
        let (message, fd) = receive::<Reply>(b.as_fd()).unwrap().unwrap();
        assert!(matches!(message, Reply::Done) && fd.is_none());
        drop(a);
        assert!(receive::<Reply>(b.as_fd()).unwrap().is_none());
    }

    #[test]
    fn too_long_and_foreign_messages_are_refused() {
        let (a, b) = pair();
        let long = Request::PutState { key: "k".into(), value: Some("x".repeat(MAX_MESSAGE)) };
        assert_eq!(send(a.as_fd(), &long, None, true).unwrap_err().kind(), Kind::TooLarge);
        nix::unistd::write(&a, b"{\"ask\":\"format_disk\"}").unwrap();
        assert_eq!(receive::<Request>(b.as_fd()).unwrap_err().kind(), Kind::Malformed);
        nix::unistd::write(&a, &vec![b' '; MAX_MESSAGE + 1]).unwrap();
        assert_eq!(receive::<Request>(b.as_fd()).unwrap_err().kind(), Kind::Malformed);
    }
}
