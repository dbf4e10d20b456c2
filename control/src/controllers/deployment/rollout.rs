//! One step of a deployment towards its template, as Kubernetes takes it. PURE.
//!
//! Every step is small and safe on its own: never more pods than `maxSurge` allows, never fewer available ones than
//! `maxUnavailable` allows, whatever happens between two steps.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStatus, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::conditions;
use crate::api::client::Object;

/// Counts the rollouts of a deployment.
pub(super) const REVISION: &str = "deployment.kubernetes.io/revision";
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAX: &str = "deployment.kubernetes.io/max-replicas";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
const HASH: &str = "pod-template-hash";

/// What to do next.
#[derive(Debug)]
pub(super) enum Step {
    /// Wait.
    Nothing,
    /// Make the new set.
    Create(Box<ReplicaSet>),
    /// Merge these differences into these sets.
    Change(Vec<(Arc<ReplicaSet>, Value)>),
    /// Remove old sets.
    Delete(Vec<Arc<ReplicaSet>>),
}

/// A step, and what to tell.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) step: Step,
    pub(super) status: DeploymentStatus,
    /// Look again then even if nothing changes: a deadline.
    pub(super) again_after: Option<Duration>,
    /// The deployment's own revision annotation, if it is another.
    pub(super) revision: Option<i64>,
}

/// What a deployment allows during a rollout.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) wanted: i32,
    pub(super) surge: i32,
    pub(super) unavailable: i32,
}

/// Plans. `running` counts a set's pods that still run or are ending.
pub(super) fn plan(
    deployment: &Deployment,
    sets: &[Arc<ReplicaSet>],
    running: &dyn Fn(&ReplicaSet) -> usize,
    now: Timestamp,
) -> Plan {
    let spec = deployment.spec.clone().unwrap_or_default();
    let limits = limits(&spec);
    let mut sets = sets.to_vec();
    sets.sort_by_key(|set| (created(set), set.name().to_owned()));
    let new = sets.iter().find(|set| same_template(set, &spec)).cloned();
    let is_new = |set: &Arc<ReplicaSet>| new.as_ref().is_some_and(|new| new.uid() == set.uid());
    let old: Vec<Arc<ReplicaSet>> = sets.iter().filter(|set| !is_new(set)).cloned().collect();
    let highest = old.iter().map(|set| revision(&set.metadata)).max().unwrap_or(0);
    let state = State { deployment, spec: &spec, limits, new: new.as_ref(), old: &old, highest, running };
    let step = if deployment.deleting() { Step::Nothing } else { next_step(&state) };
    let created_now = matches!(step, Step::Create(_));
    let (status, again_after) = conditions::status(deployment, limits, new.as_deref(), &sets, created_now, now);
    let mine = new.as_ref().map_or(highest + 1, |new| revision(&new.metadata).max(highest + 1));
    let known = new.is_some() && !deployment.deleting() && revision(&deployment.metadata) != mine;
    Plan { step, status, again_after, revision: known.then_some(mine) }
}

/// What a step is decided by.
struct State<'a> {
    deployment: &'a Deployment,
    spec: &'a DeploymentSpec,
    limits: Limits,
    /// The set of the present template, if it is there.
    new: Option<&'a Arc<ReplicaSet>>,
    old: &'a [Arc<ReplicaSet>],
    /// Revision of the newest old set.
    highest: i64,
    running: &'a dyn Fn(&ReplicaSet) -> usize,
}

fn next_step(state: &State<'_>) -> Step {
    let State { deployment, spec, limits, new, old, highest, .. } = *state;
    let all: Vec<Arc<ReplicaSet>> = old.iter().chain(new).cloned().collect();
    if let Some(new) = new.filter(|_| spec.paused != Some(true)) {
        let change = annotate(deployment, new, limits, (highest + 1).max(revision(&new.metadata)));
        if let Some(change) = change.filter(|_| !scaled_meanwhile(&all, limits)) {
            return Step::Change(vec![(new.clone(), change)]);
        }
    }
    if spec.paused == Some(true) || scaled_meanwhile(&all, limits) {
        let changes = scale_all(new, old, spec, limits);
        return if changes.is_empty() { tidy(spec, limits, new, old) } else { Step::Change(changes) };
    }
    let recreate = spec.strategy.as_ref().is_some_and(|strategy| strategy.type_.as_deref() == Some("Recreate"));
    if recreate {
        return recreate_step(state);
    }
    let Some(new) = new else {
        let replicas = new_replicas(0, total(old), limits);
        return Step::Create(Box::new(new_set(deployment, spec, limits, replicas, highest + 1)));
    };
    let target = new_replicas(replicas(new), total(&all), limits);
    if target != replicas(new) {
        return Step::Change(vec![(new.clone(), scaled(target, limits))]);
    }
    let changes = scale_down_old(new, old, limits);
    if changes.is_empty() { tidy(spec, limits, Some(new), old) } else { Step::Change(changes) }
}

