//! IPv4 and IPv6, both in one cluster and one alone.

use crate::{
    cluster::{Cluster, NODES},
    load::{echo, service},
    network::{script, script_on},
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

fn with(namespace: &str, name: &str, spec: Value) -> Value {
    let mut service = service(namespace, name, json!({"app": "echo"}));
    service["spec"].as_object_mut().expect("a spec").extend(spec.as_object().expect("fields").clone());
    service
}

/// The service's own addresses.
fn addresses(c: &Cluster, namespace: &str, name: &str) -> Result<Vec<String>> {
    let service = c.json(&["-n", namespace, "get", "service", name])?;
    let all = service["spec"]["clusterIPs"].as_array().cloned().unwrap_or_default();
    Ok(all.iter().filter_map(|ip| ip.as_str().map(str::to_owned)).collect())
}

/// A pod's or a load balancer's, with both families, the primary one first.
fn pair(list: &Value) -> Result<[String; 2]> {
    let ip = |n: usize| list[n]["ip"].as_str().map(str::to_owned).with_context(|| format!("two addresses in {list}"));
    let both = [ip(0)?, ip(1)?];
    ensure!(!both[0].contains(':') && both[1].contains(':'), "IPv4 first: {both:?}");
    Ok(both)
}

/// As an URL has it.
pub fn host(ip: &str) -> String {
    if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() }
}

/// A service of both families is reached by both of its addresses from every node, by its node port and by its load
/// balancer's addresses from outside; its name has both, and names of one family have nothing of the other.
pub fn services_of_both_families(c: &Cluster) -> Result<()> {
    c.namespace("both", false)?;
    let balanced = json!({"type": "LoadBalancer", "ipFamilyPolicy": "RequireDualStack"});
    c.apply(&[
        echo("both", "web", "v1", 2),
        with("both", "web", balanced),
        with("both", "six", json!({"ipFamilies": ["IPv6"], "type": "NodePort"})),
        with("both", "pods", json!({"clusterIP": "None", "ipFamilyPolicy": "PreferDualStack"})),
    ])?;
    c.rollout("both", "web")?;
    let (both, six) = (addresses(c, "both", "web")?, addresses(c, "both", "six")?);
    ensure!(both.len() == 2 && !both[0].contains(':') && both[1].contains(':'), "one of each family: {both:?}");
    ensure!(six.len() == 1 && six[0].contains(':'), "IPv6 alone: {six:?}");
    let pods = c.pods("both", "app=echo")?;
    let pods: Vec<[String; 2]> = pods.iter().map(|p| pair(&p["status"]["podIPs"])).collect::<Result<_>>()?;

    let get = |ip: &str| format!("echo '{ip}' $(wget -q -O - http://{}/ || echo refused);", host(ip));
    let ask: String = [&both[0], &both[1], &six[0]].map(|ip| get(ip)).concat();
    for node in NODES {
        let log = script_on(c, Some(node), "both", &format!("ask-{node}"), &ask)?;
        for ip in both.iter().chain(&six) {
            let answered = log.lines().any(|l| l.starts_with(ip) && l.contains("\"version\":\"v1\""));
            ensure!(answered, "{ip} from {node}: {log}");
        }
    }

    let lookup = |name: &str, kind: &str, server: &str| {
        format!(
            "echo '{name} {kind} {server}' $(nslookup -type={kind} {name}.both.svc.cluster.local {server} | \
                 busybox sed -n '/^Name/,$p' | busybox grep Address);"
        )
    };
    let servers = ["10.96.0.10", "fd73:6c75:6963:ffff::a"];
    let asked =
        ["web", "six", "pods"].map(|n| ["A", "AAAA"].map(|k| servers.map(|s| lookup(n, k, s)))).concat().concat();
    let log = script(c, "both", "names", &asked.concat())?;
    for server in servers {
        let line = |name: &str, kind: &str| {
            let head = format!("{name} {kind} {server}");
            let found = log.lines().find_map(|l| l.strip_prefix(&head)).with_context(|| format!("{head}: {log}"))?;
            let mut ips: Vec<&str> = found.split_whitespace().filter(|w| *w != "Address:").collect();
            ips.sort_unstable();
            Ok::<_, anyhow::Error>(ips.join(" "))
        };
        ensure!(line("web", "A")? == both[0] && line("web", "AAAA")? == both[1], "both addresses: {log}");
        ensure!(line("six", "A")?.is_empty() && line("six", "AAAA")? == six[0], "nothing of IPv4: {log}");
        for (n, kind) in ["A", "AAAA"].into_iter().enumerate() {
            let mut want: Vec<&str> = pods.iter().map(|pod| pod[n].as_str()).collect();
            want.sort_unstable();
            ensure!(line("pods", kind)? == want.join(" "), "pods by {kind}: {log}");
        }
    }
    from_outside(c)?;
    c.delete_namespace("both")
}

