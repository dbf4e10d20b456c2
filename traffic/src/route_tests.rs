//! Tables of Gateway API's precedence, and the compiled table against a slow reading of the same text.

use super::*;
use proptest::prelude::*;
use sluice_model::Backend;

struct Pairs(Vec<(String, String)>);

impl Headers for Pairs {
    fn any(&self, name: &str, test: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.0.iter().any(|(n, v)| n == name && test(v.as_bytes()))
    }
}

fn service() -> Name {
    Name::new("shop", "web")
}

fn backend(name: &str) -> Backend {
    Backend { service: Name::new("shop", name), port: 80, weight: 1, ..Backend::default() }
}

fn route(name: &str, created_s: i64, kind: RouteKind, rules: Vec<(Vec<Match>, &str)>) -> Route {
    let rules = rules
        .into_iter()
        .map(|(matches, to)| Rule { matches, backends: vec![backend(to)], ..Rule::default() })
        .collect();
    Route { name: Name::new("shop", name), kind, parent: service(), parent_port: None, created_s, generation: 1, rules }
}

fn prefix(p: &str) -> Match {
    Match { path: PathMatch::Prefix(p.into()), ..Match::default() }
}

fn exact(p: &str) -> Match {
    Match { path: PathMatch::Exact(p.into()), ..Match::default() }
}

fn header(name: &str, value: &str) -> HeaderMatch {
    HeaderMatch { name: name.into(), value: StringMatch::Exact(value.into()) }
}

/// The name of the backend that takes the request; "own" and "404" for the other two answers.
fn ask(table: &Table, method: &str, host: &str, path: &str, headers: &[(&str, &str)]) -> String {
    let headers = Pairs(headers.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect());
    match table.find(&Request { host, path, query: "", method, headers: &headers }) {
        Decision::Rule(i) => table.rules()[i].rule.backends[0].service.name.clone(),
        Decision::Own => "own".into(),
        Decision::NoMatch => "404".into(),
    }
}

fn compile(routes: &[Route]) -> Table {
    Table::compile(routes, &service(), 80)
}

#[test]
fn paths_methods_and_headers_in_order_of_precedence() {
    let canary = Match { headers: vec![header("x-version", "2")], ..prefix("/") };
    let canary_of_shop = Match { headers: vec![header("x-version", "2"), header("x-user", "a")], ..prefix("/") };
    let post = Match { method: Some("POST".into()), ..prefix("/") };
    let table = compile(&[route(
        "r",
        1,
        RouteKind::Http,
        vec![
            (vec![], "any"),
            (vec![canary], "canary"),
            (vec![canary_of_shop], "two-headers"),
            (vec![post], "post"),
            (vec![prefix("/cart")], "cart"),
            (vec![prefix("/cart/items/")], "items"),
            (vec![exact("/cart")], "cart-exact"),
        ],
    )]);
    let cases = [
        ("GET", "/", vec![], "any"),
        ("GET", "/cartoon", vec![], "any"),
        ("GET", "/cart", vec![], "cart-exact"),
        ("GET", "/cart/", vec![], "cart"),
        ("GET", "/cart/items", vec![], "items"),
        ("GET", "/cart/items/7", vec![("x-version", "2")], "items"),
        ("GET", "/", vec![("x-version", "2")], "canary"),
        ("GET", "/", vec![("x-version", "3")], "any"),
        ("GET", "/", vec![("x-user", "a"), ("x-version", "2")], "two-headers"),
        ("POST", "/", vec![("x-version", "2")], "post"),
    ];
    for (method, path, headers, expected) in cases {
        assert_eq!(ask(&table, method, "web", path, &headers), expected, "{method} {path} {headers:?}");
    }
}

#[test]
fn hosts_match_by_name_and_by_wildcard() {
    let host = |h: &str| Match { hosts: vec![h.into()], ..Match::default() };
    let table = compile(&[route(
        "r",
        1,
        RouteKind::Http,
        vec![
            (vec![host("*.example.com")], "wild"),
            (vec![host("*.b.example.com")], "longer"),
            (vec![host("a.example.com")], "exact"),
        ],
    )]);
    let cases = [
        ("a.example.com", "exact"),
        ("A.Example.Com", "exact"),
        ("c.example.com", "wild"),
        ("x.b.example.com", "longer"),
        ("b.example.com", "wild"),
        ("example.com", "404"),
        ("badexample.com", "404"),
        ("", "404"),
        ("é.example.com", "wild"),
        ("é", "404"),
    ];
    for (name, expected) in cases {
        assert_eq!(ask(&table, "GET", name, "/", &[]), expected, "{name}");
    }
}

