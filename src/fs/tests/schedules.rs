//! Threads on one filesystem, in interleavings that a scheduler chooses.

use std::sync::atomic::{AtomicU32, AtomicU64};

use super::bed::*;
use super::*;
use crate::sync::{schedules::check, thread};
use crate::vineyard::fake::FakeStore;

/// The kernel tells the thread, which it calls a process here.
fn caller() -> Caller {
    static NEXT: AtomicU32 = AtomicU32::new(1000);
    Caller { pid: NEXT.fetch_add(1, Ordering::Relaxed), ..ME }
}

/// Work on a filesystem whose files the kernel reads and writes by itself, and on one to which it sends requests.
pub fn check_each(work: impl Fn(Arc<Bed>) + Send + Sync + Clone + 'static) {
    for passthrough in [true, false] {
        let work = work.clone();
        check(move || work(Arc::new(bed_with(passthrough, Options::default()))));
    }
}

pub fn spawn(bed: &Arc<Bed>, work: impl FnOnce(&Bed, Caller) + Send + 'static) -> thread::JoinHandle<()> {
    let bed = bed.clone();
    thread::spawn(move || work(&bed, caller()))
}

/// A load of a file that is always there finds one version of it.
fn assert_version(loaded: Result<Vec<u8>>, versions: &[Vec<u8>]) {
    let bytes = loaded.unwrap();
    assert!(versions.contains(&bytes), "bytes of no version: {:?}", String::from_utf8_lossy(&bytes));
}

/// The same where another mount replaces it: what it deletes is not kept for a reader of this one, who may meet that both
/// times.
fn assert_version_or_stale(loaded: Result<Vec<u8>>, versions: &[Vec<u8>]) {
    if !loaded.as_ref().is_err_and(|error| error.kind() == Kind::Stale) {
        assert_version(loaded, versions);
    }
}

pub fn rename(bed: &Bed, from: &str, to: &str) -> Result<()> {
    let _directory = bed.directory.lock().unwrap();
    bed.fs.rename(ROOT, OsStr::new(from), ROOT, OsStr::new(to), 0, ME)
}

pub fn unlink(bed: &Bed, name: &str) -> Result<()> {
    let _directory = bed.directory.lock().unwrap();
    bed.fs.unlink(ROOT, OsStr::new(name), ME)
}

/// The kernel asks a second time after `Stale`. Of three that change one name at the same time, one may meet the others
/// both times, and its program sees ESTALE: it has changed nothing then.
pub fn done_or_stale(result: Result<()>) {
    assert!(result.as_ref().map_or_else(|error| error.kind() == Kind::Stale, |()| true), "{result:?}");
}

/// Removes everything; nothing may stay in the store then.
pub fn assert_nothing_is_left(bed: &Bed) {
    bed.remove_all("");
    // What is kept for a reader that never came back goes with time.
    bed.fs.staging.expire_redirects();
    bed.fs.end_old_redirects();
    assert_eq!((bed.store.object_count(), bed.store.blob_count()), (0, 0), "left over");
}

