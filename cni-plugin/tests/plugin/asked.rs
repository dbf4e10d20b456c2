//! What runtimes ask for, and what goes wrong: addresses, hardware addresses, limits, full maps, damaged leases.

use crate::node::{Node, address};
use serde_json::{Value, json};
use sluice_ebpf::{
    common::{Pod, bound},
    loader,
    maps::pin_dir,
};
use sluice_netlink::{Connection, Netns, kernel, link, plan, qdisc};
use std::{
    fs,
    io::Write,
    net::{TcpListener, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

impl Node {
    /// A verb with fields added to the configuration.
    pub fn with(&self, verb: &str, id: &str, netns: Option<&Path>, more: Value) -> (bool, Value) {
        let mut config = self.config.clone();
        config.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let netns = netns.map(|p| p.display().to_string()).unwrap_or_default();
        let env =
            [("CNI_COMMAND", verb), ("CNI_CONTAINERID", id), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", netns.as_str())];
        self.run(&config.to_string(), &env)
    }
}

#[test]
fn addresses_and_hardware_addresses_that_are_asked_for() {
    let node = Node::new("asked", true);
    let (a, b) = (node.pod("a"), node.pod("b"));
    let asks = json!({"runtimeConfig": {
        "ips": ["10.244.1.77", "fd00:1::77"], "mac": "02:00:00:00:00:77", "dns": {"servers": ["10.0.0.2"]},
    }});
    let (ok, answer) = node.with("ADD", "a", Some(a.path()), asks.clone());
    assert!(ok, "{answer}");
    assert_eq!((address(&answer, 0), address(&answer, 1)), ("10.244.1.77".into(), "fd00:1::77".into()));
    assert_eq!(
        (&answer["interfaces"][1]["mac"], &answer["dns"]["nameservers"][0]),
        (&json!("02:00:00:00:00:77"), &json!("10.0.0.2"))
    );
    let inner = link::find(&mut Connection::open_in(&a).expect("connection"), "eth0").expect("find").expect("there");
    assert_eq!(inner.mac, Some([2, 0, 0, 0, 0, 0x77]));
    let (_, answer) = node.with("ADD", "b", Some(b.path()), asks.clone());
    assert_eq!(
        (&answer["code"], answer["msg"].as_str().expect("text").contains("container a has it")),
        (&json!(103), true)
    );
    assert_eq!(node.lease_files().len(), 1);
    // The next pod gets it at once, although the first pod's link is still there.
    node.ok("DEL", "a", Some(a.path()));
    assert_eq!(node.links().len(), 1);
    let (ok, answer) = node.with("ADD", "b", Some(b.path()), asks);
    assert!(ok && address(&answer, 0) == "10.244.1.77", "{answer}");
    let args = json!({"args": {"cni": {"ips": ["10.244.1.0"]}}});
    assert_eq!(node.with("ADD", "a", Some(a.path()), args).1["code"], 103, "the subnet's own address");
    let second = json!({"runtimeConfig": {"ipRanges": [[{"subnet": "10.9.0.0/29", "rangeStart": "10.9.0.5"}]]}});
    let (ok, answer) = node.with("ADD", "a", Some(a.path()), second);
    assert!(ok && address(&answer, 0) == "10.9.0.5", "{answer}");
    assert!(node.with("CHECK", "a", Some(a.path()), json!({"prevResult": answer})).0);
}

#[test]
fn limits_are_set_checked_and_put_back() {
    let node = Node::new("limits", true);
    let pod = node.pod("a");
    let limits = json!({"ingressRate": 80_000_000, "ingressBurst": 800_000, "egressRate": 8_000_000});
    let more = json!({"runtimeConfig": {"bandwidth": limits}});
    let (ok, answer) = node.with("ADD", "a", Some(pod.path()), more.clone());
    assert!(ok, "{answer}");
    let name = answer["interfaces"][0]["name"].as_str().expect("a name");
    let (mut host, mut inside) = [&node.netns, &pod].map(|n| Connection::open_in(n).expect("connection")).into();
    let outer = link::find(&mut host, name).expect("find").expect("there").index;
    let inner = link::find(&mut inside, "eth0").expect("find").expect("there").index;
    let rate = |c: &mut Connection, link| qdisc::bucket(c, link).expect("read").map(|(rate, _)| rate);
    assert_eq!((rate(&mut host, outer), rate(&mut inside, inner)), (Some(10_000_000), Some(1_000_000)));
    node.ok("CHECK", "a", Some(pod.path()));
    let other = qdisc::TokenBucket { rate: 1, burst: 9000, limit: 9000 };
    qdisc::set_bucket(&mut inside, inner, &other).expect("the pod changes its limit");
    assert_eq!(node.verb("CHECK", "a", Some(pod.path())).1["code"], 104);
    assert!(node.with("ADD", "a", Some(pod.path()), more).0);
    node.ok("CHECK", "a", Some(pod.path()));
    node.ok("DEL", "a", Some(pod.path()));
    let ports = json!({"runtimeConfig": {"portMappings": [{"hostPort": 80, "containerPort": 80, "protocol": "sctp"}]}});
    let two = node.pod("b");
    assert_eq!(node.with("ADD", "b", Some(two.path()), ports).1["code"], 108);
    assert_eq!(node.lease_files().iter().filter(|f| f.ends_with("@eth0")).count(), 0);
}

/// Time that a stream of this many bytes takes from one pod to another.
fn stream(from: &Netns, to: &Netns, address: &str, bytes: usize) -> Duration {
    let listener = to.run(|| TcpListener::bind((address, 80))).expect("run").expect("bind");
    let target = listener.local_addr().expect("address");
    let begun = Instant::now();
    std::thread::scope(|s| {
        let reader = s.spawn(|| {
            let (accepted, _) = listener.accept().expect("accept");
            accepted.set_read_timeout(Some(Duration::from_secs(20))).expect("a deadline");
            std::io::copy(&mut { accepted }, &mut std::io::sink()).expect("read")
        });
        let connect = || TcpStream::connect_timeout(&target, Duration::from_secs(5));
        let mut sender = from.run(connect).expect("run").expect("connect");
        sender.write_all(&vec![0; bytes]).expect("write");
        drop(sender);
        assert_eq!(reader.join().expect("the reader"), bytes as u64);
    });
    begun.elapsed()
}

#[test]
fn streams_obey_the_limits_of_both_directions() {
    let node = Node::new("streams", true);
    node.netns.run(|| sluice_netlink::sysctl::ensure("ipv4/ip_forward", "1")).expect("run").expect("forwarding");
    let (a, b) = (node.pod("a"), node.pod("b"));
    let limits =
        json!({"ingressRate": 8_000_000, "ingressBurst": 160_000, "egressRate": 4_000_000, "egressBurst": 160_000});
    let (ok, first) = node.with("ADD", "a", Some(a.path()), json!({"runtimeConfig": {"bandwidth": limits}}));
    assert!(ok, "{first}");
    let second = node.ok("ADD", "b", Some(b.path()));
    let (to_a, to_b) = (address(&first, 0), address(&second, 0));
    // One megabyte a second, half a megabyte a second, and a burst.
    let coming = stream(&b, &a, &to_a, 600_000);
    assert!(coming >= Duration::from_millis(500), "600 kB came in {coming:?}");
    let going = stream(&a, &b, &to_b, 300_000);
    assert!(going >= Duration::from_millis(450), "300 kB went in {going:?}");
    eprintln!("limited to 1 MB/s: 600 kB in {coming:?}; to 0.5 MB/s: 300 kB in {going:?}");
}

#[test]
fn what_goes_wrong_leaves_nothing() {
    let node = Node::new("wrong", true);
    let (a, b) = (node.pod("a"), node.pod("b"));
    node.ok("ADD", "a", Some(a.path()));
    // A second attachment in one namespace.
    assert_eq!(node.verb("ADD", "other", Some(a.path())).1["code"], 107);
    node.ok("CHECK", "a", Some(a.path()));
    // A map that is full.
    let maps = node.maps();
    let fill = (0..bound::PODS as u64).map(|n| u64::MAX - n);
    let filled: Vec<u64> = fill.take_while(|cookie| maps.pods.set(cookie, &Pod::default()).is_ok()).collect();
    let (ok, answer) = node.verb("ADD", "b", Some(b.path()));
    assert!(!ok && answer["code"] == 101, "{answer}");
    assert_eq!((node.links().len(), node.lease_files().len()), (1, 1));
    let mut inside = Connection::open_in(&b).expect("connection");
    assert_eq!(link::find(&mut inside, "eth0").expect("find"), None);
    // GC forgets what no lease names.
    let mut config = node.config.clone();
    config["name"] = json!("another");
    config["cni.dev/valid-attachments"] = json!([]);
    assert!(node.run(&config.to_string(), &[("CNI_COMMAND", "GC")]).0);
    assert!(filled.iter().all(|cookie| maps.pods.get(cookie).expect("map").is_none()));
    node.ok("CHECK", "a", Some(a.path())); // of another network
    // A lease that cannot be read is deleted with what it held.
    let state = fs::read_dir(node.base.join("state/leases")).expect("list").flatten().next().expect("a boot");
    fs::write(state.path().join(&node.lease_files()[0]), "{").expect("damage");
    node.ok("DEL", "a", None);
    assert_eq!((maps.pods.entries().expect("map").len(), maps.addrs.entries().expect("map").len()), (0, 0));
    let mut host = Connection::open_in(&node.netns).expect("connection");
    let routes = kernel::read_routes(&mut host).expect("routes");
    assert_eq!(routes.iter().filter(|r| r.protocol == plan::PROTOCOL_POD).count(), 0);
    assert_eq!(node.verb("ADD", "a", Some(Path::new("/nonexistent"))).1["code"], 4);
}

#[test]
fn status_tells_whether_pods_can_be_added() {
    let node = Node::new("status", true);
    let status = |more: Value| node.with("STATUS", "", None, more).1["code"].clone();
    assert_eq!(status(json!({})), Value::Null);
    assert_eq!(status(json!({"cniVersion": "1.0.0"})), 1, "STATUS came with 1.1.0");
    assert_eq!(status(json!({"ranges": ["10.0.0.0/24", "10.0.0.0/25"]})), 7);
    assert_eq!(status(json!({"ranges": []})), 7);
    assert_eq!(status(json!({"ranges": ["10.0.0.0/30"], "exclude": ["10.0.0.0/29"]})), 50, "no address");
    let pod = node.pod("a");
    node.ok("ADD", "a", Some(pod.path()));
    loader::unload(&node.place.bpffs).expect("unload");
    assert!(!pin_dir(&node.place.bpffs).exists());
    assert_eq!(status(json!({})), 51, "a pod is there without its data path");
    node.ok("DEL", "a", None);
    assert_eq!(status(json!({})), 50);
}

/// In the map from ADD to DEL, on one pod at a time.
#[test]
fn host_ports_lead_to_their_pod() {
    use sluice_ebpf::{common::TCP, maps::PodMaps};
    let node = Node::new("hostport", true);
    let (a, b) = (node.pod("a"), node.pod("b"));
    let asks = |protocol: &str| {
        json!({"runtimeConfig": {"portMappings": [
            {"hostPort": 8443, "containerPort": 443, "protocol": protocol},
            {"hostPort": 9443, "containerPort": 443, "protocol": "tcp", "hostIP": "192.0.2.1"},
        ]}})
    };
    assert_eq!(node.with("ADD", "a", Some(a.path()), asks("sctp")).1["code"], 108);
    assert_eq!(node.lease_files().len(), 0, "nothing is made");
    let (ok, answer) = node.with("ADD", "a", Some(a.path()), asks("tcp"));
    assert!(ok, "{answer}");
    let maps = PodMaps::open(&pin_dir(&node.place.bpffs)).expect("maps");
    let ports = || maps.host_ports.entries().expect("entries");
    let seen: Vec<_> =
        ports().iter().map(|(k, to)| (k.proto, u16::from_be(k.port_be), u16::from_be(to.port_be))).collect();
    assert_eq!(seen.iter().filter(|p| **p == (TCP, 8443, 443)).count(), 2, "both families: {seen:?}");
    assert_eq!(seen.iter().filter(|p| **p == (TCP, 9443, 443)).count(), 1, "of the address's family: {seen:?}");
    let (_, answer) = node.with("ADD", "b", Some(b.path()), asks("tcp"));
    assert_eq!(answer["code"], 108, "taken: {answer}");
    assert_eq!(node.lease_files().len(), 1);
    node.with("CHECK", "a", Some(a.path()), asks("tcp"));
    maps.host_ports.remove(&ports()[0].0).expect("damage");
    let check = node.with("CHECK", "a", Some(a.path()), asks("tcp")).1;
    assert_eq!(check["code"], 104, "CHECK sees what is missing: {check}");
    node.ok("DEL", "a", Some(a.path()));
    assert!(ports().is_empty(), "DEL takes them away");
    let (ok, answer) = node.with("ADD", "b", Some(b.path()), asks("udp"));
    assert!(ok, "free again: {answer}");
}

/// Of all that want one port at once, one gets it; and on every address is also on each.
#[test]
fn a_host_port_is_one_pods() {
    const CALLS: usize = 12;
    let node = Node::new("oneport", true);
    let pods: Vec<Netns> = (0..CALLS).map(|n| node.pod(&n.to_string())).collect();
    let asks = |port: u16, ip: &str| {
        json!({"runtimeConfig": {"portMappings": [
            {"hostPort": port, "containerPort": 443, "protocol": "tcp", "hostIP": ip},
        ]}})
    };
    for (round, ips) in [["", ""], ["192.0.2.1", "192.0.2.1"], ["", "192.0.2.1"]].into_iter().enumerate() {
        let port = 8443 + round as u16;
        let answers: Vec<(bool, Value)> = std::thread::scope(|s| {
            let (node, asks) = (&node, &asks);
            let threads: Vec<_> = pods
                .iter()
                .enumerate()
                .map(|(n, pod)| {
                    let ask = asks(port, ips[n % 2]);
                    s.spawn(move || node.with("ADD", &n.to_string(), Some(pod.path()), ask))
                })
                .collect();
            threads.into_iter().map(|t| t.join().expect("an ADD")).collect()
        });
        let served = answers.iter().filter(|(ok, _)| *ok).count();
        // Where some want it on one address and some on all, the first decides who is in whose way: never two.
        assert_eq!(served, 1, "{ips:?}: {answers:?}");
        assert!(answers.iter().all(|(ok, answer)| *ok || answer["code"] == 108), "{answers:?}");
        assert_eq!(node.lease_files().iter().filter(|f| f.ends_with("@eth0")).count(), 1);
        (0..CALLS).for_each(|n| drop(node.ok("DEL", &n.to_string(), Some(pods[n].path()))));
        assert!(node.maps().host_ports.entries().expect("entries").is_empty());
    }
    // On addresses of their own they are not in each other's way.
    for (n, ip) in ["192.0.2.1", "192.0.2.2", "2001:db8::1"].into_iter().enumerate() {
        let (ok, answer) = node.with("ADD", &n.to_string(), Some(pods[n].path()), asks(9000, ip));
        assert!(ok, "{ip}: {answer}");
    }
    assert_eq!(node.with("ADD", "5", Some(pods[5].path()), asks(9000, "")).1["code"], 108);
    // What a plugin that was killed has left, under an address that nobody has, keeps nobody out.
    let maps = node.maps();
    let (mut key, to) = maps.host_ports.entries().expect("entries")[0];
    key.port_be = 9001_u16.to_be();
    let nobody = sluice_ebpf::addr("10.244.1.200".parse().expect("address"));
    maps.host_ports.set(&key, &sluice_ebpf::common::Reverse { addr: nobody, ..to }).expect("left behind");
    let (ok, answer) = node.with("ADD", "6", Some(pods[6].path()), asks(9001, ""));
    assert!(ok, "{answer}");
    node.gc(&["6"]);
    assert!(maps.host_ports.get(&key).expect("read").is_none(), "GC removes what is nobody's");
}

/// The limit of a link goes by the link's own MTU, whatever new pods get by now.
#[test]
fn a_limit_outlives_a_change_of_the_mtu() {
    let node = Node::new("mtu", true);
    let pod = node.pod("a");
    // So slow that the burst is one packet.
    let limits = json!({"bandwidth": {"ingressRate": 8_000, "egressRate": 8_000}});
    let with = |verb, mtu: u32| node.with(verb, "a", Some(pod.path()), json!({"mtu": mtu, "runtimeConfig": limits}));
    let (ok, answer) = with("ADD", 1400);
    assert!(ok, "{answer}");
    for mtu in [1400, 9000] {
        let (ok, answer) = with("CHECK", mtu);
        assert!(ok, "the node's MTU is {mtu} now: {answer}");
    }
    assert!(with("ADD", 9000).0);
    assert!(with("CHECK", 9000).0);
}

/// What the plugin cannot read or write (code 5), and does nothing then.
#[test]
fn input_and_output_that_fail_are_named() {
    let node = Node::new("io", true);
    let pod = node.pod("a");
    let file = node.base.join("file");
    fs::write(&file, "").expect("write");
    let (ok, answer) = node.with("ADD", "a", Some(pod.path()), json!({"stateDir": file}));
    assert!(!ok && answer["code"] == 5, "{answer}");
    // A folder cannot be read as the configuration is.
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_sluice-cni"))
        .env_clear()
        .env("CNI_COMMAND", "STATUS")
        .stdin(fs::File::open(&node.base).expect("open"))
        .output()
        .expect("run");
    let answer: Value = serde_json::from_slice(&output.stdout).expect("an answer");
    assert!(!output.status.success() && answer["code"] == 5, "{answer}");
    assert_eq!((node.links(), node.lease_files()), (vec![], vec![]));
}
