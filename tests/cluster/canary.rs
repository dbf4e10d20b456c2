//! Rolling updates and canary releases under load: open loop, numbered requests, the backends' logs as the proof.

use crate::{
    cluster::Cluster,
    load::{Load, echo, prove_exactly_once, request_log, service, split_service, version},
};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::time::{SystemTime, UNIX_EPOCH};

/// Mission row 8 (first half): a rolling restart at 1,000 requests a second loses none, over kept and fresh connections.
pub fn rolling_update_loses_nothing(c: &Cluster) -> Result<()> {
    c.namespace("rolling", true)?;
    c.apply(&[echo("rolling", "echo-v1", "v1", 4), service("rolling", "echo", json!({"app": "echo"}))])?;
    c.rollout("rolling", "echo-v1")?;
    for (name, fresh, rps) in [("kept", false, 1000), ("fresh", true, 1000)] {
        let load = Load { rps, seconds: 25, fresh, headers: vec![] };
        load.start(c, "rolling", name, "http://echo/")?;
        c.kubectl(&["-n", "rolling", "rollout", "restart", "deployment/echo-v1"])?;
        c.rollout("rolling", "echo-v1")?;
        let report = load.finish(c, "rolling", name)?;
        eprintln!("rolling update, {name} connections: {report}");
        prove_exactly_once(c, "rolling", name, &report)?;
    }
    c.delete_namespace("rolling")
}

fn start_canary(c: &Cluster, namespace: &str, v1: u32, v2: u32) -> Result<()> {
    c.namespace(namespace, true)?;
    c.apply(&[echo(namespace, "echo-v1", "v1", 2), echo(namespace, "echo-v2", "v2", 2)])?;
    c.apply(&split_service(namespace, v1, v2))?;
    c.rollout(namespace, "echo-v1")?;
    c.rollout(namespace, "echo-v2")
}

/// Mission rows 9 and 15: 90/10 over 10,000 requests is exact; headers pin; the very first request works.
pub fn canary_split_is_exact(c: &Cluster) -> Result<()> {
    start_canary(c, "split", 90, 10)?;
    let report =
        Load { rps: 1000, seconds: 10, fresh: false, headers: vec![] }.run(c, "split", "exact", "http://echo/")?;
    prove_exactly_once(c, "split", "exact", &report)?;
    let (sent, v2) = (report["sent"].as_u64().context("sent")?, version(&report, "v2"));
    eprintln!("of {sent} requests {v2} went to v2");
    // One worker, two backends: at most that many requests off.
    ensure!(v2.abs_diff(sent / 10) <= 2, "{v2} of {sent} at 10 %");
    // A pod without a sidecar follows the weights too, per connection.
    c.namespace("plain", false)?;
    let plain =
        Load { rps: 400, seconds: 10, fresh: true, headers: vec![] }.run(c, "plain", "plain", "http://echo.split/")?;
    let (sent, v2) = (plain["sent"].as_u64().context("sent")?, version(&plain, "v2"));
    ensure!(plain["failed"] == 0, "{plain}");
    eprintln!("of {sent} connections without a sidecar {v2} went to v2");
    // Binomial(4000, 0.1): 400 ± 5 standard deviations of 19.
    ensure!(v2.abs_diff(sent / 10) < 95, "{v2} of {sent} at 10 %");
    c.delete_namespace("plain")?;
    let mut route = c.json(&["-n", "split", "get", "httproute", "echo"])?;
    let rules = route["spec"]["rules"].as_array_mut().context("rules")?;
    rules.push(json!({
        "matches": [{"headers": [{"name": "x-tester", "value": "yes"}]}],
        "backendRefs": [{"name": "echo-v2", "port": 80}]
    }));
    c.apply(&[route])?;
    c.sluice_ok(&["split", "echo", "-n", "split", "v1=100", "v2=0"])?;
    let pinned = Load { rps: 100, seconds: 3, fresh: false, headers: vec!["x-tester=yes".into()] }.run(
        c,
        "split",
        "pinned",
        "http://echo/",
    )?;
    ensure!(version(&pinned, "v2") == pinned["sent"].as_u64().context("sent")?, "testers see v2 only: {pinned}");
    c.delete_namespace("split")
}

