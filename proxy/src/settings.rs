//! Command line and environment of `sluice-proxy`, turned into [`Settings`]. Opens nothing but the file it is given.

use crate::{
    control::Source,
    limits::Limits,
    observe::{self, Access},
    run::{Listen, Settings},
    tls::Tls,
};
use anyhow::Context;
use clap::Parser;
use ipnet::IpNet;
use rustls::pki_types::{PrivateKeyDer, pem::PemObject};
use sluice_model::Snapshot;
use sluice_wire::{DISCOVERY_SOCKET, SIDECAR_ADMIN_PORT, SIDECAR_INBOUND_PORT, SIDECAR_OUTBOUND_PORT, handover, v1};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::sync::watch;

/// What the program is.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    #[default]
    Sidecar,
    Gateway,
}

/// A pod's sidecar: routes, balances, encrypts and counts its TCP traffic.
#[derive(Parser, Debug)]
#[command(name = "sluice-proxy", version)]
pub struct Args {
    /// A pod's sidecar, or a gateway that clients outside the cluster come to
    #[arg(long, env = "SLUICE_ROLE", value_enum, default_value_t)]
    pub role: Role,
    #[arg(long, env = "POD_NAMESPACE", default_value = "default")]
    pub pod_namespace: String,
    #[arg(long, env = "POD_NAME", default_value = "pod")]
    pub pod_name: String,
    #[arg(long, env = "POD_UID", default_value = "")]
    pub pod_uid: String,
    /// Threads that serve traffic; 0: as the CPU limit, rounded up, and 1 without limit
    #[arg(long, env = "SLUICE_WORKERS", default_value_t = 0)]
    pub workers: usize,
    /// Address of /ready, /metrics and /config; `[::]` is every address, of IPv4 too
    #[arg(long, env = "SLUICE_ADMIN", default_value_t = SocketAddr::from((Ipv6Addr::UNSPECIFIED, SIDECAR_ADMIN_PORT)))]
    pub admin: SocketAddr,
    /// Abstract unix socket of the agent
    #[arg(long, env = "SLUICE_DISCOVERY", default_value = DISCOVERY_SOCKET)]
    pub discovery: String,
    /// Abstract unix socket of the agent for listeners
    #[arg(long, env = "SLUICE_HANDOVER", default_value = handover::SOCKET)]
    pub handover: String,
    /// Ranges of the cluster's services and pods: nothing is sent there in the clear before it is known what they are
    #[arg(long, env = "SLUICE_CLUSTER_RANGES", value_delimiter = ',')]
    pub cluster_ranges: Vec<IpNet>,
    /// Requests to write to the standard output, as JSON: off, errors or all
    #[arg(long, env = "SLUICE_ACCESS_LOG", default_value = "off")]
    pub access_log: Access,
    /// Collector of spans, OTLP over HTTP: http://host:4318/v1/traces; none are made without
    #[arg(long, env = "SLUICE_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<http::Uri>,
    /// Share of the traces beginning here that are sampled, from 0 to 1
    #[arg(long, env = "SLUICE_TRACE_SAMPLE", default_value_t = 0.01)]
    pub trace_sample: f64,
    /// Let those who tap see headers, which may hold secrets
    #[arg(long, env = "SLUICE_TAP_HEADERS")]
    pub tap_headers: bool,
    /// After SIGTERM, the longest time for what is in flight
    #[arg(long, env = "SLUICE_DRAIN_SECONDS", default_value_t = 25)]
    pub drain_seconds: u64,
    /// Longest time for a request's head, from its first byte
    #[arg(long, env = "SLUICE_HEAD_TIMEOUT_SECONDS", default_value_t = Limits::default().head.as_secs())]
    pub head_timeout_seconds: u64,
    /// Longest pause within an HTTP/1 request's body
    #[arg(long, env = "SLUICE_BODY_IDLE_SECONDS", default_value_t = Limits::default().body_idle.as_secs())]
    pub body_idle_seconds: u64,
    /// Gateway: longest time without a request on a client's connection
    #[arg(long, env = "SLUICE_IDLE_SECONDS", default_value_t = Limits::default().idle.as_secs())]
    pub idle_seconds: u64,
    /// Gateway: addresses to listen at
    #[arg(long, value_delimiter = ',', default_values_t = [IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::UNSPECIFIED)])]
    pub listen_ips: Vec<IpAddr>,
    /// Serve this snapshot (JSON) instead of asking an agent
    #[arg(long)]
    pub static_config: Option<PathBuf>,
    /// With --static-config: the folder of certificate.pem, key.pem and bundle.pem for mTLS
    #[arg(long, requires = "static_config")]
    pub static_tls: Option<PathBuf>,
    /// Outside a pod: take every outbound connection as one to this address
    #[arg(long)]
    pub outbound_to: Option<SocketAddr>,
    #[arg(long, default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, SIDECAR_OUTBOUND_PORT)))]
    pub outbound_listen: SocketAddr,
    /// Outside a pod: take every inbound connection as one to this address
    #[arg(long)]
    pub inbound_to: Option<SocketAddr>,
    #[arg(long, default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, SIDECAR_INBOUND_PORT)))]
    pub inbound_listen: SocketAddr,
}

