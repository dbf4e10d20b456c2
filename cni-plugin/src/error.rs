//! Errors with the numbers that CNI gives them.

use std::{io, net::IpAddr};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("configuration asks for CNI version {0:?}; this plugin speaks {supported}", supported = crate::spec::VERSIONS.join(", "))]
    Version(String),
    #[error("{0}")]
    Environment(String),
    #[error("decode the network configuration")]
    Decode(#[source] serde_json::Error),
    #[error("network configuration: {0}")]
    Config(String),
    #[error("{operation} {object}")]
    Io {
        operation: &'static str,
        object: String,
        #[source]
        cause: io::Error,
    },
    #[error("wire pod {pod}")]
    Wiring {
        pod: String,
        #[source]
        cause: sluice_netlink::Error,
    },
    #[error("tell the data path about pod {pod}")]
    Maps {
        pod: String,
        #[source]
        cause: sluice_ebpf::Error,
    },
    #[error("the node's agent has not started since boot; it makes the data path that pods are put into")]
    NotReady(#[source] sluice_ebpf::Error),
    #[error("no free address in {ranges}: {held} leases are held")]
    Exhausted { ranges: String, held: usize },
    #[error("no lease for container {container} interface {ifname}: it was never added, or is removed")]
    NoLease { container: String, ifname: String },
    #[error("interface {ifname} of container {container} is not as it was made: {what}")]
    Drift { container: String, ifname: String, what: String },
    #[error("lease file {file} is damaged; remove it when no pod uses {addresses:?}")]
    Damaged { file: String, addresses: Vec<IpAddr> },
}

impl Error {
    pub(crate) fn io(operation: &'static str, object: impl ToString, cause: io::Error) -> Self {
        Self::Io { operation, object: object.to_string(), cause }
    }

    /// Well-known codes are below 100, our own from 100.
    pub fn code(&self) -> u32 {
        match self {
            Self::Version(_) => 1,
            Self::Environment(_) => 4,
            Self::Io { .. } => 5,
            Self::Decode(_) => 6,
            Self::Config(_) => 7,
            Self::NotReady(_) => 11,
            Self::Wiring { .. } => 100,
            Self::Maps { .. } => 101,
            Self::Exhausted { .. } => 102,
            Self::NoLease { .. } => 103,
            Self::Drift { .. } => 104,
            Self::Damaged { .. } => 105,
        }
    }

    /// The chain of causes below this error, for the `details` of the answer.
    pub fn details(&self) -> String {
        let mut text = Vec::new();
        let mut cause = std::error::Error::source(self);
        while let Some(c) = cause {
            text.push(c.to_string());
            cause = c.source();
        }
        text.join(": ")
    }
}

pub(crate) type Result<T> = std::result::Result<T, Error>;
