//! Endpoints by key: equal keys go to the same endpoint, and when an endpoint comes or goes few others' keys move. Both
//! forms are built once per set of endpoints; an endpoint is known by a number of its own (a hash of its address), so that
//! every sidecar builds the same.

use crate::hash::mix;

/// Points of each endpoint on the ring (Envoy's default ring of 1,024 has about as many for ten endpoints).
const POINTS: usize = 100;
/// Entries of Maglev's table: a prime above 100 × the endpoints it is meant for (Maglev §5.3).
const TABLE: usize = 65_537;
/// Other keys tried in the table when the endpoint there is not usable, before all are gone through.
const REHASHES: usize = 8;

/// Ring of hashes (ketama).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ring {
    /// In order of the hash.
    points: Box<[(u64, u32)]>,
}

impl Ring {
    /// Of endpoints known by these numbers; the index of each is what lookups give.
    pub fn new(endpoints: &[u64]) -> Self {
        let of = |(i, name): (usize, &u64)| {
            let name = *name;
            (0..POINTS as u64).map(move |p| (mix(mix(name) ^ p.wrapping_mul(0x9e37_79b9_7f4a_7c15)), i as u32))
        };
        let mut points: Vec<_> = endpoints.iter().enumerate().flat_map(of).collect();
        points.sort_unstable();
        Self { points: points.into() }
    }

    /// The first usable endpoint at or after the key.
    pub fn pick(&self, key: u64, usable: impl Fn(usize) -> bool) -> Option<usize> {
        let from = self.points.partition_point(|(hash, _)| *hash < key);
        let (before, after) = self.points.split_at(from);
        after.iter().chain(before).map(|(_, i)| *i as usize).find(|i| usable(*i))
    }
}

/// Maglev's table: every endpoint has its share to within a percent, and a lookup is one access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Maglev {
    table: Box<[u32]>,
    endpoints: usize,
}

impl Maglev {
    pub fn new(endpoints: &[u64]) -> Self {
        const FREE: u32 = u32::MAX;
        if endpoints.is_empty() {
            return Self { table: Box::default(), endpoints: 0 };
        }
        let walk = |name: &u64| (mix(*name) as usize % TABLE, mix(!*name) as usize % (TABLE - 1) + 1);
        let mut walks: Vec<(usize, usize)> = endpoints.iter().map(walk).collect();
        let mut table = vec![FREE; TABLE];
        let mut filled = 0;
        // In turn, each takes the next free place of its own order of the table.
        'full: loop {
            for (i, (at, skip)) in walks.iter_mut().enumerate() {
                while table[*at] != FREE {
                    *at = (*at + *skip) % TABLE;
                }
                table[*at] = i as u32;
                filled += 1;
                if filled == TABLE {
                    break 'full;
                }
            }
        }
        Self { table: table.into(), endpoints: endpoints.len() }
    }

    pub fn pick(&self, key: u64, usable: impl Fn(usize) -> bool) -> Option<usize> {
        let mut key = key;
        for _ in 0..REHASHES.min(self.table.len()) {
            let at = self.table[(key % TABLE as u64) as usize] as usize;
            if usable(at) {
                return Some(at);
            }
            key = mix(key.wrapping_add(0x9e37_79b9_7f4a_7c15));
        }
        (0..self.endpoints).map(|i| (key as usize).wrapping_add(i) % self.endpoints).find(|i| usable(*i))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::hash;
    use proptest::prelude::*;

    fn names(n: u64) -> Vec<u64> {
        (0..n).map(|i| hash(format!("10.244.0.{i}:80").as_bytes(), 0)).collect()
    }

    fn key(i: u64) -> u64 {
        hash(&i.to_le_bytes(), 5)
    }

    /// Shares of 20,000 keys, and how many of them move when the last endpoint goes.
    fn shares(n: u64, pick: impl Fn(&[u64], u64) -> Option<usize>) -> (Vec<u32>, usize) {
        let (all, fewer) = (names(n), names(n - 1));
        let mut counts = vec![0; n as usize];
        let mut moved = 0;
        for i in 0..20_000 {
            let at = pick(&all, key(i)).expect("an endpoint");
            counts[at] += 1;
            moved += usize::from(at as u64 != n - 1 && pick(&fewer, key(i)) != Some(at));
        }
        (counts, moved)
    }

    #[test]
    fn a_ring_moves_only_the_keys_of_the_one_that_went() {
        let rings = [Ring::new(&names(10)), Ring::new(&names(9))];
        let (counts, moved) = shares(10, |names, key| rings[usize::from(names.len() == 9)].pick(key, |_| true));
        assert_eq!(moved, 0);
        assert!(counts.iter().all(|c| (1_200..2_800).contains(c)), "{counts:?}");
    }

    #[test]
    fn maglevs_table_is_even_and_moves_little() {
        let tables = [Maglev::new(&names(10)), Maglev::new(&names(9))];
        let (counts, moved) = shares(10, |names, key| tables[usize::from(names.len() == 9)].pick(key, |_| true));
        assert!(counts.iter().all(|c| (1_850..2_150).contains(c)), "{counts:?}");
        assert!(moved < 20_000 / 20, "{moved} of 20,000");
    }

    #[test]
    fn nobody_takes_a_key_of_an_empty_set() {
        assert_eq!(Ring::new(&[]).pick(3, |_| true), None);
        assert_eq!(Maglev::new(&[]).pick(3, |_| true), None);
    }

    proptest! {
        #[test]
        fn the_only_usable_one_is_found(n in 1u64..20, keep: prop::sample::Index, key: u64) {
            let (names, only) = (names(n), keep.index(n as usize));
            prop_assert_eq!(Ring::new(&names).pick(key, |i| i == only), Some(only));
            prop_assert_eq!(Maglev::new(&names).pick(key, |i| i == only), Some(only));
        }
    }
}
