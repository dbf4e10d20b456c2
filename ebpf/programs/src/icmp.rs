//! ICMP: errors about packets that were translated are translated back, so that both sides recognize their own words;
//! and errors of our own, where the node's stack could not give them because it does not know the address.

use crate::{
    connections::{self, Known},
    maps::{REPORTS, count},
    packet::{Body, Bytes, Head, Icmp, Ipv4, Ipv6, L3, Skb, fold16, fold32, replaced16, replaced32},
    route::{DROP, dropped},
    work::Work,
};
use aya_ebpf::helpers::generated::{
    bpf_ktime_get_coarse_ns, bpf_l4_csum_replace, bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail,
    bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use core::ptr;
use sluice_ebpf_common::*;

/// Length of the header of an ICMP error, ahead of the packet that it quotes.
const ICMP_HEADER: u32 = 8;

macro_rules! load {
    ($skb:expr, $at:expr, $into:expr, $size:literal) => {{
        let into: *mut _ = $into;
        // SAFETY: into a buffer of at least that size.
        unsafe { bpf_skb_load_bytes($skb.raw.cast(), $at, into.cast(), $size) == 0 }
    }};
}

macro_rules! store {
    ($skb:expr, $at:expr, $from:expr) => {{
        let value = $from;
        // SAFETY: from a value on this stack, its size given.
        unsafe { bpf_skb_store_bytes($skb.raw, $at, (&raw const value).cast(), size_of_val(&value) as u32, 0) == 0 }
    }};
}

/// Reads into `w.about` what the error is about: where that one's transport header is, and whether it is an echo.
#[inline(always)]
fn quoted(skb: &Skb, w: &mut Work) -> Option<(u32, bool)> {
    let l3 = w.head.l4 + ICMP_HEADER;
    let flow = &mut w.about;
    *flow = Flow::default();
    let ip = &mut w.quoted;
    let l4 = if w.head.v4 {
        if !load!(skb, l3, ip, 20) {
            return None;
        }
        (flow.src, flow.dst, flow.proto) = (Addr::from_v4(ip[3]), Addr::from_v4(ip[4]), ip[2].to_ne_bytes()[1]);
        l3 + (ip[0].to_ne_bytes()[0] & 15) as u32 * 4
    } else {
        if !load!(skb, l3, ip, 40) {
            return None;
        }
        (flow.src, flow.dst) =
            (Addr { words: [ip[2], ip[3], ip[4], ip[5]] }, Addr { words: [ip[6], ip[7], ip[8], ip[9]] });
        flow.proto = ip[1].to_ne_bytes()[2];
        l3 + 40
    };
    let mut first = [0u16; 4];
    if !load!(skb, l4, &mut first, 8) {
        return None;
    }
    match flow.proto {
        TCP | UDP => (flow.sport_be, flow.dport_be) = (first[0], first[1]),
        ICMP | ICMPV6 => match (flow.proto, first[0].to_ne_bytes()[0]) {
            (ICMP, 8) | (ICMPV6, 128) => flow.sport_be = first[2],
            (ICMP, 0) | (ICMPV6, 129) => flow.dport_be = first[2],
            _ => return None,
        },
        _ => return None,
    }
    Some((l4, flow.proto == ICMP || flow.proto == ICMPV6))
}

/// What the error is about: of a connection that was translated, it is so too, and `w.head.flow` as it is now.
#[inline(always)]
pub fn translate(skb: &Skb, w: &mut Work) -> Known {
    let Some((l4, echo)) = quoted(skb, w) else { return Known::No };
    w.key = w.about.flipped();
    let now = connections::now(w);
    match connections::entry(&w.key) {
        Some(t) if t.expired(now) => return Known::No,
        Some(t) if t.flags & CT_RELAYED != 0 => {
            w.to = w.head.flow;
            w.to.dst = t.to.dst;
            return Known::Relayed;
        }
        Some(t) => w.before = t.to.flipped(),
        None => return Known::No,
    }
    let Some(change) = requote(skb, w, l4, echo) else { return Known::No };
    // SAFETY: helper on the hook's own context.
    if change != 0 && unsafe { bpf_l4_csum_replace(skb.raw, w.head.l4 + 2, 0, fold32(change), 0) } != 0 {
        return Known::No;
    }
    w.to = w.head.flow;
    // Whoever reports is kept, unless it is the backend, which the caller does not know.
    if w.to.src.same(&w.about.dst) {
        w.to.src = w.before.dst;
    }
    w.to.dst = w.before.src;
    if !skb.rewrite(&w.head, &w.to, 0) {
        return Known::No;
    }
    w.head.flow = w.to;
    count(Reason::IcmpTranslated);
    Known::Translated
}

/// Writes `w.before` over `w.about` in the packet; what the ICMP checksum gains.
#[inline(always)]
fn requote(skb: &Skb, w: &Work, l4: u32, echo: bool) -> Option<u64> {
    let (about, before) = (&w.about, &w.before);
    let l3 = w.head.l4 + ICMP_HEADER;
    let mut change = 0;
    if w.head.v4 {
        let (from, to) = ([about.src.words[3], about.dst.words[3]], [before.src.words[3], before.dst.words[3]]);
        let mut check = 0u16;
        if !load!(skb, l3 + 10, &mut check, 2) {
            return None;
        }
        let sum = !check as u64 + replaced32(from[0], to[0]) + replaced32(from[1], to[1]);
        // The header's sum stays what it was, and so the ICMP checksum over it.
        if !store!(skb, l3 + 10, !fold16(sum)) || !store!(skb, l3 + 12, to) {
            return None;
        }
    } else {
        for i in 0..4 {
            change += replaced32(about.src.words[i], before.src.words[i]);
            change += replaced32(about.dst.words[i], before.dst.words[i]);
        }
        if !store!(skb, l3 + 8, before.src.words) || !store!(skb, l3 + 24, before.dst.words) {
            return None;
        }
    }
    if echo {
        // One of the two is the identifier, the other is 0.
        let (from, to) = (about.sport_be | about.dport_be, before.sport_be | before.dport_be);
        return store!(skb, l4 + 4, to).then(|| change + replaced16(from, to));
    }
    change += replaced16(about.sport_be, before.sport_be) + replaced16(about.dport_be, before.dport_be);
    store!(skb, l4, [before.sport_be, before.dport_be]).then_some(change)
}

/// An error that this node reports.
#[derive(Clone, Copy)]
pub enum Report {
    /// With the length that would pass.
    TooBig(u16),
    PortUnreachable,
}

const BPF_ADJ_ROOM_MAC: u32 = 1;

/// `N` words of the packet are quoted: its network header and eight bytes (RFC 792); of TCP twenty, because the kernel
/// does not cut off a checksum that a device is still to fill in.
#[repr(C)]
struct Answer4<const N: usize> {
    ip: Ipv4,
    icmp: Icmp,
    quoted: [u32; N],
}

#[repr(C)]
struct Answer6<const N: usize> {
    ip: Ipv6,
    icmp: Icmp,
    quoted: [u32; N],
}

/// Whether this CPU may send one more (RFC 1812 §4.3.2.8).
#[inline(always)]
fn allowed(report: Report) -> bool {
    let Some(reports) = REPORTS.get_ptr_mut(0) else { return false };
    // SAFETY: this CPU's own entry; packet programs of one CPU run one after the other.
    let reports = unsafe { &mut *reports };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    match report {
        Report::PortUnreachable => reports.unreachable.take(now, &Reports::UNREACHABLE),
        Report::TooBig(_) => reports.too_big.take(now, &Reports::TOO_BIG),
    }
}

/// Drops the packet and tells its sender why, as far as an error may be sent about it (RFC 1122 §3.2.2: not about a
/// later fragment, nor to many); one about a packet with IP options is not. What is beyond the limit has a reason of its own.
#[inline(always)]
pub fn report(skb: &Skb, w: &mut Work, report: Report, reason: Reason, at: u8) -> i32 {
    let head = &w.head;
    let plain = head.l4 == L3 + if head.v4 { 20 } else { 40 };
    if !plain || head.body != Body::Ports || head.flow.src.is_unspecified() {
        return dropped(skb, w, reason, at);
    }
    if !allowed(report) {
        return dropped(skb, w, Reason::DroppedErrorLimit, at);
    }
    dropped(skb, w, reason, at);
    let sent = match (head.v4, head.flow.proto == TCP) {
        (true, true) => answer4::<10>(skb, head, report),
        (true, false) => answer4::<7>(skb, head, report),
        (false, true) => answer6::<15>(skb, head, report),
        (false, false) => answer6::<12>(skb, head, report),
    };
    if sent.is_none() {
        return DROP;
    }
    // SAFETY: helper.
    unsafe { bpf_redirect(skb.ifindex(), 0) as i32 }
}

/// Cuts the packet to what is quoted, and makes room ahead of it.
#[inline(always)]
fn make_room(skb: &Skb, quoted: u32, room: u32) -> Option<()> {
    // SAFETY: helpers on the hook's own context.
    unsafe {
        if bpf_skb_change_tail(skb.raw, L3 + quoted, 0) != 0 {
            return None;
        }
        if bpf_skb_adjust_room(skb.raw, room as i32, BPF_ADJ_ROOM_MAC, 0) != 0 {
            return None;
        }
    }
    turn_around(skb)
}

/// Back to the link-layer address that it came from.
#[inline(always)]
fn turn_around(skb: &Skb) -> Option<()> {
    let p = skb.at::<[u16; 6]>(0)?;
    // SAFETY: checked to be in the packet.
    unsafe {
        let [a, b, c, d, e, f] = ptr::read_volatile(p);
        ptr::write_volatile(p, [d, e, f, a, b, c]);
    }
    Some(())
}

#[inline(always)]
fn answer4<const N: usize>(skb: &Skb, head: &Head, report: Report) -> Option<()> {
    make_room(skb, N as u32 * 4, 28)?;
    let total = (28 + N * 4) as u16;
    // SAFETY: checked to be in the packet.
    let a = unsafe { &mut *skb.at::<Answer4<N>>(L3)? };
    a.ip = Ipv4 {
        version_length: 0x45,
        tos: 0,
        total_be: total.to_be(),
        id: 0,
        fragment_be: 0,
        ttl: 64,
        proto: ICMP,
        check: 0,
        src: head.flow.dst.words[3],
        dst: head.flow.src.words[3],
    };
    a.ip.check = !fold16(
        u32::from_ne_bytes([0x45, 0, 0, total as u8]) as u64
            + u32::from_ne_bytes([64, ICMP, 0, 0]) as u64
            + a.ip.src as u64
            + a.ip.dst as u64,
    );
    let (code, rest) = match report {
        Report::TooBig(mtu) => (4, mtu.to_be()),
        Report::PortUnreachable => (3, 0),
    };
    a.icmp = Icmp { kind: 3, code, check: 0, id: 0, rest };
    let mut sum = u16::from_ne_bytes([3, code]) as u64 + rest as u64;
    for word in &a.quoted {
        sum += *word as u64;
    }
    a.icmp.check = !fold16(sum);
    Some(())
}

#[inline(always)]
fn answer6<const N: usize>(skb: &Skb, head: &Head, report: Report) -> Option<()> {
    make_room(skb, N as u32 * 4, 48)?;
    let length = (8 + N * 4) as u16;
    // SAFETY: checked to be in the packet.
    let a = unsafe { &mut *skb.at::<Answer6<N>>(L3)? };
    a.ip = Ipv6 {
        class_label: 0x6000_0000_u32.to_be(),
        length_be: length.to_be(),
        next: ICMPV6,
        hops: 64,
        src: head.flow.dst.words,
        dst: head.flow.src.words,
    };
    let (kind, code, rest) = match report {
        Report::TooBig(mtu) => (2, 0, mtu.to_be()),
        Report::PortUnreachable => (1, 4, 0),
    };
    a.icmp = Icmp { kind, code, check: 0, id: 0, rest };
    let mut sum = u16::from_ne_bytes([kind, code]) as u64 + rest as u64;
    sum += (length as u32).to_be() as u64 + (ICMPV6 as u32).to_be() as u64;
    for i in 0..4 {
        sum += a.ip.src[i] as u64 + a.ip.dst[i] as u64;
    }
    for word in &a.quoted {
        sum += *word as u64;
    }
    a.icmp.check = !fold16(sum);
    Some(())
}
