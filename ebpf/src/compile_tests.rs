//! Table and property tests of `compile`: every choice that the entries allow is compared with a reference that walks
//! the snapshot for each connection.

use super::*;
use crate::layout::{lay_out, lookup};
use proptest::prelude::*;
use sluice_model::{
    AppProtocol, Backend, Endpoint, EndpointPort, EndpointSet, Identity, Match, Mesh, Resource, Revision, RouteKind,
};

fn name(n: &str) -> Name {
    Name::new("shop", n)
}

fn service(n: &str, vip: &str, protocol: Protocol) -> Resource {
    let port =
        ServicePort { name: "http".into(), protocol, port: 80, app_protocol: AppProtocol::Detect, node_port: None };
    Resource::Service(Service {
        name: name(n),
        virtual_ips: vec![vip.parse().expect(vip)],
        ports: vec![port],
        ..Service::default()
    })
}

fn endpoints(n: &str, protocol: Protocol, list: &[(&str, bool)]) -> Resource {
    let endpoint = |(address, ready): &(&str, bool)| Endpoint {
        address: address.parse().expect(address),
        ready: *ready,
        node: String::new(),
        zone: String::new(),
        draining: false,
        workload: None,
        hostname: None,
        mesh: Mesh::Plain,
        ports: vec![EndpointPort { name: "http".into(), protocol, port: 8080 }],
    };
    Resource::EndpointSet(EndpointSet { name: name(n), endpoints: list.iter().map(endpoint).collect() })
}

fn route(n: &str, parent: &str, port: Option<u16>, created_s: i64, rules: Vec<Rule>) -> Resource {
    let kind = RouteKind::Http;
    let (name, parent) = (name(n), name(parent));
    Resource::Route(Route { name, kind, parent, parent_port: port, created_s, generation: 1, rules })
}

fn split(parts: &[(&str, u32)]) -> Rule {
    let backend =
        |(s, weight): &(&str, u32)| Backend { service: name(s), port: 80, weight: *weight, ..Backend::default() };
    Rule { backends: parts.iter().map(backend).collect(), ..Rule::default() }
}

fn only_v4(vip: &str) -> ServiceKey {
    key(vip.parse().expect(vip), 80, Protocol::Tcp)
}

fn groups(c: &Compiled, vip: &str) -> Vec<(u32, Vec<String>)> {
    let text = |t: &Target| format!("{}:{}", crate::ip(t.addr), u16::from_be(t.port_be));
    let wanted = c.services.get(&only_v4(vip)).expect("an entry for the address");
    wanted.groups.iter().map(|g| (g.weight, g.targets.iter().map(text).collect())).collect()
}

#[test]
fn own_endpoints_without_a_route_and_split_with_one() {
    let mut all = vec![
        service("web", "10.96.0.1", Protocol::Tcp),
        endpoints("web", Protocol::Tcp, &[("10.244.1.1", true), ("10.244.1.2", false), ("fd00::1", true)]),
        service("web-2", "10.96.0.2", Protocol::Tcp),
        endpoints("web-2", Protocol::Tcp, &[("10.244.2.1", true), ("10.244.2.2", true)]),
        service("none", "10.96.0.3", Protocol::Tcp),
    ];
    let c = compile(&Snapshot::new(Revision(1), all.clone()), "n1", None);
    assert_eq!(groups(&c, "10.96.0.1"), [(1, vec!["10.244.1.1:8080".to_owned()])]);
    assert_eq!(groups(&c, "10.96.0.3"), []);

    let matching =
        Rule { matches: vec![Match { method: Some("GET".into()), ..Match::default() }], ..split(&[("none", 1)]) };
    all.extend([
        route("younger", "web", None, 20, vec![split(&[("none", 1)])]),
        route("older", "web", Some(80), 10, vec![matching, split(&[("web", 90), ("web-2", 10), ("none", 5)])]),
        route("oldest-other-port", "web", Some(81), 1, vec![split(&[("none", 1)])]),
    ]);
    let c = compile(&Snapshot::new(Revision(2), all), "n1", None);
    let second = vec!["10.244.2.1:8080".to_owned(), "10.244.2.2:8080".to_owned()];
    assert_eq!(
        groups(&c, "10.96.0.1"),
        [(90, vec!["10.244.1.1:8080".to_owned()]), (10, second.clone()), (5, vec![])],
        "a backend without endpoints keeps its share, and refuses it"
    );
    assert_eq!(groups(&c, "10.96.0.2"), [(1, second)]);
}

