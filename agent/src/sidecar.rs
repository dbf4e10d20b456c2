//! What sidecars of this node say of themselves (requests as they happen, tables, pools), for operators: a route of the
//! node's server, which lets nobody else in. The sidecar is asked on its pod's own loopback.

use crate::pods::{PodNetwork, convert};
use axum::{
    Router,
    body::Body,
    extract::{RawQuery, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use sluice_wire::{SIDECAR_ADMIN_PORT, sidecar};
use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

/// For the connection and the head of the answer; a tap's body may take for ever.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Clone)]
pub struct Sidecars {
    pub client: Client,
    pub network: Arc<dyn PodNetwork>,
}

/// `GET /sidecar` with a [`sidecar::Question`] as its query.
pub fn routes(sidecars: Sidecars) -> Router {
    Router::new().route(sidecar::PATH, get(ask)).with_state(sidecars)
}

async fn ask(State(s): State<Sidecars>, RawQuery(query): RawQuery) -> Response {
    let question = match sidecar::Question::parse(&query.unwrap_or_default()) {
        Ok(question) => question,
        Err(error) => return (StatusCode::BAD_REQUEST, error).into_response(),
    };
    let asked = tokio::time::timeout(ANSWER_TIMEOUT, pass(&s, &question)).await;
    let failed = |why: String| {
        let text = format!("sidecar of pod {}/{}: {why}\n", question.namespace, question.pod);
        (StatusCode::BAD_GATEWAY, text).into_response()
    };
    match asked {
        Ok(Ok(response)) => response,
        Ok(Err(why)) => failed(why),
        Err(_) => failed("it does not answer".to_owned()),
    }
}

async fn pass(s: &Sidecars, question: &sidecar::Question) -> Result<Response, String> {
    let api: Api<Pod> = Api::namespaced(s.client.clone(), &question.namespace);
    let pod = api.get(&question.pod).await.map_err(|e| e.to_string())?;
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, SIDECAR_ADMIN_PORT));
    let socket =
        s.network.tcp_socket(convert::uid(&pod), to).map_err(|e| format!("socket in the pod's network: {e}"))?;
    socket.set_nonblocking(true).map_err(|e| e.to_string())?;
    let stream = tokio::net::TcpSocket::from_std_stream(socket).connect(to).await;
    let stream = stream.map_err(|e| format!("dial {to} in the pod (has it a sidecar?): {e}"))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    // It ends with the answer's body or with the client that reads it.
    tokio::spawn(connection);
    let request = hyper::Request::get(question.target()).header(header::HOST, "sidecar");
    let request = request.body(Empty::<Bytes>::new()).map_err(|e| e.to_string())?;
    let answer = sender.send_request(request).await.map_err(|e| e.to_string())?;
    let (head, body) = answer.into_parts();
    let mut response = Response::new(Body::new(body));
    *response.status_mut() = head.status;
    if let Some(kind) = head.headers.get(header::CONTENT_TYPE) {
        response.headers_mut().insert(header::CONTENT_TYPE, kind.clone());
    }
    Ok(response)
}
