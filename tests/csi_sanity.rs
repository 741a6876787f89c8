//! csi-sanity, the test suite of the Container Storage Interface, against the driver with a real mount and a real
//! vineyardd. It needs the program of github.com/kubernetes-csi/csi-test, which `scripts/test` builds and names in
//! `CSI_SANITY`. Tests that need a volume ask a controller for it; this driver has none, so one that only makes up names
//! stands in.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::process::Command;

use common::csi::Node;
use common::vineyardd::Vineyardd;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use vineyard_fs::csi::identity::IdentityService;
use vineyard_fs::csi::proto::controller_server::{Controller, ControllerServer};
use vineyard_fs::csi::proto::controller_service_capability::{Rpc, Type, rpc};
use vineyard_fs::csi::proto::identity_server::IdentityServer;
use vineyard_fs::csi::proto::{
    ControllerGetCapabilitiesRequest, ControllerGetCapabilitiesResponse, ControllerServiceCapability,
    CreateVolumeRequest, CreateVolumeResponse, DeleteVolumeRequest, DeleteVolumeResponse, Volume,
};

/// Tests that csi-sanity leaves out, and why. The rest must pass.
const SKIPPED: [(&str, &str); 4] = [
    ("NodeStageVolume", "no staging: a volume is a bind mount of the node's mount"),
    ("NodeUnstageVolume", "no staging"),
    ("NodeExpandVolume", "a volume is as large as its vineyardd"),
    ("ListVolumes", "no controller"),
];

struct Names;

#[tonic::async_trait]
impl Controller for Names {
    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let able = Type::Rpc(Rpc { r#type: rpc::Type::CreateDeleteVolume.into() });
        let capabilities = vec![ControllerServiceCapability { r#type: Some(able) }];
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let volume = Volume { volume_id: request.into_inner().name, ..Volume::default() };
        Ok(Response::new(CreateVolumeResponse { volume: Some(volume) }))
    }

    async fn delete_volume(&self, _: Request<DeleteVolumeRequest>) -> Result<Response<DeleteVolumeResponse>, Status> {
        Ok(Response::new(DeleteVolumeResponse {}))
    }
}

#[test]
fn csi_sanity_passes() {
    let Some(program) = std::env::var_os("CSI_SANITY") else {
        println!("left out: CSI_SANITY does not name the program; scripts/test builds it");
        return;
    };
    let (store, node) = (Vineyardd::start("64Mi"), Node::new());
    node.add(&store, "v");
    let controller = node.path("controller.sock");
    let listening = controller.clone();
    let identity = IdentityServer::new(IdentityService { mounter: node.path("kubelet/plugins/fs/mounter.sock") });
    std::thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let incoming = UnixListenerStream::new(UnixListener::bind(listening).unwrap());
            let server = Server::builder().add_service(ControllerServer::new(Names)).add_service(identity);
            server.serve_with_incoming(incoming).await.unwrap();
        });
    });
    let endpoint = |name: &str| format!("unix://{}", node.path(name).display());
    let below = |name: &str| node.path("kubelet/pods").join(name).display().to_string();
    let output = Command::new("timeout")
        .args(["-s", "KILL", "300"])
        .arg(program)
        .arg(format!("--csi.endpoint={}", endpoint("csi.sock")))
        .arg(format!("--csi.controllerendpoint={}", endpoint("controller.sock")))
        .arg(format!("--csi.mountdir={}", below("sanity-mount")))
        .arg(format!("--csi.stagingdir={}", below("sanity-staging")))
        .args(["--ginkgo.focus=Identity Service|Node Service", "--ginkgo.no-color", "--ginkgo.v"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let summary = text.lines().find(|line| line.contains("Passed")).unwrap();
    std::fs::write("/tmp/sanity.out", text.as_bytes()).unwrap();
    println!("csi-sanity: {summary}");
    for (what, why) in SKIPPED {
        println!("  skipped {what}: {why}");
    }
    let passed: u32 = summary.split("Passed").next().unwrap().split_whitespace().last().unwrap().parse().unwrap();
    assert!(passed >= 15, "{summary}");
}
