//! Why a call of the driver fails, in the terms of gRPC. What people read in `kubectl describe pod` is the message.

use tonic::{Code, Status};

use crate::error::{Error, Kind, shortened};

/// A status that is not OK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What the caller can act on.
    pub code: Code,
    /// What the user can.
    pub message: String,
}

/// Result of what the driver does.
pub type Outcome<T> = Result<T, Failure>;

impl Failure {
    /// With this code and message.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Failure { code, message: shortened(message.into()) }
    }

    /// A request that will never work.
    pub fn invalid(message: impl Into<String>) -> Self {
        Failure::new(Code::InvalidArgument, message)
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        Status::new(failure.code, failure.message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match error.kind() {
            Kind::Invalid => Code::InvalidArgument,
            Kind::Timeout => Code::DeadlineExceeded,
            Kind::Unavailable => Code::Unavailable,
            Kind::Full => Code::ResourceExhausted,
            Kind::Os(libc::ENOSPC | libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::EAGAIN) => {
                Code::ResourceExhausted
            }
            Kind::NotPermitted | Kind::AccessDenied => Code::PermissionDenied,
            _ => Code::Internal,
        };
        Failure::new(code, error.to_string())
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Error::from(error).into()
    }
}
