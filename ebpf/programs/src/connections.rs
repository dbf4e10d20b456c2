//! Connections whose packets are translated: found, made, kept alive. Two entries each, one per direction; either leads
//! to the other, because the key of the other is what this one makes of its packets, flipped.
//!
//! The map forgets its least recently used entries when it is full; what has timed out is not found any more, and the
//! agent removes it in passing.

use crate::{
    maps::{ADDRS, FLOWS, HALVES},
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
    let Some(t) = find(w) else { return Known::No };
    if !there(w, t) {
        return Known::No;
    }
    let relayed = t.flags & CT_RELAYED != 0;
    if !go_on(w, t) {
        w.pod = 0;
        return Known::No;
    }
    if relayed { Known::Relayed } else { Known::Translated }
}

/// What is known of packets of a flow: by far the most are of connections that are open.
#[inline(always)]
pub fn entry(key: &Flow) -> Option<&'static mut Translation> {
    let entry = match FLOWS.get_ptr_mut(key) {
        Some(entry) => entry,
        None => HALVES.get_ptr_mut(key)?,
    };
    // SAFETY: an entry of a map; two CPUs that write it at once write the same, or lose one tick. One that another CPU removes
    // meanwhile may be another flow's when it is written: only `used` and `flags` are, so that that one gets a flag which is not
    // its own, at worst, and never another one's translation. Nobody writes what he has removed himself: see `keep`.
    Some(unsafe { &mut *entry })
}

/// The entry of the packet's connection, with `w.to` what it makes of the packet.
#[inline(always)]
pub fn find(w: &mut Work) -> Option<&'static mut Translation> {
    let t = entry(&w.head.flow)?;
    let now = now(w);
    if t.expired(now) || begins(w.head.tcp_flags) && anew(t.flags) {
        // Else it would be found ahead of what follows it, which is in the other map.
        let _ = FLOWS.remove(&w.head.flow);
        return None;
    }
    w.to = t.to;
    Some(t)
}

#[inline(always)]
fn begins(tcp_flags: u8) -> bool {
    tcp_flags & (SYN | ACK) == SYN
}

/// Whether a caller that begins once more is given a backend anew: it is over; its backend takes no new ones; or it is relayed,
/// and whether the first try has come to somebody is not known here, so that the next one goes where all would send it now.
#[inline(always)]
fn anew(flags: u32) -> bool {
    flags & (CT_RELAYED | CT_WITHDRAWN) != 0 || flags & (CT_CLOSED | CT_REPLY) == CT_CLOSED
}

/// Whether the pod that packets go to is the one that it was when the connection began; its link, for [`Work::pod`].
#[inline(always)]
fn there(w: &mut Work, t: &Translation) -> bool {
    let stamped = t.stamped();
    if stamped == 0 {
        return true;
    }
    // SAFETY: integers of the entry.
    if let Some(pod) = unsafe { ADDRS.get(&w.to.dst) }
        && stamp(pod.netns) == stamped
    {
        (w.pod, w.pod_flags) = (pod.ifindex, pod.flags);
        return true;
    }
    // What another pod says under that address is not for this caller.
    w.key = w.to.flipped();
    let _ = FLOWS.remove(&w.key);
    let _ = HALVES.remove(&w.key);
    let _ = FLOWS.remove(&w.head.flow);
    false
}

/// What marks an address as that of a pod of this node, if it is.
#[inline(always)]
fn here(addr: &Addr) -> u32 {
    // SAFETY: an integer of the entry.
    unsafe { ADDRS.get(addr) }.map_or(0, |pod| stamp(pod.netns))
}

