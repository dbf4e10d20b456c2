//! Answers ARP requests (RFC 826) and neighbour solicitations (RFC 4861) for addresses that this node announces. No link
//! has them: the packets that come are translated before the stack would look.

use crate::{
    maps::{ANNOUNCED, DEVICES, count},
    packet::{Bytes, Ipv6, L3, Skb, fold16},
    route::NEXT,
};
use aya_ebpf::helpers::generated::bpf_redirect;
use core::ptr;
use sluice_ebpf_common::*;

type Mac = [u16; 3];

#[repr(C)]
struct Ethernet {
    dst: Mac,
    src: Mac,
    kind: u16,
}

#[repr(C)]
struct Arp {
    hardware_be: u16,
    protocol_be: u16,
    lengths: u16,
    operation_be: u16,
    sender: Mac,
    sender_ip: [u16; 2],
    target: Mac,
    target_ip: [u16; 2],
}

/// Solicitation or advertisement, with one link-layer address option.
#[repr(C)]
struct Discovery {
    ip: Ipv6,
    kind: u8,
    code: u8,
    check: u16,
    flags: u32,
    target: [u32; 4],
    option: u8,
    length: u8,
    mac: Mac,
}

#[inline(always)]
fn own_mac(skb: &Skb) -> Option<Mac> {
    // SAFETY: replaced whole.
    let mac = unsafe { DEVICES.get(skb.ifindex()) }?.mac;
    Some([
        u16::from_ne_bytes([mac[0], mac[1]]),
        u16::from_ne_bytes([mac[2], mac[3]]),
        u16::from_ne_bytes([mac[4], mac[5]]),
    ])
}

#[inline(always)]
fn announced(addr: &Addr) -> bool {
    // SAFETY: presence only.
    unsafe { ANNOUNCED.get(addr) }.is_some()
}

#[inline(always)]
fn back(skb: &Skb) -> i32 {
    count(Reason::AddressAnswered);
    // SAFETY: helper.
    unsafe { bpf_redirect(skb.ifindex(), 0) as i32 }
}

#[inline(always)]
pub fn answer_arp(skb: &Skb) -> i32 {
    const ETHERNET: u16 = 1;
    const LENGTHS: [u8; 2] = [6, 4];
    let Some(arp) = skb.at::<Arp>(L3) else { return NEXT };
    // SAFETY: checked to be in the packet.
    let arp = unsafe { &mut *arp };
    let asked = arp.target_ip;
    let request = arp.hardware_be == ETHERNET.to_be()
        && arp.protocol_be == crate::packet::ETH_P_IP.to_be()
        && arp.lengths == u16::from_ne_bytes(LENGTHS)
        && arp.operation_be == 1_u16.to_be();
    let [a, b] = [asked[0].to_ne_bytes(), asked[1].to_ne_bytes()];
    if !request || !announced(&Addr::from_v4(u32::from_ne_bytes([a[0], a[1], b[0], b[1]]))) {
        return NEXT;
    }
    let Some(mac) = own_mac(skb) else { return NEXT };
    let Some(frame) = skb.at::<Ethernet>(0) else { return NEXT };
    let Some(arp) = skb.at::<Arp>(L3) else { return NEXT };
    // SAFETY: as above.
    let (arp, frame) = unsafe { (&mut *arp, &mut *frame) };
    (frame.dst, frame.src) = (arp.sender, mac);
    (arp.target, arp.target_ip) = (arp.sender, arp.sender_ip);
    (arp.sender, arp.sender_ip) = (mac, asked);
    arp.operation_be = 2_u16.to_be();
    back(skb)
}

#[inline(always)]
pub fn answer_nd(skb: &Skb) -> i32 {
    const SOLICITATION: u8 = 135;
    const ADVERTISEMENT: u8 = 136;
    const SOLICITED_OVERRIDE: u32 = 0x6000_0000;
    let Some(nd) = skb.at::<Discovery>(L3) else { return NEXT };
    // SAFETY: checked to be in the packet.
    let nd = unsafe { &*nd };
    let asked = Addr { words: nd.target };
    let from = Addr { words: nd.ip.src };
    // Who asks without an address looks for a double of its own (RFC 4862 §5.4.3): it is not answered.
    let valid = nd.ip.next == ICMPV6 && nd.ip.hops == 255 && nd.kind == SOLICITATION && nd.code == 0;
    if !valid || from.is_unspecified() || !announced(&asked) {
        return NEXT;
    }
    let Some(mac) = own_mac(skb) else { return NEXT };
    let Some(frame) = skb.at::<Ethernet>(0) else { return NEXT };
    let Some(nd) = skb.at::<Discovery>(L3) else { return NEXT };
    // SAFETY: as above.
    let (frame, nd) = unsafe { (&mut *frame, &mut *nd) };
    (frame.dst, frame.src) = (frame.src, mac);
    (nd.ip.src, nd.ip.dst) = (asked.words, from.words);
    nd.ip.length_be = 32_u16.to_be();
    nd.kind = ADVERTISEMENT;
    nd.flags = SOLICITED_OVERRIDE.to_be();
    (nd.option, nd.length, nd.mac) = (2, 1, mac);
    let mut sum = 32_u32.to_be() as u64 + (ICMPV6 as u32).to_be() as u64;
    sum += u16::from_ne_bytes([ADVERTISEMENT, 0]) as u64 + nd.flags as u64 + u16::from_ne_bytes([2, 1]) as u64;
    for i in 0..4 {
        // The target is one of the two addresses, and counts again.
        sum += asked.words[i] as u64 * 2 + from.words[i] as u64;
    }
    for part in mac {
        sum += part as u64;
    }
    // SAFETY: a field of a header that was checked to be in the packet.
    unsafe { ptr::write_volatile(&raw mut nd.check, !fold16(sum)) };
    back(skb)
}
