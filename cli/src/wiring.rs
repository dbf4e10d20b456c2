//! The network between the machines: a bridge in control's machine, a cable to each node.

use crate::machine::Machine;
use anyhow::{Context, Result};
use sluice_netlink::{Netns, lab};
use std::net::Ipv4Addr;

const BRIDGE: &str = "slcbr0";
const PREFIX_LEN: u8 = 24;

fn netns(m: &Machine) -> Result<Netns> {
    let path = m.netns().with_context(|| format!("machine {} is not running", m.name))?;
    Ok(Netns::open(path)?)
}

pub fn underlay(control: &Machine, ip: Ipv4Addr) -> Result<()> {
    Ok(lab::bridge(&netns(control)?, BRIDGE, ip.into(), PREFIX_LEN)?)
}

/// The hub's end of an earlier cable went away with the node's namespace.
pub fn connect(control: &Machine, node: &Machine, index: u8, ip: Ipv4Addr) -> Result<()> {
    let port = format!("slcnode{index}");
    Ok(lab::cable(&netns(control)?, BRIDGE, &port, &netns(node)?, "eth0", ip.into(), PREFIX_LEN)?)
}
