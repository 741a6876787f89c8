//! Moves of names in the middle of which the store stops to answer, and goes on later.

use super::*;
use crate::vineyard::fake::{FakeStore, Late};

fn rename(bed: &Bed, from: &str, to: &str, flags: u32) -> Result<()> {
    let ((parent, name), (new_parent, new_name)) = (bed.walk(from)?, bed.walk(to)?);
    bed.fs.rename(parent, &name, new_parent, &new_name, flags, ME)
}

/// All names and what they lead to.
fn names(bed: &Bed) -> Vec<(String, ObjectId)> {
    bed.fs.names_below("").unwrap()
}

fn alone() -> Bed {
    bed_over(FakeStore::new(64 << 20).alone(), true, Options::default())
}

/// Two directories with what other clients have put, `b` with one name more, and a file of this mount.
fn directories() -> Bed {
    let bed = alone();
    for (directory, number) in [("a", 0), ("b", 100)] {
        for i in 0..4 + number / 100 {
            bed.put_tensor(&format!("{directory}/sub/t{i}"), &[f64::from(number + i)]);
        }
    }
    bed.save("a/x.bin", b"first").unwrap();
    bed
}

/// What the names of [`directories`] lead to after their first parts were exchanged or replaced.
fn moved(before: &[(String, ObjectId)], moves: &[(&str, &str)]) -> Vec<(String, ObjectId)> {
    let new = |name: &str| {
        let (top, rest) = name.split_once('/').unwrap_or((name, ""));
        let to = moves.iter().find(|(from, _)| *from == top).map_or(top, |(_, to)| to);
        if rest.is_empty() { to.to_owned() } else { format!("{to}/{rest}") }
    };
    let mut names: Vec<(String, ObjectId)> = before.iter().map(|(name, id)| (new(name), *id)).collect();
    names.sort();
    names
}

