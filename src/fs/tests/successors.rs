//! A server that is killed while files are open, and what the next one knows of them.

use super::super::*;
use super::bed::*;
use super::model::{next_server, next_server_with};
use super::*;

fn half_replaced() -> (Bed, (u64, Opened)) {
    let bed = bed();
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    let writer = bed.create("t.arrow", ME).unwrap();
    bed.write(writer, 0, &table_file(&[2])[..100]);
    let bed = next_server(bed, 1);
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [1], "others read the version before");
    (bed, writer)
}

#[test]
fn a_file_that_is_half_replaced_is_so_for_the_next_server() {
    let (bed, writer) = half_replaced();
    bed.write(writer, 0, &table_file(&[2]));
    bed.close(writer, ME).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
    let bed = next_server(bed, 2);
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
    assert_eq!(bed.fs.status()["open_handles"], 0);
}

#[test]
fn a_writer_that_dies_after_its_server_replaces_nothing() {
    let (bed, writer) = half_replaced();
    bed.fs.release(writer.0, writer.1.fh);
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [1]);
    let bed = next_server(bed, 2);
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [1]);
}

#[test]
fn a_half_replaced_file_is_removed_whole_by_the_next_server() {
    let (bed, writer) = half_replaced();
    bed.fs.unlink(ROOT, OsStr::new("t.arrow"), ME).unwrap();
    assert_eq!(bed.lookup("t.arrow", OTHER).unwrap_err().kind(), Kind::NotFound);
    bed.close(writer, ME).unwrap();
    assert_eq!((bed.list(""), bed.store.object_count()), (vec![], 0));
}

#[test]
fn who_appends_meets_those_who_appended_before_the_server_was_killed() {
    let bed = bed();
    let first = bed.create("log.txt", ME).unwrap();
    bed.write(first, 0, b"A\n");
    bed.fs.fsync(first.0, first.1.fh).unwrap();
    let bed = next_server(bed, 1);
    let second = bed.open("log.txt", libc::O_WRONLY | libc::O_APPEND, OTHER).unwrap();
    assert_eq!((second.0, second.1.serve), (first.0, first.1.serve), "one file, served in one way");
    bed.write(second, 2, b"B\n");
    bed.close(second, OTHER).unwrap();
    bed.write(first, 4, b"A\n");
    bed.close(first, ME).unwrap();
    assert_eq!(bed.load("log.txt").unwrap(), b"A\nB\nA\n");
}

#[test]
fn what_is_open_for_writing_is_cut_by_its_writer() {
    let bed = bed();
    let writer = bed.create("a.txt", ME).unwrap();
    bed.write(writer, 0, b"longer");
    bed.fs.fsync(writer.0, writer.1.fh).unwrap();
    let bed = next_server(bed, 1);
    let cut = SetAttr { size: Some(4), ..Default::default() };
    bed.fs.setattr(writer.0, Some(writer.1.fh), cut, ME).unwrap();
    bed.close(writer, ME).unwrap();
    assert_eq!(bed.load("a.txt").unwrap(), b"long");
}

#[test]
fn extended_attributes_and_modes_outlive_a_server() {
    for length in [1, 10_000] {
        let bed = bed();
        let (key, value) = (OsStr::new("user.k"), vec![7; length]);
        bed.save("a.txt", b"text").unwrap();
        let ino = bed.lookup("a.txt", ME).unwrap().attr.ino;
        bed.fs.setxattr(ino, key, &value, 0, ME).unwrap();
        // That of a file that is being written is not in the store yet.
        let writer = bed.create("b.txt", ME).unwrap();
        bed.fs.setxattr(writer.0, key, b"v", 0, ME).unwrap();
        let chmod = SetAttr { mode: Some(0o640), ..Default::default() };
        bed.fs.setattr(writer.0, None, chmod, ME).unwrap();
        let bed = next_server(bed, 1);
        assert_eq!(bed.fs.getxattr(ino, key).unwrap(), value);
        bed.fs.setattr(bed.lookup("a.txt", ME).unwrap().attr.ino, None, chmod, ME).unwrap();
        bed.write(writer, 0, b"text");
        bed.close(writer, ME).unwrap();
        let host = Arc::new(LocalHost { next: AtomicU64::new(1), ..LocalHost::default() });
        let fs = FileSystem::new(bed.store.clone(), host.clone(), Options::default());
        let other = Bed::of(fs, bed.store.clone(), host);
        for (path, value) in [("a.txt", value.as_slice()), ("b.txt", b"v")] {
            let attr = other.lookup(path, ME).unwrap().attr;
            assert_eq!((attr.perm, other.fs.getxattr(attr.ino, key).unwrap().as_slice()), (0o640, value), "{path}");
        }
    }
}

#[test]
fn a_child_that_closes_what_it_inherited_publishes_nothing_after_a_kill_either() {
    let opener = Caller { pid: std::process::id(), ..ME };
    let child = Caller { pid: std::os::unix::process::parent_id(), ..ME };
    let bed = bed();
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    let writer = bed.create("t.arrow", opener).unwrap();
    bed.write(writer, 0, &table_file(&[2])[..100]);
    let bed = next_server(bed, 1);
    bed.fs.flush(writer.0, writer.1.fh, child).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [1]);
    bed.write(writer, 0, &table_file(&[2]));
    bed.close(writer, opener).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
}

