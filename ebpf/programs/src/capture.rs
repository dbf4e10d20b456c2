//! Outbound capture: a meshed pod's TCP socket only gets a mark; its destination stays as the application dialled it.
//! The pod's policy route then loops the SYN over `lo`, where `steer` hands it to the sidecar. Everything that is not
//! captured goes on to `balance`.

use crate::{
    balance::{self, Dial, Verdict},
    maps::{LISTENERS, PODS, count},
    told,
};
use aya_ebpf::{
    helpers::generated::{
        bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_map_lookup_elem, bpf_setsockopt, bpf_sk_release,
    },
    programs::SockAddrContext,
};
use core::ptr;
use sluice_ebpf_common::*;

const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE_INDEX: i32 = 25;
const SO_MARK: i32 = 36;

enum Path {
    Balance,
    /// To a service that is none for the pod: the sidecar would go to its endpoints past the socket's check.
    Deny,
    Capture(ListenKey),
}

#[inline(always)]
pub fn connect(ctx: &SockAddrContext, dial: Dial) -> Verdict {
    let Some(proto) = balance::protocol(ctx) else { return Verdict::LEAVE };
    if proto != TCP {
        return balance::connect(ctx, dial, proto);
    }
    match path(ctx, &dial) {
        Path::Balance => balance::connect(ctx, dial, proto),
        Path::Deny => balance::deny(ctx, &dial, proto),
        Path::Capture(listener) => hand_over(ctx, &dial, listener),
    }
}

/// Whose connection this is. A namespace that no pod is known for (the host, an unknown sandbox) is never captured.
#[inline(always)]
fn path(ctx: &SockAddrContext, dial: &Dial) -> Path {
    // SAFETY: helper on the hook's own context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) };
    // SAFETY: flags and addresses of a live pod; a torn read could only be seen while the pod is made or removed.
    let Some(pod) = (unsafe { PODS.get(netns) }) else { return Path::Balance };
    if pod.flags & POD_MESHED == 0 {
        return Path::Balance;
    }
    // SAFETY: a helper without arguments.
    if unsafe { bpf_get_current_cgroup_id() } == pod.sidecar_cgroup {
        count(Reason::SidecarConnect);
        return Path::Balance;
    }
    let near = dial.addr.is_loopback()
        || dial.addr.is_link_local()
        || dial.addr.is_unspecified()
        || dial.addr.same(&pod.addr4)
        || dial.addr.same(&pod.addr6);
    let service = if near { 0 } else { balance::flags(dial, TCP) };
    if near || service & SERVICE_NODE_LOCAL != 0 {
        count(Reason::LocalConnect);
        return Path::Balance;
    }
    let addr = if dial.addr.is_v4() { pod.addr4 } else { pod.addr6 };
    if service & SERVICE_RESTRICTED != 0 && balance::denied(dial, TCP, &addr) {
        return Path::Deny;
    }
    Path::Capture(ListenKey { addr, direction: OUTBOUND })
}

/// With no listener the SYN would be dropped and no reset could come back from a foreign address: connect would hang.
/// So the refusal is given here.
#[inline(always)]
fn hand_over(ctx: &SockAddrContext, dial: &Dial, listener: ListenKey) -> Verdict {
    if !listening(&listener) {
        told::refused(ctx, dial, TCP, Reason::RefusedNoSidecar);
        return Verdict::REFUSE;
    }
    // SAFETY: the context's socket pointer, checked for null as the verifier asks.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    if sk.is_null() {
        told::refused(ctx, dial, TCP, Reason::RefusedMark);
        return Verdict::DENY;
    }
    // SO_BINDTODEVICE needs no capability and would keep the SYN off `lo`: rather no connection than one past the
    // sidecar.
    // SAFETY: as above.
    if unsafe { (*sk).bound_dev_if } != 0 {
        if !set_option(ctx, SO_BINDTODEVICE_INDEX, 0) {
            told::refused(ctx, dial, TCP, Reason::RefusedBound);
            return Verdict::DENY;
        }
        count(Reason::Unbound);
    }
    if !set_option(ctx, SO_MARK, CAPTURE_MARK) {
        told::refused(ctx, dial, TCP, Reason::RefusedMark);
        return Verdict::DENY;
    }
    told::call(ctx, dial, dial, TCP, Reason::Captured);
    Verdict::LEAVE
}

#[inline(always)]
fn listening(key: &ListenKey) -> bool {
    // SAFETY: a looked-up socket holds a reference, which is given back at once.
    unsafe {
        let sk = bpf_map_lookup_elem(ptr::from_ref(&LISTENERS).cast_mut().cast(), ptr::from_ref(key).cast_mut().cast());
        if sk.is_null() {
            return false;
        }
        bpf_sk_release(sk);
    }
    true
}

#[inline(always)]
fn set_option(ctx: &SockAddrContext, option: i32, mut value: u32) -> bool {
    // SAFETY: option value on this stack, its size given.
    unsafe { bpf_setsockopt(ctx.sock_addr.cast(), SOL_SOCKET, option, (&raw mut value).cast(), 4) == 0 }
}
