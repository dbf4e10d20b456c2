//! Objects → the data plane's snapshot and the routes' statuses: PURE. Everything that agents and sidecars will do is
//! decided from what this returns; what an object asks for and Sluice does not do yet is refused here, by name.

mod announce;
mod endpoints;
mod filters;
mod gateways;
pub mod policies;
mod routes;

pub use gateways::{ClassStatus, GatewayStatus, ListenerStatus};
pub use policies::PolicyStatus;
pub use routes::{ParentKind, ParentStatus, RouteStatus, Unmeshed, Verdict};

use crate::own::{AccessPolicy, BackendPolicy, RouteFilter};
use crate::{
    api::{services::SOURCE_RANGES, validate::special},
    gateway, inject,
    pool::{self, Pool},
};
use gateway_api::{
    experimental::{grpcroutes::GrpcRoute, httproutes::HttpRoute, tcproutes::TcpRoute},
    gatewayclasses::GatewayClass,
    gateways::Gateway,
    referencegrants::ReferenceGrant,
    tlsroutes::TlsRoute,
};
use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Secret, Service, ServiceSpec},
    discovery::v1::EndpointSlice,
};
use sluice_model as m;
use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

/// `timeoutSeconds` of a service that sets none (the API's default: three hours).
const AFFINITY_S: u32 = 10_800;
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// The objects that matter to the data plane, by namespace and name.
#[derive(Clone, Default)]
pub struct Objects {
    pub services: BTreeMap<m::Name, Arc<Service>>,
    pub slices: BTreeMap<m::Name, Arc<EndpointSlice>>,
    pub pods: BTreeMap<m::Name, Arc<Pod>>,
    pub nodes: BTreeMap<m::Name, Arc<Node>>,
    pub http_routes: BTreeMap<m::Name, Arc<HttpRoute>>,
    pub grpc_routes: BTreeMap<m::Name, Arc<GrpcRoute>>,
    pub tls_routes: BTreeMap<m::Name, Arc<TlsRoute>>,
    pub tcp_routes: BTreeMap<m::Name, Arc<TcpRoute>>,
    pub grants: BTreeMap<m::Name, Arc<ReferenceGrant>>,
    pub backend_policies: BTreeMap<m::Name, Arc<BackendPolicy>>,
    pub access_policies: BTreeMap<m::Name, Arc<AccessPolicy>>,
    pub route_filters: BTreeMap<m::Name, Arc<RouteFilter>>,
    pub gateway_classes: BTreeMap<m::Name, Arc<GatewayClass>>,
    pub gateways: BTreeMap<m::Name, Arc<Gateway>>,
    /// Those of certificates.
    pub secrets: BTreeMap<m::Name, Arc<Secret>>,
    pub namespaces: BTreeMap<m::Name, Arc<Namespace>>,
}

/// What [`compile`] returns besides the resources.
pub struct Compiled {
    pub resources: Vec<m::Resource>,
    pub routes: Vec<RouteStatus>,
    pub policies: Vec<PolicyStatus>,
    pub gateways: Vec<GatewayStatus>,
    pub classes: Vec<ClassStatus>,
}

/// `trust_domain` is the cluster's, in every workload's identity; `pool` has the addresses that nodes answer for.
pub fn compile(o: &Objects, trust_domain: &str, pool: &Pool) -> Compiled {
    let mut resources = vec![];
    let mut announcers = announce::Announcers::new(o, pool);
    let (mut policies, mut policy_statuses) = policies::backend_policies(o);
    let opaque = opaque_ports(o);
    for object in o.services.values() {
        if let Some(mut s) = service(object) {
            let set = endpoints::endpoint_set(&s, o, trust_domain);
            leave_unread(&mut s, &set, &opaque);
            s.announcements = announcers.announcements(object, &s, &set);
            s.backend_policy = policies.remove(&s.name);
            resources.push(m::Resource::Service(s));
            resources.push(m::Resource::EndpointSet(set));
        }
    }
    for p in o.pods.values() {
        if let Some(w) = workload(p, trust_domain) {
            if w.meshed || w.gateway.is_some() {
                let mut policy = policy(p, &w.name);
                policies::add_access(&mut policy, p, o, trust_domain);
                resources.push(m::Resource::Policy(policy));
            }
            resources.push(m::Resource::Workload(w));
        }
    }
    resources.extend(o.nodes.values().filter_map(|n| node(n)).map(m::Resource::Node));
    let mut gateways = gateways::Gateways::new(o);
    let (routes, statuses) = routes::routes(o, &mut gateways);
    resources.extend(routes.into_iter().map(m::Resource::Route));
    policy_statuses.extend(policies::access_statuses(o, trust_domain));
    resources.extend(gateways.resources().into_iter().map(m::Resource::Gateway));
    let (gateways, classes) = (gateways.statuses(o), gateways::classes(o));
    Compiled { resources, routes: statuses, policies: policy_statuses, gateways, classes }
}

fn port(n: i32) -> Option<u16> {
    u16::try_from(n).ok().filter(|p| *p != 0)
}

