//! HTTP/2 connections that the requests of one endpoint share: found, made once for all who wait for one, retired
//! without harm to the requests on them. How much a connection may carry is written here, for both of its ends.
//!
//! One connection is the rule. Only when it is full is there another, up to [`MAX_CONNECTIONS`].

use crate::{body::Outgoing, connections::Connections, http::LocalExecutor, io::Wire, limits, upstream::ConnectError};
use futures::{
    FutureExt,
    future::{LocalBoxFuture, Shared},
};
use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http2 as client},
    server::conn::http2 as server,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    cell::{Cell, RefCell},
    error::Error,
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

/// Requests that a server takes at a time on one connection; more are refused unprocessed. Part of what `sluice-h2`
/// means: a client need not wait for the SETTINGS to know it.
const MAX_STREAMS: u32 = 1024;
/// Requests that a client puts on one connection at a time. The rest of [`MAX_STREAMS`] is for streams that are over
/// here and not yet there (an answer that came before the end of its request), so that none has to wait to be opened.
const MAX_REQUESTS: usize = 512;
/// Connections to one endpoint that take new requests; beyond that many times [`MAX_REQUESTS`], requests are refused
/// as overload.
const MAX_CONNECTIONS: usize = 8;
/// What one message may have under way: 10 Gbit/s at a round trip of 0.4 ms, more than a zone's usual.
const STREAM_WINDOW: u32 = 512 * 1024;
/// What all of them may have under way, and so the most that one connection holds of bodies that nobody reads: 64
/// readers that stand still before they hold up the others.
const CONNECTION_WINDOW: u32 = 64 * STREAM_WINDOW;
/// Most bytes of one message waiting to be written.
const SEND_BUFFER: usize = 256 * 1024;
/// Longest head, counted as RFC 9113 §6.5.2 does. Longer ones are answered with 431.
const MAX_HEAD: u32 = limits::MAX_HEAD as u32;
/// A connection that carries requests and has said nothing for this long is asked whether it lives.
const PING_AFTER: Duration = Duration::from_secs(10);
/// One that does not answer in this time is dead: its requests fail and the next ones get another.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// Who is at the other end of a connection that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    App,
    Sidecar,
    /// A gateway's client.
    Stranger,
}

/// What a stranger gets, with the bounds above: a hundred requests at a time (RFC 9113 §6.5.2 recommends no fewer), and at most
/// 1 MiB of what he sends and 6.4 MiB of what he does not read, where a sidecar has 32 and 256.
const STRANGERS_STREAMS: u32 = 100;
const STRANGERS_STREAM_WINDOW: u32 = 64 * 1024;
const STRANGERS_CONNECTION_WINDOW: u32 = 1024 * 1024;
const STRANGERS_SEND_BUFFER: usize = 64 * 1024;

/// The server's end. It also asks a silent peer whether it lives; an app may not like that.
pub fn server(peer: Peer) -> server::Builder<LocalExecutor> {
    let (streams, stream_window, connection_window, send_buffer) = match peer {
        Peer::Stranger => {
            (STRANGERS_STREAMS, STRANGERS_STREAM_WINDOW, STRANGERS_CONNECTION_WINDOW, STRANGERS_SEND_BUFFER)
        }
        Peer::App | Peer::Sidecar => (MAX_STREAMS, STREAM_WINDOW, CONNECTION_WINDOW, SEND_BUFFER),
    };
    let mut builder = server::Builder::new(LocalExecutor);
    builder
        .auto_date_header(false)
        .max_concurrent_streams(streams)
        .initial_stream_window_size(stream_window)
        .initial_connection_window_size(connection_window)
        .max_send_buf_size(send_buffer)
        .max_header_list_size(MAX_HEAD);
    if peer != Peer::App {
        builder.timer(TokioTimer::new()).keep_alive_interval(PING_AFTER).keep_alive_timeout(PING_TIMEOUT);
    }
    builder
}

