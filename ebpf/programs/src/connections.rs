//! Connections whose packets are translated: found, made, kept alive. Two entries each, one per direction; either leads
//! to the other, because the key of the other is what this one makes of its packets, flipped.
//!
//! The map forgets its least recently used entries when it is full; what has timed out is not found any more, and the
//! agent removes it in passing.

use crate::{
    maps::FLOWS,
    packet::{ACK, FIN, RST, SYN},
    work::Work,
};
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_jiffies64, bpf_ktime_get_coarse_ns};
use sluice_ebpf_common::*;

const BPF_NOEXIST: u64 = 1;
const EEXIST: i32 = -17;
/// Ports that are tried before a connection is refused: with half of them taken towards one backend port, one connection
/// in 65,536 fails.
const ATTEMPTS: u32 = 16;

/// The clock is asked once per timer interrupt of this CPU's: the count of those is a load, the clock a call.
#[inline(always)]
pub fn now(w: &mut Work) -> u32 {
    // SAFETY: helpers without arguments.
    let jiffies = unsafe { bpf_jiffies64() };
    if w.jiffies != jiffies {
        w.jiffies = jiffies;
        // SAFETY: as above.
        w.tick = (unsafe { bpf_ktime_get_coarse_ns() } >> TICK_SHIFT) as u32;
    }
    w.tick
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Known {
    No,
    /// The packet becomes `w.to`.
    Translated,
    /// It stays as it is and goes to the node of `w.to.dst`.
    Relayed,
}

/// Writes to `w.to` what becomes of the packet, if it belongs to a connection that is known, and brings that forward.
#[inline(always)]
pub fn known(w: &mut Work) -> Known {
    let Some(entry) = FLOWS.get_ptr_mut(&w.head.flow) else { return Known::No };
    // SAFETY: an entry of the map; two CPUs that write it at once write the same, or lose one tick.
    let t = unsafe { &mut *entry };
    let now = now(w);
    let tcp_flags = w.head.tcp_flags;
    let begins = tcp_flags & (SYN | ACK) == SYN;
    let again = begins && t.flags & (CT_CLOSED | CT_REPLY) == CT_CLOSED;
    if t.expired(now) || again {
        return Known::No;
    }
    w.to = t.to;
    if t.flags & CT_RELAYED != 0 {
        // Whether the first try has come to somebody is not known here: the next one goes where all would send it now.
        if begins {
            return Known::No;
        }
        t.used = now;
        t.flags |= CT_ANSWERED
            | if tcp_flags & FIN != 0 { CT_FIN } else { 0 }
            | if tcp_flags & RST != 0 { CT_CLOSED } else { 0 };
        return Known::Relayed;
    }
    let first_answer = t.flags & (CT_REPLY | CT_ANSWERED) == CT_REPLY;
    if t.used != now || first_answer || tcp_flags & (FIN | RST) != 0 {
        w.key = w.to.flipped();
        advance(t, &w.key, tcp_flags, now, first_answer);
    }
    Known::Translated
}

/// Both directions: a connection lives while packets go one way.
#[inline(always)]
fn advance(t: &mut Translation, other: &Flow, tcp_flags: u8, now: u32, first_answer: bool) {
    t.used = now;
    let Some(other) = FLOWS.get_ptr_mut(other) else { return };
    // SAFETY: as above.
    let other = unsafe { &mut *other };
    other.used = now;
    let mut both = 0;
    if first_answer {
        both |= CT_ANSWERED;
    }
    if tcp_flags & FIN != 0 {
        t.flags |= CT_FIN;
        if other.flags & CT_FIN != 0 {
            both |= CT_CLOSED;
        }
    }
    if tcp_flags & RST != 0 {
        both |= CT_CLOSED;
    }
    if both != 0 {
        t.flags |= both;
        other.flags |= both;
    }
}

/// How the source of a new connection is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// As it is; another port only where an answer could not be told from one to another connection.
    Kept,
    /// An address of the node, and a port that no process has.
    Node,
}

/// Notes a new connection whose packets become `w.to`; its source port may change.
#[inline(always)]
pub fn begin(w: &mut Work, source: Source) -> Result<(), Reason> {
    let now = now(w);
    claim(w, source, now)?;
    w.entry.to = w.to;
    (w.entry.used, w.entry.flags) = (now, 0);
    if FLOWS.insert(&w.head.flow, &w.entry, 0).is_ok() {
        return Ok(());
    }
    let _ = FLOWS.remove(&w.key);
    Err(Reason::DroppedTableFull)
}

/// Hops to take of a packet that is relayed: two are left. That is enough for its node to send it on to a third one, and
/// one that comes back from there, because it is not known there, is dropped here.
#[inline(always)]
pub fn relayed_hops(hops: u8) -> u8 {
    const LEFT: u8 = 2;
    if hops > LEFT { hops - LEFT } else { 1 }
}

/// Notes a new connection whose packets go as they are to the node of `w.to.dst`.
#[inline(always)]
pub fn relay(w: &mut Work) -> Result<(), Reason> {
    w.entry.to = w.to;
    (w.entry.used, w.entry.flags) = (now(w), CT_RELAYED);
    FLOWS.insert(&w.head.flow, &w.entry, 0).map_err(|_| Reason::DroppedTableFull)
}

/// Takes the answers' key, under a source port for which it is free.
#[inline(always)]
fn claim(w: &mut Work, source: Source, now: u32) -> Result<(), Reason> {
    const LOW: u32 = *SNAT_PORTS.start() as u32;
    const COUNT: u64 = (*SNAT_PORTS.end() - *SNAT_PORTS.start()) as u64 + 1;
    w.entry.to = w.head.flow.flipped();
    (w.entry.used, w.entry.flags) = (now, CT_REPLY);
    // SAFETY: a helper without arguments.
    let mut random = unsafe { bpf_get_prandom_u32() as u32 };
    for attempt in 0..ATTEMPTS {
        if attempt > 0 || source == Source::Node {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            w.to.sport_be = ((LOW + ((random as u64 * COUNT) >> 32) as u32) as u16).to_be();
        }
        w.key = w.to.flipped();
        match FLOWS.insert(&w.key, &w.entry, BPF_NOEXIST) {
            Ok(()) => return Ok(()),
            Err(EEXIST) => {}
            Err(_) => return Err(Reason::DroppedTableFull),
        }
        // SAFETY: compared only.
        let held = unsafe { FLOWS.get(&w.key) };
        if held.is_none_or(|h| h.expired(now) || h.flags & CT_CLOSED != 0 || h.to.same(&w.entry.to)) {
            return FLOWS.insert(&w.key, &w.entry, 0).map_err(|_| Reason::DroppedTableFull);
        }
    }
    Err(Reason::DroppedNoPort)
}
