//! The agent put together, in the order in which its parts need each other; and what its command line says.

use crate::{
    attest::Gate,
    check::Checker,
    cni_config,
    datapath::{Datapath, DatapathConfig},
    flows::{self, Hub},
    handover::Handover,
    health,
    identity::{self, NodeIdentity},
    memory,
    network::Network,
    node::{self, Facts, NotReady},
    pods::{Deps, Manager, convert, cri::Cri, events::Events, volumes::Dirs},
    relay::{Kept, Relay, Signer},
    replay::Replay,
    server, sidecar,
    uplink::{self, Ends, Uplink},
    view::{Store, View},
};
use anyhow::{Context, Result};
use clap::{Args, Parser, ValueEnum};
use kube::Client;
use sluice_dns::{server::Resolver, zone::Zone};
use sluice_netlink::{between::Mode, plan};
use sluice_wire::v1::{SignRequest, SignResponse, WorkloadRef, identity_client::IdentityClient};
use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{TcpListener, UdpSocket},
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

#[derive(Clone, Debug, Parser)]
#[command(name = "sluice-agent", version, about = "The node agent of a Sluice cluster")]
pub struct Options {
    #[arg(long)]
    pub node_name: String,
    /// Addresses of this node in the network between the nodes: one, or one of each family with a comma between, the
    /// preferred one first
    #[arg(long, required = true, value_delimiter = ',')]
    pub node_ip: Vec<IpAddr>,
    #[command(flatten)]
    pub cluster: Option<Cluster>,
    /// Take the view from this file and run no pods: the data path by itself
    #[arg(long, conflicts_with = "Cluster", required_unless_present = "Cluster")]
    pub snapshot_file: Option<PathBuf>,
    #[arg(long, default_value = "/var/lib/sluice/agent")]
    pub data_dir: PathBuf,
    #[arg(long, default_value = "/run/sluice")]
    pub run_dir: PathBuf,
    /// Socket of the container runtime
    #[arg(long, default_value = "/run/containerd/containerd.sock")]
    pub cri: PathBuf,
    /// Folder that the runtime reads network configurations from
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
    #[arg(long, default_value = "/sys/fs/bpf")]
    pub bpffs: PathBuf,
    /// CPUs offered to pods (default: all)
    #[arg(long)]
    pub cpus: Option<u32>,
    /// Memory offered to pods (default: all)
    #[arg(long)]
    pub memory_mib: Option<u64>,
    #[arg(long, default_value_t = 110)]
    pub max_pods: u32,
    #[arg(long)]
    pub zone: Option<String>,
    /// Addresses of the cluster's DNS service; pods ask the first, this node answers for all
    #[arg(long, default_value = "10.96.0.10", value_delimiter = ',')]
    pub cluster_dns: Vec<IpAddr>,
    #[arg(long, default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Servers for names outside the cluster
    #[arg(long)]
    pub upstream_dns: Vec<SocketAddr>,
    /// Let pods reach addresses outside the cluster under their own address, not the node's
    #[arg(long)]
    pub no_masquerade: bool,
    /// Range outside the cluster that pods reach under their own address, as 192.0.2.0/24; may be given again
    #[arg(long, value_name = "RANGE")]
    pub masquerade_exclude: Vec<sluice_netlink::plan::Prefix>,
    /// Seconds between heartbeats; control's grace period must be a few of them
    #[arg(long, default_value_t = 10)]
    pub heartbeat_s: u64,
    /// Port of the node's server: logs, flows, counters
    #[arg(long, default_value_t = 10250)]
    pub log_port: u16,
    /// Send packets of known connections between other machines on in the drivers of the node's links (XDP), where they
    /// can
    #[arg(long)]
    pub xdp: bool,
    /// Let callers from outside be answered by the nodes of their backends, past the node that they addressed (direct
    /// server return); give it to all nodes
    #[arg(long)]
    pub dsr: bool,
    /// Do as if the kernel lacked a feature
    #[arg(long, value_enum, value_name = "FEATURE")]
    pub force_fallback: Vec<Fallback>,
    /// Pods of which nodes are reached through VXLAN (UDP port 8472)
    #[arg(long, value_enum, default_value_t)]
    pub tunnel: Tunnel,
    /// MTU of the links of pods that are made from now on (default: what fits the node's link, less the tunnel's headers
    /// where a tunnel is used)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1280..=65535))]
    pub mtu: Option<u32>,
}

