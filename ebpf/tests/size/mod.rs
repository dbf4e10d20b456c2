//! Packets that are larger than their way on.

use crate::{
    FAMILIES, Family, WIRE,
    frames::{self, Frame, read},
    ip,
    lab::Lab,
    request, wire,
};
use sluice_ebpf::{
    addr,
    common::{Addr, DEVICE_TUNNEL, Device, INSIDE, MASQUERADE, PodAddr, Reason, ServiceKey, TCP, UDP},
    dry_run::Verdict,
    layout::{Target, Wanted, WantedGroup},
};
use std::process::Command;

const MTU: u32 = 1_400;
const FAR: [&str; 2] = ["10.244.2.9", "fd00:2::9"];

pub struct Node {
    pub lab: Lab,
    pub link: u32,
}

impl Node {
    /// Its link takes [`MTU`]; behind it are the backends of its service, and the rest of the world.
    pub fn new(name: &str) -> Self {
        let link = wire();
        let mtu = ["link", "set", "w0", "mtu", &MTU.to_string()];
        assert!(Command::new("ip").args(mtu).status().expect("ip").success());
        let mut node = Self { lab: Lab::new(name), link };
        node.tunnel(false);
        let mut services = vec![];
        for (f, far) in FAMILIES.into_iter().zip(FAR) {
            node.lab.pods.addrs.set(&addr(ip(f.pod)), &PodAddr { netns: 7, flags: 0, ifindex: link }).expect("pod");
            let target = Target { addr: addr(ip(far)), port_be: 8080_u16.to_be() };
            let wanted = Wanted::new(false, vec![WantedGroup { weight: 1, targets: vec![target] }]);
            let key = |proto| ServiceKey { addr: addr(ip(f.vip)), port_be: 80_u16.to_be(), proto, scope: INSIDE };
            services.extend([TCP, UDP].map(|proto| (key(proto), wanted.clone())));
        }
        node.lab.serve(services);
        node.lab.settings.set_flags(MASQUERADE, MASQUERADE).expect("settings");
        node
    }

    fn tunnel(&self, tunnel: bool) {
        let [addr4, addr6]: [Addr; 2] = FAMILIES.map(|f| addr(ip(f.node)));
        let flags = if tunnel { DEVICE_TUNNEL } else { 0 };
        self.lab.node.devices.set(&self.link, &Device { addr4, addr6, mac: WIRE, flags }).expect("device");
    }

    fn run(&self, program: &str, bytes: &[u8]) -> (Verdict, Vec<u8>) {
        let out = self.lab.run_at(program, self.link, bytes);
        (out.verdict, out.packet)
    }
}

/// Too large by a hundred bytes.
pub fn large(f: Family, proto: u8) -> Frame {
    Frame { mac: WIRE, payload: vec![7; MTU as usize + 100], ..request(f, proto) }
}

pub fn reported(node: &Node, program: &str, sent: &Frame) {
    let before = node.lab.counter(Reason::DroppedTooBig);
    let (verdict, packet) = node.run(program, &sent.bytes());
    assert_eq!(verdict, Verdict::Redirect, "back to the sender");
    let (outer, quoted) = frames::read_icmp_error(&packet).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(outer, (sent.dst, sent.src));
    assert_eq!((quoted.src, quoted.sport, quoted.dst, quoted.dport), (sent.src, sent.sport, sent.dst, sent.dport));
    // RFC 1191 §4, RFC 4443 §3.2.
    let want = if sent.src.is_ipv4() { (3, 4, MTU) } else { (2, 0, MTU) };
    assert_eq!(frames::icmp_kind(&packet), Some(want));
    assert_eq!(packet[..6], frames::SENDER);
    assert_eq!(node.lab.counter(Reason::DroppedTooBig), before + 1);
}

#[test]
fn who_may_not_be_divided_is_told_what_passes() {
    let node = Node::new("packets-too-big");
    for f in FAMILIES {
        for proto in [TCP, UDP] {
            // Services, and what pods send to the outside.
            let call = Frame { whole: true, ..large(f, proto) };
            reported(&node, "from_wire", &call);
            reported(&node, "from_pod", &Frame { src: ip(f.pod), dst: ip(f.caller), ..call.clone() });
            // The link's own headers count, and four bytes for a VLAN's: the kernel asks so.
            let fits = Frame { payload: vec![7; MTU as usize - 100], sport: 40_001, ..call };
            assert_eq!(node.run("from_wire", &fits.bytes()).0, Verdict::Redirect);
        }
    }
}

