//! Packets at a node's links: services, host ports and masquerade; and the way on, past the node's own stack, so that
//! its firewall's FORWARD policy does not matter.
//!
//! A program decides in this order: a known connection; else a service or host port that the packet is addressed to;
//! else, for pods, whether the destination is outside the cluster. Then the packet is rewritten and sent on.

use crate::{
    balance::{self, Choice, Found},
    connections::{self, Known, Source},
    icmp::{self, Report},
    maps::{ADDRS, ANNOUNCED, CLUSTER, DEVICES, EVENTS, LOCALS, SERVICES, SETTINGS, count},
    neighbour,
    packet::{ACK, Body, Bytes, ETH_P_ARP, ETH_P_IPV6, SYN, Skb, Unread},
    work::{Work, work},
};
use aya_ebpf::{
    bindings::{bpf_fib_lookup as FibLookup, bpf_redir_neigh},
    btf_maps::lpm_trie::Key,
    helpers::generated::{bpf_fib_lookup, bpf_ktime_get_boot_ns, bpf_redirect_neigh, bpf_redirect_peer},
};
use sluice_ebpf_common::*;

/// Leaves the packet to programs after this one, and to the stack.
pub const NEXT: i32 = -1;
pub const DROP: i32 = 2;

/// The first that Linux takes by itself: `net.ipv4.ip_local_port_range` as it is without being set.
const EPHEMERAL_FROM: u16 = 32_768;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

pub const FIB_SUCCESS: i64 = 0;
const FIB_BLACKHOLE: i64 = 1;
const FIB_UNREACHABLE: i64 = 2;
const FIB_PROHIBIT: i64 = 3;
const FIB_NO_NEIGH: i64 = 7;
const FIB_FRAG_NEEDED: i64 = 8;

/// What a packet becomes.
enum Fate {
    /// As it came.
    Leave,
    /// What `Work::to` says.
    Become,
    /// As it came, but on to the node of `Work::to`'s destination.
    Relay,
    Drop(Reason),
    /// A service that has no backend: its caller is told.
    Refuse,
}

/// Where a packet goes on. The link is written whatever the kind: verifiers refuse a value moved about that nobody wrote.
#[derive(Clone, Copy)]
struct Way {
    kind: Kind,
    ifindex: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// To the stack of this node.
    Stack,
    Pod,
    ShapedPod,
    /// By the next hop in `Work::fib`.
    Link,
    /// `Work::fib` has the length that would pass.
    TooBig,
    None,
}

#[inline(always)]
pub fn from_pod(skb: Skb) -> i32 {
    entered(skb, hook::POD)
}

#[inline(always)]
pub fn from_wire(skb: Skb) -> i32 {
    if skb.in_vlan() || skb.for_others() {
        return NEXT;
    }
    match skb.ethertype() {
        Some(ETH_P_ARP) => neighbour::answer_arp(&skb),
        _ => entered(skb, hook::WIRE),
    }
}

/// Packets of the node's own stack: answers of its processes to translated connections.
#[inline(always)]
pub fn from_host(skb: Skb) -> i32 {
    if skb.in_vlan() {
        return NEXT;
    }
    let Some(w) = work() else { return NEXT };
    if skb.read(&mut w.head).is_err() {
        return NEXT;
    }
    if w.head.body == Body::Error {
        icmp::translate(&skb, w);
        return NEXT;
    }
    if connections::known(w) != Known::Translated || skb.rewrite(&w.head, &w.to, 0) {
        return NEXT;
    }
    dropped(&skb, w, Reason::DroppedRewrite, hook::HOST)
}

/// What was read of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    All,
    /// Its addresses: the protocol is none that is translated.
    Foreign,
    /// Its addresses and protocol.
    Orphan,
}

