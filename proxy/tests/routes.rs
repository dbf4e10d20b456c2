//! What a rule asks of its requests, through a real sidecar: filters, redirects, mirrors, timeouts, retries, stickiness,
//! faults and limits.

mod common;

use common::*;
use sluice_model::*;
use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

fn web(addresses: &[SocketAddr]) -> Vec<Resource> {
    service("web", "10.96.0.1", AppProtocol::Detect, addresses)
}

fn v2(addresses: &[SocketAddr]) -> Vec<Resource> {
    service("v2", "10.96.0.2", AppProtocol::Detect, addresses)
}

/// A rule to `web`, with what the test asks of it.
fn rule(rule: Rule) -> Resource {
    let backends = if rule.backends.is_empty() { vec![backend("web", 1)] } else { rule.backends };
    route(vec![Rule { backends, ..rule }])
}

fn pair(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

/// An app that answers each request with the next of its statuses (the last one over and over), and keeps what it got.
struct Script {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Script {
    fn start(statuses: &'static [u16]) -> Self {
        let listener = TcpListener::bind(LOCAL).expect("bind");
        let (address, seen) = (listener.local_addr().expect("an address"), Arc::new(Mutex::new(Vec::new())));
        let (all, count) = (seen.clone(), Arc::new(AtomicUsize::new(0)));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (all, count) = (all.clone(), count.clone());
                std::thread::spawn(move || Self::serve(stream, statuses, &all, &count));
            }
        });
        Self { address, seen }
    }

    fn serve(mut stream: std::net::TcpStream, statuses: &[u16], all: &Mutex<Vec<String>>, count: &AtomicUsize) {
        let mut bytes = Vec::new();
        let mut part = [0; 4096];
        loop {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let head = text.find("\r\n\r\n").map(|at| at + 4);
            let length = |head: &str| {
                head.to_ascii_lowercase()
                    .split("content-length: ")
                    .nth(1)
                    .and_then(|l| l.split("\r\n").next()?.parse().ok())
            };
            let chunked = |at: usize| text[..at].contains("transfer-encoding: chunked");
            let last = |at: usize| text[at..].find("0\r\n\r\n").map(|end| at + end + 5);
            let whole = head.and_then(|at| match chunked(at) {
                true => last(at),
                false => Some(at + length(&text[..at]).unwrap_or(0usize)),
            });
            if whole.is_some_and(|w| bytes.len() >= w) {
                let message: Vec<u8> = bytes.drain(..whole.expect("it is whole")).collect();
                all.lock().expect("a lock").push(String::from_utf8_lossy(&message).into_owned());
                let at = count.fetch_add(1, Ordering::SeqCst).min(statuses.len() - 1);
                // 0: no answer, and the connection ends.
                if statuses[at] == 0 {
                    return;
                }
                let answer = format!("HTTP/1.1 {} X\r\nx-app: yes\r\ncontent-length: 2\r\n\r\nok", statuses[at]);
                if stream.write_all(answer.as_bytes()).is_err() {
                    return;
                }
                continue;
            }
            match stream.read(&mut part) {
                Ok(0) | Err(_) => return,
                Ok(n) => bytes.extend_from_slice(&part[..n]),
            }
        }
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().expect("a lock").clone()
    }
}

#[test]
fn heads_are_changed_on_the_way_there_and_back() {
    let app = Script::start(&[200]);
    let filters = Filters {
        request_headers: HeaderChanges {
            set: vec![pair("x-set", "new")],
            add: vec![pair("x-add", "2")],
            remove: vec!["x-gone".into()],
        },
        response_headers: HeaderChanges {
            set: vec![pair("x-app", "changed")],
            add: vec![pair("x-more", "1")],
            remove: vec![],
        },
        rewrite: Some(Rewrite { host: Some("other.example".into()), path: Some(PathChange::Prefix("/new".into())) }),
        ..Filters::default()
    };
    let of_backend = Filters {
        request_headers: HeaderChanges { set: vec![pair("x-backend", "b")], ..HeaderChanges::default() },
        ..Filters::default()
    };
    let matches = vec![Match { path: PathMatch::Prefix("/old".into()), ..Match::default() }];
    let to = sluice_model::Backend { filters: of_backend, ..backend("web", 1) };
    let running = sidecar(
        [web(&[app.address]), vec![rule(Rule { matches, filters, backends: vec![to], ..Rule::default() })]].concat(),
    );
    let mut client = Client::connect(running.outbound[0]);
    let answer = client.ask("GET", "/old/x?q=1", "x-set: old\r\nx-add: 1\r\nx-gone: 1\r\n");
    assert_eq!((answer.header("x-app"), answer.header("x-more")), (Some("changed"), Some("1")));
    let seen = app.seen().remove(0).to_ascii_lowercase();
    assert!(seen.starts_with("get /new/x?q=1 http/1.1\r\n"), "{seen}");
    for line in ["host: other.example", "x-set: new", "x-add: 1", "x-add: 2", "x-backend: b"] {
        assert!(seen.contains(&format!("{line}\r\n")), "{line} not in {seen}");
    }
    assert!(!seen.contains("x-gone") && !seen.contains("x-set: old"), "{seen}");
    running.stop();
}

