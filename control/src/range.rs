//! Families of addresses, and the ranges that services and pods get theirs from: one of each family, as flags write them.
//!
//! PURE.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// IPv4 or IPv6, in the words of `ipFamilies`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// `IPv4`.
    V4,
    /// `IPv6`.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// As `ipFamilies` names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// From its name in `ipFamilies`.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.name() == name)
    }

    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::V4 => Self::V6,
            Self::V6 => Self::V4,
        }
    }

    /// Of an address.
    pub fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// The address with this number, which for IPv4 is below 2^32.
    pub fn address(self, number: u128) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::from(u32::try_from(number).expect("numbers of IPv4 addresses are below 2^32")).into(),
            Self::V6 => Ipv6Addr::from(number).into(),
        }
    }
}

/// An address as a number of its family.
pub fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u32::from(ip).into(),
        IpAddr::V6(ip) => ip.into(),
    }
}

/// A range of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    family: Family,
    base: u128,
    prefix: u8,
}

impl Cidr {
    /// Its family.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Length of the prefix.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Number of addresses.
    pub fn size(&self) -> u128 {
        1 << (self.family.bits() - self.prefix)
    }

    /// The n-th address; counting begins anew at the range's end.
    pub fn nth(&self, n: u128) -> IpAddr {
        self.family.address(self.base + n % self.size())
    }

    /// Whether the address is in the range.
    pub fn contains(&self, address: IpAddr) -> bool {
        Family::of(address) == self.family && number(address).wrapping_sub(self.base) < self.size()
    }

    /// Whether the two have an address in common.
    pub fn meets(&self, other: &Self) -> bool {
        self.contains(other.nth(0)) || other.contains(self.nth(0))
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no range such as 10.96.0.0/16 (/8 to /30) or fd00:96::/112 (/8 to /126); correct address \
                 and prefix length"
            )
        };
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let family = Family::of(address);
        let prefix: u8 = prefix.parse().ok().filter(|p| (8..=family.bits() - 2).contains(p)).ok_or_else(wrong)?;
        let hosts = (1_u128 << (family.bits() - prefix)) - 1;
        Ok(Cidr { family, base: number(address) & !hosts, prefix })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.nth(0), self.prefix)
    }
}

/// One range, or one of each family; the first is the primary one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranges {
    primary: Cidr,
    secondary: Option<Cidr>,
}

impl Ranges {
    /// Of the family that is taken where nobody names one.
    pub fn primary(&self) -> Cidr {
        self.primary
    }

    /// The primary one first.
    pub fn iter(&self) -> impl Iterator<Item = Cidr> {
        [Some(self.primary), self.secondary].into_iter().flatten()
    }

    /// The range of a family.
    pub fn of(&self, family: Family) -> Option<Cidr> {
        self.iter().find(|range| range.family == family)
    }

    /// There is one of each family.
    pub fn dual(&self) -> bool {
        self.secondary.is_some()
    }
}

impl FromStr for Ranges {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut all = text.split(',').map(|part| part.trim().parse::<Cidr>());
        let primary = all.next().expect("a split text has a first part")?;
        let secondary = all.next().transpose()?;
        if all.next().is_some() || secondary.is_some_and(|other| other.family == primary.family) {
            return Err(format!(
                "{text:?} has two ranges of one family; name one range, or one of IPv4 and one of IPv6"
            ));
        }
        Ok(Self { primary, secondary })
    }
}

impl fmt::Display for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.iter().map(|range| range.to_string()).collect();
        f.write_str(&all.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn ranges_of_one_family() {
        let range: Cidr = "10.96.0.0/16".parse().expect("a range");
        assert_eq!((range.nth(10), range.size()), (ip("10.96.0.10"), 65_536));
        assert!(range.contains(ip("10.96.255.255")) && !range.contains(ip("10.97.0.0")));
        let range: Cidr = "fd00:96::7/112".parse().expect("a range");
        assert_eq!((range.to_string().as_str(), range.nth(10)), ("fd00:96::/112", ip("fd00:96::a")));
        assert!(range.contains(ip("fd00:96::ffff")) && !range.contains(ip("fd00:96::1:0")));
        assert!(!range.contains(ip("10.96.0.1")));
        for text in ["10.96.0.0", "x/16", "10.0.0.0/31", "10.0.0.0/0", "fd00::/127", "fd00::/7", "fd00::"] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
        for (a, b, meet) in [
            ("10.0.0.0/8", "10.96.0.0/16", true),
            ("10.96.0.0/16", "10.0.0.0/8", true),
            ("10.96.0.0/16", "10.97.0.0/16", false),
            ("fd00::/56", "fd00:0:0:1::/64", true),
            ("fd00::/64", "10.0.0.0/8", false),
        ] {
            let parse = |text: &str| text.parse::<Cidr>().expect("a range");
            assert_eq!(parse(a).meets(&parse(b)), meet, "{a} {b}");
        }
    }

    #[test]
    fn one_range_or_one_of_each_family() {
        let parse = |text: &str| text.parse::<Ranges>();
        let both = parse("fd00:96::/112, 10.96.0.0/16").expect("ranges");
        assert_eq!(both.to_string(), "fd00:96::/112,10.96.0.0/16");
        assert_eq!((both.primary().family(), both.dual()), (Family::V6, true));
        assert_eq!(both.of(Family::V4).map(|r| r.to_string()).as_deref(), Some("10.96.0.0/16"));
        let one = parse("10.96.0.0/16").expect("a range");
        assert_eq!((one.of(Family::V6), one.dual()), (None, false));
        for wrong in ["", "10.96.0.0/16,", "10.96.0.0/16,10.97.0.0/16", "10.96.0.0/16,fd00::/112,fd01::/112", "x"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
