//! The parts that children of the test play: the agent, and a sidecar that tells what it was asked for.

use crate::ground::{ACK, EARLY, REFUSED, SNAPSHOT, node_name, said, sidecar_cgroup};
use k8s_openapi::api::core::v1::Pod;
use sluice_agent::{
    attest::Gate,
    datapath::{Datapath, DatapathConfig},
    handover::Handover,
    network::Network,
    pods::PodNetwork,
    relay::{NoSigner, Relay},
    uplink,
    view::View,
};
use sluice_model::{Revision, Snapshot};
use sluice_netlink::between::Mode;
use sluice_wire::handover::{Message, Role, SOCKET, recv, send};
use std::{
    fs,
    io::{BufRead, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream},
    },
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// Set for an agent that does without tcx links.
pub const CLSACT: &str = "SLUICE_TEST_CLSACT";
/// Set for an agent that uses XDP.
pub const XDP: &str = "SLUICE_TEST_XDP";
/// Set for an agent that lets backends' nodes answer.
pub const DSR: &str = "SLUICE_TEST_DSR";
/// Set for an agent that does without bpf_set_retval.
pub const EPERM: &str = "SLUICE_TEST_EPERM";
pub const PART: &str = "SLUICE_TEST_PART";
/// A destination port at which the sidecar does as a real one: dials on and passes the answer back.
pub const RELAYED_PORT: u16 = 80;

pub fn play(part: &str) {
    match part {
        "agent" => agent(),
        "sidecar" => sidecar(),
        "idler" => idler(),
        "squatter" => squatter(),
        "callers" => crate::outside::callers(),
        "storm" => crate::storm::callers(),
        "node" => crate::nodes::other(),
        other => panic!("no part {other:?}"),
    }
}

