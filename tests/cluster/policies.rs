//! What policies ask of sidecars, one by one, as an app behind one sees it: of backends with a sidecar, and of backends without.

use crate::{
    cluster::{Cluster, NODES},
    features::{answers, ask, meshed_or_not, report, report_on, route, to, version, with_and_without_sidecars},
    load::{self, Load, client, deliveries, echo, request_log, service},
    mesh::{backend_policy, in_force, own_in},
    network::script,
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::time::Instant;

const NAMESPACE: &str = "policed";
/// Seconds in which a policy must be seen to be in force.
const SOON: u64 = 40;

pub fn policies_hold_with_and_without_sidecars(c: &Cluster) -> Result<()> {
    with_and_without_sidecars(c, NAMESPACE, all_of_them)
}

fn all_of_them(c: &Cluster, inject: &str) -> Result<()> {
    c.namespace(NAMESPACE, true)?;
    for (node, zone) in NODES.into_iter().zip(["a", "b", "b"]) {
        c.kubectl(&["label", "--overwrite", "node", node, &format!("topology.kubernetes.io/zone={zone}")])?;
    }
    let on = |node: &str, version: &str| {
        let mut app = echo(NAMESPACE, &format!("echo-{version}"), version, 1);
        app["spec"]["template"]["spec"]["nodeName"] = node.into();
        meshed_or_not(app, inject)
    };
    let of = |version: &str| service(NAMESPACE, &format!("echo-{version}"), json!({"app": "echo", "version": version}));
    c.apply(&[on(NODES[0], "v1"), on(NODES[1], "v2"), of("v1"), of("v2"), of("nobody")])?;
    c.apply(&[service(NAMESPACE, "echo", json!({"app": "echo"})), service(NAMESPACE, "half", json!({"app": "echo"}))])?;
    let over = |name: &str, rules: Value| route(NAMESPACE, "HTTPRoute", name, (name, 80), rules);
    let again = json!([{"retry": {"codes": [500], "attempts": 3}, "backendRefs": to("v2", 80)}]);
    let halves = json!([{"backendRefs": [{"name": "echo-v1", "port": 80}, {"name": "echo-nobody", "port": 80}]}]);
    c.apply(&[service(NAMESPACE, "again", json!({"app": "echo"}))])?;
    c.apply(&[over("again", again), over("half", halves)])?;
    c.rollout(NAMESPACE, "echo-v1")?;
    c.rollout(NAMESPACE, "echo-v2")?;
    for name in ["again", "half"] {
        in_force(c, NAMESPACE, "httproute", name)?;
    }
    hashed(c)?;
    slow_backend(c)?;
    failing_backend(c)?;
    nobody_behind_a_share(c)?;
    nearest(c)?;
    newcomer(c)?;
    if inject == "enabled" {
        callers_are_limited_and_watched(c)?;
    }
    Ok(())
}

fn policy(c: &Cluster, service: &str, spec: Value) -> Result<()> {
    backend_policy(c, NAMESPACE, service, spec)
}

fn faults(c: &Cluster, version: &str, faults: &str) -> Result<()> {
    load::faults(c, NAMESPACE, version, faults)
}

fn load(c: &Cluster, host: &str, rps: u32, seconds: u32) -> Result<Value> {
    report(c, NAMESPACE, &format!("/load --rps={rps} --duration={seconds} --url=http://{host}/"))
}

/// A user stays with an endpoint, and all users are not at one.
fn hashed(c: &Cluster) -> Result<()> {
    policy(c, "echo", json!({"balancing": {"policy": "RingHash", "hashOn": {"header": "x-user"}}}))?;
    let get = |n: usize| ask("/", "GET", &format!("x-user: user-{n}\\r\\n"));
    let asks: Vec<String> = (0..12).chain(0..12).map(get).collect();
    c.wait("a user stays with an endpoint", SOON, || {
        let seen = answers(c, NAMESPACE, &asks)?;
        let (first, second) = seen.split_at(12);
        let both = ["v1", "v2"].iter().all(|v| first.iter().any(|a| version(a) == *v));
        Ok(both && first.iter().map(|a| version(a)).eq(second.iter().map(|a| version(a))))
    })?;
    policy(c, "echo", json!({"balancing": {"policy": "Maglev", "hashOn": {"source": true}}}))?;
    c.wait("a pod stays with an endpoint", SOON, || {
        let seen = answers(c, NAMESPACE, &asks)?;
        Ok(seen.iter().all(|a| version(a) == version(&seen[0])))
    })
    .map(drop)
}

fn slow_backend(c: &Cluster) -> Result<()> {
    faults(c, "v2", r#"{"delay_ms":600}"#)?;
    policy(c, "echo", json!({"balancing": {"policy": "LatencyWeighted"}}))?;
    c.wait("the slow one gets less", SOON, || {
        let seen = load(c, "echo", 40, 3)?;
        Ok(seen["failed"] == 0 && seen["versions"]["v2"].as_u64().unwrap_or(0) < 120 / 4)
    })?;
    let hedging = json!({"after": "100ms"});
    let budget = json!({"minPerSecond": 50});
    policy(c, "echo", json!({"balancing": {"policy": "RoundRobin"}, "hedging": hedging, "retryBudget": budget}))?;
    // In turn, every second request would take 600 ms.
    c.wait("who has no answer asks another one too", SOON, || {
        let seen = load(c, "echo", 10, 2)?;
        let most = seen["max_ms"].as_f64().context("max_ms")?;
        Ok(seen["failed"] == 0 && seen["versions"] == json!({"v1": 20}) && most < 500.0)
    })?;
    policy(c, "echo-v2", json!({"perTryTimeout": "100ms"}))?;
    c.wait("a try has its time", SOON, || {
        let seen = load(c, "echo-v2", 10, 1)?;
        Ok(seen["failures"]["status 504 try_timeout"]["count"] == 10)
    })?;
    c.kubectl(&["-n", NAMESPACE, "delete", "backendpolicy", "echo-v2"])?;
    c.wait("no try has one", SOON, || Ok(load(c, "echo-v2", 10, 1)?["failed"] == 0))?;
    faults(c, "v2", r#"{"delay_ms":0,"fail_percent":100}"#)
}

fn failing_backend(c: &Cluster) -> Result<()> {
    let outlier = json!({"consecutiveFailures": 3, "ejectionTime": "60s"});
    policy(c, "echo", json!({"balancing": {"policy": "RoundRobin"}, "outlierDetection": outlier}))?;
    c.wait("after three failures it gets no more", SOON, || {
        let seen = load(c, "echo", 20, 2)?;
        Ok(seen["failed"] == 3 && seen["versions"]["v1"] == 37)
    })?;
    let mut turn = 0;
    policy(c, "echo-v2", json!({"retryBudget": {"percent": 0, "minPerSecond": 1}}))?;
    c.wait("retries end with their budget", SOON, || {
        turn += 1;
        let prefix = format!("budget{turn}");
        let load = format!("/load --rps=20 --duration=2 --id-prefix={prefix}- --url=http://again/");
        let seen = report(c, NAMESPACE, &load)?;
        let delivered: u32 = deliveries(c, NAMESPACE, &prefix)?.values().sum();
        // One a second of ten; without that bound 160.
        Ok(seen["failed"] == 40 && (45..=50).contains(&delivered))
    })?;
    c.kubectl(&["-n", NAMESPACE, "delete", "backendpolicy", "echo-v2"])?;
    faults(c, "v2", r#"{"fail_percent":0}"#)
}

fn nobody_behind_a_share(c: &Cluster) -> Result<()> {
    let seen = load(c, "half", 20, 2)?;
    ensure!(seen["failures"]["status 503 no_endpoints"]["count"] == 20 && seen["ok"] == 20, "{seen}");
    policy(c, "echo-nobody", json!({"whenEmpty": "Redistribute"}))?;
    c.wait("the others have its share", SOON, || Ok(load(c, "half", 20, 2)?["failed"] == 0)).map(drop)
}

/// The caller is in the zone of v1.
fn nearest(c: &Cluster) -> Result<()> {
    let outlier = json!({"consecutiveFailures": 3, "ejectionTime": "60s"});
    policy(c, "echo", json!({"locality": {"healthyPercent": 50}, "outlierDetection": outlier}))?;
    let near = || report_on(c, Some(NODES[0]), NAMESPACE, "/load --rps=20 --duration=2 --url=http://echo/");
    c.wait("requests stay in their zone", SOON, || Ok(near()?["versions"] == json!({"v1": 40})))?;
    faults(c, "v1", r#"{"fail_percent":100}"#)?;
    let seen = near()?;
    ensure!(seen["failed"] == 3 && seen["versions"]["v2"] == 37, "they leave it where nobody is healthy: {seen}");
    faults(c, "v1", r#"{"fail_percent":0}"#)
}

/// An endpoint that comes has a tenth of its share at first, and all of it after a minute.
fn newcomer(c: &Cluster) -> Result<()> {
    const RPS: u32 = 50;
    let scale = |n: u32| {
        c.kubectl(&["-n", NAMESPACE, "scale", "deployment/echo-v2", &format!("--replicas={n}")])?;
        c.rollout(NAMESPACE, "echo-v2")
    };
    scale(0)?;
    policy(c, "echo", json!({"balancing": {"policy": "RoundRobin"}, "slowStart": "60s"}))?;
    let load = Load { rps: RPS, seconds: 12, fresh: false, headers: vec![] };
    let began = Instant::now();
    load.start(c, NAMESPACE, "growing", "http://echo/")?;
    scale(1)?;
    let there = began.elapsed();
    let report = load.finish(c, NAMESPACE, "growing")?;
    let left = f64::from(load.seconds) - there.as_secs_f64();
    let v2 = report["versions"]["v2"].as_f64().unwrap_or(0.0);
    let share = v2 / (left * f64::from(RPS));
    eprintln!("a newcomer had {share:.2} of the requests in its first {left:.0} s");
    ensure!(report["failed"] == 0 && left > 4.0, "{report}, there after {there:?}");
    ensure!(share > 0.02 && share < 0.3, "{share:.2}: {report}");
    c.kubectl(&["-n", NAMESPACE, "delete", "pod", "growing", "--timeout=60s"])?;
    c.kubectl(&["-n", NAMESPACE, "delete", "backendpolicy", "echo"]).map(drop)
}

/// Of all series of a metric, in Prometheus' text.
fn total(metrics: &str, name: &str) -> f64 {
    let lines = metrics.lines().filter(|l| l.starts_with(name));
    lines.filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// What the called pods' sidecars do.
fn callers_are_limited_and_watched(c: &Cluster) -> Result<()> {
    let v1 = |more: Value| {
        let mut spec = json!({"selector": {"matchLabels": {"app": "echo", "version": "v1"}}});
        spec.as_object_mut().expect("a spec").extend(more.as_object().expect("fields").clone());
        spec
    };
    let audit = json!({"action": "Deny", "mode": "Audit", "rules": [{"to": [{"paths": [{"value": "/audited"}]}]}]});
    let limit = json!({"action": "Allow", "rules": [{}],
                       "rateLimits": [{"requests": 5, "per": "60s", "perIdentity": true}]});
    c.apply(&[own_in(NAMESPACE, "AccessPolicy", "watched", v1(audit))])?;
    let pod = c.pods(NAMESPACE, "version=v1")?[0]["metadata"]["name"].as_str().context("a name")?.to_owned();
    let of_v1 = |what: &str| c.sluice_out(&["tap", &format!("{NAMESPACE}/{pod}"), &format!("--show={what}")]);
    let get = |path: &str| script(c, NAMESPACE, "asks", &format!("wget -q -O - http://echo-v1{path}"));
    c.wait("what would be denied is counted, and done", SOON, || {
        Ok(get("/audited")?.contains("\"version\":\"v1\"")
            && total(&of_v1("metrics")?, "sluice_audit_denied_total") >= 1.0)
    })?;
    c.apply(&[own_in(NAMESPACE, "AccessPolicy", "limited", v1(limit))])?;
    c.wait("the app's sidecar has both policies", SOON, || {
        let all: Value = serde_json::from_str(&of_v1("compiled")?)?;
        Ok(all["inbound"]["access"].as_array().is_some_and(|rules| rules.len() == 2))
    })?;
    let asks = "for i in 1 2 3 4 5 6 7 8; do wget -S -q -O - http://echo-v1/ 2>&1; done; true";
    let seen = script(c, NAMESPACE, "asks", asks)?;
    let (answered, limited) = (seen.matches("\"version\":\"v1\"").count(), seen.matches("error: HTTP/1.1 429").count());
    ensure!((answered, limited) == (5, 3), "five a minute: {seen}");
    Ok(())
}

/// A node is cut off for less than it takes to be lost. Requests that may be tried elsewhere all succeed; of the others, what goes
/// there fails in its time and says why, and the endpoint is left alone.
pub fn a_backend_is_cut_off_under_load(c: &Cluster) -> Result<()> {
    const CUT: &str = "cut";
    c.namespace(CUT, true)?;
    c.apply(&[echo(CUT, "echo", "v1", 3), service(CUT, "echo", json!({"app": "echo"}))])?;
    c.apply(&[service(CUT, "backends", json!({"app": "echo"}))])?;
    let backends = json!([{"name": "backends", "port": 80}]);
    let timeouts = json!({"backendRequest": "300ms"});
    let path = |value: &str| json!([{"path": {"type": "PathPrefix", "value": value}}]);
    let rules = route(
        CUT,
        "HTTPRoute",
        "echo",
        ("echo", 80),
        json!([
            {"matches": path("/retried"), "timeouts": timeouts, "retry": {"attempts": 2}, "backendRefs": backends},
            {"matches": path("/once"), "timeouts": timeouts, "backendRefs": backends}
        ]),
    );
    let outlier = json!({"consecutiveFailures": 3, "ejectionTime": "2s"});
    let spec = json!({"targetRefs": [{"kind": "Service", "name": "backends"}], "outlierDetection": outlier,
                      "connectTimeout": "300ms"});
    c.apply(&[rules, own_in(CUT, "BackendPolicy", "backends", spec)])?;
    c.rollout(CUT, "echo")?;
    in_force(c, CUT, "httproute", "echo")?;
    let load = Load { rps: 50, seconds: 20, fresh: false, headers: vec![] };
    for name in ["retried", "once"] {
        let mut caller = client(CUT, name, &load.args(&format!("http://echo/{name}"), name));
        caller["spec"]["nodeName"] = NODES[0].into();
        c.apply(&[caller])?;
    }
    let pods = c.pods(CUT, "app=echo")?;
    let cut: Vec<_> = pods.iter().filter(|p| p["spec"]["nodeName"] == NODES[1]).collect();
    ensure!(!cut.is_empty(), "a backend is on {}", NODES[1]);
    // With a connection each: who has none finds the backend gone before he has sent anything, and loses nothing by it.
    for (name, pod) in ["retried", "once"].into_iter().flat_map(|n| cut.iter().map(move |p| (n, p))) {
        let pod = pod["metadata"]["name"].as_str().context("name")?;
        let reached = || Ok(request_log(c, NODES[1], CUT, pod)?.iter().any(|(_, id)| id.starts_with(name)));
        c.wait(&format!("{name} reaches {pod}"), 60, reached)?;
    }
    // Cut and mended in one go: it is mended whatever becomes of the test.
    c.inside("control", "ip link set slcnode1 down; sleep 4; ip link set slcnode1 up")?;
    let running =
        |name: &str| Ok::<_, anyhow::Error>(c.json(&["-n", CUT, "get", "pod", name])?["status"]["phase"] == "Running");
    ensure!(running("retried")? && running("once")?, "the load was over before the node was back");
    let metrics = c.sluice_out(&["tap", &format!("{CUT}/retried"), "--show=metrics"])?;
    let (retries, ejections) = (total(&metrics, "sluice_retries_total"), total(&metrics, "sluice_ejections_total"));
    let (retried, once) = (load.finish(c, CUT, "retried")?, load.finish(c, CUT, "once")?);
    eprintln!("cut off for 4 s: {retries} retries, {ejections} ejections; with retries {retried}; without {once}");
    ensure!(retries >= 1.0 && ejections >= 1.0, "nobody has noticed: nothing was tested");
    ensure!(retried["failed"] == 0, "{retried}");
    let failures = once["failures"].as_object().context("failures")?;
    // Of what is in flight when it is noticed, and one more each time that it is tried again: far from a third of 200.
    ensure!(once["failed"].as_u64() >= Some(1) && once["failed"].as_u64() <= Some(40), "{once}");
    let known = |kind: &String| {
        ["504 try_timeout", "503 connect_failed", "503 connect_timeout"].iter().any(|r| kind.ends_with(r))
    };
    ensure!(failures.keys().all(known), "each says why: {once}");
    c.kubectl(&["wait", "--for=condition=Ready", "node", "--all", "--timeout=60s"])?;
    c.delete_namespace(CUT)
}

/// Of a request that its caller has marked, the collector gets both sidecars' spans, in the caller's trace; the sidecar's log has it
/// too.
pub fn requests_leave_spans_and_lines(c: &Cluster) -> Result<()> {
    c.namespace("seen", true)?;
    c.apply(&[echo("seen", "echo", "v1", 1), service("seen", "echo", json!({"app": "echo"}))])?;
    // Takes what comes and shows it; its clients get no answer, and lose nothing by it.
    let take = "trap 'exit 0' TERM; nc -ll -p 4318 -e /bin/sh -c '(cat; echo) >/proc/1/fd/1' & wait";
    c.apply(&[
        json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "collector", "namespace": "seen", "labels": {"app": "collector", "sluice.dev/inject": "disabled"}},
            "spec": {"containers": [{"name": "sh", "image": "sluice.local/echo:1", "command": ["/bin/sh", "-c", take],
                                     "readinessProbe": {"tcpSocket": {"port": 4318}, "periodSeconds": 1}}]}}),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "collector", "namespace": "seen"},
            "spec": {"selector": {"app": "collector"}, "ports": [{"port": 4318, "targetPort": 4318}]}}),
    ])?;
    c.rollout("seen", "echo")?;
    c.kubectl(&["-n", "seen", "wait", "--for=condition=Ready", "pod/collector", "--timeout=60s"])?;
    let (w3c, b3, b3_multi) =
        ("4bf92f3577b34da6a3ce929d0e0e4736", "80f198ee56343ba864fe8b2a57d3eff7", "463ac35c9f6413ad48485a3953bb6124");
    let asks = [
        format!("wget -q -O - --header 'traceparent: 00-{w3c}-00f067aa0ba902b7-01' http://echo/w3c?headers"),
        format!("wget -q -O - --header 'b3: {b3}-e457b5a2e4d86bd1-1' http://echo/b3?headers"),
        format!(
            "wget -q -O - --header 'x-b3-traceid: {b3_multi}' --header 'x-b3-spanid: a2fb4a1d1a96d312' \
             --header 'x-b3-sampled: 1' http://echo/b3-multi?headers"
        ),
        "wget -q -O - http://echo/unmarked?headers; sleep 10".to_owned(),
    ];
    let caller = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "caller", "namespace": "seen", "annotations": {"sluice.dev/access-log": "all"}},
        "spec": {"restartPolicy": "Never", "containers": [{
            "name": "sh", "image": "sluice.local/echo:1", "command": ["/bin/sh", "-c", asks.join("; echo; ")]}]}
    });
    c.apply(&[caller])?;
    c.wait("the caller is through", 60, || {
        Ok(c.json(&["-n", "seen", "get", "pod", "caller"])?["status"]["phase"] == "Succeeded")
    })?;
    let answers = c.kubectl(&["-n", "seen", "logs", "caller", "-c", "sh"])?;
    ensure!(
        [w3c, b3, b3_multi].iter().all(|id| answers.matches(id).count() == 1),
        "the app is in the trace: {answers}"
    );
    let spans = |seen: &str, trace: &str| -> Vec<Value> {
        let bodies = seen.lines().filter_map(|l| l.find("{\"resourceSpans\"").map(|at| &l[at..]));
        let all =
            bodies.flat_map(|b| serde_json::Deserializer::from_str(b).into_iter::<Value>().filter_map(Result::ok));
        let spans = all.flat_map(|b| b["resourceSpans"].as_array().cloned().unwrap_or_default());
        let spans = spans.flat_map(|r| r["scopeSpans"].as_array().cloned().unwrap_or_default());
        let spans = spans.flat_map(|s| s["spans"].as_array().cloned().unwrap_or_default());
        spans.filter(|s| s["traceId"] == trace).collect()
    };
    for (trace, parent) in [(w3c, "00f067aa0ba902b7"), (b3, "e457b5a2e4d86bd1"), (b3_multi, "a2fb4a1d1a96d312")] {
        c.wait(&format!("both sidecars' spans of {trace}"), 20, || {
            let seen = spans(&c.kubectl(&["-n", "seen", "logs", "collector"])?, trace);
            let outer = seen.iter().find(|s| s["parentSpanId"] == parent);
            Ok(seen.len() == 2 && outer.is_some_and(|o| seen.iter().any(|s| s["parentSpanId"] == o["spanId"])))
        })
        .with_context(|| c.kubectl(&["-n", "seen", "logs", "collector"]).unwrap_or_default())?;
    }
    let log = c.kubectl(&["-n", "seen", "logs", "caller", "-c", "sluice-proxy"])?;
    for path in ["/w3c", "/b3", "/b3-multi", "/unmarked"] {
        let line = log.lines().filter(|l| l.contains("\"path\"")).find(|l| l.contains(path));
        let line: Value = serde_json::from_str(line.with_context(|| format!("{path} in {log}"))?)?;
        ensure!(line["status"] == 200 && line["backend"] == "seen/echo", "{line}");
    }
    ensure!(
        !c.kubectl(&["-n", "seen", "logs", "collector"])?.contains("/unmarked"),
        "what nobody marked is not sampled"
    );
    c.delete_namespace("seen")
}
