//! Which vineyardd to use: one that runs, or a private one that is launched.

use std::ffi::OsString;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::connection::{Connection, connect_path};
use super::pool::{Backoff, Pool};
use super::store::Instance;
use crate::cgroup;
use crate::error::{Context, Error, Kind, Result};

/// How long a vineyardd may take to answer before it counts as absent.
const PROBE: Duration = Duration::from_secs(2);
/// Smallest store: vineyardd aborts at start with a few KiB.
const SMALLEST: u64 = 1 << 20;
/// Longest path of a Unix socket, without its NUL.
const LONGEST_SOCKET: usize = 107;
const MIB: u64 = 1 << 20;
/// Makes a vineyardd log where its output goes; else it leaves files in the folder for temporary ones.
const LOG: (&str, &str) = ("GLOG_logtostderr", "1");
/// Makes it ask for huge pages for its heap (glibc 2.35, "Memory Allocation Tunables" of its manual). Its metadata is one
/// tree in which two names lie many pages apart, and a question for a name walks all of them: with huge pages, saves
/// beside 6,000 datasets are 1.5 times as many a second.
const HEAP: (&str, &str) = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1");

/// What of the process's surroundings decides; [`Environment::current`] for the real ones.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// `VINEYARD_IPC_SOCKET`.
    pub ipc_socket: Option<OsString>,
    /// `PATH`.
    pub path: Option<OsString>,
    /// Python environments, in the order of preference.
    pub virtual_envs: Vec<PathBuf>,
    /// The one of the current folder. Nobody has named it, so it counts only where nobody else can have put something.
    pub found_env: Option<PathBuf>,
    /// Where a vineyardd that was started without `--socket` listens.
    pub default_sockets: Vec<PathBuf>,
    /// Where a private folder may be made.
    pub runtime_folder: PathBuf,
}

impl Environment {
    /// That of this process.
    pub fn current() -> Self {
        let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let mut default_sockets = vec![PathBuf::from("/var/run/vineyard.sock"), PathBuf::from("/run/vineyard.sock")];
        default_sockets.extend(var("HOME").map(|home| Path::new(&home).join(".local/vineyard/vineyard.sock")));
        let writable = |folder: &PathBuf| nix::unistd::access(folder, nix::unistd::AccessFlags::W_OK).is_ok();
        let runtime_folder = var("XDG_RUNTIME_DIR").map(PathBuf::from).filter(writable);
        Environment {
            ipc_socket: var("VINEYARD_IPC_SOCKET"),
            path: var("PATH"),
            virtual_envs: var("VIRTUAL_ENV").map(PathBuf::from).into_iter().collect(),
            found_env: std::env::current_dir().ok().map(|folder| folder.join(".venv")),
            default_sockets,
            runtime_folder: runtime_folder.unwrap_or_else(std::env::temp_dir),
        }
    }
}

/// What the user said about the server.
#[derive(Clone, Debug, Default)]
pub struct LaunchOptions {
    /// The socket of a running vineyardd.
    pub socket: Option<PathBuf>,
    /// The binary to launch.
    pub vineyardd: Option<PathBuf>,
    /// Memory of a launched vineyardd in bytes; see [`parse_size`] and [`default_size`].
    pub size: Option<u64>,
    /// Folder for the socket and the log of a launched vineyardd; a fresh one if `None`. Made with mode 0700.
    pub folder: Option<PathBuf>,
    /// Log of a launched vineyardd; `vineyardd.log` in the folder if `None`.
    pub log: Option<PathBuf>,
}

/// The server to use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// The one that answers at this socket.
    Existing(PathBuf),
    /// None runs: launch this one.
    Launch(LaunchPlan),
}

/// How to launch a private vineyardd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchPlan {
    /// The binary.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Its socket, in a folder that only its owner can enter.
    pub socket: PathBuf,
    /// Its memory in bytes.
    pub size: u64,
    /// File that gets its output.
    pub log: PathBuf,
    /// The folder that was made for it alone; `None` if the user named one.
    pub own_folder: Option<PathBuf>,
}

