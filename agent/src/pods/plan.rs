//! What to do next with one pod: PURE. The pod's object, what the runtime shows and what probes say go in; a short list
//! of actions, and the time at which to look again, come out. Called after every change until it answers "nothing".
//!
//! Rules are Kubernetes': init containers in order, native sidecars (init containers with `restartPolicy: Always`)
//! stay and are stopped last in reverse order, restarts back off 10 s, 20 s … 300 s and forget after 10 minutes.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use std::{collections::HashMap, net::IpAddr, time::Duration};

/// Nanoseconds since 1970, as CRI reports times.
pub type Nanos = i64;

const FIRST_BACKOFF: Duration = Duration::from_secs(10);
const MAX_BACKOFF: Duration = Duration::from_secs(300);
const FORGET_AFTER: Duration = Duration::from_secs(600);
/// What a native sidecar gets at least to end, even if the apps used up the grace period.
const SIDECAR_GRACE_S: i64 = 2;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxSeen {
    pub id: String,
    pub attempt: u32,
    pub ready: bool,
    pub created: Nanos,
    pub ips: Vec<IpAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Created,
    Running,
    Exited,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerSeen {
    pub id: String,
    pub sandbox: String,
    pub name: String,
    pub attempt: u32,
    pub state: State,
    pub exit_code: i32,
    pub started: Nanos,
    pub finished: Nanos,
    pub reason: String,
    pub image: String,
    pub image_ref: String,
}

/// What the runtime shows of one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub sandboxes: Vec<SandboxSeen>,
    pub containers: Vec<ContainerSeen>,
}

impl Seen {
    /// The sandbox in use: the newest that is ready.
    pub fn sandbox(&self) -> Option<&SandboxSeen> {
        self.sandboxes.iter().filter(|s| s.ready).max_by_key(|s| s.attempt)
    }

    /// The newest container of that name in the sandbox in use, or, without one, in any.
    pub fn container(&self, name: &str) -> Option<&ContainerSeen> {
        let current = self.sandbox().map(|s| s.id.as_str());
        self.containers
            .iter()
            .filter(|c| c.name == name && current.is_none_or(|id| c.sandbox == id))
            .max_by_key(|c| c.attempt)
    }

    fn next_attempt(&self, name: &str) -> u32 {
        self.containers.iter().filter(|c| c.name == name).map(|c| c.attempt + 1).max().unwrap_or(0)
    }

    fn running(&self, name: &str) -> Option<&ContainerSeen> {
        self.container(name).filter(|c| c.state == State::Running)
    }
}

/// What probes say of a running container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    pub started: bool,
    pub ready: bool,
    pub live: bool,
}

/// Health by container id; a container without an entry has no probes and counts as healthy.
pub type HealthMap = HashMap<String, Health>;

pub fn health(map: &HealthMap, c: &ContainerSeen) -> Health {
    map.get(&c.id).copied().unwrap_or(Health { started: true, ready: true, live: true })
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    CreateSandbox {
        attempt: u32,
    },
    /// Ends everything in it and frees its network; the record stays for logs.
    StopSandbox {
        id: String,
    },
    RemoveSandbox {
        id: String,
    },
    Start {
        name: String,
        attempt: u32,
    },
    /// Together, each with this grace in seconds.
    Stop {
        ids: Vec<String>,
        grace_s: i64,
        why: String,
    },
    /// Old, exited containers that nothing refers to any more.
    RemoveContainer {
        id: String,
    },
    /// Nothing of the pod is left: the object may go.
    Gone,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub actions: Vec<Action>,
    /// Look again then, even if nothing changes.
    pub wake: Option<Nanos>,
}

/// Restart delays, by container name. Kept by the caller between calls.
#[derive(Clone, Debug, Default)]
pub struct Backoff {
    entries: HashMap<String, Entry>,
}

#[derive(Clone, Debug, Default)]
struct Entry {
    counted: String,
    delay: Duration,
    due: Nanos,
}

