//! A keeper's side of the hand-over: taking a mount that another keeper left, and leaving one to the next.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Keeper;
use super::files::Files;
use crate::error::{Error, Kind, Result};
use crate::fuse::config::MountConfig;
use crate::fuse::handover::{Handed, Link};
use crate::fuse::handshake::Agreed;
use crate::fuse::mount::Mounted;
use crate::fuse::mountinfo;
use crate::fuse::runtime::{KeeperRecord, Runtime};

/// How long a mount waits for a holder that has gone, when it is to be handed over. Less than servers wait for their
/// keeper.
const NO_HOLDER: Duration = Duration::from_secs(8);
/// How often a holder is looked for.
const AGAIN: Duration = Duration::from_secs(1);

/// The keeper's holder, while there is one.
#[derive(Debug)]
pub struct Successor {
    path: PathBuf,
    link: Option<Link>,
    next: Instant,
    /// Device number of the mount that the holder has.
    deposited: Option<(u32, u32)>,
}

impl Successor {
    /// One that listens at `path`, now or later.
    pub fn at(path: &Path) -> Self {
        Successor {
            path: path.to_owned(),
            link: Link::connect(path).ok(),
            next: Instant::now() + AGAIN,
            deposited: None,
        }
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
        let Some(link) = &self.link else { return };
        match link.deposit(handed) {
            Ok(()) => self.deposited = Some(handed.device),
            Err(error) => {
                tracing::info!("the holder has gone: {error}");
                self.lost();
            }
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
        (self.link, self.deposited) = (None, None);
        self.next = Instant::now() + AGAIN;
    }

    /// Looks for a holder if it is time; true if there is one that has no copy of this mount.
    pub fn look(&mut self, device: (u32, u32)) -> bool {
        if self.due().is_some_and(|due| Instant::now() >= due) {
            self.link = Link::connect(&self.path).ok();
            self.next = Instant::now() + AGAIN;
        }
        self.link.is_some() && self.deposited != Some(device)
    }
}

/// How a keeper begins.
pub struct Begun {
    /// The mount, new or taken over.
    pub mounted: Mounted,
    /// What was agreed on with the kernel.
    pub agreed: Agreed,
    /// Who holds copies, if the configuration names somebody.
    pub successor: Option<Successor>,
    /// The mount was taken over.
    pub resumed: bool,
}

/// Takes over the mount that another keeper left, with its files, or mounts.
///
/// # Errors
/// If it cannot be made; nothing is left behind then.
pub fn begin(config: &MountConfig, runtime: &Runtime, record: &mut KeeperRecord, files: &mut Files) -> Result<Begun> {
    let mut successor = config.holder.as_deref().map(Successor::at);
    let handed = successor.as_ref().and_then(|successor| successor.take(&config.mountpoint));
    let resumed = handed.is_some();
    let (mounted, agreed) = match handed {
        Some(handed) => {
            tracing::info!("going on with the mount that another keeper left");
            handed.files.into_iter().for_each(|(what, file)| files.adopt(what, file));
            for (key, value) in handed.state {
                files.put_state(key, Some(value))?;
            }
            record.device = Some(handed.device);
            runtime.write_record(record)?;
            let Handed { fuse, device, allow_other, agreed, .. } = handed;
            (Mounted { fuse, device, allow_other }, agreed)
        }
        None => {
            // What cannot be taken over is of no use to anybody.
            let dead = if successor.is_some() { mountinfo::ours_at(&config.mountpoint)? } else { config.dead.clone() };
            super::mount_now(config, runtime, record, &dead)?
        }
    };
    if let Some(successor) = &mut successor {
        successor.deposit(&connection(&config.mountpoint, &mounted, agreed)?);
    }
    Ok(Begun { mounted, agreed, successor, resumed })
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
        if successor.look(self.mounted.device) {
            successor.deposit(&connection(&self.config.mountpoint, &self.mounted, self.agreed)?);
        }
        Ok(())
    }

    /// Leaves a mount that is in use to the next keeper; false if it is not, or nobody would hold it.
    pub(super) fn hand_over(&mut self) -> bool {
        if self.successor.is_none() || self.ending.is_some() || !in_use(self.mounted.device, &self.config.mountpoint) {
            return false;
        }
        let until = Instant::now() + NO_HOLDER;
        loop {
            // The next keeper did not wait for this one and has mounted anew: requests to this mount must fail.
            if mountinfo::is_replaced(&self.config.mountpoint, self.mounted.device) {
                tracing::info!("another mount has taken this one's place");
                return false;
            }
            match self.try_hand_over() {
                Ok(()) => {
                    tracing::info!("the mount is handed over");
                    self.handed_over = true;
                    return true;
                }
                // A holder that is being replaced itself comes back.
                Err(error) if Instant::now() < until => {
                    tracing::debug!("not handed over yet: {error}");
                    std::thread::sleep(NO_HOLDER / 80);
                }
                Err(error) => {
                    tracing::error!("the mount cannot be handed over, and goes: {error}");
                    return false;
                }
            }
        }
    }

    fn try_hand_over(&mut self) -> Result<()> {
        let Some(successor) = &mut self.successor else {
            return Err(Error::new(Kind::Unavailable, "there is no holder"));
        };
        if successor.link.is_none() {
            successor.link = Some(Link::connect(&successor.path)?);
        }
        if let Some(server) = &mut self.server {
            server.kill();
        }
        // What the server said last may still lie in the socket.
        while self.server.is_some() && self.answer_server() {}
        self.server = None;
        let mut handed = connection(&self.config.mountpoint, &self.mounted, self.agreed)?;
        (handed.files, handed.state) = self.files.copies()?;
        let Some(successor) = &mut self.successor else { return Ok(()) };
        successor.hand_over(&handed).inspect_err(|_| successor.lost())
    }
}

/// Whether a mount is shown at another place too.
fn in_use(device: (u32, u32), mountpoint: &Path) -> bool {
    let mounts = mountinfo::all().unwrap_or_default();
    mounts.iter().any(|mount| mount.device == device && mount.mountpoint != mountpoint)
}
