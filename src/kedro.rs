//! Kedro: a pipeline shares its data through vineyard, with ordinary file datasets.
//!
//! Nothing is installed into the project. Its own interpreter is asked what the pipelines contain ([`introspect`]);
//! from that come a catalog of ordinary datasets below the mount ([`catalog`], [`entries`]), listings ([`list`]),
//! clean-up ([`clean`]), runs that leave the project as it was ([`run`]), container images ([`docker`]) and workflows
//! ([`argo`]). Works with Kedro 0.18, 0.19 and 1.x; with 0.17 as far as its interfaces allow.

pub mod argo;
pub mod catalog;
pub mod clean;
pub mod docker;
pub mod entries;
pub mod introspect;
pub mod list;
pub mod run;
pub mod yaml;

use crate::error::{Context, Error, Kind, Result};
use std::path::{Path, PathBuf};

/// Where datasets live if nothing else is said: a mount of this program.
pub const DEFAULT_MOUNT: &str = "/mnt/vineyard";

/// The Kedro environment that the catalog is written for, as the official plugin does.
pub const DEFAULT_ENV: &str = "vineyard";

/// The pipeline that `kedro run` runs without a name.
pub const DEFAULT_PIPELINE: &str = "__default__";

/// A Kedro project on disk, as far as its `pyproject.toml` tells; no code of it has run.
#[derive(Debug, Clone)]
pub struct Project {
    /// Absolute path of the folder that holds `pyproject.toml`.
    pub root: PathBuf,
    /// `[tool.kedro] package_name`.
    pub package_name: String,
    /// `[tool.kedro] source_dir`, relative to the root; `src` by default.
    pub source_dir: PathBuf,
    /// `[project] version`, if it is written there.
    pub version: Option<String>,
    /// `[project] requires-python`, if it is written there.
    pub requires_python: Option<String>,
    /// Whether `[project]` lists dependencies.
    pub has_dependencies: bool,
}

impl Project {
    /// The project in `path`, or in the nearest folder above it.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if no `pyproject.toml` with a `[tool.kedro]` table is there, [`Kind::Malformed`] if the
    /// file is not TOML or lacks the package's name.
    pub fn find(path: &Path) -> Result<Project> {
        let start = path.canonicalize().context(|| format!("{}", path.display()))?;
        for folder in start.ancestors() {
            let file = folder.join("pyproject.toml");
            let Ok(bytes) = std::fs::read(&file) else { continue };
            let text = match String::from_utf8(bytes) {
                Ok(text) => text,
                Err(error) if String::from_utf8_lossy(error.as_bytes()).contains("[tool.kedro]") => {
                    return Err(Error::malformed(format!("{}: not in UTF-8, as TOML is", file.display())));
                }
                Err(_) => continue,
            };
            let table: toml::Table = toml::from_str(&text).map_err(|error| {
                let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
                Error::malformed(format!("{}:{line}: not valid TOML: {}", file.display(), error.message()))
            })?;
            let Some(kedro) = table.get("tool").and_then(|tool| tool.get("kedro")) else { continue };
            let text_of = |table: &toml::Value, key: &str| table.get(key).and_then(|v| v.as_str()).map(str::to_owned);
            let package_name = text_of(kedro, "package_name")
                .ok_or_else(|| Error::malformed(format!("{}: [tool.kedro] has no package_name", file.display())))?;
            let project = table.get("project");
            return Ok(Project {
                root: folder.to_owned(),
                package_name,
                source_dir: text_of(kedro, "source_dir").unwrap_or_else(|| "src".to_owned()).into(),
                version: project.and_then(|project| text_of(project, "version")),
                requires_python: project.and_then(|project| text_of(project, "requires-python")),
                has_dependencies: project.and_then(|project| project.get("dependencies")).is_some(),
            });
        }
        Err(Error::not_found(format!(
            "{} is not in a Kedro project: no pyproject.toml with a [tool.kedro] table here or above; \
             go to the project's folder or give --project DIR",
            start.display()
        )))
    }

    /// The project's folder as a name for images and workflows: its package, with dashes.
    pub fn slug(&self) -> String {
        argo::dns_label(&self.package_name)
    }

    /// `[project] version`, or `__version__` of the package, or `0.1.0`.
    pub fn version_or_default(&self) -> String {
        if let Some(version) = &self.version {
            return version.clone();
        }
        let init = self.root.join(&self.source_dir).join(self.package_name.replace('.', "/")).join("__init__.py");
        let text = std::fs::read_to_string(init).unwrap_or_default();
        let found = text.lines().find_map(|line| {
            let value = line.strip_prefix("__version__")?.trim_start().strip_prefix('=')?.trim();
            let value = value.trim_matches(|c| c == '"' || c == '\'');
            (!value.is_empty() && !value.contains(['"', '\'', ' '])).then(|| value.to_owned())
        });
        found.unwrap_or_else(|| "0.1.0".to_owned())
    }
}

