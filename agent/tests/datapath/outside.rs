//! Given a node with a network around it, when callers from outside dial node ports, external addresses and host ports,
//! and pods dial the world, then packets are translated both ways, whatever the node's firewall thinks of forwarding.

use crate::{
    around::*,
    balance::{backends, endpoints, node, service},
    ground::{Ground, NODE, TestPod, said, until},
};
use sluice_ebpf::{
    common::Reason,
    loader,
    maps::{Counters, NodeMaps, pin_dir},
};
use sluice_model::{Announcement, ExternalPolicy, Name, Node, Resource, Service};
use sluice_netlink::{
    Connection, Netns, filter, kernel, lab, link,
    plan::{Address, Operation, Prefix},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

pub fn shop(n: &str, number: u8, edit: impl FnOnce(&mut Service)) -> Resource {
    let Resource::Service(mut s) = service(n, &[&format!("10.96.1.{number}"), &format!("fd00:96::1:{number}")]) else {
        unreachable!("a service");
    };
    for port in &mut s.ports {
        port.node_port = Some(30_000 + u16::from(number));
    }
    edit(&mut s);
    Resource::Service(s)
}

fn far_endpoints(n: &str) -> Resource {
    backends(n, "n2", &[FAR_POD4, FAR_POD6].map(ip))
}

fn other_node() -> Resource {
    Resource::Node(Node {
        name: Name::cluster("n2"),
        addresses: vec![ip(OTHER4), ip(OTHER6)],
        pod_cidrs: vec!["10.244.2.0/24".into(), "fd00:2::/64".into()],
        zone: String::new(),
        ready: true,
    })
}

pub const EXTERNAL4: &str = "192.168.50.100";
pub const EXTERNAL6: &str = "fd00:50::100";
/// Not for all.
const RANGED: [&str; 2] = ["192.168.50.102", "fd00:50::102"];

fn local(s: &mut Service) {
    s.external_policy = ExternalPolicy::Local;
}

/// The same with filters in place of tcx links on the node's own links, from one way to the other and back while pods run.
pub fn without_tcx(ground: &Ground) {
    let pod = ground.pod("lasting");
    serve(&pod.netns, "lasting", ANY, 8080);
    let to = SocketAddr::new(pod.ip(), 8080);
    let with_filters = || {
        let mut c = Connection::open().expect("connection");
        let links = link::devices(&mut c).expect("links").into_iter();
        let mut found = |index| filter::find(&mut c, index, filter::Direction::Ingress, "from_wire").expect("filters");
        links.filter(|l| found(l.index).is_some()).count()
    };
    let around = Around::new(ground);
    let with_tcx = || loader::attached_devices(Path::new("/sys/fs/bpf")).expect("pins").len();
    for clsact in [true, false, true] {
        ground.kill_agent();
        ground.clsact.set(clsact);
        ground.start_agent();
        ground.apply(vec![node()]);
        assert_eq!((with_filters() > 0, with_tcx() > 0), (clsact, !clsact), "clsact {clsact}");
        assert!(dial(to).expect("the pod is reached").starts_with("lasting "));
    }
    remove_eth0();
    drop(around);
    story(ground);
    ground.kill_agent();
    ground.clsact.set(false);
    ground.start_agent();
    ground.end_pod(pod);
}

/// The same with XDP in the driver of the node's link, between cables that know nothing of each other's checksums.
pub fn with_xdp(ground: &Ground) {
    let early = || {
        let counters = Counters::open(&pin_dir(Path::new("/sys/fs/bpf"))).expect("counters");
        counters.get(Reason::ForwardedXdp).expect("counter")
    };
    ground.kill_agent();
    ground.xdp.set(true);
    ground.start_agent();
    let before = early();
    story(ground);
    let sent = early() - before;
    println!("{sent} packets were sent on by XDP");
    assert!(sent > 1_000, "{sent} packets by XDP");
    ground.kill_agent();
    ground.xdp.set(false);
    ground.start_agent();
}

/// Given nodes that let backends' nodes answer, when a caller dials an address of one and the backend is on another, then
/// that one sees the caller and answers it past the first. This node is the one, then the other; it plays with a machine
/// that has the address as servers behind a balancer have, on its loopback, and tells nobody.
pub fn with_dsr(ground: &Ground) {
    ground.kill_agent();
    ground.dsr.set(true);
    ground.start_agent();
    forbid_forwarding();
    let around = Around::new(ground);
    let pod = ground.pod("o1");
    serve(&pod.netns, "o1", ANY, 8080);
    // It neither answers for the address, nor asks under it.
    for (setting, value) in [("arp_ignore", "1"), ("arp_announce", "2")] {
        let path = format!("/proc/sys/net/ipv4/conf/all/{setting}");
        within(&around.other, || std::fs::write(&path, value)).expect("keep quiet");
    }
    for address in [EXTERNAL4, EXTERNAL6] {
        add_address(&around.other, "lo", address, if address.contains(':') { 128 } else { 32 });
    }
    serve(&around.other, "far", [EXTERNAL4, EXTERNAL6], 80);
    let announced = |node: &'static str| {
        move |s: &mut Service| {
            s.external_ips = vec![ip(EXTERNAL4), ip(EXTERNAL6)];
            s.announcements = s.external_ips.iter().map(|a| Announcement { address: *a, node: node.into() }).collect();
        }
    };
    let Resource::Node(own) = node() else { unreachable!("a node") };
    let own = Resource::Node(Node { addresses: vec![ip(NODE4), ip(NODE6)], ..own });
    ground.apply(vec![own.clone(), other_node(), shop("there", 2, announced(NODE)), far_endpoints("there")]);
    let relayed = || {
        let counters = Counters::open(&pin_dir(Path::new("/sys/fs/bpf"))).expect("counters");
        counters.get(Reason::Relayed).expect("counter")
    };
    let before = relayed();
    for (external, caller) in [(EXTERNAL4, CALLER4), (EXTERNAL6, CALLER6)] {
        let said = around.call(|| (dial(at(external, 80)), ask(at(external, 80), 1)));
        assert_eq!(said.0.expect("TCP"), format!("far {caller}"), "the backend's node sees the caller");
        assert_eq!(said.1.expect("UDP"), format!("far {caller} 1"));
        around.call(|| echoed(at(external, 80)));
        let said = around.call(|| ask(at(external, 80), 9_000)).expect("fragments");
        assert!(said.ends_with(" 9000"), "{said}");
    }
    // A try that is repeated, and fragments that come side by side, count again.
    let begun = relayed() - before;
    assert!(begun >= 8, "{begun} connections");
    // Now another node announces it, and passes on what is for the pod here.
    ground.apply(vec![own, other_node(), shop("here", 1, announced("n2")), endpoints("here", &[&pod])]);
    for (external, other, caller) in [(EXTERNAL4, OTHER4, CALLER4), (EXTERNAL6, OTHER6, CALLER6)] {
        for (to, port) in [(external, 80), (other, 30_001)] {
            add_route(
                &around.caller,
                &format!("{to}/{}", if to.contains(':') { 128 } else { 32 }),
                if to.contains(':') { NODE6 } else { NODE4 },
            );
            let said = around.call(|| (dial(at(to, port)), ask(at(to, port), 1)));
            assert_eq!(said.0.expect("TCP"), format!("o1 {caller}"), "{to}");
            assert_eq!(said.1.expect("UDP"), format!("o1 {caller} 1"), "{to}");
            around.call(|| echoed(at(to, port)));
        }
    }
    ground.end_pod(pod);
    ground.apply(vec![node()]);
    remove_eth0();
    let _ = Command::new("nft").args(["flush", "ruleset"]).status();
    ground.kill_agent();
    ground.dsr.set(false);
    ground.start_agent();
}

