//! `vineyard-fs kedro ...`: parses, calls [`crate::kedro`], prints.

use crate::error::{Error, Kind, Result};
use crate::kedro::catalog::{self, Create};
use crate::kedro::entries::Format;
use crate::kedro::introspect::{Facts, Interpreter, Session};
use crate::kedro::{DEFAULT_ENV, DEFAULT_MOUNT, DEFAULT_PIPELINE, Project, argo, clean, docker, list, run};
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
    /// `kedro run` with every dataset that has no entry on vineyard; the project's files stay as they are
    Run(RunArgs),
    /// Make a container image of the project
    #[command(subcommand)]
    Docker(DockerCommand),
    /// Make an Argo workflow of a pipeline
    #[command(subcommand)]
    Argo(ArgoCommand),
}

/// `kedro docker ...`
#[derive(Debug, Subcommand)]
pub enum DockerCommand {
    /// Write a Dockerfile and a .dockerignore, unless the project has them
    Init(DockerInitArgs),
    /// Build the image, with a new Dockerfile if the project has none
    Build(DockerBuildArgs),
}

/// `kedro argo ...`
#[derive(Debug, Subcommand)]
pub enum ArgoCommand {
    /// Write a workflow whose pods share the pipeline's data
    Generate(Box<ArgoArgs>),
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
    /// Run the pipeline once, with all outputs in memory, and take the types that really flow
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

/// Arguments of `kedro run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    project: ProjectArgs,
    #[command(flatten)]
    mount: MountArgs,
    /// How tables are stored
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Leave the run's datasets below the mount
    #[arg(long)]
    keep: bool,
    /// Arguments for `kedro run`
    #[arg(last = true, value_name = "KEDRO ARGUMENTS")]
    arguments: Vec<String>,
}

/// Which mount a command runs with.
#[derive(Debug, Args)]
pub struct MountArgs {
    /// Folder of the mount; mounted for the run if it is not [default: /mnt/vineyard if mounted, else a temporary one]
    #[arg(long, value_name = "DIR")]
    mount: Option<PathBuf>,
    /// Use the folder as it is, mount nothing
    #[arg(long, requires = "mount")]
    existing: bool,
}

/// Arguments of `vineyard-fs run`.
#[derive(Debug, Args)]
pub struct RunCommandArgs {
    #[command(flatten)]
    mount: MountArgs,
    /// Command to run; it finds the folder in VINEYARD_FS_MOUNT
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<std::ffi::OsString>,
}

/// Arguments of `docker init`.
#[derive(Debug, Args)]
pub struct DockerInitArgs {
    #[command(flatten)]
    project: ProjectArgs,
    /// Image to start from [default: python:X.Y-slim of the project's interpreter]
    #[arg(long, value_name = "IMAGE")]
    base_image: Option<String>,
}

/// Arguments of `docker build`.
#[derive(Debug, Args)]
pub struct DockerBuildArgs {
    #[command(flatten)]
    project: ProjectArgs,
    /// Program that builds [default: the first on the PATH]
    #[arg(long, value_enum)]
    engine: Option<docker::Engine>,
    /// Name of the image [default: the project's name and version]
    #[arg(short, long, value_name = "NAME")]
    image: Option<String>,
    /// Image to start from
    #[arg(long, value_name = "IMAGE")]
    base_image: Option<String>,
    /// Platform to build for, such as linux/arm64
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// Arguments for the engine
    #[arg(last = true, value_name = "ENGINE ARGUMENTS")]
    arguments: Vec<String>,
}

