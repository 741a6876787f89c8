//! Threads on one filesystem, in interleavings that a scheduler chooses.

use std::collections::HashSet;
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

impl Bed {
    /// As the kernel forgets what nobody has open and nobody is about to open, while others look it up again.
    pub fn evict(&self) {
        let open: HashSet<u64> = self.host.open.lock().unwrap().keys().copied().collect();
        let idle: Vec<(u64, u64)> = {
            let mut references = self.host.references.lock().unwrap();
            let idle = references.extract_if(|ino, (_, pinned)| *pinned == 0 && !open.contains(ino));
            idle.map(|(ino, (count, _))| (ino, count)).collect()
        };
        idle.into_iter().for_each(|(ino, count)| self.fs.forget(ino, count));
    }
    /// As a program that opens a file for each line, and creates it if it is not there.
    pub fn append_line_anyway(&self, path: &str, line: &str, caller: Caller) -> Result<()> {
        let flags = libc::O_WRONLY | libc::O_APPEND;
        let mut opened = self.open(path, flags, caller);
        if opened.as_ref().is_err_and(|error| error.kind() == Kind::NotFound) {
            opened = {
                let _directory = self.directory.lock().unwrap();
                let (parent, name) = self.walk(path)?;
                match self.fs.lookup(parent, &name, caller) {
                    Ok(entry) => Ok(Err(entry.attr.ino)),
                    Err(error) if error.kind() == Kind::NotFound => {
                        self.fs.create(parent, &name, 0o644, 0, flags | libc::O_CREAT, caller).map(Ok)
                    }
                    Err(error) => Err(error),
                }
            }
            .and_then(|made| match made {
                Ok((entry, opened)) => {
                    self.host.opened(entry.attr.ino, opened);
                    Ok((entry.attr.ino, opened))
                }
                Err(_) => self.open(path, flags, caller),
            });
        }
        let handle = opened?;
        self.append(handle, line.as_bytes());
        self.close(handle, caller)
    }
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

/// The same where another mount replaces it: what it deletes is not kept for a reader of this one, who may meet that both
/// times.
fn assert_version_or_stale(loaded: Result<Vec<u8>>, versions: &[Vec<u8>]) {
    if !loaded.as_ref().is_err_and(|error| error.kind() == Kind::Stale) {
        assert_version(loaded, versions);
    }
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

/// As `chmod` does it, which the kernel tries a second time.
fn chmod(bed: &Bed, path: &str, mode: u32, caller: Caller) -> Result<()> {
    let change = SetAttr { mode: Some(mode), ..SetAttr::default() };
    let once = || bed.fs.setattr(bed.lookup(path, caller)?.attr.ino, None, change, caller).map(drop);
    once().or_else(|error| if error.kind() == Kind::Stale { once() } else { Err(error) })
}

/// The lines of a file, each of which was written whole, and those of one writer in their order.
fn lines_of(bytes: &[u8], writers: usize) -> Vec<Vec<usize>> {
    let text = std::str::from_utf8(bytes).unwrap();
    let mut lines = text.split_inclusive('\n');
    assert_eq!(lines.next(), Some("first\n"));
    let mut of = vec![Vec::new(); writers];
    for line in lines {
        let (writer, number) = line.strip_suffix('\n').and_then(|line| line.split_once(' ')).expect(text);
        of[writer.parse::<usize>().unwrap()].push(number.parse().unwrap());
    }
    of
}

#[test]
fn appenders_readers_listings_and_attributes_of_one_file() {
    for passthrough in [true, false] {
        check(move || {
            let bed = Arc::new(bed_with(passthrough, Options::default()));
            bed.save("log.txt", b"first\n").unwrap();
            let append = |number: usize| {
                move |bed: &Bed, me| {
                    for line in 0..2 {
                        bed.append_line("log.txt", &format!("{number} {line}\n"), me).unwrap();
                    }
                }
            };
            let threads = [
                spawn(&bed, append(0)),
                spawn(&bed, append(1)),
                spawn(&bed, |bed, me| {
                    for _ in 0..2 {
                        for lines in lines_of(&bed.load_as("log.txt", me).unwrap(), 2) {
                            assert_eq!(lines, (0..lines.len()).collect::<Vec<_>>(), "none is missing before another");
                        }
                    }
                }),
                spawn(&bed, |bed, me| {
                    assert_eq!(bed.list(""), ["log.txt"]);
                    done_or_stale(chmod(bed, "log.txt", 0o600, me));
                    assert_eq!(bed.list(""), ["log.txt"]);
                }),
            ];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(lines_of(&bed.load("log.txt").unwrap(), 2), [[0, 1], [0, 1]]);
            assert_nothing_is_left(&bed);
        });
    }
}

#[test]
fn writers_in_place() {
    for passthrough in [true, false] {
        check(move || {
            let bed = Arc::new(bed_with(passthrough, Options::default()));
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

fn two_mounts(passthrough: bool) -> [Arc<Bed>; 2] {
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

fn two_lines(number: usize) -> impl FnOnce(&Bed, Caller) + Send + 'static {
    move |bed, me| {
        for line in 0..2 {
            bed.append_line_anyway("log.txt", &format!("{number} {line}\n"), me).unwrap();
        }
    }
}

#[test]
fn appenders_and_a_kernel_that_forgets() {
    for passthrough in [true, false] {
        check(move || {
            let bed = Arc::new(bed_with(passthrough, Options::default()));
            bed.save("log.txt", b"first\n").unwrap();
            let threads = [
                spawn(&bed, two_lines(0)),
                spawn(&bed, two_lines(1)),
                spawn(&bed, |bed, _| {
                    for _ in 0..4 {
                        bed.evict();
                        thread::yield_now();
                    }
                }),
            ];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(lines_of(&bed.load("log.txt").unwrap(), 2), [[0, 1], [0, 1]]);
            assert_nothing_is_left(&bed);
        });
    }
}

#[test]
fn appenders_and_a_log_that_is_rotated() {
    for passthrough in [true, false] {
        check(move || {
            let bed = Arc::new(bed_with(passthrough, Options::default()));
            bed.save("log.txt", b"first\n").unwrap();
            let threads = [
                spawn(&bed, two_lines(0)),
                spawn(&bed, two_lines(1)),
                spawn(&bed, |bed, _| rename(bed, "log.txt", "log.1").unwrap()),
            ];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            let mut lines = lines_of(&bed.load("log.1").unwrap(), 2);
            if bed.list("").len() == 2 {
                let later = [b"first\n".to_vec(), bed.load("log.txt").unwrap()].concat();
                lines.iter_mut().zip(lines_of(&later, 2)).for_each(|(lines, later)| lines.extend(later));
            }
            assert_eq!(lines, [[0, 1], [0, 1]]);
            assert_nothing_is_left(&bed);
        });
    }
}

#[test]
fn appenders_and_a_log_that_is_cut() {
    for passthrough in [true, false] {
        check(move || {
            let bed = Arc::new(bed_with(passthrough, Options::default()));
            bed.save("log.txt", b"first\n").unwrap();
            let threads = [
                spawn(&bed, two_lines(0)),
                spawn(&bed, two_lines(1)),
                spawn(&bed, |bed, me| {
                    let cut = SetAttr { size: Some(6), ..SetAttr::default() };
                    let once = || {
                        let ino = bed.lookup("log.txt", me)?.attr.ino;
                        let _written = bed.written.lock().unwrap();
                        bed.fs.setattr(ino, None, cut, me)
                    };
                    once().or_else(|error| if error.kind() == Kind::Stale { once() } else { Err(error) }).unwrap();
                }),
            ];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            for lines in lines_of(&bed.load("log.txt").unwrap(), 2) {
                assert!([&[][..], &[1], &[0, 1]].contains(&&lines[..]), "{lines:?}: what follows the cut stays");
            }
            assert_nothing_is_left(&bed);
        });
    }
}

#[test]
fn appenders_on_one_mount_and_readers_on_another() {
    for passthrough in [true, false] {
        check(move || {
            let mounts = two_mounts(passthrough);
            mounts[0].save("log.txt", b"first\n").unwrap();
            let read = |bed: &Bed, me| {
                let mut before = 0;
                for _ in 0..3 {
                    match bed.load_as("log.txt", me) {
                        Ok(bytes) => {
                            let lines = lines_of(&bytes, 2);
                            assert!(lines.iter().all(|lines| [&[][..], &[0], &[0, 1]].contains(&&lines[..])));
                            assert!(bytes.len() >= before, "an older version than before");
                            before = bytes.len();
                        }
                        Err(error) => assert_eq!(error.kind(), Kind::Stale, "{error}"),
                    }
                }
            };
            let threads = [
                spawn(&mounts[0], two_lines(0)),
                spawn(&mounts[0], two_lines(1)),
                spawn(&mounts[0], read),
                spawn(&mounts[1], read),
            ];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            for bed in &mounts {
                assert_eq!(lines_of(&bed.load("log.txt").unwrap(), 2), [[0, 1], [0, 1]]);
            }
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
