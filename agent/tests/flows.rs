//! Flows from the bytes that the kernel would write to the lines that operators' programs read: the node's own server
//! over TLS, the hub and the decoder, with a ring buffer that the test fills.

use axum::body::Bytes;
use futures::{StreamExt, stream};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use serde_json::{Value, json};
use sluice_agent::{
    flows::{
        CAPACITY, Error, Follower, Hub, MAX_FOLLOWERS,
        kernel::{self, Kernel, Pins, Session},
        names::{Local, Owner},
        serve::{self, Count},
    },
    identity::NodeIdentity,
    server,
    view::View,
};
use sluice_ebpf::{
    addr,
    common::{Event, Flow, MASQUERADE, Reason, TCP, WATCH_DROPS, WATCH_FLOWS, hook, map},
    events::{decode, encode},
    loader::{self, Place},
    maps::pin_dir,
    settings::SettingsMap,
};
use sluice_model::{AppProtocol, Name, Protocol, Resource, Revision, Service, ServicePort, Snapshot};
use sluice_wire::flows::Filter;
use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
};

const NODE: &str = "node-1";
const BOTH: u32 = WATCH_DROPS | WATCH_FLOWS;

/// In place of the kernel: a ring buffer that the test writes, settings that it reads.
#[derive(Clone)]
struct Fake {
    ring: Arc<Mutex<Option<mpsc::Sender<Vec<u8>>>>>,
    bits: watch::Sender<u32>,
    opened: watch::Sender<usize>,
    lost: Arc<AtomicU64>,
    broken: Arc<Mutex<bool>>,
}

impl Fake {
    fn new() -> Self {
        Self {
            ring: Arc::default(),
            bits: watch::Sender::new(0),
            opened: watch::Sender::new(0),
            lost: Arc::default(),
            broken: Arc::default(),
        }
    }

    async fn write(&self, record: Vec<u8>) {
        let ring = self.ring.lock().expect("no holder panics").clone().expect("somebody reads");
        ring.send(record).await.expect("somebody reads");
    }

    async fn until_bits(&self, wanted: u32) {
        let mut bits = self.bits.subscribe();
        let reached = tokio::time::timeout(Duration::from_secs(10), bits.wait_for(|b| *b == wanted)).await;
        assert!(reached.is_ok(), "watch bits stay at {}, wanted {wanted}", *self.bits.borrow());
    }
}

impl Kernel for Fake {
    fn watch(&self, bits: u32) -> Result<(), kernel::Error> {
        self.bits.send_replace(bits);
        Ok(())
    }

    fn open(&self) -> Result<Session, kernel::Error> {
        if *self.broken.lock().expect("no holder panics") {
            let path = "/sys/fs/bpf/sluice/v1/EVENTS".into();
            return Err(kernel::Error::Open(sluice_ebpf::Error::NotPinned { path }));
        }
        let (sender, receiver) = mpsc::channel(64);
        *self.ring.lock().expect("no holder panics") = Some(sender);
        self.opened.send_modify(|n| *n += 1);
        let next = |mut r: mpsc::Receiver<Vec<u8>>| async move { r.recv().await.map(|bytes| (decode(&bytes), r)) };
        let lost = self.lost.clone();
        Ok(Session {
            events: stream::unfold(receiver, next).boxed(),
            local: Arc::new(Pods),
            lost: Box::new(move || lost.load(Ordering::SeqCst)),
        })
    }

    fn booted(&self) -> Result<SystemTime, kernel::Error> {
        Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(1_769_860_800))
    }
}

struct Pods;

impl Local for Pods {
    fn netns(&self, cookie: u64) -> Option<Owner> {
        (cookie == 7).then(|| Owner::Pod("shop/web".into()))
    }

    fn pod(&self, address: IpAddr) -> Option<String> {
        (address == ip("10.244.1.7")).then(|| "shop/web".into())
    }

    fn is_own(&self, _: IpAddr) -> bool {
        false
    }

