//! The node's own links and addresses, as the packet programs need to know them: who has programs, which addresses are
//! ours, which the cluster's, which we announce.

use super::{Error, describe};
use sluice_cni::packets;
use sluice_ebpf::{
    addr,
    common::{Addr, CLUSTER_ADJACENT, CLUSTER_NODE, DEVICE_TUNNEL, Device, Range},
    loader,
    maps::{HashMap, NodeMaps, pin_dir},
};
use sluice_model::Snapshot;
use sluice_netlink::{
    Connection, announce,
    groups::{Groups, solicited},
    kernel, link as device,
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
    /// Groups in which the network solicits the announced addresses.
    groups: Groups,
    /// The cluster's ranges as they were written last, and how often they were found so since.
    brought: (BTreeMap<Range, u32>, u32),
    problems: Problems,
}

/// What cannot be had at present; it is tried again with each reconciliation.
#[derive(Debug, Default)]
struct Problems {
    node: Vec<String>,
    links: Vec<String>,
    ranges: Vec<String>,
    announced: Vec<String>,
}

/// An announcement may be lost; RFC 5227 §2.3 sends two.
const ANNOUNCEMENTS: u32 = 3;
/// Reconciliations after which the cluster's ranges are compared with the map though nothing has changed: they are many, and
/// the map can only be read one by one.
const RANGES_EVERY: u32 = 30;

impl Ports {
    pub(super) fn open(bpffs: &Path, excluded: Vec<Prefix>, ways: Ways) -> Result<Self, sluice_ebpf::Error> {
        let maps = NodeMaps::open(&pin_dir(bpffs))?;
        Ok(Self {
            bpffs: bpffs.to_owned(),
            maps,
            excluded,
            to_announce: BTreeMap::new(),
            ways,
            attached: BTreeSet::new(),
            asked: BTreeSet::new(),
            groups: Groups::default(),
            brought: (BTreeMap::new(), RANGES_EVERY),
            problems: Problems::default(),
        })
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
        self.brought.1 = RANGES_EVERY;
        Ok(())
    }

    /// What cannot be had at present.
    pub(super) fn problems(&self) -> impl Iterator<Item = &String> {
        let Problems { node, links, ranges, announced } = &self.problems;
        node.iter().chain(links).chain(ranges).chain(announced)
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
        let mut done;
        (done, self.problems.node) = bring_maps(&self.maps, &wanted).map_err(Error::Ports)?;
        let outward: Vec<&device::Device> = devices.iter().filter(|d| d.kind.as_deref() != Some("vxlan")).collect();
        if snapshot.is_some() {
            self.bring_ranges(&wanted.cluster, &mut done)?;
            self.announce(&wanted.announced, &outward)?;
        }
        self.attach(&wanted, &devices, &mut done)?;
        for (ip, left) in &mut self.to_announce {
            for device in &outward {
                // Best effort: whoever asks is answered.
                let _ = announce::announce(device.index, device.mac, *ip);
            }
            *left -= 1;
        }
        self.to_announce.retain(|_, left| *left > 0);
        Ok(done)
    }

    /// Takes over what is new: told to the network a few times.
    fn announce(&mut self, wanted: &BTreeSet<Addr>, outward: &[&device::Device]) -> Result<(), Error> {
        let before: BTreeSet<Addr> =
            self.maps.announced.entries().map_err(Error::Ports)?.into_iter().map(|(a, _)| a).collect();
        let brought = bring_set(&self.maps.announced, wanted).map_err(Error::Ports)?;
        self.problems.announced.clear();
        self.problems.announced.extend(brought.unfit("announced addresses", "nobody answers for them"));
        let fresh = wanted.difference(&before).map(|a| (sluice_ebpf::ip(*a), ANNOUNCEMENTS));
        self.to_announce.extend(fresh);
        self.to_announce.retain(|ip, _| wanted.contains(&addr(*ip)));
        // Devices and switches may keep solicitations from who is not in the address's group.
        let six = wanted.iter().filter_map(|a| match sluice_ebpf::ip(*a) {
            IpAddr::V6(ip) => Some(solicited(ip)),
            IpAddr::V4(_) => None,
        });
        let links = || outward.iter().filter(|d| !d.addresses.is_empty()).map(|d| d.index);
        let wanted = six.flat_map(|group| links().map(move |link| (link, group))).collect();
        self.problems.announced.extend(self.groups.keep(&wanted).err().map(|e| describe(&e)));
        Ok(())
    }

