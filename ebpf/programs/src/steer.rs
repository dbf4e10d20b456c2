//! `sk_lookup` in a pod's namespace: which listener takes a new TCP connection to a meshed pod, or looped over `lo` by
//! one. Knows pods by address, because this hook has no namespace cookie. UDP is not touched.

use crate::maps::{ADDRS, LISTENERS, PORTS, count};
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
        return uncaptured(&source, &own);
    }
    if read!(l, ingress_ifindex) == LO { outbound(ctx, source) } else { inbound(ctx, own, read!(l, local_port) as u16) }
}

/// Outbound cannot be told from inbound: meshed pods are closed, not open.
#[inline(always)]
fn uncaptured(source: &Addr, own: &Addr) -> bool {
    if meshed(source) {
        count(Reason::DroppedOutbound);
        return false;
    }
    if meshed(own) {
        count(Reason::DroppedInbound);
        return false;
    }
    true
}

#[inline(always)]
fn meshed(addr: &Addr) -> bool {
    // SAFETY: one flag of the pod's entry.
    unsafe { ADDRS.get(addr) }.is_some_and(|p| p.flags & POD_MESHED != 0)
}

#[inline(always)]
fn outbound(ctx: &SkLookupContext, pod: Addr) -> bool {
    if !meshed(&pod) {
        return true;
    }
    let key = ListenKey { addr: pod, direction: OUTBOUND };
    assigned(ctx, key, Reason::SteeredOutbound, Reason::DroppedOutbound)
}

#[inline(always)]
fn inbound(ctx: &SkLookupContext, pod: Addr, port: u16) -> bool {
    if !meshed(&pod) {
        return true;
    }
    // SAFETY: presence only.
    if port == ADMIN_PORT || unsafe { PORTS.get(PortKey { addr: pod, port, pad: 0 }) }.is_some() {
        count(Reason::ExcludedPort);
        return true;
    }
    let key = ListenKey { addr: pod, direction: INBOUND };
    assigned(ctx, key, Reason::SteeredInbound, Reason::DroppedInbound)
}

#[inline(always)]
fn assigned(ctx: &SkLookupContext, key: ListenKey, taken: Reason, dropped: Reason) -> bool {
    match LISTENERS.redirect_sk_lookup(ctx, key, 0) {
        Ok(()) => {
            count(taken);
            true
        }
        Err(ENOENT) => {
            count(dropped);
            false
        }
        Err(_) => {
            count(Reason::AssignFailed);
            false
        }
    }
}
