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
use std::time::{Duration, Instant};

use fuser::{Session, SessionACL};
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::sys::time::TimeVal;
use serde_json::{Value, json};

use super::adapter::{Adapter, Shared};
use super::handshake::{self, Agreed};
use super::host::{KeeperHost, KeeperLink, forward};
use super::keeper::watchdog::BEAT;
use super::protocol::{Hello, Request, VERSION};
use super::sandbox::{self, Sandbox};
use super::stats::Stats;
use super::workers::Workers;
use super::{metrics, privileges, status};
use crate::error::{Context, Error, Kind, Result};
use crate::fs::naming::{self, lock_of};
use crate::fs::{FileSystem, Host, Options};
use crate::vineyard::journal::Journal;
use crate::vineyard::{Client, ClientOptions, MemoryMaker, RemoteOptions, RemotePolicy};

/// Longest wait for an answer of the keeper, which does nothing slow.
const KEEPER_DEADLINE: i64 = 10;
/// How long `status` waits for what the filesystem itself counts; only a lock can hold that up.
const OWN_PATIENCE: Duration = Duration::from_millis(250);
/// How long `status` waits for what the store says.
const STORE_PATIENCE: Duration = Duration::from_millis(500);
/// How often what nobody came for is let go of.
const HOUSEKEEPING: Duration = Duration::from_secs(5);
/// How often it is looked whether mappings that outlived their descriptors have ended.
const MAPPINGS: Duration = Duration::from_millis(250);
/// How often it is looked whether memory should be made ready for the next image.
const SPARE: Duration = Duration::from_secs(1);

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
    if hello.version != VERSION {
        let message = format!(
            "its keeper speaks version {} and this program {VERSION}: unmount and mount again to change programs",
            hello.version
        );
        return Err(Error::new(Kind::Unsupported, message));
    }
    crate::telemetry::init(hello.config.log_format, &hello.config.log_level);
    let fuse = take(inherited.fuse)?;
    let listener = UnixListener::from(take(inherited.status)?);
    // Found out while the limits of the process's group can be read.
    let loops = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 4));
    crate::cgroup::watch();
    let mut journal = link.journal()?;
    let unanswered = journal.begin();
    let journal = Arc::new(journal);
    journal.beat();
    // Where the lock on names is, as long as it can be opened.
    let names = lock_of(&hello.config.socket);
    let sandbox = prepare_process(&hello)?;
    let beating = journal.clone();
    thread("heartbeat", move || {
        loop {
            beating.beat();
            std::thread::sleep(BEAT);
        }
    })?;

    release_unknown_files(link)?;
    let (host, invalidations) = KeeperHost::new(link.clone(), &hello);
    let fs = Arc::new(open_filesystem(&hello, link, Arc::new(host), names)?);
    let shared = Arc::new(Shared {
        fs,
        stats: Stats::default(),
        journal,
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
    let fs = shared.fs.clone();
    thread("housekeeping", move || keep_house(&fs))?;
    let fs = shared.fs.clone();
    thread("deletions", move || fs.attend_nameless())?;
    let fs = shared.fs.clone();
    every("spare memory", SPARE, move || fs.keep_spare())?;
    let fs = shared.fs.clone();
    every("mappings", MAPPINGS, move || fs.end_mappings())?;
    if hello.config.migrate == RemotePolicy::Full {
        let fs = shared.fs.clone();
        thread("copies", move || fs.copy_wishes())?;
    }
    let fs = shared.fs.clone();
    let reporter = Arc::new(Reporter {
        shared,
        restarts: hello.restarts,
        sandbox,
        asking_filesystem: Arc::default(),
        asking_store: Arc::default(),
    });
    let dumping = reporter.clone();
    thread("state dump", move || dump_on_signal(&dumping))?;
    if let Some(listener) = link.metrics()? {
        let counting = reporter.clone();
        thread("metrics", move || metrics::serve(&listener, || counting.metrics()))?;
    }
    thread("status", move || status::serve(&listener, || reporter.report()))?;

    link.tell(&Request::Ready)?;
    if let Err(errno) = nix::unistd::write(&fuse, &handshake::RESEND) {
        // Before Linux 6.9. At a first start nothing is lost by it.
        tracing::info!("the kernel repeats no requests: {}", errno.desc());
        refuse_unanswered(&fuse, &unanswered);
    }
    drop(fuse);
    let ran = session.run();
    fs.leave_mappings();
    ran.context(|| "the connection to the kernel".into())?;
    if let Err(error) = fs.delete_nameless() {
        tracing::warn!("objects without a name are left over: {error}");
    }
    Ok(())
}

/// Removes what a former server, or a request that failed, left over in the store, and what readers did not come for.
fn keep_house(fs: &FileSystem) {
    // What the former server had sent is carried out by then.
    let mut pause = Duration::from_millis(500);
    loop {
        std::thread::sleep(pause);
        fs.end_old_redirects();
        match fs.reclaim() {
            Ok(_) => pause = HOUSEKEEPING,
            Err(error) => {
                tracing::info!("what is left over in the store is looked through later: {error}");
                // A store that was stuck carries out what it was asked for as soon as it goes on, and is best looked at
                // right then.
                let longest = if fs.has_unanswered() { HOUSEKEEPING } else { Duration::from_secs(60) };
                pause = (pause * 2).min(longest);
            }
        }
    }
}

/// Answers EIO to what the last server had read and not answered, on a kernel that does not send it again: whoever waits
/// for it would wait for ever. The descriptor, not the process, owns a request, so any server may answer it.
fn refuse_unanswered(fuse: &OwnedFd, unanswered: &[u64]) {
    for id in unanswered {
        let mut reply = [0; 16];
        let (length, rest) = reply.split_at_mut(4);
        length.copy_from_slice(&16u32.to_ne_bytes());
        let (error, unique) = rest.split_at_mut(4);
        error.copy_from_slice(&(-libc::EIO).to_ne_bytes());
        unique.copy_from_slice(&id.to_ne_bytes());
        match nix::unistd::write(fuse, &reply) {
            Ok(_) => tracing::warn!(id, "a request was lost with the last server"),
            // It had been answered after all.
            Err(errno) => tracing::debug!(id, "{}", errno.desc()),
        }
    }
}

/// Writes the state into the log whenever SIGUSR1 comes. All threads have it blocked.
fn dump_on_signal(reporter: &Reporter) {
    let wanted = state_signal();
    while wanted.wait().is_ok() {
        tracing::info!(state = %reporter.report(), "state, asked for by SIGUSR1");
    }
}

fn state_signal() -> SigSet {
    let mut set = SigSet::empty();
    set.add(Signal::SIGUSR1);
    set
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

/// Makes this process end with its keeper, deaf to the terminal, without privileges, and locked in.
fn prepare_process(hello: &Hello) -> Result<Sandbox> {
    state_signal().thread_block()?;
    for ignored in [Signal::SIGINT, Signal::SIGHUP, Signal::SIGPIPE] {
        // SAFETY: ignoring a signal installs no code.
        unsafe { signal(ignored, SigHandler::SigIgn) }?;
    }
    privileges::raise_open_files();
    privileges::drop_all()?;
    privileges::end_with_parent(hello.keeper_pid)?;
    let sandbox = sandbox::enter();
    for missing in &sandbox.missing {
        tracing::warn!("the server is not locked in as it should be: {missing}");
    }
    Ok(sandbox)
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(work).context(|| format!("no thread for {name}"))?;
    Ok(())
}

/// A thread that does something after each pause, for as long as the process lives.
fn every(name: &str, pause: Duration, work: impl Fn() + Send + 'static) -> Result<()> {
    thread(name, move || {
        loop {
            std::thread::sleep(pause);
            work();
        }
    })
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

/// The filesystem over the store that the keeper connects to.
fn open_filesystem(
    hello: &Hello,
    link: &Arc<KeeperLink>,
    host: Arc<dyn Host>,
    names: Option<naming::Folder>,
) -> Result<FileSystem> {
    let config = &hello.config;
    let link = link.clone();
    let leftovers = match link.leftovers().and_then(|file| file.map(Journal::open).transpose()) {
        Ok(leftovers) => leftovers,
        Err(error) => {
            tracing::warn!("what this server leaves in the store if it is killed stays there: {error}");
            None
        }
    };
    let maker = link.clone();
    let memory: MemoryMaker = Arc::new(move |size| maker.memory(size));
    let remote = RemoteOptions {
        policy: config.migrate,
        cache_size: config.cache_size,
        memory: Some(memory),
        ..RemoteOptions::default()
    };
    let options = ClientOptions::connector(Box::new(move |_deadline| link.connect()))
        .deadline(Duration::from_millis(config.deadline_ms))
        .remote(remote)
        .journal(leftovers);
    // A later server must come up while vineyardd is away: its answers are errors then, and the mount lives.
    let client = match hello.restarts {
        0 => Client::connect(options)?,
        _ => Client::new(options)?,
    };
    let options = Options { epoch: hello.epoch, ..config.filesystem() };
    let fs = FileSystem::new(Arc::new(client), host, options).locked_by(names);
    fs.adopt();
    Ok(fs)
}

/// What `status` asks for. Locks of the filesystem may be held by whoever waits for the store, and one part asks the store
/// itself, so each has a thread and a time limit of its own.
struct Reporter {
    shared: Arc<Shared>,
    restarts: u64,
    sandbox: Sandbox,
    /// A thread asks the filesystem at this moment.
    asking_filesystem: Arc<AtomicBool>,
    /// A thread asks the store at this moment.
    asking_store: Arc<AtomicBool>,
}

impl Reporter {
    fn report(&self) -> Value {
        let mut report = json!({
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "restarts": self.restarts,
            "waiting": self.shared.workers.waiting(),
            "sandbox": self.sandbox,
            "fs": self.filesystem(),
        });
        if let (Some(report), Value::Object(stats)) = (report.as_object_mut(), self.shared.stats.report()) {
            report.extend(stats);
        }
        report
    }

    fn metrics(&self) -> String {
        metrics::page(&self.report(), &self.shared.stats)
    }

    /// The filesystem's own counters, and what the store says; `store_error` if it says nothing.
    fn filesystem(&self) -> Value {
        let mut report = self.within(OWN_PATIENCE, &self.asking_filesystem, "the filesystem", FileSystem::status);
        let store = self.within(STORE_PATIENCE, &self.asking_store, "the store", FileSystem::store_status);
        if let Some(report) = report.as_object_mut() {
            report.insert("store_error".into(), store.get("error").cloned().unwrap_or_default());
            report.insert("store".into(), store);
        }
        report
    }

    /// An answer, or an object with `error` if it does not come in time or is still awaited from before.
    fn within(
        &self,
        longest: Duration,
        asking: &Arc<AtomicBool>,
        whom: &str,
        question: fn(&FileSystem) -> Value,
    ) -> Value {
        let until = Instant::now() + longest;
        let silent = || json!({"error": format!("{whom} does not answer")});
        // The page of counters may be asked for at the same moment.
        while asking.swap(true, Ordering::AcqRel) {
            if Instant::now() > until {
                return silent();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let (send, answer) = channel();
        let (shared, done) = (self.shared.clone(), asking.clone());
        let started = thread("status", move || {
            let status = question(&shared.fs);
            done.store(false, Ordering::Release);
            send.send(status).ok();
        });
        if let Err(error) = started {
            asking.store(false, Ordering::Release);
            return json!({"error": error.to_string()});
        }
        answer.recv_timeout(until.saturating_duration_since(Instant::now())).unwrap_or_else(|_| silent())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lost_requests_are_answered_with_an_error() {
        let (read, write) = nix::unistd::pipe().unwrap();
        refuse_unanswered(&write, &[5]);
        let mut reply = [0; 17];
        assert_eq!(nix::unistd::read(&read, &mut reply).unwrap(), 16);
        assert_eq!(reply[..4], 16u32.to_ne_bytes());
        assert_eq!(reply[4..8], (-libc::EIO).to_ne_bytes());
        assert_eq!(reply[8..16], 5u64.to_ne_bytes());
    }
}
