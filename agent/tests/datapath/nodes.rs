//! Given two nodes that let backends' nodes answer, one with the address that callers dial and one with the backends, when
//! a machine outside dials, then the backend sees it and is answered for past the node that was reached; both ways between
//! nodes, natively and through VXLAN.
//!
//! The second node is a child of the test, with namespaces, a cgroup, pins, leases and an agent of its own. It is started
//! before the first one is made: a cgroup inside that node's would be balanced by both. It does what it is told by lines of JSON.

use crate::{
    around::{
        ANY, CALLER4, CALLER6, NODE4, NODE6, WAIT, add_address, add_route, ask, asked_by, at, dial, echoed,
        forbid_forwarding, greeting, ip, remove_eth0, serve, within,
    },
    balance,
    ground::{Ground, NODE, OTHER, TestPod, build_plugin},
    outside::{EXTERNAL4, EXTERNAL6, shop},
    parts,
};
use serde::{Deserialize, Serialize};
use sluice_ebpf::{
    common::Reason,
    maps::{Counters, pin_dir},
};
use sluice_model::{Announcement, Name, Node, Resource, Service};
use sluice_netlink::{Connection, Netns, lab, link, ns};
use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
};

pub const STORY: &str = "outside-dsr-nodes";
const NAME: &str = "n2";
/// Of the second node: in the first one's network, and in another, behind a router.
const NEAR: [&str; 2] = ["192.168.50.3", "fd00:50::3"];
const FAR: [&str; 2] = ["192.168.70.3", "fd00:70::3"];
const ROUTER_NEAR: [&str; 2] = ["192.168.50.254", "fd00:50::fe"];
const ROUTER_FAR: [&str; 2] = ["192.168.70.254", "fd00:70::fe"];
/// A node port of the service, beside its addresses.
const NODE_PORT: u16 = 30_001;

#[derive(Serialize, Deserialize)]
enum Order {
    Begin,
    Apply(Vec<Resource>),
    Pod(String),
    End(String),
    /// Connections to services that its packet programs have given a backend.
    Translated,
}

/// The second node, as the story has it in hand.
pub struct Other {
    child: RefCell<(Child, BufReader<ChildStdout>)>,
}

impl Other {
    pub fn start(plugin: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("own path"))
            .env(parts::PART, "node")
            .env(OTHER, NAME)
            .env(parts::DSR, "1")
            .env("SLUICE_TEST_PLUGIN", plugin)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("second node");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Self { child: RefCell::new((child, stdout)) }
    }

    fn told<T: for<'a> Deserialize<'a>>(&self, order: &Order) -> T {
        let (child, answers) = &mut *self.child.borrow_mut();
        let line = serde_json::to_string(order).expect("encodes");
        writeln!(child.stdin.as_mut().expect("piped"), "{line}").expect("the second node lives");
        let mut answer = String::new();
        answers.read_line(&mut answer).expect("read");
        serde_json::from_str(&answer).unwrap_or_else(|e| panic!("the second node says {answer:?}: {e}"))
    }

    /// Its own network.
    fn netns(&self) -> Netns {
        Netns::open(format!("/proc/{}/ns/net", self.child.borrow().0.id())).expect("namespace of the second node")
    }

    fn pod(&self, name: &str) -> Vec<IpAddr> {
        self.told(&Order::Pod(name.into()))
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let child = &mut self.child.get_mut().0;
        drop(child.stdin.take());
        let _ = child.wait();
    }
}

/// The part of the second node.
pub fn other() {
    let mut orders = std::io::stdin().lines();
    let mut next = || Some(serde_json::from_str(&orders.next()?.ok()?).expect("an order"));
    if next().is_none() {
        return;
    }
    let ground = Ground::new(build_plugin());
    let mut pods = BTreeMap::<String, TestPod>::new();
    let say = |answer: serde_json::Value| println!("{answer}");
    say(true.into());
    while let Some(order) = next() {
        match order {
            Order::Begin => say(true.into()),
            Order::Apply(resources) => {
                ground.apply(resources);
                say(true.into());
            }
            Order::Pod(name) => {
                let pod = ground.pod(&name);
                serve(&pod.netns, &name, ANY, 8080);
                say(serde_json::to_value(&pod.addresses).expect("encodes"));
                pods.insert(name, pod);
            }
            Order::End(name) => {
                ground.end_pod(pods.remove(&name).expect("a pod of this node"));
                say(true.into());
            }
            Order::Translated => say(counted(Reason::PacketTranslated).into()),
        }
    }
    pods.into_values().for_each(|pod| ground.end_pod(pod));
}

fn counted(reason: Reason) -> u64 {
    Counters::open(&pin_dir(Path::new("/sys/fs/bpf"))).and_then(|c| c.get(reason)).expect("counter")
}

/// The machines around the first node: a caller in its network, the second node, and what is between.
struct Around<'g> {
    ground: &'g Ground,
    hub: Netns,
    caller: Netns,
    second: [&'static str; 2],
}