/// Arguments of `argo generate`.
#[derive(Debug, Args)]
pub struct ArgoArgs {
    #[command(flatten)]
    project: ProjectArgs,
    /// Container image with the project
    #[arg(short, long, value_name = "IMAGE")]
    image: String,
    /// Pipeline to run
    #[arg(short, long, value_name = "NAME", default_value = DEFAULT_PIPELINE)]
    pipeline: String,
    /// Kedro environment with the shared catalog
    #[arg(short, long, value_name = "NAME", default_value = DEFAULT_ENV)]
    env: String,
    /// Where the catalog expects the mount
    #[arg(long, value_name = "DIR", default_value = DEFAULT_MOUNT)]
    mount: String,
    /// File or folder to write, - for standard output [default: argo-PROJECT.yml]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// How pods reach vineyard: csi, hostpath or pvc:NAME
    #[arg(long, value_name = "VOLUME", default_value = "csi")]
    volume: argo::Volume,
    /// Vineyard instance [default: the CSI driver's]
    #[arg(long, value_name = "NAMESPACE/NAME")]
    vineyard: Option<String>,
    /// What makes a pod
    #[arg(long, value_enum, default_value_t)]
    per: argo::Per,
    /// Memory of a pod, such as 2Gi
    #[arg(long, value_name = "QUANTITY")]
    memory: Option<String>,
    /// Processors that a pod asks for, such as 500m
    #[arg(long, value_name = "QUANTITY")]
    cpu: Option<String>,
    /// Kubernetes namespace of the workflow
    #[arg(short, long, value_name = "NAME")]
    namespace: Option<String>,
    /// Service account of the pods
    #[arg(long, value_name = "NAME")]
    service_account: Option<String>,
    /// How often a pod is tried again
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    retries: u32,
    /// Longest run
    #[arg(long, value_name = "SECONDS")]
    deadline: Option<u32>,
    /// Delete the workflow that long after its end
    #[arg(long, value_name = "SECONDS")]
    ttl: Option<u32>,
    /// Parameters for `kedro run --params`
    #[arg(long, value_name = "KEY=VALUE,...", default_value = "")]
    params: String,
    /// Leave the datasets of a run in vineyard
    #[arg(long)]
    keep: bool,
    /// Overwrite a file that differs
    #[arg(long)]
    force: bool,
}

