//! Deployments' shell: one look at a deployment, its ReplicaSets and pods, the plan of [`rollout`], and the writes.

mod conditions;
mod rollout;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::queue::{Key, Queue};
use super::{Shared, controller_of, owned_by, pod_over};
use crate::api::cache::Heard;
use crate::api::client::{Notice, Object};
use crate::api::registry::DeleteOptions;
use crate::api::status::ApiError;
use rollout::{Plan, Step};

/// Runs for ever.
pub(super) async fn run(shared: Shared) {
    let queue = Queue::new();
    let feed = feed(shared.clone(), queue.clone());
    let work = queue.clone().run("deployment", move |key| reconcile(shared.clone(), queue.clone(), key));
    tokio::join!(feed, work);
}

async fn feed(shared: Shared, queue: Arc<Queue>) {
    let (mut deployments, mut sets) = (shared.caches.deployments.listen(), shared.caches.replica_sets.listen());
    let mut pods = shared.caches.pods.listen();
    let all = || {
        for deployment in shared.caches.deployments.all() {
            queue.add((deployment.namespace().to_owned(), deployment.name().to_owned()));
        }
    };
    all();
    loop {
        tokio::select! {
            heard = deployments.next() => match heard {
                Heard::Change(change) => queue.add((change.object().namespace().to_owned(), change.object().name().to_owned())),
                Heard::Everything => all(),
            },
            heard = sets.next() => match heard {
                Heard::Change(change) => {
                    for set in [&change.old, &change.new].into_iter().flatten() {
                        if let Some(owner) = controller_of(&**set).filter(|owner| owner.kind == "Deployment") {
                            queue.add((set.namespace().to_owned(), owner.name.clone()));
                        }
                    }
                }
                Heard::Everything => all(),
            },
            // Recreate waits until the last old pod is gone.
            heard = pods.next() => match heard {
                Heard::Change(change) if change.new.as_ref().is_none_or(|pod| pod_over(pod)) => {
                    let pod = change.object();
                    let set = controller_of(&**pod).and_then(|owner| shared.caches.replica_sets.get(pod.namespace(), &owner.name));
                    if let Some(owner) = set.as_ref().and_then(|set| controller_of(&**set)) {
                        queue.add((pod.namespace().to_owned(), owner.name.clone()));
                    }
                }
                Heard::Change(_) => {}
                Heard::Everything => all(),
            },
        }
    }
}

async fn reconcile(shared: Shared, queue: Arc<Queue>, key: Key) -> Result<(), ApiError> {
    let Some(deployment) = shared.caches.deployments.get(&key.0, &key.1) else { return Ok(()) };
    let sets = shared.caches.replica_sets.controlled_by(deployment.uid());
    let running =
        |set: &ReplicaSet| shared.caches.pods.controlled_by(set.uid()).iter().filter(|pod| !pod_over(pod)).count();
    let Plan { step, status, again_after, revision } = rollout::plan(&deployment, &sets, &running, Timestamp::now());
    let acted = act(&shared, &deployment, step).await?;
    let mut updated = (*deployment).clone();
    if let Some(revision) = revision {
        let change = json!({"metadata": {"annotations": {rollout::REVISION: revision.to_string()}}});
        updated = shared.client.merge::<Deployment>(&key.0, &key.1, "", change).await?;
        shared.caches.deployments.wait_for(updated.revision()).await;
    }
    if updated.status.as_ref() != Some(&status) {
        updated.status = Some(status);
        let written = shared.client.update_status(&updated).await?;
        shared.caches.deployments.wait_for(written.revision()).await;
    }
    if acted {
        queue.add(key);
    } else if let Some(pause) = again_after {
        queue.add_after(key, pause.max(Duration::from_secs(1)));
    }
    Ok(())
}

/// Does what the plan says and waits until it is in view.
async fn act(shared: &Shared, deployment: &Deployment, step: Step) -> Result<bool, ApiError> {
    let mut revision = 0;
    match step {
        Step::Nothing => return Ok(false),
        Step::Create(mut set) => {
            set.metadata.owner_references = Some(vec![owned_by(deployment)]);
            match shared.client.create(&*set).await {
                Ok(created) => {
                    revision = created.revision();
                    tell_scaled(shared, deployment, &created, 0);
                }
                Err(error) if error.reason == "AlreadyExists" => {
                    // Another template with the same hash: count the collision and try under another name.
                    let count = deployment.status.as_ref().and_then(|status| status.collision_count).unwrap_or(0);
                    let change = json!({"status": {"collisionCount": count + 1}});
                    let at = (deployment.namespace(), deployment.name());
                    let written = shared.client.merge::<Deployment>(at.0, at.1, "status", change).await?;
                    shared.caches.deployments.wait_for(written.revision()).await;
                }
                Err(error) => return Err(error),
            }
        }
        Step::Change(changes) => {
            for (set, change) in changes {
                let written = change_set(shared, &set, change).await?;
                revision = revision.max(written.revision());
                let before = rollout::replicas(&set);
                if before != rollout::replicas(&written) {
                    tell_scaled(shared, deployment, &written, before);
                }
            }
        }
        Step::Delete(sets) => {
            for set in sets {
                revision = revision.max(shared.client.delete(&*set, DeleteOptions::default()).await?);
            }
        }
    }
    shared.caches.replica_sets.wait_for(revision).await;
    Ok(true)
}

async fn change_set(shared: &Shared, set: &ReplicaSet, mut change: Value) -> Result<ReplicaSet, ApiError> {
    // Decided on this state of the set, and on no other.
    change["metadata"]["resourceVersion"] = json!(set.metadata.resource_version);
    shared.client.merge::<ReplicaSet>(set.namespace(), set.name(), "", change).await
}

fn tell_scaled(shared: &Shared, deployment: &Deployment, set: &ReplicaSet, before: i32) {
    let now = rollout::replicas(set);
    let direction = if now >= before { "up" } else { "down" };
    let message = match before {
        0 => format!("Scaled {direction} replica set {} to {now}", set.name()),
        before => format!("Scaled {direction} replica set {} from {before} to {now}", set.name()),
    };
    shared.client.notice(deployment, &Notice { kind: "Normal", reason: "ScalingReplicaSet", message: &message });
}
