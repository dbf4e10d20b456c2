//! PURE: between what a service should do ([`Wanted`]) and the map values that make the programs do it.
//!
//! `lookup` is the user-space mirror of the programs' choice; tests compare it with a slow, obvious reference.

use crate::maglev;
use sluice_ebpf_common::{
    Addr, Backend, BackendKey, Group, MAGLEV_BLOCK, MAGLEV_SHIFT, MAX_GROUPS, MaglevBlock, MaglevKey, MemberKey, Range,
    SERVICE_NODE_ADMITTED, SERVICE_NODE_LOCAL, SERVICE_OUTSIDE, SERVICE_RESTRICTED, Service, ServiceKey, Source,
    SourceRange,
};
use std::sync::Arc;

/// Where a connection may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    pub addr: Addr,
    pub port_be: u16,
}

/// Backends that share one weight evenly; the weight is never 0 in what `compile` makes. One without targets refuses
/// its share of the connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedGroup {
    pub weight: u32,
    pub targets: Vec<Target>,
}

/// Who may use a service that not all may; by default nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// Ranges of clients' addresses, in order and each once.
    pub ranges: Vec<Range>,
    /// The node's own processes may.
    pub node: bool,
}

/// What one service port should do. No group: connections are refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub node_local: bool,
    /// Seconds for which a client keeps its backend; 0: none does.
    pub affinity_s: u32,
    /// Packets choose by a Maglev table.
    pub maglev: bool,
    /// Callers from outside have an entry of their own.
    pub outside: bool,
    /// `None`: everybody may use it.
    pub sources: Option<Arc<Sources>>,
    pub groups: Vec<WantedGroup>,
}

impl Wanted {
    /// At most [`MAX_GROUPS`] groups, weights scaled so that their sum fits; group order is kept.
    pub fn new(node_local: bool, mut groups: Vec<WantedGroup>) -> Self {
        groups.retain(|g| g.weight > 0);
        groups.truncate(MAX_GROUPS);
        if groups.iter().all(|g| g.targets.is_empty()) {
            groups.clear();
        }
        let sum: u64 = groups.iter().map(|g| g.weight as u64).sum();
        let shift = (64 - (sum >> 32).leading_zeros()).min(31);
        for g in &mut groups {
            g.weight = (g.weight >> shift).max(1);
            g.targets.sort_unstable();
            g.targets.dedup();
        }
        Self { node_local, groups, ..Self::default() }
    }

    /// The same without a backend: for who cannot be served.
    pub fn refusing(&self) -> Self {
        Self { node_local: self.node_local, outside: self.outside, ..Self::default() }
    }

    /// Clients keep their backends for so many seconds.
    pub fn affine(self, affinity_s: Option<u32>) -> Self {
        Self { affinity_s: affinity_s.unwrap_or(0), ..self }
    }

    /// Packets choose by a Maglev table, where there is a backend to choose.
    pub fn by_maglev(mut self) -> Self {
        self.maglev = maglev::slots(&self.groups).is_some();
        self
    }

    /// What says that a backend belongs to `set`; nothing where no client asks.
    pub fn members(&self, set: u32) -> impl Iterator<Item = MemberKey> + '_ {
        self.targets().filter(|_| self.affinity_s > 0).map(move |t| MemberKey {
            set,
            port_be: t.port_be,
            pad: 0,
            addr: t.addr,
        })
    }

    /// Who may use it, while `set` is its state.
    pub fn source_ranges(&self, set: u32) -> impl Iterator<Item = SourceRange> + '_ {
        let ranges = self.sources.iter().flat_map(|sources| &sources.ranges);
        ranges.map(move |r| SourceRange { len: SET_BITS + r.len, source: Source { set, addr: r.addr } })
    }

    /// Slots of the Maglev table, a power of two.
    fn slots(&self) -> Option<usize> {
        self.maglev.then(|| maglev::slots(&self.groups)).flatten()
    }

    /// How many blocks its Maglev table has.
    pub fn blocks(&self) -> u32 {
        self.slots().map_or(0, |slots| (slots / MAGLEV_BLOCK) as u32)
    }

    /// The Maglev table in blocks, to be written before the service names it.
    pub fn table(&self, set: u32) -> Vec<(MaglevKey, MaglevBlock)> {
        if !self.maglev {
            return vec![];
        }
        let table = maglev::table(&self.groups);
        let blocks = table.chunks_exact(MAGLEV_BLOCK).filter_map(|c| c.try_into().ok());
        (0..).zip(blocks).map(|(block, slots)| (MaglevKey { set, block }, slots)).collect()
    }

    pub fn targets(&self) -> impl Iterator<Item = &Target> {
        self.groups.iter().flat_map(|g| &g.targets)
    }
}

