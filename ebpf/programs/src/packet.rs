//! Packets: read into a [`Head`], rewritten in place with their checksums. IPv4 with options, IPv6 with extension headers,
//! fragments; TCP, UDP, ICMP echo, and ICMP errors as far as `icmp` goes on reading them.

use crate::maps::FRAGMENTS;
use aya_ebpf::{
    bindings::{__sk_buff, xdp_md},
    helpers::generated::{bpf_l4_csum_replace, bpf_skb_pull_data},
};
use core::ptr;
use sluice_ebpf_common::*;

/// Length of the Ethernet header: where the network header is.
pub const L3: u32 = 14;
pub const ETH_P_IP: u16 = 0x0800;
pub const ETH_P_IPV6: u16 = 0x86dd;
pub const ETH_P_ARP: u16 = 0x0806;

const BPF_F_PSEUDO_HDR: u64 = 0x10;
const BPF_F_MARK_MANGLED_0: u64 = 0x20;
const BPF_F_IPV6: u64 = 0x80;

/// Headers of this length are in the linear part, or are brought there.
const HEADERS: u32 = 128;

#[repr(C)]
pub struct Ipv4 {
    pub version_length: u8,
    pub tos: u8,
    pub total_be: u16,
    pub id: u16,
    pub fragment_be: u16,
    pub ttl: u8,
    pub proto: u8,
    pub check: u16,
    pub src: u32,
    pub dst: u32,
}

#[repr(C)]
pub struct Ipv6 {
    pub class_label: u32,
    pub length_be: u16,
    pub next: u8,
    pub hops: u8,
    pub src: [u32; 4],
    pub dst: [u32; 4],
}

const MAY_NOT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const FRAGMENT_OFFSET: u16 = 0x1fff;
/// In the first word of the fragment header.
const FRAGMENT_OFFSET6: u32 = 0xfff8;
const MORE_FRAGMENTS6: u32 = 1;

/// What follows the network header.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Body {
    /// TCP or UDP.
    Ports,
    /// ICMP echo: the identifier is the asking side's port.
    EchoRequest,
    EchoReply,
    /// An ICMP error; the flow has no ports.
    Error,
    /// A later fragment: the ports are those of the first one.
    Later,
}

/// What decides about a packet.
#[repr(C)]
pub struct Head {
    pub flow: Flow,
    /// Where the transport header is.
    pub l4: u32,
    pub body: Body,
    pub v4: bool,
    /// Whoever sends it on may divide it.
    pub divisible: bool,
    /// 0 where the packet is no TCP, or has no such header.
    pub tcp_flags: u8,
    pub hops: u8,
}

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

impl Head {
    #[inline(always)]
    fn begin(&mut self, proto: u8, l4: u32, v4: bool, hops: u8) {
        (self.flow.sport_be, self.flow.dport_be, self.flow.proto, self.flow.pad) = (0, 0, proto, [0; 3]);
        self.divisible = false;
        (self.l4, self.v4, self.hops, self.tcp_flags, self.body) = (l4, v4, hops, 0, Body::Ports);
    }
}

/// Why a packet was not read.
pub enum Unread {
    /// Not IP.
    Other,
    /// A protocol that is not translated; the addresses are read.
    Foreign,
    /// A later fragment whose first one was not seen; the addresses are read, and the protocol.
    Orphan,
    Drop(Reason),
}

const MALFORMED: Unread = Unread::Drop(Reason::DroppedMalformed);

/// The packet that a program was called for.
#[derive(Clone, Copy)]
pub struct Skb {
    pub raw: *mut __sk_buff,
}

macro_rules! field {
    ($skb:expr, $name:ident) => {
        // SAFETY: a field of the hook's own context; volatile, because helpers change it.
        unsafe { ptr::read_volatile(&raw const (*$skb.raw).$name) }
    };
}

/// Bytes of a packet that can be looked at, beginning with its Ethernet header.
pub trait Bytes {
    /// Address of the first byte.
    fn start(&self) -> usize;
    /// Address behind the last byte.
    fn end(&self) -> usize;
    /// Brings the headers to where they can be looked at.
    fn linearize(&self);

    /// A header at an offset from the start of the frame, if the packet has all of it.
    #[inline(always)]
    fn at<T>(&self, offset: u32) -> Option<*mut T> {
        let start = self.start() + offset as usize;
        (start + size_of::<T>() <= self.end()).then_some(start as *mut T)
    }

