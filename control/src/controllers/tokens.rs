//! Removes join tokens whose time is over.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use sluice_wire::join::{NAME_PREFIX, NAMESPACE};

use super::Shared;
use super::queue::{Key, Queue};
use crate::api::client::Object;
use crate::api::registry::DeleteOptions;
use crate::api::status::ApiError;
use crate::join::record;
use crate::store::{ListQuery, Store, StoreError, WatchItem};

/// Pause before listing again after the store failed.
const RETRY: Duration = Duration::from_millis(200);

/// Runs for ever.
pub(super) async fn run(shared: Shared, store: Arc<dyn Store>) {
    let queue = Queue::new();
    let feed = feed(store, queue.clone());
    let work = queue.clone().run("token-controller", move |key| reconcile(shared.clone(), queue.clone(), key));
    tokio::join!(feed, work);
}

async fn feed(store: Arc<dyn Store>, queue: Arc<Queue>) {
    loop {
        if let Err(error) = list_and_watch(&store, &queue).await {
            tracing::warn!(%error, "token controller lists again");
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Only what is named like a token is followed: the cluster's other secrets are none of its business.
async fn list_and_watch(store: &Arc<dyn Store>, queue: &Queue) -> Result<(), StoreError> {
    let namespace = Secret::kind().prefix(Some(NAMESPACE));
    let prefix = format!("{namespace}{NAME_PREFIX}");
    let look = |key: &str| {
        let name = key.strip_prefix(&namespace).unwrap_or_default();
        queue.add((NAMESPACE.to_owned(), name.to_owned()));
    };
    let listing = store.list(ListQuery { prefix: prefix.clone(), ..ListQuery::default() }).await?;
    listing.items.iter().for_each(|item| look(&item.key));
    let mut watch = store.watch(&prefix, listing.revision).await?;
    while let Some(item) = watch.next().await {
        if let WatchItem::Event(event) = item? {
            look(&event.key);
        }
    }
    Ok(())
}

async fn reconcile(shared: Shared, queue: Arc<Queue>, key: Key) -> Result<(), ApiError> {
    let Some(secret) = shared.client.get::<Secret>(&key.0, &key.1).await? else { return Ok(()) };
    // A Secret of that name that holds no token is somebody else's.
    let Some(token) = record(&secret) else { return Ok(()) };
    let left = token.expires.duration_since(Timestamp::now());
    match Duration::try_from(left) {
        Ok(left) if !left.is_zero() => queue.add_after(key, left),
        _ => drop(shared.client.delete(&secret, DeleteOptions::default()).await?),
    }
    Ok(())
}
