//! The local cluster's plan: which machines there are, what runs on each, and where everything lies. It decides and
//! writes down; `up` and `down` act.

use crate::machine::{Machine, Program, Sockets};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sluice_netlink::plan::GATEWAY4;
use std::{
    collections::HashMap,
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    path::{Path, PathBuf},
};

/// Below it, a folder per cluster. Not below /var/lib/sluice: that is each machine's own disk.
const ROOT: &str = "/var/lib/sluice-local";
pub const API_PORT: u16 = 6443;
pub const DEFAULT: &str = "sluice";
pub const NODES: u8 = 3;
/// As many as have addresses below the pool's.
pub const NODES_MAX: u8 = 50;
/// Addresses of services of type LoadBalancer: the high end of the machines' network.
const LOAD_BALANCER_POOL: &str = "172.30.0.192/26";
/// It becomes part of the names of cgroups and folders.
const NAME_MAX: usize = 32;

/// As a label of DNS (RFC 1123).
pub fn parse_name(name: &str) -> Result<String, String> {
    let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let fine = (1..=NAME_MAX).contains(&name.len())
        && name.starts_with(letter)
        && name.ends_with(letter)
        && name.chars().all(|c| letter(c) || c == '-');
    let why = || format!("a cluster's name is made of lower-case letters, digits and '-', at most {NAME_MAX} of them");
    if fine { Ok(name.to_owned()) } else { Err(why()) }
}
const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
const CNI_CONF: &str = "/run/cni/net.d";
const CNI_BIN: &str = "/var/lib/sluice/cni-bin";
/// What the runtime looks for in [`CNI_BIN`]: the plugin, and the loopback plugin that it also is.
pub const CNI_NAMES: [&str; 2] = ["sluice-cni", "loopback"];

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cluster {
    pub name: String,
    pub nodes: u8,
    /// On the host's loopback.
    pub api_port: u16,
    /// Folder of Sluice's programs.
    pub bin: PathBuf,
    pub images: PathBuf,
    /// CPUs each node offers to pods.
    pub node_cpus: u32,
    pub node_memory_mib: u64,
    /// Extra arguments for control and for every agent.
    #[serde(default)]
    pub control_args: Vec<String>,
    #[serde(default)]
    pub agent_args: Vec<String>,
}

impl Cluster {
    pub fn dir_of(name: &str) -> PathBuf {
        Path::new(ROOT).join(name)
    }

    pub fn dir(&self) -> PathBuf {
        Self::dir_of(&self.name)
    }

    fn file(name: &str) -> PathBuf {
        Self::dir_of(name).join("cluster.json")
    }

