//! PURE: the ways from this node to the pods of other nodes. Natively, by a route through the other node's address, where
//! both are in one network; otherwise through VXLAN, which any network that carries UDP between the nodes carries too.
//!
//! Nothing is exchanged between nodes for it: the hardware address of a node's VXLAN links follows from its name, so
//! every node can write the entries for all others by itself. Carrying out is `kernel::reconcile_links`.

use crate::{
    link::Device,
    plan::{Address, Forward, MAIN_TABLE, Neighbour, PROTOCOL_NODE, Prefix, Route, RouteKind, State, Vxlan},
};
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// The links and the families of the networks that they use: a link sends by one family, and carries pods' packets of
/// both.
pub const LINKS: [(&str, bool); 2] = [("slcvx4", true), ("slcvx6", false)];
/// Not 4789, which NSX, Calico and others hold or filter; 8472 is what Linux itself takes when nobody asks, and what
/// firewalls between Kubernetes nodes are usually open for.
pub const PORT: u16 = 8472;
/// Told apart by this from what others (flannel: 1) send to the same port.
pub const VNI: u32 = 0x51c;

/// The least that IPv6 works with. Underlays that are smaller carry the tunnel's packets in fragments.
pub const LEAST_MTU: u32 = 1280;
/// VXLAN and UDP headers, the inner Ethernet header.
const ENCAPSULATION: u32 = 8 + 8 + 14;
const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;

/// Which pairs of nodes use VXLAN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Those that share no network.
    #[default]
    Auto,
    /// All.
    Always,
    /// None: between networks, routers must know the pods' ranges.
    Never,
}

/// A node as the cluster knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    /// In the network between the nodes, the preferred one first.
    pub addresses: Vec<IpAddr>,
    /// Of its pods.
    pub ranges: Vec<Prefix>,
}

/// The ways that were chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ways {
    /// Ranges and the node's address that leads there.
    pub native: Vec<(IpAddr, Prefix)>,
    pub tunnelled: Vec<Pair>,
    /// Ranges to which there is no way, and why.
    pub problems: Vec<String>,
}

impl Ways {
    /// Ranges and nodes' addresses to which the next hop is the node that has them.
    pub fn adjacent(&self) -> impl Iterator<Item = Prefix> + '_ {
        let native = self.native.iter().flat_map(|(node, range)| [Prefix::host(*node), *range]);
        native.chain(self.tunnelled.iter().flat_map(|p| p.ranges.iter().copied()))
    }
}

/// A node that is reached through VXLAN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    pub node: String,
    pub address: IpAddr,
    /// All whose packets go to it this way.
    pub ranges: Vec<Prefix>,
}

/// Chooses the way to each other node, by this node's devices. Both nodes of a pair come to the same way: a node
/// without a tunnel link receives nothing that is sent to it.
pub fn choose(mode: Mode, own: &Node, others: &[Node], devices: &[Device]) -> Ways {
    let mut ways = Ways::default();
    let own_families = families(own, devices);
    let direct = |ip: IpAddr| own_families.contains(&ip.is_ipv4()) && outward(devices).any(|d| d.reaches(ip));
    let mut holders: HashMap<Prefix, &str> = own.ranges.iter().map(|r| (*r, own.name.as_str())).collect();
    for other in others {
        let mut through = Vec::new();
        for range in &other.ranges {
            // Two routes to one range would take each other's place for ever.
            if let Some(holder) = holders.get(range) {
                ways.problems.push(format!("node {}: its range {range} is that of node {holder}", other.name));
                continue;
            }
            holders.insert(*range, &other.name);
            let next = other.addresses.iter().find(|a| a.is_ipv4() == range.address.is_ipv4());
            match (mode, next) {
                (Mode::Auto | Mode::Never, Some(next)) if direct(*next) => ways.native.push((*next, *range)),
                (Mode::Auto | Mode::Always, _) => through.push(*range),
                (Mode::Never, next) => ways.problems.push(no_way(other, *range, next.copied())),
            }
        }
        if through.is_empty() {
            continue;
        }
        match common(&own_families, other) {
            Some(address) => ways.tunnelled.push(Pair { node: other.name.clone(), address, ranges: through }),
            None => ways.problems.push(format!(
                "node {}: no way to its pods: it has no address of a family that this node has one of",
                other.name
            )),
        }
    }
    ways
}

