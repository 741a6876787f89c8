//! What the commands that work on a store share: finding it, and telling about what is in it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use clap::ValueHint;
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use serde_json::Value;

use crate::error::{Context, Error, Kind, Result};
use crate::fs::FileSystem;
use crate::fs::copies::HIDDEN;
use crate::fs::naming::lock_of;
use crate::fuse::area::Maker;
use crate::fuse::leftovers::Leftovers;
use crate::fuse::runtime::Runtime;
use crate::fuse::status;
use crate::socket::place;
use crate::vineyard::journal::Journal;
use crate::vineyard::launch::{self, Environment};
use crate::vineyard::{Client, ClientOptions, MemoryMaker, RemoteOptions, Store};

/// How long a vineyardd may take to answer first.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a mount may take to tell its store.
const MOUNT_PATIENCE: Duration = Duration::from_millis(1000);

/// Which store.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Place {
    /// Socket of the vineyardd [default: $VINEYARD_IPC_SOCKET, the store of the running mount, a default socket]
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub socket: Option<PathBuf>,
}

/// What to do where a name is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Conflict {
    /// The new value takes the place of the old one
    #[default]
    Replace,
    /// Nothing changes, and that is an error
    Fail,
    /// Nothing changes, and that is fine
    Skip,
}

/// A store that answers.
pub struct Opened {
    /// The client.
    pub store: Arc<Client>,
    /// Its names and files.
    pub fs: FileSystem,
    /// Its socket.
    socket: PathBuf,
    /// Mounts of this store: mount point, and the name that is its root.
    mounts: Vec<(PathBuf, String)>,
    /// What is left if this process is killed.
    _notes: Option<Notes>,
}

/// The journal of a process that changes a store; without notes it goes when the process ends.
pub struct Notes(Leftovers);

impl Notes {
    /// Those of a client of this store, and the journal for it. None where there is no place for them: it works without.
    fn open(socket: &Path, take_over: bool) -> (Option<Notes>, Option<Journal>) {
        let opened = Leftovers::open(socket, take_over).map(Notes).and_then(|notes| {
            let journal = Journal::open(notes.0.share()?)?;
            Ok((notes, journal))
        });
        match opened {
            Ok((notes, journal)) => (Some(notes), Some(journal)),
            Err(error) => {
                tracing::info!("what is left after a kill will not be known: {error}");
                (None, None)
            }
        }
    }
}

impl Drop for Notes {
    fn drop(&mut self) {
        self.0.end(false);
    }
}

/// A client that changes the store at this socket.
///
/// # Errors
/// If no vineyardd answers.
pub fn connect_to_change(socket: &Path) -> Result<(Client, Option<Notes>)> {
    let (notes, journal) = Notes::open(socket, false);
    let client = Client::connect(ClientOptions::socket(socket).remote(remote()).journal(journal))?;
    Ok((client, notes))
}

impl Place {
    /// Connects to the store.
    ///
    /// # Errors
    /// If none answers, or it is not clear which one is meant; the message says what to do.
    pub fn open(&self) -> Result<Opened> {
        self.open_with(|socket| Ok((Client::connect(ClientOptions::socket(socket).remote(remote()))?, None)))
    }

    /// As [`Place::open`], for a command that changes the store: what it leaves if it is killed is known to others.
    ///
    /// # Errors
    /// As [`Place::open`].
    pub fn open_to_change(&self) -> Result<Opened> {
        self.open_with(connect_to_change)
    }

    fn open_with(&self, connect: impl FnOnce(&Path) -> Result<(Client, Option<Notes>)>) -> Result<Opened> {
        let mounts = mounts();
        let socket = choose(self.socket.as_deref(), &Environment::current(), &mounts)?;
        let (client, notes) = connect(&socket)?;
        let store = Arc::new(client);
        let fs = FileSystem::unmounted(store.clone() as Arc<dyn Store>).locked_by(lock_of(&socket));
        let here = place(&socket);
        let mounts = mounts.into_iter().filter(|mount| place(&mount.socket) == here);
        let mounts = mounts.map(|mount| (mount.mountpoint, mount.prefix)).collect();
        Ok(Opened { store, fs, socket, mounts, _notes: notes })
    }
}

impl Opened {
    /// Removes what commands and servers of this user that were killed on this machine have left in the store. Returns how
    /// many objects and blobs were looked at.
    ///
    /// # Errors
    /// What the store answers.
    pub fn reclaim(&self) -> Result<usize> {
        let (notes, journal) = Notes::open(&self.socket, true);
        let client = Client::connect(ClientOptions::socket(&self.socket).remote(remote()).journal(journal))?;
        let fs = FileSystem::unmounted(Arc::new(client) as Arc<dyn Store>);
        let looked_at = fs.reclaim();
        drop(notes);
        print_warnings(&fs);
        looked_at
    }