/// Bits of a set's number, before those of an address.
const SET_BITS: u32 = u32::BITS;

/// The values for one service under the set id `set`.
pub fn lay_out(key: &ServiceKey, wanted: &Wanted, set: u32) -> (Service, Vec<(BackendKey, Backend)>) {
    let mut flags = if wanted.node_local { SERVICE_NODE_LOCAL } else { 0 };
    flags |= if wanted.outside { SERVICE_OUTSIDE } else { 0 };
    if let Some(sources) = &wanted.sources {
        flags |= SERVICE_RESTRICTED | if sources.node { SERVICE_NODE_ADMITTED } else { 0 };
    }
    if let Some(slots) = wanted.slots() {
        flags |= slots.trailing_zeros() << MAGLEV_SHIFT;
    }
    let (groups, affinity_s) = (wanted.groups.len() as u32, wanted.affinity_s);
    let mut service = Service { set, groups, flags, affinity_s, ..Service::default() };
    let (mut upto, mut first) = (0u32, 0u32);
    for (slot, group) in service.group.iter_mut().zip(&wanted.groups) {
        upto = upto.saturating_add(group.weight);
        let count = group.targets.len() as u32;
        *slot = Group { upto, first, count };
        first += count;
    }
    let backend = |t: &Target| Backend {
        addr: t.addr,
        port_be: t.port_be,
        service_port_be: key.port_be,
        service_word: key.addr.words[3],
    };
    let backends = wanted.targets().zip(0..).map(|(t, index)| (BackendKey { set, index }, backend(t))).collect();
    (service, backends)
}

/// What entries found in the maps say, with the ranges found under the service's set; `None` when they are not what
/// [`lay_out`] makes.
pub fn read_back(
    key: &ServiceKey,
    service: &Service,
    found: &[SourceRange],
    mut get: impl FnMut(BackendKey) -> Option<Backend>,
) -> Option<Wanted> {
    let mut groups = Vec::new();
    let mut below = 0;
    for g in service.group.get(..service.groups as usize)? {
        let weight = g.upto.checked_sub(below)?;
        below = g.upto;
        let target = |i: u32| {
            let b = get(BackendKey { set: service.set, index: g.first.checked_add(i)? })?;
            let own = b.service_port_be == key.port_be && b.service_word == key.addr.words[3];
            own.then_some(Target { addr: b.addr, port_be: b.port_be })
        };
        groups.push(WantedGroup { weight, targets: (0..g.count).map(target).collect::<Option<_>>()? });
    }
    let node_local = service.flags & SERVICE_NODE_LOCAL != 0;
    let outside = service.flags & SERVICE_OUTSIDE != 0;
    let maglev = service.flags >> MAGLEV_SHIFT != 0;
    let sources = (service.flags & SERVICE_RESTRICTED != 0).then(|| {
        let range = |r: &SourceRange| Some(Range { len: r.len.checked_sub(SET_BITS)?, addr: r.source.addr });
        let mut ranges: Vec<Range> = found.iter().filter_map(range).collect();
        ranges.sort_unstable();
        Arc::new(Sources { ranges, node: service.flags & SERVICE_NODE_ADMITTED != 0 })
    });
    let wanted = Wanted { node_local, affinity_s: service.affinity_s, maglev, outside, sources, groups };
    let canonical = lay_out(key, &wanted, service.set).0 == *service && wanted.source_ranges(0).count() == found.len();
    canonical.then_some(wanted)
}

