//! The node's HTTPS server for control: container logs, and what other parts add (flows). Only a client certificate of the cluster's CA for control or an
//! administrator opens it.

use crate::identity::NodeIdentity;
use crate::pods::{
    convert,
    cri::Cri,
    logs::{self, LogQuery},
};
use axum::{
    Router,
    body::Body,
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use futures::future::BoxFuture;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc},
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

#[derive(Clone)]
pub struct Logs {
    pub client: Client,
    pub cri: Cri,
    pub node: convert::Node,
}

/// Most connections at a time; further ones are closed at once.
const MAX_CONNECTIONS: usize = 256;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Before the next try after a failed accept (no descriptors left, say).
const PAUSE: Duration = Duration::from_millis(100);

/// The containers' logs.
pub fn routes(logs: Logs) -> Router {
    Router::new().route("/containerLogs/{namespace}/{pod}/{container}", get(container_logs)).with_state(logs)
}

/// Serves for ever: to administrators, whatever the route.
pub async fn serve(listener: TcpListener, tls: Arc<rustls::ServerConfig>, routes: Router) {
    let app = routes.route("/healthz", get(|| async { "ok" }));
    let acceptor = TlsAcceptor::from(tls);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "node server takes no connection, trying again");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else { continue };
        let (acceptor, app) = (acceptor.clone(), app.clone());
        tokio::spawn(async move {
            let _slot = slot;
            let Ok(Ok(tls)) = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await else { return };
            if !administrator(tls.get_ref().1) {
                return tracing::warn!("request without an administrator's certificate refused");
            }
            let service = TowerToHyperService::new(app);
            let http = hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new());
            if let Err(error) = http.serve_connection(TokioIo::new(tls), service).await {
                tracing::debug!(%error, "connection of the node server ended");
            }
        });
    }
}

/// Control and administrators carry `O=system:masters`; workloads' certificates of the same CA do not.
fn administrator(c: &rustls::ServerConnection) -> bool {
    let Some(leaf) = c.peer_certificates().and_then(|c| c.first()) else { return false };
    let Ok((_, cert)) = x509_parser::parse_x509_certificate(leaf) else { return false };
    cert.subject().iter_organization().any(|o| o.as_str() == Ok("system:masters"))
}

/// The node's own certificate; clients must show one of the cluster's CA.
pub fn tls(id: &NodeIdentity) -> anyhow::Result<Arc<rustls::ServerConfig>> {
    let mut roots = rustls::RootCertStore::empty();
    for cert in CertificateDer::pem_slice_iter(id.bundle_pem.as_bytes()) {
        roots.add(cert?)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
    let chain = CertificateDer::pem_slice_iter(id.certificate_pem.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(id.key_pem.as_bytes())?;
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    Ok(Arc::new(config))
}

async fn container_logs(
    State(s): State<Logs>,
    Path((namespace, pod, container)): Path<(String, String, String)>,
    Query(query): Query<LogQuery>,
) -> Response {
    let (path, id) = match locate(&s, &namespace, &pod, &container, query.previous).await {
        Ok(found) => found,
        Err(refused) => return refused,
    };
    let (tx, rx) = mpsc::channel(32);
    tokio::spawn(async move {
        let ended = move || {
            let (cri, id, container) = (s.cri.clone(), id.clone(), container.clone());
            Box::pin(async move { !running(&cri, &id, &container).await }) as BoxFuture<'static, bool>
        };
        if let Err(error) = logs::stream(path, query, tx, ended).await {
            tracing::debug!(%error, "log stream ended");
        }
    });
    Body::from_stream(ReceiverStream::new(rx).map(Ok::<_, std::convert::Infallible>)).into_response()
}

async fn locate(
    s: &Logs,
    namespace: &str,
    pod: &str,
    container: &str,
    previous: bool,
) -> Result<(PathBuf, String), Response> {
    let api: Api<Pod> = Api::namespaced(s.client.clone(), namespace);
    let object = api
        .get(pod)
        .await
        .map_err(|e| (StatusCode::NOT_FOUND, format!("pod {namespace}/{pod}: {e}")).into_response())?;
    let dir = PathBuf::from(convert::log_dir(&object, &s.node));
    let path = logs::find(&dir, container, previous).map_err(|_| {
        let which = if previous { "previous terminated container" } else { "container" };
        (StatusCode::BAD_REQUEST, format!("{which} \"{container}\" in pod \"{pod}\" not found")).into_response()
    })?;
    Ok((path, convert::uid(&object).to_owned()))
}

async fn running(cri: &Cri, uid: &str, container: &str) -> bool {
    let seen = cri.list().await.ok().and_then(|mut l| l.remove(uid)).unwrap_or_default();
    seen.containers.iter().any(|c| c.name == container && c.state == crate::pods::plan::State::Running)
}