impl Backoff {
    /// When a container that exited may start again: the first time at once, then 10 s after its end, 20 s, … 300 s.
    fn due(&mut self, c: &ContainerSeen) -> Nanos {
        let e = self.entries.entry(c.name.clone()).or_default();
        if e.counted != c.id {
            let ran = Duration::from_nanos(c.finished.saturating_sub(c.started).max(0).unsigned_abs());
            let delay = if ran >= FORGET_AFTER { Duration::ZERO } else { e.delay };
            e.counted = c.id.clone();
            e.due = c.finished.saturating_add(nanos(delay));
            e.delay = (delay * 2).clamp(FIRST_BACKOFF, MAX_BACKOFF);
        }
        e.due
    }

    /// A start that failed before there was a container (image or configuration missing) backs off the same way.
    pub fn start_failed(&mut self, name: &str, now: Nanos) {
        let e = self.entries.entry(name.to_owned()).or_default();
        e.delay = (e.delay * 2).clamp(FIRST_BACKOFF, MAX_BACKOFF);
        e.due = now.saturating_add(nanos(e.delay));
        e.counted = format!("failed at {now}");
    }

    pub fn start_succeeded(&mut self, name: &str) {
        if let Some(e) = self.entries.get_mut(name).filter(|e| e.counted.starts_with("failed at")) {
            *e = Entry::default();
        }
    }

    /// Waits for its next start because it ended too often; the delay it waits.
    pub fn waiting(&self, name: &str, now: Nanos) -> Option<Duration> {
        let e = self.entries.get(name).filter(|e| e.due > now)?;
        Some((e.delay / 2).max(FIRST_BACKOFF))
    }

    fn blocked_until(&self, name: &str) -> Nanos {
        self.entries.get(name).map_or(0, |e| e.due)
    }
}

fn nanos(d: Duration) -> Nanos {
    i64::try_from(d.as_nanos()).unwrap_or(i64::MAX)
}

pub fn restartable(c: &Container) -> bool {
    c.restart_policy.as_deref() == Some("Always")
}

/// Everything that decides besides the object itself.
pub struct Inputs<'a> {
    pub seen: &'a Seen,
    pub health: &'a HealthMap,
    pub now: Nanos,
    /// Endpoints of the pod are withdrawn everywhere this node knows of (or the wait for that is over): the apps of a
    /// deleted pod may be told to end.
    pub withdrawn: bool,
}

pub fn plan(pod: &Pod, backoff: &mut Backoff, i: &Inputs<'_>) -> Plan {
    let Some(spec) = &pod.spec else { return Plan::default() };
    if pod.metadata.deletion_timestamp.is_some() {
        return terminate(pod, spec, i);
    }
    if finished(spec, i.seen) {
        return wind_down(spec, i.seen);
    }
    if let Some(failed) = evicted(pod) {
        return stop_everything(i.seen, 0, failed);
    }
    let Some(sandbox) = i.seen.sandbox() else { return make_sandbox(i.seen) };
    let mut plan = Plan { actions: stale_sandboxes(i.seen, &sandbox.id), wake: None };
    if init_containers(spec, backoff, i, &mut plan) {
        app_containers(spec, backoff, i, &mut plan);
    }
    prune(i.seen, &mut plan);
    plan
}

fn evicted(pod: &Pod) -> Option<&str> {
    let status = pod.status.as_ref()?;
    (status.phase.as_deref() == Some("Failed") && status.reason.as_deref() == Some("Evicted")).then_some("evicted")
}

/// Sandboxes other than the one in use: their network must be given back before they are forgotten.
fn stale_sandboxes(seen: &Seen, current: &str) -> Vec<Action> {
    seen.sandboxes
        .iter()
        .filter(|s| s.id != current)
        .flat_map(|s| [Action::StopSandbox { id: s.id.clone() }, Action::RemoveSandbox { id: s.id.clone() }])
        .collect()
}

