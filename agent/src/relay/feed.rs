//! One sidecar's stream: what it subscribed to, what it was sent, what it has in force. While an Update is on its way
//! nothing is queued behind it; the next one is made from the latest view (latest wins, memory bounded). PURE.

use super::scope::Scope;
use crate::view::View;
use sluice_model::{Name, Revision, Workload};
use sluice_wire::{
    convert::address_from_wire,
    v1::{self, WorkloadRef, client_message::Kind},
};
use std::{
    collections::{BTreeSet, VecDeque},
    net::SocketAddr,
};

/// Most destinations of one sidecar; more are not answered, and pass through at the sidecar.
const MAX_DESTINATIONS: usize = 20_000;

#[derive(Debug)]
pub struct Feed {
    name: Name,
    uid: String,
    destinations: BTreeSet<SocketAddr>,
    /// The sidecar has said what it uses; before, its part of the view is not known.
    subscribed: bool,
    /// A scope was made of that: from here on it is known how the sidecar stands.
    settled: bool,
    /// Epoch and scope as of the last Update that was queued.
    sent: Option<(String, Scope)>,
    /// Chunks not handed to the stream yet.
    queue: VecDeque<v1::Update>,
    /// The newest revision that needed nothing sent, or whose Update was queued.
    examined: Revision,
    /// What the sidecar has in force.
    acked: Option<(String, Revision)>,
    nack: String,
}

/// How one sidecar stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Standing {
    /// Of which history the revision is.
    pub epoch: String,
    /// Everything of its view up to here is in force.
    pub revision: Revision,
    pub routes: Vec<Name>,
    /// Why it refuses a newer one.
    pub nack: String,
}

impl Feed {
    /// A stream that begins with `hello`.
    pub fn new(workload: &WorkloadRef, hello: &v1::Hello) -> Self {
        let acked = Some((hello.epoch.clone(), Revision(hello.revision))).filter(|(e, _)| !e.is_empty());
        Self {
            name: Name::new(workload.namespace.clone(), workload.name.clone()),
            uid: workload.uid.clone(),
            destinations: BTreeSet::new(),
            subscribed: false,
            settled: false,
            sent: None,
            queue: VecDeque::new(),
            examined: Revision(0),
            acked,
            nack: String::new(),
        }
    }

    /// A message of the sidecar. Metrics are not for the feed.
    pub fn message(&mut self, kind: Kind) {
        match kind {
            Kind::Subscribe(s) => self.subscribe(s),
            Kind::Ack(a) => {
                self.acked = Some((a.epoch, Revision(a.revision)));
                self.nack.clear();
            }
            Kind::Nack(n) => self.nack = n.reason,
            Kind::Hello(_) | Kind::Holders(_) | Kind::Metrics(_) => {}
        }
    }

    fn subscribe(&mut self, s: v1::Subscribe) {
        self.subscribed = true;
        let parse = |d: &v1::Destination| {
            Some(SocketAddr::new(address_from_wire(&d.address).ok()?, u16::try_from(d.port).ok()?))
        };
        for d in s.remove.iter().filter_map(parse) {
            self.destinations.remove(&d);
        }
        for d in s.add.iter().filter_map(parse) {
            if self.destinations.len() < MAX_DESTINATIONS {
                self.destinations.insert(d);
            }
        }
    }

    /// Queues what `view` changes for this sidecar, unless an Update is still on its way.
    pub fn refresh(&mut self, view: &View) {
        // Without its own workload a sidecar would not know its policy, and must not seem ready.
        let own = view.snapshot.workload(&self.name).filter(|w| w.uid == self.uid);
        // Nor a gateway without its listeners: they are not on disk, so the agent's first view may lack them, and what the
        // gateway has is better than nothing.
        let whole = |w: &Workload| w.served().is_none_or(|name| view.snapshot.gateway(&name).is_some());
        let known = own.is_some_and(whole);
        if !self.queue.is_empty() || !known {
            return;
        }
        let scope = Scope::of(&view.snapshot, &self.name, &self.destinations);
        let before = self.sent.as_ref().filter(|(epoch, _)| *epoch == view.epoch).map(|(_, s)| s);
        self.queue.extend(scope.updates(before, &view.epoch));
        self.examined = view.snapshot.revision;
        self.settled |= self.subscribed;
        if self.queue.is_empty() {
            return;
        }
        self.sent = Some((view.epoch.clone(), scope));
    }

    pub fn queued(&self) -> bool {
        !self.queue.is_empty()
    }

    pub fn next_update(&mut self) -> Option<v1::Update> {
        self.queue.pop_front()
    }

