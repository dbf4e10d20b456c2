//! The plugin's binary against real namespaces and maps. Each test has a node of its own: a network namespace, a BPF
//! file system, a cgroup and a state folder, all removed at the end. Needs root.

mod asked;
mod chain;
mod node;
mod random;

use node::{Node, address};
use serde_json::{Value, json};
use sluice_ebpf::{
    common::{POD_MESHED, map},
    loader,
    maps::{HashMap, padded, pin_dir, unpadded},
};
use sluice_netlink::{Connection, Netns, kernel, link};
use std::{
    collections::BTreeSet,
    net::{TcpListener, TcpStream},
    time::{Duration, Instant},
};

#[test]
fn a_pod_from_add_to_del() {
    let node = Node::new("life", true);
    let pod = node.pod("a");
    let path = Some(pod.path());
    let (_, answer) = node.verb("CHECK", "a", path);
    assert_eq!(answer["code"], 3, "not added yet: {answer}");
    node.maps().intents.set(&padded("uid-a"), &POD_MESHED).expect("intent");

    let first = node.ok("ADD", "a", path);
    assert_eq!(first["cniVersion"], "1.1.0");
    assert_eq!((address(&first, 0), address(&first, 1)), ("10.244.1.1".into(), "fd00:1::1".into()));
    assert_eq!(node.ok("ADD", "a", path), first, "a repeated ADD changes nothing");
    node.ok("CHECK", "a", path);
    let cookie = pod.cookie().expect("cookie");
    let entry = node.maps().pods.get(&cookie).expect("map").expect("the pod");
    assert_eq!(entry.flags, POD_MESHED, "what was wanted before the pod was made");
    let texts = [&entry.uid[..], &entry.namespace, &entry.name].map(unpadded);
    assert_eq!(texts, ["uid-a", "shop", "pod-a"]);
    assert!(loader::pod_attached(&node.place.bpffs, cookie));
    for n in [0, 1] {
        let listener = pod.run(|| TcpListener::bind((address(&first, n), 80))).expect("run").expect("bind");
        assert_eq!(listener.local_addr().expect("address").port(), 80);
    }

    // Drift is seen, and mended by another ADD.
    let routes = kernel::read_routes(&mut Connection::open_in(&pod).expect("connection")).expect("routes");
    let default = routes.into_iter().find(|r| r.via.is_some()).expect("a default route");
    let remove = [sluice_netlink::plan::Operation::RemoveRoute(default)];
    kernel::apply(&mut Connection::open_in(&pod).expect("connection"), &remove).expect("remove");
    assert_eq!(node.verb("CHECK", "a", path).1["code"], 104);
    node.ok("ADD", "a", path);
    node.ok("CHECK", "a", path);

    node.ok("DEL", "a", path);
    assert!(node.maps().pods.get(&cookie).expect("map").is_none());
    assert_eq!(node.maps().addrs.entries().expect("map").len(), 0);
    assert!(!loader::pod_attached(&node.place.bpffs, cookie));
    assert!(node.lease_files()[0].contains("@eth0@"), "releasing: {:?}", node.lease_files());
    node.ok("DEL", "a", path);
    node.ok("DEL", "a", None);
    let again = node.ok("ADD", "a", path);
    assert_ne!(address(&again, 0), address(&first, 0), "a returned address rests");
    node.ok("DEL", "a", None);
    node.end_pod(pod);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !node.links().is_empty() {
        assert!(Instant::now() < deadline, "links stay: {:?}", node.links());
        std::thread::yield_now();
    }
    node.gc(&[]);
    assert_eq!(node.lease_files(), Vec::<String>::new(), "free when the link is gone");
}

