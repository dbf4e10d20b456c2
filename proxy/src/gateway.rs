//! The gateway's side of a connection: clients from outside the cluster come to its listeners, told apart by port and host
//! name. TLS ends here or passes through by its server's name; requests then go the way of a sidecar's outbound ones.
//!
//! [`listeners`] and [`Port`] are PURE; which sockets are open is the worker's matter.

use crate::{
    admission,
    config::Config,
    front::{ALPN_H2, Front},
    http::{self, Protocol, Side},
    io::{Prefixed, first_bytes},
    limits::Limits,
    outbound::{self, host, reset},
    reason::Reason,
    rule::Routed,
    worker::Worker,
};
use ::http::{HeaderValue, Request, header};
use bytes::Bytes;
use hyper::body::Incoming;
use sluice_model::{Gateway, ListenerMode, Match, Name, Route, Snapshot, common_host};
use sluice_traffic::{
    access::Call,
    detect::{ClientHello, Detected},
    hash::hash,
    route::Host,
};
use std::{
    cell::Cell,
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::net::TcpStream;

/// How long a client may take for a handshake, on a line that loses packets.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Between two questions to a client that says nothing whether it is there: ten, then it is given up (tcp(7)).
const PROBE_EVERY: Duration = Duration::from_secs(15);

/// What is listened for at one port, most specific host first.
pub type Port = Vec<Listener>;

/// A listener as workers use it.
#[derive(Clone, Debug)]
pub struct Listener {
    pub name: String,
    pub hostname: Option<String>,
    host: Host,
    pub mode: ListenerMode,
    /// Index into [`Config::targets`].
    pub target: usize,
    pub front: Option<Arc<Front>>,
}

/// The listeners of `gateway` by port; `target` finds the table of a listener's routes.
pub fn listeners(
    gateway: &Gateway,
    snapshot: &Snapshot,
    mut target: impl FnMut(&sluice_model::Listener, Vec<Route>) -> usize,
) -> BTreeMap<u16, Port> {
    let mut ports: BTreeMap<u16, Port> = BTreeMap::new();
    for l in &gateway.listeners {
        let routes: Vec<Route> = l.routes.iter().filter_map(|name| narrowed(snapshot, name, l)).collect();
        let listener = Listener {
            name: l.name.clone(),
            hostname: l.hostname.clone(),
            host: Host::parse(l.hostname.as_deref().unwrap_or("*")),
            mode: l.mode,
            target: target(l, routes),
            front: (l.mode == ListenerMode::Https).then(|| Arc::new(Front::new(l.certificates.clone()))),
        };
        ports.entry(l.port).or_default().push(listener);
    }
    ports.values_mut().for_each(|port| port.sort_by_key(|l| l.host.rank()));
    ports
}

/// A route as a listener has it: for the host names that both take.
fn narrowed(snapshot: &Snapshot, name: &Name, listener: &sluice_model::Listener) -> Option<Route> {
    let mut route = snapshot.route(name)?.clone();
    let Some(hostname) = listener.hostname.as_deref() else { return Some(route) };
    for rule in &mut route.rules {
        if rule.matches.is_empty() {
            rule.matches.push(Match::default());
        }
        for one in &mut rule.matches {
            one.hosts = match &one.hosts[..] {
                [] => vec![hostname.to_owned()],
                all => all
                    .iter()
                    .filter_map(|h| common_host(Some(hostname), Some(h)).flatten().map(str::to_owned))
                    .collect(),
            };
        }
        // An empty list would mean every name.
        rule.matches.retain(|one| !one.hosts.is_empty());
    }
    route.rules.retain(|rule| !rule.matches.is_empty());
    Some(route)
}

/// Takes over what is the same as before, so that clients can go on resuming their sessions.
pub fn take_over(ports: &mut BTreeMap<u16, Port>, gateway: &Gateway, before: &BTreeMap<u16, Port>) {
    let old: Vec<&Arc<Front>> = before.values().flatten().filter_map(|l| l.front.as_ref()).collect();
    for listener in ports.values_mut().flatten() {
        let Some(of) = gateway.listeners.iter().find(|l| l.name == listener.name) else { continue };
        if let (Some(front), Some(same)) = (&mut listener.front, old.iter().find(|f| f.is_of(&of.certificates))) {
            *front = (*same).clone();
        }
    }
}

/// A client's connection whose requests are served.
pub struct Door {
    pub port: u16,
    pub client: IpAddr,
    /// Within TLS: the name of the listener that the client asked for.
    listener: Option<String>,
    /// When the last request came.
    last: Cell<Instant>,
}

impl Door {
    fn new(port: u16, client: SocketAddr, listener: Option<String>) -> Self {
        let client = client.ip().to_canonical();
        Self { port, client, listener, last: Cell::new(Instant::now()) }
    }

    pub fn scheme(&self) -> ::http::uri::Scheme {
        if self.listener.is_some() { ::http::uri::Scheme::HTTPS } else { ::http::uri::Scheme::HTTP }
    }

    /// The key of the client, for those who keep one at an endpoint.
    pub fn source(&self) -> u64 {
        match self.client {
            IpAddr::V4(ip) => hash(&ip.octets(), 0),
            IpAddr::V6(ip) => hash(&ip.octets(), 0),
        }
    }

    /// Comes when no request has come for this long.
    pub async fn idle(&self, limit: Duration) {
        loop {
            let until = self.last.get() + limit;
            if Instant::now() >= until {
                return;
            }
            tokio::time::sleep_until(until.into()).await;
        }
    }

    /// The backend of a request.
    pub fn route(&self, worker: &Worker, request: &mut Request<Incoming>) -> Result<Routed, Reason> {
        self.last.set(Instant::now());
        self.mark(request);
        let asked = Some((request.method().as_str(), request.uri().path()));
        admission::admit(worker, &Call { caller: None, port: self.port, request: asked }, Some(self.client))?;
        let live = worker.live();
        let listener = requests_of(&live.config, self.port, host(request)).ok_or(Reason::NoRoute)?;
        // Else a client could speak through one listener's certificate to another's routes.
        if self.listener.as_ref().is_some_and(|name| *name != listener.name) {
            return Err(Reason::Misdirected);
        }
        live.choose_http(listener.target, request, worker)
    }

    /// Says who the client is and how it came; what it says of that itself is not believed.
    fn mark(&self, request: &mut Request<Incoming>) {
        let scheme = HeaderValue::from_static(if self.listener.is_some() { "https" } else { "http" });
        let headers = request.headers_mut();
        headers.remove(header::FORWARDED);
        if let Ok(client) = HeaderValue::from_str(&self.client.to_string()) {
            headers.insert("x-forwarded-for", client);
        }
        headers.insert("x-forwarded-proto", scheme);
    }
}

/// The listener of a port that takes requests for `host`.
fn requests_of<'c>(config: &'c Config, port: u16, host: &str) -> Option<&'c Listener> {
    config.listeners.get(&port)?.iter().find(|l| l.host.matches(host))
}

