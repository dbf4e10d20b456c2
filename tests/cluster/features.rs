//! What rules ask for, one by one, as an app behind a sidecar sees it: of backends with a sidecar, and of backends without.

use crate::{
    cluster::Cluster,
    load::{echo, service},
    mesh::{in_force, own_in},
    network::{script, script_on},
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const NAMESPACE: &str = "asked";
const GATEWAY_API: &str = "gateway.networking.k8s.io";

pub fn rules_hold_with_and_without_sidecars(c: &Cluster) -> Result<()> {
    with_and_without_sidecars(c, NAMESPACE, all_of_them)
}

/// `test`, which makes what it needs in the namespace, of backends with a sidecar and of backends without.
pub fn with_and_without_sidecars(
    c: &Cluster,
    namespace: &str,
    test: impl Fn(&Cluster, &str) -> Result<()>,
) -> Result<()> {
    for inject in ["enabled", "disabled"] {
        test(c, inject).with_context(|| format!("backends' sidecars {inject}"))?;
        c.delete_namespace(namespace)?;
    }
    Ok(())
}

fn all_of_them(c: &Cluster, inject: &str) -> Result<()> {
    c.namespace(NAMESPACE, true)?;
    let backend = |version: &str| meshed_or_not(echo(NAMESPACE, &format!("echo-{version}"), version, 1), inject);
    let of = |version: &str| service(NAMESPACE, &format!("echo-{version}"), json!({"app": "echo", "version": version}));
    c.apply(&[backend("v1"), backend("v2"), of("v1"), of("v2"), service(NAMESPACE, "echo", json!({"app": "echo"}))])?;
    c.apply(&[service(NAMESPACE, "calls", json!({"app": "echo"}))])?;
    c.apply(&filters())?;
    c.apply(&[http_route(), grpc_route(), tcp_route()])?;
    c.rollout(NAMESPACE, "echo-v1")?;
    c.rollout(NAMESPACE, "echo-v2")?;
    for (kind, name) in [("httproute", "echo"), ("grpcroute", "calls"), ("tcproute", "bytes")] {
        in_force(c, NAMESPACE, kind, name)?;
    }
    requests(c)?;
    calls_and_bytes(c)?;
    failing_backends(c)
}

pub fn meshed_or_not(mut app: Value, inject: &str) -> Value {
    app["spec"]["template"]["metadata"]["labels"]["sluice.dev/inject"] = inject.into();
    app
}

pub fn to(version: &str, port: u16) -> Value {
    json!([{"name": format!("echo-{version}"), "port": port}])
}

/// A rule for a path, with more to it.
fn rule(path: &str, more: Value) -> Value {
    let mut rule = json!({"matches": [{"path": {"type": "PathPrefix", "value": path}}], "backendRefs": to("v1", 80)});
    for (field, value) in more.as_object().into_iter().flatten() {
        rule[field] = value.clone();
    }
    rule
}

fn extension(name: &str) -> Value {
    json!({"filters": [{"type": "ExtensionRef", "extensionRef": {"group": "sluice.dev", "kind": "RouteFilter", "name": name}}]})
}

pub fn route(namespace: &str, kind: &str, name: &str, service: (&str, u16), rules: Value) -> Value {
    let (service, port) = service;
    let parent = json!({"group": "", "kind": "Service", "name": service, "port": port});
    json!({
        "apiVersion": format!("{GATEWAY_API}/{}", if kind == "TCPRoute" { "v1alpha2" } else { "v1" }), "kind": kind,
        "metadata": {"name": name, "namespace": namespace}, "spec": {"parentRefs": [parent], "rules": rules}
    })
}

fn filters() -> Vec<Value> {
    let own = |name: &str, spec: Value| own_in(NAMESPACE, "RouteFilter", name, spec);
    vec![
        own("slow", json!({"fault": {"delay": {"duration": "300ms", "percent": 100}}})),
        own("small", json!({"maxRequestBytes": 100})),
    ]
}

fn http_route() -> Value {
    let headers = json!({"set": [{"name": "x-team", "value": "blue"}], "add": [{"name": "x-more", "value": "yes"}],
                         "remove": ["x-secret"]});
    let matched = |what: Value| json!({"matches": [what], "backendRefs": to("v2", 80)});
    let halves = json!([{"name": "echo-v1", "port": 80, "weight": 50}, {"name": "echo-v2", "port": 80, "weight": 50}]);
    let path = |value: &str| json!({"type": "PathPrefix", "value": value});
    route(
        NAMESPACE,
        "HTTPRoute",
        "echo",
        ("echo", 80),
        json!([
            rule("/set", json!({"filters": [{"type": "RequestHeaderModifier", "requestHeaderModifier": headers}]})),
            rule(
                "/mirrored",
                json!({"filters": [{"type": "RequestMirror",
                "requestMirror": {"backendRef": {"name": "echo-v2", "port": 80}}}]})
            ),
            rule("/slow", extension("slow")),
            rule("/small", extension("small")),
            rule("/late", json!({"timeouts": {"request": "100ms"}, "backendRefs": to("v2", 80)})),
            rule("/try", json!({"timeouts": {"backendRequest": "100ms"}, "backendRefs": to("v2", 80)})),
            rule("/again", json!({"retry": {"codes": [500], "attempts": 3}, "backendRefs": to("v2", 80)})),
            rule("/once", json!({"backendRefs": to("v2", 80)})),
            rule(
                "/kept",
                json!({"sessionPersistence": {"type": "Header", "sessionName": "x-user"}, "backendRefs": halves})
            ),
            rule(
                "/cookie",
                json!({"sessionPersistence": {"type": "Cookie", "sessionName": "who"}, "backendRefs": halves})
            ),
            matched(json!({"path": path("/by"), "method": "POST"})),
            matched(json!({"path": path("/by"), "headers": [{"name": "x-tester", "value": "yes"}]})),
            matched(
                json!({"path": path("/by"), "queryParams": [{"type": "RegularExpression", "name": "q", "value": "[0-9]+"}]})
            ),
            matched(json!({"path": {"type": "RegularExpression", "value": "/by/v[0-9]+/x"}})),
            matched(json!({"path": {"type": "Exact", "value": "/by/exactly"}})),
            rule("/by", json!({})),
        ]),
    )
}

fn grpc_route() -> Value {
    let method = json!({"method": {"service": "pkg.Orders", "method": "Place"}});
    route(
        NAMESPACE,
        "GRPCRoute",
        "calls",
        ("calls", 80),
        json!([{"matches": [method], "backendRefs": to("v2", 80)}, {"backendRefs": to("v1", 80)}]),
    )
}

fn tcp_route() -> Value {
    let weighted =
        json!([{"name": "echo-v1", "port": 9000, "weight": 0}, {"name": "echo-v2", "port": 9000, "weight": 1}]);
    route(NAMESPACE, "TCPRoute", "bytes", ("echo", 9000), json!([{"backendRefs": weighted}]))
}

/// One request over a connection of its own; the answer with its head, as one line.
pub fn ask(path: &str, method: &str, more: &str) -> String {
    format!(
        "printf '{method} {path} HTTP/1.1\\r\\nhost: echo\\r\\nconnection: close\\r\\n{more}\\r\\n' | nc -w 5 echo 80 | \
         busybox tr '\\r\\n' '  '; echo"
    )
}

pub fn answers(c: &Cluster, namespace: &str, asks: &[String]) -> Result<Vec<String>> {
    let seen = script(c, namespace, "asks", &asks.join("; "))?;
    let lines: Vec<String> = seen.lines().filter(|l| l.starts_with("HTTP/1.1 ")).map(str::to_owned).collect();
    ensure!(lines.len() == asks.len(), "{} answers to {}: {seen}", lines.len(), asks.len());
    Ok(lines)
}

pub fn version(answer: &str) -> &str {
    if answer.contains("\"version\":\"v1\"") { "v1" } else { "v2" }
}

fn requests(c: &Cluster) -> Result<()> {
    let get = |path: &str, more: &str| ask(path, "GET", more);
    let seen = answers(
        c,
        NAMESPACE,
        &[
            get("/set?headers", "x-secret: s\\r\\nx-team: red\\r\\n"),
            ask("/small", "POST", "content-length: 101\\r\\n"),
            get("/by", ""),
            ask("/by", "POST", "content-length: 0\\r\\n"),
            get("/by", "x-tester: yes\\r\\n"),
            get("/by?q=12", ""),
            get("/by?q=x", ""),
            get("/by/v12/x", ""),
            get("/by/exactly", ""),
            get("/by/exactly/not", ""),
        ],
    )?;
    let set = &seen[0];
    for header in ["\"x-team\":\"blue\"", "\"x-more\":\"yes\""] {
        ensure!(set.contains(header), "{header} in {set}");
    }
    ensure!(!set.contains("x-secret"), "{set}");
    ensure!(seen[1].contains(" 413 ") && seen[1].contains("x-sluice-reason: body_too_large"), "{}", seen[1]);
    let by: Vec<_> = seen[2..].iter().map(|s| version(s)).collect();
    ensure!(by == ["v1", "v2", "v2", "v2", "v1", "v2", "v2", "v1"], "by match: {by:?} in {seen:?}");

    // A user stays where he is, with both kinds of key; all users are not in one place.
    let users: Vec<_> = (0..8).collect();
    let header = |n: &i32| format!("x-user: {n}\\r\\n");
    let twice: Vec<String> = users.iter().chain(&users).map(|n| get("/kept", &header(n))).collect();
    let kept = answers(c, NAMESPACE, &twice)?;
    let (first, second) = kept.split_at(users.len());
    ensure!(first.iter().map(|a| version(a)).eq(second.iter().map(|a| version(a))), "{kept:?}");
    ensure!(["v1", "v2"].iter().all(|v| first.iter().any(|a| version(a) == *v)), "both versions have users: {first:?}");
    let fresh = &answers(c, NAMESPACE, &[get("/cookie", "")])?[0];
    let (_, cookie) = fresh.split_once("set-cookie: ").with_context(|| fresh.clone())?;
    let cookie = cookie.split(';').next().context("a cookie")?;
    let again: Vec<String> = (0..6).map(|_| get("/cookie", &format!("cookie: {cookie}\\r\\n"))).collect();
    let again = answers(c, NAMESPACE, &again)?;
    ensure!(again.iter().all(|a| version(a) == version(fresh)), "{fresh} {again:?}");

    let slow = report(c, NAMESPACE, "/load --rps=10 --duration=1 --url=http://echo/slow")?;
    ensure!(slow["ok"] == 10 && slow["p50_ms"].as_f64().is_some_and(|ms| ms >= 300.0), "{slow}");

    // The copy comes to v2, and the answer is v1's.
    let mirrored = format!(
        "{}; until wget -q -O - http://echo-v2/log | busybox grep -q copy-1; do :; done; {}",
        get("/mirrored", "x-request-id: copy-1\\r\\n"),
        get("/by", "")
    );
    let seen = script(c, NAMESPACE, "mirrored", &mirrored)?;
    ensure!(seen.matches("HTTP/1.1 200").count() == 2 && seen.matches("\"version\":\"v1\"").count() == 2, "{seen}");
    Ok(())
}

pub fn report(c: &Cluster, namespace: &str, load: &str) -> Result<Value> {
    report_on(c, None, namespace, load)
}

/// The same of a load that runs on a node.
pub fn report_on(c: &Cluster, node: Option<&str>, namespace: &str, load: &str) -> Result<Value> {
    let seen = script_on(c, node, namespace, "load", load)?;
    let line = seen.lines().find(|l| l.starts_with('{')).with_context(|| seen.clone())?;
    Ok(serde_json::from_str(line)?)
}

fn calls_and_bytes(c: &Cluster) -> Result<()> {
    let grpc =
        "--http2 --method=POST --header=content-type=application/grpc --header=te=trailers --rps=20 --duration=1";
    for (method, version) in [("Place", "v2"), ("Cancel", "v1")] {
        let seen = report(c, NAMESPACE, &format!("/load --url=http://calls/pkg.Orders/{method} {grpc}"))?;
        ensure!(seen["failed"] == 0 && seen["versions"] == json!({version: 20}), "{method}: {seen}");
    }
    let seen = script(c, NAMESPACE, "bytes", &"echo who | nc -w 5 echo 9000; ".repeat(6))?;
    ensure!(seen.lines().count() == 6 && seen.lines().all(|l| l.starts_with("v2 ")), "by TCPRoute: {seen}");
    Ok(())
}

/// v2 becomes slow, then fails every second time.
fn failing_backends(c: &Cluster) -> Result<()> {
    let make = |faults: &str| format!("wget -q -O - --post-data '{faults}' http://echo-v2/faults");
    let get = |path: &str| ask(path, "GET", "");
    script(c, NAMESPACE, "faults", &make(r#"{"delay_ms":500}"#))?;
    for (path, answer) in ["/late", "/try"].iter().zip(answers(c, NAMESPACE, &[get("/late"), get("/try")])?) {
        let reason = if *path == "/late" { "route_timeout" } else { "try_timeout" };
        ensure!(answer.contains(" 504 ") && answer.contains(&format!("x-sluice-reason: {reason}")), "{path}: {answer}");
    }
    let policy = |spec: Value| {
        let mut spec = spec;
        spec["targetRefs"] = json!([{"kind": "Service", "name": "echo-v2"}]);
        own_in(NAMESPACE, "BackendPolicy", "echo-v2", spec)
    };
    let once = |rps: u32| format!("/load --rps={rps} --duration=2 --url=http://echo/once");
    c.apply(&[policy(json!({"circuitBreaker": {"maxRequests": 1}}))])?;
    c.wait("no second request at a time", 40, || {
        let seen = report(c, NAMESPACE, &once(20))?;
        let refused = seen["failures"]["status 503 circuit_open"]["count"].as_u64().unwrap_or(0);
        Ok(seen["ok"].as_u64().is_some_and(|ok| ok >= 2) && refused >= 20)
    })?;
    c.kubectl(&["-n", NAMESPACE, "delete", "backendpolicy", "echo-v2"])?;
    script(c, NAMESPACE, "faults", &make(r#"{"delay_ms":0,"fail_percent":50}"#))?;
    // The budget for retries may be used up by what came before.
    c.wait("what fails is tried again", 60, || {
        Ok(report(c, NAMESPACE, "/load --rps=10 --duration=2 --url=http://echo/again")?["failed"] == 0)
    })?;
    let seen = report(c, NAMESPACE, &once(20))?;
    ensure!(seen["failures"]["status 500"]["count"] == 20, "without retries half of them fail: {seen}");
    Ok(())
}
