//! Probes: what an answer means over time is PURE (`Tally`); asking is a thin shell. TCP and HTTP are dialled with a
//! socket that belongs to the pod's network namespace, towards the pod's own address, so that neither capture nor a
//! service is in between; exec goes through the runtime.

use super::{PodNetwork, cri::Cri};
use k8s_openapi::{
    api::core::v1::{ExecAction, HTTPGetAction, Probe},
    apimachinery::pkg::util::intstr::IntOrString,
};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Counts successes and failures in a row against a probe's thresholds (Kubernetes' defaults: 1 and 3).
#[derive(Clone, Copy, Debug)]
pub struct Tally {
    success_threshold: u32,
    failure_threshold: u32,
    run: u32,
    last: bool,
    pub passing: bool,
}

impl Tally {
    pub fn new(p: &Probe, passing: bool) -> Self {
        let at_least_one =
            |v: Option<i32>, default: u32| v.and_then(|v| u32::try_from(v).ok()).unwrap_or(default).max(1);
        Self {
            success_threshold: at_least_one(p.success_threshold, 1),
            failure_threshold: at_least_one(p.failure_threshold, 3),
            run: 0,
            last: passing,
            passing,
        }
    }

    /// Takes one answer; true when `passing` changed, or failed for the failure threshold again.
    pub fn count(&mut self, ok: bool) -> bool {
        self.run = if ok == self.last { self.run.saturating_add(1) } else { 1 };
        self.last = ok;
        let threshold = if ok { self.success_threshold } else { self.failure_threshold };
        if self.run < threshold || self.passing == ok {
            return false;
        }
        self.passing = ok;
        true
    }
}

pub fn period(p: &Probe) -> Duration {
    seconds(p.period_seconds, 10)
}

pub fn timeout(p: &Probe) -> Duration {
    seconds(p.timeout_seconds, 1)
}

pub fn initial_delay(p: &Probe) -> Duration {
    Duration::from_secs(p.initial_delay_seconds.and_then(|v| u64::try_from(v).ok()).unwrap_or(0))
}

fn seconds(v: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(v.and_then(|v| u64::try_from(v).ok()).unwrap_or(default).max(1))
}

/// Where and how to ask.
#[derive(Clone)]
pub struct Target {
    pub container: String,
    pub ip: IpAddr,
    /// UID of the pod whose network namespace is dialled from; none for host-network pods.
    pub pod: Option<String>,
    pub network: Arc<dyn PodNetwork>,
    /// Named ports of the container.
    pub ports: Vec<(String, u16)>,
    pub cri: Cri,
}

/// One answer; the error is what `kubectl describe` shows.
pub async fn ask(p: &Probe, t: &Target) -> Result<(), String> {
    let limit = timeout(p);
    match tokio::time::timeout(limit, ask_once(p, t, limit)).await {
        Ok(answer) => answer,
        Err(_) => Err(format!("no answer within {} s", limit.as_secs())),
    }
}

async fn ask_once(p: &Probe, t: &Target, limit: Duration) -> Result<(), String> {
    if let Some(e) = &p.exec {
        return exec(e, t, limit).await;
    }
    if let Some(h) = &p.http_get {
        return http(h, t).await;
    }
    if let Some(s) = &p.tcp_socket {
        return dial(t, &s.port, s.host.as_deref().and_then(|h| h.parse().ok())).await.map(|_| ());
    }
    Err("the probe names neither exec, httpGet nor tcpSocket".to_owned())
}

/// A command in the container; success is exit code 0.
pub async fn exec(e: &ExecAction, t: &Target, limit: Duration) -> Result<(), String> {
    match t.cri.exec(&t.container, e.command.clone().unwrap_or_default(), limit).await {
        Ok((0, _)) => Ok(()),
        Ok((code, out)) => Err(format!("command ended with {code}: {}", out.trim())),
        Err(e) => Err(e.to_string()),
    }
}

