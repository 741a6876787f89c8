//! From a path to what is there: lookup, and finding inodes again after a restart of the server.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::copies::HIDDEN;
use super::inode::{Inode, Node, ViewNode};
use super::objects::Summary;
use super::staging::Staged;
use super::{Caller, Entry, FileSystem, name};
use crate::error::{Error, Kind, Result};
use crate::image::View;
use crate::vineyard::ObjectId;
use crate::vineyard::store::{NameQuery, NamedObject};

/// How often a redirected reader's lookup starts over because another version was published meanwhile.
const HOLD_ATTEMPTS: usize = 3;
/// How often a name is looked up anew whose object was replaced meanwhile.
pub(super) const ATTEMPTS: usize = 10;

/// What a path leads to.
#[derive(Clone, Debug)]
pub(super) enum Found {
    /// Names lie below it, or it was made with `mkdir`.
    Directory {
        /// Full name.
        name: String,
    },
    /// A view of a published object.
    View(ViewNode),
    /// A file that this mount is writing or has written.
    Staged(Arc<Staged>),
}

impl Found {
    /// The object that is shown.
    pub(super) fn object(&self) -> Option<ObjectId> {
        match self {
            Found::Directory { .. } => None,
            Found::View(view) => Some(view.object),
            Found::Staged(staged) => staged.published().map(|(_, object)| object),
        }
    }
}

/// Whether a path must lead nowhere when it gets a name: whoever names it looks at that under the lock on names, as others
/// may have given it one since it was looked up. It holds until it has a name, or is given up, for all clones.
#[derive(Clone, Debug, Default)]
pub(super) struct Vacancy(Option<Arc<AtomicBool>>);

impl Vacancy {
    pub(super) fn demanded(demanded: bool) -> Self {
        Vacancy(demanded.then(|| Arc::new(AtomicBool::new(true))))
    }

    pub(super) fn is_demanded(&self) -> bool {
        self.0.as_ref().is_some_and(|demanded| demanded.load(Ordering::Relaxed))
    }

    pub(super) fn end(&self) {
        self.0.iter().for_each(|demanded| demanded.store(false, Ordering::Relaxed));
    }
}

/// A path cut into what the name map may know it as.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// Full name of the directory.
    pub directory: String,
    /// File name, as the kernel gave it.
    pub component: String,
    /// The name of a plain file at this path.
    pub plain: String,
    /// The name of a directory at this path.
    pub folder: String,
    /// The name of the dataset whose view this path is, and the format, if the extension is one of a view.
    pub view: Option<(String, View)>,
    /// Nothing may be replaced there.
    pub vacancy: Vacancy,
}

impl Target {
    pub(super) fn new(directory: &str, component: &str) -> Target {
        let view = component.rsplit_once('.').and_then(|(stem, extension)| {
            let view = View::from_extension(extension)?;
            (!stem.is_empty())
                .then(|| (name::join(directory, &name::decode_file(directory, stem, &suffix(view))), view))
        });
        Target {
            directory: directory.to_owned(),
            component: component.to_owned(),
            plain: name::join(directory, &name::decode_file(directory, component, "")),
            folder: name::join(directory, &name::decode_folder(directory, component)),
            view,
            vacancy: Vacancy::default(),
        }
    }

    /// This path, where a name is known to be: a shortened file name does not tell it.
    pub(super) fn of_name(mut self, name: &str) -> Target {
        if let Some((hash, rest)) = name::split_hash(&self.component)
            && name::stable_hash(&[name.as_bytes()]) == hash
        {
            let view = rest.strip_prefix('.').and_then(View::from_extension);
            self.view = view.map(|view| (name.to_owned(), view));
            self.plain = name.to_owned();
        }
        self
    }

    /// The node of a view at this path.
    pub(super) fn view_node(&self, name: String, object: ObjectId, view: View, summary: Arc<Summary>) -> ViewNode {
        let (directory, component) = (self.directory.clone(), self.component.clone());
        ViewNode { directory, component, name, object, view, summary }
    }

