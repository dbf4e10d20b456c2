//! Service load balancing at the socket: service address → backend on connect and sendmsg, and back on recvmsg and
//! getpeername. It keeps no state per packet. `CONNECTED` (of connected UDP sockets) and `REVERSE` (of all others) give
//! the application its own words back until the socket is closed, `AFFINITY` keeps a client with its backend where the
//! service asks for that; all may forget.

use crate::maps::{
    AFFINITY, BACKENDS, CLIENTS, CONNECTED, HOST_PORTS, LOCALS, MAGLEV, MEMBERS, PODS, REVERSE, SERVICES, SETTINGS,
    SOURCES, count,
};
use crate::{told, work::Work};
use aya_ebpf::{
    btf_maps::lpm_trie::Key,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_ktime_get_boot_ns},
    programs::{SockAddrContext, SockContext},
};
use core::ptr;
use sluice_ebpf_common::*;

/// An address and port as the application sees it.
#[derive(Clone, Copy)]
pub struct Dial {
    pub addr: Addr,
    pub port_be: u16,
}

/// What becomes of a call. There is an address whatever the answer: verifiers of older kernels (6.1 does) refuse a program
/// that moves about a value which nobody wrote, as the compiler does with what an enum holds in its other variants.
pub struct Verdict {
    pub answer: Answer,
    pub to: Dial,
}

#[derive(Clone, Copy)]
pub enum Answer {
    Leave,
    Replace,
    /// ECONNREFUSED, or EPERM where the kernel cannot say that.
    Refuse,
    /// EPERM.
    Deny,
}

impl Verdict {
    pub const LEAVE: Self = Self::without(Answer::Leave);
    pub const REFUSE: Self = Self::without(Answer::Refuse);
    pub const DENY: Self = Self::without(Answer::Deny);

    const fn without(answer: Answer) -> Self {
        Self { answer, to: Dial { addr: Addr::UNSET, port_be: 0 } }
    }

    #[inline(always)]
    fn replace(to: Dial) -> Self {
        Self { answer: Answer::Replace, to }
    }
}

/// Attempts to read a service and its backend consistently; each failure needs another update of the same service
/// within some hundred nanoseconds.
const ATTEMPTS: u32 = 3;
const SOCK_STREAM: u32 = 1;
const SOCK_DGRAM: u32 = 2;
const IPPROTO_MPTCP: u32 = 262;
const AF_INET: u32 = 2;

/// As in `steer`.
macro_rules! read {
    ($p:expr, $($field:tt)*) => { unsafe { ptr::read_volatile(&raw const (*$p).$($field)*) } };
}

/// The protocol that services know, if the socket speaks one of them.
#[inline(always)]
pub fn protocol(ctx: &SockAddrContext) -> Option<u8> {
    // SAFETY: fields of the hook's own context.
    let (kind, proto) = unsafe { ((*ctx.sock_addr).type_, (*ctx.sock_addr).protocol) };
    if kind == SOCK_STREAM && (proto == TCP as u32 || proto == IPPROTO_MPTCP) {
        return Some(TCP);
    }
    (kind == SOCK_DGRAM && proto == UDP as u32).then_some(UDP)
}

#[inline(always)]
fn socket(ctx: &SockAddrContext) -> u64 {
    // SAFETY: a helper call on the hook's own context.
    unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) }
}

#[inline(always)]
fn random() -> u32 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_get_prandom_u32() as u32 }
}

/// `number` spread evenly over `0..below`, without a division.
#[inline(always)]
fn scale(number: u32, below: u32) -> u32 {
    ((number as u64 * below as u64) >> 32) as u32
}

/// Where a service leads. As in [`Verdict`] there is an address whatever was found: here it is 5.15 that refuses it else.
pub struct Choice {
    pub found: Found,
    pub to: Dial,
}

#[derive(Clone, Copy)]
pub enum Found {
    /// Not a service address.
    Unknown,
    None,
    /// The service changed each time that it was looked at.
    RaceLost,
    /// A service that is not for this client.
    Denied,
    Backend,
}

impl Choice {
    pub const UNKNOWN: Self = Self::without(Found::Unknown);
    pub const NONE: Self = Self::without(Found::None);
    pub const RACE_LOST: Self = Self::without(Found::RaceLost);
    pub const DENIED: Self = Self::without(Found::Denied);

    const fn without(found: Found) -> Self {
        Self { found, to: Dial { addr: Addr::UNSET, port_be: 0 } }
    }

    #[inline(always)]
    pub fn backend(to: Dial) -> Self {
        Self { found: Found::Backend, to }
    }
}

