//! The program at new connections to a pod, `steer_pod` (hook `sk_lookup`), as tables of cases.
//!
//! Connections from outside are run by the kernel on a context of the test's (BPF_PROG_TEST_RUN, for this type since Linux
//! 5.13). It takes none that says over which link a connection came: all that follows the local port must be 0, so that what
//! comes over `lo`, which is what a pod itself dials, is tried with sockets in a namespace. That is also where marks count: the
//! program does not see them, they lead a connection to it. Nor does it see whether a policy is strict or permissive: that is
//! the sidecar's, which has the connection then (`agent/tests/datapath`, `capture`).

use crate::{FAMILIES, Family, ip, kernel::since, lab::Lab};
use sluice_ebpf::{
    addr,
    common::{
        ADMIN_PORT, CAPTURE_MARK, CAPTURE_TABLE, INBOUND, ListenKey, OUTBOUND, POD_MESHED, POD_SHAPED, PodAddr,
        PortKey, Reason, TCP, UDP,
    },
    dry_run::{Arrival, Steered},
};
use sluice_netlink::{
    Netns, lab as machines,
    ns::{Unshare, unshare},
    sock,
};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    error::Error,
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    os::fd::AsFd,
    process::Command,
    time::Duration,
};

/// A port of the first pod that passes its sidecar.
const EXCLUDED: u16 = 9_000;
const PORT: u16 = 8_080;
const REASONS: [Reason; 6] = [
    Reason::SteeredOutbound,
    Reason::SteeredInbound,
    Reason::ExcludedPort,
    Reason::DroppedOutbound,
    Reason::DroppedInbound,
    Reason::AssignFailed,
];

/// Of both families; the first pod is meshed as long as nothing else is said, the second is not.
fn lab(name: &str) -> Lab {
    let lab = Lab::new(name);
    for f in FAMILIES {
        set_flags(&lab, f.pod, POD_MESHED);
        set_flags(&lab, f.second, 0);
        let key = PortKey { addr: addr(ip(f.pod)), port: EXCLUDED, pad: 0 };
        lab.pods.ports.set(&key, &1).expect("port");
    }
    lab
}

fn set_flags(lab: &Lab, pod: &str, flags: u32) {
    lab.pods.addrs.set(&addr(ip(pod)), &PodAddr { netns: 7, flags, ifindex: 1 }).expect("pod");
}

fn listener(on: IpAddr) -> TcpListener {
    let to = SocketAddr::new(on, 0);
    let make = || {
        let s = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        if to.is_ipv6() {
            s.set_only_v6(true)?;
        }
        s.bind(&to.into())?;
        s.listen(16)?;
        Ok::<_, io::Error>(s.into())
    };
    make().expect("listen")
}

fn loopback(f: Family) -> IpAddr {
    ip(if f.pod.contains(':') { "::1" } else { "127.0.0.1" })
}

/// What was counted, beyond `before`.
fn counted(lab: &Lab, before: [u64; 6]) -> Vec<Reason> {
    let now = REASONS.map(|r| lab.counter(r));
    REASONS.into_iter().zip(before.into_iter().zip(now)).filter(|(_, (b, n))| n > b).map(|(r, _)| r).collect()
}

/// Who takes a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taker {
    /// Whoever listens where it goes.
    App,
    Sidecar,
    Nobody,
}

/// Flags of the pod; whether its sidecar listens; protocol; from where; to where; who takes it; what is counted.
type Inbound<'a> = (u32, bool, u8, &'a str, &'a str, u16, Taker, Option<Reason>);

