//! `docker init` and `docker build`: an image of a Kedro project.
//!
//! The image needs nothing of vineyard: the data comes through files of the mount.

use super::{Project, unified_diff, write_atomically};
use crate::error::{Context, Error, Kind, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The user and group of the image: the one that Argo's non-root executor uses.
pub const USER: u32 = 8737;

/// A program that builds images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// Docker
    Docker,
    /// Podman
    Podman,
    /// Buildah
    Buildah,
}

impl Engine {
    fn program(self) -> &'static str {
        match self {
            Engine::Docker => "docker",
            Engine::Podman => "podman",
            Engine::Buildah => "buildah",
        }
    }

    /// The first engine on the `PATH`.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is none, or not the one that was named.
    pub fn choose(named: Option<Engine>) -> Result<Engine> {
        let on_path = |engine: &Engine| {
            let path = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&path).any(|folder| folder.join(engine.program()).is_file())
        };
        match named {
            Some(engine) if on_path(&engine) => Ok(engine),
            Some(engine) => Err(Error::not_found(format!("{} is not on the PATH", engine.program()))),
            None => [Engine::Docker, Engine::Podman, Engine::Buildah]
                .into_iter()
                .find(on_path)
                .ok_or_else(|| Error::not_found("no container engine on the PATH: install docker, podman or buildah")),
        }
    }
}

/// Where the project keeps what it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirements {
    /// `uv.lock`, read by uv.
    UvLock,
    /// A file for pip, relative to the project.
    File(PathBuf),
    /// `[project] dependencies` of `pyproject.toml`.
    Pyproject,
}

fn requirements(project: &Project) -> Result<Requirements> {
    if project.root.join("uv.lock").is_file() {
        return Ok(Requirements::UvLock);
    }
    // A lock file that pip-tools made pins more than what it was made from.
    for file in ["requirements.lock", "requirements.txt", "src/requirements.lock", "src/requirements.txt"] {
        if project.root.join(file).is_file() {
            return Ok(Requirements::File(file.into()));
        }
    }
    if project.has_dependencies {
        return Ok(Requirements::Pyproject);
    }
    Err(Error::not_found(format!(
        "{} has neither requirements.txt, src/requirements.txt, uv.lock nor [project] dependencies in pyproject.toml",
        project.root.display()
    )))
}

/// Where Kedro's default configuration has the environment that it loads when none is named.
pub const USUAL_RUN_ENV: &str = "conf/local";

