//! The node service: puts volumes into pods and takes them away.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tonic::{Code, Request, Response, Status};

use super::attributes::{self, Instance};
use super::failure::{Failure, Outcome};
use super::link::{self, Answer, Live, Question};
use super::locks::{Held, Locks};
use super::metrics::{Call, Metrics};
use super::proto::node_server::Node;
use super::proto::node_service_capability::{Rpc, Type, rpc};
use super::proto::volume_capability::access_mode::Mode;
use super::proto::volume_capability::{AccessType, MountVolume};
use super::proto::volume_usage::Unit;
use super::proto::{
    NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse,
    NodeGetInfoRequest, NodeGetInfoResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability, NodeStageVolumeRequest,
    NodeStageVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest,
    NodeUnstageVolumeResponse, VolumeCapability, VolumeCondition, VolumeUsage,
};
use super::record::{Record, Records};
use super::state::{MountKey, State};
use super::steps::{self, Figures, Step, Trouble};
use super::target;
use crate::fuse::mountinfo::Mount;

/// How long a mount may take to tell its figures.
const STATISTICS: Duration = Duration::from_secs(5);
/// How often a target that ended while it was published is tried again.
const ATTEMPTS: usize = 3;
/// Longest volume id: the specification's limit for most fields.
const ID_MAX: usize = 128;

/// What a node plugin is told.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Name of this node.
    pub node_id: String,
    /// The kubelet's folder, below which all targets are.
    pub kubelet_dir: PathBuf,
    /// The vineyardd of volumes that name none.
    pub default_vineyard: Option<Instance>,
    /// Longest time for one call.
    pub deadline: Duration,
}

/// The service.
#[derive(Clone)]
pub struct NodeService {
    inner: Arc<Inner>,
}

struct Inner {
    options: NodeOptions,
    state: State,
    records: Records,
    /// Targets that a call is working on.
    busy: Locks,
    /// Directories of prefixes that are being made and bound, or removed.
    prefixes: Locks,
    /// Where the mounter said that mounts are.
    places: Mutex<HashMap<MountKey, PathBuf>>,
    metrics: Arc<Metrics>,
}

impl NodeService {
    /// On a state folder.
    pub fn new(options: NodeOptions, state: State, metrics: Arc<Metrics>) -> Self {
        let records = Records::of(&state);
        let (busy, prefixes, places) = (Locks::default(), Locks::default(), Mutex::default());
        NodeService { inner: Arc::new(Inner { options, state, records, busy, prefixes, places, metrics }) }
    }

    /// Binds targets again whose mount was made anew. Called every few seconds; the kubelet's own repetitions
    /// (`requiresRepublish`) come a minute apart.
    pub fn repair(&self) {
        self.inner.repair();
    }

    /// Runs `work`, which waits for processes and the kernel, where that holds nothing else up.
    async fn call<T: Send + 'static>(
        &self,
        call: Call,
        volume: String,
        work: impl FnOnce(&Inner) -> Outcome<T> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let (inner, begun) = (self.inner.clone(), Instant::now());
        let done = tokio::task::spawn_blocking(move || work(&inner)).await;
        let done = done.unwrap_or_else(|error| Err(Failure::new(Code::Internal, error.to_string())));
        let code = done.as_ref().err().map_or(Code::Ok, |failure| failure.code);
        self.inner.metrics.count(call, code, begun.elapsed());
        match done {
            Ok(value) => {
                tracing::debug!("{call:?} {volume:?}: {:?}", begun.elapsed());
                Ok(Response::new(value))
            }
            Err(failure) => {
                tracing::warn!("{call:?} {volume:?}: {code:?}: {}", failure.message);
                Err(failure.into())
            }
        }
    }
}

/// When a call must be answered: the caller's own deadline (`grpc-timeout`) or this program's.
fn until<T>(request: &Request<T>, longest: Duration) -> Instant {
    let header = request.metadata().get("grpc-timeout").and_then(|value| value.to_str().ok());
    let asked = header.and_then(grpc_timeout).unwrap_or(longest);
    // The answer still has to arrive.
    Instant::now() + longest.min(asked.mul_f32(0.9))
}

/// A number of at most eight digits and a unit (gRPC over HTTP/2).
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let value = Some(digits).filter(|digits| digits.len() <= 8)?.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

