//! A mount that runs: its keeper, seen from the mounter.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tonic::Code;

use super::Options;
use crate::csi::failure::{Failure, Outcome};
use crate::csi::state::{MountKey, State};
use crate::csi::target;
use crate::error::{Context, Result};
use crate::fuse::runtime::{Runtime, start_time};
use crate::fuse::{mountinfo, status};
use crate::telemetry::Format as LogFormat;

/// How long a keeper may take to end or to hand its mount on.
const END: Duration = Duration::from_secs(12);
/// How long a new mount may take, at least: a vineyardd has been waited for already.
const START: Duration = Duration::from_secs(5);

/// A keeper.
#[derive(Debug)]
pub struct Running {
    pid: u32,
    /// When it started: tells it from a later process with its id.
    start: u64,
    /// If this process started it.
    child: Option<Child>,
    /// Device number of the mount.
    pub device: (u32, u32),
}

/// What a new mount is made of.
pub struct Spawn<'a> {
    /// Where.
    pub path: &'a Path,
    /// The vineyardd's socket.
    pub socket: &'a Path,
    /// Which.
    pub key: &'a MountKey,
    /// The mounter's.
    pub options: &'a Options,
    /// The shared folder.
    pub state: &'a State,
}

/// Starts a keeper and waits until its mount answers.
///
/// # Errors
/// What it said last, if it ended; `UNAVAILABLE` if it says nothing until `until`, and for 5 s at least.
pub fn start(spawn: &Spawn<'_>, until: Instant) -> Outcome<Running> {
    let mut child = command(spawn).spawn().context(|| "cannot start a keeper".into())?;
    let pid = child.id();
    let last = Arc::new(Mutex::new(String::new()));
    let (send, told) = channel();
    if let Some(output) = child.stdout.take() {
        super::thread("keeper's word", move || {
            let mut line = String::new();
            // Sent also without a line: the keeper has ended then.
            BufReader::new(output).read_line(&mut line).ok();
            send.send(line).ok();
        })?;
    }
    if let Some(errors) = child.stderr.take() {
        let last = last.clone();
        super::thread("keeper's log", move || {
            for line in BufReader::new(errors).lines().map_while(std::result::Result::ok) {
                if let Some(message) = line.strip_prefix("vineyard-fs: ") {
                    *last.lock().unwrap_or_else(|e| e.into_inner()) = message.to_owned();
                }
                eprintln!("{line}");
            }
        })?;
    }
    let mut running = Running { pid, start: start_time(pid).unwrap_or(0), child: Some(child), device: (0, 0) };
    let left = until.saturating_duration_since(Instant::now()).max(START);
    let failed = match told.recv_timeout(left) {
        Ok(line) if !line.is_empty() => match mountinfo::at(spawn.path)? {
            Some(mount) if target::is_ours(&mount) => {
                running.device = mount.device;
                return Ok(running);
            }
            _ => format!("{:?} was mounted, and is gone again", spawn.path),
        },
        Ok(_) | Err(RecvTimeoutError::Disconnected) => {
            // Its last words are being read by the other thread.
            std::thread::sleep(Duration::from_millis(50));
            let last = last.lock().unwrap_or_else(|e| e.into_inner()).clone();
            if last.is_empty() { "the keeper ended without a word; see the mounter's log".to_owned() } else { last }
        }
        Err(RecvTimeoutError::Timeout) => {
            format!("vineyardd {} accepts connections but does not answer", spawn.key.vineyard)
        }
    };
    running.kill();
    Err(Failure::new(Code::Unavailable, failed))
}

fn command(spawn: &Spawn<'_>) -> Command {
    let MountKey { format, group, .. } = spawn.key;
    let (dir_mode, file_mode) = spawn.key.modes();
    let mut command = Command::new("/proc/self/exe");
    command.arg0("vineyard-fs").arg("mount").arg(spawn.path).arg("--foreground");
    command.arg("--socket").arg(spawn.socket).arg("--holder").arg(spawn.state.holder_socket());
    command.args(["--uid", "0", "--gid", &group.unwrap_or(0).to_string()]);
    command.args(["--dir-mode", &format!("{dir_mode:o}"), "--file-mode", &format!("{file_mode:o}")]);
    command.args(["--format", format.as_str()]);
    let log_format = match spawn.options.log_format {
        LogFormat::Text => "text",
        LogFormat::Json => "json",
    };
    command.args(["--log-format", log_format, "--log-level", &spawn.options.log_level]);
    command.args(&spawn.options.mount_options);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    // SAFETY: only system calls happen between fork and exec. The mounter's threads block signals that a keeper needs.
    unsafe {
        command.pre_exec(|| {
            use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
            Ok(())
        });
    }
    command
}

impl Running {
    /// A mount whose keeper outlived a mounter.
    ///
    /// # Errors
    /// If the list of mounts cannot be read.
    pub fn find(path: &Path) -> Result<Option<Self>> {
        let Some(mount) = mountinfo::at(path)?.filter(target::is_ours) else { return Ok(None) };
        let keeper = Runtime::of(path).keeper().filter(|keeper| keeper.device == Some(mount.device));
        Ok(keeper.map(|keeper| Running { pid: keeper.pid, start: keeper.start, child: None, device: mount.device }))
    }

    /// Whether the keeper runs.
    pub fn lives(&mut self) -> bool {
        match &mut self.child {
            Some(child) => matches!(child.try_wait(), Ok(None)),
            None => start_time(self.pid) == Some(self.start),
        }
    }

    fn signal(&self, signal: Signal) {
        if start_time(self.pid) == Some(self.start)
            && let Ok(pid) = i32::try_from(self.pid)
        {
            kill(Pid::from_raw(pid), signal).ok();
        }
    }

    /// Ends the server, if the keeper names one; the keeper starts another.
    pub fn kill_server(&self, path: &Path) {
        let report = status::ask(&Runtime::of(path).keeper_socket(), Duration::from_millis(500)).unwrap_or_default();
        if let Some(pid) = report.pointer("/server/pid").and_then(Value::as_i64).and_then(|pid| i32::try_from(pid).ok())
            && pid > 1
        {
            kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
        }
    }

    /// Asks the keeper to end.
    pub fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Asks the keeper to end, and waits for that.
    pub fn end(&mut self) {
        self.terminate();
        let until = Instant::now() + END;
        while self.lives() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill();
    }

    /// Ends the keeper at once. Its server ends with it.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        if let Some(child) = &mut self.child {
            // A process that serves a mount holds no file on it, so it does end.
            child.wait().ok();
        }
    }
}