/// A GET; success is a status of 200–399.
pub async fn http(h: &HTTPGetAction, t: &Target) -> Result<(), String> {
    let host = h.host.as_deref().and_then(|h| h.parse().ok());
    let stream = dial(t, &h.port, host).await?;
    let headers: Vec<_> = h.http_headers.iter().flatten().map(|x| (x.name.clone(), x.value.clone())).collect();
    http_get(stream, h.path.as_deref().unwrap_or("/"), &t.ip.to_string(), &headers).await
}

async fn dial(t: &Target, port: &IntOrString, host: Option<IpAddr>) -> Result<tokio::net::TcpStream, String> {
    let port = resolve(port, &t.ports).ok_or_else(|| format!("port {port:?} is not one of the container's"))?;
    let to = SocketAddr::new(host.unwrap_or(t.ip), port);
    let socket = socket(t, to).map_err(|e| format!("socket in the pod's namespace: {e}"))?;
    socket.connect(to).await.map_err(|e| format!("dial {to}: {e}"))
}

fn socket(t: &Target, to: SocketAddr) -> std::io::Result<tokio::net::TcpSocket> {
    if let Some(uid) = &t.pod {
        let s = t.network.tcp_socket(uid, to)?;
        s.set_nonblocking(true)?;
        return Ok(tokio::net::TcpSocket::from_std_stream(s));
    }
    if to.is_ipv4() { tokio::net::TcpSocket::new_v4() } else { tokio::net::TcpSocket::new_v6() }
}

fn resolve(port: &IntOrString, named: &[(String, u16)]) -> Option<u16> {
    match port {
        IntOrString::Int(n) => u16::try_from(*n).ok(),
        IntOrString::String(s) => named.iter().find(|(n, _)| n == s).map(|(_, p)| *p).or_else(|| s.parse().ok()),
    }
}

/// Status 200–399 is healthy (Kubernetes API, Probe.httpGet). The body is not read.
async fn http_get(
    mut s: tokio::net::TcpStream,
    path: &str,
    host: &str,
    headers: &[(String, String)],
) -> Result<(), String> {
    let mut req = format!("GET {path} HTTP/1.1\r\nConnection: close\r\nUser-Agent: sluice-probe\r\n");
    if !headers.iter().any(|(k, _)| k.eq_ignore_ascii_case("host")) {
        req.push_str(&format!("Host: {host}\r\n"));
    }
    for (k, v) in headers.iter().filter(|(k, v)| !format!("{k}{v}").contains(['\r', '\n'])) {
        req.push_str(&format!("{k}: {v}\r\n"));
    }
    req.push_str("\r\n");
    s.write_all(req.as_bytes()).await.map_err(|e| format!("send: {e}"))?;
    let mut line = Vec::with_capacity(64);
    while !line.contains(&b'\n') && line.len() < 256 {
        let mut buf = [0u8; 64];
        match s.read(&mut buf).await {
            Ok(0) => break,
            Ok(n) => line.extend_from_slice(&buf[..n]),
            Err(e) => return Err(format!("read: {e}")),
        }
    }
    match status_code(&line) {
        Some(200..=399) => Ok(()),
        Some(code) => Err(format!("HTTP probe failed with statuscode: {code}")),
        None => Err("the answer is not HTTP".to_owned()),
    }
}

fn status_code(line: &[u8]) -> Option<u16> {
    let text = std::str::from_utf8(line.get(..line.len().min(16))?).ok()?;
    text.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.get(..3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_count_answers_in_a_row() {
        let p = Probe { success_threshold: Some(2), failure_threshold: Some(3), ..Probe::default() };
        let mut t = Tally::new(&p, false);
        let seen: Vec<bool> = [true, false, true, true, false, false, true, false, false, false]
            .into_iter()
            .map(|ok| {
                t.count(ok);
                t.passing
            })
            .collect();
        assert_eq!(seen, [false, false, false, true, true, true, true, true, true, false]);
    }

    #[test]
    fn status_lines_are_read_defensively() {
        for (line, want) in [
            ("HTTP/1.1 200 OK\r\n", Some(200)),
            ("HTTP/1.0 503 x", Some(503)),
            ("SSH-2.0", None),
            ("", None),
            ("HTTP/1.1 2", None),
        ] {
            assert_eq!(status_code(line.as_bytes()), want, "{line}");
        }
    }
}
