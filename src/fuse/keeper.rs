//! The keeper process: it mounts, holds what must outlive a server, and starts servers.
//!
//! It reads no data and speaks to no store; all it ever does is short, so one thread and one `poll` suffice.

use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use self::children::{Server, Store};
use self::files::Files;
use self::successor::{Begun, Successor};
use self::upgrade::Pending;
use self::watchdog::{LOOK, Watchdog};
use super::config::MountConfig;
use super::handshake::{Agreed, flag};
use super::journal::Journal;
use super::leftovers::Leftovers;
use super::mount::{self, MountOptions, Mounted};
use super::protocol::{self, Hello, Reply, Request, VERSION};
use super::runtime::{KeeperRecord, Runtime, start_time};
use super::{mountinfo, privileges, status};
use crate::error::{Context, Error, Kind, Result};

pub mod children;
mod duties;
pub mod files;
mod report;
mod successor;
pub mod upgrade;
pub mod watchdog;

/// Pauses before the next start of a server, one after the other; the last one again and again.
const BACK_OFF: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(5),
];
/// A server that served this long starts the pauses from the beginning: it did not die of a request that comes again
/// to each server.
const HEALTHY: Duration = Duration::from_millis(500);
/// Shortest time without a sign of life after which a server is replaced.
const SHORTEST_LIMIT: Duration = Duration::from_secs(2);
/// How long a server may take to end after the mount has gone.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What a keeper tells whoever started it, once.
pub type Report<'a> = &'a mut dyn FnMut(Result<String>);

/// Mounts and keeps, until the mount is gone or a signal ends it. `report` hears once whether the mount works.
///
/// # Errors
/// If it does not; nothing is left behind then.
pub fn run(config: MountConfig, report: Report<'_>) -> Result<()> {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    std::env::set_current_dir("/")?;
    // It holds a descriptor for each memory file.
    privileges::raise_open_files();
    let runtime = Runtime::at(&config.runtime);
    runtime.create()?;
    let signals = signals()?;
    let mut record = KeeperRecord {
        pid: std::process::id(),
        start: start_time(std::process::id()).unwrap_or(0),
        mountpoint: config.mountpoint.clone(),
        device: None,
    };
    runtime.write_record(&record)?;
    let started = start(config, &runtime, &mut record);
    let result = match started {
        Ok(mut keeper) => {
            let result = keeper.run(&signals, report);
            keeper.finish();
            result
        }
        Err(error) => Err(error),
    };
    runtime.remove();
    result
}

fn start(config: MountConfig, runtime: &Runtime, record: &mut KeeperRecord) -> Result<Keeper> {
    let mut store = Store::start(config.launch.as_ref(), &config.socket)?;
    match mount_all(config, runtime, record) {
        Ok(keeper) => Ok(Keeper { store, ..keeper }),
        Err(error) => {
            store.stop();
            Err(error)
        }
    }
}

fn mount_all(config: MountConfig, runtime: &Runtime, record: &mut KeeperRecord) -> Result<Keeper> {
    let answers = listen(&runtime.keeper_socket())?;
    let status = listen(&runtime.status_socket())?;
    let commands = listen(&runtime.command_socket())?;
    let metrics = match config.metrics {
        Some(address) => Some(TcpListener::bind(address).context(|| format!("cannot serve counters at {address}"))?),
        None => None,
    };
    let journal = Journal::create()?;
    let limit = Duration::from_millis(config.deadline_ms).max(SHORTEST_LIMIT);
    let watchdog = Watchdog::new(Journal::open(journal.try_clone()?)?, limit);
    let mut files = Files::new(&config);
    let Begun { mounted, agreed, successor, resumed } = successor::begin(&config, runtime, record, &mut files)?;
    let no_passthrough = match agreed.flags & flag::PASSTHROUGH {
        0 => Some(format!("this kernel (FUSE 7.{}) has no passthrough; Linux 6.9 has", agreed.minor)),
        _ => files.probe(&mounted.fuse).err().map(|error| error.to_string()),
    };
    let leftovers = match Leftovers::open(&config.socket, true) {
        Ok(leftovers) if !config.read_only => Some(leftovers),
        Ok(_) => None,
        Err(error) => {
            tracing::warn!("there is no journal: what a killed server leaves in the store stays there: {error}");
            None
        }
    };
    Ok(Keeper {
        config,
        agreed,
        no_passthrough,
        mounted,
        files,
        leftovers,
        store: Store::default(),
        answers,
        status,
        commands,
        metrics,
        journal,
        watchdog,
        program: None,
        upgrade: None,
        down_since: None,
        last_end: None,
        replacing: false,
        remounts: 0,
        record: record.clone(),
        server: None,
        next_start: Some(Instant::now()),
        failures: 0,
        // A server that is not the mount's first one adopts what is there.
        starts: u64::from(resumed),
        first_epoch: if resumed { seconds_up() } else { 0 },
        successor,
        handed_over: false,
        ready: false,
        failed: None,
        ending: None,
        began: Instant::now(),
    })
}

