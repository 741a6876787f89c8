//! Whoever is refused once is not refused again.

use super::super::*;
use super::bed::*;
use super::*;

const WRITE: i32 = libc::O_WRONLY | libc::O_TRUNC;

fn refused(bed: &Bed, ino: u64, flags: i32, caller: Caller) {
    assert_eq!(bed.fs.open(ino, flags, caller).unwrap_err().kind(), Kind::Stale);
}

/// An array that another client replaces; the number under which the former one was looked up.
fn replaced(bed: &Bed, name: &str, values: [f64; 2]) -> u64 {
    bed.put_tensor(name, &values[..1]);
    let former = bed.lookup(&format!("{name}.npy"), OTHER).unwrap().attr.ino;
    bed.put_tensor(name, &values[1..]);
    former
}

/// The second half of an open.
fn open_again(bed: &Bed, path: &str, flags: i32, caller: Caller) -> (u64, Opened) {
    let ino = bed.lookup(path, caller).unwrap().attr.ino;
    // The kernel may look it up several times.
    assert_eq!(bed.lookup(path, caller).unwrap().attr.ino, ino);
    (ino, bed.fs.open(ino, flags, caller).unwrap())
}

#[test]
fn a_writer_of_an_inode_that_is_not_known_any_more_gets_its_file_at_once() {
    let bed = bed();
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    refused(&bed, 0x1234_5678, WRITE, OTHER);
    let writer = open_again(&bed, "t.arrow", WRITE, OTHER);
    bed.write(writer, 0, &table_file(&[2]));
    bed.close(writer, OTHER).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
    // One that does not truncate finds the bytes that are there.
    refused(&bed, 0x1234_5678, libc::O_RDWR, OTHER);
    let writer = open_again(&bed, "t.arrow", libc::O_RDWR, OTHER);
    assert_eq!(column(&bed.read_handle(writer).unwrap()), [2]);
    bed.close(writer, OTHER).unwrap();
    assert_eq!(bed.list(""), ["t.arrow"]);
}

#[test]
fn a_reader_of_a_replaced_version_is_not_sent_to_a_file_that_is_being_written() {
    let bed = bed();
    let stale = replaced(&bed, "x", [1.0, 2.0]);
    // A writer of the same thread that never came for its file.
    let version = bed.lookup("x.npy", OTHER).unwrap().attr.ino;
    refused(&bed, version, WRITE, OTHER);
    refused(&bed, version, WRITE, OTHER);
    refused(&bed, stale, libc::O_RDONLY, OTHER);
    let reader = open_again(&bed, "x.npy", libc::O_RDONLY, OTHER);
    let bytes = bed.read_handle(reader).unwrap();
    assert_eq!(bytes[bytes.len() - 8..], 2.0f64.to_le_bytes());
    bed.close(reader, OTHER).unwrap();
}

#[test]
fn a_reader_of_a_replaced_version_keeps_the_next_one_until_it_opens_it() {
    let bed = bed();
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    // As a second mount sees it, nothing of it is staged.
    let host = Arc::new(LocalHost { passthrough: true, next: AtomicU64::new(1), ..LocalHost::default() });
    let fs = FileSystem::new(bed.store.clone(), host.clone(), Options::default());
    let second = Bed::of(fs, bed.store.clone(), host);
    let stale = second.lookup("t.arrow", ME).unwrap().attr.ino;
    second.save("t.arrow", &table_file(&[2])).unwrap();
    second.fs.staging.retire_old(u64::MAX);
    refused(&second, stale, libc::O_RDONLY, OTHER);
    let found = second.lookup("t.arrow", OTHER).unwrap().attr.ino;
    second.save("t.arrow", &table_file(&[3])).unwrap();
    let opened = second.fs.open(found, libc::O_RDONLY, OTHER).unwrap();
    assert_eq!(column(&second.read_handle((found, opened)).unwrap()), [2]);
    second.close((found, opened), OTHER).unwrap();
    assert_eq!(column(&second.load("t.arrow").unwrap()), [3]);
}

