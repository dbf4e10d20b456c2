//! The CNI verbs (specification 1.1.0, section 2). Each can be repeated, and each leaves after a failure what was there
//! before it.

pub use crate::garbage::{RELEASE_S, free_released};
use crate::{
    Error, Lease,
    config::{Config, HostProtocol},
    error::Result,
    garbage::{self, Needed},
    result::{self, Made},
    spec::{Attachment, Environment, VERSIONS, Verb},
    store::{self, Entry, Lock, Releasing, Store},
    wiring::{self, Inside},
};
use serde_json::Value;
use sluice_ebpf::{loader, maps::PodMaps};
use sluice_netlink::{Connection, link, plan::GATEWAY_MAC};
use std::{net::IpAddr, path::Path};

/// Carries out the verb of the environment; what to print, if anything.
pub fn run(env: &Environment<'_>, stdin: &[u8]) -> Result<Option<Value>> {
    let verb = env.verb()?;
    if verb == Verb::Version {
        return Ok(Some(result::version_result(&Config::answer_version(stdin))));
    }
    let config = Config::parse(stdin)?;
    known_to(config.version, verb)?;
    match verb {
        Verb::Add => add(&config, env).map(Some),
        Verb::Del => delete(&config, env).map(|()| None),
        Verb::Check => check(&config, env).map(|()| None),
        Verb::Gc => garbage::collect(&config).map(|()| None),
        Verb::Status | Verb::Version => status(&config).map(|()| None),
    }
}

/// A verb that came later is not for a configuration of an older version.
fn known_to(version: &'static str, verb: Verb) -> Result<()> {
    let (name, since) = match verb {
        Verb::Check => ("CHECK", "0.4.0"),
        Verb::Gc => ("GC", "1.1.0"),
        Verb::Status => ("STATUS", "1.1.0"),
        Verb::Add | Verb::Del | Verb::Version => return Ok(()),
    };
    let age = |v: &str| VERSIONS.iter().position(|known| *known == v);
    if age(version) >= age(since) { Ok(()) } else { Err(Error::TooOld { version, verb: name, since }) }
}

/// The node: a connection in its namespace and the leases of its boot.
pub(crate) struct Node {
    pub(crate) host: Connection,
    pub(crate) store: Store,
}

impl Node {
    pub(crate) fn open(config: &Config) -> Result<Self> {
        let failed = |cause| Error::Wiring { pod: "(node)".into(), cause };
        let host = Connection::open().map_err(failed)?;
        let boot = store::boot(host.netns_cookie().map_err(failed)?)?;
        Ok(Self { store: Store::open(&config.state_dir, &boot)?, host })
    }
}

/// What ADD is asked for.
struct Request<'a> {
    config: &'a Config,
    attachment: Attachment,
    path: &'a Path,
    asked: Vec<IpAddr>,
    mac: Option<[u8; 6]>,
    env: &'a Environment<'a>,
}

fn add(config: &Config, env: &Environment<'_>) -> Result<Value> {
    let (attachment, path) = (env.attachment()?, env.netns()?);
    let mut asked = config.asked.clone();
    asked.extend(env.asked()?);
    let request = Request { config, attachment, path: &path, asked, mac: config.mac.or(env.mac()?), env };
    can_be_served(config)?;
    let maps = wiring::open_maps(config)?;
    let mut node = Node::open(config)?;
    let mut inside =
        Inside::enter(&path).map_err(|e| Error::Environment(format!("CNI_NETNS {}: {e}", path.display())))?;
    let (lease, fresh) = {
        let lock = Lock::take(&config.state_dir)?;
        lease_for(&request, &mut node, &lock, &maps, &inside)?
    };
    let made = wiring::wire(&mut node.host, &mut inside, &lease, config.mtu).and_then(|ifindex| {
        let _lock = Lock::take(&config.state_dir)?;
        wiring::enlist(&config.bpffs, &maps, &mut node.host, &inside, &lease, ifindex)
    });
    if let Err(error) = made {
        // An interface that an earlier ADD made may be in use: it is left for DEL.
        if fresh {
            undo(config, &mut node, &maps, &lease);
        }
        return Err(error);
    }
    Ok(answer(config, &lease, &path))
}

fn can_be_served(config: &Config) -> Result<()> {
    if config.pool.is_empty() {
        return Err(Error::Config("ranges names no address range for pods".into()));
    }
    let sctp = config.host_ports.iter().find(|p| p.protocol == HostProtocol::Sctp);
    sctp.map_or(Ok(()), |p| Err(Error::HostPort { port: p.host, why: "SCTP is not served" }))
}

fn answer(config: &Config, lease: &Lease, path: &Path) -> Value {
    let made = Made {
        host_link: &lease.link,
        host_mac: GATEWAY_MAC,
        ifname: &lease.ifname,
        mac: lease.mac,
        netns: path.display().to_string(),
        addresses: &lease.addresses,
        mtu: config.mtu,
        dns: &config.dns,
    };
    result::result(config.version, &made, config.previous.as_ref())
}

