//! Given services that ask for it, clients stay with their backends, traffic stays near, and whoever is connected to a
//! backend that has gone is told.

use crate::{
    balance::{ask, ask_udp, endpoints, node, serve, service},
    ground::{Ground, TestPod, until},
};
use sluice_ebpf::common::{Affinity, AffinityKey, map};
use sluice_model::{Distribution, InternalPolicy, Resource, Service};
use std::{
    collections::HashSet,
    io,
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

pub fn story(ground: &Ground, client: &TestPod, pods: [&TestPod; 3]) {
    clients_stay_with_their_backends(ground, client, pods);
    policies_keep_traffic_near(ground, client, [pods[0], pods[1]]);
    datagrams_are_not_sent_to_who_has_gone(ground, client, [pods[0], pods[1]]);
    nor_by_other_ways(ground, client, [pods[0], pods[1]]);
    sockets_are_known_while_they_are_open(ground, client, pods[0]);
}

fn changed(resource: Resource, change: impl FnOnce(&mut Service)) -> Resource {
    let Resource::Service(mut service) = resource else { panic!("a service") };
    change(&mut service);
    Resource::Service(service)
}

/// Through every change that leaves the backend where it is, until the client was away for too long.
fn clients_stay_with_their_backends(ground: &Ground, client: &TestPod, [b1, b2, b3]: [&TestPod; 3]) {
    const DIAL: &str = "10.96.0.7:80";
    let sticky = |pods: &[&TestPod]| {
        let service = changed(service("sticky", &["10.96.0.7"]), |s| s.affinity_s = Some(3600));
        ground.apply(vec![node(), service, endpoints("sticky", pods)]);
    };
    let to: SocketAddr = DIAL.parse().expect(DIAL);
    let asked = |n: u32| client.netns.run(|| (0..n).map(|_| ask(to).expect("an answer")).collect::<HashSet<_>>());
    let one = || {
        let seen = asked(50).expect("run");
        assert_eq!(seen.len(), 1, "{seen:?}");
        seen.into_iter().next().expect("one")
    };
    let all = [b1, b2, b3];
    let without = |name: &str| all.into_iter().filter(|p| p.name != name).collect::<Vec<_>>();
    sticky(&all);
    let first = one();
    let other = without(&first)[0].name.clone();
    sticky(&without(&other));
    assert_eq!(one(), first, "another has gone");
    sticky(&all);
    assert_eq!(one(), first, "another has come");
    sticky(&without(&first));
    let second = one();
    assert_ne!(second, first);
    sticky(&all);
    assert_eq!(one(), second, "it stays where it went");
    let datagrams = || (ask_udp(to, true).expect("an answer"), ask_udp(to, false).expect("an answer"));
    let seen: HashSet<_> = client.netns.run(|| (0..50).map(|_| datagrams()).collect()).expect("run");
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert!(seen.iter().all(|(connected, unconnected)| connected == unconnected));
    // As if every client had been away for longer than that.
    let dir = sluice_ebpf::maps::pin_dir(std::path::Path::new("/sys/fs/bpf"));
    let affinity = sluice_ebpf::maps::HashMap::<AffinityKey, Affinity>::open(&dir, map::AFFINITY).expect("pinned");
    let age = || {
        for (key, value) in affinity.entries().expect("entries") {
            affinity.set(&key, &Affinity { used_s: value.used_s.wrapping_sub(3600), ..value }).expect("older");
        }
    };
    let seen: HashSet<_> = (0..100).flat_map(|_| (age(), asked(1).expect("run")).1).collect();
    assert_eq!(seen.len(), 3, "{seen:?}");
}

fn policies_keep_traffic_near(ground: &Ground, client: &TestPod, [near, far]: [&TestPod; 2]) {
    let to: SocketAddr = "10.96.0.8:80".parse().expect("address");
    let put = |change: &dyn Fn(&mut Service), pods: &[&TestPod]| {
        let Resource::EndpointSet(mut set) = endpoints("placed", pods) else { panic!("endpoints") };
        for e in set.endpoints.iter_mut().filter(|e| far.addresses.contains(&e.address)) {
            (e.node, e.zone) = ("another".into(), "a".into());
        }
        let service = changed(service("placed", &["10.96.0.8"]), |s| change(s));
        ground.apply(vec![node(), service, Resource::EndpointSet(set)]);
        client.netns.run(|| (0..50).map(|_| ask(to).ok()).collect::<HashSet<_>>()).expect("run")
    };
    let [n, f] = [near, far].map(|p| Some(p.name.clone()));
    let local = |s: &mut Service| s.internal_policy = InternalPolicy::Local;
    let same_node = |s: &mut Service| s.distribution = Distribution::SameNode;
    let same_zone = |s: &mut Service| s.distribution = Distribution::SameZone;
    assert_eq!(put(&|_| {}, &[near, far]), HashSet::from([n.clone(), f.clone()]));
    assert_eq!(put(&local, &[near, far]), HashSet::from([n.clone()]));
    assert_eq!(put(&local, &[far]), HashSet::from([None]), "refused rather than sent away");
    assert_eq!(put(&same_node, &[near, far]), HashSet::from([n]));
    assert_eq!(put(&same_node, &[far]), HashSet::from([f.clone()]));
    assert_eq!(put(&same_zone, &[near, far]), HashSet::from([f]), "the node is in zone a, the near pod in none");
}

/// A connected socket would go on sending to a pod that is gone: it is told, and connects again. Others are left alone.
fn datagrams_are_not_sent_to_who_has_gone(ground: &Ground, client: &TestPod, [b1, b2]: [&TestPod; 2]) {
    let services = [service("moves", &["10.96.0.8"]), service("stays", &["10.96.0.9"])];
    let view = |moves: &TestPod| {
        let sets = [endpoints("moves", &[moves]), endpoints("stays", &[b1])];
        ground.apply([node()].into_iter().chain(services.clone()).chain(sets).collect());
    };
    view(b1);
    let [moves, stays]: [SocketAddr; 2] = ["10.96.0.8:80", "10.96.0.9:80"].map(|a| a.parse().expect(a));
    let direct = SocketAddr::new(b1.ip(), 8080);
    let [lost, same, plain] = client.netns.run(|| [moves, stays, direct].map(connect)).expect("run");
    let from_node = connect(moves);
    for s in [&lost, &same, &plain, &from_node] {
        assert_eq!(say(s).expect("an answer"), "b1");
    }
    view(b2);
    for s in [&lost, &from_node] {
        assert_eq!(s.recv(&mut [0; 8]).expect_err("closed").kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(s.peer_addr().expect_err("connected to nobody").kind(), io::ErrorKind::NotConnected);
        assert_eq!(
            s.send(b"?").expect_err("to nobody").raw_os_error(),
            Some(rustix::io::Errno::DESTADDRREQ.raw_os_error())
        );
    }
    for s in [&same, &plain] {
        assert_eq!(say(s).expect("an answer"), "b1");
    }
    client.netns.run(|| lost.connect(moves)).expect("run").expect("connect again");
    assert_eq!(say(&lost).expect("an answer"), "b2");
}

fn connect(to: SocketAddr) -> UdpSocket {
    let s = UdpSocket::bind("0.0.0.0:0").expect("bind");
    s.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    s.connect(to).expect("connect");
    s
}

fn say(s: &UdpSocket) -> io::Result<String> {
    let mut buffer = [0; 64];
    let n = s.send(b"?").and_then(|_| s.recv(&mut buffer))?;
    Ok(String::from_utf8_lossy(&buffer[..n]).into_owned())
}

/// Until it is closed it has no error; whoever waits for an answer is told.
fn closed(s: &UdpSocket) -> bool {
    s.peer_addr().is_err_and(|e| e.kind() == io::ErrorKind::NotConnected)
}

/// By a node port, at an address of the node's and at loopback; by a host port, whose pod just goes; and by an agent that
/// was killed before it closed them.
fn nor_by_other_ways(ground: &Ground, client: &TestPod, [b1, b2]: [&TestPod; 2]) {
    const NODE_PORT: u16 = 30_080;
    let view = |to: &TestPod| {
        let ported = changed(service("moves", &["10.96.0.8"]), |s| s.ports[1].node_port = Some(NODE_PORT));
        vec![node(), ported, endpoints("moves", &[to])]
    };
    let at = |ip: &str, port| SocketAddr::new(ip.parse().expect(ip), port);
    ground.apply(view(b1));
    let from_pod = client.netns.run(|| connect(at("192.168.77.1", NODE_PORT))).expect("run");
    let from_node = connect(at("127.0.0.1", NODE_PORT));
    for s in [&from_pod, &from_node] {
        assert_eq!(say(s).expect("an answer"), "b1");
    }
    ground.apply(view(b2));
    for s in [&from_pod, &from_node] {
        assert!(closed(s), "the node port leads elsewhere now");
    }

    let mapping = serde_json::json!([{"hostPort": 18_053, "containerPort": 8080, "protocol": "udp"}]);
    let pod = ground.pod_with("ported", &[("runtimeConfig", serde_json::json!({"portMappings": mapping}))]);
    serve(&pod);
    let from_pod = client.netns.run(|| connect(at("192.168.77.1", 18_053))).expect("run");
    let from_node = connect(at("127.0.0.1", 18_053));
    let elsewhere = client.netns.run(|| connect(at("192.168.77.1", NODE_PORT))).expect("run");
    for s in [&from_pod, &from_node] {
        assert_eq!(say(s).expect("an answer"), "ported");
    }
    ground.end_pod(pod);
    for s in [&from_pod, &from_node] {
        until("the socket to the host port is closed", || closed(s));
    }
    assert_eq!(say(&elsewhere).expect("an answer"), "b2");

    // The maps say already what the next agent wants: it finds nothing that was withdrawn.
    ground.kill_agent();
    let dir = sluice_ebpf::maps::pin_dir(std::path::Path::new("/sys/fs/bpf"));
    let maps = sluice_ebpf::maps::ServiceMaps::open(&dir).expect("maps");
    let snapshot = sluice_model::Snapshot::new(sluice_model::Revision(1), view(b1));
    let compiled = sluice_ebpf::compile::compile(&snapshot, crate::ground::NODE, []);
    let mut table = sluice_ebpf::table::ServiceTable::open(maps).expect("table");
    table.apply(&compiled.services).expect("as an agent that is killed right after");
    ground.publish(view(b1));
    ground.start_agent();
    ground.in_force();
    assert!(closed(&elsewhere), "by an agent that did not withdraw the backend itself");
}

/// What is noted of a socket goes with it: ten thousand that were closed do not make one forgotten that is open.
fn sockets_are_known_while_they_are_open(ground: &Ground, client: &TestPod, backend: &TestPod) {
    let to: SocketAddr = "10.96.0.8:80".parse().expect("address");
    ground.apply(vec![node(), service("moves", &["10.96.0.8"]), endpoints("moves", &[backend])]);
    let dir = sluice_ebpf::maps::pin_dir(std::path::Path::new("/sys/fs/bpf"));
    let maps = sluice_ebpf::maps::ServiceMaps::open(&dir).expect("maps");
    let known = |map: &sluice_ebpf::maps::HashMap<_, _>| {
        let dialled = sluice_ebpf::addr(to.ip());
        let all: Vec<(sluice_ebpf::common::ReverseKey, sluice_ebpf::common::Reverse)> = map.entries().expect("entries");
        all.iter().filter(|(_, from)| from.addr == dialled).count()
    };
    let before = (known(&maps.reverse), known(&maps.connected));
    let open = client.netns.run(|| connect(to)).expect("run");
    let stream = client.netns.run(|| std::net::TcpStream::connect(to)).expect("run").expect("connect");
    assert_eq!((known(&maps.reverse), known(&maps.connected)), (before.0 + 1, before.1 + 1));
    let calls = || (0..200).for_each(|_| drop((ask(to).expect("an answer"), ask_udp(to, true).expect("an answer"))));
    client.netns.run(calls).expect("run");
    assert_eq!((known(&maps.reverse), known(&maps.connected)), (before.0 + 1, before.1 + 1));
    assert_eq!(open.peer_addr().expect("known"), to);
    drop((open, stream));
    assert_eq!((known(&maps.reverse), known(&maps.connected)), before);
}