    /// Ranges for which there is no room are named: nothing else waits for them.
    fn bring_ranges(&mut self, wanted: &BTreeMap<Range, u32>, done: &mut Vec<String>) -> Result<(), Error> {
        let (before, times) = &mut self.brought;
        if before == wanted && *times < RANGES_EVERY {
            *times += 1;
            return Ok(());
        }
        let brought = bring(&self.maps.cluster, wanted).map_err(Error::Ports)?;
        note(done, brought.changed, "ranges of the cluster");
        let effect = "pods reach them under an address of this node, where they are masqueraded";
        self.problems.ranges = brought.unfit("ranges of the cluster's nodes", effect).into_iter().collect();
        self.brought = (wanted.clone(), 0);
        Ok(())
    }

    /// What cannot be done on one link keeps no other from its programs: it is named, and tried again.
    fn attach(&mut self, wanted: &Wanted, devices: &[device::Device], done: &mut Vec<String>) -> Result<(), Error> {
        let attached = loader::attached_devices(&self.bpffs).map_err(Error::Ports)?;
        let gone: BTreeSet<u32> =
            attached.union(&self.attached).filter(|i| !wanted.devices.contains_key(i)).copied().collect();
        let mut problems = Vec::new();
        for index in gone {
            if let Err(e) = packets::detach_device(&self.bpffs, index) {
                problems.push(format!("link {index}: programs not taken off: {}", describe(&e)));
                continue;
            }
            self.attached.remove(&index);
            self.asked.remove(&index);
            done.push(format!("programs of link {index}, which is no link of the node's any more"));
        }
        for device in devices.iter().filter(|d| wanted.devices.contains_key(&d.index)) {
            match self.attach_one(device.index, done) {
                Ok(()) => {}
                // It went after the node's links were listed.
                Err(e) if e.is_gone() => {}
                Err(e) => problems.push(format!(
                    "link {} ({}): packets that come in there pass the node's services by: {}",
                    device.name,
                    device.index,
                    describe(&e)
                )),
            }
        }
        self.problems.links = problems;
        Ok(())
    }

    fn attach_one(&mut self, index: u32, done: &mut Vec<String>) -> Result<(), packets::Error> {
        // Filters have no pins: what an agent before us has put there is replaced once.
        if !(self.ways.clsact && self.attached.contains(&index)) {
            if packets::attach_device(&self.bpffs, index, self.ways.clsact)? {
                done.push(format!("link {index} had no programs"));
            }
            self.attached.insert(index);
        }
        if self.asked.contains(&index) {
            return Ok(());
        }
        if !self.ways.xdp {
            loader::detach_xdp(&self.bpffs, index)?;
        } else if let Err(why) = loader::attach_xdp(&self.bpffs, index) {
            // `from_wire` does all that it would have done.
            done.push(format!("link {index} goes without XDP: {}", describe(&why)));
        }
        self.asked.insert(index);
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
        bring_maps(&maps, &wanted)?;
        bring(&maps.cluster, &wanted.cluster)?;
        bring_set(&maps.announced, &wanted.announced).map(drop)
    };
    NodeMaps::open(&pin_dir(bpffs)).and_then(bring).map_err(Error::Ports)
}

