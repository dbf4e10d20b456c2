//! XDP: packets of known connections that leave by the link they came by, before the kernel has a structure for them.
//! Such are those to services whose backend is on another node, and their answers.
//!
//! All others go on to `from_wire` as they came: what begins, what is for this node, what is to be dropped or reported,
//! and once a second per CPU and destination one of these too, so that the kernel goes on asking whether its neighbour
//! is there, and a route that changed is noticed.

use crate::{
    connections,
    maps::{ADDRS, HOPS, LOCALS, count},
    packet::{Body, Bytes, Frame, Head, Ipv4, Ipv6, L3},
    route::{FIB_SUCCESS, question},
    work::{Work, work},
};
use aya_ebpf::{
    bindings::bpf_fib_lookup as FibLookup,
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
    helpers::generated::bpf_fib_lookup,
};
use core::ptr;
use sluice_ebpf_common::*;

#[inline(always)]
pub fn forward(packet: Frame) -> u32 {
    let Some(w) = work() else { return XDP_PASS };
    if packet.read(&mut w.head).is_err() || w.head.body == Body::Error || w.head.hops <= 1 {
        return XDP_PASS;
    }
    let Some(t) = connections::find(w) else { return XDP_PASS };
    if t.flags & CT_HERE != 0 {
        return XDP_PASS;
    }
    let Some(hop) = HOPS.get_ptr_mut(slot(&w.to.dst)) else { return XDP_PASS };
    // SAFETY: this CPU's own entry; programs of this hook run one after the other.
    let hop = unsafe { &mut *hop };
    let ifindex = packet.ifindex();
    if hop.tick != w.tick || hop.from != ifindex || !hop.to.same(&w.to.dst) {
        learn(&packet, w, hop);
        return XDP_PASS;
    }
    if length(&packet, &w.head).is_none_or(|length| hop.mtu < length) || !addressed(&packet, hop) {
        return XDP_PASS;
    }
    // Of the entry nothing is read afterwards: it may have moved.
    let relayed = t.flags & CT_RELAYED;
    if !connections::go_on(w, t) {
        return XDP_PASS;
    }
    let (to, hops) = match relayed {
        0 => (&w.to, 1),
        _ => (&w.head.flow, connections::relayed_hops(w.head.hops)),
    };
    if !packet.rewrite(&w.head, to, hops) {
        count(Reason::DroppedRewrite);
        return XDP_DROP;
    }
    let Some(macs) = packet.at::<[[u16; 3]; 2]>(0) else { return XDP_DROP };
    // SAFETY: checked to be in the packet.
    unsafe { ptr::write(macs, hop.macs) };
    count(Reason::ForwardedXdp);
    XDP_TX
}

/// To the link's own address, under which it would go on; not one of another machine that the link has let through.
#[inline(always)]
fn addressed(packet: &Frame, hop: &Hop) -> bool {
    let Some(to) = packet.at::<[u16; 3]>(0) else { return false };
    // SAFETY: checked to be in the packet.
    let to = unsafe { ptr::read_volatile(to) };
    let own = &hop.macs[1];
    to[0] == own[0] && to[1] == own[1] && to[2] == own[2]
}

/// Of the packet from its network header on, as that says: what can be looked at here is the first part of it.
#[inline(always)]
fn length(packet: &Frame, head: &Head) -> Option<u32> {
    // SAFETY: checked to be in the packet, both.
    Some(match head.v4 {
        true => u16::from_be(unsafe { ptr::read_volatile(&raw const (*packet.at::<Ipv4>(L3)?).total_be) }) as u32,
        false => {
            let ip = packet.at::<Ipv6>(L3)?;
            let payload = u16::from_be(unsafe { ptr::read_volatile(&raw const (*ip).length_be) });
            size_of::<Ipv6>() as u32 + payload as u32
        }
    })
}

/// Notes the way to `w.to`: with an MTU of 0 where it is not by the link that the packet came by.
#[inline(always)]
fn learn(packet: &Frame, w: &mut Work, hop: &mut Hop) {
    (hop.to, hop.from, hop.tick, hop.mtu) = (w.to.dst, packet.ifindex(), w.tick, 0);
    // SAFETY: presence only.
    let here = unsafe { ADDRS.get(&w.to.dst).is_some() || LOCALS.get(&w.to.dst).is_some() };
    if here || w.to.dst.is_link_local() {
        return;
    }
    question(&mut w.fib, &w.to, hop.from, 1);
    let p: *mut FibLookup = &mut w.fib;
    // SAFETY: parameters in the program's own room, their size given.
    let found = unsafe { bpf_fib_lookup(packet.raw.cast(), p, size_of::<FibLookup>() as i32, 0) };
    // Without a neighbour's address, or with a way through another link, the mark stays.
    if found as i64 == FIB_SUCCESS && w.fib.ifindex == hop.from {
        // SAFETY: the kernel has written it.
        let mtu = unsafe { w.fib.__bindgen_anon_1.mtu_result };
        hop.macs = [halves(w.fib.dmac), halves(w.fib.smac)];
        hop.mtu = mtu as u32;
    }
}

#[inline(always)]
fn halves(mac: [u8; 6]) -> [u16; 3] {
    [[mac[0], mac[1]], [mac[2], mac[3]], [mac[4], mac[5]]].map(u16::from_ne_bytes)
}

/// Two destinations of one slot take turns, at the price of a lookup.
#[inline(always)]
fn slot(to: &Addr) -> u32 {
    const BITS: u32 = (MAX_HOPS as u32).ilog2();
    (to.words[0] ^ to.words[1] ^ to.words[2] ^ to.words[3]).wrapping_mul(0x9e37_79b1) >> (32 - BITS)
}
