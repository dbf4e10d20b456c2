//! A caller, a node and a pod behind it, each a network namespace: the caller reaches the pod, and addresses that lead to
//! it, only through the node, which forwards. With the programs at the node's links, or without.

use anyhow::Context;
use sluice_ebpf::{
    addr,
    common::PodAddr,
    loader::{self, POD_PACKETS},
    maps::{NodeMaps, PodMaps, pin_dir},
};
use sluice_netlink::{
    Connection, Netns,
    filter::{self, Direction},
    lab, link, ns,
};
use std::{
    fs,
    net::Ipv4Addr,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
};

pub const POD: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 2);
const TO_POD: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 1);
const CALLER: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 2);
const TO_CALLER: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 1);

/// Gone with it.
pub struct Outside {
    paths: [PathBuf; 3],
    pub caller: Netns,
    pub node: Netns,
    pub pod: Netns,
}

impl Outside {
    /// Three namespaces in the folder, whose names begin with `name`.
    pub fn new(base: &Path, name: &str) -> anyhow::Result<Self> {
        let paths = ["caller", "node", "pod"].map(|part| base.join(format!("{name}-{part}")));
        let [caller, node, pod] = paths.each_ref().map(|path| ns::make_named(path));
        let all = Self { paths, caller: caller?, node: node?, pod: pod? };
        all.join("wire0", TO_CALLER, &all.caller, CALLER)?;
        all.join("pod0", TO_POD, &all.pod, POD)?;
        all.node.run(|| fs::write("/proc/sys/net/ipv4/ip_forward", "1"))?.context("forward")?;
        Ok(all)
    }

    /// A cable from the node to one of the other two, whose only way the node is.
    fn join(&self, name: &str, here: Ipv4Addr, machine: &Netns, there: Ipv4Addr) -> anyhow::Result<()> {
        let veth = link::Veth { host: name, pod: "eth0", pod_mac: [2, 0, 0, 0, 0, there.octets()[2]], mtu: None };
        link::make_veth(&mut Connection::open_in(&self.node)?, machine, &veth)?;
        lab::address(&self.node, name, here.into(), 24)?;
        lab::address(machine, "eth0", there.into(), 24)?;
        let via = here.to_string();
        let mut ip = Command::new("ip");
        let status = machine.run(|| ip.args(["route", "add", "default", "via", &via]).status())??;
        anyhow::ensure!(status.success(), "no way by {via} in {}", machine.path().display());
        Ok(())
    }

    /// Puts the loaded programs on the node's links, and says to them what the node and its pod are.
    pub fn attach(&self, bpffs: &Path) -> anyhow::Result<()> {
        let mut connection = Connection::open_in(&self.node)?;
        let mut index = |name: &str| link::find(&mut connection, name)?.map(|l| l.index).context("a link of the node");
        let (wire, pod) = (index("wire0")?, index("pod0")?);
        let dir = pin_dir(bpffs);
        PodMaps::open(&dir)?
            .addrs
            .set(&addr(POD.into()), &PodAddr { netns: self.pod.cookie()?, flags: 0, ifindex: pod })?;
        let locals = NodeMaps::open(&dir)?.locals;
        [TO_CALLER, TO_POD].iter().try_for_each(|own| locals.set(&addr((*own).into()), &1))?;
        for packets in POD_PACKETS {
            let direction = if packets.ingress { Direction::Ingress } else { Direction::Egress };
            let program = loader::packet_program(bpffs, packets.program)?;
            filter::attach_all(&mut connection, pod, &[(direction, packets.program, program.as_fd())])?;
        }
        self.node.run(|| loader::attach_device(bpffs, wire))??;
        Ok(())
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        for path in &self.paths {
            // What cannot be undone is left to the next boot.
            let _ = ns::remove_named(path);
        }
    }
}
