//! Sockets of a namespace as the kernel lists them (sock_diag(7)), and closing them from outside (SOCK_DESTROY).

use crate::{Error, error::Result};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_UDP, SOCK_DESTROY, SOCK_DIAG_BY_FAMILY, SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use std::{io, net};

/// Larger than the kernel's dump chunks (32 KiB).
const RECEIVE_BYTES: usize = 64 * 1024;

/// A connected UDP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    /// What `SO_COOKIE` says of it.
    pub cookie: u64,
    /// Where it is connected to, IPv4 also from an IPv6 socket.
    pub peer: net::SocketAddr,
    family: u8,
    id: SocketId,
}

/// The sockets of the namespace in which it was opened.
pub struct Sockets {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Sockets {
    /// Of the calling thread's namespace.
    pub fn open() -> Result<Self> {
        let failed = |e| Error::io("open", "a sock_diag socket", e);
        let mut socket = Socket::new(NETLINK_SOCK_DIAG).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;
        Ok(Self { socket, buffer: Vec::with_capacity(RECEIVE_BYTES) })
    }

    /// All that are connected, in both families.
    pub fn connected_udp(&mut self) -> Result<Vec<Connected>> {
        let mut all = self.dump(AF_INET, SocketId::new_v4())?;
        all.extend(self.dump(AF_INET6, SocketId::new_v6())?);
        Ok(all)
    }

    /// Whoever waits on it is told ECONNABORTED. False when it was closed meanwhile.
    pub fn destroy(&mut self, target: &Connected) -> Result<bool> {
        self.send(request(target.family, target.id.clone()), SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK)?;
        let operation = || format!("close the UDP socket to {}", target.peer);
        let mut answer = None;
        while answer.is_none() {
            self.receive(|payload| match payload {
                NetlinkPayload::Error(e) => answer = Some(e.code.map(|_| e.to_io())),
                NetlinkPayload::Done(_) => answer = Some(None),
                _ => {}
            })?;
        }
        match answer.flatten() {
            None => Ok(true),
            Some(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Some(cause) => Err(Error::Refused { operation: operation(), cause }),
        }
    }

    fn dump(&mut self, family: u8, id: SocketId) -> Result<Vec<Connected>> {
        self.send(request(family, id), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP)?;
        let (mut all, mut done) = (Vec::new(), false);
        let mut refused = None;
        while !done {
            self.receive(|payload| match payload {
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(r)) => {
                    let id = r.header.socket_id.clone();
                    let peer = net::SocketAddr::new(id.destination_address.to_canonical(), id.destination_port);
                    all.push(Connected { cookie: u64::from_le_bytes(id.cookie), peer, family, id });
                }
                NetlinkPayload::Error(e) => (refused, done) = (Some(e.to_io()), true),
                NetlinkPayload::Done(_) => done = true,
                _ => {}
            })?;
        }
        let failed = |cause| Error::Refused { operation: "list connected UDP sockets".to_owned(), cause };
        refused.map_or(Ok(all), |cause| Err(failed(cause)))
    }

    fn send(&mut self, request: InetRequest, kind: u16, flags: u16) -> Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(SockDiagMessage::InetRequest(request)));
        message.finalize();
        message.header.message_type = kind;
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop).map_err(|e| Error::io("send to", "sock_diag", e))
    }

    /// Reads one datagram and hands its messages on; those that cannot be decoded are left out.
    fn receive(&mut self, mut take: impl FnMut(NetlinkPayload<SockDiagMessage>)) -> Result<()> {
        self.buffer.clear();
        let got = loop {
            match self.socket.recv(&mut self.buffer, 0) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => break other.map_err(|e| Error::io("receive from", "sock_diag", e))?,
            }
        };
        for message in crate::rtnl::messages(&self.buffer[..got.min(self.buffer.len())]) {
            if let Ok(message) = NetlinkMessage::<SockDiagMessage>::deserialize(message?) {
                take(message.payload);
            }
        }
        Ok(())
    }
}

fn request(family: u8, socket_id: SocketId) -> InetRequest {
    let states = StateFlags::ESTABLISHED;
    InetRequest { family, protocol: IPPROTO_UDP, extensions: ExtensionFlags::empty(), states, socket_id }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ns::{Unshare, unshare};
    use std::net::UdpSocket;

    /// In a namespace of its own: the thread ends with the test.
    #[test]
    fn one_socket_is_closed_and_no_other() {
        unshare(Unshare { net: true, ..Unshare::default() }).expect("needs root");
        crate::lab::loopback_up().expect("lo");
        let server = UdpSocket::bind("127.0.0.1:0").expect("bind");
        let to = server.local_addr().expect("address");
        let [plain, mapped, other] = ["127.0.0.1:0", "[::]:0", "127.0.0.1:0"].map(|a| UdpSocket::bind(a).expect(a));
        plain.connect(to).expect("connect");
        mapped
            .connect((format!("::ffff:{}", to.ip()).parse::<net::IpAddr>().expect("mapped"), to.port()))
            .expect("connect");
        other.connect(to).expect("connect");
        let mut sockets = Sockets::open().expect("sock_diag");
        let all = sockets.connected_udp().expect("list");
        assert_eq!(all.iter().filter(|c| c.peer == to).count(), 3, "{all:?}");
        for socket in [&plain, &mapped] {
            let from = socket.local_addr().expect("address").port();
            let found = all.iter().find(|c| c.id.source_port == from).expect("listed");
            assert!(sockets.destroy(found).expect("closed"));
            let error = socket.recv(&mut [0; 8]).expect_err("told");
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
            assert!(!sockets.destroy(found).expect("nothing is left to close"));
        }
        other.send(b"?").expect("send");
        assert_eq!(server.recv(&mut [0; 8]).expect("recv"), 1);
    }
}
