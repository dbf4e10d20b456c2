//! Direct server return: connections from outside to backends of other nodes, seen from the node that the caller
//! addressed and from that of the backend.

use crate::{
    FAMILIES, Family, WIRE,
    frames::{self, ACK, FIN, Frame, RST, read},
    ip,
    lab::Lab,
    wire,
};
use sluice_ebpf::{
    addr,
    common::{Addr, CLUSTER_ADJACENT, CLUSTER_NODE, DSR, Device, INSIDE, PodAddr, Range, Reason, ServiceKey, TCP, UDP},
    dry_run::Verdict,
    layout::{Target, Wanted, WantedGroup},
    loader::XDP,
};
use std::net::IpAddr;

/// Of each family: a pod of another node, that node, and an address outside that pods reach under their own.
const OTHERS: [[&str; 3]; 2] =
    [["10.244.2.9", "192.0.2.2", "203.0.113.9"], ["fd00:2::9", "2001:db8:1::2", "2001:db8:9::9"]];

/// A service's port at the cluster's address, and as node port.
const PORT: u16 = 80;
const NODE_PORT: u16 = 30_080;

/// A node whose link leads to all others by a router, with a service on [`PORT`] and [`NODE_PORT`].
struct Node {
    lab: Lab,
    link: u32,
}

impl Node {
    fn new(name: &str) -> Self {
        let link = wire();
        let lab = Lab::new(name);
        let [addr4, addr6] = FAMILIES.map(|f| addr(ip(f.node)));
        lab.node.devices.set(&link, &Device { addr4, addr6, mac: WIRE, flags: 0 }).expect("device");
        for (f, [far, other, excluded]) in FAMILIES.into_iter().zip(OTHERS) {
            lab.pods.addrs.set(&addr(ip(f.pod)), &PodAddr { netns: 7, flags: 0, ifindex: 1 }).expect("pod");
            lab.node.locals.set(&addr(ip(f.node)), &1).expect("local");
            lab.node.announced.set(&addr(ip(f.vip)), &1).expect("announced");
            for (address, flags) in
                [(far, 1 | CLUSTER_ADJACENT), (other, 1 | CLUSTER_NODE), (f.node, 1 | CLUSTER_NODE), (excluded, 1)]
            {
                lab.node.cluster.set(&Range { len: 128, addr: addr(ip(address)) }, &flags).expect("range");
            }
        }
        lab.settings.set_flags(DSR, DSR).expect("settings");
        Self { lab, link }
    }

    /// From now on the service's only backends are these, one of each family.
    fn serve(&mut self, backends: [&str; 2]) {
        let mut services = vec![];
        for (f, backend) in FAMILIES.into_iter().zip(backends) {
            for proto in [TCP, UDP] {
                let target = Target { addr: addr(ip(backend)), port_be: 8080_u16.to_be() };
                let wanted = Wanted::new(false, vec![WantedGroup { weight: 1, targets: vec![target] }]).by_maglev();
                let key = |a: Addr, port: u16| ServiceKey { addr: a, port_be: port.to_be(), proto, scope: INSIDE };
                for address in [f.vip, f.empty] {
                    services.push((key(addr(ip(address)), PORT), wanted.clone()));
                }
                services.push((key(addr(ip(f.node)).unspecified(), NODE_PORT), wanted));
            }
        }
        self.lab.serve(services);
    }

    fn run(&self, program: &str, frame: &Frame) -> (Verdict, Vec<u8>) {
        let out = self.lab.run_at(program, self.link, &frame.bytes());
        (out.verdict, out.packet)
    }

    /// Whether a packet goes on as it came, with two hops left.
    fn relays(&self, frame: &Frame) -> bool {
        let (verdict, packet) = self.run("from_wire", frame);
        assert_eq!(verdict, Verdict::Redirect, "{frame:?}");
        read(&packet).unwrap_or_else(|e| panic!("{e}: {frame:?}"));
        packet[12..] == Frame { hops: 2, ..frame.clone() }.bytes()[12..]
    }

    /// Where a packet goes that is translated; its source then.
    fn translates(&self, frame: &Frame) -> (IpAddr, IpAddr) {
        let (verdict, packet) = self.run("from_wire", frame);
        assert_eq!(verdict, Verdict::Redirect, "{frame:?}");
        let seen = read(&packet).unwrap_or_else(|e| panic!("{e}: {frame:?}"));
        (seen.src, seen.dst)
    }
}

fn call(f: Family, to: &str, sport: u16, proto: u8) -> Frame {
    let dport = if to == f.vip || to == f.empty { PORT } else { NODE_PORT };
    Frame { src: ip(f.caller), dst: ip(to), sport, dport, proto, mac: WIRE, ..Frame::default() }
}

