//! Servers that are killed while threads are at work, and the next ones, to which the kernel sends again what nobody has
//! answered, in interleavings that a scheduler chooses.

use super::bed::*;
use super::schedules::two_mounts;
use super::*;
use crate::sync::{Condvar, schedules::check, thread};

/// What the kernel has: one server after the other.
struct World {
    state: Mutex<Server>,
    changed: Condvar,
    /// The kernel's lock on the directory that all work in.
    directory: Mutex<()>,
}

struct Server {
    bed: Arc<Bed>,
    formers: Vec<Arc<Bed>>,
    epoch: u64,
    killed: bool,
    /// Requests that it is at work on.
    busy: usize,
    requests: u64,
}

impl Drop for World {
    fn drop(&mut self) {
        // Servers that were killed remove nothing.
        self.bed().store.die_after(Some(0));
    }
}

impl World {
    fn new(bed: Arc<Bed>) -> Arc<World> {
        let state = Server { bed, formers: Vec::new(), epoch: 0, killed: false, busy: 0, requests: 0 };
        Arc::new(World { state: Mutex::new(state), changed: Condvar::new(), directory: Mutex::new(()) })
    }

    /// A request, until a server that lives has answered it.
    fn ask<T>(&self, pid: u32, request: impl Fn(&Bed, Caller) -> Result<T>) -> Result<T> {
        let number = {
            let mut state = self.state.lock().unwrap();
            state.requests += 2;
            state.requests
        };
        let mut resent = false;
        loop {
            let (bed, epoch) = {
                let mut state = self.state.lock().unwrap();
                while state.killed {
                    state = self.changed.wait(state).unwrap();
                }
                state.busy += 1;
                (state.bed.clone(), state.epoch)
            };
            let answer = request(&bed, Caller { pid, resent, request: number, ..ME });
            let mut state = self.state.lock().unwrap();
            state.busy -= 1;
            self.changed.notify_all();
            if !state.killed && state.epoch == epoch {
                return answer;
            }
            resent = true;
        }
    }

    /// Kills the server, whatever it is doing, and starts another.
    fn kill(&self) {
        let mut state = self.state.lock().unwrap();
        state.killed = true;
        let former = state.bed.clone();
        // It changes nothing from now on.
        former.store.die_after(Some(0));
        while state.busy > 0 {
            state = self.changed.wait(state).unwrap();
        }
        former.store.die_after(None);
        state.epoch += 1;
        let options = Options { epoch: state.epoch, ..Options::default() };
        let fs = FileSystem::new(former.store.clone(), former.host.clone(), options);
        fs.adopt();
        let waiting = former.fs.doomed.lock().unwrap().clone();
        fs.doomed.lock().unwrap().extend(waiting);
        state.bed = Arc::new(Bed::of(fs, former.store.clone(), former.host.clone()));
        state.formers.push(former);
        state.killed = false;
        self.changed.notify_all();
    }

    fn bed(&self) -> Arc<Bed> {
        self.state.lock().unwrap().bed.clone()
    }

    fn save(&self, pid: u32, directory: u64, name: &str, bytes: &[u8]) -> Result<()> {
        let name = OsStr::new(name);
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC;
        let create = |bed: &Bed, me: Caller| bed.fs.create(directory, name, 0o644, 0o022, flags, me);
        let (entry, opened) = {
            let _locked = self.directory.lock().unwrap();
            self.ask(pid, create)?
        };
        let handle = (entry.attr.ino, opened);
        self.bed().write(handle, 0, bytes);
        let closed = self.ask(pid, |bed, me| bed.fs.flush(handle.0, opened.fh, me));
        self.release(pid, handle.0, opened.fh);
        closed
    }

    fn release(&self, pid: u32, ino: u64, fh: u64) {
        let release = |bed: &Bed, _: Caller| -> Result<()> {
            bed.fs.release(ino, fh);
            Ok(())
        };
        self.ask(pid, release).unwrap();
    }