#[test]
fn a_hundred_at_once_get_a_hundred_addresses() {
    let node = Node::new("hundred", true);
    let ids: Vec<String> = (0..100).map(|n| format!("c{n}")).collect();
    let pods: Vec<Netns> = ids.iter().map(|id| node.pod(id)).collect();
    let begun = Instant::now();
    let answers: Vec<Value> = std::thread::scope(|s| {
        let node = &node;
        let mut threads = Vec::new();
        for (id, pod) in ids.iter().zip(&pods) {
            threads.push(s.spawn(move || node.ok("ADD", id, Some(Netns::path(pod)))));
        }
        threads.into_iter().map(|t| t.join().expect("an ADD")).collect()
    });
    eprintln!("100 concurrent ADDs: {:?}", begun.elapsed());
    for n in [0, 1] {
        let distinct: BTreeSet<String> = answers.iter().map(|a| address(a, n)).collect();
        assert_eq!(distinct.len(), 100);
    }
    assert_eq!(node.maps().pods.entries().expect("map").len(), 100);
    assert_eq!(node.links().len(), 100);
    // Pods reach each other through the node.
    node.netns.run(|| sluice_netlink::sysctl::ensure("ipv4/ip_forward", "1")).expect("run").expect("forwarding");
    let server = pods[7].run(|| TcpListener::bind(("0.0.0.0", 80))).expect("run").expect("bind");
    let target = format!("{}:80", address(&answers[7], 0)).parse().expect("address");
    let wait = Duration::from_secs(5);
    pods[42].run(|| TcpStream::connect_timeout(&target, wait)).expect("run").expect("pod to pod");
    drop(server);

    // GC keeps what is named and removes the rest.
    assert_eq!(node.verb("GC", "", None).1["code"], 7, "no list is not an empty list");
    node.gc(&["c3"]);
    assert_eq!(node.maps().pods.entries().expect("map").len(), 1);
    node.ok("CHECK", "c3", Some(pods[3].path()));
    assert_eq!(node.lease_files().iter().filter(|f| f.ends_with("@eth0")).count(), 1);
}