pub fn story(ground: &Ground) {
    forbid_forwarding();
    let around = Around::new(ground);
    let [b1, b2, pod] = ["o1", "o2", "pod"].map(|n| ground.pod(n));
    serve(&b1.netns, "o1", ANY, 8080);
    serve(&b2.netns, "o2", ANY, 8080);
    serve(&around.other, "far", [FAR_POD4, FAR_POD6], 8080);
    serve(&around.caller, "world", ANY, 9000);
    let Resource::Node(own) = node() else { unreachable!("a node") };
    let own = Resource::Node(Node { addresses: vec![ip(NODE4), ip(NODE6)], ..own });
    let external = |s: &mut Service| {
        s.external_ips = vec![ip(EXTERNAL4), ip(EXTERNAL6)];
        s.announcements = s.external_ips.iter().map(|a| Announcement { address: *a, node: NODE.into() }).collect();
    };
    let all = vec![
        own,
        other_node(),
        shop("here", 1, |_| {}),
        endpoints("here", &[&b1]),
        shop("there", 2, |_| {}),
        far_endpoints("there"),
        shop("external", 3, external),
        endpoints("external", &[&b1]),
        shop("local", 4, local),
        endpoints("local", &[&b1]),
        shop("local-far", 5, local),
        far_endpoints("local-far"),
        shop("nobody", 6, |s| s.external_ips = vec![ip("192.168.50.101"), ip("fd00:50::101")]),
        shop("closed", 7, |s| s.external_ips.clear()),
        closed_port("closed", &b1),
        shop("both", 8, |_| {}),
        endpoints("both", &[&b1, &b2]),
        shop("affine", 9, |s| s.affinity_s = Some(10_800)),
        endpoints("affine", &[&b1, &b2]),
    ];
    ground.apply(all.clone());
    node_ports(&around, &pod);
    external_addresses(&around, &pod);
    policies(&around, &pod);
    source_ranges(ground, &around, &pod, &b1, &all);
    nobody(&around);
    pods_reach_the_world(&around, &pod);
    an_unpinned_map_is_made_anew(ground, &pod, &all);
    escaped(ground, &pod, &b1);
    large(&around);
    same_source_port(&around);
    not_the_nodes(&around);
    withdrawn(ground, &around, [&b1, &b2], &all);
    host_ports(ground, &around);
    balanced(&around, &[&b1, &b2]);
    new_link(&around);
    changed_address(&around, &pod);
    agent_dies(ground, &around);
    [b1, b2, pod].into_iter().for_each(|p| ground.end_pod(p));
    ground.apply(vec![node()]);
    remove_eth0();
    let _ = Command::new("nft").args(["flush", "ruleset"]).status();
}