    /// The path below the mount's root; what inode numbers are made of.
    pub(super) fn path(&self) -> String {
        name::join(&self.directory, &self.component)
    }

    /// Name under which a file of the view's format is published.
    pub(super) fn dataset(&self) -> &str {
        self.view.as_ref().map_or(&self.plain, |(name, _)| name)
    }

    pub(super) fn queries(&self) -> Vec<NameQuery> {
        let mut queries = vec![
            NameQuery::Exact(self.plain.clone()),
            NameQuery::Prefix { prefix: format!("{}/", self.folder), limit: Some(1) },
        ];
        queries.extend(self.view.iter().map(|(name, _)| NameQuery::Exact(name.clone())));
        queries
    }
}

/// Whether a file or a directory may be made at a path.
///
/// # Errors
/// `NotPermitted` where listings show nothing, `Invalid` for the empty name.
pub(super) fn check_new(target: &Target) -> Result<()> {
    let below = |name: &str| name.starts_with(HIDDEN) || HIDDEN.strip_suffix('/') == Some(name);
    if below(&target.plain) || below(&target.directory) {
        return Err(Error::new(Kind::NotPermitted, format!("{HIDDEN} is kept for copies of datasets")));
    }
    if target.plain.is_empty() || target.view.as_ref().is_some_and(|(name, _)| name.is_empty()) {
        return Err(Error::new(Kind::Invalid, "no dataset can have the empty name"));
    }
    Ok(())
}

impl FileSystem {
    /// The number of a directory, by its full name.
    pub(super) fn directory_number(&self, name: &str) -> u64 {
        if name == self.options.prefix { super::ROOT } else { self.inodes.directory(name) }
    }

    /// After a name has come to lead elsewhere than to `object`, by whichever view's path: the kernel looks up the file that
    /// listings showed of it again. Those of its other views it looks up each time.
    pub(super) fn end_listed(&self, name: &str, object: ObjectId) {
        if let Some(summary) = self.objects.known_summary(object) {
            self.end_listed_of(name, &summary);
        }
    }

    /// As [`FileSystem::end_listed`], for the object that this tells of.
    pub(super) fn end_listed_of(&self, name: &str, summary: &Summary) {
        let (directory, part) = name::split(name);
        let component = Self::listed_component(part, name, Some(summary));
        let number = self.inodes.view_number(&name::join(directory, &component), summary.id, summary.listed);
        if self.inodes.get(number).is_some() {
            self.host.invalidate_entry(self.directory_number(directory), OsStr::new(&component));
        }
    }

    /// The name prefix of a directory inode.
    pub(super) fn directory_name(&self, ino: u64) -> Result<String> {
        match &self.inode(ino)?.node {
            Node::Directory { name } => Ok(name.clone()),
            _ => Err(Error::new(Kind::NotDirectory, "not a directory")),
        }
    }

    /// What is at a path, for a process. The name map is asked anew each time.
    pub(super) fn resolve(&self, target: &Target, pid: u32) -> Result<Option<Found>> {
        let mut found = self.resolve_once(target, pid);
        for _ in 1..ATTEMPTS {
            match &found {
                Err(error) if error.kind() == Kind::Stale => found = self.resolve_once(target, pid),
                _ => break,
            }
        }
        found
    }

    /// What this mount alone knows to be at a path: files that were written here, and directories that were made.
    pub(super) fn resolve_here(&self, target: &Target, pid: u32) -> Result<Option<Found>> {
        let path = target.path();
        let there = || {
            let staged = self.staging.reserved_for(&path, pid).or_else(|| self.staging.at(&path));
            staged.filter(|_| !self.staging.is_redirected(&path, pid))
        };
        let mut found = there();
        while let Some(staged) = found {
            if !self.staging.leave_if_abandoned(&staged) && !self.leave_if_replaced(&staged)? {
                return Ok(Some(Found::Staged(staged)));
            }
            // Another one may have taken its place.
            found = there().filter(|now| !Arc::ptr_eq(now, &staged));
        }
        if self.folders.exists(&target.folder) {
            return Ok(Some(Found::Directory { name: target.folder.clone() }));
        }
        if let Some((hash, rest)) = name::split_hash(&target.component) {
            return self.resolve_hashed(target, hash, rest);
        }
        Ok(None)
    }

