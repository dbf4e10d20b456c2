//! A gateway in process: clients of several hosts, in plain and within TLS, listeners that come and go, certificates that
//! are renewed, and what backends learn of the client.

mod common;

use common::*;
use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use sluice_model::*;
use sluice_proxy::{
    control::Source,
    reason::Reason,
    run::{Listen, Running, Settings},
};
use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::watch;

fn name(n: &str) -> Name {
    Name::new("shop", n)
}

/// A port that is free. Only a test that binds it at the very same time could take it away.
fn free_port() -> u16 {
    nowhere().port()
}

fn http(name: &str, port: u16, hostname: Option<&str>, routes: &[&str]) -> Listener {
    Listener {
        name: name.into(),
        port,
        mode: ListenerMode::Http,
        hostname: hostname.map(Into::into),
        certificates: vec![],
        routes: routes.iter().map(|r| self::name(r)).collect(),
    }
}

fn https(name: &str, port: u16, hostname: Option<&str>, certificate: &Certificate, routes: &[&str]) -> Listener {
    let certificates = vec![certificate.clone()];
    Listener { mode: ListenerMode::Https, certificates, ..http(name, port, hostname, routes) }
}

fn route_to(name: &str, kind: RouteKind, hosts: &[&str], weights: &[(&str, u32)]) -> Resource {
    let one = Match { hosts: hosts.iter().map(|h| (*h).to_owned()).collect(), ..Match::default() };
    let backends = weights.iter().map(|(n, w)| backend(n, *w)).collect();
    Resource::Route(Route {
        name: self::name(name),
        kind,
        parent: Gateway::parent(&self::name("edge")),
        parent_port: None,
        created_s: 1,
        generation: 1,
        rules: vec![Rule { matches: vec![one], backends, ..Rule::default() }],
    })
}

/// What the gateway's pod is told.
fn snapshot(revision: u64, listeners: Vec<Listener>, rest: Vec<Resource>) -> Snapshot {
    let own = [
        Resource::Workload(Workload {
            name: name("client"),
            uid: "u".into(),
            node: String::new(),
            addresses: vec![],
            identity: "spiffe://cluster.local/ns/shop/sa/edge".parse().expect("an identity"),
            meshed: false,
            gateway: Some("edge".into()),
        }),
        Resource::Gateway(Gateway { name: name("edge"), listeners }),
    ];
    Snapshot::new(Revision(revision), own.into_iter().chain(rest))
}

struct Edge {
    running: Running,
    snapshots: watch::Sender<Snapshot>,
}

impl Edge {
    fn start(snapshot: Snapshot) -> Self {
        Self::with(snapshot, |_| {})
    }

    fn with(snapshot: Snapshot, change: impl FnOnce(&mut Settings)) -> Self {
        let (snapshots, seen) = watch::channel(snapshot);
        let source = Source::Changing { snapshots: seen, certificate: watch::channel(None).1 };
        let listen = Listen::Gateway { ips: vec![IpAddr::from(Ipv4Addr::LOCALHOST)] };
        let mut all = Settings { source, listen, workers: 2, ..settings(vec![]) };
        change(&mut all);
        let running = Running::start(all).expect("the gateway starts");
        Self { running, snapshots }
    }

    fn ready(self) -> Self {
        eventually("it listens", || self.running.status.borrow().missing().is_empty());
        self
    }

    fn refused(&self, reason: Reason) -> u64 {
        scrape(&self.running).refused[reason as usize]
    }
}

