//! PURE: wanted network state against present network state gives operations.
//!
//! Links are named by index here; making them is not planned, because everything else hangs on the new index. What is
//! removed is only what carries our own route protocol: other people's addresses, rules and routes are left alone.

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
/// Hardware address of the node's end of every pod link: pods need not ask for it.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x5c, 0x00, 0x00, 0x00, 0x01];

pub fn gateway(v4: bool) -> IpAddr {
    if v4 { GATEWAY4.into() } else { GATEWAY6.into() }
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

/// State of one namespace, as far as it is ours to want.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub up: BTreeSet<u32>,
    pub addresses: BTreeSet<Address>,
    pub routes: BTreeSet<Route>,
    pub rules: BTreeSet<Rule>,
    pub neighbours: BTreeSet<Neighbour>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    SetUp(u32),
    AddAddress(Address),
    AddNeighbour(Neighbour),
    AddRoute(Route),
    RemoveRoute(Route),
    AddRule(Rule),
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetUp(link) => write!(f, "set link {link} up"),
            Self::AddAddress(a) => write!(f, "add address {} to link {}", a.prefix, a.link),
            Self::AddNeighbour(n) => write!(f, "add neighbour {} to link {}", n.ip, n.link),
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
    operations.extend(wanted.addresses.difference(&present.addresses).cloned().map(Operation::AddAddress));
    operations.extend(wanted.neighbours.difference(&present.neighbours).cloned().map(Operation::AddNeighbour));
    let stray = |r: &&Route| Some(r.protocol) == owned && !wanted.routes.iter().any(|w| same_place(w, r));
    operations.extend(present.routes.iter().filter(stray).cloned().map(Operation::RemoveRoute));
    let missing = |w: &&Route| !present.routes.iter().any(|p| satisfies(p, w));
    let mut routes: Vec<_> = wanted.routes.iter().filter(missing).cloned().collect();
    routes.sort_by_key(|r| r.via.is_some());
    operations.extend(routes.into_iter().map(Operation::AddRoute));
    operations.extend(wanted.rules.difference(&present.rules).cloned().map(Operation::AddRule));
    operations
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
        protocol: PROTOCOL_POD,
    }
}

/// What a node needs: the pods' gateway address, routes to the other nodes' pods, and no way out for addresses of its
/// own range that no pod has.
pub fn node_state(own_ranges: &[Prefix], others: &[(IpAddr, Prefix)]) -> State {
    let mut state = State { up: BTreeSet::from([LO]), ..State::default() };
    state.addresses.insert(Address { link: LO, prefix: Prefix::host(GATEWAY4.into()) });
    let route =
        |to, kind, via| Route { table: MAIN_TABLE, to, kind, via, link: None, source: None, protocol: PROTOCOL_NODE };
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
    fn the_link_that_the_kernel_found_is_accepted() {
        let wanted = node_state(&[], &[(ip("192.168.0.2"), prefix("10.244.2.0/24"))]);
        let mut present = wanted.clone();
        present.routes = wanted.routes.iter().map(|r| Route { link: Some(7), ..r.clone() }).collect();
        assert_eq!(plan(&wanted, &present, Some(PROTOCOL_NODE)), []);
    }
}
