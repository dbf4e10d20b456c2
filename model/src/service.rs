//! Services and the endpoints behind them.

use crate::{BackendPolicy, Identity, Name, SourceRange};
use serde::{Deserialize, Serialize};
use std::{borrow::Cow, net::IpAddr};

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
    /// Number on every node's own addresses that leads here too.
    #[serde(default)]
    pub node_port: Option<u16>,
}

/// Which endpoints a caller from outside the cluster may reach, by a node port or an external address (Kubernetes
/// `externalTrafficPolicy`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ExternalPolicy {
    /// All; one on another node sees the address of the node that was reached.
    #[default]
    Cluster,
    /// Only those on the node that was reached; they see the caller's own address.
    Local,
}

/// An external address, and the one node that answers for it in its network at present.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    pub address: IpAddr,
    pub node: String,
}

/// Which endpoints a caller in the cluster may reach (Kubernetes `internalTrafficPolicy`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum InternalPolicy {
    #[default]
    Cluster,
    /// Only those on the caller's node; none there: refused.
    Local,
}

/// Which endpoints are preferred while there are any (Kubernetes `trafficDistribution`, KEP-4444 and KEP-3015).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Distribution {
    #[default]
    Even,
    /// Those in the caller's zone.
    SameZone,
    /// Those on the caller's node, then those in its zone.
    SameNode,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    pub name: Name,
    /// Virtual addresses (ClusterIPs), at most one per family; empty for a headless service.
    #[serde(default)]
    pub virtual_ips: Vec<IpAddr>,
    /// Other addresses that mean this service: `externalIPs` and those of its load balancer.
    #[serde(default)]
    pub external_ips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// Seconds for which a client that has no connection stays with its endpoint (`sessionAffinity: ClientIP`).
    #[serde(default)]
    pub affinity_s: Option<u32>,
    #[serde(default)]
    pub internal_policy: InternalPolicy,
    #[serde(default)]
    pub distribution: Distribution,
    #[serde(default)]
    pub external_policy: ExternalPolicy,
    /// Where each node says over HTTP whether it has an endpoint (services with [`ExternalPolicy::Local`]).
    #[serde(default)]
    pub health_check_node_port: Option<u16>,
    /// Who answers for those of `external_ips` that are of the cluster's own pool.
    #[serde(default)]
    pub announcements: Vec<Announcement>,
    /// The name that its name is another one for (Kubernetes `ExternalName`), in lower case and without a last dot. Such a
    /// service has neither addresses nor ports.
    #[serde(default)]
    pub external_name: Option<String>,
    /// Those of `external_ips` that only clients in `source_ranges` may use.
    #[serde(default)]
    pub restricted_ips: Vec<IpAddr>,
    /// Of both families; without one of a family, nobody of it may.
    #[serde(default)]
    pub source_ranges: Vec<SourceRange>,
    /// How sidecars use its endpoints; absent: the defaults.
    #[serde(default)]
    pub backend_policy: Option<BackendPolicy>,
}

impl Service {
    pub fn headless(&self) -> bool {
        self.virtual_ips.is_empty()
    }

    /// Every address that a caller may dial to reach it.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.virtual_ips.iter().chain(&self.external_ips).copied()
    }
}

