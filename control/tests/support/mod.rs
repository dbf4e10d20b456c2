//! A real service on a free port with a directory of its own, the real kubectl, and agents that do nothing but report:
//! pods bound to their node run, become ready, and end when told.

#![allow(dead_code)] // each test binary uses its own part

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use sluice_control::api::cache::Cache;
use sluice_control::api::client::{Client, Object};
use sluice_control::api::kinds;
use sluice_control::api::registry::{Context, DeleteOptions};
use sluice_control::api::value::{rfc3339, rfc3339_micro};
use sluice_control::ca::PassphraseFile;
use sluice_control::pool::Pool;
use sluice_control::range::Ranges;
use sluice_control::service::{Config, Service};
use tokio_util::sync::CancellationToken;

pub struct Cluster {
    pub service: Service,
    pub dir: tempfile::TempDir,
    agents: Vec<CancellationToken>,
    dual: bool,
}

pub struct Ran {
    pub out: String,
    pub err: String,
    pub ok: bool,
}

impl Cluster {
    pub async fn start() -> Self {
        Self::start_again(tempfile::tempdir().expect("a directory")).await
    }

    /// On a directory that another service has used.
    pub async fn start_again(dir: tempfile::TempDir) -> Self {
        Self::start_with_pool(dir, "").await
    }

    /// With addresses for services of type LoadBalancer.
    pub async fn start_with_pool(dir: tempfile::TempDir, pool: &str) -> Self {
        let pool: Pool = pool.parse().expect("a pool");
        let service = start_with(dir.path().to_owned(), |config| config.load_balancer_pool = pool).await;
        Cluster { service, dir, agents: Vec::new(), dual: false }
    }

    /// With these ranges of services and of pods.
    pub async fn start_with_ranges(dir: tempfile::TempDir, services: &str, pods: &str) -> Self {
        let ranges = |text: &str| text.parse::<Ranges>().expect("ranges");
        let (services, pods) = (ranges(services), ranges(pods));
        let dual = pods.dual();
        let service = start_with(dir.path().to_owned(), |config| {
            (config.service_cidr, config.pod_cidr) = (services, pods);
        });
        Cluster { service: service.await, dir, agents: Vec::new(), dual }
    }

    pub fn client(&self) -> Client {
        self.service.parts.client.named("test")
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("admin.kubeconfig")
    }

    /// Runs kubectl; `input` goes to its standard input.
    pub async fn kubectl_with(&self, args: &[&str], input: &str) -> Ran {
        let mut command = Command::new("kubectl");
        command.arg("--kubeconfig").arg(self.kubeconfig()).args(args);
        command.env("HOME", self.dir.path()).env_remove("KUBECONFIG");
        let input = input.to_owned();
        tokio::task::spawn_blocking(move || {
            use std::io::Write;
            use std::process::Stdio;
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().expect("kubectl is on the PATH");
            child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("kubectl reads");
            let output = child.wait_with_output().expect("kubectl ends");
            let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
            Ran { out: text(output.stdout), err: text(output.stderr), ok: output.status.success() }
        })
        .await
        .expect("no panic")
    }

    /// Runs kubectl, which must succeed; its output.
    pub async fn kubectl(&self, args: &[&str]) -> String {
        let ran = self.kubectl_with(args, "").await;
        assert!(ran.ok, "kubectl {args:?}: {}{}", ran.out, ran.err);
        ran.out
    }

    pub async fn apply(&self, manifest: &str) -> String {
        let ran = self.kubectl_with(&["apply", "-f", "-"], manifest).await;
        assert!(ran.ok, "apply: {}{}", ran.out, ran.err);
        ran.out
    }

    /// A node whose agent reports; `cpu` as in a quantity.
    pub async fn add_node(&mut self, name: &str, cpu: &str) {
        let body = json!({"metadata": {"name": name}, "status": {
            "allocatable": {"cpu": cpu, "memory": "8Gi", "pods": "110"}, "capacity": {"cpu": cpu, "memory": "8Gi", "pods": "110"},
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}]}});
        let nodes = kinds::find("", "v1", "nodes").expect("nodes");
        let registry = self.service.parts.client.registry();
        registry.create(&Context::internal("test"), nodes, "", body).await.expect("a node");
        let stop = CancellationToken::new();
        self.agents.push(stop.clone());
        let (client, store) = (self.client(), self.service.parts.store.clone());
        let cache = Cache::<Pod>::start(store, stop.clone());
        let (node, index, dual) = (name.to_owned(), self.agents.len(), self.dual);
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = agent(client, cache, node, (index, dual)) => {}
            }
        });
    }

    /// The n-th node's agent falls silent.
    pub fn silence(&self, index: usize) {
        self.agents[index].cancel();
    }

    /// Its directory stays as long as what this returns.
    pub async fn stop(self) -> tempfile::TempDir {
        for agent in &self.agents {
            agent.cancel();
        }
        self.service.stop().await;
        self.dir
    }
}

