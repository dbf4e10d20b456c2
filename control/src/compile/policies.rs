//! The kinds of `sluice.dev` → what the data plane has of them: PURE. The same functions say what is wrong with an object,
//! so that the API refuses it with the field's name before it is stored, and the compiler leaves it out where another API
//! server let it pass.

use super::{Objects, Verdict, name_of, port, workload};
use crate::{
    api::validate::selects,
    duration::parse_ms,
    own::{
        AccessPolicy, AccessPolicySpec, BackendPolicy, BackendPolicySpec, CallerSpec, HashOn, OperationSpec,
        OutlierDetection, PathSpec, RateLimitSpec, RouteFilterSpec,
    },
};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use sluice_model as m;
use std::collections::HashMap;

/// The field, from `spec` on, and what is wrong with it.
pub type Wrong = (String, String);

fn wrong<T>(field: &str, value: impl std::fmt::Display, detail: &str) -> Result<T, Wrong> {
    Err((format!("spec.{field}"), format!("{value:?}: {detail}", value = value.to_string())))
}

fn ms(field: &str, text: Option<&String>) -> Result<Option<u32>, Wrong> {
    let Some(text) = text else { return Ok(None) };
    match parse_ms(text).and_then(|ms| u32::try_from(ms).ok()) {
        Some(ms) => Ok(Some(ms)),
        None => wrong(field, text, "must be a duration such as 10s or 500ms, of at most 49 days"),
    }
}

fn at_most(field: &str, n: Option<i32>, most: u32) -> Result<Option<u32>, Wrong> {
    match n.map(u32::try_from) {
        None => Ok(None),
        Some(Ok(n)) if n <= most => Ok(Some(n)),
        _ => wrong(field, n.unwrap_or_default(), &format!("must be between 0 and {most}")),
    }
}

fn percent(field: &str, n: Option<i32>) -> Result<Option<u8>, Wrong> {
    Ok(at_most(field, n, 100)?.map(|p| p as u8))
}

/// What became of an object of `sluice.dev`, for its status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyStatus {
    /// Its kind, as in paths of the API.
    pub plural: &'static str,
    pub name: m::Name,
    pub generation: i64,
    /// The conditions' types, and whether they hold.
    pub conditions: Vec<(&'static str, Verdict)>,
}

fn invalid<T>(result: Result<T, Wrong>) -> Result<T, (&'static str, String)> {
    result.map_err(|(field, detail)| ("Invalid", format!("{field}: {detail}")))
}

fn none_or(reason: &'static str, sentences: Vec<String>) -> Verdict {
    if sentences.is_empty() { Ok(()) } else { Err((reason, sentences.join("; "))) }
}

/// The services' policies: of several for one service the oldest, then the first by name.
pub(super) fn backend_policies(o: &Objects) -> (HashMap<m::Name, m::BackendPolicy>, Vec<PolicyStatus>) {
    let mut all: Vec<&BackendPolicy> = o.backend_policies.values().map(AsRef::as_ref).collect();
    all.sort_by_key(|p| (p.metadata.creation_timestamp.clone().map(|t| t.0), p.metadata.name.clone()));
    let mut of = HashMap::<m::Name, (m::Name, m::BackendPolicy)>::new();
    let mut statuses = vec![];
    for policy in all {
        let Some(name) = name_of(&policy.metadata) else { continue };
        let compiled = invalid(backend_policy(&policy.spec));
        let (mut missing, mut taken) = (vec![], vec![]);
        for target in &policy.spec.target_refs {
            let service = m::Name::new(name.namespace.clone(), target.name.clone());
            if !o.services.contains_key(&service) {
                missing.push(format!("service {service} does not exist"));
            }
            let Ok(compiled) = &compiled else { continue };
            let (first, _) = of.entry(service.clone()).or_insert_with(|| (name.clone(), compiled.clone()));
            if *first != name {
                taken.push(format!("service {service} follows the older policy {first}"));
            }
        }
        let accepted = compiled.map(drop).and_then(|()| none_or("Conflicted", taken));
        statuses.push(PolicyStatus {
            plural: "backendpolicies",
            name,
            generation: policy.metadata.generation.unwrap_or(0),
            conditions: vec![("Accepted", accepted), ("ResolvedRefs", none_or("TargetNotFound", missing))],
        });
    }
    (of.into_iter().map(|(service, (_, policy))| (service, policy)).collect(), statuses)
}