fn check_id(id: &str) -> Outcome<()> {
    match id.len() {
        0 => Err(Failure::invalid("volume_id is missing")),
        // Longer ones are allowed; they only have to be short enough for a message.
        _ => Ok(()),
    }
}

/// An id for a message.
fn short(id: &str) -> String {
    id.chars().take(ID_MAX).collect()
}

/// What a capability says about writing, and its group.
fn capability(capability: Option<&VolumeCapability>) -> Outcome<(bool, Option<u32>)> {
    let capability = capability.ok_or_else(|| Failure::invalid("volume_capability is missing"))?;
    let MountVolume { mount_flags, volume_mount_group, fs_type } = match &capability.access_type {
        Some(AccessType::Mount(mount)) => mount,
        Some(AccessType::Block(_)) => {
            return Err(Failure::invalid(
                "block volumes are not supported: datasets are files (volumeMode: Filesystem)",
            ));
        }
        None => return Err(Failure::invalid("volume_capability has no access_type")),
    };
    if !["", "fuse.vineyard-fs", "vineyard-fs"].contains(&fs_type.as_str()) {
        return Err(Failure::invalid(format!("fsType {fs_type:?} is not what this driver mounts: leave it out")));
    }
    let mut read_only = false;
    for flag in mount_flags {
        match flag.as_str() {
            "ro" => read_only = true,
            "rw" => {}
            _ => {
                return Err(Failure::invalid(format!("mount option {flag:?} is not known; there are ro and rw")));
            }
        }
    }
    let mode = capability.access_mode.as_ref().map_or(Mode::Unknown, super::proto::volume_capability::AccessMode::mode);
    match mode {
        Mode::Unknown => return Err(Failure::invalid("volume_capability has no access_mode")),
        Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly => read_only = true,
        _ => {}
    }
    let group = match volume_mount_group.as_str() {
        "" => None,
        text => {
            Some(text.parse().map_err(|_| Failure::invalid(format!("volume_mount_group {text:?} is not a number")))?)
        }
    };
    Ok((read_only, group))
}