    /// In host order.
    #[inline(always)]
    fn ethertype(&self) -> Option<u16> {
        // SAFETY: checked to be in the packet.
        self.at::<u16>(12).map(|p| u16::from_be(unsafe { ptr::read_volatile(p) }))
    }

    #[inline(always)]
    fn read(&self, head: &mut Head) -> Result<(), Unread> {
        self.linearize();
        match self.ethertype() {
            Some(ETH_P_IP) => self.read4(head),
            Some(ETH_P_IPV6) => self.read6(head),
            Some(_) => Err(Unread::Other),
            None => Err(MALFORMED),
        }
    }

    #[inline(always)]
    fn read4(&self, head: &mut Head) -> Result<(), Unread> {
        let ip = self.at::<Ipv4>(L3).ok_or(MALFORMED)?;
        // SAFETY: checked to be in the packet; read before any helper moves it.
        let ip = unsafe { &*ip };
        let length = ((ip.version_length & 15) as u32) << 2;
        let total = u16::from_be(ip.total_be) as u32;
        if ip.version_length >> 4 != 4 || length < 20 || total < length {
            return Err(MALFORMED);
        }
        head.flow.src = Addr::from_v4(ip.src);
        head.flow.dst = Addr::from_v4(ip.dst);
        head.begin(ip.proto, L3 + length, true, ip.ttl);
        let fragment = u16::from_be(ip.fragment_be);
        head.divisible = fragment & MAY_NOT_FRAGMENT == 0;
        let id = ip.id as u32;
        if fragment & FRAGMENT_OFFSET != 0 {
            return later(head, id);
        }
        self.transport(head)?;
        if fragment & MORE_FRAGMENTS != 0 {
            note_first(head, id);
        }
        Ok(())
    }

    #[inline(always)]
    fn read6(&self, head: &mut Head) -> Result<(), Unread> {
        let ip = self.at::<Ipv6>(L3).ok_or(MALFORMED)?;
        // SAFETY: as above.
        let ip = unsafe { &*ip };
        if u32::from_be(ip.class_label) >> 28 != 6 {
            return Err(MALFORMED);
        }
        head.flow.src = Addr { words: ip.src };
        head.flow.dst = Addr { words: ip.dst };
        let (mut next, mut l4, mut fragment, mut id) = (ip.next, L3 + 40, 0, 0);
        head.begin(next, l4, false, ip.hops);
        for _ in 0..EXTENSIONS {
            match next {
                HOP_BY_HOP | ROUTING | DESTINATION => {
                    // SAFETY: checked to be in the packet.
                    let option = unsafe { ptr::read_volatile(self.at::<[u8; 2]>(l4).ok_or(MALFORMED)?) };
                    next = option[0];
                    l4 += (option[1] as u32 + 1) << 3;
                }
                FRAGMENT => {
                    let f = self.at::<[u32; 2]>(l4).ok_or(MALFORMED)?;
                    // SAFETY: as above.
                    let [f, number] = unsafe { ptr::read_volatile(f) };
                    fragment = u32::from_be(f);
                    id = number;
                    next = (fragment >> 24) as u8;
                    l4 += 8;
                }
                _ => break,
            }
            if l4 > OFFSETS {
                return Err(MALFORMED);
            }
            if fragment & FRAGMENT_OFFSET6 != 0 {
                break;
            }
        }
        head.l4 = l4;
        head.flow.proto = next;
        if fragment & FRAGMENT_OFFSET6 != 0 {
            return later(head, id);
        }
        self.transport(head)?;
        if fragment & MORE_FRAGMENTS6 != 0 {
            note_first(head, id);
        }
        Ok(())
    }

