//! veth pairs: made with the peer directly in the pod's namespace, found by name, deleted.

pub use crate::device::{Device, devices};
use crate::{Connection, Error, Netns, error::Result, plan::GATEWAY_MAC, rtnl::Request};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage as Message,
    link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, State as LinkState},
};
use std::os::fd::{AsFd, AsRawFd};

/// A veth pair to make.
#[derive(Clone, Debug)]
pub struct Veth<'a> {
    /// Name on the node's side.
    pub host: &'a str,
    /// Name on the pod's side.
    pub pod: &'a str,
    pub pod_mac: [u8; 6],
    /// `None`: the kernel's default.
    pub mtu: Option<u32>,
}

/// A link that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub index: u32,
    pub up: bool,
    pub mac: Option<[u8; 6]>,
    pub mtu: Option<u32>,
}

/// Makes the pair, the node's end in the connection's namespace. EEXIST is an error here.
pub fn make_veth(connection: &mut Connection, netns: &Netns, veth: &Veth<'_>) -> Result<()> {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(veth.pod.to_owned()),
        LinkAttribute::Address(veth.pod_mac.to_vec()),
        LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd()),
    ];
    peer.attributes.extend(veth.mtu.map(LinkAttribute::Mtu));
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(veth.host.to_owned()),
        LinkAttribute::Address(GATEWAY_MAC.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    message.attributes.extend(veth.mtu.map(LinkAttribute::Mtu));
    let operation = format!("make link {} with {} in {}", veth.host, veth.pod, netns.path().display());
    one(connection, Message::NewLink(message), NLM_F_CREATE | NLM_F_EXCL, operation)
}

/// The link of that name in the connection's namespace.
pub fn find(connection: &mut Connection, name: &str) -> Result<Option<Found>> {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    match connection.get(Message::GetLink(message), &format!("find link {name}")) {
        Ok(Message::NewLink(m)) => Ok(Some(found(&m))),
        Ok(other) => Err(Error::Answer(format!("{other:?} to a question for link {name}"))),
        Err(e) if e.errno() == Some(libc::ENODEV) => Ok(None),
        Err(e) => Err(e),
    }
}

fn found(m: &LinkMessage) -> Found {
    let mac = m.attributes.iter().find_map(|a| match a {
        LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok(),
        _ => None,
    });
    let mtu = m.attributes.iter().find_map(|a| match a {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    Found { index: m.header.index, up: m.header.flags.contains(LinkFlags::Up), mac, mtu }
}

/// The link is operationally up (RFC 2863): packets pass.
pub fn carrier(connection: &mut Connection, name: &str) -> Result<bool> {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    let Message::NewLink(m) = connection.get(Message::GetLink(message), &format!("find link {name}"))? else {
        return Ok(false);
    };
    Ok(m.attributes.iter().any(|a| matches!(a, LinkAttribute::OperState(LinkState::Up))))
}

/// All links of the connection's namespace, by name.
pub fn all(connection: &mut Connection) -> Result<Vec<(String, Found)>> {
    let messages = connection.dump(Message::GetLink(LinkMessage::default()), "list links")?;
    let links = messages.into_iter().filter_map(|m| match m {
        Message::NewLink(m) => Some((name(&m)?.to_owned(), found(&m))),
        _ => None,
    });
    Ok(links.collect())
}

pub(crate) fn name(m: &LinkMessage) -> Option<&str> {
    m.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

/// Deletes a link; false when it was not there.
pub fn delete(connection: &mut Connection, index: u32) -> Result<bool> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    match one(connection, Message::DelLink(message), 0, format!("delete link {index}")) {
        Ok(()) => Ok(true),
        Err(e) if e.errno() == Some(libc::ENODEV) => Ok(false),
        Err(e) => Err(e),
    }
}

fn one(connection: &mut Connection, message: Message, flags: u16, operation: String) -> Result<()> {
    let answers = connection.execute(vec![Request { message, flags, operation }])?;
    answers.into_iter().collect::<Result<Vec<()>>>().map(drop)
}
