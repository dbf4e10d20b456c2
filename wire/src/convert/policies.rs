//! What a workload accepts, and how a service's endpoints are used.

use super::{
    Malformed, invalid, name, ports, required,
    routes::{all, pattern},
};
use crate::v1;
use sluice_model as m;

impl From<&m::Policy> for v1::Policy {
    fn from(p: &m::Policy) -> Self {
        Self {
            name: Some((&p.name).into()),
            mode: match p.mode {
                m::InboundMode::Permissive => v1::InboundMode::Permissive,
                m::InboundMode::Strict => v1::InboundMode::Strict,
            }
            .into(),
            excluded_ports: p.excluded_ports.iter().map(|p| (*p).into()).collect(),
            opaque_ports: p.opaque_ports.iter().map(|p| (*p).into()).collect(),
            access: p.access.iter().map(Into::into).collect(),
            rate_limits: p.rate_limits.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::Policy> for m::Policy {
    type Error = Malformed;

    fn try_from(p: v1::Policy) -> Result<Self, Malformed> {
        Ok(Self {
            name: name(p.name)?,
            // A mode from a newer control must not open anything: refuse it.
            mode: match v1::InboundMode::try_from(p.mode) {
                Ok(v1::InboundMode::Permissive) => m::InboundMode::Permissive,
                Ok(v1::InboundMode::Strict) => m::InboundMode::Strict,
                Err(_) => return Err(invalid("inbound mode", p.mode)),
            },
            excluded_ports: ports("excluded port", &p.excluded_ports)?,
            opaque_ports: ports("opaque port", &p.opaque_ports)?,
            access: all(p.access)?,
            rate_limits: all(p.rate_limits)?,
        })
    }
}

impl From<&m::AccessRule> for v1::AccessRule {
    fn from(r: &m::AccessRule) -> Self {
        Self {
            policy: Some((&r.policy).into()),
            action: match r.action {
                m::Action::Allow => v1::Action::Allow,
                m::Action::Deny => v1::Action::Deny,
            }
            .into(),
            audit: r.audit,
            from: r.from.iter().map(Into::into).collect(),
            to: r.to.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::AccessRule> for m::AccessRule {
    type Error = Malformed;

    fn try_from(r: v1::AccessRule) -> Result<Self, Malformed> {
        Ok(Self {
            policy: name(r.policy)?,
            action: match v1::Action::try_from(r.action) {
                Ok(v1::Action::Allow) => m::Action::Allow,
                Ok(v1::Action::Deny) => m::Action::Deny,
                Err(_) => return Err(invalid("action", r.action)),
            },
            audit: r.audit,
            from: all(r.from)?,
            to: all(r.to)?,
        })
    }
}

impl From<&m::Caller> for v1::Caller {
    fn from(c: &m::Caller) -> Self {
        Self {
            identity: c.identity.as_ref().map(ToString::to_string).unwrap_or_default(),
            namespace: c.namespace.clone().unwrap_or_default(),
        }
    }
}

impl TryFrom<v1::Caller> for m::Caller {
    type Error = Malformed;

    fn try_from(c: v1::Caller) -> Result<Self, Malformed> {
        let identity = Some(c.identity).filter(|i| !i.is_empty());
        Ok(Self {
            identity: identity.map(|i| super::identity(&i)).transpose()?,
            namespace: Some(c.namespace).filter(|n| !n.is_empty()),
        })
    }
}

impl From<&m::Operation> for v1::Operation {
    fn from(o: &m::Operation) -> Self {
        use v1::path_match::Path;
        let path = |p: &m::PathMatch| v1::PathMatch {
            path: Some(match p {
                m::PathMatch::Exact(p) => Path::Exact(p.clone()),
                m::PathMatch::Prefix(p) => Path::Prefix(p.clone()),
                m::PathMatch::Regex(p) => Path::Regex(p.as_str().to_owned()),
            }),
        };
        Self {
            methods: o.methods.clone(),
            paths: o.paths.iter().map(path).collect(),
            ports: o.ports.iter().map(|p| (*p).into()).collect(),
        }
    }
}

impl TryFrom<v1::Operation> for m::Operation {
    type Error = Malformed;

    fn try_from(o: v1::Operation) -> Result<Self, Malformed> {
        use v1::path_match::Path;
        let path = |p: v1::PathMatch| {
            Ok(match required(p.path, "path")? {
                Path::Exact(p) => m::PathMatch::Exact(p),
                Path::Prefix(p) => m::PathMatch::Prefix(p),
                Path::Regex(p) => m::PathMatch::Regex(pattern(&p)?),
            })
        };
        Ok(Self {
            methods: o.methods,
            paths: o.paths.into_iter().map(path).collect::<Result<_, _>>()?,
            ports: ports("port", &o.ports)?,
        })
    }
}

impl From<&m::InboundLimit> for v1::InboundLimit {
    fn from(l: &m::InboundLimit) -> Self {
        Self {
            policy: Some((&l.policy).into()),
            from: l.from.iter().map(Into::into).collect(),
            to: l.to.iter().map(Into::into).collect(),
            limit: Some(l.limit.into()),
            per_identity: l.per_identity,
        }
    }
}

impl TryFrom<v1::InboundLimit> for m::InboundLimit {
    type Error = Malformed;

    fn try_from(l: v1::InboundLimit) -> Result<Self, Malformed> {
        Ok(Self {
            policy: name(l.policy)?,
            from: all(l.from)?,
            to: all(l.to)?,
            limit: required(l.limit, "rate limit")?.try_into()?,
            per_identity: l.per_identity,
        })
    }
}

impl From<&m::BackendPolicy> for v1::BackendPolicy {
    fn from(p: &m::BackendPolicy) -> Self {
        let (balance, key) = match &p.balance {
            m::Balance::LeastRequest => (v1::Balance::LeastRequest, None),
            m::Balance::Ewma => (v1::Balance::Ewma, None),
            m::Balance::RoundRobin => (v1::Balance::RoundRobin, None),
            m::Balance::RingHash(key) => (v1::Balance::RingHash, Some(key)),
            m::Balance::Maglev(key) => (v1::Balance::Maglev, Some(key)),
        };
        Self {
            balance: balance.into(),
            hash_key: key.map(Into::into),
            locality: p.locality.map(|l| v1::Locality { healthy_percent: l.healthy_percent.into() }),
            slow_start_ms: p.slow_start_ms,
            outlier: p.outlier.as_ref().map(Into::into),
            panic_percent: p.panic_percent.into(),
            circuit: Some(v1::Circuit {
                max_connections: p.circuit.max_connections,
                max_pending: p.circuit.max_pending,
                max_requests: p.circuit.max_requests,
                max_retries: p.circuit.max_retries,
            }),
            retry_budget: p.retry_budget.map(|b| v1::RetryBudget { percent: b.percent.into(), min_per_s: b.min_per_s }),
            hedge_after_ms: p.hedge_after_ms,
            per_try_timeout_ms: p.per_try_timeout_ms,
            connect_timeout_ms: p.connect_timeout_ms,
            idle_timeout_ms: p.idle_timeout_ms,
            keepalive_s: p.keepalive_s,
            redistribute: p.redistribute,
        }
    }
}

impl TryFrom<v1::BackendPolicy> for m::BackendPolicy {
    type Error = Malformed;

    fn try_from(p: v1::BackendPolicy) -> Result<Self, Malformed> {
        let key = || required(p.hash_key.clone(), "hash key")?.try_into();
        let circuit = p.circuit.unwrap_or_default();
        Ok(Self {
            // A way of balancing from a newer control spreads requests as without one.
            balance: match v1::Balance::try_from(p.balance).unwrap_or(v1::Balance::LeastRequest) {
                v1::Balance::LeastRequest => m::Balance::LeastRequest,
                v1::Balance::Ewma => m::Balance::Ewma,
                v1::Balance::RoundRobin => m::Balance::RoundRobin,
                v1::Balance::RingHash => m::Balance::RingHash(key()?),
                v1::Balance::Maglev => m::Balance::Maglev(key()?),
            },
            locality: match p.locality {
                None => None,
                Some(l) => Some(m::Locality { healthy_percent: percent("healthy percent", l.healthy_percent)? }),
            },
            slow_start_ms: p.slow_start_ms,
            outlier: p.outlier.map(TryInto::try_into).transpose()?,
            panic_percent: percent("panic percent", p.panic_percent)?,
            circuit: m::Circuit {
                max_connections: circuit.max_connections,
                max_pending: circuit.max_pending,
                max_requests: circuit.max_requests,
                max_retries: circuit.max_retries,
            },
            retry_budget: match p.retry_budget {
                None => None,
                Some(b) => {
                    Some(m::RetryBudget { percent: percent("retry percent", b.percent)?, min_per_s: b.min_per_s })
                }
            },
            hedge_after_ms: p.hedge_after_ms,
            per_try_timeout_ms: p.per_try_timeout_ms,
            connect_timeout_ms: p.connect_timeout_ms,
            idle_timeout_ms: p.idle_timeout_ms,
            keepalive_s: p.keepalive_s,
            redistribute: p.redistribute,
        })
    }
}

fn percent(field: &'static str, p: u32) -> Result<u8, Malformed> {
    u8::try_from(p).ok().filter(|p| *p <= 100).ok_or_else(|| invalid(field, p))
}

impl From<&m::HashKey> for v1::HashKey {
    fn from(k: &m::HashKey) -> Self {
        use v1::hash_key::Key;
        Self {
            key: Some(match k {
                m::HashKey::Header(name) => Key::Header(name.clone()),
                m::HashKey::Cookie(name) => Key::Cookie(name.clone()),
                m::HashKey::Source => Key::Source(true),
            }),
        }
    }
}

impl TryFrom<v1::HashKey> for m::HashKey {
    type Error = Malformed;

    fn try_from(k: v1::HashKey) -> Result<Self, Malformed> {
        use v1::hash_key::Key;
        Ok(match required(k.key, "hash key")? {
            Key::Header(name) => Self::Header(name),
            Key::Cookie(name) => Self::Cookie(name),
            Key::Source(_) => Self::Source,
        })
    }
}

impl From<&m::Outlier> for v1::Outlier {
    fn from(o: &m::Outlier) -> Self {
        Self {
            consecutive: o.consecutive,
            success_percent: o.success_percent.into(),
            min_requests: o.min_requests,
            interval_ms: o.interval_ms,
            ejection_ms: o.ejection_ms,
            max_ejection_ms: o.max_ejection_ms,
            max_ejected_percent: o.max_ejected_percent.into(),
        }
    }
}

impl TryFrom<v1::Outlier> for m::Outlier {
    type Error = Malformed;

    fn try_from(o: v1::Outlier) -> Result<Self, Malformed> {
        if o.interval_ms == 0 {
            return Err(invalid("outlier interval", o.interval_ms));
        }
        Ok(Self {
            consecutive: o.consecutive,
            success_percent: percent("success percent", o.success_percent)?,
            min_requests: o.min_requests,
            interval_ms: o.interval_ms,
            ejection_ms: o.ejection_ms,
            max_ejection_ms: o.max_ejection_ms,
            max_ejected_percent: percent("ejected percent", o.max_ejected_percent)?,
        })
    }
}
