//! The node's own links and addresses, as the packet programs need to know them: who has programs, which addresses are
//! ours, which the cluster's, which we announce.

use super::{Error, describe};
use sluice_cni::packets;
use sluice_ebpf::{
    addr,
    common::{Addr, CLUSTER_ADJACENT, CLUSTER_NODE, Device, Range},
    loader,
    maps::{HashMap, NodeMaps, pin_dir},
};
use sluice_model::Snapshot;
use sluice_netlink::{
    Connection, announce, kernel, link as device,
    plan::{Address, Prefix},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::{Path, PathBuf},
};

/// What the maps should say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wanted {
    locals: BTreeSet<Addr>,
    cluster: BTreeMap<Range, u32>,
    devices: BTreeMap<u32, Device>,
    announced: BTreeSet<Addr>,
}

/// How programs are put on the node's own links.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ways {
    /// As filters.
    pub(super) clsact: bool,
    /// Also in drivers.
    pub(super) xdp: bool,
}

pub(super) struct Ports {
    bpffs: PathBuf,
    maps: NodeMaps,
    /// Ranges that pods reach under their own address, beyond the cluster's own.
    excluded: Vec<Prefix>,
    /// How often each address is still to be made known.
    to_announce: BTreeMap<IpAddr, u32>,
    ways: Ways,
    /// Links that this process has put programs on.
    attached: BTreeSet<u32>,
    /// Links whose drivers have been asked to take the program for XDP, or to let go of it.
    asked: BTreeSet<u32>,
}

/// An announcement may be lost; RFC 5227 §2.3 sends two.
const ANNOUNCEMENTS: u32 = 3;

impl Ports {
    pub(super) fn open(bpffs: &Path, excluded: Vec<Prefix>, ways: Ways) -> Result<Self, sluice_ebpf::Error> {
        let maps = NodeMaps::open(&pin_dir(bpffs))?;
        let (attached, asked) = (BTreeSet::new(), BTreeSet::new());
        Ok(Self { bpffs: bpffs.to_owned(), maps, excluded, to_announce: BTreeMap::new(), ways, attached, asked })
    }

    /// Programs are filters.
    pub(super) fn clsact(&self) -> bool {
        self.ways.clsact
    }

    /// After the pins were made anew.
    pub(super) fn reopen(&mut self) -> Result<(), sluice_ebpf::Error> {
        self.maps = NodeMaps::open(&pin_dir(&self.bpffs))?;
        self.attached.clear();
        self.asked.clear();
        Ok(())
    }

    /// Brings maps and attachments to the node as it is; what had to be done. Without a snapshot, ranges and announced
    /// addresses stay what they are.
    pub(super) fn reconcile(
        &mut self,
        connection: &mut Connection,
        snapshot: Option<&Snapshot>,
        node: &str,
        adjacent: &BTreeSet<Prefix>,
    ) -> Result<Vec<String>, Error> {
        let devices = device::devices(connection).map_err(Error::Node)?;
        let addresses = kernel::read_addresses(connection).map_err(Error::Node)?;
        let mut wanted = wanted(&devices, &addresses, snapshot, node, &self.excluded);
        mark_adjacent(&mut wanted.cluster, adjacent);
        let mut done = bring_maps(&self.maps, &wanted, snapshot.is_some()).map_err(Error::Ports)?;
        if snapshot.is_some() {
            self.announce(&wanted.announced)?;
        }
        self.attach(&wanted, &mut done)?;
        for (ip, left) in &mut self.to_announce {
            for device in devices.iter().filter(|d| d.kind.as_deref() != Some("vxlan")) {
                // Best effort: whoever asks is answered.
                let _ = announce::announce(device.index, device.mac, *ip);
            }
            *left -= 1;
        }
        self.to_announce.retain(|_, left| *left > 0);
        Ok(done)
    }

    /// Takes over what is new: told to the network a few times.
    fn announce(&mut self, wanted: &BTreeSet<Addr>) -> Result<(), Error> {
        let before: BTreeSet<Addr> =
            self.maps.announced.entries().map_err(Error::Ports)?.into_iter().map(|(a, _)| a).collect();
        bring_set(&self.maps.announced, wanted).map_err(Error::Ports)?;
        let fresh = wanted.difference(&before).map(|a| (sluice_ebpf::ip(*a), ANNOUNCEMENTS));
        self.to_announce.extend(fresh);
        self.to_announce.retain(|ip, _| wanted.contains(&addr(*ip)));
        Ok(())
    }