/// Where callers are: the name of their node, and its zone, empty when it has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place<'a> {
    pub node: &'a str,
    pub zone: &'a str,
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
    /// Terminates and still serves: takes new traffic where no other endpoint may (KEP-1669).
    #[serde(default)]
    pub draining: bool,
    /// Name of the node it runs on; empty when unknown.
    #[serde(default)]
    pub node: String,
    /// Zone of that node; empty when unknown.
    #[serde(default)]
    pub zone: String,
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
    /// The endpoints of one family.
    pub fn of_family(&self, v4: bool) -> Cow<'_, Self> {
        self.only(|e| e.address.is_ipv4() == v4)
    }

    /// The endpoints that have a port of that name.
    pub fn with_port(&self, name: &str, protocol: Protocol) -> Cow<'_, Self> {
        self.only(|e| e.ports.iter().any(|p| p.protocol == protocol && p.name == name))
    }

    fn only(&self, of: impl Fn(&Endpoint) -> bool) -> Cow<'_, Self> {
        if self.endpoints.iter().all(&of) {
            return Cow::Borrowed(self);
        }
        let endpoints = self.endpoints.iter().filter(|e| of(e)).cloned().collect();
        Cow::Owned(Self { name: self.name.clone(), endpoints })
    }

    /// The set as callers at `place` may use it: those that they may not, or need not, are not ready.
    pub fn seen_from(&self, service: &Service, place: Place<'_>) -> Cow<'_, Self> {
        let near = |e: &Endpoint| !place.node.is_empty() && e.node == place.node;
        let in_zone = |e: &Endpoint| !place.zone.is_empty() && e.zone == place.zone;
        let keep = |takes: &dyn Fn(&Endpoint) -> bool| {
            let endpoints = self.endpoints.iter().map(|e| Endpoint { ready: takes(e), ..e.clone() }).collect();
            Cow::Owned(Self { name: self.name.clone(), endpoints })
        };
        let any = |near: &dyn Fn(&Endpoint) -> bool| self.endpoints.iter().any(|e| e.ready && near(e));
        match (service.internal_policy, service.distribution) {
            (InternalPolicy::Local, _) if any(&near) => keep(&|e| e.ready && near(e)),
            (InternalPolicy::Local, _) => keep(&|e| e.draining && near(e)),
            (_, Distribution::SameNode) if any(&near) => keep(&|e| e.ready && near(e)),
            (_, Distribution::SameNode | Distribution::SameZone) if any(&in_zone) => keep(&|e| e.ready && in_zone(e)),
            _ => Cow::Borrowed(self),
        }
    }

    /// The set as callers from outside the cluster may use it who have reached the node at `place`. The internal policy is
    /// not theirs.
    pub fn seen_from_outside(&self, service: &Service, place: Place<'_>) -> Cow<'_, Self> {
        let (internal_policy, distribution) = match service.external_policy {
            ExternalPolicy::Cluster => (InternalPolicy::Cluster, service.distribution),
            ExternalPolicy::Local => (InternalPolicy::Local, Distribution::Even),
        };
        self.seen_from(&Service { internal_policy, distribution, ..Service::default() }, place)
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    /// Endpoints as `node/zone` with `+` ready, `-` not, `~` draining.
    fn set(list: &[&str]) -> EndpointSet {
        let endpoint = |(at, text): (usize, &&str)| {
            let (node, zone) = text[1..].split_once('/').expect("node/zone");
            Endpoint {
                address: IpAddr::from([10, 0, 0, at as u8]),
                ready: text.starts_with('+'),
                draining: text.starts_with('~'),
                node: node.into(),
                zone: zone.into(),
                workload: None,
                hostname: None,
                mesh: Mesh::Plain,
                ports: vec![],
            }
        };
        EndpointSet { name: Name::new("shop", "web"), endpoints: list.iter().enumerate().map(endpoint).collect() }
    }

    /// Policy and preference, the endpoints, the caller's node and zone, and which of them it may use.
    type Row<'a> = (InternalPolicy, Distribution, &'a [&'a str], &'a str, &'a str, &'a [usize]);

    #[test]
    fn who_may_be_reached_from_where() {
        use Distribution::{Even, SameNode, SameZone};
        use InternalPolicy::{Cluster, Local};
        let all = ["+n1/a", "+n2/a", "+n3/b", "-n4/c", "~n4/c"];
        let table: [Row<'_>; 13] = [
            (Cluster, Even, &all, "n1", "a", &[0, 1, 2]),
            (Local, Even, &all, "n1", "a", &[0]),
            (Local, Even, &all, "n4", "c", &[4]),
            (Local, Even, &all, "n5", "a", &[]),
            (Local, SameZone, &all, "n5", "a", &[]),
            (Local, Even, &all, "", "", &[]),
            (Cluster, SameNode, &all, "n2", "a", &[1]),
            (Cluster, SameNode, &all, "n9", "a", &[0, 1]),
            (Cluster, SameNode, &all, "n4", "c", &[0, 1, 2]),
            (Cluster, SameZone, &all, "n1", "a", &[0, 1]),
            (Cluster, SameZone, &all, "n1", "z", &[0, 1, 2]),
            (Cluster, SameZone, &["+n1/", "+n2/"], "n1", "", &[0, 1]),
            (Cluster, SameNode, &["+/a", "+n1/b"], "", "z", &[0, 1]),
        ];
        for (internal_policy, distribution, endpoints, node, zone, wanted) in table {
            let service = Service { internal_policy, distribution, ..Service::default() };
            let set = set(endpoints);
            let seen = set.seen_from(&service, Place { node, zone });
            let ready: Vec<usize> =
                seen.endpoints.iter().enumerate().filter(|(_, e)| e.ready).map(|(index, _)| index).collect();
            assert_eq!(ready, wanted, "{internal_policy:?} {distribution:?} from {node}/{zone}");
        }
    }
}
