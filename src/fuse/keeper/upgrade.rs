//! Replacing the program of a running mount's servers.
//!
//! The command sends the new program's file itself over a socket that only the mount's owner reaches. The server is
//! ended, which no client notices; if the new program's server does not come up, the old program's does.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Kind, Result};
use crate::fuse::protocol;
use crate::socket::connect_within;

/// How long a command may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a command waits for the new server.
const LONGEST: Duration = Duration::from_secs(60);

/// What a command asks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Command {
    /// Servers run the program that comes along, from now on.
    Upgrade,
}

/// What became of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Process id of the new server.
    pub pid: Option<u32>,
    /// Why the former program goes on.
    pub error: Option<String>,
}

/// An upgrade under way.
pub struct Pending {
    connection: UnixStream,
    /// The program before; `None` for the keeper's own.
    pub former: Option<OwnedFd>,
}

impl Pending {
    /// Tells the command.
    pub fn finish(self, outcome: &Outcome) -> Option<OwnedFd> {
        // It may have gone; the upgrade is as it is.
        protocol::send(self.connection.as_fd(), outcome, None, false).ok();
        self.former
    }
}

/// Takes an order: the new program, and whom to tell. `former` is put aside for the case that it does not work.
///
/// # Errors
/// `NotPermitted` for other users; `Malformed` for what is no order.
pub fn accept(listener: &UnixListener) -> Result<(OwnedFd, UnixStream)> {
    let (connection, _) = listener.accept()?;
    let asking = getsockopt(&connection, sockopt::PeerCredentials)?.uid();
    if asking != 0 && asking != nix::unistd::geteuid().as_raw() {
        return Err(Error::new(Kind::NotPermitted, format!("user {asking} may not replace the server")));
    }
    connection.set_read_timeout(Some(PATIENCE))?;
    match protocol::receive::<Command>(connection.as_fd())? {
        Some((Command::Upgrade, Some(program))) => Ok((program, connection)),
        _ => Err(Error::malformed("an upgrade without a program")),
    }
}

/// The upgrade, for the one that waits for it.
pub fn pending(connection: UnixStream, former: Option<OwnedFd>) -> Pending {
    Pending { connection, former }
}

/// Asks a keeper to run `program` from now on; returns the new server's process id.
///
/// # Errors
/// `Unavailable` if nobody keeps the mount, and why the new program does not work.
pub fn ask(socket: &Path, program: &OwnedFd) -> Result<u32> {
    let connection =
        connect_within(socket, Instant::now() + PATIENCE).context(|| format!("no keeper answers at {socket:?}"))?;
    connection.set_read_timeout(Some(LONGEST))?;
    protocol::send(connection.as_fd(), &Command::Upgrade, Some(program.as_fd()), true)?;
    match protocol::receive::<Outcome>(connection.as_fd())? {
        Some((Outcome { pid: Some(pid), .. }, _)) => Ok(pid),
        Some((Outcome { error: Some(error), .. }, _)) => Err(Error::new(Kind::Unavailable, error)),
        _ => Err(Error::new(Kind::Unavailable, "the keeper gave no answer; see the log of the mount")),
    }
}