impl Inner {
    fn lock(&self, target: &Path) -> Outcome<Held<'_>> {
        self.busy.take(target, Instant::now()).ok_or_else(|| {
            let message = format!("another call is working on {}; trying again will help", target.display());
            Failure::new(Code::Aborted, message)
        })
    }

    /// Keeps the directories of a record's prefix as they are until `until`: no other call makes, binds or removes
    /// them. The first is enough for all, and is taken by nobody who waits for another mount. The inner `None` is for
    /// a record without a prefix, the outer one if it is not to be had in time.
    fn hold_prefix(&self, record: &Record, until: Instant) -> Option<Option<Held<'_>>> {
        let first = record.attributes.prefix.as_deref().and_then(|prefix| prefix.split('/').next());
        match first {
            None => Some(None),
            Some(first) => self.prefixes.take(&self.state.mount(&record.key()).join(first), until).map(Some),
        }
    }

    fn live(&self, key: &MountKey, until: Instant) -> Outcome<Live> {
        let wait = until.saturating_duration_since(Instant::now());
        let question = Question::Mount { key: key.clone(), wait_ms: wait.as_millis() as u64 };
        match link::ask(&self.state.mounter_socket(), &question, until)? {
            Answer::Mounted(live) => {
                let mut places = self.places.lock().unwrap_or_else(|e| e.into_inner());
                places.insert(key.clone(), live.path.clone());
                Ok(live)
            }
            _ => Err(Failure::new(Code::Internal, "the mounter answered another question")),
        }
    }

    fn publish(&self, request: &NodePublishVolumeRequest, until: Instant) -> Outcome<NodePublishVolumeResponse> {
        check_id(&request.volume_id)?;
        let target = target::check(&request.target_path, &self.options.kubelet_dir)?;
        let (read_only, group) = capability(request.volume_capability.as_ref())?;
        let attributes = attributes::parse(&request.volume_context, self.options.default_vineyard.as_ref())?;
        let read_only = read_only || request.readonly || attributes.read_only;
        if let Some(parent) = target.parent() {
            use std::os::unix::fs::DirBuilderExt;
            std::fs::DirBuilder::new().recursive(true).mode(0o750).create(parent)?;
        }
        let target = target::resolve(&target)?
            .ok_or_else(|| Failure::new(Code::Internal, "the folder above the target has just been removed"))?;
        let _lock = self.lock(&target)?;
        let record = Record { volume: request.volume_id.clone(), target, attributes, read_only, group };
        self.publish_record(&record, until)?;
        Ok(NodePublishVolumeResponse {})
    }

    fn publish_record(&self, record: &Record, until: Instant) -> Outcome<()> {
        // What was published before stays known whatever happens now, so that a later attempt can repair it.
        let known = self.records.read(&record.target).as_ref() == Some(record);
        for attempt in 1.. {
            let mounted = target::mounts(&record.target)?;
            if let Some(there) = mounted.last() {
                self.check_same(record, there)?;
            }
            let live = self.live(&record.key(), until)?;
            match mounted.last() {
                Some(there) if shows(there, record, &live) => {
                    self.records.write(record)?;
                    return Ok(());
                }
                None => target::prepare(&record.target)?,
                // Left by a call that ended half-way, so no pod has it. Nothing on top of it would help: it must go.
                Some(there) if there.read_only != record.read_only => target::unmount(&record.target)?,
                Some(_) if mounted.len() < target::REPAIRS => {
                    tracing::info!("{:?} shows a mount that has ended; binding it again", record.target);
                }
                Some(_) => target::unmount(&record.target)?,
            }
            // Whoever unpublishes the last pod of this prefix sees the record, or has removed the directory before.
            let Some(_prefix) = self.hold_prefix(record, until) else { return Err(target::hung(record)) };
            self.records.write(record)?;
            let bound = target::bind(record, &live.path, until);
            // The mount may have been replaced in between.
            let verified = bound.and_then(|()| match target::mounts(&record.target)?.last() {
                Some(there) if shows(there, record, &live) => Ok(()),
                _ => {
                    let message = format!("the mount of vineyardd {} has just been replaced", live.key.vineyard);
                    Err(Failure::new(Code::Unavailable, message))
                }
            });
            match verified {
                Ok(()) => return Ok(()),
                Err(failure) if failure.code == Code::Unavailable && attempt < ATTEMPTS && Instant::now() < until => {
                    tracing::info!("{:?}: {}", record.target, failure.message);
                }
                Err(failure) => {
                    // Nothing half done stays, such as a mount that is writable where it should not be. But a volume
                    // of a running pod stays, dead, until it can be repaired.
                    if !known {
                        target::unmount(&record.target).ok();
                        self.records.remove(&record.target)?;
                    }
                    return Err(failure);
                }
            }
        }
        Err(Failure::new(Code::Internal, "no attempt was made"))
    }

    /// A target that is mounted already must be the same volume, in the same way.
    fn check_same(&self, record: &Record, there: &Mount) -> Outcome<()> {
        let at = record.target.display();
        if !target::is_ours(there) {
            let message = format!("target_path {at} is a mount of {} already; unmount that first", there.fs_type);
            return Err(Failure::new(Code::FailedPrecondition, message));
        }
        let former = self.records.read(&record.target);
        let differs = match &former {
            // A call that ended between mounting and making that read-only goes on.
            _ if there.read_only != record.read_only && former.as_ref() != Some(record) => Some("readonly"),
            Some(former) if former.volume != record.volume => Some("volume_id"),
            Some(former) if former.group != record.group => Some("volume_mount_group"),
            Some(former) if former.attributes != record.attributes => Some("volume attributes"),
            _ => None,
        };
        match differs {
            None => Ok(()),
            Some(what) => {
                let message = format!("{at} is published already, with another {what}: unpublish it first");
                Err(Failure::new(Code::AlreadyExists, message))
            }
        }
    }

    fn unpublish(&self, request: &NodeUnpublishVolumeRequest) -> Outcome<NodeUnpublishVolumeResponse> {
        check_id(&request.volume_id)?;
        let target = target::check(&request.target_path, &self.options.kubelet_dir)?;
        let Some(target) = target::resolve(&target)? else { return Ok(NodeUnpublishVolumeResponse {}) };
        let _lock = self.lock(&target)?;
        target::unmount(&target)?;
        match std::fs::remove_dir(&target) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            // Not made by this driver, then. The volume is gone, which is what was asked for.
            Err(error) => tracing::warn!("{target:?} stays: {error}"),
        }
        let record = self.records.read(&target);
        self.records.remove(&target)?;
        if let Some(record) = record {
            self.forget_prefix(&record);
        }
        Ok(NodeUnpublishVolumeResponse {})
    }

    /// Removes the empty directory that was made for a prefix, with the last target of this node that shows it.
    fn forget_prefix(&self, record: &Record) {
        let Some(prefix) = &record.attributes.prefix else { return };
        let (key, root) = (record.key(), record.root());
        let until = Instant::now() + target::REMOVE_PREFIX;
        // Somebody is publishing there, on a mount that does not answer.
        let Some(_prefix) = self.hold_prefix(record, until) else { return };
        let needed =
            |other: &Record| other.target != record.target && other.key() == key && other.root().starts_with(&root);
        // Those that are there all the time may be in another folder.
        let place = self.places.lock().unwrap_or_else(|e| e.into_inner()).get(&key).cloned();
        let mount = place.unwrap_or_else(|| self.state.mount(&key));
        if self.records.all().iter().any(needed) || target::mounts(&mount).map_or(true, |mounts| mounts.is_empty()) {
            return;
        }
        target::remove_prefix(prefix, &mount, until);
    }

    fn statistics(&self, request: &NodeGetVolumeStatsRequest) -> Outcome<NodeGetVolumeStatsResponse> {
        check_id(&request.volume_id)?;
        if request.volume_path.is_empty() {
            return Err(Failure::invalid("volume_path is missing"));
        }
        let absent = || {
            let message =
                format!("volume {:?} is not published at {:.300}", short(&request.volume_id), request.volume_path);
            Failure::new(Code::NotFound, message)
        };
        let path = target::check(&request.volume_path, &self.options.kubelet_dir).map_err(|_| absent())?;
        let path = target::resolve(&path)?.ok_or_else(absent)?;
        let mounted = target::mounts(&path)?;
        if mounted.last().is_none_or(|there| !target::is_ours(there))
            || self.records.read(&path).is_some_and(|record| record.volume != request.volume_id)
        {
            return Err(absent());
        }
        let asked = steps::run(&[Step::Figures(steps::path(&path)?)], Instant::now() + STATISTICS)?;
        Ok(match asked {
            Ok(figures) => NodeGetVolumeStatsResponse {
                usage: usage(figures),
                volume_condition: Some(condition(false, "the mount answers")),
            },
            Err(trouble) => {
                let message = match trouble {
                    Trouble::Hung => format!("the mount has not answered for {STATISTICS:?}"),
                    Trouble::Failed { errno: nix::errno::Errno::ENOTCONN, .. } => {
                        "the mount has ended; it is bound again in a moment".to_owned()
                    }
                    Trouble::Failed { errno, .. } => {
                        format!("the mount answers, but its vineyardd does not: {}", errno.desc())
                    }
                };
                NodeGetVolumeStatsResponse { usage: Vec::new(), volume_condition: Some(condition(true, &message)) }
            }
        })
    }

    fn repair(&self) {
        let mut live = Vec::<Live>::new();
        let records = self.records.all();
        self.metrics.set_targets(records.len());
        for record in records {
            let Ok(mounted) = target::mounts(&record.target) else { continue };
            let Some(there) = mounted.last() else {
                // A node that was started again, or a call that was interrupted. The kubelet asks again for what it
                // still wants.
                if std::fs::symlink_metadata(&record.target).is_err() {
                    self.records.remove(&record.target).ok();
                }
                continue;
            };
            if !target::is_ours(there) {
                continue;
            }
            let key = record.key();
            let known = live.iter().find(|live| live.key == key).cloned();
            let current = match known {
                Some(current) => current,
                None => match self.live(&key, Instant::now() + Duration::from_millis(100)) {
                    Ok(current) => {
                        live.push(current.clone());
                        current
                    }
                    Err(failure) => {
                        tracing::debug!("{:?}: {}", record.target, failure.message);
                        continue;
                    }
                },
            };
            if shows(there, &record, &current) {
                continue;
            }
            let Ok(_lock) = self.lock(&record.target) else { continue };
            // It may have been unpublished meanwhile.
            if self.records.read(&record.target).as_ref() != Some(&record) {
                continue;
            }
            match self.publish_record(&record, Instant::now() + self.options.deadline) {
                Ok(()) => {
                    self.metrics.repaired();
                    tracing::info!("{:?} works again", record.target);
                }
                Err(failure) => tracing::warn!("{:?} is not repaired: {}", record.target, failure.message),
            }
        }
    }
}