impl Args {
    /// What to run.
    pub fn settings(self) -> anyhow::Result<Settings> {
        let source = match &self.static_config {
            Some(path) => Source::Static {
                snapshot: read_snapshot(path)?,
                certificate: watch::channel(self.static_tls.as_deref().map(read_tls).transpose()?).1,
            },
            None => Source::Discovery { socket: self.discovery },
        };
        let to = |at, to: Option<SocketAddr>| to.map(|to| (at, to)).into_iter().collect::<Vec<_>>();
        let outside = self.outbound_to.is_some() || self.inbound_to.is_some();
        let listen = if self.role == Role::Gateway {
            Listen::Gateway { ips: self.listen_ips }
        } else if outside {
            Listen::At {
                outbound: to(self.outbound_listen, self.outbound_to),
                inbound: to(self.inbound_listen, self.inbound_to),
            }
        } else {
            Listen::Captured { handover: self.handover }
        };
        Ok(Settings {
            workload: v1::WorkloadRef { namespace: self.pod_namespace, name: self.pod_name, uid: self.pod_uid },
            source,
            listen,
            workers: if self.workers == 0 { cpu_limit() } else { self.workers },
            admin: self.admin,
            drain: Duration::from_secs(self.drain_seconds),
            inside: self.cluster_ranges.into(),
            observe: observe::Settings {
                access: self.access_log,
                otlp: self.otlp_endpoint,
                sampled: self.trace_sample,
                tap_headers: self.tap_headers,
            },
            limits: Limits {
                head: Duration::from_secs(self.head_timeout_seconds),
                body_idle: Duration::from_secs(self.body_idle_seconds),
                idle: Duration::from_secs(self.idle_seconds),
            },
        })
    }
}

fn read_tls(dir: &Path) -> anyhow::Result<Arc<Tls>> {
    let read = |file: &str| {
        let path = dir.join(file);
        std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    };
    let key = PrivateKeyDer::from_pem_slice(read("key.pem")?.as_bytes());
    let key = key.with_context(|| format!("parse {}", dir.join("key.pem").display()))?;
    let (chain, bundle) = (read("certificate.pem")?, read("bundle.pem")?);
    let tls = Tls::given(&chain, &bundle, key).with_context(|| format!("use the certificate in {}", dir.display()))?;
    Ok(Arc::new(tls))
}

fn read_snapshot(path: &PathBuf) -> anyhow::Result<Snapshot> {
    let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
}

/// CPUs that this container may use, rounded up; 1 when nothing limits it: a sidecar is a guest on its node.
fn cpu_limit() -> usize {
    let v2 = std::fs::read_to_string("/sys/fs/cgroup/cpu.max").ok().and_then(|t| parse_cpu_max(&t));
    v2.or_else(|| {
        let read = |file| std::fs::read_to_string(format!("/sys/fs/cgroup/cpu/cpu.cfs_{file}_us")).ok();
        parse_cpu_max(&format!("{} {}", read("quota")?.trim(), read("period")?.trim()))
    })
    .unwrap_or(1)
}

/// `max 100000` or `quota period`, in microseconds.
fn parse_cpu_max(text: &str) -> Option<usize> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (u64, u64) = (quota.parse().ok()?, period.parse().ok().filter(|p| *p > 0)?);
    Some(quota.div_ceil(period).clamp(1, 16) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_limits_round_up() {
        for (text, expected) in [
            ("max 100000\n", None),
            ("50000 100000", Some(1)),
            ("150000 100000", Some(2)),
            ("-1 100000", None),
            ("100000 0", None),
            ("", None),
        ] {
            assert_eq!(parse_cpu_max(text), expected, "{text:?}");
        }
    }
}