    pub fn load(name: &str) -> Result<Option<Self>> {
        match fs::read(Self::file(name)) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text).context("read the cluster's plan")?)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).context("read the cluster's plan"),
        }
    }

    /// Held by whoever changes which machines run. It ends with the process and leaves no file behind.
    pub fn lock(name: &str) -> Result<UnixListener> {
        let address = SocketAddr::from_abstract_name(format!("sluice-local-{name}"))?;
        let taken = || format!("cluster {name:?} is being started or taken down by another sluice; wait for it to end");
        UnixListener::bind_addr(&address).with_context(taken)
    }

    pub fn save(&self) -> Result<()> {
        fs::create_dir_all(self.dir()).with_context(|| format!("make {}", self.dir().display()))?;
        Ok(fs::write(Self::file(&self.name), serde_json::to_vec_pretty(self)?)?)
    }

    pub fn api_url(&self) -> String {
        format!("https://127.0.0.1:{}", self.api_port)
    }

    /// The context's name in the kubeconfig.
    pub fn context(&self) -> String {
        if self.name == "sluice" { self.name.clone() } else { format!("sluice-{}", self.name) }
    }

    pub fn control_ip() -> Ipv4Addr {
        Ipv4Addr::new(172, 30, 0, 1)
    }

    pub fn node_ip(i: u8) -> Ipv4Addr {
        Ipv4Addr::new(172, 30, 0, 10 + i)
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.control().disk().join("control/admin.kubeconfig")
    }

    /// Passphrase of the authority's key: beside control's disk, which holds the key, and not on it.
    pub fn ca_passphrase(&self) -> PathBuf {
        self.dir().join("control/ca-passphrase")
    }

    fn machine(&self, name: &str, programs: Vec<Program>) -> Machine {
        Machine {
            name: name.to_owned(),
            cgroup: format!("sluice-{}-{name}", self.name),
            dir: self.dir().join(name),
            programs,
        }
    }

    fn program(&self, name: &str, argv: Vec<String>) -> Program {
        let path = std::env::var("PATH").unwrap_or_default();
        let env = HashMap::from([
            ("RUST_LOG".to_owned(), std::env::var("SLUICE_LOG").unwrap_or_else(|_| "info".to_owned())),
            ("PATH".to_owned(), format!("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:{path}")),
        ]);
        Program { name: name.to_owned(), argv, env, once: false, ready: None, sockets: Sockets::None }
    }

    fn bin(&self, program: &str) -> String {
        self.bin.join(program).to_string_lossy().into_owned()
    }

    pub fn control(&self) -> Machine {
        let ip = Self::control_ip();
        let argv = [
            self.bin("sluice-control"),
            "serve".into(),
            "--data-dir=/var/lib/sluice/control".into(),
            format!("--ca-passphrase-file={}", self.ca_passphrase().display()),
            "--listen=0.0.0.0:6443".into(),
            "--discovery-listen=0.0.0.0:6444".into(),
            format!("--advertise-url={}", self.api_url()),
            format!("--san={ip}"),
            format!("--load-balancer-pool={LOAD_BALANCER_POOL}"),
        ];
        let argv = argv.into_iter().chain(self.control_args.clone()).collect();
        let control = Program { sockets: Sockets::Host, ..self.program("control", argv) };
        self.machine("control", vec![control])
    }

    pub fn node_name(&self, i: u8) -> String {
        format!("node-{}", i + 1)
    }

    pub fn node(&self, i: u8) -> Machine {
        let name = self.node_name(i);
        let containerd = Program {
            ready: Some(PathBuf::from(CONTAINERD_SOCKET)),
            ..self
                .program("containerd", vec!["containerd".into(), "-c".into(), "/var/lib/sluice/containerd.toml".into()])
        };
        let import = format!(
            "set -e; for i in {}/*.tar; do ctr -a {CONTAINERD_SOCKET} -n k8s.io images import \"$i\"; done",
            self.images.display()
        );
        let import = Program { once: true, ..self.program("images", vec!["/bin/sh".into(), "-c".into(), import]) };
        let resolver = SocketAddrV4::new(GATEWAY4, 53).into();
        let agent = Program { sockets: Sockets::Bound(resolver), ..self.program("agent", self.agent_argv(&name, i)) };
        self.machine(&name, vec![containerd, import, agent])
    }

    fn agent_argv(&self, name: &str, i: u8) -> Vec<String> {
        let control = Self::control_ip();
        let argv = [
            self.bin("sluice-agent"),
            format!("--node-name={name}"),
            format!("--node-ip={}", Self::node_ip(i)),
            format!("--api=https://{control}:6443"),
            format!("--discovery=https://{control}:6444"),
            "--ca-file=/var/lib/sluice/join/ca.crt".into(),
            "--token-file=/var/lib/sluice/join/token".into(),
            "--data-dir=/var/lib/sluice/agent".into(),
            "--run-dir=/run/sluice".into(),
            format!("--cri={CONTAINERD_SOCKET}"),
            format!("--cni-conf-dir={CNI_CONF}"),
            format!("--cpus={}", self.node_cpus),
            format!("--memory-mib={}", self.node_memory_mib),
        ];
        argv.into_iter().chain(self.agent_args.clone()).collect()
    }

    pub fn machines(&self) -> Vec<Machine> {
        std::iter::once(self.control()).chain((0..self.nodes).map(|i| self.node(i))).collect()
    }

    /// containerd's configuration of a node (1.6 and later; CRI on, everything a local node lacks off).
    pub fn containerd_toml(&self) -> String {
        format!(
            r#"version = 2
root = "/var/lib/sluice/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.blockfile", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "sluice.local/pause:1"
  disable_apparmor = true
  disable_tcp_service = true
  restrict_oom_score_adj = true
  max_concurrent_downloads = 3
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{CNI_BIN}"
  conf_dir = "{CNI_CONF}"
  max_conf_num = 1
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "overlayfs"
  default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  BinaryName = "runc"
  Root = "/run/runc"
  SystemdCgroup = false
"#
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All in the machines' /24, and none of a machine in the pool.
    #[test]
    fn machines_and_services_share_no_address() {
        let pool = LOAD_BALANCER_POOL.strip_suffix("/26").expect("a quarter of a /24");
        let pool: Ipv4Addr = pool.parse().expect("an address");
        let (network, first) = (&pool.octets()[..3], pool.octets()[3]);
        assert_eq!(first % 64, 0);
        for ip in (0..NODES_MAX).map(Cluster::node_ip).chain([Cluster::control_ip()]) {
            let [.., host] = ip.octets();
            assert!(ip.octets()[..3] == *network && !(first..=first + 63).contains(&host), "{ip}");
        }
    }

    #[test]
    fn names_are_parts_of_names() {
        for fine in ["sluice", "two", "a-1"] {
            assert_eq!(parse_name(fine), Ok(fine.to_owned()));
        }
        for wrong in ["", "bad/name", "..", "-a", "a-", "Two", "a b", &"x".repeat(33)] {
            assert!(parse_name(wrong).is_err(), "{wrong}");
        }
    }
}