    /// Reads the transport header at `head.l4`.
    #[inline(always)]
    fn transport(&self, head: &mut Head) -> Result<(), Unread> {
        let at = head.l4 & OFFSETS;
        match head.flow.proto {
            TCP => {
                // SAFETY: checked to be in the packet, here and below.
                let tcp = unsafe { &*self.at::<Tcp>(at).ok_or(MALFORMED)? };
                (head.flow.sport_be, head.flow.dport_be) = (tcp.sport_be, tcp.dport_be);
                head.tcp_flags = tcp.flags;
                if tcp.offset >> 4 < 5 {
                    return Err(MALFORMED);
                }
            }
            UDP => {
                let udp = unsafe { &*self.at::<Udp>(at).ok_or(MALFORMED)? };
                (head.flow.sport_be, head.flow.dport_be) = (udp.sport_be, udp.dport_be);
            }
            ICMP | ICMPV6 if (head.flow.proto == ICMP) == head.v4 => {
                let icmp = unsafe { &*self.at::<Icmp>(at).ok_or(MALFORMED)? };
                match (head.flow.proto, icmp.kind) {
                    (ICMP, 8) | (ICMPV6, 128) => {
                        head.body = Body::EchoRequest;
                        head.flow.sport_be = icmp.id;
                    }
                    (ICMP, 0) | (ICMPV6, 129) => {
                        head.body = Body::EchoReply;
                        head.flow.dport_be = icmp.id;
                    }
                    // Unreachable, time exceeded, parameter problem (RFC 792); 1 to 4 of RFC 4443.
                    (ICMP, 3 | 11 | 12) | (ICMPV6, 1..=4) => head.body = Body::Error,
                    _ => return Err(Unread::Foreign),
                }
            }
            _ => return Err(Unread::Foreign),
        }
        Ok(())
    }

    /// Gives the packet other addresses and ports, and takes hops of it, one where it is sent on; what its checksums gain.
    /// `None`: it could not be done and the packet is damaged.
    #[inline(always)]
    fn patch(&self, head: &Head, to: &Flow, hops: u8) -> Option<Patched> {
        let addresses = if head.v4 { self.network4(to, hops)? } else { self.network6(to, hops)? };
        let at = head.l4 & OFFSETS;
        let ports = match head.body {
            Body::Later => return Some(Patched { check: None, addresses, ports: 0 }),
            Body::Error => 0,
            Body::Ports => {
                let p = self.at::<[u16; 2]>(at)?;
                // SAFETY: checked to be in the packet.
                let old = unsafe { ptr::replace(p, [to.sport_be, to.dport_be]) };
                replaced16(old[0], to.sport_be) + replaced16(old[1], to.dport_be)
            }
            Body::EchoRequest | Body::EchoReply => {
                let p = self.at::<u16>(at + 4)?;
                let id = if head.body == Body::EchoRequest { to.sport_be } else { to.dport_be };
                // SAFETY: as above.
                replaced16(unsafe { ptr::replace(p, id) }, id)
            }
        };
        // An ICMP checksum covers no addresses, an ICMPv6 one does (RFC 4443 §2.3).
        let (offset, addresses) = match head.flow.proto {
            TCP => (16, addresses),
            UDP => (6, addresses),
            ICMP => (2, 0),
            _ => (2, addresses),
        };
        Some(Patched { check: Some(at + offset), addresses, ports })
    }

    #[inline(always)]
    fn network4(&self, to: &Flow, hops: u8) -> Option<u64> {
        // SAFETY: checked to be in the packet.
        let ip = unsafe { &mut *self.at::<Ipv4>(L3)? };
        let (src, dst) = (to.src.words[3], to.dst.words[3]);
        let difference = replaced32(ip.src, src) + replaced32(ip.dst, dst);
        (ip.src, ip.dst) = (src, dst);
        let mut sum = !ip.check as u64 + difference;
        if hops > 0 {
            ip.ttl = ip.ttl.wrapping_sub(hops);
            sum += !u16::from_ne_bytes([hops, 0]) as u64;
        }
        ip.check = !fold16(sum);
        Some(difference)
    }

    #[inline(always)]
    fn network6(&self, to: &Flow, hops: u8) -> Option<u64> {
        // SAFETY: as above.
        let ip = unsafe { &mut *self.at::<Ipv6>(L3)? };
        let mut difference = 0;
        for i in 0..4 {
            difference += replaced32(ip.src[i], to.src.words[i]) + replaced32(ip.dst[i], to.dst.words[i]);
            (ip.src[i], ip.dst[i]) = (to.src.words[i], to.dst.words[i]);
        }
        ip.hops = ip.hops.wrapping_sub(hops);
        Some(difference)
    }
}

/// What is left to do after [`Bytes::patch`].
pub struct Patched {
    /// Where the transport's checksum is; a later fragment has none.
    check: Option<u32>,
    /// What the sum over the addresses gains, where it covers them.
    addresses: u64,
    /// What the sum over ports, or an echo's identifier, gains.
    ports: u64,
}

