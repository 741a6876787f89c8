//! Moves of many names at once: renames of directories, and exchanges.
//!
//! A server may be killed in the middle. So where everything will be afterwards is written into a memory file of the
//! host's before the first step, and the next server takes all steps again that are missing, before it answers its first
//! request ([`FileSystem::finish_moves`]). Each step sets a final state and may be taken twice. A move that was finished,
//! and whose request comes again because nobody answered it, is known by the request's number.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::folders::Folder;
use super::host::{Area, MemoryFile};
use super::name::is_inside;
use super::resolve::Target;
use super::{Caller, FileSystem};
use crate::error::{Error, Kind, Result};
use crate::sync::MutexGuard;
use crate::vineyard::ObjectId;
use crate::vineyard::store::NamedObject;

/// What the host's texts of finished moves begin with.
const DONE: &str = "moved:";
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
}

/// What is known of moves of this server and of former ones.
#[derive(Default)]
pub(super) struct Moves {
    /// Numbers of the requests whose work is done.
    done: VecDeque<u64>,
    /// What a former server began and this one could not finish yet, with the files that say so.
    unfinished: Vec<(Move, MemoryFile)>,
}

impl FileSystem {
    /// Renames a directory; the new name is free or an empty directory's.
    pub(super) fn move_directory(&self, from: &str, to: &str, caller: Caller) -> Result<()> {
        self.carry_out(&self.plan_trees(&[(from, to)], caller)?)
    }

    /// Lets two directories change places.
    pub(super) fn exchange_directories(&self, a: &str, b: &str, caller: Caller) -> Result<()> {
        self.carry_out(&self.plan_trees(&[(a, b), (b, a)], caller)?)
    }

    /// Lets two names change their objects.
    pub(super) fn exchange_names(&self, a: (&str, ObjectId), b: (&str, ObjectId), caller: Caller) -> Result<()> {
        let names = vec![(a.0.to_owned(), b.0.to_owned(), a.1.0), (b.0.to_owned(), a.0.to_owned(), b.1.0)];
        self.carry_out(&Move { request: caller.request, names, ..Move::default() })
    }

    /// For a request that a former server had begun to work on: the outcome, if that server had written down a move. What
    /// could not be finished when this server began is tried again.
    pub(super) fn resume_move(&self, caller: Caller) -> Option<Result<()>> {
        if !caller.resent {
            return None;
        }
        if self.moves().done.contains(&caller.request) {
            return Some(Ok(()));
        }
        let place = self.moves().unfinished.iter().position(|(plan, _)| plan.request == caller.request)?;
        let (plan, _log) = self.moves().unfinished.remove(place);
        let result = self.take_steps(&plan);
        if result.is_ok() {
            self.remember(plan.request);
        }
        Some(result)
    }

    fn moves(&self) -> MutexGuard<'_, Moves> {
        self.moves.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn plan_trees(&self, trees: &[(&str, &str)], caller: Caller) -> Result<Move> {
        let mut plan = Move { request: caller.request, ..Move::default() };
        let mut directories = Vec::new();
        for (from, to) in trees {
            plan.trees.push(((*from).to_owned(), (*to).to_owned()));
            let moved = |name: &str| format!("{to}{}", name.get(from.len()..).unwrap_or_default());
            let names = self.names_below(&format!("{from}/"))?;
            directories.extend(self.tree(from, &names).into_iter().map(|name| (moved(&name), name)));
            plan.names.extend(names.into_iter().map(|(name, object)| (name.clone(), moved(&name), object.0)));
        }
        plan.folders = self.folders.plan_moves(trees);
        // The kernel keeps the numbers when it renames. It may know those of a former server, too.
        directories.retain(|(_, old)| self.options.epoch > 0 || self.inodes.get(self.inodes.directory(old)).is_some());
        plan.numbers = self.inodes.plan_directories(&directories);
        Ok(plan)
    }