/// The lease that is there for this attachment, or a new one; whether it is new.
fn lease_for(
    request: &Request<'_>,
    node: &mut Node,
    lock: &Lock,
    maps: &PodMaps,
    inside: &Inside,
) -> Result<(Lease, bool)> {
    let needed = Needed { netns: Some(inside.cookie), addresses: &request.asked };
    garbage::free(&node.store, &mut node.host, lock, &needed)?;
    let mut entries = node.store.entries()?;
    if let Some(entry) = Store::find(&entries, &request.attachment).cloned() {
        match node.store.read(&entry)? {
            Some(lease) if lease.netns_cookie == inside.cookie => {
                same_as_asked(&lease, &request.asked)?;
                host_ports_are_free(maps, &lease, &entries)?;
                wiring::set_host_ports(maps, &lease)?;
                return Ok((lease, false));
            }
            // The same container id in another namespace: the old one ended without a DEL.
            Some(stale) => end_stale(request.config, node, lock, maps, &entry, &stale)?,
            None => {}
        }
        entries = node.store.entries()?;
    }
    refuse_second(maps, &entries, inside)?;
    let lease = new_lease(request, node, lock, &entries, inside)?;
    host_ports_are_free(maps, &lease, &entries)?;
    node.store.write(lock, &lease)?;
    // Under the same lock: of two that want one port, the second sees that the first has it.
    if let Err(e) = wiring::set_host_ports(maps, &lease) {
        let entries = node.store.entries().unwrap_or_default();
        if let Some(entry) = Store::find(&entries, &request.attachment) {
            let _ = node.store.remove(lock, entry); // the error that counts is the one below
        }
        return Err(e);
    }
    Ok((lease, true))
}

fn host_ports_are_free(maps: &PodMaps, lease: &Lease, entries: &[Entry]) -> Result<()> {
    match wiring::taken_host_port(maps, lease, entries)? {
        Some(port) => Err(Error::HostPort { port, why: "it leads to another pod" }),
        None => Ok(()),
    }
}

/// A repeated ADD cannot change what the first has made.
fn same_as_asked(lease: &Lease, asked: &[IpAddr]) -> Result<()> {
    let other = asked.iter().find(|a| !lease.addresses.contains(a));
    other.map_or(Ok(()), |a| {
        Err(Error::Asked { address: *a, why: "the interface has other addresses; DEL it first".into() })
    })
}

fn end_stale(
    config: &Config,
    node: &mut Node,
    lock: &Lock,
    maps: &PodMaps,
    entry: &Entry,
    stale: &Lease,
) -> Result<()> {
    wiring::delist(&config.bpffs, maps, stale)?;
    delete_link(&mut node.host, stale)?;
    node.store.remove(lock, entry)
}

/// The data path knows a pod by its namespace: there cannot be two attachments in one.
fn refuse_second(maps: &PodMaps, entries: &[Entry], inside: &Inside) -> Result<()> {
    let failed = |cause| Error::Maps { pod: inside.netns.path().display().to_string(), cause };
    let Some(pod) = maps.pods.get(&inside.cookie).map_err(failed)? else { return Ok(()) };
    let holds = |e: &&Entry| e.releasing.is_none() && wiring::is_pod_of(&pod, &e.addresses);
    match entries.iter().find(holds) {
        Some(e) => {
            let Attachment { container, ifname } = &e.attachment;
            let holder = format!("container {container} interface {ifname}");
            Err(Error::Occupied { netns: inside.netns.path().display().to_string(), holder })
        }
        None => Ok(()), // nobody's: it is overwritten
    }
}

fn new_lease(request: &Request<'_>, node: &Node, lock: &Lock, entries: &[Entry], inside: &Inside) -> Result<Lease> {
    let Request { config, attachment, .. } = request;
    Ok(Lease {
        container: attachment.container.clone(),
        ifname: attachment.ifname.clone(),
        addresses: node.store.choose(lock, &config.pool, entries, &request.asked)?,
        netns: request.path.to_owned(),
        netns_cookie: inside.cookie,
        link: wiring::link_name(attachment),
        mac: request.mac.unwrap_or_else(|| wiring::pod_mac(attachment)),
        network: config.name.clone(),
        bandwidth: config.bandwidth,
        host_ports: config.host_ports.clone(),
        pod: request.env.pod(),
    })
}

fn delete_link(host: &mut Connection, lease: &Lease) -> Result<()> {
    let failed = |cause| Error::Wiring { pod: lease.pod.to_string(), cause };
    match link::find(host, &lease.link).map_err(failed)? {
        Some(found) => link::delete(host, found.index).map(drop).map_err(failed),
        None => Ok(()),
    }
}

/// After a failed ADD: nothing stays. Its own failures are not reported, the first error counts; what could not be
/// undone falls to DEL, which runtimes call after a failed ADD.
fn undo(config: &Config, node: &mut Node, maps: &PodMaps, lease: &Lease) {
    let Ok(lock) = Lock::take(&config.state_dir) else { return };
    let _ = wiring::delist(&config.bpffs, maps, lease);
    // Only a link that is ours: a name that the pod had before is not.
    if delete_link(&mut node.host, lease).is_err() {
        return;
    }
    let entries = node.store.entries().unwrap_or_default();
    for entry in entries.iter().filter(|e| lease.is_for(&e.attachment) && e.releasing.is_none()) {
        let _ = node.store.remove(&lock, entry);
    }
}

