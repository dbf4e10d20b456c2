//! Counters: plain fields per worker beside the code that moves them, handed out as snapshots, merged and printed on
//! scrape (Prometheus text) and for the discovery stream. Labels are closed: direction, route, backend, port, reason.

use crate::reason::Reason;
use sluice_model::Name;
use sluice_wire::{LATENCY_BUCKETS_US, v1};
use std::{cell::Cell, collections::BTreeMap, fmt::Write, time::Duration};

const BUCKETS: usize = LATENCY_BUCKETS_US.len() + 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Inbound,
    Outbound,
}

impl Direction {
    pub fn label(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// What one series counts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeriesKey {
    pub direction: Direction,
    /// Absent: traffic that no route touched.
    pub route: Option<Name>,
    /// The service that takes the request; inbound: this workload.
    pub backend: Name,
    pub port: u16,
}

/// Counters of one series in one worker. Looked up once per route and backend, then only added to.
#[derive(Debug, Default)]
pub struct Series {
    pub requests: Cell<u64>,
    pub in_flight: Cell<u64>,
    /// Answers by first digit of the status; 0: no answer came.
    answers: [Cell<u64>; 6],
    latency_us_sum: Cell<u64>,
    buckets: [Cell<u64>; BUCKETS],
    pub connections: Cell<u64>,
    pub open_connections: Cell<u64>,
}

pub fn add(cell: &Cell<u64>, n: u64) {
    cell.set(cell.get() + n);
}

impl Series {
    /// A request ended: with this status, or without an answer.
    pub fn answered(&self, status: Option<u16>, latency: Duration) {
        let class = status.map_or(0, |s| usize::from(s / 100).min(5));
        add(&self.answers[class], 1);
        let us = latency.as_micros() as u64;
        add(&self.latency_us_sum, us);
        let bucket = LATENCY_BUCKETS_US.partition_point(|upper| *upper < us);
        add(&self.buckets[bucket], 1);
    }

    pub fn totals(&self) -> Totals {
        Totals {
            requests: self.requests.get(),
            in_flight: self.in_flight.get(),
            answers: std::array::from_fn(|i| self.answers[i].get()),
            latency_us_sum: self.latency_us_sum.get(),
            buckets: std::array::from_fn(|i| self.buckets[i].get()),
            connections: self.connections.get(),
            open_connections: self.open_connections.get(),
        }
    }
}

/// A series as values, summed over workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub requests: u64,
    pub in_flight: u64,
    pub answers: [u64; 6],
    pub latency_us_sum: u64,
    pub buckets: [u64; BUCKETS],
    pub connections: u64,
    pub open_connections: u64,
}

impl Totals {
    fn add(&mut self, o: &Totals) {
        self.requests += o.requests;
        self.in_flight += o.in_flight;
        self.latency_us_sum += o.latency_us_sum;
        self.connections += o.connections;
        self.open_connections += o.open_connections;
        self.answers.iter_mut().zip(o.answers).for_each(|(a, b)| *a += b);
        self.buckets.iter_mut().zip(o.buckets).for_each(|(a, b)| *a += b);
    }

    /// 5xx or no answer.
    fn failures(&self) -> u64 {
        self.answers[0] + self.answers[5]
    }

    fn answered(&self) -> u64 {
        self.answers.iter().sum()
    }
}

/// A worker's counters that belong to no route.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    /// Answers and refusals of our own making, by reason.
    pub refused: [Cell<u64>; Reason::COUNT],
    /// Requests sent again, and connects tried at another endpoint.
    pub retries: Cell<u64>,
    /// Requests sent to a second endpoint because the first took its time.
    pub hedged: Cell<u64>,
    /// Endpoints taken out for a while.
    pub ejections: Cell<u64>,
    /// Copies of requests sent to mirrors.
    pub mirrored: Cell<u64>,
    /// Calls that a policy on trial would have denied.
    pub audited: Cell<u64>,
    pub upstream_connects: Cell<u64>,
    pub open_inbound: Cell<u64>,
    pub open_outbound: Cell<u64>,
    /// Of the open ones, those that hold no buffers.
    pub idle: Cell<u64>,
}

