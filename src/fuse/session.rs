//! The server process: the filesystem, and the loops that read the kernel's requests.
//!
//! A first start and a restart are the same: the keeper has settled INIT with the kernel, so the session gets an INIT
//! made from what was agreed, and its descriptor is then replaced by the real one. A final notification makes the
//! kernel repeat what an earlier server read and did not answer.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use fuser::{Session, SessionACL};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::sys::time::TimeVal;
use serde_json::{Value, json};

use super::adapter::{Adapter, Shared};
use super::area::Maker;
use super::handshake::{self, Agreed};
use super::host::{KeeperHost, KeeperLink, forward};
use super::protocol::{Hello, Request};
use super::stats::Stats;
use super::workers::Workers;
use super::{privileges, status};
use crate::error::{Context, Error, Kind, Result};
use crate::fs::{FileSystem, Host};
use crate::vineyard::journal::Keep;
use crate::vineyard::{Client, ClientOptions, MemoryMaker, RemoteOptions, RemotePolicy};

/// Longest wait for an answer of the keeper, which does nothing slow.
const KEEPER_DEADLINE: i64 = 10;
/// How long `status` waits for what the store says.
const STORE_PATIENCE: Duration = Duration::from_millis(500);

/// Descriptors that a server inherits, by number.
#[derive(Clone, Copy, Debug)]
pub struct Inherited {
    /// The connection to the kernel.
    pub fuse: RawFd,
    /// The connection to the keeper.
    pub control: RawFd,
    /// Where `status` connects.
    pub status: RawFd,
}

/// Runs a server until the mount is gone.
pub fn main(inherited: Inherited) -> ExitCode {
    privileges::take_name();
    let control = match take(inherited.control) {
        Ok(control) => control,
        Err(error) => {
            eprintln!("vineyard-fs: the server is started by `vineyard-fs mount`: {error}");
            return ExitCode::FAILURE;
        }
    };
    let link = Arc::new(KeeperLink::new(control));
    match serve(inherited, &link) {
        Ok(()) => {
            tracing::debug!("the connection has ended");
            // Requests under work have nobody left who waits for them.
            std::process::exit(0)
        }
        Err(error) => {
            tracing::error!("the server ends: {error}");
            link.tell(&Request::Failed { message: error.to_string() }).ok();
            ExitCode::FAILURE
        }
    }
}

/// Takes ownership of an inherited descriptor, which must be open.
fn take(fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: asks for the flags of a number; any number is allowed.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(Error::new(Kind::Invalid, format!("descriptor {fd} is not open")));
    }
    // SAFETY: it is open, and was inherited for this use; this is called once for each.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn serve(inherited: Inherited, link: &Arc<KeeperLink>) -> Result<()> {
    set_keeper_deadline(inherited.control)?;
    let hello = link.hello()?;
    crate::telemetry::init(hello.config.log_format, &hello.config.log_level);
    let fuse = take(inherited.fuse)?;
    let listener = UnixListener::from(take(inherited.status)?);
    // Needs a privilege that is dropped next.
    let memory = Maker::own();
    prepare_process(&hello)?;

    release_unknown_files(link)?;
    let (host, invalidations) = KeeperHost::new(link.clone(), hello.no_passthrough.clone());
    let fs = Arc::new(open_filesystem(&hello, link, Arc::new(host), memory)?);
    let loops = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 4));
    let shared = Arc::new(Shared {
        fs,
        stats: Stats::default(),
        workers: Workers::new(loops, Duration::from_millis(hello.config.deadline_ms)),
        device: fuse.try_clone()?,
    });

    let agreed = Agreed { minor: hello.minor, flags: hello.flags };
    let session = session(Adapter::new(shared.clone(), agreed.flags), &fuse, &agreed, loops)?;
    let notifier = session.notifier();
    thread("invalidations", move || forward(&invalidations, &notifier))?;
    let fs = shared.fs.clone();
    // Types of all names are learned ahead of the first listing; what fails here fails there with its reason.
    thread("warm-up", move || drop(fs.warm_up()))?;
    if hello.config.migrate == RemotePolicy::Full {
        let fs = shared.fs.clone();
        thread("copies", move || fs.copy_wishes())?;
    }
    let reporter = Reporter { shared, restarts: hello.restarts, asking: Arc::default() };
    thread("status", move || status::serve(&listener, || reporter.report()))?;

    link.tell(&Request::Ready)?;
    if let Err(errno) = nix::unistd::write(&fuse, &handshake::RESEND) {
        // Before Linux 6.9. At a first start nothing is lost by it.
        tracing::info!("the kernel repeats no requests: {}", errno.desc());
    }
    drop(fuse);
    session.run().context(|| "the connection to the kernel".into())
}

/// Gives back the memory files of a former server that it left no note on: nobody can know what they are. Open
/// descriptors and mappings of them go on.
fn release_unknown_files(link: &KeeperLink) -> Result<()> {
    for file in link.files()?.iter().filter(|file| file.tag.is_none()) {
        link.tell(&Request::ReleaseFile { key: file.key })?;
    }
    Ok(())
}

