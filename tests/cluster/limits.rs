//! What bounds a service's callers and judges its endpoints, as an app behind a sidecar sees it: of backends with a sidecar, and of
//! backends without. Endpoints are slow or fail as `/faults` asks.

use crate::{
    cluster::Cluster,
    features::{answers, meshed_or_not, report, route, to, with_and_without_sidecars},
    load::{self, deliveries, echo, service},
    mesh::{backend_policy, in_force},
    network::script,
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const NAMESPACE: &str = "bounded";
/// Seconds in which a policy must be seen to be in force.
const SOON: u64 = 40;

pub fn limits_hold_with_and_without_sidecars(c: &Cluster) -> Result<()> {
    with_and_without_sidecars(c, NAMESPACE, all_of_them)
}

fn all_of_them(c: &Cluster, inject: &str) -> Result<()> {
    c.namespace(NAMESPACE, true)?;
    let app = |version: &str| meshed_or_not(echo(NAMESPACE, &format!("echo-{version}"), version, 1), inject);
    let of = |version: &str| service(NAMESPACE, &format!("echo-{version}"), json!({"app": "echo", "version": version}));
    let all = |name: &str| service(NAMESPACE, name, json!({"app": "echo"}));
    c.apply(&[app("v1"), app("v2"), of("v1"), of("v2"), all("echo"), all("again"), all("copied")])?;
    let again = json!([{"retry": {"codes": [500], "attempts": 3}, "backendRefs": to("v2", 80)}]);
    let mirror = json!({"backendRef": {"name": "echo-v2", "port": 80}, "percent": 25});
    let copied =
        json!([{"filters": [{"type": "RequestMirror", "requestMirror": mirror}], "backendRefs": to("v1", 80)}]);
    c.apply(&[
        route(NAMESPACE, "HTTPRoute", "again", ("again", 80), again),
        route(NAMESPACE, "HTTPRoute", "copied", ("copied", 80), copied),
    ])?;
    c.rollout(NAMESPACE, "echo-v1")?;
    c.rollout(NAMESPACE, "echo-v2")?;
    for name in ["again", "copied"] {
        in_force(c, NAMESPACE, "httproute", name)?;
    }
    a_share_is_copied(c, inject)?;
    heads_are_bounded(c)?;
    connections_of_bytes(c)?;
    connections_of_requests(c, inject == "enabled")?;
    retries_at_a_time(c, inject)?;
    success_and_panic(c)?;
    connections_live_as_asked(c)
}

fn policy(c: &Cluster, service: &str, spec: Value) -> Result<()> {
    backend_policy(c, NAMESPACE, service, spec)
}

/// How v2 answers from now on.
fn v2(c: &Cluster, faults: &str) -> Result<()> {
    load::faults(c, NAMESPACE, "v2", faults)
}

fn load(c: &Cluster, host: &str, more: &str) -> Result<Value> {
    report(c, NAMESPACE, &format!("/load --url=http://{host}/ {more}"))
}

fn circuit_open(report: &Value) -> u64 {
    report["failures"]["status 503 circuit_open"]["count"].as_u64().unwrap_or(0)
}

/// Logs outlive their pods: ids are other ones each time.
fn a_share_is_copied(c: &Cluster, inject: &str) -> Result<()> {
    let prefix = format!("copied-{inject}");
    let seen = load(c, "copied", &format!("--rps=100 --duration=4 --id-prefix={prefix}-"))?;
    ensure!(seen["ok"] == 400 && seen["versions"] == json!({"v1": 400}), "{seen}");
    let copies = deliveries(c, NAMESPACE, &prefix)?.values().filter(|n| **n == 2).count();
    // At random: 100 are expected, with a deviation of 8.7.
    ensure!((60..=140).contains(&copies), "{copies} of 400 were copied, at 25 %");
    Ok(())
}

/// Whatever the path to the app, the caller's own sidecar says no.
fn heads_are_bounded(c: &Cluster) -> Result<()> {
    let long = "x-long: $(busybox head -c 70000 /dev/zero | busybox tr '\\0' a)\\r\\n";
    let so_many = |n: u32| format!("$(for n in $(busybox seq {n}); do printf '%s' \"x-$n: 1\\r\\n\"; done)");
    let asked = |more: &str| {
        format!(
            "printf \"GET / HTTP/1.1\\r\\nhost: echo\\r\\nconnection: close\\r\\n{more}\\r\\n\" | nc -w 5 echo 80 | \
             busybox tr '\\r\\n' '  '; echo"
        )
    };
    let seen = answers(c, NAMESPACE, &[asked(long), asked(&so_many(120)), asked(&so_many(80))])?;
    for refused in &seen[..2] {
        ensure!(refused.contains(" 431 ") && refused.contains("x-sluice-reason: head_too_large"), "{refused}");
    }
    ensure!(seen[2].contains(" 200 "), "{}", seen[2]);
    Ok(())
}

/// A connection that is not HTTP does not wait for another's end: it is refused.
fn connections_of_bytes(c: &Cluster) -> Result<()> {
    let beside = "(echo who; sleep 3) | nc echo-v2 9000 & sleep 1; echo who | nc -w 5 echo-v2 9000; wait";
    let answered = || Ok::<_, anyhow::Error>(script(c, NAMESPACE, "bytes", beside)?.matches("v2 echo-").count());
    ensure!(answered()? == 2, "without a policy there is no bound");
    policy(c, "echo-v2", json!({"circuitBreaker": {"maxConnections": 1}}))?;
    c.wait("a second connection is refused", SOON, || Ok(answered()? == 1)).map(drop)
}

/// Connections to a sidecar carry many requests, those to an app one: then the others wait, and not for ever.
fn connections_of_requests(c: &Cluster, shared: bool) -> Result<()> {
    v2(c, r#"{"delay_ms":300}"#)?;
    policy(
        c,
        "echo-v2",
        json!({"circuitBreaker": {"maxConnections": 1, "maxRequests": 5}, "connectTimeout": "400ms"}),
    )?;
    // Of forty in two seconds: five at a time are some 33, one at a time 7.
    let wanted = if shared { 25..=38 } else { 3..=12 };
    c.wait("as many requests at a time as connections carry", SOON, || {
        let seen = load(c, "echo-v2", "--rps=20 --duration=2")?;
        let (ok, most) = (seen["ok"].as_u64().context("ok")?, seen["max_ms"].as_f64().context("max_ms")?);
        eprintln!("one connection, five requests: {seen}");
        Ok(wanted.contains(&ok) && ok + circuit_open(&seen) == 40 && most < 900.0)
    })?;
    if shared {
        return Ok(());
    }
    c.kubectl(&["-n", NAMESPACE, "delete", "backendpolicy", "echo-v2"])?;
    c.wait("there is no bound", SOON, || Ok(load(c, "echo-v2", "--rps=20 --duration=2")?["ok"] == 40))?;
    policy(
        c,
        "echo-v2",
        json!({"circuitBreaker": {"maxConnections": 1, "maxPendingRequests": 1}, "connectTimeout": "5s"}),
    )?;
    c.wait("one waits, and the others need not", SOON, || {
        let seen = load(c, "echo-v2", "--rps=20 --duration=2")?;
        let (ok, most) = (seen["ok"].as_u64().context("ok")?, seen["max_ms"].as_f64().context("max_ms")?);
        eprintln!("one connection, one waits: {seen}");
        Ok(ok >= 5 && ok + circuit_open(&seen) == 40 && most < 900.0)
    })
    .map(drop)
}

fn retries_at_a_time(c: &Cluster, inject: &str) -> Result<()> {
    v2(c, r#"{"delay_ms":300,"fail_percent":100}"#)?;
    let mut turn = 0;
    let budget = json!({"percent": 100, "minPerSecond": 1000});
    policy(c, "echo-v2", json!({"circuitBreaker": {"maxRetries": 1}, "retryBudget": budget}))?;
    c.wait("one retry at a time", SOON, || {
        turn += 1;
        let prefix = format!("retried-{inject}{turn}");
        let seen = load(c, "again", &format!("--rps=20 --duration=2 --id-prefix={prefix}-"))?;
        let delivered: u32 = deliveries(c, NAMESPACE, &prefix)?.values().sum();
        eprintln!("one retry at a time: {delivered} deliveries of 40 requests");
        // One after the other in 2.6 s, 300 ms each; without that bound 160.
        Ok(seen["failed"] == 40 && (42..=55).contains(&delivered))
    })?;
    c.kubectl(&["-n", NAMESPACE, "delete", "backendpolicy", "echo-v2"])?;
    v2(c, r#"{"delay_ms":0,"fail_percent":0}"#)
}

/// v2 fails every second time, never often in a row.
fn success_and_panic(c: &Cluster) -> Result<()> {
    v2(c, r#"{"fail_percent":50}"#)?;
    let outlier = |more: Value| {
        let mut outlier = json!({"consecutiveFailures": 1000, "ejectionTime": "60s"});
        outlier.as_object_mut().expect("fields").extend(more.as_object().expect("fields").clone());
        json!({"balancing": {"policy": "RoundRobin"}, "outlierDetection": outlier})
    };
    let judged = json!({"successPercent": 90, "minRequests": 10, "interval": "1s"});
    policy(c, "echo", outlier(judged.clone()))?;
    c.wait("who fails too often gets no more", SOON, || {
        let seen = load(c, "echo", "--rps=40 --duration=4")?;
        let (failed, v2) = (seen["failed"].as_u64().context("failed")?, seen["versions"]["v2"].as_u64().unwrap_or(0));
        eprintln!("judged by success: {seen}");
        // Of 160 it is to get 80, and fails 40 of them.
        Ok((3..=25).contains(&failed) && v2 <= 25)
    })?;
    let mut panicking = judged;
    panicking["panicPercent"] = 60.into();
    policy(c, "echo", outlier(panicking))?;
    c.wait("where too few are well all are used", SOON, || {
        let seen = load(c, "echo", "--rps=40 --duration=4")?;
        eprintln!("with half of them well: {seen}");
        Ok(seen["failed"] == 40)
    })?;
    c.kubectl(&["-n", NAMESPACE, "delete", "backendpolicy", "echo"])?;
    v2(c, r#"{"fail_percent":0}"#)
}

/// The sockets of a caller's sidecar have the timer that was asked for, and are gone once they were idle for as long as asked.
fn connections_live_as_asked(c: &Cluster) -> Result<()> {
    policy(c, "echo-v1", json!({"tcpKeepalive": "7s", "idleTimeout": "2s"}))?;
    // With pauses in which its connection is idle.
    let asks = "trap 'exit 0' TERM; while :; do wget -q -O /dev/null http://echo-v1/; sleep 10 & wait $!; done";
    c.apply(&[json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "caller", "namespace": NAMESPACE},
        "spec": {"containers": [{"name": "sh", "image": "sluice.local/echo:1", "command": ["/bin/sh", "-c", asks]}]}
    })])?;
    c.kubectl(&["-n", NAMESPACE, "wait", "--for=condition=Ready", "pod/caller", "--timeout=60s"])?;
    let (node, pid) = c.sidecar(NAMESPACE, "caller")?.context("the caller's sidecar")?;
    // To the app's port: what the app itself dials is the service's.
    let sockets = || c.inside(&node, &format!("nsenter -t {pid} -n ss -tnoH state established dport = :8080"));
    let timer = c.wait_for("a connection with the timer", SOON, || {
        Ok(sockets()?.split_once("timer:(keepalive,").map(|(_, timer)| timer.to_owned()))
    })?;
    let seconds = timer.split(['s', 'm', '.']).next().and_then(|t| t.parse::<u32>().ok());
    ensure!(seconds.is_some_and(|s| s <= 7), "{timer}");
    c.wait("it is closed when idle", 20, || Ok(sockets()?.is_empty()))
        .map(drop)
        .with_context(|| sockets().unwrap_or_default())
}
