//! Names, virtual addresses, and the kernel's state.

use crate::{
    cluster::{Cluster, NODES, ready},
    load::{echo, request_log, service},
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// A pod that runs a script and says what it saw.
pub fn script(c: &Cluster, namespace: &str, name: &str, script: &str) -> Result<String> {
    script_on(c, None, namespace, name, script)
}

/// The same on a node.
pub fn script_on(c: &Cluster, node: Option<&str>, namespace: &str, name: &str, script: &str) -> Result<String> {
    c.apply(&[json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace},
        "spec": {"restartPolicy": "Never", "nodeName": node, "containers": [{
            "name": "sh", "image": "sluice.local/echo:1", "command": ["/bin/sh", "-c", script]}]}
    })])?;
    c.wait("the script ends", 60, || {
        let p = c.json(&["-n", namespace, "get", "pod", name])?;
        Ok(matches!(p["status"]["phase"].as_str(), Some("Succeeded" | "Failed")))
    })?;
    let log = c.kubectl(&["-n", namespace, "logs", name])?;
    c.kubectl(&["-n", namespace, "delete", "pod", name, "--timeout=60s"])?;
    Ok(log)
}

/// Mission rows 6 and 16: one address across a rolling restart; A records, headless services, names that do not exist.
pub fn services_have_names_and_stable_addresses(c: &Cluster) -> Result<()> {
    c.namespace("names", false)?;
    let mut headless = service("names", "pods", json!({"app": "echo"}));
    headless["spec"]["clusterIP"] = "None".into();
    c.apply(&[echo("names", "web", "v1", 2), service("names", "web", json!({"app": "echo"})), headless])?;
    c.rollout("names", "web")?;
    let ip = || -> Result<String> {
        Ok(c.json(&["-n", "names", "get", "service", "web"])?["spec"]["clusterIP"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    };
    let before = ip()?;
    let log = script(
        c,
        "names",
        "ask",
        "nslookup web.names.svc.cluster.local 10.96.0.10; nslookup pods.names.svc.cluster.local 10.96.0.10; nslookup nope.names.svc.cluster.local 10.96.0.10; wget -q -O - http://web/ && wget -q -O - http://web.names/",
    )?;
    ensure!(log.contains(&before), "the service's name gives its address {before}: {log}");
    let pods = c.pods("names", "app=echo")?;
    for p in pods.iter().filter(|p| ready(p)) {
        let ip = p["status"]["podIP"].as_str().context("an address")?;
        ensure!(log.contains(ip), "the headless name gives pod {ip}: {log}");
    }
    ensure!(log.contains("NXDOMAIN"), "{log}");
    ensure!(log.matches("\"version\":\"v1\"").count() == 2, "short names work through the search path: {log}");
    c.kubectl(&["-n", "names", "rollout", "restart", "deployment/web"])?;
    c.rollout("names", "web")?;
    ensure!(ip()? == before, "the address stays");
    let log = script(c, "names", "again", "wget -q -O - http://web/")?;
    ensure!(log.contains("\"version\":\"v1\""), "{log}");
    c.delete_namespace("names")
}

/// A service of type ExternalName is an alias; one of a name of the cluster is followed to its address.
pub fn external_names_lead_elsewhere(c: &Cluster) -> Result<()> {
    c.namespace("extern", false)?;
    let alias = |name: &str, target: &str| {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "extern"},
            "spec": {"type": "ExternalName", "externalName": target}})
    };
    let objects = [
        echo("extern", "web", "v1", 1),
        service("extern", "web", json!({"app": "echo"})),
        alias("inside", "web.extern.svc.cluster.local"),
        alias("outside", "db.example.org"),
    ];
    c.apply(&objects)?;
    c.rollout("extern", "web")?;
    let listed = c.kubectl(&["-n", "extern", "get", "services"])?;
    ensure!(listed.contains("ExternalName") && listed.contains("db.example.org"), "{listed}");
    let ip = c.json(&["-n", "extern", "get", "service", "web"])?["spec"]["clusterIP"]
        .as_str()
        .context("an address")?
        .to_owned();
    let log = script(
        c,
        "extern",
        "ask",
        "nslookup inside.extern.svc.cluster.local 10.96.0.10; nslookup outside.extern.svc.cluster.local 10.96.0.10; wget -q -O - http://inside/",
    )?;
    ensure!(log.contains(&ip) && log.contains("db.example.org"), "{log}");
    ensure!(log.contains("\"version\":\"v1\""), "the alias is reached by its short name: {log}");
    c.delete_namespace("extern")
}

