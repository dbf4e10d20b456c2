//! Given services, endpoints and a split, when pods and the node dial virtual addresses, then they reach the right
//! backends in the right shares, see the address they dialled, and notice nothing of the agent's death.

use crate::{
    capture::{inside, meshed, vip},
    ground::{Ground, NODE, REFUSED, TestPod, until},
    parts::canonical,
    placement,
};
use sluice_model::{
    AppProtocol, Backend, Endpoint, EndpointPort, EndpointSet, Mesh, Name, Node, Protocol, Resource, Route, RouteKind,
    Rule, Service, ServicePort,
};
use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

pub fn name(n: &str) -> Name {
    Name::new("shop", n)
}

pub fn service(n: &str, vips: &[&str]) -> Resource {
    let port = |protocol| ServicePort {
        name: "web".into(),
        protocol,
        port: 80,
        app_protocol: AppProtocol::Detect,
        node_port: None,
    };
    let virtual_ips = vips.iter().map(|v| v.parse().expect(v)).collect();
    Resource::Service(Service {
        name: name(n),
        virtual_ips,
        ports: vec![port(Protocol::Tcp), port(Protocol::Udp)],
        ..Service::default()
    })
}

pub fn endpoints(n: &str, pods: &[&TestPod]) -> Resource {
    let addresses: Vec<IpAddr> = pods.iter().flat_map(|p| &p.addresses).copied().collect();
    backends(n, NODE, &addresses)
}

/// The same of pods on a node, by their addresses.
pub fn backends(n: &str, node: &str, addresses: &[IpAddr]) -> Resource {
    let port = |protocol| EndpointPort { name: "web".into(), protocol, port: 8080 };
    let endpoint = |address: &IpAddr| Endpoint {
        address: *address,
        ready: true,
        node: node.into(),
        zone: String::new(),
        draining: false,
        workload: None,
        hostname: None,
        mesh: Mesh::Plain,
        ports: vec![port(Protocol::Tcp), port(Protocol::Udp)],
    };
    let endpoints = addresses.iter().map(endpoint).collect();
    Resource::EndpointSet(EndpointSet { name: name(n), endpoints })
}

pub fn node() -> Resource {
    let pod_cidrs = vec!["10.244.1.0/24".to_owned(), "fd00:1::/64".to_owned()];
    let addresses = vec!["192.168.77.1".parse().expect("address")];
    Resource::Node(Node { name: Name::cluster(NODE), addresses, pod_cidrs, zone: "a".into(), ready: true })
}

fn split(parts: &[(&str, u32)]) -> Resource {
    let backend =
        |(s, weight): &(&str, u32)| Backend { service: name(s), port: 80, weight: *weight, ..Backend::default() };
    Resource::Route(Route {
        name: name("split"),
        kind: RouteKind::Http,
        parent: name("web"),
        parent_port: None,
        created_s: 1,
        generation: 1,
        rules: vec![Rule { backends: parts.iter().map(backend).collect(), ..Rule::default() }],
    })
}

/// Answers every TCP connection and datagram with the pod's name.
pub fn serve(pod: &TestPod) {
    for any in ["0.0.0.0:8080", "[::]:8080"] {
        let bind = || {
            let v6only = |s: &socket2::Socket| if any.starts_with('[') { s.set_only_v6(true) } else { Ok(()) };
            let make = |kind| -> io::Result<socket2::Socket> {
                let address: SocketAddr = any.parse().expect(any);
                let s = socket2::Socket::new(socket2::Domain::for_address(address), kind, None)?;
                v6only(&s)?;
                s.bind(&address.into())?;
                Ok(s)
            };
            let tcp = make(socket2::Type::STREAM)?;
            tcp.listen(1024)?;
            Ok::<_, io::Error>((TcpListener::from(tcp), UdpSocket::from(make(socket2::Type::DGRAM)?)))
        };
        let (tcp, udp) = pod.netns.run(bind).expect("run").expect("bind");
        let (a, b) = (pod.name.clone(), pod.name.clone());
        thread::spawn(move || {
            for mut c in tcp.incoming().flatten() {
                let _ = c.write_all(a.as_bytes());
            }
        });
        thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(b.as_bytes(), from);
            }
        });
    }
}

