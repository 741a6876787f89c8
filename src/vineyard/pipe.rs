//! Bytes from a socket into a memory file, without a stop in memory of this process.
//!
//! The kernel moves references to what arrived into a pipe, and copies it once, into the pages of the file. Nothing is
//! mapped or faulted in, and a huge page that is filled by one piece is not cleared before: on two cores, storing 1 GiB
//! costs 0.26 to 0.33 CPU seconds this way and 0.33 to 0.43 through a mapping (Linux 6.18).

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;

use crate::error::{Context, Error, Kind, Result};

/// What a pipe holds if nobody forbids it: the most that a process without privileges may ask for.
const ROOM: libc::c_int = 1 << 20;

/// See the [module](self).
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    /// An empty pipe.
    ///
    /// # Errors
    /// The errno of `pipe2`.
    pub fn new() -> Result<Self> {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context(|| "making a pipe".into())?;
        // Less room means smaller pieces.
        let _ = nix::fcntl::fcntl(&write, nix::fcntl::FcntlArg::F_SETPIPE_SZ(ROOM));
        Ok(Pipe { read, write })
    }

    /// Takes at most `most` bytes from a socket, without waiting: neither for bytes nor for room in the pipe.
    pub fn fill(&self, socket: &OwnedFd, most: usize) -> std::result::Result<usize, Errno> {
        splice(socket, &self.write, None, most)
    }

    /// Writes `len` bytes that are in the pipe to a file.
    ///
    /// # Errors
    /// `Full` if there is no memory; the errno of `splice`.
    pub fn drain(&self, file: &OwnedFd, offset: u64, len: usize) -> Result<()> {
        let mut at = i64::try_from(offset).map_err(|_| Error::new(Kind::TooLarge, "past 2^63 bytes"))?;
        let mut left = len;
        while left > 0 {
            match splice(&self.read, file, Some(&mut at), left) {
                Ok(0) => return Err(Error::new(Kind::Internal, format!("a pipe is {left} bytes short"))),
                Ok(n) => left -= n.min(left),
                Err(Errno::EINTR) => {}
                Err(Errno::ENOSPC | Errno::ENOMEM) => {
                    return Err(Error::new(Kind::Full, "no memory for remote data"));
                }
                Err(errno) => return Err(errno).context(|| "writing a memory file from a pipe".into()),
            }
        }
        Ok(())
    }
}

fn splice(from: &OwnedFd, to: &OwnedFd, offset: Option<&mut i64>, len: usize) -> std::result::Result<usize, Errno> {
    let offset = offset.map_or(std::ptr::null_mut(), |offset| &raw mut *offset);
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    // SAFETY: both descriptors are open, and the offset is none or one that lives until after the call.
    let moved = unsafe { libc::splice(from.as_raw_fd(), std::ptr::null_mut(), to.as_raw_fd(), offset, len, flags) };
    Errno::result(moved).map(|moved| moved as usize)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    #[test]
    fn bytes_go_from_a_socket_to_their_place_in_a_file() {
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let (ours, pipe) = (OwnedFd::from(ours), Pipe::new().unwrap());
        assert_eq!(pipe.fill(&ours, 100), Err(Errno::EAGAIN), "it does not wait");
        theirs.write_all(b"0123456789").unwrap();
        assert_eq!(pipe.fill(&ours, 4), Ok(4));
        assert_eq!(pipe.fill(&ours, 100), Ok(6));
        let mut file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.write_all(&[b'-'; 20]).unwrap();
        pipe.drain(&OwnedFd::from(file.try_clone().unwrap()), 5, 10).unwrap();
        let mut found = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut found).unwrap();
        assert_eq!(found, "-----0123456789-----");
        drop(theirs);
        assert_eq!(pipe.fill(&ours, 100), Ok(0), "the end");
    }

    #[test]
    fn a_full_pipe_says_so() {
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        theirs.write_all(&[7; 4096]).unwrap();
        let writer = std::thread::spawn(move || theirs.write_all(&vec![7; 16 << 20]).is_ok());
        ours.set_nonblocking(true).unwrap();
        let (ours, pipe) = (OwnedFd::from(ours), Pipe::new().unwrap());
        let mut held = 0;
        let mut quiet = 0;
        while quiet < 50 {
            match pipe.fill(&ours, 16 << 20) {
                Ok(n) => (held, quiet) = (held + n, 0),
                Err(errno) => {
                    assert_eq!(errno, Errno::EAGAIN);
                    quiet += 1;
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
            }
        }
        assert!(held > 0 && held < 16 << 20, "{held}");
        drop(ours);
        assert!(!writer.join().unwrap());
    }
}
