//! A keeper's rarer duties: replacing servers that hang or are to be upgraded, and giving a connection up.

use std::time::Instant;

use nix::sys::signal::Signal;

use super::upgrade::{self, Outcome};
use super::{Keeper, mount_now};
use crate::fuse::mount;
use crate::fuse::runtime::Runtime;

impl Keeper {
    /// A server answers requests from now on.
    pub(super) fn is_ready(&mut self) {
        self.ready = true;
        self.down_since = None;
        let Some(server) = &mut self.server else { return };
        server.ready = true;
        server.grown();
        if let Some(pending) = self.upgrade.take() {
            tracing::info!("server {} runs another program", server.pid());
            pending.finish(&Outcome { pid: Some(server.pid()), error: None });
        }
    }

    /// Writes the state into the log, and lets the server do so.
    pub(super) fn dump(&self) {
        tracing::info!(state = %self.report(), "state, asked for by SIGUSR1");
        // One that is not ready may not expect the signal yet.
        if let Some(server) = self.server.as_ref().filter(|server| server.ready) {
            server.signal(Signal::SIGUSR1);
        }
    }

    /// Ends the server, so that the next one takes over.
    fn replace(&mut self, why: String) {
        if let Some(server) = &mut self.server {
            tracing::error!("server {} is replaced: {why}", server.pid());
            (self.last_end, self.replacing) = (Some(why), true);
            server.signal_kill();
        }
    }

    /// Looks whether the server works, and whether the mount has been without one for too long.
    pub(super) fn watch(&mut self) {
        if self.ending.is_some() {
            return;
        }
        if !self.replacing
            && let Some(server) = &self.server
            && let Some(why) = self.watchdog.look(server.pid(), server.lived(), server.ready)
        {
            self.down_since.get_or_insert_with(Instant::now);
            self.fail_upgrade(&why);
            self.replace(why);
        }
        let given_up = self.down_since.is_some_and(|since| since.elapsed() > self.watchdog.last_resort());
        if given_up && self.ready {
            self.remount();
        }
    }

    /// The last resort: whoever waits gets an error at once, and the mount starts anew. Memory files and what servers
    /// keep here stay; open files of clients do not.
    fn remount(&mut self) {
        tracing::error!("no server works: the connection is given up and made anew");
        self.down_since = Some(Instant::now());
        self.remounts += 1;
        if let Some(server) = &mut self.server {
            self.replacing = true;
            server.signal_kill();
        }
        if let Err(error) = mount::abort(self.mounted.device) {
            // Then it ends with its last descriptor, below.
            tracing::warn!("the connection is not aborted: {error}");
        }
        let runtime = Runtime::at(&self.config.runtime);
        match mount_now(&self.config, &runtime, &mut self.record, &[self.mounted.device]) {
            Ok((mounted, agreed)) => {
                (self.mounted, self.agreed) = (mounted, agreed);
                self.files.count_connection();
                if self.no_passthrough.is_none() {
                    self.files.register_again(&self.mounted.fuse);
                }
            }
            Err(error) => {
                tracing::error!("it cannot be mounted again: {error}");
                self.end("the mount is lost");
            }
        }
    }

    /// Takes an order for another program.
    pub(super) fn take_order(&mut self) {
        match upgrade::accept(&self.commands) {
            Ok((program, connection)) => {
                if let Some(former) = self.upgrade.take() {
                    former.finish(&Outcome { pid: None, error: Some("another upgrade came".into()) });
                }
                let former = self.program.replace(program);
                self.upgrade = Some(upgrade::pending(connection, former));
                self.down_since.get_or_insert_with(Instant::now);
                match &self.server {
                    Some(_) => self.replace("an upgrade".into()),
                    None => self.next_start = Some(Instant::now()),
                }
                self.failures = 0;
            }
            Err(error) => tracing::warn!("no upgrade: {error}"),
        }
    }

    /// Goes back to the former program if an upgrade is under way and its server has begun.
    pub(super) fn fail_upgrade(&mut self, why: &str) {
        if self.replacing {
            // It is the former program's server that ends.
            return;
        }
        if let Some(pending) = self.upgrade.take() {
            let error = format!("the former program goes on: {why}");
            tracing::error!("the upgrade failed: {error}");
            self.program = pending.finish(&Outcome { pid: None, error: Some(error) });
            self.failures = 0;
        }
    }
}
