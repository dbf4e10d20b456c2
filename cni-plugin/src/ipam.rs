//! PURE: which address a new pod gets.
//!
//! Addresses are handed out in turn, not lowest first: an address that was just given back rests as long as possible,
//! so that a peer's stale knowledge of it does not reach a new pod.

use sluice_netlink::plan::Prefix;
use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// First and last address that pods may have: not the range's own address, nor the IPv4 broadcast address.
fn bounds(range: Prefix) -> Option<(u128, u128)> {
    let (base, bits, broadcast) = match range.address {
        IpAddr::V4(a) => (u128::from(a.to_bits()), 32, 1),
        IpAddr::V6(a) => (a.to_bits(), 128, 0),
    };
    let host_bits = bits - u32::from(range.len);
    let size = 1u128.checked_shl(host_bits).map_or(u128::MAX, |s| s - 1);
    match host_bits {
        0 => Some((base, base)),
        1 => Some((base, base + 1)),
        _ => Some((base.checked_add(1)?, base.checked_add(size)?.checked_sub(broadcast)?)),
    }
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(a) => u128::from(a.to_bits()),
        IpAddr::V6(a) => a.to_bits(),
    }
}

fn address(number: u128, v4: bool) -> IpAddr {
    match v4 {
        true => Ipv4Addr::from_bits(number as u32).into(),
        false => Ipv6Addr::from_bits(number).into(),
    }
}

/// The next free address after `after`, around the end of the range.
pub fn next_free(range: Prefix, used: &BTreeSet<IpAddr>, after: Option<IpAddr>) -> Option<IpAddr> {
    let v4 = range.address.is_ipv4();
    let (first, last) = bounds(range)?;
    let start = after.filter(|a| range.contains(*a)).map_or(first, |a| number(a).saturating_add(1));
    let start = if (first..=last).contains(&start) { start } else { first };
    // At most one address per lease is in the way.
    let tries = used.len() as u128 + 1;
    let upward = (start..=last).take(tries as usize);
    let around = (first..start).take(tries as usize);
    upward.chain(around).map(|n| address(n, v4)).find(|a| !used.contains(a))
}

/// One address of each family that the ranges have; `None` where a family is full.
pub fn choose(ranges: &[Prefix], used: &BTreeSet<IpAddr>, last: &[IpAddr]) -> Option<Vec<IpAddr>> {
    let mut chosen = Vec::new();
    for v4 in [true, false] {
        let mut of_family = ranges.iter().filter(|r| r.address.is_ipv4() == v4).peekable();
        if of_family.peek().is_none() {
            continue;
        }
        let after = last.iter().copied().find(|a| a.is_ipv4() == v4);
        chosen.push(of_family.find_map(|r| next_free(*r, used, after))?);
    }
    Some(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn p(s: &str) -> Prefix {
        s.parse().expect(s)
    }

    fn a(s: &str) -> IpAddr {
        s.parse().expect(s)
    }

    #[test]
    fn in_turn_around_the_end_and_full() {
        let range = p("10.0.0.0/29"); // pods .1 to .6
        let mut used = BTreeSet::new();
        let mut last = None;
        for want in ["10.0.0.1", "10.0.0.2", "10.0.0.3"] {
            last = next_free(range, &used, last);
            assert_eq!(last, Some(a(want)));
            used.extend(last);
        }
        used.remove(&a("10.0.0.1"));
        assert_eq!(next_free(range, &used, last), Some(a("10.0.0.4")), "a returned address rests");
        assert_eq!(next_free(range, &used, Some(a("10.0.0.6"))), Some(a("10.0.0.1")));
        assert_eq!(next_free(range, &used, Some(a("10.9.9.9"))), Some(a("10.0.0.1")), "a cursor of another range");
        let full: BTreeSet<_> = (1..=6).map(|n| a(&format!("10.0.0.{n}"))).collect();
        assert_eq!(next_free(range, &full, None), None);
    }

    #[test]
    fn small_and_large_ranges() {
        let none = BTreeSet::new();
        assert_eq!(next_free(p("10.0.0.5/32"), &none, None), Some(a("10.0.0.5")));
        assert_eq!(next_free(p("10.0.0.4/31"), &none, None), Some(a("10.0.0.4")));
        assert_eq!(next_free(p("fd00::/64"), &none, None), Some(a("fd00::1")));
        assert_eq!(next_free(p("::/0"), &none, None), Some(a("::1")));
        assert_eq!(next_free(p("0.0.0.0/0"), &none, Some(a("255.255.255.254"))), Some(a("0.0.0.1")));
    }

    #[test]
    fn one_address_per_family_from_the_first_range_with_room() {
        let ranges = [p("10.0.0.0/30"), p("fd00::/120"), p("10.0.1.0/30")];
        let used = BTreeSet::from([a("10.0.0.1"), a("10.0.0.2")]);
        assert_eq!(choose(&ranges, &used, &[]), Some(vec![a("10.0.1.1"), a("fd00::1")]));
        assert_eq!(choose(&ranges[..1], &used, &[]), None);
    }

    proptest! {
        #[test]
        fn never_an_address_in_use_and_never_outside(
            len in 24u8..=32, used in proptest::collection::btree_set(0u8.., 0..200), after in 0u8..
        ) {
            let range = p(&format!("10.0.0.0/{len}"));
            let used: BTreeSet<IpAddr> = used.into_iter().map(|n| Ipv4Addr::new(10, 0, 0, n).into()).collect();
            let got = next_free(range, &used, Some(Ipv4Addr::new(10, 0, 0, after).into()));
            if let Some(got) = got {
                prop_assert!(range.contains(got) && !used.contains(&got));
            } else {
                let (first, last) = bounds(range).expect("bounds");
                prop_assert!((first..=last).all(|n| used.contains(&address(n, true))));
            }
        }
    }
}
