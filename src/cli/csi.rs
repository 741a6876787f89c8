//! `vineyard-fs csi`: the two processes of the Kubernetes driver, and a question to one of them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::ValueHint;

use super::{options, store};
use crate::csi::attributes::Instance;
use crate::csi::link::{self, Answer, Live, Question};
use crate::csi::node::NodeOptions;
use crate::csi::state::State;
use crate::csi::{mounter, plugin};
use crate::error::{Error, Kind, Result};
use crate::telemetry::{self, Format};

const STATE: &str = "/var/lib/kubelet/plugins/fs.vineyard.v6d.io";

const EXAMPLES: &str = "\
The chart helm/vineyard-fs runs both on every node; by hand, on a machine with a vineyardd at
/var/run/vineyard-kubernetes/vineyard-system/vineyardd/vineyard.sock:
  vineyard-fs csi mounter &
  vineyard-fs csi node --endpoint unix:///csi/csi.sock --node-id $(hostname) &";

/// What `csi` takes.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = EXAMPLES)]
pub enum CsiCommand {
    /// Answers the kubelet: publishes volumes into pods
    Node(NodeArgs),
    /// Keeps the mounts of a node
    Mounter(MounterArgs),
    /// Whether the mounter of this node answers, and what it has mounted
    Mounts {
        /// Folder that node plugin and mounter share
        #[arg(long, value_name = "DIR", default_value = STATE, value_hint = ValueHint::DirPath)]
        state_dir: PathBuf,
    },
}

/// Logs of both.
#[derive(Clone, Debug, clap::Args)]
pub struct LogArgs {
    /// How log lines look
    #[arg(long, value_enum, default_value_t)]
    pub log_format: Format,
    /// What to log: error, warn, info, debug, trace, or a filter
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = telemetry::check)]
    pub log_level: String,
}

/// What `csi node` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeArgs {
    /// Socket that the kubelet asks at
    #[arg(long, value_name = "unix://PATH", env = "CSI_ENDPOINT", value_parser = plugin::endpoint)]
    pub endpoint: PathBuf,
    /// Name of this node
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    pub node_id: String,
    /// The kubelet's --root-dir
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet", value_hint = ValueHint::DirPath)]
    pub kubelet_dir: PathBuf,
    /// Folder that node plugin and mounter share
    #[arg(long, value_name = "DIR", default_value = STATE, value_hint = ValueHint::DirPath)]
    pub state_dir: PathBuf,
    /// The vineyardd of volumes that name none
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub default_vineyard: Option<Instance>,
    /// Longest time for one call; a vineyardd that is not there yet is waited for so long
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = options::millis)]
    pub deadline: u64,
    /// Answer GET /metrics (Prometheus) and GET /healthz here
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics: Option<SocketAddr>,
    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
}

/// What `csi mounter` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct MounterArgs {
    /// Folder that node plugin and mounter share
    #[arg(long, value_name = "DIR", default_value = STATE, value_hint = ValueHint::DirPath)]
    pub state_dir: PathBuf,
    /// Folder with the sockets of this node's vineyardds, NAMESPACE/NAME/vineyard.sock
    #[arg(long, value_name = "DIR", default_value = "/var/run/vineyard-kubernetes", value_hint = ValueHint::DirPath)]
    pub sockets: PathBuf,
    /// How long a mount stays that no pod uses
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = options::millis)]
    pub idle: u64,
    /// Mounts of one vineyardd, at most: each fsGroup and format of its pods has one, with memory of its own
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    pub max_mounts: u16,
    /// Mount this vineyardd all the time, whether a volume asks for it or not
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub always: Vec<Instance>,
    /// Mount those of --always at DIR/NAMESPACE/NAME, for pods that use folders of the node
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, requires = "always")]
    pub host_dir: Option<PathBuf>,
    /// An option for every mount, as in /etc/fstab (see `vineyard-fs mount --help`): cache_size=4G
    #[arg(short = 'o', value_name = "OPTION,...")]
    pub options: Vec<String>,
    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Runs it.
///
/// # Errors
/// If it cannot start.
pub fn run(command: CsiCommand) -> Result<()> {
    match command {
        CsiCommand::Node(arguments) => node(arguments),
        CsiCommand::Mounter(arguments) => keep(arguments),
        CsiCommand::Mounts { state_dir } => mounts(&state_dir),
    }
}

fn node(arguments: NodeArgs) -> Result<()> {
    telemetry::init(arguments.log.log_format, &arguments.log.log_level);
    plugin::run(plugin::Options {
        endpoint: arguments.endpoint,
        state_dir: arguments.state_dir,
        metrics: arguments.metrics,
        node: NodeOptions {
            node_id: arguments.node_id,
            kubelet_dir: arguments.kubelet_dir,
            default_vineyard: arguments.default_vineyard,
            deadline: Duration::from_millis(arguments.deadline),
        },
    })
}

fn keep(arguments: MounterArgs) -> Result<()> {
    telemetry::init(arguments.log.log_format, &arguments.log.log_level);
    mounter::run(mounter::Options {
        state_dir: arguments.state_dir,
        sockets: arguments.sockets,
        mount_options: arguments.options.into_iter().flat_map(|list| ["-o".to_owned(), list]).collect(),
        idle: Duration::from_millis(arguments.idle),
        max_mounts: arguments.max_mounts.into(),
        always: arguments.always,
        host_dir: arguments.host_dir.map(std::path::absolute).transpose()?,
        log_format: arguments.log.log_format,
        log_level: arguments.log.log_level,
    })
}

fn mounts(state_dir: &std::path::Path) -> Result<()> {
    let state = State::create(state_dir)?;
    match link::ask(&state.mounter_socket(), &Question::List, Instant::now())? {
        Answer::Mounts { mounts } => {
            let line = |live: &Live| format!("{}  {}\n", live.key.vineyard, live.path.display());
            store::print(&mounts.iter().map(line).collect::<String>())
        }
        _ => Err(Error::new(Kind::Internal, "the mounter answered another question")),
    }
}
