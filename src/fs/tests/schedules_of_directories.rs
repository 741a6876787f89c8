//! Directories that move, come and go while threads use what is in them, in interleavings that a scheduler chooses.

use super::bed::*;
use super::schedules::{assert_nothing_is_left, check_each, spawn, two_mounts};
use super::*;
use crate::sync::schedules::check;
use crate::vineyard::store::{NameQuery, Store};

impl Bed {
    pub fn mkdir(&self, path: &str, caller: Caller) -> Result<()> {
        let (parent, name) = self.walk(path)?;
        self.in_directory(parent, || {
            // The kernel does not ask for what it knows to exist.
            match self.fs.lookup(parent, &name, caller) {
                Ok(_) => Err(Error::new(Kind::Exists, "the kernel knows it")),
                Err(error) if error.kind() == Kind::NotFound => {
                    self.fs.mkdir(parent, &name, 0o755, 0, caller).map(drop)
                }
                Err(error) => Err(error),
            }
        })
    }
    fn rmdir(&self, path: &str, caller: Caller) -> Result<()> {
        let (parent, name) = self.walk(path)?;
        self.in_directory(parent, || {
            let ino = self.fs.lookup(parent, &name, caller)?.attr.ino;
            self.ending(ino, || self.fs.rmdir(parent, &name, caller))?;
            self.dentries.lock().unwrap().remove(&(parent, name.to_str().unwrap().to_owned()));
            Ok(())
        })
    }
    /// Removes the directory of an inode, which the kernel locks for that.
    fn ending(&self, ino: u64, remove: impl FnOnce() -> Result<()>) -> Result<()> {
        let lock = self.directories.lock().unwrap().entry(ino).or_default().clone();
        let mut removed = lock.lock().unwrap();
        remove()?;
        *removed = true;
        Ok(())
    }
    fn unlink_at(&self, path: &str, caller: Caller) -> Result<()> {
        let (parent, name) = self.walk(path)?;
        self.in_directory(parent, || {
            self.fs.lookup(parent, &name, caller)?;
            self.fs.unlink(parent, &name, caller)
        })
    }
    /// As the kernel renames, which asks a second time after `Stale`.
    fn move_to(&self, from: &str, to: &str, flags: u32, caller: Caller) -> Result<()> {
        let once = || {
            let ((parent, name), (new_parent, new_name)) = (self.walk(from)?, self.walk(to)?);
            let rename = || {
                self.fs.lookup(parent, &name, caller)?;
                self.fs.rename(parent, &name, new_parent, &new_name, flags, caller)?;
                let key = |parent, name: &OsStr| (parent, name.to_str().unwrap().to_owned());
                let mut dentries = self.dentries.lock().unwrap();
                let moved = dentries.remove(&key(parent, &name));
                let there = dentries.remove(&key(new_parent, &new_name));
                dentries.extend(moved.map(|ino| (key(new_parent, &new_name), ino)));
                if flags & libc::RENAME_EXCHANGE != 0 {
                    dentries.extend(there.map(|ino| (key(parent, &name), ino)));
                }
                Ok(())
            };
            let both = [parent.min(new_parent), parent.max(new_parent)];
            match both[0] == both[1] {
                true => self.in_directory(parent, rename),
                false => self.in_directory(both[0], || self.in_directory(both[1], rename)),
            }
        };
        asking_twice(once)
    }
    pub fn remove_all(&self, path: &str) {
        for name in self.list(path) {
            let path = if path.is_empty() { name } else { format!("{path}/{name}") };
            match self.unlink_at(&path, ME) {
                Err(error) if error.kind() == Kind::IsDirectory => {
                    self.remove_all(&path);
                    self.rmdir(&path, ME).unwrap();
                }
                removed => removed.unwrap(),
            }
        }
    }
}