/// An endpoint whose port nobody has: its kernel answers datagrams with an ICMP error.
fn closed_port(n: &str, pod: &TestPod) -> Resource {
    let Resource::EndpointSet(mut set) = endpoints(n, &[pod]) else { unreachable!("a set") };
    set.endpoints.iter_mut().flat_map(|e| &mut e.ports).for_each(|p| p.port = 9);
    Resource::EndpointSet(set)
}

fn node_ports(around: &Around<'_>, pod: &TestPod) {
    for (own, caller) in [(NODE4, CALLER4), (NODE6, CALLER6)] {
        let said = around.call(|| (dial(at(own, 30_001)), ask(at(own, 30_001), 1)));
        assert_eq!(said.0.expect("TCP"), format!("o1 {caller}"), "a pod of this node sees the caller");
        assert_eq!(said.1.expect("UDP"), format!("o1 {caller} 1"));
        let said = around.call(|| (dial(at(own, 30_002)), ask(at(own, 30_002), 1)));
        assert_eq!(said.0.expect("TCP"), format!("far {own}"), "a pod of another sees this node");
        assert_eq!(said.1.expect("UDP"), format!("far {own} 1"));
        let said = within(&pod.netns, || (dial(at(own, 30_002)), ask(at(own, 30_001), 1)));
        assert!(said.0.expect("TCP from a pod").starts_with("far "));
        assert!(said.1.expect("UDP from a pod").starts_with("o1 "));
        // From the node itself, by any of its addresses.
        for address in [own, if own.contains(':') { "::1" } else { "127.0.0.1" }] {
            assert!(dial(at(address, 30_001)).expect("from the node").starts_with("o1 "));
        }
        let loopback = if own.contains(':') { "::1" } else { "127.0.0.1" };
        let inside = within(&pod.netns, || dial(at(loopback, 30_001)));
        assert_eq!(inside.expect_err("a pod's loopback is its own").kind(), ErrorKind::ConnectionRefused);
    }
    println!("node ports: v4 and v6, TCP and UDP, from outside, pods and the node");
}

fn external_addresses(around: &Around<'_>, pod: &TestPod) {
    for (external, caller) in [(EXTERNAL4, CALLER4), (EXTERNAL6, CALLER6)] {
        let said = around.call(|| (dial(at(external, 80)), ask(at(external, 80), 1)));
        assert_eq!(said.0.expect("TCP"), format!("o1 {caller}"));
        assert_eq!(said.1.expect("UDP"), format!("o1 {caller} 1"));
        assert!(within(&pod.netns, || dial(at(external, 80))).expect("from a pod").starts_with("o1 "));
        let other = around.call(|| TcpStream::connect_timeout(&at(external, 81), WAIT).map(drop));
        assert_eq!(other.expect_err("no such port").kind(), ErrorKind::ConnectionRefused);
    }
}

fn policies(around: &Around<'_>, pod: &TestPod) {
    for (own, caller) in [(NODE4, CALLER4), (NODE6, CALLER6)] {
        let said = around.call(|| (dial(at(own, 30_004)), dial(at(own, 30_005))));
        assert_eq!(said.0.expect("TCP"), format!("o1 {caller}"));
        assert_eq!(said.1.expect_err("no endpoint here").kind(), ErrorKind::ConnectionRefused);
        let inside = within(&pod.netns, || dial(at(own, 30_005)));
        assert!(inside.expect("the policy is for callers from outside").starts_with("far "));
    }
}

