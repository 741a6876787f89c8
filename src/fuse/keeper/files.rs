//! What a keeper holds for its servers: memory files, their registrations with the kernel, and small texts.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use serde_json::{Value, json};

use crate::error::{Error, Kind, Result};
use crate::fs::{Area, CONNECTION};
use crate::fuse::area::Maker;
use crate::fuse::config::MountConfig;
use crate::fuse::protocol::{BYTES_PER_MESSAGE, KeptFile, MAX_STATE, MAX_TAG};

/// Most bytes of all texts together.
const STATE_LIMIT: usize = 64 << 20;
/// What a file takes in a message beside its note, at most.
const FILE_BYTES: usize = 150;

mod ioctl {
    nix::ioctl_write_ptr!(backing_close, 0xe5, 2, u32);
}

struct Kept {
    file: OwnedFd,
    what: KeptFile,
}

/// Files with their descriptors, and texts by name.
pub type Copies = (Vec<(KeptFile, OwnedFd)>, Vec<(String, String)>);

/// All of it.
pub struct Files {
    images: Maker,
    staging: Maker,
    memory: Maker,
    kept: BTreeMap<u64, Kept>,
    last_key: u64,
    state: BTreeMap<String, String>,
    state_bytes: usize,
}

impl Files {
    /// Empty areas of the sizes that the configuration names.
    pub fn new(config: &MountConfig) -> Self {
        Files {
            images: Maker::new(Area::Image, config.cache_size),
            staging: Maker::new(Area::Staging, config.staging_size),
            memory: Maker::unlimited(),
            kept: BTreeMap::new(),
            last_key: 0,
            state: BTreeMap::new(),
            state_bytes: 0,
        }
    }

    /// Takes a file that another keeper kept.
    pub fn adopt(&mut self, what: KeptFile, file: OwnedFd) {
        self.last_key = self.last_key.max(what.key);
        self.kept.insert(what.key, Kept { file, what });
    }

    /// All files with descriptors of their own, and all texts.
    ///
    /// # Errors
    /// If there are too many descriptors.
    pub fn copies(&self) -> Result<Copies> {
        let copy = |kept: &Kept| Ok((kept.what.clone(), kept.file.try_clone()?));
        let files = self.kept.values().map(copy).collect::<Result<_>>()?;
        Ok((files, self.state.iter().map(|(key, value)| (key.clone(), value.clone())).collect()))
    }

    /// Tries whether the kernel takes backing files of this process.
    ///
    /// # Errors
    /// Why it does not.
    pub fn probe(&self, fuse: &OwnedFd) -> Result<()> {
        use std::os::fd::AsFd;
        let file = self.images.create(0)?;
        let id = register(fuse.as_fd(), &file)?;
        close(fuse.as_fd(), id);
        Ok(())
    }

    /// Makes a file, and registers it if there is a connection to register it with.
    ///
    /// # Errors
    /// `Full` if its area has no room; what the kernel says to the registration.
    pub fn create(&mut self, area: Area, size: u64, fuse: Option<BorrowedFd<'_>>) -> Result<(KeptFile, OwnedFd)> {
        let maker = match area {
            Area::Image => &self.images,
            Area::Staging => &self.staging,
        };
        let file = maker.create(size)?;
        let ours = file.try_clone()?;
        let backing = fuse.map(|fuse| register(fuse, &file)).transpose()?;
        self.last_key += 1;
        let what = KeptFile { key: self.last_key, area, size, backing, tag: None };
        self.kept.insert(what.key, Kept { file: ours, what: what.clone() });
        Ok((what, file))
    }

    /// Makes a file of `size` zeros that is not kept.
    ///
    /// # Errors
    /// The errno of making it.
    pub fn memory(&self, size: u64) -> Result<OwnedFd> {
        self.memory.create(size)
    }

    /// A kept file again.
    ///
    /// # Errors
    /// `NotFound` if it was released.
    pub fn get(&self, key: u64) -> Result<(KeptFile, OwnedFd)> {
        let kept = self.kept.get(&key).ok_or_else(|| Error::not_found(format!("memory file {key}")))?;
        Ok((kept.what.clone(), kept.file.try_clone()?))
    }

    /// Notes what a file is.
    ///
    /// # Errors
    /// `NotFound` if it was released, `TooLarge` for a long note.
    pub fn tag(&mut self, key: u64, tag: String) -> Result<()> {
        if tag.len() > MAX_TAG {
            return Err(Error::new(Kind::TooLarge, format!("a note of {} bytes on a memory file", tag.len())));
        }
        let kept = self.kept.get_mut(&key).ok_or_else(|| Error::not_found(format!("memory file {key}")))?;
        kept.what.tag = Some(tag);
        Ok(())
    }

