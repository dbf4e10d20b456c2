//! A worker: one thread, one runtime, its own listeners, its own tables and connections. Workers share nothing but the
//! immutable [`Config`]; they talk to the hub by messages and never wait for it on the path of a known destination.

use crate::{
    admission::Buckets,
    cluster::{ClusterState, LiveCluster, States},
    config::{Config, Destination, Endpoint},
    drain::Phase,
    gateway,
    hub::FromWorker,
    inbound,
    limits::Limits,
    listener::{self, Listener, Original},
    live::Live,
    memory,
    metrics::{Scrape, Series, SeriesKey, WorkerCounters, add},
    observe::Observer,
    outbound,
    status::Status,
    tls::{Offer, Tls},
    upstream::{Pool, Upstream},
};
use ipnet::IpNet;
use sluice_model::{Identity, Name};
use sluice_traffic::{hash::hash, random::Random};
use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap, HashSet},
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc, oneshot, watch},
    task::AbortHandle,
};
use tokio_rustls::TlsConnector;

/// Most connections of one worker and direction at a time; more wait in the listeners' backlogs. Clients that are silent
/// cannot keep the app from dialling.
const MAX_CONNECTIONS: u64 = 16_384;
/// Series beyond this are forgotten once no table and no request refers to them.
const MAX_SERIES: usize = 4096;
/// Most ports of the app that get a pool; more are served without.
const MAX_INBOUND: usize = 1024;
/// How long a first dial waits for the meaning of its address. After that an address outside the cluster passes through,
/// one inside is refused.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);
/// For how long a destination whose meaning did not come in time is not waited for again.
const UNANSWERED_FOR: Duration = Duration::from_secs(10);
/// Most of those remembered; the others wait each time.
const MAX_UNANSWERED: usize = 4096;
/// Pause before a gateway tries again to listen where it could not.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);
/// How often idle connections are looked at: policies ask for few seconds where the app ends them soon.
const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// How often used destinations are reported, in turns of that.
const REPORT_EVERY: u32 = 10;

/// What a worker is asked by the control thread.
pub enum Ask {
    Scrape(oneshot::Sender<Scrape>),
    Pools(oneshot::Sender<Vec<Pool>>),
}

/// What a worker thread is started with.
pub struct Start {
    pub index: usize,
    pub workload: Name,
    pub listeners: Vec<Listener>,
    /// Where a gateway's listeners are; none: this is no gateway.
    pub gateway_ips: Arc<[IpAddr]>,
    pub seed: u64,
    pub config: watch::Receiver<Arc<Config>>,
    pub phase: watch::Receiver<Phase>,
    pub status: watch::Receiver<Arc<Status>>,
    /// For how long nothing is accepted while there is not all with which it could be served; `None`: not at all.
    pub patience: Option<Duration>,
    pub scrapes: mpsc::Receiver<Ask>,
    pub to_hub: mpsc::Sender<FromWorker>,
    /// Addresses of the cluster.
    pub inside: Arc<[IpNet]>,
    pub observer: Arc<Observer>,
    pub limits: Limits,
}

/// The state of a worker's thread.
pub struct Worker {
    workload: Name,
    live: RefCell<Rc<Live>>,
    live_changed: Notify,
    random: RefCell<Random>,
    pub counters: WorkerCounters,
    series: RefCell<HashMap<SeriesKey, Rc<Series>>>,
    upstreams: RefCell<HashMap<Endpoint, Rc<Upstream>>>,
    clusters: RefCell<States>,
    inbound: RefCell<HashMap<SocketAddr, Rc<LiveCluster>>>,
    /// Of a gateway: where it listens, and by port what accepts there.
    gateway_ips: Arc<[IpAddr]>,
    accepting: RefCell<BTreeMap<u16, Vec<AbortHandle>>>,
    /// Where its clock begins.
    started: Instant,
    /// Connectors per identity and offer, of the certificate now in use.
    connectors: RefCell<HashMap<(Arc<Identity>, Offer), TlsConnector>>,
    /// Open connections per destination; those with none stay until they are reported as used.
    dialled: RefCell<HashMap<SocketAddr, u64>>,
    /// Destinations whose meaning did not come in time, and when that was.
    unanswered: RefCell<HashMap<SocketAddr, Instant>>,
    /// Whether anybody wants to see requests.
    pub observer: Arc<Observer>,
    /// Of the inbound policy's limits.
    pub buckets: Buckets,
    /// Copies for mirrors that are under way.
    pub mirroring: Cell<u32>,
    pub phase: watch::Receiver<Phase>,
    /// The most connections that were open, and that were busy, at a time since the last housekeeping.
    most: Cell<Connections>,
    connection_ended: Notify,
    inside: Arc<[IpNet]>,
    pub limits: Limits,
    to_hub: mpsc::Sender<FromWorker>,
}

