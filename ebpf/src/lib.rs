//! User side of the kernel data path: loads and pins programs and maps, and keeps the maps true.
//!
//! [`compile`] and [`layout`] are pure: a snapshot becomes wanted entries, wanted entries become map values.
//! [`loader`], [`upgrade`], [`maps`], [`table`], [`settings`] and [`events`] act. This crate makes no link and no route (that is `netlink`) and decides no
//! traffic: it writes down what the snapshot says.

#![allow(unsafe_code)] // bpf(2) has no safe wrapper; every call is in `sys`, byte views of plain types in `maps`, and of events in `events`

pub mod compile;
pub mod dry_run;
mod error;
pub mod events;
pub mod layout;
pub mod loader;
pub mod maglev;
pub mod maps;
pub mod settings;
pub mod sweep;
mod sys;
pub mod table;
pub mod upgrade;

pub use error::Error;
pub use sluice_ebpf_common as common;

use sluice_ebpf_common::Addr;
use std::net::{IpAddr, Ipv6Addr};

/// The form that maps hold.
pub fn addr(ip: IpAddr) -> Addr {
    match ip {
        IpAddr::V4(a) => Addr::from_octets(a.to_ipv6_mapped().octets()),
        IpAddr::V6(a) => Addr::from_octets(a.octets()),
    }
}

/// Back from the form that maps hold; a mapped address comes back as IPv4.
pub fn ip(addr: Addr) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(addr.octets())).to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_map_form() {
        for text in ["10.96.0.1", "127.0.0.1", "fd00::1", "::1", "0.0.0.0"] {
            let a: IpAddr = text.parse().expect(text);
            assert_eq!(ip(addr(a)), a);
        }
        let loopback = |t: &str| addr(t.parse().expect(t)).is_loopback();
        assert!(loopback("127.1.2.3") && loopback("::1") && !loopback("10.0.0.1") && !loopback("fd00::1"));
        let none = |t: &str| addr(t.parse().expect(t)).is_unspecified();
        assert!(none("0.0.0.0") && none("::") && !none("0.0.0.1") && !none("::1") && !none("fd00::"));
        let local = |t: &str| addr(t.parse().expect(t)).is_link_local();
        assert!(local("169.254.1.1") && local("fe80::1") && !local("169.253.0.1") && !local("fd00::1"));
    }
}