    fn rename(&self, pid: u32, from: (u64, &str), to: (u64, &str)) -> Result<()> {
        let _locked = self.directory.lock().unwrap();
        let names = [OsStr::new(from.1), OsStr::new(to.1)];
        self.ask(pid, |bed, me| bed.fs.rename(from.0, names[0], to.0, names[1], 0, me))
    }
}

fn spawn(world: &Arc<World>, work: impl FnOnce(&World) + Send + 'static) -> thread::JoinHandle<()> {
    let world = world.clone();
    thread::spawn(move || work(&world))
}

fn world() -> (Arc<World>, Vec<Vec<u8>>) {
    let bed = two_mounts(true)[0].clone();
    let versions: Vec<Vec<u8>> = (0..3).map(|v| table_file(&[v, v + 1])).collect();
    bed.save("t.arrow", &versions[0]).unwrap();
    (World::new(bed), versions)
}

#[test]
fn saves_by_rename_and_a_server_that_is_killed() {
    check(|| {
        let (world, versions) = world();
        let save = |number: usize| {
            let bytes = versions[number].clone();
            move |world: &World| {
                let (pid, temporary) = (1000 + number as u32, format!("tmp{number}.arrow"));
                world.save(pid, ROOT, &temporary, &bytes).unwrap();
                world.rename(pid, (ROOT, &temporary), (ROOT, "t.arrow")).unwrap();
            }
        };
        let threads = [spawn(&world, save(1)), spawn(&world, save(2)), spawn(&world, |world| world.kill())];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let bed = world.bed();
        assert_eq!(bed.list(""), ["t.arrow"]);
        let last = bed.load("t.arrow").unwrap();
        assert!(versions[1..].contains(&last));
        world.kill();
        assert!(world.bed().load("t.arrow").unwrap() == last);
    });
}