    /// Files with keys above `after`, as many as fit one message.
    pub fn list(&self, after: u64) -> Vec<KeptFile> {
        let above = self.kept.range((Bound::Excluded(after), Bound::Unbounded)).map(|(_, kept)| &kept.what);
        fitting(above, |what| FILE_BYTES + what.tag.as_ref().map_or(0, String::len)).cloned().collect()
    }

    /// Whether anybody has a file open or mapped but through the descriptor that is kept, and copies of that. The kernel
    /// grants a write lease to nobody else's file (`F_SETLEASE`, fcntl(2)); whoever opens it in the moment until the lease is
    /// given back waits for that.
    ///
    /// # Errors
    /// `NotFound` if it was released; the errno if the kernel cannot tell.
    pub fn is_used(&self, key: u64) -> Result<bool> {
        let kept = self.kept.get(&key).ok_or_else(|| Error::not_found(format!("memory file {key}")))?;
        let lease = |kind: libc::c_int| {
            // SAFETY: a plain system call on a descriptor that is kept.
            nix::errno::Errno::result(unsafe { libc::fcntl(kept.file.as_raw_fd(), libc::F_SETLEASE, kind) })
        };
        match lease(libc::F_WRLCK) {
            Ok(_) => {
                lease(libc::F_UNLCK)?;
                Ok(false)
            }
            Err(nix::errno::Errno::EAGAIN) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Drops a file. Open descriptors and mappings of it go on.
    pub fn release(&mut self, key: u64, fuse: BorrowedFd<'_>) {
        if let Some(kept) = self.kept.remove(&key)
            && let Some(id) = kept.what.backing
        {
            close(fuse, id);
        }
    }

    /// Keeps a text, or drops it.
    ///
    /// # Errors
    /// `Full` if there are too many, `TooLarge` for a long one.
    pub fn put_state(&mut self, key: String, value: Option<String>) -> Result<()> {
        let length = key.len() + value.as_ref().map_or(0, String::len);
        if length > MAX_STATE {
            return Err(Error::new(Kind::TooLarge, format!("a text of {length} bytes to keep")));
        }
        let old = self.state.get(&key).map_or(0, |old| key.len() + old.len());
        let new = value.as_ref().map_or(0, |value| key.len() + value.len());
        let total = self.state_bytes - old + new;
        if total > STATE_LIMIT {
            return Err(Error::new(Kind::Full, "the keeper holds no more state"));
        }
        self.state_bytes = total;
        match value {
            Some(value) => self.state.insert(key, value),
            None => self.state.remove(&key),
        };
        Ok(())
    }

    /// Texts whose names come after `after`, as many as fit one message.
    pub fn states(&self, after: &str) -> Vec<(String, String)> {
        let above = self.state.range::<str, _>((Bound::Excluded(after), Bound::Unbounded));
        fitting(above, |(key, value)| key.len() + value.len())
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }

    /// The connection is a new one: what servers wrote down of open files is about another.
    pub fn count_connection(&mut self) {
        let former = self.state.get(CONNECTION).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        if let Err(error) = self.put_state(CONNECTION.to_owned(), Some((former + 1).to_string())) {
            tracing::warn!("servers will not know that the connection is a new one: {error}");
        }
    }

    /// Registers all files with a new connection.
    pub fn register_again(&mut self, fuse: &OwnedFd) {
        use std::os::fd::AsFd;
        for kept in self.kept.values_mut().filter(|kept| kept.what.backing.is_some()) {
            kept.what.backing = register(fuse.as_fd(), &kept.file)
                .inspect_err(|error| tracing::warn!("memory file {} is not registered: {error}", kept.what.key))
                .ok();
        }
    }

    /// Counts, and the memory that the files take: those that are written grow.
    pub fn report(&self) -> Value {
        let area = |area: Area, limit: u64| {
            let files = self.kept.values().filter(|kept| kept.what.area == area);
            json!({"count": files.clone().count(), "bytes": files.map(memory_of).sum::<u64>(), "limit": limit})
        };
        json!({
            "images": area(Area::Image, self.images.limit()),
            "staging": area(Area::Staging, self.staging.limit()),
        })
    }
}

/// Bytes of memory that a file takes.
fn memory_of(kept: &Kept) -> u64 {
    // In blocks of 512 bytes, see stat(2).
    nix::sys::stat::fstat(&kept.file).map_or(0, |stat| u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
}

/// The first items, at least one, that together fit one message.
fn fitting<T>(items: impl Iterator<Item = T>, size: impl Fn(&T) -> usize) -> impl Iterator<Item = T> {
    let mut used = 0;
    items
        .enumerate()
        .take_while(move |(index, item)| {
            used += size(item);
            *index == 0 || used <= BYTES_PER_MESSAGE
        })
        .map(|(_, item)| item)
}

fn register(fuse: BorrowedFd<'_>, file: &OwnedFd) -> Result<u32> {
    fuser::BackingId::create_raw(fuse, file).map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM) => {
            Error::new(Kind::NotPermitted, "needs CAP_SYS_ADMIN in the initial user namespace: run as root on the host")
        }
        _ => Error::from(error),
    })
}