/// Addresses of a load balancer are for clients in its ranges; its node port and the cluster's own address for everybody.
fn source_ranges(ground: &Ground, around: &Around<'_>, pod: &TestPod, backend: &TestPod, all: &[Resource]) {
    let counters = Counters::open(&pin_dir(Path::new("/sys/fs/bpf"))).expect("counters");
    let count = |reason| counters.get(reason).expect("counter");
    let only_for = |ranges: &[String]| {
        let ranged = shop("ranged", 10, |s| {
            s.external_ips = RANGED.map(ip).to_vec();
            s.announcements = s.external_ips.iter().map(|a| Announcement { address: *a, node: NODE.into() }).collect();
            s.restricted_ips = s.external_ips.clone();
            s.source_ranges = ranges.iter().map(|r| r.parse().expect(r)).collect();
        });
        ground.apply(all.iter().cloned().chain([ranged, endpoints("ranged", &[backend])]).collect());
    };
    let outsiders = [format!("{CALLER4}/32"), format!("{CALLER6}/128")];
    let insiders = [format!("{NODE4}/32"), format!("{NODE6}/128"), "10.244.1.0/24".into(), "fd00:1::/64".into()];
    // Both ways over TCP, and as connected datagrams.
    let both = |to: SocketAddr| (dial(to).map(drop), ask(to, 1).map(drop));
    let refused = |(tcp, udp): (io::Result<()>, io::Result<()>)| {
        let kind = |said: io::Result<()>| said.expect_err("in no range").kind();
        (kind(tcp), kind(udp)) == (ErrorKind::PermissionDenied, ErrorKind::PermissionDenied)
    };
    let reached = |(tcp, udp): (io::Result<()>, io::Result<()>)| {
        tcp.expect("TCP");
        udp.expect("UDP");
    };

    only_for(&outsiders);
    let mut held = vec![];
    for to in RANGED.map(|a| at(a, 80)) {
        reached(around.call(|| both(to)));
        let mut c = around.call(|| TcpStream::connect_timeout(&to, WAIT)).expect("connect");
        greeting(&mut c).expect("greeting");
        held.push(c);
        let before = count(Reason::RefusedSourceRange);
        assert!(refused(within(&pod.netns, || both(to))), "{to} from a pod");
        assert!(refused(both(to)), "{to} from the node");
        assert_eq!(count(Reason::RefusedSourceRange), before + 4);
    }
    only_for(&insiders);
    for (n, to) in RANGED.map(|a| at(a, 80)).into_iter().enumerate() {
        reached(within(&pod.netns, || both(to)));
        reached(both(to));
        let before = count(Reason::DroppedSourceRange);
        let quick = Duration::from_millis(300);
        let silent = around.call(|| TcpStream::connect_timeout(&to, quick)).expect_err("in no range");
        assert!(matches!(silent.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock), "{to}: {silent}");
        assert!(count(Reason::DroppedSourceRange) > before, "{to}: counted");
        let (own, node) = [("10.96.1.10", NODE4), ("fd00:96::1:10", NODE6)][n];
        reached(around.call(|| both(at(node, 30_010))));
        reached(within(&pod.netns, || both(at(own, 80))));
    }
    for c in &mut held {
        c.write_all(b"still").expect("write");
        let mut back = [0; 5];
        c.read_exact(&mut back).expect("what was let in goes on");
        assert_eq!(&back, b"still");
    }
    only_for(&outsiders);
    for to in RANGED.map(|a| at(a, 80)) {
        reached(around.call(|| both(to)));
    }
    ground.apply(all.to_vec());
    println!(
        "source ranges: v4 and v6, from outside, a pod and the node; {} dropped",
        count(Reason::DroppedSourceRange)
    );
}

fn nobody(around: &Around<'_>) {
    for (own, external) in [(NODE4, "192.168.50.101"), (NODE6, "fd00:50::101")] {
        let refused = |to: SocketAddr| {
            let tcp = TcpStream::connect_timeout(&to, WAIT).map(drop).expect_err("nobody").kind();
            (tcp, ask(to, 1).expect_err("nobody").kind())
        };
        let both = (ErrorKind::ConnectionRefused, ErrorKind::ConnectionRefused);
        assert_eq!(around.call(|| refused(at(own, 30_006))), both);
        // The caller's neighbour for an address that nobody announces.
        add_route(&around.caller, &format!("{external}/{}", if own.contains(':') { 128 } else { 32 }), own);
        assert_eq!(around.call(|| refused(at(external, 80))), both);
        // The error comes from the pod, about an address that the caller has never heard of.
        let closed = around.call(|| ask(at(own, 30_007), 1)).expect_err("closed");
        assert_eq!(closed.kind(), ErrorKind::ConnectionRefused, "the ICMP error is translated back");
    }
}