/// Whether the access policies are what they should be, and whom they reach.
pub(super) fn access_statuses(o: &Objects, trust_domain: &str) -> Vec<PolicyStatus> {
    let status = |(name, object): (&m::Name, &std::sync::Arc<AccessPolicy>)| {
        let own = o.pods.range(m::Name::new(name.namespace.clone(), "")..);
        let own = own.take_while(|(n, _)| n.namespace == name.namespace).map(|(_, pod)| pod);
        let selected = own.filter(|p| selects(&json!(object.spec.selector), &json!(p.metadata.labels)));
        let meshed: Vec<bool> = selected.filter_map(|p| workload(p, trust_domain)).map(|w| w.meshed).collect();
        let without = meshed.iter().filter(|meshed| !**meshed).count();
        let enforced = match (meshed.len(), without) {
            (0, _) => Err(("NoPods", "it selects no pod that runs".to_owned())),
            (_, 0) => Ok(()),
            (all, n) => Err(("NoSidecar", format!("{n} of the {all} pods it selects have no sidecar and ask nobody"))),
        };
        PolicyStatus {
            plural: "accesspolicies",
            name: name.clone(),
            generation: object.metadata.generation.unwrap_or(0),
            conditions: vec![
                ("Accepted", invalid(access(&object.spec, name, trust_domain)).map(drop)),
                ("Enforced", enforced),
            ],
        }
    };
    o.access_policies.iter().map(status).collect()
}

pub fn backend_policy(s: &BackendPolicySpec) -> Result<m::BackendPolicy, Wrong> {
    if s.target_refs.is_empty() {
        return wrong("targetRefs", "", "must name at least one service");
    }
    for (i, target) in s.target_refs.iter().enumerate() {
        if target.kind != "Service" || !target.group.is_empty() {
            return wrong(&format!("targetRefs[{i}].kind"), &target.kind, "must be Service, of group \"\"");
        }
    }
    let circuit = s.circuit_breaker.clone().unwrap_or_default();
    let bound =
        |field: &str, n| Ok::<_, Wrong>(at_most(&format!("circuitBreaker.{field}"), n, i32::MAX as u32)?.unwrap_or(0));
    Ok(m::BackendPolicy {
        balance: balance(s)?,
        locality: match &s.locality {
            None => None,
            Some(l) => Some(m::Locality {
                healthy_percent: percent("locality.healthyPercent", l.healthy_percent)?.unwrap_or(70),
            }),
        },
        slow_start_ms: ms("slowStart", s.slow_start.as_ref())?.unwrap_or(0),
        outlier: s.outlier_detection.as_ref().map(outlier).transpose()?,
        panic_percent: match &s.outlier_detection {
            Some(o) => percent("outlierDetection.panicPercent", o.panic_percent)?.unwrap_or(0),
            None => 0,
        },
        circuit: m::Circuit {
            max_connections: bound("maxConnections", circuit.max_connections)?,
            max_pending: bound("maxPendingRequests", circuit.max_pending_requests)?,
            max_requests: bound("maxRequests", circuit.max_requests)?,
            max_retries: bound("maxRetries", circuit.max_retries)?,
        },
        retry_budget: match &s.retry_budget {
            None => None,
            Some(b) => {
                let default = m::RetryBudget::default();
                let min = at_most("retryBudget.minPerSecond", b.min_per_second, 1_000_000)?;
                let percent = percent("retryBudget.percent", b.percent)?.unwrap_or(default.percent);
                Some(m::RetryBudget { percent, min_per_s: min.unwrap_or(default.min_per_s) })
            }
        },
        hedge_after_ms: match &s.hedging {
            None => 0,
            Some(h) => match ms("hedging.after", Some(&h.after))? {
                Some(ms) if ms > 0 => ms,
                _ => return wrong("hedging.after", &h.after, "must be longer than nothing"),
            },
        },
        per_try_timeout_ms: ms("perTryTimeout", s.per_try_timeout.as_ref())?.unwrap_or(0),
        connect_timeout_ms: ms("connectTimeout", s.connect_timeout.as_ref())?.unwrap_or(0),
        idle_timeout_ms: ms("idleTimeout", s.idle_timeout.as_ref())?.unwrap_or(0),
        keepalive_s: ms("tcpKeepalive", s.tcp_keepalive.as_ref())?.map_or(0, |ms| ms.div_ceil(1000)),
        redistribute: match s.when_empty.as_deref() {
            None | Some("Fail") => false,
            Some("Redistribute") => true,
            Some(other) => return wrong("whenEmpty", other, "must be Fail or Redistribute"),
        },
    })
}

