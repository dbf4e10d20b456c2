//! PURE: a snapshot and the name of this node become the wanted map entries.
//!
//! Callers that are not captured follow, per connection, the catch-all rule of the oldest route attached to the
//! service port; without one, the service's own ready endpoints. Matches on requests are the sidecars' business and
//! do not exist here.

use crate::{
    addr,
    layout::{Sources, Target, Wanted, WantedGroup},
};
use sluice_ebpf_common::{INSIDE, MAX_GROUPS, OUTSIDE, Range, ServiceKey, TCP, UDP, bound};
use sluice_model::{
    ExternalPolicy, Kind, Name, Place, Policy, Protocol, Route, Rule, Service, ServicePort, Snapshot, SourceRange,
    Workload,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

/// A cluster DNS address and the node's own resolver of the same family, which answers for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DnsOverlay {
    pub vip: IpAddr,
    pub server: SocketAddr,
}

/// What the snapshot asks of a pod of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WantedPod {
    pub meshed: bool,
    pub excluded_ports: BTreeSet<u16>,
}

/// All wanted entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// Shared with who wrote them: what stays the same is neither copied nor compared.
    pub services: BTreeMap<ServiceKey, Arc<Wanted>>,
    /// By pod UID.
    pub pods: BTreeMap<String, WantedPod>,
    /// What could not be honoured, for the log and the status.
    pub problems: Vec<Problem>,
    /// Whose entry each is.
    owners: BTreeMap<ServiceKey, Name>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("service {loser} port {port}: address {vip} is already service {winner}'s; its entry is left out")]
    AddressTaken { winner: Name, loser: Name, vip: IpAddr, port: u16 },
    #[error("route {route}: only the first {MAX_GROUPS} of {backends} backends take connections of unmeshed callers")]
    TooManyBackends { route: Name, backends: usize },
    #[error(
        "service {service} port {port}: the {ranges} source ranges of {vip} do not fit beside those of other services \
         ({SOURCES} on a node, each twice per address and port), so that nobody may use it; name fewer and wider ranges"
    )]
    TooManySources { service: Name, vip: IpAddr, port: u16, ranges: usize },
}

/// Ranges of clients that are wanted at a time: the map has room for the old and the new state.
const SOURCES: usize = bound::SOURCES / 2;

/// Compiles one snapshot after the other for one node. Where only endpoints changed, only what leads to them is decided
/// anew; the outcome is that of [`compile`].
pub struct Compiler {
    node: String,
    dns: Vec<DnsOverlay>,
    last: Option<(Arc<Snapshot>, Compiled)>,
}

impl Compiler {
    pub fn new(node: String, dns: impl IntoIterator<Item = DnsOverlay>) -> Self {
        Self { node, dns: dns.into_iter().collect(), last: None }
    }

    /// The last one; `None` before the first.
    pub fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.last.as_ref().map(|(snapshot, _)| snapshot.clone())
    }

    /// Of the last snapshot; `None` before the first.
    pub fn compiled(&self) -> Option<&Compiled> {
        self.last.as_ref().map(|(_, compiled)| compiled)
    }

    pub fn compile(&mut self, snapshot: Arc<Snapshot>) -> &Compiled {
        let next = match self.last.take() {
            Some((before, mut compiled)) => match moved(&before, &snapshot) {
                Some(sets) => {
                    compiled.lead_anew(&snapshot, &self.node, &sets);
                    compiled
                }
                None => compile(&snapshot, &self.node, self.dns.iter().copied()),
            },
            None => compile(&snapshot, &self.node, self.dns.iter().copied()),
        };
        &self.last.insert((snapshot, next)).1
    }
}

/// The endpoint sets that differ, if nothing else does.
fn moved(before: &Snapshot, after: &Snapshot) -> Option<BTreeSet<Name>> {
    let delta = before.diff(after);
    let keys = delta.changed.iter().map(|r| r.key()).chain(delta.removed);
    keys.map(|key| (key.kind == Kind::EndpointSet).then_some(key.name)).collect()
}

