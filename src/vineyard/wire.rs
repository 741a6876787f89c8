//! Frames and descriptors on vineyardd's Unix socket.
//!
//! A frame is a little-endian `u64` length and that many bytes of JSON. After a reply that announces descriptors the
//! server sends each in a message of its own: one meaningless byte with one `SCM_RIGHTS` descriptor. A read past the end
//! of a frame would swallow that byte and lose the descriptor, so frames are read exactly. Source:
//! `src/common/util/protocols.cc`, `src/server/async/socket_server.cc` and `src/common/memory/fling.cc` of v6d 0.24.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recv, recvmsg, send};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::pipe::Pipe;
use crate::error::{Error, Kind, Result};

/// Largest request: vineyardd closes the connection on more than 256 MiB.
pub const MAX_REQUEST: usize = 256 << 20;
/// Largest reply that is read. vineyardd sets no limit itself.
pub const MAX_REPLY: u64 = 1 << 30;
/// Largest reply of another instance. The longest ones tell 1024 sizes or 512 places, in some hundred bytes each.
pub const MAX_PEER_REPLY: u64 = 4 << 20;
/// Memory is reserved for a reply in steps of this size, as its bytes arrive and not as its length announces.
const STEP: usize = 1 << 20;

/// A connection that can't be used any more, and why.
#[derive(Debug)]
pub struct Broken {
    /// What happened. `Unavailable` means that the server is gone.
    pub error: Error,
    /// True if the server may have got a request whole, and so may have executed it.
    pub sent: bool,
}

impl From<Broken> for Error {
    fn from(broken: Broken) -> Error {
        broken.error
    }
}

fn broken(kind: Kind, message: impl Into<String>) -> Broken {
    Broken { error: Error::new(kind, message), sent: true }
}

/// Breaks the connection because of a reply that breaks the protocol's rules.
pub fn bad_reply(message: impl Into<String>) -> Broken {
    broken(Kind::Malformed, format!("vineyardd's reply {}", message.into()))
}

fn gone(errno: Option<Errno>) -> Broken {
    match errno {
        Some(Errno::EPIPE | Errno::ECONNRESET) | None => broken(Kind::Unavailable, "vineyardd closed the connection"),
        Some(errno) => Broken { error: errno.into(), sent: true },
    }
}

/// Appends one request to `out` as a frame.
///
/// # Errors
/// `TooLarge` past [`MAX_REQUEST`]; `out` is then as it was before.
pub fn push_frame(out: &mut Vec<u8>, request: &impl Serialize) -> Result<()> {
    let start = out.len();
    out.extend_from_slice(&[0; 8]);
    let written = serde_json::to_writer(&mut *out, request);
    let len = out.len() - start - 8;
    if let Err(error) = written {
        out.truncate(start);
        return Err(Error::new(Kind::Invalid, "a request that is no JSON").with_source(error));
    }
    if len > MAX_REQUEST {
        out.truncate(start);
        return Err(Error::new(Kind::TooLarge, format!("a request of {len} bytes; vineyardd takes {MAX_REQUEST}")));
    }
    if let Some(header) = out.get_mut(start..start + 8) {
        header.copy_from_slice(&(len as u64).to_le_bytes());
    }
    Ok(())
}

/// An error reply: the request was refused, the connection stays usable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// One of the codes of `src/common/util/status.h`.
    pub code: i64,
    /// Free text.
    pub message: String,
}

impl Refusal {
    /// `kObjectNotExists`.
    pub const OBJECT_NOT_EXISTS: i64 = 12;
    /// `kObjectNotSealed`.
    pub const OBJECT_NOT_SEALED: i64 = 14;
    /// `kMetaTreeSubtreeNotExists`.
    pub const SUBTREE_NOT_EXISTS: i64 = 27;
    /// `kNotEnoughMemory`.
    pub const NOT_ENOUGH_MEMORY: i64 = 41;

    /// True if it says that an object or blob does not exist.
    pub fn is_absence(&self) -> bool {
        matches!(self.code, Self::OBJECT_NOT_EXISTS | Self::SUBTREE_NOT_EXISTS)
    }

