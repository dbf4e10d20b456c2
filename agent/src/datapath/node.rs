//! The node's own network: the pods' gateway address, forwarding, routes to other nodes' pods and to our own.

use sluice_cni::Lease;
use sluice_model::Snapshot;
use sluice_netlink::{
    Connection, Error, kernel, link,
    plan::{Operation, PROTOCOL_NODE, Prefix, State, host_state, node_state, plan},
    sysctl,
};
use std::{collections::HashMap, net::IpAddr};

pub(super) struct Wires {
    connection: Connection,
    wanted: State,
    /// As read at the last reconciliation.
    present: State,
    /// Routes that nobody wants are removed only once a snapshot has said which are wanted.
    told: bool,
}

impl Wires {
    /// Opens in the calling thread's namespace and gives the node the pods' gateway address.
    pub(super) fn open() -> Result<Self, Error> {
        let mut wires = Self {
            connection: Connection::open()?,
            wanted: node_state(&[], &[]),
            present: State::default(),
            told: false,
        };
        wires.ensure_settings()?;
        wires.reconcile(&[])?;
        Ok(wires)
    }

    pub(super) fn netns_cookie(&self) -> Result<u64, Error> {
        self.connection.netns_cookie()
    }

    /// The node's links with its addresses, as they were at the last reconciliation.
    pub(super) fn parts(&mut self) -> (&mut Connection, &State) {
        (&mut self.connection, &self.present)
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

    /// Takes the wanted routes from the snapshot.
    pub(super) fn want(&mut self, snapshot: &Snapshot, node: &str, problems: &mut Vec<String>) {
        let (own, others) = routes(snapshot, node, problems);
        self.wanted = node_state(&own, &others);
        self.told = true;
    }

    /// Makes present what is wanted, for the node and for the pods of these leases; what had to be done.
    pub(super) fn reconcile(&mut self, leases: &[Lease]) -> Result<Vec<Operation>, Error> {
        let mut wanted = self.wanted.clone();
        if !leases.is_empty() {
            let links: HashMap<String, link::Found> = link::all(&mut self.connection)?.into_iter().collect();
            for lease in leases {
                // No link: a pod that is being made, or whose namespace has gone.
                let Some(found) = links.get(&lease.link) else { continue };
                let State { up, addresses, routes, neighbours, .. } =
                    host_state(found.index, lease.mac, &lease.addresses);
                wanted.up.extend(up);
                wanted.addresses.extend(addresses);
                wanted.routes.extend(routes);
                wanted.neighbours.extend(neighbours);
            }
        }
        let owned = self.told.then_some(PROTOCOL_NODE);
        self.present = kernel::read(&mut self.connection)?;
        let operations = plan(&wanted, &self.present, owned);
        kernel::apply(&mut self.connection, &operations)?;
        Ok(operations)
    }
}

/// PURE: own pod ranges, and (node address, pod range) of every other node.
fn routes(snapshot: &Snapshot, node: &str, problems: &mut Vec<String>) -> (Vec<Prefix>, Vec<(IpAddr, Prefix)>) {
    let (mut own, mut others) = (Vec::new(), Vec::new());
    for n in snapshot.nodes() {
        for text in &n.pod_cidrs {
            let Ok(range) = text.parse::<Prefix>() else {
                problems.push(format!("node {}: pod range {text:?} is no address range", n.name));
                continue;
            };
            if n.name.name == node {
                own.push(range);
                continue;
            }
            match n.addresses.iter().find(|a| a.is_ipv4() == range.address.is_ipv4()) {
                Some(address) => others.push((*address, range)),
                None => problems.push(format!("node {}: no address of the family of its range {range}", n.name)),
            }
        }
    }
    (own, others)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::{Name, Node, Resource, Revision};

    #[test]
    fn other_nodes_ranges_go_by_their_address_of_the_same_family() {
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
        let (own, others) = routes(&s, "n1", &mut problems);
        assert_eq!(own, ["10.244.1.0/24".parse().expect("range")]);
        assert_eq!(others, [("192.168.0.2".parse().expect("ip"), "10.244.2.0/24".parse().expect("range"))]);
        assert_eq!(problems.len(), 2);
    }
}
