//! What the sidecar knows and what it has said about it: the view held, the destinations asked for, the config in
//! force, the acknowledgements owed. PURE: events and `now` go in, things to do come out.

use crate::{
    config::{self, Config},
    gateway,
    held::{Assembly, Complete, Held, destination_to_wire},
    tls::Tls,
};
use sluice_model::{Identity, Name, Revision, Snapshot};
use sluice_traffic::resolve::resolve;
use sluice_wire::v1::{self, client_message::Kind};
use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

/// A destination nobody dialled for this long is given up.
const FORGET_AFTER: Duration = Duration::from_secs(300);
/// Most destinations at a time; beyond it new ones pass through unresolved.
const MAX_DESTINATIONS: usize = 10_000;
/// After a reconnect: how long the old view stays while the new one is not complete.
const RESYNC_TIMEOUT: Duration = Duration::from_secs(5);
/// Most acknowledgements owed; older ones are covered by newer ones.
const MAX_UNACKED: usize = 64;

/// What workers tell the hub.
#[derive(Debug)]
pub enum FromWorker {
    /// The config of this generation is what `worker` uses from now on.
    InForce { worker: usize, generation: u64 },
    /// It cannot be: a gateway cannot listen where it should.
    NotInForce { worker: usize, generation: u64, why: String },
    /// The app dialled something whose meaning is not known.
    Dialled(SocketAddr),
    /// These were in use since the last report.
    Used(Vec<SocketAddr>),
}

/// What the hub wants done.
#[derive(Debug)]
pub enum Todo {
    Publish(Arc<Config>),
    Send(Kind),
}

pub struct Hub {
    workload: v1::WorkloadRef,
    name: Name,
    held: Held,
    /// With a static view there is no stream: all questions are answered from it.
    fixed: Option<Snapshot>,
    assembly: Assembly,
    /// The view of a new stream until it covers what the app uses.
    resync: Option<Resync>,
    /// Dialled, and when last used.
    wanted: BTreeMap<SocketAddr, Instant>,
    tls: Option<Arc<Tls>>,
    config: Arc<Config>,
    in_force: Vec<u64>,
    unacked: VecDeque<(u64, String, Revision)>,
    /// Some view has been held.
    synced: bool,
}

/// A new stream's view in the making.
struct Resync {
    held: Held,
    /// Something came on the stream: before, there is nothing to take over.
    begun: bool,
    until: Instant,
}

impl Hub {
    pub fn new(workload: v1::WorkloadRef, workers: usize) -> Self {
        let name = Name::new(workload.namespace.clone(), workload.name.clone());
        Self {
            workload,
            name,
            held: Held::default(),
            fixed: None,
            assembly: Assembly::default(),
            resync: None,
            wanted: BTreeMap::new(),
            tls: None,
            config: Arc::default(),
            in_force: vec![0; workers],
            unacked: VecDeque::new(),
            synced: false,
        }
    }

    /// A hub that knows one view and never hears of another.
    pub fn fixed(workload: v1::WorkloadRef, workers: usize, snapshot: Snapshot) -> (Self, Vec<Todo>) {
        let mut hub = Self::new(workload, workers);
        hub.held = Held { epoch: "static".into(), snapshot: snapshot.clone(), ..Held::default() };
        hub.fixed = Some(snapshot);
        hub.synced = true;
        let todo = hub.publish();
        (hub, todo)
    }

    /// Another view in the place of the one that it knows; see [`Self::fixed`].
    pub fn replace(&mut self, snapshot: Snapshot) -> Vec<Todo> {
        let wanted = self.wanted.keys();
        let resolutions = wanted.map(|d| (*d, resolve(&snapshot, *d))).collect();
        self.held = Held { epoch: "static".into(), snapshot: snapshot.clone(), resolutions };
        self.fixed = Some(snapshot);
        self.publish()
    }

    pub fn held(&self) -> &Held {
        &self.held
    }

    pub fn config(&self) -> &Arc<Config> {
        &self.config
    }

    /// Who this workload is, once that is known.
    pub fn identity(&self) -> Option<&Identity> {
        self.held.snapshot.workload(&self.name).map(|w| &w.identity)
    }

