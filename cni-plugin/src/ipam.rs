//! PURE: which addresses there are for pods, and which of them a new pod gets.
//!
//! A pod has one address of each family, so a pool has at most one set of ranges per family. Addresses are handed out
//! in turn, not lowest first: an address that was just given back rests as long as possible, so that a peer's stale
//! knowledge of it does not reach a new pod.

use sluice_netlink::plan::Prefix;
use std::{
    collections::BTreeSet,
    fmt,
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

/// What a configuration says of a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub subnet: Prefix,
    pub start: Option<IpAddr>,
    pub end: Option<IpAddr>,
    /// An address that no pod gets.
    pub gateway: Option<IpAddr>,
}

impl From<Prefix> for Wanted {
    fn from(subnet: Prefix) -> Self {
        Self { subnet, start: None, end: None, gateway: None }
    }
}

/// A part of a subnet whose addresses pods get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    subnet: Prefix,
    first: u128,
    last: u128,
    /// The same without what is reserved, ascending.
    spans: Vec<(u128, u128)>,
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v4 = self.is_ipv4();
        write!(f, "{}", self.subnet)?;
        match bounds(self.subnet) == Some((self.first, self.last)) {
            true => Ok(()),
            false => write!(f, " from {} to {}", address(self.first, v4), address(self.last, v4)),
        }
    }
}

impl Range {
    /// `excluded` are addresses that no pod gets, beside the subnet's own, its broadcast address and its gateway.
    pub fn new(wanted: &Wanted, excluded: &[Prefix]) -> Result<Self, String> {
        let subnet = wanted.subnet;
        let (low, high) = bounds(subnet).ok_or_else(|| format!("{subnet} has no address for a pod"))?;
        for ip in [wanted.start, wanted.end, wanted.gateway].into_iter().flatten() {
            if !subnet.contains(ip) {
                return Err(format!("{ip} is not in {subnet}"));
            }
        }
        let first = wanted.start.map_or(low, |ip| number(ip).max(low));
        let last = wanted.end.map_or(high, |ip| number(ip).min(high));
        if first > last {
            return Err(format!("{subnet}: the range starts behind its end"));
        }
        let gateway = wanted.gateway.map(Prefix::host);
        let of_family = |p: &&Prefix| p.address.is_ipv4() == subnet.address.is_ipv4();
        let reserved = excluded.iter().filter(of_family).chain(&gateway).map(whole).collect();
        Ok(Self { subnet, first, last, spans: without((first, last), reserved) })
    }

    pub fn is_ipv4(&self) -> bool {
        self.subnet.address.is_ipv4()
    }

    /// How many addresses pods can get.
    pub fn size(&self) -> u128 {
        self.spans.iter().fold(0, |sum: u128, (a, b)| sum.saturating_add((b - a).saturating_add(1)))
    }

    /// Whether pods can get the address.
    pub fn offers(&self, ip: IpAddr) -> bool {
        let n = number(ip);
        ip.is_ipv4() == self.is_ipv4() && self.spans.iter().any(|(a, b)| (*a..=*b).contains(&n))
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.is_ipv4() == other.is_ipv4() && self.first <= other.last && other.first <= self.last
    }

    /// The next free address after `after`, around the end of the range.
    pub fn next_free(&self, used: &BTreeSet<IpAddr>, after: Option<IpAddr>) -> Option<IpAddr> {
        let start = after.filter(|a| self.subnet.contains(*a)).map_or(0, |a| number(a).saturating_add(1));
        // At most one address per lease is in the way.
        let tries = used.len() + 1;
        let upward = self.spans.iter().flat_map(|(a, b)| (*a).max(start)..=*b);
        let around = self.spans.iter().flat_map(|(a, b)| *a..start.min(b.saturating_add(1)).max(*a));
        let mut candidates = upward.take(tries).chain(around.take(tries)).map(|n| address(n, self.is_ipv4()));
        candidates.find(|a| !used.contains(a))
    }
}

/// All addresses of a prefix, those that no pod may have included.
fn whole(prefix: &Prefix) -> (u128, u128) {
    let bits = if prefix.address.is_ipv4() { 32 } else { 128 };
    let size = 1u128.checked_shl(bits - u32::from(prefix.len)).map_or(u128::MAX, |s| s - 1);
    let base = number(prefix.address);
    (base, base.saturating_add(size))
}

