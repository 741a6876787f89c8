//! `catalog create`: entries for every dataset that would live in memory.

use super::entries::{Format, Knowledge, Left, Planned, Rules, stripped};
use super::introspect::{Facts, Interpreter, Observed, Pipeline, Session};
use super::{Project, folder_name, unified_diff, write_atomically, yaml};
use crate::error::{Context, Error, Kind, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// What `catalog create` is asked to do.
#[derive(Debug, Clone)]
pub struct Create {
    /// Name of the pipeline.
    pub pipeline: String,
    /// Environment whose folder takes the file.
    pub env: String,
    /// Absolute path of the mount.
    pub mount: String,
    /// How tables are stored.
    pub format: Format,
    /// Run the pipeline once, with all outputs in memory, and take the types that flow.
    pub observe: bool,
    /// Add a factory for everything else.
    pub catch_all: bool,
    /// Replace entries of the same file that differ.
    pub force: bool,
}

/// What became of a dataset.
#[derive(Debug, Clone, PartialEq)]
pub enum Fate {
    /// A new entry.
    Added(Planned),
    /// The file has an entry of that name with other content; `--force` replaces it.
    Replaced(Planned),
    /// The file has it already, as it would be written.
    Unchanged(Planned),
    /// The file has an entry that differs, and keeps it.
    Kept(String),
    /// It stays in memory.
    Left(Left),
}

/// The change to a catalog, decided and checked but not written.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// The file.
    pub file: PathBuf,
    /// Its present text; `None` if it does not exist.
    pub old: Option<String>,
    /// Its text afterwards; `None` if there is nothing to write.
    pub new: Option<String>,
    /// In the order of the pipeline.
    pub fates: Vec<Fate>,
    /// The environment that Kedro loads when none is named.
    pub run_env: String,
    /// For the user, one line each.
    pub notes: Vec<String>,
}

/// Checks what the command line gave, before anything is started.
///
/// # Errors
/// [`Kind::Invalid`] for names and paths that cannot be.
pub fn validate(env: &str, pipeline: &str, mount: &str) -> Result<String> {
    folder_name("the environment", env)?;
    folder_name("the pipeline", pipeline)?;
    let trimmed = mount.trim_end_matches('/');
    if !mount.starts_with('/') || trimmed.is_empty() || mount.contains(['{', '}', '\n', '\0']) {
        return Err(Error::new(
            Kind::Invalid,
            format!("--mount {mount:?} must be an absolute path, since Kedro reads others relative to the project"),
        ));
    }
    Ok(trimmed.to_owned())
}

/// The project's configuration has other names for catalogs.
pub(super) fn not_loaded(file: &str) -> Error {
    Error::new(
        Kind::Unsupported,
        format!(
            "the project's config_patterns do not read {file} as a catalog: add \"catalog*/**\" to those of \"catalog\" \
             in settings.py"
        ),
    )
}

/// Decides what the catalog lacks. Writes nothing; each new entry has been built by the project's interpreter.
///
/// # Errors
/// [`Kind::Invalid`] with one line for the user, see [`Session::facts`]; also if an entry cannot be built.
pub fn plan(session: &mut Session, create: &Create) -> Result<Plan> {
    let mount = validate(&create.env, &create.pipeline, &create.mount)?;
    let facts = session.facts(Some(&create.env), Some(std::slice::from_ref(&create.pipeline)))?;
    if create.env == facts.base_env {
        return Err(Error::new(
            Kind::Invalid,
            format!("--env {} is loaded by every run: take an environment of its own", create.env),
        ));
    }
    let name = format!("catalog/{}.yml", create.pipeline);
    if !session.loads(&create.env, &name)? {
        return Err(not_loaded(&name));
    }
    let observed = if create.observe { session.observe(&create.pipeline)? } else { BTreeMap::new() };
    let file = facts.conf_source.join(&create.env).join(name);
    let old = match std::fs::read_to_string(&file) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(Error::from(error)).context(|| format!("cannot read {}", file.display())),
    };
    let present = yaml::parse(old.as_deref().unwrap_or_default()).context(|| file.display().to_string())?;
    let mut plan = Plan { file, old, run_env: facts.run_env.clone(), notes: facts.warnings.clone(), ..Plan::default() };
    let rules = Rules { versions: &facts.versions, mount: &mount, format: create.format };
    let mut planned = decide(&facts, create, &rules, &present, &observed, &mut plan)?;
    leave_lonely_transcodings(create, &present, &mut planned, &mut plan);
    keep_from_factories(&facts, create, &rules, &mut planned, &plan);
    if create.catch_all {
        add_catch_all(&facts, &rules, &present, &mut planned, &mut plan)?;
    }
    for entry in planned {
        plan.fates.push(match present.get(entry.name.as_str()) {
            None => Fate::Added(entry),
            Some(read) if yaml::same(read, &entry.config) => Fate::Unchanged(entry),
            Some(_) if create.force => Fate::Replaced(entry),
            Some(_) => Fate::Kept(entry.name),
        });
    }
    let puts: Vec<yaml::Put> = plan
        .fates
        .iter()
        .filter_map(|fate| match fate {
            Fate::Added(entry) | Fate::Replaced(entry) => Some(put(entry)),
            _ => None,
        })
        .collect();
    if puts.is_empty() {
        return Ok(plan);
    }
    check(session, &facts, &puts)?;
    let text = match &plan.old {
        Some(text) => text.clone(),
        None => header(create, &facts),
    };
    plan.new = Some(yaml::put(&text, &puts).context(|| plan.file.display().to_string())?);
    Ok(plan)
}

