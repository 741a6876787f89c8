//! Directories that were made or changed through this mount.
//!
//! Vineyard knows names only: a directory exists there as long as a name lies under it. What `mkdir`, `chmod` and `chown`
//! say lives as long as the mount, and the host keeps it for the server after this one.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::host::Host;
use super::{Attr, Caller, SetAttr};
use crate::dataset::attributes::{from_nanos, to_nanos};
use crate::error::Result;
use crate::sync::{Mutex, MutexGuard};

/// What the host's texts of directories begin with.
const NOTE: &str = "directory:";
/// What the host's texts of inode numbers of renamed directories begin with.
const NUMBER: &str = "number:";
/// What the host's texts of renames under way begin with.
const RENAMING: &str = "renaming:";

/// What is known of a directory beside its name.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Folder {
    /// It stays without a name under it, until `rmdir`.
    made: bool,
    mode: Option<u16>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<i64>,
    atime: Option<i64>,
    ctime: Option<i64>,
}

impl Folder {
    /// Puts what is known in the place of the defaults.
    pub(super) fn describe(&self, attr: &mut Attr) {
        attr.perm = self.mode.unwrap_or(attr.perm);
        attr.uid = self.uid.unwrap_or(attr.uid);
        attr.gid = self.gid.unwrap_or(attr.gid);
        attr.mtime = self.mtime.map_or(attr.mtime, from_nanos);
        attr.atime = self.atime.or(self.mtime).map_or(attr.atime, from_nanos);
        attr.ctime = self.ctime.map_or(attr.mtime, from_nanos);
    }
}

/// All such directories, by full name.
pub(super) struct Folders {
    table: Mutex<BTreeMap<String, Folder>>,
    /// Renames that a former server did not end, by the old name.
    unfinished: Mutex<HashMap<String, (u64, String)>>,
    host: Arc<dyn Host>,
}

