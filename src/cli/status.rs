//! `vineyard-fs status`: how mounts are doing. Answers at once, whatever state a mount is in: it asks the processes,
//! never the mount.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Uid, User};
use serde_json::{Value, json};

use super::store;
use crate::error::{Error, Kind, Result};
use crate::fuse::runtime::Runtime;
use crate::fuse::{mount, mountinfo, status};

/// How long each process may take to answer.
const PATIENCE: Duration = Duration::from_millis(1000);
/// So many servers in a row that ended at once are a crash loop.
const CRASHING: u64 = 3;

/// What `status` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// A mount point; all mounts if none is given
    #[arg(value_hint = clap::ValueHint::DirPath)]
    pub mountpoint: Option<PathBuf>,
    /// As JSON: an object for one mount, a list for all
    #[arg(long)]
    pub json: bool,
}

/// Prints the status.
///
/// # Errors
/// If the mount point is none, or the standard output cannot be written to.
pub fn run(arguments: &Args) -> Result<()> {
    let Some(mountpoint) = &arguments.mountpoint else {
        let reports: Vec<Value> = super::unmount::mounts()?.iter().map(report).collect();
        return store::print(&match arguments.json {
            true => format!("{}\n", json!(reports)),
            false if reports.is_empty() => "nothing is mounted\n".to_owned(),
            false => reports.iter().map(text).collect(),
        });
    };
    let report = report(&find(mountpoint)?);
    store::print(&if arguments.json { format!("{report}\n") } else { text(&report) })
}

/// The mount at a mount point.
///
/// # Errors
/// `Invalid` if there is none of this program.
pub(super) fn find(mountpoint: &Path) -> Result<mountinfo::Mount> {
    let mountpoint = mountinfo::absolute(mountpoint)?;
    let mounted = mountinfo::at(&mountpoint)?.filter(|mount| mount.fs_type == mountinfo::FS_TYPE);
    mounted.ok_or_else(|| Error::new(Kind::Invalid, format!("{} is not a mount of vineyard-fs", mountpoint.display())))
}

/// What keeper and server of a mount say. `state` is `ok`, `store gone` (a private vineyardd ended), `store away` (vineyardd
/// does not answer), `no server` (one is being started), `crashing` (one after the other ends soon; they are started after
/// longer and longer pauses), `hung` (the server does not answer), `dead` (the keeper is gone), or `another user's`, whose
/// processes this user cannot ask.
pub(super) fn report(mounted: &mountinfo::Mount) -> Value {
    let runtime = Runtime::of(&mounted.mountpoint);
    let (mut report, mut state) = match status::ask(&runtime.keeper_socket(), PATIENCE) {
        Ok(report @ Value::Object(_)) if runtime.is_own() => (report, "ok"),
        _ if runtime.keeper().is_some() => (json!({}), "hung"),
        _ if runtime.record().is_none() && whose(mounted).is_some() => (json!({}), "another user's"),
        _ => (json!({}), "dead"),
    };
    if state == "ok" {
        match status::ask(&runtime.status_socket(), PATIENCE) {
            Ok(Value::Object(server)) => {
                for (key, value) in server {
                    put(
                        &mut report,
                        if matches!(key.as_str(), "pid" | "restarts" | "version" | "uptime_s") { "server" } else { "" },
                        key,
                        value,
                    );
                }
            }
            _ if failures(&report) >= CRASHING => state = "crashing",
            _ if report.pointer("/server/ready") != Some(&Value::Bool(true)) => state = "no server",
            _ => state = "hung",
        }
    }
    if state == "ok" {
        state = store_state(&report);
    }
    let waiting = mount::waiting_if_visible(mounted.device);
    put(&mut report, "", "mountpoint".into(), json!(mounted.mountpoint.to_string_lossy()));
    put(&mut report, "", "state".into(), json!(state));
    put(&mut report, "", "user".into(), json!(whose(mounted)));
    put(&mut report, "", "waiting_requests".into(), json!(waiting));
    report
}

