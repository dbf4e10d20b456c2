//! Which paths each node walks, and what is said of each: PURE.

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::ResourceExt;
use sluice_wire::check::{Report, Walk, Walked, Way};
use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

/// A node that has said how it finds itself.
#[derive(Clone, Debug, Default)]
pub struct Node {
    pub name: String,
    /// Of the node itself.
    pub addresses: Vec<IpAddr>,
    pub report: Report,
}

/// Services that stand for all: the first of each kind, by name, that every node must reach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    pub service: Option<(String, SocketAddr)>,
    pub node_port: Option<NodePort>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePort {
    pub service: String,
    pub port: u16,
    /// The service's own addresses: nodes answer on theirs of the same families.
    pub addresses: Vec<IpAddr>,
}

impl NodePort {
    fn at(&self, ip: IpAddr) -> Option<SocketAddr> {
        let served = self.addresses.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
        served.then_some(SocketAddr::new(ip, self.port))
    }
}

/// A line of the report: what was looked at, and what is right or wrong with it.
pub type Line = (String, Result<String, String>);

/// The API's own service is taken where there is no other: it may lead out of the cluster's network.
pub fn targets(services: &[Service], slices: &[EndpointSlice]) -> Targets {
    let key = |s: &Service| (s.namespace().unwrap_or_default(), s.name_any());
    let serving: BTreeSet<_> = slices.iter().filter(|s| has_ready(s)).filter_map(service_of).collect();
    let mut all: Vec<&Service> = services.iter().filter(|s| serving.contains(&key(s))).collect();
    all.sort_by_key(|s| (key(s) == ("default".into(), "kubernetes".into()), key(s)));
    let name = |s: &Service| format!("{}/{}", s.namespace().unwrap_or_default(), s.name_any());
    let virtual_address = |s: &&Service| {
        let spec = s.spec.as_ref()?;
        let everywhere = spec.internal_traffic_policy.as_deref() != Some("Local");
        let ip: IpAddr = spec.cluster_ip.as_ref().filter(|_| everywhere)?.parse().ok()?;
        Some((name(s), SocketAddr::new(ip, tcp_port(s, |p| Some(p.port))?)))
    };
    let node_port = |s: &&Service| {
        let everywhere = s.spec.as_ref()?.external_traffic_policy.as_deref() != Some("Local");
        let port = tcp_port(s, |p| p.node_port.filter(|_| everywhere))?;
        let spec = s.spec.as_ref()?;
        let all = spec.cluster_ips.as_deref().unwrap_or_default().iter().chain(&spec.cluster_ip);
        let addresses: Vec<IpAddr> = all.filter_map(|ip| ip.parse().ok()).collect();
        Some(NodePort { service: name(s), port, addresses })
    };
    Targets { service: all.iter().find_map(virtual_address), node_port: all.iter().find_map(node_port) }
}

fn tcp_port(s: &Service, number: impl Fn(&k8s_openapi::api::core::v1::ServicePort) -> Option<i32>) -> Option<u16> {
    let mut tcp = s.spec.as_ref()?.ports.iter().flatten().filter(|p| p.protocol.as_deref().is_none_or(|p| p == "TCP"));
    tcp.find_map(|p| u16::try_from(number(p)?).ok().filter(|p| *p > 0))
}

fn has_ready(slice: &EndpointSlice) -> bool {
    slice.endpoints.iter().any(|e| e.conditions.as_ref().and_then(|c| c.ready) != Some(false))
}

fn service_of(slice: &EndpointSlice) -> Option<(String, String)> {
    let service = slice.labels().get("kubernetes.io/service-name")?;
    Some((slice.namespace().unwrap_or_default(), service.clone()))
}

/// What one node walks: from its probe to those of the others, to the services and to DNS; and from outside, which is its
/// own network, to the node ports of the others.
pub fn walk(from: &Node, nodes: &[Node], targets: &Targets) -> Walk {
    let others = || nodes.iter().filter(|n| n.name != from.name);
    let probes: Vec<SocketAddr> = others().flat_map(|n| &n.report.probe).copied().collect();
    let services: Vec<SocketAddr> = targets.service.iter().map(|(_, a)| *a).chain(from.report.dns).collect();
    let at = |ip: &IpAddr| targets.node_port.as_ref()?.at(*ip);
    let node_ports: Vec<SocketAddr> = others().flat_map(|n| &n.addresses).filter_map(at).collect();
    Walk::new(&probes, &services, &node_ports)
}

