//! Connections to one socket, and which vineyardd is behind it.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::blobs::Memories;
use super::connection::{Connection, Identity};
use super::store::Instance;
use crate::error::{Context, Error, Kind, Result};

/// Makes a connected socket, until a deadline.
pub type Connector = Box<dyn Fn(Instant) -> Result<UnixStream> + Send + Sync>;

/// Connections that are kept for the next request.
const IDLE: usize = 16;
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Pauses between attempts, each twice the one before.
pub struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Backoff(FIRST_PAUSE)
    }
}

impl Backoff {
    /// Waits, but not past `deadline`. False if no time is left.
    pub fn pause(&mut self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        std::thread::sleep(self.0.min(left));
        self.0 = (self.0 * 2).min(LONGEST_PAUSE);
        Instant::now() < deadline
    }
}

struct State {
    generation: u64,
    idle: Vec<Connection>,
    /// A connection that carries no request. It ends exactly when its vineyardd does, which tells a restarted vineyardd
    /// even if number, socket and (in another namespace) process id are those of the former.
    sentinel: Option<Connection>,
}

/// See the [module](self).
pub struct Pool {
    connector: Connector,
    patience: Duration,
    memories: Arc<Memories>,
    state: Mutex<State>,
}

impl Pool {
    /// No connection is made yet.
    pub fn new(connector: Connector, patience: Duration, memories: Arc<Memories>) -> Self {
        let state = State { generation: 0, idle: Vec::new(), sentinel: None };
        Pool { connector, patience, memories, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A live connection to the vineyardd that is there now; attempts with back-off until `deadline`.
    pub fn checkout(&self, deadline: Instant) -> Result<Connection> {
        let mut backoff = Backoff::default();
        loop {
            if let Some(mut connection) = self.take_idle() {
                connection.set_deadline(deadline);
                return Ok(connection);
            }
            let error = match self.open(deadline) {
                Ok(connection) => return Ok(connection),
                Err(error) => error,
            };
            if !is_outage(error.kind()) || !backoff.pause(deadline) {
                let kind = if is_outage(error.kind()) { Kind::Unavailable } else { error.kind() };
                return Err(Error::new(kind, "vineyardd can't be reached").with_source(error));
            }
        }
    }

    fn take_idle(&self) -> Option<Connection> {
        let mut state = self.lock();
        while let Some(connection) = state.idle.pop() {
            if connection.is_quiet() {
                return Some(connection);
            }
        }
        None
    }

    fn register(&self, deadline: Instant) -> Result<Connection> {
        let stream = (self.connector)(deadline)?;
        Ok(Connection::register(stream, deadline, self.patience)?)
    }

    fn open(&self, deadline: Instant) -> Result<Connection> {
        let mut connection = self.register(deadline)?;
        if self.adopt(&mut self.lock(), &mut connection) {
            return Ok(connection);
        }
        let mut sentinel = self.register(deadline)?;
        if sentinel.identity != connection.identity || !connection.is_quiet() {
            return Err(Error::new(Kind::Unavailable, "vineyardd restarts"));
        }
        let mut state = self.lock();
        // Another thread may have met the new vineyardd first.
        if self.adopt(&mut state, &mut connection) {
            return Ok(connection);
        }
        state.generation += 1;
        state.idle.clear();
        sentinel.generation = state.generation;
        connection.generation = state.generation;
        self.memories.reset(state.generation, connection.identity.instance);
        let restarted = state.sentinel.replace(sentinel).is_some();
        let Identity { pid, instance, socket, version, .. } = &connection.identity;
        if restarted {
            tracing::warn!(pid, %instance, socket, version, "vineyardd was restarted: all that was known of it is void");
        } else {
            tracing::info!(pid, %instance, socket, version, "connected to vineyardd");
        }
        Ok(connection)
    }

    /// Gives the connection the current generation if it leads to the same vineyardd.
    fn adopt(&self, state: &mut State, connection: &mut Connection) -> bool {
        let same = state.sentinel.as_ref().is_some_and(|s| s.identity == connection.identity && s.is_quiet());
        if same {
            connection.generation = state.generation;
        }
        same
    }

    /// Takes back a connection whose last reply was read whole.
    pub fn checkin(&self, connection: Connection) {
        let mut state = self.lock();
        if connection.generation == state.generation && state.idle.len() < IDLE {
            state.idle.push(connection);
        }
    }

    /// The vineyardd of a connection.
    pub fn instance_of(connection: &Connection) -> Instance {
        let identity = &connection.identity;
        Instance {
            id: identity.instance,
            socket: PathBuf::from(&identity.socket),
            rpc_endpoint: identity.rpc_endpoint.clone(),
            version: identity.version.clone(),
            generation: connection.generation,
        }
    }
}

/// True for errors that a vineyardd which comes back may cure.
fn is_outage(kind: Kind) -> bool {
    match kind {
        Kind::Unavailable => true,
        Kind::Os(errno) => {
            matches!(errno, libc::ECONNREFUSED | libc::ENOENT | libc::EAGAIN | libc::ECONNRESET | libc::EPIPE)
        }
        _ => false,
    }
}

/// A connector for a socket's path.
pub fn socket_connector(path: PathBuf) -> Connector {
    Box::new(move |deadline| {
        super::connection::connect_path(&path, deadline).context(|| "is vineyardd running?".into())
    })
}