/// A client that takes nothing of what it is sent, or that is gone without a word, is given up: the kernel counts from when
/// nothing went any more, also while the client says that it has no room (tcp(7), `TCP_USER_TIMEOUT`).
fn bound(stream: &TcpStream, limits: Limits) {
    let socket = socket2::SockRef::from(stream);
    let probes = socket2::TcpKeepalive::new().with_time(limits.idle).with_interval(PROBE_EVERY);
    // Without them the connection works as well.
    let _ = socket.set_tcp_user_timeout(Some(limits.body_idle));
    let _ = socket.set_tcp_keepalive(&probes);
}

/// Serves one connection of a client to `port` until it ends.
pub async fn serve(worker: &Rc<Worker>, mut stream: TcpStream, port: u16, client: SocketAddr) {
    bound(&stream, worker.limits);
    // A client may connect before it knows what to ask; one that never asks is gone after this.
    let Ok((bytes, found)) = first_bytes(&mut stream, worker.limits.head).await else { return };
    if bytes.is_empty() {
        return;
    }
    let live = worker.live();
    let Some(listeners) = live.config.listeners.get(&port) else { return reset(&stream) };
    if !listeners.iter().any(|l| l.mode.is_tls()) {
        drop(live);
        let protocol = if found == Detected::Http2 { Protocol::Http2 } else { Protocol::Http1 };
        // What is no HTTP is told so in HTTP.
        let side = Side::Gateway(Door::new(port, client, None));
        return http::serve(worker, Prefixed::new(bytes, stream), side, protocol).await;
    }
    let Detected::Tls(hello) = found else {
        worker.counters.refuse(Reason::MalformedRequest);
        return reset(&stream);
    };
    let Some(listener) = listeners.iter().find(|l| l.host.matches(hello.server_name())).cloned() else {
        worker.counters.refuse(Reason::NoRoute);
        return reset(&stream);
    };
    drop(live);
    match &listener.front {
        None => Box::pin(pass(worker, stream, bytes, &listener, &hello, (port, client))).await,
        // Apart, since TLS makes it large.
        Some(front) => Box::pin(terminate(worker, stream, bytes, front, &listener.name, (port, client))).await,
    }
}

