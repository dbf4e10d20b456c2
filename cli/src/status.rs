//! `sluice status`: nodes, pods per node, routes with their weights, and the split as the sidecars measured it.

use crate::client::{block_on, connect, traffic};
use anyhow::{Context, Result, bail};
use gateway_api::httproutes::HttpRoute;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{Api, Client, ResourceExt, api::ListParams};
use sluice_wire::traffic::Row;
use std::{
    path::Path,
    time::{Duration, Instant},
};

pub fn run(kubeconfig: &Path, pods: bool) -> Result<()> {
    block_on(async {
        let client = connect(kubeconfig).await?;
        nodes(&client, pods).await?;
        routes(&client).await
    })
}

async fn nodes(client: &Client, list_pods: bool) -> Result<()> {
    let all = ListParams::default();
    let nodes = Api::<Node>::all(client.clone()).list(&all).await.context("list nodes")?;
    let pods = Api::<Pod>::all(client.clone()).list(&all).await.context("list pods")?;
    println!("{:<12} {:<8} {:<16} PODS", "NODE", "READY", "POD RANGE");
    for n in &nodes {
        let ready = n.status.iter().flat_map(|s| s.conditions.iter().flatten()).find(|c| c.type_ == "Ready");
        let here: Vec<_> = pods.iter().filter(|p| node_of(p) == Some(n.name_any().as_str())).collect();
        let range = n.spec.as_ref().and_then(|s| s.pod_cidr.clone()).unwrap_or_default();
        let ready = ready.map_or("-", |c| c.status.as_str());
        let names: Vec<_> =
            here.iter().map(|p| format!("{}/{}", p.namespace().unwrap_or_default(), p.name_any())).collect();
        let shown =
            if list_pods { names.join("\n                                       ") } else { here.len().to_string() };
        println!("{:<12} {ready:<8} {range:<16} {shown}", n.name_any());
    }
    Ok(())
}

fn node_of(p: &Pod) -> Option<&str> {
    p.spec.as_ref()?.node_name.as_deref()
}

async fn routes(client: &Client) -> Result<()> {
    let routes = Api::<HttpRoute>::all(client.clone()).list(&ListParams::default()).await.context("list HTTPRoutes")?;
    let rows = traffic(client).await?;
    for r in &routes {
        let key = format!("{}/{}", r.namespace().unwrap_or_default(), r.name_any());
        println!("\nROUTE {key}: {}; counted since the sidecars started", in_force(r));
        println!(
            "  {:<24} {:>8} {:>10} {:>9} {:>9} {:>9}",
            "BACKEND", "WEIGHT", "REQUESTS", "MEASURED", "FAILED", "MEAN ms"
        );
        let mine: Vec<_> = rows.iter().filter(|x| x.route == key).collect();
        let total: u64 = mine.iter().map(|x| x.requests).sum();
        for (i, rule) in r.spec.rules.iter().flatten().enumerate() {
            if i > 0 {
                println!("  -- rule {i}");
            }
            for b in rule.backend_refs.iter().flatten() {
                let name = format!("{}/{}", r.namespace().unwrap_or_default(), b.name);
                let row = mine.iter().find(|x| x.backend == name).map(|x| (*x).clone()).unwrap_or_default();
                print_row(&b.name, b.weight.unwrap_or(1), &row, total);
            }
        }
    }
    Ok(())
}

fn print_row(name: &str, weight: i32, row: &Row, total: u64) {
    let share = if total == 0 { "-".to_owned() } else { format!("{:.2}%", 100.0 * row.requests as f64 / total as f64) };
    let mean = if row.requests == 0 { 0.0 } else { row.latency_us_sum as f64 / row.requests as f64 / 1000.0 };
    println!("  {name:<24} {weight:>8} {:>10} {share:>9} {:>9} {mean:>9.2}", row.requests, row.failures);
}

fn in_force(r: &HttpRoute) -> String {
    let conditions = r.status.iter().flat_map(|s| &s.parents).flat_map(|p| &p.conditions);
    match conditions.into_iter().find(|c| c.type_ == "Programmed") {
        Some(c) if !c.message.is_empty() => c.message.clone(),
        Some(c) => c.reason.clone(),
        None => "not programmed".to_owned(),
    }
}

/// Until sidecars have counted so many requests of a route.
pub fn wait_for_traffic(kubeconfig: &Path, route: &str, requests: u64, limit: Duration) -> Result<()> {
    block_on(async {
        let client = connect(kubeconfig).await?;
        let until = Instant::now() + limit;
        loop {
            let rows = traffic(&client).await.unwrap_or_default();
            let seen: u64 = rows.iter().filter(|r| r.route == route).map(|r| r.requests).sum();
            if seen >= requests {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("sidecars counted {seen} of {requests} requests of route {route} within {} s", limit.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
}
