//! Services of type LoadBalancer get addresses of the pool. The statuses of the services are the record of who has which,
//! and this is the only part that writes it: it sees each of its writes before it decides again, so that no two services
//! ever get the same address, and it finds all of them again when it starts.

mod plan;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Shared;
use crate::api::cache::{Change, Heard};
use crate::api::client::{Notice, Object};
use crate::api::status::ApiError;
use plan::{Verdict, plan, taken};

/// Changes of services that come within this are looked at together.
const GATHER: Duration = Duration::from_millis(20);
/// Pause before another look after a write failed, most often because somebody changed the service meanwhile.
const RETRY: Duration = Duration::from_millis(200);

/// What each service that lacks an address was told last, by uid: an event says it once.
type Told = HashMap<String, String>;

/// Runs for ever.
pub(super) async fn run(shared: Shared) {
    let mut services = shared.caches.services.listen();
    let mut told = Told::new();
    loop {
        services.skip();
        let again = match look(&shared, &mut told).await {
            Ok(()) => None,
            Err(error) => {
                tracing::debug!(%error, "addresses of the pool could not all be given; tried again");
                Some(Instant::now() + RETRY)
            }
        };
        let heard = async {
            loop {
                match services.next().await {
                    Heard::Change(change) if !concerns(&change) => {}
                    _ => break,
                }
            }
        };
        tokio::select! {
            () = heard => tokio::time::sleep(GATHER).await,
            () = tokio::time::sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => {}
        }
    }
}

/// Whether the service has, or had, to do with addresses that the pool may have.
fn concerns(change: &Change<Service>) -> bool {
    let concerned = |service: &Arc<Service>| {
        let spec = service.spec.as_ref();
        spec.is_some_and(|spec| spec.type_.as_deref() == Some("LoadBalancer") || spec.external_ips.is_some())
    };
    change.old.iter().chain(&change.new).any(concerned)
}

/// Writes until the services have what they should have.
async fn look(shared: &Shared, told: &mut Told) -> Result<(), ApiError> {
    loop {
        let services = shared.caches.services.all();
        let taken = taken(&services, &shared.caches.nodes.all());
        let verdicts = plan(&services, &taken, &shared.config.load_balancer_pool);
        let (mut revision, mut failure) = (0, None);
        for verdict in verdicts.iter().filter(|verdict| verdict.changes()) {
            match give(shared, verdict).await {
                Ok(written) => revision = revision.max(written),
                Err(error) if error.is_not_found() => {}
                Err(error) => failure = Some(error),
            }
        }
        shared.caches.services.wait_for(revision).await;
        if let Some(failure) = failure {
            return Err(failure);
        }
        // What was given up in this round is free in the next; who lacks something then lacks it for a reason.
        if revision == 0 {
            tell(shared, told, &verdicts);
            return Ok(());
        }
    }
}

async fn give(shared: &Shared, verdict: &Verdict) -> Result<u64, ApiError> {
    let service = &verdict.service;
    let ingress: Vec<Value> = verdict.addresses.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
    let ingress = if ingress.is_empty() { Value::Null } else { json!(ingress) };
    // Decided on this state of the service, and on no other.
    let fence = json!({"uid": service.uid(), "resourceVersion": service.metadata.resource_version});
    let change = json!({"metadata": fence, "status": {"loadBalancer": {"ingress": ingress}}});
    let written = shared.client.merge::<Service>(service.namespace(), service.name(), "status", change).await?;
    if !verdict.addresses.is_empty() {
        let message = format!("Ensured load balancer: {}", listed(&verdict.addresses));
        shared.client.notice(&**service, &Notice { kind: "Normal", reason: "EnsuredLoadBalancer", message: &message });
    }
    Ok(written.revision())
}

fn listed(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn tell(shared: &Shared, told: &mut Told, verdicts: &[Verdict]) {
    let mut now = Told::new();
    for verdict in verdicts {
        let Some(lack) = &verdict.lack else { continue };
        let uid = verdict.service.uid();
        if told.get(uid) != Some(lack) {
            let message = format!("Error syncing load balancer: {lack}");
            let notice = Notice { kind: "Warning", reason: "SyncLoadBalancerFailed", message: &message };
            shared.client.notice(&*verdict.service, &notice);
        }
        now.insert(uid.to_owned(), lack.clone());
    }
    *told = now;
}