#[inline(always)]
fn entered(skb: Skb, at: u8) -> i32 {
    let Some(w) = work() else { return NEXT };
    w.pod = 0;
    let seen = match skb.read(&mut w.head) {
        Ok(()) => Seen::All,
        Err(Unread::Foreign) => Seen::Foreign,
        Err(Unread::Orphan) => Seen::Orphan,
        Err(Unread::Other) => return NEXT,
        Err(Unread::Drop(reason)) => return dropped(&skb, w, reason, at),
    };
    if at == hook::POD {
        match sender(&skb, &w.head.flow) {
            Sender::Pod => {}
            Sender::Link => return NEXT,
            Sender::Nobody => return dropped(&skb, w, Reason::DroppedSpoofed, at),
        }
    }
    match seen {
        Seen::Foreign if at == hook::WIRE && !w.head.v4 => return neighbour::answer_nd(&skb),
        Seen::Foreign => return NEXT,
        _ if w.head.flow.dst.is_multicast() || !skb.addressed() || skb.in_vlan() => return NEXT,
        Seen::Orphan => return orphan(&skb, w, at),
        Seen::All => {}
    }
    let relayed = if w.head.body == Body::Error {
        match icmp::translate(&skb, w) {
            Known::Relayed => true,
            known => return deliver(&skb, w, at, known == Known::Translated),
        }
    } else {
        match fate(&skb, w, at) {
            Fate::Leave => return deliver(&skb, w, at, false),
            Fate::Become => false,
            Fate::Relay => true,
            Fate::Drop(reason) => return dropped(&skb, w, reason, at),
            Fate::Refuse => return icmp::report(&skb, w, Report::PortUnreachable, Reason::DroppedNoBackend, at),
        }
    };
    go(&skb, w, at, relayed)
}

/// Towards `w.to`: rewritten to it, or relayed as it is.
#[inline(always)]
fn go(skb: &Skb, w: &mut Work, at: u8, relayed: bool) -> i32 {
    let mut way = match w.pod {
        0 => way(skb, &w.to, &mut w.fib),
        ifindex => to_pod(ifindex, w.pod_flags),
    };
    way.kind = tunnelled(way, w);
    if way.kind == Kind::TooBig && w.head.divisible && !relayed {
        return to_divide(skb, w, at);
    }
    let hop = way.kind == Kind::Link;
    match way.kind {
        Kind::TooBig => {
            // SAFETY: the kernel has written it.
            let mtu = unsafe { w.fib.__bindgen_anon_1.mtu_result };
            return icmp::report(skb, w, Report::TooBig(mtu), Reason::DroppedTooBig, at);
        }
        Kind::None => return dropped(skb, w, Reason::DroppedNoRoute, at),
        Kind::Link if w.head.hops <= 1 => return dropped(skb, w, Reason::DroppedHopLimit, at),
        Kind::Link | Kind::Stack | Kind::Pod | Kind::ShapedPod => {}
    }
    let mut hops = hop as u8;
    if relayed {
        // The backend's node was another one when it was chosen.
        if !hop {
            return dropped(skb, w, Reason::DroppedNoRoute, at);
        }
        w.to = w.head.flow;
        hops = connections::relayed_hops(w.head.hops);
    }
    if !skb.rewrite(&w.head, &w.to, hops) {
        return dropped(skb, w, Reason::DroppedRewrite, at);
    }
    send(way, w)
}

/// A tunnel takes also what is too large for it, where that may be divided: its own packets are.
#[inline(always)]
fn tunnelled(way: Way, w: &Work) -> Kind {
    let divisible = way.kind == Kind::TooBig && w.head.divisible;
    // SAFETY: an integer of the entry.
    if divisible && unsafe { DEVICES.get(way.ifindex) }.is_some_and(|d| d.flags & DEVICE_TUNNEL != 0) {
        return Kind::Link;
    }
    way.kind
}

/// Leaves to the stack a packet that is larger than its way on, and may be divided. The stack takes nothing under an address
/// of the node's own: where the source changes too, `from_host` does that, when the parts leave.
#[inline(always)]
fn to_divide(skb: &Skb, w: &mut Work, at: u8) -> i32 {
    let moved = !w.to.src.same(&w.head.flow.src) || w.to.sport_be != w.head.flow.sport_be;
    if moved {
        w.key = w.to;
        (w.key.src, w.key.sport_be) = (w.head.flow.src, w.head.flow.sport_be);
        connections::also(w);
        w.to = w.key;
    }
    if !skb.rewrite(&w.head, &w.to, 0) {
        return dropped(skb, w, Reason::DroppedRewrite, at);
    }
    NEXT
}

/// Who a pod says it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sender {
    Pod,
    /// A link-local address, or none yet, in what such an address is for: finding out who is on the link.
    Link,
    Nobody,
}

