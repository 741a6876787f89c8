//! What a client has made in the store and no name leads to yet.
//!
//! vineyardd keeps blobs and objects of a client that dies for ever, and tells nobody whose they were. So a client may
//! keep a list outside of its process; whoever comes after it removes what is on the list and still leads nowhere.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use super::id::ObjectId;

/// Keeps a list, in place of the one before. Must not block for long.
pub type Keep = Arc<dyn Fn(&str) + Send + Sync>;

#[derive(Default)]
struct State {
    blobs: BTreeSet<ObjectId>,
    /// Objects with their members.
    objects: HashMap<ObjectId, Vec<ObjectId>>,
}

/// See the [module](self). Without a keeper nothing is noted.
pub struct Journal {
    keep: Option<Keep>,
    state: Mutex<State>,
}

impl Journal {
    /// An empty list.
    pub fn new(keep: Option<Keep>) -> Self {
        Journal { keep, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn note(&self, change: impl FnOnce(&mut State)) {
        let Some(keep) = &self.keep else { return };
        // Kept in the order of the changes: the lock is held.
        let mut state = self.state();
        change(&mut state);
        keep(&state.text());
    }

    /// Blobs were made.
    pub fn blobs(&self, ids: impl Iterator<Item = ObjectId>) {
        self.note(|state| state.blobs.extend(ids.filter(|id| id.is_stored_blob())));
    }

    /// Objects were made, of these members.
    pub fn objects(&self, made: impl Iterator<Item = (ObjectId, Vec<ObjectId>)>) {
        self.note(|state| state.objects.extend(made));
    }

    /// These have a name, or are gone. The kept list goes on naming them until something else is made: who reads it
    /// finds that they need nothing.
    pub fn settled(&self, ids: &[ObjectId]) {
        if self.keep.is_none() {
            return;
        }
        let mut state = self.state();
        let mut todo = ids.to_vec();
        while let Some(id) = todo.pop() {
            state.blobs.remove(&id);
            todo.extend(state.objects.remove(&id).into_iter().flatten());
        }
    }
}

impl State {
    fn text(&self) -> String {
        let ids = self.objects.keys().chain(&self.blobs);
        ids.map(ObjectId::to_string).collect::<Vec<_>>().join(" ")
    }
}

/// Reads a list. What is no id is passed over.
pub fn parse(text: &str) -> Vec<ObjectId> {
    text.split_whitespace().filter_map(|id| id.parse().ok()).filter(|id| *id != ObjectId::EMPTY_BLOB).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_list_holds_what_leads_nowhere() {
        let kept = Arc::new(Mutex::new(String::new()));
        let keeper = kept.clone();
        let journal = Journal::new(Some(Arc::new(move |text: &str| *keeper.lock().unwrap() = text.to_owned())));
        let list = || {
            let mut list = parse(&kept.lock().unwrap());
            list.sort_unstable();
            list
        };
        let (blob, other) = (ObjectId(1 << 63 | 1), ObjectId(1 << 63 | 2));
        let (leaf, root) = (ObjectId(3), ObjectId(4));
        journal.blobs([blob, other, ObjectId::EMPTY_BLOB].into_iter());
        journal.objects([(leaf, vec![blob])].into_iter());
        journal.objects([(root, vec![leaf])].into_iter());
        assert_eq!(list(), [leaf, root, blob, other]);
        journal.settled(&[root]);
        journal.blobs(std::iter::empty());
        assert_eq!(list(), [other], "what a named object consists of is settled with it");
        assert!(parse("o1 nonsense o8000000000000000").is_empty());
    }
}
