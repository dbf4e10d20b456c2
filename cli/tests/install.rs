//! `sluice install` and `sluice uninstall` on a node of its own: folders, a network namespace, a BPF file system and a
//! cgroup, all removed at the end. The plugin that is installed and systemd are scripts; the agent's part, to write the
//! configuration when it is ready, is done when the script of systemd is told to start it. Needs root.

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sluice_cni::{Lease, PodRef, Store, store};
use sluice_ebpf::{
    loader::{self, Place},
    maps::pin_dir,
};
use sluice_netlink::{Connection, Netns, ns};
use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

const UNITS: [&str; 2] = ["sluice-agent.service", "sluice-agent.socket"];

struct Node {
    base: tempfile::TempDir,
    netns: Netns,
    place: Option<Place>,
}

fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

fn script(path: &Path, text: &str) {
    fs::write(path, format!("#!/bin/sh\n{text}")).expect("write");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("executable");
}

impl Node {
    fn new(name: &str) -> Self {
        let base = tempfile::Builder::new().prefix(&format!("sluice-test-install-{name}-")).tempdir().expect("folder");
        let netns = ns::make_named(&base.path().join("netns")).expect("namespace (root is needed)");
        let node = Self { base, netns, place: None };
        for dir in ["tools", "conf", "v1", "v2", "run"] {
            fs::create_dir(node.at(dir)).expect("folder");
        }
        for version in ["v1", "v2"] {
            let plugin = format!(
                "# {version}\ncat >{0}/asked\ntest -e {0}/ready && exit\necho '{{\"code\":50,\"msg\":\"no data path\"}}'\n\
                 exit 1\n",
                node.base.path().display()
            );
            script(&node.at(version).join("sluice-cni"), &plugin);
            // Large enough for a kill in the middle.
            fs::write(node.at(version).join("sluice-agent"), version.repeat(1 << 20)).expect("agent");
            fs::write(node.at(version).join("sluice"), version).expect("command line");
        }
        let conflist =
            r#"{"name":"sluice","cniVersion":"1.0.0","plugins":[{"type":"sluice-cni","ranges":["10.0.0.0/24"]}]}"#;
        fs::write(node.at("run/10-sluice.conflist"), conflist).expect("configuration");
        let systemctl = "echo \"$@\" >>BASE/systemctl\n[ \"$1\" = restart ] && test -e BASE/agent-works \
             && ln -sf BASE/run/10-sluice.conflist BASE/conf/.next \
             && mv BASE/conf/.next BASE/conf/10-sluice.conflist\nexit 0\n";
        script(&node.at("tools/systemctl"), &systemctl.replace("BASE", &node.base.path().display().to_string()));
        node.mark("agent-works");
        node.mark("ready");
        node
    }

    fn at(&self, path: &str) -> PathBuf {
        self.base.path().join(path)
    }

    fn mark(&self, file: &str) {
        fs::write(self.at(file), "").expect("mark");
    }

    fn command(&self, verb: &str, more: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_sluice"));
        let path = format!("{}:{}", self.at("tools").display(), std::env::var("PATH").unwrap_or_default());
        c.env("PATH", path).arg(verb);
        for (flag, dir) in
            [("bin-dir", "bin"), ("conf-dir", "conf"), ("program-dir", "programs"), ("unit-dir", "units")]
        {
            c.arg(format!("--{flag}={}", self.at(dir).display()));
        }
        c.args(more);
        c
    }

    fn run(&self, mut command: Command) -> Output {
        self.netns.run(move || command.output()).expect("in the node").expect("run sluice")
    }

    fn install(&self, version: &str, more: &[&str]) -> Output {
        let from = format!("--from={}", self.at(version).display());
        let arguments: Vec<&str> = [from.as_str()].into_iter().chain(more.iter().copied()).collect();
        self.run(self.command("install", &arguments))
    }

    fn uninstall(&self, more: &[&str]) -> Output {
        let state = format!("--state-dir={}", self.at("state").display());
        let run = format!("--run-dir={}", self.at("run").display());
        let bpffs = format!("--bpffs={}", self.at("bpf").display());
        let arguments: Vec<&str> =
            [&state, &run, &bpffs].map(String::as_str).into_iter().chain(more.iter().copied()).collect();
        self.run(self.command("uninstall", &arguments))
    }

    fn installed(&self, version: &str) {
        for (file, name) in
            [("bin/sluice-cni", "sluice-cni"), ("programs/sluice-agent", "sluice-agent"), ("programs/sluice", "sluice")]
        {
            assert!(
                fs::read(self.at(file)).expect(file) == fs::read(self.at(version).join(name)).expect(name),
                "{file} is of {version}"
            );
        }
        assert_eq!(fs::metadata(self.at("bin/sluice-cni")).expect("plugin").permissions().mode() & 0o777, 0o755);
        assert!(self.at("conf/10-sluice.conflist").exists() && UNITS.iter().all(|u| self.at("units").join(u).exists()));
        assert_eq!(self.files("bin"), ["loopback", "sluice-cni"]);
        assert_eq!(self.files("programs"), ["sluice", "sluice-agent"]);
    }