/// Mounts, settles INIT with the kernel, and writes down which mount it is.
/// `replaces` are the devices of dead mounts that may be there.
fn mount_now(
    config: &MountConfig,
    runtime: &Runtime,
    record: &mut KeeperRecord,
    replaces: &[(u32, u32)],
) -> Result<(Mounted, Agreed)> {
    let options = MountOptions {
        mountpoint: &config.mountpoint,
        source: &mount::printable(&config.socket),
        read_only: config.read_only,
        flags: &config.flags,
        allow_other: config.allow_other,
        replaces,
    };
    let mounted = mount::mount(&options)?;
    let prepared = mount::initialise(&mounted.fuse).and_then(|agreed| {
        record.device = Some(mounted.device);
        runtime.write_record(record)?;
        Ok(agreed)
    });
    match prepared {
        Ok(agreed) => {
            mount::raise_readahead(mounted.device);
            Ok((mounted, agreed))
        }
        Err(error) => {
            mount::detach(&config.mountpoint).ok();
            Err(error)
        }
    }
}

fn listen(socket: &std::path::Path) -> Result<UnixListener> {
    // A keeper that was killed leaves its sockets.
    std::fs::remove_file(socket).ok();
    UnixListener::bind(socket).context(|| format!("cannot listen on {socket:?}"))
}

fn signals() -> Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGCHLD, Signal::SIGUSR1] {
        set.add(signal);
    }
    set.thread_block()?;
    // SAFETY: ignoring a signal installs no code. A closed terminal or pipe must not end the mount, and neither must
    // SIGIO, by which the kernel asks for a lease back (see `Files::is_used`).
    unsafe {
        nix::sys::signal::signal(Signal::SIGHUP, nix::sys::signal::SigHandler::SigIgn)?;
        nix::sys::signal::signal(Signal::SIGPIPE, nix::sys::signal::SigHandler::SigIgn)?;
        nix::sys::signal::signal(Signal::SIGIO, nix::sys::signal::SigHandler::SigIgn)?;
    }
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

struct Keeper {
    config: MountConfig,
    agreed: Agreed,
    no_passthrough: Option<String>,
    mounted: Mounted,
    files: Files,
    leftovers: Option<Leftovers>,
    store: Store,
    answers: UnixListener,
    status: UnixListener,
    commands: UnixListener,
    metrics: Option<TcpListener>,
    journal: OwnedFd,
    watchdog: Watchdog,
    /// What servers run; `None` for this very program.
    program: Option<OwnedFd>,
    upgrade: Option<Pending>,
    /// Since when no server answers.
    down_since: Option<Instant>,
    /// How the last server ended, and why it was ended if it was.
    last_end: Option<String>,
    /// The keeper itself ends the server, for the reason in `last_end`.
    replacing: bool,
    /// How often the connection had to be given up.
    remounts: u64,
    record: KeeperRecord,
    server: Option<Server>,
    /// When to start the next server, if none runs.
    next_start: Option<Instant>,
    /// Servers that died soon after their start, in a row.
    failures: usize,
    starts: u64,
    /// Epoch of the first server. A keeper that goes on with a mount does not know how many servers it had: there was less
    /// than one a second.
    first_epoch: u64,
    /// Who holds a copy of the connection.
    successor: Option<Successor>,
    /// The mount is the holder's now, and must stay.
    handed_over: bool,
    /// Some server has been serving.
    ready: bool,
    /// Why the first server could not.
    failed: Option<String>,
    /// Since when the mount is going away.
    ending: Option<Instant>,
    began: Instant,
}