#[test]
fn what_comes_to_a_pod_from_outside() {
    use Taker::{App, Nobody, Sidecar};
    const MESHED: u32 = POD_MESHED | POD_SHAPED;
    let lab = lab("packets-steer");
    for (number, f) in (0..).zip(FAMILIES) {
        let other = FAMILIES[1 - number];
        let own = loopback(f).to_string();
        let cases: &[Inbound] = &[
            (MESHED, true, TCP, f.caller, f.pod, PORT, Sidecar, Some(Reason::SteeredInbound)),
            (POD_MESHED, true, TCP, f.second, f.pod, 1, Sidecar, Some(Reason::SteeredInbound)),
            (MESHED, true, TCP, f.caller, f.pod, u16::MAX, Sidecar, Some(Reason::SteeredInbound)),
            (MESHED, true, TCP, f.caller, f.pod, EXCLUDED, App, Some(Reason::ExcludedPort)),
            (MESHED, true, TCP, f.caller, f.pod, EXCLUDED.swap_bytes(), Sidecar, Some(Reason::SteeredInbound)),
            (MESHED, true, TCP, f.caller, f.pod, ADMIN_PORT, App, Some(Reason::ExcludedPort)),
            (MESHED, true, UDP, f.caller, f.pod, PORT, App, None),
            // Not its sidecar's: calls within the pod.
            (MESHED, true, TCP, f.pod, f.pod, PORT, App, None),
            (MESHED, true, TCP, &own, f.pod, PORT, App, None),
            (MESHED, true, TCP, f.caller, &own, PORT, App, None),
            // To a pod without a sidecar, and to no pod.
            (MESHED, true, TCP, f.pod, f.second, PORT, App, None),
            (MESHED, true, TCP, f.caller, f.node, PORT, App, None),
            (POD_SHAPED, true, TCP, f.caller, f.pod, PORT, App, None),
            (0, true, TCP, f.caller, f.pod, EXCLUDED, App, None),
            // Its sidecar does not listen: closed, not open.
            (MESHED, false, TCP, f.caller, f.pod, PORT, Nobody, Some(Reason::DroppedInbound)),
            (MESHED, false, TCP, f.caller, f.pod, EXCLUDED, App, Some(Reason::ExcludedPort)),
            (MESHED, false, TCP, f.caller, f.pod, ADMIN_PORT, App, Some(Reason::ExcludedPort)),
            (MESHED, false, UDP, f.caller, f.pod, PORT, App, None),
            (0, false, TCP, f.caller, f.pod, PORT, App, None),
        ];
        let inbound = |pod: &str| ListenKey { addr: addr(ip(pod)), direction: INBOUND };
        let sidecar = listener(loopback(f));
        let cookie = rustix::net::sockopt::socket_cookie(&sidecar).expect("cookie");
        // Those for the other direction, and of other pods, are not for it.
        let outbound = ListenKey { direction: OUTBOUND, ..inbound(f.pod) };
        let _others = [outbound, inbound(f.second), inbound(other.pod)].map(|key| {
            let other = listener(loopback(f));
            lab.listeners.set(&key, other.as_fd()).expect("listener");
            other
        });
        for case @ (flags, listens, proto, from, to, port, taker, reason) in cases {
            set_flags(&lab, f.pod, *flags);
            match listens {
                true => lab.listeners.set(&inbound(f.pod), sidecar.as_fd()).expect("listener"),
                false => drop(lab.listeners.remove(&inbound(f.pod)).expect("listener")),
            }
            let before = REASONS.map(|r| lab.counter(r));
            let (from, to) = (SocketAddr::new(ip(from), 40_000), SocketAddr::new(ip(to), *port));
            let seen = lab.steer(&Arrival { proto: *proto, from, to, ifindex: 0 }).expect("run");
            let want = match taker {
                App => Steered { passed: true, socket: 0 },
                Sidecar => Steered { passed: true, socket: cookie },
                Nobody => Steered { passed: false, socket: 0 },
            };
            // Before 5.17 the program cannot tell a pod's own calls, and closes meshed pods.
            if since(5, 17) {
                assert_eq!((seen, counted(&lab, before)), (want, reason.iter().copied().collect()), "{case:?}");
            } else if *taker == Sidecar {
                assert_eq!(seen, Steered { passed: false, socket: 0 }, "{case:?}");
            }
        }
    }
}

