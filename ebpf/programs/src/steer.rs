//! `sk_lookup` in a pod's namespace: which listener takes a new TCP connection to a meshed pod, or looped over `lo` by
//! one. Knows pods by address, because this hook has no namespace cookie. UDP is not touched.

use crate::{
    balance::Dial,
    maps::{ADDRS, LISTENERS, PORTS, count},
    told,
};
use aya_ebpf::{bindings::bpf_sk_lookup, programs::SkLookupContext};
use core::ptr;
use sluice_ebpf_common::*;

const AF_INET: u32 = 2;
const LO: u32 = 1;
const ENOENT: i32 = -2;

/// Whether the kernel says over which link a connection comes (5.17); as `HAS_SET_RETVAL` in `main`.
#[unsafe(no_mangle)]
static HAS_INGRESS_IFINDEX: u8 = 1;

/// Volatile and both families always: otherwise the two branches are merged into one load at a computed offset, which
/// the verifier refuses.
macro_rules! read {
    ($p:expr, $($field:tt)*) => { unsafe { ptr::read_volatile(&raw const (*$p).$($field)*) } };
}

#[inline(always)]
fn ends(l: *mut bpf_sk_lookup) -> (Addr, Addr) {
    let (remote4, local4) = (read!(l, remote_ip4), read!(l, local_ip4));
    let remote6 = [read!(l, remote_ip6[0]), read!(l, remote_ip6[1]), read!(l, remote_ip6[2]), read!(l, remote_ip6[3])];
    let local6 = [read!(l, local_ip6[0]), read!(l, local_ip6[1]), read!(l, local_ip6[2]), read!(l, local_ip6[3])];
    if read!(l, family) == AF_INET {
        return (Addr::from_v4(remote4), Addr::from_v4(local4));
    }
    (Addr { words: remote6 }, Addr { words: local6 })
}

/// Whether the connection may go on; a captured one has then got its listener.
#[inline(always)]
pub fn admit(ctx: &SkLookupContext) -> bool {
    let l = ctx.lookup;
    if read!(l, protocol) != TCP as u32 {
        return true;
    }
    let (source, own) = ends(l);
    // Calls inside the pod. Not told by the interface: from pod address to pod address it is eth0's index.
    if source.is_loopback() || own.is_loopback() || source.same(&own) {
        return true;
    }
    // SAFETY: a plain read of the program's own read-only data; volatile, else the compiler folds the 1 above.
    if unsafe { ptr::read_volatile(&raw const HAS_INGRESS_IFINDEX) } == 0 {
        return uncaptured(l, source, own);
    }
    if read!(l, ingress_ifindex) == LO { outbound(ctx, source, own) } else { inbound(ctx, source, own) }
}

/// Who dials and who is dialled, with their ports.
#[inline(always)]
fn dials(l: *mut bpf_sk_lookup, source: Addr, own: Addr) -> (Dial, Dial) {
    let (remote_be, local) = (read!(l, remote_port), read!(l, local_port) as u16);
    (Dial { addr: source, port_be: remote_be }, Dial { addr: own, port_be: local.to_be() })
}

/// Outbound cannot be told from inbound: meshed pods are closed, not open.
#[inline(always)]
fn uncaptured(l: *mut bpf_sk_lookup, source: Addr, own: Addr) -> bool {
    let reason = if meshed(&source) {
        Reason::DroppedOutbound
    } else if meshed(&own) {
        Reason::DroppedInbound
    } else {
        return true;
    };
    let (from, to) = dials(l, source, own);
    told::arrived(&from, &to, reason, false);
    false
}

#[inline(always)]
fn meshed(addr: &Addr) -> bool {
    // SAFETY: one flag of the pod's entry.
    unsafe { ADDRS.get(addr) }.is_some_and(|p| p.flags & POD_MESHED != 0)
}

/// Of a connection that is taken, its `connect` has told already.
#[inline(always)]
fn outbound(ctx: &SkLookupContext, pod: Addr, dialled: Addr) -> bool {
    if !meshed(&pod) {
        return true;
    }
    let key = ListenKey { addr: pod, direction: OUTBOUND };
    let reason = assigned(ctx, key, Reason::SteeredOutbound, Reason::DroppedOutbound);
    if !reason.ends() {
        count(reason);
        return true;
    }
    let (from, to) = dials(ctx.lookup, pod, dialled);
    told::arrived(&from, &to, reason, false);
    false
}

#[inline(always)]
fn inbound(ctx: &SkLookupContext, source: Addr, pod: Addr) -> bool {
    if !meshed(&pod) {
        return true;
    }
    let (from, to) = dials(ctx.lookup, source, pod);
    let port = u16::from_be(to.port_be);
    // SAFETY: presence only.
    if port == ADMIN_PORT || unsafe { PORTS.get(PortKey { addr: pod, port, pad: 0 }) }.is_some() {
        count(Reason::ExcludedPort);
        return true;
    }
    let key = ListenKey { addr: pod, direction: INBOUND };
    let reason = assigned(ctx, key, Reason::SteeredInbound, Reason::DroppedInbound);
    let taken = !reason.ends();
    told::arrived(&from, &to, reason, taken);
    taken
}

#[inline(always)]
fn assigned(ctx: &SkLookupContext, key: ListenKey, taken: Reason, dropped: Reason) -> Reason {
    match LISTENERS.redirect_sk_lookup(ctx, key, 0) {
        Ok(()) => taken,
        Err(ENOENT) => dropped,
        Err(_) => Reason::AssignFailed,
    }
}
