//! The mounter: keeps the mounts of a node, one for each [`MountKey`], and makes them when they are asked for.
//!
//! Each mount is a keeper and a server of their own (`vineyard-fs mount --foreground`). A mount that nobody has used
//! for a while is unmounted. When the mounter is told to end, each keeper whose mount is in use hands its connection to
//! the node plugin, and the next mounter's keepers take it from there.

use std::collections::HashMap;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use tonic::Code;

use self::running::{Running, Spawn};
use super::attributes::{Format, Instance};
use super::failure::{Failure, Outcome};
use super::link::{self, Answer, Live, Question};
use super::socket::SocketFile;
use super::state::{MountKey, State};
use super::steps::{self, Step, Trouble};
use super::target;
use crate::error::{Context, Result};
use crate::fuse::{mount as mounting, mountinfo};
use crate::socket::{connect_within, is_full};
use crate::telemetry::Format as LogFormat;

pub mod running;

/// How long a mount may take to answer before its server is replaced.
const ANSWER: Duration = Duration::from_secs(2);
/// How long it may then take.
const ANSWER_AGAIN: Duration = Duration::from_secs(5);
/// How often unused mounts are looked for.
const LOOK: Duration = Duration::from_secs(5);
/// How often mounts that are there all the time are looked after.
const LOOK_ALWAYS: Duration = Duration::from_secs(2);
/// Longest question.
const QUESTION: Duration = Duration::from_secs(5);

/// What a mounter is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder shared with the node plugin.
    pub state_dir: PathBuf,
    /// The folder with the sockets of the node's vineyardds: `NAMESPACE/NAME/vineyard.sock`.
    pub sockets: PathBuf,
    /// Options for all mounts, as the command line takes them.
    pub mount_options: Vec<String>,
    /// How long a mount stays that no pod uses.
    pub idle: Duration,
    /// How many mounts one vineyardd may have: each has memory of its own.
    pub max_mounts: usize,
    /// Vineyardds that are mounted all the time, whether a volume asks for them or not.
    pub always: Vec<Instance>,
    /// Where those are mounted, as `NAMESPACE/NAME`, for pods that use folders of the node.
    pub host_dir: Option<PathBuf>,
    /// How log lines of the mounts look.
    pub log_format: LogFormat,
    /// What they log.
    pub log_level: String,
}

/// A mount, or the place for one.
#[derive(Default)]
struct Slot {
    running: Option<Running>,
    /// When somebody last asked for it.
    asked: Option<Instant>,
}

type Slots = HashMap<MountKey, Arc<Mutex<Slot>>>;

struct Mounter {
    options: Options,
    state: State,
    slots: Mutex<Slots>,
    /// When a mount of a vineyardd was last refused, because it has as many as it may.
    refused: Mutex<HashMap<Instance, Instant>>,
}

/// Runs until a signal ends it.
///
/// # Errors
/// If it cannot listen.
pub fn run(options: Options) -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    // Before any thread starts, so that all of them leave these to `wait`.
    signals.thread_block()?;
    let state = State::create(&options.state_dir)?;
    let socket = state.mounter_socket();
    std::fs::remove_file(&socket).ok();
    let listener = UnixListener::bind(&socket).context(|| format!("cannot listen on {socket:?}"))?;
    let file = SocketFile::of(&socket)?;
    tracing::info!("listening on {socket:?}; vineyardds are looked for in {:?}", options.sockets);
    let mounter = Arc::new(Mounter { options, state, slots: Mutex::default(), refused: Mutex::default() });
    let answering = mounter.clone();
    thread("questions", move || answering.serve(&listener))?;
    let looking = mounter.clone();
    thread("unused mounts", move || {
        loop {
            std::thread::sleep(LOOK);
            looking.unmount_unused();
        }
    })?;
    if !mounter.options.always.is_empty() {
        let keeping = mounter.clone();
        thread("lasting mounts", move || {
            loop {
                keeping.mount_always();
                std::thread::sleep(LOOK_ALWAYS);
            }
        })?;
    }
    let signal = signals.wait()?;
    tracing::info!("ending: {signal}");
    file.remove();
    mounter.end();
    Ok(())
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let started = std::thread::Builder::new().name(name.into()).stack_size(256 << 10).spawn(work);
    started.context(|| format!("no thread for {name}"))?;
    Ok(())
}

