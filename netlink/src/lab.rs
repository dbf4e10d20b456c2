//! The network of simulated machines: a bridge as the underlay, a cable from it into a machine. For the local cluster and
//! for tests; nothing here runs on a real node.

use crate::{
    Connection, Error, Netns,
    error::Result,
    kernel, link,
    plan::{Address, LO, Operation, Prefix},
    rtnl::Request,
};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage as Message,
    link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage},
};
use std::{
    net::IpAddr,
    os::fd::{AsFd, AsRawFd},
    time::{Duration, Instant},
};

/// Both ends of a cable must see the carrier before the first packet, or it is lost and costs a second.
const CARRIER_WAIT: Duration = Duration::from_secs(5);

/// In the calling thread's namespace.
pub fn loopback_up() -> Result<()> {
    kernel::apply(&mut Connection::open()?, &[Operation::SetUp(LO)])
}

fn new_link(c: &mut Connection, attributes: Vec<LinkAttribute>, what: String) -> Result<()> {
    let mut message = LinkMessage::default();
    message.attributes = attributes;
    let request = Request { message: Message::NewLink(message), flags: NLM_F_CREATE | NLM_F_EXCL, operation: what };
    c.execute(vec![request])?.into_iter().collect::<Result<Vec<()>>>().map(drop)
}

fn index(c: &mut Connection, name: &str) -> Result<u32> {
    link::find(c, name)?.map(|l| l.index).ok_or_else(|| Error::Answer(format!("link {name} is not there")))
}

fn address_up(c: &mut Connection, link: u32, address: IpAddr, len: u8) -> Result<()> {
    let prefix = Prefix { address, len };
    kernel::apply(c, &[Operation::AddAddress(Address { link, prefix }), Operation::SetUp(link)])
}

/// A further address of a link in `machine`.
pub fn address(machine: &Netns, name: &str, address: IpAddr, len: u8) -> Result<()> {
    let mut c = Connection::open_in(machine)?;
    let link = index(&mut c, name)?;
    address_up(&mut c, link, address, len)
}

/// A bridge with an address in `machine`.
pub fn bridge(machine: &Netns, name: &str, address: IpAddr, len: u8) -> Result<()> {
    let mut c = Connection::open_in(machine)?;
    let kind = LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]);
    new_link(&mut c, vec![LinkAttribute::IfName(name.to_owned()), kind], format!("make bridge {name}"))?;
    let link = index(&mut c, name)?;
    address_up(&mut c, link, address, len)
}

/// A veth pair: `port` on the bridge in `hub`, `eth` with an address in `machine`. Returns when the carrier is there.
pub fn cable(
    hub: &Netns,
    bridge: &str,
    port: &str,
    machine: &Netns,
    eth: &str,
    address: IpAddr,
    len: u8,
) -> Result<()> {
    let mut at_hub = Connection::open_in(hub)?;
    let mut at_machine = Connection::open_in(machine)?;
    let master = index(&mut at_hub, bridge)?;
    let mut peer = LinkMessage::default();
    peer.attributes = vec![LinkAttribute::IfName(eth.to_owned()), LinkAttribute::NetNsFd(machine.as_fd().as_raw_fd())];
    let info = vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer)))];
    let attributes =
        vec![LinkAttribute::IfName(port.to_owned()), LinkAttribute::Controller(master), LinkAttribute::LinkInfo(info)];
    new_link(&mut at_hub, attributes, format!("make cable {port} into {}", machine.path().display()))?;
    let here = index(&mut at_hub, port)?;
    kernel::apply(&mut at_hub, &[Operation::SetUp(here)])?;
    let there = index(&mut at_machine, eth)?;
    address_up(&mut at_machine, there, address, len)?;
    for (c, name) in [(&mut at_hub, port), (&mut at_machine, eth)] {
        wait_carrier(c, name)?;
    }
    Ok(())
}

fn wait_carrier(c: &mut Connection, name: &str) -> Result<()> {
    let until = Instant::now() + CARRIER_WAIT;
    while !link::carrier(c, name)? {
        if Instant::now() > until {
            return Err(Error::Answer(format!("link {name} has no carrier")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
