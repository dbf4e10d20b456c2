//! Random snapshots: the map contents, for callers inside and outside, against a reference that takes each call by itself
//! and each field at Kubernetes' word (docs/services.md). Announced addresses and host ports are not compiled here.

use super::*;
use crate::layout::lay_out;
use proptest::{prelude::*, sample::subsequence};
use sluice_ebpf_common::{MAGLEV_NOBODY, MAGLEV_SHIFT, SERVICE_OUTSIDE};
use sluice_model::{
    AppProtocol, Backend, Distribution, Endpoint, EndpointPort, EndpointSet, InternalPolicy, Match, Mesh, Node,
    Resource, Revision, RouteKind,
};

const NODE: &str = "n1";
const NAMES: [&str; 3] = ["a", "b", "c"];

#[derive(Clone, Copy, Debug)]
struct Call {
    outside: bool,
    addr: IpAddr,
    protocol: Protocol,
    port: u16,
}

/// With which probability a call goes where; `None`: it is refused.
type Shares = BTreeMap<Option<SocketAddr>, f64>;

#[derive(Debug, PartialEq)]
struct Led {
    shares: Shares,
    affinity_s: u32,
    /// Which it is follows from addresses and ports alone.
    maglev: bool,
}

/// The reference.
fn reference(s: &Snapshot, call: Call) -> Option<Led> {
    let v4 = call.addr.is_ipv4();
    let own = |s: &Service| s.virtual_ips.contains(&call.addr);
    let external = |s: &Service| s.external_ips.contains(&call.addr);
    let family = |s: &Service| s.virtual_ips.iter().any(|ip| ip.is_ipv4() == v4);
    let port = |s: &Service, number: fn(&ServicePort) -> Option<u16>| {
        s.ports.iter().find(|p| p.protocol == call.protocol && number(p) == Some(call.port)).cloned()
    };
    let dialled = |of: &dyn Fn(&Service) -> bool, number: fn(&ServicePort) -> Option<u16>| {
        s.services().filter(|s| of(s)).find_map(|s| Some((s, port(s, number)?)))
    };
    // Its own addresses first, then those that others name too, each the first by name.
    let by_packet = !s.services().any(|s| own(s) && port(s, |p| Some(p.port)).is_some());
    let (service, port) = match call.addr.is_unspecified() {
        true => dialled(&family, |p| p.node_port)?,
        false => dialled(&own, |p| Some(p.port)).or_else(|| dialled(&external, |p| Some(p.port)))?,
    };
    // Weight and endpoints.
    let mut parts: Vec<(u32, Vec<SocketAddr>)> = vec![(1, usable(s, service, service, &port, call))];
    if let Some(rule) = rule(s, service, &port) {
        let part = |b: &Backend| {
            let to = s.service(&b.service);
            let port = to.and_then(|to| to.ports.iter().find(|p| p.port == b.port && p.protocol == Protocol::Tcp));
            let usable = to.zip(port).map(|(to, port)| usable(s, service, to, port, call));
            (b.weight, usable.unwrap_or_default())
        };
        parts = rule.backends.iter().map(part).collect();
    }
    let total: u32 = parts.iter().map(|(weight, _)| weight).sum();
    let mut shares = Shares::new();
    for (weight, targets) in parts.iter().filter(|(weight, _)| *weight > 0) {
        let share = f64::from(*weight) / f64::from(total);
        for target in targets {
            *shares.entry(Some(*target)).or_default() += share / targets.len() as f64;
        }
        if targets.is_empty() {
            *shares.entry(None).or_default() += share;
        }
    }
    if shares.keys().all(Option::is_none) {
        shares = Shares::from([(None, 1.0)]);
    }
    let maglev = by_packet && shares.keys().any(Option::is_some);
    Some(Led { shares, affinity_s: service.affinity_s.unwrap_or(0), maglev })
}

/// The oldest route that divides this port's connections decides.
fn rule<'a>(s: &'a Snapshot, service: &Service, port: &ServicePort) -> Option<&'a Rule> {
    let mut best: Option<(i64, &Name, &Rule)> = None;
    for r in s.routes().filter(|r| r.parent == service.name && r.parent_port.is_none_or(|p| p == port.port)) {
        let Some(rule) = r.rules.iter().find(|r| r.matches.is_empty()) else { continue };
        if best.is_none_or(|(created, name, _)| (r.created_s, &r.name) < (created, name)) {
            best = Some((r.created_s, &r.name, rule));
        }
    }
    best.filter(|_| port.protocol == Protocol::Tcp).map(|(_, _, rule)| rule)
}