/// A word for the shell.
fn quoted(word: &str) -> String {
    if word.chars().all(|c| c.is_ascii_alphanumeric() || "_./-".contains(c)) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// The `Dockerfile` of a project. `run_env` is the folder of the environment that Kedro loads when none is named,
/// relative to the project; `None` if it lies outside.
///
/// # Errors
/// [`Kind::NotFound`] if the project does not say what it needs.
pub fn dockerfile(project: &Project, base_image: &str, run_env: Option<&Path>) -> Result<String> {
    let install = match requirements(project)? {
        Requirements::UvLock => "COPY pyproject.toml uv.lock /tmp/project/\n\
             RUN pip install --no-cache-dir uv \\\n \
             && cd /tmp/project \\\n \
             && uv export --frozen --no-dev --no-emit-project --format requirements-txt -o requirements.txt \\\n \
             && python -m venv /opt/venv \\\n \
             && /opt/venv/bin/pip install --no-cache-dir -r requirements.txt\n"
            .to_owned(),
        Requirements::File(file) => format!(
            "COPY {} /tmp/project/requirements.txt\n\
             RUN python -m venv /opt/venv \\\n \
             && /opt/venv/bin/pip install --no-cache-dir -r /tmp/project/requirements.txt\n",
            file.display()
        ),
        // Only the list of dependencies is read, so that a change of the source does not install them again.
        Requirements::Pyproject => "COPY pyproject.toml /tmp/project/\n\
             RUN python -m venv /opt/venv \\\n \
             && /opt/venv/bin/pip install --no-cache-dir tomli \\\n \
             && /opt/venv/bin/python -c \"import tomli; \
             print('\\n'.join(tomli.load(open('/tmp/project/pyproject.toml', 'rb'))['project']['dependencies']))\" \
             > /tmp/project/requirements.txt \\\n \
             && /opt/venv/bin/pip install --no-cache-dir -r /tmp/project/requirements.txt\n"
            .to_owned(),
    };
    let run_env = run_env.map_or_else(String::new, |folder| {
        let folder = quoted(&folder.to_string_lossy());
        format!(
            "# Kedro wants the folder, and credentials stay out of the image.\n\
             RUN mkdir -p {folder} && chown {USER}:{USER} {folder}\n"
        )
    });
    Ok(format!(
        "# The Kedro project {name}, as `vineyard-fs kedro docker init` wrote it; yours to change.\n\
         ARG BASE_IMAGE={base_image}\n\
         \n\
         # What the project needs, in a layer that only changes with its requirements.\n\
         FROM ${{BASE_IMAGE}} AS requirements\n\
         {install}\
         \n\
         FROM ${{BASE_IMAGE}}\n\
         COPY --from=requirements /opt/venv /opt/venv\n\
         ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 DO_NOT_TRACK=1\n\
         RUN mkdir -p /home/kedro/project \\\n \
         && echo 'kedro:x:{USER}:{USER}::/home/kedro:/bin/sh' >> /etc/passwd \\\n \
         && echo 'kedro:x:{USER}:' >> /etc/group \\\n \
         && chown -R {USER}:{USER} /home/kedro\n\
         WORKDIR /home/kedro/project\n\
         COPY --chown={USER}:{USER} . .\n\
         {run_env}\
         # By number, so that Kubernetes can tell that it is not root.\n\
         USER {USER}:{USER}\n\
         CMD [\"kedro\", \"run\"]\n",
        name = project.package_name,
    ))
}

/// The `.dockerignore` of a project.
pub fn dockerignore(project: &Project) -> String {
    let source = project.source_dir.display().to_string();
    let source = source.trim_start_matches("./").trim_end_matches('/');
    let mut text = DOCKERIGNORE.to_owned();
    // Without a folder of its own the code lies beside everything that is left out.
    if !source.is_empty() && source != "." && !source.contains(['*', '?', '[', '\\', '\n']) {
        text.push_str(&format!("# Code is no credential, whatever its file is called.\n!{source}/**/*.py\n"));
    }
    text
}

const DOCKERIGNORE: &str = "# Not needed in the image, or not to be in it.
.git
.gitignore
.venv
venv
.viz
.ipynb_checkpoints
.pytest_cache
**/__pycache__
**/*.pyc
**/*.log
Dockerfile
.dockerignore
argo-*.yml

# What pipelines make. Raw data goes along; take the second line out if it comes from elsewhere.
data/*
!data/01_raw

# Credentials, in every form and place that Kedro loads them from. The last lines count most.
**/local
**/credentials*
**/.env*
";

/// The base image for an interpreter such as `3.11.7`, as the official slim images are tagged.
pub fn base_image(python: &str) -> String {
    let mut parts = python.split('.');
    match (parts.next(), parts.next()) {
        (Some(major), Some(minor)) => format!("python:{major}.{minor}-slim"),
        _ => "python:3.11-slim".into(),
    }
}

/// What became of a file that `init` writes.
#[derive(Debug, PartialEq, Eq)]
pub enum Written {
    /// It is new.
    New(PathBuf),
    /// It was there with the same content.
    Same(PathBuf),
    /// The user's file stays; the diff to what would have been written.
    Theirs(PathBuf, String),
}

/// Writes `Dockerfile` and `.dockerignore` unless there are files of that name.
///
/// # Errors
/// The system's; [`Kind::NotFound`] as [`dockerfile`].
pub fn init(project: &Project, base_image: &str, run_env: Option<&Path>) -> Result<Vec<Written>> {
    let files = [("Dockerfile", dockerfile(project, base_image, run_env)?), (".dockerignore", dockerignore(project))];
    files.into_iter().map(|(name, content)| write_new(&project.root.join(name), &content)).collect()
}

fn write_new(path: &Path, content: &str) -> Result<Written> {
    match std::fs::read_to_string(path) {
        Ok(old) if old == content => Ok(Written::Same(path.into())),
        Ok(old) => Ok(Written::Theirs(path.into(), unified_diff(path, &old, content))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            write_atomically(path, content)?;
            Ok(Written::New(path.into()))
        }
        Err(error) => Err(Error::from(error)).context(|| format!("cannot read {}", path.display())),
    }
}

/// `NAME:VERSION` of a project, in the letters that an image reference may have.
pub fn image_name(project: &Project) -> String {
    let tag: String = project
        .version_or_default()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "_.-".contains(c) { c } else { '-' })
        .collect();
    format!("{}:{}", project.slug(), tag.trim_start_matches(['.', '-']))
}

