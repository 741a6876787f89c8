//! `vineyard-fs migrate` and `vineyard-fs pin`: data to where it is needed, ahead of time.

use std::path::Path;
use std::sync::Arc;

use indicatif::HumanBytes;

use super::store::{self, Opened, Place};
use crate::error::{Error, Kind, Result};
use crate::fs::FileSystem;
use crate::fs::copies::Brought;
use crate::fs::direct::Named;
use crate::fs::naming::lock_of;
use crate::vineyard::copy::{Progress, copy_size};
use crate::vineyard::store::InstanceInfo;
use crate::vineyard::{Client, ClientOptions, InstanceId, Store};

/// What `migrate` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Datasets, by name or by the file name of a view
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Number or host name of the instance to move them to [default: the one of the socket]
    #[arg(long, value_name = "INSTANCE")]
    pub to: Option<String>,
    #[command(flatten)]
    pub(super) place: Place,
}

/// What `pin` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct PinArgs {
    /// Datasets, by name or by the file name of a view
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Remove the copies on this instance instead
    #[arg(long)]
    pub drop: bool,
    #[command(flatten)]
    pub(super) place: Place,
}

/// Moves datasets.
///
/// # Errors
/// If one could not be moved; it is where it was then.
pub fn run(arguments: &Args) -> Result<()> {
    let opened = arguments.place.open()?;
    let here = opened.store.instance()?.id;
    let target = match &arguments.to {
        None => Target::Here,
        Some(text) => target(text, here, &*opened.store)?,
    };
    store::catch_interrupts()?;
    for text in &arguments.names {
        let named = opened.fs.require(&opened.path(text))?;
        named.shown()?;
        let (brought, to) = match &target {
            Target::Here => (with_bar(&opened.fs, &*opened.store, &named, FileSystem::move_here)?, here),
            Target::Beside(id, client, fs) => {
                let named = fs.require(&named.name)?;
                (with_bar(fs, &**client, &named, FileSystem::move_here)?, *id)
            }
            Target::Far(id) => (far(&opened, &named, *id)?, *id),
        };
        let name = store::printable(&named.name);
        store::print(&match brought {
            Brought::Here(object) => format!("{name} is on instance {to} already ({object})\n"),
            Brought::Copied(object) => format!("{name} is now on instance {to} ({object})\n"),
        })?;
    }
    opened.warn();
    Ok(())
}

/// Keeps copies here, or removes them.
///
/// # Errors
/// If a copy could not be made or removed.
pub fn pin(arguments: &PinArgs) -> Result<()> {
    let opened = arguments.place.open()?;
    let here = opened.store.instance()?.id;
    store::catch_interrupts()?;
    for text in &arguments.names {
        let named = opened.fs.require(&opened.path(text))?;
        let name = store::printable(&named.name);
        if arguments.drop {
            let copies = opened.fs.copies(named.object)?;
            match copies.iter().find(|copy| copy.instance == here) {
                Some(copy) => {
                    opened.fs.drop_copy(copy)?;
                    store::print(&format!("removed the copy of {name} on instance {here}\n"))?;
                }
                None => store::print(&format!("{name} has no copy on instance {here}\n"))?,
            }
            continue;
        }
        named.shown()?;
        let copy = |fs: &FileSystem, named: &Named, progress: Progress| fs.copy_here(named.object, progress);
        store::print(&match with_bar(&opened.fs, &*opened.store, &named, copy)? {
            Brought::Here(object) => format!("{name} is on instance {here} already ({object})\n"),
            Brought::Copied(object) => format!("{name} has a copy on instance {here} ({object})\n"),
        })?;
    }
    opened.warn();
    Ok(())
}

/// Copies with a bar of bytes.
fn with_bar(
    fs: &FileSystem,
    store: &dyn Store,
    named: &Named,
    copy: impl FnOnce(&FileSystem, &Named, Progress) -> Result<Brought>,
) -> Result<Brought> {
    let meta = store.metas(&[named.object], true)?.remove(&named.object).transpose()?;
    let size = meta.map(|meta| copy_size(store, &meta)).transpose()?;
    let bar = store::progress(&named.name, size);
    let started = std::time::Instant::now();
    let result = copy(fs, named, &mut |bytes| {
        bar.inc(bytes);
        store::check_interrupt()
    });
    bar.finish_and_clear();
    if let (Ok(Brought::Copied(_)), Some(size)) = (&result, size) {
        let seconds = started.elapsed().as_secs_f64().max(1e-6);
        let rate = HumanBytes((size as f64 / seconds) as u64);
        eprintln!("{}: {} in {seconds:.2} s, {rate}/s", store::printable(&named.name), HumanBytes(size));
    }
    result
}

