//! The CNI verbs. Each can be repeated, and each leaves after a failure what was there before it.

use crate::{
    Error, Lease,
    error::Result,
    spec::{self, Attachment, Config, Environment, Made, Verb},
    store::{self, Entry, Lock, Releasing, Store},
    wiring::{self, Inside},
};
use serde_json::Value;
use sluice_ebpf::maps::PodMaps;
use sluice_netlink::{Connection, link, plan::GATEWAY_MAC};
use std::path::Path;

/// A link that a runtime has left this long after DEL is deleted by us.
pub const RELEASE_S: u64 = 5;

/// Carries out the verb of the environment; what to print, if anything.
pub fn run(env: &Environment<'_>, stdin: &[u8]) -> Result<Option<Value>> {
    match env.verb()? {
        Verb::Version => Ok(Some(spec::version_result(&Config::answer_version(stdin)))),
        Verb::Add => add(&Config::parse(stdin)?, env).map(Some),
        Verb::Del => delete(&Config::parse(stdin)?, env).map(|()| None),
        Verb::Check => check(&Config::parse(stdin)?, env).map(|()| None),
        Verb::Gc => collect_garbage(&Config::parse(stdin)?).map(|()| None),
        Verb::Status => status(&Config::parse(stdin)?).map(|()| None),
    }
}

/// The node: a connection in its namespace and the leases of its boot.
struct Node {
    host: Connection,
    store: Store,
}

impl Node {
    fn open(config: &Config) -> Result<Self> {
        let failed = |cause| Error::Wiring { pod: "(node)".into(), cause };
        let host = Connection::open().map_err(failed)?;
        let boot = store::boot(host.netns_cookie().map_err(failed)?)?;
        Ok(Self { store: Store::open(&config.state_dir, &boot)?, host })
    }
}

fn add(config: &Config, env: &Environment<'_>) -> Result<Value> {
    let (attachment, path) = (env.attachment()?, env.netns()?);
    let maps = wiring::open_maps(config)?;
    let mut inside =
        Inside::open(&path).map_err(|e| Error::Environment(format!("CNI_NETNS {}: {e}", path.display())))?;
    let mut node = Node::open(config)?;
    let lease = {
        let lock = Lock::take(&config.state_dir)?;
        lease_for(config, &mut node, &lock, env, &attachment, &path, &inside)?
    };
    let made = wiring::wire(&mut node.host, &mut inside, &lease, config.mtu).and_then(|ifindex| {
        let _lock = Lock::take(&config.state_dir)?;
        wiring::enlist(&config.bpffs, &maps, &inside, &lease, ifindex)
    });
    if let Err(error) = made {
        undo(config, &mut node, &maps, &lease);
        return Err(error);
    }
    Ok(spec::result(
        config.version,
        &Made {
            host_link: &lease.link,
            host_mac: GATEWAY_MAC,
            ifname: &lease.ifname,
            mac: lease.mac,
            netns: path.display().to_string(),
            addresses: &lease.addresses,
            mtu: config.mtu,
        },
    ))
}

