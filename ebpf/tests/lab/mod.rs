//! Programs and maps of a node that has no network: loaded and pinned in a file system of their own.

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sluice_ebpf::{
    common::{Reason, ServiceKey},
    dry_run::{Outcome, Program},
    layout::Wanted,
    loader::{self, Place},
    maps::{Counters, NodeMaps, PodMaps, ServiceMaps, pin_dir},
    settings::SettingsMap,
    table::ServiceTable,
};
use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc};

pub struct Lab {
    base: PathBuf,
    place: Place,
    pub pods: PodMaps,
    pub node: NodeMaps,
    pub settings: SettingsMap,
    counters: Counters,
    table: ServiceTable,
    programs: BTreeMap<&'static str, Program>,
}

impl Lab {
    pub fn new(name: &str) -> Self {
        let id = format!("sluice-test-{name}-{}", std::process::id());
        let base = std::env::temp_dir().join(&id);
        let bpffs = base.join("bpf");
        fs::create_dir_all(&bpffs).expect("folder");
        mount("bpf", &bpffs, "bpf", MountFlags::empty(), None).expect("mount bpffs (root is needed)");
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .map(PathBuf::from)
            .find(|p| p.join("cgroup.controllers").exists())
            .expect("a cgroup2 mount");
        let cgroup = root.join(&id);
        fs::create_dir(&cgroup).expect("cgroup");
        let place = Place { bpffs, cgroup };
        loader::load(&place).expect("load");
        let dir = pin_dir(&place.bpffs);
        let open = |name| (name, Program::open(&place.bpffs, name).expect("program"));
        Self {
            base,
            pods: PodMaps::open(&dir).expect("maps"),
            node: NodeMaps::open(&dir).expect("maps"),
            settings: SettingsMap::open(&dir).expect("map"),
            counters: Counters::open(&dir).expect("map"),
            table: ServiceTable::open(ServiceMaps::open(&dir).expect("maps")).expect("table"),
            programs: ["from_pod", "from_wire", "from_host"].map(open).into(),
            place,
        }
    }

    pub fn serve(&mut self, services: Vec<(ServiceKey, Wanted)>) {
        let wanted = services.into_iter().map(|(k, w)| (k, Arc::new(w))).collect();
        self.table.apply(&wanted).expect("services");
    }

    pub fn run(&self, program: &str, packet: &[u8]) -> Outcome {
        self.programs[program].run(packet, 1).expect("run")
    }

    /// `None` where the kernel makes no packet of the bytes.
    pub fn try_run(&self, program: &str, packet: &[u8]) -> Option<Outcome> {
        self.programs[program].run(packet, 1).ok()
    }

    pub fn counter(&self, reason: Reason) -> u64 {
        self.counters.get(reason).expect("counter")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = unmount(&self.place.bpffs, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.place.cgroup);
        let _ = fs::remove_dir_all(&self.base);
    }
}