/// All old pods must be gone before the first new one.
fn recreate_step(state: &State<'_>) -> Step {
    let State { deployment, spec, limits, new, old, highest, running } = *state;
    let down: Vec<_> = old.iter().filter(|set| replicas(set) > 0).map(|set| (set.clone(), scaled(0, limits))).collect();
    if !down.is_empty() {
        return Step::Change(down);
    }
    if old.iter().any(|set| running(set) > 0) {
        return Step::Nothing;
    }
    match new {
        None => Step::Create(Box::new(new_set(deployment, spec, limits, limits.wanted, highest + 1))),
        Some(new) if replicas(new) != limits.wanted => Step::Change(vec![(new.clone(), scaled(limits.wanted, limits))]),
        Some(new) => tidy(spec, limits, Some(new), old),
    }
}

/// How many the new set may have now.
fn new_replicas(current: i32, total: i32, limits: Limits) -> i32 {
    if current >= limits.wanted {
        return limits.wanted;
    }
    let room = (limits.wanted + limits.surge - total).max(0);
    current + room.min(limits.wanted - current)
}

/// Takes from old sets what availability allows: first pods that are not available anyway, then others.
fn scale_down_old(new: &ReplicaSet, old: &[Arc<ReplicaSet>], limits: Limits) -> Vec<(Arc<ReplicaSet>, Value)> {
    let all = total(old) + replicas(new);
    let least = limits.wanted - limits.unavailable;
    let new_unavailable = replicas(new) - available(new);
    let mut budget = all - least - new_unavailable;
    if total(old) == 0 || budget <= 0 {
        return Vec::new();
    }
    let mut targets: BTreeMap<usize, i32> = BTreeMap::new();
    for (index, set) in old.iter().enumerate().filter(|(_, set)| replicas(set) > 0) {
        let sick = (replicas(set) - available(set)).clamp(0, budget);
        if sick > 0 {
            targets.insert(index, replicas(set) - sick);
            budget -= sick;
        }
    }
    let up: i32 = old.iter().map(|set| available(set)).sum::<i32>() + available(new);
    let mut spare = up - least;
    for (index, set) in old.iter().enumerate() {
        let target = targets.get(&index).copied().unwrap_or_else(|| replicas(set));
        let fewer = spare.clamp(0, target);
        if fewer > 0 {
            targets.insert(index, target - fewer);
            spare -= fewer;
        }
    }
    targets.into_iter().map(|(index, target)| (old[index].clone(), scaled(target, limits))).collect()
}

/// The deployment was scaled since its sets were last sized.
fn scaled_meanwhile(all: &[Arc<ReplicaSet>], limits: Limits) -> bool {
    all.iter().filter(|set| replicas(set) > 0).any(|set| {
        let known = set.metadata.annotations.as_ref().and_then(|a| a.get(DESIRED)).and_then(|n| n.parse::<i32>().ok());
        known.is_some_and(|known| known != limits.wanted)
    })
}