/// Families of this node's addresses as the others know them, the preferred one first. Before the cluster knows any, of
/// those that its devices have.
fn families(own: &Node, devices: &[Device]) -> Vec<bool> {
    match own.addresses.is_empty() {
        true => [true, false].into_iter().filter(|v4| outward(devices).any(|d| d.primary(*v4).is_some())).collect(),
        false => own.addresses.iter().map(IpAddr::is_ipv4).collect(),
    }
}

/// The other node's address that a tunnel leads to. Where the nodes prefer different families, and have both, IPv4:
/// each must choose what the other chooses.
fn common(own: &[bool], other: &Node) -> Option<IpAddr> {
    let preferred = other.addresses.first().map(IpAddr::is_ipv4).filter(|v4| own.first() == Some(v4));
    let order = preferred.into_iter().chain([true, false]);
    let mut both = order.filter(|v4| own.contains(v4));
    both.find_map(|v4| other.addresses.iter().find(|a| a.is_ipv4() == v4)).copied()
}

fn no_way(other: &Node, range: Prefix, next: Option<IpAddr>) -> String {
    let name = &other.name;
    match next {
        Some(next) => format!(
            "node {name}: its address {next} is in no network of this node and tunnels are off: {range} is reached \
             only if the routers between know it (or with --tunnel=auto)"
        ),
        None => format!("node {name}: no address of the family of its range {range} (--tunnel=auto needs none)"),
    }
}

/// The VXLAN links that the ways need; none when no pair uses one.
pub fn links(own: &Node, ways: &Ways, devices: &[Device]) -> Vec<Vxlan> {
    let needed = |v4: bool| ways.tunnelled.iter().any(|p| p.address.is_ipv4() == v4);
    LINKS
        .into_iter()
        .filter(|(_, v4)| needed(*v4))
        .map(|(name, v4)| Vxlan {
            name: name.to_owned(),
            vni: VNI,
            port: PORT,
            local: source(own, devices, v4).unwrap_or_else(|| unspecified(v4)),
            mac: mac(&own.name),
            mtu: underlay_mtu(own, devices, Some(v4)).map_or(1500 - overhead(v4), |m| inner(m, v4)),
        })
        .collect()
}

/// What is wanted on the VXLAN links of these indexes and through them.
pub fn state(own: &Node, ways: &Ways, links: &[Vxlan], indexes: &HashMap<String, u32>) -> State {
    let mut state = State::default();
    for vxlan in links {
        let Some(link) = indexes.get(&vxlan.name).copied() else { continue };
        state.up.insert(link);
        state.exclusive.insert(link);
        // What the node itself sends to pods comes from here: an answer to its own address would take another way.
        let addresses = own.ranges.iter().filter_map(first).map(|ip| Address { link, prefix: Prefix::host(ip) });
        state.addresses.extend(addresses);
        for pair in ways.tunnelled.iter().filter(|p| p.address.is_ipv4() == vxlan.local.is_ipv4()) {
            let mac = mac(&pair.node);
            state.forwards.insert(Forward { link, mac, to: pair.address });
            for range in &pair.ranges {
                let via = gateway(*range, mac);
                state.neighbours.insert(Neighbour { link, ip: via, mac });
                state.routes.insert(Route {
                    table: MAIN_TABLE,
                    to: *range,
                    kind: RouteKind::Unicast,
                    via: Some(via),
                    link: Some(link),
                    source: None,
                    mtu: Some(vxlan.mtu),
                    protocol: PROTOCOL_NODE,
                });
            }
        }
    }
    state
}

/// The MTU that pods of this node are made with: all of the link's while no pair needs VXLAN. Pods that are there when
/// one begins to are told "too big" by the node, by the route's MTU.
pub fn pod_mtu(mode: Mode, own: &Node, ways: &Ways, devices: &[Device]) -> Option<u32> {
    let mtu = underlay_mtu(own, devices, None)?;
    let families = ways.tunnelled.iter().map(|p| p.address.is_ipv4());
    // Before there is another node, the family in which this one is known.
    let first = || (mode == Mode::Always).then(|| own.addresses.first().is_none_or(IpAddr::is_ipv4));
    // IPv6 costs more.
    let mtu = match families.min().or_else(first) {
        Some(v4) => inner(mtu, v4),
        None => mtu,
    };
    Some(mtu.clamp(LEAST_MTU, 65535))
}

