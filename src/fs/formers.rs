//! Former names of a path: what a new value leaves behind that is stored under another name than the one before.
//!
//! The bytes decide whether a file has its name by its stem or by its whole name. So a save or a rename that changes the
//! kind of a path's value puts the new name and drops the former one, in this order, as the path must lead somewhere at
//! any time. Between the two it has two values, and nothing in the store tells that from two datasets which have nothing
//! to do with each other. So what is to be dropped is noted with the host before the new name is put: the next server
//! drops it, if this one is killed, and this one does so later, if the store refused.

use serde::{Deserialize, Serialize};

use super::FileSystem;
use super::naming::is_clear;
use crate::error::{Error, Result};
use crate::sync::{Mutex, MutexGuard};
use crate::vineyard::ObjectId;
use crate::vineyard::store::NamedObject;

/// What the host's texts of changes begin with.
const KEY: &str = "former:";

/// A change of the name of a path's value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NameChange {
    /// The new name.
    name: String,
    /// The new value.
    object: u64,
    /// The names that are to be dropped, and what they lead to.
    formers: Vec<(String, u64)>,
    /// The new name is known to have been put. It may have been removed since.
    put: bool,
}

impl NameChange {
    fn key(&self) -> String {
        format!("{KEY}{}", self.name)
    }

    fn concerns(&self, names: &[&str]) -> bool {
        let mut own = self.formers.iter().map(|(name, _)| name).chain([&self.name]);
        own.any(|name| names.contains(&name.as_str()))
    }
}

/// Changes that could not be finished yet.
#[derive(Default)]
pub(super) struct Unfinished(Mutex<Vec<NameChange>>);

impl Unfinished {
    fn list(&self) -> MutexGuard<'_, Vec<NameChange>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl FileSystem {
    /// Before a name is put to an object, when these names lead to the path's former values: notes which are to be
    /// dropped. Nothing if there are none. The lock on names is held until the change has ended.
    pub(super) fn begin_change(&self, name: &str, object: ObjectId, old: &[NamedObject]) -> Option<NameChange> {
        let formers = old.iter().filter(|(former, _)| former != name).map(|(former, id)| (former.clone(), id.0));
        let change = NameChange { name: name.to_owned(), object: object.0, formers: formers.collect(), put: false };
        if change.formers.is_empty() {
            return None;
        }
        self.note_change_of(&change);
        Some(change)
    }

    /// After the name was put: drops the former ones, and what only they led to. False if one led elsewhere by then.
    pub(super) fn end_change(&self, change: Option<NameChange>) -> bool {
        let Some(mut change) = change else { return true };
        change.put = true;
        match self.drop_formers(&mut change) {
            Ok(led_there) => {
                self.host.note(&change.key(), None);
                led_there
            }
            Err(error) => {
                let formers: Vec<&String> = change.formers.iter().map(|(former, _)| former).collect();
                self.warn(format!("{formers:?}, replaced by {:?}, is removed later: {error}", change.name));
                self.keep_change(change);
                true
            }
        }
    }

    /// A file has moved away from what its path led to: drops that, now or, if the store refuses, later. False if it leads
    /// elsewhere already.
    pub(super) fn leave_behind(&self, (name, object): NamedObject) -> bool {
        let _naming = self.naming();
        let formers = vec![(name.clone(), object.0)];
        let change = NameChange { name, object: ObjectId::EMPTY_BLOB.0, formers, put: true };
        self.note_change_of(&change);
        self.end_change(Some(change))
    }

    /// After the name was not put, because of an error.
    pub(super) fn give_up_change(&self, change: Option<NameChange>, error: &Error) {
        match change {
            Some(change) if is_clear(error) => self.host.note(&change.key(), None),
            // It may be put yet.
            Some(change) => self.keep_change(change),
            None => {}
        }
    }

    /// Finishes what could not be finished before: of these names, of which one is about to get another value or to be
    /// removed, or else of all.
    ///
    /// # Errors
    /// What the store answers.
    pub(super) fn finish_changes(&self, names: Option<&[&str]>) -> Result<()> {
        // Most often there is nothing to do, and the lock takes its time.
        if self.changing.list().is_empty() {
            return Ok(());
        }
        let _naming = self.naming();
        self.finish_changes_locked(names)
    }

    /// As [`FileSystem::finish_changes`], with the lock on names held.
    ///
    /// # Errors
    /// As there.
    pub(super) fn finish_changes_locked(&self, names: Option<&[&str]>) -> Result<()> {
        let concerned = |change: &mut NameChange| names.is_none_or(|names| change.concerns(names));
        let concerned: Vec<NameChange> = self.changing.list().extract_if(.., concerned).collect();
        let mut result = Ok(());
        for mut change in concerned {
            match self.finish_change(&mut change) {
                // Whatever else is put now comes after what was never seen of it.
                Ok(ended) if ended || names.is_some() => self.host.note(&change.key(), None),
                Ok(_) => self.changing.list().push(change),
                Err(error) => {
                    self.keep_change(change);
                    result = Err(error);
                }
            }
        }
        result
    }

    /// False if the new name has not been put, and may still be.
    fn finish_change(&self, change: &mut NameChange) -> Result<bool> {
        let object = ObjectId(change.object);
        if !change.put && self.object_of(&change.name)? != Some(object) {
            return Ok(!self.store.metas(&[object], true)?.contains_key(&object));
        }
        change.put = true;
        self.drop_formers(change)?;
        Ok(true)
    }

    /// False if one led elsewhere.
    fn drop_formers(&self, change: &mut NameChange) -> Result<bool> {
        let mut led_there = true;
        while let Some((former, id)) = change.formers.last() {
            led_there &= self.drop_former(former, ObjectId(*id), ObjectId(change.object))?;
            change.formers.pop();
        }
        Ok(led_there)
    }

    fn drop_former(&self, former: &str, id: ObjectId, replaced_by: ObjectId) -> Result<bool> {
        // The new value is the old one, renamed.
        if id == replaced_by {
            let leads_there = self.object_of(former)? == Some(id);
            if leads_there {
                self.store.drop_name(former)?;
                self.end_listed(former, id);
            }
            return Ok(leads_there);
        }
        self.remove_version_locked(former, id).inspect_err(|error| {
            if !is_clear(error) {
                self.leave_open([id]);
            }
        })
    }

    fn keep_change(&self, change: NameChange) {
        self.note_change_of(&change);
        self.changing.list().push(change);
    }

    fn note_change_of(&self, change: &NameChange) {
        if let Ok(text) = serde_json::to_string(change) {
            self.host.note(&change.key(), Some(&text));
        }
    }

    /// Finishes the changes that a former server began.
    pub(super) fn adopt_changes(&self, notes: &[(String, String)]) {
        let texts = notes.iter().filter(|(key, _)| key.starts_with(KEY));
        let changes = texts.filter_map(|(_, text)| serde_json::from_str(text).ok());
        self.changing.list().extend(changes);
        if let Err(error) = self.finish_changes(None) {
            self.warn(format!("former names that a former server was to drop are dropped later: {error}"));
        }
    }
}
