//! HTTP in both directions: requests of one connection, each to the backend that is chosen for it, and answers back in
//! the version they were asked in (1.1, or 2 with prior knowledge). Upgrades and CONNECT become pipes.

use crate::{
    admission::Entry,
    apply,
    attempt::send,
    body::Answer,
    check, cluster,
    drain::Phase,
    gateway::Door,
    guard::Head,
    headers::{Needs, convert_version, prepare_request, remove_hop_by_hop, restore_version},
    idle,
    metrics::SeriesKey,
    multiplex::{self, Peer},
    observe::Exchange,
    outbound::{choose_http, host},
    paced::pace,
    reason::{self, Reason},
    rule::Routed,
    tcp,
    tls::Tls,
    trace::Context,
    upstream::{InFlight, Sender},
    worker::{Open, Worker},
};
use futures::{FutureExt, future::Either};
use http::{HeaderValue, Request, Response, StatusCode, Version, header, uri::Scheme};
use hyper::{
    body::{Body, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use sluice_model::Identity;
use std::{
    cell::Cell,
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::io::{AsyncRead, AsyncWrite};

/// How requests are written on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http1,
    Http2,
}

/// Where the requests of a connection go.
pub enum Side {
    /// To backends of what was dialled; `target` is that service port's place in the config of a generation.
    Outbound { destination: SocketAddr, target: Cell<(u64, usize)> },
    /// To the app.
    Inbound(Entry),
    /// To the app, from a peer's sidecar by `sluice-h2`: requests of both versions, on a connection that ends with our
    /// certificate.
    Mesh(Entry, Arc<Tls>),
    /// A gateway's client's, to backends of its listener's routes.
    Gateway(Door),
    /// Nowhere: every request is answered with this.
    Refuse(Reason),
}

impl Side {
    fn inbound(&self) -> bool {
        matches!(self, Self::Inbound(_) | Self::Mesh(..))
    }

    fn outbound(&self) -> bool {
        matches!(self, Self::Outbound { .. })
    }

    /// Who opened the connection may leave it open: we end it.
    fn of_others(&self) -> bool {
        self.inbound() || matches!(self, Self::Gateway(_))
    }

    /// What stands for who calls, and the scheme by which.
    fn source(&self, worker: &Worker) -> (u64, Scheme) {
        match self {
            Self::Gateway(door) => (door.source(), door.scheme()),
            // What reaches a sidecar is plain HTTP, whatever it came from.
            _ => (worker.source(), Scheme::HTTP),
        }
    }

    /// Where the caller is, if that is known to be its own address.
    fn client(&self) -> Option<IpAddr> {
        if let Self::Gateway(door) = self { Some(door.client) } else { None }
    }

    /// Who called, proven by mTLS.
    fn caller(&self) -> Option<&Arc<Identity>> {
        match self {
            Self::Inbound(entry) | Self::Mesh(entry, _) => entry.caller.as_ref(),
            Self::Outbound { .. } | Self::Refuse(_) | Self::Gateway(_) => None,
        }
    }

    /// What a request is counted as that goes nowhere.
    fn key(&self, worker: &Worker) -> SeriesKey {
        match self {
            Self::Outbound { destination, target } => worker.target_key(*destination, target.get().1),
            Self::Gateway(door) => worker.gateway_key(door.port),
            _ => worker.inbound_key(self.port()),
        }
    }

    /// The port that was dialled.
    fn port(&self) -> u16 {
        match self {
            Self::Outbound { destination, .. } => destination.port(),
            Self::Inbound(entry) | Self::Mesh(entry, _) => entry.address.port(),
            Self::Gateway(door) => door.port,
            Self::Refuse(_) => 0,
        }
    }
}

/// Serves the requests of one connection until it ends. Made by plain functions and not by an async one, which would
/// hold room for both protocols: there are many connections, most of them idle.
pub fn serve<S>(worker: &Rc<Worker>, stream: S, side: Side, protocol: Protocol) -> impl Future<Output = ()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (worker, side) = (worker.clone(), Rc::new(side));
    match protocol {
        Protocol::Http1 => Either::Left(http1(worker, stream, side)),
        Protocol::Http2 => Either::Right(Box::pin(http2(worker, stream, side))),
    }
}

fn http1<S>(worker: Rc<Worker>, stream: S, side: Rc<Side>) -> impl Future<Output = ()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let ending = ending(worker.clone(), side.clone(), Protocol::Http1);
    let head = Arc::new(Head::default());
    let (of_end, of_service) = ((worker.clone(), head.clone()), head.clone());
    let of_connection = worker.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        of_service.complete(request.headers().contains_key(header::CONTENT_LENGTH));
        let (worker, side) = (worker.clone(), side.clone());
        // Boxed, or the connection would hold room for a request while it serves none.
        Box::pin(async move { Ok::<_, Infallible>(respond(&worker, &side, request).await) })
    });
    idle::serve(of_connection, stream, head, service, ending).map(move |()| {
        let (worker, head) = of_end;
        if let Some(reason) = head.refused() {
            worker.counters.refuse(reason);
        }
    })
}