/// Endpoints of `to` that a call of `dialled` may be given.
fn usable(s: &Snapshot, dialled: &Service, to: &Service, port: &ServicePort, call: Call) -> Vec<SocketAddr> {
    let zone = s.node(&Name::cluster(NODE)).map_or("", |n| n.zone.as_str());
    // What has no such port, or is of another family, is no endpoint of this port.
    let mut all: Vec<(&Endpoint, SocketAddr)> = Vec::new();
    for e in s.endpoint_set(&to.name).map_or(&[][..], |set| &set.endpoints) {
        let named = e.ports.iter().find(|p| p.name == port.name && p.protocol == port.protocol);
        if let Some(p) = named.filter(|_| e.address.is_ipv4() == call.addr.is_ipv4()) {
            all.push((e, SocketAddr::new(e.address, p.port)));
        }
    }
    let here = |e: &Endpoint| e.node == NODE;
    let in_zone = |e: &Endpoint| !zone.is_empty() && e.zone == zone;
    // Callers inside are the internal policy's, callers outside that of the service whose address they reached.
    let local = match call.outside {
        true => dialled.external_policy == ExternalPolicy::Local,
        false => to.internal_policy == InternalPolicy::Local,
    };
    let pick = |of: &dyn Fn(&Endpoint) -> bool| -> Vec<SocketAddr> {
        let picked: BTreeSet<SocketAddr> = all.iter().filter(|(e, _)| of(e)).map(|(_, a)| *a).collect();
        picked.into_iter().collect()
    };
    let mut choices: Vec<Vec<SocketAddr>> = Vec::new();
    if local {
        choices.push(pick(&|e| e.ready && here(e)));
        choices.push(pick(&|e| e.draining && here(e)));
    } else {
        if to.distribution == Distribution::SameNode {
            choices.push(pick(&|e| e.ready && here(e)));
        }
        if to.distribution != Distribution::Even {
            choices.push(pick(&|e| e.ready && in_zone(e)));
        }
        choices.push(pick(&|e| e.ready));
    }
    choices.into_iter().find(|c| !c.is_empty()).unwrap_or_default()
}

/// What the maps say: the entry that a program finds, read by the numbers in it.
fn entries(c: &Compiled, call: Call) -> Option<Led> {
    let inside = key(call.addr, call.port, call.protocol);
    let outside = ServiceKey { scope: OUTSIDE, ..inside };
    let mut found = (inside, c.services.get(&inside)?);
    let flags = lay_out(&inside, found.1, 7).0.flags;
    assert_eq!(flags & SERVICE_OUTSIDE != 0, c.services.contains_key(&outside), "{call:?}: the flag says it");
    if call.outside && flags & SERVICE_OUTSIDE != 0 {
        found = (outside, &c.services[&outside]);
    }
    let (service, backends) = lay_out(&found.0, found.1, 7);
    let target = |index: u32| {
        let (_, b) = backends.iter().find(|(k, _)| (k.set, k.index) == (7, index)).expect("a backend of its index");
        SocketAddr::new(crate::ip(b.addr), u16::from_be(b.port_be))
    };
    let groups = &service.group[..service.groups as usize];
    let total = groups.last().map_or(0, |g| g.upto);
    let (mut shares, mut before) = (Shares::new(), 0);
    for g in groups {
        let share = f64::from(g.upto - before) / f64::from(total);
        before = g.upto;
        for index in g.first..g.first + g.count {
            *shares.entry(Some(target(index))).or_default() += share / f64::from(g.count);
        }
        if g.count == 0 {
            *shares.entry(None).or_default() += share;
        }
    }
    if groups.is_empty() {
        shares.insert(None, 1.0);
    }
    Some(Led { shares, affinity_s: service.affinity_s, maglev: service.flags >> MAGLEV_SHIFT != 0 })
}

/// All that anybody might dial, and what nobody serves.
fn calls(s: &Snapshot) -> Vec<Call> {
    let mut addresses: BTreeSet<IpAddr> = s.services().flat_map(Service::addresses).collect();
    addresses.extend([IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into(), [198, 51, 100, 9].into()]);
    let mut all = Vec::new();
    for addr in addresses {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for port in [80, 443, 30_080, 30_081, 9] {
                all.extend([false, true].map(|outside| Call { outside, addr, protocol, port }));
            }
        }
    }
    // The services' own addresses are for callers inside.
    let own: BTreeSet<IpAddr> = s.services().flat_map(|s| s.virtual_ips.clone()).collect();
    all.retain(|c| !(c.outside && own.contains(&c.addr)));
    all
}