    fn files(&self, dir: &str) -> Vec<String> {
        let listed = fs::read_dir(self.at(dir)).into_iter().flatten().flatten();
        let mut names: Vec<String> = listed.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Loads the data path as an agent does.
    fn load(&mut self) {
        let bpffs = self.at("bpf");
        fs::create_dir(&bpffs).expect("folder");
        mount("bpf", &bpffs, "bpf", MountFlags::empty(), None).expect("mount bpffs");
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(PathBuf::from);
        let root = root.into_iter().find(|p| p.join("cgroup.controllers").exists()).expect("a cgroup2 mount");
        let cgroup = root.join(self.base.path().file_name().expect("a name"));
        fs::create_dir(&cgroup).expect("cgroup");
        let place = self.place.insert(Place { bpffs, cgroup });
        loader::load(place).expect("load");
    }

    /// A lease as the plugin writes it.
    fn lease(&self, pod: &str) -> Store {
        let state = self.at("state/cni");
        let cookie = Connection::open_in(&self.netns).expect("connection").netns_cookie().expect("cookie");
        let store = Store::open(&state, &store::boot(cookie).expect("boot")).expect("store");
        let lease = Lease {
            container: pod.into(),
            ifname: "eth0".into(),
            addresses: vec!["10.0.0.7".parse().expect("ip")],
            netns: "/run/netns/x".into(),
            netns_cookie: 5,
            link: "slc0".into(),
            mac: [2; 6],
            network: "sluice".into(),
            bandwidth: Default::default(),
            host_ports: vec![],
            pod: PodRef { namespace: "shop".into(), name: pod.into(), uid: "u".into() },
        };
        store.write(&store::Lock::take(&state).expect("lock"), &lease).expect("write");
        store
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(place) = &self.place {
            let _ = loader::unload(&place.bpffs);
            let _ = unmount(&place.bpffs, UnmountFlags::DETACH);
            let _ = fs::remove_dir(&place.cgroup);
        }
        let _ = ns::remove_named(&self.at("netns"));
    }
}

const ARGUMENTS: [&str; 2] = ["--", "--node-name=a"];

#[test]
fn a_node_is_installed_upgraded_and_uninstalled() {
    let node = Node::new("life");
    let out = node.install("v1", &[]);
    assert!(!out.status.success() && text(&out).contains("behind `--`"), "{}", text(&out));
    assert_eq!(
        node.files("bin").len() + node.files("programs").len() + node.files("units").len(),
        0,
        "nothing is done by halves"
    );

    let out = node.install("v1", &ARGUMENTS);
    assert!(out.status.success(), "{}", text(&out));
    node.installed("v1");
    assert!(fs::read_to_string(node.at("asked")).expect("asked").contains("10.0.0.0/24"), "the plugin was asked");
    let unit = fs::read_to_string(node.at("units/sluice-agent.service")).expect("unit");
    assert!(unit.contains("--node-name=a"), "{unit}");

    // An upgrade: whoever runs the plugin keeps what it runs, and the arguments stay.
    let mut running = File::open(node.at("bin/sluice-cni")).expect("a running plugin");
    let out = node.install("v2", &[]);
    assert!(out.status.success(), "{}", text(&out));
    node.installed("v2");
    let mut old = Vec::new();
    running.read_to_end(&mut old).expect("read");
    assert_eq!(old, fs::read(node.at("v1/sluice-cni")).expect("v1"));
    assert_eq!(fs::read_to_string(node.at("units/sluice-agent.service")).expect("unit"), unit);
    let before = fs::metadata(node.at("bin/sluice-cni")).expect("plugin").modified().expect("time");
    assert!(node.install("v2", &[]).status.success());
    assert_eq!(fs::metadata(node.at("bin/sluice-cni")).expect("plugin").modified().expect("time"), before, "untouched");

    // The plugin stays while there is a pod: the runtime needs it for DEL.
    let store = node.lease("web");
    let out = node.uninstall(&["--purge"]);
    assert!(!out.status.success() && text(&out).contains("shop/web"), "{}", text(&out));
    node.installed("v2");
    let out = node.uninstall(&[]);
    assert!(out.status.success() && text(&out).contains("shop/web"), "{}", text(&out));
    assert_eq!(
        (node.files("bin"), node.files("programs")),
        (vec!["loopback".to_owned(), "sluice-cni".to_owned()], vec!["sluice".to_owned()])
    );
    assert_eq!(node.files("units").len() + node.files("conf").len(), 0);
    assert_eq!(store.held().expect("leases").len(), 1);
    let calls = fs::read_to_string(node.at("systemctl")).expect("calls");
    assert!(calls.ends_with("disable --now sluice-agent.service sluice-agent.socket\ndaemon-reload\n"), "{calls}");

    let lock = store::Lock::take(&node.at("state/cni")).expect("lock");
    store.remove(&lock, &store.entries().expect("entries")[0]).expect("the pod goes");
    drop(lock);
    for _ in 0..2 {
        let out = node.uninstall(&[]);
        assert!(out.status.success(), "{}", text(&out));
        assert_eq!(node.files("bin").len(), 0);
    }
}

#[test]
fn configurations_of_others_are_named_and_moved_only_when_asked() {
    let node = Node::new("foreign");
    let other = node.at("conf/05-other.conflist");
    fs::write(&other, r#"{"name":"x","plugins":[{"type":"bridge"}]}"#).expect("foreign");
    fs::write(node.at("conf/99-other.conf"), "{}").expect("foreign, but behind ours");
    let out = node.install("v1", &ARGUMENTS);
    assert!(!out.status.success() && text(&out).contains("05-other.conflist"), "{}", text(&out));
    assert_eq!((node.files("bin").len(), node.files("conf").len()), (0, 2));

    // Not before pods can be served: until then the other network is the one that works.
    fs::remove_file(node.at("ready")).expect("not ready");
    let asked: Vec<&str> = ["--move-aside", "--timeout=1"].into_iter().chain(ARGUMENTS).collect();
    let out = node.install("v1", &asked);
    assert!(!out.status.success() && text(&out).contains("no data path"), "{}", text(&out));
    assert!(other.exists());
    node.mark("ready");
    let out = node.install("v1", &["--move-aside"]);
    assert!(out.status.success(), "{}", text(&out));
    node.installed("v1");
    assert_eq!(node.files("conf"), ["05-other.conflist.sluice-aside", "10-sluice.conflist", "99-other.conf"]);
}

#[test]
fn an_agent_that_does_not_come_is_said_and_waited_for_within_bounds() {
    let node = Node::new("absent");
    fs::remove_file(node.at("agent-works")).expect("it does not");
    symlink("/nonexistent", node.at("conf/10-sluice.conflist")).expect("of an earlier boot");
    let asked: Vec<&str> = ["--timeout=1"].into_iter().chain(ARGUMENTS).collect();
    let out = node.install("v1", &asked);
    let said = text(&out);
    assert!(!out.status.success() && said.contains("has not written") && said.contains("journalctl"), "{said}");
    let out = node.install("v1", &["--no-service", "--timeout=1"]);
    assert!(!out.status.success() && text(&out).contains("the agent's log"), "{}", text(&out));
    node.mark("agent-works");
    let out = node.install("v1", &[]);
    assert!(out.status.success(), "{}", text(&out));
    node.installed("v1");
    let out = node.install("nowhere", &[]);
    assert!(!out.status.success() && text(&out).contains("--from"), "{}", text(&out));
}

/// `kill -9` at any moment: every file is of one version or the other, and another run finishes.
#[test]
fn killed_at_any_moment_it_is_finished_by_another_run() {
    let node = Node::new("kill");
    let until = |mut command: Command, after: Duration| {
        let run = move || {
            let mut child =
                command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().expect("spawn");
            std::thread::sleep(after); // any moment will do
            child.kill().expect("kill");
            child.wait().expect("wait");
        };
        node.netns.run(run).expect("in the node");
    };
    let whole = |file: &str, name: &str| match fs::read(node.at(file)) {
        Ok(there) => ["v1", "v2"].iter().any(|v| fs::read(node.at(v).join(name)).expect(name) == there),
        Err(_) => true,
    };
    for n in 0..60u64 {
        let version = if n % 2 == 0 { "v1" } else { "v2" };
        let from = format!("--from={}", node.at(version).display());
        let command = match n % 5 {
            4 => node.command("uninstall", &[&format!("--state-dir={}", node.at("state").display())]),
            _ => node.command("install", &[&[from.as_str()], &ARGUMENTS[..]].concat()),
        };
        until(command, Duration::from_micros(n * 700));
        assert!(
            whole("bin/sluice-cni", "sluice-cni") && whole("programs/sluice-agent", "sluice-agent"),
            "after kill {n}"
        );
    }
    let out = node.install("v2", &ARGUMENTS);
    assert!(out.status.success(), "{}", text(&out));
    node.installed("v2");
    let out = node.uninstall(&[]);
    assert!(out.status.success(), "{}", text(&out));
    for dir in ["bin", "programs", "units"] {
        assert_eq!(node.files(dir), Vec::<String>::new(), "{dir}");
    }
    assert!(!node.files("conf").contains(&"10-sluice.conflist".to_owned()));
}

#[test]
fn purging_leaves_nothing_in_the_kernel_and_on_the_disk() {
    let mut node = Node::new("purge");
    node.load();
    let pins = pin_dir(&node.at("bpf"));
    assert!(node.install("v1", &ARGUMENTS).status.success());
    let store = node.lease("web");
    fs::create_dir_all(node.at("state/agent")).expect("the agent's folder");
    let out = node.uninstall(&["--purge"]);
    assert!(!out.status.success() && pins.exists(), "{}", text(&out));
    let lock = store::Lock::take(&node.at("state/cni")).expect("lock");
    store.remove(&lock, &store.entries().expect("entries")[0]).expect("the pod goes");
    drop(lock);
    for _ in 0..2 {
        let out = node.uninstall(&["--purge"]);
        assert!(out.status.success(), "{}", text(&out));
        assert!(!pins.exists() && !node.at("run").exists());
        assert_eq!(node.files("state"), Vec::<String>::new());
    }
}
