//! Nodes in one network and in two, joined by a router: pods reach each other natively or through VXLAN, as chosen, and
//! what a change leaves behind is cleared.

mod common;

use common::Named;
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use sluice_netlink::{
    Connection, Netns,
    between::{self, LINKS, Mode, Node},
    kernel, lab,
    link::{self, Veth},
    plan::{
        Address, Capture, MAIN_TABLE, Operation, PROTOCOL_NODE, Prefix, Route, RouteKind, host_state, node_state, plan,
        pod_state,
    },
    sysctl,
};
use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(10);

fn ip(text: &str) -> IpAddr {
    text.parse().expect(text)
}

fn prefix(text: &str) -> Prefix {
    text.parse().expect(text)
}

/// A machine with one pod, whose link has an MTU of 1500.
struct Machine {
    node: Node,
    connection: Connection,
    netns: Netns,
    pod: Netns,
    pod_addresses: Vec<IpAddr>,
    pod_link: u32,
    _guards: [Named; 2],
}

const POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

impl Machine {
    /// The `n`th node, on the bridge of the router, with addresses of both families, known to others by `known`.
    fn new(router: &Netns, bridge: &str, n: u8, addresses: [&str; 2], known: &[&str]) -> Self {
        let (guard, netns) = Named::new("node");
        netns.run(forward).expect("run");
        let (pod_guard, pod) = Named::new("pod");
        lab::cable(router, bridge, &format!("p{n}"), &netns, "eth0", ip(addresses[0]), 24).expect("cable");
        let mut connection = Connection::open_in(&netns).expect("connection");
        let eth0 = link::find(&mut connection, "eth0").expect("find").expect("made").index;
        let six = Prefix { address: ip(addresses[1]), len: 64 };
        kernel::apply(&mut connection, &[Operation::AddAddress(Address { link: eth0, prefix: six })]).expect("IPv6");

        let pod_addresses = vec![ip(&format!("10.244.{n}.2")), ip(&format!("fd10:{n}::2"))];
        let veth = Veth { host: "slc0", pod: "eth0", pod_mac: POD_MAC, mtu: Some(1500) };
        link::make_veth(&mut connection, &pod, &veth).expect("pod's link");
        let mut inside = Connection::open_in(&pod).expect("connection");
        let inner = link::find(&mut inside, "eth0").expect("find").expect("made").index;
        let pod_link = link::find(&mut connection, "slc0").expect("find").expect("made").index;
        let capture = Capture { mark: 1, table: 2, priority: 3 };
        kernel::reconcile(&mut inside, &pod_state(inner, &pod_addresses, capture), None).expect("pod");
        let ranges = vec![prefix(&format!("10.244.{n}.0/24")), prefix(&format!("fd10:{n}::/64"))];
        let node = Node { name: format!("node-{n}"), addresses: known.iter().map(|a| ip(a)).collect(), ranges };
        Self { node, connection, netns, pod, pod_addresses, pod_link, _guards: [guard, pod_guard] }
    }

    /// Routes of an administrator, not ours.
    fn default_routes(&mut self, gateways: [&str; 2]) {
        let routes = gateways.map(|via| {
            let via = ip(via);
            Operation::AddRoute(Route {
                table: MAIN_TABLE,
                to: Prefix::all(via.is_ipv4()),
                kind: RouteKind::Unicast,
                via: Some(via),
                link: None,
                source: None,
                mtu: None,
                protocol: 4,
            })
        });
        kernel::apply(&mut self.connection, &routes).expect("default routes");
    }

    /// As the agent does it: what was needed, and the problems.
    fn reconcile(&mut self, mode: Mode, others: &[Node]) -> (Vec<Operation>, Vec<String>) {
        let devices = link::devices(&mut self.connection).expect("devices");
        let ways = between::choose(mode, &self.node, others, &devices);
        let links = between::links(&self.node, &ways, &devices);
        let wanted = |indexes: &_| {
            let mut state = node_state(&self.node.ranges, &ways.native);
            state.merge(host_state(self.pod_link, POD_MAC, &self.pod_addresses));
            state.merge(between::state(&self.node, &ways, &links, indexes));
            state
        };
        let done = kernel::reconcile_links(&mut self.connection, &LINKS, &links, wanted, Some(PROTOCOL_NODE));
        (done.expect("reconcile"), ways.problems)
    }