impl WorkerCounters {
    pub fn audit(&self) {
        add(&self.audited, 1);
    }

    pub fn refuse(&self, reason: Reason) {
        add(&self.refused[reason as usize], 1);
    }
}

/// All counters of a worker, or of all of them together.
#[derive(Clone, Debug, Default)]
pub struct Scrape {
    pub series: BTreeMap<SeriesKey, Totals>,
    pub refused: [u64; Reason::COUNT],
    pub retries: u64,
    pub hedged: u64,
    pub ejections: u64,
    pub mirrored: u64,
    pub audited: u64,
    pub upstream_connects: u64,
    pub open_inbound: u64,
    pub open_outbound: u64,
    pub idle: u64,
}

impl Scrape {
    pub fn new(counters: &WorkerCounters, series: BTreeMap<SeriesKey, Totals>) -> Self {
        Self {
            series,
            refused: std::array::from_fn(|i| counters.refused[i].get()),
            retries: counters.retries.get(),
            hedged: counters.hedged.get(),
            ejections: counters.ejections.get(),
            mirrored: counters.mirrored.get(),
            audited: counters.audited.get(),
            upstream_connects: counters.upstream_connects.get(),
            open_inbound: counters.open_inbound.get(),
            open_outbound: counters.open_outbound.get(),
            idle: counters.idle.get(),
        }
    }

    pub fn merge(&mut self, other: Scrape) {
        for (key, totals) in &other.series {
            self.series.entry(key.clone()).or_default().add(totals);
        }
        self.refused.iter_mut().zip(other.refused).for_each(|(a, b)| *a += b);
        self.retries += other.retries;
        self.hedged += other.hedged;
        self.ejections += other.ejections;
        self.mirrored += other.mirrored;
        self.audited += other.audited;
        self.upstream_connects += other.upstream_connects;
        self.open_inbound += other.open_inbound;
        self.open_outbound += other.open_outbound;
        self.idle += other.idle;
    }

    /// What goes up the discovery stream: what this workload sent, per route and backend.
    pub fn to_wire(&self, epoch: &str) -> v1::Metrics {
        let outbound = self.series.iter().filter(|(k, _)| k.direction == Direction::Outbound);
        let mut sums: BTreeMap<(Option<Name>, Name), Totals> = BTreeMap::new();
        for (key, totals) in outbound {
            sums.entry((key.route.clone(), key.backend.clone())).or_default().add(totals);
        }
        let counters = |((route, backend), t): (&(Option<Name>, Name), &Totals)| v1::RouteCounters {
            route: Some(route.as_ref().map(Into::into).unwrap_or_default()),
            backend: Some(backend.into()),
            requests: t.requests,
            failures: t.failures(),
            latency_us_sum: t.latency_us_sum,
            latency_buckets: t.buckets.to_vec(),
            connections: t.connections,
            reporter: None,
        };
        v1::Metrics { epoch: epoch.to_owned(), routes: sums.iter().map(counters).collect() }
    }

    /// Prometheus' text format 0.0.4.
    pub fn to_text(&self) -> String {
        let mut out = String::with_capacity(4096);
        self.text_of_series(&mut out);
        let _ = writeln!(out, "# TYPE sluice_refused_total counter");
        for (reason, n) in Reason::ALL.iter().zip(self.refused) {
            let _ = writeln!(out, "sluice_refused_total{{reason=\"{}\"}} {n}", reason.label());
        }
        for (name, kind, n) in [
            ("sluice_retries_total", "counter", self.retries),
            ("sluice_hedged_total", "counter", self.hedged),
            ("sluice_ejections_total", "counter", self.ejections),
            ("sluice_mirrored_total", "counter", self.mirrored),
            ("sluice_audit_denied_total", "counter", self.audited),
            ("sluice_upstream_connects_total", "counter", self.upstream_connects),
            ("sluice_open_inbound_connections", "gauge", self.open_inbound),
            ("sluice_open_outbound_connections", "gauge", self.open_outbound),
            ("sluice_idle_connections", "gauge", self.idle),
        ] {
            let _ = writeln!(out, "# TYPE {name} {kind}\n{name} {n}");
        }
        out
    }

