//! Keeps the service maps at what is wanted: only differences are written, and each service changes at one instant.
//!
//! A new state is written as backends, and ranges of clients, under a set id of its own; then the service's entry is replaced; only then the
//! old backends go. A process that is killed in between leaves backends that no service names, which the next one
//! removes.
//!
//! A service for which a map has no room refuses its callers, is named ([`ServiceTable::unfit`]) and tried again; it keeps no
//! other from changing.

use crate::{
    error::Result,
    layout::{Target, Wanted, lay_out, read_back},
    maps::{Cursor, ServiceMaps},
};
use sluice_ebpf_common::{
    Backend, BackendKey, CT_REPLY, Flow, INSIDE, MaglevKey, MemberKey, NODE_PORTS, OUTSIDE, Reverse, ReverseKey,
    Service, ServiceKey, SourceRange, Translation, UDP,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ops::Bound,
    sync::Arc,
};

/// What an application of wanted entries did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub written: usize,
    pub removed: usize,
    pub unchanged: usize,
    /// For which there was no room.
    pub unfit: usize,
}

/// Sockets, by cookie, with the backends that they are connected to and that their service does not lead to any more.
pub type Stranded = HashMap<u64, HashSet<Target>>;

/// Services that are tried again at a time while no room was made.
const TRIES: usize = 8;
/// Entries that one [`ServiceTable::look`] compares or looks for strays among, of each map: some milliseconds.
const LOOKS: usize = 4_096;

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
    /// Services for which there was no room, and why.
    unfit: BTreeMap<ServiceKey, Unfit>,
    /// The last of them that was tried again.
    tried: Option<ServiceKey>,
    looked: Looked,
}

struct Unfit {
    wanted: Arc<Wanted>,
    cause: String,
}

/// How far looking has come.
#[derive(Default)]
struct Looked {
    service: Option<ServiceKey>,
    services: Cursor,
    backends: Cursor,
    members: Cursor,
    connected: Cursor,
}

impl ServiceTable {
    /// Reads what is there: a restarted agent goes on from it.
    pub fn open(maps: ServiceMaps) -> Result<Self> {
        let mut table = Self {
            maps,
            present: BTreeMap::new(),
            next_set: 1,
            withdrawn: BTreeSet::new(),
            untabled: BTreeSet::new(),
            unfit: BTreeMap::new(),
            tried: None,
            looked: Looked::default(),
        };
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
        let room = !stale.is_empty();
        for entries in stale {
            self.remove(&entries)?;
        }
        self.unfit.retain(|key, _| wanted.contains_key(key));
        for key in outcome?.into_iter().chain(self.again(room)).collect::<BTreeSet<_>>() {
            changes.written += usize::from(self.fit(&key)?);
        }
        changes.unfit = self.unfit.len();
        Ok(changes)
    }

    /// Services for which there is no room, and why: their callers are refused.
    pub fn unfit(&self) -> impl Iterator<Item = (&ServiceKey, &str)> {
        self.unfit.iter().map(|(key, u)| (key, u.cause.as_str()))
    }

    /// Backends that services have lost since the last call.
    pub fn take_withdrawn(&mut self) -> BTreeSet<(ServiceKey, Target)> {
        std::mem::take(&mut self.withdrawn)
    }

    /// UDP sockets that what they dialled does not lead to their backend any more: of a service, a node port or a host port.
    /// It is told by what the maps say now, not by what was withdrawn: an agent that was killed before it closed them is no
    /// reason to leave them.
    pub fn stranded(&self) -> Result<Stranded> {
        let mut found = Stranded::new();
        // Programs of before had one map for all sockets.
        let connected = self.maps.connected.entries()?;
        let before = self.maps.reverse.entries()?.into_iter().filter(|(to, _)| to.proto == UDP);
        for (to, from) in connected.into_iter().chain(before) {
            self.judge(&to, &from, &mut found)?;
        }
        Ok(found)
    }

    /// The same among the next of the connected ones.
    pub fn stranded_next(&mut self) -> Result<Stranded> {
        let mut found = Stranded::new();
        let (some, end) = self.maps.connected.some(&mut self.looked.connected, LOOKS / 4)?;
        if end {
            self.looked.connected = Cursor::default();
        }
        for (to, from) in some {
            self.judge(&to, &from, &mut found)?;
        }
        Ok(found)
    }

    /// What was noted for sockets that were closed, or that are gone.
    pub fn forget(&self, stranded: &Stranded) -> Result<()> {
        for (socket, targets) in stranded {
            for target in targets {
                let (socket, addr, port_be) = (*socket, target.addr, target.port_be);
                let key = ReverseKey { socket, addr, port_be, proto: UDP, pad: [0; 5] };
                // It may be connected again, by another service.
                if let Some(from) = self.maps.connected.get(&key)?
                    && !self.leads(&key, &from)?
                {
                    self.maps.connected.remove(&key)?;
                }
            }
        }
        Ok(())
    }

