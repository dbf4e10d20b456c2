//! Weighted choice that is exact: smooth weighted round robin. After any number of choices every backend is within
//! `backends` of its share, and choices of one backend are spread evenly instead of in runs.
//!
//! A split starts at a random phase of its cycle, so that many sidecars with few requests each do not all begin with
//! the same backend.

/// Bound on the steps taken to reach the start phase; longer cycles start somewhere in their first part.
const MAX_PHASE: u64 = 4096;

/// One rule's weights and how far each backend is behind its share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    weights: Box<[u32]>,
    /// Credit per backend in units of 1/total of a choice; the sum is 0 between choices.
    credit: Box<[i64]>,
    total: i64,
}

impl Split {
    /// Starts at `phase` (any number) of the cycle.
    pub fn new(weights: &[u32], phase: u64) -> Self {
        let total = weights.iter().map(|w| i64::from(*w)).sum();
        let mut split = Self { weights: weights.into(), credit: vec![0; weights.len()].into(), total };
        let period = (total as u64) / weights.iter().copied().fold(0, gcd).max(1);
        for _ in 0..phase % period.clamp(1, MAX_PHASE) {
            split.choose();
        }
        split
    }

    pub fn weights(&self) -> &[u32] {
        &self.weights
    }

    /// The backend of the next request; `None` when all weights are 0. A backend of weight 0 is never chosen.
    pub fn choose(&mut self) -> Option<usize> {
        if self.weights.len() == 1 {
            return (self.total > 0).then_some(0);
        }
        let mut best: Option<usize> = None;
        for (i, weight) in self.weights.iter().enumerate().filter(|(_, w)| **w > 0) {
            self.credit[i] += i64::from(*weight);
            if best.is_none_or(|b| self.credit[i] > self.credit[b]) {
                best = Some(i);
            }
        }
        self.credit[best?] -= self.total;
        best
    }

    /// The split after a change of weights of the same backends (same order): who is behind stays behind, so frequent
    /// changes do not favour a backend.
    pub fn reweigh(&self, weights: &[u32]) -> Self {
        if weights == &*self.weights {
            return self.clone();
        }
        let mut next = Self::new(weights, 0);
        if self.total == 0 || next.total == 0 || weights.len() != self.weights.len() {
            return next;
        }
        for (i, weight) in weights.iter().enumerate().filter(|(_, w)| **w > 0) {
            let scaled = i128::from(self.credit[i]) * i128::from(next.total) / i128::from(self.total);
            // No backend may start more than its own next turn away from even.
            let bound = i128::from(next.total - i64::from(*weight));
            next.credit[i] = scaled.clamp(-bound, bound) as i64;
        }
        next.settle();
        next
    }

    /// Makes the credits sum to 0 again, taking from all backends that may be chosen alike.
    fn settle(&mut self) {
        let live = self.weights.iter().filter(|w| **w > 0).count() as i64;
        let sum: i64 = self.credit.iter().sum();
        let (each, mut rest) = (sum.div_euclid(live), sum.rem_euclid(live));
        for (credit, _) in self.credit.iter_mut().zip(&self.weights).filter(|(_, w)| **w > 0) {
            *credit -= each + i64::from(rest > 0);
            rest -= i64::from(rest > 0);
        }
    }
}

fn gcd(a: u64, b: u32) -> u64 {
    let (mut a, mut b) = (a, u64::from(b));
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn counts(split: &mut Split, choices: usize) -> Vec<u64> {
        let mut counts = vec![0; split.weights().len()];
        for _ in 0..choices {
            if let Some(i) = split.choose() {
                counts[i] += 1;
            }
        }
        counts
    }

    #[test]
    fn whole_cycles_are_exact_from_every_phase() {
        for phase in 0..100 {
            assert_eq!(counts(&mut Split::new(&[90, 10], phase), 10_000), [9_000, 1_000], "phase {phase}");
        }
        assert_eq!(counts(&mut Split::new(&[1, 2, 3], 4), 600), [100, 200, 300]);
    }

    #[test]
    fn choices_are_spread_evenly() {
        let mut split = Split::new(&[3, 1], 0);
        let seen: Vec<_> = (0..8).map(|_| split.choose().expect("weights")).collect();
        assert_eq!(seen, [0, 0, 1, 0, 0, 0, 1, 0]);
    }

    #[test]
    fn the_first_choice_over_all_phases_has_the_weights_shares() {
        let first = (0..100).filter(|phase| Split::new(&[75, 25], *phase).choose() == Some(1)).count();
        assert_eq!(first, 25);
    }

    #[test]
    fn weight_zero_is_never_chosen() {
        assert_eq!(counts(&mut Split::new(&[0, 0], 3), 10), [0, 0]);
        assert_eq!(counts(&mut Split::new(&[0], 3), 10), [0]);
        assert_eq!(Split::new(&[], 3).choose(), None);
        let mut split = Split::new(&[1, 1], 1);
        split.choose();
        assert_eq!(counts(&mut split.reweigh(&[0, 1]), 10), [0, 10]);
    }

    fn within(counts: &[u64], weights: &[u32], choices: usize, bound: f64) -> bool {
        let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        let share = |w: &u32| choices as f64 * f64::from(*w) / total;
        counts.iter().zip(weights).all(|(c, w)| (*c as f64 - share(w)).abs() <= bound)
    }

    fn some_weights(n: usize) -> impl Strategy<Value = Vec<u32>> {
        proptest::collection::vec(prop_oneof![Just(0), 1u32..10, 1u32..1_000_000], n)
            .prop_filter("some weight", |w| w.iter().any(|w| *w > 0))
    }

    proptest! {
        #[test]
        fn every_prefix_is_within_backends_of_its_share(
            weights in (1usize..7).prop_flat_map(some_weights), phase: u64, choices in 0usize..3_000,
        ) {
            let got = counts(&mut Split::new(&weights, phase), choices);
            prop_assert!(within(&got, &weights, choices, weights.len() as f64), "{:?} {:?}", got, weights);
        }

        #[test]
        fn so_is_every_prefix_after_a_change(
            (old, new) in (2usize..7).prop_flat_map(|n| (some_weights(n), some_weights(n))),
            before in 0usize..500, choices in 0usize..2_000,
        ) {
            let mut split = Split::new(&old, 0);
            counts(&mut split, before);
            let got = counts(&mut split.reweigh(&new), choices);
            prop_assert!(within(&got, &new, choices, new.len() as f64), "{:?} {:?}", got, new);
        }

        #[test]
        fn the_same_weights_go_on_where_they_were(weights in (2usize..5).prop_flat_map(some_weights), before in 0usize..99) {
            let mut split = Split::new(&weights, 7);
            counts(&mut split, before);
            prop_assert_eq!(split.reweigh(split.weights()), split);
        }
    }
}