/// Link-local addresses have no owner that the programs know of, and the node's resolver has one: under them a pod reaches the
/// node, past all services, and no other pod.
#[inline(always)]
fn sender(skb: &Skb, flow: &Flow) -> Sender {
    // SAFETY: an integer of the entry.
    let owner = unsafe { ADDRS.get(&flow.src) }.map(|pod| pod.ifindex);
    if owner == Some(skb.ifindex()) {
        return Sender::Pod;
    }
    // SAFETY: presence only.
    let near = || flow.dst.is_link_local() || unsafe { LOCALS.get(&flow.dst) }.is_some();
    let local = flow.src.is_link_local();
    if (local || flow.src.is_unspecified()) && flow.dst.is_multicast() || local && near() {
        return Sender::Link;
    }
    Sender::Nobody
}

/// A later fragment that came ahead of its first, or whose first went another way. Whether it would be translated is not
/// known: it goes on where nothing can come of that but the loss of its packet. The node's own stack puts together what is for
/// the node.
#[inline(always)]
fn orphan(skb: &Skb, w: &mut Work, at: u8) -> i32 {
    // SAFETY: presence only.
    let announced = unsafe { ANNOUNCED.get(&w.head.flow.dst) }.is_some();
    if announced || at == hook::POD && masqueraded(&w.head.flow.dst) {
        return dropped(skb, w, Reason::DroppedFragment, at);
    }
    deliver(skb, w, at, false)
}

/// A packet that stays as it is, or is translated already.
#[inline(always)]
fn deliver(skb: &Skb, w: &mut Work, at: u8, translated: bool) -> i32 {
    let mut way = way(skb, &w.head.flow, &mut w.fib);
    way.kind = tunnelled(way, w);
    match way.kind {
        Kind::Pod | Kind::ShapedPod => send(way, w),
        // What only passes through this node is the stack's, and so is every answer that it can give better.
        Kind::Link if at == hook::POD || translated => {
            if w.head.hops <= 1 || !skb.rewrite(&w.head, &w.head.flow, 1) {
                return NEXT;
            }
            send(way, w)
        }
        // An announced address on a port that is no service's: nobody further on has it either.
        // SAFETY: presence only.
        Kind::Link if unsafe { ANNOUNCED.get(&w.head.flow.dst) }.is_some() => {
            icmp::report(skb, w, Report::PortUnreachable, Reason::DroppedNoBackend, at)
        }
        _ => NEXT,
    }
}

#[inline(always)]
fn fate(skb: &Skb, w: &mut Work, at: u8) -> Fate {
    match connections::known(w) {
        Known::No => {}
        Known::Translated => return Fate::Become,
        Known::Relayed => return Fate::Relay,
    }
    // An answer that is the first that is seen of a connection begins none.
    if w.head.body == Body::EchoReply {
        return Fate::Leave;
    }
    let choice = destination(w, at);
    match choice.found {
        Found::Unknown => {}
        Found::None | Found::RaceLost => return nobody(w),
        Found::Denied => return Fate::Drop(Reason::DroppedSourceRange),
        Found::Backend => {
            w.to = w.head.flow;
            (w.to.dst, w.to.dport_be) = (choice.to.addr, choice.to.port_be);
            if at == hook::WIRE && relays(&w.head.flow, &choice.to.addr) {
                return relayed(skb, w, at);
            }
            return match source(skb, w, at) {
                Ok(source) => begun(skb, w, source, at, Reason::PacketTranslated),
                Err(reason) => Fate::Drop(reason),
            };
        }
    }
    w.to = w.head.flow;
    // TCP says itself what begins: the answer of a pod that was called from outside does not.
    let begins = w.head.flow.proto != TCP || w.head.tcp_flags & (SYN | ACK) == SYN;
    if at == hook::POD && begins && masqueraded(&w.head.flow.dst) && leaving(skb, w) {
        return begun(skb, w, Source::Node, at, Reason::Masqueraded);
    }
    // Datagrams do not: what comes in is noted as it is, so that its answer is not taken for a beginning.
    if at == hook::WIRE && w.head.flow.proto != TCP && called(&w.head.flow) {
        // Without room for the note the datagram goes on all the same.
        let _ = connections::begin(w, Source::Kept);
        w.to = w.head.flow;
    }
    Fate::Leave
}

