//! `vineyard-fs top`: what mounts do right now, again and again. As `status` it asks the processes, never the mount.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use serde_json::Value;

use super::status::{self, bytes};
use super::unmount::mounts;
use crate::error::{Context, Result};
use crate::fuse::stats::percentile;

/// The first refresh of a terminal comes after this time, if that is sooner.
const FIRST: Duration = Duration::from_millis(400);
/// A terminal whose size is unknown.
const TERMINAL: (usize, usize) = (24, 80);

/// What `top` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// A mount point; all mounts if none is given
    #[arg(value_hint = clap::ValueHint::DirPath)]
    pub mountpoint: Option<PathBuf>,
    /// Seconds between two refreshes
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub interval: Duration,
    /// End after so many refreshes, which are printed one after the other
    #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// One refresh: the same as `--count 1`
    #[arg(long, conflicts_with = "count")]
    pub once: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|interval| (0.05..=86_400.0).contains(&interval.as_secs_f64()))
        .ok_or_else(|| "between 0.05 and 86400 seconds".to_owned())
}

/// Shows what mounts do until it is told to end: on a terminal by `q`, else by a signal or when nobody reads any more.
///
/// # Errors
/// If the mount point is none, or the list of mounts cannot be read.
pub fn run(arguments: &Args) -> Result<()> {
    let count = if arguments.once { Some(1) } else { arguments.count };
    let mut before = snapshots(arguments)?;
    let mut input = Input::open()?;
    let screen = match count.is_none() && std::io::stdout().is_terminal() {
        true => Some(Screen::open(&mut input)?),
        false => None,
    };
    let mut pause = if screen.is_some() { arguments.interval.min(FIRST) } else { arguments.interval };
    let mut left = count;
    loop {
        if input.ends_within(pause)? {
            return Ok(());
        }
        pause = arguments.interval;
        let now = snapshots(arguments)?;
        let rates = now.iter().map(|(path, new)| Rates::between(before.get(path), new));
        let shown = match &screen {
            Some(screen) => screen.show(&rates.map(|rates| rates.table()).collect::<String>(), arguments.interval),
            None => say(&rates.map(|rates| rates.line()).collect::<String>()),
        };
        match shown {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            other => other.context(|| "writing to the standard output".into())?,
        }
        before = now;
        left = left.map(|left| left - 1);
        if left == Some(0) {
            return Ok(());
        }
    }
}

fn snapshots(arguments: &Args) -> Result<BTreeMap<String, Snapshot>> {
    let mounts = match &arguments.mountpoint {
        Some(mountpoint) => vec![status::find(mountpoint)?],
        None => mounts()?,
    };
    Ok(mounts
        .iter()
        .map(|mount| Snapshot::of(&status::report(mount), Instant::now()))
        .map(|s| (s.mountpoint.clone(), s))
        .collect())
}

