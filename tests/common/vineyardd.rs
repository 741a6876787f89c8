//! A private real vineyardd for a test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tempfile::TempDir;
use vineyard_fs::vineyard::{Client, ClientOptions};

/// The binary: `$VINEYARDD`, else the one in the Python environment `$VIRTUAL_ENV` or `.venv` of the project.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("VINEYARDD") {
        return path.into();
    }
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv");
    let environments = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from).into_iter().chain([own]);
    for environment in environments {
        for version in std::fs::read_dir(environment.join("lib")).into_iter().flatten().flatten() {
            let path = version.path().join("site-packages/vineyard/bdist/vineyardd");
            if path.is_file() {
                return path;
            }
        }
    }
    panic!("no vineyardd: set VINEYARDD, or VIRTUAL_ENV to an environment with vineyard-bdist, or run scripts/setup");
}

/// The Python environment that the vineyardd is of.
pub fn environment() -> PathBuf {
    binary().ancestors().nth(6).unwrap().to_owned()
}

/// Stops a child process; returns when none of its threads runs any more.
pub fn freeze(child: &Child) {
    let pid = Pid::from_raw(child.id() as i32);
    kill(pid, Signal::SIGSTOP).unwrap();
    let status = waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
    assert_eq!(status, WaitStatus::Stopped(pid, Signal::SIGSTOP));
}

/// A running vineyardd with local metadata, without TCP; killed when dropped.
pub struct Vineyardd {
    folder: TempDir,
    size: String,
    child: Child,
}

impl Vineyardd {
    /// Starts one with `size` of memory (such as `64Mi`) and waits until it answers.
    pub fn start(size: &str) -> Self {
        let folder = TempDir::with_prefix("vineyardd-").unwrap();
        let child = Self::spawn(&folder.path().join("v.sock"), size);
        let server = Vineyardd { folder, size: size.into(), child };
        server.wait_ready();
        server
    }

    fn spawn(socket: &Path, size: &str) -> Child {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(socket.with_extension("log")).unwrap();
        Command::new(binary())
            .args(["--meta", "local", "--rpc=false", "--size", size, "--socket"])
            .arg(socket)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    fn wait_ready(&self) {
        let start = Instant::now();
        while self.client(Duration::from_secs(2)).is_err() {
            if start.elapsed() > Duration::from_secs(60) {
                panic!(
                    "vineyardd does not start: {}",
                    std::fs::read_to_string(self.socket().with_extension("log")).unwrap()
                );
            }
        }
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("v.sock")
    }

    /// A new client with this deadline.
    pub fn client(&self, deadline: Duration) -> vineyard_fs::Result<Client> {
        Client::connect(ClientOptions::socket(self.socket()).deadline(deadline))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops it with all its threads.
    pub fn freeze(&self) {
        freeze(&self.child);
    }

    /// Lets it run again.
    pub fn thaw(&self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGCONT).unwrap();
    }

    /// Kills it.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again after [`Vineyardd::kill`], empty, without waiting.
    pub fn start_again(&mut self) {
        self.child = Self::spawn(&self.socket(), &self.size);
    }
}

impl Drop for Vineyardd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