    /// A directory and all below it, whether objects' names lie under them or not. `names` are all of those.
    fn tree(&self, top: &str, names: &[NamedObject]) -> BTreeSet<String> {
        let prefix = format!("{top}/");
        let mut tree = BTreeSet::from([top.to_owned()]);
        let names = names.iter().filter_map(|(name, _)| Some(name.rsplit_once('/')?.0.to_owned()));
        let staged = self.staging.directories().into_iter().filter(|directory| directory.starts_with(&prefix));
        for directory in names.chain(staged).chain(self.folders.below(&prefix)) {
            let parts = directory.match_indices('/').map(|(at, _)| at).filter(|at| *at > top.len());
            tree.extend(parts.map(|at| directory.get(..at).unwrap_or_default().to_owned()));
            tree.insert(directory);
        }
        tree
    }

    fn carry_out(&self, plan: &Move) -> Result<()> {
        let log = self.log(plan);
        self.take_steps(plan)?;
        if log.is_some() {
            self.remember(plan.request);
        }
        Ok(())
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

    fn take_steps(&self, plan: &Move) -> Result<()> {
        for (from, to) in &plan.trees {
            let tree = self.staging.tree(from);
            let names = if tree.is_empty() { Vec::new() } else { self.names_below(&format!("{from}/"))? };
            for staged in tree {
                // Replaced or removed elsewhere: the store leads to what is there now.
                if staged.is_superseded(&names) {
                    self.staging.detach(&staged);
                    continue;
                }
                // Of two directories that change places all files are published: the store leads to them.
                if plan.trees.len() > 1 && staged.published().is_some() {
                    self.staging.detach(&staged);
                    continue;
                }
                let mut target = staged.state().target.clone();
                target.directory = format!("{to}{}", target.directory.get(from.len()..).unwrap_or_default());
                let target = Target::new(&target.directory, &target.component);
                // The version before is moved with the names, and its name is noted with the new path.
                let replaces = staged.state().replaces.clone();
                let replaces_there = replaces.clone().map(|(name, object)| match is_inside(&name, from) {
                    true => (format!("{to}{}", name.get(from.len()..).unwrap_or_default()), object),
                    false => (name, object),
                });
                staged.state().replaces = replaces_there;
                if let Err(error) = self.move_staged(&staged, target) {
                    staged.state().replaces = replaces;
                    return Err(error);
                }
            }
        }
        self.move_names(plan)?;
        self.folders.set(&plan.folders);
        for (name, number) in &plan.numbers {
            self.folders.keep_number(name, Some(*number));
        }
        self.inodes.set_directories(&plan.numbers);
        Ok(())
    }

    fn move_names(&self, plan: &Move) -> Result<()> {
        let _naming = self.naming();
        let mut now: HashMap<String, ObjectId> = HashMap::new();
        if plan.trees.is_empty() {
            let names: Vec<&str> = plan.names.iter().map(|(old, ..)| old.as_str()).collect();
            now.extend(self.pointees(&names)?);
        }
        for directory in plan.trees.iter().flat_map(|(from, to)| [from, to]) {
            now.extend(self.names_below(&format!("{directory}/"))?);
        }
        let planned: HashSet<ObjectId> = plan.names.iter().map(|(_, _, object)| ObjectId(*object)).collect();
        let new: HashSet<&str> = plan.names.iter().map(|(_, new, _)| new.as_str()).collect();
        // New names first: a server that is killed here leaves an object with a name too many, or one whose name is in
        // the plan, and not one that nothing leads to.
        for (old, new, object) in &plan.names {
            let object = ObjectId(*object);
            let object = match now.get(old) {
                // Somebody else has saved it meanwhile.
                Some(newer) if !planned.contains(newer) => *newer,
                Some(_) => object,
                // A former server came further, or somebody has removed it.
                None => continue,
            };
            if now.get(new) != Some(&object) {
                self.put_name(new, object)?;
            }
        }
        for (old, ..) in plan.names.iter().filter(|(old, ..)| !new.contains(old.as_str()) && now.contains_key(old)) {
            self.store.drop_name(old)?;
        }
        if self.is_shared()? {
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
            let plan = match read(&log) {
                Ok(plan) => plan,
                Err(error) => {
                    self.warn(format!("a move of names that a former server began is not known: {error}"));
                    continue;
                }
            };
            if self.moves().done.contains(&plan.request) {
                continue;
            }
            match self.take_steps(&plan) {
                Ok(()) => self.remember(plan.request),
                Err(error) => {
                    self.warn(format!("a move of names that a former server began is not finished yet: {error}"));
                    self.moves().unfinished.push((plan, log));
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
