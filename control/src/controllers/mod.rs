//! What keeps the objects true: each controller compares what is wanted with what is, from the whole state and not from
//! what just happened, so that it converges after any crash. Deciding is PURE (`plan` functions); this module and the
//! shells around the plans watch, write and wait.

mod balancer;
mod deployment;
mod endpoints;
mod garbage;
mod gateway;
mod namespaces;
mod nodes;
mod queue;
mod replicaset;
mod scheduler;
mod tokens;

use std::sync::Arc;

use gateway_api::gatewayclasses::GatewayClass;
use gateway_api::gateways::Gateway;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use tokio::task::JoinHandle;

use crate::api::cache::Cache;
use crate::api::client::{Client, Object};
use crate::service::{Config, Parts};

/// Current copies of what the controllers read.
pub struct Caches {
    /// Pods.
    pub pods: Arc<Cache<Pod>>,
    /// Nodes.
    pub nodes: Arc<Cache<Node>>,
    /// ReplicaSets.
    pub replica_sets: Arc<Cache<ReplicaSet>>,
    /// Deployments.
    pub deployments: Arc<Cache<Deployment>>,
    /// Services.
    pub services: Arc<Cache<Service>>,
    /// Slices.
    pub slices: Arc<Cache<EndpointSlice>>,
    /// Namespaces.
    pub namespaces: Arc<Cache<Namespace>>,
    /// Leases.
    pub leases: Arc<Cache<Lease>>,
    /// ServiceAccounts.
    pub accounts: Arc<Cache<ServiceAccount>>,
    /// Gateways.
    pub gateways: Arc<Cache<Gateway>>,
    /// Their classes.
    pub gateway_classes: Arc<Cache<GatewayClass>>,
}

impl Caches {
    /// Starts them all.
    pub fn start(parts: &Parts) -> Arc<Self> {
        let (store, stop) = (&parts.store, &parts.stop);
        Arc::new(Caches {
            pods: Cache::start(store.clone(), stop.clone()),
            nodes: Cache::start(store.clone(), stop.clone()),
            replica_sets: Cache::start(store.clone(), stop.clone()),
            deployments: Cache::start(store.clone(), stop.clone()),
            services: Cache::start(store.clone(), stop.clone()),
            slices: Cache::start(store.clone(), stop.clone()),
            namespaces: Cache::start(store.clone(), stop.clone()),
            leases: Cache::start(store.clone(), stop.clone()),
            accounts: Cache::start(store.clone(), stop.clone()),
            gateways: Cache::start(store.clone(), stop.clone()),
            gateway_classes: Cache::start(store.clone(), stop.clone()),
        })
    }

    async fn synced(&self) {
        self.pods.synced().await;
        self.nodes.synced().await;
        self.replica_sets.synced().await;
        self.deployments.synced().await;
        self.services.synced().await;
        self.slices.synced().await;
        self.namespaces.synced().await;
        self.leases.synced().await;
        self.accounts.synced().await;
        self.gateways.synced().await;
        self.gateway_classes.synced().await;
    }
}

/// What a controller works with.
#[derive(Clone)]
struct Shared {
    caches: Arc<Caches>,
    client: Client,
    config: Arc<Config>,
}

impl Shared {
    fn named(&self, part: &str) -> Self {
        Shared { client: self.client.named(part), ..self.clone() }
    }
}

/// Starts all of them; they end when the service stops.
pub fn start(parts: &Parts, config: &Config) -> Vec<JoinHandle<()>> {
    let caches = Caches::start(parts);
    let shared = Shared { caches, client: parts.client.clone(), config: Arc::new(config.clone()) };
    let (stop, store) = (parts.stop.clone(), parts.store.clone());
    let all = tokio::spawn(async move {
        let work = async {
            shared.caches.synced().await;
            tokio::join!(
                scheduler::run(shared.named("scheduler")),
                replicaset::run(shared.named("replicaset-controller")),
                deployment::run(shared.named("deployment-controller")),
                endpoints::run(shared.named("endpointslice-controller")),
                gateway::run(shared.named("gateway-controller")),
                balancer::run(shared.named("load-balancer-controller")),
                nodes::run(shared.named("node-controller")),
                namespaces::run(shared.named("namespace-controller")),
                garbage::run(shared.named("garbage-collector"), store.clone()),
                tokens::run(shared.named("token-controller"), store),
            );
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = work => {}
        }
    });
    vec![all]
}

/// The owner that controls an object.
pub(crate) fn controller_of<T: Object>(object: &T) -> Option<&OwnerReference> {
    object.meta().owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}

/// A reference from a dependent to what controls it.
pub(crate) fn owned_by<T: Object>(owner: &T) -> OwnerReference {
    OwnerReference {
        api_version: T::kind().api_version(),
        kind: T::kind().kind.to_owned(),
        name: owner.name().to_owned(),
        uid: owner.uid().to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// Whether the pod is ready, by its condition.
fn pod_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Whether all of the pod's containers are done for good.
fn pod_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}
