//! Ranges of clients' addresses, as `loadBalancerSourceRanges` writes them.

use serde::{Deserialize, Serialize};
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// A range in CIDR notation. IPv4 ranges in IPv6 notation are IPv4 ones, and the bits after the length are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SourceRange {
    address: IpAddr,
    len: u8,
}

impl SourceRange {
    /// `None` where an address of that family has fewer bits.
    pub fn new(address: IpAddr, len: u8) -> Option<Self> {
        let (address, len) = match address.to_canonical() {
            v4 if v4.is_ipv4() && address.is_ipv6() && (96..=128).contains(&len) => (v4, len - 96),
            _ => (address, len),
        };
        (len <= bits(address)).then(|| Self { address: masked(address, len), len })
    }

    pub fn address(self) -> IpAddr {
        self.address
    }

    /// Bits of the address that all in the range share.
    pub fn prefix_len(self) -> u8 {
        self.len
    }

    /// Every address of the family.
    pub fn is_all(self) -> bool {
        self.len == 0
    }

    pub fn contains(self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.address.is_ipv4() && masked(ip, self.len) == self.address
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn masked(address: IpAddr, len: u8) -> IpAddr {
    match address {
        IpAddr::V4(a) => {
            Ipv4Addr::from_bits(a.to_bits() & u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0)).into()
        }
        IpAddr::V6(a) => {
            Ipv6Addr::from_bits(a.to_bits() & u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0)).into()
        }
    }
}

impl fmt::Display for SourceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.len)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no range of addresses such as 10.9.8.0/24 or 2001:db8::/64")]
pub struct SourceRangeError(pub String);

impl FromStr for SourceRange {
    type Err = SourceRangeError;

    fn from_str(s: &str) -> Result<Self, SourceRangeError> {
        let parse = || {
            let (address, len) = s.split_once('/')?;
            let len = Some(len).filter(|len| len.bytes().all(|b| b.is_ascii_digit()))?;
            Self::new(address.parse().ok()?, len.parse().ok()?)
        };
        parse().ok_or_else(|| SourceRangeError(s.to_owned()))
    }
}

impl TryFrom<String> for SourceRange {
    type Error = SourceRangeError;

    fn try_from(s: String) -> Result<Self, SourceRangeError> {
        s.parse()
    }
}

impl From<SourceRange> for String {
    fn from(range: SourceRange) -> String {
        range.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_as_they_are_written() {
        for (text, want) in [
            ("10.9.8.0/24", Some("10.9.8.0/24")),
            ("10.9.8.7/24", Some("10.9.8.0/24")),
            ("0.0.0.0/0", Some("0.0.0.0/0")),
            ("10.9.8.7/32", Some("10.9.8.7/32")),
            ("2001:db8::7/64", Some("2001:db8::/64")),
            ("::/0", Some("::/0")),
            ("::1/128", Some("::1/128")),
            ("::ffff:10.9.8.7/120", Some("10.9.8.0/24")),
            ("::ffff:0:0/95", Some("::fffe:0:0/95")),
            ("10.9.8.0/33", None),
            ("2001:db8::/129", None),
            ("10.9.8.0", None),
            ("10.9.8.0/", None),
            ("10.9.8.0/+8", None),
            ("10.9.8.0/8/8", None),
            (" 10.9.8.0/24", None),
            ("web/24", None),
            ("", None),
        ] {
            let range = text.parse::<SourceRange>();
            assert_eq!(range.as_ref().map(ToString::to_string).ok().as_deref(), want, "{text}");
            if let Ok(range) = range {
                assert_eq!(range.to_string().parse(), Ok(range), "{text}");
            }
        }
    }

    #[test]
    fn who_is_in_a_range() {
        for (range, ip, want) in [
            ("10.9.8.0/24", "10.9.8.255", true),
            ("10.9.8.0/24", "10.9.9.0", false),
            ("0.0.0.0/0", "10.9.9.0", true),
            ("0.0.0.0/0", "::1", false),
            ("::/0", "10.9.9.0", false),
            ("2001:db8::/33", "2001:db8:7fff::1", true),
            ("2001:db8::/33", "2001:db8:8000::1", false),
            ("::1/128", "::1", true),
        ] {
            let range: SourceRange = range.parse().expect(range);
            assert_eq!(range.contains(ip.parse().expect(ip)), want, "{range} {ip}");
        }
    }
}
