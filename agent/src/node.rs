//! This node's object in the API and its heartbeat: capacity, addresses, whether it can run pods, and a Lease renewed
//! every ten seconds by default (Kubernetes: node-lease renewal).

use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::{DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeStatus, NodeSystemInfo},
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{MicroTime, ObjectMeta, Time},
    },
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use std::{collections::BTreeMap, net::IpAddr, time::Duration};
use tokio::sync::watch;

const LEASE_NAMESPACE: &str = "kube-node-lease";
const LEASE_SECONDS: i32 = 40;

#[derive(Clone, Debug)]
pub struct Facts {
    pub name: String,
    /// At most one per family, the preferred one first.
    pub ips: Vec<IpAddr>,
    pub cpu_milli: u64,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    pub pods: u32,
    pub zone: Option<String>,
    pub kernel: String,
    pub os_image: String,
    pub runtime: String,
    pub boot_id: String,
    pub log_port: u16,
}

/// Why the node cannot run pods yet; empty when it can.
pub type NotReady = Option<String>;

fn resources(f: &Facts) -> BTreeMap<String, Quantity> {
    let q = |k: &str, v: String| (k.to_owned(), Quantity(v));
    BTreeMap::from([
        q(
            "cpu",
            if f.cpu_milli.is_multiple_of(1000) {
                (f.cpu_milli / 1000).to_string()
            } else {
                format!("{}m", f.cpu_milli)
            },
        ),
        q("memory", format!("{}Ki", f.memory_bytes / 1024)),
        q("ephemeral-storage", format!("{}Ki", f.disk_bytes / 1024)),
        q("pods", f.pods.to_string()),
    ])
}

fn status(f: &Facts, not_ready: &NotReady, old: Option<&NodeStatus>) -> NodeStatus {
    let now = Time(Timestamp::now());
    let address = |type_: &str, address: &str| NodeAddress { type_: type_.into(), address: address.into() };
    let condition = |type_: &str, status: &str, reason: &str, message: String| {
        let before = old.and_then(|o| o.conditions.iter().flatten().find(|c| c.type_ == type_ && c.status == status));
        NodeCondition {
            type_: type_.into(),
            status: status.into(),
            reason: Some(reason.into()),
            message: Some(message),
            last_heartbeat_time: Some(now.clone()),
            last_transition_time: before.and_then(|c| c.last_transition_time.clone()).or_else(|| Some(now.clone())),
        }
    };
    let ready = match not_ready {
        None => condition("Ready", "True", "AgentReady", "sluice-agent is posting ready status".into()),
        Some(why) => condition("Ready", "False", "AgentNotReady", why.clone()),
    };
    let ok = |t: &str, reason: &str| condition(t, "False", reason, String::new());
    let internal = f.ips.iter().map(|ip| address("InternalIP", &ip.to_string()));
    NodeStatus {
        addresses: Some(internal.chain([address("Hostname", &f.name)]).collect()),
        capacity: Some(resources(f)),
        allocatable: Some(resources(f)),
        conditions: Some(vec![
            ok("MemoryPressure", "AgentHasSufficientMemory"),
            ok("DiskPressure", "AgentHasNoDiskPressure"),
            ok("PIDPressure", "AgentHasSufficientPID"),
            ready,
        ]),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(f.log_port) }),
        }),
        node_info: Some(NodeSystemInfo {
            architecture: if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }.into(),
            operating_system: "linux".into(),
            kernel_version: f.kernel.clone(),
            os_image: f.os_image.clone(),
            container_runtime_version: f.runtime.clone(),
            kubelet_version: format!("v{}-sluice", env!("CARGO_PKG_VERSION")),
            kube_proxy_version: String::new(),
            boot_id: f.boot_id.clone(),
            machine_id: f.name.clone(),
            system_uuid: f.name.clone(),
        }),
        ..NodeStatus::default()
    }
}

/// Creates the node's object if it is not there; the object as the API has it.
pub async fn register(client: &Client, f: &Facts) -> kube::Result<Node> {
    let api: Api<Node> = Api::all(client.clone());
    if let Some(node) = api.get_opt(&f.name).await? {
        return Ok(node);
    }
    let mut labels = BTreeMap::from([
        ("kubernetes.io/hostname".to_owned(), f.name.clone()),
        ("kubernetes.io/os".to_owned(), "linux".to_owned()),
        ("kubernetes.io/arch".to_owned(), if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }.to_owned()),
    ]);
    labels.extend(f.zone.iter().map(|z| ("topology.kubernetes.io/zone".to_owned(), z.clone())));
    let metadata = ObjectMeta { name: Some(f.name.clone()), labels: Some(labels), ..ObjectMeta::default() };
    api.create(&PostParams::default(), &Node { metadata, ..Node::default() }).await
}

/// Waits until control has given the node its pod range.
pub async fn pod_cidrs(client: &Client, f: &Facts) -> Vec<String> {
    loop {
        match register(client, f).await {
            Ok(node) => {
                let spec = node.spec.unwrap_or_default();
                let all: Vec<_> =
                    spec.pod_cidrs.filter(|v| !v.is_empty()).unwrap_or_else(|| spec.pod_cidr.into_iter().collect());
                if !all.is_empty() {
                    return all;
                }
            }
            Err(error) => tracing::info!(%error, "node not registered yet, trying again"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// For so long, whether a node that the API knows is ready may be open when its agent starts.
const UNDECIDED: Duration = Duration::from_secs(5);

/// Reports for ever: at once when readiness changes, else in this interval.
pub async fn heartbeat(client: Client, f: Facts, every: Duration, mut not_ready: watch::Receiver<NotReady>) {
    let known = Api::<Node>::all(client.clone()).get_opt(&f.name).await.is_ok_and(|node| node.is_some());
    if known {
        // An agent that starts again says nothing before it knows: "not ready" would take the node's endpoints away,
        // which have run on meanwhile.
        let _ = tokio::time::timeout(UNDECIDED, not_ready.wait_for(Option::is_none)).await;
    }
    loop {
        let wrong = not_ready.borrow_and_update().clone();
        let mut pause = every;
        if let Err(error) = report(&client, &f, &wrong).await {
            tracing::info!(%error, "heartbeat not delivered, trying again");
            pause = Duration::from_secs(1);
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            changed = not_ready.changed() => if changed.is_err() { return },
        }
    }
}

async fn report(client: &Client, f: &Facts, not_ready: &NotReady) -> kube::Result<()> {
    let node = register(client, f).await?;
    let status = status(f, not_ready, node.status.as_ref());
    let nodes: Api<Node> = Api::all(client.clone());
    let patch = serde_json::json!({"status": status});
    nodes.patch_status(&f.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
    renew_lease(client, f).await
}

async fn renew_lease(client: &Client, f: &Facts) -> kube::Result<()> {
    let api: Api<Lease> = Api::namespaced(client.clone(), LEASE_NAMESPACE);
    let now = MicroTime(Timestamp::now());
    let patch = serde_json::json!({"spec": {"renewTime": now}});
    match api.patch(&f.name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Err(kube::Error::Api(e)) if e.code == 404 => {}
        other => return other.map(|_| ()),
    }
    let spec = LeaseSpec {
        holder_identity: Some(f.name.clone()),
        lease_duration_seconds: Some(LEASE_SECONDS),
        renew_time: Some(now),
        ..LeaseSpec::default()
    };
    let metadata =
        ObjectMeta { name: Some(f.name.clone()), namespace: Some(LEASE_NAMESPACE.into()), ..ObjectMeta::default() };
    api.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) }).await.map(|_| ())
}