impl Bytes for Skb {
    #[inline(always)]
    fn start(&self) -> usize {
        field!(self, data) as usize
    }

    #[inline(always)]
    fn end(&self) -> usize {
        field!(self, data_end) as usize
    }

    #[inline(always)]
    fn linearize(&self) {
        let (linear, all) = (field!(self, data_end) - field!(self, data), self.len());
        if linear < HEADERS && linear < all {
            // What cannot be had is noticed by the reads.
            // SAFETY: helper on the hook's own context.
            unsafe { bpf_skb_pull_data(self.raw, if all < HEADERS { all } else { HEADERS }) };
        }
    }
}

impl Skb {
    #[inline(always)]
    pub fn len(&self) -> u32 {
        field!(self, len)
    }

    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        field!(self, ifindex)
    }

    /// In a VLAN, which is another network than the link's own. The number 0 is none: it carries a priority (IEEE 802.1Q).
    #[inline(always)]
    pub fn in_vlan(&self) -> bool {
        const VLAN: u32 = 0xfff;
        field!(self, vlan_present) != 0 && field!(self, vlan_tci) & VLAN != 0
    }

    /// Sent to the link-layer address of this node, and of nobody else.
    #[inline(always)]
    pub fn addressed(&self) -> bool {
        const PACKET_HOST: u32 = 0;
        field!(self, pkt_type) == PACKET_HOST
    }

    /// For another machine: seen because the link shows all that passes, or because a switch does not know better.
    #[inline(always)]
    pub fn for_others(&self) -> bool {
        const PACKET_OTHERHOST: u32 = 3;
        field!(self, pkt_type) == PACKET_OTHERHOST
    }

    /// [`Bytes::patch`] with the checksum, whoever is to compute it: the device's sum of a packet that came and the sum
    /// of one that a device is still to finish are the kernel's to keep right. False: it could not be done and the packet
    /// is damaged.
    #[inline(always)]
    pub fn rewrite(&self, head: &Head, to: &Flow, hops: u8) -> bool {
        let Some(Patched { check, addresses, ports }) = self.patch(head, to, hops) else { return false };
        let Some(check) = check else { return true };
        let mangled = if head.flow.proto == UDP { BPF_F_MARK_MANGLED_0 } else { 0 };
        if addresses == 0 {
            return ports == 0 || self.sum(check, ports, mangled);
        }
        let Some(before) = self.check(check) else { return false };
        let family = if head.v4 { 0 } else { BPF_F_IPV6 };
        if !self.sum(check, addresses, BPF_F_PSEUDO_HDR | mangled | family)
            // Before Linux 6.16 the flag is not known, nor needed for packets whose sum the device has not computed.
            && !self.sum(check, addresses, BPF_F_PSEUDO_HDR | mangled)
        {
            return false;
        }
        ports == 0 || self.add_ports(check, before, addresses, ports, mangled)
    }

    /// Spares a second call of the kernel: which way it went with the addresses tells whether the sum is there in full,
    /// and then the ports are added here. Of a sum that a device is to finish only addresses are part yet.
    #[inline(always)]
    fn add_ports(&self, at: u32, before: u16, addresses: u64, ports: u64, mangled: u64) -> bool {
        let gained = fold16(addresses);
        if gained == 0 || gained == u16::MAX {
            return self.sum(at, ports, mangled); // both ways look alike
        }
        let Some(after) = self.check(at) else { return false };
        if after == before {
            return true; // a datagram without (RFC 768)
        }
        // The two zeroes of ones' complement are one.
        let full = fold16(!before as u64 + gained as u64 + after as u64);
        if full == 0 || full == u16::MAX {
            let new = !fold16(!after as u64 + ports);
            let Some(p) = self.at::<u16>(at & CHECKS) else { return false };
            // SAFETY: checked to be in the packet.
            unsafe { ptr::write_volatile(p, if mangled != 0 && new == 0 { u16::MAX } else { new }) };
        }
        true
    }

    #[inline(always)]
    fn check(&self, at: u32) -> Option<u16> {
        // SAFETY: checked to be in the packet.
        self.at::<u16>(at & CHECKS).map(|p| unsafe { ptr::read_volatile(p) })
    }

    #[inline(always)]
    fn sum(&self, at: u32, difference: u64, flags: u64) -> bool {
        // SAFETY: helper on the hook's own context.
        unsafe { bpf_l4_csum_replace(self.raw, at, 0, fold32(difference), flags) == 0 }
    }
}