/// What is in the map is not what the connection needs: it is dropped, and not given to the app.
#[test]
fn a_listener_of_the_other_family_takes_nothing() {
    if !since(5, 17) {
        return println!("before Linux 5.17 nothing is captured");
    }
    let lab = lab("packets-steer-family");
    let f = FAMILIES[0];
    let only6 = listener(loopback(FAMILIES[1]));
    let key = ListenKey { addr: addr(ip(f.pod)), direction: INBOUND };
    lab.listeners.set(&key, only6.as_fd()).expect("listener");
    let before = REASONS.map(|r| lab.counter(r));
    let (from, to) = (SocketAddr::new(ip(f.caller), 40_000), SocketAddr::new(ip(f.pod), PORT));
    let seen = lab.steer(&Arrival { proto: TCP, from, to, ifindex: 0 }).expect("run");
    assert_eq!((seen, counted(&lab, before)), (Steered { passed: false, socket: 0 }, vec![Reason::AssignFailed]));
}

/// Why the cases below are not in the table above.
#[test]
fn the_kernel_runs_no_arrival_over_a_link() {
    let lab = lab("packets-steer-link");
    let (from, to) = (SocketAddr::new(ip(FAMILIES[0].pod), 40_000), SocketAddr::new(ip(FAMILIES[0].caller), PORT));
    match lab.steer(&Arrival { proto: TCP, from, to, ifindex: 1 }) {
        Err(e) => {
            let cause = e.source().and_then(|c| c.downcast_ref::<io::Error>()).and_then(io::Error::raw_os_error);
            // EINVAL; E2BIG where the field is not known at all.
            assert!(matches!(cause, Some(22 | 7)), "{e}: {cause:?}");
        }
        Ok(seen) => {
            println!("this kernel does: what a pod dials can be in the table");
            assert_eq!(seen, Steered { passed: false, socket: 0 }, "without a listener for what it dials");
        }
    }
}

fn run(command: &str) {
    let words: Vec<&str> = command.split(' ').collect();
    assert!(Command::new(words[0]).args(&words[1..]).status().expect(command).success(), "{command}");
}

/// The calling thread is in the pod's namespace afterwards, which is as the plugin makes it: what has the mark is looped over
/// `lo`. Nothing else has a way out.
fn enter_pod(lab: &Lab) -> Netns {
    unshare(Unshare { net: true, ..Unshare::default() }).expect("namespace");
    machines::loopback_up().expect("lo");
    for (f, (v, all)) in FAMILIES.into_iter().zip([("-4", "0.0.0.0/0"), ("-6", "::/0")]) {
        run(&format!("ip {v} addr add {} dev lo{}", f.pod, if v == "-6" { " nodad" } else { "" }));
        run(&format!("ip {v} rule add fwmark {CAPTURE_MARK} lookup {CAPTURE_TABLE} pref 10"));
        run(&format!("ip {v} route add local {all} dev lo src {} table {CAPTURE_TABLE}", f.pod));
    }
    let pod = Netns::current().expect("namespace");
    lab.attach(&pod);
    pod
}

/// Flags of the pod; whether its sidecar listens; mark; to where; who takes it; what is counted.
type Outbound<'a> = (u32, bool, u32, &'a str, u16, Taker, Option<Reason>);

