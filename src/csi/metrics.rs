//! Counts of what the node plugin did, in Prometheus' text format, and whether it works.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tonic::Code;

use super::steps;

/// Longest request that is read.
const REQUEST_MAX: usize = 8 << 10;
/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A call of the node service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    /// `NodePublishVolume`.
    Publish,
    /// `NodeUnpublishVolume`.
    Unpublish,
    /// `NodeGetVolumeStats`.
    Stats,
}

impl Call {
    fn name(self) -> &'static str {
        match self {
            Call::Publish => "publish",
            Call::Unpublish => "unpublish",
            Call::Stats => "stats",
        }
    }
}

/// The counts.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Calls and their seconds, by call and code.
    calls: Mutex<BTreeMap<(Call, i32), (u64, f64)>>,
    targets: AtomicUsize,
    repaired: AtomicU64,
}

impl Metrics {
    /// A call has ended.
    pub fn count(&self, call: Call, code: Code, took: Duration) {
        let mut calls = self.calls.lock().unwrap_or_else(|e| e.into_inner());
        let (number, seconds) = calls.entry((call, code as i32)).or_default();
        *number += 1;
        *seconds += took.as_secs_f64();
    }

    /// How many targets are published.
    pub fn set_targets(&self, targets: usize) {
        self.targets.store(targets, Ordering::Relaxed);
    }

    /// A target whose mount had ended works again.
    pub fn repaired(&self) {
        self.repaired.fetch_add(1, Ordering::Relaxed);
    }

    /// All of it as text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut family = |name: &str, kind: &str, help: &str, rows: &[(String, f64)]| {
            // Writing to a string does not fail.
            writeln!(text, "# HELP vineyard_fs_csi_{name} {help}\n# TYPE vineyard_fs_csi_{name} {kind}").ok();
            for (labels, value) in rows {
                writeln!(text, "vineyard_fs_csi_{name}{labels} {value}").ok();
            }
        };
        let calls = self.calls.lock().unwrap_or_else(|e| e.into_inner()).clone();
        let rows = |of: fn(&(u64, f64)) -> f64| -> Vec<_> {
            let labels =
                |call: Call, code: i32| format!("{{call=\"{}\",code=\"{:?}\"}}", call.name(), Code::from(code));
            calls.iter().map(|((call, code), value)| (labels(*call, *code), of(value))).collect()
        };
        let one = |value: f64| [(String::new(), value)];
        family("calls_total", "counter", "Calls of the node service.", &rows(|(number, _)| *number as f64));
        family("call_seconds_total", "counter", "Time that they took.", &rows(|(_, seconds)| *seconds));
        family("targets", "gauge", "Targets that are published.", &one(self.targets.load(Ordering::Relaxed) as f64));
        let repaired = self.repaired.load(Ordering::Relaxed) as f64;
        family("repaired_total", "counter", "Targets whose mount had ended and that were bound again.", &one(repaired));
        let hung = steps::abandoned() as f64;
        family("hung_helpers", "gauge", "Helper processes that wait for a mount that does not answer.", &one(hung));
        let memory = resident().unwrap_or(0) as f64;
        family("resident_memory_bytes", "gauge", "Memory of the node plugin.", &one(memory));
        text
    }

    /// Answers `GET /metrics` and `GET /healthz`, one request a connection.
    pub async fn serve(self: std::sync::Arc<Self>, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let this = self.clone();
                    tokio::spawn(async move { tokio::time::timeout(PATIENCE, this.answer(stream)).await });
                }
                Err(error) => {
                    tracing::warn!("metrics: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut request = Vec::new();
        let mut part = [0; 1024];
        while !request.windows(4).any(|four| four == b"\r\n\r\n") && request.len() < REQUEST_MAX {
            match stream.read(&mut part).await? {
                0 => break,
                length => request.extend_from_slice(part.get(..length).unwrap_or_default()),
            }
        }
        let (status, body) = match request.split(|&b| b == b' ').nth(1) {
            Some(b"/metrics") => ("200 OK", self.text()),
            Some(b"/healthz") => ("200 OK", "ok\n".to_owned()),
            _ => ("404 Not Found", "there are /metrics and /healthz\n".to_owned()),
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body.as_bytes()).await?;
        stream.shutdown().await
    }
}

/// Resident memory of this process, in bytes.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn counts_are_told_in_the_text_format() {
        let metrics = Metrics::default();
        metrics.count(Call::Publish, Code::Ok, Duration::from_millis(500));
        metrics.count(Call::Publish, Code::Ok, Duration::from_millis(500));
        metrics.count(Call::Publish, Code::Unavailable, Duration::from_secs(2));
        metrics.set_targets(3);
        let text = metrics.text();
        assert!(text.contains("# TYPE vineyard_fs_csi_calls_total counter\n"));
        assert!(text.contains("vineyard_fs_csi_calls_total{call=\"publish\",code=\"Ok\"} 2\n"), "{text}");
        assert!(text.contains("vineyard_fs_csi_call_seconds_total{call=\"publish\",code=\"Ok\"} 1\n"));
        assert!(text.contains("code=\"Unavailable\"} 1\n"));
        assert!(text.contains("vineyard_fs_csi_targets 3\n"));
        assert!(resident().unwrap() > 1 << 20);
    }
}
