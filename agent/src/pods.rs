//! Runs the node's pods (stand-alone mode): watches the pods bound to this node and keeps one `worker` per pod.
//!
//! The API says what should be, the runtime what is; neither is trusted to be reachable. While the API is away nothing
//! is removed; pods that the runtime has and a complete list from the API does not are taken down.

pub mod convert;
pub mod cri;
pub mod events;
pub mod logs;
pub mod plan;
mod probe;
mod probes;
pub mod status;
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
use tokio::{sync::mpsc, task::JoinHandle, time::interval};
use worker::{Message, Worker};

/// How often the runtime's list is compared with the last one: a killed container is noticed within this time.
const LOOK_EVERY: Duration = Duration::from_millis(500);

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
    messages: mpsc::UnboundedSender<Message>,
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
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = events.try_next() => match event {
                    Ok(Some(event)) => self.object(event),
                    Ok(None) => return,
                    Err(error) => tracing::warn!(%error, "pods of this node: watch interrupted, trying again"),
                },
                _ = look.tick() => self.look().await,
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
                self.workers
                    .iter()
                    .filter(|(uid, _)| !initial.contains(*uid))
                    .for_each(|(_, w)| w.tell(Message::Removed));
            }
            watcher::Event::Apply(pod) => self.apply(pod),
            watcher::Event::Delete(pod) => {
                if let Some(w) = self.workers.get(convert::uid(&pod)) {
                    w.tell(Message::Removed);
                }
            }
        }
    }

    fn apply(&mut self, pod: Pod) {
        self.workers.retain(|_, w| !w.task.is_finished());
        let uid = convert::uid(&pod).to_owned();
        if let Some(w) = self.workers.get(&uid) {
            return w.tell(Message::Pod(Box::new(pod)));
        }
        let (messages, rx) = mpsc::unbounded_channel();
        let worker = Worker::new(self.deps.clone(), pod);
        self.workers.insert(uid, Running { messages, task: tokio::spawn(worker.run(rx)) });
    }

    /// Wakes the workers whose containers changed, and takes down what belongs to no pod.
    async fn look(&mut self) {
        let listed = match self.deps.cri.list().await {
            Ok(l) => l,
            Err(error) => return tracing::debug!(%error, "runtime not readable"),
        };
        let shown: HashMap<_, _> = listed.iter().map(|(uid, seen)| (uid.clone(), signature(seen))).collect();
        for (uid, w) in &self.workers {
            if shown.get(uid) != self.shown.get(uid) {
                w.tell(Message::Look);
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
    fn tell(&self, m: Message) {
        // A worker that has ended has nothing left to hear.
        let _ = self.messages.send(m);
    }
}

fn signature(seen: &plan::Seen) -> Vec<String> {
    let sandboxes = seen.sandboxes.iter().map(|s| format!("{} {}", s.id, s.ready));
    let mut all: Vec<_> = sandboxes.chain(seen.containers.iter().map(|c| format!("{} {:?}", c.id, c.state))).collect();
    all.sort();
    all
}