#[test]
fn a_save_an_unlink_and_a_server_that_is_killed() {
    check(|| {
        let (world, versions) = world();
        let bytes = versions[1].clone();
        let threads = [
            spawn(&world, move |world| world.save(1001, ROOT, "u.arrow", &bytes).unwrap()),
            spawn(&world, |world| {
                let _locked = world.directory.lock().unwrap();
                world.ask(1002, |bed, me| bed.fs.unlink(ROOT, OsStr::new("t.arrow"), me)).unwrap();
            }),
            spawn(&world, |world| {
                world.kill();
                world.kill();
            }),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        for _ in 0..2 {
            let bed = world.bed();
            assert_eq!(bed.list(""), ["u.arrow"]);
            assert!(bed.load("u.arrow").unwrap() == versions[1]);
            world.kill();
        }
    });
}

#[test]
fn a_directory_that_moves_a_save_in_it_and_a_server_that_is_killed() {
    check(|| {
        let (world, versions) = world();
        let bed = world.bed();
        bed.fs.mkdir(ROOT, OsStr::new("d"), 0o755, 0, ME).unwrap();
        bed.save("d/u.arrow", &versions[1]).unwrap();
        let directory = bed.walk("d/u.arrow").unwrap().0;
        drop(bed);
        let bytes = versions[2].clone();
        let threads = [
            spawn(&world, move |world| {
                // Its own lock: the root's does not keep the directory from moving.
                let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC;
                let name = OsStr::new("w.arrow");
                let create = || world.ask(1001, |bed, me| bed.fs.create(directory, name, 0o644, 0o022, flags, me));
                let (entry, opened) = asking_twice(create).unwrap();
                world.bed().write((entry.attr.ino, opened), 0, &bytes);
                world.ask(1001, |bed, me| bed.fs.flush(entry.attr.ino, opened.fh, me)).unwrap();
                world.release(1001, entry.attr.ino, opened.fh);
            }),
            spawn(&world, |world| world.rename(1002, (ROOT, "d"), (ROOT, "e")).unwrap()),
            spawn(&world, |world| world.kill()),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        for _ in 0..2 {
            let bed = world.bed();
            let root = bed.list("");
            assert_eq!(
                root,
                ["e", "t.arrow"],
                "{:?} {:?}",
                bed.list("e"),
                if root.contains(&"d".into()) { bed.list("d") } else { vec![] }
            );
            assert_eq!(bed.list("e"), ["u.arrow", "w.arrow"]);
            assert!(bed.load("e/u.arrow").unwrap() == versions[1]);
            assert!(bed.load("e/w.arrow").unwrap() == versions[2]);
            world.kill();
        }
    });
}

impl World {
    /// As a program that opens a file for each line.
    fn append(&self, pid: u32, name: &str, line: &[u8]) -> Result<()> {
        let open = || {
            let ino = self.ask(pid, |bed, me| bed.fs.lookup(ROOT, OsStr::new(name), me))?.attr.ino;
            let opened = self.ask(pid, |bed, me| bed.fs.open(ino, libc::O_WRONLY | libc::O_APPEND, me))?;
            Ok((ino, opened))
        };
        // Whom the server that was killed had refused, the next one does not know: such a program may see `ESTALE`, has
        // written nothing, and tries again.
        let (ino, opened) = asking_twice(|| asking_twice(open))?;
        {
            let _locked = self.directory.lock().unwrap();
            let size = self.ask(pid, |bed, _| bed.fs.getattr(ino, None))?.0.size;
            self.bed().write((ino, opened), size, line);
        }
        let closed = self.ask(pid, |bed, me| bed.fs.flush(ino, opened.fh, me));
        self.release(pid, ino, opened.fh);
        closed
    }
}

#[test]
fn appenders_and_a_server_that_is_killed() {
    check(|| {
        let bed = two_mounts(true)[0].clone();
        bed.save("log.txt", b"first\n").unwrap();
        let world = World::new(bed);
        let append = |number: u32| {
            move |world: &World| {
                for line in 0..2 {
                    world.append(1000 + number, "log.txt", format!("{number} {line}\n").as_bytes()).unwrap();
                }
            }
        };
        let threads = [spawn(&world, append(1)), spawn(&world, append(2)), spawn(&world, |world| world.kill())];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        for _ in 0..2 {
            let text = String::from_utf8(world.bed().load("log.txt").unwrap()).unwrap();
            let mut lines: Vec<&str> = text.lines().collect();
            lines.sort_unstable();
            assert_eq!(lines, ["1 0", "1 1", "2 0", "2 1", "first"]);
            world.kill();
        }
    });
}

#[test]
fn an_exchange_a_change_of_attributes_and_a_server_that_is_killed() {
    check(|| {
        let (world, versions) = world();
        let bed = world.bed();
        bed.save("u.arrow", &versions[1]).unwrap();
        bed.save("f.bin", b"text").unwrap();
        drop(bed);
        let threads = [
            spawn(&world, |world| {
                let _locked = world.directory.lock().unwrap();
                let names = ["t.arrow", "u.arrow"].map(OsStr::new);
                let flags = libc::RENAME_EXCHANGE;
                world.ask(1001, |bed, me| bed.fs.rename(ROOT, names[0], ROOT, names[1], flags, me)).unwrap();
            }),
            spawn(&world, |world| {
                let once = || {
                    let ino = world.ask(1002, |bed, me| bed.fs.lookup(ROOT, OsStr::new("f.bin"), me))?.attr.ino;
                    let change = SetAttr { mode: Some(0o600), ..SetAttr::default() };
                    world.ask(1002, |bed, me| bed.fs.setattr(ino, None, change, me).map(drop))
                };
                asking_twice(once).unwrap();
            }),
            spawn(&world, |world| world.kill()),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        for _ in 0..2 {
            let bed = world.bed();
            assert_eq!(bed.list(""), ["f.bin", "t.arrow", "u.arrow"]);
            assert!(bed.load("t.arrow").unwrap() == versions[1] && bed.load("u.arrow").unwrap() == versions[0]);
            assert_eq!(bed.lookup("f.bin", ME).unwrap().attr.perm, 0o600);
            assert_eq!(bed.load("f.bin").unwrap(), b"text");
            drop(bed);
            world.kill();
        }
    });
}
