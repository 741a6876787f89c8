//! The inode table.
//!
//! Inode numbers of directories and views are a function of what they show (path, object, view), so a server that
//! replaces another finds them again (`Inodes::number`) and the kernel's page cache of an inode never goes out of
//! date. Inodes of files that are being written get fresh numbers.

use std::collections::HashMap;
use std::sync::Arc;

use super::ROOT;
use super::cache::Assembled;
use super::name::{self, Identity};
use super::objects::{Loaded, Summary};
use super::staging::Staged;
use crate::image::{Image, View};
use crate::sync::{Mutex, MutexGuard};
use crate::vineyard::ObjectId;

/// Numbers that are computed have these bits; staged files have the next one set, so that they never meet.
const COMPUTED: u64 = (1 << 62) - 1;
/// The bit of staged files' inode numbers.
pub const STAGED: u64 = 1 << 62;

/// A view of an object at a path.
#[derive(Clone, Debug)]
pub struct ViewNode {
    /// Full name of the directory that the file is in.
    pub directory: String,
    /// File name.
    pub component: String,
    /// Name in vineyard.
    pub name: String,
    /// The object that the name pointed to; this inode shows it for ever.
    pub object: ObjectId,
    /// The format.
    pub view: View,
    /// What is known of the object.
    pub summary: Arc<Summary>,
}

/// What an inode is.
#[derive(Clone, Debug)]
pub enum Node {
    /// A directory: the names that begin with `name` and a slash.
    Directory {
        /// Full name in vineyard without a trailing slash; empty for the root of a mount without prefix.
        name: String,
    },
    /// A view of a published object.
    View(ViewNode),
    /// A file that was written through this mount.
    Staged(Arc<Staged>),
}

/// How the open handles of a view are served: the kernel allows one way at a time for an inode.
#[derive(Clone, Debug)]
pub enum Mode {
    /// Reads come as requests and are answered from the blobs.
    Lazy {
        /// The object, kept in use.
        loaded: Arc<Loaded>,
        /// The bytes.
        image: Arc<Image>,
    },
    /// Reads come as requests and are answered from a copy: small files.
    Copied(Arc<[u8]>),
    /// The kernel reads the assembled image by itself.
    Assembled(Arc<Assembled>),
}

impl Mode {
    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        match self {
            Mode::Lazy { image, .. } => image.size(),
            Mode::Copied(bytes) => bytes.len() as u64,
            Mode::Assembled(file) => file.size(),
        }
    }
}

/// The part of an inode that changes.
#[derive(Debug, Default)]
pub struct Use {
    /// Lookups that the kernel has not taken back.
    pub lookups: u64,
    /// Open handles.
    pub opens: u64,
    /// How they are served; kept until the last RELEASE.
    pub mode: Option<Mode>,
    /// A former server answered the reads of open handles, so this one does, too.
    pub by_requests: bool,
    /// Bytes that were read lazily, over all opens.
    pub bytes_read: u64,
    /// Bytes of remote data that were read one after the other, up to the last read.
    pub run: Option<std::ops::Range<u64>>,
}

/// An inode.
#[derive(Debug)]
pub struct Inode {
    /// Its number.
    pub ino: u64,
    /// What it is.
    pub node: Node,
    state: Mutex<Use>,
    /// Held while the first open chooses how the file is served. Whatever shows the inode next has it too.
    pub opening: Arc<Mutex<()>>,
}

impl Inode {
    fn new(ino: u64, node: Node) -> Self {
        Inode { ino, node, state: Mutex::default(), opening: Arc::default() }
    }

    /// The same inode, which shows something else; its counts and handles move there.
    fn showing(&self, node: Node) -> Self {
        let state = Mutex::new(std::mem::take(&mut *self.state()));
        Inode { ino: self.ino, node, state, opening: self.opening.clone() }
    }

    /// The changing part. It is not held while anything is waited for: whoever replaces or forgets an inode waits for it
    /// with the whole table.
    pub fn state(&self) -> MutexGuard<'_, Use> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// All inodes that the kernel knows.
pub struct Inodes {
    table: Mutex<HashMap<u64, Arc<Inode>, Identity>>,
    /// Numbers of directories that were renamed, and of those made anew under a name that one had before.
    directories: Mutex<HashMap<String, u64>>,
    next_number: std::sync::atomic::AtomicU64,
    /// Numbers of views that were renamed, or whose object was replaced by an equal one with other attributes, by what
    /// their numbers would be.
    kept: Mutex<HashMap<u64, u64, Identity>>,
}

impl Inodes {
    /// A table with the root, which is never forgotten. Numbers that are not computed begin above `start`, which is below
    /// 2^61: those of a former server are not given out again.
    pub fn new(root_name: String, start: u64) -> Self {
        let inodes = Inodes {
            table: Mutex::default(),
            directories: Mutex::default(),
            next_number: std::sync::atomic::AtomicU64::new((STAGED | STAGED >> 1) + start),
            kept: Mutex::default(),
        };
        let root = Inode::new(ROOT, Node::Directory { name: root_name });
        inodes.table().insert(ROOT, Arc::new(root));
        inodes
    }

