//! The relay with real sidecars over unix sockets: state down, acknowledgements and counters up, certificates, and what
//! callers see while weights change, the agent restarts or certificates rotate.

#[path = "../../proxy/tests/common/mod.rs"]
mod common;

use common::*;
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair};
use sluice_agent::{
    relay::{Kept, NoSigner, Relay, Signer},
    view::View,
};
use sluice_bench::backend::Backend;
use sluice_model::*;
use sluice_proxy::{
    control::Source,
    run::{Listen, Running, Settings},
    socket::channel,
};
use sluice_wire::v1::{
    ClientMessage, Hello, Holder, Holders, SignResponse, WorkloadRef, client_message::Kind,
    discovery_client::DiscoveryClient, hello,
};
use std::{
    net::SocketAddr,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixAddr, UnixListener},
    },
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::{oneshot, watch};

/// Signs like control's authority, for as long as the test says.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    bundle_pem: String,
    life_s: i64,
    signed: AtomicU64,
}

impl Authority {
    fn new(life_s: i64) -> Arc<Self> {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let bundle_pem = params.self_signed(&key).expect("self-signed").pem();
        let issuer = Issuer::new(params, key);
        Arc::new(Self { issuer, bundle_pem, life_s, signed: AtomicU64::new(0) })
    }
}

#[tonic::async_trait]
impl Signer for Authority {
    async fn sign(&self, _workload: WorkloadRef, csr_pem: String) -> Result<SignResponse, tonic::Status> {
        let mut request = CertificateSigningRequestParams::from_pem(&csr_pem).expect("a request");
        let now = x509_parser::time::ASN1Time::now().timestamp();
        let at = |s| x509_parser::time::ASN1Time::from_timestamp(s).expect("a time").to_datetime();
        (request.params.not_before, request.params.not_after) = (at(now - 1), at(now + self.life_s));
        let certificate_pem = request.signed_by(&self.issuer).expect("signed").pem();
        self.signed.fetch_add(1, Ordering::Relaxed);
        Ok(SignResponse { certificate_pem, bundle_pem: self.bundle_pem.clone() })
    }
}

