//! PURE: one stream out of those of many nodes, in the order of the records' times. A record waits for a moment for older
//! ones of slower nodes; what comes later than that is printed when it comes.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

/// How long a record waits for others. Clocks of nodes that differ by more show their flows in another order.
pub const WINDOW: Duration = Duration::from_millis(300);
/// Most records that wait; the oldest go on at once then.
pub const MOST: usize = 10_000;

/// A record's time, and among equals its arrival.
type Key = (Arc<str>, u64);

/// Records that wait.
#[derive(Debug)]
pub struct Merge<T> {
    waiting: BTreeMap<Key, T>,
    /// When each has waited for long enough, in the order of arrival; those that went before others' turn are still here.
    arrivals: VecDeque<(Instant, Key)>,
    arrived: u64,
}

impl<T> Default for Merge<T> {
    fn default() -> Self {
        Self { waiting: BTreeMap::new(), arrivals: VecDeque::new(), arrived: 0 }
    }
}

impl<T> Merge<T> {
    /// Takes a record that came at `now`.
    pub fn push(&mut self, time: &str, now: Instant, record: T) {
        self.arrived += 1;
        let key: Key = (time.into(), self.arrived);
        self.arrivals.push_back((now + WINDOW, key.clone()));
        self.waiting.insert(key, record);
    }

    /// The next, if any has waited for long enough or must make room: then those before it by their times go first.
    pub fn pop(&mut self, now: Instant) -> Option<T> {
        let due = self.due().is_some_and(|due| due <= now);
        if due || self.waiting.len() > MOST { self.pop_any() } else { None }
    }

    /// The next, whether it has waited or not.
    pub fn pop_any(&mut self) -> Option<T> {
        self.waiting.pop_first().map(|(_, record)| record)
    }

    /// When to ask again.
    pub fn due(&mut self) -> Option<Instant> {
        while self.arrivals.front().is_some_and(|(_, key)| !self.waiting.contains_key(key)) {
            self.arrivals.pop_front();
        }
        self.arrivals.front().map(|(due, _)| *due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(merge: &mut Merge<&'static str>, now: Instant) -> Vec<&'static str> {
        std::iter::from_fn(|| merge.pop(now)).collect()
    }

    #[test]
    fn records_come_out_in_the_order_of_their_times() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut merge = Merge::default();
        merge.push("12:00:02", at(0), "b");
        merge.push("12:00:01", at(100), "a, of a slower node");
        merge.push("12:00:02", at(110), "b, another");
        merge.push("12:00:03", at(120), "c");
        assert_eq!(drain(&mut merge, at(299)), [""; 0]);
        assert_eq!(merge.due(), Some(at(300)));
        assert_eq!(drain(&mut merge, at(300)), ["a, of a slower node", "b"]);
        assert_eq!(merge.due(), Some(at(410)));
        merge.push("12:00:00", at(400), "too late");
        assert_eq!(drain(&mut merge, at(420)), ["too late", "b, another", "c"]);
        assert_eq!(merge.due(), None);
    }

    #[test]
    fn a_clock_that_is_behind_delays_nobody() {
        let start = Instant::now();
        let mut merge = Merge::default();
        merge.push("12:00:09", start, "right");
        for ms in 0..10 {
            merge.push("12:00:00", start + Duration::from_millis(ms * 30), "behind");
        }
        let out = drain(&mut merge, start + WINDOW);
        assert_eq!(out.last(), Some(&"right"));
    }

    #[test]
    fn what_waits_is_bounded() {
        let start = Instant::now();
        let mut merge = Merge::default();
        for _ in 0..MOST + 3 {
            merge.push("12:00:00", start, "x");
        }
        assert_eq!(drain(&mut merge, start).len(), 3);
        assert_eq!(std::iter::from_fn(|| merge.pop_any()).count(), MOST);
    }
}
