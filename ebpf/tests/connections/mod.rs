//! What the programs know of connections over time, and what makes them forget.

use crate::{
    FAMILIES, Family,
    frames::{ACK, FIN, Frame, RST, SYN, addresses, read},
    ip, lab,
    lab::Lab,
    request,
};
use sluice_ebpf::{
    addr,
    common::{
        Addr, CT_ANSWERED, CT_CLOSED, CT_HALF, CT_REPLY, Flow, INSIDE, OUTSIDE, PodAddr, Reverse, ServiceKey, TCP,
        TICK_SHIFT, Translation, UDP, timeout,
    },
    dry_run::Verdict,
    layout::{Target, Wanted, WantedGroup},
    sweep::since_start,
};
use std::{
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

/// What a pod answers to a request as it came to it.
fn answer(f: Family, flags: u8, proto: u8, caller: &Frame) -> Frame {
    let (sport, dport) = (8080, caller.sport);
    Frame { src: ip(f.pod), dst: caller.src, sport, dport, proto, flags, ..Frame::default() }
}

/// Whether the answer comes to the caller from whom he asked.
fn answered(lab: &Lab, f: Family, flags: u8, caller: &Frame) -> bool {
    let seen = read(&lab.run("from_pod", &answer(f, flags, caller.proto, caller).bytes()).packet).expect("whole");
    (seen.src, seen.sport) == (caller.dst, caller.dport)
}

fn reached(lab: &Lab, frame: &Frame) -> String {
    addresses(&lab.run("from_wire", &frame.bytes()).packet).1.to_string()
}

/// Changes what is known of every connection.
fn edit(lab: &Lab, change: impl Fn(&mut Translation)) {
    for (flow, mut t) in lab.known() {
        change(&mut t);
        lab.note(&flow, &t);
    }
}

fn reply(t: &Translation) -> bool {
    t.flags & CT_REPLY != 0
}

/// CPUs look at the clock at different times: what another has noted may be ahead.
#[test]
fn a_connection_that_another_cpu_used_a_tick_ahead_lives() {
    let mut lab = lab("packets-ahead");
    for f in FAMILIES {
        for proto in [TCP, UDP] {
            let first = request(f, proto);
            assert_eq!(reached(&lab, &first), f.pod);
            edit(&lab, |t| t.used += 2);
            assert!(answered(&lab, f, SYN | ACK, &first), "{first:?}");
        }
    }
    let known = lab.known().len();
    let now = since_start().expect("clock");
    let seen = (0..64).map(|_| lab.sweeper.step(now).expect("step")).last().expect("steps");
    assert_eq!((lab.known().len(), seen.removed, seen.connections), (known, 0, 4));
}

#[test]
fn what_has_timed_out_is_swept_and_what_lives_is_not() {
    let mut lab = lab("packets-sweep");
    let f = FAMILIES[0];
    for sport in 0..20 {
        assert_eq!(reached(&lab, &Frame { sport: 20_000 + sport, ..request(f, UDP) }), f.pod);
    }
    let old = |flow: &Flow| flow.sport_be == 20_003_u16.to_be() || flow.dport_be == 20_003_u16.to_be();
    for (flow, t) in lab.known().into_iter().filter(|(flow, _)| old(flow)) {
        lab.note(&flow, &Translation { used: t.used.wrapping_sub(timeout::NEW + 1), ..t });
    }
    let now = since_start().expect("clock");
    let seen = (0..64).map(|_| lab.sweeper.step(now).expect("step")).last().expect("steps");
    assert_eq!((seen.removed, seen.connections, lab.known().len()), (2, 19, 38));
    assert!(lab.known().iter().all(|(flow, _)| !old(flow)));
    let later = now + Duration::from_nanos(u64::from(timeout::NEW + 2) << TICK_SHIFT);
    let seen = (0..64).map(|_| lab.sweeper.step(later).expect("step")).last().expect("steps");
    assert_eq!((seen.removed, seen.connections, lab.known().len()), (40, 0, 0));
}

/// With thousands that begin and end in a second, their ends would fill the map, which then forgets what is silent.
#[test]
fn what_is_over_makes_room_when_there_is_little() {
    let mut lab = lab("packets-crowd");
    let f = FAMILIES[0];
    let silent = request(f, UDP);
    assert_eq!(reached(&lab, &silent), f.pod);
    let (flow, t) = lab.known().into_iter().find(|(_, t)| !reply(t)).expect("one direction");
    let now = since_start().expect("clock");
    let used = (now.as_nanos() >> TICK_SHIFT) as u32;
    let capacity = lab.flows.capacity().expect("inspect");
    let over = |n: usize| {
        let key = Flow { src: Addr::from_v4(n as u32), proto: TCP, ..flow };
        let to = Flow { proto: TCP, ..t.to };
        lab.flows.set(&key, &Translation { to, used: used - 3, flags: CT_ANSWERED | CT_CLOSED }).expect("set");
    };
    (0..capacity / 4).for_each(over);
    let all = lab.known().len();
    let removed = (0..4).map(|_| lab.sweeper.step(now).expect("step").removed).last();
    assert_eq!((removed, lab.known().len()), (Some(0), all), "there is room for their time");
    (0..capacity * 5 / 8).for_each(over);
    // One pass sees how many there are, the next one makes room.
    let removed = (0..6).map(|_| lab.sweeper.step(now).expect("step").removed).last().expect("steps");
    assert!(removed > capacity as u64 / 2, "{removed}");
    assert_eq!(lab.known().len(), 2, "what is open is there");
}

/// The map forgets one direction before the other when it is full.
#[test]
fn a_direction_that_was_lost_comes_back() {
    let lab = lab("packets-halves");
    for f in FAMILIES {
        for (n, proto) in [(0, TCP), (1, UDP)] {
            let first = Frame { sport: 22_000 + n, ..request(f, proto) };
            let next = Frame { flags: ACK, ..first.clone() };
            reached(&lab, &first);
            assert!(answered(&lab, f, SYN | ACK, &first));
            reached(&lab, &next);
            for lost in [true, false] {
                let whole: Vec<_> = lab.known();
                // A tick later, so that a packet brings the connection forward.
                edit(&lab, |t| t.used -= 1);
                for (flow, _) in whole.iter().filter(|(_, t)| reply(t) == lost) {
                    lab.forget(flow);
                }
                let came = if lost { reached(&lab, &next) == f.pod } else { answered(&lab, f, ACK, &first) };
                assert!(came, "the direction that is there");
                let like = |entries: Vec<(Flow, Translation)>| {
                    let mut all: Vec<_> = entries.iter().map(|(flow, t)| (*flow, t.to, t.flags)).collect();
                    all.sort_unstable();
                    all
                };
                let of = |entries: Vec<(Flow, Translation)>| {
                    let port = first.sport.to_be();
                    entries
                        .into_iter()
                        .filter(move |(k, _)| k.sport_be == port || k.dport_be == port)
                        .collect::<Vec<_>>()
                };
                assert_eq!(like(of(lab.known())), like(of(whole)), "{proto}: reply lost {lost}");
                assert!(answered(&lab, f, ACK, &first) && reached(&lab, &next) == f.pod, "both go on");
                for (flow, _) in lab.known() {
                    lab.forget(&flow);
                }
                reached(&lab, &first);
                assert!(answered(&lab, f, SYN | ACK, &first));
                reached(&lab, &next);
            }
        }
    }
}

/// What anybody can begin is soon forgotten; what both sides speak of is not.
#[test]
fn a_connection_is_open_when_the_caller_has_gone_on() {
    let lab = lab("packets-handshake");
    let f = FAMILIES[0];
    let first = request(f, TCP);
    let ticks = |lab: &Lab| {
        let mut all: Vec<u32> = lab.known().iter().map(|(_, t)| t.timeout()).collect();
        all.dedup();
        all
    };
    reached(&lab, &first);
    assert_eq!(ticks(&lab), [timeout::TCP_NEW]);
    reached(&lab, &first);
    assert_eq!(ticks(&lab), [timeout::TCP_NEW], "tried again");
    assert!(answered(&lab, f, SYN | ACK, &first));
    assert_eq!(ticks(&lab), [timeout::TCP_HALF]);
    assert!(answered(&lab, f, SYN | ACK, &first));
    reached(&lab, &first);
    reached(&lab, &Frame { flags: SYN | ACK, ..first.clone() });
    assert_eq!(ticks(&lab), [timeout::TCP_HALF], "neither a SYN nor an answer opens it");
    assert_eq!(lab.flows.entries().expect("entries"), []);
    reached(&lab, &Frame { flags: ACK, ..first.clone() });
    assert_eq!(ticks(&lab), [timeout::TCP_OPEN]);
    assert_eq!(lab.flows.entries().expect("entries").len(), 2);
    assert!(lab.halves.entries().expect("entries").is_empty(), "it has moved");
    assert!(answered(&lab, f, FIN | ACK, &first));
    assert_eq!(ticks(&lab), [timeout::TCP_OPEN]);
    reached(&lab, &Frame { flags: FIN | ACK, ..first.clone() });
    assert_eq!(ticks(&lab), [timeout::TCP_CLOSED]);
    reached(&lab, &first);
    assert_eq!(ticks(&lab), [timeout::TCP_NEW], "the same port once more");
    reached(&lab, &Frame { flags: RST, ..first.clone() });
    assert_eq!(ticks(&lab), [timeout::TCP_CLOSED]);
    // As programs before the flag have left it.
    let before = |t: &mut Translation| t.flags = (t.flags | CT_ANSWERED) & !(CT_HALF | CT_CLOSED);
    edit(&lab, before);
    assert_eq!(ticks(&lab), [timeout::TCP_OPEN]);
}

fn to_only(f: Family, pod: &str) -> Vec<(ServiceKey, Wanted)> {
    let target = Target { addr: addr(ip(pod)), port_be: 8080_u16.to_be() };
    let wanted = Wanted::new(false, vec![WantedGroup { weight: 1, targets: vec![target] }]);
    let key = |a: Addr, port: u16, proto| ServiceKey { addr: a, port_be: port.to_be(), proto, scope: INSIDE };
    let of = |proto| [key(addr(ip(f.vip)), 80, proto), key(addr(ip(f.vip)).unspecified(), 30_080, proto)];
    [TCP, UDP].into_iter().flat_map(of).map(|k| (k, wanted.clone())).collect()
}

/// A caller with one port, as resolvers and log shippers have.
#[test]
fn a_backend_that_was_withdrawn_gets_nothing_that_begins() {
    let mut lab = Lab::new("packets-withdrawn");
    let killed = [false, true];
    for (f, killed) in FAMILIES.into_iter().flat_map(|f| killed.map(|k| (f, k))) {
        for (netns, pod) in [(7, f.pod), (8, f.second)] {
            lab.pods.addrs.set(&addr(ip(pod)), &PodAddr { netns, flags: 0, ifindex: 1 }).expect("pod");
        }
        lab.node.locals.set(&addr(ip(f.node)), &1).expect("local");
        lab.serve(to_only(f, f.pod));
        let calls: Vec<[Frame; 2]> = [(f.vip, 80), (f.node, 30_080)]
            .into_iter()
            .zip(23_000..)
            .map(|((dst, dport), sport)| [TCP, UDP].map(|p| Frame { dst: ip(dst), dport, sport, ..request(f, p) }))
            .collect();
        for [tcp, udp] in &calls {
            assert_eq!([tcp, udp].map(|c| reached(&lab, c)), [f.pod; 2]);
            assert!(answered(&lab, f, SYN | ACK, tcp) && answered(&lab, f, 0, udp));
        }
        match killed {
            true => lab.serve_and_die(to_only(f, f.second)),
            false => lab.serve(to_only(f, f.second)),
        }
        for [tcp, udp] in &calls {
            assert_eq!(reached(&lab, udp), f.second, "the next datagram");
            let next = Frame { flags: ACK, ..tcp.clone() };
            assert_eq!(reached(&lab, &next), f.pod, "what is open goes on");
            assert!(answered(&lab, f, ACK, tcp));
            assert_eq!(reached(&lab, tcp), f.second, "what begins");
            assert_eq!(reached(&lab, &next), f.second);
        }
        // A service that keeps the backend is not meant.
        let [_, udp] = &calls[0];
        let node_port_alone = to_only(f, f.pod).into_iter().filter(|(k, _)| k.port_be != 80_u16.to_be());
        let kept = to_only(f, f.second).into_iter().filter(|(k, _)| k.port_be == 80_u16.to_be());
        let before = lab.known().len();
        lab.serve(node_port_alone.chain(kept).collect());
        assert_eq!(lab.known().len(), before - 2, "both directions of one");
        assert_eq!(reached(&lab, udp), f.second);
        assert_eq!(reached(&lab, &calls[1][1]), f.pod);
    }
}

/// From outside a service may have backends that it has not for the cluster's own.
#[test]
fn a_new_agent_leaves_alone_what_is_led_rightly() {
    let mut lab = Lab::new("packets-led");
    for f in FAMILIES {
        lab.pods.addrs.set(&addr(ip(f.pod)), &PodAddr { netns: 7, flags: 0, ifindex: 1 }).expect("pod");
        lab.node.locals.set(&addr(ip(f.node)), &1).expect("local");
        let outside = to_only(f, f.pod).into_iter().map(|(key, w)| (ServiceKey { scope: OUTSIDE, ..key }, w));
        let inside = to_only(f, f.second).into_iter().map(|(key, w)| (key, Wanted { outside: true, ..w }));
        let services: Vec<_> = outside.chain(inside).collect();
        lab.serve(services.clone());
        let calls =
            [(f.vip, 80), (f.node, 30_080)].map(|(dst, dport)| Frame { dst: ip(dst), dport, ..request(f, UDP) });
        for call in &calls {
            assert_eq!(reached(&lab, call), f.pod);
        }
        let host_port = ServiceKey { addr: addr(ip(f.node)), port_be: 8_443_u16.to_be(), proto: UDP, scope: INSIDE };
        let to = Reverse { addr: addr(ip(f.pod)), port_be: 8080_u16.to_be(), pad: 0 };
        lab.pods.host_ports.set(&host_port, &to).expect("host port");
        assert_eq!(reached(&lab, &Frame { dst: ip(f.node), dport: 8_443, ..request(f, UDP) }), f.pod);
        let before = lab.known();
        lab.serve_and_die(services);
        assert_eq!(lab.known().len(), before.len());
        open_ends(&lab);
    }
}

/// A pod has gone and another has its address, before anybody could have looked through what is known.
#[test]
fn another_pod_with_the_address_gets_nothing_of_it() {
    let lab = lab("packets-reused");
    for f in FAMILIES {
        let key = |port: u16, proto| ServiceKey {
            addr: addr(ip(f.node)).unspecified(),
            port_be: port.to_be(),
            proto,
            scope: INSIDE,
        };
        let entry = |netns| PodAddr { netns, flags: 0, ifindex: 1 };
        let to = |pod: &str| Reverse { addr: addr(ip(pod)), port_be: 8080_u16.to_be(), pad: 0 };
        for proto in [TCP, UDP] {
            lab.pods.addrs.set(&addr(ip(f.pod)), &entry(7)).expect("pod");
            lab.pods.host_ports.set(&key(8443, proto), &to(f.pod)).expect("host port");
            let call = Frame { dst: ip(f.node), dport: 8443, sport: 24_000, ..request(f, proto) };
            assert_eq!(reached(&lab, &call), f.pod);
            assert!(answered(&lab, f, SYN | ACK, &call));
            let next = Frame { flags: ACK, ..call.clone() };
            assert_eq!(reached(&lab, &next), f.pod);
            // Its pod is gone with its port; then another is there, with the address and without the port.
            lab.pods.host_ports.remove(&key(8443, proto)).expect("host port");
            lab.pods.addrs.remove(&addr(ip(f.pod))).expect("pod");
            for again in [false, true] {
                if again {
                    lab.pods.addrs.set(&addr(ip(f.pod)), &entry(9)).expect("pod");
                }
                let out = lab.run("from_wire", &next.bytes());
                assert_eq!((out.verdict, out.packet), (Verdict::Next, next.bytes()), "the node's own");
                assert!(!answered(&lab, f, ACK, &call), "what it says is its own");
            }
            // The port is another's now.
            lab.pods.host_ports.set(&key(8443, proto), &to(f.second)).expect("host port");
            assert_eq!(reached(&lab, &next), f.second);
        }
        lab.pods.addrs.set(&addr(ip(f.pod)), &entry(7)).expect("pod");
    }
}

/// A port of the node's goes to another caller when a connection is over, or when its answers' entry was forgotten: who had it
/// before must not go on under it, for what is sent so is the other's.
#[test]
fn nobody_speaks_in_anothers_connection() {
    let lab = lab("packets-taken-over");
    for f in FAMILIES {
        for proto in [TCP, UDP] {
            let first = Frame { sport: 26_000, ..request(f, proto) };
            assert_eq!(reached(&lab, &first), f.pod);
            assert!(answered(&lab, f, SYN | ACK, &first));
            let next = Frame { flags: ACK, ..first.clone() };
            reached(&lab, &next);
            edit(&lab, |t| t.used -= 1);
            let (key, mut taken) = lab.known().into_iter().find(|(_, t)| reply(t)).expect("its answers");
            (taken.to.dst, taken.to.dport_be) = (addr(ip(f.second)), 999_u16.to_be());
            lab.note(&key, &taken);
            let sent = read(&lab.run("from_wire", &next.bytes()).packet).expect("whole");
            assert_eq!(sent.dst.to_string(), f.pod);
            assert_ne!(sent.sport, first.sport, "under a port of its own");
            assert_eq!(
                lab.known().into_iter().find(|(k, _)| *k == key),
                Some((key, taken)),
                "the other one's is as it was"
            );
            open_ends(&lab);
        }
    }
}

/// What answers the node's own connection, begun from a port that a pod has as host port, is the node's. Where the node begins none
/// of itself, a connection that was forgotten goes on.
#[test]
fn a_host_port_takes_no_answers_to_the_node() {
    let lab = lab("packets-own-answers");
    for f in FAMILIES {
        let key =
            ServiceKey { addr: addr(ip(f.node)).unspecified(), port_be: 40_000_u16.to_be(), proto: TCP, scope: INSIDE };
        let to = Reverse { addr: addr(ip(f.pod)), port_be: 8080_u16.to_be(), pad: 0 };
        lab.pods.host_ports.set(&key, &to).expect("host port");
        let call = Frame { dst: ip(f.node), dport: 40_000, sport: 443, ..request(f, TCP) };
        for flags in [SYN | ACK, ACK, FIN | ACK, RST] {
            let answer = Frame { flags, ..call.clone() };
            let out = lab.run("from_wire", &answer.bytes());
            assert_eq!((out.verdict, out.packet), (Verdict::Next, answer.bytes()), "{flags:#x}");
        }
        assert_eq!(reached(&lab, &call), f.pod);
        assert_eq!(reached(&lab, &Frame { flags: ACK, ..call.clone() }), f.pod);
        let low = ServiceKey { port_be: 8_443_u16.to_be(), ..key };
        lab.pods.host_ports.set(&low, &to).expect("host port");
        assert_eq!(reached(&lab, &Frame { dport: 8_443, flags: ACK, ..call.clone() }), f.pod);
        open_ends(&lab);
    }
}

/// Programs from before there were two maps have left in the one what has not begun in earnest.
#[test]
fn what_was_begun_while_there_was_one_map_opens_in_it() {
    let lab = lab("packets-one-map");
    for f in FAMILIES {
        let first = request(f, TCP);
        reached(&lab, &first);
        assert!(answered(&lab, f, SYN | ACK, &first));
        for both in [true, false] {
            for (flow, t) in lab.known() {
                lab.forget(&flow);
                let there = both || reply(&t);
                let map = if there { &lab.flows } else { &lab.halves };
                map.set(&flow, &Translation { flags: t.flags | CT_HALF, ..t }).expect("set");
            }
            assert_eq!(reached(&lab, &Frame { flags: ACK, ..first.clone() }), f.pod);
            assert!(answered(&lab, f, ACK, &first));
            let open = lab.flows.entries().expect("entries");
            assert_eq!((open.len(), lab.known().len()), (2, 2), "in the one map only");
            assert!(open.iter().all(|(_, t)| t.flags & CT_HALF == 0 && t.timeout() == timeout::TCP_OPEN), "{open:?}");
        }
        open_ends(&lab);
    }
}

fn open_ends(lab: &Lab) {
    lab.known().iter().for_each(|(flow, _)| lab.forget(flow));
}

/// The one direction may have opened without the other, which came back since.
#[test]
fn both_directions_go_wherever_they_are() {
    let mut lab = lab("packets-mixed");
    for f in FAMILIES {
        for replies in [true, false] {
            let asked = request(f, UDP);
            assert_eq!(reached(&lab, &asked), f.pod);
            assert!(answered(&lab, f, 0, &asked));
            edit(&lab, |t| t.flags = t.flags & !CT_HALF | if reply(t) == replies { CT_HALF } else { 0 });
            let before = [&lab.flows, &lab.halves].map(|map| map.entries().expect("entries").len());
            assert_eq!(before, [1, 1]);
            let others = FAMILIES.into_iter().filter(|o| o.vip != f.vip).flat_map(|o| to_only(o, o.pod));
            lab.serve(to_only(f, f.second).into_iter().chain(others).collect());
            assert_eq!(lab.known(), [], "nothing that an answer could bring back");
            answered(&lab, f, 0, &asked);
            assert_eq!(reached(&lab, &asked), f.second);
            open_ends(&lab);
            lab.serve(FAMILIES.into_iter().flat_map(|o| to_only(o, o.pod)).collect());
        }
    }
}

/// Two CPUs: what opens on the one is written on the other, while others begin where it was.
#[test]
fn what_moves_while_it_is_used_stays_what_it_is() {
    const ROUNDS: u16 = 10_000;
    let lab = lab("packets-two-cpus");
    let f = FAMILIES[0];
    // So that the mark of the one in an entry of the other is seen.
    for (netns, pod) in [(7, f.pod), (8, f.second)] {
        lab.pods.addrs.set(&addr(ip(pod)), &PodAddr { netns, flags: 0, ifindex: 1 }).expect("pod");
    }
    let call = |n: u16| Frame { sport: 10_000 + n, ..request(f, TCP) };
    let flow =
        Flow { src: addr(ip(f.caller)), dst: addr(ip(f.vip)), dport_be: 80_u16.to_be(), proto: TCP, ..Flow::default() };
    let begun = AtomicU16::new(0);
    std::thread::scope(|s| {
        s.spawn(|| {
            for n in 0..ROUNDS {
                reached(&lab, &call(n));
                begun.store(n + 1, Ordering::Release);
                let key = Flow { sport_be: (10_000 + n).to_be(), ..flow };
                // It opens as soon as the other CPU has seen the answer, which may write it still.
                while lab.flows.get(&key).expect("get").is_none() {
                    reached(&lab, &Frame { flags: ACK, ..call(n) });
                }
                // One that stays a beginning, in the place that has become free.
                reached(&lab, &Frame { src: ip("203.0.113.9"), ..call(n) });
            }
        });
        s.spawn(|| {
            for n in 0..ROUNDS {
                while begun.load(Ordering::Acquire) <= n {
                    std::hint::spin_loop();
                }
                lab.run("from_pod", &answer(f, SYN | ACK, TCP, &call(n)).bytes());
            }
        });
    });
    let open = lab.flows.entries().expect("entries");
    assert_eq!(open.len(), 2 * usize::from(ROUNDS));
    let stamp = sluice_ebpf::common::stamp(7);
    for (flow, t) in open {
        let want = if reply(&t) { CT_ANSWERED | CT_REPLY } else { CT_ANSWERED | stamp };
        assert_eq!(t.flags, want, "{flow:?}");
        assert!(lab.flows.get(&t.to.flipped()).expect("get").is_some_and(|o| o.to == flow.flipped()), "{flow:?}");
    }
    for (flow, t) in lab.halves.entries().expect("entries") {
        let want = if reply(&t) { CT_REPLY } else { stamp };
        assert_eq!(t.flags & !CT_ANSWERED, want | CT_HALF, "{flow:?}");
    }
}

/// Beginnings under addresses that are not the sender's, which the backend answers, and nobody goes on with.
#[test]
fn a_flood_of_beginnings_leaves_what_is_open() {
    const OPEN: u16 = 2_000;
    // More than the map of open connections has room for.
    const FLOOD: u32 = 80_000;
    let lab = lab("packets-flood");
    let f = FAMILIES[0];
    let begin = |call: &Frame| {
        reached(&lab, call);
        lab.run("from_pod", &answer(f, SYN | ACK, TCP, call).bytes());
    };
    let open: Vec<Frame> = (0..OPEN).map(|n| Frame { sport: 10_000 + n, ..request(f, TCP) }).collect();
    for call in &open {
        begin(call);
        reached(&lab, &Frame { flags: ACK, ..call.clone() });
    }
    for n in 0..FLOOD {
        let src = std::net::Ipv4Addr::from(0xcb00_7100 + n / 60_000);
        begin(&Frame { src: src.into(), sport: 1_024 + (n % 60_000) as u16, ..request(f, TCP) });
    }
    let kept = lab.flows.entries().expect("entries").len();
    assert_eq!(kept, 2 * usize::from(OPEN), "both directions of all that is open, and nothing else");
    assert!(open.iter().all(|call| answered(&lab, f, ACK, call)));
    // Somebody in earnest gets through all the same.
    let late = Frame { sport: 9_999, ..request(f, TCP) };
    begin(&late);
    assert_eq!(reached(&lab, &Frame { flags: ACK, ..late.clone() }), f.pod);
    assert!(answered(&lab, f, ACK, &late));
}
