//! A tree of objects in one request.
//!
//! A member of a new object may be given with all its metadata instead of by its id alone; vineyardd then makes it as well
//! if it does not exist (`diff_data_meta_tree` and `generate_put_ops`, `src/server/util/meta_tree.cc` of v6d 0.24), all
//! members and the root in one step, or nothing. Its id and signature are the client's to choose. They must be unique, so
//! they are numbers that this vineyardd has given out for something else: each blob has one, and no object or signature
//! ever gets that ([`ObjectId::object_beside`]); and what it made a signature is no object's id, nor the other way round.

use std::cell::RefCell;

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;

use super::content;
use super::id::{InstanceId, ObjectId};
use super::journal::now_ms;
use super::store::NewObject;
use crate::error::{Error, Kind, Result};

/// What a new object may be called.
#[derive(Clone, Copy, Debug)]
pub struct Number {
    /// No object has this id.
    pub id: ObjectId,
    /// Nor this signature.
    pub signature: u64,
}

impl Number {
    /// The number that the store gave to a blob of an instance.
    pub fn beside(blob: ObjectId, instance: InstanceId) -> Number {
        let id = blob.object_beside(instance);
        Number { id, signature: id.0 }
    }
}

/// A tree of objects that is about to be made.
#[derive(Debug)]
pub struct Tree {
    objects: Vec<NewObject>,
    /// Of all but the root.
    numbers: Vec<Number>,
    now_ms: u64,
    /// Objects that were written whole since the root began. A member of several objects is written once.
    written: RefCell<Vec<bool>>,
}

/// An object of a tree with its members inside.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    tree: &'a Tree,
    index: usize,
}

impl Serialize for Member<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let Member { tree, index } = *self;
        let missing = || serde::ser::Error::custom("a member that is not in the tree");
        let object = tree.objects.get(index).ok_or_else(missing)?;
        if index + 1 == tree.objects.len() {
            // The root: all begins anew.
            tree.written.borrow_mut().fill(false);
        }
        let known = tree.written.borrow_mut().get_mut(index).is_some_and(|written| std::mem::replace(written, true));
        let mut map = serializer.serialize_map(None)?;
        if let Some(Number { id, signature }) = tree.numbers.get(index) {
            map.serialize_entry("id", &id.to_string())?;
            map.serialize_entry("signature", signature)?;
            map.serialize_entry("__timestamp", &tree.now_ms)?;
        }
        for (key, value) in &object.content {
            // What links to an object are made of must be there each time.
            if !known || matches!(key.as_str(), "typename" | "instance_id" | "transient") {
                map.serialize_entry(key, value)?;
            }
        }
        for (key, index) in object.members.iter().filter(|_| !known) {
            map.serialize_entry(key, &Member { tree, index: *index })?;
        }
        map.end()
    }
}

impl Tree {
    /// Checks and completes all objects; there is a number for all but the last, the root.
    ///
    /// # Errors
    /// `Invalid`, or `Internal` for a member that is not before its object.
    pub fn new(mut objects: Vec<NewObject>, numbers: Vec<Number>, instance: InstanceId) -> Result<Tree> {
        for (index, object) in objects.iter_mut().enumerate() {
            content::complete_in_place(&mut object.content, instance)?;
            for (key, member) in &object.members {
                content::check_key(key)?;
                if *member >= index || object.content.contains_key(key) {
                    return Err(Error::new(Kind::Internal, format!("the member {key:?} is not before its object")));
                }
            }
            // A member's own are chosen here.
            if ["id", "signature", "__timestamp"].iter().any(|key| object.content.contains_key(*key)) {
                return Err(Error::new(Kind::Invalid, "a new object that brings its own id"));
            }
        }
        if let Some(root) = objects.last_mut() {
            root.content.entry("global").or_insert(Value::Bool(false));
        }
        let written = RefCell::new(vec![false; objects.len()]);
        Ok(Tree { objects, numbers, now_ms: now_ms(), written })
    }

    /// The root with all that lies inside.
    pub fn root(&self) -> Member<'_> {
        Member { tree: self, index: self.objects.len().saturating_sub(1) }
    }

    /// The ids that all but the root will have.
    pub fn ids(&self) -> impl DoubleEndedIterator<Item = ObjectId> + '_ {
        self.numbers.iter().map(|number| number.id)
    }
}