fn protocol(p: Option<&str>) -> Option<m::Protocol> {
    match p.unwrap_or("TCP") {
        "TCP" => Some(m::Protocol::Tcp),
        "UDP" => Some(m::Protocol::Udp),
        _ => None,
    }
}

/// `appProtocol` as Kubernetes names it (KEP-3726), and the hint in a port's name that meshes agreed on.
fn app_protocol(app: Option<&str>, name: &str) -> m::AppProtocol {
    match app {
        Some("http" | "kubernetes.io/ws") => m::AppProtocol::Http,
        Some("kubernetes.io/h2c" | "grpc") => m::AppProtocol::Http2,
        Some("tcp" | "https" | "tls") => m::AppProtocol::Tcp,
        _ => match name.split('-').next() {
            Some("http") => m::AppProtocol::Http,
            Some("http2" | "grpc") => m::AppProtocol::Http2,
            Some("tcp" | "https" | "tls" | "mysql" | "mongo" | "redis") => m::AppProtocol::Tcp,
            _ => m::AppProtocol::Detect,
        },
    }
}

/// None for services whose addresses are not allocated yet.
fn service(s: &Service) -> Option<m::Service> {
    let spec = s.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        let external_name = spec.external_name.as_deref().map(|n| n.trim_end_matches('.').to_ascii_lowercase());
        return Some(m::Service { name: name_of(&s.metadata)?, external_name, ..m::Service::default() });
    }
    let ips: Vec<&String> = match &spec.cluster_ips {
        Some(v) if !v.is_empty() => v.iter().collect(),
        _ => spec.cluster_ip.iter().collect(),
    };
    if ips.is_empty() || ips.iter().any(|i| i.is_empty()) {
        return None;
    }
    let ports = spec.ports.iter().flatten().filter_map(|p| {
        let name = p.name.clone().unwrap_or_default();
        Some(m::ServicePort {
            protocol: protocol(p.protocol.as_deref())?,
            port: port(p.port)?,
            app_protocol: app_protocol(p.app_protocol.as_deref(), &name),
            node_port: port(p.node_port.unwrap_or(0)),
            name,
        })
    });
    let sources = sources(s);
    Some(m::Service {
        name: name_of(&s.metadata)?,
        virtual_ips: ips.into_iter().filter_map(|i| i.parse().ok()).collect(),
        external_ips: external_ips(s),
        ports: ports.collect(),
        affinity_s: affinity_s(spec),
        internal_policy: match spec.internal_traffic_policy.as_deref() {
            Some("Local") => m::InternalPolicy::Local,
            _ => m::InternalPolicy::Cluster,
        },
        distribution: match spec.traffic_distribution.as_deref() {
            Some("PreferClose" | "PreferSameZone") => m::Distribution::SameZone,
            Some("PreferSameNode") => m::Distribution::SameNode,
            _ => m::Distribution::Even,
        },
        external_policy: match spec.external_traffic_policy.as_deref() {
            Some("Local") => m::ExternalPolicy::Local,
            _ => m::ExternalPolicy::Cluster,
        },
        health_check_node_port: spec.health_check_node_port.and_then(port),
        announcements: vec![],
        external_name: None,
        restricted_ips: sources.as_ref().map(|_| balancer_ips(s)).unwrap_or_default(),
        source_ranges: sources.unwrap_or_default(),
        backend_policy: None,
    })
}

/// `externalIPs`, and the load balancer's addresses that are to be reached without a detour over it (`ipMode`, KEP-1860).
fn external_ips(s: &Service) -> Vec<IpAddr> {
    let own = s.spec.iter().flat_map(|spec| spec.external_ips.iter().flatten());
    let own = own.filter_map(|ip| ip.parse::<IpAddr>().ok()).map(|ip| ip.to_canonical());
    usable(own.chain(pool::ingress(s)))
}

/// Those of them that are its load balancer's.
fn balancer_ips(s: &Service) -> Vec<IpAddr> {
    usable(pool::ingress(s))
}

/// A status is not checked as a spec is, and loopback is nobody's to take.
fn usable(ips: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = ips.filter(|ip| special(*ip).is_none()).collect();
    all.sort();
    all.dedup();
    all
}

/// The clients that may use its load balancer; `None`: everybody. What is no range, as an API server of another kind may
/// let pass, lets nobody in.
fn sources(s: &Service) -> Option<Vec<m::SourceRange>> {
    let spec = s.spec.as_ref().filter(|spec| spec.type_.as_deref() == Some("LoadBalancer"))?;
    let annotation = || s.metadata.annotations.as_ref()?.get(SOURCE_RANGES).filter(|text| !text.trim().is_empty());
    let texts: Vec<&str> = match spec.load_balancer_source_ranges.as_deref() {
        Some(ranges) if !ranges.is_empty() => ranges.iter().map(String::as_str).collect(),
        _ => annotation()?.split(',').collect(),
    };
    let mut ranges: Vec<m::SourceRange> = texts.into_iter().filter_map(|text| text.trim().parse().ok()).collect();
    ranges.sort();
    ranges.dedup();
    Some(ranges)
}

