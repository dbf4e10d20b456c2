//! Flows and drops of this node, live: the programs are asked for events while somebody follows, and only then.
//!
//! One task reads the ring buffer, gives the events names and hands them to all followers through a channel of fixed
//! length. Nobody waits for a follower: one that is too slow loses records, and is told how many. What an event means is
//! decided in [`render`] and [`names`]; [`kernel`] is the way to the maps, [`serve`] that to operators' programs.

pub mod kernel;
pub mod names;
pub mod render;
pub mod serve;

use crate::{error::describe, view::View};
use bytes::Bytes;
use futures::StreamExt;
use kernel::{Kernel, Session};
use names::Names;
use render::{Context, record, text_of};
use sluice_ebpf::common::{WATCH_DROPS, WATCH_FLOWS};
use sluice_model::Snapshot;
use sluice_wire::flows::{Filter, IDLE_S, Lost, Record, TooSlow};
use std::{
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};
use tokio::{
    sync::{broadcast, watch},
    time::{Instant, interval, sleep, timeout_at},
};

/// Records that wait for the slowest follower, at some hundred bytes each; older ones are lost to it.
pub const CAPACITY: usize = 4096;
/// Most followers at a time; more are refused.
pub const MAX_FOLLOWERS: usize = 32;
/// How old names of other nodes' pods may be, and how soon the kernel's losses are told.
const REFRESH: Duration = Duration::from_secs(1);
/// Before the ring buffer is opened again after it could not be.
const RETRY: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("node {0} has {MAX_FOLLOWERS} followers of its flows already; end one of them")]
    TooMany(String),
    #[error("follow the flows of node {node}: {cause}")]
    Kernel { node: String, cause: String },
    #[error("node {0} is shutting down")]
    Ended(String),
}

/// Who listens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Demand {
    drops: usize,
    flows: usize,
}

impl Demand {
    fn of(&mut self, drops: bool) -> &mut usize {
        if drops { &mut self.drops } else { &mut self.flows }
    }

    fn bits(self) -> u32 {
        match (self.drops, self.flows) {
            (0, 0) => 0,
            (_, 0) => WATCH_DROPS,
            _ => WATCH_DROPS | WATCH_FLOWS,
        }
    }
}

/// What the programs were told last, or why they could not be.
#[derive(Clone, Debug, Default)]
struct InForce {
    bits: u32,
    error: Option<String>,
}

/// A record, and its line as soon as one follower wants it.
struct Told {
    record: Record,
    line: OnceLock<Bytes>,
}

impl Told {
    fn new(record: Record) -> Arc<Self> {
        Arc::new(Self { record, line: OnceLock::new() })
    }

    fn line(&self) -> Bytes {
        self.line.get_or_init(|| line(&self.record)).clone()
    }
}

fn line(record: &Record) -> Bytes {
    let mut text = serde_json::to_vec(record).expect("records have text keys and no failing value");
    text.push(b'\n');
    text.into()
}

/// The node's flows.
pub struct Hub {
    node: String,
    sender: broadcast::Sender<Arc<Told>>,
    demand: watch::Sender<Demand>,
    in_force: watch::Receiver<InForce>,
}

impl Hub {
    /// Starts the one task that reads. Whoever makes the `kernel` has put its watch bits at nothing.
    pub fn start(node: String, kernel: impl Kernel, views: watch::Receiver<View>) -> Arc<Self> {
        let (sender, _) = broadcast::channel(CAPACITY);
        let (demand, demanded) = watch::channel(Demand::default());
        let (told, in_force) = watch::channel(InForce::default());
        let pump = Pump {
            node: node.clone(),
            kernel: Box::new(kernel),
            views,
            sender: sender.clone(),
            demand: demanded,
            in_force: told,
        };
        tokio::spawn(pump.run());
        Arc::new(Self { node, sender, demand, in_force })
    }

    /// Follows from now on: every event that the programs make after this has returned.
    pub async fn follow(self: &Arc<Self>, filter: Filter) -> Result<Follower, Error> {
        let room = self.demand.send_if_modified(|d| {
            let room = d.drops + d.flows < MAX_FOLLOWERS;
            *d.of(filter.drops) += usize::from(room);
            room
        });
        if !room {
            return Err(Error::TooMany(self.node.clone()));
        }
        // Dropped on every way out of here, it takes the demand back.
        let follower = Follower {
            receiver: self.sender.subscribe(),
            filter,
            hub: self.clone(),
            // The first line goes at once: who follows sees that the node answers.
            idle_at: Instant::now(),
        };
        let needed = if follower.filter.drops { WATCH_DROPS } else { WATCH_DROPS | WATCH_FLOWS };
        let mut in_force = self.in_force.clone();
        let state = in_force.wait_for(|s| s.error.is_some() || s.bits & needed == needed).await;
        match state.map(|s| s.error.clone()) {
            Ok(None) => Ok(follower),
            Ok(Some(cause)) => Err(Error::Kernel { node: self.node.clone(), cause }),
            Err(_) => Err(Error::Ended(self.node.clone())),
        }
    }
}

/// One who follows; until it is dropped.
pub struct Follower {
    receiver: broadcast::Receiver<Arc<Told>>,
    filter: Filter,
    hub: Arc<Hub>,
    idle_at: Instant,
}

