//! The reply to READDIRPLUS, by hand: `fuser` cannot say that an entry comes without attributes, and gives name and
//! attributes one common time to live.
//!
//! Layout: `struct fuse_direntplus` in `include/uapi/linux/fuse.h`. An entry whose node id is 0 carries no attributes
//! and takes no lookup count; its inode number must be there all the same, because readers skip names without one.

use std::io::IoSlice;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, Generation, INodeNo, ReplyDirectoryPlus};

use super::reply::file_attr;
use crate::fs::{DirEntry, Entry, FileKind};

/// `fuse_entry_out` (40 bytes and `fuse_attr` of 88) and `fuse_dirent` without the name (24).
const HEADER: usize = 40 + 88 + 24;

/// Entries of a directory on their way to the kernel.
pub struct Listing {
    /// Knows how much room the kernel gave, which it tells nobody: each entry is added to it, too.
    reply: ReplyDirectoryPlus,
    unique: u64,
    bytes: Vec<u8>,
}

impl Listing {
    /// For the request with this id.
    pub fn new(reply: ReplyDirectoryPlus, unique: u64) -> Self {
        Listing { reply, unique, bytes: Vec::new() }
    }

    /// Adds an entry; true if it does not fit, and so was not added.
    pub fn add(&mut self, entry: &DirEntry) -> bool {
        let attr = entry.entry.as_ref().map_or_else(|| bare(entry), |known| file_attr(&known.attr));
        if self.reply.add(attr.ino, entry.next, &entry.name, &Duration::ZERO, &attr, Generation(0)) {
            return true;
        }
        push(&mut self.bytes, entry);
        false
    }

    /// Sends all entries.
    pub fn send(self, write: impl FnOnce(&[IoSlice<'_>]) -> nix::Result<()>) {
        let mut header = [0; 16];
        let length = u32::try_from(16 + self.bytes.len()).unwrap_or(u32::MAX);
        header[..4].copy_from_slice(&length.to_ne_bytes());
        header[8..].copy_from_slice(&self.unique.to_ne_bytes());
        let parts = [IoSlice::new(&header), IoSlice::new(&self.bytes)];
        let parts = if self.bytes.is_empty() { &parts[..1] } else { &parts[..] };
        if let Err(errno) = write(parts) {
            tracing::debug!("a listing was not taken: {}", errno.desc());
        }
        // The request is answered, so the kernel knows its id no more and ignores this; it gives back the memory.
        self.reply.error(Errno::EIO);
    }

    /// Sends an error instead.
    pub fn refuse(self, errno: Errno) {
        self.reply.error(errno);
    }
}

fn kind_bits(kind: FileKind) -> u32 {
    match kind {
        FileKind::Directory => libc::S_IFDIR,
        FileKind::File => libc::S_IFREG,
        FileKind::Symlink => libc::S_IFLNK,
    }
}

/// Something of the right size for [`ReplyDirectoryPlus::add`].
fn bare(entry: &DirEntry) -> FileAttr {
    FileAttr {
        ino: INodeNo(entry.ino),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: fuser::FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

/// Seconds (before 1970 too) and nanoseconds.
fn clock(time: SystemTime) -> (i64, u32) {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => (i64::try_from(after.as_secs()).unwrap_or(i64::MAX), after.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            let seconds = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
            match before.subsec_nanos() {
                0 => (-seconds, 0),
                nanos => (-seconds - 1, 1_000_000_000 - nanos),
            }
        }
    }
}

fn push(out: &mut Vec<u8>, entry: &DirEntry) {
    let start = out.len();
    match &entry.entry {
        Some(known) => push_known(out, known),
        None => out.resize(start + 40 + 88, 0),
    }
    let name = entry.name.as_bytes();
    out.extend(entry.ino.to_ne_bytes());
    out.extend(entry.next.to_ne_bytes());
    out.extend((name.len() as u32).to_ne_bytes());
    out.extend((kind_bits(entry.kind) >> 12).to_ne_bytes());
    debug_assert_eq!(out.len() - start, HEADER);
    out.extend(name);
    out.resize(start + (HEADER + name.len()).next_multiple_of(8), 0);
}

fn push_known(out: &mut Vec<u8>, known: &Entry) {
    let attr = &known.attr;
    out.extend(attr.ino.to_ne_bytes());
    out.extend(0u64.to_ne_bytes()); // generation
    out.extend(known.entry_ttl.as_secs().to_ne_bytes());
    out.extend(known.attr_ttl.as_secs().to_ne_bytes());
    out.extend(known.entry_ttl.subsec_nanos().to_ne_bytes());
    out.extend(known.attr_ttl.subsec_nanos().to_ne_bytes());
    let times = [clock(attr.atime), clock(attr.mtime), clock(attr.ctime)];
    out.extend(attr.ino.to_ne_bytes());
    out.extend(attr.size.to_ne_bytes());
    out.extend(attr.blocks().to_ne_bytes());
    times.iter().for_each(|(seconds, _)| out.extend(seconds.to_ne_bytes()));
    times.iter().for_each(|(_, nanos)| out.extend(nanos.to_ne_bytes()));
    let mode = kind_bits(attr.kind) | u32::from(attr.perm);
    // mode, nlink, uid, gid, rdev, blksize, flags
    for word in [mode, attr.nlink, attr.uid, attr.gid, 0, 4096, 0] {
        out.extend(word.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::Attr;

    #[test]
    fn entries_have_the_kernels_layout() {
        let time = UNIX_EPOCH + Duration::new(1000, 5);
        let attr = Attr {
            ino: 77,
            kind: FileKind::File,
            size: 1025,
            perm: 0o444,
            nlink: 1,
            uid: 5,
            gid: 6,
            atime: time,
            mtime: UNIX_EPOCH - Duration::new(1, 250),
            ctime: time,
        };
        let known = Entry { attr, entry_ttl: Duration::from_millis(1500), attr_ttl: Duration::from_secs(3600) };
        let mut out = Vec::new();
        let mut entry = DirEntry { next: 9, name: "a.arrow".into(), ino: 77, kind: FileKind::File, entry: Some(known) };
        push(&mut out, &entry);
        assert_eq!(out.len(), 160);
        let word = |out: &[u8], at: usize| u64::from_ne_bytes(out[at..at + 8].try_into().unwrap_or_default());
        let half = |out: &[u8], at: usize| u32::from_ne_bytes(out[at..at + 4].try_into().unwrap_or_default());
        assert_eq!((word(&out, 0), word(&out, 16), word(&out, 24)), (77, 1, 3600));
        assert_eq!((half(&out, 32), half(&out, 36)), (500_000_000, 0));
        assert_eq!((word(&out, 40), word(&out, 48), word(&out, 56)), (77, 1025, 3));
        assert_eq!((word(&out, 64), word(&out, 72) as i64), (1000, -2));
        assert_eq!((half(&out, 88), half(&out, 92)), (5, 999_999_750));
        assert_eq!((half(&out, 100), half(&out, 104), half(&out, 108), half(&out, 112)), (0o100444, 1, 5, 6));
        assert_eq!((word(&out, 128), word(&out, 136), half(&out, 144), half(&out, 148)), (77, 9, 7, 8));
        assert_eq!(&out[152..160], b"a.arrow\0");
        // Without attributes: node id 0, inode number kept.
        entry.entry = None;
        push(&mut out, &entry);
        assert_eq!(out.len(), 320);
        assert_eq!((word(&out, 160), word(&out, 160 + 128), half(&out, 160 + 148)), (0, 77, 8));
    }
}
