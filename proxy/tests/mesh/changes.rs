//! Nothing is lost when certificates are renewed, sidecars end or connections die under load.

use crate::{common::*, pair::*};
use sluice_proxy::{
    reason::Reason,
    tls::{Offer, now_s},
};
use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

#[test]
fn renewed_certificates_fail_no_request() {
    let app = start("v1");
    let mesh = Mesh::start(app.address);
    let load = Load::start(mesh.at(), 16, get_and_post);
    for _ in 0..10 {
        for (account, sidecar) in [("client", &mesh.client), ("server", mesh.server())] {
            let (seen, connected) = (app.seen(), mesh.client.connected());
            sidecar.certificate.send_replace(Some(mesh.authority.tls(account)));
            eventually("a new connection is used", || mesh.client.connected() > connected);
            eventually("requests flow", || app.seen() > seen + 200);
        }
    }
    eventually("the old connections have ended", || mesh.server().accepted() == 1);
    let answered = load.end();
    let connected = mesh.client.connected();
    println!("{answered} requests over {connected} connections and 20 renewals");
    assert_eq!(app.seen(), answered, "none was sent twice");
    mesh.stop();
}

/// Whichever side has it: the other one refuses, both say why, and they go on as soon as there is a new one.
#[test]
fn an_expired_certificate_is_refused_until_it_is_renewed() {
    let app = start("v1");
    for account in ["client", "server"] {
        let mesh = Mesh::start(app.address);
        let (own, other) =
            if account == "client" { (&mesh.client, mesh.server()) } else { (mesh.server(), &mesh.client) };
        let ask = || {
            let answer = mesh.connect().get("/");
            (answer.status, answer.reason().to_owned())
        };
        assert_eq!(ask().0, 200);
        own.certificate.send_replace(Some(mesh.authority.expired(account)));
        eventually("the other side takes it no more", || ask().0 != 200);
        let seen = app.seen();
        for _ in 0..20 {
            assert_eq!(ask(), (503, "identity_not_proven".to_owned()), "{account}");
        }
        assert_eq!(app.seen(), seen, "none came through");
        assert!(other.scrape().refused[Reason::IdentityNotProven as usize] > 0, "{account}: the other side counts it");
        own.certificate.send_replace(Some(mesh.authority.tls(account)));
        eventually("it is served again", || ask().0 == 200);
        (0..50).for_each(|_| assert_eq!(ask().0, 200));
        mesh.stop();
    }
}

/// A handshake that resumes looks at no certificate again, so both sides look at when those of the first one ended.
#[test]
fn a_session_does_not_outlive_its_certificates() {
    let authority = Authority::new();
    let (client, server) = (authority.tls("client"), authority.tls("server"));
    let config = client.client_config(&Arc::new(identity("server")), Offer::H2OrTcp);
    let acceptor = server.acceptor(Offer::H2OrTcp);
    let shake = || {
        let mut c = rustls::ClientConnection::new(config.clone(), SERVER.into()).expect("a client");
        let mut s = rustls::ServerConnection::new(acceptor.config().clone()).expect("a server");
        // Hello, answer, proof, and the tickets.
        for _ in 0..4 {
            let mut bytes = vec![];
            while c.wants_write() {
                c.write_tls(&mut bytes).expect("written");
            }
            s.read_tls(&mut bytes.as_slice()).expect("read");
            s.process_new_packets().expect("understood");
            let mut bytes = vec![];
            while s.wants_write() {
                s.write_tls(&mut bytes).expect("written");
            }
            c.read_tls(&mut bytes.as_slice()).expect("read");
            c.process_new_packets().expect("understood");
        }
        (c, s)
    };
    const SERVER: std::net::IpAddr = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    for (resumes, ended, outlived) in [(false, false, false), (true, false, false), (true, true, true)] {
        let (c, s) = shake();
        let now = if ended { server.not_after_s.max(client.not_after_s) + 1 } else { now_s() };
        let kind = if resumes { rustls::HandshakeKind::Resumed } else { rustls::HandshakeKind::Full };
        assert_eq!((c.handshake_kind(), s.handshake_kind()), (Some(kind), Some(kind)));
        assert_eq!((client.is_outlived_by(&c, now), server.is_outlived_by(&s, now)), (outlived, outlived));
    }
}

#[test]
fn a_long_request_outlives_the_certificate_it_came_with() {
    let app = start("v1");
    let mesh = Mesh::start(app.address);
    let mut client = mesh.connect();
    client.send("POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 10\r\n\r\nfirst");
    eventually("it is under way", || mesh.server().scrape().series.values().any(|t| t.in_flight > 0));
    mesh.client.certificate.send_replace(Some(mesh.authority.tls("client")));
    mesh.server().certificate.send_replace(Some(mesh.authority.tls("server")));
    eventually("others use a new connection", || mesh.connect().get("/").status == 200 && mesh.client.connected() > 1);
    client.send("again");
    assert_eq!(client.answer(false).expect("an answer").status, 200);
    eventually("the old connection has ended", || {
        mesh.connect().get("/").status == 200 && mesh.server().accepted() == 1
    });
    mesh.stop();
}

#[test]
fn a_sidecar_that_drains_fails_no_request() {
    let (one, two) = (start("v1"), start("v2"));
    let mut mesh = Mesh::of(&[one.address, two.address], 1, vec![]);
    let load = Load::start(mesh.at(), 16, |client, _| assert_eq!(client.get("/").status, 200));
    eventually("both serve", || one.seen() > 500 && two.seen() > 500);
    let leaving = mesh.servers.remove(0);
    block_on(leaving.running.drain());
    let seen = two.seen();
    eventually("the other one serves on", || two.seen() > seen + 500);
    load.end();
    mesh.stop();
}

