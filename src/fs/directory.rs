//! Directories: listings.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsString;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use super::inode::Node;
use super::objects::Summary;
use super::resolve::{ATTEMPTS, Found, Target, suffix};
use super::staging::{Staged, StagedEntry};
use super::{DirEntry, FileKind, FileSystem, Handle, ROOT, name};
use crate::error::{Error, Kind, Result};
use crate::image::View;
use crate::vineyard::ObjectId;
use crate::vineyard::store::NamedObject;

/// Listings that are kept, so that one of an unchanged directory is not made again.
const LISTINGS_KEPT: usize = 64;
/// Objects that are looked at together for the entries that follow in a listing.
const AHEAD: usize = 128;

/// What an entry of a listing is.
#[derive(Clone, Debug)]
enum Item {
    Directory {
        name: String,
    },
    View {
        name: String,
        object: ObjectId,
        summary: Option<Arc<Summary>>,
    },
    /// A listing is kept for long: it must not keep the memory of a file that was removed.
    Staged(Weak<Staged>),
}

/// The names of a directory at one moment.
#[derive(Debug)]
pub(super) struct Listing {
    directory: String,
    /// In the order of their cookies.
    entries: Vec<(String, Item)>,
    /// Where a reader goes on after each: the same for a name in every listing, so that one who goes on in a later
    /// listing, because the server was replaced, gets each name that was there all the time.
    cookies: Vec<u64>,
    /// Fingerprint of the name map's part and of the staged files that it was made of.
    fingerprint: u64,
    /// Every object's type was known.
    complete: bool,
    /// Somebody looks at the files of an incomplete listing, and not at names alone.
    looked_at: AtomicBool,
    /// How many changes of names it knows of, as [`FileSystem::changes`] counts them.
    changes: AtomicU64,
}

/// Cookies of `.` and `..`.
const DOTS: u64 = 2;

fn cookie(component: &str) -> u64 {
    (name::stable_hash(&[component.as_bytes()]) >> 1).max(DOTS + 1)
}

impl Listing {
    fn new(directory: &str, mut entries: Vec<(String, Item)>, fingerprint: u64, complete: bool, changes: u64) -> Self {
        entries.sort_by_cached_key(|(component, _)| (cookie(component), component.clone()));
        let mut last = DOTS;
        let next = |(component, _): &(String, Item)| {
            last = cookie(component).max(last + 1);
            last
        };
        let cookies = entries.iter().map(next).collect();
        let (directory, looked_at) = (directory.to_owned(), AtomicBool::new(false));
        Listing { directory, entries, cookies, fingerprint, complete, looked_at, changes: changes.into() }
    }
}

/// Names below a directory, and what is known of what they lead to.
struct Below {
    names: Vec<NamedObject>,
    summaries: HashMap<ObjectId, Arc<Summary>>,
    /// Objects that do not exist.
    missing: HashSet<ObjectId>,
}

impl FileSystem {
    /// Opens a directory.
    ///
    /// # Errors
    /// `NotDirectory`; what the store answers.
    pub fn opendir(&self, ino: u64) -> Result<u64> {
        self.follow_store()?;
        let listing = self.list_inode(ino)?;
        Ok(self.add_handle(Handle::Directory(listing)))
    }

    /// The listing of a directory, whatever that is called: not of the names that are left while it moves.
    fn list_inode(&self, ino: u64) -> Result<Arc<Listing>> {
        self.ask_of_directory(ino, |directory| self.list(directory), |_| true)
    }