    /// At most how many objects and blobs [`Opened::reclaim`] would look at.
    ///
    /// # Errors
    /// If what was noted cannot be read.
    pub fn left_behind(&self) -> Result<usize> {
        let count = |file| {
            let journal = Journal::open(file)?;
            let wished: usize = journal.unanswered().values().map(|wish| wish.sizes.len()).sum();
            Ok(journal.kept().len() + wished)
        };
        Leftovers::of_dead(&self.socket)?.into_iter().map(count).sum()
    }

    /// What a user calls a dataset: a name, a path below the root of a mount, or the whole path of a file on a mount.
    pub fn path<'a>(&self, text: &'a str) -> std::borrow::Cow<'a, str> {
        let below = |(mountpoint, prefix): &(PathBuf, String)| {
            let rest = Path::new(text).strip_prefix(mountpoint).ok()?.to_str()?;
            Some(if prefix.is_empty() { rest.to_owned() } else { format!("{prefix}/{rest}") })
        };
        match self.mounts.iter().filter(|_| text.starts_with('/')).find_map(below) {
            Some(path) => path.into(),
            None => text.into(),
        }
    }

    /// As [`Opened::path`], for a name that is to be given.
    ///
    /// # Errors
    /// `Invalid` for names that listings do not show.
    pub fn new_path(&self, text: &str) -> Result<String> {
        let path = self.path(text).into_owned();
        match Path::new(&path).components().next() == Path::new(HIDDEN).components().next() {
            true => Err(Error::new(Kind::Invalid, format!("names below {HIDDEN} are kept for copies: choose another"))),
            false => Ok(path),
        }
    }

    /// Tells the warnings that came up.
    pub fn warn(&self) {
        print_warnings(&self.fs);
    }
}

fn print_warnings(fs: &FileSystem) {
    for warning in fs.take_warnings() {
        eprintln!("vineyard-fs: warning: {}", printable(&warning));
    }
}

/// How commands treat data of other instances: as mounts do, in memory of their own.
pub fn remote() -> RemoteOptions {
    let maker = std::sync::OnceLock::new();
    let memory: MemoryMaker = Arc::new(move |size| maker.get_or_init(Maker::unlimited).create(size));
    RemoteOptions { memory: Some(memory), ..RemoteOptions::default() }
}

/// A mount and its store.
#[derive(Clone, Debug, PartialEq, Eq)]
struct MountedStore {
    mountpoint: PathBuf,
    socket: PathBuf,
    prefix: String,
}

/// The mounts that tell their store.
fn mounts() -> Vec<MountedStore> {
    let ask = |mounted: crate::fuse::mountinfo::Mount| {
        let runtime = Some(Runtime::of(&mounted.mountpoint)).filter(Runtime::is_own)?;
        let report = status::ask(&runtime.keeper_socket(), MOUNT_PATIENCE).ok()?;
        let prefix = report.pointer("/prefix").and_then(Value::as_str).unwrap_or_default().trim_matches('/').to_owned();
        let socket = report.pointer("/store/socket").and_then(Value::as_str)?.into();
        Some(MountedStore { mountpoint: mounted.mountpoint, socket, prefix })
    };
    super::unmount::mounts().unwrap_or_default().into_iter().filter_map(ask).collect()
}

fn choose(named: Option<&Path>, environment: &Environment, mounts: &[MountedStore]) -> Result<PathBuf> {
    let variable = environment.ipc_socket.as_ref().map(|socket| (PathBuf::from(socket), "VINEYARD_IPC_SOCKET"));
    if let Some((socket, origin)) = named.map(|path| (path.to_owned(), "--socket")).or(variable) {
        let answer = launch::probe(&socket, PATIENCE);
        answer.context(|| format!("no vineyardd answers at {} (from {origin})", socket.display()))?;
        return Ok(std::path::absolute(socket)?);
    }
    let mut stores: Vec<&Path> = mounts.iter().map(|mount| mount.socket.as_path()).collect();
    stores.sort_unstable_by_key(|socket| place(socket));
    stores.dedup_by_key(|socket| place(socket));
    match stores.as_slice() {
        [store] => {
            let answer = launch::probe(store, PATIENCE);
            answer.context(|| format!("the store of the mount does not answer at {}", store.display()))?;
            return Ok(store.to_path_buf());
        }
        [] => {}
        several => {
            let several: Vec<String> = several.iter().map(|socket| socket.display().to_string()).collect();
            let message = format!("the mounts show different stores; choose one with --socket: {}", several.join(", "));
            return Err(Error::new(Kind::Invalid, message));
        }
    }
    let sockets = environment.default_sockets.iter().filter(|socket| socket.exists());
    sockets.into_iter().find(|socket| launch::probe(socket, PATIENCE).is_ok()).cloned().ok_or_else(|| {
        let message = "no vineyardd is running: give its socket with --socket PATH or $VINEYARD_IPC_SOCKET, \
            or mount a private one with `vineyard-fs mount`";
        Error::new(Kind::Unavailable, message)
    })
}

