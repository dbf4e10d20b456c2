//! The one stream to control: views come down, acknowledgements, holders and metrics go up. It reconnects for ever and
//! resumes where it was; everything on this node works on the last view meanwhile.

use crate::view::{Assembly, Store, View};
use futures::StreamExt;
use sluice_wire::{
    MAX_UPDATE,
    v1::{
        Ack, ClientMessage, Hello, Holders, Metrics, Nack, Update, client_message::Kind,
        discovery_client::DiscoveryClient, hello::Subscriber, server_message,
    },
};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

const FEATURES: [&str; 3] = ["http-route", "tcp-route", sluice_wire::FEATURE_GATEWAY];
const RETRY: Duration = Duration::from_millis(300);

/// What the data path says of a view.
#[derive(Clone, Debug)]
pub struct Verdict {
    pub epoch: String,
    pub revision: u64,
    pub result: Result<(), String>,
    /// What of a view that is in force cannot be had.
    pub problems: Vec<String>,
}

/// The ends that the rest of the agent holds.
pub struct Ends {
    pub views: watch::Receiver<View>,
    pub verdicts: mpsc::Sender<Verdict>,
    pub holders: watch::Sender<Holders>,
    pub metrics: mpsc::Sender<Metrics>,
    pub metrics_interval: watch::Receiver<u32>,
}

/// The other ends: of whoever brings the views.
pub struct Source {
    pub views: watch::Sender<View>,
    pub verdicts: mpsc::Receiver<Verdict>,
    pub holders: watch::Receiver<Holders>,
    pub metrics: mpsc::Receiver<Metrics>,
    pub interval: watch::Sender<u32>,
}

/// The channels between the source of views and the rest of the agent, which begins with `view`.
pub fn channels(view: View) -> (Source, Ends) {
    let (views_tx, views) = watch::channel(view);
    let (verdicts, verdicts_rx) = mpsc::channel(16);
    let (holders, holders_rx) = watch::channel(Holders::default());
    let (metrics, metrics_rx) = mpsc::channel(4);
    let (interval, metrics_interval) = watch::channel(15);
    let source = Source { views: views_tx, verdicts: verdicts_rx, holders: holders_rx, metrics: metrics_rx, interval };
    (source, Ends { views, verdicts, holders, metrics, metrics_interval })
}

pub struct Uplink {
    node: String,
    store: Store,
    channel: watch::Receiver<Channel>,
    ends: Source,
}

impl Uplink {
    /// `channel` changes when the node's certificate does.
    pub fn new(node: String, store: Store, channel: watch::Receiver<Channel>) -> (Self, Ends) {
        let (source, ends) = channels(store.load());
        (Self { node, store, channel, ends: source }, ends)
    }

    pub async fn run(mut self) {
        loop {
            match self.session().await {
                Ok(()) => tracing::info!("control closed the stream, connecting again"),
                Err(status) => tracing::info!(status = status.message(), "control is not reachable, trying again"),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn session(&mut self) -> Result<(), Status> {
        let (tx, rx) = mpsc::channel(16);
        self.send(&tx, Kind::Hello(self.hello())).await?;
        let channel = self.channel.borrow_and_update().clone();
        let mut client = DiscoveryClient::new(channel).max_decoding_message_size(MAX_UPDATE);
        let mut updates = client.stream(ReceiverStream::new(rx)).await?.into_inner();
        tracing::info!("connected to control");
        // What was in force before the connection is said again: control may have restarted.
        let current = self.ends.holders.borrow_and_update().clone();
        self.send(&tx, Kind::Holders(current)).await?;
        self.exchange(&tx, &mut updates).await
    }

    async fn exchange(
        &mut self,
        tx: &mpsc::Sender<ClientMessage>,
        updates: &mut Streaming<sluice_wire::v1::ServerMessage>,
    ) -> Result<(), Status> {
        let mut assembly = Assembly::default();
        loop {
            tokio::select! {
                m = updates.next() => match m {
                    None => return Ok(()),
                    Some(m) => match m?.kind {
                        Some(server_message::Kind::Update(u)) => self.update(&mut assembly, u, tx).await?,
                        Some(server_message::Kind::MetricsInterval(i)) => {
                            self.ends.interval.send_replace(i.seconds.clamp(1, 60));
                        }
                        None => {}
                    },
                },
                Some(v) = self.ends.verdicts.recv() => self.send(tx, verdict(v)).await?,
                Ok(()) = self.ends.holders.changed() => {
                    let h = self.ends.holders.borrow_and_update().clone();
                    self.send(tx, Kind::Holders(h)).await?;
                }
                Some(m) = self.ends.metrics.recv() => self.send(tx, Kind::Metrics(m)).await?,
                Ok(()) = self.channel.changed() => return Ok(()),
            }
        }
    }

    fn hello(&self) -> Hello {
        let view = self.ends.views.borrow();
        Hello {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            features: FEATURES.map(str::to_owned).to_vec(),
            subscriber: Some(Subscriber::Node(self.node.clone())),
            epoch: view.epoch.clone(),
            revision: view.snapshot.revision.0,
        }
    }

    async fn update(
        &mut self,
        assembly: &mut Assembly,
        u: Update,
        tx: &mpsc::Sender<ClientMessage>,
    ) -> Result<(), Status> {
        let (epoch, revision) = (u.epoch.clone(), u.revision);
        let current = self.ends.views.borrow().clone();
        match assembly.take(&current, u) {
            Ok(None) => Ok(()),
            Ok(Some(view)) => {
                if let Err(error) = self.store.save(&view) {
                    tracing::warn!(%error, "view not saved");
                }
                self.ends.views.send_replace(view);
                Ok(())
            }
            Err(reason) => self.send(tx, Kind::Nack(Nack { epoch, revision, reason: reason.to_string() })).await,
        }
    }

    async fn send(&self, tx: &mpsc::Sender<ClientMessage>, kind: Kind) -> Result<(), Status> {
        tx.send(ClientMessage { kind: Some(kind) }).await.map_err(|_| Status::unavailable("the stream has ended"))
    }
}

fn verdict(v: Verdict) -> Kind {
    match v.result {
        Ok(()) => Kind::Ack(Ack { epoch: v.epoch, revision: v.revision }),
        Err(reason) => Kind::Nack(Nack { epoch: v.epoch, revision: v.revision, reason }),
    }
}
