//! Of those who rename or remove one file at the same time, through several mounts of one vineyardd, one does: work is
//! shared out that way.

use super::super::*;
use super::bed::*;
use super::others::{names, two};
use super::*;
use crate::vineyard::fake::FakeStore;

type Taker = Box<dyn Fn(&Bed) -> Result<()> + Send + Sync>;

/// What a mount answers that has found `path`, when another one does something with it before this one does. The file
/// was written through this mount, which has forgotten it or not.
fn overtaken(
    path: &str,
    bytes: &[u8],
    forgotten: bool,
    first: impl FnOnce(&Bed),
    ask: &Taker,
) -> (Result<()>, Vec<String>) {
    let (store, one, other) = two();
    one.save(path, bytes).unwrap();
    if forgotten {
        one.forget();
    }
    let answer = std::thread::scope(|scope| {
        let naming = one.fs.naming();
        // The kernel asks a second time.
        let answer = scope.spawn(|| asking_twice(|| ask(&one)));
        std::thread::sleep(Duration::from_millis(200));
        first(&other);
        drop(naming);
        answer.join().unwrap()
    });
    let all = names(&store);
    assert_all_goes(&store, &other);
    (answer, all)
}

/// Removes all files; what nothing leads to would stay.
fn assert_all_goes(store: &FakeStore, bed: &Bed) {
    bed.list("").iter().for_each(|name| bed.fs.unlink(ROOT, OsStr::new(name), ME).unwrap());
    assert_eq!((store.object_count(), store.blob_count()), (0, 0), "left over");
}

fn renamed(bed: &Bed, from: &str, to: &str) -> Result<()> {
    bed.fs.rename(ROOT, OsStr::new(from), ROOT, OsStr::new(to), 0, ME)
}

/// Everything that takes a file from its path.
fn takers(path: &'static str) -> Vec<(&'static str, Taker)> {
    vec![
        (
            "the same format",
            Box::new(move |bed: &Bed| renamed(bed, path, if path == "x" { "mine" } else { "mine.arrow" })),
        ),
        ("another format", Box::new(move |bed: &Bed| renamed(bed, path, "mine.claimed"))),
        ("unlink", Box::new(move |bed: &Bed| bed.fs.unlink(ROOT, OsStr::new(path), ME))),
        ("mv", Box::new(move |bed: &Bed| bed.fs.change_name(&bed.fs.require(path)?, "mine", true).map(drop))),
        ("rm", Box::new(move |bed: &Bed| bed.fs.remove(&bed.fs.require(path)?))),
    ]
}

#[test]
fn a_file_is_taken_once() {
    let table = table_file(&[1, 2]);
    for (path, bytes) in [("x", &b"a job"[..]), ("x.arrow", &table), ("x.arrow", b"no table")] {
        for forgotten in [false, true] {
            for (how, take) in takers(path) {
                // The command sees no file that another mount has not forgotten; its names are all the same.
                let what = format!("{path}, forgotten: {forgotten}, {how}");
                let (answer, names) =
                    overtaken(path, bytes, forgotten, |other| renamed(other, path, "theirs").unwrap(), &take);
                assert!(answer.is_err_and(|error| error.kind() == Kind::NotFound), "{what}");
                assert_eq!(names, ["theirs"], "{what}");
                let unlink = |other: &Bed| other.fs.unlink(ROOT, OsStr::new(path), ME).unwrap();
                let (answer, names) = overtaken(path, bytes, forgotten, unlink, &take);
                assert!(answer.is_err_and(|error| error.kind() == Kind::NotFound), "{what}");
                assert!(names.is_empty(), "{what}: {names:?}");
            }
        }
    }
}

/// What comes to the path meanwhile is what is taken.
#[test]
fn a_file_that_was_replaced_is_taken_as_it_is_now() {
    let table = table_file(&[1, 2]);
    for (path, bytes) in [("x", &b"a job"[..]), ("x.arrow", &table)] {
        for forgotten in [false, true] {
            for (how, take) in takers(path).into_iter().take(3) {
                let what = format!("{path}, forgotten: {forgotten}, {how}");
                let (store, one, other) = two();
                one.save(path, bytes).unwrap();
                if forgotten {
                    one.forget();
                }
                let newer = if path == "x" { b"another job".to_vec() } else { table_file(&[7]) };
                std::thread::scope(|scope| {
                    let naming = one.fs.naming();
                    let answer = scope.spawn(|| asking_twice(|| take(&one)));
                    std::thread::sleep(Duration::from_millis(200));
                    other.save(path, &newer).unwrap();
                    drop(naming);
                    assert!(answer.join().unwrap().is_ok(), "{what}");
                });
                let found = names(&store);
                assert_eq!(found.len(), usize::from(how != "unlink"), "{what}: {found:?}");
                if let [name] = &found[..] {
                    let file = if how == "the same format" && path != "x" { "mine.arrow" } else { name };
                    assert_eq!(one.load(file).unwrap(), newer, "{what}");
                }
                assert_all_goes(&store, &other);
            }
        }
    }
}

/// The old name and the new one may be one name.
#[test]
fn a_file_stays_that_takes_its_own_place() {
    let table = table_file(&[1, 2]);
    let same =
        [("x.arrow", "x"), ("x.arrow", "x.feather"), ("x.feather", "x.arrow"), ("x", "x.arrow"), ("x", "x.feather")];
    for (from, to) in same {
        for bytes in [&table[..], b"no table"] {
            for forgotten in [false, true] {
                let (store, bed, other) = two();
                bed.save(from, bytes).unwrap();
                if forgotten {
                    bed.forget();
                }
                renamed(&bed, from, to).unwrap();
                for bed in [&bed, &other] {
                    assert_eq!(bed.load(to).unwrap(), bytes, "{from} to {to}, forgotten: {forgotten}");
                }
                assert_eq!(names(&store).len(), 1, "{from} to {to}");
                assert_all_goes(&store, &other);
            }
        }
    }
}

#[test]
fn a_directory_is_taken_once() {
    let (store, one, other) = two();
    one.fs.mkdir(ROOT, OsStr::new("d"), 0o755, 0, ME).unwrap();
    one.save("d/t.arrow", &table_file(&[1])).unwrap();
    one.save("d/u", b"u").unwrap();
    std::thread::scope(|scope| {
        let naming = other.fs.naming();
        let answer = scope.spawn(|| asking_twice(|| renamed(&other, "d", "mine")));
        std::thread::sleep(Duration::from_millis(200));
        renamed(&one, "d", "theirs").unwrap();
        drop(naming);
        assert_eq!(answer.join().unwrap().unwrap_err().kind(), Kind::NotFound);
    });
    assert_eq!(names(&store), ["theirs/t", "theirs/u"]);
    assert_eq!((one.list(""), other.list("")), (vec!["theirs".to_owned()], vec!["theirs".to_owned()]));
    assert_eq!(other.load("theirs/u").unwrap(), b"u");
}