fn close(a: &Shares, b: &Shares) -> bool {
    a.keys().eq(b.keys()) && a.iter().zip(b).all(|((_, x), (_, y))| (x - y).abs() < 1e-9)
}

fn service(at: usize) -> impl Strategy<Value = Resource> {
    let ips = |v4: &str, v6: &str| -> Vec<IpAddr> { [v4, v6].map(|t| t.parse().expect(t)).into() };
    let own = subsequence(ips(&format!("10.96.0.{at}"), &format!("fd00:96::{at}")), 0..=2);
    // One is another's own.
    let mut external = ips("192.0.2.1", "2001:db8::1");
    external.extend(ips("192.0.2.2", "10.96.0.1"));
    let external = subsequence(external, 0..=4);
    let node_port = || prop_oneof![Just(None), Just(Some(30_080u16)), Just(Some(30_081u16))];
    let ports = vec![("http", Protocol::Tcp, 80), ("tls", Protocol::Tcp, 443), ("datagrams", Protocol::Udp, 80)];
    let ports = (subsequence(ports, 1..=3), [node_port(), node_port(), node_port()]);
    let internal = prop_oneof![3 => Just(InternalPolicy::Cluster), 1 => Just(InternalPolicy::Local)];
    let policies = (internal, prop_oneof![Just(ExternalPolicy::Cluster), Just(ExternalPolicy::Local)]);
    let distribution = prop_oneof![2 => Just(Distribution::Even), 1 => Just(Distribution::SameZone), 1 => Just(Distribution::SameNode)];
    let affinity = prop_oneof![2 => Just(None), 1 => Just(Some(60))];
    (own, external, ports, policies, distribution, affinity).prop_map(
        move |(virtual_ips, external_ips, (ports, node_ports), policies, distribution, affinity_s)| {
            let port = |((name, protocol, port), node_port): ((&str, _, _), _)| ServicePort {
                name: name.into(),
                protocol,
                port,
                app_protocol: AppProtocol::Detect,
                node_port,
            };
            // A headless service has no other address either.
            let external_ips = if virtual_ips.is_empty() { vec![] } else { external_ips };
            Resource::Service(Service {
                name: Name::new("shop", NAMES[at]),
                virtual_ips,
                external_ips,
                // One number is one port's of a service.
                ports: ports.into_iter().zip(node_ports).map(port).fold(vec![], |mut all: Vec<ServicePort>, mut p| {
                    let taken = |o: &ServicePort| o.node_port == p.node_port && o.protocol == p.protocol;
                    p.node_port = p.node_port.filter(|_| !all.iter().any(taken));
                    all.push(p);
                    all
                }),
                affinity_s,
                internal_policy: policies.0,
                external_policy: policies.1,
                distribution,
                ..Service::default()
            })
        },
    )
}

fn endpoint(service: usize) -> impl Strategy<Value = Endpoint> {
    let place = prop_oneof![Just(("n1", "z1")), Just(("n2", "z1")), Just(("n3", "z2")), Just(("", ""))];
    let ports = vec![("http", Protocol::Tcp), ("tls", Protocol::Tcp), ("datagrams", Protocol::Udp)];
    let ports = (subsequence(ports, 2..=3), prop_oneof![3 => Just(8080u16), 1 => Just(9090u16)]);
    let state = prop_oneof![3 => Just((true, false)), 1 => Just((false, false)), 1 => Just((false, true))];
    (any::<bool>(), 1u8..5, place, ports, state).prop_map(move |(v4, last, (node, zone), (ports, port), state)| {
        let text = if v4 { format!("10.244.{service}.{last}") } else { format!("fd00:244:{service}::{last}") };
        let port = |(name, protocol): (&str, _)| EndpointPort { name: name.into(), protocol, port };
        Endpoint {
            address: text.parse().expect("address"),
            ready: state.0,
            draining: state.1,
            node: node.into(),
            zone: zone.into(),
            workload: None,
            hostname: None,
            mesh: Mesh::Plain,
            ports: ports.into_iter().map(port).collect(),
        }
    })
}