fn balance(s: &BackendPolicySpec) -> Result<m::Balance, Wrong> {
    let Some(balancing) = &s.balancing else { return Ok(m::Balance::LeastRequest) };
    let key = || hash_key(balancing.hash_on.as_ref());
    Ok(match balancing.policy.as_str() {
        "LeastRequest" => m::Balance::LeastRequest,
        "LatencyWeighted" => m::Balance::Ewma,
        "RoundRobin" => m::Balance::RoundRobin,
        "RingHash" => m::Balance::RingHash(key()?),
        "Maglev" => m::Balance::Maglev(key()?),
        other => {
            let known = "must be LeastRequest, LatencyWeighted, RoundRobin, RingHash or Maglev";
            return wrong("balancing.policy", other, known);
        }
    })
}

fn hash_key(on: Option<&HashOn>) -> Result<m::HashKey, Wrong> {
    match on.map(|on| (&on.header, &on.cookie, on.source)) {
        Some((Some(header), None, false)) => Ok(m::HashKey::Header(header.to_ascii_lowercase())),
        Some((None, Some(cookie), false)) => Ok(m::HashKey::Cookie(cookie.clone())),
        Some((None, None, true)) => Ok(m::HashKey::Source),
        _ => wrong("balancing.hashOn", "", "must have one of header, cookie and source: true"),
    }
}

fn outlier(o: &OutlierDetection) -> Result<m::Outlier, Wrong> {
    let default = m::Outlier::default();
    let time = |field: &str, text: Option<&String>, default| {
        Ok::<_, Wrong>(ms(&format!("outlierDetection.{field}"), text)?.unwrap_or(default))
    };
    let share =
        |field: &str, n, default| Ok::<_, Wrong>(percent(&format!("outlierDetection.{field}"), n)?.unwrap_or(default));
    let interval_ms = time("interval", o.interval.as_ref(), default.interval_ms)?;
    if interval_ms == 0 {
        return wrong("outlierDetection.interval", "0s", "must be longer than nothing");
    }
    let count = |field: &str, n, default| {
        Ok::<_, Wrong>(at_most(&format!("outlierDetection.{field}"), n, 1_000_000)?.unwrap_or(default))
    };
    Ok(m::Outlier {
        consecutive: count("consecutiveFailures", o.consecutive_failures, default.consecutive)?,
        success_percent: share("successPercent", o.success_percent, default.success_percent)?,
        min_requests: count("minRequests", o.min_requests, default.min_requests)?,
        interval_ms,
        ejection_ms: time("ejectionTime", o.ejection_time.as_ref(), default.ejection_ms)?,
        max_ejection_ms: time("maxEjectionTime", o.max_ejection_time.as_ref(), default.max_ejection_ms)?,
        max_ejected_percent: share("maxEjectedPercent", o.max_ejected_percent, default.max_ejected_percent)?,
    })
}

/// What an access policy compiles to for every pod it selects.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Access {
    pub rules: Vec<m::AccessRule>,
    pub limits: Vec<m::InboundLimit>,
}