/// Runs a command of `vineyard-fs kedro`. Ends the process with the exit code of `kedro run` if that is not 0.
///
/// # Errors
/// One line for the user; files are as they were.
pub fn run(command: KedroCommand) -> Result<()> {
    match command {
        KedroCommand::Catalog(CatalogCommand::Create(args)) => create(args),
        KedroCommand::Catalog(CatalogCommand::List(args)) => list(args),
        KedroCommand::Clean(args) => clean(args),
        KedroCommand::Run(args) => kedro_run(args),
        KedroCommand::Docker(DockerCommand::Init(args)) => docker_init(args),
        KedroCommand::Docker(DockerCommand::Build(args)) => docker_build(args),
        KedroCommand::Argo(ArgoCommand::Generate(args)) => argo_generate(*args),
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
    plan.notes.iter().for_each(|line| warn(line));
    Ok(())
}

/// The facts about the named pipelines, or about all.
fn facts(project: &ProjectArgs, env: &str, pipelines: &[String]) -> Result<(Project, Facts)> {
    catalog::validate(env, DEFAULT_PIPELINE, DEFAULT_MOUNT)?;
    let (found, mut session) = project.session()?;
    let facts = session.facts(Some(env), (!pipelines.is_empty()).then_some(pipelines))?;
    // The usual one may be still to come; without it the base environment is all there is.
    if facts.env != env && env != DEFAULT_ENV {
        return Err(Error::not_found(format!("there is no environment {env:?} in {}", facts.conf_source.display())));
    }
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
    for (path, partitions) in clean::targets(&facts, &project.root, &mount, args.keep_outputs) {
        if args.dry_run {
            if path.symlink_metadata().is_ok() {
                print(&format!("would remove {}\n", path.display()));
            }
            continue;
        }
        match clean::remove(&path, partitions.as_deref()) {
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

/// Leaves with a code that is not 0, after everything has been cleaned up.
fn leave(code: i32) -> Result<()> {
    match code {
        0 => Ok(()),
        code => std::process::exit(code),
    }
}

fn kedro_run(args: RunArgs) -> Result<()> {
    let (project, interpreter) = args.project.open()?;
    let ask = run::KedroRun {
        mount: args.mount.mount,
        existing: args.mount.existing,
        keep: args.keep,
        format: args.format,
        arguments: args.arguments,
    };
    leave(run::kedro(&project, interpreter, args.project.verbose, &ask)?)
}

/// `vineyard-fs run -- COMMAND`. Ends the process with the command's exit code if that is not 0.
///
/// # Errors
/// One line for the user.
pub fn run_command(args: RunCommandArgs) -> Result<()> {
    leave(run::command(args.mount.mount.as_deref(), args.mount.existing, &args.command)?)
}

/// What `docker init` did, for people.
fn tell_written(written: &[docker::Written]) {
    for file in written {
        match file {
            docker::Written::New(path) => print(&format!("wrote {}\n", path.display())),
            docker::Written::Same(path) => print(&format!("{} is up to date\n", path.display())),
            docker::Written::Theirs(path, diff) => {
                print(diff);
                print(&format!("kept {} as it is; above is what would have been written\n", path.display()));
            }
        }
    }
}

/// Writes what the project lacks for an image.
fn write_docker_files(
    project: &Project,
    interpreter: Interpreter,
    verbose: bool,
    base_image: Option<&str>,
) -> Result<Vec<docker::Written>> {
    let base_image = base_image.map_or_else(|| docker::base_image(&interpreter.version()), str::to_owned);
    let settings = Session::start(project, interpreter, verbose).and_then(|mut session| session.settings());
    let run_env = match &settings {
        Ok(settings) => settings.conf_source.strip_prefix(&project.root).ok().map(|conf| conf.join(&settings.run_env)),
        Err(_) => Some(docker::USUAL_RUN_ENV.into()),
    };
    let written = docker::init(project, &base_image, run_env.as_deref())?;
    tell_written(&written);
    match &settings {
        Ok(settings) if run_env.is_none() => {
            warn(&format!("{} is outside the project, and not in its image", settings.conf_source.display()));
        }
        Ok(_) => {}
        // The image needs no interpreter here that can run the project.
        Err(error) => warn(&format!("the Dockerfile takes {} for granted: {error}", docker::USUAL_RUN_ENV)),
    }
    Ok(written)
}

fn docker_init(args: DockerInitArgs) -> Result<()> {
    let (project, interpreter) = args.project.open()?;
    write_docker_files(&project, interpreter, args.project.verbose, args.base_image.as_deref())?;
    Ok(())
}

fn docker_build(args: DockerBuildArgs) -> Result<()> {
    let (project, interpreter) = args.project.open()?;
    let engine = docker::Engine::choose(args.engine)?;
    let ask = docker::Build {
        engine,
        image: args.image.unwrap_or_else(|| docker::image_name(&project)),
        base_image: args.base_image,
        platform: args.platform,
        arguments: args.arguments,
    };
    let mut written = Vec::new();
    if !project.root.join("Dockerfile").exists() {
        written = write_docker_files(&project, interpreter, args.project.verbose, ask.base_image.as_deref())?;
    }
    let built = docker::build(&project, &ask);
    if built.is_err() {
        // A failed build leaves the project as it was.
        for file in &written {
            if let docker::Written::New(path) = file {
                let _ = std::fs::remove_file(path);
            }
        }
    }
    built?;
    print(&format!("built {}\n", ask.image));
    Ok(())
}

fn argo_generate(args: ArgoArgs) -> Result<()> {
    let mount = catalog::validate(&args.env, &args.pipeline, &args.mount)?;
    let ask = argo::Generate {
        image: args.image,
        pipeline: args.pipeline,
        env: args.env,
        mount,
        volume: args.volume,
        vineyard: args.vineyard,
        per: args.per,
        memory: args.memory,
        cpu: args.cpu,
        namespace: args.namespace,
        service_account: args.service_account,
        retries: args.retries,
        deadline: args.deadline,
        ttl: args.ttl,
        params: args.params,
        keep: args.keep,
    };
    ask.validate()?;
    let (project, facts) = facts(&args.project, &ask.env, std::slice::from_ref(&ask.pipeline))?;
    let pipeline = facts
        .pipelines
        .get(&ask.pipeline)
        .ok_or_else(|| Error::new(Kind::Internal, "the interpreter left the pipeline out"))?;
    let tasks = argo::tasks(pipeline, ask.per)?;
    argo::check_shared(&facts, pipeline, &tasks, &project.root, &ask)?.iter().for_each(|line| warn(line));
    catalog::missing_inputs(&facts, pipeline, &ask.env).iter().for_each(|line| warn(line));
    let text = argo::workflow(&project.slug(), &tasks, &ask, &facts);
    let name = format!("argo-{}.yml", project.slug());
    let path = match args.output {
        Some(path) if path.as_os_str() == "-" => {
            print(&text);
            return Ok(());
        }
        Some(path) if path.is_dir() => path.join(name),
        Some(path) => path,
        None => PathBuf::from(name),
    };
    if crate::kedro::write_generated(&path, &text, args.force)? {
        print(&format!("wrote {}: {} tasks; submit it with `argo submit {0}`\n", path.display(), tasks.len()));
    } else {
        print(&format!("nothing to do: {} is up to date\n", path.display()));
    }
    Ok(())
}
