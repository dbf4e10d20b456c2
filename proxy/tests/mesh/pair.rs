//! What these tests share: an authority, a pair of sidecars with certificates of it, and apps that do as they are told.

use crate::common::*;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, client::conn::http2 as client, server::conn::http2 as server, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType, date_time_ymd};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use sluice_model::{AppProtocol, Identity, InboundMode, Name, Policy, Resource, Revision, Snapshot};
use sluice_proxy::{
    control::Source,
    metrics::Scrape,
    run::{Listen, Running, Settings},
    tls::Tls,
};
use std::{
    convert::Infallible,
    io::Read,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};
use tokio::sync::{Barrier, watch};

/// Makes certificates as control's authority does.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    bundle_pem: String,
}

impl Authority {
    pub fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let bundle_pem = params.self_signed(&key).expect("self-signed").pem();
        Self { issuer: Issuer::new(params, key), bundle_pem }
    }

    /// A new certificate; every call makes another.
    pub fn tls(&self, account: &str) -> Arc<Tls> {
        self.certify(account, CertificateParams::default())
    }

    /// One that was valid once.
    pub fn expired(&self, account: &str) -> Arc<Tls> {
        let mut params = CertificateParams::default();
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2020, 1, 2));
        self.certify(account, params)
    }

    fn certify(&self, account: &str, mut params: CertificateParams) -> Arc<Tls> {
        let key = KeyPair::generate().expect("a key");
        params.subject_alt_names = vec![SanType::URI(identity(account).to_string().try_into().expect("a URI"))];
        let chain = params.signed_by(&key, &self.issuer).expect("signed").pem();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Arc::new(Tls::new(&chain, &self.bundle_pem, key, &identity(account)).expect("a certificate"))
    }
}

pub fn identity(account: &str) -> Identity {
    format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().expect("an identity")
}

/// A sidecar and how its certificate is changed.
pub struct Sidecar {
    pub running: Running,
    pub certificate: watch::Sender<Option<Arc<Tls>>>,
}

impl Sidecar {
    fn start(settings: Settings, resources: Vec<Resource>, tls: Arc<Tls>) -> Self {
        let (certificate, seen) = watch::channel(Some(tls));
        let snapshot = Snapshot::new(Revision(1), resources);
        let source = Source::Static { snapshot, certificate: seen };
        let running = Running::start(Settings { source, ..settings }).expect("the sidecar starts");
        eventually("it has its certificate", || running.status.borrow().missing().is_empty());
        Self { running, certificate }
    }

    pub fn scrape(&self) -> Scrape {
        block_on(self.running.scrape())
    }

    /// Accepted connections that are open.
    pub fn accepted(&self) -> u64 {
        self.scrape().open_inbound
    }

    /// Connections that were opened to endpoints.
    pub fn connected(&self) -> u64 {
        self.scrape().upstream_connects
    }
}

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

/// A client's sidecar, and one beside each app.
pub struct Mesh {
    pub authority: Authority,
    pub client: Sidecar,
    pub servers: Vec<Sidecar>,
}

impl Mesh {
    pub fn start(app: SocketAddr) -> Self {
        Self::of(&[app], 1, vec![])
    }

    /// `resources`: what the servers' sidecars hold.
    pub fn of(apps: &[SocketAddr], workers: usize, resources: Vec<Resource>) -> Self {
        let authority = Authority::new();
        let servers: Vec<_> = apps.iter().map(|app| server(&authority, *app, resources.clone())).collect();
        let endpoints: Vec<_> = servers.iter().map(|s| s.running.inbound[0]).collect();
        let client = client(&authority, &endpoints, workers);
        Self { authority, client, servers }
    }

    pub fn at(&self) -> SocketAddr {
        self.client.running.outbound[0]
    }

    pub fn server(&self) -> &Sidecar {
        &self.servers[0]
    }

    pub fn connect(&self) -> Client {
        Client::connect(self.at())
    }

    pub fn stop(self) {
        self.client.running.stop();
        self.servers.into_iter().for_each(|s| s.running.stop());
    }
}

/// A sidecar that sends what is dialled to `endpoints`, which must prove to be "server".
pub fn client(authority: &Authority, endpoints: &[SocketAddr], workers: usize) -> Sidecar {
    client_of(authority, service("web", "10.96.0.1", AppProtocol::Detect, endpoints), workers)
}

/// The same for a service as it is given.
pub fn client_of(authority: &Authority, mut web: Vec<Resource>, workers: usize) -> Sidecar {
    if let Resource::EndpointSet(set) = &mut web[1] {
        set.endpoints.iter_mut().for_each(|e| e.mesh = sluice_model::Mesh::Mtls(identity("server")));
    }
    Sidecar::start(Settings { workers, ..settings(vec![]) }, web, authority.tls("client"))
}