    fn settle(&mut self, mode: Mode, others: &[Node]) {
        assert_eq!(self.reconcile(mode, others).1, [] as [String; 0]);
        assert_eq!(self.reconcile(mode, others), (vec![], vec![]), "everything reads back as wanted");
    }

    fn tunnels(&mut self) -> Vec<&'static str> {
        let there = |(name, _): &(&'static str, bool)| link::find(&mut self.connection, name).expect("find").is_some();
        LINKS.into_iter().filter(there).map(|(name, _)| name).collect()
    }
}

/// Before there are links: nobody waits then until their link-local addresses are known to be nobody else's.
fn forward() {
    for links in ["all", "default"] {
        sysctl::ensure(&format!("ipv6/conf/{links}/accept_dad"), "0").expect("no detection");
    }
    sysctl::ensure("ipv4/ip_forward", "1").expect("forwarding");
    sysctl::ensure("ipv6/conf/all/forwarding", "1").expect("forwarding");
}

/// A pod's connection to another pod carries more than a packet, both ways.
fn talk(from: &Machine, to: &Machine) {
    for address in &to.pod_addresses {
        let listener = to.pod.run(|| TcpListener::bind((*address, 0))).expect("run").expect("bind");
        let at = listener.local_addr().expect("address");
        let dial = || TcpStream::connect_timeout(&at, PATIENCE);
        let mut client = from.pod.run(dial).expect("run").unwrap_or_else(|e| panic!("pod to pod at {at}: {e}"));
        let (mut server, peer) = listener.accept().expect("accept");
        assert!(from.pod_addresses.contains(&peer.ip()), "{peer} is no pod");
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        }
        let sent = vec![7; 200_000];
        std::thread::scope(|s| {
            s.spawn(|| client.write_all(&sent).expect("write"));
            server.read_exact(&mut vec![0; sent.len()]).expect("read");
        });
        server.write_all(b"done").expect("answer");
        client.read_exact(&mut [0; 4]).expect("answer");
    }
}

/// The path's MTU as a pod learns it by sending what does not fit, unfragmented.
fn path_mtu(from: &Netns, to: IpAddr) -> u32 {
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = from.run(|| UdpSocket::bind(any)).expect("run").expect("bind");
    socket.connect((to, 9)).expect("connect");
    match to {
        IpAddr::V4(_) => sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DO),
        IpAddr::V6(_) => sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DO),
    }
    .expect("discovery");
    let payload = vec![0; if to.is_ipv4() { 1472 } else { 1452 }];
    let until = Instant::now() + PATIENCE;
    // The first packets are answered "too big"; nobody listens, so some may be answered "refused" too.
    while socket.send(&payload).err().and_then(|e| e.raw_os_error()) != Some(libc::EMSGSIZE) {
        assert!(Instant::now() < until, "{to}: too large packets are not answered");
        std::thread::yield_now();
    }
    if to.is_ipv4() { sockopt::ip_mtu(&socket) } else { sockopt::ipv6_mtu(&socket) }.expect("path MTU")
}

/// A router with two networks, of both families.
fn router() -> (Named, Netns) {
    let (guard, router) = Named::new("router");
    router.run(forward).expect("run");
    for (bridge, four, six) in [("br1", "192.168.1.254", "fd01::fe"), ("br2", "192.168.2.254", "fd02::fe")] {
        lab::bridge(&router, bridge, ip(four), 24).expect("bridge");
        let mut c = Connection::open_in(&router).expect("connection");
        let link = link::find(&mut c, bridge).expect("find").expect("made").index;
        let prefix = Prefix { address: ip(six), len: 64 };
        kernel::apply(&mut c, &[Operation::AddAddress(Address { link, prefix })]).expect("IPv6");
    }
    (guard, router)
}

