//! The mount from outside: commands, processes, signals, and what is left after a crash. Needs root, `/dev/fuse` and a
//! real vineyardd.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::point::{Point, errors, freeze, lives, run, signal, wait_until};
use common::vineyardd::Vineyardd;
use nix::sys::signal::Signal;

#[test]
fn files_are_written_read_and_found_again_by_the_next_mount() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    point.mount(&store, &[]);
    let text: String = (0..100_000).map(|i| format!("line {i}\n")).collect();
    std::fs::write(point.path().join("notes.txt"), &text).unwrap();
    assert_eq!(std::fs::read_to_string(point.path().join("notes.txt")).unwrap(), text);
    let names = |point: &Point| -> Vec<_> {
        std::fs::read_dir(point.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    };
    assert_eq!(names(&point), ["notes.txt"]);
    let status = point.status_in("ok");
    assert_eq!(status["store"]["socket"], store.socket().to_str().unwrap());
    assert!(status["operations"]["create"]["count"].as_u64().unwrap() >= 1);
    let (keeper, server) = (point.pid("keeper"), point.pid("server"));
    let server_status = std::fs::read_to_string(format!("/proc/{server}/status")).unwrap();
    for line in
        ["Uid:\t65534\t65534\t65534\t65534", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"]
    {
        assert!(server_status.contains(line), "{line} in {server_status}");
    }
    assert!(point.unmount(&[]).status.success());
    assert!(!point.is_mounted() && !lives(keeper) && !lives(server));
    point.mount(&store, &["--read-only"]);
    assert_eq!(std::fs::read_to_string(point.path().join("notes.txt")).unwrap(), text);
    let refused = std::fs::write(point.path().join("other"), "x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    let output = point.unmount(&[]);
    assert!(output.status.success(), "{}", errors(&output));
}

#[test]
fn a_killed_server_is_replaced_under_open_files() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    point.mount(&store, &[]);
    let path = point.path().join("data.bin");
    let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    std::fs::write(&path, &bytes).unwrap();
    let mut open = std::fs::File::open(&path).unwrap();
    for round in 1..=3 {
        signal(point.pid("server"), Signal::SIGKILL);
        // The requests below wait for the next server.
        let note = format!("note {round}");
        std::fs::write(point.path().join(&note), &note).unwrap();
        let names = std::fs::read_dir(point.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(names.count(), round + 1);
        let mut whole = Vec::new();
        open.rewind().unwrap();
        open.read_to_end(&mut whole).unwrap();
        assert!(whole == bytes, "round {round}, the descriptor of before");
    }
    wait_until("the keeper tells its restarts", || point.status()["server"]["restarts"] == 3);
    drop(open);
    let output = point.unmount(&[]);
    assert!(output.status.success(), "{}", errors(&output));
}

#[test]
fn a_killed_keeper_leaves_a_mount_that_is_repaired() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    for repair_by_mount in [true, false] {
        point.mount(&store, &[]);
        let (keeper, server) = (point.pid("keeper"), point.pid("server"));
        signal(keeper, Signal::SIGKILL);
        wait_until("both processes are gone", || !lives(keeper) && !lives(server));
        assert!(point.is_mounted());
        let dead = std::fs::metadata(point.path()).unwrap_err();
        assert_eq!(dead.raw_os_error(), Some(libc::ENOTCONN));
        assert_eq!(point.status()["state"], "dead");
        if repair_by_mount {
            point.mount(&store, &[]);
            assert!(std::fs::read_dir(point.path()).is_ok());
        }
        let output = point.unmount(&[]);
        assert!(output.status.success(), "{}", errors(&output));
        assert!(!point.is_mounted());
    }
}

#[test]
fn signals_unmount_cleanly() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    for ending in [Signal::SIGTERM, Signal::SIGINT] {
        point.mount(&store, &[]);
        let (keeper, server) = (point.pid("keeper"), point.pid("server"));
        signal(keeper, ending);
        wait_until("the keeper is gone", || !lives(keeper));
        assert!(!point.is_mounted() && !lives(server));
    }
}

struct Foreground(Child);

