//! The kernel's list of mounts, `/proc/self/mountinfo`: the way to know about a mount without touching it.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};

/// Type under which the kernel lists mounts of this program.
pub const FS_TYPE: &str = "fuse.vineyard-fs";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Number of the mount, unique while it exists.
    pub id: u64,
    /// Number of the mount on which it lies.
    pub parent: u64,
    /// Device `major:minor`; for FUSE the minor is the number of the connection.
    pub device: (u32, u32),
    /// The directory of the file system that is shown: `/`, or a deeper one for a bind mount of it. A removed one ends
    /// in `//deleted`.
    pub root: PathBuf,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// File system type with its subtype, such as `fuse.sshfs`.
    pub fs_type: String,
    /// What was mounted.
    pub source: OsString,
    /// Whether nothing can be written.
    pub read_only: bool,
    /// The user who mounted it, which the kernel says of FUSE.
    pub user: Option<u32>,
}

/// All mounts that this process sees, in the order in which they were made.
///
/// # Errors
/// If `/proc` cannot be read.
pub fn all() -> Result<Vec<Mount>> {
    let text = std::fs::read("/proc/self/mountinfo").context(|| "cannot read /proc/self/mountinfo".into())?;
    Ok(text.split(|&b| b == b'\n').filter_map(parse).collect())
}

/// The mount that a path leads to, if the path is a mount point: that which covers the others.
///
/// # Errors
/// As [`all`].
pub fn at(mountpoint: &Path) -> Result<Option<Mount>> {
    Ok(topmost(all()?.into_iter().filter(|mount| mount.mountpoint == mountpoint).collect()))
}

/// Of several mounts at one place, that on which none of the others lies. It need not be the youngest: a mount can be
/// put beneath another.
fn topmost(mounts: Vec<Mount>) -> Option<Mount> {
    let parents: Vec<u64> = mounts.iter().map(|mount| mount.parent).collect();
    mounts.into_iter().rev().find(|mount| !parents.contains(&mount.id))
}

/// The devices of this program's mounts at a place, dead or alive.
///
/// # Errors
/// As [`all`].
pub fn ours_at(mountpoint: &Path) -> Result<Vec<(u32, u32)>> {
    let ours = all()?.into_iter().filter(|mount| mount.mountpoint == mountpoint && mount.fs_type == FS_TYPE);
    Ok(ours.map(|mount| mount.device).collect())
}

/// Whether another mount of this kind is where the mount with this device number was made.
pub fn is_replaced(mountpoint: &Path, device: (u32, u32)) -> bool {
    let there = at(mountpoint).ok().flatten();
    there.is_some_and(|mount| mount.fs_type == FS_TYPE && mount.device != device)
}

/// Reads a line: `36 35 98:0 /root /mount options [tags]… - type source super-options` (proc(5)).
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&b| b == b' ');
    let id = text(fields.next()?)?.parse().ok()?;
    let parent = text(fields.next()?)?.parse().ok()?;
    let device = text(fields.next()?)?;
    let (major, minor) = device.split_once(':')?;
    let root = unescape(fields.next()?);
    let mountpoint = unescape(fields.next()?);
    let options = text(fields.next()?)?;
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = text(fields.next()?)?.to_owned();
    let source = unescape(fields.next()?);
    let user = fields.next().and_then(text).unwrap_or_default();
    let user = user.split(',').find_map(|option| option.strip_prefix("user_id="));
    Some(Mount {
        id,
        parent,
        device: (major.parse().ok()?, minor.parse().ok()?),
        root: PathBuf::from(root),
        mountpoint: PathBuf::from(mountpoint),
        fs_type,
        source,
        read_only: options.split(',').any(|option| option == "ro"),
        user: user.and_then(|user| user.parse().ok()),
    })
}

fn text(field: &[u8]) -> Option<&str> {
    std::str::from_utf8(field).ok()
}

/// Undoes the octal escapes of blanks, tabs, newlines and backslashes.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if first == b'\\' => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        out.push(octal.unwrap_or(first));
        rest = if octal.is_some() { tail.get(3..).unwrap_or_default() } else { tail };
    }
    OsString::from_vec(out)
}

