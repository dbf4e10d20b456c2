//! A running sidecar: its threads, how they are started and in which order they end.

use crate::{
    admin,
    config::Config,
    control::{self, Registration, Scraper, Source},
    drain::Phase,
    handover,
    limits::Limits,
    listener::{self, Listener, Original},
    metrics::Scrape,
    observe::{self, Exchange, Observer},
    otlp,
    status::Status,
    worker,
};
use anyhow::Context;
use ipnet::IpNet;
use sluice_model::Name;
use sluice_wire::{handover::Role, v1::WorkloadRef};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::OwnedFd,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, watch};

/// How long the predecessor's listeners are asked for.
const TAKE_PATIENCE: Duration = Duration::from_secs(2);
/// Connections that the predecessor left in the backlog wait for this long for what is needed to serve them. Beyond, control is
/// away, and those that need no certificate are served.
const START_PATIENCE: Duration = Duration::from_secs(3);
/// After SIGTERM, idle inbound connections stay for this long (half the drain time at most): peers may be sending on
/// them and have not heard yet that this endpoint is withdrawn.
const IDLE_GRACE: Duration = Duration::from_secs(5);
/// Messages of workers that may wait for the control thread.
const HUB_QUEUE: usize = 1024;

/// How connections get here.
#[derive(Clone, Debug)]
pub enum Listen {
    /// Captured in a pod; the agent at this abstract socket hands them over.
    Captured { handover: String },
    /// At these addresses, for these destinations: without capture.
    At { outbound: Vec<(SocketAddr, SocketAddr)>, inbound: Vec<(SocketAddr, SocketAddr)> },
    /// As a gateway: at these addresses, at the ports that its listeners have at the time.
    Gateway { ips: Vec<IpAddr> },
}

#[derive(Clone, Debug)]
pub struct Settings {
    pub workload: WorkloadRef,
    pub source: Source,
    pub listen: Listen,
    pub workers: usize,
    pub admin: SocketAddr,
    pub drain: Duration,
    /// Addresses of the cluster: nothing is sent there in the clear before it is known what they are.
    pub inside: Arc<[IpNet]>,
    pub observe: observe::Settings,
    pub limits: Limits,
}

/// A sidecar that runs.
pub struct Running {
    phase: watch::Sender<Phase>,
    scraper: Scraper,
    pub status: watch::Receiver<Arc<Status>>,
    threads: Vec<JoinHandle<()>>,
    drain: Duration,
    pub admin: SocketAddr,
    /// Where it listens, in the order of [`Listen::At`]; empty when captured.
    pub outbound: Vec<SocketAddr>,
    pub inbound: Vec<SocketAddr>,
}

/// Where everybody reaches it; of IPv4 alone on a machine without IPv6.
fn listen_admin(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address) {
        Err(_) if address.ip() == Ipv6Addr::UNSPECIFIED => TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())),
        other => other,
    }
}

impl Running {
    /// Starts all threads. Traffic is served from here on; whether all is there, [`Status`] says.
    pub fn start(settings: Settings) -> anyhow::Result<Self> {
        let workers = settings.workers.clamp(1, sluice_wire::handover::MAX_LISTENERS / 4);
        let listening = Listening::open(&settings.listen, workers)?;
        let gateway_ips: Arc<[IpAddr]> = match &settings.listen {
            Listen::Gateway { ips } => ips.as_slice().into(),
            _ => [].into(),
        };
        let admin = listen_admin(settings.admin).with_context(|| format!("listen at {}", settings.admin))?;
        admin.set_nonblocking(true)?;
        let admin_address = admin.local_addr()?;
        let (config, config_seen) = watch::channel(Arc::<Config>::default());
        let (phase, phase_seen) = watch::channel(Phase::Serving);
        let (status, status_seen) = watch::channel(Arc::<Status>::default());
        let (to_hub, from_workers) = mpsc::channel(HUB_QUEUE);
        let workload = Name::new(settings.workload.namespace.clone(), settings.workload.name.clone());
        let (observer, notes) = Observer::new(&settings.observe);
        let mut threads = Vec::new();
        let mut scrapes = Vec::new();
        for (index, listeners) in listening.of_workers.into_iter().enumerate() {
            let (ask, asked) = mpsc::channel(4);
            scrapes.push(ask);
            let start = worker::Start {
                index,
                workload: workload.clone(),
                listeners,
                gateway_ips: gateway_ips.clone(),
                seed: rand::random(),
                config: config_seen.clone(),
                phase: phase_seen.clone(),
                status: status_seen.clone(),
                patience: matches!(settings.listen, Listen::Captured { .. }).then_some(START_PATIENCE),
                scrapes: asked,
                to_hub: to_hub.clone(),
                inside: settings.inside.clone(),
                observer: observer.clone(),
                limits: settings.limits,
            };
            threads.push(thread(&format!("worker-{index}"), move || worker::run(start))?);
        }
        drop(to_hub);
        let scraper = Scraper(scrapes);
        let start = control::Start {
            workload: settings.workload,
            source: settings.source,
            workers,
            registration: listening.registration,
            config,
            from_workers,
            scraper: scraper.clone(),
            status,
        };
        let served = admin::Served {
            status: status_seen.clone(),
            scraper: scraper.clone(),
            config: config_seen,
            observer: observer.clone(),
        };
        let writer = Writer { observer, notes, otlp: settings.observe.otlp, service: workload.to_string() };
        threads.push(thread("control", move || run_control(start, admin, served, writer))?);
        let (outbound, inbound) = (listening.outbound, listening.inbound);
        let drain = settings.drain;
        Ok(Self { phase, scraper, status: status_seen, threads, drain, admin: admin_address, outbound, inbound })
    }