/// A packet of it has come. Both directions: a connection lives while packets go one way. Nobody may use the entry afterwards:
/// it may have moved. False: its port is another caller's by now, and it is forgotten.
#[inline(always)]
pub fn go_on(w: &mut Work, t: &mut Translation) -> bool {
    let (tcp_flags, now) = (w.head.tcp_flags, w.tick);
    if t.flags & CT_RELAYED != 0 {
        t.used = now;
        t.flags |= CT_ANSWERED
            | if tcp_flags & FIN != 0 { CT_FIN } else { 0 }
            | if tcp_flags & RST != 0 { CT_CLOSED } else { 0 };
        if t.flags & CT_HALF != 0 && tcp_flags & RST == 0 {
            keep(&mut w.entry, &w.head.flow);
        }
        return true;
    }
    let first_answer = t.flags & (CT_REPLY | CT_ANSWERED) == CT_REPLY;
    let opens = t.flags & (CT_REPLY | CT_ANSWERED | CT_HALF) == CT_ANSWERED | CT_HALF && tcp_flags & (SYN | RST) == 0;
    // The port of one that is over may be another's from one moment to the next.
    let over = t.flags & CT_CLOSED != 0;
    if t.used_before(now) || first_answer || opens || over || tcp_flags & (FIN | RST) != 0 {
        w.key = w.to.flipped();
        return advance(w, t, if first_answer { CT_ANSWERED } else { 0 }, opens);
    }
    true
}

/// What both directions gain, beside what the packet's own flags say; and whether they are open from now on.
#[inline(always)]
fn advance(w: &mut Work, t: &mut Translation, gained: u32, opens: bool) -> bool {
    let (tcp_flags, now) = (w.head.tcp_flags, w.tick);
    t.used = now;
    t.flags |= gained;
    if tcp_flags & FIN != 0 {
        t.flags |= CT_FIN;
    }
    if tcp_flags & RST != 0 {
        t.flags |= CT_CLOSED;
    }
    let Some(other) = entry(&w.key) else {
        restore(w, t, opens);
        return true;
    };
    // Answers are of one connection only. A caller may have two entries that lead to the same, with two destinations: see `also`.
    let answers = t.flags & CT_REPLY != 0;
    if other.to.dport_be != w.head.flow.sport_be
        || !other.to.dst.same(&w.head.flow.src)
        || answers && (other.to.sport_be != w.head.flow.dport_be || !other.to.src.same(&w.head.flow.dst))
    {
        let _ = FLOWS.remove(&w.head.flow);
        let _ = HALVES.remove(&w.head.flow);
        return false;
    }
    other.used = now;
    let fins = t.flags & other.flags & CT_FIN;
    let closed = (t.flags & CT_CLOSED) | if fins != 0 { CT_CLOSED } else { 0 };
    t.flags |= closed;
    other.flags |= gained | closed;
    if opens {
        keep(&mut w.entry, &w.head.flow);
        keep(&mut w.entry, &w.key);
    }
    true
}

/// From now on it is in the map of what is open. It is looked up anew, because writing one entry may make a map forget another
/// that was in hand; and it is written there before it goes here, so that it is always found.
#[inline(always)]
fn keep(entry: &mut Translation, key: &Flow) {
    // SAFETY: copied out.
    if let Some(half) = unsafe { HALVES.get(key) } {
        *entry = *half;
        entry.flags &= !CT_HALF;
        // Another CPU may have been first. Without room it stays, and its next packet comes here again.
        if matches!(FLOWS.insert(key, &*entry, BPF_NOEXIST), Ok(()) | Err(EEXIST)) {
            let _ = HALVES.remove(key);
        }
    } else if let Some(open) = FLOWS.get_ptr_mut(key) {
        // Begun while there was one map for all.
        // SAFETY: as in `entry`.
        unsafe { (*open).flags &= !CT_HALF };
    }
}

