//! What the tests of this folder share: snapshots, a sidecar outside a pod, and a client that sees every byte.
#![allow(dead_code, unreachable_pub)] // each test file uses a part of it

use sluice_bench::backend::Backend;
use sluice_model::*;
use sluice_proxy::{
    control::Source,
    limits::Limits,
    run::{Listen, Running, Settings},
};
use sluice_wire::v1::WorkloadRef;
use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

pub const WEB: &str = "10.96.0.1:80";
pub const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

pub fn address(a: &str) -> SocketAddr {
    a.parse().expect("an address")
}

/// A service of one HTTP port whose endpoints are `addresses`.
pub fn service(name: &str, ip: &str, app_protocol: AppProtocol, addresses: &[SocketAddr]) -> Vec<Resource> {
    let name = Name::new("shop", name);
    // Endpoints of one test listen on different ports of one machine: each is a port of its own name.
    let endpoint = |a: &SocketAddr| Endpoint {
        address: a.ip(),
        ready: true,
        node: String::new(),
        zone: String::new(),
        draining: false,
        workload: None,
        hostname: None,
        mesh: Mesh::Plain,
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: a.port() }],
    };
    let port = ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80, app_protocol, node_port: None };
    vec![
        Resource::Service(Service {
            name: name.clone(),
            virtual_ips: vec![ip.parse().expect("an address")],
            ports: vec![port],
            ..Service::default()
        }),
        Resource::EndpointSet(EndpointSet { name, endpoints: addresses.iter().map(endpoint).collect() }),
    ]
}

pub fn backend(name: &str, weight: u32) -> sluice_model::Backend {
    sluice_model::Backend { service: Name::new("shop", name), port: 80, weight, ..Default::default() }
}

pub fn route(rules: Vec<Rule>) -> Resource {
    Resource::Route(Route {
        name: Name::new("shop", "web-route"),
        kind: RouteKind::Http,
        parent: Name::new("shop", "web"),
        parent_port: None,
        created_s: 1,
        generation: 1,
        rules,
    })
}

/// The service of `resources` with a policy.
pub fn with_policy(mut resources: Vec<Resource>, policy: BackendPolicy) -> Vec<Resource> {
    for r in &mut resources {
        if let Resource::Service(service) = r {
            service.backend_policy = Some(policy.clone());
        }
    }
    resources
}

/// All counters of a sidecar.
pub fn scrape(running: &Running) -> sluice_proxy::metrics::Scrape {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(running.scrape())
}

pub fn split(weights: &[(&str, u32)]) -> Resource {
    route(vec![Rule { backends: weights.iter().map(|(n, w)| backend(n, *w)).collect(), ..Rule::default() }])
}

pub fn workload() -> WorkloadRef {
    WorkloadRef { namespace: "shop".into(), name: "client".into(), uid: "u".into() }
}

pub fn settings(resources: Vec<Resource>) -> Settings {
    Settings {
        workload: workload(),
        source: Source::Static {
            snapshot: Snapshot::new(Revision(1), resources),
            certificate: tokio::sync::watch::channel(None).1,
        },
        listen: Listen::At { outbound: vec![(LOCAL, address(WEB))], inbound: vec![] },
        workers: 1,
        admin: LOCAL,
        drain: Duration::from_secs(10),
        inside: [].into(),
        observe: Default::default(),
        limits: Limits::default(),
    }
}

/// A sidecar that takes connections to its first outbound listener as ones to `WEB`.
pub fn sidecar(resources: Vec<Resource>) -> Running {
    Running::start(settings(resources)).expect("the sidecar starts")
}

/// A client's connection.
pub struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.split("\r\n").skip(1).find_map(|l| {
            let (n, v) = l.split_once(':')?;
            n.eq_ignore_ascii_case(name).then(|| v.trim())
        })
    }

    pub fn version(&self) -> &str {
        self.header("x-version").unwrap_or("none")
    }

    pub fn reason(&self) -> &str {
        self.header("x-sluice-reason").unwrap_or("none")
    }
}

