//! Another layout's maps and links are taken over while callers connect. Needs root; a BPF file system, a cgroup and a
//! network namespace of its own. All callers of this process are in the test's cgroup, so that tests take turns.

mod ground;

use aya::maps::{self, Map, MapData, PerCpuArray, PerCpuValues};
use aya_obj::maps::{LegacyMap, bpf_map_def};
use ground::Ground;
use rustix::net::{netdevice::name_to_index, sockopt::set_socket_linger};
use sluice_ebpf::{
    Error,
    common::{Flow, LAYOUT, Pod, Reason, ServiceKey, TCP, Translation, map},
    layout::{Target, Wanted, WantedGroup},
    loader::{self, Prepared},
    maps::{Counters, HashMap, PodMaps, ServiceMaps, pin_dir},
    table::ServiceTable,
    upgrade::{Change, Rules},
};
use sluice_netlink::{
    lab::loopback_up,
    ns::{Unshare, unshare},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    fs::File,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

static TURN: Mutex<()> = Mutex::new(());

const BACKEND: [u8; 4] = [10, 9, 0, 1];
const VIP: ([u8; 4], u16) = ([10, 96, 0, 1], 80);
const POD: u64 = 77;

/// A node whose data path was loaded, with a service, a link of the node's own and a pod.
struct Node {
    home: PathBuf,
    ground: Ground,
    backend: SocketAddr,
    /// Of the node's own link, and of the pod.
    ifindex: u32,
    _pod: File,
    /// By the names of their pins, as they were made: link and program.
    links: BTreeMap<String, (u32, u32)>,
    _turn: MutexGuard<'static, ()>,
}

impl Node {
    fn new(name: &str) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        unshare(Unshare { net: true, ..Unshare::default() }).expect("unshare");
        loopback_up().expect("lo");
        for command in ["addr add 10.9.0.1/32 dev lo", "link add w0 type veth peer w1", "link set w0 up"] {
            assert!(Command::new("ip").args(command.split(' ')).status().expect("ip").success(), "{command}");
        }
        let ifindex = name_to_index(UdpSocket::bind("0.0.0.0:0").expect("socket"), "w0").expect("link");
        let ground = Ground::new(name);
        let bpffs = &ground.place.bpffs;
        let loaded = loader::load(&ground.place).expect("load");
        if loader::has_tcx(bpffs).expect("probe") {
            assert!(loader::attach_device(bpffs, ifindex).expect("attach"));
        }
        if loaded.xdp {
            assert!(loader::attach_xdp(bpffs, ifindex).expect("attach"));
        }
        let netns = || {
            unshare(Unshare { net: true, ..Unshare::default() }).expect("unshare");
            File::open("/proc/thread-self/ns/net").expect("namespace")
        };
        let pod = thread::spawn(netns).join().expect("namespace");
        loader::attach_pod(bpffs, pod.as_fd(), POD).expect("attach");
        let listener = TcpListener::bind((IpAddr::from(BACKEND), 0)).expect("listen");
        let backend = listener.local_addr().expect("address");
        thread::spawn(move || listener.incoming().flatten().for_each(answer));
        let links = loader::pinned_links(bpffs).expect("links");
        assert!(links.len() >= 9, "{links:?}");
        let membership = fs::read_to_string("/proc/self/cgroup").expect("cgroup");
        let own = membership.lines().find_map(|l| l.strip_prefix("0::/")).expect("cgroup2");
        let home = ground.place.cgroup.parent().expect("root").join(own);
        join(&ground.place.cgroup);
        let node = Self { home, ground, backend, ifindex, _pod: pod, links, _turn: turn };
        node.fill();
        node
    }

    fn bpffs(&self) -> &Path {
        &self.ground.place.bpffs
    }

    fn dir(&self) -> PathBuf {
        pin_dir(self.bpffs())
    }

    /// What an agent does from its view.
    fn fill(&self) {
        let key = ServiceKey { addr: addr(VIP.0), port_be: VIP.1.to_be(), proto: TCP, ..ServiceKey::default() };
        let target = Target { addr: addr(BACKEND), port_be: self.backend.port().to_be() };
        let wanted = Wanted::new(false, vec![WantedGroup { weight: 1, targets: vec![target] }]);
        let mut table = ServiceTable::open(ServiceMaps::open(&self.dir()).expect("maps")).expect("table");
        table.apply(&BTreeMap::from([(key, Arc::new(wanted))])).expect("services");
    }

    /// As if a release with another layout had pinned it.
    fn of_layout(&self, layout: u32) -> PathBuf {
        let other = self.dir().with_file_name(format!("v{layout}"));
        fs::rename(self.dir(), &other).expect("rename");
        other
    }

    fn state(&self) -> BTreeMap<String, (u32, u32)> {
        loader::pinned_links(self.bpffs()).expect("links")
    }

    /// Links are those that there were, each with another program.
    fn assert_switched(&self) {
        let now = self.state();
        let ids = |links: &BTreeMap<String, (u32, u32)>| -> Vec<(String, u32)> {
            links.iter().map(|(name, (id, _))| (name.clone(), *id)).collect()
        };
        assert_eq!(ids(&now), ids(&self.links));
        for (name, (_, program)) in &now {
            assert_ne!(*program, self.links[name].1, "{name}");
        }
        assert!(!loader::damaged(&self.ground.place).expect("look"));
        let left: Vec<_> =
            fs::read_dir(self.bpffs().join("sluice")).expect("list").flatten().map(|e| e.path()).collect();
        assert_eq!(left, [self.dir()], "the old folder is gone");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        join(&self.home);
        let _ = loader::detach_device(self.bpffs(), self.ifindex);
        let _ = loader::unload(self.bpffs());
    }
}