    /// `Stale` if an object went because its name was given another one: whoever replaces a dataset never leaves a moment
    /// without it, and none is to be seen.
    fn resolve_once(&self, target: &Target, pid: u32) -> Result<Option<Found>> {
        if let Some(found) = self.resolve_here(target, pid)? {
            return Ok(Some(found));
        }
        let mut answers = self.store.names(&target.queries())?.into_iter();
        let plain = answers.next().unwrap_or_default();
        let below = answers.next().unwrap_or_default();
        let dataset = answers.next().unwrap_or_default();
        if !below.is_empty() && !target.folder.is_empty() {
            return Ok(Some(Found::Directory { name: target.folder.clone() }));
        }
        if let Some((name, object)) = plain.into_iter().next() {
            if let Some(summary) = self.objects.summary(&*self.store, object)? {
                // A name that carries the extension of one of its views is that view; any other is the listed one.
                let named = target.view.as_ref().map(|(_, view)| *view).filter(|view| summary.view(*view).is_some());
                let view = if summary.view(View::Raw).is_some() { View::Raw } else { named.unwrap_or(summary.listed) };
                return Ok(Some(Found::View(target.view_node(name, object, view, summary))));
            }
            self.still_leads(&name, object)?;
        }
        let Some((_, view)) = target.view else { return Ok(None) };
        let Some((name, object)) = dataset.into_iter().next() else { return Ok(None) };
        if let Some(summary) = self.objects.summary(&*self.store, object)?
            && summary.view(view).is_some()
        {
            return Ok(Some(Found::View(target.view_node(name, object, view, summary))));
        }
        // There is nothing to see, or a part of it was gone when it was looked at.
        self.still_leads(&name, object)?;
        Ok(None)
    }

    /// `Stale` if a name leads to another object by now.
    fn still_leads(&self, name: &str, object: ObjectId) -> Result<()> {
        match self.object_of(name)? {
            Some(now) if now == object => Ok(()),
            _ => Err(Error::stale(format!("{name:?} was replaced while it was looked up"))),
        }
    }

    /// Finds the name behind a shortened file name, by looking at all names of the directory.
    fn resolve_hashed(&self, target: &Target, hash: u64, rest: &str) -> Result<Option<Found>> {
        let directory = &target.directory;
        let prefix = if directory.is_empty() { String::new() } else { format!("{directory}/") };
        let names = self.names_below(&prefix)?;
        for (name, object) in names {
            // The hash is of the name up to the end of this path's part.
            let part_end = name::part_end(&name, &prefix);
            let whole = &name[..part_end.unwrap_or(name.len())];
            if name::stable_hash(&[whole.as_bytes()]) != hash {
                continue;
            }
            if part_end.is_some() {
                return Ok(Some(Found::Directory { name: whole.to_owned() }));
            }
            let Some(summary) = self.objects.summary(&*self.store, object)? else { continue };
            let view = match rest.strip_prefix('.').map(View::from_extension) {
                Some(Some(view)) if summary.view(view).is_some() => view,
                _ if rest.is_empty() => summary.listed,
                _ => continue,
            };
            return Ok(Some(Found::View(target.view_node(name, object, view, summary))));
        }
        Ok(None)
    }

    /// All names that begin with a prefix, in byte order, without those that are hidden.
    pub(super) fn names_below(&self, prefix: &str) -> Result<Vec<NamedObject>> {
        let query = NameQuery::Prefix { prefix: prefix.to_owned(), limit: None };
        let mut names = self.store.names(&[query])?.into_iter().next().unwrap_or_default();
        if !prefix.starts_with(HIDDEN) {
            names.retain(|(name, _)| !name.starts_with(HIDDEN));
        }
        Ok(names)
    }