/// Flags of the service that is dialled; none where it is no service.
#[inline(always)]
pub fn flags(dial: &Dial, proto: u8) -> u32 {
    let key = ServiceKey { addr: dial.addr, port_be: dial.port_be, proto, scope: INSIDE };
    // SAFETY: read once; a stale value decides as the moment before would have.
    unsafe { SERVICES.get(&key) }.map_or(0, |s| s.flags)
}

/// Whether the service that is dialled is none for a pod with this address.
#[inline(always)]
pub fn denied(dial: &Dial, proto: u8, client: &Addr) -> bool {
    let key = ServiceKey { addr: dial.addr, port_be: dial.port_be, proto, scope: INSIDE };
    for _ in 0..ATTEMPTS {
        // SAFETY: as in `choose`.
        let Some(service) = (unsafe { SERVICES.get(&key) }) else { return false };
        if service.flags & SERVICE_RESTRICTED == 0 {
            return false;
        }
        match admission(&key, service, client) {
            Admission::Granted => return false,
            Admission::Denied => return true,
            _ => count(Reason::Raced),
        }
    }
    true
}

enum Admission {
    Granted,
    Denied,
    /// The service was replaced while it was looked at.
    Raced,
    /// A socket of which it is not known what its packets come from: they are asked themselves.
    Unknown,
}

/// Whether a client may use a service that not all may.
#[inline(always)]
fn admission(key: &ServiceKey, service: &Service, client: &Addr) -> Admission {
    let set = service.set;
    if SOURCES.get(&Key::new(Source::BITS, Source { set, addr: *client })).is_some() {
        return Admission::Granted;
    }
    // The ranges of a set that is no more are gone.
    // SAFETY: as in `choose`.
    match unsafe { SERVICES.get(key) } {
        Some(now) if now.set == set => Admission::Denied,
        _ => Admission::Raced,
    }
}

/// The same for a socket: a pod's has the pod's address, one of the node's own any of the node's.
#[inline(always)]
fn admission_of(ctx: &SockAddrContext, key: &ServiceKey, service: &Service) -> Admission {
    // SAFETY: helper on the hook's own context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) };
    if SETTINGS.get(0).is_some_and(|s| s.host_netns == netns) {
        let admitted = service.flags & SERVICE_NODE_ADMITTED != 0;
        return if admitted { Admission::Granted } else { Admission::Denied };
    }
    // SAFETY: addresses of a live pod, written with it.
    let Some(pod) = (unsafe { PODS.get(netns) }) else { return Admission::Unknown };
    let client = if key.addr.is_v4() { &pod.addr4 } else { &pod.addr6 };
    admission(key, service, client)
}

/// Two even numbers choose: one the group by weight, one the backend in it; unless the client has a backend already.
#[inline(always)]
pub fn choose(ctx: &SockAddrContext, dial: &Dial, proto: u8, by_weight: u32, in_group: u32) -> Choice {
    let mut key = ServiceKey { addr: dial.addr, port_be: dial.port_be, proto, scope: INSIDE };
    // SAFETY: presence only; the loop below reads it.
    if unsafe { SERVICES.get(&key) }.is_none() {
        if !is_own(ctx, dial) {
            return Choice::UNKNOWN;
        }
        if let Some(to) = host_port(&key) {
            return Choice::backend(to);
        }
        key.addr = dial.addr.unspecified();
        if let Some(to) = host_port(&key) {
            return Choice::backend(to);
        }
        if !NODE_PORTS.contains(&u16::from_be(dial.port_be)) {
            return Choice::UNKNOWN;
        }
    }
    for _ in 0..ATTEMPTS {
        // SAFETY: entries may be replaced while read; `Backend` says for whom it was written and is checked.
        let Some(service) = (unsafe { SERVICES.get(&key) }) else { return Choice::UNKNOWN };
        if service.flags & SERVICE_RESTRICTED != 0 {
            match admission_of(ctx, &key, service) {
                Admission::Granted => {}
                Admission::Denied => return Choice::DENIED,
                Admission::Unknown => return Choice::UNKNOWN,
                Admission::Raced => {
                    count(Reason::Raced);
                    continue;
                }
            }
        }
        if service.affinity_s > 0
            && let Some(to) = affine(ctx, &key, service)
        {
            return Choice::backend(to);
        }
        let Some(group) = group(service, by_weight) else { return Choice::NONE };
        let index = group.first + scale(in_group, group.count);
        if let Some(to) = backend(service, &key, index) {
            if service.affinity_s > 0 {
                keep_affine(ctx, &key, to);
            }
            return Choice::backend(to);
        }
        count(Reason::Raced);
    }
    Choice::RACE_LOST
}

