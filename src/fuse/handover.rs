//! How a mount outlives its keeper: another process, the holder, has a copy of the connection, and a new keeper takes
//! the mount from there.
//!
//! A keeper that is told to end while its mount is in use stops its server, hands over all that it holds and goes
//! without unmounting. Requests then wait in the kernel, and the next keeper's server answers them. A keeper that is
//! killed leaves the connection alone with the holder: open files go on, except that a file which the kernel reads by
//! itself cannot be opened a second time until the first is closed.
//!
//! One JSON message a packet of a `SOCK_SEQPACKET` connection, with at most one descriptor, as in [`super::protocol`].

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;
use serde::{Deserialize, Serialize};

use super::handshake::Agreed;
use super::protocol::{self, KeptFile};
use crate::error::{Context, Error, Kind, Result};

/// Longest wait for a holder, in seconds. It does nothing slow.
const PATIENCE: i64 = 5;

/// What keeper and holder say.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum Message {
    /// A connection to the kernel, with its descriptor. From a keeper: it replaces all that was held for the mount
    /// point.
    Connection {
        /// Where it is mounted.
        mountpoint: PathBuf,
        /// Device number of the mount.
        device: (u32, u32),
        /// Whether other users may enter.
        allow_other: bool,
        /// Minor version of the protocol that the kernel speaks.
        minor: u32,
        /// Flags that were agreed on in INIT.
        flags: u64,
    },
    /// A memory file of the connection before it, with its descriptor.
    File(KeptFile),
    /// A text of the connection before it.
    State {
        /// Its name.
        key: String,
        /// The text.
        value: String,
    },
    /// Nothing follows. From a keeper: it ends now, and waits for [`Message::Done`].
    Complete,
    /// Asks for what is held for a mount point: a connection and what belongs to it, or [`Message::Complete`] at once.
    Take {
        /// The mount point.
        mountpoint: PathBuf,
    },
    /// Understood.
    Done,
}

/// All that makes a mount go on.
#[derive(Debug)]
pub struct Handed {
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Device number of the mount.
    pub device: (u32, u32),
    /// Whether other users may enter.
    pub allow_other: bool,
    /// What keeper and kernel agreed on.
    pub agreed: Agreed,
    /// The connection.
    pub fuse: OwnedFd,
    /// Memory files.
    pub files: Vec<(KeptFile, OwnedFd)>,
    /// Texts.
    pub state: Vec<(String, String)>,
}

impl Handed {
    /// What a [`Message::Connection`] and its descriptor begin.
    pub fn begin(message: &Message, fuse: OwnedFd) -> Option<Self> {
        let Message::Connection { mountpoint, device, allow_other, minor, flags } = message else { return None };
        Some(Handed {
            mountpoint: mountpoint.clone(),
            device: *device,
            allow_other: *allow_other,
            agreed: Agreed { minor: *minor, flags: *flags },
            fuse,
            files: Vec::new(),
            state: Vec::new(),
        })
    }

    /// Its first message.
    pub fn message(&self) -> Message {
        Message::Connection {
            mountpoint: self.mountpoint.clone(),
            device: self.device,
            allow_other: self.allow_other,
            minor: self.agreed.minor,
            flags: self.agreed.flags,
        }
    }

    /// Sends it whole.
    ///
    /// # Errors
    /// What the socket says.
    pub fn send(&self, socket: &OwnedFd) -> Result<()> {
        protocol::send(socket.as_fd(), &self.message(), Some(self.fuse.as_fd()), true)?;
        for (kept, file) in &self.files {
            protocol::send(socket.as_fd(), &Message::File(kept.clone()), Some(file.as_fd()), true)?;
        }
        for (key, value) in &self.state {
            let message = Message::State { key: key.clone(), value: value.clone() };
            protocol::send(socket.as_fd(), &message, None, true)?;
        }
        protocol::send(socket.as_fd(), &Message::Complete, None, true)
    }
}

/// Sets how long both directions may take.
///
/// # Errors
/// Those of `setsockopt`.
pub fn set_patience(socket: &OwnedFd) -> Result<()> {
    setsockopt(socket, sockopt::ReceiveTimeout, &TimeVal::new(PATIENCE, 0))?;
    setsockopt(socket, sockopt::SendTimeout, &TimeVal::new(PATIENCE, 0))?;
    Ok(())
}

/// A keeper's connection to its holder.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
}

impl Link {
    /// Connects to a holder.
    ///
    /// # Errors
    /// If there is none.
    pub fn connect(path: &Path) -> Result<Self> {
        let made = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        set_patience(&made)?;
        let address = UnixAddr::new(path).context(|| format!("socket path {path:?}"))?;
        connect(made.as_raw_fd(), &address).context(|| format!("no holder at {path:?}"))?;
        Ok(Link { socket: made })
    }

    /// The socket, to see when the holder goes.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// What the holder has for a mount point.
    ///
    /// # Errors
    /// If it does not answer as it should.
    pub fn take(&self, mountpoint: &Path) -> Result<Option<Handed>> {
        let ask = Message::Take { mountpoint: mountpoint.to_owned() };
        protocol::send(self.socket.as_fd(), &ask, None, true)?;
        let mut handed: Option<Handed> = None;
        loop {
            match (protocol::receive::<Message>(self.socket.as_fd())?, &mut handed) {
                (Some((Message::Complete, _)), _) => return Ok(handed),
                (Some((message @ Message::Connection { .. }, Some(fuse))), None) => {
                    handed = Handed::begin(&message, fuse);
                }
                (Some((Message::File(kept), Some(file))), Some(handed)) => handed.files.push((kept, file)),
                (Some((Message::State { key, value }, _)), Some(handed)) => handed.state.push((key, value)),
                (Some(_), _) => return Err(Error::malformed("the holder said something out of order")),
                (None, _) => return Err(Error::new(Kind::Unavailable, "the holder has gone")),
            }
        }
    }

    /// Gives the holder a copy of the connection alone.
    ///
    /// # Errors
    /// What the socket says.
    pub fn deposit(&self, handed: &Handed) -> Result<()> {
        protocol::send(self.socket.as_fd(), &handed.message(), Some(handed.fuse.as_fd()), true)
    }

    /// Hands everything over, and waits until the holder has it.
    ///
    /// # Errors
    /// If it may not have all of it.
    pub fn hand_over(&self, handed: &Handed) -> Result<()> {
        handed.send(&self.socket)?;
        match protocol::receive::<Message>(self.socket.as_fd())? {
            Some((Message::Done, _)) => Ok(()),
            _ => Err(Error::new(Kind::Unavailable, "the holder does not confirm")),
        }
    }
}
