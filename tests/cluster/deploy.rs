//! Workloads: deployments, scheduling, restarts, probes, volumes, logs.

use crate::cluster::{Cluster, ready};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

const DEPLOYMENT: &str = include_str!("../../examples/deployment.yaml");

/// Mission row 1.
pub fn deploy_a_container(c: &Cluster) -> Result<()> {
    let out = c.apply_text(DEPLOYMENT)?;
    ensure!(out.contains("deployment.apps/nginx-deployment created"), "{out}");
    c.rollout("default", "nginx-deployment")?;
    let pods = c.pods("default", "app=nginx")?;
    let nodes: BTreeSet<_> = pods.iter().map(|p| p["spec"]["nodeName"].to_string()).collect();
    ensure!(pods.len() == 3 && pods.iter().all(ready), "three pods are ready");
    ensure!(nodes.len() >= 2, "on at least two nodes: {nodes:?}");
    for p in &pods {
        let (ip, node) =
            (p["status"]["podIP"].as_str().context("ip")?, p["spec"]["nodeName"].as_str().context("node")?);
        let page = c.inside(node, &format!("curl -sf http://{ip}:80/"))?;
        ensure!(page.contains("nginx"), "pod {ip} serves its page: {page}");
    }
    let version = || -> Result<Value> {
        Ok(c.json(&["get", "deployment", "nginx-deployment"])?["metadata"]["resourceVersion"].clone())
    };
    let before = version()?;
    let out = c.apply_text(DEPLOYMENT)?;
    ensure!(out.contains("unchanged") && version()? == before, "{out}");
    let wrong = c.apply_text(&DEPLOYMENT.replace("replicas: 3", "replicas: \"three\""));
    let message = wrong.expect_err("a string is no number").to_string();
    ensure!(message.contains("spec.replicas") || message.contains("Replicas"), "{message}");
    for args in [
        &["get", "pods", "-o", "wide"][..],
        &["describe", "deployment", "nginx-deployment"],
        &["describe", "pod", "-l", "app=nginx"],
        &["get", "deploy,rs,po,no,ns,svc,cm,sa,endpointslices,leases", "-A"],
        &["api-resources"],
        &["label", "deployment", "nginx-deployment", "team=a"],
        &["scale", "deployment", "nginx-deployment", "--replicas=2"],
        &["wait", "--for=jsonpath={.status.readyReplicas}=2", "deployment/nginx-deployment", "--timeout=60s"],
        &["set", "image", "deployment/nginx-deployment", "nginx=sluice.local/echo:1"],
        &["rollout", "status", "deployment/nginx-deployment", "--timeout=60s"],
        &["rollout", "history", "deployment/nginx-deployment"],
        &["rollout", "undo", "deployment/nginx-deployment"],
        &["rollout", "status", "deployment/nginx-deployment", "--timeout=60s"],
        &["delete", "deployment", "nginx-deployment", "--timeout=60s"],
    ] {
        c.kubectl(args)?;
    }
    c.wait("the pods go with their deployment", 60, || Ok(c.pods("default", "app=nginx")?.is_empty()))?;
    Ok(())
}

fn pod(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name, "set": "all"}}, "spec": spec
    })
}

fn echo_container(extra: Value) -> Value {
    let mut container =
        json!({"name": "a", "image": "sluice.local/echo:1", "args": ["serve", "--http=8080", "--quiet"]});
    for (k, v) in extra.as_object().into_iter().flatten() {
        container[k] = v.clone();
    }
    container
}

/// Mission row 3: three nodes of 4 CPUs take twelve pods of 1 CPU as 4/4/4.
pub fn pods_spread_and_the_thirteenth_waits(c: &Cluster) -> Result<()> {
    c.namespace("fit", false)?;
    let container = echo_container(json!({"resources": {"requests": {"cpu": "1"}}}));
    let pods: Vec<_> = (0..13).map(|i| pod("fit", &format!("p{i}"), json!({"containers": [container]}))).collect();
    c.apply(&pods[..12])?;
    let nodes = || -> Result<BTreeMap<String, usize>> {
        let mut count = BTreeMap::new();
        for p in c.pods("fit", "set=all")? {
            if let Some(n) = p["spec"]["nodeName"].as_str() {
                *count.entry(n.to_owned()).or_default() += 1;
            }
        }
        Ok(count)
    };
    c.wait("twelve pods are bound", 30, || Ok(nodes()?.values().sum::<usize>() == 12))?;
    ensure!(nodes()?.values().all(|n| *n == 4), "4/4/4: {:?}", nodes()?);
    c.apply(&pods[12..])?;
    let message = || -> Result<String> {
        let p = c.json(&["-n", "fit", "get", "pod", "p12"])?;
        let all = p["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(all.iter().find(|x| x["type"] == "PodScheduled").map(|x| x["message"].to_string()).unwrap_or_default())
    };
    c.wait("the thirteenth says why it waits", 30, || {
        Ok(message()?.contains("0/3 nodes are available: 3 Insufficient cpu"))
    })?;
    c.delete_namespace("fit")
}

/// Mission row 2: a killed container and a deleted pod come back.
pub fn containers_come_back(c: &Cluster) -> Result<()> {
    c.namespace("back", false)?;
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "back"},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": {
            "metadata": {"labels": {"app": "web"}}, "spec": {"containers": [echo_container(json!({}))]}}}
    });
    c.apply(&[deployment])?;
    c.rollout("back", "web")?;
    let first = c.pods("back", "app=web")?.into_iter().next().context("a pod")?;
    let (name, node) =
        (first["metadata"]["name"].as_str().context("name")?, first["spec"]["nodeName"].as_str().context("node")?);
    c.inside(node, "kill -9 $(pgrep -f 'echo serve' | head -n 1)").ok();
    let restarted = || -> Result<bool> {
        Ok(c.pods("back", "app=web")?
            .iter()
            .any(|p| p["status"]["containerStatuses"][0]["restartCount"] == 1 && ready(p)))
    };
    let took = c.wait("the killed container runs again", 2, restarted)?;
    eprintln!("container back after {took:?}");
    c.kubectl(&["-n", "back", "delete", "pod", name, "--wait=false"])?;
    let replaced = || -> Result<bool> {
        let pods = c.pods("back", "app=web")?;
        Ok(pods.len() == 2 && pods.iter().all(ready) && pods.iter().all(|p| p["metadata"]["name"] != name))
    };
    let took = c.wait("another pod took its place", 5, replaced)?;
    eprintln!("pod replaced after {took:?}");
    let events = c.json(&["-n", "back", "get", "events"])?;
    let reasons: BTreeSet<_> =
        events["items"].as_array().into_iter().flatten().filter_map(|e| e["reason"].as_str()).collect();
    for said in ["Started", "Killing", "SuccessfulCreate"] {
        ensure!(reasons.contains(said), "an event says what happened: {said} is not in {reasons:?}");
    }
    c.delete_namespace("back")
}

