//! `run` and `kedro run`: a command with a mount for as long as it runs.
//!
//! `kedro run` gives the pipeline a copy of its configuration with one catalog file more, in a temporary folder; the
//! project's own files are not touched. The datasets of the run live in a folder of their own below the mount, which
//! goes when the run is over.

use super::catalog::{self, Create};
use super::entries::Format;
use super::introspect::{Interpreter, Session};
use super::{DEFAULT_MOUNT, DEFAULT_PIPELINE, Project, clean, yaml};
use crate::error::{Context, Error, Kind, Result};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicI32, Ordering};

/// The environment variable that tells a command where the mount is.
pub const MOUNT_VARIABLE: &str = "VINEYARD_FS_MOUNT";

/// A folder with the datasets of a store in it; unmounted again when dropped if it was mounted for this.
#[derive(Debug)]
pub struct Mount {
    folder: PathBuf,
    ours: bool,
    /// Removed after the mount.
    _temporary: Option<tempfile::TempDir>,
}

impl Mount {
    /// `folder` if it is mounted already, else mounted there; without a folder, the usual mount if there is one, else
    /// a mount in a temporary folder. With `existing`, the folder as it is.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if the mount fails; the mounting command has said why on standard error.
    pub fn get(folder: Option<&Path>, existing: bool) -> Result<Mount> {
        let as_is = |folder: PathBuf| Mount { folder, ours: false, _temporary: None };
        match folder {
            Some(folder) => {
                let folder = std::path::absolute(folder)?;
                if existing {
                    if !folder.is_dir() {
                        return Err(Error::not_found(format!("{} is not a folder", folder.display())));
                    }
                    return Ok(as_is(folder));
                }
                if mounted_type(&folder).is_some() {
                    return Ok(as_is(folder));
                }
                mount(&folder)?;
                Ok(Mount { folder, ours: true, _temporary: None })
            }
            None => {
                let usual = Path::new(DEFAULT_MOUNT);
                if mounted_type(usual).is_some_and(|kind| kind.starts_with("fuse")) {
                    return Ok(as_is(usual.into()));
                }
                let temporary = tempfile::Builder::new().prefix("vineyard-fs-").tempdir()?;
                let folder = temporary.path().to_owned();
                mount(&folder)?;
                Ok(Mount { folder, ours: true, _temporary: Some(temporary) })
            }
        }
    }

    /// Absolute path.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.ours {
            let status = own_command().and_then(|mut command| Ok(command.arg("unmount").arg(&self.folder).status()?));
            if !status.is_ok_and(|status| status.success()) {
                eprintln!("warning: {} is still mounted: `vineyard-fs unmount` it", self.folder.display());
            }
        }
    }
}

fn own_command() -> Result<Command> {
    let program = std::env::current_exe().context(|| "this program does not find itself".into())?;
    Ok(Command::new(program))
}

fn mount(folder: &Path) -> Result<()> {
    let status = own_command()?.arg("mount").arg(folder).stdout(std::io::stderr()).status()?;
    if status.success() {
        return Ok(());
    }
    Err(Error::new(Kind::Invalid, format!("vineyard could not be mounted at {} ({status})", folder.display())))
}

/// The type of the topmost file system that is mounted exactly at `folder`, from the kernel's list: the folder itself
/// is not touched, since a dead mount would answer late or never.
fn mounted_type(folder: &Path) -> Option<String> {
    let list = std::fs::read("/proc/self/mountinfo").ok()?;
    type_in(&list, folder)
}

/// proc(5): id, parent, device, root, mount point, options, optional fields, `-`, type, source, options.
fn type_in(mountinfo: &[u8], folder: &Path) -> Option<String> {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    let mut types = lines.filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let point = unescape(fields.nth(4)?);
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        (Path::new(OsStr::from_bytes(&point)) == folder).then(|| String::from_utf8_lossy(kind).into_owned())
    });
    types.next_back()
}

/// `\040` is a space in the kernel's lists.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    bytes
}

/// The child that signals are passed on to; 0 is none.
static CHILD: AtomicI32 = AtomicI32::new(0);

