//! How many requests may be tried again: a share of those of the last ten seconds, and some in any case, so that retries
//! help while little fails and add no load when everything does.

use sluice_model::RetryBudget;

/// Seconds that count (Linkerd's `ttl`).
const WINDOW: usize = 10;

/// Requests and retries of the last seconds of one backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// Requests and retries of second `n` at `n % WINDOW`.
    seconds: [(u32, u32); WINDOW],
    /// The second that was counted last.
    last_s: u64,
}

impl Budget {
    /// A request begins at second `now_s` of the caller's clock.
    pub fn request(&mut self, now_s: u64) {
        let at = self.at(now_s);
        self.seconds[at].0 = self.seconds[at].0.saturating_add(1);
    }

    /// Whether one more try may be made; it counts if so.
    pub fn retry(&mut self, now_s: u64, of: RetryBudget) -> bool {
        let at = self.at(now_s);
        let sum = |f: fn(&(u32, u32)) -> u32| self.seconds.iter().map(|s| u64::from(f(s))).sum::<u64>();
        let (requests, retries) = (sum(|s| s.0), sum(|s| s.1));
        let allowed = requests * u64::from(of.percent) / 100 + u64::from(of.min_per_s) * WINDOW as u64;
        let free = retries < allowed;
        if free {
            self.seconds[at].1 += 1;
        }
        free
    }

    /// The place of `now_s`, with the seconds before it that nothing was counted in emptied. A clock that goes back counts
    /// into the last second.
    fn at(&mut self, now_s: u64) -> usize {
        let now_s = now_s.max(self.last_s);
        for s in (self.last_s + 1..=now_s).rev().take(WINDOW) {
            self.seconds[s as usize % WINDOW] = (0, 0);
        }
        self.last_s = now_s;
        now_s as usize % WINDOW
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(percent: u8, min_per_s: u32) -> RetryBudget {
        RetryBudget { percent, min_per_s }
    }

    #[test]
    fn a_share_of_the_requests_and_some_in_any_case() {
        let mut b = Budget::default();
        (0..100).for_each(|_| b.request(5));
        assert_eq!((0..50).filter(|_| b.retry(5, of(20, 0))).count(), 20);
        assert_eq!((0..50).filter(|_| b.retry(6, of(20, 1))).count(), 10, "20 are used, 10 more are allowed");
        assert!(!Budget::default().retry(5, of(20, 0)));
    }

    #[test]
    fn what_is_ten_seconds_old_counts_no_more() {
        let mut b = Budget::default();
        (0..100).for_each(|_| b.request(5));
        assert!(b.retry(14, of(20, 0)));
        assert!(!b.retry(15, of(20, 0)), "the requests are forgotten");
        b.request(1000);
        assert!(!b.retry(1000, of(20, 0)), "one request allows a fifth of a retry");
        b.request(3);
        assert_eq!(b.last_s, 1000, "the clock does not go back");
    }

    #[test]
    fn when_everything_fails_load_grows_by_the_share_only() {
        let mut b = Budget::default();
        let mut retries = 0;
        for ms in 0..60_000u64 {
            b.request(ms / 1000);
            retries += u64::from(b.retry(ms / 1000, of(20, 10)));
        }
        assert!((12_000..13_000).contains(&retries), "{retries} retries of 60,000 requests");
    }
}
