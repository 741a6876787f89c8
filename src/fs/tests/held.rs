//! Files that are open while one server takes over from another.

use super::super::*;
use super::bed::*;
use super::model::{Held, next_server};
use super::*;

fn values() -> Vec<f64> {
    (0..20_000).map(f64::from).collect()
}

/// A server that has no room for the image of the file, and the next one, which has.
fn lazy() -> Bed {
    let bed = bed_with(true, Options { cache_size: 100_000, ..Options::default() });
    bed.put_tensor("d/x", &values());
    bed
}

type Change = fn(&Bed);

fn chmod(bed: &Bed, path: &str, mode: u32) {
    let change = SetAttr { mode: Some(mode), ..Default::default() };
    bed.fs.setattr(bed.lookup(path, ME).unwrap().attr.ino, None, change, ME).unwrap();
}

#[test]
fn what_is_read_by_requests_is_so_as_long_as_it_is_open() {
    let mut bed = lazy();
    let held = Held::open(&bed, "d/x.npy").unwrap();
    for epoch in 1..4 {
        bed = next_server(bed, epoch);
        let again = bed.open("d/x.npy", libc::O_RDONLY, OTHER).unwrap();
        assert_eq!(again.1.serve, Serve::Cached);
        held.check(&bed);
        bed.close(again, OTHER).unwrap();
    }
    held.close(&bed);
    assert_eq!(bed.fs.status()["open_handles"], 0);
    let now = bed.open("d/x.npy", libc::O_RDONLY, OTHER).unwrap();
    assert!(matches!(now.1.serve, Serve::Passthrough(_)), "nobody has it open any more: {now:?}");
}

#[test]
fn what_the_kernel_reads_by_itself_comes_from_one_file_as_long_as_it_is_open() {
    // Each of the two takes the whole cache.
    let bed = bed_with(true, Options { cache_size: 200_000, ..Options::default() });
    bed.put_tensor("x", &values());
    bed.put_tensor("y", &values());
    let x = Held::open(&bed, "x.npy").unwrap();
    // The name leads elsewhere, so that the cache does not know the image any more.
    bed.fs.cache.forget(bed.fs.object_of("x").unwrap().unwrap());
    let y = Held::open(&bed, "y.npy").unwrap();
    let bed = next_server(bed, 1);
    for path in ["x.npy", "y.npy"] {
        // The bed refuses another file.
        bed.load(path).unwrap();
    }
    x.close(&bed);
    y.close(&bed);
    assert_eq!(bed.load("x.npy").unwrap().len(), 128 + 160_000);
}

#[test]
fn an_image_that_was_written_here_serves_its_view_with_every_server() {
    for retired in [true, false] {
        let mut bed = bed();
        bed.save("a.bin", &[7; 100_000]).unwrap();
        let written = bed.open("a.bin", libc::O_RDONLY, ME).unwrap();
        let Serve::Passthrough(id) = written.1.serve else { panic!("{written:?}") };
        bed.close(written, ME).unwrap();
        if retired {
            for staged in bed.fs.staging.retire_old(0) {
                adopt::note_staged(&staged);
            }
        } else {
            bed.forget();
        }
        // Nobody has it open when the first one ends.
        for epoch in 1..4 {
            bed = next_server(bed, epoch);
            assert!(bed.fs.staging.at("a.bin").is_none(), "it is no written file any more");
            let held = Held::open(&bed, "a.bin").unwrap();
            let again = bed.open("a.bin", libc::O_RDONLY, ME).unwrap();
            assert_eq!(again.1.serve, Serve::Passthrough(id), "retired: {retired}, server {epoch}");
            bed = next_server(bed, epoch + 10);
            bed.close(again, ME).unwrap();
            held.check(&bed);
            held.close(&bed);
        }
    }
}

