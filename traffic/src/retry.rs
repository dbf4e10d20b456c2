//! Whether and when a request is tried again.

use sluice_model::Retry;

/// Tries after the first where a route says nothing of their number.
const DEFAULT_ATTEMPTS: u32 = 1;
/// Bound on them, whatever a route asks.
const MAX_ATTEMPTS: u32 = 10;
/// Without a route's word.
const DEFAULT_BACKOFF_MS: u64 = 25;
/// Longest pause: pauses double up to it.
const MAX_BACKOFF_MS: u64 = 10_000;

/// Tries after the first that a route allows.
pub fn attempts(retry: &Retry) -> u32 {
    retry.attempts.unwrap_or(DEFAULT_ATTEMPTS).min(MAX_ATTEMPTS)
}

/// An answer with this status is tried again.
pub fn asks_again(retry: &Retry, status: u16) -> bool {
    retry.codes.contains(&status)
}

/// Milliseconds to wait before try `n` (the first one after a failure is 1). Gateway API's `backoff` is the least time; it
/// doubles with each try, and up to half of it is added at random, so that callers that failed together come back apart.
pub fn backoff_ms(retry: &Retry, n: u32, random: u64) -> u64 {
    let base = retry.backoff_ms.unwrap_or(DEFAULT_BACKOFF_MS);
    if base == 0 {
        return 0;
    }
    let pause = base.saturating_mul(1 << n.saturating_sub(1).min(20)).min(MAX_BACKOFF_MS.max(base));
    pause + random % (pause / 2 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retry(attempts: Option<u32>, backoff_ms: Option<u64>) -> Retry {
        Retry { codes: vec![500, 503], attempts, backoff_ms }
    }

    #[test]
    fn statuses_and_numbers() {
        let r = retry(None, None);
        assert!(asks_again(&r, 503) && !asks_again(&r, 502));
        assert_eq!([None, Some(0), Some(3), Some(99)].map(|n| attempts(&retry(n, None))), [1, 0, 3, 10]);
    }

    #[test]
    fn pauses_double_and_are_never_shorter_than_asked() {
        let least = |n| backoff_ms(&retry(None, Some(100)), n, 0);
        assert_eq!([1, 2, 3, 8, 99].map(least), [100, 200, 400, 10_000, 10_000]);
        for random in [0, 1, 50, 51, u64::MAX] {
            assert!((100..=150).contains(&backoff_ms(&retry(None, Some(100)), 1, random)));
        }
        assert_eq!(backoff_ms(&retry(None, Some(0)), 3, 9), 0);
        assert_eq!(backoff_ms(&retry(None, Some(60_000)), 3, 0), 60_000, "a longer pause than the bound was asked for");
    }
}
