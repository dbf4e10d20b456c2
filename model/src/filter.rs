//! What a rule does with the requests it takes, besides sending them to a backend: the filters, timeouts and retries of
//! Gateway API's HTTPRoute and GRPCRoute, and what `RouteFilter` of `sluice.dev` adds (faults, rate limits, sizes).
//!
//! All of it is plain values that compare and order: the same rule of two revisions is found by comparison.

use crate::Name;
use serde::{Deserialize, Serialize};

/// A share of requests, `numerator` of every `denominator`. The denominator is never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Fraction {
    pub numerator: u32,
    pub denominator: u32,
}

impl Fraction {
    pub const ALL: Self = Self { numerator: 1, denominator: 1 };

    /// `None` for a denominator of 0.
    pub fn new(numerator: u32, denominator: u32) -> Option<Self> {
        (denominator > 0).then_some(Self { numerator, denominator })
    }

    /// Whether a request that drew `random` (uniform over all of `u64`) belongs to the share.
    pub fn takes(self, random: u64) -> bool {
        // The high half scaled to the denominator: without a division, and even to within 1 in 2^32.
        ((random >> 32) * u64::from(self.denominator)) >> 32 < u64::from(self.numerator)
    }
}

/// Changes of headers, in Gateway API's order: set, add, remove. Names are in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HeaderChanges {
    #[serde(default)]
    pub set: Vec<(String, String)>,
    #[serde(default)]
    pub add: Vec<(String, String)>,
    #[serde(default)]
    pub remove: Vec<String>,
}

impl HeaderChanges {
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }
}

/// Another path instead of the request's; the query stays.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PathChange {
    Full(String),
    /// Instead of the prefix by which the rule matched.
    Prefix(String),
}

/// Answered by the sidecar; no backend sees the request.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Redirect {
    /// `http` or `https`; absent: as the request came.
    #[serde(default)]
    pub scheme: Option<String>,
    #[serde(default)]
    pub host: Option<String>,
    /// Absent: the well-known port of a given scheme, else the port that was asked.
    #[serde(default)]
    pub port: Option<u16>,
    #[serde(default)]
    pub path: Option<PathChange>,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Rewrite {
    #[serde(default)]
    pub host: Option<String>,
    #[serde(default)]
    pub path: Option<PathChange>,
}

/// A copy of a share of the requests; its answers are thrown away.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Mirror {
    pub service: Name,
    pub port: u16,
    pub share: Fraction,
}

/// Filters of a rule, or of one of its backends.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Filters {
    #[serde(default)]
    pub request_headers: HeaderChanges,
    #[serde(default)]
    pub response_headers: HeaderChanges,
    #[serde(default)]
    pub redirect: Option<Redirect>,
    #[serde(default)]
    pub rewrite: Option<Rewrite>,
    #[serde(default)]
    pub mirrors: Vec<Mirror>,
}

impl Filters {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Milliseconds; absent: no limit of the rule's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Timeouts {
    /// From the request's arrival to the last byte of its answer, all tries together (GEP-1742 `request`).
    #[serde(default)]
    pub request_ms: Option<u64>,
    /// Of one try, to the head of its answer (GEP-1742 `backendRequest`).
    #[serde(default)]
    pub backend_request_ms: Option<u64>,
}

/// GEP-1731.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Retry {
    /// Statuses that are tried again. Connections that fail are, in any case.
    #[serde(default)]
    pub codes: Vec<u16>,
    /// Tries after the first; absent: 1.
    #[serde(default)]
    pub attempts: Option<u32>,
    /// Least time between two tries.
    #[serde(default)]
    pub backoff_ms: Option<u64>,
}

/// What a user is recognized by, so that the same version takes all of that user's requests.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Sticky {
    /// A cookie of this name; the sidecar sets it where there is none.
    Cookie(String),
    /// A header of this name (lower case); requests without it are split one by one.
    Header(String),
}

/// Faults for tests of what callers do about them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Fault {
    #[serde(default)]
    pub delay: Option<(u64, Fraction)>,
    /// The status, and the share of requests that get it instead of an answer.
    #[serde(default)]
    pub abort: Option<(u16, Fraction)>,
}

/// A token bucket: `requests` in every `per_ms`, and up to `burst` at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RateLimit {
    pub requests: u32,
    pub per_ms: u32,
    pub burst: u32,
}