/// What came of one path of a node.
pub fn line(from: &Node, walked: &Walked, nodes: &[Node], targets: &Targets) -> Line {
    let to = walked.to;
    let has = |n: &&Node| n.report.probe.contains(&to) || n.addresses.contains(&to.ip());
    let node = nodes.iter().find(has).map_or_else(|| to.to_string(), |n| n.name.clone());
    let (path, remedy) = match walked.way {
        Way::Probe => (
            format!("pod on {} -> pod on {node} ({})", from.name, to.ip()),
            format!(
                "compare `ip route get {}` on {} with the nodes' pod ranges, and look whether what is between the nodes \
                 lets pods' packets pass (UDP 8472 where VXLAN is used)",
                to.ip(),
                from.name
            ),
        ),
        Way::FromPod => {
            let service = match &targets.service {
                Some((name, address)) if *address == to => format!("service {name}"),
                _ => "the cluster's DNS".to_owned(),
            };
            (
                format!("pod on {} -> {service} ({to})", from.name),
                format!("`sluice flows --drops --node {}` says who refuses it", from.name),
            )
        }
        Way::FromNode => {
            let service = targets.node_port.as_ref().map(|n| n.service.as_str()).unwrap_or_default();
            (
                format!("outside ({}) -> node port {} of {node} (service {service})", from.name, to.port()),
                format!("does a firewall of {node} let TCP {} in? `sluice flows --drops --node {node}`", to.port()),
            )
        }
    };
    let verdict = match &walked.outcome {
        Ok(us) => Ok(format!("{:.2} ms", *us as f64 / 1000.0)),
        Err(why) => Err(format!("{why}; {remedy}")),
    };
    (format!("path {path}"), verdict)
}

/// What a node says of itself.
pub fn lines(node: &Node) -> Vec<Line> {
    let Node { name, report, .. } = node;
    let mut lines = vec![(format!("kernel of {name}"), Ok(kernel(report)))];
    let differ = match report.differences.as_slice() {
        [] => Ok(format!("as revision {} wants them", report.revision)),
        all => Err(format!("others changed what the agent has put right now: {}; find out who", all.join("; "))),
    };
    lines.push((format!("maps and routes of {name}"), differ));
    let mtu = report.mtu.map(|mtu| mtu.to_string());
    lines.push((
        format!("mtu of pods on {name}"),
        mtu.ok_or_else(|| "its agent knows no nodes yet; does it reach control? see its log".into()),
    ));
    lines.extend(report.problems.iter().map(|p| (format!("snapshot on {name}"), Err(p.clone()))));
    lines.extend(report.errors.iter().map(|e| (format!("agent of {name}"), Err(format!("{e}; see its log")))));
    lines
}