fn make_sandbox(seen: &Seen) -> Plan {
    let attempt = seen.sandboxes.iter().map(|s| s.attempt + 1).max().unwrap_or(0);
    let mut actions: Vec<_> = seen.sandboxes.iter().map(|s| Action::StopSandbox { id: s.id.clone() }).collect();
    actions.push(Action::CreateSandbox { attempt });
    Plan { actions, wake: None }
}

/// Brings init containers and native sidecars up, one after the other. True when the apps may start.
fn init_containers(spec: &PodSpec, backoff: &mut Backoff, i: &Inputs<'_>, plan: &mut Plan) -> bool {
    let inits = spec.init_containers.as_deref().unwrap_or_default();
    // Once an app container exists in this sandbox, one-shot init containers are not looked at again.
    let initialized = spec.containers.iter().any(|c| i.seen.sandbox().is_some() && i.seen.container(&c.name).is_some());
    for c in inits {
        let go_on = if restartable(c) {
            let up = keep_running(&c.name, true, backoff, i, plan);
            initialized || up
        } else {
            initialized || run_once(c, spec, backoff, i, plan)
        };
        if !go_on {
            return false;
        }
    }
    true
}

/// A one-shot init container. True when it has ended well.
fn run_once(c: &Container, spec: &PodSpec, backoff: &mut Backoff, i: &Inputs<'_>, plan: &mut Plan) -> bool {
    match i.seen.container(&c.name) {
        Some(x) if x.state == State::Exited && x.exit_code == 0 => return true,
        Some(x) if x.state == State::Exited && never(spec) => {}
        Some(x) if x.state == State::Exited => restart(x, backoff, i, plan),
        Some(x) if x.state == State::Running => {}
        _ => start(&c.name, backoff, i, plan),
    }
    false
}

/// A container that should be running. True when it is, and has started.
fn keep_running(name: &str, again: bool, backoff: &mut Backoff, i: &Inputs<'_>, plan: &mut Plan) -> bool {
    match i.seen.container(name) {
        Some(x) if x.state == State::Running => {
            let h = health(i.health, x);
            if !h.live {
                let why = format!("Container {name} failed liveness probe, will be restarted");
                plan.actions.push(Action::Stop { ids: vec![x.id.clone()], grace_s: -1, why });
            }
            h.started
        }
        Some(x) if x.state == State::Exited => {
            if again {
                restart(x, backoff, i, plan);
            }
            false
        }
        _ => {
            start(name, backoff, i, plan);
            false
        }
    }
}

fn app_containers(spec: &PodSpec, backoff: &mut Backoff, i: &Inputs<'_>, plan: &mut Plan) {
    for c in &spec.containers {
        let again = match i.seen.container(&c.name) {
            Some(x) if x.state == State::Exited => runs_again(spec, x.exit_code),
            _ => true,
        };
        keep_running(&c.name, again, backoff, i, plan);
    }
}

fn start(name: &str, backoff: &Backoff, i: &Inputs<'_>, plan: &mut Plan) {
    start_when(name, backoff.blocked_until(name), i, plan);
}

fn restart(x: &ContainerSeen, backoff: &mut Backoff, i: &Inputs<'_>, plan: &mut Plan) {
    let due = backoff.due(x).max(backoff.blocked_until(&x.name));
    start_when(&x.name, due, i, plan);
}

fn start_when(name: &str, due: Nanos, i: &Inputs<'_>, plan: &mut Plan) {
    if due <= i.now {
        plan.actions.push(Action::Start { name: name.to_owned(), attempt: i.seen.next_attempt(name) });
    } else {
        plan.wake = Some(plan.wake.map_or(due, |w| w.min(due)));
    }
}

fn never(spec: &PodSpec) -> bool {
    spec.restart_policy.as_deref() == Some("Never")
}

fn runs_again(spec: &PodSpec, exit_code: i32) -> bool {
    match spec.restart_policy.as_deref() {
        Some("Never") => false,
        Some("OnFailure") => exit_code != 0,
        _ => true,
    }
}

