//! A deployment's status: counts, and the conditions `Available` and `Progressing` by which clients judge a rollout.
//! PURE.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::rollout::{Limits, available, replicas};
use crate::api::client::Object;

const COMPLETE: &str = "NewReplicaSetAvailable";
const EXCEEDED: &str = "ProgressDeadlineExceeded";

/// The status, and when to look again at the deadline.
pub(super) fn status(
    deployment: &Deployment,
    limits: Limits,
    new: Option<&ReplicaSet>,
    sets: &[Arc<ReplicaSet>],
    created_now: bool,
    now: Timestamp,
) -> (DeploymentStatus, Option<Duration>) {
    let old = deployment.status.clone().unwrap_or_default();
    let sum = |count: &dyn Fn(&ReplicaSet) -> i32| sets.iter().map(|set| count(set)).sum::<i32>();
    let made = |set: &ReplicaSet| set.status.as_ref().map_or(0, |status| status.replicas);
    let ready = |set: &ReplicaSet| set.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0);
    let (wanted_total, up) = (sum(&replicas), sum(&available));
    let unless_zero = |count: i32| (count != 0).then_some(count);
    let mut status = DeploymentStatus {
        observed_generation: deployment.metadata.generation,
        replicas: unless_zero(sum(&made)),
        updated_replicas: unless_zero(new.map_or(0, made)),
        ready_replicas: unless_zero(sum(&ready)),
        available_replicas: unless_zero(up),
        unavailable_replicas: unless_zero((wanted_total - up).max(0)),
        collision_count: old.collision_count,
        conditions: old.conditions.clone(),
    };
    let enough = up >= limits.wanted - limits.unavailable;
    let (truth, reason, message) = if enough {
        ("True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
    } else {
        ("False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
    };
    set(&mut status, condition("Available", truth, reason, message.to_owned(), now), false);
    let again = progress(deployment, limits, new, &old, &mut status, created_now, now);
    (status, again)
}

fn progress(
    deployment: &Deployment,
    limits: Limits,
    new: Option<&ReplicaSet>,
    old: &DeploymentStatus,
    status: &mut DeploymentStatus,
    created_now: bool,
    now: Timestamp,
) -> Option<Duration> {
    let spec = deployment.spec.as_ref()?;
    let deadline_s = i64::from(spec.progress_deadline_seconds.filter(|deadline| *deadline != i32::MAX)?);
    let name = new.map_or(deployment.name(), Object::name).to_owned();
    let known = find(old, "Progressing").cloned();
    let count = |value: Option<i32>| value.unwrap_or(0);
    let (updated, total) = (count(status.updated_replicas), count(status.replicas));
    let done = new.is_some()
        && updated == limits.wanted
        && total == limits.wanted
        && count(status.available_replicas) == limits.wanted;
    let moved = updated > count(old.updated_replicas)
        || total - updated < count(old.replicas) - count(old.updated_replicas)
        || count(status.ready_replicas) > count(old.ready_replicas)
        || count(status.available_replicas) > count(old.available_replicas);
    let make = |truth, reason, message: String| condition("Progressing", truth, reason, message, now);
    if spec.paused == Some(true) {
        set(status, make("Unknown", "DeploymentPaused", "Deployment is paused".to_owned()), false);
        return None;
    }
    let was_complete = known.as_ref().is_some_and(|known| known.reason.as_deref() == Some(COMPLETE));
    if created_now {
        set(status, make("True", "NewReplicaSetCreated", "Created new replica set".to_owned()), true);
    } else if done {
        set(status, make("True", COMPLETE, format!("ReplicaSet \"{name}\" has successfully progressed.")), false);
        return None;
    } else if was_complete && updated == total && new.is_some() {
        // A pod of a finished rollout failed, or it was scaled: that is no new rollout.
        return None;
    } else if moved || known.is_none() || was_complete {
        set(status, make("True", "ReplicaSetUpdated", format!("ReplicaSet \"{name}\" is progressing.")), true);
    }
    let current = find(status, "Progressing")?;
    if current.reason.as_deref() == Some(EXCEEDED) {
        return None;
    }
    let since = current.last_update_time.as_ref().map_or(now, |time| time.0);
    let left_s = since.as_second() + deadline_s - now.as_second();
    if left_s <= 0 {
        set(status, make("False", EXCEEDED, format!("ReplicaSet \"{name}\" has timed out progressing.")), false);
        return None;
    }
    u64::try_from(left_s).ok().map(Duration::from_secs)
}

fn condition(kind: &str, truth: &str, reason: &str, message: String, now: Timestamp) -> DeploymentCondition {
    DeploymentCondition {
        type_: kind.to_owned(),
        status: truth.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_update_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    }
}

fn find<'s>(status: &'s DeploymentStatus, kind: &str) -> Option<&'s DeploymentCondition> {
    status.conditions.iter().flatten().find(|condition| condition.type_ == kind)
}

/// Sets a condition. One that says the same keeps its times, unless `renew`; the transition time moves with the status.
fn set(status: &mut DeploymentStatus, mut condition: DeploymentCondition, renew: bool) {
    let conditions = status.conditions.get_or_insert_default();
    let Some(known) = conditions.iter_mut().find(|known| known.type_ == condition.type_) else {
        conditions.push(condition);
        return;
    };
    if known.status == condition.status {
        condition.last_transition_time = known.last_transition_time.clone();
        if known.reason == condition.reason && known.message == condition.message && !renew {
            return;
        }
    }
    *known = condition;
}