fn http2<S>(worker: Rc<Worker>, stream: S, side: Rc<Side>) -> impl Future<Output = ()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let ending = ending(worker.clone(), side.clone(), Protocol::Http2);
    let peer = match *side {
        Side::Mesh(..) => Peer::Sidecar,
        Side::Gateway(_) => Peer::Stranger,
        _ => Peer::App,
    };
    let service = service_fn(move |request| {
        let (worker, side) = (worker.clone(), side.clone());
        async move { Ok::<_, Infallible>(respond(&worker, &side, request).await) }
    });
    let connection = multiplex::server(peer).serve_connection(TokioIo::new(stream), service);
    until_end(connection, ending, |c| c.graceful_shutdown())
}

/// Serves until the connection ends by itself or, after `ending`, with the requests that are on it.
async fn until_end<C: Future>(connection: C, ending: impl Future<Output = ()>, close: impl FnOnce(Pin<&mut C>)) {
    let mut connection = pin!(connection);
    tokio::select! {
        biased;
        // How it ended was seen by the requests on it.
        _ = connection.as_mut() => return,
        () = ending => close(connection.as_mut()),
    }
    let _ = connection.await;
}

/// Comes when a connection is to take no more requests; never for the app's own connections, which the app ends.
async fn ending(worker: Rc<Worker>, side: Rc<Side>, protocol: Protocol) {
    if !side.of_others() {
        return std::future::pending().await;
    }
    let mut phase = worker.phase.clone();
    let last = match protocol {
        // GOAWAY says which requests are still served, so it can be sent at once. Not to those who connect after it:
        // they do not know yet that this endpoint is withdrawn, and would only come again.
        Protocol::Http2 if !worker.draining() => Phase::Closing,
        _ => Phase::ClosingIdle,
    };
    // A closed channel means that the process ends, too.
    let drained = async { drop(phase.wait_for(|p| *p >= last).await) };
    match &*side {
        Side::Mesh(_, tls) => {
            tokio::select! {
                () = drained => {}
                // The peer connects again and sees the new one.
                () = worker.replaced(tls) => {}
            }
        }
        Side::Gateway(door) => {
            tokio::select! {
                () = drained => {}
                () = door.idle(worker.limits.idle) => {}
            }
        }
        _ => drained.await,
    }
}

/// Runs what a connection spawns on the worker's own thread.
#[derive(Clone, Copy, Debug)]
pub struct LocalExecutor;

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, task: F) {
        tokio::task::spawn_local(task);
    }
}