/// An address of the node, on which node ports and host ports are; loopback is that for its own processes alone.
#[inline(always)]
fn is_own(ctx: &SockAddrContext, dial: &Dial) -> bool {
    if dial.addr.is_loopback() || dial.addr.is_unspecified() {
        // SAFETY: helper on the hook's own context.
        let netns = unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) };
        return SETTINGS.get(0).is_some_and(|s| s.host_netns == netns);
    }
    // SAFETY: presence only.
    unsafe { LOCALS.get(&dial.addr) }.is_some()
}

#[inline(always)]
pub fn host_port(key: &ServiceKey) -> Option<Dial> {
    // SAFETY: an entry is written once, with its pod.
    let to = unsafe { HOST_PORTS.get(key) }?;
    count(Reason::HostPort);
    Some(Dial { addr: to.addr, port_be: to.port_be })
}

/// The backend under an index, unless the entry was replaced meanwhile.
#[inline(always)]
fn backend(service: &Service, key: &ServiceKey, index: u32) -> Option<Dial> {
    // SAFETY: what was written for another service is told by what it says.
    let backend = unsafe { BACKENDS.get(BackendKey { set: service.set, index }) }?;
    let own = backend.service_port_be == key.port_be && backend.service_word == key.addr.words[3];
    own.then_some(Dial { addr: backend.addr, port_be: backend.port_be })
}

/// The backend of `w.service` for the first packet of a connection. Every node that is asked chooses the same one, where
/// all know the same backends: the choice depends on the packet alone.
#[inline(always)]
pub fn choose_for(w: &mut Work) -> Choice {
    let hash = spread(&w.head.flow);
    for _ in 0..ATTEMPTS {
        // SAFETY: as in `choose`.
        let Some(service) = (unsafe { SERVICES.get(&w.service) }) else { return Choice::UNKNOWN };
        if service.flags & SERVICE_RESTRICTED != 0 {
            match admission(&w.service, service, &w.head.flow.src) {
                Admission::Denied => return Choice::DENIED,
                Admission::Raced => {
                    count(Reason::Raced);
                    continue;
                }
                _ => {}
            }
        }
        let affine = service.affinity_s > 0;
        if affine {
            (w.client.client, w.client.service) = (w.head.flow.src, w.service);
            if let Some(to) = kept(&w.client, service) {
                return Choice::backend(to);
            }
        }
        let Some(index) = slot(service, hash) else { return Choice::NONE };
        if let Some(to) = backend(service, &w.service, index) {
            if affine {
                keep(&w.client, to);
            }
            return Choice::backend(to);
        }
        count(Reason::Raced);
    }
    count(Reason::RaceLost);
    Choice::NONE
}

#[inline(always)]
fn spread(flow: &Flow) -> u64 {
    let mut hash = ((flow.sport_be as u64) << 32) | ((flow.dport_be as u64) << 16) | flow.proto as u64;
    for i in 0..4 {
        hash = mix(hash ^ ((flow.src.words[i] as u64) << 32) ^ flow.dst.words[i] as u64);
    }
    hash
}

/// The index of a backend: from the service's Maglev table, or by weight where it has none.
#[inline(always)]
fn slot(service: &Service, hash: u64) -> Option<u32> {
    let bits = (service.flags >> MAGLEV_SHIFT) & 31;
    if bits == 0 {
        let group = group(service, (hash >> 32) as u32)?;
        return Some(group.first + scale(hash as u32, group.count));
    }
    let slot = (hash & ((1 << bits) - 1)) as u32;
    let key = MaglevKey { set: service.set, block: slot / MAGLEV_BLOCK as u32 };
    // SAFETY: a table is written whole before its service names it, and removed after.
    let table = unsafe { MAGLEV.get(&key) }?;
    let index = table[slot as usize & (MAGLEV_BLOCK - 1)];
    (index != MAGLEV_NOBODY).then_some(index as u32)
}

/// [`affine`] for a client that is known by its address.
#[inline(always)]
fn kept(client: &ClientKey, service: &Service) -> Option<Dial> {
    // SAFETY: as in `affine`.
    let before = unsafe { CLIENTS.get(client) }?;
    if now_s().wrapping_sub(before.used_s) >= service.affinity_s {
        return None;
    }
    let to = Dial { addr: before.addr, port_be: before.port_be };
    let member = MemberKey { set: service.set, port_be: to.port_be, pad: 0, addr: to.addr };
    // SAFETY: only whether it is there counts.
    unsafe { MEMBERS.get(&member) }?;
    keep(client, to);
    count(Reason::Affine);
    Some(to)
}

