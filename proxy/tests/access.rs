//! Who may come in, and what can be seen of requests: policies, taps, access log, traces and the admin server, through real
//! sidecars.

mod common;

use common::*;
use serde_json::Value;
use sluice_model::*;
use sluice_proxy::{
    observe::{self, Access},
    run::{Listen, Running, Settings},
};
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    time::Duration,
};

fn web(addresses: &[SocketAddr]) -> Vec<Resource> {
    service("web", "10.96.0.1", AppProtocol::Detect, addresses)
}

fn inbound(app: SocketAddr, policy: Policy) -> Running {
    let listen = Listen::At { outbound: vec![], inbound: vec![(LOCAL, app)] };
    let policy = Policy { name: Name::new("shop", "client"), ..policy };
    Running::start(Settings { listen, ..settings(vec![Resource::Policy(policy)]) }).expect("the sidecar starts")
}

fn rule(action: Action, audit: bool, from: Vec<Caller>, to: Vec<Operation>) -> AccessRule {
    AccessRule { policy: Name::new("shop", "p"), action, audit, from, to }
}

fn paths(path: &str) -> Vec<Operation> {
    vec![Operation { paths: vec![PathMatch::Prefix(path.into())], ..Operation::default() }]
}

fn ready(running: &Running) {
    eventually("the first config is in force", || running.status.borrow().missing().is_empty());
}

#[test]
fn what_is_denied_is_answered_so_and_connections_are_reset() {
    let app = start("v1");
    let running = inbound(
        app.address,
        Policy { access: vec![rule(Action::Deny, false, vec![], paths("/admin"))], ..Policy::default() },
    );
    ready(&running);
    let mut client = Client::connect(running.inbound[0]);
    assert_eq!(client.get("/x").status, 200);
    let denied = client.get("/admin/x");
    assert_eq!((denied.status, denied.reason()), (403, "denied"));
    assert_eq!(app.seen(), 1);
    running.stop();

    let nobody = vec![Caller { namespace: Some("shop".into()), identity: None }];
    let running = inbound(
        app.address,
        Policy { access: vec![rule(Action::Allow, false, nobody.clone(), vec![])], ..Policy::default() },
    );
    ready(&running);
    assert_eq!(Client::connect(running.inbound[0]).get("/").reason(), "denied", "a plain caller is nobody");
    let mut bytes = Client::connect(running.inbound[0]);
    bytes.send("\x01\x02 not http at all");
    assert!(bytes.ended());
    running.stop();

    let running =
        inbound(app.address, Policy { access: vec![rule(Action::Allow, true, nobody, vec![])], ..Policy::default() });
    ready(&running);
    assert_eq!(Client::connect(running.inbound[0]).get("/").status, 200, "on trial");
    assert_eq!(scrape(&running).audited, 1);
    running.stop();
}

#[test]
fn what_comes_in_is_limited() {
    let app = start("v1");
    let limit = InboundLimit {
        policy: Name::new("shop", "p"),
        from: vec![],
        to: paths("/api"),
        limit: RateLimit { requests: 1, per_ms: 60_000, burst: 2 },
        per_identity: true,
    };
    let running = inbound(app.address, Policy { rate_limits: vec![limit], ..Policy::default() });
    ready(&running);
    let mut client = Client::connect(running.inbound[0]);
    let statuses: Vec<u16> = (0..4).map(|_| client.get("/api/x").status).collect();
    assert_eq!(statuses, [200, 200, 429, 429]);
    assert_eq!(client.get("/other").status, 200);
    running.stop();
}

/// The answer of the admin server, without its head.
fn admin(running: &Running, request: &str) -> String {
    let mut stream = TcpStream::connect(running.admin).expect("connect");
    stream.write_all(format!("{request} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").as_bytes()).expect("ask");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    text.split_once("\r\n\r\n").expect("a head").1.to_owned()
}

