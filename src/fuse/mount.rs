//! Mounting and unmounting by hand: `mount(2)` where that is allowed, `fusermount3` where it is not.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair};

use super::handshake::{self, Agreed};
use super::{beneath, mountinfo};
use crate::error::{Context, Error, Kind, Result};

/// Readahead of the mount in KiB. More gains sequential readers nothing and makes random readers of a mapping slower,
/// because a fault in a mapping reads a whole window around it.
const READ_AHEAD_KIB: u32 = 1024;
/// Where the control file system of FUSE usually is.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// Options of mount(8) that the kernel applies by itself, what they turn on, and whether every `fusermount3` knows them.
/// Those of access times only show in the list of mounts: the kernel changes none on FUSE.
pub const FLAGS: &[(&str, MsFlags, bool)] = &[
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("nodiratime", MsFlags::MS_NODIRATIME, false),
    ("relatime", MsFlags::MS_RELATIME, false),
    ("strictatime", MsFlags::MS_STRICTATIME, false),
];

/// What to mount.
#[derive(Clone, Debug)]
pub struct MountOptions<'a> {
    /// Where.
    pub mountpoint: &'a Path,
    /// What the list of mounts shows as the source.
    pub source: &'a str,
    /// Refuse writing in the kernel already.
    pub read_only: bool,
    /// Of [`FLAGS`].
    pub flags: &'a [String],
    /// Let other users in.
    pub allow_other: bool,
    /// Device numbers of dead mounts of this program that may be there: it takes their place.
    pub replaces: &'a [(u32, u32)],
}

/// A mounted connection.
#[derive(Debug)]
pub struct Mounted {
    /// The descriptor of `/dev/fuse`: requests are read from it, replies written to it.
    pub fuse: OwnedFd,
    /// Device number of the mount; the minor is the number of the connection.
    pub device: (u32, u32),
    /// Whether other users may enter.
    pub allow_other: bool,
}

/// Mounts, through `fusermount3` if this process may not do it itself.
///
/// # Errors
/// With a message that says what is missing.
pub fn mount(options: &MountOptions<'_>) -> Result<Mounted> {
    let mounted = match replace(options)? {
        Some(fuse) => Ok(fuse),
        None => mount_directly(options),
    };
    let (fuse, allow_other) = match mounted {
        Ok(fuse) => (fuse, options.allow_other),
        Err(error) if !nix::unistd::geteuid().is_root() => {
            tracing::debug!("mounting without fusermount3: {error}");
            mount_by_helper(options)?
        }
        Err(error) => return Err(error),
    };
    let device = match mountinfo::at(options.mountpoint)? {
        Some(mount) if mount.fs_type == mountinfo::FS_TYPE => mount.device,
        _ => {
            let message = format!("{:?} was mounted but is not in the list of mounts", options.mountpoint);
            return Err(Error::new(Kind::Internal, message));
        }
    };
    Ok(Mounted { fuse, device, allow_other })
}

/// Takes the dead mounts away that are to be replaced. The new mount is there before the last of them goes, where the
/// kernel can mount beneath it: its descriptor.
fn replace(options: &MountOptions<'_>) -> Result<Option<OwnedFd>> {
    let is_dead =
        |mount: &mountinfo::Mount| mount.fs_type == mountinfo::FS_TYPE && options.replaces.contains(&mount.device);
    let mut placed = None;
    while mountinfo::at(options.mountpoint)?.is_some_and(|top| is_dead(&top)) {
        let here = mountinfo::all()?.into_iter().filter(|mount| mount.mountpoint == options.mountpoint);
        if here.filter(is_dead).count() == 1 {
            let beneath = open_device().and_then(|fuse| beneath::mount(options, fuse.as_fd()).map(|()| fuse));
            match beneath {
                Ok(fuse) => placed = Some(fuse),
                Err(error) => tracing::info!("the dead mount goes before the new one comes: {error}"),
            }
        }
        detach(options.mountpoint)?;
    }
    Ok(placed)
}

/// Those of [`FLAGS`] that are named.
pub(super) fn wanted(names: &[String]) -> impl Iterator<Item = &'static (&'static str, MsFlags, bool)> {
    FLAGS.iter().filter(|(name, ..)| names.iter().any(|wanted| wanted == name))
}

