//! How much memory there is: the machine's, and what the control groups of this process leave of it (cgroups(7), and the
//! kernel's `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst`).
//!
//! Where a group is full the kernel does not refuse memory: it kills one of the group's processes. A server asks
//! [`room_for`] first, and answers an error.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::error::{Context, Error, Kind, Result};

/// Bytes of a group that [`room_for`] leaves alone: what two processes of this program need to start and to work, most of
/// it pages of the program.
const RESERVE: u64 = 32 << 20;
/// At most this part of a group's limit is left alone.
const SHARE: u64 = 4;

/// The groups of this process, opened by [`watch`].
static WATCHED: OnceLock<Vec<Group>> = OnceLock::new();

/// The files of a group that tell of its memory.
struct Group {
    limit: File,
    usage: File,
    stat: Option<File>,
}

impl Group {
    fn open(files: &Files) -> Option<Group> {
        let limit = File::open(&files.limit).ok()?;
        let usage = File::open(&files.usage).ok()?;
        Some(Group { limit, usage, stat: File::open(&files.stat).ok() })
    }

    /// The limit, if there is one and `bytes` more do not fit beside what stays free.
    fn exceeded(&self, bytes: u64) -> Option<u64> {
        let limit = number(&text_of(&self.limit)?)?;
        let usage = number(&text_of(&self.usage)?)?;
        let wanted = bytes.saturating_add(RESERVE.min(limit / SHARE));
        if limit.saturating_sub(usage) >= wanted {
            return None;
        }
        // Pages of files on disk go by themselves.
        let cached = self.stat.as_ref().and_then(text_of).map_or(0, |stat| cached(&stat));
        (limit.saturating_sub(usage).saturating_add(cached) < wanted).then_some(limit)
    }
}

/// Where a group's files are.
struct Files {
    limit: PathBuf,
    usage: PathBuf,
    stat: PathBuf,
}

/// Keeps the groups of this process in sight, for [`room_for`]. To be called while their files can still be opened.
pub fn watch() {
    WATCHED.get_or_init(|| {
        files(Path::new("/proc"), Path::new("/sys/fs/cgroup")).iter().filter_map(Group::open).collect()
    });
}

/// Whether this process may use so many more bytes of memory without its control group running out of it. Always, if
/// [`watch`] was not called or there is no limit.
///
/// # Errors
/// `ENOMEM`: unlike a full store, giving up what lies in the store would not help.
pub fn room_for(bytes: u64) -> Result<()> {
    refuse(WATCHED.get().map(Vec::as_slice).unwrap_or_default(), bytes)
}

fn refuse(groups: &[Group], bytes: u64) -> Result<()> {
    match groups.iter().find_map(|group| group.exceeded(bytes)) {
        Some(limit) => Err(Error::new(
            Kind::Os(libc::ENOMEM),
            format!(
                "the control group's memory of {limit} bytes has no room for {bytes} more: raise its limit, or remove files"
            ),
        )),
        None => Ok(()),
    }
}

/// Bytes of memory of this machine, or the limit of the control groups that this process is in, if that is less.
///
/// # Errors
/// If the kernel does not tell.
pub fn whole_memory() -> Result<u64> {
    whole_memory_of(Path::new("/proc"), Path::new("/sys/fs/cgroup"))
}

fn whole_memory_of(proc: &Path, cgroups: &Path) -> Result<u64> {
    let total = meminfo(proc, "MemTotal:")?;
    Ok(limits(proc, cgroups).into_iter().map(|(most, _)| most).fold(total, u64::min))
}

/// Bytes of swap space that this machine has.
///
/// # Errors
/// If the kernel does not tell.
pub fn swap() -> Result<u64> {
    meminfo(Path::new("/proc"), "SwapTotal:")
}

/// Bytes that are available: to the machine, and to each control group that this process is in.
///
/// # Errors
/// If the kernel does not tell.
pub fn available_memory() -> Result<u64> {
    available_memory_of(Path::new("/proc"), Path::new("/sys/fs/cgroup"))
}

fn available_memory_of(proc: &Path, cgroups: &Path) -> Result<u64> {
    let available = meminfo(proc, "MemAvailable:")?;
    Ok(limits(proc, cgroups).into_iter().map(|(most, now)| most.saturating_sub(now)).fold(available, u64::min))
}

fn meminfo(proc: &Path, field: &str) -> Result<u64> {
    let text = std::fs::read_to_string(proc.join("meminfo")).context(|| "reading the machine's memory".into())?;
    let kib = text.lines().find_map(|line| line.strip_prefix(field)).and_then(|rest| rest.trim().strip_suffix("kB"));
    let kib = kib.and_then(number);
    Ok(kib.ok_or_else(|| Error::malformed(format!("the kernel tells no {field}")))?.saturating_mul(1024))
}

/// Most bytes and bytes in use of each control group that this process is in and that has a limit.
fn limits(proc: &Path, cgroups: &Path) -> Vec<(u64, u64)> {
    let read = |path: &Path| std::fs::read_to_string(path).ok().as_deref().and_then(number);
    let limit = |files: &Files| Some((read(&files.limit)?, read(&files.usage).unwrap_or(0)));
    files(proc, cgroups).iter().filter_map(limit).collect()
}

