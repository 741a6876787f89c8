//! `run` and `kedro run`: a command with a mount for as long as it runs.
//!
//! `kedro run` gives the pipeline a copy of its configuration with one catalog file more, in a temporary folder; the
//! project's own files are not touched. The datasets of the run live in a folder of their own below the mount, which
//! goes when the run is over.

mod arguments;
mod signals;

use super::catalog::{self, Create};
use super::entries::{Format, Planned, file_stem, stripped};
use super::introspect::{Facts, Interpreter, Session};
use super::list::{below, local_path};
use super::{DEFAULT_MOUNT, DEFAULT_PIPELINE, Project, clean, yaml};
use crate::error::{Context, Error, Kind, Result};
use crate::fuse::mountinfo;
use signals::Signals;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

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
    /// [`Kind::Invalid`] with what the mounting command said, if it fails.
    pub fn get(folder: Option<&Path>, existing: bool) -> Result<Mount> {
        let as_is = |folder: PathBuf| Mount { folder, ours: false, _temporary: None };
        match folder {
            Some(folder) if existing => {
                let folder = std::path::absolute(folder)?;
                if !folder.is_dir() {
                    return Err(Error::not_found(format!("{} is not a folder", folder.display())));
                }
                Ok(as_is(folder))
            }
            Some(folder) => {
                let folder = mountinfo::absolute(folder)?;
                if mountinfo::at(&folder)?.is_some() {
                    return Ok(as_is(folder));
                }
                mount(&folder)?;
                Ok(Mount { folder, ours: true, _temporary: None })
            }
            None => {
                let usual = Path::new(DEFAULT_MOUNT);
                if mountinfo::at(usual)?.is_some_and(|mounted| mounted.fs_type.starts_with("fuse")) {
                    return Ok(as_is(usual.into()));
                }
                let temporary = tempfile::Builder::new().prefix("vineyard-fs-").tempdir()?;
                let folder = temporary.path().canonicalize()?;
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

/// This program, out of reach of the terminal's signals: a mount is made or taken away as a whole.
fn own_command() -> Result<Command> {
    let program = std::env::current_exe().context(|| "this program does not find itself".into())?;
    let mut command = Command::new(program);
    command.process_group(0);
    Ok(command)
}

fn mount(folder: &Path) -> Result<()> {
    let output = own_command()?.arg("mount").arg(folder).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let mut lines: Vec<&str> = said.lines().collect();
    let reason = if output.status.success() { None } else { Some(lines.pop().unwrap_or("it did not say why")) };
    lines.iter().for_each(|line| eprintln!("{line}"));
    match reason {
        None => {
            eprint!("{}", String::from_utf8_lossy(&output.stdout));
            Ok(())
        }
        Some(reason) => {
            let reason = reason.strip_prefix("vineyard-fs: ").unwrap_or(reason);
            let message = format!("vineyard could not be mounted at {}: {reason}", folder.display());
            Err(Error::new(Kind::Invalid, message))
        }
    }
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
    let signals = Signals::hold()?;
    let with_mount = || {
        let mount = Mount::get(folder, existing)?;
        let mut child = Command::new(program);
        child.args(arguments).env(MOUNT_VARIABLE, mount.folder());
        Ok(exit_code(signals.run(child, &program.to_string_lossy())?))
    };
    signals.code(with_mount())
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

/// Runs a pipeline whose unregistered datasets live on vineyard. Returns the exit code of `kedro run`.
///
/// # Errors
/// One line for the user; the project's files are as they were in any case.
pub fn kedro(project: &Project, interpreter: Interpreter, verbose: bool, ask: &KedroRun) -> Result<i32> {
    let signals = Signals::hold()?;
    signals.code(kedro_with(&signals, project, interpreter, verbose, ask))
}

/// The file with the entries of a run, below the folder of its environment.
const RUN_FILE: &str = "catalog/vineyard_fs_run.yml";

fn kedro_with(
    signals: &Signals,
    project: &Project,
    interpreter: Interpreter,
    verbose: bool,
    ask: &KedroRun,
) -> Result<i32> {
    let mut wanted = arguments::wanted(&ask.arguments, &project.root)?;
    if wanted.pipelines.is_empty() {
        wanted.pipelines.push(DEFAULT_PIPELINE.into());
    }
    let variable = || std::env::var("KEDRO_ENV").ok().filter(|env| !env.is_empty());
    let named = wanted.env.clone().or_else(variable);
    let mut session = Session::start(project, interpreter.clone(), verbose)?;
    let passing = signals.pass_to(session.id());
    let facts = session.facts(named.as_deref(), Some(&wanted.pipelines))?;
    if !facts.versions.kedro_at_least((0, 18)) {
        return Err(Error::new(
            Kind::Unsupported,
            format!(
                "Kedro {} cannot take its configuration from elsewhere: use `catalog create`",
                facts.versions.kedro
            ),
        ));
    }
    let env = named.clone().unwrap_or_else(|| facts.run_env.clone());
    if named.is_some() && !facts.conf_source.join(&env).is_dir() {
        return Err(Error::not_found(format!("there is no environment {env:?} in {}", facts.conf_source.display())));
    }
    if !session.loads(&env, RUN_FILE)? {
        return Err(catalog::not_loaded(RUN_FILE));
    }
    if let Some((name, folder)) = not_mounted(&facts, &project.root, &env, ask.mount.as_deref()) {
        return Err(Error::new(
            Kind::Invalid,
            format!(
                "the environment {env} keeps {name} in {0}, where nothing is mounted: `vineyard-fs mount {0}` first, \
                 or give --mount {0}",
                folder.display()
            ),
        ));
    }
    let mount = Mount::get(ask.mount.as_deref(), ask.existing)?;
    signals.check()?;
    let data = RunFolder::make(mount.folder(), &project.slug(), ask.keep)?;
    let mut catalog = String::new();
    let mut entries: Vec<Planned> = Vec::new();
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
    drop(passing);
    drop(session);
    let conf = tempfile::Builder::new().prefix("vineyard-fs-conf-").tempdir()?;
    for name in [&facts.base_env, &env] {
        copy_folder(&facts.conf_source.join(name), &conf.path().join(name), 0)
            .context(|| format!("cannot copy the configuration of {name}"))?;
    }
    let file = conf.path().join(&env).join(RUN_FILE);
    file.parent().map_or(Ok(()), std::fs::create_dir_all)?;
    std::fs::write(file, catalog)?;

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
    if !wanted.env_given {
        command.args(["--env", &env]);
    }
    Ok(exit_code(signals.run(command, "kedro run")?))
}

/// A dataset that a node would save below the folder that its entry takes for a mount, and that folder, if nothing is
/// mounted there and it is not `mount`: the data would go to the disk.
fn not_mounted(facts: &Facts, root: &Path, env: &str, mount: Option<&Path>) -> Option<(String, PathBuf)> {
    let mounts = mountinfo::all().unwrap_or_default();
    let is_mounted = |folder: &Path| {
        let mut above = mounts.iter().filter(|mounted| folder.starts_with(&mounted.mountpoint));
        above.any(|mounted| mounted.fs_type.starts_with("fuse") && mounted.mountpoint != Path::new("/"))
    };
    let ours = mount.and_then(|mount| std::path::absolute(mount).ok());
    for (pipeline, described) in &facts.pipelines {
        let file = facts.conf_source.join(env).join("catalog").join(format!("{pipeline}.yml"));
        let written = std::fs::read_to_string(file).ok().and_then(|text| yaml::parse(&text).ok()).unwrap_or_default();
        for (name, dataset) in described.datasets.iter().filter(|(_, dataset)| !dataset.producers.is_empty()) {
            let Some(entry) = facts.merged.get(name).filter(|entry| !entry.in_memory()) else { continue };
            let Some(path) = entry.filepath.as_deref().and_then(|path| local_path(path, root)) else { continue };
            // `data/05_model_input/x.pkl` and the like: files that the user keeps in the project.
            if path.starts_with(root) {
                continue;
            }
            let folder = if below(&path, DEFAULT_MOUNT) {
                PathBuf::from(DEFAULT_MOUNT)
            } else if written.contains_key(name.as_str())
                && !dataset.parameter
                && let Some(folder) = expected_mount(name, &path)
                // A folder with files in it is one that somebody chose.
                && std::fs::read_dir(&folder).map_or(true, |mut items| items.next().is_none())
            {
                folder
            } else {
                continue;
            };
            let resolved = mountinfo::absolute(&folder).unwrap_or_else(|_| folder.clone());
            if !is_mounted(&resolved) && !ours.as_ref().is_some_and(|ours| folder.starts_with(ours)) {
                return Some((name.clone(), folder));
            }
        }
    }
    None
}

/// The mount for which `catalog create` would have written this path.
fn expected_mount(name: &str, path: &Path) -> Option<PathBuf> {
    let stem = file_stem(stripped(name)).ok()?;
    let path = path.to_str()?;
    let folder = [".arrow", ".parquet", ".pkl"]
        .iter()
        .find_map(|extension| path.strip_suffix(extension)?.strip_suffix(&stem)?.strip_suffix('/'));
    folder.filter(|folder| !folder.is_empty()).map(PathBuf::from)
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
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = clean::remove(&self.path, None)
        {
            eprintln!("warning: {error}");
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

    #[test]
    fn a_path_tells_which_mount_it_was_written_for() {
        let mount = |name: &str, path: &str| expected_mount(name, Path::new(path));
        assert_eq!(mount("X@pandas", "/mnt/v/X.parquet"), Some("/mnt/v".into()));
        assert_eq!(mount("a/b", "/mnt/v/a/b.pkl"), Some("/mnt/v".into()));
        assert_eq!(mount("X", "/mnt/v/xX.pkl"), None);
        assert_eq!(mount("X", "/X.pkl"), None);
        assert_eq!(mount("X", "/mnt/v/X.csv"), None);
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
