//! Connections that are not HTTP, through the sidecar over real sockets.

mod common;

use common::*;
use sluice_model::*;
use sluice_proxy::run::{Listen, Running};
use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
};

/// Says its name first, then sends back what it gets.
fn greeter(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind(LOCAL).expect("bind");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("accept");
            std::thread::spawn(move || {
                let _ = stream.write_all(name.as_bytes());
                let mut all = Vec::new();
                let _ = stream.read_to_end(&mut all);
                let _ = stream.write_all(&all);
            });
        }
    });
    address
}

fn service_of(app_protocol: AppProtocol) -> Vec<Resource> {
    let web = service("web", "10.96.0.1", app_protocol, &[greeter("v1")]);
    let v2 = service("v2", "10.96.0.2", app_protocol, &[greeter("v2")]);
    [web, v2, vec![split(&[("web", 3), ("v2", 1)])]].concat()
}

#[test]
fn connections_are_split_and_half_close_passes() {
    for app_protocol in [AppProtocol::Tcp, AppProtocol::Detect] {
        let running = sidecar(service_of(app_protocol));
        let mut counts = BTreeMap::new();
        for _ in 0..40 {
            let mut client = Client::connect(running.outbound[0]);
            client.send("\x01binary");
            client.half_close();
            let text = client.rest();
            assert!(text.ends_with("\x01binary"), "{text:?}");
            *counts.entry(text[..2].to_owned()).or_insert(0) += 1;
        }
        assert_eq!(counts, BTreeMap::from([("v1".to_owned(), 30), ("v2".to_owned(), 10)]));
        running.stop();
    }
}

#[test]
fn a_server_may_speak_first() {
    let running = sidecar(service_of(AppProtocol::Detect));
    let mut client = Client::connect(running.outbound[0]);
    // The client says nothing; detection gives up after a bounded time.
    assert!(client.take(2).expect("a greeting").starts_with('v'));
    running.stop();
}

#[test]
fn addresses_without_a_service_pass_through() {
    let to = greeter("v1");
    let mut settings = settings(vec![]);
    settings.listen = Listen::At { outbound: vec![(LOCAL, to), (LOCAL, nowhere())], inbound: vec![] };
    let running = Running::start(settings).expect("the sidecar starts");
    assert_eq!(Client::connect(running.outbound[0]).take(2).as_deref(), Some("v1"));
    let mut refused = Client::connect(running.outbound[1]);
    assert!(refused.ended(), "nobody listens there");
    running.stop();
}

#[test]
fn many_bytes_arrive_whole() {
    let running = sidecar(service_of(AppProtocol::Tcp));
    let client = std::net::TcpStream::connect(running.outbound[0]).expect("connect");
    let sent: Vec<u8> = (0..8_000_000u32).map(|i| (i % 251) as u8).collect();
    let (mut writer, data) = (client.try_clone().expect("clone"), sent.clone());
    let writing = std::thread::spawn(move || {
        writer.write_all(&data).expect("write");
        writer.shutdown(std::net::Shutdown::Write).expect("shutdown");
    });
    let mut got = Vec::new();
    (&client).read_to_end(&mut got).expect("read");
    writing.join().expect("written");
    assert!(got[2..] == sent[..], "{} bytes", got.len());
    running.stop();
}
