//! Asks the project's own interpreter what its pipelines contain.
//!
//! One interpreter answers several requests over pipes, so that the project is imported once. The script that runs in
//! it is part of this program (`introspect.py` and `introspect/trials.py`); nothing is installed.

use super::Project;
use crate::error::{Error, Kind, Result};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const SCRIPT: &str = concat!(include_str!("introspect.py"), "\n\n", include_str!("introspect/trials.py"));

/// Importing a project may load half of PyPI; more than this is a project that waits for something.
const IMPORT_DEADLINE: Duration = Duration::from_secs(300);

/// Versions of what decides about datasets; `None` is "not installed".
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Versions {
    /// The interpreter's.
    pub python: String,
    /// Kedro's.
    pub kedro: String,
    /// `kedro-datasets`.
    pub kedro_datasets: Option<String>,
    /// pandas.
    pub pandas: Option<String>,
    /// pyarrow.
    pub pyarrow: Option<String>,
    /// polars.
    pub polars: Option<String>,
}

impl Versions {
    /// Whether Kedro is at least `major.minor`.
    pub fn kedro_at_least(&self, wanted: (u32, u32)) -> bool {
        at_least(&self.kedro, wanted)
    }
}

/// Whether a version such as `2.1.0rc1` is at least `major.minor`.
pub fn at_least(version: &str, wanted: (u32, u32)) -> bool {
    let mut parts = version.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= wanted
}

/// A node of a pipeline.
#[derive(Debug, Clone, Deserialize)]
pub struct Node {
    /// The name that `kedro run --nodes` takes, namespace included.
    pub name: String,
    /// Whether the user named it; else Kedro made the name up.
    pub named: bool,
    /// Sorted.
    pub tags: Vec<String>,
    /// Dotted, if any.
    pub namespace: Option<String>,
    /// Datasets and parameters.
    pub inputs: Vec<String>,
    /// Datasets.
    pub outputs: Vec<String>,
    /// Names of the nodes that make its inputs, in the order of execution.
    pub parents: Vec<String>,
    /// Whether its function yields chunks.
    pub generator: bool,
}

/// A dataset as a pipeline uses it.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Dataset {
    /// Type that the annotation of its producer names, such as `pandas.DataFrame`.
    pub hint: Option<String>,
    /// Type that the annotation of the first consumer that has one names.
    pub consumer_hint: Option<String>,
    /// Names of the nodes that make it: none or one.
    pub producers: Vec<String>,
    /// Names of the nodes that read it.
    pub consumers: Vec<String>,
    /// Whether its producer yields chunks.
    pub generator: bool,
    /// `parameters` or `params:...`.
    pub parameter: bool,
    /// No node makes it.
    pub free_input: bool,
}

/// A pipeline: its nodes in the order of execution, its datasets by name.
#[derive(Debug, Clone, Deserialize)]
pub struct Pipeline {
    /// In the order of execution.
    pub nodes: Vec<Node>,
    /// In the order of their first use.
    pub datasets: IndexMap<String, Dataset>,
}

/// What a catalog says about a dataset.
#[derive(Debug, Clone, Deserialize)]
pub struct Entry {
    /// Class, as written.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// `filepath` or `path`, as written, interpolated.
    pub filepath: Option<String>,
    /// Whether Kedro keeps versions below the path.
    #[serde(default)]
    pub versioned: bool,
    /// For a folder of partitions: how the names of its files end, empty for all files.
    #[serde(default)]
    pub partitions: Option<String>,
    /// The dataset factory that made the entry; `None` for an entry of its own.
    pub pattern: Option<String>,
}

impl Entry {
    /// Whether the entry keeps its data in the memory of the process that runs.
    pub fn in_memory(&self) -> bool {
        self.kind.as_deref().is_some_and(|kind| kind.to_ascii_lowercase().ends_with("memorydataset"))
    }
}

