//! The store does not do at once what a change of the name of a path's value takes.

use super::model::next_server;
use super::*;
use crate::vineyard::fake::{FakeStore, Late};

const PATH: &str = "x.arrow";

/// A store that this mount has for itself, so that a save drops no other names than former ones.
fn alone(first: &[u8]) -> Bed {
    let bed = bed_over(FakeStore::new(64 << 20).alone(), true, Options::default());
    bed.save(PATH, first).unwrap();
    bed
}

fn names(bed: &Bed) -> Vec<String> {
    bed.fs.names_below("").unwrap().into_iter().map(|(name, _)| name).collect()
}

/// Two values, the second of which has another name than the first; both ways.
fn changes() -> [(Vec<u8>, Vec<u8>); 2] {
    let (native, plain) = (table_file(&[1]), b"foreign".to_vec());
    [(native.clone(), plain.clone()), (plain, native)]
}

fn name_of(bytes: &[u8]) -> &str {
    if bytes.starts_with(b"ARROW1") { "x" } else { PATH }
}

#[test]
fn a_former_name_that_could_not_be_dropped_is_dropped_later() {
    type Later = (&'static str, fn(Bed) -> Bed);
    let later: [Later; 5] = [
        ("housekeeping", |bed| bed.fs.reclaim().map(|_| bed).unwrap()),
        ("the next server", |bed| next_server(bed, 1)),
        ("the next save", |bed| bed.save(PATH, b"third").map(|()| bed).unwrap()),
        ("rm", |bed| bed.fs.unlink(ROOT, OsStr::new(PATH), ME).map(|()| bed).unwrap()),
        ("mv", |bed| bed.fs.rename(ROOT, OsStr::new(PATH), ROOT, OsStr::new("moved"), 0, ME).map(|()| bed).unwrap()),
    ];
    for (first, second) in changes() {
        for (what, act) in later {
            let bed = alone(&first);
            bed.store.fail_next(Op::DropName, 1, Kind::Unavailable);
            bed.save(PATH, &second).unwrap();
            assert_eq!(names(&bed), ["x", PATH], "{what}");
            assert_eq!(bed.load(PATH).unwrap(), second, "{what}");
            let bed = act(bed);
            let (left, objects) = match what {
                "rm" => (vec![], 0),
                "the next save" => (vec![PATH], 1),
                "mv" => (vec!["moved"], 1),
                _ => (vec![name_of(&second)], alone(&second).store.object_count()),
            };
            assert_eq!(
                (names(&bed), bed.store.object_count()),
                (left.into_iter().map(str::to_owned).collect(), objects),
                "{what}"
            );
            let noted = bed.host.notes().unwrap().into_iter().filter(|(key, _)| key.starts_with("former:"));
            assert_eq!(noted.count(), 0, "{what}");
        }
    }
}

#[test]
fn what_cannot_be_dropped_yet_lets_nothing_be_built_on_it() {
    let [(native, plain), _] = changes();
    let bed = alone(&native);
    bed.store.fail_next(Op::DropName, 2, Kind::Unavailable);
    bed.save(PATH, &plain).unwrap();
    let removed = bed.fs.unlink(ROOT, OsStr::new(PATH), ME);
    assert_eq!(removed.unwrap_err().kind(), Kind::Unavailable);
    assert_eq!(bed.load(PATH).unwrap(), plain);
    bed.fs.unlink(ROOT, OsStr::new(PATH), ME).unwrap();
    assert_eq!((names(&bed), bed.store.object_count()), (vec![], 0));
}

#[test]
fn a_name_that_is_put_late_replaces_the_former_one() {
    for (first, second) in changes() {
        let bed = alone(&first);
        let handle = bed.create(PATH, ME).unwrap();
        bed.write(handle, 0, &second);
        bed.store.delay_name(Late::Everything);
        assert_eq!(bed.fs.fsync(handle.0, handle.1.fh).unwrap_err().kind(), Kind::Timeout);
        bed.fs.reclaim().unwrap();
        assert_eq!(names(&bed), [name_of(&first)], "the value before stays until there is another");
        bed.store.catch_up();
        bed.fs.reclaim().unwrap();
        assert_eq!(names(&bed), [name_of(&second)]);
    }
}

#[test]
fn datasets_that_have_nothing_to_do_with_each_other_stay_two() {
    let bed = alone(b"foreign");
    let other = bed.put_tensor("x", &[1.0]);
    bed.save(PATH, &table_file(&[1])).unwrap();
    assert_eq!(names(&bed), ["x", PATH]);
    assert_eq!(bed.fs.object_of("x").unwrap(), Some(other));
    bed.fs.unlink(ROOT, OsStr::new(PATH), ME).unwrap();
    assert_eq!(names(&bed), ["x"]);
}