/// A pod of this node, from outside of the cluster.
#[inline(always)]
fn called(flow: &Flow) -> bool {
    // SAFETY: presence only.
    unsafe { ADDRS.get(&flow.dst) }.is_some() && masqueraded(&flow.src)
}

#[inline(always)]
fn relayed(skb: &Skb, w: &mut Work, at: u8) -> Fate {
    if let Err(reason) = connections::relay(w) {
        return Fate::Drop(reason);
    }
    count(Reason::Relayed);
    tell(skb, &w.head.flow, &w.to, Reason::Relayed, at, false);
    Fate::Relay
}

/// Whether a connection from outside is answered by its backend's node, past this one. Only the node that the caller
/// addressed passes it on, by an address that the others know: whoever else gets it translates.
#[inline(always)]
fn relays(flow: &Flow, backend: &Addr) -> bool {
    let addressed = &flow.dst;
    // SAFETY: presence only.
    direct()
        && cluster(&flow.src) == 0
        && cluster(backend) & CLUSTER_ADJACENT != 0
        && unsafe {
            ADDRS.get(backend).is_none()
                && LOCALS.get(backend).is_none()
                && (ANNOUNCED.get(addressed).is_some()
                    || LOCALS.get(addressed).is_some() && cluster(addressed) & CLUSTER_NODE != 0)
        }
}

/// Direct server return.
#[inline(always)]
fn direct() -> bool {
    SETTINGS.get(0).is_some_and(|s| s.flags & DSR != 0)
}

/// What is known of an address of the cluster's ranges; 0 of any other.
#[inline(always)]
fn cluster(addr: &Addr) -> u32 {
    CLUSTER.get(&Key::new(128, *addr)).map_or(0, |flags| *flags)
}

#[inline(always)]
fn begun(skb: &Skb, w: &mut Work, source: Source, at: u8, reason: Reason) -> Fate {
    if let Err(reason) = connections::begin(w, source) {
        return Fate::Drop(reason);
    }
    count(reason);
    tell(skb, &w.head.flow, &w.to, reason, at, false);
    Fate::Become
}

/// An address of the node itself: its stack refuses what nobody listens for. Any other would be sent on and on.
#[inline(always)]
fn nobody(w: &Work) -> Fate {
    // SAFETY: presence only.
    if unsafe { LOCALS.get(&w.head.flow.dst) }.is_some() {
        count(Reason::NoBackend);
        return Fate::Leave;
    }
    Fate::Refuse
}

/// The backend of a new connection, where its destination is a service or a host port.
#[inline(always)]
fn destination(w: &mut Work, at: u8) -> Choice {
    let flow = &w.head.flow;
    if flow.proto != TCP && flow.proto != UDP {
        return Choice::UNKNOWN;
    }
    w.service = ServiceKey { addr: flow.dst, port_be: flow.dport_be, proto: flow.proto, scope: INSIDE };
    let choice = chosen(w, at);
    if !matches!(choice.found, Found::Unknown) {
        return choice;
    }
    // SAFETY: presence only.
    if unsafe { LOCALS.get(&w.head.flow.dst) }.is_none() {
        return foreign_node_port(w, at);
    }
    let begins = flow_begins(w);
    if begins && let Some(to) = balance::host_port(&w.service) {
        return Choice::backend(to);
    }
    w.service.addr = w.service.addr.unspecified();
    if NODE_PORTS.contains(&u16::from_be(w.service.port_be)) {
        let choice = chosen(w, at);
        if !matches!(choice.found, Found::Unknown) {
            return choice;
        }
    }
    match begins {
        true => balance::host_port(&w.service).map_or(Choice::UNKNOWN, Choice::backend),
        false => Choice::UNKNOWN,
    }
}

/// At ports from which the node begins connections of its own an answer to one is none to a pod. Of a datagram nobody can say.
#[inline(always)]
fn flow_begins(w: &Work) -> bool {
    u16::from_be(w.service.port_be) < EPHEMERAL_FROM
        || w.head.flow.proto != TCP
        || w.head.tcp_flags & (SYN | ACK) == SYN
}

