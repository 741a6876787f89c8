//! `vineyard-fs mount`: checks all that can be checked, starts a keeper and waits until the mount answers.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::ValueHint;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::{options, store};
use crate::error::{Context, Error, Kind, Result};
use crate::fs::ServePolicy;
use crate::fuse::config::{Launch, MountConfig};
use crate::fuse::mount::keep_open;
use crate::fuse::runtime::Runtime;
use crate::fuse::{keeper, mountinfo, privileges};
use crate::image::View;
use crate::telemetry::{self, Format};
use crate::vineyard::RemotePolicy;
use crate::vineyard::launch::{self, Chosen, Environment, LaunchOptions};

const EXAMPLES: &str = "\
Examples:
  vineyard-fs mount /mnt/vineyard
      the vineyardd of $VINEYARD_IPC_SOCKET or a default socket; if none answers, a private one
  vineyard-fs mount /mnt/vineyard --socket /run/vineyard.sock --read-only
  vineyard-fs mount /mnt/run7 --prefix run7 --uid 1000 --gid 1000
  vineyard-fs mount /mnt/vineyard --foreground --log-level debug
  mount -t fuse.vineyard-fs /run/vineyard.sock /mnt/vineyard -o ro,cache_size=8G";

/// What `mount` takes.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// An empty directory
    #[arg(value_hint = ValueHint::DirPath)]
    pub mountpoint: PathBuf,
    /// Stay attached to the terminal, and log there
    #[arg(long, short = 'f')]
    pub foreground: bool,
    /// Socket of a running vineyardd
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath, conflicts_with = "vineyardd")]
    pub socket: Option<PathBuf>,
    /// Start this vineyardd for the mount alone, whether another runs or not
    #[arg(long, value_name = "PATH", value_hint = ValueHint::ExecutablePath)]
    pub vineyardd: Option<PathBuf>,
    /// Memory for a private vineyardd, such as 8G or 25%
    #[arg(long, value_name = "SIZE", value_parser = options::size)]
    pub size: Option<u64>,
    /// Show only names below this one, without it
    #[arg(long, value_name = "NAME")]
    pub prefix: Option<String>,
    /// Refuse all writing
    #[arg(long)]
    pub read_only: bool,
    /// Most memory for assembled files, and as much for data of other instances [default: 25% of the memory
    /// that it may use: the machine's, or its control group's limit]
    #[arg(long, value_name = "SIZE", value_parser = options::size)]
    pub cache_size: Option<u64>,
    /// Most memory for files being written [default: 50% of that memory]
    #[arg(long, value_name = "SIZE", value_parser = options::size)]
    pub staging_size: Option<u64>,
    /// How the bytes of files reach readers
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = options::serve())]
    pub serve: ServePolicy,
    /// Whether data of other instances of the cluster is brought here: when it is read (lazy), and after the first open
    /// whole into the local vineyardd, in the background (full), or never (EREMOTEIO)
    #[arg(long, value_name = "WHEN", default_value = "lazy", value_parser = options::migrate())]
    pub migrate: RemotePolicy,
    /// How listings show tables that were not saved as files: arrow, feather or parquet
    #[arg(long, value_name = "FORMAT", default_value = "arrow", value_parser = options::table_view())]
    pub format: View,
    /// Socket of a process that keeps the mount alive from one keeper to the next
    #[arg(long, value_name = "PATH", hide = true)]
    pub holder: Option<PathBuf>,
    /// Log to this file instead of the usual place
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub log_file: Option<PathBuf>,
    /// How log lines look
    #[arg(long, value_enum, default_value_t)]
    pub log_format: Format,
    /// What to log: error, warn, info, debug, trace, or a filter
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = telemetry::check)]
    pub log_level: String,
    /// Owner of the files of others and of directories; what is saved here belongs to who saves it [default: you]
    #[arg(long)]
    pub uid: Option<u32>,
    /// Group of them [default: yours]
    #[arg(long)]
    pub gid: Option<u32>,
    /// Permission bits of directories
    #[arg(long, value_name = "MODE", default_value = "0755", value_parser = options::mode)]
    pub dir_mode: u32,
    /// Permission bits of files of others
    #[arg(long, value_name = "MODE", default_value = "0644", value_parser = options::mode)]
    pub file_mode: u32,
    /// Longest time for one request to vineyardd, such as 10s
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = options::millis)]
    pub deadline: u64,
    /// Serve counters for Prometheus at this address, such as 127.0.0.1:9464
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<std::net::SocketAddr>,
    /// Keep all other users out, root included
    #[arg(long)]
    pub no_allow_other: bool,
    /// Mount even if the directory is not empty; what is in it is hidden meanwhile
    #[arg(long)]
    pub nonempty: bool,
    /// Options as in /etc/fstab: the above with `_` or `-`, ro, rw, and those of mount(8)
    #[arg(short = 'o', value_name = "OPTION,...")]
    pub options: Vec<String>,
    /// Of `options`: those that the kernel applies.
    #[arg(skip)]
    pub flags: Vec<String>,
    /// What mount(8) calls the device: a socket, or `vineyard` or `none` to search for one
    #[arg(long, hide = true)]
    pub source: Option<PathBuf>,
}