fn pods_reach_the_world(around: &Around<'_>, pod: &TestPod) {
    for (world, own) in [(CALLER4, NODE4), (CALLER6, NODE6)] {
        let said = within(&pod.netns, || (dial(at(world, 9000)), ask(at(world, 9000), 1)));
        assert_eq!(said.0.expect("TCP"), format!("world {own}"), "outside sees the node");
        assert_eq!(said.1.expect("UDP"), format!("world {own} 1"));
        let refused = within(&pod.netns, || ask(at(world, 9), 1)).expect_err("nobody there");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "the ICMP error is translated back");
        within(&pod.netns, || ping(ip(world))).expect("echo");
    }
    add_address(&around.caller, "eth0", "203.0.113.2", 24);
    add_route(&Netns::current().expect("own"), "203.0.113.0/24", CALLER4);
    let said = within(&pod.netns, || dial(at("203.0.113.2", 9000)));
    assert_eq!(said.expect("TCP"), format!("world {}", pod.ip()), "an excluded range sees the pod");
}

/// And all programs go by the new one, those at pods' links too: else answers would be looked for in another map than the one
/// in which they are noted.
fn an_unpinned_map_is_made_anew(ground: &Ground, pod: &TestPod, all: &[Resource]) {
    let pin = pin_dir(Path::new("/sys/fs/bpf")).join(sluice_ebpf::common::map::FLOWS);
    std::fs::remove_file(&pin).expect("unpin");
    until("it is pinned again", || pin.exists());
    // Acknowledged when the agent is through with what it was at: with the node's links too.
    ground.apply(all.to_vec());
    for world in [CALLER4, CALLER6] {
        until("a pod is answered from outside", || within(&pod.netns, || dial(at(world, 9000))).is_ok());
    }
}

