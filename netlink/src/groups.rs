//! Memberships in IPv6 multicast groups of links: devices then take frames to the group, and switches that listen for
//! memberships (MLD) pass them on. Who answers for an address must be in the group of those who solicit it.

use crate::{Error, error::Result};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::Ipv6Addr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// Memberships of one socket: the kernel bounds its memory for them (`optmem_max`, 20 KB once, some 50 bytes each).
const EACH: usize = 128;

/// PURE: the group in which the neighbours of a link solicit the address (RFC 4291 §2.7.1).
pub fn solicited(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from_be_bytes([b, c]))
}

/// A link, by index, and a group.
pub type Membership = (u32, Ipv6Addr);

/// What this process is a member of; it ends with it.
#[derive(Debug, Default)]
pub struct Groups {
    /// With how many memberships each.
    sockets: Vec<(OwnedFd, usize)>,
    joined: BTreeMap<Membership, usize>,
}

impl Groups {
    /// Joins and leaves, in the calling thread's namespace. Goes on after a failure, and returns the first; what failed is
    /// tried again the next time.
    pub fn keep(&mut self, wanted: &BTreeSet<Membership>) -> Result<()> {
        let gone: Vec<Membership> = self.joined.keys().filter(|m| !wanted.contains(m)).copied().collect();
        for membership in gone {
            let Some(at) = self.joined.remove(&membership) else { continue };
            let (socket, count) = &mut self.sockets[at];
            // With its link a membership is gone already.
            let _ = option(socket, libc::IPV6_DROP_MEMBERSHIP, membership);
            *count -= 1;
        }
        let missing = wanted.iter().filter(|m| !self.joined.contains_key(m)).copied().collect::<Vec<_>>();
        let outcomes: Vec<_> = missing.into_iter().map(|m| self.join(m)).collect();
        outcomes.into_iter().collect()
    }

    fn join(&mut self, membership: Membership) -> Result<()> {
        let (link, group) = membership;
        let failed = |e| Error::io("join the group of solicitations", format!("{group} on link {link}"), e);
        let at = match self.sockets.iter().position(|(_, count)| *count < EACH) {
            Some(at) => at,
            None => {
                self.sockets.push((socket().map_err(failed)?, 0));
                self.sockets.len() - 1
            }
        };
        option(&self.sockets[at].0, libc::IPV6_ADD_MEMBERSHIP, membership).map_err(failed)?;
        self.sockets[at].1 += 1;
        self.joined.insert(membership, at);
        Ok(())
    }
}

/// It is never bound: nothing comes to it.
fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointer is passed; the descriptor is new and nobody else's.
    unsafe {
        let fd = libc::socket(libc::AF_INET6, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

fn option(socket: &OwnedFd, option: i32, (link, group): Membership) -> io::Result<()> {
    let request =
        libc::ipv6_mreq { ipv6mr_multiaddr: libc::in6_addr { s6_addr: group.octets() }, ipv6mr_interface: link };
    let size = size_of::<libc::ipv6_mreq>() as libc::socklen_t;
    // SAFETY: the kernel reads the request, of the size that is given, during the call.
    let r =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_IPV6, option, (&raw const request).cast(), size) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_has_the_last_three_bytes() {
        let group = |text: &str| solicited(text.parse().expect(text)).to_string();
        assert_eq!(group("4037::01:800:200e:8c6c"), "ff02::1:ff0e:8c6c", "the example of RFC 4291");
        assert_eq!(group("fd73:6c75:6963::1:a"), "ff02::1:ff01:a");
        assert_eq!(group("::"), "ff02::1:ff00:0");
    }
}
