//! Metadata of many objects, in requests that are answered in good time.

use serde_json::Value;

use super::{Client, Repeat};
use crate::error::{Error, Kind, Result};
use crate::vineyard::ObjectId;
use crate::vineyard::request::{GetDataReply, Request};

/// Objects in the first `get_data` of many; later ones are sized by what came back.
const FIRST_BATCH: usize = 64;
/// Most objects in one `get_data`.
const LARGEST_BATCH: usize = 512;
/// Size in bytes that the reply to one `get_data` should have. vineyardd has one thread for all metadata, so a larger
/// one would keep everybody waiting (it makes about 10 MB/s).
const BATCH_BYTES: usize = 512 << 10;
/// `get_data` requests that are sent back to back.
const BATCHES_AHEAD: usize = 8;

impl Client {
    /// Metadata by text id, in batches that are answered in good time. An object whose metadata is beyond parsing maps
    /// to the error.
    pub(super) fn get_data(
        &self,
        ids: &[ObjectId],
        sync: bool,
        mut each: impl FnMut(ObjectId, Result<Value>),
    ) -> Result<()> {
        let mut wanted: Vec<u64> = ids.iter().filter(|&&id| id != ObjectId::INVALID).map(|id| id.0).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let mut todo: &[u64] = &wanted;
        let mut batch = FIRST_BATCH;
        // While one reply is parsed, the server makes the next.
        let mut window = BATCHES_AHEAD;
        let mut sync = sync;
        while !todo.is_empty() {
            let (now, later) = todo.split_at(batch.saturating_mul(window).min(todo.len()));
            let requests: Vec<Request> = now
                .chunks(batch)
                .enumerate()
                .map(|(i, ids)| Request::GetData { id: ids.to_vec(), sync_remote: sync && i == 0, wait: false })
                .collect();
            let mut size = 0;
            let replies = self.run(Repeat::Safe, |connection| {
                size = 0;
                connection.calls(&requests, "get_data_reply", |connection, reply: GetDataReply| {
                    size += connection.last_reply_len();
                    Ok(reply.content.map(|content| content.0).unwrap_or_default())
                })
            });
            match replies {
                Ok(replies) => {
                    for reply in replies {
                        for (text, value) in reply? {
                            match text.parse::<ObjectId>() {
                                Ok(id) if now.binary_search(&id.0).is_ok() => each(id, Ok(value)),
                                _ => {
                                    let what = format!("vineyardd sent metadata of {text:?} unasked");
                                    return Err(Error::malformed(what));
                                }
                            }
                        }
                    }
                    todo = later;
                    batch = (BATCH_BYTES / (size / now.len()).max(1)).clamp(1, LARGEST_BATCH);
                    window = BATCHES_AHEAD;
                    sync = false;
                }
                // One object may spoil the reply for all (nesting that no parser accepts): find it by halving.
                Err(error) if error.kind() == Kind::Malformed => match now {
                    [id] => {
                        each(ObjectId(*id), Err(error));
                        todo = later;
                    }
                    _ if requests.len() > 1 => window = 1,
                    _ => batch = now.len() / 2,
                },
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