/// The hardware address of a node's VXLAN links: locally administered, by the node's name. The function is a promise
/// between nodes of different versions.
pub fn mac(node: &str) -> [u8; 6] {
    // FNV-1a, then the finalizer of SplitMix64: names that differ in their last digit must differ everywhere.
    let mut h = node.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let [.., a, b, c, d, e, f] = (h ^ (h >> 31)).to_be_bytes();
    [a & 0xfc | 0x02, b, c, d, e, f]
}

/// The next hop to a range: its first address, which no pod has; for IPv6 the link-local address that follows from the
/// hardware address, because the kernel takes no other that one of its routes leads elsewhere.
fn gateway(range: Prefix, mac: [u8; 6]) -> IpAddr {
    match range.address {
        IpAddr::V4(_) => range.address,
        IpAddr::V6(_) => {
            let [a, b, c, d, e, f] = mac.map(u16::from);
            Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f).into()
        }
    }
}

/// The first address of a range, unless the range is so small that a pod can have it.
fn first(range: &Prefix) -> Option<IpAddr> {
    let bits = if range.address.is_ipv4() { 32 } else { 128 };
    (range.len + 2 <= bits).then_some(range.address)
}

/// Devices that lead out of the node; our own links lead through them.
fn outward(devices: &[Device]) -> impl Iterator<Item = &Device> {
    devices.iter().filter(|d| LINKS.iter().all(|(name, _)| d.name != *name))
}

/// The address that this node sends from: its own as the cluster knows it, if a device has it. Behind a translating
/// router none has, and the kernel chooses.
fn source(own: &Node, devices: &[Device], v4: bool) -> Option<IpAddr> {
    let held = |ip: &IpAddr| outward(devices).any(|d| d.addresses.iter().any(|p| p.address == *ip));
    own.addresses.iter().filter(|a| a.is_ipv4() == v4).find(|a| held(a)).copied()
}

/// MTU of the device that has this node's address (in one family or any); where none has it, of the smallest.
fn underlay_mtu(own: &Node, devices: &[Device], v4: Option<bool>) -> Option<u32> {
    let of = |ip: &IpAddr| v4.is_none_or(|v4| ip.is_ipv4() == v4) && own.addresses.contains(ip);
    let holds = |d: &&Device| d.addresses.iter().any(|p| of(&p.address));
    let mtus = outward(devices).filter(holds).map(|d| d.mtu);
    mtus.min().or_else(|| outward(devices).map(|d| d.mtu).min())
}

fn overhead(v4: bool) -> u32 {
    ENCAPSULATION + if v4 { IPV4_HEADER } else { IPV6_HEADER }
}

fn inner(mtu: u32, v4: bool) -> u32 {
    mtu.saturating_sub(overhead(v4)).max(LEAST_MTU)
}

