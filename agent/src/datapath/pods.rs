//! Flags and excluded ports of this node's pods: what is wanted (PURE: `plan`) and writing the difference.

use sluice_ebpf::{
    common::{Addr, POD_MESHED, POD_SHAPED, Pod, PortKey, Uid},
    compile::WantedPod,
    maps::{PodMaps, padded, unpadded},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// Most pods that may be announced ahead of the snapshot.
const OVERRIDES_MAX: usize = 1024;

/// What was said about pods that the snapshot does not know yet. Bounded: the oldest word is forgotten.
#[derive(Debug, Default)]
pub(super) struct Overrides {
    by_uid: BTreeMap<String, WantedPod>,
    order: std::collections::VecDeque<String>,
}

impl Overrides {
    pub(super) fn set(&mut self, uid: &str, meshed: bool, excluded_ports: BTreeSet<u16>) {
        if self.by_uid.insert(uid.to_owned(), WantedPod { meshed, excluded_ports }).is_none() {
            self.order.push_back(uid.to_owned());
        }
        if self.order.len() > OVERRIDES_MAX {
            self.order.pop_front().map(|oldest| self.by_uid.remove(&oldest));
        }
    }

    /// From here on the snapshot speaks for these.
    fn forget(&mut self, known: &BTreeMap<String, WantedPod>) {
        self.by_uid.retain(|uid, _| !known.contains_key(uid));
        self.order.retain(|uid| self.by_uid.contains_key(uid));
    }
}

/// Entries to write and to remove.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changes {
    flags: Vec<(u64, u32)>,
    ports: Vec<PortKey>,
    remove_ports: Vec<PortKey>,
    intents: Vec<(Uid, u32)>,
    remove_intents: Vec<Uid>,
}

fn flags_of(wanted: &WantedPod) -> u32 {
    if wanted.meshed { POD_MESHED } else { 0 }
}

fn addresses(pod: &Pod) -> impl Iterator<Item = Addr> {
    [pod.addr4, pod.addr6].into_iter().filter(|a| *a != Addr::UNSET)
}

/// A pod that nobody says anything about keeps what it has: forgetting a meshed pod must not open it.
fn plan(
    wanted: &BTreeMap<String, WantedPod>,
    pods: &[(u64, Pod)],
    ports: &BTreeSet<PortKey>,
    intents: &BTreeMap<Uid, u32>,
) -> Changes {
    let mut changes = Changes::default();
    let mut wanted_ports = BTreeSet::new();
    for (cookie, pod) in pods {
        let own: Vec<Addr> = addresses(pod).collect();
        let Some(w) = wanted.get(&unpadded(&pod.uid)) else {
            wanted_ports.extend(ports.iter().filter(|k| own.contains(&k.addr)).copied());
            continue;
        };
        // That the pod is shaped is the plugin's to say.
        let flags = pod.flags & POD_SHAPED | flags_of(w);
        if pod.flags != flags {
            changes.flags.push((*cookie, flags));
        }
        let keys = own.iter().flat_map(|a| w.excluded_ports.iter().map(|p| PortKey { addr: *a, port: *p, pad: 0 }));
        wanted_ports.extend(keys);
    }
    changes.ports = wanted_ports.difference(ports).copied().collect();
    changes.remove_ports = ports.difference(&wanted_ports).copied().collect();
    let wanted_intents: BTreeMap<Uid, u32> = wanted.iter().map(|(uid, w)| (padded(uid), flags_of(w))).collect();
    changes.intents =
        wanted_intents.iter().filter(|(k, v)| intents.get(*k) != Some(v)).map(|(k, v)| (*k, *v)).collect();
    changes.remove_intents = intents.keys().filter(|k| !wanted_intents.contains_key(*k)).copied().collect();
    changes
}

pub(super) struct PodTable {
    pub(super) maps: PodMaps,
}

impl PodTable {
    pub(super) fn open(dir: &Path) -> Result<Self, sluice_ebpf::Error> {
        Ok(Self { maps: PodMaps::open(dir)? })
    }

