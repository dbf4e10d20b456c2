//! The addresses that services of type LoadBalancer are given: ranges of IPv4 and IPv6, as the operator wrote them. Who
//! has which of them is decided in `controllers::balancer`, and who answers for them in `compile`.
//!
//! PURE.

use crate::range::{Cidr, number};
use k8s_openapi::api::core::v1::Service;
use std::{fmt, net::IpAddr, str::FromStr};

pub use crate::range::Family;

/// `loadBalancerClass` of services that ask for an address of the pool; those that name no class do too.
pub const CLASS: &str = "sluice.dev/pool";
/// The flag that sets the pool, for those who must be told that there is none.
pub const FLAG: &str = "--load-balancer-pool";

/// Addresses that mean something else to every machine.
const NOBODYS: [(&str, &str); 8] = [
    ("0.0.0.0/8", "this network"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"),
    ("224.0.0.0/3", "multicast and reserved"),
    ("::/127", "unspecified and loopback"),
    ("::ffff:0:0/96", "IPv4 written as IPv6"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
];

/// From the first to the last, both in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Range {
    family: Family,
    first: u128,
    last: u128,
}

impl Range {
    fn meets(&self, other: &Self) -> bool {
        self.family == other.family && self.first <= other.last && other.first <= self.last
    }
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("{text:?} is no range such as 192.0.2.64/26, 192.0.2.64-192.0.2.95: {why}");
        let address = |text: &str| text.trim().parse::<IpAddr>().map_err(|e| wrong(&e.to_string()));
        if let Some((first, last)) = text.split_once('-') {
            let (first, last) = (address(first)?, address(last)?);
            let range = Self { family: Family::of(first), first: number(first), last: number(last) };
            return match Family::of(last) == range.family && range.first <= range.last {
                true => Ok(range),
                false => Err(wrong("it ends before it begins")),
            };
        }
        let (base, prefix) = text.split_once('/').unwrap_or((text, ""));
        let base = address(base)?;
        let family = Family::of(base);
        let prefix = if text.contains('/') { prefix.trim().parse().ok() } else { Some(family.bits()) };
        let prefix: u8 =
            prefix.filter(|p| (1..=family.bits()).contains(p)).ok_or_else(|| wrong("bad prefix length"))?;
        let hosts = (1_u128 << (family.bits() - prefix)) - 1;
        let first = number(base) & !hosts;
        Ok(Self { family, first, last: first | hosts })
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.family.address(self.first))?;
        if self.first == self.last { Ok(()) } else { write!(f, "-{}", self.family.address(self.last)) }
    }
}

/// Ranges that do not touch, in order. Without any, the cluster gives out no such addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    ranges: Vec<Range>,
}

impl Pool {
    /// There is no pool.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether the address is of the pool.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let one = Range { family: Family::of(ip), first: number(ip), last: number(ip) };
        self.ranges.iter().any(|range| range.meets(&one))
    }

    /// How many addresses of a family it has.
    pub fn size(&self, family: Family) -> u128 {
        self.of(family).map(|range| range.last - range.first + 1).sum()
    }

    /// All addresses of a family, lowest first.
    pub fn addresses(&self, family: Family) -> impl Iterator<Item = IpAddr> + '_ {
        self.of(family).flat_map(move |range| (range.first..=range.last).map(move |n| family.address(n)))
    }

    /// Whether it shares an address with the range of services' or pods' own addresses.
    pub fn meets(&self, cidr: Cidr) -> bool {
        let last = cidr.nth(cidr.size() - 1);
        let cidr = Range { family: cidr.family(), first: number(cidr.nth(0)), last: number(last) };
        self.ranges.iter().any(|range| range.meets(&cidr))
    }

    fn of(&self, family: Family) -> impl Iterator<Item = &Range> + '_ {
        self.ranges.iter().filter(move |range| range.family == family)
    }
}