    fn text_of_series(&self, out: &mut String) {
        let labelled: Vec<(String, &Totals)> = self.series.iter().map(|(k, t)| (labels(k), t)).collect();
        let mut family = |name: &str, kind: &str, value: &dyn Fn(&Totals) -> u64| {
            let _ = writeln!(out, "# TYPE {name} {kind}");
            for (labels, totals) in &labelled {
                let _ = writeln!(out, "{name}{{{labels}}} {}", value(totals));
            }
        };
        family("request_total", "counter", &|t| t.requests);
        family("requests_in_flight", "gauge", &|t| t.in_flight);
        family("tcp_open_total", "counter", &|t| t.connections);
        family("tcp_open_connections", "gauge", &|t| t.open_connections);
        let _ = writeln!(out, "# TYPE response_total counter");
        for (labels, t) in &labelled {
            for (class, n) in t.answers.iter().enumerate() {
                let outcome = if class == 0 || class == 5 { "failure" } else { "success" };
                let status = if class == 0 { "none".to_owned() } else { format!("{class}xx") };
                let _ = writeln!(
                    out,
                    "response_total{{{labels},classification=\"{outcome}\",status_class=\"{status}\"}} {n}"
                );
            }
        }
        let _ = writeln!(out, "# TYPE response_latency_ms histogram");
        for (labels, t) in &labelled {
            text_of_latency(out, labels, t);
        }
    }
}

fn text_of_latency(out: &mut String, labels: &str, t: &Totals) {
    let mut below = 0;
    for (i, n) in t.buckets.iter().enumerate() {
        below += n;
        let upper = LATENCY_BUCKETS_US.get(i).map_or("+Inf".to_owned(), |us| (*us as f64 / 1000.0).to_string());
        let _ = writeln!(out, "response_latency_ms_bucket{{{labels},le=\"{upper}\"}} {below}");
    }
    let _ = writeln!(out, "response_latency_ms_sum{{{labels}}} {}", t.latency_us_sum as f64 / 1000.0);
    let _ = writeln!(out, "response_latency_ms_count{{{labels}}} {}", t.answered());
}

/// Names are DNS labels, so nothing in them needs quoting.
fn labels(k: &SeriesKey) -> String {
    let route = k.route.as_ref().map(Name::to_string).unwrap_or_default();
    format!("direction=\"{}\",route=\"{route}\",backend=\"{}\",port=\"{}\"", k.direction.label(), k.backend, k.port)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(direction: Direction) -> SeriesKey {
        SeriesKey { direction, route: Some(Name::new("a", "r")), backend: Name::new("a", "b"), port: 80 }
    }

    fn scrape() -> Scrape {
        let series = Series::default();
        add(&series.requests, 3);
        series.answered(Some(200), Duration::from_micros(250));
        series.answered(Some(503), Duration::from_micros(251));
        series.answered(None, Duration::from_secs(60));
        let both = [Direction::Inbound, Direction::Outbound].map(|d| (key(d), series.totals()));
        Scrape { series: both.into_iter().collect(), ..Scrape::default() }
    }

    #[test]
    fn workers_sum_up() {
        let mut sum = scrape();
        sum.merge(scrape());
        let wire = sum.to_wire("e");
        assert_eq!(wire.routes.len(), 1, "inbound is reported by the other side");
        let r = &wire.routes[0];
        assert_eq!((r.requests, r.failures), (6, 4));
        assert_eq!((r.latency_buckets[0], r.latency_buckets[1], r.latency_buckets[BUCKETS - 1]), (2, 2, 2));
    }

    #[test]
    fn text_names_what_dashboards_know() {
        let text = scrape().to_text();
        for line in [
            "request_total{direction=\"outbound\",route=\"a/r\",backend=\"a/b\",port=\"80\"} 3",
            "classification=\"failure\",status_class=\"5xx\"} 1",
            "response_latency_ms_bucket{direction=\"inbound\",route=\"a/r\",backend=\"a/b\",port=\"80\",le=\"0.5\"} 2",
            "response_latency_ms_count{direction=\"inbound\",route=\"a/r\",backend=\"a/b\",port=\"80\"} 3",
        ] {
            assert!(text.contains(line), "{line} not in\n{text}");
        }
    }
}
