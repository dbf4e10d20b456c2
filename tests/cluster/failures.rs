//! What dies, and what must go on meanwhile.

use crate::{
    cluster::{Cluster, programs, ready},
    load::{Load, client, deliveries, echo, prove_exactly_once, service, split_service, version},
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Mission row 19: agents and control are killed and come back; traffic, split and names go on, no pod is doubled.
pub fn agent_and_control_killed_under_load(c: &Cluster) -> Result<()> {
    c.namespace("kills", true)?;
    c.apply(&[echo("kills", "echo-v1", "v1", 2), echo("kills", "echo-v2", "v2", 1)])?;
    c.apply(&split_service("kills", 80, 20))?;
    c.rollout("kills", "echo-v1")?;
    c.rollout("kills", "echo-v2")?;
    let uids = || -> Result<BTreeSet<String>> {
        Ok(c.pods("kills", "app=echo")?.iter().map(|p| p["metadata"]["uid"].to_string()).collect())
    };
    let before = uids()?;
    let load = Load { rps: 300, seconds: 20, fresh: true, headers: vec![] };
    load.start(c, "kills", "kills", "http://echo/")?;
    // Beside the load, whose client asks for the name once: a pod that asks again and again, for 20 seconds too.
    c.apply(&[asker("kills")])?;
    c.wait("names are asked for", 30, || Ok(c.kubectl(&["-n", "kills", "logs", "asker"])?.contains("asking")))?;
    let began = Instant::now();
    for (machine, program) in [("node-1", "agent"), ("node-2", "agent"), ("node-3", "agent"), ("control", "control")] {
        c.kill_program(machine, program)?;
    }
    c.wait("control answers again", 30, || Ok(c.kubectl(&["get", "nodes"]).is_ok()))?;
    ensure!(began.elapsed() < Duration::from_secs(12), "the kills were over before the load: {:?}", began.elapsed());
    let report = load.finish(c, "kills", "kills")?;
    prove_exactly_once(c, "kills", "kills", &report)?;
    let (sent, v2) = (report["sent"].as_u64().context("sent")?, version(&report, "v2"));
    ensure!(v2.abs_diff(sent / 5) <= 2, "{v2} of {sent} at 20 %");
    c.kubectl(&["-n", "kills", "wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/asker", "--timeout=60s"])?;
    let asked = c.kubectl(&["-n", "kills", "logs", "asker"])?;
    eprintln!("names while agents and control were killed: {}", asked.trim());
    ensure!(asked.contains(", 0 wrong"), "{asked}");
    ensure!(uids()? == before, "the same pods, none twice");
    c.kubectl(&["wait", "--for=condition=Ready", "node", "--all", "--timeout=30s"])?;
    c.delete_namespace("kills")
}

/// Sidecars are killed, of apps and of a caller: what dials meanwhile waits for the next one, and nobody is refused.
pub fn sidecars_killed_under_load(c: &Cluster) -> Result<()> {
    const STRUCK: &str = "struck";
    c.namespace(STRUCK, true)?;
    c.apply(&[echo(STRUCK, "echo", "v1", 2), service(STRUCK, "echo", json!({"app": "echo"}))])?;
    c.rollout(STRUCK, "echo")?;
    let load = Load { rps: 50, seconds: 25, fresh: true, headers: vec![] };
    let mut plain = client(STRUCK, "plain", &load.args("http://echo/", "plain"));
    plain["metadata"]["labels"]["sluice.dev/inject"] = "disabled".into();
    c.apply(&[plain, client(STRUCK, "meshed", &load.args("http://echo/", "meshed"))])?;
    for name in ["plain", "meshed"] {
        c.wait("requests arrive", 60, || Ok(!deliveries(c, STRUCK, name)?.is_empty()))?;
    }
    let mut struck: Vec<_> = c.pods(STRUCK, "app=echo")?.iter().map(|p| p["metadata"]["name"].to_string()).collect();
    struck.push("meshed".into());
    for pod in &struck {
        let pod = pod.trim_matches('"');
        let (node, pid) = c.sidecar(STRUCK, pod)?.with_context(|| format!("the sidecar of {pod}"))?;
        c.inside(&node, &format!("kill -9 {pid}"))?;
        c.wait(&format!("{pod} has another sidecar"), 20, || {
            let restarts = c.json(&["-n", STRUCK, "get", "pod", pod])?;
            let sidecar = restarts["status"]["initContainerStatuses"][0].clone();
            Ok(sidecar["restartCount"] == 1 && sidecar["ready"] == true)
        })?;
    }
    for name in ["plain", "meshed"] {
        ensure!(
            c.json(&["-n", STRUCK, "get", "pod", name])?["status"]["phase"] == "Running",
            "the load was over before"
        );
        let report = load.finish(c, STRUCK, name)?;
        eprintln!("sidecars killed, {name}: {report}");
        // What was on its way through a sidecar at that moment may be lost, and how long the next one takes to start is the
        // machine's affair; but nobody is refused.
        let kinds = report["failures"].as_object().context("failures")?;
        let late = kinds.get("timeout").map_or(0, |k| k["count"].as_u64().unwrap_or(0));
        let lost = report["failed"].as_u64().context("failed")? - late;
        let refused = kinds.keys().any(|k| k.contains("status") || k.contains("refused"));
        ensure!(!refused && lost <= 3 && late <= 100, "{name}: {report}");
    }
    c.delete_namespace(STRUCK)
}

/// Asks for a service's name for twenty seconds; each question must be answered, the first time.
fn asker(namespace: &str) -> Value {
    let script = "echo asking; n=0; bad=0; end=$(($(date +%s)+20))
        while [ $(date +%s) -lt $end ]; do
            n=$((n+1)); nslookup echo.$NS.svc.cluster.local 10.96.0.10 >/dev/null 2>&1 || bad=$((bad+1))
        done
        echo $n asked, $bad wrong";
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "asker", "namespace": namespace, "labels": {"sluice.dev/inject": "disabled"}},
        "spec": {"restartPolicy": "Never", "containers": [{
            "name": "sh", "image": "sluice.local/echo:1", "command": ["/bin/sh", "-c", script],
            "env": [{"name": "NS", "value": namespace}]}]}
    })
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