/// An absolute path to the same place, found without touching the last component: a stat of a hung mount hangs.
///
/// # Errors
/// If the folder above does not exist.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).context(|| format!("{path:?} is not a path"))?;
    // `a/..` and such leave no last component to spare.
    let Some((parent, name)) = absolute.parent().zip(absolute.file_name()) else {
        return absolute.canonicalize().context(|| format!("{path:?} cannot be resolved"));
    };
    let parent = parent.canonicalize().context(|| format!("the folder {parent:?} cannot be opened"))?;
    let whole = parent.join(name);
    // A symbolic link lies in the folder above, not in the mount; `readlink` looks at that only. A mount point
    // itself is never a link, so it is not looked at at all.
    if at(&whole)?.is_some() {
        return Ok(whole);
    }
    match whole.read_link() {
        Ok(_) => whole.canonicalize().context(|| format!("{path:?} cannot be resolved")),
        Err(_) => Ok(whole),
    }
}

/// A name for a mount point that can be part of a file name.
pub fn digest(mountpoint: &Path) -> String {
    // FNV-1a, 64 bits: short, and the same in every version of this program.
    let hash = mountpoint
        .as_os_str()
        .as_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lines_are_read_with_escapes_and_optional_tags() {
        let line = br"36 35 0:53 /run\0407 /mnt/my\040data\134x rw,nosuid shared:1 master:2 - fuse.vineyard-fs /run/v\011y rw,user_id=7,group_id=8";
        let mount = parse(line).unwrap();
        assert_eq!((mount.id, mount.parent), (36, 35));
        assert_eq!(mount.device, (0, 53));
        assert_eq!(mount.root, Path::new("/run 7"));
        assert_eq!(mount.mountpoint, Path::new("/mnt/my data\\x"));
        assert_eq!(mount.fs_type, FS_TYPE);
        assert_eq!(mount.source, OsString::from("/run/v\ty"));
        assert!(!mount.read_only);
        assert_eq!(mount.user, Some(7));
        let plain = parse(b"1 0 8:1 / / ro,relatime - ext4 /dev/sda1 rw").unwrap();
        assert!(plain.read_only && plain.user.is_none());
        assert_eq!(plain.source, OsString::from("/dev/sda1"));
    }

    #[test]
    fn broken_lines_are_skipped() {
        for line in
            ["", "1 2 3", "1 0 8-1 / / ro - ext4 a rw", "x 0 8:1 / / ro - ext4 a rw", "1 0 8:1 / / ro ext4 a rw"]
        {
            assert_eq!(parse(line.as_bytes()), None, "{line}");
        }
        assert_eq!(unescape(br"a\04"), OsString::from(r"a\04"));
    }

    #[test]
    fn the_topmost_covers_even_if_another_was_put_beneath_it_later() {
        let mount = |id, parent| {
            let line = format!("{id} {parent} 0:{id} / /mnt rw - fuse.vineyard-fs v rw");
            parse(line.as_bytes()).unwrap()
        };
        let top = |mounts: &[Mount]| topmost(mounts.to_vec()).map(|mount| mount.id);
        assert_eq!(top(&[mount(7, 1), mount(8, 7), mount(9, 8)]), Some(9), "stacked");
        assert_eq!(top(&[mount(7, 9), mount(9, 1)]), Some(7), "beneath");
        assert_eq!(top(&[mount(7, 1)]), Some(7));
        assert_eq!(top(&[]), None);
    }

    #[test]
    fn this_system_has_a_root() {
        assert_eq!(at(Path::new("/")).unwrap().unwrap().mountpoint, Path::new("/"));
    }

    #[test]
    fn paths_become_absolute_through_links_above() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(&real, real.join("link")).unwrap();
        assert_eq!(absolute(&real.join("link/missing")).unwrap(), real.join("missing"));
        assert_eq!(absolute(&real.join("link")).unwrap(), real);
        assert!(absolute(&real.join("none/missing")).is_err());
        assert_eq!(digest(Path::new("")), "cbf29ce484222325");
    }
}