/// A new transcoding must share the file of those that the catalog has: where an entry of ours was moved elsewhere, only
/// its owner knows how the new one is to read it.
fn leave_lonely_transcodings(
    create: &Create,
    present: &serde_yaml::Mapping,
    planned: &mut Vec<Planned>,
    plan: &mut Plan,
) {
    if create.force {
        return;
    }
    let moved: Vec<(String, String)> = planned
        .iter()
        .filter(|entry| {
            let path = present.get(entry.name.as_str()).map(|read| read.get("filepath").and_then(|path| path.as_str()));
            path.is_some_and(|path| path != Some(entry.filepath()))
        })
        .map(|entry| (stripped(&entry.name).to_owned(), entry.name.clone()))
        .collect();
    planned.retain(|entry| {
        let other = moved.iter().find(|(stem, _)| stem == stripped(&entry.name));
        match other.filter(|_| !present.contains_key(entry.name.as_str())) {
            Some((_, other)) => {
                plan.fates.push(Fate::Left(Left::beside(&entry.name, other)));
                false
            }
            None => true,
        }
    });
}

/// What has to stay in memory gets an entry that says so, where a factory would take it otherwise.
fn keep_from_factories(facts: &Facts, create: &Create, rules: &Rules, planned: &mut Vec<Planned>, plan: &Plan) {
    for fate in &plan.fates {
        let Fate::Left(left) = fate else { continue };
        let taken = create.catch_all || facts.merged.get(&left.name).is_some_and(|entry| entry.pattern.is_some());
        if taken && facts.factories && !is_unwritable(&left.name) {
            planned.push(rules.memory(left));
        }
    }
}

/// Kedro would read an entry of this name as something else.
fn is_unwritable(name: &str) -> bool {
    name.starts_with('_') || name.contains(['{', '}'])
}

/// Entries for what lacks one.
fn decide(
    facts: &Facts,
    create: &Create,
    rules: &Rules,
    present: &serde_yaml::Mapping,
    observed: &BTreeMap<String, Observed>,
    plan: &mut Plan,
) -> Result<Vec<Planned>> {
    let mut planned = Vec::new();
    for group in &lacking(facts, create, present, observed, plan)? {
        match rules.plan(group)? {
            Ok(entries) => planned.extend(entries),
            Err(left) => plan.fates.extend(left.into_iter().map(Fate::Left)),
        }
    }
    refuse_clashes(&planned)?;
    Ok(planned)
}

/// The entries that a run needs for its datasets to live below `create.mount`, built once, for a catalog that is not
/// the user's.
///
/// # Errors
/// As [`plan`].
pub fn unregistered(session: &mut Session, facts: &Facts, create: &Create) -> Result<Vec<Planned>> {
    let rules = Rules { versions: &facts.versions, mount: &create.mount, format: create.format };
    let mut plan = Plan::default();
    let planned = decide(facts, create, &rules, &serde_yaml::Mapping::new(), &BTreeMap::new(), &mut plan)?;
    let puts: Vec<yaml::Put> = planned.iter().map(put).collect();
    if !puts.is_empty() {
        check(session, facts, &puts)?;
    }
    Ok(planned)
}