pub fn compile(snapshot: &Snapshot, node: &str, dns: impl IntoIterator<Item = DnsOverlay>) -> Compiled {
    let mut out = Compiled::default();
    let routes = routes_by_parent(snapshot);
    let place = snapshot.place(node);
    let addresses = snapshot.node(&Name::cluster(node)).map_or(&[][..], |n| &n.addresses);
    let mut room = Room(SOURCES);
    // No service takes another's own address by naming it as an external one.
    for reach in [Reach::Own, Reach::External, Reach::Node] {
        for service in snapshot.services() {
            let attached = routes.get(&service.name).map_or(&[][..], Vec::as_slice);
            for (port, vip, number) in reach.dials(service) {
                let key = key(vip, number, port.protocol);
                if let Some(winner) = out.owners.get(&key) {
                    let (winner, loser) = (winner.clone(), service.name.clone());
                    out.problems.push(Problem::AddressTaken { winner, loser, vip, port: number });
                    continue;
                }
                out.owners.insert(key, service.name.clone());
                let sources = reach.sources(service, vip, addresses).map(|wanted| room.grant(wanted));
                let sources = sources.map(|granted| {
                    Arc::new(granted.unwrap_or_else(|ranges| {
                        let service = service.name.clone();
                        out.problems.push(Problem::TooManySources { service, vip, port: number, ranges });
                        Sources::default()
                    }))
                });
                let view = View {
                    snapshot,
                    place,
                    v4: vip.is_ipv4(),
                    reach,
                    callers: Callers::Inside,
                    sources: sources.as_ref(),
                };
                view.write(key, attached, service, port, &mut out.services, &mut out.problems);
            }
        }
    }
    for (key, wanted) in dns.into_iter().flat_map(overlay) {
        out.owners.remove(&key);
        out.services.insert(key, Arc::new(wanted));
    }
    out.pods =
        snapshot.workloads().filter(|w| w.node == node).map(|w| (w.uid.clone(), wanted_pod(snapshot, w))).collect();
    out
}

impl Compiled {
    /// The service whose entry it is.
    pub fn owner(&self, key: &ServiceKey) -> Option<&Name> {
        self.owners.get(&ServiceKey { scope: INSIDE, ..*key })
    }

    /// After nothing but `sets` changed: services and routes, and so owners and problems, are what they were.
    fn lead_anew(&mut self, snapshot: &Snapshot, node: &str, sets: &BTreeSet<Name>) {
        let routes = routes_by_parent(snapshot);
        let place = snapshot.place(node);
        let leads = |r: &&Route| r.rules.iter().flat_map(|rule| &rule.backends).any(|b| sets.contains(&b.service));
        let parents = snapshot.routes().filter(leads).map(|r| &r.parent);
        let affected: BTreeSet<&Name> = sets.iter().chain(parents).collect();
        for service in affected.into_iter().filter_map(|name| snapshot.service(name)) {
            let attached = routes.get(&service.name).map_or(&[][..], Vec::as_slice);
            for reach in [Reach::Own, Reach::External, Reach::Node] {
                for (port, vip, number) in reach.dials(service) {
                    let key = key(vip, number, port.protocol);
                    if self.owners.get(&key) == Some(&service.name) {
                        let sources = self.services.get(&key).and_then(|wanted| wanted.sources.clone());
                        let view = View {
                            snapshot,
                            place,
                            v4: vip.is_ipv4(),
                            reach,
                            callers: Callers::Inside,
                            sources: sources.as_ref(),
                        };
                        view.write(key, attached, service, port, &mut self.services, &mut vec![]);
                    }
                }
            }
        }
    }
}

/// By what a service is dialled.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Own,
    External,
    /// A port of the node's own addresses.
    Node,
}

