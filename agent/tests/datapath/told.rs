//! Given somebody who follows the node, when pods call, then each call that begins or is refused at a socket is one event,
//! with its namespace, what was dialled and where it leads; and nothing is written while nobody asks.

use crate::{
    balance::{ask, ask_udp, endpoints, node, serve, service},
    capture::{balancer, inside, meshed, vip},
    ground::{Ground, TestPod, until},
};
use sluice_ebpf::{
    common::{Reason, TCP, UDP, WATCH_DROPS, WATCH_FLOWS, hook},
    events::{Decoded, EventReader},
    ip,
    maps::pin_dir,
    settings::SettingsMap,
};
use std::{
    net::{SocketAddr, TcpStream, UdpSocket},
    path::Path,
    time::Duration,
};

const BOTH: u32 = WATCH_DROPS | WATCH_FLOWS;

struct Follower {
    settings: SettingsMap,
    reader: EventReader,
}

/// Reason, hook, whether it ends there, protocol, who was dialled, where that leads.
type Line = (Reason, u8, bool, u8, SocketAddr, SocketAddr);

impl Follower {
    fn new() -> Self {
        let dir = pin_dir(Path::new("/sys/fs/bpf"));
        let mut reader = EventReader::open(&dir).expect("events");
        reader.discard();
        Self { settings: SettingsMap::open(&dir).expect("settings"), reader }
    }

    /// What is told of the pod's calls, and of connections to it, while `work` is done.
    fn of(&mut self, pod: &TestPod, bits: u32, work: impl FnOnce()) -> Vec<Line> {
        self.settings.set_flags(BOTH, bits).expect("watch");
        work();
        self.settings.set_flags(BOTH, 0).expect("watch no more");
        let cookie = pod.netns.cookie().expect("cookie");
        let end = |a, port_be| SocketAddr::new(ip(a).to_canonical(), u16::from_be(port_be));
        let mut lines = vec![];
        while let Some(decoded) = self.reader.next_record() {
            let Decoded::Known(e, reason) = decoded else { panic!("{decoded:?}") };
            let of_pod = e.netns == cookie || e.hook == hook::LISTENER && pod.addresses.contains(&ip(e.before.dst));
            if !of_pod {
                continue;
            }
            assert!(e.time_ns > 0 && e.len == 0 && e.ifindex == 0 && e.before.proto == e.after.proto, "{e:?}");
            assert_eq!((e.before.src, e.before.sport_be), (e.after.src, e.after.sport_be), "{e:?}");
            let (before, after) = (end(e.before.dst, e.before.dport_be), end(e.after.dst, e.after.dport_be));
            lines.push((reason, e.hook, e.dropped != 0, e.before.proto, before, after));
        }
        lines
    }
}

/// Dials are canonical: a mapped address is shown as the IPv4 address that it is.
fn dialled(text: &str) -> SocketAddr {
    crate::parts::canonical(vip(text))
}

pub fn story(ground: &Ground) {
    let [backend, client, app] = ["tb", "tc", "ta"].map(|n| ground.pod(n));
    serve(&backend);
    let mut all = vec![
        node(),
        service("web", &["10.96.0.1", "fd00:96::1"]),
        endpoints("web", &[&backend]),
        service("nobody", &["10.96.0.3", "fd00:96::3"]),
        balancer("closed", [192, 0, 2, 80].into(), "203.0.113.0/24"),
        endpoints("closed", &[&backend]),
    ];
    all.extend(meshed(&app));
    ground.apply(all);
    let mut follower = Follower::new();
    sockets(&mut follower, &client, &backend);
    sidecars(ground, &mut follower, &client, &app);
    [backend, client, app].into_iter().for_each(|p| ground.end_pod(p));
    ground.apply(vec![node()]);
}