fn unspecified(v4: bool) -> IpAddr {
    if v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    fn prefix(text: &str) -> Prefix {
        let (address, len) = text.split_once('/').expect(text);
        Prefix { address: ip(address), len: len.parse().expect(text) }
    }

    fn node(name: &str, addresses: &[&str], ranges: &[&str]) -> Node {
        Node {
            name: name.to_owned(),
            addresses: addresses.iter().map(|a| ip(a)).collect(),
            ranges: ranges.iter().map(|r| prefix(r)).collect(),
        }
    }

    fn device(name: &str, mtu: u32, addresses: &[&str]) -> Device {
        let addresses = addresses.iter().map(|a| prefix(a)).collect();
        Device { index: 2, name: name.to_owned(), kind: None, mac: [2, 0, 0, 0, 0, 1], mtu, addresses }
    }

    /// Native ranges, then those through VXLAN with the address they go to, then how many have no way.
    fn outcome(ways: &Ways) -> (Vec<String>, Vec<String>, usize) {
        let native = ways.native.iter().map(|(via, range)| format!("{range} via {via}")).collect();
        let pairs = ways.tunnelled.iter().flat_map(|p| p.ranges.iter().map(|r| format!("{r} to {}", p.address)));
        (native, pairs.collect(), ways.problems.len())
    }

    #[test]
    fn the_way_to_each_node() {
        use Mode::{Always, Auto, Never};
        let own = node("a", &["192.168.1.1", "fd00::1"], &["10.244.1.0/24", "fd01::/64"]);
        let devices =
            [device("eth0", 1500, &["192.168.1.1/24", "fd00::1/64"]), device("slcvx4", 1450, &["192.168.2.9/24"])];
        let near = node("b", &["192.168.1.2"], &["10.244.2.0/24"]);
        let near_both = node("b", &["192.168.1.2"], &["10.244.2.0/24", "fd02::/64"]);
        let far = node("c", &["192.168.2.2"], &["10.244.3.0/24", "fd03::/64"]);
        let far6 = node("c", &["fd99::2"], &["10.244.3.0/24"]);
        let lost = node("d", &[], &["10.244.4.0/24"]);
        let twin = node("e", &["192.168.1.5"], &["10.244.1.0/24"]);
        for (mode, other, native, tunnelled, problems) in [
            (Auto, &near, vec!["10.244.2.0/24 via 192.168.1.2"], vec![], 0),
            (Never, &near, vec!["10.244.2.0/24 via 192.168.1.2"], vec![], 0),
            (Always, &near, vec![], vec!["10.244.2.0/24 to 192.168.1.2"], 0),
            (Auto, &near_both, vec!["10.244.2.0/24 via 192.168.1.2"], vec!["fd02::/64 to 192.168.1.2"], 0),
            (Never, &near_both, vec!["10.244.2.0/24 via 192.168.1.2"], vec![], 1),
            (Auto, &far, vec![], vec!["10.244.3.0/24 to 192.168.2.2", "fd03::/64 to 192.168.2.2"], 0),
            (Never, &far, vec![], vec![], 2),
            (Auto, &far6, vec![], vec!["10.244.3.0/24 to fd99::2"], 0),
            (Auto, &lost, vec![], vec![], 1),
            (Always, &lost, vec![], vec![], 1),
            (Auto, &twin, vec![], vec![], 1),
        ] {
            let ways = choose(mode, &own, std::slice::from_ref(other), &devices);
            let (got_native, got_tunnelled, got_problems) = outcome(&ways);
            let case = format!("{mode:?} {other:?}");
            assert_eq!((got_native, got_tunnelled), (texts(&native), texts(&tunnelled)), "{case}");
            assert_eq!(got_problems, problems, "{case}");
        }
        // A node that has no IPv6 cannot send through it.
        let plain = node("a", &["192.168.1.1"], &["10.244.1.0/24"]);
        let ways = choose(Auto, &plain, &[far6], &[device("eth0", 1500, &["192.168.1.1/24"])]);
        assert_eq!((ways.tunnelled.len(), ways.problems.len()), (0, 1));
    }

    #[test]
    fn both_nodes_of_a_pair_choose_the_same() {
        let texts = ["192.168.1.1", "fd00::1", "192.168.2.1", "fd02::1"];
        let [a4, a6, b4, b6] = texts;
        for (a, b, expected) in [
            (vec![a4, a6], vec![b4, b6], Some(true)),
            (vec![a6, a4], vec![b6, b4], Some(false)),
            (vec![a6, a4], vec![b4, b6], Some(true)),
            (vec![a6, a4], vec![b6], Some(false)),
            (vec![a4, a6], vec![b6], Some(false)),
            (vec![a4], vec![b6], None),
            (vec![], vec![b6], None),
        ] {
            let (a, b) = (node("a", &a, &["10.244.1.0/24"]), node("b", &b, &["10.244.2.0/24"]));
            let family = |own: &Node, other: &Node| {
                let ways = choose(Mode::Always, own, std::slice::from_ref(other), &[]);
                ways.tunnelled.first().map(|p| p.address.is_ipv4())
            };
            assert_eq!((family(&a, &b), family(&b, &a)), (expected, expected), "{a:?} {b:?}");
        }
        // One network of both families, but one node is known by IPv4 alone.
        let eth0 = [device("eth0", 1500, &["192.168.1.1/24", "fd00::1/64"])];
        let a = node("a", &["192.168.1.1", "fd00::1"], &["fd01::/64"]);
        let b = node("b", &["192.168.1.2"], &["fd02::/64"]);
        for (own, other) in [(&a, &b), (&b, &a)] {
            let ways = choose(Mode::Auto, own, std::slice::from_ref(other), &eth0);
            assert_eq!((ways.native.len(), ways.tunnelled.len()), (0, 1), "{own:?}");
        }
        // A range that two nodes claim goes to one of them.
        let thief = node("c", &["192.168.1.3"], &["fd02::/64"]);
        let ways = choose(Mode::Auto, &a, &[b, thief], &eth0);
        assert_eq!((ways.tunnelled.len(), ways.problems.len()), (1, 1));
        assert!(ways.problems[0].contains("node c") && ways.problems[0].contains("node b"), "{:?}", ways.problems);
    }

    fn texts(all: &[&str]) -> Vec<String> {
        all.iter().map(|t| (*t).to_owned()).collect()
    }

    #[test]
    fn links_and_what_is_on_them() {
        let own = node("a", &["192.168.1.1"], &["10.244.1.0/24", "fd01::/64"]);
        let devices = [device("eth0", 9000, &["192.168.1.1/24"]), device("docker0", 1500, &["172.17.0.1/16"])];
        assert_eq!(links(&own, &Ways::default(), &devices), []);
        let far = node("c", &["192.168.2.2"], &["10.244.3.0/24", "fd03::/64"]);
        let ways = choose(Mode::Auto, &own, &[far], &devices);
        let made = links(&own, &ways, &devices);
        let [vxlan] = &made[..] else { panic!("{made:?}") };
        assert_eq!((vxlan.name.as_str(), vxlan.mtu, vxlan.local), ("slcvx4", 8950, ip("192.168.1.1")));
        assert_eq!(state(&own, &ways, &made, &HashMap::new()), State::default(), "no link yet");
        let state = state(&own, &ways, &made, &[("slcvx4".to_owned(), 7)].into());
        let addresses: Vec<_> = state.addresses.iter().map(|a| a.prefix.to_string()).collect();
        assert_eq!(addresses, ["10.244.1.0/32", "fd01::/128"]);
        assert_eq!(state.forwards.iter().map(|e| (e.mac, e.to)).collect::<Vec<_>>(), [(mac("c"), ip("192.168.2.2"))]);
        let vias: Vec<_> = state.routes.iter().map(|r| (r.to.to_string(), r.via, r.mtu)).collect();
        let [(_, four, mtu), (_, Some(IpAddr::V6(six)), _)] = &vias[..] else { panic!("{vias:?}") };
        assert_eq!((*four, *mtu), (Some(ip("10.244.3.0")), Some(8950)));
        assert!(six.is_unicast_link_local() && state.neighbours.len() == 2);
    }

    #[test]
    fn mtus() {
        use Mode::{Always, Auto, Never};
        let own = node("a", &["192.168.1.1", "fd00::1"], &["10.244.1.0/24"]);
        let own6 = node("a", &["fd00::1"], &["fd01::/64"]);
        let near = node("b", &["192.168.1.2"], &["10.244.2.0/24"]);
        let far = node("c", &["192.168.2.2"], &["10.244.3.0/24"]);
        let far6 = node("d", &["fd99::2"], &["10.244.4.0/24"]);
        let eth = |mtu| vec![device("eth0", mtu, &["192.168.1.1/24", "fd00::1/64"]), device("br0", 1400, &[])];
        for (mode, own, others, mtu, expected) in [
            (Auto, &own, vec![&near], 1500, 1500),
            (Auto, &own, vec![], 9000, 9000),
            (Auto, &own, vec![&near, &far], 1500, 1450),
            (Auto, &own, vec![&far, &far6], 1500, 1430),
            (Never, &own, vec![&near, &far], 1500, 1500),
            (Always, &own, vec![], 1500, 1450),
            (Always, &own6, vec![], 1500, 1430),
            (Always, &own, vec![&near], 1500, 1450),
            (Auto, &own, vec![&far], 1300, 1280),
        ] {
            let others: Vec<_> = others.into_iter().cloned().collect();
            let ways = choose(mode, own, &others, &eth(mtu));
            assert_eq!(pod_mtu(mode, own, &ways, &eth(mtu)), Some(expected), "{mode:?} {others:?} {mtu}");
        }
        assert_eq!(pod_mtu(Auto, &own, &Ways::default(), &[]), None);
        let elsewhere = node("a", &["203.0.113.1"], &[]);
        assert_eq!(pod_mtu(Auto, &elsewhere, &Ways::default(), &eth(1500)), Some(1400), "the smallest");
    }

    #[test]
    fn hardware_addresses_are_a_promise() {
        assert_eq!(mac("node-1"), mac("node-1"));
        let all: std::collections::BTreeSet<_> = (0..20_000).map(|n| mac(&format!("node-{n}"))).collect();
        assert_eq!(all.len(), 20_000);
        assert!(all.iter().all(|m| m[0] & 3 == 2), "locally administered, of one machine");
        assert_eq!(mac("node-1").map(|b| format!("{b:02x}")).join(":"), "0e:4e:f3:07:e6:55");
    }
}