    fn kind(&self) -> Kind {
        match self.code {
            Self::OBJECT_NOT_EXISTS | Self::SUBTREE_NOT_EXISTS | 2 | 25 => Kind::NotFound,
            Self::NOT_ENOUGH_MEMORY => Kind::Full,
            Self::OBJECT_NOT_SEALED => Kind::Busy,
            6 => Kind::Unsupported,
            11 => Kind::Exists,
            1 | 3 | 7 | 8 | 13 | 15 | 16 | 21..=24 | 26 | 51 => Kind::Invalid,
            31 | 33..=37 => Kind::Unavailable,
            _ => Kind::Os(libc::EIO),
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        let Refusal { code, ref message } = refusal;
        Error::new(refusal.kind(), format!("vineyardd refused: {message:.300} (code {code})"))
    }
}

/// Reads a reply of type `kind`. An error reply is the inner error.
///
/// # Errors
/// `Malformed` if it is no JSON, of another type, or lacks a field.
pub fn parse<T: DeserializeOwned>(frame: &[u8], kind: &str) -> Result<Result<T, Refusal>> {
    #[derive(serde::Deserialize)]
    struct Envelope<'a> {
        #[serde(default)]
        code: i64,
        #[serde(default)]
        message: Option<String>,
        #[serde(borrow, default, rename = "type")]
        kind: Option<std::borrow::Cow<'a, str>>,
    }
    let malformed = |error| Error::malformed(format!("vineyardd's {kind} is malformed")).with_source(error);
    let envelope: Envelope = serde_json::from_slice(frame).map_err(malformed)?;
    if envelope.code != 0 {
        return Ok(Err(Refusal { code: envelope.code, message: envelope.message.unwrap_or_default() }));
    }
    match envelope.kind.as_deref() {
        Some(found) if found == kind => serde_json::from_slice(frame).map(Ok).map_err(malformed),
        Some(other) => Err(Error::malformed(format!("vineyardd answered {other:?} where {kind} is due"))),
        None => Err(Error::malformed(format!("vineyardd's {kind} has no type"))),
    }
}

/// One end of a socket, with a deadline on everything that can wait.
#[derive(Debug)]
pub struct Channel {
    stream: OwnedFd,
    max_reply: u64,
    is_local: bool,
}

impl Channel {
    /// Takes a connected Unix socket.
    pub fn new(stream: impl Into<OwnedFd>) -> Self {
        Channel { stream: stream.into(), max_reply: MAX_REPLY, is_local: true }
    }

    /// Takes a connected TCP socket, over which no descriptors come, and no metadata of datasets.
    pub fn of_peer(stream: impl Into<OwnedFd>) -> Self {
        Channel { stream: stream.into(), max_reply: MAX_PEER_REPLY, is_local: false }
    }

    /// Process id of the peer as the kernel knows it, 0 if it is in a namespace that is not visible here.
    pub fn peer_pid(&self) -> i32 {
        use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
        getsockopt(&self.stream, PeerCredentials).map_or(0, |credentials| credentials.pid())
    }

    /// True if the peer is there and has sent nothing; vineyardd never speaks unasked, so anything else is the end.
    pub fn is_quiet(&self) -> bool {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
    }