/// What a keeper tells through its pipe, in one line.
#[derive(Debug, Serialize, Deserialize)]
enum Outcome {
    Ready(String),
    Failed(String),
}

/// Mounts.
///
/// # Errors
/// If it did not work; nothing is left behind then.
pub fn run(mut arguments: Args) -> Result<()> {
    options::apply(&mut arguments)?;
    if let Some(source) = arguments.source.take()
        && arguments.socket.is_none()
        && !["vineyard", "none", "vineyard-fs"].iter().any(|name| source == Path::new(name))
    {
        arguments.socket = Some(source);
    }
    let mountpoint = mountinfo::absolute(&arguments.mountpoint)?;
    let dead = check_mountpoint(&mountpoint, arguments.nonempty, arguments.holder.is_some())?;
    let runtime = Runtime::of(&mountpoint);
    runtime.create()?;
    let config = configuration(arguments, mountpoint, &runtime);
    let config = MountConfig { dead, ..config.inspect_err(|_| runtime.remove())? };
    match config.log_file {
        None => stay(config),
        Some(_) => go_to_background(&config),
    }
}

fn configuration(arguments: Args, mountpoint: PathBuf, runtime: &Runtime) -> Result<MountConfig> {
    let log_file = match (arguments.foreground, &arguments.log_file) {
        (true, _) => None,
        (false, Some(file)) => Some(std::path::absolute(file)?),
        (false, None) => Some(usual_log(&mountpoint)?),
    };
    if let Some(file) = &log_file
        && file.starts_with(&mountpoint)
    {
        return Err(Error::new(Kind::Invalid, format!("the log {file:?} would lie in the mount itself")));
    }
    let beside = match &log_file {
        Some(file) => file.clone(),
        None => usual_log(&mountpoint)?,
    };
    let (socket, launch) = choose_store(&arguments, runtime, beside.with_extension("vineyardd.log"))?;
    let memory = crate::cgroup::whole_memory().unwrap_or(8 << 30);
    Ok(MountConfig {
        mountpoint,
        socket,
        launch,
        prefix: arguments.prefix,
        read_only: arguments.read_only,
        dead: Vec::new(),
        flags: arguments.flags,
        allow_other: !arguments.no_allow_other,
        cache_size: arguments.cache_size.unwrap_or(memory / 4),
        staging_size: arguments.staging_size.unwrap_or(memory / 2),
        serve: arguments.serve,
        migrate: arguments.migrate,
        tables: arguments.format,
        holder: arguments.holder,
        uid: arguments.uid.unwrap_or_else(|| nix::unistd::getuid().as_raw()),
        gid: arguments.gid.unwrap_or_else(|| nix::unistd::getgid().as_raw()),
        dir_mode: arguments.dir_mode,
        file_mode: arguments.file_mode,
        deadline_ms: arguments.deadline,
        metrics: arguments.metrics,
        runtime: runtime.folder().to_owned(),
        log_file,
        log_format: arguments.log_format,
        log_level: arguments.log_level,
    })
}

