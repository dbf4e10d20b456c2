//! What shares the one connection between two sidecars, what gets its own, and peers that know of no sharing.

use crate::{common::*, pair::*};
use http::Request;
use http_body_util::Full;
use sluice_proxy::tls::Offer;
use std::{
    io::{Read, Write},
    net::SocketAddr,
    sync::Arc,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[test]
fn all_requests_of_a_worker_share_a_connection() {
    for workers in [1, 2] {
        let app = start("v1");
        let mesh = Mesh::of(&[app.address], workers, vec![]);
        // The first requests come all at once, before there is a connection.
        let load = Load::start(mesh.at(), 64, get_and_post);
        eventually("many requests", || app.seen() > 5_000);
        assert!(load.end() >= 5_000);
        let (connected, accepted) = (mesh.client.connected(), mesh.server().accepted());
        assert!((1..=workers as u64).contains(&connected) && connected == accepted, "{connected} {accepted}");
        assert_eq!(mesh.client.scrape().retries, 0);
        mesh.stop();
    }
}

/// A bound on connections is none on the requests that share one, the first ones included, for which it is only being opened.
#[test]
fn one_connection_is_enough_and_ends_when_idle() {
    let (app, authority) = (start("v1"), Authority::new());
    let server = server(&authority, app.address, vec![]);
    let circuit = sluice_model::Circuit { max_connections: 1, ..Default::default() };
    let policy = sluice_model::BackendPolicy { circuit, idle_timeout_ms: 1000, ..Default::default() };
    let web = service("web", "10.96.0.1", sluice_model::AppProtocol::Detect, &[server.running.inbound[0]]);
    let client = client_of(&authority, with_policy(web, policy), 1);
    let load = Load::start(client.running.outbound[0], 64, get_and_post);
    eventually("many requests", || app.seen() > 1_000);
    load.end();
    assert_eq!((client.connected(), client.scrape().retries), (1, 0));
    eventually("it is closed", || server.accepted() == 0);
    client.running.stop();
    server.running.stop();
}

#[test]
fn a_full_connection_gets_another_beside_it() {
    let together = 600;
    let mesh = Mesh::start(http2_app(together));
    block_on(async {
        let sender = http2(mesh.at()).await;
        // None is answered before all are there.
        let ask = |_| {
            let mut sender = sender.clone();
            async move {
                let request = Request::get("http://web.shop/together").body(Full::default()).expect("a request");
                assert_eq!(sender.send_request(request).await.expect("an answer").status(), 200);
            }
        };
        futures::future::join_all((0..together).map(ask)).await;
    });
    assert_eq!((mesh.client.connected(), mesh.server().accepted()), (2, 2));
    mesh.stop();
}

#[test]
fn upgrades_and_tunnels_get_a_connection_of_their_own() {
    let app = app(|mut stream, head| {
        let head = head.to_ascii_lowercase();
        let answer = match head {
            _ if head.contains("upgrade: chat") => "101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: chat",
            _ if head.starts_with("connect ") => "200 OK",
            _ => "200 OK\r\nconnection: close\r\ncontent-length: 0",
        };
        stream.write_all(format!("HTTP/1.1 {answer}\r\n\r\n").as_bytes()).expect("write");
        let mut said = [0; 5];
        while stream.read_exact(&mut said).is_ok() {
            stream.write_all(&said).expect("write");
        }
    });
    let mesh = Mesh::start(app);
    assert_eq!(mesh.connect().get("/").status, 200);
    let mut chat = mesh.connect();
    assert_eq!(chat.ask("GET", "/chat", "connection: upgrade\r\nupgrade: chat\r\n").status, 101);
    let mut tunnel = mesh.connect();
    tunnel.send("CONNECT a.example:443 HTTP/1.1\r\nhost: a.example:443\r\n\r\n");
    assert_eq!(tunnel.answer(true).expect("an answer").status, 200);
    // Requests go on beside the pipes, over the connection that was there.
    for _ in 0..20 {
        for pipe in [&mut chat, &mut tunnel] {
            pipe.send("hello");
            assert_eq!(pipe.take(5).as_deref(), Some("hello"));
        }
        assert_eq!(mesh.connect().get("/").status, 200);
    }
    assert_eq!(mesh.client.connected(), 3);
    mesh.stop();
}

#[test]
fn old_requests_get_a_connection_of_their_own() {
    let app = start("v1");
    let mesh = Mesh::start(app.address);
    assert_eq!(mesh.connect().get("/").status, 200);
    let mut old = mesh.connect();
    old.send("GET /chunked HTTP/1.0\r\n\r\n");
    let answer = old.answer(false).expect("an answer");
    assert_eq!((answer.body.as_str(), answer.header("transfer-encoding")), ("abcdefg", None));
    assert_eq!((mesh.client.connected(), mesh.server().accepted()), (2, 2));
    mesh.stop();
}

#[test]
fn opaque_ports_never_get_requests_multiplexed() {
    let app = start("v1");
    let mesh = Mesh::of(&[app.address], 1, opaque(app.address.port()));
    let mut client = mesh.connect();
    for _ in 0..20 {
        assert_eq!(client.get("/").version(), "v1");
    }
    let (scrape, server) = (mesh.client.scrape(), mesh.server().scrape());
    assert!(server.series.values().all(|t| t.requests == 0), "the bytes were not read as requests");
    assert_eq!((scrape.retries, scrape.upstream_connects), (0, 1), "a connection that was negotiated is used");
    mesh.stop();
}

/// A sidecar that has never heard of `sluice-h2`: it takes bytes over mTLS and hands them to `app`.
fn older_server(authority: &Authority, app: SocketAddr) -> SocketAddr {
    let acceptor = authority.tls("server").acceptor(Offer::Tcp);
    serve_each(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let mut near = acceptor.accept(stream).await.expect("a peer of the mesh");
            let mut far = tokio::net::TcpStream::connect(app).await.expect("the app");
            // How it ends is seen at the other sides.
            let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
        }
    })
}

