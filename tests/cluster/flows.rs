//! `sluice flows` itself, of traffic that is made meanwhile: who called whom, by which service, where it led, and why not.

use crate::{
    cluster::Cluster,
    load::{echo, service},
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const NODE: &str = "node-1";
/// For how long a command follows: some dozen rounds of the caller.
const LAST: &str = "6s";

/// A pod of the mesh whose sidecar does nothing: closed.
fn closed() -> Value {
    let sleeper = |name: &str| json!({"name": name, "image": "sluice.local/echo:1", "command": ["/bin/sh", "-c", "trap 'exit 0' TERM; sleep 1000 & wait"]});
    let mut sidecar = sleeper("sluice-proxy");
    sidecar["restartPolicy"] = "Always".into();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "closed", "namespace": "flows", "annotations": {"sluice.dev/sidecar": "injected"}},
        "spec": {"nodeName": NODE, "initContainers": [sidecar], "containers": [sleeper("sh")]}
    })
}

/// Dials all of these again and again, whatever comes of it.
fn caller(urls: &[String]) -> Value {
    let calls: Vec<String> = urls.iter().map(|u| format!("timeout 1 wget -q -O /dev/null {u}")).collect();
    let script = format!("trap 'exit 0' TERM; while true; do {}; sleep 0.1; done", calls.join("; "));
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "caller", "namespace": "flows"},
        "spec": {"nodeName": NODE, "containers": [{
            "name": "sh", "image": "sluice.local/echo:1", "command": ["/bin/sh", "-c", script]}]}
    })
}

/// The flows that the command prints.
fn follow(c: &Cluster, options: &[&str]) -> Result<Vec<Value>> {
    let said = c.sluice_ok(&[&["flows", "--json", "--last", LAST], options].concat())?;
    let records = said.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
    Ok(records.filter(|r| r["kind"] == "flow").collect())
}

pub fn flows_show_who_calls_whom(c: &Cluster) -> Result<()> {
    c.namespace("flows", false)?;
    c.apply(&[
        echo("flows", "web", "v1", 1),
        service("flows", "web", json!({"app": "echo"})),
        service("flows", "nobody", json!({"app": "none"})),
        closed(),
    ])?;
    c.rollout("flows", "web")?;
    let address = |kind: &str, name: &str, field: &str| -> Result<String> {
        let object = c.json(&["-n", "flows", "get", kind, name])?;
        let ip = object.pointer(field).and_then(Value::as_str);
        ip.map(str::to_owned).with_context(|| format!("{kind} {name} has an address"))
    };
    c.wait("the closed pod has an address", 60, || Ok(address("pod", "closed", "/status/podIP").is_ok()))?;
    let web = address("service", "web", "/spec/clusterIP")?;
    let nobody = address("service", "nobody", "/spec/clusterIP")?;
    let closed = address("pod", "closed", "/status/podIP")?;
    let pods = c.pods("flows", "app=echo")?;
    let text = |field: &str| pods[0].pointer(field).and_then(Value::as_str).context("a field of the pod");
    let (backend, ip) = (format!("flows/{}", text("/metadata/name")?), text("/status/podIP")?);
    c.apply(&[caller(&[&web, &nobody, &format!("{closed}:8080")].map(|host| format!("http://{host}/")))])?;
    c.wait("the caller runs", 60, || Ok(address("pod", "caller", "/status/podIP").is_ok()))?;

    let all = follow(c, &["--pod", "flows/caller"])?;
    let of = |flows: &[Value], reason: &str| flows.iter().find(|f| f["reason"] == reason).cloned();
    let translated = of(&all, "translated").with_context(|| format!("a call to the service: {all:?}"))?;
    let wanted = json!({
        "node": NODE, "verdict": "translated", "source": {"pod": "flows/caller"}, "destination": {"pod": backend},
        "service": {"name": "flows/web", "port": 80, "by": "virtual"}, "protocol": "TCP", "hook": "socket",
        "before": {"destination": format!("{web}:80")}, "after": {"destination": format!("{ip}:8080")},
    });
    said(&translated, &wanted)?;
    let refused = of(&all, "no_backend").with_context(|| format!("a call to nobody: {all:?}"))?;
    let wanted = json!({
        "node": NODE, "verdict": "refused", "source": {"pod": "flows/caller"},
        "service": {"name": "flows/nobody", "port": 80, "by": "virtual"}, "protocol": "TCP",
        "before": {"destination": format!("{nobody}:80")},
    });
    said(&refused, &wanted)?;

    let drops = follow(c, &["--drops", "--pod", "flows/closed"])?;
    ensure!(drops.iter().all(|f| f["verdict"] == "dropped" || f["verdict"] == "refused"), "{drops:?}");
    let dropped = of(&drops, "dropped_inbound").with_context(|| format!("a call that ends at the pod: {drops:?}"))?;
    let wanted = json!({
        "node": NODE, "verdict": "dropped", "source": {"pod": "flows/caller"},
        "destination": {"pod": "flows/closed"}, "protocol": "TCP", "hook": "listener",
    });
    said(&dropped, &wanted)?;
    ensure!(dropped["before"]["destination"] == format!("{closed}:8080"), "{dropped}");
    ensure!(drops.iter().all(|f| f["service"]["name"] != "flows/nobody"), "another pod's: {drops:?}");

    // As people read it.
    let lines = c.sluice_ok(&["flows", "--pod", "flows/caller", "--last", LAST])?;
    for wanted in ["flows/caller → flows/web:80", "TCP translated", "TCP refused: no_backend"] {
        ensure!(lines.contains(wanted), "{wanted} is not in {lines}");
    }
    c.delete_namespace("flows")
}

/// Everything that is wanted is in the flow as it is wanted.
fn said(flow: &Value, wanted: &Value) -> Result<()> {
    for (field, value) in wanted.as_object().context("fields")? {
        ensure!(&flow[field] == value, "{field} is not {value} in {flow}");
    }
    Ok(())
}
