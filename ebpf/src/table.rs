//! Keeps the service maps at what is wanted: only differences are written, and each service changes at one instant.
//!
//! A new state is written as backends, and ranges of clients, under a set id of its own; then the service's entry is replaced; only then the
//! old backends go. A process that is killed in between leaves backends that no service names, which the next one
//! removes.

use crate::{
    error::Result,
    layout::{Target, Wanted, lay_out, read_back},
    maps::ServiceMaps,
};
use sluice_ebpf_common::{Backend, BackendKey, INSIDE, MaglevKey, MemberKey, Service, ServiceKey, SourceRange};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

/// What an application of wanted entries did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub written: usize,
    pub removed: usize,
    pub unchanged: usize,
}

struct Present {
    entries: Entries,
    /// `None`: what is there is damaged and will be replaced.
    wanted: Option<Arc<Wanted>>,
}

/// What belongs to one set, also to one that does not read back.
#[derive(Default)]
struct Entries {
    set: u32,
    backends: u32,
    members: Vec<MemberKey>,
    sources: Vec<SourceRange>,
    /// Blocks of its Maglev table.
    blocks: u32,
}

/// The service maps and what this process knows to be in them.
pub struct ServiceTable {
    maps: ServiceMaps,
    present: BTreeMap<ServiceKey, Present>,
    next_set: u32,
    withdrawn: BTreeSet<(ServiceKey, Target)>,
    /// Services for whose Maglev tables there was no room; tried again when they change, or after a restart.
    untabled: BTreeSet<ServiceKey>,
}

impl ServiceTable {
    /// Reads what is there: a restarted agent goes on from it.
    pub fn open(maps: ServiceMaps) -> Result<Self> {
        let mut table =
            Self { maps, present: BTreeMap::new(), next_set: 1, withdrawn: BTreeSet::new(), untabled: BTreeSet::new() };
        table.reread()?;
        Ok(table)
    }

    /// Forgets what this process thinks and reads the maps again, removing backends that no service names.
    pub fn reread(&mut self) -> Result<()> {
        let services: Vec<(ServiceKey, Service)> = self.maps.services.entries()?;
        let backends: HashMap<BackendKey, Backend> = self.maps.backends.entries()?.into_iter().collect();
        let sets: HashSet<u32> = services.iter().map(|(_, s)| s.set).collect();
        for key in backends.keys().filter(|k| !sets.contains(&k.set)) {
            self.maps.backends.remove(key)?;
        }
        let mut members = HashMap::<u32, Vec<MemberKey>>::new();
        for (key, _) in self.maps.members.entries()? {
            match sets.contains(&key.set) {
                true => members.entry(key.set).or_default().push(key),
                false => drop(self.maps.members.remove(&key)?),
            }
        }
        let mut sources = HashMap::<u32, Vec<SourceRange>>::new();
        for key in self.maps.sources.keys()? {
            match sets.contains(&key.source.set) {
                true => sources.entry(key.source.set).or_default().push(key),
                false => drop(self.maps.sources.remove(&key)?),
            }
        }
        let blocks = self.blocks(&sets)?;
        let highest = sets.iter().chain(backends.keys().map(|k| &k.set)).max().copied().unwrap_or(0);
        self.next_set = self.next_set.max(highest.wrapping_add(1).max(1));
        let mut sizes = HashMap::<u32, u32>::new();
        for key in backends.keys() {
            let size = sizes.entry(key.set).or_default();
            *size = (*size).max(key.index + 1);
        }
        let present = |(key, s): (ServiceKey, Service)| {
            let members = members.remove(&s.set).unwrap_or_default();
            let there: HashSet<&MemberKey> = members.iter().collect();
            let all_there = |w: &Wanted| w.members(s.set).all(|m| there.contains(&m));
            let blocks = blocks.get(&s.set).copied().unwrap_or(0);
            let sources = sources.remove(&s.set).unwrap_or_default();
            let wanted = read_back(&key, &s, &sources, |k| backends.get(&k).copied()).filter(all_there);
            let mut wanted = wanted.filter(|w| w.blocks() == blocks);
            if let Some(wanted) = wanted.as_mut().filter(|_| self.untabled.contains(&key)) {
                wanted.maglev = true;
            }
            let backends = sizes.get(&s.set).copied().unwrap_or(0);
            let entries = Entries { set: s.set, backends, members, sources, blocks };
            (key, Present { entries, wanted: wanted.map(Arc::new) })
        };
        self.present = services.into_iter().map(present).collect();
        Ok(())
    }

    /// Blocks of Maglev tables by set. What this process has written itself it takes for granted: the tables are large,
    /// and this is asked every second.
    fn blocks(&self, sets: &HashSet<u32>) -> Result<HashMap<u32, u32>> {
        if !self.present.is_empty() {
            return Ok(self.present.values().map(|p| (p.entries.set, p.entries.blocks)).collect());
        }
        let mut blocks = HashMap::<u32, u32>::new();
        for key in self.maps.maglev.keys()? {
            match sets.contains(&key.set) {
                true => *blocks.entry(key.set).or_default() += 1,
                false => drop(self.maps.maglev.remove(&key)?),
            }
        }
        Ok(blocks)
    }

