//! HTTP through the sidecar's outbound and inbound side, over real sockets: what goes where, and what stays right when
//! upstreams are not.

mod common;

use common::*;
use sluice_model::*;
use sluice_proxy::{
    control::Source,
    run::{Listen, Running, Settings},
};
use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

fn web(addresses: &[std::net::SocketAddr]) -> Vec<Resource> {
    service("web", "10.96.0.1", AppProtocol::Detect, addresses)
}

fn v2(addresses: &[std::net::SocketAddr]) -> Vec<Resource> {
    service("v2", "10.96.0.2", AppProtocol::Detect, addresses)
}

#[test]
fn splits_are_exact_over_a_hundred_thousand_requests() {
    const REQUESTS: u64 = 100_000;
    const TOGETHER: usize = 100;
    const WORKERS: usize = 2;
    let apps = ["v1", "v2", "v3"].map(start);
    let third = service("v3", "10.96.0.3", AppProtocol::Detect, &[apps[2].address]);
    for weights in [&[90, 10][..], &[99, 1], &[33, 33, 34]] {
        let named: Vec<(&str, u32)> = ["web", "v2", "v3"].into_iter().zip(weights.iter().copied()).collect();
        let resources = [web(&[apps[0].address]), v2(&[apps[1].address]), third.clone(), vec![split(&named)]].concat();
        let settings = sluice_proxy::run::Settings { workers: WORKERS, ..settings(resources) };
        let running = sluice_proxy::run::Running::start(settings).expect("the sidecar starts");
        let before = apps.each_ref().map(|a| a.seen());
        // Each at the next worker.
        let mut clients: Vec<Client> = (0..4).map(|_| Client::connect(running.outbound[0])).collect();
        let requests = "GET / HTTP/1.1\r\nhost: web\r\n\r\n".repeat(TOGETHER);
        for round in 0..REQUESTS as usize / TOGETHER {
            let client = &mut clients[round % 4];
            client.send(&requests);
            (0..TOGETHER).for_each(|_| assert_eq!(client.answer(false).expect("an answer").status, 200));
        }
        let seen: Vec<u64> = apps.iter().zip(before).map(|(a, before)| a.seen() - before).collect();
        assert_eq!(seen.iter().sum::<u64>(), REQUESTS, "each arrives once");
        for (seen, weight) in seen.iter().zip(weights) {
            let exact = REQUESTS * u64::from(*weight) / 100;
            assert!(seen.abs_diff(exact) <= (WORKERS * weights.len()) as u64, "{seen} of {exact} with {weights:?}");
        }
        println!("{weights:?}: {seen:?}");
        running.stop();
    }
}

#[test]
fn headers_and_paths_choose_the_rule() {
    let (one, two) = (start("v1"), start("v2"));
    let matching = |m: Match, to| Rule { matches: vec![m], backends: vec![backend(to, 1)], ..Rule::default() };
    let header = HeaderMatch { name: "x-canary".into(), value: StringMatch::Exact("yes".into()) };
    let rules = vec![
        matching(Match { headers: vec![header], ..Match::default() }, "v2"),
        matching(Match { path: PathMatch::Prefix("/app".into()), ..Match::default() }, "web"),
    ];
    let running = sidecar([web(&[one.address]), v2(&[two.address]), vec![route(rules)]].concat());
    let mut client = Client::connect(running.outbound[0]);
    assert_eq!(client.get("/app/x").version(), "v1");
    assert_eq!(client.ask("GET", "/", "X-Canary: yes\r\n").version(), "v2");
    let lost = client.get("/elsewhere");
    assert_eq!((lost.status, lost.reason()), (404, "no_route"));
    running.stop();
}

