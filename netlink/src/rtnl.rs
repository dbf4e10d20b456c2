//! An rtnetlink socket: batches of requests with their acknowledgements, and dumps.

use crate::{Error, Netns, error::Result};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::{io, os::fd::AsFd};

/// Requests in one send: their acknowledgements must fit the receive buffer.
const BATCH: usize = 64;
/// Larger than the kernel's dump chunks (32 KiB).
const RECEIVE_BYTES: usize = 64 * 1024;

/// Belongs to the namespace in which it was opened and can be used from anywhere.
pub struct Connection {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// One request with its flags beyond REQUEST and ACK, and its words for an error.
pub(crate) struct Request {
    pub(crate) message: RouteNetlinkMessage,
    pub(crate) flags: u16,
    pub(crate) operation: String,
}

impl Connection {
    /// In the calling thread's namespace.
    pub fn open() -> Result<Self> {
        let failed = |e| Error::io("open", "an rtnetlink socket", e);
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;
        socket.set_cap_ack(true).map_err(failed)?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BYTES) })
    }

    pub fn open_in(netns: &Netns) -> Result<Self> {
        netns.run(Self::open)?
    }

    /// Cookie of the namespace that the connection belongs to.
    pub fn netns_cookie(&self) -> Result<u64> {
        crate::sock::netns_cookie(self.socket.as_fd())
    }

    /// Carries all out in order, also after a failure; answers in the same order.
    pub(crate) fn execute(&mut self, requests: Vec<Request>) -> Result<Vec<Result<()>>> {
        let mut answers = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let batch: Vec<Request> = requests.by_ref().take(BATCH).collect();
            answers.extend(self.execute_batch(batch)?);
        }
        Ok(answers)
    }

    fn execute_batch(&mut self, batch: Vec<Request>) -> Result<Vec<Result<()>>> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        let mut operations = Vec::with_capacity(batch.len());
        for request in batch {
            self.append(&mut bytes, request.message, request.flags | NLM_F_REQUEST | NLM_F_ACK);
            operations.push(request.operation);
        }
        self.socket.send(&bytes, 0).map_err(|e| Error::io("send to", "rtnetlink", e))?;
        let mut answers: Vec<Option<Result<()>>> = operations.iter().map(|_| None).collect();
        while answers.iter().any(Option::is_none) {
            self.receive(|message| {
                let slot = message.header.sequence_number.wrapping_sub(first) as usize;
                if let (NetlinkPayload::Error(e), Some(answer)) = (message.payload, answers.get_mut(slot)) {
                    let refused = || Error::Refused { operation: operations[slot].clone(), cause: e.to_io() };
                    *answer = Some(if e.code.is_none() { Ok(()) } else { Err(refused()) });
                }
                Ok(true)
            })?;
        }
        Ok(answers.into_iter().flatten().collect())
    }

    /// Asks for one object; an error of the kernel is an error.
    pub(crate) fn get(&mut self, message: RouteNetlinkMessage, operation: &str) -> Result<RouteNetlinkMessage> {
        let mut bytes = Vec::new();
        let sequence = self.append(&mut bytes, message, NLM_F_REQUEST);
        self.socket.send(&bytes, 0).map_err(|e| Error::io("send to", "rtnetlink", e))?;
        let mut found = None;
        while found.is_none() {
            self.receive(|message| {
                if message.header.sequence_number != sequence {
                    return Ok(true);
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => found = Some(inner),
                    NetlinkPayload::Error(e) => {
                        return Err(Error::Refused { operation: operation.to_owned(), cause: e.to_io() });
                    }
                    _ => {}
                }
                Ok(true)
            })?;
        }
        found.ok_or_else(|| Error::Answer(format!("nothing to: {operation}")))
    }

    /// All objects of a kind. What cannot be decoded is left out: newer kernels say more than we know.
    pub(crate) fn dump(&mut self, message: RouteNetlinkMessage, operation: &str) -> Result<Vec<RouteNetlinkMessage>> {
        let mut bytes = Vec::new();
        let sequence = self.append(&mut bytes, message, NLM_F_REQUEST | NLM_F_DUMP);
        self.socket.send(&bytes, 0).map_err(|e| Error::io("send to", "rtnetlink", e))?;
        let (mut all, mut done) = (Vec::new(), false);
        while !done {
            self.receive(|message| {
                if message.header.sequence_number != sequence {
                    return Ok(true);
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => all.push(inner),
                    NetlinkPayload::Done(_) => done = true,
                    NetlinkPayload::Error(e) => {
                        return Err(Error::Refused { operation: operation.to_owned(), cause: e.to_io() });
                    }
                    _ => {}
                }
                Ok(!done)
            })?;
        }
        Ok(all)
    }

    fn append(&mut self, bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..start + message.buffer_len()]);
        self.sequence
    }

    /// Reads one datagram and hands its messages to `take` until that says false.
    fn receive(&mut self, mut take: impl FnMut(NetlinkMessage<RouteNetlinkMessage>) -> Result<bool>) -> Result<()> {
        self.buffer.clear();
        let got = loop {
            match self.socket.recv(&mut self.buffer, 0) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => break other.map_err(|e| Error::io("receive from", "rtnetlink", e))?,
            }
        };
        for message in messages(&self.buffer[..got.min(self.buffer.len())]) {
            if let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message?)
                && !take(message)?
            {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// The netlink messages of one datagram; a length that cannot be ends it with an error.
pub(crate) fn messages(datagram: &[u8]) -> impl Iterator<Item = Result<&[u8]>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*rest.get(..16)?.first_chunk()?) as usize;
        if length < 16 || length > rest.len() {
            let wrong = Error::Answer(format!("a message of {length} bytes in {}", rest.len()));
            rest = &[];
            return Some(Err(wrong));
        }
        let message = &rest[..length];
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        Some(Ok(message))
    })
}