/// Chooses: the socket that the user or `VINEYARD_IPC_SOCKET` names, else a default socket that answers, else a private
/// vineyardd.
///
/// # Errors
/// If the named socket does not answer, or if nothing runs and no vineyardd is found; the message says what to do.
pub fn choose(options: &LaunchOptions, environment: &Environment) -> Result<Chosen> {
    let named = options.socket.clone().map(|path| (path, "--socket"));
    let named = named.or_else(|| environment.ipc_socket.clone().map(|p| (p.into(), "VINEYARD_IPC_SOCKET")));
    if let Some((path, origin)) = named {
        let context = || format!("no vineyardd answers at {} (from {origin})", path.display());
        probe(&path, PROBE).context(context)?;
        return Ok(Chosen::Existing(path));
    }
    for path in environment.default_sockets.iter().filter(|path| path.exists()) {
        match probe(path, PROBE) {
            Ok(_) => return Ok(Chosen::Existing(path.clone())),
            Err(error) => tracing::debug!(?path, "a default socket does not answer: {error}"),
        }
    }
    plan(options, environment).map(Chosen::Launch)
}

/// Asks who answers at a socket, once.
///
/// # Errors
/// The errno of connecting, `Timeout`, or whatever breaks the protocol.
pub fn probe(socket: &Path, patience: Duration) -> Result<Instance> {
    let deadline = Instant::now() + patience;
    let stream = connect_path(socket, deadline)?;
    let connection = Connection::register(stream, deadline, patience)?;
    Ok(Pool::instance_of(&connection))
}

fn plan(options: &LaunchOptions, environment: &Environment) -> Result<LaunchPlan> {
    let program = find_vineyardd(options.vineyardd.as_deref(), environment)?;
    let size = match options.size {
        Some(size) if size < SMALLEST => {
            return Err(Error::new(Kind::Invalid, format!("a store of {size} bytes is too small: at least 1 MiB")));
        }
        Some(size) => {
            // It would take what is put into it until the kernel kills something.
            let (memory, swap) = (cgroup::whole_memory()?, cgroup::swap()?);
            if size > memory.saturating_add(swap) {
                let message = format!(
                    "a store of {} MiB is larger than what there is: {} MiB of memory and {} MiB of swap space; see --size",
                    size / MIB,
                    memory / MIB,
                    swap / MIB,
                );
                return Err(Error::new(Kind::Invalid, message));
            }
            size
        }
        None => default_size()?,
    };
    let (folder, own_folder) = match &options.folder {
        Some(folder) => (private_folder(folder)?, None),
        None => {
            let folder = nix::unistd::mkdtemp(&environment.runtime_folder.join("vineyard-fs-XXXXXX"))
                .context(|| format!("making a folder in {}", environment.runtime_folder.display()))?;
            (folder.clone(), Some(folder))
        }
    };
    let socket = folder.join("vineyard.sock");
    if socket.as_os_str().len() > LONGEST_SOCKET {
        return Err(Error::new(
            Kind::NameTooLong,
            format!("{} is too long for a socket; name a shorter folder", socket.display()),
        ));
    }
    let mut args: Vec<OsString> = ["--meta", "local", "--rpc=false", "--size"].map(OsString::from).into();
    args.extend([size.to_string().into(), "--socket".into(), socket.clone().into()]);
    let log = options.log.clone().unwrap_or_else(|| folder.join("vineyardd.log"));
    Ok(LaunchPlan { program, args, socket, size, log, own_folder })
}

fn private_folder(folder: &Path) -> Result<PathBuf> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.context(|| format!("making the folder {}", folder.display()))?;
    let meta = std::fs::metadata(folder).context(|| format!("looking at {}", folder.display()))?;
    // Whoever can enter the folder can connect: vineyardd lets everybody use its socket.
    if meta.uid() != nix::unistd::geteuid().as_raw() || meta.mode() & 0o077 != 0 {
        return Err(Error::new(
            Kind::NotPermitted,
            format!("{} must belong to you and have mode 0700: it guards the store's socket", folder.display()),
        ));
    }
    std::path::absolute(folder).context(|| format!("the path of {}", folder.display()))
}

