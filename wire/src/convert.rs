//! Between `model` and the wire. From the wire everything is checked: a message that breaks a rule is [`Malformed`] and
//! changes nothing.

mod gateways;
mod policies;
mod routes;

use crate::v1;
use sluice_model as m;
use std::net::IpAddr;

/// What a peer sent makes no sense; the subscriber nacks with this text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{field}: {value} is not valid")]
    Invalid { field: &'static str, value: String },
}

fn invalid(field: &'static str, value: impl std::fmt::Debug) -> Malformed {
    Malformed::Invalid { field, value: format!("{value:?}") }
}

pub fn address_to_wire(a: IpAddr) -> Vec<u8> {
    match a {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

pub fn address_from_wire(b: &[u8]) -> Result<IpAddr, Malformed> {
    if let Ok(o) = <[u8; 4]>::try_from(b) {
        return Ok(IpAddr::from(o));
    }
    <[u8; 16]>::try_from(b).map(IpAddr::from).map_err(|_| invalid("address", b))
}

fn addresses_from_wire(v: &[Vec<u8>]) -> Result<Vec<IpAddr>, Malformed> {
    v.iter().map(|b| address_from_wire(b)).collect()
}

fn port(field: &'static str, p: u32) -> Result<u16, Malformed> {
    u16::try_from(p).ok().filter(|p| *p != 0).ok_or_else(|| invalid(field, p))
}

/// 0 stands for none.
fn some_port(field: &'static str, p: u32) -> Result<Option<u16>, Malformed> {
    if p == 0 { Ok(None) } else { port(field, p).map(Some) }
}

fn ports(field: &'static str, v: &[u32]) -> Result<Vec<u16>, Malformed> {
    v.iter().map(|p| port(field, *p)).collect()
}

fn required<T>(v: Option<T>, field: &'static str) -> Result<T, Malformed> {
    v.ok_or(Malformed::Missing(field))
}

impl From<&m::Name> for v1::Name {
    fn from(n: &m::Name) -> Self {
        Self { namespace: n.namespace.clone(), name: n.name.clone() }
    }
}

impl From<v1::Name> for m::Name {
    fn from(n: v1::Name) -> Self {
        m::Name::new(n.namespace, n.name)
    }
}

fn name(n: Option<v1::Name>) -> Result<m::Name, Malformed> {
    let n = required(n, "name")?;
    if n.name.is_empty() {
        return Err(Malformed::Missing("name"));
    }
    Ok(n.into())
}

impl From<m::Kind> for v1::Kind {
    fn from(k: m::Kind) -> Self {
        match k {
            m::Kind::Service => Self::Service,
            m::Kind::EndpointSet => Self::EndpointSet,
            m::Kind::Route => Self::Route,
            m::Kind::Policy => Self::Policy,
            m::Kind::Workload => Self::Workload,
            m::Kind::Node => Self::Node,
            m::Kind::Gateway => Self::Gateway,
        }
    }
}

impl From<v1::Kind> for m::Kind {
    fn from(k: v1::Kind) -> Self {
        match k {
            v1::Kind::Service => Self::Service,
            v1::Kind::EndpointSet => Self::EndpointSet,
            v1::Kind::Route => Self::Route,
            v1::Kind::Policy => Self::Policy,
            v1::Kind::Workload => Self::Workload,
            v1::Kind::Node => Self::Node,
            v1::Kind::Gateway => Self::Gateway,
        }
    }
}

pub fn key_to_wire(k: &m::ResourceKey) -> v1::Key {
    v1::Key { kind: v1::Kind::from(k.kind).into(), name: Some((&k.name).into()) }
}

pub fn key_from_wire(k: v1::Key) -> Result<m::ResourceKey, Malformed> {
    let kind = v1::Kind::try_from(k.kind).map_err(|_| invalid("kind", k.kind))?;
    Ok(m::ResourceKey { kind: kind.into(), name: name(k.name)? })
}

pub fn resource_to_wire(r: &m::Resource, version: m::Revision) -> v1::Resource {
    use v1::resource::Kind as K;
    let kind = match r {
        m::Resource::Service(r) => K::Service(r.into()),
        m::Resource::EndpointSet(r) => K::EndpointSet(r.into()),
        m::Resource::Route(r) => K::Route(r.into()),
        m::Resource::Policy(r) => K::Policy(r.into()),
        m::Resource::Workload(r) => K::Workload(r.into()),
        m::Resource::Node(r) => K::Node(r.into()),
        m::Resource::Gateway(r) => K::Gateway(r.into()),
    };
    v1::Resource { version: version.0, kind: Some(kind) }
}

pub fn resource_from_wire(r: v1::Resource) -> Result<m::Resource, Malformed> {
    use v1::resource::Kind as K;
    Ok(match required(r.kind, "resource kind")? {
        K::Service(r) => m::Resource::Service(r.try_into()?),
        K::EndpointSet(r) => m::Resource::EndpointSet(r.try_into()?),
        K::Route(r) => m::Resource::Route(r.try_into()?),
        K::Policy(r) => m::Resource::Policy(r.try_into()?),
        K::Workload(r) => m::Resource::Workload(r.try_into()?),
        K::Node(r) => m::Resource::Node(r.try_into()?),
        K::Gateway(r) => m::Resource::Gateway(r.try_into()?),
    })
}

fn protocol_to_wire(p: m::Protocol) -> i32 {
    match p {
        m::Protocol::Tcp => v1::Protocol::Tcp,
        m::Protocol::Udp => v1::Protocol::Udp,
    }
    .into()
}

fn protocol(p: i32) -> Result<m::Protocol, Malformed> {
    match v1::Protocol::try_from(p) {
        Ok(v1::Protocol::Tcp) => Ok(m::Protocol::Tcp),
        Ok(v1::Protocol::Udp) => Ok(m::Protocol::Udp),
        Err(_) => Err(invalid("protocol", p)),
    }
}

impl From<&m::Service> for v1::Service {
    fn from(s: &m::Service) -> Self {
        Self {
            name: Some((&s.name).into()),
            virtual_ips: s.virtual_ips.iter().map(|a| address_to_wire(*a)).collect(),
            ports: s
                .ports
                .iter()
                .map(|p| v1::ServicePort {
                    name: p.name.clone(),
                    protocol: protocol_to_wire(p.protocol),
                    port: p.port.into(),
                    app_protocol: match p.app_protocol {
                        m::AppProtocol::Detect => v1::AppProtocol::Detect,
                        m::AppProtocol::Http => v1::AppProtocol::Http,
                        m::AppProtocol::Http2 => v1::AppProtocol::Http2,
                        m::AppProtocol::Tcp => v1::AppProtocol::Opaque,
                    }
                    .into(),
                    node_port: p.node_port.unwrap_or(0).into(),
                })
                .collect(),
            external_ips: s.external_ips.iter().map(|a| address_to_wire(*a)).collect(),
            affinity_s: s.affinity_s.unwrap_or(0),
            internal_policy: match s.internal_policy {
                m::InternalPolicy::Cluster => v1::InternalPolicy::Cluster,
                m::InternalPolicy::Local => v1::InternalPolicy::Local,
            }
            .into(),
            distribution: match s.distribution {
                m::Distribution::Even => v1::Distribution::Even,
                m::Distribution::SameZone => v1::Distribution::SameZone,
                m::Distribution::SameNode => v1::Distribution::SameNode,
            }
            .into(),
            external_policy: match s.external_policy {
                m::ExternalPolicy::Cluster => v1::ExternalPolicy::ExternalCluster,
                m::ExternalPolicy::Local => v1::ExternalPolicy::ExternalLocal,
            }
            .into(),
            health_check_node_port: s.health_check_node_port.unwrap_or(0).into(),
            announcements: s.announcements.iter().map(Into::into).collect(),
            external_name: s.external_name.clone().unwrap_or_default(),
            restricted_ips: s.restricted_ips.iter().map(|a| address_to_wire(*a)).collect(),
            source_ranges: s.source_ranges.iter().map(Into::into).collect(),
            backend_policy: s.backend_policy.as_ref().map(Into::into),
        }
    }
}

impl TryFrom<v1::Service> for m::Service {
    type Error = Malformed;

    fn try_from(s: v1::Service) -> Result<Self, Malformed> {
        let service_port = |p: v1::ServicePort| {
            Ok(m::ServicePort {
                name: p.name,
                protocol: protocol(p.protocol)?,
                port: port("service port", p.port)?,
                // A protocol from a newer control is detected from the bytes.
                app_protocol: match v1::AppProtocol::try_from(p.app_protocol).unwrap_or(v1::AppProtocol::Detect) {
                    v1::AppProtocol::Detect => m::AppProtocol::Detect,
                    v1::AppProtocol::Http => m::AppProtocol::Http,
                    v1::AppProtocol::Http2 => m::AppProtocol::Http2,
                    v1::AppProtocol::Opaque => m::AppProtocol::Tcp,
                },
                node_port: some_port("node port", p.node_port)?,
            })
        };
        Ok(Self {
            name: name(s.name)?,
            virtual_ips: addresses_from_wire(&s.virtual_ips)?,
            ports: s.ports.into_iter().map(service_port).collect::<Result<_, _>>()?,
            external_ips: addresses_from_wire(&s.external_ips)?,
            affinity_s: Some(s.affinity_s).filter(|s| *s > 0),
            internal_policy: match v1::InternalPolicy::try_from(s.internal_policy) {
                Ok(v1::InternalPolicy::Cluster) => m::InternalPolicy::Cluster,
                Ok(v1::InternalPolicy::Local) => m::InternalPolicy::Local,
                Err(_) => return Err(invalid("internal policy", s.internal_policy)),
            },
            // A preference from a newer control is one that this program does not have.
            distribution: match v1::Distribution::try_from(s.distribution).unwrap_or(v1::Distribution::Even) {
                v1::Distribution::Even => m::Distribution::Even,
                v1::Distribution::SameZone => m::Distribution::SameZone,
                v1::Distribution::SameNode => m::Distribution::SameNode,
            },
            external_policy: match v1::ExternalPolicy::try_from(s.external_policy) {
                Ok(v1::ExternalPolicy::ExternalCluster) => m::ExternalPolicy::Cluster,
                Ok(v1::ExternalPolicy::ExternalLocal) => m::ExternalPolicy::Local,
                Err(_) => return Err(invalid("external policy", s.external_policy)),
            },
            health_check_node_port: some_port("health check node port", s.health_check_node_port)?,
            announcements: s.announcements.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            external_name: Some(s.external_name).filter(|n| !n.is_empty()),
            restricted_ips: addresses_from_wire(&s.restricted_ips)?,
            source_ranges: s.source_ranges.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            backend_policy: s.backend_policy.map(TryInto::try_into).transpose()?,
        })
    }
}

impl From<&m::Announcement> for v1::Announcement {
    fn from(a: &m::Announcement) -> Self {
        Self { address: address_to_wire(a.address), node: a.node.clone() }
    }
}

impl TryFrom<v1::Announcement> for m::Announcement {
    type Error = Malformed;

    fn try_from(a: v1::Announcement) -> Result<Self, Malformed> {
        Ok(Self { address: address_from_wire(&a.address)?, node: a.node })
    }
}

impl From<&m::SourceRange> for v1::SourceRange {
    fn from(r: &m::SourceRange) -> Self {
        Self { address: address_to_wire(r.address()), len: r.prefix_len().into() }
    }
}

impl TryFrom<v1::SourceRange> for m::SourceRange {
    type Error = Malformed;

    fn try_from(r: v1::SourceRange) -> Result<Self, Malformed> {
        let range = |len| m::SourceRange::new(address_from_wire(&r.address).ok()?, len);
        u8::try_from(r.len).ok().and_then(range).ok_or_else(|| invalid("source range", &r))
    }
}

impl From<&m::EndpointSet> for v1::EndpointSet {
    fn from(s: &m::EndpointSet) -> Self {
        Self { name: Some((&s.name).into()), endpoints: s.endpoints.iter().map(Into::into).collect() }
    }
}

impl TryFrom<v1::EndpointSet> for m::EndpointSet {
    type Error = Malformed;

    fn try_from(s: v1::EndpointSet) -> Result<Self, Malformed> {
        let endpoints = s.endpoints.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?;
        Ok(Self { name: name(s.name)?, endpoints })
    }
}

impl From<&m::Endpoint> for v1::Endpoint {
    fn from(e: &m::Endpoint) -> Self {
        Self {
            address: address_to_wire(e.address),
            ready: e.ready,
            draining: e.draining,
            node: e.node.clone(),
            zone: e.zone.clone(),
            workload: e.workload.as_ref().map(Into::into),
            hostname: e.hostname.clone().unwrap_or_default(),
            identity: match &e.mesh {
                m::Mesh::Plain => String::new(),
                m::Mesh::Mtls(i) => i.to_string(),
            },
            ports: e
                .ports
                .iter()
                .map(|p| v1::EndpointPort {
                    name: p.name.clone(),
                    protocol: protocol_to_wire(p.protocol),
                    port: p.port.into(),
                })
                .collect(),
        }
    }
}

impl TryFrom<v1::Endpoint> for m::Endpoint {
    type Error = Malformed;

    fn try_from(e: v1::Endpoint) -> Result<Self, Malformed> {
        let endpoint_port = |p: v1::EndpointPort| {
            Ok(m::EndpointPort { name: p.name, protocol: protocol(p.protocol)?, port: port("endpoint port", p.port)? })
        };
        Ok(Self {
            address: address_from_wire(&e.address)?,
            ready: e.ready,
            draining: e.draining,
            node: e.node,
            zone: e.zone,
            workload: e.workload.map(Into::into),
            hostname: Some(e.hostname).filter(|h| !h.is_empty()),
            mesh: match e.identity.as_str() {
                "" => m::Mesh::Plain,
                i => m::Mesh::Mtls(identity(i)?),
            },
            ports: e.ports.into_iter().map(endpoint_port).collect::<Result<_, _>>()?,
        })
    }
}

fn identity(s: &str) -> Result<m::Identity, Malformed> {
    s.parse().map_err(|_| invalid("identity", s))
}

impl From<&m::Workload> for v1::Workload {
    fn from(w: &m::Workload) -> Self {
        Self {
            name: Some((&w.name).into()),
            uid: w.uid.clone(),
            node: w.node.clone(),
            addresses: w.addresses.iter().map(|a| address_to_wire(*a)).collect(),
            identity: w.identity.to_string(),
            meshed: w.meshed,
            gateway: w.gateway.clone().unwrap_or_default(),
        }
    }
}

impl TryFrom<v1::Workload> for m::Workload {
    type Error = Malformed;

    fn try_from(w: v1::Workload) -> Result<Self, Malformed> {
        Ok(Self {
            name: name(w.name)?,
            uid: w.uid,
            node: w.node,
            addresses: addresses_from_wire(&w.addresses)?,
            identity: identity(&w.identity)?,
            meshed: w.meshed,
            gateway: Some(w.gateway).filter(|g| !g.is_empty()),
        })
    }
}

impl From<&m::Node> for v1::Node {
    fn from(n: &m::Node) -> Self {
        Self {
            name: Some((&n.name).into()),
            addresses: n.addresses.iter().map(|a| address_to_wire(*a)).collect(),
            pod_cidrs: n.pod_cidrs.clone(),
            zone: n.zone.clone(),
            ready: n.ready,
        }
    }
}

impl TryFrom<v1::Node> for m::Node {
    type Error = Malformed;

    fn try_from(n: v1::Node) -> Result<Self, Malformed> {
        Ok(Self {
            name: name(n.name)?,
            addresses: addresses_from_wire(&n.addresses)?,
            pod_cidrs: n.pod_cidrs,
            zone: n.zone,
            ready: n.ready,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    fn pattern(text: &str) -> m::Pattern {
        text.parse().expect("a pattern")
    }

    fn operation() -> m::Operation {
        m::Operation {
            methods: vec!["GET".into()],
            paths: vec![m::PathMatch::Prefix("/a".into()), m::PathMatch::Regex(pattern("/b+"))],
            ports: vec![8080],
        }
    }

    fn backend_policy() -> m::BackendPolicy {
        m::BackendPolicy {
            balance: m::Balance::Maglev(m::HashKey::Cookie("user".into())),
            locality: Some(m::Locality { healthy_percent: 70 }),
            slow_start_ms: 1,
            outlier: Some(m::Outlier { success_percent: 90, ..m::Outlier::default() }),
            panic_percent: 50,
            circuit: m::Circuit { max_connections: 1, max_pending: 2, max_requests: 3, max_retries: 4 },
            retry_budget: Some(m::RetryBudget::default()),
            hedge_after_ms: 2,
            per_try_timeout_ms: 3,
            connect_timeout_ms: 4,
            idle_timeout_ms: 5,
            keepalive_s: 6,
            redistribute: true,
        }
    }

    fn filters(name: &m::Name) -> m::Filters {
        let changes = |at: &str| m::HeaderChanges {
            set: vec![(at.into(), "1".into())],
            add: vec![("b".into(), "2".into())],
            remove: vec!["c".into()],
        };
        m::Filters {
            request_headers: changes("a"),
            response_headers: changes("z"),
            redirect: Some(m::Redirect {
                scheme: Some("https".into()),
                host: None,
                port: Some(8443),
                path: Some(m::PathChange::Full("/x".into())),
                status: 301,
            }),
            rewrite: Some(m::Rewrite { host: Some("other".into()), path: Some(m::PathChange::Prefix("/y".into())) }),
            mirrors: vec![m::Mirror {
                service: name.clone(),
                port: 81,
                share: m::Fraction { numerator: 1, denominator: 3 },
            }],
        }
    }

    fn rule(name: &m::Name) -> m::Rule {
        let value = |name: &str, value| m::HeaderMatch { name: name.into(), value };
        m::Rule {
            matches: vec![
                m::Match {
                    hosts: vec!["*.example.org".into()],
                    path: m::PathMatch::Exact("/x".into()),
                    method: Some("GET".into()),
                    headers: vec![
                        value("x-tester", m::StringMatch::Exact("1".into())),
                        value("x-team", m::StringMatch::Regex(pattern("a|b"))),
                    ],
                    query: vec![m::QueryMatch { name: "q".into(), value: m::StringMatch::Exact("1".into()) }],
                },
                m::Match { path: m::PathMatch::Regex(pattern("/v[0-9]+")), ..m::Match::default() },
            ],
            backends: vec![m::Backend { service: name.clone(), port: 80, weight: 90, filters: filters(name) }],
            filters: filters(name),
            timeouts: m::Timeouts { request_ms: Some(1), backend_request_ms: Some(2) },
            retry: Some(m::Retry { codes: vec![503], attempts: Some(0), backoff_ms: Some(25) }),
            sticky: Some(m::Sticky::Cookie("version".into())),
            fault: m::Fault {
                delay: Some((5, m::Fraction::ALL)),
                abort: Some((503, m::Fraction { numerator: 0, denominator: 9 })),
            },
            rate_limit: Some(m::RateLimit { requests: 5, per_ms: 1000, burst: 10 }),
            max_body_bytes: Some(0),
        }
    }

    fn everything() -> Vec<m::Resource> {
        let name = m::Name::new("shop", "web");
        let id: m::Identity = "spiffe://cluster.local/ns/shop/sa/web".parse().expect("an identity");
        let address: IpAddr = "10.244.0.9".parse().expect("an address");
        vec![
            m::Resource::Service(m::Service {
                name: name.clone(),
                virtual_ips: vec![address, "fd00::1".parse().expect("an address")],
                ports: vec![m::ServicePort {
                    name: "http".into(),
                    protocol: m::Protocol::Tcp,
                    port: 80,
                    app_protocol: m::AppProtocol::Http,
                    node_port: Some(30_080),
                }],
                external_ips: vec!["192.0.2.1".parse().expect("an address")],
                affinity_s: Some(10_800),
                internal_policy: m::InternalPolicy::Local,
                distribution: m::Distribution::SameNode,
                external_policy: m::ExternalPolicy::Local,
                health_check_node_port: Some(30_081),
                announcements: vec![m::Announcement { address, node: "n1".into() }],
                external_name: Some("web.example.org".into()),
                restricted_ips: vec!["192.0.2.1".parse().expect("an address")],
                source_ranges: ["203.0.113.0/24", "2001:db8::/32"].map(|r| r.parse().expect("a range")).to_vec(),
                backend_policy: Some(backend_policy()),
            }),
            m::Resource::EndpointSet(m::EndpointSet {
                name: name.clone(),
                endpoints: vec![m::Endpoint {
                    address,
                    ready: true,
                    draining: true,
                    node: "n1".into(),
                    zone: "a".into(),
                    workload: Some(name.clone()),
                    hostname: None,
                    mesh: m::Mesh::Mtls(id.clone()),
                    ports: vec![m::EndpointPort { name: "http".into(), protocol: m::Protocol::Tcp, port: 8080 }],
                }],
            }),
            m::Resource::Route(m::Route {
                name: name.clone(),
                kind: m::RouteKind::Http,
                parent: name.clone(),
                parent_port: Some(80),
                created_s: 5,
                generation: 2,
                rules: vec![rule(&name), m::Rule::default()],
            }),
            m::Resource::Policy(m::Policy {
                name: name.clone(),
                mode: m::InboundMode::Strict,
                excluded_ports: vec![9000],
                opaque_ports: vec![3306],
                access: vec![m::AccessRule {
                    policy: m::Name::new("shop", "callers"),
                    action: m::Action::Deny,
                    audit: true,
                    from: vec![
                        m::Caller { identity: Some(id.clone()), namespace: None },
                        m::Caller { identity: None, namespace: Some("other".into()) },
                    ],
                    to: vec![operation()],
                }],
                rate_limits: vec![m::InboundLimit {
                    policy: m::Name::new("shop", "callers"),
                    from: vec![m::Caller::default()],
                    to: vec![operation()],
                    limit: m::RateLimit { requests: 5, per_ms: 1000, burst: 10 },
                    per_identity: true,
                }],
            }),
            m::Resource::Workload(m::Workload {
                name,
                uid: "u".into(),
                node: "n1".into(),
                addresses: vec![address],
                identity: id,
                meshed: true,
                gateway: Some("edge".into()),
            }),
            m::Resource::Node(m::Node {
                name: m::Name::cluster("n1"),
                addresses: vec![address],
                pod_cidrs: vec!["10.244.0.0/24".into()],
                zone: "a".into(),
                ready: true,
            }),
            m::Resource::Gateway(m::Gateway {
                name: m::Name::new("shop", "edge"),
                listeners: vec![
                    m::Listener {
                        name: "https".into(),
                        port: 443,
                        mode: m::ListenerMode::Https,
                        hostname: Some("*.example.org".into()),
                        certificates: vec![m::Certificate { chain_pem: "c".into(), key_pem: m::Secret("k".into()) }],
                        routes: vec![m::Name::new("shop", "web/grpc")],
                    },
                    m::Listener {
                        name: "tls".into(),
                        port: 8443,
                        mode: m::ListenerMode::Passthrough,
                        hostname: None,
                        certificates: vec![],
                        routes: vec![],
                    },
                ],
            }),
        ]
    }

    #[test]
    fn every_kind_survives_the_wire() {
        for r in everything() {
            let bytes = resource_to_wire(&r, m::Revision(3)).encode_to_vec();
            let back = v1::Resource::decode(&bytes[..]).expect("decodes");
            assert_eq!(back.version, 3);
            assert_eq!(resource_from_wire(back).expect("is well formed"), r);
            assert_eq!(key_from_wire(key_to_wire(&r.key())).expect("is well formed"), r.key());
        }
    }

    #[test]
    fn nonsense_is_refused_with_the_field() {
        let no_name = v1::Service::default();
        assert_eq!(m::Service::try_from(no_name), Err(Malformed::Missing("name")));
        let bad_port = v1::Backend {
            service: Some(v1::Name { namespace: "a".into(), name: "b".into() }),
            port: 70_000,
            weight: 1,
            filters: None,
        };
        assert!(matches!(m::Backend::try_from(bad_port), Err(Malformed::Invalid { field: "backend port", .. })));
        assert!(address_from_wire(&[1, 2, 3]).is_err());
        for (address, len) in [(vec![10, 0, 0, 0], 33), (vec![0; 16], 129), (vec![0; 16], 256), (vec![10], 8)] {
            let range = m::SourceRange::try_from(v1::SourceRange { address, len });
            assert!(matches!(range, Err(Malformed::Invalid { field: "source range", .. })), "{range:?}");
        }
    }
}
