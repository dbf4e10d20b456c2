//! What the API counts, and the text of `/metrics`: its own requests, the store, and what other parts add (`extra`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::kinds;
use super::registry::Registry;
use super::status::ApiError;
use crate::histogram::{Histogram, head};

/// Upper bounds of a request's duration, in seconds.
const BUCKETS_S: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];

/// Requests by verb, resource and code. All three are closed sets, so the map is bounded.
#[derive(Debug, Default)]
pub struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, &'static str, u16), Histogram>>,
}

impl Metrics {
    /// Counts a finished request.
    pub fn observe(&self, verb: &'static str, resource: &'static str, code: u16, took: Duration) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.entry((verb, resource, code)).or_insert_with(|| Histogram::new(BUCKETS_S)).observe(took);
    }

    fn render(&self, out: &mut String) {
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let labels = |(verb, resource, code): &(&str, &str, u16)| {
            format!("verb=\"{verb}\",resource=\"{resource}\",code=\"{code}\"")
        };
        head(out, "sluice_api_requests_total", "counter", "Requests answered.");
        for (series, histogram) in requests.iter() {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "sluice_api_requests_total{{{}}} {}", labels(series), histogram.count());
        }
        let name = "sluice_api_request_duration_seconds";
        head(out, name, "histogram", "Time from a request's head to its answer's head.");
        for (series, histogram) in requests.iter() {
            histogram.render(out, name, &labels(series));
        }
    }
}

/// All of it as text.
pub async fn text(metrics: &Metrics, registry: &Registry) -> Result<String, ApiError> {
    let mut out = String::new();
    metrics.render(&mut out);
    store(&mut out, registry);
    objects(&mut out, registry).await?;
    Ok(out)
}

fn store(out: &mut String, registry: &Registry) {
    let counters = registry.store().counters();
    let gauges = [
        ("sluice_store_revision", "Revision of the last change.", registry.store().revision()),
        ("sluice_store_watches", "Running watches, the service's own included.", counters.watches),
    ];
    for (name, help, value) in gauges {
        head(out, name, "gauge", help);
        let _ = writeln!(out, "{name} {value}");
    }
    let name = "sluice_store_commit_duration_seconds";
    head(out, name, "histogram", "Time to apply a group of transactions and sync it to the disk.");
    counters.commits.render(out, name, "");
}

/// Counted in the store at each scrape: a scan of the keys, which is milliseconds per ten thousand objects.
async fn objects(out: &mut String, registry: &Registry) -> Result<(), ApiError> {
    head(out, "sluice_objects", "gauge", "Objects stored.");
    for kind in kinds::table().kinds.iter().filter(|kind| kind.stored_as.is_none()) {
        let _ = writeln!(out, "sluice_objects{{resource=\"{}\"}} {}", kind.resource(), registry.count(kind).await?);
    }
    Ok(())
}
