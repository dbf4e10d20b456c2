//! Random sequences of calls, some of them killed, against a model of what must be there. The seed is printed;
//! `SLUICE_CNI_SEED` repeats a run, `SLUICE_CNI_CALLS` makes it longer.

use crate::node::Node;
use serde_json::{Value, json};
use sluice_cni::{packets, spec::Attachment, wiring};
use sluice_ebpf::{
    common::{INSIDE, Reverse, ServiceKey, TCP, UDP},
    loader,
};
use sluice_netlink::{
    Connection, Netns, kernel, link,
    plan::{MAIN_TABLE, PROTOCOL_POD},
    qdisc,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

const CALLS: u64 = 2_000;
const SLOTS: usize = 6;
/// Most calls take about as long.
const KILL_WITHIN_US: u64 = 3_000;
const LOOK_EVERY: u64 = 100;
const BOOT_EVERY: u64 = 400;
/// Kernel and plugin have this long to end the links of pods that are gone.
const QUIET_WITHIN: Duration = Duration::from_secs(30);

/// What the runtime knows of an attachment.
#[derive(Clone, Debug, PartialEq)]
enum Known {
    Nothing,
    /// A call was killed: it may be there, or a part of it.
    Unsure,
    Added(BTreeSet<IpAddr>),
}

struct Slot {
    id: String,
    netns: Option<Netns>,
    known: Known,
    asks: Asks,
}

/// What a container asks of each ADD, from its first to its end.
#[derive(Clone, Debug, Default)]
struct Asks {
    /// Port of the node, protocol, and whether it is on one address alone.
    port: Option<(u16, u8, bool)>,
    /// Bytes a second to the pod.
    rate: Option<u64>,
}

/// The one address that a host port may be on.
const HOST: &str = "192.0.2.1";
const POD_PORT: u16 = 80;

impl Asks {
    fn config(&self) -> Value {
        let mut asks = json!({});
        if let Some((port, proto, one)) = self.port {
            let protocol = if proto == TCP { "tcp" } else { "udp" };
            let ip = if one { HOST } else { "" };
            asks["portMappings"] =
                json!([{"hostPort": port, "containerPort": POD_PORT, "protocol": protocol, "hostIP": ip}]);
        }
        if let Some(rate) = self.rate {
            asks["bandwidth"] = json!({"ingressRate": rate * 8, "ingressBurst": 800_000});
        }
        asks
    }

    fn overlaps(&self, other: &Self) -> bool {
        matches!((self.port, other.port), (Some((a, p, _)), Some((b, q, _))) if (a, p) == (b, q))
    }

    /// What the map has of a pod with these addresses.
    fn entries(&self, addresses: &BTreeSet<IpAddr>) -> Vec<(ServiceKey, Reverse)> {
        let Some((port, proto, one)) = self.port else { return vec![] };
        let entry = |ip: &IpAddr| {
            let addr = sluice_ebpf::addr(*ip);
            let on = if one { sluice_ebpf::addr(HOST.parse().expect(HOST)) } else { addr.unspecified() };
            let key = ServiceKey { addr: on, port_be: port.to_be(), proto, scope: INSIDE };
            (key, Reverse { addr, port_be: POD_PORT.to_be(), pad: 0 })
        };
        addresses.iter().filter(|ip| !one || ip.is_ipv4()).map(entry).collect()
    }
}

/// A call that is to be made.
struct Call {
    config: String,
    verb: &'static str,
    id: String,
    netns: String,
    kill: Option<Duration>,
}

struct Run {
    node: Node,
    slots: Vec<Slot>,
    /// Of pods that ended without DEL: what they had is theirs until the runtime collects.
    ghosts: Vec<Asks>,
    random: u64,
    /// Containers that ever were, to give each a name of its own.
    containers: u64,
    killed: u64,
    calls: u64,
}

/// Namespaces in the map, addresses in the map, namespaces that are steered, addresses that have a route.
struct There {
    host_ports: BTreeMap<ServiceKey, Reverse>,
    pods: BTreeSet<u64>,
    addresses: BTreeSet<[u8; 16]>,
    steered: BTreeSet<u64>,
    routed: BTreeSet<IpAddr>,
}

fn octets(addresses: &BTreeSet<IpAddr>) -> BTreeSet<[u8; 16]> {
    addresses.iter().map(|ip| sluice_ebpf::addr(*ip).octets()).collect()
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn random_calls_and_kills_leave_nothing_that_the_next_call_does_not_mend() {
    let seed = number("SLUICE_CNI_SEED").unwrap_or_else(|| u64::from(std::process::id()) << 20 | 1);
    let calls = number("SLUICE_CNI_CALLS").unwrap_or(CALLS);
    eprintln!("SLUICE_CNI_SEED={seed}");
    let begun = Instant::now();
    let mut run = Run::new(seed);
    while run.calls < calls {
        run.step();
        if run.calls.is_multiple_of(BOOT_EVERY) {
            run.reboot();
        }
        if run.calls.is_multiple_of(LOOK_EVERY) {
            run.look();
        }
    }
    run.end();
    eprintln!("{} calls, {} of them killed, in {:?}", run.calls, run.killed, begun.elapsed());
}

impl Node {
    fn carry_out(&self, call: &Call) -> Option<(bool, Value)> {
        let Call { config, verb, id, netns, kill } = call;
        let env =
            [("CNI_COMMAND", *verb), ("CNI_CONTAINERID", id), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", netns.as_str())];
        self.run_until(config, &env, *kill)
    }
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut node = Node::new("random", true);
        node.config["ranges"] = json!(["10.244.1.0/27", "fd00:1::/123"]);
        let mut run =
            Self { node, slots: Vec::new(), ghosts: Vec::new(), random: seed, containers: 0, killed: 0, calls: 0 };
        for _ in 0..SLOTS {
            let slot = run.slot();
            run.slots.push(slot);
        }
        run
    }

    /// xorshift64*: the sequence is the seed's.
    fn below(&mut self, n: u64) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }

    fn container(&mut self) -> String {
        self.containers += 1;
        format!("c{}", self.containers)
    }

    fn step(&mut self) {
        let n = self.below(SLOTS as u64) as usize;
        match self.below(22) {
            0..8 => self.add(n),
            8..14 => self.delete(n),
            20.. => self.at_once(n),
            14..16 => self.check(n),
            16 => self.collect(),
            17 => self.status(),
            18 => self.end_pod(n, true),
            _ => self.end_pod(n, false),
        }
    }

    /// Few ports for many: two want the same now and then.
    fn asks(&mut self) -> Asks {
        let proto = if self.below(2) == 0 { TCP } else { UDP };
        let port = (self.below(2) == 0).then(|| (8_000 + self.below(4) as u16, proto, self.below(2) == 0));
        let rate = (self.below(3) == 0).then(|| 1_000_000 + self.below(9) * 1_000);
        Asks { port, rate }
    }

    /// Calls the plugin, and now and then kills it.
    fn call(&mut self, verb: &'static str, n: Option<usize>, more: Value) -> Option<(bool, Value)> {
        let call = self.prepare(verb, n, more);
        let answer = self.node.carry_out(&call);
        self.killed += u64::from(answer.is_none());
        answer
    }

    fn prepare(&mut self, verb: &'static str, n: Option<usize>, more: Value) -> Call {
        self.calls += 1;
        let kill = (self.below(3) == 0).then(|| Duration::from_micros(self.below(KILL_WITHIN_US)));
        let mut config = self.node.config.clone();
        config.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let slot = n.map(|n| &self.slots[n]);
        let id = slot.map(|s| s.id.clone()).unwrap_or_default();
        let netns = slot.and_then(|s| s.netns.as_ref()).map(|p| p.path().display().to_string()).unwrap_or_default();
        Call { config: config.to_string(), verb, id, netns, kill }
    }

    /// Two calls of two pods at the same time.
    fn at_once(&mut self, n: usize) {
        let m = (n + 1 + self.below(SLOTS as u64 - 1) as usize) % SLOTS;
        let add = [n, m].map(|slot| (slot, self.below(3) > 0));
        let calls = add.map(|(slot, add)| match add {
            true => self.prepare_add(slot, None),
            false => self.prepare("DEL", Some(slot), json!({})),
        });
        let node = &self.node;
        let answers = std::thread::scope(|s| {
            let threads = calls.each_ref().map(|call| s.spawn(move || node.carry_out(call)));
            threads.map(|t| t.join().expect("a call"))
        });
        // What each may have been in the way of the other with.
        let (befores, ids) = ([n, m].map(|slot| self.slots[slot].known.clone()), [n, m]);
        for (i, (answer, (slot, add))) in answers.into_iter().zip(add).enumerate() {
            self.killed += u64::from(answer.is_none());
            let other = (befores[1 - i] != Known::Nothing || add && calls[1 - i].verb == "ADD").then_some(ids[1 - i]);
            match add {
                true => self.conclude_add(slot, None, other, answer),
                false => self.conclude_delete(slot, answer),
            }
        }
    }

    fn add(&mut self, n: usize) {
        let asked = (self.below(4) == 0).then(|| format!("10.244.1.{}", 1 + self.below(30)));
        let call = self.prepare_add(n, asked.as_deref());
        let answer = self.node.carry_out(&call);
        self.killed += u64::from(answer.is_none());
        self.conclude_add(n, asked.as_deref(), None, answer);
    }

    fn prepare_add(&mut self, n: usize, asked: Option<&str>) -> Call {
        if self.slots[n].netns.is_none() {
            let name = format!("{n}-{}", self.slots[n].id);
            self.slots[n].netns = Some(self.node.pod(&name));
        }
        let mut asks = self.slots[n].asks.config();
        if let Some(ip) = asked {
            asks["ips"] = json!([ip]);
        }
        self.prepare("ADD", Some(n), json!({"runtimeConfig": asks}))
    }

    /// `meanwhile`: a pod that was there, or was added, at the same time.
    fn conclude_add(&mut self, n: usize, asked: Option<&str>, meanwhile: Option<usize>, answer: Option<(bool, Value)>) {
        let before = self.slots[n].known.clone();
        let after = match answer {
            None if matches!(before, Known::Added(_)) => before,
            None => Known::Unsure,
            Some((true, answer)) => Known::Added(self.added(n, &before, asked, &answer)),
            Some((false, answer)) if answer["code"] == 108 => {
                let overlaps = |m: usize| m != n && self.slots[m].asks.overlaps(&self.slots[n].asks);
                let there = |m: &usize| self.slots[*m].known != Known::Nothing || meanwhile == Some(*m);
                assert!(!matches!(before, Known::Added(_)), "its port is its own: {answer}");
                let ghost = self.ghosts.iter().any(|g| g.overlaps(&self.slots[n].asks));
                assert!(ghost || (0..SLOTS).filter(there).any(overlaps), "nobody has the port: {answer}");
                before
            }
            Some((false, answer)) => {
                assert!(answer["code"] == 103 && asked.is_some(), "{answer}");
                before // refused before anything was made
            }
        };
        self.slots[n].known = after;
    }

    fn added(&self, n: usize, before: &Known, asked: Option<&str>, answer: &Value) -> BTreeSet<IpAddr> {
        let ips = answer["ips"].as_array().expect("addresses");
        let text = |ip: &Value| ip["address"].as_str().and_then(|a| a.split('/').next()).map(str::to_owned);
        let got: BTreeSet<IpAddr> = ips.iter().map(|ip| text(ip).expect("text").parse().expect("an address")).collect();
        assert_eq!(got.len(), 2, "{answer}");
        if let Known::Added(before) = before {
            assert_eq!(&got, before, "a repeated ADD changes nothing");
        }
        if let Some(asked) = asked {
            assert!(got.contains(&asked.parse().expect("an address")), "{answer}");
        }
        for (_, other) in self.slots.iter().enumerate().filter(|(m, _)| *m != n) {
            if let Known::Added(theirs) = &other.known {
                assert!(theirs.is_disjoint(&got), "{got:?} is another pod's");
            }
        }
        got
    }

    fn delete(&mut self, n: usize) {
        let answer = self.call("DEL", Some(n), json!({}));
        self.conclude_delete(n, answer);
    }

    fn conclude_delete(&mut self, n: usize, answer: Option<(bool, Value)>) {
        self.slots[n].known = match answer {
            None if self.slots[n].known == Known::Nothing => Known::Nothing,
            None => Known::Unsure,
            Some((ok, answer)) => {
                assert!(ok, "DEL never fails: {answer}");
                Known::Nothing
            }
        };
    }

    fn check(&mut self, n: usize) {
        if self.slots[n].netns.is_none() {
            return;
        }
        match (self.call("CHECK", Some(n), json!({})), &self.slots[n].known) {
            (Some((ok, answer)), Known::Added(_)) => assert!(ok, "{answer}"),
            (Some((ok, answer)), Known::Nothing) => assert!(!ok && answer["code"] == 3, "{answer}"),
            (Some(_), Known::Unsure) | (None, _) => {}
        }
    }

    fn status(&mut self) {
        if let Some((ok, answer)) = self.call("STATUS", None, json!({})) {
            assert!(ok, "{answer}");
        }
    }

    fn valid(&self) -> Value {
        let there = self.slots.iter().filter(|s| s.known != Known::Nothing);
        there.map(|s| json!({"containerID": s.id, "ifname": "eth0"})).collect()
    }

    fn collect(&mut self) {
        let valid = self.valid();
        if let Some((ok, answer)) = self.call("GC", None, json!({"cni.dev/valid-attachments": valid})) {
            assert!(ok, "{answer}");
            self.ghosts.clear();
        }
    }

    /// A pod's end: in order, with DEL before it, or not.
    fn end_pod(&mut self, n: usize, in_order: bool) {
        if in_order {
            self.delete(n);
        }
        if let Some(netns) = self.slots[n].netns.take() {
            self.node.end_pod(netns);
        }
        if self.slots[n].known != Known::Nothing {
            self.ghosts.push(self.slots[n].asks.clone());
        }
        self.slots[n] = self.slot();
    }

    /// A container that is not there yet.
    fn slot(&mut self) -> Slot {
        Slot { id: self.container(), netns: None, known: Known::Nothing, asks: self.asks() }
    }

    fn reboot(&mut self) {
        self.calls += 1;
        for n in 0..SLOTS {
            self.slots[n] = self.slot();
        }
        self.ghosts.clear();
        self.node.reboot();
        let pod = self.node.pod("early");
        assert_eq!(self.node.verb("ADD", "early", Some(pod.path())).1["code"], 11, "the agent has not started");
        self.node.end_pod(pod);
        loader::load(&self.node.place).expect("the agent starts");
        self.node.gc(&[]);
        assert_eq!(self.held(), BTreeMap::new(), "leases end with the boot");
    }

    /// Calls that nobody kills: what is unsure is deleted, and what the runtime does not know is collected. DEL must
    /// not leave anything to GC.
    fn settle(&mut self) {
        for slot in self.slots.iter_mut().filter(|s| s.known == Known::Unsure) {
            self.node.ok("DEL", &slot.id, slot.netns.as_ref().map(Netns::path));
            slot.known = Known::Nothing;
        }
        let leases = self.node.held_leases();
        let namespaces: BTreeSet<u64> = leases.iter().filter_map(|l| l["netns_cookie"].as_u64()).collect();
        let addresses: BTreeSet<IpAddr> = self.held().into_values().flatten().collect();
        let there = self.there();
        assert!(there.pods.is_subset(&namespaces), "pods in the map without a lease");
        assert!(there.steered.is_subset(&namespaces), "steering without a lease");
        assert!(there.addresses.is_subset(&octets(&addresses)), "addresses in the map without a lease");
        assert!(there.routed.is_subset(&addresses), "routes without a lease");
        let leased = octets(&addresses);
        let unleased = there.host_ports.values().find(|to| !leased.contains(&to.addr.octets()));
        assert_eq!(unleased, None, "a host port without a lease");
        let valid: Vec<&str> = self.slots.iter().filter(|s| s.known != Known::Nothing).map(|s| s.id.as_str()).collect();
        self.node.gc(&valid);
        self.ghosts.clear();
    }

    /// Addresses of the leases that are held, by container.
    fn held(&self) -> BTreeMap<String, BTreeSet<IpAddr>> {
        let files = self.node.lease_files();
        let held = files.iter().map(|f| f.split('@').collect::<Vec<_>>()).filter(|f| f.len() == 3);
        held.map(|f| (f[1].to_owned(), f[0].split(',').map(|a| a.parse().expect("an address")).collect())).collect()
    }

    /// Compares everything that is there with the model.
    fn look(&mut self) {
        self.settle();
        let (mut want, mut cookies, mut all) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        let mut host_ports = BTreeMap::new();
        let mut host = Connection::open_in(&self.node.netns).expect("connection");
        for slot in &self.slots {
            let (Known::Added(addresses), Some(netns)) = (&slot.known, &slot.netns) else { continue };
            want.insert(slot.id.clone(), addresses.clone());
            cookies.insert(netns.cookie().expect("cookie"));
            all.extend(addresses.iter().copied());
            host_ports.extend(slot.asks.entries(addresses));
            let attachment = Attachment { container: slot.id.clone(), ifname: "eth0".into() };
            let link = link::find(&mut host, &wiring::link_name(&attachment)).expect("find").expect("the pod's link");
            let bucket = qdisc::bucket(&mut host, link.index).expect("read").map(|(rate, _)| rate);
            assert_eq!(bucket, slot.asks.rate, "the limit of {}", slot.id);
            let filtered = self.node.netns.run(|| packets::pod_attached(&mut host, link.index));
            assert!(filtered.expect("run").expect("look"), "programs of {}", slot.id);
            self.node.ok("CHECK", &slot.id, Some(netns.path()));
        }
        assert_eq!(self.held(), want, "leases");
        let there = self.there();
        assert_eq!(there.pods, cookies, "pods in the map");
        assert_eq!(there.addresses, octets(&all), "addresses in the map");
        assert_eq!(there.steered, cookies, "steering");
        assert_eq!(there.routed, all, "routes");
        assert_eq!(there.host_ports, host_ports, "host ports in the map");
        let releasing = self.node.lease_files().len() - want.len();
        assert!(self.node.links().len() <= want.len() + releasing, "links: {:?}", self.node.links());
    }

    /// What the kernel has.
    fn there(&self) -> There {
        let maps = self.node.maps();
        let mut connection = Connection::open_in(&self.node.netns).expect("connection");
        let routes = kernel::read_routes(&mut connection).expect("routes").into_iter();
        let ours = routes.filter(|r| r.protocol == PROTOCOL_POD && r.table == MAIN_TABLE);
        There {
            host_ports: maps.host_ports.entries().expect("map").into_iter().collect(),
            pods: maps.pods.entries().expect("map").into_iter().map(|(c, _)| c).collect(),
            addresses: maps.addrs.entries().expect("map").into_iter().map(|(a, _)| a.octets()).collect(),
            steered: loader::attached_pods(&self.node.place.bpffs).expect("pins").into_iter().collect(),
            routed: ours.map(|r| r.to.address).collect(),
        }
    }

    /// Every pod ends; then nothing at all is left.
    fn end(&mut self) {
        for slot in &mut self.slots {
            self.node.ok("DEL", &slot.id, None);
            slot.known = Known::Nothing;
            if let Some(netns) = slot.netns.take() {
                self.node.end_pod(netns);
            }
        }
        let until = Instant::now() + QUIET_WITHIN;
        loop {
            self.node.gc(&[]);
            let (files, links) = (self.node.lease_files(), self.node.links());
            if files.is_empty() && links.is_empty() {
                break;
            }
            assert!(Instant::now() < until, "left: {files:?} {links:?}");
        }
        self.look();
    }
}
