//! `sluice tap`: the requests of a pod as its sidecar sees them, live, and what the sidecar holds. The node's agent is asked
//! through the API.

use crate::client::{block_on, connect};
use anyhow::{Context, Result, bail};
use clap::Args;
use futures::{AsyncBufReadExt, AsyncReadExt};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use serde_json::Value;
use sluice_wire::sidecar;
use std::{io::Write, path::Path};

#[derive(Args, Clone, Debug)]
pub struct Options {
    /// `namespace/name`, or a name in the namespace default
    pod: String,
    /// Only requests that came in, or that went out
    #[arg(long, value_parser = ["inbound", "outbound"])]
    direction: Option<String>,
    #[arg(long)]
    method: Option<String>,
    /// Only paths that begin so
    #[arg(long)]
    path: Option<String>,
    /// Only this status (503), or class (5xx)
    #[arg(long)]
    status: Option<String>,
    /// Only requests that this route took: `namespace/name`
    #[arg(long)]
    route: Option<String>,
    /// Only requests to this backend: `namespace/name`
    #[arg(long)]
    backend: Option<String>,
    /// Only requests that took at least so many milliseconds
    #[arg(long)]
    min_ms: Option<u64>,
    /// End after so many requests
    #[arg(long)]
    count: Option<u64>,
    /// One JSON object per line
    #[arg(long)]
    json: bool,
    /// Instead of requests, show what the sidecar holds
    #[arg(long, value_parser = ["config", "compiled", "pools", "certificates", "metrics"])]
    show: Option<String>,
}

impl Options {
    fn names(&self) -> (&str, &str) {
        self.pod.split_once('/').unwrap_or(("default", &self.pod))
    }

    fn query(&self) -> String {
        let min_ms = self.min_ms.map(|ms| ms.to_string());
        let pairs = [
            ("direction", &self.direction),
            ("method", &self.method),
            ("path", &self.path),
            ("status", &self.status),
            ("route", &self.route),
            ("backend", &self.backend),
            ("min_ms", &min_ms),
        ];
        let (namespace, name) = self.names();
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("pod", &format!("{namespace}/{name}"));
        query.append_pair("subject", self.show.as_deref().unwrap_or("tap"));
        for (key, value) in pairs.iter().filter_map(|(key, value)| Some((key, value.as_ref()?))) {
            query.append_pair(key, value);
        }
        query.finish()
    }
}

/// Until Ctrl-C, the count that was asked for, or the end of the stream.
pub fn run(kubeconfig: &Path, options: &Options) -> Result<()> {
    block_on(async {
        let client = connect(kubeconfig).await?;
        tokio::select! {
            ended = follow(client, options) => ended,
            pressed = tokio::signal::ctrl_c() => pressed.context("wait for Ctrl-C"),
        }
    })
}

async fn follow(client: Client, options: &Options) -> Result<()> {
    let (namespace, name) = options.names();
    let pod = Api::<Pod>::namespaced(client.clone(), namespace).get(name).await;
    let pod = pod.with_context(|| format!("get pod {namespace}/{name}"))?;
    let node = pod.spec.and_then(|s| s.node_name).context("the pod is on no node yet")?;
    let path = format!("/api/v1/nodes/{node}/proxy{}?{}", sidecar::PATH, options.query());
    let request = http::Request::get(path).body(Vec::new())?;
    let mut answer = client.request_stream(request).await.with_context(|| format!("ask node {node}"))?;
    if options.show.is_some() {
        let mut all = Vec::new();
        answer.read_to_end(&mut all).await.context("read the answer")?;
        std::io::stdout().write_all(&all)?;
        return Ok(());
    }
    let mut lines = answer.lines();
    let mut seen = 0;
    while let Some(line) = futures::StreamExt::next(&mut lines).await {
        let line = line.context("the stream broke")?;
        // A sign of life.
        if line.is_empty() {
            continue;
        }
        let Ok(value) = serde_json::from_str::<Value>(&line) else { bail!("the sidecar says: {line}") };
        if options.json {
            println!("{line}")
        } else {
            println!("{}", text(&value))
        }
        seen += u64::from(value.get("missed").is_none());
        if options.count.is_some_and(|count| seen >= count) {
            return Ok(());
        }
    }
    Ok(())
}

/// A request as a line for people.
fn text(e: &Value) -> String {
    if let Some(missed) = e.get("missed") {
        return format!("… {missed} requests missed: they came faster than they were read");
    }
    let field = |name: &str| e[name].as_str().unwrap_or("-").to_owned();
    let status = e["status"].as_u64().map_or("none".to_owned(), |s| s.to_string());
    let arrow = if e["direction"] == "inbound" { "<-" } else { "->" };
    let mut line = format!(
        "{} {arrow} {status} {:>8.2} ms {} {}{} {} {}",
        field("time"),
        e["durationMs"].as_f64().unwrap_or(0.0),
        field("method"),
        field("host"),
        field("path"),
        field("backend"),
        field("endpoint"),
    );
    for (name, label) in [("route", "route"), ("peer", "peer"), ("reason", "reason"), ("traceId", "trace")] {
        if let Some(value) = e[name].as_str() {
            line += &format!(" {label}={value}");
        }
    }
    if let Some(retries) = e["retries"].as_u64().filter(|n| *n > 0) {
        line += &format!(" retries={retries}");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_line_has_what_there_is() {
        let e = json!({
            "time": "2026-01-02T03:04:05Z", "direction": "outbound", "method": "GET", "host": "echo", "path": "/a",
            "route": "shop/r", "backend": "shop/v1", "endpoint": "10.0.0.1:80", "peer": null, "status": 503,
            "reason": "no_endpoints", "retries": 1, "durationMs": 1.5, "traceId": null,
        });
        let wanted = "2026-01-02T03:04:05Z -> 503     1.50 ms GET echo/a shop/v1 10.0.0.1:80 route=shop/r \
                      reason=no_endpoints retries=1";
        assert_eq!(text(&e), wanted);
        assert!(text(&json!({"missed": 3})).contains("3 requests missed"));
    }
}
