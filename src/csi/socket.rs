//! Sockets in a folder that the processes of two generations of pods share.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};

/// The file of a socket on which this process listens.
///
/// The next process may start before this one has ended: it puts its own socket in the same place, which must stay
/// there. The two are told apart by their inode numbers, which differ as long as this process has not closed its socket.
#[derive(Clone, Debug)]
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// The one that was bound at `path` just now.
    ///
    /// # Errors
    /// If it is not there.
    pub fn of(path: &Path) -> Result<Self> {
        let found = std::fs::symlink_metadata(path).context(|| format!("cannot find the socket {path:?}"))?;
        Ok(SocketFile { path: path.to_owned(), device: found.dev(), inode: found.ino() })
    }

    /// Whether nothing is in its place, so that nobody is reached there.
    pub fn is_gone(&self) -> bool {
        std::fs::symlink_metadata(&self.path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
    }

    /// Removes it, unless it is another process's by now. Only while this process listens.
    pub fn remove(&self) {
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|found| found.dev() == self.device && found.ino() == self.inode);
        if ours {
            // Not there any more is as good.
            std::fs::remove_file(&self.path).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn only_the_own_socket_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let first = UnixListener::bind(&path).unwrap();
        let file = SocketFile::of(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(file.is_gone());
        let second = UnixListener::bind(&path).unwrap();
        file.remove();
        assert!(path.exists() && !file.is_gone(), "it is the second one's");
        drop(first);
        SocketFile::of(&path).unwrap().remove();
        assert!(!path.exists());
        drop(second);
    }
}