impl Folders {
    pub(super) fn new(host: Arc<dyn Host>) -> Self {
        Folders { table: Mutex::default(), unfinished: Mutex::default(), host }
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<String, Folder>> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes over what a former server kept. Returns the numbers of renamed directories, by name.
    ///
    /// # Errors
    /// If the host does not answer.
    pub(super) fn adopt(&self) -> Result<Vec<(String, u64)>> {
        let mut numbers = Vec::new();
        for (key, text) in self.host.notes()? {
            if let Some(name) = key.strip_prefix(NOTE) {
                match serde_json::from_str(&text) {
                    Ok(folder) => drop(self.table().insert(name.to_owned(), folder)),
                    Err(error) => tracing::warn!("a directory with an unknown note is forgotten: {error}"),
                }
            } else if let Some(name) = key.strip_prefix(NUMBER) {
                numbers.extend(text.parse().ok().map(|number| (name.to_owned(), number)));
            } else if let Some(from) = key.strip_prefix(RENAMING)
                && let Some((number, to)) = text.split_once(' ')
                && let Ok(number) = number.parse()
            {
                self.unfinished().insert(from.to_owned(), (number, to.to_owned()));
            }
        }
        Ok(numbers)
    }

    /// Keeps the inode number of a renamed directory for the next server.
    pub(super) fn keep_number(&self, name: &str, number: u64) {
        self.host.note(&format!("{NUMBER}{name}"), Some(&number.to_string()));
    }

    /// Notes that a directory, with this inode number, is about to get another name.
    pub(super) fn begin_rename(&self, from: &str, number: u64, to: &str) {
        self.host.note(&format!("{RENAMING}{from}"), Some(&format!("{number} {to}")));
    }

    /// Notes that it has it.
    pub(super) fn end_rename(&self, from: &str) {
        self.host.note(&format!("{RENAMING}{from}"), None);
        self.unfinished().remove(from);
    }

    /// Inode number and new name of a directory that a former server was renaming when it ended.
    pub(super) fn unfinished_rename(&self, from: &str) -> Option<(u64, String)> {
        self.unfinished().get(from).cloned()
    }

    fn unfinished(&self) -> MutexGuard<'_, HashMap<String, (u64, String)>> {
        self.unfinished.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn keep(&self, name: &str, folder: Option<&Folder>) {
        let text = folder.and_then(|folder| serde_json::to_string(folder).ok());
        self.host.note(&format!("{NOTE}{name}"), text.as_deref());
    }

    /// What is known of a directory.
    pub(super) fn get(&self, name: &str) -> Option<Folder> {
        self.table().get(name).cloned()
    }

    /// Whether a directory, or one below it, was made here.
    pub(super) fn exists(&self, name: &str) -> bool {
        let table = self.table();
        if table.get(name).is_some_and(|folder| folder.made) {
            return true;
        }
        let below = format!("{name}/");
        let after = table.range::<str, _>((Bound::Included(below.as_str()), Bound::Unbounded));
        after.take_while(|(known, _)| known.starts_with(&below)).any(|(_, folder)| folder.made)
    }

    /// Makes a directory for a caller, with permission bits. One that passes its group on (set-group-ID) does.
    pub(super) fn make(&self, parent: &str, name: String, mode: u16, caller: Caller) {
        let now = Some(to_nanos(SystemTime::now()));
        let inherited = self.inherited_group(parent);
        let folder = Folder {
            made: true,
            mode: Some(mode | if inherited.is_some() { libc::S_ISGID as u16 } else { 0 }),
            uid: Some(caller.uid),
            gid: Some(inherited.unwrap_or(caller.gid)),
            mtime: now,
            atime: None,
            ctime: now,
        };
        self.keep(&name, Some(&folder));
        self.table().insert(name, folder);
    }

    /// The group that files made in a directory get, if the directory decides it.
    pub(super) fn inherited_group(&self, directory: &str) -> Option<u32> {
        let folder = self.get(directory)?;
        folder.gid.filter(|_| u32::from(folder.mode.unwrap_or(0)) & libc::S_ISGID != 0)
    }

    /// Lets a directory exist until `rmdir`, as it is.
    pub(super) fn stay(&self, name: &str) {
        let mut table = self.table();
        let folder = table.entry(name.to_owned()).or_default();
        if !folder.made {
            folder.made = true;
            let folder = folder.clone();
            drop(table);
            self.keep(name, Some(&folder));
        }
    }

    /// Changes attributes.
    pub(super) fn change(&self, name: &str, change: SetAttr) {
        let mut table = self.table();
        let folder = table.entry(name.to_owned()).or_default();
        folder.mode = change.mode.map(|mode| (mode & 0o7777) as u16).or(folder.mode);
        folder.uid = change.uid.or(folder.uid);
        folder.gid = change.gid.or(folder.gid);
        folder.mtime = change.mtime.map(to_nanos).or(folder.mtime);
        folder.atime = change.atime.map(to_nanos).or(folder.atime);
        folder.ctime = Some(to_nanos(SystemTime::now()));
        let folder = folder.clone();
        drop(table);
        self.keep(name, Some(&folder));
    }

    /// A name in a directory was made or removed just now. Not kept for the next server: a time is not worth it.
    pub(super) fn touch(&self, name: &str) {
        let now = Some(to_nanos(SystemTime::now()));
        let mut table = self.table();
        let folder = table.entry(name.to_owned()).or_default();
        (folder.mtime, folder.ctime) = (now, now);
    }

    /// Forgets a directory.
    pub(super) fn remove(&self, name: &str) {
        if self.table().remove(name).is_some() {
            self.keep(name, None);
        }
    }

    /// Gives a directory and those below it other names; several changes happen at once.
    pub(super) fn rename(&self, changes: &[(&str, &str)]) {
        let mut table = self.table();
        let mut moved = Vec::new();
        for (from, to) in changes {
            let inside =
                |name: &str| name.strip_prefix(from).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
            let names: Vec<String> = table.keys().filter(|name| inside(name)).cloned().collect();
            for name in names {
                let new = format!("{to}{}", name.get(from.len()..).unwrap_or_default());
                moved.extend(table.remove(&name).map(|folder| (name, new, folder)));
            }
        }
        for (_, new, folder) in &moved {
            table.insert(new.clone(), folder.clone());
        }
        let gone: Vec<&String> = moved.iter().map(|(old, ..)| old).filter(|old| !table.contains_key(*old)).collect();
        // In this order a server that is replaced in between leaves both, and the rename comes again.
        moved.iter().for_each(|(_, new, folder)| self.keep(new, Some(folder)));
        gone.iter().for_each(|old| self.keep(old, None));
    }

    /// Full names of all directories that were made here and lie below a name with its slash.
    pub(super) fn below(&self, prefix: &str) -> Vec<String> {
        let table = self.table();
        let after = table.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        let inside = after.take_while(|(known, _)| known.starts_with(prefix));
        inside.filter(|(_, folder)| folder.made).map(|(name, _)| name.clone()).collect()
    }
}
