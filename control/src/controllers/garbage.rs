//! Garbage: what is owned goes when all its owners are gone. The graph of owners is PURE and is kept from the one stream
//! of all changes, so that an owner that is not in it does not exist.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::Shared;
use crate::api::kinds::{self, Kind};
use crate::api::registry::{Context, DeleteOptions, Patch};
use crate::api::status::ApiError;
use crate::api::value::{list, name, namespace, text};
use crate::store::{ListQuery, Store, StoreError, WatchItem};

const PREFIX: &str = "/registry/";
const RETRY: Duration = Duration::from_secs(1);
const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";

/// An object as far as ownership goes.
#[derive(Debug, Clone)]
struct Vertex {
    kind: &'static Kind,
    namespace: String,
    name: String,
    owners: Vec<String>,
    deleting: bool,
    /// The finalizer of this kind of deletion that it still has.
    waits: Option<&'static str>,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    /// Delete the object of this uid.
    Delete(String),
    /// Take the owner off its dependents, then let it go.
    Orphan { owner: String, dependents: Vec<String> },
    /// The dependents are gone: take the finalizer off.
    Release { owner: String, finalizer: &'static str },
}

/// Who owns whom.
#[derive(Debug, Default)]
struct Graph {
    vertices: HashMap<String, Vertex>,
    dependents: HashMap<String, HashSet<String>>,
}

impl Graph {
    fn set(&mut self, kind: &'static Kind, object: &Value) -> Vec<Action> {
        let uid = text(object, "metadata.uid").to_owned();
        if uid.is_empty() {
            return Vec::new();
        }
        let before = self.unlink(&uid).map(|old| old.owners).unwrap_or_default();
        let owners = list(object, "metadata.ownerReferences").iter().map(|owner| text(owner, "uid").to_owned());
        let finalizers = list(object, "metadata.finalizers");
        let vertex = Vertex {
            kind,
            namespace: namespace(object).to_owned(),
            name: name(object).to_owned(),
            owners: owners.collect(),
            deleting: object["metadata"].get("deletionTimestamp").is_some(),
            waits: [FOREGROUND, ORPHAN].into_iter().find(|wanted| finalizers.iter().any(|known| known == wanted)),
        };
        for owner in &vertex.owners {
            self.dependents.entry(owner.clone()).or_default().insert(uid.clone());
        }
        self.vertices.insert(uid.clone(), vertex);
        // An owner it no longer has may have waited for just that.
        before.into_iter().chain([uid]).filter_map(|uid| self.look(&uid)).collect()
    }

    fn unlink(&mut self, uid: &str) -> Option<Vertex> {
        let old = self.vertices.remove(uid)?;
        for owner in &old.owners {
            if let Some(dependents) = self.dependents.get_mut(owner) {
                dependents.remove(uid);
                if dependents.is_empty() {
                    self.dependents.remove(owner);
                }
            }
        }
        Some(old)
    }

    fn remove(&mut self, uid: &str) -> Vec<Action> {
        let owners = self.unlink(uid).map(|old| old.owners).unwrap_or_default();
        let dependents: Vec<String> = self.dependents.get(uid).into_iter().flatten().cloned().collect();
        let touched = owners.into_iter().chain(dependents);
        touched.filter_map(|uid| self.look(&uid)).collect()
    }

    /// What is to be done about one object, as things stand.
    fn look(&self, uid: &str) -> Option<Action> {
        let vertex = self.vertices.get(uid)?;
        if vertex.deleting {
            let finalizer = vertex.waits?;
            let dependents: Vec<String> = self.dependents.get(uid).into_iter().flatten().cloned().collect();
            return match (finalizer, dependents.is_empty()) {
                (finalizer, true) => Some(Action::Release { owner: uid.to_owned(), finalizer }),
                (ORPHAN, false) => Some(Action::Orphan { owner: uid.to_owned(), dependents }),
                _ => None,
            };
        }
        let gone = |owner: &String| {
            // An owner that waits for its dependents is as good as gone for them.
            self.vertices.get(owner).is_none_or(|owner| owner.deleting && owner.waits == Some(FOREGROUND))
        };
        (!vertex.owners.is_empty() && vertex.owners.iter().all(gone)).then(|| Action::Delete(uid.to_owned()))
    }

    /// Everything that is to be done.
    fn look_at_everything(&self) -> Vec<Action> {
        self.vertices.keys().filter_map(|uid| self.look(uid)).collect()
    }

