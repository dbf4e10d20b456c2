//! The node's network as one thing: keeps the data path true to the view, completes pods' networks, serves each meshed
//! pod's sidecar, and puts right every second what others changed.
//!
//! What is right is decided elsewhere (`ebpf::compile`, `netlink::plan`, `relay::scope`); this is the shell.

use crate::{
    attest::Gate,
    datapath::Datapath,
    handover::Handover,
    pods::{PodNetwork, convert},
    relay::Relay,
    uplink::Verdict,
    view::View,
};
use k8s_openapi::api::core::v1::Pod;
use sluice_model::{Name, Snapshot};
use sluice_netlink::Netns;
use sluice_wire::{DISCOVERY_SOCKET, v1::WorkloadRef};
use std::{
    collections::{HashMap, HashSet},
    io,
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    time::interval,
};
use tokio_stream::{StreamExt, wrappers::UnixListenerStream};
use tokio_util::sync::CancellationToken;

const REPAIR_EVERY: Duration = Duration::from_secs(1);
const ANNOTATION_SIDECAR: &str = "sluice.dev/sidecar";
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
    runtime: Handle,
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
            runtime: Handle::current(),
        })
    }

    fn datapath(&self) -> MutexGuard<'_, Datapath> {
        self.datapath.lock().expect("no holder panics")
    }

    /// For ever: every view into the kernel, then the verdict to control; repairs in between.
    pub async fn run(self: Arc<Self>, verdicts: mpsc::Sender<Verdict>) {
        let mut views = self.views.clone();
        let mut repair = interval(REPAIR_EVERY);
        repair.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        views.mark_changed();
        loop {
            tokio::select! {
                biased;
                changed = views.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let view = views.borrow_and_update().clone();
                    if view.epoch.is_empty() {
                        continue;
                    }
                    let verdict = self.clone().apply(view).await;
                    if verdicts.send(verdict).await.is_err() {
                        return;
                    }
                }
                _ = repair.tick() => self.clone().repair().await,
            }
        }
    }

    async fn apply(self: Arc<Self>, view: View) -> Verdict {
        let (epoch, revision) = (view.epoch.clone(), view.snapshot.revision.0);
        let work = move || {
            let result = self.datapath().apply(&view.snapshot).map(|_| ()).map_err(|e| e.to_string());
            if let Err(error) = &result {
                tracing::warn!(error, revision, "view not in force");
            }
            self.serve_all(&view.snapshot);
            result
        };
        let result = tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(e.to_string()));
        Verdict { epoch, revision, result }
    }

    async fn repair(self: Arc<Self>) {
        let work = move || match self.datapath().repair() {
            Ok(repaired) if !repaired.is_empty() => {
                tracing::warn!(?repaired, "kernel state was changed by others, put right")
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "kernel state not repaired"),
        };
        if let Err(error) = tokio::task::spawn_blocking(work).await {
            tracing::error!(%error, "repair failed");
        }
    }

    /// After a restart, and for pods that another agent's life began: serves every meshed pod of this node.
    fn serve_all(&self, snapshot: &Snapshot) {
        let meshed = snapshot.workloads().filter(|w| w.node == self.node && w.meshed);
        let here: HashMap<String, PathBuf> =
            self.datapath().pods().unwrap_or_default().into_iter().map(|p| (p.uid, p.netns)).collect();
        for w in meshed {
            if let Some(netns) = here.get(&w.uid) {
                let name = w.name.clone();
                if let Err(error) = self.serve(&name, &w.uid, netns) {
                    tracing::warn!(pod = %name, error, "sidecar not served");
                }
            }
        }
        // What the runtime took away without telling us.
        let gone: Vec<_> = self.lock().keys().filter(|uid| !here.contains_key(*uid)).cloned().collect();
        gone.iter().for_each(|uid| self.stop(uid));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Served>> {
        self.served.lock().expect("no holder panics")
    }

    /// Listens inside the pod for its sidecar: discovery, and the hand-over of its listeners.
    fn serve(&self, name: &Name, uid: &str, netns: &PathBuf) -> Result<(), String> {
        if self.lock().get(uid).is_some_and(|s| s.netns == *netns) {
            return Ok(());
        }
        self.stop(uid);
        let text = |e: &dyn std::fmt::Display| format!("pod {name}: {e}");
        let ns = Netns::open(netns).map_err(|e| text(&e))?;
        let listener = sluice_netlink::listen_abstract_in(&ns, DISCOVERY_SOCKET).map_err(|e| text(&e))?;
        listener.set_nonblocking(true).map_err(|e| text(&e))?;
        let _inside = self.runtime.enter();
        let listener = tokio::net::UnixListener::from_std(listener).map_err(|e| text(&e))?;
        let stop = CancellationToken::new();
        let workload = WorkloadRef { namespace: name.namespace.clone(), name: name.name.clone(), uid: uid.to_owned() };
        let (relay, until) = (self.relay.clone(), stop.clone().cancelled_owned());
        let (gate, of) = (self.gate.clone(), uid.to_owned());
        let admitted = UnixListenerStream::new(listener).filter(move |accepted| match accepted {
            Ok(stream) => gate
                .admits(&of, stream.as_fd())
                .inspect_err(|error| tracing::warn!(uid = of, %error, "caller is not the pod's sidecar, refused"))
                .is_ok(),
            Err(_) => true,
        });
        self.runtime.spawn(async move {
            if let Err(error) = relay.serve_admitted(admitted, workload, until).await {
                tracing::warn!(%error, "relay to a sidecar ended");
            }
        });
        self.handover.serve(&ns, uid, stop.clone()).map_err(|e| text(&e))?;
        self.lock().insert(uid.to_owned(), Served { netns: netns.clone(), stop });
        tracing::info!(pod = %name, uid, "serving the sidecar");
        Ok(())
    }

    fn stop(&self, uid: &str) {
        if let Some(s) = self.lock().remove(uid) {
            s.stop.cancel();
            self.relay.forget(uid);
        }
    }

    fn netns(&self, uid: &str) -> Option<PathBuf> {
        self.datapath().pods().ok()?.into_iter().find(|p| p.uid == uid).map(|p| p.netns)
    }
}

fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

impl PodNetwork for Network {
    fn attached(&self, pod: &Pod) -> Result<(), String> {
        let uid = convert::uid(pod);
        let netns = self
            .netns(uid)
            .ok_or_else(|| format!("pod {}: the network plugin has no lease for it", convert::name(pod)))?;
        if annotation(pod, ANNOTATION_SIDECAR) != Some("injected") {
            return Ok(());
        }
        let excluded: Vec<u16> = annotation(pod, ANNOTATION_EXCLUDED)
            .into_iter()
            .flat_map(|v| v.split(','))
            .filter_map(|p| p.trim().parse().ok())
            .collect();
        self.datapath().set_pod_mesh(uid, true, &excluded).map_err(|e| e.to_string())?;
        self.serve(&Name::new(convert::namespace(pod), convert::name(pod)), uid, &netns)
    }

    fn tcp_socket(&self, uid: &str, to: SocketAddr) -> io::Result<TcpStream> {
        let path = self.netns(uid).ok_or_else(|| io::Error::other("the pod has no network namespace"))?;
        let ns = Netns::open(path).map_err(io::Error::other)?;
        let make = || socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None);
        Ok(TcpStream::from(ns.run(make).map_err(io::Error::other)??))
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

    fn gone(&self, uid: &str) {
        self.gate.forget(uid);
        self.stop(uid);
    }
}
