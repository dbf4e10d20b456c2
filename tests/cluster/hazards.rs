//! Endpoints that answer nonsense or nothing, and certificates that end: what callers are told, and that it passes.

use crate::{
    cluster::Cluster,
    features::{meshed_or_not, report, route, with_and_without_sidecars},
    load::{Load, client, echo, service},
    mesh::{backend_policy, in_force},
    network::script,
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const BROKEN: &str = "broken";
/// Life of a certificate in a cluster of its own, in seconds: a sidecar has another one after two thirds of it.
const LIFE_S: u32 = 15;

/// Endpoints that answer what is no HTTP, and endpoints that end every connection: each request is told so. Beside one that is well,
/// requests that may be tried again find it, and the others soon.
pub fn broken_backends_are_told_and_left(c: &Cluster) -> Result<()> {
    with_and_without_sidecars(c, BROKEN, broken_backends)
}

fn broken_backends(c: &Cluster, inject: &str) -> Result<()> {
    c.namespace(BROKEN, true)?;
    let of = |name: &str| service(BROKEN, name, json!({"kind": name}));
    let all = service(BROKEN, "all", json!({"app": "echo"}));
    let one = |mut app: Value, kind: &str| {
        app["spec"]["selector"]["matchLabels"]["kind"] = kind.into();
        app["spec"]["template"]["metadata"]["labels"]["kind"] = kind.into();
        meshed_or_not(app, inject)
    };
    c.apply(&[
        one(echo(BROKEN, "well", "v1", 1), "well"),
        one(answering("garbage", "busybox head -n 1"), "garbage"),
        one(answering("closing", "/bin/true"), "closing"),
        of("garbage"),
        of("closing"),
        all,
    ])?;
    let retry = json!({"attempts": 3, "codes": [502]});
    let again = json!([{"matches": [{"path": {"type": "PathPrefix", "value": "/again"}}], "retry": retry,
                        "backendRefs": [{"name": "all", "port": 80}]},
                       {"backendRefs": [{"name": "all", "port": 80}]}]);
    c.apply(&[route(BROKEN, "HTTPRoute", "all", ("all", 80), again)])?;
    let outlier = json!({"consecutiveFailures": 3, "ejectionTime": "60s", "maxEjectedPercent": 100});
    backend_policy(c, BROKEN, "all", json!({"outlierDetection": outlier, "balancing": {"policy": "RoundRobin"}}))?;
    for name in ["well", "garbage", "closing"] {
        c.rollout(BROKEN, name)?;
    }
    in_force(c, BROKEN, "httproute", "all")?;
    let load =
        |host: &str| report(c, BROKEN, &format!("/load --rps=50 --duration=2 --method=POST --url=http://{host}"));
    for (host, wanted) in [("garbage", "status 502 upstream_malformed"), ("closing", "status 502 upstream_closed")] {
        let seen = load(host)?;
        ensure!(seen["failures"][wanted]["count"] == 100, "{host}: {seen}");
    }
    let seen = report(c, BROKEN, "/load --rps=50 --duration=4 --url=http://all/again")?;
    ensure!(seen["failed"] == 0 && seen["versions"] == json!({"v1": 200}), "tried again: {seen}");
    // Three each, until they are left out.
    let seen = load("all/once")?;
    ensure!(seen["failed"] == 6 && seen["versions"] == json!({"v1": 94}), "not tried again: {seen}");
    Ok(())
}

/// On each connection to the app's port this has the request's bytes and makes the answer.
fn answering(name: &str, command: &str) -> Value {
    let mut app = echo(BROKEN, name, "none", 1);
    let serve = format!("trap 'exit 0' TERM; nc -ll -p 8080 -e {command} & wait");
    app["spec"]["template"]["spec"]["containers"] = json!([{
        "name": "sh", "image": "sluice.local/echo:1", "command": ["/bin/sh", "-c", serve],
        "ports": [{"name": "http", "containerPort": 8080}, {"name": "tcp", "containerPort": 9000}]
    }]);
    app
}

/// Certificates are renewed again and again, and neither a request nor a stream is lost by it. While control signs nothing they end:
/// who is dialled then is refused with the reason, and served again soon after control is back.
pub fn certificates_renew_and_end(_: &Cluster) -> Result<()> {
    let life = format!("--control-arg=--workload-certificate-s={LIFE_S}");
    let c = Cluster::start_with("proof", &["--nodes=1", &life])?;
    let result = c.run("with certificates of a short life", |c| {
        c.namespace("proof", true)?;
        c.apply(&[echo("proof", "echo", "v1", 1), service("proof", "echo", json!({"app": "echo"}))])?;
        backend_policy(c, "proof", "echo", json!({"idleTimeout": "500ms"}))?;
        c.rollout("proof", "echo")?;
        renewed(c)?;
        ended(c)
    });
    let left = c.stop();
    result.and(left)
}

fn renewed(c: &Cluster) -> Result<()> {
    let app = c.pods("proof", "app=echo")?[0]["metadata"]["name"].as_str().context("a name")?.to_owned();
    let ends_s = || -> Result<i64> {
        let said = c.sluice_out(&["tap", &format!("proof/{app}"), "--show=certificates"])?;
        serde_json::from_str::<Value>(&said)?["expiresSeconds"].as_i64().with_context(|| said)
    };
    let first_s = ends_s()?;
    let load = Load { rps: 50, seconds: 2 * LIFE_S, fresh: false, headers: vec![] };
    load.start(c, "proof", "renewed", "http://echo/")?;
    let lines = 2 * LIFE_S;
    let stream = format!("(for n in $(busybox seq {lines}); do echo line $n; sleep 1; done) | nc -w 5 echo 9000");
    let seen = script(c, "proof", "stream", &stream)?;
    let wanted: String = (1..=lines).map(|n| format!("line {n}\n")).collect();
    ensure!(seen == wanted, "a stream of {lines} s: {seen}");
    let later_s = ends_s()? - first_s;
    ensure!(later_s >= i64::from(LIFE_S), "the app's certificate ends {later_s} s later: it was not renewed twice");
    let report = load.finish(c, "proof", "renewed")?;
    eprintln!("while certificates were renewed: {report}");
    ensure!(report["failed"] == 0, "{report}");
    Ok(())
}

/// Each request dials: they come two seconds apart, and by then the connection is closed for being idle.
fn ended(c: &Cluster) -> Result<()> {
    let asks = "trap 'exit 0' TERM; while :; do \
        curl -sS -m 5 -o /dev/null -w '%{http_code} %header{x-sluice-reason}\n' http://echo/; sleep 2 & wait $!; done";
    let mut caller = client("proof", "caller", &[]);
    caller["spec"]["containers"][0]["command"] = json!(["/bin/sh", "-c", asks]);
    c.apply(&[caller])?;
    // Not by the API, which stands still with control.
    let log = || c.inside("node-1", "cat /var/lib/sluice/agent/logs/proof_caller_*/load/*.log");
    let seen = |what: &str| Ok(log()?.lines().last().is_some_and(|l| l.contains(what)));
    c.wait("it is answered", 60, || seen(" 200"))?;
    c.inside("control", "kill -STOP $(cat /run/sluice/control.pid)")?;
    let refused = c.wait("it is refused for the certificate", u64::from(LIFE_S) + 15, || seen("identity_not_proven"));
    c.inside("control", "kill -CONT $(cat /run/sluice/control.pid)")?;
    let refused = refused.with_context(|| log().unwrap_or_default())?;
    let served = c.wait("it is served again", 30, || seen(" 200")).with_context(|| log().unwrap_or_default())?;
    eprintln!("refused {refused:.1?} after control had stopped, served {served:.1?} after it went on");
    Ok(())
}
