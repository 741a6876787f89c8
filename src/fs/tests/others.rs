//! What other mounts and clients of the same store do meanwhile.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;

use super::super::*;
use super::bed::*;
use super::*;
use crate::vineyard::fake::FakeStore;
use crate::vineyard::store::NameQuery;

/// Two mounts of one store that shares its names with no other.
pub fn two() -> (Arc<FakeStore>, Bed, Bed) {
    let store = Arc::new(FakeStore::new(64 << 20).alone());
    let mount = || {
        let host = Arc::new(LocalHost {
            passthrough: true,
            next: AtomicU64::new(1),
            store: Some(store.clone()),
            ..LocalHost::default()
        });
        Bed::of(FileSystem::new(store.clone(), host.clone(), Options::default()), store.clone(), host)
    };
    let beds = (mount(), mount());
    (store, beds.0, beds.1)
}

pub fn names(store: &FakeStore) -> Vec<String> {
    let all = store.names(&[NameQuery::Prefix { prefix: String::new(), limit: None }]).unwrap().concat();
    all.into_iter().map(|(name, _)| name).collect()
}

#[test]
fn a_file_whose_name_is_all_its_own_replaces_no_other_dataset() {
    let (store, bed, _) = two();
    let other = bed.put_tensor("a", &[1.0, 2.0]);
    bed.put_tensor("a.npy", &[3.0]);
    let before = bed.load("a.npy").unwrap();
    bed.put_tensor("b", &[7.0]);
    let saved = bed.load("b.npy").unwrap();
    bed.save("a.npy", &saved).unwrap();
    assert_ne!(bed.load("a.npy").unwrap(), before);
    assert_eq!(bed.load("a.npy").unwrap(), saved);
    assert_eq!(names(&store), ["a", "a.npy", "b"]);
    assert_eq!(bed.fs.object_of("a").unwrap(), Some(other));
}

#[test]
fn attributes_of_a_file_that_was_replaced_elsewhere_are_asked_for_again() {
    let (_, one, other) = two();
    one.save("t.arrow", &table_file(&[1])).unwrap();
    let ino = other.lookup("t.arrow", OTHER).unwrap().attr.ino;
    one.save("t.arrow", &table_file(&[2])).unwrap();
    let change = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    // The kernel looks the name up again after this, and after no other answer.
    assert_eq!(other.fs.setattr(ino, None, change, OTHER).unwrap_err().kind(), Kind::Stale);
    let ino = other.lookup("t.arrow", OTHER).unwrap().attr.ino;
    assert_eq!(other.fs.setattr(ino, None, change, OTHER).unwrap().0.perm, 0o600);
    assert_eq!(column(&other.load("t.arrow").unwrap()), [2]);
}

#[test]
fn a_directory_moves_with_what_was_replaced_elsewhere() {
    let (store, one, other) = two();
    one.fs.mkdir(ROOT, OsStr::new("d"), 0o755, 0, ME).unwrap();
    for i in 0..3 {
        one.save(&format!("d/f{i}.arrow"), &table_file(&[i])).unwrap();
    }
    other.save("d/f1.arrow", &table_file(&[10])).unwrap();
    one.fs.rename(ROOT, OsStr::new("d"), ROOT, OsStr::new("e"), 0, ME).unwrap();
    assert_eq!(names(&store), ["e/f0", "e/f1", "e/f2"]);
    for bed in [&one, &other] {
        assert_eq!(column(&bed.load("e/f1.arrow").unwrap()), [10]);
        assert_eq!(column(&bed.load("e/f2.arrow").unwrap()), [2]);
    }
}

#[test]
fn a_size_that_is_not_known_now_is_an_error_and_no_size() {
    let (store, bed, _) = two();
    bed.save("t.arrow", &table_file(&[1, 2, 3])).unwrap();
    store.fail_next(Op::Prepare, 100, Kind::Timeout);
    assert_eq!(bed.lookup("t.parquet", OTHER).unwrap_err().kind(), Kind::Timeout);
    store.fail_next(Op::Prepare, 0, Kind::Timeout);
    assert!(bed.lookup("t.parquet", OTHER).unwrap().attr.size > 12);
    assert!(bed.load("t.parquet").unwrap().starts_with(b"PAR1"));
}

#[test]
fn what_was_encoded_to_know_its_size_does_not_add_up() {
    let (_, bed, _) = two();
    let inodes: Vec<u64> = (0..20)
        .map(|i| {
            bed.save(&format!("t{i}.arrow"), &table_file(&[1, 2, 3])).unwrap();
            bed.lookup(&format!("t{i}.parquet"), OTHER).unwrap().attr.ino
        })
        .collect();
    assert_eq!(bed.fs.objects.images(), 1, "the last one, which may be opened next");
    let sizes: Vec<u64> = inodes.iter().map(|ino| bed.fs.getattr(*ino, None).unwrap().0.size).collect();
    assert!(sizes.iter().all(|size| *size == sizes[0] && *size > 12), "{sizes:?}");
    assert_eq!(bed.fs.objects.images(), 1);
}