async fn respond(worker: &Rc<Worker>, side: &Side, mut request: Request<Incoming>) -> Response<Answer> {
    let http1 = request.version() < Version::HTTP_2;
    if let Side::Mesh(..) = side {
        restore_version(&mut request);
    }
    let checked = check::request(&request);
    let malformed = checked.is_err();
    let routed = checked.and_then(|()| match side {
        Side::Outbound { destination, target } => choose_http(worker, *destination, target, &request),
        Side::Gateway(door) => door.route(worker, &mut request),
        Side::Inbound(entry) | Side::Mesh(entry, _) => entry.admit(worker, &request),
        Side::Refuse(reason) => Err(*reason),
    });
    let mut response = match routed {
        Ok(routed) => match routed.asks.as_ref().and_then(|a| a.request_timeout) {
            None => forward(worker, routed, request, side, None).await,
            Some(time) => Box::pin(forward_within(worker, routed, request, side, time)).await,
        },
        Err(reason) => refuse_unrouted(worker, side, &request, reason),
    };
    if http1 && (malformed || side.of_others() && worker.draining()) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// [`forward`] with an end to the whole exchange, its last byte included.
async fn forward_within(
    worker: &Rc<Worker>,
    routed: Routed,
    request: Request<Incoming>,
    side: &Side,
    time: Duration,
) -> Response<Answer> {
    let deadline = tokio::time::Instant::now() + time;
    match tokio::time::timeout_at(deadline, forward(worker, routed, request, side, Some(deadline))).await {
        Ok(response) => response.map(|body| body.until(deadline)),
        Err(_) => refuse(worker, Reason::RouteTimeout),
    }
}

/// An answer of our own making: it says so, and why.
pub fn refuse(worker: &Worker, reason: Reason) -> Response<Answer> {
    worker.counters.refuse(reason);
    let mut response = Response::new(Answer::text(format!("sluice: {}\n", reason.label())));
    *response.status_mut() = reason.status();
    response.headers_mut().insert(reason::HEADER, HeaderValue::from_static(reason.label()));
    response
}

/// [`refuse`] before it was known where the request goes.
fn refuse_unrouted(worker: &Rc<Worker>, side: &Side, request: &Request<Incoming>, reason: Reason) -> Response<Answer> {
    let response = refuse(worker, reason);
    if worker.observer.wanted() {
        let key = side.key(worker);
        let exchange = Exchange::begin(request, &key, host(request), side.caller(), worker.observer.shows_headers());
        let (status, reason) = (Some(response.status().as_u16()), Some(reason.label()));
        worker.observer.note(Exchange { status, reason, client: side.client(), ..exchange });
    }
    response
}

/// Notes the request for those who want to see it, and gives it its place in its trace.
fn watch(worker: &Worker, side: &Side, routed: &Routed, request: &mut Request<Incoming>, in_flight: &mut InFlight) {
    let observer = &worker.observer;
    let key = &routed.choice.key;
    let mut exchange = Exchange::begin(request, key, host(request), side.caller(), observer.shows_headers());
    exchange.client = side.client();
    let threshold = observer.tracing();
    if threshold > 0 {
        let fresh = [worker.random(), worker.random(), worker.random()];
        let context = Context::of(request.headers(), fresh, worker.random(), threshold);
        context.propagate(request.headers_mut());
        exchange.trace = Some(context);
    }
    in_flight.watch(exchange, observer);
}

/// Sends the request to an endpoint of the chosen backend and passes the answer on. At the deadline it is given up.
async fn forward(
    worker: &Rc<Worker>,
    routed: Routed,
    mut request: Request<Incoming>,
    side: &Side,
    deadline: Option<tokio::time::Instant>,
) -> Response<Answer> {
    let (inbound, port) = (side.inbound(), side.port());
    let cluster = &routed.choice.cluster;
    let mut in_flight = Box::new(InFlight::new(routed.choice.series.clone(), Instant::now(), deadline));
    if worker.observer.wanted() {
        watch(worker, side, &routed, &mut request, &mut in_flight);
    }
    if let Side::Gateway(_) = side {
        convert_version(&mut request, cluster.http2);
    }
    let needs = prepare_request(&mut request);
    // Only tunnels take their end of the connection over; the others need no handle for it.
    let client = (needs == Needs::Tunnel).then(|| hyper::upgrade::on(&mut request));
    match cluster.admit(worker) {
        Ok(place) => in_flight.admitted(place),
        Err(reason) => return answer_instead(in_flight, refuse(worker, reason)),
    }
    let (source, scheme) = side.source(worker);
    let key = cluster.hash_key().and_then(|k| cluster::key(k, request.headers(), source));
    let prepared = match &routed.asks {
        None => pace(worker, request, None),
        Some(asks) => match Box::pin(apply::prepare(worker, &routed, asks, request, (&scheme, port))).await {
            Ok(prepared) => prepared,
            Err(response) => return answer_instead(in_flight, *response),
        },
    };
    let (request, fate) = prepared;
    match send(worker, &routed, key, (request, &fate), needs, &mut in_flight, inbound).await {
        Err(reason) => answer_instead(in_flight, refuse(worker, reason)),
        Ok((mut response, sender)) => {
            routed.change_response(response.headers_mut());
            if let Some(client) = client.filter(|_| switches(&response)) {
                return tunnel_through(worker, client, response, in_flight, side.outbound());
            }
            pass_on(response, sender, in_flight)
        }
    }
}

/// The request ends with an answer that no backend made.
#[expect(clippy::boxed_local, reason = "it is in a box where it comes from")]
fn answer_instead(mut in_flight: Box<InFlight>, response: Response<Answer>) -> Response<Answer> {
    let said = response.headers().get(reason::HEADER).and_then(|v| v.to_str().ok());
    if let Some(reason) = said.and_then(|said| Reason::ALL.iter().find(|r| r.label() == said)) {
        in_flight.said(reason.label());
    }
    in_flight.answered(response.status().as_u16(), None);
    response
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
    outbound: bool,
) -> Response<Answer> {
    in_flight.answered(response.status().as_u16(), None);
    in_flight.lasts();
    let server = hyper::upgrade::on(&mut response);
    // The library is done with the client's connection when it hands it over, and it counts no more.
    let open = Open::new(worker.clone(), outbound);
    let worker = worker.clone();
    tokio::task::spawn_local(async move {
        let (_in_flight, _open) = (in_flight, open);
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
    if response.version() < Version::HTTP_2 {
        remove_hop_by_hop(response.headers_mut());
    }
    // The client's connection has its own; to HTTP/1 this says that all of 1.1 may be used.
    *response.version_mut() = Version::HTTP_11;
    in_flight.answered(response.status().as_u16(), Some(sender));
    response.map(|body| {
        if body.is_end_stream() {
            in_flight.end();
            return Answer::Upstream(body, None, None);
        }
        Answer::Upstream(body, Some(in_flight), None)
    })
}
