//! A server that is killed after each step of a change of names, and the next one, to which the kernel sends the request
//! again.

use super::model::next_server;
use super::*;

/// What the kernel asks for, so that it can be asked again.
type Ask<'a> = &'a dyn Fn(&Bed, Caller) -> Result<()>;

/// Makes a world, kills the server after 0, 1, 2 ... steps of a request, lets the next one answer it, and checks.
fn killed_at_each_step(make: &dyn Fn(&Bed), ask: Ask<'_>, check: &dyn Fn(&Bed)) {
    for steps in 0.. {
        let bed = bed();
        make(&bed);
        let caller = Caller { request: 70, ..ME };
        bed.store.die_after(Some(steps));
        let answer = ask(&bed, caller);
        let alive = bed.store.step();
        bed.store.die_after(None);
        let bed = next_server(bed, steps as u64 + 1);
        if alive {
            // It was answered, or the answer was lost.
            answer.unwrap();
            assert!(steps > 0, "no step was counted");
        }
        ask(&bed, Caller { resent: true, ..caller }).unwrap_or_else(|error| panic!("after {steps} steps: {error}"));
        check(&bed);
        // What the next server has noted makes the one after it see the same.
        let bed = next_server(bed, steps as u64 + 2);
        check(&bed);
        assert!(bed.fs.warnings.lock().unwrap().is_empty(), "after {steps} steps");
        if alive {
            return;
        }
    }
}

fn rename(bed: &Bed, from: &str, to: &str, flags: u32, caller: Caller) -> Result<()> {
    let ((parent, name), (new_parent, new_name)) = (bed.walk(from)?, bed.walk(to)?);
    bed.fs.rename(parent, &name, new_parent, &new_name, flags, caller)
}

fn mkdir(bed: &Bed, path: &str, mode: u32) -> u64 {
    let (parent, name) = bed.walk(path).unwrap();
    bed.fs.mkdir(parent, &name, mode, 0, ME).unwrap().attr.ino
}

fn absent(bed: &Bed, path: &str) {
    assert_eq!(bed.lookup(path, ME).unwrap_err().kind(), Kind::NotFound, "{path}");
}

/// Saves and removes a file in the directory of an inode number, as a process does whose working directory it is.
fn works(bed: &Bed, directory: u64, path: &str) {
    let flags = libc::O_WRONLY | libc::O_CREAT;
    let (entry, opened) = bed.fs.create(directory, OsStr::new("new.bin"), 0o644, 0, flags, ME).unwrap();
    bed.write((entry.attr.ino, opened), 0, b"new");
    bed.close((entry.attr.ino, opened), ME).unwrap();
    assert_eq!(bed.load(&format!("{path}/new.bin")).unwrap(), b"new", "{path}");
    bed.fs.unlink(directory, OsStr::new("new.bin"), ME).unwrap();
}

fn renamed_directory(over: bool) {
    let (numbers, stored) = (Mutex::new((0, 0, 0)), Mutex::new((0, 0)));
    let make = |bed: &Bed| {
        let tree = (mkdir(bed, "d", 0o700), mkdir(bed, "d/empty", 0o755), mkdir(bed, "d/sub", 0o711));
        *numbers.lock().unwrap() = tree;
        bed.save("d/x.bin", b"x").unwrap();
        bed.save("d/sub/y.arrow", &table_file(&[1, 2])).unwrap();
        bed.put_tensor("d/other/z", &[1.0]);
        if over {
            mkdir(bed, "e", 0o777);
        }
        *stored.lock().unwrap() = (bed.store.object_count(), bed.store.blob_count());
    };
    let check = |bed: &Bed| {
        let (d, empty, sub) = *numbers.lock().unwrap();
        absent(bed, "d");
        assert_eq!(bed.list(""), ["e"]);
        assert_eq!(bed.list("e"), ["empty", "other", "sub", "x.bin"]);
        assert_eq!(bed.list("e/other"), ["z.npy"]);
        assert_eq!(bed.load("e/x.bin").unwrap(), b"x");
        assert_eq!(bed.load("e/sub/y.arrow").unwrap(), table_file(&[1, 2]));
        assert_eq!(bed.fs.getattr(d, None).unwrap().0.perm, 0o700);
        for (number, path) in [(d, "e"), (empty, "e/empty"), (sub, "e/sub")] {
            assert_eq!(bed.lookup(path, ME).unwrap().attr.ino, number, "{path} keeps its number");
            works(bed, number, path);
        }
        let again = mkdir(bed, "d", 0o755);
        assert_ne!(again, d, "a new directory has a number of its own");
        works(bed, again, "d");
        bed.fs.rmdir(ROOT, OsStr::new("d"), ME).unwrap();
        assert_eq!((bed.store.object_count(), bed.store.blob_count()), *stored.lock().unwrap());
    };
    killed_at_each_step(&make, &|bed, caller| rename(bed, "d", "e", 0, caller), &check);
}

#[test]
fn a_rename_of_a_directory_is_whole() {
    renamed_directory(false);
}

