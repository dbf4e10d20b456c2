//! The local cluster's plan: which machines there are, what runs on each, and where everything lies. It decides and
//! writes down; `up` and `down` act.

use crate::machine::{Machine, Program, Sockets};
use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use sluice_netlink::plan::server;
use std::{
    collections::HashMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
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
/// Number of control's machine in the network between the machines.
pub const CONTROL_HOST: u8 = 1;

/// A family of addresses, with the cluster's own addresses of it. Those of IPv6 are of one unique local prefix (RFC 4193),
/// the same in every local cluster: they never leave its machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    pub const ALL: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    /// A machine's address in the network between the machines.
    pub fn host(self, n: u8) -> IpAddr {
        match self {
            Self::Ipv4 => Ipv4Addr::new(172, 30, 0, n).into(),
            Self::Ipv6 => Ipv6Addr::new(0xfd73, 0x6c75, 0x6963, 0, 0, 0, 0, u16::from(n)).into(),
        }
    }

    /// Of that network.
    pub fn prefix_len(self) -> u8 {
        match self {
            Self::Ipv4 => 24,
            Self::Ipv6 => 64,
        }
    }

    fn pods(self) -> &'static str {
        match self {
            Self::Ipv4 => "10.244.0.0/16",
            Self::Ipv6 => "fd73:6c75:6963:100::/56",
        }
    }

    fn services(self) -> &'static str {
        match self {
            Self::Ipv4 => "10.96.0.0/16",
            Self::Ipv6 => "fd73:6c75:6963:ffff::/112",
        }
    }

    /// The tenth address of the services.
    fn dns(self) -> &'static str {
        match self {
            Self::Ipv4 => "10.96.0.10",
            Self::Ipv6 => "fd73:6c75:6963:ffff::a",
        }
    }

    /// Addresses of services of type LoadBalancer: the high end of the machines' network.
    fn load_balancers(self) -> &'static str {
        match self {
            Self::Ipv4 => "172.30.0.192/26",
            Self::Ipv6 => "fd73:6c75:6963::1:0/112",
        }
    }
}

/// One family, or both.
pub fn check_families(families: &[Family]) -> Result<()> {
    let fine = matches!(families, [_]) || matches!(families, [a, b] if a != b);
    ensure!(fine, "--ip-families: name one family, or both with a comma between");
    Ok(())
}

/// Of a cluster from before there was a choice.
fn ipv4_only() -> Vec<Family> {
    vec![Family::Ipv4]
}

/// Number of a node in the network between the machines.
pub fn node_host(i: u8) -> u8 {
    10 + i
}

fn joined(all: impl Iterator<Item = impl ToString>) -> String {
    all.map(|one| one.to_string()).collect::<Vec<_>>().join(",")
}

/// As an URL has it.
fn bracketed(ip: IpAddr) -> String {
    if ip.is_ipv4() { ip.to_string() } else { format!("[{ip}]") }
}
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
    /// The primary one first.
    #[serde(default = "ipv4_only")]
    pub families: Vec<Family>,
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

    fn primary(&self) -> Family {
        self.families[0]
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
        let families = || self.families.iter();
        let any = if self.families.contains(&Family::Ipv6) { "[::]" } else { "0.0.0.0" };
        let argv = [
            self.bin("sluice-control"),
            "serve".into(),
            "--data-dir=/var/lib/sluice/control".into(),
            format!("--ca-passphrase-file={}", self.ca_passphrase().display()),
            format!("--listen={any}:6443"),
            format!("--discovery-listen={any}:6444"),
            format!("--advertise-url={}", self.api_url()),
            format!("--service-cidr={}", joined(families().map(|f| f.services()))),
            format!("--pod-cidr={}", joined(families().map(|f| f.pods()))),
            format!("--load-balancer-pool={}", joined(families().map(|f| f.load_balancers()))),
        ];
        let san = families().map(|f| format!("--san={}", f.host(CONTROL_HOST)));
        let argv = argv.into_iter().chain(san).chain(self.control_args.clone()).collect();
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
        let resolver = std::net::SocketAddr::new(server(self.primary() == Family::Ipv4), 53);
        let agent = Program { sockets: Sockets::Bound(resolver), ..self.program("agent", self.agent_argv(&name, i)) };
        self.machine(&name, vec![containerd, import, agent])
    }

    fn agent_argv(&self, name: &str, i: u8) -> Vec<String> {
        let families = || self.families.iter();
        let control = bracketed(self.primary().host(CONTROL_HOST));
        let argv = [
            self.bin("sluice-agent"),
            format!("--node-name={name}"),
            format!("--node-ip={}", joined(families().map(|f| f.host(node_host(i))))),
            format!("--cluster-dns={}", joined(families().map(|f| f.dns()))),
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
    use sluice_netlink::plan::Prefix;

    /// All in the machines' /24, and none of a machine in the pool.
    #[test]
    fn machines_and_services_share_no_address() {
        let pool = Family::Ipv4.load_balancers().strip_suffix("/26").expect("a quarter of a /24");
        let pool: Ipv4Addr = pool.parse().expect("an address");
        let first = pool.octets()[3];
        assert_eq!((first % 64, &pool.octets()[..3]), (0, &[172, 30, 0][..]));
        for host in (0..NODES_MAX).map(node_host).chain([CONTROL_HOST]) {
            assert!(!(first..=first + 63).contains(&host), "{host}");
        }
        // Those of IPv6 have a part of the /64 of their own.
        let pool: Prefix = Family::Ipv6.load_balancers().parse().expect("a range");
        let network = Prefix { address: Family::Ipv6.host(0), len: Family::Ipv6.prefix_len() };
        assert!(network.contains(pool.address) && !pool.contains(Family::Ipv6.host(u8::MAX)));
    }

    #[test]
    fn ranges_of_a_family_lie_apart() {
        for family in Family::ALL {
            let parse = |text: &str| text.parse::<Prefix>().expect("a range");
            let machines = Prefix { address: family.host(0), len: family.prefix_len() };
            let all = [parse(family.pods()), parse(family.services()), machines];
            for (n, a) in all.iter().enumerate() {
                assert!(all[n + 1..].iter().all(|b| !a.contains(b.address) && !b.contains(a.address)), "{a}");
            }
            assert!(parse(family.services()).contains(family.dns().parse().expect("an address")));
        }
    }

    #[test]
    fn a_cluster_has_each_family_once() {
        use Family::{Ipv4, Ipv6};
        for (families, fine) in [
            (&[Ipv4][..], true),
            (&[Ipv6, Ipv4], true),
            (&[], false),
            (&[Ipv4, Ipv4], false),
            (&[Ipv4, Ipv6, Ipv4], false),
        ] {
            assert_eq!(check_families(families).is_ok(), fine, "{families:?}");
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