fn affinity_s(spec: &ServiceSpec) -> Option<u32> {
    let client_ip = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let timeout = client_ip.and_then(|c| c.timeout_seconds).and_then(|s| u32::try_from(s).ok());
    (spec.session_affinity.as_deref() == Some("ClientIP")).then_some(timeout.unwrap_or(AFFINITY_S))
}

pub(crate) fn name_of(meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> Option<m::Name> {
    Some(m::Name::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone()?))
}

/// Who a pod is.
pub fn identity(p: &Pod, trust_domain: &str) -> m::Identity {
    let account = p.spec.as_ref().and_then(|s| s.service_account_name.clone()).filter(|a| !a.is_empty());
    m::Identity {
        trust_domain: trust_domain.to_owned(),
        namespace: p.metadata.namespace.clone().unwrap_or_else(|| "default".to_owned()),
        service_account: account.unwrap_or_else(|| "default".to_owned()),
    }
}

/// Pods that are bound and have not ended.
fn workload(p: &Pod, trust_domain: &str) -> Option<m::Workload> {
    let spec = p.spec.as_ref()?;
    let node = spec.node_name.clone().filter(|n| !n.is_empty())?;
    let status = p.status.clone().unwrap_or_default();
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let addresses: Vec<IpAddr> = if spec.host_network == Some(true) {
        vec![]
    } else {
        status.pod_ips.iter().flatten().filter_map(|i| i.ip.parse().ok()).collect()
    };
    Some(m::Workload {
        name: name_of(&p.metadata)?,
        uid: p.metadata.uid.clone().unwrap_or_default(),
        node,
        addresses,
        identity: identity(p, trust_domain),
        meshed: inject::injected(p),
        gateway: serves_gateway(p),
    })
}

/// The gateway that a pod serves. A pod with a sidecar serves none: its own traffic would go by both.
fn serves_gateway(p: &Pod) -> Option<String> {
    let named = p.metadata.annotations.as_ref()?.get(gateway::ANNOTATION)?;
    (!named.is_empty() && !inject::injected(p)).then(|| named.clone())
}

fn annotation<'a>(p: &'a Pod, key: &str) -> Option<&'a str> {
    p.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

fn annotated_ports(p: &Pod, key: &str) -> Vec<u16> {
    let all = annotation(p, key).into_iter().flat_map(|v| v.split(',')).take(inject::MAX_PORTS);
    all.filter_map(|s| s.trim().parse().ok()).collect()
}

/// Of the pods that have any: few, where endpoints are many.
fn opaque_ports(o: &Objects) -> BTreeMap<&m::Name, Vec<u16>> {
    let all = o.pods.iter().map(|(name, p)| (name, annotated_ports(p, inject::ANNOTATION_OPAQUE_PORTS)));
    all.filter(|(_, ports)| !ports.is_empty()).collect()
}

/// What a pod of the service says is opaque, its callers' sidecars must not read as HTTP either, where the service's port leaves
/// that to the first bytes.
fn leave_unread(service: &mut m::Service, set: &m::EndpointSet, opaque: &BTreeMap<&m::Name, Vec<u16>>) {
    if opaque.is_empty() {
        return;
    }
    for endpoint in &set.endpoints {
        let Some(ports) = endpoint.workload.as_ref().and_then(|name| opaque.get(name)) else { continue };
        for to in endpoint.ports.iter().filter(|p| p.protocol == m::Protocol::Tcp && ports.contains(&p.port)) {
            let of = |p: &&mut m::ServicePort| p.protocol == m::Protocol::Tcp && p.name == to.name;
            for port in service.ports.iter_mut().filter(of).filter(|p| p.app_protocol == m::AppProtocol::Detect) {
                port.app_protocol = m::AppProtocol::Tcp;
            }
        }
    }
}

fn policy(p: &Pod, name: &m::Name) -> m::Policy {
    m::Policy {
        name: name.clone(),
        mode: match annotation(p, inject::ANNOTATION_MTLS) {
            Some("strict") => m::InboundMode::Strict,
            _ => m::InboundMode::Permissive,
        },
        excluded_ports: annotated_ports(p, inject::ANNOTATION_EXCLUDED_PORTS),
        opaque_ports: annotated_ports(p, inject::ANNOTATION_OPAQUE_PORTS),
        ..m::Policy::default()
    }
}

fn node(n: &Node) -> Option<m::Node> {
    let status = n.status.clone().unwrap_or_default();
    let spec = n.spec.clone().unwrap_or_default();
    let addresses = status.addresses.iter().flatten().filter(|a| a.type_ == "InternalIP");
    Some(m::Node {
        name: m::Name::cluster(n.metadata.name.clone()?),
        addresses: addresses.filter_map(|a| a.address.parse().ok()).collect(),
        pod_cidrs: spec.pod_cidrs.filter(|v| !v.is_empty()).unwrap_or_else(|| spec.pod_cidr.into_iter().collect()),
        zone: zone(n),
        ready: ready(n),
    })
}

fn ready(n: &Node) -> bool {
    let conditions = n.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

fn zone(n: &Node) -> String {
    n.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE_LABEL)).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod gateway_tests;