impl Mounter {
    fn serve(self: &Arc<Self>, listener: &UnixListener) {
        for stream in listener.incoming() {
            let this = self.clone();
            let begun = stream.map_err(Into::into).and_then(|stream| thread("question", move || this.answer(stream)));
            if let Err(error) = begun {
                tracing::warn!("a question is not answered: {error}");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }

    fn answer(&self, mut stream: UnixStream) {
        let asked = stream.set_read_timeout(Some(QUESTION)).map_err(Into::into).and_then(|()| link::receive(&stream));
        let answer = match asked {
            Ok(Question::Mount { key, wait_ms }) => {
                let until = Instant::now() + Duration::from_millis(wait_ms.min(600_000));
                match self.mount(&key, until) {
                    Ok(live) => Answer::Mounted(live),
                    Err(failure) => {
                        tracing::warn!("{}: {}", key.name(), failure.message);
                        Answer::Failed { full: failure.code == Code::ResourceExhausted, message: failure.message }
                    }
                }
            }
            Ok(Question::List) => Answer::Mounts { mounts: self.list() },
            Err(error) => Answer::Failed { message: error.to_string(), full: false },
        };
        // Who asked may have gone; the mount stays for the next question.
        link::send(&mut stream, &answer).ok();
    }

    /// Where a mount is.
    fn path(&self, key: &MountKey) -> PathBuf {
        match &self.options.host_dir {
            Some(folder) if self.options.always.iter().any(|vineyard| *key == lasting(vineyard)) => {
                folder.join(&key.vineyard.namespace).join(&key.vineyard.name)
            }
            _ => self.state.mount(key),
        }
    }

    /// Mounts what is to be there all the time and is not.
    fn mount_always(&self) {
        for vineyard in &self.options.always {
            let key = lasting(vineyard);
            if let Err(failure) = self.mount(&key, Instant::now() + LOOK_ALWAYS) {
                tracing::warn!("{}: {}", key.name(), failure.message);
            }
        }
    }

    fn slot(&self, key: &MountKey) -> Arc<Mutex<Slot>> {
        self.slots.lock().unwrap_or_else(|e| e.into_inner()).entry(key.clone()).or_default().clone()
    }

    /// A mount that answers.
    fn mount(&self, key: &MountKey, until: Instant) -> Outcome<Live> {
        let slot = self.slot(key);
        let mut slot = lock(&slot, until).ok_or_else(|| self.busy(key))?;
        slot.asked = Some(Instant::now());
        let path = self.path(key);
        if let Some(running) = &mut slot.running {
            if running.lives() && self.answers(&path, running) {
                // The keeper itself may have made the mount anew.
                if let Some(mount) = mountinfo::at(&path)?.filter(target::is_ours) {
                    running.device = mount.device;
                    return Ok(Live { key: key.clone(), path, device: mount.device });
                }
            }
            self.give_up(&mut slot, key)?;
        }
        let running = self.start(key, until)?;
        let device = running.device;
        slot.running = Some(running);
        slot.asked = Some(Instant::now());
        Ok(Live { key: key.clone(), path, device })
    }

    fn list(&self) -> Vec<Live> {
        let slots: Slots = self.slots.lock().unwrap_or_else(|e| e.into_inner()).clone();
        let live = slots.iter().filter_map(|(key, slot)| {
            // One that is being mounted is not there yet.
            let slot = slot.try_lock().ok()?;
            let running = slot.running.as_ref()?;
            Some(Live { key: key.clone(), path: self.path(key), device: running.device })
        });
        live.collect()
    }

    /// Whether the mount answers; a server that does not is replaced first.
    fn answers(&self, path: &std::path::Path, running: &Running) -> bool {
        let probe = |longest| {
            let plan = [Step::Probe(steps::path(path)?)];
            steps::run(&plan, Instant::now() + longest)
        };
        match probe(ANSWER) {
            Ok(Ok(_)) => true,
            Ok(Err(Trouble::Hung)) => {
                tracing::warn!("{path:?} does not answer; its server is replaced");
                running.kill_server(path);
                matches!(probe(ANSWER_AGAIN), Ok(Ok(_)))
            }
            Ok(Err(Trouble::Failed { errno, .. })) => {
                tracing::warn!("{path:?}: {}", errno.desc());
                false
            }
            Err(error) => {
                // Not the mount's fault.
                tracing::warn!("{path:?} is not tried: {error}");
                true
            }
        }
    }

    /// Ends a mount that does not work, and whoever waits for it gets an error. One whose keeper has ended may still be
    /// taken over by the next.
    fn give_up(&self, slot: &mut Slot, key: &MountKey) -> Outcome<()> {
        let path = self.path(key);
        if let Some(mut running) = slot.running.take() {
            if !running.lives() {
                tracing::warn!("{path:?}: the keeper has ended; starting another");
                return Ok(());
            }
            tracing::warn!("{path:?} does not work; making it anew");
            if let Err(error) = mounting::abort(running.device) {
                tracing::info!("{path:?}: {error}");
            }
            running.kill();
        }
        target::unmount(&path)
    }

    fn start(&self, key: &MountKey, until: Instant) -> Outcome<Running> {
        let path = self.path(key);
        if let Some(running) = Running::find(&path)? {
            tracing::info!("{path:?} goes on with the keeper it has");
            return Ok(running);
        }
        // One that is there already has targets, maybe of a mounter that allowed more.
        if mountinfo::at(&path)?.is_none() {
            self.check_room(key)?;
        }
        let socket = self.socket(key);
        while connect_within(&socket, until).is_err() {
            if Instant::now() >= until {
                return Err(self.absent(key));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        // A dead mount that is left there is taken away by the keeper; looking at it could hang.
        if mountinfo::at(&path)?.is_none() {
            std::fs::create_dir_all(&path).context(|| format!("cannot make {path:?}"))?;
        }
        let spawn = Spawn { path: &path, socket: &socket, key, options: &self.options, state: &self.state };
        let running = running::start(&spawn, until)?;
        tracing::info!("{path:?} shows vineyardd {}", key.vineyard);
        Ok(running)
    }

    /// How many mounts the vineyardd of `key` has besides that one.
    fn others(&self, key: &MountKey) -> usize {
        let slots = self.slots.lock().unwrap_or_else(|e| e.into_inner());
        let others = slots.iter().filter(|(other, _)| other.vineyard == key.vineyard && *other != key);
        // One that is locked is being made.
        others.filter(|(_, slot)| slot.try_lock().map_or(true, |slot| slot.running.is_some())).count()
    }

    fn refused(&self) -> MutexGuard<'_, HashMap<Instance, Instant>> {
        self.refused.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Refuses a mount too many.
    fn check_room(&self, key: &MountKey) -> Outcome<()> {
        let most = self.options.max_mounts;
        if self.options.always.contains(&key.vineyard) && *key == lasting(&key.vineyard) || self.others(key) < most {
            return Ok(());
        }
        self.refused().insert(key.vineyard.clone(), Instant::now());
        let message = format!(
            "vineyardd {} has {most} mounts on this node already, one for each fsGroup and format of its pods, and each \
             may take as much memory as cacheSize and stagingSize say: give pods the same fsGroup, or raise \
             --max-mounts (mounter.maxMounts of the chart)",
            key.vineyard
        );
        Err(Failure::new(Code::ResourceExhausted, message))
    }

    fn socket(&self, key: &MountKey) -> PathBuf {
        self.options.sockets.join(&key.vineyard.namespace).join(&key.vineyard.name).join("vineyard.sock")
    }

    /// Why another question has not been answered in time.
    fn busy(&self, key: &MountKey) -> Failure {
        if connect_within(&self.socket(key), Instant::now()).is_err_and(|error| !is_full(&error)) {
            return self.absent(key);
        }
        let message = format!(
            "the mount of vineyardd {} on this node is being made or mended and does not answer yet; the log of the \
             mounter on this node says why if this goes on",
            key.vineyard
        );
        Failure::new(Code::Unavailable, message)
    }

    fn absent(&self, key: &MountKey) -> Failure {
        let message = format!(
            "no vineyardd {} on this node: nothing listens on {} there; does its pod run on this node \
             (`kubectl get pods -n {} -o wide`)?",
            key.vineyard,
            self.socket(key).display(),
            key.vineyard.namespace
        );
        Failure::new(Code::Unavailable, message)
    }

    /// Unmounts what no target has used for a while.
    fn unmount_unused(&self) {
        let slots: Slots = self.slots.lock().unwrap_or_else(|e| e.into_inner()).clone();
        for (key, slot) in slots {
            // One that is being asked for is not unused.
            let Ok(mut slot) = slot.try_lock() else { continue };
            // Another waits for its place, maybe.
            let wanted = self.refused().get(&key.vineyard).is_some_and(|refused| refused.elapsed() < self.options.idle);
            let idle = if wanted { LOOK.min(self.options.idle) } else { self.options.idle };
            let recent = slot.asked.is_some_and(|asked| asked.elapsed() < idle);
            let Some(running) = &mut slot.running else { continue };
            let device = running.device;
            // A keeper that has ended is started again when the node plugin looks after its targets.
            if recent || in_use(device, &self.state).unwrap_or(true) {
                continue;
            }
            tracing::info!("{}: unused; unmounting", key.name());
            running.end();
            slot.running = None;
            if let Err(failure) = target::unmount(&self.path(&key)) {
                tracing::warn!("{}", failure.message);
            }
            self.remove(&key);
        }
    }

    /// Removes the directory that a mount was on, so that no pod takes it for the mount. The one above it stays: pods that
    /// have it as a volume see the next mount there.
    fn remove(&self, key: &MountKey) {
        let path = self.path(key);
        if mountinfo::at(&path).is_ok_and(|mounted| mounted.is_none())
            && let Err(error) = std::fs::remove_dir(&path)
        {
            tracing::info!("{path:?} stays: {error}");
        }
    }

    /// Ends all mounts; those in use are handed on by their keepers.
    fn end(&self) {
        let slots: Slots = self.slots.lock().unwrap_or_else(|e| e.into_inner()).clone();
        let until = Instant::now() + ANSWER_AGAIN;
        let mut ending = Vec::new();
        for (key, slot) in &slots {
            if let Some(mut slot) = lock(slot, until)
                && let Some(running) = slot.running.take()
            {
                running.terminate();
                ending.push((key, running));
            }
        }
        for (key, mut running) in ending {
            running.end();
            self.remove(key);
        }
        self.state.tidy();
    }
}

/// The mount of a vineyardd for pods of any group.
fn lasting(vineyard: &Instance) -> MountKey {
    MountKey { vineyard: vineyard.clone(), format: Format::default(), group: None }
}

/// Whether a mount is shown anywhere but at its own place.
fn in_use(device: (u32, u32), state: &State) -> Result<bool> {
    Ok(mountinfo::all()?.iter().any(|mount| mount.device == device && !mount.mountpoint.starts_with(state.mounts())))
}

/// Locks, if that works before `until`.
fn lock(slot: &Mutex<Slot>, until: Instant) -> Option<MutexGuard<'_, Slot>> {
    loop {
        match slot.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() >= until => return None,
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