    /// Whether a connection has a backend that what its caller dialled does not lead to any more.
    pub(crate) fn misleads(&self, flow: &Flow, t: &Translation) -> Result<bool> {
        let moved = t.to.dport_be != flow.dport_be || !t.to.dst.same(&flow.dst);
        if t.flags & CT_REPLY != 0 || !moved {
            return Ok(false);
        }
        let target = Target { addr: t.to.dst, port_be: t.to.dport_be };
        let dialled = ServiceKey { addr: flow.dst, port_be: flow.dport_be, proto: flow.proto, scope: INSIDE };
        let any = ServiceKey { addr: flow.dst.unspecified(), ..dialled };
        // An entry does not say for whom its backend was chosen.
        let of = |key: &ServiceKey| [INSIDE, OUTSIDE].map(|scope| self.present.get(&ServiceKey { scope, ..*key }));
        let any_leads = |found: [Option<&Present>; 2]| found.into_iter().flatten().any(|p| leads(p, &target));
        let host_port = |key| {
            let pod = self.maps.host_ports.get(key)?;
            Ok(pod.map(|pod| pod.addr == target.addr && pod.port_be == target.port_be))
        };
        // In the order in which the programs look.
        let service = of(&dialled);
        if service[0].is_some() {
            return Ok(!any_leads(service));
        }
        if let Some(leads) = host_port(&dialled)? {
            return Ok(!leads);
        }
        let node_port = of(&any);
        if NODE_PORTS.contains(&u16::from_be(any.port_be)) && node_port[0].is_some() {
            return Ok(!any_leads(node_port));
        }
        Ok(host_port(&any)? != Some(true))
    }

    fn judge(&self, to: &ReverseKey, from: &Reverse, found: &mut Stranded) -> Result<()> {
        if !self.leads(to, from)? {
            found.entry(to.socket).or_default().insert(Target { addr: to.addr, port_be: to.port_be });
        }
        Ok(())
    }

    /// Whether what was dialled leads to the backend now: as the programs look it up.
    fn leads(&self, to: &ReverseKey, from: &Reverse) -> Result<bool> {
        let target = Target { addr: to.addr, port_be: to.port_be };
        let dialled = ServiceKey { addr: from.addr, port_be: from.port_be, proto: to.proto, scope: INSIDE };
        let any = ServiceKey { addr: from.addr.unspecified(), ..dialled };
        if let Some(service) = self.present.get(&dialled) {
            return Ok(leads(service, &target));
        }
        for key in [&dialled, &any] {
            if let Some(pod) = self.maps.host_ports.get(key)? {
                return Ok(pod.addr == target.addr && pod.port_be == target.port_be);
            }
        }
        Ok(NODE_PORTS.contains(&u16::from_be(any.port_be)) && self.present.get(&any).is_some_and(|p| leads(p, &target)))
    }

    /// Compares the next entries with what this process has written; what differs is written anew by the next
    /// [`Self::apply`]. [`Self::reread`] does so with all of them.
    pub fn look(&mut self) -> Result<()> {
        self.look_at_services()?;
        let (services, end) = self.maps.services.some(&mut self.looked.services, LOOKS / 8)?;
        if end {
            self.looked.services = Cursor::default();
        }
        for (key, s) in services {
            // Nobody's: the next application removes it.
            let stranger = || Present { entries: Entries { set: s.set, ..Entries::default() }, wanted: None };
            self.present.entry(key).or_insert_with(stranger);
        }
        let sets: HashSet<u32> = self.present.values().map(|p| p.entries.set).collect();
        let (backends, end) = self.maps.backends.some(&mut self.looked.backends, LOOKS)?;
        if end {
            self.looked.backends = Cursor::default();
        }
        for (key, _) in backends.iter().filter(|(k, _)| !sets.contains(&k.set)) {
            self.maps.backends.remove(key)?;
        }
        let (members, end) = self.maps.members.some(&mut self.looked.members, LOOKS / 4)?;
        if end {
            self.looked.members = Cursor::default();
        }
        for (key, _) in members.iter().filter(|(k, _)| !sets.contains(&k.set)) {
            self.maps.members.remove(key)?;
        }
        Ok(())
    }

