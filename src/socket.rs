//! Connecting to a Unix socket without waiting for ever, and telling two sockets apart.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

/// How often one whose backlog is full is tried again.
const AGAIN: Duration = Duration::from_millis(5);

/// Connects to a socket's path. [`UnixStream::connect`] would wait for ever for a process that is frozen and whose backlog
/// is full.
///
/// # Errors
/// The errno of `connect`; [`ErrorKind::TimedOut`] if the backlog stays full until `deadline`.
pub fn connect_within(path: &Path, deadline: Instant) -> Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    loop {
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => break,
            Err(Errno::EINTR) => {}
            // A Unix socket whose backlog is full can't be polled for room.
            Err(Errno::EAGAIN) if Instant::now() < deadline => std::thread::sleep(AGAIN),
            Err(Errno::EAGAIN) => return Err(Error::from_raw_os_error(libc::ETIMEDOUT)),
            Err(errno) => return Err(errno.into()),
        }
    }
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Where a socket lies, whatever path led there: links are followed. It need not exist.
pub fn place(path: &Path) -> PathBuf {
    let beside = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Ok(folder.canonicalize()?.join(path.file_name().ok_or(ErrorKind::InvalidInput)?))
    };
    let found: Result<PathBuf> = path.canonicalize().or_else(|_| beside(path));
    found.unwrap_or_else(|_| path.to_owned())
}

/// Whether somebody listens there, who has no room for more who connect.
pub fn is_full(error: &Error) -> bool {
    error.kind() == ErrorKind::TimedOut
}

/// Connects to a socket until its backlog is full, which is short from now on.
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) fn fill(listener: &std::os::unix::net::UnixListener, path: &Path) -> Vec<UnixStream> {
    nix::sys::socket::listen(listener, nix::sys::socket::Backlog::new(2).unwrap()).unwrap();
    let mut held = Vec::new();
    loop {
        match connect_within(path, Instant::now()) {
            Ok(stream) => held.push(stream),
            Err(error) if is_full(&error) => return held,
            Err(error) => panic!("{error}"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_is_one_by_whatever_path() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().canonicalize().unwrap().join("s");
        assert_eq!(place(&folder.path().join("./s")), real, "before it is there");
        let _listener = UnixListener::bind(&real).unwrap();
        let (link, below) = (folder.path().join("link"), folder.path().join("below"));
        std::os::unix::fs::symlink("s", &link).unwrap();
        std::os::unix::fs::symlink(".", &below).unwrap();
        assert_eq!([place(&link), place(&below.join("s")), place(&real)], [&real, &real, &real].map(PathBuf::clone));
        assert_eq!(place(Path::new("/nowhere/at/all")), Path::new("/nowhere/at/all"));
    }

    #[test]
    fn who_has_no_room_is_not_waited_for_and_who_has_some_soon_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let soon = || Instant::now() + Duration::from_millis(50);
        assert_eq!(connect_within(&path, soon()).unwrap_err().kind(), ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).unwrap();
        let held = fill(&listener, &path);
        let begun = Instant::now();
        assert!(is_full(&connect_within(&path, soon()).unwrap_err()));
        assert!(begun.elapsed() >= Duration::from_millis(50) && begun.elapsed() < Duration::from_secs(10));
        let accepting = std::thread::spawn(move || {
            for _ in 0..=held.len() {
                let mut stream = listener.accept().unwrap().0;
                std::thread::sleep(Duration::from_millis(10));
                drop(stream.write_all(b"x"));
            }
        });
        // Reading waits.
        let mut stream = connect_within(&path, Instant::now() + Duration::from_secs(60)).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        accepting.join().unwrap();
        assert_eq!(connect_within(&path, soon()).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
}