fn say(text: &str) -> std::io::Result<()> {
    let text = if text.is_empty() { "nothing is mounted\n" } else { text };
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// What a server had counted when it was asked.
#[derive(Clone, Debug, Default, PartialEq)]
struct Counters {
    count: u64,
    errors: u64,
    bytes: u64,
    latencies: Vec<u64>,
}

impl Counters {
    fn of(value: &Value) -> Self {
        let number = |key: &str| value.get(key).and_then(Value::as_u64).unwrap_or(0);
        let latencies = value.get("latencies").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        Counters {
            count: number("count"),
            errors: number("errors"),
            bytes: number("bytes"),
            latencies: latencies.iter().map(|count| count.as_u64().unwrap_or(0)).collect(),
        }
    }

    /// What was added since.
    fn since(&self, before: &Counters) -> Counters {
        let earlier = |index: usize| before.latencies.get(index).copied().unwrap_or(0);
        let latencies = self.latencies.iter().enumerate().map(|(n, count)| count.saturating_sub(earlier(n))).collect();
        Counters {
            count: self.count.saturating_sub(before.count),
            errors: self.errors.saturating_sub(before.errors),
            bytes: self.bytes.saturating_sub(before.bytes),
            latencies,
        }
    }
}

/// A mount at one time.
#[derive(Clone, Debug)]
struct Snapshot {
    at: Instant,
    mountpoint: String,
    state: String,
    /// Whose counters these are.
    server: u64,
    /// For how long it has counted.
    uptime: Duration,
    operations: BTreeMap<String, Counters>,
    restarts: u64,
    open_files: u64,
    passthrough: bool,
    /// Bytes, and most bytes.
    cache: (u64, u64),
    staging: (u64, u64),
}

impl Snapshot {
    /// From what `status` knows; what is not told counts as 0.
    fn of(report: &Value, at: Instant) -> Self {
        let get = |path: &str| report.pointer(path);
        let number = |path: &str| get(path).and_then(Value::as_u64).unwrap_or(0);
        let text = |path: &str| get(path).and_then(Value::as_str).unwrap_or_default();
        let uptime = get("/server/uptime_s").and_then(Value::as_f64).unwrap_or(0.0);
        let operations = get("/operations").and_then(Value::as_object).into_iter().flatten();
        Snapshot {
            at,
            mountpoint: super::store::printable(text("/mountpoint")),
            state: text("/state").to_owned(),
            server: number("/server/pid"),
            uptime: Duration::try_from_secs_f64(uptime).unwrap_or_default(),
            operations: operations.map(|(name, value)| (name.clone(), Counters::of(value))).collect(),
            restarts: number("/server/restarts"),
            open_files: number("/fs/open_handles"),
            passthrough: get("/passthrough_reason").is_some_and(Value::is_null),
            cache: (number("/fs/cache/bytes"), number("/fs/cache/limit")),
            staging: (number("/fs/staging/bytes"), number("/files/staging/limit")),
        }
    }
}

/// One operation of a mount between two looks.
#[derive(Debug, PartialEq)]
struct Row {
    name: String,
    /// A second.
    requests: f64,
    errors: f64,
    bytes: f64,
    /// In µs.
    p50: f64,
    p99: f64,
}

/// What a mount did between two looks.
struct Rates<'a> {
    now: &'a Snapshot,
    /// The most frequent operation first; none that did not happen.
    rows: Vec<Row>,
}

impl<'a> Rates<'a> {
    /// From two looks, or from one at a server that has begun since.
    fn between(before: Option<&Snapshot>, now: &'a Snapshot) -> Self {
        // A new server counts from 0.
        let before = before.filter(|before| before.server == now.server && before.uptime <= now.uptime);
        let passed = match before {
            Some(before) => now.at.saturating_duration_since(before.at),
            None => now.uptime,
        };
        let seconds = passed.as_secs_f64().max(1e-3);
        let none = Counters::default();
        let mut rows = Vec::new();
        for (name, counters) in &now.operations {
            let new = counters.since(before.and_then(|before| before.operations.get(name)).unwrap_or(&none));
            if new.count > 0 || new.bytes > 0 {
                rows.push(Row {
                    name: name.clone(),
                    requests: new.count as f64 / seconds,
                    errors: new.errors as f64 / seconds,
                    bytes: new.bytes as f64 / seconds,
                    p50: percentile(&new.latencies, 0.5),
                    p99: percentile(&new.latencies, 0.99),
                });
            }
        }
        rows.sort_by(|a, b| b.requests.total_cmp(&a.requests));
        Rates { now, rows }
    }

    fn sum(&self, of: impl Fn(&Row) -> f64) -> f64 {
        self.rows.iter().map(of).sum()
    }

    fn moved(&self, name: &str) -> String {
        let moved = self.rows.iter().find(|row| row.name == name).map_or(0.0, |row| row.bytes);
        format!("{}/s", bytes(moved as u64))
    }