/// A vineyardd that answers, or the plan for a private one, whose socket lies in a folder of the mount's own.
fn choose_store(arguments: &Args, runtime: &Runtime, log: PathBuf) -> Result<(PathBuf, Option<Launch>)> {
    let wanted = LaunchOptions {
        socket: arguments.socket.clone(),
        vineyardd: arguments.vineyardd.clone(),
        size: arguments.size,
        folder: Some(runtime.folder().join("store")),
        log: Some(log),
    };
    let mut environment = Environment::current();
    if wanted.vineyardd.is_some() {
        // Who names a program wants it started.
        environment.ipc_socket = None;
        environment.default_sockets.clear();
    }
    match launch::choose(&wanted, &environment)? {
        Chosen::Existing(socket) => Ok((std::path::absolute(socket)?, None)),
        Chosen::Launch(plan) => {
            let launch = Launch { program: plan.program, args: plan.args, log: plan.log };
            Ok((plan.socket, Some(launch)))
        }
    }
}

/// Finds out whether something can be mounted here: the devices of mounts that killed keepers have left, which the new
/// one replaces. They stay until it is there, so that nobody finds the bare directory and saves into it.
fn check_mountpoint(mountpoint: &Path, nonempty: bool, held: bool) -> Result<Vec<(u32, u32)>> {
    let refuse = |kind, message: String| Err(Error::new(kind, message));
    let runtime = Runtime::of(mountpoint);
    // Looked up before the directory is looked at: that could hang.
    let mut dead = Vec::new();
    if mountinfo::at(mountpoint)?.is_some_and(|mounted| mounted.fs_type == mountinfo::FS_TYPE) {
        if let Some(keeper) = runtime.keeper() {
            let message = format!(
                "{} is a mount of vineyard-fs already (keeper {}): unmount it first with `vineyard-fs unmount {0}`",
                mountpoint.display(),
                keeper.pid,
            );
            return refuse(Kind::Busy, message);
        }
        if held {
            // The keeper takes it over, or takes it away.
            return Ok(dead);
        }
        eprintln!("vineyard-fs: replacing the mount that a killed vineyard-fs left on {}", mountpoint.display());
        dead = mountinfo::ours_at(mountpoint)?;
    }
    if let Some(keeper) = runtime.keeper() {
        let message = format!(
            "another vineyard-fs (process {}) is just starting or ending on {}: try again",
            keeper.pid,
            mountpoint.display(),
        );
        return refuse(Kind::Busy, message);
    }
    if !dead.is_empty() {
        return Ok(dead);
    }
    let at = mountpoint.display();
    match std::fs::metadata(mountpoint) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return refuse(Kind::NotDirectory, format!("{at} is not a directory: give one to mount on")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return refuse(Kind::NotFound, format!("{at} does not exist: make it first with `mkdir -p {at}`"));
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {
            return refuse(
                Kind::Busy,
                format!("{at} is a dead mount of another program: remove it with `umount -l {at}`"),
            );
        }
        Err(error) => return Err(error).context(|| format!("cannot look at {at}")),
    }
    let mut entries = std::fs::read_dir(mountpoint).context(|| format!("cannot read the directory {at}"))?;
    if !nonempty && entries.next().is_some() {
        return refuse(
            Kind::NotEmpty,
            format!("{at} is not empty: choose another directory, or allow it with -o nonempty"),
        );
    }
    Ok(dead)
}

/// Where logs go if nothing is said, in a folder that only the owner reads.
fn usual_log(mountpoint: &Path) -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let usual = match (nix::unistd::geteuid().is_root(), variable("XDG_STATE_HOME"), variable("HOME")) {
        (true, ..) => PathBuf::from("/var/log/vineyard-fs"),
        (false, Some(state), _) => state.join("vineyard-fs"),
        (false, None, Some(home)) => home.join(".local/state/vineyard-fs"),
        (false, None, None) => crate::fuse::runtime::base(),
    };
    let usable = |folder: &PathBuf| {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.is_ok() && nix::unistd::access(folder, nix::unistd::AccessFlags::W_OK).is_ok()
    };
    // Without a home to write to, as many containers are: beside the mount's sockets, which lie somewhere that is writable.
    let folder = [usual.clone(), crate::fuse::runtime::base()].into_iter().find(usable);
    let folder = folder.ok_or_else(|| {
        let message = format!("cannot write into the folder {usual:?} for logs: give `mount` --log-file");
        Error::new(Kind::NotPermitted, message)
    })?;
    let name: String = mountpoint.to_string_lossy().trim_matches('/').chars().take(100).collect();
    let name = name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_', "-");
    Ok(folder.join(format!("{name}-{:.8}.log", mountinfo::digest(mountpoint))))
}

