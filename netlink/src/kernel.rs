//! The present state of a namespace, read from the kernel, and operations carried out in it.

use crate::{
    Connection,
    error::Result,
    link,
    plan::{
        Address, Forward, Neighbour, Operation, Prefix, Route, RouteKind, Rule, State, Vxlan, is_link_local, plan,
        plan_links,
    },
    rtnl::Request,
};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage as Message,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
    },
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

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
            Err(e) if e.errno().is_some_and(|n| already(operation).contains(&n)) => {}
            Err(e) => {
                first.get_or_insert(e);
            }
            Ok(()) => {}
        }
    }
    first.map_or(Ok(()), Err)
}

/// The error numbers that mean: nothing left to do.
fn already(operation: &Operation) -> &'static [i32] {
    match operation {
        // Another link has the name or the number: there is no link of ours.
        Operation::MakeVxlan(_) => &[],
        Operation::RemoveRoute(_) => &[libc::ESRCH],
        Operation::RemoveLink { .. } => &[libc::ENODEV],
        Operation::RemoveAddress(_) => &[libc::EADDRNOTAVAIL, libc::ENODEV],
        Operation::RemoveNeighbour(_) | Operation::RemoveForward(_) => &[libc::ENOENT, libc::ENODEV],
        _ => &[libc::EEXIST],
    }
}

fn request(operation: &Operation) -> Request {
    let create = NLM_F_CREATE | NLM_F_EXCL;
    let replace = NLM_F_CREATE | NLM_F_REPLACE;
    let (message, flags) = match operation {
        Operation::MakeVxlan(v) => (Message::NewLink(vxlan_message(v)), create),
        Operation::SetMtu { link, mtu } => (set_mtu(*link, *mtu), 0),
        Operation::RemoveLink { link, .. } => (remove_link(*link), 0),
        Operation::SetUp(link) => (set_up(*link), 0),
        Operation::AddAddress(a) => (Message::NewAddress(address_message(a)), create),
        Operation::RemoveAddress(a) => (Message::DelAddress(address_message(a)), 0),
        Operation::AddNeighbour(n) => (Message::NewNeighbour(neighbour_message(n)), replace),
        Operation::RemoveNeighbour(n) => (Message::DelNeighbour(neighbour_message(n)), 0),
        Operation::AddForward(e) => (Message::NewNeighbour(forward_message(e)), replace),
        Operation::RemoveForward(e) => (Message::DelNeighbour(forward_message(e)), 0),
        Operation::AddRoute(r) => (Message::NewRoute(route_message(r)), replace),
        Operation::RemoveRoute(r) => (Message::DelRoute(route_message(r)), 0),
        Operation::AddRule(r) => (Message::NewRule(rule_message(r)), create),
    };
    let remedy = match operation {
        Operation::MakeVxlan(_) => ": no other VXLAN link may have that number, no program that port (CONFIG_VXLAN)",
        _ => "",
    };
    Request { message, flags, operation: format!("{operation}{remedy}") }
}

fn set_up(link: u32) -> Message {
    let mut message = LinkMessage::default();
    message.header.index = link;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    Message::SetLink(message)
}

fn set_mtu(link: u32, mtu: u32) -> Message {
    let mut message = LinkMessage::default();
    message.header.index = link;
    message.attributes = vec![LinkAttribute::Mtu(mtu)];
    Message::SetLink(message)
}

fn remove_link(link: u32) -> Message {
    let mut message = LinkMessage::default();
    message.header.index = link;
    Message::DelLink(message)
}

/// Made up at once: a UDP port that somebody else holds is found out then, and the link is not made.
fn vxlan_message(v: &Vxlan) -> LinkMessage {
    let local = match v.local {
        IpAddr::V4(a) => InfoVxlan::Local(a),
        IpAddr::V6(a) => InfoVxlan::Local6(a),
    };
    // Only what is said here is believed: a packet from outside must not teach the link another way to a node.
    let data = vec![InfoVxlan::Id(v.vni), InfoVxlan::Port(v.port), local, InfoVxlan::Learning(false)];
    let mut message = LinkMessage::default();
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes = vec![
        LinkAttribute::IfName(v.name.clone()),
        LinkAttribute::Address(v.mac.to_vec()),
        LinkAttribute::Mtu(v.mtu),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(data))]),
    ];
    message
}

/// An entry of the forwarding table of a VXLAN link.
fn forward_message(e: &Forward) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = e.link;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    let to = NeighbourAddress::from(e.to);
    message.attributes =
        vec![NeighbourAttribute::LinkLayerAddress(e.mac.to_vec()), NeighbourAttribute::Destination(to)];
    message
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
    attributes.extend(r.mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])));
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
    let mut tunnels = false;
    for message in connection.dump(Message::GetLink(LinkMessage::default()), "list links")? {
        let Message::NewLink(m) = message else { continue };
        if m.header.flags.contains(LinkFlags::Up) {
            state.up.insert(m.header.index);
        }
        tunnels |= vxlan_data(&m).is_some();
    }
    // Only VXLAN links have forwards; elsewhere the question would be for every bridge's table.
    if tunnels {
        state.forwards = read_forwards(connection)?;
    }
    state.addresses = read_addresses(connection)?;
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