fn close(fuse: BorrowedFd<'_>, id: u32) {
    // SAFETY: the ioctl reads one u32, which lives until after the call.
    if let Err(errno) = unsafe { ioctl::backing_close(fuse.as_raw_fd(), &raw const id) } {
        tracing::debug!("backing file {id}: {}", errno.desc());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::fd::AsFd;

    use super::*;

    fn files() -> Files {
        Files {
            images: Maker::new(Area::Image, 1 << 20),
            staging: Maker::new(Area::Staging, 1 << 20),
            memory: Maker::unlimited(),
            kept: BTreeMap::new(),
            last_key: 0,
            state: BTreeMap::new(),
            state_bytes: 0,
        }
    }

    #[test]
    fn files_are_listed_in_pages_until_released() {
        let mut files = files();
        for size in 0..5 {
            files.create(Area::Image, size, None).unwrap();
        }
        files.tag(1, "x".repeat(MAX_TAG)).unwrap();
        files.tag(3, "x".repeat(BYTES_PER_MESSAGE - 2 * FILE_BYTES)).unwrap();
        let keys = |after| files.list(after).iter().map(|f| f.key).collect::<Vec<_>>();
        assert_eq!((keys(0), keys(1), keys(3)), (vec![1], vec![2, 3], vec![4, 5]));
        assert!(files.list(u64::MAX).is_empty());
        let copies = files.copies().unwrap().0;
        assert_eq!(copies.iter().map(|(what, _)| what.key).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        files.tag(3, "view 7".into()).unwrap();
        assert_eq!(files.get(3).unwrap().0.tag.as_deref(), Some("view 7"));
        assert_eq!(files.tag(9, "x".into()).unwrap_err().kind(), Kind::NotFound);
        assert_eq!(files.tag(3, "x".repeat(MAX_TAG + 1)).unwrap_err().kind(), Kind::TooLarge);
        let null = std::fs::File::open("/dev/null").unwrap();
        files.release(2, null.as_fd());
        files.release(2, null.as_fd());
        assert_eq!(files.get(2).unwrap_err().kind(), Kind::NotFound);
        assert_eq!(files.get(3).unwrap().0.size, 2);
        assert_eq!(files.report()["images"]["count"], 4);
        let (_, file) = files.create(Area::Staging, 0, None).unwrap();
        let before = files.report()["staging"].clone();
        std::os::unix::fs::FileExt::write_all_at(&std::fs::File::from(file), &[1; 5000], 0).unwrap();
        assert_eq!((before["count"].as_u64(), before["bytes"].as_u64()), (Some(1), Some(0)));
        assert!(files.report()["staging"]["bytes"].as_u64().unwrap() >= 5000);
        let (again, _) = files.create(Area::Staging, 0, None).unwrap();
        assert_eq!(again.key, 7, "keys are not used twice");
    }

    #[test]
    fn state_is_kept_replaced_and_limited() {
        let mut files = files();
        files.put_state("a".into(), Some("1".into())).unwrap();
        files.put_state("a".into(), Some("22".into())).unwrap();
        assert_eq!(files.states(""), [("a".into(), "22".into())]);
        assert!(files.states("a").is_empty());
        assert_eq!(files.state_bytes, 3);
        assert_eq!(files.put_state("b".into(), Some("x".repeat(MAX_STATE))).unwrap_err().kind(), Kind::TooLarge);
        for i in 0.. {
            let (key, value) = (format!("b{i:05}"), "x".repeat(MAX_STATE - 6));
            let Err(error) = files.put_state(key, Some(value)) else { continue };
            assert_eq!((i, error.kind()), (STATE_LIMIT / MAX_STATE - 1, Kind::Full));
            break;
        }
        assert_eq!(files.states("b00001").len(), 1, "one that is as long as a message");
        files.put_state("a".into(), None).unwrap();
        assert_eq!(files.states("").first().map(|(key, _)| key.as_str()), Some("b00000"));
    }

    #[test]
    fn each_connection_has_a_number() {
        let mut files = files();
        for number in ["1", "2"] {
            files.count_connection();
            assert_eq!(files.states(""), [(CONNECTION.to_owned(), number.to_owned())]);
        }
    }
}
