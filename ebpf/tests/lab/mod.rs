//! Programs and maps of a node that has no network: loaded and pinned in a file system of their own.

use crate::{ground::Ground, kernel::since};
use aya::{
    maps::{Map, MapData, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use sluice_ebpf::{
    common::{CT_HALF, Flow, Reason, Reports, ServiceKey, Translation, map},
    dry_run::{Arrival, Outcome, Program, Steered, Steering},
    layout::Wanted,
    loader::{self, XDP},
    maps::{Counters, HashMap, Listeners, NodeMaps, PodMaps, ServiceMaps, pin_dir},
    settings::SettingsMap,
    sweep::Sweeper,
    table::ServiceTable,
};
use sluice_netlink::Netns;
use std::{
    collections::BTreeMap,
    os::fd::AsFd,
    sync::{Arc, Mutex},
};

pub struct Lab {
    ground: Ground,
    pub pods: PodMaps,
    pub listeners: Listeners,
    pub node: NodeMaps,
    pub settings: SettingsMap,
    pub flows: HashMap<Flow, Translation>,
    pub halves: HashMap<Flow, Translation>,
    pub sweeper: Sweeper,
    reports: Mutex<PerCpuArray<MapData, [u64; 2]>>,
    counters: Counters,
    table: ServiceTable,
    programs: BTreeMap<&'static str, Program>,
    steering: Steering,
}

impl Lab {
    pub fn new(name: &str) -> Self {
        let ground = Ground::new(name);
        let loaded = loader::load(&ground.place).expect("load");
        assert_eq!(loaded.xdp, since(5, 18), "a program for XDP");
        let dir = pin_dir(&ground.place.bpffs);
        let open = |name| (name, Program::open(&ground.place.bpffs, name).expect("program"));
        let reports = Map::PerCpuArray(MapData::from_pin(dir.join(map::REPORTS)).expect("map"));
        Self {
            pods: PodMaps::open(&dir).expect("maps"),
            listeners: Listeners::open(&dir).expect("map"),
            steering: Steering::open(&ground.place.bpffs).expect("program"),
            node: NodeMaps::open(&dir).expect("maps"),
            settings: SettingsMap::open(&dir).expect("map"),
            flows: HashMap::open(&dir, map::FLOWS).expect("map"),
            halves: HashMap::open(&dir, map::HALVES).expect("map"),
            sweeper: Sweeper::open(&dir).expect("map"),
            reports: Mutex::new(reports.try_into().expect("map")),
            counters: Counters::open(&dir).expect("map"),
            table: ServiceTable::open(ServiceMaps::open(&dir).expect("maps")).expect("table"),
            programs: ["from_pod", "from_wire", "from_host"]
                .into_iter()
                .chain(loaded.xdp.then_some(XDP))
                .map(open)
                .collect(),
            ground,
        }
    }

    /// What the programs know, as they made it.
    pub fn known(&self) -> Vec<(Flow, Translation)> {
        [&self.flows, &self.halves].into_iter().flat_map(|map| map.entries().expect("entries")).collect()
    }

    /// As a program would have noted it.
    pub fn note(&self, flow: &Flow, t: &Translation) {
        self.forget(flow);
        let map = if t.flags & CT_HALF != 0 { &self.halves } else { &self.flows };
        map.set(flow, t).expect("set");
    }

    pub fn forget(&self, flow: &Flow) {
        for map in [&self.flows, &self.halves] {
            map.remove(flow).expect("remove");
        }
    }

    /// What each CPU may send of ICMP errors.
    pub fn set_reports(&self, reports: Reports) {
        let each = [reports.unreachable, reports.too_big].map(|b| b.full_ns);
        let cpus = nr_cpus().expect("the number of CPUs");
        let values = PerCpuValues::try_from(vec![each; cpus]).expect("one each");
        self.reports.lock().expect("nobody panics with it").set(0, values, 0).expect("set");
    }

    pub fn serve(&mut self, services: Vec<(ServiceKey, Wanted)>) {
        let wanted = services.into_iter().map(|(k, w)| (k, Arc::new(w))).collect();
        self.table.apply(&wanted).expect("services");
        self.sweeper.forget(&self.table.take_withdrawn()).expect("forget");
    }

    /// The same by an agent that is killed before it has looked through connections, and the one after it.
    pub fn serve_and_die(&mut self, services: Vec<(ServiceKey, Wanted)>) {
        let wanted = services.into_iter().map(|(k, w)| (k, Arc::new(w))).collect();
        self.table.apply(&wanted).expect("services");
        let maps = ServiceMaps::open(&pin_dir(&self.ground.place.bpffs)).expect("maps");
        self.table = ServiceTable::open(maps).expect("table");
        self.table.apply(&wanted).expect("services");
        assert!(self.table.take_withdrawn().is_empty(), "it knows of none");
        self.sweeper.forget_misled(&self.table).expect("forget");
    }

    /// Of all programs that this kernel takes.
    pub fn programs(&self) -> impl Iterator<Item = &'static str> {
        self.programs.keys().copied()
    }

    pub fn run(&self, program: &str, packet: &[u8]) -> Outcome {
        self.programs[program].run(packet, 1).expect("run")
    }

    /// Over a link of the calling thread's namespace.
    pub fn run_at(&self, program: &str, ifindex: u32, packet: &[u8]) -> Outcome {
        self.programs[program].run_at(ifindex, packet, 1).expect("run")
    }

    pub fn steer(&self, arrival: &Arrival) -> Result<Steered, sluice_ebpf::Error> {
        self.steering.run(arrival)
    }

    /// Steers what comes to a namespace.
    pub fn attach(&self, netns: &Netns) {
        let cookie = netns.cookie().expect("cookie");
        loader::attach_pod(&self.ground.place.bpffs, netns.as_fd(), cookie).expect("attach");
    }

    pub fn detach(&self, netns: &Netns) {
        loader::detach_pod(&self.ground.place.bpffs, netns.cookie().expect("cookie")).expect("detach");
    }

    /// `None` where the kernel makes no packet of the bytes.
    pub fn try_run(&self, program: &str, packet: &[u8]) -> Option<Outcome> {
        self.programs[program].run(packet, 1).ok()
    }

    pub fn counter(&self, reason: Reason) -> u64 {
        self.counters.get(reason).expect("counter")
    }
}
