//! The identity service: who the driver is, and whether it works.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tonic::{Request, Response, Status};

use super::link::{self, Question};
use super::proto::identity_server::Identity;
use super::proto::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    ProbeRequest, ProbeResponse,
};
use super::{DRIVER, failure::Failure};

/// How long the mounter may take to say that it is there.
const PATIENCE: Duration = Duration::from_secs(2);

/// The service.
#[derive(Clone, Debug)]
pub struct IdentityService {
    /// Where the mounter listens.
    pub mounter: PathBuf,
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER.into(),
            vendor_version: env!("CARGO_PKG_VERSION").into(),
            manifest: Default::default(),
        }))
    }

    /// None: volumes need no controller, and are the same on every node.
    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        Ok(Response::new(GetPluginCapabilitiesResponse::default()))
    }

    /// Ready when the mounter answers. Not an error otherwise: restarting this process would not help.
    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        let mounter = self.mounter.clone();
        let asked = tokio::task::spawn_blocking(move || {
            let now = Instant::now();
            // Nothing is asked of a mounter that is not there at all, so this does not wait for one.
            link::ask_within(&mounter, &Question::List, now, PATIENCE)
        });
        let ready = asked.await.map_err(|error| Failure::new(tonic::Code::Internal, error.to_string()))?.is_ok();
        Ok(Response::new(ProbeResponse { ready: Some(ready) }))
    }
}
