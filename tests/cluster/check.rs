//! `sluice check` and `sluice install` on machines whose kernel, agent and plugin are the real ones.

use crate::{
    cluster::{Cluster, NODES},
    load::{echo, service},
};
use anyhow::{Context, Result, ensure};
use serde_json::json;

/// Whether all is well, and what was printed.
fn check(c: &Cluster) -> Result<(bool, String)> {
    let out = c.sluice(&["check"]).output()?;
    Ok((
        out.status.success(),
        format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr)),
    ))
}

pub fn in_order(c: &Cluster) -> Result<String> {
    let mut last = String::new();
    let waited = c.wait("check finds all in order", 60, || {
        let (well, said) = check(c)?;
        last = said;
        Ok(well)
    });
    waited.with_context(|| last.clone())?;
    Ok(last)
}

/// Namespaces, leases and links of probes.
fn probes_left(c: &Cluster) -> Result<Vec<String>> {
    let look = "ls /run/sluice/check /var/lib/sluice/cni/leases/*/ | grep -e netns -e sluice-check || true";
    let left = NODES.iter().map(|n| Ok(format!("{n}: {}", c.inside(n, look)?.trim())));
    Ok(left.collect::<Result<Vec<_>>>()?.into_iter().filter(|l| !l.ends_with(": ")).collect())
}

/// Every path is walked on a healthy cluster; one that is cut is named; nothing stays, not even of an agent that is killed.
pub fn check_walks_the_paths(c: &Cluster) -> Result<()> {
    c.namespace("check", false)?;
    let mut web = service("check", "web", json!({"app": "echo"}));
    web["spec"]["type"] = "NodePort".into();
    c.apply(&[echo("check", "web", "v1", 2), web])?;
    c.rollout("check", "web")?;
    let said = in_order(c)?;
    for from in NODES {
        for to in NODES.iter().filter(|to| **to != from) {
            ensure!(said.contains(&format!("path pod on {from} -> pod on {to}")), "{from} -> {to}: {said}");
            ensure!(said.contains(&format!("path outside ({from}) -> node port")), "{said}");
        }
        for line in
            [format!("path pod on {from} -> service check/web"), format!("path pod on {from} -> the cluster's DNS")]
        {
            ensure!(said.contains(&line), "{line}: {said}");
        }
        ensure!(
            said.contains(&format!("kernel of {from}")) && said.contains(&format!("mtu of pods on {from}")),
            "{said}"
        );
    }

    // Routes that are not the agent's: it does not take them away.
    let range = c.json(&["get", "node", "node-2"])?["spec"]["podCIDR"].as_str().context("a range")?.to_owned();
    let network = range.strip_suffix(".0/24").context("a /24")?;
    let routes = |verb: &str| {
        let script = ["0", "128"].map(|half| format!("ip route {verb} unreachable {network}.{half}/25"));
        c.inside("node-1", &script.join(" && "))
    };
    routes("add")?;
    let cut = check(c);
    routes("del")?;
    let (well, said) = cut?;
    ensure!(!well && said.contains("WRONG path pod on node-1 -> pod on node-2"), "{said}");
    ensure!(said.contains("ip route get") && said.contains("ok    path pod on node-3 -> pod on node-2"), "{said}");
    in_order(c)?;

    c.kill_program("node-1", "agent")?;
    c.wait("nothing of the probes stays", 60, || Ok(probes_left(c)?.is_empty()))
        .with_context(|| format!("{:?}", probes_left(c)))?;
    c.delete_namespace("check")
}

/// The installed plugin itself says that pods can be added; an agent that runs is not uninstalled under its feet.
pub fn install_waits_for_the_plugin(c: &Cluster) -> Result<()> {
    let bin = c.bin().display();
    let places = "--no-service --bin-dir=/run/test-cni --program-dir=/run/test-programs --conf-dir=/run/cni/net.d";
    let said = c.inside("node-2", &format!("{bin}/sluice install {places} --from={bin} --timeout=30"))?;
    ensure!(said.contains("pods can be added"), "{said}");
    let files = c.inside("node-2", "ls /run/test-cni /run/test-programs")?;
    ensure!(["sluice-cni", "loopback", "sluice-agent"].iter().all(|f| files.contains(f)), "{files}");
    let refused = c.inside("node-2", &format!("{bin}/sluice uninstall {places} 2>&1 || true"))?;
    ensure!(refused.contains("sluice-agent runs (process"), "{refused}");
    c.inside("node-2", "test -e /run/cni/net.d/10-sluice.conflist && rm -r /run/test-cni /run/test-programs")?;
    Ok(())
}
