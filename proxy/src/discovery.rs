//! The discovery stream to the agent: opened again for ever with growing pauses. It moves messages and decides nothing.

use crate::socket::channel;
use sluice_wire::{
    MAX_UPDATE,
    v1::{self, client_message::Kind, discovery_client::DiscoveryClient, server_message},
};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Messages to the agent that may wait; a stream that is slower than this is broken.
const QUEUE: usize = 256;

/// What happens on the stream.
#[derive(Debug)]
pub enum Event {
    /// Open: send Hello by this first.
    Opened(mpsc::Sender<v1::ClientMessage>),
    Message(server_message::Kind),
    Closed,
}

/// Keeps a stream to the agent at the abstract socket `socket`, reporting to `events` until those are closed.
pub async fn run(socket: String, events: mpsc::Sender<Event>) {
    let mut pause = FIRST_PAUSE;
    while !events.is_closed() {
        match stream(&socket, &events, &mut pause).await {
            Ok(()) => tracing::info!("discovery stream ended"),
            Err(error) => tracing::debug!(error = %error, cause = ?std::error::Error::source(&*error), "discovery"),
        }
        if events.send(Event::Closed).await.is_err() {
            return;
        }
        let jitter = rand::random_range(0.5..1.0);
        tokio::time::sleep(pause.mul_f64(jitter)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn stream(
    socket: &str,
    events: &mpsc::Sender<Event>,
    pause: &mut Duration,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut client = DiscoveryClient::new(channel(socket).await?).max_decoding_message_size(MAX_UPDATE);
    let (to_agent, outgoing) = mpsc::channel(QUEUE);
    // The agent answers the call only after Hello, which the hub puts into the queue.
    events.send(Event::Opened(to_agent)).await?;
    let mut incoming = client.stream(ReceiverStream::new(outgoing)).await?.into_inner();
    while let Some(message) = incoming.message().await? {
        *pause = FIRST_PAUSE;
        if let Some(kind) = message.kind {
            events.send(Event::Message(kind)).await?;
        }
    }
    Ok(())
}

/// Wraps a message for the stream.
pub fn message(kind: Kind) -> v1::ClientMessage {
    v1::ClientMessage { kind: Some(kind) }
}