#[test]
fn a_redirect_is_answered_without_a_backend() {
    let app = Script::start(&[200]);
    let redirect = Redirect {
        scheme: Some("https".into()),
        host: None,
        port: None,
        path: Some(PathChange::Full("/there".into())),
        status: 308,
    };
    let filters = Filters { redirect: Some(redirect), ..Filters::default() };
    let moved = Rule { filters, ..Rule::default() };
    let running = sidecar([web(&[app.address]), vec![route(vec![moved])]].concat());
    let answer = Client::connect(running.outbound[0]).get("/here?q=1");
    assert_eq!((answer.status, answer.header("location")), (308, Some("https://web/there?q=1")));
    assert_eq!(answer.reason(), "redirect");
    assert!(app.seen().is_empty());
    running.stop();
}

#[test]
fn a_mirror_gets_a_copy_and_nobody_waits_for_it() {
    let (app, copy) = (Script::start(&[200]), Script::start(&[500]));
    let mirror = |share| Mirror { service: Name::new("shop", "v2"), port: 80, share };
    let rules = |share| {
        rule(Rule { filters: Filters { mirrors: vec![mirror(share)], ..Filters::default() }, ..Rule::default() })
    };
    let running = sidecar([web(&[app.address]), v2(&[copy.address]), vec![rules(Fraction::ALL)]].concat());
    let mut client = Client::connect(running.outbound[0]);
    client.send("POST /a HTTP/1.1\r\nhost: web\r\ncontent-length: 5\r\n\r\nhello");
    assert_eq!(client.answer(false).expect("an answer").status, 200, "the mirror's 500 is thrown away");
    assert_eq!(client.get("/b").status, 200);
    eventually("both copies have arrived", || copy.seen().len() == 2);
    let seen = copy.seen();
    assert!(seen.iter().any(|m| m.starts_with("POST /a ") && m.ends_with("\r\n\r\nhello")), "{seen:?}");
    running.stop();

    let (half, nobody) = (Fraction { numerator: 1, denominator: 2 }, nowhere());
    let before = copy.seen().len();
    let running = sidecar([web(&[app.address]), v2(&[copy.address]), vec![rules(half)]].concat());
    let mut client = Client::connect(running.outbound[0]);
    (0..400).for_each(|_| assert_eq!(client.get("/").status, 200));
    eventually("about half of them", || (140..260).contains(&(copy.seen().len() - before)));
    running.stop();
    let running = sidecar([web(&[app.address]), v2(&[nobody]), vec![rules(Fraction::ALL)]].concat());
    assert_eq!(Client::connect(running.outbound[0]).get("/").status, 200, "a mirror that is down harms nobody");
    running.stop();
}

#[test]
fn times_of_a_rule_are_kept() {
    let app = start("v1");
    let ask = |timeouts: Timeouts, path: &str| {
        let running = sidecar([web(&[app.address]), vec![rule(Rule { timeouts, ..Rule::default() })]].concat());
        let began = Instant::now();
        let answer = Client::connect(running.outbound[0]).get(path);
        running.stop();
        (answer.status, answer.reason().to_owned(), began.elapsed())
    };
    let within = |request_ms, backend_request_ms| Timeouts { request_ms, backend_request_ms };
    let (status, reason, took) = ask(within(Some(50), None), "/slow");
    assert_eq!((status, reason.as_str()), (504, "route_timeout"));
    assert!(took >= Duration::from_millis(50) && took < Duration::from_millis(290), "{took:?}");
    let (status, reason, _) = ask(within(None, Some(50)), "/slow");
    assert_eq!((status, reason.as_str()), (504, "try_timeout"));
    assert_eq!(ask(within(Some(5_000), Some(5_000)), "/slow").0, 200);
}

