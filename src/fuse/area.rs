//! Where memory files come from: a private tmpfs with huge pages that has no path, or else memfds.
//!
//! Huge pages make assembled images several times faster to read and to map. An image's size is known beforehand, so
//! `huge=within_size` and `ftruncate` first give it huge pages without wasting 2 MiB on a small file. A file that is being
//! written grows: since Linux 6.14 `huge=within_size` gives it pages as large as each write (`shmem_huge_global_enabled` in
//! `mm/shmem.c`); before, only `huge=always` gives it more than the smallest ones, and 2 MiB to the first byte.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::fcntl::{OFlag, openat};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;

use crate::error::{Context, Error, Kind, Result};
use crate::fs::Area;

const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const MOUNT_ATTR_NOSUID_NODEV: libc::c_uint = 2 | 4;

/// A limit that nothing reaches.
const NO_LIMIT: u64 = 1 << 60;

/// Makes memory files of one kind.
#[derive(Debug)]
pub struct Maker {
    area: Area,
    limit: u64,
    /// The root folder of a tmpfs that is attached nowhere; it vanishes with its last file.
    tmpfs: Option<OwnedFd>,
}

impl Maker {
    /// A place for files of at most `limit` bytes together.
    pub fn new(area: Area, limit: u64) -> Self {
        let wanted = match area {
            Area::Image => "within_size",
            Area::Staging if pages_are_as_large_as_writes() => "within_size",
            Area::Staging => "always",
        };
        let tmpfs = private_tmpfs(wanted, limit)
            .or_else(|error| {
                tracing::info!("no huge pages for {area:?} files: {error}");
                private_tmpfs("never", limit)
            })
            .inspect_err(|error| tracing::info!("{area:?} files are memfds: {error}"))
            .ok();
        Maker { area, limit, tmpfs }
    }

    /// A place for data that came from elsewhere, whose owner keeps a limit itself.
    pub fn unlimited() -> Self {
        Self::new(Area::Image, NO_LIMIT)
    }

    /// Most bytes of all files together.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Makes an empty file, or one of `size` zeros.
    ///
    /// # Errors
    /// `Full` if the area has no room.
    pub fn create(&self, size: u64) -> Result<OwnedFd> {
        if size > self.limit {
            let message =
                format!("{size} bytes are more than the whole area for {:?} files ({})", self.area, self.limit);
            return Err(Error::new(Kind::Full, message));
        }
        let file = match &self.tmpfs {
            Some(tmpfs) => {
                let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
                openat(tmpfs, ".", flags, Mode::from_bits_truncate(0o600))
            }
            None => memfd_create("vineyard-fs", MFdFlags::MFD_CLOEXEC),
        }
        .map_err(no_room)?;
        if size > 0 {
            let size = i64::try_from(size).map_err(|_| Error::new(Kind::TooLarge, "file size"))?;
            nix::unistd::ftruncate(&file, size).map_err(no_room)?;
        }
        Ok(file)
    }
}

fn pages_are_as_large_as_writes() -> bool {
    let release = nix::sys::utsname::uname().ok();
    let release = release.and_then(|name| name.release().to_str().map(str::to_owned)).unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 14)
}

fn no_room(errno: nix::errno::Errno) -> Error {
    match errno {
        nix::errno::Errno::ENOSPC => Error::new(Kind::Full, "no room for a memory file"),
        errno => Error::from(errno),
    }
}

/// Makes a tmpfs that is mounted nowhere, by fsopen(2), fsconfig(2) and fsmount(2).
fn private_tmpfs(huge: &str, limit: u64) -> Result<OwnedFd> {
    let name = c"tmpfs";
    // SAFETY: `name` is a terminated string that outlives the call.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), FSOPEN_CLOEXEC) };
    let context = owned(context).context(|| "fsopen".into())?;
    let size = limit.to_string();
    for (key, value) in [("source", "vineyard-fs"), ("huge", huge), ("size", &size), ("mode", "0700")] {
        configure(&context, FSCONFIG_SET_STRING, Some((key, value)))
            .context(|| format!("tmpfs option {key}={value}"))?;
    }
    configure(&context, FSCONFIG_CMD_CREATE, None).context(|| "making a tmpfs".into())?;
    // SAFETY: takes numbers only.
    let root = unsafe {
        libc::syscall(libc::SYS_fsmount, context.as_fd().as_raw_fd(), FSMOUNT_CLOEXEC, MOUNT_ATTR_NOSUID_NODEV)
    };
    owned(root).context(|| "fsmount".into())
}

fn configure(context: &OwnedFd, command: libc::c_uint, option: Option<(&str, &str)>) -> Result<()> {
    let strings = match option {
        Some((key, value)) => Some((text(key)?, text(value)?)),
        None => None,
    };
    let (key, value) = match &strings {
        Some((key, value)) => (key.as_ptr(), value.as_ptr()),
        None => (std::ptr::null(), std::ptr::null()),
    };
    // SAFETY: both pointers are null or terminated strings that live until the end of this function.
    let done = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
    match done {
        -1 => Err(std::io::Error::last_os_error().into()),
        _ => Ok(()),
    }
}

fn text(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::new(Kind::Invalid, "NUL in an option"))
}

fn owned(result: libc::c_long) -> Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the kernel has just returned this new descriptor; nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(std::io::Error::last_os_error().into()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn files_hold_bytes_and_the_limit_holds() {
        let maker = Maker::new(Area::Image, 4 << 20);
        assert_eq!(maker.create(5 << 20).unwrap_err().kind(), Kind::Full);
        let file = std::fs::File::from(maker.create(1 << 20).unwrap());
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        file.write_all_at(b"bytes", (1 << 20) - 5).unwrap();
        let mut tail = [0; 5];
        file.read_exact_at(&mut tail, (1 << 20) - 5).unwrap();
        assert_eq!(&tail, b"bytes");
        let growing = std::fs::File::from(Maker::new(Area::Staging, 4 << 20).create(0).unwrap());
        growing.write_all_at(b"x", 9).unwrap();
        assert_eq!(growing.metadata().unwrap().len(), 10);
        if pages_are_as_large_as_writes() {
            use std::os::unix::fs::MetadataExt;
            assert!(growing.metadata().unwrap().blocks() * 512 <= 64 << 10, "a small file takes little");
        }
    }
}