/// Of another node's node port, which that one has relayed: to whom it is given here, whether or not this node relays.
#[inline(always)]
fn foreign_node_port(w: &mut Work, at: u8) -> Choice {
    let relayed = at == hook::WIRE
        && NODE_PORTS.contains(&u16::from_be(w.service.port_be))
        && cluster(&w.head.flow.dst) & CLUSTER_NODE != 0;
    if !relayed {
        return Choice::UNKNOWN;
    }
    w.service.addr = w.service.addr.unspecified();
    match chosen(w, at) {
        // A packet that only passes through on its way to a node that may have somebody.
        Choice { found: Found::None, .. } => Choice::UNKNOWN,
        choice => choice,
    }
}

/// Of `w.service`, which is of the scope [`INSIDE`] again when it is unknown.
#[inline(always)]
fn chosen(w: &mut Work, at: u8) -> Choice {
    // SAFETY: flags only; a stale one decides as the moment before would have.
    let Some(service) = (unsafe { SERVICES.get(&w.service) }) else { return Choice::UNKNOWN };
    if at == hook::WIRE && service.flags & SERVICE_OUTSIDE != 0 {
        w.service.scope = OUTSIDE;
    }
    let choice = balance::choose_for(w);
    w.service.scope = INSIDE;
    choice
}

/// Writes the source that the backend is to see, so that its answers come back here.
#[inline(always)]
fn source(skb: &Skb, w: &mut Work, at: u8) -> Result<Source, Reason> {
    if w.to.dst.same(&w.to.src) {
        // The pod itself is the backend: it answers its gateway, which is us.
        w.to.src = gateway(w.to.dst.is_v4());
        return Ok(Source::Node);
    }
    // A backend on this node answers by way of this node.
    // SAFETY: presence only.
    let here = unsafe { ADDRS.get(&w.to.dst).is_some() || LOCALS.get(&w.to.dst).is_some() };
    if here || at == hook::POD || w.to.dst.is_link_local() {
        return Ok(Source::Kept);
    }
    if leaving(skb, w) { Ok(Source::Node) } else { Err(Reason::DroppedNoRoute) }
}

/// Gives `w.to` the node's address on the link by which it leaves, if it leaves and there is one; also where this packet is too
/// large for that link.
#[inline(always)]
fn leaving(skb: &Skb, w: &mut Work) -> bool {
    let way = way(skb, &w.to, &mut w.fib);
    if way.kind != Kind::Link && way.kind != Kind::TooBig {
        return false;
    }
    // SAFETY: replaced whole.
    let Some(device) = (unsafe { DEVICES.get(&way.ifindex) }) else { return false };
    let address = if w.to.dst.is_v4() { &device.addr4 } else { &device.addr6 };
    if address.is_unspecified() {
        return false;
    }
    w.to.src = *address;
    true
}

/// What pods know their gateway by (see `netlink::plan`).
#[inline(always)]
fn gateway(v4: bool) -> Addr {
    if v4 {
        return Addr::from_v4(u32::from_ne_bytes([169, 254, 1, 1]));
    }
    Addr { words: [0xfe80_0000_u32.to_be(), 0, 0, 1_u32.to_be()] }
}

/// Whether a pod's packets to an address get one of the node's: it is outside the cluster.
#[inline(always)]
fn masqueraded(outside: &Addr) -> bool {
    let Some(settings) = SETTINGS.get(0) else { return false };
    if settings.flags & MASQUERADE == 0 || outside.is_link_local() {
        return false;
    }
    // SAFETY: presence only.
    let here = unsafe { ADDRS.get(outside).is_some() || LOCALS.get(outside).is_some() };
    !here && CLUSTER.get(&Key::new(128, *outside)).is_none()
}

/// Writes the question for `bpf_fib_lookup`; a length other than 0 is compared with the way's MTU.
#[inline(always)]
pub fn question(fib: &mut FibLookup, flow: &Flow, ifindex: u32, length: u16) {
    fib.l4_protocol = flow.proto;
    fib.sport = flow.sport_be;
    fib.dport = flow.dport_be;
    fib.ifindex = ifindex;
    fib.__bindgen_anon_1.tot_len = length;
    fib.__bindgen_anon_2.flowinfo = 0;
    if flow.dst.is_v4() {
        fib.family = AF_INET;
        fib.__bindgen_anon_3.ipv4_src = flow.src.words[3];
        fib.__bindgen_anon_4.ipv4_dst = flow.dst.words[3];
    } else {
        fib.family = AF_INET6;
        fib.__bindgen_anon_3.ipv6_src = flow.src.words;
        fib.__bindgen_anon_4.ipv6_dst = flow.dst.words;
    }
}

