//! Rolling updates and canary releases under load: open loop, numbered requests, the backends' logs as the proof.

use crate::{
    cluster::Cluster,
    load::{Load, echo, prove_exactly_once, request_log, service, split_service, version},
};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::{
    collections::HashMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

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
    // As a user writes it, not as it is stored: the status writer may be at it.
    let mut route = split_service("split", 90, 10).remove(3);
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

/// Mission row 9: a hundred shifts at 2,000 requests a second. Nothing fails, each request arrives once, and none goes to a
/// version of weight 0 from when that is acknowledged until the next shift begins.
pub fn canary_shifts_under_load(c: &Cluster) -> Result<()> {
    /// For which nothing else is done while a version has no weight.
    const DWELL: Duration = Duration::from_millis(50);
    start_canary(c, "shift", 90, 10)?;
    // Five sidecars hold the route, on all nodes.
    let load = Load { rps: 400, seconds: 45, fresh: false, headers: vec![] };
    let clients = ["shift-a", "shift-b", "shift-c", "shift-d", "shift-e"];
    for name in clients {
        load.start(c, "shift", name, "http://echo/")?;
    }
    let now_ms = || Ok::<_, anyhow::Error>(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64);
    // Times to the last acknowledgement; and the version without weight, from when until when.
    let (mut ms, mut without) = (vec![], vec![]);
    let shifts = [[50, 50], [100, 0], [90, 10], [0, 100]].into_iter().cycle().take(100);
    for [v1, v2] in shifts {
        let out = c.sluice_ok(&["split", "echo", "-n", "shift", &format!("v1={v1}"), &format!("v2={v2}")])?;
        let words: Vec<_> = out.split_whitespace().collect();
        let at = words.iter().position(|w| *w == "ms").with_context(|| out.clone())?;
        ms.push(words[at - 1].parse::<u64>()?);
        if v1 * v2 == 0 {
            let acknowledged = now_ms()?;
            std::thread::sleep(DWELL);
            without.push((if v1 == 0 { "v1" } else { "v2" }, acknowledged, now_ms()?));
        }
    }
    // All is at v2 now, and acknowledged: the clients that run send nothing else from here on.
    let acknowledged_ms = without.last().context("shifts")?.1;
    let mut began_ms = HashMap::new();
    for name in clients {
        let report = load.finish(c, "shift", name)?;
        prove_exactly_once(c, "shift", name, &report)?;
        began_ms.insert(name, report["began_ms"].as_u64().context("began_ms")?);
    }
    // When it was due at its client, and when it arrived at the app.
    let due_ms = |id: &str| {
        let (client, number) = id.rsplit_once('-')?;
        Some(began_ms.get(client)? + number.parse::<u64>().ok()? * 1000 / u64::from(load.rps))
    };
    let times = |version: &str| -> Result<Vec<(u64, u64)>> {
        let mut all = vec![];
        for pod in c.pods("shift", &format!("version={version}"))? {
            let (name, node) = (&pod["metadata"]["name"], &pod["spec"]["nodeName"]);
            let (name, node) = (name.as_str().context("name")?, node.as_str().context("node")?);
            all.extend(
                request_log(c, node, "shift", name)?.iter().filter_map(|(at_ms, id)| Some((due_ms(id)?, *at_ms))),
            );
        }
        Ok(all)
    };
    let seen = [("v1", times("v1")?), ("v2", times("v2")?)];
    let after = seen[1].1.iter().filter(|(due_ms, _)| *due_ms > acknowledged_ms).count();
    ensure!(after > 500, "the clients still ran when everything was acknowledged: {after} requests after it");
    if let Some(last) = without.last_mut() {
        last.2 = u64::MAX;
    }
    for (version, from, until) in &without {
        let late = seen.iter().filter(|(v, _)| v == version).flat_map(|(_, times)| times);
        // One that was on its way already may arrive later.
        let late = late.filter(|(due_ms, at_ms)| due_ms > from && at_ms < until);
        let late: Vec<_> = late.map(|(due_ms, at_ms)| (due_ms - from, at_ms - from)).collect();
        ensure!(late.is_empty(), "{version} got requests after every sidecar had acknowledged weight 0; ms: {late:?}");
    }
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