/// Addresses alone, of all links.
pub fn read_addresses(connection: &mut Connection) -> Result<BTreeSet<Address>> {
    let messages = connection.dump(Message::GetAddress(AddressMessage::default()), "list addresses")?;
    let all = messages.into_iter().filter_map(|m| if let Message::NewAddress(m) = m { address(&m) } else { None });
    Ok(all.collect())
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

fn read_forwards(connection: &mut Connection) -> Result<BTreeSet<Forward>> {
    let mut ask = NeighbourMessage::default();
    ask.header.family = AddressFamily::Bridge;
    let all = connection.dump(Message::GetNeighbour(ask), "list forwarding entries")?;
    Ok(all.into_iter().filter_map(|m| if let Message::NewNeighbour(m) = m { forward(&m) } else { None }).collect())
}

fn forward(m: &NeighbourMessage) -> Option<Forward> {
    let (mut to, mut mac) = (None, None);
    for a in &m.attributes {
        match a {
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => to = ip_from(bytes),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Forward { link: m.header.ifindex, mac: mac?, to: to? })
}

fn ip_from(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(|b| IpAddr::V4(Ipv4Addr::from(b)));
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(|b| IpAddr::V6(Ipv6Addr::from(b)))).ok()
}

fn vxlan_data(m: &LinkMessage) -> Option<&[InfoVxlan]> {
    let infos = m.attributes.iter().find_map(|a| if let LinkAttribute::LinkInfo(i) = a { Some(i) } else { None })?;
    infos.iter().find_map(|i| if let LinkInfo::Data(InfoData::Vxlan(data)) = i { Some(data.as_slice()) } else { None })
}

/// How a VXLAN link is made; `None` of another link, and of one that learns.
fn vxlan(m: &LinkMessage, v4: bool) -> Option<Vxlan> {
    let (mut vni, mut port, mut learns) = (None, None, true);
    // The kernel says no source where none was given.
    let mut local = if v4 { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    for info in vxlan_data(m)? {
        match info {
            InfoVxlan::Id(id) => vni = Some(*id),
            InfoVxlan::Port(p) => port = Some(*p),
            InfoVxlan::Local(a) => local = IpAddr::V4(*a),
            InfoVxlan::Local6(a) => local = IpAddr::V6(*a),
            InfoVxlan::Learning(on) => learns = *on,
            _ => {}
        }
    }
    let (mut name, mut mac, mut mtu) = (None, None, None);
    for a in &m.attributes {
        match a {
            LinkAttribute::IfName(n) => name = Some(n.clone()),
            LinkAttribute::Address(bytes) => mac = bytes.as_slice().try_into().ok(),
            LinkAttribute::Mtu(m) => mtu = Some(*m),
            _ => {}
        }
    }
    let vxlan = Vxlan { name: name?, vni: vni?, port: port?, local, mac: mac?, mtu: mtu? };
    (!learns).then_some(vxlan)
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
        mtu: None,
        protocol: m.header.protocol.into(),
    };
    for a in &m.attributes {
        match a {
            RouteAttribute::Table(t) => r.table = *t,
            RouteAttribute::Destination(d) => r.to.address = ip_of(d)?,
            RouteAttribute::Gateway(g) => r.via = ip_of(g),
            RouteAttribute::Oif(l) => r.link = Some(*l),
            RouteAttribute::PrefSource(s) => r.source = ip_of(s),
            RouteAttribute::Metrics(all) => {
                r.mtu = all.iter().find_map(|m| if let RouteMetric::Mtu(mtu) = m { Some(*mtu) } else { None });
            }
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
    let operations = plan(wanted, &read(connection)?, owned);
    apply(connection, &operations)?;
    Ok(operations)
}

/// Of these names, the VXLAN link of the family that goes with it, for [`reconcile_links`].
pub type Names<'a> = [(&'a str, bool)];

/// Like [`reconcile`], for a state on and through VXLAN links: first makes and mends those, then has `wanted` say the
/// state for their indexes, and last removes the links of `names` that nobody wants, when nothing goes through them.
/// A link that cannot be made keeps nothing else from coming about.
pub fn reconcile_links(
    connection: &mut Connection,
    names: &Names<'_>,
    links: &[Vxlan],
    wanted: impl FnOnce(&HashMap<String, u32>) -> State,
    owned: Option<u8>,
) -> Result<Vec<Operation>> {
    let links = plan_links(links, &named(connection, names)?);
    let made = apply(connection, &links.make);
    let indexes = named(connection, names)?.into_iter().map(|(index, name, _)| (name, index)).collect();
    let state = wanted(&indexes);
    let operations = plan(&state, &read(connection)?, owned);
    let applied = apply(connection, &operations);
    let removed = apply(connection, &links.remove);
    made.and(applied).and(removed)?;
    Ok(links.make.into_iter().chain(operations).chain(links.remove).collect())
}

fn named(connection: &mut Connection, names: &Names<'_>) -> Result<Vec<(u32, String, Option<Vxlan>)>> {
    let all = connection.dump(Message::GetLink(LinkMessage::default()), "list links")?;
    Ok(all
        .iter()
        .filter_map(|m| {
            let Message::NewLink(m) = m else { return None };
            let name = link::name(m)?;
            let (_, v4) = names.iter().find(|(n, _)| *n == name)?;
            Some((m.header.index, name.to_owned(), vxlan(m, *v4)))
        })
        .collect())
}
