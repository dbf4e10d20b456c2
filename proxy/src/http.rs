//! HTTP/1.1 in both directions: requests of one connection, each to the backend that is chosen for it, over pooled
//! connections; answers back. Headers of a hop stay on their hop (RFC 9110 §7.6.1); upgrades and CONNECT become pipes.

use crate::{
    body::{Answer, Outgoing, empty},
    drain::Phase,
    live::{Choice, LiveCluster},
    metrics::add,
    outbound::choose_http,
    reason::{self, Reason},
    tcp,
    upstream::{InFlight, Sender, Upstream},
    worker::Worker,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body_util::Either;
use hyper::{
    body::{Body, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use sluice_traffic::balance;
use std::{cell::Cell, convert::Infallible, net::SocketAddr, rc::Rc, time::Instant};
use tokio::io::{AsyncRead, AsyncWrite};

/// Endpoints tried for one request before it is given up.
const MAX_ATTEMPTS: u32 = 3;
/// Headers of one connection, removed when a message is passed on (`te` is handled apart).
const HOP_BY_HOP: [HeaderName; 4] = [
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Where the requests of a connection go.
pub enum Side {
    /// To backends of what was dialled; `target` is that service port's place in the config of a generation.
    Outbound { destination: SocketAddr, target: Cell<(u64, usize)> },
    /// To the app.
    Inbound(Choice),
    /// Nowhere: every request is answered with this.
    Refuse(Reason),
}

/// Serves the requests of one connection until it ends.
pub async fn serve<S>(worker: &Rc<Worker>, stream: S, side: Side)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let inbound = matches!(side, Side::Inbound(_));
    let side = Rc::new(side);
    let service = service_fn(|request| {
        let (worker, side) = (worker.clone(), side.clone());
        async move { Ok::<_, Infallible>(respond(&worker, &side, request).await) }
    });
    let connection = http1::Builder::new()
        .half_close(true)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    if inbound {
        let mut phase = worker.phase.clone();
        tokio::select! {
            biased;
            _ = connection.as_mut() => return,
            _ = phase.wait_for(|p| *p >= Phase::ClosingIdle) => connection.as_mut().graceful_shutdown(),
        }
    }
    // How it ended was seen by the requests on it.
    let _ = connection.await;
}

async fn respond(worker: &Rc<Worker>, side: &Side, request: Request<Incoming>) -> Response<Answer> {
    let choice = match side {
        Side::Outbound { destination, target } => choose_http(worker, *destination, target, &request),
        Side::Inbound(choice) => Ok(choice.clone()),
        Side::Refuse(reason) => Err(*reason),
    };
    let inbound = matches!(side, Side::Inbound(_));
    let mut response = match choice {
        Ok(choice) => forward(worker, choice, request, inbound).await,
        Err(reason) => refuse(worker, reason),
    };
    if inbound && worker.draining() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// An answer of our own making: it says so, and why.
pub fn refuse(worker: &Worker, reason: Reason) -> Response<Answer> {
    worker.counters.refuse(reason);
    let mut response = Response::new(Answer::text(format!("sluice: {}\n", reason.label())));
    *response.status_mut() = reason.status();
    response.headers_mut().insert(reason::HEADER, HeaderValue::from_static(reason.label()));
    response
}

/// Sends the request to an endpoint of the chosen backend and passes the answer on.
async fn forward(
    worker: &Rc<Worker>,
    choice: Choice,
    mut request: Request<Incoming>,
    inbound: bool,
) -> Response<Answer> {
    let mut in_flight = Box::new(InFlight::new(choice.series, Instant::now()));
    let tunnel = prepare_request(&mut request);
    // Only tunnels take their end of the connection over; the others need no handle for it.
    let client = tunnel.then(|| hyper::upgrade::on(&mut request));
    match send(worker, &choice.cluster, request, &mut in_flight, inbound).await {
        Err(reason) => {
            in_flight.answered(reason.status().as_u16(), None);
            refuse(worker, reason)
        }
        Ok((response, sender)) => {
            if let Some(client) = client.filter(|_| switches(&response)) {
                return tunnel_through(worker, client, response, in_flight);
            }
            pass_on(response, sender, in_flight)
        }
    }
}

/// The answer, and the connection it came by. Tries other endpoints, and once another connection, where that cannot
/// make a request count twice.
async fn send(
    worker: &Rc<Worker>,
    cluster: &Rc<LiveCluster>,
    request: Request<Incoming>,
    in_flight: &mut InFlight,
    inbound: bool,
) -> Result<(Response<Incoming>, Sender), Reason> {
    if !cluster.known {
        return Err(Reason::NoBackend);
    }
    let empty_body = request.body().is_end_stream();
    let mut request = request.map(Either::Left);
    let mut tries = Tries { repeatable: empty_body && request.method().is_idempotent(), ..Tries::default() };
    loop {
        let Some(at) = tries.pick(cluster, worker) else { return Err(tries.failure) };
        let upstream = &cluster.endpoints[at];
        in_flight.at(upstream);
        let (mut sender, reused) = match tries.connection(upstream, worker).await {
            Ok(got) => got,
            Err(error) => {
                tracing::debug!(%error, "no connection");
                tries.failure = if inbound { Reason::AppUnreachable } else { error.reason() };
                tries.next_endpoint(at, worker);
                continue;
            }
        };
        let spare = empty_body.then(|| copy_head(&request));
        match sender.try_send_request(request).await {
            Ok(response) => match spare {
                Some(spare) if never_reached_app(&response) && tries.another_endpoint(at, cluster, worker) => {
                    request = spare;
                }
                _ => return Ok((response, sender)),
            },
            Err(mut failed) => {
                let unsent = failed.take_message();
                let again = unsent.or(spare.filter(|_| tries.repeatable && reused));
                tracing::debug!(error = %failed.error(), reused, "request failed");
                let closed = if failed.error().is_parse() { Reason::UpstreamMalformed } else { Reason::UpstreamClosed };
                request = again.filter(|_| tries.another_connection(worker)).ok_or(closed)?;
            }
        }
    }
}

/// What was tried for one request.
struct Tries {
    /// May be sent again after a connection broke before any byte of the answer (RFC 9110 §9.2.2).
    repeatable: bool,
    /// Endpoints not to try again, by index; those past 63 are not remembered.
    tried: u64,
    attempts: u32,
    /// No pooled connection any more.
    fresh: bool,
    failure: Reason,
}

impl Default for Tries {
    fn default() -> Self {
        Self { repeatable: false, tried: 0, attempts: 0, fresh: false, failure: Reason::NoEndpoints }
    }
}

impl Tries {
    fn pick(&self, cluster: &LiveCluster, worker: &Worker) -> Option<usize> {
        if self.attempts >= MAX_ATTEMPTS {
            return None;
        }
        let endpoints = &cluster.endpoints;
        let random = if endpoints.len() > 1 { worker.random() } else { 0 };
        let untried = |i: usize| i > 63 || self.tried & (1 << i) == 0;
        balance::pick(endpoints.len(), random, |i| endpoints[i].in_flight.get(), untried)
    }

    async fn connection(
        &self,
        upstream: &Upstream,
        worker: &Worker,
    ) -> Result<(Sender, bool), crate::upstream::ConnectError> {
        if !self.fresh
            && let Some(sender) = upstream.take_idle(self.repeatable, Instant::now())
        {
            return Ok((sender, true));
        }
        Ok((upstream.connect_http(worker).await?, false))
    }

    fn next_endpoint(&mut self, at: usize, worker: &Worker) {
        self.tried |= 1u64.checked_shl(at as u32).unwrap_or(0);
        self.attempts += 1;
        add(&worker.counters.retries, 1);
    }

    /// Whether another endpoint is left to try after `at`.
    fn another_endpoint(&mut self, at: usize, cluster: &LiveCluster, worker: &Worker) -> bool {
        self.next_endpoint(at, worker);
        self.pick(cluster, worker).is_some()
    }

    /// Whether a fresh connection may be tried: once.
    fn another_connection(&mut self, worker: &Worker) -> bool {
        add(&worker.counters.retries, 1);
        !std::mem::replace(&mut self.fresh, true)
    }
}

/// The sidecar of the endpoint says that its app took no connection: nothing has happened yet.
fn never_reached_app(response: &Response<Incoming>) -> bool {
    response.status() == StatusCode::SERVICE_UNAVAILABLE
        && response.headers().get(reason::HEADER).is_some_and(|r| r == Reason::AppUnreachable.label())
}

fn copy_head(request: &Request<Outgoing>) -> Request<Outgoing> {
    let mut copy = Request::new(empty());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.headers_mut() = request.headers().clone();
    if let Some(upgrade) = request.extensions().get::<hyper::ext::Protocol>() {
        copy.extensions_mut().insert(upgrade.clone());
    }
    copy
}

/// Makes a request fit for the next hop. True when it asks for a tunnel.
fn prepare_request(request: &mut Request<Incoming>) -> bool {
    *request.version_mut() = Version::HTTP_11;
    origin_form(request);
    let upgrade = requested_upgrade(request.headers());
    let trailers = request.headers().get(header::TE).is_some_and(|te| te.as_bytes().eq_ignore_ascii_case(b"trailers"));
    remove_hop_by_hop(request.headers_mut());
    if request.headers_mut().remove(header::TE).is_some() && trailers {
        request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    }
    let tunnel = upgrade.is_some() || request.method() == Method::CONNECT;
    if let Some(upgrade) = upgrade {
        request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        request.headers_mut().insert(header::UPGRADE, upgrade);
    }
    tunnel
}

/// A target with scheme and host, as clients of a proxy send it, becomes a path and a `Host` (RFC 9112 §3.2.2).
fn origin_form(request: &mut Request<Incoming>) {
    if request.uri().scheme().is_none() || request.method() == Method::CONNECT {
        return;
    }
    let host = request.uri().authority().and_then(|a| HeaderValue::from_str(a.as_str()).ok());
    if let Some(host) = host {
        request.headers_mut().insert(header::HOST, host);
    }
    let path = request.uri().path_and_query().cloned();
    *request.uri_mut() = path.map_or_else(|| http::Uri::from_static("/"), Into::into);
}

fn requested_upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let upgrade = headers.get(header::UPGRADE)?;
    let asks = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|c| c.to_str().ok())
        .flat_map(|c| c.split(','))
        .any(|option| option.trim().eq_ignore_ascii_case("upgrade"));
    asks.then(|| upgrade.clone())
}

/// Removes what belongs to one connection: the headers that `Connection` names, and those that always do.
fn remove_hop_by_hop(headers: &mut HeaderMap) {
    while let Some(connection) = headers.remove(header::CONNECTION) {
        for name in connection.to_str().unwrap_or_default().split(',') {
            let name = name.trim();
            // These decide where a message goes and how long it is; nobody may strip them this way.
            let protected = ["host", "content-length", "te", "close", "keep-alive", "upgrade"];
            if !protected.iter().any(|p| name.eq_ignore_ascii_case(p)) {
                headers.remove(name);
            }
        }
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
}

/// The upstream agreed to a tunnel.
fn switches(response: &Response<Incoming>) -> bool {
    // A tunnel asked for by CONNECT is granted by any success.
    response.status() == StatusCode::SWITCHING_PROTOCOLS
        || (response.status().is_success() && response.extensions().get::<hyper::upgrade::OnUpgrade>().is_some())
}

/// Answers with the upstream's head and joins the two connections.
fn tunnel_through(
    worker: &Rc<Worker>,
    client: hyper::upgrade::OnUpgrade,
    mut response: Response<Incoming>,
    mut in_flight: Box<InFlight>,
) -> Response<Answer> {
    in_flight.answered(response.status().as_u16(), None);
    let server = hyper::upgrade::on(&mut response);
    let worker = worker.clone();
    tokio::task::spawn_local(async move {
        let _in_flight = in_flight;
        let (Ok(client), Ok(server)) = futures::join!(client, server) else { return };
        let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
        let mut phase = worker.phase.clone();
        tokio::select! {
            // Ends of tunnels are the peers' business.
            _ = tcp::pump(&mut client, &mut server) => {}
            _ = phase.wait_for(|p| *p == Phase::Stopped) => {}
        }
    });
    let (parts, _) = response.into_parts();
    Response::from_parts(parts, Answer::Text(None))
}

fn pass_on(mut response: Response<Incoming>, sender: Sender, mut in_flight: Box<InFlight>) -> Response<Answer> {
    *response.version_mut() = Version::HTTP_11;
    remove_hop_by_hop(response.headers_mut());
    in_flight.answered(response.status().as_u16(), Some(sender));
    response.map(|body| {
        if body.is_end_stream() {
            in_flight.end();
            return Answer::Upstream(body, None);
        }
        Answer::Upstream(body, Some(in_flight))
    })
}
