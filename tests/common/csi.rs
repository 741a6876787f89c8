//! A node of a cluster for tests of the Kubernetes driver: a kubelet's folder, both of the driver's processes, and a
//! gRPC client as a kubelet is one.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use vineyard_fs::csi::proto::node_client::NodeClient;
use vineyard_fs::csi::proto::volume_capability::access_mode::Mode;
use vineyard_fs::csi::proto::volume_capability::{AccessMode, AccessType, MountVolume};
use vineyard_fs::csi::proto::{
    NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest, NodeUnpublishVolumeRequest,
    VolumeCapability,
};

use super::point::{run, wait_until};
use super::vineyardd::Vineyardd;

/// One line of the list of mounts.
#[derive(Clone, Debug)]
pub struct Mounted {
    pub device: String,
    pub root: String,
    pub options: String,
}

pub fn mounts_at(path: &Path) -> Vec<Mounted> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let lines = text.lines().map(|line| line.split(' ').map(str::to_owned).collect::<Vec<_>>());
    let here = lines.filter(|fields| Path::new(&fields[4]) == path);
    here.map(|f| Mounted { device: f[2].clone(), root: f[3].clone(), options: f[5].clone() }).collect()
}

/// A node: a kubelet's folder, the driver's two processes, and a place for sockets of vineyardds.
pub struct Node {
    pub folder: TempDir,
    pub plugin: Option<Child>,
    pub mounter: Option<Child>,
    pub runtime: tokio::runtime::Runtime,
    pub channel: Option<Channel>,
}

impl Node {
    pub fn new() -> Self {
        Node::with("10s")
    }

