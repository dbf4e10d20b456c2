//! `sluice check`: is the cluster as it should be? One line per thing looked at; the remedy beside what is wrong. Each
//! node's agent is asked through the API how it finds its kernel and maps, and walks paths from a namespace that is wired
//! as a pod; which ones, and what is said of them, is decided in [`paths`].

mod paths;

use crate::{
    client::{block_on, connect},
    cluster::Cluster,
    machine,
};
use anyhow::{Result, bail};
use futures::future::join_all;
use gateway_api::httproutes::HttpRoute;
use k8s_openapi::{
    api::{
        core::v1::{Node, Pod, Service},
        discovery::v1::EndpointSlice,
    },
    jiff::Timestamp,
};
use kube::{Api, Client, ResourceExt, api::ListParams};
use serde::de::DeserializeOwned;
use sluice_wire::check::{PATH, Report as NodeReport, Walked};
use std::{path::Path, time::Duration};
use tokio::time::timeout;

/// A node that has not answered by then does not answer; control itself waits for 5 s.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(8);

struct Report {
    wrong: usize,
}

impl Report {
    fn line(&mut self, what: &str, verdict: std::result::Result<String, String>) {
        match verdict {
            Ok(detail) => println!("ok    {what}  {detail}"),
            Err(why) => {
                self.wrong += 1;
                println!("WRONG {what}  {why}");
            }
        }
    }
}

pub fn run(kubeconfig: &Path, local: Option<Cluster>) -> Result<()> {
    let mut report = Report { wrong: 0 };
    block_on(async {
        let client = connect(kubeconfig).await?;
        match client.apiserver_version().await {
            Ok(v) => report.line("api", Ok(v.git_version)),
            Err(e) => report.line("api", Err(format!("{e}; is control running? see its log"))),
        }
        nodes(&client, &mut report).await?;
        pods(&client, &mut report).await?;
        routes(&client, &mut report).await?;
        paths(&client, &mut report).await
    })?;
    if let Some(c) = local {
        machines(&c, &mut report);
    }
    match report.wrong {
        0 => Ok(()),
        1 => bail!("one thing is wrong"),
        n => bail!("{n} things are wrong"),
    }
}

async fn nodes(client: &Client, report: &mut Report) -> Result<()> {
    for n in Api::<Node>::all(client.clone()).list(&ListParams::default()).await? {
        let ready = n.status.iter().flat_map(|s| s.conditions.iter().flatten()).find(|c| c.type_ == "Ready");
        let verdict = match ready {
            Some(c) if c.status == "True" => Ok(String::new()),
            Some(c) => {
                Err(format!("{}: {}", c.reason.clone().unwrap_or_default(), c.message.clone().unwrap_or_default()))
            }
            None => Err("its agent has never reported; is it running?".to_owned()),
        };
        report.line(&format!("node {}", n.name_any()), verdict);
    }
    Ok(())
}

/// A pod that is younger and not ready is not wrong yet.
const STARTING_S: i64 = 60;

fn age_s(p: &Pod, now: Timestamp) -> Option<i64> {
    p.metadata.creation_timestamp.as_ref().map(|t| now.as_second() - t.0.as_second())
}

async fn pods(client: &Client, report: &mut Report) -> Result<()> {
    let now = Timestamp::now();
    let pods = Api::<Pod>::all(client.clone()).list(&ListParams::default()).await?;
    let ready = |p: &Pod| {
        p.status.iter().flat_map(|s| s.conditions.iter().flatten()).any(|c| c.type_ == "Ready" && c.status == "True")
    };
    let phase = |p: &Pod| p.status.as_ref().and_then(|s| s.phase.clone()).unwrap_or_default();
    let live: Vec<_> =
        pods.iter().filter(|p| phase(p) != "Succeeded" && p.metadata.deletion_timestamp.is_none()).collect();
    let (starting, bad): (Vec<&Pod>, Vec<&Pod>) =
        live.iter().copied().filter(|p| !ready(p)).partition(|p| age_s(p, now).is_some_and(|age| age < STARTING_S));
    let names = |pods: &[&Pod]| {
        let name = |p: &&Pod| format!("{}/{}", p.namespace().unwrap_or_default(), p.name_any());
        pods.iter().map(name).collect::<Vec<_>>().join(", ")
    };
    let verdict = match (bad.is_empty(), starting.is_empty()) {
        (true, true) => Ok(format!("{} ready", live.len())),
        (true, false) => Ok(format!("{} ready; starting: {}", live.len() - starting.len(), names(&starting))),
        (false, _) => Err(format!("not ready: {}; `kubectl describe pod` says why", names(&bad))),
    };
    report.line("pods", verdict);
    Ok(())
}

