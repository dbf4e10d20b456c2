//! Which node answers for an address of the pool in the nodes' network: PURE. Among the nodes that may, each address has
//! an order of its own (rendezvous hashing), so that a node that is lost gives up its addresses and moves no others, and
//! gets them again when it is back; everybody who computes it comes to the same.

use super::{Objects, ready};
use crate::pool::{self, Pool};
use k8s_openapi::api::core::v1::{Node, Service};
use sluice_model as m;
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
};

/// Kubernetes' label of nodes that take no traffic from outside.
const EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";

/// The nodes that may answer.
pub(super) struct Announcers<'a> {
    pool: &'a Pool,
    /// By name, with the hash of the name: computed once, for there are many addresses.
    nodes: BTreeMap<&'a str, u64>,
    /// An address that two services show is the first one's.
    announced: HashSet<IpAddr>,
}

impl<'a> Announcers<'a> {
    pub(super) fn new(o: &'a Objects, pool: &'a Pool) -> Self {
        let nodes = o.nodes.values().filter(|node| !pool.is_empty() && may_answer(node));
        let nodes = nodes.filter_map(|node| node.metadata.name.as_deref()).map(|name| (name, fnv(name.bytes())));
        Self { pool, nodes: nodes.collect(), announced: HashSet::new() }
    }

    /// Of the service, as `object` shows its addresses; none for what no node may answer for.
    pub(super) fn announcements(
        &mut self,
        object: &Service,
        service: &m::Service,
        set: &m::EndpointSet,
    ) -> Vec<m::Announcement> {
        if self.nodes.is_empty() || !pool::asks(object) {
            return vec![];
        }
        let mut addresses: Vec<IpAddr> = pool::ingress(object).filter(|ip| self.pool.contains(*ip)).collect();
        addresses.sort();
        addresses.retain(|ip| self.announced.insert(*ip));
        if addresses.is_empty() {
            return vec![];
        }
        let near: BTreeSet<&str> = match service.external_policy {
            m::ExternalPolicy::Cluster => BTreeSet::new(),
            m::ExternalPolicy::Local => set.endpoints.iter().filter(|e| e.ready).map(|e| e.node.as_str()).collect(),
        };
        let of = |address: IpAddr| {
            let node = match service.external_policy {
                m::ExternalPolicy::Cluster => first(address, self.nodes.iter().map(|(name, hash)| (*name, *hash))),
                m::ExternalPolicy::Local => {
                    first(address, near.iter().filter_map(|name| Some((*name, *self.nodes.get(name)?))))
                }
            };
            Some(m::Announcement { address, node: node?.to_owned() })
        };
        addresses.into_iter().filter_map(of).collect()
    }
}

fn may_answer(node: &Node) -> bool {
    ready(node) && !node.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(EXCLUDED))
}

/// The first in the address's order of the nodes.
fn first<'n>(address: IpAddr, nodes: impl Iterator<Item = (&'n str, u64)>) -> Option<&'n str> {
    let address = match address {
        IpAddr::V4(ip) => fnv(ip.octets()),
        IpAddr::V6(ip) => fnv(ip.octets()),
    };
    let address = mix(address);
    nodes.max_by_key(|(name, hash)| (mix(address ^ hash), *name)).map(|(name, _)| name)
}

