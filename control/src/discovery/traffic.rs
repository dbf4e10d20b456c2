//! Sums of what the sidecars count, per route and backend: PURE. Reports are cumulative since the reporter's start; its
//! epoch names that start, so a restart neither loses nor doubles anything, and a reporter that is gone keeps its part.

use sluice_model::Name;
use sluice_wire::v1;
use std::collections::{BTreeMap, HashMap};

/// Series (reporter, its start, route, backend) whose last counts are remembered; further ones are not counted.
const MAX_SERIES: usize = 100_000;

#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    pub route: String,
    pub backend: String,
    pub requests: u64,
    pub failures: u64,
    pub connections: u64,
    pub latency_us_sum: u64,
}

type Pair = (Name, Name);

pub struct Traffic {
    max_series: usize,
    sums: BTreeMap<Pair, Row>,
    /// Last report of each (reporter, its epoch, route, backend).
    last: HashMap<(String, String, Pair), v1::RouteCounters>,
}

impl Default for Traffic {
    fn default() -> Self {
        Self { max_series: MAX_SERIES, sums: BTreeMap::new(), last: HashMap::new() }
    }
}

impl Traffic {
    pub fn take(&mut self, report: &v1::Metrics) {
        for c in &report.routes {
            let pair = (name(&c.route), name(&c.backend));
            let reporter = c.reporter.clone().map(|r| r.uid).unwrap_or_default();
            let series = (reporter, report.epoch.clone(), pair.clone());
            let before = self.last.get(&series);
            // A series without its last report would be added whole each time: rather not counted than counted twice.
            if before.is_none() && self.last.len() >= self.max_series {
                continue;
            }
            let grown = |f: fn(&v1::RouteCounters) -> u64| f(c).saturating_sub(before.map_or(0, f));
            let row = self.sums.entry(pair.clone()).or_insert_with(|| Row {
                route: pair.0.to_string(),
                backend: pair.1.to_string(),
                ..Row::default()
            });
            row.requests += grown(|c| c.requests);
            row.failures += grown(|c| c.failures);
            row.connections += grown(|c| c.connections);
            row.latency_us_sum += grown(|c| c.latency_us_sum);
            self.last.insert(series, c.clone());
        }
    }

    pub fn rows(&self) -> Vec<Row> {
        self.sums.values().cloned().collect()
    }
}

fn name(n: &Option<v1::Name>) -> Name {
    n.clone().map(Into::into).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(epoch: &str, pod: &str, requests: u64) -> v1::Metrics {
        let n = |name: &str| Some(v1::Name { namespace: "ns".into(), name: name.into() });
        let reporter = Some(v1::WorkloadRef { uid: pod.into(), ..v1::WorkloadRef::default() });
        let c =
            v1::RouteCounters { route: n("r"), backend: n("v1"), requests, reporter, ..v1::RouteCounters::default() };
        v1::Metrics { epoch: epoch.into(), routes: vec![c] }
    }

    #[test]
    fn nothing_is_lost_or_doubled_by_repeats_and_restarts() {
        let mut t = Traffic::default();
        for (epoch, pod, requests, sum) in [
            ("1", "a", 10, 10),
            ("1", "a", 10, 10),
            ("1", "a", 15, 15),
            ("2", "a", 3, 18),
            ("1", "b", 7, 25),
            ("2", "a", 4, 26),
        ] {
            t.take(&report(epoch, pod, requests));
            assert_eq!(t.rows()[0].requests, sum);
        }
    }

    #[test]
    fn beyond_the_bound_nothing_is_counted_twice() {
        let mut t = Traffic { max_series: 1, ..Traffic::default() };
        for (pod, requests) in [("a", 10), ("b", 7), ("b", 7), ("a", 12), ("b", 9)] {
            t.take(&report("1", pod, requests));
        }
        assert_eq!(t.rows()[0].requests, 12);
    }
}