    fn attach(&mut self, wanted: &Wanted, done: &mut Vec<String>) -> Result<(), Error> {
        let attached = loader::attached_devices(&self.bpffs).map_err(Error::Ports)?;
        let gone: BTreeSet<u32> =
            attached.union(&self.attached).filter(|i| !wanted.devices.contains_key(i)).copied().collect();
        for index in gone {
            packets::detach_device(&self.bpffs, index).map_err(Error::Packets)?;
            self.attached.remove(&index);
            self.asked.remove(&index);
            done.push(format!("programs of link {index}, which is no link of the node's any more"));
        }
        for index in wanted.devices.keys() {
            // Filters have no pins: what an agent before us has put there is replaced once.
            if self.ways.clsact && self.attached.contains(index) {
                continue;
            }
            if packets::attach_device(&self.bpffs, *index, self.ways.clsact).map_err(Error::Packets)? {
                done.push(format!("link {index} had no programs"));
            }
            self.attached.insert(*index);
        }
        let unasked: Vec<u32> = wanted.devices.keys().filter(|i| !self.asked.contains(i)).copied().collect();
        for index in unasked {
            self.asked.insert(index);
            if !self.ways.xdp {
                loader::detach_xdp(&self.bpffs, index).map_err(Error::Ports)?;
            } else if let Err(why) = loader::attach_xdp(&self.bpffs, index) {
                // `from_wire` does all that it would have done.
                done.push(format!("link {index} goes without XDP: {}", describe(&why)));
            }
        }
        Ok(())
    }
}

/// The maps alone, before programs run on them. What was announced before is no news to the network.
pub(super) fn fill(
    bpffs: &Path,
    connection: &mut Connection,
    snapshot: &Snapshot,
    node: &str,
    excluded: &[Prefix],
) -> Result<(), Error> {
    let devices = device::devices(connection).map_err(Error::Node)?;
    let addresses = kernel::read_addresses(connection).map_err(Error::Node)?;
    let wanted = wanted(&devices, &addresses, Some(snapshot), node, excluded);
    let bring = |maps: NodeMaps| {
        bring_maps(&maps, &wanted, true)?;
        bring_set(&maps.announced, &wanted.announced).map(drop)
    };
    NodeMaps::open(&pin_dir(bpffs)).and_then(bring).map_err(Error::Ports)
}

/// All but the announced addresses; what had to be done.
fn bring_maps(maps: &NodeMaps, wanted: &Wanted, told: bool) -> Result<Vec<String>, sluice_ebpf::Error> {
    let mut done = Vec::new();
    note(&mut done, bring_set(&maps.locals, &wanted.locals)?, "addresses of the node");
    note(&mut done, bring(&maps.devices, &wanted.devices)?, "links of the node");
    if told {
        note(&mut done, bring(&maps.cluster, &wanted.cluster)?, "ranges of the cluster");
    }
    Ok(done)
}

fn note(done: &mut Vec<String>, count: usize, what: &str) {
    if count > 0 {
        done.push(format!("{count} {what}"));
    }
}

/// PURE.
fn wanted(
    devices: &[device::Device],
    addresses: &BTreeSet<Address>,
    snapshot: Option<&Snapshot>,
    node: &str,
    excluded: &[Prefix],
) -> Wanted {
    let mut out = Wanted::default();
    let usable = |a: &Addr| !a.is_loopback() && !a.is_link_local() && !a.is_multicast();
    out.locals = addresses.iter().map(|a| addr(a.prefix.address)).filter(usable).collect();
    let nodes = || snapshot.into_iter().flat_map(Snapshot::nodes);
    let own = nodes().find(|n| n.name.name == node);
    let own_address = |v4: bool| own.and_then(|n| n.addresses.iter().copied().find(|a| a.is_ipv4() == v4));
    for d in devices.iter().filter(|d| !d.addresses.is_empty() || d.kind.as_deref() == Some("vxlan")) {
        // A link without an address of a family sends from the node's own, as the kernel does.
        let of = |v4| d.primary(v4).or_else(|| own_address(v4)).map_or(Addr::UNSET, addr);
        out.devices.insert(d.index, Device { addr4: of(true), addr6: of(false), mac: d.mac, pad: 0 });
    }
    let ranges = nodes().flat_map(|n| n.pod_cidrs.iter().filter_map(|c| c.parse::<Prefix>().ok()));
    let addresses = nodes().flat_map(|n| n.addresses.iter().map(|a| Prefix::host(*a)));
    out.cluster = ranges.chain(excluded.iter().copied()).map(|r| (range(r), 1)).collect();
    out.cluster.extend(addresses.map(|a| (range(a), 1 | CLUSTER_NODE)));
    let announced = snapshot.into_iter().flat_map(Snapshot::services).flat_map(|s| &s.announcements);
    out.announced = announced.filter(|a| a.node == node).map(|a| addr(a.address)).collect();
    out
}

fn mark_adjacent(cluster: &mut BTreeMap<Range, u32>, adjacent: &BTreeSet<Prefix>) {
    for prefix in adjacent {
        if let Some(flags) = cluster.get_mut(&range(*prefix)) {
            *flags |= CLUSTER_ADJACENT;
        }
    }
}

