//! Launching a private vineyardd.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use vineyard_fs::vineyard::launch::{self, Chosen, Environment, LaunchOptions};
use vineyard_fs::vineyard::{Client, ClientOptions, Store};

#[test]
fn a_private_vineyardd_is_launched_then_found_by_its_socket() {
    let root = tempfile::tempdir().unwrap();
    let environment = Environment { runtime_folder: root.path().into(), ..Environment::default() };
    let options = LaunchOptions {
        vineyardd: Some(common::vineyardd::binary()),
        size: Some(32 << 20),
        ..LaunchOptions::default()
    };
    let Chosen::Launch(plan) = launch::choose(&options, &environment).unwrap() else { panic!("nothing runs yet") };
    assert!(plan.own_folder.as_ref().is_some_and(|folder| folder.starts_with(root.path())));
    let mut child = launch::command(&plan).unwrap().spawn().unwrap();
    let ready = launch::wait_ready(&plan, Duration::from_secs(60), || child.try_wait().unwrap());
    let found = Environment { default_sockets: vec![plan.socket.clone()], ..environment };
    let chosen = launch::choose(&options, &found);
    let status = Client::connect(ClientOptions::socket(&plan.socket)).and_then(|client| client.status());
    // A frozen one is not chosen, and is given up on in time.
    common::vineyardd::freeze(&child);
    let start = Instant::now();
    let named = LaunchOptions { socket: Some(plan.socket.clone()), ..LaunchOptions::default() };
    let frozen = launch::choose(&named, &Environment::default());
    let waited = start.elapsed();
    child.kill().unwrap();
    child.wait().unwrap();

    assert_eq!(ready.unwrap().socket, plan.socket);
    assert_eq!(status.unwrap().memory_limit, 32 << 20);
    assert_eq!(chosen.unwrap(), Chosen::Existing(plan.socket.clone()));
    assert_eq!(frozen.unwrap_err().kind(), vineyard_fs::Kind::Timeout);
    assert!(waited < Duration::from_secs(20), "{waited:?}");
    let log = std::fs::read_to_string(&plan.log).unwrap();
    // Its first line: it answers before it says that it listens.
    assert!(log.contains("Hello vineyard"), "{log}");
}
