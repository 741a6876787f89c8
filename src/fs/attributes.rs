//! Attributes and extended attributes.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::inode::{Inode, Node, ViewNode};
use super::{Attr, Caller, FileKind, FileSystem, SetAttr};
use crate::dataset::attributes::{FileAttributes, XATTRS_MAX, from_nanos, to_nanos};
use crate::error::{Error, Kind, Result};

/// The kernel may keep attributes of what never changes for so long.
const FOREVER: Duration = Duration::from_secs(3600);
/// Namespace of the attributes that this filesystem computes.
const OWN: &str = "user.vineyard.";

impl FileSystem {
    /// Attributes of an inode, and how long they hold.
    pub(super) fn attributes(&self, inode: &Arc<Inode>) -> Result<(Attr, Duration)> {
        match &inode.node {
            Node::Directory { name } => {
                let mut attr = self.attr(inode.ino, FileKind::Directory, 4096, self.started, None);
                if let Some(folder) = self.folders.get(name) {
                    folder.describe(&mut attr);
                }
                Ok((attr, self.options.entry_ttl))
            }
            Node::Staged(staged) => Ok((staged.attr(&self.options)?, Duration::ZERO)),
            Node::View(view) => {
                let size = self.view_size(inode, view)?;
                let stored = view.summary.attributes.as_deref();
                let mtime = stored.and_then(|a| a.mtime).map_or(view.summary.created, from_nanos);
                Ok((self.attr(inode.ino, FileKind::File, size, mtime, stored), FOREVER))
            }
        }
    }

    fn attr(&self, ino: u64, kind: FileKind, size: u64, mtime: SystemTime, stored: Option<&FileAttributes>) -> Attr {
        let default_perm = if kind == FileKind::Directory { self.options.dir_mode } else { self.options.file_mode };
        Attr {
            ino,
            kind,
            size,
            perm: stored.and_then(|a| a.mode).unwrap_or(default_perm),
            nlink: if kind == FileKind::Directory { 2 } else { 1 },
            uid: stored.and_then(|a| a.uid).unwrap_or(self.options.uid),
            gid: stored.and_then(|a| a.gid).unwrap_or(self.options.gid),
            atime: stored.and_then(|a| a.atime).map_or(mtime, from_nanos),
            mtime,
            ctime: stored.and_then(|a| a.ctime).map_or(mtime, from_nanos),
        }
    }

    /// Size of a view: from its summary, or from the image where that had to be made to know it. 0 if the object
    /// cannot be shown; its open says why.
    ///
    /// # Errors
    /// Why the image can't be made now: a size that is not known must not be taken for one, as the kernel keeps it.
    fn view_size(&self, inode: &Inode, view: &ViewNode) -> Result<u64> {
        if let Some(Some(size)) = view.summary.view(view.view) {
            return Ok(size);
        }
        if let Some(mode) = &inode.state().mode {
            return Ok(mode.size());
        }
        let known = self.objects.known_summary(view.object);
        if let Some(Some(size)) = known.and_then(|summary| summary.view(view.view)) {
            return Ok(size);
        }
        match self.objects.size(&*self.store, view.object, view.view) {
            Err(error) if matches!(error.kind(), Kind::Malformed | Kind::Unsupported) => {
                tracing::warn!(name = ?view.name, object = %view.object, "size is not known: {error}");
                Ok(0)
            }
            sized => sized,
        }
    }

    /// Attributes of an inode.
    ///
    /// # Errors
    /// `Stale` if the inode is not known.
    pub fn getattr(&self, ino: u64, _fh: Option<u64>) -> Result<(Attr, Duration)> {
        let inode = self.inode(ino)?;
        let (mut attr, ttl) = self.attributes(&inode)?;
        if let Node::Staged(staged) = &inode.node {
            // Who opens a file to change it compares its number with that of the path (vim does): it is the same file,
            // also where the bytes are in one of its own.
            attr.ino = staged.state().shown.unwrap_or(attr.ino);
        }
        Ok((attr, ttl))
    }

