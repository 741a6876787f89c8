//! `vineyard-fs unmount`: takes a mount away, whether its processes live, hang or are gone.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::error::{Error, Kind, Result};
use crate::fuse::runtime::{KeeperRecord, Runtime, start_time};
use crate::fuse::{mount, mountinfo, status};

/// How long a keeper may take to end after its mount.
const KEEPER_END: Duration = Duration::from_secs(15);

/// What `unmount` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The mount point
    #[arg(value_hint = clap::ValueHint::DirPath)]
    pub mountpoint: PathBuf,
    /// Also if files are open or nothing answers: whoever waits for the mount gets an error
    #[arg(long, short = 'f')]
    pub force: bool,
}

/// Unmounts.
///
/// # Errors
/// If nothing is mounted there, or it is in use and `force` is not given.
pub fn run(arguments: &Args) -> Result<()> {
    let mountpoint = mountinfo::absolute(&arguments.mountpoint)?;
    let at = mountpoint.display();
    let runtime = Runtime::of(&mountpoint);
    let keeper = runtime.keeper();
    let mut removed = 0;
    while let Some(mounted) = mountinfo::at(&mountpoint)?.filter(|mounted| mounted.fs_type == mountinfo::FS_TYPE) {
        // A mount below another one on the same place is not the living keeper's.
        let alive = keeper.as_ref().is_some_and(|keeper| keeper.device.is_none_or(|device| device == mounted.device));
        if arguments.force {
            end_by_force(&runtime, keeper.as_ref(), mounted.device);
        }
        let result = match alive && !arguments.force {
            true => mount::unmount(&mountpoint),
            false => mount::detach(&mountpoint),
        };
        match result {
            Ok(()) => removed += 1,
            // The keeper may have been faster.
            Err(_) if mount::wait_gone(&mountpoint, mounted.device, Duration::ZERO)? => removed += 1,
            Err(error) if error.kind() == Kind::Busy => {
                let message = format!(
                    "{at} is in use: close its files and leave its directories, or use --force (`fuser -vm {at}` lists users)"
                );
                return Err(Error::new(Kind::Busy, message));
            }
            Err(error) => return Err(error),
        }
        if !mount::wait_gone(&mountpoint, mounted.device, Duration::from_secs(5))? {
            return Err(Error::new(Kind::Busy, format!("{at} is still mounted")));
        }
    }
    match keeper {
        Some(keeper) if removed > 0 || arguments.force => wait_for_end(&keeper, arguments.force)?,
        Some(keeper) => {
            let message = format!("{at} is not mounted yet, but process {} is about to: use --force", keeper.pid);
            return Err(Error::new(Kind::Busy, message));
        }
        None if removed == 0 && runtime.record().is_none() => {
            return Err(Error::new(Kind::Invalid, format!("{at} is not a mount of vineyard-fs")));
        }
        None => {}
    }
    // What a killed keeper could not remove.
    if runtime.keeper().is_none() {
        runtime.remove();
    }
    Ok(())
}

/// Ends the connection and the processes, so that nothing waits for anything any more.
fn end_by_force(runtime: &Runtime, keeper: Option<&KeeperRecord>, device: (u32, u32)) {
    let report = status::ask(&runtime.keeper_socket(), Duration::from_millis(500)).unwrap_or_default();
    // Only root may abort. For others the end of both processes does the same.
    if let Err(error) = mount::abort(device) {
        tracing::debug!("the connection is not aborted: {error}");
    }
    // The keeper then stops its children and tidies up; a keeper that does not is killed below.
    if let Some(server) = report.pointer("/server/pid").and_then(Value::as_u64)
        && keeper.is_some()
    {
        signal(server, Signal::SIGKILL);
    }
}

fn wait_for_end(keeper: &KeeperRecord, force: bool) -> Result<()> {
    let lives = || start_time(keeper.pid) == Some(keeper.start);
    let until = Instant::now() + KEEPER_END;
    if force {
        signal(u64::from(keeper.pid), Signal::SIGTERM);
    }
    while lives() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    if !lives() {
        return Ok(());
    }
    if !force {
        return Err(Error::new(Kind::Timeout, format!("unmounted, but keeper {} does not end", keeper.pid)));
    }
    signal(u64::from(keeper.pid), Signal::SIGKILL);
    Ok(())
}

fn signal(pid: u64, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid)
        && pid > 1
    {
        kill(Pid::from_raw(pid), signal).ok();
    }
}

/// The mounts of this program, by their mount points.
///
/// # Errors
/// If the list of mounts cannot be read.
pub fn mounts() -> Result<Vec<mountinfo::Mount>> {
    let mut all = mountinfo::all()?;
    all.retain(|mount| mount.fs_type == mountinfo::FS_TYPE && mount.mountpoint != Path::new(""));
    Ok(all)
}