/// Kernel features that can be done without; ARCHITECTURE.md has the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Fallback {
    /// Links at network devices (Linux 6.6): filters of clsact take their place
    Tcx,
    /// `bpf_set_retval` (Linux 5.18): connections to services without endpoints fail with EPERM, not ECONNREFUSED
    SetRetval,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum Tunnel {
    /// Those in networks that this node is not connected to
    #[default]
    Auto,
    /// All
    Always,
    /// None: routers between networks must know the pods' ranges
    Never,
}

impl From<Tunnel> for Mode {
    fn from(t: Tunnel) -> Self {
        match t {
            Tunnel::Auto => Self::Auto,
            Tunnel::Always => Self::Always,
            Tunnel::Never => Self::Never,
        }
    }
}

impl Options {
    /// What no single flag can say of itself.
    fn check(&self) -> Result<()> {
        for (flag, all) in [("--node-ip", &self.node_ip), ("--cluster-dns", &self.cluster_dns)] {
            let one_each = matches!(all[..], [_]) || matches!(all[..], [a, b] if a.is_ipv4() != b.is_ipv4());
            anyhow::ensure!(one_each, "{flag} {all:?}: give one address, or one of IPv4 and one of IPv6");
        }
        Ok(())
    }

    /// The address by which this node is known first.
    fn primary(&self) -> IpAddr {
        self.node_ip[0]
    }

    /// What was asked for, else what the data path has found out by now.
    fn pod_mtu(&self, found: &watch::Receiver<Option<u32>>) -> Option<u32> {
        self.mtu.or(*found.borrow())
    }
}

/// Where the cluster is, and how to become a part of it.
#[derive(Args, Clone, Debug)]
pub struct Cluster {
    /// URL of the API
    #[arg(long)]
    pub api: String,
    /// URL of control's discovery port
    #[arg(long)]
    pub discovery: String,
    /// The cluster's CA, for joining
    #[arg(long)]
    pub ca_file: PathBuf,
    /// One-time token, for joining
    #[arg(long)]
    pub token_file: PathBuf,
}

const DNS_PORT: u16 = 53;
const RENEW_RETRY: Duration = Duration::from_secs(30);

/// Until SIGTERM. Everything in the kernel stays as it is: traffic goes on without the agent.
pub async fn run(o: Options) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let main = start(o);
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        ended = main => ended,
    }
}

async fn start(o: Options) -> Result<()> {
    o.check()?;
    match (&o.cluster, &o.snapshot_file) {
        (Some(cluster), _) => start_member(&o, cluster).await,
        (None, Some(file)) => start_alone(&o, file.clone()).await,
        (None, None) => anyhow::bail!("give either --snapshot-file, or --api, --discovery, --ca-file and --token-file"),
    }
}

async fn start_member(o: &Options, c: &Cluster) -> Result<()> {
    // First what needs nobody: the kernel, from the last known view, so that traffic is right before control answers.
    let (channel_tx, channel) = watch::channel(placeholder_channel(&c.discovery)?);
    let (uplink, ends) = Uplink::new(o.node_name.clone(), Store::new(o.data_dir.join("view.json")), channel.clone());
    let Started { network, mtu, flows, reports } = start_network(o, ends, channel.clone()).await?;
    // Then control.
    let id = identity::obtain(&o.data_dir, &o.node_name, &c.discovery, &c.ca_file, &c.token_file).await?;
    channel_tx.send_replace(identity::channel(&c.discovery, &id.bundle_pem, Some(&id))?);
    tokio::spawn(uplink.run());
    tokio::spawn(reports);
    let client = api_client(c, &id)?;
    start_pods(o, &id, client, network, mtu, flows).await?;
    renewed(o, &id, channel).await
}