/// FNV-1a.
fn fnv(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

/// The finalizer of SplitMix64: names and addresses that differ in a bit come out unrelated.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::{collections::HashMap, sync::Arc};

    const POOL: &str = "192.0.2.0/24,2001:db8::/64";

    /// Nodes as `name`, `name!` for one that is not ready, `name-` for one that takes nothing from outside.
    fn nodes(list: &[&str]) -> Objects {
        let mut o = Objects::default();
        for text in list {
            let name = text.trim_end_matches(['!', '-']);
            let status = if text.ends_with('!') { "Unknown" } else { "True" };
            let labels = if text.ends_with('-') { json!({EXCLUDED: ""}) } else { json!({}) };
            let node = json!({"metadata": {"name": name, "labels": labels},
                "status": {"conditions": [{"type": "Ready", "status": status}]}});
            o.nodes.insert(m::Name::cluster(name), Arc::new(serde_json::from_value(node).expect("a node")));
        }
        o
    }

    /// A service of the pool that has these addresses, with endpoints as `node` or `node!` for one that is not ready.
    struct Case<'a> {
        addresses: &'a [&'a str],
        class: Option<&'a str>,
        policy: m::ExternalPolicy,
        endpoints: &'a [&'a str],
    }

    const CLUSTER: Case<'_> =
        Case { addresses: &["192.0.2.1"], class: None, policy: m::ExternalPolicy::Cluster, endpoints: &[] };

    fn announced(o: &Objects, case: &Case<'_>) -> Vec<(String, String)> {
        let pool: Pool = POOL.parse().expect("a pool");
        announced_by(&mut Announcers::new(o, &pool), case)
    }

    fn announced_by(announcers: &mut Announcers<'_>, case: &Case<'_>) -> Vec<(String, String)> {
        let ingress: Vec<_> = case.addresses.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
        let object = json!({"spec": {"type": "LoadBalancer", "loadBalancerClass": case.class},
            "status": {"loadBalancer": {"ingress": ingress}}});
        let object: Service = serde_json::from_value(object).expect("a service");
        let service = m::Service { external_policy: case.policy, ..m::Service::default() };
        let endpoint = |text: &&str| m::Endpoint {
            address: IpAddr::from([10, 244, 0, 1]),
            ready: !text.ends_with('!'),
            draining: false,
            node: text.trim_end_matches('!').to_owned(),
            zone: String::new(),
            workload: None,
            hostname: None,
            mesh: m::Mesh::Plain,
            ports: vec![],
        };
        let endpoints = case.endpoints.iter().map(endpoint).collect();
        let set = m::EndpointSet { name: m::Name::new("shop", "web"), endpoints };
        let all = announcers.announcements(&object, &service, &set);
        all.into_iter().map(|a| (a.address.to_string(), a.node)).collect()
    }

    fn node_of(o: &Objects, case: &Case<'_>) -> Option<String> {
        announced(o, case).pop().map(|(_, node)| node)
    }

    #[test]
    fn who_may_answer() {
        let local = |endpoints| Case { policy: m::ExternalPolicy::Local, endpoints, ..CLUSTER };
        let table: [(&[&str], Case<'_>, Option<&str>); 11] = [
            (&["n1"], CLUSTER, Some("n1")),
            (&[], CLUSTER, None),
            (&["n1!", "n2"], CLUSTER, Some("n2")),
            (&["n1-", "n2"], CLUSTER, Some("n2")),
            (&["n1!"], CLUSTER, None),
            (&["n1", "n2", "n3"], local(&["n2"]), Some("n2")),
            (&["n1", "n2", "n3"], local(&["n2!", "n3"]), Some("n3")),
            (&["n1", "n2!"], local(&["n2"]), None),
            (&["n1", "n2"], local(&[]), None),
            (&["n1"], Case { addresses: &["198.51.100.1"], ..CLUSTER }, None),
            (&["n1"], Case { class: Some("example.com/other"), ..CLUSTER }, None),
        ];
        for (index, (list, case, want)) in table.iter().enumerate() {
            assert_eq!(node_of(&nodes(list), case).as_deref(), *want, "row {index}");
        }
    }

    #[test]
    fn each_address_is_answered_for_once() {
        let o = nodes(&["n1", "n2"]);
        let both = Case { addresses: &["2001:db8::1", "192.0.2.1"], ..CLUSTER };
        let of = |all: Vec<(String, String)>| all.into_iter().map(|(address, _)| address).collect::<Vec<_>>();
        let pool: Pool = POOL.parse().expect("a pool");
        let mut announcers = Announcers::new(&o, &pool);
        assert_eq!(of(announced_by(&mut announcers, &both)), ["192.0.2.1", "2001:db8::1"]);
        assert_eq!(of(announced_by(&mut announcers, &CLUSTER)), [""; 0], "two services show it");
    }

    #[test]
    fn a_lost_node_moves_only_its_addresses_and_gets_them_again() {
        let texts: Vec<String> = (0..200).map(|n| format!("192.0.2.{n}")).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let case = Case { addresses: &texts, ..CLUSTER };
        let of = |list: &[&str]| announced(&nodes(list), &case).into_iter().collect::<HashMap<_, _>>();
        let before = of(&["n1", "n2", "n3", "n4"]);
        let lost = of(&["n1", "n2!", "n3", "n4"]);
        let mut shares: HashMap<&str, usize> = HashMap::new();
        for (address, node) in &before {
            *shares.entry(node).or_default() += 1;
            if node == "n2" { assert_ne!(lost[address], "n2") } else { assert_eq!(lost[address], *node, "{address}") }
        }
        assert!(shares.len() == 4 && shares.values().all(|n| (30..=70).contains(n)), "{shares:?}");
        assert_eq!(of(&["n1", "n2", "n3", "n4"]), before);
        // Whoever answered for them last is not asked: the choice is the same after any history.
        let local = |endpoints| Case { policy: m::ExternalPolicy::Local, endpoints, ..CLUSTER };
        let o = nodes(&["n1", "n2", "n3"]);
        let first = node_of(&o, &local(&["n1", "n2", "n3"])).expect("a node");
        let rest: Vec<&str> = ["n1", "n2", "n3"].into_iter().filter(|n| *n != first).collect();
        let second = node_of(&o, &local(&rest)).expect("a node");
        assert_ne!(first, second);
        assert_eq!(node_of(&o, &local(&["n1", "n2", "n3"])), Some(first));
    }

    #[test]
    fn the_choice_is_the_same_in_every_release() {
        let o = nodes(&["node-1", "node-2", "node-3"]);
        let case = Case { addresses: &["192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1"], ..CLUSTER };
        let chosen: Vec<String> = announced(&o, &case).into_iter().map(|(_, node)| node).collect();
        assert_eq!(chosen, ["node-2", "node-3", "node-2", "node-1"]);
    }
}
