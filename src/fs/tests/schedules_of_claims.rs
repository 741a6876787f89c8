//! Schedules of mounts of one vineyardd that take files from their paths: of several who take one, one does.

use std::sync::atomic::{AtomicU64, AtomicUsize};

use super::super::naming::Naming;
use super::bed::*;
use super::schedules::{assert_nothing_is_left, rename, spawn, unlink};
use super::*;
use crate::sync::{schedules::check, thread::JoinHandle};
use crate::vineyard::fake::FakeStore;

/// Mounts that lock each other out while they change names.
fn mounts(passthrough: bool) -> [Arc<Bed>; 3] {
    let store = Arc::new(FakeStore::new(64 << 20).alone());
    let lock = Naming::default();
    [(); 3].map(|()| {
        let next = AtomicU64::new(1);
        let host = Arc::new(LocalHost { passthrough, next, store: Some(store.clone()), ..LocalHost::default() });
        let mut fs = FileSystem::new(store.clone(), host.clone(), Options::default());
        fs.naming = Naming::shared_with(&lock);
        Arc::new(Bed::of(fs, store.clone(), host))
    })
}

/// A way to take a file from its path, through the mount of this number.
type Taker = (usize, fn(&Bed) -> Result<()>);

/// The threads of those who take a file, which count who got it.
fn takers(mounts: &[Arc<Bed>], takers: &[Taker], taken: &Arc<AtomicUsize>) -> Vec<JoinHandle<()>> {
    let spawned = takers.iter().map(|&(at, take)| {
        let taken = taken.clone();
        spawn(&mounts[at], move |bed, _| match asking_twice(|| take(bed)) {
            Ok(()) => drop(taken.fetch_add(1, Ordering::SeqCst)),
            // Who meets others both times has done nothing.
            Err(error) => assert!(matches!(error.kind(), Kind::NotFound | Kind::Stale), "{error}"),
        })
    });
    spawned.collect()
}

/// Of these one takes it.
fn assert_one_takes(mounts: &[Arc<Bed>], all: &[Taker]) {
    let taken = Arc::default();
    takers(mounts, all, &taken).into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(taken.load(Ordering::SeqCst), 1);
}

/// A file that was written through the first mount, which has forgotten it or not.
fn with_file(passthrough: bool, forgotten: bool, path: &str, bytes: &[u8]) -> [Arc<Bed>; 3] {
    let mounts = mounts(passthrough);
    mounts[0].save(path, bytes).unwrap();
    if forgotten {
        mounts[0].forget();
    }
    mounts
}

fn each(work: impl Fn(bool, bool) + Send + Sync + Clone + 'static) {
    for (passthrough, forgotten) in [(true, false), (false, false), (false, true)] {
        let work = work.clone();
        check(move || work(passthrough, forgotten));
    }
}

/// The files that mounts show, which show the same.
fn shown(mounts: &[Arc<Bed>; 3]) -> Vec<(String, Vec<u8>)> {
    let files = |bed: &Bed| -> Vec<(String, Vec<u8>)> {
        bed.list("").into_iter().map(|name| (name.clone(), bed.load(&name).unwrap())).collect()
    };
    let found = files(&mounts[0]);
    mounts[1..].iter().for_each(|bed| assert_eq!(files(bed), found));
    found
}

#[test]
fn renames_of_one_file() {
    each(|passthrough, forgotten| {
        let table = table_file(&[1, 2]);
        let mounts = with_file(passthrough, forgotten, "t.arrow", &table);
        assert_one_takes(
            &mounts,
            &[
                (0, |bed| rename(bed, "t.arrow", "a.arrow")),
                (1, |bed| rename(bed, "t.arrow", "b.arrow")),
                (1, |bed| rename(bed, "t.arrow", "c.claimed")),
            ],
        );
        let found = shown(&mounts);
        assert!(found.len() == 1 && found[0].0 != "t.arrow" && found[0].1 == table, "{:?}", mounts[0].list(""));
        assert_nothing_is_left(&mounts[1]);
    });
}

#[test]
fn renames_and_removals_of_one_file() {
    each(|passthrough, forgotten| {
        let mounts = with_file(passthrough, forgotten, "f.bin", b"a job");
        assert_one_takes(
            &mounts,
            &[
                (0, |bed| unlink(bed, "f.bin")),
                (1, |bed| unlink(bed, "f.bin")),
                (1, |bed| rename(bed, "f.bin", "g.bin")),
            ],
        );
        let found = shown(&mounts);
        assert!(found.is_empty() || found == [("g.bin".to_owned(), b"a job".to_vec())]);
        assert_nothing_is_left(&mounts[0]);
    });
}

/// No version is taken twice, and the last one is not lost.
#[test]
fn renames_of_a_file_that_is_saved() {
    each(|passthrough, forgotten| {
        let mounts = with_file(passthrough, forgotten, "f.bin", b"first");
        let renames: [Taker; 2] = [(0, |bed| rename(bed, "f.bin", "a.bin")), (1, |bed| rename(bed, "f.bin", "b.bin"))];
        let mut threads = takers(&mounts, &renames, &Arc::default());
        threads.push(spawn(&mounts[1], |bed, me| bed.save_as("f.bin", b"second", me).unwrap()));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let mut versions: Vec<Vec<u8>> = shown(&mounts).into_iter().map(|(_, bytes)| bytes).collect();
        versions.sort_unstable();
        let known = [b"first".to_vec(), b"second".to_vec()];
        assert!(versions == known || versions == known[1..], "{versions:?}");
        assert_nothing_is_left(&mounts[0]);
    });
}

/// Whoever has written files of it lately, or has made it, moves what it knows of it by itself.
#[test]
fn renames_of_a_directory_that_another_mount_has_made() {
    check(|| {
        let mounts = mounts(true);
        mounts[2].mkdir("d", ME).unwrap();
        mounts[2].save("d/t.arrow", &table_file(&[1])).unwrap();
        mounts[2].save("d/f.bin", b"f").unwrap();
        assert_one_takes(
            &mounts,
            &[(0, |bed| rename(bed, "d", "e")), (1, |bed| rename(bed, "d", "f")), (1, |bed| rename(bed, "d", "g"))],
        );
        let found: Vec<String> = mounts[1].list("");
        assert_eq!(found.len(), 1, "{found:?}");
        for bed in &mounts[..2] {
            assert_eq!(bed.list(&found[0]), ["f.bin", "t.arrow"]);
            assert_eq!(bed.load(&format!("{}/f.bin", found[0])).unwrap(), b"f");
        }
        assert_nothing_is_left(&mounts[1]);
    });
}
