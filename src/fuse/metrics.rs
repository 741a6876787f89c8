//! Counters for Prometheus, in its text format (version 0.0.4), over the least of HTTP that a scraper needs.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use serde_json::Value;

use super::stats::Stats;

/// How long a scraper may take to ask and to listen.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest request that is read.
const LONGEST: usize = 8 << 10;

/// Answers scrapers one after the other with `page`. For a thread of its own.
pub fn serve(listener: &TcpListener, page: impl Fn() -> String) {
    for connection in listener.incoming() {
        let done = connection.and_then(|connection| answer(connection, &page));
        if let Err(error) = done {
            tracing::debug!("metrics: {error}");
            // Without descriptors every attempt fails at once.
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn answer(mut connection: TcpStream, page: &impl Fn() -> String) -> std::io::Result<()> {
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.set_write_timeout(Some(PATIENCE))?;
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && request.len() < LONGEST {
        match connection.read(&mut part)? {
            0 => break,
            length => request.extend(part.get(..length).unwrap_or_default()),
        }
    }
    let (status, body) = match request.starts_with(b"GET /metrics ") || request.starts_with(b"GET /metrics?") {
        true => ("200 OK", page()),
        false => ("404 Not Found", "the counters are at /metrics\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    connection.write_all(head.as_bytes())?;
    connection.write_all(body.as_bytes())
}

/// One number of the report, by its place: where it is, name, kind, help.
const NUMBERS: &[(&str, &str, &str, &str)] = &[
    ("/restarts", "server_restarts_total", "counter", "Servers that had to be replaced."),
    ("/uptime_s", "server_uptime_seconds", "gauge", "Age of the server."),
    ("/waiting", "requests_waiting", "gauge", "Requests that wait for a thread."),
    ("/fs/passthrough", "passthrough", "gauge", "Whether the kernel reads memory files by itself."),
    ("/fs/inodes", "inodes", "gauge", "Inodes that the kernel knows."),
    ("/fs/open_handles", "open_handles", "gauge", "Open files and directories."),
    ("/fs/cache/bytes", "cache_bytes", "gauge", "Bytes of assembled images."),
    ("/fs/staging/files", "staging_files", "gauge", "Files that are being written, or whose bytes are still held."),
    ("/fs/staging/bytes", "staging_bytes", "gauge", "Bytes of those."),
    ("/fs/store/memory_usage", "store_used_bytes", "gauge", "Memory of the store in use."),
    ("/fs/store/memory_limit", "store_limit_bytes", "gauge", "Memory of the store."),
    ("/fs/remote/requests", "remote_requests_total", "counter", "Requests for data of other instances."),
    ("/fs/remote/bytes", "remote_bytes_total", "counter", "Bytes that came from other instances."),
    ("/fs/remote/failures", "remote_failures_total", "counter", "Transfers from other instances that failed."),
];

/// The page, of a server's report and its counters. What the report does not know is left out.
pub fn page(report: &Value, stats: &Stats) -> String {
    let mut out = String::new();
    for (place, name, kind, help) in NUMBERS {
        let number = match report.pointer(place) {
            Some(Value::Number(number)) => number.to_string(),
            Some(Value::Bool(flag)) => u8::from(*flag).to_string(),
            _ => continue,
        };
        header(&mut out, name, kind, help);
        let _ = writeln!(out, "vineyard_fs_{name} {number}");
    }
    let store = report.pointer("/fs/store").is_some_and(|store| store.get("error").is_none());
    header(&mut out, "store_up", "gauge", "Whether vineyardd answers.");
    let _ = writeln!(out, "vineyard_fs_store_up {}", u8::from(store));
    stats.write_metrics(&mut out);
    out
}

/// The two lines before the samples of a metric.
pub fn header(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP vineyard_fs_{name} {help}\n# TYPE vineyard_fs_{name} {kind}");
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;
    use crate::fuse::stats::Op;

    fn ask(address: std::net::SocketAddr, path: &str) -> String {
        let mut connection = TcpStream::connect(address).unwrap();
        write!(connection, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut text = String::new();
        connection.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_scraper_gets_every_counter_and_others_get_nothing() {
        let stats = Stats::default();
        stats.record(Op::Read, Duration::from_micros(3), false);
        stats.record(Op::Read, Duration::from_millis(5), true);
        stats.add_bytes(Op::Read, 77);
        let report = json!({"restarts": 2, "fs": {"passthrough": true, "store": {"memory_usage": 5}}});
        let page = page(&report, &stats);
        for line in [
            "vineyard_fs_server_restarts_total 2",
            "vineyard_fs_passthrough 1",
            "vineyard_fs_store_used_bytes 5",
            "vineyard_fs_store_up 1",
            "vineyard_fs_requests_total{op=\"read\"} 2",
            "vineyard_fs_request_errors_total{op=\"read\"} 1",
            "vineyard_fs_request_bytes_total{op=\"read\"} 77",
            "vineyard_fs_request_duration_seconds_bucket{op=\"read\",le=\"0.000004\"} 1",
            "vineyard_fs_request_duration_seconds_bucket{op=\"read\",le=\"0.016384\"} 2",
            "vineyard_fs_request_duration_seconds_bucket{op=\"read\",le=\"+Inf\"} 2",
            "vineyard_fs_request_duration_seconds_count{op=\"read\"} 2",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} in {page}");
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || serve(&listener, move || page.clone()));
        assert!(ask(address, "/metrics").starts_with("HTTP/1.1 200 OK\r\n"));
        assert!(ask(address, "/metrics").contains("vineyard_fs_store_up 1\n"));
        assert!(ask(address, "/").starts_with("HTTP/1.1 404 "));
    }
}