fn from_outside(c: &Cluster) -> Result<()> {
    let outside = |ip: &str, port: &Value| c.inside("control", &format!("curl -gsSf -m 5 http://{}:{port}/", host(ip)));
    let web = c.json(&["-n", "both", "get", "service", "web"])?;
    let six = c.json(&["-n", "both", "get", "service", "six"])?;
    let (port, port6) = (&web["spec"]["ports"][0]["nodePort"], &six["spec"]["ports"][0]["nodePort"]);
    for node in NODES {
        let node = c.json(&["get", "node", node])?;
        let internal = node["status"]["addresses"].as_array().cloned().unwrap_or_default();
        let internal: Vec<&str> =
            internal.iter().filter(|a| a["type"] == "InternalIP").filter_map(|a| a["address"].as_str()).collect();
        ensure!(internal.len() == 2, "a node has an address of each family: {internal:?}");
        for ip in &internal {
            let answer = outside(ip, port)?;
            ensure!(answer.contains("\"version\":\"v1\""), "node port of {ip}: {answer}");
        }
        ensure!(outside(internal[0], port6).is_err(), "a service of IPv6 has no node port of IPv4");
        ensure!(outside(internal[1], port6)?.contains("v1"), "its node port of IPv6");
    }
    c.wait("the load balancer has its addresses", 10, || {
        let web = c.json(&["-n", "both", "get", "service", "web"])?;
        Ok(pair(&web["status"]["loadBalancer"]["ingress"]).is_ok())
    })?;
    let web = c.json(&["-n", "both", "get", "service", "web"])?;
    for ip in pair(&web["status"]["loadBalancer"]["ingress"])? {
        c.wait("a node answers for it", 10, || Ok(outside(&ip, &json!(80))?.contains("\"version\":\"v1\"")))?;
    }
    Ok(())
}

/// A meshed pod's IPv6 is captured on both sides: a strict pod is reached by a caller with a sidecar, by the service's
/// addresses and by the pod's own, and by no other.
pub fn meshed_pods_speak_ipv6(c: &Cluster) -> Result<()> {
    c.namespace("mesh6", true)?;
    let mut strict = echo("mesh6", "web", "v1", 1);
    strict["spec"]["template"]["metadata"]["annotations"] = json!({"sluice.dev/mtls": "strict"});
    c.apply(&[strict, with("mesh6", "web", json!({"ipFamilyPolicy": "RequireDualStack"}))])?;
    c.rollout("mesh6", "web")?;
    let pods = c.pods("mesh6", "app=echo")?;
    let [_, pod] = pair(&pods.first().context("a pod")?["status"]["podIPs"])?;
    let vips = addresses(c, "mesh6", "web")?;
    let urls = [format!("{}:80", host(&vips[0])), format!("{}:80", host(&vips[1])), format!("{}:8080", host(&pod))];
    let ask: String = urls.iter().map(|u| format!("echo '{u}' $(wget -q -O - http://{u}/ || echo refused);")).collect();
    let answered = |log: &str, url: &str| log.lines().any(|l| l.starts_with(url) && l.contains("\"version\":\"v1\""));
    let log = script(c, "mesh6", "ask", &ask)?;
    ensure!(urls.iter().all(|url| answered(&log, url)), "with a sidecar: {log}");
    c.namespace("plain6", false)?;
    let log = script(c, "plain6", "ask", &ask)?;
    ensure!(urls.iter().all(|url| !answered(&log, url)), "without one: {log}");
    c.delete_namespace("plain6")?;
    c.delete_namespace("mesh6")
}

/// A cluster of IPv6 alone, beside the one of all other tests: pods, names, services and node ports, the mesh included.
pub fn ipv6_alone(_: &Cluster) -> Result<()> {
    let c = Cluster::start_with("six", &["--nodes=2", "--ip-families=ipv6"])?;
    let result = c.run("in a cluster of IPv6 alone", |c| {
        c.namespace("alone", true)?;
        c.apply(&[echo("alone", "web", "v1", 2), with("alone", "web", json!({"type": "NodePort"}))])?;
        c.rollout("alone", "web")?;
        let pods = c.pods("alone", "app=echo")?;
        let one = |p: &Value| p["status"]["podIPs"].as_array().is_some_and(|ips| ips.len() == 1);
        ensure!(pods.iter().all(|p| one(p) && p["status"]["podIP"].as_str().is_some_and(|ip| ip.contains(':'))));
        let url = "http://web.alone.svc.cluster.local/";
        let log = script(c, "alone", "meshed", &format!("wget -q -O - {url}"))?;
        ensure!(log.contains("\"version\":\"v1\""), "meshed: {log}");
        c.namespace("plain", false)?;
        let log = script(c, "plain", "ask", &format!("wget -q -O - {url}"))?;
        ensure!(log.contains("\"version\":\"v1\""), "plain: {log}");
        let web = c.json(&["-n", "alone", "get", "service", "web"])?;
        let port = &web["spec"]["ports"][0]["nodePort"];
        let node = c.json(&["get", "node", "node-2"])?["status"]["addresses"][0]["address"].clone();
        let node = node.as_str().context("an address")?;
        let answer = c.inside("control", &format!("curl -gsSf -m 5 http://{}:{port}/", host(node)))?;
        ensure!(answer.contains("\"version\":\"v1\""), "node port: {answer}");
        Ok(())
    });
    let left = c.stop();
    result.and(left)
}
