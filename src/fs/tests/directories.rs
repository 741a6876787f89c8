//! Processes that are in a directory while it gets another name.

use std::time::Duration;

use super::super::*;
use super::bed::*;
use super::*;

const APPEND: i32 = libc::O_WRONLY | libc::O_APPEND;
const THIRD: Caller = Caller { pid: 300, ..OTHER };

/// What a thread does that begins when the store has answered so many requests for names; the store goes on when it has
/// ended, or waits for something else to go on.
fn after_so_many_names<T: Send + 'static>(
    bed: &Arc<Bed>,
    count: usize,
    work: impl FnOnce(&Bed) -> T + Send + 'static,
) -> std::sync::mpsc::Receiver<T> {
    let (done, result) = std::sync::mpsc::channel();
    let (other, mut left) = (Arc::downgrade(bed), count);
    let bed_of = move || other.upgrade().unwrap();
    let act = move || {
        let (ended, end) = std::sync::mpsc::channel();
        let bed = bed_of();
        std::thread::spawn(move || {
            let _ = done.send(work(&bed));
            let _ = ended.send(());
        });
        let _ = end.recv_timeout(Duration::from_millis(300));
    };
    fn arm(bed: &Arc<Bed>, left: usize, act: Box<dyn FnOnce() + Send>) {
        let other = Arc::downgrade(bed);
        bed.store.after_names(move || match left {
            1 => act(),
            _ => arm(&other.upgrade().unwrap(), left - 1, act),
        });
    }
    left = left.max(1);
    arm(bed, left, Box::new(act));
    result
}

fn bed_with_a_directory() -> (Arc<Bed>, u64) {
    let bed = Arc::new(bed());
    bed.fs.mkdir(ROOT, OsStr::new("d"), 0o755, 0, ME).unwrap();
    let directory = bed.walk("d/x").unwrap().0;
    (bed, directory)
}

fn rename(bed: &Bed) {
    bed.fs.rename(ROOT, OsStr::new("d"), ROOT, OsStr::new("e"), 0, THIRD).unwrap();
}

#[test]
fn a_file_is_there_and_is_listed_while_its_directory_moves() {
    // At whatever moment it is looked for.
    for moment in 1..=8 {
        for listed in [false, true] {
            let (bed, directory) = bed_with_a_directory();
            bed.put_tensor("d/t", &[1.0]);
            let found = after_so_many_names(&bed, moment, move |bed| {
                if !listed {
                    return bed.fs.lookup(directory, OsStr::new("t.npy"), OTHER).map(|_| true);
                }
                let fh = bed.fs.opendir(directory)?;
                let mut names = Vec::new();
                bed.fs.readdir(directory, fh, 0, false, &mut |entry| {
                    names.push(entry.name);
                    false
                })?;
                bed.fs.releasedir(directory, fh);
                Ok(names.iter().filter(|name| *name == "t.npy").count() == 1)
            });
            rename(&bed);
            // Moments that do not come while it moves come now.
            (0..moment).for_each(|_| drop(bed.list("e")));
            assert!(found.recv().unwrap().unwrap(), "moment {moment}, listed: {listed}");
            assert_eq!(bed.list("e"), ["t.npy"]);
        }
    }
}

#[test]
fn a_line_is_in_the_file_that_moved_with_its_directory() {
    for moment in 1..=8 {
        let (bed, directory) = bed_with_a_directory();
        let name = OsStr::new("log.txt");
        bed.save("d/log.txt", b"first\n").unwrap();
        let former = bed.fs.lookup(directory, name, ME).unwrap().attr.ino;
        // Its own copy is taken by somebody else before it comes.
        assert_eq!(bed.open_inode(former, APPEND, ME).unwrap_err().kind(), Kind::Stale);
        bed.append_line("d/log.txt", "second\n", OTHER).unwrap();
        assert_eq!(bed.load("d/log.txt").unwrap(), b"first\nsecond\n");
        // So another copy is made when it looks the name up again.
        let found = after_so_many_names(&bed, moment, move |bed| bed.fs.lookup(directory, name, ME));
        rename(&bed);
        (0..moment).for_each(|_| drop(bed.list("e")));
        let ino = found.recv().unwrap().unwrap().attr.ino;
        let handle = (ino, bed.open_inode(ino, APPEND, ME).unwrap());
        bed.append(handle, b"third\n");
        bed.close(handle, ME).unwrap();
        assert_eq!(bed.list(""), ["e"], "moment {moment}");
        assert_eq!(bed.load("e/log.txt").unwrap(), b"first\nsecond\nthird\n", "moment {moment}");
    }
}
