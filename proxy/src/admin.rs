//! The sidecar's own HTTP server, on the control thread, never captured. Everybody may read whether it is ready and its
//! metrics; the rest (requests as they happen, tables, levels of logs) is for callers on the pod's own loopback, which is
//! where the node's agent comes from.

use crate::{
    config::{Cluster, Config, Target},
    control::Scraper,
    gateway,
    observe::{Access, Filter, Observer, Tap},
    status::Status,
    upstream::Pool,
};
use bytes::Bytes;
use futures::stream;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, broadcast::error::RecvError, watch},
};

/// Most connections at a time.
const MAX_CONNECTIONS: usize = 64;
/// A tap without requests says an empty line so often, so that both ends notice when the other is gone.
const TAP_IDLE: Duration = Duration::from_secs(5);

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// What the server tells of.
#[derive(Clone)]
pub struct Served {
    pub status: watch::Receiver<Arc<Status>>,
    pub scraper: Scraper,
    pub config: watch::Receiver<Arc<Config>>,
    pub observer: Arc<Observer>,
}

/// Serves until the process ends.
pub async fn serve(listener: TcpListener, served: Served) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        // Too many: this one is closed.
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let served = served.clone();
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(|request| {
                let served = served.clone();
                async move { Ok::<_, Infallible>(respond(&request, peer, served).await) }
            });
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(30));
            // A client that goes away is no matter of ours.
            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

const PATHS: &str = "/ready /metrics, and on loopback /config /compiled /pools /certificates /access /tap\n";

async fn respond(request: &Request<Incoming>, peer: SocketAddr, served: Served) -> Response<Body> {
    let status = served.status.borrow().clone();
    match request.uri().path() {
        "/ready" => return ready(&status),
        "/metrics" => {
            let text = served.scraper.scrape().await.to_text();
            let lost = served.observer.lost();
            let lost = format!("# TYPE sluice_notes_lost_total counter\nsluice_notes_lost_total {lost}\n");
            return answer(StatusCode::OK, "text/plain; version=0.0.4", status.metrics() + &text + &lost);
        }
        _ if !peer.ip().to_canonical().is_loopback() => {
            return text(StatusCode::FORBIDDEN, "only for callers on this pod's loopback\n");
        }
        _ => {}
    }
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/config") => answer(StatusCode::OK, "application/json", status.to_json()),
        (&Method::GET, "/compiled") => json_answer(&compiled(&served.config.borrow())),
        (&Method::GET, "/pools") => json_answer(&pools(&served.scraper.pools().await)),
        (&Method::GET, "/certificates") => json_answer(&json!({
            "identity": status.identity, "expiresSeconds": status.certificate_expires_s,
        })),
        (&Method::GET, "/access") => json_answer(&json!({"log": served.observer.access().label()})),
        (&Method::PUT, "/access") => access(request.uri().query().unwrap_or_default(), &served.observer),
        (&Method::GET, "/tap") => tap(request.uri().query().unwrap_or_default(), &served.observer),
        _ => text(StatusCode::NOT_FOUND, PATHS),
    }
}

fn ready(status: &Status) -> Response<Body> {
    match status.missing() {
        missing if missing.is_empty() => text(StatusCode::OK, "ready\n"),
        missing => text(StatusCode::SERVICE_UNAVAILABLE, &format!("waiting for {}\n", missing.join(", "))),
    }
}

/// `PUT /access?log=off|errors|all`.
fn access(query: &str, observer: &Observer) -> Response<Body> {
    let asked = query.strip_prefix("log=").ok_or_else(|| "say ?log=off, errors or all".to_owned());
    match asked.and_then(str::parse::<Access>) {
        Ok(access) => {
            observer.set_access(access);
            json_answer(&json!({"log": access.label()}))
        }
        Err(error) => text(StatusCode::BAD_REQUEST, &(error + "\n")),
    }
}