/// The client's end, as [`server`].
fn client(mesh: bool) -> client::Builder<LocalExecutor> {
    let mut builder = client::Builder::new(LocalExecutor);
    builder
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .max_header_list_size(MAX_HEAD);
    if mesh {
        builder.initial_max_send_streams(MAX_STREAMS as usize);
        builder.timer(TokioTimer::new()).keep_alive_interval(PING_AFTER).keep_alive_timeout(PING_TIMEOUT);
    }
    builder
}

/// A connection that takes requests, and how many at a time the other side takes now: more would wait on it for others'
/// ends, while another connection could have them.
pub struct Connected {
    sender: client::SendRequest<Outgoing>,
    limit: Rc<Cell<usize>>,
}

/// Starts HTTP/2 on a connection.
pub async fn handshake(wire: Wire, mesh: bool) -> hyper::Result<Connected> {
    let (sender, mut connection) = client(mesh).handshake(TokioIo::new(wire)).await?;
    let limit = Rc::new(Cell::new(connection.current_max_send_streams()));
    let told = limit.clone();
    tokio::task::spawn_local(poll_fn(move |cx| {
        // The requests on it learn how it ended.
        let ended = Pin::new(&mut connection).poll(cx).map(drop);
        if ended.is_pending() {
            told.set(connection.current_max_send_streams());
        }
        ended
    }));
    Ok(Connected { sender, limit })
}

/// Held once by a shared connection and once by each place on it, and so their count.
#[derive(Debug)]
struct Places {
    /// Where those who wait for room hear of it.
    connections: Arc<Connections>,
    /// While there is no place.
    idle_since: Cell<Instant>,
}

/// A request's place on a shared connection, taken until it is dropped.
#[derive(Debug)]
pub struct Place {
    sender: client::SendRequest<Outgoing>,
    places: Rc<Places>,
}

impl Drop for Place {
    fn drop(&mut self) {
        // The connection's, and this one.
        if Rc::strong_count(&self.places) == 2 {
            self.places.idle_since.set(Instant::now());
        }
        self.places.connections.made_room();
    }
}

impl Place {
    pub async fn try_send(
        &mut self,
        request: Request<Outgoing>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Outgoing>>> {
        self.sender.try_send_request(request).await
    }
}

/// The shared connections of one kind to one endpoint.
pub struct Multiplex {
    /// All that the endpoint has.
    connections: Arc<Connections>,
    open: RefCell<Vec<Open>>,
    connecting: RefCell<Option<Connecting>>,
    /// Counts [`Multiplex::retire_all`]: what began to connect before is not kept after.
    era: Cell<u64>,
}

struct Open {
    sender: client::SendRequest<Outgoing>,
    limit: Rc<Cell<usize>>,
    places: Rc<Places>,
}

/// Several may wait for it.
pub type Connecting = Shared<LocalBoxFuture<'static, Result<(), ConnectError>>>;

impl Multiplex {
    pub fn new(connections: &Arc<Connections>) -> Self {
        let (open, connecting, era) = (RefCell::default(), RefCell::default(), Cell::default());
        Self { connections: connections.clone(), open, connecting, era }
    }

    /// A place on a connection that is there.
    pub fn take(&self) -> Option<Place> {
        let open = self.open.borrow();
        let free = open.iter().find(|o| o.sender.is_ready() && o.has_room())?;
        Some(Place { sender: free.sender.clone(), places: free.places.clone() })
    }

    /// Connections that take requests, full ones included.
    pub fn ready(&self) -> usize {
        self.open.borrow().iter().filter(|o| o.sender.is_ready()).count()
    }

    /// Whether there is a connection that takes requests, and has as many as it may.
    pub fn full(&self) -> bool {
        self.open.borrow().iter().any(|o| o.sender.is_ready() && !o.has_room())
    }

