//! Typed access to the objects for the control service's own parts. It goes through the same registry as every other
//! client: the same checks, the same audit line.

use std::sync::Arc;

use gateway_api::apis::experimental::httproutes::HttpRoute;
use gateway_api::apis::experimental::tcproutes::TcpRoute;
use gateway_api::apis::standard::gatewayclasses::GatewayClass;
use gateway_api::apis::standard::gateways::Gateway;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::kinds::{self, Kind};
use super::registry::{Context, DeleteOptions, ListOptions, Patch, Registry};
use super::status::ApiError;
use super::value::{rfc3339, rfc3339_micro};

/// Events being written at a time; more are dropped.
const EVENTS_IN_FLIGHT: usize = 4_096;

/// A type of the table of kinds.
pub trait Object: Serialize + DeserializeOwned + Clone + Send + Sync + 'static {
    /// API group, empty for core.
    const GROUP: &'static str;
    /// API version.
    const VERSION: &'static str;
    /// Plural.
    const PLURAL: &'static str;

    /// The object's metadata.
    fn meta(&self) -> &ObjectMeta;
    /// The object's metadata, to change.
    fn meta_mut(&mut self) -> &mut ObjectMeta;

    /// The entry of the table.
    fn kind() -> &'static Kind {
        kinds::find(Self::GROUP, Self::VERSION, Self::PLURAL).expect("every Object is in the table")
    }

    /// The object's name.
    fn name(&self) -> &str {
        self.meta().name.as_deref().unwrap_or_default()
    }

    /// The object's namespace, empty for cluster-wide ones.
    fn namespace(&self) -> &str {
        self.meta().namespace.as_deref().unwrap_or_default()
    }

    /// The object's uid.
    fn uid(&self) -> &str {
        self.meta().uid.as_deref().unwrap_or_default()
    }

    /// The store's revision of its last change.
    fn revision(&self) -> u64 {
        self.meta().resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or_default()
    }

    /// It is marked for deletion.
    fn deleting(&self) -> bool {
        self.meta().deletion_timestamp.is_some()
    }
}

macro_rules! objects {
    ($($ty:ty => $group:literal, $version:literal, $plural:literal;)*) => {
        $(impl Object for $ty {
            const GROUP: &'static str = $group;
            const VERSION: &'static str = $version;
            const PLURAL: &'static str = $plural;
            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        })*
    };
}

objects! {
    core::Namespace => "", "v1", "namespaces";
    core::Node => "", "v1", "nodes";
    core::Pod => "", "v1", "pods";
    core::Service => "", "v1", "services";
    core::ConfigMap => "", "v1", "configmaps";
    core::Secret => "", "v1", "secrets";
    core::ServiceAccount => "", "v1", "serviceaccounts";
    core::Event => "", "v1", "events";
    Lease => "coordination.k8s.io", "v1", "leases";
    Deployment => "apps", "v1", "deployments";
    ReplicaSet => "apps", "v1", "replicasets";
    EndpointSlice => "discovery.k8s.io", "v1", "endpointslices";
    GatewayClass => "gateway.networking.k8s.io", "v1", "gatewayclasses";
    Gateway => "gateway.networking.k8s.io", "v1", "gateways";
    HttpRoute => "gateway.networking.k8s.io", "v1", "httproutes";
    TcpRoute => "gateway.networking.k8s.io", "v1alpha2", "tcproutes";
}

/// What an event is about and says.
#[derive(Debug, Clone)]
pub struct Notice<'a> {
    /// `Normal` or `Warning`.
    pub kind: &'a str,
    /// One word for machines.
    pub reason: &'a str,
    /// For people.
    pub message: &'a str,
}

/// Access for one part of the service.
#[derive(Clone)]
pub struct Client {
    registry: Arc<Registry>,
    events: Arc<Semaphore>,
    ctx: Context,
    part: String,
}

impl Client {
    /// For the part of this name; it is the user of audit lines and the field manager `sluice.dev/<part>`.
    pub fn new(registry: Arc<Registry>, part: &str) -> Self {
        let events = Arc::new(Semaphore::new(EVENTS_IN_FLIGHT));
        Client { registry, events, ctx: Context::internal(part), part: part.to_owned() }
    }

    /// The same objects, for another part.
    pub fn named(&self, part: &str) -> Self {
        Client { ctx: Context::internal(part), part: part.to_owned(), ..self.clone() }
    }