#[test]
fn what_is_addressed_to_this_node_goes_on_as_it_is() {
    let mut node = Node::new("packets-relay");
    node.serve(OTHERS.map(|o| o[0]));
    for (f, [far, other, _]) in FAMILIES.into_iter().zip(OTHERS) {
        for (sport, proto) in [(40_000, TCP), (40_001, UDP)] {
            for to in [f.vip, f.node] {
                for options in [0, 2] {
                    let first = Frame { options, ..call(f, to, sport + options as u16 * 10, proto) };
                    let before = node.lab.counter(Reason::Relayed);
                    assert!(node.relays(&first), "{first:?}");
                    let next = Frame { flags: ACK, payload: vec![7; 900], ..first };
                    assert!(node.relays(&next), "{next:?}");
                    assert_eq!(node.lab.counter(Reason::Relayed), before + 1, "one connection");
                }
            }
            // An address that another node announces: whoever passed it on has decided, or will know better soon.
            assert_eq!(node.translates(&call(f, f.empty, sport, proto)), (ip(f.node), ip(far)));
        }
        assert!(node.relays(&Frame { hops: 255, ..call(f, f.vip, 40_110, TCP) }));
        // What its node does not know comes back by that one's stack, once.
        for back in [call(f, f.vip, 40_100, TCP), call(f, f.vip, 40_000, TCP)] {
            assert_eq!(node.run("from_wire", &Frame { hops: 1, ..back }).0, Verdict::Drop);
        }
        // An address of this node's that the others do not know, and a caller in the cluster.
        node.lab.node.locals.set(&addr(ip(f.router)), &1).expect("local");
        let unknown = Frame { dport: NODE_PORT, ..call(f, f.router, 40_111, TCP) };
        assert_eq!(node.translates(&unknown), (ip(f.node), ip(far)));
        let inside = Frame { src: ip(other), ..call(f, f.node, 40_112, TCP) };
        assert_eq!(node.translates(&inside), (ip(f.node), ip(far)));
        // What a pod dials is not from outside.
        let inside = Frame { src: ip(f.pod), mac: [0; 6], ..call(f, f.vip, 40_101, TCP) };
        let out = node.lab.run("from_pod", &inside.bytes());
        assert_eq!(frames::addresses(&out.packet).1, ip(far));
        let whole = Frame { payload: vec![1; 64], ..call(f, f.vip, 40_102, UDP) };
        for (at, more) in [(0, 1), (8, 0)] {
            let sent = whole.fragment(at, more, 600);
            let out = node.lab.run_at("from_wire", node.link, &sent);
            let relayed = Frame { hops: 2, ..whole.clone() }.fragment(at, more, 600);
            assert_eq!((out.verdict, &out.packet[12..]), (Verdict::Redirect, &relayed[12..]));
        }
        // Cut anywhere: dropped, or as it was.
        let sent = call(f, f.vip, 40_103, TCP).bytes();
        for length in 15..sent.len() - 6 {
            let Some(out) = node.lab.try_run("from_wire", &sent[..length]) else { continue };
            assert!(out.verdict == Verdict::Drop || out.packet == sent[..length], "{length} bytes");
        }
    }
}

/// Of answers nothing is seen here: it opens with the second packet, unless that ends it.
#[test]
fn a_reset_of_what_was_only_begun_opens_nothing() {
    let mut node = Node::new("packets-relay-reset");
    node.serve(OTHERS.map(|o| o[0]));
    for f in FAMILIES {
        let open = |node: &Node| node.lab.flows.entries().expect("entries").len();
        let (reset, kept) = (call(f, f.vip, 46_000, TCP), call(f, f.vip, 46_001, TCP));
        let before = open(&node);
        assert!(node.relays(&reset) && node.relays(&Frame { flags: RST, ..reset.clone() }));
        assert_eq!(open(&node), before);
        assert!(node.relays(&kept) && node.relays(&Frame { flags: ACK, ..kept.clone() }));
        assert_eq!(open(&node), before + 1);
    }
}

#[test]
fn a_backend_that_cannot_answer_by_itself_is_reached_by_translation() {
    let mut node = Node::new("packets-relay-not");
    for (f, [far, _, excluded]) in FAMILIES.into_iter().zip(OTHERS) {
        node.serve(OTHERS.map(|o| o[2]));
        assert_eq!(node.translates(&call(f, f.vip, 41_000, TCP)), (ip(f.node), ip(excluded)), "no node's next hop");
        node.serve(FAMILIES.map(|f| f.pod));
        assert_eq!(node.translates(&call(f, f.vip, 41_001, TCP)), (ip(f.caller), ip(f.pod)), "a pod of this node");
        node.serve(OTHERS.map(|o| o[0]));
        node.lab.settings.set_flags(DSR, 0).expect("settings");
        assert_eq!(node.translates(&call(f, f.vip, 41_002, TCP)), (ip(f.node), ip(far)), "turned off");
        node.lab.settings.set_flags(DSR, DSR).expect("settings");
        let next = Frame { flags: ACK, ..call(f, f.vip, 41_002, TCP) };
        assert_eq!(node.translates(&next), (ip(f.node), ip(far)), "what has begun goes on as it has begun");
    }
}

