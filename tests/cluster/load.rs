//! Load inside the cluster: an echo deployment whose every answered request is on record, an open-loop client with
//! numbered requests, and the comparison of both.

use crate::cluster::{Cluster, NODES};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{collections::HashMap, fs};

/// A version of the echo server. Its log lies on the node's disk, so it survives the pod.
pub fn echo(namespace: &str, name: &str, version: &str, replicas: u32) -> Value {
    let labels = json!({"app": "echo", "version": version});
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "terminationGracePeriodSeconds": 15,
                    "containers": [{
                        "name": "echo", "image": "sluice.local/echo:1",
                        "args": ["serve", format!("--version={version}"), "--http=8080", "--tcp=9000", "--quiet",
                                 "--log=/logs/$(NS)_$(POD).log"],
                        "env": [
                            {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                            {"name": "NS", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}
                        ],
                        "ports": [{"name": "http", "containerPort": 8080}, {"name": "tcp", "containerPort": 9000}],
                        "readinessProbe": {"httpGet": {"path": "/healthz", "port": "http"}, "periodSeconds": 1},
                        "volumeMounts": [{"name": "logs", "mountPath": "/logs"}]
                    }],
                    "volumes": [{"name": "logs", "hostPath": {"path": "/var/lib/sluice/echo-logs", "type": "DirectoryOrCreate"}}]
                }
            }
        }
    })
}

/// How a version's one pod answers from now on.
pub fn faults(c: &Cluster, namespace: &str, version: &str, faults: &str) -> Result<()> {
    let pods = c.pods(namespace, &format!("version={version}"))?;
    let ip = pods[0]["status"]["podIP"].as_str().context("an address")?;
    c.inside(NODES[0], &format!("curl -sS -f -m 5 -d '{faults}' http://{ip}:8080/faults")).map(drop)
}

pub fn service(namespace: &str, name: &str, selector: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": selector, "ports": [
            {"name": "http", "port": 80, "targetPort": "http"}, {"name": "tcp", "port": 9000, "targetPort": "tcp"}
        ]}
    })
}

/// `echo` in front of `echo-v1` and `echo-v2`, and a route between them.
pub fn split_service(namespace: &str, v1: u32, v2: u32) -> Vec<Value> {
    vec![
        service(namespace, "echo", json!({"app": "echo"})),
        service(namespace, "echo-v1", json!({"app": "echo", "version": "v1"})),
        service(namespace, "echo-v2", json!({"app": "echo", "version": "v2"})),
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
            "metadata": {"name": "echo", "namespace": namespace},
            "spec": {
                "parentRefs": [{"group": "", "kind": "Service", "name": "echo", "port": 80}],
                "rules": [{"backendRefs": [
                    {"name": "echo-v1", "port": 80, "weight": v1}, {"name": "echo-v2", "port": 80, "weight": v2}
                ]}]
            }
        }),
    ]
}

/// A client that runs once. `args` are the load generator's.
pub fn client(namespace: &str, name: &str, args: &[String]) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
        "spec": {
            "restartPolicy": "Never",
            "containers": [{"name": "load", "image": "sluice.local/echo:1", "command": ["/load"], "args": args}]
        }
    })
}

pub struct Load {
    pub rps: u32,
    pub seconds: u32,
    pub fresh: bool,
    pub headers: Vec<String>,
}

impl Load {
    pub fn args(&self, url: &str, prefix: &str) -> Vec<String> {
        let mut args = vec![
            format!("--url={url}"),
            format!("--rps={}", self.rps),
            format!("--duration={}", self.seconds),
            format!("--id-prefix={prefix}-"),
        ];
        args.extend(self.fresh.then(|| "--fresh".to_owned()));
        args.extend(self.headers.iter().map(|h| format!("--header={h}")));
        args
    }

    pub fn start(&self, c: &Cluster, namespace: &str, name: &str, url: &str) -> Result<()> {
        c.apply(&[client(namespace, name, &self.args(url, name))])?;
        c.wait("the client runs", 60, || Ok(phase(c, namespace, name)? != "Pending"))?;
        Ok(())
    }

    /// Waits for the end; the client's own report.
    pub fn finish(&self, c: &Cluster, namespace: &str, name: &str) -> Result<Value> {
        let limit = u64::from(self.seconds) + 60;
        c.wait("the client ends", limit, || Ok(matches!(phase(c, namespace, name)?.as_str(), "Succeeded" | "Failed")))?;
        let log = c.kubectl(&["-n", namespace, "logs", name, "-c", "load"])?;
        let last = log.lines().rev().find(|l| l.starts_with('{')).with_context(|| format!("a report in {log}"))?;
        Ok(serde_json::from_str(last)?)
    }

    pub fn run(&self, c: &Cluster, namespace: &str, name: &str, url: &str) -> Result<Value> {
        self.start(c, namespace, name, url)?;
        self.finish(c, namespace, name)
    }
}

fn phase(c: &Cluster, namespace: &str, name: &str) -> Result<String> {
    let p = c.json(&["-n", namespace, "get", "pod", name])?;
    Ok(p["status"]["phase"].as_str().unwrap_or_default().to_owned())
}

/// How often each request id is in the logs of all backends of a namespace, on all nodes.
pub fn deliveries(c: &Cluster, namespace: &str, prefix: &str) -> Result<HashMap<String, u32>> {
    let mut seen = HashMap::new();
    for node in NODES {
        let dir = c.dir().join(node).join("disk/echo-logs");
        for file in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if !file.file_name().to_string_lossy().starts_with(&format!("{namespace}_")) {
                continue;
            }
            for line in fs::read_to_string(file.path())?.lines() {
                let id = line.split_whitespace().find(|w| w.starts_with(&format!("{prefix}-")));
                if let Some(id) = id {
                    *seen.entry(id.to_owned()).or_insert(0) += 1;
                }
            }
        }
    }
    Ok(seen)
}

/// Time in milliseconds and request id of each line of a pod's log; failed probes have the id `-`.
pub fn request_log(c: &Cluster, node: &str, namespace: &str, pod: &str) -> Result<Vec<(u64, String)>> {
    let text = fs::read_to_string(c.dir().join(node).join(format!("disk/echo-logs/{namespace}_{pod}.log")))?;
    let line = |l: &str| {
        let id = l.split_whitespace().nth(1)?.to_owned();
        Some((l.split_whitespace().last()?.parse().ok()?, id))
    };
    Ok(text.lines().filter_map(line).collect())
}

/// No request failed, and the backends' own logs have each exactly once.
pub fn prove_exactly_once(c: &Cluster, namespace: &str, name: &str, report: &Value) -> Result<()> {
    let sent = report["sent"].as_u64().context("sent")?;
    ensure!(report["failed"] == 0, "{} of {sent} requests failed: {report}", report["failed"]);
    let seen = deliveries(c, namespace, name)?;
    let twice: Vec<_> = seen.iter().filter(|(_, n)| **n > 1).take(5).collect();
    ensure!(twice.is_empty(), "delivered more than once: {twice:?}");
    ensure!(seen.len() as u64 == sent, "{} of {sent} requests are in the backends' logs", seen.len());
    Ok(())
}

pub fn version(report: &Value, version: &str) -> u64 {
    report["versions"][version].as_u64().unwrap_or(0)
}