#[test]
fn the_older_route_wins_between_equals_then_the_name() {
    let one = |name: &str, age, to| route(name, age, RouteKind::Http, vec![(vec![], to)]);
    assert_eq!(ask(&compile(&[one("a", 5, "young"), one("b", 3, "old")]), "GET", "", "/", &[]), "old");
    assert_eq!(ask(&compile(&[one("b", 3, "second"), one("a", 3, "first")]), "GET", "", "/", &[]), "first");
}

#[test]
fn only_attached_routes_count() {
    let mut other_port = route("a", 1, RouteKind::Http, vec![(vec![], "no")]);
    other_port.parent_port = Some(81);
    let mut other_service = route("b", 1, RouteKind::Http, vec![(vec![], "no")]);
    other_service.parent = Name::new("shop", "other");
    let table = compile(&[other_port, other_service]);
    assert_eq!(ask(&table, "GET", "", "/", &[]), "own");
    assert_eq!(table.find_tcp(), Decision::Own);
}

#[test]
fn connections_follow_tcp_routes_else_the_oldest_catch_all() {
    let tcp = route("t", 9, RouteKind::Tcp, vec![(vec![], "tcp")]);
    let special = route("s", 1, RouteKind::Http, vec![(vec![prefix("/a")], "special")]);
    let plain = route("h", 2, RouteKind::Http, vec![(vec![prefix("/a")], "a"), (vec![], "plain")]);
    let to = |table: &Table| match table.find_tcp() {
        Decision::Rule(i) => table.rules()[i].rule.backends[0].service.name.clone(),
        other => format!("{other:?}"),
    };
    assert_eq!(to(&compile(&[special.clone(), plain.clone(), tcp.clone()])), "tcp");
    assert_eq!(to(&compile(&[special.clone(), plain])), "plain");
    assert_eq!(to(&compile(std::slice::from_ref(&special))), "Own");
    assert_eq!(ask(&compile(&[tcp]), "GET", "", "/x", &[]), "tcp");
}

#[test]
fn tls_connections_go_by_name_then_like_others() {
    let named = |host: &str| vec![Match { hosts: vec![host.into()], ..Match::default() }];
    let tls = route("s", 1, RouteKind::Tls, vec![(named("*.a.c"), "any"), (named("x.a.c"), "x")]);
    let tcp = route("t", 9, RouteKind::Tcp, vec![(vec![], "tcp")]);
    let table = compile(&[tls, tcp]);
    for (name, wanted) in [("x.a.c", "x"), ("X.A.C", "x"), ("y.a.c", "any"), ("a.c", "tcp"), ("", "tcp")] {
        let Decision::Rule(i) = table.find_tls(name) else { panic!("{name}") };
        assert_eq!(table.rules()[i].rule.backends[0].service.name, wanted, "{name}");
    }
}

#[test]
fn queries_are_compared_decoded_and_by_their_first_value() {
    let query = |name: &str, value: &str| {
        let value = StringMatch::Exact(value.into());
        vec![Match { query: vec![QueryMatch { name: name.into(), value }], ..Match::default() }]
    };
    let table = compile(&[route("r", 1, RouteKind::Http, vec![(query("a b", "c&d"), "yes")])]);
    let headers = Pairs(vec![]);
    let asks = |query| table.find(&Request { host: "", path: "/", query, method: "GET", headers: &headers });
    for (query, wanted) in [("a+b=c%26d", true), ("a%20b=c%26d&a+b=x", true), ("a+b=x&a+b=c%26d", false), ("", false)] {
        assert_eq!(asks(query) == Decision::Rule(0), wanted, "{query}");
    }
}

fn holds(wanted: &StringMatch, value: &str) -> bool {
    match wanted {
        StringMatch::Exact(v) => v == value,
        StringMatch::Regex(p) => whole(p.as_str(), value),
    }
}

/// The few expressions of [`matches`], by hand: one letter class, repeated or not.
fn whole(pattern: &str, text: &str) -> bool {
    match pattern {
        "[12]" => text == "1" || text == "2",
        "/a(/[ab])*" => text.strip_prefix("/a").is_some_and(|rest| {
            rest.len() % 2 == 0 && rest.as_bytes().chunks(2).all(|c| c[0] == b'/' && (c[1] == b'a' || c[1] == b'b'))
        }),
        "/[ab]" => text == "/a" || text == "/b",
        other => panic!("no reading of {other}"),
    }
}

