//! What a load run found: latencies, answers per version, failures by kind with the numbers of their requests. PURE.

use serde::Serialize;
use std::collections::BTreeMap;

/// Most request numbers listed per kind of failure; the count goes on.
const MAX_NUMBERS: usize = 100;
/// Most kinds of failure and most versions told apart; the rest is "other".
const MAX_KINDS: usize = 64;

#[derive(Debug, Default, Serialize)]
pub struct Failure {
    pub count: u64,
    pub numbers: Vec<u64>,
}

#[derive(Debug, Default)]
pub struct Report {
    sent: u64,
    ok: u64,
    failed: u64,
    latencies: Histogram,
    versions: BTreeMap<String, u64>,
    failures: BTreeMap<String, Failure>,
}

/// The one line at the end of a run (and, without the latencies' tail, of each interval).
#[derive(Debug, Serialize)]
pub struct Summary<'a> {
    pub sent: u64,
    pub ok: u64,
    pub failed: u64,
    pub mean_ms: f64,
    pub p50_ms: f64,
    pub p90_ms: f64,
    pub p99_ms: f64,
    pub p999_ms: f64,
    pub max_ms: f64,
    pub versions: &'a BTreeMap<String, u64>,
    pub failures: &'a BTreeMap<String, Failure>,
}

impl Report {
    pub fn sent(&mut self) {
        self.sent += 1;
    }

    pub fn answered(&mut self, version: &str, latency_us: u64) {
        self.ok += 1;
        self.latencies.add(latency_us);
        *slot(&mut self.versions, version) += 1;
    }

    pub fn failed(&mut self, number: u64, kind: &str) {
        self.failed += 1;
        let failure = slot(&mut self.failures, kind);
        failure.count += 1;
        if failure.numbers.len() < MAX_NUMBERS {
            failure.numbers.push(number);
        }
    }

    pub fn finished(&self) -> u64 {
        self.ok + self.failed
    }

    pub fn summary(&self) -> Summary<'_> {
        let ms = |q| self.latencies.quantile(q) as f64 / 1000.0;
        Summary {
            sent: self.sent,
            ok: self.ok,
            failed: self.failed,
            mean_ms: self.latencies.mean() / 1000.0,
            p50_ms: ms(0.5),
            p90_ms: ms(0.9),
            p99_ms: ms(0.99),
            p999_ms: ms(0.999),
            max_ms: self.latencies.max as f64 / 1000.0,
            versions: &self.versions,
            failures: &self.failures,
        }
    }
}

fn slot<'a, T: Default>(map: &'a mut BTreeMap<String, T>, key: &str) -> &'a mut T {
    let key = if map.len() < MAX_KINDS || map.contains_key(key) { key } else { "other" };
    if !map.contains_key(key) {
        map.insert(key.to_owned(), T::default());
    }
    map.get_mut(key).expect("inserted above")
}

/// Buckets of at most 1.6 % width: 64 per power of two, from 1 µs to over an hour.
#[derive(Debug)]
struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum: u64,
    max: u64,
}

const SUB: u32 = 6;

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: vec![0; 32 << SUB], count: 0, sum: 0, max: 0 }
    }
}

impl Histogram {
    fn add(&mut self, v: u64) {
        let last = self.buckets.len() - 1;
        self.buckets[index(v).min(last)] += 1;
        self.count += 1;
        self.sum += v;
        self.max = self.max.max(v);
    }

    fn mean(&self) -> f64 {
        self.sum as f64 / self.count.max(1) as f64
    }

    fn quantile(&self, q: f64) -> u64 {
        let rank = (q * self.count as f64).ceil() as u64;
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank && *n > 0 {
                return upper(i).min(self.max);
            }
        }
        self.max
    }
}

fn index(v: u64) -> usize {
    let shift = (63 - v.max(1).leading_zeros()).saturating_sub(SUB);
    ((shift as usize) << SUB) + (v >> shift) as usize
}

/// The largest value of bucket `i`.
fn upper(i: usize) -> u64 {
    let i = i as u64;
    if i < 2 << SUB {
        return i;
    }
    let shift = (i >> SUB) - 1;
    (((i - (shift << SUB)) + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_close() {
        let mut h = Histogram::default();
        (1..=100_000).for_each(|v| h.add(v));
        for (q, exact) in [(0.5, 50_000.0), (0.99, 99_000.0), (0.999, 99_900.0)] {
            let got = h.quantile(q) as f64;
            assert!((got - exact).abs() / exact < 0.02, "{q}: {got}");
        }
        assert_eq!((h.quantile(1.0), h.max), (100_000, 100_000));
        (0..1 << 20).for_each(|v| assert!(upper(index(v)) >= v && (index(v) == 0 || upper(index(v) - 1) < v)));
    }

    #[test]
    fn failures_name_their_requests() {
        let mut r = Report::default();
        r.answered("v1", 10);
        r.failed(7, "timeout");
        let s = serde_json::to_value(r.summary()).expect("serializes");
        assert_eq!(s["failures"]["timeout"]["numbers"][0], 7);
        assert_eq!(s["versions"]["v1"], 1);
    }
}