/// What woke the loop.
#[derive(Default)]
struct Woken {
    signal: bool,
    disconnected: bool,
    holder: bool,
    request: bool,
    question: bool,
    order: bool,
}

impl Keeper {
    fn run(&mut self, signals: &SignalFd, report: Report<'_>) -> Result<()> {
        let mut told = false;
        loop {
            self.start_server();
            self.watch();
            let woken = self.wait(signals)?;
            if woken.question
                && let Ok((connection, _)) = self.answers.accept()
            {
                status::answer(connection, &self.report());
            }
            if woken.order {
                self.take_order();
            }
            if woken.request {
                self.answer_server();
            }
            self.follow_holder(woken.holder)?;
            if woken.signal {
                while let Some(signal) = signals.read_signal()? {
                    match i32::try_from(signal.ssi_signo).map(Signal::try_from) {
                        Ok(Ok(Signal::SIGCHLD)) => {}
                        Ok(Ok(Signal::SIGUSR1)) => self.dump(),
                        _ if self.hand_over() => return Ok(()),
                        _ => self.end("a signal"),
                    }
                }
                self.reap();
            }
            if woken.disconnected {
                self.end("the mount is gone");
            }
            if self.ready && !told {
                told = true;
                report(Ok(self.summary()));
            }
            if !self.ready
                && let Some(message) = self.failed.take()
            {
                return Err(Error::new(Kind::Unavailable, message));
            }
            match self.ending {
                Some(_) if self.server.is_none() => break,
                Some(since) if since.elapsed() > LAST_WORDS => {
                    tracing::warn!("the server does not end; files are still open");
                    break;
                }
                _ => {}
            }
        }
        if told { Ok(()) } else { Err(Error::new(Kind::Unavailable, "unmounted before the first answer")) }
    }

    /// Waits for something to do, at most until the next deadline.
    fn wait(&self, signals: &SignalFd) -> Result<Woken> {
        let mut longest = Some(LOOK);
        if let (Some(next), None) = (self.next_start, self.ending) {
            longest = Some(next.saturating_duration_since(Instant::now()).min(LOOK));
        }
        if let (Some(due), None) = (self.successor.as_ref().and_then(Successor::due), self.ending) {
            let left = due.saturating_duration_since(Instant::now());
            longest = Some(longest.map_or(left, |longest: Duration| longest.min(left)));
        }
        if let Some(since) = self.ending {
            longest = Some((since + LAST_WORDS).saturating_duration_since(Instant::now()));
        }
        // Rounded up, or the loop would spin through the last millisecond.
        let timeout = longest
            .map_or(PollTimeout::NONE, |time| PollTimeout::try_from(time.as_millis() + 1).unwrap_or(PollTimeout::MAX));
        let control = self.server.as_ref().and_then(|server| server.control.as_ref()).map(AsFd::as_fd);
        // No event is asked of the connection: an error is told in any case, when the mount has gone.
        let fuse = self.ending.is_none().then(|| self.mounted.fuse.as_fd());
        let holder = self.successor.as_ref().and_then(Successor::socket);
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        fds.push(PollFd::new(self.answers.as_fd(), PollFlags::POLLIN));
        fds.push(PollFd::new(self.commands.as_fd(), PollFlags::POLLIN));
        fds.extend(control.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        fds.extend(fuse.map(|fd| PollFd::new(fd, PollFlags::empty())));
        fds.extend(holder.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Woken::default()),
            Err(errno) => return Err(errno).context(|| "poll".into()),
        }
        let mut woken = fds.iter().map(|fd| fd.any().unwrap_or(false));
        Ok(Woken {
            signal: woken.next().unwrap_or(false),
            question: woken.next().unwrap_or(false),
            order: woken.next().unwrap_or(false),
            request: control.is_some() && woken.next().unwrap_or(false),
            disconnected: fuse.is_some() && woken.next().unwrap_or(false),
            holder: holder.is_some() && woken.next().unwrap_or(false),
        })
    }