#[test]
fn what_a_pod_dials_itself() {
    use Taker::{App, Nobody, Sidecar};
    if !since(5, 17) {
        return println!("before Linux 5.17 nothing is captured");
    }
    const MARKED: u32 = CAPTURE_MARK;
    let lab = lab("packets-steer-out");
    let pod = enter_pod(&lab);
    for f in FAMILIES {
        let own = loopback(f).to_string();
        let app = listener(ip(f.pod));
        let near = app.local_addr().expect("address").port();
        let looped = listener(loopback(f));
        let within = looped.local_addr().expect("address").port();
        let sidecar = listener(loopback(f));
        sock::set_transparent(sidecar.as_fd(), sidecar.local_addr().expect("address").is_ipv6()).expect("option");
        let cases: &[Outbound] = &[
            (POD_MESHED, true, MARKED, f.caller, 443, Sidecar, Some(Reason::SteeredOutbound)),
            (POD_MESHED, true, MARKED, f.second, PORT, Sidecar, Some(Reason::SteeredOutbound)),
            (POD_MESHED, true, MARKED, f.vip, 80, Sidecar, Some(Reason::SteeredOutbound)),
            // Ports that are excluded are those of the pod, not of whom it dials.
            (POD_MESHED, true, MARKED, f.caller, EXCLUDED, Sidecar, Some(Reason::SteeredOutbound)),
            (POD_MESHED, true, MARKED, f.caller, ADMIN_PORT, Sidecar, Some(Reason::SteeredOutbound)),
            (POD_MESHED, false, MARKED, f.caller, 443, Nobody, Some(Reason::DroppedOutbound)),
            (0, true, MARKED, f.caller, 443, Nobody, None),
            // Within the pod.
            (POD_MESHED, true, 0, f.pod, near, App, None),
            (POD_MESHED, false, MARKED, f.pod, near, App, None),
            (POD_MESHED, true, 0, &own, within, App, None),
        ];
        for case @ (flags, listens, mark, to, port, taker, reason) in cases {
            set_flags(&lab, f.pod, *flags);
            let key = ListenKey { addr: addr(ip(f.pod)), direction: OUTBOUND };
            match listens {
                true => lab.listeners.set(&key, sidecar.as_fd()).expect("listener"),
                false => drop(lab.listeners.remove(&key).expect("listener")),
            }
            let before = REASONS.map(|r| lab.counter(r));
            let to = SocketAddr::new(ip(to), *port);
            let dialled = dial(to, *mark, if *taker == Nobody { SOON } else { PATIENCE });
            let who = match taker {
                Nobody => {
                    unanswered(dialled.expect_err("nobody takes it").kind());
                    None
                }
                Sidecar => Some(&sidecar),
                App if *to.ip().to_string() == own => Some(&looped),
                App => Some(&app),
            };
            if let Some(who) = who {
                let (taken, from) = who.accept().expect("accept");
                assert_eq!(taken.local_addr().expect("address"), to, "{case:?}: as it was dialled");
                assert_eq!(from.ip(), if *taker == App { to.ip() } else { ip(f.pod) }, "{case:?}");
            }
            assert_eq!(counted(&lab, before), reason.iter().copied().collect::<Vec<_>>(), "{case:?}");
        }
        // Without the mark nothing comes here; and datagrams are nobody's but whose they are.
        let before = REASONS.map(|r| lab.counter(r));
        let lost = dial(SocketAddr::new(ip(f.caller), 443), 0, PATIENCE).expect_err("no way").kind();
        assert_eq!(lost, ErrorKind::NetworkUnreachable);
        let datagrams = UdpSocket::bind(SocketAddr::new(ip(f.pod), 0)).expect("bind");
        datagrams.set_read_timeout(Some(SOON)).expect("timeout");
        socket2::SockRef::from(&datagrams).set_mark(MARKED).expect("mark");
        datagrams.connect(SocketAddr::new(ip(f.caller), 443)).expect("connect");
        datagrams.send(b"?").expect("send");
        unanswered(datagrams.recv(&mut [0]).expect_err("nobody").kind());
        assert_eq!(counted(&lab, before), []);
    }
    lab.detach(&pod);
}

/// Refused, or not even that: the kernel's refusal would be under the address that was dialled, which is not the pod's, and of
/// IPv4 it sends none such.
fn unanswered(how: ErrorKind) {
    assert!(matches!(how, ErrorKind::ConnectionRefused | ErrorKind::TimedOut | ErrorKind::WouldBlock), "{how}");
}

const PATIENCE: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_millis(200);

fn dial(to: SocketAddr, mark: u32, wait: Duration) -> io::Result<Socket> {
    let s = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    s.set_mark(mark)?;
    s.connect_timeout(&to.into(), wait)?;
    Ok(s)
}