/// Reads the specification literally: collect all matches that hold, then compare pairwise.
fn slow(routes: &[Route], r: &Request<'_, Pairs>) -> Option<(Name, usize)> {
    let mut best: Option<(Vec<i64>, Name, usize)> = None;
    for route in routes {
        for (position, rule) in route.rules.iter().enumerate() {
            let any = [Match::default()];
            let matches = if rule.matches.is_empty() { &any[..] } else { &rule.matches };
            for (at, m) in matches.iter().enumerate() {
                for host in if m.hosts.is_empty() { vec![""] } else { m.hosts.iter().map(String::as_str).collect() } {
                    let host_holds = match host.strip_prefix("*.") {
                        Some(rest) => r
                            .host
                            .split_once('.')
                            .is_some_and(|(_, tail)| tail == rest || tail.ends_with(&format!(".{rest}"))),
                        None => host.is_empty() || host == r.host,
                    };
                    let elements = |p: &str| p.trim_end_matches('/').split('/').map(str::to_owned).collect::<Vec<_>>();
                    let (path_holds, class, length) = match &m.path {
                        PathMatch::Exact(p) => (p == r.path, 2, 0),
                        PathMatch::Prefix(p) => {
                            let path: Vec<String> = r.path.split('/').map(str::to_owned).collect();
                            (path.starts_with(&elements(p)), 0, p.trim_end_matches('/').len() as i64)
                        }
                        PathMatch::Regex(p) => (whole(p.as_str(), r.path), 1, p.as_str().len() as i64),
                    };
                    let rest_holds = m.method.as_deref().is_none_or(|x| x == r.method)
                        && m.headers
                            .iter()
                            .all(|h| r.headers.0.iter().any(|(n, v)| *n == h.name && holds(&h.value, v)))
                        && m.query.iter().all(|q| {
                            let mut pairs = r.query.split('&').map(|p| p.split_once('=').unwrap_or((p, "")));
                            pairs.find(|(n, _)| *n == q.name).is_some_and(|(_, v)| holds(&q.value, v))
                        });
                    if !(host_holds && path_holds && rest_holds) {
                        continue;
                    }
                    let plain_host = if host.starts_with('*') { 0 } else { host.len() as i64 };
                    let rank = vec![
                        plain_host,
                        host.len() as i64,
                        class,
                        length,
                        i64::from(m.method.is_some()),
                        m.headers.len() as i64,
                        m.query.len() as i64,
                        -route.created_s,
                    ];
                    let better =
                        best.as_ref().is_none_or(|(b, name, _)| rank > *b || (rank == *b && route.name < *name));
                    // Within a route the first rule and match of equal rank stay.
                    if better {
                        best = Some((rank, route.name.clone(), position));
                    }
                    let _ = at;
                }
            }
        }
    }
    best.map(|(_, name, position)| (name, position))
}

fn matches() -> impl Strategy<Value = Match> {
    let path = prop_oneof![
        Just(PathMatch::default()),
        "(/[ab]){1,3}/?".prop_map(PathMatch::Prefix),
        "(/[ab]){1,3}".prop_map(PathMatch::Exact),
        prop_oneof![Just("/a(/[ab])*"), Just("/[ab]")].prop_map(|p| PathMatch::Regex(p.parse().expect("a pattern"))),
    ];
    let value = || {
        prop_oneof!["[12]".prop_map(StringMatch::Exact), Just(StringMatch::Regex("[12]".parse().expect("a pattern")))]
    };
    let hosts = proptest::collection::vec("(\\*\\.)?([ab]\\.)?[ab]\\.c", 0..3);
    let headers = proptest::collection::btree_map("x-[ab]", value(), 0..3);
    let query = proptest::collection::btree_map("[ab]", value(), 0..2);
    let parts = (hosts, path, proptest::option::of("GET|PUT"), headers, query);
    parts.prop_map(|(hosts, path, method, headers, query)| Match {
        hosts,
        path,
        method,
        headers: headers.into_iter().map(|(name, value)| HeaderMatch { name, value }).collect(),
        query: query.into_iter().map(|(name, value)| QueryMatch { name, value }).collect(),
    })
}

fn routes() -> impl Strategy<Value = Vec<Route>> {
    let rules = proptest::collection::vec(proptest::collection::vec(matches(), 0..3), 1..4);
    let routes = proptest::collection::btree_map("[a-d]", (0i64..3, rules), 0..4);
    routes.prop_map(|m| {
        let rules = |r: &Vec<Vec<Match>>| r.iter().map(|m| (m.clone(), "x")).collect();
        m.iter().map(|(name, (age, r))| route(name, *age, RouteKind::Http, rules(r))).collect()
    })
}

proptest! {
    #[test]
    fn the_table_agrees_with_a_slow_reading(
        routes in routes(), host in "([ab]\\.){0,3}c", path in "(/[ab]){0,4}/?", method in "GET|PUT",
        headers in proptest::collection::vec(("x-[ab]", "[123]"), 0..3), query in "([ab]=[123](&[ab]=[123])?)?",
    ) {
        let headers = Pairs(headers);
        let path = if path.is_empty() { "/".to_owned() } else { path };
        let request = Request { host: &host, path: &path, query: &query, method: &method, headers: &headers };
        let table = compile(&routes);
        let got = match table.find(&request) {
            Decision::Rule(i) => Some((table.rules()[i].route.clone(), table.rules()[i].position)),
            _ => None,
        };
        prop_assert_eq!(got, slow(&routes, &request));
    }
}
