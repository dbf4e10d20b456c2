//! PURE: wanted network state against present network state gives operations.
//!
//! A state names links by index, so links that are to be made come first, by a plan of their own ([`plan_links`]). What
//! is removed is only what carries our own route protocol, and what is on a link that is ours alone: other people's
//! addresses, rules and routes are left alone.

use crate::Error;
use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// Index of the loopback link in every namespace.
pub const LO: u32 = 1;
pub const MAIN_TABLE: u32 = 254;
/// Route protocol of what the plugin writes for a pod.
pub const PROTOCOL_POD: u8 = 92;
/// Route protocol of what the agent writes for the node.
pub const PROTOCOL_NODE: u8 = 93;

/// The gateway of every pod, answered by the node.
pub const GATEWAY4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Where the node serves its pods over IPv6: to be connected to, a link-local address would need its link named. Of all
/// nodes the same, like the gateways, and announced to nobody.
pub const SERVER6: Ipv6Addr = Ipv6Addr::new(0xfd73, 0x6c75, 0x6963, 0xfffe, 0, 0, 0, 0x53);
/// Hardware address of the node's end of every pod link: pods need not ask for it.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x5c, 0x00, 0x00, 0x00, 0x01];

pub fn gateway(v4: bool) -> IpAddr {
    if v4 { GATEWAY4.into() } else { GATEWAY6.into() }
}

/// Where the node's own servers for pods listen.
pub fn server(v4: bool) -> IpAddr {
    if v4 { GATEWAY4.into() } else { SERVER6.into() }
}

/// An address range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    pub address: IpAddr,
    pub len: u8,
}

impl Prefix {
    /// A single address.
    pub fn host(address: IpAddr) -> Self {
        Self { address, len: if address.is_ipv4() { 32 } else { 128 } }
    }

    /// Everything of a family.
    pub fn all(v4: bool) -> Self {
        let address = if v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        Self { address, len: 0 }
    }

    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.address, ip) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.len)).unwrap_or(0);
                a.to_bits() & mask == b.to_bits() & mask
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.len)).unwrap_or(0);
                a.to_bits() & mask == b.to_bits() & mask
            }
            _ => false,
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.len)
    }
}

impl FromStr for Prefix {
    type Err = Error;

    /// Bits beyond the length are cleared, as routes need it.
    fn from_str(s: &str) -> Result<Self, Error> {
        let bad = || Error::Prefix(s.to_owned());
        let (address, len) = s.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let len: u8 = len.parse().map_err(|_| bad())?;
        let address = match address {
            IpAddr::V4(a) if len <= 32 => {
                Ipv4Addr::from_bits(a.to_bits() & u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0)).into()
            }
            IpAddr::V6(a) if len <= 128 => {
                Ipv6Addr::from_bits(a.to_bits() & u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0)).into()
            }
            _ => return Err(bad()),
        };
        Ok(Self { address, len })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    pub link: u32,
    pub prefix: Prefix,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RouteKind {
    Unicast,
    /// Delivered here, as `local default dev lo` loops captured traffic.
    Local,
    /// Answered with an ICMP error: an address of our range that no pod has.
    Unreachable,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    pub table: u32,
    pub to: Prefix,
    pub kind: RouteKind,
    pub via: Option<IpAddr>,
    /// `None`: the kernel finds the link by the gateway, or there is none.
    pub link: Option<u32>,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// Larger packets are answered "too big"; `None`: the link's MTU.
    pub mtu: Option<u32>,
    pub protocol: u8,
}

/// Traffic with this mark looks into that table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    pub v4: bool,
    pub priority: u32,
    pub mark: u32,
    pub table: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    pub link: u32,
    pub ip: IpAddr,
    pub mac: [u8; 6],
}

/// Behind which address of the network between nodes a VXLAN link finds a hardware address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Forward {
    pub link: u32,
    pub mac: [u8; 6],
    pub to: IpAddr,
}

/// A VXLAN link: all that it is made with.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Vxlan {
    pub name: String,
    pub vni: u32,
    /// UDP port, here and at the other nodes.
    pub port: u16,
    /// Source of what it sends; its family is that of the network between the nodes. Unspecified: the kernel chooses.
    pub local: IpAddr,
    pub mac: [u8; 6],
    pub mtu: u32,
}

