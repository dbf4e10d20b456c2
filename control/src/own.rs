//! The kinds of `sluice.dev/v1alpha1`: what Gateway API leaves to implementations. They say how sidecars use a service's
//! endpoints ([`BackendPolicy`]), who may call a workload and how often ([`AccessPolicy`]), and what a route's rule asks
//! beyond Gateway API's own filters ([`RouteFilter`], named by an `ExtensionRef`).
//!
//! Durations are Gateway API's (GEP-2257: `10s`, `500ms`). What is left out has the default that its description says.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, ObjectMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub const GROUP: &str = "sluice.dev";
pub const VERSION: &str = "v1alpha1";

/// An object of a kind with a spec.
macro_rules! object {
    ($(#[$doc:meta])* $name:ident: $spec:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "camelCase")]
        pub struct $name {
            #[serde(default)]
            pub metadata: ObjectMeta,
            pub spec: $spec,
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub status: Option<PolicyStatus>,
        }
    };
}

object! {
    /// How sidecars use the endpoints of the services it names, each of its own namespace.
    BackendPolicy: BackendPolicySpec
}
object! {
    /// Who may call the pods it selects in its namespace, and how often.
    AccessPolicy: AccessPolicySpec
}
object! {
    /// What a route's rule asks beyond Gateway API's filters.
    RouteFilter: RouteFilterSpec
}

/// What became of a policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PolicyStatus {
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackendPolicySpec {
    /// The services. Of several policies that name one, the oldest counts.
    pub target_refs: Vec<TargetRef>,
    /// Which endpoint takes a request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balancing: Option<Balancing>,
    /// Endpoints of the caller's zone first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locality: Option<LocalitySpec>,
    /// The time in which a new endpoint's share grows to its full one. Default: at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow_start: Option<String>,
    /// Takes endpoints out for a while that do badly. Default: none are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outlier_detection: Option<OutlierDetection>,
    /// Bounds of each sidecar's worker for each service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub circuit_breaker: Option<CircuitBreaker>,
    /// How many retries there may be. Default where routes retry: 20 % of requests, and 10 a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_budget: Option<RetryBudgetSpec>,
    /// Sends slow requests to a second endpoint, too. Default: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hedging: Option<HedgingSpec>,
    /// For one try, to the head of its answer. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_try_timeout: Option<String>,
    /// Default: 1s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect_timeout: Option<String>,
    /// For how long an idle connection is kept. Default: 60s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<String>,
    /// Between keep-alive probes of TCP connections. Default: none are sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_keepalive: Option<String>,
    /// What becomes of a service's share of a route while it has no endpoints: `Fail` (503, the default) or `Redistribute`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when_empty: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TargetRef {
    #[serde(default)]
    pub group: String,
    /// `Service`.
    pub kind: String,
    pub name: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Balancing {
    /// `LeastRequest` (the default), `LatencyWeighted`, `RoundRobin`, `RingHash` or `Maglev`.
    pub policy: String,
    /// What RingHash and Maglev hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash_on: Option<HashOn>,
}

/// One of these.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HashOn {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cookie: Option<String>,
    /// The calling pod.
    #[serde(default)]
    pub source: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LocalitySpec {
    /// While at least this share of the zone's endpoints is healthy, all requests stay in it. Default: 70.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthy_percent: Option<i32>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OutlierDetection {
    /// Failures in a row (5xx, resets, connects). Default 5; 0: not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consecutive_failures: Option<i32>,
    /// Least share of successes in an interval. Default 0: not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub success_percent: Option<i32>,
    /// Requests in an interval below which success is not judged. Default 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_requests: Option<i32>,
    /// Default 10s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<String>,
    /// Times the number of ejections in a row. Default 30s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ejection_time: Option<String>,
    /// Default 300s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ejection_time: Option<String>,
    /// Of a service's endpoints, at most this many are out at a time. Default 50; the last one never is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ejected_percent: Option<i32>,
    /// With a lower share of healthy endpoints than this, all are used. Default 0: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub panic_percent: Option<i32>,
}

/// 0 or absent: no bound but the built-in ones.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CircuitBreaker {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<i32>,
    /// Requests that wait for a connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_pending_requests: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_requests: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_retries: Option<i32>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetryBudgetSpec {
    /// Of the requests of the last ten seconds. Default 20.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<i32>,
    /// In any case. Default 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_per_second: Option<i32>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HedgingSpec {
    /// Without the head of an answer after this time, the other request is sent; the first answer counts. Requests without
    /// body that may be repeated only, within the retry budget.
    pub after: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AccessPolicySpec {
    /// The pods. Empty: all of the namespace.
    #[serde(default)]
    pub selector: LabelSelector,
    /// `Allow` or `Deny`. Deny beats allow; where any policy allows, what none allows is denied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    /// `Enforce` (the default) or `Audit`: what it would do is logged and counted, and not done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// Calls that any of these describes. With an action and no rules: every call.
    #[serde(default)]
    pub rules: Vec<AccessRuleSpec>,
    /// All that describe a call must have room for it.
    #[serde(default)]
    pub rate_limits: Vec<InboundLimitSpec>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AccessRuleSpec {
    /// Any of these; empty: everybody, known or not.
    #[serde(default)]
    pub from: Vec<CallerSpec>,
    /// Any of these; empty: everything.
    #[serde(default)]
    pub to: Vec<OperationSpec>,
}

/// Who proved by mTLS to be this.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CallerSpec {
    /// Absent with a service account: the policy's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Absent: any of the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<String>,
}

/// All that is given must hold. Methods and paths hold of no connection that is not HTTP.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OperationSpec {
    #[serde(default)]
    pub methods: Vec<String>,
    #[serde(default)]
    pub paths: Vec<PathSpec>,
    /// The app's own.
    #[serde(default)]
    pub ports: Vec<i32>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PathSpec {
    /// `Exact`, `PathPrefix` (the default) or `RegularExpression`.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    pub value: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InboundLimitSpec {
    #[serde(default)]
    pub from: Vec<CallerSpec>,
    #[serde(default)]
    pub to: Vec<OperationSpec>,
    #[serde(flatten)]
    pub limit: RateLimitSpec,
    /// Each caller has a rate of its own; those without an identity share one.
    #[serde(default)]
    pub per_identity: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RateLimitSpec {
    pub requests: i32,
    /// Default 1s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per: Option<String>,
    /// At once. Default: as many as `requests`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<i32>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RouteFilterSpec {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<FaultSpec>,
    /// Of each sidecar's worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<RateLimitSpec>,
    /// Requests with a larger body are answered 413.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_request_bytes: Option<i64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FaultSpec {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay: Option<DelaySpec>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<AbortSpec>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DelaySpec {
    pub duration: String,
    /// Of the requests. Default 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<i32>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AbortSpec {
    pub status: i32,
    /// Of the requests. Default 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<i32>,
}
