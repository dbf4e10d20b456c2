//! The agent's view of the cluster: what control last sent, whole updates only, also on disk so that a restarted agent
//! serves from it before control answers.

use crate::file;
use sluice_model::{Delta, Kind, Resource, ResourceKey, Revision, Snapshot};
use sluice_wire::{Malformed, convert, v1};
use std::{fs, io, path::PathBuf, sync::Arc};

/// A snapshot and the history it belongs to.
#[derive(Clone, Debug, Default)]
pub struct View {
    pub epoch: String,
    pub snapshot: Arc<Snapshot>,
}

/// Collects the chunks of an update: PURE.
#[derive(Default)]
pub struct Assembly {
    changed: Vec<Arc<Resource>>,
    removed: Vec<ResourceKey>,
    full: bool,
}

impl Assembly {
    /// Takes a chunk; the next view when it was the last. A malformed update leaves nothing behind.
    pub fn take(&mut self, view: &View, u: v1::Update) -> Result<Option<View>, Malformed> {
        let (epoch, revision, last) = (u.epoch.clone(), Revision(u.revision), u.last);
        if let Err(e) = self.collect(u) {
            *self = Self::default();
            return Err(e);
        }
        if !last {
            return Ok(None);
        }
        let done = std::mem::take(self);
        let fresh = done.full || epoch != view.epoch;
        let snapshot = if fresh {
            Snapshot::from_shared(revision, done.changed)
        } else {
            view.snapshot.apply(&Delta { changed: done.changed, removed: done.removed }, revision)
        };
        Ok(Some(View { epoch, snapshot: Arc::new(snapshot) }))
    }

    fn collect(&mut self, u: v1::Update) -> Result<(), Malformed> {
        self.full |= u.full;
        for r in u.changed {
            self.changed.push(Arc::new(convert::resource_from_wire(r)?));
        }
        for k in u.removed {
            self.removed.push(convert::key_from_wire(k)?);
        }
        Ok(())
    }
}

/// The view's file.
pub struct Store {
    path: PathBuf,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct File {
    epoch: String,
    snapshot: Snapshot,
}

/// A view from the text of its file.
pub fn parse(text: &[u8]) -> serde_json::Result<View> {
    let f: File = serde_json::from_slice(text)?;
    Ok(View { epoch: f.epoch, snapshot: Arc::new(f.snapshot) })
}

impl Store {
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// The last saved view; an unreadable file counts as none, and is said.
    pub fn load(&self) -> View {
        let text = match fs::read(&self.path) {
            Ok(t) => t,
            Err(_) => return View::default(),
        };
        match parse(&text) {
            Ok(view) => view,
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "saved view is not readable, starting without");
                View::default()
            }
        }
    }

    /// Whole or not at all; without gateways, whose keys are not for the disk.
    pub fn save(&self, view: &View) -> io::Result<()> {
        let kept = view.snapshot.iter().filter(|r| r.kind() != Kind::Gateway).cloned();
        let snapshot = Snapshot::from_shared(view.snapshot.revision, kept);
        let file = File { epoch: view.epoch.clone(), snapshot };
        file::replace(&self.path, &serde_json::to_vec(&file)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::{Name, Node};

    fn node(name: &str) -> v1::Resource {
        let n =
            Node { name: Name::cluster(name), addresses: vec![], pod_cidrs: vec![], zone: String::new(), ready: true };
        convert::resource_to_wire(&Resource::Node(n), Revision(1))
    }

    fn update(epoch: &str, revision: u64, nodes: &[&str], last: bool) -> v1::Update {
        let changed = nodes.iter().map(|n| node(n)).collect();
        v1::Update { epoch: epoch.into(), revision, changed, last, ..v1::Update::default() }
    }

    #[test]
    fn an_update_takes_effect_whole() {
        let mut a = Assembly::default();
        let start = View::default();
        assert!(a.take(&start, update("e", 5, &["a"], false)).expect("fine").is_none());
        let v = a.take(&start, update("e", 5, &["b"], true)).expect("fine").expect("whole");
        assert_eq!((v.snapshot.len(), v.snapshot.revision), (2, Revision(5)));
        let v = a.take(&v, update("e", 6, &["c"], true)).expect("fine").expect("whole");
        assert_eq!(v.snapshot.len(), 3);
        let v = a.take(&v, update("other", 1, &["d"], true)).expect("fine").expect("whole");
        assert_eq!(v.snapshot.len(), 1, "a new epoch starts afresh");
    }

    #[test]
    fn a_malformed_update_changes_nothing() {
        let mut a = Assembly::default();
        let bad = v1::Update { changed: vec![v1::Resource::default()], ..update("e", 1, &["a"], true) };
        assert!(a.take(&View::default(), bad).is_err());
        let v = a.take(&View::default(), update("e", 2, &["b"], true)).expect("fine").expect("whole");
        assert_eq!(v.snapshot.len(), 1);
    }

    #[test]
    fn a_saved_view_is_loaded_again() {
        let dir = tempfile::tempdir().expect("a folder");
        let s = Store::new(dir.path().join("x/view.json"));
        assert!(s.load().snapshot.is_empty());
        let v = Assembly::default().take(&View::default(), update("e", 2, &["b"], true)).expect("fine").expect("whole");
        s.save(&v).expect("saves");
        assert_eq!((s.load().epoch, s.load().snapshot), (v.epoch, v.snapshot));
    }

    #[test]
    fn a_view_with_a_grpc_route_is_loaded_again_and_keys_are_not_on_disk() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("view.json");
        let name = |n: &str| sluice_model::Name::new("shop", n);
        let route = sluice_model::Route {
            name: name("web/grpc"),
            kind: sluice_model::RouteKind::Grpc,
            parent: name("edge/gateway"),
            parent_port: None,
            created_s: 1,
            generation: 1,
            rules: vec![],
        };
        let certificate =
            sluice_model::Certificate { chain_pem: "chain".into(), key_pem: sluice_model::Secret("hidden".into()) };
        let listener = sluice_model::Listener {
            name: "https".into(),
            port: 443,
            mode: sluice_model::ListenerMode::Https,
            hostname: None,
            certificates: vec![certificate],
            routes: vec![],
        };
        let gateway = sluice_model::Gateway { name: name("edge"), listeners: vec![listener] };
        let both = [Resource::Route(route), Resource::Gateway(gateway)];
        let v = View { epoch: "e".into(), snapshot: Arc::new(Snapshot::new(Revision(3), both)) };
        Store::new(path.clone()).save(&v).expect("saves");
        let loaded = Store::new(path.clone()).load().snapshot;
        assert_eq!((loaded.routes().count(), loaded.gateways().count()), (1, 0));
        assert!(!fs::read_to_string(&path).expect("reads").contains("chain"));
    }
}
