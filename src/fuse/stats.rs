//! Counters of the requests that a server has answered.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::metrics::header;

/// Most errors that `status` shows.
const LAST_ERRORS: usize = 20;
/// Buckets of latencies: four per doubling, from 1 µs to about 70 minutes.
const BUCKETS: usize = 128;
/// Buckets of latencies that Prometheus gets: powers of four microseconds, up to 67 s.
const METRIC_BUCKETS: usize = 13;

macro_rules! operations {
    ($($name:ident),* $(,)?) => {
        /// A kind of request.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub enum Op { $($name),* }

        const OPERATIONS: &[Op] = &[$(Op::$name),*];

        impl Op {
            /// The name as logs and `status` show it.
            pub fn name(self) -> &'static str {
                match self { $(Op::$name => stringify!($name)),* }
            }

            /// The name in lower case.
            fn label(self) -> String {
                self.name().to_lowercase()
            }
        }
    };
}

operations!(
    Lookup,
    Getattr,
    Setattr,
    Readlink,
    Mkdir,
    Rmdir,
    Unlink,
    Symlink,
    Rename,
    Open,
    Create,
    Read,
    Write,
    Flush,
    Fsync,
    Release,
    Opendir,
    Readdir,
    Releasedir,
    Statfs,
    Getxattr,
    Listxattr,
    Setxattr,
    Removexattr,
    Fallocate,
    Lseek,
);

/// One number of a counter.
type Reading = fn(&Counter) -> u64;

struct Counter {
    count: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
    nanos: AtomicU64,
    latencies: [AtomicU64; BUCKETS],
}

impl Counter {
    fn new() -> Self {
        Counter {
            count: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            nanos: AtomicU64::new(0),
            latencies: [const { AtomicU64::new(0) }; BUCKETS],
        }
    }

    /// Counts of latencies, without the empty buckets at the end.
    fn latencies(&self) -> Vec<u64> {
        let mut counts: Vec<u64> = self.latencies.iter().map(|c| c.load(Relaxed)).collect();
        counts.truncate(counts.iter().rposition(|&count| count > 0).map_or(0, |last| last + 1));
        counts
    }
}

/// An upper bound of the latency, in µs, that this share of the requests stayed under, from the `latencies` of a
/// [report](Stats::report); 0 if there are none.
pub fn percentile(latencies: &[u64], share: f64) -> f64 {
    let total: u64 = latencies.iter().sum();
    let wanted = (total as f64 * share).ceil() as u64;
    let mut seen = 0;
    for (index, count) in latencies.iter().enumerate() {
        seen += count;
        if seen >= wanted && seen > 0 {
            return 2f64.powf((index + 1) as f64 / 4.0);
        }
    }
    0.0
}

/// The bucket of a latency: a quarter of its binary logarithm's steps, in µs.
fn bucket(latency: Duration) -> usize {
    let micros = latency.as_nanos() as f64 / 1000.0;
    if micros <= 1.0 { 0 } else { ((micros.log2() * 4.0) as usize).min(BUCKETS - 1) }
}

/// All counters of a server.
pub struct Stats {
    started: Instant,
    counters: Vec<Counter>,
    last_errors: Mutex<VecDeque<Value>>,
}

impl Default for Stats {
    fn default() -> Self {
        Stats {
            started: Instant::now(),
            counters: OPERATIONS.iter().map(|_| Counter::new()).collect(),
            last_errors: Mutex::default(),
        }
    }
}

