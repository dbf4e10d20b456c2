//! Open-loop HTTP load (datagrams for `udp://`, see `datagrams`): request number n is due at start + n/rps whatever became of
//! the others, its latency counts from that moment, and more than a second is a failure. Nothing is retried. What is left open is
//! bounded.

use crate::{LocalExecutor, datagrams, load_report::Report};
use anyhow::Context;
use bytes::Bytes;
use clap::Parser;
use http_body_util::{BodyExt, Full};
use hyper::{
    Request, Response, Uri,
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use std::{
    cell::{Cell, RefCell},
    error::Error,
    net::SocketAddr,
    rc::Rc,
    time::Duration,
};
use tokio::{net::TcpStream, time::Instant};

/// A request that takes longer has failed.
pub const TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Parser, Clone, Debug)]
#[command(about = "Open-loop HTTP load; prints one JSON line")]
pub struct LoadArgs {
    #[arg(long)]
    pub url: Uri,
    /// Requests per second
    #[arg(long, default_value_t = 100.0)]
    pub rps: f64,
    /// How long, in seconds
    #[arg(long, default_value_t = 10.0)]
    pub duration: f64,
    /// A connection per request
    #[arg(long)]
    pub fresh: bool,
    /// HTTP/2 with prior knowledge; an answer of gRPC is one only with `grpc-status: 0` behind it
    #[arg(long)]
    pub http2: bool,
    /// Of udp://: name the address with each datagram, over a socket that is not connected
    #[arg(long)]
    pub unconnected: bool,
    /// Requests open at a time; one that finds no place fails as "overload"
    #[arg(long, default_value_t = 1000)]
    pub max_open: usize,
    #[arg(long, default_value = "GET")]
    pub method: http::Method,
    /// name=value, may be repeated
    #[arg(long = "header")]
    pub headers: Vec<String>,
    /// Size of the request body
    #[arg(long, default_value_t = 0)]
    pub body_bytes: usize,
    /// Request ids are this and the request's number
    #[arg(long, default_value = "")]
    pub id_prefix: String,
    /// Print a JSON line about each interval of this many seconds
    #[arg(long)]
    pub progress: Option<f64>,
}

/// The result of a run: the arguments that matter and the report.
#[derive(Serialize)]
pub struct RunSummary {
    pub url: String,
    pub rps: f64,
    pub duration_s: f64,
    /// When request 0 was due (datagrams: at the earliest), in milliseconds since 1970.
    pub began_ms: u64,
    #[serde(flatten)]
    pub report: serde_json::Value,
}

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Sender {
    fn is_closed(&self) -> bool {
        match self {
            Self::Http1(s) => s.is_closed(),
            Self::Http2(s) => s.is_closed(),
        }
    }

    fn is_ready(&self) -> bool {
        match self {
            Self::Http1(s) => s.is_ready(),
            Self::Http2(s) => s.is_ready(),
        }
    }

    async fn send(&mut self, request: Request<Full<Bytes>>) -> hyper::Result<Response<Incoming>> {
        match self {
            Self::Http1(s) => s.send_request(request).await,
            Self::Http2(s) => s.send_request(request).await,
        }
    }
}

struct Run {
    args: LoadArgs,
    target: SocketAddr,
    headers: http::HeaderMap,
    body: Bytes,
    /// Most recently used last, so that few connections carry a light load.
    idle: RefCell<Vec<Sender>>,
    open: Cell<usize>,
    report: RefCell<Report>,
    interval: RefCell<Report>,
}

/// Runs to the end and returns what there is to say.
pub async fn run(args: LoadArgs) -> anyhow::Result<RunSummary> {
    let summary = |args: &LoadArgs, began_ms, report| RunSummary {
        url: args.url.to_string(),
        rps: args.rps,
        duration_s: args.duration,
        began_ms,
        report,
    };
    if args.url.scheme_str() == Some("udp") {
        let began_ms = now_ms();
        let report = datagrams::run(&args, resolve(&args.url).await?).await?;
        return Ok(summary(&args, began_ms, report));
    }
    let run = Rc::new(Run::new(args).await?);
    let (start, began_ms) = (Instant::now(), now_ms());
    let total = (run.args.rps * run.args.duration).round() as u64;
    let progress = run.args.progress.map(|s| tokio::task::spawn_local(print_progress(run.clone(), s, start)));
    for number in 0..total {
        let due = start + Duration::from_secs_f64(number as f64 / run.args.rps);
        tokio::time::sleep_until(due).await;
        run.clone().start(number, due);
    }
    let end = start + Duration::from_secs_f64(run.args.duration) + TIMEOUT * 2;
    while run.open.get() > 0 && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    if let Some(p) = progress {
        p.abort();
    }
    let report = serde_json::to_value(run.report.borrow().summary())?;
    Ok(summary(&run.args, began_ms, report))
}

fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_millis() as u64)
}

async fn resolve(url: &Uri) -> anyhow::Result<SocketAddr> {
    let host = url.host().context("--url has no host")?;
    let port = url.port_u16().unwrap_or(80);
    let mut found = tokio::net::lookup_host((host.trim_matches(['[', ']']), port))
        .await
        .with_context(|| format!("resolve {host}"))?;
    found.next().with_context(|| format!("{host} has no address"))
}