#[test]
fn draining_finishes_what_is_multiplexed() {
    let app = start("v1");
    let mut mesh = Mesh::start(app.address);
    let mut client = mesh.connect();
    client.send("GET /slow HTTP/1.1\r\nhost: web\r\n\r\n");
    eventually("the app has the request", || app.seen() == 1);
    let leaving = mesh.servers.remove(0);
    block_on(leaving.running.drain());
    let answer = client.answer(false).expect("an answer");
    assert_eq!((answer.status, answer.header("connection")), (200, None));
    mesh.stop();
}

#[test]
fn a_restarted_sidecar_is_found_again() {
    let app = start("v1");
    let mesh = Mesh::start(app.address);
    let mut client = mesh.connect();
    assert_eq!(client.get("/").status, 200);
    let Mesh { authority, client: sidecar, mut servers } = mesh;
    let at = servers[0].running.inbound[0];
    servers.remove(0).running.stop();
    assert_eq!(client.get("/").reason(), "connect_failed");
    let again = server_at(&authority, at, app.address, vec![]);
    assert_eq!(client.get("/").status, 200);
    sidecar.running.stop();
    again.running.stop();
}

/// A network between client and server that can lose everything that is under way.
struct Network {
    address: SocketAddr,
    /// Connections accepted before the last loss carry nothing any more.
    losses: Arc<AtomicU64>,
}

impl Network {
    fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind(LOCAL).expect("bind");
        let address = listener.local_addr().expect("an address");
        let losses = Arc::new(AtomicU64::new(0));
        let seen = losses.clone();
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let (near, far) = (near.expect("accept"), TcpStream::connect(server).expect("connect"));
                let lost = seen.load(Ordering::SeqCst);
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to) = (from.try_clone().expect("clone"), to.try_clone().expect("clone"));
                    let seen = seen.clone();
                    std::thread::spawn(move || carry(from, to, || seen.load(Ordering::SeqCst) == lost));
                }
            }
        });
        Self { address, losses }
    }
}

/// Bytes that come while not `alive` are lost without a word.
fn carry(mut from: TcpStream, mut to: TcpStream, alive: impl Fn() -> bool) {
    let mut part = vec![0; 64 * 1024];
    while let Ok(n @ 1..) = from.read(&mut part) {
        if alive() && to.write_all(&part[..n]).is_err() {
            break;
        }
    }
    if alive() {
        // The other side may have closed before.
        let _ = to.shutdown(Shutdown::Write);
    }
}

#[test]
fn a_dead_connection_swallows_requests_for_a_bounded_time() {
    let app = start("v1");
    let authority = Authority::new();
    let server = server(&authority, app.address, vec![]);
    let network = Network::to(server.running.inbound[0]);
    let sidecar = client(&authority, &[network.address], 1);
    let mut one = Client::connect(sidecar.running.outbound[0]);
    one.patience(Duration::from_secs(30));
    assert_eq!(one.get("/").status, 200);
    network.losses.fetch_add(1, Ordering::SeqCst);
    // It is asked again because it may be, and then by a connection that works.
    let begun = std::time::Instant::now();
    assert_eq!(one.get("/").status, 200);
    println!("found dead after {:?}", begun.elapsed());
    let begun = std::time::Instant::now();
    assert_eq!(one.get("/").status, 200);
    assert!(begun.elapsed() < Duration::from_secs(5), "the next ones do not wait");
    assert_eq!(sidecar.connected(), 2);
    sidecar.running.stop();
    server.running.stop();
}

#[test]
fn connections_that_break_fail_no_request_that_may_be_repeated() {
    let app = start("v1");
    let authority = Authority::new();
    let server = server(&authority, app.address, vec![]);
    let breaking = Arc::new(AtomicBool::new(false));
    let at = breaker(server.running.inbound[0], breaking.clone());
    let sidecar = client(&authority, &[at], 1);
    let load = Load::start(sidecar.running.outbound[0], 16, |client, _| {
        let answer = client.get("/");
        assert_eq!(answer.status, 200, "{answer:?}");
    });
    for _ in 0..10 {
        let seen = app.seen();
        eventually("requests flow", || app.seen() > seen + 200);
        breaking.store(true, Ordering::SeqCst);
        eventually("it broke", || !breaking.load(Ordering::SeqCst));
    }
    load.end();
    sidecar.running.stop();
    server.running.stop();
}

/// A network that closes the connection which carries the next bytes after `breaking` was set, and takes it back.
fn breaker(server: SocketAddr, breaking: Arc<AtomicBool>) -> SocketAddr {
    let listener = TcpListener::bind(LOCAL).expect("bind");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for near in listener.incoming() {
            let (near, far) = (near.expect("accept"), TcpStream::connect(server).expect("connect"));
            for (mut from, mut to) in [(near.try_clone(), far.try_clone()), (far.try_clone(), near.try_clone())]
                .map(|(a, b)| (a.expect("clone"), b.expect("clone")))
            {
                let breaking = breaking.clone();
                std::thread::spawn(move || {
                    let mut part = vec![0; 64 * 1024];
                    while let Ok(n @ 1..) = from.read(&mut part) {
                        if breaking.swap(false, Ordering::SeqCst) || to.write_all(&part[..n]).is_err() {
                            break;
                        }
                    }
                    // Both ways, whatever was under way.
                    let _ = from.shutdown(Shutdown::Both);
                    let _ = to.shutdown(Shutdown::Both);
                });
            }
        }
    });
    address
}