/// Refuses what cannot be one folder's name: an environment or a pipeline from the command line ends up in a path.
fn folder_name(what: &str, name: &str) -> Result<()> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0', '\n']) {
        return Err(Error::new(Kind::Invalid, format!("{what} {name:?} cannot be the name of a file")));
    }
    Ok(())
}

/// A text with the change from `old` to `new` as a unified diff, three lines of context.
pub(crate) fn unified_diff(path: &Path, old: &str, new: &str) -> String {
    let name = path.display().to_string();
    let before = if old.is_empty() { "/dev/null".to_owned() } else { name.clone() };
    similar::TextDiff::from_lines(old, new).unified_diff().context_radius(3).header(&before, &name).to_string()
}

/// Writes a file whole or not at all: a neighbour first, then renamed over the name. Keeps the old file's mode.
pub(crate) fn write_atomically(path: &Path, content: &str) -> Result<()> {
    use std::io::Write;
    let folder = path.parent().unwrap_or(Path::new("."));
    let context = || format!("cannot write {}", path.display());
    // Follow a symbolic link, so that the link stays one.
    let target = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let folder = target.parent().unwrap_or(folder).to_owned();
    let temporary = folder.join(format!(
        ".{}.{}.tmp",
        target.file_name().unwrap_or_default().to_string_lossy(),
        std::process::id()
    ));
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&temporary)?;
        if let Ok(old) = std::fs::metadata(&target) {
            file.set_permissions(old.permissions())?;
        }
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, &target)
    };
    write()
        .inspect_err(|_| {
            // The failed neighbour is of no use; the first error is the one to tell.
            let _ = std::fs::remove_file(&temporary);
        })
        .context(context)
}

/// Writes a file that this program made; one of that name with other content needs `force`. Whether it was written.
///
/// # Errors
/// [`Kind::Exists`] with the file as it was, after its diff went to standard error; the system's.
pub fn write_generated(path: &Path, content: &str, force: bool) -> Result<bool> {
    match std::fs::read_to_string(path) {
        Ok(old) if old == content => return Ok(false),
        Ok(old) if !force => {
            eprint!("{}", unified_diff(path, &old, content));
            return Err(Error::new(
                Kind::Exists,
                format!("{} exists and differs as shown: --force overwrites it", path.display()),
            ));
        }
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::from(error)).context(|| format!("cannot read {}", path.display())),
    }
    write_atomically(path, content)?;
    Ok(true)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_project_is_found_from_a_folder_inside_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("src/shop")).unwrap();
        std::fs::write(
            dir.path().join("pyproject.toml"),
            "[tool.kedro]\npackage_name = \"my_shop\"\nproject_name = \"Shop\"\n",
        )
        .unwrap();
        let project = Project::find(&dir.path().join("src/shop")).unwrap();
        assert_eq!(project.root, dir.path().canonicalize().unwrap());
        assert_eq!((project.package_name.as_str(), project.slug().as_str()), ("my_shop", "my-shop"));
        assert_eq!(project.version_or_default(), "0.1.0");
    }

    #[test]
    fn what_is_no_project_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Project::find(dir.path()).unwrap_err().kind(), Kind::NotFound);
        std::fs::write(dir.path().join("pyproject.toml"), "[tool.kedro\n").unwrap();
        let error = Project::find(dir.path()).unwrap_err();
        assert_eq!(error.kind(), Kind::Malformed);
        assert!(error.to_string().contains("pyproject.toml:1"), "{error}");
        assert_eq!(error.to_string().lines().count(), 1, "{error}");
        std::fs::write(dir.path().join("pyproject.toml"), b"[tool.kedro]\npackage_name = \"a\" # gr\xfc\xdfe\n")
            .unwrap();
        assert!(Project::find(dir.path()).unwrap_err().to_string().contains("UTF-8"));
    }

    #[test]
    fn the_package_tells_its_version() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("src/shop")).unwrap();
        std::fs::write(dir.path().join("pyproject.toml"), "[tool.kedro]\npackage_name = \"shop\"\n").unwrap();
        std::fs::write(dir.path().join("src/shop/__init__.py"), "\"\"\"Doc.\"\"\"\n__version__ = \"2.5\"\n").unwrap();
        assert_eq!(Project::find(dir.path()).unwrap().version_or_default(), "2.5");
    }
}
