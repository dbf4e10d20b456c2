//! What the feed and the streams count: how long it takes until a change is in force everywhere, and how long to compile.
//!
//! [`Lag`] is PURE.

use crate::histogram::{Histogram, head};
use sluice_model::Revision;
use std::{
    collections::VecDeque,
    fmt::Write as _,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Upper bounds in seconds. The bar is 0.2 at the 99th percentile; a minute is somebody who does not answer.
const ACKNOWLEDGED_S: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
const COMPILED_S: &[f64] = &[0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0];
/// Changes waited for at a time. While somebody does not answer, further ones are not measured: the first say it all.
const MAX_PENDING: usize = 4_096;

/// Changes on their way, and how long those took that have arrived.
pub struct Lag {
    pending: VecDeque<(Revision, Instant)>,
    took: Histogram,
}

impl Default for Lag {
    fn default() -> Self {
        Lag { pending: VecDeque::new(), took: Histogram::new(ACKNOWLEDGED_S) }
    }
}

impl Lag {
    /// The snapshot of this revision goes out; the oldest change in it is from `changed`.
    pub fn published(&mut self, revision: Revision, changed: Instant) {
        if self.pending.len() < MAX_PENDING {
            self.pending.push_back((revision, changed));
        }
    }

    pub fn is_settled(&self) -> bool {
        self.pending.is_empty()
    }

    /// Counts the changes that everybody has by now. `everybody_has` says so of a revision; `None` while there is nobody
    /// to have it, and then there is nothing to measure.
    pub fn settle(&mut self, now: Instant, everybody_has: impl Fn(Revision) -> Option<bool>) {
        while let Some((revision, changed)) = self.pending.front() {
            match everybody_has(*revision) {
                Some(false) => return,
                Some(true) => self.took.observe(now.saturating_duration_since(*changed)),
                None => {}
            }
            self.pending.pop_front();
        }
    }
}

/// All of it, for `/metrics`.
pub struct Counters {
    lag: Mutex<Lag>,
    compiled: Mutex<Histogram>,
}

impl Default for Counters {
    fn default() -> Self {
        Counters { lag: Mutex::default(), compiled: Mutex::new(Histogram::new(COMPILED_S)) }
    }
}

impl Counters {
    pub fn lag(&self) -> MutexGuard<'_, Lag> {
        self.lag.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn compiled(&self, took: Duration) {
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner).observe(took);
    }

    /// How often objects were compiled.
    pub fn compilations(&self) -> u64 {
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner).count()
    }

    pub fn render(&self, out: &mut String) {
        let name = "sluice_change_acknowledged_seconds";
        let help =
            "Time from a change of an object to the last acknowledgement of its snapshot by agents and sidecars.";
        head(out, name, "histogram", help);
        let lag = self.lag();
        lag.took.render(out, name, "");
        head(out, "sluice_changes_pending", "gauge", "Snapshots published and not acknowledged by everybody.");
        // Writing to a String cannot fail.
        let _ = writeln!(out, "sluice_changes_pending {}", lag.pending.len());
        drop(lag);
        let name = "sluice_compile_duration_seconds";
        head(out, name, "histogram", "Time to compile all objects into a snapshot.");
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner).render(out, name, "");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_counts_from_when_it_was_made_to_when_the_last_has_it() {
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        let mut lag = Lag::default();
        lag.published(Revision(5), at(0));
        lag.published(Revision(7), at(10));
        lag.settle(at(20), |revision| Some(revision < Revision(5)));
        assert_eq!((lag.took.count(), lag.pending.len()), (0, 2));
        lag.settle(at(150), |revision| Some(revision <= Revision(5)));
        assert_eq!((lag.took.count(), lag.pending.len()), (1, 1));
        lag.settle(at(5_000), |revision| Some(revision <= Revision(9)));
        assert!(lag.is_settled());
        let mut out = String::new();
        lag.took.render(&mut out, "s", "");
        assert!(out.contains("s_bucket{le=\"0.1\"} 0\ns_bucket{le=\"0.2\"} 1\n"), "{out}");
        assert!(out.contains("s_bucket{le=\"2.5\"} 1\ns_bucket{le=\"5\"} 2\n"), "{out}");
    }

    #[test]
    fn without_anybody_to_wait_for_nothing_is_measured() {
        let mut lag = Lag::default();
        lag.published(Revision(5), Instant::now());
        lag.settle(Instant::now(), |_| None);
        assert!(lag.is_settled());
        assert_eq!(lag.took.count(), 0);
    }

    #[test]
    fn what_is_waited_for_is_bounded() {
        let mut lag = Lag::default();
        for revision in 0..MAX_PENDING as u64 + 10 {
            lag.published(Revision(revision), Instant::now());
        }
        assert_eq!(lag.pending.len(), MAX_PENDING);
        lag.settle(Instant::now(), |_| Some(true));
        assert_eq!(lag.took.count(), MAX_PENDING as u64);
    }
}
