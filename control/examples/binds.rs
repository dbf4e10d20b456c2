//! How fast pods get a durable place at scale: 5,000 nodes that exist in the store only, pods created by many clients at
//! once, and the time until the last one is bound. `cargo run --release -p sluice-control --example binds [nodes] [pods]`.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use sluice_control::api::cache::Cache;
use sluice_control::api::kinds;
use sluice_control::api::registry::Context;
use sluice_control::ca::PassphraseFile;
use sluice_control::pool::Pool;
use sluice_control::service::{Config, Service};

fn main() -> anyhow::Result<()> {
    let number =
        |n: usize, default: usize| std::env::args().nth(n).and_then(|text| text.parse().ok()).unwrap_or(default);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run(number(1, 5_000), number(2, 5_000)))
}

async fn run(nodes: usize, pods: usize) -> anyhow::Result<()> {
    let dir = std::env::temp_dir().join(format!("sluice-binds-{}", std::process::id()));
    let config = Config {
        data_dir: dir.clone(),
        ca_passphrase: PassphraseFile { path: dir.join("ca-passphrase"), make: true },
        listen: "127.0.0.1:0".parse()?,
        advertise_url: None,
        san: Vec::new(),
        service_cidr: "10.96.0.0/16".parse().map_err(anyhow::Error::msg)?,
        pod_cidr: "10.0.0.0/9".parse().map_err(anyhow::Error::msg)?,
        load_balancer_pool: Pool::default(),
        token_file: None,
        node_grace: Duration::from_secs(3_600),
        eviction: Duration::from_secs(300),
        proxy: None,
    };
    let began = Instant::now();
    let service = Service::start(&config, Vec::new(), None).await.context("start")?;
    let (registry, ctx) = (service.parts.client.registry(), Context::internal("bench"));
    let kind = kinds::find("", "v1", "nodes").context("nodes")?;
    let node = |index: usize| {
        let body = json!({"metadata": {"name": format!("n{index}")}, "status": {
            "allocatable": {"cpu": "32", "memory": "64Gi", "pods": "110"}, "conditions": [{"type": "Ready", "status": "True"}]}});
        registry.create(&ctx, kind, "", body)
    };
    let made: Vec<_> = futures::stream::iter(0..nodes).map(node).buffer_unordered(256).collect().await;
    made.into_iter().collect::<Result<Vec<_>, _>>()?;
    println!("{nodes} nodes after {:.2?}", began.elapsed());
    let cache = Cache::<Pod>::start(service.parts.store.clone(), service.parts.stop.clone());
    cache.synced().await;
    let kind = kinds::find("", "v1", "pods").context("pods")?;
    let started = Instant::now();
    let pod = |index: usize| {
        let body = json!({"metadata": {"name": format!("p{index}")}, "spec": {"containers": [
            {"name": "c", "image": "i:1", "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}}}]}});
        registry.create(&ctx, kind, "default", body)
    };
    let made: Vec<_> = futures::stream::iter(0..pods).map(pod).buffer_unordered(256).collect().await;
    made.into_iter().collect::<Result<Vec<_>, _>>()?;
    let created = started.elapsed();
    let bound = |cache: &Cache<Pod>| {
        cache.all().iter().filter(|pod| pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some())).count()
    };
    while bound(&cache) < pods {
        // A look at everything costs time that is not the scheduler's.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let took = started.elapsed();
    println!("{nodes} nodes, {pods} pods: created in {created:.2?}, all bound after {took:.2?}");
    println!("RESULT control_binds ours={:.0} peer=0 unit=binds/s", pods as f64 / took.as_secs_f64());
    service.stop().await;
    std::fs::remove_dir_all(dir)?;
    Ok(())
}