/// What is left of a span without others.
fn without(span: (u128, u128), mut reserved: Vec<(u128, u128)>) -> Vec<(u128, u128)> {
    reserved.sort_unstable();
    let (mut start, end) = span;
    let mut left = Vec::new();
    for (a, b) in reserved.into_iter().filter(|(a, b)| *b >= span.0 && *a <= end) {
        if a > start {
            left.push((start, a - 1));
        }
        match b.checked_add(1).filter(|next| *next <= end) {
            Some(next) => start = start.max(next),
            None => return left,
        }
    }
    left.push((start, end));
    left
}

/// The ranges of a network: one set per family, a pod gets one address of each set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    sets: Vec<Vec<Range>>,
}

/// Why a pod gets no addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Every range of a family is used up.
    Exhausted,
    NotOffered(IpAddr),
    InUse(IpAddr),
    TwoOfOneFamily(IpAddr, IpAddr),
}

impl Pool {
    /// Sets of ranges, each of one family.
    pub fn new(sets: Vec<Vec<Range>>) -> Result<Self, String> {
        let sets: Vec<Vec<Range>> = sets.into_iter().filter(|s| !s.is_empty()).collect();
        for set in &sets {
            if let Some(other) = set.iter().find(|r| r.is_ipv4() != set[0].is_ipv4()) {
                return Err(format!("{} and {other} are in one set, but of two families", set[0]));
            }
        }
        let all: Vec<&Range> = sets.iter().flatten().collect();
        for (n, a) in all.iter().enumerate() {
            if let Some(b) = all[n + 1..].iter().find(|b| a.overlaps(b)) {
                return Err(format!("{a} and {b} overlap"));
            }
        }
        for (n, a) in sets.iter().enumerate() {
            if let Some(b) = sets[n + 1..].iter().find(|b| b[0].is_ipv4() == a[0].is_ipv4()) {
                let (a, b) = (&a[0], &b[0]);
                return Err(format!("{a} and {b} are in two sets; a pod has one address of each family"));
            }
        }
        Ok(Self { sets })
    }

    pub fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }

    pub fn ranges(&self) -> impl Iterator<Item = &Range> {
        self.sets.iter().flatten()
    }

    /// The sets of `first`, and of this pool those of other families.
    pub fn behind(self, first: Self) -> Self {
        let mut sets = first.sets;
        let others = self.sets.into_iter().filter(|s| sets.iter().all(|t| t[0].is_ipv4() != s[0].is_ipv4()));
        let others: Vec<_> = others.collect();
        sets.extend(others);
        Self { sets }
    }

    /// One address of each set: the one in `asked` where that names one, else the next free one after that in `last`.
    pub fn choose(&self, used: &BTreeSet<IpAddr>, last: &[IpAddr], asked: &[IpAddr]) -> Result<Vec<IpAddr>, Refusal> {
        if let Some(ip) = asked.iter().find(|ip| !self.ranges().any(|r| r.offers(**ip))) {
            return Err(Refusal::NotOffered(*ip));
        }
        self.sets.iter().map(|set| choose_of(set, used, last, asked)).collect()
    }

    /// How full each range is, for people.
    pub fn fill(&self, used: &BTreeSet<IpAddr>) -> String {
        let one = |r: &Range| {
            let leased = used.iter().filter(|ip| r.offers(**ip)).count();
            format!("{r}: {leased} of {} leased", r.size())
        };
        self.ranges().map(one).collect::<Vec<_>>().join(", ")
    }
}

