//! The abstract sockets inside a pod by which its sidecar finds the agent, and who sits on one that the agent cannot
//! have. While the agent is away any process of the pod can bind the name; whoever holds it then is told by name.

use crate::attest::{self, Peer};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use sluice_netlink::{Netns, listen_abstract_in};
use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::MetadataExt, net::UnixListener},
    },
};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("listen on @{name} inside the pod")]
    Listen {
        name: &'static str,
        #[source]
        cause: sluice_netlink::Error,
    },
    #[error("prepare the listener on @{name}")]
    Prepare {
        name: &'static str,
        #[source]
        cause: io::Error,
    },
    #[error("listen on @{name} inside the pod: an agent (process {pid}) still holds it")]
    OtherAgent { name: &'static str, pid: i32 },
    #[error(
        "listen on @{name} inside the pod: {holder} took this name, by which the sidecar looks for the agent; the pod is \
         closed until the name is free: end that process, or delete the pod"
    )]
    Squatted { name: &'static str, holder: String },
}

impl Error {
    /// A process of the pod stands where the sidecar expects the agent.
    pub fn squatted(&self) -> bool {
        matches!(self, Self::Squatted { .. })
    }
}

/// Listens, without blocking, on the abstract `name` inside the namespace.
pub fn listen(netns: &Netns, name: &'static str) -> Result<UnixListener, Error> {
    let listener = match listen_abstract_in(netns, name) {
        Err(cause) if cause.errno() == Some(rustix::io::Errno::ADDRINUSE.raw_os_error()) => {
            return Err(taken(name, holder(netns, name)));
        }
        other => other.map_err(|cause| Error::Listen { name, cause })?,
    };
    listener.set_nonblocking(true).map_err(|cause| Error::Prepare { name, cause })?;
    Ok(listener)
}

fn taken(name: &'static str, holder: Result<Peer, String>) -> Error {
    match holder {
        Ok(peer) if of_the_node(&peer) => Error::OtherAgent { name, pid: peer.pid },
        Ok(peer) => Error::Squatted { name, holder: format!("process {} of cgroup {}", peer.pid, peer.cgroup) },
        Err(why) => Error::Squatted { name, holder: format!("a process that cannot be named ({why})") },
    }
}

/// Who listens there. Never waits: a full backlog is an answer too.
fn holder(netns: &Netns, name: &str) -> Result<Peer, String> {
    let dial = || -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
        Ok(socket)
    };
    let stream = netns.run(dial).map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    let root = attest::cgroup_root().map_err(|e| e.to_string())?;
    attest::peer(stream.as_fd(), &root).map_err(|e| e.to_string())
}

/// In the network namespace of the node, as agents are and nothing inside a pod can be.
fn of_the_node(peer: &Peer) -> bool {
    let netns = |process: &str| {
        let m = fs::metadata(format!("/proc/{process}/ns/net")).ok()?;
        Some((m.dev(), m.ino()))
    };
    let (theirs, ours) = (netns(&peer.pid.to_string()), netns("self"));
    // Only then was it read of that process, and not of a later one with the same number.
    theirs.is_some() && theirs == ours && !attest::ended(&peer.pidfd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_agent_is_not_taken_for_a_process_of_the_pod() {
        const NAME: &str = "sluice-test-socket";
        let home = Netns::current().expect("current");
        let first = listen(&home, NAME).expect("free");
        let error = listen(&home, NAME).expect_err("taken");
        assert!(matches!(error, Error::OtherAgent { pid, .. } if pid == std::process::id() as i32), "{error}");
        drop(first);
        listen(&home, NAME).expect("free again");
    }

    #[test]
    fn whoever_cannot_be_named_counts_as_a_process_of_the_pod() {
        let error = taken("sluice", Err("connection refused".into()));
        assert!(error.squatted());
        let text = error.to_string();
        assert!(text.contains("@sluice") && text.contains("connection refused") && text.contains("delete the pod"));
    }
}
