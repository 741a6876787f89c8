//! `vineyard-fs kedro ...`: parses, calls [`crate::kedro`], prints.

use crate::error::{Error, Kind, Result};
use crate::kedro::catalog::{self, Create};
use crate::kedro::entries::Format;
use crate::kedro::introspect::{Facts, Interpreter, Session};
use crate::kedro::{DEFAULT_ENV, DEFAULT_MOUNT, DEFAULT_PIPELINE, Project, clean, list};
use clap::{Args, Subcommand};
use std::io::Write as _;
use std::path::PathBuf;

/// Commands for Kedro projects.
#[derive(Debug, Subcommand)]
pub enum KedroCommand {
    /// Make or list a pipeline's catalog
    #[command(subcommand)]
    Catalog(CatalogCommand),
    /// Remove from the mount what a pipeline left there
    Clean(CleanArgs),
}

/// `kedro catalog ...`
#[derive(Debug, Subcommand)]
pub enum CatalogCommand {
    /// Write entries for every dataset that would live in memory
    ///
    /// The entries are ordinary Kedro datasets with files below the mount, in an environment of their own: a plain
    /// `kedro run` goes on as before, `kedro run --env vineyard` shares its data. What is in the catalog already stays.
    Create(CreateArgs),
    /// List the datasets of a pipeline by kind, and what is there now
    List(ListArgs),
}

/// Which project, and how to ask it.
#[derive(Debug, Args)]
pub struct ProjectArgs {
    /// Folder of the Kedro project, or one inside it
    #[arg(long, value_name = "DIR", default_value = ".")]
    project: PathBuf,
    /// Interpreter that has the project's packages [default: the active environment, .venv, python3]
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    /// Show what the project prints while it is imported, and tracebacks
    #[arg(short, long)]
    verbose: bool,
}

impl ProjectArgs {
    fn open(&self) -> Result<(Project, Interpreter)> {
        let project = Project::find(&self.project)?;
        let interpreter = Interpreter::choose(self.python.as_deref(), &project.root)?;
        Ok((project, interpreter))
    }

    fn session(&self) -> Result<(Project, Session)> {
        let (project, interpreter) = self.open()?;
        let session = Session::start(&project, interpreter, self.verbose)?;
        Ok((project, session))
    }
}

/// Arguments of `catalog create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    #[command(flatten)]
    project: ProjectArgs,
    /// Pipeline to write the catalog of
    #[arg(short, long, value_name = "NAME", default_value = DEFAULT_PIPELINE)]
    pipeline: String,
    /// Kedro environment whose folder takes the catalog
    #[arg(short, long, value_name = "NAME", default_value = DEFAULT_ENV)]
    env: String,
    /// Where vineyard is mounted
    #[arg(long, value_name = "DIR", default_value = DEFAULT_MOUNT)]
    mount: String,
    /// How tables are stored
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Run the pipeline once in memory and take the types that really flow
    #[arg(long)]
    observe: bool,
    /// Add a dataset factory that takes whatever has no entry
    #[arg(long)]
    catch_all: bool,
    /// Show the change, write nothing
    #[arg(long)]
    dry_run: bool,
    /// Replace entries of the same file that differ
    #[arg(long)]
    force: bool,
}

/// Arguments of `catalog list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    project: ProjectArgs,
    /// Pipelines, separated by commas [default: all]
    #[arg(short, long, value_name = "NAME", value_delimiter = ',')]
    pipeline: Vec<String>,
    /// Kedro environment
    #[arg(short, long, value_name = "NAME", default_value = DEFAULT_ENV)]
    env: String,
    /// Where vineyard is mounted
    #[arg(long, value_name = "DIR", default_value = DEFAULT_MOUNT)]
    mount: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `clean`.
