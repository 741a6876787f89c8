//! Threads for requests that may take long.
//!
//! An event loop that works cannot take the next request from the kernel. So a request runs on its event loop only
//! while another loop is free; all others go to a pool. A single client then never pays for a thread switch, and a slow
//! store never stops requests that do not need it.

use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard, thread};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Work to do; the argument says that it waited longer than a caller should wait.
pub type Job = Box<dyn FnOnce(bool) + Send>;

/// Most threads of the pool.
const MOST_THREADS: usize = 16;
/// Most jobs that wait; beyond, event loops work themselves, and the kernel's own queue holds the rest.
const MOST_WAITING: usize = 4096;
/// A thread that had nothing to do for so long ends.
const IDLE: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Queue {
    jobs: VecDeque<(Instant, Job)>,
    threads: usize,
    idle: usize,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    /// Event loops that may work on requests at the same time.
    inline_limit: usize,
    inline: AtomicUsize,
    /// Longest time in the queue.
    patience: Duration,
}

/// Runs jobs on the calling thread or on the pool.
#[derive(Clone)]
pub struct Workers(Arc<Shared>);

impl Workers {
    /// For `loops` event loops, at least 2.
    pub fn new(loops: usize, patience: Duration) -> Self {
        Workers(Arc::new(Shared {
            queue: Mutex::default(),
            wake: Condvar::new(),
            inline_limit: loops.saturating_sub(1).max(1),
            inline: AtomicUsize::new(0),
            patience,
        }))
    }

    /// Runs `job` now if an event loop stays free, else soon on another thread.
    pub fn run(&self, job: impl FnOnce(bool) + Send + 'static) {
        let shared = &self.0;
        if shared.inline.fetch_add(1, Ordering::AcqRel) < shared.inline_limit {
            guarded(|| job(false));
            shared.inline.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        shared.inline.fetch_sub(1, Ordering::AcqRel);
        let mut queue = shared.lock();
        if queue.jobs.len() >= MOST_WAITING {
            drop(queue);
            return guarded(|| job(false));
        }
        queue.jobs.push_back((Instant::now(), Box::new(job)));
        if queue.idle >= queue.jobs.len() {
            drop(queue);
            shared.wake.notify_one();
        } else if queue.threads < MOST_THREADS {
            let worker = self.0.clone();
            match thread::Builder::new().name("worker".into()).spawn(move || worker.work()) {
                Ok(_) => queue.threads += 1,
                Err(error) if queue.threads == 0 => {
                    tracing::warn!("no thread for a request: {error}");
                    if let Some((_, job)) = queue.jobs.pop_back() {
                        drop(queue);
                        guarded(|| job(false));
                    }
                }
                Err(_) => {}
            }
        }
    }

    /// Jobs that wait for a thread.
    pub fn waiting(&self) -> usize {
        self.0.lock().jobs.len()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn work(&self) {
        let mut queue = self.lock();
        loop {
            if let Some((since, job)) = queue.jobs.pop_front() {
                drop(queue);
                let late = since.elapsed() > self.patience;
                guarded(|| job(late));
                queue = self.lock();
                continue;
            }
            queue.idle += 1;
            let (guard, wait) = self.wake.wait_timeout(queue, IDLE).unwrap_or_else(|e| e.into_inner());
            queue = guard;
            queue.idle -= 1;
            // The waits of tested schedules never time out; there, whoever is woken for nothing ends.
            let timed_out = wait.timed_out() || cfg!(feature = "shuttle");
            if timed_out && queue.jobs.is_empty() {
                queue.threads -= 1;
                return;
            }
        }
    }
}

/// A panic ends the request that caused it (a dropped reply answers EIO), not the thread that others need.
fn guarded(job: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(job)).is_err() {
        tracing::error!("a request ended with a panic");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn one_slow_job_does_not_hold_the_loop_that_is_left() {
        let workers = Workers::new(2, Duration::from_secs(10));
        let (release, blocked) = channel::<()>();
        let slow = workers.clone();
        let first_loop = std::thread::spawn(move || slow.run(move |_| blocked.recv().unwrap()));
        while workers.0.inline.load(Ordering::Acquire) == 0 {
            std::thread::yield_now();
        }
        let me = std::thread::current().id();
        let (done, results) = channel();
        for i in 0..100 {
            let done = done.clone();
            workers.run(move |late| done.send((i, late, std::thread::current().id())).unwrap());
        }
        let mut got: Vec<_> = (0..100).map(|_| results.recv_timeout(Duration::from_secs(60)).unwrap()).collect();
        got.sort_by_key(|r| r.0);
        assert!(got.iter().enumerate().all(|(i, r)| r.0 == i && !r.1 && r.2 != me));
        release.send(()).unwrap();
        first_loop.join().unwrap();
        let (done, results) = channel();
        workers.run(move |_| done.send(std::thread::current().id()).unwrap());
        assert_eq!(results.recv().unwrap(), me, "a free loop works by itself");
    }

    #[test]
    fn panics_and_long_waits_stay_with_their_job() {
        let workers = Workers::new(2, Duration::ZERO);
        workers.run(|_| panic!("on purpose"));
        let held = workers.clone();
        let (done, results) = channel();
        workers.run(move |_| {
            let inner = done.clone();
            held.run(move |late| inner.send(late).unwrap());
        });
        assert!(results.recv_timeout(Duration::from_secs(60)).unwrap(), "waited longer than not at all");
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod schedules {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sync::schedules::check;

    #[test]
    fn every_job_is_done_once_and_a_loop_stays_free() {
        check(|| {
            let workers = Workers::new(2, Duration::from_secs(10));
            let done = Arc::new(Mutex::new([0; 6]));
            let (inside, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
            let loops: Vec<_> = (0..2)
                .map(|event_loop| {
                    let (workers, done) = (workers.clone(), done.clone());
                    let (inside, most) = (inside.clone(), most.clone());
                    thread::spawn(move || {
                        let me = thread::current().id();
                        for job in event_loop * 3..event_loop * 3 + 3 {
                            let (done, inside, most) = (done.clone(), inside.clone(), most.clone());
                            workers.run(move |_| {
                                let here = thread::current().id() == me;
                                if here {
                                    most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                                }
                                done.lock().unwrap()[job] += 1;
                                if here {
                                    inside.fetch_sub(1, Ordering::SeqCst);
                                }
                            });
                        }
                    })
                })
                .collect();
            loops.into_iter().for_each(|event_loop| event_loop.join().unwrap());
            while workers.waiting() > 0 || done.lock().unwrap().iter().sum::<i32>() < 6 {
                thread::yield_now();
            }
            assert_eq!(*done.lock().unwrap(), [1; 6]);
            while workers.0.lock().threads > 0 {
                workers.0.wake.notify_all();
                thread::yield_now();
            }
            assert!(most.load(Ordering::SeqCst) <= 1, "both event loops worked at once");
        });
    }
}