/// The lease that is there for this attachment, or a new one.
fn lease_for(
    config: &Config,
    node: &mut Node,
    lock: &Lock,
    env: &Environment<'_>,
    attachment: &Attachment,
    path: &Path,
    inside: &Inside,
) -> Result<Lease> {
    free_released(&node.store, &mut node.host, lock, Some(inside.cookie))?;
    let mut entries = node.store.entries()?;
    if let Some(entry) = Store::find(&entries, attachment).cloned() {
        match node.store.read(&entry)? {
            Some(lease) if lease.netns_cookie == inside.cookie => return Ok(lease),
            // The same container id in another namespace: the old one ended without a DEL.
            Some(stale) => delete_link(&mut node.host, &stale)?,
            None => {}
        }
        node.store.remove(lock, &entry)?;
        entries = node.store.entries()?;
    }
    let lease = Lease {
        container: attachment.container.clone(),
        ifname: attachment.ifname.clone(),
        addresses: node.store.choose(lock, &config.ranges, &entries)?,
        netns: path.to_owned(),
        netns_cookie: inside.cookie,
        link: wiring::link_name(attachment),
        mac: wiring::pod_mac(attachment),
        pod: env.pod(),
    };
    node.store.write(lock, &lease)?;
    Ok(lease)
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
    for entry in entries.iter().filter(|e| lease.is_for(&e.attachment)) {
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
fn release(config: &Config, node: &mut Node, lock: &Lock, entry: &Entry) -> Result<()> {
    let lease = match node.store.read(entry) {
        Ok(Some(lease)) => lease,
        Ok(None) => return Ok(()),
        // A damaged lease must not make DEL fail for ever; what it held is found again by the link's name.
        Err(Error::Damaged { .. }) => return node.store.remove(lock, entry),
        Err(e) => return Err(e),
    };
    match wiring::open_maps(config) {
        Ok(maps) => wiring::delist(&config.bpffs, &maps, &lease)?,
        Err(Error::NotReady(_)) => {} // no maps, no entries
        Err(e) => return Err(e),
    }
    let failed = |cause| Error::Wiring { pod: lease.pod.to_string(), cause };
    let found = link::find(&mut node.host, &lease.link).map_err(failed)?;
    wiring::unroute(&mut node.host, found.as_ref(), &lease.addresses).map_err(failed)?;
    match found {
        None => node.store.remove(lock, entry),
        Some(f) => node.store.release(lock, entry, Releasing { ifindex: f.index, since_s: store::uptime_s() }),
    }
}

/// Ends the leases whose links are gone, and deletes links that were left for [`RELEASE_S`] seconds or that stand in
/// the way in the namespace `needed`. Plugin and agent call it, under the lock.
pub fn free_released(store: &Store, host: &mut Connection, lock: &Lock, needed: Option<u64>) -> Result<usize> {
    let mut freed = 0;
    for entry in store.entries()? {
        let Some(releasing) = entry.releasing else { continue };
        let lease = store.read(&entry).ok().flatten();
        let name = wiring::link_name(&entry.attachment);
        let failed = |cause| Error::Wiring { pod: name.clone(), cause };
        let there = link::find(host, &name).map_err(failed)?.filter(|f| f.index == releasing.ifindex);
        let overdue = store::uptime_s().saturating_sub(releasing.since_s) >= RELEASE_S;
        let in_the_way = lease.is_some_and(|l| needed == Some(l.netns_cookie));
        match there {
            Some(f) if overdue || in_the_way => link::delete(host, f.index).map(drop).map_err(failed)?,
            Some(_) => continue,
            None => {}
        }
        store.remove(lock, &entry)?;
        freed += 1;
    }
    Ok(freed)
}

fn check(config: &Config, env: &Environment<'_>) -> Result<()> {
    let (attachment, path) = (env.attachment()?, env.netns()?);
    let Attachment { container, ifname } = attachment.clone();
    let mut node = Node::open(config)?;
    let entries = node.store.entries()?;
    let lease = Store::find(&entries, &attachment).map(|e| node.store.read(e)).transpose()?.flatten();
    let lease = lease.ok_or_else(|| Error::NoLease { container: container.clone(), ifname: ifname.clone() })?;
    let drift = |what: String| Error::Drift { container: container.clone(), ifname: ifname.clone(), what };
    let before = config.prev_result.as_ref().map(spec::result_addresses).unwrap_or_default();
    if let Some(other) = before.iter().find(|a| !lease.addresses.contains(a)) {
        return Err(drift(format!("the earlier result names {other}, the lease does not")));
    }
    let mut inside = Inside::open(&path).map_err(|cause| Error::Wiring { pod: lease.pod.to_string(), cause })?;
    if inside.cookie != lease.netns_cookie {
        return Err(drift("the lease is for another network namespace".into()));
    }
    let missing = wiring::missing(&mut node.host, &mut inside, &lease)?;
    if !missing.is_empty() {
        return Err(drift(missing.join("; ")));
    }
    if !wiring::enlisted(&config.bpffs, &wiring::open_maps(config)?, &lease)? {
        return Err(drift("the data path does not know the pod".into()));
    }
    Ok(())
}

fn collect_garbage(config: &Config) -> Result<()> {
    let mut node = Node::open(config)?;
    let lock = Lock::take(&config.state_dir)?;
    let held = node.store.entries()?.into_iter().filter(|e| e.releasing.is_none());
    let stale: Vec<_> = held.filter(|e| !config.valid_attachments.contains(&e.attachment)).collect();
    let mut first = None;
    for entry in &stale {
        if let Err(e) = release(config, &mut node, &lock, entry) {
            first.get_or_insert(e); // go on: the others are garbage too
        }
    }
    free_released(&node.store, &mut node.host, &lock, None)?;
    first.map_or(Ok(()), Err)
}

fn status(config: &Config) -> Result<()> {
    wiring::open_maps(config)?;
    let node = Node::open(config)?;
    let lock = Lock::take(&config.state_dir)?;
    node.store.choose(&lock, &config.ranges, &node.store.entries()?).map(drop)
}