    /// A view is in force in all workers.
    pub fn in_force(&self) -> bool {
        self.synced && self.in_force.iter().all(|g| *g > 0)
    }

    /// A stream to the agent is open: says who we are, what we hold, and all that the app uses.
    pub fn opened(&mut self, version: &str, now: Instant) -> Vec<Kind> {
        self.assembly = Assembly::default();
        self.unacked.clear();
        self.resync = Some(Resync { held: self.held.clone(), begun: false, until: now + RESYNC_TIMEOUT });
        let hello = v1::Hello {
            version: version.to_owned(),
            features: Vec::new(),
            subscriber: Some(v1::hello::Subscriber::Workload(self.workload.clone())),
            epoch: self.held.epoch.clone(),
            revision: self.held.snapshot.revision.0,
        };
        let add = self.wanted.keys().map(|d| destination_to_wire(*d)).collect();
        vec![Kind::Hello(hello), Kind::Subscribe(v1::Subscribe { add, remove: Vec::new() })]
    }

    /// A chunk of an Update.
    pub fn update(&mut self, chunk: v1::Update, now: Instant) -> Vec<Todo> {
        match self.assembly.chunk(chunk) {
            None => Vec::new(),
            Some(Ok(complete)) => self.complete(complete, now),
            Some(Err(refused)) => vec![Todo::Send(Kind::Nack(v1::Nack {
                epoch: refused.epoch,
                revision: refused.revision.0,
                reason: refused.reason.to_string(),
            }))],
        }
    }

    fn complete(&mut self, update: Complete, now: Instant) -> Vec<Todo> {
        match self.resync.take() {
            None => {
                self.held = self.held.apply(update);
                self.take_view()
            }
            Some(resync) => {
                self.resync = Some(Resync { held: resync.held.apply(update), begun: true, ..resync });
                self.end_resync(now)
            }
        }
    }

    /// Swaps the new stream's view in when it answers all that the old one did: in between, the app must not see
    /// services disappear.
    fn end_resync(&mut self, now: Instant) -> Vec<Todo> {
        let complete = |held: &Held| self.wanted.keys().all(|d| held.resolutions.contains_key(d));
        match self.resync.take() {
            Some(r) if r.begun && (now >= r.until || complete(&r.held)) => {
                self.held = r.held;
                self.take_view()
            }
            unfinished => {
                self.resync = unfinished;
                Vec::new()
            }
        }
    }

    fn take_view(&mut self) -> Vec<Todo> {
        self.synced = true;
        // An answer that crossed the end of its subscription would stay for ever.
        let wanted = &self.wanted;
        self.held.resolutions.retain(|d, _| wanted.contains_key(d));
        let todo = self.publish();
        if self.unacked.len() == MAX_UNACKED {
            self.unacked.pop_front();
        }
        self.unacked.push_back((self.config.generation, self.held.epoch.clone(), self.held.snapshot.revision));
        todo
    }

    fn publish(&mut self) -> Vec<Todo> {
        let generation = self.config.generation + 1;
        let mut next = config::compile(&self.held, &self.name, self.tls.clone(), generation);
        if let Some(gateway) = config::served(&self.held.snapshot, &self.name) {
            gateway::take_over(&mut next.listeners, gateway, &self.config.listeners);
        }
        self.config = Arc::new(next);
        vec![Todo::Publish(self.config.clone())]
    }

    /// A new certificate.
    pub fn certificate(&mut self, tls: Arc<Tls>) -> Vec<Todo> {
        self.tls = Some(tls);
        self.publish()
    }

    pub fn tls(&self) -> Option<&Arc<Tls>> {
        self.tls.as_ref()
    }

    pub fn worker(&mut self, message: FromWorker, now: Instant) -> Vec<Todo> {
        match message {
            FromWorker::InForce { worker, generation } => self.acknowledge(worker, generation),
            FromWorker::NotInForce { generation, why, .. } => {
                let of = self.unacked.iter().rev().find(|(g, ..)| *g <= generation);
                let nack =
                    of.map(|(_, epoch, revision)| v1::Nack { epoch: epoch.clone(), revision: revision.0, reason: why });
                nack.map(|n| Todo::Send(Kind::Nack(n))).into_iter().collect()
            }
            FromWorker::Dialled(destination) => self.dialled(destination, now),
            FromWorker::Used(used) => {
                for destination in used {
                    self.wanted.entry(destination).and_modify(|last| *last = now);
                }
                Vec::new()
            }
        }
    }