async fn routes(client: &Client, report: &mut Report) -> Result<()> {
    for r in Api::<HttpRoute>::all(client.clone()).list(&ListParams::default()).await? {
        let wrong: Vec<_> = r
            .status
            .iter()
            .flat_map(|s| &s.parents)
            .flat_map(|p| &p.conditions)
            .filter(|c| c.status != "True" && c.type_ != "UnmeshedFallback")
            .map(|c| format!("{}: {} {}", c.type_, c.reason, c.message))
            .collect();
        let verdict = if wrong.is_empty() { Ok(String::new()) } else { Err(wrong.join("; ")) };
        report.line(&format!("route {}/{}", r.namespace().unwrap_or_default(), r.name_any()), verdict);
    }
    Ok(())
}

/// What the nodes say of themselves, and the paths between them.
async fn paths(client: &Client, report: &mut Report) -> Result<()> {
    let all = ListParams::default();
    let named = Api::<Node>::all(client.clone()).list(&all).await?;
    let asked = named.iter().map(|n| async move { (n, ask::<NodeReport>(client, &n.name_any(), PATH).await) });
    let mut nodes = vec![];
    for (node, answer) in join_all(asked).await {
        let name = node.name_any();
        match answer {
            Ok(said) => nodes.push(paths::Node { addresses: addresses(node), name, report: said }),
            Err(why) => report.line(&format!("agent of {name}"), Err(why)),
        }
    }
    for (what, verdict) in nodes.iter().flat_map(paths::lines) {
        report.line(&what, verdict);
    }
    let services = Api::<Service>::all(client.clone()).list(&all).await?.items;
    let slices = Api::<EndpointSlice>::all(client.clone()).list(&all).await?.items;
    let targets = paths::targets(&services, &slices);
    let walks = nodes.iter().map(|n| {
        let walk = paths::walk(n, &nodes, &targets);
        async move { (n, ask::<Vec<Walked>>(client, &n.name, &walk.query()).await) }
    });
    for (node, answer) in join_all(walks).await {
        match answer {
            Ok(walked) => {
                for (what, verdict) in walked.iter().map(|w| paths::line(node, w, &nodes, &targets)) {
                    report.line(&what, verdict);
                }
            }
            Err(why) => report.line(&format!("paths from {}", node.name), Err(why)),
        }
    }
    if targets.node_port.is_none() {
        report
            .line("path outside -> node port", Ok("not walked: no service has one that every node serves".to_owned()));
    }
    Ok(())
}

async fn ask<T: DeserializeOwned>(client: &Client, node: &str, path: &str) -> Result<T, String> {
    let request = http::Request::get(format!("/api/v1/nodes/{node}/proxy{path}")).body(vec![]);
    let request = request.map_err(|e| e.to_string())?;
    match timeout(ANSWER_TIMEOUT, client.request(request)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(e)) => Err(format!("{e}; does sluice-agent run there, and does control reach its port 10250?")),
        Err(_) => Err(format!("no answer in {} s; see the agent's log", ANSWER_TIMEOUT.as_secs())),
    }
}

fn addresses(node: &Node) -> Vec<std::net::IpAddr> {
    let all = node.status.iter().flat_map(|s| s.addresses.iter().flatten());
    all.filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok()).collect()
}

/// On the machines of a local cluster: the kernel's side of the data path is there.
fn machines(c: &Cluster, report: &mut Report) {
    for i in 0..c.nodes {
        let node = c.node(i);
        let looked = machine::inside(
            &node,
            &["/bin/sh", "-c", "ls /sys/fs/bpf/sluice/v1 && test -e /run/cni/net.d/10-sluice.conflist"],
        );
        let verdict = match looked.and_then(|mut c| Ok(c.output()?)) {
            Ok(out) if out.status.success() => {
                Ok(format!("{} pins, CNI configured", String::from_utf8_lossy(&out.stdout).lines().count()))
            }
            Ok(_) => Err("eBPF pins or the CNI configuration are missing; see the agent's log".to_owned()),
            Err(e) => Err(e.to_string()),
        };
        report.line(&format!("machine {}", node.name), verdict);
    }
}
