//! Making trees of objects: the ids of their members, and the request ([`super::super::tree`]).

use super::{Client, Repeat};
use crate::error::{Context, Error, Kind, Result};
use crate::vineyard::id::{InstanceId, ObjectId};
use crate::vineyard::request::{CreateDataReply, Request};
use crate::vineyard::store::{NewObject, Store};
use crate::vineyard::tree::{Number, Tree};
use crate::vineyard::wire::{Broken, parse, push_frame};

/// Unused numbers that are kept.
const SPARE: usize = 1024;

/// Numbers that the vineyardd of a generation gave out, and that no object has.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    generation: u64,
    spare: Vec<Number>,
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
        let tree = Tree::new(objects, numbers, instance.id)?;
        // The journal takes the last one as made just now, and spare numbers, which come last, may be old.
        self.note(tree.ids().rev());
        fill()?;
        // In this order no object ever has a blob that is not sealed: other clients' listings fail on one, and vineyardd
        // does not free it with its object.
        let mut frames = Vec::new();
        let sealed = || blobs.iter().filter(|blob| blob.is_stored_blob());
        for blob in sealed() {
            push_frame(&mut frames, &Request::Seal { object_id: blob.0 })?;
        }
        let seals = sealed().count();
        push_frame(&mut frames, &Request::CreateData { content: tree.root() })?;
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
                    tracing::warn!(object = %root, "an object of a failed save could not be deleted: {left}");
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
