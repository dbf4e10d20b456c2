//! The present state of a namespace, read from the kernel, and operations carried out in it.

use crate::{
    Connection,
    error::Result,
    plan::{Address, Neighbour, Operation, Prefix, Route, RouteKind, Rule, State},
    rtnl::Request,
};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage as Message,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use std::{collections::BTreeSet, net::IpAddr};

/// Metric of every IPv6 route we write; 0 would be turned into this by the kernel.
const METRIC6: u32 = 1024;

fn family(v4: bool) -> AddressFamily {
    if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// Carries operations out. What is already so is no error; any other failure is, after all were tried.
pub fn apply(connection: &mut Connection, operations: &[Operation]) -> Result<()> {
    let requests = operations.iter().map(request).collect();
    let mut first = None;
    for (answer, operation) in connection.execute(requests)?.into_iter().zip(operations) {
        match answer {
            Err(e) if e.errno() == already(operation) => {}
            Err(e) => {
                first.get_or_insert(e);
            }
            Ok(()) => {}
        }
    }
    first.map_or(Ok(()), Err)
}

/// The error number that means: nothing left to do.
fn already(operation: &Operation) -> Option<i32> {
    match operation {
        Operation::RemoveRoute(_) => Some(libc::ESRCH),
        _ => Some(libc::EEXIST),
    }
}

fn request(operation: &Operation) -> Request {
    let create = NLM_F_CREATE | NLM_F_EXCL;
    let replace = NLM_F_CREATE | NLM_F_REPLACE;
    let (message, flags) = match operation {
        Operation::SetUp(link) => (set_up(*link), 0),
        Operation::AddAddress(a) => (Message::NewAddress(address_message(a)), create),
        Operation::AddNeighbour(n) => (Message::NewNeighbour(neighbour_message(n)), replace),
        Operation::AddRoute(r) => (Message::NewRoute(route_message(r)), replace),
        Operation::RemoveRoute(r) => (Message::DelRoute(route_message(r)), 0),
        Operation::AddRule(r) => (Message::NewRule(rule_message(r)), create),
    };
    Request { message, flags, operation: operation.to_string() }
}

fn set_up(link: u32) -> Message {
    let mut message = LinkMessage::default();
    message.header.index = link;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    Message::SetLink(message)
}

fn address_message(a: &Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    let ip = a.prefix.address;
    message.header.family = family(ip.is_ipv4());
    message.header.prefix_len = a.prefix.len;
    message.header.index = a.link;
    // No duplicate address detection: addresses are leased, and waiting would cost a second per pod.
    message.header.flags = AddressHeaderFlags::Nodad;
    if is_link_local(ip) {
        message.header.scope = AddressScope::Link;
    }
    message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    message
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}

fn neighbour_message(n: &Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(n.ip.is_ipv4());
    message.header.ifindex = n.link;
    message.header.state = NeighbourState::Permanent;
    let ip = match n.ip {
        IpAddr::V4(a) => NeighbourAddress::Inet(a),
        IpAddr::V6(a) => NeighbourAddress::Inet6(a),
    };
    message.attributes =
        vec![NeighbourAttribute::Destination(ip), NeighbourAttribute::LinkLayerAddress(n.mac.to_vec())];
    message
}

fn route_message(r: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    let v4 = r.to.address.is_ipv4();
    message.header.address_family = family(v4);
    message.header.destination_prefix_length = r.to.len;
    message.header.protocol = RouteProtocol::from(r.protocol);
    message.header.kind = match r.kind {
        RouteKind::Unicast => RouteType::Unicast,
        RouteKind::Local => RouteType::Local,
        RouteKind::Unreachable => RouteType::Unreachable,
    };
    message.header.scope = match (v4, r.kind, r.via) {
        (true, RouteKind::Unicast, None) => RouteScope::Link,
        (true, RouteKind::Local, _) => RouteScope::Host,
        _ => RouteScope::Universe,
    };
    if r.via.is_some_and(|_| r.link.is_some()) {
        message.header.flags = RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    if r.to.len > 0 {
        attributes.push(RouteAttribute::Destination(r.to.address.into()));
    }
    attributes.push(RouteAttribute::Table(r.table));
    attributes.extend(r.via.map(|v| RouteAttribute::Gateway(v.into())));
    attributes.extend(r.link.map(RouteAttribute::Oif));
    attributes.extend(r.source.map(|s| RouteAttribute::PrefSource(s.into())));
    if !v4 {
        attributes.push(RouteAttribute::Priority(METRIC6));
    }
    message
}

fn rule_message(r: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(r.v4);
    message.header.action = RuleAction::ToTable;
    message.attributes =
        vec![RuleAttribute::Priority(r.priority), RuleAttribute::FwMark(r.mark), RuleAttribute::Table(r.table)];
    message
}

/// Reads what is there of everything that a [`State`] can want.
pub fn read(connection: &mut Connection) -> Result<State> {
    let mut state = State::default();
    for message in connection.dump(Message::GetLink(LinkMessage::default()), "list links")? {
        if let Message::NewLink(m) = message
            && m.header.flags.contains(LinkFlags::Up)
        {
            state.up.insert(m.header.index);
        }
    }
    for message in connection.dump(Message::GetAddress(AddressMessage::default()), "list addresses")? {
        if let Message::NewAddress(m) = message {
            state.addresses.extend(address(&m));
        }
    }
    for v4 in [true, false] {
        let mut ask = NeighbourMessage::default();
        ask.header.family = family(v4);
        for message in connection.dump(Message::GetNeighbour(ask), "list neighbours")? {
            if let Message::NewNeighbour(m) = message {
                state.neighbours.extend(neighbour(&m));
            }
        }
        let mut ask = RuleMessage::default();
        ask.header.family = family(v4);
        for message in connection.dump(Message::GetRule(ask), "list rules")? {
            if let Message::NewRule(m) = message {
                state.rules.extend(rule(&m));
            }
        }
    }
    state.routes = read_routes(connection)?;
    Ok(state)
}

/// Routes alone: what drift repair looks at every second.
pub fn read_routes(connection: &mut Connection) -> Result<BTreeSet<Route>> {
    let mut routes = BTreeSet::new();
    for v4 in [true, false] {
        let mut ask = RouteMessage::default();
        ask.header.address_family = family(v4);
        for message in connection.dump(Message::GetRoute(ask), "list routes")? {
            if let Message::NewRoute(m) = message {
                routes.extend(route(&m));
            }
        }
    }
    Ok(routes)
}

fn address(m: &AddressMessage) -> Option<Address> {
    let local = m.attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    // IPv6 addresses without a peer come as Address only.
    let address = local.or_else(|| {
        m.attributes.iter().find_map(|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })?;
    Some(Address { link: m.header.index, prefix: Prefix { address, len: m.header.prefix_len } })
}

fn neighbour(m: &NeighbourMessage) -> Option<Neighbour> {
    if m.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut ip, mut mac) = (None, None);
    for a in &m.attributes {
        match a {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => ip = Some(IpAddr::V4(*a)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => ip = Some(IpAddr::V6(*a)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour { link: m.header.ifindex, ip: ip?, mac: mac? })
}

fn rule(m: &RuleMessage) -> Option<Rule> {
    let (mut priority, mut mark, mut table) = (None, None, u32::from(m.header.table));
    for a in &m.attributes {
        match a {
            RuleAttribute::Priority(p) => priority = Some(*p),
            RuleAttribute::FwMark(m) => mark = Some(*m),
            RuleAttribute::Table(t) => table = *t,
            _ => {}
        }
    }
    Some(Rule { v4: m.header.family == AddressFamily::Inet, priority: priority?, mark: mark?, table })
}

fn ip_of(a: &RouteAddress) -> Option<IpAddr> {
    match a {
        RouteAddress::Inet(a) => Some(IpAddr::V4(*a)),
        RouteAddress::Inet6(a) => Some(IpAddr::V6(*a)),
        _ => None,
    }
}

fn route(m: &RouteMessage) -> Option<Route> {
    let kind = match m.header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Local => RouteKind::Local,
        RouteType::Unreachable => RouteKind::Unreachable,
        _ => return None,
    };
    let v4 = m.header.address_family == AddressFamily::Inet;
    let mut r = Route {
        table: u32::from(m.header.table),
        to: Prefix { address: Prefix::all(v4).address, len: m.header.destination_prefix_length },
        kind,
        via: None,
        link: None,
        source: None,
        protocol: m.header.protocol.into(),
    };
    for a in &m.attributes {
        match a {
            RouteAttribute::Table(t) => r.table = *t,
            RouteAttribute::Destination(d) => r.to.address = ip_of(d)?,
            RouteAttribute::Gateway(g) => r.via = ip_of(g),
            RouteAttribute::Oif(l) => r.link = Some(*l),
            RouteAttribute::PrefSource(s) => r.source = ip_of(s),
            _ => {}
        }
    }
    // The kernel hangs IPv6 unreachable routes on lo.
    if kind == RouteKind::Unreachable {
        r.link = None;
    }
    Some(r)
}

/// Reads, plans and applies; the operations that were needed.
pub fn reconcile(connection: &mut Connection, wanted: &State, owned: Option<u8>) -> Result<Vec<Operation>> {
    let operations = crate::plan::plan(wanted, &read(connection)?, owned);
    apply(connection, &operations)?;
    Ok(operations)
}