/// The map has forgotten the other direction, at `w.key`: without it, answers would go out as they are.
#[inline(always)]
fn restore(w: &mut Work, t: &Translation, opens: bool) {
    const SHARED: u32 = CT_ANSWERED | CT_HALF | CT_CLOSED | CT_WITHDRAWN;
    w.entry.to = w.head.flow.flipped();
    (w.entry.used, w.entry.flags) = (w.tick, t.flags & SHARED | !t.flags & CT_REPLY | here(&w.head.flow.src));
    if opens {
        w.entry.flags &= !CT_HALF;
    }
    let _ = match w.entry.flags & CT_HALF {
        0 => FLOWS.insert(&w.key, &w.entry, BPF_NOEXIST),
        _ => HALVES.insert(&w.key, &w.entry, BPF_NOEXIST),
    };
    if opens {
        keep(&mut w.entry, &w.head.flow);
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
    (w.entry.used, w.entry.flags) = (now, CT_HALF | here(&w.to.dst));
    if HALVES.insert(&w.head.flow, &w.entry, 0).is_ok() {
        return Ok(());
    }
    let _ = HALVES.remove(&w.key);
    Err(Reason::DroppedTableFull)
}

/// Notes that packets of `w.key` become `w.to` too, as those of the connection in hand do.
#[inline(always)]
pub fn also(w: &mut Work) {
    if w.key.same(&w.head.flow) {
        return;
    }
    w.entry.to = w.to;
    (w.entry.used, w.entry.flags) = (w.tick, CT_HALF);
    // Without room, or beside another connection, the parts go out as they are, and nobody takes them.
    let _ = HALVES.insert(&w.key, &w.entry, BPF_NOEXIST);
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
    (w.entry.used, w.entry.flags) = (now(w), CT_RELAYED | CT_HALF);
    HALVES.insert(&w.head.flow, &w.entry, 0).map_err(|_| Reason::DroppedTableFull)
}

/// Takes the answers' key, under a source port for which it is free.
#[inline(always)]
fn claim(w: &mut Work, source: Source, now: u32) -> Result<(), Reason> {
    w.entry.to = w.head.flow.flipped();
    (w.entry.used, w.entry.flags) = (now, CT_REPLY | CT_HALF | here(&w.head.flow.src));
    w.key = w.to.flipped();
    let kept = source == Source::Kept && entry(&w.key).is_none_or(|held| free(held, &w.entry, now));
    if kept || seek(w, now) { take(w, now) } else { Err(Reason::DroppedNoPort) }
}

/// A source port at random whose answers' key nobody has, or one whose connection is over. The verifier of 5.15 follows each turn
/// by itself, from wherever a connection may begin: here is nothing that can wait until the port is taken.
#[inline(always)]
fn seek(w: &mut Work, now: u32) -> bool {
    const LOW: u32 = *SNAT_PORTS.start() as u32;
    const COUNT: u64 = (*SNAT_PORTS.end() - *SNAT_PORTS.start()) as u64 + 1;
    // SAFETY: a helper without arguments.
    let mut random = unsafe { bpf_get_prandom_u32() as u32 };
    (0..ATTEMPTS).any(|_| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        w.to.sport_be = ((LOW + ((random as u64 * COUNT) >> 32) as u32) as u16).to_be();
        w.key.dport_be = w.to.sport_be;
        entry(&w.key).is_none_or(|held| held.flags & CT_CLOSED != 0 || held.expired(now))
    })
}

/// Whether the answers' key that an entry has may be another's.
#[inline(always)]
fn free(held: &Translation, new: &Translation, now: u32) -> bool {
    held.expired(now) || held.flags & CT_CLOSED != 0 || held.to.same(&new.to)
}

/// Takes a key that was free just now; who is second fails.
#[inline(always)]
fn take(w: &mut Work, now: u32) -> Result<(), Reason> {
    match HALVES.insert(&w.key, &w.entry, BPF_NOEXIST) {
        Ok(()) => {}
        Err(EEXIST) => {
            // SAFETY: compared only.
            if !unsafe { HALVES.get(&w.key) }.is_none_or(|held| free(held, &w.entry, now)) {
                return Err(Reason::DroppedNoPort);
            }
            HALVES.insert(&w.key, &w.entry, 0).map_err(|_| Reason::DroppedTableFull)?;
        }
        Err(_) => return Err(Reason::DroppedTableFull),
    }
    // Looked up second: what opens meanwhile is in both maps before it leaves the first.
    // SAFETY: as above.
    match unsafe { FLOWS.get(&w.key) } {
        None => Ok(()),
        Some(held) if free(held, &w.entry, now) => {
            let _ = FLOWS.remove(&w.key);
            Ok(())
        }
        Some(_) => {
            let _ = HALVES.remove(&w.key);
            Err(Reason::DroppedNoPort)
        }
    }
}