fn route(at: usize) -> impl Strategy<Value = Resource> {
    let backend = (0..NAMES.len(), prop_oneof![4 => Just(80u16), 1 => Just(443u16)], 0u32..4);
    let rule = (proptest::collection::vec(backend, 0..4), prop_oneof![3 => Just(true), 1 => Just(false)]);
    let parent_port = prop_oneof![Just(None), Just(Some(80)), Just(Some(443))];
    (0..NAMES.len(), parent_port, 0i64..3, proptest::collection::vec(rule, 0..3)).prop_map(
        move |(parent, parent_port, created_s, rules)| {
            let backend = |(s, port, weight): (usize, _, _)| Backend {
                service: Name::new("shop", NAMES[s]),
                port,
                weight,
                ..Backend::default()
            };
            let get = Match { method: Some("GET".into()), ..Match::default() };
            let rule = |(backends, any): (Vec<_>, bool)| Rule {
                matches: if any { vec![] } else { vec![get.clone()] },
                backends: backends.into_iter().map(backend).collect(),
                ..Rule::default()
            };
            Resource::Route(Route {
                name: Name::new("shop", format!("r{at}")),
                kind: RouteKind::Http,
                parent: Name::new("shop", NAMES[parent]),
                parent_port,
                created_s,
                generation: 1,
                rules: rules.into_iter().map(rule).collect(),
            })
        },
    )
}

fn snapshots() -> impl Strategy<Value = Snapshot> {
    let set = |at: usize| {
        proptest::collection::vec(endpoint(at), 0..5).prop_map(move |mut endpoints| {
            let mut seen = BTreeSet::new();
            endpoints.retain(|e| seen.insert(e.address));
            Resource::EndpointSet(EndpointSet { name: Name::new("shop", NAMES[at]), endpoints })
        })
    };
    let zone = prop_oneof![3 => Just("z1"), 1 => Just("")];
    let node = zone.prop_map(|zone| {
        let (addresses, pod_cidrs) = (vec![], vec![]);
        Resource::Node(Node { name: Name::cluster(NODE), addresses, pod_cidrs, zone: zone.into(), ready: true })
    });
    let services = (service(0), service(1), service(2));
    let routes = (proptest::option::of(route(0)), proptest::option::of(route(1)));
    (services, (set(0), set(1), set(2)), routes, node).prop_map(|((a, b, c), (x, y, z), (r, t), node)| {
        Snapshot::new(Revision(1), [a, b, c, x, y, z, node].into_iter().chain(r).chain(t))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_096, ..ProptestConfig::default() })]
    #[test]
    fn every_call_is_led_where_the_services_fields_say(s in snapshots()) {
        let c = compile(&s, NODE, None);
        for call in calls(&s) {
            let (want, got) = (reference(&s, call), entries(&c, call));
            let same = match (&want, &got) {
                (Some(w), Some(g)) => close(&w.shares, &g.shares) && (w.affinity_s, w.maglev) == (g.affinity_s, g.maglev),
                (w, g) => w.is_none() && g.is_none(),
            };
            prop_assert!(same, "{:?}\nwanted {:?}\nfound  {:?}", call, want, got);
        }
    }

    /// The same from endpoints that changed alone.
    #[test]
    fn what_is_led_anew_is_what_is_compiled(s in snapshots(), t in snapshots()) {
        let sets = |s: &Snapshot| s.iter().filter(|r| r.kind() == Kind::EndpointSet).cloned().collect::<Vec<_>>();
        let rest = s.iter().filter(|r| r.kind() != Kind::EndpointSet).cloned();
        let next = Arc::new(Snapshot::from_shared(Revision(2), rest.chain(sets(&t))));
        let mut compiler = Compiler::new(NODE.into(), None);
        compiler.compile(Arc::new(s));
        prop_assert_eq!(compiler.compile(next.clone()), &compile(&next, NODE, None));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
    /// Each slot of a table is as likely as the next.
    #[test]
    fn maglev_tables_give_the_shares_of_the_reference(s in snapshots()) {
        let c = compile(&s, NODE, None);
        for call in calls(&s) {
            let scope = if call.outside { OUTSIDE } else { INSIDE };
            let at = ServiceKey { scope, ..key(call.addr, call.port, call.protocol) };
            let Some(wanted) = c.services.get(&at).filter(|w| w.maglev) else { continue };
            let targets: Vec<_> = wanted.targets().copied().collect();
            let slots: Vec<u16> = wanted.table(7).into_iter().flat_map(|(_, block)| block).collect();
            prop_assert!(!slots.is_empty());
            let mut shares = Shares::new();
            for slot in &slots {
                let target = (*slot != MAGLEV_NOBODY).then(|| targets[usize::from(*slot)]);
                let target = target.map(|t| SocketAddr::new(crate::ip(t.addr), u16::from_be(t.port_be)));
                *shares.entry(target).or_default() += 1.0 / slots.len() as f64;
            }
            let want = reference(&s, call).expect("served").shares;
            for who in want.keys().chain(shares.keys()) {
                let of = |shares: &Shares| shares.get(who).copied().unwrap_or(0.0);
                prop_assert!((of(&want) - of(&shares)).abs() < 0.01, "{:?} {:?}: {:?} {:?}", call, who, want, shares);
            }
        }
    }
}
