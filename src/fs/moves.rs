//! Moves of many names at once: renames of directories, and exchanges.
//!
//! A server may be killed in the middle. So where everything will be afterwards is written into a memory file of the
//! host's before the first step, and the next server takes all steps again that are missing, before it answers its first
//! request ([`FileSystem::finish_moves`]). Each step sets a final state and may be taken twice. A move that was finished,
//! and whose request comes again because nobody answered it, is known by the request's number.
//!
//! The store may refuse a step, or not answer. Half of the names have moved then, and of two directories that change places
//! the plan alone knows what some names led to: it is kept, and what is missing is done before anything else changes a name
//! of those directories, or by housekeeping as soon as the store answers ([`FileSystem::finish_unfinished`]).
//!
//! Whoever changes names below a directory waits until it has moved (see `trees`). What another mount has put there
//! meanwhile, or who opened a file for writing before, is looked for when the rest has moved.
//!
//! Locks are taken in this order: the turn of `trees`, the one to take steps, `publishing` of a staged file, the one on
//! names.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::ffi::OsStr;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::folders::Folder;
use super::host::{Area, MemoryFile};
use super::inode::ViewNode;
use super::name::{self, is_inside, moved};
use super::naming::is_clear;
use super::resolve::Target;
use super::{Caller, FileSystem};
use crate::error::{Error, Kind, Result};
use crate::sync::{Mutex, MutexGuard};
use crate::vineyard::ObjectId;

/// What the host's texts of finished moves begin with.
const DONE: &str = "moved:";
/// How often it is looked again for what came to the old name of a directory.
const LOOKS: usize = 3;
/// Finished moves that are remembered: more than a server answers at the same time.
const REMEMBERED: usize = 64;

/// Where everything will be when a move is done.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Move {
    /// The request's number.
    request: u64,
    /// Directories: old and new full name.
    trees: Vec<(String, String)>,
    /// Names of objects: old and new name, and the object.
    names: Vec<(String, String, u64)>,
    /// What is known of directories; nothing where there is none any more.
    folders: Vec<(String, Option<Folder>)>,
    /// Inode numbers of directories.
    numbers: Vec<(String, u64)>,
    /// How far this server has come; nothing is known of a former one.
    #[serde(skip)]
    progress: Progress,
}

/// What was done of a move by this server.
#[derive(Debug, Default)]
struct Progress {
    /// This server made the plan.
    own: bool,
    /// Something may have changed in the store.
    began: bool,
    /// New names that lead to their objects, or have done so.
    placed: HashSet<String>,
    /// Inode numbers of staged files that have their new paths.
    staged: HashSet<u64>,
    /// Names that stay where they are.
    staying: HashSet<String>,
    /// It was interrupted, or something came meanwhile: objects may have lost their last name.
    untidy: bool,
}

impl Move {
    /// Whether one of these names is moved, lies in a directory that is, or above it.
    fn concerns(&self, names: &[&str]) -> bool {
        let overlaps = |tree: &str| names.iter().any(|name| is_inside(name, tree) || is_inside(tree, name));
        if self.trees.is_empty() {
            return self
                .names
                .iter()
                .any(|(old, new, _)| names.contains(&old.as_str()) || names.contains(&new.as_str()));
        }
        self.trees.iter().any(|(from, to)| overlaps(from) || overlaps(to))
    }

    /// Whether it moves just this to that; with `exchange` also that to this.
    fn is_of(&self, from: &Target, to: &Target, exchange: bool) -> bool {
        let files = self.trees.is_empty();
        let ends: Vec<(&str, &str)> = match files {
            true => self.names.iter().map(|(old, new, _)| (old.as_str(), new.as_str())).collect(),
            false => self.trees.iter().map(|(from, to)| (from.as_str(), to.as_str())).collect(),
        };
        let is = |name: &str, target: &Target| match files {
            true => name == target.plain || name == target.dataset(),
            false => name == target.folder,
        };
        let forth = |(a, b): &(&str, &str)| is(a, from) && is(b, to);
        let back = |(a, b): &(&str, &str)| is(a, to) && is(b, from);
        (ends.len() > 1) == exchange && ends.iter().any(forth) && ends.iter().all(|end| forth(end) || back(end))
    }
}