    fn start_server(&mut self) {
        let due = self.next_start.is_some_and(|at| at <= Instant::now());
        if self.server.is_some() || self.ending.is_some() || !due {
            return;
        }
        self.next_start = None;
        self.watchdog.start_over();
        let program = self.program.as_ref().map(AsFd::as_fd);
        match Server::start(program, self.mounted.fuse.as_fd(), self.status.as_fd()) {
            Ok(server) => {
                tracing::debug!("server {} started", server.pid());
                self.starts += 1;
                self.server = Some(server);
            }
            Err(error) => {
                tracing::error!("no server: {error}");
                if self.starts == 0 {
                    self.failed = Some(error.to_string());
                }
                self.next_start = Some(Instant::now() + self.pause());
            }
        }
    }

    /// The pause that is due, and a longer one for the next time.
    fn pause(&mut self) -> Duration {
        let pause = BACK_OFF.get(self.failures).or(BACK_OFF.last()).copied().unwrap_or_default();
        self.failures += 1;
        pause
    }

    /// Looks which children have ended.
    fn reap(&mut self) {
        self.store.reap();
        let Some(server) = &mut self.server else { return };
        let Some(exit) = server.ended() else { return };
        let (pid, lived) = (server.pid(), server.lived());
        // What the server said last may still lie in the socket.
        while self.server.is_some() && self.answer_server() {}
        self.server = None;
        if self.ending.is_some() {
            return;
        }
        tracing::warn!("server {pid} ended after {lived:?}: {exit}");
        self.down_since.get_or_insert_with(Instant::now);
        self.last_end = Some(match self.last_end.take().filter(|_| self.replacing) {
            Some(why) => why,
            None => exit.clone(),
        });
        self.fail_upgrade(&format!("the new server ended: {exit}"));
        let wanted = std::mem::take(&mut self.replacing);
        if !self.ready {
            self.failed.get_or_insert(format!("the server ended at its start: {exit}"));
        }
        if lived > HEALTHY {
            self.failures = 0;
        }
        let pause = if wanted { Duration::ZERO } else { self.pause() };
        self.next_start = Some(Instant::now() + pause);
    }

    /// Takes the mount out of the tree, once; a second call ends the server as well.
    fn end(&mut self, why: &str) {
        if self.ending.is_some() {
            if let Some(server) = &mut self.server {
                server.signal_kill();
            }
            return;
        }
        tracing::info!("unmounting: {why}");
        self.ending = Some(Instant::now());
        self.detach();
    }

    /// Detaches the mount, if it is still this one that is mounted there, and still this keeper's.
    fn detach(&self) {
        if self.handed_over {
            return;
        }
        match mountinfo::at(&self.config.mountpoint) {
            Ok(Some(found)) if found.device == self.mounted.device => {
                if let Err(error) = mount::detach(&self.config.mountpoint) {
                    tracing::warn!("{error}");
                }
            }
            Ok(_) => {}
            Err(error) => tracing::warn!("{error}"),
        }
    }

    /// Stops everything that was started.
    fn finish(&mut self) {
        self.detach();
        if let Some(mut server) = self.server.take() {
            server.kill();
        }
        if let Some(leftovers) = self.leftovers.as_ref().filter(|_| !self.handed_over) {
            leftovers.end(self.config.launch.is_some());
        }
        self.store.stop();
    }

