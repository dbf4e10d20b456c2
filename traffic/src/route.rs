//! Which rule takes a request: the routes attached to one port of a service, compiled into one immutable table in the
//! order of Gateway API's precedence (`HTTPRouteRule.matches`), so that the first entry that matches wins.
//!
//! The table answers with a rule; dividing the rule's traffic is [`crate::split`]'s work.

use sluice_model::{Backend, HeaderMatch, Match, Name, PathMatch, Route, RouteKind, StringMatch};
use std::cmp::Reverse;

/// The parts of a request that routes look at.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a, H> {
    /// Without port.
    pub host: &'a str,
    /// Without query.
    pub path: &'a str,
    pub method: &'a str,
    pub headers: &'a H,
}

/// A view of a request's headers.
pub trait Headers {
    /// Some header called `name` (lower case) has exactly this value.
    fn has(&self, name: &str, value: &str) -> bool;
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
    pub backends: Box<[Backend]>,
}

/// All routes attached to one port of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    rules: Box<[TableRule]>,
    entries: Box<[Entry]>,
    /// What connections follow that are not HTTP.
    tcp: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    host: Host,
    path: PathMatch,
    method: Option<Box<str>>,
    headers: Box<[HeaderMatch]>,
    rule: usize,
}

/// In order of precedence: exact names before wildcards, longer before shorter, any last.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    Exact(Box<str>),
    /// The part after `*`, with its leading dot.
    Suffix(Box<str>),
    Any,
}

impl Table {
    /// Compiles those of `routes` that are attached to `service`'s `port`.
    pub fn compile<'a>(routes: impl IntoIterator<Item = &'a Route>, service: &Name, port: u16) -> Self {
        let attached = |r: &&Route| r.parent == *service && r.parent_port.is_none_or(|p| p == port);
        let mut routes: Vec<&Route> = routes.into_iter().filter(attached).collect();
        // Age decides between equals, so the stable sort of entries below keeps the order made here.
        routes.sort_by_key(|r| (r.created_s, &r.name));
        let mut rules = Vec::new();
        let mut entries = Vec::new();
        let (mut tcp, mut http_catch_all) = (None, None);
        for route in routes {
            for (position, rule) in route.rules.iter().enumerate() {
                let index = rules.len();
                match route.kind {
                    RouteKind::Tcp => tcp = tcp.or(Some(index)),
                    RouteKind::Http => {
                        http_catch_all = http_catch_all.or(rule.catch_all().then_some(index));
                        entries.extend(rule_entries(&rule.matches, index));
                    }
                }
                rules.push(TableRule {
                    route: route.name.clone(),
                    position,
                    backends: rule.backends.as_slice().into(),
                });
            }
        }
        entries.sort_by_cached_key(Entry::rank);
        Self { rules: rules.into(), entries: entries.into(), tcp: tcp.or(http_catch_all) }
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
        rule,
    };
    if m.hosts.is_empty() {
        return vec![entry(Host::Any)];
    }
    m.hosts.iter().map(|h| entry(Host::parse(h))).collect()
}

impl Host {
    fn parse(text: &str) -> Self {
        match text.strip_prefix('*') {
            Some("") => Self::Any,
            Some(suffix) => Self::Suffix(suffix.to_ascii_lowercase().into()),
            None => Self::Exact(text.to_ascii_lowercase().into()),
        }
    }

    /// Characters of a name without wildcard, then of any name: Gateway API's order.
    fn rank(&self) -> (Reverse<usize>, Reverse<usize>) {
        match self {
            Self::Exact(h) => (Reverse(h.len()), Reverse(h.len())),
            Self::Suffix(s) => (Reverse(0), Reverse(s.len() + 1)),
            Self::Any => (Reverse(0), Reverse(0)),
        }
    }

    fn matches(&self, host: &str) -> bool {
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
type Rank = ((Reverse<usize>, Reverse<usize>), bool, Reverse<usize>, bool, Reverse<usize>);

impl Entry {
    fn rank(&self) -> Rank {
        let (not_exact, length) = match &self.path {
            PathMatch::Exact(_) => (false, 0),
            PathMatch::Prefix(p) => (true, p.trim_end_matches('/').len()),
        };
        (self.host.rank(), not_exact, Reverse(length), self.method.is_none(), Reverse(self.headers.len()))
    }

    fn matches<H: Headers>(&self, r: &Request<'_, H>) -> bool {
        self.host.matches(r.host)
            && path_matches(&self.path, r.path)
            && self.method.as_deref().is_none_or(|m| m == r.method)
            && self.headers.iter().all(|h| header_matches(h, r.headers))
    }
}

fn header_matches<H: Headers>(wanted: &HeaderMatch, headers: &H) -> bool {
    match &wanted.value {
        StringMatch::Exact(value) => headers.has(&wanted.name, value),
    }
}

/// A prefix takes whole path elements; a slash at its end is ignored.
fn path_matches(wanted: &PathMatch, path: &str) -> bool {
    match wanted {
        PathMatch::Exact(p) => p == path,
        PathMatch::Prefix(p) => {
            let rest = path.strip_prefix(p.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        }
    }
}

#[cfg(test)]
#[path = "route_tests.rs"]
mod tests;
