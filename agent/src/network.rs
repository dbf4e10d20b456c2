//! The node's network as one thing: keeps the data path true to the view, completes pods' networks, serves each meshed
//! pod's sidecar, and puts right every second what others changed.
//!
//! What is right is decided elsewhere (`ebpf::compile`, `netlink::plan`, `relay::scope`, `told`); this is the shell.

mod told;

use crate::{
    attest::Gate,
    blocking::blocking,
    datapath::{Datapath, Extent},
    error::describe,
    handover::{self, Handover, Listening},
    pods::{
        PodNetwork, convert,
        events::{Events, Type},
    },
    relay::Relay,
    socket,
    uplink::Verdict,
    view::View,
};
use k8s_openapi::api::core::v1::Pod;
use sluice_model::{Name, Snapshot};
use sluice_netlink::{Netns, watch::Changes};
use sluice_wire::{DISCOVERY_SOCKET, v1::WorkloadRef};
use std::{
    collections::{HashMap, HashSet},
    io,
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::Duration,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixListener,
    runtime::Handle,
    sync::{Notify, mpsc, watch},
    time::interval,
};
use tokio_stream::{StreamExt, wrappers::UnixListenerStream};
use tokio_util::sync::CancellationToken;
use told::{News, Told};

const REPAIR_EVERY: Duration = Duration::from_secs(1);
const ANNOTATION_SIDECAR: &str = "sluice.dev/sidecar";
/// On pods that serve a gateway's listeners, its name.
const ANNOTATION_GATEWAY: &str = "sluice.dev/gateway";
const ANNOTATION_EXCLUDED: &str = "sluice.dev/exclude-inbound-ports";

pub struct Network {
    node: String,
    datapath: Mutex<Datapath>,
    handover: Arc<Handover>,
    gate: Arc<Gate>,
    relay: Arc<Relay>,
    views: watch::Receiver<View>,
    /// Pods whose sidecars are served, by UID.
    served: Mutex<HashMap<String, Served>>,
    /// Pods whose sidecars cannot be served, by UID, and why.
    unserved: Mutex<HashMap<String, String>>,
    /// What came of the last view: what of it cannot be had.
    last: Mutex<Vec<String>>,
    /// Where repairs are told, once the API is known.
    events: OnceLock<Events>,
    runtime: Handle,
}

/// Notices of the node's links and addresses. Where there are none to be had, repairs find what has changed.
struct Links(Option<AsyncFd<Changes>>);

/// Pods come and go by links too: whatever happens within this time is taken notice of at once.
const SETTLE: Duration = Duration::from_millis(50);

impl Links {
    fn open() -> Self {
        let opened =
            Changes::open().map_err(|e| describe(&e)).and_then(|c| Self::register(c).map_err(|e| e.to_string()));
        if let Err(error) = &opened {
            tracing::warn!(error, "links are looked at once a second instead of when they change");
        }
        Self(opened.ok())
    }

    /// What is said against this function is that a value may give another descriptor each time; the socket's stays what
    /// it is. The one that takes its place is unsafe.
    #[allow(deprecated)]
    fn register(changes: Changes) -> io::Result<AsyncFd<Changes>> {
        AsyncFd::with_interest(changes, Interest::READABLE)
    }

    /// Returns when something has changed; it may be forgotten and called anew at any time.
    async fn changed(&mut self) {
        while let Some(changes) = &mut self.0 {
            let any = match changes.readable_mut().await {
                Ok(mut ready) => {
                    tokio::time::sleep(SETTLE).await;
                    ready.clear_ready();
                    Ok(ready.get_inner_mut().drain())
                }
                Err(error) => Err(error),
            };
            match any {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, "links are looked at once a second from now on");
                    self.0 = None;
                }
            }
        }
        std::future::pending().await
    }
}

/// The node, compared with its view.
#[derive(Clone, Debug, Default)]
pub struct Verified {
    /// Features, each with what is done without it where the kernel lacks it.
    pub kernel: Vec<(&'static str, Option<&'static str>)>,
    pub revision: u64,
    pub differences: Vec<String>,
    /// What of the view cannot be had, or why none of it is in force.
    pub problems: Vec<String>,
    pub errors: Vec<String>,
}

struct Served {
    netns: PathBuf,
    stop: CancellationToken,
}

