//! Making blobs.

use super::{Client, Repeat};
use crate::error::{Context, Error, Result};
use crate::vineyard::connection::Connection;
use crate::vineyard::id::ObjectId;
use crate::vineyard::journal::now_ms;
use crate::vineyard::request::{CreateBufferReply, Request};
use crate::vineyard::store::{NewBlob, Store};
use crate::vineyard::wire::{Broken, bad_reply};

impl Client {
    /// As [`Store::create_blobs`]. Each blob by a request of its own, back to back: of a `create_buffers` that does not
    /// fit as a whole, vineyardd 0.24.2 keeps the part that does, and tells nobody its ids.
    ///
    /// The first request makes nothing: vineyardd ends a connection where a reply finds no reader, so a vineyardd that was
    /// stuck, and finds the requests of somebody who waits no longer, meets that before it makes a blob that nobody will
    /// ever know of.
    pub(super) fn make_blobs(&self, sizes: &[u64]) -> Result<Vec<NewBlob>> {
        let wanted = sizes.iter().filter(|&&size| size > 0);
        let count = wanted.clone().count();
        let requests: Vec<Request> =
            std::iter::once(&0).chain(wanted).map(|&size| Request::CreateBuffer { size }).collect();
        let mut made: Vec<NewBlob> = Vec::with_capacity(count);
        let journal = self.journal.as_ref().filter(|_| count > 0);
        let asked = journal.map(|journal| Ok::<_, Error>((journal, journal.ask(sizes)?))).transpose()?;
        let mut sent = None;
        let make = |connection: &mut Connection| {
            let begun = now_ms();
            let mut is_heard = false;
            let answers = connection.calls(&requests, "create_buffer_reply", |connection, reply: CreateBufferReply| {
                let payload = reply.created;
                if !std::mem::replace(&mut is_heard, true) && payload.object_id == ObjectId::EMPTY_BLOB.0 {
                    return Ok(());
                }
                let fds: &[i64] = if reply.fd >= 0 { &[reply.fd] } else { &[] };
                connection.accept_files(&self.memories, fds, &[payload])?;
                let (file, blob) = connection.locate(&payload)?;
                if !blob.key().id.is_stored_blob() || reply.id != payload.object_id {
                    return Err(bad_reply(format!("names the new blob {} as {}", blob.key().id, ObjectId(reply.id))));
                }
                let offset = payload.data_offset;
                made.push(NewBlob { id: blob.key().id, size: blob.len(), file: Some(file.file.clone()), offset });
                Ok(())
            });
            // Where not even the first was answered when the connection was closed for replies, no other is carried out.
            let may_be_made = |broken: &Broken| broken.sent && (is_heard || !connection.is_hung_up());
            sent = answers.as_ref().is_err_and(may_be_made).then_some((begun, connection.generation));
            answers
        };
        let answers = if count > 0 { self.run(Repeat::UnlessSent, make) } else { Ok(Vec::new()) };
        if let Some((journal, asked)) = asked {
            let ids: Vec<ObjectId> = made.iter().map(|blob| blob.id).collect();
            match sent {
                // vineyardd may have made more of them, or may still do so.
                Some((sent, generation)) => journal.failed(asked, &ids, sent, generation),
                None => journal.answered(asked, ids),
            }
        }
        let refusal = answers.and_then(|answers| match answers.into_iter().find_map(|answer| answer.err()) {
            Some(refusal) => Err(refusal.into()),
            None => Ok(()),
        });
        if let Err(error) = refusal {
            self.give_back(&made);
            return Err(error).context(|| format!("creating {} blobs", sizes.len()));
        }
        let mut made = made.into_iter();
        let mut blobs = Vec::with_capacity(sizes.len());
        for &size in sizes {
            if size == 0 {
                blobs.push(NewBlob { id: ObjectId::EMPTY_BLOB, size: 0, file: None, offset: 0 });
                continue;
            }
            match made.next() {
                Some(blob) if blob.size == size => blobs.push(blob),
                other => {
                    blobs.extend(other);
                    blobs.extend(made);
                    self.give_back(&blobs);
                    return Err(Error::malformed("vineyardd made blobs of other sizes than it was asked for"));
                }
            }
        }
        Ok(blobs)
    }

    /// Gives back what an unfinished [`Store::create_blobs`] has made; what can't be given back now is noted.
    fn give_back(&self, made: &[NewBlob]) {
        let ids: Vec<ObjectId> = made.iter().map(|blob| blob.id).collect();
        self.take_back(&[], &ids);
    }
}
