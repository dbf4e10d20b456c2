//! Connections to one endpoint: the idle ones kept for reuse, how many requests are in flight, and dialling new ones.
//! Everything here belongs to one worker; nothing is locked.

use crate::{
    body::Outgoing,
    config::Endpoint,
    http::LocalExecutor,
    io::Wire,
    metrics::{Series, add},
    reason::Reason,
    worker::Worker,
};
use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
};
use hyper_util::rt::TokioIo;
use std::{
    cell::{Cell, RefCell},
    io,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};
use tokio::net::TcpStream;

/// A connection that takes requests.
#[derive(Debug)]
pub enum Sender {
    /// One at a time; goes back to the pool when its answer has ended.
    Http1(http1::SendRequest<Outgoing>),
    /// Any number; a handle of the endpoint's one connection.
    Http2(http2::SendRequest<Outgoing>),
}

impl Sender {
    /// Sends a request; one that certainly did not leave comes back with the error.
    pub async fn try_send(
        &mut self,
        request: Request<Outgoing>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Outgoing>>> {
        match self {
            Self::Http1(s) => s.try_send_request(request).await,
            Self::Http2(s) => s.try_send_request(request).await,
        }
    }
}

/// Most idle connections kept per endpoint and worker; more are closed when their request ends.
const MAX_IDLE: usize = 256;
/// Idle connections older than this are closed.
const IDLE_FOR: Duration = Duration::from_secs(60);
/// A request that must not be sent twice takes only connections used this recently: the longer one is idle, the
/// likelier the server is about to close it.
const FRESH_FOR: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a connection may take to be ready for the next request after an answer's end.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);

/// One endpoint, as one worker sees it.
#[derive(Debug)]
pub struct Upstream {
    pub endpoint: Endpoint,
    pub in_flight: Cell<u32>,
    /// Most recently used last: few connections carry a light load.
    idle: RefCell<Vec<Idle>>,
    /// The connection for all HTTP/2 requests.
    http2: RefCell<Option<http2::SendRequest<Outgoing>>>,
}

#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<Outgoing>,
    since: Instant,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("connect to {address}: {source}")]
    Tcp { address: SocketAddr, source: io::Error },
    #[error("connect to {address}: no certificate yet, and the endpoint takes mTLS only")]
    NoCertificate { address: SocketAddr },
    #[error("TLS with {address}: {source}")]
    Tls { address: SocketAddr, source: io::Error },
}

impl ConnectError {
    pub fn reason(&self) -> Reason {
        match self {
            Self::Tcp { .. } => Reason::ConnectFailed,
            Self::NoCertificate { .. } => Reason::NoCertificate,
            Self::Tls { .. } => Reason::IdentityNotProven,
        }
    }
}

impl Upstream {
    pub fn new(endpoint: Endpoint) -> Rc<Self> {
        Rc::new(Self { endpoint, in_flight: Cell::new(0), idle: RefCell::default(), http2: RefCell::default() })
    }

    /// An idle connection that can take a request now.
    pub fn take_idle(&self, repeatable: bool, now: Instant) -> Option<http1::SendRequest<Outgoing>> {
        let mut idle = self.idle.borrow_mut();
        while let Some(last) = idle.pop() {
            if !last.sender.is_ready() {
                continue;
            }
            if !repeatable && now - last.since > FRESH_FOR {
                // The others are older still; they wait for requests that can be repeated.
                idle.push(last);
                return None;
            }
            return Some(last.sender);
        }
        None
    }

    /// Keeps a connection whose answer has ended.
    fn put_idle(self: &Rc<Self>, sender: http1::SendRequest<Outgoing>, now: Instant) {
        if sender.is_closed() {
            return;
        }
        if sender.is_ready() {
            let mut idle = self.idle.borrow_mut();
            if idle.len() < MAX_IDLE {
                idle.push(Idle { sender, since: now });
            }
            return;
        }
        // Its request's body is still being sent, or the connection's task has not run yet.
        let upstream = self.clone();
        tokio::task::spawn_local(async move {
            let mut sender = sender;
            let ready = tokio::time::timeout(SETTLE_TIMEOUT, sender.ready()).await;
            if matches!(ready, Ok(Ok(()))) && upstream.idle.borrow().len() < MAX_IDLE {
                upstream.idle.borrow_mut().push(Idle { sender, since: Instant::now() });
            }
        });
    }

    /// Closes connections that were idle for too long or that the other side has closed.
    pub fn reap(&self, now: Instant) {
        self.idle.borrow_mut().retain(|i| !i.sender.is_closed() && now - i.since < IDLE_FOR);
    }

