//! The tables that workers read: compiled from what is held, immutable, swapped whole. PURE.
//!
//! Indices instead of names inside: a request costs one table walk and no lookup by name.

use crate::{
    gateway::{self, Port},
    held::Held,
    tls::Tls,
};
use sluice_model::{
    AppProtocol, BackendPolicy, Gateway, Identity, InboundMode, Name, Policy, Protocol, Revision, Snapshot,
};
use sluice_traffic::{resolve::Resolved, route::Table};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
};

/// Everything a worker needs.
#[derive(Debug, Default)]
pub struct Config {
    /// Counts the configs of this process; workers report it when the config is in force.
    pub generation: u64,
    pub epoch: String,
    pub revision: Revision,
    pub destinations: HashMap<SocketAddr, Destination>,
    /// Service ports that were dialled.
    pub targets: Vec<Target>,
    /// Service ports that targets send to.
    pub clusters: Vec<Cluster>,
    pub inbound: Inbound,
    /// What a gateway listens for, by port.
    pub listeners: BTreeMap<u16, Port>,
    pub tls: Option<Arc<Tls>>,
}

/// What a dialled address means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Index into [`Config::targets`].
    Service(usize),
    /// A meshed pod that takes mTLS as this identity.
    Pod(Arc<Identity>),
    /// Not of this cluster, or without a sidecar: bytes pass as they are.
    Outside,
}

/// One port of a service that the app dials, or a gateway's listener.
#[derive(Debug)]
pub struct Target {
    /// Of a listener: the name that its routes have as their parent, which no service has.
    pub service: Name,
    pub port: u16,
    /// The name of the listener: nothing but routes takes its traffic.
    pub listener: Option<String>,
    pub app_protocol: AppProtocol,
    pub table: Table,
    /// Of each of the table's rules, the clusters it sends to.
    pub rules: Vec<RuleClusters>,
    /// The cluster that takes traffic no route touches.
    pub own: usize,
}

/// Indices into [`Config::clusters`], in the rule's order.
#[derive(Debug)]
pub struct RuleClusters {
    pub backends: Vec<usize>,
    pub mirrors: Vec<usize>,
}

/// A port of a service as backend: where its ready endpoints are.
#[derive(Debug)]
pub struct Cluster {
    pub service: Name,
    pub port: u16,
    /// The service and port exist.
    pub known: bool,
    /// The port is said to speak HTTP/2.
    pub http2: bool,
    pub endpoints: Vec<Endpoint>,
    /// Of each endpoint, whether it is in this workload's zone.
    pub near: Vec<bool>,
    pub policy: Option<Arc<BackendPolicy>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// Must be proven by mTLS; absent: plain.
    pub identity: Option<Arc<Identity>>,
}

/// What the inbound side accepts.
#[derive(Debug, Default)]
pub struct Inbound {
    pub strict: bool,
    pub opaque_ports: HashSet<u16>,
    /// Who may call what, and how often.
    pub policy: Policy,
}

/// Compiles `held` for the workload called `workload`.
pub fn compile(held: &Held, workload: &Name, tls: Option<Arc<Tls>>, generation: u64) -> Config {
    let node = held.snapshot.workload(workload).map_or("", |w| &w.node);
    let zone = held.snapshot.place(node).zone;
    let config = Config::default();
    let namespace = &workload.namespace;
    let mut compiler = Compiler { snapshot: &held.snapshot, namespace, zone, config, clusters: HashMap::new() };
    for (address, resolved) in &held.resolutions {
        let destination = compiler.destination(*address, resolved);
        compiler.config.destinations.insert(*address, destination);
    }
    if let Some(gateway) = served(&held.snapshot, workload) {
        compiler.listen(gateway);
    }
    let inbound = inbound(&held.snapshot, workload);
    Config { generation, epoch: held.epoch.clone(), revision: held.snapshot.revision, inbound, tls, ..compiler.config }
}