extern "C" fn pass_on(signal: libc::c_int) {
    let child = CHILD.load(Ordering::Relaxed);
    if child > 0 {
        // SAFETY: kill(2) is async-signal-safe and takes no pointers.
        unsafe { libc::kill(child, signal) };
    }
}

/// Runs a command to its end. SIGTERM and SIGHUP are passed on to it; SIGINT and SIGQUIT come to it from the terminal
/// itself. This process outlives all of them, since it has to clean up.
fn run_to_end(mut command: Command, what: &str) -> Result<ExitStatus> {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    let passing = SigAction::new(SigHandler::Handler(pass_on), SaFlags::SA_RESTART, SigSet::empty());
    // A handler, not SIG_IGN: a command inherits what is ignored, and not handlers.
    let mut old = Vec::new();
    extern "C" fn nothing(_: libc::c_int) {}
    let keeping = SigAction::new(SigHandler::Handler(nothing), SaFlags::SA_RESTART, SigSet::empty());
    for (signal, action) in [
        (Signal::SIGTERM, &passing),
        (Signal::SIGHUP, &passing),
        (Signal::SIGINT, &keeping),
        (Signal::SIGQUIT, &keeping),
    ] {
        // SAFETY: the handlers only load an atomic and call kill(2), both async-signal-safe.
        old.push((signal, unsafe { sigaction(signal, action) }?));
    }
    let status = command
        .spawn()
        .map_err(|error| Error::new(Kind::NotFound, format!("cannot start {what}")).with_source(error))
        .and_then(|mut child| {
            CHILD.store(i32::try_from(child.id()).unwrap_or(0), Ordering::Relaxed);
            let status = child.wait();
            CHILD.store(0, Ordering::Relaxed);
            Ok(status?)
        });
    for (signal, action) in old {
        // SAFETY: the action is the one that was installed before.
        let _ = unsafe { sigaction(signal, &action) };
    }
    status
}

/// The code that a shell would report.
pub fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Runs a command with a mount; it finds the folder in [`MOUNT_VARIABLE`]. Returns its exit code.
///
/// # Errors
/// As [`Mount::get`]; [`Kind::NotFound`] if the command does not start.
pub fn command(folder: Option<&Path>, existing: bool, command: &[OsString]) -> Result<i32> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(Error::new(Kind::Invalid, "there is no command: vineyard-fs run -- COMMAND"));
    };
    let mount = Mount::get(folder, existing)?;
    let mut child = Command::new(program);
    child.args(arguments).env(MOUNT_VARIABLE, mount.folder());
    Ok(exit_code(run_to_end(child, &program.to_string_lossy())?))
}

/// What `kedro run` is asked to do.
#[derive(Debug, Clone)]
pub struct KedroRun {
    /// See [`Mount::get`].
    pub mount: Option<PathBuf>,
    /// See [`Mount::get`].
    pub existing: bool,
    /// Leave the run's datasets below the mount.
    pub keep: bool,
    /// How tables are stored.
    pub format: Format,
    /// For `kedro run`.
    pub arguments: Vec<String>,
}

/// What the arguments of `kedro run` say that matters here.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wanted {
    env: Option<String>,
    pipelines: Vec<String>,
    conf_source: bool,
}

fn wanted(arguments: &[String]) -> Wanted {
    let mut wanted = Wanted::default();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let (flag, value) = match argument.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => (flag, Some(value.to_owned())),
            // `-pNAME`; `-ns` and `-lv` are flags of their own.
            _ if argument.starts_with("-p") && argument.len() > 2 => ("-p", argument.get(2..).map(str::to_owned)),
            _ if argument.starts_with("-e") && argument.len() > 2 => ("-e", argument.get(2..).map(str::to_owned)),
            _ => (argument.as_str(), None),
        };
        let mut value = || value.clone().or_else(|| arguments.next().cloned());
        match flag {
            "-e" | "--env" => wanted.env = value(),
            "-p" | "--pipeline" => wanted.pipelines = value().into_iter().collect(),
            "--pipelines" => {
                wanted.pipelines = value().unwrap_or_default().split(',').map(|name| name.trim().to_owned()).collect();
            }
            "--conf-source" => wanted.conf_source = true,
            _ => {}
        }
    }
    if wanted.pipelines.is_empty() {
        wanted.pipelines.push(DEFAULT_PIPELINE.into());
    }
    wanted
}