fn at(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn ask(client: &mut Client, host: &str, path: &str, headers: &str) -> Answer {
    client.send(format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n{headers}\r\n"));
    client.answer(false).expect("an answer")
}

/// An app that answers with the head that it was sent.
fn mirror() -> SocketAddr {
    let listener = TcpListener::bind(LOCAL).expect("bind");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                let mut part = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut part) {
                    bytes.extend_from_slice(&part[..n]);
                    let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else { continue };
                    let head: Vec<u8> = bytes.drain(..end + 4).collect();
                    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", head.len());
                    if stream.write_all(answer.as_bytes()).and_then(|()| stream.write_all(&head)).is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// An authority and what it has signed.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).expect("parameters");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self { issuer: CertifiedIssuer::self_signed(params, key).expect("self-signed") }
    }

    fn sign(&self, host: &str) -> Certificate {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![host.to_owned()]).expect("parameters");
        let chain_pem = params.signed_by(&key, &self.issuer).expect("signed").pem();
        Certificate { chain_pem, key_pem: Secret(key.serialize_pem()) }
    }

    /// A client's connection to a port, asking for a name; an error when TLS does not come about.
    fn connect(&self, port: u16, host: &str) -> std::io::Result<Tls> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.issuer.pem().as_bytes()).expect("PEM")).expect("a root");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let server = ServerName::try_from(host.to_owned()).expect("a name");
        let connection = ClientConnection::new(Arc::new(config), server).map_err(std::io::Error::other)?;
        let socket = TcpStream::connect(at(port))?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut stream = StreamOwned::new(connection, socket);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Tls(stream))
    }
}

struct Tls(StreamOwned<ClientConnection, TcpStream>);

impl Tls {
    fn leaf(&self) -> Vec<u8> {
        self.0.conn.peer_certificates().expect("the server's chain")[0].to_vec()
    }

    /// Status and body of one request.
    fn ask(&mut self, host: &str) -> (u16, String) {
        self.0.write_all(format!("GET / HTTP/1.1\r\nhost: {host}\r\n\r\n").as_bytes()).expect("sent");
        let mut bytes = Vec::new();
        let mut part = [0; 4096];
        loop {
            let n = self.0.read(&mut part).expect("an answer");
            assert!(n > 0, "it ended within the answer");
            bytes.extend_from_slice(&part[..n]);
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let lower = head.to_ascii_lowercase();
            let length = lower.split("content-length: ").nth(1).and_then(|l| l.split("\r\n").next()?.parse().ok());
            if body.len() >= length.unwrap_or(0usize) {
                let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
                return (status, body.to_owned());
            }
        }
    }
}

fn leaf(certificate: &Certificate) -> Vec<u8> {
    CertificateDer::from_pem_slice(certificate.chain_pem.as_bytes()).expect("PEM").to_vec()
}

fn web(address: SocketAddr) -> Vec<Resource> {
    service("web", "10.96.0.1", AppProtocol::Detect, &[address])
}

#[test]
fn a_host_chooses_the_listener_and_then_the_route() {
    let (one, two) = (start("v1"), start("v2"));
    let port = free_port();
    let rest = [
        web(one.address),
        service("v2", "10.96.0.2", AppProtocol::Detect, &[two.address]),
        vec![
            route_to("a", RouteKind::Http, &["a.example"], &[("web", 1)]),
            route_to("any", RouteKind::Http, &[], &[("v2", 1)]),
        ],
    ];
    let listeners =
        vec![http("wild", port, Some("*.example"), &["a", "any"]), http("none", port, Some("empty.example"), &[])];
    let edge = Edge::start(snapshot(1, listeners, rest.concat())).ready();
    let mut client = Client::connect(at(port));
    for (host, version, reason) in [
        ("a.example", "v1", "none"),
        ("A.example:8080", "v1", "none"),
        ("b.example", "v2", "none"),
        ("empty.example", "none", "no_route"),
        ("other.test", "none", "no_route"),
        ("example", "none", "no_route"),
    ] {
        let answer = ask(&mut client, host, "/", "");
        assert_eq!((answer.version(), answer.reason()), (version, reason), "{host}: {}", answer.head);
        assert_eq!(answer.status, if reason == "none" { 200 } else { 404 }, "{host}");
    }
    edge.running.stop();
}