/// A client stays with its pod, stays on its node or near it where the service says so, and reaches external addresses.
pub fn services_keep_clients_and_stay_near(c: &Cluster) -> Result<()> {
    const ASKED: usize = 20;
    const ZONES: [&str; 3] = ["a", "a", "b"];
    c.namespace("near", false)?;
    for (node, zone) in NODES.into_iter().zip(ZONES) {
        c.kubectl(&["label", "--overwrite", "node", node, &format!("topology.kubernetes.io/zone={zone}")])?;
    }
    let with = |name: &str, spec: Value| {
        let mut service = service("near", name, json!({"app": "echo"}));
        service["spec"].as_object_mut().expect("a spec").extend(spec.as_object().expect("fields").clone());
        service
    };
    c.apply(&[
        echo("near", "web", "v1", 2),
        with("sticky", json!({"sessionAffinity": "ClientIP"})),
        with("local", json!({"internalTrafficPolicy": "Local"})),
        with("close", json!({"trafficDistribution": "PreferSameNode"})),
        with("zoned", json!({"trafficDistribution": "PreferSameZone"})),
        with("outside", json!({"externalIPs": ["192.0.2.10"]})),
    ])?;
    c.rollout("near", "web")?;
    let pods = c.pods("near", "app=echo")?;
    let on = |node: &str| -> BTreeSet<String> {
        let here = pods.iter().filter(|p| p["spec"]["nodeName"] == node);
        here.filter_map(|p| p["metadata"]["name"].as_str().map(str::to_owned)).collect()
    };
    let all: BTreeSet<String> = NODES.iter().flat_map(|node| on(node)).collect();
    ensure!(all.len() == 2 && NODES.iter().any(|n| on(n).is_empty()), "two pods on two of three nodes: {pods:?}");
    let ask = format!(
        "for s in sticky local close zoned 192.0.2.10; do for i in $(seq {ASKED}); do
            echo $s $(wget -q -O - http://$s/ || echo refused); done; done"
    );
    for (node, zone) in NODES.into_iter().zip(ZONES) {
        let log = script_on(c, Some(node), "near", &format!("ask-{node}"), &ask)?;
        let seen = |service: &str| -> Result<BTreeSet<String>> {
            let lines: Vec<&str> = log.lines().filter_map(|l| l.strip_prefix(service)?.strip_prefix(' ')).collect();
            ensure!(lines.len() == ASKED, "{service} from {node}: {log}");
            let pod = |line: &&str| serde_json::from_str::<Value>(line).ok()?["pod"].as_str().map(str::to_owned);
            Ok(lines.iter().map(|line| pod(line).unwrap_or_else(|| (*line).to_owned())).collect())
        };
        let here = on(node);
        let nobody = BTreeSet::from(["refused".to_owned()]);
        ensure!(seen("sticky")?.len() == 1 && seen("sticky")?.is_subset(&all), "{node}: {log}");
        ensure!(seen("local")? == if here.is_empty() { nobody } else { here.clone() }, "{node}: {log}");
        let in_zone = NODES.iter().zip(ZONES).filter(|(_, z)| *z == zone).flat_map(|(n, _)| on(n));
        let in_zone: BTreeSet<_> = in_zone.collect();
        let zoned = if in_zone.is_empty() { all.clone() } else { in_zone };
        ensure!(seen("close")? == if here.is_empty() { zoned.clone() } else { here }, "{node}: {log}");
        ensure!(seen("zoned")? == zoned, "{node}: {log}");
        ensure!(seen("192.0.2.10")? == all, "{node}: {log}");
    }
    for node in NODES {
        c.kubectl(&["label", "node", node, "topology.kubernetes.io/zone-"])?;
    }
    c.delete_namespace("near")
}

/// Mission row 7: a pod that is not ready is out of every node's endpoints. The pod's own log has the probe that failed
/// and every request, with times of one clock.
pub fn readiness_withdraws_on_all_nodes(c: &Cluster) -> Result<()> {
    c.namespace("ready", false)?;
    let mut web = echo("ready", "web", "v1", 3);
    web["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["failureThreshold"] = 1.into();
    c.apply(&[web, service("ready", "web", json!({"app": "echo"}))])?;
    c.rollout("ready", "web")?;
    let ip = c.json(&["-n", "ready", "get", "service", "web"])?["spec"]["clusterIP"].as_str().context("ip")?.to_owned();
    let callers: Vec<_> = NODES
        .iter()
        .map(|node| {
            c.host_load(
                node,
                &[
                    &format!("--url=http://{ip}/"),
                    "--rps=100",
                    "--fresh",
                    "--duration=30",
                    &format!("--id-prefix={node}-"),
                ],
            )
        })
        .collect::<Result<_>>()?;
    let pods = c.pods("ready", "app=echo")?;
    for pod in pods.iter().cycle().take(6) {
        let (name, node) =
            (pod["metadata"]["name"].as_str().context("name")?, pod["spec"]["nodeName"].as_str().context("node")?);
        let url = format!("http://{}:8080/faults", pod["status"]["podIP"].as_str().context("ip")?);
        let told = |unready: bool| c.inside(node, &format!("curl -sf -XPOST -d '{{\"unready\":{unready}}}' {url}"));
        let before = request_log(c, node, "ready", name)?.len();
        told(true)?;
        c.wait("three probes have failed", 30, || {
            Ok(request_log(c, node, "ready", name)?[before..].iter().filter(|l| l.1 == "-").count() >= 3)
        })?;
        told(false)?;
        c.wait("it is back", 30, || {
            let pod = c.json(&["-n", "ready", "get", "pod", name])?;
            Ok(ready(&pod))
        })?;
    }
    for mut caller in callers {
        ensure!(caller.wait()?.success(), "a client ended badly");
    }
    let mut late_ms = vec![];
    for pod in &pods {
        let (name, node) =
            (pod["metadata"]["name"].as_str().context("name")?, pod["spec"]["nodeName"].as_str().context("node")?);
        let log = request_log(c, node, "ready", name)?;
        for caller in NODES {
            let calls = log.iter().filter(|l| l.1.starts_with(&format!("{caller}-"))).count();
            ensure!(calls > 100, "{caller} dialled {name} {calls} times: too few to see anything");
        }
        late_ms.extend(sights_after_detection(&log));
    }
    late_ms.sort_unstable();
    ensure!(late_ms.len() == 6, "six withdrawals were seen: {late_ms:?}");
    eprintln!("failed probe to last new connection from any of three nodes, ms: {late_ms:?}");
    // The second failed probe comes a second after the first; nobody dials the pod after that.
    ensure!(late_ms.iter().all(|ms| *ms < 1000), "{late_ms:?}");
    c.delete_namespace("ready")
}

/// For each run of failed probes: how long after the first of them a request still came before the last of them.
fn sights_after_detection(log: &[(u64, String)]) -> Vec<u64> {
    let mut all = vec![];
    let probes: Vec<u64> = log.iter().filter(|l| l.1 == "-").map(|l| l.0).collect();
    // Probes come every second; a longer pause separates two runs.
    for run in probes.chunk_by(|a, b| b - a < 1900) {
        let (first, last) = (run[0], run[run.len() - 1]);
        let late = log.iter().filter(|l| l.1 != "-" && (first..last).contains(&l.0)).map(|l| l.0 - first).max();
        all.push(late.unwrap_or(0));
    }
    all
}

/// Mission row 20.
pub fn containers_of_a_pod_share_localhost(c: &Cluster) -> Result<()> {
    c.namespace("two", false)?;
    c.apply(&[json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "two"},
        "spec": {"containers": [
            {"name": "server", "image": "sluice.local/echo:1", "args": ["serve", "--http=8080", "--quiet"]},
            {"name": "asker", "image": "sluice.local/echo:1", "command": ["/bin/sh", "-c",
                "until wget -q -O /data/out http://127.0.0.1:8080/; do sleep 0.1; done; cat /data/out; sleep 1000"],
             "volumeMounts": [{"name": "work", "mountPath": "/data"}]}
        ], "volumes": [{"name": "work", "emptyDir": {}}]}
    })])?;
    c.wait("one container reaches the other", 60, || {
        Ok(c.kubectl(&["-n", "two", "logs", "p", "-c", "asker"])?.contains("\"version\":\"v1\""))
    })?;
    c.kubectl(&["-n", "two", "delete", "pod", "p", "--grace-period=1", "--timeout=60s"])?;
    c.delete_namespace("two")
}

/// Mission row 2, kernel state: a route that somebody deleted is there again within two seconds.
pub fn kernel_state_is_put_right(c: &Cluster) -> Result<()> {
    let routes = || c.inside("node-1", "cat /proc/net/route | wc -l");
    let before = routes()?;
    let gateway = "172.30.0.11";
    let range = c.json(&["get", "node", "node-2"])?["spec"]["podCIDR"].as_str().context("a range")?.to_owned();
    c.inside("node-1", &format!("ip route del {range} via {gateway}"))?;
    let took = c.wait("the route is back", 2, || Ok(routes()? == before))?;
    eprintln!("route back after {took:?}");
    c.wait("an event on the node says so", 10, || {
        let events = c.json(&["get", "events"])?;
        let all = events["items"].as_array().cloned().unwrap_or_default();
        Ok(all.iter().any(|e| {
            let text = e["message"].as_str().unwrap_or_default();
            e["reason"] == "DatapathRepaired" && e["involvedObject"]["name"] == "node-1" && text.contains(&range)
        }))
    })?;
    Ok(())
}