    /// The listing of a directory.
    fn list(&self, directory: &str) -> Result<Arc<Listing>> {
        let changes = self.changes();
        let prefix = if directory.is_empty() { String::new() } else { format!("{directory}/") };
        let before = self.staging.entries_in(directory).into_iter();
        let before = before.map(|entry| (entry.file.settled_version(), entry)).collect();
        let names = self.names_below(&prefix)?;
        let staged = self.staged_among(&names, before, directory);
        let local = self.local_directories(&names, &prefix)?;
        let fingerprint = fingerprint(&names, &staged, &local);
        let former = self.listings.lock().unwrap_or_else(|e| e.into_inner()).get(directory).cloned();
        if let Some(former) = former.filter(|l| l.fingerprint == fingerprint && l.complete) {
            former.changes.store(changes, Ordering::Relaxed);
            return Ok(former);
        }

        let Below { names, summaries, missing } = self.summarize_below(names, &prefix)?;
        let fingerprint = self::fingerprint(&names, &staged, &local);
        let mut directories: BTreeSet<String> = local.into_iter().collect();
        let mut files = Vec::new();
        for (name, object) in names {
            match name::part_end(&name, &prefix) {
                Some(end) => {
                    // Names come sorted, so most repeat the last directory.
                    let below = &name[..end];
                    if !directories.contains(below) {
                        directories.insert(below.to_owned());
                    }
                }
                None => files.push((name, object)),
            }
        }
        let mut taken: HashSet<String> = HashSet::with_capacity(files.len() + directories.len());
        let mut entries = Vec::with_capacity(files.len() + directories.len());
        let mut complete = true;
        for name in directories {
            let part = &name[prefix.len()..];
            let component = name::encode_folder(part, &name);
            taken.insert(component.clone());
            entries.push((component, Item::Directory { name }));
        }
        // Datasets that files which are being written stand for.
        let mut shown: HashSet<String> = HashSet::with_capacity(2 * staged.len());
        for StagedEntry { component, datasets, file } in staged {
            shown.extend(datasets);
            if taken.insert(component.clone()) {
                entries.push((component, Item::Staged(Arc::downgrade(&file))));
            }
        }
        // Plain files first: a view gives way to the plain file of the same path.
        let mut views = Vec::new();
        // A name that reads like the shortened file name of another one is not listed as it is: that leads to the other.
        let hash_of = |name: &str| name::stable_hash(&[name.as_bytes()]);
        let reads_shortened = files.iter().any(|(name, _)| name::split_hash(name).is_some());
        let hashes: HashSet<u64> = files.iter().filter(|_| reads_shortened).map(|(name, _)| hash_of(name)).collect();
        for (name, object) in files {
            let summary = summaries.get(&object).cloned();
            complete &= summary.is_some();
            if summary.is_none() && missing.contains(&object) {
                // A name that outlived its object: nothing to open.
                continue;
            }
            let part = &name[prefix.len()..];
            let mut component = Self::listed_component(part, &name, summary.as_deref());
            let is_plain = component == part;
            let hash = name::split_hash(&component).map(|(hash, _)| hash);
            if hash.is_some_and(|hash| hashes.contains(&hash) && hash != hash_of(&name)) {
                let listed = summary.as_ref().map_or(View::Raw, |summary| summary.listed);
                component = name::hashed_part(part, &suffix(listed), &name);
            }
            let item = Item::View { name, object, summary };
            if is_plain && taken.insert(component.clone()) {
                entries.push((component, item));
            } else {
                views.push((component, item));
            }
        }
        for (component, item) in views {
            if taken.insert(component.clone()) {
                entries.push((component, item));
                continue;
            }
            let Item::View { name, summary, .. } = &item else { continue };
            if shown.contains(name) {
                continue;
            }
            // Nothing is hidden: under another of its views, or under a name made unique.
            let part = &name[prefix.len()..];
            let other = summary
                .iter()
                .flat_map(|s| s.sizes.iter())
                .map(|(view, _)| name::encode_file(part, &suffix(*view), name))
                .find(|component| !taken.contains(component));
            let component = other.unwrap_or_else(|| {
                let listed = summary.as_ref().map_or(View::Raw, |s| s.listed);
                name::hashed_part(part, &suffix(listed), name)
            });
            taken.insert(component.clone());
            entries.push((component, item));
        }
        let listing = Arc::new(Listing::new(directory, entries, fingerprint, complete, changes));
        let mut listings = self.listings.lock().unwrap_or_else(|e| e.into_inner());
        if listings.len() >= LISTINGS_KEPT && !listings.contains_key(directory) {
            listings.clear();
        }
        listings.insert(directory.to_owned(), listing.clone());
        Ok(listing)
    }

    /// The staged files that a listing shows, of those that were in the directory before its names were asked for, and those
    /// that are there now: what was there all the time is in it, whatever became of it meanwhile.
    fn staged_among(
        &self,
        names: &[NamedObject],
        before: Vec<(Option<NamedObject>, StagedEntry)>,
        directory: &str,
    ) -> Vec<StagedEntry> {
        // What was written here and replaced or removed elsewhere is not shown for what is there now.
        let stays = |(version, entry): &(Option<NamedObject>, StagedEntry)| {
            !self.leave_if_not_among(names, &entry.file, version.as_ref())
        };
        let before: Vec<_> = before.into_iter().filter(stays).map(|(_, entry)| entry).collect();
        let mut staged = self.staging.entries_in(directory);
        let there: HashSet<String> = staged.iter().map(|entry| entry.component.clone()).collect();
        // Published since, after its name was asked for.
        let is_missing = |entry: &StagedEntry| {
            let state = entry.file.state();
            let is_known = |(name, _): &NamedObject| names.binary_search_by(|(known, _)| known.cmp(name)).is_ok();
            let is_new = state.retired && state.published.as_ref().is_some_and(|version| !is_known(version));
            is_new && !state.detached && state.target.directory == directory && !there.contains(&entry.component)
        };
        staged.extend(before.into_iter().filter(is_missing));
        staged
    }