/// The requests that a tap shows.
fn tap(running: &Running, query: &str) -> impl Iterator<Item = Value> + use<> {
    let mut tap = TcpStream::connect(running.admin).expect("connect");
    tap.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    tap.write_all(format!("GET /tap?{query} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).expect("ask");
    let mut lines = BufReader::new(tap).lines().map_while(Result::ok);
    assert!(lines.next().expect("a status line").contains("200"));
    lines.filter(|l| l.starts_with('{')).map(|l| serde_json::from_str(&l).expect("JSON"))
}

/// Both what had no answer in its route's time and what had half of one.
#[test]
fn a_tap_says_what_took_too_long() {
    for (address, path, status) in [(start("v1").address, "/slow", 504), (half_answering(), "/half", 200)] {
        let timeouts = Timeouts { request_ms: Some(50), backend_request_ms: None };
        let rule = Rule { timeouts, backends: vec![backend("web", 1)], ..Rule::default() };
        let running = sidecar([web(&[address]), vec![route(vec![rule])]].concat());
        let mut seen = tap(&running, "direction=outbound");
        let mut client = Client::connect(running.outbound[0]);
        client.send(format!("GET {path} HTTP/1.1\r\nhost: web\r\n\r\n"));
        assert!(client.take_until("\r\n\r\n").expect("a head").starts_with(&format!("HTTP/1.1 {status} ")));
        let e = seen.next().expect("a request");
        assert_eq!((&e["path"], &e["status"]), (&Value::from(path), &Value::from(status)), "{e}");
        assert_eq!(e["reason"], "route_timeout", "{e}");
        running.stop();
    }
}

#[test]
fn a_tap_shows_what_it_is_asked_for() {
    let (one, two) = (start("v1"), nowhere());
    let resources = [
        web(&[one.address]),
        service("v2", "10.96.0.2", AppProtocol::Detect, &[two]),
        vec![route(vec![
            Rule {
                matches: vec![Match { path: PathMatch::Prefix("/v2".into()), ..Match::default() }],
                backends: vec![backend("v2", 1)],
                ..Rule::default()
            },
            Rule { backends: vec![backend("web", 1)], ..Rule::default() },
        ])],
    ];
    let running = sidecar(resources.concat());
    let mut seen = tap(&running, "status=5xx");
    let mut client = Client::connect(running.outbound[0]);
    assert_eq!(client.get("/well").status, 200);
    assert_eq!(client.ask("GET", "/v2/x", "authorization: secret\r\n").status, 503);
    let e = seen.next().expect("a request");
    for (field, wanted) in [
        ("path", "/v2/x"),
        ("method", "GET"),
        ("host", "web"),
        ("reason", "connect_failed"),
        ("route", "shop/web-route"),
        ("backend", "shop/v2"),
        ("direction", "outbound"),
    ] {
        assert_eq!(e[field], wanted, "{field}: {e}");
    }
    assert_eq!((&e["status"], e.get("headers")), (&Value::from(503), None), "headers are not shown unless they may be");
    running.stop();
}

#[test]
fn the_admin_server_tells_what_is_in_force() {
    let app = start("v1");
    let resources = [
        with_policy(web(&[app.address]), BackendPolicy { slow_start_ms: 7, ..BackendPolicy::default() }),
        vec![split(&[("web", 1)])],
    ];
    let running = sidecar(resources.concat());
    assert_eq!(Client::connect(running.outbound[0]).get("/").status, 200);
    let json = |path: &str| serde_json::from_str::<Value>(&admin(&running, &format!("GET {path}"))).expect(path);
    let compiled = json("/compiled");
    assert_eq!(compiled["targets"][0]["rules"][0]["route"], "shop/web-route");
    assert_eq!(compiled["backends"][0]["policy"]["slow_start_ms"], 7);
    let pools = json("/pools");
    assert_eq!(pools[0]["endpoint"], app.address.to_string());
    eventually("its connection is idle", || json("/pools")[0]["idle"] == 1);
    assert_eq!(json("/access")["log"], "off");
    assert_eq!(admin(&running, "PUT /access?log=errors").trim(), r#"{"log":"errors"}"#);
    assert_eq!(json("/access")["log"], "errors");
    assert!(admin(&running, "PUT /access?log=loud").contains("not off, errors or all"));
    assert!(admin(&running, "GET /tap?paht=/").contains("not known"));
    assert!(admin(&running, "GET /nothing").contains("/ready"));
    running.stop();
}

/// A collector that hands over each body it is sent.
fn collector() -> (SocketAddr, mpsc::Receiver<String>) {
    let listener = TcpListener::bind(LOCAL).expect("bind");
    let (address, (bodies, received)) = (listener.local_addr().expect("an address"), mpsc::channel());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut reader = BufReader::new(&stream);
            let mut length = 0;
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
                    break;
                }
                if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = n.trim().parse().expect("a length");
                }
            }
            let mut body = vec![0; length];
            if reader.read_exact(&mut body).is_ok() {
                let _ = bodies.send(String::from_utf8(body).expect("text"));
                let _ = (&stream).write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}");
            }
        }
    });
    (address, received)
}

#[test]
fn traces_go_on_and_spans_are_sent() {
    let (app, (collector, bodies)) = (start("v1"), collector());
    let observe = observe::Settings {
        otlp: Some(format!("http://{collector}/v1/traces").parse().expect("a URI")),
        sampled: 0.0,
        access: Access::Off,
        tap_headers: false,
    };
    let running = Running::start(Settings { observe, ..settings(web(&[app.address])) }).expect("starts");
    let mut client = Client::connect(running.outbound[0]);
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let seen = client.ask("GET", "/head", &format!("traceparent: 00-{trace}-b7ad6b7169203331-01\r\n")).body;
    let line = seen.lines().find(|l| l.to_ascii_lowercase().starts_with("traceparent:")).expect("passed on");
    assert!(line.contains(trace) && !line.contains("b7ad6b7169203331") && line.ends_with("-01"), "{line}");
    assert_eq!(client.get("/not-sampled").status, 200);
    let body = bodies.recv_timeout(Duration::from_secs(10)).expect("a batch");
    let body: Value = serde_json::from_str(&body).expect("JSON");
    let spans = body["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().expect("spans");
    assert_eq!(spans.len(), 1, "what is not sampled is not sent: {spans:?}");
    assert_eq!((&spans[0]["traceId"], &spans[0]["parentSpanId"]), (&trace.into(), &"b7ad6b7169203331".into()));
    assert!(line.contains(spans[0]["spanId"].as_str().expect("an id")), "the app sees this span as its parent");
    running.stop();
}

#[test]
fn without_a_collector_trace_headers_pass_untouched() {
    let app = start("v1");
    let running = sidecar(web(&[app.address]));
    let header = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let seen = Client::connect(running.outbound[0]).ask("GET", "/head", &format!("{header}\r\nb3: 1\r\n")).body;
    assert!(seen.to_ascii_lowercase().contains(header) && seen.to_ascii_lowercase().contains("b3: 1"), "{seen}");
    running.stop();
}