/// The gateway that the workload serves.
pub fn served<'s>(snapshot: &'s Snapshot, workload: &Name) -> Option<&'s Gateway> {
    snapshot.gateway(&snapshot.workload(workload)?.served()?)
}

fn inbound(snapshot: &Snapshot, workload: &Name) -> Inbound {
    snapshot.policy(workload).map_or_else(Inbound::default, |p| Inbound {
        strict: p.mode == InboundMode::Strict,
        opaque_ports: p.opaque_ports.iter().copied().collect(),
        policy: p.clone(),
    })
}

struct Compiler<'a> {
    snapshot: &'a Snapshot,
    /// This workload's.
    namespace: &'a str,
    /// This workload's; empty: unknown.
    zone: &'a str,
    config: Config,
    clusters: HashMap<(Name, u16), usize>,
}

impl Compiler<'_> {
    fn destination(&mut self, address: SocketAddr, resolved: &Resolved) -> Destination {
        if let Some(service) = &resolved.service {
            return self.target(service, address.port()).map_or(Destination::Outside, Destination::Service);
        }
        resolved.identity.clone().map_or(Destination::Outside, |i| Destination::Pod(Arc::new(i)))
    }

    /// The index of the target, made when the first of its addresses is met; `None` when the service or its port are
    /// gone meanwhile.
    fn target(&mut self, service: &Name, port: u16) -> Option<usize> {
        if let Some(known) = self.config.targets.iter().position(|t| t.service == *service && t.port == port) {
            return Some(known);
        }
        let ports = &self.snapshot.service(service)?.ports;
        let app_protocol = ports.iter().find(|p| p.protocol == Protocol::Tcp && p.port == port)?.app_protocol;
        let routes = self.snapshot.routes_from(self.namespace, service, port);
        let table = Table::compile(routes, service, port);
        Some(self.add((service, port, None), app_protocol, table))
    }

    fn add(
        &mut self,
        (service, port, listener): (&Name, u16, Option<String>),
        app_protocol: AppProtocol,
        table: Table,
    ) -> usize {
        let rules = table.rules().iter().map(|r| RuleClusters {
            backends: r.rule.backends.iter().map(|b| self.cluster(&b.service, b.port)).collect(),
            mirrors: r.rule.filters.mirrors.iter().map(|m| self.cluster(&m.service, m.port)).collect(),
        });
        let rules = rules.collect();
        let own = self.cluster(service, port);
        self.config.targets.push(Target { service: service.clone(), port, listener, app_protocol, table, rules, own });
        self.config.targets.len() - 1
    }

    /// The tables of a gateway's listeners.
    fn listen(&mut self, gateway: &Gateway) {
        let (parent, snapshot) = (Gateway::parent(&gateway.name), self.snapshot);
        let listeners = gateway::listeners(gateway, snapshot, |listener, routes| {
            let table = Table::compile(&routes, &parent, listener.port);
            let at = (&parent, listener.port, Some(listener.name.clone()));
            self.add(at, AppProtocol::Detect, table)
        });
        self.config.listeners = listeners;
    }

    fn cluster(&mut self, service: &Name, port: u16) -> usize {
        if let Some(known) = self.clusters.get(&(service.clone(), port)) {
            return *known;
        }
        let cluster = compile_cluster(self.snapshot, self.zone, service, port);
        self.config.clusters.push(cluster);
        let index = self.config.clusters.len() - 1;
        self.clusters.insert((service.clone(), port), index);
        index
    }
}

