//! The node's HTTPS server for control: container logs. Only a client certificate of the cluster's CA for control or an
//! administrator opens it.

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
use std::{path::PathBuf, sync::Arc};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

#[derive(Clone)]
pub struct Logs {
    pub client: Client,
    pub cri: Cri,
    pub node: convert::Node,
}

/// Serves until the listener fails.
pub async fn serve(listener: TcpListener, tls: Arc<rustls::ServerConfig>, logs: Logs) -> std::io::Result<()> {
    let app = Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/containerLogs/{namespace}/{pod}/{container}", get(container_logs))
        .with_state(logs);
    let acceptor = TlsAcceptor::from(tls);
    loop {
        let (stream, _) = listener.accept().await?;
        let (acceptor, app) = (acceptor.clone(), app.clone());
        tokio::spawn(async move {
            let Ok(tls) = acceptor.accept(stream).await else { return };
            let service = TowerToHyperService::new(app);
            let http = hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new());
            if let Err(error) = http.serve_connection(TokioIo::new(tls), service).await {
                tracing::debug!(%error, "log connection ended");
            }
        });
    }
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