/// Tells that it is mounted, which is so whether anybody can be told or not.
fn say(line: &str) {
    if let Err(error) = store::print(&format!("vineyard-fs: {line}\n")) {
        eprintln!("vineyard-fs: {error}");
    }
}

/// Keeps the mount in this very process.
fn stay(config: MountConfig) -> Result<()> {
    telemetry::init(config.log_format, &config.log_level);
    keeper::run(config, &mut |outcome| {
        if let Ok(line) = outcome {
            say(&line);
        }
    })
}

fn go_to_background(config: &MountConfig) -> Result<()> {
    let log = config.log_file.as_deref().unwrap_or(Path::new("/dev/null"));
    let output = File::options().create(true).append(true).mode(0o600).open(log);
    let output = output.context(|| format!("cannot write the log {log:?}"))?;
    let mut text = File::from(memfd_create("configuration", MFdFlags::MFD_CLOEXEC)?);
    serde_json::to_writer(&text, config).map_err(|error| Error::new(Kind::Internal, error.to_string()))?;
    text.rewind()?;
    let (told, tell) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let inherited = [text.as_raw_fd(), tell.as_raw_fd()];
    let mut command = Command::new("/proc/self/exe");
    command.arg0("vineyard-fs").arg("keeper").args(inherited.map(|fd| fd.to_string()));
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    // SAFETY: only system calls that are allowed between fork and exec.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            inherited.iter().try_for_each(|&fd| keep_open(fd))
        });
    }
    let mut child = command.spawn().context(|| "cannot start a keeper".into())?;
    drop(tell);
    let mut line = String::new();
    BufReader::new(File::from(told)).read_line(&mut line)?;
    match serde_json::from_str(&line) {
        Ok(Outcome::Ready(message)) => {
            say(&message);
            Ok(())
        }
        Ok(Outcome::Failed(message)) => {
            child.wait().ok();
            Err(Error::new(Kind::Unavailable, message))
        }
        Err(_) => {
            let status = child.wait()?;
            Err(Error::new(
                Kind::Internal,
                format!("the keeper ended without a word ({status}); see {}", log.display()),
            ))
        }
    }
}

/// The process that `go_to_background` starts.
///
/// # Errors
/// If the mount did not work, after telling so.
pub fn keeper(config: RawFd, report: RawFd) -> Result<()> {
    privileges::take_name();
    let mut text = String::new();
    take(config)?.read_to_string(&mut text)?;
    let config: MountConfig = serde_json::from_str(&text).map_err(|error| Error::malformed(error.to_string()))?;
    let mut pipe = Some(take(report)?);
    telemetry::init(config.log_format, &config.log_level);
    let mut tell = |outcome: &Outcome| {
        // Told once: the other side reads one line and goes.
        if let Some(mut pipe) = pipe.take() {
            let line = serde_json::to_string(outcome).unwrap_or_default();
            writeln!(pipe, "{line}").ok();
        }
    };
    let result = keeper::run(config, &mut |outcome| {
        if let Ok(message) = outcome {
            tell(&Outcome::Ready(message));
        }
    });
    if let Err(error) = &result {
        tell(&Outcome::Failed(error.to_string()));
    }
    result
}

fn take(fd: RawFd) -> Result<File> {
    // SAFETY: asks for the flags of a number; any number is allowed.
    if fd < 3 || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(Error::new(Kind::Invalid, "a keeper is started by `vineyard-fs mount`"));
    }
    // SAFETY: it is open, and was inherited for this use; this is called once for each.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}
