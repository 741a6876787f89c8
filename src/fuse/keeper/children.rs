//! The processes that a keeper starts: servers, and a private vineyardd.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket, socketpair};
use nix::unistd::Pid;

use crate::error::{Context, Error, Kind, Result};
use crate::fuse::config::Launch;
use crate::fuse::mount::keep_open;
use crate::vineyard::launch::surround;

/// How long a vineyardd may take to listen.
const STORE_START: Duration = Duration::from_secs(30);
/// How long a vineyardd may take to end.
const STORE_END: Duration = Duration::from_secs(5);

/// Where a process says how much rather than others it may be killed when memory is out (`proc(5)`).
const OOM_ADJUST: &str = "oom_score_adj";

/// A running server.
pub struct Server {
    child: Child,
    started: Instant,
    /// It answers requests.
    pub ready: bool,
    /// The keeper's end of the control socket, until the server closes the other.
    pub control: Option<OwnedFd>,
}

impl Server {
    /// Starts a server: this program again, or another one, with the connection, a control socket and the status socket.
    ///
    /// # Errors
    /// If no process can be made.
    pub fn start(program: Option<BorrowedFd<'_>>, fuse: BorrowedFd<'_>, status: BorrowedFd<'_>) -> Result<Self> {
        let (control, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let inherited = [fuse.as_raw_fd(), theirs.as_raw_fd(), status.as_raw_fd()];
        let program = program.map_or("/proc/self/exe".into(), |fd| format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let mut command = Command::new(program);
        command.arg0("vineyard-fs").arg("server").args(inherited.map(|fd| fd.to_string()));
        command.stdin(Stdio::null()).process_group(0);
        // SAFETY: see `in_child`.
        unsafe {
            command.pre_exec(move || {
                offer_to_oom_killer();
                in_child(&inherited, None)
            })
        };
        let child = command.spawn().context(|| "cannot start a server".into())?;
        Ok(Server { child, started: Instant::now(), ready: false, control: Some(control) })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How long it has been running.
    pub fn lived(&self) -> Duration {
        self.started.elapsed()
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<String> {
        match self.child.try_wait() {
            Ok(None) => None,
            Ok(Some(status)) => Some(status.to_string()),
            Err(error) => Some(error.to_string()),
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.pid()) {
            // Fails only if it has ended already.
            kill(Pid::from_raw(pid), signal).ok();
        }
    }

    /// It is large enough now to be found before the keeper where memory is out, and no more likely than others.
    pub fn grown(&self) {
        let adjust = std::fs::read_to_string(format!("/proc/self/{OOM_ADJUST}"))
            .and_then(|own| std::fs::write(format!("/proc/{}/{OOM_ADJUST}", self.pid()), own));
        if let Err(error) = adjust {
            tracing::info!("server {} stays the first to be killed where memory is out: {error}", self.pid());
        }
    }

    /// Ends it at once; [`Server::ended`] tells when that is done.
    pub fn signal_kill(&mut self) {
        // Fails only if it has ended already.
        self.child.kill().ok();
    }

    /// Ends it at once, and waits for that.
    pub fn kill(&mut self) {
        // Both fail only if it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Between fork and exec: lets descriptors through, unblocks signals, and asks for a signal when the keeper ends.
/// Only system calls happen here, which is what is allowed at this place.
fn in_child(inherited: &[RawFd], with_keeper: Option<Signal>) -> std::io::Result<()> {
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    for &fd in inherited {
        keep_open(fd)?;
    }
    if let Some(signal) = with_keeper {
        // SAFETY: takes numbers only.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong, 0, 0, 0) };
    }
    Ok(())
}

/// Makes this process the first to be killed when memory is out: one that begins is smaller than its keeper, whose end
/// would be the mount's. As [`in_child`].
fn offer_to_oom_killer() {
    use nix::fcntl::{OFlag, open};
    use nix::sys::stat::Mode;
    // Without it the keeper may be chosen, as without this program.
    if let Ok(file) = open(c"/proc/self/oom_score_adj", OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty()) {
        nix::unistd::write(&file, b"1000").ok();
    }
}

/// A vineyardd that lives and ends with the mount, or nothing if the mount uses another.
#[derive(Default)]
pub struct Store {
    child: Option<Child>,
    private: bool,
}

impl Store {
    /// Starts a vineyardd and waits until it listens on `socket`; does nothing without a plan.
    ///
    /// # Errors
    /// If it does not listen in time, with the end of its log.
    pub fn start(launch: Option<&Launch>, socket: &Path) -> Result<Self> {
        let Some(launch) = launch else { return Ok(Store::default()) };
        let log = std::fs::File::options().create(true).append(true).mode(0o600).open(&launch.log);
        let log = log.context(|| format!("cannot write the log {:?}", launch.log))?;
        let mut command = Command::new(&launch.program);
        command.args(&launch.args);
        surround(&mut command);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        // SAFETY: see `in_child`.
        unsafe { command.pre_exec(|| in_child(&[], Some(Signal::SIGTERM))) };
        let child = command.spawn().context(|| format!("cannot start {:?}", launch.program))?;
        let mut store = Store { child: Some(child), private: true };
        match store.wait_until_it_listens(socket) {
            Ok(()) => Ok(store),
            Err(error) => {
                store.stop();
                Err(error).context(|| format!("{:?} did not start; its log: {:?}", launch.program, launch.log))
            }
        }
    }

    fn wait_until_it_listens(&mut self, socket: &Path) -> Result<()> {
        let until = Instant::now() + STORE_START;
        loop {
            if connect(socket).is_ok() {
                return Ok(());
            }
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait()?
            {
                return Err(Error::new(Kind::Unavailable, format!("it ended: {status}")));
            }
            if Instant::now() > until {
                return Err(Error::new(Kind::Timeout, format!("nothing listens on {socket:?} after {STORE_START:?}")));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether the mount brought its own vineyardd.
    pub fn is_private(&self) -> bool {
        self.private
    }

    /// Process id of the private vineyardd, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Notes if it has ended. Its data is gone then, so it is not started again.
    pub fn reap(&mut self) {
        if let Some(child) = &mut self.child
            && let Ok(Some(status)) = child.try_wait()
        {
            tracing::error!("the private vineyardd ended: {status}");
            self.child = None;
        }
    }

    /// Ends it.
    pub fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        if let Ok(pid) = i32::try_from(child.id()) {
            kill(Pid::from_raw(pid), Signal::SIGTERM).ok();
        }
        let until = Instant::now() + STORE_END;
        while Instant::now() < until {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        child.kill().ok();
        child.wait().ok();
    }
}

/// Connects to a Unix socket without ever waiting.
///
/// # Errors
/// `Unavailable` if nobody listens, or too many wait there.
pub fn connect(path: &Path) -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let address = UnixAddr::new(path).context(|| format!("socket path {path:?}"))?;
    match nix::sys::socket::connect(stream.as_raw_fd(), &address) {
        Ok(()) => {}
        Err(errno @ (Errno::ECONNREFUSED | Errno::ENOENT | Errno::EAGAIN)) => {
            let error = std::io::Error::from(errno);
            return Err(Error::new(Kind::Os(errno as i32), format!("no vineyardd at {path:?}")).with_source(error));
        }
        Err(errno) => return Err(errno).context(|| format!("cannot connect to {path:?}")),
    }
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream.set_nonblocking(false)?;
    Ok(stream.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn connections_are_made_at_once_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        assert_eq!(connect(&path).unwrap_err().kind(), Kind::Os(libc::ENOENT));
        let listener = UnixListener::bind(&path).unwrap();
        let mut ours = UnixStream::from(connect(&path).unwrap());
        let (mut theirs, _) = listener.accept().unwrap();
        ours.write_all(b"hello").unwrap();
        let mut text = [0; 5];
        theirs.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
        drop(listener);
        assert_eq!(connect(&path).unwrap_err().kind(), Kind::Os(libc::ECONNREFUSED));
    }

    #[test]
    fn a_store_that_does_not_start_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let launch = Launch { program: "/bin/false".into(), args: Vec::new(), log: folder.path().join("log") };
        let error = Store::start(Some(&launch), &folder.path().join("s")).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("it ended"), "{error}");
        assert!(!Store::start(None, Path::new("/")).unwrap().is_private());
    }
}
