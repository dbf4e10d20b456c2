//! Tells a network that an address is ours now: a gratuitous ARP request (RFC 5227 §2.3), or an unsolicited neighbour
//! advertisement (RFC 4861 §7.2.6). Whoever sent to another machine until now changes its mind at once.

use crate::{Error, error::Result};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;
const BROADCAST: [u8; 6] = [0xff; 6];
/// Of all nodes of the link, ff02::1 (RFC 2464 §7).
const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// One announcement of `address` at `mac`, out of the link of that index in the calling thread's namespace.
pub fn announce(link: u32, mac: [u8; 6], address: IpAddr) -> Result<()> {
    let (kind, to, frame) = match address {
        IpAddr::V4(a) => (ETH_P_ARP, BROADCAST, arp(mac, a)),
        IpAddr::V6(a) => (ETH_P_IPV6, ALL_NODES, advertisement(mac, a)),
    };
    send(link, kind, to, &frame).map_err(|e| Error::io("announce", format!("{address} on link {link}"), e))
}

/// PURE: a request for the address, from the address.
fn arp(mac: [u8; 6], a: Ipv4Addr) -> Vec<u8> {
    let mut frame = [&BROADCAST[..], &mac, &ETH_P_ARP.to_be_bytes(), &[0, 1, 8, 0, 6, 4, 0, 1], &mac].concat();
    frame.extend(a.octets());
    frame.extend([0; 6]);
    frame.extend(a.octets());
    frame
}

/// PURE: an advertisement that overrides what was known.
fn advertisement(mac: [u8; 6], a: Ipv6Addr) -> Vec<u8> {
    const OVERRIDE: u8 = 0x20;
    let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut body = vec![136, 0, 0, 0, OVERRIDE, 0, 0, 0];
    body.extend(a.octets());
    body.extend([2, 1]);
    body.extend(mac);
    let mut summed = [a.octets(), to.octets()].concat();
    summed.extend((body.len() as u32).to_be_bytes());
    summed.extend([0, 0, 0, 58]);
    summed.extend(&body);
    let sum: u32 = summed.chunks_exact(2).map(|p| u32::from(u16::from_be_bytes([p[0], p[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let check = !((folded & 0xffff) + (folded >> 16)) as u16;
    body[2..4].copy_from_slice(&check.to_be_bytes());
    let mut frame = [&ALL_NODES[..], &mac, &ETH_P_IPV6.to_be_bytes(), &[0x60, 0, 0, 0]].concat();
    frame.extend((body.len() as u16).to_be_bytes());
    frame.extend([58, 255]);
    frame.extend(a.octets());
    frame.extend(to.octets());
    frame.extend(body);
    frame
}

/// Sends a frame, as it is.
pub(crate) fn send(link: u32, kind: u16, to: [u8; 6], frame: &[u8]) -> io::Result<()> {
    // SAFETY: no pointer is passed; the descriptor is new and nobody else's.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let mut address = [0; 8];
    address[..6].copy_from_slice(&to);
    let name = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: kind.to_be(),
        sll_ifindex: i32::try_from(link).unwrap_or(0),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: address,
    };
    // SAFETY: buffer and name outlive the call, their sizes are given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            libc::MSG_DONTWAIT,
            (&raw const name).cast(),
            size_of_val(&name) as u32,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_say_whose_the_address_is() {
        let mac = [2, 1, 2, 3, 4, 5];
        let frame = arp(mac, Ipv4Addr::new(192, 0, 2, 7));
        assert_eq!(frame.len(), 42);
        assert_eq!((&frame[6..12], &frame[22..28], &frame[28..32]), (&mac[..], &mac[..], &[192, 0, 2, 7][..]));
        assert_eq!(frame[38..42], [192, 0, 2, 7], "asked for and asking");
        let frame = advertisement(mac, "2001:db8::7".parse().expect("address"));
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!((frame[20], frame[21], frame[54], frame[58]), (58, 255, 136, 0x20));
        // A sum over everything that it covers, itself included, is all ones (RFC 1071).
        let mut summed = frame[22..54].to_vec();
        summed.extend([0, 0, 0, 32, 0, 0, 0, 58]);
        summed.extend(&frame[54..]);
        let sum: u32 = summed.chunks_exact(2).map(|p| u32::from(u16::from_be_bytes([p[0], p[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }
}
