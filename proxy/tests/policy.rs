//! How a service's endpoints are used where its policy says so, through a real sidecar.

mod common;

use common::*;
use sluice_model::*;
use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    time::{Duration, Instant},
};

fn of(policy: BackendPolicy, addresses: &[SocketAddr]) -> Vec<Resource> {
    with_policy(service("web", "10.96.0.1", AppProtocol::Http, addresses), policy)
}

fn balance(balance: Balance) -> BackendPolicy {
    BackendPolicy { balance, ..BackendPolicy::default() }
}

#[test]
fn turns_are_taken() {
    let apps = ["v1", "v2", "v3"].map(start);
    let running = sidecar(of(balance(Balance::RoundRobin), &apps.each_ref().map(|a| a.address)));
    let mut client = Client::connect(running.outbound[0]);
    let seen: Vec<String> = (0..6).map(|_| client.get("/").version().to_owned()).collect();
    assert_eq!(seen[..3], seen[3..]);
    assert_eq!(apps.each_ref().map(|a| a.seen()), [2, 2, 2]);
    running.stop();
}

#[test]
fn keys_stay_with_their_endpoint() {
    let apps = ["v1", "v2", "v3"].map(start);
    let addresses = apps.each_ref().map(|a| a.address);
    for hash in [Balance::Maglev, Balance::RingHash] {
        let by = |running: &sluice_proxy::run::Running, header: &dyn Fn(usize) -> String| -> Vec<String> {
            let mut client = Client::connect(running.outbound[0]);
            (0..60).map(|user| client.ask("GET", "/", &header(user)).version().to_owned()).collect()
        };
        let key = hash(HashKey::Header("x-user".into()));
        let (one, two) = (sidecar(of(balance(key.clone()), &addresses)), sidecar(of(balance(key), &addresses)));
        let header = |user: usize| format!("x-user: {user}\r\n");
        let seen = by(&one, &header);
        assert_eq!(seen, by(&two, &header), "all sidecars agree");
        let kinds: std::collections::BTreeSet<&String> = seen.iter().collect();
        assert_eq!(kinds.len(), 3, "{seen:?}");
        one.stop();
        two.stop();
        let running = sidecar(of(balance(hash(HashKey::Cookie("id".into()))), &addresses));
        let cookie = |_: usize| "cookie: x=1; id=7\r\n".to_owned();
        let seen = by(&running, &cookie);
        assert!(seen.iter().all(|v| *v == seen[0]));
        running.stop();
        let running = sidecar(of(balance(hash(HashKey::Source)), &addresses));
        let seen = by(&running, &|_| String::new());
        assert!(seen.iter().all(|v| *v == seen[0]), "a pod is one caller");
        running.stop();
    }
}

