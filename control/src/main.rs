//! `sluice-control`: the cluster's API, store, scheduler and controllers in one process.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use sluice_control::api::server;
use sluice_control::ca::PassphraseFile;
use sluice_control::inject;
use sluice_control::mesh;
use sluice_control::pool::{self, Pool};
use sluice_control::range::Ranges;
use sluice_control::service::{Config, Service};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
#[command(name = "sluice-control", version, about = "The control service of a Sluice cluster")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the API and run the cluster.
    Serve(Box<Serve>),
}

#[derive(Args)]
struct Serve {
    /// Where the store, the authority and credentials are kept.
    #[arg(long)]
    data_dir: PathBuf,
    /// File of the passphrase of the authority's key: a systemd credential or a mounted secret. Without it one is made at
    /// the first start in /etc/sluice/ca-passphrase.
    #[arg(long)]
    ca_passphrase_file: Option<PathBuf>,
    /// Address of the API (TLS).
    #[arg(long, default_value = "0.0.0.0:6443")]
    listen: SocketAddr,
    /// Address of the discovery service (mTLS gRPC).
    #[arg(long, default_value = "0.0.0.0:6444")]
    discovery_listen: SocketAddr,
    /// URL of the API for clients; written into admin.kubeconfig.
    #[arg(long)]
    advertise_url: Option<String>,
    /// A further name or address of the serving certificate; may be repeated.
    #[arg(long)]
    san: Vec<String>,
    /// Image of the injected sidecar.
    #[arg(long, default_value = "sluice.local/proxy:dev")]
    proxy_image: String,
    /// Collector of spans that injected sidecars send theirs to: OTLP over HTTP, http://host:4318/v1/traces.
    #[arg(long)]
    otlp_endpoint: Option<String>,
    /// Share of the traces beginning at sidecars that are sampled, from 0 to 1.
    #[arg(long, default_value_t = 0.01)]
    trace_sample: f64,
    /// In every workload's identity.
    #[arg(long, default_value = "cluster.local")]
    trust_domain: String,
    /// Life of a workload's certificate, in seconds.
    #[arg(long, default_value_t = 3600)]
    workload_certificate_s: u64,
    /// Addresses of services: a range, or one of IPv4 and one of IPv6 with a comma between, the primary one first.
    #[arg(long, default_value = "10.96.0.0/16", overrides_with = "service_cidr")]
    service_cidr: Ranges,
    /// Addresses of pods, of the families that services have. Each node gets a /24 of the IPv4 range, and a /64 of the
    /// IPv6 range (of one longer than /56, the prefix is 8 bits longer than its own).
    #[arg(long, default_value = "10.244.0.0/16", overrides_with = "pod_cidr")]
    pod_cidr: Ranges,
    /// Addresses of services of type LoadBalancer: ranges such as 192.0.2.64/26 or 192.0.2.64-192.0.2.95, IPv4 and IPv6,
    /// separated by commas. They are of the network of the nodes, which answer for them there, and no machine has one of
    /// them. Without any, such services wait for another balancer.
    #[arg(long, default_value = "", overrides_with = "load_balancer_pool")]
    load_balancer_pool: Pool,
    /// Static tokens: lines `token,user,uid,"group1,group2"`.
    #[arg(long)]
    token_auth_file: Option<PathBuf>,
    /// A node is not ready when its lease is older than this many seconds.
    #[arg(long, default_value_t = 50)]
    node_monitor_grace_s: u64,
    /// Pods leave a node that is not ready after this many seconds, unless they say otherwise.
    #[arg(long, default_value_t = 300)]
    eviction_s: u64,
}

impl Serve {
    fn config(&self) -> Config {
        Config {
            data_dir: self.data_dir.clone(),
            ca_passphrase: self.ca_passphrase_file.clone().map_or_else(PassphraseFile::default, PassphraseFile::given),
            listen: self.listen,
            advertise_url: self.advertise_url.clone(),
            san: self.san.iter().cloned().chain([mesh::SERVER_NAME.to_owned()]).collect(),
            service_cidr: self.service_cidr.clone(),
            pod_cidr: self.pod_cidr.clone(),
            load_balancer_pool: self.load_balancer_pool.clone(),
            token_file: self.token_auth_file.clone(),
            node_grace: Duration::from_secs(self.node_monitor_grace_s),
            eviction: Duration::from_secs(self.eviction_s),
            proxy: Some(self.proxy()),
        }
    }
}

impl Serve {
    /// What sidecars and gateways are made of.
    fn proxy(&self) -> inject::Config {
        let ranges = self.service_cidr.iter().chain(self.pod_cidr.iter());
        inject::Config {
            image: self.proxy_image.clone(),
            cluster_ranges: ranges.map(|range| range.to_string()).collect::<Vec<_>>().join(","),
            tracing: self.otlp_endpoint.clone().map(|collector| (collector, self.trace_sample)),
        }
    }

    fn mesh(&self) -> mesh::Config {
        mesh::Config {
            listen: self.discovery_listen,
            trust_domain: self.trust_domain.clone(),
            pool: self.load_balancer_pool.clone(),
            workload_life: Duration::from_secs(self.workload_certificate_s),
        }
    }
}

impl Serve {
    /// What no single flag can say of itself.
    fn check(&self) -> anyhow::Result<()> {
        let ranges = |flag: &'static str, ranges: &Ranges| ranges.iter().map(|range| (flag, range)).collect::<Vec<_>>();
        let (services, pods) = (ranges("--service-cidr", &self.service_cidr), ranges("--pod-cidr", &self.pod_cidr));
        for (flag, range) in services.iter().chain(&pods) {
            anyhow::ensure!(
                !self.load_balancer_pool.meets(*range),
                "{} {} and {flag} {range} share addresses; name a range of the network of the nodes that no machine uses",
                pool::FLAG,
                self.load_balancer_pool
            );
        }
        for (_, service) in &services {
            let pods_too = self.pod_cidr.of(service.family());
            anyhow::ensure!(
                pods_too.is_some(),
                "--service-cidr {service} is of {}, and --pod-cidr {} has no range of it; add one",
                service.family().name(),
                self.pod_cidr
            );
            anyhow::ensure!(
                !pods_too.is_some_and(|pods| pods.meets(service)),
                "--service-cidr {service} and --pod-cidr {} share addresses; name ranges apart",
                self.pod_cidr
            );
        }
        Ok(())
    }
}

fn main() -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
    let Command::Serve(serve) = Cli::parse().command;
    serve.check()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(run(*serve))
}

async fn run(serve: Serve) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let inherited = server::inherited().context("take over inherited sockets")?;
    let hook = mesh::pod_hook(serve.proxy());
    let service = Service::start(&serve.config(), inherited, Some(hook)).await?;
    let (discovery, parts) = mesh::start(&service.parts, &serve.mesh()).await?;
    tracing::info!(%discovery, "serving discovery");
    let store = service.parts.store.clone();
    tokio::select! {
        () = store.failed() => {
            // Whoever keeps this program running starts it again; what was acknowledged is on the disk.
            anyhow::bail!("the store can no longer be written (is the disk full?), ending so as to be started again");
        }
        _ = terminate.recv() => tracing::info!("terminating"),
        _ = interrupt.recv() => tracing::info!("interrupted"),
    }
    service.stop().await;
    for part in parts {
        // A part that panicked has said so.
        let _ = part.await;
    }
    Ok(())
}
