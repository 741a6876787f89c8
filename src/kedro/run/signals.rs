//! Signals while a mount exists for one command: they reach the command, and never end this process, which cleans up.

use crate::error::{Context, Error, Kind, Result};
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicI32, Ordering};

/// The child that signals are passed on to; 0 is none.
static CHILD: AtomicI32 = AtomicI32::new(0);

/// The first signal that came; 0 is none.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let errno = Errno::last_raw();
    // Noted before the child is looked up: `Signals::run` does it the other way round, so that one of both sees it.
    let _ = CAUGHT.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst);
    // SAFETY: with SA_SIGINFO the kernel gives a valid siginfo.
    let from_terminal = unsafe { info.as_ref() }.is_some_and(|info| info.si_code == libc::SI_KERNEL);
    let child = CHILD.load(Ordering::SeqCst);
    // What the terminal sends goes to every process of its foreground group, the child among them.
    if child > 0 && !from_terminal {
        // SAFETY: kill(2) is async-signal-safe and takes no pointers.
        unsafe { libc::kill(child, signal) };
    }
    Errno::set_raw(errno);
}

/// As long as this lives, SIGINT, SIGTERM, SIGHUP and SIGQUIT go to the child if there is one, and are noted.
pub struct Signals {
    old: Vec<(Signal, SigAction)>,
}

impl Signals {
    /// Installs the handlers. A signal that is ignored stays so, as `nohup` wants it.
    ///
    /// # Errors
    /// The system's.
    pub fn hold() -> Result<Signals> {
        CAUGHT.store(0, Ordering::SeqCst);
        let action =
            SigAction::new(SigHandler::SigAction(note), SaFlags::SA_RESTART | SaFlags::SA_SIGINFO, SigSet::empty());
        let mut signals = Signals { old: Vec::new() };
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
            // SAFETY: the handler uses atomics and kill(2) only, all async-signal-safe.
            let old = unsafe { sigaction(signal, &action) }?;
            signals.old.push((signal, old));
            if matches!(old.handler(), SigHandler::SigIgn) {
                // SAFETY: the action is the one that was installed before.
                unsafe { sigaction(signal, &old) }?;
            }
        }
        Ok(signals)
    }

    /// The first signal that came.
    fn caught(&self) -> Option<Signal> {
        Signal::try_from(CAUGHT.load(Ordering::SeqCst)).ok()
    }

    /// For places between two children: whether to go on.
    ///
    /// # Errors
    /// If a signal has come.
    pub fn check(&self) -> Result<()> {
        match self.caught() {
            Some(signal) => Err(Error::new(Kind::Os(libc::EINTR), format!("ended by {signal}"))),
            None => Ok(()),
        }
    }

    /// Until the guard is dropped, signals go to this child, which somebody else waits for.
    pub fn pass_to(&self, child: u32) -> Passing {
        let child = i32::try_from(child).unwrap_or(0);
        CHILD.store(child, Ordering::SeqCst);
        if let Some(signal) = self.caught().filter(|_| child > 0) {
            let _ = kill(Pid::from_raw(child), signal);
        }
        Passing
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if it does not start; if a signal came before that.
    pub fn run(&self, mut command: Command, what: &str) -> Result<ExitStatus> {
        self.check()?;
        let mut child = command
            .spawn()
            .map_err(|error| Error::new(Kind::NotFound, format!("cannot start {what}")).with_source(error))?;
        let passing = self.pass_to(child.id());
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or(0));
        // The number stays the child's until nobody sends signals to it any more.
        while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(Errno::EINTR) {}
        drop(passing);
        child.wait().context(|| format!("cannot wait for {what}"))
    }

    /// The exit code of all: what went wrong after a signal is its consequence, and the signal is the code.
    ///
    /// # Errors
    /// The given one, if no signal came.
    pub fn code(&self, result: Result<i32>) -> Result<i32> {
        match (result, self.caught()) {
            (Err(_), Some(signal)) => Ok(128 + signal as i32),
            (result, _) => result,
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (signal, action) in &self.old {
            // SAFETY: the action is the one that was installed before.
            let _ = unsafe { sigaction(*signal, action) };
        }
    }
}

/// See [`Signals::pass_to`].
pub struct Passing;

impl Drop for Passing {
    fn drop(&mut self) {
        CHILD.store(0, Ordering::SeqCst);
    }
}