#[inline(always)]
fn keep(client: &ClientKey, to: Dial) {
    let value = Affinity { addr: to.addr, port_be: to.port_be, pad: 0, used_s: now_s() };
    if CLIENTS.insert(client, &value, 0).is_err() {
        count(Reason::AffinityFull);
    }
}

#[inline(always)]
fn client(ctx: &SockAddrContext, key: &ServiceKey) -> AffinityKey {
    // SAFETY: helper on the hook's own context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) };
    AffinityKey { netns, addr: key.addr, port_be: key.port_be, proto: key.proto, pad: [0; 5] }
}

#[inline(always)]
fn now_s() -> u32 {
    // SAFETY: a helper without arguments.
    (unsafe { bpf_ktime_get_boot_ns() } / 1_000_000_000) as u32
}

/// The backend that the client had, if it still takes connections and the client has not been away for too long.
#[inline(always)]
fn affine(ctx: &SockAddrContext, key: &ServiceKey, service: &Service) -> Option<Dial> {
    let client = client(ctx, key);
    // SAFETY: values are replaced whole; of two connections at once either may win.
    let before = unsafe { AFFINITY.get(&client) }?;
    if now_s().wrapping_sub(before.used_s) >= service.affinity_s {
        return None;
    }
    let to = Dial { addr: before.addr, port_be: before.port_be };
    let member = MemberKey { set: service.set, port_be: to.port_be, pad: 0, addr: to.addr };
    // SAFETY: only whether it is there counts.
    unsafe { MEMBERS.get(&member) }?;
    keep_affine(ctx, key, to);
    count(Reason::Affine);
    Some(to)
}

#[inline(always)]
fn keep_affine(ctx: &SockAddrContext, key: &ServiceKey, to: Dial) {
    let value = Affinity { addr: to.addr, port_be: to.port_be, pad: 0, used_s: now_s() };
    if AFFINITY.insert(&client(ctx, key), &value, 0).is_err() {
        count(Reason::AffinityFull);
    }
}

/// The group that a number falls to; none when the service or that group has no backend.
#[inline(always)]
fn group(service: &Service, by_weight: u32) -> Option<&Group> {
    let last = (service.groups as usize).checked_sub(1)? & (MAX_GROUPS - 1);
    let number = scale(by_weight, service.group[last].upto);
    for group in &service.group {
        if number < group.upto {
            return if group.count > 0 { Some(group) } else { None };
        }
    }
    None
}

/// For a caller in none of the service's source ranges.
#[inline(always)]
pub fn deny(ctx: &SockAddrContext, dial: &Dial, proto: u8) -> Verdict {
    told::refused(ctx, dial, proto, Reason::RefusedSourceRange);
    Verdict::DENY
}

#[inline(always)]
fn refuse(ctx: &SockAddrContext, dial: &Dial, proto: u8, reason: Reason) -> Verdict {
    told::refused(ctx, dial, proto, reason);
    Verdict::REFUSE
}

/// connect of a socket that is not captured.
#[inline(always)]
pub fn connect(ctx: &SockAddrContext, dial: Dial, proto: u8) -> Verdict {
    let choice = choose(ctx, &dial, proto, random(), random());
    match choice.found {
        Found::Unknown => Verdict::LEAVE,
        Found::None => refuse(ctx, &dial, proto, Reason::NoBackend),
        Found::RaceLost => refuse(ctx, &dial, proto, Reason::RaceLost),
        Found::Denied => deny(ctx, &dial, proto),
        Found::Backend => {
            let to = choice.to;
            told::call(ctx, &dial, &to, proto, Reason::Translated);
            connected(socket(ctx), dial, to, proto);
            Verdict::replace(to)
        }
    }
}

/// One datagram of an unconnected socket. The socket's cookie chooses, so that datagrams of one conversation (QUIC,
/// for one) reach one backend as long as the set stays the same.
#[inline(always)]
pub fn sendmsg(ctx: &SockAddrContext, dial: Dial) -> Verdict {
    let Some(proto) = protocol(ctx) else { return Verdict::LEAVE };
    let cookie = socket(ctx);
    let number = mix(cookie ^ ((dial.port_be as u64) << 48) ^ ((dial.addr.words[3] as u64) << 16));
    let choice = choose(ctx, &dial, proto, (number >> 32) as u32, number as u32);
    match choice.found {
        Found::Unknown => Verdict::LEAVE,
        Found::None => refuse(ctx, &dial, proto, Reason::NoBackend),
        Found::RaceLost => refuse(ctx, &dial, proto, Reason::RaceLost),
        Found::Denied => deny(ctx, &dial, proto),
        Found::Backend => {
            let to = choice.to;
            // The datagrams that follow go the same way: one event, and only the counter moves.
            match remember(cookie, dial, to, proto) {
                true => told::call(ctx, &dial, &to, proto, Reason::TranslatedDatagram),
                false => count(Reason::TranslatedDatagram),
            }
            Verdict::replace(to)
        }
    }
}