/// Requests as they end, one JSON object in a line; see [`Filter`] for the query.
fn tap(query: &str, observer: &Arc<Observer>) -> Response<Body> {
    let filter = match Filter::parse(query) {
        Ok(filter) => filter,
        Err(error) => return text(StatusCode::BAD_REQUEST, &(error + "\n")),
    };
    let Some(tap) = observer.tap() else {
        return text(StatusCode::SERVICE_UNAVAILABLE, "too many taps at a time\n");
    };
    let lines = stream::unfold((tap, filter), |(mut tap, filter)| async move {
        let line = next_line(&mut tap, &filter).await?;
        Some((Ok::<_, Infallible>(Frame::data(Bytes::from(line))), (tap, filter)))
    });
    let mut response = Response::new(StreamBody::new(lines).boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    response
}

async fn next_line(tap: &mut Tap, filter: &Filter) -> Option<String> {
    loop {
        match tokio::time::timeout(TAP_IDLE, tap.exchanges.recv()).await {
            Ok(Ok(exchange)) if filter.takes(&exchange) => return Some(exchange.to_json().to_string() + "\n"),
            Ok(Ok(_)) => {}
            Ok(Err(RecvError::Lagged(missed))) => return Some(json!({"missed": missed}).to_string() + "\n"),
            Ok(Err(RecvError::Closed)) => return None,
            Err(_) => return Some("\n".to_owned()),
        }
    }
}

/// The tables that workers read.
fn compiled(config: &Config) -> Value {
    let cluster = |at: usize| {
        let c = &config.clusters[at];
        json!({"service": c.service.to_string(), "port": c.port})
    };
    let target = |t: &Target| {
        let rules = t.table.rules().iter().zip(&t.rules).map(|(rule, of)| {
            json!({
                "route": rule.route.to_string(), "rule": rule.position, "asks": rule.rule,
                "sendsTo": of.backends.iter().map(|c| cluster(*c)).collect::<Vec<_>>(),
            })
        });
        json!({
            "service": t.service.to_string(), "port": t.port, "listener": t.listener, "protocol": t.app_protocol,
            "rules": rules.collect::<Vec<_>>(), "own": cluster(t.own),
        })
    };
    let backend = |c: &Cluster| {
        let endpoint = |e: &crate::config::Endpoint| json!({"address": e.address.to_string(), "identity": e.identity.as_ref().map(|i| i.to_string())});
        json!({
            "service": c.service.to_string(), "port": c.port, "exists": c.known, "policy": c.policy,
            "endpoints": c.endpoints.iter().map(endpoint).collect::<Vec<_>>(),
        })
    };
    json!({
        "generation": config.generation, "revision": config.revision,
        "targets": config.targets.iter().map(target).collect::<Vec<_>>(),
        "backends": config.clusters.iter().map(backend).collect::<Vec<_>>(),
        "inbound": config.inbound.policy,
        "listeners": config.listeners.iter().flat_map(|(port, all)| all.iter().map(move |l| listener(*port, l))).collect::<Vec<_>>(),
    })
}

/// Without its keys.
fn listener(port: u16, l: &gateway::Listener) -> Value {
    json!({"port": port, "name": l.name, "hostname": l.hostname, "mode": l.mode, "target": l.target})
}

fn pools(workers: &[(usize, Vec<Pool>)]) -> Value {
    let one = |worker: usize, p: &Pool| {
        json!({
            "worker": worker, "endpoint": p.endpoint.address.to_string(), "inFlight": p.in_flight,
            "connections": p.connections, "idle": p.idle, "ejectedForMs": p.ejected_for_ms,
        })
    };
    workers.iter().flat_map(|(worker, pools)| pools.iter().map(move |p| one(*worker, p))).collect()
}

fn json_answer(value: &Value) -> Response<Body> {
    answer(StatusCode::OK, "application/json", value.to_string() + "\n")
}

fn text(status: StatusCode, text: &str) -> Response<Body> {
    answer(status, "text/plain", text.to_owned())
}

fn answer(status: StatusCode, kind: &'static str, body: String) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(body)).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