fn set_keeper_deadline(control: RawFd) -> Result<()> {
    // SAFETY: `main` owns this descriptor until the process ends.
    let control = unsafe { BorrowedFd::borrow_raw(control) };
    setsockopt(&control, sockopt::ReceiveTimeout, &TimeVal::new(KEEPER_DEADLINE, 0))?;
    Ok(())
}

/// Makes this process end with its keeper, deaf to the terminal, and without privileges.
fn prepare_process(hello: &Hello) -> Result<()> {
    for ignored in [Signal::SIGINT, Signal::SIGHUP, Signal::SIGPIPE] {
        // SAFETY: ignoring a signal installs no code.
        unsafe { signal(ignored, SigHandler::SigIgn) }?;
    }
    if let Ok((_, most)) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE) {
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, most, most).ok();
    }
    privileges::drop_all()?;
    privileges::end_with_parent(hello.keeper_pid)
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(work).context(|| format!("no thread for {name}"))?;
    Ok(())
}

/// A session on `fuse` that believes it has just seen INIT.
fn session(adapter: Adapter, fuse: &OwnedFd, agreed: &Agreed, loops: usize) -> Result<Session<Adapter>> {
    let mut config = fuser::Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(loops);
    // A clone of the descriptor that dies with this process would take the requests read through it along.
    config.clone_fd = false;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    nix::unistd::write(&ours, &handshake::synthetic(agreed))?;
    let session = Session::from_fd(adapter, theirs, SessionACL::All, config).context(|| "starting a session".into())?;
    // The answer to INIT lies in `ours` and ends with it. Nothing else uses the session's descriptor yet.
    // SAFETY: both numbers are open descriptors; the session keeps owning its number, which now means the connection.
    if unsafe { libc::dup3(fuse.as_raw_fd(), session.as_fd().as_raw_fd(), libc::O_CLOEXEC) } == -1 {
        return Err(std::io::Error::last_os_error()).context(|| "swapping the session's descriptor".into());
    }
    Ok(session)
}

/// Key under which the keeper holds the list of what has no name yet.
const UNNAMED: &str = "unnamed";

/// The filesystem over the store that the keeper connects to.
fn open_filesystem(hello: &Hello, link: &Arc<KeeperLink>, host: Arc<dyn Host>, memory: Maker) -> Result<FileSystem> {
    let config = &hello.config;
    let link = link.clone();
    let memory: MemoryMaker = Arc::new(move |size| memory.create(size));
    let remote = RemoteOptions {
        policy: config.migrate,
        cache_size: config.cache_size,
        memory: Some(memory),
        ..RemoteOptions::default()
    };
    let unfinished = link.get_state(UNNAMED)?;
    let notes = link.clone();
    let journal: Keep = Arc::new(move |list: &str| {
        if let Err(error) = notes.put_state(UNNAMED, Some(list)) {
            tracing::debug!("what is being saved is not noted: {error}");
        }
    });
    let mut options = ClientOptions::connector(Box::new(move |_deadline| link.connect()))
        .deadline(Duration::from_millis(config.deadline_ms))
        .remote(remote);
    options.journal = Some(journal);
    // A later server must come up while vineyardd is away: its answers are errors then, and the mount lives.
    let client = match hello.restarts {
        0 => Client::connect(options)?,
        _ => Client::new(options)?,
    };
    let client = Arc::new(client);
    if let Some(list) = unfinished.filter(|list| !list.is_empty()) {
        let client = client.clone();
        thread("reclaim", move || {
            if let Err(error) = client.reclaim(&list) {
                tracing::warn!("what a former server has left unfinished stays in the store: {error}");
            }
        })?;
    }
    let fs = FileSystem::new(client, host, config.filesystem());
    fs.adopt();
    Ok(fs)
}

/// What `status` asks for. The filesystem's part asks the store, so it has a thread and a time limit of its own.
struct Reporter {
    shared: Arc<Shared>,
    restarts: u64,
    /// A thread asks the store at this moment.
    asking: Arc<AtomicBool>,
}

impl Reporter {
    fn report(&self) -> Value {
        let mut report = json!({
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "restarts": self.restarts,
            "waiting": self.shared.workers.waiting(),
            "fs": self.filesystem(),
        });
        if let (Some(report), Value::Object(stats)) = (report.as_object_mut(), self.shared.stats.report()) {
            report.extend(stats);
        }
        report
    }

    fn filesystem(&self) -> Value {
        if self.asking.swap(true, Ordering::AcqRel) {
            return json!({"error": "the store does not answer"});
        }
        let (send, answer) = channel();
        let (shared, asking) = (self.shared.clone(), self.asking.clone());
        let started = thread("status of the store", move || {
            let status = shared.fs.status();
            asking.store(false, Ordering::Release);
            send.send(status).ok();
        });
        if let Err(error) = started {
            self.asking.store(false, Ordering::Release);
            return json!({"error": error.to_string()});
        }
        answer.recv_timeout(STORE_PATIENCE).unwrap_or_else(|_| json!({"error": "the store does not answer"}))
    }
}