#[test]
fn an_answer_that_does_not_end_in_time_is_cut_off() {
    let timeouts = Timeouts { request_ms: Some(100), backend_request_ms: None };
    let running = sidecar([web(&[half_answering()]), vec![rule(Rule { timeouts, ..Rule::default() })]].concat());
    let mut client = Client::connect(running.outbound[0]);
    client.send("GET / HTTP/1.1\r\nhost: web\r\n\r\n");
    let head = client.take_until("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert_eq!(client.rest(), "half", "and then the connection ends");
    running.stop();
}

#[test]
fn what_a_route_wants_tried_again_is() {
    let retry =
        |codes: &[u16], attempts| Retry { codes: codes.to_vec(), attempts: Some(attempts), backoff_ms: Some(1) };
    let ask = |statuses: &'static [u16], retry: Retry, request: &str| {
        let app = Script::start(statuses);
        let running =
            sidecar([web(&[app.address]), vec![rule(Rule { retry: Some(retry), ..Rule::default() })]].concat());
        let mut client = Client::connect(running.outbound[0]);
        client.send(request);
        let status = client.answer(false).map_or(0, |a| a.status);
        running.stop();
        (status, app.seen().len())
    };
    let get = "GET / HTTP/1.1\r\nhost: web\r\n\r\n";
    let post = "POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 3\r\n\r\nabc";
    let chunked = "POST / HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
    type Case = (&'static [u16], Retry, &'static str, (u16, usize));
    let table: [Case; 7] = [
        (&[503, 503, 200], retry(&[503], 2), get, (200, 3)),
        (&[503, 503, 200], retry(&[503], 1), get, (503, 2)),
        (&[500, 200], retry(&[503], 3), get, (500, 1)),
        (&[503, 200], retry(&[503], 3), post, (200, 2)),
        (&[0, 200], retry(&[], 3), post, (200, 2)),
        (&[503, 200], retry(&[503], 0), get, (503, 1)),
        // Of a body of unknown length nothing is kept.
        (&[503, 200], retry(&[503], 3), chunked, (503, 1)),
    ];
    for (statuses, retry, request, wanted) in table {
        assert_eq!(ask(statuses, retry.clone(), request), wanted, "{statuses:?} {retry:?} {request}");
    }
}

#[test]
fn retries_end_with_their_budget() {
    let app = Script::start(&[503]);
    let retry = Retry { codes: vec![503], attempts: Some(1), backoff_ms: Some(0) };
    let policy =
        BackendPolicy { retry_budget: Some(RetryBudget { percent: 10, min_per_s: 1 }), ..BackendPolicy::default() };
    let resources =
        [with_policy(web(&[app.address]), policy), vec![rule(Rule { retry: Some(retry), ..Rule::default() })]];
    let running = sidecar(resources.concat());
    let mut client = Client::connect(running.outbound[0]);
    (0..200).for_each(|_| assert_eq!(client.get("/").status, 503));
    let tried = app.seen().len() - 200;
    // A tenth of 200, and one for each of ten seconds.
    assert!((25..=32).contains(&tried), "{tried}");
    running.stop();
}

#[test]
fn users_stay_with_their_version() {
    let (one, two) = (start("v1"), start("v2"));
    let versions = |first, second, sticky| {
        let backends = vec![backend("web", first), backend("v2", second)];
        let rule = rule(Rule { backends, sticky: Some(sticky), ..Rule::default() });
        sidecar([web(&[one.address]), v2(&[two.address]), vec![rule]].concat())
    };
    let by_header = |first, second| {
        let running = versions(first, second, Sticky::Header("x-user".into()));
        let mut client = Client::connect(running.outbound[0]);
        let of = |user: usize, client: &mut Client| {
            client.ask("GET", "/", &format!("x-user: u{user}\r\n")).version().to_owned()
        };
        let all: Vec<String> = (0..300).map(|user| of(user, &mut client)).collect();
        assert!((0..300).all(|user| of(user, &mut client) == all[user]), "the same again");
        running.stop();
        all
    };
    let (few, many) = (by_header(80, 20), by_header(40, 60));
    let on_two = |all: &[String]| all.iter().filter(|v| *v == "v2").count();
    assert!((30..90).contains(&on_two(&few)) && (140..220).contains(&on_two(&many)));
    assert!(few.iter().zip(&many).all(|(a, b)| a == "v1" || b == "v2"), "nobody went back");

    let running = versions(50, 50, Sticky::Cookie("version".into()));
    let mut counts = BTreeMap::new();
    for _ in 0..100 {
        let mut client = Client::connect(running.outbound[0]);
        let first = client.get("/");
        let set = first.header("set-cookie").expect("a cookie").to_owned();
        let cookie = set.split(';').next().expect("a pair").to_owned();
        assert!(set.starts_with("version=") && set.contains("HttpOnly"), "{set}");
        for _ in 0..3 {
            let again = client.ask("GET", "/", &format!("cookie: a=b; {cookie}\r\n"));
            assert_eq!((again.version(), again.header("set-cookie")), (first.version(), None));
        }
        *counts.entry(first.version().to_owned()).or_insert(0) += 1;
    }
    assert!(counts.values().all(|n| (25..75).contains(n)), "{counts:?}");
    running.stop();
}