    fn look_at_services(&mut self) -> Result<()> {
        let mut left = LOOKS;
        let mut damaged = Vec::new();
        let from = self.looked.service.map_or(Bound::Unbounded, Bound::Excluded);
        let (mut last, mut next) = (None, None);
        for (key, p) in self.present.range((from, Bound::Unbounded)) {
            if left == 0 {
                next = last;
                break;
            }
            last = Some(*key);
            let Some(wanted) = &p.wanted else { continue };
            let set = p.entries.set;
            let (service, backends) = laid_out(key, wanted, set, p.entries.blocks);
            left = left.saturating_sub(1 + backends.len() + p.entries.members.len());
            let mut same = self.maps.services.get(key)? == Some(service);
            for (k, b) in &backends {
                same &= self.maps.backends.get(k)? == Some(*b);
            }
            for member in &p.entries.members {
                same &= self.maps.members.get(member)?.is_some();
            }
            if !same {
                damaged.push(*key);
            }
        }
        self.looked.service = next;
        for key in damaged {
            if let Some(p) = self.present.get_mut(&key) {
                p.wanted = None;
            }
        }
        Ok(())
    }

    /// Those for which there was no room.
    fn write(
        &mut self,
        wanted: &BTreeMap<ServiceKey, Arc<Wanted>>,
        changes: &mut Changes,
        stale: &mut Vec<Entries>,
    ) -> Result<Vec<ServiceKey>> {
        let mut fresh = Vec::new();
        let gone: Vec<ServiceKey> = self.present.keys().filter(|k| !wanted.contains_key(k)).copied().collect();
        for key in gone {
            self.maps.services.remove(&key)?;
            stale.extend(self.replaced(&key, None, None));
            changes.removed += 1;
        }
        for (key, w) in wanted {
            if self.present.get(key).is_some_and(|p| p.wanted.as_ref() == Some(w)) {
                self.unfit.remove(key);
                changes.unchanged += 1;
                continue;
            }
            // Tried again below.
            if self.unfit.get(key).is_some_and(|u| u.wanted == *w) {
                continue;
            }
            match self.replace(key, w) {
                Ok(next) => {
                    stale.extend(self.replaced(key, Some(next), Some(w)));
                    self.unfit.remove(key);
                    changes.written += 1;
                }
                Err(e) if e.is_full() => {
                    self.unfit.insert(*key, Unfit { wanted: w.clone(), cause: e.with_cause() });
                    fresh.push(*key);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(fresh)
    }

    /// Whom to try again: all where room was made, else a few, by turns.
    fn again(&mut self, room: bool) -> Vec<ServiceKey> {
        if room {
            return self.unfit.keys().copied().collect();
        }
        let from = self.tried.map_or(Bound::Unbounded, Bound::Excluded);
        let next: Vec<ServiceKey> = self.unfit.range((from, Bound::Unbounded)).map(|(k, _)| *k).take(TRIES).collect();
        self.tried = next.last().copied().filter(|_| next.len() == TRIES);
        next
    }

    /// Tries a service again for which there was no room. Where there still is none its old state goes, which leads to
    /// backends that may have gone, and makes room; then it refuses its callers.
    fn fit(&mut self, key: &ServiceKey) -> Result<bool> {
        let Some(wanted) = self.unfit.get(key).map(|u| u.wanted.clone()) else { return Ok(false) };
        let refusing = Arc::new(wanted.refusing());
        let refuses = self.present.get(key).is_some_and(|p| p.wanted.as_ref() == Some(&refusing));
        if self.put(key, &wanted)? || !refuses && self.put(key, &refusing)? && self.put(key, &wanted)? {
            self.unfit.remove(key);
            return Ok(true);
        }
        Ok(false)
    }

    /// False where there is no room.
    fn put(&mut self, key: &ServiceKey, wanted: &Arc<Wanted>) -> Result<bool> {
        match self.replace(key, wanted) {
            Ok(next) => {
                let before = self.replaced(key, Some(next), Some(wanted));
                before.map_or(Ok(()), |entries| self.remove(&entries)).map(|()| true)
            }
            Err(e) if e.is_full() => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn replace(&mut self, key: &ServiceKey, wanted: &Arc<Wanted>) -> Result<Present> {
        let set = self.next_set;
        self.next_set = self.next_set.wrapping_add(1).max(1);
        let blocks = self.write_table(wanted, set);
        match wanted.maglev && blocks == 0 {
            true => self.untabled.insert(*key),
            false => self.untabled.remove(key),
        };
        let (service, backends) = laid_out(key, wanted, set, blocks);
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

/// Without blocks of a Maglev table, packets choose by weight.
fn laid_out(key: &ServiceKey, wanted: &Wanted, set: u32, blocks: u32) -> (Service, Vec<(BackendKey, Backend)>) {
    match blocks {
        0 if wanted.maglev => lay_out(key, &Wanted { maglev: false, ..wanted.clone() }, set),
        _ => lay_out(key, wanted, set),
    }
}

/// PURE. Of what is damaged it is not known where it leads.
fn leads(service: &Present, target: &Target) -> bool {
    service.wanted.as_ref().is_none_or(|w| w.targets().any(|t| t == target))
}
