//! System calls that may never return, made in a child process that can be left behind.
//!
//! Whatever looks a path up in a FUSE mount, or is mounted on one, waits for the mount's server; and a thread that waits
//! there cannot be ended, nor can its process. So those calls happen in a forked child, which does nothing else: all it
//! needs is prepared before the fork, and it makes system calls only until it ends. It holds no descriptor of the
//! parent but the pipe that it reports through.

use std::ffi::{CStr, CString};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use crate::error::{Error, Kind, Result};

/// One system call.
#[derive(Clone, Debug)]
pub enum Step {
    /// Makes a directory, if it is not there; a new one gets this mode and group, whatever this process's mask.
    MakeDirectory {
        /// Where.
        path: CString,
        /// Permission bits.
        mode: u32,
        /// Its group.
        group: u32,
    },
    /// Shows a directory at a second place.
    Bind {
        /// What is shown.
        from: CString,
        /// Where.
        to: CString,
    },
    /// Lets what is mounted here, and bind mounts of it that are made from now on, have no part in what happens at other
    /// places where it is mounted.
    Private(CString),
    /// As [`Step::Bind`], but nothing can be written at the second place, from the first moment on.
    BindReadOnly {
        /// What is shown.
        from: CString,
        /// Where.
        to: CString,
    },
    /// Takes the mount here out of the tree.
    Detach(CString),
    /// Removes a directory, if it is there and nothing is in it.
    RemoveDirectory(CString),
    /// Asks the server of the mount here for the attributes of its root.
    Probe(CString),
    /// Asks the server of the mount here how much room there is.
    Figures(CString),
}

/// How much room there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes that can be written.
    pub free_bytes: u64,
    /// Inodes in all.
    pub total_files: u64,
    /// Inodes that can be made.
    pub free_files: u64,
}

/// Why steps were not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The deadline passed in the middle of one.
    Hung,
    /// One was refused.
    Failed {
        /// Which, from 0.
        step: usize,
        /// Why.
        errno: Errno,
    },
}

/// A path as system calls take it.
///
/// # Errors
/// `Invalid` with a NUL in it.
pub fn path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::new(Kind::Invalid, format!("{path:?} has a NUL in it")))
}

const WORDS: usize = 6;

/// What a child reports: the number of steps done, the errno of the next one or 0, and figures.
type Report = [u64; WORDS];

/// Children that did not end in time, to be reaped when they do.
static ABANDONED: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// Does `steps`, one after the other, until one fails or `until` comes.
///
/// # Errors
/// If no process can be made.
pub fn run(steps: &[Step], until: Instant) -> Result<std::result::Result<Figures, Trouble>> {
    reap_abandoned();
    let (ours, theirs) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    // SAFETY: this process has threads, so the child may only make system calls that are safe in a signal handler;
    // `in_child` makes no others and does not return.
    let child = match unsafe { fork() }? {
        ForkResult::Child => in_child(steps, theirs.as_raw_fd()),
        ForkResult::Parent { child } => child,
    };
    drop(theirs);
    let report = await_report(ours, until);
    if let Ok(Some(_)) = &report {
        // It has nothing left to do but to end.
        waitpid(child, None).ok();
    } else {
        kill(child, Signal::SIGKILL).ok();
        if !matches!(waitpid(child, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)))
        {
            ABANDONED.lock().unwrap_or_else(|e| e.into_inner()).push(child);
        }
    }
    Ok(match report? {
        None => Err(Trouble::Hung),
        Some([_, 0, total_bytes, free_bytes, total_files, free_files]) => {
            Ok(Figures { total_bytes, free_bytes, total_files, free_files })
        }
        Some([step, errno, ..]) => Err(Trouble::Failed { step: step as usize, errno: Errno::from_raw(errno as i32) }),
    })
}

/// How many children wait for a mount that does not answer.
pub fn abandoned() -> usize {
    reap_abandoned();
    ABANDONED.lock().unwrap_or_else(|e| e.into_inner()).len()
}

fn reap_abandoned() {
    let mut abandoned = ABANDONED.lock().unwrap_or_else(|e| e.into_inner());
    abandoned.retain(|child| matches!(waitpid(*child, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive)));
}