    /// Waits for one of `flags`; returns what there is.
    fn wait(&self, flags: PollFlags, deadline: Instant) -> Result<PollFlags, Broken> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(broken(Kind::Timeout, "vineyardd did not answer in time"));
            }
            // Rounded up: a wait of 0 ms would spin.
            let timeout = PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.stream.as_fd(), flags)];
            match poll(&mut fds, timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(fds.first().and_then(PollFd::revents).unwrap_or(PollFlags::POLLERR)),
                Err(errno) => return Err(gone(Some(errno))),
            }
        }
    }

    /// Sends what fits without waiting; returns the number of bytes.
    fn send_some(&self, bytes: &[u8]) -> Result<usize, Broken> {
        match send(self.stream.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(n) => Ok(n),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(0),
            Err(errno) => Err(gone(Some(errno))),
        }
    }

    /// Sends `bytes`. Ends early, without an error, as soon as the peer has something to read: vineyardd does not read
    /// on until its reply is taken, so a writer that goes on regardless would wait for ever. Returns the bytes sent.
    ///
    /// # Errors
    /// [`Broken::sent`] is false if not a single byte of `bytes` left.
    pub fn send_until_reply(&self, bytes: &[u8], deadline: Instant) -> Result<usize, Broken> {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            let n = self.send_some(rest).map_err(|b| Broken { sent: done > 0, ..b })?;
            done += n;
            if n == 0 {
                let ready = self
                    .wait(PollFlags::POLLIN | PollFlags::POLLOUT, deadline)
                    .map_err(|b| Broken { sent: done > 0, ..b })?;
                if ready.contains(PollFlags::POLLIN) {
                    break;
                }
            }
        }
        Ok(done)
    }

    fn receive_exactly(&self, out: &mut [u8], deadline: Instant) -> Result<(), Broken> {
        let mut done = 0;
        while let Some(rest) = out.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match recv(self.stream.as_raw_fd(), rest, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Err(gone(None)),
                Ok(n) => done += n,
                Err(Errno::EAGAIN) => drop(self.wait(PollFlags::POLLIN, deadline)?),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(gone(Some(errno))),
            }
        }
        Ok(())
    }

    /// Reads what is there, at least one byte and at most `out`, which is not empty. Waits only for the first.
    pub fn receive_some(&self, out: &mut [u8], deadline: Instant) -> Result<usize, Broken> {
        let mut done = 0;
        while let Some(rest) = out.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match recv(self.stream.as_raw_fd(), rest, MsgFlags::MSG_DONTWAIT) {
                // What came before the end counts; the next call will meet the end again.
                Ok(0) if done > 0 => break,
                Ok(0) => return Err(gone(None)),
                Ok(n) => done += n,
                Err(Errno::EAGAIN) if done > 0 => break,
                Err(Errno::EAGAIN) => drop(self.wait(PollFlags::POLLIN, deadline)?),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(gone(Some(errno))),
            }
        }
        Ok(done)
    }

    /// Moves what comes into a pipe, at least one byte and at most `most`, which is not 0. Waits `gather` for more as long
    /// as there is room. 0 if sockets and pipes do not go together here.
    pub fn gather(&self, pipe: &Pipe, most: usize, gather: Duration, deadline: Instant) -> Result<usize, Broken> {
        let mut held = 0;
        let mut due = deadline;
        // Bytes are there.
        let mut ready = false;
        while held < most {
            match pipe.fill(&self.stream, most - held) {
                // What came before the end counts; the next call will meet the end again.
                Ok(0) if held > 0 => break,
                Ok(0) => return Err(gone(None)),
                Ok(n) => {
                    held += n;
                    ready = false;
                    due = deadline.min(Instant::now() + gather);
                }
                // The pipe is full.
                Err(Errno::EAGAIN) if held > 0 && ready => break,
                Err(Errno::EAGAIN) => match self.wait(PollFlags::POLLIN, due) {
                    Ok(_) => ready = true,
                    Err(late) if held > 0 && late.error.kind() == Kind::Timeout => break,
                    Err(error) => return Err(error),
                },
                Err(Errno::EINTR) => {}
                Err(Errno::EINVAL | Errno::ENOSYS) if held == 0 => return Ok(0),
                Err(errno) => return Err(gone(Some(errno))),
            }
        }
        Ok(held)
    }

    /// Lets the peer write nothing more; what it has written can still be read. False where that cannot be done: on a TCP
    /// socket it would tell the peer nothing.
    pub fn hang_up(&self) -> bool {
        use nix::sys::socket::{Shutdown, shutdown};
        self.is_local && shutdown(self.stream.as_raw_fd(), Shutdown::Read).is_ok()
    }

    /// From here on the other side counts as silent until so many bytes are here (1: until one is). Waiting for more
    /// spares both sides many small steps. Best effort.
    pub fn set_low_water(&self, bytes: usize) {
        let bytes: libc::c_int = i32::try_from(bytes).unwrap_or(i32::MAX);
        let (socket, size) = (self.stream.as_raw_fd(), size_of_val(&bytes) as libc::socklen_t);
        // SAFETY: the option is an int, which lives until after the call.
        unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, (&raw const bytes).cast(), size) };
    }

    /// Reads one frame into `out`, replacing what was there.
    pub fn receive(&self, out: &mut Vec<u8>, deadline: Instant) -> Result<(), Broken> {
        let mut header = [0; 8];
        self.receive_exactly(&mut header, deadline)?;
        let len = u64::from_le_bytes(header);
        if len == 0 || len > self.max_reply {
            return Err(bad_reply(format!("announces {len} bytes")));
        }
        let len = len as usize;
        out.clear();
        while out.len() < len {
            let start = out.len();
            // Doubling keeps the number of reallocations small and the unearned memory below what was received.
            out.resize(len.min(start + start.max(STEP)), 0);
            if let Some(part) = out.get_mut(start..) {
                self.receive_exactly(part, deadline)?;
            }
        }
        Ok(())
    }

    /// Receives one announced descriptor.
    pub fn receive_fd(&self, deadline: Instant) -> Result<OwnedFd, Broken> {
        let mut byte = [0u8; 1];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        loop {
            let mut parts = [IoSliceMut::new(&mut byte)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
            match recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, Some(&mut space), flags) {
                Ok(message) => {
                    let mut fds = Vec::new();
                    for part in message.cmsgs().map_err(|errno| gone(Some(errno)))? {
                        if let ControlMessageOwned::ScmRights(received) = part {
                            // SAFETY: the kernel has just made these descriptors for this process; nobody else owns
                            // them. All are taken, so that the superfluous ones are closed.
                            fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                        }
                    }
                    if message.bytes == 0 {
                        return Err(gone(None));
                    }
                    return match (fds.pop(), fds.is_empty()) {
                        (Some(fd), true) => Ok(fd),
                        (None, _) => Err(bad_reply("lacks a descriptor that it announced")),
                        (Some(_), false) => Err(bad_reply("has several descriptors in one message")),
                    };
                }
                Err(Errno::EAGAIN) => drop(self.wait(PollFlags::POLLIN, deadline)?),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(gone(Some(errno))),
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{IoSlice, Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(1)
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn pair() -> (Channel, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Channel::new(ours), theirs)
    }

    fn frame(json: &[u8]) -> Vec<u8> {
        [&(json.len() as u64).to_le_bytes(), json].concat()
    }

    fn send_fds(peer: &UnixStream, fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(peer.as_raw_fd(), &[IoSlice::new(&[0x14])], rights, MsgFlags::empty(), None).unwrap();
    }

    #[test]
    fn frames_and_descriptors_are_told_apart() {
        let (channel, mut peer) = pair();
        let (read_end, write_end) = nix::unistd::pipe().unwrap();
        assert!(channel.is_quiet());
        // All is there before anything is read: the case in which a read too far would lose a descriptor.
        peer.write_all(&frame(b"{\"a\":1}")).unwrap();
        send_fds(&peer, &[write_end.as_raw_fd()]);
        send_fds(&peer, &[read_end.as_raw_fd()]);
        peer.write_all(&frame(b"{}")).unwrap();
        assert!(!channel.is_quiet());
        let mut out = vec![9; 100];
        channel.receive(&mut out, later()).unwrap();
        assert_eq!(out, b"{\"a\":1}");
        let theirs = channel.receive_fd(later()).unwrap();
        let ours = channel.receive_fd(later()).unwrap();
        assert_eq!(
            nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_GETFD).unwrap() & libc::FD_CLOEXEC,
            libc::FD_CLOEXEC
        );
        channel.receive(&mut out, later()).unwrap();
        assert_eq!(out, b"{}");
        drop((read_end, write_end));
        std::fs::File::from(theirs).write_all(b"x").unwrap();
        let mut text = String::new();
        std::fs::File::from(ours).read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn bad_frames_break_the_connection() {
        for (bytes, kind) in [
            (vec![], Kind::Unavailable),
            (vec![1, 0, 0], Kind::Unavailable),
            (frame(b"{}")[..9].to_vec(), Kind::Unavailable),
            (u64::MAX.to_le_bytes().to_vec(), Kind::Malformed),
            ((MAX_REPLY + 1).to_le_bytes().to_vec(), Kind::Malformed),
            (vec![0; 8], Kind::Malformed),
            // Announced, never sent: must neither wait for ever nor reserve a GiB.
            (MAX_REPLY.to_le_bytes().to_vec(), Kind::Unavailable),
        ] {
            let (channel, mut peer) = pair();
            peer.write_all(&bytes).unwrap();
            drop(peer);
            let mut out = Vec::new();
            let broken = channel.receive(&mut out, later()).unwrap_err();
            assert_eq!(broken.error.kind(), kind, "{bytes:?}");
            assert!(out.capacity() <= 2 * STEP);
        }
    }

    #[test]
    fn another_instance_says_less_than_the_own_one() {
        for (len, kind) in [(MAX_PEER_REPLY, Kind::Unavailable), (MAX_PEER_REPLY + 1, Kind::Malformed)] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(&len.to_le_bytes()).unwrap();
            drop(theirs);
            let broken = Channel::of_peer(ours).receive(&mut Vec::new(), later()).unwrap_err();
            assert_eq!(broken.error.kind(), kind);
        }
    }

    #[test]
    fn silence_ends_at_the_deadline() {
        let (channel, mut peer) = pair();
        peer.write_all(&frame(b"{}")[..5]).unwrap();
        let start = Instant::now();
        assert_eq!(channel.receive(&mut Vec::new(), soon()).unwrap_err().error.kind(), Kind::Timeout);
        assert_eq!(channel.receive_fd(soon()).unwrap_err().error.kind(), Kind::Timeout);
        let broken = channel.send_until_reply(&vec![0; 64 << 20], soon()).unwrap_err();
        assert!(broken.error.kind() == Kind::Timeout && broken.sent);
        assert!(start.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn the_number_of_descriptors_must_be_right() {
        let (channel, peer) = pair();
        let null = std::fs::File::open("/dev/null").unwrap();
        send_fds(&peer, &[]);
        assert_eq!(channel.receive_fd(later()).unwrap_err().error.kind(), Kind::Malformed);
        send_fds(&peer, &[null.as_raw_fd(), null.as_raw_fd()]);
        assert_eq!(channel.receive_fd(later()).unwrap_err().error.kind(), Kind::Malformed);
        drop(peer);
        assert_eq!(channel.receive_fd(later()).unwrap_err().error.kind(), Kind::Unavailable);
    }

    #[test]
    fn a_writer_stops_for_a_reply() {
        let (channel, mut peer) = pair();
        peer.write_all(&frame(b"{}")).unwrap();
        let sent = channel.send_until_reply(&vec![0; 64 << 20], later()).unwrap();
        assert!(sent > 0 && sent < 64 << 20);
        drop(peer);
        let (channel, peer) = pair();
        drop(peer);
        let broken = channel.send_until_reply(b"x", later()).unwrap_err();
        assert!(!broken.sent && broken.error.kind() == Kind::Unavailable);
    }

    #[test]
    fn replies_are_checked() {
        #[derive(serde::Deserialize, Debug, PartialEq)]
        struct Reply {
            n: u64,
        }
        let parse = |text: &str| parse::<Reply>(text.as_bytes(), "r");
        assert_eq!(parse(r#"{"n":18446744073709551615,"type":"r","x":[1]}"#).unwrap(), Ok(Reply { n: u64::MAX }));
        for text in [
            "",
            "[]",
            "{",
            "null",
            "{}",
            r#"{"type":"r"}"#,
            r#"{"type":"r","n":-1}"#,
            r#"{"type":"r","n":1.5}"#,
            r#"{"type":"q","n":1}"#,
            r#"{"n":1}"#,
            r#"{"type":5,"n":1}"#,
            r#"{"type":"r","n":1}x"#,
            "\u{fffd}",
            r#"{"code":"x"}"#,
        ] {
            assert_eq!(parse(text).unwrap_err().kind(), Kind::Malformed, "{text}");
        }
        for (code, kind) in [
            (1, Kind::Invalid),
            (12, Kind::NotFound),
            (27, Kind::NotFound),
            (41, Kind::Full),
            (14, Kind::Busy),
            (6, Kind::Unsupported),
            (36, Kind::Unavailable),
            (255, Kind::Os(libc::EIO)),
        ] {
            let refusal = parse(&format!(r#"{{"code":{code},"message":"why"}}"#)).unwrap().unwrap_err();
            let error = Error::from(refusal);
            assert_eq!(error.kind(), kind);
            assert!(error.to_string().contains("why"));
        }
    }

    #[test]
    fn frames_are_built_whole_or_not_at_all() {
        let mut out = vec![7];
        push_frame(&mut out, &serde_json::json!({"a": "é"})).unwrap();
        assert_eq!(out[1..9], 10u64.to_le_bytes());
        assert_eq!(&out[9..], "{\"a\":\"é\"}".as_bytes());
        let long = "x".repeat(MAX_REQUEST);
        assert_eq!(push_frame(&mut out, &long).unwrap_err().kind(), Kind::TooLarge);
        assert_eq!(out.len(), 19);
    }
}