/// Adds to `policy` what the access policies that select `pod` say.
pub(super) fn add_access(policy: &mut m::Policy, pod: &Pod, o: &Objects, trust_domain: &str) {
    let namespace = pod.metadata.namespace.clone().unwrap_or_default();
    let labels = json!(pod.metadata.labels);
    let from = m::Name::new(namespace.clone(), "");
    let own = o.access_policies.range(from..).take_while(|(n, _)| n.namespace == namespace);
    for (name, object) in own.filter(|(_, p)| selects(&json!(p.spec.selector), &labels)) {
        match access(&object.spec, name, trust_domain) {
            Ok(access) => {
                policy.access.extend(access.rules);
                policy.rate_limits.extend(access.limits);
            }
            // What it would allow or deny is not known: it must not open anything.
            Err(_) => policy.access.push(m::AccessRule {
                policy: name.clone(),
                action: m::Action::Deny,
                audit: false,
                from: vec![],
                to: vec![],
            }),
        }
    }
}

pub fn access(s: &AccessPolicySpec, name: &m::Name, trust_domain: &str) -> Result<Access, Wrong> {
    let action = match s.action.as_deref() {
        None => None,
        Some("Allow") => Some(m::Action::Allow),
        Some("Deny") => Some(m::Action::Deny),
        Some(other) => return wrong("action", other, "must be Allow or Deny"),
    };
    let audit = match s.mode.as_deref() {
        None | Some("Enforce") => false,
        Some("Audit") => true,
        Some(other) => return wrong("mode", other, "must be Enforce or Audit"),
    };
    if action.is_none() && !s.rules.is_empty() {
        return wrong("action", "", "must be given with rules");
    }
    if action.is_none() && s.rate_limits.is_empty() {
        return wrong("action", "", "must be given where there are no rateLimits");
    }
    let rule = |from, to, action| m::AccessRule { policy: name.clone(), action, audit, from, to };
    let mut rules = vec![];
    for (i, r) in s.rules.iter().enumerate() {
        let at = format!("rules[{i}]");
        let (from, to) = (callers(&at, &r.from, name, trust_domain)?, operations(&at, &r.to)?);
        rules.extend(action.map(|action| rule(from, to, action)));
    }
    if s.rules.is_empty() {
        rules.extend(action.map(|action| rule(vec![], vec![], action)));
    }
    let mut limits = vec![];
    for (i, l) in s.rate_limits.iter().enumerate() {
        let at = format!("rateLimits[{i}]");
        limits.push(m::InboundLimit {
            policy: name.clone(),
            from: callers(&at, &l.from, name, trust_domain)?,
            to: operations(&at, &l.to)?,
            limit: rate_limit(&at, &l.limit)?,
            per_identity: l.per_identity,
        });
    }
    Ok(Access { rules, limits })
}

fn callers(at: &str, all: &[CallerSpec], policy: &m::Name, trust_domain: &str) -> Result<Vec<m::Caller>, Wrong> {
    let caller = |(i, c): (usize, &CallerSpec)| match (&c.namespace, &c.service_account) {
        (None, None) => wrong(&format!("{at}.from[{i}]"), "", "must have a namespace or a serviceAccount"),
        (namespace, Some(account)) => Ok(m::Caller {
            identity: Some(m::Identity {
                trust_domain: trust_domain.to_owned(),
                namespace: namespace.clone().unwrap_or_else(|| policy.namespace.clone()),
                service_account: account.clone(),
            }),
            namespace: None,
        }),
        (Some(namespace), None) => Ok(m::Caller { identity: None, namespace: Some(namespace.clone()) }),
    };
    all.iter().enumerate().map(caller).collect()
}

