//! The packet programs, run by the kernel on packets of all kinds: what they become, byte by byte, with every checksum.
//! Needs root; a BPF file system and a cgroup of its own.

mod connections;
mod frames;
mod ground;
mod kernel;
mod lab;
mod limits;
mod ours;
mod relayed;
mod senders;
mod size;
mod steer;

use frames::{Frame, Read, read};
use lab::Lab;
use sluice_ebpf::{
    addr,
    common::{
        Addr, Device, INSIDE, MASQUERADE, OUTSIDE, PodAddr, Range, Reason, Reverse, ServiceKey, TCP, UDP, WATCH_DROPS,
    },
    dry_run::{Outcome, Verdict},
    layout::{Sources, Target, Wanted, WantedGroup},
    loader::XDP,
};
use sluice_netlink::ns::{Unshare, unshare};
use std::{
    net::{IpAddr, Ipv4Addr, UdpSocket},
    process::Command,
    sync::Arc,
};

fn ip(text: &str) -> IpAddr {
    text.parse().expect(text)
}

const FAMILIES: [Family; 2] = [
    Family {
        caller: "198.51.100.7",
        vip: "10.96.0.1",
        empty: "10.96.0.2",
        pod: "10.244.1.5",
        second: "10.244.1.6",
        node: "192.0.2.1",
        router: "198.51.100.254",
    },
    Family {
        caller: "2001:db8:7::7",
        vip: "fd00:96::1",
        empty: "fd00:96::2",
        pod: "fd00:1::5",
        second: "fd00:1::6",
        node: "2001:db8:1::1",
        router: "2001:db8:7::ff",
    },
];

#[derive(Clone, Copy)]
struct Family {
    caller: &'static str,
    vip: &'static str,
    empty: &'static str,
    pod: &'static str,
    second: &'static str,
    node: &'static str,
    router: &'static str,
}

/// A node with two pods, a service on port 80 whose only backend is the first, and one without.
fn lab(name: &str) -> Lab {
    let mut lab = Lab::new(name);
    let mut services = vec![];
    for f in FAMILIES {
        for pod in [f.pod, f.second] {
            let entry = PodAddr { netns: 7, flags: 0, ifindex: 1 };
            lab.pods.addrs.set(&addr(ip(pod)), &entry).expect("pod");
        }
        lab.node.locals.set(&addr(ip(f.node)), &1).expect("local");
        for proto in [TCP, UDP] {
            let key =
                |address: Addr, port: u16| ServiceKey { addr: address, port_be: port.to_be(), proto, scope: INSIDE };
            let target = Target { addr: addr(ip(f.pod)), port_be: 8080_u16.to_be() };
            let wanted = Wanted::new(false, vec![WantedGroup { weight: 1, targets: vec![target] }]);
            services.push((key(addr(ip(f.vip)), 80), wanted.clone()));
            services.push((key(addr(ip(f.vip)).unspecified(), 30_080), wanted.by_maglev()));
            services.push((key(addr(ip(f.empty)), 80), Wanted::default()));
        }
    }
    lab.serve(services);
    lab
}

fn request(f: Family, proto: u8) -> Frame {
    Frame { src: ip(f.caller), dst: ip(f.vip), sport: 40_000, dport: 80, proto, ..Frame::default() }
}

/// The packet there, and its answer back, as the two ends see them.
fn there_and_back(lab: &Lab, sent: &Frame, program: &str) {
    let before = sent.bytes();
    let there = lab.run(program, &before);
    assert_eq!(there.verdict, Verdict::Redirect, "{sent:?}");
    let seen = read(&there.packet).unwrap_or_else(|e| panic!("{e}: {sent:?}"));
    let pod = if sent.dst.is_ipv4() { FAMILIES[0].pod } else { FAMILIES[1].pod };
    assert_eq!((seen.dst, seen.dport), (ip(pod), 8080), "{sent:?}");
    assert_eq!((seen.src, seen.sport), (sent.src, sent.sport), "the source is kept");
    assert_eq!(seen.payload, read(&before).expect("whole").payload);
    assert_eq!(there.packet.len(), before.len());
    let answer = Frame {
        src: seen.dst,
        dst: seen.src,
        sport: seen.dport,
        dport: seen.sport,
        proto: sent.proto,
        ..Frame::default()
    };
    let back = lab.run("from_pod", &answer.bytes());
    let seen = read(&back.packet).expect("whole");
    assert_eq!((seen.src, seen.sport, seen.dst, seen.dport), (sent.dst, sent.dport, sent.src, sent.sport));
}

