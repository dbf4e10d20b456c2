//! What a packet program has in hand. It lies in a map of the CPU's own: packet programs of one CPU run one after the
//! other, to their end.

use crate::{maps::WORK, packet::Head};
use aya_ebpf::bindings::{bpf_fib_lookup, bpf_redir_neigh};
use sluice_ebpf_common::*;

#[repr(C)]
pub struct Work {
    /// The clock as it was last seen, and when. These stay from packet to packet.
    pub jiffies: u64,
    pub tick: u32,
    /// Link and flags of the pod that `to.dst` is, where that is known; else 0.
    pub pod: u32,
    pub pod_flags: u32,
    /// The packet as it came.
    pub head: Head,
    /// What it becomes.
    pub to: Flow,
    /// Keys and values on their way to and from maps.
    pub key: Flow,
    pub entry: Translation,
    pub service: ServiceKey,
    pub client: ClientKey,
    /// What an ICMP error is about, as it stands there, and as it is to stand there.
    pub about: Flow,
    pub before: Flow,
    pub quoted: [u32; 10],
    /// The way on.
    pub fib: bpf_fib_lookup,
    pub hop: bpf_redir_neigh,
}

/// Size of the map's value.
pub const WORDS: usize = 64;
const _: () = assert!(size_of::<Work>() <= WORDS * 8 && align_of::<Work>() <= 8);

/// But for the clock, what was there before is nobody's: each field is written before it is read.
#[inline(always)]
pub fn work() -> Option<&'static mut Work> {
    let room = WORK.get_ptr_mut(0)?;
    // SAFETY: large enough and aligned, see above; integers, arrays of them, and enums that are written before they are
    // read; no other reference to it lives while the program runs.
    Some(unsafe { &mut *room.cast::<Work>() })
}