fn sockets(follower: &mut Follower, client: &TestPod, backend: &TestPod) {
    let socket = hook::SOCKET;
    let inside = |work: &(dyn Fn() + Sync)| client.netns.run(work).expect("run");
    for (dial, to) in [("10.96.0.1:80", 0), ("[::ffff:10.96.0.1]:80", 0), ("[fd00:96::1]:80", 1)] {
        let to = SocketAddr::new(backend.addresses[to], 8080);
        let calls = || {
            ask(vip(dial)).expect(dial);
            ask_udp(vip(dial), true).expect(dial);
        };
        let told = follower.of(client, BOTH, || inside(&calls));
        let translated = |proto| (Reason::Translated, socket, false, proto, dialled(dial), to);
        assert_eq!(told, [TCP, UDP].map(translated), "{dial}");
        // Three datagrams of one socket are one flow.
        let datagrams = || {
            let s = UdpSocket::bind(if vip(dial).is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).expect("bind");
            (0..3).for_each(|_| assert_eq!(s.send_to(b"?", vip(dial)).expect("send"), 1));
        };
        let told = follower.of(client, BOTH, || inside(&datagrams));
        assert_eq!(told, [(Reason::TranslatedDatagram, socket, false, UDP, dialled(dial), to)], "{dial}");
    }
    for dial in ["10.96.0.3:80", "[fd00:96::3]:80"] {
        let calls = || {
            ask(vip(dial)).expect_err(dial);
            ask_udp(vip(dial), true).expect_err(dial);
            ask_udp(vip(dial), false).expect_err(dial);
        };
        let told = follower.of(client, WATCH_DROPS, || inside(&calls));
        let refused = |proto| (Reason::NoBackend, socket, true, proto, dialled(dial), dialled(dial));
        assert_eq!(told, [TCP, UDP, UDP].map(refused), "{dial}");
    }
    const CLOSED: &str = "192.0.2.80:80";
    let told = follower.of(client, WATCH_DROPS, || inside(&|| drop(ask(vip(CLOSED)).expect_err("not for it"))));
    assert_eq!(told, [(Reason::RefusedSourceRange, socket, true, TCP, dialled(CLOSED), dialled(CLOSED))]);
    // Nobody asks; who asks for drops is not told of what goes on; what is no service's is no event.
    let calls = || {
        ask(vip("10.96.0.1:80")).expect("an answer");
        ask(SocketAddr::new(backend.ip(), 8080)).expect("an answer");
    };
    for bits in [0, WATCH_DROPS] {
        assert_eq!(follower.of(client, bits, || inside(&calls)), [], "{bits}");
    }
    let told = follower.of(client, 0, || inside(&|| drop(ask(vip("10.96.0.3:80")).expect_err("nobody"))));
    assert_eq!(told, []);
}

fn sidecars(ground: &Ground, follower: &mut Follower, client: &TestPod, app: &TestPod) {
    let (out, quick) = (vip("10.1.2.3:4"), Duration::from_millis(300));
    let into = SocketAddr::new(app.ip(), 1234);
    let call_in = || drop(client.netns.run(|| TcpStream::connect_timeout(&into, quick)).expect("run"));
    let told = follower.of(app, WATCH_DROPS, || drop(inside(app, out).expect_err("no sidecar")));
    assert_eq!(told, [(Reason::RefusedNoSidecar, hook::SOCKET, true, TCP, out, out)]);
    let told = follower.of(app, WATCH_DROPS, call_in);
    assert_eq!(told[0], (Reason::DroppedInbound, hook::LISTENER, true, TCP, into, into), "{told:?}");
    let sidecar = ground.sidecar(app);
    until("the sidecar takes connections", || inside(app, out).is_ok());
    let told = follower.of(app, BOTH, || drop(inside(app, out).expect("captured")));
    assert_eq!(told, [(Reason::Captured, hook::SOCKET, false, TCP, out, out)], "one connection, one event");
    let told = follower.of(app, BOTH, call_in);
    assert_eq!(told, [(Reason::SteeredInbound, hook::LISTENER, false, TCP, into, into)]);
    ground.kill_sidecar(sidecar);
}