    /// Acks the newest revision that all workers use.
    fn acknowledge(&mut self, worker: usize, generation: u64) -> Vec<Todo> {
        if let Some(g) = self.in_force.get_mut(worker) {
            *g = generation;
        }
        let everywhere = self.in_force.iter().copied().min().unwrap_or(0);
        let mut newest = None;
        while self.unacked.front().is_some_and(|(g, ..)| *g <= everywhere) {
            newest = self.unacked.pop_front();
        }
        let ack = newest.map(|(_, epoch, revision)| v1::Ack { epoch, revision: revision.0 });
        ack.map(|a| Todo::Send(Kind::Ack(a))).into_iter().collect()
    }

    fn dialled(&mut self, destination: SocketAddr, now: Instant) -> Vec<Todo> {
        if let Some(snapshot) = &self.fixed {
            self.wanted.insert(destination, now);
            self.held.resolutions.insert(destination, resolve(snapshot, destination));
            return self.publish();
        }
        if self.wanted.len() >= MAX_DESTINATIONS || self.wanted.insert(destination, now).is_some() {
            return Vec::new();
        }
        let add = vec![destination_to_wire(destination)];
        vec![Todo::Send(Kind::Subscribe(v1::Subscribe { add, remove: Vec::new() }))]
    }

    /// Gives up what is not used any more, and ends a resync that takes too long. Call about every second.
    pub fn tick(&mut self, now: Instant) -> Vec<Todo> {
        let mut todo = self.end_resync(now);
        let unused = |last: &Instant| now.saturating_duration_since(*last) > FORGET_AFTER;
        let gone: Vec<SocketAddr> = self.wanted.iter().filter(|(_, last)| unused(last)).map(|(d, _)| *d).collect();
        if gone.is_empty() {
            return todo;
        }
        for destination in &gone {
            self.wanted.remove(destination);
            self.held.forget(destination);
        }
        todo.extend(self.publish());
        let remove = gone.into_iter().map(destination_to_wire).collect();
        todo.push(Todo::Send(Kind::Subscribe(v1::Subscribe { add: Vec::new(), remove })));
        todo
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub() -> Hub {
        let workload = v1::WorkloadRef { namespace: "shop".into(), name: "web-1".into(), uid: "u".into() };
        Hub::new(workload, 2)
    }

    fn update(revision: u64, full: bool, resolved: &[&str]) -> v1::Update {
        let resolution = |d: &&str| v1::Resolution {
            destination: Some(destination_to_wire(d.parse().expect("address"))),
            service: None,
            identity: String::new(),
        };
        let resolutions = resolved.iter().map(resolution).collect();
        v1::Update { epoch: "e".into(), revision, full, resolutions, last: true, ..Default::default() }
    }

    fn published(todo: &[Todo]) -> Option<u64> {
        todo.iter().find_map(|t| match t {
            Todo::Publish(c) => Some(c.generation),
            Todo::Send(_) => None,
        })
    }

    fn sent(todo: Vec<Todo>) -> Vec<Kind> {
        todo.into_iter().filter_map(|t| if let Todo::Send(k) = t { Some(k) } else { None }).collect()
    }

    #[test]
    fn acks_come_when_all_workers_use_it() {
        let (mut hub, now) = (hub(), Instant::now());
        hub.opened("1.0.0", now);
        let generation = published(&hub.update(update(5, true, &[]), now)).expect("published");
        assert!(hub.worker(FromWorker::InForce { worker: 0, generation }, now).is_empty());
        assert!(!hub.in_force());
        let acks = sent(hub.worker(FromWorker::InForce { worker: 1, generation }, now));
        assert!(matches!(&acks[..], [Kind::Ack(a)] if a.revision == 5), "{acks:?}");
        assert!(hub.in_force());
    }

    #[test]
    fn a_skipped_generation_is_covered_by_the_next() {
        let (mut hub, now) = (hub(), Instant::now());
        hub.opened("1.0.0", now);
        hub.update(update(5, true, &[]), now);
        let generation = published(&hub.update(update(6, false, &[]), now)).expect("published");
        hub.worker(FromWorker::InForce { worker: 0, generation }, now);
        let acks = sent(hub.worker(FromWorker::InForce { worker: 1, generation }, now));
        assert!(matches!(&acks[..], [Kind::Ack(a)] if a.revision == 6), "{acks:?}");
    }

    #[test]
    fn a_new_stream_replaces_the_view_only_when_it_is_complete() {
        let (mut hub, now) = (hub(), Instant::now());
        hub.opened("1.0.0", now);
        hub.update(update(1, true, &[]), now);
        let d: SocketAddr = "10.96.0.1:80".parse().expect("address");
        assert_eq!(sent(hub.worker(FromWorker::Dialled(d), now)).len(), 1);
        assert!(sent(hub.worker(FromWorker::Dialled(d), now)).is_empty(), "asked once");
        hub.update(update(2, false, &["10.96.0.1:80"]), now);
        let hello = hub.opened("1.0.0", now);
        assert!(matches!(&hello[1], Kind::Subscribe(s) if s.add.len() == 1));
        assert_eq!(published(&hub.update(update(3, true, &[]), now)), None);
        assert!(hub.held().resolutions.contains_key(&d), "the old view serves");
        assert!(published(&hub.update(update(3, false, &["10.96.0.1:80"]), now)).is_some());
        hub.opened("1.0.0", now);
        assert_eq!(published(&hub.tick(now + RESYNC_TIMEOUT)), None, "a stream that says nothing changes nothing");
        hub.update(update(4, true, &[]), now);
        assert!(published(&hub.tick(now + RESYNC_TIMEOUT)).is_some(), "bounded");
    }

    #[test]
    fn unused_destinations_are_given_up() {
        let (mut hub, now) = (hub(), Instant::now());
        let (a, b): (SocketAddr, SocketAddr) = ("1.1.1.1:1".parse().expect("a"), "1.1.1.1:2".parse().expect("b"));
        hub.worker(FromWorker::Dialled(a), now);
        hub.worker(FromWorker::Dialled(b), now);
        let later = now + FORGET_AFTER + Duration::from_secs(1);
        hub.worker(FromWorker::Used(vec![b]), later);
        let removed = sent(hub.tick(later));
        assert!(matches!(&removed[..], [Kind::Subscribe(s)] if s.remove == [destination_to_wire(a)]), "{removed:?}");
    }

    #[test]
    fn what_cannot_be_listened_for_is_nacked_until_it_can() {
        let (mut hub, now) = (hub(), Instant::now());
        hub.opened("1.0.0", now);
        let generation = published(&hub.update(update(5, true, &[]), now)).expect("published");
        hub.worker(FromWorker::InForce { worker: 0, generation }, now);
        let why = "listen at port 80: in use".to_owned();
        let nacks = sent(hub.worker(FromWorker::NotInForce { worker: 1, generation, why }, now));
        assert!(matches!(&nacks[..], [Kind::Nack(n)] if n.revision == 5 && n.reason.contains("80")), "{nacks:?}");
        let acks = sent(hub.worker(FromWorker::InForce { worker: 1, generation }, now));
        assert!(matches!(&acks[..], [Kind::Ack(a)] if a.revision == 5), "{acks:?}");
    }

    #[test]
    fn a_malformed_update_is_nacked_and_changes_nothing() {
        let (mut hub, now) = (hub(), Instant::now());
        hub.opened("1.0.0", now);
        hub.update(update(1, true, &[]), now);
        let mut bad = update(2, false, &[]);
        bad.changed.push(v1::Resource { version: 1, kind: None });
        let nacks = sent(hub.update(bad, now));
        assert!(matches!(&nacks[..], [Kind::Nack(n)] if n.revision == 2 && !n.reason.is_empty()));
        assert_eq!(hub.held().snapshot.revision, Revision(1));
    }
}