fn is_program(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The vineyardd binary: `named`, else on `PATH`, else of the Python package `vineyard-bdist` in one of the virtual
/// environments or where `python3` looks.
///
/// # Errors
/// `NotFound`, with the way to get one.
pub fn find_vineyardd(named: Option<&Path>, environment: &Environment) -> Result<PathBuf> {
    if let Some(path) = named {
        return match is_program(path) {
            true => std::path::absolute(path).context(|| format!("the path of {}", path.display())),
            false => Err(Error::not_found(format!("{} is no program (from --vineyardd)", path.display()))),
        };
    }
    let folders = environment.path.as_deref().map(std::env::split_paths).into_iter().flatten();
    let on_path = folders.filter(|folder| folder.is_absolute()).map(|folder| folder.join("vineyardd"));
    if let Some(path) = on_path.into_iter().find(|path| is_program(path)) {
        return Ok(path);
    }
    if let Some(path) = environment.virtual_envs.iter().find_map(|virtual_env| packaged(virtual_env)) {
        return Ok(path);
    }
    let mut passed_over = String::new();
    if let Some(path) = environment.found_env.as_deref().and_then(packaged) {
        match writable_by_others(&path) {
            Ok(None) => return Ok(path),
            Ok(Some(place)) => {
                passed_over = format!(
                    "; {} is not run: others may write to {}, and it was only found in the current folder",
                    path.display(),
                    place.display()
                );
            }
            Err(error) => passed_over = format!("; {} is not run: {error}", path.display()),
        }
    }
    in_python_path(environment).ok_or_else(|| {
        Error::not_found(format!(
            "no vineyardd runs, and none is installed to be launched: `pip install vineyard vineyard-bdist` brings one; \
             or name one with --vineyardd PATH, or a running one's socket with --socket PATH{passed_over}"
        ))
    })
}

/// The binary of the Python package in a virtual environment.
fn packaged(virtual_env: &Path) -> Option<PathBuf> {
    let versions = std::fs::read_dir(virtual_env.join("lib")).ok()?.flatten();
    versions.map(|version| version.path().join("site-packages/vineyard/bdist/vineyardd")).find(|path| is_program(path))
}

/// The first place on the way to a file at which somebody but this process's user and root could put another: on the way
/// as it is named, and on the one that links lead.
fn writable_by_others(path: &Path) -> Result<Option<PathBuf>> {
    let user = nix::unistd::geteuid().as_raw();
    for way in [path, &std::fs::canonicalize(path)?] {
        let mut places: Vec<&Path> = way.ancestors().collect();
        places.reverse();
        for place in places {
            let meta = std::fs::symlink_metadata(place)?;
            let owned = meta.uid() == user || meta.uid() == 0;
            // A link has no mode. In a folder such as /tmp everybody writes, but nobody to what belongs to others.
            let guarded = meta.is_symlink() || meta.is_dir() && meta.mode() & 0o1000 != 0;
            // Many systems give each user a group of the same number.
            let group = if user != 0 && meta.gid() == user { 0 } else { 0o020 };
            if !owned || !guarded && meta.mode() & (0o002 | group) != 0 {
                return Ok(Some(place.to_owned()));
            }
        }
    }
    Ok(None)
}

/// The package's binary wherever the `python3` of `PATH` looks for packages; nothing is imported.
fn in_python_path(environment: &Environment) -> Option<PathBuf> {
    const SCRIPT: &str = "import os, sys\nfor p in sys.path:\n    f = os.path.join(p, 'vineyard', 'bdist', 'vineyardd')\n    \
                          if os.path.isabs(p) and os.path.isfile(f):\n        print(f)\n        break\n";
    let folders = environment.path.as_deref().map(std::env::split_paths).into_iter().flatten();
    let python = folders.map(|folder| folder.join("python3")).find(|path| path.is_absolute() && is_program(path))?;
    // From the root: the current folder is no place to take programs from.
    let mut command = Command::new("timeout");
    command.arg("5").arg(python).args(["-c", SCRIPT]).current_dir("/").stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.output().ok()?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim_end());
    is_program(&path).then_some(path)
}

/// The command that launches the plan's vineyardd, in a process group of its own (a Ctrl-C is for the mount, which then
/// stops it), its output appended to the log.
///
/// # Errors
/// The errno of opening the log.
pub fn command(plan: &LaunchPlan) -> Result<Command> {
    let log = std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(&plan.log);
    let log = log.context(|| format!("opening the log {}", plan.log.display()))?;
    let again = log.try_clone().context(|| format!("opening the log {}", plan.log.display()))?;
    let mut command = Command::new(&plan.program);
    command.args(&plan.args).stdin(Stdio::null()).stdout(log).stderr(again).process_group(0);
    surround(&mut command);
    Ok(command)
}

