//! Connections that the app opened: what was dialled decides. A service's port is split per request where it speaks
//! HTTP, else per connection; a meshed pod gets mTLS; anything else passes as it is.

use crate::{
    config::{Destination, Endpoint},
    http::{self, Protocol, Side},
    io::{Prefixed, first_bytes, first_of_http},
    live::Choice,
    metrics::add,
    reason::Reason,
    rule::Routed,
    tcp,
    upstream::{ConnectError, Upstream},
    worker::Worker,
};
use ::http::{Request, header};
use bytes::Bytes;
use hyper::body::Incoming;
use sluice_model::{AppProtocol, HashKey, Identity};
use sluice_traffic::detect::Detected;
use sluice_wire::{SIDECAR_INBOUND_PORT, SIDECAR_OUTBOUND_PORT};
use std::{cell::Cell, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

/// How long a client may keep silent before the connection counts as one where the server speaks first.
const DETECT_PATIENCE: Duration = Duration::from_millis(200);
/// Endpoints tried for one connection.
const MAX_ATTEMPTS: usize = 3;

/// Serves one connection to `destination` until it ends.
pub async fn serve(worker: &Rc<Worker>, stream: TcpStream, destination: SocketAddr) {
    if is_own_listener(destination) {
        worker.counters.refuse(Reason::Loop);
        return reset(&stream);
    }
    let _dialled = worker.dial(destination);
    match worker.resolve(destination).await {
        Some(Destination::Service(target)) => service(worker, stream, destination, target).await,
        // Apart, as `opaque` is: what dials is large, and connections with requests need not pay for it.
        Some(Destination::Pod(identity)) => Box::pin(pass(worker, stream, destination, Some(identity))).await,
        None if worker.inside(destination.ip()) => {
            worker.counters.refuse(Reason::DestinationUnknown);
            reset(&stream);
        }
        Some(Destination::Outside) | None => Box::pin(pass(worker, stream, destination, None)).await,
    }
}

/// Dialled by its own port instead of by capture: passing it on would come back here.
fn is_own_listener(destination: SocketAddr) -> bool {
    destination.ip().is_loopback() && [SIDECAR_OUTBOUND_PORT, SIDECAR_INBOUND_PORT].contains(&destination.port())
}

/// Ends a connection so that the peer sees a failure and not an end.
pub fn reset(stream: &TcpStream) {
    // It is closed in any case; only how is at stake.
    let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

async fn service(worker: &Rc<Worker>, mut stream: TcpStream, destination: SocketAddr, target: usize) {
    let live = worker.live();
    let Some(protocol) = live.config.targets.get(target).map(|t| t.app_protocol) else { return reset(&stream) };
    let side = Side::Outbound { destination, target: Cell::new((live.config.generation, target)) };
    drop(live);
    match protocol {
        AppProtocol::Http => {
            let Ok((bytes, found)) = first_of_http(&mut stream, DETECT_PATIENCE).await else { return };
            let version = if let Detected::Http2 = found { Protocol::Http2 } else { Protocol::Http1 };
            http::serve(worker, Prefixed::new(bytes, stream), side, version).await;
        }
        AppProtocol::Http2 => http::serve(worker, Prefixed::new(Bytes::new(), stream), side, Protocol::Http2).await,
        AppProtocol::Tcp => Box::pin(tls_or_opaque(worker, stream, destination, target)).await,
        AppProtocol::Detect => {
            let Ok((bytes, found)) = first_bytes(&mut stream, DETECT_PATIENCE).await else { return };
            match found {
                Detected::Tls(hello) => {
                    Box::pin(opaque(worker, stream, bytes, destination, Some(hello.server_name()))).await;
                }
                Detected::Http1 => http::serve(worker, Prefixed::new(bytes, stream), side, Protocol::Http1).await,
                Detected::Http2 => http::serve(worker, Prefixed::new(bytes, stream), side, Protocol::Http2).await,
                _ => Box::pin(opaque(worker, stream, bytes, destination, None)).await,
            }
        }
    }
}

/// A port that is said not to be HTTP: nobody waits for its first bytes unless routes ask for the server's name.
async fn tls_or_opaque(worker: &Rc<Worker>, mut stream: TcpStream, destination: SocketAddr, target: usize) {
    let by_name = worker.live().config.targets.get(target).is_some_and(|t| t.table.has_names());
    if !by_name {
        return opaque(worker, stream, Bytes::new(), destination, None).await;
    }
    let Ok((bytes, found)) = first_bytes(&mut stream, DETECT_PATIENCE).await else { return };
    match found {
        Detected::Tls(hello) => opaque(worker, stream, bytes, destination, Some(hello.server_name())).await,
        _ => opaque(worker, stream, bytes, destination, None).await,
    }
}

/// A connection that is split as a whole.
async fn opaque(worker: &Rc<Worker>, stream: TcpStream, bytes: Bytes, destination: SocketAddr, name: Option<&str>) {
    let live = worker.live();
    let Some(Destination::Service(target)) = live.config.destinations.get(&destination) else { return reset(&stream) };
    let choice = live.choose_tcp(*target, name);
    drop(live);
    match choice {
        Ok(choice) => join(worker, stream, bytes, choice, worker.source()).await,
        Err(reason) => {
            worker.counters.refuse(reason);
            reset(&stream);
        }
    }
}

/// Joins a connection with one to the backend; `source` stands for who calls.
pub async fn join(worker: &Rc<Worker>, mut stream: TcpStream, bytes: Bytes, choice: Choice, source: u64) {
    let series = &choice.series;
    add(&series.connections, 1);
    let (upstream, mut wire) = match connect_any(worker, &choice, source).await {
        Ok(got) => got,
        Err(reason) => {
            worker.counters.refuse(reason);
            return reset(&stream);
        }
    };
    add(&series.open_connections, 1);
    upstream.in_flight.set(upstream.in_flight.get() + 1);
    let failed = pump_from(&mut stream, bytes, &mut wire).await.is_err();
    upstream.in_flight.set(upstream.in_flight.get() - 1);
    series.open_connections.set(series.open_connections.get() - 1);
    if failed {
        reset(&stream);
    }
}

async fn pump_from<B>(stream: &mut TcpStream, bytes: Bytes, wire: &mut B) -> std::io::Result<()>
where
    B: AsyncRead + AsyncWrite + Unpin,
{
    if bytes.is_empty() {
        return tcp::pump(stream, wire).await.map(drop);
    }
    tcp::pump(&mut Prefixed::new(bytes, stream), wire).await.map(drop)
}

/// A connection to an endpoint of the backend; others are tried while no byte was sent.
async fn connect_any(worker: &Worker, choice: &Choice, source: u64) -> Result<(Rc<Upstream>, crate::io::Wire), Reason> {
    let endpoints = &choice.cluster.endpoints;
    let mut failure = if choice.cluster.known { Reason::NoEndpoints } else { Reason::NoBackend };
    let mut tried = Vec::new();
    let key = choice.cluster.hash_key().filter(|k| **k == HashKey::Source).map(|_| source);
    while tried.len() < MAX_ATTEMPTS {
        let Some(at) = choice.cluster.pick(worker, key, |i| !tried.contains(&i)) else { break };
        let waiting = choice.cluster.wait()?;
        if !choice.cluster.may_open(|| endpoints[at].has_none_for(false, false)) {
            failure = Reason::CircuitOpen;
            tried.push(at);
            continue;
        }
        let connected = endpoints[at].connect(worker).await;
        drop(waiting);
        choice.cluster.observe(worker, at, connected.is_ok(), 0);
        match connected {
            Ok(wire) => return Ok((endpoints[at].clone(), wire)),
            Err(error) => {
                tracing::debug!(%error, "no connection");
                failure = error.reason();
                add(&worker.counters.retries, 1);
                tried.push(at);
            }
        }
    }
    Err(failure)
}

/// To the address that was dialled.
async fn pass(worker: &Rc<Worker>, mut stream: TcpStream, address: SocketAddr, identity: Option<Arc<Identity>>) {
    let upstream = Upstream::new(Endpoint { address, identity });
    let connected: Result<_, ConnectError> = upstream.connect(worker).await;
    match connected {
        Ok(mut wire) => {
            if tcp::pump(&mut stream, &mut wire).await.is_err() {
                reset(&stream);
            }
        }
        Err(error) => {
            tracing::debug!(%error, "pass through");
            worker.counters.refuse(error.reason());
            reset(&stream);
        }
    }
}

/// The backend of one request of a connection to `destination`. The place of its service in the config is looked up
/// once per config.
pub fn choose_http(
    worker: &Worker,
    destination: SocketAddr,
    target: &Cell<(u64, usize)>,
    request: &Request<Incoming>,
) -> Result<Routed, Reason> {
    let live = worker.live();
    let (generation, mut at) = target.get();
    if generation != live.config.generation {
        let Some(Destination::Service(found)) = live.config.destinations.get(&destination) else {
            return Err(Reason::NoBackend);
        };
        at = *found;
        target.set((live.config.generation, at));
    }
    live.choose_http(at, request, worker)
}

/// The name of the host that was asked for, without port.
pub fn host<B>(request: &Request<B>) -> &str {
    let named = request.headers().get(header::HOST).and_then(|h| h.to_str().ok());
    let host = request.uri().host().or(named).unwrap_or_default();
    match host.rsplit_once(':') {
        // An IPv6 address in brackets has colons of its own.
        Some((name, port)) if !port.ends_with(']') => name,
        _ => host,
    }
}