/// The user who mounted it, by name if there is one, if that is not this one.
fn whose(mounted: &mountinfo::Mount) -> Option<String> {
    let user = Uid::from_raw(mounted.user?);
    let name = || User::from_uid(user).ok().flatten().map_or(user.to_string(), |user| user.name);
    (user != nix::unistd::geteuid()).then(name)
}

/// `ok`, if it is well with the store as well.
fn store_state(report: &Value) -> &'static str {
    let is = |path: &str, what: Value| report.pointer(path) == Some(&what);
    let silent = ["/fs/store_error", "/fs/store/error"];
    match silent.iter().any(|path| report.pointer(path).is_some_and(|error| !error.is_null())) {
        // It is not started again: what it held went with it.
        _ if is("/store/private", true.into()) && is("/store/pid", Value::Null) => "store gone",
        true => "store away",
        false => "ok",
    }
}

/// Servers that ended soon after their start, in a row.
fn failures(report: &Value) -> u64 {
    report.pointer("/server/failures_in_a_row").and_then(Value::as_u64).unwrap_or(0)
}

/// Puts a value into the object at `within`, or into the report itself.
fn put(report: &mut Value, within: &str, key: String, value: Value) {
    let target = if within.is_empty() { Some(report) } else { report.get_mut(within) };
    if let Some(target) = target.and_then(Value::as_object_mut) {
        target.insert(key, value);
    }
}

/// For people.
fn text(report: &Value) -> String {
    let get = |path: &str| report.pointer(path).unwrap_or(&Value::Null);
    let show = |path: &str| match get(path) {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    };
    let mut out = String::new();
    let _ = writeln!(out, "{}: {}", show("/mountpoint"), show("/state"));
    if get("/keeper").is_null() {
        let point = show("/mountpoint");
        if show("/state") == "another user's" {
            let _ =
                writeln!(out, "  {0} mounted it, and can ask: run `vineyard-fs status {point}` as {0}", show("/user"));
            return out;
        }
        let _ = writeln!(out, "  its keeper is gone: `vineyard-fs unmount {point}`, or mount there again");
        return out;
    }
    let whose = if get("/store/private") == true { " (private)" } else { "" };
    let _ = writeln!(out, "  store        {}{whose}", show("/store/socket"));
    match get("/state").as_str() {
        Some("store gone") => {
            let _ = writeln!(
                out,
                "  store gone   its private vineyardd ended, and what only that held with it; its log: {}",
                show("/store/log"),
            );
            let _ = writeln!(out, "  what to do   `vineyard-fs unmount {}`, and mount again", show("/mountpoint"));
        }
        Some("store away") => {
            let _ = writeln!(out, "  store away   {}", show("/fs/store_error"));
            let _ = writeln!(out, "  what to do   wait for vineyardd, or start it again: the mount goes on with it");
        }
        _ => {}
    }
    let mode = match get("/passthrough_reason") {
        Value::String(reason) => format!("off: {reason}"),
        _ => "on".into(),
    };
    let _ = writeln!(out, "  passthrough  {mode}");
    let (keeper, server, restarts) = (show("/keeper/pid"), show("/server/pid"), show("/server/restarts"));
    let _ = writeln!(out, "  processes    keeper {keeper}, server {server}, {restarts} restarts");
    if let Value::String(address) = get("/metrics") {
        let _ = writeln!(out, "  metrics      http://{address}/metrics");
    }
    if let Value::String(why) = get("/server/last_end") {
        let _ = writeln!(out, "  last end     {why}");
    }
    if failures(report) >= CRASHING {
        let pause =
            get("/server/next_start_ms").as_u64().map_or(String::new(), |ms| format!("; the next start in {ms} ms"));
        let _ = writeln!(out, "  crashing     {} servers in a row ended soon{pause}; see the log", failures(report));
    }
    if get("/remounts").as_u64().is_some_and(|count| count > 0) {
        let _ = writeln!(out, "  given up     the connection was made anew {} times", show("/remounts"));
    }
    for missing in get("/sandbox/missing").as_array().into_iter().flatten() {
        let _ = writeln!(out, "  sandbox      {}", missing.as_str().unwrap_or_default());
    }
    for (label, area) in [("images", "images"), ("staging", "staging")] {
        let number = |key: &str| get(&format!("/files/{area}/{key}")).as_u64().unwrap_or(0);
        let (used, limit) = (bytes(number("bytes")), bytes(number("limit")));
        let _ = writeln!(out, "  {label:<12} {} files, {used} of {limit}", number("count"));
    }
    let remote = |key: &str| get(&format!("/fs/remote/{key}")).as_u64().unwrap_or(0);
    if remote("requests") > 0 {
        let (came, kept, limit) = (bytes(remote("bytes")), bytes(remote("cached_bytes")), bytes(remote("limit")));
        let _ = writeln!(out, "  remote       {came} came, {kept} of {limit} kept, {} failures", remote("failures"));
    }
    if let Value::Object(operations) = get("/operations") {
        let _ =
            writeln!(out, "  {:<12} {:>10} {:>8} {:>10} {:>10}", "operation", "count", "errors", "p50 µs", "p99 µs");
        for (name, counters) in operations {
            let cell = |key: &str| counters.get(key).map(Value::to_string).unwrap_or_default();
            let (count, errors, p50, p99) = (cell("count"), cell("errors"), cell("p50_us"), cell("p99_us"));
            let _ = writeln!(out, "  {name:<12} {count:>10} {errors:>8} {p50:>10} {p99:>10}");
        }
    }
    for warning in get("/fs/warnings").as_array().into_iter().flatten() {
        let _ = writeln!(out, "  warning      {}", warning.as_str().unwrap_or_default());
    }
    for error in get("/last_errors").as_array().into_iter().flatten() {
        let _ = writeln!(out, "  error        {}", error.get("message").and_then(Value::as_str).unwrap_or_default());
    }
    if !get("/log").is_null() {
        let _ = writeln!(out, "  log          {}", show("/log"));
    }
    out
}