#[test]
fn a_rename_over_an_empty_directory_is_whole() {
    renamed_directory(true);
}

#[test]
fn an_exchange_happens_once() {
    let make = |bed: &Bed| {
        bed.save("a.bin", b"first").unwrap();
        bed.save("b.bin", b"second").unwrap();
    };
    let check = |bed: &Bed| {
        assert_eq!(bed.load("a.bin").unwrap(), b"second");
        assert_eq!(bed.load("b.bin").unwrap(), b"first");
        assert_eq!(bed.list(""), ["a.bin", "b.bin"]);
    };
    killed_at_each_step(&make, &|bed, caller| rename(bed, "a.bin", "b.bin", libc::RENAME_EXCHANGE, caller), &check);
}

#[test]
fn an_exchange_of_directories_happens_once() {
    let numbers = Mutex::new((0, 0));
    let make = |bed: &Bed| {
        *numbers.lock().unwrap() = (mkdir(bed, "a", 0o700), mkdir(bed, "b", 0o711));
        bed.save("a/x.bin", b"first").unwrap();
        bed.save("b/x.bin", b"second").unwrap();
        bed.save("b/y.bin", b"third").unwrap();
    };
    let check = |bed: &Bed| {
        let (a, b) = *numbers.lock().unwrap();
        assert_eq!(bed.list("a"), ["x.bin", "y.bin"]);
        assert_eq!(bed.list("b"), ["x.bin"]);
        assert_eq!(bed.load("a/x.bin").unwrap(), b"second");
        assert_eq!(bed.load("b/x.bin").unwrap(), b"first");
        assert_eq!(bed.load("a/y.bin").unwrap(), b"third");
        assert_eq!((bed.lookup("a", ME).unwrap().attr.ino, bed.lookup("b", ME).unwrap().attr.ino), (b, a));
        assert_eq!(bed.lookup("a", ME).unwrap().attr.perm, 0o711);
        works(bed, a, "b");
        works(bed, b, "a");
    };
    killed_at_each_step(&make, &|bed, caller| rename(bed, "a", "b", libc::RENAME_EXCHANGE, caller), &check);
}

#[test]
fn a_rename_that_replaces_nothing_is_answered_twice() {
    let make = |bed: &Bed| bed.save("a.bin", b"bytes").unwrap();
    let check = |bed: &Bed| {
        assert_eq!(bed.list(""), ["b.bin"]);
        assert_eq!(bed.load("b.bin").unwrap(), b"bytes");
    };
    killed_at_each_step(&make, &|bed, caller| rename(bed, "a.bin", "b.bin", libc::RENAME_NOREPLACE, caller), &check);
}

#[test]
fn directories_are_made_and_removed_once() {
    let make = |bed: &Bed| {
        mkdir(bed, "old", 0o755);
    };
    let ask = |bed: &Bed, caller: Caller| bed.fs.mkdir(ROOT, OsStr::new("new"), 0o750, 0, caller).map(drop);
    killed_at_each_step(&make, &ask, &|bed| {
        assert_eq!(bed.list(""), ["new", "old"]);
        assert_eq!(bed.lookup("new", ME).unwrap().attr.perm, 0o750);
    });
    let ask = |bed: &Bed, caller: Caller| bed.fs.rmdir(ROOT, OsStr::new("old"), caller);
    killed_at_each_step(&make, &ask, &|bed| assert_eq!(bed.list(""), Vec::<String>::new()));
}

#[test]
fn attributes_are_set_and_removed_once() {
    let make = |bed: &Bed| {
        bed.save("a.bin", b"bytes").unwrap();
        let ino = bed.lookup("a.bin", ME).unwrap().attr.ino;
        bed.fs.setxattr(ino, OsStr::new("user.old"), b"1", 0, ME).unwrap();
    };
    let name = OsStr::new("user.new");
    let ask = |bed: &Bed, caller: Caller| {
        let ino = bed.lookup("a.bin", ME)?.attr.ino;
        bed.fs.setxattr(ino, name, b"2", libc::XATTR_CREATE, caller)?;
        bed.fs.removexattr(ino, OsStr::new("user.old"), caller)
    };
    killed_at_each_step(&make, &ask, &|bed| {
        let ino = bed.lookup("a.bin", ME).unwrap().attr.ino;
        assert_eq!(bed.fs.listxattr(ino).unwrap(), b"user.new\0");
        assert_eq!(bed.fs.getxattr(ino, name).unwrap(), b"2");
        assert_eq!(bed.load("a.bin").unwrap(), b"bytes");
        assert_eq!(bed.list(""), ["a.bin"]);
    });
}

/// A path whose value has its name by its stem if its bytes are of the format, else by its whole name.
const PATH: &str = "d/x.arrow";

fn name_of(bytes: &[u8]) -> &str {
    if bytes.starts_with(b"ARROW1") { "d/x" } else { PATH }
}

