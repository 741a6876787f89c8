#![allow(clippy::unwrap_used)]
use super::*;

fn ids(range: std::ops::Range<u64>) -> Vec<ObjectId> {
    range.map(ObjectId).collect()
}

#[test]
fn what_work_under_way_made_is_found_after_a_kill() {
    let file = tempfile::tempfile().unwrap();
    let journal = Journal::open(file.try_clone().unwrap()).unwrap();
    let unit = journal.enter();
    journal.note(ids(1..4));
    journal.note([ObjectId::EMPTY_BLOB]);
    let other = journal.enter();
    journal.note(ids(4..5));
    drop(other);
    // As another process finds it.
    assert_eq!(Journal::open(file.try_clone().unwrap()).unwrap().kept(), ids(1..5));
    drop(unit);
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn what_outlives_its_work_stays_until_it_is_settled() {
    let file = tempfile::tempfile().unwrap();
    let journal = Journal::open(file.try_clone().unwrap()).unwrap();
    let unit = journal.enter();
    journal.note(ids(1..50));
    journal.keep(ids(7..9));
    drop(unit);
    let next = Journal::open(file.try_clone().unwrap()).unwrap();
    assert_eq!(next.kept(), ids(7..9));
    next.settle(&ids(7..8));
    assert_eq!(Journal::open(file).unwrap().kept(), ids(8..9));
}

#[test]
fn a_line_that_was_cut_is_none() {
    let one = ObjectId(0x1234);
    let text = line([one, ObjectId(u64::MAX)]);
    assert_eq!(text, "+ o0000000000001234\n");
    assert_eq!(parse(text.as_bytes()).0, [one].into());
    for end in 0..text.len() {
        assert!(parse(&text.as_bytes()[..end]).0.is_empty(), "{end}");
    }
    // The rest of a longer line after a shorter text.
    assert_eq!(parse(b"+ o0000000000001234\n34 o0000000000005678\n").0, [one].into());
    assert_eq!(parse(b"\xff\xfe\n+ \n+ o\n? \n? 1 2\n! \n\xc3\xa4\xc3\n"), Default::default());
}

#[test]
fn wishes_outlive_a_clock_that_is_set_back() {
    let file = tempfile::tempfile().unwrap();
    let later = now_ms() + 86_400_000;
    file.write_all_at(format!("? 0 {later} o8000000000000007 5\n").as_bytes(), 0).unwrap();
    let journal = Journal::open(file).unwrap();
    let wish = journal.unanswered().remove(&0).unwrap();
    assert_eq!((wish.since, wish.until), (later, u64::MAX));
    // Times tell no more which blobs are this process's own.
    let asked = journal.ask(&[5]).unwrap();
    journal.answered(asked, ids(8..9));
    assert!(journal.is_own(ObjectId(8)) && !journal.is_own(ObjectId(9)));
    journal.settle_unanswered([0]);
    assert!(!journal.is_own(ObjectId(8)));
    let asked = journal.ask(&[5]).unwrap();
    journal.answered(asked, ids(9..10));
    drop(journal.enter());
    assert!(!journal.is_own(ObjectId(9)), "nothing is kept once nothing is open");
}

#[test]
fn an_answer_that_is_lost_leaves_the_rest_of_the_wish_open_here_and_after_a_kill() {
    let file = tempfile::tempfile().unwrap();
    let journal = Journal::open(file.try_clone().unwrap()).unwrap();
    let unit = journal.enter();
    let (lost, other) = (journal.ask(&[10, 20, 30]).unwrap(), journal.ask(&[20]).unwrap());
    assert_eq!(journal.under_way(), [0, 1]);
    let sent = now_ms() + 7;
    journal.failed(lost, &ids(8..9), sent, 3);
    assert_eq!(journal.under_way(), [1]);
    assert!(journal.any_under_way(&[0, 1]) && !journal.any_under_way(&[0]));
    let open = Wish { since: sent, until: u64::MAX, after: ObjectId(8), sizes: vec![20, 30], generation: Some(3) };
    assert_eq!(journal.unanswered(), [(0, open.clone())].into());
    let next = Journal::open(file.try_clone().unwrap()).unwrap();
    let known: Vec<Wish> = next.unanswered().into_values().collect();
    assert_eq!(known.iter().map(|wish| wish.sizes.clone()).collect::<Vec<_>>(), [vec![20, 30], vec![20]]);
    assert_eq!((known[0].after, next.kept()), (ObjectId(8), ids(8..9)));
    // What came before is known to be this process's own, too.
    journal.answered(other, ids(9..10));
    drop(unit);
    assert!(journal.is_own(ObjectId(8)) && journal.is_own(ObjectId(9)));
    let wholly = journal.ask(&[40]).unwrap();
    journal.failed(wholly, &ids(11..12), sent, 3);
    assert_eq!(journal.unanswered().len(), 1, "all of it was made");
    journal.settle_unanswered([0]);
    assert!(journal.unanswered().is_empty() && !journal.is_own(ObjectId(8)));
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn a_file_with_room_keeps_it_and_needs_no_more() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(LEAST_LEN).unwrap();
    let journal = Journal::open(file.try_clone().unwrap()).unwrap();
    let text = || {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        String::from_utf8(bytes).unwrap()
    };
    let unit = journal.enter();
    journal.keep(ids(1..3));
    journal.note(ids(3..900));
    drop(unit);
    assert_eq!(text().trim_end_matches('\0'), "+ o0000000000000001 o0000000000000002\n");
    assert_eq!(file.metadata().unwrap().len(), LEAST_LEN);
    let next = Journal::open(file.try_clone().unwrap()).unwrap();
    assert_eq!(next.kept(), ids(1..3));
    let unit = next.enter();
    next.note(ids(3..9000));
    assert!(file.metadata().unwrap().len() > LEAST_LEN);
    drop(unit);
    assert_eq!(file.metadata().unwrap().len(), LEAST_LEN);
    next.settle(&ids(1..3));
    assert_eq!(text().trim_end_matches('\0'), "");
    // A line that a kill has cut is written over.
    file.write_all_at(b"+ o0000000000000001\n? 7 12", 0).unwrap();
    let next = Journal::open(file.try_clone().unwrap()).unwrap();
    next.note(ids(2..3));
    assert_eq!(Journal::open(file.try_clone().unwrap()).unwrap().kept(), ids(1..3));
}

#[test]
fn what_was_asked_for_and_not_answered_is_found_after_a_kill() {
    let file = tempfile::tempfile().unwrap();
    let journal = Journal::open(file.try_clone().unwrap()).unwrap();
    let unit = journal.enter();
    journal.note(ids(5..7));
    let first = journal.ask(&[10, 0, 20]).unwrap();
    let second = journal.ask(&[30]).unwrap();
    let reopen = || Journal::open(file.try_clone().unwrap()).unwrap();
    let found: Vec<Wish> = reopen().unanswered().into_values().collect();
    assert_eq!(found.iter().map(|wish| wish.sizes.clone()).collect::<Vec<_>>(), [vec![10, 20], vec![30]]);
    assert!(found.iter().all(|wish| wish.after == ObjectId(6) && wish.since > 1_700_000_000_000));
    assert!(journal.unanswered().is_empty(), "it may still see the answers");
    journal.answered(first, ids(7..8));
    let sizes = |journal: &Journal| journal.unanswered().into_values().map(|wish| wish.sizes).collect::<Vec<_>>();
    assert_eq!(sizes(&reopen()), [[30]]);
    assert!(found.iter().all(|wish| wish.since <= wish.until && wish.until <= now_ms()));
    // It outlives the work under way.
    drop(unit);
    let next = reopen();
    let third = next.ask(&[40]).unwrap();
    assert_eq!(sizes(&next), [[30]]);
    next.settle_unanswered(next.unanswered().into_keys());
    assert_eq!(reopen().unanswered().len(), 1);
    next.answered(third, []);
    next.settle(&[]);
    assert_eq!(file.metadata().unwrap().len(), 0);
    drop(second);
}

/// More than any limit that the tests set.
const LONG: u64 = 2000;

fn len(file: &File) -> u64 {
    file.metadata().unwrap().len()
}

#[test]
fn work_within_work_goes_on_when_the_text_is_too_long() {
    let file = tempfile::tempfile().unwrap();
    let journal = Journal::open_with(file.try_clone().unwrap(), 8 << 10).unwrap();
    let before = journal.enter();
    journal.note(ids(1..LONG));
    assert!(len(&file) > 8 << 10);
    let unit = journal.enter();
    drop(before);
    journal.note(ids(LONG..2 * LONG));
    // A second one of the same thread.
    let within = journal.enter();
    let asked = journal.ask(&[7]).unwrap();
    journal.note(ids(2 * LONG..2 * LONG + 1));
    let next = || Journal::open(file.try_clone().unwrap()).unwrap();
    assert!(journal.state().len < 20 * (LONG + 100), "{}", journal.state().len);
    assert!(len(&file) <= LEAST_LEN);
    assert_eq!(next().kept(), ids(LONG..2 * LONG + 1), "what ended is forgotten, what goes on is not");
    assert_eq!(next().unanswered().len(), 1);
    drop(within);
    journal.answered(asked, ids(1..2));
    assert_eq!(next().kept()[1..], ids(LONG..2 * LONG + 1));
    drop(unit);
    assert_eq!((journal.state().len, next().kept()), (0, vec![]));
}

#[test]
fn work_that_overlaps_for_ever_leaves_a_bounded_text() {
    for room in [0, LEAST_LEN] {
        let file = tempfile::tempfile().unwrap();
        file.set_len(room).unwrap();
        let journal = Journal::open_with(file.try_clone().unwrap(), 8 << 10).unwrap();
        let mut unit = journal.enter();
        for round in 1..500 {
            let asked = journal.ask(&[round]).unwrap();
            journal.note(ids(1000 * round..1000 * round + 50));
            journal.answered(asked, [ObjectId(1000 * round + 50)]);
            if round == 100 {
                journal.keep(ids(5..6));
            }
            let next = journal.enter();
            drop(std::mem::replace(&mut unit, next));
            assert!(len(&file) <= room.max(20 << 10), "{round}: {}", len(&file));
        }
        assert!(journal.state().made.len() < 50 && journal.state().noted.len() < 5);
        assert_eq!(Journal::open(file.try_clone().unwrap()).unwrap().kept()[0], ObjectId(5));
        drop(unit);
        assert_eq!(Journal::open(file.try_clone().unwrap()).unwrap().kept(), ids(5..6));
        assert_eq!(len(&file), room.max(20));
    }
}

#[test]
fn a_text_that_counts_as_a_whole_is_not_written_anew_each_time() {
    let file = tempfile::tempfile().unwrap();
    let journal = Journal::open_with(file, 1 << 10).unwrap();
    let _unit = journal.enter();
    journal.note(ids(1..LONG));
    assert!(journal.state().full > 2 * 17 * LONG);
    // Notes that found no room make what counts longer than the text.
    journal.state().remember(ids(LONG..9 * LONG));
    let before = journal.state().len;
    journal.renew(&mut journal.state());
    assert_eq!(journal.state().len, before);
}

/// The file as each moment of a kill leaves it.
fn killed(old: &[u8], file_len: u64, text: &[u8], mut each: impl FnMut(&[u8])) -> Vec<u8> {
    let mut bytes = old.to_vec();
    bytes.resize(file_len as usize, 0);
    for step in shortening(old.len() as u64, file_len, text.len() as u64).0 {
        let (at, part) = match step {
            Step::Text(at) => (at as usize, text.to_vec()),
            Step::Zeros(place) => (place.start as usize, vec![0; (place.end - place.start) as usize]),
            Step::Cut(len) => {
                bytes.resize(len as usize, 0);
                each(&bytes);
                continue;
            }
        };
        bytes.resize(bytes.len().max(at + part.len()), 0);
        // Within a page it happens at once.
        let edges = if part.len() <= PAGE as usize && at == 0 { 1 } else { 97 };
        for end in (0..part.len()).step_by(edges.max(part.len() / edges)).chain([part.len()]) {
            bytes[at..at + end].copy_from_slice(&part[..end]);
            each(&bytes);
        }
    }
    bytes
}

#[test]
fn a_kill_while_the_text_is_written_anew_loses_nothing_that_counts() {
    let wish = |size| Wish { since: 1, until: u64::MAX, after: ObjectId(9), sizes: vec![size; 3], generation: None };
    for (count, live, file_len) in [
        (3000, 1000..1900, 0),
        (3000, 1000..1900, LEAST_LEN),
        (1000, 100..900, LEAST_LEN),
        (300, 100..140, LEAST_LEN),
        (3000, 10..11, 0),
        (6000, 1000..5900, LEAST_LEN),
    ] {
        let mut old = String::new();
        for id in 1..count {
            old.push_str(&line([ObjectId(id * 7919), ObjectId(id)]));
            if id % 100 == 0 {
                old.push_str(&wish_line(id, &wish(id)));
                old.push_str(&wish_line(id + 1, &wish(id)));
                old.push_str(&format!("! {id}\n"));
            }
        }
        let open: BTreeMap<u64, Wish> = (count / 100 - 1..count / 100).map(|n| (100 * n + 1, wish(100 * n))).collect();
        let mut text = line(ids(live.clone()));
        text.extend(open.iter().map(|(number, wish)| wish_line(*number, wish)));
        let (all, all_wishes) = parse(old.as_bytes());
        let file_len = (old.len() as u64).max(file_len);
        let mut moments = 0;
        let end = killed(old.as_bytes(), file_len, text.as_bytes(), |bytes| {
            let (found, wishes) = parse(bytes);
            assert!(ids(live.clone()).iter().all(|id| found.contains(id)), "{count} {moments}");
            assert!(found.is_subset(&all), "{count} {moments}: an id of two halves");
            assert!(open.iter().all(|(number, wish)| wishes.get(number) == Some(wish)), "{count} {moments}");
            assert!(wishes.iter().all(|(number, wish)| all_wishes.get(number) == Some(wish)), "{count} {moments}");
            moments += 1;
        });
        assert!(moments > 3);
        assert_eq!(end.iter().rposition(|b| *b != 0).unwrap() + 1, text.len(), "{count}");
        assert_eq!(end.len() as u64, (text.len() as u64).max(if file_len >= LEAST_LEN { LEAST_LEN } else { 0 }));
    }
}