/// An agent's relay on a thread of its own, with a socket per pod.
struct Agent {
    views: watch::Sender<View>,
    interval: watch::Sender<u32>,
    holders: watch::Receiver<Holders>,
    relay: Arc<Relay>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Agent {
    fn start(view: View, signer: Arc<dyn Signer>, pods: &[(&str, &str)]) -> Self {
        Self::start_with(view, signer, pods, None)
    }

    /// As one that keeps its holders in a file.
    fn start_with(view: View, signer: Arc<dyn Signer>, pods: &[(&str, &str)], kept: Option<Kept>) -> Self {
        let (views, views_seen) = watch::channel(view);
        let (interval, interval_seen) = watch::channel(1);
        let (holders_kept, holders) = watch::channel(Holders::default());
        let relay = Relay::new(views_seen, interval_seen, holders_kept, signer, kept);
        let bind = |name: &str| {
            let address = UnixAddr::from_abstract_name(name).expect("a name");
            // The agent before may still be closing.
            let mut bound = None;
            eventually("the socket is free", || {
                bound = UnixListener::bind_addr(&address).ok();
                bound.is_some()
            });
            bound.expect("bound")
        };
        let sockets: Vec<_> = pods.iter().map(|(pod, socket)| (reference(pod), bind(socket))).collect();
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = relay.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                for (pod, socket) in sockets {
                    socket.set_nonblocking(true).expect("non-blocking");
                    let socket = tokio::net::UnixListener::from_std(socket).expect("a listener");
                    tokio::spawn(serving.clone().serve(socket, pod, std::future::pending()));
                }
                let _ = stopped.await;
            });
        });
        Self { views, interval, holders, relay, stop: Some(stop), thread: Some(thread) }
    }

    fn holder(&self, pod: &str) -> Option<Holder> {
        let holders = self.holders.borrow();
        holders.holders.iter().find(|h| h.workload.as_ref().is_some_and(|w| w.name == pod)).cloned()
    }

    fn in_force(&self, pod: &str, revision: u64) -> bool {
        self.holder(pod).is_some_and(|h| h.revision >= revision)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn reference(pod: &str) -> WorkloadRef {
    WorkloadRef { namespace: "shop".into(), name: pod.into(), uid: format!("uid-{pod}") }
}

fn identity(pod: &str) -> Identity {
    format!("spiffe://cluster.local/ns/shop/sa/{pod}").parse().expect("an identity")
}

fn pod(name: &str) -> Resource {
    Resource::Workload(Workload {
        name: Name::new("shop", name),
        uid: format!("uid-{name}"),
        node: "n1".into(),
        addresses: vec![],
        identity: identity(name),
        meshed: true,
        gateway: None,
    })
}

fn view(revision: u64, resources: Vec<Resource>) -> View {
    View { epoch: "one".into(), snapshot: Arc::new(Snapshot::new(Revision(revision), resources)) }
}

/// A socket name that no other test uses.
fn socket() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("sluice-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn start_sidecar(pod: &str, socket: &str, outbound: &[&str], inbound: &[SocketAddr]) -> Running {
    Running::start(Settings {
        workload: reference(pod),
        source: Source::Discovery { socket: socket.to_owned() },
        listen: Listen::At {
            outbound: outbound.iter().map(|a| (LOCAL, address(a))).collect(),
            inbound: inbound.iter().map(|a| (LOCAL, *a)).collect(),
        },
        workers: 2,
        admin: LOCAL,
        drain: Duration::from_secs(5),
        inside: [].into(),
        observe: Default::default(),
        limits: Default::default(),
    })
    .expect("the sidecar starts")
}

fn wait_ready(running: &Running) {
    eventually("the sidecar is ready", || running.status.borrow().missing().is_empty());
}

fn weights(web: u32, v2: u32, one: &Backend, two: &Backend) -> Vec<Resource> {
    [
        vec![pod("client"), split(&[("web", web), ("v2", v2)])],
        service("web", "10.96.0.1", AppProtocol::Detect, &[one.address]),
        service("v2", "10.96.0.2", AppProtocol::Detect, &[two.address]),
    ]
    .concat()
}

/// Requests without pause from several connections until told to stop; panics at the first that fails.
fn load(to: SocketAddr, stop: &Arc<AtomicBool>) -> Vec<std::thread::JoinHandle<u64>> {
    let one = move |stop: Arc<AtomicBool>| {
        let mut client = Client::connect(to);
        let mut done = 0;
        while !stop.load(Ordering::Relaxed) {
            let answer = client.get("/");
            assert_eq!(answer.status, 200, "{answer:?}");
            done += 1;
        }
        done
    };
    (0..4).map(|_| (stop.clone(), one)).map(|(stop, one)| std::thread::spawn(move || one(stop))).collect()
}

#[test]
fn weights_change_under_load_without_a_failure_and_are_acknowledged() {
    let (one, two, socket) = (start("v1"), start("v2"), socket());
    let agent = Agent::start(view(1, weights(100, 0, &one, &two)), Arc::new(NoSigner), &[("client", &socket)]);
    let running = start_sidecar("client", &socket, &[WEB], &[]);
    wait_ready(&running);
    eventually("the first view is acknowledged", || agent.in_force("client", 1));
    let stop = Arc::new(AtomicBool::new(false));
    let clients = load(running.outbound[0], &stop);
    eventually("requests flow", || one.seen() > 100);
    eventually("the route is held", || agent.holder("client").is_some_and(|h| h.routes.len() == 1));
    assert_eq!(two.seen(), 0);
    for (revision, (web, v2)) in (2..).zip([(50, 50), (10, 90), (100, 0), (0, 100)]) {
        agent.views.send_replace(view(revision, weights(web, v2, &one, &two)));
        eventually("the weights are in force", || agent.in_force("client", revision));
    }
    // Weight 0 is acknowledged: at most what was on its way then arrives, one request of each client.
    let (settled, before) = (one.seen(), two.seen());
    eventually("the other version takes all", || two.seen() > before + 500);
    assert!(one.seen() <= settled + clients.len() as u64, "{} and then {}", settled, one.seen());
    // A revision that changes nothing for the sidecar is in force at once.
    agent.views.send_replace(view(99, weights(0, 100, &one, &two)));
    eventually("follows", || agent.in_force("client", 99));
    stop.store(true, Ordering::Relaxed);
    let sent: u64 = clients.into_iter().map(|c| c.join().expect("no request failed")).sum();
    let metrics = || agent.relay.metrics().routes.iter().map(|r| r.requests).sum::<u64>();
    eventually("all requests are reported upwards", || metrics() == sent);
    let failures: u64 = agent.relay.metrics().routes.iter().map(|r| r.failures).sum();
    assert_eq!(failures, 0);
    agent.relay.forget("uid-client");
    assert!(agent.holder("client").is_none());
    running.stop();
}

#[test]
fn a_sidecar_serves_on_while_the_agent_is_away() {
    let (one, two, socket) = (start("v1"), start("v2"), socket());
    let agent = Agent::start(view(1, weights(100, 0, &one, &two)), Arc::new(NoSigner), &[("client", &socket)]);
    let running = start_sidecar("client", &socket, &[WEB], &[]);
    wait_ready(&running);
    let stop = Arc::new(AtomicBool::new(false));
    let clients = load(running.outbound[0], &stop);
    eventually("requests flow", || one.seen() > 100);
    drop(agent);
    eventually("the sidecar has noticed", || !running.status.borrow().connected);
    let before = one.seen();
    eventually("requests flow without the agent", || one.seen() > before + 100);
    // New connections too.
    assert_eq!(Client::connect(running.outbound[0]).get("/").status, 200);
    let agent = Agent::start(view(5, weights(0, 100, &one, &two)), Arc::new(NoSigner), &[("client", &socket)]);
    eventually("the new agent's view is in force", || {
        agent.holder("client").is_some_and(|h| h.revision >= 5 && h.routes.len() == 1)
    });
    let before = two.seen();
    eventually("its weights count", || two.seen() > before + 100);
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().expect("no request failed");
    }
    running.stop();
}