/// State of one namespace, as far as it is ours to want.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub up: BTreeSet<u32>,
    pub addresses: BTreeSet<Address>,
    pub routes: BTreeSet<Route>,
    pub rules: BTreeSet<Rule>,
    pub neighbours: BTreeSet<Neighbour>,
    pub forwards: BTreeSet<Forward>,
    /// Links that are ours alone: addresses, neighbours and forwards on them that nobody wants are removed.
    pub exclusive: BTreeSet<u32>,
}

impl State {
    /// Wants all that the other wants as well.
    pub fn merge(&mut self, other: State) {
        self.up.extend(other.up);
        self.addresses.extend(other.addresses);
        self.routes.extend(other.routes);
        self.rules.extend(other.rules);
        self.neighbours.extend(other.neighbours);
        self.forwards.extend(other.forwards);
        self.exclusive.extend(other.exclusive);
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    MakeVxlan(Vxlan),
    SetMtu { link: u32, mtu: u32 },
    RemoveLink { link: u32, name: String },
    SetUp(u32),
    AddAddress(Address),
    RemoveAddress(Address),
    AddNeighbour(Neighbour),
    RemoveNeighbour(Neighbour),
    AddForward(Forward),
    RemoveForward(Forward),
    AddRoute(Route),
    RemoveRoute(Route),
    AddRule(Rule),
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MakeVxlan(v) => {
                let Vxlan { name, vni, port, .. } = v;
                write!(f, "make link {name} (VXLAN {vni}, UDP port {port})")
            }
            Self::SetMtu { link, mtu } => write!(f, "give link {link} the MTU {mtu}"),
            Self::RemoveLink { name, .. } => write!(f, "remove link {name}"),
            Self::SetUp(link) => write!(f, "set link {link} up"),
            Self::AddAddress(a) => write!(f, "add address {} to link {}", a.prefix, a.link),
            Self::RemoveAddress(a) => write!(f, "remove address {} from link {}", a.prefix, a.link),
            Self::AddNeighbour(n) => write!(f, "add neighbour {} to link {}", n.ip, n.link),
            Self::RemoveNeighbour(n) => write!(f, "remove neighbour {} from link {}", n.ip, n.link),
            Self::AddForward(e) => write!(f, "forward to node {} on link {}", e.to, e.link),
            Self::RemoveForward(e) => write!(f, "end forwarding to node {} on link {}", e.to, e.link),
            Self::AddRoute(r) => write!(f, "add route to {} in table {}", r.to, r.table),
            Self::RemoveRoute(r) => write!(f, "remove route to {} from table {}", r.to, r.table),
            Self::AddRule(r) => write!(f, "add rule for mark {:#x} to table {}", r.mark, r.table),
        }
    }
}

/// Operations that lead from `present` to `wanted`, in an order that the kernel accepts: links, addresses, direct
/// routes before those through a gateway. Routes of protocol `owned` that nobody wants are removed.
pub fn plan(wanted: &State, present: &State, owned: Option<u8>) -> Vec<Operation> {
    let mut operations = Vec::new();
    operations.extend(wanted.up.difference(&present.up).copied().map(Operation::SetUp));
    operations.extend(strays(wanted, present));
    operations.extend(wanted.addresses.difference(&present.addresses).cloned().map(Operation::AddAddress));
    operations.extend(wanted.neighbours.difference(&present.neighbours).cloned().map(Operation::AddNeighbour));
    operations.extend(wanted.forwards.difference(&present.forwards).cloned().map(Operation::AddForward));
    let stray = |r: &&Route| Some(r.protocol) == owned && !wanted.routes.iter().any(|w| same_place(w, r));
    operations.extend(present.routes.iter().filter(stray).cloned().map(Operation::RemoveRoute));
    let missing = |w: &&Route| !present.routes.iter().any(|p| satisfies(p, w));
    let mut routes: Vec<_> = wanted.routes.iter().filter(missing).cloned().collect();
    routes.sort_by_key(|r| r.via.is_some());
    operations.extend(routes.into_iter().map(Operation::AddRoute));
    operations.extend(wanted.rules.difference(&present.rules).cloned().map(Operation::AddRule));
    operations
}