fn compile_cluster(snapshot: &Snapshot, zone: &str, name: &Name, port: u16) -> Cluster {
    let service = snapshot.service(name);
    let ports = service.map(|s| s.ports.as_slice()).unwrap_or_default();
    let found = ports.iter().find(|p| p.protocol == Protocol::Tcp && p.port == port);
    let near = |e: &sluice_model::Endpoint| !zone.is_empty() && e.zone == zone;
    let (endpoints, near) = match (found, snapshot.endpoint_set(name)) {
        (Some(p), Some(set)) => {
            set.ready_on(&p.name, Protocol::Tcp).map(|(e, port)| (endpoint(e, port), near(e))).unzip()
        }
        _ => Default::default(),
    };
    let policy = service.and_then(|s| s.backend_policy.clone()).map(Arc::new);
    let http2 = found.is_some_and(|p| p.app_protocol == AppProtocol::Http2);
    Cluster { service: name.clone(), port, known: found.is_some(), http2, endpoints, near, policy }
}

fn endpoint(e: &sluice_model::Endpoint, port: u16) -> Endpoint {
    let identity = match &e.mesh {
        sluice_model::Mesh::Plain => None,
        sluice_model::Mesh::Mtls(identity) => Some(Arc::new(identity.clone())),
    };
    Endpoint { address: SocketAddr::new(e.address, port), identity }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::*;

    fn snapshot() -> Snapshot {
        let service = |name: &str, ip: &str| {
            Resource::Service(Service {
                name: Name::new("shop", name),
                virtual_ips: vec![ip.parse().expect("address")],
                ports: vec![ServicePort {
                    name: "http".into(),
                    protocol: Protocol::Tcp,
                    port: 80,
                    app_protocol: AppProtocol::Http,
                    node_port: None,
                }],
                ..Service::default()
            })
        };
        let set = |name: &str, ip: &str, ready| {
            Resource::EndpointSet(EndpointSet {
                name: Name::new("shop", name),
                endpoints: vec![sluice_model::Endpoint {
                    address: ip.parse().expect("address"),
                    ready,
                    node: String::new(),
                    zone: String::new(),
                    draining: false,
                    workload: None,
                    hostname: None,
                    mesh: Mesh::Plain,
                    ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
                }],
            })
        };
        let backend =
            |name: &str, weight| Backend { service: Name::new("shop", name), port: 80, weight, ..Backend::default() };
        let route = Route {
            name: Name::new("shop", "split"),
            kind: RouteKind::Http,
            parent: Name::new("shop", "web"),
            parent_port: None,
            created_s: 0,
            generation: 1,
            rules: vec![Rule {
                backends: vec![backend("web", 90), backend("canary", 10), backend("gone", 0)],
                ..Rule::default()
            }],
        };
        Snapshot::new(
            Revision(3),
            [
                service("web", "10.96.0.1"),
                service("canary", "10.96.0.2"),
                set("web", "10.244.1.1", true),
                set("canary", "10.244.1.2", false),
                Resource::Route(route),
            ],
        )
    }

    #[test]
    fn a_dialled_service_brings_its_backends() {
        let snapshot = snapshot();
        let resolve = |a: &str| {
            let a: SocketAddr = a.parse().expect("address");
            (a, sluice_traffic::resolve::resolve(&snapshot, a))
        };
        let resolutions = [resolve("10.96.0.1:80"), resolve("10.96.0.9:80")].into_iter().collect();
        let held = Held { epoch: "e".into(), snapshot: snapshot.clone(), resolutions };
        let config = compile(&held, &Name::new("shop", "client"), None, 7);
        let at = |a: &str| &config.destinations[&a.parse::<SocketAddr>().expect("address")];
        assert_eq!(*at("10.96.0.9:80"), Destination::Outside);
        let Destination::Service(target) = at("10.96.0.1:80") else { panic!("no service") };
        let target = &config.targets[*target];
        let clusters: Vec<_> = target.rules[0].backends.iter().map(|c| &config.clusters[*c]).collect();
        assert_eq!(clusters[0].endpoints[0].address, "10.244.1.1:8080".parse().expect("address"));
        assert!(clusters[1].known && clusters[1].endpoints.is_empty(), "not ready takes no traffic");
        assert!(!clusters[2].known);
        assert_eq!(config.clusters[target.own].service, Name::new("shop", "web"));
    }
}