    /// Waits for the one attempt to connect that is under way, or begins it with what `connect` makes: a future that
    /// calls [`Multiplex::keep`].
    pub async fn connect<F>(&self, address: SocketAddr, connect: impl FnOnce() -> F) -> Result<(), ConnectError>
    where
        F: Future<Output = Result<(), ConnectError>> + 'static,
    {
        self.open.borrow_mut().retain(|o| o.sender.is_ready());
        if self.open.borrow().len() >= MAX_CONNECTIONS {
            return Err(ConnectError::Full { address });
        }
        let connecting = self.opening().unwrap_or_else(|| {
            // On a task of its own: whoever began it may go, and the others still wait for it.
            let task = tokio::task::spawn_local(connect());
            let ended = task.map(move |r| r.unwrap_or_else(|e| Err(ConnectError::tcp(address, io::Error::other(e)))));
            let connecting = ended.boxed_local().shared();
            *self.connecting.borrow_mut() = Some(connecting.clone());
            connecting
        });
        connecting.await
    }

    /// The attempt to connect that is under way; ends with it. One whose every waiter has gone is looked at here: its outcome is
    /// not for those who come later.
    pub fn opening(&self) -> Option<Connecting> {
        self.connecting.borrow().as_ref().filter(|c| (*c).clone().now_or_never().is_none()).cloned()
    }

    /// Offers a new connection to requests, unless all were retired since `era`: then it is closed again.
    pub fn keep(&self, connected: Connected, era: u64, now: Instant) {
        if era == self.era.get() {
            let Connected { sender, limit } = connected;
            let places = Places { connections: self.connections.clone(), idle_since: Cell::new(now) };
            self.open.borrow_mut().push(Open { sender, limit, places: Rc::new(places) });
        }
    }

    pub fn era(&self) -> u64 {
        self.era.get()
    }

    /// No new requests on the connection of `place`; those on it go on.
    pub fn retire(&self, place: &Place) {
        self.open.borrow_mut().retain(|o| !Rc::ptr_eq(&o.places, &place.places));
    }

    /// No new requests on any connection that is there or about to be.
    pub fn retire_all(&self) {
        self.era.set(self.era.get() + 1);
        self.open.take();
    }

    /// Closes connections that nobody has used for `most`, or that the other side has closed.
    pub fn reap(&self, now: Instant, most: Duration) {
        let fresh = |o: &Open| o.requests() > 0 || now.saturating_duration_since(o.places.idle_since.get()) < most;
        self.open.borrow_mut().retain(|o| !o.sender.is_closed() && fresh(o));
    }
}

impl Open {
    fn has_room(&self) -> bool {
        self.requests() < self.limit.get().min(MAX_REQUESTS)
    }

    fn requests(&self) -> usize {
        Rc::strong_count(&self.places) - 1
    }
}

impl std::fmt::Debug for Multiplex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Multiplex").field("open", &self.open.borrow().len()).finish_non_exhaustive()
    }
}

/// The other side says that it has not begun with the request (RFC 9113 §8.7): whatever it was, it may be sent again.
pub fn unprocessed(error: &hyper::Error) -> bool {
    let refused = |e: &h2::Error| e.reason() == Some(h2::Reason::REFUSED_STREAM);
    // By GOAWAY end only the streams above the last one that it names.
    of_http2(error).is_some_and(|e| e.is_remote() && (e.is_go_away() || refused(e)))
}

/// TLS itself ended the connection, as the other side does when it does not take our certificate: in TLS 1.3 it looks at that
/// after we have begun to send. Of all that a connection may die of, the library gives this kind to TLS alone.
pub fn by_tls(error: &hyper::Error) -> bool {
    let io = error.source().and_then(|e| e.downcast_ref().or_else(|| e.downcast_ref::<h2::Error>()?.get_io()));
    io.is_some_and(|e: &io::Error| e.kind() == io::ErrorKind::InvalidData)
}

/// Only this request failed; others on the connection go on.
pub fn of_one_stream(error: &hyper::Error) -> bool {
    of_http2(error).is_some_and(h2::Error::is_reset)
}

fn of_http2(error: &hyper::Error) -> Option<&h2::Error> {
    error.source()?.downcast_ref()
}