/// A number of bytes, short.
pub(super) fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let unit = units.get(unit).copied().unwrap_or_default();
    if value.fract() == 0.0 { format!("{value} {unit}") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_is_gone_is_told_from_one_that_is_waited_for() {
        let report = |private: bool, pid: Value, error: Value| json!({"store": {"private": private, "pid": pid}, "fs": {"store_error": error}});
        assert_eq!(store_state(&report(true, json!(7), Value::Null)), "ok");
        assert_eq!(store_state(&report(true, Value::Null, Value::Null)), "store gone");
        assert_eq!(store_state(&report(false, Value::Null, Value::Null)), "ok");
        assert_eq!(store_state(&report(false, Value::Null, json!("it does not answer"))), "store away");
        assert_eq!(store_state(&report(true, json!(7), json!("it does not answer"))), "store away");
    }

    #[test]
    fn reports_are_readable_in_every_state() {
        let dead = json!({"mountpoint": "/mnt/v", "state": "dead"});
        assert!(text(&dead).contains("`vineyard-fs unmount /mnt/v`"));
        let others = text(&json!({"mountpoint": "/mnt/v", "state": "another user's", "user": "root"}));
        assert!(others.contains("status /mnt/v` as root") && !others.contains("unmount"), "{others}");
        let alive = json!({
            "mountpoint": "/mnt/v", "state": "ok", "passthrough_reason": null,
            "keeper": {"pid": 1},
            "server": {"pid": 2, "restarts": 3, "failures_in_a_row": 4, "next_start_ms": 500, "last_end": "signal: 11"},
            "store": {"socket": "/run/v.sock", "private": true},
            "files": {"images": {"count": 1, "bytes": 1536, "limit": 1 << 30}},
            "operations": {"read": {"count": 5, "errors": 1, "p50_us": 2.5, "p99_us": 9.0}},
            "last_errors": [{"message": "bad"}],
        });
        let text = text(&alive);
        for part in [
            "/run/v.sock (private)",
            "keeper 1, server 2, 3 restarts",
            "1.5 KiB of 1 GiB",
            "read",
            "bad",
            "signal: 11",
            "start in 500 ms",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
