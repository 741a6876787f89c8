//! The kernel's requests, one method each: log, call [`FileSystem`], count, reply.

use std::ffi::{OsStr, OsString};
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::direntplus::Listing;
use super::handshake;
use super::stats::{Op, Stats};
use super::workers::Workers;
use crate::error::{Error, Kind, Result};
use crate::fs::{Attr, Caller, DirEntry, Entry, FileKind, FileSystem, Opened, Serve, SetAttr};

/// Bit of a request's id: the kernel sent it before.
const RESENT: u64 = 1 << 63;
/// Inode numbers are never used again for something else, so one generation serves all.
const GENERATION: Generation = Generation(0);

/// What all requests need.
pub struct Shared {
    /// The filesystem.
    pub fs: Arc<FileSystem>,
    /// Counters.
    pub stats: Stats,
    /// Threads for slow requests.
    pub workers: Workers,
    /// The connection, for the one kind of reply that is written by hand.
    pub device: OwnedFd,
}

/// The filesystem as `fuser` calls it.
pub struct Adapter {
    shared: Arc<Shared>,
    flags: u64,
}

/// A reply that can say no.
trait Refuse: Send + 'static {
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

impl Adapter {
    /// For a connection on which `flags` were agreed.
    pub fn new(shared: Arc<Shared>, flags: u64) -> Self {
        Adapter { shared, flags }
    }

    /// Answers a request: `work` finds the answer, `send` sends it. Both may run on another thread.
    fn answer<R: Refuse, T>(
        &self,
        op: Op,
        request: &Request,
        reply: R,
        what: impl Fn() -> String + Send + 'static,
        work: impl FnOnce(&Shared) -> Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        let id = request.unique().0;
        let shared = self.shared.clone();
        let start = Instant::now();
        self.shared.workers.run(move |late| {
            tracing::trace!(id, op = op.name(), what = what(), "request");
            let result = if late {
                Err(Error::new(Kind::Timeout, "the request waited too long for requests before it"))
            } else {
                work(&shared)
            };
            let took = start.elapsed();
            shared.stats.record(op, took, result.as_ref().is_err_and(is_failure));
            match result {
                Ok(answer) => {
                    tracing::trace!(id, op = op.name(), ?took, "done");
                    send(reply, answer);
                }
                Err(error) => {
                    shared.report(op, id, &what(), &error);
                    reply.refuse(Errno::from_i32(error.errno()));
                }
            }
        });
    }
}

impl Shared {
    /// Logs an error: what programs expect to happen quietly, a broken object or store aloud.
    fn report(&self, op: Op, id: u64, what: &str, error: &Error) {
        match error.errno() {
            libc::EIO | libc::ENOSPC | libc::EREMOTEIO | libc::EHOSTUNREACH => {
                tracing::warn!(id, op = op.name(), what, error = %error, "request failed");
                self.stats.remember(op, &format!("{what}: {error}"));
            }
            _ => tracing::trace!(id, op = op.name(), what, error = %error, "refused"),
        }
    }
}

/// Whether an error is one that `status` counts: a name or attribute that does not exist, or a name that leads
/// elsewhere by now, is a usual answer.
fn is_failure(error: &Error) -> bool {
    !matches!(error.errno(), libc::ENOENT | libc::ENODATA | libc::ESTALE)
}

fn caller(request: &Request) -> Caller {
    let resent = request.unique().0 & RESENT != 0;
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid(), resent }
}