/// Runs a worker on this thread until the phase is [`Phase::Stopped`].
pub fn run(start: Start) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default())?;
    runtime.block_on(serve(start))
}

async fn serve(start: Start) -> std::io::Result<()> {
    let Start {
        index,
        workload,
        listeners,
        gateway_ips,
        seed,
        config,
        mut phase,
        status,
        patience,
        scrapes,
        to_hub,
        inside,
        limits,
        observer,
    } = start;
    let worker = Rc::new(Worker {
        workload,
        live: RefCell::new(Rc::new(Live::empty())),
        live_changed: Notify::new(),
        random: RefCell::new(Random::new(seed)),
        counters: WorkerCounters::default(),
        series: RefCell::default(),
        upstreams: RefCell::default(),
        clusters: RefCell::default(),
        inbound: RefCell::default(),
        gateway_ips,
        accepting: RefCell::default(),
        started: Instant::now(),
        connectors: RefCell::default(),
        dialled: RefCell::default(),
        unanswered: RefCell::default(),
        observer,
        buckets: Buckets::default(),
        mirroring: Cell::default(),
        phase: phase.clone(),
        most: Cell::default(),
        connection_ended: Notify::new(),
        inside,
        limits,
        to_hub,
    });
    for listener in listeners {
        let socket = TcpListener::from_std(listener.socket)?;
        let (worker, status) = (worker.clone(), status.clone());
        tokio::task::spawn_local(async move {
            can_serve(&worker, status, patience).await;
            accept(worker, socket, listener.outbound, listener.original).await;
        });
    }
    tokio::task::spawn_local(follow_config(worker.clone(), index, config));
    tokio::task::spawn_local(answer_scrapes(worker.clone(), scrapes));
    tokio::task::spawn_local(housekeeping(worker.clone()));
    // A closed channel means that the process ends, too.
    let _ = phase.wait_for(|p| *p == Phase::Stopped).await;
    Ok(())
}

/// Waits until connections can be served, or must be since the end is near, or no longer than `patience`.
async fn can_serve(worker: &Worker, mut status: watch::Receiver<Arc<Status>>, patience: Option<Duration>) {
    let Some(patience) = patience else { return };
    let mut phase = worker.phase.clone();
    tokio::select! {
        _ = status.wait_for(|s| s.can_serve()) => return,
        _ = phase.wait_for(|p| *p != Phase::Serving) => {}
        () = tokio::time::sleep(patience) => {}
    }
    tracing::warn!(missing = status.borrow().missing().join(", "), "serving what can be served without");
}

async fn accept(worker: Rc<Worker>, listener: TcpListener, outbound: bool, original: Original) {
    loop {
        let (stream, _) = next(&worker, &listener, outbound).await;
        let Ok(original) = original.of(&stream) else { continue };
        let open = Open::new(worker.clone(), outbound);
        // Two tasks and not one with two branches: each connection pays for the size of its own.
        match outbound {
            true => tokio::task::spawn_local(async move { outbound::serve(&open.0, stream, original).await }),
            false => tokio::task::spawn_local(async move { inbound::serve(&open.0, stream, original).await }),
        };
    }
}

/// Accepts a gateway's clients at one of its ports.
async fn accept_clients(worker: Rc<Worker>, listener: TcpListener, port: u16) {
    loop {
        let (stream, client) = next(&worker, &listener, false).await;
        let open = Open::new(worker.clone(), false);
        tokio::task::spawn_local(async move { gateway::serve(&open.0, stream, port, client).await });
    }
}

