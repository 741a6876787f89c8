//! Where a mount leaves word of itself: a folder with the keeper's process id and three sockets.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::mountinfo;
use crate::error::{Context, Error, Kind, Result};

/// The keeper of a mount, as its folder names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeeperRecord {
    /// Its process id.
    pub pid: u32,
    /// When it started, in ticks since boot: tells it from a later process with the same id.
    pub start: u64,
    /// What it keeps.
    pub mountpoint: PathBuf,
    /// Device number of the mount, once there is one.
    pub device: Option<(u32, u32)>,
}

/// The folder of one mount.
#[derive(Clone, Debug)]
pub struct Runtime {
    folder: PathBuf,
}

impl Runtime {
    /// The folder that belongs to a mount point, whether it exists or not.
    pub fn of(mountpoint: &Path) -> Self {
        Runtime { folder: base().join(mountinfo::digest(mountpoint)) }
    }

    /// A folder that was chosen before.
    pub fn at(folder: &Path) -> Self {
        Runtime { folder: folder.to_owned() }
    }

    /// Its path.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Socket that the keeper answers, always at once.
    pub fn keeper_socket(&self) -> PathBuf {
        self.folder.join("keeper.sock")
    }

    /// Socket that the server answers.
    pub fn status_socket(&self) -> PathBuf {
        self.folder.join("status.sock")
    }

    /// Socket at which the keeper takes orders.
    pub fn command_socket(&self) -> PathBuf {
        self.folder.join("command.sock")
    }

    /// Whether nobody else could have written what is there: the folder of all mounts lies where others may make it.
    pub fn is_own(&self) -> bool {
        self.folder.parent().is_some_and(is_own) && is_own(&self.folder)
    }

    fn record_file(&self) -> PathBuf {
        self.folder.join("keeper.json")
    }

    /// Makes the folder, for its owner alone.
    ///
    /// # Errors
    /// If it cannot be made, or belongs to somebody else.
    pub fn create(&self) -> Result<()> {
        let builder = |path: &Path| std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        builder(&self.folder).context(|| format!("cannot make the folder {:?}", self.folder))?;
        if !is_own(&base()) {
            return Err(Error::new(Kind::NotPermitted, format!("the folder {:?} belongs to somebody else", base())));
        }
        Ok(())
    }

    /// Writes down who keeps the mount.
    ///
    /// # Errors
    /// If the folder cannot be written to.
    pub fn write_record(&self, record: &KeeperRecord) -> Result<()> {
        let text = serde_json::to_vec(record).map_err(|e| Error::new(Kind::Internal, e.to_string()))?;
        let new = self.folder.join("keeper.json.new");
        std::fs::write(&new, text).context(|| format!("cannot write {new:?}"))?;
        std::fs::rename(&new, self.record_file()).context(|| format!("cannot write {:?}", self.record_file()))
    }

    /// Who keeps the mount, dead or alive. What is in a folder of somebody else says nothing: its process could be any.
    pub fn record(&self) -> Option<KeeperRecord> {
        self.is_own().then_some(())?;
        serde_json::from_slice(&std::fs::read(self.record_file()).ok()?).ok()
    }

    /// Who keeps the mount, if that process still runs.
    pub fn keeper(&self) -> Option<KeeperRecord> {
        self.record().filter(|record| start_time(record.pid) == Some(record.start))
    }

    /// Removes the folder.
    pub fn remove(&self) {
        if let Err(error) = std::fs::remove_dir_all(&self.folder)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::info!("{:?} stays: {error}", self.folder);
        }
    }
}

/// The folder of all mounts of this user.
pub fn base() -> PathBuf {
    let user = nix::unistd::geteuid();
    if user.is_root() {
        return PathBuf::from("/run/vineyard-fs");
    }
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(folder) if folder.is_absolute() => folder.join("vineyard-fs"),
        _ => std::env::temp_dir().join(format!("vineyard-fs-{user}")),
    }
}

/// Whether a path is a folder, no link to one, of this process's user.
fn is_own(path: &Path) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir() && meta.uid() == own)
}

/// When a process started, in ticks since boot (field 22 of proc(5)'s `stat`); `None` if there is none, or a zombie.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold blanks and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    (state != "Z" && state != "X").then(|| fields.nth(18)?.parse().ok())?
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_record_tells_whether_its_process_runs() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Runtime::at(&folder.path().join("mount"));
        std::fs::create_dir(runtime.folder()).unwrap();
        assert_eq!(runtime.keeper(), None);
        let pid = std::process::id();
        let mut record =
            KeeperRecord { pid, start: start_time(pid).unwrap(), mountpoint: "/mnt/x".into(), device: Some((0, 5)) };
        runtime.write_record(&record).unwrap();
        assert_eq!(runtime.keeper(), Some(record.clone()));
        record.start += 1;
        runtime.write_record(&record).unwrap();
        assert_eq!(runtime.keeper(), None, "the same id, another process");
        assert_eq!(runtime.record(), Some(record));
    }

    #[test]
    fn what_is_in_a_folder_of_somebody_else_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let all = folder.path().join("all");
        let runtime = Runtime::at(&all.join("mount"));
        std::fs::create_dir_all(runtime.folder()).unwrap();
        let pid = std::process::id();
        let record = KeeperRecord { pid, start: start_time(pid).unwrap(), mountpoint: "/mnt/x".into(), device: None };
        runtime.write_record(&record).unwrap();
        assert_eq!(runtime.keeper(), Some(record));
        // By a link.
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&all, &link).unwrap();
        assert_eq!(Runtime::at(&link.join("mount")).keeper(), None);
        if nix::unistd::geteuid().is_root() {
            for path in [runtime.folder(), &all] {
                std::os::unix::fs::chown(path, Some(65534), None).unwrap();
                assert!(runtime.keeper().is_none() && runtime.record().is_none(), "{path:?}");
                std::os::unix::fs::chown(path, Some(0), None).unwrap();
            }
            assert!(runtime.keeper().is_some());
        }
    }

    #[test]
    fn mount_points_have_folders_of_their_own() {
        let (a, b) = (Runtime::of(Path::new("/mnt/a")), Runtime::of(Path::new("/mnt/b")));
        assert_ne!(a.folder(), b.folder());
        assert_eq!(a.folder().parent(), Some(base().as_path()));
    }
}