#[test]
fn a_split_is_exact_and_counted_as_the_routes() {
    let (one, two) = (start("v1"), start("v2"));
    let port = free_port();
    let rest = |canary: u32| {
        let route = route_to("r", RouteKind::Http, &[], &[("web", 100 - canary), ("v2", canary)]);
        [web(one.address), service("v2", "10.96.0.2", AppProtocol::Detect, &[two.address]), vec![route]].concat()
    };
    let listeners = || vec![http("http", port, None, &["r"])];
    let edge = Edge::with(snapshot(1, listeners(), rest(10)), |s| s.workers = 1).ready();
    let mut client = Client::connect(at(port));
    let canaries = |client: &mut Client| (0..1000).filter(|_| ask(client, "x", "/", "").version() == "v2").count();
    assert!(canaries(&mut client).abs_diff(100) <= 1, "a tenth, per request");
    edge.snapshots.send_replace(snapshot(2, listeners(), rest(0)));
    eventually("the new weights are in force", || edge.running.status.borrow().held.snapshot.revision == Revision(2));
    eventually("the worker has them", || ask(&mut client, "x", "/", "").version() == "v1");
    assert_eq!(canaries(&mut client), 0);
    let all = scrape(&edge.running);
    let counted: u64 = all.series.iter().filter(|(k, _)| k.route == Some(name("r"))).map(|(_, t)| t.requests).sum();
    assert_eq!(counted, one.seen() + two.seen());
    edge.running.stop();
}

/// Beside one that was there when the gateway began, and is not new to it however short that is ago.
#[test]
fn a_newcomer_warms_up() {
    let (old, new) = (start("old"), start("new"));
    let port = free_port();
    let to = |addresses: &[SocketAddr]| {
        let policy = BackendPolicy { slow_start_ms: 600_000, balance: Balance::RoundRobin, ..BackendPolicy::default() };
        let web = with_policy(service("web", "10.96.0.1", AppProtocol::Detect, addresses), policy);
        [web, vec![route_to("r", RouteKind::Http, &[], &[("web", 1)])]].concat()
    };
    let listeners = || vec![http("http", port, None, &["r"])];
    let edge = Edge::with(snapshot(1, listeners(), to(&[old.address])), |s| s.workers = 1).ready();
    let mut client = Client::connect(at(port));
    assert_eq!(ask(&mut client, "x", "/", "").version(), "old");
    edge.snapshots.send_replace(snapshot(2, listeners(), to(&[old.address, new.address])));
    eventually("the newcomer has its first", || ask(&mut client, "x", "/", "").version() == "new");
    let before = new.seen();
    (0..2_000).for_each(|_| assert_eq!(ask(&mut client, "x", "/", "").status, 200));
    let share = (new.seen() - before) as f64 / 2_000.0;
    // Every turn that it is passed over in is another's, and then it is its turn again: a tenth of all. Five standard deviations.
    assert!((share - 0.1).abs() < 0.034, "{share}");
    edge.running.stop();
}

#[test]
fn backends_learn_who_the_client_is_and_not_what_it_says() {
    let port = free_port();
    let rest = [web(mirror()), vec![route_to("r", RouteKind::Http, &[], &[("web", 1)])]].concat();
    let edge = Edge::start(snapshot(1, vec![http("http", port, None, &["r"])], rest)).ready();
    let mut client = Client::connect(at(port));
    let lies = "x-forwarded-for: 192.0.2.1\r\nx-forwarded-proto: https\r\nforwarded: for=192.0.2.1\r\n";
    let seen = ask(&mut client, "x", "/", lies).body.to_ascii_lowercase();
    assert!(seen.contains("x-forwarded-for: 127.0.0.1\r\n") && seen.contains("x-forwarded-proto: http\r\n"), "{seen}");
    assert!(!seen.contains("192.0.2.1"), "{seen}");
    edge.running.stop();
}

#[test]
fn each_host_has_its_certificate_and_its_routes() {
    let authority = Authority::new();
    let (a, b) = (authority.sign("a.example"), authority.sign("*.b.example"));
    let port = free_port();
    let two = start("v2");
    let rest = [
        web(mirror()),
        service("v2", "10.96.0.2", AppProtocol::Detect, &[two.address]),
        vec![route_to("a", RouteKind::Http, &[], &[("web", 1)]), route_to("b", RouteKind::Http, &[], &[("v2", 1)])],
    ];
    let listeners = vec![
        https("a", port, Some("a.example"), &a, &["a"]),
        https("b", port, Some("*.b.example"), &b, &["b"]),
        Listener { mode: ListenerMode::Passthrough, ..http("raw", port, Some("raw.b.example"), &[]) },
    ];
    let edge = Edge::start(snapshot(1, listeners, rest.concat())).ready();
    let mut one = authority.connect(port, "a.example").expect("TLS");
    assert_eq!(one.leaf(), leaf(&a));
    let (status, seen) = one.ask("a.example");
    assert!(status == 200 && seen.to_ascii_lowercase().contains("x-forwarded-proto: https"), "{seen}");
    let mut other = authority.connect(port, "x.b.example").expect("TLS");
    assert_eq!((other.leaf(), other.ask("x.b.example").0), (leaf(&b), 200));
    assert!(two.seen() > 0);
    // By one's certificate to the other's routes: RFC 9110 §15.5.20.
    assert_eq!(one.ask("x.b.example").0, 421);
    // Its certificate fits, and the listener is another one, which opens nothing.
    assert_eq!(other.ask("raw.b.example").0, 421);
    assert_eq!(edge.refused(Reason::Misdirected), 2);
    assert!(authority.connect(port, "c.example").is_err(), "no listener is for it");
    let mut plain = Client::connect(at(port));
    plain.send("GET / HTTP/1.1\r\nhost: a.example\r\n\r\n");
    assert!(plain.ended(), "plain bytes where TLS is spoken");
    edge.running.stop();
}

