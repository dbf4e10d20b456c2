//! Listening sockets, and where an accepted connection was going before it was captured.

use sluice_wire::{SIDECAR_INBOUND_PORT, SIDECAR_OUTBOUND_PORT, handover::Role};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};
use tokio::net::TcpStream;

/// Connections that may wait to be accepted, also while a sidecar restarts.
const BACKLOG: i32 = 4096;

/// Where accepted connections were going.
#[derive(Clone, Copy, Debug)]
pub enum Original {
    /// Captured connections keep their destination: it is the accepted socket's local address.
    LocalAddress,
    /// All to one destination: outside a pod nothing captures.
    Always(SocketAddr),
}

impl Original {
    pub fn of(self, stream: &TcpStream) -> io::Result<SocketAddr> {
        match self {
            Self::Always(address) => Ok(address),
            Self::LocalAddress => {
                let a = stream.local_addr()?;
                Ok(SocketAddr::new(a.ip().to_canonical(), a.port()))
            }
        }
    }
}

/// A listener of one worker.
#[derive(Debug)]
pub struct Listener {
    pub socket: std::net::TcpListener,
    pub outbound: bool,
    pub original: Original,
}

/// The address a listener of this role is bound to. Connections reach it by their own destination, not by this.
pub fn address(role: Role) -> SocketAddr {
    let port = if role.outbound() { SIDECAR_OUTBOUND_PORT } else { SIDECAR_INBOUND_PORT };
    match role {
        Role::Outbound4 | Role::Inbound4 => (Ipv4Addr::LOCALHOST, port).into(),
        Role::Outbound6 | Role::Inbound6 => (Ipv6Addr::LOCALHOST, port).into(),
    }
}

/// Listens at `address`, in one SO_REUSEPORT group with the other workers.
pub fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// One worker's listeners of all roles; IPv6 only where the machine has it.
pub fn listen_all() -> io::Result<Vec<(Role, std::net::TcpListener)>> {
    let mut all = Vec::new();
    for role in [Role::Outbound4, Role::Inbound4] {
        all.push((role, listen(address(role))?));
    }
    for role in [Role::Outbound6, Role::Inbound6] {
        match listen(address(role)) {
            Ok(l) => all.push((role, l)),
            Err(error) => tracing::debug!(%error, ?role, "no IPv6"),
        }
    }
    Ok(all)
}
