//! What a mount survives, and what its server may not do. Needs root, `/dev/fuse` and a real vineyardd.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::point::{Point, errors, freeze, lives, run, signal, wait_until};
use common::vineyardd::Vineyardd;
use nix::sys::signal::Signal;
use vineyard_fs::fuse::keeper::upgrade;

/// The server once another one than `former` answers, whether its store does or is frozen.
fn next_server(point: &Point, former: i32) -> i32 {
    let status = point.status_when(|status| {
        let answers = ["ok", "store away"].contains(&status["state"].as_str().unwrap_or_default());
        answers && status["server"]["pid"].as_i64().is_some_and(|pid| pid != i64::from(former))
    });
    status["server"]["pid"].as_i64().unwrap() as i32
}

/// Copies a program by another process: a child of this one could still have it open for writing when it is to be run.
fn copy(from: &Path, to: &Path) {
    assert!(Command::new("install").args(["-m", "0755"]).args([from, to]).status().unwrap().success());
}

/// Has a file run as the next server; its process.
fn upgrade(point: &Point, program: &Path) -> vineyard_fs::Result<u32> {
    let status = point.status_in("ok");
    let socket = Path::new(status["runtime"].as_str().unwrap()).join("command.sock");
    upgrade::ask(&socket, &std::fs::File::open(program).unwrap().into())
}

#[test]
fn a_request_that_is_in_work_when_three_servers_end_is_refused() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    point.mount(&store, &["--deadline", "60s"]);
    std::fs::write(point.path().join("good.txt"), "good").unwrap();
    // A question that the store does not answer is in work until the server ends.
    store.freeze();
    let path = point.path();
    let asked = std::thread::spawn(move || std::fs::metadata(path.join("bad.arrow")));
    let mut server = point.pid("server");
    // Three suffice if it is in work by then in each.
    let mut ended = 0;
    loop {
        std::thread::sleep(Duration::from_millis(700));
        if asked.is_finished() || ended == 12 {
            break;
        }
        signal(server, Signal::SIGKILL);
        ended += 1;
        server = next_server(&point, server);
    }
    let error = asked.join().unwrap().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(ended >= 3, "refused after {ended} servers");
    store.thaw();
    // Said by the journal: the deadline says something else.
    let log = std::fs::read_to_string(point.log()).unwrap();
    assert!(log.contains("not tried again"), "{log}");
    // The same question, asked again, is another request.
    let again = std::fs::metadata(point.path().join("bad.arrow")).unwrap_err();
    assert_eq!(again.raw_os_error(), Some(libc::ENOENT));
    assert_eq!(std::fs::read_to_string(point.path().join("good.txt")).unwrap(), "good");
}

#[test]
fn a_frozen_server_is_replaced_and_clients_only_wait() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    point.mount(&store, &["--deadline", "2s"]);
    std::fs::write(point.path().join("a.txt"), "a").unwrap();
    let server = point.pid("server");
    freeze(server);
    let start = Instant::now();
    assert_eq!(std::fs::read_to_string(point.path().join("a.txt")).unwrap(), "a");
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    assert!(!lives(server));
    let status = point.status_in("ok");
    assert_eq!(status["server"]["restarts"], 1);
    assert!(status["server"]["last_end"].as_str().unwrap().contains("no sign of life"), "{status}");
}