fn across(known: [&[&str]; 2]) -> (Named, [Machine; 2]) {
    let (guard, router) = router();
    let mut a = Machine::new(&router, "br1", 1, ["192.168.1.1", "fd01::1"], known[0]);
    let mut b = Machine::new(&router, "br2", 2, ["192.168.2.1", "fd02::1"], known[1]);
    a.default_routes(["192.168.1.254", "fd01::fe"]);
    b.default_routes(["192.168.2.254", "fd02::fe"]);
    (guard, [a, b])
}

#[test]
fn across_a_router_pods_reach_each_other_through_vxlan() {
    for (known, link, mtu) in
        [([&["192.168.1.1"], &["192.168.2.1"]], "slcvx4", 1450), ([&["fd01::1"], &["fd02::1"]], "slcvx6", 1430)]
    {
        let (_guard, [mut a, mut b]) = across(known.map(|k| &k[..]));
        let nodes = [a.node.clone(), b.node.clone()];
        a.settle(Mode::Auto, &nodes[1..]);
        b.settle(Mode::Auto, &nodes[..1]);
        assert_eq!((a.tunnels(), b.tunnels()), (vec![link], vec![link]));
        talk(&a, &b);
        talk(&b, &a);
        for address in &b.pod_addresses {
            assert_eq!(path_mtu(&a.pod, *address), mtu, "{address}");
            // The node's own connections are answered too.
            let listener = b.pod.run(|| TcpListener::bind((*address, 0))).expect("run").expect("bind");
            let at = listener.local_addr().expect("address");
            let dial = || TcpStream::connect_timeout(&at, PATIENCE);
            let client = a.netns.run(dial).expect("run").unwrap_or_else(|e| panic!("node to pod at {at}: {e}"));
            let from = client.local_addr().expect("address").ip();
            assert!(a.node.ranges.iter().any(|r| r.address == from), "{from}");
        }
    }
}

#[test]
fn without_tunnels_a_router_that_knows_no_pods_is_the_end() {
    let (_guard, [mut a, mut b]) = across([&["192.168.1.1"], &["192.168.2.1"]]);
    let nodes = [a.node.clone(), b.node.clone()];
    let (_, problems) = a.reconcile(Mode::Never, &nodes[1..]);
    assert!(problems.len() == 2 && problems[0].contains("192.168.2.1"), "{problems:?}");
    b.reconcile(Mode::Never, &nodes[..1]);
    assert_eq!(a.tunnels(), [] as [&str; 0]);
    let _server = b.pod.run(|| TcpListener::bind((b.pod_addresses[0], 80))).expect("run").expect("bind");
    let dial = || TcpStream::connect_timeout(&(b.pod_addresses[0], 80).into(), Duration::from_millis(300));
    a.pod.run(dial).expect("run").expect_err("no way");
}

#[test]
fn in_one_network_either_way_works_and_one_follows_the_other() {
    let (_guard, router) = router();
    let mut a = Machine::new(&router, "br1", 1, ["192.168.1.1", "fd01::1"], &["192.168.1.1", "fd01::1"]);
    let mut b = Machine::new(&router, "br1", 2, ["192.168.1.2", "fd01::2"], &["192.168.1.2", "fd01::2"]);
    let nodes = [a.node.clone(), b.node.clone()];
    for (mode, links) in [(Mode::Auto, vec![]), (Mode::Always, vec!["slcvx4"]), (Mode::Never, vec![])] {
        a.settle(mode, &nodes[1..]);
        b.settle(mode, &nodes[..1]);
        assert_eq!((a.tunnels(), b.tunnels()), (links.clone(), links), "{mode:?}");
        talk(&a, &b);
    }
}

