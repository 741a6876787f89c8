//! Where journals lie: one file for each keeper, and for each command that changes a store, named after the store's
//! socket, in a folder of this user.
//!
//! Its owner holds a lock on it (`flock(2)`): process numbers tell who lives only within one process namespace, and
//! containers may share the folder. A journal outlives its keeper. The next keeper of a mount over the same store, and `vineyard-fs gc`, take over what dead
//! ones left; what is in a journal is explained at [`crate::vineyard::journal`].

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};

use super::{mountinfo, runtime};
use crate::error::{Context, Error, Kind, Result};
use crate::socket;
use crate::vineyard::journal::LEAST_LEN;

/// How long somebody may look at a new journal.
const PATIENCE: Duration = Duration::from_secs(1);
/// Most bytes that are taken over of one journal.
const MOST: u64 = 64 << 20;

/// The journal of this keeper, or of this command.
#[derive(Debug)]
pub struct Leftovers {
    path: PathBuf,
    /// Holds the lock.
    _file: File,
}

impl Leftovers {
    /// Makes a journal for the store at `socket`; with `take_over`, what dead keepers and commands of the store noted is in
    /// it.
    ///
    /// # Errors
    /// If the folder or the file cannot be made.
    pub fn open(socket: &Path, take_over: bool) -> Result<Self> {
        Self::open_in(&runtime::base().join("journals"), socket, take_over)
    }

    /// The journals that dead keepers and commands of the store have left, to look at.
    ///
    /// # Errors
    /// If the folder or a file cannot be read.
    pub fn of_dead(socket: &Path) -> Result<Vec<File>> {
        let folder = runtime::base().join("journals");
        if !folder.exists() {
            return Ok(Vec::new());
        }
        Ok(dead(&folder, &name_of(socket))?.into_iter().map(|(_, file)| file).collect())
    }

    fn open_in(folder: &Path, socket: &Path, take_over: bool) -> Result<Self> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.context(|| format!("cannot make the folder {folder:?}"))?;
        let pid = std::process::id();
        let start = runtime::start_time(pid).ok_or_else(|| Error::new(Kind::Internal, "a process without a start"))?;
        let store = name_of(socket);
        let path = folder.join(format!("{store}.{pid}.{start}"));
        let mut file = create(&path)?;
        for (left, mut theirs) in if take_over { dead(folder, &store)? } else { Vec::new() } {
            let claimed = folder.join(format!("{store}.taken.{pid}"));
            // Who renames it first has it.
            if std::fs::rename(&left, &claimed).is_ok() {
                let mut text = Vec::new();
                (&mut theirs).take(MOST).read_to_end(&mut text)?;
                // A line that was cut is none, and zeros stand where there is no text.
                text.truncate(text.iter().rposition(|&b| b == b'\n').map_or(0, |end| end + 1));
                file.write_all(&text)?;
                std::fs::remove_file(&claimed)?;
            }
        }
        // Notes must find room where memory has ended.
        let len = file.metadata()?.len();
        if let Some(rest) = LEAST_LEN.checked_sub(len).filter(|rest| *rest > 0) {
            fallocate(&file, FallocateFlags::empty(), len as i64, rest as i64)
                .context(|| format!("no room for {path:?}"))?;
        }
        Ok(Leftovers { path, _file: file })
    }

    /// The file, for a server.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn share(&self) -> Result<File> {
        OpenOptions::new().read(true).write(true).open(&self.path).context(|| format!("cannot open {:?}", self.path))
    }

    /// The mount has ended: an empty journal goes, and any where the store has ended as well.
    pub fn end(&self, with_store: bool) {
        let empty = std::fs::read(&self.path).is_ok_and(|text| text.iter().all(|&byte| byte == 0));
        if (empty || with_store)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::info!("{:?} stays: {error}", self.path);
        }
    }
}

/// What the journals of a store begin with.
fn name_of(socket: &Path) -> String {
    mountinfo::digest(&socket::place(socket))
}