fn choose_of(set: &[Range], used: &BTreeSet<IpAddr>, last: &[IpAddr], asked: &[IpAddr]) -> Result<IpAddr, Refusal> {
    let v4 = set[0].is_ipv4();
    let mut asked = asked.iter().copied().filter(|a| a.is_ipv4() == v4);
    let (first, second) = (asked.next(), asked.next());
    match (first, second) {
        (Some(a), Some(b)) if a != b => Err(Refusal::TwoOfOneFamily(a, b)),
        (Some(ip), _) if used.contains(&ip) => Err(Refusal::InUse(ip)),
        (Some(ip), _) => Ok(ip),
        (None, _) => {
            let after = last.iter().copied().find(|a| a.is_ipv4() == v4);
            set.iter().find_map(|r| r.next_free(used, after)).ok_or(Refusal::Exhausted)
        }
    }
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

    fn range(s: &str) -> Range {
        Range::new(&p(s).into(), &[]).expect(s)
    }

    fn from_to(subnet: &str, start: &str, end: &str, gateway: &str) -> Wanted {
        let ip = |s: &str| if s.is_empty() { None } else { Some(a(s)) };
        Wanted { subnet: p(subnet), start: ip(start), end: ip(end), gateway: ip(gateway) }
    }

    #[test]
    fn in_turn_around_the_end_and_full() {
        let range = range("10.0.0.0/29"); // pods .1 to .6
        let mut used = BTreeSet::new();
        let mut last = None;
        for want in ["10.0.0.1", "10.0.0.2", "10.0.0.3"] {
            last = range.next_free(&used, last);
            assert_eq!(last, Some(a(want)));
            used.extend(last);
        }
        used.remove(&a("10.0.0.1"));
        assert_eq!(range.next_free(&used, last), Some(a("10.0.0.4")), "a returned address rests");
        assert_eq!(range.next_free(&used, Some(a("10.0.0.6"))), Some(a("10.0.0.1")));
        assert_eq!(range.next_free(&used, Some(a("10.9.9.9"))), Some(a("10.0.0.1")), "a cursor of another range");
        let full: BTreeSet<_> = (1..=6).map(|n| a(&format!("10.0.0.{n}"))).collect();
        assert_eq!(range.next_free(&full, None), None);
    }

    #[test]
    fn small_and_large_ranges() {
        let none = BTreeSet::new();
        assert_eq!(range("10.0.0.5/32").next_free(&none, None), Some(a("10.0.0.5")));
        assert_eq!(range("10.0.0.4/31").next_free(&none, None), Some(a("10.0.0.4")));
        assert_eq!(range("fd00::/64").next_free(&none, None), Some(a("fd00::1")));
        assert_eq!(range("::/0").next_free(&none, None), Some(a("::1")));
        assert_eq!(range("0.0.0.0/0").next_free(&none, Some(a("255.255.255.254"))), Some(a("0.0.0.1")));
        assert_eq!(range("::/0").size(), u128::MAX);
    }

    #[test]
    fn parts_of_subnets_without_what_is_reserved() {
        let wanted = from_to("10.0.0.0/24", "10.0.0.4", "10.0.0.20", "10.0.0.5");
        let range = Range::new(&wanted, &[p("10.0.0.8/29"), p("10.0.0.19/32"), p("fd00::/8")]).expect("good");
        let all: Vec<String> =
            range.spans.iter().flat_map(|(x, y)| *x..=*y).map(|n| address(n, true).to_string()).collect();
        let want = ["4", "6", "7", "16", "17", "18", "20"].map(|n| format!("10.0.0.{n}"));
        assert_eq!((all.as_slice(), range.size()), (&want[..], 7));
        assert_eq!(range.to_string(), "10.0.0.0/24 from 10.0.0.4 to 10.0.0.20");
        // The subnet's own address and its broadcast address are never given, even if the range names them.
        let wide = Range::new(&from_to("10.0.0.0/30", "10.0.0.0", "10.0.0.3", ""), &[]).expect("good");
        assert!(!wide.offers(a("10.0.0.0")) && !wide.offers(a("10.0.0.3")) && wide.size() == 2);
        let none = Range::new(&p("10.0.0.0/30").into(), &[p("10.0.0.0/8")]).expect("good");
        assert_eq!((none.size(), none.next_free(&BTreeSet::new(), None)), (0, None));
        for bad in [
            from_to("10.0.0.0/24", "10.0.1.1", "", ""),
            from_to("10.0.0.0/24", "", "fd00::1", ""),
            from_to("10.0.0.0/24", "10.0.0.9", "10.0.0.8", ""),
            from_to("10.0.0.0/24", "", "", "10.1.0.1"),
        ] {
            assert!(Range::new(&bad, &[]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn one_address_per_family_from_the_first_range_with_room() {
        let pool = Pool::new(vec![vec![range("10.0.0.0/30"), range("10.0.1.0/30")], vec![range("fd00::/120")]]);
        let pool = pool.expect("good");
        let used = BTreeSet::from([a("10.0.0.1"), a("10.0.0.2")]);
        assert_eq!(pool.choose(&used, &[], &[]), Ok(vec![a("10.0.1.1"), a("fd00::1")]));
        let full = BTreeSet::from(["10.0.0.1", "10.0.0.2", "10.0.1.1", "10.0.1.2"].map(a));
        assert_eq!(pool.choose(&full, &[], &[]), Err(Refusal::Exhausted));
        assert_eq!(
            pool.fill(&used),
            "10.0.0.0/30: 2 of 2 leased, 10.0.1.0/30: 0 of 2 leased, fd00::/120: 0 of 255 leased"
        );
        let asked = |list: &[&str]| pool.choose(&used, &[], &list.iter().map(|s| a(s)).collect::<Vec<_>>());
        assert_eq!(asked(&["fd00::9"]), Ok(vec![a("10.0.1.1"), a("fd00::9")]));
        assert_eq!(asked(&["10.0.1.2", "10.0.1.2"]), Ok(vec![a("10.0.1.2"), a("fd00::1")]));
        assert_eq!(asked(&["10.0.0.2"]), Err(Refusal::InUse(a("10.0.0.2"))));
        for outside in ["10.0.0.3", "10.7.0.1", "fe80::1"] {
            assert_eq!(asked(&[outside]), Err(Refusal::NotOffered(a(outside))));
        }
        assert_eq!(asked(&["10.0.1.1", "10.0.1.2"]), Err(Refusal::TwoOfOneFamily(a("10.0.1.1"), a("10.0.1.2"))));
    }

    #[test]
    fn sets_that_cannot_be_served_are_refused() {
        let sets = |s: &[&[&str]]| Pool::new(s.iter().map(|s| s.iter().map(|r| range(r)).collect()).collect());
        assert!(sets(&[&["10.0.0.0/25", "10.0.0.128/25"], &["fd00::/64"]]).is_ok());
        for bad in [
            &[&["10.0.0.0/24", "10.0.0.128/25"][..]][..],
            &[&["10.0.0.0/24", "fd00::/64"]],
            &[&["10.0.0.0/24"], &["10.0.0.0/24"]],
            &[&["10.0.0.0/24"], &["10.0.1.0/24"]],
        ] {
            assert!(sets(bad).is_err(), "{bad:?}");
        }
        let (first, second) = (sets(&[&["10.9.0.0/24"]]), sets(&[&["10.0.0.0/24"], &["fd00::/64"]]));
        let merged = second.expect("good").behind(first.expect("good"));
        assert_eq!(merged, sets(&[&["10.9.0.0/24"], &["fd00::/64"]]).expect("good"));
    }

    proptest! {
        #[test]
        fn never_an_address_in_use_reserved_or_outside(
            len in 24u8..=32, used in proptest::collection::btree_set(0u8.., 0..200), after in 0u8..,
            excluded in proptest::collection::vec((0u8.., 26u8..=32), 0..4),
        ) {
            let subnet = p(&format!("10.0.0.0/{len}"));
            let excluded: Vec<Prefix> = excluded.into_iter().map(|(n, l)| p(&format!("10.0.0.{n}/{l}"))).collect();
            let range = Range::new(&subnet.into(), &excluded).expect("a range");
            let used: BTreeSet<IpAddr> = used.into_iter().map(|n| Ipv4Addr::new(10, 0, 0, n).into()).collect();
            let (first, last) = bounds(subnet).expect("bounds");
            let offered = |ip: IpAddr| (first..=last).contains(&number(ip)) && !excluded.iter().any(|e| e.contains(ip));
            let all: Vec<IpAddr> = (first..=last).map(|n| address(n, true)).filter(|ip| offered(*ip)).collect();
            prop_assert_eq!(range.size(), all.len() as u128);
            match range.next_free(&used, Some(Ipv4Addr::new(10, 0, 0, after).into())) {
                Some(got) => prop_assert!(offered(got) && !used.contains(&got)),
                None => prop_assert!(all.iter().all(|ip| used.contains(ip))),
            }
        }
    }
}
