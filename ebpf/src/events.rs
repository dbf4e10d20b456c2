//! Events of the kernel side: the reader of their pinned ring buffer, and what the bytes of one mean.
//!
//! [`decode`] is PURE and total: what it does not understand it says. Who asks for events is in [`crate::settings`]; what
//! an event means in names is the agent's to say. The buffer has one place of reading, kept in the kernel: of two readers
//! each would see a part, so that only one agent at a time may have one.

use crate::{Error, error::Result, maps::open_pin};
use aya::maps::{Map, MapData, MapError, RingBuf};
use sluice_ebpf_common::{Event, Reason, map};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::Path,
    time::Duration,
};

/// What one record of the ring buffer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// An event, and why.
    Known(Event, Reason),
    /// An event with a reason of programs that are newer or older than this process.
    UnknownReason(Event),
    /// No event: a record of so many bytes.
    Malformed(usize),
}

/// Takes any bytes.
pub fn decode(record: &[u8]) -> Decoded {
    if record.len() != size_of::<Event>() {
        return Decoded::Malformed(record.len());
    }
    // SAFETY: as many bytes as the type has, read without asking for alignment; `Event` is `Plain`, so that every bit
    // pattern is a value of it.
    let event = unsafe { record.as_ptr().cast::<Event>().read_unaligned() };
    Reason::from_number(event.reason).map_or(Decoded::UnknownReason(event), |reason| Decoded::Known(event, reason))
}

/// The bytes of an event, as the kernel side writes them.
pub fn encode(event: &Event) -> Vec<u8> {
    crate::maps::bytes(event).to_vec()
}

/// Reader of the pinned ring buffer. Its descriptor is readable when there are records; read until there is none, then
/// wait for it again.
pub struct EventReader {
    ring: RingBuf<MapData>,
}

impl EventReader {
    /// Opens the ring buffer pinned in `dir`. It may hold records of before: [`Self::discard`].
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(map::EVENTS);
        let failed = |cause: MapError| Error::RingBuffer { path: path.clone(), cause: Box::new(cause) };
        let data = MapData::from_fd(open_pin(&path)?).map_err(failed)?;
        let map = Map::from_map_data(data).map_err(failed)?;
        Ok(Self { ring: RingBuf::try_from(map).map_err(failed)? })
    }

    /// The next record; `None` when there is none at present.
    pub fn next_record(&mut self) -> Option<Decoded> {
        self.ring.next().map(|record| decode(&record))
    }

    /// Forgets what nobody has read: at most what the buffer holds, also while more comes in.
    pub fn discard(&mut self) {
        let most = sluice_ebpf_common::bound::EVENTS / size_of::<Event>();
        for _ in 0..most {
            if self.ring.next().is_none() {
                return;
            }
        }
    }
}

impl AsFd for EventReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl AsRawFd for EventReader {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

/// The clock of [`Event::time_ns`]: time since boot, sleep included.
pub fn since_boot() -> io::Result<Duration> {
    clock(libc::CLOCK_BOOTTIME)
}

pub(crate) fn clock(which: libc::clockid_t) -> io::Result<Duration> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills the structure, which outlives the call.
    if unsafe { libc::clock_gettime(which, &raw mut now) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    Ok(Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_ebpf_common::Addr;

    #[test]
    fn records_are_read_as_they_were_written() {
        let event = Event { time_ns: 7, dropped: 1, reason: Reason::DroppedNoRoute as u32, ..Event::default() };
        assert_eq!(decode(&encode(&event)), Decoded::Known(event, Reason::DroppedNoRoute));
        let mut shifted = vec![0];
        shifted.extend(encode(&event));
        assert_eq!(decode(&shifted[1..]), Decoded::Known(event, Reason::DroppedNoRoute), "wherever it lies");
    }

    #[test]
    fn anything_else_is_said_to_be_so() {
        let newer = Event { reason: 63, netns: 5, ..Event::default() };
        assert_eq!(decode(&encode(&newer)), Decoded::UnknownReason(newer));
        let all_ones = [0xff; size_of::<Event>()];
        assert!(
            matches!(decode(&all_ones), Decoded::UnknownReason(e) if e.before.src == Addr { words: [u32::MAX; 4] })
        );
        for length in (0..300).filter(|n| *n != size_of::<Event>()) {
            assert_eq!(decode(&vec![0; length]), Decoded::Malformed(length));
        }
    }
}
