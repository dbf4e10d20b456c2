//! The gRPC side: one stream per agent, and the signing of certificates.

use super::{Counters, HolderState, NodeState, Published, Tracker, Traffic, scope, status::Observed};
use crate::{
    api::{client::Client, kinds},
    ca::{self, Authority},
    compile,
    join::{self, JoinError},
    store::Store,
};
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use sluice_model::{Revision, Snapshot};
use sluice_wire::v1::{
    self, ClientMessage, Hello, JoinRequest, MetricsInterval, ServerMessage, SignRequest, SignResponse,
    client_message::Kind, discovery_server::Discovery, hello::Subscriber, identity_server::Identity, server_message,
};
use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Seconds between metrics reports. Short: a report is a few hundred bytes per node.
const METRICS_INTERVAL_S: u32 = 1;

/// What the streams, the status writer and the API share.
pub struct Shared {
    pub published: watch::Receiver<Published>,
    pub tracker: Mutex<Tracker>,
    pub acknowledged: Notify,
    pub traffic: Mutex<Traffic>,
    pub observed: Mutex<Observed>,
    pub counters: Arc<Counters>,
}

impl Shared {
    pub fn new(published: watch::Receiver<Published>, counters: Arc<Counters>) -> Arc<Self> {
        Arc::new(Self {
            published,
            tracker: Mutex::default(),
            acknowledged: Notify::new(),
            traffic: Mutex::default(),
            observed: Mutex::default(),
            counters,
        })
    }

    fn connect(&self, node: &str) -> u64 {
        let session = self.tracker.lock().expect("no holder panics").connect(node);
        self.acknowledged.notify_one();
        session
    }

    fn node(&self, node: &str, session: u64, change: impl FnOnce(&mut NodeState)) {
        self.tracker.lock().expect("no holder panics").update(node, session, change);
        self.settle();
        self.acknowledged.notify_one();
    }

    /// Counts the changes that everybody has by now.
    pub fn settle(&self) {
        if self.counters.lag().is_settled() {
            return;
        }
        let snapshot = self.published.borrow().snapshot.clone();
        let ready = || snapshot.nodes().filter(|n| n.ready).map(|n| n.name.name.as_str());
        let tracker = self.tracker.lock().expect("no holder panics");
        self.counters.lag().settle(Instant::now(), |revision| tracker.everybody_has(revision, ready()));
    }
}

/// Both services, for agents.
#[derive(Clone)]
pub struct Server {
    pub shared: Arc<Shared>,
    pub store: Arc<dyn Store>,
    pub authority: Arc<Authority>,
    pub client: Client,
    pub trust_domain: String,
    pub workload_life: Duration,
}

#[tonic::async_trait]
impl Discovery for Server {
    type StreamStream = Pin<Box<dyn Stream<Item = Result<ServerMessage, Status>> + Send>>;