/// A sidecar that hands what it accepts to `app`.
pub fn server(authority: &Authority, app: SocketAddr, resources: Vec<Resource>) -> Sidecar {
    server_at(authority, LOCAL, app, resources)
}

pub fn server_at(authority: &Authority, at: SocketAddr, app: SocketAddr, resources: Vec<Resource>) -> Sidecar {
    let listen = Listen::At { outbound: vec![], inbound: vec![(at, app)] };
    Sidecar::start(Settings { listen, ..settings(vec![]) }, resources, authority.tls("server"))
}

/// A policy of the sidecars here that makes `port` opaque.
pub fn opaque(port: u16) -> Vec<Resource> {
    let name = Name::new("shop", "client");
    let mode = InboundMode::Permissive;
    vec![Resource::Policy(Policy { name, mode, opaque_ports: vec![port], ..Policy::default() })]
}

/// An app that hands each connection, once the head of its first request is read, to `serve`.
pub fn app(serve: impl Fn(TcpStream, String) + Clone + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind(LOCAL).expect("bind");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, serve) = (stream.expect("accept"), serve.clone());
            std::thread::spawn(move || {
                let head = read_head(&mut stream);
                serve(stream, head);
            });
        }
    });
    address
}

fn read_head(stream: &mut TcpStream) -> String {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
        head.push(byte[0]);
    }
    String::from_utf8_lossy(&head).into_owned()
}

/// An HTTP/2 app that answers with the request's body, the names of its headers, and a trailer. A request to `/together`
/// is answered when `together` of them are there.
pub fn http2_app(together: usize) -> SocketAddr {
    let all_there = Arc::new(Barrier::new(together));
    serve_each(move |stream| {
        let all_there = all_there.clone();
        let service = service_fn(move |request| echo(request, all_there.clone()));
        let mut builder = server::Builder::new(TokioExecutor::new());
        builder.max_concurrent_streams(10_000);
        // How it ends is seen at the other side.
        async move { drop(builder.serve_connection(TokioIo::new(stream), service).await) }
    })
}

/// A server on a thread of its own; `serve` takes each connection.
pub fn serve_each<F>(serve: impl Fn(tokio::net::TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind(LOCAL).expect("bind");
    let address = listener.local_addr().expect("an address");
    listener.set_nonblocking(true).expect("non-blocking");
    std::thread::spawn(move || {
        block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            loop {
                let (stream, _) = listener.accept().await.expect("accept");
                tokio::spawn(serve(stream));
            }
        });
    });
    address
}

async fn echo(request: Request<Incoming>, all_there: Arc<Barrier>) -> Result<Response<Echo>, Infallible> {
    let names = request.headers().keys().map(|n| n.as_str()).collect::<Vec<_>>().join(" ");
    let url = request.uri().to_string();
    if request.uri().path() == "/together" {
        all_there.wait().await;
    }
    let body = request.into_body().collect().await.expect("a body").to_bytes();
    let trailers = HeaderMap::from_iter([("grpc-status".parse().expect("a name"), "0".parse().expect("a value"))]);
    let body: Echo = Full::new(body).with_trailers(std::future::ready(Some(Ok(trailers)))).boxed();
    let answer = Response::builder().header("x-names", names).header("x-url", url).body(body);
    Ok(answer.expect("an answer"))
}

type Echo = http_body_util::combinators::BoxBody<Bytes, Infallible>;

/// An HTTP/2 connection to `to`.
pub async fn http2(to: SocketAddr) -> client::SendRequest<Full<Bytes>> {
    let stream = tokio::net::TcpStream::connect(to).await.expect("connect");
    let mut builder = client::Builder::new(TokioExecutor::new());
    builder.initial_max_send_streams(1000);
    let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.expect("a handshake");
    tokio::spawn(connection);
    sender
}

/// Clients that ask without pause; each panics at its first request that fails.
pub struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<u64>>,
}

impl Load {
    /// `ask` is called with a connection of its own.
    pub fn start(to: SocketAddr, clients: usize, ask: impl Fn(&mut Client, u64) + Copy + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let one = move |stop: Arc<AtomicBool>| {
            let (mut client, mut asked) = (Client::connect(to), 0);
            while !stop.load(Ordering::Relaxed) {
                ask(&mut client, asked);
                asked += 1;
            }
            asked
        };
        let clients = (0..clients).map(|_| stop.clone()).map(|stop| std::thread::spawn(move || one(stop))).collect();
        Self { stop, clients }
    }

    /// Requests that were answered.
    pub fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.into_iter().map(|c| c.join().expect("no request failed")).sum()
    }
}

/// Alternately a request that may be sent twice and one that may not.
pub fn get_and_post(client: &mut Client, n: u64) {
    let answer = if n.is_multiple_of(2) {
        client.get("/")
    } else {
        client.send("POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 5\r\n\r\nhello");
        client.answer(false).expect("an answer")
    };
    assert_eq!(answer.status, 200, "{answer:?}");
}
