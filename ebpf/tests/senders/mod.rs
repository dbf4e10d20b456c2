//! Who a pod may say it is, whatever it sends.

use crate::{
    FAMILIES, Family,
    frames::{self, Frame},
    ip, lab,
    lab::Lab,
    request,
};
use sluice_ebpf::{
    addr,
    common::{PodAddr, Reason, UDP},
    dry_run::Verdict,
};

/// Of each family: a link-local address, the node's resolver or gateway under one, and two groups.
const LINK: [[&str; 4]; 2] = [
    ["169.254.7.7", "169.254.1.1", "224.0.0.22", "255.255.255.255"],
    ["fe80::7", "fe80::1", "ff02::16", "ff02::1:ff00:5"],
];
const NONE: [&str; 2] = ["0.0.0.0", "::"];

/// A node whose second pod is on another link than the one that packets come by here.
fn two_links(name: &str) -> Lab {
    let lab = lab(name);
    for f in FAMILIES {
        let elsewhere = PodAddr { netns: 8, flags: 0, ifindex: 9 };
        lab.pods.addrs.set(&addr(ip(f.second)), &elsewhere).expect("a pod on another link");
    }
    lab
}

/// The verdict on what comes from a pod; whether it counts as spoofed.
fn judged(lab: &Lab, bytes: &[u8]) -> (Verdict, bool) {
    let before = lab.counter(Reason::DroppedSpoofed);
    let out = lab.run("from_pod", bytes);
    let spoofed = lab.counter(Reason::DroppedSpoofed) > before;
    assert_eq!(spoofed, out.verdict == Verdict::Drop, "{bytes:02x?}");
    assert!(out.verdict != Verdict::Next || out.packet == bytes, "changed and left to the stack");
    (out.verdict, spoofed)
}

fn from(f: Family, src: &str, dst: &str) -> Frame {
    Frame { src: ip(src), dst: ip(dst), ..request(f, UDP) }
}

#[test]
fn a_pod_sends_under_its_own_address() {
    let lab = two_links("packets-spoof");
    for f in FAMILIES {
        for (src, passes) in [(f.pod, true), (f.second, false), (f.caller, false), (f.node, false), (f.vip, false)] {
            for dst in [f.pod, f.second, f.vip, f.node, f.caller] {
                let (verdict, spoofed) = judged(&lab, &from(f, src, dst).bytes());
                assert_eq!(!spoofed, passes, "{src} to {dst}: {verdict:?}");
            }
        }
    }
}

/// A link-local address is nobody's in particular, and the node's resolver has one: under it, only the node is reached, and no
/// service and no pod.
#[test]
fn a_link_local_source_stays_on_the_link() {
    let lab = two_links("packets-spoof-link");
    for ((f, [own, gateway, group, solicited]), none) in FAMILIES.into_iter().zip(LINK).zip(NONE) {
        for src in [own, gateway] {
            for dst in [gateway, group, solicited, f.node] {
                assert_eq!(judged(&lab, &from(f, src, dst).bytes()), (Verdict::Next, false), "{src} to {dst}");
            }
            for dst in [f.pod, f.second, f.vip, f.caller] {
                let answer = Frame { sport: 53, ..from(f, src, dst) };
                assert_eq!(judged(&lab, &answer.bytes()), (Verdict::Drop, true), "{src} to {dst}");
            }
            let node_port = Frame { dport: 30_080, ..from(f, src, f.node) };
            assert_eq!(judged(&lab, &node_port.bytes()), (Verdict::Next, false), "no service is for it");
        }
        // Who has no address yet asks whether another has it, or for one.
        for dst in [group, solicited] {
            assert_eq!(judged(&lab, &from(f, none, dst).bytes()), (Verdict::Next, false), "to {dst}");
        }
        for dst in [gateway, f.node, f.second] {
            assert_eq!(judged(&lab, &from(f, none, dst).bytes()), (Verdict::Drop, true), "to {dst}");
        }
        // A group is no way past the check.
        assert_eq!(judged(&lab, &from(f, f.second, group).bytes()), (Verdict::Drop, true));
        assert_eq!(judged(&lab, &from(f, f.pod, group).bytes()), (Verdict::Next, false));
    }
}

/// What is not translated is not less of a lie.
#[test]
fn a_source_is_checked_whatever_the_protocol() {
    const SCTP: u8 = 132;
    const ESP: u8 = 50;
    const GRE: u8 = 47;
    const AH: u8 = 51;
    let lab = two_links("packets-spoof-protocols");
    for f in FAMILIES {
        let (icmp, timestamp) = if f.pod.contains('.') { (1, 13) } else { (58, 128 + 16) };
        for (src, passes) in [(f.pod, true), (f.second, false), (f.caller, false)] {
            let mut all: Vec<Vec<u8>> = [SCTP, ESP, GRE, AH]
                .map(|proto| frames::other(&Frame { proto, ..from(f, src, f.second) }, &[0; 40]))
                .to_vec();
            all.push(frames::other(
                &Frame { proto: icmp, ..from(f, src, f.second) },
                &[timestamp, 0, 0, 0, 0, 0, 0, 0],
            ));
            // A later fragment of one.
            all.push(Frame { proto: SCTP, payload: vec![1; 64], ..from(f, src, f.second) }.fragment(4, 1, 9));
            if f.pod.contains(':') {
                // TCP behind more headers than are looked through.
                let mut body = vec![];
                for n in 0..6 {
                    body.extend([if n == 5 { 6 } else { 60 }, 0, 1, 4, 0, 0, 0, 0]);
                }
                body.extend([0; 20]);
                all.push(frames::other(&Frame { proto: 60, ..from(f, src, f.second) }, &body));
            }
            for bytes in all {
                let want = if passes { (Verdict::Next, false) } else { (Verdict::Drop, true) };
                assert_eq!(judged(&lab, &bytes), want, "{src}: {bytes:02x?}");
            }
        }
    }
}
