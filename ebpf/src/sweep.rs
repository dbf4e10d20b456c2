//! Removes connections from the programs' map: those that have timed out, some at a time, for nothing waits for it (the
//! programs do not find them any more; removing them makes room, so that the map forgets none that lives); and at once those
//! whose service has lost the backend.
//!
//! The programs write the map meanwhile. An entry is taken out and looked at in one, and put back where it is another one by
//! then; what comes in between finds a connection with one direction, which they restore.

use crate::{
    error::Result,
    layout::Target,
    maps::{Cursor, HashMap},
    table::ServiceTable,
};
use sluice_ebpf_common::{
    CT_CLOSED, CT_REPLY, CT_WITHDRAWN, Flow, INSIDE, ServiceKey, TCP, TICK_SHIFT, Translation, map,
};
use std::{collections::BTreeSet, io, path::Path, time::Duration};

/// Entries that are read in one call, in less than a millisecond.
const CHUNK: usize = 4_096;
/// Calls per step and map: a whole pass over a full map of connections takes four steps.
const CHUNKS: usize = 8;

/// What passes over the map have seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Connections that live, as of the last whole pass.
    pub connections: u64,
    /// Entries that were removed since the start: two for each connection, one for a relayed one.
    pub removed: u64,
}

/// Backends that services have lost, of the scope [`INSIDE`]: an entry does not say for whom its backend was chosen.
type Lost = BTreeSet<(ServiceKey, Target)>;

/// PURE: whether a service gave a connection a backend that it has lost since.
fn is_lost(lost: &Lost, flow: &Flow, t: &Translation) -> bool {
    if t.flags & CT_REPLY != 0 {
        return false;
    }
    let target = Target { addr: t.to.dst, port_be: t.to.dport_be };
    let of = |addr| ServiceKey { addr, port_be: flow.dport_be, proto: flow.proto, scope: INSIDE };
    // By its own address, or as a node port.
    [flow.dst, flow.dst.unspecified()].into_iter().any(|addr| lost.contains(&(of(addr), target)))
}

/// One of the programs' maps of connections, and how far it was looked through.
struct Table {
    map: HashMap<Flow, Translation>,
    /// Entries that it has room for.
    capacity: usize,
    cursor: Cursor,
    pass: Pass,
    last: Pass,
}

/// What one pass has found that stays.
#[derive(Clone, Copy, Default)]
struct Pass {
    entries: usize,
    connections: u64,
}

/// PURE: from so many entries on, connections that are over make room before it is their time. A full map forgets what it has not
/// seen for longest, and that is not what has just ended but what is open and silent.
fn crowded(capacity: usize, entries: usize) -> bool {
    entries > capacity / 2
}

/// PURE: whether an entry goes. What is over has its time for what may still be on its way; with little room it has one tick.
fn goes(t: &Translation, now: u32, crowded: bool) -> bool {
    t.expired(now) || crowded && t.flags & CT_CLOSED != 0 && t.idle_for(now, 1)
}

pub struct Sweeper {
    /// Of what has not begun in earnest, and of what is open. In this order: an entry moves from the first to the second, so that
    /// who looks through both misses none that moves meanwhile.
    tables: [Table; 2],
    removed: u64,
    /// To be looked for once more.
    lost: Lost,
}

impl Sweeper {
    /// Opens the maps pinned in `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        let table = |name| {
            let map = HashMap::open(dir, name)?;
            let capacity = map.capacity()?;
            Ok(Table { map, capacity, cursor: Cursor::default(), pass: Pass::default(), last: Pass::default() })
        };
        Ok(Self { tables: [table(map::HALVES)?, table(map::FLOWS)?], removed: 0, lost: Lost::new() })
    }

    /// Looks at the next entries; `now` is the time of the programs' clock ([`since_start`]).
    pub fn step(&mut self, now: Duration) -> Result<Seen> {
        let now = (now.as_nanos() >> TICK_SHIFT) as u32;
        let lost = std::mem::take(&mut self.lost);
        self.forget_all(&lost)?;
        for table in &mut self.tables {
            self.removed += table.step(now)?;
        }
        Ok(Seen { connections: self.tables.iter().map(|t| t.last.connections).sum(), removed: self.removed })
    }

    /// No datagram goes any more to a backend that its service has lost, and no connection begins there: to be called when the
    /// service's entry says so. A program that has read the entry before may still be about to note its choice, so that the
    /// next step looks once more. How many entries there were.
    pub fn forget(&mut self, lost: &BTreeSet<(ServiceKey, Target)>) -> Result<usize> {
        let lost = lost.iter().map(|(key, target)| (ServiceKey { scope: INSIDE, ..*key }, *target)).collect();
        let found = self.forget_all(&lost);
        self.lost.extend(lost);
        found
    }

    /// The same for all backends that services do not have now: an agent that was killed between a service's change and the look
    /// through connections has withdrawn it from none. To be called once more after a while, for what moved meanwhile.
    pub fn forget_misled(&self, services: &ServiceTable) -> Result<usize> {
        self.forget_where(|flow, t| services.misleads(flow, t))
    }

    fn forget_all(&self, lost: &Lost) -> Result<usize> {
        if lost.is_empty() {
            return Ok(0);
        }
        self.forget_where(|flow, t| Ok(is_lost(lost, flow, t)))
    }

    fn forget_where(&self, wrong: impl Fn(&Flow, &Translation) -> Result<bool>) -> Result<usize> {
        let mut found = 0;
        for table in &self.tables {
            let (mut cursor, mut end) = (Cursor::default(), false);
            while !end {
                let entries;
                (entries, end) = table.map.some(&mut cursor, CHUNK)?;
                for (flow, t) in &entries {
                    if wrong(flow, t)? {
                        self.withdraw(table, flow, t)?;
                        found += 1;
                    }
                }
            }
        }
        Ok(found)
    }

    /// Datagrams have no beginning: the next one chooses anew, and their answers, which would bring back what they belong to, go
    /// from wherever they are. TCP chooses when its caller begins anew.
    fn withdraw(&self, table: &Table, flow: &Flow, t: &Translation) -> Result<()> {
        if flow.proto != TCP {
            table.map.remove(flow)?;
            let answers = t.to.flipped();
            return self.tables.iter().try_for_each(|table| table.map.remove(&answers).map(drop));
        }
        if t.flags & CT_WITHDRAWN != 0 {
            return Ok(());
        }
        // What a packet has changed since it was read is lost, and its next one changes it again.
        match table.map.get(flow)? {
            Some(t) => table.map.set(flow, &Translation { flags: t.flags | CT_WITHDRAWN, ..t }),
            None => Ok(()),
        }
    }
}

