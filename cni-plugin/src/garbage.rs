//! What is left behind: leases whose links go or went, attachments that the runtime no longer knows, and links and map
//! entries that no lease names.

use crate::{
    Error,
    command::{self, Node},
    config::Config,
    error::Result,
    spec::Attachment,
    store::{self, Entry, Lock, Store},
    wiring,
};
use sluice_ebpf::{loader, maps::PodMaps};
use sluice_netlink::{Connection, link};
use std::{collections::BTreeSet, net::IpAddr};

/// A link that a runtime has left this long after DEL is deleted by us.
pub const RELEASE_S: u64 = 5;

/// What somebody waits for: links that are releasing and in the way are deleted at once.
#[derive(Default)]
pub(crate) struct Needed<'a> {
    pub(crate) netns: Option<u64>,
    pub(crate) addresses: &'a [IpAddr],
}

/// Ends the leases whose links are gone, and deletes links that were left for [`RELEASE_S`] seconds or that stand in
/// the way in the namespace `needed`. Plugin and agent call it, under the lock.
pub fn free_released(store: &Store, host: &mut Connection, lock: &Lock, needed: Option<u64>) -> Result<usize> {
    free(store, host, lock, &Needed { netns: needed, addresses: &[] })
}

pub(crate) fn free(store: &Store, host: &mut Connection, lock: &Lock, needed: &Needed<'_>) -> Result<usize> {
    let mut freed = 0;
    for entry in store.entries()? {
        if let Some(releasing) = entry.releasing
            && link_is_gone(store, host, &entry, releasing, needed)?
        {
            store.remove(lock, &entry)?;
            freed += 1;
        }
    }
    Ok(freed)
}

fn link_is_gone(
    store: &Store,
    host: &mut Connection,
    entry: &Entry,
    releasing: store::Releasing,
    needed: &Needed<'_>,
) -> Result<bool> {
    let name = wiring::link_name(&entry.attachment);
    let failed = |cause| Error::Wiring { pod: name.clone(), cause };
    let there = link::find(host, &name).map_err(failed)?.filter(|f| f.index == releasing.ifindex);
    let Some(there) = there else { return Ok(true) };
    let overdue = store::uptime_s().saturating_sub(releasing.since_s) >= RELEASE_S;
    let wanted = || needed.addresses.iter().any(|a| entry.addresses.contains(a));
    let in_the_way = || store.read(entry).ok().flatten().is_some_and(|l| needed.netns == Some(l.netns_cookie));
    if overdue || wanted() || in_the_way() {
        return link::delete(host, there.index).map(|_| true).map_err(failed);
    }
    Ok(false)
}

/// GC (specification 1.1.0, section 2): everything of this network goes that is not of a valid attachment. Goes on
/// after a failure, and returns the first one.
pub(crate) fn collect(config: &Config) -> Result<()> {
    let valid = config.valid_attachments.as_deref().ok_or_else(|| {
        Error::Config("cni.dev/valid-attachments is missing; without it GC would take every pod's network".into())
    })?;
    let mut node = Node::open(config)?;
    let lock = Lock::take(&config.state_dir)?;
    let released = release_invalid(config, &mut node, &lock, valid);
    let freed = free(&node.store, &mut node.host, &lock, &Needed::default()).map(drop);
    let links = delete_orphans(&mut node);
    let entries = forget_orphans(config, &node.store);
    [released, freed, links, entries].into_iter().collect()
}

fn release_invalid(config: &Config, node: &mut Node, lock: &Lock, valid: &[Attachment]) -> Result<()> {
    let held = node.store.entries()?.into_iter().filter(|e| e.releasing.is_none());
    let invalid: Vec<Entry> = held.filter(|e| !valid.contains(&e.attachment)).collect();
    let mut first = None;
    for entry in invalid {
        // A lease that cannot be read is of no network that we know of: it goes.
        let network = node.store.read(&entry).ok().flatten().map(|l| l.network).unwrap_or_default();
        if !network.is_empty() && network != config.name {
            continue;
        }
        if let Err(e) = command::release(config, node, lock, &entry) {
            first.get_or_insert(e);
        }
    }
    first.map_or(Ok(()), Err)
}

/// Links of pods that no lease names. An ADD that is under way has its lease before it makes its link.
fn delete_orphans(node: &mut Node) -> Result<()> {
    let failed = |cause| Error::Wiring { pod: "(orphans)".into(), cause };
    let leased: BTreeSet<String> = node.store.entries()?.iter().map(|e| wiring::link_name(&e.attachment)).collect();
    let links = link::all(&mut node.host).map_err(failed)?;
    for (_, orphan) in links.into_iter().filter(|(n, _)| wiring::is_link_name(n) && !leased.contains(n)) {
        link::delete(&mut node.host, orphan.index).map_err(failed)?;
    }
    Ok(())
}

/// Map entries and steering of namespaces that no lease names.
fn forget_orphans(config: &Config, store: &Store) -> Result<()> {
    let maps = match wiring::open_maps(config) {
        Err(Error::NotReady(_)) => return Ok(()),
        other => other?,
    };
    let failed = |cause| Error::Maps { pod: "(orphans)".into(), cause };
    let known = leased_namespaces(store, &maps)?;
    for (cookie, _) in maps.pods.entries().map_err(failed)?.into_iter().filter(|(c, _)| !known.contains(c)) {
        maps.pods.remove(&cookie).map_err(failed)?;
    }
    for (addr, _) in maps.addrs.entries().map_err(failed)?.into_iter().filter(|(_, a)| !known.contains(&a.netns)) {
        maps.addrs.remove(&addr).map_err(failed)?;
    }
    let held = store.entries()?.into_iter().filter(|e| e.releasing.is_none());
    let addresses: BTreeSet<_> = held.flat_map(|e| e.addresses).map(sluice_ebpf::addr).collect();
    let ports = maps.host_ports.entries().map_err(failed)?;
    for (key, _) in ports.into_iter().filter(|(_, to)| !addresses.contains(&to.addr)) {
        maps.host_ports.remove(&key).map_err(failed)?;
    }
    let attached = loader::attached_pods(&config.bpffs).map_err(failed)?;
    let mut orphans = attached.into_iter().filter(|c| !known.contains(c));
    orphans.try_for_each(|c| loader::detach_pod(&config.bpffs, c).map_err(failed))
}

fn leased_namespaces(store: &Store, maps: &PodMaps) -> Result<BTreeSet<u64>> {
    let held = store.entries()?.into_iter().filter(|e| e.releasing.is_none());
    held.map(|e| match store.read(&e) {
        Ok(Some(lease)) => Ok(lease.netns_cookie),
        Ok(None) => Ok(0), // removed meanwhile
        Err(_) => wiring::guess(&e, Some(maps)).map(|l| l.netns_cookie),
    })
    .collect()
}