/// Whether a target's mount is what the record asks for, on the living mount.
fn shows(there: &Mount, record: &Record, live: &Live) -> bool {
    target::is_ours(there)
        && there.device == live.device
        && there.root == record.root()
        && there.read_only == record.read_only
}

fn condition(abnormal: bool, message: &str) -> VolumeCondition {
    VolumeCondition { abnormal, message: message.into() }
}

fn usage(figures: Figures) -> Vec<VolumeUsage> {
    let one = |unit: Unit, total: u64, free: u64| {
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        VolumeUsage {
            available: number(free),
            total: number(total),
            used: number(total.saturating_sub(free)),
            unit: unit.into(),
        }
    };
    vec![
        one(Unit::Bytes, figures.total_bytes, figures.free_bytes),
        one(Unit::Inodes, figures.total_files, figures.free_files),
    ]
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let until = until(&request, self.inner.options.deadline);
        let request = request.into_inner();
        self.call(Call::Publish, short(&request.volume_id), move |inner| inner.publish(&request, until)).await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        self.call(Call::Unpublish, short(&request.volume_id), move |inner| inner.unpublish(&request)).await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        self.call(Call::Stats, short(&request.volume_id), move |inner| inner.statistics(&request)).await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let known = [rpc::Type::GetVolumeStats, rpc::Type::VolumeCondition, rpc::Type::VolumeMountGroup];
        let capabilities =
            known.map(|known| NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: known.into() })) });
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities: capabilities.into() }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.inner.options.node_id.clone(),
            ..NodeGetInfoResponse::default()
        }))
    }

    async fn node_stage_volume(
        &self,
        _: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        Err(Status::unimplemented("volumes are published without staging"))
    }

    async fn node_unstage_volume(
        &self,
        _: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        Err(Status::unimplemented("volumes are published without staging"))
    }

    async fn node_expand_volume(
        &self,
        _: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        Err(Status::unimplemented("a volume is as large as its vineyardd"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::csi::proto::volume_capability::{AccessMode, BlockVolume};

    fn mount(group: &str, flags: &[&str], mode: Mode) -> VolumeCapability {
        VolumeCapability {
            access_mode: Some(AccessMode { mode: mode.into() }),
            access_type: Some(AccessType::Mount(MountVolume {
                fs_type: String::new(),
                mount_flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
                volume_mount_group: group.into(),
            })),
        }
    }

    #[test]
    fn capabilities_are_read_or_refused() {
        let read = |it: VolumeCapability| capability(Some(&it));
        assert_eq!(read(mount("8737", &[], Mode::MultiNodeMultiWriter)), Ok((false, Some(8737))));
        assert_eq!(read(mount("", &["ro"], Mode::SingleNodeWriter)), Ok((true, None)));
        assert_eq!(read(mount("", &[], Mode::MultiNodeReaderOnly)), Ok((true, None)));
        let block = VolumeCapability {
            access_type: Some(AccessType::Block(BlockVolume {})),
            ..mount("", &[], Mode::SingleNodeWriter)
        };
        let none = VolumeCapability { access_type: None, ..mount("", &[], Mode::SingleNodeWriter) };
        let other = VolumeCapability {
            access_type: Some(AccessType::Mount(MountVolume { fs_type: "ext4".into(), ..MountVolume::default() })),
            ..mount("", &[], Mode::SingleNodeWriter)
        };
        for (wrong, what) in [
            (mount("staff", &[], Mode::SingleNodeWriter), "not a number"),
            (mount("-1", &[], Mode::SingleNodeWriter), "not a number"),
            (mount("", &["suid"], Mode::SingleNodeWriter), "suid"),
            (mount("", &[], Mode::Unknown), "access_mode"),
            (block, "block"),
            (none, "access_type"),
            (other, "ext4"),
        ] {
            let failure = read(wrong).unwrap_err();
            assert_eq!(failure.code, Code::InvalidArgument);
            assert!(failure.message.contains(what), "{}", failure.message);
        }
        assert!(capability(None).unwrap_err().message.contains("missing"));
    }

    #[test]
    fn deadlines_of_callers_are_read() {
        assert_eq!(grpc_timeout("5S"), Some(Duration::from_secs(5)));
        assert_eq!(grpc_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(grpc_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for wrong in ["", "S", "5", "123456789S", "-5S", "5X", "é"] {
            assert_eq!(grpc_timeout(wrong), None, "{wrong}");
        }
    }
}
