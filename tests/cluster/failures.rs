//! What dies, and what must go on meanwhile.

use crate::{
    cluster::{Cluster, ready},
    load::{Load, echo, prove_exactly_once, service},
};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::{collections::BTreeSet, fs};

/// Mission row 19: agents and control are killed and come back; no request fails, no pod is doubled.
pub fn agent_and_control_killed_under_load(c: &Cluster) -> Result<()> {
    c.namespace("kills", true)?;
    c.apply(&[echo("kills", "echo-v1", "v1", 3), service("kills", "echo", json!({"app": "echo"}))])?;
    c.rollout("kills", "echo-v1")?;
    let uids = || -> Result<BTreeSet<String>> {
        Ok(c.pods("kills", "app=echo")?.iter().map(|p| p["metadata"]["uid"].to_string()).collect())
    };
    let before = uids()?;
    let load = Load { rps: 300, seconds: 20, fresh: true, headers: vec![] };
    load.start(c, "kills", "kills", "http://echo/")?;
    for (machine, program) in [("node-1", "agent"), ("node-2", "agent"), ("node-3", "agent"), ("control", "control")] {
        c.kill_program(machine, program)?;
    }
    c.wait("control answers again", 30, || Ok(c.kubectl(&["get", "nodes"]).is_ok()))?;
    let report = load.finish(c, "kills", "kills")?;
    prove_exactly_once(c, "kills", "kills", &report)?;
    ensure!(uids()? == before, "the same pods, none twice");
    c.kubectl(&["wait", "--for=condition=Ready", "node", "--all", "--timeout=30s"])?;
    c.delete_namespace("kills")
}

/// Mission row 4: a machine is switched off; its pods' endpoints go, its pods come up elsewhere.
pub fn a_lost_node_loses_its_pods(c: &Cluster) -> Result<()> {
    c.namespace("lost", false)?;
    c.apply(&[echo("lost", "echo-v1", "v1", 3), service("lost", "echo", json!({"app": "echo"}))])?;
    c.rollout("lost", "echo-v1")?;
    let on = |node: &str| -> Result<usize> {
        Ok(c.pods("lost", "app=echo")?.iter().filter(|p| p["spec"]["nodeName"] == node && ready(p)).count())
    };
    ensure!(on("node-3")? > 0, "a pod runs on node-3");
    c.sluice_ok(&["node-kill", "2"])?;
    c.wait("node-3 is not ready", 40, || {
        let n = c.json(&["get", "node", "node-3"])?;
        let all = n["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(all.iter().any(|x| x["type"] == "Ready" && x["status"] != "True"))
    })?;
    c.wait("three pods are ready on the others", 60, || Ok(on("node-1")? + on("node-2")? >= 3))?;
    c.sluice_ok(&["node-start", "2"])?;
    c.kubectl(&["wait", "--for=condition=Ready", "node/node-3", "--timeout=60s"])?;
    c.delete_namespace("lost")
}

/// `down` leaves no namespace, cgroup, mount, pin or process; the cluster is up again afterwards for whoever follows.
pub fn down_leaves_nothing(c: &Cluster) -> Result<()> {
    let pids: Vec<i32> =
        ["control", "node-1", "node-2", "node-3"].iter().map(|m| c.machine_pid(m)).collect::<Result<_>>()?;
    c.sluice_ok(&["down"])?;
    for pid in pids {
        ensure!(!fs::exists(format!("/proc/{pid}"))?, "process {pid} is gone");
    }
    ensure!(!c.dir().exists(), "the folder is gone");
    let mine = format!("sluice-{}-", c.name());
    for h in fs::read_dir("/sys/fs/cgroup")?
        .flatten()
        .chain(fs::read_dir("/sys/fs/cgroup/unified").into_iter().flatten().flatten())
    {
        ensure!(!h.file_name().to_string_lossy().starts_with(&mine), "cgroup {:?}", h.path());
        for inner in fs::read_dir(h.path()).into_iter().flatten().flatten() {
            ensure!(!inner.file_name().to_string_lossy().starts_with(&mine), "cgroup {:?}", inner.path());
        }
    }
    let mounts = fs::read_to_string("/proc/mounts")?;
    ensure!(!mounts.contains(c.name()), "a mount is left: {mounts}");
    let left = fs::read_dir("/proc")?.flatten().filter_map(|e| fs::read_to_string(e.path().join("cmdline")).ok());
    let left: Vec<_> = left.filter(|l| l.contains(&c.dir().to_string_lossy().into_owned())).collect();
    ensure!(left.is_empty(), "processes are left: {left:?}");
    c.sluice_ok(&["down"]).context("a second down is harmless")?;
    Ok(())
}