impl<'g> Around<'g> {
    fn new(ground: &'g Ground, other: &Other, far: bool) -> Self {
        let make = |name: &str| ns::make_named(Path::new(&format!("/run/sluice-test/{name}"))).expect("namespace");
        let (hub, caller) = (make("hub"), make("caller"));
        let own = Netns::current().expect("own namespace");
        let node = other.netns();
        let second = if far { FAR } else { NEAR };
        lab::bridge(&hub, "br0", ip(ROUTER_NEAR[0]), 24).expect("bridge");
        add_address(&hub, "br0", ROUTER_NEAR[1], 64);
        lab::bridge(&hub, "br1", ip(ROUTER_FAR[0]), 24).expect("bridge");
        add_address(&hub, "br1", ROUTER_FAR[1], 64);
        within(&hub, || {
            // Answers come under an address that is in the other network.
            for (setting, value) in
                [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1"), ("ipv4/conf/all/rp_filter", "0")]
            {
                fs::write(format!("/proc/sys/net/{setting}"), value).expect("router");
            }
        });
        let machines = [
            (&own, [NODE4, NODE6], "br0", ROUTER_NEAR),
            (&caller, [CALLER4, CALLER6], "br0", ROUTER_NEAR),
            (&node, second, if far { "br1" } else { "br0" }, if far { ROUTER_FAR } else { ROUTER_NEAR }),
        ];
        for (number, (machine, addresses, bridge, router)) in machines.into_iter().enumerate() {
            lab::cable(&hub, bridge, &format!("port{number}"), machine, "eth0", ip(addresses[0]), 24).expect("cable");
            add_address(machine, "eth0", addresses[1], 64);
            machine.run(|| lab::loopback_up().expect("lo")).expect("run");
            for (range, via) in ["0.0.0.0/0", "::/0"].into_iter().zip(router) {
                add_route(machine, range, via);
            }
        }
        Self { ground, hub, caller, second }
    }

    /// As the machine outside.
    fn call<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.ground.outside(|| within(&self.caller, work))
    }

    fn nodes(&self) -> [Resource; 2] {
        let Resource::Node(own) = balance::node() else { unreachable!("a node") };
        let own = Node { addresses: vec![ip(NODE4), ip(NODE6)], ..own };
        let second = Node {
            name: Name::cluster(NAME),
            addresses: self.second.map(ip).to_vec(),
            pod_cidrs: vec!["10.244.2.0/24".into(), "fd00:2::/64".into()],
            ..own.clone()
        };
        [own, second].map(Resource::Node)
    }

    /// To both nodes, in force when this returns.
    fn apply(&self, other: &Other, backends: &[&Vec<IpAddr>]) {
        let announced = |s: &mut Service| {
            s.external_ips = vec![ip(EXTERNAL4), ip(EXTERNAL6)];
            s.announcements = s.external_ips.iter().map(|a| Announcement { address: *a, node: NODE.into() }).collect();
        };
        let [own, second] = self.nodes();
        let all = vec![own, second, shop("web", 1, announced), backends_of(backends)];
        self.ground.publish(all.clone());
        let _: bool = other.told(&Order::Apply(all));
        self.ground.in_force();
    }
}

impl Drop for Around<'_> {
    fn drop(&mut self) {
        for netns in [&self.hub, &self.caller] {
            let _ = ns::remove_named(netns.path());
        }
    }
}

fn backends_of(pods: &[&Vec<IpAddr>]) -> Resource {
    let addresses: Vec<IpAddr> = pods.iter().copied().flatten().copied().collect();
    balance::backends("web", NAME, &addresses)
}

/// Bytes that have come over the first node's link.
fn received() -> u64 {
    let table = fs::read_to_string("/proc/thread-self/net/dev").expect("devices");
    let line = table.lines().find_map(|l| l.trim().strip_prefix("eth0:")).expect("eth0");
    line.split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number")
}

pub fn story(ground: &Ground) {
    let other = ground.other.as_ref().expect("the second node was started first");
    let _: bool = other.told(&Order::Begin);
    forbid_forwarding();
    for far in [false, true] {
        let around = Around::new(ground, other, far);
        let pods = ["b1", "b2"].map(|name| (name, other.pod(name)));
        for direct in [false, true] {
            restarted(ground, direct);
            around.apply(other, &[&pods[0].1]);
            answers(&around, other, direct);
        }
        let tunnel = link::find(&mut Connection::open().expect("rtnetlink"), "slcvx4").expect("find");
        assert_eq!(tunnel.is_some(), far, "the way to the second node");
        around.apply(other, &[&pods[0].1, &pods[1].1]);
        backends_leave(&around, other, &pods);
        let _: bool = other.told(&Order::Apply(vec![]));
        ground.apply(vec![balance::node()]);
        remove_eth0();
        within(&other.netns(), remove_eth0);
        println!("{} ... ok", if far { "through VXLAN" } else { "natively" });
    }
    let _ = Command::new("nft").args(["flush", "ruleset"]).status();
    restarted(ground, false);
}