/// All that is asked about a project.
#[derive(Debug, Clone, Deserialize)]
pub struct Facts {
    /// Of the project's environment.
    pub versions: Versions,
    /// The interpreter that answered.
    pub executable: String,
    /// Absolute path of the configuration folder.
    pub conf_source: PathBuf,
    /// Name of the environment that is always loaded.
    pub base_env: String,
    /// Name of the environment that is loaded when none is named.
    pub run_env: String,
    /// The environment that was loaded: the one asked for, or the base one if that has no folder yet.
    pub env: String,
    /// Whether this Kedro knows dataset factories.
    pub factories: bool,
    /// Every registered pipeline.
    pub pipeline_names: Vec<String>,
    /// The pipelines asked for.
    pub pipelines: BTreeMap<String, Pipeline>,
    /// What the base environment says about their datasets.
    pub base: BTreeMap<String, Entry>,
    /// What base and `env` together say about them.
    pub merged: BTreeMap<String, Entry>,
    /// Those that base and the default environment know, which a run with `--env` does not load.
    pub local: Vec<String>,
    /// Dataset factories of base and `env`.
    pub patterns: Vec<String>,
    /// Pipelines that did not import.
    pub warnings: Vec<String>,
}

/// What really flowed through a dataset in one run.
#[derive(Debug, Clone, Deserialize)]
pub struct Observed {
    /// Type of the object, such as `pandas.DataFrame`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Why it does not come back equal from Feather (or polars' IPC); `None` if it does or is no frame.
    pub feather: Option<String>,
    /// The same for Parquet; asked only where Feather is no choice.
    pub parquet: Option<String>,
    /// Why it cannot be pickled; `None` if it can or was not asked.
    pub pickle: Option<String>,
    /// Whether its node gave it in pieces, each saved over the last.
    pub chunks: bool,
}

/// Where a project has its configuration.
#[derive(Debug, Clone, Deserialize)]
pub struct Settings {
    /// Absolute path of the configuration folder.
    pub conf_source: PathBuf,
    /// Name of the environment that is loaded when none is named.
    pub run_env: String,
}

/// Why an entry cannot be built.
#[derive(Debug, Clone, Deserialize)]
pub struct BuildFailure {
    /// Packages to install.
    pub missing: Vec<String>,
    /// What the interpreter said.
    pub error: Option<String>,
}

#[derive(Deserialize)]
struct Failure {
    kind: String,
    message: String,
}

/// The interpreter that a project is asked with, and why this one.
#[derive(Debug, Clone)]
pub struct Interpreter {
    /// Path or command.
    pub path: PathBuf,
    /// For messages.
    pub why: &'static str,
}

impl Interpreter {
    /// `--python`, else the active environment, else the project's `.venv`, else `python3`.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if the one that was named does not exist.
    pub fn choose(named: Option<&Path>, root: &Path) -> Result<Interpreter> {
        if let Some(path) = named {
            let is_command = path.components().count() == 1;
            if !is_command && !path.is_file() {
                return Err(Error::not_found(format!("--python {}: no such file", path.display())));
            }
            let path = if is_command { path.to_owned() } else { std::path::absolute(path)? };
            return Ok(Interpreter { path, why: "given by --python" });
        }
        for (variable, why) in [("VIRTUAL_ENV", "the active environment"), ("CONDA_PREFIX", "the active environment")] {
            let Some(folder) = std::env::var_os(variable).filter(|folder| !folder.is_empty()) else { continue };
            let path = Path::new(&folder).join("bin/python");
            if path.is_file() {
                return Ok(Interpreter { path, why });
            }
        }
        let path = root.join(".venv/bin/python");
        if path.is_file() {
            return Ok(Interpreter { path, why: "the project's .venv" });
        }
        Ok(Interpreter { path: "python3".into(), why: "python3 on the PATH" })
    }

    /// Its version such as `3.11.7`; empty if it does not say.
    pub fn version(&self) -> String {
        let output = Command::new(&self.path).arg("--version").stderr(Stdio::null()).output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        text.trim().strip_prefix("Python ").unwrap_or_default().to_owned()
    }
}

/// A running interpreter with the project's folder as its working directory; ended when dropped.
pub struct Session {
    child: Child,
    requests: Option<ChildStdin>,
    answers: Receiver<std::io::Result<String>>,
    /// The end of what the interpreter wrote to standard error.
    tail: Arc<Mutex<Vec<u8>>>,
    interpreter: Interpreter,
}