    /// `None` until the stream has said what the sidecar uses: until then it stands as it stood before the stream.
    pub fn standing(&self) -> Option<Standing> {
        let (epoch, scope) = self.sent.as_ref().filter(|_| self.settled)?;
        let acked = self.acked.as_ref().filter(|(e, _)| e == epoch).map_or(Revision(0), |(_, r)| *r);
        let all = acked >= scope.resources.revision;
        Some(Standing {
            epoch: epoch.clone(),
            revision: if all { self.examined.max(acked) } else { acked },
            routes: scope.routes(),
            nack: self.nack.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::scope::tests::snapshot;
    use super::*;
    use std::sync::Arc;

    fn view(revision: u64, canary: u32) -> View {
        View { epoch: "e".into(), snapshot: Arc::new(snapshot(revision, canary)) }
    }

    fn feed() -> Feed {
        let workload = WorkloadRef { namespace: "shop".into(), name: "client".into(), uid: "uid-client".into() };
        let mut feed = Feed::new(&workload, &v1::Hello::default());
        feed.message(Kind::Subscribe(v1::Subscribe::default()));
        feed
    }

    fn standing(feed: &Feed) -> Standing {
        feed.standing().expect("the sidecar has subscribed")
    }

    fn dial(feed: &mut Feed) {
        let add = vec![v1::Destination { address: vec![10, 96, 0, 1], port: 80 }];
        feed.message(Kind::Subscribe(v1::Subscribe { add, remove: vec![] }));
    }

    fn ack(feed: &mut Feed, revision: u64) {
        feed.message(Kind::Ack(v1::Ack { epoch: "e".into(), revision }));
    }

    fn drain(feed: &mut Feed) -> Vec<v1::Update> {
        std::iter::from_fn(|| feed.next_update()).collect()
    }

    #[test]
    fn an_acked_sidecar_follows_revisions_that_do_not_touch_it() {
        let mut f = feed();
        f.refresh(&view(3, 10));
        assert!(drain(&mut f)[0].full);
        assert_eq!(standing(&f).revision, Revision(0));
        ack(&mut f, 3);
        f.refresh(&view(9, 10));
        assert!(!f.queued());
        assert_eq!(standing(&f).revision, Revision(9));
    }

    #[test]
    fn a_change_counts_when_it_is_acked() {
        let mut f = feed();
        dial(&mut f);
        f.refresh(&view(3, 10));
        drain(&mut f);
        ack(&mut f, 3);
        f.refresh(&view(4, 50));
        assert_eq!(standing(&f).revision, Revision(3));
        assert_eq!((standing(&f).routes.len(), standing(&f).nack.as_str()), (1, ""));
        f.refresh(&view(5, 60));
        assert!(drain(&mut f).iter().all(|u| u.revision == 4), "nothing is queued behind an Update");
        f.refresh(&view(6, 70));
        assert_eq!(drain(&mut f).last().map(|u| u.revision), Some(6), "the latest wins");
        ack(&mut f, 4);
        assert_eq!(standing(&f).revision, Revision(4));
        ack(&mut f, 6);
        assert_eq!(standing(&f).revision, Revision(6));
    }

    #[test]
    fn a_nack_stands_until_something_newer_is_in_force() {
        let mut f = feed();
        f.refresh(&view(3, 10));
        drain(&mut f);
        f.message(Kind::Nack(v1::Nack { epoch: "e".into(), revision: 3, reason: "no".into() }));
        assert_eq!(standing(&f).nack, "no");
        ack(&mut f, 4);
        assert_eq!(standing(&f).nack, "");
    }

    #[test]
    fn another_pod_of_the_same_name_gets_nothing() {
        let workload = WorkloadRef { namespace: "shop".into(), name: "client".into(), uid: "older".into() };
        let mut f = Feed::new(&workload, &v1::Hello::default());
        f.refresh(&view(3, 10));
        assert!(!f.queued());
    }

    #[test]
    fn a_new_epoch_starts_over() {
        let mut f = feed();
        f.refresh(&view(3, 10));
        drain(&mut f);
        ack(&mut f, 3);
        f.refresh(&View { epoch: "other".into(), ..view(1, 10) });
        assert!(drain(&mut f)[0].full);
        assert_eq!(standing(&f).revision, Revision(0));
    }

    #[test]
    fn a_stream_says_nothing_before_its_first_subscription_is_answered() {
        let workload = WorkloadRef { namespace: "shop".into(), name: "client".into(), uid: "uid-client".into() };
        let hello = v1::Hello { epoch: "e".into(), revision: 3, ..v1::Hello::default() };
        let mut f = Feed::new(&workload, &hello);
        f.refresh(&view(4, 10));
        assert_eq!(f.standing(), None, "the routes it uses are not known");
        dial(&mut f);
        f.refresh(&view(4, 10));
        assert_eq!(f.standing(), None, "the first Update is on its way, made of no destination");
        drain(&mut f);
        f.refresh(&view(4, 10));
        assert_eq!((standing(&f).revision, standing(&f).routes.len()), (Revision(3), 1));
    }
}
