//! The parts that children of the test play: the agent, and a sidecar that tells what it was asked for.

use crate::ground::{ACK, EARLY, NODE, SNAPSHOT};
use sluice_agent::{
    datapath::{Datapath, DatapathConfig},
    handover::Handover,
};
use sluice_model::Snapshot;
use sluice_netlink::Netns;
use sluice_wire::handover::{Message, Role, SOCKET, recv, send};
use std::{
    collections::HashMap,
    fs,
    io::{BufRead, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixAddr, UnixStream},
    },
    thread,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

pub const PART: &str = "SLUICE_TEST_PART";
/// A destination port at which the sidecar does as a real one: dials on and passes the answer back.
pub const RELAYED_PORT: u16 = 80;

pub fn play(part: &str) {
    match part {
        "agent" => agent(),
        "sidecar" => sidecar(),
        other => panic!("no part {other:?}"),
    }
}

/// The library as the agent's main loop uses it, fed from a file.
fn agent() {
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    let _inside = runtime.enter();
    let config = DatapathConfig {
        bpffs: "/sys/fs/bpf".into(),
        cgroup: None,
        node: NODE.into(),
        dns: Some("10.96.0.10".parse().expect("address")),
    };
    let mut datapath = Datapath::open(&config).expect("open");
    let handover = Handover::new(&config.bpffs, None).expect("handover");
    let mut served = HashMap::new();
    let (mut snapshot, mut repaired) = (Snapshot::default(), Instant::now());
    loop {
        if let Ok(uid) = fs::read_to_string(EARLY) {
            datapath.set_pod_mesh(&uid, true, &[9000]).expect("set_pod_mesh");
            fs::remove_file(EARLY).expect("done");
        }
        let text = fs::read(SNAPSHOT).unwrap_or_default();
        let next: Snapshot = serde_json::from_slice(&text).unwrap_or_default();
        if next.revision > snapshot.revision {
            let applied = datapath.apply(&next).expect("apply");
            assert!(applied.problems.is_empty(), "{:?}", applied.problems);
            fs::write(ACK, next.revision.to_string()).expect("ack");
            snapshot = next;
        }
        serve(&datapath, &handover, &snapshot, &mut served);
        if repaired.elapsed() > Duration::from_millis(200) {
            for wrong in datapath.repair().expect("repair") {
                eprintln!("agent repaired: {wrong}");
            }
            repaired = Instant::now();
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn serve(
    datapath: &Datapath,
    handover: &std::sync::Arc<Handover>,
    snapshot: &Snapshot,
    served: &mut HashMap<String, CancellationToken>,
) {
    let here = datapath.pods().expect("pods");
    served.retain(|uid, stop| {
        let stays = here.iter().any(|p| p.uid == *uid);
        if !stays {
            stop.cancel();
        }
        stays
    });
    for w in snapshot.workloads().filter(|w| w.meshed && w.node == NODE) {
        if let Some(pod) = here.iter().find(|p| p.uid == w.uid)
            && !served.contains_key(&w.uid)
        {
            let stop = CancellationToken::new();
            let netns = Netns::open(&pod.netns).expect("netns");
            handover.serve(&netns, &w.uid, stop.clone()).expect("serve");
            served.insert(w.uid.clone(), stop);
        }
    }
}

/// Answers every captured connection with its direction and original destination.
fn sidecar() {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).expect("told to go");
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