/// The answer of whoever is reached, which must look like the address that was dialled.
pub fn ask(to: SocketAddr) -> io::Result<String> {
    let mut c = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    assert_eq!(canonical(c.peer_addr()?), canonical(to), "the peer is shown as it was dialled");
    c.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut answer = String::new();
    c.read_to_string(&mut answer)?;
    Ok(answer)
}

pub fn ask_udp(to: SocketAddr, connected: bool) -> io::Result<String> {
    let s = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    s.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut buffer = [0; 64];
    let (n, from) = if connected {
        s.connect(to)?;
        assert_eq!(canonical(s.peer_addr()?), canonical(to));
        s.send(b"?")?;
        (s.recv(&mut buffer)?, to)
    } else {
        s.send_to(b"?", to)?;
        s.recv_from(&mut buffer)?
    };
    assert_eq!(canonical(from), canonical(to), "the answer comes from where the question went");
    Ok(String::from_utf8_lossy(&buffer[..n]).into_owned())
}

/// AF_INET, AF_INET6 with a mapped address, and IPv6.
pub const DIALS: [&str; 3] = ["10.96.0.1:80", "[::ffff:10.96.0.1]:80", "[fd00:96::1]:80"];
const NOBODY: &str = "10.96.0.3:80";

pub fn story(ground: &Ground) {
    let [b1, b2, b3, client] = ["b1", "b2", "b3", "client"].map(|n| ground.pod(n));
    [&b1, &b2, &b3].into_iter().for_each(serve);
    let mut all = vec![
        node(),
        service("web", &["10.96.0.1", "fd00:96::1"]),
        endpoints("web", &[&b1, &b2]),
        service("web-2", &["10.96.0.2"]),
        endpoints("web-2", &[&b3]),
        service("nobody", &["10.96.0.3"]),
    ];
    ground.apply(all.clone());
    every_kind_of_socket(&client, &["b1", "b2"]);
    choices(&client, [&b1, &b2]);
    nobody_refuses(&client);
    resolver_on_the_gateway(&client);

    // A backend without endpoints keeps its share, and refuses it.
    all.push(split(&[("web", 4), ("web-2", 2), ("nobody", 2)]));
    ground.apply(all.clone());
    shares(&client, &[("b1", 0.25), ("b2", 0.25), ("b3", 0.25), (NOT_TAKEN, 0.25)]);

    all.pop();
    all.push(split(&[("web", 3), ("web-2", 1)]));
    ground.apply(all.clone());
    shares(&client, &[("b1", 0.375), ("b2", 0.375), ("b3", 0.25)]);
    agent_dies_under_load(ground, &client);
    an_agent_that_starts_holds_up_no_pod(ground);

    all.pop();
    all.push(split(&[("web", 0), ("web-2", 1)]));
    ground.apply(all.clone());
    shares(&client, &[("b3", 1.0)]);
    placement::story(ground, &client, [&b1, &b2, &b3]);
    ground.apply(all.clone());
    drift_is_repaired(&client);
    a_pod_of_a_damaged_lease_goes_on(&client, &b1);
    drift_of_a_registration_is_repaired(ground, &all);
    a_refusal_is_taken_back(ground, &all);
    [b1, b2, b3, client].into_iter().for_each(|p| ground.end_pod(p));
    ground.apply(vec![node()]);
}

fn every_kind_of_socket(client: &TestPod, expected: &[&str]) {
    for dial in DIALS {
        let to: SocketAddr = dial.parse().expect(dial);
        let from_pod = || (ask(to), ask_udp(to, true), ask_udp(to, false));
        let (tcp, udp, unconnected) = client.netns.run(from_pod).expect("run");
        let from_node = (ask(to), ask_udp(to, true), ask_udp(to, false));
        for answer in [tcp, udp, unconnected, from_node.0, from_node.1, from_node.2] {
            let answer = answer.unwrap_or_else(|e| panic!("{dial}: {e}"));
            assert!(expected.contains(&answer.as_str()), "{dial} reached {answer}");
        }
    }
}

fn nobody_refuses(client: &TestPod) {
    let to: SocketAddr = NOBODY.parse().expect("address");
    let refused =
        client.netns.run(|| (TcpStream::connect(to).err(), ask_udp(to, true).err(), ask_udp(to, false).err()));
    let (tcp, udp, unconnected) = refused.expect("run");
    for e in [tcp, udp, unconnected] {
        assert_eq!(e.expect("no backend").kind(), io::ErrorKind::ConnectionRefused);
    }
}

