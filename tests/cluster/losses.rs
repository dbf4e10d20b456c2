//! Backends, nodes and announcers that go while callers without a sidecar call: what is promised to fail nothing fails
//! nothing, and what must fail is bounded.

use crate::{
    cluster::{Cluster, NODES, ready},
    families::host,
    load::{Load, client, deliveries, echo, prove_exactly_once, service},
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

const DATAGRAMS: u16 = 9001;
/// What the cluster under test is started with: a node is lost when nothing was heard of it for so long.
const GRACE: Duration = Duration::from_secs(8);

/// The echo server with its port for datagrams, and a service in front.
fn backends(namespace: &str, replicas: u32) -> [Value; 2] {
    let mut web = echo(namespace, "web", "v1", replicas);
    let container = &mut web["spec"]["template"]["spec"]["containers"][0];
    let port = json!({"name": "udp", "containerPort": DATAGRAMS, "protocol": "UDP"});
    container["args"].as_array_mut().expect("arguments").push(format!("--udp={DATAGRAMS}").into());
    container["ports"].as_array_mut().expect("ports").push(port);
    let mut front = service(namespace, "web", json!({"app": "echo"}));
    let port = json!({"name": "udp", "port": DATAGRAMS, "targetPort": "udp", "protocol": "UDP"});
    front["spec"]["ports"].as_array_mut().expect("ports").push(port);
    [web, front]
}

fn on(c: &Cluster, namespace: &str, node: &str) -> Result<usize> {
    let pods = c.pods(namespace, "app=echo")?;
    Ok(pods.iter().filter(|p| p["spec"]["nodeName"] == node && ready(p)).count())
}

/// Every backend is replaced while three kinds of callers call: none fails, and connected datagrams are told to connect
/// again, since their sockets would otherwise go on to a pod that has gone.
pub fn backends_go_under_load(c: &Cluster) -> Result<()> {
    c.namespace("going", false)?;
    c.apply(&backends("going", 3))?;
    c.rollout("going", "web")?;
    let load = Load { rps: 100, seconds: 25, fresh: true, headers: vec![] };
    let datagrams = format!("udp://web:{DATAGRAMS}");
    let callers = [
        ("tcp", "http://web/", None),
        ("connected", &datagrams, None),
        ("unconnected", &datagrams, Some("--unconnected")),
    ];
    for (name, url, more) in callers {
        let mut args = load.args(url, name);
        args.extend(more.map(str::to_owned));
        c.apply(&[client("going", name, &args)])?;
    }
    for (name, ..) in callers {
        c.wait("requests arrive", 60, || Ok(!deliveries(c, "going", name)?.is_empty()))?;
    }
    c.kubectl(&["-n", "going", "rollout", "restart", "deployment/web"])?;
    c.rollout("going", "web")?;
    for (name, ..) in callers {
        let pod = c.json(&["-n", "going", "get", "pod", name])?;
        ensure!(pod["status"]["phase"] == "Running", "{name} was over before all backends were replaced");
    }
    for (name, ..) in callers {
        let report = load.finish(c, "going", name)?;
        eprintln!("backends go, {name}: {report}");
        let sent = report["sent"].as_u64().context("sent")?;
        ensure!(report["failed"] == 0, "{name}: {} of {sent} failed: {}", report["failed"], report["failures"]);
        if name == "connected" {
            ensure!(report["renewals"].as_u64() >= Some(1), "no socket was closed: {report}");
            // What was on its way when the socket was closed is sent again, so that it may arrive twice.
            let seen = deliveries(c, "going", name)?.len() as u64;
            ensure!(seen == sent, "{seen} of {sent} requests are in the backends' logs");
        } else {
            prove_exactly_once(c, "going", name, &report)?;
        }
    }
    c.delete_namespace("going")
}

/// A machine is switched off under load to a service with a backend on each node. Until it is known to be lost, a third of
/// the new connections go there and fail; after that none does, and the machine comes back, and takes its part of the
/// connections again, without a failure.
pub fn a_lost_node_is_not_dialled(c: &Cluster) -> Result<()> {
    const RPS: u32 = 100;
    c.namespace("off", false)?;
    c.apply(&backends("off", 3))?;
    c.rollout("off", "web")?;
    for node in NODES {
        ensure!(on(c, "off", node)? == 1, "a backend on {node}");
    }
    let load = Load { rps: RPS, seconds: 60, fresh: true, headers: vec![] };
    let mut args = load.args("http://web/", "caller");
    args.push("--progress=1".to_owned());
    let mut caller = client("off", "caller", &args);
    caller["spec"]["nodeName"] = "node-1".into();
    c.apply(&[caller])?;
    c.wait("requests arrive", 60, || Ok(!deliveries(c, "off", "caller")?.is_empty()))?;
    let killed = Instant::now();
    c.sluice_ok(&["node-kill", "2"])?;
    c.wait("node-3 is not ready", 40, || Ok(!c.node_ready("node-3")?))?;
    let known = killed.elapsed();
    c.wait("the pod is ready elsewhere", 60, || Ok(on(c, "off", "node-1")? + on(c, "off", "node-2")? >= 3))?;
    c.sluice_ok(&["node-start", "2"])?;
    c.kubectl(&["wait", "--for=condition=Ready", "node/node-3", "--timeout=60s"])?;
    c.kubectl(&["-n", "off", "rollout", "restart", "deployment/web"])?;
    c.rollout("off", "web")?;
    ensure!(on(c, "off", "node-3")? > 0, "the node takes pods again");
    let running = c.json(&["-n", "off", "get", "pod", "caller"])?["status"]["phase"] == "Running";
    ensure!(running, "the load was over before the node took pods again");
    let report = load.finish(c, "off", "caller")?;
    let log = c.kubectl(&["-n", "off", "logs", "caller", "-c", "load"])?;
    // The last line is the whole run's.
    let mut seconds: Vec<Value> = log.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    seconds.pop();
    let failing = |s: &&Value| s["failed"].as_u64() > Some(0);
    let at = |s: &Value| s["t"].as_f64().unwrap_or_default();
    let first = seconds.iter().find(failing).map(at).context("nobody dialled the lost node: nothing was tested")?;
    let last = seconds.iter().rfind(failing).map_or(first, at);
    let failed = report["failed"].as_u64().context("failed")?;
    eprintln!("node lost: known after {known:?}; {failed} failures over {:.0} s: {report}", last - first + 1.0);
    // A connection that was begun just before fails after its second; lines are a second apart at both ends.
    let over = known.as_secs_f64() + 1.0 + 2.0;
    ensure!(
        last - first <= over,
        "connections still failed {:.0} s after the first, known was {known:?}",
        last - first
    );
    // A third of what is begun until the loss is known, and five standard deviations.
    let mean = f64::from(RPS) * (known.as_secs_f64() + 1.0) / 3.0;
    ensure!(failed as f64 <= mean + 5.0 * mean.sqrt(), "{failed} failures, {mean:.0} expected at most");
    ensure!(known >= GRACE / 2, "the node was given up after {known:?}, before its grace was over");
    c.kubectl(&["-n", "off", "delete", "pod", "caller", "--timeout=60s"])?;
    let load = Load { rps: RPS, seconds: 3, fresh: true, headers: vec![] };
    let report = load.run(c, "off", "again", "http://web/")?;
    prove_exactly_once(c, "off", "again", &report)?;
    c.delete_namespace("off")
}

/// The machine that answers for a load balancer's address is switched off: another answers, and callers from outside, who
/// are on the machines' network and in no machine of the cluster's, are served again.
pub fn another_node_announces(c: &Cluster) -> Result<()> {
    c.namespace("announce", false)?;
    let [web, mut front] = backends("announce", 3);
    front["spec"]["type"] = "LoadBalancer".into();
    front["spec"]["ipFamilyPolicy"] = "RequireDualStack".into();
    c.apply(&[web, front])?;
    c.rollout("announce", "web")?;
    let mut addresses = vec![];
    c.wait("the service has an address", 30, || {
        let s = c.json(&["-n", "announce", "get", "service", "web"])?;
        let all = s["status"]["loadBalancer"]["ingress"].as_array().cloned().unwrap_or_default();
        addresses = all.iter().filter_map(|i| i["ip"].as_str().map(str::to_owned)).collect();
        Ok(addresses.len() == 2)
    })?;
    // Each address has its own order of the nodes.
    addresses.iter().try_for_each(|address| moves_and_comes_back(c, address))?;
    c.delete_namespace("announce")
}

fn moves_and_comes_back(c: &Cluster, address: &str) -> Result<()> {
    // Control's machine has the network's bridge and no program of the data path.
    let url = format!("http://{}/", host(address));
    let served = || Ok(c.inside("control", &format!("curl -g -s -m 1 -o /dev/null '{url}'")).is_ok());
    c.wait("callers from outside are served", 30, served)?;
    let before = announcer(c, address)?;
    c.sluice_ok(&["node-kill", &before.to_string()])?;
    let took =
        c.wait("callers from outside are served again", 60, || Ok(served()? && announcer(c, address)? != before))?;
    let after = announcer(c, address)?;
    if let Ok(IpAddr::V6(ip)) = address.parse() {
        let [.., a, b, d] = ip.octets();
        let group = format!("ff0200000000000000000001ff{a:02x}{b:02x}{d:02x}");
        let joined = || Ok(c.inside(NODES[after], &format!("grep -c {group} /proc/net/igmp6 || true"))?.trim() != "0");
        c.wait(&format!("{} is in the group in which {address} is solicited", NODES[after]), 10, joined)?;
    }
    eprintln!("{address} moved from {} to {}: served again after {took:.1?}", NODES[before], NODES[after]);
    // The grace, a heartbeat that came just before, control's look every second, and the pods of the lost node.
    ensure!(took < GRACE + Duration::from_secs(12), "served again only after {took:?}");
    c.sluice_ok(&["node-start", &before.to_string()])?;
    c.kubectl(&["wait", "--for=condition=Ready", &format!("node/{}", NODES[before]), "--timeout=60s"])?;
    c.wait("its address is its own again", 30, || Ok(served()? && announcer(c, address)? == before)).map(drop)
}

/// The number of the node that answers for an address, by the neighbours that control's machine knows.
fn announcer(c: &Cluster, address: &str) -> Result<usize> {
    let mac_of = |ip: &str| -> Result<String> {
        let line = c.inside("control", &format!("ip neigh show {ip}"))?;
        Ok(line.split_whitespace().skip_while(|w| *w != "lladdr").nth(1).unwrap_or_default().to_owned())
    };
    let mac = mac_of(address)?;
    let nodes = c.json(&["get", "nodes"])?;
    for (number, name) in NODES.into_iter().enumerate() {
        let all = nodes["items"].as_array().cloned().unwrap_or_default();
        let node = all.iter().find(|n| n["metadata"]["name"] == name).with_context(|| format!("node {name}"))?;
        let ip = node["status"]["addresses"][0]["address"].as_str().context("an address")?;
        if !mac.is_empty() && mac_of(ip)? == mac {
            return Ok(number);
        }
    }
    anyhow::bail!("nobody answers for {address} (link-layer address {mac:?})")
}
