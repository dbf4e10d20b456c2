//! Connections to one endpoint: the idle ones kept for reuse, how many requests are in flight, and dialling new ones.
//! Everything here belongs to one worker; nothing is locked.

use crate::{
    body::Outgoing,
    cluster::Held,
    config::Endpoint,
    connections::{Connections, Counted},
    headers::mark_version,
    io::Wire,
    limits::MAX_HEAD,
    metrics::{Series, add},
    multiplex::{self, Connecting, Multiplex, Place},
    observe::{Exchange, Observer},
    reason::Reason,
    tls::{Offer, now_s},
    worker::Worker,
};
use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1},
};
use hyper_util::rt::TokioIo;
use sluice_model::BackendPolicy;
use sluice_traffic::{balance::Latency, outlier::Record};
use std::{
    cell::{Cell, RefCell},
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::net::TcpStream;

/// A connection that takes requests.
#[derive(Debug)]
pub enum Sender {
    /// One at a time; goes back to the pool when its answer has ended.
    Http1(http1::SendRequest<Outgoing>),
    /// Among others on one connection: to an app that speaks HTTP/2.
    Http2(Place),
    /// Among others on one connection, in whatever version it came: to a sidecar, by `sluice-h2`.
    Mesh(Place),
}

impl Sender {
    /// Sends a request; one that certainly did not leave comes back with the error.
    pub async fn try_send(
        &mut self,
        request: Request<Outgoing>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Outgoing>>> {
        match self {
            Self::Http1(s) => s.try_send_request(request).await,
            Self::Http2(place) => place.try_send(request).await,
            Self::Mesh(place) => place.try_send(mark_version(request)).await,
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
/// For how long a sidecar that chose `sluice-tcp` is not offered `sluice-h2` again.
const TCP_ONLY_FOR: Duration = Duration::from_secs(60);
/// New shared connections a request waits for, when those before were full or gone at once.
const MAX_CONNECTS: usize = 9;

/// One endpoint, as one worker sees it.
#[derive(Debug)]
pub struct Upstream {
    pub endpoint: Endpoint,
    pub in_flight: Cell<u32>,
    /// How it does, where a policy asks; in the worker's time.
    pub record: RefCell<Record>,
    pub latency: Cell<Latency>,
    tuning: Cell<Tuning>,
    connections: Arc<Connections>,
    /// Most recently used last: few connections carry a light load.
    idle: RefCell<Vec<Idle>>,
    /// For HTTP/2 requests to an app, or to a sidecar that does not speak `sluice-h2`.
    http2: Multiplex,
    /// For all requests to a sidecar that speaks `sluice-h2`.
    mesh: Multiplex,
    /// When the endpoint's sidecar chose `sluice-tcp` although offered `sluice-h2`: an older one, or an opaque port.
    tcp_only_since: Cell<Option<Instant>>,
}

#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<Outgoing>,
    since: Instant,
}

/// What one worker has of an endpoint at a moment.
#[derive(Clone, Debug)]
pub struct Pool {
    pub endpoint: Endpoint,
    pub in_flight: u32,
    pub connections: u32,
    pub idle: usize,
    /// 0: it is not.
    pub ejected_for_ms: u64,
}

/// What a policy asks of connections.
#[derive(Clone, Copy, Debug)]
struct Tuning {
    connect: Duration,
    idle: Duration,
    keepalive: Option<Duration>,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { connect: CONNECT_TIMEOUT, idle: IDLE_FOR, keepalive: None }
    }
}

/// Why there is no connection. Several requests may have waited for it, so it can be copied.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("connect to {address}: {source}")]
    Tcp { address: SocketAddr, source: Arc<io::Error> },
    #[error("connect to {address}: no certificate yet, and the endpoint takes mTLS only")]
    NoCertificate { address: SocketAddr },
    #[error("TLS with {address}: {source}")]
    Tls { address: SocketAddr, source: Arc<io::Error> },
    #[error("connect to {address}: too many requests at a time for the connections one endpoint may have")]
    Full { address: SocketAddr },
}

impl ConnectError {
    pub fn tcp(address: SocketAddr, source: io::Error) -> Self {
        Self::Tcp { address, source: source.into() }
    }

    pub fn reason(&self) -> Reason {
        match self {
            Self::Tcp { .. } => Reason::ConnectFailed,
            Self::NoCertificate { .. } => Reason::NoCertificate,
            Self::Tls { .. } => Reason::IdentityNotProven,
            Self::Full { .. } => Reason::Overload,
        }
    }
}

impl Upstream {
    pub fn new(endpoint: Endpoint) -> Rc<Self> {
        let connections = Arc::<Connections>::default();
        Rc::new(Self {
            endpoint,
            in_flight: Cell::new(0),
            record: RefCell::default(),
            latency: Cell::default(),
            tuning: Cell::default(),
            idle: RefCell::default(),
            http2: Multiplex::new(&connections),
            mesh: Multiplex::new(&connections),
            connections,
            tcp_only_since: Cell::default(),
        })
    }

    /// No policy asks anything of connections.
    pub fn untune(&self) {
        self.tuning.take();
    }

    /// Takes over what the policy asks of connections.
    pub fn tune(&self, of: &BackendPolicy) {
        let or = |ms: u32, default| if ms == 0 { default } else { Duration::from_millis(ms.into()) };
        self.tuning.set(Tuning {
            connect: or(of.connect_timeout_ms, CONNECT_TIMEOUT),
            idle: or(of.idle_timeout_ms, IDLE_FOR),
            keepalive: (of.keepalive_s > 0).then(|| Duration::from_secs(of.keepalive_s.into())),
        });
    }

    /// As the admin server shows it.
    pub fn pool(&self, now_ms: u64) -> Pool {
        Pool {
            endpoint: self.endpoint.clone(),
            in_flight: self.in_flight.get(),
            connections: self.connections.open(),
            idle: self.idle_len(),
            ejected_for_ms: self.record.borrow().out_until_ms().saturating_sub(now_ms),
        }
    }

    pub fn connections(&self) -> &Connections {
        &self.connections
    }

    /// How long a connection to it may take to come.
    pub fn connect_timeout(&self) -> Duration {
        self.tuning.get().connect
    }

    /// An idle connection that can take a request now.
    pub fn take_idle(&self, repeatable: bool, now: Instant) -> Option<http1::SendRequest<Outgoing>> {
        let mut idle = self.idle.borrow_mut();
        let most = self.tuning.get().idle;
        while let Some(last) = idle.pop() {
            if !last.sender.is_ready() || now - last.since >= most {
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

    /// Closes the idle connection that was used least recently; false: there is none.
    pub fn close_idle(&self) -> bool {
        let mut idle = self.idle.borrow_mut();
        let found = !idle.is_empty();
        idle.drain(..usize::from(found));
        found
    }

    /// Keeps a connection whose answer has ended.
    fn put_idle(self: &Rc<Self>, sender: http1::SendRequest<Outgoing>, now: Instant) {
        if sender.is_closed() {
            return;
        }
        if sender.is_ready() {
            return self.keep_idle(sender, now);
        }
        // Its request's body is still being sent, or the connection's task has not run yet.
        let upstream = self.clone();
        tokio::task::spawn_local(async move {
            let mut sender = sender;
            let ready = tokio::time::timeout(SETTLE_TIMEOUT, sender.ready()).await;
            if matches!(ready, Ok(Ok(()))) {
                upstream.keep_idle(sender, Instant::now());
            }
        });
    }

    fn keep_idle(&self, sender: http1::SendRequest<Outgoing>, since: Instant) {
        let mut idle = self.idle.borrow_mut();
        if idle.len() < MAX_IDLE {
            idle.push(Idle { sender, since });
            self.connections.made_room();
        }
    }

    /// Closes connections that were idle for too long or that the other side has closed.
    pub fn reap(&self, now: Instant) {
        let most = self.tuning.get().idle;
        self.idle.borrow_mut().retain(|i| !i.sender.is_closed() && now - i.since < most);
        self.http2.reap(now, most);
        self.mesh.reap(now, most);
    }

    /// The certificate was replaced: the next request to a sidecar begins a connection with the new one. Requests
    /// under way end on the old one.
    pub fn renew(&self) {
        if self.endpoint.identity.is_some() {
            self.http2.retire_all();
            self.mesh.retire_all();
        }
    }

    pub fn idle_len(&self) -> usize {
        self.idle.borrow().len()
    }

    /// A new connection for bytes.
    pub async fn connect(&self, worker: &Worker) -> Result<Wire, ConnectError> {
        self.connect_offering(worker, Offer::Tcp).await
    }

    async fn connect_offering(&self, worker: &Worker, offer: Offer) -> Result<Wire, ConnectError> {
        let address = self.endpoint.address;
        add(&worker.counters.upstream_connects, 1);
        let tuning = self.tuning.get();
        let open = Counted::new(&self.connections);
        let stream = connect_within(address, tuning.connect).await.map_err(|e| ConnectError::tcp(address, e))?;
        if let Some(every) = tuning.keepalive {
            let probes = socket2::TcpKeepalive::new().with_time(every).with_interval(every);
            // Without it the connection works as well.
            let _ = socket2::SockRef::from(&stream).set_tcp_keepalive(&probes);
        }
        let Some(identity) = &self.endpoint.identity else { return Ok(Wire::plain(stream, open)) };
        let (Some(tls), Some(connector)) = (worker.tls(), worker.tls_connector(identity, offer)) else {
            return Err(ConnectError::NoCertificate { address });
        };
        let name = rustls::pki_types::ServerName::from(address.ip());
        let handshake = tokio::time::timeout(tuning.connect, connector.connect(name, stream)).await;
        let stream = handshake.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let stream = stream.and_then(|s| match tls.is_outlived_by(s.get_ref().1, now_s()) {
            true => Err(io::Error::other("a certificate of the session that goes on has ended")),
            false => Ok(s),
        });
        stream.map(|s| Wire::tls(s, open)).map_err(|e| ConnectError::Tls { address, source: e.into() })
    }

    /// A new connection for HTTP/1.1 requests.
    pub async fn connect_http1(&self, worker: &Worker) -> Result<http1::SendRequest<Outgoing>, ConnectError> {
        self.http1_on(self.connect(worker).await?).await
    }

    async fn http1_on(&self, wire: Wire) -> Result<http1::SendRequest<Outgoing>, ConnectError> {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(MAX_HEAD).max_header_size(MAX_HEAD);
        let handshake = builder.handshake(TokioIo::new(wire)).await;
        let (sender, connection) = handshake.map_err(|e| self.broken(e))?;
        tokio::task::spawn_local(async move {
            // The request on it learns how it ended.
            let _ = connection.with_upgrades().await;
        });
        Ok(sender)
    }

    fn broken(&self, error: hyper::Error) -> ConnectError {
        ConnectError::tcp(self.endpoint.address, io::Error::other(error))
    }
}

/// Shared connections.
impl Upstream {
    /// A place on a connection by `sluice-h2` that is open.
    pub fn mesh_at_hand(&self) -> Option<Sender> {
        self.mesh.take().map(Sender::Mesh)
    }

    /// A place on an HTTP/2 connection that is open.
    pub fn http2_at_hand(&self) -> Option<Sender> {
        self.http2.take().map(Sender::Http2)
    }

    /// The shared connections by which requests go that may be `shareable`, and are in HTTP/2 or not; `None`: each has its own.
    fn shared_by(&self, shareable: bool, http2: bool) -> Option<&Multiplex> {
        let mesh = shareable && self.endpoint.identity.is_some() && !self.tcp_only();
        if mesh { Some(&self.mesh) } else { http2.then_some(&self.http2) }
    }

    /// Whether there is no connection for such requests, a busy one included.
    pub fn has_none_for(&self, shareable: bool, http2: bool) -> bool {
        match self.shared_by(shareable, http2) {
            Some(shared) => shared.ready() == 0 && shared.opening().is_none(),
            None => self.connections.open() as usize <= self.mesh.ready() + self.http2.ready(),
        }
    }

    /// The attempt to open a connection that such requests share, while it is under way.
    pub fn opening(&self, shareable: bool, http2: bool) -> Option<Connecting> {
        self.shared_by(shareable, http2)?.opening()
    }

    /// A place for an HTTP/2 request, and whether the connection was there before.
    pub async fn http2(self: &Rc<Self>, worker: &Rc<Worker>) -> Result<(Sender, bool), ConnectError> {
        for connects in 0..MAX_CONNECTS {
            if let Some(place) = self.http2.take() {
                return Ok((Sender::Http2(place), connects == 0));
            }
            let connect = || self.clone().open_http2(worker.clone());
            self.http2.connect(self.endpoint.address, connect).await?;
        }
        Err(self.no_place(&self.http2))
    }

    /// A place for a request of any version on a connection by `sluice-h2`; `None` where the endpoint has no sidecar
    /// that speaks it.
    pub async fn mesh(self: &Rc<Self>, worker: &Rc<Worker>) -> Result<Option<(Sender, bool)>, ConnectError> {
        if self.endpoint.identity.is_none() {
            return Ok(None);
        }
        for connects in 0..MAX_CONNECTS {
            if let Some(place) = self.mesh.take() {
                return Ok(Some((Sender::Mesh(place), connects == 0)));
            }
            if self.tcp_only() {
                return Ok(None);
            }
            let connect = || self.clone().open_mesh(worker.clone());
            self.mesh.connect(self.endpoint.address, connect).await?;
        }
        Err(self.no_place(&self.mesh))
    }

    /// Why there is none on connections that were made for it.
    fn no_place(&self, made: &Multiplex) -> ConnectError {
        let address = self.endpoint.address;
        if made.full() {
            return ConnectError::Full { address };
        }
        let ended = |why: &str| io::Error::new(io::ErrorKind::ConnectionAborted, why);
        // In TLS 1.3 the server looks at the client's certificate when the client has done its part.
        match self.endpoint.identity {
            Some(_) => {
                ConnectError::Tls { address, source: ended("the other side does not take our certificate").into() }
            }
            None => ConnectError::tcp(address, ended("the other side ends connections at once")),
        }
    }

    /// Takes the connection of a failed request away from the next ones, which would fail as well.
    pub fn failed(&self, sender: &Sender, error: &hyper::Error) {
        match sender {
            Sender::Http1(_) => {}
            _ if multiplex::of_one_stream(error) => {}
            Sender::Http2(place) => self.http2.retire(place),
            Sender::Mesh(place) => self.mesh.retire(place),
        }
    }

    async fn open_http2(self: Rc<Self>, worker: Rc<Worker>) -> Result<(), ConnectError> {
        let era = self.http2.era();
        let wire = self.connect(&worker).await?;
        let sender = multiplex::handshake(wire, false).await.map_err(|e| self.broken(e))?;
        self.http2.keep(sender, era, Instant::now());
        Ok(())
    }

    /// What the endpoint's sidecar chose decides how requests go to it from now on.
    async fn open_mesh(self: Rc<Self>, worker: Rc<Worker>) -> Result<(), ConnectError> {
        let era = self.mesh.era();
        let wire = self.connect_offering(&worker, Offer::H2OrTcp).await?;
        if wire.is_multiplexed() {
            // HTTP/2's server speaks as soon as it may.
            let heard = tokio::time::timeout(self.tuning.get().connect, wire.heard()).await;
            let heard = heard.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            heard.map_err(|e| ConnectError::tcp(self.endpoint.address, e))?;
            let sender = multiplex::handshake(wire, true).await.map_err(|e| self.broken(e))?;
            self.mesh.keep(sender, era, Instant::now());
            return Ok(());
        }
        self.tcp_only_since.set(Some(Instant::now()));
        let mut sender = self.http1_on(wire).await?;
        sender.ready().await.map_err(|e| self.broken(e))?;
        self.put_idle(sender, Instant::now());
        Ok(())
    }

    fn tcp_only(&self) -> bool {
        self.tcp_only_since.get().is_some_and(|since| since.elapsed() < TCP_ONLY_FOR)
    }
}

/// A connection that gives up after a second.
pub async fn connect_tcp(address: SocketAddr) -> io::Result<TcpStream> {
    connect_within(address, CONNECT_TIMEOUT).await
}

async fn connect_within(address: SocketAddr, patience: Duration) -> io::Result<TcpStream> {
    let connecting = tokio::time::timeout(patience, TcpStream::connect(address));
    let stream = connecting.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Where a request counts as in flight: at an endpoint, until it goes to another one or is dropped.
#[derive(Debug, Default)]
pub struct Serving(Option<Rc<Upstream>>);

impl Serving {
    /// The endpoint that has the request now; it leaves the one before.
    pub fn at(&mut self, upstream: &Rc<Upstream>) {
        self.leave();
        upstream.in_flight.set(upstream.in_flight.get() + 1);
        self.0 = Some(upstream.clone());
    }

    fn leave(&mut self) {
        if let Some(upstream) = self.0.take() {
            upstream.in_flight.set(upstream.in_flight.get() - 1);
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.leave();
    }
}

/// A request between its start and the end of its answer. Dropped before the end, it counts as unanswered.
#[derive(Debug)]
pub struct InFlight {
    series: Rc<Series>,
    serving: Serving,
    /// Its place within the bounds of the backend's policy.
    admitted: Option<Held>,
    started: Instant,
    /// When it is given up.
    deadline: Option<tokio::time::Instant>,
    status: Option<u16>,
    sender: Option<Sender>,
    /// What is noted of it, where somebody wants to see requests.
    seen: Option<Box<Seen>>,
}

#[derive(Debug)]
struct Seen {
    exchange: Exchange,
    observer: Arc<Observer>,
}

impl InFlight {
    pub fn new(series: Rc<Series>, started: Instant, deadline: Option<tokio::time::Instant>) -> Self {
        add(&series.requests, 1);
        add(&series.in_flight, 1);
        let (serving, admitted, status, sender, seen) = (Serving::default(), None, None, None, None);
        Self { series, serving, admitted, started, deadline, status, sender, seen }
    }

    /// Somebody wants to see it: `exchange` is handed over when it has ended.
    pub fn watch(&mut self, exchange: Exchange, observer: &Arc<Observer>) {
        self.seen = Some(Box::new(Seen { exchange, observer: observer.clone() }));
    }

    /// The sidecar answered itself.
    pub fn said(&mut self, reason: &'static str) {
        if let Some(seen) = &mut self.seen {
            seen.exchange.reason = Some(reason);
        }
    }

    pub fn admitted(&mut self, place: Option<Held>) {
        self.admitted = place;
    }

    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The endpoint that has the request now; it leaves the one before.
    pub fn at(&mut self, upstream: &Rc<Upstream>) {
        self.serving.at(upstream);
        if let Some(seen) = &mut self.seen {
            seen.exchange.tries += 1;
            seen.exchange.endpoint = Some(upstream.endpoint.address);
            if seen.exchange.peer.is_none() {
                seen.exchange.peer = upstream.endpoint.identity.clone();
            }
        }
    }

    /// The head of the answer came over this connection.
    pub fn answered(&mut self, status: u16, sender: Option<Sender>) {
        self.status = Some(status);
        self.sender = sender;
    }

    /// No time is set for it any more.
    pub fn lasts(&mut self) {
        self.deadline = None;
    }

    /// It took longer than its route gives it.
    fn overdue(&self) -> bool {
        self.deadline.is_some_and(|d| d <= tokio::time::Instant::now())
    }

    /// The answer is complete; its connection may be used again.
    pub fn end(mut self) {
        self.lasts();
        if let (Some(upstream), Some(Sender::Http1(sender))) = (&self.serving.0, self.sender.take()) {
            upstream.put_idle(sender, Instant::now());
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.overdue() {
            self.said(Reason::RouteTimeout.label());
            self.status.get_or_insert(Reason::RouteTimeout.status().as_u16());
        }
        self.series.in_flight.set(self.series.in_flight.get() - 1);
        let took = self.started.elapsed();
        self.series.answered(self.status, took);
        if let Some(seen) = self.seen.take() {
            seen.observer.note(Exchange { status: self.status, took, ..seen.exchange });
        }
    }
}