/// Runs a pipeline whose unregistered datasets live on vineyard. Returns the exit code of `kedro run`.
///
/// # Errors
/// One line for the user; the project's files are as they were in any case.
pub fn kedro(project: &Project, interpreter: Interpreter, verbose: bool, ask: &KedroRun) -> Result<i32> {
    let wanted = wanted(&ask.arguments);
    if wanted.conf_source {
        return Err(Error::new(
            Kind::Invalid,
            "--conf-source cannot be given to `vineyard-fs kedro run`, which makes one of its own",
        ));
    }
    let mut session = Session::start(project, interpreter.clone(), verbose)?;
    let facts = session.facts(wanted.env.as_deref(), Some(&wanted.pipelines))?;
    if !facts.versions.kedro_at_least((0, 18)) {
        return Err(Error::new(
            Kind::Unsupported,
            format!(
                "Kedro {} cannot take its configuration from elsewhere: use `catalog create`",
                facts.versions.kedro
            ),
        ));
    }
    let env = wanted.env.clone().unwrap_or_else(|| facts.run_env.clone());
    // Kedro says it best if an environment that was asked for does not exist.
    let env_folder = facts.conf_source.join(&env);
    if wanted.env.is_some() && !env_folder.is_dir() {
        return Err(Error::not_found(format!("there is no environment {env:?} in {}", facts.conf_source.display())));
    }
    let mount = Mount::get(ask.mount.as_deref(), ask.existing)?;
    let data = RunFolder::make(mount.folder(), &project.slug(), ask.keep)?;
    let mut catalog = String::new();
    let mut entries: Vec<super::entries::Planned> = Vec::new();
    for pipeline in &wanted.pipelines {
        let create = Create {
            pipeline: pipeline.clone(),
            env: env.clone(),
            mount: data.path.display().to_string(),
            format: ask.format,
            observe: false,
            catch_all: false,
            force: false,
        };
        for entry in catalog::unregistered(&mut session, &facts, &create)? {
            if !entries.iter().any(|other| other.name == entry.name) {
                catalog.push_str(&yaml::entry(&entry.name, &entry.config, None));
                entries.push(entry);
            }
        }
    }
    drop(session);
    let conf = tempfile::Builder::new().prefix("vineyard-fs-conf-").tempdir()?;
    for name in [&facts.base_env, &env] {
        copy_folder(&facts.conf_source.join(name), &conf.path().join(name), 0)
            .context(|| format!("cannot copy the configuration of {name}"))?;
    }
    let folder = conf.path().join(&env).join("catalog");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("vineyard_fs_run.yml"), catalog)?;

    let kedro = interpreter.path.parent().map(|folder| folder.join("kedro")).filter(|path| path.is_file());
    let mut command = match &kedro {
        Some(kedro) => Command::new(kedro),
        None => {
            let mut command = Command::new(&interpreter.path);
            command.args(["-m", "kedro"]);
            command
        }
    };
    command
        .args(["run", "--conf-source"])
        .arg(conf.path())
        .args(&ask.arguments)
        .current_dir(&project.root)
        .env(MOUNT_VARIABLE, mount.folder())
        // kedro-telemetry would write an identifier into the project's pyproject.toml.
        .env("DO_NOT_TRACK", "1");
    if wanted.env.is_none() {
        // KEDRO_ENV would choose another one than was copied.
        command.args(["--env", &env]);
    }
    let status = run_to_end(command, "kedro run")?;
    data.remove()?;
    Ok(exit_code(status))
}

/// The folder of one run below the mount.
struct RunFolder {
    path: PathBuf,
    keep: bool,
}