impl Stats {
    /// Counts an answered request.
    pub fn record(&self, op: Op, took: Duration, failed: bool) {
        let Some(counter) = self.counters.get(op as usize) else { return };
        counter.count.fetch_add(1, Relaxed);
        counter.errors.fetch_add(u64::from(failed), Relaxed);
        counter.nanos.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Relaxed);
        if let Some(cell) = counter.latencies.get(bucket(took)) {
            cell.fetch_add(1, Relaxed);
        }
    }

    /// Counts bytes read or written.
    pub fn add_bytes(&self, op: Op, bytes: u64) {
        if let Some(counter) = self.counters.get(op as usize) {
            counter.bytes.fetch_add(bytes, Relaxed);
        }
    }

    /// Remembers an error that a person may want to know of.
    pub fn remember(&self, op: Op, message: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut errors = self.last_errors.lock().unwrap_or_else(|e| e.into_inner());
        if errors.len() == LAST_ERRORS {
            errors.pop_front();
        }
        errors.push_back(json!({"time": now, "operation": op.label(), "message": message}));
    }

    /// Adds the counters in the text format of Prometheus; operations that never happened are left out.
    pub fn write_metrics(&self, out: &mut String) {
        let used = || OPERATIONS.iter().zip(&self.counters).filter(|(_, counter)| counter.count.load(Relaxed) > 0);
        let kinds: [(&str, &str, Reading); 3] = [
            ("requests_total", "Requests answered.", |counter| counter.count.load(Relaxed)),
            ("request_errors_total", "Requests answered with an error.", |counter| counter.errors.load(Relaxed)),
            ("request_bytes_total", "Bytes that requests moved.", |counter| counter.bytes.load(Relaxed)),
        ];
        for (name, help, value) in kinds {
            header(out, name, "counter", help);
            for (op, counter) in used() {
                let _ = writeln!(out, "vineyard_fs_{name}{{op=\"{}\"}} {}", op.label(), value(counter));
            }
        }
        let name = "request_duration_seconds";
        header(out, name, "histogram", "Time from a request's arrival to its answer.");
        for (op, counter) in used() {
            let op = op.label();
            let mut seen = 0;
            for (index, count) in counter.latencies.iter().map(|cell| cell.load(Relaxed)).enumerate() {
                seen += count;
                // Every eighth bucket ends at a power of four microseconds.
                if index % 8 == 7 && index / 8 < METRIC_BUCKETS {
                    let seconds = 4f64.powi(index as i32 / 8 + 1) / 1e6;
                    let _ = writeln!(out, "vineyard_fs_{name}_bucket{{op=\"{op}\",le=\"{seconds}\"}} {seen}");
                }
            }
            let sum = counter.nanos.load(Relaxed) as f64 / 1e9;
            let _ = writeln!(out, "vineyard_fs_{name}_bucket{{op=\"{op}\",le=\"+Inf\"}} {seen}");
            let _ = writeln!(out, "vineyard_fs_{name}_sum{{op=\"{op}\"}} {sum}");
            let _ = writeln!(out, "vineyard_fs_{name}_count{{op=\"{op}\"}} {seen}");
        }
    }

    /// Everything as JSON; operations that never happened are left out. `latencies` counts requests by how long they
    /// took: item n those that took up to 2^((n + 1) / 4) µs and longer than those of item n - 1.
    pub fn report(&self) -> Value {
        let mut operations = Map::new();
        for (op, counter) in OPERATIONS.iter().zip(&self.counters) {
            let count = counter.count.load(Relaxed);
            if count == 0 {
                continue;
            }
            let latencies = counter.latencies();
            let mut entry = json!({
                "count": count,
                "errors": counter.errors.load(Relaxed),
                "mean_us": round(counter.nanos.load(Relaxed) as f64 / count as f64 / 1000.0),
                "p50_us": round(percentile(&latencies, 0.5)),
                "p99_us": round(percentile(&latencies, 0.99)),
                "p999_us": round(percentile(&latencies, 0.999)),
                "latencies": latencies,
            });
            let bytes = counter.bytes.load(Relaxed);
            if let (true, Some(entry)) = (bytes > 0, entry.as_object_mut()) {
                entry.insert("bytes".into(), bytes.into());
            }
            operations.insert(op.label(), entry);
        }
        let errors = self.last_errors.lock().unwrap_or_else(|e| e.into_inner());
        json!({
            "uptime_s": round(self.started.elapsed().as_secs_f64()),
            "operations": operations,
            "last_errors": *errors,
        })
    }
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_bound_what_was_recorded() {
        let stats = Stats::default();
        for micros in 1..=100u64 {
            stats.record(Op::Read, Duration::from_micros(micros), micros > 98);
        }
        stats.add_bytes(Op::Read, 4096);
        let report = stats.report();
        let read = &report["operations"]["read"];
        assert_eq!(read["count"], 100);
        assert_eq!(read["errors"], 2);
        assert_eq!(read["bytes"], 4096);
        assert_eq!(read["mean_us"], 50.5);
        let p50 = read["p50_us"].as_f64().unwrap_or_default();
        let p99 = read["p99_us"].as_f64().unwrap_or_default();
        assert!((50.0..=61.0).contains(&p50), "{p50}");
        assert!((99.0..=119.0).contains(&p99), "{p99}");
        assert!(report["operations"].get("write").is_none());
        let latencies: Vec<u64> =
            read["latencies"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
        assert_eq!((latencies.iter().sum::<u64>(), percentile(&latencies, 0.5)), (100, 2f64.powf(23.0 / 4.0)));
        assert_eq!(percentile(&[], 0.5), 0.0);
    }

    #[test]
    fn only_the_last_errors_are_kept() {
        let stats = Stats::default();
        for i in 0..LAST_ERRORS + 5 {
            stats.remember(Op::Open, &format!("error {i}"));
        }
        let report = stats.report();
        let errors = report["last_errors"].as_array().map(Vec::as_slice).unwrap_or_default();
        assert_eq!(errors.len(), LAST_ERRORS);
        assert_eq!(errors[0]["message"], "error 5");
    }
}