#[inline(always)]
fn connected(socket: u64, from: Dial, to: Dial, proto: u8) {
    if proto != UDP {
        remember(socket, from, to, proto);
        return;
    }
    let key = reverse_key(socket, &to, proto);
    let value = Reverse { addr: from.addr, port_be: from.port_be, pad: 0 };
    if CONNECTED.insert(&key, &value, 0).is_err() {
        count(Reason::ReverseFull);
    }
    // Of datagrams that it sent to the same backend before it was connected.
    let _ = REVERSE.remove(&key);
}

#[inline(always)]
fn reverse_key(socket: u64, to: &Dial, proto: u8) -> ReverseKey {
    ReverseKey { socket, addr: to.addr, port_be: to.port_be, proto, pad: [0; 5] }
}

/// Of two services that lead one socket to the same backend, the last used is the one that is shown. False where it is
/// known already.
#[inline(always)]
fn remember(socket: u64, from: Dial, to: Dial, proto: u8) -> bool {
    let key = reverse_key(socket, &to, proto);
    let value = Reverse { addr: from.addr, port_be: from.port_be, pad: 0 };
    // A socket that sends many datagrams writes once: the entry is there already.
    // SAFETY: compared only; at worst it is written again.
    if let Some(old) = unsafe { REVERSE.get(&key) }
        && old.port_be == value.port_be
        && old.addr.same(&value.addr)
    {
        return false;
    }
    if REVERSE.insert(&key, &value, 0).is_err() {
        count(Reason::ReverseFull);
    }
    true
}

#[inline(always)]
fn restore(ctx: &SockAddrContext, dial: Dial, reason: Reason) -> Verdict {
    let Some(proto) = protocol(ctx) else { return Verdict::LEAVE };
    let key = reverse_key(socket(ctx), &dial, proto);
    // What it sent to last goes before what it is connected to.
    // SAFETY: the entry belongs to this socket; nobody else writes it.
    let mut from = unsafe { REVERSE.get(&key) };
    if from.is_none() && proto == UDP {
        // SAFETY: as above.
        from = unsafe { CONNECTED.get(&key) };
    }
    let Some(from) = from else { return Verdict::LEAVE };
    count(reason);
    Verdict::replace(Dial { addr: from.addr, port_be: from.port_be })
}

#[inline(always)]
pub fn recvmsg(ctx: &SockAddrContext, source: Dial) -> Verdict {
    restore(ctx, source, Reason::SourceRestored)
}

#[inline(always)]
pub fn getpeername(ctx: &SockAddrContext, peer: Dial) -> Verdict {
    restore(ctx, peer, Reason::PeerRestored)
}

/// Nobody asks a socket that is closed: what was noted for it goes, so that a map full of dead ones does not forget those
/// that live. What a socket was connected to before it was connected anew stays until it is the oldest.
#[inline(always)]
pub fn released(ctx: &SockContext) {
    let sk = ctx.sock;
    let port_be = read!(sk, dst_port);
    if port_be == 0 {
        return;
    }
    let v4 = Addr::from_v4(read!(sk, dst_ip4));
    let v6 = [read!(sk, dst_ip6[0]), read!(sk, dst_ip6[1]), read!(sk, dst_ip6[2]), read!(sk, dst_ip6[3])];
    let addr = if read!(sk, family) == AF_INET { v4 } else { Addr { words: v6 } };
    let udp = read!(sk, protocol) == UDP as u32;
    // SAFETY: helper on the hook's own context.
    let socket = unsafe { bpf_get_socket_cookie(sk.cast()) };
    let key = reverse_key(socket, &Dial { addr, port_be }, if udp { UDP } else { TCP });
    // Looked up first: that takes no lock, and most sockets have dialled no service.
    // SAFETY: presence only.
    if udp {
        if unsafe { CONNECTED.get(&key) }.is_some() {
            let _ = CONNECTED.remove(&key);
        }
    } else if unsafe { REVERSE.get(&key) }.is_some() {
        let _ = REVERSE.remove(&key);
    }
}