#[test]
fn who_was_sent_to_a_version_as_a_reader_may_write_at_once_and_reads_what_is_there_then() {
    let bed = bed();
    let first = replaced(&bed, "x", [1.0, 2.0]);
    refused(&bed, first, libc::O_RDONLY, OTHER);
    let second = bed.lookup("x.npy", OTHER).unwrap().attr.ino;
    // It does not come for that, but for something else.
    refused(&bed, 0x1234_5678, libc::O_RDONLY, OTHER);
    refused(&bed, second, WRITE, OTHER);
    let writer = open_again(&bed, "x.npy", WRITE, OTHER);
    bed.write(writer, 0, b"written");
    bed.close(writer, OTHER).unwrap();
    assert_eq!(bed.load_as("x.npy", OTHER).unwrap(), b"written");

    let first = replaced(&bed, "y", [2.0, 3.0]);
    refused(&bed, first, libc::O_RDONLY, OTHER);
    let third = open_again(&bed, "y.npy", libc::O_RDONLY, OTHER);
    bed.put_tensor("y", &[4.0]);
    // The kernel does not look a name up that it knows.
    refused(&bed, third.0, libc::O_RDONLY, OTHER);
    bed.close(third, OTHER).unwrap();
}

#[test]
fn who_cuts_an_inode_that_is_not_known_any_more_cuts_the_file() {
    let bed = bed();
    bed.save("text", b"0123456789").unwrap();
    let cut = SetAttr { size: Some(4), ..SetAttr::default() };
    assert_eq!(bed.fs.setattr(0x1234_5678, None, cut, OTHER).unwrap_err().kind(), Kind::Stale);
    let ino = bed.lookup("text", OTHER).unwrap().attr.ino;
    bed.fs.setattr(ino, None, cut, OTHER).unwrap();
    assert_eq!(bed.load("text").unwrap(), b"0123");
}

