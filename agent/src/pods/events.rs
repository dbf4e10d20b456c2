//! Events on pods and on the node, as `kubectl describe` shows them. Repeats are counted on one object; at most a few
//! hundred kinds of them are remembered.

use super::convert::{name, namespace, uid};
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference, Pod},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use std::collections::HashMap;
use tokio::sync::mpsc;

/// Repeats are recognised among this many.
const REMEMBERED: usize = 512;
/// Events waiting to be written; more are dropped (an unreachable API must not hold memory).
const QUEUE: usize = 256;

#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<Event>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    Normal,
    Warning,
}

impl Events {
    /// Starts the task that writes them.
    pub fn start(client: Client, node: String) -> Self {
        let (queue, rx) = mpsc::channel(QUEUE);
        tokio::spawn(write_all(client, node, rx));
        Self { queue }
    }

    pub fn emit(&self, pod: &Pod, type_: Type, reason: &str, message: String) {
        let involved_object = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            namespace: Some(namespace(pod).into()),
            name: Some(name(pod).into()),
            uid: Some(uid(pod).into()),
            ..ObjectReference::default()
        };
        self.queue(involved_object, type_, reason, message);
    }

    /// About the node itself; such events lie in the namespace `default`.
    pub fn emit_node(&self, node: &str, type_: Type, reason: &str, message: String) {
        let involved_object = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Node".into()),
            name: Some(node.into()),
            uid: Some(node.into()),
            ..ObjectReference::default()
        };
        self.queue(involved_object, type_, reason, message);
    }

    fn queue(&self, involved_object: ObjectReference, type_: Type, reason: &str, message: String) {
        let event = Event {
            involved_object,
            type_: Some(if type_ == Type::Normal { "Normal" } else { "Warning" }.into()),
            reason: Some(reason.into()),
            message: Some(message.chars().take(1024).collect()),
            ..Event::default()
        };
        if self.queue.try_send(event).is_err() {
            tracing::debug!(reason, "event dropped: the queue is full");
        }
    }
}

async fn write_all(client: Client, node: String, mut rx: mpsc::Receiver<Event>) {
    let mut known: HashMap<String, (String, i32)> = HashMap::new();
    while let Some(event) = rx.recv().await {
        if known.len() >= REMEMBERED {
            known.clear();
        }
        if let Err(error) = write(&client, &node, event, &mut known).await {
            tracing::debug!(%error, "event not written");
        }
    }
}

async fn write(
    client: &Client,
    node: &str,
    mut event: Event,
    known: &mut HashMap<String, (String, i32)>,
) -> kube::Result<()> {
    let namespace = event.involved_object.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
    let now = Time(Timestamp::now());
    let key = format!("{:?}|{:?}|{:?}", event.involved_object.uid, event.reason, event.message);
    if let Some((name, count)) = known.get_mut(&key) {
        *count += 1;
        let patch = serde_json::json!({"count": *count, "lastTimestamp": now});
        return api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.map(|_| ());
    }
    let object = event.involved_object.name.clone().unwrap_or_default();
    let name = format!("{object}.{:x}", Timestamp::now().as_nanosecond());
    event.metadata = ObjectMeta { name: Some(name.clone()), namespace: Some(namespace), ..ObjectMeta::default() };
    event.source = Some(EventSource { component: Some("sluice-agent".into()), host: Some(node.into()) });
    event.first_timestamp = Some(now.clone());
    event.last_timestamp = Some(now);
    event.count = Some(1);
    api.create(&PostParams::default(), &event).await?;
    known.insert(key, (name, 1));
    Ok(())
}