    fn table(&self) -> MutexGuard<'_, HashMap<u64, Arc<Inode>, Identity>> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn directories(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.directories.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Number of a directory: of its name, unless it was renamed.
    pub fn directory(&self, name: &str) -> u64 {
        self.directories().get(name).copied().unwrap_or_else(|| Self::directory_number(name))
    }

    /// The numbers that directories will have when they have new names (new and old name of each): the kernel keeps their
    /// numbers when it renames. Whatever is made under an old name gets a number of its own.
    pub fn plan_directories(&self, moves: &[(String, String)]) -> Vec<(String, u64)> {
        let mut numbers: HashMap<String, u64> = HashMap::new();
        for (_, old) in moves {
            let number = self.next_number.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            numbers.insert(old.clone(), number);
        }
        numbers.extend(moves.iter().map(|(new, old)| (new.clone(), self.directory(old))));
        numbers.into_iter().collect()
    }

    /// Gives directories their numbers, and lets the inodes of those numbers show them.
    pub fn set_directories(&self, numbers: &[(String, u64)]) {
        // Before the table, as everywhere.
        let mut directories = self.directories();
        let mut table = self.table();
        for (name, number) in numbers {
            if let Some(inode) = table.get(number) {
                let inode = inode.showing(Node::Directory { name: name.clone() });
                table.insert(*number, Arc::new(inode));
            }
        }
        directories.extend(numbers.iter().cloned());
    }

    /// As [`Inodes::look_up`], for a directory: its number does not change, and is not forgotten, before its inode is there.
    pub fn look_up_directory(&self, name: &str) -> Arc<Inode> {
        let directories = self.directories();
        let number = directories.get(name).copied().unwrap_or_else(|| Self::directory_number(name));
        self.look_up(number, || Node::Directory { name: name.to_owned() })
    }

    /// Gives the name of a directory that is being removed another number, for the next directory of that name. The kernel
    /// takes the inode of a removed one for dead as long as somebody holds it, and whoever came to it by its number too.
    pub fn renumber_directory(&self, name: &str) -> u64 {
        let number = self.next_number.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.directories().insert(name.to_owned(), number);
        number
    }

    /// The views that the kernel knows in a directory and all below it, with their numbers.
    pub fn views_inside(&self, top: &str) -> Vec<(u64, ViewNode)> {
        let view_of = |inode: &Arc<Inode>| match &inode.node {
            Node::View(view) if name::is_inside(&view.directory, top) => Some((inode.ino, view.clone())),
            _ => None,
        };
        self.table().values().filter_map(view_of).collect()
    }

    /// Names of the directories that the kernel knows, of one and all below it.
    pub fn directories_inside(&self, top: &str) -> Vec<String> {
        let name_of = |inode: &Arc<Inode>| match &inode.node {
            Node::Directory { name } if name::is_inside(name, top) => Some(name.clone()),
            _ => None,
        };
        self.table().values().filter_map(name_of).collect()
    }

    /// The kernel has forgotten the directory of a name and a number. Forgets the numbers of names that have numbers of
    /// their own and need none: this name's, and that of the name which the number was made of, where `exists` denies that
    /// there is a directory, and the kernel knows none of the number that the name has by itself. Returns those names.
    pub fn release_directories(&self, forgotten: &str, number: u64, exists: impl Fn(&str) -> bool) -> Vec<String> {
        let own = Self::directory_number;
        let mut gone: Vec<String> = {
            let directories = self.directories();
            let concerned = |name: &&String| *name == forgotten || own(name) == number;
            directories.keys().filter(concerned).cloned().collect()
        };
        gone.retain(|name| !exists(name));
        // Whatever the kernel has heard of meanwhile keeps its number.
        let mut directories = self.directories();
        let table = self.table();
        let known = |number: &u64| table.contains_key(number);
        gone.retain(|name| !known(&own(name)) && !directories.get(name).is_some_and(known));
        let leaves = gone.iter().any(|name| name == forgotten);
        gone.retain(|name| {
            // Its number is another directory's as long as that one exists: a new one of that name must not get it.
            let taken = directories
                .iter()
                .any(|(other, number)| *number == own(name) && other != name && !(leaves && other == forgotten));
            !taken && directories.remove(name).is_some()
        });
        gone
    }

