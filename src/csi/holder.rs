//! The holder: keeps a copy of each mount's connection, so that a mount outlives the mounter's pod.
//!
//! Whether a connection is still of use is read from the list of mounts: one that is mounted nowhere is dropped.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket};

use crate::error::{Context, Error, Kind, Result};
use crate::fuse::handover::{Handed, Message, set_patience};
use crate::fuse::{mountinfo, protocol};

/// All connections that are held.
#[derive(Clone, Debug, Default)]
pub struct Holder {
    held: Arc<Mutex<HashMap<PathBuf, Handed>>>,
    closing: Arc<AtomicBool>,
}

impl Holder {
    /// Starts answering keepers at `path`.
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn start(path: &Path) -> Result<Self> {
        std::fs::remove_file(path).ok();
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        let address = UnixAddr::new(path).context(|| format!("socket path {path:?}"))?;
        bind(listener.as_raw_fd(), &address).context(|| format!("cannot listen on {path:?}"))?;
        listen(&listener, Backlog::new(64)?)?;
        let holder = Holder::default();
        let this = holder.clone();
        thread("holder", move || this.serve(&listener))?;
        Ok(holder)
    }

    fn serve(&self, listener: &OwnedFd) {
        loop {
            match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                Ok(raw) => {
                    // SAFETY: the kernel has just made this descriptor for this process; nobody else owns it.
                    let keeper = unsafe { OwnedFd::from_raw_fd(raw) };
                    let this = self.clone();
                    let begun = thread("keeper", move || {
                        if let Err(error) = this.answer(&keeper) {
                            tracing::warn!("a keeper is not to be understood: {error}");
                        }
                    });
                    if let Err(error) = begun {
                        tracing::warn!("{error}");
                    }
                }
                Err(errno) => {
                    tracing::warn!("holder: {}", errno.desc());
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }

    fn held(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, Handed>> {
        self.held.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Talks with one keeper until it goes.
    fn answer(&self, keeper: &OwnedFd) -> Result<()> {
        set_patience(keeper)?;
        // What is being handed over, until it is complete.
        let mut current: Option<PathBuf> = None;
        loop {
            let received = match protocol::receive::<Message>(keeper.as_fd()) {
                // A keeper says nothing for hours.
                Err(error) if error.kind() == Kind::Timeout => continue,
                other => other?,
            };
            let Some((message, fd)) = received else { return Ok(()) };
            match (message, fd) {
                (message @ Message::Connection { .. }, Some(fuse)) => {
                    let Some(handed) = Handed::begin(&message, fuse) else { continue };
                    // A keeper that ends late must not put its connection in the place of the one that is served:
                    // held and served by nobody, it would let requests wait for ever.
                    if mountinfo::is_replaced(&handed.mountpoint, handed.device) {
                        let what = format!("{:?} has another mount by now", handed.mountpoint);
                        return Err(Error::new(Kind::Stale, what));
                    }
                    current = Some(handed.mountpoint.clone());
                    self.held().insert(handed.mountpoint.clone(), handed);
                }
                (Message::File(kept), Some(file)) => {
                    self.with(current.as_deref(), |handed| handed.files.push((kept, file)))?;
                }
                (Message::State { key, value }, _) => {
                    self.with(current.as_deref(), |handed| handed.state.push((key, value)))?;
                }
                (Message::Complete, _) if self.closing.load(Ordering::Acquire) => {
                    // What is taken now would be lost; the keeper tries the next holder.
                    return Ok(());
                }
                (Message::Complete, _) => {
                    protocol::send(keeper.as_fd(), &Message::Done, None, true)?;
                    tracing::info!("{current:?} is held until another keeper takes it");
                }
                (Message::Take { mountpoint }, _) => {
                    // Its descriptors stay here until the new keeper deposits its own.
                    match self.held().get(&mountpoint) {
                        Some(handed) => handed.send(keeper)?,
                        None => protocol::send(keeper.as_fd(), &Message::Complete, None, true)?,
                    }
                }
                _ => return Err(Error::malformed("a message out of order")),
            }
        }
    }

    fn with(&self, current: Option<&Path>, work: impl FnOnce(&mut Handed)) -> Result<()> {
        match current.and_then(|current| self.held().get_mut(current).map(work)) {
            Some(()) => Ok(()),
            None => Err(Error::malformed("a part of no connection")),
        }
    }

    /// Takes nothing over any more: this process is about to end.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Drops what is mounted nowhere any more.
    ///
    /// # Errors
    /// If the list of mounts cannot be read.
    pub fn drop_unused(&self) -> Result<()> {
        let mut held = self.held();
        if held.is_empty() {
            return Ok(());
        }
        let mounts = mountinfo::all()?;
        held.retain(|mountpoint, handed| {
            let used = mounts.iter().any(|mount| mount.device == handed.device && mount.fs_type == mountinfo::FS_TYPE);
            if !used {
                tracing::debug!("{mountpoint:?} is not held any more");
            }
            used
        });
        Ok(())
    }
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let started = std::thread::Builder::new().name(name.into()).stack_size(256 << 10).spawn(work);
    started.context(|| format!("no thread for {name}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::fs::Area;
    use crate::fuse::handover::Link;
    use crate::fuse::handshake::Agreed;
    use crate::fuse::protocol::KeptFile;

    fn handed(path: &Path) -> Handed {
        Handed {
            mountpoint: path.to_owned(),
            device: (0, 4_000_000),
            allow_other: true,
            agreed: Agreed { minor: 45, flags: 7 },
            fuse: std::fs::File::open("/dev/null").unwrap().into(),
            files: Vec::new(),
            state: Vec::new(),
        }
    }

    #[test]
    fn what_one_keeper_hands_over_the_next_one_gets() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("holder.sock");
        assert!(Link::connect(&path).is_err());
        let holder = Holder::start(&path).unwrap();
        let (point, first) = (folder.path().join("m"), Link::connect(&path).unwrap());
        assert!(first.take(&point).unwrap().is_none());
        first.deposit(&handed(&point)).unwrap();
        let mut whole = handed(&point);
        for key in 1..=30 {
            let what = KeptFile { key, area: Area::Image, size: key, backing: Some(9), tag: Some("t".repeat(4000)) };
            whole.files.push((what, tempfile::tempfile().unwrap().into()));
        }
        whole.state.push(("k".into(), "v".repeat(60_000)));
        first.hand_over(&whole).unwrap();
        drop(first);
        let next = Link::connect(&path).unwrap();
        for _ in 0..2 {
            let got = next.take(&point).unwrap().unwrap();
            assert_eq!((got.device, got.agreed, got.allow_other), (whole.device, whole.agreed, true));
            assert_eq!(got.files.len(), 30);
            assert!(got.files.iter().zip(&whole.files).all(|(a, b)| a.0 == b.0));
            assert_eq!(got.state, whole.state);
        }
        // Once the next one has made it its own, the files are that one's alone.
        next.deposit(&handed(&point)).unwrap();
        assert!(next.take(&point).unwrap().unwrap().files.is_empty());
        holder.drop_unused().unwrap();
        holder.close();
        assert!(Link::connect(&path).unwrap().hand_over(&handed(&point)).is_err(), "it is about to end");
        holder.drop_unused().unwrap();
        assert!(next.take(&point).unwrap().is_none(), "no mount has that number");
    }
}