#[test]
fn savers_and_readers_of_one_name() {
    check_each(|bed| {
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

/// As `chmod` does it, which the kernel tries a second time.
pub fn chmod(bed: &Bed, path: &str, mode: u32, caller: Caller) -> Result<()> {
    let change = SetAttr { mode: Some(mode), ..SetAttr::default() };
    let once = || bed.fs.setattr(bed.lookup(path, caller)?.attr.ino, None, change, caller).map(drop);
    asking_twice(once)
}

#[test]
fn writers_in_place() {
    check_each(|bed| {
        bed.save("f.bin", &[b'.'; 6]).unwrap();
        let patch = |number: u64| {
            move |bed: &Bed, me| {
                for round in 0..2 {
                    let flags = [libc::O_RDWR, libc::O_WRONLY][(number % 2) as usize];
                    let handle = bed.open("f.bin", flags, me).unwrap();
                    bed.write(handle, 2 * number + round, &[b'a' + number as u8]);
                    bed.close(handle, me).unwrap();
                }
            }
        };
        let threads = [
            spawn(&bed, patch(0)),
            spawn(&bed, patch(1)),
            spawn(&bed, patch(2)),
            spawn(&bed, |bed, me| {
                let bytes = bed.load_as("f.bin", me).unwrap();
                assert!(bytes.len() == 6 && bytes.iter().all(|byte| b".abc".contains(byte)));
            }),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(bed.load("f.bin").unwrap(), b"aabbcc");
        assert_nothing_is_left(&bed);
    });
}

#[test]
fn savers_by_rename_and_readers() {
    check(|| {
        let bed = Arc::new(bed());
        let versions: Vec<Vec<u8>> = (0..3).map(|v| table_file(&[v, v + 1])).collect();
        bed.save("t.arrow", &versions[0]).unwrap();
        let save = |number: usize, bytes: Vec<u8>| {
            move |bed: &Bed, me| {
                let temporary = format!("tmp{number}.arrow");
                bed.save_as(&temporary, &bytes, me).unwrap();
                rename(bed, &temporary, "t.arrow").unwrap();
            }
        };
        let known = versions.clone();
        let threads = [
            spawn(&bed, save(1, versions[1].clone())),
            spawn(&bed, save(2, versions[2].clone())),
            spawn(&bed, move |bed, me| {
                assert_version(bed.load_as("t.arrow", me), &known);
                assert!(bed.list("").contains(&"t.arrow".to_owned()));
                assert_version(bed.load_as("t.arrow", me), &known);
            }),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(bed.list(""), ["t.arrow"]);
        assert!(versions[1..].contains(&bed.load("t.arrow").unwrap()));
        assert_nothing_is_left(&bed);
    });
}

pub fn two_mounts(passthrough: bool) -> [Arc<Bed>; 2] {
    let store = Arc::new(FakeStore::new(64 << 20));
    let mount = |_| {
        let next = AtomicU64::new(1);
        let host = Arc::new(LocalHost { passthrough, next, store: Some(store.clone()), ..LocalHost::default() });
        let fs = FileSystem::new(store.clone(), host.clone(), Options::default());
        Arc::new(Bed::of(fs, store.clone(), host))
    };
    [0, 1].map(mount)
}

#[test]
fn two_mounts_of_one_store() {
    for passthrough in [true, false] {
        check(move || {
            let mounts = two_mounts(passthrough);
            let versions: Vec<Vec<u8>> = (0..4).map(|v| table_file(&[v, v + 1])).collect();
            mounts[0].save("t.arrow", &versions[0]).unwrap();
            let mut threads = Vec::new();
            for (at, bed) in mounts.iter().enumerate() {
                let (own, known) = (versions[at + 1].clone(), versions.clone());
                threads.push(spawn(bed, move |bed, me| {
                    bed.save_as("t.arrow", &own, me).unwrap();
                    assert_version_or_stale(bed.load_as("t.arrow", me), &known);
                }));
                let known = versions.clone();
                threads.push(spawn(bed, move |bed, me| {
                    assert_version_or_stale(bed.load_as("t.arrow", me), &known);
                    assert_eq!(bed.list(""), ["t.arrow"]);
                }));
            }
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            let last = mounts[0].load("t.arrow").unwrap();
            assert!(versions[1..3].contains(&last));
            assert_eq!(mounts[1].load("t.arrow").unwrap(), last, "both show the same");
            mounts[1].save("t.arrow", &versions[3]).unwrap();
            assert_eq!(mounts[0].load("t.arrow").unwrap(), versions[3]);
            assert_nothing_is_left(&mounts[0]);
        });
    }
}

/// As `cp -p` does it.
#[test]
fn attributes_that_are_set_after_a_save_stay() {
    for passthrough in [true, false] {
        check(move || {
            let mounts = two_mounts(passthrough);
            let versions: Vec<Vec<u8>> = (0..2).map(|v| table_file(&[v, v + 1])).collect();
            mounts[0].save("t.arrow", &versions[0]).unwrap();
            let (saved, known) = (versions[1].clone(), versions.clone());
            let read = move |bed: &Bed, me| {
                assert_version_or_stale(bed.load_as("t.arrow", me), &known);
                assert_eq!(bed.list(""), ["t.arrow"]);
            };
            let threads = [
                spawn(&mounts[0], move |bed, me| {
                    bed.save_as("t.arrow", &saved, me).unwrap();
                    chmod(bed, "t.arrow", 0o640, me).unwrap();
                    chmod(bed, "t.arrow", 0o600, me).unwrap();
                }),
                spawn(&mounts[0], read.clone()),
                spawn(&mounts[1], read),
            ];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            for bed in &mounts {
                assert_eq!(bed.lookup("t.arrow", ME).unwrap().attr.perm, 0o600);
                assert_eq!(bed.load("t.arrow").unwrap(), versions[1]);
            }
            assert_nothing_is_left(&mounts[0]);
        });
    }
}

#[test]
fn a_saver_and_a_writer_in_place() {
    check_each(|bed| {
        bed.save("f.bin", b"......").unwrap();
        let threads = [
            spawn(&bed, |bed, me| bed.save_as("f.bin", b"xxxxxx", me).unwrap()),
            spawn(&bed, |bed, me| {
                let handle = bed.open("f.bin", libc::O_RDWR, me).unwrap();
                bed.write(handle, 0, b"a");
                bed.close(handle, me).unwrap();
            }),
            spawn(&bed, |bed, me| {
                // The one who writes in place may have found the other's file, still empty.
                let versions = ["......", "xxxxxx", "a.....", "axxxxx", "a"];
                assert_version(bed.load_as("f.bin", me), &versions.map(|version| version.into()));
            }),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        // Of two who had it open at the same time the last one is right.
        let last = bed.load("f.bin").unwrap();
        assert!([b"xxxxxx", b"a.....", b"axxxxx"].contains(&&last[..].try_into().unwrap()));
        assert_nothing_is_left(&bed);
    });
}

#[test]
fn renames_that_meet() {
    check(|| {
        let bed = Arc::new(bed());
        let versions: Vec<Vec<u8>> = (0..3).map(|v| table_file(&[v, v + 1])).collect();
        for (name, version) in ["a.arrow", "b.arrow", "c.arrow"].into_iter().zip(&versions) {
            bed.save(name, version).unwrap();
        }
        let known = versions.clone();
        let threads = [
            spawn(&bed, |bed, _| rename(bed, "a.arrow", "b.arrow").unwrap()),
            spawn(&bed, |bed, _| rename(bed, "c.arrow", "b.arrow").unwrap()),
            spawn(&bed, move |bed, me| {
                assert_version(bed.load_as("b.arrow", me), &known);
                assert!(bed.list("").contains(&"b.arrow".to_owned()));
            }),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(bed.list(""), ["b.arrow"]);
        assert!([&versions[0], &versions[2]].contains(&&bed.load("b.arrow").unwrap()));
        assert_nothing_is_left(&bed);
    });
}

#[test]
fn an_exchange_and_readers() {
    check(|| {
        let bed = Arc::new(bed());
        let versions: Vec<Vec<u8>> = (0..2).map(|v| table_file(&[v, v + 1])).collect();
        bed.save("a.arrow", &versions[0]).unwrap();
        bed.save("b.arrow", &versions[1]).unwrap();
        let read = |name: &'static str| {
            let known = versions.clone();
            move |bed: &Bed, me| {
                assert_version_or_stale(bed.load_as(name, me), &known);
                assert_eq!(bed.list(""), ["a.arrow", "b.arrow"]);
            }
        };
        let threads = [
            spawn(&bed, |bed, me| {
                let _directory = bed.directory.lock().unwrap();
                let names = [OsStr::new("a.arrow"), OsStr::new("b.arrow")];
                bed.fs.rename(ROOT, names[0], ROOT, names[1], libc::RENAME_EXCHANGE, me).unwrap();
            }),
            spawn(&bed, read("a.arrow")),
            spawn(&bed, read("b.arrow")),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(bed.load("a.arrow").unwrap(), versions[1]);
        assert_eq!(bed.load("b.arrow").unwrap(), versions[0]);
        assert_nothing_is_left(&bed);
    });
}
