//! Sums of what the sidecars count, per route and backend: PURE. Reports are cumulative since the reporter's start; its
//! epoch names that start, so a restart neither loses nor doubles anything, and a reporter that is gone keeps its part
//! in the sums. What an agent no longer reports is forgotten: its reports are always whole.

use sluice_model::Name;
use sluice_wire::{traffic::Row, v1};
use std::collections::{BTreeMap, HashMap};

/// Series (reporter, its start, route, backend) whose last counts are remembered; further ones are not counted.
const MAX_SERIES: usize = 100_000;

type Pair = (Name, Name);

pub struct Traffic {
    max_series: usize,
    sums: BTreeMap<Pair, Row>,
    /// Of each agent: the epoch of its last report, and what that said of each (reporter, route, backend).
    last: HashMap<String, Agent>,
}

#[derive(Default)]
struct Agent {
    epoch: String,
    series: HashMap<(String, Pair), v1::RouteCounters>,
}

impl Default for Traffic {
    fn default() -> Self {
        Self { max_series: MAX_SERIES, sums: BTreeMap::new(), last: HashMap::new() }
    }
}

impl Traffic {
    /// Takes the report of a node's agent.
    pub fn take(&mut self, node: &str, report: &v1::Metrics) {
        let others: usize = self.last.iter().filter(|(n, _)| *n != node).map(|(_, a)| a.series.len()).sum();
        let mut old = self.last.remove(node).filter(|a| a.epoch == report.epoch).unwrap_or_default();
        let mut series = HashMap::with_capacity(report.routes.len());
        for c in &report.routes {
            let pair = (name(&c.route), name(&c.backend));
            let reporter = c.reporter.clone().map(|r| r.uid).unwrap_or_default();
            let before = old.series.remove(&(reporter.clone(), pair.clone()));
            // A series without its last report would be added whole each time: rather not counted than counted twice.
            if before.is_none() && others + series.len() + old.series.len() >= self.max_series {
                continue;
            }
            let before = before.as_ref();
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
            series.insert((reporter, pair), c.clone());
        }
        self.last.insert(node.to_owned(), Agent { epoch: report.epoch.clone(), series });
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
            ("2", "b", 7, 25),
            ("2", "b", 8, 26),
        ] {
            t.take("n", &report(epoch, pod, requests));
            assert_eq!(t.rows()[0].requests, sum);
        }
    }

    #[test]
    fn beyond_the_bound_nothing_is_counted_twice() {
        let mut t = Traffic { max_series: 1, ..Traffic::default() };
        for (node, pod, requests) in [("n", "a", 10), ("m", "b", 7), ("m", "b", 7), ("n", "a", 12), ("m", "b", 9)] {
            t.take(node, &report("1", pod, requests));
        }
        assert_eq!(t.rows()[0].requests, 12);
    }

    #[test]
    fn pods_that_go_make_room_for_those_that_come() {
        let mut t = Traffic { max_series: 2, ..Traffic::default() };
        for i in 0..10 {
            t.take("n", &report("1", &format!("pod-{i}"), 1));
        }
        assert_eq!(t.rows()[0].requests, 10);
    }
}
