//! Locks and threads of the places where threads share state.
//!
//! They are the standard library's. With the feature `shuttle` they belong to a scheduler that decides who runs next, and
//! the tests named `schedules` try thousands of interleavings (`scripts/test --full`); nothing else works in such a build.

#[cfg(not(feature = "shuttle"))]
pub use std::sync::{Condvar, Mutex, MutexGuard, OnceLock};
#[cfg(not(feature = "shuttle"))]
pub use std::{sync::atomic, thread};

#[cfg(feature = "shuttle")]
pub use shuttle::sync::{Condvar, Mutex, MutexGuard, atomic};
#[cfg(feature = "shuttle")]
pub use shuttle::thread;

/// The standard one would stop the scheduler while another of its threads makes the value.
#[cfg(feature = "shuttle")]
#[derive(Debug, Default)]
pub struct OnceLock<T>(std::sync::OnceLock<T>, Mutex<()>);

#[cfg(feature = "shuttle")]
impl<T> OnceLock<T> {
    /// Without a value.
    #[must_use]
    pub fn new() -> Self {
        OnceLock(std::sync::OnceLock::new(), Mutex::new(()))
    }

    /// The value, if there is one.
    pub fn get(&self) -> Option<&T> {
        self.0.get()
    }

    /// Sets the value, or gives it back if there is one.
    ///
    /// # Errors
    /// The value.
    pub fn set(&self, value: T) -> Result<(), T> {
        let _alone = self.1.lock();
        self.0.set(value)
    }

    /// The value; the first who asks makes it.
    pub fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
        if self.0.get().is_none() {
            let _alone = self.1.lock();
            if self.0.get().is_none() {
                let _ = self.0.set(make());
            }
        }
        self.0.get_or_init(|| unreachable!("it was set above"))
    }
}

/// For the tests named `schedules`.
#[cfg(all(test, feature = "shuttle"))]
pub mod schedules {
    /// Runs `work` with so many interleavings; `VINEYARD_FS_SCHEDULES` says another number. Half of them are chosen at
    /// random, half switch threads at few places only, which finds what needs long runs of one thread.
    pub fn check(work: impl Fn() + Send + Sync + Clone + 'static) {
        let count = std::env::var("VINEYARD_FS_SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(4_000);
        shuttle::check_random(work.clone(), count / 2);
        shuttle::check_pct(work, count / 2, 3);
    }
}
