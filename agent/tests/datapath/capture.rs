//! Given meshed pods with sidecars, when apps dial anything, then their sidecars get it with the original destination;
//! in-pod calls, excluded ports and the sidecar's own connections are left alone; a sidecar that restarts refuses
//! nobody, and a pod whose sidecar stays away is closed.

use crate::{
    balance::{ask, endpoints, name, node, serve, service},
    ground::{EARLY, Ground, NODE, TestPod, said, sidecar_cgroup, until},
};
use sluice_model::{InboundMode, Policy, Resource, Service, Workload};
use sluice_wire::{
    DISCOVERY_SOCKET,
    handover::{KEEP_S, Message, SOCKET, recv, send},
};
use std::{
    io,
    io::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

const EXCLUDED: u16 = 9000;

pub fn meshed(pod: &TestPod) -> [Resource; 2] {
    let identity = "spiffe://cluster.local/ns/shop/sa/app".parse().expect("identity");
    let (name, uid) = (name(&pod.name), pod.uid());
    let workload = Workload {
        name: name.clone(),
        uid,
        node: NODE.into(),
        addresses: pod.addresses.clone(),
        identity,
        meshed: true,
        gateway: None,
    };
    let mode = InboundMode::Permissive;
    let policy = Policy { name, mode, excluded_ports: vec![EXCLUDED], ..Policy::default() };
    [Resource::Workload(workload), Resource::Policy(policy)]
}

pub fn inside(pod: &TestPod, to: SocketAddr) -> io::Result<String> {
    pod.netns.run(|| ask(to)).expect("run")
}

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

pub fn vip(text: &str) -> SocketAddr {
    text.parse().expect(text)
}

pub fn story(ground: &Ground) {
    let apps = ["app1", "app2", "app3"].map(|n| ground.pod(n));
    let [backend, plain] = ["backend", "plain"].map(|n| ground.pod(n));
    serve(&backend);
    let mut all = vec![node(), service("web", &["10.96.0.1", "fd00:96::1"]), endpoints("web", &[&backend])];
    all.push(balancer("closed", CLOSED, "203.0.113.0/24"));
    all.push(balancer("open", OPEN, &format!("{}/32", apps[0].ip())));
    all.push(endpoints("open", &[&backend]));
    all.extend(apps.iter().flat_map(meshed));
    ground.apply(all.clone());
    refused_without_sidecar(&apps[0], &plain);
    let mut sidecars = apps.each_ref().map(|a| ground.sidecar(a));
    for app in &apps {
        until("the sidecar takes connections", || inside(app, vip("10.1.2.3:4")).is_ok_and(|a| a == "out 10.1.2.3:4"));
    }
    directions(&apps, &plain);
    ten_thousand(ground, &apps, &all);
    sidecars[0] = restart_under_load(ground, &apps[0], &plain, sidecars[0]);
    agent_restart_keeps_capture(ground, &apps[1]);
    only_the_sidecar_is_handed_listeners(&apps[0]);
    sidecars[0] = idle_streams_keep_no_sidecar_out(ground, &apps[0], sidecars[0]);
    a_pod_whose_names_are_squatted_is_closed(ground, &apps[1]);
    early_pod_is_closed_from_the_start(ground);
    stays_away(ground, &apps[0], &plain, sidecars[0]);
    sidecars[1..].iter().for_each(|pid| ground.kill_sidecar(*pid));
    apps.into_iter().chain([backend, plain]).for_each(|p| ground.end_pod(p));
}

const CLOSED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 80);
const OPEN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 81);

pub fn balancer(n: &str, external: Ipv4Addr, range: &str) -> Resource {
    let Resource::Service(s) = service(n, &[]) else { unreachable!("a service") };
    let (external_ips, restricted_ips) = (vec![external.into()], vec![external.into()]);
    Resource::Service(Service { external_ips, restricted_ips, source_ranges: vec![range.parse().expect(range)], ..s })
}