/// The next connection, as soon as there is room for one.
async fn next(worker: &Worker, listener: &TcpListener, outbound: bool) -> (TcpStream, SocketAddr) {
    loop {
        while worker.open_counter(outbound).get() >= MAX_CONNECTIONS {
            worker.connection_ended.notified().await;
        }
        match listener.accept().await {
            Ok((stream, peer)) => {
                let _ = stream.set_nodelay(true);
                return (stream, peer);
            }
            Err(error) => {
                tracing::warn!(%error, "accept");
                // Out of descriptors, usually: others must end first.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

/// A connection that is open; counted until dropped.
pub struct Open(Rc<Worker>, bool);

impl Open {
    pub fn new(worker: Rc<Worker>, outbound: bool) -> Self {
        add(worker.open_counter(outbound), 1);
        worker.grown();
        Self(worker, outbound)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let open = self.0.open_counter(self.1);
        open.set(open.get() - 1);
        self.0.connection_ended.notify_waiters();
    }
}

/// Connections from apps and to the app; those that are busy hold buffers.
#[derive(Clone, Copy, Debug, Default)]
struct Connections {
    open: u64,
    busy: u64,
}

/// A connection on which nothing happens.
pub struct Idle(Rc<Worker>);

impl Drop for Idle {
    fn drop(&mut self) {
        self.0.counters.idle.set(self.0.counters.idle.get() - 1);
        self.0.grown();
    }
}

/// Puts each new config in force and says so.
async fn follow_config(worker: Rc<Worker>, index: usize, mut config: watch::Receiver<Arc<Config>>) {
    loop {
        let next = config.borrow_and_update().clone();
        let generation = next.generation;
        worker.install(next);
        loop {
            let (message, again) = match worker.listen() {
                Ok(()) => (FromWorker::InForce { worker: index, generation }, None),
                Err(why) => {
                    tracing::warn!(why, "a gateway cannot listen, trying again");
                    (FromWorker::NotInForce { worker: index, generation, why }, Some(LISTEN_AGAIN))
                }
            };
            if worker.to_hub.send(message).await.is_err() {
                return;
            }
            let Some(pause) = again else {
                if config.changed().await.is_err() {
                    return;
                }
                break;
            };
            match tokio::time::timeout(pause, config.changed()).await {
                Ok(Ok(())) => break,
                Ok(Err(_)) => return,
                Err(_) => {}
            }
        }
    }
}

async fn answer_scrapes(worker: Rc<Worker>, mut asked: mpsc::Receiver<Ask>) {
    while let Some(ask) = asked.recv().await {
        // Whoever asked may have gone.
        match ask {
            Ask::Scrape(answer) => {
                let series = worker.series.borrow();
                let totals: BTreeMap<_, _> = series.iter().map(|(k, s)| (k.clone(), s.totals())).collect();
                let _ = answer.send(Scrape::new(&worker.counters, totals));
            }
            Ask::Pools(answer) => {
                let now = worker.now_ms();
                let pools = worker.upstreams.borrow().values().map(|u| u.pool(now)).collect();
                let _ = answer.send(pools);
            }
        }
    }
}

async fn housekeeping(worker: Rc<Worker>) {
    let mut ticks = tokio::time::interval(HOUSEKEEPING);
    for turn in (0..REPORT_EVERY).cycle() {
        ticks.tick().await;
        let now = Instant::now();
        worker.upstreams.borrow().values().for_each(|u| u.reap(now));
        worker.inbound.borrow().values().flat_map(|c| &c.endpoints).for_each(|u| u.reap(now));
        if turn > 0 {
            continue;
        }
        let left = worker.connections();
        let most = worker.most.replace(left);
        if memory::ebbed(most.open, left.open) || memory::ebbed(most.busy, left.busy) {
            tokio::task::spawn_blocking(memory::give_back);
        }
        let used: Vec<SocketAddr> = worker.dialled.borrow().keys().copied().collect();
        worker.dialled.borrow_mut().retain(|_, open| *open > 0);
        worker.unanswered.borrow_mut().retain(|_, since| now - *since < UNANSWERED_FOR);
        if !used.is_empty() {
            // A full queue loses a report of use, which the next one makes good.
            let _ = worker.to_hub.try_send(FromWorker::Used(used));
        }
    }
}

impl Worker {
    pub fn live(&self) -> Rc<Live> {
        self.live.borrow().clone()
    }

    pub fn random(&self) -> u64 {
        self.random.borrow_mut().draw()
    }

    pub fn draining(&self) -> bool {
        *self.phase.borrow() >= Phase::Closing
    }

    pub fn tls(&self) -> Option<Arc<Tls>> {
        self.live.borrow().config.tls.clone()
    }

    fn open_counter(&self, outbound: bool) -> &Cell<u64> {
        if outbound { &self.counters.open_outbound } else { &self.counters.open_inbound }
    }

    fn connections(&self) -> Connections {
        let open = self.counters.open_outbound.get() + self.counters.open_inbound.get();
        Connections { open, busy: open.saturating_sub(self.counters.idle.get()) }
    }

    fn grown(&self) {
        let (most, now) = (self.most.get(), self.connections());
        self.most.set(Connections { open: most.open.max(now.open), busy: most.busy.max(now.busy) });
    }

    /// A connection holds no buffers until this is dropped.
    pub fn idle(self: &Rc<Self>) -> Idle {
        add(&self.counters.idle, 1);
        Idle(self.clone())
    }

    fn install(&self, config: Arc<Config>) {
        let previous = self.live();
        let same_tls = match (&previous.config.tls, &config.tls) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (a, b) => a.is_none() && b.is_none(),
        };
        if !same_tls {
            self.connectors.take();
            self.upstreams.borrow().values().for_each(|u| u.renew());
        }
        // Policies that there still are ask anew.
        self.upstreams.borrow().values().for_each(|u| u.untune());
        let live = Live::build(config, self, &previous);
        let known: HashSet<&Endpoint> = live.config.clusters.iter().flat_map(|c| &c.endpoints).collect();
        self.upstreams.borrow_mut().retain(|endpoint, _| known.contains(endpoint));
        // Those that only the previous tables use go with the next config.
        self.clusters.borrow_mut().retain(|_, state| Rc::strong_count(state) > 1);
        self.forget_series();
        *self.live.borrow_mut() = Rc::new(live);
        self.live_changed.notify_waiters();
    }

    /// Opens what the config's listeners need and is not open, and closes what they need no more; what is open on the
    /// latter goes on. Says what cannot be had.
    fn listen(self: &Rc<Self>) -> Result<(), String> {
        if self.gateway_ips.is_empty() {
            return Ok(());
        }
        let wanted: Vec<u16> = self.live().config.listeners.keys().copied().collect();
        let mut accepting = self.accepting.borrow_mut();
        accepting.retain(|port, tasks| {
            let keep = wanted.contains(port);
            if !keep {
                tasks.iter().for_each(AbortHandle::abort);
            }
            keep
        });
        let mut wrong = Vec::new();
        for port in wanted {
            if accepting.contains_key(&port) {
                continue;
            }
            match self.open(port) {
                Ok(tasks) => drop(accepting.insert(port, tasks)),
                Err(error) => wrong.push(format!("listen at port {port}: {error}")),
            }
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join(", ")) }
    }

    /// At all addresses, or, where the machine lacks a family, at those of the other.
    fn open(self: &Rc<Self>, port: u16) -> std::io::Result<Vec<AbortHandle>> {
        let (mut sockets, mut lacking) = (Vec::new(), None);
        for ip in self.gateway_ips.iter() {
            match listener::listen((*ip, port).into()).and_then(TcpListener::from_std) {
                Ok(socket) => sockets.push(socket),
                Err(error) if matches!(error.kind(), ErrorKind::AddrInUse | ErrorKind::PermissionDenied) => {
                    return Err(error);
                }
                Err(error) => lacking = Some(error),
            }
        }
        match lacking.filter(|_| sockets.is_empty()) {
            Some(error) => Err(error),
            None => {
                let accept =
                    |socket| tokio::task::spawn_local(accept_clients(self.clone(), socket, port)).abort_handle();
                Ok(sockets.into_iter().map(accept).collect())
            }
        }
    }

    fn forget_series(&self) {
        let mut series = self.series.borrow_mut();
        if series.len() > MAX_SERIES {
            series.retain(|_, s| Rc::strong_count(s) > 1);
        }
    }

    /// The endpoint's state, kept from config to config.
    pub fn upstream(&self, endpoint: &Endpoint) -> Rc<Upstream> {
        let mut upstreams = self.upstreams.borrow_mut();
        upstreams.entry(endpoint.clone()).or_insert_with(|| Upstream::new(endpoint.clone())).clone()
    }

    /// What is kept about a backend from config to config.
    pub fn cluster_state(&self, service: &Name, port: u16) -> Rc<ClusterState> {
        self.clusters.borrow_mut().entry((service.clone(), port)).or_default().clone()
    }

    /// The key of the pod that this worker's outbound traffic comes from.
    pub fn source(&self) -> u64 {
        hash(self.workload.to_string().as_bytes(), 0)
    }

    /// Milliseconds since the worker began.
    pub fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    pub fn now_ns(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    pub fn series(&self, key: SeriesKey) -> Rc<Series> {
        self.series.borrow_mut().entry(key).or_default().clone()
    }

    /// Counters of what arrives at the app's `port`.
    pub fn inbound_series(&self, port: u16) -> Rc<Series> {
        self.series(self.inbound_key(port))
    }

    /// What is dialled at `destination`, the target at this place.
    pub fn target_key(&self, destination: SocketAddr, target: usize) -> SeriesKey {
        let direction = crate::metrics::Direction::Outbound;
        let live = self.live.borrow();
        let backend = live.config.targets.get(target).map(|t| t.service.clone()).unwrap_or_default();
        SeriesKey { direction, route: None, backend, port: destination.port() }
    }

    /// What a gateway refuses before it knows where it would go.
    pub fn gateway_key(&self, port: u16) -> SeriesKey {
        let direction = crate::metrics::Direction::Outbound;
        SeriesKey { direction, route: None, backend: self.workload.clone(), port }
    }

    pub fn inbound_key(&self, port: u16) -> SeriesKey {
        let direction = crate::metrics::Direction::Inbound;
        SeriesKey { direction, route: None, backend: self.workload.clone(), port }
    }

    /// The app at `address`, with its idle connections.
    pub fn app(&self, address: SocketAddr) -> Rc<LiveCluster> {
        let mut inbound = self.inbound.borrow_mut();
        if let Some(known) = inbound.get(&address) {
            return known.clone();
        }
        let upstream = Upstream::new(Endpoint { address, identity: None });
        let cluster = Rc::new(LiveCluster::of(upstream));
        if inbound.len() < MAX_INBOUND {
            inbound.insert(address, cluster.clone());
        }
        cluster
    }

    /// How to reach a peer that must prove `identity`; `None` while there is no certificate.
    pub fn tls_connector(&self, identity: &Arc<Identity>, offer: Offer) -> Option<TlsConnector> {
        let tls = self.tls()?;
        let mut connectors = self.connectors.borrow_mut();
        let make = || TlsConnector::from(tls.client_config(identity, offer));
        Some(connectors.entry((identity.clone(), offer)).or_insert_with(make).clone())
    }

    /// Waits until another certificate than that of `tls` is in use.
    pub async fn replaced(&self, tls: &Arc<Tls>) {
        loop {
            let changed = self.live_changed.notified();
            if !self.tls().is_some_and(|now| Arc::ptr_eq(&now, tls)) {
                return;
            }
            changed.await;
        }
    }

    /// What `address` means. Asks the hub when it is dialled for the first time, and waits a bounded time.
    pub async fn resolve(&self, address: SocketAddr) -> Option<Destination> {
        if let Some(known) = self.known(address) {
            return Some(known);
        }
        let lately = |since: &Instant| since.elapsed() < UNANSWERED_FOR;
        if self.unanswered.borrow().get(&address).is_some_and(lately) {
            return None;
        }
        let asked = self.to_hub.send(FromWorker::Dialled(address));
        let answered = async {
            asked.await.ok()?;
            loop {
                let changed = self.live_changed.notified();
                if let Some(known) = self.known(address) {
                    return Some(known);
                }
                changed.await;
            }
        };
        let answer = tokio::time::timeout(RESOLVE_TIMEOUT, answered).await.ok().flatten();
        let mut unanswered = self.unanswered.borrow_mut();
        if answer.is_none() && unanswered.len() < MAX_UNANSWERED {
            unanswered.insert(address, Instant::now());
        }
        answer
    }

    /// An address of the cluster, which may be a service's or a meshed pod's.
    pub fn inside(&self, address: IpAddr) -> bool {
        self.inside.iter().any(|range| range.contains(&address.to_canonical()))
    }

    fn known(&self, address: SocketAddr) -> Option<Destination> {
        self.live.borrow().config.destinations.get(&address).cloned()
    }

    /// A connection to `address` has begun; it counts as use until the answer is dropped.
    pub fn dial(self: &Rc<Self>, address: SocketAddr) -> Dialled {
        *self.dialled.borrow_mut().entry(address).or_default() += 1;
        Dialled(self.clone(), address)
    }
}

/// See [`Worker::dial`].
pub struct Dialled(Rc<Worker>, SocketAddr);

impl Drop for Dialled {
    fn drop(&mut self) {
        if let Some(open) = self.0.dialled.borrow_mut().get_mut(&self.1) {
            *open -= 1;
        }
    }
}