    /// Changes attributes. They are kept with the dataset; those of directories as long as the mount.
    ///
    /// # Errors
    /// `ReadOnly`; `IsDirectory` for the size of one; what the store answers.
    pub fn setattr(&self, ino: u64, fh: Option<u64>, change: SetAttr, caller: Caller) -> Result<(Attr, Duration)> {
        self.writable()?;
        let second = self.retries.is_second(libc::O_WRONLY, caller);
        let changed = self.change_attributes(ino, change, fh.is_none(), caller);
        if change.size.is_some() && fh.is_none() {
            self.note_try(ino, libc::O_WRONLY, caller, second, &changed);
        }
        changed?;
        self.getattr(ino, fh)
    }

    fn change_attributes(&self, ino: u64, change: SetAttr, by_path: bool, caller: Caller) -> Result<()> {
        let (_turn, inode) = self.enter_directory_of(ino)?;
        match &inode.node {
            Node::Directory { name } if change.size.is_none() => self.folders.change(name, change),
            Node::Directory { .. } => return Err(Error::new(Kind::IsDirectory, "is a directory")),
            Node::Staged(staged) => self.setattr_staged(staged, change, by_path, caller)?,
            Node::View(view) if change.size.is_some() => self.truncate_view(view, &inode, change, caller)?,
            Node::View(view) => {
                let mut attributes = view.summary.attributes.as_deref().cloned().unwrap_or_default();
                apply(&mut attributes, change);
                self.store_attributes(&inode, view, attributes)?;
            }
        }
        Ok(())
    }

    /// Value of an extended attribute.
    ///
    /// # Errors
    /// `NoAttribute`; `Unsupported` outside `user.`.
    pub fn getxattr(&self, ino: u64, name: &OsStr) -> Result<Vec<u8>> {
        let absent = || Error::new(Kind::NoAttribute, "no such attribute");
        let name = name.to_str().ok_or_else(absent)?;
        if !name.starts_with("user.") {
            return Err(Error::new(Kind::Unsupported, "only user.* attributes are kept"));
        }
        let inode = self.inode(ino)?;
        if let Some(key) = name.strip_prefix(OWN) {
            let own = self.own_attributes(&inode);
            return own.into_iter().find(|(k, _)| *k == key).map(|(_, v)| v.into_bytes()).ok_or_else(absent);
        }
        self.stored_attributes(&inode).and_then(|a| a.xattrs.get(name).cloned()).ok_or_else(absent)
    }

    /// Names of the extended attributes that are kept with the dataset, each with a terminating NUL. Computed ones are
    /// not listed: programs that copy attributes (`rsync -X`, `cp -a`) would try to set and remove them.
    pub fn listxattr(&self, ino: u64) -> Result<Vec<u8>> {
        let inode = self.inode(ino)?;
        let mut out = Vec::new();
        for name in self.stored_attributes(&inode).iter().flat_map(|a| a.xattrs.keys()) {
            out.extend_from_slice(name.as_bytes());
            out.push(0);
        }
        Ok(out)
    }

    /// Sets a `user.*` attribute; it is kept with the dataset.
    ///
    /// # Errors
    /// `Unsupported` outside `user.`, `NotPermitted` for the attributes that the filesystem computes, `Full` past
    /// 64 KiB for one file, `Exists`/`NoAttribute` as the flags demand.
    pub fn setxattr(&self, ino: u64, name: &OsStr, value: &[u8], flags: i32, caller: Caller) -> Result<()> {
        self.writable()?;
        let name = own_name(name)?;
        self.change_xattrs(ino, |attributes| {
            let there = attributes.xattrs.get(name);
            let present = there.is_some();
            let done = caller.resent && there.is_some_and(|there| there == value);
            if flags & libc::XATTR_CREATE != 0 && present && !done {
                return Err(Error::new(Kind::Exists, "the attribute exists"));
            }
            if flags & libc::XATTR_REPLACE != 0 && !present {
                return Err(Error::new(Kind::NoAttribute, "no such attribute"));
            }
            attributes.xattrs.insert(name.to_owned(), value.to_vec());
            if attributes.xattrs_size() > XATTRS_MAX {
                return Err(Error::new(Kind::Full, format!("more than {XATTRS_MAX} bytes of extended attributes")));
            }
            Ok(())
        })
    }