    async fn stream(&self, request: Request<Streaming<ClientMessage>>) -> Result<Response<Self::StreamStream>, Status> {
        let caller = caller(&request)?;
        let mut messages = request.into_inner();
        let hello = match messages.message().await?.and_then(|m| m.kind) {
            Some(Kind::Hello(h)) => h,
            _ => return Err(Status::invalid_argument("the first message must be Hello")),
        };
        match &hello.subscriber {
            Some(Subscriber::Node(n)) if *n == caller => {}
            Some(Subscriber::Node(n)) => {
                return Err(Status::permission_denied(format!("node {caller} may not subscribe as node {n}")));
            }
            _ => return Err(Status::invalid_argument("control serves agents; a sidecar asks its node's agent")),
        }
        let (tx, rx) = mpsc::channel(8);
        tokio::spawn(serve(self.shared.clone(), caller, hello, messages, tx));
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}

/// The node named in the caller's certificate.
fn caller<T>(request: &Request<T>) -> Result<String, Status> {
    let certs = request.peer_certs().ok_or_else(|| Status::unauthenticated("a node certificate is needed"))?;
    let leaf = certs.first().ok_or_else(|| Status::unauthenticated("a node certificate is needed"))?;
    let (_, cert) = x509_parser::parse_x509_certificate(leaf)
        .map_err(|e| Status::unauthenticated(format!("client certificate: {e}")))?;
    let name = cert.subject().iter_common_name().next().and_then(|n| n.as_str().ok()).unwrap_or_default();
    name.strip_prefix("system:node:")
        .map(str::to_owned)
        .ok_or_else(|| Status::permission_denied(format!("{name:?} is not a node")))
}

async fn serve(
    shared: Arc<Shared>,
    node: String,
    hello: Hello,
    mut messages: Streaming<ClientMessage>,
    tx: mpsc::Sender<Result<ServerMessage, Status>>,
) {
    tracing::info!(node, version = hello.version, revision = hello.revision, "agent connected");
    let session = shared.connect(&node);
    let mut sender = tokio::spawn(send(shared.published.clone(), node.clone(), hello, tx));
    loop {
        tokio::select! {
            message = messages.next() => match message {
                Some(Ok(m)) => m.kind.into_iter().for_each(|kind| take(&shared, &node, session, kind)),
                _ => break,
            },
            // The service stops. An agent that goes on talking must not keep it.
            _ = &mut sender => break,
        }
    }
    sender.abort();
    tracing::info!(node, "agent gone");
    shared.node(&node, session, |s| s.connected = false);
}

fn take(shared: &Shared, node: &str, session: u64, kind: Kind) {
    match kind {
        Kind::Ack(a) => {
            if a.epoch == shared.published.borrow().epoch {
                shared.node(node, session, |s| {
                    s.revision = Revision(a.revision);
                    s.nack = None;
                });
            }
        }
        Kind::Nack(n) => {
            tracing::warn!(node, revision = n.revision, reason = n.reason, "agent refuses an update");
            shared.node(node, session, |s| s.nack = Some(n.reason));
        }
        Kind::Holders(h) => shared.node(node, session, |s| s.holders = h.holders.into_iter().map(holder).collect()),
        Kind::Metrics(m) => shared.traffic.lock().expect("no holder panics").take(node, &m),
        Kind::Hello(_) | Kind::Subscribe(_) => {}
    }
}

fn holder(h: v1::Holder) -> HolderState {
    let w = h.workload.unwrap_or_default();
    HolderState {
        workload: format!("{}/{}", w.namespace, w.name),
        revision: Revision(h.revision),
        routes: h.routes.into_iter().map(Into::into).collect(),
        nack: Some(h.nack).filter(|n| !n.is_empty()),
    }
}

/// Sends what changed, latest state only: a slow agent skips the states in between.
async fn send(
    mut published: watch::Receiver<Published>,
    node: String,
    hello: Hello,
    tx: mpsc::Sender<Result<ServerMessage, Status>>,
) {
    let interval = server_message::Kind::MetricsInterval(MetricsInterval { seconds: METRICS_INTERVAL_S });
    if tx.send(Ok(ServerMessage { kind: Some(interval) })).await.is_err() {
        return;
    }
    // Nothing has been published before the store was read once.
    while published.borrow_and_update().epoch.is_empty() {
        if published.changed().await.is_err() {
            return;
        }
    }
    // The state the agent resumes from is not kept here, so the first update is always whole.
    let gateways = hello.features.iter().any(|f| f == sluice_wire::FEATURE_GATEWAY);
    let subscriber = scope::Subscriber { node, gateways };
    let mut sent: Option<(String, Snapshot)> = None;
    loop {
        let p = published.borrow_and_update().clone();
        let next = scope::scoped(&p.snapshot, &subscriber);
        let from = sent.take().filter(|(epoch, _)| *epoch == p.epoch).map(|(_, s)| s);
        let moved = from.as_ref().is_none_or(|f| f.revision != next.revision);
        if moved {
            let full = from.is_none();
            let delta = from.unwrap_or_default().diff(&next);
            for u in scope::updates(&p.epoch, &next, full, &delta) {
                let m = ServerMessage { kind: Some(server_message::Kind::Update(u)) };
                if tx.send(Ok(m)).await.is_err() {
                    return;
                }
            }
        }
        sent = Some((p.epoch, next));
        if published.changed().await.is_err() {
            return;
        }
    }
}

#[tonic::async_trait]
impl Identity for Server {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<SignResponse>, Status> {
        let r = request.into_inner();
        if !valid_node_name(&r.node) {
            return Err(Status::invalid_argument(format!("node name {:?} is not a DNS name", r.node)));
        }
        let key_hash = ca::key_fingerprint(&r.csr_pem, &r.node).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let admission = join::admit(&self.client, r.token.trim(), &r.node, &key_hash).await.map_err(refused)?;
        tracing::info!(node = r.node, ?admission, "node joins");
        self.sign_node(&r.csr_pem, &r.node)
    }

    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let node = caller(&request)?;
        let r = request.into_inner();
        let Some(w) = r.workload else { return self.sign_node(&r.csr_pem, &node) };
        let pod = self.pod(&w).await?;
        let bound = pod.spec.as_ref().and_then(|s| s.node_name.as_deref());
        if bound != Some(&node) || pod.metadata.uid.as_deref() != Some(&w.uid) {
            let text = format!("pod {}/{} ({}) is not bound to node {node}", w.namespace, w.name, w.uid);
            return Err(Status::permission_denied(text));
        }
        let identity = compile::identity(&pod, &self.trust_domain).to_string();
        let signed = self.authority.sign_workload(&r.csr_pem, &identity, self.workload_life);
        let certificate_pem = signed.map_err(|e| Status::invalid_argument(e.to_string()))?;
        tracing::info!(node, identity, "certificate issued");
        Ok(Response::new(SignResponse { certificate_pem, bundle_pem: self.authority.bundle_pem().to_owned() }))
    }
}

/// A refusal is final; the rest may be tried again.
fn refused(error: JoinError) -> Status {
    match error {
        JoinError::Refused(why) => Status::permission_denied(why.to_string()),
        JoinError::Unavailable(_) => Status::unavailable(error.to_string()),
    }
}

fn valid_node_name(n: &str) -> bool {
    let ok = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    !n.is_empty() && n.len() <= 253 && n.chars().all(ok) && !n.starts_with(['-', '.']) && !n.ends_with(['-', '.'])
}

impl Server {
    fn sign_node(&self, csr_pem: &str, node: &str) -> Result<Response<SignResponse>, Status> {
        let signed = self.authority.sign_node(csr_pem, node);
        let certificate_pem = signed.map_err(|e| Status::invalid_argument(e.to_string()))?;
        tracing::info!(node, "node certificate issued");
        Ok(Response::new(SignResponse { certificate_pem, bundle_pem: self.authority.bundle_pem().to_owned() }))
    }

    async fn pod(&self, w: &v1::WorkloadRef) -> Result<Pod, Status> {
        let kind = kinds::find("", "v1", "pods").expect("pods are in the table of kinds");
        let found = self.store.get(&kind.key(&w.namespace, &w.name)).await;
        let kv = found.map_err(|e| Status::unavailable(e.to_string()))?;
        let gone = || Status::permission_denied(format!("pod {}/{} does not exist", w.namespace, w.name));
        serde_json::from_slice(&kv.ok_or_else(gone)?.value).map_err(|e| Status::internal(e.to_string()))
    }
}
