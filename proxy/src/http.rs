//! HTTP in both directions: requests of one connection, each to the backend that is chosen for it, and answers back in
//! the version they were asked in (1.1, or 2 with prior knowledge). Upgrades and CONNECT become pipes.

use crate::{
    attempt::send,
    body::Answer,
    drain::Phase,
    headers::{prepare_request, remove_hop_by_hop},
    live::Choice,
    outbound::choose_http,
    reason::{self, Reason},
    tcp,
    upstream::{InFlight, Sender},
    worker::Worker,
};
use http::{HeaderValue, Request, Response, StatusCode, Version, header};
use hyper::{
    body::{Body, Incoming},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use std::{cell::Cell, convert::Infallible, net::SocketAddr, rc::Rc, time::Instant};
use tokio::io::{AsyncRead, AsyncWrite};

/// Most requests of one HTTP/2 connection at a time.
const MAX_STREAMS: u32 = 1024;

/// Where the requests of a connection go.
pub enum Side {
    /// To backends of what was dialled; `target` is that service port's place in the config of a generation.
    Outbound { destination: SocketAddr, target: Cell<(u64, usize)> },
    /// To the app.
    Inbound(Choice),
    /// Nowhere: every request is answered with this.
    Refuse(Reason),
}

/// Serves the requests of one HTTP/1.1 connection until it ends.
pub async fn serve1<S>(worker: &Rc<Worker>, stream: S, side: Side)
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

/// Serves the requests of one HTTP/2 connection until it ends.
pub async fn serve2<S>(worker: &Rc<Worker>, stream: S, side: Side)
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let inbound = matches!(side, Side::Inbound(_));
    let side = Rc::new(side);
    let service = service_fn(|request| {
        let (worker, side) = (worker.clone(), side.clone());
        async move { Ok::<_, Infallible>(respond(&worker, &side, request).await) }
    });
    let mut builder = http2::Builder::new(LocalExecutor);
    builder.auto_date_header(false).max_concurrent_streams(MAX_STREAMS);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    if inbound {
        let mut phase = worker.phase.clone();
        tokio::select! {
            biased;
            _ = connection.as_mut() => return,
            // GOAWAY says which requests are still served, so it can be sent at once.
            _ = phase.wait_for(|p| *p >= Phase::Closing) => connection.as_mut().graceful_shutdown(),
        }
    }
    let _ = connection.await;
}

/// Runs what a connection spawns on the worker's own thread.
#[derive(Clone, Copy, Debug)]
pub struct LocalExecutor;

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, task: F) {
        tokio::task::spawn_local(task);
    }
}

async fn respond(worker: &Rc<Worker>, side: &Side, request: Request<Incoming>) -> Response<Answer> {
    let choice = match side {
        Side::Outbound { destination, target } => choose_http(worker, *destination, target, &request),
        Side::Inbound(choice) => Ok(choice.clone()),
        Side::Refuse(reason) => Err(*reason),
    };
    let inbound = matches!(side, Side::Inbound(_));
    let http1 = request.version() < Version::HTTP_2;
    let mut response = match choice {
        Ok(choice) => forward(worker, choice, request, inbound).await,
        Err(reason) => refuse(worker, reason),
    };
    if inbound && http1 && worker.draining() {
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
    if response.version() < Version::HTTP_2 {
        *response.version_mut() = Version::HTTP_11;
        remove_hop_by_hop(response.headers_mut());
    }
    in_flight.answered(response.status().as_u16(), Some(sender));
    response.map(|body| {
        if body.is_end_stream() {
            in_flight.end();
            return Answer::Upstream(body, None);
        }
        Answer::Upstream(body, Some(in_flight))
    })
}