/// The programs' choice, given the same two even numbers.
pub fn lookup(
    service: &Service,
    get: impl Fn(BackendKey) -> Option<Backend>,
    by_weight: u32,
    in_group: u32,
) -> Option<Target> {
    let scale = |number: u32, below: u32| ((number as u64 * below as u64) >> 32) as u32;
    let last = service.group[(service.groups as usize).checked_sub(1)?];
    let number = scale(by_weight, last.upto);
    let group = service.group.iter().find(|g| number < g.upto).filter(|g| g.count > 0)?;
    let b = get(BackendKey { set: service.set, index: group.first + scale(in_group, group.count) })?;
    Some(Target { addr: b.addr, port_be: b.port_be })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_ebpf_common::INSIDE;

    fn group(weight: u32, ports: &[u16]) -> WantedGroup {
        let targets = ports.iter().map(|p| Target { addr: Addr::from_v4(*p as u32), port_be: *p }).collect();
        WantedGroup { weight, targets }
    }

    fn sources(node: bool) -> Option<Arc<Sources>> {
        let range = |len| Range { len, addr: Addr::from_v4(7) };
        Some(Arc::new(Sources { ranges: vec![range(120), range(128)], node }))
    }

    #[test]
    fn values_read_back_as_what_was_wanted() {
        let key = ServiceKey { addr: Addr::from_v4(9), port_be: 80, proto: 6, scope: INSIDE };
        for wanted in [
            Wanted::default(),
            Wanted::new(true, vec![group(1, &[1])]),
            Wanted::new(false, vec![group(90, &[1, 2, 3]), group(10, &[4])]),
            Wanted::new(false, vec![group(90, &[]), group(10, &[4])]),
            Wanted::new(false, vec![group(1, &[1, 2])]).affine(Some(10_800)),
            Wanted { sources: Some(Arc::default()), ..Wanted::default() },
            Wanted { sources: sources(true), ..Wanted::new(false, vec![group(1, &[1, 2])]) },
        ] {
            let (service, backends) = lay_out(&key, &wanted, 7);
            let get = |k| backends.iter().find(|(x, _)| *x == k).map(|(_, b)| *b);
            let sources: Vec<SourceRange> = wanted.source_ranges(7).collect();
            assert_eq!(read_back(&key, &service, &sources, get), Some(wanted.clone()));
            if let Some((_, fewer)) = sources.split_first() {
                assert_ne!(read_back(&key, &service, fewer, get), Some(wanted.clone()), "a range missing");
            }
            let other = ServiceKey { port_be: 81, ..key };
            if !backends.is_empty() {
                assert_eq!(read_back(&other, &service, &sources, get), None, "entries written for another service");
                assert_eq!(read_back(&key, &service, &sources, |_| None), None, "backends missing");
            }
        }
    }

    #[test]
    fn a_group_without_targets_refuses_its_share_only() {
        let key = ServiceKey::default();
        let (service, backends) = lay_out(&key, &Wanted::new(false, vec![group(50, &[]), group(50, &[4])]), 1);
        let get = |k| backends.iter().find(|(x, _)| *x == k).map(|(_, b)| *b);
        assert_eq!(lookup(&service, get, 0, 0), None);
        assert_eq!(lookup(&service, get, u32::MAX, 0).map(|t| t.port_be), Some(4));
        assert!(Wanted::new(false, vec![group(1, &[]), group(2, &[])]).groups.is_empty());
    }

    #[test]
    fn damaged_values_are_noticed_and_harmless() {
        let key = ServiceKey::default();
        let bad = Service { groups: 99, ..Service::default() };
        assert_eq!(read_back(&key, &bad, &[], |_| None), None);
        let falling = Service { groups: 2, group: [Group { upto: 5, first: 0, count: 0 }; MAX_GROUPS], ..bad };
        assert_eq!(read_back(&key, &falling, &[], |_| None), None);
    }

    #[test]
    fn weights_are_kept_exactly_or_scaled_to_fit() {
        let w = Wanted::new(false, vec![group(1_000_000, &[1]), group(1, &[2])]);
        assert_eq!(w.groups.iter().map(|g| g.weight).collect::<Vec<_>>(), [1_000_000, 1]);
        let w = Wanted::new(false, vec![group(u32::MAX, &[1]), group(u32::MAX, &[2]), group(1, &[3])]);
        let sum: u64 = w.groups.iter().map(|g| g.weight as u64).sum();
        assert!(sum <= u32::MAX as u64 && w.groups[0].weight == w.groups[1].weight && w.groups[2].weight == 1);
        assert!(Wanted::new(false, vec![group(0, &[1]), group(5, &[])]).groups.is_empty());
        assert_eq!(Wanted::new(false, vec![group(1, &[1]); 40]).groups.len(), MAX_GROUPS);
    }
}