#[test]
fn a_reader_of_a_former_server_that_closes_is_not_the_last_writer() {
    let bed = bed();
    let writer = bed.create("a.txt", ME).unwrap();
    bed.write(writer, 0, b"one");
    let reader = bed.open("a.txt", libc::O_RDONLY, OTHER).unwrap();
    bed.fs.fsync(writer.0, writer.1.fh).unwrap();
    let bed = next_server(bed, 1);
    bed.close(reader, OTHER).unwrap();
    bed.write(writer, 0, b"two");
    assert_eq!(bed.load("a.txt").unwrap(), b"one", "it is being written");
    bed.close(writer, ME).unwrap();
    assert_eq!(bed.load("a.txt").unwrap(), b"two");
}

#[test]
fn an_open_that_nobody_answered_leaves_no_writer_behind() {
    let bed = bed();
    let caller = Caller { request: 9, ..ME };
    bed.create("a.txt", caller).unwrap();
    let bed = next_server(bed, 1);
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL;
    let again = Caller { resent: true, ..caller };
    let (entry, opened) = bed.fs.create(ROOT, OsStr::new("a.txt"), 0o644, 0o022, flags, again).unwrap();
    let writer = (entry.attr.ino, opened);
    bed.write(writer, 0, b"text");
    bed.close(writer, ME).unwrap();
    assert_eq!(bed.fs.status()["open_handles"], 0);
    let staged = bed.fs.staging.at("a.txt").unwrap();
    let state = staged.state();
    assert!(state.writers.is_empty() && state.opens == 0);
}

#[test]
fn a_writer_that_was_sent_to_its_file_finds_it_with_the_next_server_and_nobody_else_does() {
    let bed = bed();
    bed.put_tensor("x", &[1.0]);
    let before = bed.load("x.npy").unwrap();
    let view = bed.lookup("x.npy", ME).unwrap().attr.ino;
    let flags = libc::O_WRONLY | libc::O_TRUNC;
    assert_eq!(bed.fs.open(view, flags, ME).unwrap_err().kind(), Kind::Stale);
    let ino = bed.lookup("x.npy", ME).unwrap().attr.ino;
    let bed = next_server(bed, 1);
    assert_eq!(bed.load("x.npy").unwrap(), before);
    assert_eq!((bed.fs.getattr(ino, None).unwrap().0.size, bed.lookup("x.npy", ME).unwrap().attr.ino), (0, ino));
    let writer = (ino, bed.fs.open(ino, flags, ME).unwrap());
    bed.write(writer, 0, b"other");
    assert_eq!(bed.load("x.npy").unwrap(), before);
    bed.close(writer, ME).unwrap();
    assert_eq!(bed.load("x.npy").unwrap(), b"other");
}

/// It is killed between the moment at which a copy takes a file's place and the note of that.
#[test]
fn of_two_files_at_a_path_the_later_one_stays() {
    for _ in 0..10 {
        let bed = bed();
        bed.save("log.txt", b"first\n").unwrap();
        let flags = libc::O_WRONLY | libc::O_APPEND;
        bed.load("log.txt").unwrap();
        let notes = bed.host.tags.lock().unwrap().clone();
        let former = bed.lookup("log.txt", ME).unwrap().attr.ino;
        assert_eq!(bed.open_inode(former, flags, ME).unwrap_err().kind(), Kind::Stale);
        bed.append_line("log.txt", "second\n", ME).unwrap();
        let writer = bed.open("log.txt", flags, ME).unwrap();
        bed.append(writer, b"third\n");
        // What was noted of the first file is what it was at first.
        let kept: Vec<u64> = bed.host.tags.lock().unwrap().keys().copied().collect();
        let outdated = notes.into_iter().filter(|(key, (area, _))| *area == Area::Staging && kept.contains(key));
        bed.host.tags.lock().unwrap().extend(outdated);
        let bed = next_server(bed, 1);
        bed.append_line("log.txt", "fourth\n", OTHER).unwrap();
        bed.append(writer, b"fifth\n");
        bed.close(writer, ME).unwrap();
        let text = String::from_utf8(bed.load("log.txt").unwrap()).unwrap();
        assert_eq!(text, "first\nsecond\nthird\nfourth\nfifth\n");
    }
}

#[test]
fn a_path_that_a_former_server_told_leads_to_no_other_file_of_that_number() {
    let (store, bed, other) = others::two();
    other.save("a.arrow", &table_file(&[1])).unwrap();
    bed.lookup("a.arrow", ME).unwrap();
    let renamed = |bed: &Bed, from: &str, to: &str| bed.fs.rename(ROOT, OsStr::new(from), ROOT, OsStr::new(to), 0, ME);
    // The number goes along, and the kernel keeps what it was told for a second.
    renamed(&bed, "a.arrow", "b.arrow").unwrap();
    let number = bed.lookup("b.arrow", ME).unwrap().attr.ino;
    other.load("b.arrow").unwrap();
    renamed(&other, "b.arrow", "a.arrow").unwrap();
    let entry_ttl = Duration::from_secs(3600);
    let bed = next_server_with(bed, Options { epoch: 1, entry_ttl, ..Options::default() });
    let there = bed.open("a.arrow", libc::O_RDONLY, OTHER).unwrap();
    assert_eq!((there.0, column(&bed.read_handle(there).unwrap())), (number, vec![1]));
    // By a path that was looked up here it is opened without a second question.
    let known = bed.lookup("a.arrow", ME).unwrap().attr.ino;
    bed.open_inode(known, libc::O_RDONLY, ME).unwrap();
    for flags in [libc::O_RDONLY, libc::O_WRONLY | libc::O_APPEND] {
        assert_eq!(bed.open_inode(number, flags, ME).unwrap_err().kind(), Kind::Stale, "the kernel has it as b.arrow");
        assert_eq!(bed.lookup("b.arrow", ME).unwrap_err().kind(), Kind::NotFound);
    }
    assert_eq!(others::names(&store), ["a"]);
}