    /// Removes a `user.*` attribute.
    ///
    /// # Errors
    /// As [`FileSystem::setxattr`].
    pub fn removexattr(&self, ino: u64, name: &OsStr, caller: Caller) -> Result<()> {
        self.writable()?;
        let name = own_name(name)?;
        self.change_xattrs(ino, |attributes| match attributes.xattrs.remove(name) {
            Some(_) => Ok(()),
            None if caller.resent => Ok(()),
            None => Err(Error::new(Kind::NoAttribute, "no such attribute")),
        })
    }

    fn change_xattrs(&self, ino: u64, change: impl FnOnce(&mut FileAttributes) -> Result<()>) -> Result<()> {
        let (_turn, inode) = self.enter_directory_of(ino)?;
        let mut attributes = self.stored_attributes(&inode).unwrap_or_default();
        change(&mut attributes)?;
        attributes.ctime = Some(to_nanos(SystemTime::now()));
        match &inode.node {
            Node::Directory { .. } => Err(Error::new(Kind::Unsupported, "directories keep no attributes")),
            Node::Staged(staged) => self.set_staged_attributes(staged, attributes),
            Node::View(view) => self.store_attributes(&inode, view, attributes),
        }
    }

    fn stored_attributes(&self, inode: &Inode) -> Option<FileAttributes> {
        match &inode.node {
            Node::Directory { .. } => None,
            Node::Staged(staged) => Some(staged.attributes()),
            Node::View(view) => view.summary.attributes.as_deref().cloned(),
        }
    }

    /// The attributes that follow from the object.
    fn own_attributes(&self, inode: &Inode) -> Vec<(&'static str, String)> {
        let (name, object) = match &inode.node {
            Node::Directory { .. } => return Vec::new(),
            Node::View(view) => (view.name.clone(), view.object),
            Node::Staged(staged) => match staged.published() {
                Some((name, object)) => (name, object),
                None => return Vec::new(),
            },
        };
        let Ok(Some(summary)) = self.objects.summary(&*self.store, object) else { return Vec::new() };
        let mut out = vec![
            ("id", object.to_string()),
            ("name", name),
            ("type", summary.typename.to_string()),
            ("instance", summary.instance_text()),
        ];
        out.extend(summary.rows.map(|rows| ("rows", rows.to_string())));
        out.extend(summary.signature.map(|signature| ("signature", format!("s{signature:016x}"))));
        out
    }
}

fn own_name(name: &OsStr) -> Result<&str> {
    match name.to_str() {
        Some(name) if name.starts_with(OWN) => Err(Error::new(Kind::NotPermitted, "user.vineyard.* is computed")),
        Some(name) if name.starts_with("user.") => Ok(name),
        _ => Err(Error::new(Kind::Unsupported, "only user.* attributes are kept")),
    }
}

/// Puts a change into stored attributes.
pub(super) fn apply(attributes: &mut FileAttributes, change: SetAttr) {
    attributes.mode = change.mode.map(|mode| (mode & 0o7777) as u16).or(attributes.mode);
    attributes.uid = change.uid.or(attributes.uid);
    attributes.gid = change.gid.or(attributes.gid);
    attributes.mtime = change.mtime.map(to_nanos).or(attributes.mtime);
    attributes.atime = change.atime.map(to_nanos).or(attributes.atime);
    attributes.ctime = Some(to_nanos(SystemTime::now()));
}