    /// The object that a name points to now.
    pub(super) fn object_of(&self, name: &str) -> Result<Option<ObjectId>> {
        let answers = self.store.names(&[NameQuery::Exact(name.to_owned())])?;
        Ok(answers.into_iter().flatten().next().map(|(_, id)| id))
    }

    /// Looks a name up in a directory.
    ///
    /// # Errors
    /// `NotFound`; `NameTooLong`; what the store answers.
    pub fn lookup(&self, parent: u64, name: &OsStr, caller: Caller) -> Result<Entry> {
        self.follow_store()?;
        let component = name::component(name)?;
        self.end_old_redirects();
        if self.retries.may_copy(caller) {
            // A file may be made for the writer who comes: not where the directory is about to move from.
            let (_turn, directory) = self.enter_directory(parent)?;
            return self.lookup_at(Target::new(&directory, component), caller);
        }
        let ask = |directory: &str| self.lookup_at(Target::new(directory, component), caller);
        let is_absent = |error: &Error| error.kind() == Kind::NotFound;
        self.ask_of_directory(parent, ask, |found| found.as_ref().is_err_and(is_absent))
    }

    fn lookup_at(&self, target: Target, caller: Caller) -> Result<Entry> {
        let mut found = self.resolve_for(&target, caller)?;
        for _ in 0..HOLD_ATTEMPTS {
            match &found {
                Some(Found::View(view)) if !self.hold_for_open(&target.path(), view, caller.pid)? => {
                    found = self.resolve(&target, caller.pid)?;
                }
                _ => break,
            }
        }
        match found {
            Some(found) => {
                if matches!(found, Found::View(_)) {
                    self.note_looked_at(&target.directory);
                }
                self.enter(&target, found).inspect(|entry| self.retries.note_found(entry.attr.ino, caller))
            }
            None => {
                self.retries.note_absent(target.path(), caller);
                Err(Error::not_found(format!("no dataset behind {:?}", target.path())))
            }
        }
    }

    /// Lets go of versions that are kept for processes that never came to open them. Called by lookups, and now and then
    /// where there are none.
    pub fn end_old_redirects(&self) {
        for object in self.staging.end_old_redirects() {
            self.end_lazy_open(object);
        }
    }

    /// Keeps a version for a process that was sent to it until it opens it: the kernel looks a name up again only once,
    /// and the writer may publish the next version in between. False if that happened already.
    fn hold_for_open(&self, path: &str, view: &ViewNode, pid: u32) -> Result<bool> {
        if !self.staging.is_redirected(path, pid) || self.staging.holds(path, pid, view.object) {
            return Ok(true);
        }
        let former = {
            let _naming = self.naming();
            if self.object_of(&view.name)? != Some(view.object) {
                return Ok(false);
            }
            *self.lazy_opens().entry(view.object).or_default() += 1;
            self.staging.hold(path, pid, view.object)
        };
        if let Some(object) = former {
            self.end_lazy_open(object);
        }
        Ok(true)
    }

    /// Makes the inode of what was found, counts a lookup, and describes it.
    pub(super) fn enter(&self, target: &Target, found: Found) -> Result<Entry> {
        let (ino, node) = self.node_of(found);
        tracing::trace!(name = target.component, ino, "found");
        let inode = self.look_up_node(ino, node);
        self.entry(&inode)
    }

    /// Counts a lookup of a node that was found, and of its number.
    pub(super) fn look_up_node(&self, ino: u64, node: Node) -> Arc<Inode> {
        match &node {
            Node::Directory { name } if ino != super::ROOT => self.inodes.look_up_directory(name),
            _ => self.inodes.look_up(ino, || node),
        }
    }

    pub(super) fn node_of(&self, found: Found) -> (u64, Node) {
        match found {
            Found::Directory { name } => (self.directory_number(&name), Node::Directory { name }),
            Found::View(view) => (self.inodes.number_of(&view), Node::View(view)),
            Found::Staged(staged) => (staged.ino(), Node::Staged(staged)),
        }
    }