#[test]
fn what_nodes_leave_behind_goes_and_what_others_break_is_mended() {
    let (_guard, [mut a, mut b]) = across([&["192.168.1.1"], &["192.168.2.1"]]);
    let third =
        Node { name: "node-3".into(), addresses: vec![ip("192.168.3.1")], ranges: vec![prefix("10.244.3.0/24")] };
    let nodes = [a.node.clone(), b.node.clone(), third];
    a.settle(Mode::Auto, &nodes[1..]);
    b.settle(Mode::Auto, &nodes[..1]);
    let entries = |a: &mut Machine| {
        let s = kernel::read(&mut a.connection).expect("read");
        let macs = [between::mac("node-2"), between::mac("node-3")];
        macs.map(|m| (s.forwards.iter().any(|e| e.mac == m), s.neighbours.iter().any(|n| n.mac == m)))
    };
    assert_eq!(entries(&mut a), [(true, true), (true, true)]);
    let (done, _) = a.reconcile(Mode::Auto, &nodes[1..2]);
    assert_eq!(done.len(), 3, "forward, neighbour, route: {done:?}");
    assert_eq!(entries(&mut a), [(true, true), (false, false)]);

    // Somebody writes into the tables, changes the MTU, deletes the link.
    let index = |a: &mut Machine| link::find(&mut a.connection, "slcvx4").expect("find").expect("made").index;
    let link = index(&mut a);
    let wrong = sluice_netlink::plan::Forward { link, mac: between::mac("node-2"), to: ip("192.168.2.77") };
    let harm = [Operation::AddForward(wrong), Operation::SetMtu { link, mtu: 1300 }];
    kernel::apply(&mut a.connection, &harm).expect("harm");
    a.settle(Mode::Auto, &nodes[1..2]);
    talk(&a, &b);
    link::delete(&mut a.connection, link).expect("delete");
    a.settle(Mode::Auto, &nodes[1..2]);
    talk(&a, &b);
    // One of another number has the name.
    let link = index(&mut a);
    link::delete(&mut a.connection, link).expect("delete");
    let other = sluice_netlink::plan::Vxlan {
        name: "slcvx4".into(),
        vni: 9,
        port: 4789,
        local: ip("192.168.1.1"),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1450,
    };
    kernel::apply(&mut a.connection, &[Operation::MakeVxlan(other)]).expect("another's");
    a.settle(Mode::Auto, &nodes[1..2]);
    talk(&b, &a);

    // The last one leaves.
    a.settle(Mode::Auto, &[]);
    assert_eq!(a.tunnels(), [] as [&str; 0]);
    let state = kernel::read(&mut a.connection).expect("read");
    assert!(state.forwards.is_empty() && !state.routes.iter().any(|r| r.to == nodes[1].ranges[0]));
    assert_eq!(plan(&Default::default(), &state, Some(PROTOCOL_NODE)).len(), 2, "only the own ranges' routes are left");
}

#[test]
fn a_port_that_is_taken_is_named_and_native_ways_come_about() {
    let (_guard, [mut a, b]) = across([&["192.168.1.1"], &["192.168.2.1"]]);
    let _holder = a.netns.run(|| UdpSocket::bind(("0.0.0.0", between::PORT))).expect("run").expect("bind");
    let near = Node { name: "near".into(), addresses: vec![ip("192.168.1.9")], ranges: vec![prefix("10.244.9.0/24")] };
    let devices = link::devices(&mut a.connection).expect("devices");
    let ways = between::choose(Mode::Auto, &a.node, &[b.node.clone(), near], &devices);
    let links = between::links(&a.node, &ways, &devices);
    let wanted = |indexes: &_| {
        let mut state = node_state(&a.node.ranges, &ways.native);
        state.merge(between::state(&a.node, &ways, &links, indexes));
        state
    };
    let done = kernel::reconcile_links(&mut a.connection, &LINKS, &links, wanted, Some(PROTOCOL_NODE));
    let error = done.expect_err("the port is taken").to_string();
    assert!(error.contains("slcvx4") && error.contains("UDP port 8472"), "{error}");
    let routes = kernel::read_routes(&mut a.connection).expect("routes");
    assert!(routes.iter().any(|r| r.to == prefix("10.244.9.0/24")), "{routes:?}");
}
