//! No rule of nftables or iptables is anywhere, whatever is in use.

use crate::{
    check,
    cluster::{Cluster, NODES},
    failures::{cgroups_of, pids_below},
    load::{Load, echo, prove_exactly_once, service},
    network::script_on,
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    io::Write,
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

/// As ufw has it: nothing comes in but what docs/network.md names, nothing is forwarded, what the kernel cannot place is
/// dropped. `HEALTH` stands for the health-check node port.
const CLOSED: &str = r#"
table inet hostwall {
  chain input {
    type filter hook input priority 0; policy drop;
    iifname "lo" accept
    ct state invalid drop
    ct state established,related accept
    meta l4proto { icmp, ipv6-icmp } accept
    ip daddr 169.254.1.1 meta l4proto { tcp, udp } th dport 53 accept
    udp dport 8472 accept
    tcp dport { 10250, HEALTH } accept
  }
  chain forward {
    type filter hook forward priority 0; policy drop;
    ct state invalid drop
    ct state established,related accept
  }
}
"#;

/// As Docker has it beside its containers: FORWARD is closed but for them, their ports are translated, they are masqueraded,
/// and nobody reaches them past their bridge.
const CONTAINERS: &str = r#"
table ip hostnat {
  chain prerouting {
    type nat hook prerouting priority -100;
    fib daddr type local jump docker
  }
  chain output {
    type nat hook output priority -100;
    ip daddr != 127.0.0.0/8 fib daddr type local jump docker
  }
  chain postrouting {
    type nat hook postrouting priority 100;
    ip saddr 172.17.0.0/16 oifname != "docker0" masquerade
  }
  chain docker {
    tcp dport 8081 dnat to 172.17.0.2:80
  }
}
table ip hostfilter {
  chain forward {
    type filter hook forward priority 0; policy drop;
    jump docker-user
    oifname "docker0" ct state established,related accept
    iifname "docker0" accept
  }
  chain docker-user {
    return
  }
}
table ip hostraw {
  chain prerouting {
    type filter hook prerouting priority -300;
    ip daddr 172.17.0.2 iifname != "docker0" drop
  }
}
"#;

/// In a machine's network.
fn nft(c: &Cluster, machine: &str, script: &str) -> Result<()> {
    let pid = c.machine_pid(machine)?.to_string();
    let mut nft = Command::new("nsenter");
    nft.args(["-t", &pid, "-n", "nft", "-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = nft.spawn().context("run nft in a machine (package nftables)")?;
    child.stdin.take().context("nft's input")?.write_all(script.as_bytes())?;
    let out = child.wait_with_output()?;
    ensure!(out.status.success(), "nft in {machine}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// Given nodes with the firewalls that hosts have, everything that is promised works: between pods, by services and names,
/// from outside by each kind of address.
pub fn rule_sets_of_hosts_are_no_obstacle(c: &Cluster) -> Result<()> {
    let outcome = behind_rule_sets(c);
    let cleared: Result<()> = NODES.iter().try_for_each(|node| nft(c, node, "flush ruleset"));
    outcome.and(cleared)?;
    c.delete_namespace("behind")
}

fn behind_rule_sets(c: &Cluster) -> Result<()> {
    c.namespace("behind", false)?;
    let mut web = echo("behind", "web", "v1", 3);
    web["spec"]["template"]["spec"]["containers"][0]["ports"][0]["hostPort"] = 18_081.into();
    let with = |name: &str, kind: &str, policy: &str| {
        let mut service = service("behind", name, json!({"app": "echo"}));
        (service["spec"]["type"], service["spec"]["externalTrafficPolicy"]) = (kind.into(), policy.into());
        service
    };
    c.apply(&[
        web,
        service("behind", "web", json!({"app": "echo"})),
        with("ports", "NodePort", "Cluster"),
        with("balanced", "LoadBalancer", "Local"),
    ])?;
    c.rollout("behind", "web")?;
    let of = |name: &str| c.json(&["-n", "behind", "get", "service", name]);
    let port = of("ports")?["spec"]["ports"][0]["nodePort"].as_u64().context("a node port")?;
    let (mut address, mut health) = (String::new(), 0);
    c.wait("the balancer has an address", 30, || {
        let balanced = of("balanced")?;
        address = balanced["status"]["loadBalancer"]["ingress"][0]["ip"].as_str().unwrap_or_default().to_owned();
        health = balanced["spec"]["healthCheckNodePort"].as_u64().unwrap_or(0);
        Ok(!address.is_empty() && health > 0)
    })?;
    let closed = CLOSED.replace("HEALTH", &health.to_string());
    for (name, rules) in [("closed", closed.as_str()), ("containers", CONTAINERS)] {
        for node in NODES {
            nft(c, node, &format!("flush ruleset\n{rules}"))?;
            // As on a host that has had its rules from its start: they know of no connection from before.
            c.kill_program(node, "agent")?;
        }
        // Every pair of nodes, each node's services and resolver, each node's node ports from the others.
        check::in_order(c).with_context(|| format!("behind the rules {name}"))?;
        for node in NODES {
            let ip = c.json(&["get", "node", node])?["status"]["addresses"][0]["address"].clone();
            let ip = ip.as_str().context("the node's address")?;
            for url in [
                format!("http://{ip}:{port}/"),
                format!("http://{ip}:18081/"),
                format!("http://{address}/"),
                format!("http://{ip}:{health}/healthz"),
            ] {
                c.wait(&format!("{url} answers behind the rules {name}"), 30, || {
                    Ok(c.inside("control", &format!("curl -sf -m 2 -o /dev/null {url}")).is_ok())
                })?;
            }
        }
        // By name, over connections of their own, and longer than one packet.
        let ask = "for i in $(seq 20); do timeout 2 wget -q -O - http://web/ || echo failed; done";
        let log = script_on(c, Some(NODES[0]), "behind", &format!("ask-{name}"), ask)?;
        ensure!(log.matches("\"version\":\"v1\"").count() == 20, "behind the rules {name}: {log}");
        let load = Load { rps: 50, seconds: 3, fresh: true, headers: vec![] };
        let caller = format!("caller-{name}");
        let report = load.run(c, "behind", &caller, "http://web/")?;
        prove_exactly_once(c, "behind", &caller, &report)?;
    }
    Ok(())
}
