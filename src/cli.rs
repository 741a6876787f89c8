//! The command line.
//!
//! Exit codes: 0 done, 1 not done (one line `vineyard-fs: …` on the standard error tells why, and what to do), 2 not
//! understood.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::error::Result;

pub mod csi;
pub mod gc;
pub mod get;
pub mod helper;
pub mod info;
pub mod kedro;
pub mod ls;
pub mod migrate;
pub mod mount;
pub mod mv;
pub mod options;
pub mod put;
pub mod rm;
pub mod status;
pub mod store;
pub mod top;
pub mod unmount;
pub mod upgrade;

/// Every vineyard dataset is a file.
#[derive(Debug, Parser)]
#[command(name = "vineyard-fs", version, about, long_about = None, after_help = EXAMPLES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  vineyard-fs mount /mnt/vineyard            show the datasets of a vineyardd, or of a private one
  vineyard-fs status                         how all mounts are doing
  vineyard-fs ls -l                          what is in the store
  vineyard-fs get X_train -o X_train.parquet
  vineyard-fs unmount /mnt/vineyard

In /etc/fstab:
  /run/vineyard.sock  /mnt/vineyard  fuse.vineyard-fs  prefix=run1,ro,_netdev  0 0";

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the datasets of a store as files
    Mount(Box<mount::Args>),
    /// Take a mount away, also a dead or hung one
    #[command(visible_alias = "umount")]
    Unmount(unmount::Args),
    /// How a mount is doing, or all of them
    Status(status::Args),
    /// What a mount does right now, or all of them: requests, latencies, bytes; again every second
    Top(top::Args),
    /// The driver that puts mounts into Kubernetes pods
    #[command(subcommand)]
    Csi(csi::CsiCommand),
    /// Let a running mount go on with this program, without a break
    Upgrade(upgrade::Args),
    /// Share the data of a Kedro pipeline through vineyard
    #[command(subcommand)]
    Kedro(kedro::KedroCommand),
    /// Run a command with a mount that ends with it
    Run(kedro::RunCommandArgs),
    /// List the datasets of a store
    Ls(ls::Args),
    /// All about one dataset
    Info(info::Args),
    /// Copy a view of a dataset to a file
    Get(get::Args),
    /// Make a dataset of a file
    Put(put::Args),
    /// Remove datasets
    Rm(rm::Args),
    /// Give a dataset another name
    Mv(mv::Args),
    /// Move datasets to an instance of the cluster
    Migrate(migrate::Args),
    /// Keep a copy of datasets on this instance of the cluster
    Pin(migrate::PinArgs),
    /// Remove names whose objects are gone, and copies that nothing names
    ///
    /// What commands and servers that were killed on this machine have left goes at once. What an unfinished save
    /// elsewhere has left goes ten minutes after its data was stored, and so does a copy that nothing leads to: until
    /// then somebody may be about to name it.
    Gc(gc::Args),
    /// Completions for a shell, to be sourced
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Keeps a mount; started by `mount`
    #[command(hide = true)]
    Keeper {
        /// Descriptor of the configuration
        config: i32,
        /// Descriptor of a pipe to whoever waits for the mount
        report: i32,
    },
    /// Serves a mount; started by its keeper
    #[command(hide = true)]
    Server {
        /// Descriptor of the connection to the kernel
        fuse: i32,
        /// Descriptor of the connection to the keeper
        control: i32,
        /// Descriptor that status is asked at
        status: i32,
    },
}

/// Entry point of the binary.
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    // `mount(8)` calls file system helpers as `SOURCE MOUNTPOINT -o OPTIONS`, without a subcommand.
    let cli = match Cli::try_parse_from(helper::translate(arguments)) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let result = match cli.command {
        Command::Mount(arguments) => mount::run(*arguments),
        Command::Unmount(arguments) => unmount::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Top(arguments) => top::run(&arguments),
        Command::Csi(command) => csi::run(command),
        Command::Upgrade(arguments) => upgrade::run(&arguments),
        Command::Kedro(command) => kedro::run(command),
        Command::Run(arguments) => kedro::run_command(arguments),
        Command::Ls(arguments) => ls::run(&arguments),
        Command::Info(arguments) => info::run(&arguments),
        Command::Get(arguments) => get::run(&arguments),
        Command::Put(arguments) => put::run(&arguments),
        Command::Rm(arguments) => rm::run(&arguments),
        Command::Mv(arguments) => mv::run(&arguments),
        Command::Migrate(arguments) => migrate::run(&arguments),
        Command::Pin(arguments) => migrate::pin(&arguments),
        Command::Gc(arguments) => gc::run(&arguments),
        Command::Completions { shell } => {
            // Into memory first: it panics where it cannot write.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "vineyard-fs", &mut script);
            store::print(&String::from_utf8_lossy(&script))
        }
        Command::Keeper { config, report } => mount::keeper(config, report),
        Command::Server { fuse, control, status } => {
            return crate::fuse::session::main(crate::fuse::session::Inherited { fuse, control, status });
        }
    };
    finish(result)
}

fn finish(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vineyard-fs: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