#[test]
fn connections_are_translated_both_ways() {
    let lab = lab("packets-ways");
    for (number, f) in (0..).zip(FAMILIES) {
        for (program, port) in [("from_wire", 40_000), ("from_pod", 41_000)] {
            for proto in [TCP, UDP] {
                let caller = if program == "from_pod" { f.second } else { f.caller };
                let plain = Frame { src: ip(caller), sport: port + number, ..request(f, proto) };
                there_and_back(&lab, &plain, program);
                for options in [1, 5, 10] {
                    // IPv4: words of options; IPv6: extension headers of so many times eight bytes.
                    let frame = Frame { options, sport: port + 100 + options as u16, ..plain.clone() };
                    there_and_back(&lab, &frame, program);
                }
                for payload in [0, 1, 2, 3, 100, 1400] {
                    let frame =
                        Frame { payload: vec![0xa5; payload], sport: port + 200 + payload as u16, ..plain.clone() };
                    there_and_back(&lab, &frame, program);
                }
            }
        }
        let no_checksum = Frame { checksum: !f.vip.contains('.'), sport: 45_000, ..request(f, UDP) };
        there_and_back(&lab, &no_checksum, "from_wire");
        let node_port = Frame { dst: ip(f.node), dport: 30_080, sport: 46_000, ..request(f, TCP) };
        there_and_back(&lab, &node_port, "from_wire");
        let elsewhere = Frame { dst: ip(f.node), dport: 22, ..request(f, TCP) };
        let out = lab.run("from_wire", &elsewhere.bytes());
        assert_eq!((out.verdict, out.packet), (Verdict::Next, elsewhere.bytes()), "the node's own");
    }
}

#[test]
fn a_host_port_leads_to_its_pod() {
    let lab = lab("packets-hostport");
    for f in FAMILIES {
        let unspecified = addr(ip(f.node)).unspecified();
        for (address, port) in [(unspecified, 8443_u16), (addr(ip(f.node)), 9443)] {
            let key = ServiceKey { addr: address, port_be: port.to_be(), proto: TCP, scope: INSIDE };
            let to = Reverse { addr: addr(ip(f.pod)), port_be: 8080_u16.to_be(), pad: 0 };
            lab.pods.host_ports.set(&key, &to).expect("host port");
            let frame = Frame { dst: ip(f.node), dport: port, sport: 38_557 + port, ..request(f, TCP) };
            there_and_back(&lab, &frame, "from_wire");
        }
        let udp = Frame { dst: ip(f.node), dport: 8443, ..request(f, UDP) };
        assert_eq!(lab.run("from_wire", &udp.bytes()).verdict, Verdict::Next, "another protocol");
    }
}

/// Two connections of one caller whose answers would look alike: the second goes on under another port.
#[test]
fn answers_are_told_apart() {
    let lab = lab("packets-apart");
    for f in FAMILIES {
        let first = Frame { sport: 50_000, ..request(f, TCP) };
        let second = Frame { dst: ip(f.node), dport: 30_080, ..first.clone() };
        let ports = [&first, &second].map(|frame| {
            let out = lab.run("from_wire", &frame.bytes());
            let seen = read(&out.packet).expect("whole");
            assert_eq!((seen.src, seen.dst, seen.dport), (ip(f.caller), ip(f.pod), 8080));
            seen.sport
        });
        assert_eq!(ports[0], 50_000);
        assert!(sluice_ebpf::common::SNAT_PORTS.contains(&ports[1]), "{ports:?}");
        for (frame, port) in [first, second].iter().zip(ports) {
            let answer =
                Frame { src: ip(f.pod), dst: ip(f.caller), sport: 8080, dport: port, proto: TCP, ..Frame::default() };
            let seen = read(&lab.run("from_pod", &answer.bytes()).packet).expect("whole");
            assert_eq!((seen.src, seen.sport, seen.dport), (frame.dst, frame.dport, 50_000));
        }
    }
}