#[test]
fn weight_zero_everywhere_means_no_backend_not_the_services_own() {
    let all = [
        service("web", "10.96.0.1", Protocol::Tcp),
        endpoints("web", Protocol::Tcp, &[("10.244.1.1", true)]),
        route("r", "web", None, 1, vec![split(&[("web", 0)])]),
    ];
    assert_eq!(groups(&compile(&Snapshot::new(Revision(1), all), "n1", None), "10.96.0.1"), []);
}

#[test]
fn udp_ports_ignore_routes_and_dns_is_overlaid() {
    let all = [
        service("dns", "10.96.0.10", Protocol::Udp),
        endpoints("dns", Protocol::Udp, &[("10.244.1.1", true)]),
        route("r", "dns", None, 1, vec![split(&[("dns", 0)])]),
    ];
    let dns = DnsOverlay { vip: "10.96.0.10".parse().expect("vip"), server: "169.254.1.1:53".parse().expect("server") };
    let c = compile(&Snapshot::new(Revision(1), all), "n1", Some(dns));
    let udp = &c.services[&key(dns.vip, 80, Protocol::Udp)];
    assert_eq!(udp.groups.len(), 1);
    for p in [Protocol::Tcp, Protocol::Udp] {
        let entry = &c.services[&key(dns.vip, 53, p)];
        assert!(entry.node_local);
        assert_eq!(crate::ip(entry.groups[0].targets[0].addr), dns.server.ip());
    }
}

#[test]
fn each_address_leads_to_endpoints_of_its_family() {
    let place = |resource: Resource, nodes: &[&str]| {
        let Resource::EndpointSet(mut set) = resource else { panic!("endpoints") };
        set.endpoints.iter_mut().zip(nodes).for_each(|(e, n)| (*n).clone_into(&mut e.node));
        Resource::EndpointSet(set)
    };
    let both = |distribution, policy| {
        changed(service("web", "10.96.0.1", Protocol::Tcp), |s| {
            s.virtual_ips.push("fd00:96::1".parse().expect("address"));
            s.external_ips = vec!["192.0.2.1".parse().expect("address"), "2001:db8::1".parse().expect("address")];
            s.ports[0].node_port = Some(30_080);
            (s.distribution, s.internal_policy) = (distribution, policy);
        })
    };
    // The pod on n1 is of a time when its node had but one range.
    let set = || {
        let list = [("10.244.1.1", true), ("10.244.2.1", true), ("fd00:2::1", true)];
        place(endpoints("web", Protocol::Tcp, &list), &["n1", "n2", "n2"])
    };
    use sluice_model::{Distribution, InternalPolicy};
    let (all, near, far): (&[&str], &[&str], &[&str]) =
        (&["10.244.1.1:8080", "10.244.2.1:8080"], &["10.244.1.1:8080"], &["fd00:2::1:8080"]);
    for (distribution, policy, v4, v6) in [
        (Distribution::Even, InternalPolicy::Cluster, all, far),
        (Distribution::SameNode, InternalPolicy::Cluster, near, far),
        (Distribution::Even, InternalPolicy::Local, near, &[]),
    ] {
        let c = compile(&Snapshot::new(Revision(1), [both(distribution, policy), set()]), "n1", None);
        for (vip, want) in [("10.96.0.1", v4), ("fd00:96::1", v6), ("192.0.2.1", v4), ("2001:db8::1", v6)] {
            let found: Vec<String> = groups(&c, vip).into_iter().flat_map(|(_, targets)| targets).collect();
            assert_eq!(found, want, "{vip} {distribution:?} {policy:?}");
        }
        let node_ports =
            |scope| c.services.keys().filter(|key| u16::from_be(key.port_be) == 30_080 && key.scope == scope).count();
        // The internal policy is not that of callers from outside.
        let of_their_own = if policy == InternalPolicy::Local { 2 } else { 0 };
        assert_eq!((node_ports(INSIDE), node_ports(OUTSIDE)), (2, of_their_own), "one of each family");
    }
    let six = changed(service("web", "fd00:96::1", Protocol::Tcp), |s| s.ports[0].node_port = Some(30_080));
    let c = compile(&Snapshot::new(Revision(1), [six, set()]), "n1", None);
    assert!(
        c.services.keys().all(|key| crate::ip(key.addr).is_ipv6()),
        "a service of one family is nothing of the other"
    );
}