    /// Under the lock: the plugin writes the same entries. The number of flags and ports that changed. Without a
    /// snapshot, after a restart, what the agent before us announced stays announced.
    pub(super) fn apply(
        &mut self,
        snapshot: Option<&BTreeMap<String, WantedPod>>,
        overrides: &mut Overrides,
    ) -> Result<usize, sluice_ebpf::Error> {
        let mut wanted = overrides.by_uid.clone();
        if let Some(snapshot) = snapshot {
            overrides.forget(snapshot);
            wanted.extend(snapshot.iter().map(|(uid, w)| (uid.clone(), w.clone())));
        }
        let pods = self.maps.pods.entries()?;
        let ports = self.maps.ports.entries()?.into_iter().map(|(k, _)| k).collect();
        let intents = self.maps.intents.entries()?.into_iter().collect();
        let mut changes = plan(&wanted, &pods, &ports, &intents);
        if snapshot.is_none() {
            changes.remove_intents.clear();
        }
        self.write(&changes)?;
        Ok(changes.flags.len() + changes.ports.len() + changes.remove_ports.len())
    }

    /// Intents first: a pod that is made meanwhile starts right. Ports before flags: no excluded port is closed for
    /// the moment between.
    fn write(&self, c: &Changes) -> Result<(), sluice_ebpf::Error> {
        let maps = &self.maps;
        c.intents.iter().try_for_each(|(uid, flags)| maps.intents.set(uid, flags))?;
        c.remove_intents.iter().try_for_each(|uid| maps.intents.remove(uid).map(drop))?;
        c.ports.iter().try_for_each(|key| maps.ports.set(key, &1))?;
        c.flags.iter().try_for_each(|(cookie, flags)| self.set_flags(*cookie, *flags))?;
        c.remove_ports.iter().try_for_each(|key| maps.ports.remove(key).map(drop))
    }

    fn set_flags(&self, cookie: u64, flags: u32) -> Result<(), sluice_ebpf::Error> {
        let Some(pod) = self.maps.pods.get(&cookie)? else { return Ok(()) };
        for addr in addresses(&pod) {
            if let Some(entry) = self.maps.addrs.get(&addr)?.filter(|e| e.netns == cookie) {
                self.maps.addrs.set(&addr, &sluice_ebpf::common::PodAddr { flags, ..entry })?;
            }
        }
        self.maps.pods.set(&cookie, &Pod { flags, ..pod })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, address: u32, flags: u32) -> Pod {
        Pod { uid: padded(uid), addr4: Addr::from_v4(address), flags, ..Pod::default() }
    }

    fn port(address: u32, port: u16) -> PortKey {
        PortKey { addr: Addr::from_v4(address), port, pad: 0 }
    }

    fn wanted(uid: &str, meshed: bool, ports: &[u16]) -> (String, WantedPod) {
        (uid.to_owned(), WantedPod { meshed, excluded_ports: ports.iter().copied().collect() })
    }

    #[test]
    fn flags_and_ports_follow_what_is_wanted() {
        let want = BTreeMap::from([wanted("a", true, &[9000]), wanted("later", true, &[])]);
        let pods = [(1, pod("a", 11, 0)), (2, pod("b", 12, POD_MESHED))];
        let ports = BTreeSet::from([port(11, 8000), port(12, 7000), port(99, 1)]);
        let intents = BTreeMap::from([(padded("gone"), 1), (padded("a"), POD_MESHED)]);
        let c = plan(&want, &pods, &ports, &intents);
        assert_eq!(c.flags, [(1, POD_MESHED)], "the unknown pod b stays closed");
        assert_eq!(c.ports, [port(11, 9000)]);
        assert_eq!(c.remove_ports, [port(11, 8000), port(99, 1)], "b's port stays, an address without pod loses its");
        assert_eq!(c.intents, [(padded("later"), POD_MESHED)]);
        assert_eq!(c.remove_intents, [padded("gone")]);
    }

    #[test]
    fn an_override_counts_until_the_snapshot_speaks_and_they_are_bounded() {
        let mut o = Overrides::default();
        o.set("a", true, BTreeSet::new());
        o.set("a", true, BTreeSet::from([1]));
        assert_eq!(o.by_uid["a"].excluded_ports, BTreeSet::from([1]));
        o.forget(&BTreeMap::from([wanted("a", false, &[])]));
        assert!(o.by_uid.is_empty() && o.order.is_empty());
        for n in 0..OVERRIDES_MAX + 10 {
            o.set(&n.to_string(), true, BTreeSet::new());
        }
        assert_eq!((o.by_uid.len(), o.order.len()), (OVERRIDES_MAX, OVERRIDES_MAX));
        assert!(!o.by_uid.contains_key("0"));
    }
}
