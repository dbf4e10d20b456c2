//! The sidecars' counters as one cumulative report: a sidecar that restarts begins at zero, the report does not. PURE.

use sluice_wire::v1::{Metrics, Name, RouteCounters, WorkloadRef};
use std::collections::BTreeMap;

/// Most routes × backends of one sidecar; more are not counted upwards.
const MAX_ROWS: usize = 4096;

#[derive(Debug)]
pub struct Totals {
    epoch: String,
    reporters: BTreeMap<String, Reporter>,
}

#[derive(Debug, Default)]
struct Reporter {
    workload: WorkloadRef,
    epoch: String,
    /// Of the runs before this one.
    before: Rows,
    now: Rows,
}

/// By route and backend, as `namespace/name` pairs.
type Rows = BTreeMap<[String; 4], RouteCounters>;

impl Totals {
    /// `epoch` names the agent's own start.
    pub fn new(epoch: String) -> Self {
        Self { epoch, reporters: BTreeMap::new() }
    }

    /// A report of the sidecar of `workload`.
    pub fn take(&mut self, workload: &WorkloadRef, metrics: Metrics) {
        let reporter = self.reporters.entry(workload.uid.clone()).or_default();
        reporter.workload = workload.clone();
        if reporter.epoch != metrics.epoch {
            reporter.epoch = metrics.epoch;
            let ended = std::mem::take(&mut reporter.now);
            ended.into_iter().for_each(|(key, row)| add(&mut reporter.before, key, &row));
        }
        for row in metrics.routes {
            let key = key(&row);
            if reporter.now.len() < MAX_ROWS || reporter.now.contains_key(&key) {
                // A row that the sidecar no longer lists keeps its last value.
                reporter.now.insert(key, row);
            }
        }
    }

    pub fn forget(&mut self, uid: &str) {
        self.reporters.remove(uid);
    }

    pub fn report(&self) -> Metrics {
        let mut routes = Vec::new();
        for reporter in self.reporters.values() {
            let mut rows = reporter.before.clone();
            reporter.now.iter().for_each(|(key, row)| add(&mut rows, key.clone(), row));
            let tagged = |row| RouteCounters { reporter: Some(reporter.workload.clone()), ..row };
            routes.extend(rows.into_values().map(tagged));
        }
        Metrics { epoch: self.epoch.clone(), routes }
    }
}

fn key(row: &RouteCounters) -> [String; 4] {
    let parts = |n: &Option<Name>| n.clone().map_or_else(Default::default, |n| (n.namespace, n.name));
    let ((a, b), (c, d)) = (parts(&row.route), parts(&row.backend));
    [a, b, c, d]
}

fn add(rows: &mut Rows, key: [String; 4], row: &RouteCounters) {
    let sum = rows.entry(key).or_insert_with(|| RouteCounters {
        route: row.route.clone(),
        backend: row.backend.clone(),
        ..RouteCounters::default()
    });
    // Counters of a confused sidecar must not stop the agent.
    let plus = |a: &mut u64, b: u64| *a = a.saturating_add(b);
    plus(&mut sum.requests, row.requests);
    plus(&mut sum.failures, row.failures);
    plus(&mut sum.latency_us_sum, row.latency_us_sum);
    plus(&mut sum.connections, row.connections);
    let buckets = sluice_wire::LATENCY_BUCKETS_US.len() + 1;
    sum.latency_buckets.resize(buckets, 0);
    sum.latency_buckets.iter_mut().zip(&row.latency_buckets).for_each(|(a, b)| plus(a, *b));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(epoch: &str, requests: u64) -> Metrics {
        let backend = Some(Name { namespace: "a".into(), name: "b".into() });
        let row = RouteCounters { backend, requests, latency_buckets: vec![requests], ..RouteCounters::default() };
        Metrics { epoch: epoch.into(), routes: vec![row] }
    }

    #[test]
    fn restarts_lose_and_double_nothing() {
        let w = WorkloadRef { uid: "u".into(), ..WorkloadRef::default() };
        let mut t = Totals::new("agent".into());
        for (epoch, requests, expected) in [("1", 5, 5), ("1", 7, 7), ("1", 7, 7), ("2", 1, 8), ("2", 4, 11)] {
            t.take(&w, metrics(epoch, requests));
            let report = t.report();
            assert_eq!(report.routes[0].requests, expected, "after {epoch} {requests}");
            assert_eq!(report.routes[0].latency_buckets[0], expected);
            assert_eq!(report.routes[0].reporter.as_ref().map(|r| r.uid.as_str()), Some("u"));
        }
        t.forget("u");
        assert!(t.report().routes.is_empty());
    }
}