#[test]
fn each_family_has_its_own_resolver() {
    let dns = [("10.96.0.10", "169.254.1.1:53"), ("fd00:96::a", "[fd00::53]:53")]
        .map(|(vip, server)| DnsOverlay { vip: vip.parse().expect("vip"), server: server.parse().expect("server") });
    let c = compile(&Snapshot::default(), "n1", dns);
    for overlay in dns {
        let entry = &c.services[&key(overlay.vip, 53, Protocol::Udp)];
        assert_eq!(crate::ip(entry.groups[0].targets[0].addr), overlay.server.ip());
    }
    assert_eq!(c.services.len(), 4);
}

#[test]
fn pods_of_this_node_carry_mesh_and_excluded_ports() {
    let identity: Identity = "spiffe://cluster.local/ns/shop/sa/web".parse().expect("identity");
    let pod = |n: &str, node: &str| {
        let (name, uid) = (name(n), format!("uid-{n}"));
        let identity = identity.clone();
        Resource::Workload(Workload {
            name,
            uid,
            node: node.into(),
            addresses: vec![],
            identity,
            meshed: true,
            gateway: None,
        })
    };
    let policy = Policy { name: name("a"), excluded_ports: vec![9000], ..Policy::default() };
    let s = Snapshot::new(Revision(1), [pod("a", "n1"), pod("b", "n2"), Resource::Policy(policy)]);
    let c = compile(&s, "n1", None);
    let wanted = WantedPod { meshed: true, excluded_ports: BTreeSet::from([9000]) };
    assert_eq!(c.pods, BTreeMap::from([("uid-a".to_owned(), wanted)]));
}

#[test]
fn an_address_belongs_to_the_first_service_by_name() {
    let all = [
        service("a", "10.96.0.1", Protocol::Tcp),
        service("b", "10.96.0.1", Protocol::Tcp),
        endpoints("b", Protocol::Tcp, &[("10.244.1.1", true)]),
    ];
    let c = compile(&Snapshot::new(Revision(1), all), "n1", None);
    assert_eq!(groups(&c, "10.96.0.1"), []);
    assert!(matches!(&c.problems[..], [Problem::AddressTaken { loser, .. }] if *loser == name("b")));
}

/// For each connection, from the objects: which targets may it reach, and with which share (numerator of `total`).
fn reference(s: &Snapshot, service: &str) -> BTreeMap<String, f64> {
    let service = s.service(&name(service)).expect("generated");
    let ready = |n: &Name| -> Vec<String> {
        let set = s.endpoint_set(n).map(|e| e.endpoints.clone()).unwrap_or_default();
        let mut all: Vec<_> =
            set.iter().filter(|e| e.ready && e.address.is_ipv4()).map(|e| format!("{}:8080", e.address)).collect();
        all.sort();
        all.dedup();
        all
    };
    let mut best: Option<&Route> = None;
    for r in s.routes().filter(|r| r.parent == service.name && r.parent_port.is_none_or(|p| p == 80)) {
        let older = best.is_none_or(|b| (r.created_s, &r.name) < (b.created_s, &b.name));
        if older && r.rules.iter().any(Rule::catch_all) {
            best = Some(r);
        }
    }
    let parts: Vec<(f64, Vec<String>)> = match best {
        None => vec![(1.0, ready(&service.name))],
        Some(r) => {
            let rule = r.rules.iter().find(|r| r.catch_all()).expect("chosen for it");
            rule.backends.iter().map(|b| (f64::from(b.weight), ready(&b.service))).collect()
        }
    };
    let total: f64 = parts.iter().map(|(w, _)| w).sum();
    let mut shares = BTreeMap::new();
    for (weight, targets) in parts.iter().filter(|(w, t)| *w > 0.0 && !t.is_empty()) {
        for t in targets {
            *shares.entry(t.clone()).or_insert(0.0) += weight / total / targets.len() as f64;
        }
    }
    shares
}

