//! Spans on their way to a collector: OTLP over HTTP, in its JSON form (OTLP 1.x, "JSON Protobuf Encoding"). Spans are sent
//! in batches; a collector that does not answer loses them, and nobody waits for it.

use crate::observe::Span;
use bytes::Bytes;
use http::{Request, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::{net::TcpStream, sync::mpsc};

/// Spans in one request at most.
const BATCH: usize = 512;
/// A batch is sent at least so often.
const EVERY: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(5);

/// Sends what comes until nothing comes any more. `service` names this workload.
pub async fn run(collector: Uri, service: String, mut spans: mpsc::Receiver<Span>) {
    let mut batch = Vec::new();
    loop {
        let more = tokio::time::timeout(EVERY, spans.recv_many(&mut batch, BATCH)).await;
        let ended = matches!(more, Ok(0));
        // The first of a batch waits for others.
        if !batch.is_empty() && batch.len() < BATCH && more.is_ok() && !ended {
            tokio::time::sleep(EVERY / 10).await;
            while batch.len() < BATCH
                && let Ok(span) = spans.try_recv()
            {
                batch.push(span);
            }
        }
        if !batch.is_empty() {
            let body = encode(&service, &batch).to_string();
            if let Err(error) =
                tokio::time::timeout(TIMEOUT, send(&collector, body)).await.unwrap_or_else(|e| Err(e.into()))
            {
                tracing::warn!(%error, %collector, spans = batch.len(), "spans are lost: the collector does not take them");
            }
            batch.clear();
        }
        if ended {
            return;
        }
    }
}

async fn send(collector: &Uri, body: String) -> anyhow::Result<()> {
    let host = collector.authority().map(ToString::to_string).unwrap_or_default();
    let address = if collector.port_u16().is_some() { host.clone() } else { format!("{host}:4318") };
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let path = collector.path_and_query().map_or("/v1/traces", |p| p.as_str());
    let request = Request::post(path)
        .header(header::HOST, host)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    response.into_body().collect().await?;
    anyhow::ensure!(status.is_success(), "it answers {status}");
    Ok(())
}

/// An `ExportTraceServiceRequest`. Identifiers are hexadecimal and 64-bit numbers are text in this form.
fn encode(service: &str, spans: &[Span]) -> Value {
    json!({"resourceSpans": [{
        "resource": {"attributes": [attribute("service.name", service)]},
        "scopeSpans": [{"scope": {"name": "sluice-proxy"}, "spans": spans.iter().map(span).collect::<Vec<_>>()}],
    }]})
}

fn attribute(key: &str, value: &str) -> Value {
    json!({"key": key, "value": {"stringValue": value}})
}

fn span(s: &Span) -> Value {
    let (e, t) = (&s.exchange, &s.trace);
    let began = e.began_ns();
    let mut attributes = vec![
        attribute("http.request.method", &e.method),
        attribute("url.path", &e.path),
        attribute("server.address", &e.host),
        attribute("sluice.backend", &e.key.backend.to_string()),
    ];
    let more = [
        ("http.response.status_code", e.status.map(|s| s.to_string())),
        ("sluice.route", e.key.route.as_ref().map(ToString::to_string)),
        ("sluice.reason", e.reason.map(str::to_owned)),
        ("sluice.peer", e.peer.as_ref().map(|p| p.to_string())),
        ("network.peer.address", e.endpoint.map(|a| a.to_string())),
    ];
    attributes.extend(more.into_iter().filter_map(|(key, value)| Some(attribute(key, &value?))));
    let mut span = json!({
        "traceId": format!("{:032x}", t.trace),
        "spanId": format!("{:016x}", t.span),
        "name": format!("{} {}", e.method, e.key.backend),
        // SPAN_KIND_SERVER and SPAN_KIND_CLIENT.
        "kind": if e.inbound() { 2 } else { 3 },
        "startTimeUnixNano": began.to_string(),
        "endTimeUnixNano": (began + e.took.as_nanos()).to_string(),
        "attributes": attributes,
        "status": {"code": if e.failed() { 2 } else { 0 }},
    });
    if t.parent != 0 {
        span["parentSpanId"] = format!("{:016x}", t.parent).into();
    }
    span
}