#[test]
fn answers_of_our_own_say_why() {
    let one = start("v1");
    let reason_of = |resources: Vec<Resource>, path: &str| {
        let running = sidecar(resources);
        let answer = Client::connect(running.outbound[0]).get(path);
        running.stop();
        (answer.status, answer.reason().to_owned())
    };
    let say = |status: u16, reason: &str| (status, reason.to_owned());
    assert_eq!(reason_of(web(&[]), "/"), say(503, "no_endpoints"));
    assert_eq!(reason_of(web(&[nowhere()]), "/"), say(503, "connect_failed"));
    let to = |name| [web(&[one.address]), vec![split(&[(name, 1)])]].concat();
    assert_eq!(reason_of(to("absent"), "/"), say(500, "no_backend"));
    let none = [web(&[one.address]), vec![split(&[("web", 0)])]].concat();
    assert_eq!(reason_of(none, "/"), say(500, "no_backend"));
    assert_eq!(reason_of(web(&[one.address]), "/close"), say(502, "upstream_closed"));
    assert_eq!(reason_of(web(&[one.address]), "/garbage"), say(502, "upstream_malformed"));
    assert_eq!(reason_of(web(&[one.address]), "/"), say(200, "none"));
}

/// Answers each request like a sidecar that could not reach its app; the count of requests.
fn pretender() -> (std::net::SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind(LOCAL).expect("bind");
    let (address, seen) = (listener.local_addr().expect("an address"), Arc::new(AtomicUsize::new(0)));
    let count = seen.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
            while lines.any(|l| l.is_empty()) {
                count.fetch_add(1, Ordering::SeqCst);
                let answer = "HTTP/1.1 503 No\r\nx-sluice-reason: app_unreachable\r\ncontent-length: 0\r\n\r\n";
                (&stream).write_all(answer.as_bytes()).expect("answer");
            }
        }
    });
    (address, seen)
}

#[test]
fn a_reason_that_an_app_made_up_is_not_believed() {
    let (one, two) = (pretender(), pretender());
    let running = sidecar(web(&[one.0, two.0]));
    let answer = Client::connect(running.outbound[0]).ask("POST", "/", "content-length: 0\r\n");
    assert_eq!((answer.status, answer.reason()), (503, "none"));
    assert_eq!(one.1.load(Ordering::SeqCst) + two.1.load(Ordering::SeqCst), 1, "sent once");
    running.stop();
    let running = inbound(one.0);
    assert_eq!(Client::connect(running.inbound[0]).get("/").reason(), "none", "nor passed on in our name");
    running.stop();
}

#[test]
fn an_address_of_the_cluster_is_not_dialled_in_the_clear_before_it_is_known() {
    let app = start("v1");
    let dial = |inside: &str| {
        let source = Source::Discovery { socket: format!("sluice-test-nobody-{}", std::process::id()) };
        let listen = Listen::At { outbound: vec![(LOCAL, app.address)], inbound: vec![] };
        let inside = [inside.parse().expect("a range")].into();
        let running = Running::start(Settings { source, listen, inside, ..settings(vec![]) }).expect("starts");
        let mut client = Client::connect(running.outbound[0]);
        client.send("GET / HTTP/1.1\r\nhost: web\r\n\r\n");
        let status = client.answer(false).map(|a| a.status);
        running.stop();
        status
    };
    assert_eq!(dial("127.0.0.0/8"), None, "refused");
    assert_eq!(dial("10.0.0.0/8"), Some(200), "outside the cluster: passed through");
}

#[test]
fn a_dead_endpoint_is_passed_over() {
    let one = start("v1");
    let running = sidecar(web(&[nowhere(), one.address]));
    for _ in 0..50 {
        // A connection each: every one may draw the dead endpoint first.
        assert_eq!(Client::connect(running.outbound[0]).get("/").status, 200);
    }
    running.stop();
}

#[test]
fn a_connection_that_the_server_closed_is_not_the_clients_problem() {
    let one = start("v1");
    let running = sidecar(web(&[one.address]));
    let mut client = Client::connect(running.outbound[0]);
    for _ in 0..200 {
        // The server closes right after its answer without saying so: the pooled connection is dead or dying.
        assert_eq!(client.get("/die").status, 200);
        assert_eq!(client.get("/").status, 200);
    }
    running.stop();
}