/// How to build.
#[derive(Debug, Clone)]
pub struct Build {
    /// With which program.
    pub engine: Engine,
    /// Tag of the image.
    pub image: String,
    /// Instead of the one in the `Dockerfile`.
    pub base_image: Option<String>,
    /// For example `linux/arm64`.
    pub platform: Option<String>,
    /// Passed on to the engine.
    pub arguments: Vec<String>,
}

/// Builds the image with the project's `Dockerfile`; the engine's output goes where this program's goes.
///
/// # Errors
/// [`Kind::NotFound`] if there is no `Dockerfile`, [`Kind::Invalid`] if the engine fails.
pub fn build(project: &Project, ask: &Build) -> Result<()> {
    let file = project.root.join("Dockerfile");
    if !file.is_file() {
        return Err(Error::not_found(format!("there is no {}", file.display())));
    }
    let program = ask.engine.program();
    let mut command = Command::new(program);
    command.arg("build").args(["-t", &ask.image, "-f"]).arg(&file);
    if let Some(image) = &ask.base_image {
        command.arg("--build-arg").arg(format!("BASE_IMAGE={image}"));
    }
    if let Some(platform) = &ask.platform {
        command.args(["--platform", platform]);
    }
    command.args(&ask.arguments).arg(&project.root);
    let status = command
        .status()
        .map_err(|error| Error::new(Kind::NotFound, format!("cannot start {program}")).with_source(error))?;
    if status.success() {
        return Ok(());
    }
    Err(Error::new(
        Kind::Invalid,
        format!(
            "`{program} build` failed ({status}): its messages above say why, or start its daemon; nothing was tagged"
        ),
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn project(root: &Path) -> Project {
        Project {
            root: root.into(),
            package_name: "my_shop".into(),
            source_dir: "src".into(),
            version: Some("1.0+local".into()),
            requires_python: None,
            has_dependencies: false,
        }
    }

    #[test]
    fn requirements_are_found_where_projects_keep_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut project = project(dir.path());
        assert_eq!(dockerfile(&project, "x", Some(Path::new(USUAL_RUN_ENV))).unwrap_err().kind(), Kind::NotFound);
        project.has_dependencies = true;
        assert!(dockerfile(&project, "x", Some(Path::new(USUAL_RUN_ENV))).unwrap().contains("tomli"));
        std::fs::create_dir(dir.path().join("src")).unwrap();
        std::fs::write(dir.path().join("src/requirements.txt"), "kedro\n").unwrap();
        assert!(
            dockerfile(&project, "x", Some(Path::new(USUAL_RUN_ENV))).unwrap().contains("COPY src/requirements.txt")
        );
        std::fs::write(dir.path().join("requirements.txt"), "kedro\n").unwrap();
        let text = dockerfile(&project, "python:3.11-slim", None).unwrap();
        assert!(text.contains("COPY requirements.txt") && text.contains("USER 8737:8737"));
        assert!(text.contains("ARG BASE_IMAGE=python:3.11-slim"));
    }

    #[test]
    fn the_folder_that_kedro_wants_is_made_where_it_wants_it() {
        let mut project = project(Path::new("/nonexistent"));
        project.has_dependencies = true;
        let text = dockerfile(&project, "x", Some(Path::new("settings/kedro conf/dev's"))).unwrap();
        let folder = "'settings/kedro conf/dev'\\''s'";
        assert!(text.contains(&format!("\nRUN mkdir -p {folder} && chown 8737:8737 {folder}\n")), "{text}");
        assert!(!dockerfile(&project, "x", None).unwrap().contains("conf/"));
    }

    /// moby/patternmatcher: the last pattern that matches a path or a folder above it decides.
    fn left_out(ignore: &str, path: &str) -> bool {
        fn matches(pattern: &[&str], path: &[&str]) -> bool {
            match (pattern.split_first(), path.split_first()) {
                (None, _) => true,
                (Some((&"**", rest)), Some((_, below))) => matches(rest, path) || matches(pattern, below),
                (Some((part, rest)), Some((name, below))) => part_matches(part, name) && matches(rest, below),
                (Some(_), None) => false,
            }
        }
        fn part_matches(pattern: &str, name: &str) -> bool {
            match pattern.split_once('*') {
                None => pattern == name,
                Some((before, after)) => name.strip_prefix(before).is_some_and(|rest| {
                    (0..=rest.len()).filter_map(|at| rest.get(at..)).any(|rest| part_matches(after, rest))
                }),
            }
        }
        let path: Vec<&str> = path.split('/').collect();
        let lines = ignore.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.fold(false, |out, line| {
            let pattern: Vec<&str> = line.trim_start_matches('!').split('/').collect();
            if matches(&pattern, &path) { !line.starts_with('!') } else { out }
        })
    }

    #[test]
    fn credentials_stay_out_of_the_image() {
        let ignore = dockerignore(&project(Path::new("/")));
        for path in [
            "conf/local/x.yml",
            "conf/prod/credentials.yml",
            "conf/prod/credentials.yaml",
            "conf/prod/credentials.json",
            "conf/prod/credentials/db.yml",
            "conf/base/credentials_db.yaml",
            "settings/kedro conf/local/credentials.yml",
            "src/shop/credentials.json",
            "data/01_raw/.env",
            ".env",
            ".env.prod",
            ".envrc",
            "notebooks/.env",
            "data/02_intermediate/x.csv",
            "src/shop/__pycache__/x.pyc",
            ".git/config",
        ] {
            assert!(left_out(&ignore, path), "{path} would be in the image");
        }
        for path in [
            "conf/base/catalog.yml",
            "conf/vineyard/catalog/__default__.yml",
            "src/shop/credentials.py",
            "src/shop/local/nodes.py",
            "src/shop/pipeline_registry.py",
            "data/01_raw/iris.csv",
            "pyproject.toml",
            "requirements.txt",
        ] {
            assert!(!left_out(&ignore, path), "{path} would be missing");
        }
        let mut flat = project(Path::new("/"));
        flat.source_dir = ".".into();
        assert!(left_out(&dockerignore(&flat), "conf/local/x.py"));
    }

    #[test]
    fn init_never_overwrites() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("requirements.txt"), "kedro\n").unwrap();
        std::fs::write(dir.path().join("Dockerfile"), "FROM scratch\n").unwrap();
        let written = init(&project(dir.path()), "x", Some(Path::new(USUAL_RUN_ENV))).unwrap();
        assert!(matches!(&written[0], Written::Theirs(_, diff) if diff.contains("-FROM scratch")));
        assert!(matches!(&written[1], Written::New(_)));
        assert_eq!(std::fs::read_to_string(dir.path().join("Dockerfile")).unwrap(), "FROM scratch\n");
        assert!(matches!(
            &init(&project(dir.path()), "x", Some(Path::new(USUAL_RUN_ENV))).unwrap()[1],
            Written::Same(_)
        ));
    }

    #[test]
    fn images_are_called_after_the_project() {
        assert_eq!(image_name(&project(Path::new("/"))), "my-shop:1.0-local");
        assert_eq!(base_image("3.12.1"), "python:3.12-slim");
    }
}