impl RunFolder {
    fn make(mount: &Path, slug: &str, keep: bool) -> Result<RunFolder> {
        let seconds = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map(|time| time.as_secs())
            .unwrap_or_default();
        let path = mount.join(format!("kedro-{slug}-{seconds}-{}", std::process::id()));
        std::fs::create_dir(&path).context(|| format!("cannot make {}", path.display()))?;
        Ok(RunFolder { path, keep })
    }

    fn remove(mut self) -> Result<()> {
        if !std::mem::replace(&mut self.keep, true) {
            clean::remove(&self.path)?;
        }
        Ok(())
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if !self.keep {
            let _ = clean::remove(&self.path);
        }
    }
}

/// Copies files and folders (what symbolic links point to, not the links). A folder that is not there is an empty one.
fn copy_folder(from: &Path, to: &Path, depth: u32) -> Result<()> {
    std::fs::create_dir_all(to)?;
    if depth > 32 {
        return Err(Error::new(Kind::Invalid, format!("{} is nested too deeply", from.display())));
    }
    let items = match std::fs::read_dir(from) {
        Ok(items) => items,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    for item in items {
        let item = item?;
        let target = to.join(item.file_name());
        match std::fs::metadata(item.path()) {
            Ok(metadata) if metadata.is_dir() => copy_folder(&item.path(), &target, depth + 1)?,
            Ok(metadata) if metadata.is_file() => {
                std::fs::copy(item.path(), &target).context(|| item.path().display().to_string())?;
            }
            // Sockets, pipes and links to nothing are no configuration.
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn strings(words: &str) -> Vec<String> {
        words.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn arguments_of_kedro_run_are_understood() {
        let found = wanted(&strings("--runner ParallelRunner -p mixed --env=prod -ns x"));
        assert_eq!(found, Wanted { env: Some("prod".into()), pipelines: vec!["mixed".into()], conf_source: false });
        assert_eq!(wanted(&strings("--pipelines a,b --async")).pipelines, ["a", "b"]);
        assert_eq!(wanted(&[]).pipelines, ["__default__"]);
        assert!(wanted(&strings("--conf-source=x")).conf_source);
    }

    #[test]
    fn the_kernels_list_is_read() {
        let list = b"36 35 98:0 / /mnt/a\\040b rw - ext3 /dev/root rw\n37 35 0:9 / /mnt/v rw shared:1 - tmpfs t rw\n\
            38 37 0:10 / /mnt/v rw shared:2 master:1 - fuse.vineyard-fs v rw\n";
        assert_eq!(type_in(list, Path::new("/mnt/a b")).as_deref(), Some("ext3"));
        assert_eq!(type_in(list, Path::new("/mnt/v")).as_deref(), Some("fuse.vineyard-fs"));
        assert_eq!(type_in(list, Path::new("/mnt")), None);
    }

    #[test]
    fn a_command_gets_the_folder_and_its_exit_code_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let script = format!("touch ${MOUNT_VARIABLE}/seen; exit 7");
        let words: Vec<OsString> = ["sh", "-c", &script].map(OsString::from).to_vec();
        assert_eq!(command(Some(dir.path()), true, &words).unwrap(), 7);
        assert!(dir.path().join("seen").is_file());
        let words: Vec<OsString> = ["sh", "-c", "kill -9 $$"].map(OsString::from).to_vec();
        assert_eq!(command(Some(dir.path()), true, &words).unwrap(), 137);
        assert_eq!(command(Some(dir.path()), true, &["/no/such".into()]).unwrap_err().kind(), Kind::NotFound);
    }

    #[test]
    fn configuration_is_copied_with_what_links_point_to() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("base");
        std::fs::create_dir_all(from.join("catalog")).unwrap();
        std::fs::write(from.join("catalog/a.yml"), "a: 1").unwrap();
        std::os::unix::fs::symlink("catalog/a.yml", from.join("b.yml")).unwrap();
        std::os::unix::fs::symlink("nowhere", from.join("c.yml")).unwrap();
        copy_folder(&from, &dir.path().join("copy"), 0).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("copy/b.yml")).unwrap(), "a: 1");
        assert!(!dir.path().join("copy/c.yml").exists());
    }
}
