//! The control service put together: data directory, authority, store, API, and the parts that work on the objects.
//! Tests and `main` start it the same way.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::api::auth::Tokens;
use crate::api::client::Client;
use crate::api::extra::Extra;
use crate::api::http::Api;
use crate::api::metrics::Metrics;
use crate::api::registry::{PodHook, Registry};
use crate::api::server;
use crate::ca::{Authority, CaError, Pair, PassphraseFile, kubeconfig, write_private};
use crate::inject;
use crate::pool::Pool;
use crate::range::Ranges;
use crate::store::{EmbeddedStore, Store, StoreError};

/// How often watchers are told how far they are.
const PROGRESS: Duration = Duration::from_secs(5);
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// How the service is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// Everything it keeps.
    pub data_dir: PathBuf,
    /// What the authority's key in it is encrypted with; to be kept elsewhere.
    pub ca_passphrase: PassphraseFile,
    /// Where the API listens.
    pub listen: SocketAddr,
    /// Where clients reach the API; written into the administrator's kubeconfig.
    pub advertise_url: Option<String>,
    /// Further names and addresses of the serving certificate.
    pub san: Vec<String>,
    /// Addresses of services.
    pub service_cidr: Ranges,
    /// Addresses of pods; each node gets a part of each range.
    pub pod_cidr: Ranges,
    /// Addresses of services of type LoadBalancer.
    pub load_balancer_pool: Pool,
    /// Static tokens.
    pub token_file: Option<PathBuf>,
    /// A node whose lease is older is not ready.
    pub node_grace: Duration,
    /// Pods of a node that is not ready are evicted after this, where they do not say otherwise.
    pub eviction: Duration,
    /// What gateways' pods are made of; without it gateways get none.
    pub proxy: Option<inject::Config>,
}

/// Why the service did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory cannot be used.
    #[error("use of the data directory {path}: {source}")]
    DataDir {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The authority or a file of it.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A socket.
    #[error("listen on {address}: {source}")]
    Listen {
        /// Where.
        address: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The objects every cluster has.
    #[error("make the cluster's first objects: {0}")]
    Bootstrap(#[from] crate::api::status::ApiError),
}

/// What other parts of the program build on.
#[derive(Clone)]
pub struct Parts {
    /// The store.
    pub store: Arc<dyn Store>,
    /// Typed access; `named` gives each part its own identity.
    pub client: Client,
    /// The cluster's authority.
    pub authority: Arc<Authority>,
    /// Our serving certificate, for further ports.
    pub serving: Arc<Pair>,
    /// Documents that parts add to the API.
    pub extra: Extra,
    /// Fires when the service is to stop.
    pub stop: CancellationToken,
}

/// A running service.
pub struct Service {
    /// What others build on.
    pub parts: Parts,
    /// Where the API listens.
    pub address: SocketAddr,
    tasks: Vec<JoinHandle<()>>,
}

impl Service {
    /// Starts everything. `inherited` sockets serve the API too; `pod_hook` sees every new pod.
    pub async fn start(
        config: &Config,
        inherited: Vec<std::net::TcpListener>,
        pod_hook: Option<PodHook>,
    ) -> Result<Self, StartError> {
        let parts = open(config, pod_hook)?;
        let listeners = listen(config, inherited).await?;
        let address = listeners[0].local_addr().map_err(|source| listen_error(config.listen, source))?;
        write_credentials(config, &parts, address)?;
        crate::bootstrap::run(&parts.client.named("bootstrap"), config).await?;
        let api = Arc::new(Api {
            registry: parts.client.registry().clone(),
            tokens: tokens(config)?,
            node_tls: server::client_tls(&parts.authority, &admin(&parts.authority, "kube-apiserver")?)?,
            metrics: Metrics::default(),
            extra: parts.extra.clone(),
            stop: parts.stop.clone(),
        });
        let tls = server::server_tls(&parts.authority, &parts.serving)?;
        let mut tasks = vec![tokio::spawn(progress(parts.store.clone(), parts.stop.clone()))];
        for listener in listeners {
            tasks.push(tokio::spawn(server::run(api.clone(), tls.clone(), listener)));
        }
        tasks.extend(crate::controllers::start(&parts, config));
        tracing::info!(%address, epoch = parts.store.epoch(), revision = parts.store.revision(), "serving");
        Ok(Service { parts, address, tasks })
    }

    /// Stops accepting, lets requests in flight end, stops the parts.
    pub async fn stop(self) {
        self.parts.stop.cancel();
        for task in self.tasks {
            // A part that panicked has said so; the others still stop.
            let _ = tokio::time::timeout(server::DRAIN * 2, task).await;
        }
    }
}

fn open(config: &Config, pod_hook: Option<PodHook>) -> Result<Parts, StartError> {
    let dir = &config.data_dir;
    std::fs::create_dir_all(dir).map_err(|source| StartError::DataDir { path: dir.clone(), source })?;
    let authority = Arc::new(Authority::load_or_create(dir, &config.ca_passphrase)?);
    let mut names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec();
    names.extend(config.service_cidr.iter().map(|range| range.nth(1).to_string()));
    names.extend(["", ".default", ".default.svc", ".default.svc.cluster.local"].map(|s| format!("kubernetes{s}")));
    names.extend(config.san.iter().cloned());
    names.extend(config.advertise_url.as_deref().and_then(host).map(str::to_owned));
    names.sort();
    names.dedup();
    let serving = Arc::new(authority.serving(&names)?);
    let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&dir.join("store.redb"))?);
    let registry = Arc::new(Registry::new(store.clone(), config.service_cidr.clone(), pod_hook));
    let client = Client::new(registry, "control");
    let (extra, stop) = (Extra::default(), CancellationToken::new());
    Ok(Parts { store, client, authority, serving, extra, stop })
}

