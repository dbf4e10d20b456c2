//! The two API versions of events hold the same in other words; they are stored as core/v1.
//!
//! PURE.

use serde_json::{Value, json};

const RENAMED: &[(&str, &str)] = &[
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

/// events.k8s.io/v1 → v1.
pub fn to_core(event: &Value) -> Value {
    renamed(event, "v1", |name| RENAMED.iter().find(|(_, new)| *new == name).map(|(core, _)| *core))
}

/// v1 → events.k8s.io/v1.
pub fn from_core(event: &Value) -> Value {
    renamed(event, "events.k8s.io/v1", |name| RENAMED.iter().find(|(core, _)| *core == name).map(|(_, new)| *new))
}

fn renamed(event: &Value, api_version: &str, rename: impl Fn(&str) -> Option<&'static str>) -> Value {
    let fields = event.as_object().into_iter().flatten();
    let mut out: Value = fields.map(|(name, value)| (rename(name).unwrap_or(name).to_owned(), value.clone())).collect();
    out["apiVersion"] = json!(api_version);
    out
}