impl Follower {
    /// The next line; `None` when the agent ends.
    pub async fn next_line(&mut self) -> Option<Bytes> {
        loop {
            let line = match timeout_at(self.idle_at, self.receiver.recv()).await {
                Ok(Ok(told)) => self.takes(&told.record).then(|| told.line()),
                Ok(Err(broadcast::error::RecvError::Lagged(count))) => Some(line(&self.lost(count))),
                Ok(Err(broadcast::error::RecvError::Closed)) => return None,
                Err(_) => Some(line(&Record::Idle { time: text_of(SystemTime::now()), node: self.hub.node.clone() })),
            };
            if let Some(line) = line {
                self.idle_at = Instant::now() + Duration::from_secs(IDLE_S);
                return Some(line);
            }
        }
    }

    fn takes(&self, record: &Record) -> bool {
        match record {
            Record::Flow(flow) => self.filter.takes(flow),
            _ => true,
        }
    }

    fn lost(&self, count: u64) -> Record {
        let (time, node) = (text_of(SystemTime::now()), self.hub.node.clone());
        Record::Lost(Lost { time, node, count, by: TooSlow::Follower })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.hub.demand.send_modify(|d| *d.of(self.filter.drops) -= 1);
    }
}

/// The task that reads.
struct Pump {
    node: String,
    kernel: Box<dyn Kernel>,
    views: watch::Receiver<View>,
    sender: broadcast::Sender<Arc<Told>>,
    demand: watch::Receiver<Demand>,
    in_force: watch::Sender<InForce>,
}

/// Why a session ended.
enum End {
    /// Nobody follows any more.
    Unwanted,
    /// The ring buffer is another one now.
    Renewed,
    /// The hub is gone.
    Closed,
}

impl Pump {
    async fn run(mut self) {
        while self.demand.wait_for(|d| d.bits() != 0).await.is_ok() {
            match self.session().await {
                Ok(End::Unwanted) => tracing::info!("nobody follows the node's flows any more, events are off"),
                Ok(End::Renewed) => tracing::info!("the programs' events are renewed, opening them again"),
                Ok(End::Closed) => return,
                Err(error) => {
                    let cause = describe(&error);
                    tracing::warn!(error = cause, "flows cannot be followed, trying again every second");
                    self.fail(cause).await;
                }
            }
        }
    }

    /// Tells who follows and who wants to, and gives time for a remedy.
    async fn fail(&mut self, cause: String) {
        let (time, node) = (text_of(SystemTime::now()), self.node.clone());
        self.tell(Record::Unknown { time, node, text: cause.clone() });
        // It may be what failed; the next try begins with it again.
        let _ = self.kernel.watch(0);
        self.in_force.send_replace(InForce { bits: 0, error: Some(cause) });
        tokio::select! {
            () = sleep(RETRY) => {}
            // Those who were refused have gone: the next one is a new try.
            _ = self.demand.wait_for(|d| d.bits() == 0) => {}
        }
        self.in_force.send_replace(InForce::default());
    }

    /// From the first follower to the last.
    async fn session(&mut self) -> Result<End, kernel::Error> {
        let Session { mut events, local, lost } = self.kernel.open()?;
        let mut lost_before = lost();
        let mut snapshot = self.views.borrow().snapshot.clone();
        let mut names = Names::new(&snapshot);
        let mut booted = self.kernel.booted()?;
        let mut refresh = interval(REFRESH);
        // Those of the programs may be others than this task thinks.
        self.kernel.watch(0)?;
        self.in_force.send_replace(InForce::default());
        self.put()?;
        loop {
            tokio::select! {
                changed = self.demand.changed() => {
                    if changed.is_err() {
                        return Ok(End::Closed);
                    }
                    if self.put()? == 0 {
                        return Ok(End::Unwanted);
                    }
                }
                _ = refresh.tick() => {
                    self.refresh(&mut snapshot, &mut names);
                    booted = self.kernel.booted()?;
                    let count = lost();
                    self.tell_lost(count.saturating_sub(lost_before));
                    lost_before = count;
                }
                event = events.next() => {
                    let Some(event) = event else { return Ok(End::Renewed) };
                    let context = Context { node: &self.node, booted, names: &names, local: local.as_ref() };
                    self.tell(record(event, SystemTime::now(), &context));
                    // A ring buffer that never is empty would leave the thread to nobody else.
                    tokio::task::coop::consume_budget().await;
                }
            }
        }
    }

    /// Asks the programs for what all followers together need. Who comes meanwhile waits at the demand's lock, and so
    /// never takes for in force what is just being turned off.
    fn put(&mut self) -> Result<u32, kernel::Error> {
        let demand = self.demand.borrow_and_update();
        let bits = demand.bits();
        if self.in_force.borrow().bits != bits {
            self.kernel.watch(bits)?;
            self.in_force.send_replace(InForce { bits, error: None });
        }
        Ok(bits)
    }

    fn refresh(&self, snapshot: &mut Arc<Snapshot>, names: &mut Names) {
        let now = self.views.borrow().snapshot.clone();
        if !Arc::ptr_eq(&now, snapshot) {
            *names = Names::new(&now);
            *snapshot = now;
        }
    }

    fn tell_lost(&self, count: u64) {
        if count > 0 {
            let (time, node) = (text_of(SystemTime::now()), self.node.clone());
            self.tell(Record::Lost(Lost { time, node, count, by: TooSlow::Agent }));
        }
    }

    fn tell(&self, record: Record) {
        // Nobody listens: nobody is told.
        let _ = self.sender.send(Told::new(record));
    }
}

impl Drop for Pump {
    /// The agent ends: the programs need not make events that nobody reads. After a crash the next agent says so.
    fn drop(&mut self) {
        if let Err(error) = self.kernel.watch(0) {
            tracing::warn!(error = describe(&error), "events stay on until the agent starts again");
        }
    }
}