fn await_report(pipe: OwnedFd, until: Instant) -> Result<Option<Report>> {
    let mut ready = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    loop {
        let left = until.saturating_duration_since(Instant::now()).as_millis() + 1;
        match poll(&mut ready, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) if Instant::now() >= until => return Ok(None),
            Ok(0) | Err(Errno::EINTR) => continue,
            Ok(_) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    let mut bytes = [0; WORDS * 8];
    std::fs::File::from(pipe)
        .read_exact(&mut bytes)
        .map_err(|_| Error::new(Kind::Internal, "a helper process ended without a word"))?;
    let mut report = Report::default();
    for (word, bytes) in report.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    Ok(Some(report))
}

/// The child. Nothing here allocates, locks or panics.
fn in_child(steps: &[Step], pipe: RawFd) -> ! {
    let keep = pipe as libc::c_uint;
    // SAFETY: closes descriptors by number and touches no memory. Nobody in this process uses them any more; if it
    // fails (before Linux 5.9), they close when the child ends.
    unsafe {
        if keep > 0 {
            libc::syscall(libc::SYS_close_range, 0 as libc::c_uint, keep - 1, 0);
        }
        libc::syscall(libc::SYS_close_range, keep.saturating_add(1), libc::c_uint::MAX, 0);
    }
    let mut report: Report = [0; WORDS];
    for step in steps {
        let errno = step.perform(&mut report);
        if errno != 0 {
            report[1] = errno as u64;
            break;
        }
        report[0] += 1;
    }
    // SAFETY: writes from an array of this frame, of this size, which is smaller than what a pipe takes at once; then
    // ends without running anything of the parent's.
    unsafe {
        libc::write(pipe, report.as_ptr().cast(), size_of::<Report>());
        libc::_exit(0)
    }
}

impl Step {
    /// Makes the call; its errno, or 0.
    fn perform(&self, report: &mut Report) -> i32 {
        let none = std::ptr::null();
        // SAFETY: all paths are terminated strings and the structures are of the types that the calls fill in; all
        // live until after the call, which keeps none of them.
        let (result, fine) = unsafe {
            match self {
                Step::MakeDirectory { path, mode, group } => {
                    let mut result = libc::mkdir(path.as_ptr(), *mode);
                    if result == 0 {
                        result = libc::chown(path.as_ptr(), 0, *group);
                    }
                    if result == 0 {
                        result = libc::chmod(path.as_ptr(), *mode);
                    }
                    (result, libc::EEXIST)
                }
                Step::Bind { from, to } => {
                    (libc::mount(from.as_ptr(), to.as_ptr(), none, libc::MS_BIND, none.cast()), 0)
                }
                Step::Private(path) => (libc::mount(none, path.as_ptr(), none, libc::MS_PRIVATE, none.cast()), 0),
                Step::BindReadOnly { from, to } => {
                    let mut result = detached(from, to);
                    if result != 0 && Errno::last_raw() == libc::ENOSYS {
                        result = in_two(from, to);
                    }
                    (result, 0)
                }
                Step::Detach(path) => {
                    (libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW), libc::EINVAL)
                }
                Step::RemoveDirectory(path) => (libc::rmdir(path.as_ptr()), libc::ENOENT),
                Step::Probe(path) => {
                    let mut attributes: libc::statx = std::mem::zeroed();
                    let flags = libc::AT_STATX_FORCE_SYNC | libc::AT_SYMLINK_NOFOLLOW;
                    (libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, libc::STATX_BASIC_STATS, &raw mut attributes), 0)
                }
                Step::Figures(path) => {
                    let mut figures: libc::statfs64 = std::mem::zeroed();
                    let result = libc::statfs64(path.as_ptr(), &raw mut figures);
                    let block = figures.f_bsize as u64;
                    report[2] = figures.f_blocks.saturating_mul(block);
                    report[3] = figures.f_bavail.saturating_mul(block);
                    report[4] = figures.f_files;
                    report[5] = figures.f_ffree;
                    (result, 0)
                }
            }
        };
        if result == 0 {
            return 0;
        }
        let errno = Errno::last_raw();
        if errno == fine { 0 } else { errno }
    }
}

