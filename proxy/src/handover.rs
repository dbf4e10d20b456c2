//! The sidecar's end of the handover: takes its predecessor's listeners from the agent, registers its own, and keeps
//! the stream open, whose end tells the agent that the sidecar is gone. See `sluice_wire::handover` for the protocol.

use crate::socket::connect_abstract;
use sluice_wire::handover::{Message, Role, recv, send};
use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};
use tokio::{io::Interest, sync::watch};

/// How long the agent may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_secs(1);

/// The stream to the agent, and the listeners it had kept.
pub type Taken = (UnixStream, Vec<(Role, OwnedFd)>);

/// Asks for kept listeners; `None` when no agent answers within `patience`.
pub fn take(socket: &str, patience: Duration) -> Option<Taken> {
    let until = Instant::now() + patience;
    loop {
        match try_take(socket) {
            Ok(taken) => return Some(taken),
            Err(error) if Instant::now() >= until => {
                tracing::warn!(%error, socket, "no agent to take listeners from; making new ones");
                return None;
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn try_take(socket: &str) -> io::Result<Taken> {
    let stream = connect_abstract(socket)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    send(stream.as_fd(), &Message::Take)?;
    match recv(stream.as_fd())? {
        Some(Message::Ok(listeners)) => Ok((stream, listeners)),
        Some(Message::Err(reason)) => Err(io::Error::other(reason)),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Registers `listeners` and holds on to the registration for ever: an agent that restarts gets them again.
pub async fn keep(
    socket: String,
    mut stream: Option<UnixStream>,
    listeners: Vec<(Role, OwnedFd)>,
    registered: watch::Sender<bool>,
) {
    let register = Message::Register(listeners);
    loop {
        match hold(&socket, stream.take(), &register, &registered).await {
            Ok(()) => tracing::info!("agent closed the handover stream"),
            Err(error) => tracing::warn!(%error, "listeners are not registered"),
        }
        registered.send_replace(false);
        tokio::time::sleep(RETRY).await;
    }
}

/// Returns when the agent has closed the stream.
async fn hold(
    socket: &str,
    stream: Option<UnixStream>,
    register: &Message,
    registered: &watch::Sender<bool>,
) -> io::Result<()> {
    let stream = stream.map_or_else(|| connect_abstract(socket), Ok)?;
    stream.set_nonblocking(true)?;
    let stream = tokio::net::UnixStream::from_std(stream)?;
    stream.async_io(Interest::WRITABLE, || send(stream.as_fd(), register)).await?;
    let answer = stream.async_io(Interest::READABLE, || recv(stream.as_fd()));
    match tokio::time::timeout(ANSWER_TIMEOUT, answer).await?? {
        Some(Message::Ok(_)) => {}
        Some(Message::Err(reason)) => return Err(io::Error::other(reason)),
        _ => return Err(io::ErrorKind::UnexpectedEof.into()),
    }
    tracing::info!("the pod's connections come here");
    registered.send_replace(true);
    while stream.async_io(Interest::READABLE, || recv(stream.as_fd())).await?.is_some() {}
    Ok(())
}
