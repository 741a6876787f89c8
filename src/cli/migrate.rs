//! `vineyard-fs migrate` and `vineyard-fs pin`: data to where it is needed, ahead of time.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use indicatif::HumanBytes;

use super::store::{self, Notes, Opened, Place};
use crate::error::{Error, Kind, Result};
use crate::fs::FileSystem;
use crate::fs::copies::Brought;
use crate::fs::direct::Named;
use crate::fs::naming::lock_of;
use crate::vineyard::copy::{Progress, whole};
use crate::vineyard::store::{Instance, InstanceInfo};
use crate::vineyard::{InstanceId, ObjectId, Store};

/// How often it is looked whether to go on.
const SLICE: Duration = Duration::from_millis(100);
/// How often the owner of data that another instance copies is asked whether it is still there.
const PING: Duration = Duration::from_secs(2);

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
    let opened = arguments.place.open_to_change()?;
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
            Target::Here => (with_bar(&opened.fs, &named, FileSystem::move_here)?, here),
            Target::Beside(id, fs, _notes) => {
                let named = fs.require(&named.name)?;
                (with_bar(fs, &named, FileSystem::move_here)?, *id)
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
    let opened = arguments.place.open_to_change()?;
    let here = opened.store.instance()?.id;
    store::catch_interrupts()?;
    for text in &arguments.names {
        let named = opened.fs.require(&opened.path(text))?;
        let name = store::printable(&named.name);
        if arguments.drop {
            store::print(&match drop_copies(&opened, &named, here)? {
                true => format!("removed the copy of {name} on instance {here}\n"),
                false => format!("{name} has no copy on instance {here}\n"),
            })?;
            continue;
        }
        named.shown()?;
        let copy = |fs: &FileSystem, named: &Named, progress: Progress| fs.copy_here(named.object, progress);
        store::print(&match with_bar(&opened.fs, &named, copy)? {
            Brought::Here(object) => format!("{name} is on instance {here} already ({object})\n"),
            Brought::Copied(object) => format!("{name} has a copy on instance {here} ({object})\n"),
        })?;
    }
    opened.warn();
    Ok(())
}

/// Removes the copies of a dataset on this instance. False if there are none.
///
/// # Errors
/// `Busy` if they are all that is left of it.
fn drop_copies(opened: &Opened, named: &Named, here: InstanceId) -> Result<bool> {
    let mut copies = opened.fs.copies(named.object)?;
    copies.retain(|copy| copy.instance == here);
    if !copies.is_empty() && opened.fs.living(named.object).is_ok_and(|all| all.iter().all(|m| m.instance() == here)) {
        let name = store::printable(&named.name);
        let what = format!("the copy of {name:?} on instance {here} is all that is left of it");
        let hint = "`vineyard-fs gc` makes it the dataset, `vineyard-fs rm` removes that";
        return Err(Error::new(Kind::Busy, format!("{what}: {hint}")));
    }
    copies.iter().try_for_each(|copy| opened.fs.drop_copy(copy))?;
    Ok(!copies.is_empty())
}

/// Copies with a bar of bytes.
fn with_bar(
    fs: &FileSystem,
    named: &Named,
    copy: impl FnOnce(&FileSystem, &Named, Progress) -> Result<Brought>,
) -> Result<Brought> {
    let size = fs.bytes_to_copy(named.object);
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
    Beside(InstanceId, Box<FileSystem>, Option<Notes>),
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
    let beside = socket.exists().then(|| store::connect_to_change(socket)).and_then(Result::ok);
    let is_there = |instance: Instance| instance.rpc_endpoint == info.rpc_endpoint && instance.id == id;
    match beside {
        Some((client, notes)) if client.instance().is_ok_and(is_there) => {
            let fs = FileSystem::unmounted(Arc::new(client) as Arc<dyn Store>).locked_by(lock_of(socket));
            Ok(Target::Beside(id, Box::new(fs), notes))
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
    let living = opened.fs.living(named.object)?;
    let there = living.iter().find(|meta| meta.instance() == to).map(|meta| meta.id());
    let copy = match (there, living.first()) {
        (Some(object), _) if object == named.object => return Ok(Brought::Here(object)),
        (Some(copy), _) => copy,
        (None, Some(source)) => {
            whole(source)?;
            let bar = store::progress(&named.name, None);
            bar.enable_steady_tick(Duration::from_millis(200));
            let store = opened.store.clone() as Arc<dyn Store>;
            let copy = let_copy(&store, source.id(), source.instance(), to);
            bar.finish_and_clear();
            copy?
        }
        (None, None) => return Err(named.shown().err().unwrap_or_else(|| Error::stale("the dataset is gone"))),
    };
    match opened.fs.promote(&named.name, named.object, copy) {
        Ok(()) => Ok(Brought::Copied(copy)),
        Err(error) => {
            if there.is_none() {
                opened.fs.discard(copy, &error);
            }
            Err(error)
        }
    }
}

/// What comes while another instance copies.
enum News {
    /// It is through.
    Ended(Result<ObjectId>),
    /// The owner of the data does not answer: it never will be.
    OwnerLost(Error),
}

/// Waits for an instance that copies an object of `owner` for itself, as long as nobody interrupts that and the owner
/// answers.
fn let_copy(store: &Arc<dyn Store>, object: ObjectId, owner: InstanceId, to: InstanceId) -> Result<ObjectId> {
    store.reach(owner)?;
    let (told, news) = channel();
    // Neither thread is waited for: what it tells after the news is of no use.
    let thread = |name: &str| std::thread::Builder::new().name(name.into());
    let (copier, tell) = (store.clone(), told.clone());
    thread("migration").spawn(move || drop(tell.send(News::Ended(copier.migrate_to(to, object)))))?;
    let asker = store.clone();
    thread("owner").spawn(move || {
        let lost = loop {
            std::thread::sleep(PING);
            if let Err(error) = asker.reach(owner) {
                break error;
            }
        };
        drop(told.send(News::OwnerLost(lost)));
    })?;
    let left = |error: Error| {
        let what = format!("{error}; instance {to} may still make a copy of {object}, which nobody needs");
        Err(Error::new(error.kind(), what))
    };
    loop {
        match news.recv_timeout(SLICE) {
            Ok(News::Ended(copy)) => return copy,
            Ok(News::OwnerLost(error)) => return left(error),
            Err(RecvTimeoutError::Timeout) => {
                if let Err(error) = store::check_interrupt() {
                    return left(error);
                }
            }
            Err(RecvTimeoutError::Disconnected) => return Err(Error::new(Kind::Internal, "nobody migrates any more")),
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