#[test]
fn a_restarted_agent_waits_for_the_sidecars_of_the_one_before() {
    let (one, two, socket) = (start("v1"), start("v2"), socket());
    let folder = tempfile::tempdir().expect("a folder");
    let agent = |revision, (web, v2), pods: &[(&str, &str)]| {
        let kept = Kept::new(folder.path().join("holders.json"));
        Agent::start_with(view(revision, weights(web, v2, &one, &two)), Arc::new(NoSigner), pods, Some(kept))
    };
    let first = agent(1, (100, 0), &[("client", &socket)]);
    let running = start_sidecar("client", &socket, &[WEB], &[]);
    wait_ready(&running);
    assert_eq!(Client::connect(running.outbound[0]).get("/").version(), "v1");
    eventually("the route is held", || first.holder("client").is_some_and(|h| h.revision == 1 && h.routes.len() == 1));
    drop(first);
    // What the next one tells control before any sidecar has found it.
    let unserved = agent(2, (0, 100), &[]);
    let holder = unserved.holder("client").expect("known from before");
    assert!(holder.routes.len() == 1 && holder.revision < 2, "must still be asked about the weights: {holder:?}");
    drop(unserved);
    // And everything that it tells until the sidecar has acknowledged.
    let served = agent(2, (0, 100), &[("client", &socket)]);
    let mut told = served.holders.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let acknowledged = async {
        loop {
            let holder = told.borrow_and_update().holders.first().cloned().expect("never gone");
            assert_eq!(holder.routes.len(), 1, "never without its route");
            if holder.revision >= 2 {
                return;
            }
            told.changed().await.expect("the agent runs");
        }
    };
    let in_time = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), acknowledged).await });
    in_time.expect("acknowledged in time");
    assert_eq!(Client::connect(running.outbound[0]).get("/").version(), "v2", "what is acknowledged is in force");
    running.stop();
    served.relay.forget("uid-client");
    drop(served);
    assert!(agent(3, (0, 100), &[]).holder("client").is_none(), "left with its pod");
}

/// The relay looks at a view for longer than it takes to publish the next: neither may wait for the other.
#[test]
fn views_may_change_while_the_relay_looks_at_one() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let (views, seen) = watch::channel(view(0, vec![pod("web")]));
    let (_interval, interval) = watch::channel(1);
    let relay = Relay::new(seen, interval, watch::channel(Holders::default()).0, Arc::new(NoSigner), None);
    let (metrics, _reports) = tokio::sync::mpsc::channel(1000);
    let report = runtime.spawn(relay.report(metrics));
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        (1..20_000).for_each(|n| drop(views.send_replace(view(n, vec![pod("web")]))));
        done.send(()).expect("the test waits");
    });
    let published = is_done.recv_timeout(Duration::from_secs(60));
    if published.is_ok() {
        // Nobody publishes any more.
        runtime.block_on(report).expect("the relay ends");
    }
    runtime.shutdown_background();
    published.expect("all views are published");
}

