//! Service load balancing at the socket: service address → backend on connect and sendmsg, and back on recvmsg and
//! getpeername. It keeps no state per packet. `REVERSE` gives the application its own words back, `AFFINITY` keeps a
//! client with its backend where the service asks for that; both may forget.

use crate::maps::{AFFINITY, BACKENDS, MEMBERS, REVERSE, SERVICES, count};
use aya_ebpf::{
    helpers::generated::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_ktime_get_boot_ns},
    programs::SockAddrContext,
};
use sluice_ebpf_common::*;

/// An address and port as the application sees it.
#[derive(Clone, Copy)]
pub struct Dial {
    pub addr: Addr,
    pub port_be: u16,
}

pub enum Verdict {
    Leave,
    Replace(Dial),
    /// ECONNREFUSED, or EPERM where the kernel cannot say that.
    Refuse,
    /// EPERM.
    Deny,
}

/// Attempts to read a service and its backend consistently; each failure needs another update of the same service
/// within some hundred nanoseconds.
const ATTEMPTS: u32 = 3;
const SOCK_STREAM: u32 = 1;
const SOCK_DGRAM: u32 = 2;
const IPPROTO_MPTCP: u32 = 262;

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

pub enum Choice {
    /// Not a service address.
    Unknown,
    None,
    Backend(Dial),
}

#[inline(always)]
pub fn is_node_local(dial: &Dial, proto: u8) -> bool {
    let key = ServiceKey { addr: dial.addr, port_be: dial.port_be, proto, scope: INSIDE };
    // SAFETY: read once; a stale value decides as the moment before would have.
    unsafe { SERVICES.get(&key) }.is_some_and(|s| s.flags & SERVICE_NODE_LOCAL != 0)
}

/// Two even numbers choose: one the group by weight, one the backend in it; unless the client has a backend already.
#[inline(always)]
pub fn choose(ctx: &SockAddrContext, dial: &Dial, proto: u8, by_weight: u32, in_group: u32) -> Choice {
    let key = ServiceKey { addr: dial.addr, port_be: dial.port_be, proto, scope: INSIDE };
    for _ in 0..ATTEMPTS {
        // SAFETY: entries may be replaced while read; `Backend` says for whom it was written and is checked.
        let Some(service) = (unsafe { SERVICES.get(&key) }) else { return Choice::Unknown };
        if service.affinity_s > 0
            && let Some(to) = affine(ctx, &key, service)
        {
            return Choice::Backend(to);
        }
        let Some(group) = group(service, by_weight) else { return Choice::None };
        let index = group.first + scale(in_group, group.count);
        // SAFETY: as above.
        if let Some(backend) = unsafe { BACKENDS.get(BackendKey { set: service.set, index }) }
            && backend.service_port_be == key.port_be
            && backend.service_word == key.addr.words[3]
        {
            let to = Dial { addr: backend.addr, port_be: backend.port_be };
            if service.affinity_s > 0 {
                keep_affine(ctx, &key, to);
            }
            return Choice::Backend(to);
        }
        count(Reason::Raced);
    }
    count(Reason::RaceLost);
    Choice::None
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

/// connect of a socket that is not captured.
#[inline(always)]
pub fn connect(ctx: &SockAddrContext, dial: Dial, proto: u8) -> Verdict {
    match choose(ctx, &dial, proto, random(), random()) {
        Choice::Unknown => Verdict::Leave,
        Choice::None => {
            count(Reason::NoBackend);
            Verdict::Refuse
        }
        Choice::Backend(to) => {
            count(Reason::Translated);
            remember(socket(ctx), dial, to, proto);
            Verdict::Replace(to)
        }
    }
}

/// One datagram of an unconnected socket. The socket's cookie chooses, so that datagrams of one conversation (QUIC,
/// for one) reach one backend as long as the set stays the same.
#[inline(always)]
pub fn sendmsg(ctx: &SockAddrContext, dial: Dial) -> Verdict {
    let Some(proto) = protocol(ctx) else { return Verdict::Leave };
    let cookie = socket(ctx);
    let number = mix(cookie ^ ((dial.port_be as u64) << 48) ^ ((dial.addr.words[3] as u64) << 16));
    match choose(ctx, &dial, proto, (number >> 32) as u32, number as u32) {
        Choice::Unknown => Verdict::Leave,
        Choice::None => {
            count(Reason::NoBackend);
            Verdict::Refuse
        }
        Choice::Backend(to) => {
            count(Reason::TranslatedDatagram);
            remember(cookie, dial, to, proto);
            Verdict::Replace(to)
        }
    }
}

/// Finalizer of MurmurHash3 with 64 bits: cookies are counted up, this spreads them.
#[inline(always)]
fn mix(mut k: u64) -> u64 {
    k ^= k >> 33;
    k = k.wrapping_mul(0xff51_afd7_ed55_8ccd);
    k ^= k >> 33;
    k = k.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    k ^ (k >> 33)
}

/// Of two services that lead one socket to the same backend, the last used is the one that is shown.
#[inline(always)]
fn remember(socket: u64, from: Dial, to: Dial, proto: u8) {
    let key = ReverseKey { socket, addr: to.addr, port_be: to.port_be, proto, pad: [0; 5] };
    let value = Reverse { addr: from.addr, port_be: from.port_be, pad: 0 };
    // A socket that sends many datagrams writes once: the entry is there already.
    // SAFETY: compared only; at worst it is written again.
    if let Some(old) = unsafe { REVERSE.get(&key) }
        && old.port_be == value.port_be
        && old.addr.same(&value.addr)
    {
        return;
    }
    if REVERSE.insert(&key, &value, 0).is_err() {
        count(Reason::ReverseFull);
    }
}

#[inline(always)]
fn restore(ctx: &SockAddrContext, dial: Dial, reason: Reason) -> Verdict {
    let Some(proto) = protocol(ctx) else { return Verdict::Leave };
    let key = ReverseKey { socket: socket(ctx), addr: dial.addr, port_be: dial.port_be, proto, pad: [0; 5] };
    // SAFETY: the entry belongs to this socket; nobody else writes it.
    let Some(from) = (unsafe { REVERSE.get(&key) }) else { return Verdict::Leave };
    count(reason);
    Verdict::Replace(Dial { addr: from.addr, port_be: from.port_be })
}

#[inline(always)]
pub fn recvmsg(ctx: &SockAddrContext, source: Dial) -> Verdict {
    restore(ctx, source, Reason::SourceRestored)
}

#[inline(always)]
pub fn getpeername(ctx: &SockAddrContext, peer: Dial) -> Verdict {
    restore(ctx, peer, Reason::PeerRestored)
}
