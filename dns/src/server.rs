//! The sockets: UDP and TCP on one address, answers from the zone, the rest forwarded to the node's upstream servers.
//!
//! Bounded: 1,024 forwarded queries at once (more are answered SERVFAIL), 64 TCP connections, 4,096 cached answers.

use crate::{
    cache::Cache,
    message::{self, Query},
    resolve::{Step, resolve, unanswered},
    zone::Zone,
};
use arc_swap::ArcSwap;
use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    time::timeout,
};

const MAX_FORWARDS: usize = 1024;
const MAX_CONNECTIONS: usize = 64;
const CACHED: usize = 4096;
/// Before the next upstream is asked.
const UPSTREAM_WAIT: Duration = Duration::from_millis(1500);
const TCP_IDLE: Duration = Duration::from_secs(10);

pub struct Resolver {
    zone: ArcSwap<Zone>,
    upstreams: Vec<SocketAddr>,
    cache: Mutex<Cache>,
    forwards: Semaphore,
}

impl Resolver {
    pub fn new(zone: Zone, upstreams: Vec<SocketAddr>) -> Arc<Self> {
        Arc::new(Self {
            zone: ArcSwap::from_pointee(zone),
            upstreams,
            cache: Mutex::new(Cache::new(CACHED)),
            forwards: Semaphore::new(MAX_FORWARDS),
        })
    }

    /// From the next query on.
    pub fn set_zone(&self, zone: Zone) {
        self.zone.store(Arc::new(zone));
    }

    async fn answer(&self, bytes: &[u8], udp: bool) -> Option<Vec<u8>> {
        let q = match resolve(&self.zone.load(), bytes, udp) {
            Step::Answer(a) => return Some(a),
            Step::Drop => return None,
            Step::Forward(q) => q,
            Step::Follow(alias) if self.upstreams.is_empty() => return Some(alias.alone(bytes)),
            Step::Follow(alias) => {
                let max = usize::from(u16::MAX);
                return Some(match self.upstream(&alias.question(), &alias.target, &alias.query, max).await {
                    Some(upstream) => alias.answer(bytes, &upstream),
                    None => unanswered(bytes, &alias.query, true),
                });
            }
        };
        let max = if udp { q.max_udp } else { usize::from(u16::MAX) };
        let answer = self.upstream(bytes, &q.name, &q, max).await;
        Some(answer.unwrap_or_else(|| unanswered(bytes, &q, !self.upstreams.is_empty())))
    }

    /// What is known of `name`, or what a server says when it is asked by `bytes`. Cached answers longer than `max` are
    /// not taken.
    async fn upstream(&self, bytes: &[u8], name: &str, q: &Query, max: usize) -> Option<Vec<u8>> {
        let cached = self.cache.lock().expect("no holder panics").get(name, q.qtype, q.id, Instant::now());
        if cached.as_ref().is_some_and(|c| c.len() <= max) {
            return cached;
        }
        let _permit = self.forwards.try_acquire().ok()?;
        for upstream in &self.upstreams {
            if let Ok(Ok(a)) = timeout(UPSTREAM_WAIT, ask(*upstream, bytes, q.id)).await {
                if let Some(ttl) = message::min_ttl(&a) {
                    let mut cache = self.cache.lock().expect("no holder panics");
                    cache.put(name.to_owned(), q.qtype, a.clone(), ttl, Instant::now());
                }
                return Some(a);
            }
        }
        None
    }
}

/// Asks one server from a port of its own; only an answer to this very question from there counts (RFC 5452).
async fn ask(upstream: SocketAddr, bytes: &[u8], id: u16) -> io::Result<Vec<u8>> {
    let local: SocketAddr = if upstream.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(local).await?;
    socket.connect(upstream).await?;
    socket.send(bytes).await?;
    let question = bytes.get(12..).unwrap_or_default();
    let mut buf = vec![0; 4096];
    loop {
        let n = socket.recv(&mut buf).await?;
        let a = &buf[..n];
        let name_end = question.iter().position(|b| *b == 0).map_or(0, |p| p + 5);
        let same = a.get(..2) == Some(&id.to_be_bytes())
            && a.get(12..12 + name_end).zip(question.get(..name_end)).is_some_and(|(x, y)| x.eq_ignore_ascii_case(y));
        if same {
            return Ok(a.to_vec());
        }
    }
}

/// Before the next try after a failure of the socket (no memory or descriptors left, say).
const PAUSE: Duration = Duration::from_millis(50);

/// Answers datagrams for ever.
pub async fn serve_udp(resolver: Arc<Resolver>, socket: Arc<UdpSocket>) {
    let mut buf = [0u8; 4096];
    loop {
        let (n, from) = match socket.recv_from(&mut buf).await {
            Ok(x) => x,
            // A client that has gone answers our answer with an ICMP error; that is its affair.
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => continue,
            Err(error) => {
                tracing::warn!(%error, "DNS socket not readable, trying again");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        // Ours are answered in place; only what must be forwarded costs a task.
        match resolve(&resolver.zone.load(), &buf[..n], true) {
            Step::Answer(a) => {
                let _ = socket.send_to(&a, from).await;
            }
            Step::Drop => {}
            Step::Forward(_) | Step::Follow(_) => {
                let (resolver, socket, bytes) = (resolver.clone(), socket.clone(), buf[..n].to_vec());
                tokio::spawn(async move {
                    if let Some(a) = resolver.answer(&bytes, true).await {
                        let _ = socket.send_to(&a, from).await;
                    }
                });
            }
        }
    }
}

/// Accepts for ever.
pub async fn serve_tcp(resolver: Arc<Resolver>, listener: TcpListener) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "DNS over TCP takes no connection, trying again");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else { continue };
        let resolver = resolver.clone();
        tokio::spawn(async move {
            let _slot = slot;
            let _ = connection(&resolver, stream).await;
        });
    }
}

async fn connection(resolver: &Resolver, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let len = timeout(TCP_IDLE, stream.read_u16()).await??;
        let mut bytes = vec![0; usize::from(len)];
        timeout(TCP_IDLE, stream.read_exact(&mut bytes)).await??;
        let Some(answer) = resolver.answer(&bytes, false).await else { return Ok(()) };
        let len = u16::try_from(answer.len()).unwrap_or(u16::MAX);
        stream.write_all(&[&len.to_be_bytes()[..], &answer[..usize::from(len)]].concat()).await?;
    }
}
