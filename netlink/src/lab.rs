//! The network of simulated machines: a bridge as the underlay, a cable from it into a machine. For the local cluster and
//! for tests; nothing here runs on a real node.

use crate::{
    Connection, Error, Netns, announce,
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
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
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

/// Makes one end of a virtual link behave as a network card does: it computes checksums when it sends, and takes what a
/// program in the driver of the other end sends back, as long as the answer lives. In the calling thread's namespace.
pub fn as_card(name: &str) -> Result<OwnedFd> {
    send_checksums_in_full(name)?;
    let link = index(&mut Connection::open()?, name)?;
    let failed = |e| Error::io("put a program on", name, e);
    // veth hands packets from XDP on only where the receiving end has a program too: `r0 = XDP_PASS; exit`.
    let code: [u64; 2] = [0xb7 | 2 << 32, 0x95];
    let license = c"GPL";
    let load = [XDP | 2 << 32, code.as_ptr() as u64, license.as_ptr() as u64];
    // SAFETY: the head of `union bpf_attr` for the command, with pointers to what is alive here.
    let program = unsafe { bpf(PROG_LOAD, &load) }.map_err(failed)?;
    let create = [program.as_raw_fd() as u64 | u64::from(link) << 32, AT_XDP | IN_DRIVER << 32];
    // SAFETY: as above; integers only.
    unsafe { bpf(LINK_CREATE, &create) }.map_err(failed)
}

// linux/bpf.h, linux/if_link.h, linux/ethtool.h
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const XDP: u64 = 6;
const AT_XDP: u64 = 37;
const IN_DRIVER: u64 = 4;
const ETHTOOL_STXCSUM: u32 = 0x17;
const SIOCETHTOOL: libc::Ioctl = 0x8946;

/// # Safety
/// `attribute` begins as the kernel's `union bpf_attr` does for the command; pointers in it are valid for the call.
unsafe fn bpf(command: libc::c_long, attribute: &[u64]) -> std::io::Result<OwnedFd> {
    // SAFETY: by the contract; what the command answers is a descriptor that nobody else holds.
    unsafe {
        let fd = libc::syscall(libc::SYS_bpf, command, attribute.as_ptr(), size_of_val(attribute));
        if fd < 0 { Err(std::io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd as i32)) }
    }
}

fn send_checksums_in_full(name: &str) -> Result<()> {
    let failed = |e| Error::io("change settings of", name, e);
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").map_err(failed)?;
    let mut setting = [ETHTOOL_STXCSUM, 0];
    // SAFETY: integers and pointers; all zeroes are one of them.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = setting.as_mut_ptr().cast();
    // SAFETY: the kernel reads a name and two words, both alive.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } != 0 {
        return Err(failed(std::io::Error::last_os_error()));
    }
    Ok(())
}

/// Sends a frame as it is over a link of the calling thread's namespace.
pub fn send_frame(link: u32, frame: &[u8]) -> Result<()> {
    let header = frame.first_chunk::<14>().ok_or_else(|| Error::Answer("a frame without its header".into()))?;
    let [a, b, c, d, e, f, .., x, y] = *header;
    let sent = announce::send(link, u16::from_be_bytes([x, y]), [a, b, c, d, e, f], frame);
    sent.map_err(|e| Error::io("send a frame over", link, e))
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