    /// Makes summaries of what names directly below a prefix lead to. Where an object does not exist, or parts of it are
    /// gone, because its name was given another meanwhile, it is that which counts.
    fn summarize_below(&self, mut names: Vec<NamedObject>, prefix: &str) -> Result<Below> {
        let (mut summaries, mut missing) = (HashMap::new(), HashSet::new());
        for _ in 0..ATTEMPTS {
            let files = names.iter().filter(|(name, _)| name::part_end(name, prefix).is_none());
            let ids: Vec<ObjectId> = files.map(|(_, id)| *id).collect();
            let unknown = ids.iter().filter(|id| self.objects.known_summary(**id).is_none()).count();
            let deadline =
                (unknown > self.options.listing_wait_names).then(|| Instant::now() + self.options.listing_budget);
            missing = self.objects.summarize(&*self.store, &ids, deadline)?.into_iter().collect();
            summaries = self.objects.known_summaries(&ids);
            let has_broken = || summaries.values().any(|summary| summary.broken.is_some());
            // One that was replaced meanwhile may be forgotten by now.
            let all_known = || deadline.is_some() || ids.iter().all(|id| summaries.contains_key(id));
            if missing.is_empty() && !has_broken() && all_known() {
                break;
            }
            let now = self.names_below(prefix)?;
            if now == names {
                break;
            }
            names = now;
        }
        Ok(Below { names, summaries, missing })
    }

    /// The file names of a directory that show datasets, by the names of those.
    pub(super) fn components(&self, directory: &str) -> Result<HashMap<String, String>> {
        let listing = self.list(directory)?;
        let views = listing.entries.iter().filter_map(|(component, item)| match item {
            Item::View { name, .. } => Some((name.clone(), component.clone())),
            _ => None,
        });
        Ok(views.collect())
    }

    /// Gives the entries after `offset` to `add` until that returns true (full).
    ///
    /// # Errors
    /// `Invalid` for a handle that is no directory's.
    pub fn readdir(
        &self,
        ino: u64,
        fh: u64,
        offset: u64,
        with_attributes: bool,
        add: &mut dyn FnMut(DirEntry) -> bool,
    ) -> Result<()> {
        let handle = self.handles().get(&fh).cloned();
        let listing = match handle {
            Some(Handle::Directory(listing)) => listing,
            Some(_) => return Err(Error::new(Kind::Invalid, "not a directory's handle")),
            // Opened before the server was replaced.
            None => self.list_inode(ino)?,
        };
        for (index, dots) in [".", ".."].iter().enumerate().skip(offset as usize) {
            let next = index as u64 + 1;
            let entry = DirEntry { next, name: OsString::from(dots), ino, kind: FileKind::Directory, entry: None };
            if add(entry) {
                return Ok(());
            }
        }
        let first = listing.cookies.partition_point(|cookie| *cookie <= offset);
        let mut known_until = 0;
        for (at, ((component, item), next)) in listing.entries.iter().zip(&listing.cookies).enumerate().skip(first) {
            // What is not there any more must not be entered again.
            let plus = with_attributes && listing.changes.load(Ordering::Relaxed) == self.changes();
            if plus && at >= known_until && listing.looked_at.load(Ordering::Relaxed) {
                known_until = at + AHEAD;
                self.learn_entries(&listing.entries[at..known_until.min(listing.entries.len())]);
            }
            let entry = self.dir_entry(&listing.directory, component, item, *next, plus);
            let counted = entry.entry.is_some();
            let entry_ino = entry.ino;
            if add(entry) {
                if counted {
                    self.inodes.forget(entry_ino, 1);
                }
                break;
            }
        }
        Ok(())
    }

    /// Makes the summaries that the entries of an incomplete listing lack. Without them they come without attributes.
    fn learn_entries(&self, entries: &[(String, Item)]) {
        let lacks = |(_, item): &(String, Item)| match item {
            Item::View { object, summary: None, .. } => Some(*object),
            _ => None,
        };
        let ids: Vec<ObjectId> = entries.iter().filter_map(lacks).collect();
        if let Err(error) = self.objects.summarize(&*self.store, &ids, None) {
            tracing::debug!("a listing goes on without attributes: {error}");
        }
    }

    /// Notes that a file of a directory was looked up. One by one that takes the store a look at all names each time, so
    /// who reads an incomplete listing gets attributes with the entries that follow.
    pub(super) fn note_looked_at(&self, directory: &str) {
        let listings = self.listings.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(listing) = listings.get(directory).filter(|listing| !listing.complete) {
            listing.looked_at.store(true, Ordering::Relaxed);
        }
    }