/// Where datasets go.
enum Target {
    /// The instance that is asked anyway.
    Here,
    /// Another one of this machine, by its own socket.
    Beside(InstanceId, Arc<Client>, Box<FileSystem>),
    /// One that only TCP leads to.
    Far(InstanceId),
}

fn target(text: &str, here: InstanceId, source: &dyn Store) -> Result<Target> {
    let cluster = source.cluster()?;
    let (id, info) = choose(text, &cluster)?;
    if id == here {
        return Ok(Target::Here);
    }
    // The socket may be one of another machine that is called the same: the number tells.
    let socket = Path::new(&info.ipc_socket);
    let beside = socket
        .exists()
        .then(|| Client::connect(ClientOptions::socket(socket).remote(store::remote())))
        .and_then(Result::ok);
    match beside.filter(|client| client.instance().is_ok_and(|instance| instance.rpc_endpoint == info.rpc_endpoint)) {
        Some(client) if client.instance()?.id == id => {
            let client = Arc::new(client);
            let fs = FileSystem::unmounted(client.clone() as Arc<dyn Store>).locked_by(lock_of(socket));
            Ok(Target::Beside(id, client, Box::new(fs)))
        }
        _ => Ok(Target::Far(id)),
    }
}

fn choose<'c>(
    text: &str,
    cluster: &'c std::collections::BTreeMap<InstanceId, InstanceInfo>,
) -> Result<(InstanceId, &'c InstanceInfo)> {
    let number = text.strip_prefix('i').unwrap_or(text).parse().ok().map(InstanceId);
    let found: Vec<_> = cluster.iter().filter(|(id, info)| Some(**id) == number || info.hostname == text).collect();
    let list = |ids: Vec<&InstanceId>| ids.iter().map(|id| id.to_string()).collect::<Vec<_>>().join(", ");
    match found.as_slice() {
        [(id, info)] => Ok((**id, info)),
        [] => {
            let there = list(cluster.keys().collect());
            Err(Error::not_found(format!("no instance {text:?} in the cluster; there is {there}")))
        }
        several => {
            let which = list(several.iter().map(|(id, _)| *id).collect());
            Err(Error::new(Kind::Invalid, format!("several instances are on {text:?}: choose one of {which}")))
        }
    }
}

/// The instance makes the copy by its own means; how far it is, it does not tell.
fn far(opened: &Opened, named: &Named, to: InstanceId) -> Result<Brought> {
    let meta = opened.store.metas(&[named.object], true)?.remove(&named.object).transpose()?;
    if meta.is_some_and(|meta| meta.instance() == to) {
        return Ok(Brought::Here(named.object));
    }
    let bar = store::progress(&named.name, None);
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    let copy = opened.store.migrate_to(to, named.object);
    bar.finish_and_clear();
    let copy = copy?;
    match opened.fs.promote(&named.name, named.object, copy) {
        Ok(()) => Ok(Brought::Copied(copy)),
        Err(error) => {
            opened.store.delete(&[copy])?;
            Err(error)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_is_chosen_by_number_or_host() {
        let info = |host: &str| InstanceInfo {
            hostname: host.into(),
            rpc_endpoint: String::new(),
            ipc_socket: String::new(),
            shared: true,
        };
        let cluster = [(InstanceId(0), info("a")), (InstanceId(3), info("b")), (InstanceId(4), info("b"))].into();
        assert_eq!(choose("3", &cluster).unwrap().0, InstanceId(3));
        assert_eq!(choose("i0", &cluster).unwrap().0, InstanceId(0));
        assert_eq!(choose("a", &cluster).unwrap().0, InstanceId(0));
        assert!(choose("b", &cluster).err().unwrap().to_string().contains("i3, i4"));
        assert!(choose("7", &cluster).err().unwrap().to_string().contains("i0, i3, i4"));
    }
}
