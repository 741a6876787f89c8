//! The kernel's requests, one method each: log, call [`FileSystem`], count, reply.

use std::ffi::{OsStr, OsString};
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};

use super::direntplus::Listing;
use super::handshake;
use super::journal::{Journal, RESENT, STRIKES};
use super::reply::{Refuse, file_type, send_attr, send_create, send_empty, send_entry, send_open, send_xattr};
use super::stats::{Op, Stats};
use super::workers::Workers;
use crate::error::{Error, Kind, Result};
use crate::fs::{Caller, DirEntry, FileSystem, Opened, Serve, SetAttr};

/// What all requests need.
pub struct Shared {
    /// The filesystem.
    pub fs: Arc<FileSystem>,
    /// Counters.
    pub stats: Stats,
    /// What is in work, for the next server and for the keeper.
    pub journal: Arc<Journal>,
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
        let start = Instant::now();
        self.run(op, request, move |shared, refused| {
            tracing::trace!(what = what(), "begins");
            let result = match refused {
                Some(error) => Err(error),
                None => work(shared),
            };
            shared.stats.record(op, start.elapsed(), result.as_ref().is_err_and(is_failure));
            match result {
                Ok(answer) => {
                    tracing::trace!(took = ?start.elapsed(), "done");
                    send(reply, answer);
                }
                Err(error) => {
                    shared.report(op, &what(), &error);
                    reply.refuse(Errno::from_i32(error.errno()));
                }
            }
        });
    }

    /// Runs the work of a request, now or soon on another thread, noted in the journal and within a span of the log. It
    /// hears why the request is to be refused, if it is.
    fn run(&self, op: Op, request: &Request, work: impl FnOnce(&Shared, Option<Error>) + Send + 'static) {
        let unique = request.unique().0;
        let shared = self.shared.clone();
        let entry = shared.journal.enter(unique);
        self.shared.workers.run(move |late| {
            let span = tracing::info_span!("request", id = unique & !RESENT, op = op.name());
            let _inside = span.enter();
            let refused = if shared.journal.is_refused(unique) {
                let message = format!("{STRIKES} servers ended while they worked on this request: not tried again");
                Some(Error::new(Kind::Os(libc::EIO), message))
            } else if late {
                Some(Error::new(Kind::Timeout, "the request waited too long for requests before it"))
            } else {
                entry.begin();
                None
            };
            work(&shared, refused);
        });
    }
}

impl Shared {
    /// Logs an error: what programs expect to happen quietly, a broken object or store aloud.
    fn report(&self, op: Op, what: &str, error: &Error) {
        match error.errno() {
            libc::EIO | libc::ENOSPC | libc::ENOMEM | libc::EREMOTEIO | libc::EHOSTUNREACH => {
                tracing::warn!(what, "request failed: {error}");
                self.stats.remember(op, &format!("{what}: {error}"));
            }
            _ => tracing::trace!(what, "refused: {error}"),
        }
    }
}

/// Whether an error is one that `status` counts: a name or attribute that does not exist or is not kept, or a
/// name that leads elsewhere by now, is a usual answer.
fn is_failure(error: &Error) -> bool {
    !matches!(error.errno(), libc::ENOENT | libc::ENODATA | libc::EOPNOTSUPP | libc::ESTALE)
}

fn caller(request: &Request) -> Caller {
    let unique = request.unique().0;
    let (resent, request_id) = (unique & RESENT != 0, unique & !RESENT);
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid(), resent, request: request_id }
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
        let direct = self.flags & handshake::flag::DIRECT_IO_ALLOW_MMAP != 0;
        let work = move |shared: &Shared| match shared.fs.open(ino.0, flags.0, caller) {
            Ok(opened) if opened.serve == Serve::Direct && !direct => Ok(Opened { serve: Serve::Cached, ..opened }),
            other => other,
        };
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
        let work = move |shared: &Shared| shared.fs.fsync(ino.0, fh.0);
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
        let start = Instant::now();
        self.run(Op::Release, request, move |shared, _refused| {
            shared.fs.release(ino.0, fh.0);
            shared.stats.record(Op::Release, start.elapsed(), false);
            reply.ok();
        });
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let work = move |shared: &Shared| shared.fs.opendir(ino.0);
        // The kernel keeps no listing: readers of an older one would fill it in for all.
        let send = |reply: ReplyOpen, fh: u64| reply.opened(FileHandle(fh), FopenFlags::empty());
        self.answer(Op::Opendir, request, reply, inode(ino.0), work, send);
    }

    fn readdir(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let start = Instant::now();
        self.run(Op::Readdir, request, move |shared, refused| {
            let mut add =
                |entry: DirEntry| reply.add(INodeNo(entry.ino), entry.next, file_type(entry.kind), &entry.name);
            let result = refused.map_or_else(|| shared.fs.readdir(ino.0, fh.0, offset, false, &mut add), Err);
            shared.stats.record(Op::Readdir, start.elapsed(), result.as_ref().is_err_and(is_failure));
            match result {
                Ok(()) => reply.ok(),
                Err(error) => {
                    shared.report(Op::Readdir, &inode(ino.0)(), &error);
                    reply.error(Errno::from_i32(error.errno()));
                }
            }
        });
    }

    fn readdirplus(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectoryPlus) {
        let id = request.unique().0;
        let start = Instant::now();
        self.run(Op::Readdir, request, move |shared, refused| {
            let mut listing = Listing::new(reply, id);
            let mut add = |entry: DirEntry| listing.add(&entry);
            let result = refused.map_or_else(|| shared.fs.readdir(ino.0, fh.0, offset, true, &mut add), Err);
            shared.stats.record(Op::Readdir, start.elapsed(), result.as_ref().is_err_and(is_failure));
            match result {
                Ok(()) => listing.send(|parts: &[IoSlice<'_>]| nix::sys::uio::writev(&shared.device, parts).map(drop)),
                Err(error) => {
                    shared.report(Op::Readdir, &inode(ino.0)(), &error);
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
                // There is room for as many names as anybody counts: of those, and of the ones that are there.
                let more = u64::from(u32::MAX);
                reply.statfs(blocks, free, free, stat.files + more, more, BLOCK, 255, BLOCK);
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

    #[allow(clippy::too_many_arguments)]
    fn copy_file_range(
        &self,
        _request: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The kernel then copies by itself, and does not ask again.
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