#[inline(always)]
fn to_pod(ifindex: u32, flags: u32) -> Way {
    Way { kind: if flags & POD_SHAPED != 0 { Kind::ShapedPod } else { Kind::Pod }, ifindex }
}

/// Where a packet with these addresses goes.
#[inline(always)]
fn way(skb: &Skb, flow: &Flow, fib: &mut FibLookup) -> Way {
    // SAFETY: replaced whole; presence decides.
    if let Some(pod) = unsafe { ADDRS.get(&flow.dst) } {
        return to_pod(pod.ifindex, pod.flags);
    }
    // SAFETY: presence only.
    if flow.dst.is_link_local() || unsafe { LOCALS.get(&flow.dst) }.is_some() {
        return Way { kind: Kind::Stack, ifindex: 0 };
    }
    question(fib, flow, skb.ifindex(), 0);
    let p: *mut FibLookup = fib;
    // SAFETY: parameters in the program's own room, their size given.
    let found = unsafe { bpf_fib_lookup(skb.raw.cast(), p, size_of::<FibLookup>() as i32, 0) };
    let kind = match found as i64 {
        FIB_SUCCESS | FIB_NO_NEIGH => Kind::Link,
        FIB_FRAG_NEEDED => Kind::TooBig,
        FIB_BLACKHOLE | FIB_UNREACHABLE | FIB_PROHIBIT => Kind::None,
        _ => Kind::Stack,
    };
    Way { kind, ifindex: fib.ifindex }
}

#[inline(always)]
fn send(way: Way, w: &mut Work) -> i32 {
    let ifindex = way.ifindex;
    match way.kind {
        Kind::Pod => {
            count(Reason::ToPod);
            // SAFETY: helper; a link that has gone makes it a drop.
            unsafe { bpf_redirect_peer(ifindex, 0) as i32 }
        }
        // The neighbour entry of a pod is permanent: its own address on its own link.
        Kind::ShapedPod => {
            count(Reason::ToPod);
            // SAFETY: as above.
            unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
        }
        Kind::Link => {
            count(Reason::Forwarded);
            w.hop.nh_family = w.fib.family as u32;
            // SAFETY: both are integers of the same size; of IPv4 the first word counts.
            unsafe { w.hop.__bindgen_anon_1.ipv6_nh = w.fib.__bindgen_anon_4.ipv6_dst };
            // SAFETY: parameters in the program's own room, their size given.
            unsafe { bpf_redirect_neigh(ifindex, &raw mut w.hop, size_of::<bpf_redir_neigh>() as i32, 0) as i32 }
        }
        Kind::Stack | Kind::TooBig | Kind::None => NEXT,
    }
}

#[inline(always)]
pub fn dropped(skb: &Skb, w: &Work, reason: Reason, at: u8) -> i32 {
    count(reason);
    tell(skb, &w.head.flow, &w.head.flow, reason, at, true);
    DROP
}

/// Writes an event for whoever follows.
#[inline(always)]
pub fn tell(skb: &Skb, before: &Flow, after: &Flow, reason: Reason, at: u8, dropped: bool) {
    let Some(settings) = SETTINGS.get(0) else { return };
    if settings.flags & (if dropped { WATCH_DROPS } else { WATCH_FLOWS }) == 0 {
        return;
    }
    let Some(mut entry) = EVENTS.reserve(0) else {
        return count(Reason::EventLost);
    };
    // SAFETY: a helper without arguments.
    let time_ns = unsafe { bpf_ktime_get_boot_ns() };
    entry.write(Event {
        time_ns,
        netns: 0,
        before: *before,
        after: *after,
        reason: reason as u32,
        ifindex: skb.ifindex(),
        len: skb.len(),
        hook: at,
        dropped: dropped as u8,
        pad: 0,
    });
    entry.submit(0);
}