#[test]
fn errors_are_told_and_leave_nothing() {
    let node = Node::new("errors", true);
    let pod = node.pod("a");
    let netns = pod.path().display().to_string();
    let env: Vec<(&str, &str)> =
        vec![("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", &netns)];
    let mut no_ranges = node.config.clone();
    no_ranges["ranges"] = json!([]);
    let mut future = node.config.clone();
    future["cniVersion"] = json!("7.0.0");
    for (config, code) in [("{".to_owned(), 6), (no_ranges.to_string(), 7), (future.to_string(), 1)] {
        let (ok, answer) = node.run(&config, &env);
        assert!(!ok && answer["code"] == code && answer["cniVersion"].is_string(), "{answer}");
    }
    let mut missing = env.clone();
    missing[3].1 = "/nonexistent";
    assert_eq!(node.run(&node.config.to_string(), &missing).1["code"], 4);
    // An interface of that name which is not ours.
    let mut inside = Connection::open_in(&pod).expect("connection");
    let other = link::Veth { host: "eth0", pod: "other0", pod_mac: [2, 0, 0, 0, 0, 1], mtu: None };
    link::make_veth(&mut inside, &pod, &other).expect("the pod's own interface");
    assert_eq!(node.verb("ADD", "a", Some(pod.path())).1["code"], 106);
    assert!(link::find(&mut inside, "eth0").expect("find").is_some(), "the pod's own interface stays");
    assert_eq!((node.links(), node.lease_files()), (vec![], vec![]));
    assert_eq!(node.maps().pods.entries().expect("map").len(), 0);

    let mut small = node.config.clone();
    small["ranges"] = json!(["10.9.9.0/32"]);
    let two = node.pod("b");
    let netns = two.path().display().to_string();
    let mut env = env;
    (env[1].1, env[3].1) = ("b", &netns);
    assert!(node.run(&small.to_string(), &env).0, "the only address");
    env[0].1 = "STATUS";
    assert_eq!(node.run(&small.to_string(), &env).1["code"], 50);
    assert!(node.run(&node.config.to_string(), &[("CNI_COMMAND", "STATUS")]).0);
    let (ok, versions) = node.run(r#"{"cniVersion":"0.4.0"}"#, &[("CNI_COMMAND", "VERSION")]);
    assert!(ok && versions["supportedVersions"].as_array().is_some_and(|v| v.len() == 5));
}

#[test]
fn without_the_agents_pins_the_runtime_is_told_to_come_back() {
    let node = Node::new("pins", false);
    let pod = node.pod("a");
    let (ok, answer) = node.verb("ADD", "a", Some(pod.path()));
    assert!(!ok && answer["code"] == 11, "{answer}");
    assert_eq!((node.links(), node.lease_files()), (vec![], vec![]));
    node.ok("DEL", "a", None);
    loader::load(&node.place).expect("the agent starts");
    node.ok("ADD", "a", Some(pod.path()));
    // The agent starts anew: same maps, new programs, the pod stays known and steered.
    assert_eq!(loader::load(&node.place).expect("restart").pods, 1);
    node.ok("CHECK", "a", Some(pod.path()));
    let wrong = HashMap::<u64, u64>::open(&pin_dir(&node.place.bpffs), map::PODS);
    assert!(wrong.is_err(), "a map of other sizes is refused");
}

/// A plugin that was installed before the agent was started anew, or one that an upgrade has left behind.
#[test]
fn a_data_path_of_another_layout_is_named_and_pods_still_end() {
    let node = Node::new("layout", true);
    let (a, b) = (node.pod("a"), node.pod("b"));
    node.ok("ADD", "a", Some(a.path()));
    let dir = pin_dir(&node.place.bpffs);
    let other = dir.with_file_name("v7");
    std::fs::rename(&dir, &other).expect("rename");
    let (ok, answer) = node.verb("ADD", "b", Some(b.path()));
    let details = answer["details"].as_str().unwrap_or_default();
    assert!(!ok && answer["code"] == 11 && details.contains("layout 7"), "{answer}");
    node.ok("DEL", "a", None);
    assert!(!dir.exists(), "the agent's to make");
    loader::load(&node.place).expect("the agent starts");
    node.ok("ADD", "b", Some(b.path()));
    node.ok("CHECK", "b", Some(b.path()));
    assert!(!other.exists());
}

#[test]
fn status_says_what_add_would_find() {
    let node = Node::new("truth", false);
    let code = |config: &Value| match node.run(&config.to_string(), &[("CNI_COMMAND", "STATUS")]) {
        (true, _) => 0,
        (false, answer) => answer["code"].as_u64().expect("a code"),
    };
    let config = &node.config;
    assert_eq!(code(config), 50, "no agent has run");
    loader::load(&node.place).expect("the agent starts");
    assert_eq!(code(config), 0);
    let unpin = |name: &str| std::fs::remove_file(pin_dir(&node.place.bpffs).join(name)).expect("unpin");
    for name in ["from_pod", "links/connect4", map::PODS] {
        unpin(name);
        assert_eq!(code(config), 50, "without {name} no pod can be made");
        loader::load(&node.place).expect("the agent mends it");
    }

    let mut small = config.clone();
    small["ranges"] = json!(["10.9.9.0/32"]);
    let pod = node.pod("a");
    let netns = pod.path().display().to_string();
    let env = |verb| [("CNI_COMMAND", verb), ("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", &netns)];
    assert!(node.run(&small.to_string(), &env("ADD")).0, "the only address");
    assert_eq!(code(&small), 50);
    unpin("from_host");
    assert_eq!(code(config), 51, "there is a pod, and it may reach nothing");
    loader::load(&node.place).expect("the agent mends it");
    assert!(node.run(&small.to_string(), &env("DEL")).0);
    assert_eq!(code(&small), 50, "its link is still there");
    node.end_pod(pod);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !node.links().is_empty() {
        assert!(Instant::now() < deadline, "links stay: {:?}", node.links());
        std::thread::yield_now();
    }
    assert_eq!(code(&small), 0, "the link has gone, and nobody had to say so");
}
