//! Mounting in the place of a dead mount, without a moment at which neither is there: what a program saves then would
//! lie in the bare directory, hidden for good by the mount that follows.
//!
//! The new mount goes beneath the dead one (`MOVE_MOUNT_BENEATH` of move_mount(2), Linux 6.5), which is then taken away.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::mount::MsFlags;

use super::mount::{MountOptions, wanted};
use super::mountinfo::FS_TYPE;
use crate::error::{Context, Error, Kind, Result};

// include/uapi/linux/mount.h
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
/// Flags of mount(2), and what they are as attributes of fsmount(2). `relatime` is what is there without any.
const ATTRIBUTES: [(MsFlags, u64); 4] = [
    (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
    (MsFlags::MS_NOATIME, libc::MOUNT_ATTR_NOATIME),
    (MsFlags::MS_STRICTATIME, libc::MOUNT_ATTR_STRICTATIME),
    (MsFlags::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
];

/// Mounts beneath what is mounted there, which goes on covering it. `fuse` is a new descriptor of `/dev/fuse`.
///
/// # Errors
/// If this kernel, or this process, cannot: nothing is mounted then.
pub(super) fn mount(options: &MountOptions<'_>, fuse: BorrowedFd<'_>) -> Result<()> {
    let context = FileSystem::open()?;
    // "fuse.vineyard-fs" is the type and its subtype.
    let subtype = FS_TYPE.split_once('.').map_or("", |(_, subtype)| subtype);
    let (fd, user, group) = (fuse.as_raw_fd(), nix::unistd::geteuid(), nix::unistd::getegid());
    context.set("source", options.source)?;
    context.set("subtype", subtype)?;
    context.set("fd", &fd.to_string())?;
    context.set("rootmode", "40000")?;
    context.set("user_id", &user.to_string())?;
    context.set("group_id", &group.to_string())?;
    context.flag("default_permissions")?;
    let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    if options.allow_other {
        context.flag("allow_other")?;
    }
    if options.read_only {
        context.flag("ro")?;
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    for (_, flag, _) in wanted(options.flags) {
        attributes |= ATTRIBUTES.iter().filter(|(known, _)| known == flag).fold(0, |all, (_, bit)| all | bit);
    }
    let mount = context.mount(attributes)?;
    let to = CString::new(options.mountpoint.as_os_str().as_bytes())
        .map_err(|_| Error::new(Kind::Invalid, "a mount point with a NUL in its path"))?;
    // SAFETY: both paths end in a NUL and live as long as the call, which only reads them.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_BENEATH,
        )
    };
    Errno::result(moved).context(|| format!("cannot mount beneath {:?}", options.mountpoint))?;
    Ok(())
}

/// A file system that is being configured.
struct FileSystem(OwnedFd);

impl FileSystem {
    fn open() -> Result<Self> {
        // SAFETY: the name ends in a NUL, and the call only reads it.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), libc::FSOPEN_CLOEXEC) };
        Ok(FileSystem(owned(fd).context(|| "cannot open a file system of FUSE".into())?))
    }

    fn set(&self, key: &str, value: &str) -> Result<()> {
        let text = |text: &str| CString::new(text).map_err(|_| Error::new(Kind::Invalid, "a mount option with a NUL"));
        self.configure(FSCONFIG_SET_STRING, Some(&text(key)?), Some(&text(value)?), key)
    }

    fn flag(&self, key: &str) -> Result<()> {
        let text = CString::new(key).map_err(|_| Error::new(Kind::Invalid, "a mount option with a NUL"))?;
        self.configure(FSCONFIG_SET_FLAG, Some(&text), None, key)
    }

    fn mount(self, attributes: u64) -> Result<OwnedFd> {
        self.configure(FSCONFIG_CMD_CREATE, None, None, "the whole")?;
        // SAFETY: the call touches no memory of this process.
        let fd = unsafe { libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), libc::FSMOUNT_CLOEXEC, attributes) };
        owned(fd).context(|| "cannot make a mount of the file system".into())
    }

    fn configure(&self, command: u32, key: Option<&CStr>, value: Option<&CStr>, what: &str) -> Result<()> {
        let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: the pointers are null, or lead to texts that end in a NUL and outlive the call, which only reads them.
        let done =
            unsafe { libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), command, pointer(key), pointer(value), 0) };
        match Errno::result(done) {
            Ok(_) => Ok(()),
            Err(errno) => Err(errno).context(|| format!("cannot set {what} for a mount{}", self.reason())),
        }
    }

    /// What the kernel says about the last failure, if it says anything.
    fn reason(&self) -> String {
        let Ok(copy) = self.0.try_clone() else { return String::new() };
        let mut text = [0; 256];
        match File::from(copy).read(&mut text) {
            Ok(length) if length > 0 => format!(": {}", String::from_utf8_lossy(&text[..length]).trim_end()),
            _ => String::new(),
        }
    }
}

/// The descriptor that a system call has returned.
fn owned(fd: libc::c_long) -> nix::Result<OwnedFd> {
    let fd = Errno::result(fd)?;
    let fd = libc::c_int::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just opened it for this process, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