/// Values of both kinds, and each of them twice.
fn values_of_a_path() -> [(Vec<u8>, Vec<u8>); 4] {
    let (plain, native) = (|n: i64| format!("foreign {n}").into_bytes(), |n| table_file(&[n]));
    [(plain(1), native(2)), (native(1), plain(2)), (plain(1), plain(2)), (native(1), native(2))]
}

fn holds_alone(bed: &Bed, path: &str, bytes: &[u8]) {
    assert_eq!(bed.load(path).unwrap(), bytes);
    assert_eq!(bed.list("d"), ["x.arrow"]);
    let names = bed.fs.names_below("").unwrap();
    assert_eq!(names.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), [name_of(bytes)]);
}

#[test]
fn a_save_that_changes_the_name_of_the_value_leaves_one_value() {
    for (first, second) in values_of_a_path() {
        let writer = Mutex::new(None);
        let make = |bed: &Bed| {
            mkdir(bed, "d", 0o755);
            bed.save(PATH, &first).unwrap();
            let handle = bed.create(PATH, ME).unwrap();
            bed.write(handle, 0, &second);
            *writer.lock().unwrap() = Some(handle);
        };
        let ask = |bed: &Bed, caller: Caller| bed.close(writer.lock().unwrap().unwrap(), caller);
        killed_at_each_step(&make, &ask, &|bed| holds_alone(bed, PATH, &second));
    }
}

#[test]
fn a_rename_over_a_value_of_another_name_leaves_one_value() {
    for (first, second) in values_of_a_path() {
        for forgotten in [false, true] {
            let make = |bed: &Bed| {
                mkdir(bed, "d", 0o755);
                bed.save(PATH, &first).unwrap();
                bed.save("new.arrow", &second).unwrap();
                if forgotten {
                    // The store alone knows of it.
                    bed.forget();
                }
            };
            let ask = |bed: &Bed, caller: Caller| rename(bed, "new.arrow", PATH, 0, caller);
            killed_at_each_step(&make, &ask, &|bed| holds_alone(bed, PATH, &second));
        }
    }
}

#[test]
fn directories_that_come_and_go_leave_no_numbers_behind() {
    let bed = bed();
    for _ in 0..20 {
        let number = mkdir(&bed, "a", 0o755);
        rename(&bed, "a", "b", 0, ME).unwrap();
        bed.save("b/x.bin", b"x").unwrap();
        bed.fs.unlink(bed.lookup("b", ME).unwrap().attr.ino, OsStr::new("x.bin"), ME).unwrap();
        bed.fs.rmdir(ROOT, OsStr::new("b"), ME).unwrap();
        bed.fs.forget(number, u64::MAX);
    }
    let numbers = bed.host.notes().unwrap().into_iter().filter(|(key, _)| key.starts_with("number:")).count();
    assert_eq!(numbers, 0);
}

#[test]
fn a_replaced_file_that_is_still_open_is_not_at_its_path_for_the_next_server() {
    let bed = bed();
    mkdir(&bed, "d", 0o755);
    bed.save("d/b.txt", b"first").unwrap();
    let reader = bed.open("d/b.txt", libc::O_RDONLY, OTHER).unwrap();
    // Its writer is in the middle of it, and the former version is still open.
    let writer = bed.create("d/b.txt", ME).unwrap();
    bed.write(writer, 0, b"sec");
    for epoch in 1..20 {
        // Who comes last to a table of files in any order must not win.
        let bed = next_server(
            Bed::of(
                FileSystem::new(bed.store.clone(), bed.host.clone(), Options::default()),
                bed.store.clone(),
                bed.host.clone(),
            ),
            epoch,
        );
        assert_eq!(bed.fs.getattr(writer.0, None).unwrap().0.size, 3);
        assert_eq!(bed.fs.getattr(reader.0, None).unwrap().0.size, 5);
        std::mem::forget(bed.fs);
    }
    let bed = next_server(bed, 20);
    bed.write(writer, 3, b"ond");
    bed.close(writer, ME).unwrap();
    assert_eq!(bed.read_handle(reader).unwrap(), b"first");
    bed.close(reader, OTHER).unwrap();
    assert_eq!(bed.load("d/b.txt").unwrap(), b"second");
    let (directory, name) = bed.walk("d/b.txt").unwrap();
    bed.fs.unlink(directory, &name, ME).unwrap();
    bed.fs.rmdir(ROOT, OsStr::new("d"), ME).unwrap();
    let bed = next_server(bed, 21);
    assert_eq!(bed.list(""), Vec::<String>::new());
}

#[test]
fn a_name_that_a_renamed_directory_had_makes_another_directory() {
    let bed = bed();
    mkdir(&bed, "d", 0o755);
    rename(&bed, "d", "f", 0, ME).unwrap();
    bed.fs.rmdir(ROOT, OsStr::new("f"), ME).unwrap();
    // The kernel still knows the number of what is gone.
    mkdir(&bed, "d", 0o755);
    bed.save("d/a.bin", &table_file(&[0])).unwrap();
    assert_eq!((bed.list(""), bed.list("d")), (vec!["d".to_owned()], vec!["a.bin".to_owned()]));
}