fn kernel(report: &Report) -> String {
    let there: Vec<&str> = report.kernel.iter().filter(|f| f.fallback.is_none()).map(|f| f.name.as_str()).collect();
    let without = report.kernel.iter().filter_map(|f| Some(format!("without {}: {}", f.name, f.fallback.as_ref()?)));
    [there.join(", ")].into_iter().chain(without).filter(|t| !t.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use sluice_wire::check::Feature;

    fn a(s: &str) -> SocketAddr {
        s.parse().expect(s)
    }

    fn node(name: &str, address: &str, probe: &[&str]) -> Node {
        let probe = probe.iter().map(|p| a(p)).collect();
        let report = Report { node: name.into(), probe, dns: Some(a("10.96.0.10:53")), ..Report::default() };
        Node { name: name.into(), addresses: vec![address.parse().expect(address)], report }
    }

    fn service(name: &str, spec: Value) -> Service {
        let (namespace, name) = name.split_once('/').expect("a namespace");
        serde_json::from_value(json!({"metadata": {"namespace": namespace, "name": name}, "spec": spec}))
            .expect("a service")
    }

    fn node_port(service: &str, addresses: &[&str]) -> NodePort {
        let addresses = addresses.iter().map(|ip| ip.parse().expect(ip)).collect();
        NodePort { service: service.to_owned(), port: 30080, addresses }
    }

    fn slice(name: &str, ready: bool) -> EndpointSlice {
        let (namespace, name) = name.split_once('/').expect("a namespace");
        let labels = json!({"kubernetes.io/service-name": name});
        serde_json::from_value(json!({
            "metadata": {"namespace": namespace, "name": name, "labels": labels}, "addressType": "IPv4",
            "endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": ready}}], "ports": [],
        }))
        .expect("a slice")
    }

    #[test]
    fn services_stand_for_all_that_every_node_reaches() {
        let tcp = |ip: &str| json!({"clusterIP": ip, "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}]});
        let with = |mut spec: Value, field: &str| {
            spec[field] = "Local".into();
            spec
        };
        let api = service("default/kubernetes", json!({"clusterIP": "10.96.0.1", "ports": [{"port": 443}]}));
        let web = service("shop/web", tcp("10.96.0.5"));
        let ready = [slice("default/kubernetes", true), slice("shop/web", true), slice("a/a", true)];
        let unready = [slice("default/kubernetes", true), slice("shop/web", false)];
        let is = |service: &str, ip: &str, port_of: Option<(&str, &str)>| Targets {
            service: Some((service.to_owned(), a(ip))),
            node_port: port_of.map(|(name, ip)| node_port(name, &[ip])),
        };
        for (what, first, slices, expected) in [
            ("nothing", None, &ready[..0], Targets::default()),
            ("not ready", None, &unready[..], is("default/kubernetes", "10.96.0.1:443", None)),
            ("ready", None, &ready[..], is("shop/web", "10.96.0.5:80", Some(("shop/web", "10.96.0.5")))),
            (
                "first by name",
                Some(tcp("10.96.0.6")),
                &ready[..],
                is("a/a", "10.96.0.6:80", Some(("a/a", "10.96.0.6"))),
            ),
            (
                "local inside",
                Some(with(tcp("10.96.0.6"), "internalTrafficPolicy")),
                &ready[..],
                is("shop/web", "10.96.0.5:80", Some(("a/a", "10.96.0.6"))),
            ),
            (
                "local from outside",
                Some(with(tcp("10.96.0.6"), "externalTrafficPolicy")),
                &ready[..],
                is("a/a", "10.96.0.6:80", Some(("shop/web", "10.96.0.5"))),
            ),
            (
                "headless",
                Some(json!({"clusterIP": "None", "ports": [{"port": 80}]})),
                &ready[..],
                is("shop/web", "10.96.0.5:80", Some(("shop/web", "10.96.0.5"))),
            ),
            (
                "UDP",
                Some(json!({"clusterIP": "10.96.0.6", "ports": [{"port": 53, "protocol": "UDP"}]})),
                &ready[..],
                is("shop/web", "10.96.0.5:80", Some(("shop/web", "10.96.0.5"))),
            ),
        ] {
            let services: Vec<Service> = [Some(web.clone()), Some(api.clone()), first.map(|s| service("a/a", s))]
                .into_iter()
                .flatten()
                .collect();
            assert_eq!(targets(&services, slices), expected, "{what}");
        }
    }

    #[test]
    fn every_pair_of_nodes_is_walked() {
        let nodes = [
            node("n1", "172.30.0.1", &["10.244.1.9:7", "[fd00:1::9]:7"]),
            node("n2", "172.30.0.2", &["10.244.2.9:7"]),
            node("n3", "172.30.0.3", &[]),
        ];
        let targets = Targets {
            service: Some(("a/b".into(), a("10.96.0.5:80"))),
            node_port: Some(node_port("a/c", &["10.96.0.7"])),
        };
        let walk = |from: usize, targets| super::walk(&nodes[from], &nodes, targets);
        let expected = Walk::new(
            &[a("10.244.1.9:7"), a("[fd00:1::9]:7")],
            &[a("10.96.0.5:80"), a("10.96.0.10:53")],
            &[a("172.30.0.1:30080"), a("172.30.0.3:30080")],
        );
        assert_eq!(walk(1, &targets), expected);
        assert_eq!(walk(0, &Targets::default()), Walk::new(&[a("10.244.2.9:7")], &[a("10.96.0.10:53")], &[]));
        let mut dual = nodes.clone();
        dual[0].addresses.push("fd00::1".parse().expect("an address"));
        assert_eq!(super::walk(&dual[1], &dual, &targets), expected, "a port of an IPv4 service is at IPv4 addresses");
        let both = Targets { node_port: Some(node_port("a/c", &["10.96.0.7", "fd00:96::7"])), ..targets.clone() };
        let walked = super::walk(&dual[1], &dual, &both).paths().expect("a walk");
        assert!(walked.contains(&(Way::FromNode, a("[fd00::1]:30080"))), "{walked:?}");
        let alone = [nodes[0].clone()];
        let of_one = super::walk(&alone[0], &alone, &targets);
        assert_eq!(of_one, Walk::new(&[], &[a("10.96.0.5:80"), a("10.96.0.10:53")], &[]));
    }

    #[test]
    fn a_broken_path_is_named_with_its_remedy() {
        let nodes = [node("n1", "172.30.0.1", &["10.244.1.9:7"]), node("n2", "172.30.0.2", &["10.244.2.9:7"])];
        let targets = Targets {
            service: Some(("a/b".into(), a("10.96.0.5:80"))),
            node_port: Some(node_port("a/c", &["10.96.0.7"])),
        };
        for (way, to, path, remedy) in [
            (Way::Probe, "10.244.2.9:7", "path pod on n1 -> pod on n2 (10.244.2.9)", "ip route get 10.244.2.9"),
            (Way::FromPod, "10.96.0.5:80", "path pod on n1 -> service a/b (10.96.0.5:80)", "--node n1"),
            (Way::FromPod, "10.96.0.10:53", "path pod on n1 -> the cluster's DNS (10.96.0.10:53)", "--node n1"),
            (
                Way::FromNode,
                "172.30.0.2:30080",
                "path outside (n1) -> node port 30080 of n2 (service a/c)",
                "firewall of n2",
            ),
        ] {
            let walked = |outcome| line(&nodes[0], &Walked { way, to: a(to), outcome }, &nodes, &targets);
            assert_eq!(walked(Ok(412)), (path.to_owned(), Ok("0.41 ms".to_owned())));
            let (named, why) = walked(Err("no answer".into()));
            let why = why.expect_err("broken");
            assert!(named == path && why.starts_with("no answer; ") && why.contains(remedy), "{why}");
        }
    }

    #[test]
    fn a_node_says_what_it_lacks_and_what_differed() {
        let feature =
            |name: &str, fallback: Option<&str>| Feature { name: name.into(), fallback: fallback.map(Into::into) };
        let mut n = node("n1", "172.30.0.1", &[]);
        n.report.kernel =
            vec![feature("sk_lookup", None), feature("BTF", None), feature("tcx", Some("filters of clsact"))];
        n.report.mtu = Some(1450);
        n.report.revision = 7;
        let said =
            |n: &Node| lines(n).into_iter().map(|(what, verdict)| format!("{what}: {verdict:?}")).collect::<Vec<_>>();
        assert_eq!(
            said(&n),
            [
                r#"kernel of n1: Ok("sk_lookup, BTF; without tcx: filters of clsact")"#,
                r#"maps and routes of n1: Ok("as revision 7 wants them")"#,
                r#"mtu of pods on n1: Ok("1450")"#,
            ]
        );
        n.report.mtu = None;
        n.report.differences = vec!["3 service entries".into()];
        n.report.problems = vec!["no way to 10.244.2.0/24".into()];
        n.report.errors = vec!["no pod can be made".into()];
        let wrong = lines(&n).into_iter().filter(|(_, verdict)| verdict.is_err()).count();
        assert_eq!(wrong, 4);
        assert!(said(&n).iter().any(|l| l.contains("3 service entries")));
    }
}