/// The agent's own loop, fed from a file. Sidecars are known by the names that the ground gives their cgroups.
fn agent() {
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    let _inside = runtime.enter();
    let config = DatapathConfig {
        bpffs: "/sys/fs/bpf".into(),
        cgroup: None,
        node: node_name(),
        dns: vec!["10.96.0.10".parse().expect("address")],
        masquerade: true,
        clsact: std::env::var_os(CLSACT).is_some(),
        xdp: std::env::var_os(XDP).is_some(),
        dsr: std::env::var_os(DSR).is_some(),
        eperm: std::env::var_os(EPERM).is_some(),
        masquerade_excluded: vec!["203.0.113.0/24".parse().expect("range")],
        tunnel: Mode::default(),
    };
    let last: Option<Snapshot> = fs::read(SNAPSHOT).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let datapath = Datapath::open_from(&config, last.as_ref()).expect("open");
    let gate = Arc::new(Gate::new().expect("gate"));
    let handover = Handover::new(&config.bpffs, Some(gate.clone())).expect("handover");
    let (mut source, ends) = uplink::channels(View::default());
    let relay = Relay::new(ends.views.clone(), ends.metrics_interval, ends.holders, Arc::new(NoSigner), None);
    let network = Network::new(node_name(), datapath, handover, gate.clone(), relay, ends.views);
    runtime.spawn(network.clone().run(ends.verdicts));
    let mut revision = Revision::default();
    loop {
        if let Ok(uid) = fs::read_to_string(EARLY) {
            network.attached(&injected_pod(&uid)).expect("attached");
            fs::remove_file(EARLY).expect("done");
        }
        let text = fs::read(SNAPSHOT).unwrap_or_default();
        let next: Snapshot = serde_json::from_slice(&text).unwrap_or_default();
        if next.revision > revision {
            revision = next.revision;
            next.workloads().for_each(|w| gate.expect(&w.uid, &sidecar_cgroup(&w.name.name)));
            source.views.send_replace(View { epoch: "test".into(), snapshot: Arc::new(next) });
        }
        while let Ok(verdict) = source.verdicts.try_recv() {
            assert!(verdict.problems.is_empty(), "{:?}", verdict.problems);
            match verdict.result {
                Ok(()) => fs::write(ACK, verdict.revision.to_string()).expect("ack"),
                Err(error) => fs::write(REFUSED, error).expect("refusal"),
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// As control injects it, excluding port 9000.
fn injected_pod(uid: &str) -> Pod {
    let annotation = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let annotations =
        [annotation("sluice.dev/sidecar", "injected"), annotation("sluice.dev/exclude-inbound-ports", "9000")];
    let mut pod = Pod::default();
    (pod.metadata.uid, pod.metadata.annotations) = (Some(uid.to_owned()), Some(annotations.into()));
    pod
}

fn told_to_go() {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).expect("told to go");
}

/// Opens as many streams as the agent has places for, and says nothing on them.
fn idler() {
    told_to_go();
    let address = UnixAddr::from_abstract_name(SOCKET).expect("name");
    let _streams: Vec<_> = (0..8).map(|_| UnixStream::connect_addr(&address).expect("connect")).collect();
    fs::write(said("idler"), "").expect("say so");
    thread::sleep(Duration::MAX);
}

/// Takes the agent's place while it is away.
fn squatter() {
    told_to_go();
    let address = UnixAddr::from_abstract_name(SOCKET).expect("name");
    let _socket = UnixListener::bind_addr(&address).expect("bind");
    fs::write(said("squatter"), "").expect("say so");
    thread::sleep(Duration::MAX);
}

/// Answers every captured connection with its direction and original destination.
fn sidecar() {
    told_to_go();
    let address = UnixAddr::from_abstract_name(SOCKET).expect("name");
    let begun = Instant::now();
    let stream = loop {
        match UnixStream::connect_addr(&address) {
            Ok(stream) => break stream,
            Err(e) => assert!(begun.elapsed() < Duration::from_secs(10), "no agent: {e}"),
        }
        thread::sleep(Duration::from_millis(10));
    };
    let mut stream = stream;
    send(stream.as_fd(), &Message::Take).expect("take");
    let listeners = match recv(stream.as_fd()).expect("answer") {
        Some(Message::Ok(kept)) if !kept.is_empty() => kept,
        Some(Message::Ok(_)) => fresh(),
        other => panic!("{other:?}"),
    };
    for (role, fd) in &listeners {
        let (role, listener) = (*role, TcpListener::from(fd.try_clone().expect("duplicate")));
        thread::spawn(move || listener.incoming().for_each(|c| drop(c.map(|c| thread::spawn(move || tell(role, c))))));
    }
    loop {
        register(&stream, &listeners);
        // Blocks until the agent goes; the next one gets the listeners again.
        let _ = recv(stream.as_fd());
        stream = loop {
            match UnixStream::connect_addr(&address) {
                Ok(stream) => break stream,
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        };
    }
}

fn register(stream: &UnixStream, listeners: &[(Role, OwnedFd)]) {
    let copies = listeners.iter().map(|(r, fd)| (*r, fd.try_clone().expect("duplicate"))).collect();
    if send(stream.as_fd(), &Message::Register(copies)).is_ok() {
        match recv(stream.as_fd()) {
            Ok(Some(Message::Err(why))) => panic!("refused: {why}"),
            _ => eprintln!("sidecar {} registered", std::env::var("SLUICE_TEST_POD").unwrap_or_default()),
        }
    }
}

fn fresh() -> Vec<(Role, OwnedFd)> {
    let listen = |a: &str| OwnedFd::from(TcpListener::bind(a).expect(a));
    vec![
        (Role::Outbound4, listen("127.0.0.1:15001")),
        (Role::Outbound6, listen("[::1]:15001")),
        (Role::Inbound4, listen("127.0.0.1:15006")),
        (Role::Inbound6, listen("[::1]:15006")),
    ]
}

fn tell(role: Role, mut c: TcpStream) {
    let Ok(to) = c.local_addr() else { return };
    let to = canonical(to);
    if role.outbound() && to.port() == RELAYED_PORT {
        let mut answer = String::new();
        match TcpStream::connect(to) {
            Ok(mut upstream) => drop(upstream.read_to_string(&mut answer)),
            Err(e) => answer = format!("sidecar could not dial {to}: {e}"),
        }
        let _ = c.write_all(format!("relayed {answer}").as_bytes());
        return;
    }
    let direction = if role.outbound() { "out" } else { "in" };
    let _ = c.write_all(format!("{direction} {to}").as_bytes());
}

pub fn canonical(a: SocketAddr) -> SocketAddr {
    let ip: IpAddr = a.ip().to_canonical();
    SocketAddr::new(ip, a.port())
}
