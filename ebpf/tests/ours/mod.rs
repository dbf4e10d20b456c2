//! What is the node's own: frames that are sent to it, and answers of its processes.

use crate::{
    FAMILIES, WIRE,
    frames::{self, ACK, Frame, read},
    ip, lab,
    lab::Lab,
    request, wire,
};
use sluice_ebpf::{
    addr,
    common::{CT_ANSWERED, Device, Flow, INSIDE, Reason, ServiceKey, TCP, Translation, UDP},
    dry_run::Verdict,
    layout::{Target, Wanted, WantedGroup},
    loader::XDP,
};

/// A switch that does not know a machine sends its frames to all, and a link may show all that passes.
#[test]
fn frames_for_other_machines_are_left_alone() {
    let link = wire();
    let lab = lab("packets-others");
    for f in FAMILIES {
        let [other, broadcast] = [[2, 0, 0, 0, 0, 5], [0xff; 6]];
        lab.node.announced.set(&addr(ip(f.vip)), &1).expect("announced");
        let [addr4, addr6] = FAMILIES.map(|f| addr(ip(f.node)));
        lab.node.devices.set(&link, &Device { addr4, addr6, mac: WIRE, flags: 0 }).expect("device");
        for dst in [f.vip, f.empty, f.pod] {
            for mac in [other, broadcast] {
                let sent = Frame { mac, dst: ip(dst), ..request(f, TCP) }.bytes();
                let out = lab.run_at("from_wire", link, &sent);
                assert_eq!((out.verdict, out.packet), (Verdict::Next, sent), "to {dst} at {mac:02x?}");
            }
        }
        assert!(lab.known().is_empty(), "nothing of it is noted");
        let own = Frame { mac: WIRE, ..request(f, TCP) }.bytes();
        assert_eq!(lab.run_at("from_wire", link, &own).verdict, Verdict::Redirect);
        for (flow, _) in lab.known() {
            lab.forget(&flow);
        }
        // Questions are for all; one that is sent to another machine is that one's.
        let mut question =
            frames::solicitation(if f.vip.contains(':') { ip(f.router) } else { ip("192.0.2.7") }, ip(f.vip));
        assert_eq!(lab.run_at("from_wire", link, &question).verdict, Verdict::Redirect);
        question[..6].copy_from_slice(&other);
        assert_eq!(lab.run_at("from_wire", link, &question).verdict, Verdict::Next);
    }
}

#[test]
fn frames_for_other_machines_are_left_alone_by_xdp() {
    let link = wire();
    let lab = lab("packets-others-xdp");
    if !lab.programs().any(|p| p == XDP) {
        println!("before Linux 5.18 there is no program for XDP");
        return;
    }
    for (f, far) in FAMILIES.into_iter().zip(["203.0.113.9", "2001:db8:9::9"]) {
        let flow = |dst: &str, dport: u16| Flow {
            src: addr(ip(f.caller)),
            dst: addr(ip(dst)),
            sport_be: 40_000_u16.to_be(),
            dport_be: dport.to_be(),
            proto: TCP,
            pad: [0; 3],
        };
        let now = sluice_ebpf::sweep::since_start().expect("clock").as_nanos() >> sluice_ebpf::common::TICK_SHIFT;
        let known = Translation { to: flow(far, 8080), used: now as u32, flags: CT_ANSWERED };
        lab.flows.set(&flow(f.vip, 80), &known).expect("set");
        let run = |mac| {
            let sent = Frame { mac, flags: ACK, ..request(f, TCP) }.bytes();
            (0..64).map(|_| lab.run_at(XDP, link, &sent).verdict).collect::<Vec<_>>()
        };
        assert!(run(WIRE).contains(&Verdict::Redirect), "the link's own");
        assert!(run([2, 0, 0, 0, 0, 5]).iter().all(|v| *v == Verdict::Next), "another machine's");
    }
}