/// Mission row 7: readiness withdraws the endpoint, liveness restarts, restarts back off.
pub fn probes_cull_and_restart(c: &Cluster) -> Result<()> {
    c.namespace("probes", false)?;
    let readiness = json!({"readinessProbe": {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 1, "failureThreshold": 1}});
    let live = json!({"livenessProbe": {"tcpSocket": {"port": 1}, "periodSeconds": 1, "failureThreshold": 1}});
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "probes"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}
    });
    c.apply(&[
        pod("probes", "web", json!({"containers": [echo_container(readiness)]})),
        pod("probes", "dies", json!({"containers": [echo_container(live)]})),
        service,
    ])?;
    let endpoints = || -> Result<usize> {
        let list = c.json(&["-n", "probes", "get", "endpointslices", "-l", "kubernetes.io/service-name=web"])?;
        let all = list["items"].as_array().cloned().unwrap_or_default();
        let eps = all.iter().flat_map(|s| s["endpoints"].as_array().cloned().unwrap_or_default());
        Ok(eps.filter(|e| e["conditions"]["ready"] == true).count())
    };
    c.wait("the ready pod is an endpoint", 30, || Ok(endpoints()? == 1))?;
    let p = c.json(&["-n", "probes", "get", "pod", "web"])?;
    let (ip, node) = (p["status"]["podIP"].as_str().context("ip")?, p["spec"]["nodeName"].as_str().context("node")?);
    c.inside(node, &format!("curl -sf -XPOST -d '{{\"unready\":true}}' http://{ip}:8080/faults"))?;
    c.wait("the unready pod is none", 15, || Ok(endpoints()? == 0))?;
    let restarts = || -> Result<i64> {
        let p = c.json(&["-n", "probes", "get", "pod", "dies"])?;
        Ok(p["status"]["containerStatuses"][0]["restartCount"].as_i64().unwrap_or(0))
    };
    c.wait("liveness restarts it", 60, || Ok(restarts()? >= 1))?;
    let backing_off = || -> Result<bool> {
        let p = c.json(&["-n", "probes", "get", "pod", "dies"])?;
        Ok(p["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff")
    };
    c.wait("and then backs off", 90, backing_off)?;
    c.kubectl(&["-n", "probes", "delete", "pod", "dies", "--grace-period=1", "--timeout=60s"])?;
    c.delete_namespace("probes")
}

/// Init containers run first, in order; config maps, secrets and emptyDir arrive; `kubectl logs` shows what was said.
pub fn init_containers_volumes_and_logs(c: &Cluster) -> Result<()> {
    c.namespace("init", false)?;
    let sh = |name: &str, script: &str, mounts: &Value| {
        json!({"name": name, "image": "sluice.local/echo:1", "command": ["/bin/sh", "-c", script], "volumeMounts": mounts,
               "env": [{"name": "GREETING", "valueFrom": {"configMapKeyRef": {"name": "words", "key": "greeting"}}},
                       {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "hidden", "key": "token"}}}]})
    };
    let mounts = json!([{"name": "work", "mountPath": "/data"}, {"name": "words", "mountPath": "/words"}, {"name": "hidden", "mountPath": "/hidden"}]);
    c.apply(&[
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "words", "namespace": "init"}, "data": {"greeting": "hello"}}),
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hidden", "namespace": "init"}, "stringData": {"token": "s3cret"}}),
        pod("init", "p", json!({
            "restartPolicy": "Never",
            "initContainers": [sh("one", "echo 1 > /data/n", &mounts), sh("two", "echo 2 >> /data/n", &mounts)],
            "containers": [sh("app", "cat /data/n; echo $GREETING $TOKEN; cat /words/greeting /hidden/token", &mounts)],
            "volumes": [{"name": "work", "emptyDir": {}}, {"name": "words", "configMap": {"name": "words"}},
                        {"name": "hidden", "secret": {"secretName": "hidden"}}]
        })),
    ])?;
    c.kubectl(&["-n", "init", "wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/p", "--timeout=60s"])?;
    let log = c.kubectl(&["-n", "init", "logs", "-f", "p", "-c", "app"])?;
    ensure!(log == "1\n2\nhello s3cret\nhellos3cret", "{log:?}");
    c.delete_namespace("init")
}
