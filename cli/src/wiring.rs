//! The network between the machines: a bridge in control's machine, a cable to each node.

use crate::{cluster::Family, machine::Machine};
use anyhow::{Context, Result};
use sluice_netlink::{Netns, lab};

const BRIDGE: &str = "slcbr0";
const UPLINK: &str = "eth0";

fn netns(m: &Machine) -> Result<Netns> {
    let path = m.netns().with_context(|| format!("machine {} is not running", m.name))?;
    Ok(Netns::open(path)?)
}

/// The bridge, with the host's address of each family.
pub fn underlay(control: &Machine, families: &[Family], host: u8) -> Result<()> {
    let at = netns(control)?;
    let (first, rest) = families.split_first().context("a cluster has a family of addresses")?;
    lab::bridge(&at, BRIDGE, first.host(host), first.prefix_len())?;
    addresses(&at, BRIDGE, rest, host)
}

/// The hub's end of an earlier cable went away with the node's namespace.
pub fn connect(control: &Machine, node: &Machine, index: u8, families: &[Family], host: u8) -> Result<()> {
    let (hub, at, port) = (netns(control)?, netns(node)?, format!("slcnode{index}"));
    let (first, rest) = families.split_first().context("a cluster has a family of addresses")?;
    lab::cable(&hub, BRIDGE, &port, &at, UPLINK, first.host(host), first.prefix_len())?;
    addresses(&at, UPLINK, rest, host)
}

fn addresses(at: &Netns, link: &str, families: &[Family], host: u8) -> Result<()> {
    families.iter().try_for_each(|f| Ok(lab::address(at, link, f.host(host), f.prefix_len())?))
}
