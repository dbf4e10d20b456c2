//! Links and maps of one pod: made, checked, taken away. Each step may already be done.

use crate::{
    Error,
    bandwidth::Bandwidth,
    config::{Config, HostProtocol},
    error::Result,
    packets,
    spec::Attachment,
    store::{Entry, Lease, PodRef},
};
use sluice_ebpf::{
    common::{
        CAPTURE_MARK, CAPTURE_TABLE, INSIDE, POD_MESHED, POD_SHAPED, Pod, PodAddr, PortKey, Reverse, ServiceKey, TCP,
        UDP,
    },
    loader,
    maps::{PodMaps, padded, pin_dir, unpadded},
};
use sluice_netlink::{
    Connection, Netns, kernel,
    link::{self, Found, Veth},
    plan::{self, Capture, Operation, State},
    qdisc::{self, TokenBucket},
};
use std::{collections::BTreeSet, net::IpAddr, os::fd::AsFd, path::Path};

/// Ahead of the main table's rule (32766), behind the local table's (0).
const CAPTURE: Capture = Capture { mark: CAPTURE_MARK, table: CAPTURE_TABLE, priority: 100 };

/// 64-bit FNV-1a: names that are the same for the same attachment and rarely for two.
fn hash(a: &Attachment) -> u64 {
    let bytes = a.container.bytes().chain([0]).chain(a.ifname.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// Name of the node's end: 15 letters, the most that a link's name can have.
pub fn link_name(a: &Attachment) -> String {
    format!("slc{:012x}", hash(a) & 0xffff_ffff_ffff)
}

/// Whether a link could be the node's end of a pod's.
pub(crate) fn is_link_name(name: &str) -> bool {
    name.len() == 15 && name.strip_prefix("slc").is_some_and(|h| h.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// A locally administered address for the pod's end.
pub fn pod_mac(a: &Attachment) -> [u8; 6] {
    let [_, _, b, c, d, e, f, _] = hash(a).to_be_bytes();
    [0x02, b, c, d, e, f]
}

/// An open pod namespace with a connection inside.
pub struct Inside {
    pub netns: Netns,
    pub connection: Connection,
    pub cookie: u64,
}

impl Inside {
    pub fn open(path: &Path) -> std::result::Result<Self, sluice_netlink::Error> {
        let netns = Netns::open(path)?;
        let connection = Connection::open_in(&netns)?;
        let cookie = connection.netns_cookie()?;
        Ok(Self { netns, connection, cookie })
    }

    /// The same, with the calling thread inside from now on: spares a process that lives for one verb a second thread.
    /// Connections that were opened before stay where they are.
    pub(crate) fn enter(path: &Path) -> std::result::Result<Self, sluice_netlink::Error> {
        let netns = Netns::open(path)?;
        netns.enter()?;
        let connection = Connection::open()?;
        let cookie = connection.netns_cookie()?;
        Ok(Self { netns, connection, cookie })
    }
}

fn wiring(lease: &Lease) -> impl Fn(sluice_netlink::Error) -> Error + '_ {
    |cause| Error::Wiring { pod: lease.pod.to_string(), cause }
}

fn maps_error(lease: &Lease) -> impl Fn(sluice_ebpf::Error) -> Error + '_ {
    |cause| Error::Maps { pod: lease.pod.to_string(), cause }
}

fn packets_error(lease: &Lease) -> impl Fn(packets::Error) -> Error + '_ {
    |cause| match cause {
        packets::Error::Programs(cause) => maps_error(lease)(cause),
        packets::Error::Link(cause) => wiring(lease)(cause),
    }
}

/// Makes the link and everything on it; the index of the node's end.
pub fn wire(host: &mut Connection, inside: &mut Inside, lease: &Lease, mtu: Option<u32>) -> Result<u32> {
    let fresh = make_or_find(host, inside, lease, mtu)?;
    let failed = wiring(lease);
    let missing = |name: &str| Error::Drift {
        container: lease.container.clone(),
        ifname: lease.ifname.clone(),
        what: format!("link {name} is gone"),
    };
    let inner = link::find(&mut inside.connection, &lease.ifname).map_err(&failed)?;
    let inner = inner.ok_or_else(|| missing(&lease.ifname))?;
    let outer = link::find(host, &lease.link).map_err(&failed)?.ok_or_else(|| missing(&lease.link))?;
    let (pod, node) = states(&inner, &outer, lease);
    bring(&mut inside.connection, &pod, fresh).map_err(&failed)?;
    bring(host, &node, fresh).map_err(&failed)?;
    let [ingress, egress] = buckets(&lease.bandwidth, outer.mtu);
    limit(host, outer.index, ingress, lease)?;
    limit(&mut inside.connection, inner.index, egress, lease)?;
    Ok(outer.index)
}

/// For the node's end, which sends what comes to the pod, and for the pod's end; by the MTU that the link has, whatever new
/// links get by now.
fn buckets(bandwidth: &Bandwidth, mtu: Option<u32>) -> [Option<TokenBucket>; 2] {
    [bandwidth.ingress, bandwidth.egress].map(|l| l.map(|l| l.bucket(mtu)))
}

fn limit(connection: &mut Connection, link: u32, bucket: Option<TokenBucket>, lease: &Lease) -> Result<()> {
    let Some(bucket) = bucket else { return Ok(()) };
    qdisc::set_bucket(connection, link, &bucket).map_err(|e| match qdisc::is_unknown(&e) {
        true => Error::NoBandwidth(e),
        false => wiring(lease)(e),
    })
}

fn states(inner: &Found, outer: &Found, lease: &Lease) -> (State, State) {
    let addresses = &lease.addresses;
    (plan::pod_state(inner.index, addresses, CAPTURE), plan::host_state(outer.index, lease.mac, addresses))
}

/// True when the pair is new. A pair of ours that a killed ADD has left is used; half of one is removed.
fn make_or_find(host: &mut Connection, inside: &mut Inside, lease: &Lease, mtu: Option<u32>) -> Result<bool> {
    let failed = wiring(lease);
    let veth = Veth { host: &lease.link, pod: &lease.ifname, pod_mac: lease.mac, mtu };
    match link::make_veth(host, &inside.netns, &veth) {
        Err(e) if e.errno() == Some(EEXIST) => {}
        other => return other.map(|()| true).map_err(failed),
    }
    let taken =
        || Error::IfnameTaken { netns: inside.netns.path().display().to_string(), ifname: lease.ifname.clone() };
    let inner = link::find(&mut inside.connection, veth.pod).map_err(&failed)?;
    let ours = inner.as_ref().is_some_and(|i| i.mac == Some(veth.pod_mac));
    match link::find(host, veth.host).map_err(&failed)? {
        Some(_) if ours => Ok(false),
        Some(stale) => {
            link::delete(host, stale.index).map_err(&failed)?;
            let again = link::make_veth(host, &inside.netns, &veth);
            again.map(|()| true).map_err(|e| if e.errno() == Some(EEXIST) { taken() } else { failed(e) })
        }
        None => Err(taken()),
    }
}

const EEXIST: i32 = rustix::io::Errno::EXIST.raw_os_error();

/// On a new link nothing of what is wanted can be there, so the kernel is not asked first.
fn bring(connection: &mut Connection, wanted: &State, fresh: bool) -> std::result::Result<(), sluice_netlink::Error> {
    if fresh {
        return kernel::apply(connection, &plan::plan(wanted, &State::default(), None));
    }
    kernel::reconcile(connection, wanted, None).map(drop)
}

/// What is missing of a pod's wiring.
pub fn missing(host: &mut Connection, inside: &mut Inside, lease: &Lease) -> Result<Vec<String>> {
    let failed = wiring(lease);
    let inner = link::find(&mut inside.connection, &lease.ifname).map_err(&failed)?;
    let outer = link::find(host, &lease.link).map_err(&failed)?;
    let (Some(inner), Some(outer)) = (inner, outer) else {
        return Ok(vec![format!("link {} is gone", lease.link)]);
    };
    let (pod, node) = states(&inner, &outer, lease);
    let mut text = Vec::new();
    for (connection, wanted) in [(&mut inside.connection, &pod), (host, &node)] {
        let present = kernel::read(connection).map_err(&failed)?;
        text.extend(plan::plan(wanted, &present, None).iter().map(|o| format!("missing: {o}")));
    }
    let [ingress, egress] = buckets(&lease.bandwidth, outer.mtu);
    let ends = [(host, outer.index, ingress), (&mut inside.connection, inner.index, egress)];
    for (connection, link, bucket) in ends {
        let Some(bucket) = bucket else { continue };
        if qdisc::bucket(connection, link).map_err(&failed)? != Some((bucket.rate, bucket.limit)) {
            text.push(format!("missing: limit of link {link} to {} bytes a second", bucket.rate));
        }
    }
    Ok(text)
}

/// Makes the pod unreachable: the node's routes to it go. The link itself goes with the pod's namespace.
pub fn unroute(
    host: &mut Connection,
    link: Option<&Found>,
    addresses: &[IpAddr],
) -> std::result::Result<(), sluice_netlink::Error> {
    let Some(link) = link else { return Ok(()) }; // its routes went with it
    let operations: Vec<_> =
        addresses.iter().map(|ip| Operation::RemoveRoute(plan::host_route(link.index, *ip))).collect();
    kernel::apply(host, &operations)
}

/// The pinned maps, or the error that tells the runtime to come back later.
pub fn open_maps(config: &Config) -> Result<PodMaps> {
    PodMaps::open(&pin_dir(&config.bpffs)).map_err(Error::NotReady)
}

/// What a pod's host ports are in the map: each by the address that it is on, or by the unspecified one of its family.
pub(crate) fn host_ports(lease: &Lease) -> Vec<(ServiceKey, Reverse)> {
    let mut entries = Vec::new();
    for port in &lease.host_ports {
        let proto = match port.protocol {
            HostProtocol::Tcp => TCP,
            HostProtocol::Udp => UDP,
            HostProtocol::Sctp => continue, // refused before
        };
        for ip in lease.addresses.iter().filter(|ip| port.address.is_none_or(|a| a.is_ipv4() == ip.is_ipv4())) {
            let to = sluice_ebpf::addr(*ip);
            let addr = port.address.map_or(to.unspecified(), sluice_ebpf::addr);
            let key = ServiceKey { addr, port_be: port.host.to_be(), proto, scope: INSIDE };
            entries.push((key, Reverse { addr: to, port_be: port.pod.to_be(), pad: 0 }));
        }
    }
    entries
}

/// The first host port of the lease that another pod has. A port on every address of a family is in the way of the same on
/// one of them. What is nobody's (left by a plugin that was killed) is in nobody's way.
pub(crate) fn taken_host_port(maps: &PodMaps, lease: &Lease, entries: &[Entry]) -> Result<Option<u16>> {
    let wanted = host_ports(lease);
    if wanted.is_empty() {
        return Ok(None);
    }
    let others = entries.iter().filter(|e| e.releasing.is_none() && !lease.is_for(&e.attachment));
    let others: BTreeSet<_> = others.flat_map(|e| &e.addresses).map(|ip| sluice_ebpf::addr(*ip)).collect();
    let present = maps.host_ports.entries().map_err(maps_error(lease))?;
    let taken = |key: &ServiceKey| present.iter().any(|(k, to)| overlap(key, k) && others.contains(&to.addr));
    Ok(wanted.iter().find(|(key, _)| taken(key)).map(|(key, _)| u16::from_be(key.port_be)))
}

/// All or none.
pub(crate) fn set_host_ports(maps: &PodMaps, lease: &Lease) -> Result<()> {
    let set = host_ports(lease).iter().try_for_each(|(key, to)| maps.host_ports.set(key, to));
    set.map_err(|e| {
        let _ = give_back_host_ports(maps, lease); // the error that counts is the one below
        maps_error(lease)(e)
    })
}

/// What is in the map for the pod's addresses.
fn give_back_host_ports(maps: &PodMaps, lease: &Lease) -> Result<()> {
    let failed = maps_error(lease);
    let own: BTreeSet<_> = lease.addresses.iter().map(|ip| sluice_ebpf::addr(*ip)).collect();
    for (key, _) in maps.host_ports.entries().map_err(&failed)?.iter().filter(|(_, to)| own.contains(&to.addr)) {
        maps.host_ports.remove(key).map_err(&failed)?;
    }
    Ok(())
}

/// Whether a packet could be meant for either.
fn overlap(a: &ServiceKey, b: &ServiceKey) -> bool {
    let any = |k: &ServiceKey| k.addr == k.addr.unspecified();
    let same = a.addr == b.addr || (any(a) || any(b)) && a.addr.is_v4() == b.addr.is_v4();
    (a.port_be, a.proto) == (b.port_be, b.proto) && same
}

/// Puts the pod into the maps and steering into its namespace: ADD's last step, under the lock.
pub fn enlist(
    bpffs: &Path,
    maps: &PodMaps,
    host: &mut Connection,
    inside: &Inside,
    lease: &Lease,
    ifindex: u32,
) -> Result<()> {
    let failed = maps_error(lease);
    let intent = match lease.pod.uid.is_empty() {
        true => None,
        false => maps.intents.get(&padded(&lease.pod.uid)).map_err(&failed)?,
    };
    let before = maps.pods.get(&inside.cookie).map_err(&failed)?;
    let mut flags = intent.or(before.map(|p| p.flags)).unwrap_or(0) & POD_MESHED;
    if lease.bandwidth.ingress.is_some() {
        flags |= POD_SHAPED;
    }
    let mut pod = Pod {
        sidecar_cgroup: before.map_or(0, |p| p.sidecar_cgroup),
        flags,
        ifindex,
        uid: padded(&lease.pod.uid),
        namespace: padded(&lease.pod.namespace),
        name: padded(&lease.pod.name),
        ..Pod::default()
    };
    for ip in &lease.addresses {
        let slot = if ip.is_ipv4() { &mut pod.addr4 } else { &mut pod.addr6 };
        *slot = sluice_ebpf::addr(*ip);
    }
    // Steering first: a meshed pod is closed from the first moment that it is known.
    loader::attach_pod(bpffs, inside.netns.as_fd(), inside.cookie).map_err(&failed)?;
    packets::attach_pod(bpffs, host, ifindex).map_err(packets_error(lease))?;
    for ip in &lease.addresses {
        let entry = PodAddr { netns: inside.cookie, flags, ifindex };
        maps.addrs.set(&sluice_ebpf::addr(*ip), &entry).map_err(&failed)?;
    }
    for (key, to) in host_ports(lease) {
        maps.host_ports.set(&key, &to).map_err(&failed)?;
    }
    maps.pods.set(&inside.cookie, &pod).map_err(&failed)
}

/// Whether the entry of a namespace is the pod's that has these addresses.
pub(crate) fn is_pod_of(pod: &Pod, addresses: &[IpAddr]) -> bool {
    addresses.iter().map(|ip| sluice_ebpf::addr(*ip)).any(|a| a == pod.addr4 || a == pod.addr6)
}

/// Takes the pod out of the maps, under the lock. An address that is another pod's by now is left alone, and so is a
/// namespace that is another attachment's by now.
pub fn delist(bpffs: &Path, maps: &PodMaps, lease: &Lease) -> Result<()> {
    let failed = maps_error(lease);
    let known = maps.pods.get(&lease.netns_cookie).map_err(&failed)?;
    if known.is_none_or(|pod| is_pod_of(&pod, &lease.addresses)) {
        maps.pods.remove(&lease.netns_cookie).map_err(&failed)?;
        loader::detach_pod(bpffs, lease.netns_cookie).map_err(&failed)?;
    }
    let own: BTreeSet<_> = lease.addresses.iter().map(|ip| sluice_ebpf::addr(*ip)).collect();
    for addr in &own {
        if maps.addrs.get(addr).map_err(&failed)?.is_some_and(|a| a.netns == lease.netns_cookie) {
            maps.addrs.remove(addr).map_err(&failed)?;
        }
    }
    give_back_host_ports(maps, lease)?;
    let ports = maps.ports.entries().map_err(&failed)?;
    let mut excluded = ports.into_iter().map(|(k, _)| k).filter(|k: &PortKey| own.contains(&k.addr));
    excluded.try_for_each(|k| maps.ports.remove(&k).map(drop)).map_err(&failed)
}

/// What can be known of a lease whose file cannot be read: its name, and what the maps say of its addresses.
pub fn guess(entry: &Entry, maps: Option<&PodMaps>) -> Result<Lease> {
    let mut lease = Lease {
        container: entry.attachment.container.clone(),
        ifname: entry.attachment.ifname.clone(),
        addresses: entry.addresses.clone(),
        netns: Default::default(),
        netns_cookie: 0, // no namespace has it
        link: link_name(&entry.attachment),
        mac: pod_mac(&entry.attachment),
        network: String::new(),
        bandwidth: Bandwidth::default(),
        host_ports: vec![],
        pod: PodRef::default(),
    };
    if let (Some(maps), Some(ip)) = (maps, lease.addresses.first()) {
        let known = maps.addrs.get(&sluice_ebpf::addr(*ip)).map_err(maps_error(&lease))?;
        lease.netns_cookie = known.map_or(0, |a| a.netns);
        if let Some(pod) = maps.pods.get(&lease.netns_cookie).map_err(maps_error(&lease))? {
            let [namespace, name, uid] = [&pod.namespace[..], &pod.name, &pod.uid].map(unpadded);
            lease.pod = PodRef { namespace, name, uid };
        }
    }
    Ok(lease)
}

/// Whether the maps know the pod as its lease says.
pub fn enlisted(bpffs: &Path, maps: &PodMaps, host: &mut Connection, lease: &Lease) -> Result<bool> {
    let failed = maps_error(lease);
    let Some(pod) = maps.pods.get(&lease.netns_cookie).map_err(&failed)? else { return Ok(false) };
    let mut all = loader::pod_attached(bpffs, lease.netns_cookie);
    all &= packets::pod_attached(host, pod.ifindex).map_err(packets_error(lease))?;
    for ip in &lease.addresses {
        let entry = maps.addrs.get(&sluice_ebpf::addr(*ip)).map_err(&failed)?;
        all &= entry.is_some_and(|a| a.netns == lease.netns_cookie);
    }
    for (key, to) in host_ports(lease) {
        all &= maps.host_ports.get(&key).map_err(&failed)? == Some(to);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_differ() {
        let a = |c: &str, i: &str| Attachment { container: c.into(), ifname: i.into() };
        let name = link_name(&a("c1", "eth0"));
        assert_eq!(name.len(), 15);
        assert_eq!(name, link_name(&a("c1", "eth0")));
        assert_ne!(name, link_name(&a("c1", "eth1")));
        assert_ne!(link_name(&a("c1", "1")), link_name(&a("c11", "")));
        assert!(is_link_name(&name) && !is_link_name("slcnode0") && !is_link_name("slcxxxxxxxxxxxx"));
        assert_eq!(pod_mac(&a("c1", "eth0"))[0] & 3, 2, "unicast, locally administered");
    }
}