impl Reach {
    /// Ports of the service with each address and number that it has there.
    fn dials(self, service: &Service) -> impl Iterator<Item = (&ServicePort, IpAddr, u16)> {
        let addresses: Vec<IpAddr> = match self {
            Self::Own => service.virtual_ips.clone(),
            // What is its own is written as such.
            Self::External => {
                service.external_ips.iter().copied().filter(|ip| !service.virtual_ips.contains(ip)).collect()
            }
            Self::Node => {
                let any = |v4| if v4 { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
                let families: BTreeSet<bool> = service.virtual_ips.iter().map(IpAddr::is_ipv4).collect();
                families.into_iter().map(any).collect()
            }
        };
        let number = move |p: &ServicePort| if self == Self::Node { p.node_port } else { Some(p.port) };
        let ports = service.ports.iter().filter_map(move |p| Some((p, number(p)?)));
        ports.flat_map(move |(p, number)| addresses.clone().into_iter().map(move |a| (p, a, number)))
    }

    /// Who may use the service by an address of its; `None`: everybody. `node`: the node's own addresses.
    fn sources(self, service: &Service, vip: IpAddr, node: &[IpAddr]) -> Option<Sources> {
        if self != Self::External || !service.restricted_ips.contains(&vip) {
            return None;
        }
        let of_family = service.source_ranges.iter().filter(|range| range.address().is_ipv4() == vip.is_ipv4());
        let all: BTreeSet<SourceRange> = of_family.copied().collect();
        if all.iter().any(|range| range.is_all()) {
            return None;
        }
        let node = node.iter().any(|ip| all.iter().any(|range| range.contains(*ip)));
        let mapped = if vip.is_ipv4() { 96 } else { 0 };
        let range = |r: &SourceRange| Range { len: mapped + u32::from(r.prefix_len()), addr: addr(r.address()) };
        let mut ranges: Vec<Range> = all.iter().map(range).collect();
        ranges.sort_unstable();
        Some(Sources { ranges, node })
    }
}

/// How many ranges of clients may still be wanted.
struct Room(usize);

impl Room {
    /// What one of a service's addresses may have for one of its ports; else how many ranges do not fit.
    fn grant(&mut self, sources: Sources) -> Result<Sources, usize> {
        // Callers from outside may have an entry of their own.
        let entries = 2 * sources.ranges.len();
        self.0 = self.0.checked_sub(entries).ok_or(sources.ranges.len())?;
        Ok(sources)
    }
}

fn key(vip: IpAddr, port: u16, protocol: Protocol) -> ServiceKey {
    let proto = match protocol {
        Protocol::Tcp => TCP,
        Protocol::Udp => UDP,
    };
    ServiceKey { addr: addr(vip), port_be: port.to_be(), proto, scope: INSIDE }
}

fn overlay(dns: DnsOverlay) -> impl Iterator<Item = (ServiceKey, Wanted)> {
    let target = Target { addr: addr(dns.server.ip()), port_be: dns.server.port().to_be() };
    let wanted = Wanted::new(true, vec![WantedGroup { weight: 1, targets: vec![target] }]);
    let vip = dns.vip;
    [Protocol::Tcp, Protocol::Udp].into_iter().map(move |p| (key(vip, 53, p), wanted.clone()))
}

fn wanted_pod(snapshot: &Snapshot, workload: &Workload) -> WantedPod {
    let excluded = |p: &Policy| p.excluded_ports.iter().copied().collect();
    let excluded_ports = snapshot.policy(&workload.name).map(excluded).unwrap_or_default();
    WantedPod { meshed: workload.meshed, excluded_ports }
}

/// Routes of each service, oldest first; of two of one second the first by name (Gateway API precedence).
fn routes_by_parent(snapshot: &Snapshot) -> BTreeMap<&Name, Vec<&Route>> {
    let mut by_parent = BTreeMap::<&Name, Vec<&Route>>::new();
    // Callers are not told apart here by their namespace.
    for route in snapshot.routes().filter(|r| !r.of_consumer()) {
        by_parent.entry(&route.parent).or_default().push(route);
    }
    for routes in by_parent.values_mut() {
        routes.sort_by_key(|r| (r.created_s, &r.name));
    }
    by_parent
}

/// The snapshot as one family of a place sees it.
#[derive(Clone, Copy)]
struct View<'a> {
    snapshot: &'a Snapshot,
    place: Place<'a>,
    v4: bool,
    reach: Reach,
    callers: Callers,
    /// Who may use the service that is looked at.
    sources: Option<&'a Arc<Sources>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Callers {
    Inside,
    /// With the policy of the service that they dial, which also holds for the backends of its routes.
    Outside(ExternalPolicy),
}

