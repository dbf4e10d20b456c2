//! Services and the endpoints behind them.

use crate::{Identity, Name};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    Tcp,
    Udp,
}

/// What is spoken on a port, where someone said so; otherwise the first bytes tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AppProtocol {
    #[default]
    Detect,
    Http,
    /// HTTP/2 with prior knowledge, gRPC included.
    Http2,
    /// Opaque bytes.
    Tcp,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// Empty for the only port of a service that names none.
    #[serde(default)]
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
    #[serde(default)]
    pub app_protocol: AppProtocol,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    pub name: Name,
    /// Virtual addresses (ClusterIPs), at most one per family; empty for a headless service.
    #[serde(default)]
    pub virtual_ips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
}

impl Service {
    pub fn headless(&self) -> bool {
        self.virtual_ips.is_empty()
    }
}

/// Whether, and as whom, an endpoint takes mTLS.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Mesh {
    /// No sidecar: send plain bytes.
    #[default]
    Plain,
    /// A sidecar that must prove this identity.
    Mtls(Identity),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    pub address: IpAddr,
    /// Readiness, with Kubernetes' terminating fallback already applied: only these take new traffic.
    pub ready: bool,
    /// Name of the node it runs on; empty when unknown.
    #[serde(default)]
    pub node: String,
    /// Name of the pod; absent for endpoints that are none.
    #[serde(default)]
    pub workload: Option<Name>,
    /// `hostname.service` resolves to it (headless services).
    #[serde(default)]
    pub hostname: Option<String>,
    #[serde(default)]
    pub mesh: Mesh,
    /// The endpoint's ports: the same service port can be another number on another pod (named target ports).
    pub ports: Vec<EndpointPort>,
}

/// A port of an endpoint, by the name of the service port it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointPort {
    #[serde(default)]
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
}

/// All endpoints of one service, under the service's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSet {
    pub name: Name,
    pub endpoints: Vec<Endpoint>,
}

impl EndpointSet {
    /// Ready endpoints and the port number each serves `port_name` on.
    pub fn ready_on<'a>(
        &'a self,
        port_name: &'a str,
        protocol: Protocol,
    ) -> impl Iterator<Item = (&'a Endpoint, u16)> + 'a {
        self.endpoints.iter().filter(|e| e.ready).filter_map(move |e| {
            let port = e.ports.iter().find(|p| p.protocol == protocol && p.name == port_name)?;
            Some((e, port.port))
        })
    }
}
