//! Which endpoint of a backend takes the next request. By default the one with fewer requests in flight of two drawn at
//! random ("power of two choices"); by latency, in turn, or by key ([`crate::ring`]) where a policy says so. What is kept
//! between requests is the caller's; loads and random numbers come in.

/// Picks one of `count` endpoints. `cost` is what a request there costs, the requests in flight by default; an endpoint
/// that is not `usable` (already tried for this request, ejected) is never picked. `None` when none is usable.
pub fn pick<C: PartialOrd>(
    count: usize,
    random: u64,
    cost: impl Fn(usize) -> C,
    usable: impl Fn(usize) -> bool,
) -> Option<usize> {
    match count {
        0 => None,
        1 => usable(0).then_some(0),
        _ => pick_of_two(count, random, cost, usable),
    }
}

fn pick_of_two<C: PartialOrd>(
    count: usize,
    random: u64,
    cost: impl Fn(usize) -> C,
    usable: impl Fn(usize) -> bool,
) -> Option<usize> {
    let (low, high) = (random as u32 as usize, (random >> 32) as usize);
    let a = low % count;
    // Never the same twice: the second is drawn from the others.
    let b = (a + 1 + high % (count - 1)) % count;
    match (usable(a), usable(b)) {
        (true, true) if cost(b) < cost(a) => Some(b),
        (true, _) => Some(a),
        (false, true) => Some(b),
        (false, false) => (0..count).map(|i| (a + i) % count).find(|i| usable(*i)),
    }
}

/// The next one in turn after `last`.
pub fn in_turn(count: usize, last: usize, usable: impl Fn(usize) -> bool) -> Option<usize> {
    (1..=count).map(|i| last.wrapping_add(i) % count).find(|i| usable(*i))
}

/// How long latencies count: one that is this old has lost 63 % of its weight.
const EWMA_MS: f64 = 10_000.0;

/// An endpoint's latency as it was lately: rises at once, falls slowly (Finagle's peak EWMA), so that an endpoint that
/// stalls is avoided from the first slow answer on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Latency {
    us: f64,
    at_ms: u64,
}

impl Latency {
    pub fn observe(&mut self, now_ms: u64, us: u64) {
        let us = us as f64;
        let kept = self.kept(now_ms);
        self.us = if us > self.us { us } else { self.us * kept + us * (1.0 - kept) };
        self.at_ms = now_ms.max(self.at_ms);
    }

    /// What one more request there costs. Unknown ones are cheap, so that they become known.
    pub fn cost(&self, now_ms: u64, in_flight: u32) -> f64 {
        (self.us * self.kept(now_ms)).max(1.0) * f64::from(in_flight + 1)
    }

    fn kept(&self, now_ms: u64) -> f64 {
        (-(now_ms.saturating_sub(self.at_ms) as f64) / EWMA_MS).exp()
    }
}

/// Share of its requests that an endpoint of `age_ms` gets while it warms up: from a tenth (Envoy's `min_weight_percent`)
/// to all of them.
pub fn warmth(age_ms: u64, slow_start_ms: u32) -> f64 {
    if age_ms >= u64::from(slow_start_ms) { 1.0 } else { (age_ms as f64 / f64::from(slow_start_ms)).max(0.1) }
}

/// Whether an endpoint that warms up takes this request, or another draw decides.
pub fn takes_warming(warmth: f64, random: u64) -> bool {
    warmth >= 1.0 || ((random >> 11) as f64) < warmth * (1u64 << 53) as f64
}

/// Whether a request stays in the caller's zone, of whose `local` endpoints `healthy` are: all do while the healthy share
/// reaches `healthy_percent`, below it the missing part leaves.
pub fn stays_local(healthy: usize, local: usize, healthy_percent: u8, random: u64) -> bool {
    if healthy == 0 {
        return false;
    }
    let (share, wanted) = (healthy as u64 * 100, local as u64 * u64::from(healthy_percent));
    share >= wanted || random % wanted < share
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

    #[test]
    fn turns_pass_over_what_is_not_usable() {
        let mut last = 0;
        let mut seen = vec![];
        for _ in 0..6 {
            last = in_turn(4, last, |i| i != 2).expect("usable");
            seen.push(last);
        }
        assert_eq!(seen, [1, 3, 0, 1, 3, 0]);
        assert_eq!(in_turn(0, 7, |_| true), None);
        assert_eq!(in_turn(3, usize::MAX, |_| false), None);
    }

    #[test]
    fn a_slow_answer_counts_at_once_and_is_forgotten_slowly() {
        let mut slow = Latency::default();
        slow.observe(0, 1_000);
        slow.observe(1, 500_000);
        let mut fast = Latency::default();
        fast.observe(1, 1_000);
        assert!(slow.cost(2, 0) > 100.0 * fast.cost(2, 0));
        assert!(fast.cost(2, 9) > fast.cost(2, 0));
        (0..600).for_each(|s| slow.observe(1_000 + s * 100, 1_000));
        assert!(slow.cost(61_000, 0) < 3.0 * 1_000.0, "{}", slow.cost(61_000, 0));
        assert!(Latency::default().cost(5, 0) <= 1.0, "unknown ones are tried");
        assert!(slow.cost(0, 0).is_finite(), "a clock that goes back");
    }

    #[test]
    fn new_endpoints_get_a_growing_share() {
        assert_eq!([0, 1_000, 5_000, 10_000, 99_999].map(|age| warmth(age, 10_000)), [0.1, 0.1, 0.5, 1.0, 1.0]);
        assert_eq!(warmth(0, 0), 1.0);
        let mut random = Random::new(3);
        let taken = (0..10_000).filter(|_| takes_warming(0.25, random.draw())).count();
        assert!((2_350..2_650).contains(&taken), "{taken}");
    }

    #[test]
    fn zones_keep_their_requests_while_they_are_well() {
        let mut random = Random::new(3);
        let mut local = |healthy, all| (0..10_000).filter(|_| stays_local(healthy, all, 80, random.draw())).count();
        assert_eq!([local(10, 10), local(8, 10), local(0, 10), local(0, 0)], [10_000, 10_000, 0, 0]);
        let half = local(4, 10);
        assert!((4_800..5_200).contains(&half), "{half}");
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