/// The host of an URL; an IPv6 address without its brackets.
fn host(url: &str) -> Option<&str> {
    let rest = url.split_once("://")?.1;
    let authority = rest.split('/').next()?;
    let host = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => authority.rsplit_once(':').map_or(authority, |(host, _)| host),
    };
    Some(host).filter(|host| !host.is_empty())
}

fn admin(authority: &Authority, name: &str) -> Result<Pair, CaError> {
    authority.client(name, &["system:masters"], YEAR)
}

fn write_credentials(config: &Config, parts: &Parts, address: SocketAddr) -> Result<(), CaError> {
    let url = config.advertise_url.clone().unwrap_or_else(|| format!("https://127.0.0.1:{}", address.port()));
    let text = kubeconfig(&url, parts.authority.bundle_pem(), &admin(&parts.authority, "sluice-admin")?);
    write_private(&config.data_dir.join("admin.kubeconfig"), &text)
}

fn tokens(config: &Config) -> Result<Tokens, StartError> {
    let Some(path) = &config.token_file else { return Ok(Tokens::default()) };
    Tokens::load(path).map_err(|source| StartError::DataDir { path: path.clone(), source })
}

fn listen_error(address: SocketAddr, source: std::io::Error) -> StartError {
    StartError::Listen { address: address.to_string(), source }
}

async fn listen(config: &Config, inherited: Vec<std::net::TcpListener>) -> Result<Vec<TcpListener>, StartError> {
    let failed = |source| listen_error(config.listen, source);
    let mut listeners = vec![TcpListener::bind(config.listen).await.map_err(failed)?];
    for socket in inherited {
        socket.set_nonblocking(true).map_err(failed)?;
        listeners.push(TcpListener::from_std(socket).map_err(failed)?);
    }
    Ok(listeners)
}

async fn progress(store: Arc<dyn Store>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(PROGRESS) => store.request_progress(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_urls() {
        for (url, want) in [
            ("https://192.0.2.1:6443", Some("192.0.2.1")),
            ("https://api.example.org/", Some("api.example.org")),
            ("https://[fd00::1]:6443/x", Some("fd00::1")),
            ("https://[fd00::1]", Some("fd00::1")),
            ("https://", None),
            ("192.0.2.1", None),
        ] {
            assert_eq!(host(url), want, "{url}");
        }
    }
}