fn put(entry: &Planned) -> yaml::Put {
    yaml::Put { name: entry.name.clone(), config: entry.config.clone(), comment: entry.comment.clone() }
}

/// The datasets without an entry, transcodings of one dataset together; the rest goes into the plan's notes.
fn lacking(
    facts: &Facts,
    create: &Create,
    present: &serde_yaml::Mapping,
    observed: &BTreeMap<String, Observed>,
    plan: &mut Plan,
) -> Result<Vec<Vec<(String, Knowledge)>>> {
    let pipeline = facts
        .pipelines
        .get(&create.pipeline)
        .ok_or_else(|| Error::new(Kind::Internal, "the interpreter left the pipeline out"))?;
    let mut groups: Vec<Vec<(String, Knowledge)>> = Vec::new();
    let configured_by = |name: &str| -> Option<&super::introspect::Entry> {
        if present.contains_key(name) {
            return facts.base.get(name);
        }
        let entry = facts.merged.get(name)?;
        match &entry.pattern {
            // A factory of this very file says nothing about what the file lacks.
            Some(pattern) if present.contains_key(pattern.as_str()) => facts.base.get(name),
            _ => Some(entry),
        }
    };
    for (name, dataset) in &pipeline.datasets {
        if dataset.parameter {
            continue;
        }
        if let Some(entry) = configured_by(name) {
            if entry.in_memory() && !dataset.free_input {
                plan.notes.push(format!("{name} is a MemoryDataset in the catalog, so it is not shared"));
            }
            continue;
        }
        if dataset.free_input {
            if !present.contains_key(name.as_str()) {
                plan.notes.push(missing_input(facts, name, &create.env));
            }
            continue;
        }
        if name.starts_with('_') {
            plan.fates.push(Fate::Left(Left {
                name: name.clone(),
                reason: "Kedro ignores catalog entries whose name begins with _: rename it".into(),
            }));
            continue;
        }
        if name.contains(['{', '}']) {
            plan.fates.push(Fate::Left(Left {
                name: name.clone(),
                reason: "Kedro reads a name with braces as a dataset factory: rename it".into(),
            }));
            continue;
        }
        if let Some(other) = transcoded_elsewhere(name, pipeline, &configured_by) {
            plan.fates.push(Fate::Left(Left::beside(name, other)));
            continue;
        }
        let knowledge = Knowledge {
            hint: dataset.hint.clone().or_else(|| dataset.consumer_hint.clone()),
            // Only the transcoding that is written shows; the others read the same file.
            observed: observed.get(name).cloned(),
            generator: dataset.generator || observed.get(name).is_some_and(|observed| observed.chunks),
        };
        let group = groups.iter_mut().find(|group| {
            name.contains('@') && group.first().is_some_and(|(other, _)| stripped(other) == stripped(name))
        });
        match group {
            Some(group) => group.push((name.clone(), knowledge)),
            None => groups.push(vec![(name.clone(), knowledge)]),
        }
    }
    // What a generator makes cannot be stored under any of its transcodings.
    for group in &mut groups {
        if group.iter().any(|(_, knowledge)| knowledge.generator) {
            group.iter_mut().for_each(|(_, knowledge)| knowledge.generator = true);
        }
    }
    Ok(groups)
}

/// Another transcoding of the dataset that somebody else configured.
fn transcoded_elsewhere<'a>(
    name: &str,
    pipeline: &'a Pipeline,
    configured_by: &impl Fn(&str) -> Option<&'a super::introspect::Entry>,
) -> Option<&'a str> {
    if !name.contains('@') {
        return None;
    }
    let mut others = pipeline.datasets.keys().filter(|other| *other != name && stripped(other) == stripped(name));
    others.find(|other| configured_by(other).is_some()).map(String::as_str)
}

/// Two datasets must not share a file, nor a stem with different view extensions: both would be one vineyard dataset.
fn refuse_clashes(planned: &[Planned]) -> Result<()> {
    let mut taken: BTreeMap<String, &str> = BTreeMap::new();
    for entry in planned {
        let path = entry.filepath();
        let stem = path.strip_suffix(".arrow").or_else(|| path.strip_suffix(".parquet")).unwrap_or(path);
        if let Some(other) = taken.insert(stem.to_owned(), &entry.name)
            && stripped(other) != stripped(&entry.name)
        {
            return Err(Error::new(
                Kind::Exists,
                format!("the datasets {other:?} and {:?} would share the file {path}: rename one of them", entry.name),
            ));
        }
    }
    Ok(())
}