/// Shares that the laid-out entries give, by sweeping the mirror of the programs' lookup over a grid.
fn swept(c: &Compiled, vip: &str) -> BTreeMap<String, f64> {
    let key = only_v4(vip);
    let (service, backends) = lay_out(&key, &c.services[&key], 3);
    let get = |k| backends.iter().find(|(x, _)| *x == k).map(|(_, b)| *b);
    const STEPS: u32 = 240; // divisible by the small weights and counts that are generated
    let mut shares = BTreeMap::new();
    let number = |i: u32| ((i as u64 * (1 << 32) + (1 << 31)) / STEPS as u64) as u32;
    for (a, b) in (0..STEPS).flat_map(|a| (0..STEPS).map(move |b| (a, b))) {
        if let Some(t) = lookup(&service, get, number(a), number(b)) {
            let text = format!("{}:{}", crate::ip(t.addr), u16::from_be(t.port_be));
            *shares.entry(text).or_insert(0.0) += 1.0 / f64::from(STEPS) / f64::from(STEPS);
        }
    }
    shares
}

fn snapshots() -> impl Strategy<Value = Snapshot> {
    let ends = proptest::collection::vec((1u8..5, any::<bool>()), 0..4);
    let rule = (proptest::collection::vec((0usize..3, 0u32..4), 0..4), any::<bool>());
    let routes = proptest::collection::vec((0i64..3, rule, any::<bool>()), 0..3);
    (proptest::collection::vec(ends, 3), routes).prop_map(|(ends, routes)| {
        let names = ["a", "b", "c"];
        let mut all = vec![];
        for (i, list) in ends.iter().enumerate() {
            all.push(changed(service(names[i], &format!("10.96.0.{i}"), Protocol::Tcp), |s| {
                // One with all ways in, one with none but its own.
                if i < 2 {
                    s.ports[0].node_port = Some(30_000 + i as u16);
                    s.external_ips = vec![IpAddr::from([192, 0, 2, i as u8])];
                    s.external_policy = if i == 0 { ExternalPolicy::Local } else { ExternalPolicy::Cluster };
                    s.restricted_ips = if list.len() % 2 == 0 { s.external_ips.clone() } else { vec![] };
                    s.source_ranges = vec![format!("203.0.{i}.0/24").parse().expect("range")];
                }
            }));
            let texts: Vec<_> = list.iter().map(|(n, r)| (format!("10.244.{i}.{n}"), *r)).collect();
            let pairs: Vec<_> = texts.iter().map(|(t, r)| (t.as_str(), *r)).collect();
            all.push(endpoints(names[i], Protocol::Tcp, &pairs));
        }
        for (i, (created, (parts, any), own_port)) in routes.into_iter().enumerate() {
            let parts: Vec<_> = parts.into_iter().map(|(s, w)| (names[s], w)).collect();
            let mut rule = split(&parts);
            if !any {
                rule.matches = vec![Match { method: Some("GET".into()), ..Match::default() }];
            }
            let port = if own_port { Some(80) } else { None };
            all.push(route(&format!("r{i}"), "a", port, created, vec![rule]));
        }
        Snapshot::new(Revision(1), all)
    })
}