fn file_type(kind: FileKind) -> FileType {
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

fn send_entry(reply: ReplyEntry, entry: Entry) {
    reply.entry_with_ttls(&entry.attr_ttl, &entry.entry_ttl, &file_attr(&entry.attr), GENERATION);
}

fn send_attr(reply: ReplyAttr, (attr, ttl): (Attr, Duration)) {
    reply.attr(&ttl, &file_attr(&attr));
}

fn send_empty(reply: ReplyEmpty, (): ()) {
    reply.ok();
}

/// The flags of an open reply, and the id of the backing file in passthrough mode, which allows fewer flags.
fn open_flags(opened: &Opened) -> (FopenFlags, Option<u32>) {
    let mut flags = FopenFlags::empty();
    flags.set(FopenFlags::FOPEN_NOFLUSH, opened.no_flush);
    match opened.serve {
        Serve::Cached => (flags | FopenFlags::FOPEN_KEEP_CACHE, None),
        Serve::Direct => (flags | FopenFlags::FOPEN_DIRECT_IO, None),
        Serve::Passthrough(id) => (flags, Some(id)),
    }
}

fn send_open(reply: ReplyOpen, opened: Opened) {
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

fn send_create(reply: ReplyCreate, (entry, opened): (Entry, Opened)) {
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
fn send_xattr(reply: ReplyXattr, (value, room): (Vec<u8>, u32)) {
    match u32::try_from(value.len()) {
        Ok(size) if room == 0 => reply.size(size),
        Ok(size) if size <= room => reply.data(&value),
        _ => reply.error(Errno::ERANGE),
    }
}

fn point_in_time(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

fn named(parent: u64, name: &OsStr) -> impl Fn() -> String + Send + 'static {
    let name = name.to_owned();
    move || format!("{name:?} in inode {parent:#x}")
}

fn inode(ino: u64) -> impl Fn() -> String + Send + 'static {
    move || format!("inode {ino:#x}")
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // The answer goes nowhere: the keeper has settled all with the kernel. These make `fuser` believe the same.
        for bit in (0..u64::BITS).map(|bit| 1u64 << bit).filter(|bit| self.flags & bit != 0) {
            config.add_capabilities(InitFlags::from_bits_retain(bit)).ok();
        }
        config.set_max_stack_depth(1).ok();
        config.set_max_write(handshake::MAX_WRITE).ok();
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (caller, parent, owned) = (caller(request), parent.0, name.to_owned());
        let work = move |shared: &Shared| shared.fs.lookup(parent, &owned, caller);
        self.answer(Op::Lookup, request, reply, named(parent, name), work, send_entry);
    }

    fn forget(&self, _request: &Request, ino: INodeNo, count: u64) {
        self.shared.fs.forget(ino.0, count);
    }

    fn getattr(&self, request: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let work = move |shared: &Shared| shared.fs.getattr(ino.0, fh.map(|fh| fh.0));
        self.answer(Op::Getattr, request, reply, inode(ino.0), work, send_attr);
    }

    #[allow(clippy::too_many_arguments)]
    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (atime, mtime) = (atime.map(point_in_time), mtime.map(point_in_time));
        let change = SetAttr { mode, uid, gid, size, atime, mtime };
        let caller = caller(request);
        let work = move |shared: &Shared| shared.fs.setattr(ino.0, fh.map(|fh| fh.0), change, caller);
        self.answer(Op::Setattr, request, reply, inode(ino.0), work, send_attr);
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        let work = move |shared: &Shared| shared.fs.readlink(ino.0);
        self.answer(Op::Readlink, request, reply, inode(ino.0), work, |reply, target| reply.data(&target));
    }

    #[allow(clippy::too_many_arguments)]
    fn mknod(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        // Ordinary files come through CREATE; devices, pipes and sockets are no datasets.
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let (caller, parent, owned) = (caller(request), parent.0, name.to_owned());
        let work = move |shared: &Shared| shared.fs.mkdir(parent, &owned, mode, umask, caller);
        self.answer(Op::Mkdir, request, reply, named(parent, name), work, send_entry);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (caller, parent, owned) = (caller(request), parent.0, name.to_owned());
        let work = move |shared: &Shared| shared.fs.unlink(parent, &owned, caller);
        self.answer(Op::Unlink, request, reply, named(parent, name), work, send_empty);
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (caller, parent, owned) = (caller(request), parent.0, name.to_owned());
        let work = move |shared: &Shared| shared.fs.rmdir(parent, &owned, caller);
        self.answer(Op::Rmdir, request, reply, named(parent, name), work, send_empty);
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (caller, parent, owned) = (caller(request), parent.0, name.to_owned());
        let target: OsString = target.into();
        let work = move |shared: &Shared| shared.fs.symlink(parent, &owned, &target, caller);
        self.answer(Op::Symlink, request, reply, named(parent, name), work, send_entry);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (caller, parent, new_parent) = (caller(request), parent.0, new_parent.0);
        let (from, to) = (name.to_owned(), new_name.to_owned());
        let work = move |shared: &Shared| shared.fs.rename(parent, &from, new_parent, &to, flags.bits(), caller);
        self.answer(Op::Rename, request, reply, named(parent, name), work, send_empty);
    }

    fn link(&self, _request: &Request, _ino: INodeNo, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let caller = caller(request);
        let work = move |shared: &Shared| shared.fs.open(ino.0, flags.0, caller);
        self.answer(Op::Open, request, reply, inode(ino.0), work, send_open);
    }

    #[allow(clippy::too_many_arguments)]
    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (caller, parent, owned) = (caller(request), parent.0, name.to_owned());
        let work = move |shared: &Shared| shared.fs.create(parent, &owned, mode, umask, flags, caller);
        self.answer(Op::Create, request, reply, named(parent, name), work, send_create);
    }

    #[allow(clippy::too_many_arguments)]
    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let what = move || format!("inode {:#x} at {offset}, {size} bytes", ino.0);
        let work = move |shared: &Shared| {
            let data = shared.fs.read(ino.0, fh.0, offset, size)?;
            shared.stats.add_bytes(Op::Read, data.len() as u64);
            Ok(data)
        };
        self.answer(Op::Read, request, reply, what, work, |reply, data| reply.data(&data));
    }

    #[allow(clippy::too_many_arguments)]
    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let size = data.len();
        let what = move || format!("inode {:#x} at {offset}, {size} bytes", ino.0);
        // The buffer belongs to the event loop, which reads the next request into it.
        let data = data.to_vec();
        let work = move |shared: &Shared| {
            let written = shared.fs.write(ino.0, fh.0, offset, &data)?;
            shared.stats.add_bytes(Op::Write, u64::from(written));
            Ok(written)
        };
        self.answer(Op::Write, request, reply, what, work, |reply, written| reply.written(written));
    }

    fn flush(&self, request: &Request, ino: INodeNo, fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        let caller = caller(request);
        let work = move |shared: &Shared| shared.fs.flush(ino.0, fh.0, caller);
        self.answer(Op::Flush, request, reply, inode(ino.0), work, send_empty);
    }

    fn fsync(&self, request: &Request, ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let caller = caller(request);
        let work = move |shared: &Shared| shared.fs.fsync(ino.0, fh.0, caller);
        self.answer(Op::Fsync, request, reply, inode(ino.0), work, send_empty);
    }

    #[allow(clippy::too_many_arguments)]
    fn release(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        // Never refused, however long it waited: a handle that is not given back is never freed.
        let (shared, start, id) = (self.shared.clone(), Instant::now(), request.unique().0);
        self.shared.workers.run(move |_late| {
            tracing::trace!(id, op = "Release", ino = ino.0, fh = fh.0, "request");
            shared.fs.release(ino.0, fh.0);
            shared.stats.record(Op::Release, start.elapsed(), false);
            reply.ok();
        });
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let work = move |shared: &Shared| shared.fs.opendir(ino.0);
        let send = |reply: ReplyOpen, (fh, unchanged): (u64, bool)| {
            let mut flags = FopenFlags::FOPEN_CACHE_DIR;
            flags.set(FopenFlags::FOPEN_KEEP_CACHE, unchanged);
            reply.opened(FileHandle(fh), flags);
        };
        self.answer(Op::Opendir, request, reply, inode(ino.0), work, send);
    }

    fn readdir(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let (shared, start, id) = (self.shared.clone(), Instant::now(), request.unique().0);
        self.shared.workers.run(move |_late| {
            let mut add =
                |entry: DirEntry| reply.add(INodeNo(entry.ino), entry.next, file_type(entry.kind), &entry.name);
            let result = shared.fs.readdir(ino.0, fh.0, offset, false, &mut add);
            shared.stats.record(Op::Readdir, start.elapsed(), result.as_ref().is_err_and(is_failure));
            match result {
                Ok(()) => reply.ok(),
                Err(error) => {
                    shared.report(Op::Readdir, id, &inode(ino.0)(), &error);
                    reply.error(Errno::from_i32(error.errno()));
                }
            }
        });
    }

    fn readdirplus(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectoryPlus) {
        let (shared, start, id) = (self.shared.clone(), Instant::now(), request.unique().0);
        self.shared.workers.run(move |_late| {
            let mut listing = Listing::new(reply, id);
            let result = shared.fs.readdir(ino.0, fh.0, offset, true, &mut |entry| listing.add(&entry));
            shared.stats.record(Op::Readdir, start.elapsed(), result.as_ref().is_err_and(is_failure));
            match result {
                Ok(()) => listing.send(|parts: &[IoSlice<'_>]| nix::sys::uio::writev(&shared.device, parts).map(drop)),
                Err(error) => {
                    shared.report(Op::Readdir, id, &inode(ino.0)(), &error);
                    listing.refuse(Errno::from_i32(error.errno()));
                }
            }
        });
    }

    fn releasedir(&self, request: &Request, ino: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        let work = move |shared: &Shared| {
            shared.fs.releasedir(ino.0, fh.0);
            Ok(())
        };
        self.answer(Op::Releasedir, request, reply, inode(ino.0), work, send_empty);
    }

    fn fsyncdir(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        const BLOCK: u32 = 4096;
        let work = |shared: &Shared| shared.fs.statfs();
        self.answer(
            Op::Statfs,
            request,
            reply,
            || "the store".into(),
            work,
            |reply, stat| {
                let (blocks, free) = (stat.total_bytes / u64::from(BLOCK), stat.free_bytes / u64::from(BLOCK));
                reply.statfs(blocks, free, free, stat.files, u64::from(u32::MAX), BLOCK, 255, BLOCK);
            },
        );
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let owned = name.to_owned();
        let work = move |shared: &Shared| Ok((shared.fs.getxattr(ino.0, &owned)?, size));
        self.answer(Op::Getxattr, request, reply, named(ino.0, name), work, send_xattr);
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let work = move |shared: &Shared| Ok((shared.fs.listxattr(ino.0)?, size));
        self.answer(Op::Listxattr, request, reply, inode(ino.0), work, send_xattr);
    }

    #[allow(clippy::too_many_arguments)]
    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (caller, owned, value) = (caller(request), name.to_owned(), value.to_vec());
        let work = move |shared: &Shared| shared.fs.setxattr(ino.0, &owned, &value, flags, caller);
        self.answer(Op::Setxattr, request, reply, named(ino.0, name), work, send_empty);
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (caller, owned) = (caller(request), name.to_owned());
        let work = move |shared: &Shared| shared.fs.removexattr(ino.0, &owned, caller);
        self.answer(Op::Removexattr, request, reply, named(ino.0, name), work, send_empty);
    }

    #[allow(clippy::too_many_arguments)]
    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: fuser::IoctlFlags,
        _command: u32,
        _data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    #[allow(clippy::too_many_arguments)]
    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let work = move |shared: &Shared| shared.fs.fallocate(ino.0, fh.0, offset, length, mode);
        self.answer(Op::Fallocate, request, reply, inode(ino.0), work, send_empty);
    }

    /// The kernel remembers this answer, and copies by reads and writes itself from then on.
    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn lseek(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let work = move |shared: &Shared| {
            let position = shared.fs.lseek(ino.0, fh.0, offset, whence)?;
            i64::try_from(position).map_err(|_| Error::new(Kind::Os(libc::EOVERFLOW), "position"))
        };
        self.answer(Op::Lseek, request, reply, inode(ino.0), work, |reply, position| reply.offset(position));
    }
}
