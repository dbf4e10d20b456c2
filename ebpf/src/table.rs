//! Keeps the service maps at what is wanted: only differences are written, and each service changes at one instant.
//!
//! A new state is written as backends under a set id of its own; then the service's entry is replaced; only then the
//! old backends go. A process that is killed in between leaves backends that no service names, which the next one
//! removes.

use crate::{
    error::Result,
    layout::{Wanted, lay_out, read_back},
    maps::ServiceMaps,
};
use sluice_ebpf_common::{Backend, BackendKey, Service, ServiceKey};
use std::collections::{BTreeMap, HashMap, HashSet};

/// What an application of wanted entries did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub written: usize,
    pub removed: usize,
    pub unchanged: usize,
}

struct Present {
    set: u32,
    /// Size of the set, also of one that does not read back.
    backends: u32,
    /// `None`: what is there is damaged and will be replaced.
    wanted: Option<Wanted>,
}

/// The service maps and what this process knows to be in them.
pub struct ServiceTable {
    maps: ServiceMaps,
    present: BTreeMap<ServiceKey, Present>,
    next_set: u32,
}

impl ServiceTable {
    /// Reads what is there: a restarted agent goes on from it.
    pub fn open(maps: ServiceMaps) -> Result<Self> {
        let mut table = Self { maps, present: BTreeMap::new(), next_set: 1 };
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
        let highest = sets.iter().chain(backends.keys().map(|k| &k.set)).max().copied().unwrap_or(0);
        self.next_set = self.next_set.max(highest.wrapping_add(1).max(1));
        let mut sizes = HashMap::<u32, u32>::new();
        for key in backends.keys() {
            let size = sizes.entry(key.set).or_default();
            *size = (*size).max(key.index + 1);
        }
        let present = |(key, s): (ServiceKey, Service)| {
            let wanted = read_back(&key, &s, |k| backends.get(&k).copied());
            (key, Present { set: s.set, backends: sizes.get(&s.set).copied().unwrap_or(0), wanted })
        };
        self.present = services.into_iter().map(present).collect();
        Ok(())
    }

    /// Makes the maps say `wanted` and nothing else. On an error what was done stays done and is known: the next call
    /// does the rest.
    pub fn apply(&mut self, wanted: &BTreeMap<ServiceKey, Wanted>) -> Result<Changes> {
        let mut changes = Changes::default();
        let mut stale = Vec::new();
        let outcome = self.write(wanted, &mut changes, &mut stale);
        for (set, count) in stale {
            for index in 0..count {
                self.maps.backends.remove(&BackendKey { set, index })?;
            }
        }
        outcome.map(|()| changes)
    }

    fn write(
        &mut self,
        wanted: &BTreeMap<ServiceKey, Wanted>,
        changes: &mut Changes,
        stale: &mut Vec<(u32, u32)>,
    ) -> Result<()> {
        let gone: Vec<ServiceKey> = self.present.keys().filter(|k| !wanted.contains_key(k)).copied().collect();
        for key in gone {
            self.maps.services.remove(&key)?;
            stale.extend(self.present.remove(&key).map(|p| (p.set, p.backends)));
            changes.removed += 1;
        }
        for (key, w) in wanted {
            if self.present.get(key).is_some_and(|p| p.wanted.as_ref() == Some(w)) {
                changes.unchanged += 1;
                continue;
            }
            let next = self.replace(key, w)?;
            stale.extend(self.present.insert(*key, next).map(|p| (p.set, p.backends)));
            changes.written += 1;
        }
        Ok(())
    }

    fn replace(&mut self, key: &ServiceKey, wanted: &Wanted) -> Result<Present> {
        let set = self.next_set;
        self.next_set = self.next_set.wrapping_add(1).max(1);
        let (service, backends) = lay_out(key, wanted, set);
        let written = backends
            .iter()
            .try_for_each(|(k, b)| self.maps.backends.set(k, b))
            .and_then(|()| self.maps.services.set(key, &service));
        if let Err(e) = written {
            for (k, _) in &backends {
                let _ = self.maps.backends.remove(k); // the error that counts is the one below
            }
            return Err(e);
        }
        Ok(Present { set, backends: backends.len() as u32, wanted: Some(wanted.clone()) })
    }
}
