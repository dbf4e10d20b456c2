//! The data plane's half of control: the feed, the streams to agents, the signing of certificates, the routes' statuses,
//! and what sidecars measured.

use crate::{
    api::extra::Document,
    discovery::{Counters, Published, Server, Shared, run_feed, run_status},
    inject,
    pool::Pool,
    service::Parts,
};
use serde_json::{Value, json};
use sluice_wire::v1::{discovery_server::DiscoveryServer, identity_server::IdentityServer};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

#[derive(Debug, Clone)]
pub struct Config {
    pub listen: SocketAddr,
    pub trust_domain: String,
    /// Addresses of services of type LoadBalancer.
    pub pool: Pool,
    /// Life of a workload's certificate.
    pub workload_life: Duration,
}

/// Name that agents expect in the serving certificate.
pub const SERVER_NAME: &str = "sluice-control";

/// Sees every new pod: injects the sidecar where its namespace asks for it.
pub fn pod_hook(config: inject::Config) -> crate::api::registry::PodHook {
    Box::new(move |pod, namespace| inject::inject(pod, &namespace["metadata"]["labels"], &config))
}

/// Starts all of it; the address of the gRPC port.
pub async fn start(parts: &Parts, config: &Config) -> anyhow::Result<(SocketAddr, Vec<JoinHandle<()>>)> {
    let listener = TcpListener::bind(config.listen)
        .await
        .map_err(|e| anyhow::anyhow!("listen on {} for discovery: {e}", config.listen))?;
    let address = listener.local_addr()?;
    let (published, receiver) = watch::channel(Published::default());
    let counters = Arc::new(Counters::default());
    let shared = Shared::new(receiver, counters.clone());
    parts.extra.set(sluice_wire::traffic::PATH, traffic(shared.clone()));
    let server = Server {
        shared: shared.clone(),
        store: parts.store.clone(),
        authority: parts.authority.clone(),
        client: parts.client.named("join"),
        trust_domain: config.trust_domain.clone(),
        workload_life: config.workload_life,
    };
    let stop = parts.stop.clone();
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(&parts.serving.certificate_pem, &parts.serving.key_pem))
        .client_ca_root(Certificate::from_pem(parts.authority.bundle_pem()))
        // Only `Join` is answered without one.
        .client_auth_optional(true);
    let router = tonic::transport::Server::builder()
        .tls_config(tls)?
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .tcp_nodelay(true)
        .add_service(DiscoveryServer::new(server.clone()).max_decoding_message_size(16 << 20))
        .add_service(IdentityServer::new(server));
    let grpc = async move {
        let ended = router.serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.cancelled_owned()).await;
        if let Err(error) = ended {
            tracing::error!(%error, "discovery ended");
        }
    };
    let cluster = (config.trust_domain.clone(), config.pool.clone());
    let feed = run_feed(parts.store.clone(), cluster, published, counters.clone());
    let status = run_status(parts.store.clone(), shared);
    parts.extra.add_metrics(Box::new(move |out| counters.render(out)));
    Ok((address, vec![tokio::spawn(grpc), abortable(parts, feed), abortable(parts, status)]))
}

/// Runs a part that never ends by itself until the service stops.
fn abortable(parts: &Parts, part: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    let stop = parts.stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = part => {}
        }
    })
}

fn traffic(shared: Arc<Shared>) -> Document {
    Box::new(move || -> Value {
        let items = shared.traffic.lock().expect("no holder panics").rows();
        json!({"apiVersion": "traffic.sluice.dev/v1alpha1", "kind": "RouteTrafficList", "items": items})
    })
}
