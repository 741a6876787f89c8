//! Blobs that vineyardd may have made for a process that was killed before it could read their ids, or that heard nothing
//! in time. What matches by size and time may as well be somebody else's: it is only told of, and never dropped.

use std::time::{Duration, Instant};

use super::{Client, Repeat};
use crate::error::Result;
use crate::vineyard::id::ObjectId;
use crate::vineyard::journal::Wish;
use crate::vineyard::store::Store;

/// Numbers of ids before they begin anew.
const SEQUENCES: u64 = 4096;
/// Milliseconds in which the numbers may have gone all around.
const WRAPS: u64 = 10_000;
/// Ids that are tried with one request: vineyardd answers nobody else for 25 ms.
const BATCH: usize = 1 << 16;
/// How long others have vineyardd for themselves before the next batch.
const PAUSE: Duration = Duration::from_millis(25);
/// Most milliseconds after a wish that its blobs are looked for. vineyardd makes them as soon as it reads the request; the
/// longer this is, the more blobs of others come into question.
const LATEST: u64 = 1_000;
/// A vineyardd that takes so long to answer was stuck. It has then just carried out what else it was asked for meanwhile.
const STUCK: Duration = Duration::from_millis(300);

impl Client {
    /// As [`Store::unanswered`].
    pub(super) fn find_unanswered(&self, wish: &Wish) -> Result<Vec<ObjectId>> {
        // An id of now ends the numbers that may have been given to them.
        let asked = Instant::now();
        let Some(probe) = self.create_blobs(&[1])?.pop() else { return Ok(Vec::new()) };
        let was_stuck = asked.elapsed() > STUCK;
        self.drop_blobs(&[probe.id])?;
        if let Some(generation) = wish.generation
            && self.instance()?.generation != generation
        {
            // What the former vineyardd made is gone with it.
            return Ok(Vec::new());
        }
        let mut candidates = candidates(wish, probe.id, was_stuck).peekable();
        let mut unsealed = Vec::new();
        loop {
            // The likeliest come first: vineyardd is seldom late.
            let batch: Vec<ObjectId> = candidates.by_ref().take(BATCH).collect();
            if !batch.is_empty() {
                unsealed.extend(self.run(Repeat::Safe, |connection| connection.unsealed(&self.memories, &batch))?);
            }
            let found = matching(wish, unsealed.clone());
            if found.len() == wish.sizes.len() || candidates.peek().is_none() {
                return Ok(found);
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// The ids that blobs of a wish can have, if `end` was made after them, by their times. `was_stuck`: vineyardd was,
/// until just before it made `end`.
fn candidates(wish: &Wish, end: ObjectId, was_stuck: bool) -> impl Iterator<Item = ObjectId> + use<> {
    let (first, count) = match wish.after {
        ObjectId::INVALID => (end.sequence(), SEQUENCES),
        // Where the numbers went all around, or may have because the clock was set back, none is known to be out.
        after if end.made_ms().checked_sub(after.made_ms()).is_none_or(|passed| passed > WRAPS) => {
            (end.sequence(), SEQUENCES)
        }
        after => (after.sequence() + 1, (end.sequence() + SEQUENCES - after.sequence() - 1) % SEQUENCES),
    };
    // The clock may have been read just before a millisecond ended.
    let since = wish.since.saturating_sub(1);
    // An end before the beginning is one of a clock that was set back.
    let made = end.made_ms();
    let end = Some(made).filter(|&end| end >= since).unwrap_or(u64::MAX);
    let until = end.min(wish.until).min(since.saturating_add(LATEST));
    let late = made.saturating_sub(LATEST).max(until.saturating_add(1))..=made;
    let numbers = move |ms| (first..first + count).map(move |number| ObjectId::blob_made(ms, number % SEQUENCES));
    let late = late.filter(move |_| was_stuck).rev();
    late.chain(since..=until).flat_map(numbers)
}

/// Those of unsealed blobs that may be the wish's: they were made one after the other, with its sizes.
fn matching(wish: &Wish, mut unsealed: Vec<(ObjectId, u64)>) -> Vec<ObjectId> {
    let start = match wish.after {
        ObjectId::INVALID => 0,
        after => after.sequence() + 1,
    };
    unsealed.sort_by_key(|(id, _)| (id.made_ms(), (id.sequence() + SEQUENCES - start % SEQUENCES) % SEQUENCES));
    let mut sizes = wish.sizes.iter().peekable();
    let is_next = |(id, size)| sizes.next_if(|wanted| **wanted == size).map(|_| id);
    unsealed.into_iter().filter_map(is_next).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(after: ObjectId, sizes: &[u64]) -> Wish {
        Wish { since: 1000, until: u64::MAX, after, sizes: sizes.to_vec(), generation: None }
    }

    #[test]
    fn candidates_lie_between_what_was_known_and_now() {
        let known = ObjectId::blob_made(990, 4094);
        let candidates = |wish: &Wish, end| super::candidates(wish, end, false).collect::<Vec<_>>();
        let found = candidates(&wish(known, &[5]), ObjectId::blob_made(1001, 2));
        let expected = |ms| [4095, 0, 1].map(|number| ObjectId::blob_made(ms, number));
        assert_eq!(found, [expected(999), expected(1000), expected(1001)].concat());
        assert!(candidates(&wish(known, &[5]), ObjectId::blob_made(1001, 4095)).is_empty());
        // What this process makes by itself never comes into question.
        let former = Wish { until: 999, ..wish(known, &[5]) };
        assert_eq!(candidates(&former, ObjectId::blob_made(1001, 2)), expected(999));
        // The clock was set back since: it tells no end, and the numbers none either.
        let back = candidates(&wish(known, &[5]), ObjectId::blob_made(500, 2));
        assert_eq!(
            (back.first(), back.len()),
            (Some(&ObjectId::blob_made(999, 2)), (LATEST + 1) as usize * SEQUENCES as usize)
        );
        // It was stuck: what it was asked for it made at once when it went on.
        let late = super::candidates(&wish(known, &[5]), ObjectId::blob_made(9000, 0), true).collect::<Vec<_>>();
        assert_eq!(late.len(), 2 * (LATEST + 1) as usize, "one number, in two seconds");
        assert_eq!(late.first(), Some(&ObjectId::blob_made(9000, 4095)));
        let soon = super::candidates(&wish(known, &[5]), ObjectId::blob_made(1001, 2), true).collect::<Vec<_>>();
        assert_eq!(soon.len(), 9, "none comes twice");
        let all = candidates(&wish(ObjectId::INVALID, &[5]), ObjectId::blob_made(1 << 30, 9));
        assert_eq!((all.len() as u64 / SEQUENCES, all.len() as u64 % SEQUENCES), (LATEST + 1, 0));
    }

    #[test]
    fn only_blobs_of_the_wished_sizes_in_their_order_match() {
        let known = ObjectId::blob_made(990, 4094);
        let id = ObjectId::blob_made;
        let found = vec![(id(1001, 1), 7), (id(1000, 0), 6), (id(1000, 4095), 5), (id(1001, 2), 8), (id(1001, 3), 5)];
        assert_eq!(matching(&wish(known, &[5, 7, 9]), found), [id(1000, 4095), id(1001, 1)]);
    }
}