/// Gives all sets their share of a new size, each in proportion, without moving the rollout on.
fn scale_all(
    new: Option<&Arc<ReplicaSet>>,
    old: &[Arc<ReplicaSet>],
    spec: &DeploymentSpec,
    limits: Limits,
) -> Vec<(Arc<ReplicaSet>, Value)> {
    let active: Vec<Arc<ReplicaSet>> = old.iter().chain(new).filter(|set| replicas(set) > 0).cloned().collect();
    let target = |set: &Arc<ReplicaSet>, wanted: i32| {
        let stale = annotation(set, DESIRED) != limits.wanted.to_string();
        (replicas(set) != wanted || stale).then(|| (set.clone(), scaled(wanted, limits)))
    };
    match active.as_slice() {
        [] => return new.and_then(|new| target(new, limits.wanted)).into_iter().collect(),
        [only] => return target(only, limits.wanted).into_iter().collect(),
        _ => {}
    }
    if let Some(new) = new.filter(|new| replicas(new) >= limits.wanted && available(new) >= limits.wanted) {
        let mut changes: Vec<_> = old.iter().filter(|set| replicas(set) > 0).filter_map(|set| target(set, 0)).collect();
        changes.extend(target(new, limits.wanted));
        return changes;
    }
    let recreate = spec.strategy.as_ref().is_some_and(|strategy| strategy.type_.as_deref() == Some("Recreate"));
    let allowed = if recreate || limits.wanted == 0 { limits.wanted } else { limits.wanted + limits.surge };
    let mut left = allowed - total(&active);
    let sum = total(&active).max(1);
    let mut by_size = active;
    // Growing serves the largest first, and of equal ones the newest.
    by_size.sort_by_key(|set| (std::cmp::Reverse(replicas(set)), std::cmp::Reverse(created(set))));
    let mut changes = Vec::new();
    for set in &by_size {
        let share = i64::from(replicas(set)) * i64::from(allowed - sum);
        let rounded = (share as f64 / f64::from(sum)).round();
        #[allow(clippy::cast_possible_truncation)] // clamped to what is left, an i32
        let share = if left >= 0 { (rounded as i32).clamp(0, left) } else { (rounded as i32).clamp(left, 0) };
        left -= share;
        changes.push((set.clone(), (replicas(set) + share).max(0)));
    }
    if let Some(first) = changes.first_mut() {
        first.1 = (first.1 + left).max(0);
    }
    changes.into_iter().filter_map(|(set, wanted)| target(&set, wanted)).collect()
}

/// Removes old sets beyond the history limit, once the rollout is complete.
fn tidy(spec: &DeploymentSpec, limits: Limits, new: Option<&Arc<ReplicaSet>>, old: &[Arc<ReplicaSet>]) -> Step {
    let complete = new.is_some_and(|new| available(new) >= limits.wanted && replicas(new) == limits.wanted);
    let keep = usize::try_from(spec.revision_history_limit.unwrap_or(10)).unwrap_or(0);
    let empty = |set: &&Arc<ReplicaSet>| {
        let left = set.status.as_ref().map_or(0, |status| status.replicas);
        let seen = set.status.as_ref().and_then(|status| status.observed_generation) >= set.metadata.generation;
        replicas(set) == 0 && left == 0 && seen && !set.deleting()
    };
    let mut idle: Vec<Arc<ReplicaSet>> = old.iter().filter(empty).cloned().collect();
    if !complete || idle.len() <= keep {
        return Step::Nothing;
    }
    idle.sort_by_key(|set| revision(&set.metadata));
    idle.truncate(idle.len() - keep);
    Step::Delete(idle)
}

/// The difference that brings the set's annotations up to date, if they are not.
fn annotate(deployment: &Deployment, set: &ReplicaSet, limits: Limits, revision: i64) -> Option<Value> {
    let mut wanted = copied_annotations(deployment);
    wanted.insert(REVISION.to_owned(), revision.to_string());
    wanted.insert(DESIRED.to_owned(), limits.wanted.to_string());
    wanted.insert(MAX.to_owned(), (limits.wanted + limits.surge).to_string());
    let have = set.metadata.annotations.clone().unwrap_or_default();
    let missing: BTreeMap<_, _> = wanted.into_iter().filter(|(key, value)| have.get(key) != Some(value)).collect();
    let slow = deployment.spec.as_ref().and_then(|spec| spec.min_ready_seconds);
    let own_slow = set.spec.as_ref().and_then(|spec| spec.min_ready_seconds);
    if missing.is_empty() && slow.unwrap_or(0) == own_slow.unwrap_or(0) {
        return None;
    }
    Some(json!({"metadata": {"annotations": missing}, "spec": {"minReadySeconds": slow.unwrap_or(0)}}))
}

fn copied_annotations(deployment: &Deployment) -> BTreeMap<String, String> {
    let own = deployment.metadata.annotations.clone().unwrap_or_default();
    let copied = |key: &str| !matches!(key, LAST_APPLIED | REVISION | DESIRED | MAX);
    own.into_iter().filter(|(key, _)| copied(key)).collect()
}