/// `down` leaves no namespace, cgroup, mount, program of the kernel or process. It is the last test: the cluster is gone.
pub fn down_leaves_nothing(c: &Cluster) -> Result<()> {
    let mine = format!("sluice-{}-", c.name());
    let cgroups = cgroups_of(&mine)?;
    let pids: BTreeSet<i32> =
        cgroups.iter().map(|d| pids_below(d)).collect::<Result<Vec<_>>>()?.concat().into_iter().collect();
    let inside: BTreeSet<PathBuf> = pids.iter().flat_map(|pid| namespaces(*pid)).collect();
    let host: BTreeSet<_> = namespaces(std::process::id().cast_signed()).into_iter().collect();
    let own: BTreeSet<_> = inside.difference(&host).cloned().collect();
    // Four machines: each has a first process and what it runs, and namespaces of three kinds.
    ensure!(pids.len() >= 12 && own.len() >= 12, "{} processes in {} namespaces run", pids.len(), own.len());
    c.sluice_ok(&["down"])?;
    ensure!(!c.dir().exists(), "the folder is gone");
    ensure!(cgroups_of(&mine)?.is_empty(), "cgroups are left: {:?}", cgroups_of(&mine)?);
    let mounts = fs::read_to_string("/proc/mounts")?;
    ensure!(!mounts.contains(c.name()), "a mount is left: {mounts}");
    // Namespaces live as long as a process, a mount or a descriptor is in them; the first two can be seen.
    let all = fs::read_dir("/proc")?.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    for pid in all {
        let left: Vec<_> = namespaces(pid).into_iter().filter(|n| own.contains(n)).collect();
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ");
        ensure!(left.is_empty(), "process {pid} ({line}) is left in {left:?}");
    }
    // Programs are freed a moment after their last link.
    c.wait("the kernel's programs are gone", 10, || Ok(programs() <= c.programs_before))?;
    c.sluice_ok(&["down"]).context("a second down is harmless")?;
    Ok(())
}

/// Folders of a cluster's machines in all hierarchies.
pub fn cgroups_of(prefix: &str) -> Result<Vec<PathBuf>> {
    let root = fs::read_dir("/sys/fs/cgroup")?.flatten();
    let (mut found, mut hierarchies) = (vec![], vec![]);
    for entry in root {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        } else {
            hierarchies.push(entry.path());
        }
    }
    for entry in hierarchies.iter().flat_map(|h| fs::read_dir(h).into_iter().flatten().flatten()) {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

pub fn pids_below(cgroup: &Path) -> Result<Vec<i32>> {
    let own = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut pids: Vec<i32> = own.lines().filter_map(|l| l.parse().ok()).collect();
    for entry in fs::read_dir(cgroup)?.flatten().filter(|e| e.path().is_dir()) {
        pids.extend(pids_below(&entry.path())?);
    }
    Ok(pids)
}

fn namespaces(pid: i32) -> Vec<PathBuf> {
    ["net", "mnt", "pid"].iter().filter_map(|n| fs::read_link(format!("/proc/{pid}/ns/{n}")).ok()).collect()
}