/// The files of each control group that this process is in, as far as they may exist.
fn files(proc: &Path, cgroups: &Path) -> Vec<Files> {
    let mut found = Vec::new();
    for line in std::fs::read_to_string(proc.join("self/cgroup")).unwrap_or_default().lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, limit, usage) = match controllers {
            "" => (cgroups.to_path_buf(), "memory.max", "memory.current"),
            list if list.split(',').any(|c| c == "memory") => {
                (cgroups.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
            }
            _ => continue,
        };
        // In a container the path may be the host's while only the root is visible; then the root's limit holds.
        let group = root.join(path.trim_start_matches('/'));
        for folder in group.ancestors().take_while(|folder| folder.starts_with(&root)) {
            let [limit, usage, stat] = [limit, usage, "memory.stat"].map(|name| folder.join(name));
            found.push(Files { limit, usage, stat });
        }
    }
    found
}

/// What the kernel writes where there is a number; `None` for "max".
fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// All of a file of the kernel's, as it is now.
fn text_of(file: &File) -> Option<String> {
    let mut text = vec![0; 8192];
    let len = file.read_at(&mut text, 0).ok()?;
    text.truncate(len);
    String::from_utf8(text).ok()
}

/// Bytes that the kernel takes back by itself: of files on disk, and (version 2 tells) of what it knows of them. From
/// `memory.stat`; in version 1 the lines that begin with `total_` count the groups below, too, those of version 2 always do.
fn cached(stat: &str) -> u64 {
    let field = |name: &str| {
        let line =
            |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').and_then(number));
        line(&format!("total_{name}")).or_else(|| line(name)).unwrap_or(0)
    };
    ["active_file", "inactive_file", "slab_reclaimable"].into_iter().map(field).fold(0, u64::saturating_add)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Where a test writes what the kernel does, and the folders there that are `/proc` and `/sys/fs/cgroup`.
    fn kernel(group: &str) -> (tempfile::TempDir, PathBuf, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let (proc, cgroups) = (root.path().join("proc"), root.path().join("cgroup"));
        std::fs::create_dir_all(proc.join("self")).unwrap();
        std::fs::create_dir_all(cgroups.join(group)).unwrap();
        (root, proc, cgroups)
    }

    #[test]
    fn memory_honours_every_control_group() {
        let (_root, proc, cgroups) = kernel("a/b");
        assert!(available_memory_of(&proc, &cgroups).is_err());
        std::fs::write(proc.join("meminfo"), "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n").unwrap();
        assert_eq!(available_memory_of(&proc, &cgroups).unwrap(), 8000 << 10);
        std::fs::write(proc.join("self/cgroup"), "0::/a/b\n").unwrap();
        std::fs::write(cgroups.join("a/b/memory.max"), "max\n").unwrap();
        assert_eq!(available_memory_of(&proc, &cgroups).unwrap(), 8000 << 10);
        std::fs::write(cgroups.join("a/memory.max"), "1000000\n").unwrap();
        std::fs::write(cgroups.join("a/memory.current"), "400000\n").unwrap();
        assert_eq!(available_memory_of(&proc, &cgroups).unwrap(), 600_000);
        assert_eq!(whole_memory_of(&proc, &cgroups).unwrap(), 1_000_000);
        std::fs::write(cgroups.join("a/memory.max"), "90000000\n").unwrap();
        assert_eq!(whole_memory_of(&proc, &cgroups).unwrap(), 9000 << 10);
    }

    #[test]
    fn room_is_what_limit_and_reserve_leave_and_follows_them() {
        let (_root, proc, cgroups) = kernel("memory/a");
        std::fs::write(proc.join("self/cgroup"), "7:cpu:/x\n5:memory:/a\n").unwrap();
        let write = |name: &str, text: &str| std::fs::write(cgroups.join("memory/a").join(name), text).unwrap();
        write("memory.limit_in_bytes", "9223372036854771712\n");
        write("memory.usage_in_bytes", "40000000\n");
        let groups: Vec<Group> = files(&proc, &cgroups).iter().filter_map(Group::open).collect();
        assert_eq!(groups.len(), 1, "the root has no such files here");
        refuse(&groups, 1 << 40).unwrap();
        write("memory.limit_in_bytes", "100000000\n");
        // A quarter of it stays free.
        refuse(&groups, 35_000_000).unwrap();
        let error = refuse(&groups, 35_000_001).unwrap_err();
        assert!(error.kind() == Kind::Os(libc::ENOMEM) && error.to_string().contains("100000000"), "{error}");
        write("memory.stat", "active_file 5\ninactive_file 5\ntotal_inactive_file 1000\ntotal_active_file 2000\n");
        let groups: Vec<Group> = files(&proc, &cgroups).iter().filter_map(Group::open).collect();
        refuse(&groups, 35_003_000).unwrap();
        assert!(refuse(&groups, 35_003_001).is_err());
        write("memory.usage_in_bytes", "200000000\n");
        assert!(refuse(&groups, 0).is_err());
        assert_eq!(cached("active_file 7\ninactive_file_x 9\ninactive_file 1\nslab_reclaimable 30\n"), 38);
    }
}