/// Clones a mount where nobody sees it, makes the clone read-only, and puts it at its place. A descriptor that is left
/// open takes a clone that has no place with it when this process ends.
fn detached(from: &CStr, to: &CStr) -> i32 {
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let clone = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    let empty = c"".as_ptr();
    // SAFETY: all paths are terminated strings and the structure has the size that is told; all live until after the
    // calls, which only read them.
    let result = unsafe {
        let fd = libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, from.as_ptr(), clone);
        if fd < 0 {
            return -1;
        }
        let (here, size) = (libc::AT_EMPTY_PATH, size_of::<libc::mount_attr>());
        if libc::syscall(libc::SYS_mount_setattr, fd, empty, here, &raw const attributes, size) != 0 {
            return -1;
        }
        libc::syscall(libc::SYS_move_mount, fd, empty, libc::AT_FDCWD, to.as_ptr(), libc::MOVE_MOUNT_F_EMPTY_PATH)
    };
    if result == 0 { 0 } else { -1 }
}

/// As [`detached`], before Linux 5.12: there is a moment at which the new mount can be written.
fn in_two(from: &CStr, to: &CStr) -> i32 {
    let none = std::ptr::null();
    // Flags that are not named are taken away, and the kernel refuses to take these from a FUSE mount.
    let flags = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV;
    // SAFETY: all paths are terminated strings and live until after the calls, which only read them.
    unsafe {
        if libc::mount(from.as_ptr(), to.as_ptr(), none, libc::MS_BIND, none.cast()) != 0 {
            return -1;
        }
        if libc::mount(none, to.as_ptr(), none, flags, none.cast()) == 0 {
            return 0;
        }
        let why = Errno::last();
        libc::umount2(to.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW);
        why.set();
    }
    -1
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn steps_are_done_until_one_fails() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| path(&folder.path().join(name)).unwrap();
        let make = |name: &str| Step::MakeDirectory { path: at(name), mode: 0o777, group: 0 };
        let steps =
            [make("a"), make("a"), Step::Probe(at("a")), Step::Figures(at("a")), Step::RemoveDirectory(at("none"))];
        let figures = run(&steps, soon()).unwrap().unwrap();
        assert!(figures.total_bytes >= figures.free_bytes && figures.total_bytes > 0);
        let trouble = run(&[make("a"), Step::Probe(at("b")), Step::RemoveDirectory(at("a"))], soon());
        assert_eq!(trouble.unwrap(), Err(Trouble::Failed { step: 1, errno: Errno::ENOENT }));
        assert!(folder.path().join("a").is_dir(), "steps after the one that failed are not done");
        assert!(path(Path::new("a\0b")).is_err());
    }

    #[test]
    fn a_read_only_mount_is_never_seen_writable() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().canonicalize().unwrap().join(name);
        for name in ["from", "to"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        std::fs::write(at("from/x"), "x").unwrap();
        let (from, to) = (path(&at("from")).unwrap(), path(&at("to")).unwrap());
        let shown = |name: &str| crate::fuse::mountinfo::at(&at(name)).unwrap().map(|mount| mount.read_only);
        type Way = fn(&CStr, &CStr) -> i32;
        for way in [detached as Way, in_two as Way] {
            // Where there is no place for it, nothing stays.
            assert_eq!((way(&from, &path(&at("none")).unwrap()), Errno::last()), (-1, Errno::ENOENT));
            assert_eq!((way(&path(&at("none")).unwrap(), &to), Errno::last()), (-1, Errno::ENOENT));
            assert_eq!(shown("to"), None);
            assert_eq!(way(&from, &to), 0);
            let error = std::fs::write(at("to/x"), "y").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EROFS));
            assert_eq!((std::fs::read_to_string(at("to/x")).unwrap(), shown("to")), ("x".to_owned(), Some(true)));
            run(&[Step::Detach(to.clone())], soon()).unwrap().unwrap();
        }
        run(&[Step::BindReadOnly { from, to: to.clone() }], soon()).unwrap().unwrap();
        assert_eq!(shown("to"), Some(true));
        std::fs::write(at("from/x"), "y").unwrap();
        run(&[Step::Detach(to)], soon()).unwrap().unwrap();
        assert_eq!(shown("to"), None);
    }

    #[test]
    fn a_child_that_hangs_is_left_behind() {
        // Opening a FIFO for reading would wait; none of the steps does, so a stopped deadline stands in for it.
        let folder = tempfile::tempdir().unwrap();
        let steps = vec![Step::Probe(path(folder.path()).unwrap()); 2_000_000];
        let start = Instant::now();
        assert_eq!(run(&steps, start + Duration::from_millis(20)).unwrap(), Err(Trouble::Hung));
        assert!(start.elapsed() < Duration::from_secs(30));
        let until = soon();
        while abandoned() > 0 {
            assert!(Instant::now() < until, "a killed child is reaped");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
