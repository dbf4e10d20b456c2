//! The plugin's binary against real namespaces and maps. Each test has a node of its own: a network namespace, a BPF
//! file system, a cgroup and a state folder, all removed at the end. Needs root.

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Value, json};
use sluice_ebpf::{
    common::{POD_MESHED, map},
    loader::{self, Place},
    maps::{HashMap, PodMaps, padded, pin_dir, unpadded},
};
use sluice_netlink::{Connection, Netns, kernel, link, ns};
use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

struct Node {
    base: PathBuf,
    place: Place,
    netns: Netns,
    config: Value,
    pods: Mutex<Vec<PathBuf>>,
}

impl Node {
    fn new(name: &str, load: bool) -> Self {
        let id = format!("sluice-test-cni-{name}-{}", std::process::id());
        let base = std::env::temp_dir().join(&id);
        let bpffs = base.join("bpf");
        fs::create_dir_all(&bpffs).expect("folder");
        mount("bpf", &bpffs, "bpf", MountFlags::empty(), None).expect("mount bpffs (root is needed)");
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(PathBuf::from);
        let root = root.into_iter().find(|p| p.join("cgroup.controllers").exists()).expect("a cgroup2 mount");
        let cgroup = root.join(&id);
        fs::create_dir(&cgroup).expect("cgroup");
        let place = Place { bpffs, cgroup };
        if load {
            loader::load(&place).expect("load");
        }
        let netns = ns::make_named(&base.join("node")).expect("node's namespace");
        let config = json!({
            "cniVersion": "1.1.0", "name": "sluice", "type": "sluice-cni", "ranges": ["10.244.1.0/24", "fd00:1::/64"],
            "stateDir": base.join("state"), "bpffs": place.bpffs,
        });
        Self { base, place, netns, config, pods: Mutex::default() }
    }

    fn pod(&self, name: &str) -> Netns {
        let path = self.base.join(format!("pod-{name}"));
        let netns = ns::make_named(&path).expect("pod's namespace");
        self.pods.lock().expect("list").push(path);
        netns
    }

    fn end_pod(&self, netns: Netns) {
        let path = netns.path().to_owned();
        drop(netns);
        self.pods.lock().expect("list").retain(|p| *p != path);
        ns::remove_named(&path).expect("remove");
    }

    /// Runs the plugin; its exit and its answer.
    fn run(&self, config: &str, env: &[(&str, &str)]) -> (bool, Value) {
        let work = || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-cni"));
            command.env_clear().envs(env.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().expect("spawn");
            child.stdin.take().expect("piped").write_all(config.as_bytes()).expect("write");
            let output = child.wait_with_output().expect("wait");
            let answer = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
            (output.status.success(), answer)
        };
        self.netns.run(work).expect("in the node")
    }

    fn verb(&self, verb: &str, id: &str, netns: Option<&Path>) -> (bool, Value) {
        let netns = netns.map(|p| p.display().to_string()).unwrap_or_default();
        let args = format!("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=pod-{id};K8S_POD_UID=uid-{id}");
        let env = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", id),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", netns.as_str()),
            ("CNI_ARGS", args.as_str()),
        ];
        self.run(&self.config.to_string(), &env)
    }

    fn ok(&self, verb: &str, id: &str, netns: Option<&Path>) -> Value {
        let (ok, answer) = self.verb(verb, id, netns);
        assert!(ok, "{verb} {id}: {answer}");
        answer
    }

    fn gc(&self, valid: &[&str]) {
        let mut config = self.config.clone();
        let valid = valid.iter().map(|id| json!({ "containerID": id, "ifname": "eth0" })).collect::<Vec<_>>();
        config["cni.dev/valid-attachments"] = json!(valid);
        let (ok, answer) = self.run(&config.to_string(), &[("CNI_COMMAND", "GC")]);
        assert!(ok, "{answer}");
    }

    fn links(&self) -> Vec<String> {
        let mut connection = Connection::open_in(&self.netns).expect("connection");
        let all = link::all(&mut connection).expect("links");
        all.into_iter().map(|(name, _)| name).filter(|n| n.starts_with("slc")).collect()
    }

    fn maps(&self) -> PodMaps {
        PodMaps::open(&pin_dir(&self.place.bpffs)).expect("maps")
    }

    fn lease_files(&self) -> Vec<String> {
        let boots = fs::read_dir(self.base.join("state/leases")).into_iter().flatten().flatten();
        let files = boots.flat_map(|b| fs::read_dir(b.path()).into_iter().flatten().flatten());
        files.map(|f| f.file_name().to_string_lossy().into_owned()).filter(|f| !f.starts_with('.')).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for pod in self.pods.lock().expect("list").drain(..) {
            let _ = ns::remove_named(&pod);
        }
        let _ = ns::remove_named(&self.base.join("node"));
        let _ = unmount(&self.place.bpffs, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.place.cgroup);
        let _ = fs::remove_dir_all(&self.base);
    }
}

fn address(answer: &Value, n: usize) -> String {
    let text = answer["ips"][n]["address"].as_str().expect("an address");
    text.split('/').next().expect("split").to_owned()
}

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
