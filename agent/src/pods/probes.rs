//! The probes of one pod's running containers: a task each, started when the container runs (liveness and readiness
//! once it has started), stopped when it ends.

use super::{
    Deps, convert,
    plan::{ContainerSeen, Health, HealthMap, Seen, State},
    probe::{Tally, Target, ask, initial_delay, period},
};
use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};
use tokio::{sync::Notify, task::JoinHandle, time::sleep};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Startup,
    Liveness,
    Readiness,
}

#[derive(Default)]
struct Shared {
    health: Mutex<HealthMap>,
    failures: Mutex<Vec<String>>,
    changed: Notify,
}

impl Shared {
    fn set(&self, id: &str, change: impl FnOnce(&mut Health)) {
        if let Some(h) = self.health.lock().expect("no holder panics").get_mut(id) {
            change(h);
        }
        self.changed.notify_one();
    }
}

pub struct Probes {
    shared: Arc<Shared>,
    tasks: HashMap<(String, Kind), JoinHandle<()>>,
    /// Containers that were ready before this agent started: they stay so until a probe says otherwise.
    ready_before: Vec<String>,
}

impl Probes {
    pub fn new(pod: &Pod) -> Self {
        let statuses = pod
            .status
            .iter()
            .flat_map(|s| s.container_statuses.iter().flatten().chain(s.init_container_statuses.iter().flatten()));
        let ready_before = statuses.filter(|s| s.ready).filter_map(|s| s.container_id.clone()).collect();
        Self { shared: Arc::default(), tasks: HashMap::new(), ready_before }
    }

    pub fn health(&self) -> HealthMap {
        self.shared.health.lock().expect("no holder panics").clone()
    }

    pub async fn changed(&self) {
        self.shared.changed.notified().await;
    }

    /// What failed since the last call, for events.
    pub fn take_failures(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.failures.lock().expect("no holder panics"))
    }

    pub fn stop_all(&mut self) {
        self.tasks.drain().for_each(|(_, t)| t.abort());
    }

    /// Starts and stops probe tasks so that they fit what runs.
    pub fn follow(&mut self, pod: &Pod, seen: &Seen, deps: &Arc<Deps>) {
        let running = |id: &str| seen.containers.iter().any(|c| c.id == id && c.state == State::Running);
        self.tasks.retain(|(id, _), t| {
            let keep = running(id);
            if !keep {
                t.abort();
            }
            keep
        });
        self.shared.health.lock().expect("no holder panics").retain(|id, _| running(id));
        let Some(spec) = &pod.spec else { return };
        if pod.metadata.deletion_timestamp.is_some() {
            return self.stop_all();
        }
        for c in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
            if let Some(x) = seen.container(&c.name).filter(|x| x.state == State::Running) {
                self.follow_container(pod, c, x, seen, deps);
            }
        }
    }

    fn follow_container(&mut self, pod: &Pod, c: &Container, x: &ContainerSeen, seen: &Seen, deps: &Arc<Deps>) {
        let probes = [
            (Kind::Startup, &c.startup_probe),
            (Kind::Liveness, &c.liveness_probe),
            (Kind::Readiness, &c.readiness_probe),
        ];
        if probes.iter().all(|(_, p)| p.is_none()) {
            return;
        }
        let before = self.ready_before.contains(&super::status::container_id(&x.id));
        let first = Health {
            started: c.startup_probe.is_none() || before,
            ready: before || (c.readiness_probe.is_none() && c.startup_probe.is_none()),
            live: true,
        };
        let health = *self.shared.health.lock().expect("no holder panics").entry(x.id.clone()).or_insert(first);
        let Some(target) = target(pod, c, &x.id, seen, deps) else { return };
        for (kind, p) in probes {
            let Some(p) = p else { continue };
            let wanted = (kind == Kind::Startup) != health.started;
            let key = (x.id.clone(), kind);
            if !wanted || self.tasks.contains_key(&key) {
                continue;
            }
            let has_readiness = c.readiness_probe.is_some();
            let task =
                watch(kind, p.clone(), c.name.clone(), target.clone(), self.shared.clone(), health, has_readiness);
            self.tasks.insert(key, tokio::spawn(task));
        }
    }
}

/// How a container that runs is asked.
pub fn target(pod: &Pod, c: &Container, id: &str, seen: &Seen, deps: &Deps) -> Option<Target> {
    let host_network = pod.spec.as_ref()?.host_network == Some(true);
    let (ip, uid) = if host_network {
        (*deps.node.host_ips.first()?, None)
    } else {
        (*seen.sandbox()?.ips.first()?, Some(convert::uid(pod).to_owned()))
    };
    let named = c.ports.iter().flatten().filter_map(|p| Some((p.name.clone()?, u16::try_from(p.container_port).ok()?)));
    Some(Target {
        container: id.to_owned(),
        ip,
        pod: uid,
        network: deps.network.clone(),
        ports: named.collect(),
        cri: deps.cri.clone(),
    })
}

/// Asks for ever; the task ends with its container, a startup probe when it has passed.
async fn watch(
    kind: Kind,
    p: Probe,
    name: String,
    target: Target,
    shared: Arc<Shared>,
    first: Health,
    has_readiness: bool,
) {
    sleep(initial_delay(&p)).await;
    let passing = match kind {
        Kind::Startup => false,
        Kind::Liveness => true,
        Kind::Readiness => first.ready,
    };
    let mut tally = Tally::new(&p, passing);
    let mut fails = 0u32;
    loop {
        let answer = ask(&p, &target).await;
        if let Err(why) = &answer {
            shared.failures.lock().expect("no holder panics").push(format!("{kind:?} probe failed: {name}: {why}"));
            shared.changed.notify_one();
        }
        let changed = tally.count(answer.is_ok());
        fails = if answer.is_ok() { 0 } else { fails + 1 };
        match kind {
            Kind::Startup if tally.passing => {
                return shared.set(&target.container, |h| {
                    h.started = true;
                    h.ready = h.ready || !has_readiness;
                });
            }
            Kind::Startup if fails >= u32::try_from(p.failure_threshold.unwrap_or(3)).unwrap_or(3).max(1) => {
                shared.set(&target.container, |h| h.live = false);
            }
            Kind::Liveness if changed => shared.set(&target.container, |h| h.live = tally.passing),
            Kind::Readiness if changed => shared.set(&target.container, |h| h.ready = tally.passing),
            _ => {}
        }
        sleep(period(&p)).await;
    }
}
