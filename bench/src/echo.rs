//! The test application: an HTTP server (1.1 and 2 with prior knowledge) that says who answered, numbers and remembers
//! request ids so that a test can prove "exactly once", misbehaves on demand, and optionally echoes TCP and UDP.
//!
//! It opens no connection of its own. On SIGTERM it finishes what it has begun and exits.

use crate::{
    LocalExecutor,
    echo_state::{FaultChange, Faults, State},
};
use anyhow::Context;
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt, Full, Limited, combinators::UnsyncBoxBody};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::{rt::TokioIo, server::conn::auto};
use std::{
    cell::RefCell,
    convert::Infallible,
    fs::{File, OpenOptions},
    io::Write,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    rc::Rc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, watch},
};

/// Most connections at a time; more wait in the backlog.
const MAX_CONNECTIONS: usize = 8192;
/// Largest request body read.
const MAX_BODY: usize = 64 << 20;
/// How long requests in flight may take after SIGTERM.
const DRAIN: Duration = Duration::from_secs(10);

#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// Name of this version, in every answer
    #[arg(long, default_value = "v1")]
    pub version: String,
    /// Port of HTTP
    #[arg(long, default_value_t = 8080)]
    pub http: u16,
    /// Port on which bytes come back as sent (a first line "who" is answered "<version> <pod>")
    #[arg(long)]
    pub tcp: Option<u16>,
    /// Port on which datagrams are answered "<version> <pod> <payload>"
    #[arg(long)]
    pub udp: Option<u16>,
    /// Listen on this address only
    #[arg(long, default_value_t = IpAddr::V6(Ipv6Addr::UNSPECIFIED))]
    pub address: IpAddr,
    /// Wait before every answer
    #[arg(long, default_value_t = 0)]
    pub delay_ms: u64,
    /// Share of requests that fail, spread evenly
    #[arg(long, default_value_t = 0)]
    pub fail_percent: u32,
    #[arg(long, default_value_t = 500)]
    pub fail_status: u16,
    /// After SIGTERM go on accepting for this long, as an app that knows its endpoint is withdrawn later
    #[arg(long, default_value_t = 0)]
    pub linger_ms: u64,
    /// Append one line per request to this file
    #[arg(long)]
    pub log: Option<std::path::PathBuf>,
    /// No line per request on stdout
    #[arg(long)]
    pub quiet: bool,
}

struct App {
    args: ServeArgs,
    pod: String,
    state: RefCell<State>,
    log: Option<File>,
}

/// Serves until SIGTERM, then drains.
pub async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let app = Rc::new(App::new(args)?);
    let connections = Rc::new(Semaphore::new(MAX_CONNECTIONS));
    let (stop, stopping) = watch::channel(false);
    let http = app.listen(app.args.http).await?;
    let mut accepting = vec![tokio::task::spawn_local(accept(app.clone(), http, connections.clone(), stopping))];
    if let Some(port) = app.args.tcp {
        let tcp = app.listen(port).await?;
        accepting.push(tokio::task::spawn_local(accept_tcp(app.clone(), tcp, connections.clone())));
    }
    if let Some(port) = app.args.udp {
        let socket = UdpSocket::bind(SocketAddr::new(app.args.address, port)).await.context("bind UDP")?;
        tokio::task::spawn_local(answer_udp(app.clone(), socket));
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tokio::time::sleep(Duration::from_millis(app.args.linger_ms)).await;
    // Each holds the permit of the next connection.
    accepting.iter().for_each(|task| task.abort());
    stop.send_replace(true);
    let drained = connections.acquire_many(MAX_CONNECTIONS as u32);
    let _ = tokio::time::timeout(DRAIN, drained).await;
    Ok(())
}

impl App {
    fn new(args: ServeArgs) -> anyhow::Result<Self> {
        let faults = Faults {
            delay_ms: args.delay_ms,
            fail_percent: args.fail_percent.min(100),
            fail_status: args.fail_status,
            unready: false,
        };
        let open = |p: &std::path::PathBuf| {
            OpenOptions::new().create(true).append(true).open(p).with_context(|| format!("open log {}", p.display()))
        };
        let log = args.log.as_ref().map(open).transpose()?;
        let pod = std::env::var("POD_NAME").or_else(|_| std::env::var("HOSTNAME")).unwrap_or_else(|_| hostname());
        Ok(Self { args, pod, state: RefCell::new(State::new(faults)), log })
    }

    /// `::` takes IPv4 too; where IPv6 is switched off, IPv4 alone.
    async fn listen(&self, port: u16) -> anyhow::Result<TcpListener> {
        let any6 = self.args.address == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        match TcpListener::bind(SocketAddr::new(self.args.address, port)).await {
            Err(_) if any6 => TcpListener::bind(("0.0.0.0", port)).await,
            other => other,
        }
        .with_context(|| format!("listen on port {port}"))
    }

