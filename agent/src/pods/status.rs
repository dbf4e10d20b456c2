//! The pod's status from what the runtime shows: PURE. Phases, conditions and reasons are the Kubernetes API's
//! (Pod Lifecycle), because `kubectl`, controllers and endpoints read them.

use super::plan::{Backoff, ContainerSeen, HealthMap, Nanos, Seen, State, finished, health, restartable};
use k8s_openapi::{
    api::core::v1::{
        Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
        ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodSpec, PodStatus,
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use std::{collections::HashMap, net::IpAddr};

/// Why a container could not be started, by container name: reason and message.
pub type Waiting = HashMap<String, (String, String)>;

pub struct Context<'a> {
    pub seen: &'a Seen,
    pub health: &'a HealthMap,
    pub backoff: &'a Backoff,
    pub waiting: &'a Waiting,
    /// The sandbox could not be made: why.
    pub sandbox_error: Option<&'a str>,
    /// Of the node: at most one per family, the preferred one first.
    pub host_ips: &'a [IpAddr],
    pub now: Nanos,
}

pub fn time(n: Nanos) -> Time {
    let t = Timestamp::from_second(n.div_euclid(1_000_000_000)).unwrap_or(Timestamp::UNIX_EPOCH);
    Time(t)
}

/// The new status; `pod.status` is what the API last said, whose transition times and foreign conditions stay.
pub fn status(pod: &Pod, c: &Context<'_>) -> PodStatus {
    let old = pod.status.clone().unwrap_or_default();
    let spec = pod.spec.clone().unwrap_or_default();
    let host_network = spec.host_network == Some(true);
    let ips: Vec<String> = match c.seen.sandbox() {
        Some(_) if host_network => c.host_ips.iter().map(ToString::to_string).collect(),
        Some(s) => s.ips.iter().map(ToString::to_string).collect(),
        None => old.pod_ips.iter().flatten().map(|p| p.ip.clone()).collect(),
    };
    let inits: Vec<_> = spec.init_containers.iter().flatten().map(|x| container(x, true, &old, c)).collect();
    let apps: Vec<_> = spec.containers.iter().map(|x| container(x, false, &old, c)).collect();
    let initialized = initialized(&spec, &inits, &apps);
    let deleted = pod.metadata.deletion_timestamp.is_some();
    let phase = phase(&spec, c.seen, initialized, &apps, &old);
    let unready = unready(&spec, &inits, &apps);
    PodStatus {
        phase: Some(phase.clone()),
        conditions: Some(conditions(&old, c, initialized, &unready, &phase, deleted)),
        host_ip: c.host_ips.first().map(ToString::to_string),
        host_ips: Some(c.host_ips.iter().map(|ip| HostIP { ip: ip.to_string() }).collect()),
        pod_ip: ips.first().cloned(),
        pod_ips: Some(ips.into_iter().map(|ip| PodIP { ip }).collect()).filter(|v: &Vec<_>| !v.is_empty()),
        start_time: old.start_time.or_else(|| Some(time(c.now))),
        init_container_statuses: Some(inits).filter(|v| !v.is_empty()),
        container_statuses: Some(apps),
        qos_class: old.qos_class.or_else(|| Some(qos(&spec).to_owned())),
        reason: old.reason,
        message: old.message,
        ..PodStatus::default()
    }
}

fn container(spec: &Container, init: bool, old: &PodStatus, c: &Context<'_>) -> ContainerStatus {
    let before = old
        .container_statuses
        .iter()
        .flatten()
        .chain(old.init_container_statuses.iter().flatten())
        .find(|s| s.name == spec.name);
    let mut all: Vec<&ContainerSeen> = c.seen.containers.iter().filter(|x| x.name == spec.name).collect();
    all.sort_by_key(|x| std::cmp::Reverse(x.attempt));
    let newest = all.first().copied();
    let mut state = newest.map_or_else(|| waiting(spec, c, "ContainerCreating"), state);
    let mut last = all.get(1).map(|x| terminated(x));
    // Waiting for a restart: the ended run becomes the last state.
    if let Some(x) = newest.filter(|x| x.state == State::Exited)
        && (c.backoff.waiting(&x.name, c.now).is_some() || c.waiting.contains_key(&x.name))
    {
        last = Some(terminated(x));
        state = waiting(spec, c, "CrashLoopBackOff");
    }
    let running = newest.filter(|x| x.state == State::Running);
    // A one-shot init container that ended well reports ready, as Kubernetes does.
    let one_shot_done = newest.is_some_and(|x| x.state == State::Exited && x.exit_code == 0);
    ContainerStatus {
        name: spec.name.clone(),
        image: newest
            .map(|x| x.image.clone())
            .filter(|i| !i.is_empty())
            .or_else(|| spec.image.clone())
            .unwrap_or_default(),
        image_id: newest.map(|x| x.image_ref.clone()).unwrap_or_default(),
        container_id: newest.map(|x| container_id(&x.id)),
        ready: running.is_some_and(|x| health(c.health, x).ready) || (init && one_shot_done),
        started: Some(running.is_some_and(|x| health(c.health, x).started)),
        restart_count: newest
            .map(|x| i32::try_from(x.attempt).unwrap_or(i32::MAX))
            .or(before.map(|b| b.restart_count))
            .unwrap_or(0),
        state: Some(state),
        last_state: last.map(|t| ContainerState { terminated: Some(t), ..ContainerState::default() }),
        ..ContainerStatus::default()
    }
}

pub fn container_id(id: &str) -> String {
    format!("containerd://{id}")
}

fn state(x: &ContainerSeen) -> ContainerState {
    match x.state {
        State::Running => ContainerState {
            running: Some(ContainerStateRunning { started_at: Some(time(x.started)) }),
            ..ContainerState::default()
        },
        State::Exited => ContainerState { terminated: Some(terminated(x)), ..ContainerState::default() },
        State::Created => ContainerState {
            waiting: Some(ContainerStateWaiting { reason: Some("ContainerCreating".into()), message: None }),
            ..ContainerState::default()
        },
    }
}

fn terminated(x: &ContainerSeen) -> ContainerStateTerminated {
    let reason = match (x.reason.as_str(), x.exit_code) {
        ("" | "Unknown", 0) => "Completed".to_owned(),
        ("" | "Unknown", _) => "Error".to_owned(),
        (r, _) => r.to_owned(),
    };
    ContainerStateTerminated {
        exit_code: x.exit_code,
        reason: Some(reason),
        started_at: Some(time(x.started)),
        finished_at: Some(time(x.finished)),
        container_id: Some(container_id(&x.id)),
        ..ContainerStateTerminated::default()
    }
}

fn waiting(spec: &Container, c: &Context<'_>, default: &str) -> ContainerState {
    let (reason, message) = match (c.waiting.get(&spec.name), c.backoff.waiting(&spec.name, c.now)) {
        (Some((r, m)), _) => (r.clone(), Some(m.clone())),
        (None, Some(d)) if default == "CrashLoopBackOff" => {
            (default.to_owned(), Some(format!("back-off {}s restarting failed container={}", d.as_secs(), spec.name)))
        }
        _ => (default.to_owned(), None),
    };
    ContainerState {
        waiting: Some(ContainerStateWaiting { reason: Some(reason), message }),
        ..ContainerState::default()
    }
}

fn ended_well(s: &ContainerStatus) -> bool {
    s.state.as_ref().and_then(|s| s.terminated.as_ref()).is_some_and(|t| t.exit_code == 0)
}

fn initialized(spec: &PodSpec, inits: &[ContainerStatus], apps: &[ContainerStatus]) -> bool {
    let app_began = apps.iter().any(|s| s.container_id.is_some());
    app_began
        || spec
            .init_containers
            .iter()
            .flatten()
            .zip(inits)
            .all(|(c, s)| if restartable(c) { s.started == Some(true) } else { ended_well(s) })
}

/// Names of the containers that are not ready: apps, and native sidecars.
fn unready(spec: &PodSpec, inits: &[ContainerStatus], apps: &[ContainerStatus]) -> Vec<String> {
    let sidecars = spec.init_containers.iter().flatten().zip(inits).filter(|(c, _)| restartable(c)).map(|(_, s)| s);
    sidecars.chain(apps).filter(|s| !s.ready || s.started != Some(true)).map(|s| s.name.clone()).collect()
}

fn phase(spec: &PodSpec, seen: &Seen, initialized: bool, apps: &[ContainerStatus], old: &PodStatus) -> String {
    if let Some(p @ ("Succeeded" | "Failed")) = old.phase.as_deref() {
        return p.to_owned();
    }
    if finished(spec, seen) && !spec.containers.is_empty() {
        let well = apps.iter().all(ended_well);
        return if well { "Succeeded" } else { "Failed" }.to_owned();
    }
    let began = apps.iter().all(|s| s.container_id.is_some());
    if initialized && began { "Running" } else { "Pending" }.to_owned()
}

fn conditions(
    old: &PodStatus,
    c: &Context<'_>,
    initialized: bool,
    unready: &[String],
    phase: &str,
    deleted: bool,
) -> Vec<PodCondition> {
    let done = phase == "Succeeded";
    let not_ready = match () {
        () if done => Some(("PodCompleted", None)),
        () if phase == "Failed" => Some(("PodFailed", None)),
        () if !unready.is_empty() => {
            Some(("ContainersNotReady", Some(format!("containers with unready status: [{}]", unready.join(" ")))))
        }
        () if c.seen.sandbox().is_none() => Some(("ContainersNotReady", c.sandbox_error.map(str::to_owned))),
        () if deleted => Some(("PodTerminating", None)),
        () => None,
    };
    let initialized = if initialized { None } else { Some(("ContainersNotInitialized", None)) };
    let sandbox = c.seen.sandbox().is_none().then(|| ("SandboxNotReady", c.sandbox_error.map(str::to_owned)));
    let ours = [
        ("PodReadyToStartContainers", sandbox),
        ("Initialized", initialized),
        ("Ready", not_ready.clone()),
        ("ContainersReady", not_ready),
    ];
    let mut all: Vec<_> =
        old.conditions.iter().flatten().filter(|x| ours.iter().all(|(t, _)| x.type_ != *t)).cloned().collect();
    for (type_, wrong) in ours {
        all.push(condition(old, type_, wrong, c.now));
    }
    all
}

fn condition(old: &PodStatus, type_: &str, wrong: Option<(&str, Option<String>)>, now: Nanos) -> PodCondition {
    let status = if wrong.is_some() { "False" } else { "True" };
    let since = old
        .conditions
        .iter()
        .flatten()
        .find(|x| x.type_ == type_ && x.status == status)
        .and_then(|x| x.last_transition_time.clone())
        .unwrap_or_else(|| time(now));
    let (reason, message) = wrong.map_or((None, None), |(r, m)| (Some(r.to_owned()), m));
    PodCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        last_transition_time: Some(since),
        reason,
        message,
        ..PodCondition::default()
    }
}