impl FromStr for Pool {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut ranges = vec![];
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let range: Range = part.parse()?;
            for (nobodys, what) in NOBODYS {
                if range.meets(&nobodys.parse().expect("the table is of ranges")) {
                    return Err(format!(
                        "{part:?} has addresses of {nobodys} ({what}), which no service can have; name a range of the \
                         network of the nodes that no machine uses"
                    ));
                }
            }
            ranges.push(range);
        }
        ranges.sort();
        let mut apart: Vec<Range> = vec![];
        for range in ranges {
            match apart.last_mut().filter(|before| before.meets(&range)) {
                Some(before) => before.last = before.last.max(range.last),
                None => apart.push(range),
            }
        }
        Ok(Self { ranges: apart })
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges: Vec<String> = self.ranges.iter().map(ToString::to_string).collect();
        f.write_str(&ranges.join(","))
    }
}

/// Whether the service asks for addresses of the pool; those of other classes are left to others.
pub fn asks(service: &Service) -> bool {
    let spec = service.spec.as_ref().filter(|spec| spec.type_.as_deref() == Some("LoadBalancer"));
    spec.is_some_and(|spec| spec.load_balancer_class.as_deref().is_none_or(|class| class == CLASS))
}

/// The addresses in the service's status by which it is reached without a detour (`ipMode`, KEP-1860).
pub fn ingress(service: &Service) -> impl Iterator<Item = IpAddr> + '_ {
    let balancer = service.status.iter().filter_map(|status| status.load_balancer.as_ref());
    let direct = balancer.flat_map(|b| b.ingress.iter().flatten()).filter(|i| i.ip_mode.as_deref() != Some("Proxy"));
    direct.filter_map(|i| i.ip.as_ref()?.parse::<IpAddr>().ok()).map(|ip| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(text: &str) -> Pool {
        text.parse().expect("a pool")
    }

    #[test]
    fn pools_as_they_are_written() {
        for (text, shown, v4, v6) in [
            ("", "", 0, 0),
            ("192.0.2.70/26", "192.0.2.64-192.0.2.127", 64, 0),
            ("192.0.2.7, 192.0.2.9/32", "192.0.2.7,192.0.2.9", 2, 0),
            ("192.0.2.8-192.0.2.12,192.0.2.0/29", "192.0.2.0-192.0.2.7,192.0.2.8-192.0.2.12", 13, 0),
            ("192.0.2.4-192.0.2.9,192.0.2.0/29", "192.0.2.0-192.0.2.9", 10, 0),
            ("2001:db8::/120,192.0.2.1", "192.0.2.1,2001:db8::-2001:db8::ff", 1, 256),
        ] {
            let pool = pool(text);
            assert_eq!((pool.to_string().as_str(), pool.size(Family::V4), pool.size(Family::V6)), (shown, v4, v6));
            assert_eq!(pool.is_empty(), text.is_empty());
        }
        for wrong in [
            "x",
            "192.0.2.0/33",
            "192.0.2.0/0",
            "192.0.2.0/",
            "192.0.2.9-192.0.2.8",
            "192.0.2.1-2001:db8::1",
            "127.0.0.0/30",
            "100.0.0.0-200.0.0.0",
            "0.0.0.0/24",
            "224.0.0.0/24",
            "255.255.255.255",
            "::/64",
            "fe80::1",
            "::ffff:192.0.2.1",
        ] {
            assert!(wrong.parse::<Pool>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_in_a_pool() {
        let pool = pool("192.0.2.2-192.0.2.3,192.0.2.1,2001:db8::/64");
        let all: Vec<String> = pool.addresses(Family::V4).map(|ip| ip.to_string()).collect();
        assert_eq!(all, ["192.0.2.1", "192.0.2.2", "192.0.2.3"]);
        assert_eq!(pool.addresses(Family::V6).nth(1), Some("2001:db8::1".parse().expect("an address")));
        for (ip, in_it) in [("192.0.2.3", true), ("192.0.2.4", false), ("2001:db8::9", true), ("::c000:201", false)] {
            assert_eq!(pool.contains(ip.parse().expect("an address")), in_it, "{ip}");
        }
        assert!(pool.meets("192.0.2.0/30".parse().expect("a range")));
        assert!(!pool.meets("192.0.2.4/30".parse().expect("a range")));
        assert!(pool.meets("2001:db8::/112".parse().expect("a range")));
        assert!(!pool.meets("2001:db9::/112".parse().expect("a range")));
    }
}
