//! One error type for every floor: what happened, to what, why, and which errno says so to a program.
//!
//! The [`Kind`] decides the errno (one exhaustive table, [`Kind::errno`]); the message is for people and tells,
//! where that helps, what to do next. Context is added on the way up with [`Context::context`].

use std::fmt::{self, Write};

/// Result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as far as a caller must tell cases apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// No such name, object, blob or attribute's file.
    NotFound,
    /// The version that was opened is gone: its object was deleted or its store restarted.
    Stale,
    /// Metadata or file content that breaks its format's rules.
    Malformed,
    /// The store does not answer, or refused the connection.
    Unavailable,
    /// A deadline passed.
    Timeout,
    /// The store (or the staging area) has no room.
    Full,
    /// The data lives on another instance and may not be fetched.
    Remote,
    /// The instance that holds the data cannot be reached.
    Unreachable,
    /// The mount is read-only.
    ReadOnly,
    /// The name exists already.
    Exists,
    /// A directory is not empty.
    NotEmpty,
    /// A directory where a file is needed.
    IsDirectory,
    /// A file where a directory is needed.
    NotDirectory,
    /// An argument outside what the operation accepts.
    Invalid,
    /// A name longer than a file name can be.
    NameTooLong,
    /// This operation exists elsewhere, not here.
    Unsupported,
    /// The caller may not do that.
    NotPermitted,
    /// Mode bits or credentials refuse it.
    AccessDenied,
    /// No such extended attribute.
    NoAttribute,
    /// The resource is in use.
    Busy,
    /// Larger than the limit that the operation states.
    TooLarge,
    /// The buffer that the caller gave is too small.
    Range,
    /// A system call failed with this errno.
    Os(i32),
    /// A broken promise inside this program.
    Internal,
}

impl Kind {
    /// The errno that the kernel passes on to the program.
    pub fn errno(self) -> i32 {
        match self {
            Kind::NotFound => libc::ENOENT,
            Kind::Stale => libc::ESTALE,
            Kind::Malformed | Kind::Unavailable | Kind::Timeout | Kind::Internal => libc::EIO,
            Kind::Full => libc::ENOSPC,
            Kind::Remote => libc::EREMOTEIO,
            Kind::Unreachable => libc::EHOSTUNREACH,
            Kind::ReadOnly => libc::EROFS,
            Kind::Exists => libc::EEXIST,
            Kind::NotEmpty => libc::ENOTEMPTY,
            Kind::IsDirectory => libc::EISDIR,
            Kind::NotDirectory => libc::ENOTDIR,
            Kind::Invalid => libc::EINVAL,
            Kind::NameTooLong => libc::ENAMETOOLONG,
            Kind::Unsupported => libc::EOPNOTSUPP,
            Kind::NotPermitted => libc::EPERM,
            Kind::AccessDenied => libc::EACCES,
            Kind::NoAttribute => libc::ENODATA,
            Kind::Busy => libc::EBUSY,
            Kind::TooLarge => libc::EFBIG,
            Kind::Range => libc::ERANGE,
            Kind::Os(errno) => errno,
        }
    }
}

/// An error: its [`Kind`], a message, and the error that caused it.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with a message of its own. Past 2,000 bytes it ends in `…`: what others wrote may be in it.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error { kind, message: shortened(message.into()), source: None }
    }

    /// Metadata or content that breaks its format's rules.
    pub fn malformed(message: impl Into<String>) -> Self {
        Error::new(Kind::Malformed, message)
    }

    /// No such thing.
    pub fn not_found(message: impl Into<String>) -> Self {
        Error::new(Kind::NotFound, message)
    }

    /// The opened version is gone.
    pub fn stale(message: impl Into<String>) -> Self {
        Error::new(Kind::Stale, message)
    }

    /// Attaches the error that caused this one.
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What a caller can act on.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// True if it says something of what was looked at, which trying again does not change, and nothing of the store: other
    /// forms of the same content may do.
    pub fn is_of_content(&self) -> bool {
        matches!(self.kind, Kind::Malformed | Kind::Unsupported | Kind::TooLarge)
    }

    /// The errno for the program that asked.
    pub fn errno(&self) -> i32 {
        self.kind.errno()
    }
}