/// What a program loads that knows both names of a directory, of which one is there.
fn load_from(bed: &Bed, directories: [&str; 2], file: &str, caller: Caller) -> Result<Vec<u8>> {
    bed.load_as(&format!("{}/{file}", directories[0]), caller).or_else(|error| match error.kind() {
        Kind::NotFound => bed.load_as(&format!("{}/{file}", directories[1]), caller),
        _ => Err(error),
    })
}

fn is_absent<T>(result: &Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == Kind::NotFound)
}

#[test]
fn a_directory_that_moves_and_those_in_it() {
    check_each(|bed| {
        let versions: Vec<Vec<u8>> = (0..2).map(|v| table_file(&[v, v + 1])).collect();
        bed.mkdir("d", ME).unwrap();
        bed.save("d/t.arrow", &versions[0]).unwrap();
        let (saved, known) = (versions[1].clone(), versions[0].clone());
        let was_saved = Arc::new(AtomicU64::new(0));
        let flag = was_saved.clone();
        let threads = [
            spawn(&bed, |bed, me| bed.move_to("d", "e", 0, me).unwrap()),
            spawn(&bed, move |bed, me| {
                let done = bed.save_as("d/u.arrow", &saved, me);
                assert!(done.is_ok() || is_absent(&done), "{done:?}");
                flag.store(u64::from(done.is_ok()), Ordering::SeqCst);
            }),
            spawn(&bed, move |bed, me| {
                assert_eq!(load_from(bed, ["d", "e"], "t.arrow", me).unwrap(), known);
            }),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let root = bed.list("");
        let both: Vec<_> = root.iter().map(|name| bed.list(name)).collect();
        assert_eq!(
            root,
            ["e"],
            "{both:?} {:?}",
            bed.store.names(&[NameQuery::Prefix { prefix: String::new(), limit: None }])
        );
        assert_eq!(bed.load("e/t.arrow").unwrap(), versions[0]);
        match was_saved.load(Ordering::SeqCst) {
            1 => assert_eq!(bed.load("e/u.arrow").unwrap(), versions[1]),
            _ => assert_eq!(bed.list("e"), ["t.arrow"]),
        }
        assert_nothing_is_left(&bed);
    });
}

#[test]
fn a_directory_that_moves_and_appenders_in_it() {
    check_each(|bed| {
        bed.mkdir("d", ME).unwrap();
        bed.save("d/log.txt", b"first\n").unwrap();
        let append = |number: u64| {
            move |bed: &Bed, me: Caller| {
                let line = format!("{number}\n");
                let done = bed.append_line("d/log.txt", &line, me).or_else(|error| match error.kind() {
                    Kind::NotFound => bed.append_line("e/log.txt", &line, me),
                    _ => Err(error),
                });
                done.unwrap();
            }
        };
        let threads = [
            spawn(&bed, |bed, me| bed.move_to("d", "e", 0, me).unwrap()),
            spawn(&bed, append(1)),
            spawn(&bed, append(2)),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let text = String::from_utf8(bed.load("e/log.txt").unwrap()).unwrap();
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["1", "2", "first"]);
        assert_eq!(bed.list(""), ["e"]);
        assert_nothing_is_left(&bed);
    });
}

#[test]
fn a_directory_that_is_removed_and_made_while_files_are_saved_in_it() {
    check(|| {
        let bed = Arc::new(bed());
        let bytes = table_file(&[1, 2]);
        let saved = bytes.clone();
        let was_saved = Arc::new(AtomicU64::new(0));
        let flag = was_saved.clone();
        let threads = [
            spawn(&bed, |bed, me| {
                for _ in 0..2 {
                    let done = bed.mkdir("d", me);
                    assert!(done.as_ref().map_or_else(|error| error.kind() == Kind::Exists, |()| true), "{done:?}");
                }
            }),
            spawn(&bed, |bed, me| {
                for _ in 0..2 {
                    let expected = |error: &Error| matches!(error.kind(), Kind::NotFound | Kind::NotEmpty);
                    let done = bed.rmdir("d", me);
                    assert!(done.as_ref().map_or_else(expected, |()| true), "{done:?}");
                }
            }),
            spawn(&bed, move |bed, me| {
                let done = bed.save_as("d/t.arrow", &saved, me);
                assert!(done.is_ok() || is_absent(&done), "{done:?}");
                flag.store(u64::from(done.is_ok()), Ordering::SeqCst);
            }),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        if was_saved.load(Ordering::SeqCst) == 1 {
            assert_eq!(bed.load("d/t.arrow").unwrap(), bytes);
        }
        assert_nothing_is_left(&bed);
    });
}

#[test]
fn directories_that_are_exchanged_and_those_in_them() {
    check(|| {
        let bed = Arc::new(bed());
        let versions: Vec<Vec<u8>> = (0..3).map(|v| table_file(&[v, v + 1])).collect();
        for (directory, version) in ["d", "e"].into_iter().zip(&versions) {
            bed.mkdir(directory, ME).unwrap();
            bed.save(&format!("{directory}/t.arrow"), version).unwrap();
        }
        let (saved, known) = (versions[2].clone(), versions.clone());
        let exchanged = Arc::new(AtomicU64::new(0));
        let flag = exchanged.clone();
        let threads = [
            spawn(&bed, move |bed, me| match bed.move_to("d", "e", libc::RENAME_EXCHANGE, me) {
                Ok(()) => flag.store(1, Ordering::SeqCst),
                // Not while a file below is written.
                Err(error) => assert_eq!(error.kind(), Kind::Busy),
            }),
            spawn(&bed, move |bed, me| bed.save_as("d/u.arrow", &saved, me).unwrap()),
            spawn(&bed, move |bed, me| {
                let bytes = bed.load_as("d/t.arrow", me).unwrap();
                assert!(known[..2].contains(&bytes));
            }),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let exchanged = exchanged.load(Ordering::SeqCst) as usize;
        assert_eq!(bed.load("d/t.arrow").unwrap(), versions[exchanged]);
        assert_eq!(bed.load("e/t.arrow").unwrap(), versions[1 - exchanged]);
        let found: Vec<Vec<u8>> = ["d", "e"].iter().filter_map(|d| bed.load(&format!("{d}/u.arrow")).ok()).collect();
        assert_eq!(found, versions[2..]);
        assert_nothing_is_left(&bed);
    });
}

#[test]
fn a_directory_that_moves_and_a_file_that_leaves_it() {
    check(|| {
        let bed = Arc::new(bed());
        let versions: Vec<Vec<u8>> = (0..2).map(|v| table_file(&[v, v + 1])).collect();
        for (path, version) in ["d/t.arrow", "d/u.arrow"].into_iter().zip(&versions) {
            let _ = bed.mkdir("d", ME);
            bed.save(path, version).unwrap();
        }
        bed.mkdir("b", ME).unwrap();
        let left = Arc::new(AtomicU64::new(0));
        let flag = left.clone();
        let known = versions[0].clone();
        let threads = [
            spawn(&bed, |bed, me| bed.move_to("d", "e", 0, me).unwrap()),
            spawn(&bed, move |bed, me| {
                let done = bed.move_to("d/u.arrow", "b/u.arrow", 0, me);
                assert!(done.is_ok() || is_absent(&done), "{done:?}");
                flag.store(u64::from(done.is_ok()), Ordering::SeqCst);
            }),
            spawn(&bed, |bed, me| {
                let done = bed.unlink_at("d/t.arrow", me);
                assert!(done.is_ok() || is_absent(&done), "{done:?}");
            }),
            spawn(&bed, move |bed, me| {
                let loaded = load_from(bed, ["d", "e"], "t.arrow", me);
                assert!(loaded.as_ref().map_or_else(|_| is_absent(&loaded), |bytes| *bytes == known), "{loaded:?}");
            }),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(bed.list(""), ["b", "e"]);
        let place = if left.load(Ordering::SeqCst) == 1 { "b" } else { "e" };
        assert_eq!(bed.load(&format!("{place}/u.arrow")).unwrap(), versions[1]);
        assert_eq!(bed.list("b").len() + bed.list("e").iter().filter(|name| *name == "u.arrow").count(), 1);
        assert_nothing_is_left(&bed);
    });
}

#[test]
fn a_directory_that_moves_and_another_mount() {
    check(|| {
        let mounts = two_mounts(true);
        let versions: Vec<Vec<u8>> = (0..2).map(|v| table_file(&[v, v + 1])).collect();
        mounts[0].mkdir("d", ME).unwrap();
        mounts[0].save("d/t.arrow", &versions[0]).unwrap();
        let (saved, known) = (versions[1].clone(), versions[0].clone());
        let was_saved = Arc::new(AtomicU64::new(0));
        let flag = was_saved.clone();
        let threads = [
            spawn(&mounts[0], |bed, me| bed.move_to("d", "e", 0, me).unwrap()),
            spawn(&mounts[1], move |bed, me| {
                let done = bed.save_as("d/u.arrow", &saved, me);
                assert!(done.is_ok() || is_absent(&done), "{done:?}");
                flag.store(u64::from(done.is_ok()), Ordering::SeqCst);
            }),
            spawn(&mounts[1], move |bed, me| {
                let loaded = load_from(bed, ["d", "e"], "t.arrow", me);
                assert_eq!(loaded.unwrap(), known);
            }),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        for bed in &mounts {
            assert_eq!(bed.load("e/t.arrow").unwrap(), versions[0]);
            if was_saved.load(Ordering::SeqCst) == 1 {
                assert_eq!(load_from(bed, ["d", "e"], "u.arrow", ME).unwrap(), versions[1]);
            }
        }
        mounts[1].remove_all("");
        assert_nothing_is_left(&mounts[0]);
    });
}

#[test]
fn a_directory_that_moves_and_listings() {
    check(|| {
        let bed = Arc::new(bed());
        let bytes = table_file(&[1, 2]);
        bed.mkdir("d", ME).unwrap();
        bed.mkdir("d/below", ME).unwrap();
        for path in ["d/t.arrow", "d/below/u.arrow"] {
            bed.save(path, &bytes).unwrap();
        }
        // One that is being written.
        let open = bed.create("d/w.bin", ME).unwrap();
        bed.write(open, 0, b"written");
        let known = bytes.clone();
        let threads = [
            spawn(&bed, |bed, me| {
                bed.move_to("d", "e", 0, me).unwrap();
                bed.move_to("e/below", "f", 0, me).unwrap();
            }),
            spawn(&bed, |bed, _| {
                let root = bed.list("");
                // A moment both, and never none.
                assert!(["d", "e"].iter().any(|name| root.iter().any(|found| found == name)), "{root:?}");
            }),
            spawn(&bed, move |bed, me| {
                let Ok((directory, _)) = bed.walk("d/t.arrow") else { return };
                // By its inode, whatever it is called.
                let fh = bed.fs.opendir(directory).unwrap();
                let mut names = Vec::new();
                bed.fs
                    .readdir(directory, fh, 0, true, &mut |entry| {
                        names.push(entry.name.into_string().unwrap());
                        false
                    })
                    .unwrap();
                bed.fs.releasedir(directory, fh);
                for name in ["t.arrow", "w.bin"] {
                    assert!(names.iter().any(|found| found == name), "{names:?}");
                }
                assert!(names.len() <= 5, "{names:?}");
                let (ino, opened) = {
                    let found = bed.fs.lookup(directory, OsStr::new("t.arrow"), me).unwrap();
                    (found.attr.ino, bed.open_inode(found.attr.ino, libc::O_RDONLY, me))
                };
                match opened {
                    Ok(opened) => {
                        assert_eq!(bed.read_handle((ino, opened)).unwrap(), known);
                        bed.close((ino, opened), me).unwrap();
                    }
                    Err(error) => assert_eq!(error.kind(), Kind::Stale),
                }
            }),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        bed.close(open, ME).unwrap();
        assert_eq!(bed.list(""), ["e", "f"]);
        assert_eq!(bed.list("e"), ["t.arrow", "w.bin"]);
        assert_eq!(bed.load("e/w.bin").unwrap(), b"written");
        assert_eq!(bed.load("f/u.arrow").unwrap(), bytes);
        assert_nothing_is_left(&bed);
    });
}

impl Bed {
    /// Opens a file in a directory that a process is in, whatever that is called; once more after `Stale`.
    fn open_in(&self, directory: u64, name: &str, flags: i32, caller: Caller) -> Result<(u64, Opened)> {
        let once = || {
            let ino = self.fs.lookup(directory, OsStr::new(name), caller)?.attr.ino;
            Ok((ino, self.open_inode(ino, flags, caller)?))
        };
        asking_twice(once)
    }
}

#[test]
fn a_directory_that_moves_and_those_who_are_in_it() {
    check_each(|bed| {
        let bytes = table_file(&[1, 2]);
        bed.mkdir("d", ME).unwrap();
        bed.save("d/t.arrow", &bytes).unwrap();
        bed.save("d/log.txt", b"first\n").unwrap();
        let directory = bed.walk("d/t.arrow").unwrap().0;
        let known = bytes.clone();
        let threads = [
            spawn(&bed, |bed, me| {
                bed.move_to("d", "e", 0, me).unwrap();
                bed.move_to("e", "d", 0, me).unwrap();
            }),
            spawn(&bed, move |bed, me| {
                for _ in 0..2 {
                    let handle = bed.open_in(directory, "t.arrow", libc::O_RDONLY, me).unwrap();
                    assert_eq!(bed.read_handle(handle).unwrap(), known);
                    bed.close(handle, me).unwrap();
                }
            }),
            spawn(&bed, move |bed, me| {
                for line in ["1\n", "2\n"] {
                    let flags = libc::O_WRONLY | libc::O_APPEND;
                    let handle = bed.open_in(directory, "log.txt", flags, me).unwrap();
                    bed.append(handle, line.as_bytes());
                    bed.close(handle, me).unwrap();
                }
            }),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(bed.list(""), ["d"]);
        assert_eq!(bed.load("d/log.txt").unwrap(), b"first\n1\n2\n");
        assert_eq!(bed.load("d/t.arrow").unwrap(), bytes);
        assert_nothing_is_left(&bed);
    });
}

#[test]
fn a_directory_that_moves_and_moves_below_it() {
    check(|| {
        let bed = Arc::new(bed());
        let versions: Vec<Vec<u8>> = (0..3).map(|v| table_file(&[v, v + 1])).collect();
        for directory in ["d", "d/x", "d/y"] {
            bed.mkdir(directory, ME).unwrap();
        }
        bed.save("d/x/t.arrow", &versions[0]).unwrap();
        bed.save("d/u.arrow", &versions[1]).unwrap();
        let [x, y] = ["d/x/t.arrow", "d/y/t.arrow"].map(|path| bed.walk(path).unwrap().0);
        let directory = bed.walk("d/u.arrow").unwrap().0;
        let (saved, known) = (versions[2].clone(), versions.clone());
        let threads = [
            spawn(&bed, |bed, me| bed.move_to("d", "e", 0, me).unwrap()),
            spawn(&bed, move |bed, me| {
                let name = OsStr::new("t.arrow");
                bed.in_directory(x, || bed.in_directory(y, || bed.fs.rename(x, name, y, name, 0, me))).unwrap();
            }),
            // Saves as most editors do.
            spawn(&bed, move |bed, me| {
                let (new, name) = (OsStr::new("new.arrow"), OsStr::new("u.arrow"));
                let (ino, opened) = bed
                    .in_directory(directory, || {
                        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC;
                        let (entry, opened) = bed.fs.create(directory, new, 0o644, 0o022, flags, me)?;
                        bed.host.opened(entry.attr.ino, opened);
                        Ok((entry.attr.ino, opened))
                    })
                    .unwrap();
                bed.write((ino, opened), 0, &saved);
                bed.close((ino, opened), me).unwrap();
                bed.in_directory(directory, || bed.fs.rename(directory, new, directory, name, 0, me)).unwrap();
            }),
            spawn(&bed, move |bed, me| {
                let handle = bed.open_in(directory, "u.arrow", libc::O_RDONLY, me).unwrap();
                assert!(known[1..].contains(&bed.read_handle(handle).unwrap()));
                bed.close(handle, me).unwrap();
            }),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(bed.list(""), ["e"]);
        assert_eq!(bed.list("e"), ["u.arrow", "x", "y"]);
        assert_eq!(bed.load("e/y/t.arrow").unwrap(), versions[0]);
        assert!(bed.load("e/u.arrow").unwrap() == versions[2]);
        assert!(bed.list("e/x").is_empty());
        assert_nothing_is_left(&bed);
    });
}

#[test]
fn a_directory_that_moves_and_changes_of_attributes_and_sizes() {
    check_each(|bed| {
        bed.mkdir("d", ME).unwrap();
        bed.save("d/f.bin", b"0123456789").unwrap();
        bed.save("d/g.bin", b"0123456789").unwrap();
        let directory = bed.walk("d/f.bin").unwrap().0;
        let change = |name: &'static str, change: SetAttr| {
            move |bed: &Bed, me: Caller| {
                let once = || {
                    let ino = bed.fs.lookup(directory, OsStr::new(name), me)?.attr.ino;
                    bed.fs.setattr(ino, None, change, me).map(drop)
                };
                asking_twice(once).unwrap();
            }
        };
        let threads = [
            spawn(&bed, |bed, me| bed.move_to("d", "e", 0, me).unwrap()),
            spawn(&bed, change("f.bin", SetAttr { mode: Some(0o600), ..SetAttr::default() })),
            spawn(&bed, change("g.bin", SetAttr { size: Some(4), ..SetAttr::default() })),
            spawn(&bed, |bed, _| bed.evict()),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(bed.list("e"), ["f.bin", "g.bin"]);
        assert_eq!(bed.lookup("e/f.bin", ME).unwrap().attr.perm, 0o600);
        assert_eq!(bed.load("e/f.bin").unwrap(), b"0123456789");
        assert_eq!(bed.load("e/g.bin").unwrap(), b"0123");
        assert_nothing_is_left(&bed);
    });
}

#[test]
fn a_directory_that_two_mounts_move() {
    check(|| {
        let mounts = two_mounts(true);
        let versions: Vec<Vec<u8>> = (0..2).map(|v| table_file(&[v, v + 1])).collect();
        for (name, version) in ["d/t.arrow", "d/u.arrow"].into_iter().zip(&versions) {
            let _ = mounts[0].mkdir("d", ME);
            mounts[0].save(name, version).unwrap();
        }
        let move_to = |to: &'static str| {
            move |bed: &Bed, me| {
                let done = bed.move_to("d", to, 0, me);
                assert!(done.is_ok() || is_absent(&done), "{done:?}");
            }
        };
        let threads = [spawn(&mounts[0], move_to("e")), spawn(&mounts[1], move_to("f"))];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        // Each file is in one of both, or in both: the names say nothing of where an object has been.
        for (name, version) in ["t.arrow", "u.arrow"].into_iter().zip(&versions) {
            for bed in &mounts {
                let found: Vec<Vec<u8>> =
                    ["e", "f"].iter().filter_map(|d| bed.load(&format!("{d}/{name}")).ok()).collect();
                assert!(!found.is_empty() && found.iter().all(|bytes| bytes == version), "{name}");
            }
        }
        mounts.iter().for_each(|bed| bed.remove_all(""));
        assert_nothing_is_left(&mounts[0]);
    });
}
