//! Replies: answers of [`crate::fs`] in the kernel's terms.

use std::time::Duration;

use fuser::{
    Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr,
};

use crate::fs::{Attr, Entry, FileKind, Opened, Serve};

/// Inode numbers are never used again for something else, so one generation serves all.
const GENERATION: Generation = Generation(0);

/// A reply that can say no.
pub trait Refuse: Send + 'static {
    /// Says no.
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ty),* $(,)?) => {
        $(impl Refuse for $reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}

refuse!(
    ReplyAttr,
    ReplyCreate,
    ReplyData,
    ReplyDirectory,
    ReplyDirectoryPlus,
    ReplyEmpty,
    ReplyEntry,
    ReplyLseek,
    ReplyOpen,
    ReplyStatfs,
    ReplyWrite,
    ReplyXattr,
);

/// The type as `fuser` calls it.
pub fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Directory => FileType::Directory,
        FileKind::File => FileType::RegularFile,
        FileKind::Symlink => FileType::Symlink,
    }
}

/// Attributes as `fuser` wants them.
pub fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.blocks(),
        atime: attr.atime,
        mtime: attr.mtime,
        ctime: attr.ctime,
        crtime: attr.ctime,
        kind: file_type(attr.kind),
        perm: attr.perm,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// Sends a name's inode.
pub fn send_entry(reply: ReplyEntry, entry: Entry) {
    reply.entry_with_ttls(&entry.attr_ttl, &entry.entry_ttl, &file_attr(&entry.attr), GENERATION);
}

/// Sends attributes.
pub fn send_attr(reply: ReplyAttr, (attr, ttl): (Attr, Duration)) {
    reply.attr(&ttl, &file_attr(&attr));
}

/// Sends that it worked.
pub fn send_empty(reply: ReplyEmpty, (): ()) {
    reply.ok();
}

/// The flags of an open reply, and the id of the backing file in passthrough mode, which allows fewer flags.
fn open_flags(opened: &Opened) -> (FopenFlags, Option<u32>) {
    let mut flags = FopenFlags::empty();
    flags.set(FopenFlags::FOPEN_NOFLUSH, opened.no_flush);
    match opened.serve {
        Serve::Cached => (flags | FopenFlags::FOPEN_KEEP_CACHE, None),
        Serve::Direct => (flags | FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_KEEP_CACHE, None),
        Serve::Passthrough(id) => (flags, Some(id)),
    }
}

/// Sends a handle.
pub fn send_open(reply: ReplyOpen, opened: Opened) {
    let fh = FileHandle(opened.fh);
    match open_flags(&opened) {
        (flags, None) => reply.opened(fh, flags),
        (flags, Some(id)) => {
            // SAFETY: the keeper registered this id with this connection and closes it only when the filesystem says
            // so; `into_raw` keeps this wrapper from closing it.
            let backing = unsafe { reply.wrap_backing(id) };
            reply.opened_passthrough(fh, flags, &backing);
            backing.into_raw();
        }
    }
}

/// Sends a new file and its handle.
pub fn send_create(reply: ReplyCreate, (entry, opened): (Entry, Opened)) {
    let fh = FileHandle(opened.fh);
    let (attr, ttl) = (file_attr(&entry.attr), entry.entry_ttl.min(entry.attr_ttl));
    match open_flags(&opened) {
        (flags, None) => reply.created(&ttl, &attr, GENERATION, fh, flags),
        (flags, Some(id)) => {
            // SAFETY: as in `send_open`.
            let backing = unsafe { reply.wrap_backing(id) };
            reply.created_passthrough(&ttl, &attr, GENERATION, fh, flags, &backing);
            backing.into_raw();
        }
    }
}

/// Sends an attribute's value, or its size if the caller has no buffer yet.
pub fn send_xattr(reply: ReplyXattr, (value, room): (Vec<u8>, u32)) {
    match u32::try_from(value.len()) {
        Ok(size) if room == 0 => reply.size(size),
        Ok(size) if size <= room => reply.data(&value),
        _ => reply.error(Errno::ERANGE),
    }
}