impl Client {
    pub fn connect(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).expect("connect");
        stream.set_nodelay(true).expect("nodelay");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        Self { stream, buffer: Vec::new() }
    }

    /// How long it waits for bytes, instead of ten seconds.
    pub fn patience(&mut self, patience: Duration) {
        self.stream.set_read_timeout(Some(patience)).expect("timeout");
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).expect("send");
    }

    /// The other side may have closed already.
    pub fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Like [`Client::ask`] where the connection may be gone.
    pub fn try_ask(&mut self, request: &str) -> Option<Answer> {
        self.try_send(request.as_bytes()).ok()?;
        self.answer(false)
    }

    /// Bytes have come, or the end, within the patience.
    pub fn ready(&mut self) -> bool {
        let waited = self.stream.peek(&mut [0]);
        !waited.is_err_and(|e| matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
    }

    /// Ends the connection as a client that crashed does.
    pub fn reset(self) {
        socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).expect("linger");
    }

    pub fn half_close(&mut self) {
        // The other side may have closed already.
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
    }

    pub fn get(&mut self, path: &str) -> Answer {
        self.ask("GET", path, "")
    }

    /// `headers`: whole lines, each with its line end.
    pub fn ask(&mut self, method: &str, path: &str, headers: &str) -> Answer {
        self.send(format!("{method} {path} HTTP/1.1\r\nhost: web\r\n{headers}\r\n"));
        self.answer(method == "HEAD").expect("an answer")
    }

    /// The next answer; `None` when the connection ended before.
    pub fn answer(&mut self, without_body: bool) -> Option<Answer> {
        let head = self.take_until("\r\n\r\n")?;
        let status: u16 = head.split(' ').nth(1)?.parse().ok()?;
        let mut answer = Answer { status, head, body: String::new() };
        if without_body || status == 101 || status == 204 {
            return Some(answer);
        }
        answer.body = match (answer.header("content-length"), answer.header("transfer-encoding")) {
            (Some(n), _) => self.take(n.parse().expect("a length"))?,
            (None, Some("chunked")) => self.chunks()?,
            _ => self.rest(),
        };
        Some(answer)
    }

    fn chunks(&mut self) -> Option<String> {
        let mut body = String::new();
        loop {
            let line = self.take_until("\r\n")?;
            let size = usize::from_str_radix(line.trim_end().split(';').next()?, 16).ok()?;
            body += &self.take(size)?;
            self.take_until("\r\n")?;
            if size == 0 {
                return Some(body);
            }
        }
    }

    pub fn rest(&mut self) -> String {
        while self.fill() {}
        String::from_utf8_lossy(&std::mem::take(&mut self.buffer)).into_owned()
    }

    pub fn take(&mut self, n: usize) -> Option<String> {
        while self.buffer.len() < n {
            if !self.fill() {
                return None;
            }
        }
        Some(String::from_utf8_lossy(&self.buffer.drain(..n).collect::<Vec<_>>()).into_owned())
    }

    pub fn take_until(&mut self, end: &str) -> Option<String> {
        loop {
            let found = self.buffer.windows(end.len()).position(|w| w == end.as_bytes());
            if let Some(at) = found {
                return self.take(at + end.len());
            }
            if !self.fill() {
                return None;
            }
        }
    }

    /// The other side has ended the connection, in whatever way.
    pub fn ended(&mut self) -> bool {
        !self.fill()
    }

    fn fill(&mut self) -> bool {
        let mut part = [0; 16 * 1024];
        match self.stream.read(&mut part) {
            Ok(0) | Err(_) => false,
            Ok(n) => {
                self.buffer.extend_from_slice(&part[..n]);
                true
            }
        }
    }
}

/// Polls until `condition` holds; fails the test after ten seconds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < until, "not within ten seconds: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A server that answers each request with half of an answer, and holds the connection until the other side ends it.
pub fn half_answering() -> SocketAddr {
    let listener = TcpListener::bind(LOCAL).expect("bind");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // An answer before its request is a protocol error, and the sidecar says so.
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
                head.push(byte[0]);
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf");
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    address
}

/// A listener that answers nobody, since its backlog is full.
pub fn silent() -> (TcpListener, Vec<TcpStream>) {
    let listener = TcpListener::bind(LOCAL).expect("bind");
    rustix::net::listen(&listener, 0).expect("listen");
    let address = listener.local_addr().expect("an address");
    let filling = (0..4).filter_map(|_| TcpStream::connect_timeout(&address, Duration::from_millis(50)).ok()).collect();
    (listener, filling)
}

pub fn start(version: &str) -> Backend {
    Backend::start(version).expect("the backend starts")
}

/// An address where nothing listens.
pub fn nowhere() -> SocketAddr {
    let listener = std::net::TcpListener::bind(LOCAL).expect("bind");
    listener.local_addr().expect("an address")
}
