//! A keeper's side of the hand-over: taking a mount that another keeper left, and leaving one to the next.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Keeper;
use crate::error::{Error, Kind, Result};
use crate::fuse::handover::{Handed, Link};
use crate::fuse::handshake::Agreed;
use crate::fuse::mount::{self, MountOptions, Mounted};
use crate::fuse::mountinfo;
use crate::fuse::runtime::{KeeperRecord, Runtime};

/// How often a holder is looked for.
const AGAIN: Duration = Duration::from_secs(1);

/// The keeper's holder, while there is one.
#[derive(Debug)]
pub struct Successor {
    path: PathBuf,
    link: Option<Link>,
    next: Instant,
}

impl Successor {
    /// One that listens at `path`, now or later.
    pub fn at(path: &Path) -> Self {
        Successor { path: path.to_owned(), link: Link::connect(path).ok(), next: Instant::now() + AGAIN }
    }

    /// A mount that an earlier keeper left on `mountpoint`, if it is still there and its connection lives.
    pub fn take(&self, mountpoint: &Path) -> Option<Handed> {
        let handed = match self.link.as_ref()?.take(mountpoint) {
            Ok(handed) => handed?,
            Err(error) => {
                tracing::warn!("what the holder has is not to be had: {error}");
                return None;
            }
        };
        let there = mountinfo::at(mountpoint).ok().flatten();
        let same = there.is_some_and(|mount| mount.device == handed.device && mount.fs_type == mountinfo::FS_TYPE);
        let mut state = [PollFd::new(handed.fuse.as_fd(), PollFlags::empty())];
        // An aborted connection is an error at once.
        let lives = matches!(poll(&mut state, PollTimeout::ZERO), Ok(0));
        (same && lives).then_some(handed)
    }

    /// Lets the holder have a copy of the connection.
    pub fn deposit(&mut self, handed: &Handed) {
        if let Some(link) = &self.link
            && let Err(error) = link.deposit(handed)
        {
            tracing::info!("the holder has gone: {error}");
            self.lost();
        }
    }

    /// Leaves the mount to the next keeper.
    ///
    /// # Errors
    /// If nobody holds it; the mount must be taken away then.
    pub fn hand_over(&self, handed: &Handed) -> Result<()> {
        match &self.link {
            Some(link) => link.hand_over(handed),
            None => Err(Error::new(Kind::Unavailable, "there is no holder")),
        }
    }

    /// What tells that the holder has gone.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().map(|link| link.socket().as_fd())
    }

    /// When to look for a holder.
    pub fn due(&self) -> Option<Instant> {
        self.link.is_none().then_some(self.next)
    }

    /// The holder has gone.
    pub fn lost(&mut self) {
        self.link = None;
        self.next = Instant::now() + AGAIN;
    }

    /// Looks for a holder if it is time; true if there is a new one.
    pub fn look(&mut self) -> bool {
        if self.due().is_none_or(|due| Instant::now() < due) {
            return false;
        }
        self.link = Link::connect(&self.path).ok();
        self.next = Instant::now() + AGAIN;
        self.link.is_some()
    }
}

/// A new mount, with INIT answered.
///
/// # Errors
/// If it cannot be made; nothing is left behind then.
pub fn mount_anew(
    options: &MountOptions<'_>,
    left_behind: bool,
    runtime: &Runtime,
    record: &mut KeeperRecord,
) -> Result<(Mounted, Agreed)> {
    // What cannot be taken over is of no use to anybody.
    while left_behind && mountinfo::at(options.mountpoint)?.is_some_and(|mount| mount.fs_type == mountinfo::FS_TYPE) {
        mount::detach(options.mountpoint)?;
    }
    let mounted = mount::mount(options)?;
    let prepared = mount::initialise(&mounted.fuse).and_then(|agreed| {
        record.device = Some(mounted.device);
        runtime.write_record(record)?;
        Ok(agreed)
    });
    match prepared {
        Ok(agreed) => {
            mount::raise_readahead(mounted.device);
            Ok((mounted, agreed))
        }
        Err(error) => {
            mount::detach(options.mountpoint).ok();
            Err(error)
        }
    }
}

/// The connection alone, as a holder gets it.
///
/// # Errors
/// If there are too many descriptors.
pub fn connection(mountpoint: &Path, mounted: &Mounted, agreed: Agreed) -> Result<Handed> {
    Ok(Handed {
        mountpoint: mountpoint.to_owned(),
        device: mounted.device,
        allow_other: mounted.allow_other,
        agreed,
        fuse: mounted.fuse.try_clone()?,
        files: Vec::new(),
        state: Vec::new(),
    })
}

impl Keeper {
    /// Notes that the holder has gone, or gives a new one the connection.
    pub(super) fn follow_holder(&mut self, moved: bool) -> Result<()> {
        let Some(successor) = &mut self.successor else { return Ok(()) };
        if moved {
            // It says nothing unasked, so this is its end.
            successor.lost();
        }
        if successor.look() {
            successor.deposit(&connection(&self.config.mountpoint, &self.mounted, self.agreed)?);
        }
        Ok(())
    }

    /// Leaves a mount that is in use to the next keeper; false if it is not, or nobody would hold it.
    pub(super) fn hand_over(&mut self) -> bool {
        if self.successor.is_none() || self.ending.is_some() || !in_use(self.mounted.device, &self.config.mountpoint) {
            return false;
        }
        if let Some(server) = &mut self.server {
            server.kill();
        }
        // What the server said last may still lie in the socket.
        while self.server.is_some() && self.answer_server() {}
        self.server = None;
        let handed = connection(&self.config.mountpoint, &self.mounted, self.agreed).and_then(|mut handed| {
            (handed.files, handed.state) = self.files.copies()?;
            Ok(handed)
        });
        let Some(successor) = &self.successor else { return false };
        match handed.and_then(|handed| successor.hand_over(&handed)) {
            Ok(()) => {
                tracing::info!("the mount is handed over");
                self.handed_over = true;
            }
            Err(error) => tracing::error!("the mount cannot be handed over, and goes: {error}"),
        }
        self.handed_over
    }
}

/// Whether a mount is shown at another place too.
fn in_use(device: (u32, u32), mountpoint: &Path) -> bool {
    let mounts = mountinfo::all().unwrap_or_default();
    mounts.iter().any(|mount| mount.device == device && mount.mountpoint != mountpoint)
}