/// Moves of this server and of former ones.
#[derive(Default)]
pub(super) struct Moves {
    /// Held while steps are taken: one move at a time.
    turn: Mutex<()>,
    known: Mutex<Known>,
}

/// What is known of moves.
#[derive(Default)]
struct Known {
    /// Numbers of the requests whose work is done.
    done: VecDeque<u64>,
    /// What could not be finished yet, with the files that say so.
    unfinished: Vec<(Move, Option<MemoryFile>)>,
    /// Somebody finishes some of them.
    finishing: bool,
}

impl FileSystem {
    /// Renames a directory; the new name is free or an empty directory's.
    pub(super) fn move_directory(&self, from: &str, to: &str, caller: Caller) -> Result<()> {
        self.carry_out(self.plan_trees(&[(from, to)], caller)?)
    }

    /// Lets two directories change places.
    pub(super) fn exchange_directories(&self, a: &str, b: &str, caller: Caller) -> Result<()> {
        self.carry_out(self.plan_trees(&[(a, b), (b, a)], caller)?)
    }

    /// Lets two names change their objects.
    pub(super) fn exchange_names(&self, a: (&str, ObjectId), b: (&str, ObjectId), caller: Caller) -> Result<()> {
        let names = vec![(a.0.to_owned(), b.0.to_owned(), a.1.0), (b.0.to_owned(), a.0.to_owned(), b.1.0)];
        let done = self.carry_out(Move { request: caller.request, names, ..Move::default() });
        [a, b].into_iter().for_each(|(name, object)| self.end_listed(name, object));
        done
    }

    /// For a request that a former server had begun to work on: the outcome, if that server had written down a move. What
    /// could not be finished when this server began is tried again.
    pub(super) fn resume_move(&self, caller: Caller) -> Option<Result<()>> {
        if !caller.resent {
            return None;
        }
        let (tried, result) = self.finish_those(|plan| plan.request == caller.request);
        if self.moves().done.contains(&caller.request) {
            return Some(Ok(()));
        }
        tried.then_some(result)
    }

    /// Before a rename of these: finishes moves that have to do with them. True if it was one of them.
    ///
    /// # Errors
    /// What the store answers.
    pub(super) fn finish_same(&self, from: &Target, to: &Target, exchange: bool) -> Result<bool> {
        let (same, result) = self.finish_those(|plan| plan.is_of(from, to, exchange));
        result?;
        self.finish_unfinished(&[&from.folder, from.dataset(), &to.folder, to.dataset()])?;
        Ok(same)
    }