#[test]
fn a_mount_whose_servers_all_hang_answers_with_errors_and_recovers() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    point.mount(&store, &["--deadline", "1s"]);
    std::fs::write(point.path().join("a.txt"), "a").unwrap();
    // A server that hangs at its start while a file is there. All is in the first line, for the rest of a script could not
    // be read: its descriptor is closed by then.
    let (folder, hang) = (point.folder.path(), point.folder.path().join("hang"));
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_vineyard-fs"), folder.join("vineyard-fs")).unwrap();
    let command = format!("[ -e {0}/hang ] && exec sleep 1000; exec {0}/vineyard-fs \"$@\"", folder.display());
    std::fs::write(folder.join("text"), format!("#!/usr/bin/env -S /bin/sh -c '{command}'\n")).unwrap();
    let program = folder.join("program");
    copy(&folder.join("text"), &program);
    let server = upgrade(&point, &program).unwrap();
    let keeper = point.pid("keeper");
    std::fs::write(&hang, "").unwrap();
    freeze(server.try_into().unwrap());
    // Somebody saves all the time: never into the bare directory.
    let (path, stop) = (point.path(), Arc::new(AtomicBool::new(false)));
    let told = stop.clone();
    let saving = std::thread::spawn(move || {
        while !told.load(Ordering::Relaxed) {
            std::fs::write(path.join("c.txt"), "c").ok();
        }
    });
    let start = Instant::now();
    let error = std::fs::metadata(point.path().join("new")).unwrap_err();
    let took = start.elapsed();
    std::fs::remove_file(&hang).unwrap();
    assert!(
        [libc::ENOTCONN, libc::ECONNABORTED].contains(&error.raw_os_error().unwrap()),
        "whoever waits gets an error: {error}"
    );
    assert!(took < Duration::from_secs(60), "{took:?}");
    // It goes and comes again.
    let status = point.status_in("ok");
    assert_eq!(status["keeper"]["pid"], keeper);
    assert!(status["remounts"].as_u64().unwrap() >= 1);
    assert_eq!(std::fs::read_to_string(point.path().join("a.txt")).unwrap(), "a");
    std::fs::write(point.path().join("b.txt"), "b").unwrap();
    stop.store(true, Ordering::Relaxed);
    saving.join().unwrap();
    point.unmount(&["--force"]);
    let beneath: Vec<_> = std::fs::read_dir(point.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(beneath.is_empty(), "{beneath:?}");
}

#[test]
fn a_server_is_locked_in() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    point.mount(&store, &[]);
    let server = point.pid("server");
    let status = std::fs::read_to_string(format!("/proc/{server}/status")).unwrap();
    for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"] {
        assert!(status.contains(line), "{line} in {status}");
    }
    let threads = std::fs::read_dir(format!("/proc/{server}/task")).unwrap();
    // Some live for a moment only.
    let threads: Vec<String> =
        threads.flatten().flat_map(|thread| std::fs::read_to_string(thread.path().join("status"))).collect();
    assert!(threads.len() >= 3, "{threads:?}");
    for status in threads {
        assert!(status.contains("Seccomp:\t2"), "{status}");
    }
    let sandbox = &point.status_in("ok")["sandbox"];
    assert_eq!(
        (sandbox["seccomp"].as_bool(), sandbox["missing"].as_array().unwrap().len()),
        (Some(true), 0),
        "{sandbox}"
    );
}

#[test]
fn an_upgrade_goes_unnoticed_and_a_bad_one_is_undone() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    point.mount(&store, &[]);
    let path = point.path().join("half.bin");
    let mut half = std::fs::File::create(&path).unwrap();
    half.write_all(&[1; 100_000]).unwrap();
    let former = point.pid("server");
    let folder = point.folder.path();
    let new = folder.join("vineyard-fs-new");
    copy(env!("CARGO_BIN_EXE_vineyard-fs").as_ref(), &new);
    let output = Command::new("timeout").args(["60"]).arg(&new).arg("upgrade").arg(point.path()).output().unwrap();
    assert!(output.status.success(), "{}", errors(&output));
    let server = point.pid("server");
    assert_ne!(server, former);
    assert_eq!(std::fs::read_link(format!("/proc/{server}/exe")).unwrap(), new);
    half.write_all(&[2; 100_000]).unwrap();
    drop(half);
    assert_eq!(std::fs::read(&path).unwrap(), [[1; 100_000], [2; 100_000]].concat());
    // A program that is no server.
    let refused = upgrade(&point, "/bin/false".as_ref()).unwrap_err();
    assert!(refused.to_string().contains("former program goes on"), "{refused}");
    let server = next_server(&point, server);
    assert_eq!(std::fs::read_link(format!("/proc/{server}/exe")).unwrap(), new);
    assert_eq!(std::fs::read(&path).unwrap().len(), 200_000);
    let other = run(&["upgrade", folder.to_str().unwrap()]);
    assert!(errors(&other).contains("not a mount"), "{}", errors(&other));
}

