//! A node to test on, and how its plugin is called.

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Value, json};
use sluice_ebpf::{
    loader::{self, Place},
    maps::{PodMaps, pin_dir},
};
use sluice_netlink::{Connection, Netns, link, ns};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    time::Duration,
};

pub struct Node {
    pub base: PathBuf,
    pub place: Place,
    pub netns: Netns,
    pub config: Value,
    pods: Mutex<Vec<PathBuf>>,
}

impl Node {
    pub fn new(name: &str, load: bool) -> Self {
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

    pub fn pod(&self, name: &str) -> Netns {
        let path = self.base.join(format!("pod-{name}"));
        let netns = ns::make_named(&path).expect("pod's namespace");
        self.pods.lock().expect("list").push(path);
        netns
    }

    pub fn end_pod(&self, netns: Netns) {
        let path = netns.path().to_owned();
        drop(netns);
        self.pods.lock().expect("list").retain(|p| *p != path);
        ns::remove_named(&path).expect("remove");
    }

    /// A boot: every namespace ends, and the BPF file system is empty.
    pub fn reboot(&mut self) {
        for pod in self.pods.lock().expect("list").drain(..) {
            ns::remove_named(&pod).expect("remove");
        }
        let path = self.base.join("node");
        ns::remove_named(&path).expect("remove");
        self.netns = ns::make_named(&path).expect("node's namespace");
        loader::unload(&self.place.bpffs).expect("unload");
    }

    /// Runs the plugin; its exit and its answer.
    pub fn run(&self, config: &str, env: &[(&str, &str)]) -> (bool, Value) {
        self.run_until(config, env, None).expect("nobody kills it")
    }

    /// The same; with a time it is killed then, and there is no answer unless it was quicker.
    pub fn run_until(&self, config: &str, env: &[(&str, &str)], kill: Option<Duration>) -> Option<(bool, Value)> {
        let work = || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-cni"));
            command.env_clear().envs(env.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().expect("spawn");
            child.stdin.take().expect("piped").write_all(config.as_bytes()).expect("write");
            if let Some(after) = kill {
                std::thread::sleep(after); // any moment will do
                child.kill().expect("kill");
            }
            let output = child.wait_with_output().expect("wait");
            output.status.code()?;
            let answer = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
            Some((output.status.success(), answer))
        };
        self.netns.run(work).expect("in the node")
    }

    pub fn verb(&self, verb: &str, id: &str, netns: Option<&Path>) -> (bool, Value) {
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

    pub fn ok(&self, verb: &str, id: &str, netns: Option<&Path>) -> Value {
        let (ok, answer) = self.verb(verb, id, netns);
        assert!(ok, "{verb} {id}: {answer}");
        answer
    }

    pub fn gc(&self, valid: &[&str]) {
        let mut config = self.config.clone();
        let valid = valid.iter().map(|id| json!({ "containerID": id, "ifname": "eth0" })).collect::<Vec<_>>();
        // Both, as libcni has it since 1.2.3.
        config["cni.dev/valid-attachments"] = json!(valid);
        config["cni.dev/attachments"] = json!(valid);
        let (ok, answer) = self.run(&config.to_string(), &[("CNI_COMMAND", "GC")]);
        assert!(ok, "{answer}");
    }

    pub fn links(&self) -> Vec<String> {
        let mut connection = Connection::open_in(&self.netns).expect("connection");
        let all = link::all(&mut connection).expect("links");
        all.into_iter().map(|(name, _)| name).filter(|n| n.starts_with("slc")).collect()
    }

    pub fn maps(&self) -> PodMaps {
        PodMaps::open(&pin_dir(&self.place.bpffs)).expect("maps")
    }

    pub fn lease_files(&self) -> Vec<String> {
        let boots = fs::read_dir(self.base.join("state/leases")).into_iter().flatten().flatten();
        let files = boots.flat_map(|b| fs::read_dir(b.path()).into_iter().flatten().flatten());
        files.map(|f| f.file_name().to_string_lossy().into_owned()).filter(|f| !f.starts_with('.')).collect()
    }

    /// The leases that are held, as they are on disk.
    pub fn held_leases(&self) -> Vec<Value> {
        let boots = fs::read_dir(self.base.join("state/leases")).into_iter().flatten().flatten();
        let files = boots.flat_map(|b| fs::read_dir(b.path()).into_iter().flatten().flatten());
        let held = files.filter(|f| f.file_name().to_string_lossy().matches('@').count() == 2);
        held.map(|f| serde_json::from_slice(&fs::read(f.path()).expect("read")).expect("a lease")).collect()
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

pub fn address(answer: &Value, n: usize) -> String {
    let text = answer["ips"][n]["address"].as_str().expect("an address");
    text.split('/').next().expect("split").to_owned()
}
