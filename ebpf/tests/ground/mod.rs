//! A BPF file system and a cgroup of a test's own, gone with it. Needs root.

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sluice_ebpf::loader::Place;
use std::{fs, path::PathBuf};

pub struct Ground {
    base: PathBuf,
    pub place: Place,
}

impl Ground {
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
        Self { base, place: Place { bpffs, cgroup } }
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let _ = unmount(&self.place.bpffs, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.place.cgroup);
        let _ = fs::remove_dir_all(&self.base);
    }
}