/// What is to go from links that are ours alone. Adding a neighbour or a forward replaces one of the same key; the
/// kernel's own link-local address is no stray.
fn strays(wanted: &State, present: &State) -> Vec<Operation> {
    let ours = |link: u32| wanted.exclusive.contains(&link);
    let mut operations = Vec::new();
    let stray = |a: &&Address| ours(a.link) && !wanted.addresses.contains(a) && !is_link_local(a.prefix.address);
    operations.extend(present.addresses.iter().filter(stray).cloned().map(Operation::RemoveAddress));
    let same = |a: &Neighbour, b: &Neighbour| (a.link, a.ip) == (b.link, b.ip);
    let stray = |n: &&Neighbour| ours(n.link) && !wanted.neighbours.iter().any(|w| same(w, n));
    operations.extend(present.neighbours.iter().filter(stray).cloned().map(Operation::RemoveNeighbour));
    let same = |a: &Forward, b: &Forward| (a.link, a.mac) == (b.link, b.mac);
    let stray = |e: &&Forward| ours(e.link) && !wanted.forwards.iter().any(|w| same(w, e));
    operations.extend(present.forwards.iter().filter(stray).cloned().map(Operation::RemoveForward));
    operations
}

pub(crate) fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}

/// Operations on links, in the order of their parts: first those that make or mend, then, when nothing goes by way of
/// them any more, those that remove.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkPlan {
    pub make: Vec<Operation>,
    pub remove: Vec<Operation>,
}

/// What leads from the present links with names of ours to the wanted ones. A present link that is no VXLAN link, or
/// one made differently, is made anew; only its MTU can be changed in place.
pub fn plan_links(wanted: &[Vxlan], present: &[(u32, String, Option<Vxlan>)]) -> LinkPlan {
    let mut plan = LinkPlan::default();
    let remove = |(link, name, _): &(u32, String, _)| Operation::RemoveLink { link: *link, name: name.clone() };
    for vxlan in wanted {
        let found = present.iter().find(|(_, name, _)| *name == vxlan.name);
        let same = |is: &Vxlan| *is == Vxlan { mtu: is.mtu, ..vxlan.clone() };
        match found {
            Some((link, _, Some(is))) if same(is) => {
                let set = Operation::SetMtu { link: *link, mtu: vxlan.mtu };
                plan.make.extend((is.mtu != vxlan.mtu).then_some(set));
            }
            other => {
                plan.make.extend(other.map(remove));
                plan.make.push(Operation::MakeVxlan(vxlan.clone()));
            }
        }
    }
    let unwanted = |(_, name, _): &&(u32, String, Option<Vxlan>)| !wanted.iter().any(|w| w.name == *name);
    plan.remove.extend(present.iter().filter(unwanted).map(remove));
    plan
}

/// Adding one replaces the other.
fn same_place(a: &Route, b: &Route) -> bool {
    a.table == b.table && a.to == b.to
}

/// Whether a present route does what is wanted; the kernel fills in a link where none was named.
fn satisfies(present: &Route, wanted: &Route) -> bool {
    same_place(present, wanted)
        && present.kind == wanted.kind
        && present.via == wanted.via
        && present.source == wanted.source
        && present.mtu == wanted.mtu
        && (wanted.link.is_none() || present.link == wanted.link)
}

/// How a pod is wired: all that is wanted inside its namespace.
pub fn pod_state(link: u32, addresses: &[IpAddr], capture: Capture) -> State {
    let mut state = State { up: BTreeSet::from([LO, link]), ..State::default() };
    for ip in addresses {
        let (v4, gateway) = (ip.is_ipv4(), gateway(ip.is_ipv4()));
        let route = |to, kind, via, link, source, table| Route {
            table,
            to,
            kind,
            via,
            link: Some(link),
            source,
            mtu: None,
            protocol: PROTOCOL_POD,
        };
        state.addresses.insert(Address { link, prefix: Prefix::host(*ip) });
        state.neighbours.insert(Neighbour { link, ip: gateway, mac: GATEWAY_MAC });
        if v4 {
            state.routes.insert(route(Prefix::host(gateway), RouteKind::Unicast, None, link, None, MAIN_TABLE));
        }
        state.routes.insert(route(Prefix::all(v4), RouteKind::Unicast, Some(gateway), link, None, MAIN_TABLE));
        state.routes.insert(route(Prefix::all(v4), RouteKind::Local, None, LO, Some(*ip), capture.table));
        state.rules.insert(Rule { v4, priority: capture.priority, mark: capture.mark, table: capture.table });
    }
    state
}