impl Run {
    async fn new(args: LoadArgs) -> anyhow::Result<Self> {
        let target = resolve(&args.url).await?;
        let mut headers = http::HeaderMap::new();
        headers.insert("host", args.url.authority().context("--url has no host")?.as_str().parse()?);
        for h in &args.headers {
            let (name, value) = h.split_once('=').with_context(|| format!("--header {h}: want name=value"))?;
            headers.append(http::HeaderName::try_from(name)?, value.parse()?);
        }
        let body = Bytes::from(vec![b'x'; args.body_bytes]);
        let (report, interval) = Default::default();
        Ok(Self { args, target, headers, body, idle: RefCell::default(), open: Cell::new(0), report, interval })
    }

    fn start(self: Rc<Self>, number: u64, due: Instant) {
        self.report.borrow_mut().sent();
        self.interval.borrow_mut().sent();
        if self.open.get() >= self.args.max_open {
            return self.finish(number, due, Err("overload".into()));
        }
        self.open.set(self.open.get() + 1);
        tokio::task::spawn_local(async move {
            let result = tokio::time::timeout_at(due + TIMEOUT, self.once(number)).await;
            self.open.set(self.open.get() - 1);
            self.finish(number, due, result.unwrap_or_else(|_| Err("timeout".into())));
        });
    }

    fn finish(&self, number: u64, due: Instant, result: Result<String, String>) {
        let latency_us = due.elapsed().as_micros() as u64;
        for report in [&self.report, &self.interval] {
            match &result {
                Ok(version) => report.borrow_mut().answered(version, latency_us),
                Err(kind) => report.borrow_mut().failed(number, kind),
            }
        }
    }

    /// One request; the version that answered, or the kind of failure.
    async fn once(&self, number: u64) -> Result<String, String> {
        let (mut sender, reused) = match self.idle_sender() {
            Some(s) => (s, true),
            None => (self.connect().await.map_err(|e| format!("connect: {}", e.kind()))?, false),
        };
        let lost = |e: hyper::Error| format!("{}{}", if reused { "reused: " } else { "" }, describe(&e));
        let answer = sender.send(self.request(number)).await.map_err(lost)?;
        let (status, version, reason) = describe_answer(&answer);
        let grpc = answer.headers().get("content-type").is_some_and(|t| t.as_bytes().starts_with(b"application/grpc"));
        let collected = answer.into_body().collect().await.map_err(lost)?;
        let outcome =
            collected.trailers().and_then(|t| t.get("grpc-status")?.to_str().ok()).unwrap_or("none").to_owned();
        let body = collected.to_bytes();
        if !self.args.fresh && !sender.is_closed() {
            self.idle.borrow_mut().push(sender);
        }
        if !status.is_success() {
            return Err(format!("status {}{reason}", status.as_u16()));
        }
        if grpc && outcome != "0" {
            return Err(format!("grpc-status {outcome}"));
        }
        Ok(version.or_else(|| version_in(&body)).unwrap_or_default())
    }

    /// The most recently used connection that is ready; dead ones are dropped on the way.
    fn idle_sender(&self) -> Option<Sender> {
        let mut idle = self.idle.borrow_mut();
        idle.retain(|s| !s.is_closed());
        let at = idle.iter().rposition(Sender::is_ready)?;
        Some(idle.remove(at))
    }

    async fn connect(&self) -> std::io::Result<Sender> {
        let stream = TcpStream::connect(self.target).await?;
        stream.set_nodelay(true)?;
        let stream = TokioIo::new(stream);
        // How a connection ended is seen by the request that was on it.
        Ok(if self.args.http2 {
            let (sender, connection) = http2::handshake(LocalExecutor, stream).await.map_err(std::io::Error::other)?;
            tokio::task::spawn_local(connection);
            Sender::Http2(sender)
        } else {
            let (sender, connection) = http1::handshake(stream).await.map_err(std::io::Error::other)?;
            tokio::task::spawn_local(connection);
            Sender::Http1(sender)
        })
    }

    fn request(&self, number: u64) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.args.method.clone();
        *request.uri_mut() = match self.args.url.path_and_query() {
            // There it says the authority, too.
            _ if self.args.http2 => self.args.url.clone(),
            Some(path) => path.clone().into(),
            None => Uri::from_static("/"),
        };
        *request.headers_mut() = self.headers.clone();
        let id = format!("{}{number}", self.args.id_prefix);
        if let Ok(id) = id.parse() {
            request.headers_mut().insert("x-request-id", id);
        }
        if self.args.fresh && !self.args.http2 {
            request.headers_mut().insert("connection", http::HeaderValue::from_static("close"));
        }
        request
    }
}

fn describe(e: &hyper::Error) -> String {
    match e {
        e if e.is_incomplete_message() => "closed before the answer's end".to_owned(),
        e if e.is_canceled() => "canceled".to_owned(),
        e if e.is_parse() => "malformed answer".to_owned(),
        e => e.source().map_or_else(|| "connection lost".to_owned(), |why| format!("connection lost: {why}")),
    }
}

fn describe_answer(answer: &hyper::Response<Incoming>) -> (http::StatusCode, Option<String>, String) {
    let text = |name| answer.headers().get(name).and_then(|v| v.to_str().ok());
    let reason = text("x-sluice-reason").map(|r| format!(" {r}")).unwrap_or_default();
    (answer.status(), text("x-version").map(str::to_owned), reason)
}

fn version_in(body: &[u8]) -> Option<String> {
    let body: serde_json::Value = serde_json::from_slice(body).ok()?;
    body.get("version")?.as_str().map(str::to_owned)
}

async fn print_progress(run: Rc<Run>, seconds: f64, start: Instant) {
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(seconds.max(0.1)));
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let report = run.interval.take();
        let mut line = serde_json::to_value(report.summary()).unwrap_or_default();
        line["t"] = start.elapsed().as_secs_f64().into();
        println!("{line}");
    }
}