/// Sets the environment of a vineyardd that is launched. Tunables that the user has set stay.
pub fn surround(command: &mut Command) {
    command.env(LOG.0, LOG.1);
    if std::env::var_os(HEAP.0).is_none() {
        command.env(HEAP.0, HEAP.1);
    }
}

/// Waits until the launched vineyardd answers. `exited` tells whether it ended in the meantime.
///
/// # Errors
/// `Unavailable` if it ends, `Timeout` at the deadline; both with the end of its log.
pub fn wait_ready(
    plan: &LaunchPlan,
    patience: Duration,
    mut exited: impl FnMut() -> Option<ExitStatus>,
) -> Result<Instance> {
    let deadline = Instant::now() + patience;
    let mut backoff = Backoff::default();
    loop {
        let error = match probe(&plan.socket, deadline.saturating_duration_since(Instant::now())) {
            Ok(instance) => return Ok(instance),
            Err(error) => error,
        };
        if let Some(status) = exited() {
            return Err(Error::new(
                Kind::Unavailable,
                format!("vineyardd ended with {status}: {}", log_end(&plan.log)),
            ));
        }
        if !backoff.pause(deadline) {
            let message = format!("vineyardd is not ready after {patience:?}; its log ends: {}", log_end(&plan.log));
            return Err(Error::new(Kind::Timeout, message).with_source(error));
        }
    }
}

/// The last lines of a log, in one line.
fn log_end(log: &Path) -> String {
    let text = std::fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.get(lines.len().saturating_sub(3)..).unwrap_or_default().join(" | ")
}

/// Reads a size as vineyardd does: `1024000`, `1024M` (powers of 1000), `1Gi` (powers of 1024), any case of the unit
/// and a trailing `B` allowed.
///
/// # Errors
/// `Invalid`.
pub fn parse_size(text: &str) -> Result<u64> {
    let refuse = || Error::new(Kind::Invalid, format!("{text:?} is no size; sizes look like 4Gi, 512Mi or 2G"));
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let unit = unit.strip_suffix('b').unwrap_or(&unit);
    let (base, unit) = match unit.strip_suffix('i') {
        Some(unit) if !unit.is_empty() => (1024u64, unit),
        _ => (1000, unit),
    };
    let power = ["", "k", "m", "g", "t", "p"].iter().position(|&u| u == unit).ok_or_else(refuse)?;
    let factor = base.pow(power as u32);
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(refuse);
    }
    match number.parse::<f64>() {
        Ok(n) if n.is_finite() && n * (factor as f64) < (1u64 << 62) as f64 => Ok((n * factor as f64) as u64),
        _ => Err(refuse()),
    }
}

