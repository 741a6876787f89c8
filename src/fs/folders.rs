//! Directories that were made or changed through this mount.
//!
//! Vineyard knows names only: a directory exists there as long as a name lies under it. What `mkdir`, `chmod` and `chown`
//! say lives as long as the mount, and the host keeps it for the server after this one.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::host::Host;
use super::name::{is_inside, moved};
use super::{Attr, Caller, SetAttr};
use crate::dataset::attributes::{from_nanos, to_nanos};
use crate::error::Result;
use crate::sync::{Mutex, MutexGuard};

/// What the host's texts of directories begin with.
const NOTE: &str = "directory:";
/// What the host's texts of inode numbers of renamed directories begin with.
const NUMBER: &str = "number:";

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
    host: Arc<dyn Host>,
}

impl Folders {
    pub(super) fn new(host: Arc<dyn Host>) -> Self {
        Folders { table: Mutex::default(), host }
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
            }
        }
        Ok(numbers)
    }

    /// Keeps the inode number of a renamed directory for the next server, or forgets that the name has one of its own.
    pub(super) fn keep_number(&self, name: &str, number: Option<u64>) {
        self.host.note(&format!("{NUMBER}{name}"), number.map(|number| number.to_string()).as_deref());
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

    /// What will be known of directories, by old and by new name, once those of `trees` and all below them have their new
    /// names (old and new name of each). The new ones exist until `rmdir`.
    pub(super) fn plan_moves(&self, trees: &[(&str, &str)]) -> Vec<(String, Option<Folder>)> {
        let table = self.table();
        let mut planned = BTreeMap::new();
        for name in trees.iter().flat_map(|(from, to)| [from, to]) {
            let there = table.keys().filter(|known| is_inside(known, name));
            planned.extend(there.map(|known| (known.clone(), None)));
        }
        for (from, to) in trees {
            for (name, folder) in table.iter().filter(|(name, _)| is_inside(name, from)) {
                planned.insert(moved(name, from, to), Some(folder.clone()));
            }
            planned.entry((*to).to_owned()).or_default().get_or_insert_default().made = true;
        }
        planned.into_iter().collect()
    }

    /// Sets what is known of directories, here and for the next server.
    pub(super) fn set(&self, folders: &[(String, Option<Folder>)]) {
        let mut table = self.table();
        for (name, folder) in folders {
            match folder {
                Some(folder) => drop(table.insert(name.clone(), folder.clone())),
                None => drop(table.remove(name)),
            }
        }
        drop(table);
        folders.iter().for_each(|(name, folder)| self.keep(name, folder.as_ref()));
    }

    /// Full names of all directories that were made here and lie below a name with its slash.
    pub(super) fn below(&self, prefix: &str) -> Vec<String> {
        let table = self.table();
        let after = table.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        let inside = after.take_while(|(known, _)| known.starts_with(prefix));
        inside.filter(|(_, folder)| folder.made).map(|(name, _)| name.clone()).collect()
    }
}
