//! How a sidecar hands its listening sockets to the agent and gets them back after a restart.
//!
//! A unix stream on the abstract socket [`SOCKET`] in the pod's network namespace. Each message is one `sendmsg`: a
//! verb, then one letter per descriptor, the descriptors as SCM_RIGHTS.
//!
//! ```text
//! sidecar → agent   T            are there listeners of my predecessor?
//! agent → sidecar   K oi         these (none: just K)
//! sidecar → agent   R oi         register these; my cgroup is from now on the pod's one exemption
//! agent → sidecar   K            they receive the pod's connections     or   E reason
//! ```
//!
//! The stream then stays open: its end is how the agent learns that the sidecar is gone. It keeps its duplicates of
//! the listeners for [`KEEP_S`] seconds, so that connections wait in the backlog for the next sidecar; after that they
//! are closed and the pod refuses.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// Abstract name, without the leading NUL.
pub const SOCKET: &str = "sluice-handover";
/// How long the agent keeps the listeners of a sidecar that went away.
pub const KEEP_S: u64 = 10;
/// Most descriptors in one message: two families, two directions, 16 workers.
pub const MAX_LISTENERS: usize = 64;

/// What a listener is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Outbound4,
    Outbound6,
    Inbound4,
    Inbound6,
}

impl Role {
    const ALL: [(Role, u8); 4] =
        [(Role::Outbound4, b'o'), (Role::Outbound6, b'p'), (Role::Inbound4, b'i'), (Role::Inbound6, b'j')];

    fn letter(self) -> u8 {
        Self::ALL.into_iter().find(|(r, _)| *r == self).map_or(b'?', |(_, l)| l)
    }

    fn from_letter(l: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, x)| *x == l).map(|(r, _)| r)
    }

    pub fn outbound(self) -> bool {
        matches!(self, Role::Outbound4 | Role::Outbound6)
    }
}

#[derive(Debug)]
pub enum Message {
    /// Sidecar asks for kept listeners.
    Take,
    /// Sidecar offers its listeners.
    Register(Vec<(Role, OwnedFd)>),
    /// Agent answers, with kept listeners after a Take.
    Ok(Vec<(Role, OwnedFd)>),
    /// Agent refuses, with the reason.
    Err(String),
}

/// Sends one message on a connected stream. On a non-blocking socket `WouldBlock` means nothing was sent.
pub fn send(stream: BorrowedFd<'_>, message: &Message) -> io::Result<()> {
    let (verb, listeners): (u8, &[(Role, OwnedFd)]) = match message {
        Message::Take => (b'T', &[]),
        Message::Register(l) => (b'R', l),
        Message::Ok(l) => (b'K', l),
        Message::Err(_) => (b'E', &[]),
    };
    let mut data = vec![verb];
    data.extend(listeners.iter().map(|(r, _)| r.letter()));
    if let Message::Err(reason) = message {
        data.extend(reason.bytes().take(1024));
    }
    let fds: Vec<_> = listeners.iter().map(|(_, fd)| fd.as_fd()).collect();
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_LISTENERS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("more than {MAX_LISTENERS} listeners")));
    }
    sendmsg(stream, &[IoSlice::new(&data)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one message; `None` when the other side has closed.
pub fn recv(stream: BorrowedFd<'_>) -> io::Result<Option<Message>> {
    let mut data = [0u8; 1 + 1024];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_LISTENERS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(stream, &mut [IoSliceMut::new(&mut data)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds: Vec<OwnedFd> = control
        .drain()
        .filter_map(|m| match m {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    match data[..got.bytes].split_first() {
        None => Ok(None),
        Some((verb, rest)) => parse(*verb, rest, fds).map(Some),
    }
}

fn parse(verb: u8, rest: &[u8], fds: Vec<OwnedFd>) -> io::Result<Message> {
    let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, format!("handover message: {what}"));
    if verb == b'E' {
        return Ok(Message::Err(String::from_utf8_lossy(rest).into_owned()));
    }
    if rest.len() != fds.len() {
        return Err(bad(format!("{} letters, {} descriptors", rest.len(), fds.len())));
    }
    let roles = rest
        .iter()
        .map(|l| Role::from_letter(*l).ok_or_else(|| bad(format!("letter {l:#x}"))))
        .collect::<io::Result<Vec<_>>>()?;
    let listeners = roles.into_iter().zip(fds).collect();
    match verb {
        b'T' => Ok(Message::Take),
        b'R' => Ok(Message::Register(listeners)),
        b'K' => Ok(Message::Ok(listeners)),
        v => Err(bad(format!("verb {v:#x}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, os::unix::net::UnixStream};

    #[test]
    fn descriptors_and_reasons_arrive_as_sent() {
        let (a, b) = UnixStream::pair().expect("pair");
        let fd: OwnedFd = File::open("/dev/null").expect("null").into();
        send(a.as_fd(), &Message::Register(vec![(Role::Outbound4, fd)])).expect("send");
        match recv(b.as_fd()).expect("recv") {
            Some(Message::Register(l)) => assert_eq!(l[0].0, Role::Outbound4),
            other => panic!("{other:?}"),
        }
        send(b.as_fd(), &Message::Err("no such pod".into())).expect("send");
        assert!(matches!(recv(a.as_fd()), Ok(Some(Message::Err(r))) if r == "no such pod"));
        drop(a);
        assert!(matches!(recv(b.as_fd()), Ok(None)));
    }

    #[test]
    fn malformed_messages_are_errors() {
        for (verb, rest) in [(b'R', &b"o"[..]), (b'R', b"z"), (b'?', b"")] {
            assert!(parse(verb, rest, vec![]).is_err());
        }
    }
}
