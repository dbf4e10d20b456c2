//! What can go wrong in talking to the kernel's control side.

use std::io;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{operation} {object}")]
    Io {
        operation: &'static str,
        object: String,
        #[source]
        cause: io::Error,
    },
    #[error("the kernel refused to {operation}")]
    Refused {
        operation: String,
        #[source]
        cause: io::Error,
    },
    #[error("rtnetlink answered {0}")]
    Answer(String),
    #[error("{0:?} is not an address range in CIDR notation, such as 10.244.1.0/24")]
    Prefix(String),
    #[error(
        "reserving ports {reserved} would leave none of {local} for outgoing connections; widen \
         net.ipv4.ip_local_port_range"
    )]
    NoPorts { reserved: String, local: String },
    #[error("a thread inside network namespace {0} ended without a result")]
    Thread(String),
}

impl Error {
    pub(crate) fn io(operation: &'static str, object: impl ToString, cause: io::Error) -> Self {
        Self::Io { operation, object: object.to_string(), cause }
    }

    /// The kernel's error number, where one was the cause.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Io { cause, .. } | Self::Refused { cause, .. } => cause.raw_os_error(),
            _ => None,
        }
    }
}

pub(crate) type Result<T> = std::result::Result<T, Error>;