#[test]
fn a_pod_that_is_its_own_backend_answers_its_gateway() {
    let lab = lab("packets-hairpin");
    for (f, gateway) in FAMILIES.into_iter().zip(["169.254.1.1", "fe80::1"]) {
        let frame = Frame { src: ip(f.pod), ..request(f, TCP) };
        let out = lab.run("from_pod", &frame.bytes());
        let seen = read(&out.packet).expect("whole");
        assert_eq!((out.verdict, seen.src, seen.dst), (Verdict::Redirect, ip(gateway), ip(f.pod)));
        let answer =
            Frame { src: seen.dst, dst: seen.src, sport: 8080, dport: seen.sport, proto: TCP, ..Frame::default() };
        let back = lab.run("from_pod", &answer.bytes());
        let seen = read(&back.packet).expect("whole");
        assert_eq!((back.verdict, seen.src, seen.sport), (Verdict::Redirect, ip(f.vip), 80));
        assert_eq!((seen.dst, seen.dport), (ip(f.pod), 40_000));
    }
}

#[test]
fn fragments_follow_their_first() {
    let lab = lab("packets-fragments");
    for f in FAMILIES {
        let whole = Frame { payload: vec![1; 64], ..request(f, UDP) };
        let first = lab.run("from_wire", &whole.fragment(0, 1, 600));
        let later = lab.run("from_wire", &whole.fragment(8, 0, 600));
        for out in [&first, &later] {
            assert_eq!(out.verdict, Verdict::Redirect);
            assert_eq!(frames::addresses(&out.packet), (ip(f.caller), ip(f.pod)));
        }
        let tail = |p: &[u8]| p[p.len() - 8..].to_vec();
        assert_eq!(tail(&later.packet), tail(&whole.fragment(8, 0, 600)), "no port is written into data");
    }
}

/// A later fragment ahead of its first, whose ports are not known yet.
#[test]
fn a_fragment_ahead_of_its_first_is_whose_it_may_be() {
    let lab = lab("packets-orphans");
    lab.settings.set_flags(MASQUERADE, MASQUERADE).expect("settings");
    for f in FAMILIES {
        let len = if f.pod.contains('.') { 96 + 24 } else { 64 };
        lab.node.cluster.set(&Range { len, addr: addr(ip(f.pod)) }, &1).expect("range");
        lab.node.announced.set(&addr(ip(f.empty)), &1).expect("announced");
        let part = |src: &str, dst: &str, proto: u8| {
            Frame { src: ip(src), dst: ip(dst), proto, payload: vec![1; 64], ..request(f, UDP) }.fragment(8, 1, 500)
        };
        let icmp = if f.pod.contains('.') { 1 } else { 58 };
        for proto in [UDP, TCP, icmp] {
            // The node's stack waits for the first one; it drops what nobody sends it.
            for dst in [f.node, f.vip, f.router] {
                let sent = part(f.caller, dst, proto);
                let out = lab.run("from_wire", &sent);
                assert_eq!((out.verdict, out.packet), (Verdict::Next, sent), "to {dst}");
            }
            for (program, src) in [("from_wire", f.caller), ("from_pod", f.second)] {
                let sent = part(src, f.pod, proto);
                let out = lab.run(program, &sent);
                assert_eq!((out.verdict, out.packet), (Verdict::Redirect, sent), "{program} to a pod");
            }
            let dropped = lab.counter(Reason::DroppedFragment);
            assert_eq!(lab.run("from_wire", &part(f.caller, f.empty, proto)).verdict, Verdict::Drop, "announced");
            assert_eq!(lab.run("from_pod", &part(f.pod, f.caller, proto)).verdict, Verdict::Drop, "to be masqueraded");
            assert_eq!(lab.counter(Reason::DroppedFragment), dropped + 2);
        }
    }
}