impl Drop for Foreground {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn the_foreground_is_left_by_a_signal_with_success() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    let mut command = Command::new(env!("CARGO_BIN_EXE_vineyard-fs"));
    command.args(["mount", "-f", "--socket"]).arg(store.socket()).arg(point.path());
    let mut child = Foreground(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(child.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains(point.path().to_str().unwrap()), "{line}");
    assert_eq!(point.pid("keeper"), i32::try_from(child.0.id()).unwrap());
    signal(child.0.id().try_into().unwrap(), Signal::SIGINT);
    assert!(child.0.wait().unwrap().success());
    assert!(!point.is_mounted());
}

#[test]
fn a_mount_in_use_is_unmounted_by_force_only() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    point.mount(&store, &[]);
    let mut file = std::fs::File::create(point.path().join("open.txt")).unwrap();
    file.write_all(b"x").unwrap();
    let refused = point.unmount(&[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(errors(&refused).contains("--force"), "{}", errors(&refused));
    assert!(point.is_mounted());
    let keeper = point.pid("keeper");
    let forced = point.unmount(&["--force"]);
    assert!(forced.status.success(), "{}", errors(&forced));
    assert!(!point.is_mounted() && !lives(keeper));
}

#[test]
fn a_frozen_server_hangs_neither_status_nor_unmount() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    point.mount(&store, &[]);
    let (keeper, server) = (point.pid("keeper"), point.pid("server"));
    freeze(server);
    let start = Instant::now();
    point.status_when(|status| status["state"] == "hung");
    let path = point.path();
    let reader = std::thread::spawn(move || std::fs::read_dir(path.join("folder")).map(drop));
    std::thread::sleep(Duration::from_millis(100));
    let output = point.unmount(&["--force"]);
    assert!(output.status.success(), "{}", errors(&output));
    assert!(reader.join().unwrap().is_err());
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    assert!(!lives(keeper) && !lives(server));
}

#[test]
fn a_frozen_store_answers_within_the_deadline_and_recovers() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    point.mount(&store, &["--deadline", "3s"]);
    store.freeze();
    let start = Instant::now();
    let error = std::fs::metadata(point.path().join("missing")).unwrap_err();
    let took = start.elapsed();
    // The server answers, if not for the store.
    let status = point.status_in("store away");
    store.thaw();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(status["fs"]["cache"]["limit"].is_u64(), "what the server itself counts");
    assert!(took < Duration::from_secs(30), "{took:?}");
    assert!(!status["last_errors"].as_array().unwrap().is_empty());
    wait_until("the mount recovers", || {
        let again = std::fs::metadata(point.path().join("missing")).unwrap_err();
        again.raw_os_error() == Some(libc::ENOENT)
    });
}

#[test]
fn places_that_are_no_mount_points_are_refused_with_one_line() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    let folder = point.folder.path();
    std::fs::write(folder.join("file"), "x").unwrap();
    std::fs::create_dir(folder.join("full")).unwrap();
    std::fs::write(folder.join("full/x"), "x").unwrap();
    let socket = store.socket();
    let refuse = |place: &Path, socket: &Path, expected: &str| {
        let log = folder.join("log");
        let arguments = [Path::new("mount"), place, "--socket".as_ref(), socket, "--log-file".as_ref(), &log];
        let output = run(&arguments);
        let text = errors(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.starts_with("vineyard-fs: ") && text.contains(expected), "{text}");
    };
    refuse(&folder.join("missing"), &socket, "mkdir");
    refuse(&folder.join("file"), &socket, "not a directory");
    refuse(&folder.join("full"), &socket, "not empty");
    refuse(&point.path(), &folder.join("none.sock"), "none.sock");
    refuse(&point.path(), &folder.join("file"), "file");
    assert!(!point.is_mounted());
    point.mount(&store, &[]);
    refuse(&point.path(), &socket, "already");
    let other = run(&["unmount", folder.to_str().unwrap()]);
    assert_eq!(other.status.code(), Some(1));
    assert!(errors(&other).contains("not a mount"), "{}", errors(&other));
    let status = run(&["status", folder.to_str().unwrap()]);
    assert_eq!(status.status.code(), Some(1));
}

#[test]
fn mount_calls_it_as_a_helper() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    let options = format!("rw,noatime,log_file={},file_mode=0600,ro", point.log().display());
    let (socket, path) = (store.socket(), point.path());
    let output = run(&[socket.to_str().unwrap(), path.to_str().unwrap(), "-o", &options]);
    assert!(output.status.success(), "{}", errors(&output));
    let error = std::fs::write(path.join("x"), "x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    // A foreign `umount` ends the processes, too.
    let keeper = point.pid("keeper");
    assert!(Command::new("umount").arg(&path).status().unwrap().success());
    wait_until("the keeper is gone", || !lives(keeper));
}

#[test]
fn a_private_store_lives_and_ends_with_the_mount() {
    let point = Point::new();
    let vineyardd = common::vineyardd::binary();
    let output = run(&point.arguments(&["--vineyardd", vineyardd.to_str().unwrap(), "--size", "64Mi"]));
    assert!(output.status.success(), "{}", errors(&output));
    let status = point.status_in("ok");
    assert_eq!(status["store"]["private"], true);
    let store = point.pid("store");
    assert!(lives(store));
    std::fs::write(point.path().join("a.txt"), "a").unwrap();
    assert_eq!(std::fs::read_to_string(point.path().join("a.txt")).unwrap(), "a");
    let output = point.unmount(&[]);
    assert!(output.status.success(), "{}", errors(&output));
    assert!(!lives(store));
}

#[test]
fn names_appear_in_listings_at_once() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    point.mount(&store, &[]);
    for name in ["one", "two"] {
        std::fs::write(point.path().join(name), name).unwrap();
        let seen = std::fs::read_dir(point.path()).unwrap().filter(|e| e.as_ref().unwrap().file_name() == name);
        assert_eq!(seen.count(), 1, "{name}");
    }
}
