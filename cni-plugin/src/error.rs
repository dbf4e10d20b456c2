//! Errors with the numbers that CNI gives them.

use std::{io, net::IpAddr};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("configuration asks for CNI version {0:?}; this plugin speaks {known}", known = known())]
    Version(String),
    #[error("CNI version {version} has no {verb}; it came with {since}")]
    TooOld { version: &'static str, verb: &'static str, since: &'static str },
    #[error("{0}")]
    Environment(String),
    #[error("decode the network configuration")]
    Decode(#[source] serde_json::Error),
    #[error("network configuration: {0}")]
    Config(String),
    #[error("network configuration: {field} is {value}, but this plugin leases addresses itself")]
    Unsupported { field: &'static str, value: String },
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
    #[error("the data path is not there or not whole; the node's agent makes and mends it: is sluice-agent running?")]
    NotReady(#[source] sluice_ebpf::Error),
    #[error("no free address: {fill}; {releasing} of {leases} leases wait for their link to go")]
    Exhausted { fill: String, leases: usize, releasing: usize },
    #[error("address {address} was asked for, but {why}")]
    Asked { address: IpAddr, why: String },
    #[error("{netns} has an interface {ifname} that is not ours; remove it or choose another CNI_IFNAME")]
    IfnameTaken { netns: String, ifname: String },
    #[error("{netns} has an interface of this plugin already, for {holder}; a pod has one")]
    Occupied { netns: String, holder: String },
    #[error("port {port} of the node cannot lead to the pod: {why}")]
    HostPort { port: u16, why: &'static str },
    #[error("the kernel limits no bandwidth: it was built without CONFIG_NET_SCH_TBF")]
    NoBandwidth(#[source] sluice_netlink::Error),
    /// What STATUS answers.
    #[error("no pod can be added: {cause}")]
    Unavailable { cause: Box<Error>, limited: bool },
    #[error("no lease for container {container} interface {ifname}: it was never added, or is removed")]
    NoLease { container: String, ifname: String },
    #[error("interface {ifname} of container {container} is not as it was made: {what}")]
    Drift { container: String, ifname: String, what: String },
    #[error("lease file {file} is damaged; remove it when no pod uses {addresses:?}")]
    Damaged { file: String, addresses: Vec<IpAddr> },
}

fn known() -> String {
    crate::spec::VERSIONS.join(", ")
}

impl Error {
    pub(crate) fn io(operation: &'static str, object: impl ToString, cause: io::Error) -> Self {
        Self::Io { operation, object: object.to_string(), cause }
    }

    /// Codes of the specification (1.1.0, section 5, "Error") are below 100, our own from 100.
    pub fn code(&self) -> u32 {
        match self {
            Self::Version(_) | Self::TooOld { .. } => 1,
            Self::Unsupported { .. } => 2,
            Self::NoLease { .. } => 3,
            Self::Environment(_) => 4,
            Self::Io { .. } => 5,
            Self::Decode(_) => 6,
            Self::Config(_) => 7,
            Self::NotReady(_) => 11,
            Self::Unavailable { limited: false, .. } => 50,
            Self::Unavailable { limited: true, .. } => 51,
            Self::Wiring { .. } => 100,
            Self::Maps { .. } => 101,
            Self::Exhausted { .. } => 102,
            Self::Asked { .. } => 103,
            Self::Drift { .. } => 104,
            Self::Damaged { .. } => 105,
            Self::IfnameTaken { .. } => 106,
            Self::Occupied { .. } => 107,
            Self::HostPort { .. } => 108,
            Self::NoBandwidth(_) => 109,
        }
    }

    /// The chain of causes below this error, for the `details` of the answer.
    pub fn details(&self) -> String {
        if let Self::Unavailable { cause, .. } = self {
            return cause.details();
        }
        let mut text = Vec::new();
        let mut cause = std::error::Error::source(self);
        while let Some(c) = cause {
            text.push(c.to_string());
            cause = c.source();
        }
        text.join(": ")
    }
}

pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;