/// Cut anywhere, a packet is dropped and counted, or goes on as it was.
#[test]
fn truncated_at_every_byte() {
    let lab = lab("packets-truncated");
    for f in FAMILIES {
        for proto in [TCP, UDP] {
            for options in [0, 3] {
                let frame = Frame { options, sport: 51_000 + options as u16, ..request(f, proto) };
                let bytes = frame.bytes();
                let headers = bytes.len() - frame.payload.len();
                for length in 15..headers {
                    // The kernel itself may refuse to make a packet of it.
                    let Some(out) = lab.try_run("from_wire", &bytes[..length]) else { continue };
                    let whole_but_checksum = proto == UDP && length >= headers;
                    assert!(
                        whole_but_checksum || out.verdict == Verdict::Drop || out.packet == bytes[..length],
                        "{length} of {headers} bytes: {:?}",
                        out.verdict
                    );
                }
            }
        }
    }
    assert!(lab.counter(Reason::DroppedMalformed) > 100);
}

/// Quantiles of the χ² distribution for 1, 2 and 3 degrees of freedom that chance passes once in a thousand times
/// (NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.4). Nothing here is left to chance: equal packets choose
/// equally, so that a pass stays a pass.
const CRITICAL: [f64; 3] = [10.828, 13.816, 16.266];

#[test]
fn connections_are_spread_by_weight() {
    const CONNECTIONS: u32 = 100_000;
    let mut lab = Lab::new("packets-spread");
    let backend = |n: usize| addr(ip(&format!("10.244.1.{}", n + 10)));
    for n in 0..4 {
        lab.pods.addrs.set(&backend(n), &PodAddr { netns: 7, flags: 0, ifindex: 1 }).expect("pod");
    }
    for (round, weights) in (0..).zip([&[1, 1, 1, 1][..], &[90, 10], &[1, 2, 3]]) {
        for maglev in [true, false] {
            let target = |n| Target { addr: backend(n), port_be: 8080_u16.to_be() };
            let group = |(n, weight): (usize, &u32)| WantedGroup { weight: *weight, targets: vec![target(n)] };
            let wanted = Wanted::new(false, weights.iter().enumerate().map(group).collect());
            let wanted = if maglev { wanted.by_maglev() } else { wanted };
            let key = ServiceKey { addr: addr(ip("10.96.0.9")), port_be: 80_u16.to_be(), proto: UDP, scope: INSIDE };
            lab.serve(vec![(key, wanted)]);
            let mut seen = vec![0_u32; weights.len()];
            for n in 0..CONNECTIONS {
                // Many callers with some connections each, as a load balancer meets them.
                let src = Ipv4Addr::from(0xc633_0000 + n / 100 + 0x1000 * (2 * round + u32::from(maglev)));
                let sport = 32_768 + (n % 100) as u16;
                let frame =
                    Frame { src: src.into(), dst: ip("10.96.0.9"), sport, dport: 80, proto: UDP, ..Frame::default() };
                let (_, to) = frames::addresses(&lab.run("from_wire", &frame.bytes()).packet);
                let chosen = (0..weights.len()).find(|n| addr(to) == backend(*n));
                seen[chosen.unwrap_or_else(|| panic!("{to} is no backend"))] += 1;
            }
            let sum = f64::from(weights.iter().sum::<u32>());
            let part = |(seen, weight): (&u32, &u32)| {
                let expected = f64::from(CONNECTIONS) * f64::from(*weight) / sum;
                (f64::from(*seen) - expected).powi(2) / expected
            };
            let chi: f64 = seen.iter().zip(weights).map(part).sum();
            let critical = CRITICAL[weights.len() - 2];
            println!("weights {weights:?}, Maglev {maglev}: {seen:?}, χ² {chi:.2} of {critical}");
            assert!(chi < critical, "weights {weights:?}, Maglev {maglev}: {seen:?}, χ² {chi:.2}");
        }
    }
}

