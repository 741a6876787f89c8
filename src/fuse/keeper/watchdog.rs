//! Sees from outside whether a server still works, without touching the mount.

use std::time::{Duration, Instant};

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use crate::fuse::journal::{Journal, Pulse};

/// How often a server gives a sign of life.
pub const BEAT: Duration = Duration::from_millis(250);
/// How often a keeper looks.
pub const LOOK: Duration = Duration::from_millis(500);
/// A server that may be at work is given so many times the limit of one that gives no sign of life.
const AT_WORK: u32 = 6;
/// Processor time below which a server does nothing but wait.
const IDLE: Duration = Duration::from_millis(100);

/// Watches one server after the other.
pub struct Watchdog {
    journal: Journal,
    /// Longest silence.
    limit: Duration,
    last_look: Instant,
    /// Looks in a row that found silence.
    silent_looks: u32,
    /// Since when nothing was answered, and how much processor time the server had used then.
    still: Option<(Instant, Pulse, Duration)>,
}

impl Watchdog {
    /// Over the journal that servers write.
    pub fn new(journal: Journal, limit: Duration) -> Self {
        Watchdog { journal, limit, last_look: Instant::now(), silent_looks: 0, still: None }
    }

    /// How long a mount may be without a server that works before its connection is given up.
    pub fn last_resort(&self) -> Duration {
        self.limit * AT_WORK
    }

    /// Forgets the last server.
    pub fn start_over(&mut self) {
        (self.silent_looks, self.still) = (0, None);
    }

    /// Why the server is to be replaced, if it is.
    pub fn look(&mut self, pid: u32, lived: Duration, ready: bool) -> Option<String> {
        let since_last = self.last_look.elapsed();
        if since_last < LOOK {
            return None;
        }
        self.last_look = Instant::now();
        if since_last > LOOK * 4 {
            // This process did not run either: suspended, or starved.
            self.start_over();
            return None;
        }
        if !ready && lived > self.limit * 3 {
            return Some(format!("it is not ready after {lived:.0?}"));
        }
        let pulse = self.journal.pulse();
        // The last sign of life may have been another server's.
        let silent = pulse.silent.min(lived);
        self.silent_looks = if silent > self.limit { self.silent_looks + 1 } else { 0 };
        if self.silent_looks >= 2 {
            return Some(format!("it gives no sign of life for {silent:.0?}"));
        }
        self.stuck(pulse, cpu_time(pid))
    }

    /// Requests are in work, none is answered, and the processor has nothing to do for it.
    fn stuck(&mut self, pulse: Pulse, used: Duration) -> Option<String> {
        let oldest = pulse.oldest.unwrap_or_default();
        match self.still {
            Some((since, before, used_before))
                if before.answered == pulse.answered
                    && oldest >= since.elapsed()
                    && used.saturating_sub(used_before) < IDLE =>
            {
                let stuck = since.elapsed() > self.limit * AT_WORK;
                stuck.then(|| format!("it has answered nothing for {:.0?} and does not work", since.elapsed()))
            }
            _ => {
                self.still = pulse.oldest.map(|_| (Instant::now(), pulse, used));
                None
            }
        }
    }
}

/// Processor time of a process; 0 if it is gone.
fn cpu_time(pid: u32) -> Duration {
    let pid = i32::try_from(pid).unwrap_or(0);
    let clock = clock_getcpuclockid(Pid::from_raw(pid));
    clock.and_then(clock_gettime).map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;

    fn watched(limit: Duration) -> (Watchdog, Arc<Journal>) {
        let fd = Journal::create().unwrap();
        let server = Arc::new(Journal::open(fd.try_clone().unwrap()).unwrap());
        let mut dog = Watchdog::new(Journal::open(fd).unwrap(), limit);
        dog.last_look -= LOOK;
        (dog, server)
    }

    fn look(dog: &mut Watchdog, lived: Duration, ready: bool) -> Option<String> {
        dog.last_look = Instant::now() - LOOK;
        dog.look(std::process::id(), lived, ready)
    }

    #[test]
    fn silence_is_noticed_at_the_second_look() {
        let (mut dog, server) = watched(Duration::from_millis(500));
        server.beat();
        let old = Duration::from_secs(9);
        assert_eq!(look(&mut dog, old, true), None);
        std::thread::sleep(Duration::from_millis(800));
        assert_eq!(look(&mut dog, Duration::from_millis(5), true), None, "a new server has just begun");
        assert_eq!(look(&mut dog, old, true), None);
        assert!(look(&mut dog, old, true).unwrap().contains("no sign of life"));
        server.beat();
        assert_eq!(look(&mut dog, old, true), None);
        assert!(look(&mut dog, old, false).unwrap().contains("not ready"));
        dog.last_look = Instant::now() - LOOK * 9;
        assert_eq!(dog.look(1, old, false), None, "the keeper was away itself");
    }

    #[test]
    fn a_request_that_waits_for_ever_is_noticed_and_work_is_not() {
        let (mut dog, server) = watched(Duration::from_millis(10));
        let entry = server.enter(5);
        entry.begin();
        let pulse = |server: &Arc<Journal>| server.pulse();
        let none = Duration::ZERO;
        assert_eq!(dog.stuck(pulse(&server), none), None);
        std::thread::sleep(Duration::from_millis(80));
        assert_eq!(dog.stuck(pulse(&server), Duration::from_secs(1)), None, "it computes");
        std::thread::sleep(Duration::from_millis(80));
        drop(server.enter(6));
        assert_eq!(dog.stuck(pulse(&server), Duration::from_secs(1)), None, "it answers others");
        std::thread::sleep(Duration::from_millis(80));
        assert!(dog.stuck(pulse(&server), Duration::from_secs(1)).unwrap().contains("answered nothing"));
        drop(entry);
        assert_eq!(dog.stuck(pulse(&server), Duration::from_secs(1)), None);
    }
}