    /// The untyped registry beneath.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// One object, if it is there.
    pub async fn get<T: Object>(&self, namespace: &str, name: &str) -> Result<Option<T>, ApiError> {
        match self.registry.get(T::kind(), namespace, name).await {
            Ok(object) => decode(object).map(Some),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All objects of a type, of one namespace or of all, and their revision.
    pub async fn list<T: Object>(&self, namespace: Option<&str>) -> Result<(Vec<T>, u64), ApiError> {
        let listed = self.registry.list(T::kind(), namespace, &ListOptions::default()).await?;
        let items: Result<Vec<T>, ApiError> = listed.items.into_iter().map(decode).collect();
        Ok((items?, listed.revision))
    }

    /// A new object; its namespace is in its metadata.
    pub async fn create<T: Object>(&self, object: &T) -> Result<T, ApiError> {
        let body = encode::<T>(object)?;
        decode(self.registry.create(&self.ctx, T::kind(), object.namespace(), body).await?.object)
    }

    /// Replaces an object; fails with a conflict if it changed since it was read.
    pub async fn update<T: Object>(&self, object: &T) -> Result<T, ApiError> {
        let at = (object.namespace(), object.name());
        let body = encode::<T>(object)?;
        decode(self.registry.update(&self.ctx, T::kind(), at, "", body).await?.object)
    }

    /// Replaces an object's status; fails with a conflict if the object changed since it was read.
    pub async fn update_status<T: Object>(&self, object: &T) -> Result<T, ApiError> {
        let at = (object.namespace(), object.name());
        let body = encode::<T>(object)?;
        decode(self.registry.update(&self.ctx, T::kind(), at, "status", body).await?.object)
    }

    /// Merges a difference into an object (`subresource` empty) or its status; never conflicts.
    pub async fn merge<T: Object>(
        &self,
        namespace: &str,
        name: &str,
        subresource: &str,
        difference: Value,
    ) -> Result<T, ApiError> {
        self.patch(namespace, name, subresource, &Patch::Merge(difference)).await
    }

    /// Changes an object or its status by a difference of any kind.
    pub async fn patch<T: Object>(
        &self,
        namespace: &str,
        name: &str,
        subresource: &str,
        difference: &Patch,
    ) -> Result<T, ApiError> {
        decode(self.registry.patch(&self.ctx, T::kind(), (namespace, name), subresource, difference).await?.object)
    }

    /// Deletes an object; one that is gone already is no error. Returns the revision of the change.
    pub async fn delete<T: Object>(&self, object: &T, mut options: DeleteOptions) -> Result<u64, ApiError> {
        object.uid().clone_into(&mut options.uid);
        let at = (object.namespace(), object.name());
        match self.registry.delete(&self.ctx, T::kind(), at, &options).await {
            Ok(written) => Ok(decode::<T>(written.object)?.revision()),
            // Another of the same name is not the one that was to go.
            Err(error) if error.is_not_found() || error.is_conflict() => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Gives a pod its node, if it is still as it was at `revision`.
    pub async fn bind(&self, pod: &core::Pod, node: &str) -> Result<u64, ApiError> {
        let fence = (pod.uid(), Some(pod.revision()));
        self.registry.bind(&self.ctx, (pod.namespace(), pod.name()), node, fence).await
    }

    /// Says something of an object, some time soon. The same reason about the same object counts up instead of piling
    /// up; when too much is said at once, the rest is dropped, for an event is a courtesy.
    pub fn notice<T: Object>(&self, about: &T, notice: &Notice<'_>) {
        let Ok(slot) = self.events.clone().try_acquire_owned() else { return };
        let kind = T::kind();
        let namespace = if about.namespace().is_empty() { "default" } else { about.namespace() }.to_owned();
        let name = format!("{}.{:016x}", about.name(), fingerprint(&[about.uid(), notice.reason, notice.message]));
        let now = Timestamp::now();
        let component = self.part.clone();
        let body = json!({
            "apiVersion": "v1", "kind": "Event", "metadata": {"name": name, "namespace": namespace},
            "involvedObject": {
                "kind": kind.kind, "apiVersion": kind.api_version(), "name": about.name(), "namespace": about.namespace(),
                "uid": about.uid(), "resourceVersion": about.meta().resource_version,
            },
            "reason": notice.reason, "message": notice.message, "type": notice.kind, "count": 1,
            "firstTimestamp": rfc3339(now), "lastTimestamp": rfc3339(now), "eventTime": rfc3339_micro(now),
            "source": {"component": component}, "reportingComponent": component, "reportingInstance": "sluice-control",
            "action": notice.reason,
        });
        let client = self.clone();
        tokio::spawn(async move {
            if let Err(error) = client.record(&namespace, &name, body).await {
                tracing::debug!(%error, name, "event not recorded");
            }
            drop(slot);
        });
    }

    async fn record(&self, namespace: &str, name: &str, body: Value) -> Result<(), ApiError> {
        if let Some(known) = self.get::<core::Event>(namespace, name).await? {
            let change = json!({"count": known.count.unwrap_or(1) + 1, "lastTimestamp": body["lastTimestamp"]});
            self.merge::<core::Event>(namespace, name, "", change).await?;
            return Ok(());
        }
        self.registry.create(&self.ctx, core::Event::kind(), namespace, body).await?;
        Ok(())
    }
}

/// FNV-1a over the parts: stable across restarts, which is all a name needs.
fn fingerprint(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// JSON of a typed object, with its kind.
pub fn encode<T: Object>(object: &T) -> Result<Value, ApiError> {
    let mut body = serde_json::to_value(object).map_err(ApiError::internal)?;
    body["apiVersion"] = json!(T::kind().api_version());
    body["kind"] = json!(T::kind().kind);
    Ok(body)
}

/// A typed object from JSON.
pub fn decode<T: Object>(object: Value) -> Result<T, ApiError> {
    serde_json::from_value(object)
        .map_err(|e| ApiError::internal(format!("a stored {} does not parse: {e}", T::PLURAL)))
}