#[test]
fn nothing_is_made_where_nothing_is_listed() {
    let (store, bed, _) = two();
    let hidden = OsStr::new(".vineyard-fs");
    assert_eq!(bed.fs.mkdir(ROOT, hidden, 0o755, 0, ME).unwrap_err().kind(), Kind::NotPermitted);
    let flags = libc::O_WRONLY | libc::O_CREAT;
    let made = |name: &str| bed.fs.create(ROOT, OsStr::new(name), 0o644, 0, flags, ME).map(drop).unwrap_err().kind();
    assert_eq!((made(".vineyard-fs"), made("%2F.npy")), (Kind::NotPermitted, Kind::Invalid));
    bed.fs.mkdir(ROOT, OsStr::new("d"), 0o755, 0, ME).unwrap();
    let moved = bed.fs.rename(ROOT, OsStr::new("d"), ROOT, hidden, 0, ME);
    assert_eq!(moved.unwrap_err().kind(), Kind::NotPermitted);
    assert!(names(&store).is_empty());
}

/// What one mount answers that has found a path free, when another one names it before this one does.
fn overtaken(
    made: &[(&str, &[u8])],
    ask: impl FnOnce(&Bed) -> Result<()> + Send,
) -> (Result<()>, Vec<String>, Vec<u8>) {
    let (store, one, other) = two();
    for (path, bytes) in made {
        one.save(path, bytes).unwrap();
    }
    if made.iter().any(|(path, _)| path.starts_with("forgotten")) {
        one.forget();
    }
    other.save("theirs", b"theirs").unwrap();
    let answer = std::thread::scope(|scope| {
        let naming = one.fs.naming();
        let answer = scope.spawn(|| ask(&one));
        std::thread::sleep(Duration::from_millis(300));
        other
            .fs
            .rename(ROOT, OsStr::new("theirs"), ROOT, OsStr::new("new.arrow"), libc::RENAME_NOREPLACE, OTHER)
            .unwrap();
        drop(naming);
        answer.join().unwrap()
    });
    let bytes = other.load("new.arrow").unwrap();
    for (path, bytes) in made {
        assert_eq!(one.load(path).unwrap(), *bytes);
        assert_eq!(other.load(path).unwrap(), *bytes);
    }
    let objects: HashSet<ObjectId> =
        names(&store).iter().map(|name| one.fs.object_of(name).unwrap().unwrap()).collect();
    assert_eq!(objects.len(), names(&store).len());
    (answer, names(&store), bytes)
}

#[test]
fn of_two_renames_that_replace_nothing_one_is_refused() {
    let table = table_file(&[1]);
    for path in ["mine", "forgotten", "mine.arrow", "forgotten.arrow"] {
        for bytes in [&b"plain"[..], &table] {
            let name = OsStr::new(path);
            let (answer, names, there) = overtaken(&[(path, bytes)], |bed| {
                bed.fs.rename(ROOT, name, ROOT, OsStr::new("new.arrow"), libc::RENAME_NOREPLACE, ME)
            });
            assert_eq!(answer.unwrap_err().kind(), Kind::Exists, "{path}");
            let own = if bytes == table && path.ends_with(".arrow") { &path[..path.len() - 6] } else { path };
            assert_eq!(names, [own, "new.arrow"], "{path}");
            assert_eq!(there, b"theirs", "{path}");
        }
    }
}