    pub fn idle_len(&self) -> usize {
        self.idle.borrow().len()
    }

    /// A new connection for bytes.
    pub async fn connect(&self, worker: &Worker) -> Result<Wire, ConnectError> {
        let address = self.endpoint.address;
        add(&worker.counters.upstream_connects, 1);
        let stream = connect_tcp(address).await.map_err(|source| ConnectError::Tcp { address, source })?;
        let Some(identity) = &self.endpoint.identity else { return Ok(Wire::Plain(stream)) };
        let Some(connector) = worker.tls_connector(identity) else {
            return Err(ConnectError::NoCertificate { address });
        };
        let name = rustls::pki_types::ServerName::from(address.ip());
        let handshake = tokio::time::timeout(CONNECT_TIMEOUT, connector.connect(name, stream)).await;
        let stream = handshake.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        stream.map(|s| Wire::Tls(Box::new(s))).map_err(|source| ConnectError::Tls { address, source })
    }

    /// A new connection for HTTP/1.1 requests.
    pub async fn connect_http1(&self, worker: &Worker) -> Result<http1::SendRequest<Outgoing>, ConnectError> {
        let wire = self.connect(worker).await?;
        let address = self.endpoint.address;
        let broken = |e| ConnectError::Tcp { address, source: io::Error::other(e) };
        let handshake = http1::Builder::new().handshake(TokioIo::new(wire)).await;
        let (sender, connection) = handshake.map_err(broken)?;
        tokio::task::spawn_local(async move {
            // The request on it learns how it ended.
            let _ = connection.with_upgrades().await;
        });
        Ok(sender)
    }
}

impl Upstream {
    /// The endpoint's HTTP/2 connection, and whether it was there before. `fresh` asks for a new one.
    pub async fn http2(&self, worker: &Worker, fresh: bool) -> Result<(Sender, bool), ConnectError> {
        let there = self.http2.borrow().as_ref().filter(|s| !fresh && s.is_ready()).cloned();
        if let Some(sender) = there {
            return Ok((Sender::Http2(sender), true));
        }
        let wire = self.connect(worker).await?;
        let address = self.endpoint.address;
        let broken = |e| ConnectError::Tcp { address, source: io::Error::other(e) };
        let handshake = http2::Builder::new(LocalExecutor).handshake(TokioIo::new(wire)).await;
        let (sender, connection) = handshake.map_err(broken)?;
        tokio::task::spawn_local(async move {
            // The requests on it learn how it ended.
            let _ = connection.await;
        });
        // Of several that connected at once, the last is kept; the others end with their requests.
        *self.http2.borrow_mut() = Some(sender.clone());
        Ok((Sender::Http2(sender), false))
    }
}

/// A connection that gives up after a second.
pub async fn connect_tcp(address: SocketAddr) -> io::Result<TcpStream> {
    let connecting = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address));
    let stream = connecting.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A request between its start and the end of its answer. Dropped before the end, it counts as unanswered.
#[derive(Debug)]
pub struct InFlight {
    series: Rc<Series>,
    upstream: Option<Rc<Upstream>>,
    started: Instant,
    status: Option<u16>,
    sender: Option<Sender>,
}

impl InFlight {
    pub fn new(series: Rc<Series>, started: Instant) -> Self {
        add(&series.requests, 1);
        add(&series.in_flight, 1);
        Self { series, upstream: None, started, status: None, sender: None }
    }

    /// The endpoint that has the request now; it leaves the one before.
    pub fn at(&mut self, upstream: &Rc<Upstream>) {
        self.leave();
        upstream.in_flight.set(upstream.in_flight.get() + 1);
        self.upstream = Some(upstream.clone());
    }

    /// The head of the answer came over this connection.
    pub fn answered(&mut self, status: u16, sender: Option<Sender>) {
        self.status = Some(status);
        self.sender = sender;
    }

    /// The answer is complete; its connection may be used again.
    pub fn end(mut self) {
        if let (Some(upstream), Some(Sender::Http1(sender))) = (&self.upstream, self.sender.take()) {
            upstream.put_idle(sender, Instant::now());
        }
    }

    fn leave(&mut self) {
        if let Some(upstream) = self.upstream.take() {
            upstream.in_flight.set(upstream.in_flight.get() - 1);
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.leave();
        self.series.in_flight.set(self.series.in_flight.get() - 1);
        self.series.answered(self.status, self.started.elapsed());
    }
}