fn operations(at: &str, all: &[OperationSpec]) -> Result<Vec<m::Operation>, Wrong> {
    let operation = |(i, o): (usize, &OperationSpec)| {
        let at = format!("{at}.to[{i}]");
        let one_port = |(p, n): (usize, &i32)| match port(*n) {
            Some(port) => Ok(port),
            None => wrong(&format!("{at}.ports[{p}]"), n, "must be between 1 and 65535"),
        };
        Ok(m::Operation {
            methods: o.methods.iter().map(|m| m.to_ascii_uppercase()).collect(),
            paths: o
                .paths
                .iter()
                .enumerate()
                .map(|(p, x)| path(&format!("{at}.paths[{p}]"), x))
                .collect::<Result<_, _>>()?,
            ports: o.ports.iter().enumerate().map(one_port).collect::<Result<_, _>>()?,
        })
    };
    all.iter().enumerate().map(operation).collect()
}

fn path(at: &str, p: &PathSpec) -> Result<m::PathMatch, Wrong> {
    let value = p.value.clone();
    if p.kind.as_deref() != Some("RegularExpression") && !value.starts_with('/') {
        return wrong(&format!("{at}.value"), value, "must begin with a slash");
    }
    match p.kind.as_deref() {
        None | Some("PathPrefix") => Ok(m::PathMatch::Prefix(value)),
        Some("Exact") => Ok(m::PathMatch::Exact(value)),
        Some("RegularExpression") => match value.parse() {
            Ok(pattern) => Ok(m::PathMatch::Regex(pattern)),
            Err(error) => wrong(&format!("{at}.value"), &value, &error.to_string()),
        },
        Some(other) => wrong(&format!("{at}.type"), other, "must be Exact, PathPrefix or RegularExpression"),
    }
}

fn rate_limit(at: &str, l: &RateLimitSpec) -> Result<m::RateLimit, Wrong> {
    let requests = at_most(&format!("{at}.requests"), Some(l.requests), 1_000_000_000)?.unwrap_or(0);
    let per_ms = ms(&format!("{at}.per"), l.per.as_ref())?.unwrap_or(1000);
    if per_ms == 0 {
        return wrong(&format!("{at}.per"), "0s", "must be longer than nothing");
    }
    let burst = at_most(&format!("{at}.burst"), l.burst, 1_000_000_000)?.unwrap_or(requests.max(1));
    Ok(m::RateLimit { requests, per_ms, burst })
}

/// Puts what a route filter asks into a rule.
pub fn route_filter(s: &RouteFilterSpec, rule: &mut m::Rule) -> Result<(), Wrong> {
    let share = |field: &str, n: Option<i32>| {
        let percent = percent(field, n)?.unwrap_or(100);
        Ok::<_, Wrong>(m::Fraction { numerator: percent.into(), denominator: 100 })
    };
    if let Some(delay) = s.fault.as_ref().and_then(|f| f.delay.as_ref()) {
        let time = ms("fault.delay.duration", Some(&delay.duration))?.unwrap_or(0);
        rule.fault.delay = Some((time.into(), share("fault.delay.percent", delay.percent)?));
    }
    if let Some(abort) = s.fault.as_ref().and_then(|f| f.abort.as_ref()) {
        if !(200..600).contains(&abort.status) {
            return wrong("fault.abort.status", abort.status, "must be between 200 and 599");
        }
        rule.fault.abort = Some((abort.status as u16, share("fault.abort.percent", abort.percent)?));
    }
    if let Some(limit) = &s.rate_limit {
        rule.rate_limit = Some(rate_limit("rateLimit", limit)?);
    }
    if let Some(most) = s.max_request_bytes {
        match u64::try_from(most) {
            Ok(most) => rule.max_body_bytes = Some(most),
            Err(_) => return wrong("maxRequestBytes", most, "must not be negative"),
        }
    }
    Ok(())
}

/// What is wrong with a spec, for the API.
pub fn check_backend_policy(p: &BackendPolicy) -> Option<Wrong> {
    backend_policy(&p.spec).err()
}

pub fn check_access_policy(p: &AccessPolicy) -> Option<Wrong> {
    access(&p.spec, &m::Name::default(), "cluster.local").err()
}

pub fn check_route_filter(p: &crate::own::RouteFilter) -> Option<Wrong> {
    route_filter(&p.spec, &mut m::Rule::default()).err()
}
