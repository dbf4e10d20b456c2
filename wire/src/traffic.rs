//! What the sidecars counted, as control serves it to operators' programs (JSON, on the API's port).

/// Where control serves the rows.
pub const PATH: &str = "/apis/traffic.sluice.dev/v1alpha1/routes";

/// Sums of one route and backend since control's start, each named `namespace/name`.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    pub route: String,
    pub backend: String,
    pub requests: u64,
    pub failures: u64,
    pub connections: u64,
    pub latency_us_sum: u64,
}
