//! The answer to "how are you?": one line of JSON to everyone who connects.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::{Context, Error, Kind, Result};
use crate::socket::connect_within;

/// Answers connections with `report` until the socket breaks. For a thread of its own.
pub fn serve(listener: &UnixListener, report: impl Fn() -> Value) {
    for connection in listener.incoming() {
        match connection {
            Ok(connection) => answer(connection, &report()),
            Err(error) => {
                tracing::warn!("status: {error}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Sends one report. Somebody who does not read is not waited for long.
pub fn answer(mut connection: UnixStream, report: &Value) {
    let line = format!("{report}\n");
    let sent = connection
        .set_write_timeout(Some(Duration::from_millis(200)))
        .and_then(|()| connection.write_all(line.as_bytes()));
    if let Err(error) = sent {
        tracing::debug!("status: {error}");
    }
}

/// Asks at a socket.
///
/// # Errors
/// `Timeout` if nothing comes within `longest`, `Unavailable` if nobody listens.
pub fn ask(socket: &Path, longest: Duration) -> Result<Value> {
    let until = Instant::now() + longest;
    let mut connection = connect_within(socket, until).map_err(|error| match error.kind() {
        std::io::ErrorKind::TimedOut => {
            Error::new(Kind::Timeout, format!("{socket:?} accepts nobody within {longest:?}"))
        }
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
            Error::new(Kind::Unavailable, format!("nobody answers at {socket:?}"))
        }
        _ => Error::from(error),
    })?;
    let mut text = Vec::new();
    let mut part = [0; 16 << 10];
    loop {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        connection.set_read_timeout(Some(left))?;
        match connection.read(&mut part) {
            Ok(0) => break,
            Ok(length) => text.extend(part.get(..length).unwrap_or_default()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                return Err(Error::new(Kind::Timeout, format!("no answer at {socket:?} within {longest:?}")));
            }
            Err(error) => return Err(error).context(|| format!("asking at {socket:?}")),
        }
        if Instant::now() > until {
            return Err(Error::new(Kind::Timeout, format!("no answer at {socket:?} within {longest:?}")));
        }
    }
    serde_json::from_slice(&text).map_err(|error| Error::malformed(format!("answer at {socket:?}: {error}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn who_answers_is_heard_and_who_does_not_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        assert_eq!(ask(&socket, Duration::from_secs(1)).unwrap_err().kind(), Kind::Unavailable);
        let listener = UnixListener::bind(&socket).unwrap();
        let start = Instant::now();
        assert_eq!(ask(&socket, Duration::from_millis(50)).unwrap_err().kind(), Kind::Timeout);
        assert!(start.elapsed() < Duration::from_secs(30));
        // Nor one that is frozen while many ask.
        let held = crate::socket::fill(&listener, &socket);
        assert_eq!(ask(&socket, Duration::from_millis(50)).unwrap_err().kind(), Kind::Timeout);
        assert!(start.elapsed() < Duration::from_secs(60));
        drop(held);
        std::thread::spawn(move || serve(&listener, || serde_json::json!({"long": "x".repeat(100_000)})));
        let answer = ask(&socket, Duration::from_secs(60)).unwrap();
        assert_eq!(answer["long"].as_str().unwrap().len(), 100_000);
    }
}
