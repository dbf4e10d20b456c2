//! How sidecars use a service's endpoints: the data plane's form of `BackendPolicy` of `sluice.dev`. It travels with its
//! service. Every field's default is what happens without one.

use serde::{Deserialize, Serialize};

/// Which endpoint takes the next request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Balance {
    /// Of two drawn at random, the one with fewer requests in flight.
    #[default]
    LeastRequest,
    /// Of two drawn at random, the one with the lower product of latency (EWMA) and requests in flight.
    Ewma,
    RoundRobin,
    /// Equal keys go to the same endpoint; when one comes or goes, few keys move (a ring of hashes).
    RingHash(HashKey),
    /// The same by Maglev's table: more even, and one lookup.
    Maglev(HashKey),
}

/// What of a request is hashed. Requests without it are balanced by least request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum HashKey {
    /// Lower case.
    Header(String),
    Cookie(String),
    /// The caller's address (outbound: the pod's own; at a gateway: the client's).
    Source,
}

/// Takes endpoints out for a while that do badly (Envoy's names and defaults, which users know).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outlier {
    /// Failures (5xx, resets, connects) in a row; 0: not looked at.
    pub consecutive: u32,
    /// Least share of successes in percent of `interval_ms`; 0: not looked at.
    pub success_percent: u8,
    /// Requests in an interval below which success is not judged.
    pub min_requests: u32,
    pub interval_ms: u32,
    /// Times the number of ejections in a row.
    pub ejection_ms: u32,
    pub max_ejection_ms: u32,
    /// Of a service's endpoints, at most this many are out at a time.
    pub max_ejected_percent: u8,
}

impl Default for Outlier {
    fn default() -> Self {
        Self {
            consecutive: 5,
            success_percent: 0,
            min_requests: 100,
            interval_ms: 10_000,
            ejection_ms: 30_000,
            max_ejection_ms: 300_000,
            max_ejected_percent: 50,
        }
    }
}

/// Bounds of one worker for one service; 0: none but the built-in ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Circuit {
    /// Connections to all endpoints together; an endpoint may have one in any case.
    #[serde(default)]
    pub max_connections: u32,
    /// Requests that wait for a connection.
    #[serde(default)]
    pub max_pending: u32,
    /// Requests in flight.
    #[serde(default)]
    pub max_requests: u32,
    /// Retries in flight.
    #[serde(default)]
    pub max_retries: u32,
}

/// Retries allowed: a share of the requests, and some in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryBudget {
    pub percent: u8,
    pub min_per_s: u32,
}

impl Default for RetryBudget {
    /// Linkerd's, and Gateway API's (GEP-3388).
    fn default() -> Self {
        Self { percent: 20, min_per_s: 10 }
    }
}

/// Endpoints of the caller's zone first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Locality {
    /// While at least this share of the zone's endpoints is healthy, all requests stay in it; below, the missing part goes
    /// to the others.
    pub healthy_percent: u8,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendPolicy {
    #[serde(default)]
    pub balance: Balance,
    #[serde(default)]
    pub locality: Option<Locality>,
    /// A new endpoint's share grows to its full one within this time; 0: at once.
    #[serde(default)]
    pub slow_start_ms: u32,
    #[serde(default)]
    pub outlier: Option<Outlier>,
    /// With a lower share of healthy endpoints than this, all are used again; 0: never.
    #[serde(default)]
    pub panic_percent: u8,
    #[serde(default)]
    pub circuit: Circuit,
    #[serde(default)]
    pub retry_budget: Option<RetryBudget>,
    /// A request without an answer after this time is also sent elsewhere, where it may be repeated; 0: never.
    #[serde(default)]
    pub hedge_after_ms: u32,
    /// Of one try, to the head of its answer; 0: none.
    #[serde(default)]
    pub per_try_timeout_ms: u32,
    /// 0: one second.
    #[serde(default)]
    pub connect_timeout_ms: u32,
    /// For how long an idle connection is kept; 0: a minute.
    #[serde(default)]
    pub idle_timeout_ms: u32,
    /// Keep-alive probes of TCP connections, seconds between them; 0: none.
    #[serde(default)]
    pub keepalive_s: u32,
    /// The share of a backend without endpoints goes to the rule's other backends instead of being answered 503.
    #[serde(default)]
    pub redistribute: bool,
}
