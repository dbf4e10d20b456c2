//! The node's own network: the pods' gateway address, forwarding, the ways to other nodes' pods and to our own.
//!
//! Which way leads to which node is decided in `netlink::between`, anew with every look at the node's devices: a network
//! that is connected later is used from then on.

use sluice_cni::Lease;
use sluice_model::Snapshot;
use sluice_netlink::{
    Connection, Error,
    between::{self, LINKS, Mode},
    kernel, link,
    plan::{Address, LO, Operation, PROTOCOL_NODE, Prefix, SERVER6, State, host_state, node_state},
    sysctl,
};
use std::collections::{BTreeSet, HashMap};
use tokio::sync::watch;

/// Of a pod's link on a node that has no device of its own to take it from: what Ethernet has everywhere.
const DEFAULT_MTU: u32 = 1500;

pub(super) struct Wires {
    connection: Connection,
    mode: Mode,
    /// Pods ask this node over IPv6 too.
    serves6: bool,
    own: between::Node,
    others: Vec<between::Node>,
    /// Routes and links that nobody wants are removed only once a snapshot has said which are wanted.
    told: bool,
    mtu: watch::Sender<Option<u32>>,
    /// Ranges and nodes' addresses to which the next hop is the node that has them.
    adjacent: BTreeSet<Prefix>,
}

impl Wires {
    /// Opens in the calling thread's namespace and gives the node the addresses at which it serves its pods.
    pub(super) fn open(mode: Mode, serves6: bool) -> Result<Self, Error> {
        let (connection, own, others) = (Connection::open()?, between::Node::default(), Vec::new());
        let mut wires = Self {
            connection,
            mode,
            serves6,
            own,
            others,
            told: false,
            mtu: watch::Sender::new(None),
            adjacent: BTreeSet::new(),
        };
        wires.ensure_settings()?;
        wires.reconcile(&[])?;
        Ok(wires)
    }

    /// The MTU that pods are to be made with; nothing before a snapshot has said which nodes there are.
    pub(super) fn pod_mtu(&self) -> watch::Receiver<Option<u32>> {
        self.mtu.subscribe()
    }

    /// With the ranges and nodes' addresses to which the next hop is the node that has them, as last reconciled.
    pub(super) fn parts(&mut self) -> (&mut Connection, &BTreeSet<Prefix>) {
        (&mut self.connection, &self.adjacent)
    }

    pub(super) fn netns_cookie(&self) -> Result<u64, Error> {
        self.connection.netns_cookie()
    }

    pub(super) fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// Forwarding is a switch of the whole namespace; everything else is said per link or route. True when it was off.
    pub(super) fn ensure_settings(&self) -> Result<bool, Error> {
        let v4 = sysctl::ensure("ipv4/ip_forward", "1")?;
        // A kernel without IPv6 has no such file; then there are no IPv6 pods either.
        let v6 = sysctl::get("ipv6/conf/all/forwarding").is_ok() && sysctl::ensure("ipv6/conf/all/forwarding", "1")?;
        if sysctl::reserve_ports()? {
            tracing::info!("reserved node ports and the data path's own ports");
        }
        Ok(v4 || v6)
    }

    /// Takes the nodes from the snapshot.
    pub(super) fn want(&mut self, snapshot: &Snapshot, node: &str, problems: &mut Vec<String>) {
        (self.own, self.others) = nodes(snapshot, node, problems);
        self.told = true;
        // Devices that cannot be read are the next reconciliation's error.
        if let Ok(devices) = link::devices(&mut self.connection) {
            problems.extend(between::choose(self.mode, &self.own, &self.others, &devices).problems);
        }
    }