    /// The line ends with the time, in milliseconds since 1970.
    fn note(&self, number: u64, id: &str, what: &str) {
        let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
        let line = format!("{number} {id} {what} {at_ms}\n");
        if !self.args.quiet {
            // A closed stdout must not stop the server.
            let _ = std::io::stdout().write_all(line.as_bytes());
        }
        if let Some(mut log) = self.log.as_ref() {
            let _ = log.write_all(line.as_bytes());
        }
    }
}

fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

async fn accept(app: Rc<App>, listener: TcpListener, connections: Rc<Semaphore>, stopping: watch::Receiver<bool>) {
    loop {
        let permit = connections.clone().acquire_owned_local().await;
        let Ok((stream, peer)) = listener.accept().await else { continue };
        let (app, mut stopping) = (app.clone(), stopping.clone());
        tokio::task::spawn_local(async move {
            let _permit = permit;
            let _ = stream.set_nodelay(true);
            let local = stream.local_addr().unwrap_or(peer);
            let service = service_fn(move |r| respond(app.clone(), r, peer, local));
            let builder = auto::Builder::new(LocalExecutor);
            let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
            tokio::pin!(connection);
            tokio::select! {
                _ = connection.as_mut() => return,
                _ = stopping.wait_for(|s| *s) => connection.as_mut().graceful_shutdown(),
            }
            let _ = connection.await;
        });
    }
}

/// An owned permit of a semaphore that stays on one thread.
trait AcquireLocal {
    async fn acquire_owned_local(self) -> LocalPermit;
}

struct LocalPermit(Rc<Semaphore>);

impl AcquireLocal for Rc<Semaphore> {
    async fn acquire_owned_local(self) -> LocalPermit {
        self.acquire().await.expect("the semaphore is never closed").forget();
        LocalPermit(self)
    }
}

impl Drop for LocalPermit {
    fn drop(&mut self) {
        self.0.add_permits(1);
    }
}

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

async fn respond(
    app: Rc<App>,
    request: Request<Incoming>,
    peer: SocketAddr,
    local: SocketAddr,
) -> Result<Answer, Infallible> {
    let answer = match (request.method(), request.uri().path()) {
        (_, "/healthz") => health(&app),
        (&Method::GET, "/log") => log(&app, request.uri().query().unwrap_or_default()),
        (&Method::POST, "/faults") => faults(&app, request).await,
        _ => echo(&app, request, peer, local).await,
    };
    Ok(answer)
}

fn json(status: StatusCode, body: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body + "\n")).boxed_unsync());
    *answer.status_mut() = status;
    answer.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    answer
}

