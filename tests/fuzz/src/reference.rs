//! The precedence of Gateway API (`HTTPRouteRule.matches`) written down a second time: every match of every rule is
//! looked at, and the one that wins over all others is taken. Slow, and without any order made beforehand.

use crate::{Asked, PORT, parent};
use sluice_model::{Match, PathMatch, Route, RouteKind, StringMatch};
use std::cmp::Ordering;

/// A rule by its route's name and its position there.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    Rule(String, usize),
    Own,
    NoMatch,
}

/// One host of one match that holds.
struct Candidate<'a> {
    host: Option<&'a str>,
    of: &'a Match,
    route: &'a Route,
    rule: usize,
    at: usize,
}

fn attached(routes: &[Route]) -> impl Iterator<Item = &Route> {
    routes.iter().filter(|r| r.parent == parent() && r.parent_port.is_none_or(|p| p == PORT))
}

pub fn find(routes: &[Route], asked: &Asked) -> Found {
    let any = Match::default();
    let mut best: Option<Candidate<'_>> = None;
    let mut rules = 0;
    for route in attached(routes).filter(|r| r.kind.of_requests()) {
        for (rule, r) in route.rules.iter().enumerate() {
            rules += 1;
            let matches = if r.matches.is_empty() { std::slice::from_ref(&any) } else { &r.matches };
            for (at, of) in matches.iter().enumerate() {
                let hosts: Vec<_> =
                    if of.hosts.is_empty() { vec![None] } else { of.hosts.iter().map(|h| Some(h.as_str())).collect() };
                for host in hosts.into_iter().filter(|h| holds(*h, of, asked)) {
                    let candidate = Candidate { host, of, route, rule, at };
                    if best.as_ref().is_none_or(|b| wins(&candidate, b)) {
                        best = Some(candidate);
                    }
                }
            }
        }
    }
    match best {
        Some(c) => Found::Rule(c.route.name.name.clone(), c.rule),
        None if rules == 0 => find_tcp(routes),
        None => Found::NoMatch,
    }
}

pub fn find_tcp(routes: &[Route]) -> Found {
    let of_kind = |kind: fn(RouteKind) -> bool, fits: fn(&sluice_model::Rule) -> bool| {
        let rules = attached(routes).filter(move |r| kind(r.kind));
        let rules =
            rules.flat_map(move |r| r.rules.iter().enumerate().filter(move |(_, u)| fits(u)).map(move |(i, _)| (r, i)));
        rules.min_by_key(|(r, i)| (r.created_s, r.name.clone(), *i))
    };
    let tcp = of_kind(|k| k == RouteKind::Tcp, |_| true);
    let found = tcp.or_else(|| of_kind(RouteKind::of_requests, |r| r.catch_all()));
    found.map_or(Found::Own, |(r, i)| Found::Rule(r.name.name.clone(), i))
}

fn holds(host: Option<&str>, of: &Match, asked: &Asked) -> bool {
    let path = match &of.path {
        PathMatch::Exact(p) => *p == asked.path,
        PathMatch::Regex(p) => p.matches(&asked.path),
        PathMatch::Prefix(p) => {
            let p = p.trim_end_matches('/');
            asked.path == p || asked.path.starts_with(&format!("{p}/"))
        }
    };
    let is = |wanted: &StringMatch, value: &str| match wanted {
        StringMatch::Exact(v) => v == value,
        StringMatch::Regex(p) => p.matches(value),
    };
    let headers = of.headers.iter().all(|h| asked.headers.iter().any(|(n, v)| *n == h.name && is(&h.value, v)));
    let pairs: Vec<(String, String)> = form_urlencoded::parse(asked.query.as_bytes()).into_owned().collect();
    let query = of.query.iter().all(|q| pairs.iter().find(|(n, _)| *n == q.name).is_some_and(|(_, v)| is(&q.value, v)));
    path && headers
        && query
        && of.method.as_ref().is_none_or(|m| *m == asked.method)
        && host.is_none_or(|h| host_holds(h, &asked.host))
}

fn host_holds(wanted: &str, host: &str) -> bool {
    let (wanted, host) = (wanted.to_ascii_lowercase(), host.to_ascii_lowercase());
    match wanted.strip_prefix('*') {
        None => wanted == host,
        Some("") => true,
        Some(suffix) => host.ends_with(suffix) && host != suffix,
    }
}

fn wins(a: &Candidate<'_>, b: &Candidate<'_>) -> bool {
    // More is better, then earlier is.
    let by = |rank: fn(&Candidate<'_>) -> (usize, usize, u8, usize, bool, usize, usize)| rank(a).cmp(&rank(b));
    let age = |c: &Candidate<'_>| (c.route.created_s, c.route.name.clone(), c.rule, c.at);
    match by(rank) {
        Ordering::Equal => age(a) < age(b),
        order => order == Ordering::Greater,
    }
}

/// Characters of an exact name, then of any name; exact paths, then expressions, then prefixes; their characters; a method;
/// headers; the query.
fn rank(c: &Candidate<'_>) -> (usize, usize, u8, usize, bool, usize, usize) {
    let host = c.host.filter(|h| *h != "*");
    let exact_host = host.filter(|h| !h.starts_with('*')).map_or(0, str::len);
    let (class, length) = match &c.of.path {
        PathMatch::Exact(_) => (2, 0),
        PathMatch::Regex(p) => (1, p.as_str().len()),
        PathMatch::Prefix(p) => (0, p.trim_end_matches('/').len()),
    };
    (exact_host, host.map_or(0, str::len), class, length, c.of.method.is_some(), c.of.headers.len(), c.of.query.len())
}
