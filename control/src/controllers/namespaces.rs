//! Namespaces: each has a `default` service account; one that is deleted is emptied first, and then goes.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::Shared;
use super::queue::{Key, Queue};
use crate::api::cache::Heard;
use crate::api::client::Object;
use crate::api::kinds;
use crate::api::registry::{Context, DeleteOptions, ListOptions};
use crate::api::status::ApiError;
use crate::api::value::name;

/// Pause before looking whether an ending namespace is empty: pods take their time.
const AGAIN: Duration = Duration::from_millis(500);

/// Runs for ever.
pub(super) async fn run(shared: Shared) {
    let queue = Queue::new();
    let feed = feed(shared.clone(), queue.clone());
    let work = queue.clone().run("namespace", move |key| reconcile(shared.clone(), queue.clone(), key));
    tokio::join!(feed, work);
}

async fn feed(shared: Shared, queue: Arc<Queue>) {
    let (mut namespaces, mut accounts) = (shared.caches.namespaces.listen(), shared.caches.accounts.listen());
    let all = || {
        for namespace in shared.caches.namespaces.all() {
            queue.add((String::new(), namespace.name().to_owned()));
        }
    };
    all();
    loop {
        tokio::select! {
            heard = namespaces.next() => match heard {
                Heard::Change(change) => queue.add((String::new(), change.object().name().to_owned())),
                Heard::Everything => all(),
            },
            heard = accounts.next() => match heard {
                Heard::Change(change) => queue.add((String::new(), change.object().namespace().to_owned())),
                Heard::Everything => all(),
            },
        }
    }
}

async fn reconcile(shared: Shared, queue: Arc<Queue>, key: Key) -> Result<(), ApiError> {
    let Some(namespace) = shared.caches.namespaces.get("", &key.1) else { return Ok(()) };
    if !namespace.deleting() {
        return ensure_account(&shared, namespace.name()).await;
    }
    if empty(&shared, namespace.name()).await? {
        let mut done: Namespace = (*namespace).clone();
        done.spec.get_or_insert_default().finalizers = None;
        shared.client.update(&done).await?;
    } else {
        queue.add_after(key, AGAIN);
    }
    Ok(())
}

async fn ensure_account(shared: &Shared, namespace: &str) -> Result<(), ApiError> {
    if shared.caches.accounts.get(namespace, "default").is_some() {
        return Ok(());
    }
    let metadata =
        ObjectMeta { name: Some("default".to_owned()), namespace: Some(namespace.to_owned()), ..ObjectMeta::default() };
    match shared.client.create(&ServiceAccount { metadata, ..ServiceAccount::default() }).await {
        Err(error) if error.reason != "AlreadyExists" => Err(error),
        _ => Ok(()),
    }
}

/// Deletes what is in the namespace; true when nothing is left.
async fn empty(shared: &Shared, namespace: &str) -> Result<bool, ApiError> {
    let registry = shared.client.registry();
    let ctx = Context::internal("namespace-controller");
    let mut left = 0;
    for kind in kinds::table().kinds.iter().filter(|kind| kind.namespaced && kind.stored_as.is_none()) {
        let listed = registry.list(kind, Some(namespace), &ListOptions::default()).await?;
        left += listed.items.len();
        for object in &listed.items {
            if object["metadata"].get("deletionTimestamp").is_some() {
                continue;
            }
            match registry.delete(&ctx, kind, (namespace, name(object)), &DeleteOptions::default()).await {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => {}
            }
        }
    }
    Ok(left == 0)
}