/// The stack divides it; what it sends is translated on the way out, all parts of it.
#[test]
fn who_may_be_divided_is_left_to_the_stack() {
    let node = Node::new("packets-divided");
    let f = FAMILIES[0];
    for (program, src, dst, to) in [("from_wire", f.caller, f.vip, FAR[0]), ("from_pod", f.pod, f.caller, f.caller)] {
        let sent = Frame { src: ip(src), dst: ip(dst), sport: 41_000, ..large(f, UDP) };
        let (verdict, packet) = node.run(program, &sent.bytes());
        assert_eq!(verdict, Verdict::Next);
        let seen = read(&packet).expect("whole");
        assert_eq!((seen.src, seen.dst, seen.sport), (ip(src), ip(to), 41_000), "the stack takes no source of its own");
        assert_eq!(packet[22], 64, "the stack counts the hop");
        let left = Frame { dst: seen.dst, dport: seen.dport, ..sent.clone() };
        for part in [left.fragment(0, 1, 77), left.fragment(2, 1, 77), left.fragment(4, 0, 77)] {
            let (verdict, packet) = node.run("from_host", &part);
            assert_eq!((verdict, frames::addresses(&packet)), (Verdict::Next, (ip(f.node), ip(to))));
        }
        // The answer to it is told as any other.
        let (_, first) = node.run("from_host", &left.fragment(0, 1, 78));
        let port = u16::from_be_bytes([first[34], first[35]]);
        let answer = Frame { src: ip(to), dst: ip(f.node), sport: seen.dport, dport: port, payload: vec![1], ..sent };
        let seen = read(&node.run("from_wire", &answer.bytes()).1).expect("whole");
        assert_eq!((seen.src, seen.sport, seen.dst, seen.dport), (ip(dst), 80, ip(src), 41_000));
    }
    assert_eq!(node.lab.counter(Reason::DroppedTooBig), 0);
}

/// A tunnel's own packets are divided instead, past the node's firewall.
#[test]
fn who_may_be_divided_goes_through_a_tunnel() {
    let node = Node::new("packets-tunnelled");
    node.tunnel(true);
    for (f, far) in FAMILIES.into_iter().zip(FAR) {
        let sent = Frame { sport: 42_000, ..large(f, UDP) };
        if f.vip.contains(':') {
            reported(&node, "from_wire", &sent);
            continue;
        }
        let (verdict, packet) = node.run("from_wire", &sent.bytes());
        assert_eq!((verdict, frames::addresses(&packet)), (Verdict::Redirect, (ip(f.node), ip(far))));
        reported(&node, "from_wire", &Frame { whole: true, ..sent.clone() });
        // A fragment may be too large as well.
        let parts = Frame { sport: 42_001, payload: vec![7; 40], ..sent };
        node.run("from_wire", &parts.fragment(0, 1, 79));
        let later = Frame { payload: vec![7; MTU as usize + 100], ..parts }.fragment(2, 0, 79);
        let (verdict, packet) = node.run("from_wire", &later);
        assert_eq!((verdict, frames::addresses(&packet)), (Verdict::Redirect, (ip(f.node), ip(far))));
    }
}

/// An echo that is too large for one packet keeps its address on the way out in all parts.
#[test]
fn all_parts_of_an_echo_are_masqueraded() {
    let node = Node::new("packets-echo");
    for f in FAMILIES {
        let from = Frame { src: ip(f.pod), dst: ip(f.caller), mac: WIRE, ..Frame::default() };
        let (whole, [first, later]) = frames::echo(&from, true, 700, 64);
        let (verdict, packet) = node.run("from_pod", &whole);
        assert_eq!(verdict, Verdict::Redirect);
        let id = frames::read_echo(&packet).expect("an echo");
        for part in [first, later] {
            let (verdict, packet) = node.run("from_pod", &part);
            assert_eq!((verdict, frames::addresses(&packet)), (Verdict::Redirect, (ip(f.node), ip(f.caller))));
        }
        let back = Frame { src: ip(f.caller), dst: ip(f.node), ..from };
        let (whole, parts) = frames::echo(&back, false, id, 64);
        let (verdict, packet) = node.run("from_wire", &whole);
        assert_eq!((verdict, frames::read_echo(&packet)), (Verdict::Redirect, Ok(700)));
        for part in parts {
            let (verdict, packet) = node.run("from_wire", &part);
            assert_eq!((verdict, frames::addresses(&packet)), (Verdict::Redirect, (ip(f.caller), ip(f.pod))));
        }
    }
}