/// The connection as a whole, to the backend of the server's name.
async fn pass(
    worker: &Rc<Worker>,
    stream: TcpStream,
    bytes: Bytes,
    listener: &Listener,
    hello: &ClientHello,
    (port, client): (u16, SocketAddr),
) {
    let door = Door::new(port, client, None);
    let admitted = admission::admit(worker, &Call { caller: None, port, request: None }, Some(door.client));
    // Looked up anew: the config may be another one meanwhile, but no await lies between.
    let choice = admitted.and_then(|()| worker.live().choose_tcp(listener.target, Some(hello.server_name())));
    match choice {
        Ok(choice) => outbound::join(worker, stream, bytes, choice, door.source()).await,
        Err(reason) => {
            worker.counters.refuse(reason);
            reset(&stream);
        }
    }
}

async fn terminate(
    worker: &Rc<Worker>,
    stream: TcpStream,
    bytes: Bytes,
    front: &Front,
    listener: &str,
    (port, client): (u16, SocketAddr),
) {
    let Some(acceptor) = front.acceptor() else {
        worker.counters.refuse(Reason::NoCertificate);
        return reset(&stream);
    };
    let accepting = acceptor.accept(Prefixed::new(bytes, stream));
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, accepting).await {
        Ok(Ok(stream)) => stream,
        failed => return tracing::debug!(error = ?failed.map(|r| r.err()), %client, "no TLS with the client"),
    };
    let h2 = stream.get_ref().1.alpn_protocol() == Some(ALPN_H2);
    let side = Side::Gateway(Door::new(port, client, Some(listener.to_owned())));
    http::serve(worker, stream, side, if h2 { Protocol::Http2 } else { Protocol::Http1 }).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::{Resource, Revision, RouteKind, Rule};

    fn listener(name: &str, port: u16, hostname: Option<&str>) -> sluice_model::Listener {
        sluice_model::Listener {
            name: name.into(),
            port,
            mode: ListenerMode::Http,
            hostname: hostname.map(Into::into),
            certificates: vec![],
            routes: vec![Name::new("shop", "r")],
        }
    }

    fn route(hosts: &[&str]) -> Route {
        let one = Match { hosts: hosts.iter().map(|h| (*h).to_owned()).collect(), ..Match::default() };
        Route {
            name: Name::new("shop", "r"),
            kind: RouteKind::Http,
            parent: Gateway::parent(&Name::new("shop", "edge")),
            parent_port: None,
            created_s: 0,
            generation: 1,
            rules: vec![Rule { matches: vec![one], ..Rule::default() }],
        }
    }

    #[test]
    fn a_route_has_the_hosts_that_the_listener_has_too() {
        let table: [(&[&str], Option<&str>, &[&str]); 5] = [
            (&["a.example", "b.other"], None, &["a.example", "b.other"]),
            (&[], Some("*.example"), &["*.example"]),
            (&["a.example", "b.other"], Some("*.example"), &["a.example"]),
            (&["*.example"], Some("a.example"), &["a.example"]),
            (&["*.example", "*.a.example"], Some("x.a.example"), &["x.a.example", "x.a.example"]),
        ];
        for (hosts, hostname, want) in table {
            let snapshot = Snapshot::new(Revision(1), [Resource::Route(route(hosts))]);
            let narrowed = narrowed(&snapshot, &Name::new("shop", "r"), &listener("l", 80, hostname));
            assert_eq!(narrowed.expect("there").rules[0].matches[0].hosts, want, "{hosts:?} at {hostname:?}");
        }
    }

    #[test]
    fn the_most_specific_listener_of_a_port_takes_a_host() {
        let all =
            [("any", None), ("wild", Some("*.example")), ("exact", Some("a.example")), ("deep", Some("*.b.example"))];
        let gateway = Gateway {
            name: Name::new("shop", "edge"),
            listeners: all.iter().map(|(name, host)| listener(name, 80, *host)).collect(),
        };
        let listeners = listeners(&gateway, &Snapshot::default(), |_, _| 0);
        let config = Config { listeners, ..Config::default() };
        for (host, want) in [
            ("a.example", Some("exact")),
            ("A.Example", Some("exact")),
            ("c.example", Some("wild")),
            ("x.b.example", Some("deep")),
            ("b.example", Some("wild")),
            ("example", Some("any")),
            ("", Some("any")),
        ] {
            assert_eq!(requests_of(&config, 80, host).map(|l| l.name.as_str()), want, "{host}");
        }
        assert!(requests_of(&config, 81, "a.example").is_none());
    }
}