fn resolver_on_the_gateway(client: &TestPod) {
    let resolver = UdpSocket::bind("169.254.1.1:53").expect("bind the gateway address");
    thread::spawn(move || {
        let mut buffer = [0; 64];
        let (_, from) = resolver.recv_from(&mut buffer).expect("a question");
        resolver.send_to(b"resolver", from).expect("answer");
    });
    let answer = client.netns.run(|| ask_udp("10.96.0.10:53".parse().expect("address"), false));
    assert_eq!(answer.expect("run").expect("an answer"), "resolver");
}

/// Stands for a pod's name where a connection was refused.
const NOT_TAKEN: &str = "refused";

/// Five standard deviations: wrong by chance once in some million runs.
fn shares(client: &TestPod, expected: &[(&str, f64)]) {
    const N: u32 = 4000;
    let to: SocketAddr = DIALS[0].parse().expect("address");
    let seen = client.netns.run(|| {
        let mut seen = HashMap::<String, u32>::new();
        for _ in 0..N {
            let answer = ask(to).unwrap_or_else(|e| {
                assert_eq!(e.kind(), std::io::ErrorKind::ConnectionRefused, "{e}");
                NOT_TAKEN.to_owned()
            });
            *seen.entry(answer).or_default() += 1;
        }
        seen
    });
    let seen = seen.expect("run");
    println!("shares of {N}: {seen:?}, wanted {expected:?}");
    assert_eq!(seen.len(), expected.len());
    for (pod, share) in expected {
        let (mean, deviation) = (f64::from(N) * share, (f64::from(N) * share * (1.0 - share)).sqrt());
        let got = f64::from(seen[*pod]);
        assert!((got - mean).abs() <= 5.0 * deviation, "{pod}: {got} of {N}, expected {mean} ± {deviation}");
    }
}

/// χ² over many choices of the socket hook, between two backends. Connecting a UDP socket costs nobody a packet; to whom
/// the kernel has connected it is in its table of sockets, since `getpeername` says what the application dialled.
fn choices(client: &TestPod, backends: [&TestPod; 2]) {
    const N: usize = 100_000;
    const AT_ONCE: usize = 500;
    // The quantile for one degree of freedom that chance passes once in a million times: the square of 4.892, that of the
    // normal distribution (two-sided).
    const CRITICAL: f64 = 23.93;
    let to: SocketAddr = DIALS[0].parse().expect("address");
    let connect = |_| {
        let s = UdpSocket::bind("0.0.0.0:0").expect("bind");
        s.connect(to).expect("connect");
        s
    };
    let peers = || {
        let _open: Vec<_> = (0..AT_ONCE).map(connect).collect();
        let table = std::fs::read_to_string("/proc/thread-self/net/udp").expect("the kernel's table");
        table.lines().filter_map(peer).filter(|p| p.port() == 8080).collect::<Vec<_>>()
    };
    let all = || (0..N / AT_ONCE).flat_map(|_| peers()).collect::<Vec<_>>();
    let chosen = client.netns.run(all).expect("run");
    assert_eq!(chosen.len(), N);
    let counted = backends.map(|b| chosen.iter().filter(|p| p.ip() == b.ip()).count());
    let mean = N as f64 / 2.0;
    let chi: f64 = counted.iter().map(|n| (*n as f64 - mean).powi(2) / mean).sum();
    println!("{N} choices at the socket: {counted:?}, χ² {chi:.2} of {CRITICAL}");
    assert_eq!(counted.iter().sum::<usize>(), N, "nobody else is chosen");
    assert!(chi < CRITICAL);
}

/// Of a line of /proc/net/udp: the address as the machine stores it, the port as people write it, both in hex.
fn peer(line: &str) -> Option<SocketAddr> {
    let (address, port) = line.split_whitespace().nth(2)?.split_once(':')?;
    let address = u32::from_str_radix(address, 16).ok()?.to_ne_bytes();
    Some(SocketAddr::new(IpAddr::from(address), u16::from_str_radix(port, 16).ok()?))
}