/// The first node's agent: the second's has the flag all along.
fn restarted(ground: &Ground, direct: bool) {
    ground.kill_agent();
    ground.dsr.set(direct);
    ground.start_agent();
}

/// What callers dial, and as whom the backend sees them.
fn dialled() -> [(SocketAddr, &'static str); 4] {
    [
        (at(EXTERNAL4, 80), CALLER4),
        (at(EXTERNAL6, 80), CALLER6),
        (at(NODE4, NODE_PORT), CALLER4),
        (at(NODE6, NODE_PORT), CALLER6),
    ]
}

/// Past the first node where it lets them, else by way of it and under its address.
fn answers(around: &Around<'_>, other: &Other, direct: bool) {
    const STREAM: u64 = 4_000_000;
    let counters = || [counted(Reason::Relayed), counted(Reason::PacketTranslated), other.told(&Order::Translated)];
    let before = counters();
    for (to, caller) in dialled() {
        let said = around.call(|| [dial(to), ask(to, 1), ask(to, 1_200)]).map(|said| said.expect("an answer"));
        for (said, more) in said.iter().zip(["", " 1", " 1200"]) {
            // Else it is the address of the link to the second node: a tunnel has one of its own.
            let seen = said.strip_prefix("b1 ").and_then(|s| s.strip_suffix(more)).expect("whom the pod sees");
            assert_eq!(seen == caller, direct, "{to}: {said}");
        }
        let came = received();
        around.call(|| echoed(to));
        let came = received() - came;
        println!("{to}, direct {direct}: {came} bytes came to the first node, of {STREAM} there and {STREAM} back");
        // What is sent, with headers and acknowledgements; and what comes back, or not.
        let want = if direct { STREAM..STREAM * 3 / 2 } else { 2 * STREAM..STREAM * 5 / 2 };
        assert!(want.contains(&came), "{to}: {came} bytes came to the first node");
    }
    let after = counters();
    let [relayed, here, there] = [0, 1, 2].map(|i| after[i] - before[i]);
    println!("direct {direct}: {relayed} passed on, {here} translated at the first node, {there} at the second");
    match direct {
        true => assert!(relayed >= 16 && here == 0 && there >= 16),
        false => assert!(relayed == 0 && here >= 16 && there == 0),
    }
}

/// The service loses a backend while it is spoken to; later the pod goes.
fn backends_leave(around: &Around<'_>, other: &Other, pods: &[(&str, Vec<IpAddr>); 2]) {
    let [gone, left] = pods;
    let begins = |said: &str, name: &str| said.split(' ').next() == Some(name);
    let mut open: Vec<(SocketAddr, TcpStream, UdpSocket)> = dialled()
        .into_iter()
        .zip(47_000..)
        .map(|((to, caller), port)| {
            let stream = (0..200)
                .map(|_| around.call(|| TcpStream::connect_timeout(&to, WAIT)).expect("connect"))
                .find_map(|mut c| begins(&greeting(&mut c).expect("greeting"), gone.0).then_some(c))
                .expect("a connection to each backend within 200");
            // Of ports side by side, the first that leads there.
            let asker = (0..200)
                .map(|n| around.call(|| UdpSocket::bind(at(caller, port + n * 10))).expect("bind"))
                .find(|s| {
                    s.set_read_timeout(Some(WAIT)).expect("timeout");
                    asked_by(s, to).expect("an answer") == gone.0
                })
                .expect("a socket of each backend within 200");
            (to, stream, asker)
        })
        .collect();
    around.apply(other, &[&left.1]);
    for (to, stream, asker) in &mut open {
        for _ in 0..20 {
            assert_eq!(asked_by(asker, *to).expect("an answer"), left.0, "{to}: after both have acknowledged");
            assert!(begins(&around.call(|| dial(*to)).expect("connect"), left.0), "{to}");
        }
        stream.write_all(b"still").expect("write");
        let mut back = [0; 5];
        stream.read_exact(&mut back).unwrap_or_else(|e| panic!("{to}: what is open goes on: {e}"));
        assert_eq!(&back, b"still");
    }
    let _: bool = other.told(&Order::End(gone.0.into()));
    for (to, stream, asker) in &mut open {
        // Nobody is left who knows it: its next words are refused by whoever gets them.
        let _ = stream.write_all(b"gone");
        let end = stream.read(&mut [0; 5]);
        assert!(
            matches!(&end, Err(e) if e.kind() == ErrorKind::ConnectionReset) || matches!(&end, Ok(0)),
            "{to}: an end that the caller is told of: {end:?}"
        );
        assert_eq!(asked_by(asker, *to).expect("an answer"), left.0, "{to}");
        assert!(begins(&around.call(|| dial(*to)).expect("connect"), left.0), "{to}");
    }
    let _: bool = other.told(&Order::End(left.0.into()));
}