/// Errors from the backend and from a router on the way, about packets as they were translated.
#[test]
fn icmp_errors_come_back_translated() {
    let lab = lab("packets-icmp");
    for f in FAMILIES {
        for proto in [TCP, UDP] {
            let sent = Frame { payload: vec![7; 32], ..request(f, proto) };
            let there = lab.run("from_wire", &sent.bytes());
            for (program, from, shown) in [("from_pod", f.pod, f.vip), ("from_wire", f.router, f.router)] {
                let error = frames::icmp_error(ip(from), ip(f.caller), &there.packet[14..]);
                let out = lab.run(program, &error);
                let (outer, quoted) = frames::read_icmp_error(&out.packet).unwrap_or_else(|e| panic!("{e}"));
                assert_eq!(outer, (ip(shown), ip(f.caller)));
                let wanted =
                    Read { src: sent.src, dst: sent.dst, sport: sent.sport, dport: sent.dport, payload: vec![] };
                assert_eq!(quoted, wanted, "the caller sees its own words");
            }
            // Cut anywhere: as it was, or translated; never half.
            let error = frames::icmp_error(ip(f.pod), ip(f.caller), &there.packet[14..]);
            for length in 15..error.len() {
                lab.try_run("from_pod", &error[..length]);
            }
            let unknown =
                frames::icmp_error(ip(f.pod), ip(f.caller), &Frame { dst: ip(f.second), ..sent }.bytes()[14..]);
            let out = lab.run("from_pod", &unknown);
            assert!(out.verdict == Verdict::Next || out.verdict == Verdict::Redirect);
            assert_eq!(frames::addresses(&out.packet), (ip(f.pod), ip(f.caller)), "about nothing of ours");
        }
    }
    assert!(lab.counter(Reason::IcmpTranslated) >= 8);
}

#[test]
fn a_service_without_backends_refuses() {
    let lab = lab("packets-nobody");
    for f in FAMILIES {
        for proto in [TCP, UDP] {
            let sent = Frame { dst: ip(f.empty), payload: vec![3; 40], ..request(f, proto) };
            for (program, caller) in [("from_wire", f.caller), ("from_pod", f.pod)] {
                let sent = Frame { src: ip(caller), ..sent.clone() };
                let out = lab.run(program, &sent.bytes());
                assert_eq!(out.verdict, Verdict::Redirect, "back to the caller");
                let (outer, quoted) = frames::read_icmp_error(&out.packet).unwrap_or_else(|e| panic!("{e}"));
                assert_eq!(outer, (ip(f.empty), ip(caller)));
                assert_eq!((quoted.src, quoted.sport, quoted.dst, quoted.dport), (sent.src, 40_000, sent.dst, 80));
                assert_eq!(&out.packet[..6], &sent.bytes()[6..12], "to the link-layer address that it came from");
            }
        }
    }
    assert_eq!(lab.counter(Reason::DroppedNoBackend), 8);
}

#[test]
fn announced_addresses_are_answered_for() {
    let lab = lab("packets-announced");
    let mac = [2, 0, 0, 0, 0, 9];
    lab.node.devices.set(&1, &Device { addr4: Addr::UNSET, addr6: Addr::UNSET, mac, flags: 0 }).expect("device");
    for (address, other) in [("192.0.2.100", "192.0.2.101"), ("2001:db8:1::100", "2001:db8:1::101")] {
        lab.node.announced.set(&addr(ip(address)), &1).expect("announced");
        let caller = if address.contains(':') { ip("2001:db8:1::7") } else { ip("192.0.2.7") };
        let out = lab.run("from_wire", &frames::solicitation(caller, ip(address)));
        assert_eq!(out.verdict, Verdict::Redirect);
        assert_eq!(frames::read_advertisement(&out.packet), Ok((ip(address), mac, caller)));
        let question = frames::solicitation(caller, ip(other));
        let out = lab.run("from_wire", &question);
        assert_eq!((out.verdict, out.packet), (Verdict::Next, question.clone()), "another's");
        for length in 15..question.len() {
            let cut = &frames::solicitation(caller, ip(address))[..length];
            if let Some(out) = lab.try_run("from_wire", cut) {
                assert!(out.verdict == Verdict::Drop || out.packet == cut, "{length}");
            }
        }
    }
}

/// What pods send to the outside is not sent without a route; what is the cluster's stays as it is.
#[test]
fn the_clusters_own_is_never_masqueraded() {
    let lab = lab("packets-masquerade");
    lab.settings.set_flags(MASQUERADE | WATCH_DROPS, MASQUERADE).expect("settings");
    for f in FAMILIES {
        let len = if f.pod.contains('.') { 96 + 24 } else { 64 };
        lab.node.cluster.set(&Range { len, addr: addr(ip(f.pod)) }, &1).expect("range");
        for dst in [f.second, f.node] {
            let frame = Frame { src: ip(f.pod), dst: ip(dst), dport: 5432, ..request(f, TCP) };
            let out = lab.run("from_pod", &frame.bytes());
            assert_eq!(out.packet, frame.bytes(), "to {dst}");
        }
    }
    assert_eq!(lab.counter(Reason::Masqueraded), 0);
}