#[test]
fn a_renewed_certificate_ends_no_connection() {
    let authority = Authority::new();
    let (old, new) = (authority.sign("a.example"), authority.sign("a.example"));
    let (app, port) = (start("v1"), free_port());
    let told = |revision, certificate| {
        let rest = [web(app.address), vec![route_to("r", RouteKind::Http, &[], &[("web", 1)])]].concat();
        snapshot(revision, vec![https("a", port, Some("a.example"), certificate, &["r"])], rest)
    };
    let edge = Edge::start(told(1, &old)).ready();
    let mut kept = authority.connect(port, "a.example").expect("TLS");
    assert_eq!((kept.leaf(), kept.ask("a.example").0), (leaf(&old), 200));
    edge.snapshots.send_replace(told(2, &new));
    eventually("new connections see the new one", || {
        authority.connect(port, "a.example").expect("TLS").leaf() == leaf(&new)
    });
    assert_eq!(kept.ask("a.example").0, 200, "the one from before goes on");
    edge.running.stop();
}

#[test]
fn tls_passes_through_by_its_name() {
    let authority = Authority::new();
    let own = authority.sign("db.example");
    let app = tls_app(&own);
    let port = free_port();
    let rest = [web(app), vec![route_to("t", RouteKind::Tls, &["db.example"], &[("web", 1)])]].concat();
    let ends_here = authority.sign("a.example");
    let listeners = vec![
        Listener { mode: ListenerMode::Passthrough, ..http("tls", port, Some("*.example"), &["t"]) },
        https("https", port, Some("a.example"), &ends_here, &[]),
    ];
    let edge = Edge::start(snapshot(1, listeners, rest)).ready();
    let mut client = authority.connect(port, "db.example").expect("TLS with the app itself");
    assert_eq!((client.leaf(), client.ask("db.example")), (leaf(&own), (200, "app".to_owned())));
    assert!(authority.connect(port, "other.example").is_err(), "no route has the name");
    assert_eq!(edge.refused(Reason::NoRoute), 1);
    // Beside it, on the same port, TLS ends at the gateway.
    let mut here = authority.connect(port, "a.example").expect("TLS");
    assert_eq!((here.leaf(), here.ask("a.example").0), (leaf(&ends_here), 404));
    edge.running.stop();
}