/// Every app container has ended for good, or an init container failed for good.
pub fn finished(spec: &PodSpec, seen: &Seen) -> bool {
    let ended = |name: &str| {
        seen.containers.iter().filter(|c| c.name == name).max_by_key(|c| c.attempt).filter(|c| c.state == State::Exited)
    };
    let failed_init = never(spec)
        && spec
            .init_containers
            .iter()
            .flatten()
            .any(|c| !restartable(c) && ended(&c.name).is_some_and(|x| x.exit_code != 0));
    failed_init || spec.containers.iter().all(|c| ended(&c.name).is_some_and(|x| !runs_again(spec, x.exit_code)))
}

/// The apps are done: sidecars leave in reverse order, then the network. Containers stay for their logs.
fn wind_down(spec: &PodSpec, seen: &Seen) -> Plan {
    let mut actions = vec![];
    if let Some(last) = last_sidecar(spec, seen) {
        actions.push(Action::Stop { ids: vec![last], grace_s: -1, why: "the pod's containers have ended".into() });
    } else {
        let ready = seen.sandboxes.iter().filter(|s| s.ready);
        actions.extend(ready.map(|s| Action::StopSandbox { id: s.id.clone() }));
    }
    Plan { actions, wake: None }
}

fn last_sidecar(spec: &PodSpec, seen: &Seen) -> Option<String> {
    let inits = spec.init_containers.as_deref().unwrap_or_default();
    inits.iter().rev().filter(|c| restartable(c)).find_map(|c| seen.running(&c.name)).map(|c| c.id.clone())
}

/// A deleted pod: apps first, all at once, with what is left of the grace period; then sidecars; then the sandbox.
fn terminate(pod: &Pod, spec: &PodSpec, i: &Inputs<'_>) -> Plan {
    let left = grace_left(pod, i.now);
    let one_shot = spec.init_containers.iter().flatten().filter(|c| !restartable(c));
    let apps: Vec<_> =
        spec.containers.iter().chain(one_shot).filter_map(|c| i.seen.running(&c.name)).map(|c| c.id.clone()).collect();
    if !apps.is_empty() {
        if !i.withdrawn && left > 0 {
            return Plan::default();
        }
        return stop(apps, left, "the pod is deleted");
    }
    if let Some(sidecar) = last_sidecar(spec, i.seen) {
        return stop(vec![sidecar], left.max(SIDECAR_GRACE_S), "the pod is deleted");
    }
    stop_everything(i.seen, left, "the pod is deleted")
}

fn stop(ids: Vec<String>, grace_s: i64, why: &str) -> Plan {
    Plan { actions: vec![Action::Stop { ids, grace_s, why: why.to_owned() }], wake: None }
}

fn stop_everything(seen: &Seen, grace_s: i64, why: &str) -> Plan {
    let running: Vec<_> = seen.containers.iter().filter(|c| c.state == State::Running).map(|c| c.id.clone()).collect();
    if !running.is_empty() {
        return stop(running, grace_s.max(0), why);
    }
    if seen.sandboxes.is_empty() {
        return Plan { actions: vec![Action::Gone], wake: None };
    }
    let actions = seen
        .sandboxes
        .iter()
        .flat_map(|s| [Action::StopSandbox { id: s.id.clone() }, Action::RemoveSandbox { id: s.id.clone() }])
        .collect();
    Plan { actions, wake: None }
}

/// Seconds of the grace period that are left: the deletion timestamp is when it ends.
fn grace_left(pod: &Pod, now: Nanos) -> i64 {
    let Some(end) = &pod.metadata.deletion_timestamp else { return 0 };
    (end.0.as_second() - now / 1_000_000_000).max(0)
}

