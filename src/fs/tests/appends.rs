//! Processes that append to one file, each through a descriptor of its own for every line.

use super::super::*;
use super::bed::*;
use super::*;
use crate::vineyard::fake::Op;

const APPEND: i32 = libc::O_WRONLY | libc::O_APPEND;
const THIRD: Caller = Caller { pid: 300, ..OTHER };

/// A file of one line that is published and closed, and a copy of it at its path for a writer who is on the way.
fn bed_with_a_copy(passthrough: bool) -> (Arc<Bed>, u64) {
    let bed = Arc::new(bed_with(passthrough, Options::default()));
    bed.save("log.txt", b"first\n").unwrap();
    let former = bed.lookup("log.txt", ME).unwrap().attr.ino;
    assert_eq!(bed.open_inode(former, APPEND, ME).unwrap_err().kind(), Kind::Stale);
    let copy = bed.lookup("log.txt", ME).unwrap().attr.ino;
    assert_ne!(copy, former);
    (bed, copy)
}

/// What another process does is done right before the store answers what somebody's request asks for.
#[test]
fn a_file_stays_at_its_path_when_it_is_published_while_its_version_is_asked_for() {
    for passthrough in [true, false] {
        for listed in [false, true] {
            let (bed, copy) = bed_with_a_copy(passthrough);
            let other = Arc::downgrade(&bed);
            let append = move || {
                let bed = other.upgrade().unwrap();
                let handle = (copy, bed.open_inode(copy, APPEND, ME).unwrap());
                bed.append(handle, b"second\n");
                bed.close(handle, ME).unwrap();
            };
            if listed {
                bed.store.after_names(append);
                assert_eq!(bed.list(""), ["log.txt"]);
            } else {
                bed.store.before_next(Op::Names, append);
                assert_eq!(bed.lookup("log.txt", OTHER).unwrap().attr.ino, copy);
            }
            let there = bed.fs.staging.at("log.txt").unwrap();
            assert_eq!((there.ino(), there.state().displaced), (copy, false), "listed: {listed}");
            bed.append_line("log.txt", "third\n", THIRD).unwrap();
            assert_eq!(bed.load("log.txt").unwrap(), b"first\nsecond\nthird\n");
        }
    }
}

#[test]
fn a_file_stays_at_its_path_while_its_attributes_are_published() {
    let (bed, copy) = bed_with_a_copy(false);
    let other = Arc::downgrade(&bed);
    // The name leads to the new version by the time somebody asks for it, and the file does not know it yet.
    let look = move || assert_eq!(other.upgrade().unwrap().lookup("log.txt", OTHER).unwrap().attr.ino, copy);
    bed.store.before_next(Op::Delete, look);
    let mode = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    bed.fs.setattr(copy, None, mode, THIRD).unwrap();
    assert!(!bed.fs.staging.at("log.txt").unwrap().state().displaced);
    assert_eq!(bed.lookup("log.txt", OTHER).unwrap().attr.ino, copy);
}

#[test]
fn a_file_that_is_closed_while_its_directory_is_listed_is_in_the_listing() {
    for flags in [libc::O_WRONLY, libc::O_RDWR] {
        let bed = Arc::new(bed());
        let flags = flags | libc::O_CREAT;
        let (entry, opened) = bed.fs.create(ROOT, OsStr::new("new.txt"), 0o644, 0, flags, ME).unwrap();
        let handle = (entry.attr.ino, opened);
        bed.write(handle, 0, b"new");
        let other = Arc::downgrade(&bed);
        bed.store.after_names(move || other.upgrade().unwrap().close(handle, ME).unwrap());
        assert_eq!(bed.list(""), ["new.txt"]);
        assert_eq!(bed.store.object_count(), 1, "it was closed");
        assert_eq!(bed.list(""), ["new.txt"]);
    }
}