/// Numbers of the capture rule.
#[derive(Clone, Copy, Debug)]
pub struct Capture {
    pub mark: u32,
    pub table: u32,
    pub priority: u32,
}

/// What a pod needs on the node's side, where `link` is the node's end of its link and `pod_mac` the other end's
/// hardware address. Both sides know each other's from the start: no first packet waits for an answer, and a node
/// without an address of its own can still forward.
pub fn host_state(link: u32, pod_mac: [u8; 6], addresses: &[IpAddr]) -> State {
    let mut state = State { up: BTreeSet::from([link]), ..State::default() };
    for ip in addresses {
        state.routes.insert(host_route(link, *ip));
        state.neighbours.insert(Neighbour { link, ip: *ip, mac: pod_mac });
        if ip.is_ipv6() {
            state.addresses.insert(Address { link, prefix: Prefix { address: GATEWAY6.into(), len: 64 } });
        }
    }
    state
}

/// The node's route to a pod.
pub fn host_route(link: u32, pod: IpAddr) -> Route {
    Route {
        table: MAIN_TABLE,
        to: Prefix::host(pod),
        kind: RouteKind::Unicast,
        via: None,
        link: Some(link),
        source: None,
        mtu: None,
        protocol: PROTOCOL_POD,
    }
}

/// What a node needs: the pods' gateway address, routes to the other nodes' pods, and no way out for addresses of its
/// own range that no pod has.
pub fn node_state(own_ranges: &[Prefix], others: &[(IpAddr, Prefix)]) -> State {
    let mut state = State { up: BTreeSet::from([LO]), ..State::default() };
    state.addresses.insert(Address { link: LO, prefix: Prefix::host(GATEWAY4.into()) });
    let route = |to, kind, via| Route {
        table: MAIN_TABLE,
        to,
        kind,
        via,
        link: None,
        source: None,
        mtu: None,
        protocol: PROTOCOL_NODE,
    };
    for range in own_ranges {
        state.routes.insert(route(*range, RouteKind::Unreachable, None));
    }
    let foreign = others.iter().filter(|(_, range)| !own_ranges.contains(range));
    state.routes.extend(foreign.map(|(node, range)| route(*range, RouteKind::Unicast, Some(*node))));
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPTURE: Capture = Capture { mark: 1, table: 2, priority: 3 };

    fn ip(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    fn prefix(text: &str) -> Prefix {
        text.parse().expect(text)
    }

    #[test]
    fn prefixes_parse_clear_host_bits_and_contain() {
        assert_eq!(prefix("10.244.1.7/24").to_string(), "10.244.1.0/24");
        assert_eq!(prefix("fd00::1/64").to_string(), "fd00::/64");
        assert!(prefix("10.244.1.0/24").contains(ip("10.244.1.255")));
        assert!(!prefix("10.244.1.0/24").contains(ip("10.244.2.0")));
        assert!(prefix("0.0.0.0/0").contains(ip("1.2.3.4")) && !prefix("0.0.0.0/0").contains(ip("::1")));
        for bad in ["", "10.0.0.0", "10.0.0.0/33", "fd00::/129", "x/8", "10.0.0.0/-1"] {
            assert!(bad.parse::<Prefix>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_fresh_pod_gets_everything_and_a_wired_one_nothing() {
        let wanted = pod_state(2, &[ip("10.244.1.2"), ip("fd00::2")], CAPTURE);
        let operations = plan(&wanted, &State::default(), None);
        assert_eq!(operations.len(), 2 + 2 + 2 + 5 + 2);
        let place = |f: &dyn Fn(&Operation) -> bool| operations.iter().position(f).expect("planned");
        let direct = place(&|o| matches!(o, Operation::AddRoute(r) if r.to == Prefix::host(GATEWAY4.into())));
        let through = place(&|o| matches!(o, Operation::AddRoute(r) if r.via == Some(GATEWAY4.into())));
        assert!(direct < through, "a gateway must be reachable first");
        assert_eq!(plan(&wanted, &wanted, None), []);
    }

    #[test]
    fn only_own_routes_are_removed_and_only_when_not_replaced() {
        let others = [(ip("192.168.0.2"), prefix("10.244.2.0/24"))];
        let wanted = node_state(&[prefix("10.244.1.0/24")], &others);
        let mut present = wanted.clone();
        let moved = Route { via: Some(ip("192.168.0.9")), ..wanted.routes.last().expect("two routes").clone() };
        present.routes.pop_last();
        let stale = Route { to: prefix("10.244.7.0/24"), ..moved.clone() };
        let foreign = Route { protocol: 4, to: prefix("10.244.8.0/24"), ..moved.clone() };
        present.routes.extend([moved, stale.clone(), foreign]);
        let operations = plan(&wanted, &present, Some(PROTOCOL_NODE));
        assert_eq!(operations[0], Operation::RemoveRoute(stale));
        assert!(matches!(&operations[1..], [Operation::AddRoute(r)] if r.via == Some(ip("192.168.0.2"))));
    }

    #[test]
    fn links_are_made_mended_and_removed() {
        let vxlan = |name: &str, mtu| Vxlan {
            name: name.to_owned(),
            vni: 1,
            port: 2,
            local: ip("192.168.0.1"),
            mac: [2, 0, 0, 0, 0, 1],
            mtu,
        };
        let wanted = vxlan("a", 1450);
        let make = || Operation::MakeVxlan(wanted.clone());
        let remove = |name: &str| Operation::RemoveLink { link: 7, name: name.to_owned() };
        let there = |v: Vxlan| (7, v.name.clone(), Some(v));
        for (present, first, last) in [
            (vec![], vec![make()], vec![]),
            (vec![there(wanted.clone())], vec![], vec![]),
            (vec![there(vxlan("a", 1400))], vec![Operation::SetMtu { link: 7, mtu: 1450 }], vec![]),
            (vec![there(Vxlan { vni: 9, ..wanted.clone() })], vec![remove("a"), make()], vec![]),
            (vec![there(Vxlan { local: ip("10.0.0.1"), ..wanted.clone() })], vec![remove("a"), make()], vec![]),
            (vec![(7, "a".to_owned(), None)], vec![remove("a"), make()], vec![]),
            (vec![there(vxlan("b", 1450))], vec![make()], vec![remove("b")]),
        ] {
            let expected = LinkPlan { make: first, remove: last };
            assert_eq!(plan_links(std::slice::from_ref(&wanted), &present), expected, "{present:?}");
        }
    }

    #[test]
    fn a_link_of_ours_is_swept_and_no_other() {
        let neighbour = |link, text: &str, last| Neighbour { link, ip: ip(text), mac: [2, 0, 0, 0, 0, last] };
        let forward = |link, last, to: &str| Forward { link, mac: [2, 0, 0, 0, 0, last], to: ip(to) };
        let address = |link, text: &str| Address { link, prefix: Prefix::host(ip(text)) };
        let wanted = State {
            addresses: [address(5, "10.244.1.0")].into(),
            neighbours: [neighbour(5, "10.244.2.0", 2)].into(),
            forwards: [forward(5, 2, "192.168.2.2")].into(),
            exclusive: [5].into(),
            ..State::default()
        };
        let stale = State {
            addresses: [address(5, "10.244.9.0"), address(5, "fe80::7"), address(6, "10.244.9.0")].into(),
            neighbours: [neighbour(5, "10.244.2.0", 9), neighbour(5, "10.244.3.0", 3), neighbour(6, "10.0.0.1", 4)]
                .into(),
            forwards: [forward(5, 2, "192.168.2.9"), forward(5, 3, "192.168.3.2"), forward(6, 4, "1.1.1.1")].into(),
            ..State::default()
        };
        let expected = [
            Operation::RemoveAddress(address(5, "10.244.9.0")),
            Operation::RemoveNeighbour(neighbour(5, "10.244.3.0", 3)),
            Operation::RemoveForward(forward(5, 3, "192.168.3.2")),
            Operation::AddAddress(address(5, "10.244.1.0")),
            Operation::AddNeighbour(neighbour(5, "10.244.2.0", 2)),
            Operation::AddForward(forward(5, 2, "192.168.2.2")),
        ];
        assert_eq!(plan(&wanted, &stale, None), expected);
        assert_eq!(plan(&wanted, &wanted, None), []);
    }

    #[test]
    fn the_link_that_the_kernel_found_is_accepted() {
        let wanted = node_state(&[], &[(ip("192.168.0.2"), prefix("10.244.2.0/24"))]);
        let mut present = wanted.clone();
        present.routes = wanted.routes.iter().map(|r| Route { link: Some(7), ..r.clone() }).collect();
        assert_eq!(plan(&wanted, &present, Some(PROTOCOL_NODE)), []);
    }
}
