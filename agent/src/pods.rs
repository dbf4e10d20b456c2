//! Runs the node's pods (stand-alone mode): watches the pods bound to this node and keeps one `worker` per pod.
//!
//! The API says what should be, the runtime what is; neither is trusted to be reachable. While the API is away nothing
//! is removed; pods that the runtime has and a complete list from the API does not are taken down.

mod atomic;
pub mod convert;
pub mod cri;
pub mod events;
mod hooks;
pub mod logs;
pub mod plan;
mod probe;
mod probes;
pub mod status;
mod subpath;
pub mod volumes;
mod worker;

use cri::Cri;
use events::Events;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};
use std::{
    collections::{HashMap, HashSet},
    io,
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::interval,
};
use worker::{Told, Worker};

/// How often the runtime's list is compared with the last one: a killed container is noticed within this time.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often, and how many times, it is after a sidecar's stream has ended: the runtime takes a moment to notice that it does not
/// run any more, and meanwhile the pod's connections wait.
const LOOK_AGAIN: (Duration, u32) = (Duration::from_millis(50), 10);
/// How often the sizes of logs are looked at (kubelet's containerLogMonitorInterval).
const ROTATE_EVERY: Duration = Duration::from_secs(10);
/// Name of the injected sidecar's container.
const SIDECAR: &str = "sluice-proxy";

/// The node's network as pods need it; implemented over the data path.
pub trait PodNetwork: Send + Sync {
    /// The pod's sandbox has its network: completes it (mesh flags, sidecar sockets) before the first container runs.
    /// Called again before every start; must be cheap when there is nothing to do.
    fn attached(&self, pod: &Pod) -> Result<(), String>;
    /// An unconnected TCP socket of the family of `to` that belongs to the pod's network namespace.
    fn tcp_socket(&self, uid: &str, to: SocketAddr) -> io::Result<TcpStream>;
    /// No service of this node's view sends new traffic to the pod.
    fn withdrawn(&self, pod: &Pod) -> bool;
    /// The runtime's id of the container that is the pod's sidecar: from before it runs, and again whenever it is seen.
    fn sidecar(&self, uid: &str, container: &str);
    /// All sidecars that the runtime has, ids of containers by pod UID: without any word of the API.
    fn sidecars(&self, running: HashMap<String, String>);
    /// Told each time that a sidecar has ended.
    fn sidecar_ended(&self) -> Arc<Notify>;
    /// The pod is gone from the node.
    fn gone(&self, uid: &str);
}

/// What all workers share.
pub struct Deps {
    pub client: Client,
    pub cri: Cri,
    pub events: Events,
    pub dirs: volumes::Dirs,
    pub node: convert::Node,
    pub network: Arc<dyn PodNetwork>,
}

struct Running {
    /// The latest of everything: a busy worker misses what was superseded, never what is.
    told: watch::Sender<Told>,
    task: JoinHandle<()>,
}

pub struct Manager {
    deps: Arc<Deps>,
    workers: HashMap<String, Running>,
    /// What the runtime showed last, by pod UID: container and sandbox ids with their states.
    shown: HashMap<String, Vec<String>>,
    /// The API has listed this node's pods completely at least once.
    synced: bool,
    initial: HashSet<String>,
}

impl Manager {
    pub fn new(deps: Arc<Deps>) -> Self {
        Self { deps, workers: HashMap::new(), shown: HashMap::new(), synced: false, initial: HashSet::new() }
    }