    fn interface(&self, _: u32) -> Option<String> {
        None
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect(text)
}

fn views() -> watch::Receiver<View> {
    let port = ServicePort {
        name: String::new(),
        protocol: Protocol::Tcp,
        port: 80,
        app_protocol: AppProtocol::Detect,
        node_port: None,
    };
    let service = Service {
        name: Name::new("shop", "api"),
        virtual_ips: vec![ip("10.96.0.7")],
        ports: vec![port],
        ..Service::default()
    };
    let snapshot = Arc::new(Snapshot::new(Revision(1), [Resource::Service(service)]));
    watch::channel(View { epoch: "e".into(), snapshot }).1
}

fn hub(fake: &Fake) -> Arc<Hub> {
    Hub::start(NODE.into(), fake.clone(), views())
}

fn tcp(source: &str, destination: &str) -> Flow {
    let end = |text: &str| text.parse::<SocketAddr>().expect(text);
    let (source, destination) = (end(source), end(destination));
    Flow {
        src: addr(source.ip()),
        dst: addr(destination.ip()),
        sport_be: source.port().to_be(),
        dport_be: destination.port().to_be(),
        proto: TCP,
        ..Flow::default()
    }
}

/// The pod's socket dials the service.
fn translated() -> Vec<u8> {
    let before = tcp("0.0.0.0:0", "10.96.0.7:80");
    let after = tcp("0.0.0.0:0", "10.244.2.5:8080");
    let reason = Reason::Translated as u32;
    encode(&Event { time_ns: 62_123_456_000, netns: 7, before, after, reason, hook: hook::SOCKET, ..Event::default() })
}

/// The pod's packet goes nowhere.
fn dropped() -> Vec<u8> {
    let before = tcp("10.244.1.7:5000", "203.0.113.9:443");
    let reason = Reason::DroppedNoRoute as u32;
    encode(&Event { before, after: before, reason, hook: hook::POD, dropped: 1, ..Event::default() })
}

/// The next that is no sign of life.
async fn next(follower: &mut Follower) -> Value {
    loop {
        let line = tokio::time::timeout(Duration::from_secs(20), follower.next_line()).await.expect("a line in time");
        let line = line.expect("the hub lives");
        assert_eq!(line.last(), Some(&b'\n'));
        let record: Value = serde_json::from_slice(&line).expect("a line is JSON");
        if record["kind"] != "idle" {
            return record;
        }
    }
}

#[tokio::test]
async fn the_programs_are_asked_while_somebody_follows() {
    let fake = Fake::new();
    let hub = hub(&fake);
    let drops = hub.follow(Filter { drops: true, ..Filter::default() }).await.expect("follows");
    assert_eq!(*fake.bits.borrow(), WATCH_DROPS, "in force when `follow` returns");
    let mut all = hub.follow(Filter::default()).await.expect("follows");
    assert_eq!(*fake.bits.borrow(), BOTH);
    assert_eq!(*fake.opened.borrow(), 1, "one reader for both");
    drop(drops);
    fake.write(translated()).await;
    assert_eq!(next(&mut all).await["verdict"], "translated");
    drop(all);
    fake.until_bits(0).await;
    let again = hub.follow(Filter::default()).await.expect("follows");
    assert_eq!((*fake.bits.borrow(), *fake.opened.borrow()), (BOTH, 2));
    drop((hub, again));
    fake.until_bits(0).await;
}

#[tokio::test]
async fn each_follower_gets_what_it_asked_for() {
    let fake = Fake::new();
    let hub = hub(&fake);
    let mut all = hub.follow(Filter::default()).await.expect("follows");
    let mut drops = hub.follow(Filter { drops: true, ..Filter::default() }).await.expect("follows");
    let of_api = Filter { service: Some("shop/api".into()), ..Filter::default() };
    let mut of_api = hub.follow(of_api).await.expect("follows");
    fake.write(dropped()).await;
    fake.write(translated()).await;
    fake.write(b"nonsense".to_vec()).await;
    assert_eq!(next(&mut all).await["reason"], "dropped_no_route");
    assert_eq!(next(&mut all).await["reason"], "translated");
    assert_eq!(next(&mut drops).await["reason"], "dropped_no_route");
    assert_eq!(next(&mut of_api).await["service"]["name"], "shop/api");
    for follower in [&mut all, &mut drops, &mut of_api] {
        assert_eq!(next(follower).await["kind"], "unknown", "what nobody understands is everybody's");
    }
}

#[tokio::test]
async fn a_slow_follower_is_told_what_it_lost_and_holds_up_nobody() {
    const SENT: usize = CAPACITY + 500;
    let fake = Fake::new();
    let hub = hub(&fake);
    let mut slow = hub.follow(Filter { drops: true, ..Filter::default() }).await.expect("follows");
    let mut fast = hub.follow(Filter { drops: true, ..Filter::default() }).await.expect("follows");
    for _ in 0..SENT {
        fake.write(dropped()).await;
        assert_eq!(next(&mut fast).await["kind"], "flow", "the fast one loses nothing");
    }
    let lost = next(&mut slow).await;
    assert_eq!((&lost["kind"], &lost["by"], &lost["node"]), (&json!("lost"), &json!("follower"), &json!(NODE)));
    for _ in 0..CAPACITY {
        assert_eq!(next(&mut slow).await["kind"], "flow", "what it had room for");
    }
    fake.write(b"the end".to_vec()).await;
    assert_eq!(next(&mut slow).await["kind"], "unknown");
    assert_eq!(lost["count"], SENT - CAPACITY, "each is seen or counted");
}

#[tokio::test]
async fn what_the_kernel_lost_is_told_to_all() {
    let fake = Fake::new();
    fake.lost.store(1000, Ordering::SeqCst);
    let hub = hub(&fake);
    let mut follower = hub.follow(Filter::default()).await.expect("follows");
    fake.lost.fetch_add(42, Ordering::SeqCst);
    let lost = next(&mut follower).await;
    assert_eq!((&lost["kind"], &lost["by"], &lost["count"]), (&json!("lost"), &json!("agent"), &json!(42)));
}

#[tokio::test]
async fn a_ring_buffer_that_was_made_anew_is_opened_again() {
    let fake = Fake::new();
    let hub = hub(&fake);
    let mut follower = hub.follow(Filter::default()).await.expect("follows");
    drop(fake.ring.lock().expect("no holder panics").take());
    fake.bits.send_replace(0); // the new settings say nothing
    fake.opened.subscribe().wait_for(|n| *n == 2).await.expect("opened again");
    fake.until_bits(BOTH).await;
    fake.write(translated()).await;
    assert_eq!(next(&mut follower).await["verdict"], "translated");
}

#[tokio::test]
async fn who_cannot_be_served_is_told_why() {
    let fake = Fake::new();
    let hub = hub(&fake);
    *fake.broken.lock().expect("no holder panics") = true;
    let error = hub.follow(Filter::default()).await.err().expect("cannot be opened").to_string();
    assert!(error.contains(NODE) && error.contains("open the programs' events") && error.contains("EVENTS"), "{error}");
    *fake.broken.lock().expect("no holder panics") = false;
    let follow = async |filter: &Filter| loop {
        // The failure before may still be told for a moment.
        match hub.follow(filter.clone()).await {
            Err(Error::Kernel { .. }) => tokio::task::yield_now().await,
            other => return other,
        }
    };
    let mut all = Vec::new();
    for _ in 0..MAX_FOLLOWERS {
        all.push(follow(&Filter::default()).await.expect("follows"));
    }
    assert!(matches!(follow(&Filter::default()).await, Err(Error::TooMany(_))));
    all.pop();
    assert!(follow(&Filter::default()).await.is_ok(), "a place is free again");
}

/// A BPF file system and a cgroup of its own, with the programs loaded. Needs root.
struct Loaded {
    base: PathBuf,
    place: Place,
}

impl Loaded {
    fn new() -> Self {
        let id = format!("sluice-test-flows-{}", std::process::id());
        let base = std::env::temp_dir().join(&id);
        let bpffs = base.join("bpf");
        fs::create_dir_all(&bpffs).expect("folder");
        mount("bpf", &bpffs, "bpf", MountFlags::empty(), None).expect("mount bpffs (root is needed)");
        let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].into_iter().map(PathBuf::from);
        let root = roots.into_iter().find(|p| p.join("cgroup.controllers").exists()).expect("a cgroup2 mount");
        let cgroup = root.join(&id);
        fs::create_dir(&cgroup).expect("cgroup");
        let loaded = Self { base, place: Place { bpffs, cgroup } };
        loader::load(&loaded.place).expect("load");
        loaded
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let _ = unmount(&self.place.bpffs, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.place.cgroup);
        let _ = fs::remove_dir_all(&self.base);
    }
}

