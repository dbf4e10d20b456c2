//! Durations counted into buckets, and their text for Prometheus. PURE: the caller measures.

use std::fmt::Write as _;
use std::time::Duration;

/// A histogram with fixed buckets.
#[derive(Debug, Clone)]
pub struct Histogram {
    bounds_s: &'static [f64],
    buckets: Vec<u64>,
    count: u64,
    sum_s: f64,
}

impl Histogram {
    /// An empty one; `bounds_s` are the upper bounds of its buckets in seconds, rising. What is longer than the last one
    /// is counted in `+Inf` alone.
    pub fn new(bounds_s: &'static [f64]) -> Self {
        Histogram { bounds_s, buckets: vec![0; bounds_s.len()], count: 0, sum_s: 0.0 }
    }

    /// Counts one duration.
    pub fn observe(&mut self, took: Duration) {
        let took_s = took.as_secs_f64();
        self.count += 1;
        self.sum_s += took_s;
        for (bucket, bound) in self.buckets.iter_mut().zip(self.bounds_s) {
            *bucket += u64::from(took_s <= *bound);
        }
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Appends its lines. `labels` are `a="b",c="d"`, or empty.
    pub fn render(&self, out: &mut String, name: &str, labels: &str) {
        let comma = if labels.is_empty() { "" } else { "," };
        let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        // Writing to a String cannot fail.
        for (count, bound) in self.buckets.iter().zip(self.bounds_s) {
            let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {count}");
        }
        let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {}", self.count);
        let _ = writeln!(out, "{name}_sum{braces} {}\n{name}_count{braces} {}", self.sum_s, self.count);
    }
}

/// The lines that stand before a metric's first series. `kind` is `counter`, `gauge` or `histogram`.
pub fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_the_last_takes_the_rest() {
        let mut histogram = Histogram::new(&[0.001, 0.5]);
        for ms in [1, 2, 500, 501] {
            histogram.observe(Duration::from_millis(ms));
        }
        let mut out = String::new();
        histogram.render(&mut out, "a_seconds", "");
        let want = "a_seconds_bucket{le=\"0.001\"} 1\na_seconds_bucket{le=\"0.5\"} 3\na_seconds_bucket{le=\"+Inf\"} 4\n\
                    a_seconds_sum 1.004\na_seconds_count 4\n";
        assert_eq!(out, want);
        let mut out = String::new();
        histogram.render(&mut out, "a_seconds", "k=\"v\"");
        assert!(out.starts_with("a_seconds_bucket{k=\"v\",le=\"0.001\"} 1\n"), "{out}");
        assert!(out.ends_with("a_seconds_count{k=\"v\"} 4\n"), "{out}");
    }
}