fn health(app: &App) -> Answer {
    let unready = app.state.borrow().faults.unready;
    if unready {
        app.note(0, "-", "unready");
    }
    let status = if unready { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    json(status, format!("{{\"ready\":{}}}", !unready))
}

fn log(app: &App, query: &str) -> Answer {
    let since = query.strip_prefix("since=").and_then(|n| n.parse().ok()).unwrap_or(0);
    let state = app.state.borrow();
    json(StatusCode::OK, serde_json::to_string(&state.log(since)).expect("strings and numbers"))
}

async fn faults(app: &App, request: Request<Incoming>) -> Answer {
    let body = match Limited::new(request.into_body(), 4096).collect().await {
        Ok(b) => b.to_bytes(),
        Err(e) => return json(StatusCode::BAD_REQUEST, format!("{{\"error\":{:?}}}", e.to_string())),
    };
    match serde_json::from_slice::<FaultChange>(&body) {
        Ok(change) => app.state.borrow_mut().faults.change(change),
        Err(e) => return json(StatusCode::BAD_REQUEST, format!("{{\"error\":{:?}}}", e.to_string())),
    }
    json(StatusCode::OK, serde_json::to_string(&app.state.borrow().faults).expect("numbers"))
}

async fn echo(app: &Rc<App>, mut request: Request<Incoming>, peer: SocketAddr, local: SocketAddr) -> Answer {
    let id = header(&request, "x-request-id").to_owned();
    let (number, fails, faults) = {
        let mut state = app.state.borrow_mut();
        (state.record(&id), state.fails(), state.faults)
    };
    if faults.delay_ms > 0 {
        tokio::time::sleep(Duration::from_millis(faults.delay_ms)).await;
    }
    let tunnel = request.method() == Method::CONNECT;
    if tunnel || header(&request, "upgrade") == "echo" {
        tokio::task::spawn_local(echo_upgraded(hyper::upgrade::on(&mut request)));
        app.note(number, &id, if tunnel { "tunnel" } else { "upgrade" });
        return if tunnel { Response::new(Full::default().boxed_unsync()) } else { switching() };
    }
    let (parts, body) = request.into_parts();
    let body_bytes = Limited::new(body, MAX_BODY).collect().await.map(|b| b.to_bytes().len());
    let status = match (&body_bytes, fails) {
        (Err(_), _) => StatusCode::PAYLOAD_TOO_LARGE,
        (Ok(_), true) => StatusCode::from_u16(faults.fail_status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        (Ok(_), false) => StatusCode::OK,
    };
    app.note(number, &id, &format!("{} {} {}", parts.method, parts.uri, status.as_u16()));
    let mut answer = serde_json::json!({
        "version": app.args.version,
        "pod": app.pod,
        "number": number,
        "request_id": id,
        "method": parts.method.as_str(),
        "path": parts.uri.path(),
        "host": parts.headers.get("host").and_then(|h| h.to_str().ok()),
        "body_bytes": body_bytes.unwrap_or(0),
        "peer": peer.to_string(),
        "local": local.to_string(),
    });
    if parts.uri.query() == Some("headers") {
        let text = |v: &http::HeaderValue| String::from_utf8_lossy(v.as_bytes()).into_owned();
        let all = parts.headers.iter().map(|(name, v)| (name.to_string(), serde_json::Value::from(text(v))));
        answer["headers"] = all.collect();
    }
    let grpc = parts.headers.get("content-type").is_some_and(|t| t.as_bytes().starts_with(b"application/grpc"));
    let mut answer = match (grpc, status) {
        (true, StatusCode::OK) => message(&answer.to_string()),
        _ => json(status, answer.to_string()),
    };
    if let Ok(version) = http::HeaderValue::from_str(&app.args.version) {
        answer.headers_mut().insert("x-version", version);
    }
    answer
}

/// The text as gRPC's answer to a call: one message, and behind it that all went well.
fn message(text: &str) -> Answer {
    let mut body = vec![0];
    body.extend((text.len() as u32).to_be_bytes());
    body.extend(text.as_bytes());
    let well = http::HeaderMap::from_iter([(
        http::HeaderName::from_static("grpc-status"),
        http::HeaderValue::from_static("0"),
    )]);
    let body = Full::new(Bytes::from(body)).with_trailers(std::future::ready(Some(Ok(well))));
    let mut answer = Response::new(body.boxed_unsync());
    answer.headers_mut().insert("content-type", http::HeaderValue::from_static("application/grpc"));
    answer
}

fn header<'a, B>(request: &'a Request<B>, name: &str) -> &'a str {
    request.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
}

fn switching() -> Answer {
    let mut answer = Response::new(Full::default().boxed_unsync());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert("connection", http::HeaderValue::from_static("upgrade"));
    headers.insert("upgrade", http::HeaderValue::from_static("echo"));
    answer
}

async fn echo_upgraded(upgrade: hyper::upgrade::OnUpgrade) {
    if let Ok(upgraded) = upgrade.await {
        let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
        let _ = tokio::io::copy(&mut read, &mut write).await;
        let _ = write.shutdown().await;
    }
}

async fn accept_tcp(app: Rc<App>, listener: TcpListener, connections: Rc<Semaphore>) {
    loop {
        let permit = connections.clone().acquire_owned_local().await;
        let Ok((stream, _)) = listener.accept().await else { continue };
        let app = app.clone();
        tokio::task::spawn_local(async move {
            let _permit = permit;
            let _ = echo_tcp(&app, stream).await;
        });
    }
}

async fn echo_tcp(app: &App, mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut first = [0; 512];
    let n = stream.read(&mut first).await?;
    if first[..n].trim_ascii_end() == b"who" {
        stream.write_all(format!("{} {}\n", app.args.version, app.pod).as_bytes()).await?;
    } else {
        stream.write_all(&first[..n]).await?;
    }
    let (mut read, mut write) = stream.split();
    tokio::io::copy(&mut read, &mut write).await?;
    write.shutdown().await
}

async fn answer_udp(app: Rc<App>, socket: UdpSocket) {
    let mut buffer = vec![0; 65_536];
    loop {
        let Ok((n, peer)) = socket.recv_from(&mut buffer).await else { continue };
        if let Some(id) = std::str::from_utf8(&buffer[..n]).ok().filter(|id| id.len() <= 64) {
            app.note(0, id.split_whitespace().next().unwrap_or("-"), "datagram");
        }
        let mut answer = format!("{} {} ", app.args.version, app.pod).into_bytes();
        answer.extend_from_slice(&buffer[..n]);
        let _ = socket.send_to(&answer, peer).await;
    }
}