fn join(cgroup: &Path) {
    let joined = fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string());
    if !thread::panicking() {
        joined.expect("join the cgroup");
    }
}

fn addr(octets: [u8; 4]) -> sluice_ebpf::common::Addr {
    sluice_ebpf::addr(octets.into())
}

/// A byte, and whatever is sent comes back.
fn answer(mut stream: TcpStream) {
    thread::spawn(move || {
        let mut byte = [b'!'];
        while stream.write_all(&byte).is_ok() && stream.read_exact(&mut byte).is_ok() {}
    });
}

fn call() -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from(VIP), Duration::from_secs(5))?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}

/// One connection after the other, for as long as it lives.
struct Caller {
    stop: Arc<AtomicBool>,
    calls: Arc<AtomicUsize>,
    thread: Option<thread::JoinHandle<Vec<std::io::Error>>>,
}

impl Caller {
    fn start() -> Self {
        let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, counted) = (stop.clone(), calls.clone());
        let work = move || {
            let mut failed = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                match call() {
                    // Reset: nothing is left that waits to be forgotten.
                    Ok(stream) => set_socket_linger(&stream, Some(Duration::ZERO)).expect("linger"),
                    Err(e) => failed.push(e),
                }
                counted.fetch_add(1, Ordering::Relaxed);
            }
            failed
        };
        let caller = Self { stop, calls, thread: Some(thread::spawn(work)) };
        caller.some_more();
        caller
    }

    /// Waits until calls have begun and ended after now.
    fn some_more(&self) {
        let until = self.calls.load(Ordering::Relaxed) + 10;
        while self.calls.load(Ordering::Relaxed) < until {
            thread::yield_now();
        }
    }

    fn assert_none_failed(mut self) {
        self.some_more();
        self.stop.store(true, Ordering::Relaxed);
        let failed = self.thread.take().expect("once").join().expect("caller");
        assert!(failed.is_empty(), "{} of {:?} calls: {failed:?}", failed.len(), self.calls);
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A map of another shape in place of a pinned one.
fn replace(dir: &Path, name: &str, kind: u32, key: u32, value: u32, entries: u32) -> MapData {
    fs::remove_file(dir.join(name)).expect("unpin");
    make(dir, name, kind, key, value, entries)
}

fn make(dir: &Path, name: &str, kind: u32, key: u32, value: u32, entries: u32) -> MapData {
    let def = bpf_map_def {
        map_type: kind,
        key_size: key,
        value_size: value,
        max_entries: entries,
        map_flags: u32::from(kind == HASH),
        ..bpf_map_def::default()
    };
    let section_kind = aya_obj::EbpfSectionKind::Maps;
    let legacy = LegacyMap { def, inner_def: None, section_index: 0, section_kind, symbol_index: None, data: vec![] };
    let map = MapData::create(aya_obj::Map::Legacy(legacy), name, None).expect("make a map");
    map.pin(dir.join(name)).expect("pin");
    map
}

const HASH: u32 = 1;
const PERCPU_ARRAY: u32 = 6;
const LRU_HASH: u32 = 9;

/// Translations once said no more than where to.
const CHANGES: &[Change] =
    &[Change { map: map::FLOWS, from: 0, conversion: |key, to| Some((key.to_vec(), [to, &[0; 8]].concat())) }];

fn flow(port: u16) -> Flow {
    Flow { src: addr([192, 0, 2, 7]), dst: addr([192, 0, 2, 8]), sport_be: port, proto: TCP, ..Flow::default() }
}

fn bytes(flow: &Flow) -> [u8; 40] {
    let (src, dst) = (flow.src.octets(), flow.dst.octets());
    let rest = [flow.sport_be.to_ne_bytes(), flow.dport_be.to_ne_bytes(), [flow.proto, 0], [0; 2]].concat();
    [&src[..], &dst, &rest].concat().try_into().expect("40 bytes")
}

const FLOWS: u16 = 3_000;
/// Of services with affinity, of which there is none.
const COUNTER: Reason = Reason::Affine;
const COUNTED: u64 = 5;

/// Layout 0: one map is converted, one has fewer entries, some must be filled again, the others are as they were.
fn old_layout(node: &Node) -> PathBuf {
    PodMaps::open(&node.dir()).expect("maps").pods.set(&POD, &Pod { ifindex: 9, ..Pod::default() }).expect("pod");
    let old = node.of_layout(0);
    let flows = replace(&old, map::FLOWS, LRU_HASH, 40, 40, 131_072);
    let mut flows: maps::HashMap<_, [u8; 40], [u8; 40]> = Map::LruHashMap(flows).try_into().expect("flows");
    for port in 0..FLOWS {
        flows.insert(bytes(&flow(port)), bytes(&flow(port + 1)), 0).expect("flow");
    }
    let counters = replace(&old, map::COUNTERS, PERCPU_ARRAY, 4, 8, 32);
    let mut counters: PerCpuArray<_, u64> = Map::PerCpuArray(counters).try_into().expect("counters");
    let zeros = counters.get(&0, 0).expect("counter");
    let first = (0..zeros.len()).map(|cpu| if cpu == 0 { COUNTED } else { 0 });
    let values = PerCpuValues::try_from(first.collect::<Vec<_>>()).expect("a value per CPU");
    counters.set(COUNTER as u32, values, 0).expect("counter");
    replace(&old, map::SERVICES, HASH, 20, 200, 65_536);
    replace(&old, map::ANNOUNCED, HASH, 16, 8, 4_096);
    replace(&old, map::FRAGMENTS, LRU_HASH, 40, 8, 8_192);
    old
}

fn assert_state(node: &Node, flows_wanted: u16) {
    let pods = PodMaps::open(&node.dir()).expect("maps").pods;
    assert_eq!(pods.get(&POD).expect("read").map(|p| p.ifindex), Some(9), "shared");
    let flows: HashMap<Flow, Translation> = HashMap::open(&node.dir(), map::FLOWS).expect("flows");
    let there: BTreeMap<Flow, Translation> = flows.entries().expect("entries").into_iter().collect();
    assert_eq!(there.len(), usize::from(flows_wanted));
    for port in 0..flows_wanted {
        assert_eq!(there[&flow(port)], Translation { to: flow(port + 1), used: 0, flags: 0 }, "converted");
    }
    assert_eq!(Counters::open(&node.dir()).expect("counters").get(COUNTER).expect("get"), COUNTED);
}

fn prepare(node: &Node, step: impl FnMut(&str) -> Result<(), Error> + 'static) -> Result<Prepared, Error> {
    loader::prepare_as(&node.ground.place, true, true, Rules { changes: CHANGES, step: Box::new(step) })
}

fn old_flows(old: &Path) -> maps::HashMap<MapData, [u8; 40], [u8; 40]> {
    let flows = Map::LruHashMap(MapData::from_pin(old.join(map::FLOWS)).expect("open"));
    flows.try_into().expect("flows")
}

#[test]
fn callers_notice_nothing_of_another_layout() {
    let node = Node::new("upgrade");
    let mut held = call().expect("call");
    let old = old_layout(&node);
    let caller = Caller::start();
    let mut prepared = prepare(&node, |_| Ok(())).expect("prepare");
    assert!(prepared.unfilled(), "services have another shape");
    assert!(old.join("links/connect4").exists());
    // The programs of before go on noting connections.
    old_flows(&old).insert(bytes(&flow(FLOWS)), bytes(&flow(FLOWS + 1)), 0).expect("flow");
    caller.some_more();
    node.fill();
    prepared.switch().expect("switch");
    caller.some_more();
    prepared.finish().expect("finish");
    caller.assert_none_failed();
    node.assert_switched();
    assert_state(&node, FLOWS + 1);
    held.write_all(b"?").and_then(|()| held.read_exact(&mut [0])).expect("a connection of before");
    assert_eq!(held.peer_addr().expect("peer"), SocketAddr::from(VIP), "its translation is known");
}

/// A start that ended before its programs were in force: those of before have changed the state since.
#[test]
fn what_an_earlier_start_copied_is_copied_anew() {
    let node = Node::new("again");
    let old = old_layout(&node);
    drop(prepare(&node, |_| Ok(())).expect("prepare"));
    old_flows(&old).remove(&bytes(&flow(FLOWS - 1))).expect("forget");
    let mut prepared = prepare(&node, |_| Ok(())).expect("prepare");
    node.fill();
    prepared.switch().expect("switch");
    prepared.finish().expect("finish");
    node.assert_switched();
    assert_state(&node, FLOWS - 1);
}

/// What is done up to each step stays or is done again; callers notice nothing.
#[test]
fn killed_at_every_step_the_next_start_goes_on() {
    let node = Node::new("killed");
    let old = old_layout(&node);
    let caller = Caller::start();
    let killed_at = Arc::new(Mutex::new(BTreeSet::new()));
    let mut unfilled_runs = 0;
    loop {
        let (seen, mut this_run) = (killed_at.clone(), BTreeMap::<String, usize>::new());
        let step = move |name: &str| {
            let times = this_run.entry(name.to_owned()).or_default();
            *times += 1;
            match seen.lock().expect("no holder panics").insert((name.to_owned(), *times)) {
                true => Err(killed(name)),
                false => Ok(()),
            }
        };
        let run = prepare(&node, step).and_then(|mut prepared| {
            unfilled_runs += usize::from(prepared.unfilled());
            node.fill();
            prepared.switch()?;
            prepared.finish()
        });
        match run {
            Ok(()) => break,
            Err(Error::Syscall { operation: "be killed at", .. }) => {}
            Err(other) => panic!("{other:?} after {:?}", killed_at.lock()),
        }
        let known = |name: &String| old.join(name).exists() || node.dir().join(name).exists();
        assert!(node.links.keys().all(known), "a link has no pin after {:?}", killed_at.lock());
        caller.some_more();
    }
    caller.assert_none_failed();
    node.assert_switched();
    assert_state(&node, FLOWS);
    let steps = killed_at.lock().expect("no holder panics").len();
    assert!(steps > 45 && unfilled_runs > 10, "{steps} steps, {unfilled_runs} with maps to fill");
}

fn killed(step: &str) -> Error {
    Error::Syscall { operation: "be killed at", object: step.to_owned(), cause: ErrorKind::Interrupted.into() }
}

/// Also of a newer one. What would be lost is named, and the layout that was in force stays so.
#[test]
fn what_cannot_be_taken_over_stays_in_force() {
    let node = Node::new("refused");
    let newer = node.of_layout(LAYOUT + 1);
    let error = PodMaps::open(&node.dir()).err().expect("no such folder").to_string();
    let both = [format!("layout {}", LAYOUT + 1), format!("layout {LAYOUT}")];
    assert!(both.iter().all(|layout| error.contains(layout)), "{error}");
    let error = loader::complete(node.bpffs()).expect_err("no such folder");
    assert!(matches!(error, Error::OtherLayout { .. }), "{error}");

    let caller = Caller::start();
    let (ports, kept) = (newer.join(map::PORTS), newer.join("KEPT"));
    fs::rename(&ports, &kept).expect("rename");
    make(&newer, map::PORTS, HASH, 24, 4, 16_384);
    let error = loader::load(&node.ground.place).expect_err("ports would be lost").to_string();
    for part in ["map PORTS", "key 24", "key 20", "drain the node", &newer.display().to_string()] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!node.dir().exists(), "nothing was begun");
    caller.some_more();
    fs::rename(&kept, &ports).expect("rename");
    loader::load(&node.ground.place).expect("all shapes are known");
    caller.assert_none_failed();
    node.assert_switched();
}
