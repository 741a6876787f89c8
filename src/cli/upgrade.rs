//! `vineyard-fs upgrade`: a running mount goes on with this very program.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use super::store;
use crate::error::{Context, Error, Kind, Result};
use crate::fuse::keeper::upgrade;
use crate::fuse::mountinfo;
use crate::fuse::runtime::Runtime;

/// What `upgrade` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The mount point
    #[arg(value_hint = clap::ValueHint::DirPath)]
    pub mountpoint: PathBuf,
}

/// Replaces the server of a mount by one of this program. Open files, memory maps and waiting requests go on.
///
/// # Errors
/// If nothing is mounted there, or the new server does not come up: the former program goes on then.
pub fn run(arguments: &Args) -> Result<()> {
    let mountpoint = mountinfo::absolute(&arguments.mountpoint)?;
    let at = mountpoint.display();
    let runtime = Runtime::of(&mountpoint);
    if runtime.keeper().is_none() {
        let message = format!("{at} is not a mount of vineyard-fs that lives: see `vineyard-fs status`");
        return Err(Error::new(Kind::Invalid, message));
    }
    let program = std::fs::File::open("/proc/self/exe").context(|| "cannot open this program".into())?;
    let pid = upgrade::ask(&runtime.command_socket(), &OwnedFd::from(program))?;
    store::print(&format!("vineyard-fs: {at} is served by version {} now (process {pid})\n", env!("CARGO_PKG_VERSION")))
}