    /// Makes present what is wanted, for the node and for the pods of these leases; what had to be done.
    pub(super) fn reconcile(&mut self, leases: &[Lease]) -> Result<Vec<Operation>, Error> {
        let pods = self.pods(leases)?;
        if !self.told {
            let mut wanted = node_state(&[], &[]);
            wanted.addresses.extend(server6(self.serves6));
            wanted.merge(pods);
            return kernel::reconcile(&mut self.connection, &wanted, None);
        }
        let devices = link::devices(&mut self.connection)?;
        let ways = between::choose(self.mode, &self.own, &self.others, &devices);
        let links = between::links(&self.own, &ways, &devices);
        let wanted = |indexes: &_| {
            let mut wanted = node_state(&self.own.ranges, &ways.native);
            wanted.addresses.extend(server6(self.serves6));
            wanted.merge(between::state(&self.own, &ways, &links, indexes));
            wanted.merge(pods);
            wanted
        };
        let done = kernel::reconcile_links(&mut self.connection, &LINKS, &links, wanted, Some(PROTOCOL_NODE));
        let mtu = between::pod_mtu(self.mode, &self.own, &ways, &devices).unwrap_or(DEFAULT_MTU);
        self.mtu.send_if_modified(|now| now.replace(mtu) != Some(mtu));
        let done = done?;
        self.adjacent = ways.adjacent().collect();
        for link in &links {
            // Loose: another node answers a pod by this link from its own address, to which the way is another.
            sysctl::ensure(&format!("ipv4/conf/{}/rp_filter", link.name), "2")?;
        }
        Ok(done)
    }

    /// What the pods of these leases need on the node's side.
    fn pods(&mut self, leases: &[Lease]) -> Result<State, Error> {
        let mut wanted = State::default();
        if leases.is_empty() {
            return Ok(wanted);
        }
        let links: HashMap<String, link::Found> = link::all(&mut self.connection)?.into_iter().collect();
        for lease in leases {
            // No link: a pod that is being made, or whose namespace has gone.
            let Some(found) = links.get(&lease.link) else { continue };
            wanted.merge(host_state(found.index, lease.mac, &lease.addresses));
        }
        Ok(wanted)
    }
}

fn server6(serves: bool) -> Option<Address> {
    serves.then(|| Address { link: LO, prefix: Prefix::host(SERVER6.into()) })
}

/// PURE: this node and the others, as far as their pod ranges can be read.
fn nodes(snapshot: &Snapshot, own: &str, problems: &mut Vec<String>) -> (between::Node, Vec<between::Node>) {
    let mut all: Vec<between::Node> = Vec::new();
    for n in snapshot.nodes() {
        let mut ranges: Vec<Prefix> = Vec::new();
        for text in &n.pod_cidrs {
            match text.parse() {
                Ok(range) => ranges.push(range),
                Err(_) => problems.push(format!("node {}: pod range {text:?} is no address range", n.name)),
            }
        }
        all.push(between::Node { name: n.name.name.clone(), addresses: n.addresses.clone(), ranges });
    }
    match all.iter().position(|n| n.name == own) {
        Some(at) => (all.remove(at), all),
        // Its name alone says which hardware address its tunnels have.
        None => (between::Node { name: own.to_owned(), ..between::Node::default() }, all),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::{Name, Node, Resource, Revision};

    #[test]
    fn nodes_and_their_ranges_come_from_the_snapshot() {
        let node = |name: &str, address: &str, ranges: &[&str]| {
            Resource::Node(Node {
                name: Name::cluster(name),
                addresses: vec![address.parse().expect(address)],
                pod_cidrs: ranges.iter().map(|r| (*r).to_owned()).collect(),
                zone: String::new(),
                ready: true,
            })
        };
        let s = Snapshot::new(
            Revision(1),
            [
                node("n1", "192.168.0.1", &["10.244.1.0/24"]),
                node("n2", "192.168.0.2", &["10.244.2.0/24", "fd00:2::/64"]),
                node("n3", "192.168.0.3", &["junk"]),
            ],
        );
        let mut problems = vec![];
        let range = |text: &str| text.parse::<Prefix>().expect(text);
        let (own, others) = nodes(&s, "n1", &mut problems);
        assert_eq!((own.name.as_str(), own.ranges), ("n1", vec![range("10.244.1.0/24")]));
        let other = |n: &between::Node| (n.name.clone(), n.ranges.clone());
        let expected = [("n2", vec![range("10.244.2.0/24"), range("fd00:2::/64")]), ("n3", vec![])];
        assert_eq!(others.iter().map(other).collect::<Vec<_>>(), expected.map(|(n, r)| (n.to_owned(), r)));
        assert_eq!(problems.len(), 1);
        let (own, others) = nodes(&s, "n9", &mut vec![]);
        assert_eq!((own.name.as_str(), own.ranges.len(), others.len()), ("n9", 0, 3));
    }
}