fn delete(config: &Config, env: &Environment<'_>) -> Result<()> {
    let attachment = env.attachment()?;
    let mut node = Node::open(config)?;
    let lock = Lock::take(&config.state_dir)?;
    let entries = node.store.entries()?;
    match Store::find(&entries, &attachment) {
        Some(entry) => release(config, &mut node, &lock, entry),
        None => Ok(()), // never added, or deleted before
    }
}

/// Makes the pod unreachable and unknown, and its lease one that ends with its link.
pub(crate) fn release(config: &Config, node: &mut Node, lock: &Lock, entry: &Entry) -> Result<()> {
    let maps = match wiring::open_maps(config) {
        Ok(maps) => Some(maps),
        Err(Error::NotReady(_)) => None, // no maps, no entries
        Err(e) => return Err(e),
    };
    let lease = match node.store.read(entry) {
        Ok(Some(lease)) => lease,
        Ok(None) => return Ok(()),
        // A damaged lease must not make DEL fail for ever; what it held is known by its name.
        Err(Error::Damaged { .. }) => wiring::guess(entry, maps.as_ref())?,
        Err(e) => return Err(e),
    };
    if let Some(maps) = &maps {
        wiring::delist(&config.bpffs, maps, &lease)?;
    }
    let failed = |cause| Error::Wiring { pod: lease.pod.to_string(), cause };
    let found = link::find(&mut node.host, &lease.link).map_err(failed)?;
    wiring::unroute(&mut node.host, found.as_ref(), &lease.addresses).map_err(failed)?;
    match found {
        None => node.store.remove(lock, entry),
        Some(f) => node.store.release(lock, entry, Releasing { ifindex: f.index, since_s: store::uptime_s() }),
    }
}

fn check(config: &Config, env: &Environment<'_>) -> Result<()> {
    let (attachment, path) = (env.attachment()?, env.netns()?);
    let Attachment { container, ifname } = attachment.clone();
    let mut node = Node::open(config)?;
    let entries = node.store.entries()?;
    let lease = Store::find(&entries, &attachment).map(|e| node.store.read(e)).transpose()?.flatten();
    let lease = lease.ok_or_else(|| Error::NoLease { container: container.clone(), ifname: ifname.clone() })?;
    let drift = |what: String| Error::Drift { container: container.clone(), ifname: ifname.clone(), what };
    as_before(config, &lease).map_err(drift)?;
    let mut inside = Inside::enter(&path).map_err(|cause| Error::Wiring { pod: lease.pod.to_string(), cause })?;
    if inside.cookie != lease.netns_cookie {
        return Err(drift("the lease is for another network namespace".into()));
    }
    let missing = wiring::missing(&mut node.host, &mut inside, &lease)?;
    if !missing.is_empty() {
        return Err(drift(missing.join("; ")));
    }
    if !wiring::enlisted(&config.bpffs, &wiring::open_maps(config)?, &mut node.host, &lease)? {
        return Err(drift("the data path does not know the pod".into()));
    }
    Ok(())
}

/// The earlier result, which other plugins of the chain have added to, must name what the lease says.
fn as_before(config: &Config, lease: &Lease) -> std::result::Result<(), String> {
    let Some(previous) = &config.previous else { return Ok(()) };
    let told = previous.addresses_of(&lease.ifname);
    let told = told.ok_or_else(|| format!("the earlier result does not name interface {}", lease.ifname))?;
    match lease.addresses.iter().find(|a| !told.contains(a)) {
        Some(a) => Err(format!("the earlier result does not name {a} on interface {}", lease.ifname)),
        None => Ok(()),
    }
}

/// Whether ADD would succeed, found out as ADD does (section 2, "STATUS").
fn status(config: &Config) -> Result<()> {
    can_be_served(config)?;
    let unavailable = |limited: bool| move |cause: Error| Error::Unavailable { cause: Box::new(cause), limited };
    let mut node = Node::open(config).map_err(unavailable(false))?;
    let lock = Lock::take(&config.state_dir).map_err(unavailable(false))?;
    let entries = node.store.entries().map_err(unavailable(false))?;
    // Without the data path, pods that are there reach no service.
    let pods = entries.iter().any(|e| e.releasing.is_none());
    wiring::open_maps(config).map_err(unavailable(pods))?;
    loader::complete(&config.bpffs).map_err(Error::NotReady).map_err(unavailable(pods))?;
    // Addresses of links that have gone are free, as ADD would find them.
    free_released(&node.store, &mut node.host, &lock, None).map_err(unavailable(false))?;
    let entries = node.store.entries().map_err(unavailable(false))?;
    node.store.choose(&lock, &config.pool, &entries, &[]).map(drop).map_err(unavailable(false))
}
