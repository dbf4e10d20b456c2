//! PURE: whose address, and which service's, by the cluster's state. Pods of this node are asked of the kernel's maps
//! ([`Local`]), which know a pod before the cluster's state does.

use sluice_model::{Protocol, Service, Snapshot};
use sluice_wire::flows::{Dialled, Peer, ServiceRef};
use std::{collections::HashMap, net::IpAddr};

/// IP protocol numbers.
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// Who a network namespace of this node belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A pod, `namespace/name`.
    Pod(String),
    /// The node itself.
    Node,
}

/// What this node's kernel knows.
pub trait Local: Send + Sync {
    /// Whose network namespace has the cookie.
    fn netns(&self, cookie: u64) -> Option<Owner>;
    /// The pod of this node with the address, `namespace/name`.
    fn pod(&self, address: IpAddr) -> Option<String>;
    /// Whether the address is one of this node's own.
    fn is_own(&self, address: IpAddr) -> bool;
    /// Name of the link.
    fn interface(&self, index: u32) -> Option<String>;
}

/// The names in one snapshot. Bounded by it.
#[derive(Clone, Debug, Default)]
pub struct Names {
    peers: HashMap<IpAddr, Peer>,
    services: HashMap<(IpAddr, u16, u8), ServiceRef>,
    node_ports: HashMap<(u16, u8), ServiceRef>,
}

impl Names {
    /// Of several that claim one address the same has it as in the service maps: a service's own addresses go before
    /// external ones, then the first by name.
    pub fn new(snapshot: &Snapshot) -> Self {
        let mut names = Self::default();
        for node in snapshot.nodes() {
            let peer = Peer { pod: None, node: Some(node.name.name.clone()) };
            names.peers.extend(node.addresses.iter().map(|a| (*a, peer.clone())));
        }
        let workloads = snapshot.workloads().flat_map(|w| w.addresses.iter().map(move |a| (*a, &w.name)));
        let endpoints = snapshot.endpoint_sets().flat_map(|s| &s.endpoints);
        let endpoints = endpoints.filter_map(|e| Some((e.address, e.workload.as_ref()?)));
        for (address, pod) in workloads.chain(endpoints) {
            // An address of a node stays the node's: pods of its own network have the same.
            names.peers.entry(address).or_insert_with(|| Peer { pod: Some(pod.to_string()), node: None });
        }
        for service in snapshot.services() {
            names.serve(service, &service.virtual_ips, Dialled::Virtual);
            names.serve_node_ports(service);
        }
        for service in snapshot.services() {
            names.serve(service, &service.external_ips, Dialled::External);
        }
        names
    }

    fn serve(&mut self, service: &Service, addresses: &[IpAddr], by: Dialled) {
        for port in &service.ports {
            let named = ServiceRef { name: service.name.to_string(), port: port.port, by };
            for address in addresses {
                let key = (*address, port.port, number(port.protocol));
                self.services.entry(key).or_insert_with(|| named.clone());
            }
        }
    }

    fn serve_node_ports(&mut self, service: &Service) {
        for port in &service.ports {
            let Some(node_port) = port.node_port else { continue };
            let named = ServiceRef { name: service.name.to_string(), port: port.port, by: Dialled::NodePort };
            self.node_ports.entry((node_port, number(port.protocol))).or_insert(named);
        }
    }

    /// Who has the address; nobody known: an empty peer.
    pub fn peer(&self, address: IpAddr, node: &str, local: &dyn Local) -> Peer {
        if let Some(pod) = local.pod(address) {
            return Peer { pod: Some(pod), node: None };
        }
        match self.peers.get(&address) {
            Some(peer) => peer.clone(),
            None if local.is_own(address) => Peer { pod: None, node: Some(node.to_owned()) },
            None => Peer::default(),
        }
    }

    /// The service that is dialled by the address, port and protocol; an address of a node's stands for node ports.
    pub fn service(&self, address: IpAddr, port: u16, protocol: u8, local: &dyn Local) -> Option<&ServiceRef> {
        if let Some(service) = self.services.get(&(address, port, protocol)) {
            return Some(service);
        }
        let service = self.node_ports.get(&(port, protocol))?;
        let of_node = self.peers.get(&address).is_some_and(|p| p.node.is_some());
        (of_node || address.is_unspecified() || local.is_own(address)).then_some(service)
    }
}

fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => TCP,
        Protocol::Udp => UDP,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use sluice_model::{Endpoint, EndpointSet, Identity, Mesh, Name, Node, Resource, Revision, ServicePort, Workload};

    /// Pods 10.244.1.x of this node by address and cookie, its address 192.168.0.1 and the links 1 to 9.
    pub(crate) struct Here;

    impl Local for Here {
        fn netns(&self, cookie: u64) -> Option<Owner> {
            match cookie {
                1 => Some(Owner::Node),
                2..=9 => Some(Owner::Pod(format!("shop/web-{cookie}"))),
                _ => None,
            }
        }

        fn pod(&self, address: IpAddr) -> Option<String> {
            let IpAddr::V4(a) = address else { return None };
            matches!(a.octets(), [10, 244, 1, 2..=9]).then(|| format!("shop/web-{}", a.octets()[3]))
        }

        fn is_own(&self, address: IpAddr) -> bool {
            address == ip("192.168.0.1") || address == ip("172.31.0.9")
        }

        fn interface(&self, index: u32) -> Option<String> {
            (1..10).contains(&index).then(|| format!("eth{index}"))
        }
    }

    pub(crate) fn ip(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    fn service(name: &str, vips: &[&str], external: &[&str], ports: &[(u16, Option<u16>)]) -> Resource {
        let port = |(port, node_port): &(u16, Option<u16>)| ServicePort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: *port,
            app_protocol: Default::default(),
            node_port: *node_port,
        };
        Resource::Service(Service {
            name: Name::new("shop", name),
            virtual_ips: vips.iter().map(|t| ip(t)).collect(),
            external_ips: external.iter().map(|t| ip(t)).collect(),
            ports: ports.iter().map(port).collect(),
            ..Service::default()
        })
    }

    fn endpoint(address: &str, workload: Option<&str>) -> Endpoint {
        Endpoint {
            address: ip(address),
            ready: true,
            draining: false,
            node: String::new(),
            zone: String::new(),
            workload: workload.map(|w| Name::new("shop", w)),
            hostname: None,
            mesh: Mesh::Plain,
            ports: vec![],
        }
    }

    pub(crate) fn names() -> Names {
        let node = |name: &str, address: &str| {
            let (pod_cidrs, zone) = (vec![], String::new());
            Resource::Node(Node {
                name: Name::cluster(name),
                addresses: vec![ip(address)],
                pod_cidrs,
                zone,
                ready: true,
            })
        };
        let workload = Workload {
            name: Name::new("shop", "cart-1"),
            uid: "u".into(),
            node: "n2".into(),
            addresses: vec![ip("10.244.2.7"), ip("fd00::7")],
            identity: Identity {
                trust_domain: "cluster.local".into(),
                namespace: "shop".into(),
                service_account: "default".into(),
            },
            meshed: false,
            gateway: None,
        };
        let endpoints = vec![
            endpoint("10.244.2.5", Some("api-5")),
            endpoint("192.168.0.2", Some("host-networked")),
            endpoint("10.9.9.9", None),
        ];
        Names::new(&Snapshot::new(
            Revision(1),
            [
                node("n1", "192.168.0.1"),
                node("n2", "192.168.0.2"),
                Resource::Workload(workload),
                Resource::EndpointSet(EndpointSet { name: Name::new("shop", "api"), endpoints }),
                service("api", &["10.96.0.7", "fd01::7"], &["203.0.113.1"], &[(80, Some(30080)), (81, None)]),
                service("web", &["10.96.0.8"], &["203.0.113.1", "10.96.0.7"], &[(80, Some(30081))]),
            ],
        ))
    }

    #[test]
    fn addresses_have_names() {
        let names = names();
        let table = [
            ("10.244.1.2", Some("shop/web-2"), None),
            ("10.244.2.7", Some("shop/cart-1"), None),
            ("fd00::7", Some("shop/cart-1"), None),
            ("10.244.2.5", Some("shop/api-5"), None),
            ("192.168.0.2", None, Some("n2")),
            ("192.168.0.1", None, Some("n1")),
            ("172.31.0.9", None, Some("n1")),
            ("10.9.9.9", None, None),
            ("8.8.8.8", None, None),
        ];
        for (address, pod, node) in table {
            let wanted = Peer { pod: pod.map(str::to_owned), node: node.map(str::to_owned) };
            assert_eq!(names.peer(ip(address), "n1", &Here), wanted, "{address}");
        }
    }

    #[test]
    fn services_are_known_by_every_address_that_means_them() {
        let names = names();
        let table = [
            ("10.96.0.7", 80, TCP, Some(("shop/api", 80, Dialled::Virtual))),
            ("fd01::7", 81, TCP, Some(("shop/api", 81, Dialled::Virtual))),
            ("10.96.0.7", 82, TCP, None),
            ("10.96.0.7", 80, UDP, None),
            ("10.96.0.8", 80, TCP, Some(("shop/web", 80, Dialled::Virtual))),
            ("203.0.113.1", 80, TCP, Some(("shop/api", 80, Dialled::External))),
            ("192.168.0.1", 30080, TCP, Some(("shop/api", 80, Dialled::NodePort))),
            ("192.168.0.2", 30081, TCP, Some(("shop/web", 80, Dialled::NodePort))),
            ("172.31.0.9", 30081, TCP, Some(("shop/web", 80, Dialled::NodePort))),
            ("0.0.0.0", 30081, TCP, Some(("shop/web", 80, Dialled::NodePort))),
            ("10.244.2.5", 30080, TCP, None),
            ("192.168.0.1", 80, TCP, None),
        ];
        for (address, port, protocol, wanted) in table {
            let found = names.service(ip(address), port, protocol, &Here);
            assert_eq!(found.map(|s| (s.name.as_str(), s.port, s.by)), wanted, "{address}:{port}/{protocol}");
        }
    }
}