    pub async fn scrape(&self) -> Scrape {
        self.scraper.scrape().await
    }

    /// Finishes what is in flight and ends: when nothing is open any more, or when the time for it is over.
    pub async fn drain(self) {
        let begun = Instant::now();
        self.phase.send_replace(Phase::Closing);
        let idle_until = begun + IDLE_GRACE.min(self.drain / 2);
        self.wait_until_closed(idle_until, |s| s.open_inbound == 0).await;
        self.phase.send_replace(Phase::ClosingIdle);
        self.wait_until_closed(begun + self.drain, |s| s.open_inbound + s.open_outbound == 0).await;
        self.stop();
    }

    async fn wait_until_closed(&self, until: Instant, closed: impl Fn(&Scrape) -> bool) {
        while Instant::now() < until && !closed(&self.scrape().await) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Ends at once.
    pub fn stop(self) {
        self.phase.send_replace(Phase::Stopped);
        for thread in self.threads {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

fn thread(name: &str, run: impl FnOnce() -> io::Result<()> + Send + 'static) -> anyhow::Result<JoinHandle<()>> {
    let label = name.to_owned();
    let body = move || {
        if let Err(error) = run() {
            tracing::error!(%error, thread = label, "thread ended");
        }
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(body).with_context(|| format!("start thread {name}"))
}

/// Writes down what is seen of requests.
struct Writer {
    observer: Arc<Observer>,
    notes: mpsc::Receiver<Exchange>,
    otlp: Option<http::Uri>,
    service: String,
}

/// Spans that may wait for the collector.
const SPAN_QUEUE: usize = 4096;

impl Writer {
    fn spawn(self) {
        let spans = self.otlp.map(|collector| {
            let (spans, queued) = mpsc::channel(SPAN_QUEUE);
            tokio::spawn(otlp::run(collector, self.service, queued));
            spans
        });
        tokio::spawn(observe::write(self.observer, self.notes, spans));
    }
}

fn run_control(start: control::Start, admin: TcpListener, served: admin::Served, writer: Writer) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let admin = tokio::net::TcpListener::from_std(admin)?;
        tokio::spawn(admin::serve(admin, served));
        writer.spawn();
        control::run(start).await;
        Ok(())
    })
}

/// Open listeners, divided among workers.
struct Listening {
    of_workers: Vec<Vec<Listener>>,
    registration: Option<Registration>,
    outbound: Vec<SocketAddr>,
    inbound: Vec<SocketAddr>,
}

impl Listening {
    fn open(listen: &Listen, workers: usize) -> anyhow::Result<Self> {
        match listen {
            Listen::Captured { handover } => Self::captured(handover, workers),
            Listen::At { outbound, inbound } => Self::at(outbound, inbound, workers),
            Listen::Gateway { .. } => Self::at(&[], &[], workers),
        }
    }

    /// The predecessor's listeners where the agent has kept some, new ones for the workers that got none.
    fn captured(handover: &str, workers: usize) -> anyhow::Result<Self> {
        let (stream, taken) = handover::take(handover, TAKE_PATIENCE).map_or((None, Vec::new()), |(s, l)| (Some(s), l));
        let mut all: Vec<(Role, TcpListener)> = taken.into_iter().map(|(r, fd)| (r, TcpListener::from(fd))).collect();
        let served = all.iter().filter(|(r, _)| *r == Role::Outbound4).count();
        tracing::info!(taken = all.len(), "listeners of the predecessor");
        for _ in served..workers {
            all.extend(listener::listen_all().context("listen for captured connections")?);
        }
        let mut of_workers: Vec<Vec<Listener>> = (0..workers).map(|_| Vec::new()).collect();
        let mut registered: Vec<(Role, OwnedFd)> = Vec::new();
        let mut next = [0usize; 4];
        for (role, socket) in all {
            socket.set_nonblocking(true)?;
            registered.push((role, socket.try_clone()?.into()));
            let place = &mut next[role as usize];
            let listener = Listener { socket, outbound: role.outbound(), original: Original::LocalAddress };
            of_workers[*place % workers].push(listener);
            *place += 1;
        }
        let registration = Some(Registration { socket: handover.to_owned(), stream, listeners: registered });
        Ok(Self { of_workers, registration, outbound: Vec::new(), inbound: Vec::new() })
    }

    fn at(
        outbound: &[(SocketAddr, SocketAddr)],
        inbound: &[(SocketAddr, SocketAddr)],
        workers: usize,
    ) -> anyhow::Result<Self> {
        let mut of_workers: Vec<Vec<Listener>> = (0..workers).map(|_| Vec::new()).collect();
        let mut open = |list: &[(SocketAddr, SocketAddr)], outbound| {
            let mut bound = Vec::new();
            for (at, destination) in list {
                let mut address = *at;
                for worker in &mut of_workers {
                    let socket = listener::listen(address).with_context(|| format!("listen at {address}"))?;
                    // Port 0 is chosen once for all workers.
                    address = socket.local_addr()?;
                    worker.push(Listener { socket, outbound, original: Original::Always(*destination) });
                }
                bound.push(address);
            }
            anyhow::Ok(bound)
        };
        let (outbound, inbound) = (open(outbound, true)?, open(inbound, false)?);
        Ok(Self { of_workers, registration: None, outbound, inbound })
    }
}
