//! Routes, with all that their rules may ask for.

use super::{Malformed, invalid, name, port, required, some_port};
use crate::v1;
use sluice_model as m;

/// Bounds on what one route may hold: far above Gateway API's, so that only nonsense meets them.
const MAX_RULES: usize = 1024;

impl From<&m::Route> for v1::Route {
    fn from(r: &m::Route) -> Self {
        Self {
            name: Some((&r.name).into()),
            kind: match r.kind {
                m::RouteKind::Http => v1::RouteKind::HttpRoute,
                m::RouteKind::Grpc => v1::RouteKind::GrpcRoute,
                m::RouteKind::Tls => v1::RouteKind::TlsRoute,
                m::RouteKind::Tcp => v1::RouteKind::TcpRoute,
            }
            .into(),
            parent: Some((&r.parent).into()),
            parent_port: r.parent_port.unwrap_or(0).into(),
            created_s: r.created_s,
            generation: r.generation,
            rules: r.rules.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::Route> for m::Route {
    type Error = Malformed;

    fn try_from(r: v1::Route) -> Result<Self, Malformed> {
        if r.rules.len() > MAX_RULES {
            return Err(invalid("number of rules", r.rules.len()));
        }
        Ok(Self {
            name: name(r.name)?,
            kind: match v1::RouteKind::try_from(r.kind) {
                Ok(v1::RouteKind::HttpRoute) => m::RouteKind::Http,
                Ok(v1::RouteKind::GrpcRoute) => m::RouteKind::Grpc,
                Ok(v1::RouteKind::TlsRoute) => m::RouteKind::Tls,
                Ok(v1::RouteKind::TcpRoute) => m::RouteKind::Tcp,
                Err(_) => return Err(invalid("route kind", r.kind)),
            },
            parent: name(r.parent)?,
            parent_port: some_port("parent port", r.parent_port)?,
            created_s: r.created_s,
            generation: r.generation,
            rules: all(r.rules)?,
        })
    }
}

pub(super) fn all<A, B: TryFrom<A, Error = Malformed>>(list: Vec<A>) -> Result<Vec<B>, Malformed> {
    list.into_iter().map(TryInto::try_into).collect()
}

fn some<A, B: TryFrom<A, Error = Malformed>>(one: Option<A>) -> Result<Option<B>, Malformed> {
    one.map(TryInto::try_into).transpose()
}

impl From<&m::Rule> for v1::Rule {
    fn from(r: &m::Rule) -> Self {
        Self {
            matches: r.matches.iter().map(Into::into).collect(),
            backends: r.backends.iter().map(Into::into).collect(),
            filters: filters_to_wire(&r.filters),
            request_timeout_ms: r.timeouts.request_ms.unwrap_or(0),
            backend_request_timeout_ms: r.timeouts.backend_request_ms.unwrap_or(0),
            retry: r.retry.as_ref().map(Into::into),
            sticky: r.sticky.as_ref().map(Into::into),
            fault: (r.fault != m::Fault::default()).then(|| (&r.fault).into()),
            rate_limit: r.rate_limit.map(Into::into),
            max_body_bytes: r.max_body_bytes,
        }
    }
}

impl TryFrom<v1::Rule> for m::Rule {
    type Error = Malformed;

    fn try_from(r: v1::Rule) -> Result<Self, Malformed> {
        let some_ms = |ms: u64| Some(ms).filter(|ms| *ms > 0);
        Ok(Self {
            matches: all(r.matches)?,
            backends: all(r.backends)?,
            filters: some(r.filters)?.unwrap_or_default(),
            timeouts: m::Timeouts {
                request_ms: some_ms(r.request_timeout_ms),
                backend_request_ms: some_ms(r.backend_request_timeout_ms),
            },
            retry: some(r.retry)?,
            sticky: some(r.sticky)?,
            fault: some(r.fault)?.unwrap_or_default(),
            rate_limit: some(r.rate_limit)?,
            max_body_bytes: r.max_body_bytes,
        })
    }
}

impl From<&m::Match> for v1::Match {
    fn from(x: &m::Match) -> Self {
        use v1::r#match::Path;
        Self {
            hosts: x.hosts.clone(),
            path: Some(match &x.path {
                m::PathMatch::Exact(p) => Path::Exact(p.clone()),
                m::PathMatch::Prefix(p) => Path::Prefix(p.clone()),
                m::PathMatch::Regex(p) => Path::Regex(p.as_str().to_owned()),
            }),
            method: x.method.clone().unwrap_or_default(),
            headers: x.headers.iter().map(|h| value_to_wire(&h.name, &h.value)).collect(),
            query: x.query.iter().map(|q| value_to_wire(&q.name, &q.value)).collect(),
        }
    }
}

impl TryFrom<v1::Match> for m::Match {
    type Error = Malformed;

    fn try_from(x: v1::Match) -> Result<Self, Malformed> {
        use v1::r#match::Path;
        let header = |h: v1::HeaderMatch| Ok(m::HeaderMatch { name: h.name, value: value(h.value)? });
        let query = |q: v1::HeaderMatch| Ok(m::QueryMatch { name: q.name, value: value(q.value)? });
        Ok(Self {
            hosts: x.hosts,
            path: match required(x.path, "path match")? {
                Path::Exact(p) => m::PathMatch::Exact(p),
                Path::Prefix(p) => m::PathMatch::Prefix(p),
                Path::Regex(p) => m::PathMatch::Regex(pattern(&p)?),
            },
            method: Some(x.method).filter(|s| !s.is_empty()),
            headers: x.headers.into_iter().map(header).collect::<Result<_, _>>()?,
            query: x.query.into_iter().map(query).collect::<Result<_, _>>()?,
        })
    }
}

/// A pattern that this program cannot compile is one of a newer control: the update is refused, nothing is guessed.
pub(super) fn pattern(text: &str) -> Result<m::Pattern, Malformed> {
    text.parse().map_err(|_| invalid("regular expression", text))
}

fn value_to_wire(name: &str, value: &m::StringMatch) -> v1::HeaderMatch {
    use v1::header_match::Value;
    let value = match value {
        m::StringMatch::Exact(v) => Value::Exact(v.clone()),
        m::StringMatch::Regex(p) => Value::Regex(p.as_str().to_owned()),
    };
    v1::HeaderMatch { name: name.to_owned(), value: Some(value) }
}

fn value(v: Option<v1::header_match::Value>) -> Result<m::StringMatch, Malformed> {
    use v1::header_match::Value;
    Ok(match required(v, "header match value")? {
        Value::Exact(v) => m::StringMatch::Exact(v),
        Value::Regex(p) => m::StringMatch::Regex(pattern(&p)?),
    })
}

impl From<&m::Backend> for v1::Backend {
    fn from(b: &m::Backend) -> Self {
        Self {
            service: Some((&b.service).into()),
            port: b.port.into(),
            weight: b.weight,
            filters: filters_to_wire(&b.filters),
        }
    }
}

impl TryFrom<v1::Backend> for m::Backend {
    type Error = Malformed;

    fn try_from(b: v1::Backend) -> Result<Self, Malformed> {
        Ok(Self {
            service: name(b.service)?,
            port: port("backend port", b.port)?,
            weight: b.weight,
            filters: some(b.filters)?.unwrap_or_default(),
        })
    }
}

/// Most rules have none, and send none.
fn filters_to_wire(f: &m::Filters) -> Option<v1::Filters> {
    (!f.is_empty()).then(|| f.into())
}

impl From<&m::Filters> for v1::Filters {
    fn from(f: &m::Filters) -> Self {
        let changes = |c: &m::HeaderChanges| (!c.is_empty()).then(|| c.into());
        Self {
            request_headers: changes(&f.request_headers),
            response_headers: changes(&f.response_headers),
            redirect: f.redirect.as_ref().map(|r| v1::Redirect {
                scheme: r.scheme.clone().unwrap_or_default(),
                host: r.host.clone().unwrap_or_default(),
                port: r.port.unwrap_or(0).into(),
                path: r.path.as_ref().map(Into::into),
                status: r.status.into(),
            }),
            rewrite: f.rewrite.as_ref().map(|r| v1::Rewrite {
                host: r.host.clone().unwrap_or_default(),
                path: r.path.as_ref().map(Into::into),
            }),
            mirrors: f
                .mirrors
                .iter()
                .map(|x| v1::Mirror {
                    service: Some((&x.service).into()),
                    port: x.port.into(),
                    share: Some(x.share.into()),
                })
                .collect(),
        }
    }
}

impl TryFrom<v1::Filters> for m::Filters {
    type Error = Malformed;

    fn try_from(f: v1::Filters) -> Result<Self, Malformed> {
        let mirror = |x: v1::Mirror| {
            Ok(m::Mirror {
                service: name(x.service)?,
                port: port("mirror port", x.port)?,
                share: required(x.share, "mirror share")?.try_into()?,
            })
        };
        Ok(Self {
            request_headers: f.request_headers.map(Into::into).unwrap_or_default(),
            response_headers: f.response_headers.map(Into::into).unwrap_or_default(),
            redirect: some(f.redirect)?,
            rewrite: some(f.rewrite)?,
            mirrors: f.mirrors.into_iter().map(mirror).collect::<Result<_, _>>()?,
        })
    }
}

impl From<&m::HeaderChanges> for v1::HeaderChanges {
    fn from(c: &m::HeaderChanges) -> Self {
        let header = |(name, value): &(String, String)| v1::Header { name: name.clone(), value: value.clone() };
        Self {
            set: c.set.iter().map(header).collect(),
            add: c.add.iter().map(header).collect(),
            remove: c.remove.clone(),
        }
    }
}

impl From<v1::HeaderChanges> for m::HeaderChanges {
    fn from(c: v1::HeaderChanges) -> Self {
        let header = |h: v1::Header| (h.name, h.value);
        Self {
            set: c.set.into_iter().map(header).collect(),
            add: c.add.into_iter().map(header).collect(),
            remove: c.remove,
        }
    }
}

impl From<&m::PathChange> for v1::PathChange {
    fn from(c: &m::PathChange) -> Self {
        use v1::path_change::Path;
        Self {
            path: Some(match c {
                m::PathChange::Full(p) => Path::Full(p.clone()),
                m::PathChange::Prefix(p) => Path::Prefix(p.clone()),
            }),
        }
    }
}

impl TryFrom<v1::PathChange> for m::PathChange {
    type Error = Malformed;

    fn try_from(c: v1::PathChange) -> Result<Self, Malformed> {
        use v1::path_change::Path;
        Ok(match required(c.path, "path change")? {
            Path::Full(p) => Self::Full(p),
            Path::Prefix(p) => Self::Prefix(p),
        })
    }
}

impl TryFrom<v1::Redirect> for m::Redirect {
    type Error = Malformed;

    fn try_from(r: v1::Redirect) -> Result<Self, Malformed> {
        Ok(Self {
            scheme: Some(r.scheme).filter(|s| !s.is_empty()),
            host: Some(r.host).filter(|h| !h.is_empty()),
            port: some_port("redirect port", r.port)?,
            path: some(r.path)?,
            status: status("redirect status", r.status, 300..400)?,
        })
    }
}

impl TryFrom<v1::Rewrite> for m::Rewrite {
    type Error = Malformed;

    fn try_from(r: v1::Rewrite) -> Result<Self, Malformed> {
        Ok(Self { host: Some(r.host).filter(|h| !h.is_empty()), path: some(r.path)? })
    }
}

fn status(field: &'static str, status: u32, of: std::ops::Range<u32>) -> Result<u16, Malformed> {
    of.contains(&status).then_some(status as u16).ok_or_else(|| invalid(field, status))
}

impl From<m::Fraction> for v1::Fraction {
    fn from(f: m::Fraction) -> Self {
        Self { numerator: f.numerator, denominator: f.denominator }
    }
}

impl TryFrom<v1::Fraction> for m::Fraction {
    type Error = Malformed;

    fn try_from(f: v1::Fraction) -> Result<Self, Malformed> {
        Self::new(f.numerator, f.denominator).ok_or_else(|| invalid("fraction", f))
    }
}

impl From<&m::Retry> for v1::Retry {
    fn from(r: &m::Retry) -> Self {
        Self { codes: r.codes.iter().map(|c| (*c).into()).collect(), attempts: r.attempts, backoff_ms: r.backoff_ms }
    }
}

impl TryFrom<v1::Retry> for m::Retry {
    type Error = Malformed;

    fn try_from(r: v1::Retry) -> Result<Self, Malformed> {
        let code = |c: u32| status("retried status", c, 400..600);
        Ok(Self {
            codes: r.codes.into_iter().map(code).collect::<Result<_, _>>()?,
            attempts: r.attempts,
            backoff_ms: r.backoff_ms,
        })
    }
}

impl From<&m::Sticky> for v1::Sticky {
    fn from(s: &m::Sticky) -> Self {
        use v1::sticky::By;
        Self {
            by: Some(match s {
                m::Sticky::Cookie(name) => By::Cookie(name.clone()),
                m::Sticky::Header(name) => By::Header(name.clone()),
            }),
        }
    }
}

impl TryFrom<v1::Sticky> for m::Sticky {
    type Error = Malformed;

    fn try_from(s: v1::Sticky) -> Result<Self, Malformed> {
        use v1::sticky::By;
        Ok(match required(s.by, "what a user is recognized by")? {
            By::Cookie(name) => Self::Cookie(name),
            By::Header(name) => Self::Header(name),
        })
    }
}

impl From<&m::Fault> for v1::Fault {
    fn from(f: &m::Fault) -> Self {
        Self {
            delay_ms: f.delay.map_or(0, |(ms, _)| ms),
            delayed: f.delay.map(|(_, share)| share.into()),
            abort_status: f.abort.map_or(0, |(status, _)| status.into()),
            aborted: f.abort.map(|(_, share)| share.into()),
        }
    }
}

impl TryFrom<v1::Fault> for m::Fault {
    type Error = Malformed;

    fn try_from(f: v1::Fault) -> Result<Self, Malformed> {
        let abort = |share: v1::Fraction| {
            Ok::<_, Malformed>((status("abort status", f.abort_status, 200..600)?, share.try_into()?))
        };
        Ok(Self {
            delay: f.delayed.map(|share| Ok::<_, Malformed>((f.delay_ms, share.try_into()?))).transpose()?,
            abort: f.aborted.map(abort).transpose()?,
        })
    }
}

impl From<m::RateLimit> for v1::RateLimit {
    fn from(l: m::RateLimit) -> Self {
        Self { requests: l.requests, per_ms: l.per_ms, burst: l.burst }
    }
}

impl TryFrom<v1::RateLimit> for m::RateLimit {
    type Error = Malformed;

    fn try_from(l: v1::RateLimit) -> Result<Self, Malformed> {
        if l.per_ms == 0 {
            return Err(invalid("rate limit's interval", l.per_ms));
        }
        Ok(Self { requests: l.requests, per_ms: l.per_ms, burst: l.burst })
    }
}