    /// For terminals.
    fn table(&self) -> String {
        let Snapshot { mountpoint, state, open_files, restarts, cache, staging, .. } = self.now;
        let mut out = String::new();
        let _ = writeln!(out, "{mountpoint}: {state}   open files {open_files}   restarts {restarts}");
        let (requests, errors) = (self.sum(|row| row.requests), self.sum(|row| row.errors));
        let beside = if self.now.passthrough { "   (the kernel's own reads are not counted)" } else { "" };
        let (read, written) = (self.moved("read"), self.moved("write"));
        let _ = writeln!(
            out,
            "  requests {}/s   errors {}/s   read {read}   written {written}{beside}",
            short(requests),
            short(errors)
        );
        let of = |(used, most): (u64, u64)| format!("{} of {}", bytes(used), bytes(most));
        let _ = writeln!(out, "  images {}   staging {}", of(*cache), of(*staging));
        if !self.rows.is_empty() {
            let _ =
                writeln!(out, "  {:<12} {:>9} {:>9} {:>9} {:>9}", "operation", "per s", "errors/s", "p50 µs", "p99 µs");
        }
        for row in &self.rows {
            let [requests, errors, p50, p99] = [row.requests, row.errors, row.p50, row.p99].map(short);
            let _ = writeln!(out, "  {:<12} {requests:>9} {errors:>9} {p50:>9} {p99:>9}", row.name);
        }
        out + "\n"
    }

    /// For scripts: one line.
    fn line(&self) -> String {
        let Snapshot { mountpoint, state, open_files, restarts, cache, staging, .. } = self.now;
        let (requests, errors) = (self.sum(|row| row.requests), self.sum(|row| row.errors));
        let mut out = format!(
            "{mountpoint}: {state}, requests {}/s, errors {}/s, read {}, written {}, images {}, staging {}, open files {open_files}, restarts {restarts}",
            short(requests),
            short(errors),
            self.moved("read"),
            self.moved("write"),
            bytes(cache.0),
            bytes(staging.0),
        );
        for row in &self.rows {
            let _ = write!(
                out,
                "; {} {}/s p50 {} µs p99 {} µs",
                row.name,
                short(row.requests),
                short(row.p50),
                short(row.p99)
            );
        }
        out + "\n"
    }
}

/// A number with about three digits.
fn short(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        value if value < 10.0 => format!("{value:.2}"),
        value if value < 100.0 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

/// What may end `top`: signals, and keys of a terminal.
struct Input {
    signals: SignalFd,
    keys: bool,
}

impl Input {
    fn open() -> Result<Self> {
        let mut set = SigSet::empty();
        [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().for_each(|signal| set.add(signal));
        set.thread_block()?;
        Ok(Input { signals: SignalFd::new(&set)?, keys: false })
    }

    /// Waits. True if it shall end.
    fn ends_within(&self, pause: Duration) -> Result<bool> {
        let until = Instant::now() + pause;
        loop {
            let stdin = std::io::stdin();
            let mut all = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            if self.keys {
                all.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
            }
            let left = until.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut all, timeout) {
                Ok(0) if Instant::now() >= until => return Ok(false),
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) if all.first().is_some_and(|signals| signals.any() == Some(true)) => return Ok(true),
                Ok(_) => {
                    let mut keys = [0; 64];
                    match nix::unistd::read(stdin.as_fd(), &mut keys) {
                        // The terminal is gone.
                        Ok(0) | Err(_) => return Ok(true),
                        // Ctrl-C comes as a key where it makes no signal.
                        Ok(count) if keys.iter().take(count).any(|key| matches!(key, b'q' | b'Q' | 3)) => {
                            return Ok(true);
                        }
                        Ok(_) => {}
                    }
                }
                Err(error) => return Err(error).context(|| "waiting for the next refresh".into()),
            }
        }
    }
}

/// A whole terminal, which gets back what it showed before.
struct Screen {
    former: Option<Termios>,
}

impl Screen {
    fn open(input: &mut Input) -> Result<Self> {
        let stdin = std::io::stdin();
        let mut former = None;
        if stdin.is_terminal() {
            let mut mode = tcgetattr(stdin.as_fd())?;
            former = Some(mode.clone());
            // Keys come at once and are not shown.
            mode.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
            tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &mode)?;
            input.keys = true;
        }
        let screen = Screen { former };
        // Another screen, without a cursor.
        say("\x1b[?1049h\x1b[?25l").context(|| "writing to the terminal".into())?;
        Ok(screen)
    }

    /// Shows as much as there is room for.
    fn show(&self, text: &str, interval: Duration) -> std::io::Result<()> {
        let (rows, columns) = size();
        let mut out = String::from("\x1b[H");
        let title = format!("vineyard-fs top, every {} s; q ends\n\n", interval.as_secs_f64());
        let text = if text.is_empty() { "nothing is mounted" } else { text };
        for (number, line) in title.lines().chain(text.lines()).take(rows).enumerate() {
            let line: String = line.chars().take(columns).collect();
            out += &format!("{}{line}\x1b[K", if number > 0 { "\r\n" } else { "" });
        }
        say(&(out + "\x1b[J"))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // If the terminal is gone there is nothing to give back.
        say("\x1b[?25h\x1b[?1049l").ok();
        if let Some(former) = &self.former {
            tcsetattr(std::io::stdin().as_fd(), SetArg::TCSANOW, former).ok();
        }
    }
}