/// Mission row 9: 10 → 50 → 100 under load, nothing fails, and nothing goes to v1 once that is acknowledged.
pub fn canary_shifts_under_load(c: &Cluster) -> Result<()> {
    start_canary(c, "shift", 90, 10)?;
    // Five sidecars hold the route, on all nodes.
    let load = Load { rps: 100, seconds: 40, fresh: false, headers: vec![] };
    let clients = ["shift-a", "shift-b", "shift-c", "shift-d", "shift-e"];
    for name in clients {
        load.start(c, "shift", name, "http://echo/")?;
    }
    let mut ms = vec![];
    let back_and_forth = [["v1=50", "v2=50"], ["v1=90", "v2=10"]].into_iter().cycle().take(30);
    for weights in back_and_forth.chain([["v1=50", "v2=50"], ["v1=0", "v2=100"]]) {
        let out = c.sluice_ok(&["split", "echo", "-n", "shift", weights[0], weights[1]])?;
        let words: Vec<_> = out.split_whitespace().collect();
        let at = words.iter().position(|w| *w == "ms").with_context(|| out.clone())?;
        ms.push(words[at - 1].parse::<u64>()?);
    }
    // All is at v2 now, and acknowledged: the clients that run send nothing else from here on.
    let acknowledged_ms = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64;
    for name in clients {
        let report = load.finish(c, "shift", name)?;
        prove_exactly_once(c, "shift", name, &report)?;
    }
    let times = |version: &str| -> Result<Vec<u64>> {
        let mut all = vec![];
        for pod in c.pods("shift", &format!("version={version}"))? {
            let (name, node) = (&pod["metadata"]["name"], &pod["spec"]["nodeName"]);
            let (name, node) = (name.as_str().context("name")?, node.as_str().context("node")?);
            all.extend(request_log(c, node, "shift", name)?.into_iter().map(|(at_ms, _)| at_ms));
        }
        Ok(all)
    };
    let late = times("v1")?.into_iter().filter(|at_ms| *at_ms > acknowledged_ms).count();
    let after = times("v2")?.into_iter().filter(|at_ms| *at_ms > acknowledged_ms).count();
    ensure!(after > 500, "the clients still ran when everything was acknowledged: {after} requests after it");
    ensure!(late == 0, "{late} requests reached v1 after every sidecar had acknowledged weight 0");
    ms.sort_unstable();
    eprintln!("answer to last acknowledgement, ms: {ms:?}");
    let status = c.sluice_ok(&["status"])?;
    ensure!(status.contains("ROUTE shift/echo"), "{status}");
    c.delete_namespace("shift")
}

/// G5: a pod that is strict answers callers that prove an identity, so the wire between sidecars is mTLS, and refuses
/// plain ones.
pub fn strict_pods_refuse_plain_callers(c: &Cluster) -> Result<()> {
    c.namespace("strict", true)?;
    let mut strict = echo("strict", "echo-v1", "v1", 1);
    strict["spec"]["template"]["metadata"]["annotations"] = json!({"sluice.dev/mtls": "strict"});
    c.apply(&[strict, service("strict", "echo", json!({"app": "echo"}))])?;
    c.rollout("strict", "echo-v1")?;
    let load = || Load { rps: 100, seconds: 5, fresh: true, headers: vec![] };
    let report = load().run(c, "strict", "meshed", "http://echo/")?;
    prove_exactly_once(c, "strict", "meshed", &report)?;
    c.namespace("outside", false)?;
    let report = load().run(c, "outside", "plain", "http://echo.strict/")?;
    ensure!(report["ok"] == 0, "a caller without identity got through: {report}");
    c.delete_namespace("outside")?;
    c.delete_namespace("strict")
}
