//! Removes connections that have timed out from the programs' map, some at a time: nothing waits for it. The programs do
//! not find them any more; removing them makes room, so that the map forgets none that lives.

use crate::{
    error::Result,
    maps::{Cursor, HashMap},
};
use sluice_ebpf_common::{CT_REPLY, Flow, TICK_SHIFT, Translation, map};
use std::{io, path::Path, time::Duration};

/// Entries per step: read in one call, in less than a millisecond.
const STEP: usize = 4_096;

/// What passes over the map have seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Connections that live, as of the last whole pass.
    pub connections: u64,
    /// Entries that were removed since the start: two for each connection, one for a relayed one.
    pub removed: u64,
}

pub struct Sweeper {
    flows: HashMap<Flow, Translation>,
    cursor: Cursor,
    counting: u64,
    seen: Seen,
}

impl Sweeper {
    /// Opens the map pinned in `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        let flows = HashMap::open(dir, map::FLOWS)?;
        Ok(Self { flows, cursor: Cursor::default(), counting: 0, seen: Seen::default() })
    }

    /// Looks at the next entries; `now` is the time of the programs' clock ([`since_start`]).
    pub fn step(&mut self, now: Duration) -> Result<Seen> {
        let now = (now.as_nanos() >> TICK_SHIFT) as u32;
        let (entries, end) = self.flows.some(&mut self.cursor, STEP)?;
        for (flow, t) in entries {
            if t.expired(now) {
                self.seen.removed += u64::from(self.flows.remove(&flow)?);
            } else if t.flags & CT_REPLY == 0 {
                self.counting += 1;
            }
        }
        if end {
            self.seen.connections = std::mem::take(&mut self.counting);
            self.cursor = Cursor::default();
        }
        Ok(self.seen)
    }
}

/// The clock of the programs' connections: monotonic, without the time that the machine slept.
pub fn since_start() -> io::Result<Duration> {
    crate::events::clock(libc::CLOCK_MONOTONIC)
}