    /// Takes over the numbers of renamed directories from a former server.
    pub fn adopt_directories(&self, numbers: Vec<(String, u64)>) {
        let last = numbers.iter().map(|(_, number)| *number).max().unwrap_or(0);
        self.next_number.fetch_max(last + 1, std::sync::atomic::Ordering::Relaxed);
        self.directories().extend(numbers);
    }

    /// The name of the renamed directory that has a number.
    pub fn renamed_directory(&self, ino: u64) -> Option<String> {
        self.directories().iter().find(|(_, number)| **number == ino).map(|(name, _)| name.clone())
    }

    /// Number of a directory that was never renamed.
    fn directory_number(name: &str) -> u64 {
        (name::stable_hash(&[b"directory", name.as_bytes()]) & COMPUTED).max(ROOT + 1)
    }

    /// Number of a view: of the path (directory's name and file name), the object and the format.
    pub fn view_number(&self, path: &str, object: ObjectId, view: View) -> u64 {
        let number = Self::computed(path, object, view);
        let kept = self.kept.lock().unwrap_or_else(|e| e.into_inner());
        kept.get(&number).copied().unwrap_or(number)
    }

    /// The number of a view that was always at this path, and always this object.
    pub fn computed(path: &str, object: ObjectId, view: View) -> u64 {
        let hash = name::stable_hash(&[b"view", path.as_bytes(), &object.0.to_le_bytes(), &[view as u8]]);
        (hash & COMPUTED).max(ROOT + 1)
    }

    /// Lets a path, an object and a format stand for an inode that has another number.
    pub fn keep_number(&self, path: &str, object: ObjectId, view: View, ino: u64) {
        let number = Self::computed(path, object, view);
        let mut kept = self.kept.lock().unwrap_or_else(|e| e.into_inner());
        if number == ino {
            kept.remove(&number)
        } else {
            kept.insert(number, ino)
        };
    }

    /// Number of the inode that shows a node. An inode that was renamed took its number along: the same object under
    /// the old path again is another inode.
    pub fn number_of(&self, node: &ViewNode) -> u64 {
        let path = name::join(&node.directory, &node.component);
        let number = self.view_number(&path, node.object, node.view);
        let moved = |inode: &Inode| match &inode.node {
            Node::View(view) => {
                (&view.component, &view.directory, &view.name) != (&node.component, &node.directory, &node.name)
            }
            _ => false,
        };
        if !self.get(number).is_some_and(|inode| moved(&inode)) {
            return number;
        }
        let fresh = self.next_number.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.keep_number(&path, node.object, node.view, fresh);
        fresh
    }

    /// The inode of a number.
    pub fn get(&self, ino: u64) -> Option<Arc<Inode>> {
        self.table().get(&ino).cloned()
    }

    /// The inode of that number, made if it is not there, with one lookup more.
    pub fn look_up(&self, ino: u64, node: impl FnOnce() -> Node) -> Arc<Inode> {
        let inode = self.ensure(ino, node);
        inode.state().lookups += 1;
        inode
    }

    /// The inode of that number, made if it is not there.
    pub fn ensure(&self, ino: u64, node: impl FnOnce() -> Node) -> Arc<Inode> {
        let mut table = self.table();
        table.entry(ino).or_insert_with(|| Arc::new(Inode::new(ino, node()))).clone()
    }

    /// Replaces what an inode shows; counts and handles stay.
    pub fn replace(&self, ino: u64, node: Node) {
        let mut table = self.table();
        if let Some(old) = table.get(&ino) {
            let inode = Arc::new(old.showing(node));
            table.insert(ino, inode);
        }
    }

    /// Changes the changing part of an inode, or of the one that was put in its place since it was looked up.
    pub fn change<T>(&self, inode: &Arc<Inode>, change: impl FnOnce(&mut Use) -> T) -> T {
        let table = self.table();
        let inode = table.get(&inode.ino).unwrap_or(inode);
        change(&mut inode.state())
    }

    /// Takes lookups back and drops the inode with the last. An unknown number is a former server's: ignored.
    pub fn forget(&self, ino: u64, count: u64) {
        if ino == ROOT {
            return;
        }
        let mut table = self.table();
        let Some(inode) = table.get(&ino).cloned() else { return };
        let mut state = inode.state();
        state.lookups = state.lookups.saturating_sub(count);
        if state.lookups == 0 && state.opens == 0 {
            table.remove(&ino);
            drop(table);
            let mut kept = self.kept.lock().unwrap_or_else(|e| e.into_inner());
            if !kept.is_empty() {
                kept.retain(|_, number| *number != ino);
            }
        }
    }

    /// Number of inodes.
    pub fn len(&self) -> usize {
        self.table().len()
    }

    /// Never true: the root is always there.
    pub fn is_empty(&self) -> bool {
        false
    }
}