/// New connections are judged by their source; what is known goes on, and who is no such service's client is not asked.
#[test]
fn a_restricted_service_is_for_its_source_ranges_alone() {
    let mut lab = Lab::new("packets-sources");
    let ranges = |f: Family, outsider: &str| {
        let range = |text: &str, len: u32| Range { len, addr: addr(ip(text)) };
        // Two of the family, one of them a single address; the caller in none of them is next to it.
        let wide = if f.caller.contains('.') { range("203.0.113.0", 96 + 24) } else { range("2001:db8:113::", 48) };
        let mut all = vec![wide, range(outsider, 128)];
        all.sort_unstable();
        Some(Arc::new(Sources { ranges: all, node: false }))
    };
    let key = |f: Family, port: u16, scope: u8, proto: u8| ServiceKey {
        addr: addr(ip(f.vip)),
        port_be: port.to_be(),
        proto,
        scope,
    };
    let inside = [
        ["203.0.113.9", "203.0.113.255", "198.51.100.8"],
        ["2001:db8:113::9", "2001:db8:113:ffff::1", "2001:db8:7::8"],
    ];
    let services = |grant: [&str; 2]| {
        let mut all = vec![];
        for (f, grant) in FAMILIES.into_iter().zip(grant) {
            for proto in [TCP, UDP] {
                let target = Target { addr: addr(ip(f.pod)), port_be: 8080_u16.to_be() };
                let open = Wanted::new(false, vec![WantedGroup { weight: 1, targets: vec![target] }]).by_maglev();
                let restricted = Wanted { sources: ranges(f, grant), ..open.clone() };
                // 80: restricted, 81: not, 82: to nobody, 83: restricted with an entry for callers from outside.
                all.push((key(f, 80, INSIDE, proto), restricted.clone()));
                all.push((key(f, 81, INSIDE, proto), open.clone()));
                all.push((key(f, 82, INSIDE, proto), Wanted { sources: Some(Arc::default()), ..open.clone() }));
                all.push((key(f, 83, INSIDE, proto), Wanted { outside: true, ..restricted.clone() }));
                all.push((key(f, 83, OUTSIDE, proto), restricted));
            }
        }
        all
    };
    for f in FAMILIES {
        for pod in [f.pod, f.second] {
            lab.pods.addrs.set(&addr(ip(pod)), &PodAddr { netns: 7, flags: 0, ifindex: 1 }).expect("pod");
        }
    }
    let [first, second] = [["198.51.100.8", "2001:db8:7::8"], ["198.51.100.7", "2001:db8:7::7"]];
    lab.serve(services(first));
    let mut dropped = 0;
    let mut judged = |lab: &Lab, program: &str, frame: &Frame, passes: bool| {
        let out = lab.run(program, &frame.bytes());
        let want = if passes { Verdict::Redirect } else { Verdict::Drop };
        assert_eq!(out.verdict, want, "{program}: {frame:?}");
        dropped += u64::from(!passes);
        assert_eq!(lab.counter(Reason::DroppedSourceRange), dropped, "{program}: {frame:?}");
    };
    for (f, inside) in FAMILIES.into_iter().zip(inside) {
        for (proto, sport) in [(TCP, 40_000), (UDP, 40_000)] {
            let to = |src: &str, dport: u16, sport: u16| Frame { src: ip(src), dport, sport, ..request(f, proto) };
            for src in inside {
                judged(&lab, "from_wire", &to(src, 80, sport), true);
                judged(&lab, "from_wire", &to(src, 83, sport + 3), true);
                judged(&lab, "from_wire", &to(src, 82, sport), false);
            }
            judged(&lab, "from_wire", &to(f.caller, 80, sport), false);
            judged(&lab, "from_wire", &to(f.caller, 83, sport + 3), false);
            judged(&lab, "from_wire", &to(f.caller, 81, sport + 1), true);
            judged(&lab, "from_pod", &to(f.second, 80, sport + 4), false);
            judged(&lab, "from_pod", &to(f.second, 81, sport + 5), true);
        }
    }
    // The single addresses change places: who was let in goes on, and comes in no more.
    lab.serve(services(second));
    for (f, [.., was]) in FAMILIES.into_iter().zip(inside) {
        let to = |src: &str, sport: u16| Frame { src: ip(src), sport, ..request(f, UDP) };
        judged(&lab, "from_wire", &to(was, 40_000), true);
        judged(&lab, "from_wire", &to(was, 40_010), false);
        judged(&lab, "from_wire", &to(f.caller, 40_011), true);
    }
}

