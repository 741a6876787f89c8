//! Logs: `tracing` to standard error or a file, as text or JSON.
