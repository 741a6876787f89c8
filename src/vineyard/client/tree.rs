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

use super::{Client, Repeat};
use crate::error::{Context, Error, Kind, Result};
use crate::vineyard::content;
use crate::vineyard::id::{InstanceId, ObjectId};
use crate::vineyard::journal::now_ms;
use crate::vineyard::request::{CreateDataReply, Request};
use crate::vineyard::store::{NewObject, Store};
use crate::vineyard::wire::{Broken, parse, push_frame};

/// Unused numbers that are kept.
const SPARE: usize = 1024;

/// Numbers that the vineyardd of a generation gave out, and that no object has.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    generation: u64,
    spare: Vec<Number>,
}

/// What a new object may be called.
#[derive(Clone, Copy, Debug)]
struct Number {
    /// No object has this id.
    id: ObjectId,
    /// Nor this signature.
    signature: u64,
}

impl Number {
    fn beside(blob: ObjectId, instance: InstanceId) -> Number {
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
    /// Objects that were written whole. A member of several objects is written once.
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

impl Client {
    /// As [`Store::create_tree`].
    pub(super) fn make_tree(
        &self,
        blobs: &[ObjectId],
        objects: Vec<NewObject>,
        fill: &mut dyn FnMut() -> Result<()>,
    ) -> Result<ObjectId> {
        let members =
            objects.len().checked_sub(1).ok_or_else(|| Error::new(Kind::Internal, "a tree without objects"))?;
        let instance = self.instance()?;
        let numbers = self.numbers(instance.generation, instance.id, members, blobs)?;
        let tree = checked(objects, numbers, instance.id)?;
        // The journal takes the last one as made just now, and spare numbers, which come last, may be old.
        self.note(tree.numbers.iter().rev().map(|number| number.id));
        fill()?;
        // In this order no object ever has a blob that is not sealed: other clients' listings fail on one, and vineyardd
        // does not free it with its object.
        let mut frames = Vec::new();
        let sealed = || blobs.iter().filter(|blob| blob.is_stored_blob());
        for blob in sealed() {
            push_frame(&mut frames, &Request::Seal { object_id: blob.0 })?;
        }
        let seals = sealed().count();
        push_frame(&mut frames, &Request::CreateData { content: Member { tree: &tree, index: members } })?;
        let created = self.run(Repeat::UnlessSent, |connection| {
            if connection.generation != instance.generation {
                return Ok(Err(Error::stale("vineyardd was restarted while a dataset was stored")));
            }
            let mut created = None;
            let mut refused = None;
            connection.exchange(&frames, seals + 1, |_, index, frame| {
                let refusal = if index == seals {
                    parse(frame, "create_data_reply")
                        .map(|reply| reply.map(|reply: CreateDataReply| created = Some(reply)))
                } else {
                    parse(frame, "seal_reply").map(|reply| reply.map(|_: crate::vineyard::request::Empty| ()))
                };
                if let Err(refusal) = refusal.map_err(|error| Broken { error, sent: true })? {
                    refused.get_or_insert(refusal);
                }
                Ok(())
            })?;
            Ok(Ok((created, refused)))
        });
        let (created, refused) = created.context(|| "creating objects".into())?;
        let root = created.as_ref().map(|reply| ObjectId(reply.id));
        self.note(root);
        let verdict = match refused {
            Some(refusal) => Err(Error::from(refusal)).context(|| "creating objects".into()),
            None => Ok(()),
        };
        match (verdict, created) {
            (Ok(()), Some(CreateDataReply { id, signature })) => {
                self.keep_numbers(instance.generation, [Number { id: ObjectId(signature), signature: id }]);
                crate::vineyard::request::checked_id(id)
            }
            (Ok(()), None) => Err(Error::malformed("vineyardd answered nothing to new objects")),
            (Err(error), _) => {
                if let Some(root) = root
                    && let Err(left) = self.delete(&[root])
                {
                    tracing::warn!(object = %root, error = %left, "an object of a failed save could not be deleted");
                }
                Err(error)
            }
        }
    }

    /// So many numbers that no object has: first those of these blobs, which were made for the objects.
    fn numbers(&self, generation: u64, instance: InstanceId, count: usize, blobs: &[ObjectId]) -> Result<Vec<Number>> {
        let beside = |blob: &ObjectId| Number::beside(*blob, instance);
        let mut numbers: Vec<Number> = blobs.iter().filter(|blob| blob.is_stored_blob()).map(beside).collect();
        if numbers.len() > count {
            self.keep_numbers(generation, numbers.split_off(count));
        }
        if numbers.len() < count {
            let mut kept = self.numbers.lock().unwrap_or_else(|e| e.into_inner());
            if kept.generation == generation {
                let from = kept.spare.len().saturating_sub(count - numbers.len());
                numbers.extend(kept.spare.drain(from..));
            }
        }
        if numbers.len() < count {
            // The store gives one to each blob, however short it lives.
            let made = self.create_blobs(&vec![1; count - numbers.len()])?;
            let made: Vec<ObjectId> = made.iter().map(|blob| blob.id).collect();
            self.drop_blobs(&made)?;
            numbers.extend(made.iter().map(beside));
        }
        Ok(numbers)
    }

    fn keep_numbers(&self, generation: u64, numbers: impl IntoIterator<Item = Number>) {
        let mut kept = self.numbers.lock().unwrap_or_else(|e| e.into_inner());
        if kept.generation != generation {
            *kept = Numbers { generation, spare: Vec::new() };
        }
        let room = SPARE.saturating_sub(kept.spare.len());
        kept.spare.extend(numbers.into_iter().take(room));
    }
}

/// Checks and completes all objects.
fn checked(mut objects: Vec<NewObject>, numbers: Vec<Number>, instance: InstanceId) -> Result<Tree> {
    for (index, object) in objects.iter_mut().enumerate() {
        content::complete_in_place(&mut object.content, instance)?;
        for (key, member) in &object.members {
            content::check_key(key)?;
            if *member >= index || object.content.contains_key(key) {
                return Err(Error::new(Kind::Internal, format!("the member {key:.80?} is not before its object")));
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