#[test]
fn who_creates_what_came_to_the_path_meanwhile_gets_a_file_of_its_own() {
    type There = (&'static str, fn(&Bed) -> Option<(u64, Opened)>);
    let there: [There; 4] = [
        ("a dataset", |bed| bed.store.put_name("x.bin", bed.put_tensor("other", &[1.0])).map(|()| None).unwrap()),
        ("a file", |bed| {
            bed.save_as("x.bin", b"another's, and longer", OTHER).unwrap();
            bed.forget();
            None
        }),
        ("one that is being written", |bed| bed.create("x.bin", OTHER).ok()),
        ("one that is being replaced", |bed| {
            bed.save_as("x.bin", b"the first", OTHER).unwrap();
            bed.create("x.bin", OTHER).ok()
        }),
    ];
    for (what, make) in there {
        for pid in [ME.pid, 0] {
            let bed = bed();
            let other = make(&bed);
            let caller = Caller { pid, ..ME };
            let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC;
            let (entry, opened) = bed.fs.create(ROOT, OsStr::new("x.bin"), 0o644, 0, flags, caller).unwrap();
            let own = (entry.attr.ino, opened);
            bed.write(own, 0, b"own");
            if let Some(other) = other {
                bed.write(other, 0, b"another's, and longer");
                bed.close(other, OTHER).unwrap();
            }
            bed.close(own, caller).unwrap();
            assert_eq!(bed.load_as("x.bin", OTHER).unwrap(), b"own", "{what}");
        }
    }
}

#[test]
fn a_second_refusal_ends_it() {
    let bed = bed();
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    refused(&bed, 0x1234_5678, WRITE, OTHER);
    refused(&bed, 0x1234_5678, WRITE, OTHER);
    // The program was told, and does something else.
    let ino = bed.lookup("t.arrow", OTHER).unwrap().attr.ino;
    assert_eq!(bed.fs.getattr(ino, None).unwrap().0.size, table_file(&[1]).len() as u64);
    assert_eq!(column(&bed.load_as("t.arrow", OTHER).unwrap()), [1]);
}

#[test]
fn a_file_that_was_renamed_here_and_back_elsewhere_can_be_opened() {
    let bed = bed();
    let object = bed.put_tensor("a", &[1.0]);
    let elsewhere = |from: &str, to: &str| {
        bed.store.put_name(to, object).unwrap();
        bed.store.drop_name(from).unwrap();
    };
    let here = |from: &str, to: &str| bed.fs.rename(ROOT, OsStr::new(from), ROOT, OsStr::new(to), 0, ME).unwrap();
    let renamed = bed.lookup("a.npy", ME).unwrap().attr.ino;
    here("a.npy", "b.npy");
    assert_eq!(bed.lookup("b.npy", ME).unwrap().attr.ino, renamed, "as the kernel has it");
    elsewhere("b", "a");
    let again = bed.lookup("a.npy", ME).unwrap().attr.ino;
    assert_eq!(bed.lookup("a.npy", ME).unwrap().attr.ino, again);
    assert!(bed.load("a.npy").is_ok());
    // What the kernel may still know as the other path leads nowhere.
    refused(&bed, renamed, libc::O_RDONLY, OTHER);
    here("a.npy", "b.npy");
    assert!(bed.load("b.npy").is_ok());
    here("b.npy", "a.npy");
    elsewhere("a", "b");
    assert!(bed.load("b.npy").is_ok());
    assert_eq!(bed.load("a.npy").unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn a_thread_that_gets_no_processor_for_seconds_still_finds_what_it_was_sent_to() {
    let bed = bed();
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    let pause = || {
        std::thread::sleep(Duration::from_millis(2_100));
        // Others go on, and time is called.
        assert_eq!(column(&bed.load_as("t.arrow", ME).unwrap()), [1]);
        bed.fs.end_old_redirects();
    };
    let first = bed.lookup("t.arrow", OTHER).unwrap().attr.ino;
    refused(&bed, first, WRITE, OTHER);
    pause();
    let ino = bed.lookup("t.arrow", OTHER).unwrap().attr.ino;
    pause();
    let writer = (ino, bed.fs.open(ino, WRITE, OTHER).unwrap());
    bed.write(writer, 0, &table_file(&[2]));
    bed.close(writer, OTHER).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
}

#[test]
fn who_was_refused_and_then_finds_nothing_has_no_file_made_elsewhere() {
    let bed = bed();
    for name in ["t.arrow", "u.arrow"] {
        bed.save(name, &table_file(&[1])).unwrap();
    }
    refused(&bed, 0x1234_5678, WRITE, OTHER);
    bed.fs.unlink(ROOT, OsStr::new("t.arrow"), ME).unwrap();
    assert_eq!(bed.lookup("t.arrow", OTHER).unwrap_err().kind(), Kind::NotFound);
    let other = bed.lookup("u.arrow", OTHER).unwrap();
    assert_eq!(other.attr.size, table_file(&[1]).len() as u64);
}

#[test]
fn what_a_process_of_another_pid_namespace_was_refused_is_nobody_elses_business() {
    let bed = bed();
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    let stranger = Caller { pid: 0, ..ME };
    refused(&bed, 0x1234_5678, WRITE, stranger);
    // Another one with the same number looks at a file.
    let seen = bed.lookup("t.arrow", stranger).unwrap();
    assert_eq!(seen.attr.size, table_file(&[1]).len() as u64);
    assert_eq!(column(&bed.load_as("t.arrow", stranger).unwrap()), [1]);
}

/// The file that another thread created after a thread was refused what was there before; the kernel gives it to both.
fn refused_and_created(bed: &Bed) -> (u64, Opened) {
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    let ino = bed.lookup("t.arrow", OTHER).unwrap().attr.ino;
    bed.fs.unlink(ROOT, OsStr::new("t.arrow"), ME).unwrap();
    refused(bed, ino, WRITE, OTHER);
    assert_eq!(bed.lookup("t.arrow", OTHER).unwrap_err().kind(), Kind::NotFound);
    let writer = bed.create("t.arrow", ME).unwrap();
    bed.write(writer, 0, &table_file(&[2]));
    writer
}

#[test]
fn a_writer_that_is_led_to_what_another_writes_has_its_turn_after_it() {
    let bed = bed();
    let first = refused_and_created(&bed);
    std::thread::scope(|threads| {
        let second = threads.spawn(|| bed.fs.open(first.0, WRITE, OTHER).unwrap());
        while bed.fs.staging.at("t.arrow").unwrap().state().expected.is_empty() {
            std::thread::yield_now();
        }
        bed.close(first, ME).unwrap();
        let second = (first.0, second.join().unwrap());
        // The first one's bytes are all in the store, and nothing of them in what is written now.
        let object = bed.fs.object_of("t").unwrap().unwrap();
        let published = bed.fs.objects.summary(&*bed.store, object).unwrap().unwrap();
        assert_eq!(published.rows, Some(1));
        assert_eq!(bed.fs.getattr(first.0, None).unwrap().0.size, 0);
        bed.write(second, 0, &table_file(&[3, 4]));
        bed.close(second, OTHER).unwrap();
    });
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [3, 4]);
    assert_eq!(bed.list(""), ["t.arrow"]);
}

#[test]
fn a_writer_does_not_wait_for_ever_for_its_turn_and_spoils_nothing() {
    let bed = bed();
    let first = refused_and_created(&bed);
    refused(&bed, first.0, WRITE, OTHER);
    bed.close(first, ME).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
    // Bytes that somebody reads are not cut either.
    let reader = bed.open("t.arrow", libc::O_RDONLY, ME).unwrap();
    refused(&bed, 0x1234_5678, WRITE, OTHER);
    refused(&bed, reader.0, WRITE, OTHER);
    assert_eq!(column(&bed.read_handle(reader).unwrap()), [2]);
    bed.close(reader, ME).unwrap();
    assert_eq!(column(&bed.load("t.arrow").unwrap()), [2]);
}

#[test]
fn a_reader_that_is_led_to_what_another_writes_waits_for_its_end() {
    let bed = bed();
    bed.save("t.arrow", &table_file(&[1])).unwrap();
    let writer = bed.open("t.arrow", WRITE, ME).unwrap();
    bed.write(writer, 0, &table_file(&[2]));
    refused(&bed, writer.0, libc::O_RDONLY, OTHER);
    std::thread::scope(|threads| {
        let reader = threads.spawn(|| bed.fs.open(writer.0, libc::O_RDONLY, OTHER));
        std::thread::sleep(Duration::from_millis(5));
        bed.close(writer, ME).unwrap();
        let reader = (writer.0, reader.join().unwrap().unwrap());
        assert_eq!(column(&bed.read_handle(reader).unwrap()), [2]);
        bed.close(reader, OTHER).unwrap();
    });
}

#[test]
fn what_is_cut_right_after_its_close_is_cut() {
    let bed = bed();
    let whole = table_file(&[1, 2, 3]);
    let size = whole.len() as u64 - 10;
    let cut = SetAttr { size: Some(size), ..SetAttr::default() };
    let (ino, opened) = bed.create("t.arrow", ME).unwrap();
    bed.write((ino, opened), 0, &whole);
    bed.fs.flush(ino, opened.fh, ME).unwrap();
    // The program went on; the last step of its close has not come yet.
    bed.fs.setattr(ino, None, cut, ME).unwrap();
    bed.fs.release(ino, opened.fh);
    assert_eq!(bed.load("t.arrow").unwrap(), whole[..size as usize]);
    assert_eq!(bed.list(""), ["t.arrow"]);
    // As another mount sees it.
    let host = Arc::new(LocalHost { passthrough: true, next: AtomicU64::new(1), ..LocalHost::default() });
    let fs = FileSystem::new(bed.store.clone(), host.clone(), Options::default());
    assert_eq!(Bed::of(fs, bed.store.clone(), host).load("t.arrow").unwrap(), whole[..size as usize]);
}
