//! What can be seen of single requests: the access log, live taps and spans. Workers note a request when somebody wants to
//! see it and hand the note over at its end, to a queue that is never waited for; the control thread writes it down.

use crate::{
    metrics::{Direction, SeriesKey},
    trace::Context,
};
use http::{HeaderMap, Request, Version};
use jiff::Timestamp;
use serde_json::{Value, json};
use sluice_model::Identity;
use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::sync::{broadcast, mpsc};

/// Notes that may wait to be written; more are lost, and counted.
const QUEUE: usize = 4096;
/// Notes that one tap may be behind; it is told how many it missed.
const TAP_QUEUE: usize = 1024;
/// Taps at a time.
pub const MAX_TAPS: u32 = 16;

/// Which requests the access log has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    #[default]
    Off,
    /// Those that were answered 5xx, by ourselves, or not at all.
    Errors,
    All,
}

impl std::str::FromStr for Access {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            "errors" => Ok(Self::Errors),
            "all" => Ok(Self::All),
            other => Err(format!("access log {other:?} is not off, errors or all")),
        }
    }
}

impl Access {
    pub fn label(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Errors => "errors",
            Self::All => "all",
        }
    }
}

/// What all workers ask whether anybody wants to see a request.
#[derive(Debug)]
pub struct Observer {
    access: AtomicU8,
    taps: AtomicU32,
    /// Traces that begin here are sampled when a random number is below it; 0: no spans are made.
    threshold: AtomicU64,
    /// Headers are shown to taps.
    headers: bool,
    notes: mpsc::Sender<Exchange>,
    lost: AtomicU64,
    followers: broadcast::Sender<Arc<Exchange>>,
}

/// How it is set up.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub access: Access,
    /// Where spans go: `http://host:port/v1/traces`; none are made without.
    pub otlp: Option<http::Uri>,
    /// Share of the traces that begin here, from 0 to 1.
    pub sampled: f64,
    pub tap_headers: bool,
}

impl Observer {
    pub fn new(settings: &Settings) -> (Arc<Self>, mpsc::Receiver<Exchange>) {
        let (notes, noted) = mpsc::channel(QUEUE);
        let threshold = match &settings.otlp {
            // One at least: contexts of callers are continued also where none begins here.
            Some(_) => ((settings.sampled.clamp(0.0, 1.0) * u64::MAX as f64) as u64).max(1),
            None => 0,
        };
        let observer = Self {
            access: AtomicU8::new(settings.access as u8),
            taps: AtomicU32::new(0),
            threshold: AtomicU64::new(threshold),
            headers: settings.tap_headers,
            notes,
            lost: AtomicU64::new(0),
            followers: broadcast::channel(TAP_QUEUE).0,
        };
        (observer.into(), noted)
    }

    /// Somebody wants to see requests.
    pub fn wanted(&self) -> bool {
        self.access.load(Ordering::Relaxed) != 0 || self.taps.load(Ordering::Relaxed) > 0 || self.tracing() > 0
    }

    /// See `threshold`.
    pub fn tracing(&self) -> u64 {
        self.threshold.load(Ordering::Relaxed)
    }

    pub fn access(&self) -> Access {
        match self.access.load(Ordering::Relaxed) {
            0 => Access::Off,
            1 => Access::Errors,
            _ => Access::All,
        }
    }

    pub fn set_access(&self, access: Access) {
        self.access.store(access as u8, Ordering::Relaxed);
    }

    pub fn shows_headers(&self) -> bool {
        self.headers && self.taps.load(Ordering::Relaxed) > 0
    }