#[test]
fn an_older_server_is_spoken_to_as_before() {
    let authority = Authority::new();
    let app = start("v1");
    let sidecar = client(&authority, &[older_server(&authority, app.address)], 1);
    let load = Load::start(sidecar.running.outbound[0], 8, get_and_post);
    eventually("many requests", || app.seen() > 1_000);
    load.end();
    let connected = sidecar.connected();
    assert!(connected <= 16, "connections are used again: {connected}");
    sidecar.running.stop();
    let sidecar = client(&authority, &[older_server(&authority, http2_app(1))], 1);
    block_on(async {
        let mut sender = http2(sidecar.running.outbound[0]).await;
        for _ in 0..20 {
            let request = Request::get("http://web.shop/").body(Full::default()).expect("a request");
            let answer = sender.send_request(request).await.expect("an answer");
            assert_eq!(answer.headers()["x-names"], "");
        }
    });
    // The first was negotiated, the second carries HTTP/2.
    assert_eq!(sidecar.connected(), 2);
    sidecar.running.stop();
}

#[test]
fn an_older_client_is_served_as_before() {
    let authority = Authority::new();
    let app = start("v1");
    let sidecar = server(&authority, app.address, vec![]);
    let config = authority.tls("client").client_config(&Arc::new(identity("server")), Offer::Tcp);
    let at = sidecar.running.inbound[0];
    let answer = block_on(async {
        let stream = tokio::net::TcpStream::connect(at).await.expect("connect");
        let connector = tokio_rustls::TlsConnector::from(config);
        let mut stream = connector.connect(at.ip().into(), stream).await.expect("a handshake");
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(sluice_wire::ALPN_TCP));
        let request = "GET /head HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.expect("write");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("read");
        answer
    });
    assert!(answer.contains("x-version: v1") && answer.contains("GET /head HTTP/1.1"), "{answer}");
    sidecar.running.stop();
}

#[test]
fn answers_of_the_other_sidecar_pass() {
    let mesh = Mesh::start(nowhere());
    let answer = mesh.connect().get("/");
    assert_eq!((answer.status, answer.reason()), (503, "app_unreachable"));
    mesh.stop();
}
