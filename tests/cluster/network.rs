//! Names, virtual addresses, and the kernel's state.

use crate::{
    cluster::{Cluster, ready},
    load::{echo, service},
};
use anyhow::{Context, Result, ensure};
use serde_json::json;

/// A pod that runs a script and says what it saw.
fn script(c: &Cluster, namespace: &str, name: &str, script: &str) -> Result<String> {
    c.apply(&[json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace},
        "spec": {"restartPolicy": "Never", "containers": [{
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
    let took = c.wait("the route is back", 5, || Ok(routes()? == before))?;
    eprintln!("route back after {took:?}");
    Ok(())
}