fn range(p: Prefix) -> Range {
    let len = u32::from(p.len) + if p.address.is_ipv4() { 96 } else { 0 };
    Range { len, addr: addr(p.address) }
}

/// The number of entries that were different.
fn bring<K: sluice_ebpf::common::Plain + Ord, V: sluice_ebpf::common::Plain + PartialEq>(
    map: &HashMap<K, V>,
    wanted: &BTreeMap<K, V>,
) -> Result<usize, sluice_ebpf::Error> {
    let present: BTreeMap<K, V> = map.all()?.into_iter().collect();
    let mut changed = 0;
    for (key, value) in wanted.iter().filter(|(k, v)| present.get(k) != Some(v)) {
        map.set(key, value)?;
        changed += 1;
    }
    for key in present.keys().filter(|k| !wanted.contains_key(k)) {
        map.remove(key)?;
        changed += 1;
    }
    Ok(changed)
}

fn bring_set<K: sluice_ebpf::common::Plain + Ord>(
    map: &HashMap<K, u32>,
    wanted: &BTreeSet<K>,
) -> Result<usize, sluice_ebpf::Error> {
    bring(map, &wanted.iter().map(|k| (*k, 1)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::{Announcement, Name, Node, Resource, Revision, Service};

    /// With the address's own bits, as on a link.
    fn prefix(text: &str) -> Prefix {
        let (address, len) = text.split_once('/').expect(text);
        Prefix { address: ip(address), len: len.parse().expect(text) }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    #[test]
    fn the_node_as_programs_need_to_know_it() {
        let device = |index, kind: Option<&str>, addresses: &[&str]| device::Device {
            index,
            name: format!("eth{index}"),
            kind: kind.map(str::to_owned),
            mac: [2, 0, 0, 0, 0, index as u8],
            mtu: 1500,
            addresses: addresses.iter().map(|a| prefix(a)).collect(),
        };
        let devices = [
            device(2, None, &["192.0.2.1/24", "192.0.2.9/24"]),
            device(3, Some("vxlan"), &[]),
            device(4, Some("bridge"), &[]),
        ];
        let texts = ["127.0.0.1/8", "169.254.1.1/32", "192.0.2.1/24", "fe80::1/64", "fd00::1/64"];
        let addresses: BTreeSet<Address> = texts.iter().map(|t| Address { link: 2, prefix: prefix(t) }).collect();
        let node = |name: &str, address: &str, range: &str| {
            Resource::Node(Node {
                name: Name::cluster(name),
                addresses: vec![ip(address)],
                pod_cidrs: vec![range.to_owned()],
                zone: String::new(),
                ready: true,
            })
        };
        let announcement = |address, node: &str| Announcement { address: ip(address), node: node.to_owned() };
        let service = Service {
            name: Name::new("shop", "web"),
            announcements: vec![announcement("192.0.2.100", "n1"), announcement("192.0.2.101", "n2")],
            ..Service::default()
        };
        let resources = [
            node("n1", "192.0.2.1", "10.244.1.0/24"),
            node("n2", "198.51.100.2", "10.244.2.0/24"),
            Resource::Service(service),
        ];
        let snapshot = Snapshot::new(Revision(1), resources);
        let w = wanted(&devices, &addresses, Some(&snapshot), "n1", &[prefix("203.0.113.0/24")]);
        let ips = |set: &BTreeSet<Addr>| set.iter().map(|a| sluice_ebpf::ip(*a).to_string()).collect::<BTreeSet<_>>();
        assert_eq!(ips(&w.locals), BTreeSet::from(["192.0.2.1".to_owned(), "fd00::1".to_owned()]));
        assert_eq!(ips(&w.announced), BTreeSet::from(["192.0.2.100".to_owned()]));
        assert_eq!(w.devices.keys().copied().collect::<Vec<_>>(), [2, 3], "a link without an address has no programs");
        assert_eq!(w.devices[&2].addr4, addr(ip("192.0.2.1")));
        assert_eq!((w.devices[&3].addr4, w.devices[&3].addr6), (addr(ip("192.0.2.1")), Addr::UNSET));
        let mut w = w;
        mark_adjacent(&mut w.cluster, &[prefix("10.244.2.0/24"), prefix("198.51.100.9/32")].into());
        let cluster: Vec<(u32, u32)> = w.cluster.iter().map(|(r, flags)| (r.len - 96, *flags)).collect();
        let node = 1 | CLUSTER_NODE;
        assert_eq!(cluster, [(24, 1), (24, 1 | CLUSTER_ADJACENT), (24, 1), (32, node), (32, node)]);
        assert!(wanted(&devices, &addresses, None, "n1", &[]).announced.is_empty());
    }
}
