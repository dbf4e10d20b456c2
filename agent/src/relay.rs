//! The node's relay: serves the discovery protocol and signing to the sidecars of this node, each inside its pod's
//! network namespace, from the agent's one view; reports upwards which sidecar has which routes in force and what they
//! count.
//!
//! What a sidecar gets is decided in `scope` and `feed`, what is reported in `holders` and `totals` (all PURE); here
//! and in `server` are the shells. Who a sidecar is has been attested by the caller before.

pub mod feed;
pub mod holders;
mod kept;
pub mod scope;
mod server;
pub mod totals;

use crate::view::View;
use holders::Holders;
pub use kept::Kept;
use sluice_wire::v1::{self, WorkloadRef};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::{
    net::UnixListener,
    sync::{mpsc, watch},
    time::{Duration, Instant},
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::Status;
use totals::Totals;

/// Has signing requests answered; the agent forwards them to control.
#[tonic::async_trait]
pub trait Signer: Send + Sync {
    /// A certificate for the workload, or why not.
    async fn sign(&self, workload: WorkloadRef, csr_pem: String) -> Result<v1::SignResponse, Status>;
}

/// Signs nothing: sidecars stay without mTLS.
pub struct NoSigner;

#[tonic::async_trait]
impl Signer for NoSigner {
    async fn sign(&self, _workload: WorkloadRef, _csr_pem: String) -> Result<v1::SignResponse, Status> {
        Err(Status::unimplemented("this cluster signs no workload certificates"))
    }
}

/// Shared by the sidecars' streams.
pub struct Relay {
    views: watch::Receiver<View>,
    /// Seconds between a sidecar's reports.
    interval: watch::Receiver<u32>,
    signer: Arc<dyn Signer>,
    state: Mutex<State>,
    holders: watch::Sender<v1::Holders>,
    kept: Option<Kept>,
}

struct State {
    holders: Holders,
    /// What the file has; `None` when the last try failed.
    saved: Option<Holders>,
    totals: Totals,
}

impl Relay {
    /// Relays `views`; `holders` is kept true, and begins with what was `kept` by the agent before.
    pub fn new(
        views: watch::Receiver<View>,
        interval: watch::Receiver<u32>,
        holders: watch::Sender<v1::Holders>,
        signer: Arc<dyn Signer>,
        kept: Option<Kept>,
    ) -> Arc<Self> {
        let before = kept.as_ref().map(Kept::load).unwrap_or_default();
        let state = State { holders: before.clone(), saved: Some(before), totals: Totals::new(uuid()) };
        let relay = Arc::new(Self { views, interval, signer, state: Mutex::new(state), holders, kept });
        relay.with_state(|_| {});
        relay
    }

    /// Serves the sidecar of `workload` on `listener` until `until` is ready.
    pub async fn serve(
        self: Arc<Self>,
        listener: UnixListener,
        workload: WorkloadRef,
        until: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        server::serve(self, UnixListenerStream::new(listener), workload, until).await
    }

    /// As [`Self::serve`], over connections that the caller has looked at before.
    pub async fn serve_admitted(
        self: Arc<Self>,
        incoming: impl futures::Stream<Item = std::io::Result<tokio::net::UnixStream>>,
        workload: WorkloadRef,
        until: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        server::serve(self, incoming, workload, until).await
    }

    /// The pod is gone: nothing waits for its acknowledgement any more.
    pub fn forget(&self, uid: &str) {
        self.with_state(|s| {
            s.holders.forget(uid);
            s.totals.forget(uid);
        });
    }

    /// As [`Self::forget`], for all sidecars but those that live.
    pub fn retain(&self, lives: impl Fn(&str) -> bool) {
        let gone: Vec<String> = self.lock().holders.uids().filter(|u| !lives(u)).map(str::to_owned).collect();
        gone.iter().for_each(|uid| self.forget(uid));
    }

    /// What all sidecars have counted, cumulative since this agent's start.
    pub fn metrics(&self) -> v1::Metrics {
        self.lock().totals.report()
    }

    /// Sends the sidecars' counters upwards in the interval that control asks for, and drops what belongs to pods that
    /// are no longer in the view. Ends when nobody takes the reports.
    pub async fn report(self: Arc<Self>, metrics: mpsc::Sender<v1::Metrics>) {
        let (mut views, mut interval) = (self.views.clone(), self.interval.clone());
        let mut last = Instant::now();
        loop {
            let every = Duration::from_secs((*interval.borrow_and_update()).clamp(1, 3600).into());
            tokio::select! {
                () = tokio::time::sleep_until(last + every) => {
                    last = Instant::now();
                    self.save_revisions();
                    if metrics.send(self.metrics()).await.is_err() {
                        return;
                    }
                }
                changed = interval.changed() => if changed.is_err() { return },
                changed = views.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // Not held for longer: who borrows once more while somebody waits to publish waits for himself.
                    let view = views.borrow_and_update().clone();
                    self.forget_gone(&view);
                }
            }
        }
    }

    fn forget_gone(&self, view: &View) {
        let live: std::collections::BTreeSet<&str> = view.snapshot.workloads().map(|w| w.uid.as_str()).collect();
        self.retain(|uid| live.contains(uid));
        // In another epoch, what a sidecar without a stream has in force says nothing any more.
        self.with_state(|_| {});
    }

    /// Changes the state and publishes the holders if that changed them. Which routes are held is on disk before anybody
    /// hears of it, the sidecar included: an agent that is killed now must not have forgotten it.
    fn with_state<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let epoch = self.views.borrow().epoch.clone();
        let mut state = self.lock();
        let result = change(&mut state);
        if state.saved.as_ref().is_some_and(|saved| !saved.same_routes(&state.holders)) {
            self.save(&mut state);
        }
        let list = state.holders.list(&epoch);
        self.holders.send_if_modified(|published| {
            let differs = published.holders != list;
            published.holders = list;
            differs
        });
        result
    }

    /// Revisions on disk may be behind: a sidecar then counts as not having what it has, until it connects again. Also
    /// tries again what could not be saved.
    fn save_revisions(&self) {
        let mut state = self.lock();
        if state.saved.as_ref() != Some(&state.holders) {
            self.save(&mut state);
        }
    }

    fn save(&self, state: &mut State) {
        let Some(kept) = &self.kept else { return };
        state.saved = match kept.save(&state.holders) {
            Ok(()) => Some(state.holders.clone()),
            Err(error) => {
                tracing::warn!(%error, "holders not saved, trying again with the next report");
                None
            }
        };
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Names this agent's counters.
fn uuid() -> String {
    format!("{:016x}", rand::random::<u64>())
}