    pub fn with(deadline: &str) -> Self {
        let folder = TempDir::with_prefix("vineyard-fs-csi-").unwrap();
        for name in ["kubelet/pods", "sockets"] {
            std::fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut node = Node { folder, plugin: None, mounter: None, runtime, channel: None };
        node.start_mounter();
        node.start_plugin(deadline);
        node
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().canonicalize().unwrap().join(name)
    }

    pub fn spawn(&self, name: &str, arguments: &[&str]) -> Child {
        let log = std::fs::File::options().create(true).append(true).open(self.path(name)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vineyard-fs"));
        command.arg("csi").args(arguments).arg("--state-dir").arg(self.path("kubelet/plugins/fs"));
        command.args(["--log-level", "info,vineyard_fs=debug"]);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
    }

    pub fn start_mounter(&mut self) {
        self.start_mounter_with(&["--idle", "10m", "-o", "cache_size=64M"]);
    }

    /// Starts the mounter, in place of the one that runs if there is one.
    pub fn start_mounter_with(&mut self, options: &[&str]) {
        Node::stop(&mut self.mounter, Signal::SIGTERM);
        let sockets = self.path("sockets");
        let arguments = [&["mounter", "--sockets", sockets.to_str().unwrap()], options].concat();
        self.mounter = Some(self.spawn("mounter.log", &arguments));
    }

    pub fn start_plugin(&mut self, deadline: &str) {
        let kubelet = self.path("kubelet");
        let endpoint = format!("unix://{}", self.path("csi.sock").display());
        let arguments = ["node", "--endpoint", &endpoint, "--node-id", "n1", "--deadline", deadline];
        let folders = ["--kubelet-dir", kubelet.to_str().unwrap(), "--default-vineyard", "system/v"];
        self.plugin = Some(self.spawn("plugin.log", &[&arguments[..], &folders[..]].concat()));
        self.connect();
    }

    /// To the plugin that listens now.
    pub fn connect(&mut self) {
        let endpoint = format!("unix://{}", self.path("csi.sock").display());
        let start = Instant::now();
        let channel = loop {
            let connecting = Endpoint::from_shared(endpoint.clone()).unwrap();
            match self.runtime.block_on(connecting.connect()) {
                Ok(channel) => break channel,
                Err(error) => assert!(start.elapsed() < Duration::from_secs(60), "{error}: {}", self.log("plugin.log")),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        self.channel = Some(channel);
    }

    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Makes a vineyardd known as `system/<name>`.
    pub fn add(&self, store: &Vineyardd, name: &str) {
        let folder = self.path("sockets/system").join(name);
        std::fs::create_dir_all(&folder).unwrap();
        std::os::unix::fs::symlink(store.socket(), folder.join("vineyard.sock")).unwrap();
    }

    pub fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone().unwrap())
    }

    pub fn target(&self, pod: &str) -> PathBuf {
        self.path("kubelet/pods").join(pod).join("volumes/kubernetes.io~csi/vineyard/mount")
    }

    /// An inline volume of a pod, as the kubelet asks for it.
    pub fn request(&self, pod: &str, attributes: &[(&str, &str)]) -> NodePublishVolumeRequest {
        let fixed =
            [("vineyard", "system/v"), ("csi.storage.k8s.io/ephemeral", "true"), ("csi.storage.k8s.io/pod.name", pod)];
        let pairs = fixed.iter().chain(attributes);
        NodePublishVolumeRequest {
            volume_id: format!("csi-{pod}"),
            target_path: self.target(pod).to_str().unwrap().into(),
            volume_capability: Some(writer("")),
            volume_context: pairs.map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            ..NodePublishVolumeRequest::default()
        }
    }

    pub fn publish(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        self.runtime.block_on(self.node().node_publish_volume(request)).map(drop)
    }

    pub fn unpublish(&self, request: &NodePublishVolumeRequest) -> Result<(), Status> {
        self.runtime.block_on(self.node().node_unpublish_volume(undo(request))).map(drop)
    }

    pub fn stats(&self, request: &NodePublishVolumeRequest) -> Result<NodeGetVolumeStatsResponse, Status> {
        let asked = NodeGetVolumeStatsRequest {
            volume_id: request.volume_id.clone(),
            volume_path: request.target_path.clone(),
            staging_target_path: String::new(),
        };
        self.runtime.block_on(self.node().node_get_volume_stats(asked)).map(tonic::Response::into_inner)
    }

    /// The number of a process of the only mount.
    pub fn pid(&self, of: &str) -> i32 {
        let mounts = std::fs::read_dir(self.path("kubelet/plugins/fs/mounts")).unwrap();
        let mount = mounts.map(|entry| entry.unwrap().path()).find(|path| !mounts_at(path).is_empty()).unwrap();
        let mut pid = None;
        wait_until("the keeper tells it", || {
            let output = run(&["status", "--json", mount.to_str().unwrap()]);
            let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            pid = status[of]["pid"].as_i64();
            pid.is_some()
        });
        pid.unwrap().try_into().unwrap()
    }

    pub fn stop(child: &mut Option<Child>, with: Signal) {
        if let Some(mut child) = child.take() {
            kill(Pid::from_raw(child.id() as i32), with).unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("plugin:\n{}\nmounter:\n{}", self.log("plugin.log"), self.log("mounter.log"));
        }
        // Whatever a failed test left: targets first, then mounts, through the list of mounts alone.
        self.channel = None;
        Node::stop(&mut self.plugin, Signal::SIGTERM);
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let folder = self.path("kubelet");
        let ours = |part: &str| -> Vec<PathBuf> {
            let below = folder.join(part);
            text.lines()
                .filter_map(|line| line.split(' ').nth(4))
                .map(PathBuf::from)
                .filter(|p| p.starts_with(&below))
                .collect()
        };
        for target in ours("pods") {
            nix::mount::umount2(&target, nix::mount::MntFlags::MNT_DETACH).ok();
        }
        Node::stop(&mut self.mounter, Signal::SIGTERM);
        for mount in ours("plugins") {
            Command::new("timeout")
                .args(["-s", "KILL", "20", env!("CARGO_BIN_EXE_vineyard-fs"), "unmount", "--force"])
                .arg(mount)
                .stderr(Stdio::null())
                .status()
                .unwrap();
        }
    }
}

pub fn undo(request: &NodePublishVolumeRequest) -> NodeUnpublishVolumeRequest {
    NodeUnpublishVolumeRequest { volume_id: request.volume_id.clone(), target_path: request.target_path.clone() }
}

pub fn writer(group: &str) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        access_type: Some(AccessType::Mount(MountVolume {
            volume_mount_group: group.into(),
            ..MountVolume::default()
        })),
    }
}

/// Runs something that looks into a mount with a time limit of its own.
#[track_caller]
pub fn shell(command: &str) -> String {
    let output = Command::new("timeout").args(["-s", "KILL", "60", "sh", "-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