    pub fn note(&self, exchange: Exchange) {
        if self.notes.try_send(exchange).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Notes that found no room.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Follows requests; `None` when too many do.
    pub fn tap(self: &Arc<Self>) -> Option<Tap> {
        if self.taps.fetch_add(1, Ordering::Relaxed) >= MAX_TAPS {
            self.taps.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Tap { observer: self.clone(), exchanges: self.followers.subscribe() })
    }

    fn publish(&self, exchange: &Arc<Exchange>) {
        // Nobody follows: nobody misses it.
        let _ = self.followers.send(exchange.clone());
    }
}

/// Somebody who follows requests; they are noted for as long as it lives.
pub struct Tap {
    observer: Arc<Observer>,
    pub exchanges: broadcast::Receiver<Arc<Exchange>>,
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.observer.taps.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Writes down what workers have noted, for as long as there are any.
pub async fn write(observer: Arc<Observer>, mut notes: mpsc::Receiver<Exchange>, spans: Option<mpsc::Sender<Span>>) {
    while let Some(exchange) = notes.recv().await {
        let exchange = Arc::new(exchange);
        match observer.access() {
            Access::All => println!("{}", exchange.to_json()),
            Access::Errors if exchange.failed() => println!("{}", exchange.to_json()),
            _ => {}
        }
        if let (Some(spans), Some(trace)) = (&spans, exchange.trace.filter(|t| t.sampled)) {
            // An endpoint that is slower than its spans come loses some.
            let _ = spans.try_send(Span { exchange: exchange.clone(), trace });
        }
        observer.publish(&exchange);
    }
}

/// A span to be sent on.
#[derive(Clone, Debug)]
pub struct Span {
    pub exchange: Arc<Exchange>,
    pub trace: Context,
}

/// One request and its answer, as this sidecar saw it.
#[derive(Clone, Debug)]
pub struct Exchange {
    pub began: SystemTime,
    pub key: SeriesKey,
    pub method: String,
    pub host: String,
    pub path: String,
    pub version: Version,
    /// At a gateway: where the client is.
    pub client: Option<IpAddr>,
    /// Who called (inbound), or who answered (outbound): by mTLS.
    pub peer: Option<Arc<Identity>>,
    /// Where it was tried last.
    pub endpoint: Option<SocketAddr>,
    pub tries: u32,
    pub status: Option<u16>,
    /// Why the sidecar answered itself.
    pub reason: Option<&'static str>,
    pub took: Duration,
    pub trace: Option<Context>,
    /// Of the request, where taps may see them.
    pub headers: Option<HeaderMap>,
}

impl Exchange {
    pub fn begin<B>(
        request: &Request<B>,
        key: &SeriesKey,
        host: &str,
        peer: Option<&Arc<Identity>>,
        headers: bool,
    ) -> Self {
        Self {
            began: SystemTime::now(),
            key: key.clone(),
            method: request.method().to_string(),
            host: host.to_owned(),
            path: request.uri().path().to_owned(),
            version: request.version(),
            client: None,
            peer: peer.cloned(),
            endpoint: None,
            tries: 0,
            status: None,
            reason: None,
            took: Duration::ZERO,
            trace: None,
            headers: headers.then(|| request.headers().clone()),
        }
    }

    pub fn failed(&self) -> bool {
        self.reason.is_some() || self.status.is_none_or(|s| s >= 500)
    }

    pub fn began_ns(&self) -> u128 {
        self.began.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()
    }

    pub fn to_json(&self) -> Value {
        let mut all = json!({
            "time": Timestamp::try_from(self.began).map(|t| t.to_string()).ok(),
            "direction": self.key.direction.label(),
            "method": self.method,
            "host": self.host,
            "path": self.path,
            "protocol": format!("{:?}", self.version),
            "route": self.key.route.as_ref().map(ToString::to_string),
            "backend": self.key.backend.to_string(),
            "port": self.key.port,
            "endpoint": self.endpoint.map(|e| e.to_string()),
            "peer": self.peer.as_ref().map(|p| p.to_string()),
            "status": self.status,
            "reason": self.reason,
            "retries": self.tries.saturating_sub(1),
            "durationMs": self.took.as_micros() as f64 / 1000.0,
            "traceId": self.trace.map(|t| format!("{:032x}", t.trace)),
        });
        if let Some(client) = self.client {
            all["client"] = json!(client.to_string());
        }
        if let Some(headers) = &self.headers {
            let text = |v: &http::HeaderValue| String::from_utf8_lossy(v.as_bytes()).into_owned();
            all["headers"] = headers.iter().map(|(n, v)| json!([n.as_str(), text(v)])).collect();
        }
        all
    }