#[test]
fn faults_are_injected_in_their_share() {
    let app = start("v1");
    let fault = |fault: Fault| sidecar([web(&[app.address]), vec![rule(Rule { fault, ..Rule::default() })]].concat());
    let running = fault(Fault { abort: Some((418, Fraction { numerator: 1, denominator: 4 })), delay: None });
    let mut client = Client::connect(running.outbound[0]);
    let answers: Vec<_> = (0..400).map(|_| client.get("/")).collect();
    let aborted = answers.iter().filter(|a| a.status == 418 && a.reason() == "fault_injected").count();
    assert!((60..140).contains(&aborted), "{aborted}");
    assert!(answers.iter().all(|a| a.status == 418 || a.status == 200));
    running.stop();
    let running = fault(Fault { delay: Some((80, Fraction::ALL)), abort: None });
    let began = Instant::now();
    assert_eq!(Client::connect(running.outbound[0]).get("/").status, 200);
    assert!(began.elapsed() >= Duration::from_millis(80));
    running.stop();
}

#[test]
fn rates_and_sizes_are_bounded() {
    let app = Script::start(&[200]);
    let limit = RateLimit { requests: 1, per_ms: 60_000, burst: 3 };
    let running =
        sidecar([web(&[app.address]), vec![rule(Rule { rate_limit: Some(limit), ..Rule::default() })]].concat());
    let mut client = Client::connect(running.outbound[0]);
    let statuses: Vec<u16> = (0..5).map(|_| client.get("/").status).collect();
    assert_eq!(statuses, [200, 200, 200, 429, 429]);
    assert_eq!(client.get("/").reason(), "rate_limited");
    running.stop();

    let app = Script::start(&[200]);
    let most = rule(Rule { max_body_bytes: Some(5), ..Rule::default() });
    let running = sidecar([web(&[app.address]), vec![most]].concat());
    let ask = |request: &str| {
        let mut client = Client::connect(running.outbound[0]);
        client.send(request);
        let answer = client.answer(false).expect("an answer");
        (answer.status, answer.reason().to_owned())
    };
    assert_eq!(ask("POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 5\r\n\r\n12345").0, 200);
    let refused = (413, "body_too_large".to_owned());
    assert_eq!(ask("POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 6\r\n\r\n123456"), refused);
    let chunks = "POST / HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n3\r\n123\r\n3\r\n456\r\n0\r\n\r\n";
    assert_eq!(ask(chunks), refused);
    running.stop();
}

#[test]
fn expressions_and_queries_choose_the_rule() {
    let (one, two) = (start("v1"), start("v2"));
    let value = StringMatch::Regex("[0-9]+".parse().expect("a pattern"));
    let matches = vec![Match {
        path: PathMatch::Regex("/item/[a-z]+".parse().expect("a pattern")),
        query: vec![QueryMatch { name: "n".into(), value }],
        ..Match::default()
    }];
    let special = Rule { matches, backends: vec![backend("v2", 1)], ..Rule::default() };
    let others = Rule { backends: vec![backend("web", 1)], ..Rule::default() };
    let running = sidecar([web(&[one.address]), v2(&[two.address]), vec![route(vec![special, others])]].concat());
    let mut client = Client::connect(running.outbound[0]);
    for (target, wanted) in [
        ("/item/abc?n=12", "v2"),
        ("/item/abc?n=1x", "v1"),
        ("/item/abc", "v1"),
        ("/item/a1?n=1", "v1"),
        ("/item/abc?m=1&n=7", "v2"),
    ] {
        assert_eq!(client.get(target).version(), wanted, "{target}");
    }
    running.stop();
}

#[test]
fn a_route_of_the_callers_own_namespace_takes_the_place_of_the_services() {
    let (one, two) = (start("v1"), start("v2"));
    let consumer = |namespace: &str| {
        let Resource::Route(route) = split(&[("v2", 1)]) else { unreachable!("a route") };
        Resource::Route(Route { name: Name::new(namespace, "mine"), ..route })
    };
    let seen = |caller: &str, routes: Vec<Resource>| {
        let mut settings = settings([web(&[one.address]), v2(&[two.address]), routes].concat());
        settings.workload.namespace = caller.to_owned();
        let running = sluice_proxy::run::Running::start(settings).expect("the sidecar starts");
        let version = Client::connect(running.outbound[0]).get("/").version().to_owned();
        running.stop();
        version
    };
    assert_eq!(seen("team", vec![split(&[("web", 1)]), consumer("team")]), "v2");
    assert_eq!(
        seen("shop", vec![split(&[("web", 1)]), consumer("team")]),
        "v1",
        "the service's own namespace is another"
    );
    assert_eq!(seen("third", vec![consumer("team")]), "v1", "nobody else follows it");
}