#[test]
fn counters_are_served_and_the_state_is_dumped() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    point.mount(&store, &["--metrics", "127.0.0.1:0", "--log-format", "json"]);
    let address = point.status_in("ok")["metrics"].as_str().unwrap().to_owned();
    std::fs::write(point.path().join("a.txt"), "a").unwrap();
    let page = || {
        let mut connection = TcpStream::connect(&address).unwrap();
        write!(connection, "GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        connection.read_to_string(&mut text).unwrap();
        text
    };
    // A busy server leaves out what it cannot tell in time.
    let mut text = String::new();
    wait_until("the counters tell that the store answers", || {
        text = page();
        text.lines().any(|line| line == "vineyard_fs_store_up 1")
    });
    for line in ["vineyard_fs_requests_total{op=\"create\"} 1", "vineyard_fs_server_restarts_total 0"] {
        assert!(text.lines().any(|l| l == line), "{line} in {text}");
    }
    let server = point.pid("server");
    signal(server, Signal::SIGKILL);
    next_server(&point, server);
    assert!(page().contains("vineyard_fs_server_restarts_total 1"));
    // The keeper passes the signal on to a server that it knows to be ready.
    point.status_when(|status| status["server"]["ready"] == true);
    signal(point.pid("keeper"), Signal::SIGUSR1);
    let dumps = || {
        let log = std::fs::read_to_string(point.log()).unwrap();
        // A line that is being written has no end yet.
        let whole = log.rsplit_once('\n').unwrap_or_default().0;
        let lines = whole.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect(line));
        lines.filter(|line| line["fields"]["message"].as_str().is_some_and(|m| m.contains("SIGUSR1"))).count()
    };
    wait_until("keeper and server dumped their state", || dumps() == 2);
    point.status_in("ok");
}

#[test]
fn directories_belong_to_who_makes_them_and_outlive_a_server() {
    let (store, point) = (Vineyardd::start("64Mi"), Point::new());
    std::fs::set_permissions(point.folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    point.mount(&store, &["--dir-mode", "0777"]);
    let made = point.path().join("made");
    let as_daemon = |command: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-c", command, "sh"]).arg(&made).uid(1).gid(1);
        shell.status().unwrap().success()
    };
    assert!(as_daemon("umask 022; mkdir \"$1\" && mkdir \"$1/below\" && echo x > \"$1/file\" && chmod 2750 \"$1\""));
    std::fs::rename(&made, point.path().join("moved")).unwrap();
    std::fs::rename(point.path().join("moved"), &made).unwrap();
    let before = std::fs::metadata(&made).unwrap();
    assert_eq!((before.uid(), before.gid(), before.mode() & 0o7777), (1, 1, 0o2750));
    let held = std::fs::File::open(&made).unwrap();
    let server = point.pid("server");
    signal(server, Signal::SIGKILL);
    next_server(&point, server);
    let after = held.metadata().unwrap();
    assert_eq!((after.ino(), after.uid(), after.mode()), (before.ino(), 1, before.mode()));
    assert!(made.join("below").is_dir());
    assert!(!as_daemon("exec 2>/dev/null; rmdir \"$1\""), "it is not empty");
    // A group that is passed on.
    std::fs::write(made.join("of-root"), "x").unwrap();
    assert_eq!(std::fs::metadata(made.join("of-root")).unwrap().gid(), 1);
}