/// The data path, resolver and relay by themselves, from a file.
async fn start_alone(o: &Options, file: PathBuf) -> Result<()> {
    let (source, ends) = uplink::channels(View::default());
    let views = ends.views.clone();
    // Sidecars are served, but nobody can sign for them.
    let nobody = Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
    let Started { network: _network, mtu, reports, .. } = start_network(o, ends, watch::channel(nobody).1).await?;
    tokio::spawn(reports);
    tokio::spawn(configure_alone(o.clone(), views, mtu));
    Replay::new(file, source).run().await;
    Ok(())
}

/// The plugin's configuration, with the ranges that the view gives this node.
async fn configure_alone(o: Options, mut views: watch::Receiver<View>, mut mtu: watch::Receiver<Option<u32>>) {
    let ranges = |view: &View| -> Vec<String> {
        let own = |n: &&sluice_model::Node| n.name.name == o.node_name;
        view.snapshot.nodes().find(own).into_iter().flat_map(|n| &n.pod_cidrs).map(ToString::to_string).collect()
    };
    loop {
        let wanted = ranges(&views.borrow_and_update());
        mtu.mark_unchanged();
        if let Some(mtu) = o.pod_mtu(&mtu)
            && !wanted.is_empty()
            && let Err(error) = cni_config::install(&o.run_dir, &o.cni_conf_dir, &wanted, mtu)
        {
            tracing::warn!(%error, "network plugin not configured");
        }
        let changed = tokio::select! {
            changed = views.changed() => changed,
            changed = mtu.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

/// A node's network, and what must run for sidecars' reports to go up.
struct Started<R> {
    network: Arc<Network>,
    /// For the links of pods, as it changes.
    mtu: watch::Receiver<Option<u32>>,
    flows: Arc<Hub>,
    reports: R,
}

async fn start_network(
    o: &Options,
    ends: Ends,
    channel: watch::Receiver<Channel>,
) -> Result<Started<impl Future<Output = ()> + use<>>> {
    let Ends { views, verdicts, holders, metrics, metrics_interval } = ends;
    let last = views.borrow().clone();
    let config = DatapathConfig {
        bpffs: o.bpffs.clone(),
        cgroup: None,
        node: o.node_name.clone(),
        dns: o.cluster_dns.clone(),
        masquerade: !o.no_masquerade,
        masquerade_excluded: o.masquerade_exclude.clone(),
        clsact: o.force_fallback.contains(&Fallback::Tcx),
        xdp: o.xdp,
        dsr: o.dsr,
        eperm: o.force_fallback.contains(&Fallback::SetRetval),
        tunnel: o.tunnel.into(),
    };
    let known = (!last.epoch.is_empty()).then_some(&*last.snapshot);
    let datapath = Datapath::open_from(&config, known).context("open the data path")?;
    let mtu = datapath.pod_mtu();
    let flows = Hub::start(o.node_name.clone(), datapath.pins()?, views.clone());
    let gate = Arc::new(Gate::new()?);
    let handover = Handover::new(&o.bpffs, Some(gate.clone()))?;
    let kept = Kept::new(o.data_dir.join("holders.json"));
    let relay = Relay::new(views.clone(), metrics_interval, holders, Arc::new(Signing { channel }), Some(kept));
    let network = Network::new(o.node_name.clone(), datapath, handover, gate, relay.clone(), views.clone());
    tokio::spawn(network.clone().run(verdicts));
    tokio::spawn(health::serve(o.node_name.clone(), views.clone()));
    tokio::spawn(memory::tidy(views.clone()));
    start_dns(o, views).await?;
    Ok(Started { network, mtu, flows, reports: relay.report(metrics) })
}

/// Before the node has joined nothing can be asked; the channel is replaced then.
fn placeholder_channel(discovery: &str) -> Result<Channel> {
    Ok(Endpoint::from_shared(discovery.to_owned())?.connect_lazy())
}

struct Signing {
    channel: watch::Receiver<Channel>,
}

#[tonic::async_trait]
impl Signer for Signing {
    async fn sign(&self, workload: WorkloadRef, csr_pem: String) -> Result<SignResponse, Status> {
        let channel = self.channel.borrow().clone();
        let request = SignRequest { csr_pem, workload: Some(workload) };
        Ok(IdentityClient::new(channel).sign(request).await?.into_inner())
    }
}

async fn start_dns(o: &Options, mut views: watch::Receiver<View>) -> Result<()> {
    let domain = o.cluster_domain.clone();
    let resolver = Resolver::new(Zone::new(&domain, &views.borrow().snapshot), o.upstream_dns.clone());
    let servers = o.cluster_dns.iter().map(|vip| SocketAddr::new(plan::server(vip.is_ipv4()), DNS_PORT));
    for (udp, tcp) in dns_sockets(&servers.collect::<Vec<_>>())? {
        tokio::spawn(sluice_dns::server::serve_udp(resolver.clone(), Arc::new(UdpSocket::from_std(udp)?)));
        tokio::spawn(sluice_dns::server::serve_tcp(resolver.clone(), TcpListener::from_std(tcp)?));
    }
    tokio::spawn(async move {
        while views.changed().await.is_ok() {
            let view = views.borrow_and_update().clone();
            resolver.set_zone(Zone::new(&domain, &view.snapshot));
        }
    });
    Ok(())
}

/// Those that a supervisor keeps and passes by `LISTEN_FDS` (a datagram socket and a listener of an address): questions
/// wait in them while the agent is started again. Where it passes none, new ones.
fn dns_sockets(addresses: &[SocketAddr]) -> Result<Vec<(std::net::UdpSocket, std::net::TcpListener)>> {
    let mut passed = listenfd::ListenFd::from_env();
    let (mut udps, mut tcps) = (Vec::new(), Vec::new());
    for index in 0..passed.len() {
        // Each has one type: asked for the other, it stays where it is.
        if let Ok(Some(s)) = passed.take_udp_socket(index) {
            udps.push(s);
        } else if let Ok(Some(s)) = passed.take_tcp_listener(index) {
            tcps.push(s);
        }
    }
    let sockets = |address: &SocketAddr| {
        let listen = || format!("listen for DNS on {address}; does another server hold it?");
        let udp = udps.iter().position(|s| s.local_addr().is_ok_and(|a| a == *address)).map(|at| udps.swap_remove(at));
        let tcp = tcps.iter().position(|s| s.local_addr().is_ok_and(|a| a == *address)).map(|at| tcps.swap_remove(at));
        let udp = udp.map_or_else(|| std::net::UdpSocket::bind(address), Ok).with_context(listen)?;
        let tcp = tcp.map_or_else(|| std::net::TcpListener::bind(address), Ok).with_context(listen)?;
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        Ok((udp, tcp))
    };
    addresses.iter().map(sockets).collect()
}

fn api_client(c: &Cluster, id: &NodeIdentity) -> Result<Client> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let mut config = kube::Config::new(c.api.parse().with_context(|| format!("API address {:?}", c.api))?);
    config.root_cert = Some(rustls_pemfile(&id.bundle_pem)?);
    config.auth_info.client_certificate_data = Some(STANDARD.encode(&id.certificate_pem));
    config.auth_info.client_key_data = Some(STANDARD.encode(&id.key_pem).into());
    config.connect_timeout = Some(Duration::from_secs(3));
    Ok(Client::try_from(config)?)
}

fn rustls_pemfile(pem: &str) -> Result<Vec<Vec<u8>>> {
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    let certs = CertificateDer::pem_slice_iter(pem.as_bytes()).map(|c| Ok(c?.to_vec()));
    certs.collect::<Result<_>>().context("read the cluster's CA")
}

async fn start_pods(
    o: &Options,
    id: &NodeIdentity,
    client: Client,
    network: Arc<Network>,
    mtu: watch::Receiver<Option<u32>>,
    flows: Arc<Hub>,
) -> Result<()> {
    let cri = Cri::new(o.cri.clone(), o.primary().is_ipv4())?;
    let facts = facts(o, &cri).await;
    let node = convert::Node {
        name: o.node_name.clone(),
        host_ips: o.node_ip.clone(),
        cluster_dns: o.cluster_dns.first().map(ToString::to_string),
        cluster_domain: o.cluster_domain.clone(),
        log_dir: o.data_dir.join("logs").to_string_lossy().into_owned(),
        cpu_milli: facts.cpu_milli,
        memory_bytes: facts.memory_bytes,
    };
    let events = Events::start(client.clone(), o.node_name.clone());
    network.tell(events.clone());
    let counted = network.clone();
    let flows = flows::serve::routes(flows, Arc::new(move || Box::pin(counted.clone().counters())));
    let dns = o.cluster_dns.iter().find(|a| a.is_ipv4()).map(|a| SocketAddr::new(*a, DNS_PORT));
    let (options, told) = (o.clone(), mtu.clone());
    let mtu_now = Box::new(move || options.pod_mtu(&told));
    let checker = Checker::start(o.node_name.clone(), &o.run_dir, dns, network.clone(), mtu_now);
    let sidecars = sidecar::routes(sidecar::Sidecars { client: client.clone(), network: network.clone() });
    let deps = Arc::new(Deps {
        events: events.clone(),
        client: client.clone(),
        cri: cri.clone(),
        dirs: Dirs { data: o.data_dir.clone(), run: o.run_dir.clone(), logs: o.data_dir.join("logs") },
        node: node.clone(),
        network,
    });
    let (ready, not_ready) = watch::channel(Some("the node is starting".to_owned()));
    let every = Duration::from_secs(o.heartbeat_s.max(1));
    tokio::spawn(node::heartbeat(client.clone(), facts.clone(), every, not_ready));
    tokio::spawn(readiness(o.clone(), client.clone(), facts, cri.clone(), mtu, ready));
    tokio::spawn(Manager::new(deps).run());
    let listener = TcpListener::bind(SocketAddr::new(o.primary(), o.log_port))
        .await
        .with_context(|| format!("listen for requests of logs and flows on port {}", o.log_port))?;
    let tls = server::tls(id)?;
    let routes =
        server::routes(server::Logs { client, cri, node }).merge(flows).merge(checker.routes()).merge(sidecars);
    tokio::spawn(server::serve(listener, tls, routes));
    Ok(())
}

/// Configures the network plugin once the node has its range, then watches the runtime: the node is ready when the
/// runtime says that its network is.
async fn readiness(
    o: Options,
    client: Client,
    facts: Facts,
    cri: Cri,
    mtu: watch::Receiver<Option<u32>>,
    ready: watch::Sender<NotReady>,
) {
    let ranges = node::pod_cidrs(&client, &facts).await;
    loop {
        let configured = match o.pod_mtu(&mtu) {
            Some(mtu) => cni_config::install(&o.run_dir, &o.cni_conf_dir, &ranges, mtu)
                .map_err(|e| format!("network plugin not configured: {e}")),
            // A pod's MTU is for its life.
            None => Err("network plugin not configured: the cluster's nodes are not known yet".to_owned()),
        };
        let state = match configured {
            Err(why) => Some(why),
            Ok(()) => match cri.ready().await {
                Ok(Ok(())) => None,
                Ok(Err(why)) => Some(why),
                Err(e) => Some(e.to_string()),
            },
        };
        let pause = Duration::from_millis(if state.is_none() { 2000 } else { 100 });
        ready.send_if_modified(|now| {
            let changed = *now != state;
            *now = state;
            changed
        });
        tokio::time::sleep(pause).await;
    }
}

async fn facts(o: &Options, cri: &Cri) -> Facts {
    let read = |p: &str| std::fs::read_to_string(p).unwrap_or_default();
    let meminfo = read("/proc/meminfo");
    let kib = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:"))
        .and_then(|v| v.trim().trim_end_matches(" kB").parse::<u64>().ok());
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let disk = rustix::fs::statvfs(o.data_dir.parent().unwrap_or(&o.data_dir)).map_or(0, |s| s.f_blocks * s.f_frsize);
    let os = read("/etc/os-release");
    let pretty = os.lines().find_map(|l| l.strip_prefix("PRETTY_NAME=")).unwrap_or("Linux");
    Facts {
        name: o.node_name.clone(),
        ips: o.node_ip.clone(),
        cpu_milli: o.cpus.map_or(cpus as u64, u64::from) * 1000,
        memory_bytes: o.memory_mib.map_or(kib.unwrap_or(0) * 1024, |m| m << 20),
        disk_bytes: disk,
        pods: o.max_pods,
        zone: o.zone.clone(),
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        os_image: pretty.trim_matches('"').to_owned(),
        runtime: cri.version().await.unwrap_or_default(),
        boot_id: read("/proc/sys/kernel/random/boot_id").trim().to_owned(),
        log_port: o.log_port,
    }
}

/// Ends the agent when its certificate has been renewed: it starts again with the new one, and nothing in the kernel
/// notices.
async fn renewed(o: &Options, id: &NodeIdentity, channel: watch::Receiver<Channel>) -> Result<()> {
    let due = identity::life(&id.certificate_pem).context("read the node's certificate")?.renew_in();
    tokio::time::sleep(due).await;
    loop {
        let current = channel.borrow().clone();
        match identity::renew(&o.data_dir, &o.node_name, current).await {
            Ok(_) => {
                tracing::info!("certificate renewed, starting again with it");
                return Ok(());
            }
            Err(error) => tracing::warn!(error = format!("{error:#}"), "certificate not renewed, trying again"),
        }
        tokio::time::sleep(RENEW_RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(more: &[&str]) -> Result<Options, clap::Error> {
        let least = ["sluice-agent", "--node-name=n", "--node-ip=10.0.0.1", "--snapshot-file=view.json"];
        Options::try_parse_from(least.iter().chain(more))
    }

    #[test]
    fn one_address_of_each_family() {
        let one = parse(&[]).expect("good");
        assert!(one.check().is_ok() && one.primary().is_ipv4());
        let least = ["sluice-agent", "--node-name=n", "--snapshot-file=view.json"];
        for (ips, good) in
            [("fd00::1,10.0.0.1", true), ("10.0.0.1,10.0.0.2", false), ("fd00::1,10.0.0.1,fd00::2", false)]
        {
            let ips = format!("--node-ip={ips}");
            let o =
                Options::try_parse_from(least.into_iter().chain([ips.as_str(), "--cluster-dns=fd00::a,10.96.0.10"]));
            let o = o.expect("addresses");
            assert_eq!(o.check().is_ok(), good, "{ips}");
            assert_eq!(o.primary(), o.node_ip[0]);
        }
    }

    #[test]
    fn tunnels_and_mtu_are_asked_for_by_flags() {
        let (told, untold) = (watch::channel(Some(1450)).1, watch::channel(None).1);
        let plain = parse(&[]).expect("good");
        assert_eq!(Mode::from(plain.tunnel), Mode::Auto);
        assert_eq!((plain.pod_mtu(&told), plain.pod_mtu(&untold)), (Some(1450), None));
        let asked = parse(&["--tunnel=always", "--mtu=1400"]).expect("good");
        assert_eq!(Mode::from(asked.tunnel), Mode::Always);
        assert_eq!((asked.pod_mtu(&told), asked.pod_mtu(&untold)), (Some(1400), Some(1400)));
        assert_eq!(Mode::from(parse(&["--tunnel=never"]).expect("good").tunnel), Mode::Never);
        for bad in ["--tunnel=sometimes", "--mtu=1279", "--mtu=65536", "--mtu=x"] {
            parse(&[bad]).expect_err(bad);
        }
    }
}
