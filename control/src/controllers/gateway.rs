//! Makes what gateways of our classes are made of, and keeps it so: a service account, a deployment and a service each.
//! What they are is decided in `crate::gateway` (PURE); their statuses are written by `discovery::status`.

use std::sync::Arc;

use gateway_api::gateways::Gateway;
use serde_json::{Value, json};

use super::queue::{Key, Queue};
use super::{Shared, controller_of};
use crate::api::cache::{Cache, Heard};
use crate::api::client::{Notice, Object, decode, encode};
use crate::api::status::ApiError;
use crate::gateway::{self, CONTROLLER_NAME};
use crate::inject;

/// Runs for ever.
pub(super) async fn run(shared: Shared) {
    let Some(proxy) = shared.config.proxy.clone() else { return };
    let (queue, proxy) = (Queue::new(), Arc::new(proxy));
    let feed = feed(shared.clone(), queue.clone());
    let work = queue.clone().run("gateway", move |key| reconcile(shared.clone(), proxy.clone(), key));
    tokio::join!(feed, work);
}

async fn feed(shared: Shared, queue: Arc<Queue>) {
    let caches = &shared.caches;
    let (mut gateways, mut classes) = (caches.gateways.listen(), caches.gateway_classes.listen());
    let (mut deployments, mut services) = (caches.deployments.listen(), caches.services.listen());
    let (mut accounts, mut namespaces) = (caches.accounts.listen(), caches.namespaces.listen());
    let all = || {
        for gateway in shared.caches.gateways.all() {
            queue.add((gateway.namespace().to_owned(), gateway.name().to_owned()));
        }
    };
    all();
    loop {
        tokio::select! {
            heard = gateways.next() => match heard {
                Heard::Change(change) => queue.add((change.object().namespace().to_owned(), change.object().name().to_owned())),
                Heard::Everything => all(),
            },
            _ = classes.next() => all(),
            _ = namespaces.next() => all(),
            heard = deployments.next() => made(heard, &queue, &all),
            heard = services.next() => made(heard, &queue, &all),
            heard = accounts.next() => made(heard, &queue, &all),
        }
    }
}

/// Something that a gateway may have made has changed.
fn made<T: Object>(heard: Heard<T>, queue: &Queue, all: &impl Fn()) {
    match heard {
        Heard::Change(change) => {
            for object in [&change.old, &change.new].into_iter().flatten() {
                if let Some(owner) = controller_of(&**object).filter(|owner| owner.kind == "Gateway") {
                    queue.add((object.namespace().to_owned(), owner.name.clone()));
                }
            }
        }
        Heard::Everything => all(),
    }
}

async fn reconcile(shared: Shared, proxy: Arc<inject::Config>, key: Key) -> Result<(), ApiError> {
    let Some(gateway) = shared.caches.gateways.get(&key.0, &key.1) else { return Ok(()) };
    let class = shared.caches.gateway_classes.get("", &gateway.spec.gateway_class_name);
    let ours = class.is_some_and(|c| c.spec.controller_name == CONTROLLER_NAME);
    // What cannot be done is said in its status, and what there is stays as it is.
    let Ok(wishes) = gateway::wishes(&gateway) else { return Ok(()) };
    if !ours || gateway.deleting() || gateway::unusable_name(gateway.name()).is_some() {
        return Ok(());
    }
    let namespace = shared.caches.namespaces.get("", gateway.namespace());
    let labels = json!(namespace.and_then(|n| n.metadata.labels.clone()));
    let made = gateway::made(&gateway, &wishes, &labels, &proxy);
    keep(&shared, &gateway, &shared.caches.accounts, made.account).await?;
    keep(&shared, &gateway, &shared.caches.deployments, made.deployment).await?;
    match made.service {
        Some(service) => keep(&shared, &gateway, &shared.caches.services, service).await,
        None => Ok(()),
    }
}

/// Makes the object, or changes of it what differs. One of that name that is somebody else's is left alone.
async fn keep<T: Object>(
    shared: &Shared,
    gateway: &Gateway,
    cache: &Cache<T>,
    mut wanted: Value,
) -> Result<(), ApiError> {
    let name = gateway::made_name(gateway.name());
    let written = match cache.get(gateway.namespace(), &name) {
        None => shared.client.create::<T>(&decode(wanted)?).await?,
        Some(have) => {
            let have = encode(&*have)?;
            if !gateway::is_owned(&have, gateway.uid()) {
                let message = format!("{} {name} is not this gateway's; rename one of them", T::kind().kind);
                shared.client.notice(gateway, &Notice { kind: "Warning", reason: "NameTaken", message: &message });
                return Ok(());
            }
            // An owner once is an owner: the reference is not compared, for its order of fields says nothing.
            wanted["metadata"]["ownerReferences"] = have["metadata"]["ownerReferences"].clone();
            gateway::take_back(&have, &mut wanted);
            if gateway::covers(&have, &wanted) {
                return Ok(());
            }
            shared.client.merge::<T>(gateway.namespace(), &name, "", wanted).await?
        }
    };
    cache.wait_for(written.revision()).await;
    Ok(())
}