fn new_set(deployment: &Deployment, spec: &DeploymentSpec, limits: Limits, replicas: i32, revision: i64) -> ReplicaSet {
    let collisions = deployment.status.as_ref().and_then(|status| status.collision_count).unwrap_or(0);
    let hash = template_hash(spec, collisions);
    let mut template = spec.template.clone();
    let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
    labels.insert(HASH.to_owned(), hash.clone());
    let labels = labels.clone();
    let mut match_labels = spec.selector.match_labels.clone().unwrap_or_default();
    match_labels.insert(HASH.to_owned(), hash.clone());
    let mut annotations = copied_annotations(deployment);
    annotations.insert(REVISION.to_owned(), revision.to_string());
    annotations.insert(DESIRED.to_owned(), limits.wanted.to_string());
    annotations.insert(MAX.to_owned(), (limits.wanted + limits.surge).to_string());
    ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", deployment.name())),
            namespace: Some(deployment.namespace().to_owned()),
            labels: Some(labels),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(replicas),
            min_ready_seconds: spec.min_ready_seconds,
            selector: LabelSelector {
                match_labels: Some(match_labels),
                match_expressions: spec.selector.match_expressions.clone(),
            },
            template: Some(template),
        }),
        status: None,
    }
}

fn scaled(replicas: i32, limits: Limits) -> Value {
    let annotations = json!({DESIRED: limits.wanted.to_string(), MAX: (limits.wanted + limits.surge).to_string()});
    json!({"spec": {"replicas": replicas}, "metadata": {"annotations": annotations}})
}

/// FNV-1a of the template's JSON, in the letters Kubernetes uses for names.
fn template_hash(spec: &DeploymentSpec, collisions: i32) -> String {
    const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let text = format!("{}/{collisions}", json!(spec.template));
    let hash = text.bytes().fold(0x811c_9dc5_u32, |hash, b| (hash ^ u32::from(b)).wrapping_mul(0x0100_0193));
    hash.to_string().bytes().map(|digit| char::from(LETTERS[usize::from(digit) % 27])).collect()
}

/// The set was made from the deployment's template; the hash label does not count.
fn same_template(set: &ReplicaSet, spec: &DeploymentSpec) -> bool {
    let mut template = set.spec.as_ref().and_then(|spec| spec.template.clone()).unwrap_or_default();
    if let Some(labels) = template.metadata.as_mut().and_then(|metadata| metadata.labels.as_mut()) {
        labels.remove(HASH);
    }
    json!(template) == json!(spec.template)
}

fn limits(spec: &DeploymentSpec) -> Limits {
    let wanted = spec.replicas.unwrap_or(1);
    let rolling = spec.strategy.as_ref().and_then(|strategy| strategy.rolling_update.as_ref());
    if spec.strategy.as_ref().is_some_and(|strategy| strategy.type_.as_deref() == Some("Recreate")) {
        return Limits { wanted, surge: 0, unavailable: wanted };
    }
    let share = |value: Option<&IntOrString>, up: bool| match value {
        Some(IntOrString::Int(count)) => *count,
        Some(IntOrString::String(text)) => percent(text, wanted, up),
        None => percent("25%", wanted, up),
    };
    let surge = share(rolling.and_then(|r| r.max_surge.as_ref()), true);
    let unavailable = share(rolling.and_then(|r| r.max_unavailable.as_ref()), false).min(wanted);
    // With neither, nothing could ever move.
    let unavailable = if surge == 0 && unavailable == 0 { 1 } else { unavailable };
    Limits { wanted, surge, unavailable }
}

fn percent(text: &str, of: i32, up: bool) -> i32 {
    let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
    let product = percent * i64::from(of);
    let rounded = if up { (product + 99) / 100 } else { product / 100 };
    i32::try_from(rounded).unwrap_or(i32::MAX / 4)
}

pub(super) fn replicas(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
}

pub(super) fn available(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0)
}

fn total(sets: &[Arc<ReplicaSet>]) -> i32 {
    sets.iter().map(|set| replicas(set)).sum()
}

fn created(set: &ReplicaSet) -> Timestamp {
    set.metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0)
}

fn annotation(set: &ReplicaSet, key: &str) -> String {
    set.metadata.annotations.as_ref().and_then(|all| all.get(key)).cloned().unwrap_or_default()
}

fn revision(metadata: &ObjectMeta) -> i64 {
    let text = metadata.annotations.as_ref().and_then(|all| all.get(REVISION));
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
#[path = "rollout_tests.rs"]
mod tests;