fn mount_directly(options: &MountOptions<'_>) -> Result<OwnedFd> {
    let fuse = open_device()?;
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        fuse.as_raw_fd(),
        nix::unistd::geteuid(),
        nix::unistd::getegid(),
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    flags.set(MsFlags::MS_RDONLY, options.read_only);
    for (_, flag, _) in wanted(options.flags) {
        flags.insert(*flag);
    }
    nix::mount::mount(Some(options.source), options.mountpoint, Some(mountinfo::FS_TYPE), flags, Some(data.as_str()))
        .map_err(|errno| match errno {
        Errno::EPERM => Error::new(
            Kind::NotPermitted,
            "mounting needs CAP_SYS_ADMIN: run as root, or install fuse3 and run as an ordinary user",
        ),
        Errno::ENODEV => Error::new(Kind::Os(errno as i32), "this kernel has no FUSE: run `modprobe fuse`"),
        errno => {
            Error::new(Kind::Os(errno as i32), format!("cannot mount on {:?}: {}", options.mountpoint, errno.desc()))
        }
    })?;
    Ok(fuse)
}

fn open_device() -> Result<OwnedFd> {
    let fuse = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/fuse");
    Ok(fuse.map_err(open_error)?.into())
}

fn open_error(error: std::io::Error) -> Error {
    let hint = match error.kind() {
        std::io::ErrorKind::NotFound => {
            "there is no /dev/fuse: run `modprobe fuse`, or give the container `--device /dev/fuse --cap-add SYS_ADMIN`"
        }
        std::io::ErrorKind::PermissionDenied => "no permission to open /dev/fuse: run as root, or make it accessible",
        _ => "cannot open /dev/fuse",
    };
    Error::new(Kind::Os(error.raw_os_error().unwrap_or(libc::EIO)), hint).with_source(error)
}

/// Asks the set-user-id helper of libfuse, which sends the descriptor over the socket named in `_FUSE_COMMFD`.
fn mount_by_helper(options: &MountOptions<'_>) -> Result<(OwnedFd, bool)> {
    if !Path::new("/dev/fuse").exists() {
        return Err(open_error(std::io::ErrorKind::NotFound.into()));
    }
    let allow_other = options.allow_other && others_are_allowed();
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
    let mut list = OsString::from("nosuid,nodev,default_permissions,subtype=vineyard-fs,fsname=");
    list.push(options.source.replace(['\\', ','], "_"));
    if options.read_only {
        list.push(",ro");
    }
    for (name, ..) in wanted(options.flags).filter(|(_, _, known)| *known) {
        list.push(",");
        list.push(name);
    }
    if allow_other {
        list.push(",allow_other");
    }
    let inherited = theirs.as_raw_fd();
    let mut command = Command::new("fusermount3");
    command.arg("-o").arg(list).arg("--").arg(options.mountpoint);
    command
        .env("_FUSE_COMMFD", inherited.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // SAFETY: only an fcntl happens between fork and exec; it is async-signal-safe and takes no lock.
    unsafe { command.pre_exec(move || keep_open(inherited)) };
    let child = command.spawn().map_err(|error| {
        let message = "not root, and fusermount3 is not installed: run as root, or `apt install fuse3`";
        Error::new(Kind::NotPermitted, message).with_source(error)
    })?;
    drop(theirs);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr);
        return Err(Error::new(Kind::NotPermitted, format!("fusermount3 refused: {:.300}", reason.trim())));
    }
    let mut byte = [0; 1];
    let mut control = nix::cmsg_space!([RawFd; 1]);
    let mut parts = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(ours.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part
            && let Some(&fd) = fds.first()
        {
            // SAFETY: the kernel has just opened this descriptor for this process; nobody else owns it.
            return Ok((unsafe { OwnedFd::from_raw_fd(fd) }, allow_other));
        }
    }
    Err(Error::new(Kind::Internal, "fusermount3 sent no descriptor"))
}

fn others_are_allowed() -> bool {
    let text = std::fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    text.lines().any(|line| line.trim() == "user_allow_other")
}