    /// Attributes and how long they hold.
    pub(super) fn entry(&self, inode: &Arc<Inode>) -> Result<Entry> {
        let (attr, attr_ttl) = self.attributes(inode)?;
        let entry_ttl = match &inode.node {
            // Its writer's next lookup may have to find another version.
            Node::Staged(_) => Duration::ZERO,
            // Somebody writes the path, and others were led to what is published: they and the writer look again.
            Node::View(view) if self.staging.at(&name::join(&view.directory, &view.component)).is_some() => {
                Duration::ZERO
            }
            // What ends it may come by the path of another view, of which the kernel does not think when it sees this one.
            Node::View(view) if view.view != view.summary.listed => Duration::ZERO,
            _ => self.options.entry_ttl,
        };
        Ok(Entry { attr, entry_ttl, attr_ttl })
    }

    /// Finds the inode of a number that a former server gave out: a directory or a view of a name that still points
    /// to the same object.
    pub(super) fn recover(&self, ino: u64) -> Result<Option<Arc<Inode>>> {
        if let Some(staged) = self.staging.by_ino(ino) {
            return Ok(Some(self.inodes.look_up(ino, || Node::Staged(staged))));
        }
        if let Some(name) = self.inodes.renamed_directory(ino) {
            return Ok(Some(self.inodes.look_up(ino, || Node::Directory { name })));
        }
        let root = &self.options.prefix;
        let prefix = if root.is_empty() { String::new() } else { format!("{root}/") };
        for made in self.folders.below(&prefix) {
            // Itself, and the directories above it.
            let parts = made.match_indices('/').map(|(at, _)| at).filter(|at| *at >= prefix.len());
            for end in parts.chain([made.len()]) {
                let name = made.get(..end).unwrap_or_default();
                if self.inodes.directory(name) == ino {
                    return Ok(Some(self.inodes.look_up(ino, || Node::Directory { name: name.to_owned() })));
                }
            }
        }
        for (name, object) in self.names_below(&prefix)? {
            let is_one_part = name::part_end(&name, &prefix).is_none();
            let ends = name[prefix.len()..].match_indices('/').map(|(at, _)| prefix.len() + at);
            for end in ends.filter(|_| !is_one_part) {
                if self.inodes.directory(&name[..end]) == ino {
                    let node = || Node::Directory { name: name[..end].to_owned() };
                    return Ok(Some(self.inodes.look_up(ino, node)));
                }
            }
            let (directory, part) = name::split(&name);
            for view in View::ALL {
                let files = [suffix(view), String::new()]
                    .map(|suffix| [name::encode_file(part, &suffix, &name), name::hashed_part(part, &suffix, &name)]);
                for component in files.as_flattened() {
                    let path = name::join(directory, component);
                    if self.inodes.view_number(&path, object, view) != ino {
                        continue;
                    }
                    let Some(summary) = self.objects.summary(&*self.store, object)? else { continue };
                    let target = Target::new(directory, component);
                    let node = || Node::View(target.view_node(name.clone(), object, view, summary));
                    return Ok(Some(self.inodes.look_up(ino, node)));
                }
            }
        }
        Ok(None)
    }

    /// The file name under which a listing shows a name: the part itself if it carries the extension of one of the
    /// object's views, else with the listed view's extension.
    pub(super) fn listed_component(part: &str, whole: &str, summary: Option<&Summary>) -> String {
        let suffix = match summary {
            None => String::new(),
            Some(summary) if summary.listed == View::Raw || summary.broken.is_some() => String::new(),
            Some(summary) => {
                let own = part.rsplit_once('.').and_then(|(_, extension)| View::from_extension(extension));
                match own {
                    Some(view) if summary.view(view).is_some() => String::new(),
                    _ => suffix(summary.listed),
                }
            }
        };
        name::encode_file(part, &suffix, whole)
    }
}

/// The extension of a view with its dot; nothing for raw bytes.
pub(super) fn suffix(view: View) -> String {
    view.extension().map_or(String::new(), |extension| format!(".{extension}"))
}