/// The node's own addresses and links; what had to be done, and what has no room: a link may hold the addresses of all services,
/// as kube-proxy's does where it uses IPVS.
fn bring_maps(maps: &NodeMaps, wanted: &Wanted) -> Result<(Vec<String>, Vec<String>), sluice_ebpf::Error> {
    let mut done = Vec::new();
    let addresses = bring_set(&maps.locals, &wanted.locals)?;
    let links = bring(&maps.devices, &wanted.devices)?;
    note(&mut done, addresses.changed, "addresses of the node");
    note(&mut done, links.changed, "links of the node");
    let unfit = [
        addresses.unfit("addresses of the node", "node ports and host ports are not served under them"),
        links.unfit("links of the node", "packets that come by them are not translated"),
    ];
    Ok((done, unfit.into_iter().flatten().collect()))
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
        let flags = if d.kind.as_deref() == Some("vxlan") { DEVICE_TUNNEL } else { 0 };
        out.devices.insert(d.index, Device { addr4: of(true), addr6: of(false), mac: d.mac, flags });
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

/// What came of bringing a map to what is wanted.
struct Brought {
    changed: usize,
    wanted: usize,
    /// How many have no room, and why.
    unfit: Option<(usize, sluice_ebpf::Error)>,
}

impl Brought {
    fn unfit(&self, what: &str, effect: &str) -> Option<String> {
        let (count, cause) = self.unfit.as_ref()?;
        Some(format!("{count} of {} {what} have no room on this node: {effect} ({})", self.wanted, describe(cause)))
    }
}

/// What is not wanted goes first: it makes room.
fn bring<K: sluice_ebpf::common::Plain + Ord, V: sluice_ebpf::common::Plain + PartialEq>(
    map: &HashMap<K, V>,
    wanted: &BTreeMap<K, V>,
) -> Result<Brought, sluice_ebpf::Error> {
    let present: BTreeMap<K, V> = map.all()?.into_iter().collect();
    let mut brought = Brought { changed: 0, wanted: wanted.len(), unfit: None };
    for key in present.keys().filter(|k| !wanted.contains_key(k)) {
        map.remove(key)?;
        brought.changed += 1;
    }
    for (key, value) in wanted.iter().filter(|(k, v)| present.get(k) != Some(v)) {
        match map.set(key, value) {
            Ok(()) => brought.changed += 1,
            Err(e) if e.is_full() => brought.unfit.get_or_insert((0, e)).0 += 1,
            Err(e) => return Err(e),
        }
    }
    Ok(brought)
}

fn bring_set<K: sluice_ebpf::common::Plain + Ord>(
    map: &HashMap<K, u32>,
    wanted: &BTreeSet<K>,
) -> Result<Brought, sluice_ebpf::Error> {
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

    /// A machine of its own with two links, and a BPF file system. Needs root.
    struct Machine {
        base: PathBuf,
        place: loader::Place,
        netns: sluice_netlink::Netns,
    }

    impl Machine {
        fn new() -> Self {
            use rustix::mount::{MountFlags, mount};
            let id = format!("sluice-test-ports-{}", std::process::id());
            let base = std::env::temp_dir().join(&id);
            let bpffs = base.join("bpf");
            std::fs::create_dir_all(&bpffs).expect("folder");
            mount("bpf", &bpffs, "bpf", MountFlags::empty(), None).expect("mount bpffs (root is needed)");
            let cgroup = crate::attest::cgroup_root().expect("cgroup2").join(&id);
            std::fs::create_dir(&cgroup).expect("cgroup");
            let place = loader::Place { bpffs, cgroup };
            loader::load(&place).expect("load");
            let netns = sluice_netlink::ns::make_named(&base.join("node")).expect("namespace");
            for (name, address) in [("one", "192.0.2.1"), ("two", "198.51.100.1")] {
                sluice_netlink::lab::bridge(&netns, name, ip(address), 24).expect(name);
            }
            Self { base, place, netns }
        }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            use rustix::mount::{UnmountFlags, unmount};
            let _ = sluice_netlink::ns::remove_named(&self.base.join("node"));
            let _ = unmount(&self.place.bpffs, UnmountFlags::DETACH);
            let _ = std::fs::remove_dir(&self.place.cgroup);
            let _ = std::fs::remove_dir_all(&self.base);
        }
    }

    /// Given a link that takes no programs and more nodes than the map has room for, the other link gets its programs, the
    /// announced addresses are answered for and solicitations for them come in; both are named, and what can be had later
    /// is had then.
    #[test]
    fn what_cannot_be_had_keeps_nothing_else_waiting() {
        let machine = Machine::new();
        machine.netns.run(|| story(&machine)).expect("inside");
    }

    fn story(machine: &Machine) {
        let bpffs = &machine.place.bpffs;
        let mut connection = Connection::open().expect("connection");
        let mut index = |name: &str| device::find(&mut connection, name).expect("find").expect(name).index;
        let (one, two) = (index("one"), index("two"));
        let ways = Ways { clsact: !loader::has_tcx(bpffs).expect("look"), xdp: false };
        let mut ports = Ports::open(bpffs, vec![], ways).expect("open");
        // Where the first link's pin would be is something else.
        let taken = pin_dir(bpffs).join("devices").join(format!("{one}_in"));
        std::fs::create_dir(&taken).expect("folder");
        let node = |n: u32| {
            let [_, a, b, c] = n.to_be_bytes();
            Resource::Node(Node {
                name: Name::cluster(format!("n{n}")),
                addresses: vec![ip(&format!("10.{a}.{b}.{c}")), ip(&format!("fd00::{n:x}"))],
                pod_cidrs: vec![format!("100.{}.{b}.{c}/32", 64 + a), format!("fd01:{n:x}::/64")],
                zone: String::new(),
                ready: true,
            })
        };
        let announced = |address: &str| {
            let announcements = vec![Announcement { address: ip(address), node: "n1".into() }];
            Resource::Service(Service { name: Name::new("shop", "web"), announcements, ..Service::default() })
        };
        let bound = sluice_ebpf::common::bound::CLUSTER as u32;
        let many = |address| Snapshot::new(Revision(1), (1..=bound / 4 + 10).map(node).chain([announced(address)]));
        let mut reconcile = |ports: &mut Ports, snapshot: &Snapshot| {
            ports.reconcile(&mut connection, Some(snapshot), "n1", &BTreeSet::new()).expect("goes on");
            ports.problems().cloned().collect::<Vec<String>>()
        };
        let groups = || std::fs::read_to_string("/proc/thread-self/net/igmp6").expect("the kernel's table");
        let member = |link: &str, group: &str| {
            let line = |l: &&str| l.split_whitespace().nth(1) == Some(link) && l.contains(group);
            groups().lines().filter(line).count() == 1
        };
        let snapshot = many("2001:db8::12:3456");
        let problems = reconcile(&mut ports, &snapshot);
        let text = problems.join("\n");
        assert_eq!(problems.len(), 2, "{text}");
        assert!(
            text.contains(&format!("link one ({one})")) && text.contains(&format!("40 of {}", bound + 40)),
            "{text}"
        );
        assert_eq!(NodeMaps::open(&pin_dir(bpffs)).expect("maps").cluster.keys().expect("keys").len() as u32, bound);
        assert!(!ports.attached.contains(&one) && ports.attached.contains(&two));
        assert!(ports.maps.announced.get(&addr(ip("2001:db8::12:3456"))).expect("read").is_some());
        for link in ["one", "two"] {
            assert!(member(link, "ff0200000000000000000001ff123456"), "{link}: {}", groups());
        }
        assert_eq!(reconcile(&mut ports, &snapshot), problems, "nothing has changed");

        let bound = sluice_ebpf::common::bound::LOCALS as u32;
        let locals = (0..bound + 7).map(|n| addr(IpAddr::from((0x0a09_0000 + n).to_be_bytes()))).collect();
        let (_, unfit) = bring_maps(&ports.maps, &Wanted { locals, ..Wanted::default() }).expect("goes on");
        assert!(unfit.len() == 1 && unfit[0].starts_with(&format!("7 of {} addresses", bound + 7)), "{unfit:?}");

        std::fs::remove_dir(&taken).expect("folder");
        let few = Snapshot::new(Revision(2), [node(1), announced("2001:db8::9")]);
        assert_eq!(reconcile(&mut ports, &few), Vec::<String>::new());
        assert!(ports.attached.contains(&one) && taken.exists());
        for link in ["one", "two"] {
            assert!(member(link, "ff0200000000000000000001ff000009"), "{link}: {}", groups());
            assert!(!member(link, "ff0200000000000000000001ff123456"), "{link}: {}", groups());
        }
    }
}