    pub fn inbound(&self) -> bool {
        self.key.direction == Direction::Inbound
    }
}

/// What a tap wants to see; all that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    pub direction: Option<String>,
    pub method: Option<String>,
    /// A prefix.
    pub path: Option<String>,
    /// A status such as `503`, or a class such as `5xx`.
    pub status: Option<String>,
    pub route: Option<String>,
    pub backend: Option<String>,
    pub min_ms: Option<u64>,
}

impl Filter {
    /// From a query string; an unknown name is an error, so that a typing mistake does not show everything.
    pub fn parse(query: &str) -> Result<Self, String> {
        let mut filter = Self::default();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let value = value.into_owned();
            match name.as_ref() {
                "direction" if ["inbound", "outbound"].contains(&value.as_str()) => filter.direction = Some(value),
                "method" => filter.method = Some(value.to_ascii_uppercase()),
                "path" => filter.path = Some(value),
                "status" => filter.status = Some(value.to_ascii_lowercase()),
                "route" => filter.route = Some(value),
                "backend" => filter.backend = Some(value),
                "min_ms" => filter.min_ms = Some(value.parse().map_err(|_| format!("min_ms {value:?} is no number"))?),
                other => return Err(format!("filter {other}={value} is not known")),
            }
        }
        Ok(filter)
    }

    pub fn takes(&self, e: &Exchange) -> bool {
        let is = |wanted: &Option<String>, text: &str| wanted.as_ref().is_none_or(|w| w == text);
        let status = e.status.map_or_else(|| "none".to_owned(), |s| s.to_string());
        let class = e.status.map_or_else(|| "none".to_owned(), |s| format!("{}xx", s / 100));
        is(&self.direction, e.key.direction.label())
            && is(&self.method, &e.method)
            && self.path.as_ref().is_none_or(|p| e.path.starts_with(p.as_str()))
            && self.status.as_ref().is_none_or(|s| *s == status || *s == class)
            && is(&self.route, &e.key.route.as_ref().map(ToString::to_string).unwrap_or_default())
            && is(&self.backend, &e.key.backend.to_string())
            && self.min_ms.is_none_or(|ms| e.took >= Duration::from_millis(ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::Name;

    fn exchange() -> Exchange {
        let request = Request::builder().method("POST").uri("/cart/1").body(()).expect("a request");
        let key = SeriesKey {
            direction: Direction::Outbound,
            route: Some(Name::new("shop", "r")),
            backend: Name::new("shop", "web"),
            port: 80,
        };
        Exchange {
            status: Some(503),
            took: Duration::from_millis(20),
            ..Exchange::begin(&request, &key, "web", None, false)
        }
    }

    #[test]
    fn taps_see_what_they_ask_for() {
        let table = [
            ("", true),
            ("method=post&path=/cart", true),
            ("path=%2Fcart%2F1", true),
            ("path=/other", false),
            ("status=5xx", true),
            ("status=503", true),
            ("status=2xx", false),
            ("direction=inbound", false),
            ("route=shop/r&backend=shop/web", true),
            ("backend=shop/v2", false),
            ("min_ms=20", true),
            ("min_ms=21", false),
        ];
        for (query, wanted) in table {
            assert_eq!(Filter::parse(query).expect(query).takes(&exchange()), wanted, "{query}");
        }
        for wrong in ["paht=/", "min_ms=x", "direction=up"] {
            assert!(Filter::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn headers_are_not_shown_unless_they_may_be() {
        assert!(exchange().to_json().get("headers").is_none());
        assert_eq!(exchange().to_json()["status"], 503);
    }

    #[test]
    fn a_full_queue_loses_notes_and_counts_them() {
        let (observer, noted) = Observer::new(&Settings { access: Access::All, ..Settings::default() });
        (0..QUEUE + 5).for_each(|_| observer.note(exchange()));
        assert_eq!(observer.lost(), 5);
        drop(noted);
    }
}