/// Of each name the newest container and the one before it stay (`kubectl logs --previous`).
fn prune(seen: &Seen, plan: &mut Plan) {
    for c in &seen.containers {
        let newer = seen.containers.iter().filter(|o| o.name == c.name && o.attempt > c.attempt).count();
        if newer >= 2 && c.state == State::Exited {
            plan.actions.push(Action::RemoveContainer { id: c.id.clone() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const S: Nanos = 1_000_000_000;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).expect("a pod")
    }

    fn deleted(mut p: Pod, at_s: i64) -> Pod {
        let t = k8s_openapi::jiff::Timestamp::from_second(at_s).expect("in range");
        p.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(t));
        p
    }

    fn sandbox() -> SandboxSeen {
        SandboxSeen { id: "s0".into(), attempt: 0, ready: true, created: 0, ips: vec![] }
    }

    fn container(name: &str, attempt: u32, state: State, exit_code: i32) -> ContainerSeen {
        ContainerSeen {
            id: format!("{name}-{attempt}"),
            sandbox: "s0".into(),
            name: name.into(),
            attempt,
            state,
            exit_code,
            started: S,
            finished: 2 * S,
            reason: String::new(),
            image: String::new(),
            image_ref: String::new(),
        }
    }

    fn run(p: &Pod, containers: Vec<ContainerSeen>, now: Nanos, b: &mut Backoff) -> Plan {
        let seen = Seen { sandboxes: vec![sandbox()], containers };
        plan(p, b, &Inputs { seen: &seen, health: &HealthMap::new(), now, withdrawn: true })
    }

    fn starts(p: &Plan) -> Vec<&str> {
        p.actions
            .iter()
            .filter_map(|a| match a {
                Action::Start { name, .. } => Some(name.as_str()),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn a_new_pod_gets_a_sandbox_first() {
        let p = pod(json!({"containers": [{"name": "a"}]}));
        let seen = Seen::default();
        let i = Inputs { seen: &seen, health: &HealthMap::new(), now: 0, withdrawn: true };
        assert_eq!(plan(&p, &mut Backoff::default(), &i).actions, [Action::CreateSandbox { attempt: 0 }]);
    }

    #[test]
    fn init_containers_go_one_by_one_and_sidecars_stay() {
        let p = pod(json!({
            "initContainers": [{"name": "i"}, {"name": "side", "restartPolicy": "Always"}, {"name": "j"}],
            "containers": [{"name": "a"}, {"name": "b"}]
        }));
        let b = &mut Backoff::default();
        let i_done = container("i", 0, State::Exited, 0);
        let side = container("side", 0, State::Running, 0);
        let j_done = container("j", 0, State::Exited, 0);
        assert_eq!(starts(&run(&p, vec![], 9 * S, b)), ["i"]);
        assert_eq!(starts(&run(&p, vec![container("i", 0, State::Running, 0)], 9 * S, b)), [] as [&str; 0]);
        assert_eq!(starts(&run(&p, vec![i_done.clone()], 9 * S, b)), ["side"]);
        assert_eq!(starts(&run(&p, vec![i_done.clone(), side.clone()], 9 * S, b)), ["j"]);
        assert_eq!(starts(&run(&p, vec![i_done, side, j_done], 9 * S, b)), ["a", "b"]);
    }

    #[test]
    fn restarts_back_off_from_the_second_one() {
        let p = pod(json!({"containers": [{"name": "a"}]}));
        let b = &mut Backoff::default();
        let first = run(&p, vec![container("a", 0, State::Exited, 1)], 2 * S, b);
        assert_eq!(starts(&first), ["a"]);
        for (attempt, wait) in [(1, 10), (2, 20), (3, 40), (4, 80), (5, 160), (6, 300), (7, 300)] {
            let crashed = container("a", attempt, State::Exited, 1);
            let waiting = run(&p, vec![crashed.clone()], 2 * S, b);
            assert_eq!(waiting.wake, Some((2 + wait) * S), "attempt {attempt}");
            assert_eq!(starts(&run(&p, vec![crashed], (2 + wait) * S, b)), ["a"]);
        }
        let mut long = container("a", 8, State::Exited, 1);
        long.finished = long.started + 600 * S;
        assert_eq!(starts(&run(&p, vec![long], 601 * S, b)), ["a"], "ten good minutes are forgiven");
    }

    #[test]
    fn restart_policy_decides_when_a_pod_is_finished() {
        for (policy, exit, again) in
            [("Always", 0, true), ("OnFailure", 0, false), ("OnFailure", 1, true), ("Never", 1, false)]
        {
            let p = pod(json!({"restartPolicy": policy, "containers": [{"name": "a"}]}));
            let plan = run(&p, vec![container("a", 0, State::Exited, exit)], 9 * S, &mut Backoff::default());
            assert_eq!(!starts(&plan).is_empty(), again, "{policy} {exit}");
        }
    }

    #[test]
    fn a_finished_job_lets_its_sidecar_go() {
        let p = pod(json!({
            "restartPolicy": "Never",
            "initContainers": [{"name": "side", "restartPolicy": "Always"}],
            "containers": [{"name": "a"}]
        }));
        let done = container("a", 0, State::Exited, 0);
        let plan = run(&p, vec![done, container("side", 0, State::Running, 0)], 9 * S, &mut Backoff::default());
        assert!(matches!(&plan.actions[..], [Action::Stop { ids, .. }] if ids == &["side-0"]));
    }

    #[test]
    fn a_deleted_pod_stops_apps_then_sidecars_then_the_sandbox() {
        let p = deleted(
            pod(json!({
                "initContainers": [{"name": "side", "restartPolicy": "Always"}],
                "containers": [{"name": "a"}]
            })),
            30,
        );
        let b = &mut Backoff::default();
        let (a, side) = (container("a", 0, State::Running, 0), container("side", 0, State::Running, 0));
        let both = run(&p, vec![a.clone(), side.clone()], 10 * S, b);
        assert!(matches!(&both.actions[..], [Action::Stop { ids, grace_s: 20, .. }] if ids == &["a-0"]));
        let alone = run(&p, vec![container("a", 0, State::Exited, 0), side], 40 * S, b);
        assert!(matches!(&alone.actions[..], [Action::Stop { ids, grace_s: 2, .. }] if ids == &["side-0"]));
        let empty = run(&p, vec![container("a", 0, State::Exited, 0)], 40 * S, b);
        assert!(matches!(&empty.actions[..], [Action::StopSandbox { .. }, Action::RemoveSandbox { .. }]));
    }

    #[test]
    fn apps_are_not_told_to_end_before_their_endpoints_are_withdrawn() {
        let p = deleted(pod(json!({"containers": [{"name": "a"}]})), 30);
        let seen = Seen { sandboxes: vec![sandbox()], containers: vec![container("a", 0, State::Running, 0)] };
        let i = Inputs { seen: &seen, health: &HealthMap::new(), now: S, withdrawn: false };
        assert_eq!(plan(&p, &mut Backoff::default(), &i), Plan::default());
    }

    #[test]
    fn a_dead_sandbox_is_replaced_and_its_network_given_back() {
        let p = pod(json!({"containers": [{"name": "a"}]}));
        let dead = SandboxSeen { ready: false, ..sandbox() };
        let seen = Seen { sandboxes: vec![dead], containers: vec![container("a", 0, State::Exited, 137)] };
        let i = Inputs { seen: &seen, health: &HealthMap::new(), now: 9 * S, withdrawn: true };
        assert_eq!(
            plan(&p, &mut Backoff::default(), &i).actions,
            [Action::StopSandbox { id: "s0".into() }, Action::CreateSandbox { attempt: 1 }]
        );
    }

    #[test]
    fn a_container_that_is_not_live_is_stopped() {
        let p = pod(json!({"containers": [{"name": "a"}]}));
        let a = container("a", 0, State::Running, 0);
        let health = HealthMap::from([(a.id.clone(), Health { started: true, ready: false, live: false })]);
        let seen = Seen { sandboxes: vec![sandbox()], containers: vec![a] };
        let i = Inputs { seen: &seen, health: &health, now: 9 * S, withdrawn: true };
        assert!(matches!(&plan(&p, &mut Backoff::default(), &i).actions[..], [Action::Stop { .. }]));
    }
}
