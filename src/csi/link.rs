//! What node plugin and mounter say to each other: one question and one answer, a line of JSON each, over a Unix socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::state::MountKey;
use crate::error::{Context, Error, Kind, Result};
use crate::socket::{connect_within, is_full};

/// Longest line in bytes.
const LINE_MAX: u64 = 1 << 20;
/// What the mounter needs to answer after its own deadline.
const GRACE: Duration = Duration::from_secs(2);

/// A question to the mounter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Question {
    /// A mount that answers: the one there is, or a new one.
    Mount {
        /// Which.
        key: MountKey,
        /// How long to wait for a vineyardd or a mount that does not answer, in ms.
        wait_ms: u64,
    },
    /// All mounts there are.
    List,
}

/// An answer of the mounter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// To [`Question::Mount`].
    Mounted(Live),
    /// To [`Question::List`].
    Mounts {
        /// In no order.
        mounts: Vec<Live>,
    },
    /// It did not work yet; asking again may help.
    Failed {
        /// What is missing, and what to do.
        message: String,
        /// This node has as many mounts as it may.
        #[serde(default)]
        full: bool,
    },
}

/// A mount that answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Live {
    /// Which.
    pub key: MountKey,
    /// Where.
    pub path: PathBuf,
    /// Device number.
    pub device: (u32, u32),
}

/// Asks the mounter, which is given until `until` to answer; so is one that is not there to come back.
///
/// # Errors
/// `Unavailable` if there is none or it says that it did not work, `Full` if it has as many mounts as it may; `Timeout`.
pub fn ask(socket: &Path, question: &Question, until: Instant) -> Result<Answer> {
    ask_within(socket, question, until, GRACE)
}

/// As [`ask`], with `grace` more for the answer.
///
/// # Errors
/// As [`ask`].
pub fn ask_within(socket: &Path, question: &Question, until: Instant, grace: Duration) -> Result<Answer> {
    let left = || until.saturating_duration_since(Instant::now()) + grace;
    let absent = |error: std::io::Error| {
        let message = "the mounter of this node does not answer: look at its pod (`kubectl get pods -A -l \
                       app.kubernetes.io/component=mounter -o wide`)";
        Error::new(Kind::Unavailable, message).with_source(error)
    };
    // A pod that is just being replaced comes back.
    let mut stream = loop {
        match connect_within(socket, until + grace) {
            Ok(stream) => break stream,
            Err(error) if is_full(&error) || Instant::now() >= until => return Err(absent(error)),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    stream.set_write_timeout(Some(left()))?;
    send(&mut stream, question).context(|| "cannot ask the mounter".into())?;
    stream.set_read_timeout(Some(left()))?;
    match receive(&stream)? {
        Answer::Failed { message, full } => Err(Error::new(if full { Kind::Full } else { Kind::Unavailable }, message)),
        answer => Ok(answer),
    }
}

/// Sends one line.
///
/// # Errors
/// If it cannot be sent.
pub fn send<T: Serialize>(stream: &mut UnixStream, message: &T) -> Result<()> {
    let mut line = serde_json::to_vec(message).map_err(|e| Error::new(Kind::Internal, e.to_string()))?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

/// Receives one line.
///
/// # Errors
/// `Timeout` after the stream's read time-out, `Unavailable` if the other side goes, `Malformed`.
pub fn receive<T: DeserializeOwned>(stream: &UnixStream) -> Result<T> {
    let mut line = String::new();
    match BufReader::new(stream.take(LINE_MAX)).read_line(&mut line) {
        Ok(0) => return Err(Error::new(Kind::Unavailable, "the other process has gone")),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            return Err(Error::new(Kind::Timeout, "no answer in time"));
        }
        Err(error) => return Err(error.into()),
    }
    serde_json::from_str(&line).map_err(|error| Error::malformed(format!("a message that is not understood: {error}")))
}