/// The kernel's own maps: opened and waited for, asked for events, and opened again after their pins were made anew. What
/// others have set stays.
#[tokio::test]
async fn the_kernels_maps_are_followed_through_a_repair() {
    let ground = Loaded::new();
    let dir = pin_dir(&ground.place.bpffs);
    let settings = Arc::new(SettingsMap::open(&dir).expect("settings"));
    settings.update(|s| (s.host_netns, s.flags) = (9, MASQUERADE)).expect("another part's");
    let (renew, renewed) = watch::channel(());
    let pins = Pins { dir: dir.clone(), settings: settings.clone(), host_netns: 9, renewed };
    let flags = || SettingsMap::open(&dir).and_then(|s| s.get()).expect("settings").flags;
    let hub = Hub::start(NODE.into(), pins, views());
    let drops = hub.follow(Filter { drops: true, ..Filter::default() }).await.expect("follows");
    assert_eq!(flags(), MASQUERADE | WATCH_DROPS);
    for name in [map::EVENTS, map::SETTINGS] {
        fs::remove_file(dir.join(name)).expect("take a map away");
    }
    assert!(loader::repair(&ground.place).expect("repair"));
    settings.reopen().expect("reopen");
    renew.send_replace(());
    let all = hub.follow(Filter::default()).await.expect("follows");
    assert_eq!((flags(), settings.get().expect("get").host_netns), (MASQUERADE | BOTH, 9));
    drop((drops, all));
    let off = async {
        while flags() != MASQUERADE {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), off).await.expect("off again");
}

