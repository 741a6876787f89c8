//! Threads that append to one file, in interleavings that a scheduler chooses.

use std::collections::HashSet;

use super::bed::*;
use super::schedules::{assert_nothing_is_left, check_each, chmod, done_or_stale, rename, spawn, two_mounts, unlink};
use super::*;
use crate::sync::{schedules::check, thread};

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
        let handle = match self.open(path, flags, caller) {
            Err(error) if error.kind() == Kind::NotFound => self.open_or_create(path, flags, caller)?,
            opened => opened?,
        };
        self.append(handle, line.as_bytes());
        self.close(handle, caller)
    }
    fn open_or_create(&self, path: &str, flags: i32, caller: Caller) -> Result<(u64, Opened)> {
        {
            let _directory = self.directory.lock().unwrap();
            let (parent, name) = self.walk(path)?;
            if self.fs.lookup(parent, &name, caller).is_err_and(|error| error.kind() == Kind::NotFound) {
                let (entry, opened) = self.fs.create(parent, &name, 0o644, 0, flags | libc::O_CREAT, caller)?;
                self.host.opened(entry.attr.ino, opened);
                return Ok((entry.attr.ino, opened));
            }
        }
        self.open(path, flags, caller)
    }
}

#[test]
fn appenders_of_one_file() {
    check_each(|bed| {
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
    check_each(|bed| {
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

fn two_lines(number: usize) -> impl FnOnce(&Bed, Caller) + Send + 'static {
    move |bed, me| {
        for line in 0..2 {
            bed.append_line_anyway("log.txt", &format!("{number} {line}\n"), me).unwrap();
        }
    }
}

/// Two appenders, and what somebody else does meanwhile; then what must be so.
fn beside_two_appenders(
    other: impl FnOnce(&Bed, Caller) + Clone + Send + Sync + 'static,
    then: impl FnOnce(&Bed) + Clone + Send + Sync + 'static,
) {
    for passthrough in [true, false] {
        let (other, then) = (other.clone(), then.clone());
        check(move || {
            let bed = Arc::new(bed_with(passthrough, Options::default()));
            bed.save("log.txt", b"first\n").unwrap();
            let threads = [spawn(&bed, two_lines(0)), spawn(&bed, two_lines(1)), spawn(&bed, other.clone())];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            then.clone()(&bed);
            assert_nothing_is_left(&bed);
        });
    }
}

/// Lines before a moment may be gone: not one that follows.
fn assert_what_follows_stays(bytes: &[u8]) {
    for lines in lines_of(bytes, 2) {
        assert!([&[][..], &[1], &[0, 1]].contains(&&lines[..]), "{lines:?}");
    }
}

/// What was written to a new file since the first one went, as if its first line were in it too.
fn later(bed: &Bed) -> Vec<u8> {
    [b"first\n".to_vec(), bed.load("log.txt").unwrap()].concat()
}

#[test]
fn appenders_and_a_kernel_that_forgets() {
    let forget = |bed: &Bed, _| {
        for _ in 0..4 {
            bed.evict();
            thread::yield_now();
        }
    };
    beside_two_appenders(forget, |bed| {
        assert_eq!(lines_of(&bed.load("log.txt").unwrap(), 2), [[0, 1], [0, 1]]);
    });
}

#[test]
fn appenders_and_a_log_that_is_rotated() {
    let rotate = |bed: &Bed, _| rename(bed, "log.txt", "log.1").unwrap();
    beside_two_appenders(rotate, |bed| {
        let mut lines = lines_of(&bed.load("log.1").unwrap(), 2);
        if bed.list("").len() == 2 {
            lines.iter_mut().zip(lines_of(&later(bed), 2)).for_each(|(lines, later)| lines.extend(later));
        }
        assert_eq!(lines, [[0, 1], [0, 1]]);
    });
}

#[test]
fn appenders_and_a_log_that_is_cut() {
    let cut = |bed: &Bed, me| {
        let cut = SetAttr { size: Some(6), ..SetAttr::default() };
        let once = || {
            let ino = bed.lookup("log.txt", me)?.attr.ino;
            let _written = bed.written.lock().unwrap();
            bed.fs.setattr(ino, None, cut, me)
        };
        asking_twice(once).unwrap();
    };
    beside_two_appenders(cut, |bed| assert_what_follows_stays(&bed.load("log.txt").unwrap()));
}

#[test]
fn appenders_and_a_log_that_is_removed() {
    let remove = |bed: &Bed, _| unlink(bed, "log.txt").unwrap();
    beside_two_appenders(remove, |bed| {
        if !bed.list("").is_empty() {
            assert_what_follows_stays(&later(bed));
        }
    });
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
