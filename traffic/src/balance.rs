//! Which endpoint of a backend takes the next request: the one with fewer requests in flight of two drawn at random
//! ("power of two choices"). It keeps nothing; loads and the random number come in.

/// Picks one of `count` endpoints. `load` is the requests in flight at an endpoint; an endpoint that is not `usable`
/// (already tried for this request) is never picked. `None` when none is usable.
pub fn pick(count: usize, random: u64, load: impl Fn(usize) -> u32, usable: impl Fn(usize) -> bool) -> Option<usize> {
    match count {
        0 => None,
        1 => usable(0).then_some(0),
        _ => pick_of_two(count, random, load, usable),
    }
}

fn pick_of_two(
    count: usize,
    random: u64,
    load: impl Fn(usize) -> u32,
    usable: impl Fn(usize) -> bool,
) -> Option<usize> {
    let (low, high) = (random as u32 as usize, (random >> 32) as usize);
    let a = low % count;
    // Never the same twice: the second is drawn from the others.
    let b = (a + 1 + high % (count - 1)) % count;
    match (usable(a), usable(b)) {
        (true, true) if load(b) < load(a) => Some(b),
        (true, _) => Some(a),
        (false, true) => Some(b),
        (false, false) => (0..count).map(|i| (a + i) % count).find(|i| usable(*i)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use proptest::prelude::*;

    #[test]
    fn fewer_requests_in_flight_win() {
        let loads = [5, 0];
        for random in [0, 1, 1 << 32, u64::MAX] {
            assert_eq!(pick(2, random, |i| loads[i], |_| true), Some(1));
        }
        assert_eq!(pick(0, 7, |_| 0, |_| true), None);
        assert_eq!(pick(1, 7, |_| 9, |_| true), Some(0));
        assert_eq!(pick(3, 7, |_| 0, |_| false), None);
    }

    #[test]
    fn equal_endpoints_get_equal_shares() {
        let mut random = Random::new(1);
        let mut counts = [0u32; 5];
        for _ in 0..50_000 {
            counts[pick(5, random.draw(), |_| 0, |_| true).expect("usable")] += 1;
        }
        assert!(counts.iter().all(|c| (9_500..10_500).contains(c)), "{counts:?}");
    }

    proptest! {
        #[test]
        fn the_last_usable_endpoint_is_found(count in 1usize..20, random: u64, keep: prop::sample::Index) {
            let only = keep.index(count);
            prop_assert_eq!(pick(count, random, |_| 0, |i| i == only), Some(only));
        }

        #[test]
        fn the_most_loaded_endpoint_is_avoided(count in 2usize..20, random: u64, hot: prop::sample::Index) {
            let hot = hot.index(count);
            prop_assert_ne!(pick(count, random, |i| u32::from(i == hot), |_| true), Some(hot));
        }
    }
}