/// The link-layer address of the link that [`wire`] makes.
const WIRE: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// A network namespace of this thread's own with a link to a router, which knows the ways to all others; the link.
fn wire() -> u32 {
    unshare(Unshare { net: true, ..Unshare::default() }).expect("unshare");
    let mut commands = vec!["link add w0 address 02:00:00:00:00:09 type veth peer w1".to_owned()];
    commands.extend(
        ["link set w0 mtu 9000", "link set w1 mtu 9000", "link set w0 up", "link set w1 up"].map(str::to_owned),
    );
    for (number, f) in (4..).step_by(2).zip(FAMILIES) {
        let (len, nodad) = if number == 4 { (32, "") } else { (128, "nodad") };
        commands.push(format!("-{number} addr add {}/{len} dev w0 {nodad}", f.node));
        commands.push(format!("-{number} route add {} dev w0", f.router));
        commands.push(format!("-{number} neigh add {} lladdr 02:00:00:00:00:08 dev w0", f.router));
        commands.push(format!("-{number} route add default via {} mtu lock 5000", f.router));
    }
    for command in commands {
        assert!(Command::new("ip").args(command.split_whitespace()).status().expect("ip").success(), "{command}");
    }
    for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{setting}"), "1").expect("forward");
    }
    let socket = UdpSocket::bind("0.0.0.0:0").expect("socket");
    rustix::net::netdevice::name_to_index(socket, "w0").expect("link")
}