impl View<'_> {
    /// The service's entry, and that for callers from outside where these may reach other endpoints.
    fn write(
        self,
        key: ServiceKey,
        routes: &[&Route],
        service: &Service,
        port: &ServicePort,
        entries: &mut BTreeMap<ServiceKey, Arc<Wanted>>,
        problems: &mut Vec<Problem>,
    ) {
        let wanted = self.wanted(routes, service, port, problems);
        let outside_key = ServiceKey { scope: OUTSIDE, ..key };
        if self.reach == Reach::Own {
            entries.insert(key, Arc::new(wanted));
            return;
        }
        let restricted = |wanted: Wanted| Wanted { sources: self.sources.cloned(), ..wanted.by_maglev() };
        let wanted = restricted(wanted);
        let view = View { callers: Callers::Outside(service.external_policy), ..self };
        let for_outside = restricted(view.wanted(routes, service, port, &mut vec![]));
        let outside = service.external_policy == ExternalPolicy::Local || for_outside != wanted;
        entries.insert(key, Arc::new(Wanted { outside, ..wanted }));
        match outside {
            true => entries.insert(outside_key, Arc::new(for_outside)),
            false => entries.remove(&outside_key), // endpoints that have changed may have made it needless
        };
    }

    fn wanted(self, routes: &[&Route], service: &Service, port: &ServicePort, problems: &mut Vec<Problem>) -> Wanted {
        let Some((route, rule)) = catch_all(routes, port) else {
            let group = WantedGroup { weight: 1, targets: self.ready_targets(service, port) };
            return Wanted::new(false, vec![group]).affine(service.affinity_s);
        };
        let takers = rule.backends.iter().filter(|b| b.weight > 0);
        let mut groups: Vec<WantedGroup> = takers
            .map(|b| WantedGroup { weight: b.weight, targets: self.backend_targets(&b.service, b.port) })
            .collect();
        if groups.len() > MAX_GROUPS {
            problems.push(Problem::TooManyBackends { route: route.name.clone(), backends: groups.len() });
            groups.truncate(MAX_GROUPS);
        }
        Wanted::new(false, groups).affine(service.affinity_s)
    }

    fn backend_targets(self, service: &Name, port: u16) -> Vec<Target> {
        let port_of = |s: &Service| s.ports.iter().find(|p| p.port == port && p.protocol == Protocol::Tcp).cloned();
        let Some(service) = self.snapshot.service(service) else { return vec![] };
        port_of(service).map_or(vec![], |port| self.ready_targets(service, &port))
    }

    fn ready_targets(self, service: &Service, port: &ServicePort) -> Vec<Target> {
        let Some(set) = self.snapshot.endpoint_set(&service.name) else { return vec![] };
        // First family and port: what is near and has them not is of no use.
        let set = set.of_family(self.v4);
        let set = set.with_port(&port.name, port.protocol);
        let seen = match self.callers {
            Callers::Outside(external_policy) => {
                let service = Service { external_policy, distribution: service.distribution, ..Service::default() };
                set.seen_from_outside(&service, self.place)
            }
            Callers::Inside => set.seen_from(service, self.place),
        };
        seen.ready_on(&port.name, port.protocol)
            .map(|(e, number)| Target { addr: addr(e.address), port_be: number.to_be() })
            .collect()
    }
}

/// Routes divide TCP only: HTTP and TCP routes are the kinds there are.
fn catch_all<'a>(routes: &[&'a Route], port: &ServicePort) -> Option<(&'a Route, &'a Rule)> {
    if port.protocol != Protocol::Tcp {
        return None;
    }
    let attached = routes.iter().filter(|r| r.parent_port.is_none_or(|p| p == port.port));
    attached.copied().find_map(|r| Some((r, r.rules.iter().find(|rule| rule.catch_all())?)))
}

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "compile_reference_tests.rs"]
mod reference_tests;
