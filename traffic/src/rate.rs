//! Token buckets as one number each (GCRA, ITU-T I.371): the time at which the bucket would be full again.

use sluice_model::RateLimit;

/// A bucket; a new one is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// Nanoseconds of the caller's clock.
    full_at: u64,
}

impl Bucket {
    /// Takes a token at `now_ns`; without one, the nanoseconds until there is. `requests` of 0 let nobody through.
    pub fn take(&mut self, now_ns: u64, limit: RateLimit) -> Result<(), u64> {
        let Some(each) = (u64::from(limit.per_ms) * 1_000_000).checked_div(limit.requests.into()) else {
            return Err(u64::MAX);
        };
        // A burst of 0 would let nobody through either, which is not what a rate says.
        let room = each.saturating_mul(u64::from(limit.burst.max(1)) - 1);
        let start = self.full_at.max(now_ns);
        if start - now_ns > room {
            return Err(start - now_ns - room);
        }
        self.full_at = start.saturating_add(each);
        Ok(())
    }

    /// Forgetting it changes nothing.
    pub fn is_full(&self, now_ns: u64) -> bool {
        self.full_at <= now_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    fn limit(requests: u32, burst: u32) -> RateLimit {
        RateLimit { requests, per_ms: 1000, burst }
    }

    #[test]
    fn a_burst_then_the_rate() {
        let (mut bucket, limit) = (Bucket::default(), limit(10, 3));
        let taken = (0..5).filter(|_| bucket.take(SECOND, limit).is_ok()).count();
        assert_eq!(taken, 3);
        assert_eq!(bucket.take(SECOND, limit), Err(SECOND / 10));
        assert_eq!(bucket.take(SECOND + SECOND / 10, limit), Ok(()));
        assert!(bucket.take(SECOND + SECOND / 10, limit).is_err());
        assert!(!bucket.is_full(SECOND) && bucket.is_full(2 * SECOND));
    }

    #[test]
    fn limits_of_nothing_and_bursts_of_nothing() {
        assert_eq!(Bucket::default().take(0, limit(0, 9)), Err(u64::MAX));
        let mut bucket = Bucket::default();
        assert_eq!(bucket.take(0, limit(1, 0)), Ok(()));
        assert_eq!(bucket.take(0, limit(1, 0)), Err(SECOND));
    }

    proptest! {
        #[test]
        fn no_interval_takes_more_than_rate_and_burst(
            requests in 1u32..1000, burst in 1u32..50, gaps in proptest::collection::vec(0u64..20_000_000, 1..300),
        ) {
            let (mut bucket, mut now, mut taken) = (Bucket::default(), 7u64, 0u64);
            let limit = limit(requests, burst);
            for gap in &gaps {
                now += gap;
                taken += u64::from(bucket.take(now, limit).is_ok());
            }
            let elapsed: u64 = gaps.iter().sum();
            let each = SECOND / u64::from(requests);
            prop_assert!(taken <= u64::from(burst) + elapsed / each + 1);
        }
    }
}