fn refused_without_sidecar(app: &TestPod, plain: &TestPod) {
    let error = inside(app, vip("10.1.2.3:4")).expect_err("closed, not open");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    let to = at(app.ip(), 8080);
    let quick = Duration::from_millis(300);
    let inbound = plain.netns.run(|| TcpStream::connect_timeout(&to, quick)).expect("run");
    assert!(inbound.is_err(), "no way in either");
}

/// One answer for every connection, on whatever was bound.
fn answer(pod: &TestPod, bind: SocketAddr, text: &'static str) {
    let listener = pod.netns.run(|| TcpListener::bind(bind)).expect("run").expect("bind");
    thread::spawn(move || listener.incoming().flatten().for_each(|mut c| drop(c.write_all(text.as_bytes()))));
}

fn directions(apps: &[TestPod; 3], plain: &TestPod) {
    let app = &apps[0];
    // Outbound: addresses of services, of pods, of nobody; by every kind of socket. The app sees what it dialled.
    for dial in ["10.96.0.1:81", "[::ffff:10.96.0.1]:81", "[fd00:96::1]:81", "10.9.9.9:1", "[2001:db8::1]:443"] {
        let to = vip(dial);
        assert_eq!(inside(app, to).expect(dial), format!("out {}", crate::parts::canonical(to)), "{dial}");
    }
    // The sidecar would go to a load balancer's endpoints itself, past who may use its address.
    let denied = inside(app, at(CLOSED.into(), 80)).expect_err("in none of its source ranges");
    assert_eq!(denied.kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(inside(app, at(OPEN.into(), 80)).expect("in one"), "relayed backend");
    let denied = inside(&apps[1], at(OPEN.into(), 80)).expect_err("it is another's");
    assert_eq!(denied.kind(), io::ErrorKind::PermissionDenied);
    // The sidecar's own connection to a service is balanced.
    assert_eq!(inside(app, vip("10.96.0.1:80")).expect("relayed"), "relayed backend");
    assert_eq!(inside(app, vip("[fd00:96::1]:80")).expect("relayed"), "relayed backend");
    // Inbound: any port of the pod, in both families; excluded ports and the admin port reach the app.
    for ip in &app.addresses {
        assert_eq!(inside(plain, at(*ip, 1234)).expect("inbound"), format!("in {}", at(*ip, 1234)));
    }
    for port in [EXCLUDED, 15020] {
        answer(app, at(Ipv4Addr::UNSPECIFIED.into(), port), "the app");
        assert_eq!(inside(plain, at(app.ip(), port)).expect("excluded"), "the app");
    }
    // In-pod calls, by loopback and by the pod's own address.
    for ip in [Ipv4Addr::LOCALHOST.into(), app.ip()] {
        assert_eq!(inside(app, at(ip, EXCLUDED)).expect("in-pod"), "the app");
    }
    answer(app, at(app.ip(), 7000), "own address");
    assert_eq!(inside(app, at(app.ip(), 7000)).expect("in-pod"), "own address");
    // Between meshed pods: out at one, and what its sidecar dials comes in at the other.
    assert_eq!(inside(app, at(apps[1].ip(), 80)).expect("pod to pod"), format!("relayed in {}", at(apps[1].ip(), 80)));
    bound_to_a_device(app);
}

/// SO_BINDTODEVICE would walk past capture.
fn bound_to_a_device(app: &TestPod) {
    use std::io::Read;
    let to = vip("10.96.0.1:81");
    let dial = || {
        let s = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        s.bind_device(Some(b"eth0"))?;
        s.connect_timeout(&to.into(), Duration::from_secs(5))?;
        let mut answer = String::new();
        TcpStream::from(s).read_to_string(&mut answer)?;
        Ok::<_, io::Error>(answer)
    };
    assert_eq!(app.netns.run(dial).expect("run").expect("captured all the same"), format!("out {to}"));
}

/// While services and pods come and go.
fn ten_thousand(ground: &Ground, apps: &[TestPod; 3], all: &[Resource]) {
    const EACH: u32 = 3400;
    let (running, wrong) = (AtomicU32::new(3), AtomicU32::new(0));
    let begun = Instant::now();
    thread::scope(|s| {
        for (n, app) in apps.iter().enumerate() {
            let (running, wrong) = (&running, &wrong);
            s.spawn(move || {
                let dial = || {
                    for i in 0..EACH {
                        let to = match i % 3 {
                            0 => at(Ipv4Addr::new(10, 96, n as u8, (i % 251) as u8).into(), 1000 + (i % 5000) as u16),
                            1 => at(format!("fd00:96::{:x}", i + 1).parse().expect("address"), 2000 + (i % 99) as u16),
                            // Of another node: among this one's would be the caller itself.
                            _ => at(Ipv4Addr::new(10, 244, 9, (i % 200) as u8 + 20).into(), 81),
                        };
                        let said = ask(to);
                        if said.as_ref().ok() != Some(&format!("out {to}")) {
                            eprintln!("{to}: {said:?}");
                            wrong.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                };
                app.netns.run(dial).expect("run");
                running.fetch_sub(1, Ordering::Relaxed);
            });
        }
        let mut round = 0;
        while running.load(Ordering::Relaxed) > 0 {
            round += 1;
            let pod = ground.pod(&format!("churn{round}"));
            let mut more = all.to_vec();
            more.push(service("churn", &[&format!("10.96.7.{}", round % 200 + 1)]));
            more.push(endpoints("churn", &[&pod]));
            ground.apply(more);
            ground.end_pod(pod);
        }
        println!("{} captured connections in {:?}, {round} pods came and went", 3 * EACH, begun.elapsed());
    });
    ground.apply(all.to_vec());
    assert_eq!(wrong.load(Ordering::Relaxed), 0, "every original destination is right");
}

fn restart_under_load(ground: &Ground, app: &TestPod, plain: &TestPod, pid: u32) -> u32 {
    let (stop, made, refused, cut) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
    let (outward, inward) = (vip("10.96.0.1:81"), at(app.ip(), 1234));
    let mut pid = pid;
    thread::scope(|s| {
        for (from, to) in [(app, outward), (plain, inward)] {
            let (stop, made, refused, cut) = (&stop, &made, &refused, &cut);
            s.spawn(move || {
                let load = || {
                    while !stop.load(Ordering::Relaxed) {
                        match ask(to) {
                            Ok(a) if !a.is_empty() => made.fetch_add(1, Ordering::Relaxed),
                            // Accepted by the one that was killed: it cannot be answered any more.
                            Ok(_) => cut.fetch_add(1, Ordering::Relaxed),
                            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => cut.fetch_add(1, Ordering::Relaxed),
                            Err(e) => {
                                eprintln!("dialling {to}: {e}");
                                refused.fetch_add(1, Ordering::Relaxed)
                            }
                        };
                    }
                };
                from.netns.run(load).expect("run");
            });
        }
        for _ in 0..3 {
            let before = made.load(Ordering::Relaxed);
            until("load runs", || made.load(Ordering::Relaxed) > before + 300);
            ground.kill_sidecar(pid);
            pid = ground.sidecar(app);
            let before = made.load(Ordering::Relaxed);
            until("the next sidecar takes over", || made.load(Ordering::Relaxed) > before + 300);
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("sidecar killed 3 times: {made:?} answered, {cut:?} cut in flight, {refused:?} refused");
    assert_eq!(refused.load(Ordering::Relaxed), 0);
    assert!(cut.load(Ordering::Relaxed) <= 12, "only what was in flight is lost");
    pid
}

fn agent_restart_keeps_capture(ground: &Ground, app: &TestPod) {
    let (to, before) = (vip("10.96.0.1:81"), "out 10.96.0.1:81");
    ground.kill_agent();
    (0..200).for_each(|_| assert_eq!(inside(app, to).expect("without an agent"), before));
    ground.start_agent();
    (0..200).for_each(|_| assert_eq!(inside(app, to).expect("with a new agent"), before));
    assert_eq!(inside(app, vip("10.96.0.1:80")).expect("the sidecar is still exempt"), "relayed backend");
}

/// Whoever holds the listeners takes the pod's connections.
fn only_the_sidecar_is_handed_listeners(app: &TestPod) {
    let connect = || sluice_netlink::sock::connect_abstract_in(&app.netns, SOCKET);
    until("the restarted agent serves the pod", || connect().is_ok());
    let stream = connect().expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    let _ = send(stream.as_fd(), &Message::Take); // the stream may be closed already
    match recv(stream.as_fd()) {
        Ok(Some(Message::Err(why))) => assert!(why.contains("is not the pod's sidecar"), "{why}"),
        other => panic!("another process of the pod got {other:?}"),
    }
}

/// Even of the sidecar's own container.
fn idle_streams_keep_no_sidecar_out(ground: &Ground, app: &TestPod, pid: u32) -> u32 {
    ground.kill_sidecar(pid);
    let idler = ground.process(app, "idler", &sidecar_cgroup(&app.name));
    until("all places are taken", || said("idler").exists());
    let pid = ground.sidecar(app);
    until("the next sidecar takes over", || inside(app, vip("10.96.0.1:81")).is_ok());
    ground.kill_sidecar(idler);
    pid
}

fn a_pod_whose_names_are_squatted_is_closed(ground: &Ground, app: &TestPod) {
    let to = vip("10.96.0.1:81");
    ground.kill_agent();
    let squatter = ground.process(app, "squatter", &format!("app-{}", app.name));
    until("the name is taken", || said("squatter").exists());
    assert!(inside(app, to).is_ok(), "nothing changes without an agent");
    ground.start_agent();
    until("the pod is closed", || inside(app, to).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused));
    // Of the two sockets both are served or neither: each try to have both ends within moments.
    until("nobody listens in the agent's name", || {
        sluice_netlink::sock::connect_abstract_in(&app.netns, DISCOVERY_SOCKET).is_err()
    });
    ground.kill_sidecar(squatter);
    until("the sidecar has registered again", || inside(app, to).is_ok());
    assert_eq!(inside(app, vip("10.96.0.1:80")).expect("and is exempt"), "relayed backend");
}

/// The pod is not in the snapshot; the agent was told between its sandbox and its first container.
fn early_pod_is_closed_from_the_start(ground: &Ground) {
    let pod = ground.pod("early");
    std::fs::write(EARLY, pod.uid()).expect("tell the agent");
    until("the early pod is closed", || {
        inside(&pod, vip("10.1.2.3:4")).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
    });
    answer(&pod, at(Ipv4Addr::UNSPECIFIED.into(), EXCLUDED), "the app");
    assert_eq!(ask(at(pod.ip(), EXCLUDED)).expect("an excluded port is open"), "the app");
    ground.end_pod(pod);
}

/// Kept listeners hold connections for the bound, not longer.
fn stays_away(ground: &Ground, app: &TestPod, plain: &TestPod, pid: u32) {
    until("load ran", || inside(app, vip("10.96.0.1:81")).is_ok());
    ground.kill_sidecar(pid);
    let begun = Instant::now();
    let to = vip("10.96.0.1:81");
    let dial = || TcpStream::connect_timeout(&to, Duration::from_secs(1)).map(drop);
    assert!(app.netns.run(dial).expect("run").is_ok(), "waits in the backlog");
    until("the pod is closed", || {
        app.netns.run(dial).expect("run").is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
    });
    let closed = begun.elapsed();
    println!("closed {closed:?} after the sidecar's end");
    assert!(closed >= Duration::from_secs(KEEP_S - 1) && closed < Duration::from_secs(KEEP_S + 5));
    let to = at(app.ip(), 1234);
    let quick = Duration::from_millis(300);
    assert!(plain.netns.run(|| TcpStream::connect_timeout(&to, quick)).expect("run").is_err(), "closed inward too");
    // A late sidecar opens it again.
    let pid = ground.sidecar(app);
    until("a new sidecar opens the pod", || inside(app, vip("10.96.0.1:81")).is_ok());
    ground.kill_sidecar(pid);
}
