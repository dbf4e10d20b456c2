//! Which rule takes a request: the routes attached to one port of a service, compiled into one immutable table in the
//! order of Gateway API's precedence (`HTTPRouteRule.matches`), so that the first entry that matches wins.
//!
//! The table answers with a rule; dividing the rule's traffic is [`crate::split`]'s work.

use sluice_model::{HeaderMatch, Match, Name, PathMatch, QueryMatch, Route, RouteKind, Rule, StringMatch};
use std::cmp::Reverse;

/// The parts of a request that routes look at.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a, H> {
    /// Without port.
    pub host: &'a str,
    /// Without query.
    pub path: &'a str,
    /// What follows the path's `?`, encoded; empty without one.
    pub query: &'a str,
    pub method: &'a str,
    pub headers: &'a H,
}

/// A view of a request's headers.
pub trait Headers {
    /// Some header called `name` (lower case) has a value that passes `test`.
    fn any(&self, name: &str, test: &mut dyn FnMut(&[u8]) -> bool) -> bool;
}

/// What the table says about a request or connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Index into [`Table::rules`].
    Rule(usize),
    /// No route is attached: the service's own endpoints take it.
    Own,
    /// Routes are attached and none matches: the request is refused (Gateway API: 404).
    NoMatch,
}

/// A rule of one of the routes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableRule {
    pub route: Name,
    /// Position in the route's list of rules.
    pub position: usize,
    pub rule: Rule,
}

/// All routes attached to one port of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    rules: Box<[TableRule]>,
    entries: Box<[Entry]>,
    /// By the name that a TLS connection asks for, in order of precedence.
    names: Box<[(Host, usize)]>,
    /// What connections follow that are not HTTP.
    tcp: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    host: Host,
    path: PathMatch,
    method: Option<Box<str>>,
    headers: Box<[HeaderMatch]>,
    query: Box<[QueryMatch]>,
    rule: usize,
}

/// In order of precedence: exact names before wildcards, longer before shorter, any last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    Exact(Box<str>),
    /// The part after `*`, with its leading dot.
    Suffix(Box<str>),
    Any,
}

impl Table {
    /// Compiles those of `routes` that are attached to `service`'s `port`.
    pub fn compile<'a>(routes: impl IntoIterator<Item = &'a Route>, service: &Name, port: u16) -> Self {
        let mut routes: Vec<&Route> = routes.into_iter().filter(|r| r.attached(service, port)).collect();
        // Age decides between equals, so the stable sort of entries below keeps the order made here.
        routes.sort_by_key(|r| (r.created_s, &r.name));
        let mut rules = Vec::new();
        let mut entries = Vec::new();
        let mut names: Vec<(Host, usize)> = Vec::new();
        let (mut tcp, mut http_catch_all) = (None, None);
        for route in routes {
            for (position, rule) in route.rules.iter().enumerate() {
                let index = rules.len();
                match route.kind {
                    RouteKind::Tcp => tcp = tcp.or(Some(index)),
                    RouteKind::Tls => names.extend(rule_names(&rule.matches, index)),
                    RouteKind::Http | RouteKind::Grpc => {
                        http_catch_all = http_catch_all.or(rule.catch_all().then_some(index));
                        entries.extend(rule_entries(&rule.matches, index));
                    }
                }
                rules.push(TableRule { route: route.name.clone(), position, rule: rule.clone() });
            }
        }
        entries.sort_by_cached_key(Entry::rank);
        names.sort_by_key(|(host, _)| host.rank());
        Self { rules: rules.into(), entries: entries.into(), names: names.into(), tcp: tcp.or(http_catch_all) }
    }

    pub fn rules(&self) -> &[TableRule] {
        &self.rules
    }

    /// The rule of an HTTP request. Where only TCP routes are attached, those count.
    pub fn find<H: Headers>(&self, request: &Request<'_, H>) -> Decision {
        if self.entries.is_empty() {
            return self.find_tcp();
        }
        match self.entries.iter().find(|e| e.matches(request)) {
            Some(entry) => Decision::Rule(entry.rule),
            None => Decision::NoMatch,
        }
    }

    /// The rule of a connection that is not HTTP: the oldest TCP route's first, else the catch-all rule of the oldest
    /// HTTP route that has one.
    pub fn find_tcp(&self) -> Decision {
        self.tcp.map_or(Decision::Own, Decision::Rule)
    }

    /// The rule of a TLS connection of the app's own that asks for the server called `name` (SNI; empty: none). Names that
    /// no TLS route has go on as connections that are not HTTP.
    pub fn find_tls(&self, name: &str) -> Decision {
        match self.names.iter().find(|(host, _)| host.matches(name)) {
            Some((_, rule)) => Decision::Rule(*rule),
            None => self.find_tcp(),
        }
    }
}

