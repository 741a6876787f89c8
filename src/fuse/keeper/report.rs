//! What a keeper says of itself.

use std::time::Instant;

use serde_json::{Value, json};

use super::Keeper;
use super::children::Server;
use crate::fuse::config::MountConfig;

impl Keeper {
    /// The line that a successful `mount` prints.
    pub(super) fn summary(&self) -> String {
        let how = match &self.no_passthrough {
            None => "passthrough on".to_owned(),
            Some(reason) => format!("passthrough off: {reason}"),
        };
        let whose = if self.store.is_private() { "a private vineyardd" } else { "vineyardd" };
        let log = match &self.config.log_file {
            Some(file) => format!("; log: {}", file.display()),
            None => String::new(),
        };
        let MountConfig { mountpoint, socket, .. } = &self.config;
        format!("{} shows {whose} at {} ({how}){log}", mountpoint.display(), socket.display())
    }

    /// For `status`.
    pub(super) fn report(&self) -> Value {
        json!({
            "mountpoint": self.config.mountpoint.to_string_lossy(),
            "version": env!("CARGO_PKG_VERSION"),
            "read_only": self.config.read_only,
            "prefix": self.config.prefix,
            "passthrough": self.no_passthrough.is_none(),
            "passthrough_reason": self.no_passthrough,
            "allow_other": self.mounted.allow_other,
            "uptime_s": self.began.elapsed().as_secs(),
            "device": format!("{}:{}", self.mounted.device.0, self.mounted.device.1),
            "protocol": format!("7.{}", self.agreed.minor),
            "keeper": {"pid": std::process::id()},
            "server": {
                "pid": self.server.as_ref().map(Server::pid),
                "restarts": self.starts.saturating_sub(1),
                "ready": self.server.as_ref().is_some_and(|server| server.ready),
                "failures_in_a_row": self.failures,
                "next_start_ms": self.next_start.map(|at| at.saturating_duration_since(Instant::now()).as_millis()),
                "last_end": self.last_end,
            },
            "runtime": self.config.runtime.to_string_lossy(),
            "remounts": self.remounts,
            // The address that was bound: port 0 stands for any.
            "metrics": self.metrics.as_ref().and_then(|listener| listener.local_addr().ok()),
            "store": {
                "socket": self.config.socket.to_string_lossy(),
                "private": self.store.is_private(),
                "pid": self.store.pid(),
                "log": self.config.launch.as_ref().map(|launch| launch.log.to_string_lossy()),
            },
            "files": self.files.report(),
            "log": self.config.log_file.as_ref().map(|file| file.to_string_lossy()),
        })
    }
}
