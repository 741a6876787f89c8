//! `kedro run`: which environment it takes, and mounts of its own, whatever signal comes.

use crate::project::{Kedro, files, kedros, names, refused, success, text};
use crate::vineyardd;
use nix::sys::signal::{SigHandler, Signal, kill, killpg, signal};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const SETTINGS: &str = "\
from kedro.config import OmegaConfigLoader
CONFIG_LOADER_CLASS = OmegaConfigLoader
CONFIG_LOADER_ARGS = {\"base_env\": \"base\", \"default_run_env\": \"dev\"}
";

fn small_pipelines(kedro: &Kedro) {
    kedro.pipelines(
        "def make() -> pd.DataFrame: return pd.DataFrame({'a': [1, 2, 3]})\n\
         def total(table): return int(table['a'].sum())\n",
        "{'__default__': pipeline([node(make, None, 'X', name='make'), node(total, 'X', 'total', name='use')]), \
         'other': pipeline([node(make, None, 'Y', name='make2'), node(total, 'Y', 'sum', name='use2')])}",
    );
}

const TOTAL: &str = "total:\n  type: pickle.PickleDataset\n  filepath: data/@.pkl\n";

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn a_run_takes_the_environment_that_kedro_would_take() {
    for kedro in kedros() {
        small_pipelines(&kedro);
        for env in ["prod", "dev"] {
            kedro.write(&format!("conf/{env}/catalog.yml"), &TOTAL.replace('@', env));
        }
        let written = |name: &str| {
            let path = kedro.project.join(format!("data/{name}.pkl"));
            path.exists() && fs::remove_file(path).is_ok()
        };
        let run = |variable: Option<&str>, arguments: &[&str]| {
            let mut command = kedro.ours_as_is(&["run", "--existing", "--mount"]);
            command.arg(&kedro.mount).arg("--").args(arguments);
            if let Some(env) = variable {
                command.env("KEDRO_ENV", env);
            }
            success(command.output().unwrap());
            (written("prod"), written("dev"))
        };
        assert_eq!(run(None, &[]), (false, false), "{}", kedro.name);
        assert_eq!(run(Some("prod"), &[]), (true, false), "{}", kedro.name);
        assert_eq!(run(Some("prod"), &["--env", "dev"]), (false, true), "{}", kedro.name);
        kedro.write("src/iris/settings.py", SETTINGS);
        fs::remove_dir_all(kedro.project.join("conf/local")).unwrap();
        assert_eq!(run(None, &[]), (false, true), "{}", kedro.name);
        kedro.write("run.yml", "run:\n  env: prod\n");
        assert_eq!(run(None, &["--config", "run.yml"]), (true, false), "{}", kedro.name);

        kedro.write("run.yml", "run:\n  pipeline: other\n");
        success(kedro.ours(&["run", "--existing", "--keep", "--", "--config", "run.yml"]));
        let kept = kedro.mount.join(&names(&kedro.mount)[0]);
        assert_eq!(names(&kept), ["Y.arrow", "sum.pkl"], "{}", kedro.name);
        kedro.write("run.yml", "run:\n  conf_source: conf\n");
        refused(&kedro, &["run", "--existing", "--", "--config", "run.yml"], "--conf-source");
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn a_run_or_catalog_that_kedro_would_not_see_is_refused() {
    for kedro in kedros() {
        small_pipelines(&kedro);
        // Kedro would make the folder and write to the disk.
        let absent = kedro.project.parent().unwrap().join("not/mounted");
        let mut create = kedro.ours_as_is(&["catalog", "create", "--mount"]);
        success(create.arg(&absent).output().unwrap());
        let mut run = kedro.ours_as_is(&["run", "--", "--env", "vineyard"]);
        let said = run.output().unwrap();
        assert_eq!(said.status.code(), Some(1), "{}", text(&said));
        assert!(text(&said).contains("nothing is mounted") && text(&said).lines().count() == 1, "{}", text(&said));
        assert!(!absent.exists());
        // A folder that the user names is right, whatever it is.
        fs::create_dir_all(&absent).unwrap();
        let mut run = kedro.ours_as_is(&["run", "--existing", "--mount"]);
        success(run.arg(&absent).args(["--", "--env", "vineyard"]).output().unwrap());
        assert_eq!(names(&absent), ["X.arrow", "total.pkl"]);
        // What the user keeps in the project is no mount, even if it looks like one.
        let entry =
            |name: &str| format!("{name}:\n  type: pickle.PickleDataSet\n  filepath: data/05_model_input/{name}.pkl\n");
        let class = if kedro.name.contains("018") { "DataSet" } else { "Dataset" };
        let entries = [entry("X"), entry("total")].concat().replace("DataSet", class);
        kedro.write("conf/vineyard/catalog/__default__.yml", &entries);
        let mut run = kedro.ours_as_is(&["run", "--", "--env", "vineyard"]);
        success(run.output().unwrap());
        assert_eq!(names(&kedro.project.join("data/05_model_input")), ["X.pkl", "total.pkl"]);
        fs::remove_dir_all(kedro.project.join("data/05_model_input")).unwrap();
        fs::remove_dir_all(kedro.project.join("conf/vineyard")).unwrap();

        let patterns = "\"config_patterns\": {\"catalog\": [\"datasets*\"]}}";
        kedro.write("src/iris/settings.py", &SETTINGS.replace("dev\"}", &format!("local\", {patterns}")));
        refused(&kedro, &["catalog", "create"], "config_patterns");
        refused(&kedro, &["run", "--existing"], "config_patterns");
    }
}

/// A folder for everything temporary of a run, so that what it leaves shows.
struct Place {
    kedro: Kedro,
    temporary: PathBuf,
    path: std::ffi::OsString,
    _folder: tempfile::TempDir,
}

impl Place {
    fn new(kedro: Kedro) -> Place {
        let folder = tempfile::tempdir().unwrap();
        let temporary = folder.path().canonicalize().unwrap().join("tmp");
        fs::create_dir(&temporary).unwrap();
        let own = vineyardd::binary().parent().unwrap().to_owned();
        let others = std::env::var_os("PATH").unwrap();
        let path = std::env::join_paths([own].into_iter().chain(std::env::split_paths(&others))).unwrap();
        Place { kedro, temporary, path, _folder: folder }
    }

    fn environment(&self, command: &mut Command) {
        command.env("TMPDIR", &self.temporary).env("PATH", &self.path).env_remove("VINEYARD_IPC_SOCKET");
    }

    fn mounts(&self) -> Vec<String> {
        let list = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let points = list.lines().filter_map(|line| line.split(' ').nth(4).map(str::to_owned));
        points.filter(|point| Path::new(point).starts_with(&self.temporary)).collect()
    }

    /// `kedro run` in a process group of its own, as a shell starts it.
    fn start(&self, mount: &[&str]) -> Child {
        let mut command = self.kedro.ours_as_is(&["run"]);
        self.environment(&mut command);
        // A script that runs the tests in the background has them ignore it, and Python leaves that as it is.
        let heed = || {
            // SAFETY: the action is the default one, and no handler is replaced.
            unsafe { signal(Signal::SIGINT, SigHandler::SigDfl) }?;
            Ok(())
        };
        // SAFETY: only the system call that sets the action happens between fork and exec.
        unsafe { command.pre_exec(heed) };
        command.args(mount).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0).spawn().unwrap()
    }

    fn nothing_left(&self, what: &str) {
        assert_eq!(self.mounts(), [""; 0], "{what}");
        // Other programs of the run may keep something there, too: what is ours has a name of ours.
        let left: Vec<String> =
            names(&self.temporary).into_iter().filter(|name| name.starts_with("vineyard-fs")).collect();
        assert_eq!(left, [""; 0], "{what}");
    }
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(120);
    while !done() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn a_mount_of_its_own_goes_with_the_run_whatever_signal_comes() {
    let Some(kedro) = kedros().pop() else { return };
    let place = Place::new(kedro);
    let kedro = &place.kedro;
    kedro.pipelines(
        "import time, pathlib\n\
         def make() -> pd.DataFrame: return pd.DataFrame({'a': [1, 2, 3]})\n\
         def slow(table):\n    \
             pathlib.Path('started').touch()\n    \
             for _ in range(1200):\n        \
                 if pathlib.Path('go on').exists(): break\n        \
                 time.sleep(0.1)\n    \
             return int(table['a'].sum())\n",
        "{'__default__': pipeline([node(make, None, 'X', name='make'), node(slow, 'X', 'total', name='slow')])}",
    );
    let started = kedro.project.join("started");
    let goes_on = kedro.write("go on", "");
    let end = |mut child: Child| {
        let code = child.wait().unwrap().code();
        let _ = fs::remove_file(&started);
        code
    };
    assert_eq!(end(place.start(&[])), Some(0));
    place.nothing_left("a whole run");
    fs::remove_file(goes_on).unwrap();

    type Send = fn(Pid, Signal) -> nix::Result<()>;
    let alone: Send = |pid, signal| kill(pid, signal);
    let group: Send = |pid, signal| killpg(pid, signal);
    for (signal, send) in [(Signal::SIGINT, alone), (Signal::SIGTERM, alone), (Signal::SIGINT, group)] {
        let child = place.start(&[]);
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        wait_until("the run", || started.exists());
        assert_eq!(place.mounts().len(), 1);
        send(pid, signal).unwrap();
        assert_ne!(end(child), Some(0), "{signal}");
        place.nothing_left(&format!("{signal} during the run"));
    }
    // As soon as there is a mount: Kedro does not run yet.
    for (signal, send) in [(Signal::SIGINT, group), (Signal::SIGTERM, alone)] {
        let child = place.start(&[]);
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        wait_until("the mount", || !place.mounts().is_empty());
        for _ in 0..3 {
            // All but the first may find it gone.
            let _ = send(pid, signal);
        }
        let code = end(child);
        assert!(code.is_some_and(|code| code != 0), "{signal}: {code:?}");
        place.nothing_left(&format!("{signal} before the run"));
    }
}

#[test]
#[ignore = "needs the environments that VINEYARD_FS_KEDRO_VENVS names: scripts/test --full has them"]
fn a_mount_is_found_by_any_of_its_names() {
    let Some(kedro) = kedros().pop() else { return };
    let place = Place::new(kedro);
    let own = place.temporary.join("own");
    fs::create_dir(&own).unwrap();
    std::os::unix::fs::symlink(&own, place.temporary.join("link")).unwrap();
    let program = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vineyard-fs"));
        place.environment(&mut command);
        command.args(arguments).current_dir(&place.temporary).output().unwrap()
    };
    let log = place.temporary.join("log");
    success(program(&["mount", "own", "--size", "64M", "--log-file", log.to_str().unwrap()]));
    for name in ["own", "link", "own/", "../tmp/own"] {
        let said = success(program(&["run", "--mount", name, "--", "sh", "-c", "echo $VINEYARD_FS_MOUNT"]));
        assert_eq!(said.trim(), own.to_str().unwrap(), "{name}");
        assert_eq!(place.mounts(), [own.to_str().unwrap()], "{name}");
    }
    success(program(&["unmount", "link"]));

    let before = files(&place.kedro.project);
    let said = program(&["run", "--mount", "none/there", "--", "true"]);
    assert_eq!((said.status.code(), text(&said).lines().count()), (Some(1), 1), "{}", text(&said));
    fs::write(own.join("file"), "x").unwrap();
    let said = program(&["run", "--mount", "own", "--", "true"]);
    assert_eq!((said.status.code(), text(&said).lines().count()), (Some(1), 1), "{}", text(&said));
    assert!(text(&said).contains("not empty"), "{}", text(&said));
    assert!(files(&place.kedro.project) == before);
}
