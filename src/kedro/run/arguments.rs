//! What the arguments of `kedro run` say that matters for its configuration.

use crate::error::{Context, Error, Kind, Result};
use std::path::{Path, PathBuf};

/// Environment and pipelines as the command line and the file of `--config` ask for them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// `--env`.
    pub env: Option<String>,
    /// Whether the environment stands on the command line.
    pub env_given: bool,
    /// All that are named; none is the default one.
    pub pipelines: Vec<String>,
    config: Option<PathBuf>,
    conf_source: bool,
}

/// Reads the arguments, and the file of `--config`, which counts where the command line says nothing. Kedro takes a
/// relative path from `root`, where it will run.
///
/// # Errors
/// [`Kind::Invalid`] for another source of configuration, [`Kind::Malformed`] for a file that is not understood.
pub fn wanted(arguments: &[String], root: &Path) -> Result<Wanted> {
    let mut wanted = parse(arguments);
    if let Some(file) = wanted.config.clone() {
        let file = root.join(file);
        let text = std::fs::read_to_string(&file).context(|| format!("cannot read --config {}", file.display()))?;
        add_file(&mut wanted, &text).context(|| format!("--config {}", file.display()))?;
    }
    if wanted.conf_source {
        return Err(Error::new(
            Kind::Invalid,
            "--conf-source cannot be given to `vineyard-fs kedro run`, which makes one of its own",
        ));
    }
    Ok(wanted)
}

fn parse(arguments: &[String]) -> Wanted {
    let mut wanted = Wanted::default();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let short = |flag: &str| argument.strip_prefix(flag).filter(|value| !value.is_empty()).map(str::to_owned);
        let (flag, value) = match argument.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => (flag, Some(value.to_owned())),
            // `-pNAME`; `-ns` and `-lv` are flags of their own.
            _ if argument.starts_with("-p") => ("-p", short("-p")),
            _ if argument.starts_with("-e") => ("-e", short("-e")),
            _ if argument.starts_with("-c") => ("-c", short("-c")),
            _ => (argument.as_str(), None),
        };
        let mut value = || value.clone().or_else(|| arguments.next().cloned());
        match flag {
            "-e" | "--env" => {
                wanted.env = value();
                wanted.env_given = true;
            }
            "-p" | "--pipeline" => wanted.pipelines.extend(value()),
            "--pipelines" => wanted.pipelines.extend(split(&value().unwrap_or_default())),
            "-c" | "--config" => wanted.config = value().map(PathBuf::from),
            "--conf-source" => wanted.conf_source = true,
            _ => {}
        }
    }
    wanted
}

fn split(names: &str) -> Vec<String> {
    names.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect()
}

/// The section `run` of a file holds values for options that are not given.
fn add_file(wanted: &mut Wanted, text: &str) -> Result<()> {
    let file: serde_yaml::Value =
        serde_yaml::from_str(text).map_err(|error| Error::malformed(format!("not valid YAML: {error}")))?;
    let values = |key: &str| -> Result<Vec<String>> {
        let found = match file.get("run").and_then(|run| run.get(key)) {
            None | Some(serde_yaml::Value::Null) => Vec::new(),
            Some(serde_yaml::Value::String(value)) => split(value),
            Some(serde_yaml::Value::Sequence(values)) => {
                values.iter().filter_map(|value| value.as_str().map(str::to_owned)).collect()
            }
            Some(_) => return Err(Error::malformed(format!("run.{key} is not a name"))),
        };
        if found.iter().any(|value| value.contains("${")) {
            return Err(Error::malformed(format!("run.{key} is computed: give it on the command line")));
        }
        Ok(found)
    };
    if !wanted.env_given {
        wanted.env = values("env")?.into_iter().next();
    }
    for key in ["pipeline", "pipelines"] {
        wanted.pipelines.extend(values(key)?);
    }
    wanted.conf_source |= !values("conf_source")?.is_empty();
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
        let found = parse(&strings("--runner ParallelRunner -p mixed --env=prod -ns x"));
        assert_eq!((found.env.as_deref(), found.pipelines), (Some("prod"), strings("mixed")));
        assert_eq!(parse(&strings("--pipelines a,b --async")).pipelines, ["a", "b"]);
        assert_eq!(parse(&strings("-eprod -cx.yml")).config, Some("x.yml".into()));
        assert_eq!(parse(&[]), Wanted::default());
        let error = wanted(&strings("--conf-source=x"), Path::new("/")).unwrap_err();
        assert!(error.to_string().contains("--conf-source"), "{error}");
    }

    #[test]
    fn a_file_says_what_the_command_line_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let with = |text: &str, words: &str| {
            std::fs::write(dir.path().join("run.yml"), text).unwrap();
            wanted(&strings(&format!("--config run.yml {words}")), dir.path())
        };
        let found = with("run:\n  pipeline: other\n  env: prod\n", "--async").unwrap();
        assert_eq!((found.env.as_deref(), found.env_given, found.pipelines), (Some("prod"), false, strings("other")));
        assert_eq!(with("{\"run\": {\"env\": \"prod\"}}", "-e dev").unwrap().env.as_deref(), Some("dev"));
        assert_eq!(with("run:\n  pipelines: [a, b]\n", "").unwrap().pipelines, ["a", "b"]);
        assert!(with("run:\n  tags: [a]\n", "").unwrap().pipelines.is_empty());
        for bad in ["run: [", "run:\n  env: ${oc.env:X}\n", "run:\n  conf_source: x\n", "run:\n  env: {}\n"] {
            assert!(with(bad, "").is_err(), "{bad}");
        }
        let error = wanted(&strings("-c none.yml"), dir.path()).unwrap_err();
        assert!(error.to_string().contains("none.yml"), "{error}");
    }
}
