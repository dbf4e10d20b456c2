//! Hearing of changes to links, addresses and routes. What has changed is read anew by whoever asked: a notice may be
//! lost when many come at once, but never that there were some.

use crate::{Error, error::Result};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use std::{
    io::ErrorKind::{Interrupted, WouldBlock},
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

/// RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE (linux/rtnetlink.h).
const GROUPS: [u32; 5] = [1, 5, 7, 9, 11];
/// Notices taken in one drain: whoever floods us with changes gets an answer between two of them.
const AT_ONCE: usize = 4096;
/// Contents are not looked at, so a truncated notice is as good as a whole one.
const NOTICE_BYTES: usize = 64;

/// Notices of one namespace. Readable ([`AsFd`]) when there is something to [`Changes::drain`]; never blocks.
#[derive(Debug)]
pub struct Changes {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Changes {
    /// Of the calling thread's namespace, from now on.
    pub fn open() -> Result<Self> {
        let failed = |e| Error::io("open", "an rtnetlink socket for changes", e);
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
        socket.set_non_blocking(true).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        for group in GROUPS {
            let object = format!("changes (rtnetlink group {group})");
            socket.add_membership(group).map_err(|e| Error::io("subscribe to", object, e))?;
        }
        Ok(Self { socket, buffer: Vec::with_capacity(NOTICE_BYTES) })
    }

    /// Takes what has come in; whether there was anything. Lost notices count as one.
    pub fn drain(&mut self) -> bool {
        let mut changed = false;
        for _ in 0..AT_ONCE {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Err(e) if e.kind() == WouldBlock => return changed,
                Err(e) if e.kind() == Interrupted => {}
                // ENOBUFS: there were more than the socket holds. Whatever else it is: reading anew is never wrong.
                Ok(_) | Err(_) => changed = true,
            }
        }
        changed
    }
}

impl AsFd for Changes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Changes {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Connection, kernel, lab,
        ns::{Unshare, unshare},
        plan::{Address, Operation, Prefix},
    };
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn readable(changes: &Changes) -> bool {
        let second = Timespec { tv_sec: 5, tv_nsec: 0 };
        poll(&mut [PollFd::new(changes, PollFlags::IN)], Some(&second)).expect("poll") == 1
    }

    /// In a namespace of its own: the thread ends with the test.
    #[test]
    fn links_addresses_and_floods_are_heard_of() {
        unshare(Unshare { net: true, ..Unshare::default() }).expect("needs root");
        let mut changes = Changes::open().expect("open");
        assert!(!changes.drain(), "nothing yet");
        lab::loopback_up().expect("lo");
        assert!(readable(&changes) && changes.drain() && !changes.drain());
        let mut connection = Connection::open().expect("connection");
        let address = |n: u32| {
            let ip = std::net::Ipv4Addr::from_bits(0x0a09_0000 + n);
            Operation::AddAddress(Address { link: 1, prefix: Prefix::host(ip.into()) })
        };
        kernel::apply(&mut connection, &[address(1)]).expect("address");
        assert!(readable(&changes) && changes.drain() && !changes.drain());
        // More than the socket holds: some are lost, and that is told.
        kernel::apply(&mut connection, &(2..4000).map(address).collect::<Vec<_>>()).expect("addresses");
        assert!(changes.drain());
        while changes.drain() {}
        kernel::apply(&mut connection, &[address(5000)]).expect("address");
        assert!(changes.drain(), "it hears on after a flood");
    }
}