impl Network {
    pub fn new(
        node: String,
        datapath: Datapath,
        handover: Arc<Handover>,
        gate: Arc<Gate>,
        relay: Arc<Relay>,
        views: watch::Receiver<View>,
    ) -> Arc<Self> {
        Arc::new(Self {
            node,
            datapath: Mutex::new(datapath),
            handover,
            gate,
            relay,
            views,
            served: Mutex::default(),
            unserved: Mutex::default(),
            last: Mutex::default(),
            events: OnceLock::new(),
            runtime: Handle::current(),
        })
    }

    /// Tells of repairs from now on.
    pub fn tell(&self, events: Events) {
        // A second call would change nothing: there is one API.
        let _ = self.events.set(events);
    }

    fn datapath(&self) -> MutexGuard<'_, Datapath> {
        self.datapath.lock().expect("no holder panics")
    }

    /// The programs' counters with their labels. Waits where a view is being brought into force.
    pub async fn counters(self: Arc<Self>) -> Result<Vec<(&'static str, u64)>, String> {
        let read = move || self.datapath().counters().map_err(|e| describe(&e));
        tokio::task::spawn_blocking(read).await.unwrap_or_else(|e| Err(e.to_string()))
    }

    /// Compares the kernel with what is wanted, now, and puts right what differs; what the kernel has, the revision that it
    /// was compared with, what differed and what could not be put right.
    pub async fn verify(self: Arc<Self>) -> Verified {
        let revision = self.views.borrow().snapshot.revision.0;
        let problems = self.last.lock().expect("no holder panics").clone();
        let work = move || {
            let mut verified = Verified { revision, problems, ..Verified::default() };
            let mut datapath = self.datapath();
            match datapath.kernel() {
                Ok(features) => verified.kernel = features,
                Err(e) => verified.errors.push(describe(&e)),
            }
            match datapath.repair(Extent::Whole) {
                Ok(differences) => verified.differences = differences,
                Err(e) => verified.errors.push(describe(&e)),
            }
            verified
        };
        tokio::task::spawn_blocking(work)
            .await
            .unwrap_or_else(|e| Verified { errors: vec![e.to_string()], ..Verified::default() })
    }

    /// For ever: every view into the kernel, then the verdict to control; repairs in between. A view that is not in
    /// force is tried again with each repair. Control may be away: no verdict is waited for.
    pub async fn run(self: Arc<Self>, verdicts: mpsc::Sender<Verdict>) {
        let mut views = self.views.clone();
        let mut repair = interval(REPAIR_EVERY);
        repair.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        views.mark_changed();
        let mut told = Told::default();
        let mut links = Links::open();
        loop {
            tokio::select! {
                biased;
                place = verdicts.reserve(), if told.due() => match (place, told.say()) {
                    (Ok(place), Some(verdict)) => place.send(verdict),
                    _ => return,
                },
                changed = views.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let view = views.borrow_and_update().clone();
                    if !view.epoch.is_empty() {
                        say(told.take(self.clone().apply(view).await));
                    }
                }
                () = links.changed() => self.clone().follow().await,
                _ = repair.tick() => {
                    if self.clone().repair().await || told.refused() {
                        let view = views.borrow().clone();
                        say(told.retried(self.clone().apply(view).await));
                    }
                }
            }
        }
    }

    async fn apply(self: Arc<Self>, view: View) -> Verdict {
        let (epoch, revision) = (view.epoch.clone(), view.snapshot.revision.0);
        let network = self.clone();
        let work = move || {
            let applied = network.datapath().apply(&view.snapshot).map_err(|e| describe(&e));
            network.serve_all(&view.snapshot);
            applied
        };
        let applied = tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(e.to_string()));
        let (result, problems) = match applied {
            Ok(applied) => {
                if applied.closed > 0 {
                    tracing::info!(sockets = applied.closed, "closed connected UDP sockets whose backend has gone");
                }
                for problem in &applied.problems {
                    tracing::warn!(problem, "not everything of the cluster's state is in force");
                }
                (Ok(()), applied.problems)
            }
            Err(error) => (Err(error), Vec::new()),
        };
        let refused = result.as_ref().err().map(|e| format!("the view is not in force: {e}"));
        *self.last.lock().expect("no holder panics") = refused.into_iter().chain(problems.clone()).collect();
        Verdict { epoch, revision, result, problems }
    }

    async fn follow(self: Arc<Self>) {
        let work = move || self.datapath().follow().map_err(|e| describe(&e));
        let outcome = tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(e.to_string()));
        if let Err(error) = outcome {
            tracing::warn!(error, "links and addresses of the node not taken notice of, trying again");
        }
    }

    /// Whether what is told of the view is to be told anew.
    async fn repair(self: Arc<Self>) -> bool {
        let work = move || {
            let (datapath, news) = {
                let mut datapath = self.datapath();
                (datapath.repair(Extent::Some).map_err(|e| describe(&e)), datapath.is_news())
            };
            // After the pods' entries, which the registrations complete.
            let registrations = self.handover.repair().map_err(|e| describe(&e));
            for outcome in [datapath, registrations] {
                match outcome {
                    Ok(repaired) if repaired.is_empty() => {}
                    Ok(repaired) => {
                        tracing::warn!(?repaired, "kernel state was changed by others, put right");
                        let text: Vec<_> = repaired.iter().map(ToString::to_string).collect();
                        let message = format!("Put right what others changed in the kernel: {}", text.join("; "));
                        if let Some(events) = self.events.get() {
                            events.emit_node(&self.node, Type::Warning, "DatapathRepaired", message);
                        }
                    }
                    Err(error) => tracing::warn!(error, "kernel state not repaired"),
                }
            }
            let snapshot = self.views.borrow().snapshot.clone();
            self.serve_all(&snapshot);
            news
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
            tracing::error!(%error, "repair failed");
            false
        })
    }

    /// After a restart, for pods that another agent's life began, and again until it has come about: serves every
    /// meshed pod and every gateway of this node, and no pod that is not here any more.
    fn serve_all(&self, snapshot: &Snapshot) {
        let pods = self.datapath().pods();
        let here: HashMap<String, PathBuf> = match pods {
            Ok(pods) => pods.into_iter().map(|p| (p.uid, p.netns)).collect(),
            // No reason to think that they are gone.
            Err(error) => return tracing::warn!(error = describe(&error), "pods of this node not known"),
        };
        let mut unserved = HashMap::new();
        for w in snapshot.workloads().filter(|w| w.node == self.node && (w.meshed || w.gateway.is_some())) {
            if let Some(netns) = here.get(&w.uid).filter(|netns| !netns.as_os_str().is_empty())
                && let Err(error) = self.serve(&w.name, &w.uid, netns)
            {
                unserved.insert(w.uid.clone(), error);
            }
        }
        self.tell_unserved(unserved);
        // What the runtime took away without telling us.
        let gone: Vec<_> = self.lock().keys().filter(|uid| !here.contains_key(*uid)).cloned().collect();
        gone.iter().for_each(|uid| self.stop(uid));
        // And before this agent began.
        self.relay.retain(|uid| here.contains_key(uid));
    }

    /// Once, not every second.
    fn tell_unserved(&self, now: HashMap<String, String>) {
        let mut told = self.unserved.lock().expect("no holder panics");
        for (uid, error) in now.iter().filter(|(uid, error)| told.get(*uid) != Some(error)) {
            tracing::error!(uid, error, "sidecar not served, trying again every second");
        }
        *told = now;
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Served>> {
        self.served.lock().expect("no holder panics")
    }

    /// Listens inside the pod for its sidecar: discovery, and the hand-over of its listeners. Both or neither.
    fn serve(&self, name: &Name, uid: &str, netns: &PathBuf) -> Result<(), String> {
        let text = |e: &dyn std::error::Error| format!("pod {name}: {}", describe(e));
        // Held all the way: who comes second must find it served, not its sockets taken.
        let mut all = self.lock();
        if all.get(uid).is_some_and(|s| s.netns == *netns) {
            return Ok(());
        }
        self.end(all.remove(uid), uid);
        let ns = Netns::open(netns).map_err(|e| text(&e))?;
        let (discovery, handover) = self.listen(&ns, uid).map_err(|e| text(&e))?;
        let _inside = self.runtime.enter();
        let discovery = UnixListener::from_std(discovery).map_err(|e| text(&e))?;
        let stop = CancellationToken::new();
        self.runtime.spawn(self.discovery(discovery, name, uid, stop.clone()));
        handover.serve(stop.clone());
        all.insert(uid.to_owned(), Served { netns: netns.clone(), stop });
        tracing::info!(pod = %name, uid, "serving the sidecar");
        Ok(())
    }

    /// A pod in which another process stands for the agent is closed: that process could tell the sidecar anything, and
    /// be handed its listeners.
    fn listen(&self, ns: &Netns, uid: &str) -> Result<(std::os::unix::net::UnixListener, Listening), handover::Error> {
        let both = socket::listen(ns, DISCOVERY_SOCKET)
            .map_err(handover::Error::from)
            .and_then(|discovery| Ok((discovery, self.handover.listen(ns, uid)?)));
        if let Err(handover::Error::Socket(error)) = &both
            && error.squatted()
        {
            self.handover.shut(ns, uid)?;
        }
        both
    }

    /// Discovery for the one process that may have it, until `stop`.
    fn discovery(
        &self,
        listener: UnixListener,
        name: &Name,
        uid: &str,
        stop: CancellationToken,
    ) -> impl Future<Output = ()> + use<> {
        let workload = WorkloadRef { namespace: name.namespace.clone(), name: name.name.clone(), uid: uid.to_owned() };
        let (relay, gate, of) = (self.relay.clone(), self.gate.clone(), uid.to_owned());
        let admitted = UnixListenerStream::new(listener).filter(move |accepted| match accepted {
            Ok(stream) => gate
                .admits(&of, stream.as_fd())
                .inspect_err(|error| tracing::warn!(uid = of, %error, "caller is not the pod's sidecar, refused"))
                .is_ok(),
            Err(_) => true,
        });
        async move {
            if let Err(error) = relay.serve_admitted(admitted, workload, stop.cancelled_owned()).await {
                tracing::warn!(%error, "relay to a sidecar ended");
            }
        }
    }

    fn stop(&self, uid: &str) {
        let served = self.lock().remove(uid);
        self.end(served, uid);
    }

    fn end(&self, served: Option<Served>, uid: &str) {
        if let Some(s) = served {
            s.stop.cancel();
            self.relay.forget(uid);
        }
    }

    fn netns(&self, uid: &str) -> Option<PathBuf> {
        let pods = self.datapath().pods().ok()?;
        pods.into_iter().find(|p| p.uid == uid && !p.netns.as_os_str().is_empty()).map(|p| p.netns)
    }
}

