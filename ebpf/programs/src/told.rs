//! Events of what happens at sockets: what `route::tell` is for packets. Made only while somebody asks for them, once for
//! each call or connection that begins or is refused; datagrams of an unconnected socket are told when they begin to go
//! somewhere, not one by one.

use crate::{
    balance::Dial,
    maps::{EVENTS, SETTINGS, count},
};
use aya_ebpf::{
    helpers::generated::{bpf_get_netns_cookie, bpf_ktime_get_boot_ns},
    programs::SockAddrContext,
};
use sluice_ebpf_common::*;

/// A call that goes on, to `to`.
#[inline(always)]
pub fn call(ctx: &SockAddrContext, dial: &Dial, to: &Dial, proto: u8, reason: Reason) {
    count(reason);
    if asked(WATCH_FLOWS) {
        write(&event(netns(ctx), dial, to, proto, reason, hook::SOCKET));
    }
}

/// A call that is refused.
#[inline(always)]
pub fn refused(ctx: &SockAddrContext, dial: &Dial, proto: u8, reason: Reason) {
    count(reason);
    if asked(WATCH_DROPS) {
        write(&Event { dropped: 1, ..event(netns(ctx), dial, dial, proto, reason, hook::SOCKET) });
    }
}

/// A connection that comes to a listener, or to none. Its link is one of the pod's, which nobody outside knows by number.
#[inline(always)]
pub fn arrived(from: &Dial, to: &Dial, reason: Reason, taken: bool) {
    count(reason);
    if !asked(if taken { WATCH_FLOWS } else { WATCH_DROPS }) {
        return;
    }
    let mut event = event(0, to, to, TCP, reason, hook::LISTENER);
    (event.before.src, event.before.sport_be) = (from.addr, from.port_be);
    (event.after.src, event.after.sport_be) = (from.addr, from.port_be);
    event.dropped = !taken as u8;
    write(&event);
}

#[inline(always)]
fn asked(who: u32) -> bool {
    SETTINGS.get(0).is_some_and(|s| s.flags & who != 0)
}

#[inline(always)]
fn netns(ctx: &SockAddrContext) -> u64 {
    // SAFETY: helper on the hook's own context.
    unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) }
}

#[inline(always)]
fn event(netns: u64, dial: &Dial, to: &Dial, proto: u8, reason: Reason, hook: u8) -> Event {
    let flow = |d: &Dial| Flow { src: Addr::UNSET, dst: d.addr, sport_be: 0, dport_be: d.port_be, proto, pad: [0; 3] };
    Event {
        // SAFETY: a helper without arguments.
        time_ns: unsafe { bpf_ktime_get_boot_ns() },
        netns,
        before: flow(dial),
        after: flow(to),
        reason: reason as u32,
        ifindex: 0,
        len: 0,
        hook,
        dropped: 0,
        pad: 0,
    }
}

#[inline(always)]
fn write(event: &Event) {
    match EVENTS.reserve(0) {
        Some(mut entry) => {
            entry.write(*event);
            entry.submit(0);
        }
        None => count(Reason::EventLost),
    }
}
