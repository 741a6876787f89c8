//! A Kedro project for a test, and what is asked of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// One Kedro with a project of its own and a folder that stands for the mount.
pub struct Kedro {
    pub name: &'static str,
    /// Programs of its environment.
    pub bin: PathBuf,
    pub project: PathBuf,
    pub mount: PathBuf,
    _folder: tempfile::TempDir,
}

/// Every environment there is, each with a fresh copy of the example project.
pub fn kedros() -> Vec<Kedro> {
    let venvs = std::env::var_os("VINEYARD_FS_KEDRO_VENVS");
    let venvs = venvs.expect("VINEYARD_FS_KEDRO_VENVS names the folder with the Kedro environments");
    let found: Vec<Kedro> = ["kedro018", "kedro019", "kedro1"]
        .into_iter()
        .filter_map(|name| {
            let bin = Path::new(&venvs).join(name).join("bin");
            if bin.join("kedro").is_file() {
                return Some(Kedro::new(name, bin));
            }
            eprintln!("left out: there is no {}", bin.join("kedro").display());
            None
        })
        .collect();
    assert!(!found.is_empty(), "VINEYARD_FS_KEDRO_VENVS has no environment");
    found
}

impl Kedro {
    fn new(name: &'static str, bin: PathBuf) -> Kedro {
        let folder = tempfile::tempdir().unwrap();
        let project = folder.path().join("iris");
        copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kedro/iris"), &project);
        let mount = match std::env::var_os("VINEYARD_FS_KEDRO_MOUNT") {
            Some(mount) => Path::new(&mount).join(folder.path().file_name().unwrap()),
            None => folder.path().join("mount"),
        };
        fs::create_dir(&mount).unwrap();
        let kedro = Kedro { name, bin, project, mount, _folder: folder };
        let version = kedro.python("import importlib.metadata as m; print(m.version('kedro'))");
        let pyproject = kedro.project.join("pyproject.toml");
        let text = fs::read_to_string(&pyproject).unwrap().replace("@KEDRO_VERSION@", version.trim());
        fs::write(pyproject, text).unwrap();
        success(kedro.command("python").arg("make_data.py").output().unwrap());
        kedro
    }

    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command
            .current_dir(&self.project)
            .env("DO_NOT_TRACK", "1")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("PYTHONPATH", self.project.join("src"))
            .env("COLUMNS", "200");
        command
    }

    pub fn python(&self, code: &str) -> String {
        success(self.command("python").args(["-c", code]).output().unwrap())
    }

    pub fn kedro_run(&self, arguments: &[&str]) -> String {
        success(self.command("kedro").arg("run").args(arguments).output().unwrap())
    }

    /// `vineyard-fs kedro ...` as it is called with this environment active.
    pub fn ours(&self, arguments: &[&str]) -> Output {
        let words = arguments.iter().position(|word| *word == "--").unwrap_or(arguments.len());
        let mut command = self.ours_as_is(&arguments[..words]);
        if !matches!(arguments[0], "docker") {
            command.arg("--mount").arg(&self.mount);
        }
        command.args(&arguments[words..]).output().unwrap()
    }

    /// `vineyard-fs kedro ...` with nothing but these arguments, to be run in the project.
    pub fn ours_as_is(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vineyard-fs"));
        command.arg("kedro").args(arguments).current_dir(&self.project);
        command.env("VIRTUAL_ENV", self.bin.parent().unwrap()).env("COLUMNS", "200").env_remove("KEDRO_ENV");
        command
    }

    /// A file of the project, with these contents from now on.
    pub fn write(&self, path: &str, content: &str) -> PathBuf {
        let path = self.project.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    pub fn read(&self, path: &str) -> String {
        fs::read_to_string(self.project.join(path)).unwrap()
    }

    /// Puts other pipelines into the project: functions, and an expression for the dictionary of pipelines.
    pub fn pipelines(&self, functions: &str, pipelines: &str) {
        let code = format!(
            "import pandas as pd\nfrom kedro.pipeline import node, pipeline\n{functions}\n\
             def register_pipelines():\n    return {pipelines}\n"
        );
        self.write("src/iris/pipeline_registry.py", &code);
    }

    pub fn catalog_file(&self, pipeline: &str) -> PathBuf {
        self.project.join(format!("conf/vineyard/catalog/{pipeline}.yml"))
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for item in fs::read_dir(from).unwrap() {
        let item = item.unwrap();
        if item.file_type().unwrap().is_dir() {
            copy(&item.path(), &to.join(item.file_name()));
        } else {
            fs::copy(item.path(), to.join(item.file_name())).unwrap();
        }
    }
}

pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

pub fn success(output: Output) -> String {
    assert!(output.status.success(), "{}", text(&output));
    text(&output)
}

/// One line on standard error, exit code 1, and every file as it was.
pub fn refused(kedro: &Kedro, arguments: &[&str], part: &str) {
    let before = files(&kedro.project);
    let output = kedro.ours(arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{}: {arguments:?}: {}", kedro.name, text(&output));
    assert_eq!(said.lines().count(), 1, "{}: {arguments:?}: {said}", kedro.name);
    assert!(said.contains(part), "{}: {arguments:?}: {said}", kedro.name);
    assert!(files(&kedro.project) == before, "{}: {arguments:?} changed files", kedro.name);
}

/// Every file below a folder with its content.
pub fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for item in fs::read_dir(folder).unwrap() {
        let path = item.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.insert(path.clone(), fs::read(path).unwrap());
        }
    }
    found
}

pub fn names(folder: &Path) -> Vec<String> {
    let items = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = items.map(|item| item.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