/// Quality of service class (Kubernetes: Guaranteed when limits equal requests everywhere, BestEffort when none).
fn qos(spec: &PodSpec) -> &'static str {
    let all = || spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let get = |c: &Container, limits: bool, key: &str| {
        let r = c.resources.as_ref()?;
        let m = if limits { r.limits.as_ref()? } else { r.requests.as_ref()? };
        m.get(key).map(|q| q.0.clone())
    };
    let set = |c: &Container| ["cpu", "memory"].iter().any(|k| get(c, true, k).is_some() || get(c, false, k).is_some());
    let equal = |c: &Container| {
        ["cpu", "memory"].iter().all(|k| {
            let limit = get(c, true, k);
            limit.is_some() && get(c, false, k).is_none_or(|r| Some(r) == limit)
        })
    };
    match () {
        () if !all().any(set) => "BestEffort",
        () if all().all(equal) => "Guaranteed",
        () => "Burstable",
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::SandboxSeen;
    use super::*;
    use serde_json::json;

    const S: Nanos = 1_000_000_000;

    fn seen(containers: Vec<ContainerSeen>) -> Seen {
        let ip = "10.244.1.5".parse().expect("an address");
        let sandbox = SandboxSeen { id: "s".into(), attempt: 0, ready: true, created: 0, ips: vec![ip] };
        Seen { sandboxes: vec![sandbox], containers }
    }

    fn container(name: &str, state: State, exit_code: i32) -> ContainerSeen {
        ContainerSeen {
            id: format!("id-{name}"),
            sandbox: "s".into(),
            name: name.into(),
            attempt: 0,
            state,
            exit_code,
            started: S,
            finished: 2 * S,
            reason: String::new(),
            image: "x".into(),
            image_ref: String::new(),
        }
    }

    fn of(spec: serde_json::Value, seen: &Seen) -> PodStatus {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).expect("a pod");
        let c = Context {
            seen,
            health: &HealthMap::new(),
            backoff: &Backoff::default(),
            waiting: &Waiting::new(),
            sandbox_error: None,
            host_ips: &["172.30.0.2".parse().expect("an address"), "fd00::2".parse().expect("an address")],
            now: 9 * S,
        };
        status(&pod, &c)
    }

    fn ready(s: &PodStatus) -> &str {
        let c = s.conditions.iter().flatten().find(|c| c.type_ == "Ready").expect("a Ready condition");
        &c.status
    }

    #[test]
    fn phases_follow_the_containers() {
        let spec = |policy: &str| json!({"restartPolicy": policy, "containers": [{"name": "a"}]});
        for (policy, containers, phase, is_ready) in [
            ("Always", vec![], "Pending", "False"),
            ("Always", vec![container("a", State::Running, 0)], "Running", "True"),
            ("Never", vec![container("a", State::Exited, 0)], "Succeeded", "False"),
            ("Never", vec![container("a", State::Exited, 1)], "Failed", "False"),
            ("Always", vec![container("a", State::Exited, 1)], "Running", "False"),
        ] {
            let s = of(spec(policy), &seen(containers));
            assert_eq!((s.phase.as_deref(), ready(&s)), (Some(phase), is_ready), "{policy}");
            assert_eq!(s.pod_ip.as_deref(), Some("10.244.1.5"));
            let hosts: Vec<&str> = s.host_ips.iter().flatten().map(|host| host.ip.as_str()).collect();
            assert_eq!((s.host_ip.as_deref(), hosts), (Some("172.30.0.2"), vec!["172.30.0.2", "fd00::2"]));
        }
    }

    #[test]
    fn a_sidecar_that_has_not_started_keeps_the_pod_pending() {
        let spec = json!({
            "initContainers": [{"name": "side", "restartPolicy": "Always"}],
            "containers": [{"name": "a"}]
        });
        let s = of(spec.clone(), &seen(vec![]));
        assert_eq!(s.phase.as_deref(), Some("Pending"));
        let s = of(spec, &seen(vec![container("side", State::Running, 0), container("a", State::Running, 0)]));
        assert_eq!((s.phase.as_deref(), ready(&s)), (Some("Running"), "True"));
    }
}