#[test]
fn a_connection_stays_where_it_is_and_a_try_goes_where_all_go() {
    let mut node = Node::new("packets-relay-stay");
    for f in FAMILIES {
        node.serve(OTHERS.map(|o| o[0]));
        let [open, tried] = [42_000, 42_001].map(|sport| call(f, f.vip, sport, TCP));
        let next = Frame { flags: ACK, ..open.clone() };
        assert!(node.relays(&open) && node.relays(&next) && node.relays(&tried));
        node.serve(FAMILIES.map(|f| f.pod));
        assert!(node.relays(&next), "its node has it still");
        assert_eq!(node.translates(&tried), (ip(f.caller), ip(f.pod)), "sent again");
        node.serve(OTHERS.map(|o| o[0]));
        assert!(node.relays(&Frame { flags: FIN | ACK, ..next.clone() }) && node.relays(&next), "the last words too");
    }
}

#[test]
fn what_another_node_passes_on_is_answered_from_here() {
    let mut node = Node::new("packets-relay-answer");
    node.serve(FAMILIES.map(|f| f.pod));
    for (f, [far, other, _]) in FAMILIES.into_iter().zip(OTHERS) {
        for (sport, proto) in [(43_000, TCP), (43_001, UDP)] {
            for (to, sport) in [(other, sport), (f.empty, sport + 100)] {
                let sent = call(f, to, sport, proto);
                assert_eq!(node.translates(&sent), (ip(f.caller), ip(f.pod)));
                let answer =
                    Frame { src: ip(f.pod), dst: ip(f.caller), sport: 8080, dport: sport, proto, ..Frame::default() };
                let seen = node.lab.run("from_pod", &answer.bytes()).packet;
                let seen = read(&seen).expect("whole");
                assert_eq!((seen.src, seen.sport, seen.dst), (ip(to), sent.dport, ip(f.caller)));
            }
        }
        // Nodes that do not agree yet: the second translates, so that no packet goes round.
        node.serve(OTHERS.map(|o| o[0]));
        assert_eq!(node.translates(&call(f, other, 43_010, TCP)), (ip(f.node), ip(far)));
        node.serve(FAMILIES.map(|f| f.pod));
        node.lab.settings.set_flags(DSR, 0).expect("settings");
        assert_eq!(
            node.translates(&call(f, other, 43_011, TCP)),
            (ip(f.caller), ip(f.pod)),
            "from the first that relays"
        );
        node.lab.settings.set_flags(DSR, DSR).expect("settings");
        let elsewhere = Frame { dport: 22, ..call(f, other, 43_012, TCP) };
        assert_eq!(node.run("from_wire", &elsewhere), (Verdict::Next, elsewhere.bytes()));
    }
}

#[test]
fn errors_about_answers_follow_the_connection() {
    let mut node = Node::new("packets-relay-icmp");
    node.serve(OTHERS.map(|o| o[0]));
    for f in FAMILIES {
        for (sport, proto) in [(44_000, TCP), (44_001, UDP)] {
            assert!(node.relays(&call(f, f.vip, sport, proto)));
            // As the backend's node sends it to the caller, past this one.
            let answer =
                Frame { src: ip(f.vip), dst: ip(f.caller), sport: PORT, dport: sport, proto, ..Frame::default() };
            let mut error = frames::icmp_error(ip(f.router), ip(f.vip), &answer.bytes()[14..]);
            error[..6].copy_from_slice(&WIRE);
            let out = node.lab.run_at("from_wire", node.link, &error);
            assert_eq!(out.verdict, Verdict::Redirect);
            let (outer, quoted) = frames::read_icmp_error(&out.packet).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(outer, (ip(f.router), ip(f.vip)));
            assert_eq!((quoted.src, quoted.sport, quoted.dst, quoted.dport), (ip(f.vip), PORT, ip(f.caller), sport));
        }
    }
}

#[test]
fn xdp_relays_as_well() {
    let mut node = Node::new("packets-relay-xdp");
    if !node.lab.programs().any(|p| p == XDP) {
        println!("before Linux 5.18 there is no program for XDP");
        return;
    }
    node.serve(OTHERS.map(|o| o[0]));
    for f in FAMILIES {
        for (sport, proto) in [(45_000, TCP), (45_001, UDP)] {
            let first = call(f, f.vip, sport, proto);
            assert!(node.relays(&first));
            let next = Frame { flags: ACK, ..first };
            // Each CPU lets one packet a second pass, to learn the way.
            let mut sent = (0..64).map(|_| node.run(XDP, &next)).filter(|(verdict, _)| *verdict == Verdict::Redirect);
            let (_, packet) = sent.next().expect("sent within 64 packets");
            assert_eq!(packet[..12], [[2, 0, 0, 0, 0, 8], [2, 0, 0, 0, 0, 9]].concat());
            assert_eq!(packet[12..], Frame { hops: 2, ..next }.bytes()[12..]);
        }
    }
}
