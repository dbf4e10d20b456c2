//! The gRPC server of one pod's sidecar: moves messages between the stream, the sidecar's feed and the shared state.

use super::{Relay, feed::Feed};
use sluice_wire::v1::{
    self, ClientMessage, ServerMessage, WorkloadRef,
    client_message::Kind,
    discovery_server::{Discovery, DiscoveryServer},
    hello::Subscriber,
    identity_server::{Identity, IdentityServer},
    server_message,
};
use std::sync::Arc;
use tokio::{net::UnixStream, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// Chunks that may wait for a slow sidecar; beyond them its feed waits, and coalesces.
const QUEUE: usize = 4;
/// Streams of one pod at a time: its sidecar, and the one before that is going.
const STREAMS: usize = 4;
/// Largest message of a sidecar: its counters.
const MAX_MESSAGE: usize = 4 << 20;

pub(super) async fn serve(
    relay: Arc<Relay>,
    incoming: impl futures::Stream<Item = std::io::Result<UnixStream>>,
    workload: WorkloadRef,
    until: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let service = PodService { relay, workload: Arc::new(workload) };
    Server::builder()
        .concurrency_limit_per_connection(STREAMS)
        .add_service(DiscoveryServer::new(service.clone()).max_decoding_message_size(MAX_MESSAGE))
        .add_service(IdentityServer::new(service))
        .serve_with_incoming_shutdown(incoming, until)
        .await
}

#[derive(Clone)]
struct PodService {
    relay: Arc<Relay>,
    workload: Arc<WorkloadRef>,
}

#[tonic::async_trait]
impl Discovery for PodService {
    type StreamStream = ReceiverStream<Result<ServerMessage, Status>>;

    async fn stream(&self, request: Request<Streaming<ClientMessage>>) -> Result<Response<Self::StreamStream>, Status> {
        let mut incoming = request.into_inner();
        let hello = match incoming.message().await?.and_then(|m| m.kind) {
            Some(Kind::Hello(hello)) => hello,
            _ => return Err(Status::invalid_argument("a stream begins with Hello")),
        };
        check(&self.workload, &hello)?;
        let (outgoing, messages) = mpsc::channel(QUEUE);
        let feed = Feed::new(&self.workload, &hello);
        let pod = self.clone();
        tokio::spawn(async move {
            // How it ended matters to the sidecar only, which opens the next one.
            if let Err(status) = pod.drive(feed, incoming, &outgoing).await {
                tracing::debug!(%status, pod = %pod.workload.name, "sidecar stream ended");
            }
        });
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}

/// A sidecar may only speak for the pod whose socket it came by.
fn check(attested: &WorkloadRef, hello: &v1::Hello) -> Result<(), Status> {
    let Some(Subscriber::Workload(said)) = &hello.subscriber else {
        return Err(Status::invalid_argument("this socket serves sidecars"));
    };
    let same_uid = said.uid.is_empty() || said.uid == attested.uid;
    if said.namespace != attested.namespace || said.name != attested.name || !same_uid {
        let is = format!("{}/{}", attested.namespace, attested.name);
        return Err(Status::permission_denied(format!("this is the socket of pod {is}")));
    }
    Ok(())
}

impl PodService {
    async fn drive(
        &self,
        mut feed: Feed,
        mut incoming: Streaming<ClientMessage>,
        outgoing: &mpsc::Sender<Result<ServerMessage, Status>>,
    ) -> Result<(), Status> {
        let (mut views, mut interval) = (self.relay.views.clone(), self.relay.interval.clone());
        let mut new_interval = Some(*interval.borrow_and_update());
        let mut fresh = true;
        loop {
            if fresh && !feed.queued() {
                let view = views.borrow_and_update().clone();
                feed.refresh(&view);
                fresh = false;
                self.note(&feed);
            }
            let waiting = new_interval.is_some() || feed.queued();
            tokio::select! {
                message = incoming.message() => match message?.and_then(|m| m.kind) {
                    None => return Ok(()),
                    Some(Kind::Metrics(m)) => self.relay.with_state(|s| s.totals.take(&self.workload, m)),
                    Some(kind) => {
                        fresh |= matches!(kind, Kind::Subscribe(_));
                        feed.message(kind);
                        self.note(&feed);
                    }
                },
                changed = views.changed() => {
                    changed.map_err(|_| Status::unavailable("the agent is ending"))?;
                    fresh = true;
                }
                Ok(()) = interval.changed() => new_interval = Some(*interval.borrow_and_update()),
                place = outgoing.reserve(), if waiting => {
                    let place = place.map_err(|_| Status::cancelled("the sidecar is gone"))?;
                    place.send(Ok(next(&mut new_interval, &mut feed)));
                }
            }
        }
    }

    fn note(&self, feed: &Feed) {
        if let Some(standing) = feed.standing() {
            self.relay.with_state(|s| s.holders.stand(&self.workload, standing));
        }
    }
}

fn next(interval: &mut Option<u32>, feed: &mut Feed) -> ServerMessage {
    let kind = match interval.take() {
        Some(seconds) => Some(server_message::Kind::MetricsInterval(v1::MetricsInterval { seconds })),
        None => feed.next_update().map(server_message::Kind::Update),
    };
    ServerMessage { kind }
}

#[tonic::async_trait]
impl Identity for PodService {
    async fn join(&self, _request: Request<v1::JoinRequest>) -> Result<Response<v1::SignResponse>, Status> {
        Err(Status::permission_denied("nodes join at control"))
    }

    async fn sign(&self, request: Request<v1::SignRequest>) -> Result<Response<v1::SignResponse>, Status> {
        // Whatever the request says it is for: it is signed for the pod whose socket it came by.
        let csr_pem = request.into_inner().csr_pem;
        self.relay.signer.sign((*self.workload).clone(), csr_pem).await.map(Response::new)
    }
}