#[test]
fn files_that_were_let_go_of_take_no_memory_of_the_next_server() {
    let mut bed = bed();
    for epoch in 1..6 {
        for name in ["a.bin", "b.bin"] {
            bed.save(name, &[epoch as u8; 100_000]).unwrap();
        }
        for staged in bed.fs.staging.retire_old(0) {
            adopt::note_staged(&staged);
        }
        bed = next_server(bed, epoch);
        // What the kernel has forgotten before, nobody asks for again.
        bed.fs.cache.clear();
        assert_eq!(bed.host.files.lock().unwrap().len(), 0, "server {epoch}");
    }
}

#[test]
fn a_removed_file_stays_for_the_next_server_as_long_as_it_is_open() {
    let mut bed = bed();
    bed.save("a.bin", &[7; 100_000]).unwrap();
    let held = Held::open(&bed, "a.bin").unwrap();
    bed.fs.unlink(ROOT, OsStr::new("a.bin"), ME).unwrap();
    bed = next_server(bed, 1);
    held.check(&bed);
    held.close(&bed);
    // Its FORGET was lost.
    bed = next_server(bed, 2);
    let files = bed.host.tags.lock().unwrap().clone();
    assert!(files.values().all(|(_, tag)| tag.contains(r#""is":"opens""#)), "{files:?}");
}

#[test]
fn an_open_view_stays_what_it_was_whatever_happens_to_its_name() {
    let changes: [(&str, Change); 6] = [
        ("nothing", |_| {}),
        ("replaced", |bed| bed.save("d/x.npy", b"other").unwrap()),
        ("removed", |bed| {
            let (directory, name) = bed.walk("d/x.npy").unwrap();
            bed.fs.unlink(directory, &name, ME).unwrap();
        }),
        ("renamed", |bed| {
            let directory = bed.lookup("d", ME).unwrap().attr.ino;
            bed.fs.rename(directory, OsStr::new("x.npy"), ROOT, OsStr::new("y.npy"), 0, ME).unwrap();
        }),
        ("moved with its directory", |bed| {
            bed.fs.rename(ROOT, OsStr::new("d"), ROOT, OsStr::new("e"), 0, ME).unwrap();
        }),
        ("given another mode", |bed| chmod(bed, "d/x.npy", 0o600)),
    ];
    for (what, change) in changes {
        for (before, small) in [(true, false), (false, false), (true, true)] {
            let mut bed = lazy();
            if small {
                bed.put_tensor("d/x", &[1.0, 2.0]);
            }
            let objects = bed.store.object_count();
            let held = Held::open(&bed, "d/x.npy").unwrap();
            if before {
                change(&bed);
            }
            bed = next_server(bed, 1);
            if !before {
                change(&bed);
            }
            held.check(&bed);
            bed = next_server(bed, 2);
            held.check(&bed);
            held.close(&bed);
            assert!(bed.fs.lazy_opens().is_empty() && bed.fs.doomed.lock().unwrap().is_empty(), "{what}");
            let left = objects - usize::from(what == "removed");
            assert_eq!(bed.store.object_count(), left, "{what}, before: {before}, small: {small}");
        }
    }
}

#[test]
fn a_renamed_inode_keeps_its_number_with_the_next_server() {
    let bed = lazy();
    let held = Held::open(&bed, "d/x.npy").unwrap();
    let ino = bed.lookup("d/x.npy", ME).unwrap().attr.ino;
    chmod(&bed, "d/x.npy", 0o640);
    let directory = bed.lookup("d", ME).unwrap().attr.ino;
    bed.fs.rename(directory, OsStr::new("x.npy"), ROOT, OsStr::new("y.npy"), 0, ME).unwrap();
    let key = OsStr::new("user.long");
    bed.fs.setxattr(ino, key, &[5; 3000], 0, ME).unwrap();
    let bed = next_server(bed, 1);
    let entry = bed.lookup("y.npy", ME).unwrap();
    assert_eq!((entry.attr.ino, entry.attr.perm), (ino, 0o640));
    assert_eq!(bed.fs.getxattr(ino, key).unwrap(), [5; 3000]);
    held.check(&bed);
}

#[test]
fn an_open_view_whose_object_is_gone_is_described_as_before() {
    let bed = bed();
    let object = bed.put_tensor("x", &values());
    let held = Held::open(&bed, "x.npy").unwrap();
    let ino = bed.lookup("x.npy", ME).unwrap().attr.ino;
    let before = bed.fs.getattr(ino, None).unwrap().0;
    bed.store.drop_name("x").unwrap();
    bed.store.delete(&[object]).unwrap();
    let bed = next_server(bed, 1);
    held.check(&bed);
    let after = bed.fs.getattr(ino, None).unwrap().0;
    assert_eq!((after.mtime, after.perm, after.size), (before.mtime, before.perm, before.size));
    held.close(&bed);
}

#[test]
fn an_open_that_nobody_answered_is_taken_back() {
    let asked = Caller { request: 9, ..OTHER };
    for path in ["x.npy", "a.bin"] {
        let bed = bed();
        bed.put_tensor("x", &values());
        bed.save("a.bin", b"text").unwrap();
        let ino = bed.lookup(path, OTHER).unwrap().attr.ino;
        bed.fs.open(ino, libc::O_RDONLY, asked).unwrap();
        let bed = next_server(bed, 1);
        assert_eq!(bed.fs.status()["open_handles"], 1);
        let opened = bed.open_inode(ino, libc::O_RDONLY, Caller { resent: true, ..asked }).unwrap();
        assert_eq!(bed.fs.status()["open_handles"], 1, "{path}");
        bed.close((ino, opened), OTHER).unwrap();
        // It may be sent again when the next server has done it.
        bed.fs.release(ino, opened.fh);
        let bed = next_server(bed, 2);
        assert_eq!(bed.fs.status()["open_handles"], 0, "{path}");
    }
}

#[test]
fn a_handle_that_the_kernel_never_had_goes_when_it_forgets_the_inode() {
    for path in ["x.npy", "a.bin"] {
        let bed = bed();
        bed.put_tensor("x", &values());
        bed.save("a.bin", b"text").unwrap();
        let ino = bed.lookup(path, OTHER).unwrap().attr.ino;
        bed.fs.open(ino, libc::O_RDONLY, OTHER).unwrap();
        let bed = next_server(bed, 1);
        bed.fs.forget(ino, 1);
        assert_eq!(bed.fs.status()["open_handles"], 0, "{path}");
        assert_eq!(next_server(bed, 2).fs.status()["open_handles"], 0, "{path}");
    }
}

#[test]
fn a_new_connection_knows_nothing_of_what_was_open() {
    let bed = bed();
    bed.put_tensor("x", &values());
    bed.open("x.npy", libc::O_RDONLY, OTHER).unwrap();
    bed.host.note(CONNECTION, Some("1"));
    let bed = next_server(bed, 1);
    assert_eq!(bed.fs.status()["open_handles"], 0);
    assert_eq!(bed.host.files.lock().unwrap().len(), 1, "only the image");
}

#[test]
fn many_open_files_are_known_to_the_next_server() {
    let mut bed = bed();
    let long = "d".repeat(200);
    let paths: Vec<String> = (0..300).map(|n| format!("{long}/{long}{n}.npy")).collect();
    for path in &paths {
        bed.put_tensor(path.strip_suffix(".npy").unwrap(), &[1.0]);
    }
    let mut held: Vec<Held> = Vec::new();
    for epoch in 1..4 {
        held.extend(paths.iter().map(|path| Held::open(&bed, path).unwrap()));
        // Every second one.
        let (keep, close): (Vec<_>, Vec<_>) = held.into_iter().enumerate().partition(|(at, _)| at % 2 == 0);
        close.into_iter().for_each(|(_, open)| open.close(&bed));
        held = keep.into_iter().map(|(_, open)| open).collect();
        bed = next_server(bed, epoch);
        assert_eq!(bed.fs.status()["open_handles"], held.len());
        held.iter().for_each(|open| open.check(&bed));
    }
    held.into_iter().for_each(|open| open.close(&bed));
    assert_eq!(next_server(bed, 4).fs.status()["open_handles"], 0);
}
