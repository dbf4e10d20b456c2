//! Which version takes a user: the same one for the same key as long as shares allow it. Raising a version's share moves
//! users to it and none away from it, however many versions there are; nothing is kept anywhere.
//!
//! Weighted rendezvous: each version draws a score from the key, the best takes the user. A version's score depends on its
//! own weight alone, and a larger weight only makes it better.

use crate::hash::{hash, mix};

/// Salt of what users are recognized by; fixed, so that all sidecars agree and go on agreeing.
const SALT: u64 = 0x736c_7569_6365;

/// The key of a user known by `text` (a cookie's or header's value).
pub fn key(text: &[u8]) -> u64 {
    hash(text, SALT)
}

/// The index of the version for `key`. `versions` gives each one's name as a number (stable: its place may change) and its
/// weight; those of weight 0 take nobody. `None` when all are 0.
pub fn choose(versions: impl Iterator<Item = (u64, u32)>, key: u64) -> Option<usize> {
    let mut best: Option<(f64, usize)> = None;
    for (at, (name, weight)) in versions.enumerate().filter(|(_, (_, weight))| *weight > 0) {
        // Uniform over (0, 1): 53 bits, and never 0, whose logarithm is no number.
        let uniform = ((mix(key ^ mix(name)) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let score = -f64::from(weight) / uniform.ln();
        if best.is_none_or(|(b, _)| score > b) {
            best = Some((score, at));
        }
    }
    best.map(|(_, at)| at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(weights: &[u32], user: u32) -> Option<usize> {
        choose(weights.iter().enumerate().map(|(i, w)| (i as u64, *w)), key(format!("user-{user}").as_bytes()))
    }

    #[test]
    fn users_are_divided_by_weight() {
        let mut counts = [0u32; 3];
        for user in 0..100_000 {
            counts[of(&[70, 25, 5], user).expect("a version")] += 1;
        }
        // Three standard deviations of a binomial share.
        for (count, (wanted, slack)) in counts.iter().zip([(70_000, 435), (25_000, 411), (5_000, 207)]) {
            assert!(count.abs_diff(wanted) < slack, "{counts:?}");
        }
    }

    #[test]
    fn nobody_is_sent_to_weight_zero() {
        assert_eq!(of(&[0, 0], 1), None);
        assert_eq!(of(&[], 1), None);
        assert!((0..1000).all(|user| of(&[0, 3, 0], user) == Some(1)));
    }

    proptest! {
        #[test]
        fn a_raised_version_loses_no_user(
            weights in proptest::collection::vec(0u32..100, 2..5), raised: prop::sample::Index, by in 1u32..100,
        ) {
            let raised = raised.index(weights.len());
            let mut more = weights.clone();
            more[raised] += by;
            for user in 0..200 {
                let (before, after) = (of(&weights, user), of(&more, user));
                // Either nothing changed for the user, or the user went to the version that was raised.
                prop_assert!(before == after || after == Some(raised), "{:?} {:?}", before, after);
            }
        }

        #[test]
        fn a_shift_from_one_to_the_other_moves_users_one_way(first in 0u32..=100, more in 0u32..=100) {
            let (low, high) = (first.min(more), first.max(more));
            for user in 0..200 {
                if of(&[100 - low, low], user) == Some(1) {
                    prop_assert_eq!(of(&[100 - high, high], user), Some(1));
                }
            }
        }
    }
}