    /// Makes the maps say `wanted` and nothing else. On an error what was done stays done and is known: the next call
    /// does the rest.
    pub fn apply(&mut self, wanted: &BTreeMap<ServiceKey, Arc<Wanted>>) -> Result<Changes> {
        let mut changes = Changes::default();
        let mut stale = Vec::new();
        let outcome = self.write(wanted, &mut changes, &mut stale);
        for entries in stale {
            self.remove(&entries)?;
        }
        outcome.map(|()| changes)
    }

    /// Backends that services have lost since the last call.
    pub fn take_withdrawn(&mut self) -> BTreeSet<(ServiceKey, Target)> {
        std::mem::take(&mut self.withdrawn)
    }

    /// Sockets, by cookie, that one of `withdrawn` was chosen for, with the backend.
    pub fn stranded(&self, withdrawn: &BTreeSet<(ServiceKey, Target)>) -> Result<HashMap<u64, HashSet<Target>>> {
        let mut found = HashMap::<u64, HashSet<Target>>::new();
        for (to, from) in self.maps.reverse.entries()? {
            let service = ServiceKey { addr: from.addr, port_be: from.port_be, proto: to.proto, scope: INSIDE };
            let target = Target { addr: to.addr, port_be: to.port_be };
            if withdrawn.contains(&(service, target)) {
                found.entry(to.socket).or_default().insert(target);
            }
        }
        Ok(found)
    }

    fn write(
        &mut self,
        wanted: &BTreeMap<ServiceKey, Arc<Wanted>>,
        changes: &mut Changes,
        stale: &mut Vec<Entries>,
    ) -> Result<()> {
        let gone: Vec<ServiceKey> = self.present.keys().filter(|k| !wanted.contains_key(k)).copied().collect();
        for key in gone {
            self.maps.services.remove(&key)?;
            stale.extend(self.replaced(&key, None, None));
            changes.removed += 1;
        }
        for (key, w) in wanted {
            if self.present.get(key).is_some_and(|p| p.wanted.as_ref() == Some(w)) {
                changes.unchanged += 1;
                continue;
            }
            let next = self.replace(key, w)?;
            stale.extend(self.replaced(key, Some(next), Some(w)));
            changes.written += 1;
        }
        Ok(())
    }

    fn replace(&mut self, key: &ServiceKey, wanted: &Arc<Wanted>) -> Result<Present> {
        let set = self.next_set;
        self.next_set = self.next_set.wrapping_add(1).max(1);
        let blocks = self.write_table(wanted, set);
        match wanted.maglev && blocks == 0 {
            true => self.untabled.insert(*key),
            false => self.untabled.remove(key),
        };
        let (service, backends) = match blocks {
            0 => lay_out(key, &Wanted { maglev: false, ..Wanted::clone(wanted) }, set),
            _ => lay_out(key, wanted, set),
        };
        let count = backends.len() as u32;
        let (members, sources) = (wanted.members(set).collect(), wanted.source_ranges(set).collect());
        let entries = Entries { set, backends: count, members, sources, blocks };
        let written = backends
            .iter()
            .try_for_each(|(k, b)| self.maps.backends.set(k, b))
            .and_then(|()| entries.members.iter().try_for_each(|m| self.maps.members.set(m, &1)))
            .and_then(|()| entries.sources.iter().try_for_each(|s| self.maps.sources.set(s, &1)))
            .and_then(|()| self.maps.services.set(key, &service));
        if let Err(e) = written {
            let _ = self.remove(&entries); // the error that counts is the one below
            return Err(e);
        }
        Ok(Present { entries, wanted: Some(wanted.clone()) })
    }

    /// Blocks written; none where the map has no room: packets then choose by weight, and a backend that goes moves more
    /// connections than its own.
    fn write_table(&self, wanted: &Wanted, set: u32) -> u32 {
        let table = wanted.table(set);
        let written = table.iter().take_while(|(k, b)| self.maps.maglev.set(k, b).is_ok()).count();
        if written == table.len() {
            return written as u32;
        }
        for (key, _) in &table[..written] {
            let _ = self.maps.maglev.remove(key); // swept at the next start
        }
        0
    }

    /// Notes what a service is now; the entries of what it was.
    fn replaced(&mut self, key: &ServiceKey, next: Option<Present>, wanted: Option<&Wanted>) -> Option<Entries> {
        let before = match next {
            Some(next) => self.present.insert(*key, next),
            None => self.present.remove(key),
        }?;
        let kept: HashSet<&Target> = wanted.into_iter().flat_map(Wanted::targets).collect();
        let lost = before.wanted.iter().flat_map(|w| w.targets()).filter(|t| !kept.contains(t));
        self.withdrawn.extend(lost.map(|t| (*key, *t)));
        Some(before.entries)
    }

    fn remove(&self, entries: &Entries) -> Result<()> {
        let set = entries.set;
        for index in 0..entries.backends {
            self.maps.backends.remove(&BackendKey { set, index })?;
        }
        for block in 0..entries.blocks {
            self.maps.maglev.remove(&MaglevKey { set, block })?;
        }
        entries.members.iter().try_for_each(|m| self.maps.members.remove(m).map(drop))?;
        entries.sources.iter().try_for_each(|s| self.maps.sources.remove(s).map(drop))
    }
}