/// The node's server, and those who call it.
struct Ground {
    authority: Issuer<'static, KeyPair>,
    authority_pem: String,
    address: SocketAddr,
    fake: Fake,
}

impl Ground {
    async fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_pem = params.self_signed(&key).expect("an authority").pem();
        let authority = Issuer::new(params, key);
        let (certificate_pem, key_pem) = issue(&authority, NODE, "system:nodes");
        let id = NodeIdentity { certificate_pem, key_pem, bundle_pem: authority_pem.clone() };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
        let address = listener.local_addr().expect("an address");
        let fake = Fake::new();
        let count: Count = Arc::new(|| Box::pin(async { Ok(vec![("translated", 5), ("dropped_no_route", 0)]) }));
        let routes = serve::routes(hub(&fake), count);
        tokio::spawn(server::serve(listener, server::tls(&id).expect("TLS"), routes));
        Self { authority, authority_pem, address, fake }
    }

    /// An answer to `GET path` for a caller of this organization.
    async fn get(&self, organization: &str, path: &str) -> Result<http::Response<Incoming>, String> {
        let (chain, key) = issue(&self.authority, "caller", organization);
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority_pem.as_bytes()).expect("PEM")).expect("a root");
        let chain = vec![CertificateDer::from_pem_slice(chain.as_bytes()).expect("PEM")];
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .expect("a client's certificate");
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = TcpStream::connect(self.address).await.map_err(|e| e.to_string())?;
        let name = ServerName::try_from(NODE).expect("a name");
        let stream = connector.connect(name, stream).await.map_err(|e| e.to_string())?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
        tokio::spawn(connection);
        let request = http::Request::get(path).header("host", NODE).body(Empty::<Bytes>::new()).expect("a request");
        sender.send_request(request).await.map_err(|e| e.to_string())
    }
}

fn issue(authority: &Issuer<'static, KeyPair>, name: &str, organization: &str) -> (String, String) {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new([name.to_owned()]).expect("a name");
    params.distinguished_name.push(DnType::CommonName, name);
    params.distinguished_name.push(DnType::OrganizationName, organization);
    (params.signed_by(&key, authority).expect("signed").pem(), key.serialize_pem())
}

const ADMIN: &str = "system:masters";

#[tokio::test]
async fn flows_are_served_line_by_line_to_administrators() {
    let ground = Ground::new().await;
    let answer = ground.get(ADMIN, "/flows?drops=true&pod=shop/web").await.expect("an answer");
    assert_eq!(answer.status().as_u16(), 200);
    assert_eq!(answer.headers()["content-type"], "application/x-ndjson");
    ground.fake.until_bits(WATCH_DROPS).await;
    let mut body = answer.into_body();
    let line = async |body: &mut Incoming| -> Value {
        let frame = tokio::time::timeout(Duration::from_secs(10), body.frame()).await.expect("in time");
        let data = frame.expect("goes on").expect("no error").into_data().expect("data");
        serde_json::from_slice(&data).expect("a line")
    };
    assert_eq!(line(&mut body).await["kind"], "idle", "the node is there");
    ground.fake.write(translated()).await;
    ground.fake.write(dropped()).await;
    let record = line(&mut body).await;
    assert_eq!(record["before"], json!({"source": "10.244.1.7:5000", "destination": "203.0.113.9:443"}));
    assert_eq!((&record["verdict"], &record["source"]["pod"]), (&json!("dropped"), &json!("shop/web")));
    drop(body);
    ground.fake.until_bits(0).await;
}

#[tokio::test]
async fn counters_have_their_labels() {
    let ground = Ground::new().await;
    let answer = ground.get(ADMIN, "/counters").await.expect("an answer");
    let body = answer.into_body().collect().await.expect("whole").to_bytes();
    let wanted = json!({"node": NODE, "counters": {"translated": 5, "dropped_no_route": 0}});
    assert_eq!(serde_json::from_slice::<Value>(&body).expect("JSON"), wanted);
}

#[tokio::test]
async fn nobody_else_gets_in_and_nonsense_is_refused() {
    let ground = Ground::new().await;
    for organization in ["system:nodes", "spiffe"] {
        for path in ["/flows", "/counters"] {
            assert!(ground.get(organization, path).await.is_err(), "{organization} {path}");
        }
    }
    assert_eq!(*ground.fake.opened.borrow(), 0);
    for query in ["pod=web", "drops=perhaps", "colour=red", "service=a/b/c", "namespace=%2f"] {
        let answer = ground.get(ADMIN, &format!("/flows?{query}")).await.expect("an answer");
        assert_eq!(answer.status().as_u16(), 400, "{query}");
    }
}