/// What XDP sends is what `from_wire` would have sent, to the router's link-layer address; the rest it leaves alone.
#[test]
fn known_connections_between_others_go_by_xdp() {
    let link = wire();
    let mut lab = lab("packets-xdp");
    if !lab.programs().any(|p| p == XDP) {
        println!("before Linux 5.18 there is no program for XDP");
        return;
    }
    let far = ["10.244.2.9", "fd00:2::9"];
    let mut services = vec![];
    for (f, far) in FAMILIES.into_iter().zip(far) {
        lab.pods.addrs.set(&addr(ip(f.pod)), &PodAddr { netns: 7, flags: 0, ifindex: 1 }).expect("pod");
        for (proto, port, backend) in [(TCP, 80_u16, far), (UDP, 80, far), (TCP, 81, f.pod)] {
            let target = Target { addr: addr(ip(backend)), port_be: 8080_u16.to_be() };
            let wanted = Wanted::new(false, vec![WantedGroup { weight: 1, targets: vec![target] }]);
            services.push((ServiceKey { addr: addr(ip(f.vip)), port_be: port.to_be(), proto, scope: INSIDE }, wanted));
        }
    }
    lab.serve(services);
    let [addr4, addr6] = FAMILIES.map(|f| addr(ip(f.node)));
    lab.node.devices.set(&link, &Device { addr4, addr6, mac: WIRE, flags: 0 }).expect("device");
    let macs = [[2, 0, 0, 0, 0, 8], WIRE].concat();
    let request = |f, proto| Frame { mac: WIRE, ..request(f, proto) };
    // Each CPU lets one packet a second pass, to learn the way.
    let xdp = |packet: &[u8]| -> Outcome {
        let outcomes = (0..64).map(|_| lab.run_at(XDP, link, packet));
        let passed = |o: &Outcome| assert!(o.verdict != Verdict::Next || o.packet == packet, "changed and passed");
        let mut outcomes = outcomes.inspect(passed);
        outcomes.find(|o| o.verdict == Verdict::Redirect).expect("sent within 64 packets")
    };
    for (f, far) in FAMILIES.into_iter().zip(far) {
        for (number, proto) in [(0, TCP), (1, UDP)] {
            for options in [0, 2, 5] {
                let checksum = options != 5 || f.vip.contains(':') || proto == TCP;
                let frame =
                    Frame { sport: 42_000 + number * 100 + options as u16, options, checksum, ..request(f, proto) };
                let sent = frame.bytes();
                assert_eq!(lab.run_at(XDP, link, &sent).verdict, Verdict::Next, "what begins is not its business");
                let first = lab.run_at("from_wire", link, &sent);
                assert_eq!(first.verdict, Verdict::Redirect);
                let there = xdp(&sent);
                assert_eq!(there.packet[..12], macs);
                assert_eq!(there.packet[12..], first.packet[12..], "{frame:?}");
                let seen = read(&there.packet).expect("whole");
                assert_eq!((seen.src, seen.dst, seen.dport), (ip(f.node), ip(far), 8080));
                let answer = Frame {
                    src: seen.dst,
                    dst: seen.src,
                    sport: seen.dport,
                    dport: seen.sport,
                    options: 0,
                    ..frame.clone()
                };
                let back = xdp(&answer.bytes());
                assert_eq!(back.packet[12..], lab.run_at("from_wire", link, &answer.bytes()).packet[12..]);
                let seen = read(&back.packet).expect("whole");
                assert_eq!((seen.src, seen.sport, seen.dst, seen.dport), (frame.dst, 80, frame.src, frame.sport));
                for length in 15..sent.len() - frame.payload.len() {
                    // The kernel itself may refuse to make a packet of it.
                    let Some(out) = lab.try_run(XDP, &sent[..length]) else { continue };
                    assert_eq!((out.verdict, &out.packet[..]), (Verdict::Next, &sent[..length]), "{length} bytes");
                }
            }
        }
        // Of a packet of several parts the program sees the first alone; these are larger and smaller than the way takes.
        for (payload, sent) in [(4_000, true), (8_000, false)] {
            let frame = Frame { sport: 44_000, payload: vec![0xa5; payload], ..request(f, UDP) };
            let small = Frame { payload: vec![], ..frame.clone() };
            assert_eq!(lab.run_at("from_wire", link, &small.bytes()).verdict, Verdict::Redirect);
            let bytes = frame.bytes();
            let verdicts: Vec<Verdict> = (0..64).map(|_| lab.run_at(XDP, link, &bytes).verdict).collect();
            assert_eq!(verdicts.contains(&Verdict::Redirect), sent, "{payload} bytes: {verdicts:?}");
        }
        let local = Frame { sport: 43_000, dport: 81, ..request(f, TCP) };
        assert_eq!(lab.run_at("from_wire", link, &local.bytes()).verdict, Verdict::Redirect);
        for _ in 0..8 {
            assert_eq!(lab.run_at(XDP, link, &local.bytes()).verdict, Verdict::Next, "to a pod of this node");
        }
    }
    assert!(lab.counter(Reason::ForwardedXdp) > 0);
}

/// Whatever comes: an answer, and checksums that hold where they held.
#[test]
fn random_packets_are_survived() {
    let lab = lab("packets-random");
    let mut random = frames::Random::new(0x51_0cea);
    for round in 0..20_000 {
        let f = FAMILIES[random.below(2)];
        let proto = [TCP, UDP][random.below(2)];
        let mut bytes = Frame {
            options: random.below(6),
            sport: random.below(65_536) as u16,
            payload: vec![0; random.below(64)],
            ..request(f, proto)
        }
        .bytes();
        if round % 4 != 0 {
            for _ in 0..=random.below(4) {
                let at = 12 + random.below(bytes.len() - 12);
                bytes[at] = random.below(256) as u8;
            }
            bytes.truncate(15 + random.below(bytes.len() - 14));
        }
        for program in lab.programs() {
            let Some(out) = lab.try_run(program, &bytes) else { continue };
            assert!(!matches!(out.verdict, Verdict::Other(_)), "{program}: {:?} of {bytes:02x?}", out.verdict);
            if read(&bytes).is_ok() && out.verdict != Verdict::Drop && out.packet.len() == bytes.len() {
                read(&out.packet).unwrap_or_else(|e| panic!("{program}: {e}: {bytes:02x?} to {:02x?}", out.packet));
            }
        }
    }
}