#[test]
fn a_restarted_server_is_found_again() {
    let one = start("v1");
    let at = one.address;
    let running = sidecar(web(&[at]));
    let mut client = Client::connect(running.outbound[0]);
    assert_eq!(client.get("/").status, 200);
    drop(one);
    assert_eq!(client.get("/").status, 503);
    let _again = sluice_bench::backend::Backend::start_at("v1", at).expect("the port is free again");
    assert_eq!(client.get("/").status, 200);
    running.stop();
}

#[test]
fn headers_of_a_hop_stay_on_their_hop() {
    let one = start("v1");
    let running = sidecar(web(&[one.address]));
    let mut client = Client::connect(running.outbound[0]);
    let headers = "connection: keep-alive, x-private\r\nx-private: 1\r\nkeep-alive: timeout=5\r\nx-kept: 2\r\n\
                   te: trailers\r\nproxy-connection: close\r\n";
    let head = client.ask("GET", "/head", headers).body.to_ascii_lowercase();
    assert!(head.contains("x-kept: 2") && head.contains("te: trailers") && head.contains("host: web"), "{head}");
    for gone in ["x-private", "keep-alive", "proxy-connection"] {
        assert!(!head.contains(gone), "{gone} in {head}");
    }
    let absolute = client.ask("GET", "http://other.example/head", "").body;
    assert!(absolute.starts_with("GET /head HTTP/1.1\r\n") && absolute.contains("host: other.example"), "{absolute}");
    running.stop();
}

#[test]
fn ambiguous_lengths_are_never_passed_on() {
    let one = start("v1");
    let running = sidecar(web(&[one.address]));
    for bad in [
        "content-length: 5\r\ncontent-length: 6\r\n",
        "content-length: +5\r\n",
        "transfer-encoding: chunked, identity\r\n",
        "x: a\r\n b: folded\r\n",
    ] {
        let mut client = Client::connect(running.outbound[0]);
        client.send(format!("POST /head HTTP/1.1\r\nhost: web\r\n{bad}\r\nabcdef"));
        let answer = client.answer(false);
        assert!(answer.as_ref().is_none_or(|a| a.status == 400), "{bad}: {answer:?}");
    }
    // Both lengths: the chunks count, and the length is not passed on.
    let mut client = Client::connect(running.outbound[0]);
    let both = "content-length: 40\r\ntransfer-encoding: chunked\r\n";
    client.send(format!("POST /head HTTP/1.1\r\nhost: web\r\n{both}\r\n0\r\n\r\n"));
    let head = client.answer(false).map(|a| a.body.to_ascii_lowercase()).unwrap_or_default();
    assert!(!head.contains("content-length"), "{head}");
    running.stop();
}

#[test]
fn bodies_stream_both_ways() {
    let one = start("v1");
    let running = sidecar(web(&[one.address]));
    let mut client = Client::connect(running.outbound[0]);
    assert_eq!(client.get("/chunked").body, "abcdefg");
    client.send("POST / HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n");
    client.send("0\r\n\r\n");
    assert_eq!(client.answer(false).expect("an answer").body, "ok");
    let large = "x".repeat(3_000_000);
    client.send(format!("POST / HTTP/1.1\r\nhost: web\r\ncontent-length: {}\r\n\r\n", large.len()));
    client.send(&large);
    assert_eq!(client.answer(false).expect("an answer").body, "ok");
    assert_eq!(client.ask("HEAD", "/nothing", "").header("content-length"), Some("2"));
    running.stop();
}