    /// Dependents of an owner that has just begun to wait for them.
    fn foreground(&self, uid: &str) -> Vec<Action> {
        let waits = self.vertices.get(uid).is_some_and(|v| v.deleting && v.waits == Some(FOREGROUND));
        let dependents = self.dependents.get(uid).into_iter().flatten().filter(|_| waits);
        dependents.filter_map(|uid| self.look(uid)).collect()
    }
}

/// Runs for ever.
pub(super) async fn run(shared: Shared, store: Arc<dyn Store>) {
    loop {
        if let Err(error) = list_and_watch(&shared, &store).await {
            tracing::warn!(%error, "garbage collector starts over");
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The kind stored under a key; what is owned by nothing and owns nothing is left out.
fn kind_of(key: &str) -> Option<&'static Kind> {
    let mut parts = key.strip_prefix(PREFIX)?.split('/');
    let (group, plural) = (parts.next()?, parts.next()?);
    if matches!(plural, "events" | "leases") {
        return None;
    }
    let group = if group == "core" { "" } else { group };
    kinds::table().kinds.iter().find(|kind| kind.group == group && kind.plural == plural && kind.stored_as.is_none())
}

async fn list_and_watch(shared: &Shared, store: &Arc<dyn Store>) -> Result<(), StoreError> {
    let listing = store.list(ListQuery { prefix: PREFIX.to_owned(), ..ListQuery::default() }).await?;
    let mut graph = Graph::default();
    for item in &listing.items {
        if let (Some(kind), Ok(object)) = (kind_of(&item.key), serde_json::from_slice(&item.value)) {
            drop(graph.set(kind, &object));
        }
    }
    drop(listing.items);
    let mut watch = store.watch(PREFIX, listing.revision).await?;
    let mut actions = graph.look_at_everything();
    loop {
        for action in actions.drain(..) {
            if let Err(error) = act(shared, &graph, &action).await {
                // The stream from here on may say nothing of it again, so everything is looked at once more.
                tracing::warn!(?action, %error, "garbage collection");
                return Ok(());
            }
        }
        let Some(item) = watch.next().await else { return Ok(()) };
        let WatchItem::Event(event) = item? else { continue };
        let Some(kind) = kind_of(&event.key) else { continue };
        actions = match (event.json(), event.previous_json()) {
            (Some(object), old) => {
                let mut actions = Vec::new();
                if let Some(old) = old.filter(|old| old["metadata"]["uid"] != object["metadata"]["uid"]) {
                    actions.extend(graph.remove(text(&old, "metadata.uid")));
                }
                actions.extend(graph.set(kind, &object));
                actions.extend(graph.foreground(text(&object, "metadata.uid")));
                actions
            }
            (None, Some(old)) => graph.remove(text(&old, "metadata.uid")),
            (None, None) => Vec::new(),
        };
    }
}

async fn act(shared: &Shared, graph: &Graph, action: &Action) -> Result<(), ApiError> {
    let registry = shared.client.registry();
    let ctx = Context::internal("garbage-collector");
    let ignore_gone = |result: Result<(), ApiError>| match result {
        Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
        other => other,
    };
    match action {
        Action::Delete(uid) => {
            let Some(vertex) = graph.vertices.get(uid) else { return Ok(()) };
            let options = DeleteOptions { uid: uid.clone(), ..DeleteOptions::default() };
            let at = (vertex.namespace.as_str(), vertex.name.as_str());
            ignore_gone(registry.delete(&ctx, vertex.kind, at, &options).await.map(drop))
        }
        Action::Orphan { owner, dependents } => {
            for vertex in dependents.iter().filter_map(|uid| graph.vertices.get(uid)) {
                // Strategic: the one owner of this uid is taken out, others stay.
                let gone = json!({"metadata": {"ownerReferences": [{"$patch": "delete", "uid": owner}]}});
                let at = (vertex.namespace.as_str(), vertex.name.as_str());
                let change = Patch::Strategic(gone);
                ignore_gone(registry.patch(&ctx, vertex.kind, at, "", &change).await.map(drop))?;
            }
            Ok(())
        }
        Action::Release { owner, finalizer } => {
            let Some(vertex) = graph.vertices.get(owner) else { return Ok(()) };
            let change = json!({"metadata": {"uid": owner, "$deleteFromPrimitiveList/finalizers": [finalizer]}});
            let at = (vertex.namespace.as_str(), vertex.name.as_str());
            ignore_gone(registry.patch(&ctx, vertex.kind, at, "", &Patch::Strategic(change)).await.map(drop))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(uid: &str, owners: &[&str], finalizers: &[&str], deleting: bool) -> Value {
        let owners: Vec<Value> = owners.iter().map(|uid| json!({"uid": uid})).collect();
        let mut object = json!({"metadata": {"name": uid, "namespace": "n", "uid": uid, "ownerReferences": owners, "finalizers": finalizers}});
        if deleting {
            object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        object
    }

    fn graph(objects: &[Value]) -> (Graph, &'static Kind) {
        let kind = kinds::find("", "v1", "pods").expect("pods");
        let mut graph = Graph::default();
        for object in objects {
            drop(graph.set(kind, object));
        }
        (graph, kind)
    }

    #[test]
    fn dependents_go_after_their_last_owner() {
        let (mut graph, _) = graph(&[
            object("a", &[], &[], false),
            object("b", &[], &[], false),
            object("c", &["a", "b"], &[], false),
            object("d", &["c"], &[], false),
        ]);
        assert!(graph.look_at_everything().is_empty());
        assert!(graph.remove("a").is_empty());
        assert_eq!(graph.remove("b"), [Action::Delete("c".to_owned())]);
        assert_eq!(graph.remove("c"), [Action::Delete("d".to_owned())]);
    }

    #[test]
    fn foreground_waits_and_orphan_lets_live() {
        let (mut graph, kind) = graph(&[object("a", &[], &[], false), object("c", &["a"], &[], false)]);
        assert!(graph.set(kind, &object("a", &[], &[FOREGROUND], true)).is_empty());
        assert_eq!(graph.foreground("a"), [Action::Delete("c".to_owned())]);
        let released = Action::Release { owner: "a".to_owned(), finalizer: FOREGROUND };
        assert_eq!(graph.remove("c"), [released]);
        drop(graph.set(kind, &object("x", &[], &[], false)));
        drop(graph.set(kind, &object("y", &["x"], &[], false)));
        let orphaned = Action::Orphan { owner: "x".to_owned(), dependents: vec!["y".to_owned()] };
        assert_eq!(graph.set(kind, &object("x", &[], &[ORPHAN], true)), [orphaned]);
        let released = Action::Release { owner: "x".to_owned(), finalizer: ORPHAN };
        assert_eq!(graph.set(kind, &object("y", &[], &[], false)), [released]);
    }

    #[test]
    fn an_owner_that_never_was_does_not_hold() {
        let (graph, _) = graph(&[object("c", &["nobody"], &[], false)]);
        assert_eq!(graph.look_at_everything(), [Action::Delete("c".to_owned())]);
    }
}