    /// Before one of these names is changed, or what lies below it: finishes the moves that have to do with it, and could
    /// not be finished. No lock may be held.
    ///
    /// # Errors
    /// What the store answers, unless it refuses: it may go on doing so, and nothing could be changed there any more.
    pub(super) fn finish_unfinished(&self, names: &[&str]) -> Result<()> {
        match self.finish_those(|plan| plan.concerns(names)).1 {
            Err(error) if !is_clear(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Finishes all moves that could not be finished. No lock may be held.
    ///
    /// # Errors
    /// What the store answers.
    pub(super) fn finish_all_moves(&self) -> Result<()> {
        self.finish_those(|_| true).1
    }

    /// Whether moves could not be finished yet.
    pub(super) fn has_unfinished_moves(&self) -> bool {
        let moves = self.moves();
        moves.finishing || !moves.unfinished.is_empty()
    }

    /// Objects that may have their only names in the plans of moves that are not finished: they are not left over.
    pub(super) fn moved_objects(&self) -> HashSet<ObjectId> {
        let moves = self.moves();
        moves.unfinished.iter().flat_map(|(plan, _)| &plan.names).map(|(.., object)| ObjectId(*object)).collect()
    }

    /// Also says whether there were any.
    fn finish_those(&self, concerned: impl Fn(&Move) -> bool) -> (bool, Result<()>) {
        // Most often there are none.
        if !self.has_unfinished_moves() {
            return (false, Ok(()));
        }
        let _turn = self.moves.turn.lock().unwrap_or_else(|e| e.into_inner());
        let (mut tried, mut result) = (false, Ok(()));
        let todo = {
            let mut moves = self.moves();
            moves.finishing = true;
            std::mem::take(&mut moves.unfinished)
        };
        let mut left = Vec::new();
        for (mut plan, log) in todo {
            let ended = concerned(&plan).then(|| self.take_steps(&mut plan));
            tried |= ended.is_some();
            match ended {
                Some(Ok(())) => {
                    self.remember(plan.request);
                    self.show_moved(&plan);
                    tracing::info!("a move of names that could not be finished is finished");
                    continue;
                }
                Some(Err(error)) => result = Err(error),
                None => {}
            }
            left.push((plan, log));
        }
        let mut moves = self.moves();
        moves.unfinished.extend(left);
        moves.finishing = false;
        (tried, result)
    }

    /// The kernel believes that a move which failed has not happened: it is told to look directories up again.
    fn show_moved(&self, plan: &Move) {
        for moved in plan.trees.iter().flat_map(|(from, to)| [from, to]) {
            let (parent, part) = name::split(moved);
            let component = name::encode_file(part, "", moved);
            self.host.invalidate_entry(self.directory_number(parent), OsStr::new(&component));
        }
        self.note_change();
    }

    fn moves(&self) -> MutexGuard<'_, Known> {
        self.moves.known.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn plan_trees(&self, trees: &[(&str, &str)], caller: Caller) -> Result<Move> {
        let mut plan = Move { request: caller.request, ..Move::default() };
        plan.progress.own = true;
        for (from, to) in trees {
            plan.trees.push(((*from).to_owned(), (*to).to_owned()));
            let names = self.names_below(&format!("{from}/"))?;
            plan.names.extend(names.into_iter().map(|(name, object)| (name.clone(), moved(&name, from, to), object.0)));
        }
        self.plan_directories(&mut plan);
        Ok(plan)
    }

    /// Plans what becomes of directories, from what is known of them now.
    fn plan_directories(&self, plan: &mut Move) {
        let mut directories = Vec::new();
        for (from, to) in &plan.trees {
            let names = plan.names.iter().map(|(name, ..)| name.as_str()).filter(|name| is_inside(name, from));
            directories.extend(self.tree(from, names).into_iter().map(|name| (moved(&name, from, to), name)));
        }
        let trees: Vec<(&str, &str)> = plan.trees.iter().map(|(from, to)| (from.as_str(), to.as_str())).collect();
        plan.folders = self.folders.plan_moves(&trees);
        // The kernel keeps the numbers when it renames. It may know those of a former server, too.
        directories.retain(|(_, old)| self.options.epoch > 0 || self.inodes.get(self.inodes.directory(old)).is_some());
        plan.numbers = self.inodes.plan_directories(&directories);
    }

    /// A directory and all below it, whether objects' names lie under them or not. `names` are all of those.
    fn tree<'a>(&self, top: &str, names: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
        let prefix = format!("{top}/");
        let mut tree = BTreeSet::from([top.to_owned()]);
        let names = names.filter_map(|name| Some(name.rsplit_once('/')?.0.to_owned()));
        let staged = self.staging.directories().into_iter().filter(|directory| directory.starts_with(&prefix));
        for directory in names.chain(staged).chain(self.folders.below(&prefix)) {
            let parts = directory.match_indices('/').map(|(at, _)| at).filter(|at| *at > top.len());
            tree.extend(parts.map(|at| directory.get(..at).unwrap_or_default().to_owned()));
            tree.insert(directory);
        }
        tree
    }

    fn carry_out(&self, mut plan: Move) -> Result<()> {
        let _turn = self.moves.turn.lock().unwrap_or_else(|e| e.into_inner());
        let log = self.log(&plan);
        match self.take_steps(&mut plan) {
            Ok(()) => {
                if log.is_some() {
                    self.remember(plan.request);
                }
                Ok(())
            }
            // Nothing moved.
            Err(error) if !plan.progress.began => Err(error),
            Err(error) => {
                self.warn(format!("a move of names goes on as soon as the store answers: {error}"));
                plan.progress.untidy = true;
                self.moves().unfinished.push((plan, log));
                Err(error)
            }
        }
    }

    /// Writes a plan down for the next server, until what is returned is dropped. Without room for it the move goes on
    /// as it can: it is whole unless the server is killed right now.
    fn log(&self, plan: &Move) -> Option<MemoryFile> {
        let written = || -> Result<MemoryFile> {
            let text = serde_json::to_vec(plan).map_err(|error| Error::new(Kind::Internal, error.to_string()))?;
            let file = MemoryFile::create(&self.host, Area::Staging, 0)?;
            file.file.write_all_at(&text, 0)?;
            super::adopt::note_move(&file);
            Ok(file)
        };
        written().inspect_err(|error| tracing::info!("a move is not written down: {error}")).ok()
    }

    fn remember(&self, request: u64) {
        let mut moves = self.moves();
        moves.done.push_back(request);
        self.host.note(&format!("{DONE}{request}"), Some(""));
        if moves.done.len() > REMEMBERED
            && let Some(old) = moves.done.pop_front()
        {
            self.host.note(&format!("{DONE}{old}"), None);
        }
    }

    fn take_steps(&self, plan: &mut Move) -> Result<()> {
        if plan.progress.own && plan.progress.began {
            // Directories may have come since.
            self.plan_directories(plan);
        }
        for _ in 0..LOOKS {
            self.move_staged_files(plan)?;
            self.move_names(plan)?;
            if !self.plan_late(plan)? {
                break;
            }
        }
        if plan.progress.own {
            let trees: Vec<(&str, &str)> = plan.trees.iter().map(|(from, to)| (from.as_str(), to.as_str())).collect();
            plan.folders = self.folders.plan_moves(&trees);
        }
        self.plan_late_numbers(plan);
        self.folders.set(&plan.folders);
        for (name, number) in &plan.numbers {
            self.folders.keep_number(name, Some(*number));
        }
        self.inodes.set_directories(&plan.numbers);
        self.move_views(plan);
        self.staging.move_redirects(&plan.trees);
        plan.trees.iter().for_each(|(from, _)| self.retries.directory_moved(from));
        Ok(())
    }

    /// The kernel goes on with the inodes of files below directories that have moved, and may open them for writing: they
    /// must show by then what they are called.
    fn move_views(&self, plan: &Move) {
        let mut views = Vec::new();
        for (from, to) in &plan.trees {
            views.extend(self.inodes.views_inside(from).into_iter().map(|(ino, view)| (ino, view, from, to)));
        }
        for (ino, view, from, to) in views {
            let name = if is_inside(&view.name, from) { moved(&view.name, from, to) } else { view.name.clone() };
            let view = ViewNode { directory: moved(&view.directory, from, to), name, ..view };
            let path = name::join(&view.directory, &view.component);
            self.inodes.keep_number(&path, view.object, view.view, ino);
            self.show_view(ino, view);
        }
    }

    /// Plans to move what came to the old name of a directory meanwhile. False if there is nothing. Of two directories that
    /// change places nothing tells what came from what has moved there.
    fn plan_late(&self, plan: &mut Move) -> Result<bool> {
        let Move { trees, names, progress, .. } = plan;
        let [(from, to)] = trees.as_slice() else { return Ok(false) };
        let mut late = self.names_below(&format!("{from}/"))?;
        late.retain(|(name, _)| !progress.staying.contains(name));
        if late.is_empty() {
            return Ok(!self.staging.tree(from).is_empty() || !self.staging.reserved_below(from).is_empty());
        }
        progress.untidy = true;
        let again: HashSet<&str> = late.iter().map(|(name, _)| name.as_str()).collect();
        names.retain(|(old, ..)| !again.contains(old.as_str()));
        for (name, object) in late {
            let new = moved(&name, from, to);
            progress.placed.remove(&new);
            names.push((name, new, object.0));
        }
        Ok(true)
    }

    /// Directories that the kernel has heard of since their numbers were planned keep theirs, too.
    fn plan_late_numbers(&self, plan: &mut Move) {
        let planned: HashSet<String> = plan.numbers.iter().map(|(name, _)| name.clone()).collect();
        let numbers: HashSet<u64> = plan.numbers.iter().map(|(_, number)| *number).collect();
        let mut late = Vec::new();
        for (from, to) in &plan.trees {
            let unknown = self.inodes.directories_inside(from).into_iter();
            let unknown = unknown.filter(|name| !numbers.contains(&self.inodes.directory(name)));
            late.extend(unknown.map(|name| (moved(&name, from, to), name)));
        }
        let new: HashSet<&str> = late.iter().map(|(new, _)| new.as_str()).collect();
        let more = self.inodes.plan_directories(&late).into_iter();
        plan.numbers.extend(more.filter(|(name, _)| new.contains(name.as_str()) || !planned.contains(name)));
    }

    fn move_staged_files(&self, plan: &mut Move) -> Result<()> {
        let displaced: Vec<_> =
            plan.trees.iter().map(|(from, to)| (self.staging.displaced_inside(from), from, to)).collect();
        for (files, from, to) in displaced {
            let there = |target: &Target| Target::new(&moved(&target.directory, from, to), &target.component);
            // Once: those of a directory that has changed its place with another are inside that now.
            for staged in files.iter().filter(|staged| plan.progress.staged.insert(staged.ino())) {
                self.move_displaced_file(staged, &there);
            }
        }
        // Of two directories that change places: before those of one are in the other.
        let staged_below = |top: &str| [self.staging.tree(top), self.staging.reserved_below(top)].concat();
        let trees: Vec<_> = plan.trees.iter().map(|(from, to)| (from, to, staged_below(from))).collect();
        let exchange = trees.len() > 1;
        for (from, to, tree) in trees {
            let tree: Vec<_> = tree.into_iter().map(|staged| (staged.settled_version(), staged)).collect();
            let names = if tree.is_empty() { Vec::new() } else { self.names_below(&format!("{from}/"))? };
            for (version, staged) in tree {
                if exchange && plan.progress.staged.contains(&staged.ino()) {
                    continue;
                }
                // Replaced or removed elsewhere: the store leads to what is there now.
                if self.leave_if_not_among(&names, &staged, version.as_ref()) {
                    continue;
                }
                // Of two directories that change places all files are published: the store leads to them.
                if exchange && staged.published().is_some() {
                    self.staging.detach(&staged);
                    continue;
                }
                let target = staged.state().target.clone();
                let target = Target::new(&moved(&target.directory, from, to), &target.component);
                // The version before is moved with the names, and its name is noted with the new path.
                let replaces = staged.state().replaces.clone();
                let replaces_there = replaces.clone().map(|(name, object)| match is_inside(&name, from) {
                    true => (moved(&name, from, to), object),
                    false => (name, object),
                });
                staged.state().replaces = replaces_there;
                let began = std::mem::replace(&mut plan.progress.began, true);
                if self.staging.move_reserved(&staged, &target) {
                    plan.progress.staged.insert(staged.ino());
                    continue;
                }
                if let Err(error) = self.move_staged(&staged, target) {
                    staged.state().replaces = replaces;
                    if error.kind() == Kind::Stale {
                        plan.progress.began = began;
                        // The copy that took its place moves for it, if it is known here, or is found to have no name.
                        continue;
                    }
                    return Err(error);
                }
                plan.progress.staged.insert(staged.ino());
            }
        }
        Ok(())
    }

    fn move_names(&self, plan: &mut Move) -> Result<()> {
        let Move { trees, names, progress, .. } = plan;
        let _naming = self.naming();
        let mut now: HashMap<String, ObjectId> = HashMap::new();
        if trees.is_empty() {
            let names: Vec<&str> = names.iter().map(|(old, ..)| old.as_str()).collect();
            now.extend(self.pointees(&names)?);
        }
        for directory in trees.iter().flat_map(|(from, to)| [from, to]) {
            now.extend(self.names_below(&format!("{directory}/"))?);
        }
        let is_there = |(old, ..): &(String, String, u64)| now.contains_key(old);
        let is_gone = || !names.is_empty() || !trees.iter().any(|(from, _)| self.folders.exists(from));
        if progress.own && !progress.began && !names.iter().any(is_there) && is_gone() {
            return Err(Error::stale("another mount renamed or removed the directory"));
        }
        let planned: HashSet<ObjectId> = names.iter().map(|(_, _, object)| ObjectId(*object)).collect();
        let [old_names, new_names]: [HashSet<&str>; 2] = [
            names.iter().map(|(old, ..)| old.as_str()).collect(),
            names.iter().map(|(_, new, _)| new.as_str()).collect(),
        ];
        let mut dropped: HashSet<&str> =
            old_names.difference(&new_names).copied().filter(|name| now.contains_key(*name)).collect();
        let mut replaced = Vec::new();
        // New names first: a server that is killed here leaves an object with a name too many, or one whose name is in
        // the plan, and not one that nothing leads to.
        for (old, new, object) in names.iter() {
            let object = ObjectId(*object);
            let there = now.get(new).copied();
            let object = match now.get(old) {
                // Somebody else has saved it meanwhile.
                Some(newer) if !planned.contains(newer) && !progress.placed.contains(old) => *newer,
                _ if progress.placed.contains(new) => continue,
                Some(_) => object,
                // What it led to went from there when another object was put in its place.
                None if progress.placed.contains(old) => object,
                // A former server came further, or somebody has removed it: then what is at the new name goes, too, if it
                // leaves for another one.
                None => {
                    let leaves = there.is_some_and(|there| there != object && planned.contains(&there));
                    if leaves && old_names.contains(new.as_str()) {
                        dropped.insert(new);
                    }
                    continue;
                }
            };
            if there != Some(object) {
                let foreign = there.filter(|there| !planned.contains(there));
                self.suspect(foreign.as_slice());
                progress.began = true;
                match self.put_name(new, object) {
                    Ok(()) => replaced.extend(foreign),
                    // A name that has outlived its object stays where it is.
                    Err(error) if error.kind() == Kind::NotFound => {
                        self.warn(format!("{old:?} is not moved: {error}"));
                        dropped.remove(old.as_str());
                        progress.staying.insert(old.clone());
                        continue;
                    }
                    Err(error) => {
                        if !is_clear(&error) {
                            self.leave_open(foreign.into_iter().chain([object]));
                        }
                        return Err(error);
                    }
                }
            }
            progress.placed.insert(new.clone());
        }
        for name in dropped {
            progress.began = true;
            self.store.drop_name(name)?;
        }
        replaced.into_iter().for_each(|object| self.delete_unnamed(object));
        if progress.untidy || self.is_shared()? {
            // A save on another instance that has replaced one under its new name left it to the old one.
            planned.into_iter().for_each(|object| self.delete_unnamed(object));
        }
        Ok(())
    }

    /// Goes on with the moves that a former server began, each with the file in which it wrote it down. `notes` are the
    /// texts that it left.
    pub(super) fn finish_moves(&self, logs: Vec<MemoryFile>, notes: &[(String, String)]) {
        self.moves().done.extend(notes.iter().filter_map(|(key, _)| key.strip_prefix(DONE)?.parse::<u64>().ok()));
        for log in logs {
            let mut plan = match read(&log) {
                Ok(plan) => plan,
                Err(error) => {
                    self.warn(format!("a move of names that a former server began is not known: {error}"));
                    continue;
                }
            };
            if self.moves().done.contains(&plan.request) {
                continue;
            }
            match self.take_steps(&mut plan) {
                Ok(()) => self.remember(plan.request),
                Err(error) => {
                    self.warn(format!("a move of names that a former server began is not finished yet: {error}"));
                    plan.progress.untidy = true;
                    self.moves().unfinished.push((plan, Some(log)));
                }
            }
        }
    }
}

fn read(log: &MemoryFile) -> Result<Move> {
    let mut text = vec![0; log.file.metadata()?.len() as usize];
    log.file.read_exact_at(&mut text, 0)?;
    serde_json::from_slice(&text).map_err(|error| Error::malformed(error.to_string()))
}