/// Answers every request with `app`, over TLS of its own.
fn tls_app(certificate: &Certificate) -> SocketAddr {
    let chain = vec![CertificateDer::from_pem_slice(certificate.chain_pem.as_bytes()).expect("PEM")];
    let key = PrivateKeyDer::from_pem_slice(certificate.key_pem.0.as_bytes()).expect("PEM");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("a pair");
    let (config, listener) = (Arc::new(config), TcpListener::bind(LOCAL).expect("bind"));
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let connection = ServerConnection::new(config.clone()).expect("a connection");
            std::thread::spawn(move || {
                let mut stream = StreamOwned::new(connection, socket);
                let mut part = [0; 4096];
                while let Ok(1..) = stream.read(&mut part) {
                    if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\napp").is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

#[test]
fn listeners_come_and_go_without_a_restart() {
    let (app, first, second) = (start("v1"), free_port(), free_port());
    let told = |revision, ports: &[u16]| {
        let rest = [web(app.address), vec![route_to("r", RouteKind::Http, &[], &[("web", 1)])]].concat();
        let listeners = ports.iter().map(|p| http(&format!("l{p}"), *p, None, &["r"])).collect();
        snapshot(revision, listeners, rest)
    };
    let edge = Edge::start(told(1, &[first])).ready();
    let mut kept = Client::connect(at(first));
    assert_eq!(ask(&mut kept, "x", "/", "").status, 200);
    assert!(TcpStream::connect(at(second)).is_err());
    edge.snapshots.send_replace(told(2, &[first, second]));
    eventually("the second is there", || TcpStream::connect(at(second)).is_ok());
    assert_eq!(ask(&mut Client::connect(at(second)), "x", "/", "").status, 200);
    assert_eq!(ask(&mut kept, "x", "/", "").status, 200, "the connection from before goes on");
    edge.snapshots.send_replace(told(3, &[second]));
    eventually("the first is gone", || TcpStream::connect(at(first)).is_err());
    assert_eq!(ask(&mut kept, "x", "/", "").status, 404, "its listener is no more");
    edge.running.stop();
}

#[test]
fn a_port_that_is_taken_is_listened_at_once_it_is_free() {
    let app = start("v1");
    let holder = TcpListener::bind(LOCAL).expect("bind");
    let port = holder.local_addr().expect("an address").port();
    let rest = [web(app.address), vec![route_to("r", RouteKind::Http, &[], &[("web", 1)])]].concat();
    let edge = Edge::start(snapshot(1, vec![http("http", port, None, &["r"])], rest));
    assert!(!edge.running.status.borrow().missing().is_empty(), "it is not ready");
    drop(holder);
    let edge = edge.ready();
    assert_eq!(ask(&mut Client::connect(at(port)), "x", "/", "").status, 200);
    edge.running.stop();
}

#[test]
fn both_versions_of_http_are_spoken() {
    let authority = Authority::new();
    let certificate = authority.sign("a.example");
    let (app, plain, secure) = (start("v1"), free_port(), free_port());
    let rest = [web(app.address), vec![route_to("r", RouteKind::Http, &[], &[("web", 1)])]].concat();
    let listeners =
        vec![http("http", plain, None, &["r"]), https("https", secure, Some("a.example"), &certificate, &["r"])];
    let edge = Edge::start(snapshot(1, listeners, rest)).ready();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let socket = tokio::net::TcpStream::connect(at(plain)).await.expect("connect");
        assert_eq!(h2_status(socket).await, 200, "prior knowledge");
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.issuer.pem().as_bytes()).expect("PEM")).expect("a root");
        let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let socket = tokio::net::TcpStream::connect(at(secure)).await.expect("connect");
        let name = ServerName::try_from("a.example").expect("a name");
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, socket).await.expect("TLS");
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        assert_eq!(h2_status(stream).await, 200, "by ALPN");
    });
    edge.running.stop();
}

