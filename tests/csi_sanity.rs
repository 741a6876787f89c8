//! csi-sanity, the test suite of the Container Storage Interface, against the driver with a real mount and a real
//! vineyardd. It needs the program of github.com/kubernetes-csi/csi-test, which `scripts/test` builds and names in
//! `CSI_SANITY`. Tests that need a volume ask a controller for it; this driver has none, so one that only makes up names
//! stands in.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::process::Command;

use common::csi::Node;
use common::vineyardd::Vineyardd;
use serde_json::Value;
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

/// Services whose tests run. The others are of the controller, of groups of snapshots and of their metadata, for which
/// the driver has no service: kubelets need none for volumes that are not made, attached or copied.
const SERVICES: [&str; 2] = ["Identity Service", "Node Service"];

/// What csi-sanity says about tests of these services that it leaves out, and why that is right. The rest must pass.
const SKIPPED: [(&str, &str); 4] = [
    ("NodeStageVolume not supported", "a volume is a bind mount of the node's mount, with nothing to stage"),
    ("NodeUnstageVolume not supported", "nothing is staged"),
    ("NodeExpandVolume not supported", "a volume is as large as its vineyardd"),
    (
        "Controller Service not provided",
        "it makes a volume first, for which the driver has no controller; tests/csi.rs does the same with volumes that \
         need none",
    ),
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
    let report = node.path("report.json");
    let output = Command::new("timeout")
        .args(["-s", "KILL", "300"])
        .arg(program)
        .arg(format!("--csi.endpoint={}", endpoint("csi.sock")))
        .arg(format!("--csi.controllerendpoint={}", endpoint("controller.sock")))
        .arg(format!("--csi.mountdir={}", below("sanity-mount")))
        .arg(format!("--csi.stagingdir={}", below("sanity-staging")))
        .arg(format!("--ginkgo.focus={}", SERVICES.join("|")))
        .args(["--ginkgo.no-color", "--ginkgo.v"])
        .arg(format!("--ginkgo.json-report={}", report.display()))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    let (mut passed, mut elsewhere) = (0, 0);
    for test in report[0]["SpecReports"].as_array().unwrap() {
        // Steps before and after the whole suite have no name.
        let Some(above) = test["ContainerHierarchyTexts"].as_array().filter(|above| !above.is_empty()) else {
            continue;
        };
        let above: Vec<&str> = above.iter().filter_map(Value::as_str).collect();
        let name = format!("{} {}", above.join(" "), test["LeafNodeText"].as_str().unwrap());
        match (test["State"].as_str().unwrap(), test["Failure"]["Message"].as_str().unwrap_or_default()) {
            ("passed", _) => {
                println!("passed: {name}");
                passed += 1;
            }
            _ if !SERVICES.iter().any(|service| name.starts_with(service)) => elsewhere += 1,
            ("skipped", said) => {
                let reason = SKIPPED.iter().find(|(what, _)| said.contains(what));
                println!("skipped: {name}: {}", reason.unwrap_or_else(|| panic!("{name}: {said}")).1);
            }
            (state, said) => panic!("{name}: {state}: {said}"),
        }
    }
    println!("csi-sanity: {passed} passed; {elsewhere} tests are of services that the driver does not have");
    assert!(passed >= 15, "{text}");
}