impl Table {
    /// Some rule looks at the name that TLS connections ask for.
    pub fn has_names(&self) -> bool {
        !self.names.is_empty()
    }
}

fn rule_names(matches: &[Match], rule: usize) -> Vec<(Host, usize)> {
    let hosts: Vec<&String> = matches.iter().flat_map(|m| &m.hosts).collect();
    if hosts.is_empty() {
        return vec![(Host::Any, rule)];
    }
    hosts.into_iter().map(|h| (Host::parse(h), rule)).collect()
}

fn rule_entries(matches: &[Match], rule: usize) -> Vec<Entry> {
    if matches.is_empty() {
        return match_entries(&Match::default(), rule);
    }
    matches.iter().flat_map(|m| match_entries(m, rule)).collect()
}

/// One entry per host: precedence depends on the host that matched.
fn match_entries(m: &Match, rule: usize) -> Vec<Entry> {
    let entry = |host| Entry {
        host,
        path: m.path.clone(),
        method: m.method.as_deref().map(Into::into),
        headers: m.headers.as_slice().into(),
        query: m.query.as_slice().into(),
        rule,
    };
    if m.hosts.is_empty() {
        return vec![entry(Host::Any)];
    }
    m.hosts.iter().map(|h| entry(Host::parse(h))).collect()
}

impl Host {
    pub fn parse(text: &str) -> Self {
        match text.strip_prefix('*') {
            Some("") => Self::Any,
            Some(suffix) => Self::Suffix(suffix.to_ascii_lowercase().into()),
            None => Self::Exact(text.to_ascii_lowercase().into()),
        }
    }

    /// Characters of a name without wildcard, then of any name: Gateway API's order.
    pub fn rank(&self) -> (Reverse<usize>, Reverse<usize>) {
        match self {
            Self::Exact(h) => (Reverse(h.len()), Reverse(h.len())),
            Self::Suffix(s) => (Reverse(0), Reverse(s.len() + 1)),
            Self::Any => (Reverse(0), Reverse(0)),
        }
    }

    pub fn matches(&self, host: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(h) => h.eq_ignore_ascii_case(host),
            // The star stands for at least one label, so the name is longer than the suffix.
            Self::Suffix(s) => {
                let (name, suffix) = (host.as_bytes(), s.as_bytes());
                name.len() > suffix.len() && name[name.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
            }
        }
    }
}

/// Smaller wins. Equal ranks keep the order of age, rule and match.
type Rank = ((Reverse<usize>, Reverse<usize>), u8, Reverse<usize>, bool, Reverse<usize>, Reverse<usize>);

impl Entry {
    fn rank(&self) -> Rank {
        // Where expressions stand is left open by Gateway API: after exact paths, before prefixes, longer text first, so
        // that a rule for everything does not hide them.
        let (class, length) = match &self.path {
            PathMatch::Exact(_) => (0, 0),
            PathMatch::Regex(p) => (1, p.as_str().len()),
            PathMatch::Prefix(p) => (2, p.trim_end_matches('/').len()),
        };
        let (headers, query) = (Reverse(self.headers.len()), Reverse(self.query.len()));
        (self.host.rank(), class, Reverse(length), self.method.is_none(), headers, query)
    }

    fn matches<H: Headers>(&self, r: &Request<'_, H>) -> bool {
        self.host.matches(r.host)
            && path_matches(&self.path, r.path)
            && self.method.as_deref().is_none_or(|m| m == r.method)
            && self.headers.iter().all(|h| header_matches(h, r.headers))
            && self.query.iter().all(|q| query_matches(q, r.query))
    }
}

fn header_matches<H: Headers>(wanted: &HeaderMatch, headers: &H) -> bool {
    headers.any(&wanted.name, &mut |value| match &wanted.value {
        StringMatch::Exact(exact) => value == exact.as_bytes(),
        StringMatch::Regex(pattern) => std::str::from_utf8(value).is_ok_and(|v| pattern.matches(v)),
    })
}

/// Names and values are compared decoded, as an app sees them (URL standard, application/x-www-form-urlencoded).
fn query_matches(wanted: &QueryMatch, query: &str) -> bool {
    let first = form_urlencoded::parse(query.as_bytes()).find(|(name, _)| *name == wanted.name);
    first.is_some_and(|(_, value)| match &wanted.value {
        StringMatch::Exact(exact) => value == exact.as_str(),
        StringMatch::Regex(pattern) => pattern.matches(&value),
    })
}

/// A prefix takes whole path elements; a slash at its end is ignored.
pub fn path_matches(wanted: &PathMatch, path: &str) -> bool {
    match wanted {
        PathMatch::Exact(p) => p == path,
        PathMatch::Regex(p) => p.matches(path),
        PathMatch::Prefix(p) => {
            let rest = path.strip_prefix(p.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        }
    }
}

#[cfg(test)]
#[path = "route_tests.rs"]
mod tests;