async fn h2_status<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static>(stream: S) -> u16 {
    let (sender, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    let mut sender = sender.ready().await.expect("ready");
    let request = ::http::Request::get("http://a.example/").body(()).expect("a request");
    let (answer, _) = sender.send_request(request, true).expect("sent");
    answer.await.expect("an answer").status().as_u16()
}

#[test]
fn clients_without_identity_have_rates_of_their_own() {
    let (app, port) = (start("v1"), free_port());
    let limit = InboundLimit {
        policy: name("limit"),
        from: vec![],
        to: vec![],
        limit: RateLimit { requests: 1, per_ms: 60_000, burst: 2 },
        per_identity: true,
    };
    let policy = Policy { name: name("client"), rate_limits: vec![limit], ..Policy::default() };
    let rest =
        [web(app.address), vec![route_to("r", RouteKind::Http, &[], &[("web", 1)]), Resource::Policy(policy)]].concat();
    let edge = Edge::with(snapshot(1, vec![http("http", port, None, &["r"])], rest), |s| s.workers = 1).ready();
    for ip in ["127.0.0.2", "127.0.0.3"] {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        let own: SocketAddr = format!("{ip}:0").parse().expect("an address");
        socket.bind(&own.into()).expect("bind");
        socket.connect(&at(port).into()).expect("connect");
        let mut stream: TcpStream = socket.into();
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        let statuses: Vec<String> = (0..3)
            .map(|_| {
                stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").expect("sent");
                let mut part = [0; 4096];
                let n = stream.read(&mut part).expect("an answer");
                String::from_utf8_lossy(&part[9..12.min(n)]).into_owned()
            })
            .collect();
        assert_eq!(statuses, ["200", "200", "429"], "{ip}");
    }
    edge.running.stop();
}

#[test]
fn a_gateway_that_drains_says_so_and_ends_idle_connections() {
    let (app, port) = (start("v1"), free_port());
    let rest = [web(app.address), vec![route_to("r", RouteKind::Http, &[], &[("web", 1)])]].concat();
    let edge = Edge::with(snapshot(1, vec![http("http", port, None, &["r"])], rest), |s| {
        s.drain = Duration::from_secs(2);
    })
    .ready();
    let (mut used, mut idle) = (Client::connect(at(port)), Client::connect(at(port)));
    assert_eq!((ask(&mut used, "x", "/", "").status, ask(&mut idle, "x", "/", "").status), (200, 200));
    let running = edge.running;
    let draining = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(running.drain());
    });
    let said = Mutex::new(None);
    eventually("answers say that it ends", || {
        let Some(answer) = used.try_ask("GET / HTTP/1.1\r\nhost: x\r\n\r\n") else { return true };
        *said.lock().expect("a lock") = answer.header("connection").map(str::to_owned);
        said.lock().expect("a lock").is_some()
    });
    assert_eq!(said.lock().expect("a lock").as_deref(), Some("close"));
    assert!(idle.ended());
    draining.join().expect("drained");
}

/// Each answer would be held for him, and his connection with the backend's: for ever, for his kernel answers all the while.
#[test]
fn a_client_that_takes_nothing_is_ended() {
    let listener = TcpListener::bind(LOCAL).expect("bind");
    let app = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n");
                while stream.write_all(&[0; 65_536]).is_ok() {}
            });
        }
    });
    let port = free_port();
    let rest = [web(app), vec![route_to("r", RouteKind::Http, &[], &[("web", 1)])]].concat();
    let edge = Edge::with(snapshot(1, vec![http("http", port, None, &["r"])], rest), |s| {
        s.limits.body_idle = Duration::from_secs(1);
    })
    .ready();
    let mut client = Client::connect(at(port));
    client.send("GET / HTTP/1.1\r\nhost: x\r\n\r\n");
    eventually("it is served", || scrape(&edge.running).open_inbound == 1);
    eventually("it is ended", || scrape(&edge.running).open_inbound == 0);
    edge.running.stop();
}

/// RFC 9113 §6.5.2: what a client may have under way is less than what a sidecar may.
#[test]
fn a_client_is_told_how_much_it_may_ask_at_a_time() {
    let port = free_port();
    let edge = Edge::start(snapshot(1, vec![http("http", port, None, &[])], vec![])).ready();
    let mut stream = TcpStream::connect(at(port)).expect("connect");
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").expect("send");
    let mut head = [0; 9];
    stream.read_exact(&mut head).expect("a frame");
    assert_eq!(head[3], 4, "SETTINGS");
    let mut settings = vec![0; usize::from(u16::from_be_bytes([head[1], head[2]]))];
    stream.read_exact(&mut settings).expect("its settings");
    let value = |id: u16| {
        let found = settings.chunks(6).find(|s| s[..2] == id.to_be_bytes())?;
        Some(u32::from_be_bytes([found[2], found[3], found[4], found[5]]))
    };
    let (streams, window) = (3, 4);
    assert_eq!((value(streams), value(window)), (Some(100), Some(65_536)));
    edge.running.stop();
}

#[test]
fn a_connection_without_requests_is_ended() {
    let (app, port) = (start("v1"), free_port());
    let rest = [web(app.address), vec![route_to("r", RouteKind::Http, &[], &[("web", 1)])]].concat();
    let edge = Edge::with(snapshot(1, vec![http("http", port, None, &["r"])], rest), |s| {
        s.limits.idle = Duration::from_millis(200);
    })
    .ready();
    let mut client = Client::connect(at(port));
    assert_eq!(ask(&mut client, "x", "/", "").status, 200);
    assert!(client.ended());
    edge.running.stop();
}