/// A packet that the driver has just received and that nobody has a structure for yet.
#[derive(Clone, Copy)]
pub struct Frame {
    pub raw: *mut xdp_md,
}

impl Bytes for Frame {
    #[inline(always)]
    fn start(&self) -> usize {
        field!(self, data) as usize
    }

    #[inline(always)]
    fn end(&self) -> usize {
        field!(self, data_end) as usize
    }

    /// Drivers put headers where they can be looked at, or the packet is not for this hook.
    #[inline(always)]
    fn linearize(&self) {}
}

impl Frame {
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        field!(self, ingress_ifindex)
    }

    /// [`Bytes::patch`] with the checksum: on the wire, it is there in full. False: the packet is damaged.
    #[inline(always)]
    pub fn rewrite(&self, head: &Head, to: &Flow, hops: u8) -> bool {
        let Some(Patched { check, addresses, ports }) = self.patch(head, to, hops) else { return false };
        let Some(check) = check else { return true };
        let Some(p) = self.at::<u16>(check & CHECKS) else { return false };
        // SAFETY: checked to be in the packet.
        let old = unsafe { ptr::read_volatile(p) };
        let udp = head.flow.proto == UDP;
        if udp && old == 0 {
            return true; // sent without (RFC 768)
        }
        let new = !fold16(!old as u64 + addresses + ports);
        // SAFETY: as above.
        unsafe { ptr::write_volatile(p, if udp && new == 0 { u16::MAX } else { new }) };
        true
    }
}

/// Transport headers begin below this offset; the verifier wants to see it.
pub const OFFSETS: u32 = 0x3ff;
/// And their checksums below this one.
const CHECKS: u32 = 0x7ff;
const EXTENSIONS: usize = 4;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

#[repr(C)]
struct Tcp {
    sport_be: u16,
    dport_be: u16,
    sequence: u32,
    acknowledged: u32,
    offset: u8,
    flags: u8,
    window: u16,
    check: u16,
    urgent: u16,
}

#[repr(C)]
struct Udp {
    sport_be: u16,
    dport_be: u16,
    length: u16,
    check: u16,
}

#[repr(C)]
pub struct Icmp {
    pub kind: u8,
    pub code: u8,
    pub check: u16,
    pub id: u16,
    pub rest: u16,
}

/// A fragment after the first goes where that went.
#[inline(always)]
fn later(head: &mut Head, id: u32) -> Result<(), Unread> {
    if !matches!(head.flow.proto, TCP | UDP | ICMP | ICMPV6) {
        return Err(Unread::Foreign);
    }
    head.body = Body::Later;
    let key = FragmentKey { src: head.flow.src, dst: head.flow.dst, id, proto: head.flow.proto, pad: [0; 3] };
    // SAFETY: written once per packet, before its later fragments come.
    let ports = unsafe { FRAGMENTS.get(&key) }.ok_or(Unread::Orphan)?;
    (head.flow.sport_be, head.flow.dport_be) = (ports.sport_be, ports.dport_be);
    Ok(())
}

/// Without room for the note, later fragments are orphans; so are those of an ICMP error, which has no ports.
#[inline(always)]
fn note_first(head: &Head, id: u32) {
    if head.body == Body::Error {
        return;
    }
    let key = FragmentKey { src: head.flow.src, dst: head.flow.dst, id, proto: head.flow.proto, pad: [0; 3] };
    let ports = FragmentPorts { sport_be: head.flow.sport_be, dport_be: head.flow.dport_be };
    let _ = FRAGMENTS.insert(&key, &ports, 0);
}

/// What a ones' complement sum gains when a word is replaced (RFC 1624).
#[inline(always)]
pub fn replaced32(old: u32, new: u32) -> u64 {
    if old == new { 0 } else { !old as u64 + new as u64 }
}

#[inline(always)]
pub fn replaced16(old: u16, new: u16) -> u64 {
    if old == new { 0 } else { !old as u64 + new as u64 }
}

#[inline(always)]
pub fn fold32(sum: u64) -> u64 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    (sum & 0xffff_ffff) + (sum >> 32)
}

#[inline(always)]
pub fn fold16(sum: u64) -> u16 {
    let sum = fold32(sum);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}