pub async fn start_in(data_dir: PathBuf) -> Service {
    start_with(data_dir, |_| {}).await
}

async fn start_with(data_dir: PathBuf, change: impl FnOnce(&mut Config)) -> Service {
    let mut config = Config {
        ca_passphrase: PassphraseFile { path: data_dir.join("ca-passphrase"), make: true },
        data_dir,
        listen: "127.0.0.1:0".parse().expect("an address"),
        advertise_url: None,
        san: Vec::new(),
        service_cidr: "10.96.0.0/16".parse().expect("a range"),
        pod_cidr: "10.244.0.0/16".parse().expect("a range"),
        load_balancer_pool: Pool::default(),
        token_file: None,
        node_grace: Duration::from_secs(3),
        eviction: Duration::from_secs(1),
        proxy: Some(sluice_control::inject::Config {
            image: "sluice.local/proxy:dev".into(),
            cluster_ranges: "10.96.0.0/16,10.244.0.0/16".into(),
            tracing: None,
        }),
    };
    change(&mut config);
    Service::start(&config, Vec::new(), None).await.expect("the service starts")
}

/// Reports pods as running and ready, and finishes those that are to go; renews its lease.
async fn agent(client: Client, pods: Arc<Cache<Pod>>, node: String, (index, dual): (usize, bool)) {
    pods.synced().await;
    let mut changes = pods.listen();
    let mut address = 1;
    loop {
        renew(&client, &node).await;
        for pod in pods.all() {
            let spec = pod.spec.clone().unwrap_or_default();
            if spec.node_name.as_deref() != Some(&node) {
                continue;
            }
            if pod.deleting() {
                let options = DeleteOptions { grace_s: Some(0), ..DeleteOptions::default() };
                let _ = client.delete(&*pod, options).await;
            } else if pod.status.as_ref().and_then(|s| s.pod_ip.as_ref()).is_none() {
                address += 1;
                let now = rfc3339(Timestamp::now());
                let good = !spec.containers[0].image.as_deref().unwrap_or_default().contains("bad");
                let ready = if good { "True" } else { "False" };
                let containers: Vec<Value> = spec
                    .containers
                    .iter()
                    .map(|c| {
                        json!({"name": c.name, "ready": good, "restartCount": 0,
                    "image": c.image, "imageID": "", "started": true, "state": {"running": {"startedAt": now}}})
                    })
                    .collect();
                let first = format!("10.244.{index}.{address}");
                let second = dual.then(|| json!({"ip": format!("fd00:244:0:{index}::{address:x}")}));
                let ips: Vec<Value> = [json!({"ip": first})].into_iter().chain(second).collect();
                let status = json!({"status": {"phase": "Running", "podIP": first, "podIPs": ips, "startTime": now, "containerStatuses": containers,
                    "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": now},
                        {"type": "PodScheduled", "status": "True", "lastTransitionTime": now}]}});
                let _ = client.merge::<Pod>(pod.namespace(), pod.name(), "status", status).await;
            }
        }
        let _ = tokio::time::timeout(Duration::from_millis(500), changes.next()).await;
    }
}

async fn renew(client: &Client, node: &str) {
    let leases = kinds::find("coordination.k8s.io", "v1", "leases").expect("leases");
    let body = json!({"metadata": {"name": node}, "spec": {"holderIdentity": node, "renewTime": rfc3339_micro(Timestamp::now())}});
    let (registry, ctx) = (client.registry(), Context::internal("test"));
    if registry.update(&ctx, leases, ("kube-node-lease", node), "", body.clone()).await.is_err() {
        let _ = registry.create(&ctx, leases, "kube-node-lease", body).await;
    }
}

/// Polls until the condition holds.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds().await {
        assert!(Instant::now() < deadline, "{what} does not come true");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
