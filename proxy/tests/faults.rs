//! Endpoints that misbehave under load: what callers are told, what is counted, and that nothing is left over.

mod common;

use common::*;
use sluice_model::*;
use sluice_proxy::{reason::Reason, run::Running};
use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

const CLIENTS: usize = 16;
const EACH: usize = 50;

/// An endpoint that takes connections, reads a request of each and does this with it.
fn faulty(fault: fn(TcpStream)) -> SocketAddr {
    let listener = TcpListener::bind(LOCAL).expect("bind");
    let address = listener.local_addr().expect("an address");
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let (mut head, mut byte) = (Vec::new(), [0]);
                while !head.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
                    head.push(byte[0]);
                }
                fault(stream);
            });
        }
    });
    address
}

/// Silent until the other side gives up.
fn partitioned(mut stream: TcpStream) {
    let _ = stream.read_to_end(&mut Vec::new());
}

fn slow(mut stream: TcpStream) {
    thread::sleep(Duration::from_millis(500));
    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
}

fn resetting(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("linger");
}

fn garbage(mut stream: TcpStream) {
    let _ = stream.write_all(b"\x16\x03\x01 what is this\r\n\r\n");
}

fn of(addresses: &[SocketAddr], policy: BackendPolicy) -> Vec<Resource> {
    with_policy(service("web", "10.96.0.1", AppProtocol::Http, addresses), policy)
}

/// What clients that ask at once and again were answered: status and reason, and how often.
fn load(running: &Running, request: &str) -> BTreeMap<(u16, String), usize> {
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (at, request) = (running.outbound[0], request.to_owned());
            thread::spawn(move || {
                let mut client = Client::connect(at);
                let ask = |_| {
                    client.send(&request);
                    let answer = client.answer(false).expect("an answer, whatever happens behind");
                    if answer.header("connection") == Some("close") {
                        client = Client::connect(at);
                    }
                    (answer.status, answer.reason().to_owned())
                };
                (0..EACH).map(ask).collect::<Vec<_>>()
            })
        })
        .collect();
    let mut seen = BTreeMap::new();
    for answer in clients.into_iter().flat_map(|c| c.join().expect("no client fails")) {
        *seen.entry(answer).or_insert(0) += 1;
    }
    seen
}

fn nothing_is_left(running: &Running) {
    eventually("no connection is open and no request under way", || {
        let all = scrape(running);
        all.open_outbound == 0 && all.series.values().all(|t| t.in_flight == 0)
    });
}

const GET: &str = "GET / HTTP/1.1\r\nhost: web\r\n\r\n";
const POST: &str = "POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 2\r\n\r\nhi";

#[test]
fn each_fault_has_its_reason_and_is_counted() {
    let patient = || BackendPolicy { per_try_timeout_ms: 60, ..BackendPolicy::default() };
    let table = [
        ("killed", nowhere(), Reason::ConnectFailed),
        ("partitioned", faulty(partitioned), Reason::TryTimeout),
        ("slow", faulty(slow), Reason::TryTimeout),
        ("resetting", faulty(resetting), Reason::UpstreamClosed),
        ("garbage", faulty(garbage), Reason::UpstreamMalformed),
    ];
    for (fault, address, reason) in table {
        let running = sidecar(of(&[address], patient()));
        let seen = load(&running, POST);
        let wanted = BTreeMap::from([((reason.status().as_u16(), reason.label().to_owned()), CLIENTS * EACH)]);
        assert_eq!(seen, wanted, "{fault}");
        nothing_is_left(&running);
        assert_eq!(scrape(&running).refused[reason as usize], (CLIENTS * EACH) as u64, "{fault}");
        running.stop();
    }
}

#[test]
fn a_faulty_endpoint_beside_good_ones_is_left_out() {
    let good = [start("v1"), start("v2")];
    for (fault, address) in [
        ("killed", nowhere()),
        ("partitioned", faulty(partitioned)),
        ("slow", faulty(slow)),
        ("resetting", faulty(resetting)),
        ("garbage", faulty(garbage)),
    ] {
        let policy = BackendPolicy {
            // Each gets its turn, so that none is spared by what it owes.
            balance: Balance::RoundRobin,
            per_try_timeout_ms: 200,
            outlier: Some(Outlier { consecutive: 3, ..Outlier::default() }),
            retry_budget: Some(RetryBudget { percent: 100, min_per_s: 100 }),
            ..BackendPolicy::default()
        };
        let retry = Retry { codes: vec![502, 504], attempts: Some(2), backoff_ms: Some(1) };
        let rule = Rule { backends: vec![backend("web", 1)], retry: Some(retry), ..Rule::default() };
        let addresses = [good[0].address, address, good[1].address];
        let running = sidecar([of(&addresses, policy), vec![route(vec![rule])]].concat());
        let seen = load(&running, GET);
        assert_eq!(seen.keys().map(|(status, _)| *status).collect::<Vec<_>>(), [200], "{fault}: {seen:?}");
        nothing_is_left(&running);
        let all = scrape(&running);
        println!("{fault}: {} retries, {} ejections of {} requests", all.retries, all.ejections, CLIENTS * EACH);
        assert!((1..=3).contains(&all.ejections), "{fault}: {} ejections", all.ejections);
        // Requests that were under way when it was taken out, and those before.
        assert!(all.retries <= 4 * CLIENTS as u64, "{fault}: {} retries", all.retries);
        running.stop();
    }
}