fn add_catch_all(
    facts: &Facts,
    rules: &Rules,
    present: &serde_yaml::Mapping,
    planned: &mut Vec<Planned>,
    plan: &mut Plan,
) -> Result<()> {
    if !facts.factories {
        return Err(Error::new(
            Kind::Unsupported,
            format!("--catch-all needs dataset factories, which Kedro {} does not have", facts.versions.kedro),
        ));
    }
    let entry = rules.catch_all();
    // Kedro refuses a second pattern that has nothing outside its braces.
    let is_catch_all = |pattern: &str| {
        pattern.split('{').skip(1).all(|part| part.ends_with('}') && part.matches('}').count() == 1)
            && pattern.starts_with('{')
    };
    let other = facts
        .patterns
        .iter()
        .find(|pattern| is_catch_all(pattern) && (**pattern != entry.name || !present.contains_key(pattern.as_str())));
    match other {
        Some(other) => plan.notes.push(format!("the catalog has a catch-all already, {other}: no other is added")),
        None => planned.push(entry),
    }
    Ok(())
}

/// Builds the entries with the project's interpreter.
fn check(session: &mut Session, facts: &Facts, puts: &[yaml::Put]) -> Result<()> {
    let entries: Map<String, Value> =
        puts.iter().map(|put| (put.name.clone(), Value::Object(put.config.clone()))).collect();
    let failures = session.check(&entries)?;
    let Some((name, failure)) = failures.iter().next() else { return Ok(()) };
    let class = entries.get(name).and_then(|entry| entry.get("type")).and_then(Value::as_str).unwrap_or_default();
    let mut packages: Vec<&str> =
        failures.values().flat_map(|failure| failure.missing.iter().map(String::as_str)).collect();
    packages.sort_unstable();
    packages.dedup();
    let quoted: Vec<String> = packages
        .iter()
        .map(|package| if package.contains('[') { format!("'{package}'") } else { (*package).to_owned() })
        .collect();
    let mut message = format!("{class}, which {name} needs, does not work in this project");
    if let Some(error) = &failure.error {
        let _ = write!(message, " ({error})");
    }
    if !quoted.is_empty() {
        let install = if failure.error.is_some() { "install a fitting release with" } else { "run" };
        let _ = write!(message, ": {install} `{} -m pip install {}`", facts.executable, quoted.join(" "));
    }
    Err(Error::new(Kind::Unsupported, message))
}

fn header(create: &Create, facts: &Facts) -> String {
    if create.env == facts.run_env {
        return format!(
            "# Datasets that the pipeline {} shares through vineyard, as files below the mount.\n\
             # Used by `kedro run`, which loads conf/{} and conf/{}.\n\
             # Yours to edit: `vineyard-fs kedro catalog create` adds what is missing and changes nothing else.\n",
            yaml::string(&create.pipeline),
            facts.base_env,
            create.env,
        );
    }
    format!(
        "# Datasets that the pipeline {} shares through vineyard, as files below the mount.\n\
         # Used by `kedro run --env {}`, which loads conf/{} and conf/{}, and not conf/{}.\n\
         # Yours to edit: `vineyard-fs kedro catalog create` adds what is missing and changes nothing else.\n",
        yaml::string(&create.pipeline),
        create.env,
        facts.base_env,
        create.env,
        facts.run_env,
    )
}

impl Plan {
    /// The change as a unified diff; empty if there is none.
    pub fn diff(&self, root: &Path) -> String {
        match &self.new {
            Some(new) => {
                let shown = self.file.strip_prefix(root).unwrap_or(&self.file);
                unified_diff(shown, self.old.as_deref().unwrap_or_default(), new)
            }
            None => String::new(),
        }
    }

    /// Writes the file, if there is anything to write.
    ///
    /// # Errors
    /// The system's, with the path.
    pub fn write(&self) -> Result<()> {
        let Some(new) = &self.new else { return Ok(()) };
        if let Some(folder) = self.file.parent() {
            std::fs::create_dir_all(folder).context(|| format!("cannot make {}", folder.display()))?;
        }
        write_atomically(&self.file, new)
    }