#[derive(Debug, Args)]
pub struct CleanArgs {
    #[command(flatten)]
    project: ProjectArgs,
    /// Pipelines, separated by commas [default: all]
    #[arg(short, long, value_name = "NAME", value_delimiter = ',')]
    pipeline: Vec<String>,
    /// Kedro environment
    #[arg(short, long, value_name = "NAME", default_value = DEFAULT_ENV)]
    env: String,
    /// Where vineyard is mounted
    #[arg(long, value_name = "DIR", default_value = DEFAULT_MOUNT)]
    mount: String,
    /// Keep what no node of the pipeline reads
    #[arg(long)]
    keep_outputs: bool,
    /// Show what would be removed, remove nothing
    #[arg(long)]
    dry_run: bool,
}

/// Runs a command of `vineyard-fs kedro`.
///
/// # Errors
/// One line for the user; files are as they were.
pub fn run(command: KedroCommand) -> Result<()> {
    match command {
        KedroCommand::Catalog(CatalogCommand::Create(args)) => create(args),
        KedroCommand::Catalog(CatalogCommand::List(args)) => list(args),
        KedroCommand::Clean(args) => clean(args),
    }
}

/// Prints to standard output; a reader that has gone away is no error.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn warn(line: &str) {
    let _ = writeln!(std::io::stderr(), "warning: {line}");
}

fn create(args: CreateArgs) -> Result<()> {
    let CreateArgs { project, pipeline, env, mount, format, observe, catch_all, dry_run, force } = args;
    let mount = catalog::validate(&env, &pipeline, &mount)?;
    let (found, mut session) = project.session()?;
    let create = Create { pipeline, env, mount, format, observe, catch_all, force };
    let plan = catalog::plan(&mut session, &create)?;
    if dry_run || plan.old.is_some() {
        print(&plan.diff(&found.root));
    }
    if !dry_run {
        plan.write()?;
    }
    print(&plan.report(&found.root, &create, dry_run));
    plan.warnings().iter().for_each(|line| warn(line));
    Ok(())
}

/// The facts about the named pipelines, or about all.
fn facts(project: &ProjectArgs, env: &str, pipelines: &[String]) -> Result<(Project, Facts)> {
    catalog::validate(env, DEFAULT_PIPELINE, DEFAULT_MOUNT)?;
    let (found, mut session) = project.session()?;
    let facts = session.facts(env, (!pipelines.is_empty()).then_some(pipelines))?;
    facts.warnings.iter().for_each(|line| warn(line));
    Ok((found, facts))
}

fn list(args: ListArgs) -> Result<()> {
    let mount = catalog::validate(&args.env, DEFAULT_PIPELINE, &args.mount)?;
    let (project, facts) = facts(&args.project, &args.env, &args.pipeline)?;
    let rows = facts.pipelines.keys().map(|name| (name, list::rows(&facts, name, &project.root, &mount)));
    if args.json {
        let pipelines: serde_json::Map<String, serde_json::Value> = rows
            .map(|(name, rows)| serde_json::to_value(rows).map(|rows| (name.clone(), rows)))
            .collect::<std::result::Result<_, _>>()
            .map_err(|error| Error::new(Kind::Internal, "the listing is no JSON").with_source(error))?;
        let document = serde_json::json!({"env": facts.env, "mount": mount, "pipelines": pipelines});
        print(&format!("{document:#}\n"));
    } else {
        let tables: Vec<String> = rows.map(|(name, rows)| list::table(name, &rows)).collect();
        print(&tables.join("\n"));
    }
    Ok(())
}

fn clean(args: CleanArgs) -> Result<()> {
    let mount = catalog::validate(&args.env, DEFAULT_PIPELINE, &args.mount)?;
    let (project, facts) = facts(&args.project, &args.env, &args.pipeline)?;
    let (mut removed, mut failed) = (0, None);
    for path in clean::targets(&facts, &project.root, &mount, args.keep_outputs) {
        if args.dry_run {
            if path.symlink_metadata().is_ok() {
                print(&format!("would remove {}\n", path.display()));
            }
            continue;
        }
        match clean::remove(&path) {
            Ok(true) => {
                removed += 1;
                print(&format!("removed {}\n", path.display()));
            }
            Ok(false) => {}
            // The others can go even if one cannot.
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    match failed {
        Some(error) => Err(error),
        None if removed == 0 && !args.dry_run => {
            print("nothing to remove\n");
            Ok(())
        }
        None => Ok(()),
    }
}
