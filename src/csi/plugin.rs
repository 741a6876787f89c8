//! The node plugin: both services on a Unix socket, repairs, and metrics.

use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

use super::holder::Holder;
use super::identity::IdentityService;
use super::metrics::Metrics;
use super::node::{NodeOptions, NodeService};
use super::proto::identity_server::IdentityServer;
use super::proto::node_server::NodeServer;
use super::socket::SocketFile;
use super::state::State;
use crate::error::{Context, Error, Kind, Result};

/// How often targets are compared with the mounts there are.
const REPAIR: Duration = Duration::from_secs(2);
/// Calls at once; a waiting one costs a thread.
const THREADS: usize = 64;
/// Connections that wait for the server.
const CONNECTIONS: usize = 16;
/// How long calls may go on after a signal.
const LAST_CALLS: Duration = Duration::from_secs(2);

/// What a node plugin is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The socket that the kubelet asks at.
    pub endpoint: PathBuf,
    /// The folder shared with the mounter.
    pub state_dir: PathBuf,
    /// Where metrics are asked for.
    pub metrics: Option<SocketAddr>,
    /// For the service.
    pub node: NodeOptions,
}

/// The socket that an endpoint names: `unix:///csi/csi.sock`, `unix:/csi/csi.sock` or a path.
///
/// # Errors
/// What is wrong with it.
pub fn endpoint(text: &str) -> std::result::Result<PathBuf, String> {
    let path = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:")).unwrap_or(text);
    if path.contains("://") || !Path::new(path).is_absolute() {
        return Err(format!("{text:?} is not a Unix socket such as unix:///csi/csi.sock"));
    }
    Ok(path.into())
}

/// Runs until a signal ends it.
///
/// # Errors
/// If it cannot listen.
pub fn run(options: Options) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(THREADS)
        .thread_stack_size(512 << 10)
        .thread_name("call")
        .build()
        .context(|| "cannot start".into())?;
    let result = runtime.block_on(serve(options));
    runtime.shutdown_timeout(LAST_CALLS);
    result
}

async fn serve(mut options: Options) -> Result<()> {
    let state = State::create(&options.state_dir)?;
    let kubelet = std::path::absolute(&options.node.kubelet_dir)?;
    if !kubelet.is_dir() {
        let message = format!("{kubelet:?} is not there: give the kubelet's --root-dir with --kubelet-dir");
        return Err(Error::new(Kind::Invalid, message));
    }
    options.node.kubelet_dir = kubelet;
    let metrics = Arc::new(Metrics::default());
    if let Some(address) = options.metrics {
        let listener = TcpListener::bind(address).await.context(|| format!("cannot listen on {address}"))?;
        tokio::spawn(metrics.clone().serve(listener));
    }
    let identity = IdentityService { mounter: state.mounter_socket() };
    let holder = Holder::start(&state.holder_socket())?;
    let node = NodeService::new(options.node.clone(), state.clone(), metrics);
    let (repairing, closing) = (node.clone(), holder.clone());
    let holder_socket = SocketFile::of(&state.holder_socket())?;
    tokio::spawn(async move {
        loop {
            let (repairing, holder) = (repairing.clone(), holder.clone());
            let work = move || {
                repairing.repair();
                if let Err(error) = holder.drop_unused() {
                    tracing::warn!("{error}");
                }
            };
            // Fails only when the runtime ends.
            tokio::task::spawn_blocking(work).await.ok();
            tokio::time::sleep(REPAIR).await;
        }
    });
    let listener = listen(&options.endpoint)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tracing::info!("node {} listens on {:?}", options.node.node_id, options.endpoint);
    let (ended, mut is_ended) = watch::channel(false);
    let (send, incoming) = mpsc::channel(CONNECTIONS);
    let socket = SocketFile::of(&options.endpoint)?;
    let accepting = tokio::spawn(accept(listener, socket, options.endpoint.clone(), send, is_ended.clone()));
    let end = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("ending");
        closing.close();
        holder_socket.remove();
        ended.send(true).ok();
    };
    let served = Server::builder()
        .add_service(IdentityServer::new(identity))
        .add_service(NodeServer::new(node))
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), end);
    // A caller that keeps its connection open would keep this process.
    let patience = async move {
        is_ended.wait_for(|ended| *ended).await.ok();
        tokio::time::sleep(LAST_CALLS).await;
    };
    let served = tokio::select! {
        served = served => served.map_err(|error| Error::new(Kind::Internal, "gRPC").with_source(error)),
        () = patience => Ok(()),
    };
    // It has removed its socket when it has ended.
    accepting.await.ok();
    state.tidy();
    served
}

/// Takes connections until the end. A socket whose file somebody removed is made anew: the kubelet would not reach it.
async fn accept(
    mut listener: UnixListener,
    mut socket: SocketFile,
    endpoint: PathBuf,
    send: mpsc::Sender<std::io::Result<UnixStream>>,
    mut is_ended: watch::Receiver<bool>,
) {
    loop {
        tokio::select! {
            taken = listener.accept() => match taken {
                // Fails only at the end.
                Ok((stream, _)) => drop(send.send(Ok(stream)).await),
                Err(error) => {
                    tracing::warn!("a connection is not taken: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            () = send.closed() => break,
            () = async { drop(is_ended.wait_for(|ended| *ended).await) } => break,
            () = tokio::time::sleep(REPAIR) => {
                if socket.is_gone() {
                    tracing::warn!("{endpoint:?} was removed; it is made anew");
                    match listen(&endpoint).and_then(|next| Ok((SocketFile::of(&endpoint)?, next))) {
                        Ok(made) => (socket, listener) = made,
                        Err(error) => tracing::warn!("{error}"),
                    }
                }
            }
        }
    }
    socket.remove();
}

fn listen(endpoint: &Path) -> Result<UnixListener> {
    // One that was killed leaves its socket; anything else that is there is not this program's.
    match std::fs::symlink_metadata(endpoint) {
        Ok(there) if there.file_type().is_socket() => std::fs::remove_file(endpoint)?,
        Ok(_) => return Err(Error::new(Kind::Exists, format!("{endpoint:?} is there and is no socket"))),
        Err(_) => {}
    }
    UnixListener::bind(endpoint).context(|| format!("cannot listen on {endpoint:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_unix_sockets() {
        for text in ["unix:///csi/csi.sock", "unix:/csi/csi.sock", "/csi/csi.sock"] {
            assert_eq!(endpoint(text), Ok("/csi/csi.sock".into()), "{text}");
        }
        for text in ["tcp://0.0.0.0:80", "csi.sock", "", "unix://csi.sock"] {
            assert!(endpoint(text).is_err(), "{text}");
        }
    }
}