proptest! {
    #[test]
    fn one_after_the_other_is_as_each_by_itself(all in proptest::collection::vec((snapshots(), any::<bool>()), 1..6)) {
        let dns = DnsOverlay { vip: "10.96.0.2".parse().expect("vip"), server: "169.254.1.1:53".parse().expect("server") };
        let mut compiler = Compiler::new("n1".into(), Some(dns));
        let mut present = Snapshot::default();
        for (drawn, endpoints_only) in all {
            let is_set = |r: &Arc<Resource>| r.kind() == Kind::EndpointSet;
            let (from, rest) = if endpoints_only { (&drawn, &present) } else { (&drawn, &drawn) };
            let sets = from.iter().filter(|r| is_set(r));
            let next = Snapshot::from_shared(Revision(1), sets.chain(rest.iter().filter(|r| !is_set(r))).cloned());
            prop_assert_eq!(compiler.compile(Arc::new(next.clone())), &compile(&next, "n1", Some(dns)));
            present = next;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn entries_give_the_shares_of_the_obvious_reference(s in snapshots()) {
        let c = compile(&s, "n1", None);
        for (i, n) in ["a", "b", "c"].into_iter().enumerate() {
            let (want, got) = (reference(&s, n), swept(&c, &format!("10.96.0.{i}")));
            prop_assert_eq!(want.keys().collect::<Vec<_>>(), got.keys().collect::<Vec<_>>(), "service {}", n);
            for (target, share) in &want {
                prop_assert!((share - got[target]).abs() < 0.02, "{target}: {share} wanted, {}", got[target]);
            }
        }
    }
}

fn changed(resource: Resource, change: impl FnOnce(&mut Service)) -> Resource {
    let Resource::Service(mut service) = resource else { panic!("a service") };
    change(&mut service);
    Resource::Service(service)
}

#[test]
fn external_addresses_mean_the_service_but_never_anothers_own() {
    let ips = |list: &[&str]| list.iter().map(|ip| ip.parse().expect("address")).collect::<Vec<IpAddr>>();
    let all = [
        changed(service("a-thief", "10.96.0.9", Protocol::Tcp), |s| s.external_ips = ips(&["10.96.0.1", "192.0.2.1"])),
        endpoints("a-thief", Protocol::Tcp, &[("10.244.6.6", true)]),
        changed(service("web", "10.96.0.1", Protocol::Tcp), |s| s.external_ips = ips(&["192.0.2.1", "192.0.2.2"])),
        endpoints("web", Protocol::Tcp, &[("10.244.1.1", true)]),
    ];
    let compiled = compile(&Snapshot::new(Revision(1), all), "n1", None);
    for (vip, to) in [("10.96.0.1", "10.244.1.1"), ("192.0.2.1", "10.244.6.6"), ("192.0.2.2", "10.244.1.1")] {
        assert_eq!(groups(&compiled, vip), [(1, vec![format!("{to}:8080")])], "{vip}");
    }
    assert_eq!(compiled.problems.len(), 2, "both conflicts are named");
}

#[test]
fn a_backend_of_a_route_is_seen_from_the_callers_node_too() {
    let place = |resource: Resource, nodes: &[&str]| {
        let Resource::EndpointSet(mut set) = resource else { panic!("endpoints") };
        set.endpoints.iter_mut().zip(nodes).for_each(|(e, n)| (*n).clone_into(&mut e.node));
        Resource::EndpointSet(set)
    };
    let all = [
        service("web", "10.96.0.1", Protocol::Tcp),
        changed(service("v2", "10.96.0.2", Protocol::Tcp), |s| {
            (s.internal_policy, s.affinity_s) = (sluice_model::InternalPolicy::Local, Some(60));
        }),
        place(endpoints("v2", Protocol::Tcp, &[("10.244.1.1", true), ("10.244.2.1", true)]), &["n1", "n2"]),
        route("r", "web", None, 1, vec![split(&[("v2", 1)])]),
    ];
    let compiled = compile(&Snapshot::new(Revision(1), all), "n2", None);
    for vip in ["10.96.0.1", "10.96.0.2"] {
        assert_eq!(groups(&compiled, vip), [(1, vec!["10.244.2.1:8080".to_owned()])]);
    }
    let affinity = |vip| compiled.services[&only_v4(vip)].affinity_s;
    assert_eq!((affinity("10.96.0.1"), affinity("10.96.0.2")), (0, 60));
}

#[test]
fn node_ports_and_external_addresses_by_the_policy_for_who_calls() {
    let place = |resource: Resource, nodes: &[&str]| {
        let Resource::EndpointSet(mut set) = resource else { panic!("endpoints") };
        set.endpoints.iter_mut().zip(nodes).for_each(|(e, n)| (*n).clone_into(&mut e.node));
        Resource::EndpointSet(set)
    };
    let all = |policy| {
        [
            changed(service("web", "10.96.0.1", Protocol::Tcp), |s| {
                s.external_ips = vec!["192.0.2.1".parse().expect("address")];
                s.ports[0].node_port = Some(30_080);
                s.external_policy = policy;
            }),
            place(endpoints("web", Protocol::Tcp, &[("10.244.1.1", true), ("10.244.2.1", true)]), &["n1", "n2"]),
        ]
    };
    let any = || addr(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let keys = [only_v4("192.0.2.1"), ServiceKey { addr: any(), port_be: 30_080_u16.to_be(), ..only_v4("192.0.2.1") }];
    let targets = |c: &Compiled, key: &ServiceKey| c.services.get(key).map(|w| w.targets().count());
    let cluster = compile(&Snapshot::new(Revision(1), all(ExternalPolicy::Cluster)), "n1", None);
    let local = compile(&Snapshot::new(Revision(1), all(ExternalPolicy::Local)), "n1", None);
    let elsewhere = compile(&Snapshot::new(Revision(1), all(ExternalPolicy::Local)), "n3", None);
    for key in keys {
        let outside = ServiceKey { scope: OUTSIDE, ..key };
        assert_eq!((targets(&cluster, &key), targets(&cluster, &outside)), (Some(2), None));
        assert_eq!((targets(&local, &key), targets(&local, &outside)), (Some(2), Some(1)));
        assert_eq!((targets(&elsewhere, &key), targets(&elsewhere, &outside)), (Some(2), Some(0)));
        assert!(!cluster.services[&key].outside && local.services[&key].outside);
        assert!(local.services[&outside].maglev && !elsewhere.services[&outside].maglev, "none without a backend");
    }
    assert!(!local.services[&only_v4("10.96.0.1")].maglev, "virtual addresses are for sockets");
    assert_eq!(local.services.len(), 1 + 2 * 2);
}

fn restricted(ips: &[&str], ranges: &[&str]) -> impl Fn(&mut Service) {
    let ips: Vec<IpAddr> = ips.iter().map(|ip| ip.parse().expect("address")).collect();
    let ranges: Vec<SourceRange> = ranges.iter().map(|r| r.parse().expect("range")).collect();
    move |s| {
        s.external_ips = ["192.0.2.1", "192.0.2.2", "2001:db8::1"].map(|ip| ip.parse().expect("address")).to_vec();
        s.ports[0].node_port = Some(30_080);
        (s.restricted_ips, s.source_ranges) = (ips.clone(), ranges.clone());
    }
}

#[test]
fn who_may_use_which_address() {
    let node = |address: &str| {
        let addresses = vec![address.parse().expect("address"), "fd00:9::1".parse().expect("address")];
        let (name, pod_cidrs, zone) = (Name::cluster("n1"), vec![], String::new());
        Resource::Node(sluice_model::Node { name, addresses, pod_cidrs, zone, ready: true })
    };
    const ALL: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
    type Want<'a> = Option<(&'a [&'a str], bool)>;
    let table: [(&[&str], &[&str], Want, Want); 8] = [
        (&[], &["203.0.113.0/24"], None, None),
        (&ALL, &["203.0.113.0/24"], Some((&["203.0.113.0/120"], false)), Some((&[], false))),
        (&ALL, &["2001:db8:1::/48"], Some((&[], false)), Some((&["2001:db8:1::/48"], false))),
        (&ALL, &[], Some((&[], false)), Some((&[], false))),
        (&ALL, &["0.0.0.0/0", "203.0.113.0/24"], None, Some((&[], false))),
        (&ALL, &["::/0", "192.168.0.0/16"], Some((&["192.168.0.0/112"], true)), None),
        (&ALL, &["fd00:9::/64", "fd00:9::/64"], Some((&[], false)), Some((&["fd00:9::/64"], true))),
        (&ALL[..1], &["203.0.113.7/32", "10.0.0.0/8"], Some((&["10.0.0.0/104", "203.0.113.7/128"], false)), None),
    ];
    for (ips, ranges, v4, v6) in table {
        let web = changed(service("web", "10.96.0.1", Protocol::Tcp), restricted(ips, ranges));
        let c = compile(&Snapshot::new(Revision(1), [node("192.168.7.1"), web]), "n1", None);
        let of = |vip| {
            let sources = c.services[&only_v4(vip)].sources.as_deref()?;
            let text = |r: &Range| format!("{}/{}", crate::ip(r.addr), r.len);
            Some((sources.ranges.iter().map(text).collect::<Vec<_>>(), sources.node))
        };
        let want = |w: Want| w.map(|(list, node)| (list.iter().map(|r| (*r).to_owned()).collect::<Vec<_>>(), node));
        assert_eq!((of("192.0.2.1"), of("2001:db8::1")), (want(v4), want(v6)), "{ips:?} {ranges:?}");
        assert_eq!((of("192.0.2.2"), of("10.96.0.1")), (None, None), "an externalIP and the cluster's own address");
        let node_port = ServiceKey { port_be: 30_080_u16.to_be(), ..only_v4("0.0.0.0") };
        assert_eq!(c.services[&node_port].sources, None, "a node port");
    }
    let local = |s: &mut Service| {
        restricted(&ALL, &["203.0.113.0/24"])(s);
        s.external_policy = ExternalPolicy::Local;
    };
    let web = changed(service("web", "10.96.0.1", Protocol::Tcp), local);
    let c = compile(&Snapshot::new(Revision(1), [web]), "n1", None);
    let outside = &c.services[&ServiceKey { scope: OUTSIDE, ..only_v4("192.0.2.1") }];
    assert_eq!(outside.sources, c.services[&only_v4("192.0.2.1")].sources, "the entry of callers from outside");
    assert!(outside.sources.is_some());
}

#[test]
fn ranges_beyond_the_room_let_nobody_in_and_are_named() {
    let many = |count: u32| {
        move |s: &mut Service| {
            restricted(&["192.0.2.1"], &[])(s);
            let range = |n: u32| SourceRange::new(Ipv4Addr::from(0x0a00_0000 + n).into(), 32).expect("range");
            s.source_ranges = (0..count).map(range).collect();
        }
    };
    let half = SOURCES as u32 / 4; // each counts twice
    let at = |n: &str, vip: &str, external: &'static str, count: u32| {
        changed(service(n, vip, Protocol::Tcp), |s| {
            many(count)(s);
            s.ports[0].node_port = None;
            (s.external_ips, s.restricted_ips) =
                (vec![external.parse().expect("ip")], vec![external.parse().expect("ip")]);
        })
    };
    let all = [
        at("a", "10.96.0.1", "192.0.2.1", half),
        at("b", "10.96.0.2", "192.0.2.2", half + 1),
        at("c", "10.96.0.3", "192.0.2.3", half),
    ];
    let c = compile(&Snapshot::new(Revision(1), all), "n1", None);
    let ranges = |vip| c.services[&only_v4(vip)].sources.as_ref().expect("restricted").ranges.len() as u32;
    assert_eq!(["192.0.2.1", "192.0.2.2", "192.0.2.3"].map(ranges), [half, 0, half]);
    assert_eq!(c.problems.len(), 1);
    let text = c.problems[0].to_string();
    assert!(text.contains("shop/b") && text.contains("8193") && text.contains("192.0.2.2"), "{text}");
}