/// One echo by a datagram ICMP socket.
fn ping(to: IpAddr) -> io::Result<()> {
    let (domain, protocol, kind) = match to {
        IpAddr::V4(_) => (socket2::Domain::IPV4, socket2::Protocol::ICMPV4, 8),
        IpAddr::V6(_) => (socket2::Domain::IPV6, socket2::Protocol::ICMPV6, 128),
    };
    std::fs::write("/proc/self/net/../../sys/net/ipv4/ping_group_range", "0 2147483647")
        .or_else(|_| std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"))?;
    let s = socket2::Socket::new(domain, socket2::Type::DGRAM, Some(protocol))?;
    s.set_read_timeout(Some(WAIT))?;
    s.connect(&SocketAddr::new(to, 0).into())?;
    s.send(&[kind, 0, 0, 0, 0, 0, 0, 1, b's', b'l', b'u', b'i', b'c', b'e'])?;
    let mut buffer = [0; 64];
    let n = (&s).read(&mut buffer)?;
    if buffer[..n].ends_with(b"sluice") { Ok(()) } else { Err(ErrorKind::InvalidData.into()) }
}

/// Packets to a virtual address that no socket was asked about: as from a virtual machine, or a namespace in the pod.
fn escaped(ground: &Ground, pod: &TestPod, backend: &TestPod) {
    let vip = Ipv4Addr::new(10, 96, 1, 1);
    for (from, seen) in [(pod, pod.ip().to_string()), (backend, "169.254.1.1".to_owned())] {
        let said = within(&from.netns, || raw_ask(from.ip(), vip)).expect("an answer");
        assert_eq!(said, format!("o1 {seen} 1"), "from {}", from.name);
    }
    for (n, (vip, gateway)) in [("10.96.1.1", "169.254.1.1"), ("fd00:96::1:1", "fe80::1")].into_iter().enumerate() {
        for (from, seen) in [(pod, pod.addresses[n].to_string()), (backend, gateway.to_owned())] {
            // A socket that is made outside of the node's cgroup.
            let said = ground.outside(|| within(&from.netns, || (dial(at(vip, 80)), ask(at(vip, 80), 1))));
            assert_eq!(said.0.expect("TCP"), format!("o1 {seen}"), "from {} to {vip}", from.name);
            // A datagram that comes from a link-local address is answered under one, where the server's socket leaves that
            // to the kernel: docs/services.md, "Packets that no socket was asked about".
            if !seen.starts_with("fe80") {
                assert_eq!(said.1.expect("UDP"), format!("o1 {seen} 1"), "from {} to {vip}", from.name);
            }
            ground.outside(|| within(&from.netns, || echoed(at(vip, 80))));
        }
        let none = if vip.contains(':') { "fd00:96::1:6" } else { "10.96.1.6" };
        let refused = ground.outside(|| within(&pod.netns, || (dial(at(none, 80)), ask(at(none, 80), 1))));
        let kinds = (refused.0.expect_err("nobody").kind(), refused.1.expect_err("nobody").kind());
        assert_eq!(kinds, (ErrorKind::ConnectionRefused, ErrorKind::ConnectionRefused));
    }
}

/// A hand-made datagram, and a socket that takes the answer.
fn raw_ask(from: IpAddr, to: Ipv4Addr) -> io::Result<String> {
    let IpAddr::V4(own) = from else { return Err(ErrorKind::Unsupported.into()) };
    let s = UdpSocket::bind((own, 0))?;
    s.set_read_timeout(Some(WAIT))?;
    let raw = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::RAW, Some(socket2::Protocol::from(255)))?;
    let mut packet = vec![0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(own.octets());
    packet.extend(to.octets());
    packet.extend(s.local_addr()?.port().to_be_bytes());
    packet.extend([0, 80, 0, 9, 0, 0, b'?']); // no checksum: RFC 768
    raw.send_to(&packet, &SocketAddr::new(to.into(), 0).into())?;
    let mut buffer = [0; 256];
    let (n, source) = s.recv_from(&mut buffer)?;
    assert_eq!(source, SocketAddr::new(to.into(), 80), "the answer comes from where the question went");
    Ok(String::from_utf8_lossy(&buffer[..n]).into_owned())
}

/// Streams and fragments.
fn large(around: &Around<'_>) {
    for own in [NODE4, NODE6] {
        for port in [30_001, 30_002] {
            let to = at(own, port);
            around.call(|| echoed(to));
            let said = around.call(|| ask(to, 9_000)).unwrap_or_else(|e| panic!("{to}: {e}"));
            assert!(said.ends_with(" 9000"), "{to}: a datagram in fragments: {said}");
        }
    }
}

/// One source port, several addresses, one backend: its answers must be told apart.
fn same_source_port(around: &Around<'_>) {
    let from = |kind, own: SocketAddr, to: SocketAddr| {
        let s = socket2::Socket::new(socket2::Domain::for_address(own), kind, None).expect("socket");
        s.set_reuse_address(true).expect("option");
        s.set_reuse_port(true).expect("option");
        s.bind(&own.into()).expect("bind");
        s.connect_timeout(&to.into(), WAIT).expect("connect");
        s
    };
    around.call(|| {
        for (caller, own, external) in [(CALLER4, NODE4, EXTERNAL4), (CALLER6, NODE6, EXTERNAL6)] {
            let to = [at(own, 30_001), at(own, 30_004), at(external, 80)];
            let mut open = to.map(|to| TcpStream::from(from(socket2::Type::STREAM, at(caller, 45_000), to)));
            for c in &mut open {
                assert_eq!(greeting(c).expect("greeting"), format!("o1 {caller}"));
            }
            for (c, text) in open.iter_mut().zip([b"one", b"two", b"six"]) {
                c.write_all(text).expect("write");
                let mut back = [0; 3];
                c.read_exact(&mut back).expect("read");
                assert_eq!(&back, text);
            }
            // Connected, so that each takes answers from nobody but whom it asked.
            let askers = to.map(|to| UdpSocket::from(from(socket2::Type::DGRAM, at(caller, 45_001), to)));
            for round in 1..4 {
                for (n, s) in askers.iter().enumerate() {
                    s.send(&vec![7; 10 * round + n]).expect("send");
                }
                for (n, s) in askers.iter().enumerate() {
                    s.set_read_timeout(Some(WAIT)).expect("timeout");
                    let mut buffer = [0; 256];
                    let read = s.recv(&mut buffer).expect("an answer");
                    let said = String::from_utf8_lossy(&buffer[..read]).into_owned();
                    assert_eq!(said, format!("o1 {caller} {}", 10 * round + n));
                }
            }
        }
    });
}

/// What the node's link shows of other networks and machines.
fn not_the_nodes(around: &Around<'_>) {
    let counters = Counters::open(&pin_dir(Path::new("/sys/fs/bpf"))).expect("counters");
    let translated = || counters.get(Reason::PacketTranslated).expect("counter");
    let card = |machine: &Netns| {
        let mut c = Connection::open_in(machine).expect("connection");
        let index = link::find(&mut c, "eth0").expect("find").expect("link").index;
        (index, link::devices(&mut c).expect("links").into_iter().find(|d| d.index == index).expect("the link").mac)
    };
    let (_, own) = card(&Netns::current().expect("own"));
    let (link, caller) = card(&around.caller);
    let send = |to: [u8; 6], tag: &[u8], sport: u16| {
        let mut frame = [&to[..], &caller, tag, &[8, 0, 0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0, 0]].concat();
        for address in [CALLER4, NODE4] {
            frame.extend(address.parse::<Ipv4Addr>().expect(address).octets());
        }
        let check: u32 = frame[frame.len() - 20..].chunks(2).map(|b| u32::from(b[0]) << 8 | u32::from(b[1])).sum();
        let check = !((check & 0xffff) + (check >> 16)) as u16;
        let at = frame.len() - 10;
        frame[at..at + 2].copy_from_slice(&check.to_be_bytes());
        frame.extend([sport.to_be_bytes(), 30_001_u16.to_be_bytes()].concat());
        frame.extend([0, 9, 0, 0, b'?']); // no checksum: RFC 768
        within(&around.caller, || lab::send_frame(link, &frame)).expect("send");
    };
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0x77, 0x77];
    let before = translated();
    for n in 0..5 {
        send(own, &[0x81, 0, 0, 7], 46_000 + n); // a VLAN
        send(OTHER, &[], 46_010 + n);
    }
    send(own, &[], 46_020);
    send(own, &[0x81, 0, 0xe0, 0], 46_021); // a priority, and no VLAN
    until("the node's own", || translated() >= before + 2);
    assert_eq!(translated(), before + 2, "of a VLAN, or of another machine");
}