/// Lets a descriptor pass through `exec`. For use between fork and exec.
///
/// # Errors
/// Those of `fcntl`.
pub fn keep_open(fd: RawFd) -> std::io::Result<()> {
    // SAFETY: F_SETFD changes a flag of a descriptor of this process and touches no memory.
    match unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } {
        -1 => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Answers the kernel's INIT.
///
/// # Errors
/// `Timeout` if the kernel sends none, `Unsupported` for a kernel that is too old.
pub fn initialise(fuse: &OwnedFd) -> Result<Agreed> {
    let mut wait = [PollFd::new(fuse.as_fd(), PollFlags::POLLIN)];
    if poll(&mut wait, PollTimeout::from(5000u16))? == 0 {
        return Err(Error::new(Kind::Timeout, "the kernel sent no INIT"));
    }
    // The kernel refuses buffers that could not take a write request of the default size.
    let mut request = vec![0; 256 << 10];
    let length = nix::unistd::read(fuse, &mut request).context(|| "cannot read from /dev/fuse".into())?;
    let init = handshake::parse(request.get(..length).unwrap_or_default())?;
    let (reply, agreed) = handshake::answer(&init);
    nix::unistd::write(fuse, &reply).context(|| "the kernel refused the answer to INIT".into())?;
    Ok(agreed)
}

/// Raises the mount's readahead, which INIT cannot do. Without a writable sysfs the default of 128 KiB stays.
pub fn raise_readahead(device: (u32, u32)) {
    let path = format!("/sys/class/bdi/{}:{}/read_ahead_kb", device.0, device.1);
    if let Err(error) = std::fs::write(&path, READ_AHEAD_KIB.to_string()) {
        tracing::info!("readahead stays as it is: {path}: {error}");
    }
}

/// Takes a mount out of the tree, even if files of it are open.
///
/// # Errors
/// Those of `umount2`, or what `fusermount3` says.
pub fn detach(mountpoint: &Path) -> Result<()> {
    unmount_with(mountpoint, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW, &["-u", "-z"])
}

/// Unmounts if nobody uses the mount.
///
/// # Errors
/// `Busy` if somebody does; else those of `umount2`, or what `fusermount3` says.
pub fn unmount(mountpoint: &Path) -> Result<()> {
    unmount_with(mountpoint, MntFlags::UMOUNT_NOFOLLOW, &["-u"])
}

fn unmount_with(mountpoint: &Path, flags: MntFlags, helper: &[&str]) -> Result<()> {
    let refused = match umount2(mountpoint, flags) {
        Ok(()) => return Ok(()),
        Err(Errno::EBUSY) => return Err(Error::new(Kind::Busy, format!("{mountpoint:?} is in use"))),
        Err(Errno::EPERM) if !nix::unistd::geteuid().is_root() => Errno::EPERM,
        Err(errno) => return Err(errno).context(|| format!("cannot unmount {mountpoint:?}")),
    };
    let output = Command::new("fusermount3").args(helper).arg("--").arg(mountpoint).stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let reason = String::from_utf8_lossy(&output.stderr);
            let kind = if reason.contains("busy") { Kind::Busy } else { Kind::NotPermitted };
            Err(Error::new(kind, format!("fusermount3 refused: {:.300}", reason.trim())))
        }
        Err(_) => Err(refused).context(|| format!("cannot unmount {mountpoint:?}: run as root, or install fuse3")),
    }
}

/// Ends a connection: whoever waits for an answer gets an error at once. The mount stays in the tree.
///
/// # Errors
/// If the control file system of FUSE cannot be reached.
pub fn abort(device: (u32, u32)) -> Result<()> {
    with_connection(device, |folder| {
        OpenOptions::new().write(true).open(folder.join("abort"))?.write_all(b"1")?;
        Ok(())
    })
}

/// Requests that wait for an answer, queued or in work, where the control file system of FUSE is mounted. Reading this
/// sends no request.
pub fn waiting_if_visible(device: (u32, u32)) -> Option<u64> {
    let text = std::fs::read_to_string(format!("{CONNECTIONS}/{}/waiting", device.1)).ok()?;
    text.trim().parse().ok()
}

fn with_connection<T>(device: (u32, u32), work: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let usual = Path::new(CONNECTIONS);
    let number = device.1.to_string();
    if usual.join(&number).is_dir() {
        return work(&usual.join(number));
    }
    let folder = std::env::temp_dir().join(format!("vineyard-fs-fusectl-{}", std::process::id()));
    std::fs::create_dir(&folder).context(|| format!("cannot make {folder:?}"))?;
    let none: Option<&str> = None;
    let mounted = nix::mount::mount(none, &folder, Some("fusectl"), MsFlags::empty(), none);
    let result = match mounted {
        Ok(()) => {
            let result = work(&folder.join(number));
            // Nobody else knows this folder; if it stays mounted, removing it fails and nothing is lost.
            umount2(&folder, MntFlags::MNT_DETACH).ok();
            result
        }
        Err(errno) => Err(errno).context(|| "cannot mount the control file system of FUSE".into()),
    };
    std::fs::remove_dir(&folder).ok();
    result
}

/// Waits until no mount of this program is at `mountpoint` any more.
pub fn wait_gone(mountpoint: &Path, device: (u32, u32), longest: Duration) -> Result<bool> {
    let until = std::time::Instant::now() + longest;
    loop {
        let there = mountinfo::all()?.iter().any(|m| m.device == device && m.mountpoint == mountpoint);
        if !there || std::time::Instant::now() > until {
            return Ok(!there);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a name can stand in the list of mounts as it is.
pub fn printable(source: &Path) -> String {
    String::from_utf8_lossy(source.as_os_str().as_bytes()).into_owned()
}
