//! The control thread: everything that is not traffic. It feeds the hub with events and does what the hub wants done;
//! admin server, discovery stream, certificates and handover are its tasks.

use crate::{
    config::Config,
    discovery, handover,
    hub::{FromWorker, Hub, Todo},
    identity,
    metrics::Scrape,
    status::Status,
    tls::Tls,
    upstream::Pool,
    worker::Ask,
};
use sluice_model::{Identity, Snapshot};
use sluice_wire::{
    handover::Role,
    v1::{self, client_message::Kind, server_message},
};
use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot, watch};

const METRICS_INTERVAL: Duration = Duration::from_secs(15);
/// How long a worker may take to answer a scrape; a slower one is left out of it.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(1);

/// Where the state comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// The agent, at this abstract socket.
    Discovery { socket: String },
    /// A view that never changes, with certificates from elsewhere: `None` where there is none yet, or never.
    Static { snapshot: Snapshot, certificate: watch::Receiver<Option<Arc<Tls>>> },
    /// The same with views that change.
    Changing { snapshots: watch::Receiver<Snapshot>, certificate: watch::Receiver<Option<Arc<Tls>>> },
}

/// The listeners to keep registered with the agent.
pub struct Registration {
    pub socket: String,
    pub stream: Option<UnixStream>,
    pub listeners: Vec<(Role, OwnedFd)>,
}

pub struct Start {
    pub workload: v1::WorkloadRef,
    pub source: Source,
    pub workers: usize,
    pub registration: Option<Registration>,
    pub config: watch::Sender<Arc<Config>>,
    pub from_workers: mpsc::Receiver<FromWorker>,
    pub scraper: Scraper,
    pub status: watch::Sender<Arc<Status>>,
}

/// Collects the counters of all workers.
#[derive(Clone)]
pub struct Scraper(pub Vec<mpsc::Sender<Ask>>);

impl Scraper {
    pub async fn scrape(&self) -> Scrape {
        let mut sum = Scrape::default();
        self.ask(Ask::Scrape, |_, scrape| sum.merge(scrape)).await;
        sum
    }

    /// What each worker has of each endpoint.
    pub async fn pools(&self) -> Vec<(usize, Vec<Pool>)> {
        let mut all = Vec::new();
        self.ask(Ask::Pools, |worker, pools| all.push((worker, pools))).await;
        all
    }

    async fn ask<T>(&self, ask: impl Fn(oneshot::Sender<T>) -> Ask, mut take: impl FnMut(usize, T)) {
        for (at, worker) in self.0.iter().enumerate() {
            let (answer, answered) = oneshot::channel();
            if worker.send(ask(answer)).await.is_err() {
                continue;
            }
            if let Ok(Ok(answer)) = tokio::time::timeout(SCRAPE_TIMEOUT, answered).await {
                take(at, answer);
            }
        }
    }
}

/// The state of the control thread's loop.
struct Control {
    hub: Hub,
    config: watch::Sender<Arc<Config>>,
    status: watch::Sender<Arc<Status>>,
    identity: watch::Sender<Option<Identity>>,
    to_agent: Option<mpsc::Sender<v1::ClientMessage>>,
    metrics_every: Duration,
    /// Names this process's counters.
    metrics_epoch: String,
    scraper: Scraper,
    certificate_expected: bool,
}

/// Runs until the workers are gone.
pub async fn run(start: Start) {
    let Start { workload, source, workers, registration, config, mut from_workers, scraper, status } = start;
    let (to_events, mut events) = mpsc::channel(64);
    let (to_certificates, mut certificates) = mpsc::channel(1);
    let (identity, identity_known) = watch::channel(None);
    let (to_views, mut views) = mpsc::channel(1);
    let (hub, todo, certificate_expected) = match source {
        Source::Static { snapshot, certificate } => {
            let expected = certificate.borrow().is_some();
            tokio::spawn(identity::pass_on(certificate, to_certificates.clone()));
            let (hub, todo) = Hub::fixed(workload, workers, snapshot);
            (hub, todo, expected)
        }
        Source::Changing { mut snapshots, certificate } => {
            let expected = certificate.borrow().is_some();
            tokio::spawn(identity::pass_on(certificate, to_certificates.clone()));
            let snapshot = snapshots.borrow_and_update().clone();
            tokio::spawn(pass_on(snapshots, to_views));
            let (hub, todo) = Hub::fixed(workload, workers, snapshot);
            (hub, todo, expected)
        }
        Source::Discovery { socket } => {
            tokio::spawn(discovery::run(socket.clone(), to_events.clone()));
            tokio::spawn(identity::run(socket, workload.clone(), identity_known, to_certificates.clone()));
            (Hub::new(workload, workers), Vec::new(), true)
        }
    };
    let registered = keep_registered(registration);
    let mut control = Control {
        hub,
        config,
        status,
        identity,
        to_agent: None,
        metrics_every: METRICS_INTERVAL,
        metrics_epoch: format!("{:016x}", rand::random::<u64>()),
        scraper,
        certificate_expected,
    };
    control.act(todo);
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    let mut reported = Instant::now();
    loop {
        let todo = tokio::select! {
            message = from_workers.recv() => match message {
                Some(message) => control.hub.worker(message, Instant::now()),
                None => return,
            },
            Some(event) = events.recv() => control.stream(event),
            Some(snapshot) = views.recv() => control.hub.replace(snapshot),
            Some(event) = certificates.recv() => control.certificate(event),
            _ = ticks.tick() => {
                if reported.elapsed() >= control.metrics_every {
                    reported = Instant::now();
                    control.report().await;
                }
                control.hub.tick(Instant::now())
            }
        };
        control.act(todo);
        control.say(*registered.borrow());
    }
}