/// A caller that keeps its port: datagrams to whom the service has lost go to another at once; what is open goes on.
fn withdrawn(ground: &Ground, around: &Around<'_>, pods: [&TestPod; 2], all: &[Resource]) {
    for (own, caller) in [(NODE4, CALLER4), (NODE6, CALLER6)] {
        let to = at(own, 30_008);
        let asker = around.call(|| UdpSocket::bind(at(caller, 46_100))).expect("bind");
        asker.set_read_timeout(Some(WAIT)).expect("timeout");
        let before = asked_by(&asker, to).expect("an answer");
        let (gone, left) = if before == pods[0].name { (pods[0], pods[1]) } else { (pods[1], pods[0]) };
        let mut open = (0..200)
            .map(|_| around.call(|| TcpStream::connect_timeout(&to, WAIT)).expect("connect"))
            .find_map(|mut c| greeting(&mut c).expect("greeting").starts_with(&gone.name).then_some(c))
            .expect("a connection to each backend within 200");
        let both = |r: &Resource| matches!(r, Resource::EndpointSet(set) if set.name.name == "both");
        let others = all.iter().filter(|r| !both(r)).cloned();
        ground.apply(others.chain([endpoints("both", &[left])]).collect());
        for _ in 0..20 {
            assert_eq!(asked_by(&asker, to).expect("an answer"), left.name, "{to}: after the acknowledgement");
            assert!(around.call(|| dial(to)).expect("connect").starts_with(&left.name), "{to}");
        }
        open.write_all(b"still").expect("write");
        let mut back = [0; 5];
        open.read_exact(&mut back).expect("what is open goes on");
        assert_eq!(&back, b"still");
        ground.apply(all.to_vec());
    }
}

/// Host ports of both protocols, which the next pod has at once.
fn host_ports(ground: &Ground, around: &Around<'_>) {
    const PORT: u16 = 8_443;
    let mapping = |protocol: &str| serde_json::json!({"hostPort": PORT, "containerPort": 8080, "protocol": protocol});
    let mapped = |name: &str| {
        let pod = ground.pod_with(
            name,
            &[("runtimeConfig", serde_json::json!({"portMappings": [mapping("tcp"), mapping("udp")]}))],
        );
        serve(&pod.netns, name, ANY, 8080);
        pod
    };
    let pod = mapped("hp1");
    let askers = [(NODE4, CALLER4), (NODE6, CALLER6)].map(|(own, caller)| {
        let said = around.call(|| (dial(at(own, PORT)), ask(at(own, PORT), 1)));
        assert_eq!(said.0.expect("TCP"), format!("hp1 {caller}"));
        assert_eq!(said.1.expect("UDP"), format!("hp1 {caller} 1"));
        let said = around.call(|| ask(at(own, PORT), 9_000)).expect("fragments");
        assert!(said.ends_with(" 9000"), "{said}");
        let asker = around.call(|| UdpSocket::bind(at(caller, 46_200))).expect("bind");
        asker.set_read_timeout(Some(WAIT)).expect("timeout");
        assert_eq!(asked_by(&asker, at(own, PORT)).expect("an answer"), "hp1");
        (asker, at(own, PORT))
    });
    ground.end_pod(pod);
    let other = ground.pod("hp3");
    serve(&other.netns, "hp3", ANY, 8080);
    for (asker, to) in &askers {
        asker.set_read_timeout(Some(Duration::from_millis(300))).expect("timeout");
        let said = asked_by(asker, *to).expect_err("nobody has the port");
        assert!(
            matches!(said.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::ConnectionRefused),
            "{said}"
        );
        asker.set_read_timeout(Some(WAIT)).expect("timeout");
    }
    let pod = mapped("hp2");
    for (asker, to) in &askers {
        assert_eq!(asked_by(asker, *to).expect("an answer"), "hp2");
        assert!(around.call(|| dial(*to)).expect("connect").starts_with("hp2 "));
    }
    [pod, other].into_iter().for_each(|p| ground.end_pod(p));
}