/// An app that takes its time over each answer.
fn slow_app(pause: Duration) -> SocketAddr {
    let listener = std::net::TcpListener::bind(LOCAL).expect("bind");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
                while lines.any(|l| l.is_empty()) {
                    std::thread::sleep(pause);
                    let answer = "HTTP/1.1 200 OK\r\nx-version: slow\r\ncontent-length: 0\r\n\r\n";
                    if (&stream).write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

#[test]
fn the_slow_one_gets_less() {
    let (fast, slow) = (start("fast"), slow_app(Duration::from_millis(20)));
    let on_slow = |policy| {
        let running = sidecar(of(balance(policy), &[fast.address, slow]));
        let mut client = Client::connect(running.outbound[0]);
        let count = (0..100).filter(|_| client.get("/").version() == "slow").count();
        running.stop();
        count
    };
    let (by_latency, by_load) = (on_slow(Balance::Ewma), on_slow(Balance::LeastRequest));
    assert!(by_latency <= 3 && by_load > 25, "{by_latency} and {by_load} of 100");
}

#[test]
fn endpoints_that_fail_are_left_out_for_a_while() {
    let (well, ill) = (start("v1"), nowhere());
    let outlier = Outlier { consecutive: 2, ejection_ms: 60_000, ..Outlier::default() };
    let running =
        sidecar(of(BackendPolicy { outlier: Some(outlier), ..BackendPolicy::default() }, &[well.address, ill]));
    for _ in 0..50 {
        assert_eq!(Client::connect(running.outbound[0]).get("/").status, 200, "tried elsewhere");
    }
    let scrape = scrape(&running);
    assert_eq!(scrape.ejections, 1);
    let retries = scrape.retries;
    assert!(retries <= 3, "{retries} tries went to the ejected one");
    running.stop();
}

#[test]
fn the_last_endpoint_is_never_left_out() {
    let outlier = Outlier { consecutive: 1, max_ejected_percent: 100, ..Outlier::default() };
    let app = start("v1");
    let running = sidecar(of(BackendPolicy { outlier: Some(outlier), ..BackendPolicy::default() }, &[app.address]));
    let mut client = Client::connect(running.outbound[0]);
    for _ in 0..3 {
        assert_eq!(client.get("/close").reason(), "upstream_closed");
        assert_eq!(client.get("/").status, 200);
    }
    assert_eq!(scrape(&running).ejections, 0);
    running.stop();
}

#[test]
fn more_than_the_circuit_allows_is_refused_at_once() {
    let app = start("v1");
    let circuit = Circuit { max_requests: 2, ..Circuit::default() };
    let running = sidecar(of(BackendPolicy { circuit, ..BackendPolicy::default() }, &[app.address]));
    let mut slow: Vec<Client> = (0..2).map(|_| Client::connect(running.outbound[0])).collect();
    slow.iter_mut().for_each(|c| c.send("GET /slow HTTP/1.1\r\nhost: web\r\n\r\n"));
    eventually("both are with the app", || app.seen() == 2);
    let began = Instant::now();
    let third = Client::connect(running.outbound[0]).get("/");
    assert_eq!((third.status, third.reason()), (503, "circuit_open"));
    assert!(began.elapsed() < Duration::from_millis(250));
    assert!(slow.iter_mut().all(|c| c.answer(false).is_some_and(|a| a.status == 200)));
    assert_eq!(Client::connect(running.outbound[0]).get("/").status, 200, "places are free again");
    running.stop();
}

fn with_circuit(circuit: Circuit, addresses: &[SocketAddr]) -> sluice_proxy::run::Running {
    let connect_timeout_ms = 500;
    sidecar(of(BackendPolicy { circuit, connect_timeout_ms, ..balance(Balance::RoundRobin) }, addresses))
}

/// So many at once; the answers in the order in which they were asked for.
fn at_once(running: &sluice_proxy::run::Running, count: usize, path: &str) -> Vec<Answer> {
    let mut clients: Vec<Client> = (0..count).map(|_| Client::connect(running.outbound[0])).collect();
    clients.iter_mut().for_each(|c| c.send(format!("GET {path} HTTP/1.1\r\nhost: web\r\n\r\n")));
    clients.iter_mut().map(|c| c.answer(false).expect("an answer")).collect()
}

fn refused(answers: &[Answer]) -> usize {
    answers.iter().filter(|a| a.reason() == "circuit_open").count()
}

#[test]
fn requests_wait_for_the_connections_that_there_may_be() {
    let app = slow_app(Duration::from_millis(50));
    let running = with_circuit(Circuit { max_connections: 2, ..Circuit::default() }, &[app]);
    let begun = Instant::now();
    let answers = at_once(&running, 8, "/");
    assert!(answers.iter().all(|a| a.status == 200), "{answers:?}");
    assert!(begun.elapsed() >= Duration::from_millis(200), "two at a time: {:?}", begun.elapsed());
    assert_eq!(scrape(&running).upstream_connects, 2);
    running.stop();

    let app = slow_app(Duration::from_millis(300));
    let running = with_circuit(Circuit { max_connections: 2, max_pending: 1, ..Circuit::default() }, &[app]);
    let answers = at_once(&running, 8, "/");
    // One may wait at a time, for the first connection too; whose turn it is when depends on when they come.
    assert!(refused(&answers) >= 3 && refused(&answers) < 8, "{answers:?}");
    assert!(answers.iter().all(|a| a.status == 200 || a.reason() == "circuit_open"), "{answers:?}");
    running.stop();
}

#[test]
fn nobody_waits_for_ever_for_a_connection() {
    let app = slow_app(Duration::from_millis(1500));
    let running = with_circuit(Circuit { max_connections: 1, ..Circuit::default() }, &[app]);
    let begun = Instant::now();
    let answers = at_once(&running, 3, "/");
    assert_eq!(refused(&answers), 2, "{answers:?}");
    assert!(begun.elapsed() < Duration::from_millis(2500), "{:?}", begun.elapsed());
    running.stop();
}

#[test]
fn idle_connections_keep_nobody_waiting() {
    let apps = ["v1", "v2", "v3"].map(start);
    let circuit = Circuit { max_connections: 1, ..Circuit::default() };
    let running = with_circuit(circuit, &apps.each_ref().map(|a| a.address));
    let mut client = Client::connect(running.outbound[0]);
    (0..9).for_each(|_| assert_eq!(client.get("/").status, 200));
    assert_eq!(apps.each_ref().map(|a| a.seen()), [3, 3, 3], "each endpoint may have one");
    running.stop();

    let app = start("v1");
    let running = with_circuit(circuit, &[app.address]);
    let mut client = Client::connect(running.outbound[0]);
    assert_eq!(client.get("/").status, 200);
    // Old enough that what must not be sent twice does not take it.
    std::thread::sleep(Duration::from_millis(2200));
    assert_eq!(client.ask("POST", "/", "content-length: 0\r\n").status, 200);
    assert_eq!(scrape(&running).upstream_connects, 2);
    running.stop();
}

/// What one endpoint has of them, idle or on the way to nowhere, is given to the other.
#[test]
fn endpoints_share_the_connections_that_there_may_be() {
    let (first, second) = (slow_app(Duration::from_millis(100)), slow_app(Duration::from_millis(100)));
    let circuit = Circuit { max_connections: 4, ..Circuit::default() };
    let running = with_circuit(circuit, &[first, second]);
    for count in [8, 8, 4] {
        let answers = at_once(&running, count, "/");
        assert!(answers.iter().all(|a| a.status == 200), "{answers:?}");
    }
    running.stop();

    let (silent, _filling) = silent();
    let running = with_circuit(circuit, &[silent.local_addr().expect("an address"), first]);
    let answers = at_once(&running, 8, "/");
    assert!(answers.iter().all(|a| a.status == 200), "{answers:?}");
    running.stop();
}

#[test]
fn bytes_do_not_wait_for_a_connection() {
    let app = start("v1");
    let circuit = Circuit { max_connections: 1, ..Circuit::default() };
    let opaque = with_policy(
        service("web", "10.96.0.1", AppProtocol::Tcp, &[app.address]),
        BackendPolicy { circuit, ..BackendPolicy::default() },
    );
    let running = sidecar(opaque);
    let mut first = Client::connect(running.outbound[0]);
    assert_eq!(first.get("/").status, 200);
    let mut second = Client::connect(running.outbound[0]);
    assert!(second.try_ask("GET / HTTP/1.1\r\nhost: web\r\n\r\n").is_none(), "reset");
    drop(first);
    eventually("there is room again", || {
        Client::connect(running.outbound[0]).try_ask("GET / HTTP/1.1\r\nhost: web\r\n\r\n").is_some()
    });
    running.stop();
}

#[test]
fn a_share_without_endpoints_fails_unless_it_is_given_away() {
    let app = start("v1");
    let share = |redistribute| {
        let web = service("web", "10.96.0.1", AppProtocol::Http, &[app.address]);
        let empty = service("v2", "10.96.0.2", AppProtocol::Http, &[]);
        let empty = with_policy(empty, BackendPolicy { redistribute, ..BackendPolicy::default() });
        let running = sidecar([web, empty, vec![split(&[("web", 3), ("v2", 1)])]].concat());
        let mut client = Client::connect(running.outbound[0]);
        let failed = (0..40).filter(|_| client.get("/").reason() == "no_endpoints").count();
        running.stop();
        failed
    };
    assert_eq!((share(false), share(true)), (10, 0));
}

#[test]
fn callers_stay_in_their_zone_while_it_is_well() {
    let (near, far) = (start("near"), start("far"));
    let mut resources = of(
        BackendPolicy {
            locality: Some(Locality { healthy_percent: 70 }),
            outlier: Some(Outlier {
                consecutive: 1,
                ejection_ms: 60_000,
                max_ejected_percent: 100,
                ..Outlier::default()
            }),
            ..BackendPolicy::default()
        },
        &[near.address, far.address],
    );
    let Resource::EndpointSet(set) = &mut resources[1] else { panic!("an endpoint set") };
    set.endpoints[0].zone = "a".into();
    set.endpoints[1].zone = "b".into();
    resources.extend([
        Resource::Workload(Workload {
            name: Name::new("shop", "client"),
            uid: "u".into(),
            node: "n1".into(),
            addresses: vec![],
            identity: "spiffe://cluster.local/ns/shop/sa/client".parse().expect("an identity"),
            meshed: true,
            gateway: None,
        }),
        Resource::Node(Node {
            name: Name::cluster("n1"),
            addresses: vec![],
            pod_cidrs: vec![],
            zone: "a".into(),
            ready: true,
        }),
    ]);
    let running = sidecar(resources);
    let mut client = Client::connect(running.outbound[0]);
    assert!((0..50).all(|_| client.get("/").version() == "near"));
    drop(near);
    assert_eq!(client.get("/").version(), "far", "the zone has nobody left");
    assert!((0..20).all(|_| client.get("/").version() == "far"));
    running.stop();
}

/// How one that comes later warms up: `a_newcomer_warms_up` in `gateway`, whose endpoints change.
#[test]
fn at_the_beginning_nobody_is_new() {
    let apps = [start("a"), start("b")];
    let policy = BackendPolicy { slow_start_ms: 60_000, balance: Balance::RoundRobin, ..BackendPolicy::default() };
    let running = sidecar(of(policy, &apps.each_ref().map(|a| a.address)));
    let mut client = Client::connect(running.outbound[0]);
    (0..100).for_each(|_| assert_eq!(client.get("/").status, 200));
    assert_eq!(apps.each_ref().map(|a| a.seen()), [50, 50], "in turn");
    running.stop();
}

#[test]
fn slow_requests_go_to_a_second_endpoint_too() {
    let (slow, fast) = (slow_app(Duration::from_millis(600)), start("fast"));
    let hedged = |min_per_s| BackendPolicy {
        // In turns, so that every other request meets the slow one first.
        balance: Balance::RoundRobin,
        hedge_after_ms: 40,
        retry_budget: Some(RetryBudget { percent: 0, min_per_s }),
        ..BackendPolicy::default()
    };
    let running = sidecar(of(hedged(100), &[slow, fast.address]));
    let mut client = Client::connect(running.outbound[0]);
    let mut ask = |method: &str, more: &str| {
        let begun = Instant::now();
        let answer = client.ask(method, "/", more);
        assert_eq!(answer.status, 200);
        begun.elapsed()
    };
    let times: Vec<Duration> = (0..6).map(|_| ask("GET", "")).collect();
    assert!(times.iter().all(|t| *t < Duration::from_millis(550)), "{times:?}");
    assert!(times.iter().any(|t| *t >= Duration::from_millis(40)), "some met the slow one first: {times:?}");
    let hedged_by_now = scrape(&running).hedged;
    assert!((2..=6).contains(&hedged_by_now), "{hedged_by_now}");
    let posts: Vec<Duration> = (0..2).map(|_| ask("POST", "content-length: 0\r\n")).collect();
    assert!(posts.iter().any(|t| *t >= Duration::from_millis(600)), "what may not be repeated is not: {posts:?}");
    assert_eq!(scrape(&running).hedged, hedged_by_now);
    running.stop();

    let running = sidecar(of(hedged(0), &[slow, fast.address]));
    let mut client = Client::connect(running.outbound[0]);
    let begun = Instant::now();
    (0..2).for_each(|_| assert_eq!(client.get("/").status, 200));
    assert!(begun.elapsed() >= Duration::from_millis(600), "without budget one endpoint is asked");
    assert_eq!(scrape(&running).hedged, 0);
    running.stop();
}