impl Session {
    /// Starts the interpreter. With `verbose`, what it prints and tracebacks go to standard error.
    ///
    /// # Errors
    /// [`Kind::NotFound`] or the system's error if it does not start.
    pub fn start(project: &Project, interpreter: Interpreter, verbose: bool) -> Result<Session> {
        let mut command = Command::new(&interpreter.path);
        command
            .args(["-c", SCRIPT])
            .current_dir(&project.root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A listing must not leave byte code in the user's folders, nor must a broken locale break names.
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("PYTHONUTF8", "1")
            .env("DO_NOT_TRACK", "1");
        if verbose {
            command.env("VINEYARD_FS_TRACEBACK", "1");
        }
        let mut child = command.spawn().map_err(|error| {
            Error::new(
                Kind::NotFound,
                format!(
                    "cannot start {} ({}); activate the project's environment or give --python",
                    interpreter.path.display(),
                    interpreter.why
                ),
            )
            .with_source(error)
        })?;
        let requests = child.stdin.take();
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(Error::new(Kind::Internal, "the interpreter has no pipes"));
        };
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let tail = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&tail);
        std::thread::spawn(move || {
            let (mut stderr, mut buffer) = (stderr, [0_u8; 4096]);
            while let Ok(length) = stderr.read(&mut buffer) {
                let Some(bytes) = buffer.get(..length).filter(|bytes| !bytes.is_empty()) else { break };
                if verbose {
                    let _ = std::io::stderr().write_all(bytes);
                }
                if let Ok(mut kept) = kept.lock() {
                    kept.extend_from_slice(bytes);
                    let excess = kept.len().saturating_sub(16 << 10);
                    kept.drain(..excess);
                }
            }
        });
        Ok(Session { child, requests, answers, tail, interpreter })
    }

    /// The interpreter's process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the pipelines (all registered ones if `None`) contain, seen with the catalog of `env` (if `None`, of the
    /// environment that Kedro loads when none is named).
    ///
    /// # Errors
    /// [`Kind::Invalid`] with one line for the user: no Kedro, a project that does not import, no such pipeline, a
    /// catalog that does not load.
    pub fn facts(&mut self, env: Option<&str>, pipelines: Option<&[String]>) -> Result<Facts> {
        self.ask(serde_json::json!({"op": "introspect", "env": env, "pipelines": pipelines}), Some(IMPORT_DEADLINE))
    }

    /// Where the configuration is. The pipelines need not import for this.
    ///
    /// # Errors
    /// As [`Session::facts`].
    pub fn settings(&mut self) -> Result<Settings> {
        self.ask(serde_json::json!({"op": "settings"}), Some(IMPORT_DEADLINE))
    }

    /// Whether the project's configuration loader takes a file below an environment's folder as part of its catalog.
    ///
    /// # Errors
    /// As [`Session::facts`].
    pub fn loads(&mut self, env: &str, file: &str) -> Result<bool> {
        #[derive(Deserialize)]
        struct Loads {
            loads: bool,
        }
        let request = serde_json::json!({"op": "loads", "env": env, "file": file});
        Ok(self.ask::<Loads>(request, Some(IMPORT_DEADLINE))?.loads)
    }

    /// Builds entries as Kedro will; returns those that fail.
    ///
    /// # Errors
    /// As [`Session::facts`].
    pub fn check(&mut self, entries: &impl Serialize) -> Result<BTreeMap<String, BuildFailure>> {
        #[derive(Deserialize)]
        struct Checked {
            failures: BTreeMap<String, BuildFailure>,
        }
        let request = serde_json::json!({"op": "check", "entries": entries});
        Ok(self.ask::<Checked>(request, Some(IMPORT_DEADLINE))?.failures)
    }

    /// Runs a pipeline once in Kedro's default environment, with every output in memory in place of where the catalog
    /// puts it, and tells what flowed through its datasets.
    ///
    /// # Errors
    /// As [`Session::facts`], and if the run fails.
    pub fn observe(&mut self, pipeline: &str) -> Result<BTreeMap<String, Observed>> {
        #[derive(Deserialize)]
        struct Watched {
            observed: BTreeMap<String, Observed>,
        }
        let request = serde_json::json!({"op": "observe", "pipeline": pipeline, "env": null});
        Ok(self.ask::<Watched>(request, None)?.observed)
    }

    fn ask<T: serde::de::DeserializeOwned>(&mut self, request: Value, deadline: Option<Duration>) -> Result<T> {
        let mut line = request.to_string();
        line.push('\n');
        let sent = match &mut self.requests {
            Some(pipe) => pipe.write_all(line.as_bytes()).and_then(|()| pipe.flush()),
            None => return Err(Error::new(Kind::Internal, "the interpreter has no input")),
        };
        // A write that fails means that the interpreter ended; its answer or its last words say why.
        let answer = match deadline {
            Some(deadline) => self.answers.recv_timeout(deadline),
            None => self.answers.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        let answer = match answer {
            Ok(Ok(answer)) => answer,
            Err(RecvTimeoutError::Timeout) => {
                return Err(Error::new(
                    Kind::Timeout,
                    format!("the project did not import within {} s", IMPORT_DEADLINE.as_secs()),
                ));
            }
            Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => return Err(self.ended(sent.err())),
        };
        let mut answer: Value = serde_json::from_str(&answer)
            .map_err(|error| Error::malformed("the interpreter's answer is not JSON").with_source(error))?;
        if let Some(failure) = answer.get_mut("error") {
            let failure: Failure = serde_json::from_value(failure.take())
                .map_err(|error| Error::malformed("the interpreter's answer").with_source(error))?;
            return Err(Error::new(Kind::Invalid, self.explain(failure)));
        }
        let answer = answer.get_mut("ok").map(Value::take).unwrap_or(Value::Null);
        serde_json::from_value(answer)
            .map_err(|error| Error::malformed("the interpreter's answer lacks something").with_source(error))
    }

    /// The interpreter ended without an answer: say so with the last line that it wrote.
    fn ended(&mut self, sent: Option<std::io::Error>) -> Error {
        self.requests = None;
        let status = self.child.wait();
        // The reader of standard error may still be at it.
        std::thread::sleep(Duration::from_millis(50));
        let tail = self.tail.lock().map(|tail| String::from_utf8_lossy(&tail).into_owned()).unwrap_or_default();
        let last = tail.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing").trim();
        let status = match (status, sent) {
            (Ok(status), _) => status.to_string(),
            (Err(error), _) => error.to_string(),
        };
        Error::new(
            Kind::Invalid,
            format!("{} ended while it imported the project ({status}): {last}", self.interpreter.path.display()),
        )
    }

    fn explain(&self, failure: Failure) -> String {
        let python = self.interpreter.path.display();
        match failure.kind.as_str() {
            "kedro" => format!(
                "{} ({}); activate the project's environment or give --python",
                failure.message, self.interpreter.why
            ),
            "project" | "import" if failure.message.contains("ModuleNotFoundError") => format!(
                "{}; {python} ({}) lacks it: install the project's requirements there, activate another environment, \
                 or give --python",
                failure.message, self.interpreter.why
            ),
            "project" | "import" | "run" => format!("{}; --verbose shows the traceback", failure.message),
            _ => failure.message,
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The end of its input ends the interpreter; code of the project that does not let it is ended by force.
        self.requests = None;
        for _ in 0..20 {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                _ => return,
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        assert!(at_least("2.1.0", (2, 1)) && at_least("10.0", (2, 1)) && at_least("2.10.0rc1", (2, 9)));
        assert!(!at_least("2.0.3", (2, 1)) && !at_least("0.18.14", (0, 19)));
    }

    #[test]
    fn an_interpreter_that_is_named_must_exist() {
        let error = Interpreter::choose(Some(Path::new("/nonexistent/python")), Path::new("/")).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
    }

    #[test]
    fn memory_datasets_are_recognised() {
        let entry = |kind: &str| Entry {
            kind: Some(kind.into()),
            filepath: None,
            versioned: false,
            partitions: None,
            pattern: None,
        };
        assert!(entry("MemoryDataset").in_memory() && entry("kedro.io.SharedMemoryDataset").in_memory());
        assert!(entry("MemoryDataSet").in_memory() && !entry("pandas.CSVDataset").in_memory());
    }
}