/// Makes a journal and locks it.
fn create(path: &Path) -> Result<File> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        let file = file.context(|| format!("cannot make {path:?}"))?;
        // Who looks whether its owner lives may have it for a moment, and may have taken it away before it was locked.
        let locked = lock(&file);
        let is_here =
            std::fs::metadata(path).is_ok_and(|there| file.metadata().is_ok_and(|it| it.ino() == there.ino()));
        if locked && is_here {
            return Ok(file);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(Error::new(Kind::Busy, format!("somebody else keeps {path:?}")))
}

/// Locks a journal, as long as the file is open; false if somebody else has done so.
fn lock(file: &File) -> bool {
    // SAFETY: the descriptor is open as long as `file` lives.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

/// The journals of keepers of a store that run no more, and the files, locked.
fn dead(folder: &Path, store: &str) -> Result<Vec<(PathBuf, File)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).context(|| format!("cannot read {folder:?}"))? {
        let entry = entry?;
        let name = entry.file_name();
        let Some((whose, keeper)) = name.to_str().and_then(|name| name.split_once('.')) else { continue };
        let Some((pid, start)) = keeper.split_once('.') else { continue };
        // A keeper that ended while it took a journal over left it as `taken`.
        let runs = match (pid.parse::<u32>(), start.parse::<u64>()) {
            (Ok(pid), Ok(start)) => runtime::start_time(pid) == Some(start),
            (Err(_), Ok(taker)) => u32::try_from(taker).is_ok_and(|pid| runtime::start_time(pid).is_some()),
            _ => true,
        };
        if whose == store
            && !runs
            && let Some(file) = File::open(entry.path()).ok().filter(lock)
        {
            found.push((entry.path(), file));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::vineyard::journal::Journal;

    #[test]
    fn a_keeper_takes_over_what_dead_ones_of_its_store_left() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, other) = (Path::new("/run/a.sock"), Path::new("/run/b.sock"));
        let store = mountinfo::digest(socket);
        let write = |name: String, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        // No process has such a number.
        write(format!("{store}.4294967294.7"), "+ o0000000000000001\n");
        write(format!("{store}.taken.4294967293"), "+ o0000000000000002\n");
        write(format!("{store}.1.{}", runtime::start_time(1).unwrap()), "+ o0000000000000003\n");
        write(format!("{}.4294967294.7", mountinfo::digest(other)), "+ o0000000000000004\n");
        let journal = Leftovers::open_in(folder.path(), socket, false).unwrap();
        assert!(Journal::open(journal.share().unwrap()).unwrap().kept().is_empty(), "a command leaves them alone");
        journal.end(false);
        let journal = Leftovers::open_in(folder.path(), socket, true).unwrap();
        let kept = Journal::open(journal.share().unwrap()).unwrap();
        assert_eq!(kept.kept().iter().map(|id| id.0).collect::<Vec<_>>(), [1, 2]);
        let left = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, 3, "that of a keeper that runs, that of another store, and the new one");
        journal.end(false);
        kept.settle(&kept.kept());
        journal.end(false);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_keeper_of_another_process_namespace_lives_as_long_as_it_holds_its_journal() {
        let folder = tempfile::tempdir().unwrap();
        let socket = Path::new("/run/a.sock");
        // No process has such a number here.
        let path = folder.path().join(format!("{}.4294967294.7", name_of(socket)));
        let theirs = create(&path).unwrap();
        std::fs::write(&path, "+ o0000000000000001\n").unwrap();
        let kept = || {
            let journal = Leftovers::open_in(folder.path(), socket, true).unwrap();
            let kept = Journal::open(journal.share().unwrap()).unwrap().kept().len();
            journal.end(true);
            kept
        };
        assert_eq!((kept(), path.exists()), (0, true));
        drop(theirs);
        assert_eq!((kept(), path.exists()), (1, false));
    }
}