#[test]
fn pipelined_half_closed_and_old_clients_are_served() {
    let one = start("v1");
    let running = sidecar(web(&[one.address]));
    let mut client = Client::connect(running.outbound[0]);
    client.send("GET / HTTP/1.1\r\nhost: web\r\n\r\n".repeat(3));
    client.half_close();
    for _ in 0..3 {
        assert_eq!(client.answer(false).expect("an answer").body, "ok");
    }
    let mut old = Client::connect(running.outbound[0]);
    old.send("GET /chunked HTTP/1.0\r\n\r\n");
    let answer = old.answer(false).expect("an answer");
    assert_eq!((answer.body.as_str(), answer.header("transfer-encoding")), ("abcdefg", None));
    let mut expecting = Client::connect(running.outbound[0]);
    expecting.send("POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n");
    assert_eq!(expecting.answer(true).expect("an answer").status, 100);
    expecting.send("hi");
    assert_eq!(expecting.answer(false).expect("an answer").status, 200);
    running.stop();
}

#[test]
fn upgrades_become_pipes() {
    let listener = std::net::TcpListener::bind(LOCAL).expect("bind");
    let running = sidecar(web(&[listener.local_addr().expect("address")]));
    let server = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut stream, _) = listener.accept().expect("accept");
        let mut head = [0; 1024];
        let n = stream.read(&mut head).expect("read");
        let head = String::from_utf8_lossy(&head[..n]).to_ascii_lowercase();
        assert!(head.contains("upgrade: chat") && head.contains("connection: upgrade"), "{head}");
        // The first bytes of the new protocol come with the answer.
        let answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: chat\r\n\r\nwelcome";
        stream.write_all(answer).expect("write");
        let mut said = [0; 5];
        stream.read_exact(&mut said).expect("read");
        stream.write_all(&said).expect("write");
    });
    let mut client = Client::connect(running.outbound[0]);
    let answer = client.ask("GET", "/chat", "connection: upgrade\r\nupgrade: chat\r\n");
    assert_eq!((answer.status, answer.header("upgrade")), (101, Some("chat")));
    assert_eq!(client.take(7).as_deref(), Some("welcome"));
    let open = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(running.scrape()).open_outbound
    };
    eventually("it counts as one connection, for which a sidecar that drains waits", || open() == 1);
    client.send("hello");
    assert_eq!(client.take(5).as_deref(), Some("hello"));
    assert!(client.ended());
    drop(client);
    eventually("and as none when both sides have ended", || open() == 0);
    server.join().expect("the server saw what it should");
    running.stop();
}

fn inbound(to: std::net::SocketAddr) -> Running {
    let mut settings = settings(vec![]);
    settings.listen = Listen::At { outbound: vec![], inbound: vec![(LOCAL, to)] };
    Running::start(settings).expect("the sidecar starts")
}

#[test]
fn inbound_requests_reach_the_app_and_are_counted() {
    let app = start("v1");
    let running = inbound(app.address);
    let mut client = Client::connect(running.inbound[0]);
    for _ in 0..10 {
        assert_eq!(client.get("/").version(), "v1");
    }
    let mut admin = Client::connect(running.admin);
    let metrics = admin.get("/metrics").body;
    let line = format!(
        "request_total{{direction=\"inbound\",route=\"\",backend=\"shop/client\",port=\"{}\"}} 10",
        app.address.port()
    );
    assert!(metrics.contains(&line), "{metrics}");
    drop(app);
    let answer = client.get("/");
    assert_eq!((answer.status, answer.reason()), (503, "app_unreachable"));
    running.stop();
}

#[test]
fn draining_finishes_what_is_in_flight() {
    let app = start("v1");
    let running = inbound(app.address);
    let mut client = Client::connect(running.inbound[0]);
    assert_eq!(client.get("/").header("connection"), None);
    client.send("GET /slow HTTP/1.1\r\nhost: web\r\n\r\n");
    eventually("the app has the request", || app.seen() == 2);
    let drained = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(running.drain());
    });
    let answer = client.answer(false).expect("the answer comes");
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    assert!(client.ended());
    // Nothing is open any more: it ends long before its deadline.
    eventually("the sidecar ends", || drained.is_finished());
    drained.join().expect("drained");
}