#[test]
fn a_command_that_replaces_nothing_is_refused_what_another_has_named() {
    let file = File::from(nix::sys::memfd::memfd_create("test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap());
    std::os::unix::fs::FileExt::write_all_at(&file, &table_file(&[1]), 0).unwrap();
    let put = |bed: &Bed| bed.fs.save("new.arrow", &file, Default::default(), false).map(drop);
    let (answer, names, there) = overtaken(&[], put);
    assert_eq!((answer.unwrap_err().kind(), names), (Kind::Exists, vec!["new.arrow".to_owned()]));
    assert_eq!(there, b"theirs");
    for bytes in [&b"plain"[..], &table_file(&[1])] {
        let mv = |bed: &Bed| {
            let named = bed.fs.require("forgotten.arrow")?;
            bed.fs.change_name(&named, "new.arrow", false).map(drop)
        };
        let (answer, names, there) = overtaken(&[("forgotten.arrow", bytes)], mv);
        assert_eq!(answer.unwrap_err().kind(), Kind::Exists);
        assert_eq!(names, [if bytes == b"plain" { "forgotten.arrow" } else { "forgotten" }, "new.arrow"]);
        assert_eq!(there, b"theirs");
    }
}

#[test]
fn what_was_renamed_to_a_free_name_is_saved_again_there() {
    let (_, bed, other) = two();
    let file = table_file(&[1]);
    let writer = bed.create("a.tmp", ME).unwrap();
    bed.write(writer, 0, &file);
    bed.fs.rename(ROOT, OsStr::new("a.tmp"), ROOT, OsStr::new("b.arrow"), libc::RENAME_NOREPLACE, ME).unwrap();
    other.save("b.arrow", &table_file(&[2])).unwrap();
    bed.close(writer, ME).unwrap();
    assert_eq!(column(&other.load("b.arrow").unwrap()), [1]);
    bed.save("b.arrow", &table_file(&[3])).unwrap();
    assert_eq!(column(&other.load("b.arrow").unwrap()), [3]);
}

#[test]
fn a_directory_that_another_mount_has_renamed_is_not_listed_for_a_file_that_was_written_here() {
    let (_, bed, other) = two();
    bed.fs.mkdir(ROOT, OsStr::new("d"), 0o755, 0, ME).unwrap();
    bed.save("d/t.bin", b"theirs").unwrap();
    other.save("d/sub/u.bin", b"nowhere").unwrap_err();
    other.save("d/u.bin", b"written here").unwrap();
    assert_eq!(other.list(""), ["d"]);
    bed.fs.rename(ROOT, OsStr::new("d"), ROOT, OsStr::new("e"), 0, ME).unwrap();
    assert_eq!(other.list(""), ["e"]);
    assert_eq!(other.list("e"), ["t.bin", "u.bin"]);
    assert_eq!(other.load("e/u.bin").unwrap(), b"written here");
    // One that is being written keeps its directory.
    let writer = other.create("e/w.bin", ME).unwrap();
    bed.fs.rename(ROOT, OsStr::new("e"), ROOT, OsStr::new("f"), 0, ME).unwrap();
    assert_eq!(other.list(""), ["e", "f"]);
    other.close(writer, ME).unwrap();
    assert_eq!(other.list("e"), ["w.bin"]);
}

#[test]
fn what_ends_a_dataset_by_the_path_of_one_view_ends_the_others_for_the_kernel() {
    type Change = Box<dyn Fn(&Bed, u64)>;
    let name = OsStr::new("x.feather");
    let changes: [Change; 5] = [
        Box::new(|bed, _| bed.save("d/x.feather", &table_file(&[1, 2, 3])).unwrap()),
        Box::new(|bed, parent| bed.fs.rename(parent, name, ROOT, OsStr::new("y.feather"), 0, ME).unwrap()),
        Box::new(|bed, parent| {
            bed.save("y.feather", &table_file(&[3])).unwrap();
            let flags = libc::RENAME_EXCHANGE;
            bed.fs.rename(parent, name, ROOT, OsStr::new("y.feather"), flags, ME).unwrap();
        }),
        Box::new(|bed, _| {
            let ino = bed.lookup("d/x.feather", ME).unwrap().attr.ino;
            let changes = SetAttr { mode: Some(0o600), ..SetAttr::default() };
            bed.fs.setattr(ino, None, changes, ME).unwrap();
        }),
        Box::new(|bed, parent| bed.fs.unlink(parent, name, ME).unwrap()),
    ];
    for (number, change) in changes.iter().enumerate() {
        let (_, bed, other) = two();
        other.fs.mkdir(ROOT, OsStr::new("d"), 0o755, 0, ME).unwrap();
        other.save("d/x.arrow", &table_file(&[1, 2])).unwrap();
        let parent = bed.lookup("d", ME).unwrap().attr.ino;
        assert!(!bed.lookup("d/x.arrow", ME).unwrap().entry_ttl.is_zero(), "the listed view, which most use");
        assert!(bed.lookup("d/x.feather", ME).unwrap().entry_ttl.is_zero());
        change(&bed, parent);
        let told = std::mem::take(&mut *bed.host.told.lock().unwrap());
        assert_eq!(told, [(parent, OsString::from("x.arrow"))], "change {number}");

        // Of what the kernel does not know it needs not be told.
        bed.save("z.arrow", &table_file(&[1])).unwrap();
        bed.forget();
        bed.fs.unlink(ROOT, OsStr::new("z.arrow"), ME).unwrap();
        assert_eq!(*bed.host.told.lock().unwrap(), []);
    }
}