#[test]
fn another_pods_socket_is_refused() {
    let socket = socket();
    let agent = Agent::start(view(1, vec![pod("client"), pod("thief")]), Arc::new(NoSigner), &[("client", &socket)]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let refused = runtime.block_on(async {
        let mut client = DiscoveryClient::new(channel(&socket).await.expect("connects"));
        let subscriber = Some(hello::Subscriber::Workload(reference("thief")));
        let hello = ClientMessage { kind: Some(Kind::Hello(Hello { subscriber, ..Hello::default() })) };
        client.stream(tokio_stream::iter([hello])).await.expect_err("refused")
    });
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    assert!(agent.holder("thief").is_none());
}

/// Two meshed pods: a client, and a server whose app answers as "v1".
struct Mesh2 {
    app: Backend,
    agent: Agent,
    client: Running,
    server: Running,
    mode: InboundMode,
}

impl Mesh2 {
    fn start(signer: Arc<dyn Signer>, mode: InboundMode, expected: &str, app_protocol: AppProtocol) -> Self {
        let (app, sockets) = (start("v1"), [socket(), socket()]);
        let pods = [("client", sockets[0].as_str()), ("server", sockets[1].as_str())];
        let agent = Agent::start(view(1, vec![pod("client"), pod("server")]), signer, &pods);
        let server = start_sidecar("server", &sockets[1], &[], &[app.address]);
        let client = start_sidecar("client", &sockets[0], &[WEB], &[]);
        let this = Self { app, agent, client, server, mode };
        this.publish(2, expected, app_protocol);
        wait_ready(&this.client);
        wait_ready(&this.server);
        eventually("the policy is in force", || this.agent.in_force("server", 2));
        this
    }

    fn publish(&self, revision: u64, expected: &str, app_protocol: AppProtocol) {
        let mut web = service("web", "10.96.0.1", app_protocol, &[self.server.inbound[0]]);
        if let Resource::EndpointSet(set) = &mut web[1] {
            set.endpoints[0].mesh = Mesh::Mtls(identity(expected));
        }
        let name = Name::new("shop", "server");
        let policy = Resource::Policy(Policy { name, mode: self.mode, ..Policy::default() });
        self.agent.views.send_replace(view(revision, [vec![pod("client"), pod("server"), policy], web].concat()));
    }

    fn stop(self) {
        self.client.stop();
        self.server.stop();
    }
}

#[test]
fn meshed_pods_speak_mtls_and_strict_refuses_the_others() {
    let mesh = Mesh2::start(Authority::new(3600), InboundMode::Strict, "server", AppProtocol::Detect);
    let mut client = Client::connect(mesh.client.outbound[0]);
    for _ in 0..20 {
        let answer = client.get("/");
        assert_eq!((answer.status, answer.version()), (200, "v1"), "{answer:?}");
    }
    let mut plain = Client::connect(mesh.server.inbound[0]);
    let refused = plain.get("/");
    assert_eq!((refused.status, refused.reason()), (403, "plain_refused"));
    assert_eq!(mesh.app.seen(), 20);
    mesh.stop();
}

#[test]
fn permissive_takes_both() {
    let mesh = Mesh2::start(Authority::new(3600), InboundMode::Permissive, "server", AppProtocol::Detect);
    assert_eq!(Client::connect(mesh.client.outbound[0]).get("/").status, 200);
    assert_eq!(Client::connect(mesh.server.inbound[0]).get("/").status, 200);
    mesh.stop();
}

#[test]
fn a_server_that_is_someone_else_is_not_trusted() {
    let mesh = Mesh2::start(Authority::new(3600), InboundMode::Strict, "somebody-else", AppProtocol::Detect);
    let answer = Client::connect(mesh.client.outbound[0]).get("/");
    assert_eq!((answer.status, answer.reason()), (503, "identity_not_proven"));
    assert_eq!(mesh.app.seen(), 0);
    mesh.stop();
}

#[test]
fn opaque_connections_are_encrypted_too() {
    let mesh = Mesh2::start(Authority::new(3600), InboundMode::Strict, "server", AppProtocol::Tcp);
    // Opaque to the client's side; the server's side recognises the request inside.
    assert_eq!(Client::connect(mesh.client.outbound[0]).get("/").version(), "v1");
    mesh.stop();
}

#[test]
fn certificates_rotate_under_load() {
    let authority = Authority::new(3);
    let mesh = Mesh2::start(authority.clone(), InboundMode::Strict, "server", AppProtocol::Detect);
    let stop = Arc::new(AtomicBool::new(false));
    let clients = load(mesh.client.outbound[0], &stop);
    let first = authority.signed.load(Ordering::Relaxed);
    eventually("both have renewed twice", || authority.signed.load(Ordering::Relaxed) >= first + 4);
    // A new connection after the first certificates have expired.
    assert_eq!(Client::connect(mesh.client.outbound[0]).get("/").status, 200);
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().expect("no request failed");
    }
    mesh.stop();
}