type Later = (&'static str, fn(&Bed) -> Result<()>);

/// Lets the store stop after each step of a rename, lets it go on, and does something; all is moved then, or nothing.
fn stopped_at_each_step(
    make: fn() -> Bed,
    (from, to, flags): (&str, &str, u32),
    moves: &[(&str, &str)],
    later: &[Later],
) {
    for (what, later) in later {
        let mut failed = 0;
        for steps in 0.. {
            let bed = make();
            let (before, objects) = (names(&bed), bed.store.object_count());
            bed.store.die_after(Some(steps));
            let answer = rename(&bed, from, to, flags);
            let alive = bed.store.step();
            bed.store.die_after(None);
            if alive {
                answer.unwrap();
            } else {
                failed += usize::from(answer.is_err());
                later(&bed).unwrap_or_else(|error| panic!("{what} after {steps} steps: {error}"));
            }
            let whole = [moved(&before, moves), before.clone()];
            let now = names(&bed);
            assert!(now == whole[0] || (!alive && now == whole[1]), "{what} after {steps} steps: {now:?}");
            assert_eq!(bed.store.object_count(), objects, "{what} after {steps} steps");
            assert!(!bed.fs.has_unanswered(), "{what} after {steps} steps");
            if alive {
                break;
            }
        }
        assert!(failed >= 2, "{what}: {failed}");
    }
}

const HOUSEKEEPING: Later = ("housekeeping", |bed| bed.fs.reclaim().map(drop));

#[test]
fn directories_that_change_places_lose_nothing_when_the_store_stops() {
    let later: [Later; 3] = [
        HOUSEKEEPING,
        ("the same again", |bed| rename(bed, "a", "b", libc::RENAME_EXCHANGE)),
        ("something below", |bed| {
            let (parent, _) = bed.walk("a/none")?;
            let gone = bed.fs.unlink(parent, OsStr::new("none"), ME).unwrap_err();
            assert_eq!(gone.kind(), Kind::NotFound);
            Ok(())
        }),
    ];
    stopped_at_each_step(directories, ("a", "b", libc::RENAME_EXCHANGE), &[("a", "b"), ("b", "a")], &later);
}

#[test]
fn a_directory_is_moved_whole_when_the_store_stops() {
    let later: [Later; 2] = [
        HOUSEKEEPING,
        ("the same again", |bed| match rename(bed, "a", "c", 0) {
            Err(error) if error.kind() == Kind::NotFound => Ok(()),
            other => other,
        }),
    ];
    stopped_at_each_step(directories, ("a", "c", 0), &[("a", "c")], &later);
}

#[test]
fn files_that_change_places_lose_nothing_when_the_store_stops() {
    fn make() -> Bed {
        let bed = alone();
        bed.put_tensor("a", &[1.0]);
        bed.put_tensor("b", &[2.0]);
        bed
    }
    let later = [HOUSEKEEPING, ("the same again", |bed: &Bed| rename(bed, "a.npy", "b.npy", libc::RENAME_EXCHANGE))];
    stopped_at_each_step(make, ("a.npy", "b.npy", libc::RENAME_EXCHANGE), &[("a", "b"), ("b", "a")], &later);
}

#[test]
fn a_name_that_is_put_late_belongs_to_the_move() {
    for housekeeping_first in [false, true] {
        let bed = directories();
        let before = names(&bed);
        bed.store.delay_name(Late::Everything);
        assert_eq!(rename(&bed, "a", "b", libc::RENAME_EXCHANGE).unwrap_err().kind(), Kind::Timeout);
        if housekeeping_first {
            bed.fs.reclaim().unwrap();
        }
        bed.store.catch_up();
        bed.fs.reclaim().unwrap();
        assert_eq!(names(&bed), moved(&before, &[("a", "b"), ("b", "a")]));
        assert_eq!(bed.load("b/x.bin").unwrap(), b"first");
    }
}

#[test]
fn what_is_saved_in_the_middle_of_a_move_moves_with_it() {
    for (steps, saved) in [(2, "a/sub/t0.npy"), (3, "a/x.bin")] {
        let bed = directories();
        let objects = bed.store.object_count();
        let bytes = bed.load("b/sub/t1.npy").unwrap();
        bed.store.die_after(Some(steps));
        rename(&bed, "a", "c", 0).unwrap_err();
        bed.store.die_after(None);
        bed.save(saved, &bytes).unwrap();
        bed.fs.reclaim().unwrap();
        bed.fs.reclaim().unwrap();
        assert_eq!(bed.list(""), ["b", "c"], "{saved}");
        assert_eq!(bed.load(&saved.replace("a/", "c/")).unwrap(), bytes);
        assert!(bed.store.object_count() <= objects + 1);
    }
}

#[test]
fn a_name_without_an_object_does_not_keep_a_directory_from_moving() {
    let bed = directories();
    let gone = bed.put_tensor("a/gone", &[9.0]);
    bed.store.delete(&[gone]).unwrap();
    rename(&bed, "a", "c", 0).unwrap();
    let left: Vec<String> =
        names(&bed).into_iter().map(|(name, _)| name).filter(|name| name.starts_with("a/")).collect();
    assert_eq!(left, ["a/gone"]);
    assert_eq!(bed.list("c/sub").len(), 4);
    assert!(!bed.fs.has_unanswered());
}

/// Does something in the directory `d/sub`, of which the inode number is given, when the first of its names is about to
/// move as that of `d`, which is renamed to `e`. Returns what is below afterwards.
fn meanwhile(act: impl FnOnce(&Bed, u64) + Send) -> (Bed, Vec<String>) {
    meanwhile_after(|_| {}, act)
}

fn meanwhile_after(before: impl FnOnce(&Bed), act: impl FnOnce(&Bed, u64) + Send) -> (Bed, Vec<String>) {
    let bed = alone();
    for i in 0..3 {
        bed.put_tensor(&format!("d/sub/t{i}"), &[f64::from(i)]);
    }
    let number = bed.lookup("d/sub", ME).unwrap().attr.ino;
    before(&bed);
    let (begins, began) = std::sync::mpsc::channel();
    bed.store.before_next(Op::PutName, move || {
        begins.send(()).unwrap();
        std::thread::sleep(Duration::from_millis(200));
    });
    std::thread::scope(|scope| {
        let bed = &bed;
        scope.spawn(move || {
            began.recv().unwrap();
            act(bed, number);
        });
        rename(bed, "d", "e", 0).unwrap();
    });
    assert_eq!(bed.list(""), ["e"]);
    let listed = bed.list("e/sub");
    (bed, listed)
}

fn save_in(bed: &Bed, directory: u64, name: &str) {
    let flags = libc::O_WRONLY | libc::O_CREAT;
    let (entry, opened) = bed.fs.create(directory, OsStr::new(name), 0o644, 0, flags, OTHER).unwrap();
    bed.write((entry.attr.ino, opened), 0, name.as_bytes());
    bed.fs.flush(entry.attr.ino, opened.fh, OTHER).unwrap();
    bed.fs.release(entry.attr.ino, opened.fh);
}

#[test]
fn what_is_created_in_a_directory_that_moves_is_in_it_afterwards() {
    let (bed, listed) = meanwhile(|bed, directory| save_in(bed, directory, "new.bin"));
    assert_eq!(listed, ["new.bin", "t0.npy", "t1.npy", "t2.npy"]);
    assert_eq!(bed.load("e/sub/new.bin").unwrap(), b"new.bin");
}

#[test]
fn what_is_removed_from_a_directory_that_moves_is_gone_afterwards() {
    let (bed, listed) = meanwhile(|bed, directory| bed.fs.unlink(directory, OsStr::new("t1.npy"), OTHER).unwrap());
    assert_eq!((listed, bed.store.object_count()), (vec!["t0.npy".to_owned(), "t2.npy".to_owned()], 2));
}

#[test]
fn what_is_renamed_made_and_removed_in_a_directory_that_moves_is_so_afterwards() {
    let (_, listed) = meanwhile(|bed, directory| {
        bed.fs.rename(directory, OsStr::new("t1.npy"), directory, OsStr::new("u.npy"), 0, OTHER).unwrap();
        bed.fs.mkdir(directory, OsStr::new("made"), 0o755, 0, OTHER).unwrap();
        bed.fs.mkdir(directory, OsStr::new("gone"), 0o755, 0, OTHER).unwrap();
        bed.fs.rmdir(directory, OsStr::new("gone"), OTHER).unwrap();
    });
    assert_eq!(listed, ["made", "t0.npy", "t2.npy", "u.npy"]);
}

#[test]
fn what_another_mount_saves_in_a_directory_that_moves_moves_with_it() {
    let (bed, listed) = meanwhile(|bed, _| {
        bed.put_tensor("d/sub/other", &[7.0]);
    });
    assert_eq!(listed, ["other.npy", "t0.npy", "t1.npy", "t2.npy"]);
    assert_eq!(bed.store.object_count(), 4);
}

#[test]
fn a_file_that_was_looked_up_before_its_directory_moved_is_written_there() {
    for (flags, refused_before) in [(0, false), (0, true), (libc::RENAME_EXCHANGE, false)] {
        let bed = alone();
        bed.put_tensor("d/sub/t", &[1.0]);
        bed.put_tensor("e/sub/t", &[2.0]);
        if flags == 0 {
            let (parent, name) = bed.walk("e/sub/t.npy").unwrap();
            bed.fs.unlink(parent, &name, ME).unwrap();
            bed.fs.rmdir(bed.lookup("e", ME).unwrap().attr.ino, OsStr::new("sub"), ME).unwrap();
        }
        let known = bed.lookup("d/sub/t.npy", ME).unwrap().attr.ino;
        let before = bed.load("d/sub/t.npy").unwrap();
        // The kernel goes on with what it knows, and looks it up again once.
        let write = libc::O_WRONLY | libc::O_TRUNC;
        let refused = || assert_eq!(bed.fs.open(known, write, ME).unwrap_err().kind(), Kind::Stale);
        if refused_before {
            refused();
        }
        rename(&bed, "d", "e", flags).unwrap();
        assert_eq!(bed.load("e/sub/t.npy").unwrap(), before);
        if !refused_before {
            refused();
        }
        let writer = bed.lookup("e/sub/t.npy", ME).unwrap().attr.ino;
        let writer = (writer, bed.open_inode(writer, write, ME).unwrap());
        bed.write(writer, 0, b"written");
        bed.close(writer, ME).unwrap();
        assert_eq!(bed.load("e/sub/t.npy").unwrap(), b"written");
        assert_eq!(bed.list(""), if flags == 0 { &["e"][..] } else { &["d", "e"] });
        assert_eq!(bed.list("e/sub"), ["t.npy"]);
    }
}

#[test]
fn what_is_opened_for_writing_in_a_directory_that_moves_is_in_it_afterwards() {
    let known = Mutex::new(0);
    let (bed, listed) = meanwhile_after(
        |bed| *known.lock().unwrap() = bed.lookup("d/sub/t1.npy", OTHER).unwrap().attr.ino,
        |bed, directory| {
            let write = libc::O_WRONLY | libc::O_TRUNC;
            assert_eq!(bed.fs.open(*known.lock().unwrap(), write, OTHER).unwrap_err().kind(), Kind::Stale);
            let ino = bed.fs.lookup(directory, OsStr::new("t1.npy"), OTHER).unwrap().attr.ino;
            let writer = (ino, bed.open_inode(ino, write, OTHER).unwrap());
            bed.write(writer, 0, b"written");
            bed.close(writer, OTHER).unwrap();
        },
    );
    assert_eq!(listed, ["t0.npy", "t1.npy", "t2.npy"]);
    assert_eq!(bed.load("e/sub/t1.npy").unwrap(), b"written");
}