/// Half of the memory that this process may still use, in whole MiB.
///
/// # Errors
/// If the kernel does not tell, or if that is less than the smallest store.
pub fn default_size() -> Result<u64> {
    let available = cgroup::available_memory()?;
    match available / 2 / MIB * MIB {
        size if size < SMALLEST => Err(Error::new(Kind::Full, "too little memory for a store; see --size")),
        size => Ok(size),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn program(path: &Path) -> PathBuf {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "#!/bin/sh\necho broken >&2\nexit 3\n").unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.to_path_buf()
    }

    #[test]
    fn sizes() {
        for (text, size) in [
            ("1024000", 1024000),
            ("1024M", 1_024_000_000),
            ("1Gi", 1 << 30),
            ("1.5GiB", 3 << 29),
            ("2 k", 2000),
            ("7b", 7),
        ] {
            assert_eq!(parse_size(text).unwrap(), size, "{text}");
        }
        for text in ["", "-1", "1X", "Gi", "1.2.3M", "99999999999999G", "i", "1e3", "nan"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_binary_is_found_in_order() {
        let root = tempfile::tempdir().unwrap();
        let bin = root.path().join("bin");
        let venv = root.path().join("venv");
        let environment =
            Environment { path: Some(bin.clone().into()), virtual_envs: vec![venv.clone()], ..Environment::default() };
        let error = find_vineyardd(None, &environment).unwrap_err();
        assert!(error.to_string().contains("pip install vineyard vineyard-bdist"), "{error}");
        assert!(find_vineyardd(Some(&bin.join("other")), &environment).is_err());
        let packaged = program(&venv.join("lib/python3.11/site-packages/vineyard/bdist/vineyardd"));
        assert_eq!(find_vineyardd(None, &environment).unwrap(), packaged);
        let on_path = program(&bin.join("vineyardd"));
        assert_eq!(find_vineyardd(None, &environment).unwrap(), on_path);
        assert_eq!(find_vineyardd(Some(&packaged), &environment).unwrap(), packaged);
    }

    #[test]
    fn what_others_may_have_put_into_the_current_folder_is_not_run() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("project");
        let packaged = program(&folder.join(".venv/lib/python3.11/site-packages/vineyard/bdist/vineyardd"));
        let found = |folder: &Path| {
            let environment = Environment { found_env: Some(folder.join(".venv")), ..Environment::default() };
            find_vineyardd(None, &environment)
        };
        let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(found(&folder).unwrap(), packaged);
        for place in packaged.ancestors().take_while(|place| *place != root.path()) {
            mode(place, 0o757);
            let error = found(&folder).unwrap_err().to_string();
            assert!(error.contains(&format!("others may write to {},", place.display())), "{error}");
            mode(place, 0o755);
        }
        assert_eq!(found(&folder).unwrap(), packaged);
        // By a link, too.
        let linking = root.path().join("linking");
        std::fs::create_dir(&linking).unwrap();
        std::os::unix::fs::symlink(folder.join(".venv"), linking.join(".venv")).unwrap();
        assert!(found(&linking).unwrap().starts_with(&linking));
        mode(&folder, 0o777);
        assert!(found(&linking).is_err());
        // As in /tmp.
        mode(&folder, 0o1777);
        assert!(found(&linking).is_ok() && found(&folder).is_ok());
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::lchown(linking.join(".venv"), Some(65534), None).unwrap();
            assert!(found(&linking).is_err());
            std::os::unix::fs::chown(folder.join(".venv/lib"), Some(65534), None).unwrap();
            assert!(found(&folder).unwrap_err().to_string().contains("/.venv/lib,"));
        }
    }

    #[test]
    fn a_named_socket_must_answer() {
        let root = tempfile::tempdir().unwrap();
        let socket = root.path().join("none.sock");
        let options = LaunchOptions { socket: Some(socket.clone()), ..LaunchOptions::default() };
        let error = choose(&options, &Environment::default()).unwrap_err();
        assert!(error.to_string().contains("--socket"), "{error}");
        let environment = Environment { ipc_socket: Some(socket.into()), ..Environment::default() };
        let error = choose(&LaunchOptions::default(), &environment).unwrap_err();
        assert!(error.to_string().contains("VINEYARD_IPC_SOCKET"), "{error}");
    }

    #[test]
    fn a_server_that_ends_at_once_is_reported_with_its_log() {
        let root = tempfile::tempdir().unwrap();
        let vineyardd = program(&root.path().join("vineyardd"));
        let folder = root.path().join("run");
        let options = LaunchOptions {
            vineyardd: Some(vineyardd),
            size: Some(8 * MIB),
            folder: Some(folder.clone()),
            ..LaunchOptions::default()
        };
        let Chosen::Launch(plan) = choose(&options, &Environment::default()).unwrap() else { panic!("nothing runs") };
        assert_eq!(std::fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        let json = serde_json::to_string(&plan).unwrap();
        assert_eq!(serde_json::from_str::<LaunchPlan>(&json).unwrap(), plan);
        let mut launch = command(&plan).unwrap();
        let value_of = |name: &str| launch.get_envs().find(|(key, _)| *key == name).and_then(|(_, value)| value);
        assert_eq!(value_of(LOG.0), Some(LOG.1.as_ref()));
        let tunables = std::env::var_os(HEAP.0).is_none().then_some(HEAP.1.as_ref());
        assert_eq!(value_of(HEAP.0), tunables, "those of the user stay");
        let mut child = launch.spawn().unwrap();
        let error = wait_ready(&plan, Duration::from_secs(20), || child.try_wait().unwrap()).unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.to_string().contains("broken"), "{error}");

        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(choose(&options, &Environment::default()).unwrap_err().kind(), Kind::NotPermitted);
        let small = LaunchOptions { size: Some(10), ..options };
        assert_eq!(choose(&small, &Environment::default()).unwrap_err().kind(), Kind::Invalid);
    }
}