/// Rows and columns of the terminal.
fn size() -> (usize, usize) {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request writes one `winsize`, which lives until after the call.
    let known = unsafe { libc::ioctl(std::io::stdout().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) } == 0;
    match known && size.ws_row > 0 && size.ws_col > 0 {
        true => (size.ws_row.into(), size.ws_col.into()),
        false => TERMINAL,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn look(at: Instant, pid: u64, uptime: f64, reads: u64, slow: u64) -> Snapshot {
        let report = json!({
            "mountpoint": "/mnt/v", "state": "ok", "passthrough_reason": "not root",
            "server": {"pid": pid, "uptime_s": uptime, "restarts": 1},
            "operations": {
                "read": {"count": reads + slow, "errors": slow, "bytes": reads * 1024, "latencies": [0, 0, 0, reads, 0, 0, 0, slow]},
                "lookup": {"count": 7, "errors": 0, "latencies": [7]},
            },
            "fs": {"open_handles": 4, "cache": {"bytes": 1024, "limit": 4096}, "staging": {"bytes": 3}},
            "files": {"staging": {"limit": 2048}},
        });
        Snapshot::of(&report, at)
    }

    #[test]
    fn rates_are_what_was_added_between_two_looks() {
        let start = Instant::now();
        let (before, now) = (look(start, 9, 100.0, 1000, 0), look(start + Duration::from_secs(2), 9, 102.0, 3000, 20));
        let rates = Rates::between(Some(&before), &now);
        // The latencies are those of the two seconds; what did not happen in them is left out.
        let read = Row { name: "read".into(), requests: 1010.0, errors: 10.0, bytes: 1_024_000.0, p50: 2.0, p99: 2.0 };
        assert_eq!(rates.rows, [read]);
        let slower = look(start + Duration::from_secs(3), 9, 103.0, 3000, 30);
        assert_eq!(
            Rates::between(Some(&now), &slower).rows.first().map(|row| (row.requests, row.p50)),
            Some((10.0, 4.0))
        );
        assert!(Rates::between(Some(&now), &now).rows.is_empty());
        let line = rates.line();
        for part in ["/mnt/v: ok", "requests 1010/s", "errors 10.0/s", "read 1000 KiB/s", "open files 4", "restarts 1"]
        {
            assert!(line.contains(part), "{part} in {line}");
        }
        let table = rates.table();
        for part in ["images 1 KiB of 4 KiB", "staging 3 B of 2 KiB", "  read              1010"] {
            assert!(table.contains(part), "{part} in {table}");
        }
    }

    #[test]
    fn a_new_server_counts_from_nothing() {
        let start = Instant::now();
        let before = look(start, 9, 100.0, 1000, 0);
        let now = look(start + Duration::from_secs(2), 10, 0.5, 50, 0);
        let rates = Rates::between(Some(&before), &now);
        assert_eq!(rates.rows.first().map(|row| row.requests), Some(100.0));
        assert_eq!(Rates::between(None, &now).rows, rates.rows);
        // One that does not answer has counted nothing.
        let hung = Snapshot::of(&json!({"mountpoint": "/mnt/\u{1b}", "state": "hung"}), start);
        let line = Rates::between(Some(&before), &hung).line();
        assert!(line.contains(": hung, requests 0/s") && !line.contains('\u{1b}'), "{line}");
    }

    #[test]
    fn intervals_are_seconds() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "-1", "x", "nan", "1e9"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