    fn dir_entry(&self, directory: &str, component: &str, item: &Item, next: u64, plus: bool) -> DirEntry {
        let target = Target::new(directory, component);
        let found = match item {
            Item::Directory { name } => Some(Found::Directory { name: name.clone() }),
            Item::Staged(staged) => staged.upgrade().map(Found::Staged),
            Item::View { name, object, summary } => {
                // It may be known by now.
                let summary = summary.clone().or_else(|| self.objects.known_summary(*object));
                summary.map(|summary| {
                    let view = match &target.view {
                        Some((_, view)) if summary.view(*view).is_some() => *view,
                        _ => summary.listed,
                    };
                    Found::View(target.view_node(name.clone(), *object, view, summary))
                })
            }
        };
        let kind = match item {
            Item::Directory { .. } => FileKind::Directory,
            _ => FileKind::File,
        };
        let Some(found) = found else {
            // The type is not known yet; the number only has to be one.
            let ino = name::stable_hash(&[target.path().as_bytes()]).max(ROOT + 1);
            return DirEntry { next, name: component.into(), ino, kind, entry: None };
        };
        let (ino, node) = self.node_of(found);
        let entry = if plus { self.known_entry(ino, node) } else { None };
        DirEntry { next, name: component.into(), ino, kind, entry }
    }

    /// Attributes for a listing, if they are known without asking anyone; counts a lookup then.
    fn known_entry(&self, ino: u64, node: Node) -> Option<super::Entry> {
        if let Node::View(view) = &node {
            view.summary.view(view.view)??;
        }
        let inode = self.look_up_node(ino, node);
        match self.entry(&inode) {
            Ok(entry) => Some(entry),
            Err(_) => {
                self.inodes.forget(inode.ino, 1);
                None
            }
        }
    }

    /// Closes a directory.
    pub fn releasedir(&self, _ino: u64, fh: u64) {
        self.handles().remove(&fh);
    }

    /// Full names of the directories that exist only here, directly below a name with its slash; sorted.
    fn directories_below(&self, prefix: &str) -> Vec<String> {
        let staged = self.staging.directories();
        let mut out: Vec<String> = self
            .folders
            .below(prefix)
            .iter()
            .chain(&staged)
            .filter_map(|directory| directory.strip_prefix(prefix))
            // An empty part is a directory's name below others, not in the root.
            .filter(|rest| !rest.is_empty() || !prefix.is_empty())
            .map(|rest| format!("{prefix}{}", rest.split('/').next().unwrap_or(rest)))
            .collect();
        out.sort_unstable();
        out.dedup();
        out
    }

    /// As [`FileSystem::directories_below`], without those of which only files are left that were written here, and are
    /// called otherwise by now, or removed: another mount has done that. `names` are all below the prefix.
    fn local_directories(&self, names: &[NamedObject], prefix: &str) -> Result<Vec<String>> {
        let has_names = |directory: &str| {
            let below = format!("{directory}/");
            let at = names.partition_point(|(name, _)| *name < below);
            names.get(at).is_some_and(|(name, _)| name.starts_with(&below))
        };
        let mut local = self.directories_below(prefix);
        let doubtful: Vec<_> =
            local.iter().filter(|directory| !self.folders.exists(directory) && !has_names(directory)).collect();
        let mut left = false;
        for staged in doubtful.into_iter().flat_map(|directory| self.staging.tree(directory)) {
            left |= self.leave_if_replaced(&staged)?;
        }
        if left {
            local = self.directories_below(prefix);
        }
        Ok(local)
    }

    /// Whether a directory has anything in it.
    pub(super) fn is_empty_directory(&self, directory: &str) -> Result<bool> {
        Ok(self.list(directory)?.entries.is_empty())
    }

    /// Learns the types of all names ahead of the first listing, a batch at a time, until all are known.
    pub fn warm_up(&self) -> Result<()> {
        let prefix = if self.options.prefix.is_empty() { String::new() } else { format!("{}/", self.options.prefix) };
        let ids: Vec<ObjectId> = self.names_below(&prefix)?.into_iter().map(|(_, id)| id).collect();
        for batch in ids.chunks(1024) {
            self.objects.summarize(&*self.store, batch, None)?;
        }
        Ok(())
    }
}

fn fingerprint(names: &[(String, ObjectId)], staged: &[StagedEntry], local: &[String]) -> u64 {
    let mut hash = name::stable_hash(&[b"listing"]);
    for (name, id) in names {
        hash = name::stable_hash(&[&hash.to_le_bytes(), name.as_bytes(), &id.0.to_le_bytes()]);
    }
    for StagedEntry { component, file, .. } in staged {
        hash = name::stable_hash(&[&hash.to_le_bytes(), &file.ino().to_le_bytes(), component.as_bytes()]);
    }
    for directory in local {
        hash = name::stable_hash(&[&hash.to_le_bytes(), directory.as_bytes()]);
    }
    hash
}