    /// For ever; dropping the future stops looking after the pods but leaves them running.
    pub async fn run(mut self) {
        let pods: Api<Pod> = Api::all(self.deps.client.clone());
        let config = watcher::Config::default().fields(&format!("spec.nodeName={}", self.deps.node.name));
        let mut events = watcher(pods, config).default_backoff().into_stream().boxed();
        let sidecar_ended = self.deps.network.sidecar_ended();
        let mut look = interval(LOOK_EVERY);
        let (mut again, mut hurried) = (0, interval(LOOK_AGAIN.0));
        hurried.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut rotate = interval(ROTATE_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        rotate.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = events.try_next() => match event {
                    Ok(Some(event)) => self.object(event),
                    Ok(None) => return,
                    Err(error) => tracing::warn!(%error, "pods of this node: watch interrupted, trying again"),
                },
                _ = look.tick() => self.look().await,
                () = sidecar_ended.notified() => {
                    again = LOOK_AGAIN.1;
                    hurried.reset();
                }
                _ = hurried.tick(), if again > 0 => {
                    again -= 1;
                    self.look().await;
                }
                _ = rotate.tick() => self.rotate_logs().await,
            }
        }
    }

    fn object(&mut self, event: watcher::Event<Pod>) {
        match event {
            watcher::Event::Init => self.initial.clear(),
            watcher::Event::InitApply(pod) => {
                self.initial.insert(convert::uid(&pod).to_owned());
                self.apply(pod);
            }
            watcher::Event::InitDone => {
                self.synced = true;
                let initial = std::mem::take(&mut self.initial);
                self.workers.iter().filter(|(uid, _)| !initial.contains(*uid)).for_each(|(_, w)| w.removed());
            }
            watcher::Event::Apply(pod) => self.apply(pod),
            watcher::Event::Delete(pod) => {
                if let Some(w) = self.workers.get(convert::uid(&pod)) {
                    w.removed();
                }
            }
        }
    }

    fn apply(&mut self, pod: Pod) {
        self.workers.retain(|_, w| !w.task.is_finished());
        let uid = convert::uid(&pod).to_owned();
        if let Some(w) = self.workers.get(&uid) {
            w.told.send_modify(|t| (t.pod, t.removed) = (Arc::new(pod), false));
            return;
        }
        let pod = Arc::new(pod);
        let worker = Worker::new(self.deps.clone(), pod.clone());
        let (told, hears) = watch::channel(Told { pod, removed: false });
        self.workers.insert(uid, Running { told, task: tokio::spawn(worker.run(hears)) });
    }

    /// Wakes the workers whose containers changed, and takes down what belongs to no pod.
    async fn look(&mut self) {
        let listed = match self.deps.cri.list().await {
            Ok(l) => l,
            Err(error) => return tracing::debug!(%error, "runtime not readable"),
        };
        self.deps.network.sidecars(sidecars(&listed));
        let shown: HashMap<_, _> = listed.iter().map(|(uid, seen)| (uid.clone(), signature(seen))).collect();
        for (uid, w) in &self.workers {
            if shown.get(uid) != self.shown.get(uid) {
                w.told.send_modify(|_| {});
            }
        }
        self.shown = shown;
        self.workers.retain(|_, w| !w.task.is_finished());
        if self.synced {
            for (uid, seen) in listed.iter().filter(|(uid, _)| !self.workers.contains_key(*uid)) {
                self.take_down(uid, seen).await;
            }
        }
    }

    async fn rotate_logs(&self) {
        let Ok(listed) = self.deps.cri.list().await else { return };
        for (uid, seen) in &listed {
            let Some(folder) = logs::folders_of(&self.deps.dirs.logs, uid).into_iter().next() else { continue };
            for c in &seen.containers {
                let folder = folder.join(&c.name);
                // One that crashes again and again may never be seen running.
                let pruned = logs::prune(&folder, c.attempt).map(|()| c.state == plan::State::Running);
                let rotated = pruned.and_then(|runs| Ok(runs && logs::rotate(&folder, c.attempt)?));
                let done = match rotated {
                    Ok(true) => self.deps.cri.reopen_log(&c.id).await.map_err(|e| e.to_string()),
                    Ok(false) => Ok(()),
                    // Created, and has written nothing yet.
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
                    Err(e) => Err(e.to_string()),
                };
                if let Err(error) = done {
                    tracing::warn!(uid, container = c.name, error, "log not rotated, trying again");
                }
            }
        }
    }

    async fn take_down(&self, uid: &str, seen: &plan::Seen) {
        for s in &seen.sandboxes {
            tracing::info!(uid, sandbox = s.id, "taking down a sandbox whose pod is gone");
            let stopped = self.deps.cri.stop_sandbox(&s.id).await;
            if let Err(error) = stopped.and(self.deps.cri.remove_sandbox(&s.id).await) {
                tracing::warn!(uid, sandbox = s.id, %error, "sandbox not removed, trying again");
            }
        }
        self.deps.network.gone(uid);
        let _ = self.deps.dirs.tear_down(uid);
    }
}

impl Running {
    fn removed(&self) {
        self.told.send_modify(|t| t.removed = true);
    }
}

/// The sidecars that run, or are about to, each in its pod's sandbox in use.
fn sidecars(listed: &HashMap<String, plan::Seen>) -> HashMap<String, String> {
    let lives = |c: &&plan::ContainerSeen| matches!(c.state, plan::State::Created | plan::State::Running);
    let of = |seen: &plan::Seen| {
        seen.sandbox()?;
        seen.container(SIDECAR).filter(lives).map(|c| c.id.clone())
    };
    listed.iter().filter_map(|(uid, seen)| Some((uid.clone(), of(seen)?))).collect()
}

fn signature(seen: &plan::Seen) -> Vec<String> {
    let sandboxes = seen.sandboxes.iter().map(|s| format!("{} {}", s.id, s.ready));
    let mut all: Vec<_> = sandboxes.chain(seen.containers.iter().map(|c| format!("{} {:?}", c.id, c.state))).collect();
    all.sort();
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use plan::{ContainerSeen, SandboxSeen, Seen, State};

    fn container(id: &str, name: &str, attempt: u32, state: State) -> ContainerSeen {
        ContainerSeen {
            id: id.into(),
            sandbox: "s".into(),
            name: name.into(),
            attempt,
            state,
            exit_code: 0,
            started: 0,
            finished: 0,
            reason: String::new(),
            image: String::new(),
            image_ref: String::new(),
        }
    }

    #[test]
    fn sidecars_are_the_newest_containers_of_that_name_in_a_sandbox_that_is_ready() {
        let sandbox = |ready| SandboxSeen { id: "s".into(), attempt: 0, ready, created: 0, ips: vec![] };
        let seen = |ready, containers: &[ContainerSeen]| Seen {
            sandboxes: vec![sandbox(ready)],
            containers: containers.to_vec(),
        };
        let (old, new) = (container("old", SIDECAR, 0, State::Exited), container("new", SIDECAR, 1, State::Running));
        let app = container("app", "app", 0, State::Running);
        let listed = HashMap::from([
            ("meshed".to_owned(), seen(true, &[old.clone(), new.clone(), app.clone()])),
            ("plain".to_owned(), seen(true, &[app])),
            ("ended".to_owned(), seen(true, &[old])),
            ("no network".to_owned(), seen(false, &[new])),
        ]);
        assert_eq!(sidecars(&listed), HashMap::from([("meshed".to_owned(), "new".to_owned())]));
    }
}
