//! The node under test: its namespaces and mounts, its agent, its pods.

use crate::{nodes::Other, parts};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Value, json};
use sluice_model::{Resource, Revision, Snapshot};
use sluice_netlink::{
    Connection, Netns, kernel,
    ns::{self, Unshare},
    plan::{Address, LO, Prefix, State},
};
use std::{
    cell::{Cell, RefCell},
    fs,
    io::Write,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

pub const NODE: &str = "n1";
/// Set for the second node of a story that has two: its name.
pub const OTHER: &str = "SLUICE_TEST_NODE";
pub const SNAPSHOT: &str = "/run/sluice-test/snapshot.json";
pub const ACK: &str = "/run/sluice-test/ack";
/// Why the agent's last view is not in force.
pub const REFUSED: &str = "/run/sluice-test/refused";
pub const EARLY: &str = "/run/sluice-test/early";
/// Seconds that are the bound of every wait in these stories, where it is not [`PATIENCE`]: an emulated machine is slow.
const PATIENCE_S: &str = "SLUICE_TEST_PATIENCE_S";
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Ground {
    plugin: PathBuf,
    /// Seen from the machine: the cgroup that is the node's root, and where this process came from.
    outer_cgroup: PathBuf,
    home_cgroup: PathBuf,
    /// `cgroup.procs` of that and of the node's root, opened where both can be seen.
    procs: [fs::File; 2],
    cgroup_mount: PathBuf,
    agent: RefCell<Option<Child>>,
    sidecars: RefCell<Vec<Child>>,
    revision: Cell<u64>,
    /// Agents do without tcx links.
    pub clsact: Cell<bool>,
    /// Agents use XDP.
    pub xdp: Cell<bool>,
    /// Agents let backends' nodes answer callers from outside.
    pub dsr: Cell<bool>,
    /// Agents do without bpf_set_retval.
    pub eperm: Cell<bool>,
    pods: RefCell<Vec<PathBuf>>,
    /// A second node, for the story that has one.
    pub other: Option<Other>,
}

pub struct TestPod {
    pub name: String,
    pub netns: Netns,
    pub addresses: Vec<IpAddr>,
}

impl TestPod {
    pub fn ip(&self) -> IpAddr {
        self.addresses[0]
    }

    pub fn uid(&self) -> String {
        uid(&self.name)
    }
}

/// What the node of this process is called.
pub fn node_name() -> String {
    std::env::var(OTHER).unwrap_or_else(|_| NODE.into())
}

/// Where its pods' addresses are from.
fn ranges() -> [String; 2] {
    let number = if node_name() == NODE { 1 } else { 2 };
    [format!("10.244.{number}.0/24"), format!("fd00:{number}::/64")]
}

pub fn uid(name: &str) -> String {
    format!("00000000-0000-0000-0000-{name:0>12}")
}

/// Written by a part when it has done what it is for.
pub fn said(part: &str) -> PathBuf {
    PathBuf::from(format!("/run/sluice-test/said/{part}"))
}

/// Stands for the id of the pod's sidecar container.
pub fn sidecar_cgroup(pod: &str) -> String {
    format!("sidecar-{pod}")
}

/// The plugin's binary beside this test's, built if it is not there or old; or the one that the environment names, where
/// there is no compiler.
pub fn build_plugin() -> PathBuf {
    if let Some(ready) = std::env::var_os("SLUICE_TEST_PLUGIN") {
        return ready.into();
    }
    let exe = std::env::current_exe().expect("own path");
    let folder = exe.parent().and_then(Path::parent).expect("target/<profile>/deps");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "-p", "sluice-cni"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    if folder.ends_with("release") {
        cargo.arg("--release");
    }
    assert!(cargo.status().expect("cargo").success(), "build the plugin");
    folder.join("sluice-cni")
}

fn tmpfs(path: &str) {
    mount("tmpfs", path, "tmpfs", MountFlags::empty(), Some(c"mode=755")).expect("mount tmpfs");
}

impl Ground {
    pub fn new(plugin: PathBuf) -> Self {
        let cgroup_mount = sluice_agent::attest::cgroup_root().expect("cgroup2");
        let own = fs::read_to_string("/proc/self/cgroup").expect("own cgroup");
        let own = own.lines().find_map(|l| l.strip_prefix("0::/")).expect("a cgroup2 line").to_owned();
        let home_cgroup = cgroup_mount.join(own);
        let outer_cgroup = cgroup_mount.join(format!("sluice-test-datapath-{}", std::process::id()));
        fs::create_dir(&outer_cgroup).expect("cgroup (root is needed)");
        let open = |c: &Path| fs::File::options().write(true).open(c.join("cgroup.procs")).expect("cgroup.procs");
        let procs = [open(&home_cgroup), open(&outer_cgroup)];
        let ground = Self {
            plugin,
            procs,
            outer_cgroup,
            home_cgroup,
            cgroup_mount,
            agent: RefCell::default(),
            sidecars: RefCell::default(),
            revision: Cell::new(0),
            clsact: Cell::new(false),
            xdp: Cell::new(false),
            dsr: Cell::new(false),
            eperm: Cell::new(false),
            pods: RefCell::default(),
            other: None,
        };
        fs::write(ground.outer_cgroup.join("cgroup.procs"), "0").expect("enter the cgroup");
        ns::unshare(Unshare { net: true, mounts: true, cgroups: true }).expect("namespaces");
        let root = ground.cgroup_mount.to_str().expect("UTF-8");
        tmpfs(root); // the same file system is not mounted over itself
        mount("cgroup2", root, "cgroup2", MountFlags::empty(), None).expect("mount cgroup2");
        mount("bpf", "/sys/fs/bpf", "bpf", MountFlags::empty(), None).expect("mount bpffs");
        tmpfs("/run");
        tmpfs("/var/lib");
        fs::create_dir_all("/run/sluice-test/pods").expect("folder");
        fs::create_dir_all("/run/sluice-test/said").expect("folder");
        std::os::unix::fs::chown("/run/sluice-test/said", Some(1337), None).expect("the parts' own");
        // The node's own addresses: something to send from.
        let mut wanted = State { up: [LO].into(), ..State::default() };
        for text in ["192.168.77.1", "fd00:77::1"] {
            let prefix = Prefix::host(text.parse().expect(text));
            wanted.addresses.insert(Address { link: LO, prefix });
        }
        kernel::reconcile(&mut Connection::open().expect("rtnetlink"), &wanted, None).expect("addresses");
        ground.start_agent();
        ground
    }

    /// Does something as no process of the node: its sockets are not balanced. Nothing else may dial meanwhile.
    pub fn outside<T>(&self, work: impl FnOnce() -> T) -> T {
        let enter = |mut procs: &fs::File| procs.write_all(b"0").expect("change the cgroup");
        enter(&self.procs[0]);
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        enter(&self.procs[1]);
        done.unwrap_or_else(|cause| std::panic::resume_unwind(cause))
    }

    /// What the programs have counted, and where they are: for whoever reads of a failure.
    pub fn explain(&self) {
        let bpffs = Path::new("/sys/fs/bpf");
        let counted = sluice_ebpf::maps::Counters::open(&sluice_ebpf::maps::pin_dir(bpffs)).and_then(|c| c.all());
        for (label, count) in counted.unwrap_or_default().iter().filter(|(_, n)| *n > 0) {
            eprintln!("{label}: {count}");
        }
        eprintln!("programs on links {:?}", sluice_ebpf::loader::attached_devices(bpffs));
        let links = Connection::open().and_then(|mut c| sluice_netlink::link::devices(&mut c));
        eprintln!("links {links:?}");
    }

    pub fn start_agent(&self) {
        let _ = fs::remove_file(ACK);
        let ways = [
            (self.clsact.get(), parts::CLSACT),
            (self.xdp.get(), parts::XDP),
            (self.dsr.get(), parts::DSR),
            (self.eperm.get(), parts::EPERM),
        ];
        let ways: Vec<_> = ways.into_iter().filter(|(set, _)| *set).map(|(_, name)| (name, "1")).collect();
        let child = self.child("agent", &ways).spawn().expect("agent");
        *self.agent.borrow_mut() = Some(child);
        until("the agent has loaded the data path", || Path::new("/sys/fs/bpf/sluice/v1/steer_pod").exists());
    }

    /// kill -9.
    pub fn kill_agent(&self) {
        if let Some(mut agent) = self.agent.borrow_mut().take() {
            agent.kill().expect("kill");
            agent.wait().expect("reap");
        }
    }

    pub fn child(&self, part: &str, env: &[(&str, &str)]) -> Command {
        let mut command = Command::new(std::env::current_exe().expect("own path"));
        command.env(parts::PART, part).envs(env.iter().copied()).stdin(Stdio::piped());
        command
    }

    /// Gives the agent a snapshot and waits until it is in force.
    pub fn apply(&self, resources: Vec<Resource>) {
        self.publish(resources);
        self.in_force();
    }

    pub fn in_force(&self) {
        let revision = self.revision.get().to_string();
        until("the snapshot is in force", || fs::read_to_string(ACK).is_ok_and(|a| a == revision));
    }

    pub fn publish(&self, resources: Vec<Resource>) {
        self.revision.set(self.revision.get() + 1);
        let snapshot = Snapshot::new(Revision(self.revision.get()), resources);
        let next = format!("{SNAPSHOT}.next");
        fs::write(&next, serde_json::to_vec(&snapshot).expect("encodes")).expect("write");
        fs::rename(next, SNAPSHOT).expect("publish");
    }

    /// A pod made by the real plugin.
    pub fn pod(&self, name: &str) -> TestPod {
        self.pod_with(name, &[])
    }

    /// With these further fields of the plugin's configuration.
    pub fn pod_with(&self, name: &str, more: &[(&str, Value)]) -> TestPod {
        let path = PathBuf::from(format!("/run/sluice-test/pods/{name}"));
        let netns = ns::make_named(&path).expect("namespace");
        self.pods.borrow_mut().push(path);
        let answer = self.cni("ADD", name, &netns, more);
        let ips = answer["ips"].as_array().expect("ips");
        let address = |ip: &Value| ip["address"].as_str()?.split('/').next()?.parse().ok();
        let addresses = ips.iter().map(|ip| address(ip).expect("an address")).collect();
        TestPod { name: name.to_owned(), netns, addresses }
    }

    pub fn end_pod(&self, pod: TestPod) {
        self.cni("DEL", &pod.name, &pod.netns, &[]);
        let path = pod.netns.path().to_owned();
        drop(pod);
        self.pods.borrow_mut().retain(|p| *p != path);
        ns::remove_named(&path).expect("remove");
    }

    fn cni(&self, verb: &str, name: &str, netns: &Netns, more: &[(&str, Value)]) -> Value {
        let mut config = json!({
            "cniVersion": "1.0.0", "name": "sluice", "type": "sluice-cni", "ranges": ranges(),
        });
        more.iter().for_each(|(field, value)| config[*field] = value.clone());
        let mut child = Command::new(&self.plugin)
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", name)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", netns.path())
            .env("CNI_ARGS", format!("K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name};K8S_POD_UID={}", uid(name)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("plugin");
        child.stdin.take().expect("piped").write_all(config.to_string().as_bytes()).expect("write");
        let output = child.wait_with_output().expect("wait");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{verb} {name}: {text}");
        serde_json::from_str(&text).unwrap_or(Value::Null)
    }

    /// A sidecar in the pod: its own cgroup, an ordinary user, no capability. Ends when killed.
    pub fn sidecar(&self, pod: &TestPod) -> u32 {
        self.process(pod, "sidecar", &sidecar_cgroup(&pod.name))
    }

    /// A child in the pod's network namespace that plays `part`, as an ordinary user in a cgroup of its own.
    pub fn process(&self, pod: &TestPod, part: &str, cgroup: &str) -> u32 {
        use std::os::unix::process::CommandExt;
        let cgroup = self.cgroup_mount.join(cgroup);
        fs::create_dir_all(&cgroup).expect("cgroup");
        let _ = fs::remove_file(said(part));
        let env = [("SLUICE_TEST_POD", pod.name.as_str())];
        let mut command = self.child(part, &env);
        command.uid(1337).gid(1337);
        let mut child = pod.netns.run(move || command.spawn()).expect("run").expect(part);
        fs::write(cgroup.join("cgroup.procs"), child.id().to_string()).expect("move the process");
        // It waits for this line, so that it never runs outside its cgroup.
        child.stdin.take().expect("piped").write_all(b"go\n").expect("start the process");
        let pid = child.id();
        self.sidecars.borrow_mut().push(child);
        pid
    }

    pub fn kill_sidecar(&self, pid: u32) {
        let mut all = self.sidecars.borrow_mut();
        let at = all.iter().position(|c| c.id() == pid).expect("a sidecar of ours");
        let mut child = all.remove(at);
        child.kill().expect("kill");
        child.wait().expect("reap");
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let children = self.sidecars.get_mut().drain(..).chain(self.agent.get_mut().take());
        for mut child in children {
            let _ = child.kill();
            let _ = child.wait();
        }
        for pod in self.pods.get_mut().drain(..) {
            let _ = ns::remove_named(&pod);
        }
        let subs = fs::read_dir(&self.cgroup_mount).into_iter().flatten().flatten();
        for sub in subs.filter(|s| ["sidecar-", "app-"].iter().any(|p| s.file_name().to_string_lossy().starts_with(p)))
        {
            let _ = fs::remove_dir(sub.path());
        }
        for _ in ["cgroup2", "tmpfs"] {
            let _ = unmount(&self.cgroup_mount, UnmountFlags::DETACH);
        }
        let _ = fs::write(self.home_cgroup.join("cgroup.procs"), std::process::id().to_string());
        let _ = fs::remove_dir(&self.outer_cgroup);
    }
}

/// Waits for a condition, not for a time.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let told = std::env::var(PATIENCE_S).ok().and_then(|s| s.parse().ok()).map(Duration::from_secs);
    let patience = told.unwrap_or(PATIENCE);
    let deadline = Instant::now() + patience;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {patience:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