fn agent_dies_under_load(ground: &Ground, client: &TestPod) {
    let (stop, made, failed) = (AtomicBool::new(false), AtomicU32::new(0), Arc::new(AtomicU32::new(0)));
    let to: SocketAddr = DIALS[0].parse().expect("address");
    thread::scope(|s| {
        s.spawn(|| {
            let load = || {
                while !stop.load(Ordering::Relaxed) {
                    match ask(to) {
                        Ok(_) => made.fetch_add(1, Ordering::Relaxed),
                        Err(_) => failed.fetch_add(1, Ordering::Relaxed),
                    };
                }
            };
            client.netns.run(load).expect("run");
        });
        for round in 0..5 {
            let before = made.load(Ordering::Relaxed);
            ground.kill_agent();
            if round % 2 == 1 {
                leave_another_layout();
            }
            until("connections go on without an agent", || made.load(Ordering::Relaxed) > before + 200);
            ground.start_agent();
            until("the agent is back", || std::path::Path::new(crate::ground::ACK).exists());
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("agent killed 5 times: {made:?} connections, {failed:?} failed");
    assert_eq!(failed.load(Ordering::Relaxed), 0);
}

/// The plugin has the lock within a part of the time that the agent takes to start: the programs are verified without it.
fn an_agent_that_starts_holds_up_no_pod(ground: &Ground) {
    ground.kill_agent();
    let started = AtomicBool::new(false);
    let begun = std::time::Instant::now();
    let (longest, took) = thread::scope(|s| {
        let waits = s.spawn(|| {
            let mut longest = Duration::ZERO;
            while !started.load(Ordering::Relaxed) {
                let begun = std::time::Instant::now();
                drop(sluice_cni::store::Lock::take(std::path::Path::new(sluice_cni::STATE_DIR)).expect("lock"));
                longest = longest.max(begun.elapsed());
                thread::sleep(Duration::from_millis(1));
            }
            longest
        });
        ground.start_agent();
        until("the agent is back", || std::path::Path::new(crate::ground::ACK).exists());
        let took = begun.elapsed();
        started.store(true, Ordering::Relaxed);
        (waits.join().expect("waits"), took)
    });
    println!("the plugin waited {longest:?} at most while an agent started within {took:?}");
    assert!(longest < took / 2);
}

/// As if the agent before had been of a release whose services had another shape.
fn leave_another_layout() {
    let dir = sluice_ebpf::maps::pin_dir(std::path::Path::new("/sys/fs/bpf"));
    let other = dir.with_file_name("v0");
    std::fs::rename(dir, &other).expect("rename");
    for map in ["SERVICES", "LOCALS"] {
        std::fs::remove_file(other.join(map)).expect("unpin");
    }
}

fn drift_is_repaired(client: &TestPod) {
    use sluice_ebpf::maps::{PodMaps, ServiceMaps, pin_dir};
    use sluice_netlink::{Connection, kernel, plan};
    let dir = pin_dir(std::path::Path::new("/sys/fs/bpf"));
    let services = ServiceMaps::open(&dir).expect("maps").services;
    let (key, value) = services.entries().expect("entries")[0];
    services.remove(&key).expect("damage");
    until("the service entry is back", || services.get(&key).expect("read").is_some_and(|v| v.groups == value.groups));
    let pods = PodMaps::open(&dir).expect("maps").pods;
    let cookie = client.netns.cookie().expect("cookie");
    pods.remove(&cookie).expect("damage");
    until("the pod's entry is back", || pods.get(&cookie).expect("read").is_some());
    let mut connection = Connection::open().expect("connection");
    let to = plan::Prefix::host(client.ip());
    let find =
        |c: &mut Connection| kernel::read_routes(c).expect("routes").into_iter().find(|r| r.to == to && r.table == 254);
    let route = find(&mut connection).expect("the pod's route");
    kernel::apply(&mut connection, &[plan::Operation::RemoveRoute(route)]).expect("damage");
    until("the pod's route is back", || find(&mut connection).is_some());
    std::fs::remove_file("/sys/fs/bpf/sluice/v1/links/connect4").expect("damage");
    let to: SocketAddr = DIALS[0].parse().expect("address");
    until("connect is translated again", || client.netns.run(|| ask(to)).expect("run").is_ok());
}

/// What cannot be read is no reason to cut off who runs: no entry of the pod is taken for a stray, until DEL.
fn a_pod_of_a_damaged_lease_goes_on(client: &TestPod, backend: &TestPod) {
    use sluice_ebpf::maps::{PodMaps, ServiceMaps, pin_dir};
    let boots = std::fs::read_dir(std::path::Path::new(sluice_cni::STATE_DIR).join("leases")).expect("leases");
    let mut leases = boots.flatten().flat_map(|boot| std::fs::read_dir(boot.path()).into_iter().flatten().flatten());
    let of = |e: &std::fs::DirEntry| e.file_name().to_string_lossy().ends_with(&format!("@{}@eth0", backend.name));
    let lease = leases.find(of).expect("the pod's lease").path();
    let text = std::fs::read(&lease).expect("read");
    std::fs::write(&lease, "{").expect("damage");
    // The repair of services comes before that of pods: when it was done twice, pods were looked at in between.
    let dir = pin_dir(std::path::Path::new("/sys/fs/bpf"));
    let services = ServiceMaps::open(&dir).expect("maps").services;
    for _ in 0..2 {
        let (key, _) = services.entries().expect("entries")[0];
        services.remove(&key).expect("damage");
        until("the service entry is back", || services.get(&key).expect("read").is_some());
    }
    let pods = PodMaps::open(&dir).expect("maps");
    assert!(pods.pods.get(&backend.netns.cookie().expect("cookie")).expect("read").is_some());
    assert!(pods.addrs.get(&sluice_ebpf::addr(backend.ip())).expect("read").is_some());
    let to = SocketAddr::new(backend.ip(), 8080);
    assert_eq!(client.netns.run(|| ask(to)).expect("run").expect("an answer"), backend.name);
    std::fs::write(&lease, text).expect("restore");
}

/// A sidecar that is not exempt any more would be given its own connections, for ever.
fn drift_of_a_registration_is_repaired(ground: &Ground, all: &[Resource]) {
    use sluice_ebpf::{
        common::map,
        maps::{Listeners, PodMaps, pin_dir},
    };
    let app = ground.pod("drift");
    ground.apply(all.iter().cloned().chain(meshed(&app)).collect());
    let sidecar = ground.sidecar(&app);
    let captured = || inside(&app, vip("10.1.2.3:4")).is_ok_and(|a| a == "out 10.1.2.3:4");
    let relayed = || inside(&app, vip(DIALS[0])).is_ok_and(|a| a == "relayed b3");
    until("the sidecar takes connections", captured);
    let dir = pin_dir(std::path::Path::new("/sys/fs/bpf"));
    let (pods, cookie) = (PodMaps::open(&dir).expect("maps").pods, app.netns.cookie().expect("cookie"));
    let exempt = || pods.get(&cookie).expect("read").map(|p| p.sidecar_cgroup).filter(|c| *c != 0);
    let before = exempt().expect("registered");
    pods.remove(&cookie).expect("damage");
    until("the pod's entry is back with its exemption", || exempt() == Some(before));
    assert!(captured() && relayed(), "the app is captured, its sidecar is not");

    let listeners = || Listeners::open(&dir).and_then(|l| Ok((l.keys()?, l)));
    let (keys, map) = listeners().expect("listeners");
    assert_eq!(keys.len(), 4, "two families, two directions");
    keys.iter().for_each(|key| assert!(map.remove(key).expect("damage")));
    until("the listeners are back", || listeners().is_ok_and(|(k, _)| k.len() == keys.len()));
    assert!(captured() && relayed(), "connections come to the sidecar");

    std::fs::remove_file(dir.join(map::LISTENERS)).expect("damage");
    until("the listeners are in the map made anew", || listeners().is_ok_and(|(k, _)| k.len() == keys.len()));
    until("connections come to the sidecar", || captured() && relayed());
    ground.kill_sidecar(sidecar);
    ground.end_pod(app);
}

/// A view that cannot be brought into force is refused; when it can, it is, without another view.
fn a_refusal_is_taken_back(ground: &Ground, all: &[Resource]) {
    let leases = std::path::Path::new(sluice_cni::STATE_DIR).join("leases");
    let aside = leases.with_extension("aside");
    let _ = std::fs::remove_file(REFUSED);
    std::fs::rename(&leases, &aside).expect("hide the leases");
    ground.publish(all.to_vec());
    until("the view is refused", || std::fs::read_to_string(REFUSED).is_ok_and(|why| why.contains("leases")));
    std::fs::rename(&aside, &leases).expect("the leases are back");
    ground.in_force();
}