impl Table {
    /// How many entries were removed. What is crowded is looked through to the end, what is not until the next step.
    fn step(&mut self, now: u32) -> Result<u64> {
        let (mut removed, mut chunks) = (0, 0);
        loop {
            let crowded = crowded(self.capacity, self.pass.entries.max(self.last.entries));
            let (entries, end) = self.map.some(&mut self.cursor, CHUNK)?;
            for (flow, t) in entries {
                if goes(&t, now, crowded) {
                    removed += u64::from(self.remove(&flow, now, crowded)?);
                } else {
                    self.pass.entries += 1;
                    self.pass.connections += u64::from(t.flags & CT_REPLY == 0);
                }
            }
            chunks += 1;
            if end {
                self.last = std::mem::take(&mut self.pass);
                self.cursor = Cursor::default();
                return Ok(removed);
            }
            if chunks >= CHUNKS && !crowded {
                return Ok(removed);
            }
        }
    }

    /// Whether it was over still when it was removed.
    fn remove(&self, flow: &Flow, now: u32, crowded: bool) -> Result<bool> {
        match self.map.take(flow)? {
            Some(t) if !goes(&t, now, crowded) => self.map.add(flow, &t).map(|_| false),
            taken => Ok(taken.is_some()),
        }
    }
}

/// The clock of the programs' connections: monotonic, without the time that the machine slept.
pub fn since_start() -> io::Result<Duration> {
    crate::events::clock(libc::CLOCK_MONOTONIC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_ebpf_common::{Addr, CT_ANSWERED, UDP, timeout};

    const VIP: Addr = Addr::from_v4(1);
    const NODE: Addr = Addr::from_v4(2);
    const BACKEND: Addr = Addr::from_v4(3);

    fn flow(dst: Addr, dport_be: u16) -> Flow {
        Flow { src: Addr::from_v4(9), dst, sport_be: 4, dport_be, proto: UDP, pad: [0; 3] }
    }

    fn to(dst: Addr, flags: u32) -> Translation {
        Translation { to: flow(dst, 8080), used: 100, flags }
    }

    fn lost(addr: Addr, port_be: u16) -> Lost {
        let key = ServiceKey { addr, port_be, proto: UDP, scope: INSIDE };
        [(key, Target { addr: BACKEND, port_be: 8080 })].into()
    }

    #[test]
    fn what_is_over_goes_sooner_where_there_is_little_room() {
        let over = Flow { proto: TCP, ..flow(BACKEND, 8080) };
        let of = |flags| Translation { to: over, used: 100, flags };
        for (t, now, with_room, without) in [
            (of(CT_ANSWERED), 104, false, false),
            (of(CT_ANSWERED | CT_CLOSED), 100, false, false),
            (of(CT_ANSWERED | CT_CLOSED), 101, false, false),
            (of(CT_ANSWERED | CT_CLOSED), 102, false, true),
            (of(CT_ANSWERED | CT_CLOSED), 99, false, false),
            (of(CT_ANSWERED | CT_CLOSED), 100 + timeout::TCP_CLOSED + 1, true, true),
            (of(CT_ANSWERED), 101 + timeout::TCP_OPEN, true, true),
        ] {
            assert_eq!((goes(&t, now, false), goes(&t, now, true)), (with_room, without), "{t:?} at {now}");
        }
        assert!(!crowded(131_072, 65_536) && crowded(131_072, 65_537) && !crowded(1, 0));
    }

    #[test]
    fn a_connection_is_judged_by_its_service_and_its_backend() {
        let (vip, node_port) = (lost(VIP, 80), lost(VIP.unspecified(), 30_080));
        for (lost, flow, t, want) in [
            (&vip, flow(VIP, 80), to(BACKEND, 0), true),
            (&vip, flow(VIP, 80), to(BACKEND, CT_ANSWERED), true),
            (&vip, flow(VIP, 81), to(BACKEND, 0), false),
            (&vip, flow(VIP, 80), to(NODE, 0), false),
            (&vip, flow(NODE, 80), to(BACKEND, 0), false),
            (&vip, flow(VIP, 80), to(BACKEND, CT_REPLY), false),
            (&vip, Flow { proto: TCP, ..flow(VIP, 80) }, to(BACKEND, 0), false),
            (&node_port, flow(NODE, 30_080), to(BACKEND, 0), true),
            (&node_port, flow(VIP, 30_080), to(BACKEND, 0), true),
            (&node_port, flow(NODE, 30_081), to(BACKEND, 0), false),
            (&Lost::new(), flow(VIP, 80), to(BACKEND, 0), false),
        ] {
            assert_eq!(is_lost(lost, &flow, &t), want, "{flow:?} to {t:?}");
        }
    }
}