/// A service on [`PORT`] whose backend is a process in the node's own network.
fn served_by_the_node(name: &str) -> Lab {
    let mut lab = Lab::new(name);
    let mut services = vec![];
    for f in FAMILIES {
        lab.node.locals.set(&addr(ip(f.node)), &1).expect("local");
        for proto in [TCP, UDP] {
            let target = Target { addr: addr(ip(f.node)), port_be: 8080_u16.to_be() };
            let wanted = Wanted::new(false, vec![WantedGroup { weight: 1, targets: vec![target] }]);
            services
                .push((ServiceKey { addr: addr(ip(f.vip)), port_be: 80_u16.to_be(), proto, scope: INSIDE }, wanted));
        }
    }
    lab.serve(services);
    lab
}

#[test]
fn answers_of_the_nodes_processes_are_translated() {
    let lab = served_by_the_node("packets-host");
    for f in FAMILIES {
        for proto in [TCP, UDP] {
            for (sport, options) in [(40_000, 0), (40_001, 2), (40_002, 5)] {
                let call = Frame { sport, ..request(f, proto) };
                let there = lab.run("from_wire", &call.bytes());
                let seen = read(&there.packet).expect("whole");
                assert_eq!((there.verdict, seen.dst, seen.dport), (Verdict::Next, ip(f.node), 8080));
                let answer = Frame {
                    src: ip(f.node),
                    dst: ip(f.caller),
                    sport: 8080,
                    dport: sport,
                    flags: ACK,
                    options,
                    payload: vec![9; 100],
                    ..call.clone()
                };
                let back = lab.run("from_host", &answer.bytes());
                let seen = read(&back.packet).expect("whole");
                assert_eq!(
                    (back.verdict, seen.src, seen.sport, seen.dst, seen.dport),
                    (Verdict::Next, ip(f.vip), 80, ip(f.caller), sport)
                );
                assert_eq!((back.packet.len(), seen.payload), (answer.bytes().len(), vec![9; 100]));
                // In parts, of which the first must have all of the header.
                for part in [answer.fragment(0, 1, 800), answer.fragment(2, 1, 800), answer.fragment(4, 0, 800)] {
                    if proto == TCP {
                        continue;
                    }
                    let out = lab.run("from_host", &part);
                    assert_eq!(
                        (out.verdict, frames::addresses(&out.packet)),
                        (Verdict::Next, (ip(f.vip), ip(f.caller)))
                    );
                    assert_eq!(
                        out.packet[out.packet.len() - 8..],
                        part[part.len() - 8..],
                        "no port is written into data"
                    );
                }
                // A part of something else, and cut anywhere: as it was.
                let orphan = answer.fragment(4, 0, 801);
                assert_eq!(lab.run("from_host", &orphan).packet, orphan);
                let bytes = answer.bytes();
                for length in 15..bytes.len() - 100 {
                    let Some(out) = lab.try_run("from_host", &bytes[..length]) else { continue };
                    assert_eq!(out.verdict, Verdict::Next, "{length} bytes");
                    let headers = if proto == TCP { 18 } else { 8 };
                    let transport = bytes.len() - 100 - if proto == TCP { 20 } else { 8 };
                    assert!(length >= transport + headers || out.packet == bytes[..length], "{length} bytes");
                }
            }
            let other =
                Frame { src: ip(f.node), dst: ip(f.caller), sport: 22, dport: 40_000, proto, ..Frame::default() };
            assert_eq!(lab.run("from_host", &other.bytes()).packet, other.bytes(), "no answer of a service");
        }
        // What the node says of an answer's way.
        let call = request(f, UDP);
        let there = lab.run("from_wire", &call.bytes());
        let error = frames::icmp_error(ip(f.node), ip(f.caller), &there.packet[14..]);
        let out = lab.run("from_host", &error);
        let (outer, quoted) = frames::read_icmp_error(&out.packet).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(outer, (ip(f.vip), ip(f.caller)));
        assert_eq!((quoted.dst, quoted.dport), (ip(f.vip), 80));
    }
    assert_eq!(lab.counter(Reason::DroppedRewrite), 0);
}
