//! Threads on one filesystem, in interleavings that a scheduler chooses.

use std::sync::atomic::AtomicU32;

use super::bed::*;
use super::*;
use crate::sync::{schedules::check, thread};

/// The kernel tells the thread, which it calls a process here.
fn caller() -> Caller {
    static NEXT: AtomicU32 = AtomicU32::new(1000);
    Caller { pid: NEXT.fetch_add(1, Ordering::Relaxed), ..ME }
}

fn spawn(bed: &Arc<Bed>, work: impl FnOnce(&Bed, Caller) + Send + 'static) -> thread::JoinHandle<()> {
    let bed = bed.clone();
    thread::spawn(move || work(&bed, caller()))
}

/// A load of a file that is always there finds one version of it.
fn assert_version(loaded: Result<Vec<u8>>, versions: &[Vec<u8>]) {
    let bytes = loaded.unwrap();
    assert!(versions.contains(&bytes), "{} bytes of no version", bytes.len());
}

fn rename(bed: &Bed, from: &str, to: &str) -> Result<()> {
    let _directory = bed.directory.lock().unwrap();
    bed.fs.rename(ROOT, OsStr::new(from), ROOT, OsStr::new(to), 0, ME)
}

fn unlink(bed: &Bed, name: &str) -> Result<()> {
    let _directory = bed.directory.lock().unwrap();
    bed.fs.unlink(ROOT, OsStr::new(name), ME)
}

/// The kernel asks a second time after `Stale`. Of three that change one name at the same time, one may meet the others
/// both times, and its program sees ESTALE: it has changed nothing then.
fn done_or_stale(result: Result<()>) {
    assert!(result.as_ref().map_or_else(|error| error.kind() == Kind::Stale, |()| true), "{result:?}");
}

/// Removes everything; nothing may stay in the store then.
fn assert_nothing_is_left(bed: &Bed) {
    for name in bed.list("") {
        unlink(bed, &name).unwrap();
    }
    // What is kept for a reader that never came back goes with time.
    bed.fs.staging.expire_redirects();
    bed.fs.end_old_redirects();
    assert_eq!((bed.store.object_count(), bed.store.blob_count()), (0, 0), "left over");
}

#[test]
fn savers_and_readers_of_one_name() {
    for passthrough in [true, false] {
        check(move || {
            let bed = Arc::new(bed_with(passthrough, Options::default()));
            let versions: Vec<Vec<u8>> = (0..3).map(|v| table_file(&[v, v + 1])).collect();
            bed.save("t.arrow", &versions[0]).unwrap();
            let mut threads = Vec::new();
            for version in &versions[1..] {
                let version = version.clone();
                threads.push(spawn(&bed, move |bed, me| bed.save_as("t.arrow", &version, me).unwrap()));
            }
            let known = versions.clone();
            threads.push(spawn(&bed, move |bed, me| {
                assert_version(bed.load_as("t.arrow", me), &known);
                assert_version(bed.load_as("t.arrow", me), &known);
            }));
            threads.push(spawn(&bed, |bed, me| {
                let bytes = bed.load_as("t.feather", me).unwrap();
                assert!(matches!(column(&bytes)[..], [0, 1] | [1, 2] | [2, 3]));
            }));
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(bed.list(""), ["t.arrow"]);
            assert!(versions[1..].contains(&bed.load("t.arrow").unwrap()), "the last save is what is there");
            assert_nothing_is_left(&bed);
        });
    }
}

#[test]
fn a_save_a_rename_and_an_unlink() {
    check(|| {
        let bed = Arc::new(bed());
        let versions: Vec<Vec<u8>> = (0..3).map(|v| table_file(&[v])).collect();
        bed.save("t.arrow", &versions[0]).unwrap();
        bed.save("u.arrow", &versions[1]).unwrap();
        let saved = versions[2].clone();
        let threads = [
            spawn(&bed, move |bed, me| bed.save_as("u.arrow", &saved, me).unwrap()),
            spawn(&bed, |bed, _| done_or_stale(rename(bed, "t.arrow", "u.arrow"))),
            spawn(&bed, |bed, _| match unlink(bed, "u.arrow") {
                Ok(()) => {}
                Err(error) => assert_eq!(error.kind(), Kind::NotFound, "{error}"),
            }),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        match &bed.list("")[..] {
            [] => {}
            [name] if name == "u.arrow" => assert_version(Ok(bed.load("u.arrow").unwrap()), &versions),
            // The rename was refused.
            [t, ..] if t == "t.arrow" => assert_eq!(bed.load("t.arrow").unwrap(), versions[0]),
            names => panic!("{names:?}"),
        }
        assert_nothing_is_left(&bed);
    });
}

#[test]
fn an_open_file_outlives_its_name() {
    check(|| {
        let bed = Arc::new(bed_with(false, Options::default()));
        let file = table_file(&(0..300).collect::<Vec<_>>());
        bed.save("t.arrow", &file).unwrap();
        let known = file.clone();
        let threads = [
            spawn(&bed, move |bed, me| match bed.open("t.arrow", libc::O_RDONLY, me) {
                Ok(handle) => {
                    assert!(bed.read_handle(handle).is_ok_and(|bytes| bytes == known), "bytes of the opened file");
                    bed.close(handle, me).unwrap();
                }
                Err(error) => assert!(matches!(error.kind(), Kind::NotFound | Kind::Stale), "{error}"),
            }),
            spawn(&bed, |bed, _| unlink(bed, "t.arrow").unwrap()),
            spawn(&bed, |bed, me| bed.save_as("t.bin", b"beside it", me).unwrap()),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(bed.list(""), ["t.bin"]);
        assert_nothing_is_left(&bed);
    });
}

#[test]
fn appenders_of_one_file() {
    for passthrough in [true, false] {
        check(move || {
            let bed = Arc::new(bed_with(passthrough, Options::default()));
            bed.save("log.txt", b"first\n").unwrap();
            let mut threads = Vec::new();
            for number in 0..3 {
                threads.push(spawn(&bed, move |bed, me| {
                    for line in 0..2 {
                        bed.append_line("log.txt", &format!("{number} {line}\n"), me).unwrap();
                    }
                }));
            }
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            let text = String::from_utf8(bed.load("log.txt").unwrap()).unwrap();
            let mut lines: Vec<&str> = text.lines().collect();
            lines.sort_unstable();
            assert_eq!(lines, ["0 0", "0 1", "1 0", "1 1", "2 0", "2 1", "first"]);
            assert_nothing_is_left(&bed);
        });
    }
}