fn say(news: News) {
    if let Some(error) = news.refused {
        tracing::warn!(error, "view not in force, trying again every second");
    }
    if news.recovered {
        tracing::info!("view in force after all");
    }
    match news.problems {
        Some(none) if none.is_empty() => tracing::info!("the whole view is in force"),
        Some(problems) => tracing::warn!(?problems, "parts of the view cannot be had, the rest is in force"),
        None => {}
    }
}

fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

impl PodNetwork for Network {
    fn attached(&self, pod: &Pod) -> Result<(), String> {
        blocking(|| self.complete(pod))
    }

    fn tcp_socket(&self, uid: &str, to: SocketAddr) -> io::Result<TcpStream> {
        blocking(|| {
            let path = self.netns(uid).ok_or_else(|| io::Error::other("the pod has no network namespace"))?;
            let ns = Netns::open(path).map_err(io::Error::other)?;
            let make = || socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None);
            Ok(TcpStream::from(ns.run(make).map_err(io::Error::other)??))
        })
    }

    fn withdrawn(&self, pod: &Pod) -> bool {
        let name = Name::new(convert::namespace(pod), convert::name(pod));
        let view = self.views.borrow();
        let serving: HashSet<&Name> = view
            .snapshot
            .endpoint_sets()
            .flat_map(|s| &s.endpoints)
            .filter(|e| e.ready)
            .filter_map(|e| e.workload.as_ref())
            .collect();
        !serving.contains(&name)
    }

    fn sidecar(&self, uid: &str, container: &str) {
        self.gate.expect(uid, container);
    }

    fn sidecars(&self, running: HashMap<String, String>) {
        self.gate.listed(running);
    }

    fn sidecar_ended(&self) -> Arc<Notify> {
        self.handover.ended.clone()
    }

    fn gone(&self, uid: &str) {
        self.gate.forget(uid);
        blocking(|| self.stop(uid));
    }
}

impl Network {
    /// See [`PodNetwork::attached`].
    fn complete(&self, pod: &Pod) -> Result<(), String> {
        let uid = convert::uid(pod);
        let netns = self
            .netns(uid)
            .ok_or_else(|| format!("pod {}: the network plugin has no lease for it", convert::name(pod)))?;
        let serve = || self.serve(&Name::new(convert::namespace(pod), convert::name(pod)), uid, &netns);
        if annotation(pod, ANNOTATION_SIDECAR) != Some("injected") {
            // Nothing of a gateway is captured, but it asks as a sidecar does.
            return if annotation(pod, ANNOTATION_GATEWAY).is_some() { serve() } else { Ok(()) };
        }
        let excluded: Vec<u16> = annotation(pod, ANNOTATION_EXCLUDED)
            .into_iter()
            .flat_map(|v| v.split(','))
            .filter_map(|p| p.trim().parse().ok())
            .collect();
        self.datapath().set_pod_mesh(uid, true, &excluded).map_err(|e| e.to_string())?;
        serve()
    }
}