    /// What happened or would happen, for people.
    pub fn report(&self, root: &Path, create: &Create, dry_run: bool) -> String {
        let shown = self.file.strip_prefix(root).unwrap_or(&self.file).display();
        let mut text = String::new();
        let entries = |wanted: fn(&Fate) -> Option<&Planned>| self.fates.iter().filter_map(wanted).collect::<Vec<_>>();
        let changed = entries(|fate| match fate {
            Fate::Added(entry) | Fate::Replaced(entry) => Some(entry),
            _ => None,
        });
        let unchanged = entries(|fate| match fate {
            Fate::Unchanged(entry) => Some(entry),
            _ => None,
        });
        let kept: Vec<&String> = self
            .fates
            .iter()
            .filter_map(|fate| match fate {
                Fate::Kept(name) => Some(name),
                _ => None,
            })
            .collect();
        if changed.is_empty() {
            if unchanged.is_empty() && kept.is_empty() {
                let _ = writeln!(text, "nothing to do: the catalog has every dataset of {}", create.pipeline);
            } else {
                let _ = writeln!(text, "nothing to do: {shown} has every dataset of {}", create.pipeline);
            }
        } else {
            let verb = if dry_run { "would write" } else { "wrote" };
            let _ = writeln!(text, "{verb} {shown}:");
            let widest = |of: fn(&Planned) -> &str| changed.iter().map(|entry| of(entry).chars().count()).max();
            let name_width = widest(|entry| &entry.name).unwrap_or(0);
            let class_width = widest(Planned::class).unwrap_or(0);
            for entry in &changed {
                let line = format!(
                    "  {:name_width$}  {:class_width$}  {}",
                    entry.name.replace(char::is_control, "?"),
                    entry.class(),
                    entry.filepath().replace(char::is_control, "?")
                );
                let _ = writeln!(text, "{}", line.trim_end());
            }
        }
        for name in kept {
            let _ = writeln!(text, "kept {name} as it is in {shown} (--force replaces it)");
        }
        for fate in &self.fates {
            if let Fate::Left(left) = fate {
                let _ = writeln!(text, "left out {}: {}", left.name, left.reason);
            }
        }
        if !changed.is_empty() && !dry_run {
            let pipeline = match create.pipeline.as_str() {
                super::DEFAULT_PIPELINE => String::new(),
                name => format!(" --pipeline {name}"),
            };
            if create.env == self.run_env {
                let _ = writeln!(text, "`kedro run{pipeline}` shares through {}.", create.mount);
                return text;
            }
            let _ = writeln!(
                text,
                "`kedro run{pipeline} --env {0}` shares through {1}; a plain `kedro run` goes on as before.\n\
                 With --env {0} Kedro loads base and {0}, not {2}: what conf/{2} has is not there.",
                create.env, create.mount, self.run_env
            );
        }
        text
    }
}

/// A warning about a free input without an entry.
fn missing_input(facts: &Facts, name: &str, env: &str) -> String {
    if facts.local.iter().any(|local| local == name) {
        return format!(
            "{name} has an entry in conf/{}, which `kedro run --env {env}` does not load: move it to conf/{}",
            facts.run_env, facts.base_env
        );
    }
    format!("the input {name} is in no catalog: add its entry to conf/{}/catalog.yml", facts.base_env)
}

/// Warnings about the inputs that a run of the pipeline with this environment will not find.
pub fn missing_inputs(facts: &Facts, pipeline: &Pipeline, env: &str) -> Vec<String> {
    let inputs = pipeline.datasets.iter().filter(|(_, dataset)| dataset.free_input);
    let missing = inputs.filter(|(name, _)| !facts.merged.contains_key(*name));
    missing.map(|(name, _)| missing_input(facts, name, env)).collect()
}

/// Everything from the project to the plan, for callers that need no session of their own.
///
/// # Errors
/// As [`plan`].
pub fn plan_for(project: &Project, interpreter: Interpreter, verbose: bool, create: &Create) -> Result<Plan> {
    validate(&create.env, &create.pipeline, &create.mount)?;
    let mut session = Session::start(project, interpreter, verbose)?;
    plan(&mut session, create)
}