    /// Answers one request of the server; false if there was none.
    fn answer_server(&mut self) -> bool {
        let Some(control) = self.server.as_ref().and_then(|server| server.control.as_ref()) else { return false };
        // Also called after the server's death, to read its last words: must not wait then.
        let mut ready = [PollFd::new(control.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut ready, PollTimeout::ZERO), Ok(n) if n > 0) {
            return false;
        }
        let received = protocol::receive::<(u64, Request)>(control.as_fd());
        let (number, request) = match received {
            Ok(Some((request, _))) => request,
            other => {
                if let (Err(error), Some(server)) = (&other, &mut self.server) {
                    tracing::error!("the server is not to be understood: {error}");
                    server.signal_kill();
                }
                // It is ending; the signal of its end brings the loop on.
                if let Some(server) = &mut self.server {
                    server.control = None;
                }
                return false;
            }
        };
        let (reply, fd) = self.handle(request);
        if let Some(control) = self.server.as_ref().and_then(|server| server.control.as_ref())
            && let Err(error) = protocol::send(control.as_fd(), &(number, reply), fd.as_ref().map(AsFd::as_fd), false)
        {
            tracing::debug!("the server did not take an answer: {error}");
        }
        true
    }

    fn handle(&mut self, request: Request) -> (Reply, Option<OwnedFd>) {
        let answer = match request {
            Request::Hello => Ok((Reply::Hello(Box::new(self.hello())), None)),
            Request::Ready => {
                self.is_ready();
                Ok((Reply::Done, None))
            }
            Request::Failed { message } => {
                self.fail_upgrade(&message);
                self.failed = Some(message);
                Ok((Reply::Done, None))
            }
            Request::Files { after } => Ok((Reply::Files { files: self.files.list(after) }, None)),
            Request::File { key } => self.files.get(key).map(|(kept, fd)| (Reply::File(kept), Some(fd))),
            Request::Memory { size } => self.files.memory(size).map(|fd| (Reply::Descriptor, Some(fd))),
            Request::CreateFile { area, size } => {
                let fuse = self.no_passthrough.is_none().then(|| self.mounted.fuse.as_fd());
                self.files.create(area, size, fuse).map(|(kept, fd)| (Reply::File(kept), Some(fd)))
            }
            Request::TagFile { key, tag } => self.files.tag(key, tag).map(|()| (Reply::Done, None)),
            Request::IsUsed { key } => self.files.is_used(key).map(|used| (Reply::Used { used }, None)),
            Request::ReleaseFile { key } => {
                self.files.release(key, self.mounted.fuse.as_fd());
                Ok((Reply::Done, None))
            }
            Request::Leftovers => match &self.leftovers {
                Some(leftovers) => leftovers.share().map(|file| (Reply::Descriptor, Some(file.into()))),
                None => Ok((Reply::Descriptor, None)),
            },
            Request::Connect => children::connect(&self.config.socket).map(|fd| (Reply::Descriptor, Some(fd))),
            Request::Journal => self.journal.try_clone().map(|fd| (Reply::Descriptor, Some(fd))).map_err(Error::from),
            Request::Metrics => {
                let listener = self.metrics.as_ref().map(TcpListener::try_clone).transpose();
                listener.map(|socket| (Reply::Descriptor, socket.map(OwnedFd::from))).map_err(Error::from)
            }
            Request::PutState { key, value } => self.files.put_state(key, value).map(|()| (Reply::Done, None)),
            Request::States { after } => Ok((Reply::States { entries: self.files.states(&after) }, None)),
        };
        answer.unwrap_or_else(|error| (Reply::Error { errno: error.errno(), message: error.to_string() }, None))
    }

    fn hello(&self) -> Hello {
        Hello {
            version: VERSION,
            config: self.config.clone(),
            minor: self.agreed.minor,
            flags: self.agreed.flags,
            no_passthrough: self.no_passthrough.clone(),
            restarts: self.starts.saturating_sub(1),
            epoch: self.first_epoch.saturating_add(self.starts.saturating_sub(1)),
            keeper_pid: std::process::id(),
            tells_use: true,
        }
    }
}

/// Time since the machine was started, which never jumps.
fn seconds_up() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(1, |time| u64::try_from(time.tv_sec()).unwrap_or(1))
}