/// Text without control characters, which a name may hold.
pub fn printable(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

/// Prints to the standard output. Who does not want to read on is no error.
///
/// # Errors
/// If it cannot be written for another reason.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context(|| "writing to the standard output".into())
        }
        _ => Ok(()),
    }
}

/// Prints JSON, indented.
///
/// # Errors
/// As [`print`].
pub fn print_json(value: &Value) -> Result<()> {
    print(&format!("{value:#}\n"))
}

/// A time for JSON: RFC 3339 in UTC; null for an unknown one.
pub fn time_json(time: SystemTime) -> Value {
    match known(time) {
        true => chrono::DateTime::<chrono::Utc>::from(time).to_rfc3339_opts(chrono::SecondsFormat::Millis, true).into(),
        false => Value::Null,
    }
}

/// A time for people, in their time zone; `-` for an unknown one.
pub fn time_text(time: SystemTime) -> String {
    match known(time) {
        true => chrono::DateTime::<chrono::Local>::from(time).format("%Y-%m-%d %H:%M:%S").to_string(),
        false => "-".into(),
    }
}

/// Not the beginning of time, and in the range that calendars have.
fn known(time: SystemTime) -> bool {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    (1..1 << 40).contains(&since)
}

/// A type for people.
pub fn type_text(typename: &str) -> String {
    printable(typename.strip_prefix("vineyard::").unwrap_or(typename))
}

/// A bar of bytes on the standard error, which is not there unless that is a terminal. `None`: the length is not known.
pub fn progress(what: &str, bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match bytes {
        Some(bytes) => (
            ProgressBar::new(bytes),
            "{msg} [{bar:30}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
        ),
        None => (ProgressBar::new_spinner(), "{spinner} {msg} {binary_bytes}, {binary_bytes_per_sec}"),
    };
    // A template that cannot be read leaves the usual one.
    let bar = match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    };
    bar.with_message(printable(what))
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupt(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From here on SIGINT, SIGTERM and SIGHUP do not end the process but show in [`check_interrupt`], so that nothing half
/// done is left in the store or in a folder.
///
/// # Errors
/// The errno of setting them.
pub fn catch_interrupts() -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(interrupt), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler stores to an atomic and does nothing else.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// Whether to go on.
///
/// # Errors
/// `Os(EINTR)` after a signal.
pub fn check_interrupt() -> Result<()> {
    match INTERRUPTED.load(Ordering::Relaxed) {
        true => Err(Error::new(Kind::Os(libc::EINTR), "interrupted")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn mounted(mountpoint: &str, socket: &str) -> MountedStore {
        MountedStore { mountpoint: mountpoint.into(), socket: socket.into(), prefix: String::new() }
    }

    #[test]
    fn a_store_that_is_not_clear_or_not_there_is_an_error_that_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let absent = folder.path().join("absent.sock");
        let nothing = Environment { default_sockets: vec![absent.clone()], ..Default::default() };
        let message = |result: Result<PathBuf>| result.unwrap_err().to_string();
        let text = message(choose(None, &nothing, &[]));
        assert!(text.contains("--socket PATH") && text.contains("`vineyard-fs mount`"), "{text}");
        let text = message(choose(Some(&absent), &nothing, &[]));
        assert!(text.contains("absent.sock (from --socket)"), "{text}");
        let variable = Environment { ipc_socket: Some(absent.clone().into()), ..nothing.clone() };
        assert!(message(choose(None, &variable, &[])).contains("(from VINEYARD_IPC_SOCKET)"));
        let two = [mounted("/mnt/a", "/run/a.sock"), mounted("/mnt/b", "/run/b.sock")];
        let text = message(choose(None, &nothing, &two));
        assert!(text.contains("choose one with --socket: /run/a.sock, /run/b.sock"), "{text}");
        let one = [mounted("/mnt/a", "/run/a.sock"), mounted("/mnt/b", "/run/a.sock")];
        assert!(message(choose(None, &nothing, &one)).contains("the mount does not answer at /run/a.sock"));
    }

    #[test]
    fn nothing_that_a_name_holds_reaches_the_terminal_raw() {
        assert_eq!(printable("a\n\u{1b}[31mü"), "a\\n\\u{1b}[31mü");
        assert_eq!(type_text("vineyard::Tensor<double>"), "Tensor<double>");
    }

    #[test]
    fn times_outside_of_calendars_are_unknown() {
        let at = |secs| SystemTime::UNIX_EPOCH + Duration::from_secs(secs);
        assert_eq!(time_json(at(1_700_000_000)), "2023-11-14T22:13:20.000Z");
        assert_eq!((time_json(at(0)), time_json(at(1 << 50))), (Value::Null, Value::Null));
        assert_eq!(time_text(at(1 << 50)), "-");
    }
}
