//! A mount point with the commands of the binary. Needs root and `/dev/fuse`.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use super::vineyardd::Vineyardd;

/// How long is waited for what comes sooner or later.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the binary with a time limit, so that a hang is a failure.
pub fn run<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", "60"]).arg(env!("CARGO_BIN_EXE_vineyard-fs")).args(arguments);
    command.env_remove("VINEYARD_IPC_SOCKET").stdin(Stdio::null()).output().unwrap()
}

pub fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A mount point, which is unmounted whatever happens.
pub struct Point {
    pub folder: TempDir,
}

impl Point {
    pub fn new() -> Self {
        let folder = TempDir::with_prefix("vineyard-fs-test-").unwrap();
        std::fs::create_dir(folder.path().join("mnt")).unwrap();
        Point { folder }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("mnt")
    }

    pub fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    pub fn arguments(&self, more: &[&str]) -> Vec<String> {
        let log = self.log();
        let fixed = ["mount", self.path().to_str().unwrap(), "--log-file", log.to_str().unwrap()].map(str::to_owned);
        fixed.into_iter().chain(more.iter().map(|m| (*m).to_owned())).collect()
    }

    #[track_caller]
    pub fn mount(&self, store: &Vineyardd, more: &[&str]) {
        let socket = store.socket();
        let output = run(&self.arguments(&[&["--socket", socket.to_str().unwrap()], more].concat()));
        assert!(output.status.success(), "{}", errors(&output));
    }

    pub fn unmount(&self, more: &[&str]) -> Output {
        run(&[&["unmount", self.path().to_str().unwrap()], more].concat())
    }

    #[track_caller]
    pub fn status(&self) -> Value {
        self.ask_status().unwrap_or_else(|error| panic!("{error}"))
    }

    /// Its status, or what the command says if nothing is mounted.
    pub fn ask_status(&self) -> Result<Value, String> {
        let output = run(&["status", "--json", self.path().to_str().unwrap()]);
        match output.status.success() {
            true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
            false => Err(errors(&output)),
        }
    }

    /// Its status once `told`: busy processes leave out what they cannot tell in time.
    #[track_caller]
    pub fn status_when(&self, told: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        loop {
            let status = self.ask_status();
            match status {
                Ok(status) if told(&status) => return status,
                _ => assert!(start.elapsed() < PATIENCE, "waited too long for another status than {status:?}"),
            }
        }
    }

    /// Its status once it is in this state, with all that the server counts.
    #[track_caller]
    pub fn status_in(&self, state: &str) -> Value {
        let counts = |status: &Value| status["fs"].is_object() && status["fs"]["error"].is_null();
        self.status_when(|status| status["state"] == state && counts(status))
    }

    /// The number of a process of the mount.
    #[track_caller]
    pub fn pid(&self, of: &str) -> i32 {
        let status = self.status_when(|status| status[of]["pid"].is_i64());
        status[of]["pid"].as_i64().unwrap().try_into().unwrap()
    }

    pub fn is_mounted(&self) -> bool {
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        text.lines().any(|line| line.split(' ').nth(4) == self.path().to_str())
    }
}

impl Drop for Point {
    fn drop(&mut self) {
        if self.is_mounted() {
            self.unmount(&["--force"]);
        }
    }
}

#[track_caller]
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether any of its threads runs: the last one may hold its files open when the first is a zombie already.
pub fn lives(pid: i32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    threads.flatten().any(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
    })
}

pub fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// Stops a process; returns when none of its threads runs any more.
#[track_caller]
pub fn freeze(pid: i32) {
    signal(pid, Signal::SIGSTOP);
    wait_until("its threads are stopped", || is_still(pid));
}

/// Whether none of its threads runs: it is stopped, or gone.
fn is_still(pid: i32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return true };
    threads.flatten().all(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['T', 'Z']))
    })
}
