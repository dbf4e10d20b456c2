//! Given services that ask for it, clients stay with their backends, traffic stays near, and whoever is connected to a
//! backend that has gone is told.

use crate::{
    balance::{ask, ask_udp, endpoints, node, service},
    ground::{Ground, TestPod},
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
    let connect = |to: SocketAddr| {
        let s = UdpSocket::bind("0.0.0.0:0").expect("bind");
        s.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        s.connect(to).expect("connect");
        s
    };
    let say = |s: &UdpSocket| {
        let mut buffer = [0; 64];
        let n = s.send(b"?").and_then(|_| s.recv(&mut buffer))?;
        Ok::<_, io::Error>(String::from_utf8_lossy(&buffer[..n]).into_owned())
    };
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