async fn pass_on(mut snapshots: watch::Receiver<Snapshot>, views: mpsc::Sender<Snapshot>) {
    while snapshots.changed().await.is_ok() {
        let snapshot = snapshots.borrow_and_update().clone();
        if views.send(snapshot).await.is_err() {
            return;
        }
    }
}

/// Whether the agent sends connections here: at once true when nothing is to be registered.
fn keep_registered(registration: Option<Registration>) -> watch::Receiver<bool> {
    let (registered, answer) = watch::channel(registration.is_none());
    if let Some(r) = registration {
        tokio::spawn(handover::keep(r.socket, r.stream, r.listeners, registered));
    }
    answer
}

impl Control {
    fn stream(&mut self, event: discovery::Event) -> Vec<Todo> {
        match event {
            discovery::Event::Opened(to_agent) => {
                self.to_agent = Some(to_agent);
                let hello = self.hub.opened(env!("CARGO_PKG_VERSION"), Instant::now());
                hello.into_iter().map(Todo::Send).collect()
            }
            discovery::Event::Closed => {
                self.to_agent = None;
                Vec::new()
            }
            discovery::Event::Message(server_message::Kind::Update(update)) => self.hub.update(update, Instant::now()),
            discovery::Event::Message(server_message::Kind::MetricsInterval(interval)) => {
                self.metrics_every = Duration::from_secs(interval.seconds.clamp(1, 3600).into());
                Vec::new()
            }
        }
    }

    fn certificate(&mut self, event: identity::Event) -> Vec<Todo> {
        match event {
            identity::Event::Signed(tls) => self.hub.certificate(tls),
            identity::Event::NotOffered => {
                self.certificate_expected = false;
                Vec::new()
            }
        }
    }

    fn act(&mut self, todo: Vec<Todo>) {
        for one in todo {
            match one {
                Todo::Publish(config) => {
                    self.config.send_replace(config);
                }
                Todo::Send(kind) => self.send(kind),
            }
        }
    }

    /// A full queue means a stream that has stalled: it is given up, and the next one starts with everything.
    fn send(&mut self, kind: Kind) {
        let failed = self.to_agent.as_ref().is_some_and(|s| s.try_send(discovery::message(kind)).is_err());
        if failed {
            self.to_agent = None;
        }
    }

    async fn report(&mut self) {
        if self.to_agent.is_some() {
            let metrics = self.scraper.scrape().await.to_wire(&self.metrics_epoch);
            self.send(Kind::Metrics(metrics));
        }
    }

    /// Publishes the status when it differs from the last.
    fn say(&mut self, registered: bool) {
        let identity = self.hub.identity().cloned();
        self.identity.send_if_modified(|i| std::mem::replace(i, identity.clone()) != identity);
        let (in_force, connected) = (self.hub.in_force(), self.to_agent.is_some());
        let certified = self.hub.tls().is_some() || !self.certificate_expected;
        let generation = self.hub.config().generation;
        self.status.send_if_modified(|old| {
            let same = old.in_force == in_force
                && old.registered == registered
                && old.certified == certified
                && old.connected == connected
                && old.generation == generation;
            if !same {
                *old = Arc::new(Status {
                    in_force,
                    registered,
                    certified,
                    connected,
                    identity: identity.as_ref().map(ToString::to_string),
                    certificate_expires_s: self.hub.tls().map(|t| t.not_after_s),
                    generation,
                    held: self.hub.held().clone(),
                });
            }
            !same
        });
    }
}