impl fmt::Display for Error {
    /// The message and, after a colon each, the causes below it, in one line. Type names and what a server says are in
    /// it as others wrote them: here they lose what could begin another line of a log or command a terminal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let f = &mut OneLine(f);
        f.write_str(&self.message)?;
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            // An `Error` prints its own causes.
            if error.is::<Error>() {
                return write!(f, ": {error}");
            }
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// Most bytes of a message.
const LONGEST: usize = 2000;

/// A message of at most 2,000 bytes, and a sign that there was more.
pub fn shortened(mut message: String) -> String {
    if message.len() > LONGEST {
        let end = (0..=LONGEST).rev().find(|at| message.is_char_boundary(*at));
        message.truncate(end.unwrap_or(0));
        message.push('…');
    }
    message
}

/// A text in which control characters are escaped, so that it begins no line of a log and commands no terminal.
pub fn one_line(text: &str) -> String {
    let mut line = OneLine(String::with_capacity(text.len()));
    // A string takes everything.
    let _ = line.write_str(text);
    line.0
}

/// Escapes control characters.
struct OneLine<W>(W);

impl<W: Write> Write for OneLine<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for part in text.split_inclusive(char::is_control) {
            match part.chars().next_back().filter(|last| last.is_control()) {
                None => self.0.write_str(part)?,
                Some(last) => {
                    self.0.write_str(part.strip_suffix(last).unwrap_or_default())?;
                    write!(self.0, "{}", last.escape_default())?;
                }
            }
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as &(dyn std::error::Error + 'static))
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => Error::new(Kind::Os(errno), error.to_string()),
            None => Error::new(Kind::Os(libc::EIO), error.to_string()),
        }
    }
}

impl From<nix::errno::Errno> for Error {
    fn from(errno: nix::errno::Errno) -> Self {
        Error::new(Kind::Os(errno as i32), errno.desc())
    }
}

/// Adds what was being done to an error; the [`Kind`] of an [`Error`] stays.
pub trait Context<T> {
    /// Puts `message` in front of the error.
    fn context(self, message: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, message: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| {
            let error = error.into();
            Error { kind: error.kind, message: shortened(message()), source: Some(Box::new(error)) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_keeps_the_kind_and_prints_the_chain_once() {
        let inner = Error::malformed("offset 9 is past the blob of 8 bytes");
        let outer = Err::<(), _>(inner).context(|| "column \"a\"".into()).context(|| "object o1".into()).unwrap_err();
        assert_eq!(outer.kind(), Kind::Malformed);
        assert_eq!(outer.errno(), libc::EIO);
        assert_eq!(outer.to_string(), "object o1: column \"a\": offset 9 is past the blob of 8 bytes");
    }

    #[test]
    fn what_others_wrote_is_cut() {
        let long = "ä".repeat(1200);
        let text = Err::<(), _>(Error::malformed(&*long)).context(|| long.clone()).unwrap_err().to_string();
        let cut = format!("{}…", "ä".repeat(1000));
        assert_eq!(text, format!("{cut}: {cut}"));
        assert_eq!(shortened("x".repeat(2000)), "x".repeat(2000));
    }

    #[test]
    fn what_others_wrote_begins_no_line_and_commands_no_terminal() {
        let theirs = "evil\nINFO all is well\r\u{1b}[2J\u{9b}1m \u{fc}";
        let ours = "evil\\nINFO all is well\\r\\u{1b}[2J\\u{9b}1m \u{fc}";
        assert_eq!(Error::malformed(theirs).to_string(), ours);
        assert_eq!(one_line(theirs), ours);
        let inner = Err::<(), _>(Error::malformed("x").with_source(std::io::Error::other(theirs)));
        let outer = inner.context(|| theirs.into()).unwrap_err();
        assert_eq!(outer.to_string(), format!("{ours}: x: {ours}"));
    }

    #[test]
    fn system_errors_keep_their_errno() {
        let error: Error = std::io::Error::from_raw_os_error(libc::ENOSPC).into();
        assert_eq!(error.errno(), libc::ENOSPC);
    }
}