fn balanced(around: &Around<'_>, pods: &[&TestPod]) {
    const N: u32 = 2_000;
    let mut seen = BTreeMap::<String, u32>::new();
    let answers = around.call(|| (0..N).map(|_| dial(at(NODE4, 30_008)).expect("connect")).collect::<Vec<_>>());
    for answer in answers {
        *seen.entry(answer.split(' ').next().unwrap_or_default().to_owned()).or_default() += 1;
    }
    let expected = f64::from(N) / pods.len() as f64;
    let chi: f64 = seen.values().map(|n| (f64::from(*n) - expected).powi(2) / expected).sum();
    println!("{N} connections from outside: {seen:?}, chi-squared {chi:.2}");
    assert_eq!(seen.len(), pods.len());
    // One degree of freedom: above 24 by chance once in a million.
    assert!(chi < 24.0);
    let one: BTreeSet<String> = around.call(|| (0..50).map(|_| dial(at(NODE4, 30_009)).expect("connect")).collect());
    assert_eq!(one.len(), 1, "a client keeps its backend: {one:?}");
}

/// A link that comes later is the node's too.
fn new_link(around: &Around<'_>) {
    let own = Netns::current().expect("own");
    lab::bridge(&around.hub, "br1", ip("192.168.60.254"), 24).expect("bridge");
    lab::cable(&around.hub, "br1", "later0", &own, "eth1", ip("192.168.60.1"), 24).expect("cable");
    lab::cable(&around.hub, "br1", "later1", &around.caller, "eth1", ip("192.168.60.2"), 24).expect("cable");
    until("the new link's address has node ports", || {
        around.call(|| dial(at("192.168.60.1", 30_001))).is_ok_and(|a| a == "o1 192.168.60.2")
    });
}

/// An address of the node that becomes another is followed: node ports are on the new one and no more on the old one, and
/// pods are seen under the new one.
fn changed_address(around: &Around<'_>, pod: &TestPod) {
    let [before, after] = ["192.168.60.1", "192.168.60.7"];
    let caller = "192.168.60.2";
    let seen = || within(&pod.netns, || dial(at(caller, 9000))).unwrap_or_else(|e| e.to_string());
    assert_eq!(seen(), format!("world {before}"));
    let mut c = Connection::open().expect("connection");
    let link = link::find(&mut c, "eth1").expect("find").expect("link").index;
    let gone = Address { link, prefix: Prefix { address: ip(before), len: 24 } };
    kernel::apply(&mut c, &[Operation::RemoveAddress(gone)]).expect("remove");
    let locals = NodeMaps::open(&pin_dir(Path::new("/sys/fs/bpf"))).expect("maps").locals;
    let is_local = |text: &str| locals.get(&sluice_ebpf::addr(ip(text))).expect("read").is_some();
    until("the old address is not the node's any more", || !is_local(before));
    add_address(&Netns::current().expect("own"), "eth1", after, 24);
    until("the new address is the node's", || is_local(after));
    until("outside sees pods under the new address", || seen() == format!("world {after}"));
    until("the new address has node ports", || {
        around.call(|| dial(at(after, 30_001))).is_ok_and(|a| a == format!("o1 {caller}"))
    });
    let from_pod = |to: &str| within(&pod.netns, || dial(at(to, 30_001)));
    assert!(from_pod(after).is_ok_and(|a| a.starts_with("o1 ")), "at the socket too");
    assert!(from_pod(before).is_err(), "nobody has the old one");
}

/// The part of a caller that dials without end, and notes how often it was answered.
pub fn callers() {
    let to: SocketAddr = std::env::var(DIALLED).expect(DIALLED).parse().expect(DIALLED);
    for made in 1_u32.. {
        dial(to).expect("no connection fails");
        std::fs::write(said("callers"), made.to_string()).expect("write");
    }
}

const DIALLED: &str = "SLUICE_TEST_DIAL";

fn agent_dies(ground: &Ground, around: &Around<'_>) {
    let _ = std::fs::remove_file(said("callers"));
    let dialled = at(NODE4, 30_002).to_string();
    let mut command = ground.child("callers", &[(DIALLED, &dialled)]);
    let mut callers = around.call(move || command.spawn()).expect("callers");
    let made = || std::fs::read_to_string(said("callers")).ok().and_then(|t| t.parse::<u32>().ok()).unwrap_or(0);
    for _ in 0..3 {
        let before = made();
        ground.kill_agent();
        until("connections go on without an agent", || made() > before + 100);
        ground.start_agent();
        until("the agent is back", || PathBuf::from(crate::ground::ACK).exists());
    }
    let failed = callers.try_wait().expect("status");
    callers.kill().expect("kill");
    callers.wait().expect("reap");
    println!("agent killed 3 times: {} connections from outside", made());
    assert_eq!(failed, None, "none failed");
}
