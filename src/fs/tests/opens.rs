//! Views that are open, or being opened, while their attributes change.

use std::sync::mpsc;
use std::time::Duration;

use super::super::*;
use super::bed::*;
use super::*;

fn values() -> Vec<f64> {
    (0..20_000).map(f64::from).collect()
}

fn chmod(bed: &Bed, ino: u64, mode: u32) -> Result<()> {
    bed.fs.setattr(ino, None, SetAttr { mode: Some(mode), ..Default::default() }, ME).map(drop)
}

#[test]
fn changed_attributes_of_one_name_leave_the_object_to_another() {
    for passthrough in [true, false] {
        let bed = bed_with(passthrough, Options::default());
        let object = bed.put_tensor("n1", &values());
        bed.store.put_name("n2", object).unwrap();
        let bytes = bed.load("n1.npy").unwrap();
        chmod(&bed, bed.lookup("n1.npy", ME).unwrap().attr.ino, 0o600).unwrap();
        assert_eq!(bed.lookup("n1.npy", ME).unwrap().attr.perm, 0o600);
        for name in ["n1.npy", "n2.npy"] {
            assert_eq!(bed.load(name).unwrap(), bytes, "{name}");
            bed.fs.unlink(ROOT, OsStr::new(name), ME).unwrap();
        }
        assert_eq!((bed.store.object_count(), bed.store.blob_count()), (0, 0));
    }
}

#[test]
fn what_is_read_from_the_store_stays_readable_through_changes_of_attributes() {
    for changes in 0..3 {
        let bed = bed_with(false, Options::default());
        bed.put_tensor("x", &values());
        let bytes = bed.load("x.npy").unwrap();
        let first = bed.open("x.npy", libc::O_RDONLY, OTHER).unwrap();
        for mode in 0..changes {
            chmod(&bed, first.0, 0o600 + mode).unwrap();
        }
        let second = bed.open("x.npy", libc::O_RDONLY, OTHER).unwrap();
        bed.fs.unlink(ROOT, OsStr::new("x.npy"), ME).unwrap();
        assert_eq!(bed.read_handle(first).unwrap(), bytes, "{changes} changes");
        bed.close(first, OTHER).unwrap();
        assert_eq!(bed.read_handle(second).unwrap(), bytes, "{changes} changes");
        bed.close(second, OTHER).unwrap();
        assert!(bed.fs.lazy_opens().is_empty(), "{changes} changes");
        assert_eq!((bed.store.object_count(), bed.store.blob_count()), (0, 0), "{changes} changes");
    }
}

#[test]
fn nobody_waits_for_a_file_that_is_being_assembled_but_who_opens_it() {
    let bed = bed();
    bed.put_tensor("x", &values());
    bed.put_tensor("other", &[1.0]);
    let ino = bed.lookup("x.npy", ME).unwrap().attr.ino;
    let gate = bed.host.gate.lock().unwrap();
    std::thread::scope(|threads| {
        let openers = [(); 2].map(|()| threads.spawn(|| bed.fs.open(ino, libc::O_RDONLY, OTHER)));
        while bed.fs.inodes.get(ino).unwrap().opening.try_lock().is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let (done, changed) = mpsc::channel();
        let bed = &bed;
        threads.spawn(move || {
            let both = chmod(bed, ino, 0o600).and_then(|()| bed.lookup("other.npy", ME));
            done.send(both.map(drop)).unwrap();
        });
        let in_time = changed.recv_timeout(Duration::from_secs(60));
        assert!(openers.iter().all(|opener| !opener.is_finished()));
        drop(gate);
        in_time.expect("others go on").unwrap();
        let opened = openers.map(|opener| opener.join().unwrap().unwrap());
        assert_eq!(opened[0].serve, opened[1].serve, "one inode is served in one way");
        assert_eq!(bed.fs.inodes.get(ino).unwrap().state().opens, 2, "also counted where the change put them");
        for opened in opened {
            assert_eq!(bed.read_handle((ino, opened)).unwrap().len(), 128 + 160_000);
            bed.close((ino, opened), OTHER).unwrap();
        }
    });
    assert!(bed.fs.inodes.get(ino).unwrap().state().mode.is_none());
    assert_eq!(bed.lookup("x.npy", ME).unwrap().attr.perm, 0o600);
    assert_eq!(bed.store.object_count(), 2);
}
