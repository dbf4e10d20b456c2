//! No rule of nftables or iptables is anywhere, whatever is in use.

use crate::{
    cluster::Cluster,
    failures::{cgroups_of, pids_below},
    load::{Load, echo, prove_exactly_once, service},
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    process::{Command, Stdio},
};

/// Runs behind the other tests, so that what they left would be seen; and uses each feature itself, should it run alone.
pub fn firewalls_are_left_alone(c: &Cluster) -> Result<()> {
    let before = rules(c)?;
    c.namespace("walls", true)?;
    let with = |name: &str, spec: Value| {
        let mut service = service("walls", name, json!({"app": "echo"}));
        service["spec"].as_object_mut().expect("a spec").extend(spec.as_object().expect("fields").clone());
        service
    };
    let mut web = echo("walls", "web", "v1", 3);
    web["spec"]["template"]["spec"]["containers"][0]["ports"][0]["hostPort"] = 18_080.into();
    c.apply(&[
        web,
        with("plain", json!({})),
        with("sticky", json!({"sessionAffinity": "ClientIP"})),
        with("near", json!({"internalTrafficPolicy": "Local"})),
        with("ports", json!({"type": "NodePort"})),
        with("outside", json!({"externalIPs": ["192.0.2.11"]})),
        with("balanced", json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"})),
    ])?;
    c.rollout("walls", "web")?;
    let of = |name: &str| c.json(&["-n", "walls", "get", "service", name]);
    let (ports, balanced) = (of("ports")?, of("balanced")?);
    let port = ports["spec"]["ports"][0]["nodePort"].as_u64().context("a node port")?;
    let address = balanced["status"]["loadBalancer"]["ingress"][0]["ip"].as_str().context("an address")?.to_owned();
    let nodes = c.json(&["get", "node", "node-2"])?;
    let node = nodes["status"]["addresses"][0]["address"].as_str().context("the node's address")?.to_owned();
    // In through a node's links, from outside.
    for url in [format!("http://{node}:{port}/"), format!("http://{node}:18080/"), format!("http://{address}/")] {
        c.wait(&format!("{url} answers"), 30, || {
            Ok(c.inside("control", &format!("curl -sf -m 2 -o /dev/null {url}")).is_ok())
        })?;
    }
    // At the socket and through the sidecars.
    let load = Load { rps: 20, seconds: 2, fresh: true, headers: vec![] };
    let report = load.run(c, "walls", "caller", "http://sticky/")?;
    prove_exactly_once(c, "walls", "caller", &report)?;
    let during = rules(c)?;
    c.delete_namespace("walls")?;
    let after = rules(c)?;
    // Three pods have a namespace each that was not there before.
    let new = during.keys().filter(|netns| !before.contains_key(*netns)).count();
    ensure!(new >= 3, "{new} namespaces of pods were seen");
    eprintln!("rules in {} namespaces before, {} during, {} after: none", before.len(), during.len(), after.len());
    for (netns, rules) in before.iter().chain(&during).chain(&after) {
        ensure!(rules.is_empty(), "in {}: {rules:?}", netns.display());
    }
    Ok(())
}

/// What nftables and iptables have, by network namespace of the cluster's machines and pods.
fn rules(c: &Cluster) -> Result<BTreeMap<PathBuf, Vec<String>>> {
    let host = fs::read_link("/proc/self/ns/net")?;
    let mut found = BTreeMap::new();
    for cgroup in cgroups_of(&format!("sluice-{}-", c.name()))? {
        for pid in pids_below(&cgroup)? {
            // A process may be gone by now.
            let Ok(netns) = fs::read_link(format!("/proc/{pid}/ns/net")) else { continue };
            if netns == host || found.contains_key(&netns) {
                continue;
            }
            if let Some(rules) = rules_of(pid)? {
                found.insert(netns, rules);
            }
        }
    }
    Ok(found)
}

/// Nothing where the process ended meanwhile.
fn rules_of(pid: i32) -> Result<Option<Vec<String>>> {
    let mut nft = Command::new("nsenter");
    nft.args(["-t", &pid.to_string(), "-n", "nft", "-j", "list", "ruleset"]).stdin(Stdio::null());
    let out = nft.output().context("run nft in a namespace (package nftables)")?;
    if !PathBuf::from(format!("/proc/{pid}")).exists() {
        return Ok(None);
    }
    ensure!(out.status.success(), "nft of process {pid}: {}", String::from_utf8_lossy(&out.stderr));
    let all: Value = serde_json::from_slice(&out.stdout)?;
    let objects = all["nftables"].as_array().context("nft's list")?.iter();
    let mut rules: Vec<_> = objects.filter(|o| o.get("metainfo").is_none()).map(Value::to_string).collect();
    // Tables of the older iptables are there only once somebody has asked for them.
    for file in ["ip_tables_names", "ip6_tables_names"] {
        let tables = fs::read_to_string(format!("/proc/{pid}/net/{file}")).unwrap_or_default();
        rules.extend(tables.lines().map(|table| format!("{file}: {table}")));
    }
    Ok(Some(rules))
}