#[test]
fn the_interval_of_reports_is_passed_on() {
    let socket = socket();
    let agent = Agent::start(view(1, vec![pod("client")]), Arc::new(NoSigner), &[("client", &socket)]);
    let running = start_sidecar("client", &socket, &[], &[]);
    wait_ready(&running);
    agent.interval.send_replace(7);
    agent.interval.send_replace(1);
    eventually("acknowledged", || agent.in_force("client", 1));
    running.stop();
}

/// One server pod of a rolling update: an app and its sidecar.
fn start_server(pod: &str, socket: &str) -> (Backend, Running) {
    let app = start(pod);
    let sidecar = start_sidecar(pod, socket, &[], &[app.address]);
    (app, sidecar)
}

/// The view with these servers as the endpoints of `web`, each proving its own identity.
fn with_endpoints(revision: u64, servers: &[(&str, SocketAddr)]) -> View {
    let addresses: Vec<_> = servers.iter().map(|(_, a)| *a).collect();
    let mut web = service("web", "10.96.0.1", AppProtocol::Detect, &addresses);
    if let Resource::EndpointSet(set) = &mut web[1] {
        for (endpoint, (name, _)) in set.endpoints.iter_mut().zip(servers) {
            endpoint.mesh = Mesh::Mtls(identity(name));
        }
    }
    view(revision, [vec![pod("client"), pod("old"), pod("new")], web].concat())
}

#[test]
fn a_rolling_update_fails_no_request() {
    let sockets = [socket(), socket(), socket()];
    let pods = [("client", sockets[0].as_str()), ("old", &sockets[1]), ("new", &sockets[2])];
    let agent = Agent::start(with_endpoints(1, &[]), Authority::new(3600), &pods);
    let (old_app, old) = start_server("old", &sockets[1]);
    let (new_app, new) = start_server("new", &sockets[2]);
    let client = start_sidecar("client", &sockets[0], &[WEB], &[]);
    [&old, &new, &client].into_iter().for_each(wait_ready);
    let (old_at, new_at) = (("old", old.inbound[0]), ("new", new.inbound[0]));
    agent.views.send_replace(with_endpoints(2, &[old_at]));
    eventually("the old pod serves", || Client::connect(client.outbound[0]).get("/").version() == "old");
    let stop = Arc::new(AtomicBool::new(false));
    let clients = load(client.outbound[0], &stop);
    agent.views.send_replace(with_endpoints(3, &[old_at, new_at]));
    eventually("both serve", || new_app.seen() > 200 && old_app.seen() > 200);
    // The worst order: the app dies under load, then its sidecar ends, and only then the endpoint is withdrawn.
    drop(old_app);
    let before = new_app.seen();
    eventually("the other takes over", || new_app.seen() > before + 500);
    let draining = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(old.drain());
    });
    eventually("the old sidecar has ended", || draining.is_finished());
    let before = new_app.seen();
    eventually("requests flow", || new_app.seen() > before + 500);
    agent.views.send_replace(with_endpoints(4, &[new_at]));
    eventually("withdrawn", || agent.in_force("client", 4));
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().expect("no request failed");
    }
    draining.join().expect("drained");
    client.stop();
    new.stop();
}
